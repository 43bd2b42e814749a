//! Promise: control may be a version ahead of a node, or behind it. What a later control says in new fields is never skipped
//! where it decides something, and ignored where it only describes; what an earlier one does not say has a default that closes.
//!
//! A later version's resource is one of today's with a field 99 in each place, one at a time. The samples name every field, so
//! that a field that is added to the protocol and not to the schemas fails here.

use std::collections::BTreeMap;
use std::fmt::Debug;

use prost::Message;
use tulle_proto::mesh as wire;
use tulle_proto::mesh::network_peer::Peer;
use tulle_proto::mesh::route_filter::Filter;
use tulle_proto::mesh::{egress_endpoint, hash_key, path_change, route_path, route_value};
use tulle_proto::security as sec;
use tulle_proto::tulle_workload::WorkloadInfo;
use tulle_proto::workload as wds;
use tulle_proto::workload::address::Type;

use crate::state::{Action, Policy};
use crate::xds::decode;
use crate::xds::decode::{Strings, http_rules};

/// A field 99 with the varint 1.
const LATER: [u8; 3] = [0x98, 0x06, 1];

fn length_delimited(key: &[u8], content: &[u8]) -> Vec<u8> {
    let mut bytes = key.to_vec();
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend(content);
    bytes
}

/// The message with a field of a later version in it, once for each place. A text is taken for a message, too; what comes of
/// that is told from a message by [`is_dropped`].
fn later(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = vec![[bytes, &LATER].concat()];
    let mut rest = bytes;
    while !rest.is_empty() {
        let before = &bytes[..bytes.len() - rest.len()];
        let Ok((number, kind)) = prost::encoding::decode_key(&mut rest) else { return found };
        let key = &bytes[before.len()..bytes.len() - rest.len()];
        if kind == prost::encoding::WireType::LengthDelimited {
            let Ok(length) = prost::encoding::decode_varint(&mut rest) else { return found };
            let Some((content, after)) = rest.split_at_checked(length as usize) else { return found };
            for changed in later(content) {
                found.push([before, &length_delimited(key, &changed), after].concat());
            }
            rest = after;
        } else if prost::encoding::skip_field(kind, number, &mut rest, Default::default()).is_err() {
            return found;
        }
    }
    found
}

/// Whether the decoder reads the bytes and leaves something of them out.
fn is_dropped<M: Message + Default>(bytes: &[u8]) -> bool {
    M::decode(bytes).is_ok_and(|message| message.encode_to_vec() != bytes)
}

/// Puts a later field into each place; `whole` says whether a resource is taken as if all of it were understood.
fn never_skipped<M: Message + Default + Debug>(sample: &M, whole: impl Fn(&[u8]) -> bool) {
    let bytes = sample.encode_to_vec();
    assert!(whole(&bytes), "today's fields are all known: {sample:?}");
    let dropped: Vec<Vec<u8>> = later(&bytes).into_iter().filter(|changed| is_dropped::<M>(changed)).collect();
    assert!(!dropped.is_empty());
    for changed in dropped {
        assert!(!whole(&changed), "a field 99 is skipped in {:?}: {changed:02x?}", M::decode(changed.as_slice()));
    }
}

fn service() -> Option<wire::ServiceRef> {
    Some(wire::ServiceRef { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() })
}

fn filters() -> Vec<wire::RouteFilter> {
    let header = || vec![wire::Header { name: "a".into(), value: "b".into() }];
    let changes = || wire::HeaderChanges { set: header(), add: header(), remove: vec!["c".into()] };
    let path = || Some(wire::PathChange { change: Some(path_change::Change::Full("/".into())) });
    [
        Filter::RequestHeaders(changes()),
        Filter::ResponseHeaders(changes()),
        Filter::Redirect(wire::Redirect {
            scheme: "https".into(),
            hostname: "a".into(),
            port: 443,
            path: path(),
            status: 301,
        }),
        Filter::Rewrite(wire::Rewrite { hostname: "a".into(), path: path() }),
        Filter::Mirror(wire::Mirror {
            service: service(),
            port: 80,
            numerator: 1,
            denominator: 2,
            invalid: String::new(),
        }),
        Filter::Fault(wire::Fault {
            delay_ms: 1,
            delay_millionths: 1,
            abort_status: 503,
            abort_grpc_status: 14,
            abort_millionths: 1,
        }),
        Filter::RateLimit(wire::RateLimit {
            name: "shop/a".into(),
            requests: 1,
            interval_ms: 1,
            burst: 1,
            per_identity: true,
        }),
        Filter::Cors(wire::Cors {
            origins: vec!["*".into()],
            credentials: true,
            methods: vec!["GET".into()],
            headers: vec!["a".into()],
            expose: vec!["a".into()],
            max_age_seconds: 1,
        }),
    ]
    .map(|filter| wire::RouteFilter { filter: Some(filter) })
    .into()
}

fn route() -> wire::Route {
    let value = || wire::RouteValue { name: "a".into(), value: Some(route_value::Value::Exact("b".into())) };
    let rule = wire::RouteRule {
        name: "first".into(),
        matches: vec![wire::RouteMatch {
            path: Some(wire::RoutePath { path: Some(route_path::Path::Prefix("/a".into())) }),
            method: "GET".into(),
            headers: vec![value()],
            query: vec![value()],
            grpc: Some(wire::GrpcMethod { service: "s".into(), method: "m".into(), regex: true }),
        }],
        filters: filters(),
        backends: vec![wire::RouteBackend {
            service: service(),
            port: 80,
            weight: 1,
            filters: filters().into_iter().take(2).collect(),
            invalid: String::new(),
        }],
        request_timeout_ms: 1,
        backend_request_timeout_ms: 1,
        retry: Some(wire::RouteRetry { attempts: 1, codes: vec![503], backoff_ms: 1, any_method: true }),
        broken: String::new(),
        session: Some(wire::RouteSession {
            name: "s".into(),
            header: true,
            permanent: true,
            absolute_ms: 1,
            idle_ms: 1,
        }),
    };
    wire::Route {
        namespace: "shop".into(),
        name: "cart".into(),
        kind: 0,
        created: 1,
        parents: vec![wire::RouteParent { service: service(), ports: vec![80] }],
        rules: vec![rule],
    }
}

#[test]
fn no_part_of_a_route_is_skipped() {
    never_skipped(&route(), |bytes| {
        let read = decode::route(bytes, "HTTPRoute/shop/cart", "1", "n", &mut Strings::default());
        read.is_ok_and(|route| {
            route.rules.iter().all(|rule| rule.broken.is_none() && rule.backends.iter().all(|it| it.invalid.is_none()))
        })
    });
    // The other rules of a route go on.
    let mut bytes = route().encode_to_vec();
    bytes.extend(length_delimited(&[6 << 3 | 2], &LATER));
    let read = decode::route(&bytes, "HTTPRoute/shop/cart", "1", "n", &mut Strings::default()).unwrap();
    assert!(read.rules[0].broken.is_none() && read.rules[1].broken.is_some());
}

fn settings() -> wire::TrafficSettings {
    wire::TrafficSettings {
        max_connections: 1,
        connect_timeout_ms: 1,
        idle_timeout_ms: 1,
        max_connection_duration_ms: 1,
        max_pending_requests: 1,
        max_requests: 1,
        max_requests_per_connection: 1,
        max_retries: 1,
        outlier: Some(wire::OutlierDetection {
            consecutive_5xx: 1,
            consecutive_gateway_errors: 1,
            consecutive_local_failures: 1,
            split_local_failures: true,
            interval_ms: 1,
            base_ejection_ms: 1,
            max_ejection_percent: 1,
            min_health_percent: 1,
            success_rate: Some(wire::SuccessRate { percent: 1, window_ms: 1, least_requests: 1 }),
        }),
        balancer: wire::Balancer::RingHash.into(),
        hash_key: Some(wire::HashKey {
            key: Some(hash_key::Key::Cookie(wire::Cookie {
                name: "c".into(),
                path: "/".into(),
                ttl_seconds: 1,
                passive: true,
                attributes: vec!["a".into()],
            })),
        }),
        http_idle_timeout_ms: 1,
        retry_budget: Some(wire::RetryBudget { share: 1, least: 1, interval_ms: 1 }),
        warmup: Some(wire::Warmup { duration_ms: 1, least_percent: 1, aggression: 1 }),
        max_concurrent_streams: 1,
        table_size: 1,
        locality: Some(wire::LocalityBalancing {
            distribute: vec![wire::Distribution {
                from: "a".into(),
                to: vec![wire::LocalityShare { place: "b".into(), weight: 100 }],
            }],
            scopes: vec![wire::LocalityScope::Zone.into()],
            failover: vec![wire::RegionFailover { from: "a".into(), to: "b".into() }],
        }),
        keepalive: Some(wire::TcpKeepalive { time_ms: 1, interval_ms: 1, probes: 1 }),
        pings: Some(wire::Pings { interval_ms: 1, timeout_ms: 1 }),
    }
}

#[test]
fn no_part_of_a_traffic_policy_is_skipped() {
    let sample = wire::TrafficPolicy {
        namespace: "shop".into(),
        name: "cart".into(),
        services: service().into_iter().collect(),
        scope: wire::TrafficScope::AllClients.into(),
        settings: Some(settings()),
        ports: BTreeMap::from([(80, settings())]),
    };
    never_skipped(&sample, |bytes| {
        decode::traffic_policy(bytes, "DestinationRule/shop/cart", "1", &mut Strings::default()).is_ok()
    });
}

#[test]
fn no_part_of_a_request_authentication_is_skipped() {
    let rule = wire::JwtRule {
        issuer: "https://a".into(),
        audiences: vec!["a".into()],
        jwks: "{}".into(),
        from_headers: vec![wire::JwtHeader { name: "a".into(), prefix: "b".into() }],
        from_params: vec!["a".into()],
        from_cookies: vec!["a".into()],
        forward: true,
        payload_header: "a".into(),
        claim_headers: vec![wire::ClaimHeader { header: "a".into(), claim: vec!["b".into()] }],
        no_keys: "a".into(),
    };
    let sample =
        wire::RequestAuth { namespace: "shop".into(), name: "a".into(), rules: vec![rule], unreadable: "a".into() };
    never_skipped(&sample, |bytes| decode::request_auth(bytes, "RequestAuthentication/shop/a", "1").is_ok());
}

fn cidr() -> wire::Cidr {
    wire::Cidr { address: vec![10, 0, 0, 0].into(), length: 8 }
}

#[test]
fn no_part_of_a_network_policy_is_skipped() {
    let block = wire::IpBlock { cidr: Some(cidr()), except: vec![cidr()] };
    let peers = [Peer::Group(1), Peer::Block(block)].map(|peer| wire::NetworkPeer { peer: Some(peer) });
    let port = wire::NetworkPort { protocol: 1, first: 1, last: 2, destination_group: 1 };
    let rules = vec![wire::NetworkRule { peers: peers.into(), ports: vec![port] }];
    let sample = wire::NetworkPolicy {
        namespace: "shop".into(),
        name: "a".into(),
        ingress: true,
        egress: true,
        ingress_rules: rules.clone(),
        egress_rules: rules,
        unreadable: String::new(),
    };
    never_skipped(&sample, |bytes| decode::network_policy(bytes, "NetworkPolicy/shop/a", "1").is_ok());
}

#[test]
fn no_part_of_an_egress_policy_is_skipped() {
    let rule = wire::EgressRule {
        hosts: vec!["a.example".into()],
        cidrs: vec![cidr()],
        ports: vec![wire::EgressPort { number: 443, protocol: wire::EgressProtocol::Https.into(), target: 8443 }],
        http: Some(wire::EgressHttp { methods: vec!["GET".into()], paths: vec!["/a".into()] }),
        gateway: Some(wire::EgressGateway { service: service() }),
        originate: Some(wire::EgressOrigination {
            server_name: "a.example".into(),
            roots: Vec::new(),
            client_certificate: "bank".into(),
        }),
        proof: Some(wire::EgressProof { roots: vec![vec![48, 0].into()] }),
        endpoints: vec![wire::EgressEndpoint {
            at: Some(egress_endpoint::At::Address(vec![10, 0, 0, 1].into())),
            ports: BTreeMap::from([(443, 8443)]),
        }],
        stands_for: vec![cidr()],
    };
    let sample = wire::EgressPolicy {
        namespace: "shop".into(),
        name: "a".into(),
        action: wire::EgressAction::Record.into(),
        ceiling: true,
        rules: vec![rule],
        unreadable: String::new(),
    };
    never_skipped(&sample, |bytes| decode::egress_policy(bytes, "EgressPolicy/shop/a", "1").is_ok());
}

fn texts() -> Vec<sec::StringMatch> {
    vec![sec::StringMatch { match_type: Some(sec::string_match::MatchType::Exact("a".into())) }]
}

fn connection() -> sec::Match {
    let nets = || vec![sec::Address { address: vec![10, 0, 0, 0].into(), length: 8 }];
    let accounts = || vec![sec::ServiceAccountMatch { namespace: "a".into(), service_account: "b".into() }];
    sec::Match {
        namespaces: texts(),
        not_namespaces: texts(),
        principals: texts(),
        not_principals: texts(),
        source_ips: nets(),
        not_source_ips: nets(),
        destination_ips: nets(),
        not_destination_ips: nets(),
        destination_ports: vec![80],
        not_destination_ports: vec![80],
        service_accounts: accounts(),
        not_service_accounts: accounts(),
        extensions: Vec::new(),
    }
}

#[test]
fn no_part_of_an_authorization_policy_is_skipped() {
    let sample = sec::Authorization {
        name: "a".into(),
        namespace: "shop".into(),
        scope: sec::Scope::Namespace.into(),
        action: sec::Action::Deny.into(),
        rules: vec![sec::Rule { clauses: vec![sec::Clause { matches: vec![connection()] }] }],
        dry_run: true,
        extensions: Vec::new(),
    };
    let is_whole = |policy: Policy| {
        policy.rules.iter().all(|rule| {
            let mut matches = rule.clauses.iter().flat_map(|clause| &clause.matches);
            !rule.unknown && rule.clauses.iter().all(|clause| !clause.unknown) && matches.all(|it| !it.unknown)
        })
    };
    never_skipped(&sample, |bytes| decode::authorization(bytes, "shop/a", "1").is_ok_and(is_whole));

    let group = || Some(wire::TextGroup { any: texts(), none: texts() });
    let address = || sec::Address { address: vec![10, 0, 0, 0].into(), length: 8 };
    let path = |path| wire::PathMatch { path: Some(path) };
    let text = texts().remove(0);
    let sample = wire::HttpAuthorization {
        rules: vec![wire::HttpRule {
            clauses: vec![wire::HttpClause {
                matches: vec![wire::HttpMatch {
                    connection: Some(connection()),
                    hosts: group(),
                    methods: group(),
                    paths: Some(wire::PathGroup {
                        any: vec![path(wire::path_match::Path::Text(text))],
                        none: vec![path(wire::path_match::Path::Template("/a/{*}".into()))],
                    }),
                    request_principals: group(),
                    audiences: group(),
                    presenters: group(),
                    headers: vec![wire::HeaderGroup { name: "a".into(), values: group() }],
                    claims: vec![wire::ClaimGroup { claim: vec!["a".into()], values: group() }],
                    remote_ips: Some(wire::AddressGroup { any: vec![address()], none: vec![address()] }),
                    trust_domains: group(),
                }],
            }],
        }],
    };
    never_skipped(&sample, |bytes| http_rules::rules(bytes).is_some());
}

#[test]
fn what_only_describes_a_pod_or_a_service_is_ignored() {
    let info = |bytes: Vec<u8>| {
        let any = prost_types::Any { type_url: tulle_proto::names::TYPE_WORKLOAD_INFO.into(), value: bytes };
        wds::Extension { name: tulle_proto::names::EXTENSION_WORKLOAD.into(), config: Some(any) }
    };
    let pod = |later: &[u8]| wds::Workload {
        uid: "Kubernetes//Pod/shop/a".into(),
        name: "a".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        extensions: vec![info([WorkloadInfo::default().encode_to_vec().as_slice(), later].concat())],
        ..Default::default()
    };
    let cart = wds::Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop.svc.cluster.local".into(),
        addresses: vec![wds::NetworkAddress { address: vec![10, 96, 0, 1].into(), ..Default::default() }],
        ports: vec![wds::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Default::default()
    };
    let read = |bytes: &[u8]| decode::address(bytes, "1", &mut Strings::default()).map(|change| format!("{change:?}"));
    let whole = |of: Type| wds::Address { r#type: Some(of) }.encode_to_vec();
    let today = whole(Type::Workload(pod(&[])));
    assert_eq!(read(&whole(Type::Workload(pod(&LATER)))), read(&today));
    for bytes in [today, whole(Type::Service(cart))] {
        let dropped: Vec<_> = later(&bytes).into_iter().filter(|it| is_dropped::<wds::Address>(it)).collect();
        assert!(dropped.len() >= 2);
        for changed in dropped {
            assert_eq!(read(&changed), read(&bytes), "{changed:02x?}");
        }
    }
}

#[test]
fn what_an_earlier_control_does_not_say_closes_or_is_refused() {
    let id = |kind: &str| format!("{kind}/shop/a");
    let named = || ("shop".to_owned(), "a".to_owned());
    let (namespace, name) = named();
    // Neither direction is said to be isolated, and no rule allows: control of any version says which.
    let policy = wire::EgressPolicy { namespace, name, rules: vec![wire::EgressRule::default()], ..Default::default() };
    let read = decode::egress_policy(&policy.encode_to_vec(), &id("EgressPolicy"), "1").unwrap();
    assert!(
        read.rules.iter().all(|rule| rule.hosts.is_empty() && rule.cidrs.is_empty()),
        "a rule of nothing allows nothing"
    );

    let (namespace, name) = named();
    let rules = vec![wire::NetworkRule { peers: vec![wire::NetworkPeer { peer: None }], ports: Vec::new() }];
    let policy = wire::NetworkPolicy { namespace, name, ingress: true, ingress_rules: rules, ..Default::default() };
    assert!(decode::network_policy(&policy.encode_to_vec(), &id("NetworkPolicy"), "1").is_err(), "nobody is everybody");

    let (namespace, name) = named();
    let auth = wire::RequestAuth { namespace, name, rules: vec![wire::JwtRule::default()], ..Default::default() };
    let read = decode::request_auth(&auth.encode_to_vec(), &id("RequestAuthentication"), "1").unwrap();
    assert!(read.rules[0].keys.keys.is_empty(), "without keys no token is good");

    let (namespace, name) = named();
    let plain = sec::Authorization { namespace, name, scope: sec::Scope::Namespace.into(), ..Default::default() };
    let read = decode::authorization(&plain.encode_to_vec(), "shop/a", "1").unwrap();
    assert!(read.action == Action::Allow && read.rules.is_empty(), "an ALLOW policy without rules allows nothing");

    let (namespace, name) = named();
    let rules = vec![wire::RouteRule { filters: vec![wire::RouteFilter { filter: None }], ..Default::default() }];
    let route = wire::Route { namespace, name, rules, ..Default::default() };
    let read = decode::route(&route.encode_to_vec(), &id("HTTPRoute"), "1", "n", &mut Strings::default()).unwrap();
    assert!(read.rules[0].broken.is_some(), "a filter of no kind is not left out");
}
