//! Tests of the choice under a traffic policy that speaks of places: shares are those that it names, an order is left only
//! when all that is nearer is ejected, and what is told equals what is drawn.
//!
//! The client is in region `r1`, zone `z1`, on node `n1`; pods are named by letters, of which their addresses are made.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::{V4, at, cart, client, numbers, share_names};
use crate::lb::{Chance, Way, locality, pick, shares};
use crate::state::fixtures::{behind, snapshot};
use crate::state::{
    Change, Distribution, Layout, LoadBalancing, LocalityScope, Mode, Nearness, Region, ServiceInfo, ServiceName,
    ServiceSpec, Snapshot, TrafficPolicy, TrafficScope, TrafficSettings, Workload,
};

/// The same mesh under a traffic policy that speaks of places.
fn mesh_by(by: Nearness, spec: ServiceSpec, endpoints: impl IntoIterator<Item = Workload>) -> Arc<Snapshot> {
    let members = endpoints.into_iter().map(|workload| Change::Workload(Arc::new(behind(workload, "shop", "cart"))));
    let name = ServiceName { namespace: spec.namespace.clone(), hostname: spec.hostname.clone() };
    let policy = TrafficPolicy {
        id: "DestinationRule/shop/cart".into(),
        version: "1".into(),
        namespace: "shop".into(),
        services: vec![name],
        scope: TrafficScope::AllClients,
        settings: TrafficSettings { nearness: Some(Arc::new(by)), ..TrafficSettings::default() },
        ports: BTreeMap::new(),
    };
    let more = [Change::Service(Arc::new(spec)), Change::TrafficPolicy(Arc::new(policy))];
    snapshot(members.chain(more))
}

fn place(text: &str) -> Region {
    Region::new(text).unwrap()
}

fn shares_of(from: &str, to: &[(&str, u32)]) -> Distribution {
    Distribution { from: place(from), to: to.iter().map(|(text, weight)| (place(text), *weight)).collect() }
}

#[test]
fn a_policy_gives_places_their_shares_whatever_the_balancer() {
    let pods = [("a", "z1"), ("b", "z2"), ("c", "z2"), ("d", "z3")];
    let by = || {
        Nearness::Shares(vec![shares_of("r9", &[("r1", 100)]), shares_of("r1/z1/*", &[("r1/z2", 70), ("*/z3", 30)])])
    };
    let pods = || pods.iter().map(|(name, zone)| at(name, "r1", zone, "n1"));
    let node =
        LoadBalancing { mode: Mode::Failover, routing_preference: vec![LocalityScope::Zone], ..Default::default() };
    let snapshot = mesh_by(by(), ServiceSpec { lb: node, ..cart() }, pods());
    let expected = [("b", 35), ("c", 35), ("d", 30)].map(|(name, share)| (name.to_owned(), share));
    let prefers = "it comes before what the Service prefers";
    assert_eq!(share_names(&snapshot, &client()).unwrap(), expected.into(), "{prefers}");
    let other = at("client", "r1", "z2", "n1");
    assert_eq!(share_names(&snapshot, &other).unwrap().len(), 4, "nothing is said of its place");
    let abroad = at("client", "r9", "z1", "n1");
    assert_eq!(share_names(&snapshot, &abroad).unwrap().len(), 4, "all are in r1");
    // The better one is always d, or always one of the others; it gets no more than its place's share.
    for better in [4, 2] {
        let wins = move |_: SocketAddr, second: SocketAddr| is_of(second, better);
        let counts = often(&snapshot, &wins, &|_| false);
        let far = counts.get("d").copied().unwrap_or_default();
        assert!((2_850..=3_150).contains(&far), "30 % of 10,000: {counts:?}");
        assert!(!counts.contains_key("a"), "{counts:?}");
    }
    // Who cannot be used leaves the share of its place to the others of it, and then to the other places.
    let told = told_without(&snapshot, &|endpoint| is_of(endpoint, 2));
    assert_eq!(told, [("b", 0), ("c", 70), ("d", 30)].map(|(name, share)| (name.to_owned(), share)));
    let told = told_without(&snapshot, &|endpoint| !is_of(endpoint, 4));
    assert_eq!(told, [("b", 0), ("c", 0), ("d", 100)].map(|(name, share)| (name.to_owned(), share)));
    let told = told_without(&snapshot, &|_| true);
    assert_eq!(told, [("b", 35), ("c", 35), ("d", 30)].map(|(name, share)| (name.to_owned(), share)), "all are");
    let counts = often(&snapshot, &|_, _| false, &|endpoint| is_of(endpoint, 2));
    assert!(!counts.contains_key("b") && (6_850..=7_150).contains(&counts["c"]), "{counts:?}");
    let counts = often(&snapshot, &|_, _| false, &|endpoint| is_of(endpoint, 2) || is_of(endpoint, 3));
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [("d".to_owned(), 10_000)]);
    // The same key is always at the same endpoint.
    for key in numbers(3).take(100) {
        let chances = numbers(key)
            .take(5)
            .map(|random| Chance { way: Way::Hash(key, Layout::Maglev(1_009)), ..Chance::of(random) });
        let found: BTreeSet<String> = by_chances(&snapshot, chances);
        assert_eq!(found.len(), 1, "{found:?}");
    }
    let nobody = mesh_by(by(), cart(), [at("a", "r1", "z1", "n1")]);
    let service = nobody.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let refused = pick(&nobody, service, 80, &client(), V4, &Chance::of(1)).unwrap_err();
    assert!(refused.to_string().contains("localityLbSetting.distribute"), "{refused}");
    assert_eq!(share_names(&nobody, &client()).unwrap_err(), refused);
}

/// Whether an endpoint is the one of that place in the alphabet.
fn is_of(endpoint: SocketAddr, letter: u8) -> bool {
    endpoint.ip() == IpAddr::V4(Ipv4Addr::new(10, 0, 0, b'a' + letter - 1))
}

/// How often each is chosen in 10,000 choices, with a way to tell the better of two and who is ejected.
fn often(
    snapshot: &Snapshot,
    is_better: &dyn Fn(SocketAddr, SocketAddr) -> bool,
    ejected: &dyn Fn(SocketAddr) -> bool,
) -> BTreeMap<String, u32> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let mut counts = BTreeMap::new();
    for random in numbers(11).take(10_000) {
        let chance = Chance { way: Way::Better(is_better), ejected, ..Chance::of(random) };
        let choice = pick(snapshot, service, 80, &client(), V4, &chance).unwrap();
        *counts.entry(choice.workload.name.to_string()).or_default() += 1;
    }
    counts
}

/// Names and shares, in percent, of all that are listed while some are ejected.
fn told_without(snapshot: &Snapshot, ejected: &dyn Fn(SocketAddr) -> bool) -> Vec<(String, u64)> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let shares = shares(snapshot, service, 80, &client(), V4, ejected).unwrap();
    shares.iter().map(|(choice, percent)| (choice.workload.name.to_string(), percent.round() as u64)).collect()
}

fn by_chances<'a>(snapshot: &Snapshot, chances: impl IntoIterator<Item = Chance<'a>>) -> BTreeSet<String> {
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let name = |chance| pick(snapshot, service, 80, &client(), V4, &chance).unwrap().workload.name.to_string();
    chances.into_iter().map(name).collect()
}

#[test]
fn a_policy_orders_places_and_names_the_region_that_is_next() {
    use LocalityScope::{Node, Region, Subzone, Zone};
    // Same place, zone, region; the region that is named; any other.
    let all = [
        ("a", "r1", "z1", "n1"),
        ("b", "r1", "z1", "n2"),
        ("c", "r1", "z2", "n3"),
        ("d", "r3", "z", "n"),
        ("e", "r2", "z", "n"),
    ];
    let pods = |from: usize| all[from..].iter().map(|(name, region, zone, node)| at(name, region, zone, node));
    let failover = || vec![("r9".into(), "r2".into()), ("r1".into(), "r3".into())];
    let cases = [
        (vec![Region, Zone, Subzone], failover(), ["a b", "b", "c", "d", "e"]),
        (vec![Region, Zone, Subzone], vec![], ["a b", "b", "c", "d e", "e"]),
        (vec![Region, Zone, Node], failover(), ["a", "b", "c", "d", "e"]),
        (vec![Zone], vec![], ["a b", "b", "c d e", "d e", "e"]),
        (vec![], vec![], ["a b c d e", "b c d e", "c d e", "d e", "e"]),
    ];
    for (scopes, failover, expected) in cases {
        for (from, expected) in expected.into_iter().enumerate() {
            let by = Nearness::Order { scopes: scopes.clone(), failover: failover.clone() };
            let snapshot = mesh_by(by, cart(), pods(from));
            let names: Vec<String> = share_names(&snapshot, &client()).unwrap().into_keys().collect();
            assert_eq!(names.join(" "), expected, "{scopes:?} from {from}");
        }
    }
    // What is nearest is left only when all of it is ejected.
    let by = Nearness::Order { scopes: vec![Region, Zone, Subzone], failover: failover() };
    let snapshot = mesh_by(by, cart(), pods(0));
    for (ejected, expected) in [(0, "a b"), (1, "b"), (2, "c"), (3, "d"), (4, "e")] {
        let counts = often(&snapshot, &|_, _| false, &|endpoint| (1..=ejected).any(|letter| is_of(endpoint, letter)));
        assert_eq!(counts.into_keys().collect::<Vec<_>>().join(" "), expected, "{ejected} are ejected");
        let told = told_without(&snapshot, &|endpoint| (1..=ejected).any(|letter| is_of(endpoint, letter)));
        assert_eq!(told.len(), expected.split(' ').count() + usize::from(ejected), "those that are passed over too");
        let used: Vec<&str> = told.iter().filter(|(_, share)| *share > 0).map(|(name, _)| name.as_str()).collect();
        assert_eq!(used.join(" "), expected, "{ejected} are ejected: {told:?}");
    }
    // A Service that requires the node keeps requiring it, at its cluster address alone.
    let strict = LoadBalancing { mode: Mode::Strict, routing_preference: vec![Node], ..LoadBalancing::default() };
    let by = Nearness::Shares(vec![shares_of("*", &[("r1/z2", 100)])]);
    let info = Some(Box::new(ServiceInfo { cluster_addresses: vec![V4], ..ServiceInfo::default() }));
    let snapshot = mesh_by(by, ServiceSpec { lb: strict, info, ..cart() }, pods(0));
    assert!(share_names(&snapshot, &client()).unwrap_err().to_string().contains("run one near the client"));
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let outside = shares(&snapshot, service, 80, &client(), "192.0.2.1".parse().unwrap(), &|_| false).unwrap();
    assert_eq!(outside.len(), all.len(), "anybody");
}

#[test]
fn places_and_policies_are_kept_apart_and_are_few() {
    let by = |zone: &str| Nearness::Shares(vec![shares_of("*", &[(zone, 100)])]);
    let snapshot = mesh_by(by("*/z1"), cart(), [at("a", "r1", "z1", "n1"), at("b", "r1", "z2", "n1")]);
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let table = &service.endpoints.ports.get(&80).unwrap().all;
    let (often, policy) = (at("client", "r1", "z3", "n0"), Arc::new(by("*/z1")));
    let first = locality::placed(service, table, &often, &policy);
    for round in 0..3 {
        for number in 0..40 {
            let client = at("client", "r1", "z1", &format!("n{number}"));
            for (zone, expected) in [("*/z1", 0), ("*/z2", 1)] {
                let placed = locality::placed(service, table, &client, &Arc::new(by(zone)));
                assert_eq!(placed.tables[0].candidates[0].endpoint, expected, "{zone} in round {round}");
            }
            let again = locality::placed(service, table, &often, &policy);
            assert!(Arc::ptr_eq(&first, &again), "what is used is kept");
        }
    }
    assert!(table.placed.get().unwrap().lock().unwrap().len() <= 32);
    assert!(Region::new("a/b/c/d").is_none());
}
