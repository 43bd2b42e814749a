//! The discovery stream itself: connects, feeds the session, applies its changes, and reconnects for ever.
//!
//! One task owns the session and the store's writer. Responses are applied in order and acknowledged after they are in
//! force, so that an ACK means effect. A large one is taken apart and applied in steps, between which other tasks of the
//! thread have their turn, and comes into force at once. Limits: a response has at most 200 MiB (istiod's own limit is its cluster), and at
//! most [`REQUESTS`] requests wait to be sent.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tulle_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use tulle_proto::names::{HEADER_TULLE_TYPES, TYPE_ADDRESS};

use crate::base::{memory, unix_now_us};
use crate::identity::{Control, ControlError, backoff, status_text};
use crate::state::{Applied, Change, Demands, Writer};
use crate::xds::monitor::{Monitor, Termination};
use crate::xds::session::{Session, demand, in_steps};

/// Istio's value: every workload of a large cluster in one response.
const MAX_RESPONSE_BYTES: usize = 200 << 20;
/// Requests that wait to be sent: the first ones and one answer a response, so a full queue means that control does not
/// read. Then the stream is given up.
const REQUESTS: usize = 16;
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers come with the first response at the latest, and control answers a first request at once.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Resources that are taken apart in one step: some milliseconds.
const STEP: usize = 256;
/// Workloads that are kept whole although nobody uses them, 1.5 KB each; looked at this often, because the walk takes
/// some milliseconds.
const IDLE: usize = 2048;
const LOOK_FOR_IDLE: Duration = Duration::from_secs(60);
/// How often names are given up that nobody uses; an answer that crossed the giving up is dropped then too.
const LOOK_FOR_UNUSED: Duration = Duration::from_secs(15);
/// After a response of so many resources the allocator gives back what taking it apart has left.
const LARGE: usize = 2048;
const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// Who this node is, and how control is reached.
#[derive(Clone, Debug)]
pub struct Config {
    /// The way to control.
    pub control: Control,
    /// NODE_NAME, also the claim of the token.
    pub node_name: String,
    /// Own address, as part of the node id. Istio's ztunnel says 1.1.1.1 when it does not know.
    pub instance_ip: String,
    /// POD_NAME.
    pub pod_name: String,
    /// POD_NAMESPACE.
    pub pod_namespace: String,
    /// Metadata besides: TULLE_VERSION, `ISTIO_META_*`, `ISTIO_METAJSON_*`.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Whether NetworkPolicies are enforced here, where control offers them.
    pub network_policy: bool,
    /// Workloads and services only as they are asked for, besides those of the node.
    pub on_demand: bool,
    /// What names of Services end in.
    pub cluster_domain: String,
}

impl Config {
    /// The node as control sees it: the peer's form, which istiod parses.
    pub fn node(&self) -> Node {
        let Self { instance_ip, pod_name, pod_namespace, .. } = self;
        let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
        let mut fields: BTreeMap<String, Value> =
            self.metadata.iter().map(|(name, from)| (name.clone(), value(from))).collect();
        let own = [
            ("NAME", pod_name),
            ("NAMESPACE", pod_namespace),
            ("INSTANCE_IPS", instance_ip),
            ("NODE_NAME", &self.node_name),
        ];
        fields.extend(own.map(|(key, value)| (key.to_owned(), text(value))));
        Node {
            id: format!("ztunnel~{instance_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.cluster.local"),
            cluster: String::new(),
            metadata: Some(Struct { fields }),
        }
    }
}

/// JSON as protobuf has it.
fn value(from: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match from {
        Json::Null => Kind::NullValue(0),
        Json::Bool(flag) => Kind::BoolValue(*flag),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(list) => Kind::ListValue(ListValue { values: list.iter().map(value).collect() }),
        Json::Object(map) => {
            Kind::StructValue(Struct { fields: map.iter().map(|(name, from)| (name.clone(), value(from))).collect() })
        }
    };
    Value { kind: Some(kind) }
}

/// How one stream ended.
struct Ended {
    reason: Termination,
    error: String,
    /// A response was applied, so the next failure is the first one again.
    useful: bool,
}

/// Keeps the store as control says, until `shutdown` completes. There is no error that ends it.
pub async fn run(config: Config, mut writer: Writer, monitor: Monitor, shutdown: impl Future<Output = ()>) {
    tokio::pin!(shutdown);
    if config.on_demand {
        writer.demands().enable(&config.node_name, &config.cluster_domain);
    }
    let mut session = Session::new(config.node(), config.on_demand, config.network_policy);
    let mut failures = 0u32;
    loop {
        let ended = tokio::select! {
            () = &mut shutdown => return,
            ended = stream(&config.control, &mut session, &mut writer, &monitor) => ended,
        };
        monitor.terminated(ended.reason, &ended.error, unix_now_us());
        failures = if ended.useful { 1 } else { failures.saturating_add(1) };
        let wait = backoff(FIRST_RETRY, LAST_RETRY, failures, rand::random());
        match ended.reason {
            // A restart of control is ordinary, and a clean end is its right.
            Termination::Complete | Termination::Reconnect => {
                tracing::info!(retry_in = ?wait, reason = ended.error, "xDS stream ended");
            }
            Termination::ConnectionError | Termination::Error => {
                tracing::warn!(retry_in = ?wait, error = ended.error, "xDS stream failed; the last good state stays");
            }
        }
        tokio::select! {
            () = &mut shutdown => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// One stream from connecting to its end.
async fn stream(control: &Control, session: &mut Session, writer: &mut Writer, monitor: &Monitor) -> Ended {
    let connected = match control.connect().await {
        Ok(connected) => connected,
        Err(error) => return unreachable(&error),
    };
    let ended = converse(connected.channel.clone(), control, session, writer, monitor).await;
    // Whatever ended it: another connection may lead to another replica of control.
    control.link.broken(&connected).await;
    ended
}

fn unreachable(error: &ControlError) -> Ended {
    Ended { reason: Termination::ConnectionError, error: error.to_string(), useful: false }
}

/// One stream over a connection.
async fn converse(
    channel: Channel,
    control: &Control,
    session: &mut Session,
    writer: &mut Writer,
    monitor: &Monitor,
) -> Ended {
    let (requests, queue) = mpsc::channel(REQUESTS);
    for first in session.open(writer.addresses(), &writer.demands().all()) {
        // The queue is new and larger than what a session opens with.
        let _ = requests.try_send(first);
    }
    let mut request = Request::new(ReceiverStream::new(queue));
    if let Err(error) = control.authorize(request.metadata_mut()).await {
        return unreachable(&error);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_RESPONSE_BYTES);
    let opened = tokio::time::timeout(OPEN_TIMEOUT, client.delta_aggregated_resources(request)).await;
    let late = |_| tonic::Status::deadline_exceeded(format!("no answer within {} s", OPEN_TIMEOUT.as_secs()));
    let response = match opened.map_err(late).flatten() {
        Ok(response) => response,
        Err(status) => return by_status(&status, false),
    };
    let offered = response.metadata().get(HEADER_TULLE_TYPES).and_then(|value| value.to_str().ok()).unwrap_or("");
    let offered: Vec<String> =
        offered.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let (expected, subscriptions) = session.offered(&offered);
    writer.apply(expected, unix_now_us());
    for subscription in subscriptions {
        // There is room: the queue holds the first requests and nothing was answered yet.
        let _ = requests.try_send(subscription);
    }
    monitor.connected(unix_now_us(), offered);
    tracing::info!(address = control.address, "xDS stream open");
    let mut responses = response.into_inner();
    let mut useful = false;
    let mut again: Option<Instant> = None;
    let mut look = Instant::now() + LOOK_FOR_IDLE;
    let demands = writer.demands().clone();
    let on_demand = demands.enabled();
    let mut look_for_unused = Instant::now() + LOOK_FOR_UNUSED;
    loop {
        let message = tokio::select! {
            message = responses.message() => message,
            // Something holds for a while only. Between streams it holds on, which is the safe side.
            () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                again = due(writer.apply([], unix_now_us()).again_us);
                writer.settled(unix_now_us());
                continue;
            }
            () = sleep_until(look), if !session.is_partial() => {
                writer.forget(IDLE);
                look = Instant::now() + LOOK_FOR_IDLE;
                continue;
            }
            () = sleep_until(look_for_unused), if on_demand && !session.is_partial() => {
                demands.expire(std::time::Instant::now());
                forget_unwanted(writer);
                look_for_unused = Instant::now() + LOOK_FOR_UNUSED;
                if !ask(&demands, writer, &requests).await {
                    return deaf(useful);
                }
                continue;
            }
            () = demands.work(), if on_demand && !session.is_partial() => {
                if !ask(&demands, writer, &requests).await {
                    return deaf(useful);
                }
                continue;
            }
        };
        match message {
            Ok(Some(response)) => {
                let (answer, applied) = take(session, writer, monitor, response).await;
                if let Some(applied) = applied {
                    again = due(applied.again_us);
                }
                useful = true;
                if let Some(answer) = answer
                    && requests.send_timeout(answer, SEND_TIMEOUT).await.is_err()
                {
                    return deaf(useful);
                }
            }
            Ok(None) => {
                let error = "control ended the stream".to_owned();
                return Ended { reason: Termination::Complete, error, useful };
            }
            Err(status) => return by_status(&status, useful),
        }
    }
}

fn deaf(useful: bool) -> Ended {
    let error = "control does not read this node's requests and acknowledgements".to_owned();
    Ended { reason: Termination::Error, error, useful }
}

/// Sends what is asked for since the last time. Whether control reads it.
async fn ask(demands: &Demands, writer: &mut Writer, requests: &mpsc::Sender<DeltaDiscoveryRequest>) -> bool {
    let (subscribe, unsubscribe) = demands.changes();
    if subscribe.is_empty() && unsubscribe.is_empty() {
        return true;
    }
    if !unsubscribe.is_empty() {
        // At once: from here on control does not say what becomes of it.
        forget_unwanted(writer);
    }
    requests.send_timeout(demand(&subscribe, &unsubscribe), SEND_TIMEOUT).await.is_ok()
}

/// Drops what nobody asks for any more.
fn forget_unwanted(writer: &mut Writer) {
    let unwanted = writer.demands().unwanted(writer.current());
    if !unwanted.is_empty() {
        writer.apply(unwanted.into_iter().map(Change::AddressRemoved), unix_now_us());
    }
}

/// Applies a response and gives what to answer. `None`: it takes effect with the next one.
async fn take(
    session: &mut Session,
    writer: &mut Writer,
    monitor: &Monitor,
    response: DeltaDiscoveryResponse,
) -> (Option<DeltaDiscoveryRequest>, Option<Applied>) {
    let bytes = response.resources.iter().map(|resource| prost::Message::encoded_len(resource) as u64).sum();
    monitor.message(&response.type_url, bytes);
    let (type_url, resources) = (response.type_url.clone(), response.resources.len());
    let was_synced = session.synced();
    let (mut rejected, mut answered, mut answer) = (Vec::new(), Vec::new(), None);
    // Policies are few, and one that is replaced must not be missing in between.
    let size = if response.type_url == TYPE_ADDRESS { STEP } else { usize::MAX };
    for part in in_steps(response, size) {
        let outcome = session.respond(part);
        rejected.extend(outcome.rejected);
        answered.extend(outcome.answered);
        answer = outcome.answer;
        writer.take(outcome.changes, unix_now_us());
        yield_now().await;
    }
    while writer.prepare() {
        yield_now().await;
    }
    for one in &rejected {
        tracing::warn!(resource = %one.name, reason = one.reason, "control sent a resource that cannot be used");
    }
    if !rejected.is_empty() {
        monitor.rejections(&rejected);
    }
    if session.is_partial() {
        return (answer, None);
    }
    let applied = writer.finish(unix_now_us());
    writer.settled(unix_now_us());
    if writer.demands().enabled() {
        writer.demands().pin_own(writer.current());
        writer.demands().answered(answered.iter().map(String::as_str));
    }
    if resources >= LARGE || session.synced() != was_synced {
        memory::give_back();
    }
    let generation = applied.generation;
    tracing::debug!(type_url, resources, generation, staged = applied.staged, "applied a response");
    (answer, Some(applied))
}

/// The moment of a time of the wall clock.
fn due(at_us: Option<u64>) -> Option<Instant> {
    let left = Duration::from_micros(at_us?.saturating_sub(unix_now_us()));
    // Should the clock jump, it is looked at again.
    Some(Instant::now() + left.min(Duration::from_secs(10)))
}

fn by_status(status: &tonic::Status, useful: bool) -> Ended {
    let text = status_text(status);
    let restarting = match status.code() {
        Code::Cancelled | Code::Unknown | Code::DeadlineExceeded => true,
        Code::Unavailable => useful,
        _ => false,
    };
    let reason = if restarting { Termination::Reconnect } else { Termination::Error };
    Ended { reason, error: format!("{:?}: {text}", status.code()), useful }
}
