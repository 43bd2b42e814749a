//! Traffic to a destination that has a waypoint: an L7 proxy that decides in the destination's place. Pure.
//!
//! Such a connection goes through a tunnel to the waypoint, which is asked for the very address that the client dialled
//! and goes on from there by itself. Going past it would go past its policy: one that is not known, has no endpoint or
//! cannot be reached ends the connection with `NO_WAYPOINT`, and a tunnel that fails is never replaced by another
//! way. What NetworkPolicies of the source judge is the waypoint, because that is where the connection goes. A waypoint's
//! own connections go to the destination directly. A Service's waypoint may be in another network, behind its gateway
//! (`elsewhere`); a single workload's may not, because there it could not be named.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::lb::{self, Chance, NoChoice};
use crate::outbound::decide::{Hbone, Plan, may_go_to, may_leave};
use crate::outbound::elsewhere;
use crate::outcome::{Code, Outcome};
use crate::state::{EgressMode, Gateway, GatewayAddress, GatewayTarget, IpFamily, Mode, Service, Snapshot, Workload};

/// Who asks, and for what.
pub(super) struct Asked<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) source: &'a Workload,
    /// What the client dialled.
    pub(super) destination: SocketAddr,
    /// The service that this means.
    pub(super) service: Option<&'a Arc<Service>>,
    pub(super) chance: &'a Chance<'a>,
}

/// Whether the requests of `source` to `service` are a waypoint's to decide, and not its own node's: then the routes and
/// traffic policies of the Service are carried out there, and nothing of them twice.
pub fn decides(snapshot: &Snapshot, source: &Workload, service: &Service) -> bool {
    let is_own =
        |gateway: &GatewayAddress| snapshot.gateway(gateway, &source.namespace).is_some_and(|found| found.is(source));
    let mut all = service.waypoints().peekable();
    all.peek().is_some() && !all.any(is_own)
}

/// The waypoint of `service` for one connection: of several, by weight.
pub(super) fn of_service(service: &Service, random: u64) -> Option<&GatewayAddress> {
    let weighted = &service.weighted_waypoints;
    let total: u64 = weighted.iter().map(|(_, weight)| u64::from(*weight)).sum();
    // Other bits than those that choose among its endpoints.
    let mut left = ((u128::from(random.rotate_left(32)) * u128::from(total)) >> 64) as u64;
    let drawn = weighted.iter().find(|(_, weight)| {
        let found = left < u64::from(*weight);
        left = left.saturating_sub(u64::from(*weight));
        found
    });
    // Weights of nothing do not take the waypoint away.
    drawn
        .map(|(gateway, _)| gateway)
        .or(service.waypoint.as_ref())
        .or_else(|| weighted.first().map(|(gateway, _)| gateway))
}

/// The way through `gateway`. `None`: the source is that waypoint itself.
///
/// # Errors
/// Why it cannot be taken.
pub(super) fn plan(asked: &Asked<'_>, gateway: &GatewayAddress) -> Result<Option<Plan>, Outcome> {
    let Asked { snapshot, source, destination, service, chance } = *asked;
    let found = snapshot.gateway(gateway, &source.namespace);
    let found = found.ok_or_else(|| unusable(asked, gateway, "it is not known"))?;
    if found.is(source) {
        return Ok(None);
    }
    let (workload, address, names, others) = match found {
        Gateway::Service(waypoint) => {
            let picked = lb::pick(snapshot, waypoint, gateway.hbone_port, source, destination.ip(), chance);
            let picked = picked.map_err(|none| match none {
                NoChoice::Passthrough => unusable(asked, gateway, "it is a service that is not balanced"),
                none => unusable(asked, gateway, &none.to_string()),
            })?;
            let address = SocketAddr::new(picked.ip, picked.port);
            if !picked.is_elsewhere() {
                may_go_to(source, waypoint, &picked.workload, address)?;
            }
            (picked.workload, address, &waypoint.subject_alt_names[..], picked.others)
        }
        Gateway::Workload(workload) => {
            let ip = workload.address(IpFamily::of(destination.ip()));
            let ip = ip.ok_or_else(|| unusable(asked, gateway, "it has no address"))?;
            let address = SocketAddr::new(ip, gateway.hbone_port);
            if !workload.is_pod() {
                may_leave(source, address)?;
            }
            (workload.clone(), address, &[][..], false)
        }
    };
    if workload.network != source.network {
        let Some(service) = service else { return Err(unusable(asked, gateway, "it is in another network")) };
        stays_inside(source, Some(service), destination)?;
        let beyond = elsewhere::beyond(service, destination.port(), names);
        return elsewhere::plan(asked, service, workload, beyond).map(Some);
    }
    // It is asked for an address, and another Service's would lead elsewhere.
    let is_its = |service: &Service| service.vips.iter().any(|(_, vip)| vip.contains(&destination.ip().to_canonical()));
    if service.is_some_and(|service| !is_its(service)) {
        return Err(unusable(asked, gateway, "it would be asked for the Service's address, and there is none"));
    }
    stays_inside(source, service.map(|service| &**service), destination)?;
    let also = names.iter().filter(|name| **name != workload.identity);
    let expected = std::iter::once(&workload.identity).chain(also).cloned().collect();
    Ok(Some(Plan::Hbone(Hbone {
        address,
        authority: destination,
        expected,
        destination: workload,
        service: service.cloned(),
        others,
        through: true,
        beyond: None,
        name: None,
        keepalive: None,
    })))
}

/// A waypoint is inside the cluster and may lead out of it: what must not leave must not leave through it either.
fn stays_inside(source: &Workload, service: Option<&Service>, destination: SocketAddr) -> Result<(), Outcome> {
    let Some(service) = service.filter(|_| source.egress == EgressMode::Deny) else { return Ok(()) };
    let endpoints = &service.endpoints.all;
    let is_inside = service.lb.mode != Mode::Passthrough
        && !endpoints.is_empty()
        && endpoints.iter().all(|endpoint| endpoint.workload().is_pod());
    if is_inside { Ok(()) } else { may_leave(source, destination) }
}

/// How people know a gateway.
pub(super) fn name(gateway: &GatewayAddress) -> String {
    match &gateway.target {
        GatewayTarget::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
        GatewayTarget::Address { network, ip } => format!("{network}/{ip}"),
    }
}

fn unusable(asked: &Asked<'_>, gateway: &GatewayAddress, why: &str) -> Outcome {
    let of = match asked.service {
        Some(service) => service.key(),
        None => asked.destination.ip().to_string(),
    };
    let name = name(gateway);
    let text = format!(
        "{of} is reached through its waypoint {name} only, which cannot be used: {why}; start the waypoint, or take \
         istio.io/use-waypoint away"
    );
    Outcome::new(Code::NoWaypoint, text)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::{decides, of_service};
    use crate::lb::Chance;
    use crate::outbound::decide::{Plan, decide, to_service};
    use crate::outcome::Code;
    use crate::state::fixtures::{behind, identity, service, snapshot, with_ports, workload};
    use crate::state::fixtures::{key, port};
    use crate::state::{Change, EgressMode, GatewayAddress, GatewayTarget, ServiceSpec, Workload};

    fn named(name: &str) -> GatewayAddress {
        let hostname = format!("{name}.infra.svc.cluster.local").into();
        GatewayAddress { target: GatewayTarget::Hostname { namespace: "infra".into(), hostname }, hbone_port: 15008 }
    }

    fn at(ip: &str) -> GatewayAddress {
        let target = GatewayTarget::Address { network: "".into(), ip: ip.parse().unwrap() };
        GatewayAddress { target, hbone_port: 15008 }
    }

    /// Waypoint `way` with one pod, whose service knows a second identity.
    fn way(name: &str, ip: &str, vip: &str) -> Vec<Change> {
        let pod = with_ports(workload("infra", &format!("{name}-0"), ip), key("infra", name), vec![port(15008, 15008)]);
        let spec = ServiceSpec {
            ports: vec![port(15008, 15008)],
            subject_alt_names: vec![identity("infra", "any-waypoint")],
            ..service("infra", name, vip)
        };
        vec![Change::Workload(pod.into()), Change::Service(spec.into())]
    }

    fn plan(changes: Vec<Change>, source: &Workload, to: &str) -> Result<String, Code> {
        let cart = behind(workload("shop", "cart", "10.0.0.1"), "shop", "cart");
        let changes = changes.into_iter().chain([Change::Workload(cart.into())]);
        let snapshot = snapshot(changes);
        match decide(&snapshot, source, "", to.parse().unwrap(), &Chance::of(7)) {
            Ok(Plan::Hbone(plan)) => {
                let expected: Vec<_> = plan.expected.iter().map(|id| id.service_account().to_owned()).collect();
                Ok(format!("{} over {} as {}", plan.authority, plan.address, expected.join("+")))
            }
            Ok(Plan::Plain(plan)) => Ok(format!("{} plain", plan.address)),
            Err(outcome) => Err(outcome.code),
        }
    }

    fn cart(waypoint: Option<GatewayAddress>) -> ServiceSpec {
        ServiceSpec { waypoint, ..service("shop", "cart", "10.96.0.1") }
    }

    #[test]
    fn a_destination_with_a_waypoint_is_reached_through_it_or_not_at_all() {
        let client = workload("shop", "client", "10.0.0.99");
        let fenced = Workload { egress: EgressMode::Deny, ..client.clone() };
        let service = |spec: ServiceSpec| vec![Change::Service(spec.into())];
        let with = |mut changes: Vec<Change>, more: Vec<Change>| {
            changes.extend(more);
            changes
        };
        let ready = || way("way", "10.0.9.1", "10.96.9.1");
        let pod = |gateway| {
            let pod = Workload { waypoint: Some(Box::new(gateway)), ..workload("shop", "db", "10.0.0.2") };
            vec![Change::Workload(pod.into())]
        };
        let far = |mut changes: Vec<Change>| {
            for change in &mut changes {
                if let Change::Workload(pod) = change {
                    Arc::make_mut(pod).network = "far".into();
                }
            }
            changes
        };
        let outside = || ServiceSpec { ports: vec![port(443, 443)], ..cart(Some(named("way"))) };
        let through = "10.96.0.1:80 over 10.0.9.1:15008 as way-0+any-waypoint";
        let db = "10.0.0.2:5432 over 10.0.9.1:15008 as way-0+any-waypoint";
        let no = Err(Code::NoWaypoint);
        type Case<'a> = (&'a str, Vec<Change>, &'a Workload, &'a str, Result<&'a str, Code>);
        let cases: Vec<Case<'_>> = vec![
            ("none", service(cart(None)), &client, "10.96.0.1:80", Ok("10.0.0.1:8080 over 10.0.0.1:15008 as cart")),
            ("by name", with(ready(), service(cart(Some(named("way"))))), &client, "10.96.0.1:80", Ok(through)),
            ("by address", with(ready(), service(cart(Some(at("10.96.9.1"))))), &client, "10.96.0.1:80", Ok(through)),
            (
                "by a pod's address",
                with(ready(), service(cart(Some(at("10.0.9.1"))))),
                &client,
                "10.96.0.1:80",
                Ok("10.96.0.1:80 over 10.0.9.1:15008 as way-0"),
            ),
            (
                "on any port",
                with(ready(), service(cart(Some(named("way"))))),
                &client,
                "10.96.0.1:99",
                Ok("10.96.0.1:99 over 10.0.9.1:15008 as way-0+any-waypoint"),
            ),
            ("not known", service(cart(Some(named("way")))), &client, "10.96.0.1:80", no),
            ("no such address", service(cart(Some(at("10.0.9.1")))), &client, "10.96.0.1:80", no),
            ("no endpoint", with(ready().split_off(1), service(cart(Some(named("way"))))), &client, "10.96.0.1:80", no),
            ("another network", with(far(ready()), service(cart(Some(named("way"))))), &client, "10.96.0.1:80", no),
            ("of a pod", with(ready(), pod(named("way"))), &client, "10.0.0.2:5432", Ok(db)),
            ("of a pod, not known", pod(named("way")), &client, "10.0.0.2:5432", no),
            (
                "a pod's does not count for its service",
                with(ready(), with(pod(named("way")), service(cart(None)))),
                &client,
                "10.96.0.1:80",
                Ok("10.0.0.1:8080 over 10.0.0.1:15008 as cart"),
            ),
            (
                "may not leave, nor need to",
                with(ready(), service(cart(Some(named("way"))))),
                &fenced,
                "10.96.0.1:80",
                Ok(through),
            ),
            (
                "must not leave through it",
                with(ready(), service(ServiceSpec { hostname: "example.com".into(), ..outside() })),
                &fenced,
                "10.96.0.1:443",
                Err(Code::EgressDenied),
            ),
        ];
        for (name, changes, source, to, expected) in cases {
            assert_eq!(plan(changes, source, to), expected.map(str::to_owned), "{name}");
        }
    }

    #[test]
    fn a_waypoint_s_own_connections_are_direct() {
        let own = with_ports(workload("infra", "way-0", "10.0.9.1"), key("infra", "way"), vec![port(15008, 15008)]);
        for gateway in [named("way"), at("10.0.9.1")] {
            let mut changes = way("way", "10.0.9.1", "10.96.9.1");
            changes.push(Change::Service(cart(Some(gateway)).into()));
            let direct = Ok("10.0.0.1:8080 over 10.0.0.1:15008 as cart".to_owned());
            assert_eq!(plan(changes, &own, "10.96.0.1:80"), direct);
        }
    }

    #[test]
    fn requests_are_the_waypoint_s_to_decide_but_for_its_own() {
        let own = with_ports(workload("infra", "way-0", "10.0.9.1"), key("infra", "way"), vec![port(15008, 15008)]);
        let client = workload("shop", "client", "10.0.0.99");
        for (name, gateway, source, expected) in [
            ("none", None, &client, false),
            ("one", Some(named("way")), &client, true),
            ("by address", Some(at("10.0.9.1")), &client, true),
            ("one that is not known", Some(named("gone")), &client, true),
            ("the source itself", Some(named("way")), &own, false),
            ("the source itself, by address", Some(at("10.0.9.1")), &own, false),
        ] {
            let mut changes = way("way", "10.0.9.1", "10.96.9.1");
            changes.push(Change::Service(cart(gateway).into()));
            let snapshot = snapshot(changes);
            let service = snapshot.service_at("", "10.96.0.1:80".parse().unwrap(), "shop").unwrap();
            assert_eq!(decides(&snapshot, source, service), expected, "{name}");
        }
    }

    #[test]
    fn a_waypoint_is_never_asked_for_another_service_s_address() {
        let mut changes = way("way", "10.0.9.1", "10.96.9.1");
        let headless = ServiceSpec { vips: Vec::new(), ..cart(Some(named("way"))) };
        changes.push(Change::Service(headless.into()));
        let (snapshot, client) = (snapshot(changes), workload("shop", "client", "10.0.0.99"));
        let service = snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap();
        // A route leads there, from a Service at that address.
        let plan = to_service(&snapshot, &client, service, "10.96.0.7:80".parse().unwrap(), &Chance::of(7));
        assert_eq!(plan.map(|_| ()).map_err(|outcome| outcome.code), Err(Code::NoWaypoint));
    }

    #[test]
    fn of_several_waypoints_each_gets_its_share() {
        let weighted = |weights: [u32; 3]| ServiceSpec {
            weighted_waypoints: ["a", "b", "c"].map(named).into_iter().zip(weights).collect(),
            ..cart(Some(named("last")))
        };
        let client = workload("shop", "client", "10.0.0.99");
        let snapshot = snapshot([Change::Service(weighted([1, 0, 3]).into()), Change::Workload(client.into())]);
        let to: SocketAddr = "10.96.0.1:80".parse().unwrap();
        let service = snapshot.service_at("", to, "shop").unwrap();
        let mut counts = [0; 3];
        for step in 0..4000u64 {
            let random = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let drawn = of_service(service, random).unwrap();
            counts[["a", "b", "c"].iter().position(|name| *drawn == named(name)).unwrap()] += 1;
        }
        assert_eq!(counts[1], 0, "{counts:?}");
        assert!((900..1100).contains(&counts[0]), "{counts:?}");
        let none = crate::state::fixtures::snapshot([Change::Service(weighted([0; 3]).into())]);
        assert_eq!(of_service(none.service_at("", to, "shop").unwrap(), 5), Some(&named("last")));
    }
}
