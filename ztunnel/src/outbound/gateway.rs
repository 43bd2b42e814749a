//! The way out of the cluster through an egress gateway: which of its replicas, and what it is asked for. Pure.
//!
//! A gateway is a Service whose pods run `ztunnel gateway`. The tunnel is the pod's own (its address, its identity), because
//! that is what the gateway decides by. What NetworkPolicies of the source judge is the gateway, because that is where the
//! connection goes. A replica that cannot be reached is left for another one, as with any Service (`attempts`); when none is
//! left the connection ends with `NO_GATEWAY` or with how the last one failed, and never goes out another way. Limits: a
//! gateway in another network, and one of several that is near, are not looked for; a DestinationRule of the gateway's Service
//! is not heeded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tulle_proto::names::PORT_HBONE;

use crate::lb::{self, Chance, NoChoice};
use crate::outbound::decide::{Hbone, Plan};
use crate::outcome::{Code, Outcome};
use crate::state::{Service, Snapshot, Workload};

/// The way of `source` through the gateway whose Service is `namespace` and `hostname`, which is asked for `name`: host (or
/// address) and port.
///
/// # Errors
/// `NoGateway`.
pub(super) fn plan(
    snapshot: &Snapshot,
    source: &Workload,
    (namespace, hostname): (&str, &str),
    name: &Arc<str>,
    chance: &Chance<'_>,
) -> Result<Plan, Outcome> {
    let unusable = |why: &str| {
        let text = format!(
            "{name} is reached through the egress gateway {namespace}/{hostname} only, which cannot be used: {why}; start \
             the gateway, or correct `via` of the EgressPolicy"
        );
        Outcome::new(Code::NoGateway, text)
    };
    let service = snapshot.service(namespace, hostname).ok_or_else(|| unusable("there is no such Service"))?;
    let picked = lb::pick(snapshot, service, PORT_HBONE, source, dialled(Some(service), source).ip(), chance);
    let picked = picked.map_err(|none| match none {
        NoChoice::Passthrough => unusable("it is a Service that is not balanced"),
        none => unusable(&none.to_string()),
    })?;
    if !picked.workload.is_pod() {
        return Err(unusable("its endpoint is no pod of the cluster"));
    }
    if picked.workload.network != source.network {
        return Err(unusable("it is in another network"));
    }
    let address = SocketAddr::new(picked.ip, picked.port);
    let also = service.subject_alt_names.iter().filter(|name| **name != picked.workload.identity);
    let expected = std::iter::once(&picked.workload.identity).chain(also).cloned().collect();
    Ok(Plan::Hbone(Hbone {
        address,
        authority: address,
        expected,
        destination: picked.workload,
        service: Some(service.clone()),
        others: picked.others,
        through: true,
        beyond: None,
        name: Some(name.clone()),
        keepalive: None,
    }))
}

/// Sabotage of test builds: with `TULLE_BREAK=gateway` the node dials by itself what a rule leads through a gateway.
pub(super) fn is_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "gateway")
}

/// As if the gateway's Service had been dialled at its own address; a headless one, at the family of the pod.
pub(super) fn dialled(service: Option<&Service>, source: &Workload) -> SocketAddr {
    let own = service.and_then(|service| service.vips.first()).map(|(_, vip)| vip.addr());
    let ip = own.or_else(|| source.addresses.first().copied()).unwrap_or_else(|| IpAddr::from([0; 4]));
    SocketAddr::new(ip, PORT_HBONE)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::plan;
    use crate::lb::Chance;
    use crate::outbound::decide::Plan;
    use crate::outcome::Code;
    use crate::state::fixtures::{key, port, service, snapshot, with_ports, workload};
    use crate::state::{Change, ServiceSpec, Workload};

    const HOST: &str = "out.egress.svc.cluster.local";

    fn replica(name: &str, ip: &str) -> Workload {
        with_ports(workload("egress", name, ip), key("egress", "out"), vec![port(15008, 15008)])
    }

    fn planned(pods: Vec<Workload>, spec: ServiceSpec, tried: &[&str]) -> Result<String, Code> {
        let changes = pods.into_iter().map(|pod| Change::Workload(Arc::new(pod)));
        let snapshot = snapshot(changes.chain([Change::Service(spec.into())]));
        let tried: Vec<SocketAddr> = tried.iter().map(|at| at.parse().unwrap()).collect();
        let chance = Chance { tried: &tried, ..Chance::of(7) };
        let client = workload("shop", "client", "10.0.0.99");
        match plan(&snapshot, &client, ("egress", HOST), &"api.example.com:443".into(), &chance) {
            Ok(Plan::Hbone(plan)) => {
                let name = plan.name.as_deref().unwrap_or_default();
                Ok(format!("{name} over {} as {}, others {}", plan.address, plan.expected[0], plan.others))
            }
            Ok(Plan::Plain(plan)) => Ok(format!("{} plain", plan.address)),
            Err(outcome) => Err(outcome.code),
        }
    }

    #[test]
    fn what_leaves_by_a_gateway_leaves_by_one_of_its_replicas_or_not_at_all() {
        let spec = || ServiceSpec { ports: vec![port(15008, 15008)], ..service("egress", "out", "10.96.0.9") };
        let (one, two) = (|| replica("out-0", "10.0.9.1"), || replica("out-1", "10.0.9.2"));
        let first = "api.example.com:443 over 10.0.9.1:15008 as spiffe://cluster.local/ns/egress/sa/out-0, others ";
        let at = ["10.0.9.1:15008", "10.0.9.2:15008"];
        let no = Err(Code::NoGateway);
        type Case<'a> = (&'a str, Vec<Workload>, ServiceSpec, &'a [&'a str], Result<String, Code>);
        let cases: Vec<Case<'_>> = vec![
            ("one", vec![one()], spec(), &[], Ok(format!("{first}false"))),
            ("the other one failed", vec![one(), two()], spec(), &at[1..], Ok(format!("{first}false"))),
            ("all failed", vec![one(), two()], spec(), &at, no.clone()),
            ("none runs", vec![], spec(), &[], no.clone()),
            ("not ready", vec![Workload { healthy: false, ..one() }], spec(), &[], no.clone()),
            ("no such Service", vec![one()], service("egress", "other", "10.96.0.9"), &[], no.clone()),
            ("not its port", vec![one()], service("egress", "out", "10.96.0.9"), &[], no.clone()),
            ("another network", vec![Workload { network: "far".into(), ..one() }], spec(), &[], no),
            ("headless", vec![one()], ServiceSpec { vips: Vec::new(), ..spec() }, &[], Ok(format!("{first}false"))),
        ];
        for (name, pods, spec, tried, expected) in cases {
            assert_eq!(planned(pods, spec, tried), expected, "{name}");
        }
    }
}
