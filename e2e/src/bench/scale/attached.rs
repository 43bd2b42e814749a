//! Simulated node proxies: what control sees of a real one, many of them in one process.
//!
//! Each has a token of its own node and one TLS connection, as our node proxy has: with incremental ADS (subscribed by
//! wildcard to everything, each response acknowledged) and a stream on which it waits for control's questions. They stay
//! until standard input ends, and take every change. Limits: no certificates are asked for, and nothing is kept of what
//! comes, since control is measured and not they.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::stream;
use prost_types::Struct;
use prost_types::Value;
use prost_types::value::Kind;
use serde::Deserialize;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Request;
use tonic::transport::Certificate;
use tonic::transport::Channel;
use tonic::transport::ClientTlsConfig;
use tonic::transport::Endpoint;
use tulle_proto::discovery::DeltaDiscoveryRequest;
use tulle_proto::discovery::Node;
use tulle_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use tulle_proto::names;
use tulle_proto::node::Hello;
use tulle_proto::node::NodeMessage;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_service_client::NodeServiceClient;

/// First descriptions of the mesh that are fetched at a time: real nodes do not all start in the same moment.
const AT_ONCE: usize = 4;
/// For connecting and being told of the whole mesh.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest response, bytes; control cuts before.
const MAX_RESPONSE: usize = 16 << 20;
/// Requests waiting to be sent: the first ones, and an answer for each response of a batch.
const REQUESTS: usize = 16;
/// What a proxy subscribes to, in its order.
const TYPES: [&str; 3] = [names::TYPE_AUTHORIZATION, names::TYPE_ADDRESS, names::TYPE_NETWORK_POLICY];

/// Arguments of `lab bench-agent attach`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// `https://host:port` of control.
    #[arg(long)]
    control: String,
    /// Its root certificates.
    #[arg(long)]
    root: std::path::PathBuf,
    /// File with a token on each line; the proxy of line 1 is `sim-1`.
    #[arg(long)]
    tokens: std::path::PathBuf,
    /// Addresses (workloads and Services) that each must have been told of.
    #[arg(long)]
    addresses: usize,
}

/// What is said when as many are attached as the last line of standard input asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Attached {
    /// Proxies.
    pub(super) proxies: usize,
}

/// Attaches as many as each line of standard input says; ends with it.
pub(in crate::bench) fn run(options: &Options) -> anyhow::Result<()> {
    let tokens = std::fs::read_to_string(&options.tokens).context("the tokens cannot be read")?;
    let tokens: Vec<String> = tokens.lines().map(str::to_owned).collect();
    let endpoint = endpoint(&options.control, &options.root)?;
    // One line at a time: the next comes when this one is answered.
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        let lines = std::io::stdin().lock().lines().map_while(Result::ok);
        lines.take_while(|line| sender.blocking_send(line.clone()).is_ok()).count()
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(&endpoint, options.addresses, &tokens, lines))
}

async fn serve(
    endpoint: &Endpoint,
    addresses: usize,
    tokens: &[String],
    mut lines: mpsc::Receiver<String>,
) -> anyhow::Result<()> {
    let mut proxies = JoinSet::new();
    loop {
        tokio::select! {
            line = lines.recv() => {
                let Some(line) = line else { return Ok(()) };
                let wanted = line.trim().parse().context("a number of proxies is expected")?;
                attach(endpoint, addresses, tokens, wanted, &mut proxies).await?;
                println!("{}", serde_json::to_string(&Attached { proxies: proxies.len() })?);
            }
            ended = proxies.join_next(), if !proxies.is_empty() => return Err(why(ended)),
        }
    }
}

/// Why a proxy ended, which none should.
fn why(ended: Option<Result<anyhow::Result<()>, tokio::task::JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok(Err(error))) => error.context("a simulated proxy ended"),
        other => anyhow::anyhow!("a simulated proxy ended: {other:?}"),
    }
}

fn endpoint(control: &str, root: &Path) -> anyhow::Result<Endpoint> {
    let root = Certificate::from_pem(std::fs::read(root).context("the root cannot be read")?);
    let tls = ClientTlsConfig::new().ca_certificate(root).domain_name("localhost");
    Ok(Endpoint::from_shared(control.to_owned())?.tls_config(tls)?.connect_timeout(PATIENCE))
}

async fn attach(
    endpoint: &Endpoint,
    addresses: usize,
    tokens: &[String],
    wanted: usize,
    proxies: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let (told, mut complete) = mpsc::channel(AT_ONCE);
    let have = proxies.len();
    for index in have..wanted {
        let token = tokens.get(index).with_context(|| format!("there is no token for proxy {}", index + 1))?.clone();
        let (turns, told, endpoint) = (Arc::clone(&turns), told.clone(), endpoint.clone());
        proxies.spawn(proxy(endpoint, format!("sim-{}", index + 1), token, addresses, turns, told));
    }
    drop(told);
    for _ in have..wanted {
        tokio::select! {
            complete = complete.recv() => complete.context("a proxy ended before it was told everything")?,
            ended = proxies.join_next() => return Err(why(ended)),
        }
    }
    Ok(())
}

/// One proxy, from connecting to the end of its stream.
async fn proxy(
    endpoint: Endpoint,
    node: String,
    token: String,
    addresses: usize,
    turns: Arc<Semaphore>,
    told: mpsc::Sender<()>,
) -> anyhow::Result<()> {
    let mut turn = Some(turns.acquire_owned().await?);
    let (requests, queue) = mpsc::channel(REQUESTS);
    for url in TYPES {
        requests.send(subscription(&node, url)).await?;
    }
    let channel = connected(&endpoint).await?;
    let mut xds = AggregatedDiscoveryServiceClient::new(channel.clone()).max_decoding_message_size(MAX_RESPONSE);
    let request = authorized(queue, &token)?;
    let mut responses = xds.delta_aggregated_resources(request).await?.into_inner();
    // Nobody asks it anything, and the sender keeps the stream open.
    let (answers, queue) = mpsc::channel(1);
    let hello = Hello { node, version: env!("CARGO_PKG_VERSION").to_owned(), gateway_pod: String::new() };
    answers.send(NodeMessage { id: 0, answer: Some(Answer::Hello(hello)) }).await?;
    let mut service = NodeServiceClient::new(channel);
    let _questions = service.attach(authorized(queue, &token)?).await?.into_inner();
    let mut known = 0;
    while let Some(response) = responses.message().await? {
        if response.type_url == names::TYPE_ADDRESS {
            known += response.resources.len();
        }
        let answer = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(answer).await?;
        if known >= addresses && turn.take().is_some() {
            told.send(()).await?;
        }
    }
    anyhow::bail!("control ended a stream");
}

async fn connected(endpoint: &Endpoint) -> anyhow::Result<Channel> {
    Ok(tokio::time::timeout(PATIENCE, endpoint.connect()).await.context("control does not take the connection")??)
}

/// A stream of what is sent through a channel, with the token of the node.
fn authorized<T: Send + 'static>(
    queue: mpsc::Receiver<T>,
    token: &str,
) -> anyhow::Result<Request<impl stream::Stream<Item = T> + Send + 'static>> {
    let next = |mut queue: mpsc::Receiver<T>| async move { queue.recv().await.map(|item| (item, queue)) };
    let mut request = Request::new(stream::unfold(queue, next));
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    request.metadata_mut().insert("clusterid", names::DEFAULT_CLUSTER.parse()?);
    Ok(request)
}

fn subscription(node: &str, url: &str) -> DeltaDiscoveryRequest {
    let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
    let metadata = [
        ("NODE_NAME", node),
        (names::METADATA_TULLE_VERSION, env!("CARGO_PKG_VERSION")),
        (names::METADATA_TULLE_TYPES, names::TYPE_NETWORK_POLICY),
    ];
    let fields = metadata.into_iter().map(|(key, value)| (key.to_owned(), text(value))).collect();
    let metadata = Some(Struct { fields });
    DeltaDiscoveryRequest {
        node: Some(Node { id: format!("ztunnel~127.0.0.1~{node}.sim~sim"), metadata, ..Node::default() }),
        type_url: url.to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}
