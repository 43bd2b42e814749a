//! Whether a connection may enter a local pod. Pure, and asked by `tulle explain` as well.

use std::net::{IpAddr, SocketAddr};

use tulle_certs::SpiffeId;
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::outcome::{Code, Outcome};
use crate::policy::{self, Facts, Verdict, network};
use crate::state::{Snapshot, Transport, Workload};

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
    let facts = Facts {
        source_identity: identity,
        source_ip: source,
        destination: workload,
        destination_ip: target.ip(),
        destination_port: target.port(),
        foreign: identity.is_some_and(|identity| snapshot.is_foreign(workload, identity)),
    };
    let verdict = policy::evaluate(snapshot, &facts);
    if verdict.allowed || authorization_is_broken() {
        return Ok(verdict);
    }
    Err(denial(&verdict))
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
fn authorization_is_broken() -> bool {
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
