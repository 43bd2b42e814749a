//! Malformed resources, one by one: each gives a sentence that says what is wrong, and none takes the process down.
//!
//! The tables are the list of promises; a new check gets a row. Random bytes come last, as a small stand-in for the fuzz
//! targets.

use std::collections::BTreeMap;

use proptest::prelude::*;
use prost::Message;
use prost_types::Any;
use tulle_proto::discovery::Resource;
use tulle_proto::names::{
    EXTENSION_DENIES_ALL, EXTENSION_WORKLOAD, TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_WORKLOAD_INFO,
};
use tulle_proto::security as sec;
use tulle_proto::tulle_workload::{EndpointHints, WorkloadInfo};
use tulle_proto::workload as wds;
use tulle_proto::workload::address::Type;

use crate::state::{
    Action, Change, EgressMode, Policy, Protocol, Scope, ServiceSpec, StringMatch, Visibility, Workload,
};
use crate::xds::decode::{Rejected, Strings, address_resource, authorization, authorization_resource};

fn pod() -> wds::Workload {
    wds::Workload {
        uid: "Kubernetes//Pod/shop/cart-0".to_owned(),
        name: "cart-0".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        ..Default::default()
    }
}

fn cart() -> wds::Service {
    wds::Service {
        name: "cart".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "cart.shop.svc.cluster.local".to_owned(),
        addresses: vec![wds::NetworkAddress { address: vec![10, 96, 0, 1].into(), ..Default::default() }],
        ports: vec![wds::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Default::default()
    }
}

fn resource(name: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        version: "v1".to_owned(),
        resource: Some(Any { type_url: type_url.to_owned(), value }),
        ..Default::default()
    }
}

fn workload_resource(workload: wds::Workload) -> Resource {
    let name = workload.uid.clone();
    resource(&name, TYPE_ADDRESS, wds::Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec())
}

fn service_resource(service: wds::Service) -> Resource {
    let name = format!("{}/{}", service.namespace, service.hostname);
    resource(&name, TYPE_ADDRESS, wds::Address { r#type: Some(Type::Service(service)) }.encode_to_vec())
}

fn rejected_address(resource: &Resource) -> Rejected {
    let (rejected, stand_in) = address_resource(resource, &mut Strings::default()).unwrap_err();
    assert!(stand_in.is_none());
    rejected
}

fn workload(from: wds::Workload) -> Workload {
    match address_resource(&workload_resource(from), &mut Strings::default()).unwrap() {
        Change::Workload(workload) => Workload::clone(&workload),
        other => panic!("{other:?}"),
    }
}

fn service(from: wds::Service) -> ServiceSpec {
    match address_resource(&service_resource(from), &mut Strings::default()).unwrap() {
        Change::Service(spec) => ServiceSpec::clone(&spec),
        other => panic!("{other:?}"),
    }
}

fn info(info: &WorkloadInfo) -> wds::Extension {
    let config = Any { type_url: TYPE_WORKLOAD_INFO.to_owned(), value: info.encode_to_vec() };
    wds::Extension { name: EXTENSION_WORKLOAD.to_owned(), config: Some(config) }
}

#[test]
fn the_defaults_of_wds_are_the_documented_ones() {
    let pod = workload(pod());
    assert_eq!(pod.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((pod.protocol, pod.healthy, pod.host_network, pod.capacity), (Protocol::Plain, true, false, 1));
    assert_eq!((&*pod.cluster, pod.egress, &*pod.version), ("Kubernetes", EgressMode::Allow, "v1"));
    let cart = service(cart());
    assert_eq!(cart.key(), "shop/cart.shop.svc.cluster.local");
    assert_eq!(cart.vips[0].1.to_string(), "10.96.0.1/32");
    assert_eq!(cart.visibility, Visibility::Public);
}

#[test]
fn values_are_carried_over() {
    let extension = WorkloadInfo {
        hints: vec![EndpointHints { service: "shop/cart".into(), zones: vec!["z".into()], nodes: vec![] }],
        network_policies: vec!["NetworkPolicy/shop/isolated".to_owned()],
        pod_uid: "u-1".to_owned(),
        groups: vec![4, 3, 4],
        egress: 2,
        probe_ports: vec![8081],
        policy_versions: BTreeMap::from([("shop/p".to_owned(), "abc".to_owned())]),
        hostname: "db-0".into(),
        subdomain: "db".into(),
        request_auths: vec!["RequestAuthentication/shop/users".to_owned()],
        egress_policies: vec!["EgressPolicy/shop/out".to_owned()],
    };
    let mapped = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2];
    let pod = workload(wds::Workload {
        addresses: vec![mapped.into()],
        trust_domain: "td.example".to_owned(),
        service_account: "cart".to_owned(),
        tunnel_protocol: 1,
        capacity: Some(7),
        authorization_policies: ["shop/p", "shop/tulle_network_isolated", "shop/tulle_network_other"]
            .map(Into::into)
            .into(),
        extensions: vec![wds::Extension { name: "somebody/else".to_owned(), config: None }, info(&extension)],
        ..pod()
    });
    assert_eq!(pod.addresses[0].to_string(), "10.0.0.2", "a mapped address is its IPv4 address");
    assert_eq!(pod.identity.to_string(), "spiffe://td.example/ns/shop/sa/cart");
    assert_eq!((&*pod.pod_uid, pod.egress, pod.capacity), ("u-1", EgressMode::Deny, 7));
    assert_eq!((&*pod.groups, pod.probe_ports.as_slice()), (&[3, 4][..], &[8081][..]));
    assert_eq!(pod.hints_for("shop/cart").map(|hints| (hints.zones.len(), hints.nodes.len())), Some((1, 0)));
    let name = pod.dns_name.as_ref().map(|name| (&*name.hostname, &*name.subdomain));
    assert_eq!(name, Some(("db-0", "db")));
    assert_eq!(&*pod.policy_versions["shop/p"], "abc");
    assert_eq!(pod.network_policies, ["NetworkPolicy/shop/isolated".into()]);
    let kept: Vec<&str> = pod.policies.iter().map(|id| &**id).collect();
    assert_eq!(kept, ["shop/p", "shop/tulle_network_other"], "what stands in for a policy that is taken is left out");

    let cart = service(wds::Service {
        addresses: vec![wds::NetworkAddress {
            address: vec![10, 96, 7, 7].into(),
            length: Some(16),
            ..Default::default()
        }],
        subject_alt_names: vec!["spiffe://td/ns/a/sa/b".to_owned(), "api.example.com".to_owned()],
        visibility: 99,
        ..cart()
    });
    assert_eq!(cart.vips[0].1.to_string(), "10.96.0.0/16", "host bits are cleared");
    assert_eq!(cart.subject_alt_names.len(), 1, "a name that is no SPIFFE id is left out");
    assert_eq!(cart.visibility, Visibility::Public, "an unknown visibility is PUBLIC");
}

#[test]
fn malformed_addresses_say_what_is_wrong() {
    let w = |change: &dyn Fn(&mut wds::Workload)| {
        let mut from = pod();
        change(&mut from);
        workload_resource(from)
    };
    let s = |change: &dyn Fn(&mut wds::Service)| {
        let mut from = cart();
        change(&mut from);
        service_resource(from)
    };
    let port = |service_port, target_port, app_protocol| wds::Port { service_port, target_port, app_protocol };
    let gateway = |destination, hbone_mtls_port| Some(wds::GatewayAddress { destination, hbone_mtls_port });
    let lb = |routing_preference: Vec<i32>, mode, health_policy| {
        Some(wds::LoadBalancing { routing_preference, mode, health_policy })
    };
    let bad_info = |value: &'static [u8], type_url: &str| wds::Extension {
        name: EXTENSION_WORKLOAD.to_owned(),
        config: Some(Any { type_url: type_url.to_owned(), value: value.into() }),
    };
    let long = "n".repeat(2000);
    let cases: Vec<(&str, Resource, &str)> = vec![
        ("no name", Resource { name: String::new(), ..w(&|_| {}) }, "name is empty"),
        ("a long name", Resource { name: long, ..w(&|_| {}) }, "longer than 1024"),
        ("no content", Resource { resource: None, ..w(&|_| {}) }, "no content"),
        ("another type", resource("a", TYPE_AUTHORIZATION, vec![]), "not a type.googleapis.com/istio.workload.Address"),
        ("bytes that are none", resource("a", TYPE_ADDRESS, vec![0xff; 9]), "no istio.workload.Address"),
        ("a cut message", resource("a", TYPE_ADDRESS, vec![0x0a, 0x20, 1]), "no istio.workload.Address"),
        ("neither kind", resource("a", TYPE_ADDRESS, vec![]), "neither a workload nor a service"),
        ("another name", Resource { name: "other".to_owned(), ..w(&|_| {}) }, "another name"),
        ("another service name", Resource { name: "a/b".to_owned(), ..s(&|_| {}) }, "another name"),
        ("no uid", Resource { name: "x".to_owned(), ..w(&|w| w.uid.clear()) }, "uid is empty"),
        ("no namespace", w(&|w| w.namespace.clear()), "namespace"),
        ("a namespace with a slash", w(&|w| w.namespace = "a/b".to_owned()), "namespace"),
        ("an account with a space", w(&|w| w.service_account = "a b".to_owned()), "service account"),
        ("a trust domain with upper case", w(&|w| w.trust_domain = "TD".to_owned()), "trust domain"),
        ("an address of 3 bytes", w(&|w| w.addresses = vec![vec![1, 2, 3].into()]), "3 bytes"),
        ("an address of no bytes", w(&|w| w.addresses = vec![vec![].into()]), "0 bytes"),
        ("an address of 17 bytes", w(&|w| w.addresses = vec![vec![1; 17].into()]), "17 bytes"),
        ("sidecar TLS", w(&|w| w.tunnel_protocol = 2), "LEGACY_ISTIO_MTLS"),
        ("an unknown tunnel", w(&|w| w.tunnel_protocol = 3), "tunnel_protocol has the value 3"),
        ("a negative tunnel", w(&|w| w.tunnel_protocol = -1), "tunnel_protocol has the value -1"),
        ("an unknown status", w(&|w| w.status = 9), "status has the value 9"),
        ("an unknown network mode", w(&|w| w.network_mode = 9), "network_mode"),
        ("an unknown workload type", w(&|w| w.workload_type = 9), "workload_type"),
        (
            "a service without namespace",
            w(&|w| drop(w.services.insert("cart".to_owned(), wds::PortList::default()))),
            "must be <namespace>/<hostname>",
        ),
        (
            "an endpoint's port 0",
            w(&|w| drop(w.services.insert("a/b".to_owned(), wds::PortList { ports: vec![port(0, 1, 0)] }))),
            "service_port is 0",
        ),
        (
            "an endpoint's port 65536",
            w(&|w| drop(w.services.insert("a/b".to_owned(), wds::PortList { ports: vec![port(1, 65536, 0)] }))),
            "target_port is 65536",
        ),
        ("a waypoint without a name", w(&|w| w.waypoint = gateway(None, 15008)), "neither a host nor an address"),
        (
            "a waypoint with a short address",
            w(&|w| {
                let address = wds::NetworkAddress { address: vec![1].into(), ..Default::default() };
                w.waypoint = gateway(Some(wds::gateway_address::Destination::Address(address)), 15008);
            }),
            "waypoint has 1 bytes",
        ),
        (
            "a gateway with a large port",
            w(&|w| {
                let host = wds::NamespacedHostname { namespace: "a".to_owned(), hostname: "b".to_owned() };
                w.network_gateway = gateway(Some(wds::gateway_address::Destination::Hostname(host)), 70000);
            }),
            "network_gateway is 70000",
        ),
        (
            "an unknown application tunnel",
            w(&|w| w.application_tunnel = Some(wds::ApplicationTunnel { protocol: 7, port: 0 })),
            "application_tunnel.protocol",
        ),
        (
            "a large application port",
            w(&|w| w.application_tunnel = Some(wds::ApplicationTunnel { protocol: 1, port: 1 << 20 })),
            "application_tunnel.port",
        ),
        ("an extension of another type", w(&|w| w.extensions = vec![bad_info(b"", "t")]), "has no type.googleapis.com"),
        (
            "an extension that is no message",
            w(&|w| w.extensions = vec![bad_info(b"\xff\xff", TYPE_WORKLOAD_INFO)]),
            "extension tulle.dev/workload:",
        ),
        (
            "an unknown egress mode",
            w(&|w| w.extensions = vec![info(&WorkloadInfo { egress: 9, ..Default::default() })]),
            "egress has the value 9",
        ),
        (
            "a probe port 0",
            w(&|w| w.extensions = vec![info(&WorkloadInfo { probe_ports: vec![0], ..Default::default() })]),
            "probe_ports is 0",
        ),
        ("a service without name", s(&|s| s.name.clear()), "name is \"\""),
        ("a service without hostname", s(&|s| s.hostname.clear()), "hostname is \"\""),
        ("a hostname with a slash", s(&|s| s.hostname = "a/b".to_owned()), "without a slash"),
        ("a virtual address of 5 bytes", s(&|s| s.addresses[0].address = vec![1; 5].into()), "5 bytes"),
        ("a prefix of 33 bits", s(&|s| s.addresses[0].length = Some(33)), "33 bits"),
        (
            "a mapped prefix of 95 bits",
            s(&|s| {
                s.addresses[0].address = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 1, 2, 3, 4].into();
                s.addresses[0].length = Some(95);
            }),
            "95 bits",
        ),
        ("a service port 0", s(&|s| s.ports = vec![port(0, 80, 0)]), "service_port is 0"),
        ("a service port 65536", s(&|s| s.ports = vec![port(65536, 80, 0)]), "service_port is 65536"),
        ("an unknown app protocol", s(&|s| s.ports = vec![port(80, 80, 99)]), "app_protocol"),
        ("unknown families", s(&|s| s.ip_families = 9), "ip_families"),
        ("an unspecified scope", s(&|s| s.load_balancing = lb(vec![0], 0, 0)), "unspecified scope"),
        ("an unknown scope", s(&|s| s.load_balancing = lb(vec![77], 0, 0)), "routing_preference"),
        ("an unknown mode", s(&|s| s.load_balancing = lb(vec![], 9, 0)), "load_balancing.mode"),
        ("an unknown health policy", s(&|s| s.load_balancing = lb(vec![], 0, 9)), "health_policy"),
        (
            "a weighted waypoint to nowhere",
            s(&|s| s.weighted_waypoints = vec![wds::WeightedWaypoint { destination: None, weight: 1 }]),
            "no destination",
        ),
    ];
    assert!(cases.len() >= 40);
    for (name, resource, expected) in cases {
        let rejected = rejected_address(&resource);
        assert!(rejected.reason.contains(expected), "{name}: {:?} does not say {expected:?}", rejected.reason);
        assert!(rejected.name.len() < 1300);
    }
}

fn policy() -> sec::Authorization {
    sec::Authorization {
        name: "p".to_owned(),
        namespace: "shop".to_owned(),
        scope: 2,
        action: 0,
        rules: vec![rule(principal("cluster.local/ns/shop/sa/web"))],
        ..Default::default()
    }
}

fn rule(only: sec::Match) -> sec::Rule {
    sec::Rule { clauses: vec![sec::Clause { matches: vec![only] }] }
}

fn principal(text: &str) -> sec::Match {
    let exact = sec::StringMatch { match_type: Some(sec::string_match::MatchType::Exact(text.to_owned())) };
    sec::Match { principals: vec![exact], ..Default::default() }
}

fn decode_policy(from: &sec::Authorization) -> Policy {
    authorization(&from.encode_to_vec(), "shop/p", "v1").unwrap()
}

#[test]
fn a_policy_is_carried_over() {
    let policy = decode_policy(&policy());
    assert_eq!((&*policy.id, &*policy.namespace, policy.scope), ("shop/p", "shop", Scope::Selector));
    assert_eq!((policy.action, policy.dry_run, policy.stand_in), (Action::Allow, false, None));
    let only = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(only.principals, [StringMatch::Exact("cluster.local/ns/shop/sa/web".into())]);
    assert!(!only.unknown);
}

#[test]
fn a_mesh_wide_policy_may_leave_its_namespace_out() {
    let from = sec::Authorization { namespace: String::new(), scope: 0, ..policy() };
    assert_eq!(decode_policy(&from).scope, Scope::Global);
}

#[test]
fn controls_own_stand_in_is_known_as_one() {
    let extension = sec::Extension { name: EXTENSION_DENIES_ALL.to_owned(), config: None };
    let from = sec::Authorization { action: 1, extensions: vec![extension], ..policy() };
    assert!(decode_policy(&from).stand_in.is_some());
}

#[test]
fn a_wrong_policy_is_rejected_with_a_stand_in_of_its_scope() {
    let address = |address: Vec<u8>, length| sec::Address { address: address.into(), length };
    let with = |only: sec::Match| sec::Authorization { rules: vec![rule(only)], ..policy() };
    let mut top_level = policy().encode_to_vec();
    top_level.extend([0x98, 0x06, 1]); // field 99
    let encoded = |from: sec::Authorization| from.encode_to_vec();
    let cases: Vec<(&str, Vec<u8>, &str, Scope)> = vec![
        ("no protobuf", vec![0xff; 5], "no istio.security.Authorization", Scope::Namespace),
        ("an unknown scope", encoded(sec::Authorization { scope: 9, ..policy() }), "scope has", Scope::Namespace),
        ("an unknown action", encoded(sec::Authorization { action: 9, ..policy() }), "action has", Scope::Selector),
        ("an unknown field of the policy", top_level, "must not ignore", Scope::Selector),
        (
            "another name",
            encoded(sec::Authorization { name: "q".to_owned(), ..policy() }),
            "another name",
            Scope::Selector,
        ),
        (
            "another namespace",
            encoded(sec::Authorization { namespace: "bank".to_owned(), ..policy() }),
            "another name",
            Scope::Selector,
        ),
        (
            "a prefix of 33 bits",
            encoded(with(sec::Match { source_ips: vec![address(vec![10, 0, 0, 0], 33)], ..Default::default() })),
            "source_ips has a prefix of 33 bits",
            Scope::Selector,
        ),
        (
            "a negated prefix of 129 bits",
            encoded(with(sec::Match { not_source_ips: vec![address(vec![0; 16], 129)], ..Default::default() })),
            "not_source_ips has a prefix of 129 bits",
            Scope::Selector,
        ),
        (
            "an address of 6 bytes",
            encoded(with(sec::Match { destination_ips: vec![address(vec![0; 6], 8)], ..Default::default() })),
            "destination_ips has 6 bytes",
            Scope::Selector,
        ),
        (
            "no address",
            encoded(with(sec::Match { not_destination_ips: vec![address(vec![], 0)], ..Default::default() })),
            "not_destination_ips has 0 bytes",
            Scope::Selector,
        ),
        (
            "port 65536",
            encoded(with(sec::Match { destination_ports: vec![65536], ..Default::default() })),
            "destination_ports is 65536",
            Scope::Selector,
        ),
        (
            "port 0",
            encoded(with(sec::Match { not_destination_ports: vec![0], ..Default::default() })),
            "not_destination_ports is 0",
            Scope::Selector,
        ),
    ];
    for (name, bytes, expected, scope) in cases {
        let (rejected, stand_in) = authorization_resource(&resource("shop/p", TYPE_AUTHORIZATION, bytes)).unwrap_err();
        assert!(rejected.reason.contains(expected), "{name}: {:?} does not say {expected:?}", rejected.reason);
        let Some(Change::PolicyRejected(stand_in)) = stand_in else { panic!("{name}: no stand-in") };
        assert_eq!((stand_in.scope, stand_in.action, &*stand_in.version), (scope, Action::Deny, "v1"), "{name}");
        assert!(!stand_in.dry_run);
    }
    let dry = sec::Authorization { action: 9, dry_run: true, ..policy() };
    let bytes = dry.encode_to_vec();
    let (_, stand_in) = authorization_resource(&resource("shop/p", TYPE_AUTHORIZATION, bytes)).unwrap_err();
    let Some(Change::PolicyRejected(stand_in)) = stand_in else { panic!("no stand-in") };
    assert!(stand_in.dry_run, "what had no effect gets none");
    let nameless = authorization_resource(&resource("p", TYPE_AUTHORIZATION, policy().encode_to_vec())).unwrap_err();
    assert!(nameless.1.is_none());
}

/// A field 99 with the varint 1, to be put inside a message.
const UNKNOWN: [u8; 3] = [0x98, 0x06, 1];

/// A length-delimited field.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend(content);
    bytes
}

#[test]
fn an_attribute_of_a_later_version_is_marked_where_it_is() {
    let with_rule = |rule: &[u8]| {
        let mut bytes = sec::Authorization { rules: vec![], ..policy() }.encode_to_vec();
        bytes.extend(field(5, &sec::Rule::default().encode_to_vec()));
        bytes.extend(field(5, rule));
        authorization(&bytes, "shop/p", "v1").unwrap()
    };
    let in_rule = with_rule(&UNKNOWN);
    assert!(in_rule.rules[1].unknown && !in_rule.rules[0].unknown);
    let in_clause = with_rule(&field(1, &UNKNOWN));
    assert!(in_clause.rules[1].clauses[0].unknown && !in_clause.rules[1].unknown);
    let mut only = principal("a").encode_to_vec();
    only.extend(UNKNOWN);
    let in_match = with_rule(&field(1, &field(2, &only)));
    let marked = &in_match.rules[1].clauses[0].matches[0];
    assert!(marked.unknown);
    assert_eq!(marked.principals.len(), 1, "what is known stays");
    // A principal with a part that is not known says nothing as a whole.
    let in_value = with_rule(&field(1, &field(2, &field(3, &UNKNOWN))));
    let marked = &in_value.rules[1].clauses[0].matches[0];
    assert!(marked.unknown && marked.principals.is_empty());
    // An extension's content is for somebody else, but that there is one counts.
    let extension =
        sec::Match { extensions: vec![sec::Extension { name: "x".to_owned(), config: None }], ..Default::default() };
    let in_extension = with_rule(&field(1, &field(2, &extension.encode_to_vec())));
    assert!(in_extension.rules[1].clauses[0].matches[0].unknown);
}

#[test]
fn repeated_strings_are_kept_once_and_swept() {
    let mut strings = Strings::default();
    let first = strings.share("shop");
    assert!(std::sync::Arc::ptr_eq(&first, &strings.share("shop")));
    for index in 0..100_000 {
        strings.share(&format!("gone-{index}"));
    }
    assert!(strings.len() < 10_000, "{}", strings.len());
    assert!(std::sync::Arc::ptr_eq(&first, &strings.share("shop")));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_judged_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = crate::xds::decode::address(&bytes, "v", &mut Strings::default());
        let _ = authorization(&bytes, "a/b", "v");
    }

    #[test]
    fn damaged_resources_are_judged_without_a_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let address = wds::Address { r#type: Some(Type::Workload(pod())) };
        let mut bytes = address.encode_to_vec();
        *at.get_mut(&mut bytes) = byte;
        let _ = crate::xds::decode::address(&bytes, "v", &mut Strings::default());
        let mut bytes = policy().encode_to_vec();
        *at.get_mut(&mut bytes) = byte;
        let _ = authorization(&bytes, "shop/p", "v");
    }
}
