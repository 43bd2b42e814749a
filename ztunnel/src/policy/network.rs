//! NetworkPolicy: whether a pod that policies isolate may talk to a peer.
//!
//! The semantics are those of networking.k8s.io/v1. A pod that no policy isolates in a direction is open in it; else any
//! rule of any policy that isolates it there may allow. Never blocked: the pod itself, and its own node. A peer is found
//! by its address, and counts as a pod only if it proved that pod's account (through a tunnel) or nothing contradicts it
//! (in plaintext); blocks look at the address alone. Pure and total: what has not arrived refuses.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::outcome::{Code, Outcome};
use crate::state::{
    DatagramPort, NETWORK_POLICY, NetworkPeers, NetworkPolicy, NetworkPort, NetworkRule, Service, Snapshot, Transport,
    Way, Workload,
};

/// Names in a sentence, a log field and a metric's label; of a pod with more, the rest is counted.
const NAMED: usize = 8;

/// One connection, seen from the pod that may be isolated.
#[derive(Clone, Copy, Debug)]
struct Flow<'a> {
    way: Way,
    protocol: Transport,
    /// Address at the other end.
    ip: IpAddr,
    /// The pod at the other end.
    peer: Option<&'a Workload>,
    /// Port of the destination.
    port: u16,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// No policy isolates the pod in this direction.
    Open,
    /// The other end is the pod itself or its node.
    Exempt,
    /// A rule allows it.
    Allowed {
        /// The policy's resource name.
        policy: Arc<str>,
        /// Index of its rule.
        rule: usize,
        /// Direction.
        way: Way,
    },
    /// Policies isolate the pod, and no rule allows it.
    Isolated(Isolated),
    /// A policy that isolates the pod has not arrived; `None`: none has.
    Pending(Option<Arc<str>>),
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Isolated {
    /// Resource names of the policies.
    pub by: Vec<Arc<str>>,
    /// One of them cannot be read, for this reason.
    pub unreadable: Option<(Arc<str>, Arc<str>)>,
    /// Direction.
    pub way: Way,
    /// What was not allowed: `TCP port 8080 from 10.0.0.1 (shop/web)`.
    what: String,
}

/// Whether `pod` may be reached at `port` from `source`, who proved `identity` (`None`: plaintext).
pub fn ingress(
    snapshot: &Snapshot,
    pod: &Workload,
    identity: Option<&SpiffeId>,
    source: IpAddr,
    protocol: Transport,
    port: u16,
) -> Finding {
    if pod.network_policies.is_empty() {
        return Finding::Open;
    }
    let peer = snapshot
        .workload_by_ip(&pod.network, source)
        .filter(|peer| identity.is_none_or(|identity| peer.identity == *identity));
    evaluate(snapshot, pod, &Flow { way: Way::Ingress, protocol, ip: source, peer: peer.map(|peer| &**peer), port })
}

/// Whether `pod` may reach `destination`: an endpoint, or for datagrams also the virtual address of a Service.
pub fn egress(snapshot: &Snapshot, pod: &Workload, protocol: Transport, destination: SocketAddr) -> Finding {
    if pod.network_policies.is_empty() {
        return Finding::Open;
    }
    let (ip, port) = (destination.ip(), destination.port());
    let answers = |service: &Service| datagram_port(service, protocol, port).is_some();
    if let Some(service) = snapshot.service_that(&pod.network, ip, &pod.namespace, answers)
        && let Some(behind) = datagram_port(service, protocol, port)
    {
        // As good as its worst endpoint, or as none.
        let worst = behind.endpoints.iter().map(|endpoint| to_endpoint(snapshot, pod, protocol, *endpoint));
        if let Some(finding) = worst.max_by_key(|finding| finding.outcome().is_err()) {
            return finding;
        }
    }
    to_endpoint(snapshot, pod, protocol, destination)
}

fn to_endpoint(snapshot: &Snapshot, pod: &Workload, protocol: Transport, endpoint: SocketAddr) -> Finding {
    let (ip, port) = (endpoint.ip(), endpoint.port());
    let peer = snapshot.workload_by_ip(&pod.network, ip).map(|peer| &**peer);
    evaluate(snapshot, pod, &Flow { way: Way::Egress, protocol, ip, peer, port })
}

fn datagram_port(service: &Service, protocol: Transport, number: u16) -> Option<&DatagramPort> {
    let ports = &service.info.as_ref()?.datagrams;
    ports.iter().find(|port| port.transport == protocol && port.number == number)
}

/// Whether `pod` may reach every endpoint of a service's port that is not TCP. Which one a packet will get is not known
/// where its virtual address is judged; without an endpoint there is nothing to reach.
pub fn reaches_all(snapshot: &Snapshot, pod: &Workload, port: &DatagramPort) -> bool {
    let may = |endpoint: &SocketAddr| to_endpoint(snapshot, pod, port.transport, *endpoint).outcome().is_ok();
    !port.endpoints.is_empty() && port.endpoints.iter().all(may)
}

fn evaluate(snapshot: &Snapshot, pod: &Workload, flow: &Flow<'_>) -> Finding {
    if pod.addresses.contains(&flow.ip.to_canonical()) || snapshot.is_own_node(flow.ip) {
        return Finding::Exempt;
    }
    let mut isolated: Vec<&Arc<NetworkPolicy>> = Vec::new();
    let mut missing = None;
    for id in &pod.network_policies {
        let Some(policy) = snapshot.network_policy(id) else {
            missing = missing.or(Some(id));
            continue;
        };
        let Some(rules) = policy.rules(flow.way) else { continue };
        if let Some(rule) = rules.iter().position(|rule| allows(rule, pod, flow)) {
            return Finding::Allowed { policy: policy.id.clone(), rule, way: flow.way };
        }
        isolated.push(policy);
    }
    if missing.is_some() || pod.policies_pending {
        return Finding::Pending(missing.cloned());
    }
    if isolated.is_empty() {
        return Finding::Open;
    }
    Finding::Isolated(Isolated {
        by: isolated.iter().map(|policy| policy.id.clone()).collect(),
        unreadable: isolated.iter().find_map(|policy| Some((policy.id.clone(), policy.unreadable.clone()?))),
        way: flow.way,
        what: flow.to_string(),
    })
}

fn allows(rule: &NetworkRule, pod: &Workload, flow: &Flow<'_>) -> bool {
    let destination = if flow.way == Way::Ingress { Some(pod) } else { flow.peer };
    let port = |port: &NetworkPort| {
        port.protocol == flow.protocol
            && (port.first..=port.last).contains(&flow.port)
            && port.destination_group.is_none_or(|group| destination.is_some_and(|pod| pod.is_in(group)))
    };
    rule.peers.as_ref().is_none_or(|peers| matches(peers, flow))
        && rule.ports.as_ref().is_none_or(|ports| ports.iter().any(port))
}

fn matches(peers: &NetworkPeers, flow: &Flow<'_>) -> bool {
    let ip = flow.ip.to_canonical();
    let in_block = || {
        peers.blocks.iter().any(|block| block.net.contains(&ip) && !block.except.iter().any(|part| part.contains(&ip)))
    };
    flow.peer.is_some_and(|peer| peers.groups.iter().any(|group| peer.is_in(*group))) || in_block()
}

impl Finding {
    /// The end of a connection that this refuses.
    ///
    /// # Errors
    /// That end; `Ok` if the connection may be made.
    pub fn outcome(&self) -> Result<(), Outcome> {
        let (code, policy) = match self {
            Self::Open | Self::Exempt | Self::Allowed { .. } => return Ok(()),
            Self::Pending(policy) => (Code::PolicyPending, policy.clone()),
            Self::Isolated(isolated) => {
                let code = match isolated.way {
                    Way::Ingress => Code::NetworkPolicyIngress,
                    Way::Egress => Code::NetworkPolicyEgress,
                };
                (code, Some(isolated.policies().into()))
            }
        };
        Err(Outcome { code, detail: self.to_string().into(), policy, rule: None, dry_run: Vec::new() })
    }
}

impl Isolated {
    /// `NetworkPolicy/shop/a,NetworkPolicy/shop/b`.
    fn policies(&self) -> String {
        let mut names: Vec<&str> = self.by.iter().take(NAMED).map(|id| &**id).collect();
        names.extend((self.by.len() > NAMED).then_some("…"));
        names.join(",")
    }
}

/// `shop/a` of `NetworkPolicy/shop/a`.
fn short(id: &str) -> &str {
    id.strip_prefix(NETWORK_POLICY).unwrap_or(id)
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("allowed: no NetworkPolicy isolates the pod"),
            Self::Exempt => f.write_str("allowed: NetworkPolicies do not hold for the pod itself and its own node"),
            Self::Allowed { policy, rule, way } => {
                write!(f, "allowed by NetworkPolicy {}, {}[{rule}]", short(policy), word(*way))
            }
            Self::Isolated(Isolated { by, unreadable, way, what }) => {
                let names: Vec<&str> = by.iter().take(NAMED).map(|id| short(id)).collect();
                let kind = if by.len() == 1 { "NetworkPolicy" } else { "NetworkPolicies" };
                write!(f, "denied: isolated by {kind} {}", names.join(", "))?;
                if by.len() > NAMED {
                    write!(f, " and {} more", by.len() - NAMED)?;
                }
                write!(f, ": no {} rule allows {what}", word(*way))?;
                match unreadable {
                    Some((id, reason)) => write!(f, "; {} cannot be read: {reason}", short(id)),
                    None => Ok(()),
                }
            }
            Self::Pending(Some(policy)) => {
                write!(f, "refused for now: NetworkPolicy {} has not arrived; retry", short(policy))
            }
            Self::Pending(None) => f.write_str("refused for now: the pod's policies have not arrived; retry"),
        }
    }
}

fn word(way: Way) -> &'static str {
    match way {
        Way::Ingress => "ingress",
        Way::Egress => "egress",
    }
}

impl fmt::Display for Flow<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
            Transport::Sctp => "SCTP",
        };
        let direction = if self.way == Way::Ingress { "from" } else { "to" };
        write!(f, "{protocol} port {} {direction} {}", self.port, self.ip)?;
        match self.peer {
            Some(peer) => write!(f, " ({}/{})", peer.namespace, peer.name),
            None => Ok(()),
        }
    }
}
