//! Known defects of other node proxies, one by one, and the test here that fails where we have them.
//!
//! Found by reading and by reports; listed so that none comes back in another dress. What has no other home is below.
//!
//! | Defect | What holds here | Test |
//! |---|---|---|
//! | A malformed `traceparent` panics and ends a tunnel with all its streams | it is refused or ignored | `hbone/headers.rs`: a_traceparent_of_55_characters_with_two_segments_is_refused_and_does_not_panic; `malformed.rs`: malformed_trace_contexts_are_refused_with_the_reason; e2e `bad_input.rs` |
//! | Each update of endpoints adds a stale copy of a service with a range of addresses | it is replaced | `state/tests.rs`: the_endpoints_of_a_range_are_replaced_and_not_added |
//! | What is not known yet is waited for without end | 5 s, then a refusal with its reason | below: a_pod_that_nobody_describes_is_refused_and_not_held_for_ever |
//! | Live connections are not looked at again when a workload gets a policy; a policy that has not arrived is skipped | re-check on every snapshot; such a workload is pending | below: a_workload_that_gets_a_policy_loses_the_connections_that_it_forbids; `state/tests.rs`: a_workload_with_an_absent_policy_keeps_its_version_in_force; `policy/tests.rs`: nothing_is_allowed_before_the_policies_are_here |
//! | Who loses the race for a first tunnel hangs when the winner fails | everybody gets the winner's error | `tunnel.rs`: waiters_for_a_failing_tunnel_all_get_its_error_at_once |
//! | Waiters for a dead peer try one after the other, each for the whole time | they share one attempt | `tunnel.rs`: waiters_for_a_silent_peer_share_one_attempt_and_all_get_its_error |
//! | The peer's limit of streams is read before it was said | it is read whenever a stream is placed | `tunnel.rs`: a_peer_that_takes_few_streams_gets_more_tunnels_and_no_stream_waits_for_another |
//! | Streams that cross a goodbye are never served | they are served | `tunnel.rs`: a_stream_that_crosses_the_goodbye_is_served |
//! | A certificate with several names is trusted by one and authorised by another | it is refused | `malformed.rs`: certificates_with_wrong_names_usages_times_or_signers_are_refused |
//! | A policy's illegal blocks and ports are dropped or cut, which makes it mean more or nothing | the policy is rejected, and denies what it selects | `xds/decode/tests.rs`: a_wrong_policy_is_rejected_with_a_stand_in_of_its_scope; `state/tests.rs`: a_rejected_policy_leaves_the_good_version_or_denies |
//! | Handshakes and answers to CONNECT have no deadline, and handshakes no limit | both have | below: who_does_not_finish_a_handshake_is_let_go, a_peer_that_never_answers_connect_is_given_up; `flow/gate.rs`: one_source_leaves_places_for_others |
//! | Accepted sockets have no keepalive before HTTP/2 speaks | they inherit it | `base/sockets.rs`: what_a_listener_accepts_is_probed_for_life |
//! | Records count an answer before it is whole; documented metrics have other names | a look-up is counted once, by where its answer came from; the names in the documents are those of the code | e2e `dns.rs`; `reference.rs`: metrics_in_the_reference_are_those_of_the_code |
//! | A bad message about pods ends the process | it is said, and what was captured stays | `recovery.rs`: a_bad_pod_list_keeps_what_was_captured; `malformed.rs`: lists_of_pods_that_are_none_are_refused_whole |
//! | A late acknowledgement is taken for that of the next pod | a pod's state is told by its uid, and a changed entry waits for its predecessor | `recovery.rs`: a_changed_pod_entry_waits_for_its_predecessor |
//! | Two look-ups of one address disagree whether it is a service or a pod | one order in one function | below: an_address_of_a_service_and_of_a_pod_is_the_services_for_who_sees_it |
//! | A service that is hidden from the client can be asked for by name | a name means what it means to the proven client | `inbound/target.rs`: a_service_that_is_hidden_from_the_clients_namespace_cannot_be_asked_for |

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use node::{Lab, Node, Setup, await_inbound, serve, talk};
use prost::Message as _;
use tulle_proto::security::Scope;
use tulle_proto::workload as wds;
use ztunnel::hbone::Config;
use ztunnel::lb::Chance;
use ztunnel::outbound::decide::decide;
use ztunnel::state::{Change, store};
use ztunnel::xds::decode;

#[test]
fn every_test_that_the_table_names_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = include_str!("defects.rs");
    let rows: Vec<&str> = own.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(1).collect();
    assert_eq!(rows.len(), 17, "a defect is missing");
    for row in rows {
        let named = row.trim_end_matches(" |").rsplit_once(" | ").unwrap().1;
        let mut found = 0;
        for (place, tests) in named.split("; ").filter_map(|part| part.split_once(": ")) {
            let path = place.trim_matches('`');
            let at = |folder: &str| std::fs::read_to_string(root.join(folder).join(path)).ok();
            let text = if place == "below" { own.to_owned() } else { at("src").or_else(|| at("tests")).unwrap() };
            for test in tests.split(", ") {
                assert!(text.contains(&format!("fn {test}()")), "{place} has no {test}");
                found += 1;
            }
        }
        assert!(found > 0, "no test in: {row}");
    }
}

/// Reads until the other side ends the connection; how, and after how long.
fn until_end(mut tcp: TcpStream) -> (Option<ErrorKind>, Duration) {
    let begin = Instant::now();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut buffer = [0; 1024];
    loop {
        match tcp.read(&mut buffer) {
            Ok(0) => return (None, begin.elapsed()),
            Ok(_) => {}
            Err(error) => return (Some(error.kind()), begin.elapsed()),
        }
    }
}

#[test]
fn a_workload_that_gets_a_policy_loses_the_connections_that_it_forbids() {
    let lab = Lab::new("w");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    // The policy is there and selects nobody.
    node.policy("a", Scope::WorkloadSelector);
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    let live = lab.within("a", || until_end(TcpStream::connect("10.99.0.2:8080").unwrap()));
    await_inbound(&node, 1, Duration::from_secs(10));
    // Only the workload changes: a label of the pod, say.
    node.describe_selected(&["a", "b"], &[], Some(("b", "shop/no")));
    assert_eq!(live.join().unwrap().0, Some(ErrorKind::ConnectionReset), "cut with a reset");
    let again = lab.within("a", || talk("10.99.0.2:8080", 1)).join().unwrap();
    assert!(again.is_err(), "and new ones are denied");
}

#[test]
fn a_pod_that_nobody_describes_is_refused_and_not_held_for_ever() {
    let lab = Lab::new("u");
    // Captured because the list says so, while control has said nothing of it.
    let node = Node::start(&lab, lab.pods_file(&["a"]));
    node.wait(&[("a", "Captured")]);
    let (end, after) = lab.within("a", || until_end(TcpStream::connect("10.99.0.2:8080").unwrap())).join().unwrap();
    assert_eq!(end, Some(ErrorKind::ConnectionReset), "after {after:?}");
    assert!(after < Duration::from_secs(15), "{after:?}");
}

#[test]
fn who_does_not_finish_a_handshake_is_let_go() {
    let lab = Lab::new("h");
    let config = Config { handshake_timeout: Duration::from_secs(2), ..Config::default() };
    let mut node =
        Node::start_with(lab.dir.path(), lab.pods_file(&["a", "b"]), Setup { hbone: config, ..Setup::default() });
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // Nothing at all; the beginning of a ClientHello; one that never goes on.
    let begun: [&[u8]; 3] = [b"", &[0x16], &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]];
    let clients = begun.map(|bytes| {
        lab.within("c", move || {
            let mut tcp = TcpStream::connect("10.99.0.2:15008").unwrap();
            tcp.write_all(bytes).unwrap();
            until_end(tcp)
        })
    });
    for (client, bytes) in clients.into_iter().zip(begun) {
        let (end, after) = client.join().unwrap();
        assert!(end != Some(ErrorKind::WouldBlock) && after < Duration::from_secs(15), "{bytes:?}: {end:?} {after:?}");
    }
}

#[test]
fn a_peer_that_never_answers_connect_is_given_up() {
    let lab = Lab::new("n");
    let config = Config { connect_timeout: Duration::from_millis(500), ..Config::default() };
    let mut node =
        Node::start_with(lab.dir.path(), lab.pods_file(&["a", "b"]), Setup { hbone: config, ..Setup::default() });
    node.describe(&["a", "b", "c"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    // Another proxy stands where c is: it opens the tunnel, and lets every stream wait.
    let server = lab.certificate("c").server_config();
    let (ready, is_ready) = channel();
    drop(lab.within("c", move || {
        let listener = TcpListener::bind("[::]:15008").unwrap();
        listener.set_nonblocking(true).unwrap();
        ready.send(()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (tcp, _) = tokio::net::TcpListener::from_std(listener).unwrap().accept().await.unwrap();
            let tls = tokio_rustls::TlsAcceptor::from(server).accept(tcp).await.unwrap();
            let mut connection = h2::server::handshake(tls).await.unwrap();
            let mut held = Vec::new();
            while let Some(Ok(stream)) = connection.accept().await {
                held.push(stream);
            }
        });
    }));
    is_ready.recv().unwrap();
    let (end, after) = lab.within("a", || until_end(TcpStream::connect("10.99.0.3:8080").unwrap())).join().unwrap();
    assert_eq!(end, Some(ErrorKind::ConnectionReset), "after {after:?}");
    assert!(after < Duration::from_secs(10), "{after:?}");
}

#[test]
fn an_address_of_a_service_and_of_a_pod_is_the_services_for_who_sees_it() {
    let ip = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets().to_vec().into();
    let change = |of: wds::address::Type| {
        let bytes = wds::Address { r#type: Some(of) }.encode_to_vec();
        decode::address(&bytes, "v1", &mut decode::Strings::default()).unwrap()
    };
    let ports = || vec![wds::Port { service_port: 80, target_port: 8080, ..wds::Port::default() }];
    let pod = |namespace: &str, name: &str, address: &str, serves: bool| {
        change(wds::address::Type::Workload(wds::Workload {
            uid: format!("Kubernetes//Pod/{namespace}/{name}"),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            addresses: vec![ip(address)],
            services: serves.then(|| ("shop/cart".to_owned(), wds::PortList { ports: ports() })).into_iter().collect(),
            ..wds::Workload::default()
        }))
    };
    let service = change(wds::address::Type::Service(wds::Service {
        name: "cart".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "cart".to_owned(),
        addresses: vec![wds::NetworkAddress { address: ip("10.0.0.9"), ..wds::NetworkAddress::default() }],
        ports: ports(),
        ..wds::Service::default()
    }));
    let (mut writer, reader) = store();
    let pods = [
        pod("shop", "web", "10.0.0.1", false),
        pod("shop", "server", "10.0.0.2", true),
        // It has the service's virtual address.
        pod("shop", "twin", "10.0.0.9", false),
    ];
    writer.apply(pods.into_iter().chain([service, Change::AddressesSynced, Change::PoliciesSynced]), 0);
    let snapshot = reader.load();
    let source = snapshot.workload("Kubernetes//Pod/shop/web").unwrap();
    for (to, endpoint, named) in [("10.0.0.9:80", "10.0.0.2:8080", true), ("10.0.0.2:8080", "10.0.0.2:8080", false)] {
        let plan = decide(&snapshot, source, "", to.parse().unwrap(), &Chance::of(1)).unwrap();
        assert_eq!(plan.endpoint(), endpoint.parse::<SocketAddr>().unwrap(), "{to}");
        // What is recorded, balanced and judged by policy comes from the same plan.
        assert_eq!((plan.service().is_some(), &*plan.destination().unwrap().name), (named, "server"), "{to}");
    }
    // A port that the service does not have is refused: it is not the pod's either.
    assert!(decide(&snapshot, source, "", "10.0.0.9:81".parse().unwrap(), &Chance::of(1)).is_err());
}
