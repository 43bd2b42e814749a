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
    network::ingress(snapshot, workload, identity, source, Transport::Tcp, target.port()).outcome()?;
    let facts = Facts {
        source_identity: identity,
        source_ip: source,
        destination: workload,
        destination_ip: target.ip(),
        destination_port: target.port(),
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
