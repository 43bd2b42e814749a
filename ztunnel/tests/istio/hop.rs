//! Whoever stands between two proxies: a waypoint, a gateway to another network, or an end of its own. It takes tunnels with
//! Istio's limits, notes what it is asked for and by whom, and goes on as its role says.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use tulle_certs::SpiffeId;
use ztunnel::tls::WorkloadCert;

use crate::node::Lab;

/// What it does with a stream.
#[derive(Clone)]
pub enum Role {
    /// Goes on through a tunnel of its own, as itself, to who must prove `expected`.
    Waypoint { tunnel: SocketAddr, target: SocketAddr, expected: SpiffeId },
    /// Passes bytes on that it cannot read.
    Gateway { to: SocketAddr },
    /// Greets with the identity of who asked, and echoes.
    Echo,
    /// Refuses.
    Refuse(StatusCode),
}

/// A stream that it was asked for.
#[derive(Clone, Debug)]
pub struct Seen {
    pub peer: SocketAddr,
    pub identity: String,
    pub authority: String,
    pub headers: BTreeMap<String, String>,
}

/// What the beginning of a tunnel said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub name: Option<String>,
    pub alpn: Vec<String>,
    pub suites: Vec<rustls::CipherSuite>,
    pub groups: Vec<rustls::NamedGroup>,
}

struct Shared {
    cert: WorkloadCert,
    role: Mutex<Role>,
    seen: Mutex<Vec<Seen>>,
    hellos: Mutex<Vec<Hello>>,
    answers: Mutex<Vec<HeaderMap>>,
    pongs: AtomicUsize,
}

/// One that runs, until dropped.
pub struct Hop {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Hop {
    /// Starts it in a pod, as `account`.
    pub fn start(lab: &Lab, pod: &str, port: u16, account: &str, role: Role) -> Self {
        let _ = (*ztunnel::tls::provider()).clone().install_default();
        let cert = lab.certificate(account);
        let (seen, hellos, answers) = (Mutex::default(), Mutex::default(), Mutex::default());
        let pongs = AtomicUsize::default();
        let shared = Arc::new(Shared { cert, role: Mutex::new(role), seen, hellos, answers, pongs });
        let (ready, is_ready) = channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let own = shared.clone();
        let thread = lab.within(pod, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await.unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    _ = stopped => {}
                    () = accept(own, listener) => {}
                }
            });
        });
        is_ready.recv().unwrap();
        Self { shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Does something else from now on.
    pub fn becomes(&self, role: Role) {
        *self.shared.role.lock().unwrap() = role;
    }

    /// The streams that it was asked for.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// What it was answered where it went on as a waypoint.
    pub fn answers(&self) -> Vec<HeaderMap> {
        self.shared.answers.lock().unwrap().clone()
    }

    /// Pings that were answered: one for each tunnel.
    pub fn pongs(&self) -> usize {
        self.shared.pongs.load(Ordering::SeqCst)
    }

    /// How tunnels to it began.
    pub fn hellos(&self) -> Vec<Hello> {
        self.shared.hellos.lock().unwrap().clone()
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        let (tcp, peer) = listener.accept().await.unwrap();
        tokio::spawn(connection(shared.clone(), tcp, SocketAddr::new(peer.ip().to_canonical(), peer.port())));
    }
}

async fn connection(shared: Arc<Shared>, tcp: TcpStream, peer: SocketAddr) -> Option<()> {
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp).await.ok()?;
    let said = start.client_hello();
    let hello = Hello {
        name: said.server_name().map(str::to_owned),
        alpn: said.alpn()?.map(|name| String::from_utf8_lossy(name).into_owned()).collect(),
        suites: said.cipher_suites().to_vec(),
        groups: said.named_groups().unwrap_or_default().to_vec(),
    };
    shared.hellos.lock().unwrap().push(hello);
    let tls = start.into_stream(shared.cert.server_config()).await.ok()?;
    let identity = tulle_certs::leaf_identity(tls.get_ref().1.peer_certificates()?.first()?).ok()?;
    let mut tunnel = h2::server::Builder::new()
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(100)
        .handshake(tls)
        .await
        .ok()?;
    let (mut ping, own) = (tunnel.ping_pong()?, shared.clone());
    tokio::spawn(async move {
        let answered = ping.ping(h2::Ping::opaque()).await.is_ok();
        own.pongs.fetch_add(usize::from(answered), Ordering::SeqCst);
    });
    while let Some(Ok((request, respond))) = tunnel.accept().await {
        let seen = Seen {
            peer,
            identity: identity.to_string(),
            authority: request.uri().to_string(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                .collect(),
        };
        assert_eq!(request.method(), http::Method::CONNECT);
        shared.seen.lock().unwrap().push(seen);
        tokio::spawn(stream(shared.clone(), identity.clone(), request, respond));
    }
    Some(())
}

fn status(of: StatusCode) -> Response<()> {
    Response::builder().status(of).body(()).unwrap()
}

async fn stream(
    shared: Arc<Shared>,
    identity: SpiffeId,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Option<()> {
    let role = shared.role.lock().unwrap().clone();
    let mut body = request.into_body();
    match role {
        Role::Refuse(code) => drop(respond.send_response(status(code), true)),
        Role::Echo => {
            let mut send = respond.send_response(Response::new(()), false).ok()?;
            send_all(&mut send, format!("{identity}\n").into()).await?;
            forward(&mut body, &mut send).await?;
        }
        Role::Gateway { to } => {
            let Ok(mut tcp) = TcpStream::connect(to).await else {
                respond.send_response(status(StatusCode::SERVICE_UNAVAILABLE), true).ok()?;
                return None;
            };
            let mut send = respond.send_response(Response::new(()), false).ok()?;
            let (mut reader, mut writer) = tcp.split();
            let up = async {
                while let Some(Ok(data)) = body.data().await {
                    writer.write_all(&data).await.ok()?;
                    body.flow_control().release_capacity(data.len()).ok()?;
                }
                writer.shutdown().await.ok()
            };
            let down = async {
                let mut buffer = vec![0; 65_536];
                while let Ok(size @ 1..) = reader.read(&mut buffer).await {
                    send_all(&mut send, Bytes::copy_from_slice(&buffer[..size])).await?;
                }
                send.send_data(Bytes::new(), true).ok()
            };
            tokio::join!(up, down);
        }
        Role::Waypoint { tunnel, target, expected } => match further(&shared, tunnel, target, &expected).await {
            Some((mut to, mut from)) => {
                let mut send = respond.send_response(Response::new(()), false).ok()?;
                tokio::join!(forward(&mut body, &mut to), forward(&mut from, &mut send));
            }
            None => drop(respond.send_response(status(StatusCode::SERVICE_UNAVAILABLE), true)),
        },
    }
    Some(())
}

/// A stream to `target` through a tunnel of its own.
async fn further(
    shared: &Shared,
    tunnel: SocketAddr,
    target: SocketAddr,
    expected: &SpiffeId,
) -> Option<(SendStream<Bytes>, RecvStream)> {
    let tcp = TcpStream::connect(tunnel).await.ok()?;
    let config = shared.cert.client_config(std::slice::from_ref(expected));
    let name = ServerName::IpAddress(tunnel.ip().into());
    let tls = TlsConnector::from(config).connect(name, tcp).await.ok()?;
    let (mut client, connection) = h2::client::handshake(tls).await.ok()?;
    tokio::spawn(connection);
    let request = Request::builder().method("CONNECT").uri(target.to_string()).body(()).ok()?;
    let (response, send) = client.send_request(request, false).ok()?;
    let response = response.await.ok()?;
    shared.answers.lock().unwrap().push(response.headers().clone());
    (response.status() == StatusCode::OK).then(|| (send, response.into_body()))
}

async fn forward(from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Option<()> {
    while let Some(Ok(data)) = from.data().await {
        let size = data.len();
        send_all(to, data).await?;
        from.flow_control().release_capacity(size).ok()?;
    }
    to.send_data(Bytes::new(), true).ok()
}

async fn send_all(to: &mut SendStream<Bytes>, mut data: Bytes) -> Option<()> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = poll_fn(|cx| to.poll_capacity(cx)).await?.ok()?;
        to.send_data(data.split_to(room.min(data.len())), false).ok()?;
    }
    Some(())
}
