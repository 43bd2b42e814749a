//! A slow, literal evaluator of NetworkPolicies that works from labels, to test the one that works from groups against.
//!
//! It follows the words of networking.k8s.io/v1 and knows no group: selectors are looked at for each connection anew. The
//! test's own translation gives every distinct selector a number, as control does with a hash.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use tulle_certs::SpiffeId;

use crate::policy::network::{Finding, egress, ingress};
use crate::state::fixtures;
use crate::state::{
    Change, IpBlock, NetworkPeers, NetworkPolicy, NetworkPort, NetworkRule, Snapshot, Transport, Workload,
};

/// Labels that must be there.
type Labels = BTreeMap<&'static str, &'static str>;

#[derive(Clone, Debug)]
struct Pod {
    namespace: &'static str,
    name: String,
    labels: Labels,
    ip: &'static str,
    /// Port that it calls `http`.
    http: Option<u16>,
}

#[derive(Clone, Debug)]
enum Peer {
    Pods { namespaces: Option<Labels>, pods: Labels },
    Block { cidr: &'static str, except: Vec<&'static str> },
}

#[derive(Clone, Debug)]
enum Port {
    Any(Transport),
    Range(Transport, u16, u16),
    Http,
}

#[derive(Clone, Debug)]
struct Rule {
    peers: Vec<Peer>,
    ports: Vec<Port>,
}

#[derive(Clone, Debug)]
struct Policy {
    namespace: &'static str,
    pods: Labels,
    ingress: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
}

#[derive(Clone, Debug)]
struct Cluster {
    pods: Vec<Pod>,
    policies: Vec<Policy>,
}

/// Namespaces and their labels.
const NAMESPACES: [(&str, (&str, &str)); 2] = [("shop", ("team", "red")), ("bank", ("team", "blue"))];
const NODE: &str = "10.9.9.9";

fn holds(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn namespace_labels(name: &str) -> Labels {
    NAMESPACES.iter().filter(|(namespace, _)| *namespace == name).map(|(_, label)| *label).collect()
}

/// A connection between a pod and an address, which may be a pod's.
struct Question<'a> {
    pod: &'a Pod,
    into: bool,
    ip: IpAddr,
    /// The pod at the other end.
    peer: Option<&'a Pod>,
    protocol: Transport,
    port: u16,
}

/// What must come out: open, allowed, or isolated by so many policies.
fn expected(cluster: &Cluster, question: &Question<'_>) -> Result<bool, usize> {
    let own: IpAddr = question.pod.ip.parse().unwrap();
    if question.ip == own || question.ip == NODE.parse::<IpAddr>().unwrap() {
        // A pod that no policy selects is open to everybody, which is said first.
        let selects =
            |policy: &Policy| policy.namespace == question.pod.namespace && holds(&policy.pods, &question.pod.labels);
        return Ok(cluster.policies.iter().any(selects));
    }
    let mut isolating = 0;
    let mut allowed = false;
    for policy in &cluster.policies {
        if policy.namespace != question.pod.namespace || !holds(&policy.pods, &question.pod.labels) {
            continue;
        }
        let Some(rules) = (if question.into { &policy.ingress } else { &policy.egress }) else { continue };
        isolating += 1;
        for rule in rules {
            let peer = rule.peers.is_empty() || rule.peers.iter().any(|peer| peer_holds(peer, policy, question));
            let port = rule.ports.is_empty() || rule.ports.iter().any(|port| port_holds(port, question));
            allowed = allowed || (peer && port);
        }
    }
    match (isolating, allowed) {
        (0, _) => Ok(false),
        (_, true) => Ok(true),
        (count, false) => Err(count),
    }
}

fn peer_holds(peer: &Peer, policy: &Policy, question: &Question<'_>) -> bool {
    match (peer, question.peer) {
        (Peer::Block { cidr, except }, _) => {
            let inside = |net: &&str| net.parse::<IpNet>().unwrap().contains(&question.ip);
            inside(cidr) && !except.iter().any(inside)
        }
        (Peer::Pods { .. }, None) => false,
        (Peer::Pods { namespaces: None, pods }, Some(other)) => {
            other.namespace == policy.namespace && holds(pods, &other.labels)
        }
        (Peer::Pods { namespaces: Some(namespaces), pods }, Some(other)) => {
            holds(namespaces, &namespace_labels(other.namespace)) && holds(pods, &other.labels)
        }
    }
}

fn port_holds(port: &Port, question: &Question<'_>) -> bool {
    let destination = if question.into { Some(question.pod) } else { question.peer };
    match port {
        Port::Any(protocol) => *protocol == question.protocol,
        Port::Range(protocol, first, last) => {
            *protocol == question.protocol && *first <= question.port && question.port <= *last
        }
        Port::Http => {
            question.protocol == Transport::Tcp && destination.is_some_and(|pod| pod.http == Some(question.port))
        }
    }
}

/// Numbers for what defines a group.
#[derive(Default)]
struct Numbers(BTreeMap<String, u64>);

impl Numbers {
    fn of(&mut self, definition: String) -> u64 {
        let next = self.0.len() as u64 + 1;
        *self.0.entry(definition).or_insert(next)
    }
}

/// The snapshot that control would bring about.
fn translated(cluster: &Cluster) -> (Arc<Snapshot>, Vec<Workload>) {
    let mut numbers = Numbers::default();
    let mut changes = Vec::new();
    let mut groups: Vec<Vec<u64>> = vec![Vec::new(); cluster.pods.len()];
    let mut names: Vec<Vec<Arc<str>>> = vec![Vec::new(); cluster.pods.len()];
    for (index, policy) in cluster.policies.iter().enumerate() {
        let id: Arc<str> = format!("NetworkPolicy/{}/p{index}", policy.namespace).into();
        for (pod, names) in cluster.pods.iter().zip(&mut names) {
            if pod.namespace == policy.namespace && holds(&policy.pods, &pod.labels) {
                names.push(id.clone());
            }
        }
        let mut rules = |list: &Option<Vec<Rule>>| {
            list.as_ref().map(|rules| {
                rules.iter().map(|rule| translated_rule(rule, policy, cluster, &mut numbers, &mut groups)).collect()
            })
        };
        let (ingress, egress) = (rules(&policy.ingress), rules(&policy.egress));
        let policy = NetworkPolicy { id, version: "v1".into(), ingress, egress, unreadable: None };
        changes.push(Change::NetworkPolicy(Arc::new(policy)));
    }
    let workloads: Vec<Workload> = cluster
        .pods
        .iter()
        .zip(groups.into_iter().zip(names))
        .map(|(pod, (mut groups, network_policies))| {
            groups.sort_unstable();
            groups.dedup();
            let plain = fixtures::workload(pod.namespace, &pod.name, pod.ip);
            Workload { groups: groups.into(), network_policies, ..plain }
        })
        .collect();
    changes.extend(workloads.iter().cloned().map(|workload| Change::Workload(Arc::new(workload))));
    (fixtures::snapshot_of_node(changes, &[NODE.parse().unwrap()]), workloads)
}

fn translated_rule(
    rule: &Rule,
    policy: &Policy,
    cluster: &Cluster,
    numbers: &mut Numbers,
    groups: &mut [Vec<u64>],
) -> NetworkRule {
    let mut peers = NetworkPeers::default();
    for peer in &rule.peers {
        match peer {
            Peer::Block { cidr, except } => peers.blocks.push(IpBlock {
                net: cidr.parse().unwrap(),
                except: except.iter().map(|part| part.parse().unwrap()).collect(),
            }),
            Peer::Pods { namespaces, pods } => {
                let scope = namespaces.as_ref().map_or_else(|| policy.namespace.to_owned(), |n| format!("{n:?}"));
                let number = numbers.of(format!("{scope} {pods:?}"));
                peers.groups.push(number);
                for (pod, groups) in cluster.pods.iter().zip(groups.iter_mut()) {
                    let here = match namespaces {
                        None => pod.namespace == policy.namespace,
                        Some(namespaces) => holds(namespaces, &namespace_labels(pod.namespace)),
                    };
                    if here && holds(pods, &pod.labels) {
                        groups.push(number);
                    }
                }
            }
        }
    }
    let mut ports = Vec::new();
    for port in &rule.ports {
        match port {
            Port::Any(protocol) => ports.push(range(*protocol, 0, u16::MAX, None)),
            Port::Range(protocol, first, last) => ports.push(range(*protocol, *first, *last, None)),
            Port::Http => {
                ports.push(range(Transport::Tcp, 1, 0, None));
                for (pod, groups) in cluster.pods.iter().zip(groups.iter_mut()) {
                    let Some(http) = pod.http else { continue };
                    let number = numbers.of(format!("http is {http}"));
                    groups.push(number);
                    ports.push(range(Transport::Tcp, http, http, Some(number)));
                }
            }
        }
    }
    NetworkRule { peers: (!rule.peers.is_empty()).then_some(peers), ports: (!ports.is_empty()).then_some(ports) }
}

fn range(protocol: Transport, first: u16, last: u16, destination_group: Option<u64>) -> NetworkPort {
    NetworkPort { protocol, first, last, destination_group }
}

fn labels() -> impl Strategy<Value = Labels> {
    let one = (prop::sample::select(vec!["app", "tier"]), prop::sample::select(vec!["a", "b"]));
    prop::collection::btree_map(one.0, one.1, 0..3)
}

fn transport() -> impl Strategy<Value = Transport> {
    prop::sample::select(vec![Transport::Tcp, Transport::Tcp, Transport::Udp, Transport::Sctp])
}

fn rule() -> impl Strategy<Value = Rule> {
    let namespaces = prop::option::of(prop::sample::select(vec![
        Labels::new(),
        [("team", "red")].into(),
        [("team", "blue")].into(),
        [("team", "green")].into(),
    ]));
    let block = (
        prop::sample::select(vec!["10.0.0.0/8", "10.0.0.2/32", "0.0.0.0/0", "192.168.0.0/16", "2001:db8::/32"]),
        prop::collection::vec(prop::sample::select(vec!["10.0.0.0/30", "10.0.0.3/32"]), 0..2),
    );
    let peer = prop_oneof![
        2 => (namespaces, labels()).prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods }),
        1 => block.prop_map(|(cidr, except)| Peer::Block { cidr, except }),
    ];
    let port = prop_oneof![
        transport().prop_map(Port::Any),
        (transport(), 79..82u16, 0..3u16).prop_map(|(protocol, first, more)| Port::Range(
            protocol,
            first,
            first + more
        )),
        Just(Port::Http),
    ];
    (prop::collection::vec(peer, 0..3), prop::collection::vec(port, 0..3))
        .prop_map(|(peers, ports)| Rule { peers, ports })
}

fn cluster() -> impl Strategy<Value = Cluster> {
    let namespace = || prop::sample::select(vec!["shop", "bank"]);
    let addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"];
    let pod = (namespace(), labels(), prop::option::of(prop::sample::select(vec![80u16, 81])));
    let pods = prop::collection::vec(pod, 2..=4).prop_map(move |list| {
        let named = list.into_iter().zip(addresses).enumerate();
        named
            .map(|(index, ((namespace, labels, http), ip))| Pod {
                namespace,
                name: format!("pod-{index}"),
                labels,
                ip,
                http,
            })
            .collect()
    });
    let rules = || prop::option::weighted(0.6, prop::collection::vec(rule(), 0..3));
    let policy = (namespace(), labels(), rules(), rules()).prop_map(|(namespace, pods, ingress, egress)| Policy {
        namespace,
        pods,
        ingress,
        egress,
    });
    (pods, prop::collection::vec(policy, 0..4)).prop_map(|(pods, policies)| Cluster { pods, policies })
}

fn found(finding: &Finding) -> Result<bool, usize> {
    match finding {
        Finding::Open => Ok(false),
        Finding::Exempt | Finding::Allowed { .. } => Ok(true),
        Finding::Isolated(isolated) => Err(isolated.by.len()),
        Finding::Pending(_) => panic!("everything has arrived"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn groups_give_the_verdicts_that_labels_give(
        cluster in cluster(),
        other in prop::sample::select(vec![
            "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.7.7.7", "192.168.1.1", "2001:db8::1", NODE,
        ]),
        protocol in transport(),
        port in 79..83u16,
        proof in prop::sample::select(vec!["none", "right", "wrong"]),
    ) {
        let (snapshot, workloads) = translated(&cluster);
        let ip: IpAddr = other.parse().unwrap();
        let peer = cluster.pods.iter().find(|pod| pod.ip == other);
        for (pod, workload) in cluster.pods.iter().zip(&workloads) {
            // Who proves another account than the pod's at that address counts as no pod.
            let identity: Option<SpiffeId> = match (proof, peer) {
                ("none", _) | (_, None) => None,
                ("right", Some(peer)) => Some(fixtures::identity(peer.namespace, &peer.name)),
                _ => Some(fixtures::identity("elsewhere", "other")),
            };
            let proven = peer.filter(|_| proof != "wrong");
            let question = Question { pod, into: true, ip, peer: proven, protocol, port };
            let finding = ingress(&snapshot, workload, identity.as_ref(), ip, protocol, port);
            prop_assert_eq!(found(&finding), expected(&cluster, &question), "{}", finding);
            prop_assert_eq!(finding.outcome().is_ok(), found(&finding).is_ok());

            let question = Question { pod, into: false, ip, peer, protocol, port };
            let finding = egress(&snapshot, workload, protocol, SocketAddr::new(ip, port));
            prop_assert_eq!(found(&finding), expected(&cluster, &question), "{}", finding);
            let word = if found(&finding).is_ok() { "allowed" } else { "denied" };
            prop_assert!(finding.to_string().starts_with(word));
        }
    }
}
