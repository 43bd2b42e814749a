//! Tunnels and their pool over loopback with real TLS: what is shared, what is refused, and that nobody is stalled.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::Cell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, Response, StatusCode};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tulle_certs::ca::Authority;
use tulle_certs::{Issued, SpiffeId, request};
use ztunnel::base::Counts;
use ztunnel::base::budget::Budget;
use ztunnel::base::drain::{Drain, Drained, Phase, drain};
use ztunnel::base::netns::{Netns, NetnsThread};
use ztunnel::base::sockets::{Options, PodSockets};
use ztunnel::base::window::{FLOOR, Window};
use ztunnel::hbone::client::Dialer;
use ztunnel::hbone::headers::connect_request;
use ztunnel::hbone::pool::{Key, Opened, Pool};
use ztunnel::hbone::{Config, server};
use ztunnel::outcome::Code;
use ztunnel::relay::{self, TcpSide, Terms};
use ztunnel::tls::{Trust, WorkloadCert};

fn now() -> i64 {
    i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    fn new() -> Self {
        let _ = (*ztunnel::tls::provider()).clone().install_default();
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn cert(&self, id: &str) -> Arc<WorkloadCert> {
        cert(self.dir.path(), id)
    }
}

fn cert(dir: &Path, id: &str) -> Arc<WorkloadCert> {
    let id: SpiffeId = id.parse().unwrap();
    let authority = Authority::open(dir, now()).unwrap();
    let asked = request(&id).unwrap();
    let chain = authority.sign(&tulle_certs::parse_csr(&asked.csr_pem).unwrap(), &id, 3600, now()).unwrap();
    Arc::new(WorkloadCert::new(Issued::parse(&chain, &id).unwrap(), asked.key, &Trust::default()).unwrap())
}

const A: &str = "spiffe://cluster.local/ns/shop/sa/a";
const B: &str = "spiffe://cluster.local/ns/shop/sa/b";

/// Sockets of this test's own namespace, without the mark, which needs privilege.
fn dialer(cert: Arc<WorkloadCert>) -> Dialer {
    let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
    let sockets = Arc::new(PodSockets::new(netns, NetnsThread::start().unwrap(), options));
    Dialer { sockets, cert, budget: Budget::new(64 << 20), patience: Config::default().patience() }
}

fn key(expected: &str, address: SocketAddr) -> Key {
    Key {
        source: A.parse().unwrap(),
        pod: "a".into(),
        expected: vec![expected.parse().unwrap()].into(),
        address,
        beyond: None,
        keepalive: None,
    }
}

/// What the serving side has.
#[derive(Clone)]
struct Side {
    cert: Arc<WorkloadCert>,
    drained: Drained,
    tunnels: Rc<Cell<usize>>,
    budget: Arc<Budget>,
    /// Where streams to port 3 are relayed to.
    application: SocketAddr,
    relayed: Rc<Counts>,
}

/// Echoes every stream, except those to port 1, which are never read, those to port 2, which are refused, and those to
/// port 3, which go to the application.
async fn serve(listener: TcpListener, side: Side) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let side = side.clone();
        tokio::task::spawn_local(async move {
            let Ok(tls) = TlsAcceptor::from(side.cert.server_config()).accept(tcp).await else { return };
            side.tunnels.set(side.tunnels.get() + 1);
            let config = Config::default();
            let window = Window::new(&side.budget, config.stream_window, config.connection_window);
            let handle = |incoming| {
                tokio::task::spawn_local(answer(side.clone(), window.clone(), incoming));
            };
            let _ =
                server::serve(tls, config, side.drained.clone(), sleep(Duration::from_secs(60)), &window, handle).await;
        });
    }
}

async fn answer(side: Side, window: Rc<Window>, (request, mut respond): server::Incoming) {
    let port = request.uri().port_u16().unwrap_or(0);
    if port == 2 {
        let refused = Response::builder().status(StatusCode::UNAUTHORIZED).body(()).unwrap();
        respond.send_response(refused, true).unwrap();
        return;
    }
    let mut send = respond.send_response(Response::new(()), false).unwrap();
    let mut body = request.into_body();
    let slot = window.enter();
    let waiting = slot.stalled();
    if port == 1 {
        std::future::pending::<()>().await;
    }
    drop(waiting);
    if port == 3 {
        let tcp = TcpStream::connect(side.application).await.unwrap();
        socket2::SockRef::from(&tcp).set_send_buffer_size(4096).unwrap();
        let limits = relay::Limits::default();
        let terms = Terms { counts: &side.relayed, limits, budget: &side.budget };
        let recv = async { Ok(body) };
        relay::tunnel(tcp, send, recv, TcpSide::Server, terms, &slot, std::pin::pin!(std::future::pending())).await;
        return;
    }
    while let Some(Ok(chunk)) = body.data().await {
        let _ = body.flow_control().release_capacity(chunk.len());
        send.send_data(chunk, false).unwrap();
    }
    let _ = send.send_data(Bytes::new(), true);
}

struct World {
    pki: Pki,
    address: SocketAddr,
    pool: Rc<Pool>,
    dialer: Dialer,
    drain: Drain,
    tunnels: Rc<Cell<usize>>,
    side: Side,
    /// Where the application's connections arrive, unread.
    application: TcpListener,
}

impl World {
    async fn new(config: Config) -> Self {
        Self::with_budget(config, Budget::new(64 << 20)).await
    }

    /// With what the serving side may buffer.
    async fn with_budget(config: Config, budget: Arc<Budget>) -> Self {
        let pki = Pki::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // What the kernel takes is not what the proxy holds.
        socket2::SockRef::from(&application).set_recv_buffer_size(4096).unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, drained) = drain();
        let tunnels = Rc::new(Cell::new(0));
        let side = Side {
            cert: pki.cert(B),
            drained,
            tunnels: tunnels.clone(),
            budget,
            application: application.local_addr().unwrap(),
            relayed: Rc::default(),
        };
        tokio::task::spawn_local(serve(listener, side.clone()));
        let dialer = dialer(pki.cert(A));
        Self { pki, address, pool: Pool::new(config), dialer, drain, tunnels, side, application }
    }

    async fn open(&self, target: &str) -> Result<Opened, ztunnel::outcome::Outcome> {
        self.open_from("a", target).await
    }

    /// On tunnels of the pod `pod`.
    async fn open_from(&self, pod: &str, target: &str) -> Result<Opened, ztunnel::outcome::Outcome> {
        let request = connect_request(target, HeaderMap::new()).unwrap();
        let key = Key { pod: pod.into(), ..key(B, self.address) };
        self.pool.open(&key, &self.dialer, &request).await
    }

    async fn echo(&self, text: &'static [u8]) -> Vec<u8> {
        self.echo_from("a", text).await
    }

    async fn echo_from(&self, pod: &str, text: &'static [u8]) -> Vec<u8> {
        let mut opened = self.open_from(pod, "10.0.0.1:80").await.unwrap();
        opened.send.send_data(Bytes::from_static(text), true).unwrap();
        let response = opened.response.await.unwrap();
        read_all(response.into_body()).await
    }
}

async fn read_all(mut body: RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        let _ = body.flow_control().release_capacity(chunk.len());
        all.extend_from_slice(&chunk);
    }
    all
}

fn run(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        timeout(Duration::from_secs(30), test()).await.expect("the test took longer than 30 s");
    });
}

#[test]
fn streams_of_one_pair_share_a_tunnel_and_early_bytes_need_no_answer() {
    run(async || {
        let world = World::new(Config::default()).await;
        for _ in 0..20 {
            assert_eq!(world.echo(b"hello").await, b"hello");
        }
        assert_eq!(world.tunnels.get(), 1);
    });
}

#[test]
fn after_a_peak_one_idle_tunnel_of_a_pair_stays() {
    run(async || {
        let world = World::new(Config { max_streams: 2, ..Config::default() }).await;
        let mut streams = Vec::new();
        for _ in 0..6 {
            streams.push(world.open("10.0.0.1:1").await.unwrap());
        }
        assert!(world.pool.tunnels() >= 3, "{} tunnels for 6 streams", world.pool.tunnels());
        drop(streams);
        while world.pool.tunnels() > 1 {
            sleep(Duration::from_millis(10)).await;
        }
        let opened = world.tunnels.get();
        assert_eq!(world.echo(b"hello").await, b"hello");
        assert_eq!((world.tunnels.get(), world.pool.tunnels()), (opened, 1), "the one that stayed is used");
    });
}

#[test]
fn a_peer_with_another_identity_gets_no_byte() {
    run(async || {
        let world = World::new(Config::default()).await;
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let wrong = key("spiffe://cluster.local/ns/shop/sa/somebody-else", world.address);
        let error = world.pool.open(&wrong, &world.dialer, &request).await.err().unwrap();
        assert_eq!(error.code, Code::WrongIdentity, "{error}");
        assert!(error.to_string().contains(B) && error.to_string().contains("somebody-else"), "{error}");
        assert_eq!(world.tunnels.get(), 0);
    });
}

#[test]
fn a_peer_of_another_authority_is_refused() {
    run(async || {
        let world = World::new(Config::default()).await;
        let foreign = Pki::new();
        let stranger = dialer(foreign.cert(A));
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let error = world.pool.open(&key(B, world.address), &stranger, &request).await.err().unwrap();
        assert_eq!(error.code, Code::TlsFailed, "{error}");
        drop(world.pki);
    });
}

#[test]
fn stalled_streams_do_not_stall_the_others() {
    run(async || {
        let world = World::new(Config::default()).await;
        let mut stalled = Vec::new();
        for _ in 0..8 {
            let mut opened = world.open("10.0.0.1:1").await.unwrap();
            // Fill the stream's window: the other side never reads.
            for _ in 0..32 {
                opened.send.reserve_capacity(32 * 1024);
                if timeout(Duration::from_millis(50), poll_fn(|cx| opened.send.poll_capacity(cx))).await.is_err() {
                    break;
                }
                let ready = opened.send.capacity().min(32 * 1024);
                opened.send.send_data(Bytes::from(vec![0; ready]), false).unwrap();
            }
            stalled.push(opened);
        }
        for _ in 0..50 {
            assert_eq!(world.echo(b"not stalled").await, b"not stalled");
        }
        assert_eq!(world.tunnels.get(), 1);
    });
}

#[test]
fn the_next_tunnel_is_opened_before_one_is_full() {
    run(async || {
        let world = World::new(Config { max_streams: 10, ..Config::default() }).await;
        let mut open = Vec::new();
        for _ in 0..9 {
            open.push(world.open("10.0.0.1:80").await.unwrap());
        }
        let mut waited = 0;
        while world.tunnels.get() < 2 {
            sleep(Duration::from_millis(5)).await;
            waited += 1;
            assert!(waited < 1000, "no second tunnel");
        }
        for _ in 0..30 {
            open.push(world.open("10.0.0.1:80").await.unwrap());
        }
        assert!(world.pool.tunnels() >= 4, "{} tunnels for 39 streams", world.pool.tunnels());
    });
}

#[test]
fn waiters_for_a_failing_tunnel_all_get_its_error_at_once() {
    run(async || {
        let world = World::new(Config { refused_retry: Duration::from_millis(200), ..Config::default() }).await;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dead = listener.local_addr().unwrap();
        drop(listener);
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let key = key(B, dead);
        let open = || world.pool.open(&key, &world.dialer, &request);
        let (a, b, c, d) = tokio::join!(open(), open(), open(), open());
        for result in [a, b, c, d] {
            assert_eq!(result.err().unwrap().code, Code::ConnectFailed);
        }
    });
}

#[test]
fn waiters_for_a_silent_peer_share_one_attempt_and_all_get_its_error() {
    run(async || {
        let config = Config { handshake_timeout: Duration::from_millis(300), ..Config::default() };
        let world = World::new(config).await;
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let key = key(B, silent.local_addr().unwrap());
        let open = || world.pool.open(&key, &world.dialer, &request);
        let (a, b, c, d) = tokio::join!(open(), open(), open(), open());
        for result in [a, b, c, d] {
            assert_eq!(result.err().unwrap().code, Code::ConnectTimeout);
        }
        let mut attempts = Vec::new();
        while let Ok(Ok(attempt)) = timeout(Duration::from_millis(50), silent.accept()).await {
            attempts.push(attempt);
        }
        assert_eq!(attempts.len(), 1, "one after the other would be one attempt each");
        assert_eq!(world.echo(b"others are not held up").await, b"others are not held up");
    });
}

/// Like [`serve`], for a peer that takes `most` streams a tunnel. Counts the most that were ever open in one.
async fn serve_few(listener: TcpListener, cert: Arc<WorkloadCert>, most: u32, seen: Rc<Cell<usize>>) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let (cert, seen) = (cert.clone(), seen.clone());
        tokio::task::spawn_local(async move {
            let tls = TlsAcceptor::from(cert.server_config()).accept(tcp).await.unwrap();
            let mut connection =
                h2::server::Builder::new().max_concurrent_streams(most).handshake::<_, Bytes>(tls).await.unwrap();
            let open = Rc::new(Cell::new(0_usize));
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                open.set(open.get() + 1);
                seen.set(seen.get().max(open.get()));
                let open = open.clone();
                tokio::task::spawn_local(async move {
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    let all = read_all(request.into_body()).await;
                    send.send_data(all.into(), true).unwrap();
                    open.set(open.get() - 1);
                });
            }
        });
    }
}

#[test]
fn a_peer_that_takes_few_streams_gets_more_tunnels_and_no_stream_waits_for_another() {
    run(async || {
        let world = World::new(Config::default()).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let key = key(B, listener.local_addr().unwrap());
        let seen = Rc::new(Cell::new(0));
        tokio::task::spawn_local(serve_few(listener, world.pki.cert(B), 3, seen.clone()));
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let mut open = Vec::new();
        for number in 0..12 {
            let opened = timeout(Duration::from_secs(5), world.pool.open(&key, &world.dialer, &request)).await;
            let Opened { response, send, lease } = opened.unwrap().unwrap();
            // None of those before has ended: one that stood in a queue inside the tunnel would never be answered.
            let answer = timeout(Duration::from_secs(5), response).await;
            let answer = answer.unwrap_or_else(|_| panic!("stream {number} waits for the others")).unwrap();
            open.push((send, answer.into_body(), lease));
        }
        assert!(seen.get() <= 3 && world.pool.tunnels() >= 4, "{} in one of {}", seen.get(), world.pool.tunnels());
        for (mut send, body, _lease) in open {
            send.send_data(Bytes::from_static(b"bytes"), true).unwrap();
            assert_eq!(read_all(body).await, b"bytes");
        }
    });
}

#[test]
fn a_refusal_is_seen_as_such() {
    run(async || {
        let world = World::new(Config::default()).await;
        let opened = world.open("10.0.0.1:2").await.unwrap();
        assert_eq!(opened.response.await.unwrap().status(), StatusCode::UNAUTHORIZED);
    });
}

#[test]
fn a_draining_server_serves_what_was_open_and_new_streams_find_another_tunnel() {
    run(async || {
        let world = World::new(Config::default()).await;
        let mut opened = world.open("10.0.0.1:80").await.unwrap();
        opened.send.send_data(Bytes::from_static(b"before"), false).unwrap();
        let mut body = opened.response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "before");
        world.drain.advance(Phase::Draining);
        opened.send.send_data(Bytes::from_static(b" and after"), true).unwrap();
        assert_eq!(read_all(body).await, b" and after");
    });
}

#[test]
fn a_stream_that_crosses_the_goodbye_is_served() {
    run(async || {
        let world = World::new(Config::default()).await;
        let mut before = world.open("10.0.0.1:80").await.unwrap();
        before.send.send_data(Bytes::from_static(b"before"), false).unwrap();
        let mut body = before.response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "before");
        // The client has not heard of it when it opens the next one.
        world.drain.advance(Phase::Draining);
        let mut crossing = world.open("10.0.0.1:80").await.unwrap();
        crossing.send.send_data(Bytes::from_static(b"crossing"), true).unwrap();
        let answer = timeout(Duration::from_secs(5), crossing.response).await.expect("nobody serves it").unwrap();
        assert_eq!(read_all(answer.into_body()).await, b"crossing");
        assert_eq!(world.tunnels.get(), 1, "it went on the tunnel that was saying goodbye");
        before.send.send_data(Bytes::new(), true).unwrap();
    });
}

/// Sends on each stream what its window takes, until nothing has moved for a while; how much it was.
async fn fill(streams: &mut [Opened]) -> usize {
    let mut sent = 0;
    loop {
        let before = sent;
        for opened in streams.iter_mut() {
            opened.send.reserve_capacity(64 * 1024);
            let ready = timeout(Duration::from_millis(5), poll_fn(|cx| opened.send.poll_capacity(cx))).await;
            let ready = opened.send.capacity().min(if ready.is_ok() { 64 * 1024 } else { 0 });
            if ready > 0 {
                opened.send.send_data(Bytes::from(vec![7; ready]), false).unwrap();
                sent += ready;
            }
        }
        if sent == before {
            return sent;
        }
    }
}

#[test]
fn who_reads_nothing_is_held_to_the_budget_and_loses_no_byte() {
    run(async || {
        let budget = Budget::new(2 << 20);
        let world = World::with_budget(Config::default(), budget.clone()).await;
        let mut streams = Vec::new();
        for _ in 0..60 {
            streams.push(world.open("10.0.0.1:3").await.unwrap());
        }
        let sent = fill(&mut streams).await;
        let passed = usize::try_from(world.side.relayed.up.get()).unwrap();
        let (held, bound) = (sent - passed, budget.limit() + FLOOR);
        assert!(held <= bound, "{held} bytes are held, {bound} may be; without a budget it is 15 MB");
        assert!(held > budget.limit() / 4, "a budget that nobody can use proves nothing: {held}");
        assert!(budget.used() <= bound && budget.waits() > 0, "{budget:?}");
        assert_eq!(world.tunnels.get(), 1);

        assert_eq!(world.echo_from("other", b"not stalled").await, b"not stalled", "another pod's tunnel goes on");

        // Somebody reads: everything arrives, and the window is whole again.
        for opened in &mut streams {
            opened.send.send_data(Bytes::new(), true).unwrap();
        }
        let mut arrived = 0;
        for _ in 0..streams.len() {
            let (mut tcp, _) = world.application.accept().await.unwrap();
            let mut all = Vec::new();
            tcp.read_to_end(&mut all).await.unwrap();
            arrived += all.len();
        }
        assert_eq!(arrived, sent);
        assert_eq!(world.echo(b"and so does the first").await, b"and so does the first");
        assert!(budget.used() <= bound, "{budget:?}");
    });
}

/// A server that answers nothing, over a pipe, in paused time; and the client's side of the tunnel.
async fn piped(lifetime: Duration) -> (tokio::task::JoinHandle<Option<Code>>, h2::client::SendRequest<Bytes>, Drain) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let (owner, drained) = drain();
    let serving = tokio::task::spawn_local(async move {
        let config = Config::default();
        let window = Window::new(&Budget::new(1 << 20), config.stream_window, config.connection_window);
        let mut kept = Vec::new();
        let keep = |incoming: server::Incoming| kept.push(incoming);
        server::serve(far, config, drained, sleep(lifetime), &window, keep).await.err().map(|outcome| outcome.code)
    });
    let (send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::task::spawn_local(connection);
    (serving, send, owner)
}

fn paused(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        // Not for ever, when it is broken: some two days of paused time.
        timeout(Duration::from_secs(200_000), test()).await.expect("the test waits for what never comes");
    });
}

#[test]
fn a_tunnel_ends_with_the_certificate_of_its_peer() {
    paused(async || {
        let (serving, mut send, _owner) = piped(Duration::from_secs(600)).await;
        let request = || connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let (response, mut open) = send.send_request(request(), false).unwrap();
        sleep(Duration::from_secs(599)).await;
        assert!(send.clone().ready().await.is_ok(), "before its end it takes new streams");
        sleep(Duration::from_secs(2)).await;
        let refused = match send.clone().ready().await {
            Ok(mut send) => send.send_request(request(), false).unwrap().0.await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "after it there is no new stream");
        assert!(!serving.is_finished(), "what is open goes on");
        open.send_reset(h2::Reason::CANCEL);
        drop(response);
        assert_eq!(
            timeout(Duration::from_secs(5), serving).await.unwrap().unwrap(),
            None,
            "and with it the tunnel ends"
        );
    });
}

#[test]
fn a_tunnel_without_streams_ends_after_a_quarter_of_an_hour() {
    paused(async || {
        let (serving, mut send, _owner) = piped(Duration::from_secs(86_400)).await;
        let request = connect_request("10.0.0.1:80", HeaderMap::new()).unwrap();
        let (response, mut open) = send.send_request(request, false).unwrap();
        sleep(Duration::from_secs(7200)).await;
        assert!(!serving.is_finished(), "a stream keeps it open");
        open.send_reset(h2::Reason::CANCEL);
        drop(response);
        sleep(Duration::from_secs(600)).await;
        assert!(!serving.is_finished(), "not at once");
        sleep(Duration::from_secs(1300)).await;
        assert!(serving.is_finished());
    });
}
