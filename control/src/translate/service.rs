//! Services, and which pod serves which of their ports.
//!
//! Membership is computed once for all pods ([`Endpoints`]) from selectors or, where a service has endpoint slices,
//! from those. An endpoint that is no pod of ours becomes a plain workload of its own, so that such a service works.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::net::IpAddr;

use tulle_proto::workload;
use tulle_proto::workload::AppProtocol;
use tulle_proto::workload::load_balancing::{HealthPolicy, Mode, Scope};

use crate::model::{EndpointSlice, Pod, Service, ServicePort, TargetPort, TrafficScope, Transport, World};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::datagrams::Datagrams;
use crate::translate::dns;

/// Bytes of an address in network order.
pub(super) fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The resource of one service.
pub(super) fn translate(service: &Service, datagrams: &Datagrams<'_>, settings: &Settings) -> Resource {
    let hostname = settings.hostname(&service.meta);
    let message = workload::Service {
        name: service.meta.name.clone(),
        namespace: service.meta.namespace.clone(),
        hostname: hostname.clone(),
        addresses: service
            .addresses
            .iter()
            .map(|ip| workload::NetworkAddress { network: String::new(), address: octets(ip).into(), length: None })
            .collect(),
        ports: service.ports.iter().map(port).collect(),
        load_balancing: balancing(service),
        ip_families: families(service).into(),
        canonical: true,
        extensions: dns::extension(&dns::service_info(service, datagrams.of(service))),
        ..workload::Service::default()
    };
    let aliases = service.addresses.iter().map(|ip| format!("/{ip}")).collect();
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
fn protocol(port: &ServicePort) -> AppProtocol {
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

fn balancing(service: &Service) -> Option<workload::LoadBalancing> {
    let zone = [Scope::Network, Scope::Region, Scope::Zone];
    let node = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let (mode, scopes): (Mode, &[Scope]) = match service.scope {
        TrafficScope::Cluster => (Mode::UnspecifiedMode, &[]),
        TrafficScope::NodeOnly => (Mode::Strict, &[Scope::Node]),
        TrafficScope::PreferZone => (Mode::Failover, &zone),
        TrafficScope::PreferNode => (Mode::Failover, &node),
    };
    if mode == Mode::UnspecifiedMode && !service.publish_not_ready {
        return None;
    }
    let health = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(workload::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

/// (namespace, name) of a pod or service.
type Key = (String, String);
/// Service resource name to the ports served there.
pub(super) type Membership = BTreeMap<String, Vec<workload::Port>>;

/// An endpoint that is no pod.
pub(super) struct Outsider {
    pub(super) slice: Key,
    pub(super) node: String,
    /// Its name in DNS, and the Service below which it is one.
    pub(super) hostname: (String, String),
    pub(super) services: Membership,
}

/// Who serves what. Pods by namespace and name, whose texts are the world's.
pub(super) struct Endpoints<'a> {
    pods: HashMap<(&'a str, &'a str), Membership>,
    outsiders: BTreeMap<(String, IpAddr), Outsider>,
}

/// Pods by namespace and one label: the few that a selector may select.
type ByLabel<'a> = HashMap<(&'a str, &'a str, &'a str), Vec<&'a Pod>>;

fn by_label(world: &World) -> ByLabel<'_> {
    let mut found = ByLabel::new();
    for pod in world.pods.values().filter(|pod| pod.takes_part()) {
        for (label, value) in &pod.meta.labels {
            found.entry((&pod.meta.namespace, label, value)).or_default().push(pod);
        }
    }
    found
}

impl<'a> Endpoints<'a> {
    pub(super) fn new(world: &'a World, settings: &Settings) -> Self {
        let mut this = Self { pods: HashMap::new(), outsiders: BTreeMap::new() };
        let labelled = by_label(world);
        let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in world.slices.values().filter(|s| !s.service.is_empty()) {
            let key = (slice.meta.namespace.as_str(), slice.service.as_str());
            slices.entry(key).or_default().push(slice);
        }
        // Only slices name addresses.
        let pods = world.pods.values().filter(|_| !slices.is_empty());
        let by_address: BTreeMap<IpAddr, &Pod> = pods
            .filter(|pod| pod.takes_part() && !pod.host_network)
            .flat_map(|pod| pod.addresses.iter().map(move |ip| (*ip, &**pod)))
            .collect();
        for service in world.services.values().filter(|s| !s.external_name) {
            let meta = &service.meta;
            let name = format!("{}/{}", meta.namespace, settings.hostname(meta));
            match slices.get(&(meta.namespace.as_str(), meta.name.as_str())) {
                Some(slices) => this.add_slices(service, &name, slices, world, &by_address),
                None => this.add_selected(service, &name, &labelled),
            }
        }
        this
    }

    fn add_selected(&mut self, service: &Service, name: &str, labelled: &ByLabel<'a>) {
        let namespace = service.meta.namespace.as_str();
        // The fewest candidates; without a selector nobody is selected, rather than everybody.
        let candidates = service.selector.iter().map(|(label, value)| {
            labelled.get(&(namespace, label.as_str(), value.as_str())).map(Vec::as_slice).unwrap_or_default()
        });
        for pod in candidates.min_by_key(|pods| pods.len()).unwrap_or_default() {
            if service.selector.iter().all(|(label, value)| pod.meta.labels.get(label) == Some(value)) {
                self.add_pod(pod, name, pod_ports(service, pod));
            }
        }
    }

    fn add_slices(
        &mut self,
        service: &Service,
        name: &str,
        slices: &[&EndpointSlice],
        world: &'a World,
        by_address: &BTreeMap<IpAddr, &'a Pod>,
    ) {
        for slice in slices {
            let ports = slice_ports(service, slice);
            for endpoint in &slice.endpoints {
                let pod = endpoint
                    .pod
                    .as_ref()
                    .and_then(|pod| world.pods.get(&(slice.meta.namespace.clone(), pod.clone())))
                    .map(|pod| &**pod)
                    .or_else(|| endpoint.addresses.iter().find_map(|ip| by_address.get(ip).copied()))
                    .filter(|pod| pod.takes_part());
                match pod {
                    // The pod's own health decides; an endpoint that is not ready beside a ready pod is left out.
                    Some(pod) if endpoint.ready || !pod.ready || service.publish_not_ready => {
                        self.add_pod(pod, name, ports.clone());
                    }
                    Some(_) => {}
                    None if endpoint.ready && endpoint.pod.is_none() => {
                        self.add_outsider(slice, endpoint, name, &ports);
                    }
                    None => {}
                }
            }
        }
    }

    fn add_pod(&mut self, pod: &'a Pod, service: &str, ports: Vec<workload::Port>) {
        if !ports.is_empty() {
            let membership = self.pods.entry((&pod.meta.namespace, &pod.meta.name)).or_default();
            merge(membership.entry(service.to_owned()).or_default(), ports);
        }
    }

    fn add_outsider(
        &mut self,
        slice: &EndpointSlice,
        endpoint: &crate::model::Endpoint,
        service: &str,
        ports: &[workload::Port],
    ) {
        for ip in &endpoint.addresses {
            let outsider = self.outsiders.entry((slice.meta.namespace.clone(), *ip)).or_insert_with(|| Outsider {
                slice: (slice.meta.namespace.clone(), slice.meta.name.clone()),
                node: endpoint.node.clone(),
                hostname: (endpoint.hostname.clone(), slice.service.clone()),
                services: Membership::new(),
            });
            let list = outsider.services.entry(service.to_owned()).or_default();
            merge(list, ports.to_vec());
        }
    }

    pub(super) fn serves(&self, pod: &Pod, service: &str) -> bool {
        self.pods
            .get(&(pod.meta.namespace.as_str(), pod.meta.name.as_str()))
            .is_some_and(|membership| membership.contains_key(service))
    }

    pub(super) fn of_pod(&self, pod: &Pod) -> Membership {
        self.pods.get(&(pod.meta.namespace.as_str(), pod.meta.name.as_str())).cloned().unwrap_or_default()
    }

    pub(super) fn outsiders(&self) -> impl Iterator<Item = (&IpAddr, &Outsider)> {
        self.outsiders.iter().map(|((_, ip), outsider)| (ip, outsider))
    }
}

fn merge(into: &mut Vec<workload::Port>, ports: Vec<workload::Port>) {
    let known: BTreeSet<u32> = into.iter().map(|port| port.service_port).collect();
    into.extend(ports.into_iter().filter(|port| !known.contains(&port.service_port)));
}

fn pod_ports(service: &Service, pod: &Pod) -> Vec<workload::Port> {
    service
        .ports
        .iter()
        .filter_map(|port| {
            let target = match &port.target {
                TargetPort::Number(number) => *number,
                TargetPort::Name(name) => {
                    pod.ports.iter().find(|p| p.protocol == Transport::Tcp && p.name == *name)?.port
                }
            };
            Some(served(port, target))
        })
        .collect()
}

fn slice_ports(service: &Service, slice: &EndpointSlice) -> Vec<workload::Port> {
    service
        .ports
        .iter()
        .filter_map(|port| {
            let found = slice.ports.iter().find(|p| p.name == port.name)?;
            Some(served(port, found.port))
        })
        .collect()
}

fn served(port: &ServicePort, target: u16) -> workload::Port {
    workload::Port { service_port: port.port.into(), target_port: target.into(), app_protocol: protocol(port).into() }
}
