//! Where a captured connection goes. Pure: one snapshot, chance and experience in, a plan without choices out. When an
//! endpoint cannot be reached the same question is asked again, on the same snapshot, with what was tried.
//!
//! `tulle explain` asks this very function, so what it says is what happens.

use std::net::SocketAddr;
use std::sync::Arc;

use tulle_certs::SpiffeId;
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::base::sockets::Keepalive;
use crate::hbone::pool::Beyond;
use crate::lb::{self, Chance, Choice, NoChoice};
use crate::outbound::elsewhere;
use crate::outbound::waypoint::{self, Asked};
use crate::outcome::{Code, Outcome};
use crate::policy::network;
use crate::state::{EgressMode, Protocol, Service, Snapshot, Transport, Workload};

/// What to do.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Through a tunnel.
    Hbone(Hbone),
    /// As it is.
    Plain(Plain),
}

/// Through a tunnel to the destination's node.
#[derive(Clone, Debug)]
pub struct Hbone {
    /// Where the tunnel goes.
    pub address: SocketAddr,
    /// What it is asked for: the endpoint, or what the client dialled.
    pub authority: SocketAddr,
    /// Who may be there.
    pub expected: Arc<[SpiffeId]>,
    /// The endpoint.
    pub destination: Arc<Workload>,
    /// The service that the client addressed.
    pub service: Option<Arc<Service>>,
    /// The service has endpoints besides that were not tried.
    pub others: bool,
    /// What is at `address` is a waypoint, an egress gateway or one of a network, which decides for itself where to go on.
    pub through: bool,
    /// It is the gateway to another network, and in the tunnel to it is another one.
    pub beyond: Option<Beyond>,
    /// Host and port that an egress gateway is asked for, in the place of `authority`.
    pub name: Option<Arc<str>>,
    /// What a traffic policy says of the tunnel's connection.
    pub keepalive: Option<Keepalive>,
}

impl Hbone {
    /// What the other side is asked for.
    pub fn asks_for(&self) -> Arc<str> {
        match (&self.name, &self.beyond) {
            (Some(name), _) => name.clone(),
            (None, Some(beyond)) => beyond.authority.clone(),
            (None, None) => self.authority.to_string().into(),
        }
    }

    /// Everybody who may be met on the way.
    pub fn believed(&self) -> Arc<[SpiffeId]> {
        match &self.beyond {
            Some(beyond) => self.expected.iter().chain(&*beyond.expected).cloned().collect(),
            None => self.expected.clone(),
        }
    }
}

/// Plain TCP.
#[derive(Clone, Debug)]
pub struct Plain {
    /// Where to.
    pub address: SocketAddr,
    /// The endpoint, if it is known.
    pub destination: Option<Arc<Workload>>,
    /// The service that the client addressed.
    pub service: Option<Arc<Service>>,
    /// The service has endpoints besides that were not tried.
    pub others: bool,
    /// What a traffic policy says of the connection.
    pub keepalive: Option<Keepalive>,
}

impl Plan {
    /// Whether another endpoint may do as well.
    pub fn others(&self) -> bool {
        match self {
            Self::Hbone(plan) => plan.others,
            Self::Plain(plan) => plan.others,
        }
    }

    /// Address and port of the application, or of the waypoint or gateway.
    pub fn endpoint(&self) -> SocketAddr {
        match self {
            Self::Hbone(plan) if plan.through => plan.address,
            Self::Hbone(plan) => plan.authority,
            Self::Plain(plan) => plan.address,
        }
    }

    /// The service that the client addressed.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Hbone(plan) => plan.service.as_ref(),
            Self::Plain(plan) => plan.service.as_ref(),
        }
    }

    /// The endpoint, if it is known.
    pub fn destination(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Hbone(plan) => Some(&plan.destination),
            Self::Plain(plan) => plan.destination.as_ref(),
        }
    }
}

/// Decides for a connection of `source` to `destination`.
///
/// # Errors
/// Why the connection is refused.
pub fn decide(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    destination: SocketAddr,
    chance: &Chance<'_>,
) -> Result<Plan, Outcome> {
    let plan = choose(snapshot, source, network, destination, chance)?;
    permit(snapshot, source, &plan)?;
    Ok(plan)
}

/// Whether the NetworkPolicies of `source` let `plan` out.
///
/// # Errors
/// Why not.
pub fn permit(snapshot: &Snapshot, source: &Workload, plan: &Plan) -> Result<(), Outcome> {
    // What a NetworkPolicy names is the endpoint and its port, not the Service that led there.
    network::egress(snapshot, source, Transport::Tcp, plan.endpoint()).outcome()
}

/// [`decide`] without the NetworkPolicies of `source`, for who has to say which endpoint [`permit`] refuses.
///
/// # Errors
/// Why the connection is refused.
pub fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    destination: SocketAddr,
    chance: &Chance<'_>,
) -> Result<Plan, Outcome> {
    if destination.ip().is_loopback() && is_own_port(destination.port()) {
        let text = format!("the pod called the proxy's own port {}", destination.port());
        return Err(Outcome::new(Code::SelfCall, text));
    }
    if let Some(service) = snapshot.service_at(network, destination, &source.namespace) {
        return to_service(snapshot, source, service, destination, chance);
    }
    if let Some((service, workload)) = snapshot.api_server_at(destination).filter(|(_, workload)| !workload.is_pod()) {
        // As if its Service had led there.
        return Ok(to_workload(workload.clone(), destination, (Some(service.clone()), None), false));
    }
    if let Some(workload) = snapshot.workload_by_ip(network, destination.ip()) {
        if let Some(gateway) = &workload.waypoint {
            let asked = Asked { snapshot, source, destination, service: None, chance };
            if let Some(plan) = waypoint::plan(&asked, gateway)? {
                return Ok(plan);
            }
        }
        if !workload.is_pod() {
            may_leave(source, destination)?;
        }
        if workload.network != source.network && workload.network_gateway.is_some() {
            let text = format!(
                "{destination} is in network {}, and is no address of a Service, by whose name its gateway could be asked; \
                 call a Service",
                workload.network
            );
            return Err(Outcome::new(Code::NoNetworkGateway, text));
        }
        return Ok(to_workload(workload.clone(), destination, (None, None), false));
    }
    may_leave(source, destination)?;
    Ok(Plan::Plain(Plain { address: destination, destination: None, service: None, others: false, keepalive: None }))
}

/// [`choose`] for a connection to a Service that is known, as a route names it: `destination` is one of its addresses, or of
/// the family that is preferred, with its port.
///
/// # Errors
/// Why the connection is refused.
pub fn to_service(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Arc<Service>,
    destination: SocketAddr,
    chance: &Chance<'_>,
) -> Result<Plan, Outcome> {
    if let Some(gateway) = waypoint::of_service(service, chance.random) {
        let asked = Asked { snapshot, source, destination, service: Some(service), chance };
        if let Some(plan) = waypoint::plan(&asked, gateway)? {
            return Ok(plan);
        }
    }
    match lb::pick(snapshot, service, destination.port(), source, destination.ip(), chance) {
        Ok(choice) if choice.is_elsewhere() => {
            let asked = Asked { snapshot, source, destination, service: Some(service), chance };
            let beyond = elsewhere::beyond(service, destination.port(), &service.subject_alt_names);
            elsewhere::plan(&asked, service, choice.workload, beyond)
        }
        Ok(Choice { workload, ip, port, others }) => {
            may_go_to(source, service, &workload, SocketAddr::new(ip, port))?;
            let settings = snapshot.traffic_for(service, destination.port(), &source.namespace);
            let keepalive = settings.and_then(|(_, settings)| settings.keepalive);
            Ok(to_workload(workload, SocketAddr::new(ip, port), (Some(service.clone()), keepalive), others))
        }
        Err(NoChoice::Passthrough) => {
            may_leave(source, destination)?;
            let service = Some(service.clone());
            Ok(Plan::Plain(Plain { address: destination, destination: None, service, others: false, keepalive: None }))
        }
        Err(none @ NoChoice::Ejected { .. }) => Err(Outcome::new(Code::Ejected, none.to_string())),
        Err(none) => Err(Outcome::new(Code::NoEndpoint, none.to_string())),
    }
}

/// Whether `source` may go to one endpoint of `service`: what is no pod is outside.
///
/// # Errors
/// Why not.
pub fn may_go_to(source: &Workload, service: &Service, endpoint: &Workload, at: SocketAddr) -> Result<(), Outcome> {
    if is_outside(Some(service), Some(endpoint)) { may_leave(source, at) } else { Ok(()) }
}

/// Whether what a connection goes to is outside the cluster: everything but pods, and what is behind `default/kubernetes`, which the
/// API server itself keeps.
pub(super) fn is_outside(service: Option<&Service>, endpoint: Option<&Workload>) -> bool {
    endpoint.is_none_or(|workload| !workload.is_pod() && !service.is_some_and(|service| service.is_api_server()))
}

/// Where a connection goes whose endpoint is in another network.
///
/// # Errors
/// Why its gateway cannot be used.
pub fn through_gateway(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Arc<Service>,
    endpoint: &Arc<Workload>,
    destination: SocketAddr,
) -> Result<SocketAddr, Outcome> {
    let asked = Asked { snapshot, source, destination, service: Some(service), chance: &Chance::of(0) };
    let beyond = elsewhere::beyond(service, destination.port(), &service.subject_alt_names);
    elsewhere::plan(&asked, service, endpoint.clone(), beyond).map(|plan| plan.endpoint())
}

/// Whether a connection may leave the cluster. What is no pod is outside, also behind a Service: otherwise a Service of
/// any namespace could lead there.
pub(super) fn may_leave(source: &Workload, destination: SocketAddr) -> Result<(), Outcome> {
    if source.egress != EgressMode::Deny {
        return Ok(());
    }
    let text = format!(
        "{destination} is outside the cluster, and namespace {} is labelled tulle.dev/egress: deny",
        source.namespace
    );
    Err(Outcome::new(Code::EgressDenied, text))
}

fn to_workload(
    workload: Arc<Workload>,
    target: SocketAddr,
    (service, keepalive): (Option<Arc<Service>>, Option<Keepalive>),
    others: bool,
) -> Plan {
    match workload.protocol {
        Protocol::Plain => {
            Plan::Plain(Plain { address: target, destination: Some(workload), service, others, keepalive })
        }
        Protocol::Hbone => {
            let mut expected = vec![workload.identity.clone()];
            if let Some(service) = &service {
                expected.extend(service.subject_alt_names.iter().filter(|san| **san != workload.identity).cloned());
            }
            Plan::Hbone(Hbone {
                address: SocketAddr::new(target.ip(), PORT_HBONE),
                authority: target,
                expected: expected.into(),
                destination: workload,
                service,
                others,
                through: false,
                beyond: None,
                name: None,
                keepalive,
            })
        }
    }
}

fn is_own_port(port: u16) -> bool {
    matches!(port, PORT_OUTBOUND | PORT_INBOUND_PLAINTEXT | PORT_HBONE)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};
    use std::sync::Arc;

    use ipnet::IpNet;

    use super::{Plan, decide};
    use crate::lb::Chance;
    use crate::state::fixtures::{behind, key, port, service, snapshot, workload};
    use crate::state::{Change, EgressMode, Protocol, ServiceInfo, ServiceSpec, Workload};

    fn change(workload: Workload) -> Change {
        Change::Workload(workload.into())
    }

    /// One line of what is decided for a client of namespace `shop`.
    fn decided(changes: Vec<Change>, to: &str, tried: &[&str]) -> String {
        let snapshot = snapshot(changes);
        let tried: Vec<SocketAddr> = tried.iter().map(|address| address.parse().unwrap()).collect();
        let chance = Chance { tried: &tried, ..Chance::of(1) };
        let client = workload("shop", "client", "10.0.0.99");
        match decide(&snapshot, &client, "", to.parse().unwrap(), &chance) {
            Err(outcome) => outcome.code.name().to_owned(),
            Ok(Plan::Hbone(plan)) => format!("{} over {}, others {}", plan.authority, plan.address, plan.others),
            Ok(Plan::Plain(plan)) => {
                format!("{} plain, known {}, others {}", plan.address, plan.destination.is_some(), plan.others)
            }
        }
    }

    #[test]
    fn of_the_api_servers_node_exactly_its_own_port_is_inside() {
        let outsider = |namespace: &str, of: Workload| Workload {
            uid: format!("Kubernetes/discovery.k8s.io/EndpointSlice/{namespace}/x/192.0.2.10").into(),
            protocol: Protocol::Plain,
            ..of
        };
        let own = Workload {
            services: [(key("default", "kubernetes"), vec![port(443, 6443)])].into_iter().collect(),
            ..outsider("default", workload("default", "kubernetes", "192.0.2.10"))
        };
        // Others have Services that lead to the same node.
        let other = outsider("backup", behind(workload("backup", "x", "192.0.2.10"), "backup", "x"));
        let spec = ServiceSpec { ports: vec![port(443, 6443)], ..service("default", "kubernetes", "10.96.0.1") };
        let client = Workload { egress: EgressMode::Deny, ..workload("shop", "client", "10.0.0.99") };
        let at = |changes: Vec<Change>, to: &str| {
            let plan = decide(&snapshot(changes), &client, "", to.parse().unwrap(), &Chance::of(1));
            plan.map(|plan| plan.endpoint().to_string()).map_err(|outcome| outcome.code.name())
        };
        let all = || vec![change(other.clone()), change(own.clone()), Change::Service(spec.clone().into())];
        for (to, expected) in [
            ("10.96.0.1:443", Ok("192.0.2.10:6443")),
            ("192.0.2.10:6443", Ok("192.0.2.10:6443")),
            ("[::ffff:192.0.2.10]:6443", Ok("[::ffff:192.0.2.10]:6443")),
            ("192.0.2.10:443", Err("EGRESS_DENIED")),
            ("192.0.2.10:22", Err("EGRESS_DENIED")),
            ("192.0.2.11:6443", Err("EGRESS_DENIED")),
        ] {
            assert_eq!(at(all(), to), expected.map(str::to_owned), "{to}");
        }
        assert_eq!(at(vec![change(other.clone()), change(own.clone())], "192.0.2.10:6443"), Err("EGRESS_DENIED"));
    }

    #[test]
    fn each_destination_has_one_plan() {
        let pod = |name: &str, ip: &str| behind(workload("shop", name, ip), "shop", "cart");
        let cart = || Change::Service(service("shop", "cart", "10.96.0.1").into());
        let one = || vec![change(pod("a", "10.0.0.1")), cart()];
        let two = || vec![change(pod("a", "10.0.0.1")), change(pod("b", "10.0.0.2")), cart()];
        let plain = Workload { protocol: Protocol::Plain, ..pod("a", "10.0.0.1") };
        let info = ServiceInfo { cluster_addresses: vec!["10.96.0.1".parse().unwrap()], ..ServiceInfo::default() };
        let vips = ["10.96.0.1", "192.0.2.1"].map(|ip| (Arc::from(""), IpNet::from(ip.parse::<IpAddr>().unwrap())));
        let external =
            ServiceSpec { vips: vips.to_vec(), info: Some(Box::new(info)), ..service("shop", "cart", "10.96.0.1") };
        let external = || vec![change(pod("a", "10.0.0.1")), Change::Service(external.clone().into())];
        type Case<'a> = (&'static str, Vec<Change>, &'static str, &'a [&'a str], &'static str);
        let cases: Vec<Case<'_>> = vec![
            ("a service", one(), "10.96.0.1:80", &[], "10.0.0.1:8080 over 10.0.0.1:15008, others false"),
            ("a pod", two(), "10.0.0.1:8080", &[], "10.0.0.1:8080 over 10.0.0.1:15008, others false"),
            (
                "one was tried",
                two(),
                "10.96.0.1:80",
                &["10.0.0.1:8080"],
                "10.0.0.2:8080 over 10.0.0.2:15008, others false",
            ),
            ("all were tried", two(), "10.96.0.1:80", &["10.0.0.1:8080", "10.0.0.2:8080"], "NO_ENDPOINT"),
            ("a port it has not", one(), "10.96.0.1:81", &[], "NO_ENDPOINT"),
            (
                "an endpoint outside the mesh",
                vec![change(plain), cart()],
                "10.96.0.1:80",
                &[],
                "10.0.0.1:8080 plain, known true, others false",
            ),
            (
                "an endpoint of the other family only",
                vec![change(pod("six", "2001:db8::1")), cart()],
                "10.96.0.1:80",
                &[],
                "[2001:db8::1]:8080 over [2001:db8::1]:15008, others false",
            ),
            (
                "an address of a service and of a workload is the service's",
                vec![change(workload("shop", "same", "10.96.0.1")), change(pod("a", "10.0.0.1")), cart()],
                "10.96.0.1:80",
                &[],
                "10.0.0.1:8080 over 10.0.0.1:15008, others false",
            ),
            ("an external address", external(), "192.0.2.1:80", &[], "10.0.0.1:8080 over 10.0.0.1:15008, others false"),
            ("its other ports", external(), "192.0.2.1:22", &[], "192.0.2.1:22 plain, known false, others false"),
            ("nobody's address", one(), "198.51.100.1:80", &[], "198.51.100.1:80 plain, known false, others false"),
        ];
        for (name, changes, to, tried, expected) in cases {
            assert_eq!(decided(changes, to, tried), expected, "{name}");
        }
    }
}
