//! Carrying a plan out: open the tunnel or the connection, then copy.
//!
//! There is no other way to try when it fails: a plan that asks for a tunnel never becomes plaintext. A failure says
//! whether another endpoint may be asked without delivering anything twice.

use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, StatusCode};
use rand::RngExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tulle_certs::SpiffeId;

use crate::base::Counts;
use crate::base::cut::Cut;
use crate::base::pace::Paced;
use crate::flow::{LocalPod, Shared};
use crate::hbone::client::{Dialer, Patience};
use crate::hbone::headers::{self, Baggage, Forwarded, TraceId};
use crate::hbone::pool::{Key, Lease, Opened, Pool};
use crate::http::BoxIo;
use crate::outbound::attempts::{Attempts, Failure, not_opened};
use crate::outbound::breaker::{Lasting, expired};
use crate::outbound::decide::{Hbone, Plain, Plan};
use crate::outbound::egress::{self, Leave};
use crate::outbound::recheck::Registration;
use crate::outbound::{forbidden, stopped};
use crate::outcome::{Code, Fault, Outcome};
use crate::relay::early::{self, Said};
use crate::relay::{self, StreamIo, TcpSide, Terms};
use crate::state::Workload;
use crate::telemetry::ConnRecord;

/// What `dial` gives, within a policy's `connectTimeout`.
pub(super) async fn within<T>(
    limit: Option<Duration>,
    dial: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let Some(limit) = limit else { return dial.await };
    timeout(limit, dial).await.unwrap_or_else(|_| {
        let text =
            format!("no connection within {limit:?}, the connectionPool.tcp.connectTimeout of its DestinationRule");
        Err(not_opened(Outcome::new(Code::ConnectTimeout, text)))
    })
}

/// A stream of a tunnel; its answer may still be to come.
pub(super) struct Stream {
    send: SendStream<Bytes>,
    answer: Answer,
    lease: Lease,
}

enum Answer {
    Waited(ResponseFuture),
    Here(RecvStream),
}

/// Opens a tunnel for `plan`. With `said`, waits until the destination took the connection, and keeps there what the
/// client said meanwhile; without, only until the request is on its way.
pub(super) async fn tunnel(
    attempts: Attempts<'_>,
    tcp: &TcpStream,
    source: &Workload,
    plan: &Hbone,
    patience: Patience,
    said: Option<&mut Said>,
    record: &mut ConnRecord,
) -> Result<Stream, Failure> {
    let Attempts { shared, pool, pod, .. } = attempts;
    record.hbone = Some(plan.address);
    let trace = TraceId::new(rand::rng().random());
    record.trace = Some(trace.to_string());
    let headers = describe(shared, source, plan, record.source.addr, trace);
    let Opened { response, mut send, lease } = open(shared, pool, pod, source, plan, patience, headers).await?;
    let answer = match said {
        None => Answer::Waited(response),
        Some(said) => {
            let answer = accepted(response, shared, &lease);
            let answer = tokio::select! {
                biased;
                outcome = lease.cut() => Err(outcome),
                answer = early::until_answered(tcp, &mut send, said, &record.counts, answer) => answer,
            };
            match answer.map_err(Failure::last).and_then(|answer| answer.map_err(|refusal| refusal.failure(said))) {
                Ok(recv) => Answer::Here(recv),
                Err(failure) => {
                    send.send_reset(h2::Reason::CANCEL);
                    return Err(failure);
                }
            }
        }
    };
    record.source.identity = Some(source.identity.clone());
    record.destination.identity = Some(lease.peer().clone());
    Ok(Stream { send, answer, lease })
}

/// Copies between the client and a stream until both are done.
pub(super) async fn relay_tunnel(
    shared: &Shared,
    pod: &LocalPod,
    tcp: TcpStream,
    stream: Stream,
    registration: &Registration,
    lasting: &mut Option<Box<Lasting>>,
    counts: &Rc<Counts>,
) -> Outcome {
    let Stream { send, answer, lease } = stream;
    // Boxed: what it takes to wait for the answer must not weigh on the connection while it is idle.
    let recv = Box::pin(async {
        match answer {
            Answer::Here(recv) => Ok(recv),
            Answer::Waited(response) => accepted(response, shared, &lease).await.map_err(|refusal| refusal.outcome),
        }
    });
    let terms = Terms { counts, limits: shared.relay, budget: &pod.buffers };
    let stop = pin!(async {
        tokio::select! {
            outcome = stopped(pod, registration) => outcome,
            outcome = lease.cut() => outcome,
            outcome = expired(lasting) => outcome,
        }
    });
    relay::tunnel(tcp, send, recv, TcpSide::Client, terms, &lease.window, stop).await
}

async fn open(
    shared: &Shared,
    pool: &Pool,
    pod: &LocalPod,
    source: &Workload,
    plan: &Hbone,
    patience: Patience,
    headers: HeaderMap,
) -> Result<Opened, Failure> {
    let cert = shared.certificate(source).await.map_err(Failure::last)?;
    let key = Key {
        source: source.identity.clone(),
        pod: pod.uid.clone(),
        expected: plan.expected.clone(),
        address: plan.address,
        beyond: plan.beyond.clone(),
        keepalive: plan.keepalive,
    };
    let dialer = Dialer { sockets: pod.sockets.clone(), cert, budget: pod.buffers.clone(), patience };
    let request = headers::connect_request(&plan.asks_for(), headers)
        .map_err(|error| Failure::last(Outcome::new(Code::Internal, error.to_string())))?;
    pool.open(&key, &dialer, &request).await.map_err(not_opened)
}

fn describe(shared: &Shared, source: &Workload, plan: &Hbone, client: Option<SocketAddr>, trace: TraceId) -> HeaderMap {
    let text = |value: &Arc<str>| Some(value.to_string()).filter(|text| !text.is_empty());
    let baggage = Baggage {
        cluster: text(&source.cluster),
        namespace: text(&source.namespace),
        workload: text(&source.workload_name),
        service: text(&source.canonical_name),
        version: text(&source.canonical_revision),
        region: text(&source.locality.region),
        zone: text(&source.locality.zone),
    };
    let forwarded = Forwarded { client, host: plan.service.as_ref().map(|service| service.hostname.to_string()) };
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
    // Which network's addresses this is about, for an end that is in another one.
    if plan.beyond.is_some()
        && let Ok(network) = HeaderValue::from_str(&shared.network)
    {
        map.insert(headers::FORWARDED_NETWORK, network);
    }
    map
}

/// Opens a connection for HTTP, to be used for many requests of the pod: a stream of a tunnel whose destination has taken
/// it, or TCP. Also who the other side proved to be, and what may order the tunnel's end.
pub(super) async fn connection(
    attempts: Attempts<'_>,
    client: SocketAddr,
    source: &Workload,
    plan: &Plan,
    patience: Patience,
) -> Result<(BoxIo, Option<SpiffeId>, Option<Rc<Cut<Outcome>>>), Failure> {
    let Attempts { shared, pool, pod, .. } = attempts;
    match plan {
        Plan::Hbone(plan) => {
            let headers = describe(shared, source, plan, Some(client), TraceId::new(rand::rng().random()));
            let Opened { response, mut send, lease } = open(shared, pool, pod, source, plan, patience, headers).await?;
            match accepted(response, shared, &lease).await {
                Ok(recv) => {
                    let (peer, order) = (lease.peer().clone(), lease.order());
                    Ok((Box::new(Paced::new(StreamIo::new(send, recv, lease))), Some(peer), Some(order)))
                }
                Err(refusal) => {
                    send.send_reset(h2::Reason::CANCEL);
                    Err(refusal.failure(&Said::new(&pod.buffers)))
                }
            }
        }
        Plan::Plain(plan) => {
            let server = self::plain(pod, plan, patience, &Said::new(&pod.buffers)).await?;
            Ok((Box::new(server), None, None))
        }
    }
}

/// A CONNECT that was not accepted.
struct Refusal {
    outcome: Outcome,
    sure: Sure,
}

/// What is known of the application at a refused CONNECT.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sure {
    /// It was not asked, or did not take the connection.
    NotDelivered,
    /// It may have taken it, but cannot have seen a byte that was not sent.
    OnlyWhatWasSent,
    /// Somebody refused who knows why; the next endpoint would be asked the same.
    Final,
}

impl Refusal {
    fn failure(self, said: &Said) -> Failure {
        let elsewhere = match self.sure {
            Sure::NotDelivered => true,
            Sure::OnlyWhatWasSent => said.is_nothing(),
            Sure::Final => false,
        };
        Failure { outcome: self.outcome, elsewhere }
    }
}

/// The other proxy's answer. It answers after its own connect, so it gets that long and a little more.
async fn accepted(response: ResponseFuture, shared: &Shared, lease: &Lease) -> Result<RecvStream, Refusal> {
    let patience = shared.hbone.connect_timeout * 2;
    match timeout(patience, response).await {
        Ok(Ok(response)) if response.status() == StatusCode::OK => Ok(response.into_body()),
        Ok(Ok(response)) => {
            let outcome = headers::refused(&response);
            // The peer proves that it asked no policy that says no, and that its application did not answer.
            let unreachable = response.status() == StatusCode::SERVICE_UNAVAILABLE
                && !matches!(outcome.code.fault(), Fault::Policy | Fault::Client);
            Err(Refusal { outcome, sure: if unreachable { Sure::NotDelivered } else { Sure::Final } })
        }
        Ok(Err(error)) => {
            let refused = error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            let sure = if refused { Sure::NotDelivered } else { Sure::OnlyWhatWasSent };
            Err(Refusal { outcome: Outcome::new(Code::TunnelFailed, error.to_string()), sure })
        }
        Err(_) => {
            // Whatever is at the other end, the next connection should not find the same silence.
            lease.retire();
            let text = "the destination's proxy did not answer CONNECT in time";
            Err(Refusal { outcome: Outcome::new(Code::ConnectTimeout, text), sure: Sure::OnlyWhatWasSent })
        }
    }
}

/// A connection as it is, which gets first what the client has `said` to endpoints that did not take it.
pub(super) async fn plain(pod: &LocalPod, plan: &Plain, patience: Patience, said: &Said) -> Result<TcpStream, Failure> {
    let outcome = match timeout(patience.connect, pod.sockets.connect_out(plan.address, plan.keepalive)).await {
        Ok(Ok(mut server)) => {
            for chunk in said.chunks() {
                let written = server.write_all(chunk).await;
                written.map_err(|error| Failure::last(Outcome::new(Code::ServerReset, error.to_string())))?;
            }
            return Ok(server);
        }
        Ok(Err(error)) => Outcome::new(Code::ConnectFailed, format!("{}: {error}", plan.address)),
        Err(_) => Outcome::new(Code::ConnectTimeout, format!("{} did not answer", plan.address)),
    };
    Err(not_opened(outcome))
}

/// Copies between a client and a server outside until both are done, or no rule lets the connection out any more.
pub(super) async fn relay_outside(
    shared: &Shared,
    pod: &LocalPod,
    tcp: TcpStream,
    server: TcpStream,
    leave: &Leave,
    registration: &Registration,
    counts: &Rc<Counts>,
) -> Outcome {
    let stop = pin!(async {
        tokio::select! {
            outcome = stopped(pod, registration) => outcome,
            outcome = egress::forbidden(shared, pod, leave) => outcome,
        }
    });
    let terms = Terms { counts, limits: shared.relay, budget: &pod.buffers };
    relay::tcp(tcp, server, terms, stop).await
}

/// Copies between two connections until both are done.
pub(super) async fn relay_plain(
    shared: &Shared,
    pod: &LocalPod,
    (tcp, server): (TcpStream, TcpStream),
    outside: bool,
    registration: &Registration,
    lasting: &mut Option<Box<Lasting>>,
    counts: &Rc<Counts>,
) -> Outcome {
    // What is outside the cluster may become forbidden while it lasts.
    let stop = pin!(async {
        tokio::select! {
            outcome = stopped(pod, registration) => outcome,
            outcome = expired(lasting) => outcome,
            outcome = forbidden(shared, pod), if outside => outcome,
        }
    });
    let terms = Terms { counts, limits: shared.relay, budget: &pod.buffers };
    relay::tcp(tcp, server, terms, stop).await
}
