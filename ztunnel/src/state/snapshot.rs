//! One immutable state of the mesh, and the look-ups that decisions make in it.
//!
//! Every look-up is a few hash probes and allocates nothing. Ambiguity is resolved here once, by the peer's rules, so
//! that all callers agree: which service owns an address for a client, and which of several workloads with one address.

use std::cmp::Reverse;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use tulle_certs::{Aliases, Bundles, SpiffeId};
use tulle_proto::names::{PROBE_V4, PROBE_V6};

use crate::state::cow::{CowMap, Groups};
use crate::state::known::Workloads;
use crate::state::l7::L7;
use crate::state::{NetworkPolicy, Policy, Record, Scope, Service, Workload};

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub(super) generation: u64,
    pub(super) addresses_synced: bool,
    pub(super) policies_synced: bool,
    /// All networks together.
    pub(super) workloads: Workloads,
    /// By host name; groups hold the namespaces.
    pub(super) services: Groups<Arc<str>, Service>,
    pub(super) service_count: usize,
    /// `default/kubernetes`.
    pub(super) api_server: Option<Arc<Service>>,
    pub(super) vips: Groups<IpAddr, Service>,
    /// Virtual address ranges are rare, and scanned.
    pub(super) ranges: Arc<Vec<Range>>,
    pub(super) policies: CowMap<Arc<str>, Arc<Policy>>,
    pub(super) global_policies: Arc<[Arc<Policy>]>,
    pub(super) namespace_policies: CowMap<Arc<str>, Arc<[Arc<Policy>]>>,
    /// Old versions of policies that have just got a selector; nearly always none.
    pub(super) narrowed: Arc<[Arc<Policy>]>,
    /// Control offers NetworkPolicies, and they are wanted.
    pub(super) network_expected: bool,
    pub(super) network_synced: bool,
    pub(super) network_policies: CowMap<Arc<str>, Arc<NetworkPolicy>>,
    pub(super) l7: Arc<L7>,
    /// Own types that control offers, and those of them that have been said completely.
    pub(super) own_expected: u8,
    pub(super) own_synced: u8,
    /// Addresses of this node itself.
    pub(super) node: Arc<[IpAddr]>,
    /// Roots of other trust domains.
    pub(super) trust: Bundles,
    /// Other names of this node's trust domain.
    pub(super) aliases: Aliases,
}

/// A network, a range of virtual addresses in it, and whose it is.
pub(super) type Range = (Arc<str>, IpNet, Arc<Service>);

impl Snapshot {
    pub(super) fn empty() -> Self {
        Self {
            generation: 0,
            addresses_synced: false,
            policies_synced: false,
            workloads: Workloads::new(),
            services: CowMap::new(),
            service_count: 0,
            api_server: None,
            vips: CowMap::new(),
            ranges: Arc::default(),
            policies: CowMap::new(),
            global_policies: Arc::from([]),
            namespace_policies: CowMap::new(),
            narrowed: Arc::from([]),
            network_expected: false,
            network_synced: false,
            network_policies: CowMap::new(),
            l7: Arc::default(),
            own_expected: 0,
            own_synced: 0,
            node: Arc::from([]),
            trust: Bundles::default(),
            aliases: Aliases::default(),
        }
    }

    /// Counted from 1, the first published snapshot; 0 knows nothing.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The first response of every type was applied: what is not here does not exist.
    pub fn synced(&self) -> bool {
        let network = self.network_synced || !self.network_expected;
        self.addresses_synced && self.policies_synced && network && self.own_expected & !self.own_synced == 0
    }

    /// The first response with policies was applied. Before, no verdict is possible.
    pub fn policies_synced(&self) -> bool {
        self.policies_synced
    }

    /// A workload by its WDS uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.by_uid(uid).map(|record| record.workload())
    }

    /// A pod by its name. If several clusters have one of that name, HBONE first, then the first uid.
    pub fn workload_by_pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> Option<&'a Arc<Workload>> {
        self.workloads_by_pod(namespace, name).next()
    }

    /// Every workload that a pod of this name may be: several clusters may have one.
    pub fn workloads_by_pod<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads.by_pod(namespace, name).map(|record| record.workload())
    }

    /// The workload that owns an address; never one of the host's network. Of several, pods come first, then HBONE.
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.by_ip(network, ip.to_canonical()).map(|record| record.workload())
    }

    /// The service that owns a virtual address, as a client of `client_namespace` sees it: its own namespace first,
    /// then canonical ones. An exact address comes before a range, and a longer range before a shorter one.
    pub fn service_by_vip(&self, network: &str, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        let owns = |service: &Service| service.vips.iter().any(|(net, vip)| **net == *network && is_host(vip, ip));
        let exact = self.vips.group(&ip).iter().filter(|service| owns(service));
        best_for(client_namespace, exact).or_else(|| {
            let ranges = self.ranges.iter().filter(|(net, range, service)| {
                **net == *network && range.contains(&ip) && service.visible_to(client_namespace)
            });
            // max_by_key would keep the last of equals.
            let best = ranges.min_by_key(|(_, range, service)| {
                (*service.namespace != *client_namespace, Reverse(range.prefix_len()), !service.canonical)
            });
            best.map(|(_, _, service)| service)
        })
    }

    /// The service that a connection to `destination` is addressed to. A cluster address is its service's on every port;
    /// an external one only on the service's ports, so that nothing else at that address (a node's own services, another
    /// Service of the same load balancer) is taken over.
    pub fn service_at(&self, network: &str, destination: SocketAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        self.service_that(network, destination.ip(), client_namespace, |service| {
            service.port(destination.port()).is_some() || !service.is_external(destination.ip())
        })
    }

    /// The service at an address that `answers`: of several, the one that the address is said to be, or else the next best.
    pub fn service_that(
        &self,
        network: &str,
        ip: IpAddr,
        client_namespace: &str,
        answers: impl Fn(&Service) -> bool,
    ) -> Option<&Arc<Service>> {
        let service = self.service_by_vip(network, ip, client_namespace)?;
        if answers(service) {
            return Some(service);
        }
        let ip = ip.to_canonical();
        let owns = |service: &Service| service.vips.iter().any(|(net, vip)| **net == *network && is_host(vip, ip));
        best_for(client_namespace, self.vips.group(&ip).iter().filter(|service| owns(service) && answers(service)))
    }

    /// Whether an address is any Service's inside the cluster, also one that some namespaces do not see. External addresses
    /// and ranges are not.
    pub fn is_cluster_address(&self, network: &str, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let owns = |service: &Arc<Service>| {
            let at = service.vips.iter().any(|(net, vip)| **net == *network && is_host(vip, ip));
            at && !service.is_external(ip)
        };
        self.vips.group(&ip).iter().any(owns)
    }

    /// A service by its resource name's halves.
    pub fn service(&self, namespace: &str, hostname: &str) -> Option<&Arc<Service>> {
        self.services.group(hostname).iter().find(|service| *service.namespace == *namespace)
    }

    /// The Service of the API server, which keeps it itself.
    pub fn api_server(&self) -> Option<&Arc<Service>> {
        self.api_server.as_ref()
    }

    /// The endpoint of the API server's Service that is at exactly this address and port: it is inside the cluster, whatever else
    /// is at the address.
    pub fn api_server_at(&self, at: SocketAddr) -> Option<(&Arc<Service>, &Arc<Workload>)> {
        let service = self.api_server()?;
        let at = SocketAddr::new(at.ip().to_canonical(), at.port());
        let endpoint = service.endpoints.all.iter().find(|endpoint| service.sockets(endpoint).contains(&at))?;
        Some((service, endpoint.workload()))
    }

    /// The service that a host name means to a client of `client_namespace`.
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        best_for(client_namespace, self.services.group(hostname).iter())
    }

    /// Every workload, in no order, taken apart one after the other; who needs a few fields of all uses
    /// [`Self::records`].
    pub fn workloads(&self) -> impl Iterator<Item = Arc<Workload>> {
        self.workloads.iter().map(|record| record.peek())
    }

    /// Every workload, in no order, as it is kept.
    pub fn records(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.workloads.iter()
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values().flat_map(|group| group.iter())
    }

    /// Every policy in force, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// How many workloads, services and policies there are.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.workloads.len(), self.service_count, self.policies.len() + self.network_policies.len())
    }

    /// A policy in force, by `<namespace>/<name>`.
    pub fn policy(&self, id: &str) -> Option<&Arc<Policy>> {
        self.policies.get(id)
    }

    /// The policies that apply to a workload: mesh-wide, of its namespace, and those it names; each once.
    pub fn policies_for<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Arc<Policy>> {
        let implied = move |policy: &Policy| match policy.scope {
            Scope::Global => true,
            Scope::Namespace => policy.namespace == workload.namespace,
            Scope::Selector => false,
        };
        let named = workload.policies.iter().filter_map(|id| self.policies.get(id));
        let namespace: &[Arc<Policy>] =
            self.namespace_policies.get(&workload.namespace).map_or(&[], |policies| &**policies);
        // Who names the policy has its new version.
        let narrowed = self.narrowed.iter().filter(move |old| implied(old) && !workload.policies.contains(&old.id));
        let named = named.filter(move |policy| !implied(policy));
        self.global_policies.iter().chain(namespace).chain(named).chain(narrowed)
    }

    /// A policy that the workload names and that is not here. The store stages such workloads, so there is one only if
    /// the workload is pending, or older than the snapshot.
    pub fn missing_policy<'a>(&self, workload: &'a Workload) -> Option<&'a Arc<str>> {
        let network = workload.network_policies.iter().find(|id| self.network_policies.get(*id).is_none());
        workload.policies.iter().find(|id| self.policies.get(*id).is_none()).or(network)
    }

    /// A NetworkPolicy in force, by resource name.
    pub fn network_policy(&self, id: &str) -> Option<&Arc<NetworkPolicy>> {
        self.network_policies.get(id)
    }

    /// Every NetworkPolicy in force, in no order.
    pub fn network_policies(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.network_policies.values()
    }

    /// Whether this is an address of the node itself, or the one under which its probes come.
    pub fn is_own_node(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip == IpAddr::V4(PROBE_V4) || ip == IpAddr::V6(PROBE_V6) || self.node.contains(&ip)
    }

    /// The roots of federated trust domains.
    pub fn trust(&self) -> &Bundles {
        &self.trust
    }

    /// Whether `identity` is of another trust domain than `workload`, by every name that the latter's has. Then it has no
    /// namespace and no account of this mesh, whatever they are called.
    pub fn is_foreign(&self, workload: &Workload, identity: &SpiffeId) -> bool {
        !self.aliases.covers(workload.identity.trust_domain(), identity.trust_domain())
    }

    /// Addresses of the node itself.
    pub fn node_addresses(&self) -> &Arc<[IpAddr]> {
        &self.node
    }
}

/// The order in which services of one address or name are tried; the rest of the ranking depends on the client.
fn best_for<'a>(client_namespace: &str, services: impl Iterator<Item = &'a Arc<Service>>) -> Option<&'a Arc<Service>> {
    services
        .filter(|service| service.visible_to(client_namespace))
        .min_by_key(|service| (*service.namespace != *client_namespace, !service.canonical))
}

/// Whether `net` is the single address `ip`.
pub(super) fn is_host(net: &IpNet, ip: IpAddr) -> bool {
    net.prefix_len() == net.max_prefix_len() && net.addr() == ip
}
