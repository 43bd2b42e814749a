//! A crowd: workloads with a tenth of a Service each, in responses as control sends them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::net::Ipv4Addr;

use prost::Message as _;
use prost_types::Any;
use tulle_proto::discovery::{DeltaDiscoveryResponse, Resource};
use tulle_proto::names::{EXTENSION_WORKLOAD, TYPE_ADDRESS, TYPE_WORKLOAD_INFO};
use tulle_proto::tulle_workload::WorkloadInfo;
use tulle_proto::workload as wds;
use tulle_proto::workload::address::Type;

/// Pods of one owner.
pub const ALIKE: usize = 10;
/// Workloads in one response of control.
pub const RESPONSE: usize = 100;

fn resource(name: String, version: usize, address: Type) -> Resource {
    let value = wds::Address { r#type: Some(address) }.encode_to_vec();
    Resource {
        version: format!("{:032x}", (version as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)),
        resource: Some(Any { type_url: TYPE_ADDRESS.to_owned(), value }),
        name,
        ..Resource::default()
    }
}

fn network_address(address: u32) -> wds::NetworkAddress {
    let address = Ipv4Addr::from(address).octets().to_vec().into();
    wds::NetworkAddress { network: String::new(), address, ..wds::NetworkAddress::default() }
}

fn service(number: usize) -> Resource {
    let (namespace, name) = (format!("crowd-{}", number / 20), format!("app-{number}"));
    let hostname = format!("{name}.{namespace}.svc.cluster.local");
    let key = format!("{namespace}/{hostname}");
    let service = wds::Service {
        name,
        namespace,
        hostname,
        addresses: vec![network_address(0x6470_0000 + number as u32)],
        ports: vec![wds::Port { service_port: 80, target_port: 8080, ..wds::Port::default() }],
        canonical: true,
        ..wds::Service::default()
    };
    resource(key, number, Type::Service(service))
}

fn pod(index: usize, version: usize) -> Resource {
    let number = index / ALIKE;
    let (namespace, app) = (format!("crowd-{}", number / 20), format!("app-{number}"));
    let name = format!("{app}-{:010x}-{index:05x}", 0x5d4f_7c9b_u64 + number as u64);
    let uid = format!("Kubernetes//Pod/{namespace}/{name}");
    let info = WorkloadInfo { pod_uid: format!("6f1c9a52-3b7d-4e08-9a41-{index:012x}"), ..WorkloadInfo::default() };
    let config = Any { type_url: TYPE_WORKLOAD_INFO.to_owned(), value: info.encode_to_vec() };
    let ports = wds::PortList { ports: vec![wds::Port { service_port: 80, target_port: 8080, ..Default::default() }] };
    let workload = wds::Workload {
        uid: uid.clone(),
        name,
        addresses: vec![Ipv4Addr::from(0x6440_0000 + index as u32).octets().to_vec().into()],
        tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
        service_account: app.clone(),
        node: format!("far-{}", index % 250),
        canonical_name: app.clone(),
        canonical_revision: "latest".to_owned(),
        workload_name: app.clone(),
        cluster_id: "Kubernetes".to_owned(),
        services: [(format!("{namespace}/{app}.{namespace}.svc.cluster.local"), ports)].into(),
        extensions: vec![wds::Extension { name: EXTENSION_WORKLOAD.to_owned(), config: Some(config) }],
        namespace,
        ..wds::Workload::default()
    };
    resource(uid, version, Type::Workload(workload))
}

/// [`RESPONSE`] workloads from `start` on, with their Services.
pub fn part(start: usize) -> Vec<Resource> {
    let services = (start / ALIKE..(start + RESPONSE) / ALIKE).map(service);
    services.chain((start..start + RESPONSE).map(|index| pod(index, index))).collect()
}

/// New versions of the workloads alone, of `all`.
pub fn newer(start: usize, all: usize) -> Vec<Resource> {
    (start..start + RESPONSE).map(|index| pod(index, index + all)).collect()
}

/// What control sends them in.
pub fn response(resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: TYPE_ADDRESS.to_owned(),
        nonce: "n".to_owned(),
        system_version_info: "1+".to_owned(),
        resources,
        ..DeltaDiscoveryResponse::default()
    }
}
