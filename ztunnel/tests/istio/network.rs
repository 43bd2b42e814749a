//! Promise: endpoints of another network are reached in a tunnel inside the tunnel to its gateway, identities proven at both
//! ends of each; inner tunnels are shared; and there is no other way.

use std::net::SocketAddr;

use tulle_proto::workload::address::Type;
use tulle_proto::workload::{Service, Workload};

use crate::hop::{Hop, Role};
use crate::{CALL, CART, World, cart, gateway, id, ip, pod};

/// Pod b stands for the far side: here nobody chooses it, and it takes what comes through the gateway in pod c.
fn mesh(gateway_account: &str, names: &[&str]) -> Vec<Type> {
    let far = "far".to_owned();
    let remote = Workload {
        uid: "far//Pod/shop/split".to_owned(),
        name: "split".to_owned(),
        addresses: Vec::new(),
        network: far.clone(),
        network_gateway: Some(gateway("far", &ip("c"), 15008)),
        capacity: Some(3),
        ..pod("b")
    };
    let east_west = Workload {
        uid: format!("NetworkGateway/far/{}/15008", ip("c")),
        name: "east-west".to_owned(),
        service_account: gateway_account.to_owned(),
        network: far,
        ..pod("c")
    };
    let subject_alt_names = names.iter().map(|name| id(name)).collect();
    vec![
        Type::Workload(pod("a")),
        Type::Workload(Workload { capacity: Some(0), ..pod("b") }),
        Type::Workload(remote),
        Type::Workload(east_west),
        Type::Service(Service { subject_alt_names, ..cart() }),
    ]
}

fn at(pod: &str, port: u16) -> SocketAddr {
    format!("{}:{port}", ip(pod)).parse().unwrap()
}

#[test]
fn another_network_is_reached_in_a_tunnel_inside_the_tunnel_to_its_gateway() {
    let mut world = World::new("n");
    let hop = Hop::start(&world.lab, "c", 15008, "c", Role::Gateway { to: at("b", 15008) });
    world.tell(mesh("c", &["b"]));
    for bytes in [3_000_000, 0, 1, 100_000, 1, 1, 1, 1] {
        assert_eq!(world.call("a", CALL, bytes).unwrap(), ip("c"), "through the gateway");
    }
    let seen = hop.seen();
    // Each of the node's two workers has tunnels of its own.
    assert!((1..=2).contains(&seen.len()), "eight connections, and inner tunnels: {seen:?}");
    for outer in &seen {
        assert_eq!((&*outer.identity, &*outer.authority), (&*id("a"), &*format!("{CART}:80")));
        assert!(!outer.headers.contains_key("x-forwarded-network"), "{outer:?}");
    }
    // What comes of the inner tunnel is judged by who is at its beginning.
    world.node.deny("a");
    let denied = world.call("a", CALL, 1);
    assert!(denied.is_err(), "the far side knows who calls: {denied:?}");
}

#[test]
fn both_the_gateway_and_who_is_behind_it_prove_who_they_are() {
    let mut world = World::new("g");
    let hop = Hop::start(&world.lab, "c", 15008, "c", Role::Gateway { to: at("b", 15008) });
    for (name, account, names, met) in [
        ("another gateway", "x", &["b"][..], false),
        ("somebody else behind it", "c", &["x"][..], true),
        ("nobody to believe behind it", "c", &[][..], false),
    ] {
        let before = hop.seen().len();
        world.tell(mesh(account, names));
        let refused = world.call("a", CALL, 1);
        assert!(refused.is_err(), "{name}: {refused:?}");
        assert_eq!(hop.seen().len() > before, met, "{name}");
    }
    assert_eq!(world.node.pods.connections().0, 0, "nothing reached the application");
    world.tell(mesh("c", &["b", "x"]));
    assert!(world.call("a", CALL, 1).is_ok());
    drop(hop);
    let gone = world.call("a", CALL, 1);
    assert!(gone.is_err(), "no gateway, no other way: {gone:?}");
}

#[test]
fn the_inner_tunnel_says_what_istios_says() {
    let mut world = World::new("h");
    let end = Hop::start(&world.lab, "c", 15118, "b", Role::Echo);
    let _hop = Hop::start(&world.lab, "c", 15008, "c", Role::Gateway { to: at("c", 15118) });
    world.tell(mesh("c", &["b"]));
    assert_eq!(world.call("a", CALL, 100_000).unwrap(), id("a"), "who is at the beginning of the inner tunnel");
    let seen = end.seen();
    let [inner] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(inner.authority, format!("{CART}:80"));
    assert_eq!(inner.headers["x-forwarded-network"], "", "of this node's network");
    assert!(inner.headers["forwarded"].starts_with(&format!("for=\"{}:", ip("a"))), "{inner:?}");
    let hellos = end.hellos();
    assert_eq!((hellos[0].name.as_deref(), &*hellos[0].alpn), (None, &["h2".to_owned()][..]));
}
