//! PeerAuthentication: STRICT as synthetic DENY policies of callers without a proven identity.
//!
//! One policy per PeerAuthentication that decides something, named `tulle_strict_<name>` after it so that a denial
//! leads back to it; no user object can have that name, since Kubernetes names have no underscore. Precedence:
//! workload, namespace, mesh; of several of one rank the oldest. One that cannot be read is STRICT for all it selects,
//! the most that it could have asked for.

use std::collections::BTreeMap;

use crate::model::{Condition, MtlsMode, PeerAuthentication, PeerAuthenticationSpec, Pod, Spec, Target, World};
use crate::resource::Resource;
use crate::translate::Conditions;
use crate::translate::Settings;
use crate::translate::age;
use crate::translate::authorization::{plaintext, selected_denial};

/// One policy with its effective content.
struct Rank<'a> {
    policy: &'a PeerAuthentication,
    target: Target,
    mode: MtlsMode,
    ports: BTreeMap<u16, MtlsMode>,
}

/// All policies by rank, oldest first.
pub(super) struct Plan<'a> {
    mesh: Vec<Rank<'a>>,
    namespaces: BTreeMap<&'a str, Vec<Rank<'a>>>,
    workloads: BTreeMap<&'a str, Vec<Rank<'a>>>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(world: &'a World, settings: &Settings) -> Self {
        let mut plan = Self { mesh: Vec::new(), namespaces: BTreeMap::new(), workloads: BTreeMap::new() };
        let mut policies: Vec<_> = world.peer_authentications.values().collect();
        policies.sort_by_key(|policy| age(&policy.meta));
        for policy in policies {
            let rank = rank(policy);
            let namespace = policy.meta.namespace.as_str();
            match &rank.target {
                Target::Everything if settings.is_root(namespace) => plan.mesh.push(rank),
                Target::Everything => plan.namespaces.entry(namespace).or_default().push(rank),
                _ => plan.workloads.entry(namespace).or_default().push(rank),
            }
        }
        // Ours before Istio's root namespace, whatever their age.
        plan.mesh.sort_by_key(|rank| rank.policy.meta.namespace != settings.root_namespace);
        plan
    }

    /// The synthetic policy that a pod must name.
    pub(super) fn policy_for(&self, pod: &Pod) -> Option<String> {
        let namespace = pod.meta.namespace.as_str();
        let own = self.workloads.get(namespace).and_then(|ranks| {
            ranks.iter().find(|rank| match &rank.target {
                Target::Pods(selector) => selector.matches(&pod.meta.labels),
                _ => false,
            })
        });
        match own {
            Some(rank) if rank.mode != MtlsMode::Unset || !rank.ports.is_empty() => {
                self.rules(rank).map(|_| name(rank))
            }
            _ => self.parent(namespace).map(name),
        }
    }

    /// The namespace's or mesh's policy, if it says STRICT.
    fn parent(&self, namespace: &str) -> Option<&Rank<'a>> {
        let of_namespace = self.namespaces.get(namespace).and_then(|ranks| ranks.first());
        let deciding = of_namespace.filter(|rank| rank.mode != MtlsMode::Unset).or_else(|| self.of_mesh().last());
        deciding.filter(|rank| rank.mode == MtlsMode::Strict)
    }

    /// The oldest of each root namespace, ours first, up to the one that says a mode: one that leaves it open does not
    /// stand before Istio's.
    fn of_mesh(&self) -> impl Iterator<Item = &Rank<'a>> {
        let firsts = self.mesh.chunk_by(|a, b| a.policy.meta.namespace == b.policy.meta.namespace);
        let mut decided = false;
        firsts.filter_map(|of_one| of_one.first()).take_while(move |rank| {
            let open = !decided;
            decided = rank.mode != MtlsMode::Unset;
            open
        })
    }

    /// The rules of a policy's denial; `None`: it denies nothing.
    fn rules(&self, rank: &Rank<'a>) -> Option<Vec<Vec<tulle_proto::security::Match>>> {
        let strict = match rank.mode {
            MtlsMode::Strict => true,
            MtlsMode::Permissive => false,
            // Who has no policy for itself names its parent's, not this one.
            MtlsMode::Unset => rank.target != Target::Everything && self.parent(&rank.policy.meta.namespace).is_some(),
        };
        let of_mode = |wanted: MtlsMode| {
            let ports = rank.ports.iter().filter(move |(_, mode)| **mode == wanted);
            ports.map(|(port, _)| u32::from(*port))
        };
        if strict {
            let exempt = of_mode(MtlsMode::Permissive).map(|port| tulle_proto::security::Match {
                not_destination_ports: vec![port],
                ..tulle_proto::security::Match::default()
            });
            return Some(vec![std::iter::once(plaintext(Vec::new())).chain(exempt).collect()]);
        }
        let rules: Vec<_> = of_mode(MtlsMode::Strict).map(|port| vec![plaintext(vec![port])]).collect();
        (!rules.is_empty()).then_some(rules)
    }

    fn all(&self) -> impl Iterator<Item = &Rank<'a>> {
        let nested = self.namespaces.values().chain(self.workloads.values());
        self.mesh.iter().chain(nested.flatten())
    }

    /// True unless an older policy of the same rank, or of the mesh's own root namespace, stands before it.
    fn decides(&self, rank: &Rank<'a>) -> bool {
        let firsts = self.namespaces.values().filter_map(|ranks| ranks.first());
        rank.target != Target::Everything || self.of_mesh().chain(firsts).any(|first| std::ptr::eq(first, rank))
    }

    pub(super) fn resources(&self) -> Vec<Resource> {
        self.all()
            .filter(|rank| self.decides(rank))
            .filter_map(|rank| {
                let rules = self.rules(rank)?;
                let meta = &rank.policy.meta;
                Some(selected_denial(&meta.namespace, &short_name(rank), rules))
            })
            .collect()
    }

    pub(super) fn conditions(&self, conditions: &mut Conditions) {
        for rank in self.all() {
            let condition = match &rank.policy.spec {
                Spec::Unreadable { reason, .. } => Condition::failing(
                    "Accepted",
                    "Invalid",
                    format!("The spec cannot be read, so STRICT holds for what it selects: {reason}"),
                ),
                Spec::Good(_) if !self.decides(rank) => {
                    let message = "An older one of the same rank decides".into();
                    Condition::failing("Enforced", "Overridden", message)
                }
                Spec::Good(_) => Condition::holding("Enforced", "Enforced", "Enforced".into()),
            };
            conditions.add("PeerAuthentication", &rank.policy.meta, condition);
        }
    }
}

fn rank(policy: &PeerAuthentication) -> Rank<'_> {
    match &policy.spec {
        Spec::Good(PeerAuthenticationSpec { target, mode, ports }) => {
            Rank { policy, target: target.clone(), mode: *mode, ports: ports.clone() }
        }
        Spec::Unreadable { target, .. } => Rank {
            policy,
            target: target.clone().unwrap_or(Target::Everything),
            mode: MtlsMode::Strict,
            ports: BTreeMap::new(),
        },
    }
}

fn short_name(rank: &Rank<'_>) -> String {
    format!("tulle_strict_{}", rank.policy.meta.name)
}

fn name(rank: &Rank<'_>) -> String {
    format!("{}/{}", rank.policy.meta.namespace, short_name(rank))
}
