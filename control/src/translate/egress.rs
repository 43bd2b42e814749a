//! EgressPolicy and ServiceEntry to their resource, and whom they are about.
//!
//! An object is about pods of its own namespace, or of the mesh if it is in the root namespace; nobody else's widens what a
//! namespace may reach. Pods of namespaces that are open name none, since nothing is asked of them. An object that cannot be read
//! allows nothing; a ceiling that cannot be read lets nothing pass.

use tulle_proto::mesh;
use tulle_proto::tulle_workload::EgressMode;

use crate::model::{
    Condition, EgressEndpoint, EgressPolicy, EgressPort, EgressProtocol, EgressRule, Origination, Pod, World,
};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::enrol;
use crate::translate::network::cidr;
use crate::translate::service::octets;

/// Resource name.
fn name(policy: &EgressPolicy) -> String {
    format!("{}/{}", policy.kind.name(), policy.meta.path())
}

/// Names of those that a pod must name.
pub(super) fn of_pod(pod: &Pod, world: &World, settings: &Settings) -> Vec<String> {
    if enrol::egress(world, &pod.meta.namespace, settings) == EgressMode::Allow {
        return Vec::new();
    }
    let applies = |policy: &&EgressPolicy| {
        let own = policy.meta.namespace == pod.meta.namespace;
        let here = own || (settings.is_root(&policy.meta.namespace) && !policy.own_namespace);
        here && policy.pods.as_ref().is_none_or(|pods| pods.matches(pod))
    };
    world.egress_policies.values().map(|policy| &**policy).filter(applies).map(name).collect()
}

/// Each is made of itself; what is to be said of it depends on its namespace and on the gateways that it names.
pub(super) fn translate(policy: &EgressPolicy, world: &World, settings: &Settings) -> (Resource, Vec<Condition>) {
    let action = if policy.record_only { mesh::EgressAction::Record } else { mesh::EgressAction::Enforce };
    let misplaced = policy.ceiling && !settings.is_root(&policy.meta.namespace);
    let unreadable = match (&policy.unreadable, misplaced) {
        (Some(reason), _) => reason.clone(),
        (None, true) => "ceiling: is of the root namespace only".to_owned(),
        (None, false) => String::new(),
    };
    let rules = policy.rules.iter().filter(|_| unreadable.is_empty());
    let message = mesh::EgressPolicy {
        namespace: policy.meta.namespace.clone(),
        name: policy.meta.name.clone(),
        action: action.into(),
        ceiling: policy.ceiling && !misplaced,
        rules: rules.map(|one| rule(one, settings)).collect(),
        unreadable: unreadable.clone(),
    };
    let resource = Resource::new(Kind::EgressPolicy, name(policy), &message, Vec::new());
    (resource, conditions(policy, &unreadable, world, settings))
}

fn conditions(policy: &EgressPolicy, unreadable: &str, world: &World, settings: &Settings) -> Vec<Condition> {
    if !unreadable.is_empty() {
        let then = if policy.ceiling { "nothing passes it" } else { "it allows nothing" };
        let message = format!("The spec cannot be read, so {then}: {unreadable}");
        return vec![Condition::failing("Accepted", "Invalid", message)];
    }
    let mut found = vec![Condition::holding("Accepted", "Accepted", "It was read whole".into())];
    let service = |(namespace, name): &(String, String)| world.services.get(&(namespace.clone(), name.clone()));
    let gateways = policy.rules.iter().filter_map(|rule| rule.gateway.as_ref());
    let missing: Vec<String> =
        gateways.filter(|gateway| service(gateway).is_none()).map(|(space, name)| format!("{space}/{name}")).collect();
    if !missing.is_empty() {
        let message = format!("There is no Service {}; flows that must go through it fail", missing.join(", "));
        found.push(Condition::failing("ResolvedRefs", "BackendNotFound", message));
    }
    found.push(enforced(policy, world, settings));
    found
}

fn enforced(policy: &EgressPolicy, world: &World, settings: &Settings) -> Condition {
    let namespace = &policy.meta.namespace;
    let failing = |reason, message| Condition::failing("Enforced", reason, message);
    if !policy.ignored.is_empty() {
        return failing("NotEnforcedWhole", policy.ignored.join("; "));
    }
    let clear = |rule: &EgressRule| rule.ports.iter().any(|port| port.protocol == EgressProtocol::Http);
    let needs = |rule: &EgressRule| rule.originate.is_some() || rule.http.is_some() || clear(rule);
    let without: Vec<String> = policy
        .rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| needs(rule) && rule.gateway.is_none())
        .map(|(index, _)| format!("rules[{index}]"))
        .collect();
    if !without.is_empty() && !policy.ceiling {
        let text =
            "requests in plain text, and TLS that is added, leave by gateways only; without `via` they are refused";
        return failing("NotEnforcedWhole", format!("{}: {text}", without.join(", ")));
    }
    if policy.record_only {
        return failing("AuditOnly", "action: Audit: its rules are recorded and allow nothing".into());
    }
    if settings.is_root(namespace) && !policy.own_namespace {
        let message = "Enforced for the pods that it selects in every namespace whose egress is deny";
        return Condition::holding("Enforced", "Enforced", message.into());
    }
    match enrol::egress(world, namespace, settings) {
        EgressMode::Deny => Condition::holding("Enforced", "Enforced", "Enforced whole".into()),
        EgressMode::Audit => {
            let text = "Namespace is labelled tulle.dev/egress: audit: what no rule allows passes, and is recorded";
            failing("NamespaceAudited", text.into())
        }
        EgressMode::Allow => {
            let text =
                "Everything may leave this namespace; label it tulle.dev/egress: deny to hold it to its policies";
            failing("NamespaceOpen", text.into())
        }
    }
}

fn rule(rule: &EgressRule, settings: &Settings) -> mesh::EgressRule {
    mesh::EgressRule {
        hosts: rule.hosts.clone(),
        cidrs: rule.cidrs.iter().map(cidr).collect(),
        ports: rule.ports.iter().map(port).collect(),
        http: rule
            .http
            .as_ref()
            .map(|http| mesh::EgressHttp { methods: http.methods.clone(), paths: http.paths.clone() }),
        gateway: rule.gateway.as_ref().map(|(namespace, name)| mesh::EgressGateway {
            service: Some(mesh::ServiceRef {
                namespace: namespace.clone(),
                hostname: format!("{name}.{namespace}.svc.{}", settings.cluster_domain),
            }),
        }),
        originate: rule.originate.as_ref().map(origination),
        endpoints: rule.endpoints.iter().map(endpoint).collect(),
        stands_for: rule.stands_for.iter().map(cidr).collect(),
        proof: rule.proof.as_ref().map(|roots| mesh::EgressProof { roots: ders(roots) }),
    }
}

fn origination(tls: &Origination) -> mesh::EgressOrigination {
    mesh::EgressOrigination {
        server_name: tls.server_name.clone(),
        roots: ders(&tls.roots),
        client_certificate: tls.client_certificate.clone(),
    }
}

fn ders<B: From<Vec<u8>>>(roots: &[Vec<u8>]) -> Vec<B> {
    roots.iter().map(|root| root.clone().into()).collect()
}

fn port(port: &EgressPort) -> mesh::EgressPort {
    let protocol = match port.protocol {
        EgressProtocol::Detected => mesh::EgressProtocol::Detected,
        EgressProtocol::Tcp => mesh::EgressProtocol::Bytes,
        EgressProtocol::Tls => mesh::EgressProtocol::Tls,
        EgressProtocol::Http => mesh::EgressProtocol::PlainHttp,
        EgressProtocol::Https => mesh::EgressProtocol::Https,
    };
    mesh::EgressPort { number: port.number.into(), protocol: protocol.into(), target: port.target.into() }
}

fn endpoint(endpoint: &EgressEndpoint) -> mesh::EgressEndpoint {
    use mesh::egress_endpoint::At;
    let at = match &endpoint.at {
        Ok(ip) => At::Address(octets(ip).into()),
        Err(host) => At::Host(host.clone()),
    };
    let ports = endpoint.ports.iter().map(|(from, to)| (u32::from(*from), u32::from(*to))).collect();
    mesh::EgressEndpoint { at: Some(at), ports }
}
