//! Decodes `istio.workload.Service`, with the extension `tulle.dev/service`.
//!
//! Two values are not judged as strictly as the rest, as the peer does: an unknown visibility is PUBLIC, and a subject
//! alternative name that is no SPIFFE id is left out, which only narrows what a client accepts.

use std::net::SocketAddr;
use std::time::Duration;

use prost::Message;
use tulle_proto::names::{EXTENSION_SERVICE, TYPE_SERVICE_INFO};
use tulle_proto::tulle_workload as own;
use tulle_proto::workload as wire;
use tulle_proto::workload::load_balancing;

use crate::state::{
    DatagramPort, HealthPolicy, IpFamilies, LoadBalancing, LocalityScope, Mode, NamedPort, ServiceInfo, ServiceSpec,
    Transport, Visibility,
};
use crate::xds::decode::field::{self, Strings};
use crate::xds::decode::workload::{gateway, ports};

/// See the module's header. The error is what is wrong, as one clause.
pub(super) fn service(from: wire::Service, version: &str, strings: &mut Strings) -> Result<ServiceSpec, String> {
    for (name, text) in [("name", &from.name), ("namespace", &from.namespace), ("hostname", &from.hostname)] {
        // The halves of the resource name are told apart by the slash.
        if text.is_empty() || text.contains('/') {
            return Err(format!("{name} is {text:?}; it must be a name without a slash"));
        }
    }
    let vip = |address: &wire::NetworkAddress, strings: &mut Strings| {
        let net = field::net("addresses", &address.address, address.length)?;
        Ok::<_, String>((strings.share(&address.network), net))
    };
    let (info, affinity) = service_info(&from.extensions, strings)?;
    // A day is the most that the API allows; more would only keep memory.
    let affinity = u64::from(affinity.min(86_400));
    let mut weighted_waypoints = Vec::new();
    for waypoint in from.weighted_waypoints {
        let destination = waypoint.destination.ok_or_else(|| "weighted_waypoints has no destination".to_owned())?;
        weighted_waypoints.push((gateway("weighted_waypoints", destination, strings)?, waypoint.weight));
    }
    Ok(ServiceSpec {
        version: version.into(),
        name: strings.share(&from.name),
        namespace: strings.share(&from.namespace),
        hostname: strings.share(&from.hostname),
        vips: from.addresses.iter().map(|address| vip(address, strings)).collect::<Result<_, _>>()?,
        ports: ports(&from.ports)?,
        subject_alt_names: from.subject_alt_names.iter().filter_map(|san| san.parse().ok()).collect(),
        lb: LoadBalancing {
            affinity: (affinity > 0).then(|| Duration::from_secs(affinity)),
            ..from.load_balancing.map(balancing).transpose()?.unwrap_or_default()
        },
        ip_families: match field::known("ip_families", from.ip_families)? {
            wire::IpFamilies::Automatic => IpFamilies::Automatic,
            wire::IpFamilies::Ipv4Only => IpFamilies::V4Only,
            wire::IpFamilies::Ipv6Only => IpFamilies::V6Only,
            wire::IpFamilies::Dual => IpFamilies::Dual,
        },
        canonical: from.canonical,
        visibility: match wire::service::Visibility::try_from(from.visibility) {
            Ok(wire::service::Visibility::Namespace) => Visibility::Namespace,
            Ok(wire::service::Visibility::Public) | Err(_) => Visibility::Public,
        },
        waypoint: from.waypoint.map(|address| gateway("waypoint", address, strings)).transpose()?,
        weighted_waypoints,
        info: info.map(Box::new),
    })
}

fn balancing(from: wire::LoadBalancing) -> Result<LoadBalancing, String> {
    use load_balancing::Scope;
    let scope = |scope: &i32| {
        Ok(match field::known("routing_preference", *scope)? {
            Scope::Region => LocalityScope::Region,
            Scope::Zone => LocalityScope::Zone,
            Scope::Subzone => LocalityScope::Subzone,
            Scope::Node => LocalityScope::Node,
            Scope::Cluster => LocalityScope::Cluster,
            Scope::Network => LocalityScope::Network,
            Scope::UnspecifiedScope => return Err("routing_preference has an unspecified scope".to_owned()),
        })
    };
    Ok(LoadBalancing {
        routing_preference: from.routing_preference.iter().map(scope).collect::<Result<_, _>>()?,
        mode: match field::known("load_balancing.mode", from.mode)? {
            load_balancing::Mode::UnspecifiedMode => Mode::All,
            load_balancing::Mode::Strict => Mode::Strict,
            load_balancing::Mode::Failover => Mode::Failover,
            load_balancing::Mode::Passthrough => Mode::Passthrough,
        },
        health_policy: match field::known("health_policy", from.health_policy)? {
            load_balancing::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            load_balancing::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
        // Said by the extension.
        affinity: None,
    })
}

fn transport(name: &str, value: i32) -> Result<Transport, String> {
    Ok(match field::known(name, value)? {
        own::TransportProtocol::TransportTcp => Transport::Tcp,
        own::TransportProtocol::TransportUdp => Transport::Udp,
        own::TransportProtocol::TransportSctp => Transport::Sctp,
    })
}

/// Our own extension, and the seconds of session affinity. Other extensions are other people's.
fn service_info(extensions: &[wire::Extension], strings: &mut Strings) -> Result<(Option<ServiceInfo>, u32), String> {
    let Some(extension) = extensions.iter().find(|extension| extension.name == EXTENSION_SERVICE) else {
        return Ok((None, 0));
    };
    let config = extension.config.as_ref().filter(|config| config.type_url == TYPE_SERVICE_INFO);
    let config = config.ok_or_else(|| format!("extension {EXTENSION_SERVICE} has no {TYPE_SERVICE_INFO}"))?;
    let info =
        own::ServiceInfo::decode(&*config.value).map_err(|error| format!("extension {EXTENSION_SERVICE}: {error}"))?;
    let port = |port: &own::PortInfo, strings: &mut Strings| {
        Ok::<_, String>(NamedPort {
            number: field::port("ports.number", port.number)?,
            name: strings.share(&port.name.to_ascii_lowercase()),
            transport: transport("ports.protocol", port.protocol)?,
        })
    };
    let datagram_port = |from: &own::DatagramPort| {
        let endpoint = |from: &own::DatagramEndpoint| {
            let ip = field::ip("datagrams.endpoints.address", &from.address)?;
            Ok::<_, String>(SocketAddr::new(ip, field::port("datagrams.endpoints.port", from.port)?))
        };
        Ok::<_, String>(DatagramPort {
            transport: transport("datagrams.protocol", from.protocol)?,
            number: field::port("datagrams.number", from.number)?,
            endpoints: from.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
        })
    };
    let seconds = info.session_affinity_seconds;
    let info = ServiceInfo {
        datagrams: info.datagrams.iter().map(datagram_port).collect::<Result<_, _>>()?,
        ports: info.ports.iter().map(|one| port(one, strings)).collect::<Result<_, _>>()?,
        external_name: strings.share(&info.external_name.to_ascii_lowercase()),
        headless: info.headless,
        cluster_addresses: info
            .cluster_addresses
            .iter()
            .map(|bytes| field::ip("cluster_addresses", bytes))
            .collect::<Result<_, _>>()?,
    };
    Ok((Some(info), seconds))
}
