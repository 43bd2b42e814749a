//! HTTP for people and scripts: health, metrics, and what control believes, knows and published.
//!
//! It listens on loopback and has no authentication; it shows no secrets and changes nothing. Answers are JSON except
//! for health and metrics.

mod absent;
pub mod authority;
mod callers;
mod explain;
#[cfg(test)]
mod fixtures;
mod metrics;
mod names;
mod request;
pub mod scrape;
mod target;
mod traffic;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Json;
use axum::Router;
use axum::extract::Query;
use axum::http::StatusCode;
use axum::routing::get;
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tulle_certs::ca::Authority;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{NodeStatus, StatusQuestion};

use crate::base::Stop;
use crate::ca::server::Counters;
use crate::model::ObjectConditions;
use crate::model::World;
use crate::nodes::Registry;
use crate::resource::Kind;
use crate::resource::view;
use crate::source::{Followed, Loaded};
use crate::translate::Settings;
use crate::xds::Published;
use crate::xds::server::Nodes;

/// What people see of a generation.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Same as that of the published set; 0: nothing is published.
    pub generation: u64,
    /// Objects, files and problems, also when they are not published.
    pub loaded: Arc<Loaded>,
    /// What users are told.
    pub conditions: Vec<ObjectConditions>,
    /// Nodes with pods.
    pub nodes: BTreeSet<String>,
    /// Why nothing is published; empty once something is.
    pub waiting: Vec<String>,
}

impl View {
    /// The objects.
    pub fn world(&self) -> &World {
        &self.loaded.world
    }
}

/// What is shown.
#[derive(Clone)]
pub struct State {
    /// Objects and conditions.
    pub view: watch::Receiver<Arc<View>>,
    /// Resources.
    pub published: watch::Receiver<Published>,
    /// xDS streams.
    pub node_states: Arc<Nodes>,
    /// Nodes that answer questions.
    pub registry: Arc<Registry>,
    /// The CA's counters.
    pub counters: Arc<Counters>,
    /// The CA itself, for expiry.
    pub authority: Arc<ArcSwap<Authority>>,
    /// Names that explain needs.
    pub settings: Settings,
    /// How each kind is followed at the API server; empty with files.
    pub followed: watch::Receiver<Arc<Vec<Followed>>>,
    /// What other replicas say. `None`: there are none.
    pub others: Option<Others>,
}

/// Asks what the other replicas of control say of their nodes' certificates ([`crate::ca::rotation::Word`] each, as JSON).
pub type Others = Arc<dyn Fn() -> BoxFuture<'static, Vec<String>> + Send + Sync>;

/// Serves until it is told to stop.
pub async fn serve(listener: TcpListener, state: State, mut stop: Stop) {
    let served = axum::serve(listener, router(state)).with_graceful_shutdown(async move {
        stop.requested().await;
    });
    if let Err(error) = served.await {
        tracing::error!(%error, "the HTTP server ended");
    }
}

fn router(state: State) -> Router {
    type At = axum::extract::State<State>;
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async |state: At| ready(&state)))
        .route("/metrics", get(async |state: At| metrics::text(&state)))
        .route("/debug/resources", get(async |state: At, query: Query<OfType>| resources(&state, &query)))
        .route("/debug/conditions", get(async |state: At| conditions(&state)))
        .route("/debug/problems", get(async |state: At| problems(&state)))
        .route("/debug/source", get(async |state: At| Json(json!(*state.followed.borrow()))))
        .route("/debug/nodes", get(async |state: At| nodes(&state)))
        .route("/debug/sync", get(async |state: At| sync(&state)))
        .route("/debug/ca", get(async |state: At| Json(authority::shown(&state).await)))
        .route("/debug/status", get(async |state: At| Json(status(&state).await)))
        .route(
            "/debug/traffic",
            get(async |state: At| {
                Json(traffic::seen_by(&state, state.registry.attached().into_iter().collect()).await)
            }),
        )
        .route(
            "/debug/callers",
            get(async |state: At, query: Query<callers::Ask>| Json(callers::seen(&state, &query).await)),
        )
        .route(
            "/debug/explain",
            get(async |state: At, query: Query<explain::Ask>| explain::answer(&state, &query).await),
        )
        .with_state(state)
}

fn ready(state: &State) -> (StatusCode, String) {
    let view = state.view.borrow();
    if view.waiting.is_empty() {
        return (StatusCode::OK, "ready\n".into());
    }
    let mut text = String::from("not ready, waiting for:\n");
    for reason in &view.waiting {
        text.push_str(&format!("- {reason}\n"));
    }
    for problem in view.loaded.problems.iter().filter(|problem| problem.error) {
        text.push_str(&format!("- {problem}\n"));
    }
    (StatusCode::SERVICE_UNAVAILABLE, text)
}

#[derive(Deserialize)]
struct OfType {
    r#type: Option<String>,
}

fn resources(state: &State, query: &OfType) -> (StatusCode, Json<Value>) {
    let kinds: Vec<Kind> = match query.r#type.as_deref() {
        None => Kind::ALL.to_vec(),
        Some(name) => match Kind::ALL.into_iter().find(|kind| kind.short() == name) {
            Some(kind) => vec![kind],
            None => {
                let error = format!("`{name}` is none of Address, Authorization, NetworkPolicy, TrustBundle");
                return (StatusCode::BAD_REQUEST, Json(json!({"error": error})));
            }
        },
    };
    let set = Arc::clone(&state.published.borrow().set);
    let list =
        kinds.into_iter().flat_map(|kind| set.of(kind).values()).map(|resource| view::resource(resource)).collect();
    (StatusCode::OK, Json(list))
}

fn conditions(state: &State) -> Json<Value> {
    Json(json!(state.view.borrow().conditions))
}

fn problems(state: &State) -> Json<Value> {
    Json(json!(state.view.borrow().loaded.problems))
}

fn nodes(state: &State) -> Json<Value> {
    let attached = state.registry.attached();
    let states: BTreeMap<String, Value> = state
        .node_states
        .states()
        .into_iter()
        .map(|(name, node)| {
            let mut value = json!(node);
            value["attached"] = json!(attached.contains(&name));
            (name, value)
        })
        .collect();
    Json(json!(states))
}

fn sync(state: &State) -> Json<Value> {
    let view = Arc::clone(&state.view.borrow());
    let nodes: BTreeMap<String, Value> = state
        .node_states
        .states()
        .into_iter()
        .map(|(name, node)| {
            let value = json!({
                "connected": node.connected,
                "acked_generation": node.acked_generation,
                "nacks": node.nacks,
            });
            (name, value)
        })
        .collect();
    // Files that wait for the first publication are not part of any generation.
    let files = if view.generation == 0 { json!({}) } else { json!(view.loaded.files) };
    Json(json!({"generation": view.generation, "files": files, "nodes": nodes}))
}

/// Every node that has pods or ever connected, and every egress gateway that is attached, with its own account of itself.
async fn status(state: &State) -> Value {
    let mut names = state.view.borrow().nodes.clone();
    let streams = state.node_states.states();
    names.extend(streams.keys().cloned());
    // Their discovery streams are not what is asked.
    let gateways = state.registry.gateways();
    names.retain(|name| !gateways.values().any(|stream| stream == name));
    let stream = |name: &String| streams.get(gateways.get(name).unwrap_or(name));
    let asked = names.into_iter().chain(gateways.keys().cloned()).map(|name| async {
        let answer = state.registry.ask(&name, Question::Status(StatusQuestion {})).await;
        let mut value = match answer {
            Ok(Answer::Status(status)) => json!({"status": node_status(&status)}),
            Ok(_) => json!({"error": format!("node {name} answered another question")}),
            Err(error) => json!({"error": error.to_string()}),
        };
        let stream = stream(&name);
        value["connected"] = json!(stream.is_some_and(|stream| stream.connected));
        value["acked_generation"] = json!(stream.map_or(0, |stream| stream.acked_generation));
        value["nacks"] = json!(stream.map(|stream| stream.nacks.clone()).unwrap_or_default());
        (name, value)
    });
    let all = futures_util::future::join_all(asked).await.into_iter();
    let (gateways, nodes): (BTreeMap<String, Value>, BTreeMap<String, Value>) =
        all.partition(|(name, _)| gateways.contains_key(name));
    let view = Arc::clone(&state.view.borrow());
    json!({
        "gateways": gateways,
        "generation": view.generation,
        "waiting": view.waiting,
        "problems": view.loaded.problems,
        "source": *state.followed.borrow(),
        "nodes": nodes,
    })
}

fn node_status(status: &NodeStatus) -> Value {
    let pods: Vec<Value> = status
        .pods
        .iter()
        .map(|pod| {
            json!({
                "uid": pod.uid,
                "name": pod.name,
                "namespace": pod.namespace,
                "capture": pod.capture,
                "reason": pod.reason,
                "dns": pod.dns,
                "preexisting": pod.preexisting,
                "inboundConnections": pod.inbound_connections,
                "outboundConnections": pod.outbound_connections,
                "addresses": pod.addresses,
            })
        })
        .collect();
    let certificates: Vec<Value> = status
        .certificates
        .iter()
        .map(|certificate| {
            json!({
                "identity": certificate.identity,
                "state": certificate.state,
                "notAfter": certificate.not_after,
                "error": certificate.error,
                "roots": certificate.roots,
                "issuer": certificate.issuer,
                "serial": certificate.serial,
            })
        })
        .collect();
    json!({
        "version": status.version,
        "ready": status.pending.is_empty(),
        "pending": status.pending,
        "generation": status.generation,
        "workloads": status.workloads,
        "services": status.services,
        "policies": status.policies,
        "inboundConnections": status.inbound_connections,
        "outboundConnections": status.outbound_connections,
        "tunnels": status.tunnels,
        "egress": status.egress.iter().map(|talk| json!({
            "namespace": talk.namespace,
            "account": talk.account,
            "target": talk.target,
            "port": talk.port,
            "spoken": talk.spoken,
            "verdict": talk.verdict,
            "policy": talk.policy,
            "attempts": talk.attempts,
            "bytes": talk.bytes,
        })).collect::<Vec<_>>(),
        "pods": pods,
        "certificates": certificates,
    })
}
