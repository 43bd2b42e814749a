//! Among Istio's parts, each of our own making and strict about what it hears: an istiod (discovery and certificates), a
//! waypoint, a gateway to another network. What runs for the proxy is the real thing: namespaces, rules, TLS, and in
//! `control` the program itself.
//!
//! What whoever takes the place of Istio's ztunnel has to do, and what shows it:
//! * the CNI agent's protocol and its pods: `e2e/src/zds/tests.rs`, `e2e/tests/zds.rs`; our own parser: `capture::zds`;
//! * marks, original destinations, the client's address at the last hop, the ports: `tests/flow.rs`, `e2e/tests/capture.rs`;
//! * who the node says it is, subscriptions, acknowledgements, reconnecting, refusals by name, tokens and headers:
//!   `control`, `tests/wire.rs`; what is asked for on demand: `xds::tests`, `e2e/tests/on_demand.rs`;
//! * certificates in the name of accounts, the last element as the roots, renewal at half life: `control`,
//!   `identity::tests`, `certs::issued`;
//! * TLS 1.3, `h2`, no SNI, suites and groups, pings, larger frames and windows than ours: `waypoint`, `hop`; goodbyes,
//!   limits of streams: `tests/tunnel.rs`;
//! * authorities by address and by name, and which others are refused: `inbound::target`, `tests/malformed.rs`;
//! * `baggage`, `forwarded`, `traceparent`, the answer's `baggage`, `x-forwarded-network`: `waypoint`, `network`,
//!   `tests/wire.rs`;
//! * waypoints, east-west gateways, PROXY headers: `waypoint`, `network`, `header`;
//! * names of metrics, labels and fields of the log, keys of `/config_dump`: `tests/wire.rs`, `app::dump`.
//!
//! With a ztunnel of Istio itself: `lab interop`.

#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

mod control;
mod header;
mod hop;
mod istiod;
mod network;
#[path = "../node/mod.rs"]
mod node;
mod waypoint;

use std::net::{IpAddr, TcpListener};
use std::sync::mpsc::channel;

use prost::Message as _;
use tulle_proto::security::{Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch};
use tulle_proto::workload::address::Type;
use tulle_proto::workload::gateway_address::Destination;
use tulle_proto::workload::{
    Address, GatewayAddress, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload,
};
use ztunnel::state::Change;
use ztunnel::xds::decode;

use node::{Lab, Node, serve, talk};

/// The Service that clients call, on port 80.
pub const CART: &str = "cart.shop.svc.cluster.local";
/// Its address.
pub const VIP: &str = "10.96.0.1";
/// What a client of it dials.
pub const CALL: &str = "10.96.0.1:80";

/// The identity of an account of namespace `shop`.
pub fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// The address of a pod of the lab.
pub fn ip(pod: &str) -> String {
    let (_, n) = node::PODS.iter().find(|(name, _)| *name == pod).unwrap();
    format!("10.99.0.{n}")
}

fn octets(ip: &str) -> prost::bytes::Bytes {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// A pod of the lab as istiod describes it, behind `cart` on port 8080.
pub fn pod(name: &str) -> Workload {
    let port = Port { service_port: 80, target_port: 8080, app_protocol: 0 };
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: name.to_owned(),
        addresses: vec![octets(&ip(name))],
        tunnel_protocol: i32::from(TunnelProtocol::Hbone),
        services: if name == "b" {
            [(format!("shop/{CART}"), PortList { ports: vec![port] })].into()
        } else {
            [].into()
        },
        ..Workload::default()
    }
}

/// The Service.
pub fn cart() -> Service {
    Service {
        name: "cart".to_owned(),
        namespace: "shop".to_owned(),
        hostname: CART.to_owned(),
        addresses: vec![NetworkAddress { address: octets(VIP), ..NetworkAddress::default() }],
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        canonical: true,
        ..Service::default()
    }
}

/// A waypoint or gateway at an address of `network`.
pub fn gateway(network: &str, ip: &str, port: u32) -> GatewayAddress {
    let address = NetworkAddress { network: network.to_owned(), address: octets(ip), ..NetworkAddress::default() };
    GatewayAddress { destination: Some(Destination::Address(address)), hbone_mtls_port: port }
}

/// What control would say of a mesh.
pub fn changes(all: Vec<Type>) -> Vec<Change> {
    let strings = &mut decode::Strings::default();
    let mut changes: Vec<Change> = all
        .into_iter()
        .map(|one| decode::address(&Address { r#type: Some(one) }.encode_to_vec(), "v", strings).unwrap())
        .collect();
    changes.extend([Change::AddressesSynced, Change::PoliciesSynced]);
    changes
}

/// `shop/only`, which allows nobody but `account` in.
pub fn only(account: &str) -> Authorization {
    let who = ServiceAccountMatch { namespace: "shop".to_owned(), service_account: account.to_owned() };
    let only = Match { service_accounts: vec![who], ..Match::default() };
    Authorization {
        name: "only".to_owned(),
        namespace: "shop".to_owned(),
        scope: i32::from(Scope::Namespace),
        action: i32::from(Action::Allow),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![only] }] }],
        ..Authorization::default()
    }
}

/// A node with pods a and b in the mesh, an application at port 8080 of b, and pod c for whoever stands between them.
pub struct World {
    pub node: Node,
    pub lab: Lab,
}

impl World {
    pub fn new(tag: &str) -> Self {
        let lab = Lab::new(tag);
        application(&lab);
        let node = Node::start(&lab, lab.pods_file(&["a", "b"]));
        Self { node, lab }
    }

    /// Tells the node all of it, and waits until its pods are captured.
    pub fn tell(&mut self, all: Vec<Type>) {
        self.node.apply(changes(all));
        self.node.wait(&[("a", "Captured"), ("b", "Captured")]);
    }

    /// A connection from a pod that echoes `bytes`, and the greeting of the application.
    pub fn call(&self, from: &str, to: &str, bytes: usize) -> std::io::Result<String> {
        let to = to.to_owned();
        self.lab.within(from, move || talk(&to, bytes)).join().unwrap()
    }
}

/// The application in pod b, which greets with the address that it was called from.
pub fn application(lab: &Lab) {
    let (ready, is_ready) = channel();
    drop(lab.within("b", move || {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        ready.send(()).unwrap();
        serve(listener);
    }));
    is_ready.recv().unwrap();
}
