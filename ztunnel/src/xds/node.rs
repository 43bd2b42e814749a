//! Answers the questions that control asks this node (`tulle.node.v1alpha1`), so that people see what the proxy does.
//!
//! The node dials, because its admin port stays on localhost. Answers are computed by the caller's closure from its live
//! snapshot, one question after the other: explanation is for people, and must not compete with traffic. A control
//! without the service is asked again once in a while, and nothing else depends on it.

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_service_client::NodeServiceClient;
use tulle_proto::node::{Hello, NodeMessage, NodeQuestion};

use crate::identity::{Control, ControlError, backoff, breaks, status_text};

/// Answers that wait to be sent; control asks one by one, so this is never reached by an honest one.
const ANSWERS: usize = 16;
/// Control is another program (istiod), or older; it might be upgraded.
const UNIMPLEMENTED_RETRY: Duration = Duration::from_secs(60);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// Who answers.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The way to control.
    pub control: Control,
    /// NODE_NAME; must equal the claim of the token.
    pub node_name: String,
    /// This program's version.
    pub version: String,
    /// The pod that this egress gateway is; empty: it is the node's proxy.
    pub gateway_pod: String,
}

/// Attaches to control and answers until `shutdown` completes. The answer's `id` is set here.
pub async fn run_node_service(
    config: NodeConfig,
    answers: impl Fn(NodeQuestion) -> NodeMessage,
    shutdown: impl Future<Output = ()>,
) {
    tokio::pin!(shutdown);
    let mut failures = 0u32;
    loop {
        let mut useful = false;
        let status = tokio::select! {
            () = &mut shutdown => return,
            status = attach(&config, &answers, &mut useful) => status,
        };
        failures = if useful { 1 } else { failures.saturating_add(1) };
        let wait = match status.code() {
            Code::Unimplemented => UNIMPLEMENTED_RETRY,
            _ => backoff(FIRST_RETRY, LAST_RETRY, failures, rand::random()),
        };
        tracing::debug!(retry_in = ?wait, reason = status_text(&status), "the stream of control's questions ended");
        tokio::select! {
            () = &mut shutdown => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// One stream from connecting to its end. `useful` is set once control has taken it.
async fn attach(config: &NodeConfig, answers: &impl Fn(NodeQuestion) -> NodeMessage, useful: &mut bool) -> Status {
    match converse(config, answers, useful).await {
        Ok(()) => Status::ok("control ended the stream"),
        Err(status) => status,
    }
}

async fn converse(
    config: &NodeConfig,
    answers: &impl Fn(NodeQuestion) -> NodeMessage,
    useful: &mut bool,
) -> Result<(), Status> {
    let connected = config.control.connect().await.map_err(unreachable)?;
    let ended = over(connected.channel.clone(), config, answers, useful).await;
    if ended.as_ref().is_err_and(|status| breaks(status.code())) {
        config.control.link.broken(&connected).await;
    }
    ended
}

#[allow(clippy::needless_pass_by_value, reason = "it maps an error")]
fn unreachable(error: ControlError) -> Status {
    Status::unavailable(error.to_string())
}

async fn over(
    channel: Channel,
    config: &NodeConfig,
    answers: &impl Fn(NodeQuestion) -> NodeMessage,
    useful: &mut bool,
) -> Result<(), Status> {
    let (messages, queue) = mpsc::channel(ANSWERS);
    let NodeConfig { node_name: node, version, gateway_pod, .. } = config.clone();
    let hello = Hello { node, version, gateway_pod };
    // The queue is new, so there is room.
    let _ = messages.try_send(NodeMessage { id: 0, answer: Some(Answer::Hello(hello)) });
    let mut request = Request::new(ReceiverStream::new(queue));
    config.control.authorize(request.metadata_mut()).await.map_err(unreachable)?;
    let mut questions = NodeServiceClient::new(channel).attach(request).await?.into_inner();
    *useful = true;
    while let Some(question) = questions.message().await? {
        let id = question.id;
        let answer = NodeMessage { id, ..answers(question) };
        messages
            .try_send(answer)
            .map_err(|_| Status::resource_exhausted("control asks faster than it reads answers"))?;
    }
    Ok(())
}
