//! What the DNS proxy of a node must know of a Service and WDS has no field for.
//!
//! An ExternalName Service is not an `istio.workload.Service` of its own name: Istio's proxy would take that for a headless
//! one without endpoints, and answer "no address" where today the cluster's DNS answers with the alias. It is sent under
//! [`names::EXTERNAL_NAME_PREFIX`] instead, a name that nobody asks for, which our proxy looks under.

use std::net::IpAddr;

use prost::Message;
use tulle_proto::names;
use tulle_proto::tulle_workload::{DatagramPort, PortInfo, ServiceInfo, TransportProtocol};
use tulle_proto::workload;

use crate::model::{Service, Transport};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::service::octets;

/// The extension of one service that is sent with `addresses`.
pub(super) fn service_info(service: &Service, addresses: &[IpAddr], datagrams: Vec<DatagramPort>) -> ServiceInfo {
    let ports = service.names.ports.iter().map(|port| PortInfo {
        number: port.number.into(),
        name: port.name.clone(),
        protocol: match port.transport {
            Transport::Tcp => TransportProtocol::TransportTcp.into(),
            Transport::Udp => TransportProtocol::TransportUdp.into(),
            Transport::Sctp => TransportProtocol::TransportSctp.into(),
        },
        app_protocol: port.app_protocol.clone(),
    });
    let only_cluster = service.names.addresses == addresses;
    ServiceInfo {
        ports: ports.collect(),
        external_name: service.names.external_name.clone(),
        headless: service.names.headless,
        datagrams,
        publish_not_ready_addresses: service.publish_not_ready,
        session_affinity_seconds: service.affinity.unwrap_or(0),
        cluster_addresses: if only_cluster {
            Vec::new()
        } else {
            service.names.addresses.iter().map(|ip| octets(ip).into()).collect()
        },
    }
}

/// As it is carried; nothing where there is nothing to say.
pub(super) fn extension(info: &ServiceInfo) -> Vec<workload::Extension> {
    if *info == ServiceInfo::default() {
        return Vec::new();
    }
    vec![workload::Extension {
        name: names::EXTENSION_SERVICE.into(),
        config: Some(prost_types::Any { type_url: names::TYPE_SERVICE_INFO.into(), value: info.encode_to_vec() }),
    }]
}

/// The resource of a Service of type ExternalName. None: what it names is no name, and nothing stands for it.
pub(super) fn external_name(service: &Service, settings: &Settings) -> Option<Resource> {
    if service.names.external_name.is_empty() {
        return None;
    }
    let hostname = format!("{}{}", names::EXTERNAL_NAME_PREFIX, settings.hostname(&service.meta));
    let info = ServiceInfo { external_name: service.names.external_name.clone(), ..ServiceInfo::default() };
    let message = workload::Service {
        name: service.meta.name.clone(),
        namespace: service.meta.namespace.clone(),
        hostname: hostname.clone(),
        canonical: true,
        extensions: extension(&info),
        ..workload::Service::default()
    };
    let address = workload::Address { r#type: Some(workload::address::Type::Service(message)) };
    let name = format!("{}/{hostname}", service.meta.namespace);
    Some(Resource::new(Kind::Address, name, &address, Vec::new()))
}
