//! Kubernetes' NetworkPolicy (networking.k8s.io/v1), with every selector, block and port already checked.
//!
//! A policy whose spec cannot be read is kept as one that isolates without allowing anything: what could be read of its
//! pods and directions is used, and all of what could not.

use ipnet::IpNet;

use crate::model::meta::{Meta, Selector};
use crate::model::service::Transport;

/// A NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Name.
    pub meta: Meta,
    /// Selected pods of its namespace; `None` if unreadable: all of them.
    pub pods: Option<Selector>,
    /// What may come in; `None`: this policy does not isolate ingress.
    pub ingress: Option<Vec<NetworkRule>>,
    /// What may go out; `None`: this policy does not isolate egress.
    pub egress: Option<Vec<NetworkRule>>,
    /// The first error of a spec that cannot be read; there are no rules then.
    pub unreadable: Option<String>,
}

/// Allows what matches a peer and a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkRule {
    /// Any of them; empty: everybody.
    pub peers: Vec<NetworkPeer>,
    /// Any of them; empty: every port of every protocol.
    pub ports: Vec<NetworkPort>,
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkPeer {
    /// Pods by label.
    Pods {
        /// Namespaces by label; `None`: the policy's own.
        namespaces: Option<Selector>,
        /// Pods of those; empty: all.
        pods: Selector,
    },
    /// Addresses.
    Block {
        /// These.
        cidr: IpNet,
        /// But not these, which are parts of it.
        except: Vec<IpNet>,
    },
}

/// A port of the destination pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPort {
    /// Its protocol.
    pub protocol: Transport,
    /// Its number or name.
    pub port: PortMatch,
}

/// Which port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortMatch {
    /// Any.
    Any,
    /// From the first to the last, inclusive.
    Range(u16, u16),
    /// The container port of this name, which may differ from pod to pod.
    Name(String),
}
