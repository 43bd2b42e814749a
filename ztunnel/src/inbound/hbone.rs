//! Tunnels from other proxies: TLS, HTTP/2, and each CONNECT as a connection of its own.
//!
//! What a peer says about itself in headers is for logs only. Who it is comes from its certificate, and where it may go is
//! always the pod at whose address its tunnel arrived (`target`).

use std::future::{poll_fn, ready};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Response;
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tulle_certs::{SpiffeId, Usage};

use crate::base::cut::Cut;
use crate::base::lent::Lent;
use crate::base::pace::Paced;
use crate::base::sockets::reset;
use crate::base::window::Window;
use crate::base::{canonical, unix_now, workers};
use crate::flow::{LocalPod, Shared};
use crate::hbone::headers::{self, Baggage, Forwarded, TraceId};
use crate::hbone::server;
use crate::hbone::{READ_BUFFER, TLS_BUFFER};
use crate::inbound::proxy_header;
use crate::inbound::recheck::Live;
use crate::inbound::requests::{self, Connection};
use crate::inbound::target::{Asked, Target, find};
use crate::inbound::{Request, admit, stopped};
use crate::outcome::{Code, Outcome};
use crate::relay::{self, StreamIo, TcpSide, Terms};
use crate::state::Workload;
use crate::telemetry::{ConnRecord, Direction};
use crate::tls::{peer_identity, refusal};

/// How long a new connection may stay silent. A proxy's ClientHello follows its SYN at once.
const FIRST_BYTE: Duration = Duration::from_secs(5);

/// What a tunnel proved, shared by its streams.
struct Tunnel {
    shared: Arc<Shared>,
    live: Rc<Live>,
    pod: Arc<LocalPod>,
    peer: SocketAddr,
    local: SocketAddr,
    source_identity: SpiffeId,
    own_identity: SpiffeId,
    window: Rc<Window>,
    /// The peer's certificate was taken back, or its trust domain is not believed any more: streams end.
    cut: Cut<Outcome>,
}

/// Serves one tunnel to its end.
pub async fn serve(shared: Arc<Shared>, live: Rc<Live>, pod: Arc<LocalPod>, tcp: TcpStream) {
    let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else { return reset(tcp) };
    let (peer, local) = (canonical(peer), canonical(local));
    let metrics = shared.metrics.clone();
    if let Err(outcome) = tunnel(shared, live, &pod, tcp, peer, local).await {
        metrics.handshakes_failed.inc();
        // There is no connection yet, so there is no record; the log still says who failed and how.
        tracing::warn!(
            target: "access",
            {
            src.addr = %peer,
            dst.addr = %local,
            dst.workload = &*pod.name,
            dst.namespace = &*pod.namespace,
            direction = "inbound",
            code = outcome.code.name(),
            error = &*outcome.detail
            },
            "tunnel failed"
        );
    }
}

async fn tunnel(
    shared: Arc<Shared>,
    live: Rc<Live>,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
) -> Result<(), Outcome> {
    // Held as long as the tunnel is open.
    let _tunnel = pod.tunnel(peer.ip())?;
    // Who says nothing takes no place among the handshakes.
    let first = timeout(FIRST_BYTE, tcp.readable()).await;
    if !matches!(first, Ok(Ok(()))) {
        return Err(Outcome::new(Code::TlsFailed, "the peer sent nothing after connecting"));
    }
    let permit = pod.handshake(peer.ip()).await?;
    let (_, workload) = shared.known(pod).await?;
    let cert = shared.certificate(&workload).await?;
    let transport = Paced::new(Lent::new(READ_BUFFER, tcp));
    let accept = TlsAcceptor::from(cert.server_config()).accept(transport);
    let mut tls = timeout(shared.hbone.handshake_timeout, accept)
        .await
        .map_err(|_| Outcome::new(Code::TlsFailed, "the peer did not finish the TLS handshake in time"))?
        .map_err(|error| refusal(&error, ""))?;
    let session = tls.get_mut().1;
    session.set_buffer_limit(Some(TLS_BUFFER));
    let source_identity =
        peer_identity(session.peer_certificates()).map_err(|error| Outcome::new(Code::TlsFailed, error))?;
    let shown = session.peer_certificates().unwrap_or_default().to_vec();
    let lifetime = shown.first().map_or(Duration::ZERO, remaining);
    drop(permit);

    shared.metrics.tunnels.inc();
    let gauge = shared.metrics.tunnels.clone();
    let config = shared.hbone;
    let window = Window::new(&pod.buffers, config.stream_window, config.connection_window);
    let context = Rc::new(Tunnel {
        shared,
        live,
        pod: pod.clone(),
        peer,
        local,
        source_identity,
        own_identity: cert.identity.clone(),
        window: window.clone(),
        cut: Cut::default(),
    });
    let distrusted = async {
        let outcome = cert.distrusted(&shown, Usage::Client).await;
        tracing::warn!(%peer, reason = %outcome, "tunnel is cut");
        context.cut.order(outcome);
    };
    let expired = async {
        tokio::select! { () = sleep(lifetime) => {}, _ = context.cut.ordered() => {} }
    };
    let served = server::serve(tls, config, pod.drained.clone(), expired, &window, |(request, respond)| {
        // Boxed: an idle connection keeps nothing of its request.
        let (context, request) = (context.clone(), Box::new(request));
        workers::spawn(async move { stream(&context, request, respond).await });
    });
    tokio::pin!(served);
    // Watched as long as anything flows, and looked at first: lists may have changed during the handshake.
    let result = tokio::select! {
        biased;
        () = distrusted => served.await,
        result = &mut served => result,
    };
    gauge.dec();
    result
}

/// How long the peer's certificate is still valid.
fn remaining(leaf: &CertificateDer<'_>) -> Duration {
    let left = tulle_certs::not_after(leaf).map_or(0, |end| end.saturating_sub(unix_now()));
    Duration::from_secs(u64::try_from(left).unwrap_or(0))
}

/// Serves one CONNECT.
async fn stream(tunnel: &Tunnel, request: Box<http::Request<RecvStream>>, mut respond: SendResponse<Bytes>) {
    let (mut record, target, body) = read(tunnel, request);
    let outcome = carry(tunnel, target, body, &mut respond, &mut record).await;
    record.finish(&outcome);
}

/// What a request says, where it wants to go, and its bytes.
fn read(tunnel: &Tunnel, request: Box<http::Request<RecvStream>>) -> (ConnRecord, Result<Target, Outcome>, RecvStream) {
    let metrics = tunnel.shared.metrics.clone();
    let mut record = ConnRecord::new(metrics, Direction::Inbound, tunnel.peer, tunnel.local);
    describe(tunnel, &request, &mut record);
    let snapshot = tunnel.shared.reader.load();
    let target = headers::destination(&request).and_then(|authority| {
        let asked = Asked {
            snapshot: &snapshot,
            network: &tunnel.shared.network,
            pod: tunnel.pod.workload(&snapshot).map(|pod| &**pod),
            client: &tunnel.source_identity,
            local: tunnel.local.ip(),
        };
        find(&asked, authority)
    });
    (record, target, request.into_body())
}

fn describe<B>(tunnel: &Tunnel, request: &http::Request<B>, record: &mut ConnRecord) {
    let snapshot = tunnel.shared.reader.load();
    record.source.identity = Some(tunnel.source_identity.clone());
    record.destination.identity = Some(tunnel.own_identity.clone());
    record.destination.workload = tunnel.pod.workload(&snapshot).cloned();
    // The peer's address says which workload it is only if that workload has the proven identity.
    record.source.workload = snapshot
        .workload_by_ip(&tunnel.shared.network, tunnel.peer.ip())
        .filter(|workload| workload.identity == tunnel.source_identity)
        .cloned();
    if let Some(Ok(trace)) = headers::text(request.headers(), &headers::TRACEPARENT).map(TraceId::parse) {
        record.trace = Some(trace.to_string());
    }
    let forwarded = headers::text(request.headers(), &headers::FORWARDED).map(Forwarded::parse).unwrap_or_default();
    // Only a service that this pod really belongs to.
    record.service = forwarded.host.as_deref().and_then(|host| {
        let workload = record.destination.workload.as_deref()?;
        let key = workload.services.keys().find(|key| key.split_once('/').is_some_and(|(_, name)| name == host))?;
        let (namespace, hostname) = key.split_once('/')?;
        snapshot.service(namespace, hostname).cloned()
    });
}

async fn carry(
    tunnel: &Tunnel,
    target: Result<Target, Outcome>,
    body: RecvStream,
    respond: &mut SendResponse<Bytes>,
    record: &mut ConnRecord,
) -> Outcome {
    let (shared, pod) = (&tunnel.shared, &tunnel.pod);
    let window = tunnel.window.enter();
    // First bytes may come with the request, and nobody takes them yet.
    let waiting = window.stalled();
    // Boxed: what it takes to open a connection must not weigh on it while it is idle.
    let admitted = Box::pin(async {
        let permit = pod.connection(&pod.inbound)?;
        let target = target?;
        record.hbone = Some(target.address);
        let facts = Request {
            identity: Some(tunnel.source_identity.clone()),
            source: tunnel.peer.ip(),
            target: target.address,
            inside: target.told.is_some(),
        };
        let mut admitted = admit(shared, &tunnel.live, pod, &facts, record).await?;
        if let Some(told) = target.told {
            let header = proxy_header::of(tunnel.peer, told, &tunnel.source_identity);
            // A connection that has just been opened takes it at once.
            admitted.0.write_all(&header).await.map_err(|error| Outcome::new(Code::ServerReset, error.to_string()))?;
        }
        Ok((permit, admitted))
    });
    let admitted = tokio::select! {
        admitted = admitted => admitted,
        // Nobody waits for the application any more: it is not to see a connection without a client.
        _ = poll_fn(|cx| respond.poll_reset(cx)) => {
            let text = "the client's proxy took its request back before the application was reached";
            Err(Outcome::new(Code::ClientReset, text))
        }
    };
    let (_permit, (tcp, registration, workload)) = match admitted {
        Ok(admitted) => admitted,
        Err(outcome) => {
            // The peer may have gone; then there is nobody to tell.
            let _ = respond.send_response(headers::refusal(&outcome), true);
            return outcome;
        }
    };
    let accepted = respond.send_response(accepted(&workload), false);
    record.destination.workload = Some(workload);
    record.opened();
    let send = match accepted {
        Ok(send) => send,
        Err(error) => {
            reset(tcp);
            return Outcome::new(Code::TunnelFailed, error.to_string());
        }
    };
    drop(waiting);
    let counts = record.counts.clone();
    if registration.facts().requests.get() {
        let connection = Connection::new(shared, pod, &registration, record);
        let io = Box::new(Paced::new(StreamIo::new(send, body, window)));
        let served = Box::pin(requests::serve(connection, io, tcp, &registration, &counts));
        return tokio::select! {
            biased;
            outcome = tunnel.cut.ordered() => outcome,
            outcome = served => outcome,
        };
    }
    // A stop resets the stream, so the other side cannot take it for an end.
    let stop = pin!(async {
        tokio::select! {
            outcome = stopped(&pod.drained, &registration) => outcome,
            outcome = tunnel.cut.ordered() => outcome,
        }
    });
    let terms = Terms { counts: &counts, limits: shared.relay, budget: &pod.buffers };
    relay::tunnel(tcp, send, ready(Ok(body)), TcpSide::Server, terms, &window, stop).await
}

/// The answer to a request that was let in.
fn accepted(workload: &Workload) -> Response<()> {
    let mut answer = Response::new(());
    let text = |value: &Arc<str>| Some(value.to_string()).filter(|text| !text.is_empty());
    let baggage = Baggage {
        cluster: text(&workload.cluster),
        namespace: text(&workload.namespace),
        workload: text(&workload.workload_name),
        service: text(&workload.canonical_name),
        version: text(&workload.canonical_revision),
        region: text(&workload.locality.region),
        zone: text(&workload.locality.zone),
    };
    if let Some(value) = baggage.to_header(workload.workload_type.as_str()) {
        answer.headers_mut().insert(headers::BAGGAGE, value);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::stream;

    fn size<A, B, C, R>(_: impl Fn(A, B, C) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn an_idle_connection_is_small() {
        let size = size(stream);
        assert!(size <= 3 * 1024, "{size} bytes: is a future passed on by value, or kept that only opening needs?");
    }
}
