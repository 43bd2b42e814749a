//! NetworkPolicies for the network plugins of others: what they must let through so that the mesh works behind policies.
//!
//! A plugin that enforces NetworkPolicies sees tunnels to port 15008 and probes from the probe address, where the policies
//! speak of the application's ports. So each selector that isolates pods gets one more policy, which adds just that to
//! what its pods accept and reach; the policies themselves are evaluated by the nodes, on what is in the tunnel. Why not one
//! for all pods of the namespace: a policy isolates what it selects, so it would cut off pods that no policy selects. For the
//! same reason a namespace without policies gets none. Reaching is limited to pods, so that nobody gets out by that port.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use sha2::Digest;
use sha2::Sha256;
use tulle_proto::names;

use crate::model::{Key, NetworkPolicy, Selector, World, in_namespace};
use crate::translate::Settings;
use crate::translate::enrol;

/// One policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beside {
    /// Whom it selects: as the policies that isolate them do.
    pub pods: Selector,
    /// Adds to what they accept.
    pub ingress: bool,
    /// Adds to what they reach.
    pub egress: bool,
}

/// All that there must be, by namespace and name.
pub fn beside(world: &World, settings: &Settings) -> BTreeMap<Key, Beside> {
    let mut all = BTreeMap::new();
    let namespaces: BTreeSet<&str> =
        world.network_policies.values().map(|policy| policy.meta.namespace.as_str()).collect();
    for namespace in namespaces.into_iter().filter(|namespace| takes_part(world, namespace, settings)) {
        let policies: Vec<_> = in_namespace(&world.network_policies, namespace).collect();
        // Of one that cannot be read the API server knows what it selects; nothing narrower is sure to be enough.
        let selectors = |isolates: fn(&NetworkPolicy) -> bool| {
            let found = policies.iter().filter(|policy| isolates(policy));
            let found: BTreeSet<Selector> = found.map(|policy| policy.pods.clone().unwrap_or_default()).collect();
            // All pods are isolated then: one for all of them is enough.
            if found.contains(&Selector::default()) { BTreeSet::from([Selector::default()]) } else { found }
        };
        let (ingress, egress) =
            (selectors(|policy| policy.ingress.is_some()), selectors(|policy| policy.egress.is_some()));
        for pods in ingress.union(&egress) {
            let one = Beside { pods: pods.clone(), ingress: ingress.contains(pods), egress: egress.contains(pods) };
            all.insert((namespace.to_owned(), name(pods)), one);
        }
    }
    all
}

/// Whether pods of it are to be captured, or still are.
fn takes_part(world: &World, namespace: &str, settings: &Settings) -> bool {
    enrol::namespace_enrolled(world, namespace, settings)
        || in_namespace(&world.pods, namespace)
            .any(|pod| enrol::enrolled(pod, world, settings) || enrol::says_captured(pod))
}

/// That of all pods is short; the others have a hash of what they select after it.
fn name(pods: &Selector) -> String {
    if pods.is_empty() {
        return names::BESIDE.to_owned();
    }
    let hash = Sha256::digest(format!("{pods:?}"));
    let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{hash}", names::BESIDE)
}
