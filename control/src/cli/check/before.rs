//! What a cluster must have before Tulle comes: its version, kernels, definitions, rights, and where its runtime looks for CNI
//! plugins.
//!
//! Pure. The kernels' modules cannot be seen from the API: the node's own check at its start reports those, in the condition
//! `TulleReady`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::cli::check::cluster::Facts;
use crate::cli::check::objects::{Objects, annotation, label, list, name};
use crate::cli::check::{Finding, Severity};

/// Oldest minor version of Kubernetes 1 whose API has all that is installed: ValidatingAdmissionPolicy v1.
const OLDEST_MINOR: u64 = 30;
/// Oldest kernel: nftables with the expressions that the rules use, and IP_TRANSPARENT for both families.
const OLDEST_KERNEL: (u64, u64) = (5, 4);
/// First release of the Gateway API in which routes of Services are standard.
const GATEWAY_API: (u64, u64) = (1, 1);

/// Our own definitions.
const OWN: &[&str] = &["egresspolicies.tulle.dev", "httpfaults.tulle.dev", "httpratelimits.tulle.dev"];

pub(super) fn findings(objects: &Objects, facts: &Facts, installed: bool) -> Vec<Finding> {
    let mut found = version(&facts.version);
    found.extend(definitions(objects, installed));
    if !installed {
        found.extend(access(facts));
    }
    found.extend(kernels(objects));
    found.extend(cni_paths(objects));
    found
}

/// The two first numbers in a version.
fn numbers(text: &str) -> Option<(u64, u64)> {
    let mut parts = text.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn version(version: &Value) -> Vec<Finding> {
    let text = version["gitVersion"].as_str().unwrap_or_default();
    let finding = |severity, what: String| Finding::new(severity, "api-version", "API server", what);
    match numbers(text) {
        Some((1, minor)) if minor < OLDEST_MINOR => vec![
            finding(
                Severity::Error,
                format!("version {text} is older than 1.{OLDEST_MINOR}, the oldest that is supported"),
            )
            .fix("update the cluster"),
        ],
        Some((1, _)) => vec![finding(Severity::Note, format!("version {text}"))],
        Some((0, 0)) => {
            vec![finding(Severity::Note, format!("version {text}: a build that does not know its release"))]
        }
        _ => vec![finding(Severity::Warning, format!("its version `{text}` is not understood"))],
    }
}

fn access(facts: &Facts) -> Vec<Finding> {
    let one = |(what, answer): &(String, Result<bool, String>)| match answer {
        Ok(true) => None,
        Ok(false) => Some(
            Finding::new(Severity::Error, "rights", "", format!("you may not {what}, which an installation does"))
                .fix("install as a cluster administrator"),
        ),
        Err(why) => {
            Some(Finding::new(Severity::Warning, "rights", "", format!("whether you may {what} is not known: {why}")))
        }
    };
    facts.access.iter().filter_map(one).collect()
}

fn definitions(objects: &Objects, installed: bool) -> Vec<Finding> {
    let mut found = Vec::new();
    let of = |wanted: &str| objects.of("CustomResourceDefinition").iter().find(|crd| name(crd) == wanted);
    let serves = |crd: &Value, version: &str| {
        list(&crd["spec"]["versions"]).any(|v| v["name"] == version && v["served"] == true)
    };
    if objects.unknown().contains_key("CustomResourceDefinition") {
        return found;
    }
    for own in OWN {
        let object = format!("CustomResourceDefinition {own}");
        match of(own) {
            None if installed => found.push(
                Finding::new(
                    Severity::Error,
                    "definitions",
                    object,
                    "it is missing, so objects of this kind cannot be made",
                )
                .fix("install again: `tulle install`, or apply deploy/crds"),
            ),
            Some(crd) if !serves(crd, "v1alpha1") => found.push(
                Finding::new(
                    Severity::Error,
                    "definitions",
                    object,
                    "it does not serve v1alpha1, which this version reads",
                )
                .fix("install the definitions of this version"),
            ),
            _ => {}
        }
    }
    for route in ["httproutes.gateway.networking.k8s.io", "grpcroutes.gateway.networking.k8s.io"] {
        let object = format!("CustomResourceDefinition {route}");
        let Some(crd) = of(route) else {
            found.push(
                Finding::new(
                    Severity::Warning,
                    "gateway-api",
                    object,
                    "it is missing: there can be no routes, so no canary, retries or timeouts by routes",
                )
                .fix(
                    "install the standard channel of the Gateway API, 1.1 or later; Tulle picks it up when it appears",
                ),
            );
            continue;
        };
        let bundle = annotation(crd, "gateway.networking.k8s.io/bundle-version").unwrap_or_default();
        if !serves(crd, "v1") {
            found.push(
                Finding::new(
                    Severity::Error,
                    "gateway-api",
                    object,
                    "it does not serve v1, so its routes are not read",
                )
                .fix("install the Gateway API 1.1 or later"),
            );
        } else if numbers(bundle).is_some_and(|version| version < GATEWAY_API) {
            found.push(
                Finding::new(
                    Severity::Warning,
                    "gateway-api",
                    object,
                    format!("the Gateway API is {bundle}; routes with a Service as parent are standard from v1.1.0 on"),
                )
                .fix("update the Gateway API"),
            );
        }
    }
    found
}

fn kernels(objects: &Objects) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut others: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for node in objects.of("Node") {
        let info = &node["status"]["nodeInfo"];
        let text = |key: &str| info[key].as_str().unwrap_or_default();
        let object = format!("Node {}", name(node));
        if text("operatingSystem") == "windows" {
            others.entry("windows".to_owned()).or_default().push(name(node));
            continue;
        }
        if numbers(text("kernelVersion")).is_some_and(|version| version < OLDEST_KERNEL) {
            let (major, minor) = OLDEST_KERNEL;
            found.push(
                Finding::new(
                    Severity::Error,
                    "kernel",
                    object.clone(),
                    format!(
                        "its kernel {} is older than {major}.{minor}: pods there cannot be captured",
                        text("kernelVersion")
                    ),
                )
                .fix("update the node's operating system, or keep pods of the mesh away from it"),
            );
        }
        if !matches!(text("architecture"), "" | "amd64" | "arm64") {
            others.entry(text("architecture").to_owned()).or_default().push(name(node));
        }
    }
    for (what, nodes) in others {
        found.push(
            Finding::new(
                Severity::Warning,
                "platform",
                "",
                format!(
                    "{} of the nodes are {what} ({}): there is no proxy for them, and their pods stay outside the mesh",
                    nodes.len(),
                    some(&nodes)
                ),
            )
            .fix(
                "label pods that may run there tulle.dev/mesh=disabled, or keep them on Linux nodes of amd64 or arm64",
            ),
        );
    }
    found
}

/// Some of many names.
pub(super) fn some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    match names.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{} and {more} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    }
}

/// Where the runtimes of some distributions look for plugins, if that is not where most do: name, folder of plugins, folder of
/// configuration, and what else there is to know.
type Paths = (&'static str, &'static str, &'static str, &'static str);

fn paths(node: &Value) -> Option<Paths> {
    let info = &node["status"]["nodeInfo"];
    let (image, kubelet) =
        (info["osImage"].as_str().unwrap_or_default(), info["kubeletVersion"].as_str().unwrap_or_default());
    let has_label = |prefix: &str| {
        node["metadata"]["labels"].as_object().is_some_and(|labels| labels.keys().any(|key| key.starts_with(prefix)))
    };
    if kubelet.contains("+k3s") {
        return Some(("k3s", "/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d", ""));
    }
    if has_label("microk8s.io/") {
        return Some((
            "MicroK8s",
            "/var/snap/microk8s/current/opt/cni/bin",
            "/var/snap/microk8s/current/args/cni-network",
            "",
        ));
    }
    if has_label("node.openshift.io/")
        || image.contains("CoreOS") && has_label("node-role.kubernetes.io/worker") && image.contains("Red Hat")
    {
        return Some((
            "OpenShift",
            "/var/lib/cni/bin",
            "/etc/kubernetes/cni/net.d",
            "set ztunnel.seLinuxType=spc_t besides",
        ));
    }
    if has_label("cloud.google.com/gke") || image.contains("Container-Optimized OS") {
        return Some(("GKE", "/home/kubernetes/bin", "/etc/cni/net.d", "/opt/cni/bin is read-only there"));
    }
    if image.starts_with("Talos") {
        return Some((
            "Talos",
            "/opt/cni/bin",
            "/etc/cni/net.d",
            "both can be written although the system is read-only; the namespace must be labelled pod-security.kubernetes.io/enforce=privileged",
        ));
    }
    None
}

fn cni_paths(objects: &Objects) -> Vec<Finding> {
    let mut systems: BTreeMap<Paths, BTreeSet<&str>> = BTreeMap::new();
    for node in objects.of("Node").iter().filter(|node| label(node, "kubernetes.io/os") != Some("windows")) {
        if let Some(found) = paths(node) {
            systems.entry(found).or_default().insert(name(node));
        }
    }
    let one = |((system, bin, conf, more), nodes): (Paths, BTreeSet<&str>)| {
        let nodes: Vec<&str> = nodes.into_iter().collect();
        let what = format!(
            "{} of the nodes run {system} ({}): its runtime looks for CNI plugins in {bin}, for their configuration in {conf}",
            nodes.len(),
            some(&nodes)
        );
        let default = bin == "/opt/cni/bin" && conf == "/etc/cni/net.d";
        let set = match default {
            true => "the chart's defaults are right".to_owned(),
            false => format!("install with ztunnel.cni.binDir={bin} and ztunnel.cni.confDir={conf}"),
        };
        let severity = if default { Severity::Note } else { Severity::Warning };
        let more = if more.is_empty() { String::new() } else { format!("; {more}") };
        Finding::new(severity, "cni-paths", "", what).fix(format!("{set}{more}"))
    };
    systems.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{findings, numbers};
    use crate::cli::check::Severity;
    use crate::cli::check::cluster::Facts;
    use crate::cli::check::objects::Objects;

    const GOOD: &str = "
{kind: Node, metadata: {name: n1}, status: {nodeInfo: {operatingSystem: linux, architecture: amd64, kernelVersion: 6.1.0-18-amd64}}}
---
{kind: CustomResourceDefinition, metadata: {name: httproutes.gateway.networking.k8s.io, annotations: {gateway.networking.k8s.io/bundle-version: v1.3.0}}, spec: {versions: [{name: v1, served: true}]}}
---
{kind: CustomResourceDefinition, metadata: {name: grpcroutes.gateway.networking.k8s.io}, spec: {versions: [{name: v1, served: true}]}}
";

    fn facts(version: &str) -> Facts {
        Facts { version: json!({"gitVersion": version}), access: vec![("create namespaces".into(), Ok(true))] }
    }

    fn shown(text: &str, facts: &Facts, installed: bool) -> Vec<String> {
        let found = findings(&Objects::of_text(text), facts, installed);
        let bad = found.iter().filter(|finding| finding.severity != Severity::Note);
        bad.map(|finding| format!("{} {} {}: {}", finding.severity.word(), finding.id, finding.object, finding.what))
            .collect()
    }

    #[test]
    fn a_good_cluster_has_nothing_to_say() {
        assert_eq!(shown(GOOD, &facts("v1.36.2"), false), Vec::<String>::new());
    }

    #[test]
    fn each_obstacle_is_named() {
        let node = |name: &str, labels: &str, info: &str| {
            format!("\n---\n{{kind: Node, metadata: {{name: {name}, labels: {labels}}}, status: {{nodeInfo: {info}}}}}")
        };
        for (more, version, expected) in [
            (String::new(), "v1.22.1", "error api-version API server: version v1.22.1 is older than 1.30"),
            (String::new(), "x", "warning api-version API server: its version `x` is not understood"),
            (node("n2", "{}", "{kernelVersion: 4.18.0-305.el8}"), "v1.30.0", "error kernel Node n2: its kernel 4.18.0-305.el8"),
            (node("n2", "{}", "{operatingSystem: windows, kernelVersion: 10.0.1}"), "v1.30.0", "warning platform : 1 of the nodes are windows (n2)"),
            (node("n2", "{}", "{kubeletVersion: v1.30.2+k3s1}"), "v1.30.2+k3s1", "warning cni-paths : 1 of the nodes run k3s (n2): its runtime looks for CNI plugins in /var/lib/rancher/k3s/data/cni"),
            (node("n2", "{cloud.google.com/gke-nodepool: a}", "{osImage: Container-Optimized OS from Google}"), "v1.30.0-gke.1", "warning cni-paths : 1 of the nodes run GKE (n2): its runtime looks for CNI plugins in /home/kubernetes/bin"),
            (node("n2", "{node.openshift.io/os_id: rhcos}", "{}"), "v1.30.0", "warning cni-paths : 1 of the nodes run OpenShift"),
            (
                "\n---\n{kind: CustomResourceDefinition, metadata: {name: egresspolicies.tulle.dev}, spec: {versions: [{name: v2, served: true}]}}".into(),
                "v1.30.0",
                "error definitions CustomResourceDefinition egresspolicies.tulle.dev: it does not serve v1alpha1",
            ),
        ] {
            let found = shown(&format!("{GOOD}{more}"), &facts(version), false);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{expected}: {found:?}");
        }
        let found = shown("{kind: Node, metadata: {name: n1}}", &facts("v1.30.0"), true);
        assert_eq!(found.iter().filter(|text| text.contains("error definitions")).count(), 3, "{found:?}");
        assert_eq!(found.iter().filter(|text| text.contains("warning gateway-api")).count(), 2, "{found:?}");
    }

    #[test]
    fn missing_rights_are_errors_before_an_installation_only() {
        let facts = Facts {
            version: json!({"gitVersion": "v1.30.0"}),
            access: vec![
                ("create clusterroles".into(), Ok(false)),
                ("create namespaces".into(), Err("timeout".into())),
            ],
        };
        let found = shown(GOOD, &facts, false);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("you may not create clusterroles"), "{found:?}");
        assert_eq!(shown(GOOD, &facts, true).iter().filter(|text| text.contains("rights")).count(), 0);
    }

    #[test]
    fn versions_are_read_leniently() {
        for (text, expected) in [
            ("v1.36.2", Some((1, 36))),
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.15+", Some((5, 15))),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(numbers(text), expected, "{text}");
        }
    }
}
