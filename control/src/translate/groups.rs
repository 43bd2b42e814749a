//! Groups of pods, by which a NetworkPolicy names its peers without any label reaching a node.
//!
//! A group is what a selector selects, or the pods that give a port name one number. Its id is a hash of that definition,
//! so it is the same on every replica and after every restart, and an edit of a policy that leaves a selector alone
//! leaves all pods alone. Labels that no selector looks at are ignored, and pods that look the same to all selectors are
//! judged once: the cost is that of the pods plus the selectors times the few kinds of pods there are.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use sha2::Digest;
use sha2::Sha256;

use crate::model::{NetworkPeer, NetworkPolicy, Operator, Pod, PortMatch, Selector, Transport, World};
use crate::translate::index::Index;

/// The label that the API server gives to every namespace.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What defines a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Group {
    /// Pods by label, of one namespace.
    InNamespace(String, Selector),
    /// Pods by label, of namespaces by label.
    Across(Selector, Selector),
    /// Pods that have a container port of this protocol and name with this number.
    Port(Transport, String, u16),
}

/// Most judgements that are remembered: when labels that selectors look at are new in each pod, none is of use twice.
const JUDGED: usize = 10_000;

/// Id of every group that a policy names, and who is in them.
#[derive(Default)]
pub(super) struct Groups {
    ids: BTreeMap<Group, u64>,
    /// Numbers that pods give to the port names that policies use.
    numbers: BTreeMap<(Transport, String), BTreeSet<u16>>,
    policies: Vec<Arc<NetworkPolicy>>,
    /// Label keys that any selector looks at.
    keys: Vec<String>,
    judged: BTreeMap<(String, Vec<Option<String>>), Membership>,
}

/// What a pod must be told about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Membership {
    /// Its groups, in order.
    pub(super) groups: Vec<u64>,
    /// Indices of the policies that isolate it, in the order of their names.
    pub(super) policies: Vec<usize>,
}

impl Groups {
    pub(super) fn new(world: &World, index: &Index) -> Self {
        let policies: Vec<Arc<NetworkPolicy>> = world.network_policies.values().cloned().collect();
        let numbers: BTreeMap<_, _> =
            port_names(&policies).into_iter().map(|name| (name.clone(), index.numbers(&name))).collect();
        let mut groups: BTreeSet<Group> = policies.iter().flat_map(|policy| peers(policy)).collect();
        for ((protocol, name), of_name) in &numbers {
            groups.extend(of_name.iter().map(|number| Group::Port(*protocol, name.clone(), *number)));
        }
        let selectors = groups.iter().flat_map(|group| match group {
            Group::InNamespace(_, pods) | Group::Across(_, pods) => Some(pods),
            Group::Port(..) => None,
        });
        let keys: BTreeSet<String> =
            selectors.chain(policies.iter().filter_map(|policy| policy.pods.as_ref())).flat_map(keys_of).collect();
        Self { ids: ids(groups, hash), numbers, policies, keys: keys.into_iter().collect(), judged: BTreeMap::new() }
    }

    /// Whether pods still give the same numbers to the port names that policies use.
    pub(super) fn has_numbers_of(&self, index: &Index) -> bool {
        self.numbers.iter().all(|(name, numbers)| index.numbers(name) == *numbers)
    }

    /// To be called when a namespace has other labels.
    pub(super) fn forget_judgements(&mut self) {
        self.judged.clear();
    }

    /// Where pods may be whose groups are not those that `old` said; `None`: anywhere.
    pub(super) fn differ_in<'s>(&'s self, old: &'s Self) -> Option<BTreeSet<&'s str>> {
        let missing = |here: &'s Self, there: &'s Self| {
            here.ids.iter().filter(|(group, id)| there.ids.get(*group) != Some(*id)).map(|(group, _)| match group {
                Group::InNamespace(namespace, _) => Some(namespace.as_str()),
                Group::Across(..) | Group::Port(..) => None,
            })
        };
        missing(self, old).chain(missing(old, self)).collect()
    }

    /// The policy of an index of [`Membership`].
    pub(super) fn policy(&self, index: usize) -> Option<&NetworkPolicy> {
        self.policies.get(index).map(|policy| &**policy)
    }

    /// Id of a peer's group.
    pub(super) fn id(&self, policy: &NetworkPolicy, peer: &NetworkPeer) -> Option<u64> {
        self.ids.get(&group(policy, peer)?).copied()
    }

    /// The numbers that a port name stands for, each with the group of pods for which it does.
    pub(super) fn named_port(&self, protocol: Transport, name: &str) -> Vec<(u16, u64)> {
        let numbers = self.numbers.get(&(protocol, name.to_owned())).into_iter().flatten();
        let of = |number: u16| self.ids.get(&Group::Port(protocol, name.to_owned(), number)).copied();
        numbers.filter_map(|number| Some((*number, of(*number)?))).collect()
    }

    /// What `pod` belongs to, and what isolates it.
    pub(super) fn of_pod(&mut self, pod: &Pod, world: &World) -> Membership {
        if self.policies.is_empty() || !counts(pod) {
            return Membership::default();
        }
        let namespace = pod.meta.namespace.as_str();
        let looks = self.keys.iter().map(|key| pod.meta.labels.get(key).cloned()).collect();
        let key = (namespace.to_owned(), looks);
        let mut found = match self.judged.get(&key) {
            Some(found) => found.clone(),
            None => {
                let found = self.judge(namespace, &pod.meta.labels, world);
                if self.judged.len() >= JUDGED {
                    self.judged.clear();
                }
                self.judged.insert(key, found.clone());
                found
            }
        };
        for port in pod.ports.iter().filter(|port| !port.name.is_empty()) {
            found.groups.extend(self.ids.get(&Group::Port(port.protocol, port.name.clone(), port.port)));
        }
        found.groups.sort_unstable();
        found.groups.dedup();
        found
    }

    fn judge(&self, namespace: &str, labels: &BTreeMap<String, String>, world: &World) -> Membership {
        let mut of_namespace = world.namespaces.get(namespace).map(|it| it.meta.labels.clone()).unwrap_or_default();
        // The API server adds it.
        of_namespace.insert(NAME_LABEL.to_owned(), namespace.to_owned());
        let belongs = |group: &Group| match group {
            Group::InNamespace(name, pods) => name == namespace && pods.matches(labels),
            Group::Across(namespaces, pods) => namespaces.matches(&of_namespace) && pods.matches(labels),
            Group::Port(..) => false,
        };
        let selects = |policy: &NetworkPolicy| {
            policy.meta.namespace == namespace && policy.pods.as_ref().is_none_or(|pods| pods.matches(labels))
        };
        Membership {
            groups: self.ids.iter().filter(|(group, _)| belongs(group)).map(|(_, id)| *id).collect(),
            policies: (0..self.policies.len()).filter(|index| selects(&self.policies[*index])).collect(),
        }
    }
}

/// A pod that policies are about: others have no address of their own.
fn counts(pod: &Pod) -> bool {
    pod.takes_part() && !pod.host_network
}

fn keys_of(selector: &Selector) -> impl Iterator<Item = String> {
    selector.labels.keys().chain(selector.expressions.iter().map(|expression| &expression.key)).cloned()
}

fn rules(policy: &NetworkPolicy) -> impl Iterator<Item = &crate::model::NetworkRule> {
    policy.ingress.iter().chain(&policy.egress).flatten()
}

fn port_names(policies: &[Arc<NetworkPolicy>]) -> BTreeSet<(Transport, String)> {
    let ports = policies.iter().flat_map(|policy| rules(policy)).flat_map(|rule| &rule.ports);
    ports
        .filter_map(|port| match &port.port {
            PortMatch::Name(name) => Some((port.protocol, name.clone())),
            PortMatch::Any | PortMatch::Range(..) => None,
        })
        .collect()
}

fn peers(policy: &NetworkPolicy) -> impl Iterator<Item = Group> {
    rules(policy).flat_map(|rule| &rule.peers).filter_map(|peer| group(policy, peer))
}

/// The group of a peer; `None`: it names addresses.
fn group(policy: &NetworkPolicy, peer: &NetworkPeer) -> Option<Group> {
    match peer {
        NetworkPeer::Pods { namespaces: None, pods } => {
            Some(Group::InNamespace(policy.meta.namespace.clone(), normal(pods)))
        }
        NetworkPeer::Pods { namespaces: Some(namespaces), pods } => {
            Some(Group::Across(normal(namespaces), normal(pods)))
        }
        NetworkPeer::Block { .. } => None,
    }
}

/// The same selector however it was written.
fn normal(selector: &Selector) -> Selector {
    let mut selector = selector.clone();
    for expression in &mut selector.expressions {
        expression.values.sort_unstable();
        expression.values.dedup();
    }
    selector.expressions.sort_unstable();
    selector.expressions.dedup();
    selector
}

/// Ids by hash. Two groups of one hash, which chance does not bring about, are told apart by hashing the later one again.
fn ids(groups: BTreeSet<Group>, hash: impl Fn(&Group, u32) -> u64) -> BTreeMap<Group, u64> {
    let mut taken = BTreeSet::new();
    let mut ids = BTreeMap::new();
    for group in groups {
        // 0 stands for "no group" on the wire.
        let id = (0..).map(|again| hash(&group, again)).find(|id| *id != 0 && taken.insert(*id));
        ids.extend(id.map(|id| (group, id)));
    }
    ids
}

fn hash(group: &Group, again: u32) -> u64 {
    let mut hasher = Sha256::new();
    // Every part with its length before it, so that no two definitions have one encoding.
    let mut part = |text: &str| {
        hasher.update((text.len() as u64).to_be_bytes());
        hasher.update(text.as_bytes());
    };
    match group {
        Group::InNamespace(namespace, pods) => {
            part("in");
            part(namespace);
            add(pods, &mut part);
        }
        Group::Across(namespaces, pods) => {
            part("across");
            add(namespaces, &mut part);
            add(pods, &mut part);
        }
        Group::Port(protocol, name, number) => {
            part("port");
            part(match protocol {
                Transport::Tcp => "TCP",
                Transport::Udp => "UDP",
                Transport::Sctp => "SCTP",
            });
            part(name);
            part(&number.to_string());
        }
    }
    part(&again.to_string());
    let digest = hasher.finalize();
    digest.iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte))
}

fn add(selector: &Selector, part: &mut impl FnMut(&str)) {
    part(&selector.labels.len().to_string());
    for (key, value) in &selector.labels {
        part(key);
        part(value);
    }
    part(&selector.expressions.len().to_string());
    for expression in &selector.expressions {
        part(&expression.key);
        part(match expression.operator {
            Operator::In => "In",
            Operator::NotIn => "NotIn",
            Operator::Exists => "Exists",
            Operator::DoesNotExist => "DoesNotExist",
        });
        part(&expression.values.len().to_string());
        expression.values.iter().for_each(|value| part(value));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::BTreeSet;

    use super::{Group, hash, ids};
    use crate::model::{Expression, Operator, Selector};

    fn labels(pairs: &[(&str, &str)]) -> Selector {
        Selector::of_labels(pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
    }

    #[test]
    fn different_definitions_have_different_hashes_and_equal_ones_the_same() {
        let within = |namespace: &str, pods| Group::InNamespace(namespace.into(), pods);
        let listed = |values: &[&str]| Selector {
            labels: BTreeMap::new(),
            expressions: vec![Expression {
                key: "a".into(),
                operator: Operator::In,
                values: values.iter().map(|value| (*value).into()).collect(),
            }],
        };
        let groups = [
            within("a", Selector::default()),
            within("b", Selector::default()),
            within("a", labels(&[("a", "b")])),
            within("a", labels(&[("ab", "")])),
            within("a", labels(&[("a", "b"), ("c", "d")])),
            within("a", labels(&[("a", "bc"), ("", "d")])),
            within("a", listed(&["b"])),
            within("a", listed(&["b", "c"])),
            within("a", listed(&["bc"])),
            Group::Across(Selector::default(), labels(&[("a", "b")])),
            Group::Across(labels(&[("a", "b")]), Selector::default()),
        ];
        let hashes: BTreeSet<u64> = groups.iter().map(|group| hash(group, 0)).collect();
        assert_eq!(hashes.len(), groups.len());
        // A version of a resource must survive an upgrade of control, so the hash itself is fixed.
        assert_eq!(hash(&groups[0], 0), 1_425_852_150_956_426_696);
    }

    #[test]
    fn two_groups_never_share_an_id_and_none_is_zero() {
        let groups: BTreeSet<Group> =
            (0..50).map(|i| Group::InNamespace(format!("ns-{i}"), Selector::default())).collect();
        // A bad hash: three values for all, and zero among them.
        let ids =
            ids(groups.clone(), |group, again| if again < 2 { hash(group, again) % 3 } else { hash(group, again) });
        let distinct: BTreeSet<u64> = ids.values().copied().collect();
        assert_eq!((ids.len(), distinct.len()), (groups.len(), groups.len()));
        assert!(!distinct.contains(&0));
    }
}
