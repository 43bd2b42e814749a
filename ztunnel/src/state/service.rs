//! A service: a name, virtual addresses, and its endpoints in a form that a choice is quick to make from.
//!
//! What control says ([`ServiceSpec`]) is kept apart from what the store derives ([`Endpoints`]), so that a change of one
//! endpoint copies a pointer and not the service. A `Service` reads as its spec.

use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tulle_certs::SpiffeId;

use crate::state::{Endpoints, GatewayAddress, Port, Record};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Family of an address.
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Families that a service's endpoints may be dialled by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IpFamilies {
    /// Both, as endpoints have them.
    #[default]
    Automatic,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an endpoint may be dialled at `ip`.
    pub fn allow(self, ip: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::V4Only => ip.is_ipv4(),
            Self::V6Only => ip.is_ipv6(),
        }
    }
}

/// Who finds the service by address or name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients of the same namespace.
    Namespace,
}

/// What of a place is compared between client and endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalityScope {
    /// Region.
    Region,
    /// Zone.
    Zone,
    /// Subzone.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// How endpoints are narrowed before the weighted choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Not at all.
    #[default]
    All,
    /// Only endpoints that match every scope.
    Strict,
    /// Endpoints that match the longest prefix of the scopes.
    Failover,
    /// No balancing: the connection goes where the client addressed it.
    Passthrough,
}

/// Which endpoints are candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// Scopes, most important first.
    pub routing_preference: Vec<LocalityScope>,
    /// What the scopes do.
    pub mode: Mode,
    /// Which endpoints are candidates.
    pub health_policy: HealthPolicy,
    /// How long a pod that opens no new connection stays with the endpoint that it got; none: each connection is chosen
    /// for itself.
    pub affinity: Option<Duration>,
}

/// What a service's name stands for beyond its endpoints: the extension `tulle.dev/service`, as `tulle_workload.proto`
/// documents it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceInfo {
    /// Every port, also those that are not TCP.
    pub ports: Vec<NamedPort>,
    /// Another name that it stands for. Empty: none.
    pub external_name: Arc<str>,
    /// clusterIP: None.
    pub headless: bool,
    /// What its name stands for. Empty: all of its virtual addresses.
    pub cluster_addresses: Vec<IpAddr>,
    /// Ports that are not TCP, where policies need them.
    pub datagrams: Vec<DatagramPort>,
}

/// A port of any transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Port that clients dial.
    pub number: u16,
    /// Name. Empty: the only port, without a name.
    pub name: Arc<str>,
    /// What carries its bytes.
    pub transport: Transport,
}

/// A port that is not TCP, with the endpoints behind it: the proxy does not carry it, but policies judge it by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatagramPort {
    /// What carries its bytes; not TCP.
    pub transport: Transport,
    /// Port that clients dial.
    pub number: u16,
    /// Address and port of each endpoint.
    pub endpoints: Vec<SocketAddr>,
}

/// What carries a port's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// The word in the name of an SRV record.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A service as control describes it. The fields are those of `workload.proto`, which documents units and defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSpec {
    /// Version of the resource as control named it. Empty: it has none.
    pub version: Arc<str>,
    /// Kubernetes name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Fully qualified host name, or `*.suffix`.
    pub hostname: Arc<str>,
    /// Virtual addresses with their network: single ones are full-length prefixes. Empty: headless.
    pub vips: Vec<(Arc<str>, IpNet)>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Server identities that a client accepts besides the endpoint's own.
    pub subject_alt_names: Vec<SpiffeId>,
    /// How an endpoint is chosen.
    pub lb: LoadBalancing,
    /// Families that endpoints may be dialled by.
    pub ip_families: IpFamilies,
    /// Wins over other definitions of the same host: a Kubernetes Service.
    pub canonical: bool,
    /// Who finds it.
    pub visibility: Visibility,
    /// Waypoint for traffic addressed to it.
    pub waypoint: Option<GatewayAddress>,
    /// Waypoints to choose from by weight, before `waypoint`.
    pub weighted_waypoints: Vec<(GatewayAddress, u32)>,
    /// What its name stands for. `None`: control has not said.
    pub info: Option<Box<ServiceInfo>>,
}

impl ServiceSpec {
    /// The resource name, `<namespace>/<hostname>`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    /// Whether it is the API server's, which keeps it itself.
    pub fn is_api_server(&self) -> bool {
        *self.namespace == *"default" && *self.name == *"kubernetes"
    }

    /// Whether clients of `namespace` find it.
    pub fn visible_to(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || *self.namespace == *namespace
    }

    /// Whether `ip`, one of its addresses, is one that it has besides its cluster addresses.
    pub fn is_external(&self, ip: IpAddr) -> bool {
        let cluster = self.info.as_ref().map_or(&[][..], |info| &info.cluster_addresses);
        !cluster.is_empty() && !cluster.contains(&ip.to_canonical())
    }

    /// Every waypoint that a connection to it may be given.
    pub fn waypoints(&self) -> impl Iterator<Item = &GatewayAddress> {
        self.weighted_waypoints.iter().map(|(gateway, _)| gateway).chain(&self.waypoint)
    }

    /// The definition of a service port.
    pub fn port(&self, service_port: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.service_port == service_port)
    }
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Service {
    spec: Arc<ServiceSpec>,
    /// Derived by the store from the workloads that name this service.
    pub endpoints: Arc<Endpoints>,
}

impl Service {
    pub(super) fn new(spec: Arc<ServiceSpec>, endpoints: Endpoints) -> Self {
        Self { spec, endpoints: Arc::new(endpoints) }
    }

    /// The same endpoints behind another spec.
    pub(super) fn respecified(&self, spec: Arc<ServiceSpec>) -> Self {
        Self { spec, endpoints: self.endpoints.clone() }
    }

    /// How many endpoints a port has that may be chosen, wherever they are.
    pub fn candidates(&self, port: u16) -> usize {
        self.endpoints.ports.get(&port).map_or(0, |tables| tables.all.candidates.len())
    }

    /// Addresses and ports of one of its endpoints.
    pub fn sockets(&self, endpoint: &Record) -> Vec<SocketAddr> {
        let memberships = endpoint.services();
        let own = memberships.get(&self.key()).filter(|ports| !ports.is_empty());
        let ports = own.unwrap_or(&self.ports);
        let number = |port: &Port| if port.target_port == 0 { port.service_port } else { port.target_port };
        endpoint.addresses().flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, number(port)))).collect()
    }

    /// What control says, shared.
    pub fn spec(&self) -> &Arc<ServiceSpec> {
        &self.spec
    }
}

impl Deref for Service {
    type Target = ServiceSpec;

    fn deref(&self) -> &ServiceSpec {
        &self.spec
    }
}
