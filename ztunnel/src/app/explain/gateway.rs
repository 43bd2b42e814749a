//! What an egress gateway would do with a connection, for `tulle explain`: by the decision that its connections go through.
//!
//! What the client will say first is not known, so that which a rule allows is taken, and named, as at the source's node.

use std::sync::Arc;

use tulle_proto::node::{GatewayQuestion, InboundAnswer};

use crate::gateway::decide::{Asked, Decision, Spoken, decide, request};
use crate::hbone::headers::Authority;
use crate::http::Framing;
use crate::outcome::Outcome;
use crate::policy::egress::Grant;
use crate::state::{ServiceName, Snapshot};

/// The answer of the gateway whose Service is `service`, in its `network`.
///
/// # Errors
/// Why the question has no answer.
pub(in crate::app) fn through(
    snapshot: &Snapshot,
    network: &str,
    service: &Arc<ServiceName>,
    question: &GatewayQuestion,
) -> Result<InboundAnswer, String> {
    let uid = &question.source_uid;
    let source = snapshot.workload(uid).ok_or_else(|| format!("this gateway does not know the workload {uid}"))?;
    let address = source.addresses.first().ok_or_else(|| format!("the workload {uid} has no address"))?;
    let authority: Authority = question.target.parse()?;
    let asked = Asked::new(&network.into(), *address, &source.identity, service, &authority);
    let mut answer = InboundAnswer { generation: snapshot.generation(), ..InboundAnswer::default() };
    match judge(snapshot, &asked) {
        Ok((grant, condition)) => {
            answer.allowed = true;
            answer.policy = grant.policy.id.to_string();
            answer.rule = i32::try_from(grant.rule).unwrap_or(-1);
            answer.text = format!("let out by {} rules[{}]{condition}", grant.policy.id, grant.rule);
        }
        Err(outcome) => {
            answer.code = outcome.code.name().to_owned();
            answer.policy = outcome.policy.as_deref().unwrap_or_default().to_owned();
            answer.rule = outcome.rule.and_then(|rule| i32::try_from(rule).ok()).unwrap_or(-1);
            answer.text = outcome.detail.into_owned();
        }
    }
    Ok(answer)
}

fn judge(snapshot: &Snapshot, asked: &Asked) -> Result<(Grant, &'static str), Outcome> {
    let host = asked.host.as_deref();
    let words = [
        ("", Spoken::Unread),
        (", if the client begins with TLS for it", Spoken::Tls(host.map(str::to_owned))),
        (", if the client asks by HTTP (here: GET /)", Spoken::Http(Framing::One)),
        (", if the client speaks neither TLS nor HTTP", Spoken::Bytes),
    ];
    let mut refusal = None;
    for (condition, spoken) in words {
        let decided = match decide(snapshot, asked, &spoken) {
            Ok(Decision::Leave(grant)) => Ok(grant),
            Ok(Decision::Requests(_)) => request(snapshot, asked, host, "GET", "/"),
            Ok(Decision::Read) => continue,
            Err(outcome) => Err(outcome),
        };
        match decided {
            Ok(grant) => return Ok((grant, condition)),
            Err(outcome) if spoken == Spoken::Unread => return Err(outcome),
            Err(outcome) => refusal = refusal.or(Some(outcome)),
        }
    }
    Err(refusal.unwrap_or_else(|| Outcome::new(crate::outcome::Code::EgressDenied, "no rule allows it")))
}
