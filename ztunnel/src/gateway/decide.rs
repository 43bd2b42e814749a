//! Who asks the gateway for what, and whether that may be. Pure: the decision is the one that the pod's node makes
//! ([`crate::policy::egress`]), with the pod found by the address and the identity of its tunnel.
//!
//! Only a rule that names this gateway counts: what may leave from the node directly, or through another gateway, is not let
//! out here. Whatever a namespace's label says, nothing leaves by a gateway that no rule sends there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::hbone::headers::Authority;
use crate::http::Framing;
use crate::outcome::{Code, Outcome};
use crate::policy::egress::{self, Attempt, Grant};
use crate::state::{EgressPlace, ServiceName, Snapshot, Workload};

/// Who asks for what.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The gateway's network.
    pub network: Arc<str>,
    /// Where the tunnel comes from.
    pub source: IpAddr,
    /// Who it proved to be.
    pub identity: SpiffeId,
    /// The Service that stands for this gateway.
    pub gateway: Arc<ServiceName>,
    /// Host or address, and port, in the form in which rules have them.
    pub host: Option<Box<str>>,
    /// The address, where that was asked for.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
}

/// What the client speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// Nothing was read.
    Unread,
    /// TLS, with this server name.
    Tls(Option<String>),
    /// HTTP in plain text.
    Http(Framing),
    /// Something else.
    Bytes,
}

/// What becomes of a connection.
#[derive(Clone, Debug)]
pub enum Decision {
    /// The client's first bytes have to be read, and asked with.
    Read,
    /// Each request is decided for itself ([`request`]).
    Requests(Framing),
    /// It may leave.
    Leave(Grant),
}

/// Where to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// An address.
    Address(SocketAddr),
    /// A name to be resolved, and a port.
    Name(Box<str>, u16),
}

impl Asked {
    /// What `authority` asks for.
    pub fn new(
        network: &Arc<str>,
        source: IpAddr,
        identity: &SpiffeId,
        gateway: &Arc<ServiceName>,
        authority: &Authority,
    ) -> Self {
        let (host, address, port) = match authority {
            Authority::Address(at) => (None, Some(at.ip().to_canonical()), at.port()),
            Authority::Host(host, port) => {
                let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
                (Some(host.into_boxed_str()), None, *port)
            }
        };
        let (network, identity, gateway) = (network.clone(), identity.clone(), gateway.clone());
        Self { network, source, identity, gateway, host, address, port }
    }

    /// Host or address, for TLS and for people.
    pub fn name(&self) -> String {
        match (&self.host, self.address) {
            (Some(host), _) => host.to_string(),
            (None, Some(address)) => address.to_string(),
            (None, None) => String::new(),
        }
    }

    /// Host or address and port.
    pub fn target(&self) -> String {
        match self.address {
            Some(IpAddr::V6(ip)) => format!("[{ip}]:{}", self.port),
            _ => format!("{}:{}", self.name(), self.port),
        }
    }

    fn attempt<'a>(&'a self, spoken: egress::Spoken<'a>) -> Attempt<'a> {
        Attempt { host: self.host.as_deref(), address: self.address, port: self.port, spoken }
    }
}

/// The pod at the other end of a tunnel: the one with its address, if its account is the identity that was proven.
pub fn source<'s>(snapshot: &'s Snapshot, network: &str, ip: IpAddr, identity: &SpiffeId) -> Option<&'s Arc<Workload>> {
    snapshot.workload_by_ip(network, ip).filter(|workload| workload.is_pod() && workload.identity == *identity)
}

fn client<'s>(snapshot: &'s Snapshot, asked: &Asked) -> Result<&'s Arc<Workload>, Outcome> {
    source(snapshot, &asked.network, asked.source, &asked.identity).ok_or_else(|| {
        let text = format!(
            "the tunnel comes from {}, and no pod of {} is known there; an egress gateway serves pods of the mesh only",
            asked.source, asked.identity
        );
        Outcome::new(Code::EgressDenied, text)
    })
}

/// Decides what can be decided of a connection.
///
/// # Errors
/// Why it may not leave.
pub fn decide(snapshot: &Snapshot, asked: &Asked, spoken: &Spoken) -> Result<Decision, Outcome> {
    let workload = client(snapshot, asked)?;
    let spoken = match spoken {
        Spoken::Unread if egress::needs_first_bytes(snapshot, workload, &asked.attempt(egress::Spoken::Bytes)) => {
            // Nothing is read for a host that no rule names.
            may_be_named(snapshot, workload, asked)?;
            return Ok(Decision::Read);
        }
        Spoken::Http(framing) => {
            may_be_named(snapshot, workload, asked)?;
            return Ok(Decision::Requests(*framing));
        }
        Spoken::Tls(name) => egress::Spoken::Tls(name.as_deref()),
        Spoken::Unread | Spoken::Bytes => egress::Spoken::Bytes,
    };
    by_this(egress::decide(snapshot, workload, &asked.attempt(spoken))?, asked).map(Decision::Leave)
}

/// Whether any rule speaks of the host at all.
fn may_be_named(snapshot: &Snapshot, workload: &Workload, asked: &Asked) -> Result<(), Outcome> {
    asked.host.as_deref().map_or(Ok(()), |host| egress::may_look_up(snapshot, workload, host))
}

/// Decides one request of a connection. `host`: what it says that it is for, without port.
///
/// # Errors
/// Why it may not leave.
pub fn request(
    snapshot: &Snapshot,
    asked: &Asked,
    host: Option<&str>,
    method: &str,
    path: &str,
) -> Result<Grant, Outcome> {
    let workload = client(snapshot, asked)?;
    let spoken = egress::Spoken::Http { host, method, path };
    by_this(egress::decide(snapshot, workload, &asked.attempt(spoken))?, asked)
}

/// The grant, if its rule leads through this gateway.
fn by_this(grant: Grant, asked: &Asked) -> Result<Grant, Outcome> {
    let rule = grant.rule();
    if rule.gateway.as_ref() == Some(&*asked.gateway) {
        return Ok(grant);
    }
    let way = match &rule.gateway {
        Some(other) => format!("through {}/{}", other.namespace, other.hostname),
        None => "from the node directly".to_owned(),
    };
    let text = format!(
        "{} is allowed by rule {} of {} {way}, and not through {}/{}",
        asked.target(),
        grant.rule,
        grant.policy.id,
        asked.gateway.namespace,
        asked.gateway.hostname
    );
    let mut outcome = Outcome::new(Code::EgressDenied, text);
    (outcome.policy, outcome.rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
    Err(outcome)
}

/// Where a connection that may leave is dialled.
pub fn targets(asked: &Asked, grant: &Grant) -> Vec<To> {
    let rule = grant.rule();
    if !rule.endpoints.is_empty() {
        let to = rule.endpoints.iter().map(|endpoint| {
            let port = endpoint.ports.iter().find(|(of, _)| *of == asked.port).map_or(grant.target, |(_, here)| *here);
            match &endpoint.at {
                EgressPlace::Address(ip) => To::Address(SocketAddr::new(*ip, port)),
                EgressPlace::Host(host) => To::Name((**host).into(), port),
            }
        });
        return to.collect();
    }
    match (&asked.host, asked.address) {
        (Some(host), _) => vec![To::Name(host.clone(), grant.target)],
        (None, Some(ip)) => vec![To::Address(SocketAddr::new(ip, grant.target))],
        (None, None) => Vec::new(),
    }
}

/// Whether two grants are carried out alike, so that requests may share a connection.
pub fn same_way(one: &Grant, two: &Grant) -> bool {
    let ((a, b), targets) = ((one.rule(), two.rule()), one.target == two.target);
    targets && a.originate == b.originate && a.endpoints == b.endpoints && a.cidrs == b.cidrs
}
