//! Tunnels from other proxies: TLS, HTTP/2, and each CONNECT as a connection of its own.
//!
//! What a peer says about itself in headers is for logs only. Who it is comes from its certificate, and where it may go is
//! always the pod at whose address its tunnel arrived (`target`).

use std::future::{poll_fn, ready};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Response;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::base::pace::Paced;
use crate::base::sockets::reset;
use crate::base::{canonical, workers};
use crate::flow::tunnel::{self, Proven};
use crate::flow::{LocalPod, Shared};
use crate::hbone::headers::{self, Baggage, Forwarded, TraceId};
use crate::inbound::proxy_header;
use crate::inbound::recheck::Live;
use crate::inbound::requests::{self, Connection};
use crate::inbound::target::{Asked, Target, find};
use crate::inbound::{Request, admit, stopped};
use crate::outcome::{Code, Outcome};
use crate::relay::{self, StreamIo, TcpSide, Terms};
use crate::state::Workload;
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
fn read(tunnel: &Tunnel, request: Box<http::Request<RecvStream>>) -> (ConnRecord, Result<Target, Outcome>, RecvStream) {
    let metrics = tunnel.shared.metrics.clone();
    let mut record = ConnRecord::new(metrics, Direction::Inbound, tunnel.proven.peer, tunnel.proven.local);
    describe(tunnel, &request, &mut record);
    let snapshot = tunnel.shared.reader.load();
    let target = headers::destination(&request).and_then(|authority| {
        let asked = Asked {
            snapshot: &snapshot,
            network: &tunnel.shared.network,
            pod: tunnel.pod.workload(&snapshot).map(|pod| &**pod),
            client: &tunnel.proven.source_identity,
            local: tunnel.proven.local.ip(),
        };
        find(&asked, authority)
    });
    (record, target, request.into_body())
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
    target: Result<Target, Outcome>,
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
        record.hbone = Some(target.address);
        let facts = Request {
            identity: Some(tunnel.proven.source_identity.clone()),
            source: tunnel.proven.peer.ip(),
            target: target.address,
            inside: target.told.is_some(),
        };
        let mut admitted = admit(shared, &tunnel.live, pod, &facts, record).await?;
        if let Some(told) = target.told {
            let header = proxy_header::of(tunnel.proven.peer, told, &tunnel.proven.source_identity);
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
