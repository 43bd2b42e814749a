//! NetworkPolicy to its own resource, with groups for selectors, and to a stand-in for proxies that do not take it.
//!
//! A policy that cannot be read isolates what it selects in the directions that it names, and allows nothing. The
//! stand-in is a denial of all ingress: a proxy that cannot evaluate the policy must not let in what it was written to
//! keep out. Egress has no stand-in, since those proxies authorise nothing that leaves.

use tulle_proto::mesh;
use tulle_proto::names;

use crate::model::{Condition, NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, PortMatch, Transport};
use crate::resource::{Audience, Kind, Resource};
use crate::translate::denial;
use crate::translate::groups::Groups;
use crate::translate::service::octets;

/// Resource name.
pub(super) fn name(policy: &NetworkPolicy) -> String {
    format!("NetworkPolicy/{}", policy.meta.path())
}

/// Name of its stand-in; `None`: there is nothing that it would have to deny.
pub(super) fn stand_in_name(policy: &NetworkPolicy) -> Option<String> {
    let open = |rule: &NetworkRule| rule.peers.is_empty() && rule.ports.is_empty();
    let closes = policy.ingress.as_ref().is_some_and(|rules| !rules.iter().any(open));
    closes.then(|| format!("{}/{}{}", policy.meta.namespace, names::NETWORK_STAND_IN, policy.meta.name))
}

pub(super) fn translate(policy: &NetworkPolicy, groups: &Groups) -> (Vec<Resource>, Condition) {
    let meta = &policy.meta;
    let rules = |list: &Option<Vec<NetworkRule>>| {
        list.iter().flatten().map(|one| rule(policy, one, groups)).collect::<Vec<_>>()
    };
    let message = mesh::NetworkPolicy {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        ingress: policy.ingress.is_some(),
        egress: policy.egress.is_some(),
        ingress_rules: rules(&policy.ingress),
        egress_rules: rules(&policy.egress),
        unreadable: policy.unreadable.clone().unwrap_or_default(),
    };
    let mut resources = vec![Resource::new(Kind::NetworkPolicy, name(policy), &message, Vec::new())];
    if stand_in_name(policy).is_some() {
        let name = format!("{}{}", names::NETWORK_STAND_IN, meta.name);
        let mut stand_in = denial(&meta.namespace, &name, tulle_proto::security::Scope::WorkloadSelector);
        stand_in.audience = Audience::Without(Kind::NetworkPolicy);
        resources.push(stand_in);
    }
    (resources, condition(policy))
}

fn condition(policy: &NetworkPolicy) -> Condition {
    let Some(reason) = &policy.unreadable else {
        return Condition::holding("Enforced", "Enforced", "Enforced whole".into());
    };
    let whom = if policy.pods.is_some() { "the pods that it selects" } else { "all pods of the namespace" };
    let closed = match (policy.ingress.is_some(), policy.egress.is_some()) {
        (true, true) => "accept nothing and reach nothing",
        (true, false) => "accept nothing",
        (false, _) => "reach nothing",
    };
    let message = format!("The spec cannot be read, so {whom} {closed}: {reason}");
    Condition::failing("Accepted", "Invalid", message)
}

fn rule(policy: &NetworkPolicy, rule: &NetworkRule, groups: &Groups) -> mesh::NetworkRule {
    let mut ports: Vec<mesh::NetworkPort> = rule.ports.iter().flat_map(|port| self::ports(port, groups)).collect();
    if ports.is_empty() && !rule.ports.is_empty() {
        // Names that no pod has: no port at all, which is not the same as no restriction.
        ports.push(mesh::NetworkPort { first: 1, last: 0, ..mesh::NetworkPort::default() });
    }
    mesh::NetworkRule { peers: rule.peers.iter().map(|one| peer(policy, one, groups)).collect(), ports }
}

fn peer(policy: &NetworkPolicy, peer: &NetworkPeer, groups: &Groups) -> mesh::NetworkPeer {
    use mesh::network_peer::Peer;
    let peer = match peer {
        NetworkPeer::Pods { .. } => Peer::Group(groups.id(policy, peer).unwrap_or_default()),
        NetworkPeer::Block { cidr: block, except } => {
            Peer::Block(mesh::IpBlock { cidr: Some(cidr(block)), except: except.iter().map(cidr).collect() })
        }
    };
    mesh::NetworkPeer { peer: Some(peer) }
}

pub(super) fn cidr(net: &ipnet::IpNet) -> mesh::Cidr {
    mesh::Cidr { address: octets(&net.network()).into(), length: net.prefix_len().into() }
}

fn ports(port: &NetworkPort, groups: &Groups) -> Vec<mesh::NetworkPort> {
    let protocol = match port.protocol {
        Transport::Tcp => mesh::TransportProtocol::Tcp,
        Transport::Udp => mesh::TransportProtocol::Udp,
        Transport::Sctp => mesh::TransportProtocol::Sctp,
    };
    let range = |first: u16, last: u16, destination_group: u64| mesh::NetworkPort {
        protocol: protocol.into(),
        first: first.into(),
        last: last.into(),
        destination_group,
    };
    match &port.port {
        PortMatch::Any => vec![range(0, u16::MAX, 0)],
        PortMatch::Range(first, last) => vec![range(*first, *last, 0)],
        PortMatch::Name(name) => {
            let numbers = groups.named_port(port.protocol, name);
            numbers.into_iter().map(|(number, group)| range(number, number, group)).collect()
        }
    }
}
