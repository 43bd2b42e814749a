//! Against a collector on loopback that takes the messages apart: what arrives, and what is lost while it is away.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tulle_proto::otlp;

use super::{Collector, run};
use crate::telemetry::trace::{ALL, Span, Spans};

const DEADLINE: Duration = Duration::from_secs(30);

/// One request: its first line, and what is in it.
async fn request(stream: &mut TcpStream) -> Option<(String, otlp::ExportTraceServiceRequest)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    assert!(head.contains("content-type: application/x-protobuf"), "{head}");
    let line = head.lines().next().unwrap_or_default().to_owned();
    Some((line, otlp::ExportTraceServiceRequest::decode(&body[..]).unwrap()))
}

/// Answers each request with the next of `statuses`, then with 200; tells what it took.
async fn collector(statuses: Vec<u16>) -> (u16, mpsc::Receiver<(String, otlp::ExportTraceServiceRequest)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, taken) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut statuses = statuses.into_iter();
        while let Ok((mut stream, _)) = listener.accept().await {
            while let Some(request) = request(&mut stream).await {
                let status = statuses.next().unwrap_or(200);
                let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes()).await;
                if status == 200 {
                    let _ = told.send(request).await;
                }
            }
        }
    });
    (port, taken)
}

fn span(service: &str, name: &str) -> Span {
    Span { service: service.into(), span: otlp::Span { name: name.to_owned(), ..otlp::Span::default() } }
}

fn counted(registry: &Registry) -> (u64, u64) {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    let count = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    };
    (count("tulle_spans_sent_total"), count("tulle_spans_dropped_total"))
}

#[tokio::test]
async fn spans_arrive_by_service_also_after_the_collector_was_busy() {
    let (port, mut taken) = collector(vec![503]).await;
    let mut registry = Registry::default();
    let spans = Spans::new(&mut registry);
    let queue = spans.start(ALL).unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let to = Collector::parse(&format!("http://127.0.0.1:{port}/otlp/")).unwrap();
    let task = tokio::spawn(run(to, spans.clone(), queue, async { drop(ended.await) }));
    for (service, name) in [("cart.shop", "GET"), ("web.shop", "GET"), ("cart.shop", "POST")] {
        spans.put(span(service, name));
    }
    let (line, message) = timeout(DEADLINE, taken.recv()).await.unwrap().unwrap();
    assert_eq!(line, "post /otlp/v1/traces http/1.1");
    let seen: Vec<(String, usize)> = message
        .resource_spans
        .iter()
        .map(|of| {
            let attributes = &of.resource.as_ref().unwrap().attributes;
            let Some(otlp::any_value::Value::StringValue(name)) = attributes[0].value.clone().unwrap().value else {
                panic!("{attributes:?}")
            };
            (name, of.scope_spans[0].spans.len())
        })
        .collect();
    assert_eq!(seen, [("cart.shop".to_owned(), 2), ("web.shop".to_owned(), 1)]);
    // What waits at the end is sent.
    spans.put(span("cart.shop", "LAST"));
    drop(end);
    timeout(DEADLINE, task).await.unwrap().unwrap();
    let (_, message) = timeout(DEADLINE, taken.recv()).await.unwrap().unwrap();
    assert_eq!(message.resource_spans[0].scope_spans[0].spans[0].name, "LAST");
    assert_eq!(counted(&registry), (4, 0));
}

#[tokio::test]
async fn what_nobody_takes_is_dropped_and_counted() {
    let mut registry = Registry::default();
    let spans = Spans::new(&mut registry);
    spans.put(span("cart.shop", "before the start"));
    let queue = spans.start(ALL).unwrap();
    assert!(spans.start(ALL).is_none(), "one queue");
    for _ in 0..5000 {
        spans.put(span("cart.shop", "GET"));
    }
    assert_eq!(counted(&registry), (0, 1 + 5000 - 4096), "the queue is bounded");
    let (port, _taken) = collector(vec![400; 1000]).await;
    let to = Collector::parse(&format!("http://127.0.0.1:{port}")).unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let counts = Arc::new(spans);
    let task = tokio::spawn(run(to, (*counts).clone(), queue, async { drop(ended.await) }));
    let all_gone = async {
        while counted(&registry).1 < 5001 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let gone = timeout(DEADLINE, all_gone).await;
    assert!(gone.is_ok(), "sent and dropped: {:?}", counted(&registry));
    drop(end);
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert_eq!(counted(&registry), (0, 5001));
}

#[test]
fn a_collector_has_an_address_that_can_be_used() {
    let good = Collector::parse("http://otel.observability").unwrap();
    assert_eq!((good.host.as_str(), good.port, good.path.as_str()), ("otel.observability", 4318, "/v1/traces"));
    for bad in ["https://otel:4318", "otel:4318", "http://", "grpc://otel:4317"] {
        assert!(Collector::parse(bad).is_err(), "{bad}");
    }
}
