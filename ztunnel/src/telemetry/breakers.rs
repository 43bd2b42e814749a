//! Counters of what traffic policies did: limits that were reached, endpoints that were ejected. Names are the ends of
//! Envoy's (`upstream_…_overflow`, `outlier_detection_…`); what Envoy says by the name of a cluster is a label.
//!
//! Series are per Service with a policy, so there are few.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Labels: which Service, and what.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BreakerLabels {
    /// Host name of the Service.
    pub destination_service: Arc<str>,
    /// Of overflows `cx`, `rq_pending`, `rq`, `rq_retry`; of ejections `consecutive_5xx`, `consecutive_gateway_failure`,
    /// `consecutive_local_origin_failure`, `probe`.
    pub kind: &'static str,
}

/// Labels: which Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DestinationLabels {
    /// Host name of the Service.
    pub destination_service: Arc<str>,
}

/// Counters of traffic policies. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct BreakerMetrics {
    /// Limits that were reached.
    pub overflow: Family<BreakerLabels, Counter>,
    /// Ejections.
    pub ejections: Family<BreakerLabels, Counter>,
    /// Ejections that did not happen because too many endpoints were ejected.
    pub ejections_overflow: Family<BreakerLabels, Counter>,
    /// Endpoints that are ejected. Set when asked for.
    pub active: Family<DestinationLabels, Gauge>,
}

impl BreakerMetrics {
    /// Registers everything.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for (name, help, family) in [
            ("tulle_upstream_overflow", "Limits of a DestinationRule that were reached", &metrics.overflow),
            (
                "tulle_outlier_detection_ejections_enforced",
                "Endpoints ejected by a DestinationRule's outlierDetection",
                &metrics.ejections,
            ),
            (
                "tulle_outlier_detection_ejections_overflow",
                "Endpoints that were not ejected because of maxEjectionPercent",
                &metrics.ejections_overflow,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "tulle_outlier_detection_ejections_active",
            "Endpoints that are ejected now",
            metrics.active.clone(),
        );
        metrics
    }
}
