//! Tests of the choice: shares follow weights, nothing ineligible is ever chosen, and locality narrows as the peer does.
//!
//! Draws use a fixed sequence, so a failure repeats. The χ² bound has a chance of about one in ten thousand to fail for a
//! correct sequence, and the sequence never changes.

mod places;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use crate::lb::{Chance, NoChoice, Way, hash, pick, shares, work};
use crate::state::fixtures::{behind, port, service, snapshot, workload};
use crate::state::{
    Change, EndpointHints, HealthPolicy, IpFamilies, Layout, LoadBalancing, Locality, LocalityScope, Mode, Service,
    ServiceInfo, ServiceSpec, Snapshot, Workload,
};

/// An address of each family to dial.
const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));

/// A sequence of 64-bit numbers that looks random (SplitMix64).
fn numbers(mut seed: u64) -> impl Iterator<Item = u64> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

fn mesh(spec: ServiceSpec, endpoints: impl IntoIterator<Item = Workload>) -> Arc<Snapshot> {
    let members = endpoints.into_iter().map(|workload| Change::Workload(Arc::new(behind(workload, "shop", "cart"))));
    snapshot(members.chain([Change::Service(Arc::new(spec))]))
}

fn cart() -> ServiceSpec {
    service("shop", "cart", "10.96.0.1")
}

fn at(name: &str, region: &str, zone: &str, node: &str) -> Workload {
    let number = name.bytes().fold(0u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    Workload {
        locality: Locality { region: region.into(), zone: zone.into(), subzone: "".into() },
        node: node.into(),
        ..workload("shop", name, &format!("10.0.0.{number}"))
    }
}

fn client() -> Workload {
    at("client", "r1", "z1", "n1")
}

/// Names and shares in percent, rounded.
fn share_names(snapshot: &Snapshot, client: &Workload) -> Result<BTreeMap<String, u64>, NoChoice> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let shares = shares(snapshot, service, 80, client, V4, &|_| false)?;
    Ok(shares.iter().map(|(choice, percent)| (choice.workload.name.to_string(), percent.round() as u64)).collect())
}

#[test]
fn draws_follow_the_weights() {
    let weights = [1u32, 2, 3, 10, 84];
    let endpoints = weights.iter().enumerate().map(|(index, weight)| Workload {
        capacity: *weight,
        ..workload("shop", &format!("e{index}"), &format!("10.0.0.{index}"))
    });
    let snapshot = mesh(cart(), endpoints);
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let mut drawn = BTreeMap::<String, u32>::new();
    let draws = 100_000;
    for random in numbers(7).take(draws) {
        let choice = pick(&snapshot, service, 80, &client(), V4, &Chance::of(random)).unwrap();
        *drawn.entry(choice.workload.name.to_string()).or_default() += 1;
        assert_eq!(choice.port, 8080);
    }
    let chi_square: f64 = weights
        .iter()
        .enumerate()
        .map(|(index, weight)| {
            let expected = draws as f64 * f64::from(*weight) / 100.0;
            let seen = f64::from(drawn[&format!("e{index}")]);
            (seen - expected).powi(2) / expected
        })
        .sum();
    assert!(chi_square < 23.5, "χ² with 4 degrees of freedom is {chi_square}: {drawn:?}");
}

#[test]
fn the_ends_of_the_range_are_the_first_and_the_last_endpoint() {
    let snapshot = mesh(cart(), ["a", "b", "c"].map(|name| at(name, "", "", "")));
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let name = |random| {
        pick(&snapshot, service, 80, &at("x", "", "", ""), V4, &Chance::of(random)).unwrap().workload.name.to_string()
    };
    assert_eq!((name(0), name(u64::MAX / 2), name(u64::MAX)), ("a".into(), "b".into(), "c".into()));
}

#[test]
fn locality_narrows_as_the_peer_does() {
    use LocalityScope::{Network, Node, Region, Zone};
    let near = at("near", "r1", "z1", "n1");
    let zone = at("zone", "r1", "z1", "n2");
    let region = at("region", "r1", "z2", "n3");
    let far = at("far", "r2", "z9", "n4");
    let all = || vec![near.clone(), zone.clone(), region.clone(), far.clone()];
    let unready = |workload: &Workload| Workload { healthy: false, ..workload.clone() };
    type Case = (&'static str, Mode, Vec<LocalityScope>, Vec<Workload>, Vec<&'static str>);
    let cases: Vec<Case> = vec![
        ("no preference", Mode::All, vec![Zone], all(), vec!["far", "near", "region", "zone"]),
        ("failover to the nearest", Mode::Failover, vec![Region, Zone, Node], all(), vec!["near"]),
        ("failover within the zone", Mode::Failover, vec![Region, Zone], all(), vec!["near", "zone"]),
        (
            "unready ones do not hold it back",
            Mode::Failover,
            vec![Region, Zone, Node],
            vec![unready(&near), zone.clone(), far.clone()],
            vec!["zone"],
        ),
        ("failover to anywhere", Mode::Failover, vec![Region, Zone], vec![far.clone()], vec!["far"]),
        (
            "the first scope that differs ends the comparison",
            Mode::Failover,
            vec![Region, Node],
            vec![Workload { node: "n1".into(), ..far.clone() }, region.clone()],
            vec!["region"],
        ),
        ("strict", Mode::Strict, vec![Node], all(), vec!["near"]),
        ("strict without a match", Mode::Strict, vec![Node], vec![far.clone(), zone.clone()], vec![]),
        ("strict with the network first", Mode::Strict, vec![Network, Zone], all(), vec!["near", "zone"]),
        ("failover with the network first", Mode::Failover, vec![Network, Region, Zone], all(), vec!["near", "zone"]),
        (
            "another network cannot be reached",
            Mode::All,
            vec![],
            vec![Workload { network: "other".into(), ..near.clone() }, far.clone()],
            vec!["far"],
        ),
    ];
    for (name, mode, routing_preference, endpoints, expected) in cases {
        let lb =
            LoadBalancing { routing_preference, mode, health_policy: HealthPolicy::OnlyHealthy, ..Default::default() };
        let snapshot = mesh(ServiceSpec { lb, ..cart() }, endpoints);
        // Twice: the second answer comes from the kept view.
        for _ in 0..2 {
            let seen = share_names(&snapshot, &client()).map_or_else(|_| vec![], |shares| shares.into_keys().collect());
            assert_eq!(seen, expected, "{name}");
        }
    }
}

#[test]
fn a_client_of_another_place_does_not_get_the_kept_view() {
    let lb =
        LoadBalancing { routing_preference: vec![LocalityScope::Node], mode: Mode::Failover, ..Default::default() };
    let snapshot = mesh(ServiceSpec { lb, ..cart() }, [at("one", "", "", "n1"), at("two", "", "", "n2")]);
    for (node, expected) in [("n1", "one"), ("n2", "two"), ("n1", "one")] {
        let seen = share_names(&snapshot, &at("client", "", "", node)).unwrap();
        assert_eq!(seen, BTreeMap::from([(expected.to_owned(), 100)]));
    }
}

/// Names of what is drawn, with experience.
fn drawn(snapshot: &Snapshot, client: &Workload, tried: &[&str], failing: &[&str]) -> BTreeSet<String> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let tried: Vec<SocketAddr> = tried.iter().map(|ip| format!("{ip}:8080").parse().unwrap()).collect();
    let failing: Vec<SocketAddr> = failing.iter().map(|ip| format!("{ip}:8080").parse().unwrap()).collect();
    let one = |random| {
        let fails = |endpoint| failing.contains(&endpoint);
        let chance = Chance { tried: &tried, failing: &fails, ..Chance::of(random) };
        pick(snapshot, service, 80, client, V4, &chance).ok().map(|choice| choice.workload.name.to_string())
    };
    numbers(11).take(400).filter_map(one).collect()
}

#[test]
fn experience_narrows_the_choice_but_never_empties_it_before_all_were_tried() {
    let (node, zone, far) = (at("node", "r1", "z1", "n1"), at("zone", "r1", "z1", "n2"), at("far", "r2", "z9", "n4"));
    let ip = |workload: &Workload| workload.addresses[0].to_string();
    let (a, b, c) = (ip(&node), ip(&zone), ip(&far));
    let preference = vec![LocalityScope::Zone, LocalityScope::Node];
    type Case<'a> = (&'static str, Mode, Vec<&'a str>, Vec<&'a str>, Vec<&'static str>);
    let cases: Vec<Case<'_>> = vec![
        ("nothing known", Mode::All, vec![], vec![], vec!["far", "node", "zone"]),
        ("one fails", Mode::All, vec![], vec![&a], vec!["far", "zone"]),
        ("one was tried", Mode::All, vec![&b], vec![], vec!["far", "node"]),
        ("all fail", Mode::All, vec![], vec![&a, &b, &c], vec!["far", "node", "zone"]),
        ("all but the failing one were tried", Mode::All, vec![&a, &b], vec![&c], vec!["far"]),
        ("all were tried", Mode::All, vec![&a, &b, &c], vec![], vec![]),
        ("the node fails", Mode::Failover, vec![], vec![&a], vec!["zone"]),
        ("the zone fails", Mode::Failover, vec![], vec![&a, &b], vec!["far"]),
        ("everything fails", Mode::Failover, vec![], vec![&a, &b, &c], vec!["node"]),
        ("everything fails and the node was tried", Mode::Failover, vec![&a], vec![&a, &b, &c], vec!["zone"]),
        ("strict stays where it must", Mode::Strict, vec![], vec![&a], vec!["node"]),
        ("strict has nowhere else to go", Mode::Strict, vec![&a], vec![], vec![]),
    ];
    for (name, mode, tried, failing, expected) in cases {
        let lb = LoadBalancing { routing_preference: preference.clone(), mode, ..Default::default() };
        let snapshot = mesh(ServiceSpec { lb, ..cart() }, [node.clone(), zone.clone(), far.clone()]);
        let seen = drawn(&snapshot, &client(), &tried, &failing);
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected, "{name}");
    }
}

#[test]
fn a_bound_client_stays_until_its_endpoint_goes_and_others_keep_theirs() {
    let lb = LoadBalancing { affinity: Some(Duration::from_secs(10)), ..Default::default() };
    let spec = ServiceSpec { lb, ..cart() };
    let endpoints: Vec<Workload> = ["a", "b", "c", "d"].map(|name| at(name, "", "", "")).into();
    let chosen = |snapshot: &Snapshot, pod: &str, bound: Option<&str>, random| {
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let bound = |_: &Service, _: u16| bound.map(|name| Arc::from(format!("Kubernetes//Pod/shop/{name}")));
        let chance = Chance { pod, bound: &bound, ..Chance::of(random) };
        pick(snapshot, service, 80, &client(), V4, &chance).unwrap().workload.name.to_string()
    };
    let all = mesh(spec.clone(), endpoints.clone());
    for random in numbers(3).take(50) {
        assert_eq!(chosen(&all, "p", Some("c"), random), "c", "whatever chance says");
        assert_eq!(chosen(&all, "p", None, random), chosen(&all, "p", None, 0), "the first choice is no chance either");
    }
    let pods: BTreeSet<String> = (0..100).map(|pod| chosen(&all, &format!("pod-{pod}"), None, 0)).collect();
    assert_eq!(pods.len(), 4, "different pods spread over the endpoints: {pods:?}");
    let without = mesh(spec, endpoints.into_iter().filter(|endpoint| *endpoint.name != *"c"));
    assert_ne!(chosen(&without, "p", Some("c"), 1), "c");
    let moved = chosen(&without, "p", Some("c"), 1);
    assert_eq!(chosen(&without, "p", Some(&moved), 2), moved);
}

#[test]
fn a_client_gets_endpoints_of_its_own_family_and_others_only_where_there_is_none() {
    let with = |name: &str, addresses: &[&str]| Workload {
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        ..workload("shop", name, "10.0.0.9")
    };
    let both = with("both", &["10.0.0.1", "2001:db8::1"]);
    let (four, six) = (with("four", &["10.0.0.2"]), with("six", &["2001:db8::2"]));
    let names = |endpoints: Vec<Workload>, prefer| {
        let snapshot = mesh(cart(), endpoints);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let shares = shares(&snapshot, service, 80, &client(), prefer, &|_| false).unwrap();
        shares.iter().map(|(choice, _)| format!("{} {}", choice.workload.name, choice.ip)).collect::<Vec<_>>()
    };
    let all = || vec![both.clone(), four.clone(), six.clone()];
    assert_eq!(names(all(), V4), ["both 10.0.0.1", "four 10.0.0.2"]);
    assert_eq!(names(all(), V6), ["both 2001:db8::1", "six 2001:db8::2"]);
    assert_eq!(names(vec![six.clone()], V4), ["six 2001:db8::2"]);
    assert_eq!(names(vec![four.clone()], V6), ["four 10.0.0.2"]);
}

#[test]
fn a_choice_costs_the_same_with_three_endpoints_and_with_ten_thousand() {
    let cost = |count: usize, weigh: bool, mode| {
        let endpoints = (0..count).map(|index| Workload {
            capacity: if weigh { 1 + index as u32 % 7 } else { 1 },
            node: format!("n{}", index % 3).into(),
            ..workload(
                "shop",
                &format!("e{index}"),
                &format!("10.{}.{}.{}", index >> 16, index >> 8 & 255, index & 255),
            )
        });
        let lb = LoadBalancing { routing_preference: vec![LocalityScope::Node], mode, ..Default::default() };
        let snapshot = mesh(ServiceSpec { lb, ..cart() }, endpoints);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        // A third of the endpoints fails, and the first connection of the place was made.
        let fails = |endpoint: SocketAddr| endpoint.ip().to_string().ends_with(['1', '4', '7']);
        let draws = 2_000;
        let before = work::rows();
        for random in numbers(5).take(draws) {
            let chance = Chance { failing: &fails, ..Chance::of(random) };
            pick(&snapshot, service, 80, &client(), V4, &chance).unwrap();
        }
        (work::rows() - before) as f64 / draws as f64
    };
    for (weigh, mode) in [(false, Mode::All), (true, Mode::All), (true, Mode::Failover)] {
        let few = cost(30, weigh, mode);
        let many = cost(10_000, weigh, mode);
        assert!(few < 3.0 && many < 3.0, "{few} rows of 30, {many} of 10,000 ({weigh}, {mode:?})");
    }
}

#[test]
fn the_address_is_of_an_allowed_family_and_if_it_can_be_of_the_clients() {
    let dual = |families| {
        let addresses = vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let endpoint = Workload { addresses, ..workload("shop", "dual", "10.0.0.1") };
        mesh(ServiceSpec { ip_families: families, ..cart() }, [endpoint])
    };
    let cases = [
        (IpFamilies::Automatic, V4, "10.0.0.1"),
        (IpFamilies::Automatic, V6, "2001:db8::1"),
        (IpFamilies::V4Only, V6, "10.0.0.1"),
        (IpFamilies::V6Only, V4, "2001:db8::1"),
        (IpFamilies::Dual, V6, "2001:db8::1"),
    ];
    for (families, prefer, expected) in cases {
        let snapshot = dual(families);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let choice = pick(&snapshot, service, 80, &client(), prefer, &Chance::of(1)).unwrap();
        assert_eq!(choice.ip.to_string(), expected, "{families:?} {prefer:?}");
    }
    let v4_only = mesh(ServiceSpec { ip_families: IpFamilies::V6Only, ..cart() }, [workload("shop", "a", "10.0.0.1")]);
    assert!(share_names(&v4_only, &client()).is_err());
}

#[test]
fn a_policy_about_the_node_holds_at_the_cluster_address_alone() {
    let info = ServiceInfo { cluster_addresses: vec![V4], ..ServiceInfo::default() };
    let lb =
        LoadBalancing { mode: Mode::Strict, routing_preference: vec![LocalityScope::Node], ..LoadBalancing::default() };
    let snapshot = mesh(
        ServiceSpec { lb, info: Some(Box::new(info)), ..cart() },
        [at("here", "r1", "z1", "n1"), at("there", "r1", "z1", "n2")],
    );
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let chosen = |dialled: &str| {
        let shares = shares(&snapshot, service, 80, &client(), dialled.parse().unwrap(), &|_| false).unwrap();
        shares.iter().map(|(choice, _)| choice.workload.name.to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(chosen("10.96.0.1"), "here");
    assert_eq!(chosen("192.0.2.1"), "here there");
}

#[test]
fn hints_narrow_the_choice_where_all_have_them_and_some_name_the_client() {
    let hinted = |name: &str, zones: &[&str], nodes: &[&str]| {
        let all = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        let service = "shop/cart.shop.svc.cluster.local".into();
        let hints = EndpointHints { service, zones: all(zones), nodes: all(nodes) };
        Workload { hints: [hints].into(), ..at(name, "r1", "elsewhere", "n9") }
    };
    // The client is in zone z1, on node n1.
    let cases = [
        (
            "its zone's",
            vec![hinted("a", &["z1"], &[]), hinted("b", &["z2", "z1"], &[]), hinted("c", &["z2"], &[])],
            "a b",
        ),
        ("nobody is meant for it", vec![hinted("a", &["z2"], &[]), hinted("b", &["z3"], &[])], "a b"),
        ("one has none", vec![hinted("a", &["z1"], &[]), at("b", "r1", "z1", "n1")], "a b"),
        ("its node's", vec![hinted("a", &["z1"], &["n1"]), hinted("b", &["z1"], &["n2"])], "a"),
        ("nodes only in part", vec![hinted("a", &["z1"], &["n1"]), hinted("b", &["z1"], &[])], "a b"),
        ("a node without endpoints", vec![hinted("a", &["z1"], &["n2"]), hinted("b", &["z2"], &["n3"])], "a"),
    ];
    for (name, endpoints, expected) in cases {
        let snapshot = mesh(cart(), endpoints);
        let names: Vec<String> = share_names(&snapshot, &client()).unwrap().into_keys().collect();
        assert_eq!(names.join(" "), expected, "{name}");
    }
}

#[test]
fn every_refusal_says_what_to_do() {
    let text = |spec: ServiceSpec, endpoints: Vec<Workload>, port: u16| {
        let snapshot = mesh(spec, endpoints);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        pick(&snapshot, service, port, &client(), V4, &Chance::of(1)).unwrap_err().to_string()
    };
    let mode = |mode| ServiceSpec {
        lb: LoadBalancing { mode, routing_preference: vec![LocalityScope::Node], ..Default::default() },
        ..cart()
    };
    let pod = || at("pod", "r9", "z9", "n9");
    let cases: Vec<(ServiceSpec, Vec<Workload>, u16, &str)> = vec![
        (cart(), vec![pod()], 81, "no port 81 (it has: 80)"),
        (cart(), vec![], 80, "no workload belongs to it"),
        (cart(), vec![Workload { healthy: false, ..pod() }], 80, "none of its 1 workloads is ready"),
        (cart(), vec![Workload { capacity: 0, ..pod() }], 80, "a weight above 0"),
        (ServiceSpec { ports: vec![port(80, 0)], ..cart() }, vec![], 80, "no workload belongs to it"),
        (mode(Mode::Strict), vec![pod()], 80, "run one near the client"),
        (cart(), vec![Workload { network: "far".into(), ..pod() }], 80, "not reachable from here"),
        (mode(Mode::Passthrough), vec![pod()], 80, "goes where it was addressed"),
    ];
    for (spec, endpoints, port, expected) in cases {
        let text = text(spec, endpoints, port);
        assert!(text.contains(expected), "{text:?} does not say {expected:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_picked_is_eligible_and_has_a_share(
        endpoints in prop::collection::vec((any::<bool>(), 0..4u32, 0..3u8, any::<bool>()), 0..8),
        mode in prop::sample::select(vec![Mode::All, Mode::Failover, Mode::Strict]),
        random in any::<u64>(),
    ) {
        let endpoints = endpoints.into_iter().enumerate().map(|(index, (healthy, capacity, node, here))| Workload {
            healthy,
            capacity,
            network: if here { "".into() } else { "far".into() },
            ..at(&format!("e{index}"), "r1", "z1", &format!("n{node}"))
        });
        let lb = LoadBalancing { routing_preference: vec![LocalityScope::Node], mode, ..Default::default() };
        let snapshot = mesh(ServiceSpec { lb, ..cart() }, endpoints);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let picked = pick(&snapshot, service, 80, &client(), V4, &Chance::of(random));
        let shares = shares(&snapshot, service, 80, &client(), V4, &|_| false);
        match (picked, shares) {
            (Ok(choice), Ok(shares)) => {
                prop_assert!(choice.workload.healthy && choice.workload.capacity > 0);
                prop_assert_eq!(&*choice.workload.network, "");
                prop_assert!(mode != Mode::Strict || choice.workload.node == client().node);
                prop_assert!(shares.iter().any(|(share, percent)| *share == choice && *percent > 0.0));
                let sum: f64 = shares.iter().map(|(_, percent)| percent).sum();
                prop_assert!((sum - 100.0).abs() < 1e-6);
            }
            (Err(one), Err(other)) => prop_assert_eq!(one, other),
            (picked, shares) => prop_assert!(false, "{:?} but {:?}", picked, shares),
        }
    }
}

/// Names of the endpoints that a way leads to, one after another.
fn by(snapshot: &Snapshot, chances: impl IntoIterator<Item = Chance<'static>>) -> Vec<String> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let name = |chance| pick(snapshot, service, 80, &client(), V4, &chance).unwrap().workload.name.to_string();
    chances.into_iter().map(name).collect()
}

#[test]
fn turns_go_round_and_follow_weights() {
    let endpoints = || ["a", "b", "c"].map(|name| at(name, "", "", ""));
    let turns = |count| (0..count).map(|turn| Chance { way: Way::Turn(turn), ..Chance::of(0) });
    let even = mesh(cart(), endpoints());
    assert_eq!(by(&even, turns(6)), ["a", "b", "c", "a", "b", "c"]);
    let weighted =
        mesh(cart(), endpoints().map(|one| Workload { capacity: if &*one.name == "a" { 8 } else { 1 }, ..one }));
    let names = by(&weighted, turns(100));
    let a = names.iter().filter(|name| *name == "a").count();
    assert!((76..=84).contains(&a), "{a} of 100");
    let longest = names.split(|name| name != "a").map(<[String]>::len).max().unwrap();
    assert!(longest <= 12, "{longest} turns in a row");
}

#[test]
fn the_better_of_two_is_chosen_and_two_of_two_are_looked_at() {
    let snapshot = mesh(cart(), ["a", "b"].map(|name| at(name, "", "", "")));
    let a = SocketAddr::new(at("a", "", "", "").addresses[0], 8080);
    let costly: &'static dyn Fn(SocketAddr, SocketAddr) -> bool = Box::leak(Box::new(move |first, _| first == a));
    let names =
        by(&snapshot, numbers(1).take(50).map(|random| Chance { way: Way::Better(costly), ..Chance::of(random) }));
    assert!(names.iter().all(|name| name == "b"), "{names:?}");
    let names = by(
        &snapshot,
        numbers(1).take(50).map(|random| Chance { way: Way::Better(&|_, _| false), ..Chance::of(random) }),
    );
    assert!(names.iter().any(|name| name == "a") && names.iter().any(|name| name == "b"), "equal ones share");
}

/// A ring as the node makes it.
const RING: Layout = Layout::Ring(0);

#[test]
fn an_endpoint_that_is_held_back_is_chosen_only_where_there_are_only_such() {
    let snapshot = mesh(cart(), ["a", "b"].map(|name| at(name, "", "", "")));
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let a = SocketAddr::new(at("a", "", "", "").addresses[0], 8080);
    let name = |chance: &Chance<'_>| pick(&snapshot, service, 80, &client(), V4, chance).unwrap().workload.name.clone();
    let young = |one: SocketAddr| one == a;
    for random in numbers(9).take(20) {
        for way in [Way::Usual, Way::Turn(random), Way::Better(&|_, _| true)] {
            let chance = Chance { held_back: Some(&young), way, ..Chance::of(random) };
            assert_eq!(&*name(&chance), "b");
            assert_eq!(&*name(&Chance { ejected: &|one| one != a, ..chance }), "a", "there is no other");
        }
    }
    let both: BTreeSet<_> =
        numbers(3).take(20).map(|random| name(&Chance { held_back: Some(&|_| true), ..Chance::of(random) })).collect();
    assert_eq!(both.len(), 2, "all are new");
}

#[test]
fn shares_of_keys_are_as_even_as_the_layout() {
    let names: Vec<String> = (0..10).map(|number| format!("n{number}")).collect();
    let snapshot = mesh(cart(), names.iter().map(|name| at(name, "", "", "")));
    // The layout, and how far a share may be from the even one, in parts of a thousand of all keys.
    for (layout, most) in [(Layout::Maglev(65_537), 8), (Layout::Ring(65_536), 8), (RING, 40)] {
        let keys =
            (0..20_000u32).map(|key| Chance { way: Way::Hash(hash(&key.to_le_bytes()), layout), ..Chance::of(0) });
        let mut shares: BTreeMap<String, u32> = BTreeMap::new();
        by(&snapshot, keys).into_iter().for_each(|name| *shares.entry(name).or_default() += 1);
        let far = shares.values().map(|share| share.abs_diff(2_000)).max().unwrap();
        assert!(shares.len() == 10 && far <= 20 * most, "{layout:?}: {shares:?}");
    }
}

#[test]
fn a_hash_has_one_endpoint_and_few_move_when_one_goes() {
    let names: Vec<String> = (0..10).map(|number| format!("n{number}")).collect();
    let endpoints = |names: &[String]| mesh(cart(), names.iter().map(|name| at(name, "", "", "")));
    let (all, fewer) = (endpoints(&names), endpoints(&names[1..]));
    let keys = || (0..2_000u32).map(|key| Chance { way: Way::Hash(hash(&key.to_le_bytes()), RING), ..Chance::of(0) });
    let (before, after) = (by(&all, keys()), by(&fewer, keys()));
    assert_eq!(before, by(&endpoints(&names), keys()), "the same on every node");
    let mut shares: BTreeMap<&str, usize> = BTreeMap::new();
    before.iter().for_each(|name| *shares.entry(name).or_default() += 1);
    assert!(shares.len() == 10 && shares.values().all(|share| (100..=330).contains(share)), "{shares:?}");
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    assert_eq!(moved, shares["n0"], "only the keys of the one that went");
}

#[test]
fn an_ejected_endpoint_is_never_chosen() {
    let snapshot = mesh(cart(), ["a", "b"].map(|name| at(name, "", "", "")));
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let a = SocketAddr::new(at("a", "", "", "").addresses[0], 8080);
    let out = |one| one == a;
    for random in numbers(7).take(20) {
        for way in [Way::Usual, Way::Random, Way::Turn(random), Way::Better(&|_, _| true), Way::Hash(random, RING)] {
            let chance = Chance { ejected: &out, way, ..Chance::of(random) };
            assert_eq!(&*pick(&snapshot, service, 80, &client(), V4, &chance).unwrap().workload.name, "b");
            let chance = Chance { ejected: &|_| true, way, ..Chance::of(random) };
            let none = pick(&snapshot, service, 80, &client(), V4, &chance).unwrap_err();
            assert!(matches!(none, NoChoice::Ejected { count: 2, .. }), "{none}");
        }
    }
}
