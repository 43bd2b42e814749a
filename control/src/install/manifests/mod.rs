//! The objects that Tulle consists of in a cluster, from values: what the Helm chart gives, without Helm.
//!
//! The chart's templates are for people who use Helm, this is for those who do not, and a test that renders the chart with
//! the real Helm for a table of values holds both equal, field by field. Pure; nothing here asks a cluster.

mod control;
mod gateway;
mod node;
mod rbac;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::install::values::{PullPolicy, Values};

pub use rbac::{Permission, permissions};

/// Version of the programs, which images without a tag have.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Definitions of tulle.dev.
const CRDS: [&str; 3] = [
    include_str!("../../../../deploy/crds/egresspolicies.tulle.dev.yaml"),
    include_str!("../../../../deploy/crds/httpfaults.tulle.dev.yaml"),
    include_str!("../../../../deploy/crds/httpratelimits.tulle.dev.yaml"),
];
/// The folder of a proxy's token, and that of control's roots.
const TOKENS: &str = "/var/run/secrets/tokens";
const ROOTS: &str = "/var/run/secrets/istio";

/// What everything is made from.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// What was chosen.
    pub values: &'a Values,
    /// Where it goes: the mesh's root namespace.
    pub namespace: &'a str,
    /// Who brings it, as the label app.kubernetes.io/managed-by says.
    pub managed_by: &'a str,
}

/// The namespace itself. Helm makes none, because it keeps its own records in it.
pub fn namespace(name: &str, managed_by: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {
            "app.kubernetes.io/part-of": "tulle",
            "app.kubernetes.io/managed-by": managed_by,
            // Node proxies enter network namespaces of other pods, which no smaller level allows.
            "pod-security.kubernetes.io/enforce": "privileged",
            "pod-security.kubernetes.io/audit": "privileged",
            "pod-security.kubernetes.io/warn": "privileged",
        }},
    })
}

/// The definitions of tulle.dev.
///
/// # Errors
/// Never, unless this program was built from files that cannot be read.
pub fn definitions() -> Result<Vec<Value>, String> {
    CRDS.iter().map(|text| serde_saphyr::from_str(text).map_err(|error| error.to_string())).collect()
}

/// All objects, without the namespace, in the order in which they are to be made.
///
/// # Errors
/// As [`definitions`].
pub fn objects(input: &Input<'_>) -> Result<Vec<Value>, String> {
    let mut objects = if input.values.crds.install { definitions()? } else { Vec::new() };
    objects.extend(rbac::objects(input));
    objects.extend(control::objects(input));
    objects.extend(node::objects(input));
    if input.values.egress_gateway.enabled {
        objects.extend(gateway::objects(input));
    }
    Ok(objects)
}

impl Input<'_> {
    fn labels(&self, component: &str) -> Value {
        json!({
            "app.kubernetes.io/name": component,
            "app.kubernetes.io/part-of": "tulle",
            "app.kubernetes.io/version": VERSION,
            "app.kubernetes.io/managed-by": self.managed_by,
        })
    }

    /// Metadata of an object of the namespace.
    fn meta(&self, name: &str, component: &str) -> Value {
        json!({"name": name, "namespace": self.namespace, "labels": self.labels(component)})
    }

    /// Metadata of an object of the cluster.
    fn cluster_meta(&self, name: &str, component: &str) -> Value {
        json!({"name": name, "labels": self.labels(component)})
    }

    fn image(&self, name: &str) -> String {
        self.image_of(name, "")
    }

    /// The same with a tag of its own, if that is not empty.
    fn image_of(&self, name: &str, tag: &str) -> String {
        let image = &self.values.image;
        let tag = [tag, &image.tag, VERSION].into_iter().find(|tag| !tag.is_empty()).unwrap_or_default();
        match image.registry.as_str() {
            "" => format!("{name}:{tag}"),
            registry => format!("{registry}/{name}:{tag}"),
        }
    }

    fn pull_policy(&self) -> &'static str {
        PullPolicy::name(self.values.image.pull_policy)
    }

    /// Adds the secrets of the registry, if there are any.
    fn add_pull_secrets(&self, pod: &mut Value) {
        let secrets = &self.values.image.pull_secrets;
        if !secrets.is_empty() {
            pod["imagePullSecrets"] = secrets.iter().map(|name| json!({"name": name})).collect();
        }
    }

    /// Settings by which a proxy, of a node or of a gateway, finds control and proves who it is.
    fn proxy_env(&self) -> BTreeMap<String, String> {
        let values = self.values;
        let control = format!("https://control.{}.svc:15012", self.namespace);
        let root = format!("{ROOTS}/root-cert.pem");
        map(&[
            ("XDS_ADDRESS", &control),
            ("CA_ADDRESS", &control),
            ("XDS_ROOT_CA", &root),
            ("CA_ROOT_CA", &root),
            ("AUTH_TOKEN", &format!("{TOKENS}/istio-token")),
            ("TRUST_DOMAIN", &values.trust_domain),
            ("CLUSTER_DOMAIN", &values.cluster_domain),
            ("CLUSTER_ID", &values.cluster_id),
            ("RUST_LOG", &values.log.level),
            ("LOG_FORMAT", &values.log.format),
        ])
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Who and where the pod is, then settings in the order of their names; what comes later wins.
fn env(parts: &[&BTreeMap<String, String>]) -> Value {
    const DOWNWARD: [(&str, &str); 5] = [
        ("NODE_NAME", "spec.nodeName"),
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("INSTANCE_IP", "status.podIP"),
    ];
    let field = |(name, path)| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let all: BTreeMap<_, _> = parts.iter().flat_map(|part| part.iter()).collect();
    let given = all.into_iter().map(|(name, value)| json!({"name": name, "value": value}));
    DOWNWARD.into_iter().map(field).chain(given).collect()
}

fn selector(component: &str) -> Value {
    json!({"app.kubernetes.io/name": component, "app.kubernetes.io/part-of": "tulle"})
}

/// The files of [`Input::proxy_env`].
fn proxy_volumes() -> [Value; 2] {
    let token =
        json!({"serviceAccountToken": {"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"}});
    [
        json!({"name": "token", "projected": {"sources": [token]}}),
        json!({"name": "root-cert", "configMap": {"name": "tulle-ca-root-cert"}}),
    ]
}

fn proxy_mounts() -> [Value; 2] {
    [
        json!({"name": "token", "mountPath": TOKENS, "readOnly": true}),
        json!({"name": "root-cert", "mountPath": ROOTS, "readOnly": true}),
    ]
}

/// Spread over nodes and zones, as far as it goes.
fn add_spread(pod: &mut Value, component: &str) {
    let matching = json!({"matchLabels": selector(component)});
    let over = |key: &str| json!({"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": matching});
    pod["topologySpreadConstraints"] = json!([over("kubernetes.io/hostname"), over("topology.kubernetes.io/zone")]);
    let term = json!({"topologyKey": "kubernetes.io/hostname", "labelSelector": matching});
    let preferred = json!([{"weight": 100, "podAffinityTerm": term}]);
    pod["affinity"] = json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}});
}

/// Of a container that needs no privilege, and of its pod.
fn confined() -> Value {
    json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}})
}

fn confined_pod() -> Value {
    json!({
        "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// A pod template.
fn template(labels: Value, annotations: &BTreeMap<String, String>, spec: Value) -> Value {
    let mut meta = json!({"labels": labels});
    if !annotations.is_empty() {
        meta["annotations"] = json!(annotations);
    }
    json!({"metadata": meta, "spec": spec})
}

/// A Deployment whose new pods serve before old ones go.
fn deployment(meta: Value, replicas: u32, component: &str, template: Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": replicas,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": selector(component)},
            "template": template,
        },
    })
}

fn disruption_budget(meta: Value, min_available: u32, component: &str) -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": meta,
        "spec": {
            "minAvailable": min_available,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector(component)},
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::{Input, namespace, objects};
    use crate::install::kinds;
    use crate::install::values::Values;

    fn all(sets: &[&str]) -> Vec<Value> {
        let sets: Vec<_> = sets.iter().map(ToString::to_string).collect();
        let values = Values::read(&[], &sets).unwrap();
        let input = Input { values: &values, namespace: "mesh", managed_by: "tests" };
        let mut all = vec![namespace("mesh", "tests")];
        all.extend(objects(&input).unwrap());
        all
    }

    #[test]
    fn every_object_is_of_a_known_kind_made_once_and_found_again_by_its_labels() {
        let mut seen = BTreeSet::new();
        for object in all(&["egressGateway.enabled=true"]) {
            let (kind, space, name) = kinds::identity(&object);
            assert!(kinds::known(kind, space.is_some()), "{kind} {space:?} {name}");
            assert!(seen.insert(format!("{kind} {name}")), "{kind} {name} twice");
            assert!(space.is_none_or(|space| space == "mesh"), "{object}");
            let labels = &object["metadata"]["labels"];
            let found =
                labels["app.kubernetes.io/part-of"] == "tulle" && labels["app.kubernetes.io/managed-by"] == "tests";
            assert!(found || kind == "CustomResourceDefinition", "{object}");
        }
    }

    #[test]
    fn every_container_is_confined_bounded_and_tagged_and_no_text_is_left_open() {
        for object in all(&["egressGateway.enabled=true", "image.registry=registry.example", "image.tag=v1"]) {
            assert!(!object.to_string().contains("{{"), "{object}");
            for container in object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten() {
                let image = container["image"].as_str().unwrap();
                assert!(image.starts_with("registry.example/tulle/") && image.ends_with(":v1"), "{image}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{container}");
                assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
                assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
                assert!(container["securityContext"]["privileged"] != true);
                assert!(container["readinessProbe"].is_object(), "{container}");
            }
        }
    }

    #[test]
    fn what_a_user_sets_wins_over_what_is_built_in() {
        let objects = all(&["control.env.RUST_LOG=trace"]);
        let control = objects.iter().find(|one| one["kind"] == "Deployment").unwrap();
        let env = control["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
        let set: Vec<_> = env.iter().filter(|one| one["name"] == "RUST_LOG").collect();
        assert!(set.len() == 1 && set[0]["value"] == "trace", "{set:?}");
    }

    #[test]
    fn each_node_has_a_proxy_whatever_its_label_says() {
        let objects = all(&["image.tag=v1", "ztunnel.canary.tag=v2"]);
        let set = |name: &str| {
            let found = objects.iter().find(|one| one["kind"] == "DaemonSet" && one["metadata"]["name"] == name);
            found.unwrap()["spec"]["template"]["spec"].clone()
        };
        let (usual, canary) = (set("ztunnel"), set("ztunnel-canary"));
        for (spec, image) in [(&usual, "tulle/ztunnel:v1"), (&canary, "tulle/ztunnel:v2")] {
            assert_eq!(spec["containers"][0]["image"], image);
        }
        let runs = |spec: &Value, label: &str| {
            let terms = &spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
            let one = &terms["nodeSelectorTerms"][0]["matchExpressions"][0];
            assert_eq!(one["key"], "tulle.dev/proxy");
            let named = one["values"].as_array().unwrap().iter().any(|value| value == label);
            named == (one["operator"] == "In")
        };
        for (label, expected) in
            [("", (true, false)), ("other", (true, false)), ("beside", (true, true)), ("canary", (false, true))]
        {
            assert_eq!((runs(&usual, label), runs(&canary, label)), expected, "{label}");
        }
        // But for the image and where they run they are the same.
        let same = |mut spec: Value| {
            spec["containers"][0]["image"] = Value::Null;
            spec["affinity"] = Value::Null;
            spec
        };
        assert_eq!(same(usual), same(canary));
    }

    #[test]
    fn what_is_not_chosen_is_not_there() {
        let objects = all(&["crds.install=false", "nodeRestriction.enabled=false"]);
        let kinds: BTreeSet<_> = objects.iter().map(|one| one["kind"].as_str().unwrap()).collect();
        assert!(
            !kinds.contains("CustomResourceDefinition") && !kinds.contains("ValidatingAdmissionPolicy"),
            "{kinds:?}"
        );
    }
}
