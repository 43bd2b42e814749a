//! What is wanted of a pod: whether it is captured, and what its rules say, by the list of pods and by control.
//!
//! Pure but for one thing that is kept: filters of UDP and SCTP are made of all workloads, so they are made again at most
//! every [`PACE`], for all pods of the node together, and what was made last holds in between.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tulle_certs::SpiffeId;

use crate::capture::pods::Pod;
use crate::policy::datagrams::{self, Filter, Members};
use crate::state::{EgressMode, Protocol, Snapshot, Workload};

/// A walk over 10,000 workloads takes some milliseconds, and each change of a filter an `nft`.
const PACE: Duration = Duration::from_millis(200);

/// What is wanted of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The list or control has said whether to capture it.
    pub known: bool,
    /// It is to be captured.
    pub capture: bool,
    /// Connections from before capture must end.
    pub reset: bool,
    /// Nothing but TCP and names may leave. `None`: control has not said.
    pub tcp_only: Option<bool>,
    /// What NetworkPolicies leave of UDP and SCTP; within, `None`: everything. `None`: control has not said.
    pub datagrams: Option<Option<Arc<Filter>>>,
}

/// Filters by pod uid, as last made.
#[derive(Debug, Default)]
pub struct Filters {
    made: HashMap<String, Option<Arc<Filter>>>,
    /// Generation and time of the snapshot that they were made of.
    at: Option<(u64, Instant)>,
}

impl Filters {
    /// Makes the filters of all `pods` that control has described, unless that was done a moment ago.
    pub fn refresh(&mut self, snapshot: &Snapshot, pods: &[(&Pod, Option<Arc<Workload>>)], now: Instant) {
        let generation = snapshot.generation();
        let has_all = pods.iter().all(|(pod, workload)| workload.is_none() || self.made.contains_key(&pod.uid));
        match self.at {
            Some((made_of, at)) if has_all && (made_of == generation || now < at + PACE) => return,
            _ => {}
        }
        let described = || pods.iter().filter_map(|(pod, workload)| Some((*pod, workload.as_ref()?)));
        let isolated =
            described().map(|(_, workload)| workload).filter(|workload| !workload.network_policies.is_empty());
        let members = Members::new(snapshot, isolated);
        let mut before = std::mem::take(&mut self.made);
        for (pod, workload) in described() {
            let filter = datagrams::compile(snapshot, workload, &members).map(|filter| {
                // The same value as before is the same allocation, which makes comparing cheap.
                let old = before.remove(&pod.uid).flatten();
                old.filter(|old| **old == filter).unwrap_or_else(|| Arc::new(filter))
            });
            if let Some(filter) = filter.as_ref().filter(|filter| filter.cut > 0) {
                let pod = format!("{}/{}", pod.namespace, pod.name);
                tracing::warn!(%pod, left_out = filter.cut, "NetworkPolicies name more addresses than fit; the rest is denied");
            }
            self.made.insert(pod.uid.clone(), filter);
        }
        self.at = Some((generation, now));
    }

    /// What was made for a pod.
    fn of(&self, uid: &str) -> Option<Option<Arc<Filter>>> {
        self.made.get(uid).cloned()
    }
}

/// What is wanted of `pod`, which control describes as `workload`. `reset`: old connections always end.
pub fn wanted(pod: &Pod, workload: Option<&Workload>, snapshot: &Snapshot, filters: &Filters, reset: bool) -> Wanted {
    let hbone = workload.is_some_and(|workload| workload.protocol == Protocol::Hbone);
    let deny = workload.map(|workload| workload.egress == EgressMode::Deny);
    let selected = workload.is_some_and(|workload| {
        !workload.network_policies.is_empty() || snapshot.policies_for(workload).next().is_some()
    });
    Wanted {
        known: pod.enrolled.is_some() || workload.is_some(),
        capture: pod.enrolled.unwrap_or(hbone),
        reset: reset || deny == Some(true) || selected,
        // A pod that begins runs before control has heard of its address. Until control has said all, the fence would be shut.
        tcp_only: deny.or_else(|| (pod.closed && snapshot.synced()).then_some(true)),
        datagrams: workload.and_then(|_| filters.of(&pod.uid)),
    }
}

/// The identity of `pod`.
pub fn identity(pod: &Pod, workload: Option<&Workload>, trust_domain: &str) -> Option<SpiffeId> {
    match workload {
        Some(workload) => Some(workload.identity.clone()),
        None => SpiffeId::new(trust_domain, &pod.namespace, &pod.service_account).ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{Filters, wanted};
    use crate::capture::pods::Pod;
    use crate::state::{EgressMode, fixtures, store};

    fn pod(closed: bool) -> Pod {
        Pod {
            uid: "u".into(),
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            netns: PathBuf::new(),
            ips: vec!["10.0.0.2".parse().unwrap()],
            enrolled: Some(true),
            probe_ports: Vec::new(),
            resolv_conf: None,
            handle: None,
            by_agent: false,
            lost: None,
            closed,
        }
    }

    #[test]
    fn a_closed_namespace_s_label_holds_until_control_has_said() {
        let known = fixtures::snapshot([]);
        let nothing = store().1.load();
        let mut described = fixtures::workload("shop", "web", "10.0.0.2");
        for (snapshot, closed, control, tcp_only) in [
            (&known, true, None, Some(true)),
            (&known, false, None, None),
            (&nothing, true, None, None),
            (&known, true, Some(EgressMode::Allow), Some(false)),
            (&known, false, Some(EgressMode::Deny), Some(true)),
        ] {
            described.egress = control.unwrap_or(EgressMode::Allow);
            let workload = control.map(|_| &described);
            let wanted = wanted(&pod(closed), workload, snapshot, &Filters::default(), false);
            assert_eq!(wanted.tcp_only, tcp_only, "{closed} {control:?}");
        }
    }
}
