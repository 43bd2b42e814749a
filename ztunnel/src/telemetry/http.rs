//! The record of one request: opened when its head has come, finished when its answer is over, once.
//!
//! As with connections, one log line and one set of counters come from it. A record that is dropped unfinished counts as
//! one whose client went away. Names and labels are Istio's; the path is in the log only, because as a label it could make
//! any number of series.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Request, Version};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tulle_proto::otlp;

use crate::base::unix_now_us;
use crate::outcome::{Code, DryRun};
use crate::state::Service;
use crate::telemetry::conn::{Direction, Peer, labels};
use crate::telemetry::metrics::{DenialLabels, Metrics, TcpLabels};
use crate::telemetry::services::is_failure;
use crate::telemetry::trace::{Open, Span, attribute, number};

/// Labels of the HTTP metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HttpLabels {
    /// Those of connections.
    #[prometheus(flatten)]
    pub connection: TcpLabels,
    /// Status. 0: the client went away before it had one.
    pub response_code: u16,
    /// Of gRPC, else empty.
    pub grpc_response_status: Arc<str>,
}

/// Upper ends of the buckets of durations, milliseconds: Istio's.
const DURATIONS: [f64; 19] =
    [0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 1.8e6, 3.6e6];
/// Upper ends of the buckets of sizes, bytes: Istio's.
const SIZES: [f64; 10] = [1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11];

/// Counters of requests.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    requests: Family<HttpLabels, Counter>,
    durations: Family<HttpLabels, Histogram>,
    request_bytes: Family<HttpLabels, Histogram>,
    response_bytes: Family<HttpLabels, Histogram>,
}

impl HttpMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let sizes = || Histogram::new(SIZES);
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(DURATIONS)),
            request_bytes: Family::new_with_constructor(sizes),
            response_bytes: Family::new_with_constructor(sizes),
        };
        registry.register("istio_requests", "Requests", metrics.requests.clone());
        registry.register(
            "istio_request_duration_milliseconds",
            "From a request's head to the end of its answer",
            metrics.durations.clone(),
        );
        registry.register("istio_request_bytes", "Bytes of requests' bodies", metrics.request_bytes.clone());
        registry.register("istio_response_bytes", "Bytes of answers' bodies", metrics.response_bytes.clone());
        metrics
    }
}

/// See the module's header.
pub struct HttpRecord {
    metrics: Arc<Metrics>,
    direction: Direction,
    started: Instant,
    /// The client.
    pub source: Peer,
    /// The server.
    pub destination: Peer,
    /// The service that the client addressed.
    pub service: Option<Arc<Service>>,
    /// Who got it: the backend's host name and port, where a route chose it.
    pub backend: Option<Box<str>>,
    /// Route and rule.
    pub route: Option<Box<str>>,
    /// Method.
    pub method: Box<str>,
    /// Path with query.
    pub path: Box<str>,
    /// Host or :authority.
    pub authority: Box<str>,
    /// `HTTP/1.1` and so on.
    pub protocol: &'static str,
    /// The client speaks gRPC.
    pub grpc: bool,
    /// Value of `x-request-id`.
    pub request_id: Option<Box<str>>,
    /// Trace id of `traceparent`.
    pub trace: Option<Box<str>>,
    /// Attempts made.
    pub attempts: u32,
    /// Status of the answer.
    pub status: u16,
    /// `response_flags`, in Envoy's words.
    pub flag: &'static str,
    /// What went wrong, for the log.
    pub error: Option<Box<str>>,
    /// A policy refused it, with this code.
    pub denied: Option<Code>,
    /// `<namespace>/<name>` of the policy that decided.
    pub policy: Option<Arc<str>>,
    /// Index of its rule.
    pub rule: Option<usize>,
    /// What policies would have said that are only tried.
    pub dry_run: Vec<DryRun>,
    /// Bytes of the request's body.
    pub request_bytes: Rc<std::cell::Cell<u64>>,
    /// Bytes of the answer's body.
    pub response_bytes: u64,
    /// `grpc-status`.
    pub grpc_status: Option<String>,
    /// Before the answer began, milliseconds.
    pub first_byte: Option<u128>,
    /// Its span, and when that began, microseconds since the Unix epoch.
    span: Option<(Open, u64)>,
    finished: bool,
}

impl HttpRecord {
    /// Opens a record for a request.
    pub fn new(metrics: Arc<Metrics>, direction: Direction, source: Peer, destination: Peer) -> Self {
        Self {
            metrics,
            direction,
            started: Instant::now(),
            source,
            destination,
            service: None,
            backend: None,
            route: None,
            method: "".into(),
            path: "".into(),
            authority: "".into(),
            protocol: "HTTP/1.1",
            grpc: false,
            request_id: None,
            trace: None,
            attempts: 0,
            status: 0,
            flag: "-",
            error: None,
            denied: None,
            policy: None,
            rule: None,
            dry_run: Vec::new(),
            request_bytes: Rc::default(),
            response_bytes: 0,
            grpc_status: None,
            first_byte: None,
            span: None,
            finished: false,
        }
    }

    /// What the head of the request says.
    pub fn describe<B>(&mut self, request: &Request<B>) {
        let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        self.method = request.method().as_str().into();
        self.path = request.uri().path_and_query().map_or("", PathAndQuery::as_str).into();
        self.protocol = match request.version() {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        };
        self.request_id = text("x-request-id").map(Into::into);
        // version-trace-parent-flags (W3C Trace Context §3.2).
        let trace = text("traceparent").and_then(|value| value.split('-').nth(1));
        self.trace = trace.filter(|trace| trace.len() == 32).map(Into::into);
    }

    /// Begins its span, if it is sampled: what the headers say goes on to the next hop.
    pub fn trace(&mut self, headers: &mut HeaderMap) {
        self.span = self.metrics.spans.begin(headers).map(|open| (open, unix_now_us()));
        if let Some((open, _)) = &self.span {
            self.trace = Some(open.context.trace_id().into());
        }
    }

    /// The head of the answer is there.
    pub fn answered(&mut self, status: u16) {
        self.status = status;
        self.first_byte = Some(self.started.elapsed().as_millis());
    }

    /// The one ending.
    pub fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        if self.status == 0 && self.flag == "-" {
            self.flag = "DC";
        }
        let labels = HttpLabels {
            connection: TcpLabels {
                request_protocol: if self.grpc { "grpc" } else { "http" },
                response_flags: self.flag,
                ..labels(self.direction, &self.source, &self.destination, self.service.as_deref())
            },
            response_code: self.status,
            grpc_response_status: Arc::from(self.grpc_status.as_deref().unwrap_or_default()),
        };
        let metrics = &self.metrics.http;
        metrics.requests.get_or_create(&labels).inc();
        metrics.durations.get_or_create(&labels).observe(self.started.elapsed().as_secs_f64() * 1e3);
        if let Some(service) = &self.service {
            let failed = is_failure(self.status, self.grpc_status.as_deref(), self.flag);
            let (time, now) = (self.started.elapsed(), Instant::now());
            self.metrics.services.record(service, self.direction, time, failed, now);
        }
        metrics.request_bytes.get_or_create(&labels).observe(self.request_bytes.get() as f64);
        metrics.response_bytes.get_or_create(&labels).observe(self.response_bytes as f64);
        if let Some(code) = self.denied {
            let rule = self.rule.map_or_else(String::new, |rule| rule.to_string());
            let policy = self.policy.clone().unwrap_or_default();
            let labels = DenialLabels { reporter: self.direction.reporter(), code: code.name(), policy, rule };
            self.metrics.denials.get_or_create(&labels).inc();
        }
        for said in &self.dry_run {
            self.metrics.without_effect(said);
        }
        if let Some((open, began_us)) = self.span.take() {
            self.metrics.spans.put(self.span(open, began_us));
        }
        self.log();
    }

    /// What a collector is told: OpenTelemetry's names where it has one.
    fn span(&self, open: Open, began_us: u64) -> Span {
        let (own, kind) = match self.direction {
            Direction::Inbound => (&self.destination, 2),
            Direction::Outbound => (&self.source, 3),
        };
        let failed = is_failure(self.status, self.grpc_status.as_deref(), self.flag);
        let text = |key: &str, value: Option<&str>| attribute(key, value.unwrap_or_default());
        let path = self.path.split('?').next();
        let attributes = [
            text("http.request.method", Some(&self.method)),
            text("url.path", path),
            text("server.address", Some(&self.authority)),
            number("http.response.status_code", self.status.into()),
            text("rpc.grpc.status_code", self.grpc_status.as_deref()),
            text("response_flags", Some(self.flag).filter(|flag| *flag != "-")),
            text("istio.source_workload", self.source.workload.as_deref().map(|w| &*w.workload_name)),
            text("istio.source_namespace", self.source.workload.as_deref().map(|w| &*w.namespace)),
            text("istio.destination_workload", self.destination.workload.as_deref().map(|w| &*w.workload_name)),
            text("istio.destination_namespace", self.destination.workload.as_deref().map(|w| &*w.namespace)),
            text("tulle.service", self.service.as_deref().map(|service| &*service.hostname)),
            text("tulle.route", self.route.as_deref()),
            text("tulle.policy", self.policy.as_deref()),
            text("tulle.code", self.denied.map(Code::name)),
        ];
        let took = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let began = began_us.saturating_mul(1000);
        let span = otlp::Span {
            trace_id: open.context.trace.to_vec().into(),
            span_id: open.context.span.to_vec().into(),
            trace_state: open.state,
            parent_span_id: if open.parent == [0; 8] { Bytes::new() } else { open.parent.to_vec().into() },
            // What there are few of: a path would make each request a kind of its own.
            name: self.method.to_string(),
            kind,
            start_time_unix_nano: began,
            end_time_unix_nano: began.saturating_add(took),
            attributes: attributes.into_iter().flatten().collect(),
            status: Some(otlp::Status { message: String::new(), code: if failed { 2 } else { 0 } }),
        };
        let service = own.workload.as_deref().map(|w| {
            let names = [&w.canonical_name, &w.workload_name, &w.name];
            let name = names.into_iter().find(|name| !name.is_empty()).map(|name| &**name).unwrap_or_default();
            format!("{name}.{}", w.namespace)
        });
        Span { service: service.unwrap_or_else(|| "unknown".to_owned()).into(), span }
    }

    fn log(&self) {
        let (source, destination) = (&self.source, &self.destination);
        let (audited, tried) = DryRun::texts(self.dry_run.iter());
        let duration = format!("{}ms", self.started.elapsed().as_millis());
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "access",
                    {
                    src.addr = source.addr.map(tracing::field::display),
                    src.workload = source.workload.as_deref().map(|w| &*w.name),
                    src.namespace = source.workload.as_deref().map(|w| &*w.namespace),
                    src.identity = source.identity.as_ref().map(tracing::field::display),
                    dst.addr = destination.addr.map(tracing::field::display),
                    dst.service = self.service.as_deref().map(|s| &*s.hostname),
                    dst.workload = destination.workload.as_deref().map(|w| &*w.name),
                    dst.namespace = destination.workload.as_deref().map(|w| &*w.namespace),
                    dst.identity = destination.identity.as_ref().map(tracing::field::display),
                    direction = self.direction.word(),
                    method = &*self.method,
                    path = &*self.path,
                    authority = &*self.authority,
                    protocol = self.protocol,
                    status = self.status,
                    grpc_status = self.grpc_status.as_deref(),
                    flags = self.flag,
                    bytes_sent = self.request_bytes.get(),
                    bytes_recv = self.response_bytes,
                    duration,
                    first_byte = self.first_byte.map(|ms| format!("{ms}ms")),
                    route = self.route.as_deref(),
                    backend = self.backend.as_deref(),
                    attempts = (self.attempts > 1).then_some(self.attempts),
                    request_id = self.request_id.as_deref(),
                    trace = self.trace.as_deref(),
                    policy = self.policy.as_deref(),
                    rule = self.rule,
                    code = self.denied.map(Code::name),
                    audit = (!audited.is_empty()).then(|| audited.join(", ")),
                    dry_run = (!tried.is_empty()).then(|| tried.join(", ")),
                    error = self.error.as_deref()
                    },
                    "request complete"
                )
            };
        }
        if self.error.is_none() && self.policy.is_none() { line!(info) } else { line!(warn) }
    }
}

impl Drop for HttpRecord {
    fn drop(&mut self) {
        self.end();
    }
}
