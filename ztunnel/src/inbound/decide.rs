//! Whether a connection may enter a local pod. Pure, and asked by `tulle explain` as well.

use std::net::{IpAddr, SocketAddr};

use tulle_certs::SpiffeId;
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::outcome::{Code, Outcome};
use crate::policy::{self, Facts, Verdict, network};
use crate::state::{AppProtocol, Snapshot, Transport, Workload};

/// Decides for a connection from `source`, who proved `identity` (`None`: plaintext), to the application at `target`.
///
/// # Errors
/// Why it may not enter, naming policy and rule.
pub fn decide(
    snapshot: &Snapshot,
    workload: &Workload,
    identity: Option<&SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
) -> Result<Verdict, Outcome> {
    let facts = entering(snapshot, workload, identity, source, target)?;
    enforced(policy::evaluate(snapshot, &facts))
}

/// Decides what can be decided of a connection whose requests are decided one by one; see [`requests_are_read`].
///
/// # Errors
/// Why it may not enter, naming policy and rule.
pub fn decide_connection(
    snapshot: &Snapshot,
    workload: &Workload,
    identity: Option<&SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
) -> Result<Verdict, Outcome> {
    let facts = entering(snapshot, workload, identity, source, target)?;
    enforced(policy::evaluate_connection(snapshot, &facts))
}

/// A verdict as what becomes of it.
fn enforced(verdict: Verdict) -> Result<Verdict, Outcome> {
    if verdict.allowed || authorization_is_broken() { Ok(verdict) } else { Err(denial(&verdict)) }
}

/// Decides a connection whose bytes are not HTTP although a policy speaks of requests: by what is left of the policies, and
/// never where a token would have to be looked at.
///
/// # Errors
/// Why it may not go on.
pub fn decide_bytes(
    snapshot: &Snapshot,
    workload: &Workload,
    identity: Option<&SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
) -> Result<Verdict, Outcome> {
    if !workload.request_auths.is_empty() && declared(snapshot, workload, target.port()) != Declared::Bytes {
        let text = format!(
            "a RequestAuthentication applies, and the bytes for port {} are not HTTP; if they are not meant to be, say so \
             with appProtocol: tcp or the name of the Service's port",
            target.port()
        );
        return Err(Outcome::new(Code::NotHttp, text));
    }
    decide(snapshot, workload, identity, source, target)
}

/// What the Services say of a port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// HTTP, also if only one of them does.
    Http,
    /// Something else.
    Bytes,
    /// Nothing.
    Unknown,
}

/// What the Services that `workload` belongs to say of its `port`.
pub fn declared(snapshot: &Snapshot, workload: &Workload, port: u16) -> Declared {
    let mut found = Declared::Unknown;
    for (key, ports) in workload.services.keys().filter_map(|key| Some((key, workload.services.get(key)?))) {
        let service = key.split_once('/').and_then(|(namespace, hostname)| snapshot.service(namespace, hostname));
        for own in ports.iter() {
            let defined = service.and_then(|service| service.port(own.service_port));
            let target =
                if own.target_port == 0 { defined.map_or(0, |port| port.target_port) } else { own.target_port };
            if target != port {
                continue;
            }
            let protocol = defined.map_or(own.app_protocol, |port| port.app_protocol);
            match protocol {
                AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => return Declared::Http,
                AppProtocol::Tcp | AppProtocol::Tls => found = Declared::Bytes,
                AppProtocol::Unknown => {}
            }
        }
    }
    found
}

/// Whether the requests of a connection to `port` are read and decided one by one.
pub fn requests_are_read(snapshot: &Snapshot, workload: &Workload, port: u16) -> bool {
    policy::needs_http(snapshot, workload) && declared(snapshot, workload, port) != Declared::Bytes
}

/// What holds for every connection, whatever it carries; then what policies are asked about.
fn entering<'a>(
    snapshot: &Snapshot,
    workload: &'a Workload,
    identity: Option<&'a SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
) -> Result<Facts<'a>, Outcome> {
    if matches!(target.port(), PORT_OUTBOUND | PORT_INBOUND_PLAINTEXT | PORT_HBONE) {
        let text = format!("port {} belongs to the proxy", target.port());
        return Err(Outcome::new(Code::SelfCall, text));
    }
    // A neighbour on the same link may address a packet so; without the redirect the kernel would have dropped it.
    if target.ip().is_loopback() {
        let text = format!("{} is the pod's own loopback, which nobody else reaches", target.ip());
        return Err(Outcome::new(Code::WrongDestination, text));
    }
    network::ingress(snapshot, workload, identity, source, Transport::Tcp, target.port()).outcome()?;
    Ok(facts(snapshot, workload, identity, source, target))
}

/// What policies are asked about.
pub fn facts<'a>(
    snapshot: &Snapshot,
    workload: &'a Workload,
    identity: Option<&'a SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
) -> Facts<'a> {
    Facts {
        source_identity: identity,
        source_ip: source,
        destination: workload,
        destination_ip: target.ip(),
        destination_port: target.port(),
        foreign: identity.is_some_and(|identity| snapshot.is_foreign(workload, identity)),
    }
}

/// The outcome of a verdict that denies.
pub fn denial(verdict: &Verdict) -> Outcome {
    let code = match verdict.code {
        policy::Code::PolicyDenied => Code::PolicyDenied,
        policy::Code::MtlsRequired => Code::MtlsRequired,
        policy::Code::PolicyPending => Code::PolicyPending,
        policy::Code::NotAllowed | policy::Code::Allowed | policy::Code::NoPolicy => Code::NotAllowed,
    };
    let dry_run = verdict.dry_run.clone();
    Outcome { code, detail: verdict.text().into(), policy: verdict.policy.clone(), rule: verdict.rule, dry_run }
}

/// Sabotage of test builds: `TULLE_BREAK=authz` lets everybody in.
pub(super) fn authorization_is_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "authz")
}

#[cfg(test)]
mod tests {
    use super::decide;
    use crate::outcome::Code;
    use crate::state::Change;
    use crate::state::fixtures::{snapshot, workload};
    use std::sync::Arc;

    #[test]
    fn the_proxys_ports_and_the_pods_loopback_are_not_reached_by_others() {
        let pod = workload("shop", "cart", "10.0.0.2");
        let snapshot = snapshot([Change::Workload(Arc::new(pod.clone()))]);
        for (target, expected) in [
            ("10.0.0.2:8080", None),
            ("10.0.0.2:15001", Some(Code::SelfCall)),
            ("10.0.0.2:15006", Some(Code::SelfCall)),
            ("10.0.0.2:15008", Some(Code::SelfCall)),
            ("127.0.0.2:8080", Some(Code::WrongDestination)),
            ("[::1]:8080", Some(Code::WrongDestination)),
        ] {
            let found = decide(&snapshot, &pod, None, "10.0.0.1".parse().unwrap(), target.parse().unwrap());
            assert_eq!(found.err().map(|outcome| outcome.code), expected, "{target}");
        }
    }
}
