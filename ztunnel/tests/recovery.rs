//! What must outlast a restart, a mistake in the pod list, and a change of mind: capture and its fences never fall off
//! because somebody is silent or wrong.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use node::{Lab, Node, await_inbound, greeting, serve, sh, talk};

/// Waits until the rules of a pod hold `word`, or do not.
fn await_rules(lab: &Lab, pod: &str, word: &str, present: bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let rules = lab.rules(pod);
        if rules.contains(word) == present {
            return;
        }
        assert!(Instant::now() < deadline, "{word} should be there ({present}):\n{rules}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_restart_while_control_is_silent_keeps_the_rules() {
    let lab = Lab::new("k");
    let path = lab.pods_file(&["a", "b"]);
    let mut node = Node::start(&lab, path.clone());
    node.describe_egress(&["a", "b"], &["a"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    await_rules(&lab, "a", "filter_output", true);
    drop(node);

    // The list says that the pod is enrolled; that nothing but TCP may leave it, only control knew.
    let node = Node::start(&lab, path);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    assert!(lab.rules("a").contains("filter_output"), "{}", lab.rules("a"));
    assert!(!lab.rules("b").contains("filter_output"), "{}", lab.rules("b"));
    drop(node);

    // Now the list leaves it to control, which is silent: better no traffic than traffic past the mesh.
    let entry = format!(
        "- {{uid: uid-a, name: a, namespace: shop, serviceAccount: a, netns: /run/netns/{}, ips: [10.99.0.1]}}\n",
        lab.netns("a")
    );
    let mut node = Node::start(&lab, lab.write_pods(&entry));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !node.pods.status().iter().any(|pod| pod.reason.contains("control has not said")) {
        assert!(Instant::now() < deadline, "{:?}", node.pods.status());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(lab.rules("a").contains("redirect"), "{}", lab.rules("a"));
    node.describe(&[]);
    await_rules(&lab, "a", "redirect", false);
}

#[test]
fn live_connections_to_the_outside_end_when_they_become_forbidden() {
    let lab = Lab::new("e");
    sh(&format!("ip -n {0} link set lo up; ip -n {0} addr add 203.0.113.9/32 dev lo", lab.netns("")));
    drop(lab.within("", || serve(TcpListener::bind("203.0.113.9:8080").unwrap())));
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    let hold = |to: &'static str| {
        let (opened, is_open) = std::sync::mpsc::channel();
        let held = lab.within("a", move || {
            let mut tcp = TcpStream::connect(to).unwrap();
            greeting(&mut tcp).unwrap();
            tcp.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            opened.send(()).unwrap();
            tcp.read(&mut [0]).unwrap_err().kind()
        });
        is_open.recv().unwrap();
        held
    };
    let (outside, inside) = (hold("203.0.113.9:8080"), hold("10.99.0.2:8080"));
    node.describe_egress(&["a", "b"], &["a"]);
    assert_eq!(outside.join().unwrap(), std::io::ErrorKind::ConnectionReset, "it may not leave any more");
    assert_eq!(inside.join().unwrap(), std::io::ErrorKind::WouldBlock, "inside it lives on");
    assert!(lab.within("a", || talk("203.0.113.9:8080", 1)).join().unwrap().is_err());
}

#[test]
fn a_bad_pod_list_keeps_what_was_captured() {
    let lab = Lab::new("l");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let path = lab.pods_file(&["a", "b"]);
    let good = std::fs::read_to_string(&path).unwrap();
    let mut node = Node::start(&lab, path);
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // No list at all; one entry that cannot be read; and nothing.
    let half = good.replacen("ips: [10.99.0.1", "ips: [10.99.0.1111", 1);
    for (bad, said) in [("- {uid: [", "line"), (half.as_str(), "entry 0"), ("", "empty")] {
        lab.write_pods(bad);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !node.pods.pending().iter().any(|pending| pending.contains(said)) {
            assert!(Instant::now() < deadline, "nothing is said about {bad:?}: {:?}", node.pods.pending());
            std::thread::sleep(Duration::from_millis(10));
        }
        node.wait(&[("a", "Captured"), ("b", "Captured")]);
        assert!(lab.rules("a").contains("redirect"));
        assert!(lab.within("a", || talk("10.99.0.2:8080", 1000)).join().unwrap().is_ok());
        lab.write_pods(&good);
    }
}

#[test]
fn a_changed_pod_entry_waits_for_its_predecessor() {
    let lab = Lab::new("c");
    // Probes get no answer, so the first attempt is still at it when the entry changes.
    let drop = "add table inet mute; add chain inet mute in { type filter hook input priority 0; }; \
        add rule inet mute in tcp dport 15001 drop";
    sh(&format!("ip netns exec {} nft '{drop}'", lab.netns("a")));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Pending")]);
    await_rules(&lab, "a", "tulle", true);
    sh(&format!("ip netns exec {} nft delete table inet mute", lab.netns("a")));
    let path = lab.pods_file(&["a", "b"]);
    let changed =
        std::fs::read_to_string(&path).unwrap().replacen("enrolled: true", "enrolled: true, probePorts: [8080]", 1);
    lab.write_pods(&changed);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // The predecessor's attempt is over by now, whatever came of it.
    std::thread::sleep(Duration::from_secs(3));
    node.wait(&[("a", "Captured")]);
    assert!(lab.rules("a").contains("8080"), "the new entry's rules are in force: {}", lab.rules("a"));
    assert!(lab.within("a", || talk("10.99.0.2:8080", 1)).join().unwrap().is_err(), "nobody listens there");
    await_inbound(&node, 0, Duration::from_secs(5));
}
