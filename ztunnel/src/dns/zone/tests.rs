//! Names and what they must lead to, as tables: a small mesh, a question, the answer that the cluster's DNS would give.
//!
//! What the mesh does not know whole must not be answered, so the tables hold as many names that are left to others.

use super::{Client, Data, Found, Kind, lookup, reversed, undashed};
use crate::state::fixtures::{behind, key, port, service, snapshot, with_ports, workload};
use crate::state::{
    Change, DnsName, HealthPolicy, LoadBalancing, NamedPort, Port, ServiceInfo, ServiceSpec, Snapshot, Transport,
    Visibility, Workload,
};
use std::sync::Arc;

const DOMAIN: &str = "cluster.local";
const SHOP: Client<'_> = Client { namespace: "shop", network: "" };

fn named(number: u16, name: &str, transport: Transport) -> NamedPort {
    NamedPort { number, name: name.into(), transport }
}

fn with_info(spec: ServiceSpec, info: ServiceInfo) -> Change {
    Change::Service(Arc::new(ServiceSpec { info: Some(Box::new(info)), ..spec }))
}

fn headless(name: &str) -> ServiceSpec {
    ServiceSpec { vips: Vec::new(), ..service("shop", name, "10.96.0.99") }
}

fn pod(name: &str, addresses: [&str; 2], of: &str, own_name: bool) -> Workload {
    let mut pod = behind(workload("shop", name, addresses[0]), "shop", of);
    pod.addresses.push(addresses[1].parse().unwrap());
    pod.dns_name = own_name.then(|| Box::new(DnsName { hostname: name.into(), subdomain: of.into() }));
    pod
}

fn external(namespace: &str, host: &str, vips: &[&str]) -> ServiceSpec {
    ServiceSpec {
        name: host.into(),
        hostname: host.into(),
        vips: vips.iter().map(|vip| ("".into(), vip.parse::<std::net::IpAddr>().unwrap().into())).collect(),
        canonical: false,
        ..service(namespace, "x", "10.96.0.1")
    }
}

fn mesh() -> Arc<Snapshot> {
    let mut cart = service("shop", "cart", "10.96.0.10");
    cart.vips.push(("".into(), "fd00::a".parse::<std::net::IpAddr>().unwrap().into()));
    cart.vips.push(("".into(), "203.0.113.1".parse::<std::net::IpAddr>().unwrap().into()));
    let ports =
        vec![named(80, "http", Transport::Tcp), named(53, "dns", Transport::Udp), named(81, "", Transport::Tcp)];
    let cluster_addresses = vec!["10.96.0.10".parse().unwrap(), "fd00::a".parse().unwrap()];
    let info = ServiceInfo { ports, cluster_addresses, ..ServiceInfo::default() };
    let tcp = ServiceInfo { ports: vec![named(80, "http", Transport::Tcp)], headless: true, ..ServiceInfo::default() };
    let alias = ServiceInfo { external_name: "db.example.com".into(), ..ServiceInfo::default() };
    let hidden = ServiceSpec { visibility: Visibility::Namespace, ..service("bank", "vault", "10.96.0.66") };
    let eager = LoadBalancing { health_policy: HealthPolicy::AllowAll, ..LoadBalancing::default() };
    let unready = Workload { healthy: false, ..pod("unready", ["10.1.0.9", "fd01::9"], "db", true) };
    let early = Workload { healthy: false, ..pod("early", ["10.1.0.8", "fd01::8"], "eager", false) };
    snapshot([
        with_info(cart, info),
        with_info(headless("db"), tcp.clone()),
        with_info(ServiceSpec { lb: eager, ..headless("eager") }, tcp),
        with_info(headless("empty"), ServiceInfo::default()),
        with_info(service("shop", "single", "10.96.0.11"), ServiceInfo::default()),
        Change::Service(Arc::new(service("shop", "istiod", "10.96.0.12"))),
        with_info(ServiceSpec { hostname: "_external.ext.shop.svc.cluster.local".into(), ..headless("ext") }, alias),
        Change::Service(Arc::new(hidden)),
        Change::Service(Arc::new(external("shop", "api.example.com", &["240.240.0.1"]))),
        Change::Service(Arc::new(external("shop", "*.example.com", &["240.240.0.2"]))),
        Change::Service(Arc::new(external("shop", "*.deep.example.com", &["240.240.0.3"]))),
        Change::Service(Arc::new(external("shop", "novip.example.org", &[]))),
        Change::Workload(Arc::new(pod("db-0", ["10.1.0.5", "fd01::5"], "db", true))),
        Change::Workload(Arc::new(pod("db-1", ["10.1.0.6", "fd01::6"], "db", false))),
        Change::Workload(Arc::new(unready)),
        Change::Workload(Arc::new(early)),
        Change::Workload(Arc::new(with_ports(
            workload("shop", "cart-0", "10.1.0.7"),
            key("shop", "cart"),
            vec![port(80, 8080)],
        ))),
    ])
}

/// Answers as text, in order; `None`: not ours.
fn ask(mesh: &Snapshot, client: Client<'_>, name: &str, kind: Kind) -> Option<Vec<String>> {
    match lookup(mesh, client, DOMAIN, name, kind) {
        Found::Unknown => None,
        Found::Alias(target) => Some(vec![format!("-> {target}")]),
        Found::Records { answers, .. } => Some(
            answers
                .into_iter()
                .map(|data| match data {
                    Data::Address(ip) => ip.to_string(),
                    Data::Server { weight, port, target } => format!("{weight} {port} {target}"),
                    Data::Name(name) => name,
                })
                .collect(),
        ),
    }
}

#[test]
fn names_mean_what_the_clusters_dns_says_or_are_left_to_it() {
    let mesh = mesh();
    let svc = |name: &str| format!("{name}.shop.svc.cluster.local");
    let cases: Vec<(String, Kind, Option<&[&str]>)> = vec![
        (svc("cart"), Kind::A, Some(&["10.96.0.10"])),
        (svc("cart"), Kind::Aaaa, Some(&["fd00::a"])),
        (svc("cart"), Kind::Other, None),
        (svc("cart"), Kind::Cname, None),
        (svc("single"), Kind::Aaaa, Some(&[])),
        (svc("istiod"), Kind::A, Some(&["10.96.0.12"])),
        (svc("istiod"), Kind::Srv, None),
        (svc("db"), Kind::A, Some(&["10.1.0.5", "10.1.0.6"])),
        (svc("db"), Kind::Aaaa, Some(&["fd01::5", "fd01::6"])),
        (svc("eager"), Kind::A, Some(&["10.1.0.8"])),
        (svc("empty"), Kind::A, None),
        (svc("nobody"), Kind::A, None),
        (svc("db-0.db"), Kind::A, Some(&["10.1.0.5"])),
        (svc("db-0.db"), Kind::Aaaa, Some(&["fd01::5"])),
        (svc("10-1-0-6.db"), Kind::A, Some(&["10.1.0.6"])),
        (svc("10-1-0-6.db"), Kind::Aaaa, Some(&[])),
        (svc("fd01--6.db"), Kind::Aaaa, Some(&["fd01::6"])),
        (svc("10-1-0-5.db"), Kind::A, None),
        (svc("db-1.db"), Kind::A, None),
        (svc("unready.db"), Kind::A, None),
        (svc("10-1-0-7.cart"), Kind::A, Some(&["10.1.0.7"])),
        (svc("_http._tcp.cart"), Kind::Srv, Some(&["50 80 cart.shop.svc.cluster.local"])),
        (svc("_dns._udp.cart"), Kind::Srv, Some(&["50 53 cart.shop.svc.cluster.local"])),
        (svc("_dns._tcp.cart"), Kind::Srv, None),
        (svc("_http._tcp.cart"), Kind::A, None),
        (
            svc("_http._tcp.db"),
            Kind::Srv,
            Some(&[
                "25 8080 10-1-0-6.db.shop.svc.cluster.local",
                "25 8080 db-0.db.shop.svc.cluster.local",
                "25 8080 fd01--6.db.shop.svc.cluster.local",
            ]),
        ),
        (svc("ext"), Kind::A, Some(&["-> db.example.com"])),
        (svc("ext"), Kind::Cname, Some(&["-> db.example.com"])),
        (svc("ext"), Kind::Srv, None),
        ("10-1-0-5.shop.pod.cluster.local".into(), Kind::A, Some(&["10.1.0.5"])),
        ("10-1-0-5.shop.pod.cluster.local".into(), Kind::Aaaa, Some(&[])),
        ("fd01--5.shop.pod.cluster.local".into(), Kind::Aaaa, Some(&["fd01::5"])),
        ("10-1-0-5.bank.pod.cluster.local".into(), Kind::A, None),
        ("10-9-9-9.shop.pod.cluster.local".into(), Kind::A, None),
        ("api.example.com".into(), Kind::A, Some(&["240.240.0.1"])),
        ("api.example.com".into(), Kind::Aaaa, Some(&[])),
        ("www.example.com".into(), Kind::A, Some(&["240.240.0.2"])),
        ("a.b.example.com".into(), Kind::A, Some(&["240.240.0.2"])),
        ("x.deep.example.com".into(), Kind::A, Some(&["240.240.0.3"])),
        ("example.com".into(), Kind::A, None),
        ("novip.example.org".into(), Kind::A, None),
        ("cart.shop".into(), Kind::A, None),
        ("cart".into(), Kind::A, None),
        (DOMAIN.into(), Kind::A, None),
        ("vault.bank.svc.cluster.local".into(), Kind::A, None),
        ("10.0.96.10.in-addr.arpa".into(), Kind::Ptr, Some(&["cart.shop.svc.cluster.local"])),
        ("1.113.0.203.in-addr.arpa".into(), Kind::Ptr, None),
        ("5.0.1.10.in-addr.arpa".into(), Kind::Ptr, Some(&["db-0.db.shop.svc.cluster.local"])),
        ("6.0.1.10.in-addr.arpa".into(), Kind::Ptr, None),
    ];
    for (name, kind, expected) in cases {
        let expected = expected.map(|list| list.iter().map(|text| (*text).to_owned()).collect());
        assert_eq!(ask(&mesh, SHOP, &name, kind), expected, "{name} {kind:?}");
    }
}

#[test]
fn who_asks_decides_what_is_visible() {
    let mesh = mesh();
    let bank = Client { namespace: "bank", network: "" };
    let vault = "vault.bank.svc.cluster.local";
    assert_eq!(ask(&mesh, bank, vault, Kind::A), Some(vec!["10.96.0.66".to_owned()]));
    assert_eq!(ask(&mesh, SHOP, vault, Kind::A), None, "hidden from others");
    let far = Client { namespace: "shop", network: "other" };
    assert_eq!(ask(&mesh, far, "cart.shop.svc.cluster.local", Kind::A), None, "addresses of another network");
}

#[test]
fn a_headless_service_with_unknown_ports_leaves_srv_to_the_clusters_dns() {
    let ports = vec![named(80, "http", Transport::Tcp), named(53, "dns", Transport::Udp)];
    let mesh = snapshot([
        with_info(headless("db"), ServiceInfo { ports, headless: true, ..ServiceInfo::default() }),
        Change::Workload(Arc::new(pod("db-0", ["10.1.0.5", "fd01::5"], "db", true))),
    ]);
    let name = |port: &str| format!("{port}.db.shop.svc.cluster.local");
    assert_eq!(ask(&mesh, SHOP, &name("_dns._udp"), Kind::Srv), None);
    assert_eq!(
        ask(&mesh, SHOP, &name("_http._tcp"), Kind::Srv),
        Some(vec!["50 8080 db-0.db.shop.svc.cluster.local".to_owned()])
    );
}

#[test]
fn an_endpoints_own_port_comes_before_the_services() {
    let spec = ServiceSpec { ports: vec![port(80, 0)], ..headless("db") };
    let ports = vec![named(80, "http", Transport::Tcp)];
    let own: Vec<Port> = vec![port(80, 9999)];
    let mesh = snapshot([
        with_info(spec, ServiceInfo { ports, ..ServiceInfo::default() }),
        Change::Workload(Arc::new(with_ports(workload("shop", "db-0", "10.1.0.5"), key("shop", "db"), own))),
    ]);
    let name = "_http._tcp.db.shop.svc.cluster.local";
    let expected = "100 9999 10-1-0-5.db.shop.svc.cluster.local";
    assert_eq!(ask(&mesh, SHOP, name, Kind::Srv), Some(vec![expected.to_owned()]));
}

#[test]
fn addresses_are_read_from_names() {
    for (label, ip) in [
        ("10-0-1-5", Some("10.0.1.5")),
        ("fd00--5", Some("fd00::5")),
        ("fd00-10-20-1--2", Some("fd00:10:20:1::2")),
        ("10-0-1", None),
        ("10-0-1-256", None),
        ("cart", None),
    ] {
        assert_eq!(undashed(label), ip.map(|ip| ip.parse().unwrap()), "{label}");
    }
    let v6 = format!("{}f.0.0.0.e.f.a.c.8.b.d.0.1.0.0.2.ip6.arpa", "5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.")
        .replacen("f.", "0.", 1);
    assert_eq!(reversed(&v6).map(|ip| ip.is_ipv6()), Some(true));
    for name in ["1.2.3.in-addr.arpa", "256.2.3.4.in-addr.arpa", "5.ip6.arpa", "55.ip6.arpa", "in-addr.arpa", "cart"] {
        assert_eq!(reversed(name), None, "{name}");
    }
}
