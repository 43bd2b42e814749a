//! What control and the node proxies may ask of the API server, each with the reason, and the policy that says what RBAC cannot.
//!
//! RBAC has no "pods of the own node": with it alone, the token of any node would do to write about every pod of the
//! cluster. So an admission policy compares the node in the token with the object. docs/install.md shows this table.

use serde_json::{Value, json};
use tulle_proto::names;

use super::Input;
use crate::cluster::bundle;

/// A rule of a role.
#[derive(Debug, Clone, Copy)]
pub struct Permission {
    /// Name of the role: of control or of the node proxies.
    pub role: &'static str,
    /// In Tulle's namespace only.
    pub namespaced: bool,
    /// API group; empty: the core.
    pub group: &'static str,
    /// Kinds, and subresources.
    pub resources: &'static [&'static str],
    /// Only the objects of these names; empty: all.
    pub names: &'static [&'static str],
    /// What may be done.
    pub verbs: &'static [&'static str],
    /// Why.
    pub reason: &'static str,
}

const READ: &[&str] = &["get", "list", "watch"];
const STATUS: &[&str] = &["patch"];

const fn of_cluster(
    role: &'static str,
    group: &'static str,
    resources: &'static [&'static str],
    verbs: &'static [&'static str],
    reason: &'static str,
) -> Permission {
    Permission { role, namespaced: false, group, resources, names: &[], verbs, reason }
}

const fn own(
    group: &'static str,
    resources: &'static [&'static str],
    names: &'static [&'static str],
    verbs: &'static [&'static str],
    reason: &'static str,
) -> Permission {
    Permission { role: CONTROL, namespaced: true, group, resources, names, verbs, reason }
}

const CONTROL: &str = "tulle-control";
const NODE: &str = "tulle-ztunnel";
/// The name in the table of the Secret that `control.caSecret` names.
const CA_SECRET: &str = "tulle-ca";
/// That of the Secret that `control.pluggedCaSecret` names.
const PLUGGED_SECRET: &str = "cacerts";

/// Those of the published roots, if `control.clusterTrustBundle` says so.
const BUNDLE: &str = bundle::NAME;
const SIGNER: &str = bundle::SIGNER;

/// All rules, in the order of the roles.
const PERMISSIONS: &[Permission] = &[
    of_cluster(
        CONTROL,
        "",
        &["namespaces", "nodes", "pods", "serviceaccounts", "services"],
        READ,
        "what the mesh is made of",
    ),
    of_cluster(CONTROL, "discovery.k8s.io", &["endpointslices"], READ, "who is behind a Service"),
    of_cluster(
        CONTROL,
        "networking.k8s.io",
        &["networkpolicies"],
        &["get", "list", "watch", "create", "patch", "delete"],
        "policies are enforced on the inner connection; one more in each enrolled namespace lets tunnels pass other enforcers",
    ),
    of_cluster(
        CONTROL,
        "gateway.networking.k8s.io",
        &["httproutes", "grpcroutes", "referencegrants"],
        READ,
        "routes of Services",
    ),
    of_cluster(
        CONTROL,
        "gateway.networking.k8s.io",
        &["httproutes/status", "grpcroutes/status"],
        STATUS,
        "conditions of them",
    ),
    of_cluster(
        CONTROL,
        "security.istio.io",
        &["authorizationpolicies", "peerauthentications", "requestauthentications"],
        READ,
        "policies",
    ),
    of_cluster(
        CONTROL,
        "security.istio.io",
        &["authorizationpolicies/status", "peerauthentications/status", "requestauthentications/status"],
        STATUS,
        "conditions of them",
    ),
    of_cluster(
        CONTROL,
        "networking.istio.io",
        &["destinationrules", "serviceentries"],
        READ,
        "traffic policies, and hosts outside",
    ),
    of_cluster(
        CONTROL,
        "networking.istio.io",
        &["destinationrules/status", "serviceentries/status"],
        STATUS,
        "conditions of them",
    ),
    of_cluster(CONTROL, "tulle.dev", &["egresspolicies", "httpfaults", "httpratelimits"], READ, "own kinds"),
    of_cluster(
        CONTROL,
        "tulle.dev",
        &["egresspolicies/status", "httpfaults/status", "httpratelimits/status"],
        STATUS,
        "conditions of them",
    ),
    of_cluster(CONTROL, "certificates.k8s.io", &["clustertrustbundles"], READ, "roots of federated trust domains"),
    Permission {
        names: &[BUNDLE],
        ..of_cluster(
            CONTROL,
            "certificates.k8s.io",
            &["clustertrustbundles"],
            &["create", "patch"],
            "publishes the own roots, where the cluster serves the kind",
        )
    },
    Permission {
        names: &[SIGNER],
        ..of_cluster(
            CONTROL,
            "certificates.k8s.io",
            &["signers"],
            &["attest"],
            "the API server wants it for that object",
        )
    },
    of_cluster(
        CONTROL,
        "apiextensions.k8s.io",
        &["customresourcedefinitions"],
        READ,
        "kinds that are installed later are picked up",
    ),
    of_cluster(CONTROL, "authentication.k8s.io", &["tokenreviews"], &["create"], "who calls: tokens of node proxies"),
    own(
        "",
        &["secrets", "configmaps"],
        &[],
        &["create"],
        "the first replica makes the two below; a name cannot be asked for where an object is made",
    ),
    own("", &["secrets"], &[CA_SECRET], &["get", "list", "watch", "update"], "keys of the certificate authority"),
    own("", &["secrets"], &[PLUGGED_SECRET], READ, "an intermediate of another CA, if there is one"),
    own(
        "",
        &["configmaps"],
        &["tulle-ca-root-cert"],
        &["get", "list", "watch", "patch"],
        "roots that proxies check control with",
    ),
    own(
        "coordination.k8s.io",
        &["leases"],
        &[],
        &["create", "get", "list", "update", "patch", "delete"],
        "one replica writes status; each says in one of its own what its nodes have",
    ),
    of_cluster(
        NODE,
        "",
        &["namespaces", "pods"],
        READ,
        "which pods of the node are enrolled; the CNI plugin asks, too",
    ),
    of_cluster(
        NODE,
        "",
        &["pods/status"],
        &["patch"],
        "says which pods are captured; of its own node only (admission policy)",
    ),
    of_cluster(
        NODE,
        "",
        &["nodes/status"],
        &["patch"],
        "condition TulleReady; of its own node only (admission policy)",
    ),
];

/// All rules with their reasons.
pub fn permissions() -> &'static [Permission] {
    PERMISSIONS
}

pub(super) fn objects(input: &Input<'_>) -> Vec<Value> {
    let mut objects = vec![
        role(input, CONTROL, "control", false),
        binding(input, CONTROL, "control", false),
        role(input, CONTROL, "control", true),
        binding(input, CONTROL, "control", true),
        role(input, NODE, "ztunnel", false),
        binding(input, NODE, "ztunnel", false),
    ];
    if input.values.node_restriction.enabled {
        objects.extend(restriction(input));
        objects.extend(own_policies(input));
    }
    objects
}

const API: &str = "rbac.authorization.k8s.io";

fn kind_of(namespaced: bool) -> &'static str {
    if namespaced { "Role" } else { "ClusterRole" }
}

fn meta(input: &Input<'_>, name: &str, component: &str, namespaced: bool) -> Value {
    if namespaced { input.meta(name, component) } else { input.cluster_meta(name, component) }
}

fn role(input: &Input<'_>, name: &str, component: &str, namespaced: bool) -> Value {
    let chosen = |name: &&'static str| match *name {
        CA_SECRET => input.values.control.ca_secret.as_str(),
        PLUGGED_SECRET => input.values.control.plugged_ca_secret.as_str(),
        BUNDLE | SIGNER if input.values.control.cluster_trust_bundle == "off" => "",
        name => name,
    };
    let rules = PERMISSIONS.iter().filter(|one| one.role == name && one.namespaced == namespaced).filter_map(|one| {
        let mut rule = json!({"apiGroups": [one.group], "resources": one.resources, "verbs": one.verbs});
        if !one.names.is_empty() {
            let names: Vec<_> = one.names.iter().map(chosen).filter(|name| !name.is_empty()).collect();
            if names.is_empty() {
                return None;
            }
            rule["resourceNames"] = names.into();
        }
        Some(rule)
    });
    json!({
        "apiVersion": format!("{API}/v1"),
        "kind": kind_of(namespaced),
        "metadata": meta(input, name, component, namespaced),
        "rules": rules.collect::<Vec<_>>(),
    })
}

fn binding(input: &Input<'_>, name: &str, account: &str, namespaced: bool) -> Value {
    json!({
        "apiVersion": format!("{API}/v1"),
        "kind": format!("{}Binding", kind_of(namespaced)),
        "metadata": meta(input, name, account, namespaced),
        "roleRef": {"apiGroup": API, "kind": kind_of(namespaced), "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": input.namespace}],
    })
}

/// An admission policy and its binding: for one account, when it does one of these operations on these resources.
fn admission(input: &Input<'_>, name: &str, account: &str, rule: Value, more: Value) -> [Value; 2] {
    const API: &str = "admissionregistration.k8s.io/v1";
    let by = format!("request.userInfo.username == \"system:serviceaccount:{}:{account}\"", input.namespace);
    let mut spec = json!({
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [{"name": format!("by-{account}"), "expression": by}],
    });
    if let (Value::Object(spec), Value::Object(more)) = (&mut spec, more) {
        spec.extend(more);
    }
    let policy = json!({
        "apiVersion": API, "kind": "ValidatingAdmissionPolicy", "metadata": input.cluster_meta(name, account), "spec": spec,
    });
    let binding = json!({
        "apiVersion": API,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": input.cluster_meta(name, account),
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    });
    [policy, binding]
}

fn forbidden(expression: &str, message: &str) -> Value {
    json!({"expression": expression, "message": message, "reason": "Forbidden"})
}

/// The admission policy that holds control to NetworkPolicies of its own: their names are those of no role.
fn own_policies(input: &Input<'_>) -> [Value; 2] {
    let own = |object: &str| {
        format!(
            "{object}.metadata.name.startsWith(\"{}\") && {object}.metadata.?labels[?\"{}\"].orValue(\"\") == \"{}\"",
            names::BESIDE,
            names::LABEL_MANAGED,
            names::MANAGED
        )
    };
    let message = "control of Tulle writes and deletes NetworkPolicies of its own alone";
    let rule = json!({
        "apiGroups": ["networking.k8s.io"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE", "DELETE"],
        "resources": ["networkpolicies"],
    });
    let validations = json!({"validations": [
        forbidden(&format!("request.operation == \"DELETE\" || {}", own("object")), message),
        forbidden(&format!("request.operation == \"CREATE\" || {}", own("oldObject")), message),
    ]});
    admission(input, "tulle-control-restriction", "control", rule, validations)
}

/// The admission policy that holds a node proxy to its own node, and to what it has to write there.
fn restriction(input: &Input<'_>) -> [Value; 2] {
    let node = "has(request.userInfo.extra) && \"authentication.kubernetes.io/node-name\" in request.userInfo.extra \
                ? request.userInfo.extra[\"authentication.kubernetes.io/node-name\"][0] : \"\"";
    let own = "variables.node != \"\" && (request.resource.resource == \"nodes\" \
               ? object.metadata.name == variables.node \
               : has(object.spec.nodeName) && object.spec.nodeName == variables.node)";
    let little = "object.metadata.?labels == oldObject.metadata.?labels \
                  && (request.resource.resource == \"nodes\" || object.status == oldObject.status)";
    let annotation = "request.resource.resource == \"nodes\" || ( \
                      object.metadata.?annotations.orValue({}).all(key, key == \"ambient.istio.io/redirection\" \
                      || key in oldObject.metadata.?annotations.orValue({}) \
                      && oldObject.metadata.annotations[key] == object.metadata.annotations[key]) \
                      && oldObject.metadata.?annotations.orValue({}).all(key, key == \"ambient.istio.io/redirection\" \
                      || key in object.metadata.?annotations.orValue({})))";
    let nothing_else = "a proxy of Tulle changes one annotation of pods and the conditions of its node, nothing else";
    let rule = json!({
        "apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["pods/status", "nodes/status"],
    });
    let more = json!({
        "variables": [{"name": "node", "expression": node}],
        "validations": [
            forbidden(own, "a proxy of Tulle speaks of its own node and of the pods on it alone"),
            forbidden(little, nothing_else),
            forbidden(annotation, nothing_else),
        ],
    });
    admission(input, "tulle-node-restriction", "ztunnel", rule, more)
}
