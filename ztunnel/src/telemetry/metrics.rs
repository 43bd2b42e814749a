//! Counters and gauges with Istio's names, and our own with the prefix `tulle_`.
//!
//! Byte counters are seen from the client on both reporters: received is client to server. Series are per pair of
//! workloads, so their number is bounded by the workloads that really talk to each other on this node.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::outcome::{DryRun, WouldBe};
use crate::telemetry::breakers::BreakerMetrics;
use crate::telemetry::dns::DnsMetrics;
use crate::telemetry::egress::Talks;
use crate::telemetry::http::HttpMetrics;
use crate::telemetry::plaintext::Callers;
use crate::telemetry::services::ServiceTimes;
use crate::telemetry::trace::Spans;

/// Labels of the TCP metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TcpLabels {
    /// `source` or `destination`.
    pub reporter: &'static str,
    /// Owner of the source pod, and so on, each `unknown` where it is.
    pub source_workload: Arc<str>,
    pub source_canonical_service: Arc<str>,
    pub source_canonical_revision: Arc<str>,
    pub source_workload_namespace: Arc<str>,
    /// The identity proven in TLS; never from metadata.
    pub source_principal: Arc<str>,
    pub source_app: Arc<str>,
    pub source_version: Arc<str>,
    pub source_cluster: Arc<str>,
    pub destination_service: Arc<str>,
    pub destination_service_namespace: Arc<str>,
    pub destination_service_name: Arc<str>,
    pub destination_workload: Arc<str>,
    pub destination_canonical_service: Arc<str>,
    pub destination_canonical_revision: Arc<str>,
    pub destination_workload_namespace: Arc<str>,
    pub destination_principal: Arc<str>,
    pub destination_app: Arc<str>,
    pub destination_version: Arc<str>,
    pub destination_cluster: Arc<str>,
    pub request_protocol: &'static str,
    pub response_flags: &'static str,
    pub connection_security_policy: &'static str,
}

/// Labels of denials.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DenialLabels {
    /// `source` or `destination`.
    pub reporter: &'static str,
    /// [`crate::outcome::Code`].
    pub code: &'static str,
    /// `<namespace>/<name>`, or empty.
    pub policy: Arc<str>,
    /// Index of the rule, or empty.
    pub rule: String,
}

/// Labels of attempts to leave the cluster. Names are in the log and in `tulle egress`: they could make any number of series.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EgressLabels {
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// `allowed`, `denied` or `audited`.
    pub verdict: &'static str,
}

/// Labels of what policies would have done that are only tried (`istio.io/dry-run`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DryRunLabels {
    /// `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// [`crate::outcome::WouldBe`].
    pub would_be: &'static str,
    /// Index of the rule that matched, or empty.
    pub rule: String,
}

impl DryRunLabels {
    /// Of one policy's say.
    pub fn of(dry: &DryRun) -> Self {
        let rule = dry.rule.map_or_else(String::new, |rule| rule.to_string());
        Self { policy: dry.policy.clone(), would_be: dry.would_be.word(), rule }
    }
}

/// Label of pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CaptureLabels {
    /// `Captured`, `Pending`, `Failed` or `Uncaptured`.
    pub capture: &'static str,
}

/// Labels of what AUDIT policies recorded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AuditLabels {
    /// `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// Index of the rule that matched.
    pub rule: String,
}

/// Why an endpoint was left for another one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ElsewhereLabels {
    /// [`crate::outcome::Code`] of the attempt.
    pub code: &'static str,
}

/// Labels of build information.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    component: &'static str,
    tag: &'static str,
}

/// All metrics of the proxy. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Connections that began.
    pub opened: Family<TcpLabels, Counter>,
    /// Connections that ended.
    pub closed: Family<TcpLabels, Counter>,
    /// Connections that ended badly.
    pub failed: Family<TcpLabels, Counter>,
    /// Bytes from client to server.
    pub received: Family<TcpLabels, Counter>,
    /// Bytes from server to client.
    pub sent: Family<TcpLabels, Counter>,
    /// Refusals by policy.
    pub denials: Family<DenialLabels, Counter>,
    /// What policies would have done that are only tried.
    pub dry_run: Family<DryRunLabels, Counter>,
    /// AUDIT.
    pub audit: Family<AuditLabels, Counter>,
    /// Live inbound connections.
    pub inbound: Gauge,
    /// Live outbound connections.
    pub outbound: Gauge,
    /// Connections refused before they had a record: budgets, full queues.
    pub shed: Counter,
    /// Inbound TLS handshakes that failed.
    pub handshakes_failed: Counter,
    /// Endpoints that were left for another one.
    pub elsewhere: Family<ElsewhereLabels, Counter>,
    /// Live inbound tunnels.
    pub tunnels: Gauge,
    /// Pods of the node by the state of their capture. Set when asked for.
    pub pods: Family<CaptureLabels, Gauge>,
    /// Bytes that flows buffer or have promised to peers to buffer. Set when asked for.
    pub buffered: Gauge,
    /// Pods whose buffers are more than three quarters full. Set when asked for.
    pub pressed: Gauge,
    /// Access log lines that were dropped.
    pub log_dropped: Gauge<u64, AtomicU64>,
    /// Name look-ups.
    pub dns: DnsMetrics,
    /// Who talked to what outside the cluster.
    pub talks: Talks,
    /// Who reaches pods without an identity.
    pub callers: Callers,
    /// Attempts to leave, by what was decided.
    pub egress: Family<EgressLabels, Counter>,
    /// Requests.
    pub http: HttpMetrics,
    /// How long requests to each service take.
    pub services: ServiceTimes,
    /// Spans of sampled requests.
    pub spans: Spans,
    /// Traffic policies.
    pub breakers: BreakerMetrics,
}

impl Metrics {
    /// Counts what a policy says that changes no verdict.
    pub fn without_effect(&self, said: &DryRun) {
        match said.would_be {
            WouldBe::Audited => {
                let rule = said.rule.map_or_else(String::new, |rule| rule.to_string());
                self.audit.get_or_create(&AuditLabels { policy: said.policy.clone(), rule }).inc();
            }
            WouldBe::Denied | WouldBe::Allowed | WouldBe::NotAllowed => {
                self.dry_run.get_or_create(&DryRunLabels::of(said)).inc();
            }
        }
    }

    /// Registers everything.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            received: Family::default(),
            sent: Family::default(),
            denials: Family::default(),
            dry_run: Family::default(),
            audit: Family::default(),
            inbound: Gauge::default(),
            outbound: Gauge::default(),
            shed: Counter::default(),
            handshakes_failed: Counter::default(),
            elsewhere: Family::default(),
            tunnels: Gauge::default(),
            buffered: Gauge::default(),
            pods: Family::default(),
            pressed: Gauge::default(),
            log_dropped: Gauge::default(),
            dns: DnsMetrics::new(registry),
            talks: Talks::default(),
            callers: Callers::default(),
            egress: Family::default(),
            http: HttpMetrics::new(registry),
            services: ServiceTimes::new(Instant::now()),
            spans: Spans::new(registry),
            breakers: BreakerMetrics::new(registry),
        };
        let build = Family::<BuildLabels, Gauge>::default();
        build.get_or_create(&BuildLabels { component: "ztunnel", tag: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("istio_build", "Build of the component", build);
        let tcp = [
            ("istio_tcp_connections_opened", "Connections opened", &metrics.opened),
            ("istio_tcp_connections_closed", "Connections closed", &metrics.closed),
            ("istio_tcp_connections_failed", "Connections that failed", &metrics.failed),
            ("istio_tcp_received_bytes", "Bytes from client to server", &metrics.received),
            ("istio_tcp_sent_bytes", "Bytes from server to client", &metrics.sent),
        ];
        for (name, help, family) in tcp {
            registry.register(name, help, family.clone());
        }
        registry.register("tulle_denials", "Connections refused by a policy", metrics.denials.clone());
        registry.register(
            "tulle_dry_run",
            "Connections that a policy of istio.io/dry-run would have decided",
            metrics.dry_run.clone(),
        );
        registry.register(
            "tulle_audit",
            "Connections and requests that a rule of an AUDIT policy matched",
            metrics.audit.clone(),
        );
        registry.register("tulle_egress", "Attempts to leave the cluster", metrics.egress.clone());
        registry.register("tulle_connections_shed", "Connections refused for lack of room", metrics.shed.clone());
        registry.register("tulle_inbound_connections", "Live inbound connections", metrics.inbound.clone());
        registry.register("tulle_outbound_connections", "Live outbound connections", metrics.outbound.clone());
        registry.register("tulle_inbound_tunnels", "Live inbound tunnels", metrics.tunnels.clone());
        registry.register(
            "tulle_handshakes_failed",
            "Inbound TLS handshakes that failed",
            metrics.handshakes_failed.clone(),
        );
        registry.register(
            "tulle_endpoint_retries",
            "Endpoints of a service that could not be reached and were left for another one",
            metrics.elsewhere.clone(),
        );
        registry.register("tulle_pods", "Pods of the node by the state of their capture", metrics.pods.clone());
        registry.register(
            "tulle_buffered_bytes",
            "Bytes buffered for connections, windows that peers were given included",
            metrics.buffered.clone(),
        );
        registry.register(
            "tulle_buffer_pressed_pods",
            "Pods that use more than three quarters of TULLE_POD_MAX_BUFFER",
            metrics.pressed.clone(),
        );
        registry.register("tulle_access_log_dropped", "Access log lines dropped", metrics.log_dropped.clone());
        metrics
    }
}
