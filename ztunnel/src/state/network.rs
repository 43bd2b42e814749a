//! A NetworkPolicy in the form that is evaluated: groups for selectors, exact blocks and ports.
//!
//! Which pods it isolates is said by the pods ([`crate::state::Workload::network_policies`]), so an edit of its selector
//! never leaves a pod without it in between. One that cannot be read isolates and allows nothing.

use std::sync::Arc;

use ipnet::IpNet;

use crate::state::Transport;

/// Beginning of a resource name, before `<namespace>/<name>`.
pub const NETWORK_POLICY: &str = "NetworkPolicy/";

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Resource name, `NetworkPolicy/<namespace>/<name>`.
    pub id: Arc<str>,
    /// Version of the resource as control named it, or of the rejected resource that a stand-in stands for.
    pub version: Arc<str>,
    /// What may come in. `None`: it does not isolate ingress.
    pub ingress: Option<Vec<NetworkRule>>,
    /// What may go out. `None`: it does not isolate egress.
    pub egress: Option<Vec<NetworkRule>>,
    /// Why it cannot be read; then it has no rules.
    pub unreadable: Option<Arc<str>>,
}

impl NetworkPolicy {
    /// What takes the place of a policy that cannot be read and has no good version: isolates in both directions.
    pub fn isolates(id: &Arc<str>, version: &Arc<str>, reason: &str) -> Self {
        Self {
            id: id.clone(),
            version: version.clone(),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
            unreadable: Some(reason.into()),
        }
    }

    /// The rules of a direction.
    pub fn rules(&self, direction: Way) -> Option<&[NetworkRule]> {
        match direction {
            Way::Ingress => self.ingress.as_deref(),
            Way::Egress => self.egress.as_deref(),
        }
    }
}

/// Direction of a connection, as the isolated pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into the pod.
    Ingress,
    /// Out of the pod.
    Egress,
}

/// Allows what matches peers and ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkRule {
    /// `None`: everybody.
    pub peers: Option<NetworkPeers>,
    /// Any of them. `None`: every port of every protocol.
    pub ports: Option<Vec<NetworkPort>>,
}

/// Matches any of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPeers {
    /// Groups of pods.
    pub groups: Vec<u64>,
    /// Addresses.
    pub blocks: Vec<IpBlock>,
}

/// Addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpBlock {
    /// These.
    pub net: IpNet,
    /// But not these.
    pub except: Vec<IpNet>,
}

/// A port of the destination pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkPort {
    /// Its protocol.
    pub protocol: Transport,
    /// From this one, where 0 to 65535 is any.
    pub first: u16,
    /// To this one. Less than `first`: none.
    pub last: u16,
    /// Only of destinations in this group.
    pub destination_group: Option<u64>,
}
