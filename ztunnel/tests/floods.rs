//! Clients that attack: floods of frames that cost them nothing, heads without an end, messages that unpack to a thousand
//! times their size. Each is cut off, memory stays bounded, and other clients notice nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use node::frames::{
    CONTINUATION, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, frame, get, stream,
};
use node::messages::{Client, allow_paths, backend, prefix, route, rule};
use node::{Lab, Node};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tulle_proto::workload::AppProtocol;
use ztunnel::state::{Filters, Redirect, RouteMatch, RouteRule};

/// Until an attack has to be over. One of them is slow by nature: 15 s.
const PATIENCE: Duration = Duration::from_secs(90);

/// Frames of an attack: more than anybody would let pass, and fewer bytes than a worker reads in seconds.
const MANY: usize = 200_000;

/// Clients that send a head byte by byte.
const SLOW: usize = 300;

/// What all attacks together may leave behind at most, bytes: 64 MiB is what the pod may buffer, and allocators keep some.
const MEMORY: usize = 160 << 20;

fn connect() -> TcpStream {
    let tcp = TcpStream::connect("10.96.0.1:80").unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.set_write_timeout(Some(PATIENCE)).unwrap();
    tcp
}

/// Sends `opening` and then what `more` makes of each number, while somebody reads the answers, until the proxy has closed
/// the connection. What is still unsent after [`MANY`] was not refused.
fn attack(what: &str, opening: &[u8], more: impl Fn(usize) -> Vec<u8>) {
    let mut tcp = connect();
    let mut from = tcp.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            }
        }
    });
    let mut sent = tcp.write_all(opening);
    let mut number = 0;
    while sent.is_ok() && number < MANY {
        // Many with one call, as a flood would.
        let batch: Vec<u8> = (number..number + 100).flat_map(&more).collect();
        sent = tcp.write_all(&batch);
        number += 100;
    }
    let timed_out = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    assert!(!sent.is_err_and(|error| timed_out(&error)), "{what}: neither read nor refused");
    assert!(reader.join().unwrap(), "{what}: still open after {number}");
}

fn begun(settings: &[u8]) -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()
}

/// Attacks that HTTP/2 offers: how many there were.
fn frames() -> usize {
    let start = begun(&[]);
    attack("pings", &start, |_| frame(PING, 0, 0, &[0; 8]));
    attack("settings", &start, |_| frame(SETTINGS, 0, 0, &[]));
    attack("empty DATA", &[start.clone(), frame(HEADERS, END_HEADERS, 1, &get("/sink"))].concat(), |_| {
        frame(0, 0, 1, &[])
    });
    for path in ["/sink", "/"] {
        attack("streams that are reset at once", &start, |number| {
            let headers = frame(HEADERS, END_HEADERS | END_STREAM, stream(number), &get(path));
            [headers, frame(RST_STREAM, 0, stream(number), &8_u32.to_be_bytes())].concat()
        });
    }
    attack("streams without an end", &start, |number| frame(HEADERS, END_HEADERS, stream(number), &get("/sink")));
    attack("headers without an end", &[start.clone(), frame(HEADERS, 0, 1, &get("/"))].concat(), |_| {
        frame(CONTINUATION, 0, 1, &[b"\x00\x01a\x7f\x81\x03".to_vec(), vec![b'a'; 512]].concat())
    });
    attack("headers without an end, an empty frame each", &[start, frame(HEADERS, 0, 1, &get("/"))].concat(), |_| {
        frame(CONTINUATION, 0, 1, &[])
    });
    8
}

/// One entry of 4 KB in HPACK's table, and requests that name it ten thousand times: 40 MB each in a frame of 10 KB.
fn bomb() {
    let mut tcp = connect();
    let mut first = get("/");
    // Literal with indexing: the name x, a value of 4,000 bytes (127 + 3873, as a prefix integer).
    first.extend(b"\x40\x01x\x7f\xa1\x1e");
    first.extend(vec![b'a'; 4000]);
    tcp.write_all(&begun(&[])).unwrap();
    tcp.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &first)).unwrap();
    let heavy = [get("/"), vec![0xbf; 10_000]].concat();
    for number in 1..50 {
        if tcp.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream(number), &heavy)).is_err() {
            return;
        }
    }
    let _ = tcp.shutdown(std::net::Shutdown::Write);
    let _ = std::io::copy(&mut tcp, &mut std::io::sink());
}

/// Heads without an end: fast ones, and hundreds that come byte by byte. How many there were.
fn heads() -> usize {
    for line in [format!("x-{}: 1\r\n", "a".repeat(1000)), "a: b\r\n".to_owned()] {
        attack("a header bomb", b"GET / HTTP/1.1\r\nhost: web\r\n", |_| line.clone().into_bytes());
    }
    attack("a target without an end", b"GET /", |_| vec![b'a'; 100]);
    let mut slow: Vec<TcpStream> = (0..SLOW).map(|_| connect()).collect();
    let begin = Instant::now();
    for tcp in &mut slow {
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nx: ").unwrap();
        tcp.set_nonblocking(true).unwrap();
    }
    while !slow.is_empty() {
        assert!(begin.elapsed() < PATIENCE, "{} heads are still under way", slow.len());
        std::thread::sleep(Duration::from_millis(200));
        slow.retain_mut(|tcp| {
            let open = tcp.write(b"a").is_ok();
            let read = tcp.read(&mut [0; 1024]);
            open && !matches!(read, Ok(0)) && !read.is_err_and(|error| error.kind() != ErrorKind::WouldBlock)
        });
    }
    3 + SLOW
}

/// Reads and says nothing.
fn sink() {
    for tcp in TcpListener::bind("[::]:8080").unwrap().incoming() {
        let mut tcp = tcp.unwrap();
        std::thread::spawn(move || std::io::copy(&mut tcp, &mut std::io::sink()));
    }
}

fn memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A client that asks for `path` again and again until told to stop: how often, every answer having been `status`.
fn quiet(stop: &AtomicBool, path: &str, status: u16) -> usize {
    let mut answers = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut client = Client::connect();
        client.0.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        for _ in 0..10 {
            assert_eq!(client.get(path, "").status(), status);
            answers += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    answers
}

/// Connections that were closed for what their clients said.
fn refused(node: &Node) -> usize {
    let (mut registry, mut text) = (Registry::default(), String::new());
    registry.register("closed", "", node.metrics.closed.clone());
    encode(&mut text, &registry).unwrap();
    let refused = text.lines().filter(|line| line.contains("response_flags=\"DENY\""));
    refused.map(|line| line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()).sum()
}

/// Attacks by pod a while pods a and c ask for `path`. Each of their connections is recorded as one that was refused.
fn check(lab: &Lab, node: &Node, path: &'static str, status: u16) {
    let (before, known) = (memory(), refused(node));
    let stop = Arc::new(AtomicBool::new(false));
    let others = ["a", "c"].map(|pod| {
        let stop = stop.clone();
        lab.within(pod, move || quiet(&stop, path, status))
    });
    let attacks = lab.within("a", || {
        bomb();
        frames() + heads()
    });
    let attacked = attacks.join();
    stop.store(true, Ordering::Relaxed);
    for other in others {
        assert!(other.join().expect("others notice nothing") > 0);
    }
    let attacks = attacked.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while refused(node) - known < attacks {
        assert!(Instant::now() < deadline, "{} of {attacks} are recorded as refused", refused(node) - known);
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = memory();
    assert!(after < before + MEMORY, "{before} bytes before, {after} after");
}

#[test]
fn floods_and_slow_clients_are_cut_off_at_the_clients_side() {
    let lab = Lab::new("f");
    drop(lab.within("b", sink));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b", "c"]));
    let web = [("web", "10.96.0.1", AppProtocol::Http11)];
    node.describe_services(&[("a", &[]), ("b", &["web"]), ("c", &[])], &web);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    let redirect = Redirect { scheme: None, hostname: None, port: None, path: None, status: 302 };
    let filters = Filters { redirect: Some(redirect), ..Filters::default() };
    let rules = vec![
        rule(vec![prefix("/sink")], vec![backend("web", 1)]),
        RouteRule { filters, ..rule(vec![RouteMatch::default()], Vec::new()) },
    ];
    node.apply(vec![route("1", rules)]);
    check(&lab, &node, "/", 302);
}

/// The application says nothing here, so others are answered by the policy.
#[test]
fn and_at_the_servers_side() {
    let lab = Lab::new("e");
    drop(lab.within("b", sink));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b", "c"]));
    let web = [("web", "10.96.0.1", AppProtocol::Http11)];
    node.describe_services(&[("a", &[]), ("b", &["web"]), ("c", &[])], &web);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    node.apply(vec![allow_paths("1", "/sink")]);
    check(&lab, &node, "/denied", 403);
}
