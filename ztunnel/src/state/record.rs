//! A workload as the node remembers it: packed, and taken apart when somebody first asks for it.
//!
//! A node knows every workload of the cluster and talks to few of them, so the store keeps each as a [`Record`]: what the
//! pods of one owner have in common once for all of them ([`Shape`]), what those of one node have in common once
//! ([`Place`]), and the rest as bytes. Whoever decides gets a whole [`Workload`] from [`Record::workload`], which makes it
//! once and keeps it; `Writer::forget` lets those go again that nobody uses. Walks over everything use the accessors here,
//! or [`Record::peek`], which keeps nothing.
//!
//! The arithmetic, in bytes with the allocator's part (8 for a block, in steps of 16), for a pod with one address, a uid,
//! a version of 128 bits, and a name such as `web-5d4f7c9b00-x2x4v`: the record 80, its own bytes 80 (name without its
//! owner's 18, pod uid 17, version 17, address 6, flags 1), its slot and two index entries 24 (`known`), its place in one
//! Service 24 (`endpoints`), in the log of versions 16. The shape takes some 500 with its texts and its place in the
//! interner, a Service some 1200; with ten pods to each that is 170. Together about 400. Texts that have a shorter form
//! (hex digits, UUIDs) are kept in it, if it gives back exactly the same text.
//!
//! Limits: the bytes are made here and read here only, so reading has no errors; bytes that could not have been made
//! read as empty fields.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use tulle_certs::SpiffeId;

use crate::state::pack::{Cursor, put_ip, put_number, put_text, put_words};
use crate::state::{
    ApplicationTunnel, DnsName, EgressMode, EndpointHints, GatewayAddress, Locality, Memberships, Protocol, Workload,
    WorkloadType,
};

/// In the uid of a pod, between cluster and namespace.
const POD: &str = "//Pod/";

// Flags.
const HEALTHY: u8 = 1;
const PENDING: u8 = 1 << 1;
const IS_POD: u8 = 1 << 2;
/// The uid is made of cluster, namespace and name.
const REGULAR: u8 = 1 << 3;
/// The name begins with that of the owner, which is left out.
const OWNED: u8 = 1 << 4;
/// Its name below a Service's is its name.
const NAMED_ALIKE: u8 = 1 << 5;

/// What the workloads of one owner have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Shape {
    namespace: Arc<str>,
    identity: SpiffeId,
    protocol: Protocol,
    host_network: bool,
    native_tunnel: bool,
    egress: EgressMode,
    workload_type: WorkloadType,
    capacity: u32,
    services: Memberships,
    policies: Box<[Arc<str>]>,
    network_policies: Box<[Arc<str>]>,
    groups: Box<[u64]>,
    probe_ports: Box<[u16]>,
    subdomain: Option<Arc<str>>,
    canonical_name: Arc<str>,
    canonical_revision: Arc<str>,
    workload_name: Arc<str>,
    rare: Option<Box<Rare>>,
}

/// What most have not.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
struct Rare {
    hostname: Arc<str>,
    hints: Box<[EndpointHints]>,
    policy_versions: Box<[(Arc<str>, Arc<str>)]>,
    request_auths: Box<[Arc<str>]>,
    egress_policies: Box<[Arc<str>]>,
    waypoint: Option<Box<GatewayAddress>>,
    network_gateway: Option<Box<GatewayAddress>>,
    application_tunnel: Option<ApplicationTunnel>,
}

/// Where workloads run: what those of one node have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Network of the addresses.
    pub network: Arc<str>,
    /// Cluster id.
    pub cluster: Arc<str>,
    /// Node. Empty: unknown.
    pub node: Arc<str>,
    /// Region, zone, subzone.
    pub locality: Locality,
}

/// Shapes and places, each kept once. What no record uses is dropped when a set has doubled.
#[derive(Debug, Default)]
pub struct Shapes {
    shapes: Kept<Shape>,
    places: Kept<Place>,
}

#[derive(Debug)]
struct Kept<T> {
    all: HashSet<Arc<T>>,
    after_sweep: usize,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { all: HashSet::new(), after_sweep: 0 }
    }
}

impl<T: Eq + Hash> Kept<T> {
    /// Below this, a sweep is not worth its walk.
    const SMALL: usize = 1024;

    fn share(&mut self, value: T) -> Arc<T> {
        if let Some(kept) = self.all.get(&value) {
            return kept.clone();
        }
        if self.all.len() > 2 * self.after_sweep.max(Self::SMALL) {
            self.all.retain(|kept| Arc::strong_count(kept) > 1);
            self.after_sweep = self.all.len();
        }
        let new = Arc::new(value);
        self.all.insert(new.clone());
        new
    }
}

/// See the module's header. Equal if the workloads are.
#[derive(Debug)]
pub struct Record {
    unpacked: OnceLock<Arc<Workload>>,
    shape: Arc<Shape>,
    place: Arc<Place>,
    own: Box<[u8]>,
}

impl PartialEq for Record {
    fn eq(&self, other: &Self) -> bool {
        self.own == other.own && self.shape == other.shape && self.place == other.place
    }
}

impl Eq for Record {}

impl Record {
    /// Packs a workload.
    pub fn pack(from: &Workload, shapes: &mut Shapes) -> Self {
        let shape = shapes.shapes.share(shape_of(from));
        let place = shapes.places.share(Place {
            network: from.network.clone(),
            cluster: from.cluster.clone(),
            node: from.node.clone(),
            locality: from.locality.clone(),
        });
        Self { unpacked: OnceLock::new(), shape, place, own: own_of(from).into() }
    }

    /// The whole workload, made when first asked for, and kept.
    pub fn workload(&self) -> &Arc<Workload> {
        self.unpacked.get_or_init(|| Arc::new(self.unpack()))
    }

    /// The whole workload, for who walks over many: nothing is kept.
    pub fn peek(&self) -> Arc<Workload> {
        self.unpacked.get().cloned().unwrap_or_else(|| Arc::new(self.unpack()))
    }

    /// Whether the whole workload is kept here although nobody else has it.
    pub(super) fn is_idle(&self) -> bool {
        self.unpacked.get().is_some_and(|workload| Arc::strong_count(workload) == 1)
    }

    /// The same, with nothing kept.
    pub(super) fn packed_again(&self) -> Self {
        self.with_own(self.own.clone())
    }

    /// The same, waiting for a policy.
    pub(super) fn pending(&self) -> Self {
        let mut own = self.own.clone();
        if let Some(flags) = own.first_mut() {
            *flags |= PENDING;
        }
        self.with_own(own)
    }

    fn with_own(&self, own: Box<[u8]>) -> Self {
        Self { unpacked: OnceLock::new(), shape: self.shape.clone(), place: self.place.clone(), own }
    }

    fn flag(&self, flag: u8) -> bool {
        self.own.first().is_some_and(|flags| flags & flag != 0)
    }

    /// Whether services send it new connections.
    pub fn healthy(&self) -> bool {
        self.flag(HEALTHY)
    }

    /// Whether it waits for a policy, and no earlier version of it was complete.
    pub fn policies_pending(&self) -> bool {
        self.flag(PENDING)
    }

    /// Whether it is a pod.
    pub fn is_pod(&self) -> bool {
        self.flag(IS_POD)
    }

    /// Whether its uid can be told from its cluster, namespace and name.
    pub(super) fn is_regular(&self) -> bool {
        self.flag(REGULAR)
    }

    /// Namespace.
    pub fn namespace(&self) -> &Arc<str> {
        &self.shape.namespace
    }

    /// How it is reached.
    pub fn protocol(&self) -> Protocol {
        self.shape.protocol
    }

    /// Whether it shares its node's address.
    pub fn host_network(&self) -> bool {
        self.shape.host_network
    }

    /// Relative weight in balancing.
    pub fn capacity(&self) -> u32 {
        self.shape.capacity
    }

    /// Services that it is an endpoint of.
    pub fn services(&self) -> &Memberships {
        &self.shape.services
    }

    /// Groups of NetworkPolicies that it belongs to.
    pub fn groups(&self) -> &[u64] {
        &self.shape.groups
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Every policy that it names.
    pub(super) fn named(&self) -> impl Iterator<Item = &Arc<str>> {
        let rare = self.shape.rare.as_ref();
        let auths = rare.map_or(&[][..], |rare| &rare.request_auths);
        let egress = rare.map_or(&[][..], |rare| &rare.egress_policies);
        self.shape.policies.iter().chain(&self.shape.network_policies).chain(auths).chain(egress)
    }

    /// The policies that it names, with the version that control had in mind.
    pub(super) fn policies(&self) -> impl Iterator<Item = (&Arc<str>, Option<&Arc<str>>)> {
        let versions = self.shape.rare.as_ref().map_or(&[][..], |rare| &rare.policy_versions);
        let version = |id: &Arc<str>| versions.iter().find(|(other, _)| other == id).map(|(_, version)| version);
        self.shape.policies.iter().map(move |id| (id, version(id)))
    }

    /// The NetworkPolicies that isolate it.
    pub(super) fn network_policies(&self) -> &[Arc<str>] {
        &self.shape.network_policies
    }

    /// For whom it is as an endpoint of a service.
    pub fn hints_for(&self, service: &str) -> Option<&EndpointHints> {
        self.shape.rare.as_ref()?.hints.iter().find(|hints| *hints.service == *service)
    }

    /// The gateway to its network.
    pub fn network_gateway(&self) -> Option<&GatewayAddress> {
        self.shape.rare.as_ref()?.network_gateway.as_deref()
    }

    /// Its addresses, in order.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + Clone {
        let mut bytes = Cursor::new(self.own.get(1..).unwrap_or_default());
        let count = bytes.number();
        (0..count).map_while(move |_| bytes.ip())
    }

    /// What follows the addresses.
    fn texts(&self) -> Cursor<'_> {
        let mut bytes = Cursor::new(self.own.get(1..).unwrap_or_default());
        for _ in 0..bytes.number() {
            bytes.ip();
        }
        bytes
    }

    /// The two parts of its name.
    fn name_parts(&self) -> [&str; 2] {
        let owner = if self.flag(OWNED) { &*self.shape.workload_name } else { "" };
        [owner, self.texts().words()]
    }

    /// Whether it has this name, in this namespace.
    pub(super) fn is_named(&self, namespace: &str, name: &str) -> bool {
        let [owner, rest] = self.name_parts();
        *self.shape.namespace == *namespace && name.strip_prefix(owner) == Some(rest)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.name_parts().concat()
    }

    /// Its uid, in parts.
    fn uid_parts(&self) -> [&str; 6] {
        if self.is_regular() {
            let [owner, rest] = self.name_parts();
            return [&self.place.cluster, POD, &self.shape.namespace, "/", owner, rest];
        }
        let mut texts = self.texts();
        texts.words();
        texts.text();
        texts.text();
        [texts.words(), "", "", "", "", ""]
    }

    /// WDS uid.
    pub fn uid(&self) -> String {
        self.uid_parts().concat()
    }

    /// Whether that is its uid.
    pub fn has_uid(&self, uid: &str) -> bool {
        let rest = self.uid_parts().iter().try_fold(uid, |rest, part| rest.strip_prefix(*part));
        rest == Some("")
    }

    /// Order of the uids.
    pub fn cmp_uid(&self, other: &Self) -> Ordering {
        let alike = self.is_regular()
            && other.is_regular()
            && self.place.cluster == other.place.cluster
            && self.shape.namespace == other.shape.namespace;
        if alike {
            let (own, others) = (self.name_parts(), other.name_parts());
            // Pods of one owner are the usual case.
            if own[0] == others[0] {
                return own[1].cmp(others[1]);
            }
            return own.iter().flat_map(|part| part.bytes()).cmp(others.iter().flat_map(|part| part.bytes()));
        }
        let (own, others) = (self.uid_parts(), other.uid_parts());
        own.iter().flat_map(|part| part.bytes()).cmp(others.iter().flat_map(|part| part.bytes()))
    }

    /// Order of its uid and `uid`.
    pub fn cmp_uid_with(&self, uid: &str) -> Ordering {
        self.uid_parts().iter().flat_map(|part| part.bytes()).cmp(uid.bytes())
    }

    /// Its name below a Service's, and the name of that Service.
    pub fn dns_name(&self) -> Option<(String, &Arc<str>)> {
        let subdomain = self.shape.subdomain.as_ref()?;
        let mut texts = self.texts();
        texts.words();
        texts.text();
        texts.text();
        if !self.is_regular() {
            texts.words();
        }
        let alike = self.flag(NAMED_ALIKE);
        Some((if alike { self.name() } else { texts.words().to_owned() }, subdomain))
    }

    /// Version of the resource.
    pub fn version(&self) -> String {
        let mut texts = self.texts();
        texts.words();
        texts.text()
    }

    /// `metadata.uid` of the pod.
    pub(super) fn pod_uid(&self) -> String {
        let mut texts = self.texts();
        texts.words();
        texts.text();
        texts.text()
    }

    fn unpack(&self) -> Workload {
        let (shape, place) = (&*self.shape, &*self.place);
        let mut texts = self.texts();
        let name: Arc<str> = self.name().into();
        texts.words();
        let (version, pod_uid) = (texts.text(), texts.text());
        let dns_name = self.dns_name().map(|(hostname, subdomain)| {
            let hostname = if *hostname == *name { name.clone() } else { hostname.into() };
            Box::new(DnsName { hostname, subdomain: subdomain.clone() })
        });
        let none = Rare::default();
        let rare = shape.rare.as_deref().unwrap_or(&none);
        Workload {
            uid: self.uid().into(),
            version: version.into(),
            namespace: shape.namespace.clone(),
            addresses: self.addresses().collect(),
            hostname: rare.hostname.clone(),
            network: place.network.clone(),
            protocol: shape.protocol,
            identity: shape.identity.clone(),
            node: place.node.clone(),
            healthy: self.healthy(),
            host_network: shape.host_network,
            native_tunnel: shape.native_tunnel,
            services: shape.services.clone(),
            locality: place.locality.clone(),
            hints: rare.hints.clone(),
            capacity: shape.capacity,
            policies: shape.policies.to_vec(),
            policy_versions: rare.policy_versions.iter().cloned().collect(),
            request_auths: rare.request_auths.to_vec(),
            egress_policies: rare.egress_policies.to_vec(),
            policies_pending: self.policies_pending(),
            egress: shape.egress,
            pod_uid: pod_uid.into(),
            probe_ports: shape.probe_ports.to_vec(),
            groups: shape.groups.clone(),
            network_policies: shape.network_policies.to_vec(),
            dns_name,
            canonical_name: shape.canonical_name.clone(),
            canonical_revision: shape.canonical_revision.clone(),
            workload_name: shape.workload_name.clone(),
            workload_type: shape.workload_type,
            cluster: place.cluster.clone(),
            waypoint: rare.waypoint.clone(),
            network_gateway: rare.network_gateway.clone(),
            application_tunnel: rare.application_tunnel,
            name,
        }
    }
}

fn shape_of(from: &Workload) -> Shape {
    let rare = Rare {
        hostname: from.hostname.clone(),
        hints: from.hints.clone(),
        policy_versions: from.policy_versions.iter().map(|(id, version)| (id.clone(), version.clone())).collect(),
        request_auths: from.request_auths.as_slice().into(),
        egress_policies: from.egress_policies.as_slice().into(),
        waypoint: from.waypoint.clone(),
        network_gateway: from.network_gateway.clone(),
        application_tunnel: from.application_tunnel,
    };
    Shape {
        namespace: from.namespace.clone(),
        identity: from.identity.clone(),
        protocol: from.protocol,
        host_network: from.host_network,
        native_tunnel: from.native_tunnel,
        egress: from.egress,
        workload_type: from.workload_type,
        capacity: from.capacity,
        services: from.services.clone(),
        policies: from.policies.as_slice().into(),
        network_policies: from.network_policies.as_slice().into(),
        groups: from.groups.clone(),
        probe_ports: from.probe_ports.as_slice().into(),
        subdomain: from.dns_name.as_ref().map(|name| name.subdomain.clone()),
        canonical_name: from.canonical_name.clone(),
        canonical_revision: from.canonical_revision.clone(),
        workload_name: from.workload_name.clone(),
        rare: (rare != Rare::default()).then(|| Box::new(rare)),
    }
}

/// Flags, addresses, name, version, pod uid; uid and name below a Service if they are not told by the others.
fn own_of(from: &Workload) -> Vec<u8> {
    let regular = [&*from.cluster, POD, &from.namespace, "/", &from.name].concat() == *from.uid
        && !from.namespace.contains('/')
        && !from.cluster.contains(POD);
    let unowned = from.name.strip_prefix(&*from.workload_name).filter(|_| !from.workload_name.is_empty());
    let hostname = from.dns_name.as_ref().map(|name| &*name.hostname);
    let alike = hostname == Some(&*from.name);
    let flags = [
        (from.healthy, HEALTHY),
        (from.policies_pending, PENDING),
        (from.is_pod(), IS_POD),
        (regular, REGULAR),
        (unowned.is_some(), OWNED),
        (alike, NAMED_ALIKE),
    ];
    let mut own = vec![flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum()];
    put_number(&mut own, from.addresses.len());
    from.addresses.iter().for_each(|ip| put_ip(&mut own, *ip));
    put_words(&mut own, unowned.unwrap_or(&from.name));
    put_text(&mut own, &from.version);
    put_text(&mut own, &from.pod_uid);
    if !regular {
        put_words(&mut own, &from.uid);
    }
    if let Some(hostname) = hostname.filter(|_| !alike) {
        put_words(&mut own, hostname);
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::GatewayTarget;
    use crate::state::fixtures::{behind, workload};

    fn packed(workload: &Workload) -> Record {
        Record::pack(workload, &mut Shapes::default())
    }

    /// A workload in which every field has a value of its own.
    fn full() -> Workload {
        let gateway = |name: &str| {
            let target = GatewayTarget::Hostname { namespace: "shop".into(), hostname: name.into() };
            Some(Box::new(GatewayAddress { target, hbone_port: 15008 }))
        };
        let hints = EndpointHints { service: "shop/a".into(), zones: ["z".into()].into(), nodes: ["n".into()].into() };
        Workload {
            name: "cart-5d4f7c9b00-x2x4v".into(),
            uid: "Kubernetes//Pod/shop/cart-5d4f7c9b00-x2x4v".into(),
            workload_name: "cart".into(),
            version: "00ff5d4f7c9b00aa00ff5d4f7c9b00aa".into(),
            pod_uid: "6f1c9a52-3b7d-4e08-9a41-00000000002a".into(),
            addresses: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            hostname: "host".into(),
            healthy: false,
            host_network: true,
            native_tunnel: true,
            capacity: 7,
            policies: vec!["shop/p".into(), "shop/q".into()],
            policy_versions: [("shop/p".into(), "v".into())].into(),
            request_auths: vec!["RequestAuthentication/shop/users".into()],
            egress_policies: vec!["EgressPolicy/shop/out".into()],
            policies_pending: true,
            egress: EgressMode::Deny,
            probe_ports: vec![8080, 9090],
            groups: [1, u64::MAX].into(),
            network_policies: vec!["NetworkPolicy/shop/n".into()],
            dns_name: Some(Box::new(DnsName { hostname: "cart-0".into(), subdomain: "cart".into() })),
            hints: [hints].into(),
            locality: Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() },
            waypoint: gateway("w"),
            network_gateway: gateway("g"),
            application_tunnel: Some(ApplicationTunnel { proxy_protocol: true, port: Some(9) }),
            ..behind(workload("shop", "cart", "10.0.0.1"), "shop", "cart")
        }
    }

    #[test]
    fn a_workload_comes_out_as_it_went_in() {
        let plain = || workload("shop", "cart", "10.0.0.1");
        let named = |hostname: &str| {
            let name = DnsName { hostname: hostname.into(), subdomain: "db".into() };
            Workload { dns_name: Some(Box::new(name)), ..plain() }
        };
        let cases = [
            ("every field", full()),
            ("few fields", plain()),
            ("no address", Workload { addresses: vec![], ..plain() }),
            ("many addresses", Workload { addresses: vec!["2001:db8::1".parse().unwrap(); 200], ..plain() }),
            ("a uid of another form", Workload { uid: "cluster/networking/ServiceEntry/a/b".into(), ..plain() }),
            ("an empty uid", Workload { uid: "".into(), ..plain() }),
            (
                "a namespace with a slash",
                Workload { namespace: "a/b".into(), uid: "Kubernetes//Pod/a/b/cart".into(), ..plain() },
            ),
            (
                "upper case digits",
                Workload { version: "00FF".into(), pod_uid: "6F1C9A52-3B7D-4E08-9A41-00000000002A".into(), ..plain() },
            ),
            ("an odd number of digits", Workload { version: "abc".into(), ..plain() }),
            ("a version that is no number", Workload { version: "v é".into(), ..plain() }),
            ("a name longer than 63 bytes", Workload { name: "n".repeat(300).into(), ..plain() }),
            ("a name of its own", named("cart-0")),
            ("a name like its own", named("cart")),
        ];
        for (name, workload) in cases {
            let record = packed(&workload);
            assert_eq!(record.peek(), Arc::new(workload.clone()), "{name}");
            assert_eq!(*record.workload(), Arc::new(workload.clone()), "{name}");
            assert_eq!((record.uid(), record.name()), (workload.uid.to_string(), workload.name.to_string()), "{name}");
            assert!(record.has_uid(&workload.uid) && !record.has_uid(&format!("{}x", workload.uid)), "{name}");
            assert!(record.is_named(&workload.namespace, &workload.name), "{name}");
            assert_eq!(record.version(), *workload.version, "{name}");
            assert_eq!(record.is_pod(), workload.is_pod(), "{name}");
            let pending = Workload { policies_pending: true, ..workload };
            assert_eq!(*record.pending().peek(), pending, "{name}");
        }
    }

    #[test]
    fn records_are_equal_as_their_workloads_are_whoever_packed_them() {
        assert_eq!(packed(&full()), packed(&full()));
        for other in [
            Workload { healthy: true, ..full() },
            Workload { node: "node-2".into(), ..full() },
            Workload { egress: EgressMode::Allow, ..full() },
            Workload { application_tunnel: None, ..full() },
        ] {
            assert_ne!(packed(&full()), packed(&other));
        }
    }

    #[test]
    fn the_order_of_records_is_that_of_their_uids() {
        let uids = [
            "",
            "Kubernetes//Pod/shop/a",
            "Kubernetes//Pod/shop/a-1",
            "Kubernetes//Pod/shop/b",
            "z",
            "Kubernetes//Pod",
        ];
        let of = |uid: &str| {
            let name: Arc<str> = uid.rsplit('/').next().unwrap_or(uid).into();
            packed(&Workload { uid: uid.into(), name, workload_name: "a".into(), ..workload("shop", "a", "10.0.0.1") })
        };
        for (left, right) in uids.iter().flat_map(|left| uids.iter().map(move |right| (left, right))) {
            assert_eq!(of(left).cmp_uid(&of(right)), left.cmp(right), "{left} {right}");
            assert_eq!(of(left).cmp_uid_with(right), left.cmp(right), "{left} {right}");
        }
    }

    #[test]
    fn pods_of_one_owner_share_their_shape_and_it_goes_with_the_last() {
        let mut shapes = Shapes::default();
        let of = |name: String, account: &str| Workload {
            name: name.into(),
            identity: crate::state::fixtures::identity("shop", account),
            canonical_name: account.into(),
            ..workload("shop", account, "10.0.0.1")
        };
        let pods: Vec<Record> =
            (0..10).map(|pod| Record::pack(&of(format!("web-{pod}"), "web"), &mut shapes)).collect();
        assert!(pods.iter().all(|pod| Arc::ptr_eq(&pod.shape, &pods[0].shape)));
        for account in 0..5000 {
            Record::pack(&of("one".to_owned(), &format!("a{account}")), &mut shapes);
        }
        assert!(shapes.shapes.all.len() <= 2 * 1024 + 2, "{}", shapes.shapes.all.len());
    }

    #[test]
    fn a_pod_of_a_deployment_is_as_small_as_the_header_says() {
        let pod = Workload { addresses: vec!["10.0.0.1".parse().unwrap()], dns_name: None, ..full() };
        assert_eq!(packed(&pod).own.len(), 1 + 1 + 5 + 18 + 17 + 17);
        assert_eq!(size_of::<Record>(), 48, "and the two counts of its Arc");
    }
}
