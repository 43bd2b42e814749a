//! Tests of the choice: shares follow weights, nothing ineligible is ever chosen, and locality narrows as the peer does.
//!
//! Draws use a fixed sequence, so a failure repeats. The χ² bound has a chance of about one in ten thousand to fail for a
//! correct sequence, and the sequence never changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use crate::lb::{NoChoice, pick, shares};
use crate::state::fixtures::{behind, port, service, snapshot, workload};
use crate::state::{
    Change, HealthPolicy, IpFamilies, IpFamily, LoadBalancing, Locality, LocalityScope, Mode, ServiceSpec, Snapshot,
    Workload,
};

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
    let shares = shares(snapshot, service, 80, client, IpFamily::V4)?;
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
        let choice = pick(&snapshot, service, 80, &client(), IpFamily::V4, random).unwrap();
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
        pick(&snapshot, service, 80, &at("x", "", "", ""), IpFamily::V4, random).unwrap().workload.name.to_string()
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
        let lb = LoadBalancing { routing_preference, mode, health_policy: HealthPolicy::OnlyHealthy };
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

#[test]
fn the_address_is_of_an_allowed_family_and_if_it_can_be_of_the_clients() {
    let dual = |families| {
        let addresses = vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let endpoint = Workload { addresses, ..workload("shop", "dual", "10.0.0.1") };
        mesh(ServiceSpec { ip_families: families, ..cart() }, [endpoint])
    };
    let cases = [
        (IpFamilies::Automatic, IpFamily::V4, "10.0.0.1"),
        (IpFamilies::Automatic, IpFamily::V6, "2001:db8::1"),
        (IpFamilies::V4Only, IpFamily::V6, "10.0.0.1"),
        (IpFamilies::V6Only, IpFamily::V4, "2001:db8::1"),
        (IpFamilies::Dual, IpFamily::V6, "2001:db8::1"),
    ];
    for (families, prefer, expected) in cases {
        let snapshot = dual(families);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let choice = pick(&snapshot, service, 80, &client(), prefer, 1).unwrap();
        assert_eq!(choice.ip.to_string(), expected, "{families:?} {prefer:?}");
    }
    let v4_only = mesh(ServiceSpec { ip_families: IpFamilies::V6Only, ..cart() }, [workload("shop", "a", "10.0.0.1")]);
    assert!(share_names(&v4_only, &client()).is_err());
}

#[test]
fn every_refusal_says_what_to_do() {
    let text = |spec: ServiceSpec, endpoints: Vec<Workload>, port: u16| {
        let snapshot = mesh(spec, endpoints);
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        pick(&snapshot, service, port, &client(), IpFamily::V4, 1).unwrap_err().to_string()
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
        let picked = pick(&snapshot, service, 80, &client(), IpFamily::V4, random);
        let shares = shares(&snapshot, service, 80, &client(), IpFamily::V4);
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
