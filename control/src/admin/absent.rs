//! Why nobody answers for a Service, in sentences: what people meet first is a selector that selects nothing, pods that are not
//! ready, and ports that lead nowhere.
//!
//! Pure, on the objects of one moment. It judges nothing that traffic depends on: nodes decide with what control published, and
//! this is for people who look for the line that they have to change. Limits: at most [`SHOWN`] pods are named.

use std::collections::{BTreeMap, BTreeSet};

use crate::admin::names;
use crate::model::{NamedPort, Phase, Pod, Service, TargetPort, TrafficScope, Transport, World, in_namespace};

/// Pods that are named; of more, the rest is counted.
const SHOWN: usize = 3;

/// What is wrong with the endpoints of a Service at a port; empty: nothing that can be seen in the objects.
pub(super) fn hints(world: &World, service: &Service, port: u16, transport: Transport) -> Vec<String> {
    let path = service.meta.path();
    if service.external_name {
        let target = &service.names.external_name;
        return vec![format!("{path} is of type ExternalName: it has no endpoints, and its name stands for {target}")];
    }
    let ports = &service.names.ports;
    let Some(named) = ports.iter().find(|own| own.number == port && own.transport == transport) else {
        let has: Vec<String> = ports.iter().map(spelt).collect();
        let has = if has.is_empty() { "no port".to_owned() } else { has.join(", ") };
        return vec![format!("{path} has no {} port {port}; it has {has}", word(transport))];
    };
    let slices = in_namespace(&world.slices, &service.meta.namespace)
        .filter(|slice| slice.service == service.meta.name)
        .collect::<Vec<_>>();
    if service.selector.is_empty() {
        let has = slices.iter().any(|slice| !slice.endpoints.is_empty());
        let ready = slices.iter().flat_map(|slice| &slice.endpoints).any(|endpoint| endpoint.ready);
        return match (has, ready) {
            (false, _) => {
                vec![format!("{path} has no selector, and no EndpointSlice with an endpoint is labelled with its name")]
            }
            (true, false) => vec![format!("{path} has no selector, and no endpoint of its EndpointSlices is ready")],
            (true, true) => Vec::new(),
        };
    }
    let selected: Vec<&Pod> = in_namespace(&world.pods, &service.meta.namespace)
        .map(|pod| &**pod)
        .filter(|pod| missing(service, pod).is_empty())
        .collect();
    if selected.is_empty() {
        return vec![no_pod(world, service)];
    }
    let running: Vec<&Pod> = selected.iter().copied().filter(|pod| pod.ready && pod.takes_part()).collect();
    if running.is_empty() {
        let each = selected.iter().map(|pod| format!("{} ({})", pod.meta.name, state(pod)));
        return vec![format!(
            "{path} selects {} pod{}, of which none is ready: {}",
            selected.len(),
            if selected.len() == 1 { "" } else { "s" },
            listed(each)
        )];
    }
    let mut found: Vec<String> = target(named, &running, &path).into_iter().collect();
    if service.scope == TrafficScope::NodeOnly {
        let nodes: BTreeSet<&str> = running.iter().map(|pod| pod.node.as_str()).collect();
        let nodes: Vec<&str> = nodes.into_iter().collect();
        found.push(format!(
            "{path} has internalTrafficPolicy: Local, so clients reach endpoints of their own node only; there are some on {}",
            nodes.join(", ")
        ));
    }
    found
}

/// Hints as the end of a sentence.
pub(super) fn clause(hints: &[String]) -> String {
    if hints.is_empty() { String::new() } else { format!(": {}", hints.join("; ")) }
}

/// What is odd about a target port, where endpoints run.
fn target(named: &NamedPort, running: &[&Pod], path: &str) -> Option<String> {
    let declared: BTreeSet<String> = running
        .iter()
        .flat_map(|pod| &pod.ports)
        .filter(|own| own.protocol == named.transport)
        .map(|own| if own.name.is_empty() { own.port.to_string() } else { format!("{} ({})", own.name, own.port) })
        .collect();
    let has = declared.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let has_name = |name: &str| running.iter().flat_map(|pod| &pod.ports).any(|own| own.name == name);
    let has_number = |number: u16| running.iter().flat_map(|pod| &pod.ports).any(|own| own.port == number);
    match &named.target {
        TargetPort::Name(name) if !has_name(name) && declared.is_empty() => Some(format!(
            "port {} of {path} leads to the container port named {name}, and its pods declare none",
            named.number
        )),
        TargetPort::Name(name) if !has_name(name) => Some(format!(
            "port {} of {path} leads to the container port named {name}, which its pods do not have; they have {has}",
            named.number
        )),
        TargetPort::Number(number) if !declared.is_empty() && !has_number(*number) => Some(format!(
            "port {} of {path} leads to {number}, which its pods do not declare (they may listen there all the same); they \
             declare {has}",
            named.number
        )),
        _ => None,
    }
}

/// The labels that a pod would need besides to be selected.
fn missing<'a>(service: &'a Service, pod: &Pod) -> BTreeMap<&'a str, &'a str> {
    let lacks = |(key, value): &(&String, &String)| pod.meta.label(key) != Some(value.as_str());
    service.selector.iter().filter(lacks).map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

/// No pod of the namespace has the labels: which has the nearest ones?
fn no_pod(world: &World, service: &Service) -> String {
    let (path, namespace) = (service.meta.path(), &service.meta.namespace);
    let wanted = labels(service.selector.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let begin = format!("{path} selects {wanted}, and no pod of namespace {namespace} has that");
    let alive = || world.pods.values().filter(|pod| !pod.finished());
    // Fewest labels amiss, then the most similar values.
    let distance = |pod: &Pod| {
        let missing = missing(service, pod);
        let unlike = missing.iter().map(|(key, value)| names::distance(value, pod.meta.label(key).unwrap_or_default()));
        (missing.len(), unlike.sum::<usize>())
    };
    let nearest = alive()
        .filter(|pod| pod.meta.namespace == *namespace)
        .map(|pod| (distance(pod), pod))
        .min_by(|a, b| (a.0, &a.1.meta.name).cmp(&(b.0, &b.1.meta.name)));
    let elsewhere: BTreeSet<&str> = alive()
        .filter(|pod| pod.meta.namespace != *namespace && missing(service, pod).is_empty())
        .map(|pod| pod.meta.namespace.as_str())
        .collect();
    if !elsewhere.is_empty() {
        let elsewhere = elsewhere.into_iter().collect::<Vec<_>>().join(", ");
        return format!("{begin}; pods with it are in {elsewhere}, and a Service selects in its own namespace only");
    }
    let Some((_, pod)) = nearest else {
        return format!("{begin}: it has no pods");
    };
    let has = missing(service, pod).into_keys().map(|key| match pod.meta.label(key) {
        Some(value) => format!("{key}={value}"),
        None => format!("no label {key}"),
    });
    // Another key may hold the very value.
    let under = missing(service, pod).into_iter().find_map(|(_, value)| {
        let (key, _) =
            pod.meta.labels.iter().find(|(key, own)| *own == value && !service.selector.contains_key(*key))?;
        Some(format!(" (its label {key} is {value})"))
    });
    let has = has.collect::<Vec<_>>().join(", ");
    format!("{begin}; nearest is pod {}, which has {has}{}", pod.meta.name, under.unwrap_or_default())
}

fn labels<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    pairs.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")
}

fn state(pod: &Pod) -> &'static str {
    match pod.phase {
        Phase::Succeeded => "finished",
        Phase::Failed => "failed",
        _ if pod.meta.deleting => "terminating",
        _ if pod.node.is_empty() => "not scheduled",
        Phase::Pending => "pending",
        Phase::Running if pod.addresses.is_empty() => "without an address",
        Phase::Running => "not ready",
    }
}

fn listed(all: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = all.collect();
    match all.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{} and {more} more", all[..SHOWN].join(", ")),
        _ => all.join(", "),
    }
}

fn spelt(port: &NamedPort) -> String {
    let name = if port.name.is_empty() { String::new() } else { format!(" ({})", port.name) };
    format!("{} {}{name}", word(port.transport), port.number)
}

fn word(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}

#[cfg(test)]
mod tests {
    use super::hints;
    use crate::admin::fixtures;
    use crate::model::Transport;

    const PODS: &str = "
---
{apiVersion: v1, kind: Pod, metadata: {name: cart-0, namespace: shop, labels: {app: cart, tier: web}},
 spec: {nodeName: a, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
 status: {podIP: 10.0.0.1, phase: Running}}
---
{apiVersion: v1, kind: Pod, metadata: {name: slow-0, namespace: shop, labels: {app: slow}},
 spec: {nodeName: a, containers: [{name: c}]},
 status: {podIP: 10.0.0.2, phase: Running, conditions: [{type: Ready, status: 'False'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: slow-1, namespace: shop, labels: {app: slow}}, spec: {containers: [{name: c}]}, status: {phase: Pending}}
---
{apiVersion: v1, kind: Pod, metadata: {name: away-0, namespace: other, labels: {app: away}},
 spec: {nodeName: a, containers: [{name: c}]}, status: {podIP: 10.0.0.3, phase: Running}}
";

    #[test]
    fn each_way_to_have_no_endpoint_is_told_with_what_to_change() {
        for (spec, port, expected) in [
            (
                "{selector: {app: crat}, ports: [{port: 80}]}",
                80,
                "shop/s selects app=crat, and no pod of namespace shop has that; nearest is pod cart-0, which has app=cart",
            ),
            (
                "{selector: {app: cart, tier: wbe}, ports: [{port: 80}]}",
                80,
                "shop/s selects app=cart, tier=wbe, and no pod of namespace shop has that; nearest is pod cart-0, which has tier=web",
            ),
            (
                "{selector: {name: cart}, ports: [{port: 80}]}",
                80,
                "shop/s selects name=cart, and no pod of namespace shop has that; nearest is pod cart-0, which has no label name (its label app is cart)",
            ),
            (
                "{selector: {app: away}, ports: [{port: 80}]}",
                80,
                "shop/s selects app=away, and no pod of namespace shop has that; pods with it are in other, and a Service selects in its own namespace only",
            ),
            (
                "{selector: {app: slow}, ports: [{port: 80}]}",
                80,
                "shop/s selects 2 pods, of which none is ready: slow-0 (not ready), slow-1 (not scheduled)",
            ),
            (
                "{selector: {app: cart}, ports: [{port: 80, targetPort: web}]}",
                80,
                "port 80 of shop/s leads to the container port named web, which its pods do not have; they have http (8080)",
            ),
            (
                "{selector: {app: cart}, ports: [{port: 80, targetPort: 80}]}",
                80,
                "port 80 of shop/s leads to 80, which its pods do not declare (they may listen there all the same); they declare http (8080)",
            ),
            (
                "{selector: {app: cart}, ports: [{name: web, port: 80}, {name: dns, port: 53, protocol: UDP}]}",
                8080,
                "shop/s has no TCP port 8080; it has TCP 80 (web), UDP 53 (dns)",
            ),
            (
                "{ports: [{port: 80}]}",
                80,
                "shop/s has no selector, and no EndpointSlice with an endpoint is labelled with its name",
            ),
            (
                "{type: ExternalName, externalName: api.example.com}",
                80,
                "shop/s is of type ExternalName: it has no endpoints, and its name stands for api.example.com",
            ),
            ("{selector: {app: cart}, ports: [{port: 80, targetPort: http}]}", 80, ""),
        ] {
            let text = format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: s, namespace: shop}}, spec: {spec}}}\n{PODS}"
            );
            let world = fixtures::world(&text);
            let service = world.services.get(&("shop".to_owned(), "s".to_owned())).unwrap();
            assert_eq!(hints(&world, service, port, Transport::Tcp).join("; "), expected, "{spec}");
        }
    }

    #[test]
    fn a_namespace_without_pods_says_so() {
        let world = fixtures::world(
            "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: shop}, spec: {selector: {app: a}, ports: [{port: 80}]}}",
        );
        let service = world.services.get(&("shop".to_owned(), "s".to_owned())).unwrap();
        let found = hints(&world, service, 80, Transport::Tcp);
        assert_eq!(found, ["shop/s selects app=a, and no pod of namespace shop has that: it has no pods"]);
    }
}
