//! Services: names, addresses, ports, and how an endpoint is chosen.
//!
//! External addresses (externalIPs, and a load balancer's, which the cluster's own balancing takes over too) are the
//! Service's only as far as nobody has an older claim: what a user writes must not take traffic away from other Services'
//! cluster addresses or from pods.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tulle_proto::names::PORT_HBONE;
use tulle_proto::tulle_workload::DatagramPort;
use tulle_proto::workload;
use tulle_proto::workload::AppProtocol;
use tulle_proto::workload::load_balancing::{HealthPolicy, Mode, Scope};

use crate::model::{Condition, Meta, NamedPort, Service, ServicePort, TargetPort, TrafficScope, Transport, World};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::age;
use crate::translate::dns;
use crate::translate::endpoints::Balancing;
use crate::translate::index::Index;

/// Bytes of an address in network order.
pub(super) fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Whose an external address is, port by port. Cluster addresses and pods' are never external.
pub(super) struct Claims<'a> {
    owners: BTreeMap<(IpAddr, Transport, u16), &'a Meta>,
    index: &'a Index,
}

impl<'a> Claims<'a> {
    pub(super) fn new(world: &'a World, index: &'a Index) -> Self {
        let mut claims = Self { owners: BTreeMap::new(), index };
        let external = index.external().iter().filter_map(|service| world.services.get(service));
        let mut services: Vec<&Service> = external.map(|service| &**service).collect();
        services.sort_by_key(|service| age(&service.meta));
        for service in services {
            for ip in claims.granted(service) {
                let ports = service.names.ports.iter();
                claims.owners.extend(ports.map(|port| ((ip, port.transport, port.number), &service.meta)));
            }
        }
        claims
    }

    /// The external addresses that a service has.
    pub(super) fn granted(&self, service: &Service) -> Vec<IpAddr> {
        service.external.iter().filter(|ip| self.grants(service, **ip)).copied().collect()
    }

    /// Whether the service has `ip` with all its ports, also those that are not TCP: NetworkPolicies let datagrams out to
    /// an address by the endpoints of the Service that has it.
    fn grants(&self, service: &Service, ip: IpAddr) -> bool {
        let owns = |port: &NamedPort| {
            let owner = self.owners.get(&(ip, port.transport, port.number));
            owner.is_none_or(|owner| owner.path() == service.meta.path())
        };
        !self.index.is_inside(&ip) && service.names.ports.iter().all(owns)
    }

    /// What to tell about addresses that the service does not get.
    pub(super) fn condition(&self, service: &Service) -> Option<Condition> {
        let refused: Vec<String> =
            service.external.iter().filter(|ip| !self.grants(service, **ip)).map(IpAddr::to_string).collect();
        (!refused.is_empty()).then(|| {
            let message = format!(
                "{}: another Service or a pod has this address; enrolled pods reach it as if this Service did not exist. \
                 Give the Service an address of its own",
                refused.join(", ")
            );
            Condition::failing("ExternalAddresses", "AddressInUse", message)
        })
    }
}

/// The resource of one service. `datagrams`: its ports that are not TCP.
pub(super) fn translate(
    service: &Service,
    claims: &Claims<'_>,
    how: Balancing,
    datagrams: Vec<DatagramPort>,
    settings: &Settings,
) -> Resource {
    let hostname = settings.hostname(&service.meta);
    let addresses: Vec<IpAddr> = service.addresses.iter().copied().chain(claims.granted(service)).collect();
    let message = workload::Service {
        name: service.meta.name.clone(),
        namespace: service.meta.namespace.clone(),
        hostname: hostname.clone(),
        addresses: addresses
            .iter()
            .map(|ip| workload::NetworkAddress { network: String::new(), address: octets(ip).into(), length: None })
            .collect(),
        ports: service.ports.iter().map(port).collect(),
        load_balancing: balancing(how, service),
        ip_families: families(service).into(),
        canonical: true,
        extensions: dns::extension(&dns::service_info(service, &addresses, datagrams)),
        ..workload::Service::default()
    };
    let aliases = addresses.iter().map(|ip| format!("/{ip}")).collect();
    let address = workload::Address { r#type: Some(workload::address::Type::Service(message)) };
    let name = format!("{}/{hostname}", service.meta.namespace);
    Resource::new(Kind::Address, name, &address, aliases)
}

fn port(port: &ServicePort) -> workload::Port {
    workload::Port {
        service_port: port.port.into(),
        target_port: match &port.target {
            TargetPort::Number(number) => (*number).into(),
            // Named: endpoints say it.
            TargetPort::Name(_) => 0,
        },
        app_protocol: protocol(port).into(),
    }
}

/// appProtocol, else the port name's prefix, as Istio reads it.
pub(super) fn protocol(port: &ServicePort) -> AppProtocol {
    let declared =
        if port.app_protocol.is_empty() { port.name.split('-').next().unwrap_or_default() } else { &port.app_protocol };
    match declared.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "tcp" => AppProtocol::Tcp,
        "tls" | "https" => AppProtocol::Tls,
        _ => AppProtocol::Unknown,
    }
}

fn families(service: &Service) -> workload::IpFamilies {
    match service.families {
        (false, false) => workload::IpFamilies::Automatic,
        (true, false) => workload::IpFamilies::Ipv4Only,
        (false, true) => workload::IpFamilies::Ipv6Only,
        (true, true) => workload::IpFamilies::Dual,
    }
}

fn balancing(Balancing { all, scope }: Balancing, service: &Service) -> Option<workload::LoadBalancing> {
    // No region in between: hints know zones and nodes only. Gateways are nobody's but ours to choose, and a region apart is dear.
    let takes_tunnels = service.ports.iter().any(|port| port.port == PORT_HBONE);
    let near = if takes_tunnels { vec![Scope::Network, Scope::Region] } else { vec![Scope::Network] };
    let and = |more: &[Scope]| [&near[..], more].concat();
    let (mode, scopes) = match scope {
        TrafficScope::Cluster => (Mode::UnspecifiedMode, Vec::new()),
        TrafficScope::NodeOnly => (Mode::Strict, vec![Scope::Node]),
        TrafficScope::PreferZone => (Mode::Failover, and(&[Scope::Zone])),
        TrafficScope::PreferNode => (Mode::Failover, and(&[Scope::Zone, Scope::Node])),
    };
    if mode == Mode::UnspecifiedMode && !all {
        return None;
    }
    let health = if all { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(workload::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}
