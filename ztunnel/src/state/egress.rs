//! What pods may reach outside the cluster, in the form that is evaluated: EgressPolicies, and ServiceEntries as what they allow.
//!
//! Which pods a policy is about is said by the pods ([`crate::state::Workload::egress_policies`]). One that cannot be read has no
//! rules: it allows nothing, and as a ceiling lets nothing pass.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::state::ServiceName;

/// Beginning of a resource name of an own policy, before `<namespace>/<name>`.
pub const EGRESS_POLICY: &str = "EgressPolicy/";
/// The same for what a ServiceEntry allows.
pub const SERVICE_ENTRY: &str = "ServiceEntry/";

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Resource name.
    pub id: Arc<str>,
    /// Version of the resource as control named it, or of the rejected resource that a stand-in stands for.
    pub version: Arc<str>,
    /// Its rules are recorded and allow nothing.
    pub record_only: bool,
    /// It allows nothing by itself, and what others allow must match it besides.
    pub ceiling: bool,
    /// Any of them.
    pub rules: Vec<EgressRule>,
    /// Why it cannot be read; then it has no rules.
    pub unreadable: Option<Arc<str>>,
}

/// Allows any of the hosts or addresses at any of the ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressRule {
    /// Names.
    pub hosts: Vec<HostPattern>,
    /// Addresses that may be dialled, and into which the hosts may resolve although they are private.
    pub cidrs: Vec<IpNet>,
    /// Any of them. None: every TCP port.
    pub ports: Vec<EgressPort>,
    /// What requests must be.
    pub http: Option<EgressHttp>,
    /// Service whose pods are the way out. `None`: the node dials.
    pub gateway: Option<ServiceName>,
    /// TLS that is added.
    pub originate: Option<Origination>,
    /// Where the hosts are, instead of what their names resolve to.
    pub endpoints: Vec<EgressEndpoint>,
    /// Addresses that stand for the first host.
    pub stands_for: Vec<IpNet>,
    /// Roots, DER, by which hosts have to prove their names before TLS passes through; none: those of the system. `None`: hosts prove
    /// nothing.
    pub proof: Option<Vec<Arc<[u8]>>>,
}

/// Names in lower case, A-labels, without final dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// Every name.
    Any,
    /// This one.
    Exact(Arc<str>),
    /// Every name below this one, at any depth, and not itself.
    Below(Arc<str>),
}

impl HostPattern {
    /// Whether it stands for `name`, which is in the same form.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(own) => **own == *name,
            Self::Below(parent) => {
                name.strip_suffix(&**parent).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
        }
    }
}

/// A port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EgressPort {
    /// As it is dialled.
    pub number: u16,
    /// What is spoken.
    pub protocol: EgressProtocol,
    /// At the other side.
    pub target: u16,
}

/// What is spoken at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressProtocol {
    /// TLS or HTTP, as the first bytes tell; of addresses, anything.
    Detected,
    /// Bytes.
    Bytes,
    /// TLS.
    Tls,
    /// HTTP in plain text.
    Http,
    /// HTTP in TLS.
    Https,
}

/// What requests must be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressHttp {
    /// Upper case. None: any.
    pub methods: Vec<Arc<str>>,
    /// Of the normalised path. None: any.
    pub paths: Vec<EgressPath>,
}

/// A path of requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EgressPath {
    /// This one.
    Exact(Arc<str>),
    /// Everything that begins so: with a `/` at its end.
    Below(Arc<str>),
}

/// TLS that is added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Origination {
    /// Server name. `None`: the host that was asked for.
    pub server_name: Option<Arc<str>>,
    /// Roots, DER. None: those of the system.
    pub roots: Vec<Arc<[u8]>>,
    /// The certificate that is shown to the host: `<namespace of the policy>/<name>`. `None`: none.
    pub client_certificate: Option<Arc<str>>,
}

/// Where a host is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EgressEndpoint {
    /// An address or a name.
    pub at: EgressPlace,
    /// Ports of the rule to ports here, where they are others.
    pub ports: Vec<(u16, u16)>,
}

/// An address or a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EgressPlace {
    /// An address.
    Address(IpAddr),
    /// A name to be resolved.
    Host(Arc<str>),
}

impl EgressPolicy {
    /// What takes the place of a policy that cannot be read and has no good version. It may have been a ceiling only where
    /// that could be read.
    pub fn allows_nothing(id: &Arc<str>, version: &Arc<str>, ceiling: bool, reason: &str) -> Self {
        Self {
            id: id.clone(),
            version: version.clone(),
            record_only: false,
            ceiling,
            rules: Vec::new(),
            unreadable: Some(reason.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::HostPattern;

    #[test]
    fn a_wildcard_is_every_name_below_and_not_the_name_itself() {
        let below = HostPattern::Below("example.com".into());
        for (name, expected) in [
            ("a.example.com", true),
            ("b.a.example.com", true),
            ("example.com", false),
            (".example.com", false),
            ("aexample.com", false),
            ("example.com.evil.test", false),
            ("", false),
        ] {
            assert_eq!(below.matches(name), expected, "{name}");
        }
        assert!(HostPattern::Any.matches("x") && HostPattern::Exact("x".into()).matches("x"));
        assert!(!HostPattern::Exact("x".into()).matches("y.x"));
    }
}
