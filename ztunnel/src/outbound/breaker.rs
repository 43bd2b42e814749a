//! A connection or request under the traffic policy of its destination: how its endpoint is chosen, whether a limit lets it
//! go on, and what it has to report of the endpoint.
//!
//! A [`Toward`] joins the policy of one snapshot with what the node knows of the Service (`lb::Destinations`); a [`Passage`]
//! is the use of one endpoint, which tells that memory how it ended, also by being dropped. Where a waypoint decides, the
//! policy is the waypoint's and nothing of it happens here. Connections without a policy do not come here at all; requests
//! do, to be balanced by what endpoints need for their answers.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use rand::RngExt as _;

use crate::base::Counts;
use crate::flow::{LocalPod, Shared};
use crate::http::grpc_status;
use crate::lb::outlier::{Report, Seen, Verdict};
use crate::lb::{self, Chance, Destination, Held, Kind, Live, Way};
use crate::outbound::attempts::Attempts;
use crate::outbound::decide::Plan;
use crate::outbound::waypoint;
use crate::outcome::{Code, Outcome};
use crate::state::{Balancer, HashKey, OutlierDetection, Service, Snapshot, TrafficPolicy, TrafficSettings, Workload};
use crate::telemetry::breakers::BreakerLabels;
use crate::telemetry::metrics::Metrics;

/// How often an idle connection is looked at within its idle time: that is how late its end may be, as a share.
const LOOKS: u32 = 8;

/// Longest and shortest time between two looks.
const LOOK: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// See the module's header.
pub(super) struct Toward {
    metrics: Arc<Metrics>,
    destination: Arc<Destination>,
    /// Where to.
    pub(super) service: Arc<Service>,
    port: u16,
    policy: Option<Arc<TrafficPolicy>>,
    pod: Arc<str>,
    /// The pod's own address.
    own: Option<IpAddr>,
    /// Requests are balanced, not connections.
    requests: bool,
}

impl Toward {
    /// Of a connection; none: there is no policy.
    pub(super) fn of_connection(
        shared: &Shared,
        pod: &LocalPod,
        snapshot: &Snapshot,
        source: &Workload,
        destination: SocketAddr,
    ) -> Option<Rc<Self>> {
        let service = snapshot.service_at(&shared.network, destination, &source.namespace)?;
        let toward = Self::new(shared, pod, snapshot, source, service, destination.port(), false);
        toward.filter(|toward| toward.policy.is_some()).map(Rc::new)
    }

    /// Of requests.
    pub(super) fn of_requests(
        shared: &Shared,
        pod: &LocalPod,
        snapshot: &Snapshot,
        source: &Workload,
        service: &Arc<Service>,
        port: u16,
    ) -> Option<Rc<Self>> {
        Self::new(shared, pod, snapshot, source, service, port, true).map(Rc::new)
    }

    fn new(
        shared: &Shared,
        pod: &LocalPod,
        snapshot: &Snapshot,
        source: &Workload,
        service: &Arc<Service>,
        port: u16,
        requests: bool,
    ) -> Option<Self> {
        let policy = snapshot.traffic_for(service, port, &source.namespace).map(|(policy, _)| policy.clone());
        if (policy.is_none() && !requests) || waypoint::decides(snapshot, source, service) {
            return None;
        }
        Some(Self {
            metrics: shared.metrics.clone(),
            destination: shared.destinations.of(service, port),
            service: service.clone(),
            port,
            policy,
            pod: pod.uid.clone(),
            own: pod.addresses.first().copied(),
            requests,
        })
    }

    /// What the policy says.
    pub(super) fn settings(&self) -> Option<&TrafficSettings> {
        self.policy.as_ref().map(|policy| policy.at(self.port))
    }

    /// What the pod has under way.
    pub(super) fn live(&self) -> Arc<Live> {
        self.destination.live(&self.pod)
    }

    /// Calls `then` with the worker's experience and the node's. `key`: the hash of what the policy says is hashed.
    pub(super) fn with_chance<T>(
        &self,
        attempts: Attempts<'_>,
        tried: &[SocketAddr],
        key: Option<u64>,
        then: impl FnOnce(&Chance<'_>) -> T,
    ) -> T {
        let (now, destination) = (Instant::now(), &self.destination);
        let idler = |first, second| destination.under_way(second) < destination.under_way(first);
        let faster = |first, second| destination.is_better(first, second, now);
        let way = match self.settings().map_or(&Balancer::Default, |settings| &settings.balancer) {
            Balancer::RoundRobin => Way::Turn(destination.turn()),
            Balancer::Random => Way::Random,
            Balancer::LeastRequest => Way::Better(&idler),
            Balancer::Hash(_, layout) => key.map_or(Way::Random, |key| Way::Hash(key, *layout)),
            // A service that binds its clients has said how it wants to be balanced.
            Balancer::Default if self.requests && self.service.lb.affinity.is_none() => Way::Better(&faster),
            Balancer::Default | Balancer::Passthrough => Way::Usual,
        };
        let watched = self.watched(now);
        let ejected = |endpoint| watched && self.is_out(endpoint, now);
        let by_age = !matches!(way, Way::Hash(..) | Way::Random);
        let warmup = self.settings().and_then(|settings| settings.warmup.as_ref()).filter(|_| by_age);
        if warmup.is_some() {
            destination.look(&self.service, now);
        }
        attempts.with_chance(tried, |chance| {
            let young = |endpoint| warmup.is_some_and(|it| destination.is_held_back(endpoint, it, chance.random, now));
            let held_back = warmup.map(|_| &young as &dyn Fn(SocketAddr) -> bool);
            then(&Chance { ejected: &ejected, held_back, way, ..*chance })
        })
    }

    /// Whether any endpoint may be ejected now.
    fn watched(&self, now: Instant) -> bool {
        let Some((policy, rules)) = self.rules() else { return false };
        self.destination.ejects(&policy.id, rules, self.service.candidates(self.port), &self.pod, now)
    }

    fn rules(&self) -> Option<(&Arc<TrafficPolicy>, &OutlierDetection)> {
        let policy = self.policy.as_ref()?;
        Some((policy, policy.at(self.port).outlier.as_ref()?))
    }

    fn is_out(&self, endpoint: SocketAddr, now: Instant) -> bool {
        self.rules().is_some_and(|(policy, _)| {
            self.destination.outliers(&policy.id, now, |outliers| outliers.is_out(endpoint, &self.pod, now))
        })
    }

    /// Begins to use an endpoint that was chosen. None: another one began to try it in this moment; choose again.
    pub(super) fn enter(self: &Rc<Self>, plan: &Plan) -> Option<Passage> {
        let at = plan.endpoint();
        // One of two families is the same endpoint, and what fails by one fails by both.
        let first = plan.destination().and_then(|workload| workload.addresses.first());
        let endpoint = first.map_or(at, |first| SocketAddr::new(*first, at.port()));
        let now = Instant::now();
        let probe = match self.rules() {
            // Chosen although it is ejected, because too few are left.
            Some((policy, _)) if self.watched(now) => {
                self.destination.outliers(&policy.id, now, |outliers| outliers.enter(endpoint, &self.pod, now))?
            }
            _ => false,
        };
        self.destination.begin(endpoint, now);
        Some(Passage { toward: self.clone(), endpoint, probe: Cell::new(probe), sent: Cell::new(now) })
    }

    /// One more of `kind`, where the limit lets it.
    ///
    /// # Errors
    /// `Overflow`.
    pub(super) fn take(&self, live: &Arc<Live>, kind: Kind) -> Result<Held, Outcome> {
        live.take(kind, self.limit(kind)).ok_or_else(|| self.overflow(kind))
    }

    fn limit(&self, kind: Kind) -> Option<u32> {
        let settings = self.settings()?;
        match kind {
            Kind::Connections => settings.max_connections,
            Kind::Pending => settings.max_pending_requests,
            Kind::Requests => settings.max_requests,
            Kind::Retries => settings.max_retries,
        }
    }

    /// A limit is reached.
    pub(super) fn overflow(&self, kind: Kind) -> Outcome {
        self.count_overflow(kind);
        let (what, field) = match kind {
            Kind::Connections => ("connections", "tcp.maxConnections"),
            Kind::Pending => ("requests that wait for a connection", "http.http1MaxPendingRequests"),
            Kind::Requests => ("requests", "http.http2MaxRequests"),
            Kind::Retries => ("retries", "http.maxRetries"),
        };
        let rule = self.policy.as_deref().map_or("", |policy| &policy.id);
        let text = format!(
            "the pod has {} {what} to {}:{}, the limit of {rule} (connectionPool.{field}); it counts for each source pod",
            self.limit(kind).unwrap_or_default(),
            self.service.hostname,
            self.port
        );
        Outcome::new(Code::Overflow, text)
    }

    /// Counts that a limit is reached.
    pub(super) fn count_overflow(&self, kind: Kind) {
        self.metrics.breakers.overflow.get_or_create(&self.labels(kind.name())).inc();
    }

    fn labels(&self, kind: &'static str) -> BreakerLabels {
        BreakerLabels { destination_service: self.service.hostname.clone(), kind }
    }

    /// The hash that chooses the endpoint of a connection.
    pub(super) fn key_of_connection(&self) -> Option<u64> {
        match &self.settings()?.balancer {
            Balancer::Hash(HashKey::SourceIp, _) => self.own.map(of_address),
            _ => None,
        }
    }

    /// The hash that chooses the endpoint of a request, and the cookie that the client gets so that its next request has the
    /// same.
    pub(super) fn key_of_request(&self, parts: &Parts, client: IpAddr) -> (Option<u64>, Option<HeaderValue>) {
        let Some(Balancer::Hash(key, _)) = self.settings().map(|settings| &settings.balancer) else {
            return (None, None);
        };
        match (carried(key, parts, client), key) {
            (None, HashKey::Cookie { name, path, ttl, passive: false, attributes }) => {
                let value = format!("{:016x}", rand::rng().random::<u64>());
                let age = if ttl.is_zero() { String::new() } else { format!("; Max-Age={}", ttl.as_secs()) };
                let set = format!("{name}={value}{age}; Path={path}; HttpOnly{attributes}");
                (Some(lb::hash(value.as_bytes())), HeaderValue::try_from(set).ok())
            }
            (found, _) => (found, None),
        }
    }
}

/// The hash of what a request carries. `None`: it does not carry what is hashed.
pub(super) fn carried(key: &HashKey, parts: &Parts, client: IpAddr) -> Option<u64> {
    let of = |value: &str| lb::hash(value.as_bytes());
    match key {
        HashKey::SourceIp => Some(of_address(client)),
        HashKey::Header(name) => parts.headers.get(name).map(|value| lb::hash(value.as_bytes())),
        HashKey::Query(name) => query(parts.uri.query().unwrap_or_default(), name).map(of),
        HashKey::Cookie { name, .. } => cookie(&parts.headers, name).map(of),
    }
}

fn of_address(ip: IpAddr) -> u64 {
    lb::hash(ip.to_canonical().to_string().as_bytes())
}

/// The first value of a parameter, as it is written.
fn query<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.split_once('=').filter(|(own, _)| *own == name).map(|(_, value)| value))
}

/// The first value of a cookie (RFC 6265 §4.2.1).
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(header::COOKIE).into_iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(own, _)| *own == name).map(|(_, value)| value)
}

/// The use of one endpoint.
pub(super) struct Passage {
    toward: Rc<Toward>,
    /// Its first address.
    endpoint: SocketAddr,
    /// It tries a half-open endpoint, and has not said yet how it went.
    probe: Cell<bool>,
    /// When the request was sent: how long a connection took says nothing of the next answer.
    sent: Cell<Instant>,
}

impl Passage {
    /// Reports what the endpoint did.
    pub(super) fn saw(&self, seen: Seen) {
        let Some((policy, rules)) = self.toward.rules().filter(|_| !is_broken()) else { return };
        let (toward, now, endpoint) = (&*self.toward, Instant::now(), self.endpoint);
        let all = || lb::addresses(&toward.service, toward.port);
        let probe = self.probe.get();
        let report = Report { rules, endpoint, pod: &toward.pod, seen, probe, all: &all, now };
        let verdict = toward.destination.outliers(&policy.id, now, |outliers| outliers.saw(report));
        if seen != Seen::Connected {
            self.probe.set(false);
        }
        let (breakers, service) = (&toward.metrics.breakers, &toward.service.hostname);
        match verdict {
            Verdict::Nothing => {}
            Verdict::Ejected(why, time) => {
                breakers.ejections.get_or_create(&toward.labels(why.name())).inc();
                let seconds = time.as_secs_f64();
                tracing::warn!(%endpoint, %service, policy = %policy.id, why = why.name(), seconds, "endpoint ejected");
            }
            Verdict::TooMany(why) => {
                breakers.ejections_overflow.get_or_create(&toward.labels(why.name())).inc();
            }
            Verdict::Back => tracing::info!(%endpoint, %service, policy = %policy.id, "endpoint is used again"),
        }
    }

    /// The request is on its way.
    pub(super) fn sent(&self) {
        self.sent.set(Instant::now());
    }

    /// The head of an answer has come.
    pub(super) fn answered(&self, status: StatusCode, headers: &HeaderMap, grpc: bool) {
        let now = Instant::now();
        let mut time = now.saturating_duration_since(self.sent.get());
        let of_grpc = if grpc { grpc_status(headers) } else { None };
        if status == StatusCode::TOO_MANY_REQUESTS || of_grpc.as_deref() == Some("8") {
            let after = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            time = time.max(lb::refused(after.map(Duration::from_secs)));
        }
        self.toward.destination.took(self.endpoint, time, now);
        match (grpc && status == StatusCode::OK, of_grpc) {
            (true, Some(of_grpc)) => self.saw(Seen::Answer(http_of(&of_grpc))),
            // Its own status comes at its end; who tries the endpoint does not keep others waiting for so long.
            (true, None) if !self.probe.get() => {}
            _ => self.saw(Seen::Answer(status.as_u16())),
        }
    }

    /// The trailers of an answer have come.
    pub(super) fn ended(&self, of_grpc: Option<&str>) {
        if let Some(of_grpc) = of_grpc {
            self.saw(Seen::Answer(http_of(of_grpc)));
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.toward.destination.end(self.endpoint);
        if self.probe.get()
            && let Some((policy, _)) = self.toward.rules()
        {
            let (destination, pod) = (&self.toward.destination, &self.toward.pod);
            destination.outliers(&policy.id, Instant::now(), |outliers| outliers.leave(self.endpoint, pod));
        }
    }
}

/// The HTTP status that a gRPC status counts as: failures of the server as 5xx, everything else as an answer.
/// PERMISSION_DENIED is an answer: who is refused must not take the endpoint from those who are not.
fn http_of(grpc: &str) -> u16 {
    match grpc {
        "4" => 504,
        "13" | "15" => 500,
        "14" => 503,
        _ => 200,
    }
}

/// Sabotage of test builds: with `TULLE_BREAK=breaker` nothing is ever ejected.
fn is_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "breaker")
}

/// What lasts as long as a connection: its place among the pod's, and among the endpoint's.
pub(super) struct Lasting {
    _held: Held,
    _passage: Passage,
    ends: Option<Ends>,
}

/// Completes when a connection's time is over.
type Ends = Pin<Box<dyn Future<Output = Outcome>>>;

impl Lasting {
    pub(super) fn new(held: Held, passage: Passage, counts: &Rc<Counts>) -> Box<Self> {
        let settings = passage.toward.settings();
        let idle = settings.and_then(|settings| settings.idle_timeout);
        let longest = settings.and_then(|settings| settings.max_connection_duration);
        let counts = counts.clone();
        let ends = (idle.is_some() || longest.is_some()).then(|| Box::pin(over(idle, longest, counts)) as Ends);
        Box::new(Self { _held: held, _passage: passage, ends })
    }
}

/// Completes when the time of a connection is over that lasts so.
pub(super) async fn expired(lasting: &mut Option<Box<Lasting>>) -> Outcome {
    match lasting.as_mut().and_then(|lasting| lasting.ends.as_mut()) {
        Some(ends) => ends.await,
        None => std::future::pending().await,
    }
}

async fn over(idle: Option<Duration>, longest: Option<Duration>, counts: Rc<Counts>) -> Outcome {
    let duration = async {
        match longest {
            Some(longest) => tokio::time::sleep(longest).await,
            None => std::future::pending().await,
        }
        let text =
            format!("it lasted for {longest:?}, the connectionPool.tcp.maxConnectionDuration of its DestinationRule");
        Outcome::new(Code::Expired, text)
    };
    let silence = async {
        let Some(idle) = idle else { return std::future::pending().await };
        let step = (idle / LOOKS).clamp(LOOK.0, LOOK.1);
        let (mut seen, mut since) = (counts.total(), tokio::time::Instant::now());
        loop {
            tokio::time::sleep(step).await;
            if counts.total() != seen {
                (seen, since) = (counts.total(), tokio::time::Instant::now());
            } else if since.elapsed() >= idle {
                let text = format!("no byte for {idle:?}, the connectionPool.tcp.idleTimeout of its DestinationRule");
                return Outcome::new(Code::Expired, text);
            }
        }
    };
    tokio::select! {
        outcome = duration => outcome,
        outcome = silence => outcome,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use http::header::{COOKIE, HeaderValue};

    use super::{cookie, http_of, query};

    #[test]
    fn what_is_hashed_is_found_in_the_request() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, HeaderValue::from_static("a=1; user=x=y"));
        headers.append(COOKIE, HeaderValue::from_static("late=2"));
        assert_eq!(cookie(&headers, "user"), Some("x=y"));
        assert_eq!(cookie(&headers, "late"), Some("2"));
        assert_eq!(cookie(&headers, "use"), None);
        assert_eq!(query("a=1&b=2&b=3", "b"), Some("2"));
        assert_eq!(query("a&b", "b"), None);
    }

    #[test]
    fn failures_of_a_grpc_server_count_and_its_refusals_do_not() {
        let failing: Vec<String> = (0..17).map(|n: u8| n.to_string()).filter(|n| http_of(n) >= 500).collect();
        assert_eq!(failing, ["4", "13", "14", "15"]);
    }
}
