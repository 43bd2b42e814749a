//! What may leave the cluster: one pure answer to "may this pod reach this name or address", for nodes and gateways alike.
//!
//! A pod whose namespace is open is not asked. Otherwise an attempt needs a rule of an enforced policy, and besides one of each
//! ceiling; the rule says how it goes out. A name counts only if it is bound: the caller has it from a virtual address that this
//! pod was given for that name, or from the gateway's CONNECT. An address counts as itself and by `cidrs` alone, whatever name the
//! client's bytes claim. What a name resolves to is judged again ([`may_dial`]): names of others must not lead back inside.
//! Closed by default: a policy that has not arrived, or cannot be read, allows nothing.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::outcome::{Code, Outcome};
use crate::policy::inside::inside;
use crate::state::{EgressMode, EgressPath, EgressPolicy, EgressPort, EgressProtocol, EgressRule, Snapshot, Workload};

/// Policies named in a denial; of more, the rest is counted.
const NAMED: usize = 4;

/// One attempt to leave. Names are in lower case, without a final dot.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// The name that it is bound to; `None`: an address was dialled.
    pub host: Option<&'a str>,
    /// The address that was dialled as such; `None`: a name.
    pub address: Option<IpAddr>,
    /// Port, as it was dialled.
    pub port: u16,
    /// What the client speaks.
    pub spoken: Spoken<'a>,
}

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken<'a> {
    /// Something else, or nothing was looked at.
    Bytes,
    /// TLS, with this server name.
    Tls(Option<&'a str>),
    /// HTTP in plain text: a request.
    Http {
        /// Host or `:authority`, without port.
        host: Option<&'a str>,
        /// Method.
        method: &'a str,
        /// Normalised path.
        path: &'a str,
    },
}

/// Which rule allows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The policy.
    pub policy: Arc<EgressPolicy>,
    /// Index of its rule.
    pub rule: usize,
    /// Port at the other side.
    pub target: u16,
}

impl Grant {
    /// The rule.
    pub fn rule(&self) -> &EgressRule {
        &self.policy.rules[self.rule]
    }
}

/// What is asked of a pod that wants to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// It is decided and recorded, and passes in any case.
    Record,
    /// What is not allowed is refused.
    Enforce,
}

/// What is asked of `workload`.
pub fn asked(workload: &Workload) -> Asked {
    match workload.egress {
        EgressMode::Allow => Asked::Nothing,
        EgressMode::Audit => Asked::Record,
        EgressMode::Deny => Asked::Enforce,
    }
}

/// Policies of a workload, all of which are here.
fn policies<'s>(snapshot: &'s Snapshot, workload: &Workload) -> Result<Vec<&'s Arc<EgressPolicy>>, Outcome> {
    let missing = |id: Option<&Arc<str>>| {
        let text = match id {
            Some(id) => format!("{id} has not arrived; retry"),
            None => "the pod's policies have not arrived; retry".to_owned(),
        };
        Outcome { policy: id.cloned(), ..Outcome::new(Code::PolicyPending, text) }
    };
    let found: Result<Vec<_>, _> =
        workload.egress_policies.iter().map(|id| snapshot.egress_policy(id).ok_or(id)).collect();
    let found = found.map_err(|id| missing(Some(id)))?;
    if workload.policies_pending { Err(missing(None)) } else { Ok(found) }
}

/// Decides an attempt to leave the cluster, whatever is asked of the pod.
///
/// # Errors
/// Why it may not.
pub fn decide(snapshot: &Snapshot, workload: &Workload, attempt: &Attempt<'_>) -> Result<Grant, Outcome> {
    let policies = policies(snapshot, workload)?;
    if let Some(why) = contradiction(attempt) {
        return Err(denied(workload, attempt, &policies, &why));
    }
    let enforced = || policies.iter().filter(|policy| !policy.record_only);
    let granting = enforced().filter(|policy| !policy.ceiling);
    let grant = granting.into_iter().find_map(|policy| grant(policy, attempt));
    let Some(grant) = grant else {
        return Err(denied(workload, attempt, &policies, "no rule allows it"));
    };
    match enforced().find(|policy| policy.ceiling && self::grant(policy, attempt).is_none()) {
        None => Ok(grant),
        Some(ceiling) => {
            let why = format!("{} would allow it, and it is above the ceiling {}", grant.policy.id, ceiling.id);
            Err(Outcome { policy: Some(ceiling.id.clone()), ..denied(workload, attempt, &[], &why) })
        }
    }
}

/// What the client's bytes say against the name that the attempt is bound to.
fn contradiction(attempt: &Attempt<'_>) -> Option<String> {
    let bound = attempt.host?;
    match attempt.spoken {
        Spoken::Tls(Some(name)) if name != bound => {
            Some(format!("its server name is {name}, and {bound} was looked up"))
        }
        Spoken::Http { host, .. } if host != Some(bound) => {
            Some(format!("its Host is {}, and {bound} was looked up", host.unwrap_or("missing")))
        }
        _ => None,
    }
}

fn grant(policy: &Arc<EgressPolicy>, attempt: &Attempt<'_>) -> Option<Grant> {
    policy.rules.iter().enumerate().find_map(|(index, rule)| {
        let target = allows(rule, policy.ceiling, attempt)?;
        Some(Grant { policy: policy.clone(), rule: index, target })
    })
}

/// The port at the other side, if `rule` allows it.
fn allows(rule: &EgressRule, ceiling: bool, attempt: &Attempt<'_>) -> Option<u16> {
    let by_name = attempt.host.is_some_and(|host| rule.hosts.iter().any(|pattern| pattern.matches(host)));
    let by_address =
        attempt.host.is_none() && attempt.address.is_some_and(|address| covered(&rule.cidrs, address.to_canonical()));
    if !by_name && !by_address {
        return None;
    }
    let any = [EgressPort { number: attempt.port, protocol: EgressProtocol::Detected, target: attempt.port }];
    let ports = if rule.ports.is_empty() { &any[..] } else { &rule.ports };
    let mut fitting = ports.iter().filter(|port| port.number == attempt.port);
    let found = fitting.find(|port| {
        // A ceiling that does not say what is spoken leaves that to the rule below it.
        (ceiling && port.protocol == EgressProtocol::Detected) || speaks(port.protocol, rule, attempt, by_name)
    })?;
    let requests = rule.http.as_ref().is_none_or(|http| match attempt.spoken {
        Spoken::Http { method, path, .. } => {
            let path_fits = |pattern: &EgressPath| match pattern {
                EgressPath::Exact(own) => **own == *path,
                EgressPath::Below(own) => path.starts_with(&**own),
            };
            (http.methods.is_empty() || http.methods.iter().any(|own| **own == *method))
                && (http.paths.is_empty() || http.paths.iter().any(path_fits))
        }
        _ => false,
    });
    requests.then_some(found.target)
}

fn speaks(protocol: EgressProtocol, rule: &EgressRule, attempt: &Attempt<'_>, by_name: bool) -> bool {
    // What a host has to prove is the server name.
    if rule.proof.is_some() && !matches!(attempt.spoken, Spoken::Tls(Some(_))) {
        return false;
    }
    // Where TLS is added, the client speaks plain text to us.
    if rule.originate.is_some() {
        return match protocol {
            EgressProtocol::Bytes | EgressProtocol::Tls => attempt.spoken == Spoken::Bytes,
            _ => matches!(attempt.spoken, Spoken::Http { .. }),
        };
    }
    match (protocol, attempt.spoken) {
        // A server name is what tells one virtual host from another; without one a name is not proven to be meant.
        (EgressProtocol::Tls | EgressProtocol::Https | EgressProtocol::Detected, Spoken::Tls(name)) => {
            name.is_some() || !by_name
        }
        (EgressProtocol::Http | EgressProtocol::Detected, Spoken::Http { .. }) => true,
        (EgressProtocol::Bytes, _) => true,
        (EgressProtocol::Detected, Spoken::Bytes) => !by_name,
        _ => false,
    }
}

/// Whether the client's first bytes say something that the decision needs: some rule for that destination and port is not about
/// bytes. Where none is, a server may speak first.
pub fn needs_first_bytes(snapshot: &Snapshot, workload: &Workload, attempt: &Attempt<'_>) -> bool {
    let policies = workload.egress_policies.iter().filter_map(|id| snapshot.egress_policy(id));
    let about = |rule: &EgressRule| {
        let by_name = attempt.host.is_some_and(|host| rule.hosts.iter().any(|pattern| pattern.matches(host)));
        by_name || attempt.address.is_some_and(|address| covered(&rule.cidrs, address.to_canonical()))
    };
    let mut enforced = policies.filter(|policy| !policy.record_only);
    enforced.any(|policy| {
        policy.rules.iter().filter(|rule| about(rule)).any(|rule| {
            let asks = |port: &EgressPort| match port.protocol {
                EgressProtocol::Bytes => false,
                EgressProtocol::Detected => !policy.ceiling,
                EgressProtocol::Tls | EgressProtocol::Http | EgressProtocol::Https => true,
            };
            let mut here = rule.ports.iter().filter(|port| port.number == attempt.port).peekable();
            let covers = rule.ports.is_empty() || here.peek().is_some();
            let reads = rule.http.is_some() || rule.proof.is_some();
            (covers && reads) || (rule.ports.is_empty() && !policy.ceiling) || here.any(asks)
        })
    })
}

/// Whether any rule may allow `host` at some port: whether its name may be looked up.
///
/// # Errors
/// Why not.
pub fn may_look_up(snapshot: &Snapshot, workload: &Workload, host: &str) -> Result<(), Outcome> {
    let policies = policies(snapshot, workload)?;
    let names = |policy: &&&Arc<EgressPolicy>| {
        policy.rules.iter().any(|rule| rule.hosts.iter().any(|pattern| pattern.matches(host)))
    };
    let enforced = || policies.iter().filter(|policy| !policy.record_only);
    let granted = enforced().filter(|policy| !policy.ceiling).any(|policy| names(&policy));
    let above = enforced().find(|policy| policy.ceiling && !names(policy));
    let attempt = Attempt { host: Some(host), address: None, port: 0, spoken: Spoken::Bytes };
    match (granted, above) {
        (true, None) => Ok(()),
        (true, Some(ceiling)) => {
            let why = format!("it is above the ceiling {}", ceiling.id);
            Err(Outcome { policy: Some(ceiling.id.clone()), ..denied(workload, &attempt, &[], &why) })
        }
        (false, _) => Err(denied(workload, &attempt, &policies, "no rule allows it")),
    }
}

/// The name that an address stands for by a rule of the pod: `addresses` of a ServiceEntry.
pub fn stands_for<'s>(snapshot: &'s Snapshot, workload: &Workload, address: IpAddr) -> Option<&'s Arc<str>> {
    let policies = workload.egress_policies.iter().filter_map(|id| snapshot.egress_policy(id));
    let mut rules = policies.flat_map(|policy| &policy.rules);
    rules.find_map(|rule| match rule.hosts.first() {
        Some(crate::state::HostPattern::Exact(host)) if covered(&rule.stands_for, address.to_canonical()) => Some(host),
        _ => None,
    })
}

fn covered(nets: &[IpNet], address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

fn denied(workload: &Workload, attempt: &Attempt<'_>, policies: &[&Arc<EgressPolicy>], why: &str) -> Outcome {
    let mut text = format!("{} is outside the cluster: {why}", attempt.described());
    let names: Vec<&str> = policies.iter().map(|policy| &*policy.id).collect();
    match names.as_slice() {
        [] => {
            let _ = write!(text, " (namespace {}: tulle.dev/egress: deny)", workload.namespace);
        }
        names => {
            let shown = names[..names.len().min(NAMED)].join(", ");
            let more = names.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let _ = write!(text, " (namespace {}: tulle.dev/egress: deny; {shown}{more})", workload.namespace);
        }
    }
    if let Some(broken) = policies.iter().find(|policy| policy.unreadable.is_some()) {
        let _ = write!(text, "; {} cannot be read", broken.id);
    }
    let policy = policies.first().map(|policy| policy.id.clone());
    Outcome { policy, ..Outcome::new(Code::EgressDenied, text) }
}

impl Attempt<'_> {
    /// `api.example:443 (TLS, server name api.example)`.
    fn described(&self) -> String {
        let target = match (self.host, self.address) {
            (Some(host), _) => host.to_owned(),
            (None, Some(address)) => address.to_string(),
            (None, None) => "?".to_owned(),
        };
        if self.port == 0 {
            return target;
        }
        let port = self.port;
        match self.spoken {
            Spoken::Bytes => format!("{target} port {port}"),
            Spoken::Tls(Some(name)) => format!("{target} port {port} (TLS, server name {name})"),
            Spoken::Tls(None) => format!("{target} port {port} (TLS without server name)"),
            Spoken::Http { host, method, path } => {
                format!("{target} port {port} ({method} {path}, Host {})", host.unwrap_or("missing"))
            }
        }
    }
}

/// Whether what a rule's name resolved to, or an address that a rule allows, may be dialled. What is of the Internet may. Loopback,
/// multicast and what is inside the cluster never: names of others must not lead there. Addresses of the node, link-local ones and
/// where clouds keep their metadata only where a block of the rule's `cidrs` covers them that is no larger than their own range; what
/// is private otherwise, where any block does.
///
/// # Errors
/// Why not, as one clause.
pub fn may_dial(snapshot: &Snapshot, network: &str, rule: &EgressRule, address: IpAddr) -> Result<(), String> {
    let address = address.to_canonical();
    let Some(why) = inside(snapshot, network, address).or_else(|| is_azure(address).then_some("cloud metadata")) else {
        return Ok(());
    };
    let refused = |hint: &str| Err(format!("{address} is {why}{hint}"));
    let of_pod = snapshot.workload_by_ip(network, address).is_some_and(|workload| workload.is_pod());
    let nobody = address.is_loopback() || address.is_unspecified() || address.is_multicast() || is_virtual(address);
    if of_pod || nobody || snapshot.is_cluster_address(network, address) {
        return refused("");
    }
    let special = is_link_local(address) || snapshot.is_own_node(address) || is_metadata(address);
    let least = match (special, address) {
        (false, _) => 0,
        (true, IpAddr::V4(_)) => 16,
        (true, IpAddr::V6(_)) => 10,
    };
    let named = |net: &IpNet| net.prefix_len() >= least && net.contains(&address);
    match rule.cidrs.iter().any(named) {
        true => Ok(()),
        false if special => refused(", and no narrow block of the rule's cidrs covers it"),
        false => refused(", and the rule's cidrs do not cover it"),
    }
}

/// Virtual addresses of names, which are nobody's, and IPv4's broadcast.
fn is_virtual(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_broadcast() || matches!(v4.octets(), [240, 240, ..]),
        IpAddr::V6(v6) => matches!(v6.segments(), [0x2001, 2, 0, ..]),
    }
}

/// Also one that is only wrapped into a translation's address.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => match v6.segments() {
            [0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, _] | [0x2002, 0xa9fe, ..] => true,
            segments => segments[0] & 0xffc0 == 0xfe80,
        },
    }
}

/// Azure's, which is a public address by its number.
fn is_azure(address: IpAddr) -> bool {
    address == IpAddr::from([168, 63, 129, 16])
}

/// Where clouds serve metadata and credentials besides link-local addresses.
fn is_metadata(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_azure(address) || [[100, 100, 100, 200], [192, 0, 0, 192]].contains(&v4.octets()),
        IpAddr::V6(v6) => matches!(v6.segments(), [0xfd00, 0xec2, ..] | [0xfd20, 0xce, ..]),
    }
}

#[cfg(test)]
mod tests;
