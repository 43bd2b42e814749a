//! Asking the attached node proxies: their status, and what they would do with a connection.
//!
//! Egress gateways are asked the same way, each by a name of its own ([`gateway_name`]): one that control knows as a gateway's pod
//! of the account that its token proves, so that nobody speaks for another.
//!
//! The node opens the stream and answers; control only carries questions, so what `tulle explain` shows is the
//! proxies' own decision. Every question has a deadline, and a node that does not answer is an error of that node only.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tulle_proto::names;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::node_service_server;
use tulle_proto::node::{Hello, NodeMessage, NodeQuestion, TrustQuestion};

use crate::authn;
use crate::base;
use crate::base::Stop;
use crate::stream;
use crate::stream::{Messages, Outgoing};

/// How long a node may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Questions on their way to one node. People ask them; more waiting means that the node is stuck.
const WAITING: usize = 32;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// No stream of that node.
    #[error("node {0} is not attached; is its ztunnel running and connected?")]
    NotAttached(String),
    /// Too many questions wait.
    #[error("node {0} does not take questions: {WAITING} are waiting")]
    Busy(String),
    /// The deadline passed.
    #[error("node {0} did not answer within 5 s")]
    Timeout(String),
    /// The node answered that it cannot.
    #[error("node {0} cannot answer: {1}")]
    Refused(String, String),
}

struct Attached {
    stream: u64,
    /// Of an egress gateway: what its discovery stream is called.
    discovery: Option<String>,
    questions: mpsc::Sender<Result<NodeQuestion, Status>>,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
}

/// The attached nodes.
#[derive(Default)]
pub struct Registry {
    // Held for single map operations only.
    nodes: Mutex<BTreeMap<String, Attached>>,
    next: AtomicU64,
}

impl Registry {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Attached>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of the attached nodes.
    pub fn attached(&self) -> Vec<String> {
        let nodes = self.lock();
        nodes.iter().filter(|(_, one)| one.discovery.is_none()).map(|(name, _)| name.clone()).collect()
    }

    /// Names of the attached egress gateways, and of their discovery streams. What they say of others is no more than a claim.
    pub fn gateways(&self) -> BTreeMap<String, String> {
        let nodes = self.lock();
        nodes.iter().filter_map(|(name, one)| Some((name.clone(), one.discovery.clone()?))).collect()
    }

    /// Asks a node and waits for its answer, at most five seconds.
    pub async fn ask(&self, node: &str, question: Question) -> Result<Answer, AskError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (answer, answered) = oneshot::channel();
        {
            let mut nodes = self.lock();
            let attached = nodes.get_mut(node).ok_or_else(|| AskError::NotAttached(node.to_owned()))?;
            let question = NodeQuestion { id, question: Some(question) };
            attached.questions.try_send(Ok(question)).map_err(|_| AskError::Busy(node.to_owned()))?;
            attached.waiting.insert(id, answer);
        }
        let answer = tokio::time::timeout(DEADLINE, answered).await;
        if let Some(attached) = self.lock().get_mut(node) {
            attached.waiting.remove(&id);
        }
        match answer {
            Ok(Ok(Answer::Error(text))) => Err(AskError::Refused(node.to_owned(), text)),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(AskError::NotAttached(node.to_owned())),
            Err(_) => Err(AskError::Timeout(node.to_owned())),
        }
    }

    fn attach(
        &self,
        node: &str,
        discovery: Option<String>,
        questions: mpsc::Sender<Result<NodeQuestion, Status>>,
    ) -> u64 {
        let stream = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let attached = Attached { stream, discovery, questions, waiting: HashMap::new() };
        // Of two streams of one node the newer counts; the older's questions fail at once.
        self.lock().insert(node.to_owned(), attached);
        stream
    }

    fn detach(&self, node: &str, stream: u64) {
        let mut nodes = self.lock();
        if nodes.get(node).is_some_and(|attached| attached.stream == stream) {
            nodes.remove(node);
        }
    }

    fn take_answer(&self, node: &str, stream: u64, message: NodeMessage) {
        let waiting = match self.lock().get_mut(node) {
            Some(attached) if attached.stream == stream => attached.waiting.remove(&message.id),
            _ => None,
        };
        if let (Some(waiting), Some(answer)) = (waiting, message.answer) {
            // The asker may have given up.
            let _ = waiting.send(answer);
        }
    }
}

/// Whether a caller is the egress gateway in this pod.
pub type KnowsGateway = Arc<dyn Fn(&authn::Caller, &str) -> bool + Send + Sync>;

/// What an egress gateway is attached as.
pub fn gateway_name(namespace: &str, pod: &str, node: &str) -> String {
    format!("gateway {namespace}/{pod} on {node}")
}

/// What a caller is attached as.
///
/// # Errors
/// It may not attach, or not as that.
fn attached_as(
    caller: &authn::Caller,
    hello: &Hello,
    root_namespace: &str,
    gateways: &KnowsGateway,
) -> Result<String, Status> {
    let node = caller.node.as_deref().unwrap_or_default();
    let is_node = caller.namespace == root_namespace && caller.service_account == names::NODE_SERVICE_ACCOUNT;
    if hello.gateway_pod.is_empty() && !is_node {
        let account = names::NODE_SERVICE_ACCOUNT;
        return Err(Status::permission_denied(format!("only {root_namespace}/{account} may attach")));
    }
    if hello.node != node {
        return Err(Status::permission_denied(format!("the token is for node {node}")));
    }
    if hello.gateway_pod.is_empty() {
        return Ok(node.to_owned());
    }
    if !gateways(caller, &hello.gateway_pod) {
        return Err(Status::permission_denied(
            "only pods of an egress gateway may attach as one: on this node, of this account, labelled \
             networking.istio.io/tunnel: http",
        ));
    }
    Ok(gateway_name(&caller.namespace, &hello.gateway_pod, node))
}

/// What an egress gateway's discovery stream is called, which does not say in which pod it is.
fn xds_name(caller: &authn::Caller) -> String {
    let node = caller.node.as_deref().unwrap_or_default();
    format!("gateway {}/{} on {node}", caller.namespace, caller.service_account)
}

/// The service that nodes attach to.
#[derive(Clone)]
pub struct Server {
    /// Knows callers.
    pub authn: Arc<authn::Authn>,
    /// Where attached nodes are found.
    pub registry: Arc<Registry>,
    /// Namespace of the node account.
    pub root_namespace: String,
    /// Knows egress gateways.
    pub gateways: KnowsGateway,
    /// What the CA gives now; nodes are told on attaching and when it changes.
    pub trust: watch::Receiver<TrustQuestion>,
    /// The order to stop.
    pub stop: Stop,
}

/// The one call.
const PATH: &str = "/tulle.node.v1alpha1.NodeService/Attach";
/// Largest answer of a node, bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

impl NamedService for Server {
    const NAME: &'static str = node_service_server::SERVICE_NAME;
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
            Ok(stream::answer(request, PATH, MAX_ANSWER, |answers| server.open(caller, answers)))
        })
    }
}

impl Server {
    fn open(
        &self,
        caller: authn::Caller,
        messages: Messages<NodeMessage>,
    ) -> Result<(HeaderMap, Outgoing<NodeQuestion>), Status> {
        if caller.node.is_none() {
            return Err(Status::permission_denied("the token has no tulle.dev/node claim"));
        }
        let (questions, outgoing) = mpsc::channel(WAITING);
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(status) = server.serve(&caller, messages, &questions).await {
                let _ = questions.send(Err(status)).await;
            }
        });
        Ok((HeaderMap::new(), outgoing))
    }
}

impl Server {
    async fn serve(
        mut self,
        caller: &authn::Caller,
        mut messages: Messages<NodeMessage>,
        questions: &mpsc::Sender<Result<NodeQuestion, Status>>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(base::FIRST_MESSAGE, messages.next()).await;
        let Some(first) = first.map_err(|_| Status::deadline_exceeded("the stream's first message did not come"))?
        else {
            return Ok(());
        };
        let Some(Answer::Hello(hello)) = first?.answer else {
            return Err(Status::invalid_argument("the first message must be hello"));
        };
        let node = &*attached_as(caller, &hello, &self.root_namespace, &self.gateways)?;
        let is_gateway = !hello.gateway_pod.is_empty();
        let discovery = is_gateway.then(|| xds_name(caller));
        let stream = self.registry.attach(node, discovery, questions.clone());
        let result = self.read(node, stream, &mut messages, questions).await;
        self.registry.detach(node, stream);
        result
    }

    async fn read(
        &mut self,
        node: &str,
        stream: u64,
        messages: &mut Messages<NodeMessage>,
        questions: &mpsc::Sender<Result<NodeQuestion, Status>>,
    ) -> Result<(), Status> {
        self.trust.mark_changed();
        loop {
            tokio::select! {
                changed = self.trust.changed() => {
                    if changed.is_err() {
                        return Err(Status::unavailable("control is stopping; attach again"));
                    }
                    let question = Some(Question::Trust(self.trust.borrow_and_update().clone()));
                    // Nobody waits for its answer: `/debug/ca` asks each node for its certificates.
                    if questions.try_send(Ok(NodeQuestion { id: 0, question })).is_err() {
                        return Err(Status::resource_exhausted("the node does not read its questions; attach again"));
                    }
                }
                () = self.stop.requested() => {
                    return Err(Status::unavailable("control is stopping; attach again"));
                }
                () = questions.closed() => return Ok(()),
                next = messages.next() => match next {
                    None => return Ok(()),
                    Some(next) => self.registry.take_answer(node, stream, next?),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tulle_proto::node::Hello;

    use super::{KnowsGateway, attached_as};
    use crate::authn::Caller;

    #[test]
    fn nobody_attaches_as_somebody_else() {
        let gateways: KnowsGateway = Arc::new(|caller, pod| caller.service_account == "out" && pod == "out-0");
        let root = ("tulle-system", "ztunnel");
        for ((namespace, account), node, gateway_pod, expected) in [
            (root, "n1", "", Some("n1")),
            (root, "n2", "", None),
            (root, "n1", "out-0", None),
            (("egress", "out"), "n1", "", None),
            (("egress", "out"), "n1", "out-0", Some("gateway egress/out-0 on n1")),
            (("egress", "out"), "n2", "out-0", None),
            (("egress", "out"), "n1", "out-1", None),
            (("shop", "web"), "n1", "out-0", None),
        ] {
            let caller = Caller {
                namespace: namespace.to_owned(),
                service_account: account.to_owned(),
                node: Some("n1".to_owned()),
            };
            let hello = Hello { node: node.to_owned(), version: String::new(), gateway_pod: gateway_pod.to_owned() };
            let found = attached_as(&caller, &hello, "tulle-system", &gateways);
            assert_eq!(found.ok().as_deref(), expected, "{namespace}/{account} {node} {gateway_pod}");
        }
    }
}
