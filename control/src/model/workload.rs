//! Things that run and where they run: pods, nodes, namespaces, service accounts.
//!
//! A pod is kept as the API server gives it; whether it is enrolled, and how, is decided in translation.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::meta::Meta;
use crate::model::service::Transport;

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Name, labels, owner.
    pub meta: Meta,
    /// spec.nodeName; empty while unscheduled.
    pub node: String,
    /// spec.serviceAccountName; `default` if absent.
    pub service_account: String,
    /// spec.hostNetwork.
    pub host_network: bool,
    /// status.podIPs, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// status.phase.
    pub phase: Phase,
    /// Condition Ready is true, or there are no conditions.
    pub ready: bool,
    /// Declared ports of all containers.
    pub ports: Vec<ContainerPort>,
    /// Ports that the kubelet probes.
    pub probe_ports: BTreeSet<u16>,
    /// spec.hostname; may be empty.
    pub hostname: String,
    /// spec.subdomain: the headless Service below which `hostname` is a name; may be empty.
    pub subdomain: String,
}

/// Life cycle of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not all containers were started.
    Pending,
    /// Runs. Also if the object does not say.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended badly.
    Failed,
}

/// A port that a container declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPort {
    /// Name; may be empty.
    pub name: String,
    /// Number.
    pub port: u16,
    /// Its protocol.
    pub protocol: Transport,
}

impl Pod {
    /// True if it ended: it has no network any more and its address may belong to another pod.
    pub fn finished(&self) -> bool {
        matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    /// True if it is scheduled, has an address and has not ended.
    pub fn takes_part(&self) -> bool {
        !self.node.is_empty() && !self.addresses.is_empty() && !self.finished()
    }
}

/// A namespace. One without an object is one without labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Name and labels.
    pub meta: Meta,
}

/// A node. One without an object is one of unknown locality.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Name and labels; the labels say region and zone.
    pub meta: Meta,
}

/// A service account. Its absence changes nothing; pods name it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Name.
    pub meta: Meta,
}
