//! Which pods are in the mesh, and what may leave a namespace.
//!
//! The pod's own label wins over the namespace's, Tulle's label over Istio's of the same object, and `egress: deny`
//! over all of them: what must not be lifted from inside cannot depend on a pod's labels. An egress value that is not
//! understood counts as deny.

use std::collections::BTreeMap;

use tulle_proto::enrol;
use tulle_proto::names;
use tulle_proto::tulle_workload::EgressMode;

use crate::model::{Condition, Namespace, Pod, World, in_namespace};
use crate::translate::Settings;

const NO_LABELS: &BTreeMap<String, String> = &BTreeMap::new();

/// What the labels of one object say; `None`: nothing.
fn label(labels: &BTreeMap<String, String>) -> Option<bool> {
    enrol::wish(|key| labels.get(key).map(String::as_str))
}

fn namespace_labels<'a>(world: &'a World, name: &str) -> &'a BTreeMap<String, String> {
    world.namespaces.get(name).map_or(NO_LABELS, |namespace| &namespace.meta.labels)
}

/// What may leave a namespace.
pub(super) fn egress(world: &World, namespace: &str, settings: &Settings) -> EgressMode {
    mode(namespace_labels(world, namespace), namespace, settings)
}

fn mode(labels: &BTreeMap<String, String>, namespace: &str, settings: &Settings) -> EgressMode {
    match labels.get(names::LABEL_EGRESS).map(String::as_str) {
        None if is_system(namespace, settings) => EgressMode::Allow,
        None => settings.egress_default,
        Some("allow") => EgressMode::Allow,
        Some("audit") => EgressMode::Audit,
        Some(_) => EgressMode::Deny,
    }
}

/// True if the labels want the pod in the mesh and nothing forbids it.
pub(super) fn enrolled(pod: &Pod, world: &World, settings: &Settings) -> bool {
    if pod.host_network || pod.finished() {
        return false;
    }
    let namespace = &pod.meta.namespace;
    let labels = namespace_labels(world, namespace);
    let (closed, system) = (mode(labels, namespace, settings) == EgressMode::Deny, is_system(namespace, settings));
    enrol::is_enrolled(closed, system, label(labels), label(&pod.meta.labels))
}

/// True if pods of the namespace are wanted in the mesh that say nothing themselves.
pub(super) fn namespace_enrolled(world: &World, namespace: &str, settings: &Settings) -> bool {
    let labels = namespace_labels(world, namespace);
    mode(labels, namespace, settings) == EgressMode::Deny || label(labels) == Some(true)
}

/// True if the pod's capture was published and not taken back yet, whatever labels say now.
pub(super) fn says_captured(pod: &Pod) -> bool {
    !pod.finished() && pod.meta.annotation(names::ANNOTATION_REDIRECTION) == Some("enabled")
}

/// Why a pod is not in the mesh, and what would bring it there; `None`: it is, as far as labels and its capture say.
pub fn why_outside(pod: &Pod, world: &World, settings: &Settings) -> Option<String> {
    let (namespace, mesh, istio) = (&pod.meta.namespace, names::LABEL_MESH, names::LABEL_ISTIO_MESH);
    if pod.host_network {
        return Some("it is on the host network, whose connections cannot be told from the node's own".to_owned());
    }
    if enrolled(pod, world, settings) {
        let told = pod.meta.annotation(names::ANNOTATION_REDIRECTION);
        let state = match told {
            None if settings.captured_unless_told => return None,
            Some("enabled") => return None,
            None => "not published: does a proxy run on its node?",
            Some(state) => state,
        };
        return Some(format!("it is labelled, and its capture is `{state}`; `tulle status` says why"));
    }
    let labels = namespace_labels(world, namespace);
    let shown = |labels: &BTreeMap<String, String>| {
        let found = [mesh, istio].into_iter().find_map(|key| Some(format!("{key}: {}", labels.get(key)?)));
        found.unwrap_or_default()
    };
    Some(match (label(&pod.meta.labels), label(labels)) {
        (Some(false), _) => format!("its own label `{}` takes it out", shown(&pod.meta.labels)),
        (_, Some(false)) => format!("label `{}` of namespace {namespace} takes it out", shown(labels)),
        _ if is_system(namespace, settings) => {
            format!("namespace {namespace} is the system's, and takes part only if it carries {mesh}: enabled itself")
        }
        _ => format!("neither it nor namespace {namespace} is labelled {mesh}: enabled"),
    })
}

fn is_system(namespace: &str, settings: &Settings) -> bool {
    enrol::is_system(namespace, &settings.root_namespace)
}

/// True if the pod ends tunnels itself, as gateways do.
pub(super) fn ends_tunnels(pod: &Pod) -> bool {
    pod.meta.label(names::LABEL_TUNNEL) == Some("http") && !pod.host_network && !pod.finished()
}

/// True if the pod is reached over HBONE: it ends tunnels itself, or it is enrolled and its capture is not still pending.
pub(super) fn speaks_hbone(pod: &Pod, world: &World, settings: &Settings) -> bool {
    if ends_tunnels(pod) {
        return true;
    }
    enrolled(pod, world, settings)
        && pod
            .meta
            .annotation(names::ANNOTATION_REDIRECTION)
            .map_or(settings.captured_unless_told, |state| state == "enabled")
}

/// What there is to say about a namespace's labels.
pub(super) fn conditions(namespace: &Namespace, world: &World, settings: &Settings) -> Vec<Condition> {
    let meta = &namespace.meta;
    let mut found = Vec::new();
    for (key, allowed) in [
        (names::LABEL_MESH, ["enabled", "disabled", ""]),
        (names::LABEL_ISTIO_MESH, ["ambient", "none", ""]),
        (names::LABEL_EGRESS, ["deny", "audit", "allow"]),
    ] {
        let Some(value) = meta.label(key) else {
            continue;
        };
        if allowed.contains(&value) {
            continue;
        }
        let consequence = if key == names::LABEL_EGRESS { "it counts as deny" } else { "it is ignored" };
        found.push(Condition::failing(
            "Accepted",
            "InvalidLabel",
            format!("Label {key} has the value `{value}`, which means nothing; {consequence}"),
        ));
    }
    if mode(&meta.labels, &meta.name, settings) == EgressMode::Deny {
        found.push(Condition::holding(
            "EgressDenied",
            "Enforced",
            "Pods may reach nothing outside the cluster that no EgressPolicy or ServiceEntry allows; nodes report pods that \
             they cannot fence as Unfenced"
                .into(),
        ));
        let unfenced: Vec<&str> = in_namespace(&world.pods, &meta.name)
            .filter(|pod| pod.host_network && !pod.finished())
            .map(|pod| pod.meta.name.as_str())
            .collect();
        if !unfenced.is_empty() {
            found.push(Condition::holding(
                "Unfenced",
                "HostNetwork",
                format!("Pods on the host network cannot be held: {}", unfenced.join(", ")),
            ));
        }
    }
    found
}
