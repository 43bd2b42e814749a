//! The endpoints of one Service: who they are, whether they are ready, and which of them get traffic.
//!
//! Pure. What is read besides the Service are its slices or its Endpoints object, the pods that those name or that the
//! selector selects, and the zones of nodes: [`dependencies`] must name all of it, or a change of it goes unnoticed.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;

use tulle_proto::workload;

use crate::model::{
    Endpoint, EndpointSlice, Hints, Key, Pod, Service, ServicePort, TargetPort, TrafficScope, Transport, World,
};
use crate::translate::index::Index;
use crate::translate::service::protocol;

/// What the endpoints of a service may depend on besides the Service, its slices and the pods that it selects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Dependency {
    /// A pod that a slice names.
    Pod(Key),
    /// Whoever has an address that a slice has.
    Address(IpAddr),
    /// The zone of a node that a slice names.
    Node(String),
}

/// What a service says of its endpoints: slices, or else its Endpoints object where nothing is selected.
pub(super) fn given<'a>(
    service: &Service,
    key: &Key,
    index: &'a Index,
    world: &'a World,
) -> Option<Vec<&'a EndpointSlice>> {
    index.slices_of(key).or_else(|| {
        let legacy = world.endpoints.get(key).filter(|_| service.selector.is_empty())?;
        Some(legacy.subsets.iter().collect())
    })
}

/// All that these slices depend on.
pub(super) fn dependencies(slices: &[&EndpointSlice]) -> BTreeSet<Dependency> {
    let mut found = BTreeSet::new();
    for slice in slices {
        for endpoint in &slice.endpoints {
            let named = endpoint.pod.as_ref().map(|pod| (slice.meta.namespace.clone(), pod.clone()));
            found.extend(named.map(Dependency::Pod));
            found.extend(endpoint.addresses.iter().map(|ip| Dependency::Address(*ip)));
            if endpoint.zone.is_empty() && !endpoint.node.is_empty() {
                found.insert(Dependency::Node(endpoint.node.clone()));
            }
        }
    }
    found
}

/// Everybody who is an endpoint of the service.
pub(super) fn members<'a>(
    service: &Service,
    given: Option<&[&'a EndpointSlice]>,
    index: &'a Index,
    world: &'a World,
) -> Members<'a> {
    match given {
        Some(slices) => sliced(service, slices, world, index),
        None => selected(service, index, world),
    }
}

/// Who an endpoint is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Who {
    Pod(Key),
    Address(IpAddr),
}

/// An endpoint of one service, from all slices that have it.
#[derive(Default)]
pub(super) struct Member<'a> {
    pub(super) ports: Vec<workload::Port>,
    pub(super) node: &'a str,
    pub(super) zone: &'a str,
    pub(super) hints: Option<&'a Hints>,
    pub(super) ready: bool,
    /// Leaving, and still answering.
    pub(super) leaving: bool,
    /// The pod is described to nodes as unhealthy.
    pub(super) unhealthy: bool,
    /// Where an endpoint that is no pod was named.
    pub(super) named: Option<(&'a EndpointSlice, &'a Endpoint)>,
}

pub(super) type Members<'a> = BTreeMap<Who, Member<'a>>;

/// The members that get traffic.
pub(super) fn used<'m, 'a>(service: &Service, members: &'m Members<'a>) -> Vec<&'m Who> {
    if service.publish_not_ready {
        return members.keys().collect();
    }
    let headless = service.addresses.is_empty();
    let group = |member: &Member<'a>| if service.scope == TrafficScope::NodeOnly { member.node } else { "" };
    let with_ready: BTreeSet<&str> = members.values().filter(|member| member.ready).map(group).collect();
    let gets =
        |member: &Member<'a>| member.ready || (member.leaving && !headless && !with_ready.contains(group(member)));
    members.iter().filter(|(_, member)| gets(member)).map(|(who, _)| who).collect()
}

/// What is preferred among `used`, by their hints.
pub(super) fn scope(service: &Service, used: &[&Member<'_>]) -> TrafficScope {
    if service.scope == TrafficScope::NodeOnly {
        return TrafficScope::NodeOnly;
    }
    let none = Hints::default();
    let given = used.iter().any(|member| member.hints.is_some_and(|hints| *hints != none));
    let own = |member: &Member<'_>, nodes: bool| match (given, nodes) {
        (true, false) => member.hints.is_some_and(|hints| is_only(&hints.zones, member.zone)),
        (true, true) => member.hints.is_some_and(|hints| is_only(&hints.nodes, member.node)),
        (false, false) => service.scope != TrafficScope::Cluster && !member.zone.is_empty(),
        (false, true) => service.scope == TrafficScope::PreferNode && !member.node.is_empty(),
    };
    let all = |nodes: bool| {
        !used.is_empty() && used.iter().all(|member| (member.ready || service.publish_not_ready) && own(member, nodes))
    };
    match (all(false), all(true)) {
        (_, true) => TrafficScope::PreferNode,
        (true, false) => TrafficScope::PreferZone,
        (false, false) => TrafficScope::Cluster,
    }
}

/// Whether all have hints for zones, or all for nodes.
pub(super) fn all_hinted(used: &[&Member<'_>]) -> bool {
    let all = |has: fn(&Hints) -> bool| used.iter().all(|member| member.ready && member.hints.is_some_and(has));
    !used.is_empty() && (all(|hints| !hints.zones.is_empty()) || all(|hints| !hints.nodes.is_empty()))
}

fn is_only(names: &BTreeSet<String>, name: &str) -> bool {
    names.len() == 1 && names.contains(name)
}

fn selected<'a>(service: &Service, index: &'a Index, world: &'a World) -> Members<'a> {
    let mut members = Members::new();
    for pod in index.select(&service.meta.namespace, &service.selector) {
        let ports = pod_ports(service, pod);
        let who = Who::Pod((pod.meta.namespace.clone(), pod.meta.name.clone()));
        add(&mut members, who, of_pod(pod, world, ports, (true, true), pod.meta.deleting));
    }
    members
}

fn sliced<'a>(service: &Service, slices: &[&'a EndpointSlice], world: &'a World, index: &'a Index) -> Members<'a> {
    let mut members = Members::new();
    for slice in slices.iter().copied() {
        let ports = slice_ports(service, slice);
        for endpoint in &slice.endpoints {
            let pod = endpoint
                .pod
                .as_ref()
                .and_then(|pod| world.pods.get(&(slice.meta.namespace.clone(), pod.clone())))
                .map(|pod| &**pod)
                .or_else(|| endpoint.addresses.iter().find_map(|ip| index.pod_at(ip)).map(|pod| &**pod))
                .filter(|pod| pod.takes_part());
            if let Some(pod) = pod {
                let who = Who::Pod((pod.meta.namespace.clone(), pod.meta.name.clone()));
                let says = (endpoint.ready, endpoint.serving);
                let leaving = endpoint.terminating || pod.meta.deleting;
                let member = of_pod(pod, world, ports.clone(), says, leaving);
                add(&mut members, who, Member { hints: Some(&endpoint.hints), ..member });
            } else if endpoint.pod.is_none() {
                for ip in &endpoint.addresses {
                    let member = Member {
                        ports: ports.clone(),
                        node: &endpoint.node,
                        zone: if endpoint.zone.is_empty() { world.zone(&endpoint.node) } else { &endpoint.zone },
                        hints: Some(&endpoint.hints),
                        ready: endpoint.ready,
                        leaving: endpoint.serving && endpoint.terminating,
                        unhealthy: false,
                        named: Some((slice, endpoint)),
                    };
                    add(&mut members, Who::Address(*ip), member);
                }
            }
            // A pod that is named and not known gets traffic once it is known: plaintext to its address would be a guess.
        }
    }
    members
}

/// The pod's own state counts besides what its slice says of (ready, serving), which may be older.
fn of_pod<'a>(
    pod: &'a Pod,
    world: &'a World,
    ports: Vec<workload::Port>,
    says: (bool, bool),
    leaving: bool,
) -> Member<'a> {
    let (ready, serving) = says;
    Member {
        ports,
        node: &pod.node,
        zone: world.zone(&pod.node),
        hints: None,
        ready: ready && pod.ready && !leaving,
        leaving: serving && pod.ready && leaving,
        unhealthy: !pod.ready || pod.meta.deleting,
        named: None,
    }
}

/// One endpoint may be in several slices: of each family, and of each set of ports.
fn add<'a>(members: &mut Members<'a>, who: Who, member: Member<'a>) {
    let known = members.entry(who).or_default();
    (known.node, known.zone) = (member.node, member.zone);
    known.hints = known.hints.or(member.hints);
    known.ready |= member.ready;
    known.leaving |= member.leaving;
    known.unhealthy |= member.unhealthy;
    known.named = known.named.or(member.named);
    let numbers: BTreeSet<u32> = known.ports.iter().map(|port| port.service_port).collect();
    known.ports.extend(member.ports.into_iter().filter(|port| !numbers.contains(&port.service_port)));
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
