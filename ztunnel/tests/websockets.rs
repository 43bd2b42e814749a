//! WebSockets over HTTP/2 (extended CONNECT, RFC 8441) where requests are read at the client's side, at the server's, and at
//! both. They are offered when the application offers them, and are bytes in both directions that who does not read slows
//! down.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::future::{Future, poll_fn};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::ext::Protocol;
use h2::{RecvStream, SendStream, client, server};
use http::{Method, Request, Response, StatusCode};
use node::messages::{allow_paths, backend, prefix, route, rule};
use node::{Lab, Node};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tulle_proto::workload::AppProtocol;
use ztunnel::state::RouteMatch;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(40);

/// What is sent there and back: several times what may be under way anywhere.
const SIZE: usize = 8 << 20;

/// What one stream may hold on its way at most: a window and some buffers at each hop.
const UNDER_WAY: usize = 4 << 20;

fn blocking<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work)
}

/// Sends all of `data`, as the other side takes it.
async fn send(to: &mut SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = poll_fn(|cx| to.poll_capacity(cx)).await.expect("an open stream").unwrap();
        to.send_data(data.split_to(room.min(data.len())), false).unwrap();
    }
}

/// The next bytes; none: the other side has ended.
async fn receive(from: &mut RecvStream) -> Option<Bytes> {
    let data = from.data().await?.unwrap();
    from.flow_control().release_capacity(data.len()).unwrap();
    Some(data)
}

/// Streams of [`answer`] whose server says nothing and has not seen their end.
static QUIET: AtomicUsize = AtomicUsize::new(0);

/// Echoes what comes on a stream of another protocol; of `/chat/stuck` nothing is read, on `/chat/quiet` nothing is said, and
/// `/chat/refused` gets 409. All else is answered with 200.
async fn answer(request: Request<RecvStream>, mut respond: server::SendResponse<Bytes>) {
    let protocol = request.extensions().get::<Protocol>().map(|protocol| protocol.as_str().to_owned());
    if request.method() != Method::CONNECT || protocol.as_deref() != Some("websocket") {
        respond.send_response(Response::new(()), true).unwrap();
        return;
    }
    let path = request.uri().path().to_owned();
    if path == "/chat/refused" {
        respond.send_response(Response::builder().status(409).body(()).unwrap(), true).unwrap();
        return;
    }
    let (mut from, mut to) = (request.into_body(), respond.send_response(Response::new(()), false).unwrap());
    if path == "/chat/quiet" {
        QUIET.fetch_add(1, Ordering::SeqCst);
        let _ = poll_fn(|cx| to.poll_reset(cx)).await;
        QUIET.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    if path == "/chat/stuck" {
        std::future::pending::<()>().await;
    }
    while let Some(data) = receive(&mut from).await {
        send(&mut to, data).await;
    }
    to.send_data(Bytes::new(), true).unwrap();
}

fn application(offers: bool) -> impl FnOnce() + Send + 'static {
    move || {
        blocking(async {
            let listener = TcpListener::bind("[::]:8080").await.unwrap();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut builder = server::Builder::new();
                    if offers {
                        builder.enable_connect_protocol();
                    }
                    let Ok(mut connection) = builder.handshake(tcp).await else { return };
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(answer(request, respond));
                    }
                });
            }
        });
    }
}

type Client = client::SendRequest<Bytes>;

async fn connect() -> Client {
    let tcp = TcpStream::connect("10.96.0.1:80").unwrap();
    tcp.set_nonblocking(true).unwrap();
    let (client, connection) = client::handshake(tokio::net::TcpStream::from_std(tcp).unwrap()).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The answer to a GET.
async fn get(client: &Client) -> StatusCode {
    let request = Request::builder().uri("http://web/chat").body(()).unwrap();
    let mut ready = client.clone().ready().await.unwrap();
    let (answer, _) = ready.send_request(request, true).unwrap();
    timeout(PATIENCE, answer).await.expect("an answer").unwrap().status()
}

/// The answer to a request for another protocol, and the stream.
async fn switch(
    client: &Client,
    path: &str,
    protocol: Option<&'static str>,
) -> (StatusCode, RecvStream, SendStream<Bytes>) {
    let mut request = Request::builder().method(Method::CONNECT).uri(format!("http://web{path}"));
    match protocol {
        Some(protocol) => request = request.extension(Protocol::from_static(protocol)),
        None => request = Request::builder().method(Method::CONNECT).uri("web:80"),
    }
    let mut ready = client.clone().ready().await.unwrap();
    let (answer, to) = ready.send_request(request.body(()).unwrap(), false).unwrap();
    let (head, from) = timeout(PATIENCE, answer).await.expect("an answer").unwrap().into_parts();
    (head.status, from, to)
}

/// A client to whom it is offered. Who comes before the node knows is not.
async fn offered() -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let client = connect().await;
        assert_eq!(get(&client).await, 200);
        if client.is_extended_connect_protocol_enabled() {
            return client;
        }
        assert!(Instant::now() < deadline, "it is not offered");
    }
}

async fn echoes(client: &Client) {
    let (status, mut from, mut to) = switch(client, "/chat", Some("websocket")).await;
    assert_eq!(status, 200);
    let all: Bytes = (0..SIZE).map(|number| (number / 7) as u8).collect();
    let sent = all.clone();
    let sending = tokio::spawn(async move {
        send(&mut to, sent).await;
        to.send_data(Bytes::new(), true).unwrap();
    });
    let mut back = Vec::new();
    while let Some(data) = timeout(PATIENCE, receive(&mut from)).await.expect("bytes") {
        back.extend_from_slice(&data);
    }
    sending.await.unwrap();
    assert!(back == all, "{} bytes came back, of {SIZE}, or others", back.len());
}

/// Who does not read stops who sends, and nobody else.
async fn is_bounded(client: &Client) {
    let (status, _from, mut to) = switch(client, "/chat/stuck", Some("websocket")).await;
    assert_eq!(status, 200);
    let (part, mut sent) = (Bytes::from(vec![1; 64 << 10]), 0);
    while sent < 2 * UNDER_WAY && timeout(Duration::from_secs(2), send(&mut to, part.clone())).await.is_ok() {
        sent += part.len();
    }
    assert!(sent < UNDER_WAY, "{sent} bytes on their way to nobody");
    assert_eq!(get(client).await, 200, "others go on");
}

async fn others_are_refused(client: &Client) {
    for (path, protocol, status) in [
        ("/chat", None, 501),
        ("/chat", Some("h2c"), 501),
        ("/chat", Some("connect-tcp"), 501),
        ("/chat/refused", Some("websocket"), 409),
    ] {
        assert_eq!(switch(client, path, protocol).await.0, status, "{path} {protocol:?}");
    }
}

/// A stream ends with its client's connection, also one whose client has ended its own side, when the server says nothing.
async fn streams_end_with_their_client(client: Client) {
    let quiet = |wanted: usize| async move {
        let deadline = Instant::now() + PATIENCE;
        while QUIET.load(Ordering::SeqCst) != wanted {
            assert!(Instant::now() < deadline, "{} and not {wanted}", QUIET.load(Ordering::SeqCst));
            sleep(Duration::from_millis(20)).await;
        }
    };
    let mut held = Vec::new();
    for ended in [false, true] {
        let (status, from, mut to) = switch(&client, "/chat/quiet", Some("websocket")).await;
        assert_eq!(status, 200);
        if ended {
            to.send_data(Bytes::new(), true).unwrap();
        }
        held.push((from, to));
    }
    quiet(2).await;
    drop((held, client));
    quiet(0).await;
}

fn world(tag: &str) -> (Lab, Node) {
    let lab = Lab::new(tag);
    drop(lab.within("b", application(true)));
    drop(lab.within("c", application(false)));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b", "c"]));
    let services = [("web", "10.96.0.1", AppProtocol::Http2), ("old", "10.96.0.2", AppProtocol::Http2)];
    node.describe_services(&[("a", &[]), ("b", &["web"]), ("c", &["old"])], &services);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    (lab, node)
}

fn routes(node: &mut Node) {
    let rules = vec![
        rule(vec![prefix("/old")], vec![backend("old", 1)]),
        rule(vec![RouteMatch::default()], vec![backend("web", 1)]),
    ];
    node.apply(vec![route("1", rules)]);
}

#[test]
fn websockets_over_http2_pass_where_routes_read_requests() {
    let (lab, mut node) = world("y");
    routes(&mut node);
    let client = lab.within("a", || {
        blocking(async {
            let first = connect().await;
            assert_eq!(get(&first).await, 200);
            assert!(!first.is_extended_connect_protocol_enabled(), "nobody knows yet");
            let client = offered().await;
            echoes(&client).await;
            is_bounded(&client).await;
            others_are_refused(&client).await;
            // One backend of the route does not take it, which is found out now.
            assert_eq!(switch(&client, "/old", Some("websocket")).await.0, 501);
            let deadline = Instant::now() + PATIENCE;
            loop {
                let later = connect().await;
                assert_eq!(get(&later).await, 200);
                if !later.is_extended_connect_protocol_enabled() {
                    return;
                }
                assert!(Instant::now() < deadline, "still offered");
            }
        });
    });
    client.join().unwrap();
}

#[test]
fn and_where_a_policy_does_and_where_both_do() {
    let (lab, mut node) = world("z");
    node.apply(vec![allow_paths("1", "/chat")]);
    for routed in [false, true] {
        if routed {
            routes(&mut node);
        }
        let client = lab.within("a", move || {
            blocking(async {
                let client = if routed { offered().await } else { connect().await };
                assert_eq!(get(&client).await, 200);
                assert!(client.is_extended_connect_protocol_enabled(), "as the application does");
                echoes(&client).await;
                others_are_refused(&client).await;
                assert_eq!(switch(&client, "/other", Some("websocket")).await.0, 403, "routed: {routed}");
                streams_end_with_their_client(client).await;
            });
        });
        client.join().unwrap();
    }
}
