//! The fuzz targets of the node's parsers, for a bounded time on stable: good input, damaged in the usual ways.
//! `PROPTEST_CASES` sets how often; `fuzz/` searches without end.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(unreachable_pub, reason = "the included files are a library in fuzz/")]

#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/smoke.rs"]
mod smoke;
#[path = "../../fuzz/src/node.rs"]
mod node;

use prost::Message as _;
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject as _;
use tulle_certs::ca::Authority;
use tulle_certs::ca::files::CRL;
use tulle_certs::ca::revoke::{Signed, revoke};
use tulle_certs::{SpiffeId, request};
use tulle_proto::mesh;
use tulle_proto::mesh::network_peer::Peer;
use tulle_proto::security::string_match::MatchType;
use tulle_proto::security::{Action, Address as Cidr, Authorization, Clause, Match, Rule, Scope, StringMatch};
use tulle_proto::workload::address::Type;
use tulle_proto::workload::{Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload};

const NOW: i64 = 1_800_000_000;

/// A ClientHello for `a.b`, in one record.
fn hello() -> Vec<u8> {
    let name = [&[0, 0, 0, 8, 0, 6, 0, 0, 3][..], b"a.b"].concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &[0, 12], &name].concat();
    let length = u8::try_from(body.len()).unwrap();
    [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat()
}

/// Good input for a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    match target {
        "connect" => texts(&["10.0.0.1:80", "[fd00::1]:8080", "cart.shop.svc.cluster.local:80"]),
        "baggage" => texts(&[
            "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,service.version=v1",
        ]),
        "forwarded" => texts(&["for=\"10.0.0.1:4000\";host=cart.shop.svc.cluster.local", "for=\"[fd00::1]:4000\""]),
        "traceparent" => texts(&["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]),
        "denial" => texts(&["code=POLICY_DENIED; policy=shop/no-office; rule=0; text=denied by policy shop/no-office"]),
        "pods" => texts(&[
            r#"[{"uid":"u-1","name":"cart-0","namespace":"shop","serviceAccount":"cart","netns":"/run/netns/cart-0","ips":["10.0.0.1","fd00::1"],"enrolled":true,"probePorts":[8080]}]"#,
        ]),
        "cni-request" => texts(&[
            r#"{"version":1,"command":"ADD","containerId":"c1","netns":"/run/netns/c1","ifName":"eth0","podNamespace":"shop","podName":"cart-0","podUid":"u-1","ips":["10.0.0.1","fd00::1"]}"#,
            r#"{"version":1,"command":"GC","valid":[{"containerId":"c1","ifName":"eth0"}]}"#,
        ]),
        "cni-answer" => {
            texts(&[r#"{"ok":true,"enrolled":true}"#, r#"{"ok":false,"code":11,"message":"wait","details":"a"}"#])
        }
        "cgroup" => texts(&[
            "0::/kubepods/besteffort/pod0f47a1f6-9d1c-4a1f-8b54-2f0f6f2a7c11/ab",
            "3:cpu:/\n2:memory:/kubepods.slice/kubepods-pod0f47a1f6_9d1c_4a1f_8b54_2f0f6f2a7c11.slice:cri-containerd:ab",
        ]),
        "cni-known" => texts(&[
            r#"{"version":1,"rootNamespace":"tulle-system","egressDeniedByDefault":false,"namespaces":{"shop":{"tulle.dev/mesh":"enabled","tulle.dev/egress":"deny"},"kube-system":{}}}"#,
        ]),
        "cni-conf" => texts(&[
            r#"{"cniVersion":"1.0.0","name":"net","type":"tulle-cni","socket":"/run/s","prevResult":{"interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/run/netns/c1"}],"ips":[{"address":"10.1.2.3/24","interface":1}],"mtu":1.5e3}}"#,
            r#"{"cniVersion":"1.1.0","name":"net","type":"tulle-cni","cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}"#,
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0",
        ]),
        "cni-list" => texts(&[
            r#"{"cniVersion":"1.0.0","cniVersions":["1.0.0","1.2.0"],"name":"net","plugins":[{"type":"bridge","mtu":1.0}],"disableCheck":true}"#,
            r#"{"cniVersion":"0.3.1","name":"net","type":"bridge","ipam":{"type":"host-local"}}"#,
        ]),
        "cni-api" => texts(&[
            "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: 41\r\n\r\n{\"metadata\":{\"labels\":{\"a\":\"b\"}},\"x\":10}",
            "HTTP/1.1 404 Not Found\r\n\r\n",
        ]),
        "kubeconfig" => texts(&[
            "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h:1', certificate-authority-data: QQ==}}]\nusers: [{name: u, user: {token: t}}]\n",
        ]),
        "route" => vec![route().encode_to_vec()],
        "traffic-policy" => vec![traffic_policy().encode_to_vec()],
        "request-auth" => vec![request_auth().encode_to_vec()],
        "egress-policy" => vec![egress_policy().encode_to_vec()],
        "path" => texts(&["/a/%2e%2e/b\\c//%2F", "/api/v2/é;x=1"]),
        "request" => texts(&[
            "GET /api/v2?v=2&w=%41+b\ncookie:a=b;v=2\ncookie:c=d\nhost:cart",
            "POST /x\nx-canary:yes",
            "OPTIONS /api\norigin:https://a.shop.example\naccess-control-request-method:PUT\naccess-control-request-headers:x-a",
            "GET /api\norigin:http://[::1]:8080",
        ]),
        "first-words" => texts(&["GET /a HTTP/1.1\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\r\nPOST * HTTP/1.1"]),
        "messages" => texts(&[
            "GET / HTTP/1.1\r\nhost: a\r\n\r\nPOST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx: y\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
        ]),
        "frames" => vec![
            [
                &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
                &[0, 0, 0, 4, 0, 0, 0, 0, 0],
                &[0, 0, 8, 6, 0, 0, 0, 0, 0],
                &[1; 8],
            ]
            .concat(),
        ],
        "offers" => vec![vec![0, 0, 12, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100, 0, 8, 0, 0, 0, 1, 0, 0, 0]],
        "headers" => texts(&[
            "/a?b\nhost:cart\nconnection:close, x-a\nx-a:1\nte:trailers\nx-envoy-retry-on:5xx",
            "http://u@cart/a\nhost:other\nconnection:upgrade\nupgrade:websocket\nforwarded:for=1.2.3.4",
        ]),
        "token" => texts(&[
            "eyJhbGciOiJFUzI1NiIsImtpZCI6ImEifQ.eyJpc3MiOiJqb2UiLCJzdWIiOiJhbm4iLCJleHAiOjE5MDAwMDAwMDB9.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        ]),
        "local" => texts(&[
            "workloads: [{name: cart, namespace: shop, workloadIps: [10.0.0.2], protocol: HBONE, services: {shop/cart: {80: 8080}}}]",
            "services: [{name: cart, namespace: shop, hostname: cart, vips: [/10.96.0.1], ports: {80: 8080}, waypoint: {destination: /10.0.9.9, hboneMtlsPort: 15008}}]",
            "policies: [{name: p, namespace: shop, scope: Global, action: Deny, rules: [[[{principals: [{Prefix: a}, {Presence: []}]}]]]}]",
        ]),
        "zds" => vec![
            b"\x0a\x18\x0a\x03u-1\x12\x11\x0a\x03web\x12\x04shop\x1a\x04cart".to_vec(),
            b"\x12\x05\x12\x03u-1".to_vec(),
            b"\x1a\x00".to_vec(),
            b"\x2a\x05\x0a\x03u-1".to_vec(),
        ],
        "duration" => texts(&["1h30m", "250ms"]),
        "spiffe" => texts(&["spiffe://cluster.local/ns/shop/sa/cart"]),
        "address" => vec![workload().encode_to_vec(), service().encode_to_vec()],
        "authorization" => vec![policy().encode_to_vec()],
        "dns" => messages(),
        "hello" => vec![hello()],
        "network-policy" => vec![network_policy().encode_to_vec()],
        "trust-bundle" => vec![trust_bundle().encode_to_vec()],
        "csr" | "roots" | "issued" | "certificate" => certificates(target),
        "crl" => revocation_lists(),
        other => panic!("{other} has no seed; add one"),
    }
}

fn cart() -> Option<mesh::ServiceRef> {
    Some(mesh::ServiceRef { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() })
}

/// With a match and a filter of each kind.
fn route() -> mesh::Route {
    use mesh::route_filter::Filter;
    let filter = |filter| mesh::RouteFilter { filter: Some(filter) };
    let change = || Some(mesh::PathChange { change: Some(mesh::path_change::Change::Prefix("/v2".into())) });
    let header = |name: &str| mesh::Header { name: name.into(), value: "1".into() };
    let value = |value| mesh::RouteValue { name: "x-canary".into(), value: Some(value) };
    let headers = mesh::HeaderChanges { set: vec![header("a")], add: vec![header("b")], remove: vec!["c".into()] };
    let rule = mesh::RouteRule {
        name: "pinned".into(),
        matches: vec![
            mesh::RouteMatch {
                path: Some(mesh::RoutePath { path: Some(mesh::route_path::Path::Prefix("/api".into())) }),
                headers: vec![value(mesh::route_value::Value::Regex("y.s".into()))],
                query: vec![value(mesh::route_value::Value::Exact("2".into()))],
                ..Default::default()
            },
            mesh::RouteMatch::default(),
        ],
        filters: vec![
            filter(Filter::RequestHeaders(headers.clone())),
            filter(Filter::ResponseHeaders(headers)),
            filter(Filter::Rewrite(mesh::Rewrite { hostname: "v2".into(), path: change() })),
            filter(Filter::Mirror(mesh::Mirror {
                service: cart(),
                port: 80,
                numerator: 1,
                denominator: 2,
                ..Default::default()
            })),
            filter(Filter::Fault(mesh::Fault {
                delay_ms: 1,
                delay_millionths: 1,
                abort_status: 503,
                ..Default::default()
            })),
            filter(Filter::RateLimit(mesh::RateLimit { name: "shop/ten".into(), requests: 10, ..Default::default() })),
            filter(Filter::Cors(mesh::Cors {
                origins: vec!["https://*.example".into()],
                credentials: true,
                methods: vec!["*".into()],
                headers: vec!["x-a".into()],
                max_age_seconds: 5,
                ..Default::default()
            })),
        ],
        backends: vec![mesh::RouteBackend { service: cart(), port: 80, weight: 1, ..Default::default() }],
        retry: Some(mesh::RouteRetry { attempts: 2, codes: vec![503], ..Default::default() }),
        session: Some(mesh::RouteSession { name: "s".into(), absolute_ms: 1000, ..Default::default() }),
        ..Default::default()
    };
    let away = mesh::RouteRule {
        filters: vec![filter(Filter::Redirect(mesh::Redirect {
            scheme: "https".into(),
            path: change(),
            ..Default::default()
        }))],
        ..Default::default()
    };
    mesh::Route {
        namespace: "shop".into(),
        name: "cart".into(),
        parents: vec![mesh::RouteParent { service: cart(), ports: vec![80] }],
        rules: vec![rule, away],
        ..Default::default()
    }
}

fn traffic_policy() -> mesh::TrafficPolicy {
    let settings = mesh::TrafficSettings {
        max_connections: 10,
        balancer: mesh::Balancer::RingHash.into(),
        hash_key: Some(mesh::HashKey { key: Some(mesh::hash_key::Key::Header("x-user".into())) }),
        outlier: Some(mesh::OutlierDetection { consecutive_5xx: 5, ..Default::default() }),
        retry_budget: Some(mesh::RetryBudget { share: 2_000, least: 3, interval_ms: 1_000 }),
        warmup: Some(mesh::Warmup { duration_ms: 1_000, least_percent: 10, aggression: 1_000 }),
        table_size: 1_009,
        locality: Some(mesh::LocalityBalancing {
            distribute: vec![mesh::Distribution {
                from: "r1/z1/*".into(),
                to: vec![mesh::LocalityShare { place: "r1".into(), weight: 100 }],
            }],
            scopes: vec![mesh::LocalityScope::Zone.into()],
            failover: vec![mesh::RegionFailover { from: "r1".into(), to: "r2".into() }],
        }),
        ..Default::default()
    };
    mesh::TrafficPolicy {
        namespace: "shop".into(),
        name: "cart".into(),
        services: cart().into_iter().collect(),
        ports: [(80, settings.clone())].into(),
        settings: Some(settings),
        ..Default::default()
    }
}

fn egress_policy() -> mesh::EgressPolicy {
    let rule = mesh::EgressRule {
        hosts: vec!["api.example".into(), "*.example.com".into(), "*".into()],
        cidrs: vec![mesh::Cidr { address: vec![192, 0, 2, 0].into(), length: 24 }],
        ports: vec![mesh::EgressPort { number: 443, protocol: 2, target: 8443 }],
        http: Some(mesh::EgressHttp { methods: vec!["GET".into()], paths: vec!["/a/*".into(), "*".into()] }),
        gateway: Some(mesh::EgressGateway {
            service: Some(mesh::ServiceRef {
                namespace: "egress".into(),
                hostname: "out.egress.svc.cluster.local".into(),
            }),
        }),
        originate: Some(mesh::EgressOrigination {
            server_name: "a.example".into(),
            roots: vec![vec![48, 0].into()],
            client_certificate: "bank".into(),
        }),
        endpoints: vec![mesh::EgressEndpoint {
            at: Some(mesh::egress_endpoint::At::Host("b.example".into())),
            ports: [(443, 8443)].into(),
        }],
        stands_for: vec![mesh::Cidr { address: vec![240, 0, 0, 1].into(), length: 32 }],
        proof: Some(mesh::EgressProof { roots: vec![vec![48, 0].into()] }),
    };
    mesh::EgressPolicy { namespace: "shop".into(), name: "out".into(), rules: vec![rule], ..Default::default() }
}

fn request_auth() -> mesh::RequestAuth {
    let rule = mesh::JwtRule {
        issuer: "https://issuer".into(),
        jwks: r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#.into(),
        from_headers: vec![mesh::JwtHeader { name: "x-token".into(), prefix: "T ".into() }],
        claim_headers: vec![mesh::ClaimHeader { header: "x-user".into(), claim: vec!["sub".into()] }],
        ..Default::default()
    };
    mesh::RequestAuth { namespace: "shop".into(), name: "users".into(), rules: vec![rule], ..Default::default() }
}

/// A question with EDNS, and an answer with an alias, an address and a compressed name.
fn messages() -> Vec<Vec<u8>> {
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 4];
    question.extend(b"cart\x07example\0\0\x01\0\x01");
    let name_end = question.len();
    question.extend([0, 0, 41, 4, 208, 0, 0, 128, 0, 0, 6, 0, 10, 0, 2, 1, 2]);
    let mut answer = question[..name_end].to_vec();
    (answer[2], answer[7], answer[11]) = (0x81, 2, 0);
    answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'a', 0xc0, 17]);
    answer.extend([1, b'a', 0xc0, 17, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0, 0, 1]);
    vec![question, answer]
}

fn workload() -> Address {
    let workload = Workload {
        uid: "Kubernetes//Pod/shop/cart-0".into(),
        name: "cart-0".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1].into(), vec![0xfd; 16].into()],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        service_account: "cart".into(),
        node: "node-1".into(),
        services: [("shop/cart.shop.svc.cluster.local".to_owned(), ports())].into(),
        authorization_policies: vec!["shop/no-office".into()],
        ..Default::default()
    };
    Address { r#type: Some(Type::Workload(workload)) }
}

fn ports() -> PortList {
    PortList { ports: vec![Port { service_port: 80, target_port: 8080, ..Default::default() }] }
}

fn service() -> Address {
    let service = Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop.svc.cluster.local".into(),
        addresses: vec![NetworkAddress { address: vec![10, 96, 0, 1].into(), ..Default::default() }],
        ports: ports().ports,
        ..Default::default()
    };
    Address { r#type: Some(Type::Service(service)) }
}

fn policy() -> Authorization {
    let only = Match {
        namespaces: vec![StringMatch { match_type: Some(MatchType::Exact("office".into())) }],
        source_ips: vec![Cidr { address: vec![10, 0, 0, 0].into(), length: 8 }],
        destination_ports: vec![8080],
        ..Default::default()
    };
    Authorization {
        name: "policy".into(),
        namespace: "shop".into(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![only] }] }],
        ..Default::default()
    }
}

fn trust_bundle() -> mesh::TrustBundle {
    let authority = Authority::open(tempfile::tempdir().unwrap().path(), NOW).unwrap();
    let root = authority.roots().certificates()[0].to_vec();
    mesh::TrustBundle { trust_domain: "b.example".to_owned(), roots: vec![root.into()] }
}

fn network_policy() -> mesh::NetworkPolicy {
    let cidr = |address: [u8; 4], length| mesh::Cidr { address: address.to_vec().into(), length };
    let block = mesh::IpBlock { cidr: Some(cidr([10, 0, 0, 0], 8)), except: vec![cidr([10, 1, 0, 0], 16)] };
    let peers = [Peer::Group(7), Peer::Block(block)].map(|peer| mesh::NetworkPeer { peer: Some(peer) });
    let ports = vec![mesh::NetworkPort { protocol: 1, first: 53, last: 54, destination_group: 9 }];
    mesh::NetworkPolicy {
        namespace: "shop".into(),
        name: "policy".into(),
        ingress: true,
        egress: true,
        ingress_rules: vec![mesh::NetworkRule { peers: peers.into(), ports }],
        ..Default::default()
    }
}

/// Real ones, from a real authority.
fn certificates(target: &str) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), NOW).unwrap();
    let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
    let request = request(&id).unwrap();
    let parsed = tulle_certs::parse_csr(&request.csr_pem).unwrap();
    let chain = authority.sign(&parsed, &id, 3600, NOW).unwrap();
    let roots = chain.last().unwrap().clone();
    vec![match target {
        "csr" => request.csr_pem.into_bytes(),
        "roots" => roots.into_bytes(),
        "issued" => chain.join("\n\n").into_bytes(),
        _ => tulle_certs::Roots::from_pem(roots.as_bytes()).unwrap().certificates()[0].to_vec(),
    }]
}

/// PEM and DER.
fn revocation_lists() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    revoke(dir.path(), Signed::Leaf, &[vec![1, 2, 3], vec![4]], NOW).unwrap();
    let pem = std::fs::read(dir.path().join(CRL)).unwrap();
    let der = CertificateRevocationListDer::from_pem_slice(&pem).unwrap().to_vec();
    vec![pem, der]
}

#[test]
fn no_target_breaks_on_damaged_input() {
    smoke::damaged(node::TARGETS, seeds);
}

#[test]
fn no_target_breaks_on_noise() {
    smoke::noise(node::TARGETS);
}
