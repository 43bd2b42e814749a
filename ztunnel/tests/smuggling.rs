//! Requests and answers that two readers could frame differently, against servers that read them in opposite ways: one that
//! believes a length before chunks and one that believes chunks before a length. The bytes of one message never become two.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::messages::{Client, allow_paths, backend, prefix, read, route, rule};
use node::{Lab, Node};
use tulle_proto::workload::AppProtocol;

/// Targets of all requests that a server took for one, in order.
type Seen = Arc<Mutex<Vec<String>>>;

/// A request as it is understood by a reader to whom chunks are all that counts. Lines end in any way.
fn read_chunks_first(from: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = || {
        let mut line = String::new();
        (from.read_line(&mut line).ok()? > 0).then(|| line.trim_end().to_owned())
    };
    let first = line()?;
    let (mut chunked, mut length) = (false, 0);
    loop {
        let line = line()?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        chunked |= line.contains("transfer-encoding") && line.contains("chunked");
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    loop {
        if chunked {
            let mut size = String::new();
            from.read_line(&mut size).ok()?;
            length = usize::from_str_radix(size.trim().split(';').next()?, 16).ok()?;
        }
        from.read_exact(&mut vec![0; length]).ok()?;
        if chunked {
            from.read_line(&mut String::new()).ok()?;
        }
        if !chunked || length == 0 {
            return Some(first);
        }
    }
}

/// Answers each request with its target. `/answers/` are given as the target says.
fn serve(seen: Seen, length_first: bool) -> impl FnOnce() + Send + 'static {
    move || {
        for tcp in TcpListener::bind("[::]:8080").unwrap().incoming() {
            let (mut tcp, seen) = (tcp.unwrap(), seen.clone());
            std::thread::spawn(move || {
                let mut from = BufReader::new(tcp.try_clone().unwrap());
                let mut next = || {
                    if length_first {
                        read(&mut from).map(|message| message.first)
                    } else {
                        read_chunks_first(&mut from)
                    }
                };
                while let Some(first) = next() {
                    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
                    seen.lock().unwrap().push(target.clone());
                    let number = target.rsplit('/').next().and_then(|number| number.parse::<usize>().ok());
                    let answer = match number.filter(|_| target.contains("/answers/")) {
                        Some(number) => ANSWERS[number].1.to_owned(),
                        None => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{target}", target.len()),
                    };
                    if tcp.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    }
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: web\r\n\r\n";

/// What it is, how it is spelled behind `POST <path>`, and its status.
fn spellings() -> Vec<(&'static str, String, u16)> {
    let post = |headers: &str, body: &str| format!(" HTTP/1.1\r\nhost: web\r\n{headers}\r\n{body}{SMUGGLED}");
    let chunks = "1\r\na\r\n0\r\n\r\n";
    let all = chunks.len() + SMUGGLED.len();
    let te = "transfer-encoding: chunked\r\n";
    let both = |length: usize| post(&format!("content-length: {length}\r\n{te}"), chunks);
    let coding = |value: &str| post(&format!("content-length: {all}\r\ntransfer-encoding:{value}\r\n"), chunks);
    let alone = |value: &str| post(&format!("transfer-encoding:{value}\r\n"), chunks);
    let chunk = |body: &str| post(te, body);
    let long = "x".repeat(20_000);
    vec![
        ("a length in front of chunks (CL.TE)", both(all), 400),
        ("a shorter length in front of chunks", both(chunks.len()), 400),
        ("a length behind chunks (TE.CL)", post(&format!("{te}content-length: {all}\r\n"), chunks), 400),
        ("a length of nothing and chunks", both(0), 400),
        ("two codings (TE.TE)", post(&format!("{te}transfer-encoding: x\r\n"), chunks), 400),
        ("two codings, chunked last", post(&format!("transfer-encoding: x\r\n{te}"), chunks), 400),
        ("chunked twice", post(&format!("{te}{te}"), chunks), 400),
        ("a coding that looks like chunked", coding(" xchunked"), 400),
        ("a tab in front of chunked, and a length", coding("\tchunked"), 400),
        ("a vertical tab in front of chunked", coding(" \x0bchunked"), 400),
        ("quotes", alone(" \"chunked\""), 400),
        ("a list that ends in chunked", alone(" identity, chunked"), 400),
        ("a list that does not", alone(" chunked, identity"), 400),
        ("no coding", alone(""), 400),
        (
            "a space before the colon",
            post(&format!("transfer-encoding : chunked\r\ncontent-length: {all}\r\n"), chunks),
            400,
        ),
        ("a folded coding", post("transfer-encoding:\r\n chunked\r\n", chunks), 400),
        ("a folded line first", post(&format!(" x: y\r\n{te}"), chunks), 400),
        ("a NUL in a name", post(&format!("trans\0fer-encoding: chunked\r\ncontent-length: {all}\r\n"), chunks), 400),
        ("a NUL in a value", post(&format!("x: \0\r\n{te}"), chunks), 400),
        ("a bare CR in a value", post("x: a\rtransfer-encoding: chunked\r\n", ""), 400),
        ("two lengths", post(&format!("content-length: 0\r\ncontent-length: {}\r\n", SMUGGLED.len()), ""), 400),
        ("a list of lengths", post("content-length: 0, 0\r\n", ""), 400),
        ("a length with a sign", post("content-length: +0\r\n", ""), 400),
        ("a length with a space inside", post("content-length: 0 1\r\n", ""), 400),
        ("a negative length", post("content-length: -1\r\n", ""), 400),
        ("a hexadecimal length", post("content-length: 0x1\r\n", "a"), 400),
        ("a length that overflows", post("content-length: 18446744073709551616\r\n", ""), 400),
        ("two hosts", post("host: web\r\ncontent-length: 0\r\n", ""), 400),
        ("a chunk size that is none", chunk("z\r\na\r\n0\r\n\r\n"), 400),
        ("a chunk size with a prefix", chunk("0x1\r\na\r\n0\r\n\r\n"), 400),
        ("a chunk size that overflows", chunk("10000000000000001\r\na\r\n0\r\n\r\n"), 400),
        ("a chunk that is longer than it says", chunk("1\r\nab\r\n0\r\n\r\n"), 400),
        ("a chunk size that ends in LF", chunk("1\na\r\n0\r\n\r\n"), 400),
        ("a chunk that ends in LF", chunk("1\r\na\n0\r\n\r\n"), 400),
        ("a chunk extension without an end", chunk(&format!("1;{long}\r\na\r\n0\r\n\r\n")), 400),
        ("a line break in a chunk extension", chunk("1;x\ry\r\na\r\n0\r\n\r\n"), 400),
        ("chunks in HTTP/1.0", format!(" HTTP/1.0\r\nhost: web\r\n{te}\r\n{chunks}{SMUGGLED}"), 400),
        (
            "lines that end in LF",
            format!(" HTTP/1.1\nhost: web\ncontent-length: {}\n\n{SMUGGLED}", SMUGGLED.len()),
            200,
        ),
        ("a length that counts all", post(&format!("content-length: {}\r\n", SMUGGLED.len()), ""), 200),
        (
            "the same length twice",
            post(&format!("content-length: {0}\r\ncontent-length: {0}\r\n", SMUGGLED.len()), ""),
            200,
        ),
        ("all in one chunk", post(te, &format!("{:x}\r\n", SMUGGLED.len())) + "\r\n0\r\n\r\n", 200),
        ("a chunk extension", post(te, &format!("{:X};a=b\r\n", SMUGGLED.len())) + "\r\n0\r\n\r\n", 200),
    ]
}

/// Answers by number: what each is, how it is spelled, and the status that a client gets.
const ANSWERS: &[(&str, &str, u16)] = &[
    (
        "a length and chunks",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        502,
    ),
    (
        "chunks and a length",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n1\r\na\r\n0\r\n\r\n",
        502,
    ),
    ("two lengths", "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 502),
    ("a length that is none", "HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\na", 502),
    ("a folded line", "HTTP/1.1 200 OK\r\nx: 1\r\n 2\r\ncontent-length: 0\r\n\r\n", 502),
    ("a space before the colon", "HTTP/1.1 200 OK\r\ncontent-length : 1\r\n\r\na", 502),
    ("no HTTP", "SSH-2.0-OpenSSH_9.2\r\n\r\n", 502),
    ("the same length twice", "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na", 200),
    (
        "two answers",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother",
        200,
    ),
];

/// The client's side of the test. Requests to `/cl` are answered by one server, those to `/te` by the other.
fn attack(seen: [Seen; 2]) {
    for (path, seen) in ["/cl", "/te"].into_iter().zip(&seen) {
        for (number, (what, spelling, status)) in spellings().into_iter().enumerate() {
            let mut client = Client::connect();
            client.0.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let target = format!("{path}/{number}");
            let answer = client.ask(&format!("POST {target}{spelling}"));
            let found = answer.as_ref().map(node::messages::Message::status);
            assert_eq!(found, Some(status), "{what}");
            if status == 400 {
                assert!(read(&mut client.0).is_none(), "{what}: the connection is closed");
            }
            // Whoever comes next gets its own answer, also on the same connection to the server.
            for _ in 0..2 {
                let target = format!("{path}/next-{number}");
                assert_eq!(Client::connect().get(&target, "").text(), target, "behind {what}");
            }
            let seen = seen.lock().unwrap();
            assert!(!seen.iter().any(|target| target == "/smuggled"), "{what}: {:?}", seen.last());
            let whole = seen.iter().filter(|seen| **seen == target).count();
            assert_eq!(whole, usize::from(status == 200), "{what}");
        }
        for (number, (what, _, status)) in ANSWERS.iter().enumerate() {
            let mut client = Client::connect();
            assert_eq!(client.get(&format!("{path}/answers/{number}"), "").status(), *status, "{what}");
            for target in [format!("{path}/mine"), format!("{path}/again")] {
                assert_eq!(client.get(&target, "").text(), target, "behind {what}");
            }
        }
    }
}

/// A node with the client a and the servers b (Services web and v1) and c (v2).
fn world(tag: &str) -> (Lab, Node, [Seen; 2]) {
    let (lab, seen) = (Lab::new(tag), [Seen::default(), Seen::default()]);
    drop(lab.within("b", serve(seen[0].clone(), true)));
    drop(lab.within("c", serve(seen[1].clone(), false)));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b", "c"]));
    let http = AppProtocol::Http11;
    node.describe_services(
        &[("a", &[]), ("b", &["web", "v1"]), ("c", &["v2"])],
        &[("web", "10.96.0.1", http), ("v1", "10.96.0.2", http), ("v2", "10.96.0.3", http)],
    );
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    (lab, node, seen)
}

#[test]
fn nothing_is_smuggled_past_the_clients_side() {
    let (lab, mut node, seen) = world("g");
    let to = |path: &str, service: &str| rule(vec![prefix(path)], vec![backend(service, 1)]);
    node.apply(vec![route("1", vec![to("/cl", "v1"), to("/te", "v2"), to("/smuggled", "v1")])]);
    lab.within("a", || attack(seen)).join().unwrap();
}

/// Without routes a Service leads to all of its pods, so there is one kind of server at a time.
#[test]
fn nor_past_the_servers_side() {
    for (tag, length_first) in [("h", true), ("i", false)] {
        let (lab, seen) = (Lab::new(tag), Seen::default());
        drop(lab.within("b", serve(seen.clone(), length_first)));
        let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
        node.describe_services(&[("a", &[]), ("b", &["web"])], &[("web", "10.96.0.1", AppProtocol::Http11)]);
        node.wait(&[("a", "Captured"), ("b", "Captured")]);
        node.apply(vec![allow_paths("1", "/")]);
        lab.within("a", || attack([seen.clone(), seen])).join().unwrap();
    }
}
