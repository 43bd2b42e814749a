//! NetworkPolicies for what the proxy does not carry: the UDP and SCTP that a pod may exchange, as addresses and ports.
//!
//! The kernel decides about each packet, so selectors have to become addresses here, anew whenever workloads come and go.
//! Cost: one walk over all workloads for all pods of the node together ([`Members`]), and nothing at all where no pod is
//! isolated. Bounded: a pod whose peers have more than [`MOST`] addresses reaches the rest of them no more, which is said
//! ([`Filter::cut`]). Pure; what has not arrived allows nothing.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::policy::network;
use crate::state::{IpBlock, NetworkPolicy, NetworkRule, Snapshot, Transport, Way, Workload};

/// Addresses and blocks of all rules of a pod: 4 MB in the kernel, and more than the pods of a large cluster that one
/// policy names.
pub const MOST: usize = 65_536;

/// What one pod may exchange. A reply passes where its flow would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Addresses that are never blocked: its own, and its node's.
    pub exempt: BTreeSet<IpAddr>,
    /// What may come in. `None`: it is not isolated.
    pub ingress: Option<Vec<Allow>>,
    /// What may go out. `None`: it is not isolated.
    pub egress: Option<Vec<Allow>>,
    /// Addresses that were left out because there are too many.
    pub cut: usize,
}

/// Allows what matches peers and ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allow {
    /// `None`: everybody.
    pub peers: Option<Peers>,
    /// Ports of the destination, from and to. `None`: every port of both protocols.
    pub ports: Option<BTreeSet<(Transport, u16, u16)>>,
}

/// Addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// These.
    pub nets: Vec<IpNet>,
    /// But not these.
    pub except: Vec<IpNet>,
}

/// Addresses of the groups that policies of the node's pods name.
#[derive(Debug, Default)]
pub struct Members(HashMap<u64, Vec<IpAddr>>);

impl Members {
    /// Looks up the groups of all policies of `pods` in one walk.
    pub fn new<'a>(snapshot: &Snapshot, pods: impl IntoIterator<Item = &'a Arc<Workload>>) -> Self {
        let mut groups: HashMap<u64, Vec<IpAddr>> = HashMap::new();
        let named: BTreeSet<&Arc<str>> = pods.into_iter().flat_map(|pod| &pod.network_policies).collect();
        for policy in named.into_iter().filter_map(|id| snapshot.network_policy(id)) {
            for rule in policy.ingress.iter().chain(&policy.egress).flatten() {
                let peers = rule.peers.iter().flat_map(|peers| &peers.groups);
                let ports = rule.ports.iter().flatten().filter_map(|port| port.destination_group.as_ref());
                groups.extend(peers.chain(ports).map(|group| (*group, Vec::new())));
            }
        }
        if !groups.is_empty() {
            for record in snapshot.records().filter(|record| !record.host_network()) {
                for group in record.groups() {
                    if let Some(members) = groups.get_mut(group) {
                        members.extend(record.addresses());
                    }
                }
            }
            groups.values_mut().for_each(|members| members.sort_unstable());
        }
        Self(groups)
    }

    fn of(&self, group: u64) -> &[IpAddr] {
        self.0.get(&group).map_or(&[], Vec::as_slice)
    }
}

/// What `pod` may exchange; `None`: no policy isolates it.
pub fn compile(snapshot: &Snapshot, pod: &Workload, members: &Members) -> Option<Filter> {
    if pod.network_policies.is_empty() {
        return None;
    }
    let held: Vec<Option<&Arc<NetworkPolicy>>> =
        pod.network_policies.iter().map(|id| snapshot.network_policy(id)).collect();
    let mut room = MOST;
    let mut cut = 0;
    let mut direction = |way: Way| {
        // What has not arrived may isolate.
        let isolates = held.iter().any(|policy| policy.is_none_or(|policy| policy.rules(way).is_some()));
        isolates.then(|| {
            let rules = held.iter().flatten().filter_map(|policy| policy.rules(way)).flatten();
            let mut allows: Vec<Allow> = rules.flat_map(|rule| allows(rule, way, pod, members)).collect();
            if way == Way::Egress {
                allows.extend(virtual_addresses(snapshot, pod));
            }
            for nets in allows.iter_mut().filter_map(|allow| allow.peers.as_mut()).map(|peers| &mut peers.nets) {
                cut += nets.len().saturating_sub(room);
                nets.truncate(room);
                room -= nets.len();
            }
            allows
        })
    };
    let (ingress, egress) = (direction(Way::Ingress), direction(Way::Egress));
    if ingress.is_none() && egress.is_none() {
        return None;
    }
    let exempt = pod.addresses.iter().chain(snapshot.node_addresses().iter()).copied().collect();
    Some(Filter { exempt, ingress, egress, cut })
}

/// One rule as any number of simpler ones.
fn allows(rule: &NetworkRule, way: Way, pod: &Workload, members: &Members) -> Vec<Allow> {
    let mut plain = BTreeSet::new();
    let mut of_group: Vec<(u64, (Transport, u16, u16))> = Vec::new();
    for port in rule.ports.iter().flatten().filter(|port| port.protocol != Transport::Tcp && port.first <= port.last) {
        let range = (port.protocol, port.first, port.last);
        match (port.destination_group, way) {
            (Some(group), Way::Egress) => of_group.push((group, range)),
            (Some(group), Way::Ingress) if !pod.is_in(group) => {}
            (Some(_) | None, _) => {
                plain.insert(range);
            }
        }
    }
    let mut found = Vec::new();
    if rule.ports.is_none() || !plain.is_empty() {
        let ports = rule.ports.is_some().then_some(plain);
        found.extend(peers(rule, members).into_iter().map(|peers| Allow { peers, ports: ports.clone() }));
    }
    for (group, range) in of_group {
        let nets = members.of(group).iter().filter(|ip| reaches(rule, **ip, members)).map(|ip| IpNet::from(*ip));
        let peers = Some(Peers { nets: nets.collect(), except: Vec::new() });
        found.push(Allow { peers, ports: Some([range].into()) });
    }
    found.retain(|allow| allow.peers.as_ref().is_none_or(|peers| !peers.nets.is_empty()));
    found
}

/// The peers of a rule: those without exceptions together, and each with some for itself.
fn peers(rule: &NetworkRule, members: &Members) -> Vec<Option<Peers>> {
    let Some(peers) = &rule.peers else { return vec![None] };
    let (whole, parts): (Vec<&IpBlock>, Vec<&IpBlock>) = peers.blocks.iter().partition(|block| block.except.is_empty());
    let pods = peers.groups.iter().flat_map(|group| members.of(*group)).map(|ip| IpNet::from(*ip));
    let nets: Vec<IpNet> = whole.iter().map(|block| block.net).chain(pods).collect();
    // Sets of the kernel take no overlaps.
    let together = Peers { nets: IpNet::aggregate(&nets), except: Vec::new() };
    let each = parts.iter().map(|block| Peers { nets: vec![block.net], except: IpNet::aggregate(&block.except) });
    std::iter::once(together).chain(each).map(Some).collect()
}

/// Whether `ip`, which is a pod's, is among the rule's peers.
fn reaches(rule: &NetworkRule, ip: IpAddr, members: &Members) -> bool {
    let Some(peers) = &rule.peers else { return true };
    let in_group = |group: &u64| members.of(*group).binary_search(&ip).is_ok();
    let in_block = |block: &IpBlock| block.net.contains(&ip) && !block.except.iter().any(|part| part.contains(&ip));
    peers.groups.iter().any(in_group) || peers.blocks.iter().any(in_block)
}

/// Virtual addresses whose every endpoint may be reached. The packet still has the virtual address where it is filtered,
/// and which endpoint it will get is not known.
fn virtual_addresses(snapshot: &Snapshot, pod: &Workload) -> Vec<Allow> {
    let mut found = Vec::new();
    for service in snapshot.services() {
        let Some(info) = service.info.as_ref().filter(|info| !info.datagrams.is_empty()) else { continue };
        let vips: Vec<IpNet> =
            service.vips.iter().filter(|(net, _)| *net == pod.network).map(|(_, vip)| *vip).collect();
        let ports = info.datagrams.iter().filter(|port| network::reaches_all(snapshot, pod, port));
        let ports: BTreeSet<_> = ports.map(|port| (port.transport, port.number, port.number)).collect();
        if !vips.is_empty() && !ports.is_empty() {
            let peers = Some(Peers { nets: IpNet::aggregate(&vips), except: Vec::new() });
            found.push(Allow { peers, ports: Some(ports) });
        }
    }
    found
}
