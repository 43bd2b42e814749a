//! `tulle.dev/egress: deny` and everything that may be behind a Service: what is no pod is outside.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, SocketAddr};

use prost::Message as _;
use prost_types::Any;
use tulle_proto::names;
use tulle_proto::tulle_workload::{EgressMode, WorkloadInfo};
use tulle_proto::workload::address::Type;
use tulle_proto::workload::{Address, Extension, NetworkAddress, Port, PortList, Service, Workload};
use ztunnel::lb::Chance;
use ztunnel::outbound::decide::decide;
use ztunnel::outcome::Code;
use ztunnel::state::{Change, Snapshot, store};
use ztunnel::xds::decode;

fn octets(ip: &str) -> prost::bytes::Bytes {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

fn change(of: Type) -> Change {
    decode::address(&Address { r#type: Some(of) }.encode_to_vec(), "v1", &mut decode::Strings::default()).unwrap()
}

/// A workload; one whose uid says `Pod` is a pod.
fn workload(uid: &str, ip: &str, service: Option<&str>, egress: EgressMode) -> Change {
    let info = WorkloadInfo { egress: i32::from(egress), ..WorkloadInfo::default() };
    let config = Any { type_url: names::TYPE_WORKLOAD_INFO.to_owned(), value: info.encode_to_vec() };
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }] };
    change(Type::Workload(Workload {
        uid: uid.to_owned(),
        name: uid.rsplit('/').next().unwrap().to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![octets(ip)],
        services: service.map(|host| (format!("shop/{host}"), ports)).into_iter().collect(),
        extensions: vec![Extension { name: names::EXTENSION_WORKLOAD.to_owned(), config: Some(config) }],
        ..Workload::default()
    }))
}

fn service(host: &str, vip: &str) -> Change {
    change(Type::Service(Service {
        name: host.split('.').next().unwrap().to_owned(),
        namespace: "shop".to_owned(),
        hostname: host.to_owned(),
        addresses: vec![NetworkAddress { network: String::new(), address: octets(vip), ..NetworkAddress::default() }],
        ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }],
        ..Service::default()
    }))
}

fn world() -> std::sync::Arc<Snapshot> {
    let (mut writer, reader) = store();
    let (pods, hosts) = ("pods.shop.svc.cluster.local", "hosts.shop.svc.cluster.local");
    let changes = [
        workload("Kubernetes//Pod/shop/denied", "10.0.0.1", None, EgressMode::Deny),
        workload("Kubernetes//Pod/shop/free", "10.0.0.2", None, EgressMode::Allow),
        workload("Kubernetes//Pod/shop/server", "10.0.0.3", Some(pods), EgressMode::Allow),
        workload(
            "Kubernetes/discovery.k8s.io/EndpointSlice/shop/hosts/203.0.113.7",
            "203.0.113.7",
            Some(hosts),
            EgressMode::Allow,
        ),
        service(pods, "10.96.0.1"),
        service(hosts, "10.96.0.2"),
        Change::AddressesSynced,
        Change::PoliciesSynced,
    ];
    writer.apply(changes, 0);
    reader.load()
}

#[test]
fn a_service_does_not_lead_out_of_a_namespace_that_may_not_leave() {
    let snapshot = world();
    for (from, to, goes) in [
        ("denied", "10.96.0.1:80", true),
        ("denied", "10.0.0.3:8080", true),
        ("denied", "10.96.0.2:80", false),
        ("denied", "203.0.113.7:8080", false),
        ("denied", "203.0.113.8:80", false),
        ("free", "10.96.0.1:80", true),
        ("free", "10.96.0.2:80", true),
        ("free", "203.0.113.7:8080", true),
        ("free", "203.0.113.8:80", true),
    ] {
        let source = snapshot.workload(&format!("Kubernetes//Pod/shop/{from}")).unwrap();
        let to: SocketAddr = to.parse().unwrap();
        match decide(&snapshot, source, "", to, &Chance::of(1)) {
            Ok(plan) => assert!(goes, "{from} to {to}: {plan:?}"),
            Err(outcome) => {
                assert!(!goes, "{from} to {to}: {outcome}");
                assert_eq!(outcome.code, Code::EgressDenied, "{from} to {to}: {outcome}");
            }
        }
    }
}
