//! Tunnels from other proxies: TLS, HTTP/2, and each CONNECT as a connection of its own.
//!
//! What a peer says about itself in headers is for logs only. Who it is comes from its certificate, and where it may go is
//! always the address at which its tunnel arrived.

use std::future::{poll_fn, ready};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Response;
use tokio::net::TcpStream;

use crate::base::pace::Paced;
use crate::base::sockets::reset;
use crate::base::{canonical, workers};
use crate::flow::tunnel::{self, Proven};
use crate::flow::{LocalPod, Shared};
use crate::hbone::headers::{self, Authority, Baggage, Forwarded, TraceId};
use crate::inbound::recheck::Live;
use crate::inbound::requests::{self, Connection};
use crate::inbound::{Request, admit, stopped};
use crate::outcome::{Code, Outcome};
use crate::relay::{self, StreamIo, TcpSide, Terms};
use crate::state::{Snapshot, Workload};
use crate::telemetry::{ConnRecord, Direction};

/// What the streams of a tunnel share.
struct Tunnel {
    shared: Arc<Shared>,
    live: Rc<Live>,
    pod: Arc<LocalPod>,
    proven: Rc<Proven>,
}

/// Serves one tunnel to its end.
pub async fn serve(shared: Arc<Shared>, live: Rc<Live>, pod: Arc<LocalPod>, tcp: TcpStream) {
    let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else { return reset(tcp) };
    let ends = (canonical(peer), canonical(local));
    let cert = async {
        let (_, workload) = shared.known(&pod).await?;
        shared.certificate(&workload).await
    };
    let result = tunnel::serve(&shared, &pod, tcp, ends, cert, |proven, (request, respond)| {
        let (shared, live, pod) = (shared.clone(), live.clone(), pod.clone());
        let tunnel = Tunnel { shared, live, pod, proven: proven.clone() };
        // Boxed: an idle connection keeps nothing of its request.
        let request = Box::new(request);
        workers::spawn(async move { stream(&tunnel, request, respond).await });
    });
    if let Err(outcome) = result.await {
        tunnel::failed(&shared, &pod, ends, &outcome);
    }
}

/// Serves one CONNECT.
async fn stream(tunnel: &Tunnel, request: Box<http::Request<RecvStream>>, mut respond: SendResponse<Bytes>) {
    let (mut record, target, body) = read(tunnel, request);
    let outcome = carry(tunnel, target, body, &mut respond, &mut record).await;
    record.finish(&outcome);
}

/// What a request says, where it wants to go, and its bytes.
fn read(
    tunnel: &Tunnel,
    request: Box<http::Request<RecvStream>>,
) -> (ConnRecord, Result<SocketAddr, Outcome>, RecvStream) {
    let metrics = tunnel.shared.metrics.clone();
    let mut record = ConnRecord::new(metrics, Direction::Inbound, tunnel.proven.peer, tunnel.proven.local);
    describe(tunnel, &request, &mut record);
    (record, target(tunnel, &request), request.into_body())
}

fn describe<B>(tunnel: &Tunnel, request: &http::Request<B>, record: &mut ConnRecord) {
    let snapshot = tunnel.shared.reader.load();
    record.source.identity = Some(tunnel.proven.source_identity.clone());
    record.destination.identity = Some(tunnel.proven.own_identity.clone());
    record.destination.workload = tunnel.pod.workload(&snapshot).cloned();
    // The peer's address says which workload it is only if that workload has the proven identity.
    record.source.workload = snapshot
        .workload_by_ip(&tunnel.shared.network, tunnel.proven.peer.ip())
        .filter(|workload| workload.identity == tunnel.proven.source_identity)
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
    target: Result<SocketAddr, Outcome>,
    body: RecvStream,
    respond: &mut SendResponse<Bytes>,
    record: &mut ConnRecord,
) -> Outcome {
    let (shared, pod) = (&tunnel.shared, &tunnel.pod);
    let window = tunnel.proven.window.enter();
    // First bytes may come with the request, and nobody takes them yet.
    let waiting = window.stalled();
    // Boxed: what it takes to open a connection must not weigh on it while it is idle.
    let admitted = Box::pin(async {
        let permit = pod.connection(&pod.inbound)?;
        let target = target?;
        record.hbone = Some(target);
        let facts =
            Request { identity: Some(tunnel.proven.source_identity.clone()), source: tunnel.proven.peer.ip(), target };
        let admitted = admit(shared, &tunnel.live, pod, &facts, record).await?;
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
            outcome = tunnel.proven.cut.ordered() => outcome,
            outcome = served => outcome,
        };
    }
    // A stop resets the stream, so the other side cannot take it for an end.
    let stop = pin!(async {
        tokio::select! {
            outcome = stopped(&pod.drained, &registration) => outcome,
            outcome = tunnel.proven.cut.ordered() => outcome,
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

/// The application's address: always this pod's, with the port that the authority means.
fn target<B>(tunnel: &Tunnel, request: &http::Request<B>) -> Result<SocketAddr, Outcome> {
    match headers::destination(request)? {
        Authority::Address(addr) if addr.ip() == tunnel.proven.local.ip() => Ok(addr),
        Authority::Address(addr) => {
            let text = format!("the tunnel to {} asked for {addr}, which is not this pod", tunnel.proven.local.ip());
            Err(Outcome::new(Code::WrongDestination, text))
        }
        Authority::Host(host, port) => {
            let snapshot = tunnel.shared.reader.load();
            let pod = tunnel.pod.workload(&snapshot);
            let source = &tunnel.proven.source_identity;
            // A foreign domain's namespace is none of ours, so nothing is open to it alone.
            let foreign = pod.is_none_or(|pod| snapshot.is_foreign(pod, source));
            let namespace = if foreign { "" } else { source.namespace() };
            let port = service_port(&snapshot, pod, namespace, &host, port)?;
            Ok(SocketAddr::new(tunnel.proven.local.ip(), port))
        }
    }
}

/// The pod's own port for a service's port. The name means what it means to the client, whose namespace is proven: a
/// service that is hidden from it is none.
fn service_port(
    snapshot: &Snapshot,
    pod: Option<&Arc<Workload>>,
    client_namespace: &str,
    host: &str,
    port: u16,
) -> Result<u16, Outcome> {
    let unknown = || {
        let text = format!("this pod is not an endpoint of {host}:{port}");
        Outcome::new(Code::WrongDestination, text)
    };
    let service = snapshot.service_by_hostname(host, client_namespace).ok_or_else(unknown)?;
    let ports = pod.ok_or_else(unknown)?.services.get(service.key().as_str()).ok_or_else(unknown)?;
    let own = ports.iter().find(|own| own.service_port == port).map(|own| own.target_port).filter(|port| *port != 0);
    own.or_else(|| service.port(port).map(|port| port.target_port).filter(|port| *port != 0)).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::{service_port, stream};
    use crate::outcome::Code;
    use crate::state::fixtures::{behind, service, snapshot, workload};
    use crate::state::{Change, Visibility};
    use std::sync::Arc;

    fn size<A, B, C, R>(_: impl Fn(A, B, C) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn an_idle_connection_is_small() {
        let size = size(stream);
        assert!(size <= 3 * 1024, "{size} bytes: is a future passed on by value, or kept that only opening needs?");
    }

    #[test]
    fn a_service_that_is_hidden_from_the_clients_namespace_cannot_be_asked_for() {
        let hidden =
            crate::state::ServiceSpec { visibility: Visibility::Namespace, ..service("shop", "cart", "10.96.0.1") };
        let pod = behind(behind(workload("shop", "cart-0", "10.0.0.1"), "shop", "cart"), "shop", "open");
        let changes = [hidden, service("shop", "open", "10.96.0.2")].map(|spec| Change::Service(Arc::new(spec)));
        let snapshot = snapshot(changes.into_iter().chain([Change::Workload(Arc::new(pod))]));
        let pod = snapshot.workload("Kubernetes//Pod/shop/cart-0");
        let ask = |from: &str, name: &str, port| {
            let host = format!("{name}.shop.svc.cluster.local");
            service_port(&snapshot, pod, from, &host, port).map_err(|outcome| outcome.code)
        };
        for (from, name, port, expected) in [
            ("shop", "cart", 80, Ok(8080)),
            ("bank", "cart", 80, Err(Code::WrongDestination)),
            ("bank", "open", 80, Ok(8080)),
            ("shop", "cart", 81, Err(Code::WrongDestination)),
            ("shop", "other", 80, Err(Code::WrongDestination)),
        ] {
            assert_eq!(ask(from, name, port), expected, "{name}:{port} from {from}");
        }
    }
}
