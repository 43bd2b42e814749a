//! What may leave the cluster: EgressPolicy (tulle.dev) and ServiceEntry (networking.istio.io), which both say the same thing.
//!
//! A ServiceEntry is kept as the policy that it amounts to: it allows its hosts at its ports to the pods it is visible to. Names
//! are already in the form in which they are compared: lower case, A-labels, no final dot.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::meta::{Meta, Selector};
use crate::model::workload::Pod;

/// An EgressPolicy or a ServiceEntry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Name.
    pub meta: Meta,
    /// Which of the two.
    pub kind: EgressKind,
    /// Its pods; `None` if unreadable: all.
    pub pods: Option<EgressPods>,
    /// action: Audit. Its rules are recorded and allow nothing.
    pub record_only: bool,
    /// It allows nothing by itself, and what others allow must match it besides.
    pub ceiling: bool,
    /// exportTo says that only pods of its own namespace are meant, also in the root namespace.
    pub own_namespace: bool,
    /// What is allowed: any of them.
    pub rules: Vec<EgressRule>,
    /// The first error of a spec that cannot be read; there are no rules then.
    pub unreadable: Option<String>,
    /// What has no effect, one clause each.
    pub ignored: Vec<String>,
}

/// Kind of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EgressKind {
    /// tulle.dev EgressPolicy.
    Policy,
    /// networking.istio.io ServiceEntry.
    Entry,
}

impl EgressKind {
    /// Kind as written in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Policy => "EgressPolicy",
            Self::Entry => "ServiceEntry",
        }
    }
}

/// Which pods of the policy's namespace; of the root namespace: of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressPods {
    /// By label.
    pub labels: Selector,
    /// By service account, any of them; empty: every one.
    pub accounts: Vec<String>,
}

impl EgressPods {
    /// Whether a pod is one of them, its namespace aside.
    pub fn matches(&self, pod: &Pod) -> bool {
        self.labels.matches(&pod.meta.labels)
            && (self.accounts.is_empty() || self.accounts.contains(&pod.service_account))
    }
}

/// Allows any of the hosts or addresses at any of the ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressRule {
    /// Names, also `*.example.com` and `*`.
    pub hosts: Vec<String>,
    /// Addresses.
    pub cidrs: Vec<IpNet>,
    /// Any of them; empty: every TCP port.
    pub ports: Vec<EgressPort>,
    /// What requests must be.
    pub http: Option<EgressHttp>,
    /// Namespace and name of the gateway's Service; `None`: the node dials.
    pub gateway: Option<(String, String)>,
    /// TLS that the proxy adds.
    pub originate: Option<Origination>,
    /// Where the hosts are, instead of what their names resolve to.
    pub endpoints: Vec<EgressEndpoint>,
    /// Addresses that stand for the first host.
    pub stands_for: Vec<IpNet>,
    /// Roots, DER, by which the proxy has hosts prove their names before TLS passes through; empty: those of the system. `None`: hosts
    /// prove nothing.
    pub proof: Option<Vec<Vec<u8>>>,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressPort {
    /// As it is dialled.
    pub number: u16,
    /// What is spoken.
    pub protocol: EgressProtocol,
    /// At the other side; 0: the same.
    pub target: u16,
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressProtocol {
    /// The client's first bytes tell.
    Detected,
    /// Bytes.
    Tcp,
    /// TLS.
    Tls,
    /// HTTP in plain text.
    Http,
    /// HTTP in TLS.
    Https,
}

/// What requests must be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressHttp {
    /// Upper case; empty: any.
    pub methods: Vec<String>,
    /// `/a`, `/a/*`, `*`; empty: any.
    pub paths: Vec<String>,
}

/// TLS that the proxy adds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origination {
    /// Server name; empty: the host.
    pub server_name: String,
    /// Roots, DER; empty: those of the system.
    pub roots: Vec<Vec<u8>>,
    /// Name of the certificate that the gateway shows, among those that it has for the policy's namespace; empty: none.
    pub client_certificate: String,
}

/// Where a host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressEndpoint {
    /// An address, or a name to be resolved.
    pub at: Result<IpAddr, String>,
    /// Ports of the rule to ports here, where they are others.
    pub ports: BTreeMap<u16, u16>,
}
