//! Spans to a collector: OTLP over HTTP with protobuf bodies, in batches, on one connection.
//!
//! The collector is not on any request's way: it may be slow or away, and then spans are lost and counted. A batch that it
//! cannot take now is tried again a few times. Limits: HTTP/1.1 without TLS, from the node's own network: name a collector on
//! the node or in the cluster.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tulle_proto::otlp::{ExportTraceServiceRequest, InstrumentationScope, Resource, ResourceSpans, ScopeSpans};

use crate::telemetry::trace::{Span, Spans, attribute};

/// Spans of one request: some 400 KB.
const BATCH: usize = 512;
/// How long a batch waits for more.
const GATHER: Duration = Duration::from_secs(2);
/// For one attempt, connecting included.
const DEADLINE: Duration = Duration::from_secs(5);
/// Attempts for a batch; the queue is full before long at a collector that is away.
const ATTEMPTS: u32 = 3;
/// Before the second attempt; doubled for the third.
const PAUSE: Duration = Duration::from_secs(1);
/// What is read of an answer, which says nothing that is needed.
const ANSWER_BYTES: usize = 64 * 1024;

/// Where spans are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    host: String,
    port: u16,
    path: String,
}

impl Collector {
    /// `http://<host>[:<port>][/<path>]`, below which `/v1/traces` is (OTLP §HTTP; port 4318 is its own).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address of a collector; give http://<host>:4318");
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http")).ok_or_else(wrong)?;
        let path = format!("{}/v1/traces", uri.path().trim_end_matches('/'));
        Ok(Self { host: host.to_owned(), port: uri.port_u16().unwrap_or(4318), path })
    }
}

/// Why a batch was not taken.
enum Refused {
    /// It may be taken later.
    Later(String),
    /// It never will.
    Never(String),
}

/// Sends what comes until `end`; then what waits, once.
pub async fn run(collector: Collector, spans: Spans, mut queue: mpsc::Receiver<Span>, end: impl Future<Output = ()>) {
    let mut connection = None;
    let (mut failing, mut over) = (false, false);
    tokio::pin!(end);
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        tokio::select! {
            () = &mut end, if !over => over = true,
            count = queue.recv_many(&mut batch, BATCH), if !over => over = count == 0,
            else => {}
        }
        if !over && batch.len() < BATCH {
            let more = async {
                loop {
                    let room = BATCH - batch.len();
                    if room == 0 || queue.recv_many(&mut batch, room).await == 0 {
                        return;
                    }
                }
            };
            tokio::select! {
                () = &mut end => over = true,
                _ = timeout(GATHER, more) => {}
            }
        }
        while over && batch.len() < BATCH {
            let Ok(span) = queue.try_recv() else { break };
            batch.push(span);
        }
        let last = over && batch.len() < BATCH;
        if !batch.is_empty() {
            let (count, body) = (batch.len(), body(batch));
            match send(&collector, &mut connection, &body, if over { 1 } else { ATTEMPTS }).await {
                Ok(()) => {
                    spans.sent(count);
                    failing = false;
                }
                Err(error) => {
                    spans.dropped(count);
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(collector = collector.host, error, "spans cannot be sent and are dropped");
                    }
                }
            }
        }
        if last {
            return;
        }
    }
}

/// One message; the spans of each service together.
fn body(batch: Vec<Span>) -> Bytes {
    let mut services: BTreeMap<Arc<str>, Vec<_>> = BTreeMap::new();
    for Span { service, span } in batch {
        services.entry(service).or_default().push(span);
    }
    let scope = InstrumentationScope { name: "tulle".into(), version: env!("CARGO_PKG_VERSION").into() };
    let of_service = |(service, spans): (Arc<str>, Vec<_>)| ResourceSpans {
        resource: Some(Resource { attributes: attribute("service.name", &service).into_iter().collect() }),
        scope_spans: vec![ScopeSpans { scope: Some(scope.clone()), spans }],
    };
    let message = ExportTraceServiceRequest { resource_spans: services.into_iter().map(of_service).collect() };
    message.encode_to_vec().into()
}

type Connection = Option<SendRequest<Full<Bytes>>>;

async fn send(to: &Collector, connection: &mut Connection, body: &Bytes, attempts: u32) -> Result<(), String> {
    let mut pause = PAUSE;
    for attempt in 1.. {
        let tried = timeout(DEADLINE, once(to, connection, body)).await;
        let why = match tried.unwrap_or_else(|_| Err(Refused::Later(format!("no answer within {DEADLINE:?}")))) {
            Ok(()) => return Ok(()),
            Err(Refused::Never(why)) => return Err(why),
            Err(Refused::Later(why)) => why,
        };
        *connection = None;
        if attempt >= attempts {
            return Err(why);
        }
        sleep(pause).await;
        pause *= 2;
    }
    Ok(())
}

async fn once(to: &Collector, connection: &mut Connection, body: &Bytes) -> Result<(), Refused> {
    let later = |error: String| Refused::Later(error);
    let waiting = connection.take().filter(|sender| !sender.is_closed());
    let mut sender = match waiting {
        Some(sender) => sender,
        None => {
            let host = to.host.trim_matches(['[', ']']);
            let tcp = TcpStream::connect((host, to.port)).await.map_err(|error| later(error.to_string()))?;
            let (sender, driver) =
                http1::handshake(TokioIo::new(tcp)).await.map_err(|error| later(error.to_string()))?;
            tokio::spawn(driver);
            sender
        }
    };
    let request = Request::post(to.path.as_str())
        .header(HOST, format!("{}:{}", to.host, to.port))
        .header(CONTENT_TYPE, "application/x-protobuf")
        .body(Full::new(body.clone()))
        .map_err(|error| Refused::Never(error.to_string()))?;
    sender.ready().await.map_err(|error| later(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| later(error.to_string()))?;
    let status = response.status();
    let read = Limited::new(response.into_body(), ANSWER_BYTES).collect().await;
    match status {
        _ if status.is_success() => {
            *connection = read.is_ok().then_some(sender);
            Ok(())
        }
        // Those that the standard says to try again.
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Err(later(format!("it answered {status}"))),
        _ => Err(Refused::Never(format!("it answered {status}"))),
    }
}

#[cfg(test)]
mod tests;
