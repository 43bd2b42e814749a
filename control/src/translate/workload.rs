//! Pods as workloads. Unready and terminating pods are sent too, as unhealthy: a connection that names their address
//! still has to be recognised, authorised and attributed.
//!
//! Empty and default fields are left out the way Istio does it, so that its proxies read them alike.

use std::net::IpAddr;

use prost::Message;
use tulle_proto::names;
use tulle_proto::tulle_workload::{EgressMode, EndpointHints, WorkloadInfo};
use tulle_proto::workload;

use crate::model::{Hints, Pod, World};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::endpoints::{Endpoints, Membership, Outsider, ServiceHints};
use crate::translate::enrol;
use crate::translate::service::octets;
use crate::translate::telemetry;

/// What a pod must know of policies.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Policies {
    /// Authorizations that it names, with the stand-ins of NetworkPolicies.
    pub(super) authorization: Vec<String>,
    /// NetworkPolicies that isolate it.
    pub(super) network: Vec<String>,
    /// Groups of NetworkPolicies that it belongs to.
    pub(super) groups: Vec<u64>,
    /// RequestAuthentications that apply to it.
    pub(super) request: Vec<String>,
    /// EgressPolicies and ServiceEntries about it.
    pub(super) egress: Vec<String>,
}

/// What a pod's workload is made of besides the pod itself.
#[derive(Debug, PartialEq)]
pub(super) struct Facts {
    policies: Policies,
    services: Membership,
    hints: Vec<EndpointHints>,
    hbone: bool,
    egress: EgressMode,
    locality: Option<workload::Locality>,
}

/// Gathers them.
pub(super) fn facts(pod: &Pod, policies: Policies, endpoints: &Endpoints, world: &World, settings: &Settings) -> Facts {
    Facts {
        policies,
        services: endpoints.of_pod(pod),
        hints: hints(&endpoints.hints_of(pod)),
        hbone: enrol::speaks_hbone(pod, world, settings),
        egress: egress(pod, world, settings),
        locality: locality(world, &pod.node),
    }
}

/// The resource of one pod.
pub(super) fn translate(pod: &Pod, facts: &Facts, settings: &Settings) -> Resource {
    let meta = &pod.meta;
    let uid = settings.pod_uid(meta);
    let healthy = pod.ready && !meta.deleting;
    let (workload_type, workload_name) = telemetry::owner(meta);
    let info = WorkloadInfo {
        pod_uid: meta.uid.clone(),
        egress: facts.egress.into(),
        groups: facts.policies.groups.clone(),
        network_policies: facts.policies.network.clone(),
        request_auths: facts.policies.request.clone(),
        egress_policies: if facts.egress == EgressMode::Allow { Vec::new() } else { facts.policies.egress.clone() },
        hints: facts.hints.clone(),
        probe_ports: pod.probe_ports.iter().map(|port| (*port).into()).collect(),
        hostname: if pod.subdomain.is_empty() { String::new() } else { pod.hostname.clone() },
        subdomain: if pod.hostname.is_empty() { String::new() } else { pod.subdomain.clone() },
        ..WorkloadInfo::default()
    };
    let services = facts.services.iter();
    let message = workload::Workload {
        uid: uid.clone(),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        addresses: pod.addresses.iter().map(|ip| octets(ip).into()).collect(),
        tunnel_protocol: if facts.hbone {
            workload::TunnelProtocol::Hbone.into()
        } else {
            workload::TunnelProtocol::None.into()
        },
        trust_domain: unless_default(&settings.trust_domain, names::DEFAULT_DOMAIN),
        service_account: pod.service_account.clone(),
        node: pod.node.clone(),
        canonical_name: telemetry::canonical_name(meta),
        canonical_revision: telemetry::canonical_revision(meta),
        workload_type: workload_type.into(),
        workload_name,
        authorization_policies: facts.policies.authorization.clone(),
        status: if healthy {
            workload::WorkloadStatus::Healthy.into()
        } else {
            workload::WorkloadStatus::Unhealthy.into()
        },
        cluster_id: settings.cluster_id.clone(),
        native_tunnel: enrol::ends_tunnels(pod),
        services: services.map(|(name, ports)| (name.clone(), workload::PortList { ports: ports.clone() })).collect(),
        locality: facts.locality.clone(),
        network_mode: if pod.host_network {
            workload::NetworkMode::HostNetwork.into()
        } else {
            workload::NetworkMode::Standard.into()
        },
        extensions: extension(&info),
        ..workload::Workload::default()
    };
    let aliases = if pod.host_network { Vec::new() } else { pod.addresses.iter().map(|ip| format!("/{ip}")).collect() };
    resource(uid, message, aliases)
}

fn hints(of_services: &ServiceHints) -> Vec<EndpointHints> {
    let one = |(service, hints): (&String, &Hints)| EndpointHints {
        service: service.clone(),
        zones: hints.zones.iter().cloned().collect(),
        nodes: hints.nodes.iter().cloned().collect(),
    };
    of_services.iter().map(one).collect()
}

fn egress(pod: &Pod, world: &World, settings: &Settings) -> EgressMode {
    if enrol::enrolled(pod, world, settings) {
        enrol::egress(world, &pod.meta.namespace, settings)
    } else {
        EgressMode::Allow
    }
}

fn unless_default(value: &str, default: &str) -> String {
    if value == default { String::new() } else { value.to_owned() }
}

fn extension(info: &WorkloadInfo) -> Vec<workload::Extension> {
    if *info == WorkloadInfo::default() {
        return Vec::new();
    }
    vec![workload::Extension {
        name: names::EXTENSION_WORKLOAD.into(),
        config: Some(prost_types::Any { type_url: names::TYPE_WORKLOAD_INFO.into(), value: info.encode_to_vec() }),
    }]
}

/// Where a node is, as far as its labels say.
pub(super) fn locality(world: &World, node: &str) -> Option<workload::Locality> {
    let labels = &world.nodes.get(node)?.meta.labels;
    let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let locality = workload::Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    };
    (locality != workload::Locality::default()).then_some(locality)
}

fn resource(uid: String, message: workload::Workload, aliases: Vec<String>) -> Resource {
    let address = workload::Address { r#type: Some(workload::address::Type::Workload(message)) };
    Resource::new(Kind::Address, uid, &address, aliases)
}

/// An endpoint that is no pod: a plain workload named by slice and address.
pub(super) fn outsider(ip: &IpAddr, outsider: &Outsider, settings: &Settings) -> Resource {
    let (namespace, slice) = &outsider.slice;
    let uid = format!("{}/discovery.k8s.io/EndpointSlice/{namespace}/{slice}/{ip}", settings.cluster_id);
    let port_list = |ports: &Vec<workload::Port>| workload::PortList { ports: ports.clone() };
    let message = workload::Workload {
        uid: uid.clone(),
        name: slice.clone(),
        namespace: namespace.clone(),
        addresses: vec![octets(ip).into()],
        node: outsider.node.clone(),
        locality: (!outsider.zone.is_empty())
            .then(|| workload::Locality { zone: outsider.zone.clone(), ..workload::Locality::default() }),
        cluster_id: settings.cluster_id.clone(),
        workload_type: workload::WorkloadType::Pod.into(),
        extensions: extension(&info(outsider)),
        services: outsider.services.iter().map(|(name, ports)| (name.clone(), port_list(ports))).collect(),
        ..workload::Workload::default()
    };
    resource(uid, message, vec![format!("/{ip}")])
}

fn info(outsider: &Outsider) -> WorkloadInfo {
    let (hostname, subdomain) = outsider.hostname.clone();
    if hostname.is_empty() {
        return WorkloadInfo { hints: hints(&outsider.hints), ..WorkloadInfo::default() };
    }
    WorkloadInfo { hostname, subdomain, hints: hints(&outsider.hints), ..WorkloadInfo::default() }
}
