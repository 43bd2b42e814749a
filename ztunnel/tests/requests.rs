//! Requests through one node: routed by weight and header, edited while a connection lives, in every form of HTTP, and with
//! bytes that are not HTTP left alone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use http::HeaderName;
use node::messages::{Client, Message, allow_paths, backend, name, prefix, read, route, rule};
use node::{Lab, Node, Setup};
use prost::Message as _;
use tulle_proto::workload::address::Type;
use tulle_proto::workload::gateway_address::Destination;
use tulle_proto::workload::{Address, AppProtocol, GatewayAddress, NamespacedHostname, NetworkAddress, Port, Service};
use ztunnel::state::{Backend, Change, Filters, HeaderChanges, Mirror, Retry, Rewrite, RouteMatch, RouteRule, Wanted};

/// A server that answers with its name, the first line and the headers it saw; `/ws` changes the protocol to an echo,
/// `/fail` is 503, `/once` hangs up after its answer.
fn serve(name: &'static str) -> impl FnOnce() + Send + 'static {
    let listener = move || TcpListener::bind("[::]:8080").unwrap();
    move || {
        for tcp in listener().incoming() {
            let mut tcp = tcp.unwrap();
            std::thread::spawn(move || {
                let mut from = BufReader::new(tcp.try_clone().unwrap());
                while let Some(request) = read(&mut from) {
                    let path = request.first.split(' ').nth(1).unwrap_or_default().to_owned();
                    if path == "/ws" {
                        let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
                        tcp.write_all(head.as_bytes()).unwrap();
                        let mut buffer = [0; 1024];
                        while let Ok(size @ 1..) = from.read(&mut buffer) {
                            tcp.write_all(&buffer[..size]).unwrap();
                        }
                        return;
                    }
                    let headers: Vec<String> =
                        request.headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
                    let body = format!("{name}\n{}\n{}\n{}", request.first, request.body.len(), headers.join("\n"));
                    let status = if path == "/fail" { "503 Service Unavailable" } else { "200 OK" };
                    let answer =
                        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nx-from: {name}\r\n\r\n{body}", body.len());
                    if tcp.write_all(answer.as_bytes()).is_err() || path == "/once" {
                        return;
                    }
                }
            });
        }
    }
}

/// A node with the client a and the servers b (Services web and v1) and c (v2).
fn world(tag: &str, protocol: AppProtocol) -> (Lab, Node) {
    world_of(tag, protocol, Setup::default())
}

fn world_of(tag: &str, protocol: AppProtocol, setup: Setup) -> (Lab, Node) {
    let lab = Lab::new(tag);
    drop(lab.within("b", serve("b")));
    drop(lab.within("c", serve("c")));
    let mut node = Node::start_with(lab.dir.path(), lab.pods_file(&["a", "b", "c"]), setup);
    node.describe_services(
        &[("a", &[]), ("b", &["web", "v1"]), ("c", &["v2"])],
        &[("web", "10.96.0.1", protocol), ("v1", "10.96.0.2", protocol), ("v2", "10.96.0.3", protocol)],
    );
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    (lab, node)
}

#[test]
fn a_live_connection_follows_weights_pins_and_edits() {
    let (lab, mut node) = world("w", AppProtocol::Http11);
    let pin = RouteMatch {
        headers: vec![(HeaderName::from_static("x-canary"), Wanted::Exact("always".into()))],
        ..prefix("/")
    };
    let rules = |stable, canary| {
        let weighted = rule(vec![prefix("/")], vec![backend("v1", stable), backend("v2", canary)]);
        vec![weighted, rule(vec![pin.clone()], vec![backend("v2", 1)])]
    };
    node.apply(vec![route("1", rules(90, 10))]);
    let (edited, edit) = std::sync::mpsc::channel::<()>();
    let (asks, asked) = std::sync::mpsc::channel::<()>();
    let client = lab.within("a", move || {
        let mut client = Client::connect();
        let before = client.counts(100);
        let pinned = client.get("/", "x-canary: always\r\n");
        asks.send(()).unwrap();
        edit.recv().unwrap();
        (before, pinned.header("x-from").unwrap().to_owned(), client.counts(100))
    });
    asked.recv_timeout(Duration::from_secs(30)).unwrap();
    node.apply(vec![route("2", rules(50, 50))]);
    edited.send(()).unwrap();
    let (before, pinned, after) = client.join().unwrap();
    let counts = |b, c| BTreeMap::from([("b".to_owned(), b), ("c".to_owned(), c)]);
    assert_eq!((before, pinned.as_str(), after), (counts(90, 10), "c", counts(50, 50)));
}

/// One sequence for all workers, whichever of them a connection is on.
#[test]
fn one_percent_is_ten_of_a_thousand_on_four_workers() {
    let (lab, mut node) = world_of("i", AppProtocol::Http11, Setup { workers: Some(4), ..Setup::default() });
    node.apply(vec![route("1", vec![rule(vec![prefix("/")], vec![backend("v1", 99), backend("v2", 1)])])]);
    for _ in 0..3 {
        // A hundred connections, so that each worker has some.
        let clients = (0..4).map(|_| {
            lab.within("a", || (0..25).flat_map(|_| Client::connect().counts(10)).collect::<Vec<(String, usize)>>())
        });
        let clients: Vec<_> = clients.collect();
        let counts: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        let of = |name: &str| counts.iter().filter(|(own, _)| own == name).map(|(_, count)| count).sum::<usize>();
        let (stable, canary) = (of("b"), of("c"));
        assert_eq!(stable + canary, 1_000);
        assert!((9..=11).contains(&canary), "{canary} of a thousand");
    }
}

#[test]
fn requests_are_changed_answered_and_retried_as_the_route_says() {
    let (lab, mut node) = world("r", AppProtocol::Http11);
    let header = |name: &'static str, value: &'static str| (HeaderName::from_static(name), value.parse().unwrap());
    let changed = Filters {
        request: HeaderChanges { set: vec![header("x-set", "1")], ..HeaderChanges::default() },
        response: HeaderChanges { add: vec![header("x-added", "2")], ..HeaderChanges::default() },
        rewrite: Some(Rewrite {
            hostname: Some("other.example".into()),
            path: Some(ztunnel::state::PathChange::Full("/new".into())),
        }),
        ..Filters::default()
    };
    let retry = Retry { attempts: 2, codes: vec![503], backoff: Duration::from_millis(1), any_method: false };
    let invalid = Backend { invalid: Some("there is no such Service".into()), ..backend("v1", 1) };
    node.apply(vec![route(
        "1",
        vec![
            RouteRule { filters: changed, ..rule(vec![prefix("/changed")], vec![backend("v1", 1)]) },
            RouteRule { retry: Some(retry), ..rule(vec![prefix("/fail")], vec![backend("v1", 1)]) },
            rule(vec![prefix("/invalid")], vec![invalid]),
            rule(vec![prefix("/once"), prefix("/ws"), prefix("/plain")], vec![backend("v2", 1)]),
            RouteRule {
                request_timeout: Some(Duration::from_millis(300)),
                ..rule(vec![prefix("/late")], vec![backend("nobody", 1)])
            },
        ],
    )]);
    let client = lab.within("a", || {
        let mut client = Client::connect();
        let answer = client.get("/changed?q=1", "x-forwarded-client-cert: forged\r\nx-envoy-retry-on: 5xx\r\n");
        let text = answer.text().to_ascii_lowercase();
        assert!(text.starts_with("b\nget /new?q=1 http/1.1\n"), "{text}");
        assert!(text.contains("host: other.example") && text.contains("x-set: 1"), "{text}");
        assert!(!text.contains("forged") && !text.contains("x-envoy"), "what only a proxy may say: {text}");
        assert_eq!(answer.header("x-added"), Some("2"));
        assert_eq!(client.get("/nothing", "").status(), 404, "no rule matches");
        assert_eq!(client.get("/invalid", "").status(), 500);
        assert_eq!(client.get("/fail", "").status(), 503, "the last answer, when all attempts fail");
        let grpc = client.get("/nothing", "content-type: application/grpc\r\n");
        assert_eq!((grpc.status(), grpc.header("grpc-status")), (200, Some("12")));
        // The server hangs up after each; the next request finds another connection.
        for _ in 0..5 {
            assert_eq!(client.get("/once", "").status(), 200);
        }
        // A POST that meets the end of a connection is not sent again, so it must not be what finds the last one ended.
        assert_eq!(client.get("/plain", "").status(), 200);
        // Bodies, by length and in chunks.
        let posted = client.ask("POST /plain HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\n\r\nhello").unwrap();
        assert!(posted.text().contains("\n5\n"), "{}", posted.text());
        let chunked =
            "POST /plain HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
        assert!(client.ask(chunked).unwrap().text().contains("\n7\n"));
        // Another HTTP behind the head would go past the route and its end's policies: the wish is passed over.
        let hidden =
            client.get("/plain", "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n");
        let text = hidden.text().to_ascii_lowercase();
        assert!(hidden.status() == 200 && !text.contains("upgrade") && !text.contains("http2-settings"), "{text}");
        // HTTP/1.0: no Host, no chunks, and the end is the end.
        let mut old = Client::connect();
        let answer = old.ask("GET /plain HTTP/1.0\r\n\r\n").unwrap();
        assert!(answer.status() == 200 && answer.text().contains("10.96.0.1:80"), "{}", answer.text());
        assert!(read(&mut old.0).is_none(), "closed");
        // A change of protocol, and bytes behind it.
        let mut echo = Client::connect();
        let answer = echo.get("/ws", "connection: Upgrade\r\nupgrade: echo\r\n");
        assert_eq!((answer.status(), answer.header("upgrade")), (101, Some("echo")));
        for size in [1, 1000, 100_000] {
            let mut writer = echo.0.get_ref().try_clone().unwrap();
            let sender = std::thread::spawn(move || writer.write_all(&vec![b'x'; size]));
            let mut back = vec![0; size];
            echo.0.read_exact(&mut back).unwrap();
            sender.join().unwrap().unwrap();
        }
    });
    client.join().unwrap();
}

#[test]
fn what_two_readers_could_read_differently_is_refused() {
    let (lab, mut node) = world("s", AppProtocol::Http11);
    node.apply(vec![route("1", vec![rule(vec![prefix("/")], vec![backend("v1", 1)])])]);
    let client = lab.within("a", || {
        for (what, request) in [
            ("two lengths", "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
            ("a length that is none", "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: +1\r\n\r\na"),
            ("an unknown coding", "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked, x\r\n\r\n0\r\n\r\n"),
            ("a folded line", "GET / HTTP/1.1\r\nhost: web\r\nx-a: 1\r\n folded\r\n\r\n"),
            ("a space before the colon", "GET / HTTP/1.1\r\nhost : web\r\n\r\n"),
            ("no host", "GET / HTTP/1.1\r\nx-a: 1\r\n\r\n"),
            ("two hosts", "GET / HTTP/1.1\r\nhost: web\r\nhost: web\r\n\r\n"),
            ("an escape that is none", "GET /%zz HTTP/1.1\r\nhost: web\r\n\r\n"),
            ("a NUL in the path", "GET /%00 HTTP/1.1\r\nhost: web\r\n\r\n"),
        ] {
            let answer = Client::connect().ask(request);
            assert_eq!(answer.map(|answer| answer.status()), Some(400), "{what}");
        }
        // Chunks that are none end the connection, and the server gets no whole request.
        let bad = "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\nzz\r\na\r\n0\r\n\r\n";
        assert_ne!(Client::connect().ask(bad).map(|answer| answer.status()), Some(200));
        let long = format!("GET / HTTP/1.1\r\nhost: web\r\nx-a: {}\r\n\r\n", "a".repeat(100_000));
        let mut client = Client::connect();
        let _ = client.0.get_mut().write_all(long.as_bytes());
        let status = read(&mut client.0).map(|answer| answer.status());
        assert!(matches!(status, None | Some(431)), "a header of 100 KB: {status:?}");
        assert_eq!(Client::connect().get("/", "").status(), 200, "others are served");
    });
    client.join().unwrap();
}

/// Puts the waypoint `shop/way`, which is pod c, in front of a Service at `address`.
fn behind_way(service: &str, address: &str) -> Change {
    let host = |name: &str| format!("{name}.shop.svc.cluster.local");
    let at = |ip: &str| NetworkAddress {
        address: ip.parse::<Ipv4Addr>().unwrap().octets().to_vec().into(),
        ..<_>::default()
    };
    let way = NamespacedHostname { namespace: "shop".to_owned(), hostname: host("way") };
    let service = Service {
        name: service.to_owned(),
        namespace: "shop".to_owned(),
        hostname: host(service),
        addresses: vec![at(address)],
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: i32::from(AppProtocol::Http11) }],
        waypoint: Some(GatewayAddress { destination: Some(Destination::Hostname(way)), hbone_mtls_port: 15008 }),
        canonical: true,
        ..Service::default()
    };
    let bytes = Address { r#type: Some(Type::Service(service)) }.encode_to_vec();
    ztunnel::xds::decode::address(&bytes, "behind", &mut <_>::default()).unwrap()
}

#[test]
fn no_request_goes_past_a_waypoint_whatever_a_route_says() {
    let (lab, mut node) = world("y", AppProtocol::Http11);
    node.describe_services(&[("c", &["v2", "way"])], &[("way", "10.96.0.9", AppProtocol::Unknown)]);
    let rules = || vec![rule(vec![prefix("/")], vec![backend("v1", 1)])];
    node.apply(vec![route("1", rules())]);
    // c refuses what it is asked for: it is no waypoint. Past it, b would answer.
    let refused = |client: &mut Client| client.ask("GET / HTTP/1.1\r\nhost: web\r\n\r\n").map(|answer| answer.status());
    let (changed, change) = std::sync::mpsc::channel::<()>();
    let (asks, asked) = std::sync::mpsc::channel::<()>();
    let client = lab.within("a", move || {
        for of in ["the backend", "the Service"] {
            let mut live = Client::connect();
            assert_eq!(live.get("/", "").header("x-from"), Some("b"), "no waypoint yet");
            asks.send(()).unwrap();
            change.recv().unwrap();
            assert_ne!(refused(&mut live).unwrap_or(503), 200, "{of}, on a connection from before");
            assert_ne!(refused(&mut Client::connect()).unwrap_or(503), 200, "{of}, on a new connection");
            asks.send(()).unwrap();
            change.recv().unwrap();
        }
    });
    for (service, address) in [("v1", "10.96.0.2"), ("web", "10.96.0.1")] {
        asked.recv_timeout(Duration::from_secs(30)).unwrap();
        node.apply(vec![behind_way(service, address)]);
        changed.send(()).unwrap();
        asked.recv_timeout(Duration::from_secs(30)).unwrap();
        node.describe_services(&[], &[(service, address, AppProtocol::Http11)]);
        changed.send(()).unwrap();
    }
    client.join().unwrap();
}

#[test]
fn what_a_route_leads_to_and_a_waypoint_are_asked_for_before_anything_is_decided() {
    let lab = Lab::new("q");
    drop(lab.within("b", serve("b")));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b", "c"]));
    let demands = node.reader.demands().clone();
    demands.enable("node-1", "cluster.local");
    node.describe_services(&[("a", &[]), ("b", &[]), ("c", &[])], &[("web", "10.96.0.1", AppProtocol::Http11)]);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    let mirror = Mirror { service: name("copy"), port: 80, share: (1, 1) };
    let filters = Filters { mirrors: vec![mirror], ..Filters::default() };
    node.apply(vec![route("1", vec![RouteRule { filters, ..rule(vec![prefix("/")], vec![backend("v1", 1)]) }])]);
    let client = lab.within("a", || {
        let answer = Client::connect().get("/", "");
        assert_eq!(answer.header("x-from"), Some("b"), "{}", answer.first);
        let straight = TcpStream::connect("10.96.0.4:80").unwrap();
        straight.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = Client(BufReader::new(straight)).ask("GET / HTTP/1.1\r\nhost: own\r\n\r\n");
    });
    // Control, as a node sees it: it says what it is asked for, and nothing else.
    let mut asked = std::collections::BTreeSet::new();
    while !client.is_finished() {
        let (names, _) = demands.changes();
        for wanted in &names {
            match &**wanted {
                "shop/v1.shop.svc.cluster.local" => {
                    node.describe_services(&[("b", &["v1"])], &[("v1", "10.96.0.2", AppProtocol::Http11)]);
                }
                "/10.96.0.4" => node.apply(vec![behind_way("own", "10.96.0.4")]),
                _ => {}
            }
        }
        demands.answered(names.iter().map(|name| &**name));
        asked.extend(names.iter().map(|name| name.to_string()));
        std::thread::sleep(Duration::from_millis(2));
    }
    client.join().unwrap();
    for wanted in ["/10.96.0.1", "shop/v1.shop.svc.cluster.local", "shop/copy.shop.svc.cluster.local", "/10.96.0.4"] {
        assert!(asked.contains(wanted), "{wanted}: {asked:?}");
    }
    assert!(asked.contains("shop/way.shop.svc.cluster.local"), "the waypoint: {asked:?}");
}

#[test]
fn bytes_that_are_not_http_pass_a_port_whose_protocol_nobody_declared() {
    let (lab, mut node) = world("b", AppProtocol::Unknown);
    node.apply(vec![route("1", vec![rule(vec![prefix("/")], vec![backend("v2", 1)])])]);
    let client = lab.within("a", || {
        // web itself leads to b, its route to c.
        assert_eq!(Client::connect().get("/", "").header("x-from"), Some("c"), "told by its first bytes");
        let mut slow = Client::connect();
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(slow.get("/", "").header("x-from"), Some("b"), "silent for long: not looked at");
    });
    client.join().unwrap();
}

#[test]
fn each_request_of_a_live_connection_is_decided_by_its_path() {
    let (lab, mut node) = world("p", AppProtocol::Http11);
    node.apply(vec![allow_paths("1", "/open")]);
    let (changed, change) = std::sync::mpsc::channel::<()>();
    let (asks, asked) = std::sync::mpsc::channel::<()>();
    let client = lab.within("a", move || {
        let mut client = Client::connect();
        assert_eq!(client.get("/open/a", "").status(), 200);
        let refused = client.get("/closed", "");
        assert_eq!((refused.status(), refused.text()), (403, "RBAC: access denied"));
        assert_eq!(client.get("/open/%2e%2e/closed", "").status(), 403, "decided by the path that it means");
        assert_eq!(client.get("/open/a", "").status(), 200, "the connection lives");
        let answer = client.get("/open/./a", "");
        assert!(answer.text().contains("GET /open/a HTTP/1.1"), "the application sees that path: {}", answer.text());
        let mut bytes = Client::connect();
        bytes.0.get_mut().write_all(b"\x16\x03\x01 not http\r\n\r\n").unwrap();
        assert!(read(&mut bytes.0).is_none(), "bytes that are not HTTP are not let in");
        asks.send(()).unwrap();
        change.recv().unwrap();
        assert_eq!(client.get("/open/a", "").status(), 403, "the edited policy");
        assert_eq!(client.get("/closed", "").status(), 200);
    });
    asked.recv_timeout(Duration::from_secs(30)).unwrap();
    node.apply(vec![allow_paths("2", "/closed")]);
    changed.send(()).unwrap();
    client.join().unwrap();
}

#[test]
fn a_trace_has_a_span_of_each_side_and_goes_on_to_the_application() {
    const GIVEN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
    let (lab, mut node) = world("t", AppProtocol::Http11);
    let every = rule(vec![RouteMatch::default()], vec![backend("v1", 1)]);
    node.apply(vec![route("1", vec![every]), allow_paths("1", "/open")]);
    let parent = |answer: &Message| {
        let line = answer.text().lines().find_map(|line| line.strip_prefix("traceparent: ").map(str::to_owned));
        line.unwrap_or_else(|| format!("none in {}: {}", answer.first, answer.text()))
    };
    let asked = |header: &str, closed: bool| {
        let header = header.to_owned();
        let client = lab.within("a", move || {
            let mut client = Client::connect();
            let open = parent(&client.get("/open?access_token=secret", &header));
            if closed {
                client.get("/closed", &header);
            }
            open
        });
        client.join().unwrap()
    };
    let (sampled, unsampled) = (format!("traceparent: {GIVEN}-01\r\n"), format!("traceparent: {GIVEN}-00\r\n"));
    assert_eq!(asked(&sampled, false), format!("{GIVEN}-01"), "without a collector it passes untouched");

    let mut spans = node.metrics.spans.start(0).unwrap();
    let passed = asked(&sampled, true);
    let mut next = || {
        let one = async { tokio::time::timeout(Duration::from_secs(30), spans.recv()).await };
        let one = node.runtime.block_on(one).expect("a span in time").expect("a span");
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let span = one.span;
        assert_eq!(hex(&span.trace_id), "0af7651916cd43dd8448eb211c80319c");
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
        let said = format!("{:?}", span.attributes);
        assert!(!said.contains("secret"), "a query may hold a token: {said}");
        (one.service.to_string(), span.kind, hex(&span.span_id), hex(&span.parent_span_id), said)
    };
    let mut all: Vec<_> = (0..4).map(|_| next()).collect();
    all.sort_by_key(|(_, kind, .., said)| (said.contains("/closed"), *kind));
    // The server's side, below the client's side, below the application that called.
    for pair in all.chunks(2) {
        let [server, client] = pair else { unreachable!("pairs") };
        assert_eq!((server.1, client.1), (2, 3));
        assert_eq!(client.3, "b7ad6b7169203331");
        assert_eq!(server.3, client.2);
        assert_ne!(server.0, client.0, "each is of its own pod's service");
    }
    assert_eq!(passed, format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", all[0].2));
    assert!(all[2].4.contains("POLICY_DENIED") || all[2].4.contains("NOT_ALLOWED"), "{}", all[2].4);

    assert_eq!(asked(&unsampled, false), format!("{GIVEN}-00"), "whoever began it did not want it sampled");
    let begun = asked("", false);
    assert!(begun.len() == 55 && begun.ends_with("-00"), "a share of 0 begins traces that nobody samples: {begun}");
    assert!(spans.try_recv().is_err(), "no span of either");
}
