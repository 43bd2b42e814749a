//! Opening a tunnel: TCP from the pod's own address, TLS with the expected identity, HTTP/2.
//!
//! Every step has a deadline, and every failure an outcome that says which step it was. A refused port is tried again
//! for a moment (a pod that was just captured opens it a little later); nothing here ever falls back to plaintext.

use std::cell::Cell;
use std::future::{Future, pending};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tulle_certs::{SpiffeId, Usage};

use crate::base::budget::Budget;
use crate::base::cut::Cut;
use crate::base::gather::Gathered;
use crate::base::lent::Lent;
use crate::base::pace::Paced;
use crate::base::sockets::{Keepalive, PodSockets};
use crate::base::window::{Slot, Window};
use crate::base::workers;
use crate::hbone::{Config, FRAME_BUDGET, HEADER_LIST, READ_BUFFER, SEND_BUFFER, TLS_BUFFER};
use crate::outcome::{Code, Outcome};
use crate::tls::{WorkloadCert, peer_identity, refusal};

/// What a tunnel is made with.
#[derive(Clone, Debug)]
pub struct Dialer {
    /// The source pod's sockets.
    pub sockets: Arc<PodSockets>,
    /// The source's certificate.
    pub cert: Arc<WorkloadCert>,
    /// What the source pod may buffer.
    pub budget: Arc<Budget>,
    /// How long the port is waited for.
    pub patience: Patience,
}

/// How long a next hop is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// TCP connect.
    pub connect: Duration,
    /// Time in which a refused port is tried again.
    pub refused: Duration,
}

/// An open tunnel.
#[derive(Debug)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    /// Who the other side proved to be.
    pub peer: SpiffeId,
    /// The certificate we showed.
    pub cert: Arc<WorkloadCert>,
    /// Our open streams.
    pub streams: Cell<usize>,
    /// When the last stream ended.
    pub idle_since: Cell<Instant>,
    /// The other side's certificate was taken back: streams end.
    pub cut: Rc<Cut<Outcome>>,
    /// When it was opened.
    since: Instant,
    closed: Rc<Cell<bool>>,
    window: Rc<Window>,
}

impl Tunnel {
    /// A handle to open a stream with.
    pub fn sender(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    /// One more stream in its receive window.
    pub fn enter(&self) -> Slot {
        self.window.enter()
    }

    /// How long it has been open.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether new streams have a chance.
    pub fn is_open(&self) -> bool {
        !self.closed.get()
    }

    /// No new streams from now on.
    pub fn retire(&self) {
        self.closed.set(true);
    }

    /// How many streams it takes: our limit or the peer's, which may change at any time.
    pub fn limit(&self, ours: usize) -> usize {
        ours.min(self.send.current_max_send_streams())
    }
}

/// Opens a tunnel to `address`, whose owner must prove one of `expected`.
///
/// # Errors
/// The step that failed.
pub async fn connect(
    dialer: &Dialer,
    (address, keepalive): (SocketAddr, Option<Keepalive>),
    expected: &[SpiffeId],
    config: Config,
) -> Result<Tunnel, Outcome> {
    let tcp = connect_tcp(&dialer.sockets, (address, keepalive), dialer.patience).await?;
    open(tcp, dialer, address.to_string(), expected, config, pending()).await
}

/// Opens a tunnel over `io`, which is a stream of another one, to `name`, which must prove one of `expected`. It is cut when
/// `cut` orders it.
///
/// # Errors
/// The step that failed.
pub async fn connect_over<T>(
    io: T,
    dialer: &Dialer,
    name: String,
    expected: &[SpiffeId],
    config: Config,
    cut: Rc<Cut<Outcome>>,
) -> Result<Tunnel, Outcome>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    open(io, dialer, name, expected, config, async move { cut.ordered().await }).await
}

async fn open<T>(
    io: T,
    dialer: &Dialer,
    to: String,
    expected: &[SpiffeId],
    config: Config,
    cut: impl Future<Output = Outcome> + 'static,
) -> Result<Tunnel, Outcome>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let text = format!("{to} did not finish the handshake within {} s", config.handshake_timeout.as_secs());
    let handshake = handshake(io, dialer, to, expected, config, cut);
    let late = |_| Err(Outcome::new(Code::ConnectTimeout, text));
    timeout(config.handshake_timeout, handshake).await.unwrap_or_else(late)
}

async fn connect_tcp(
    sockets: &PodSockets,
    (address, keepalive): (SocketAddr, Option<Keepalive>),
    patience: Patience,
) -> Result<TcpStream, Outcome> {
    let give_up = Instant::now() + patience.refused;
    let mut pause = Duration::from_millis(20);
    loop {
        match timeout(patience.connect, sockets.connect_out(address, keepalive)).await {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() + pause < give_up => {
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(250));
            }
            Ok(Err(error)) => return Err(Outcome::new(Code::ConnectFailed, format!("tunnel to {address}: {error}"))),
            Err(_) => {
                let text = format!(
                    "tunnel to {address}: no answer within {} s; maybe a firewall or NetworkPolicy drops port {}",
                    patience.connect.as_secs(),
                    address.port()
                );
                return Err(Outcome::new(Code::ConnectTimeout, text));
            }
        }
    }
}

async fn handshake<T>(
    io: T,
    dialer: &Dialer,
    to: String,
    expected: &[SpiffeId],
    config: Config,
    cut_with: impl Future<Output = Outcome> + 'static,
) -> Result<Tunnel, Outcome>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    // The name is never sent nor looked at; the verifier knows the expected identities.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let transport = Paced::new(Lent::new(READ_BUFFER, io));
    let mut tls = TlsConnector::from(dialer.cert.client_config(expected))
        .connect(name, transport)
        .await
        .map_err(|error| refusal(&error, &format!("tunnel to {to}: ")))?;
    let session = tls.get_mut().1;
    session.set_buffer_limit(Some(TLS_BUFFER));
    let peer = peer_identity(session.peer_certificates())
        .map_err(|error| Outcome::new(Code::TlsFailed, format!("tunnel to {to}: {error}")))?;

    let shown: Vec<CertificateDer<'static>> =
        session.peer_certificates().unwrap_or_default().iter().map(|one| one.clone().into_owned()).collect();

    let window = Window::new(&dialer.budget, config.stream_window, config.connection_window);
    let io = Gathered::new(tls);
    let (send, connection) = h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(window.target())
        .max_frame_size(config.frame_size)
        .max_header_list_size(HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(FRAME_BUDGET)
        // Until the peer says otherwise.
        .initial_max_send_streams(config.max_streams)
        .handshake(io.clone())
        .await
        .map_err(|error| Outcome::new(Code::TunnelFailed, format!("tunnel to {to}: {error}")))?;
    let closed = Rc::new(Cell::new(false));
    let flag = closed.clone();
    let (sizes, cert, cut) = (window.clone(), dialer.cert.clone(), Rc::<Cut<Outcome>>::default());
    let order = cut.clone();
    workers::spawn(async move {
        let distrusted = async {
            let outcome = tokio::select! {
                outcome = cert.distrusted(&shown, Usage::Server) => outcome,
                outcome = cut_with => outcome,
            };
            tracing::warn!(address = to, reason = %outcome, "tunnel is cut");
            flag.set(true);
            order.order(outcome);
        };
        if let Err(error) = io.drive(drive(connection, &sizes, distrusted)).await {
            tracing::debug!(address = to, %error, "tunnel ended");
        }
        flag.set(true);
    });
    Ok(Tunnel {
        send,
        peer,
        cert: dialer.cert.clone(),
        streams: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        since: Instant::now(),
        cut,
        closed,
        window,
    })
}

/// Keeps the tunnel going until it ends, and its receive window as large as it should be. `distrusted` ends its streams and
/// then it, by what it does when it completes.
async fn drive<T>(
    mut connection: h2::client::Connection<T, Bytes>,
    window: &Window,
    distrusted: impl Future<Output = ()>,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    tokio::pin!(distrusted);
    let mut over = false;
    loop {
        tokio::select! {
            ended = &mut connection => return ended,
            () = &mut distrusted, if !over => over = true,
            size = window.changed() => connection.set_target_window_size(size),
        }
    }
}
