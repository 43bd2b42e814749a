//! The whole data path in one process: what passes, what is refused, what is cut, and what was there before.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use node::{Lab, Node, Setup, await_inbound, greeting, serve, sh, talk};
use ztunnel::app::resolver::Names;
use ztunnel::dns::own::OwnResolver;

#[test]
fn traffic_is_tunnelled_authorised_and_cut() {
    let lab = Lab::new("f");
    let server = |port: &'static str| move || serve(TcpListener::bind(port).unwrap());
    drop(lab.within("b", server("[::]:8080")));
    drop(lab.within("c", server("[::]:8080")));
    let from = |pod: &str, to: &'static str, bytes: usize| lab.within(pod, move || talk(to, bytes)).join().unwrap();
    // Plain networking works before anything else is said.
    let deadline = Instant::now() + Duration::from_secs(5);
    while from("a", "10.99.0.2:8080", 10).is_err() {
        assert!(Instant::now() < deadline, "the pods cannot reach each other");
    }

    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Uncaptured")]);

    for (to, source) in [("10.99.0.2:8080", "10.99.0.1"), ("[fd99::2]:8080", "fd99::1")] {
        assert_eq!(from("a", to, 3_000_000).unwrap(), source, "through a tunnel, the source address kept");
    }
    assert_eq!(from("c", "10.99.0.2:8080", 100_000).unwrap(), "10.99.0.3", "PERMISSIVE takes plaintext");
    assert_eq!(from("a", "10.99.0.3:8080", 100_000).unwrap(), "10.99.0.1", "passthrough to a pod outside the mesh");
    let refused = from("a", "10.99.0.2:9", 1).unwrap_err();
    assert!(
        matches!(refused.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::UnexpectedEof),
        "{refused}"
    );

    // A live connection ends when a policy forbids it, and new ones are refused; others go on.
    let (greeting_read, is_greeted) = std::sync::mpsc::channel::<()>();
    let live = lab.within("a", move || {
        let mut tcp = TcpStream::connect("10.99.0.2:8080").unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut buffer = [0; 64];
        let greeted = tcp.read(&mut buffer).unwrap();
        assert!(greeted > 0);
        greeting_read.send(()).unwrap();
        loop {
            match tcp.read(&mut buffer) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => return Some(error.kind()),
            }
        }
    });
    is_greeted.recv_timeout(Duration::from_secs(10)).expect("the live connection is not greeted");
    assert!(node.pods.connections().0 > 0, "no live connection is counted");
    node.deny("a");
    assert_eq!(live.join().unwrap(), Some(std::io::ErrorKind::ConnectionReset), "cut with a reset");
    assert!(from("a", "10.99.0.2:8080", 1).is_err(), "denied");
    assert!(from("c", "10.99.0.2:8080", 1).is_ok(), "not denied");

    // Release: back to plain networking.
    lab.pods_file(&["b"]);
    node.wait(&[("a", "Uncaptured"), ("b", "Captured")]);
    node.describe(&["b"]);
    assert!(from("a", "10.99.0.3:8080", 10).is_ok());
}

#[test]
fn what_flows_through_a_released_pod_goes_on() {
    let lab = Lab::new("l");
    for pod in ["a", "b"] {
        drop(lab.within(pod, || serve(TcpListener::bind("[::]:8080").unwrap())));
    }
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // A server outside the mesh, whom a captured client reaches by its proxy.
    drop(lab.within("c", || serve(TcpListener::bind("[::]:8081").unwrap())));
    let mut open = Vec::new();
    for (from, to) in
        [("a", "10.99.0.2:8080"), ("a", "[fd99::2]:8080"), ("c", "10.99.0.2:8080"), ("a", "10.99.0.3:8081")]
    {
        let connected = lab.within(from, move || {
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut tcp = loop {
                match TcpStream::connect(to) {
                    Ok(tcp) => break tcp,
                    Err(error) => assert!(Instant::now() < deadline, "{to}: {error}"),
                }
            };
            tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            greeting(&mut tcp).unwrap();
            tcp
        });
        open.push((from, to, connected.join().unwrap()));
    }
    lab.pods_file(&[]);
    node.wait(&[("a", "Uncaptured"), ("b", "Uncaptured")]);
    for (from, to, tcp) in &mut open {
        let mut back = [0; 5];
        tcp.write_all(b"still").unwrap();
        tcp.read_exact(&mut back).unwrap_or_else(|error| panic!("{from} to {to}, after the release: {error}"));
    }
}

/// A port that asked before the release is asked from again: the kernel remembers for half a minute where its datagrams were
/// redirected to, and who was there may be gone.
#[test]
fn a_look_up_after_the_release_is_nobody_elses() {
    let lab = Lab::new("u");
    let (seen, asked) = std::sync::mpsc::channel();
    drop(lab.within("c", move || {
        let server = UdpSocket::bind("[::]:53").unwrap();
        let mut question = [0; 512];
        while let Ok((length, from)) = server.recv_from(&mut question) {
            question[2] |= 0x80;
            let _ = server.send_to(&question[..length], from);
            if seen.send(from.port()).is_err() {
                return;
            }
        }
    }));
    let at = vec!["127.0.0.1:15053".parse().unwrap()];
    let names = Some(Names::new("cluster.local", at, OwnResolver::new(node::own_sockets(), Vec::new())));
    let setup = Setup { names, ..Setup::default() };
    let mut node = Node::start_with(lab.dir.path(), lab.pods_file(&["a"]), setup);
    node.describe(&["a"]);
    node.wait(&[("a", "Captured")]);
    let ask = |id: u8| {
        let question = [&[0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 7][..], b"example", &[0, 0, 1, 0, 1]].concat();
        let answered = lab.within("a", move || {
            let client = UdpSocket::bind("10.99.0.1:40053")?;
            client.set_read_timeout(Some(Duration::from_secs(10)))?;
            client.connect("10.99.0.3:53")?;
            client.send(&question)?;
            client.recv(&mut [0; 512])
        });
        answered.join().unwrap().unwrap();
        asked.recv_timeout(Duration::from_secs(10)).unwrap()
    };
    assert_ne!(ask(1), 40053, "a captured pod's look-up goes by the name server in it");
    lab.pods_file(&[]);
    node.wait(&[("a", "Uncaptured")]);
    assert_eq!(ask(2), 40053, "a released pod's look-up goes by a name server");
}

/// Many times what one tunnel's first window would give each of them, if the idle ones kept their part.
#[test]
fn hundreds_of_idle_connections_do_not_stop_the_next_one() {
    let lab = Lab::new("i");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    let answered = lab.within("a", || {
        let mut open = Vec::new();
        for _ in 0..400 {
            let mut tcp = TcpStream::connect("10.99.0.2:8080").unwrap();
            tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // Both directions of each carry something, and then nothing.
            tcp.write_all(&[7; 1000]).unwrap();
            let mut back = [0; 1000];
            if let Err(error) = greeting(&mut tcp).and_then(|_| tcp.read_exact(&mut back)) {
                return Err(format!("{} are answered, the next one is not: {error}", open.len()));
            }
            open.push(tcp);
        }
        Ok(open.len())
    });
    assert_eq!(answered.join().unwrap(), Ok(400));
}

/// The proxy speaks to the application from the client's address, on a port that the pod's kernel chooses; the client's
/// own kernel chooses without knowing it. Here nearly all ports of both are in use, so most are the same.
#[test]
fn a_client_and_the_proxy_in_its_name_may_have_the_same_port() {
    const PORTS: usize = 30;
    let lab = Lab::new("sp");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let mut node = Node::start(&lab, lab.pods_file(&["b"]));
    node.describe(&["b"]);
    node.wait(&[("b", "Captured")]);
    for pod in ["b", "c"] {
        sh(&format!("ip netns exec {} sysctl -qw net.ipv4.ip_local_port_range='40000 40031'", lab.netns(pod)));
    }
    let answered = lab.within("c", || {
        for (to, own) in [("10.99.0.2:8080", "10.99.0.3"), ("[fd99::2]:8080", "fd99::3")] {
            let mut open = Vec::new();
            for number in 0..PORTS {
                let mut tcp = TcpStream::connect(to).unwrap();
                tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let port = tcp.local_addr().unwrap().port();
                let seen =
                    greeting(&mut tcp).map_err(|error| format!("{to}, number {number}, port {port}: {error}"))?;
                assert_eq!(seen, own);
                open.push(tcp);
            }
            for (number, tcp) in open.iter_mut().enumerate() {
                let mut back = [0; 5];
                tcp.write_all(b"still").unwrap();
                tcp.read_exact(&mut back).map_err(|error| format!("{to}, number {number} later: {error}"))?;
                assert_eq!(&back, b"still");
            }
        }
        Ok::<_, String>(())
    });
    assert_eq!(answered.join().unwrap(), Ok(()));
}

#[test]
fn a_client_that_goes_before_its_application_answers_ends_the_attempt() {
    let lab = Lab::new("r");
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // An application that never answers: the dial would go on for ten seconds.
    let drop = "add table inet silent; add chain inet silent in { type filter hook input priority 0; }; \
        add rule inet silent in tcp dport 7777 drop";
    sh(&format!("ip netns exec {} nft '{drop}'", lab.netns("b")));
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let client = lab.within("a", move || {
        let tcp = TcpStream::connect("10.99.0.2:7777").unwrap();
        wait.recv().unwrap();
        socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO)).unwrap();
    });
    await_inbound(&node, 1, Duration::from_secs(5));
    go.send(()).unwrap();
    client.join().unwrap();
    await_inbound(&node, 0, Duration::from_secs(3));
}

#[test]
fn connections_from_before_capture_live_on_and_are_counted() {
    let lab = Lab::new("p");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel::<()>();
    let old = lab.within("a", move || {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut tcp = loop {
            match TcpStream::connect("10.99.0.2:8080") {
                Ok(tcp) => break tcp,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        greeting(&mut tcp).unwrap();
        ready.send(()).unwrap();
        wait.recv().unwrap();
        tcp.write_all(b"still here").unwrap();
        let mut back = [0; 10];
        tcp.read_exact(&mut back).unwrap();
        back.to_vec()
    });
    is_ready.recv().unwrap();
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    for pod in ["a", "b"] {
        let status = node.pods.status();
        assert_eq!(status.iter().find(|entry| entry.name == pod).unwrap().preexisting, 1, "{status:?}");
    }
    go.send(()).unwrap();
    assert_eq!(old.join().unwrap(), b"still here");
    node.runtime.block_on(node.pods.recount());
    let deadline = Instant::now() + Duration::from_secs(5);
    while node.pods.status().iter().any(|entry| entry.preexisting > 0) {
        assert!(Instant::now() < deadline, "closed connections are still counted");
        node.runtime.block_on(node.pods.recount());
    }
}

#[test]
fn a_pod_whose_questions_for_names_do_not_arrive_is_not_captured() {
    let lab = Lab::new("u");
    // Somebody's filter that lets connections be.
    let filter = "add table inet other; add chain inet other out { type filter hook output priority -300; }; \
        add rule inet other out udp dport 53 drop";
    sh(&format!("ip netns exec {} nft '{filter}'", lab.netns("a")));
    let at = ["127.0.0.1:15053", "[::1]:15053"].map(|address| address.parse().unwrap());
    let outside = OwnResolver::new(node::own_sockets(), Vec::new());
    let names = Some(Names::new("cluster.local", at.to_vec(), outside));
    let path = lab.pods_file(&["a", "b"]);
    let mut node = Node::start_with(lab.dir.path(), path, Setup { names, ..Setup::default() });
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Failed"), ("b", "Captured")]);
    let status = node.pods.status();
    let reason = &status.iter().find(|pod| pod.name == "a").unwrap().reason;
    assert!(reason.contains("a datagram to port 53 was not redirected to port 15053"), "{reason}");
    // The node serves, so that it holds up no update; the pod is told of until it can be captured.
    await_failing(&node, |failing| matches!(failing, [one] if one.contains("/a: ")));
    sh(&format!("ip netns exec {} nft delete table inet other", lab.netns("a")));
    node.wait(&[("a", "Captured")]);
    await_failing(&node, <[String]>::is_empty);
}

/// Waits until the node serves, and the captures that fail are as `wanted`.
fn await_failing(node: &Node, wanted: impl Fn(&[String]) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (pending, failing) = (node.pods.pending(), node.pods.failing());
        if node.pods.looked() && pending.is_empty() && wanted(&failing) {
            return;
        }
        assert!(Instant::now() < deadline, "pending {pending:?}, failing {failing:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
