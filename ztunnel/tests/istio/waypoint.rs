//! Promise: what has a waypoint is reached through it and as it, or not at all; and what the waypoint's policies are
//! attached to stays theirs.

use std::time::{Duration, Instant};

use http::StatusCode;
use prost::Message as _;
use tulle_proto::workload::address::Type;
use tulle_proto::workload::{GatewayAddress, Service, WeightedWaypoint, Workload};
use ztunnel::state::Change;
use ztunnel::xds::decode;

use crate::hop::{Hop, Role};
use crate::{CALL, World, cart, gateway, id, ip, only, pod};

/// Goes on to the application of pod b.
fn to_b() -> Role {
    let at = |port: u16| format!("{}:{port}", ip("b")).parse().unwrap();
    Role::Waypoint { tunnel: at(15008), target: at(8080), expected: id("b").parse().unwrap() }
}

fn mesh(cart: Service, b: Workload) -> Vec<Type> {
    vec![Type::Workload(pod("a")), Type::Workload(b), Type::Workload(pod("c")), Type::Service(cart)]
}

fn waypoint() -> Option<GatewayAddress> {
    Some(gateway("", &ip("c"), 15008))
}

fn allow_only(world: &mut World, account: &str) {
    let policy = decode::authorization(&only(account).encode_to_vec(), "shop/only", "v1").unwrap();
    world.node.apply(vec![Change::Policy(policy.into())]);
}

#[test]
fn a_service_is_reached_through_its_waypoint_and_only_so() {
    let mut world = World::new("w");
    let hop = Hop::start(&world.lab, "c", 15008, "c", to_b());
    world.tell(mesh(Service { waypoint: waypoint(), ..cart() }, pod("b")));
    // Istio's destinations can be told to let nobody but their waypoint in.
    allow_only(&mut world, "c");

    assert_eq!(world.call("a", CALL, 2_000_000).unwrap(), ip("c"), "the application is called by the waypoint");
    let seen = hop.seen();
    let [stream] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(
        (&*stream.identity, &*stream.authority),
        (&*id("a"), CALL),
        "who asks, and the address that was dialled"
    );
    assert_eq!(stream.peer.ip().to_string(), ip("a"), "from the client's own address");
    let forwarded = &stream.headers["forwarded"];
    assert!(forwarded.starts_with(&format!("for=\"{}:", ip("a"))), "{forwarded}");
    assert!(forwarded.ends_with(";host=cart.shop.svc.cluster.local"), "{forwarded}");
    assert_eq!(stream.headers["baggage"], "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop");
    assert_eq!(stream.headers["traceparent"].len(), 55);

    let past = world.call("a", &format!("{}:8080", ip("b")), 1);
    assert!(past.is_err(), "past the waypoint: {past:?}");
    let plain = world.call("c", &format!("{}:8080", ip("b")), 1);
    assert!(plain.is_err(), "the waypoint's address is not its identity: {plain:?}");

    hop.becomes(Role::Refuse(StatusCode::FORBIDDEN));
    let refused = world.call("a", CALL, 1);
    assert!(refused.is_err(), "the waypoint said no: {refused:?}");
    let asked = hop.seen().len();
    assert_eq!(asked, 2, "once, and not again");

    drop(hop);
    let gone = world.call("a", CALL, 1);
    assert!(gone.is_err(), "there is no way past a waypoint that is down: {gone:?}");
    assert_eq!(world.node.pods.connections().0, 0, "and nothing reached the destination");

    let impostor = Hop::start(&world.lab, "c", 15008, "x", to_b());
    let refused = world.call("a", CALL, 1);
    assert!(refused.is_err(), "whoever is there must be the waypoint: {refused:?}");
    assert_eq!((impostor.seen().len(), impostor.hellos().is_empty()), (0, false), "it was met, and not asked");
    drop(impostor);

    let hop = Hop::start(&world.lab, "c", 15008, "c", to_b());
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match world.call("a", CALL, 1000) {
            Ok(greeting) => break assert_eq!(greeting, ip("c")),
            Err(error) => assert!(Instant::now() < deadline, "the waypoint is back: {error}"),
        }
    }
    assert!(!hop.seen().is_empty());
}

#[test]
fn tunnels_begin_as_istios_peers_expect_it() {
    use rustls::{CipherSuite, NamedGroup};
    let mut world = World::new("t");
    let hop = Hop::start(&world.lab, "c", 15008, "c", to_b());
    world.tell(mesh(Service { waypoint: waypoint(), ..cart() }, pod("b")));
    world.call("a", CALL, 1).unwrap();
    let hellos = hop.hellos();
    let [hello] = &hellos[..] else { panic!("{hellos:?}") };
    assert_eq!((&hello.name, &hello.alpn), (&None, &vec!["h2".to_owned()]), "no SNI, and nothing but HTTP/2");
    let aes = [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_AES_128_GCM_SHA256];
    assert!(aes.iter().all(|suite| hello.suites.contains(suite)), "{:?}", hello.suites);
    let groups = [NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::X25519MLKEM768];
    assert!(groups[..1].iter().all(|group| hello.groups.contains(group)), "{:?}", hello.groups);
    assert!(hello.groups.contains(&groups[2]), "for peers that take nothing else: {:?}", hello.groups);
    let answers = hop.answers();
    let [answer] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!(answer["baggage"], "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop", "who was reached");
    let deadline = Instant::now() + Duration::from_secs(30);
    while hop.pongs() == 0 {
        assert!(Instant::now() < deadline, "the ping in a tunnel is not answered");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_pod_is_reached_through_its_own_waypoint() {
    let mut world = World::new("p");
    let hop = Hop::start(&world.lab, "c", 15008, "c", to_b());
    world.tell(mesh(cart(), Workload { waypoint: waypoint(), ..pod("b") }));
    let direct = format!("{}:8080", ip("b"));
    assert_eq!(world.call("a", &direct, 100_000).unwrap(), ip("c"));
    assert_eq!(hop.seen().iter().map(|seen| &*seen.authority).collect::<Vec<_>>(), [&*direct]);
    assert_eq!(world.call("a", CALL, 1000).unwrap(), ip("a"), "its Service has none");
    assert_eq!(hop.seen().len(), 1);
}

#[test]
fn each_of_several_waypoints_gets_its_share() {
    let mut world = World::new("s");
    let hops = [15008, 15018].map(|port| Hop::start(&world.lab, "c", port, "c", to_b()));
    let share = |port: u32, weight| WeightedWaypoint { destination: Some(gateway("", &ip("c"), port)), weight };
    let weighted_waypoints = vec![share(15008, 1), share(15018, 1), share(15028, 0)];
    world.tell(mesh(Service { weighted_waypoints, ..cart() }, pod("b")));
    for _ in 0..40 {
        assert_eq!(world.call("a", CALL, 1).unwrap(), ip("c"));
    }
    let [one, other] = hops.each_ref().map(|hop| hop.seen().len());
    // All to one of them: once in 2⁴⁰ runs.
    assert!(one > 0 && other > 0 && one + other == 40, "{one} and {other}");
}
