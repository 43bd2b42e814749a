//! Where a stream of a tunnel leads: always to the pod at whose address the tunnel arrived, and there to the port that it
//! asks for, or to the application that takes all of the pod's tunnels (`application_tunnel`). Pure.
//!
//! Another address is a wrong destination, unless the pod stands for it: as the waypoint of what owns the address, or by an
//! application tunnel, whose application gets to know what was asked for. Limit: an application that wants PROXY headers is
//! reached at the pod's loopback only, so that nobody else can tell it who they are.

use std::net::{IpAddr, SocketAddr};

use tulle_certs::SpiffeId;

use crate::hbone::headers::Authority;
use crate::outcome::{Code, Outcome};
use crate::state::{IpFamily, Service, Snapshot, Workload};

/// Who asks, and where.
pub(super) struct Asked<'a> {
    pub(super) snapshot: &'a Snapshot,
    /// Of this node.
    pub(super) network: &'a str,
    /// The pod. `None`: control has not described it yet.
    pub(super) pod: Option<&'a Workload>,
    /// Who proved to be the client.
    pub(super) client: &'a SpiffeId,
    /// The pod's address at which the tunnel arrived.
    pub(super) local: IpAddr,
}

/// Where a stream leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The application, as policies know it.
    pub(super) address: SocketAddr,
    /// What an application that wants a PROXY header is told that the client asked for.
    pub(super) told: Option<SocketAddr>,
}

/// Finds it.
///
/// # Errors
/// `WrongDestination`.
pub(super) fn find(asked: &Asked<'_>, authority: Authority) -> Result<Target, Outcome> {
    let tunnel = asked.pod.and_then(|pod| pod.application_tunnel);
    let (port, wanted) = match authority {
        Authority::Address(addr) => {
            if addr.ip() != asked.local && tunnel.is_none() && !stands_for(asked, addr.ip()) {
                let text = format!("the tunnel to {} asked for {addr}, which is not this pod", asked.local);
                return Err(Outcome::new(Code::WrongDestination, text));
            }
            (addr.port(), addr)
        }
        Authority::Host(host, port) => {
            // A foreign domain's namespace is none of ours, so nothing is open to it alone.
            let foreign = asked.pod.is_none_or(|pod| asked.snapshot.is_foreign(pod, asked.client));
            let namespace = if foreign { "" } else { asked.client.namespace() };
            named(asked, namespace, &host, port)?
        }
    };
    let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    let told = tunnel.filter(|tunnel| tunnel.proxy_protocol).map(|_| wanted);
    Ok(Target { address: SocketAddr::new(asked.local, port), told })
}

/// Whether the pod is the waypoint of what owns `ip`.
fn stands_for(asked: &Asked<'_>, ip: IpAddr) -> bool {
    let Asked { snapshot, network, client, .. } = *asked;
    let Some(pod) = asked.pod else { return false };
    let is_it = |gateway| snapshot.gateway(gateway, &pod.namespace).is_some_and(|found| found.is(pod));
    match snapshot.service_by_vip(network, ip, client.namespace()) {
        Some(service) => service.waypoints().any(is_it),
        None => {
            let workload = snapshot.workload_by_ip(network, ip);
            workload.and_then(|workload| workload.waypoint.as_deref()).is_some_and(is_it)
        }
    }
}

/// The pod's own port for a service's port, and the address that it stands for. The name means what it means to the client,
/// whose namespace is proven: a service that is hidden from it is none. An application tunnel need not have the port.
fn named(asked: &Asked<'_>, client_namespace: &str, host: &str, port: u16) -> Result<(u16, SocketAddr), Outcome> {
    let unknown = || {
        let text = format!("this pod is not an endpoint of {host}:{port}");
        Outcome::new(Code::WrongDestination, text)
    };
    let service = asked.snapshot.service_by_hostname(host, client_namespace).ok_or_else(unknown)?;
    let pod = asked.pod.ok_or_else(unknown)?;
    let wanted = SocketAddr::new(address(asked, service), port);
    let is_it = |gateway| asked.snapshot.gateway(gateway, &pod.namespace).is_some_and(|found| found.is(pod));
    if pod.application_tunnel.is_some() && service.waypoints().any(is_it) {
        return Ok((port, wanted));
    }
    let ports = pod.services.get(service.key().as_str()).ok_or_else(unknown)?;
    let own = ports.iter().find(|own| own.service_port == port).map(|own| own.target_port).filter(|port| *port != 0);
    let own = own.or_else(|| service.port(port).map(|port| port.target_port).filter(|port| *port != 0));
    Ok((own.ok_or_else(unknown)?, wanted))
}

/// A virtual address of `service`: of this network before others, of the tunnel's family before the other. Without any, the
/// pod's.
fn address(asked: &Asked<'_>, service: &Service) -> IpAddr {
    let family = IpFamily::of(asked.local);
    let rank = |(network, vip): &&(std::sync::Arc<str>, ipnet::IpNet)| {
        (**network != *asked.network, IpFamily::of(vip.addr()) != family)
    };
    service.vips.iter().min_by_key(rank).map_or(asked.local, |(_, vip)| vip.addr())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::{Asked, Target, find};
    use crate::outcome::Code;
    use crate::state::fixtures::{behind, identity, service, snapshot, workload};
    use crate::state::{ApplicationTunnel, Change, GatewayAddress, GatewayTarget, ServiceSpec, Visibility, Workload};

    /// Where a stream to pod `shop/cart-0` leads that asks for `authority`.
    fn found(changes: &[Change], pod: &Workload, from: &str, authority: &str) -> Result<Target, Code> {
        let snapshot = snapshot(changes.iter().cloned().chain([Change::Workload(pod.clone().into())]));
        let client = identity(from, "client");
        let asked = Asked {
            snapshot: &snapshot,
            network: "",
            pod: snapshot.workload(&pod.uid).map(|pod| &**pod),
            client: &client,
            local: pod.addresses[0],
        };
        find(&asked, authority.parse().unwrap()).map_err(|outcome| outcome.code)
    }

    fn at(address: &str) -> Target {
        Target { address: address.parse().unwrap(), told: None }
    }

    #[test]
    fn a_service_that_is_hidden_from_the_clients_namespace_cannot_be_asked_for() {
        let hidden = ServiceSpec { visibility: Visibility::Namespace, ..service("shop", "cart", "10.96.0.1") };
        let pod = behind(behind(workload("shop", "cart-0", "10.0.0.1"), "shop", "cart"), "shop", "open");
        let changes = [hidden, service("shop", "open", "10.96.0.2")].map(|spec| Change::Service(spec.into()));
        let to = || Ok(at("10.0.0.1:8080"));
        let no = || Err(Code::WrongDestination);
        for (from, name, port, expected) in [
            ("shop", "cart", 80, to()),
            ("bank", "cart", 80, no()),
            ("bank", "open", 80, to()),
            ("shop", "cart", 81, no()),
            ("shop", "other", 80, no()),
        ] {
            let authority = format!("{name}.shop.svc.cluster.local:{port}");
            assert_eq!(found(&changes, &pod, from, &authority), expected, "{name}:{port} from {from}");
        }
    }

    #[test]
    fn another_address_is_wrong_unless_the_pod_stands_for_it() {
        let target = GatewayTarget::Address { network: "".into(), ip: "10.0.0.1".parse().unwrap() };
        let gateway = || GatewayAddress { target: target.clone(), hbone_port: 15008 };
        let fronted = ServiceSpec { waypoint: Some(gateway()), ..service("shop", "fronted", "10.96.0.3") };
        let pod = Workload { waypoint: Some(Box::new(gateway())), ..workload("shop", "db", "10.0.0.5") };
        let changes = [
            Change::Service(service("shop", "cart", "10.96.0.1").into()),
            Change::Service(fronted.into()),
            Change::Workload(pod.into()),
        ];
        let plain = workload("shop", "cart-0", "10.0.0.1");
        let tunnel = |proxy_protocol, port| Workload {
            application_tunnel: Some(ApplicationTunnel { proxy_protocol, port }),
            ..plain.clone()
        };
        let told = |address: &str, of: &str| Target { told: Some(of.parse::<SocketAddr>().unwrap()), ..at(address) };
        let host = "fronted.shop.svc.cluster.local:80";
        let no = Err(Code::WrongDestination);
        for (name, pod, authority, expected) in [
            ("its own", &plain, "10.0.0.1:7", Ok(at("10.0.0.1:7"))),
            ("a stranger's", &plain, "10.0.0.9:7", no),
            ("a Service's", &plain, "10.96.0.1:80", no),
            ("a Service's that it is the waypoint of", &plain, "10.96.0.3:80", Ok(at("10.0.0.1:80"))),
            ("a pod's that it is the waypoint of", &plain, "10.0.0.5:80", Ok(at("10.0.0.1:80"))),
            ("any, by its port", &tunnel(false, Some(15088)), "10.0.0.9:7", Ok(at("10.0.0.1:15088"))),
            (
                "any, with a header",
                &tunnel(true, Some(15088)),
                "10.96.0.3:80",
                Ok(told("10.0.0.1:15088", "10.96.0.3:80")),
            ),
            ("a header and no port", &tunnel(true, None), "10.0.0.9:7", Ok(told("10.0.0.1:7", "10.0.0.9:7"))),
            ("by name", &tunnel(true, Some(15088)), host, Ok(told("10.0.0.1:15088", "10.96.0.3:80"))),
            ("by name, without a tunnel", &plain, host, no),
        ] {
            assert_eq!(found(&changes, pod, "shop", authority), expected, "{name}");
        }
    }
}
