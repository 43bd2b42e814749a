//! Control's own metrics in the OpenMetrics text format.
//!
//! Values are read where they are counted at the moment of the request; nothing is registered or kept here.

use std::sync::atomic::Ordering;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::admin::State;
use crate::resource::Kind;
use crate::source::{Followed, Standing};

/// The page.
pub(super) fn text(state: &State) -> String {
    let mut registry = Registry::with_prefix("tulle_control");
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let view = std::sync::Arc::clone(&state.view.borrow());
    let published = state.published.borrow().clone();
    let nodes = state.node_states.states();
    let connected = nodes.values().filter(|node| node.connected);
    let behind = connected.clone().filter(|node| node.acked_generation < published.generation);
    let problems = view.loaded.problems.iter().filter(|problem| problem.error);
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    gauge("generation", "Published generation", i64::try_from(published.generation).unwrap_or(i64::MAX));
    gauge("addresses", "Published workloads and services", count(published.set.of(Kind::Address).len()));
    gauge("authorizations", "Published policies", count(published.set.of(Kind::Authorization).len()));
    gauge("source_errors", "Objects and files that cannot be read", count(problems.count()));
    gauge("nodes_connected", "Open xDS streams", count(connected.count()));
    gauge("nodes_behind", "Connected nodes that have not acknowledged the generation", count(behind.count()));
    gauge(
        "nodes_rejecting",
        "Nodes with rejected resources",
        count(nodes.values().filter(|node| !node.nacks.is_empty()).count()),
    );
    gauge(
        "ca_intermediate_expiry_seconds",
        "End of the intermediate certificate, Unix time",
        state.authority.load().not_after(),
    );
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    let streams = &state.node_states;
    counter("xds_streams", "xDS streams opened", streams.opened.load(Ordering::Relaxed));
    counter("xds_responses", "xDS responses sent", streams.responses.load(Ordering::Relaxed));
    counter("xds_rejections", "xDS responses rejected by nodes", streams.rejected.load(Ordering::Relaxed));
    counter("certificates_signed", "Certificates signed", state.counters.signed.load(Ordering::Relaxed));
    counter("certificates_refused", "Certificate requests refused", state.counters.refused.load(Ordering::Relaxed));
    followed(&mut registry, &state.followed.borrow());
    let mut text = String::new();
    // Writing to a string cannot fail; an empty page would show if it did.
    let _ = encode(&mut text, &registry);
    text
}

/// How the API server is followed, by kind. Nothing with files.
fn followed(registry: &mut Registry, kinds: &[Followed]) {
    if kinds.is_empty() {
        return;
    }
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let mut family = |name: &str, help: &str, value: &dyn Fn(&Followed) -> i64| {
        let family = Family::<Vec<(String, String)>, Gauge>::default();
        for kind in kinds {
            family.get_or_create(&vec![("resource".into(), kind.resource.clone())]).set(value(kind));
        }
        registry.register(name, help, family);
    };
    family("source_objects", "Objects known, by kind", &|kind| count(kind.objects as u64));
    family("source_stale", "1 while the API server cannot be asked about the kind", &|kind| {
        i64::from(kind.standing == Standing::Stale)
    });
    family("source_heard_seconds", "When the API server was last heard of the kind, Unix time", &|kind| kind.heard);
    let mut family = |name: &str, help: &str, value: fn(&Followed) -> u64| {
        let family = Family::<Vec<(String, String)>, Counter>::default();
        for kind in kinds {
            family.get_or_create(&vec![("resource".into(), kind.resource.clone())]).inc_by(value(kind));
        }
        registry.register(name, help, family);
    };
    family("source_lists", "Lists read to the end, by kind", |kind| kind.lists);
    family("source_events", "Changes that watches reported, by kind", |kind| kind.events);
    family("source_failures", "Requests about the kind that failed", |kind| kind.failures);
}
