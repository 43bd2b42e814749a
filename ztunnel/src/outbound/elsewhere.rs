//! Traffic to an endpoint in another network: through that network's gateway, in a tunnel inside a tunnel. Pure.
//!
//! The outer tunnel ends at the gateway, which must prove to be it; it is asked for the Service by name, chooses one of its
//! endpoints there, and passes bytes on that it cannot read. In them is the inner tunnel, whose end must prove one of the
//! identities that control names for the Service: without any, there is nobody to believe, and the connection ends. What
//! NetworkPolicies of the source judge is the gateway, because that is where the connection goes. Limits: what is dialled
//! must be a Service, since addresses of another network mean nothing here; a gateway that fails is not left for an endpoint
//! of this network.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::hbone::pool::Beyond;
use crate::lb;
use crate::outbound::decide::{Hbone, Plan, may_leave};
use crate::outbound::waypoint::{Asked, name};
use crate::outcome::{Code, Outcome};
use crate::state::{EgressMode, Gateway, GatewayAddress, IpFamily, Service, Workload};

/// The tunnel behind a gateway to `port` of `service`, at whose end one of `expected` may be.
pub(super) fn beyond(service: &Service, port: u16, expected: &[SpiffeId]) -> Beyond {
    Beyond { authority: format!("{}:{port}", service.hostname).into(), expected: expected.into() }
}

/// The way to `destination`, which is an endpoint of `service` in another network, or its waypoint there.
///
/// # Errors
/// Why the gateway cannot be used.
pub(super) fn plan(
    asked: &Asked<'_>,
    service: &Arc<Service>,
    destination: Arc<Workload>,
    beyond: Beyond,
) -> Result<Plan, Outcome> {
    let Asked { snapshot, source, chance, .. } = *asked;
    let network = &destination.network;
    let unusable = |gateway: Option<&GatewayAddress>, why: &str| {
        let gateway = gateway.map_or_else(|| "none".to_owned(), name);
        let text = format!(
            "{} is in network {network}, whose gateway ({gateway}) cannot be used: {why}; correct the gateway, or run \
             endpoints in this network",
            service.key()
        );
        Outcome::new(Code::NoNetworkGateway, text)
    };
    let gateway = destination.network_gateway.as_deref();
    let gateway = gateway.ok_or_else(|| unusable(None, "control names none"))?;
    if beyond.expected.is_empty() {
        return Err(unusable(Some(gateway), "control names no identities (subject_alt_names) for who is behind it"));
    }
    let prefer = asked.destination.ip();
    let (at, names, address) = match snapshot.gateway(gateway, &source.namespace) {
        None => return Err(unusable(Some(gateway), "it is not known")),
        Some(Gateway::Service(found)) => {
            let picked = lb::pick(snapshot, found, gateway.hbone_port, source, prefer, chance);
            let picked = picked.map_err(|none| unusable(Some(gateway), &none.to_string()))?;
            if picked.is_elsewhere() {
                return Err(unusable(Some(gateway), "it is behind a gateway itself"));
            }
            (picked.workload, &found.subject_alt_names[..], SocketAddr::new(picked.ip, picked.port))
        }
        Some(Gateway::Workload(found)) => {
            let ip = found.address(IpFamily::of(prefer));
            let ip = ip.ok_or_else(|| unusable(Some(gateway), "it has no address"))?;
            (found.clone(), &[][..], SocketAddr::new(ip, gateway.hbone_port))
        }
    };
    // Another network is another cluster's, and so outside of this one.
    if source.egress == EgressMode::Deny {
        may_leave(source, address)?;
    }
    let also = names.iter().filter(|id| **id != at.identity);
    let expected = std::iter::once(&at.identity).chain(also).cloned().collect();
    Ok(Plan::Hbone(Hbone {
        address,
        // Nobody's: the Service is asked for by name.
        authority: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), asked.destination.port()),
        expected,
        destination,
        service: Some(service.clone()),
        others: false,
        through: true,
        beyond: Some(beyond),
        name: None,
        keepalive: None,
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::lb::Chance;
    use crate::outbound::decide::{Plan, decide};
    use crate::outcome::Code;
    use crate::state::fixtures::{behind, identity, key, port, service, snapshot, with_ports, workload};
    use crate::state::{Change, EgressMode, GatewayAddress, GatewayTarget, ServiceSpec, Workload};

    fn gateway(target: GatewayTarget) -> Option<Box<GatewayAddress>> {
        Some(Box::new(GatewayAddress { target, hbone_port: 15008 }))
    }

    fn at(network: &str, ip: &str) -> Option<Box<GatewayAddress>> {
        gateway(GatewayTarget::Address { network: network.into(), ip: ip.parse().unwrap() })
    }

    /// An endpoint of `shop/cart` in network `far`, as control coalesces them: without an address.
    fn remote(network_gateway: Option<Box<GatewayAddress>>) -> Change {
        let pod = behind(workload("shop", "far", "10.0.0.9"), "shop", "cart");
        let pod = Workload { network: "far".into(), addresses: Vec::new(), network_gateway, ..pod };
        Change::Workload(pod.into())
    }

    fn east_west() -> Change {
        let own = Workload {
            uid: "NetworkGateway/far/198.51.100.1/15008".into(),
            network: "far".into(),
            identity: identity("infra", "east-west"),
            ..workload("infra", "east-west", "198.51.100.1")
        };
        Change::Workload(own.into())
    }

    fn cart(names: &[&str]) -> ServiceSpec {
        let subject_alt_names = names.iter().map(|name| identity("shop", name)).collect();
        ServiceSpec { subject_alt_names, ..service("shop", "cart", "10.96.0.1") }
    }

    fn planned(changes: Vec<Change>, source: &Workload) -> Result<String, Code> {
        match decide(&snapshot(changes), source, "", "10.96.0.1:80".parse().unwrap(), &Chance::of(7)) {
            Ok(Plan::Hbone(plan)) => {
                let accounts = |ids: &[tulle_certs::SpiffeId]| {
                    ids.iter().map(|id| id.service_account().to_owned()).collect::<Vec<_>>().join("+")
                };
                let beyond = plan.beyond.as_ref().map(|beyond| accounts(&beyond.expected));
                let beyond = beyond.map(|names| format!(", in it {names}")).unwrap_or_default();
                Ok(format!("{} over {} as {}{beyond}", plan.asks_for(), plan.address, accounts(&plan.expected)))
            }
            Ok(Plan::Plain(plan)) => Ok(format!("{} plain", plan.address)),
            Err(outcome) => Err(outcome.code),
        }
    }

    #[test]
    fn another_network_is_reached_through_its_gateway_to_proven_identities_or_not_at_all() {
        let client = workload("shop", "client", "10.0.0.99");
        let fenced = Workload { egress: EgressMode::Deny, ..client.clone() };
        let spec = |names: &[&str]| Change::Service(cart(names).into());
        let pods = {
            let pod = workload("infra", "gw-0", "10.0.8.1");
            let pod = with_ports(pod, key("infra", "gw"), vec![port(15008, 15018)]);
            let names = vec![identity("infra", "any-gateway")];
            let ports = vec![port(15008, 0)];
            let spec = ServiceSpec { subject_alt_names: names, ports, ..service("infra", "gw", "10.96.8.1") };
            move || vec![Change::Workload(pod.clone().into()), Change::Service(spec.clone().into())]
        };
        let named = || {
            let hostname = "gw.infra.svc.cluster.local".into();
            gateway(GatewayTarget::Hostname { namespace: "infra".into(), hostname })
        };
        let by_ip = || at("far", "198.51.100.1");
        let host = "cart.shop.svc.cluster.local:80";
        let through = format!("{host} over 198.51.100.1:15008 as east-west, in it cart");
        let no = Err(Code::NoNetworkGateway);
        let with = |first: Vec<Change>, more: Vec<Change>| first.into_iter().chain(more).collect::<Vec<_>>();
        for (name, changes, source, expected) in [
            ("by address", vec![remote(by_ip()), east_west(), spec(&["cart"])], &client, Ok(through)),
            (
                "by name",
                with(pods(), vec![remote(named()), spec(&["cart", "b"])]),
                &client,
                Ok(format!("{host} over 10.0.8.1:15018 as gw-0+any-gateway, in it cart+b")),
            ),
            ("nobody to believe", vec![remote(by_ip()), east_west(), spec(&[])], &client, no.clone()),
            ("an unknown gateway", vec![remote(by_ip()), spec(&["cart"])], &client, no.clone()),
            ("no gateway: no endpoint", vec![remote(None), spec(&["cart"])], &client, Err(Code::NoEndpoint)),
            (
                "what must not leave",
                vec![remote(by_ip()), east_west(), spec(&["cart"])],
                &fenced,
                Err(Code::EgressDenied),
            ),
        ] {
            assert_eq!(planned(changes, source), expected, "{name}");
        }
    }

    #[test]
    fn endpoints_here_and_elsewhere_share_by_weight() {
        let near = behind(workload("shop", "near", "10.0.0.1"), "shop", "cart");
        let near = Workload { network_gateway: at("", "198.51.100.7"), ..near };
        let changes = [Change::Workload(near.into()), remote(at("far", "198.51.100.1")), east_west()];
        let snapshot = snapshot(changes.into_iter().chain([Change::Service(cart(&["cart"]).into())]));
        let client = workload("shop", "client", "10.0.0.99");
        let elsewhere = (0..1000u64).filter(|step| {
            let chance = Chance::of(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let plan = decide(&snapshot, &client, "", "10.96.0.1:80".parse().unwrap(), &chance).unwrap();
            matches!(plan, Plan::Hbone(plan) if plan.beyond.is_some())
        });
        let elsewhere = elsewhere.count();
        assert!((400..600).contains(&elsewhere), "{elsewhere} of 1000");
    }

    #[test]
    fn a_waypoint_in_another_network_is_reached_through_its_gateway() {
        let hostname = "way.infra.svc.cluster.local".into();
        let target = GatewayTarget::Hostname { namespace: "infra".into(), hostname };
        let way = with_ports(workload("infra", "way-0", "10.0.9.1"), key("infra", "way"), vec![port(15008, 15008)]);
        let way = Workload {
            network: "far".into(),
            addresses: Vec::new(),
            network_gateway: at("far", "198.51.100.1"),
            ..way
        };
        let names = vec![identity("infra", "any-waypoint")];
        let ports = vec![port(15008, 15008)];
        let spec = ServiceSpec { subject_alt_names: names, ports, ..service("infra", "way", "10.96.9.1") };
        let waypoint = Some(GatewayAddress { target, hbone_port: 15008 });
        let changes = vec![
            Change::Workload(Arc::new(way)),
            Change::Service(spec.into()),
            east_west(),
            Change::Workload(behind(workload("shop", "cart", "10.0.0.1"), "shop", "cart").into()),
            Change::Service(ServiceSpec { waypoint, ..cart(&[]) }.into()),
        ];
        let client = workload("shop", "client", "10.0.0.99");
        let expected = "cart.shop.svc.cluster.local:80 over 198.51.100.1:15008 as east-west, in it any-waypoint";
        assert_eq!(planned(changes, &client), Ok(expected.to_owned()));
    }
}
