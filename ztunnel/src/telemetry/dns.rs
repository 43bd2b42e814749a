//! Counters of name look-ups, with Istio's names and labels, and where their answers came from.
//!
//! Types that are rare are counted as `other`, so that a client cannot make series by asking for odd ones.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Labels of one pod's look-ups.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DnsLabels {
    /// `A`, `AAAA`, …
    pub request_query_type: &'static str,
    /// `udp` or `tcp`.
    pub request_protocol: &'static str,
    /// The pod's service, `unknown` where it is.
    pub source_canonical_service: Arc<str>,
    /// Its revision.
    pub source_canonical_revision: Arc<str>,
}

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DnsAnswerLabels {
    /// `mesh`, `cache`, `upstream`, `stale`, `refused`, `failed`.
    pub source: &'static str,
}

/// Counters of the DNS proxy. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    /// Questions of pods.
    pub requests: Family<DnsLabels, Counter>,
    /// Questions to name servers.
    pub upstream_requests: Family<DnsLabels, Counter>,
    /// Questions that a name server did not answer.
    pub upstream_failures: Family<DnsLabels, Counter>,
    /// How long name servers took, seconds.
    pub upstream_duration: Family<DnsLabels, Histogram>,
    /// Answers by their source.
    pub answers: Family<DnsAnswerLabels, Counter>,
    /// Questions that were dropped because the pod had too many under way.
    pub shed: Counter,
    /// Bytes of kept answers.
    pub cache_bytes: Gauge,
}

impl DnsMetrics {
    /// Registers everything.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            // Istio's buckets.
            upstream_duration: Family::new_with_constructor(|| Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0])),
            answers: Family::default(),
            shed: Counter::default(),
            cache_bytes: Gauge::default(),
        };
        for (name, help, family) in [
            ("istio_dns_requests", "Name look-ups of pods", &metrics.requests),
            ("istio_dns_upstream_requests", "Name look-ups that went to a name server", &metrics.upstream_requests),
            (
                "istio_dns_upstream_failures",
                "Name look-ups that a name server did not answer",
                &metrics.upstream_failures,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "istio_dns_upstream_request_duration_seconds",
            "How long name servers took",
            metrics.upstream_duration.clone(),
        );
        registry.register("tulle_dns_answers", "Answers by their source", metrics.answers.clone());
        registry.register("tulle_dns_shed", "Name look-ups refused for lack of room", metrics.shed.clone());
        registry.register("tulle_dns_cache_bytes", "Bytes of kept answers", metrics.cache_bytes.clone());
        metrics
    }
}
