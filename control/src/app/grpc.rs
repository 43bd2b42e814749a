//! The TLS listener and the gRPC stack: limits first, services after.
//!
//! Connections are bounded, in all and for each source address, because whoever reaches the port may open them. Handshakes
//! run beside the accept loop, bounded in number and time, so that a silent client cannot keep
//! others out; many addresses together can.
//! Unary calls have a deadline, a concurrency limit and load shedding; streams are bounded per connection.

use std::io;
use std::io::IoSlice;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tower::ServiceBuilder;
use tulle_proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;

use crate::app::tls::ServerTls;
use crate::base::Stop;
use crate::base::sources::{Source, Sources};
use crate::ca;
use crate::nodes;
use crate::xds;

/// Connections at a time, some 60 KB each when idle: a node's proxy and a gateway have one, and Kubernetes goes to 5,000 nodes.
const CONNECTIONS: usize = 8192;
/// Those of one source address. Nodes have one each, but many may come from behind one translated address.
const CONNECTIONS_OF_ONE: usize = 512;
/// When a connection on which nothing comes is probed, how often after that, and how many probes may stay without an answer.
const IDLE: Duration = Duration::from_secs(60);
const PROBE: Duration = Duration::from_secs(15);
const PROBES: u32 = 4;
/// Between two warnings about connections that were refused.
const WARN: Duration = Duration::from_secs(10);
/// Handshakes at a time. One costs about a millisecond of CPU; a cluster of 1000 nodes reconnects in some seconds.
const HANDSHAKES: usize = 256;
/// Those of one source address: the others are for everybody else, whoever holds these in silence.
const HANDSHAKES_OF_ONE: usize = 64;
/// A client that has not finished its handshake by then is cut.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Streams of one connection: xDS, node service, and certificate requests, of which a node has eight at a time.
const STREAMS: u32 = 64;
/// Certificate requests in work, all connections. Above it callers are told to come back.
const CALLS: usize = 512;
/// Deadline of a certificate request.
const CALL_TIME: Duration = Duration::from_secs(10);

pub(super) struct Services {
    pub(super) xds: xds::server::Server,
    pub(super) ca: ca::server::Server,
    pub(super) nodes: nodes::Server,
}

pub(super) async fn serve(listener: TcpListener, tls: ServerTls, services: Services, stop: Stop) {
    // One slot: tonic takes connections as fast as they come.
    let (accepted, connections) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(listener, tls, accepted, stop.clone()));
    let ca = IstioCertificateServiceServer::new(services.ca).max_decoding_message_size(64 * 1024);
    let ca = ServiceBuilder::new()
        .map_err(|error: tower::BoxError| shed(&*error))
        .load_shed()
        .concurrency_limit(CALLS)
        .timeout(CALL_TIME)
        .service(ca);
    let mut stopping = stop;
    let served = tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(services.xds)
        .add_service(Named(ca))
        .add_service(services.nodes)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
            stopping.requested().await;
        })
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the gRPC server ended");
    }
    accepting.abort();
}

async fn accept(listener: TcpListener, tls: ServerTls, accepted: mpsc::Sender<io::Result<Counted>>, mut stop: Stop) {
    let mut places = Places::new();
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else {
            return;
        };
        let stream = tokio::select! {
            () = stop.requested() => return,
            stream = listener.accept() => stream,
        };
        let (stream, peer) = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Usually no file descriptors: others must finish first.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some((place, shaking)) = places.take(peer.ip()) else { continue };
        let _ = stream.set_nodelay(true);
        // Whose pod is gone without a word holds its place no longer, whatever it was doing.
        let keepalive = TcpKeepalive::new().with_time(IDLE).with_interval(PROBE).with_retries(PROBES);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let acceptor = TlsAcceptor::from(tls.config());
        let accepted = accepted.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(accepted.send(Ok(Counted { stream, _place: place })).await),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
            drop((permit, shaking));
        });
    }
}

/// Places for connections and handshakes.
struct Places {
    all: Arc<Semaphore>,
    sources: Arc<Sources>,
    handshakes: Arc<Sources>,
    warned: Option<Instant>,
}

/// One place; free again when dropped.
struct Place {
    // Given back before their source is forgotten.
    _turns: Vec<OwnedSemaphorePermit>,
    _source: Source,
}

impl Places {
    fn new() -> Self {
        Self {
            all: Arc::new(Semaphore::new(CONNECTIONS)),
            sources: Sources::new(CONNECTIONS_OF_ONE),
            handshakes: Sources::new(HANDSHAKES_OF_ONE),
            warned: None,
        }
    }

    /// A place for a connection from `from`, and one for its handshake; `None`: it is to be closed, which is logged now and then.
    fn take(&mut self, from: IpAddr) -> Option<(Place, Place)> {
        let [connection, handshake] = [&self.sources, &self.handshakes].map(|sources| sources.of(Some(from)));
        let wanted =
            [&connection.turns, &self.all, &handshake.turns].map(|turns| Arc::clone(turns).try_acquire_owned());
        let Ok(mut turns) = wanted.into_iter().collect::<Result<Vec<_>, _>>() else {
            if self.warned.is_none_or(|at| at.elapsed() >= WARN) {
                self.warned = Some(Instant::now());
                tracing::warn!(
                    %from,
                    "connections are refused: of one address there may be {CONNECTIONS_OF_ONE}, of which \
                     {HANDSHAKES_OF_ONE} are being opened, and {CONNECTIONS} in all"
                );
            }
            return None;
        };
        let shaking = Place { _turns: turns.split_off(2), _source: handshake };
        Some((Place { _turns: turns, _source: connection }, shaking))
    }
}

/// A connection and its place.
struct Counted {
    stream: TlsStream<TcpStream>,
    _place: Place,
}

impl Connected for Counted {
    type ConnectInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

fn shed(error: &(dyn std::error::Error + 'static)) -> tonic::Status {
    if error.is::<tower::timeout::error::Elapsed>() {
        tonic::Status::deadline_exceeded("the request took too long; try again")
    } else {
        tonic::Status::resource_exhausted("too many certificate requests at once; try again")
    }
}

/// Gives a layered service the name that routing needs, and its errors the shape of a response.
#[derive(Clone)]
struct Named<S>(S);

impl<S> tonic::server::NamedService for Named<S> {
    const NAME: &'static str = "istio.v1.auth.IstioCertificateService";
}

impl<S, B> tower::Service<http::Request<B>> for Named<S>
where
    S: tower::Service<http::Request<B>, Response = http::Response<tonic::body::Body>, Error = tonic::Status>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // Load shedding below makes the inner service always ready.
        match self.0.poll_ready(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move { Ok(response.await.unwrap_or_else(|status| status.into_http())) })
    }
}
