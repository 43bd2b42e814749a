//! The gRPC half of xDS: authenticates a stream, binds it to its node, moves messages, and shows its state.
//!
//! A stream is served by one task. It wakes for a request, for a newly published set, or for the order to stop; it
//! writes into a short channel, and while the node does not read, it waits there with nothing but its last set.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;

use futures_util::future::BoxFuture;
use http::HeaderMap;
use http::HeaderName;
use http::HeaderValue;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tulle_proto::discovery::aggregated_discovery_service_server;
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use tulle_proto::names;

use crate::authn;
use crate::base;
use crate::base::Stop;
use crate::resource::Kind;
use crate::stream;
use crate::stream::{Messages, Outgoing};
use crate::xds::Published;
use crate::xds::session::{Abilities, Session};

/// Responses waiting for the network, per stream. One batch is rarely more; beyond it the session waits.
const OUTGOING: usize = 4;

/// What is known of a node's stream, for people and for the lab.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeState {
    /// A stream is open.
    pub connected: bool,
    /// Newest generation that the node acknowledged or needs nothing of. 0 if it is not connected.
    pub acked_generation: u64,
    /// What it rejected and still lacks.
    pub nacks: Vec<String>,
    /// Version of the proxy; empty for Istio's.
    pub version: String,
    /// Subscribed types with `wildcard` or the number of names.
    pub subscriptions: BTreeMap<String, String>,
    #[serde(skip)]
    stream: u64,
}

/// All nodes that ever connected to this process.
#[derive(Debug, Default)]
pub struct Nodes {
    // Held for single map operations only, never across an await.
    states: Mutex<BTreeMap<String, NodeState>>,
    streams: AtomicU64,
    /// Streams opened since start.
    pub opened: AtomicU64,
    /// Responses sent since start.
    pub responses: AtomicU64,
    /// Responses rejected since start.
    pub rejected: AtomicU64,
}

impl Nodes {
    /// A copy of all states.
    pub fn states(&self) -> BTreeMap<String, NodeState> {
        self.lock().clone()
    }

    /// The generation that each connected node has acknowledged.
    pub fn acked(&self) -> BTreeMap<String, u64> {
        let connected =
            |(name, state): (&String, &NodeState)| state.connected.then(|| (name.clone(), state.acked_generation));
        self.lock().iter().filter_map(connected).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, NodeState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, node: &str, version: String) -> u64 {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        self.opened.fetch_add(1, Ordering::Relaxed);
        let state = NodeState { connected: true, version, stream, ..NodeState::default() };
        self.lock().insert(node.to_owned(), state);
        stream
    }

    fn update(&self, node: &str, stream: u64, session: &Session) {
        // A newer stream of the same node owns the entry, as long as it lives: a proxy that drains beside its successor
        // may have connected later, and ends earlier.
        if let Some(state) = self.lock().get_mut(node)
            && (state.stream == stream || !state.connected)
        {
            (state.stream, state.connected) = (stream, true);
            state.acked_generation = session.acked_generation();
            state.nacks = session.nacks();
            state.subscriptions = session
                .subscriptions()
                .into_iter()
                .map(|(kind, wildcard, names)| {
                    let how = if wildcard { "wildcard".to_owned() } else { format!("{names} names") };
                    (kind.short().to_owned(), how)
                })
                .collect();
        }
    }

    fn close(&self, node: &str, stream: u64) {
        if let Some(state) = self.lock().get_mut(node)
            && state.stream == stream
        {
            state.connected = false;
            state.acked_generation = 0;
        }
    }
}

/// The service.
#[derive(Clone)]
pub struct Server {
    authn: Arc<authn::Authn>,
    root_namespace: String,
    published: watch::Receiver<Published>,
    nodes: Arc<Nodes>,
    stop: Stop,
}

impl Server {
    /// Serves what is published to callers that `authn` knows; node proxies are those of `root_namespace`.
    pub fn new(
        authn: Arc<authn::Authn>,
        root_namespace: String,
        published: watch::Receiver<Published>,
        nodes: Arc<Nodes>,
        stop: Stop,
    ) -> Self {
        Self { authn, root_namespace, published, nodes, stop }
    }
}

/// The one call.
const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Largest request, bytes: a reconnect names every known resource with its version.
const MAX_REQUEST: usize = 64 * 1024 * 1024;

impl NamedService for Server {
    const NAME: &'static str = aggregated_discovery_service_server::SERVICE_NAME;
}

impl tower::Service<http::Request<Body>> for Server {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let server = self.clone();
        Box::pin(async move {
            let from = authn::source(&request);
            let caller = match server.authn.caller(request.headers(), from, base::unix_now()).await {
                Ok(caller) => caller,
                Err(status) => return Ok(status.into_http()),
            };
            Ok(stream::answer(request, PATH, MAX_REQUEST, |requests| server.open(caller, requests)))
        })
    }
}

impl Server {
    fn open(
        &self,
        caller: authn::Caller,
        requests: Messages<DeltaDiscoveryRequest>,
    ) -> Result<(HeaderMap, Outgoing<DeltaDiscoveryResponse>), Status> {
        let (outgoing, responses) = mpsc::channel(OUTGOING);
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(status) = server.serve(caller, requests, &outgoing).await {
                // The node may be gone already.
                let _ = outgoing.send(Err(status)).await;
            }
        });
        Ok((HeaderMap::from_iter([(HeaderName::from_static(names::HEADER_TULLE_TYPES), served_types()?)]), responses))
    }
}

impl Server {
    async fn serve(
        mut self,
        caller: authn::Caller,
        mut requests: Messages<DeltaDiscoveryRequest>,
        outgoing: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(base::FIRST_MESSAGE, requests.next()).await;
        let Some(first) = first.map_err(|_| Status::deadline_exceeded("the stream's first message did not come"))?
        else {
            return Ok(());
        };
        let first = first?;
        let (node, version) = identify(&caller, first.node.as_ref(), &self.root_namespace)?;
        let takes = taken_types(first.node.as_ref());
        let stream = self.nodes.open(&node, version.clone());
        tracing::info!(%node, %version, "node connected");
        let mut session = Session::new(Abilities { dry_run: !version.is_empty(), takes });
        let result = self.exchange(&node, stream, &mut session, first, &mut requests, outgoing).await;
        self.nodes.close(&node, stream);
        match &result {
            Ok(()) => tracing::info!(%node, "node disconnected"),
            Err(status) => tracing::info!(%node, code = ?status.code(), reason = status.message(), "node disconnected"),
        }
        result
    }

    async fn exchange(
        &mut self,
        node: &str,
        stream: u64,
        session: &mut Session,
        first: DeltaDiscoveryRequest,
        requests: &mut Messages<DeltaDiscoveryRequest>,
        outgoing: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Result<(), Status> {
        let mut request = Some(first);
        loop {
            if let Some(request) = request.take() {
                if let Some(error) = &request.error_detail {
                    self.nodes.rejected.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(node, r#type = request.type_url, reason = error.message, "node rejected resources");
                }
                session
                    .handle_request(&request)
                    .map_err(|violation| Status::invalid_argument(violation.to_string()))?;
            }
            let published = self.published.borrow_and_update().clone();
            for part in session.next_batch(&published) {
                self.nodes.responses.fetch_add(1, Ordering::Relaxed);
                if outgoing.send(Ok(part.into())).await.is_err() {
                    return Ok(());
                }
            }
            self.nodes.update(node, stream, session);
            tokio::select! {
                () = self.stop.requested() => {
                    return Err(Status::unavailable("control is stopping; connect again"));
                }
                () = outgoing.closed() => return Ok(()),
                next = requests.next() => match next {
                    None => return Ok(()),
                    Some(next) => request = Some(next?),
                },
                changed = self.published.changed() => {
                    if changed.is_err() {
                        return Err(Status::unavailable("control is stopping; connect again"));
                    }
                }
            }
        }
    }
}

/// Binds the stream to the node that the token names.
fn identify(caller: &authn::Caller, node: Option<&Node>, root_namespace: &str) -> Result<(String, String), Status> {
    let Some(claimed) = &caller.node else {
        return Err(Status::permission_denied(
            "the token has no tulle.dev/node claim; make one with `control token --node NAME`",
        ));
    };
    let Some(name) = metadata(node, "NODE_NAME") else {
        return Err(Status::invalid_argument("the first request has no NODE_NAME in its node metadata"));
    };
    if name != claimed {
        let named: String = name.chars().take(253).collect();
        return Err(Status::permission_denied(format!(
            "the token is for node {claimed}, but the node metadata says {named}"
        )));
    }
    let version = metadata(node, names::METADATA_TULLE_VERSION).unwrap_or_default();
    // A gateway runs on a node and is not its proxy: it must not be taken for that, nor take its place. Nor must any other
    // account, whatever it says.
    let is_node = caller.namespace == root_namespace && caller.service_account == names::NODE_SERVICE_ACCOUNT;
    let name = match metadata(node, names::METADATA_TULLE_GATEWAY) {
        None if !is_node => format!("proxy {}/{} on {name}", caller.namespace, caller.service_account),
        Some(_) => format!("gateway {}/{} on {name}", caller.namespace, caller.service_account),
        None => name.to_owned(),
    };
    Ok((name, version.chars().take(64).collect()))
}

/// Own types that this version serves, by URL, as the header lists them.
fn served_types() -> Result<HeaderValue, Status> {
    let urls: Vec<&str> = Kind::OWN.iter().map(|kind| kind.type_url()).collect();
    HeaderValue::try_from(urls.join(",")).map_err(|error| Status::internal(error.to_string()))
}

/// The own types that the proxy will subscribe to.
fn taken_types(node: Option<&Node>) -> BTreeSet<Kind> {
    let listed = metadata(node, names::METADATA_TULLE_TYPES).unwrap_or_default();
    let taken = listed.split(',').filter_map(|url| Kind::of_url(url.trim()));
    taken.filter(|kind| Kind::OWN.contains(kind)).collect()
}

fn metadata<'a>(node: Option<&'a Node>, key: &str) -> Option<&'a str> {
    let value = node?.metadata.as_ref()?.fields.get(key)?;
    match &value.kind {
        Some(prost_types::value::Kind::StringValue(text)) => Some(text.as_str()),
        _ => None,
    }
}
