//! `/debug/explain`: what would happen to a connection, as its source and destination nodes decide it now.
//!
//! Control finds the pods and addresses that the names mean ([`target`]) and joins two answers; it derives no verdict of
//! its own. A connection to a service has one answer per endpoint that the source may choose, and a request ([`request`])
//! one per endpoint that a route may lead it to. What no proxy sends, a client outside the mesh and datagrams, may reach
//! whatever control knows behind the address.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tulle_proto::node;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::{
    EndpointChoice, GatewayQuestion, InboundAnswer, InboundQuestion, OutboundAnswer, OutboundQuestion, RequestHead,
    node_question,
};

use crate::admin::State;
use crate::admin::View;
use crate::admin::absent;
use crate::admin::request;
use crate::admin::target;
use crate::admin::target::{Asked, Source, Target};
use crate::admin::traffic;
use crate::model::Transport;
use crate::nodes::gateway_name;
use crate::resource::ResourceSet;
use crate::resource::view::ip;
use crate::translate::why_outside;

/// Most endpoints whose nodes are asked; the rest is counted.
const MAX_ENDPOINTS: usize = 16;

/// Query of `/debug/explain`.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Ask {
    pub(super) from: Option<String>,
    pub(super) to: Option<String>,
    /// `tcp`, `udp`, `sctp`; absent: TCP.
    pub(super) transport: Option<String>,
    /// `v4`, `v6`; absent: the first address.
    pub(super) family: Option<String>,
    /// Of a request. If none of these is there, the question is about a connection.
    pub(super) method: Option<String>,
    /// With query; absent: `/`.
    pub(super) path: Option<String>,
    /// Absent: the name of the target.
    pub(super) host: Option<String>,
    /// Lines of `name: value`.
    pub(super) headers: Option<String>,
}

type Failure = (StatusCode, String);

/// What is asked of the nodes besides who and where.
struct Question {
    over: Asked,
    /// `None`: the connection is meant.
    head: Option<RequestHead>,
}

/// The joined answer, or an error in words.
pub(super) async fn answer(state: &State, ask: &Ask) -> (StatusCode, Json<Value>) {
    match explain(state, ask).await {
        Ok(value) => (StatusCode::OK, Json(value)),
        Err((code, text)) => (code, Json(json!({"error": text}))),
    }
}

/// What the source does with a connection to one address.
struct Leaving {
    answer: OutboundAnswer,
    endpoints: Vec<EndpointChoice>,
}

/// What was found about one endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Allowed,
    Denied,
    /// Nobody authorises there.
    Open,
    /// Its node did not answer.
    Unknown,
}

async fn explain(state: &State, ask: &Ask) -> Result<Value, Failure> {
    let (Some(from), Some(to)) = (&ask.from, &ask.to) else {
        return Err((StatusCode::BAD_REQUEST, "from and to are needed".into()));
    };
    let asked = Asked::parse(ask.transport.as_deref(), ask.family.as_deref())
        .map_err(|text| (StatusCode::BAD_REQUEST, text))?;
    let view = Arc::clone(&state.view.borrow());
    let set = Arc::clone(&state.published.borrow().set);
    let source = target::source(&view, from).map_err(not_found)?;
    let asked = source.narrow(asked);
    let target = target::find(&view, &set, &state.settings, &source, asked, to).map_err(not_found)?;
    let head = request::head(ask, &target).map_err(|text| (StatusCode::BAD_REQUEST, text))?;
    let asked = Question { over: asked, head };
    let (outbound, choices) = leave(state, &view, &set, &source, &asked, &target).await?;
    let mut endpoints = Vec::new();
    let mut found = Vec::new();
    for choice in choices.iter().take(MAX_ENDPOINTS) {
        let (value, one) = match (&source, outbound.gateway_target.is_empty()) {
            (Source::Pod(pod), false) => gateway(state, &state.settings.pod_uid(&pod.meta), &outbound, choice).await,
            _ => endpoint(state, &view, &outbound, &asked, choice).await,
        };
        endpoints.push(value);
        found.push(one);
    }
    let (pod, node) = match &source {
        Source::Pod(pod) => (Some(pod.meta.path()), Some(&pod.node)),
        Source::Address(_) => (None, None),
    };
    let answers = outbound.request.as_ref().is_some_and(|request| !request.answers.is_empty());
    let mut value = json!({
        "from": {
            "pod": pod,
            "node": node,
            "address": ip(&outbound.source_address),
            "identity": outbound.source_identity,
        },
        "to": {
            "address": target.addresses.first().map(ToString::to_string),
            "host": target.host,
            "port": target.port,
            "transport": target::word(asked.over.transport),
            "service": if outbound.service.is_empty() { &target.service } else { &outbound.service },
        },
        "verdict": verdict(outbound.plan == "refuse", answers, &found),
        "outbound": {
            "plan": outbound.plan,
            "code": outbound.code,
            "text": outbound.text,
            "policy": outbound.policy,
            "rule": outbound.rule,
            "sourceAddress": ip(&outbound.source_address),
            "generation": outbound.generation,
        },
        "endpoints": endpoints,
        "endpointsNotShown": choices.len().saturating_sub(MAX_ENDPOINTS),
        "hints": hints(&view, state, &source, &target, asked.over.transport, choices.is_empty()),
    });
    let service = value["to"]["service"].as_str().unwrap_or_default().to_owned();
    if !service.is_empty() && asked.over.transport == Transport::Tcp {
        let nodes = choices.iter().take(MAX_ENDPOINTS).map(|choice| &choice.node).chain(node);
        let seen = traffic::seen_by(state, nodes.cloned().collect()).await;
        value["traffic"] = seen[&service].clone();
    }
    if let Some(head) = &asked.head {
        value["request"] = request::leaving(head, &outbound.request.clone().unwrap_or_default());
    }
    Ok(value)
}

/// What is worth a look in the objects: why the client is not in the mesh, and why a Service has no endpoints, or odd ones.
fn hints(
    view: &View,
    state: &State,
    source: &Source<'_>,
    target: &Target,
    transport: Transport,
    no_endpoints: bool,
) -> Vec<String> {
    let world = view.world();
    let mut found = Vec::new();
    if let Source::Pod(pod) = source
        && let Some(why) = why_outside(pod, world, &state.settings)
    {
        found.push(format!("{} is not in the mesh: {why}", pod.meta.path()));
    }
    let named = target.service.split_once('/');
    let service = world.services.values().find(|service| {
        let is_named = || {
            named.is_some_and(|(namespace, hostname)| {
                service.meta.namespace == namespace && state.settings.hostname(&service.meta) == hostname
            })
        };
        let has = |address: &IpAddr| service.addresses.contains(address);
        is_named() || (named.is_none() && target.addresses.first().is_some_and(has))
    });
    let Some(service) = service else { return found };
    if service.names.headless {
        let count = target.addresses.len();
        found.push(format!(
            "{} is headless: its name stands for the addresses of its ready endpoints ({count} here), clients choose among \
             them, and the mesh balances nothing",
            service.meta.path()
        ));
    }
    let odd = absent::hints(world, service, target.port, transport);
    // Where there are endpoints, only what may yet keep clients from being answered.
    found.extend(odd.into_iter().filter(|hint| no_endpoints || hint.contains("do not declare")));
    found
}

/// Endpoints whose nodes do not answer count only where no other does. `answers`: the source's proxy answers some of the
/// requests, or all where nothing was `found`.
fn verdict(refused: bool, answers: bool, found: &[Found]) -> &'static str {
    let has = |wanted: Found| found.contains(&wanted);
    if answers && !refused {
        return match (has(Found::Allowed) || has(Found::Open), has(Found::Denied)) {
            (true, _) => "partly",
            (false, true) => "denied",
            (false, false) if found.is_empty() => "answered",
            (false, false) => "unknown",
        };
    }
    match (refused, has(Found::Allowed), has(Found::Open), has(Found::Denied)) {
        (true, ..) => "refused",
        (_, true, _, true) | (_, _, true, true) => "partly",
        (_, true, ..) => "allowed",
        (_, _, _, true) => "denied",
        _ if has(Found::Unknown) => "unknown",
        _ => "plain",
    }
}

/// What the source node says of every address that is dialled, as one answer.
async fn leave(
    state: &State,
    view: &View,
    set: &ResourceSet,
    source: &Source<'_>,
    asked: &Question,
    target: &Target,
) -> Result<(OutboundAnswer, Vec<EndpointChoice>), Failure> {
    if target.host.is_some() {
        let answer = send(state, source, asked, None, target).await?;
        let endpoints = answer.endpoints.clone();
        return Ok((answer, endpoints));
    }
    let mut all = Vec::new();
    for address in target.addresses.iter().take(MAX_ENDPOINTS) {
        let answer = send(state, source, asked, Some(*address), target).await?;
        let behind = || target::behind(view, set, &state.settings, asked.over, *address, target.port);
        let asks_proxy = matches!(source, Source::Pod(_)) && asked.over.transport == Transport::Tcp;
        let endpoints = match (asks_proxy, answer.plan == "refuse") {
            (true, false) => answer.endpoints.clone(),
            (false, false) => behind(),
            (_, true) if target.addresses.len() == 1 => Vec::new(),
            // Others of the same name may be reached.
            (_, true) => behind().into_iter().map(|endpoint| refused(endpoint, &answer)).collect(),
        };
        all.push(Leaving { answer, endpoints });
    }
    let shown =
        all.iter().find(|one| one.answer.plan != "refuse").or_else(|| all.first()).map(|one| one.answer.clone());
    let shown = shown.ok_or_else(|| not_found(format!("{} has no ready endpoint", target.service)))?;
    let share = 1.0 / all.len() as f64;
    let scaled = |one: Leaving| {
        one.endpoints
            .into_iter()
            .map(move |endpoint| EndpointChoice { share_percent: endpoint.share_percent * share, ..endpoint })
    };
    Ok((shown, all.into_iter().flat_map(scaled).collect()))
}

fn refused(endpoint: EndpointChoice, answer: &OutboundAnswer) -> EndpointChoice {
    let OutboundAnswer { code, text, policy, rule, .. } = answer.clone();
    EndpointChoice { code, text, policy, rule, ..endpoint }
}

/// What the source does with a connection to one address, or to the target's name.
async fn send(
    state: &State,
    source: &Source<'_>,
    asked: &Question,
    address: Option<IpAddr>,
    target: &Target,
) -> Result<OutboundAnswer, Failure> {
    let pod = match source {
        Source::Pod(pod) => pod,
        Source::Address(own) => {
            return Ok(OutboundAnswer {
                plan: "plain".into(),
                text: format!("{own} is no pod of the mesh; nothing intercepts what it sends"),
                source_address: target::octets(*own).into(),
                ..OutboundAnswer::default()
            });
        }
    };
    let question = OutboundQuestion {
        source_uid: state.settings.pod_uid(&pod.meta),
        address: address.map(target::octets).unwrap_or_default().into(),
        port: target.port.into(),
        transport: asked.over.on_wire().into(),
        request: asked.head.clone().filter(|_| address.is_some()),
        host: if address.is_none() { target.host.clone().unwrap_or_default() } else { String::new() },
    };
    let understood =
        |answer: &OutboundAnswer| address.is_none() || asked.understood(answer.transport(), answer.request.is_some());
    match state.registry.ask(&pod.node, node_question::Question::Outbound(question)).await {
        Ok(Answer::Outbound(answer)) if !understood(&answer) => Err(unavailable(asked.older(&pod.node))),
        Ok(Answer::Outbound(answer)) => {
            let own = || pod.addresses.first().map(|ip| target::octets(*ip)).unwrap_or_default();
            let source_address =
                if answer.source_address.is_empty() { own().into() } else { answer.source_address.clone() };
            Ok(OutboundAnswer { source_address, ..answer })
        }
        Ok(_) => Err(unavailable("the source node answered another question".into())),
        Err(error) => Err(unavailable(error.to_string())),
    }
}

impl Question {
    /// Whether a node's answer is about all of it. An older node knows less and says so by what is missing.
    fn understood(&self, transport: node::Transport, request: bool) -> bool {
        transport == self.over.on_wire() && (request || self.head.is_none())
    }

    fn older(&self, node: &str) -> String {
        let what = if self.head.is_some() { "connections" } else { "TCP" };
        format!("the proxy of node {node} is older and can explain {what} only; update it")
    }
}

/// A replica of an egress gateway, with its own verdict.
async fn gateway(state: &State, uid: &str, outbound: &OutboundAnswer, choice: &EndpointChoice) -> (Value, Found) {
    let mut value = described(choice);
    value["asked"] = json!(outbound.gateway_target);
    if !choice.code.is_empty() {
        return (value, Found::Denied);
    }
    let name = gateway_name(&choice.namespace, &choice.name, &choice.node);
    let question = GatewayQuestion { source_uid: uid.to_owned(), target: outbound.gateway_target.clone() };
    let text = match state.registry.ask(&name, node_question::Question::Gateway(question)).await {
        Ok(Answer::Inbound(inbound)) => {
            value["inbound"] = inbound_view(&inbound);
            return (value, if inbound.allowed { Found::Allowed } else { Found::Denied });
        }
        Ok(_) => "the gateway answered another question".to_owned(),
        Err(error) => error.to_string(),
    };
    value["error"] = json!(text);
    (value, Found::Unknown)
}

/// What the source says of an endpoint.
fn described(choice: &EndpointChoice) -> Value {
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
    if !choice.ejected.is_empty() {
        value["ejected"] = json!(choice.ejected);
    }
    if !choice.text.is_empty() {
        value["egress"] = json!({
            "allowed": choice.code.is_empty(),
            "code": choice.code,
            "text": choice.text,
            "policy": choice.policy,
            "rule": choice.rule,
        });
    }
    value
}

/// One endpoint, with its node's verdict if its node is one of ours.
async fn endpoint(
    state: &State,
    view: &View,
    outbound: &OutboundAnswer,
    asked: &Question,
    choice: &EndpointChoice,
) -> (Value, Found) {
    let mut value = described(choice);
    // The destination is never asked about what does not leave; its verdict is shown all the same.
    let left = choice.code.is_empty();
    let otherwise = |found: Found| if left { found } else { Found::Denied };
    let key = (choice.namespace.clone(), choice.name.clone());
    if !view.world().pods.contains_key(&key) {
        value["note"] = json!("not a pod of the mesh: nobody authorises there");
        return (value, otherwise(Found::Open));
    }
    let question = InboundQuestion {
        destination_uid: choice.uid.clone(),
        address: choice.address.clone(),
        port: choice.port,
        source_identity: if choice.protocol == "hbone" { outbound.source_identity.clone() } else { String::new() },
        source_address: outbound.source_address.clone(),
        transport: asked.over.on_wire().into(),
        // What the source sends on, with the changes of its route.
        request: choice.request.clone().or_else(|| asked.head.clone()),
    };
    let text = match state.registry.ask(&choice.node, node_question::Question::Inbound(question)).await {
        Ok(Answer::Inbound(inbound)) if asked.understood(inbound.transport(), inbound.request.is_some()) => {
            value["inbound"] = inbound_view(&inbound);
            return (value, otherwise(if inbound.allowed { Found::Allowed } else { Found::Denied }));
        }
        Ok(Answer::Inbound(_)) => asked.older(&choice.node),
        Ok(_) => "the destination node answered another question".to_owned(),
        Err(error) => error.to_string(),
    };
    value["error"] = json!(text);
    (value, otherwise(Found::Unknown))
}

fn inbound_view(inbound: &InboundAnswer) -> Value {
    json!({
        "allowed": inbound.allowed,
        "read": inbound.request.as_ref().map(|request| request.read),
        "status": inbound.request.as_ref().map(|request| request.status).filter(|status| *status > 0),
        "code": inbound.code,
        "text": inbound.text,
        "policy": inbound.policy,
        "rule": if inbound.policy.is_empty() || inbound.rule < 0 { Value::Null } else { json!(inbound.rule) },
        "evaluated": inbound.evaluated,
        "audit": inbound.audit,
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

#[cfg(test)]
mod tests {
    use super::Found::{Allowed, Denied, Open, Unknown};
    use super::verdict;

    #[test]
    fn endpoints_are_joined_to_one_verdict() {
        for (refused, found, expected) in [
            (true, &[Allowed][..], "refused"),
            (false, &[], "plain"),
            (false, &[Open], "plain"),
            (false, &[Allowed, Allowed], "allowed"),
            (false, &[Allowed, Open, Unknown], "allowed"),
            (false, &[Denied, Denied], "denied"),
            (false, &[Denied, Unknown], "denied"),
            (false, &[Denied, Allowed], "partly"),
            (false, &[Denied, Open], "partly"),
            (false, &[Unknown], "unknown"),
            (false, &[Unknown, Open], "unknown"),
        ] {
            assert_eq!(verdict(refused, false, found), expected, "{refused}, expected {expected}");
        }
        for (found, expected) in [
            (&[][..], "answered"),
            (&[Allowed], "partly"),
            (&[Denied, Open], "partly"),
            (&[Denied, Unknown], "denied"),
            (&[Unknown], "unknown"),
        ] {
            assert_eq!(verdict(false, true, found), expected);
        }
    }
}
