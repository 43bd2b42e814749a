//! Pods of two trust domains with an authority each: who is believed, in both directions, and for how long.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use node::{Lab, Node, Setup, authority, greeting, serve, talk};

const OURS: &str = "cluster.local";
const THEIRS: &str = "b.example";
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection from a pod that stays, and how it ended.
fn hold(lab: &Lab, from: &str, to: &'static str) -> JoinHandle<std::io::Result<()>> {
    let (greeted, is_greeted) = channel::<()>();
    let held = lab.within(from, move || {
        let mut tcp = TcpStream::connect(to)?;
        tcp.set_read_timeout(Some(PATIENCE * 3))?;
        greeting(&mut tcp)?;
        let _ = greeted.send(());
        // The server echoes.
        loop {
            tcp.write_all(b"x")?;
            tcp.read_exact(&mut [0])?;
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    is_greeted.recv_timeout(PATIENCE).expect("the connection that is to be held does not open");
    held
}

/// Waits until a connection has ended.
fn await_end(held: &JoinHandle<std::io::Result<()>>, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !held.is_finished() {
        assert!(Instant::now() < deadline, "{what} still lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_call_between_trust_domains_needs_a_bundle_at_both_ends_and_ends_with_either() {
    let lab = Lab::new("td");
    for pod in ["a", "b", "c"] {
        drop(lab.within(pod, || serve(TcpListener::bind("[::]:8080").unwrap())));
    }
    let from = |pod: &str, to: &'static str| lab.within(pod, move || talk(to, 1000)).join().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while from("a", "10.99.0.2:8080").is_err() || from("a", "10.99.0.3:8080").is_err() {
        assert!(Instant::now() < deadline, "the pods cannot reach each other");
    }
    let setup = Setup { foreign: vec![("b", THEIRS)], ..Setup::default() };
    let mut node = Node::start_with(lab.dir.path(), lab.pods_file(&["a", "b", "c"]), setup);
    node.describe(&["a", "b", "c"]);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Captured")]);
    let roots = |domain: &str| Some(authority(lab.dir.path(), domain).roots().clone());
    let calls = || [from("a", "10.99.0.2:8080"), from("b", "10.99.0.1:8080")].map(|result| result.is_ok());

    assert_eq!(from("a", "10.99.0.3:8080").unwrap(), "10.99.0.1", "within a domain nothing is needed");
    assert_eq!(calls(), [false, false], "nobody vouches for anybody");
    node.bundle(THEIRS, roots(THEIRS));
    assert_eq!(calls(), [false, false], "one end believes the other, which does not");
    // Each other's bundle with the wrong roots: ours would sign for them, and theirs for us.
    node.bundle(THEIRS, roots(OURS));
    node.bundle(OURS, roots(THEIRS));
    assert_eq!(calls(), [false, false], "one domain's roots prove nothing of another");
    node.bundle(OURS, roots(OURS));
    node.bundle(THEIRS, roots(THEIRS));
    let deadline = Instant::now() + PATIENCE;
    while calls() != [true, true] {
        assert!(Instant::now() < deadline, "{:?}", [from("a", "10.99.0.2:8080"), from("b", "10.99.0.1:8080")]);
    }
    assert_eq!(from("a", "[fd99::2]:8080").unwrap(), "fd99::1", "with the client's own address");

    let bystander = hold(&lab, "a", "10.99.0.3:8080");
    for (what, domain, instead) in [
        ("the client's domain is taken back", OURS, None),
        ("the server's domain is taken back", THEIRS, None),
        ("the server's domain has other roots", THEIRS, roots("c.example")),
    ] {
        let held = hold(&lab, "a", "10.99.0.2:8080");
        node.bundle(domain, instead);
        await_end(&held, what);
        assert!(!calls()[0], "{what}");
        node.bundle(domain, roots(domain));
        let deadline = Instant::now() + PATIENCE;
        while !calls()[0] {
            assert!(Instant::now() < deadline, "{what}, and is back: nobody gets through");
        }
    }
    assert!(!bystander.is_finished(), "a connection within the domain lives on: {:?}", bystander.join());
}
