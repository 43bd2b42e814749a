//! NetworkPolicy, which is not enforced yet and therefore isolates: its pods accept nothing through the mesh.
//!
//! Leaving it out would let in what it was written to keep out. Only ingress can be closed here; a policy that names
//! Egress says so in its condition. One that allows all ingress anyway closes nothing.

use crate::model::{Condition, NetworkPolicy, Pod};
use crate::resource::Resource;
use crate::translate::Selecting;
use crate::translate::denial;

pub(super) fn translate(policy: &NetworkPolicy) -> (Option<Resource>, Option<Selecting<'_>>, Vec<Condition>) {
    let meta = &policy.meta;
    let mut conditions = Vec::new();
    if policy.egress {
        let message = "Egress of NetworkPolicy is not enforced by the mesh yet; the cluster's network must do it";
        conditions.push(Condition::failing("EgressEnforced", "NotEnforcedYet", message.into()));
    }
    if !policy.ingress {
        return (None, None, conditions);
    }
    if policy.allows_all_ingress {
        let message = "It allows all ingress".to_owned();
        conditions.push(Condition::holding("Enforced", "Enforced", message));
        return (None, None, conditions);
    }
    let message = "NetworkPolicy is not evaluated by the mesh yet, so enrolled pods that it selects accept nothing; \
                   use an AuthorizationPolicy instead";
    conditions.push(Condition::failing("Enforced", "NotEnforcedYet", message.into()));
    let name = format!("tulle_network_{}", meta.name);
    let scope = tulle_proto::security::Scope::WorkloadSelector;
    let resource = denial(&meta.namespace, &name, scope);
    let selecting = Selecting {
        name: format!("{}/{name}", meta.namespace),
        applies: Box::new(move |pod: &Pod| {
            let selected = |labels| policy.pods.as_ref().is_none_or(|pods| pods.matches(labels));
            pod.meta.namespace == meta.namespace && selected(&pod.meta.labels)
        }),
    };
    (Some(resource), Some(selecting), conditions)
}
