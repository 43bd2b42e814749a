//! Decodes `istio.workload.Workload`, with the extension `tulle.dev/workload`.
//!
//! The empty strings that WDS uses for defaults become the defaults here, so that nothing behind has to know them.

use prost::Message;
use tulle_certs::SpiffeId;
use tulle_proto::names::{
    DEFAULT_CLUSTER, DEFAULT_DOMAIN, EXTENSION_WORKLOAD, NETWORK_STAND_IN, PORT_HBONE, TYPE_WORKLOAD_INFO,
};
use tulle_proto::tulle_workload as info;
use tulle_proto::workload as wire;

use crate::state::{
    AppProtocol, ApplicationTunnel, DnsName, EgressMode, EndpointHints, GatewayAddress, GatewayTarget, Locality,
    NETWORK_POLICY, Port, Protocol, Workload, WorkloadType,
};
use crate::xds::decode::field::{self, Strings};

/// See the module's header. The error is what is wrong, as one clause.
pub(super) fn workload(from: wire::Workload, version: &str, strings: &mut Strings) -> Result<Workload, String> {
    if from.uid.is_empty() {
        return Err("uid is empty".to_owned());
    }
    let protocol = match field::known("tunnel_protocol", from.tunnel_protocol)? {
        wire::TunnelProtocol::None => Protocol::Plain,
        wire::TunnelProtocol::Hbone => Protocol::Hbone,
        wire::TunnelProtocol::LegacyIstioMtls => {
            return Err("tunnel_protocol is LEGACY_ISTIO_MTLS, which node proxies do not speak".to_owned());
        }
    };
    let identity = SpiffeId::new(
        or_default(&from.trust_domain, DEFAULT_DOMAIN),
        &from.namespace,
        or_default(&from.service_account, "default"),
    )
    .map_err(|error| error.to_string())?;
    let addresses = from.addresses.iter().map(|bytes| field::ip("addresses", bytes)).collect::<Result<_, _>>()?;
    let locality = from.locality.unwrap_or_default();
    let info = workload_info(&from.extensions)?;
    let mut services = Vec::with_capacity(from.services.len());
    for (key, list) in from.services {
        if !key.contains('/') {
            return Err(format!("services has the key {key:?}; it must be <namespace>/<hostname>"));
        }
        services.push((strings.share(&key), ports(&list.ports)?));
    }
    Ok(Workload {
        uid: from.uid.as_str().into(),
        version: version.into(),
        // What is each pod's own is not shared: looking for another would only cost memory.
        name: from.name.as_str().into(),
        namespace: strings.share(&from.namespace),
        addresses,
        hostname: strings.share(&from.hostname),
        network: strings.share(&from.network),
        protocol,
        identity: strings.share_identity(identity),
        node: strings.share(&from.node),
        healthy: match field::known("status", from.status)? {
            wire::WorkloadStatus::Healthy => true,
            wire::WorkloadStatus::Unhealthy => false,
        },
        host_network: match field::known("network_mode", from.network_mode)? {
            wire::NetworkMode::Standard => false,
            wire::NetworkMode::HostNetwork => true,
        },
        native_tunnel: from.native_tunnel,
        services: services.into_iter().collect(),
        hints: hints(&info.hints, strings),
        locality: Locality {
            region: strings.share(&locality.region),
            zone: strings.share(&locality.zone),
            subzone: strings.share(&locality.subzone),
        },
        capacity: from.capacity.unwrap_or(1),
        policies: from
            .authorization_policies
            .iter()
            .filter(|id| !stands_in(id, &info.network_policies))
            .map(|id| strings.share(id))
            .collect(),
        policy_versions: info.policy_versions.iter().map(|(id, v)| (strings.share(id), strings.share(v))).collect(),
        policies_pending: false,
        egress: match field::known("egress", info.egress)? {
            info::EgressMode::Allow => EgressMode::Allow,
            info::EgressMode::Audit => EgressMode::Audit,
            info::EgressMode::Deny => EgressMode::Deny,
        },
        pod_uid: info.pod_uid.as_str().into(),
        probe_ports: info.probe_ports.iter().map(|p| field::port("probe_ports", *p)).collect::<Result<_, _>>()?,
        dns_name: dns_name(&info, strings).map(Box::new),
        groups: sorted(info.groups),
        network_policies: info.network_policies.iter().map(|id| strings.share(id)).collect(),
        request_auths: info.request_auths.iter().map(|id| strings.share(id)).collect(),
        egress_policies: info.egress_policies.iter().map(|id| strings.share(id)).collect(),
        canonical_name: strings.share(&from.canonical_name),
        canonical_revision: strings.share(&from.canonical_revision),
        workload_name: strings.share(&from.workload_name),
        workload_type: match field::known("workload_type", from.workload_type)? {
            wire::WorkloadType::Deployment => WorkloadType::Deployment,
            wire::WorkloadType::Cronjob => WorkloadType::CronJob,
            wire::WorkloadType::Pod => WorkloadType::Pod,
            wire::WorkloadType::Job => WorkloadType::Job,
        },
        cluster: strings.share(or_default(&from.cluster_id, DEFAULT_CLUSTER)),
        waypoint: from.waypoint.map(|gateway| self::gateway("waypoint", gateway, strings)).transpose()?.map(Box::new),
        network_gateway: from
            .network_gateway
            .map(|g| self::gateway("network_gateway", g, strings))
            .transpose()?
            .map(Box::new),
        application_tunnel: from.application_tunnel.map(application_tunnel).transpose()?.flatten(),
    })
}

/// A name that is no label is nobody's: it is left out, as DNS servers leave it out.
fn dns_name(info: &info::WorkloadInfo, strings: &mut Strings) -> Option<DnsName> {
    let label = |text: &str| {
        let fits = !text.is_empty() && text.len() <= 63;
        fits && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    (label(&info.hostname) && label(&info.subdomain)).then(|| DnsName {
        hostname: info.hostname.to_ascii_lowercase().into(),
        subdomain: strings.share(&info.subdomain.to_ascii_lowercase()),
    })
}

fn hints(of_services: &[info::EndpointHints], strings: &mut Strings) -> Box<[EndpointHints]> {
    let one = |from: &info::EndpointHints| {
        let mut share = |names: &[String]| names.iter().map(|name| strings.share(name)).collect();
        let (zones, nodes) = (share(&from.zones), share(&from.nodes));
        EndpointHints { service: strings.share(&from.service), zones, nodes }
    };
    of_services.iter().map(one).collect()
}

fn sorted(mut groups: Vec<u64>) -> Box<[u64]> {
    groups.sort_unstable();
    groups.dedup();
    groups.into()
}

/// Whether the authorization policy `id` is there for proxies that do not know the NetworkPolicy itself.
fn stands_in(id: &str, network_policies: &[String]) -> bool {
    let Some((namespace, name)) = id.split_once('/') else { return false };
    let Some(name) = name.strip_prefix(NETWORK_STAND_IN) else { return false };
    network_policies.iter().any(|policy| {
        let path = policy.strip_prefix(NETWORK_POLICY).and_then(|path| path.split_once('/'));
        path == Some((namespace, name))
    })
}

fn or_default<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

/// Our own extension. Other extensions are other people's.
fn workload_info(extensions: &[wire::Extension]) -> Result<info::WorkloadInfo, String> {
    let Some(extension) = extensions.iter().find(|extension| extension.name == EXTENSION_WORKLOAD) else {
        return Ok(info::WorkloadInfo::default());
    };
    let config = extension.config.as_ref().filter(|config| config.type_url == TYPE_WORKLOAD_INFO);
    let config = config.ok_or_else(|| format!("extension {EXTENSION_WORKLOAD} has no {TYPE_WORKLOAD_INFO}"))?;
    info::WorkloadInfo::decode(&*config.value).map_err(|error| format!("extension {EXTENSION_WORKLOAD}: {error}"))
}

fn application_tunnel(from: wire::ApplicationTunnel) -> Result<Option<ApplicationTunnel>, String> {
    use wire::application_tunnel::Protocol as Wire;
    let proxy_protocol = match field::known("application_tunnel.protocol", from.protocol)? {
        Wire::None => false,
        Wire::Proxy => true,
    };
    let port = Some(field::port_or_zero("application_tunnel.port", from.port)?).filter(|port| *port != 0);
    Ok((proxy_protocol || port.is_some()).then_some(ApplicationTunnel { proxy_protocol, port }))
}

/// Ports of a service or of an endpoint.
pub(super) fn ports(from: &[wire::Port]) -> Result<Vec<Port>, String> {
    let port = |port: &wire::Port| {
        Ok(Port {
            service_port: field::port("service_port", port.service_port)?,
            target_port: field::port_or_zero("target_port", port.target_port)?,
            app_protocol: match field::known("app_protocol", port.app_protocol)? {
                wire::AppProtocol::Unknown => AppProtocol::Unknown,
                wire::AppProtocol::Http11 => AppProtocol::Http11,
                wire::AppProtocol::Http2 => AppProtocol::Http2,
                wire::AppProtocol::Grpc => AppProtocol::Grpc,
                wire::AppProtocol::Tcp => AppProtocol::Tcp,
                wire::AppProtocol::Tls => AppProtocol::Tls,
            },
        })
    };
    from.iter().map(port).collect()
}

/// A gateway or waypoint.
pub(super) fn gateway(name: &str, from: wire::GatewayAddress, strings: &mut Strings) -> Result<GatewayAddress, String> {
    use wire::gateway_address::Destination;
    let target = match from.destination {
        Some(Destination::Hostname(host)) if !host.hostname.is_empty() => GatewayTarget::Hostname {
            namespace: strings.share(&host.namespace),
            hostname: strings.share(&host.hostname),
        },
        Some(Destination::Address(address)) => {
            GatewayTarget::Address { network: strings.share(&address.network), ip: field::ip(name, &address.address)? }
        }
        _ => return Err(format!("{name} names neither a host nor an address")),
    };
    let hbone_port = match field::port_or_zero(name, from.hbone_mtls_port)? {
        0 => PORT_HBONE,
        port => port,
    };
    Ok(GatewayAddress { target, hbone_port })
}
