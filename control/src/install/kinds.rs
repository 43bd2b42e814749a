//! The kinds that are installed: where the API server has them, and how one object of them is addressed.
//!
//! A closed list instead of discovery: a kind that is not here is a mistake of this program, and one request less is needed.

use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use serde_json::Value;

/// apiVersion, kind, plural, whether it has a namespace.
type Kind = (&'static str, &'static str, &'static str, bool);

/// All, in the order in which they are taken away: what runs first, then what it needs.
const KINDS: [Kind; 18] = [
    ("apps/v1", "DaemonSet", "daemonsets", true),
    ("apps/v1", "Deployment", "deployments", true),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
    ("v1", "Service", "services", true),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", false),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", false),
    ("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", true),
    ("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings", true),
    ("rbac.authorization.k8s.io/v1", "Role", "roles", true),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", false),
    ("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", false),
    ("v1", "ServiceAccount", "serviceaccounts", true),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", false),
    ("coordination.k8s.io/v1", "Lease", "leases", true),
    ("v1", "Secret", "secrets", true),
    ("v1", "ConfigMap", "configmaps", true),
    ("v1", "Pod", "pods", true),
    ("v1", "Node", "nodes", false),
];
const NAMESPACE: Kind = ("v1", "Namespace", "namespaces", false);
/// How many of [`KINDS`] hold nothing but what an installation brought, so that all of them with its label can go.
const DISPOSABLE: usize = 12;

/// Kinds whose objects go when Tulle is taken away, or when they are no longer part of it; in that order.
pub(super) fn disposable() -> impl Iterator<Item = &'static str> {
    KINDS.iter().take(DISPOSABLE).map(|kind| kind.1)
}

fn kind(name: &str) -> Option<&'static Kind> {
    KINDS.iter().chain([&NAMESPACE]).find(|kind| kind.1 == name)
}

/// Whether it is a kind of the list, with or without a namespace.
#[cfg(test)]
pub(super) fn known(name: &str, namespaced: bool) -> bool {
    kind(name).is_some_and(|kind| kind.3 == namespaced)
}

/// Objects of a kind, in a namespace if it has one; `None` as namespace: all of them.
pub(super) fn api(client: &Client, name: &str, namespace: Option<&str>) -> anyhow::Result<Api<DynamicObject>> {
    let Some((version, kind, plural, namespaced)) = kind(name) else {
        anyhow::bail!("the kind {name} is not one that is installed");
    };
    let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
    Ok(match namespace.filter(|_| *namespaced) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// Kind, namespace and name of a manifest.
pub(super) fn identity(object: &Value) -> (&str, Option<&str>, &str) {
    let meta = &object["metadata"];
    (object["kind"].as_str().unwrap_or_default(), meta["namespace"].as_str(), meta["name"].as_str().unwrap_or_default())
}

/// As people read it: `kind/name`, with the namespace in front of the name if there is one.
pub(super) fn shown(object: &Value) -> String {
    match identity(object) {
        (kind, Some(namespace), name) => format!("{kind} {namespace}/{name}"),
        (kind, None, name) => format!("{kind} {name}"),
    }
}
