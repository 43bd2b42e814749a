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
use tokio::net::TcpListener;
use tokio::task::LocalSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tulle_certs::ca::Authority;
use tulle_certs::{Issued, SpiffeId, request};
use ztunnel::base::drain::{Drain, Drained, Phase, drain};
use ztunnel::base::netns::{Netns, NetnsThread};
use ztunnel::base::sockets::{Options, PodSockets};
use ztunnel::hbone::client::Dialer;
use ztunnel::hbone::headers::connect_request;
use ztunnel::hbone::pool::{Key, Opened, Pool};
use ztunnel::hbone::{Config, server};
use ztunnel::outcome::Code;
use ztunnel::tls::WorkloadCert;

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
    Arc::new(WorkloadCert::new(Issued::parse(&chain, &id).unwrap(), asked.key).unwrap())
}

const A: &str = "spiffe://cluster.local/ns/shop/sa/a";
const B: &str = "spiffe://cluster.local/ns/shop/sa/b";

/// Sockets of this test's own namespace, without the mark, which needs privilege.
fn dialer(cert: Arc<WorkloadCert>) -> Dialer {
    let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
    Dialer { sockets: Arc::new(PodSockets::new(netns, NetnsThread::start().unwrap(), options)), cert }
}

fn key(expected: &str, address: SocketAddr) -> Key {
    Key { source: A.parse().unwrap(), pod: "a".into(), expected: vec![expected.parse().unwrap()].into(), address }
}

/// Echoes every stream, except those to port 1, which are never read, and those to port 2, which are refused.
async fn serve(listener: TcpListener, cert: Arc<WorkloadCert>, drained: Drained, tunnels: Rc<Cell<usize>>) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let (acceptor, drained, tunnels) = (TlsAcceptor::from(cert.server_config()), drained.clone(), tunnels.clone());
        tokio::task::spawn_local(async move {
            let Ok(tls) = acceptor.accept(tcp).await else { return };
            tunnels.set(tunnels.get() + 1);
            let _ =
                server::serve(tls, Config::default(), drained, Duration::from_secs(60), |(request, mut respond)| {
                    tokio::task::spawn_local(async move {
                        let port = request.uri().port_u16().unwrap_or(0);
                        if port == 2 {
                            let refused = Response::builder().status(StatusCode::UNAUTHORIZED).body(()).unwrap();
                            respond.send_response(refused, true).unwrap();
                            return;
                        }
                        let mut send = respond.send_response(Response::new(()), false).unwrap();
                        let mut body = request.into_body();
                        if port == 1 {
                            std::future::pending::<()>().await;
                        }
                        while let Some(Ok(chunk)) = body.data().await {
                            let _ = body.flow_control().release_capacity(chunk.len());
                            send.send_data(chunk, false).unwrap();
                        }
                        let _ = send.send_data(Bytes::new(), true);
                    });
                })
                .await;
        });
    }
}

struct World {
    pki: Pki,
    address: SocketAddr,
    pool: Rc<Pool>,
    dialer: Dialer,
    drain: Drain,
    tunnels: Rc<Cell<usize>>,
}

impl World {
    async fn new(config: Config) -> Self {
        let pki = Pki::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, drained) = drain();
        let tunnels = Rc::new(Cell::new(0));
        tokio::task::spawn_local(serve(listener, pki.cert(B), drained, tunnels.clone()));
        let dialer = dialer(pki.cert(A));
        Self { pki, address, pool: Pool::new(config), dialer, drain, tunnels }
    }

    async fn open(&self, target: &str) -> Result<Opened, ztunnel::outcome::Outcome> {
        let request = connect_request(target, HeaderMap::new()).unwrap();
        self.pool.open(&key(B, self.address), &self.dialer, &request).await
    }

    async fn echo(&self, text: &'static [u8]) -> Vec<u8> {
        let mut opened = self.open("10.0.0.1:80").await.unwrap();
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
            tokio::time::sleep(Duration::from_millis(5)).await;
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
