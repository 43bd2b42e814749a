//! `/debug/explain`: what would happen to a connection, as its source and destination nodes decide it now.
//!
//! Control finds the pods and addresses that the names mean and joins two answers; it derives no verdict of its own. A
//! connection to a service has one answer per endpoint that the source may choose.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{EndpointChoice, InboundAnswer, InboundQuestion, OutboundAnswer, OutboundQuestion};

use crate::admin::State;
use crate::admin::View;
use crate::model::Pod;
use crate::resource::view::ip;

/// Most endpoints whose nodes are asked; the rest is counted.
const MAX_ENDPOINTS: usize = 16;

/// Query of `/debug/explain`.
#[derive(Deserialize)]
pub(super) struct Ask {
    from: Option<String>,
    to: Option<String>,
}

type Failure = (StatusCode, String);

/// The joined answer, or an error in words.
pub(super) async fn answer(state: &State, ask: &Ask) -> (StatusCode, Json<Value>) {
    match explain(state, ask).await {
        Ok(value) => (StatusCode::OK, Json(value)),
        Err((code, text)) => (code, Json(json!({"error": text}))),
    }
}

async fn explain(state: &State, ask: &Ask) -> Result<Value, Failure> {
    let (Some(from), Some(to)) = (&ask.from, &ask.to) else {
        return Err((StatusCode::BAD_REQUEST, "from and to are needed".into()));
    };
    let view = Arc::clone(&state.view.borrow());
    let source =
        find_pod(&view, from).ok_or_else(|| not_found(format!("there is no running pod or deployment {from}")))?;
    let (address, port) = find_target(&view, to).map_err(not_found)?;
    let question = OutboundQuestion {
        source_uid: state.settings.pod_uid(&source.meta),
        address: octets(address).into(),
        port: port.into(),
    };
    let outbound = match state.registry.ask(&source.node, Question::Outbound(question)).await {
        Ok(Answer::Outbound(outbound)) => outbound,
        Ok(_) => return Err(unavailable("the source node answered another question".into())),
        Err(error) => return Err(unavailable(error.to_string())),
    };
    let mut endpoints = Vec::new();
    let mut verdicts = Vec::new();
    for choice in outbound.endpoints.iter().take(MAX_ENDPOINTS) {
        let (value, allowed) = endpoint(state, &view, &outbound, source, choice).await;
        endpoints.push(value);
        verdicts.extend(allowed);
    }
    let refused = outbound.plan == "refuse";
    let verdict = match (refused, verdicts.iter().all(|a| *a), verdicts.iter().any(|a| *a)) {
        (true, ..) => "refused",
        _ if outbound.endpoints.is_empty() => "plain",
        _ if verdicts.is_empty() => "unknown",
        (_, true, _) => "allowed",
        (_, _, true) => "partly",
        _ => "denied",
    };
    Ok(json!({
        "from": {"pod": source.meta.path(), "node": source.node, "identity": outbound.source_identity},
        "to": {"address": address.to_string(), "port": port, "service": outbound.service},
        "verdict": verdict,
        "outbound": {
            "plan": outbound.plan,
            "code": outbound.code,
            "text": outbound.text,
            "policy": outbound.policy,
            "sourceAddress": ip(&outbound.source_address),
            "generation": outbound.generation,
        },
        "endpoints": endpoints,
        "endpointsNotShown": outbound.endpoints.len().saturating_sub(MAX_ENDPOINTS),
    }))
}

/// One endpoint, with its node's verdict if its node is one of ours.
async fn endpoint(
    state: &State,
    view: &View,
    outbound: &OutboundAnswer,
    source: &Pod,
    choice: &EndpointChoice,
) -> (Value, Option<bool>) {
    let mut value = json!({
        "pod": format!("{}/{}", choice.namespace, choice.name),
        "uid": choice.uid,
        "node": choice.node,
        "address": ip(&choice.address),
        "port": choice.port,
        "sharePercent": choice.share_percent,
        "protocol": choice.protocol,
        "expectedIdentities": choice.expected_identities,
    });
    if !choice.text.is_empty() {
        value["egress"] = json!({
            "allowed": choice.code.is_empty(),
            "code": choice.code,
            "text": choice.text,
            "policy": choice.policy,
        });
    }
    // The destination is never asked about what does not leave; its verdict is shown all the same.
    let left = choice.code.is_empty();
    let refused = (!left).then_some(false);
    let key = (choice.namespace.clone(), choice.name.clone());
    let captured = view.world().pods.contains_key(&key);
    if !captured {
        value["note"] = json!("not a pod of the mesh: nobody authorises there");
        return (value, refused);
    }
    let question = InboundQuestion {
        destination_uid: choice.uid.clone(),
        address: choice.address.clone(),
        port: choice.port,
        source_identity: if choice.protocol == "hbone" { outbound.source_identity.clone() } else { String::new() },
        source_address: if outbound.source_address.is_empty() {
            source.addresses.first().map(|ip| octets(*ip)).unwrap_or_default().into()
        } else {
            outbound.source_address.clone()
        },
    };
    match state.registry.ask(&choice.node, Question::Inbound(question)).await {
        Ok(Answer::Inbound(inbound)) => {
            value["inbound"] = inbound_view(&inbound);
            (value, Some(left && inbound.allowed))
        }
        Ok(_) => {
            value["error"] = json!("the destination node answered another question");
            (value, refused)
        }
        Err(error) => {
            value["error"] = json!(error.to_string());
            (value, refused)
        }
    }
}

fn inbound_view(inbound: &InboundAnswer) -> Value {
    json!({
        "allowed": inbound.allowed,
        "code": inbound.code,
        "text": inbound.text,
        "policy": inbound.policy,
        "rule": if inbound.policy.is_empty() || inbound.rule < 0 { Value::Null } else { json!(inbound.rule) },
        "evaluated": inbound.evaluated,
        "dryRun": inbound.dry_run,
        "policyVersions": inbound.policy_versions,
        "generation": inbound.generation,
    })
}

fn not_found(text: String) -> Failure {
    (StatusCode::NOT_FOUND, text)
}

fn unavailable(text: String) -> Failure {
    (StatusCode::BAD_GATEWAY, text)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// `ns/pod`, or `ns/deployment` meaning its first running pod.
fn find_pod<'a>(view: &'a View, name: &str) -> Option<&'a Pod> {
    let (namespace, name) = name.split_once('/')?;
    let pods = &view.world().pods;
    if let Some(pod) = pods.get(&(namespace.to_owned(), name.to_owned())) {
        return pod.takes_part().then_some(pod);
    }
    pods.values()
        .map(|pod| &**pod)
        .find(|pod| pod.meta.namespace == namespace && pod.takes_part() && belongs_to(pod, name))
}

/// By owner, or by the names that Deployments and the lab give their pods.
fn belongs_to(pod: &Pod, deployment: &str) -> bool {
    let owned = pod.meta.owner.as_ref().is_some_and(|owner| {
        let hash = pod.meta.label("pod-template-hash").unwrap_or_default();
        owner.name == deployment || owner.name == format!("{deployment}-{hash}")
    });
    let numbered = || {
        let rest = pod.meta.name.strip_prefix(deployment)?.strip_prefix('-')?;
        (!rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit())).then_some(())
    };
    owned || numbered().is_some()
}

/// `ip:port`, `ns/service[:port]` or `ns/pod:port`.
fn find_target(view: &View, text: &str) -> Result<(IpAddr, u16), String> {
    if let Ok(socket) = text.parse::<std::net::SocketAddr>() {
        return Ok((socket.ip(), socket.port()));
    }
    let (path, port) = match text.rsplit_once(':') {
        Some((path, port)) => {
            let port = port.parse::<u16>().map_err(|_| format!("`{port}` is not a port"))?;
            (path, Some(port))
        }
        None => (text, None),
    };
    let shape = || format!("`{text}` is none of ns/service[:port], ns/pod:port, ip:port");
    let (namespace, name) = path.split_once('/').ok_or_else(shape)?;
    let key = (namespace.to_owned(), name.to_owned());
    if let Some(service) = view.world().services.get(&key)
        && let Some(address) = service.addresses.first()
    {
        // Without a port the first one is meant; the answer shows which.
        let port = port.or_else(|| service.ports.first().map(|first| first.port));
        let port = port.ok_or_else(|| format!("{path} has no TCP port; name one, as in {path}:80"))?;
        return Ok((*address, port));
    }
    let pod = find_pod(view, path).ok_or_else(|| format!("there is no service or running pod {path}"))?;
    let port = port.ok_or_else(|| format!("{path} is a pod: a port is needed, as in {path}:8080"))?;
    let address = pod.addresses.first().ok_or_else(shape)?;
    Ok((*address, port))
}
