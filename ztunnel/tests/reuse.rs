//! Connections to servers that are used again, against servers that close them in the worst moment: no request is lost
//! that may be sent twice, and none is sent twice that may not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::messages::{Client, Message, allow_paths, backend, read, route, rule};
use node::{Lab, Node};
use tulle_proto::workload::AppProtocol;
use ztunnel::state::RouteMatch;

/// Requests of each kind and client. A race that is lost once in a hundred times is found.
const REQUESTS: usize = 150;

/// Clients at the same time: more than cores, so that everybody is interrupted everywhere.
const CLIENTS: usize = 6;

/// How often each request arrived: method, path and query.
type Seen = Arc<Mutex<BTreeMap<String, u32>>>;

fn answer(tcp: &mut TcpStream, more: &str) -> bool {
    tcp.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{more}\r\nok").as_bytes()).is_ok()
}

/// One connection to a server. By its path a request is answered and the connection closed at once (`/once`), closed with
/// the next request unread in it (`/unread`) or read and unanswered (`/swallow`), or closed as it was said (`/said`).
fn connection(mut tcp: TcpStream, seen: &Seen) {
    let mut from = BufReader::new(tcp.try_clone().unwrap());
    let mut before = 0;
    while let Some(Message { first, .. }) = read(&mut from) {
        let mut words = first.split(' ');
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        *seen.lock().unwrap().entry(format!("{method} {target}")).or_default() += 1;
        let path = target.split('?').next().unwrap();
        if path == "/swallow" && before > 0 {
            return;
        }
        let more = if path == "/said" { "connection: close\r\n" } else { "" };
        if !answer(&mut tcp, more) || path == "/once" || path == "/said" {
            return;
        }
        if path == "/unread" {
            // Closing with bytes unread resets the connection.
            let _ = tcp.peek(&mut [0]);
            return;
        }
        before += 1;
    }
}

fn serve(seen: Seen) -> impl FnOnce() + Send + 'static {
    move || {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        for tcp in listener.incoming() {
            let (tcp, seen) = (tcp.unwrap(), seen.clone());
            std::thread::spawn(move || connection(tcp, &seen));
        }
    }
}

/// A node with the client a and the server b behind the Service `web`, whose requests are routed.
fn world(tag: &str) -> (Lab, Node, Seen) {
    let lab = Lab::new(tag);
    let seen = Seen::default();
    drop(lab.within("b", serve(seen.clone())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe_services(&[("a", &[]), ("b", &["web"])], &[("web", "10.96.0.1", AppProtocol::Http11)]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    (lab, node, seen)
}

/// Asks for `path` on one connection again and again; the statuses, counted.
fn ask(client: usize, method: &'static str, path: &'static str) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    let mut connection = Client::connect();
    connection.0.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    for number in 0..REQUESTS {
        let length = if method == "POST" { "content-length: 0\r\n" } else { "" };
        let request = format!("{method} {path}?{client}-{number} HTTP/1.1\r\nhost: web\r\n{length}\r\n");
        let status = connection.ask(&request).map_or(0, |answer| answer.status());
        *counts.entry(status).or_default() += 1;
    }
    counts
}

/// Many clients at once; the statuses of all.
fn together(lab: &Lab, method: &'static str, path: &'static str) -> BTreeMap<u16, usize> {
    let clients: Vec<_> = (0..CLIENTS).map(|client| lab.within("a", move || ask(client, method, path))).collect();
    let mut all = BTreeMap::new();
    for counts in clients.into_iter().map(|client| client.join().unwrap()) {
        for (status, count) in counts {
            *all.entry(status).or_default() += count;
        }
    }
    all
}

fn check(lab: &Lab, seen: &Seen) {
    for path in ["/once", "/said", "/unread", "/swallow"] {
        assert_eq!(together(lab, "GET", path), BTreeMap::from([(200, CLIENTS * REQUESTS)]), "GET {path}");
    }
    assert_eq!(together(lab, "POST", "/said"), BTreeMap::from([(200, CLIENTS * REQUESTS)]), "closed as it was said");
    // What was swallowed may have had its effect: the client is told, and nobody does it again.
    let posted = together(lab, "POST", "/swallow");
    assert!(posted.keys().all(|status| [200, 503].contains(status)), "{posted:?}");
    let seen = seen.lock().unwrap();
    let twice: Vec<_> = seen.iter().filter(|(request, count)| request.starts_with("POST") && **count > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

#[test]
fn a_server_that_closes_in_the_worst_moment_costs_no_request() {
    let (lab, mut node, seen) = world("u");
    node.apply(vec![route("1", vec![rule(vec![RouteMatch::default()], vec![backend("web", 1)])])]);
    check(&lab, &seen);
}

#[test]
fn nor_where_a_policy_reads_requests_at_the_servers_side() {
    let (lab, mut node, seen) = world("v");
    node.apply(vec![allow_paths("1", "/")]);
    check(&lab, &seen);
}
