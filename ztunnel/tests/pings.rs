//! HTTP/2 connections to endpoints under `http2KeepAlive`: the server is asked whether it is there, and one that does not
//! say so in time loses its connection. What was under way there is sent anew where it may be, else answered.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use node::frames::{ACK, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, SETTINGS, frame, read};
use node::messages::{backend, name, route, rule};
use node::{Lab, Node};
use tulle_proto::workload::AppProtocol;
use ztunnel::base::Pings;
use ztunnel::state::{Change, DESTINATION_RULE, RouteMatch, TrafficPolicy, TrafficScope, TrafficSettings};

/// Far longer than anything here takes, and shorter than the proxy's own interval of a minute.
const PATIENCE: Duration = Duration::from_secs(40);

/// What a server knows of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    requests: usize,
    pings: usize,
    closed: bool,
}

#[derive(Default)]
struct State {
    connections: Vec<Seen>,
    /// Connections before this one are answered nothing any more.
    silent: usize,
    /// So is the next one that a request comes on, and this request.
    silenced_by_request: bool,
}

type Server = Arc<Mutex<State>>;

/// Answers requests and PINGs as long as its connection is not to be silent.
fn connection(mut tcp: TcpStream, server: &Server) {
    let number = {
        let mut state = server.lock().unwrap();
        state.connections.push(Seen::default());
        state.connections.len() - 1
    };
    let with = |then: &dyn Fn(&mut Seen)| {
        let mut state = server.lock().unwrap();
        then(&mut state.connections[number]);
        number >= state.silent
    };
    let request = || {
        let mut state = server.lock().unwrap();
        if std::mem::take(&mut state.silenced_by_request) {
            state.silent = number + 1;
        }
        drop(state);
        with(&|seen| seen.requests += 1)
    };
    let mut preface = [0; PREFACE.len()];
    if std::io::Read::read_exact(&mut tcp, &mut preface).is_ok() {
        tcp.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
        while let Some((kind, flags, stream, payload)) = read(&mut tcp) {
            let (answers, answer) = match kind {
                SETTINGS if flags & ACK == 0 => (true, frame(SETTINGS, ACK, 0, &[])),
                PING if flags & ACK == 0 => (with(&|seen| seen.pings += 1), frame(PING, ACK, 0, &payload)),
                // Status 200, from HPACK's own table.
                HEADERS => (request(), frame(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88])),
                _ => continue,
            };
            if answers && tcp.write_all(&answer).is_err() {
                break;
            }
        }
    }
    with(&|seen| seen.closed = true);
}

fn serve(server: Server) -> impl FnOnce() + Send + 'static {
    move || {
        for tcp in TcpListener::bind("[::]:8080").unwrap().incoming() {
            let (tcp, server) = (tcp.unwrap(), server.clone());
            std::thread::spawn(move || connection(tcp, &server));
        }
    }
}

/// A client in pod a, on one connection.
struct Client {
    runtime: tokio::runtime::Runtime,
    send: h2::client::SendRequest<Bytes>,
}

impl Client {
    fn new(lab: &Lab) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let tcp = lab.within("a", || TcpStream::connect("10.96.0.1:80").unwrap()).join().unwrap();
        tcp.set_nonblocking(true).unwrap();
        let send = runtime.block_on(async {
            let (send, connection) =
                h2::client::handshake(tokio::net::TcpStream::from_std(tcp).unwrap()).await.unwrap();
            tokio::spawn(connection);
            send
        });
        Self { runtime, send }
    }

    fn ask(&self, method: Method) -> StatusCode {
        let request = Request::builder().method(method).uri("http://web/").body(()).unwrap();
        let send = self.send.clone();
        let asked = async {
            let mut send = send.ready().await.unwrap();
            send.send_request(request, true).unwrap().0.await.unwrap().status()
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, asked).await }).expect("an answer")
    }
}

/// Waits for something of the server's connections.
fn wait(server: &Server, what: &str, is: impl Fn(&[Seen]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is(&server.lock().unwrap().connections) {
        assert!(Instant::now() < deadline, "not {what}: {:?}", server.lock().unwrap().connections);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn keepalive(pings: Pings) -> Change {
    let settings = TrafficSettings { pings: Some(pings), ..TrafficSettings::default() };
    Change::TrafficPolicy(Arc::new(TrafficPolicy {
        id: format!("{DESTINATION_RULE}shop/web").into(),
        version: "1".into(),
        namespace: "shop".into(),
        services: vec![name("web")],
        scope: TrafficScope::AllClients,
        settings,
        ports: BTreeMap::new(),
    }))
}

#[test]
fn a_server_that_does_not_say_that_it_is_there_loses_its_connection() {
    let lab = Lab::new("k");
    let server = Server::default();
    drop(lab.within("b", serve(server.clone())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe_services(&[("a", &[]), ("b", &["web"])], &[("web", "10.96.0.1", AppProtocol::Http2)]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    node.apply(vec![route("1", vec![rule(vec![RouteMatch::default()], vec![backend("web", 1)])])]);
    let client = Client::new(&lab);
    assert_eq!(client.ask(Method::GET), StatusCode::OK);
    let pings = Pings { interval: Duration::from_millis(100), timeout: Duration::from_secs(4) };
    node.apply(vec![keepalive(pings)]);
    // The rule holds for the next request, and a connection of before is not one of it.
    assert_eq!(client.ask(Method::GET), StatusCode::OK);
    wait(&server, "asked while there is no request", |seen| seen.len() == 2 && seen[1].pings >= 5);
    assert_eq!(client.ask(Method::GET), StatusCode::OK);
    let seen = server.lock().unwrap().connections.clone();
    assert_eq!(seen.len(), 2, "a server that answers keeps its connection: {seen:?}");
    assert_eq!((seen[1].requests, seen[1].closed, seen[0].pings), (2, false, 0));

    server.lock().unwrap().silent = 2;
    wait(&server, "closed without a request", |seen| seen[1].closed);
    assert!(!server.lock().unwrap().connections[0].closed, "nobody asks there");
    assert_eq!(client.ask(Method::GET), StatusCode::OK, "on another connection");

    // What is under way is sent anew on another one, if it may be done twice.
    for (method, status) in [(Method::GET, StatusCode::OK), (Method::POST, StatusCode::SERVICE_UNAVAILABLE)] {
        let last = server.lock().unwrap().connections.len() - 1;
        server.lock().unwrap().silenced_by_request = true;
        assert_eq!(client.ask(method.clone()), status, "{method}");
        wait(&server, "closed with a request", |seen| seen[last].closed);
        assert_eq!(server.lock().unwrap().connections[last].requests, 2);
    }
}
