//! What would become of a connection that leaves the cluster, for `tulle explain`: by the same decisions as the connection itself
//! (`egress`), with everything that only the client's first words, a name server or a handshake could say left open. Pure.

use std::net::SocketAddr;

use crate::lb::Chance;
use crate::outbound::decide::Plan;
use crate::outbound::egress::{Bound, allowed_but, asked_of_gateway, gateways_only, meant};
use crate::outbound::gateway;
use crate::outcome::Outcome;
use crate::policy::egress::{self, Asked, Grant, Spoken};
use crate::policy::network;
use crate::state::{Snapshot, Transport, Workload};

/// How a connection may leave.
#[derive(Debug)]
pub struct WayOut {
    /// The rule.
    pub grant: Grant,
    /// Through which egress gateway, if through one.
    pub gateway: Option<Through>,
    /// For people.
    pub text: String,
}

/// An egress gateway on the way.
#[derive(Debug)]
pub struct Through {
    /// The way to one of its replicas.
    pub plan: Plan,
    /// As if this had been dialled.
    pub dialled: SocketAddr,
    /// What it is asked for: host or address, and port.
    pub target: String,
}

/// What would become of a connection that leaves, for an explanation; `None`: it does not leave, or nothing is asked of it but a
/// record. What the client will say first is not known, so that which a rule allows is taken, and named.
pub fn explained(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    destination: SocketAddr,
) -> Option<Result<WayOut, Outcome>> {
    if egress::asked(source) != Asked::Enforce {
        return None;
    }
    match meant(snapshot, source, network, destination, |_| None)? {
        Ok(bound) => judge(snapshot, source, network, &bound),
        Err(outcome) => Some(Err(outcome)),
    }
}

/// The same for a name outside that the pod looks up. `host` is in lower case, without a final dot.
pub fn explained_name(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    host: &str,
    port: u16,
) -> Option<Result<WayOut, Outcome>> {
    if egress::asked(source) != Asked::Enforce {
        return None;
    }
    judge(snapshot, source, network, &Bound { host: Some(host.into()), address: None, port })
}

fn judge(snapshot: &Snapshot, source: &Workload, network: &str, bound: &Bound) -> Option<Result<WayOut, Outcome>> {
    let host = bound.host.as_deref();
    let words = [
        ("", Spoken::Bytes),
        (", if the client begins with TLS for it", Spoken::Tls(host)),
        (", if the client asks by HTTP (here: GET /)", Spoken::Http { host, method: "GET", path: "/" }),
    ];
    let silent_too = !egress::needs_first_bytes(snapshot, source, &bound.attempt(Spoken::Bytes));
    let mut refusal = None;
    for (condition, spoken) in words {
        let way = egress::decide(snapshot, source, &bound.attempt(spoken))
            .and_then(|grant| way_out(snapshot, source, network, bound, grant, &spoken));
        match way {
            Ok(way) => return Some(Ok(WayOut { text: format!("{}{condition}", way.text), ..way })),
            Err(outcome) => refusal = refusal.or(Some(outcome)),
        }
        if silent_too {
            break;
        }
    }
    refusal.map(Err)
}

fn way_out(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    bound: &Bound,
    grant: Grant,
    spoken: &Spoken<'_>,
) -> Result<WayOut, Outcome> {
    let proven = if grant.rule().proof.is_some() { ", once the host has proven its name" } else { "" };
    let by = format!("let out by {} rules[{}]{proven}", grant.policy.id, grant.rule);
    let mut through = None;
    let text = match (&grant.rule().gateway, bound.address) {
        (Some(service), _) => {
            let (at, name) = ((&*service.namespace, &*service.hostname), asked_of_gateway(bound));
            let plan = gateway::plan(snapshot, source, at, &name, &Chance::of(0))?;
            let dialled = gateway::dialled(plan.service().map(|service| &**service), source);
            through = Some(Through { plan, dialled, target: name.to_string() });
            format!("{by}, through the gateway {}/{}", service.namespace, service.hostname)
        }
        (None, address) => {
            if let Some(outcome) = gateways_only(&grant, bound, spoken) {
                return Err(outcome);
            }
            if let Some(address) = address {
                let inside = egress::may_dial(snapshot, network, grant.rule(), address);
                inside.map_err(|why| allowed_but(&grant, &format!("but not where it leads: {why}")))?;
                network::egress(snapshot, source, Transport::Tcp, SocketAddr::new(address, grant.target)).outcome()?;
            }
            match &bound.host {
                Some(host) => format!("{by}, to what the node resolves {host} to, unless that is inside"),
                None => by,
            }
        }
    };
    Ok(WayOut { gateway: through, grant, text })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::{explained, explained_name};
    use crate::flow::names;
    use crate::outcome::Code;
    use crate::state::fixtures::{service, snapshot_of_node, workload};
    use crate::state::{
        Change, EgressMode, EgressPolicy, EgressPort, EgressProtocol, EgressRule, HostPattern, Workload,
    };

    fn rule(host: Option<&str>, cidr: Option<&str>, number: u16, protocol: EgressProtocol) -> EgressRule {
        EgressRule {
            hosts: host.map(|host| HostPattern::Exact(host.into())).into_iter().collect(),
            cidrs: cidr.map(|cidr| cidr.parse().unwrap()).into_iter().collect(),
            ports: vec![EgressPort { number, protocol, target: number }],
            ..EgressRule::default()
        }
    }

    #[test]
    fn an_explanation_of_what_leaves_says_which_rule_and_what_is_not_known_yet() {
        let rules = vec![
            rule(Some("api.example"), None, 443, EgressProtocol::Tls),
            rule(None, Some("203.0.113.0/24"), 5432, EgressProtocol::Bytes),
            rule(None, Some("169.254.0.0/16"), 80, EgressProtocol::Bytes),
            rule(Some("plain.example"), None, 80, EgressProtocol::Http),
        ];
        let policy = EgressPolicy {
            id: "EgressPolicy/shop/out".into(),
            version: "1".into(),
            record_only: false,
            ceiling: false,
            rules,
            unreadable: None,
        };
        let closed = Workload {
            egress: EgressMode::Deny,
            egress_policies: [policy.id.clone()].into_iter().collect(),
            ..workload("shop", "web", "10.0.0.9")
        };
        let changes = vec![
            Change::EgressPolicy(policy.into()),
            Change::Workload(Arc::new(closed.clone())),
            Change::Workload(workload("shop", "cart", "10.0.0.1").into()),
            Change::Service(service("shop", "cart", "10.96.0.1").into()),
        ];
        let snapshot = snapshot_of_node(changes, &["198.51.100.1".parse().unwrap()]);
        let at = |host: &str, port: u16| SocketAddr::new(names::address(names::first(host), false), port);
        let ip = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (destination, expected) in [
            (ip("203.0.113.9:5432"), Some(Ok((1, "let out by EgressPolicy/shop/out rules[1]")))),
            (ip("203.0.113.9:5433"), Some(Err(Code::EgressDenied))),
            (ip("192.0.2.1:443"), Some(Err(Code::EgressDenied))),
            // Only who writes the network down can mean it.
            (ip("169.254.169.254:80"), Some(Ok((2, "rules[2]")))),
            (ip("169.254.169.254:443"), Some(Err(Code::EgressDenied))),
            (at("api.example", 443), Some(Ok((0, "if the client begins with TLS for it")))),
            (at("api.example", 444), Some(Err(Code::EgressDenied))),
            (at("plain.example", 80), Some(Err(Code::EgressDenied))),
            (at("other.example", 443), Some(Err(Code::EgressDenied))),
            (ip("10.96.0.1:80"), None),
            (ip("10.0.0.1:80"), None),
        ] {
            let way = explained(&snapshot, &closed, "", destination);
            match (&way, expected) {
                (None, None) => {}
                (Some(Ok(way)), Some(Ok((rule, text)))) => {
                    assert!(way.grant.rule == rule && way.text.contains(text), "{destination}: {way:?}");
                }
                (Some(Err(outcome)), Some(Err(code))) => assert_eq!(outcome.code, code, "{destination}"),
                _ => panic!("{destination}: {way:?}, expected {expected:?}"),
            }
        }
        let by_name = |workload: &Workload, host: &str| {
            explained_name(&snapshot, workload, "", host, 443).map(|way| way.map_err(|outcome| outcome.code))
        };
        assert!(matches!(by_name(&closed, "api.example"), Some(Ok(way)) if way.grant.rule == 0));
        assert!(matches!(by_name(&closed, "other.example"), Some(Err(Code::EgressDenied))));
        let open = Workload { egress: EgressMode::Allow, ..closed };
        assert!(by_name(&open, "api.example").is_none());
        assert!(
            explained(&snapshot, &open, "", ip("192.0.2.1:443")).is_none(),
            "nothing is asked of an open namespace"
        );
    }
}
