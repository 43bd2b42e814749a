//! Carrying a plan out: open the tunnel or the connection, then copy.
//!
//! There is no other way to try when it fails: a plan that asks for a tunnel never becomes plaintext.

use std::rc::Rc;
use std::sync::Arc;

use h2::client::ResponseFuture;
use http::{HeaderMap, StatusCode};
use rand::RngExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::base::Counts;
use crate::base::sockets::reset;
use crate::flow::{LocalPod, Shared};
use crate::hbone::client::Dialer;
use crate::hbone::headers::{self, Baggage, Forwarded, TraceId};
use crate::hbone::pool::{Key, Lease, Opened, Pool};
use crate::outbound::decide::{Hbone, Plain};
use crate::outbound::recheck::Registration;
use crate::outbound::{forbidden, stopped};
use crate::outcome::{Code, Outcome};
use crate::relay::{self, TcpSide, Terms};
use crate::state::Workload;
use crate::telemetry::ConnRecord;

/// Through a tunnel.
#[allow(clippy::too_many_arguments, reason = "the parts of one connection, each used once")]
pub(super) async fn tunnel(
    shared: &Shared,
    pool: &Rc<Pool>,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    source: &Arc<Workload>,
    plan: &Hbone,
    registration: &Registration,
    record: &mut ConnRecord,
    counts: &Rc<Counts>,
) -> Outcome {
    record.hbone = Some(plan.address);
    let opened = tokio::select! {
        opened = Box::pin(open(shared, pool, pod, source, plan, record)) => opened,
        outcome = stopped(pod, registration) => Err(outcome),
    };
    let Opened { response, send, lease } = match opened {
        Ok(opened) => opened,
        Err(outcome) => {
            reset(tcp);
            return outcome;
        }
    };
    record.source.identity = Some(source.identity.clone());
    record.destination.identity = Some(lease.peer().clone());
    record.opened();
    let terms = Terms { counts, limits: shared.relay, budget: &pod.buffers };
    let recv = accepted(response, shared, &lease);
    let stop = stopped(pod, registration);
    let outcome = relay::tunnel(tcp, send, recv, TcpSide::Client, terms, &lease.window, stop).await;
    drop(lease);
    outcome
}

async fn open(
    shared: &Shared,
    pool: &Pool,
    pod: &LocalPod,
    source: &Workload,
    plan: &Hbone,
    record: &mut ConnRecord,
) -> Result<Opened, Outcome> {
    let cert = shared.certificate(source).await?;
    let key = Key {
        source: source.identity.clone(),
        pod: pod.uid.clone(),
        expected: plan.expected.clone(),
        address: plan.address,
    };
    let dialer = Dialer { sockets: pod.sockets.clone(), cert, budget: pod.buffers.clone() };
    let trace = TraceId::new(rand::rng().random());
    record.trace = Some(trace.to_string());
    let request = headers::connect_request(&plan.authority.to_string(), describe(source, plan, record, trace))
        .map_err(|error| Outcome::new(Code::Internal, error.to_string()))?;
    pool.open(&key, &dialer, &request).await
}

fn describe(source: &Workload, plan: &Hbone, record: &ConnRecord, trace: TraceId) -> HeaderMap {
    let text = |value: &Arc<str>| Some(value.to_string()).filter(|text| !text.is_empty());
    let baggage = Baggage {
        cluster: text(&source.cluster),
        namespace: text(&source.namespace),
        workload: text(&source.workload_name),
        service: text(&source.canonical_name),
        version: text(&source.canonical_revision),
    };
    let forwarded = Forwarded {
        client: record.source.addr,
        host: plan.service.as_ref().map(|service| service.hostname.to_string()),
    };
    let mut map = HeaderMap::with_capacity(3);
    for (name, value) in [
        (headers::BAGGAGE, baggage.to_header(source.workload_type.as_str())),
        (headers::FORWARDED, forwarded.to_header()),
        (headers::TRACEPARENT, trace.to_header(rand::rng().random())),
    ] {
        if let Some(value) = value {
            map.insert(name, value);
        }
    }
    map
}

/// The other proxy's answer. It answers after its own connect, so it gets that long and a little more.
async fn accepted(response: ResponseFuture, shared: &Shared, lease: &Lease) -> Result<h2::RecvStream, Outcome> {
    let patience = shared.hbone.connect_timeout * 2;
    match timeout(patience, response).await {
        Ok(Ok(response)) if response.status() == StatusCode::OK => Ok(response.into_body()),
        Ok(Ok(response)) => Err(headers::refused(&response)),
        Ok(Err(error)) => Err(Outcome::new(Code::TunnelFailed, error.to_string())),
        Err(_) => {
            // Whatever is at the other end, the next connection should not find the same silence.
            lease.retire();
            Err(Outcome::new(Code::ConnectTimeout, "the destination's proxy did not answer CONNECT in time"))
        }
    }
}

/// As it is.
pub(super) async fn plain(
    shared: &Shared,
    pod: &LocalPod,
    tcp: TcpStream,
    plan: &Plain,
    registration: &Registration,
    record: &mut ConnRecord,
    counts: &Rc<Counts>,
) -> Outcome {
    match timeout(shared.hbone.connect_timeout, pod.sockets.connect(plan.address)).await {
        Ok(Ok(server)) => {
            record.opened();
            // What is outside the cluster may become forbidden while it lasts.
            let outside = plan.destination.as_ref().is_none_or(|workload| !workload.is_pod());
            let stop = async {
                tokio::select! {
                    outcome = stopped(pod, registration) => outcome,
                    outcome = forbidden(shared, pod), if outside => outcome,
                }
            };
            let terms = Terms { counts, limits: shared.relay, budget: &pod.buffers };
            relay::tcp(tcp, server, terms, stop).await
        }
        Ok(Err(error)) => {
            reset(tcp);
            Outcome::new(Code::ConnectFailed, format!("{}: {error}", plan.address))
        }
        Err(_) => {
            reset(tcp);
            Outcome::new(Code::ConnectTimeout, format!("{} did not answer", plan.address))
        }
    }
}
