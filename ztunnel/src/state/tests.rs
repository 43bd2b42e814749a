//! Tests of the store: staging, zombies, stand-ins, indexes. Table-driven where the cases are alike.
//!
//! The property test at the end holds that an incrementally kept store equals one built from scratch.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;

use crate::state::fixtures::{behind, key, policy, port, service, with_ports, workload};
use crate::state::{
    Action, Change, HealthPolicy, LoadBalancing, LogName, Policy, Protocol, Reader, Scope, ServiceInfo, ServiceSpec,
    Snapshot, Visibility, Workload, Writer, store,
};

fn put(workload: Workload) -> Change {
    Change::Workload(Arc::new(workload))
}

fn serve(spec: ServiceSpec) -> Change {
    Change::Service(Arc::new(spec))
}

fn enforce(policy: Policy) -> Change {
    Change::Policy(Arc::new(policy))
}

fn selector(name: &str, version: &str) -> Policy {
    Policy { version: version.into(), ..policy("shop", name, Scope::Selector, Action::Deny, None) }
}

fn reject(name: &str, version: &str) -> Change {
    let id = format!("shop/{name}").into();
    let stand_in = Policy::denies_all(&id, &version.into(), Scope::Selector, false, "broken");
    Change::PolicyRejected(Arc::new(stand_in))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A workload of version `version` that names `policies`.
fn naming(version: &str, policies: &[&str]) -> Workload {
    Workload {
        version: version.into(),
        policies: policies.iter().map(|name| format!("shop/{name}").into()).collect(),
        ..workload("shop", "cart-0", "10.0.0.1")
    }
}

fn cart(reader: &Reader) -> Arc<Workload> {
    reader.load().workload("Kubernetes//Pod/shop/cart-0").unwrap().clone()
}

fn endpoint_names(snapshot: &Snapshot, name: &str) -> Vec<String> {
    let service = snapshot.service("shop", &format!("{name}.shop.svc.cluster.local")).unwrap();
    service.endpoints.all.iter().map(|endpoint| endpoint.name()).collect()
}

#[test]
fn a_snapshot_is_never_seen_half_and_generations_count_from_one() {
    let (mut writer, reader) = store();
    let mut watch = reader.subscribe();
    let before = reader.load();
    assert_eq!((before.generation(), before.synced()), (0, false));
    let applied = writer.apply([put(workload("shop", "cart-0", "10.0.0.1")), Change::AddressesSynced], 10);
    assert_eq!((applied.generation, applied.published), (1, true));
    assert!(before.workload("Kubernetes//Pod/shop/cart-0").is_none(), "an old snapshot does not change");
    assert_eq!(*watch.borrow_and_update(), 1);
    assert!(!reader.load().synced());
    writer.apply([Change::PoliciesSynced], 11);
    assert!(reader.load().synced());
    let again = writer.apply([put(workload("shop", "cart-0", "10.0.0.1")), Change::PoliciesSynced], 12);
    assert!(!again.published, "what is the same is not published");
}

#[test]
fn endpoints_find_their_service_in_either_order() {
    let member = || put(behind(workload("shop", "cart-0", "10.0.0.1"), "shop", "cart"));
    let cart_service = || serve(service("shop", "cart", "10.96.0.1"));
    for changes in [[member(), cart_service()], [cart_service(), member()]] {
        let (mut writer, reader) = store();
        for change in changes {
            writer.apply([change], 1);
        }
        assert_eq!(endpoint_names(&reader.load(), "cart"), ["cart-0"]);
        let found = reader.load().service_by_vip("", ip("10.96.0.1"), "other").cloned().unwrap();
        assert_eq!(found.endpoints.all.len(), 1, "the address leads to the newest endpoints");
        writer.apply([Change::AddressRemoved("Kubernetes//Pod/shop/cart-0".into())], 2);
        assert!(endpoint_names(&reader.load(), "cart").is_empty());
        writer.apply([Change::AddressRemoved(key("shop", "cart"))], 3);
        let snapshot = reader.load();
        assert!(snapshot.service_by_vip("", ip("10.96.0.1"), "shop").is_none());
        assert_eq!(snapshot.counts(), (0, 0, 0));
    }
}

#[test]
fn a_workload_that_leaves_a_service_leaves_its_endpoints() {
    let (mut writer, reader) = store();
    writer.apply([serve(service("shop", "cart", "10.96.0.1"))], 1);
    writer.apply([put(behind(workload("shop", "cart-0", "10.0.0.1"), "shop", "cart"))], 2);
    writer.apply([put(workload("shop", "cart-0", "10.0.0.1"))], 3);
    assert!(endpoint_names(&reader.load(), "cart").is_empty());
}

#[test]
fn only_candidates_are_in_a_port_table() {
    let named = |service: &str, workload: Workload| behind(workload, "shop", service);
    let mut endpoints = [
        workload("shop", "ready", "10.0.0.1"),
        Workload { healthy: false, ..workload("shop", "unready", "10.0.0.2") },
        Workload { capacity: 0, ..workload("shop", "weightless", "10.0.0.3") },
        Workload { addresses: vec![], ..workload("shop", "nowhere", "10.0.0.4") },
    ];
    endpoints.iter_mut().for_each(|workload| *workload = named("cart", workload.clone()));
    let names = |health_policy| {
        let (mut writer, reader) = store();
        let lb = LoadBalancing { health_policy, ..LoadBalancing::default() };
        writer.apply([serve(ServiceSpec { lb, ..service("shop", "cart", "10.96.0.1") })], 1);
        writer.apply(endpoints.iter().cloned().map(put), 2);
        let snapshot = reader.load();
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        let table = &service.endpoints.ports.get(&80).unwrap();
        let name = |row: &crate::state::Candidate| service.endpoints.all[row.endpoint as usize].name();
        table.all.candidates.iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(HealthPolicy::OnlyHealthy), ["ready"]);
    assert_eq!(names(HealthPolicy::AllowAll), ["ready", "unready"]);
}

#[test]
fn a_change_of_health_policy_brings_endpoints_back_at_once() {
    let (mut writer, reader) = store();
    let unready = Workload { healthy: false, ..workload("shop", "cart-0", "10.0.0.1") };
    writer.apply([put(behind(unready, "shop", "cart")), serve(service("shop", "cart", "10.96.0.1"))], 1);
    let lb = LoadBalancing { health_policy: HealthPolicy::AllowAll, ..LoadBalancing::default() };
    writer.apply([serve(ServiceSpec { lb, ..service("shop", "cart", "10.96.0.1") })], 2);
    let snapshot = reader.load();
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    assert_eq!(service.endpoints.ports.get(&80).unwrap().all.total(), 1);
}

#[test]
fn an_endpoints_own_port_comes_before_the_services() {
    let (mut writer, reader) = store();
    let mut spec = service("shop", "cart", "10.96.0.1");
    spec.ports = vec![port(80, 0), port(81, 8081)];
    let named = with_ports(workload("shop", "named", "10.0.0.1"), key("shop", "cart"), vec![port(80, 9000)]);
    let silent = with_ports(workload("shop", "silent", "10.0.0.2"), key("shop", "cart"), vec![]);
    writer.apply([serve(spec), put(named), put(silent)], 1);
    let snapshot = reader.load();
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
    let targets = |port: u16| {
        service.endpoints.ports.get(&port).unwrap().all.candidates.iter().map(|row| row.target_port).collect::<Vec<_>>()
    };
    assert_eq!(targets(80), [9000], "a named port is only where the endpoint has it");
    assert_eq!(targets(81), [8081, 8081]);
}

#[test]
fn a_workload_with_an_absent_policy_keeps_its_version_in_force() {
    let (mut writer, reader) = store();
    writer.apply([put(naming("v1", &[]))], 1);
    let applied = writer.apply([put(naming("v2", &["late"]))], 2);
    assert_eq!((applied.staged, applied.published), (1, false));
    assert_eq!((&*cart(&reader).version, cart(&reader).policies_pending), ("v1", false));
    let applied = writer.apply([enforce(selector("late", "p1"))], 3);
    assert_eq!(applied.staged, 0);
    assert_eq!((&*cart(&reader).version, cart(&reader).policies_pending), ("v2", false));
    let log = reader.versions();
    let last = log.last().unwrap();
    let named: Vec<_> = last.resources.keys().map(ToString::to_string).collect();
    assert_eq!(named, ["Address/Kubernetes//Pod/shop/cart-0", "Authorization/shop/late"]);
}

#[test]
fn a_workload_without_a_version_in_force_is_known_but_pending() {
    let (mut writer, reader) = store();
    writer.apply([put(naming("v1", &["late"]))], 1);
    assert!(cart(&reader).policies_pending);
    assert!(reader.load().workload_by_ip("", ip("10.0.0.1")).is_some(), "clients reach it all the same");
    writer.apply([enforce(selector("other", "p1"))], 2);
    assert!(cart(&reader).policies_pending);
    writer.apply([enforce(selector("late", "p1"))], 3);
    assert!(!cart(&reader).policies_pending);
}

#[test]
fn a_new_pod_of_an_old_name_does_not_inherit_the_old_ones_version() {
    let (mut writer, reader) = store();
    writer.apply([put(Workload { pod_uid: "one".into(), ..naming("v1", &[]) })], 1);
    writer.apply([put(Workload { pod_uid: "two".into(), ..naming("v2", &["late"]) })], 2);
    assert_eq!((&*cart(&reader).version, cart(&reader).policies_pending), ("v2", true));
}

#[test]
fn a_workload_waits_for_the_policy_version_that_it_names() {
    let wants = |version: &str| Workload {
        policy_versions: BTreeMap::from([("shop/p".into(), version.into())]),
        ..naming(&format!("w-{version}"), &["p"])
    };
    let (mut writer, reader) = store();
    writer.apply([enforce(selector("p", "p1")), put(wants("p1"))], 1);
    assert_eq!(&*cart(&reader).version, "w-p1");
    writer.apply([put(wants("p2"))], 2);
    assert_eq!(&*cart(&reader).version, "w-p1");
    writer.apply([enforce(selector("p", "p2"))], 3);
    assert_eq!(&*cart(&reader).version, "w-p2");
    // A version that is rejected will never come: what is in force has to do.
    writer.apply([put(wants("p3"))], 4);
    assert_eq!(&*cart(&reader).version, "w-p2");
    writer.apply([reject("p", "p3")], 5);
    assert_eq!(&*cart(&reader).version, "w-p3");
    assert_eq!(&*reader.load().policy("shop/p").unwrap().version, "p2");
}

#[test]
fn a_removed_policy_stays_in_force_while_it_is_named() {
    let (mut writer, reader) = store();
    writer.apply([enforce(selector("p", "p1")), put(naming("v1", &["p"]))], 1);
    let applied = writer.apply([Change::PolicyRemoved("shop/p".into())], 2);
    assert!(!applied.published);
    assert!(reader.load().policy("shop/p").is_some());
    writer.apply([put(naming("v2", &[]))], 3);
    assert!(reader.load().policy("shop/p").is_none());
    assert_eq!(reader.versions().last().unwrap().resources.get(&LogName::Authorization("shop/p".into())), Some(&None));
    // And when its last user goes away.
    writer.apply([enforce(selector("p", "p1")), put(naming("v3", &["p"]))], 4);
    writer.apply([Change::PolicyRemoved("shop/p".into())], 5);
    writer.apply([Change::AddressRemoved("Kubernetes//Pod/shop/cart-0".into())], 6);
    assert!(reader.load().policy("shop/p").is_none());
}

#[test]
fn a_removed_policy_that_comes_back_is_not_buried() {
    let (mut writer, reader) = store();
    writer.apply([enforce(selector("p", "p1")), put(naming("v1", &["p"]))], 1);
    writer.apply([Change::PolicyRemoved("shop/p".into())], 2);
    writer.apply([enforce(selector("p", "p2"))], 3);
    writer.apply([put(naming("v2", &[]))], 4);
    assert_eq!(&*reader.load().policy("shop/p").unwrap().version, "p2");
}

#[test]
fn a_rejected_policy_leaves_the_good_version_or_denies() {
    let (mut writer, reader) = store();
    writer.apply([reject("p", "p1")], 1);
    assert!(reader.load().policy("shop/p").unwrap().stand_in.is_some());
    writer.apply([enforce(selector("p", "p2"))], 2);
    assert!(reader.load().policy("shop/p").unwrap().stand_in.is_none());
    writer.apply([reject("p", "p3")], 3);
    assert_eq!(&*reader.load().policy("shop/p").unwrap().version, "p2");
    writer.apply([Change::PolicyRemoved("shop/p".into())], 4);
    assert!(reader.load().policy("shop/p").is_none(), "a removal is a removal");
    writer.apply([reject("p", "p4")], 5);
    writer.apply([Change::PolicyRemoved("shop/p".into())], 6);
    assert!(reader.load().policy("shop/p").is_none(), "stand-ins too");
}

#[test]
fn a_stand_in_completes_a_workload_that_waits() {
    let (mut writer, reader) = store();
    writer.apply([put(naming("v1", &["p"]))], 1);
    assert!(cart(&reader).policies_pending);
    writer.apply([reject("p", "p1")], 2);
    assert!(!cart(&reader).policies_pending, "it is denied by the stand-in, with its reason");
}

#[test]
fn implied_policies_follow_scope_and_namespace() {
    let names = |reader: &Reader| {
        let snapshot = reader.load();
        let workload = workload("shop", "any", "10.9.9.9");
        snapshot.policies_for(&workload).map(|policy| policy.id.to_string()).collect::<Vec<_>>()
    };
    let with_scope = |scope| enforce(policy("shop", "p", scope, Action::Allow, None));
    let (mut writer, reader) = store();
    writer.apply([with_scope(Scope::Namespace)], 1);
    assert_eq!(names(&reader), ["shop/p"]);
    let applied = writer.apply([with_scope(Scope::Selector)], 2);
    assert_eq!(names(&reader), ["shop/p"], "workloads may name it in a moment");
    writer.apply([], applied.again_us.unwrap());
    assert!(names(&reader).is_empty());
    writer.apply([with_scope(Scope::Global)], 3);
    assert_eq!(names(&reader), ["shop/p"]);
    writer.apply([enforce(policy("bank", "q", Scope::Namespace, Action::Allow, None))], 4);
    assert_eq!(names(&reader), ["shop/p"]);
    writer.apply([Change::PolicyRemoved("shop/p".into())], 5);
    assert!(names(&reader).is_empty());
}

#[test]
fn a_policy_that_gets_a_selector_never_lets_go_of_who_it_selects() {
    let held_to = |reader: &Reader, name: &str| {
        let snapshot = reader.load();
        let workload = snapshot.workload(&format!("Kubernetes//Pod/shop/{name}")).unwrap().clone();
        snapshot.policies_for(&workload).map(|policy| policy.version.to_string()).collect::<Vec<_>>()
    };
    let version = |scope, version: &str| {
        enforce(Policy { version: version.into(), ..policy("shop", "p", scope, Action::Deny, None) })
    };
    let (mut writer, reader) = store();
    let other = || put(workload("shop", "web-0", "10.0.0.2"));
    writer.apply([version(Scope::Namespace, "wide"), put(naming("v1", &[])), other()], 1);
    let applied = writer.apply([version(Scope::Selector, "narrow")], 2);
    for name in ["cart-0", "web-0"] {
        assert_eq!(held_to(&reader, name), ["wide"], "nobody has named it yet");
    }
    writer.apply([put(naming("v2", &["p"]))], 3);
    assert_eq!(held_to(&reader, "cart-0"), ["narrow"], "who names it has the new version, and that only");
    assert_eq!(held_to(&reader, "web-0"), ["wide"]);
    let due = applied.again_us.unwrap();
    assert!(!writer.apply([], due - 1).published);
    assert!(writer.apply([], due).published, "live connections are looked at again");
    assert_eq!((held_to(&reader, "cart-0"), held_to(&reader, "web-0")), (vec!["narrow".to_owned()], vec![]));

    // Wide again, and removed: its past goes with it.
    writer.apply([version(Scope::Selector, "n2"), version(Scope::Namespace, "w2")], due + 1);
    assert_eq!(held_to(&reader, "web-0"), ["w2"]);
    writer.apply(
        [version(Scope::Selector, "n3"), put(naming("v3", &[])), Change::PolicyRemoved("shop/p".into())],
        due + 2,
    );
    assert!(held_to(&reader, "web-0").is_empty() && held_to(&reader, "cart-0").is_empty());
    assert_eq!(writer.apply([], due + 3).again_us, None);
}

#[test]
fn an_address_belongs_to_a_pod_first_then_to_hbone_and_never_to_the_hosts_network() {
    let at = |name: &str| workload("shop", name, "10.0.0.1");
    let entry = |name: &str, protocol| Workload { uid: name.into(), protocol, ..at(name) };
    let cases: Vec<(&str, Vec<Workload>, Option<&str>)> = vec![
        ("a pod before an entry", vec![entry("a-entry", Protocol::Hbone), at("pod")], Some("pod")),
        ("HBONE before plain", vec![entry("a", Protocol::Plain), entry("b", Protocol::Hbone)], Some("b")),
        ("the first uid of equals", vec![at("two"), at("one")], Some("one")),
        ("never the host's network", vec![Workload { host_network: true, ..at("host") }], None),
        ("never another network's", vec![Workload { network: "far".into(), ..at("far") }], None),
    ];
    for (name, workloads, expected) in cases {
        for reversed in [false, true] {
            let mut workloads = workloads.clone();
            if reversed {
                workloads.reverse();
            }
            let (mut writer, reader) = store();
            writer.apply(workloads.into_iter().map(put), 1);
            let snapshot = reader.load();
            let found = snapshot.workload_by_ip("", ip("10.0.0.1")).map(|workload| &*workload.name);
            assert_eq!(found, expected, "{name}");
            assert!(snapshot.workload_by_ip("", ip("::ffff:10.0.0.1")).map(|workload| &*workload.name) == expected);
        }
    }
}

#[test]
fn a_moved_address_is_found_at_its_new_owner_only() {
    let (mut writer, reader) = store();
    writer.apply([put(workload("shop", "a", "10.0.0.1"))], 1);
    writer.apply([put(workload("shop", "a", "10.0.0.2"))], 2);
    let snapshot = reader.load();
    assert!(snapshot.workload_by_ip("", ip("10.0.0.1")).is_none());
    assert!(snapshot.workload_by_ip("", ip("10.0.0.2")).is_some());
    assert!(snapshot.workload_by_pod("shop", "a").is_some());
    assert!(snapshot.workload_by_pod("bank", "a").is_none());
}

#[test]
fn an_address_of_services_is_ranked_for_the_client() {
    let in_namespace = |namespace: &str, canonical, visibility| ServiceSpec {
        canonical,
        visibility,
        ..service(namespace, "cart", "10.96.0.1")
    };
    let range = |namespace: &str, text: &str| ServiceSpec {
        vips: vec![("".into(), text.parse().unwrap())],
        ..service(namespace, "range", "10.96.0.9")
    };
    let (public, private) = (Visibility::Public, Visibility::Namespace);
    let cases: Vec<(&str, Vec<ServiceSpec>, &str, Option<&str>)> = vec![
        (
            "own namespace first",
            vec![in_namespace("a", true, public), in_namespace("b", false, public)],
            "b",
            Some("b"),
        ),
        ("then canonical", vec![in_namespace("a", false, public), in_namespace("b", true, public)], "c", Some("b")),
        ("then the first", vec![in_namespace("b", true, public), in_namespace("a", true, public)], "c", Some("a")),
        ("hidden ones do not exist", vec![in_namespace("a", true, private)], "c", None),
        ("hidden ones exist at home", vec![in_namespace("a", true, private)], "a", Some("a")),
        (
            "an exact address before a range",
            vec![range("b", "10.96.0.0/16"), in_namespace("a", true, public)],
            "b",
            Some("a"),
        ),
        ("a longer range first", vec![range("a", "10.96.0.0/16"), range("b", "10.96.0.0/24")], "c", Some("b")),
        ("own namespace before length", vec![range("a", "10.96.0.0/16"), range("b", "10.96.0.0/24")], "a", Some("a")),
        ("not in the range", vec![range("a", "10.97.0.0/16")], "a", None),
    ];
    for (name, specs, client, expected) in cases {
        let (mut writer, reader) = store();
        writer.apply(specs.into_iter().map(serve), 1);
        let snapshot = reader.load();
        let found = snapshot.service_by_vip("", ip("10.96.0.1"), client).map(|service| &*service.namespace);
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn an_external_address_is_a_services_only_on_its_ports() {
    let external = |name: &str, cluster: &str, port_number: u16| {
        let vips = [cluster, "192.0.2.1"].map(|vip| (Arc::from(""), ipnet::IpNet::from(ip(vip)))).to_vec();
        let info = ServiceInfo { cluster_addresses: vec![ip(cluster)], ..ServiceInfo::default() };
        let ports = vec![port(port_number, 8080)];
        ServiceSpec { vips, ports, info: Some(Box::new(info)), ..service("shop", name, cluster) }
    };
    let (mut writer, reader) = store();
    writer.apply([external("web", "10.96.0.1", 80), external("mail", "10.96.0.2", 25)].map(serve), 1);
    let snapshot = reader.load();
    let at = |address: &str| {
        snapshot.service_at("", address.parse().unwrap(), "other").map(|service| service.name.to_string())
    };
    assert_eq!(at("192.0.2.1:80").as_deref(), Some("web"));
    assert_eq!(at("192.0.2.1:25").as_deref(), Some("mail"), "two services of one load balancer");
    assert_eq!(at("192.0.2.1:22"), None, "what else is there is reached as before");
    assert_eq!(at("10.96.0.1:22").as_deref(), Some("web"), "a cluster address is the service's on every port");
}

#[test]
fn the_endpoints_of_a_range_are_replaced_and_not_added() {
    let (mut writer, reader) = store();
    let spec = ServiceSpec {
        vips: vec![("".into(), "10.96.0.0/16".parse().unwrap())],
        ..service("shop", "cart", "10.96.0.9")
    };
    writer.apply([serve(spec)], 1);
    for (step, name) in ["a", "b", "c"].into_iter().enumerate() {
        writer.apply([put(behind(workload("shop", name, "10.0.0.1"), "shop", "cart"))], 2);
        let snapshot = reader.load();
        let found = snapshot.service_by_vip("", ip("10.96.3.4"), "shop").unwrap();
        assert_eq!(found.endpoints.all.len(), step + 1);
        assert_eq!(snapshot.ranges.len(), 1);
    }
}

#[test]
fn the_version_log_is_bounded() {
    let (mut writer, reader) = store();
    for round in 0..5000 {
        writer.apply([enforce(selector("p", &round.to_string()))], round);
    }
    let log = reader.versions();
    assert_eq!(log.len(), 2048);
    assert_eq!(log.last().unwrap().generation, 5000);
    assert_eq!(log.last().unwrap().applied_unix_us, 4999);
}

#[test]
fn the_version_log_bounds_the_moment_of_a_change() {
    let (mut writer, reader) = store();
    let times = || {
        let log = reader.versions();
        log.iter().map(|entry| (entry.applied_unix_us, entry.settled_unix_us)).collect::<Vec<_>>()
    };
    writer.settled(5);
    writer.apply([enforce(selector("p", "1"))], 10);
    assert_eq!(times(), [(10, None)]);
    writer.settled(12);
    writer.settled(19);
    assert_eq!(times(), [(10, Some(12))], "what is in force does not come into force again");
    writer.apply([enforce(selector("p", "2"))], 20);
    writer.settled(25);
    assert_eq!(times(), [(10, Some(12)), (20, Some(25))]);
}

// The property.

/// Few names, so that changes meet.
fn change() -> impl Strategy<Value = Change> {
    let pod = (0..4u8, 0..4u8, any::<bool>(), any::<bool>(), 0..3u8, 0..4u8, any::<bool>());
    let pod = pod.prop_map(|(name, address, cart, web, named, version, host_network)| {
        let mut pod = workload("shop", &format!("w{name}"), &format!("10.0.0.{address}"));
        pod.version = format!("v{version}").into();
        pod.healthy = version % 2 == 0;
        pod.host_network = host_network;
        for (_, service) in [(cart, "cart"), (web, "web")].into_iter().filter(|(member, _)| *member) {
            pod = behind(pod, "shop", service);
        }
        pod.policies = (0..named).map(|policy| format!("shop/p{policy}").into()).collect();
        put(pod)
    });
    let spec = (any::<bool>(), 0..3u8, any::<bool>()).prop_map(|(cart, vip, range)| {
        let mut spec = service("shop", if cart { "cart" } else { "web" }, &format!("10.96.0.{vip}"));
        if range {
            spec.vips.push(("".into(), "10.97.0.0/16".parse().unwrap()));
        }
        serve(spec)
    });
    let scope = prop::sample::select(vec![Scope::Global, Scope::Namespace, Scope::Selector]);
    let good = (0..3u8, 0..3u8, scope).prop_map(|(name, version, scope)| {
        let plain = policy("shop", &format!("p{name}"), scope, Action::Deny, None);
        enforce(Policy { version: format!("v{version}").into(), ..plain })
    });
    prop_oneof![
        4 => pod,
        2 => spec,
        2 => good,
        1 => (0..3u8, 0..3u8).prop_map(|(name, version)| reject(&format!("p{name}"), &format!("bad{version}"))),
        2 => (0..4u8).prop_map(|name| Change::AddressRemoved(format!("Kubernetes//Pod/shop/w{name}").into())),
        1 => any::<bool>().prop_map(|cart| Change::AddressRemoved(key("shop", if cart { "cart" } else { "web" }))),
        2 => (0..3u8).prop_map(|name| Change::PolicyRemoved(format!("shop/p{name}").into())),
    ]
}

/// Everything that a snapshot shows, in an order of its own.
fn shown(snapshot: &Snapshot) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for workload in snapshot.workloads() {
        lines.insert(format!("{workload:?}"));
        assert_eq!(snapshot.workload_by_pod(&workload.namespace, &workload.name), Some(&workload));
        let policies: Vec<_> = snapshot.policies_for(&workload).map(|policy| &policy.id).collect();
        lines.insert(format!("{} has {policies:?}", workload.uid));
    }
    for service in snapshot.services() {
        let all: Vec<_> = service.endpoints.all.iter().map(|endpoint| endpoint.peek()).collect();
        let tables: Vec<_> =
            service.endpoints.ports.iter().map(|(port, table)| (port, &table.all.candidates)).collect();
        lines.insert(format!("{:?} {all:?} {tables:?}", service.spec()));
    }
    for last in 0..5 {
        let owner = snapshot.workload_by_ip("", ip(&format!("10.0.0.{last}")));
        lines.insert(format!("10.0.0.{last} is {:?}", owner.map(|workload| &workload.uid)));
        for vip in [format!("10.96.0.{last}"), format!("10.97.0.{last}")] {
            let service = snapshot.service_by_vip("", ip(&vip), "shop");
            let endpoints = service.map(|service| service.endpoints.all.len());
            lines.insert(format!("{vip} is {:?} with {endpoints:?}", service.map(|service| service.key())));
        }
    }
    for policy in snapshot.policies() {
        lines.insert(format!("{policy:?}"));
    }
    lines
}

/// What the writer must hold after every update.
fn check_invariants(writer: &Writer, snapshot: &Snapshot) {
    for workload in snapshot.workloads().filter(|workload| !workload.policies_pending) {
        let missing = snapshot.missing_policy(&workload);
        assert!(missing.is_none(), "{} is in force and {missing:?} is not here", workload.uid);
    }
    let counted = (snapshot.workloads().count(), snapshot.services().count(), snapshot.policies().count());
    assert_eq!(counted, snapshot.counts());
    assert!(writer.is_settled());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_store_kept_in_steps_equals_one_built_at_once(
        batches in prop::collection::vec(prop::collection::vec(change(), 1..5), 1..20),
    ) {
        let (mut stepwise, reader) = store();
        for batch in &batches {
            stepwise.apply(batch.iter().cloned(), 1);
            check_invariants(&stepwise, &reader.load());
        }
        // What holds a little longer is over.
        stepwise.apply([], u64::MAX);
        let kept = reader.load();
        // From scratch: policies in force, then services, then workloads as they are in force.
        let (mut rebuilt, again) = store();
        rebuilt.apply(kept.policies().cloned().map(Change::Policy), 1);
        rebuilt.apply(kept.services().map(|service| Change::Service(service.spec().clone())), 2);
        rebuilt.apply(kept.workloads().map(|workload| {
            put(Workload { policies_pending: false, ..Workload::clone(&workload) })
        }), 3);
        prop_assert_eq!(shown(&again.load()), shown(&kept));
    }
}
