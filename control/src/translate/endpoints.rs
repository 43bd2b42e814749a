//! Which pod serves which port of which Service, and which of them get traffic.
//!
//! Computed once for all pods, from selectors or, where a Service has endpoint slices, from those; a Service without either
//! uses its Endpoints object. An endpoint that is no pod of ours becomes a plain workload of its own.
//!
//! Who gets traffic is the cluster's own rule, so that enrolment changes no balancing: ready endpoints; where there is none,
//! those that are terminating and still serve; with publishNotReadyAddresses, all. Under internalTrafficPolicy Local each
//! node is looked at alone. WDS says health by pod and not by Service, so a Service that must use unready endpoints is sent
//! with health policy ALLOW_ALL and names only those that it uses. A headless Service is its names, which stand for ready
//! endpoints, and has no other rule.
//!
//! Hints narrow the choice only where all ready endpoints have them, for clients whose zone (or node) some endpoint is
//! meant for. Without slices they are what trafficDistribution gives, the endpoint's own zone and node; without a zone
//! there are none. Where they are the endpoints' own places, the service's routing preference says so to any proxy; others
//! go to ours with the workload.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::net::IpAddr;

use tulle_proto::workload;

use crate::model::{
    Endpoint, EndpointSlice, Hints, Pod, Service, ServicePort, TargetPort, TrafficScope, Transport, World,
};
use crate::translate::Settings;
use crate::translate::service::protocol;

/// (namespace, name) of a pod or service.
type Key = (String, String);
/// Service resource name to the ports served there.
pub(super) type Membership = BTreeMap<String, Vec<workload::Port>>;

/// Service resource name to the clients that an endpoint is meant for.
pub(super) type ServiceHints = BTreeMap<String, Hints>;

/// An endpoint that is no pod.
pub(super) struct Outsider {
    pub(super) slice: Key,
    pub(super) node: String,
    pub(super) zone: String,
    /// Its name in DNS, and the Service below which it is one.
    pub(super) hostname: (String, String),
    pub(super) services: Membership,
    pub(super) hints: ServiceHints,
}

/// Who serves what.
pub(super) struct Endpoints {
    pods: BTreeMap<Key, Membership>,
    outsiders: BTreeMap<(String, IpAddr), Outsider>,
    /// (pod, service) also where the pod gets no traffic.
    behind: BTreeSet<(Key, String)>,
    /// By service resource name.
    balancing: BTreeMap<String, Balancing>,
    /// By pod: services whose hints the scope of the balancing cannot say.
    hints: BTreeMap<Key, ServiceHints>,
}

/// What a service's endpoints say about the choice among them.
#[derive(Clone, Copy)]
pub(super) struct Balancing {
    /// Also those that are not ready get traffic.
    pub(super) all: bool,
    /// What is preferred to what.
    pub(super) scope: TrafficScope,
}

/// Who an endpoint is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Pod(Key),
    Address(IpAddr),
}

/// An endpoint of one service, from all slices that have it.
#[derive(Default)]
struct Member<'a> {
    ports: Vec<workload::Port>,
    node: &'a str,
    zone: &'a str,
    hints: Option<&'a Hints>,
    ready: bool,
    /// Leaving, and still answering.
    leaving: bool,
    /// The pod is described to nodes as unhealthy.
    unhealthy: bool,
    /// Where an endpoint that is no pod was named.
    named: Option<(&'a EndpointSlice, &'a Endpoint)>,
}

type Members<'a> = BTreeMap<Who, Member<'a>>;

impl Endpoints {
    pub(super) fn new(world: &World, settings: &Settings) -> Self {
        let mut this = Self {
            pods: BTreeMap::new(),
            outsiders: BTreeMap::new(),
            behind: BTreeSet::new(),
            balancing: BTreeMap::new(),
            hints: BTreeMap::new(),
        };
        let labelled = by_label(world);
        let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in world.slices.values().filter(|s| !s.service.is_empty()) {
            let key = (slice.meta.namespace.as_str(), slice.service.as_str());
            slices.entry(key).or_default().push(slice);
        }
        let by_address: BTreeMap<IpAddr, &Pod> = world
            .pods
            .values()
            .filter(|pod| pod.takes_part() && !pod.host_network)
            .flat_map(|pod| pod.addresses.iter().map(move |ip| (*ip, &**pod)))
            .collect();
        for service in world.services.values().filter(|s| !s.external_name) {
            let meta = &service.meta;
            let name = format!("{}/{}", meta.namespace, settings.hostname(meta));
            let own = slices.get(&(meta.namespace.as_str(), meta.name.as_str()));
            let legacy = world.endpoints.get(&(meta.namespace.clone(), meta.name.clone()));
            let members = match (own, legacy) {
                (Some(slices), _) => sliced(service, slices, world, &by_address),
                (None, Some(legacy)) if service.selector.is_empty() => {
                    sliced(service, &legacy.subsets.iter().collect::<Vec<_>>(), world, &by_address)
                }
                (None, _) => selected(service, &labelled, world),
            };
            this.add(service, &name, members);
        }
        this
    }

    /// Adds the endpoints of one service as far as they get traffic, or are told apart by their health.
    fn add(&mut self, service: &Service, name: &str, members: Members<'_>) {
        let used = used(service, &members);
        let all = service.publish_not_ready || used.iter().any(|who| !members[*who].ready);
        let of_used: Vec<&Member<'_>> = used.iter().map(|who| &members[*who]).collect();
        let scope = scope(service, &of_used);
        let hinted = scope == TrafficScope::Cluster && all_hinted(&of_used);
        let used: BTreeSet<Who> = used.into_iter().cloned().collect();
        for (who, member) in members {
            let keep = used.contains(&who) || (!all && member.unhealthy);
            match (&who, member.named) {
                (Who::Pod(key), _) => {
                    self.behind.insert((key.clone(), name.to_owned()));
                    if let (true, Some(hints)) = (keep && hinted, member.hints) {
                        self.hints.entry(key.clone()).or_default().insert(name.to_owned(), hints.clone());
                    }
                    if keep && !member.ports.is_empty() {
                        self.pods.entry(key.clone()).or_default().insert(name.to_owned(), member.ports);
                    }
                }
                (Who::Address(ip), Some((slice, endpoint))) if keep => {
                    let outsider =
                        self.outsiders.entry((slice.meta.namespace.clone(), *ip)).or_insert_with(|| Outsider {
                            slice: (slice.meta.namespace.clone(), slice.meta.name.clone()),
                            node: endpoint.node.clone(),
                            zone: member.zone.to_owned(),
                            hostname: (endpoint.hostname.clone(), slice.service.clone()),
                            services: Membership::new(),
                            hints: ServiceHints::new(),
                        });
                    if let (true, Some(hints)) = (hinted, member.hints) {
                        outsider.hints.insert(name.to_owned(), hints.clone());
                    }
                    outsider.services.insert(name.to_owned(), member.ports);
                }
                (Who::Address(_), _) => {}
            }
        }
        self.balancing.insert(name.to_owned(), Balancing { all, scope });
    }

    /// Whether the pod is an endpoint of the service, with or without traffic.
    pub(super) fn serves(&self, pod: &Pod, service: &str) -> bool {
        self.behind.contains(&((pod.meta.namespace.clone(), pod.meta.name.clone()), service.to_owned()))
    }

    /// How to choose among a service's endpoints.
    pub(super) fn balancing(&self, service: &str) -> Balancing {
        let unknown = Balancing { all: false, scope: TrafficScope::Cluster };
        self.balancing.get(service).copied().unwrap_or(unknown)
    }

    /// Hints of a pod that no service's balancing says.
    pub(super) fn hints_of(&self, pod: &Pod) -> Option<&ServiceHints> {
        self.hints.get(&(pod.meta.namespace.clone(), pod.meta.name.clone()))
    }

    pub(super) fn of_pod(&self, pod: &Pod) -> Membership {
        self.pods.get(&(pod.meta.namespace.clone(), pod.meta.name.clone())).cloned().unwrap_or_default()
    }

    pub(super) fn outsiders(&self) -> impl Iterator<Item = (&IpAddr, &Outsider)> {
        self.outsiders.iter().map(|((_, ip), outsider)| (ip, outsider))
    }
}

/// The members that get traffic.
fn used<'m, 'a>(service: &Service, members: &'m Members<'a>) -> Vec<&'m Who> {
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
fn scope(service: &Service, used: &[&Member<'_>]) -> TrafficScope {
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
fn all_hinted(used: &[&Member<'_>]) -> bool {
    let all = |has: fn(&Hints) -> bool| used.iter().all(|member| member.ready && member.hints.is_some_and(has));
    !used.is_empty() && (all(|hints| !hints.zones.is_empty()) || all(|hints| !hints.nodes.is_empty()))
}

fn is_only(names: &BTreeSet<String>, name: &str) -> bool {
    names.len() == 1 && names.contains(name)
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

fn selected<'a>(service: &Service, labelled: &ByLabel<'a>, world: &'a World) -> Members<'a> {
    let mut members = Members::new();
    let namespace = service.meta.namespace.as_str();
    // The fewest candidates; without a selector nobody is selected, rather than everybody.
    let candidates = service.selector.iter().map(|(label, value)| {
        labelled.get(&(namespace, label.as_str(), value.as_str())).map(Vec::as_slice).unwrap_or_default()
    });
    for pod in candidates.min_by_key(|pods| pods.len()).unwrap_or_default() {
        if service.selector.iter().all(|(label, value)| pod.meta.labels.get(label) == Some(value)) {
            let ports = pod_ports(service, pod);
            let who = Who::Pod((pod.meta.namespace.clone(), pod.meta.name.clone()));
            add(&mut members, who, of_pod(pod, world, ports, (true, true), pod.meta.deleting));
        }
    }
    members
}

fn sliced<'a>(
    service: &Service,
    slices: &[&'a EndpointSlice],
    world: &'a World,
    by_address: &BTreeMap<IpAddr, &'a Pod>,
) -> Members<'a> {
    let mut members = Members::new();
    for slice in slices.iter().copied() {
        let ports = slice_ports(service, slice);
        for endpoint in &slice.endpoints {
            let pod = endpoint
                .pod
                .as_ref()
                .and_then(|pod| world.pods.get(&(slice.meta.namespace.clone(), pod.clone())))
                .map(|pod| &**pod)
                .or_else(|| endpoint.addresses.iter().find_map(|ip| by_address.get(ip).copied()))
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
