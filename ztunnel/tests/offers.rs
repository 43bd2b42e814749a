//! What is said between a request and its answer: bodies that are offered first, hints, bodies where few expect one, and
//! CONNECT. Through a route at the client's side and a policy at the server's side at once.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use node::messages::{Client, allow_paths, backend, read, route, rule};
use node::{Lab, Node};
use tulle_proto::workload::AppProtocol;
use ztunnel::state::RouteMatch;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn line(from: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// Serves one connection; `said` gets the bytes of a body that was not wanted, as a number.
fn connection(mut tcp: TcpStream, said: &mpsc::Sender<usize>) {
    let mut from = BufReader::new(tcp.try_clone().unwrap());
    loop {
        let first = line(&mut from);
        let (mut length, mut chunked) = (0, false);
        loop {
            let header = line(&mut from).to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            chunked |= header == "transfer-encoding: chunked";
            length = header.strip_prefix("content-length: ").map_or(length, |value| value.parse().unwrap());
        }
        let answer = match first.split(' ').nth(1) {
            None => return,
            Some("/refused") => {
                tcp.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n").unwrap();
                let mut rest = Vec::new();
                let _ = from.read_to_end(&mut rest);
                said.send(rest.len()).unwrap();
                return;
            }
            Some("/early") => "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n",
            Some("/wanted") => "HTTP/1.1 100 Continue\r\n\r\n",
            Some(_) => "",
        };
        tcp.write_all(answer.as_bytes()).unwrap();
        while chunked {
            let size = usize::from_str_radix(&line(&mut from), 16).unwrap();
            from.read_exact(&mut vec![0; size + 2]).unwrap();
            length += size;
            chunked = size > 0;
        }
        let body = if answer.contains("100 Continue") || !first.starts_with("GET") { length } else { 0 };
        if !first.contains("/chunks") {
            from.read_exact(&mut vec![0; body]).unwrap();
        }
        let ok = if first.contains("/chunks") { OK.replace("ok", &format!("{length:02}")) } else { OK.to_owned() };
        tcp.write_all(ok.as_bytes()).unwrap();
    }
}

/// Offers a body of five bytes and reads the first line that comes back.
fn offer(path: &str) -> (Client, String) {
    let mut client = Client::connect();
    client.0.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    client.0.get_mut().write_all(head.as_bytes()).unwrap();
    let first = line(&mut client.0);
    (client, first)
}

#[test]
fn offers_hints_and_bodies_pass_as_their_ends_mean_them() {
    let lab = Lab::new("o");
    let (says, said) = mpsc::channel();
    drop(lab.within("b", move || {
        for tcp in TcpListener::bind("[::]:8080").unwrap().incoming() {
            let says = says.clone();
            std::thread::spawn(move || connection(tcp.unwrap(), &says));
        }
    }));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe_services(&[("a", &[]), ("b", &["web"])], &[("web", "10.96.0.1", AppProtocol::Http11)]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    node.apply(vec![
        route("1", vec![rule(vec![RouteMatch::default()], vec![backend("web", 1)])]),
        allow_paths("1", "/"),
    ]);
    let client = lab.within("a", || {
        // Wanted at once, and by a server that never says so: then it is asked for after a while.
        for path in ["/wanted", "/silent"] {
            let (mut client, first) = offer(path);
            assert_eq!(first, "HTTP/1.1 100 Continue", "{path}");
            assert_eq!(line(&mut client.0), "");
            client.0.get_mut().write_all(b"hello").unwrap();
            assert_eq!(read(&mut client.0).unwrap().status(), 200, "{path}");
            assert_eq!(client.get("/after", "").status(), 200, "{path}: the connection goes on");
        }
        let (client, first) = offer("/refused");
        assert!(first.starts_with("HTTP/1.1 413"), "not asked for: {first}");
        drop(client);
        let early = Client::connect().get("/early", "");
        assert_eq!((early.status(), early.header("link")), (200, None), "a hint is passed over");
        let chunks = "GET /chunks HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        assert_eq!(Client::connect().ask(chunks).unwrap().text(), "05", "a GET may have a body");
        let connect = Client::connect().ask("CONNECT web:80 HTTP/1.1\r\nhost: web:80\r\n\r\n").unwrap();
        assert_eq!(connect.status(), 501);
    });
    client.join().unwrap();
    assert_eq!(said.recv_timeout(Duration::from_secs(60)), Ok(0), "no byte of a body that was not wanted");
}
