//! Who else is in the cluster and would be in the way: the CNI, other meshes, and policies that another program enforces.
//!
//! Pure. Programs are known by the names of their DaemonSets, which their charts give them; one that was renamed is not found.

use std::collections::BTreeSet;

use serde_json::Value;
use tulle_proto::enrol;

use crate::cli::check::before::some;
use crate::cli::check::objects::{Objects, annotation, containers, label, list, meta, name, path};
use crate::cli::check::{Finding, Severity};

/// DaemonSets of networks, and what people call those.
const NETWORKS: &[(&str, &str)] = &[
    ("cilium", "Cilium"),
    ("anetd", "GKE Dataplane V2 (Cilium)"),
    ("calico-node", "Calico"),
    ("canal", "Canal"),
    ("kube-flannel-ds", "Flannel"),
    ("aws-node", "Amazon VPC CNI"),
    ("azure-cns", "Azure CNI"),
    ("antrea-agent", "Antrea"),
    ("kube-router", "kube-router"),
    ("ovnkube-node", "OVN-Kubernetes"),
    ("weave-net", "Weave Net"),
    ("kindnet", "kindnet"),
    ("kube-multus-ds", "Multus"),
];

pub(super) fn findings(objects: &Objects) -> Vec<Finding> {
    let mut found = networks(objects);
    found.extend(cilium(objects));
    found.extend(meshes(objects));
    found.extend(foreign_policies(objects, None));
    found
}

fn networks(objects: &Objects) -> Vec<Finding> {
    let mut found = Vec::new();
    let known: Vec<(&Value, &str)> = objects
        .of("DaemonSet")
        .iter()
        .filter_map(|set| Some((set, NETWORKS.iter().find(|(own, _)| *own == name(set))?.1)))
        .collect();
    for (set, what) in &known {
        let object = format!("DaemonSet {}", path(set));
        found.push(Finding::new(Severity::Note, "cni", object.clone(), format!("the network is {what}")));
        let env = |key: &str| {
            let all =
                list(&set["spec"]["template"]["spec"]["containers"]).flat_map(|container| list(&container["env"]));
            all.filter(|env| env["name"] == key).find_map(|env| env["value"].as_str()).unwrap_or_default().to_owned()
        };
        if name(set) == "kube-multus-ds" {
            found.push(
                Finding::new(
                    Severity::Note,
                    "cni-multus",
                    object.clone(),
                    "pods may have further interfaces (macvlan, SR-IOV): the mesh carries what goes by the first one, and a pod \
                     whose interface does not end at the node cannot be fenced",
                )
                .fix("keep such pods out of namespaces with tulle.dev/egress: deny, or read `Unfenced` in `tulle status`"),
            );
        }
        if matches!(env("FELIX_BPFENABLED").to_ascii_lowercase().as_str(), "true" | "1" | "enabled") {
            found.push(
                Finding::new(
                    Severity::Warning,
                    "calico-ebpf",
                    object.clone(),
                    "Calico's eBPF data plane passes by the node's netfilter, by which probes of the kubelet are marked",
                )
                .fix("use Calico 3.29 or later, and see that pods of the mesh stay ready under STRICT; else the nftables data plane"),
            );
        }
        if env("ENABLE_POD_ENI") == "true" && env("POD_SECURITY_GROUP_ENFORCING_MODE") != "standard" {
            found.push(
                Finding::new(
                    Severity::Warning,
                    "aws-pod-eni",
                    object,
                    "pods with security groups of their own have branch interfaces whose traffic from the node is not answered there",
                )
                .fix("set POD_SECURITY_GROUP_ENFORCING_MODE=standard, or keep those pods out of the mesh"),
            );
        }
    }
    if known.is_empty() && !objects.of("Node").is_empty() && !objects.unknown().contains_key("DaemonSet") {
        found.push(Finding::new(
            Severity::Note,
            "cni",
            "",
            "no network is known by its DaemonSet; any that gives each pod a network namespace of its own will do",
        ));
    }
    found
}

/// Cilium's settings that keep traffic away from any mesh.
fn cilium(objects: &Objects) -> Vec<Finding> {
    let mut found = Vec::new();
    for config in objects.of("ConfigMap").iter().filter(|config| name(config) == "cilium-config") {
        let get = |key: &str| config["data"][key].as_str().unwrap_or_default();
        let object = format!("ConfigMap {}", path(config));
        let in_sockets = get("bpf-lb-sock") == "true" || matches!(get("kube-proxy-replacement"), "true" | "strict");
        if in_sockets && get("bpf-lb-sock-hostns-only") != "true" {
            found.push(
                Finding::new(
                    Severity::Error,
                    "cilium-socket-lb",
                    object.clone(),
                    "Cilium replaces Service addresses in the sockets of pods (bpf-lb-sock-hostns-only is not \"true\"): the proxy \
                     then sees pods and no Services, so routes, breakers and policies of Services have no effect",
                )
                .fix("set socketLB.hostNamespaceOnly=true in Cilium's values, and restart its agents"),
            );
        }
        // Absent means true: that is Cilium's default.
        if get("cni-exclusive") != "false" {
            found.push(
                Finding::new(
                    Severity::Error,
                    "cilium-exclusive",
                    object.clone(),
                    "Cilium renames the CNI configurations of others (cni-exclusive is not \"false\"): pods would start without the \
                     mesh's plugin",
                )
                .fix("set cni.exclusive=false in Cilium's values, and restart its agents"),
            );
        }
        if get("enable-bpf-masquerade") == "true" {
            found.push(
                Finding::new(
                    Severity::Warning,
                    "cilium-masquerade",
                    object.clone(),
                    "Cilium masquerades by eBPF, which passes by the node's netfilter: probes of the kubelet may reach pods of the mesh \
                     without the address that marks them",
                )
                .fix("set bpf.masquerade=false, or see that pods of the mesh stay ready under STRICT before you rely on it"),
            );
        }
    }
    found
}

/// Labels and annotations by which other meshes take pods in.
fn claimed_by(object: &Value) -> Option<&'static str> {
    let is = |key: &str, values: &[&str]| label(object, key).is_some_and(|value| values.contains(&value));
    if is("istio-injection", &["enabled"]) || label(object, "istio.io/rev").is_some() {
        return Some("Istio's sidecar injection");
    }
    if annotation(object, "linkerd.io/inject").is_some_and(|value| value == "enabled" || value == "ingress") {
        return Some("Linkerd's injection");
    }
    if is("kuma.io/sidecar-injection", &["enabled"]) {
        return Some("Kuma's injection");
    }
    (annotation(object, "consul.hashicorp.com/connect-inject") == Some("true")).then_some("Consul's injection")
}

/// The proxy of another mesh that is in a pod.
pub(super) fn sidecar(pod: &Value) -> Option<&'static str> {
    containers(pod).find_map(|container| match container["name"].as_str()? {
        "istio-proxy" => Some("Istio's proxy"),
        "linkerd-proxy" => Some("Linkerd's proxy"),
        "kuma-sidecar" => Some("Kuma's proxy"),
        "consul-dataplane" => Some("Consul's proxy"),
        _ => None,
    })
}

/// Whether a namespace's label says that its pods are in the mesh.
pub(super) fn is_labelled(namespace: &Value) -> bool {
    enrol::wish(|key| label(namespace, key)) == Some(true)
}

fn meshes(objects: &Objects) -> Vec<Finding> {
    let mut found = Vec::new();
    for set in objects.of("DaemonSet").iter().filter(|set| name(set) == "istio-cni-node") {
        let ambient = objects
            .of("DaemonSet")
            .iter()
            .any(|other| name(other) == "ztunnel" && meta(other, "namespace") == meta(set, "namespace"));
        let object = format!("DaemonSet {}", path(set));
        if ambient {
            found.push(
                Finding::new(
                    Severity::Error,
                    "istio-ambient",
                    object,
                    "Istio's ambient mode runs here: both would capture pods of namespaces labelled istio.io/dataplane-mode: ambient, and \
                     both write the annotation ambient.istio.io/redirection",
                )
                .fix("move namespaces one by one as docs/migrate-istio-ambient.md says, with tulle.dev/mesh: disabled on those that stay"),
            );
        } else {
            found.push(Finding::new(
                Severity::Note,
                "istio-cni",
                object,
                "Istio's CNI plugin is here; sidecars and Tulle may not share pods",
            ));
        }
    }
    for namespace in objects.of("Namespace") {
        let Some(by) = claimed_by(namespace) else { continue };
        let (severity, what) = match is_labelled(namespace) {
            true => (Severity::Error, format!("it is in the mesh and has {by}, too: new pods would have two proxies")),
            false => (Severity::Note, format!("it has {by}")),
        };
        found.push(
            Finding::new(severity, "other-mesh", format!("Namespace {}", name(namespace)), what)
                .fix("before you label it for Tulle, take the other label away and restart its pods"),
        );
    }
    let labelled: BTreeSet<&str> = objects.of("Namespace").iter().filter(|ns| is_labelled(ns)).map(name).collect();
    for pod in objects.of("Pod").iter().filter(|pod| labelled.contains(meta(pod, "namespace"))) {
        if let Some(proxy) = sidecar(pod) {
            found.push(
                Finding::new(
                    Severity::Error,
                    "sidecar",
                    format!("Pod {}", path(pod)),
                    format!("it is labelled for the mesh and contains {proxy}"),
                )
                .fix("restart it without injection, or label it tulle.dev/mesh=disabled until then"),
            );
        }
    }
    found
}

/// Policies that another program enforces on the packets of tunnels, which all go to port 15008.
pub(super) fn foreign_policies(objects: &Objects, namespace: Option<&str>) -> Vec<Finding> {
    let kinds = [
        ("CiliumNetworkPolicy", "Cilium"),
        ("CiliumClusterwideNetworkPolicy", "Cilium"),
        ("GlobalNetworkPolicy", "Calico"),
    ];
    let mut found = Vec::new();
    for (kind, by) in kinds {
        let all = objects.of(kind).iter();
        let here: Vec<String> = all
            .filter(|policy| {
                namespace.is_none_or(|own| matches!(meta(policy, "namespace"), of if of.is_empty() || of == own))
            })
            .map(path)
            .collect();
        if here.is_empty() {
            continue;
        }
        let names: Vec<&str> = here.iter().map(String::as_str).collect();
        found.push(
            Finding::new(
                Severity::Warning,
                "foreign-policy",
                kind,
                format!(
                    "{by} enforces {} on packets, and between pods of the mesh those are tunnels to port 15008; Tulle reads \
                     NetworkPolicies only, so what these say of ports is not judged inside of tunnels",
                    some(&names)
                ),
            )
            .fix("admit TCP 15008 between pods of the mesh there, and say by NetworkPolicy or AuthorizationPolicy who may call what"),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::findings;
    use crate::cli::check::objects::Objects;

    fn shown(text: &str) -> Vec<String> {
        let found = findings(&Objects::of_text(text));
        found.iter().map(|one| format!("{} {} {}", one.severity.word(), one.id, one.object)).collect()
    }

    #[test]
    fn what_is_in_the_way_is_found_by_name_and_setting() {
        let cilium = |data: &str| {
            format!(
                "{{kind: DaemonSet, metadata: {{name: cilium, namespace: kube-system}}}}\n---\n\
                 {{kind: ConfigMap, metadata: {{name: cilium-config, namespace: kube-system}}, data: {data}}}"
            )
        };
        let network = "note cni DaemonSet kube-system/cilium";
        let of = "ConfigMap kube-system/cilium-config";
        for (text, expected) in [
            (cilium("{kube-proxy-replacement: 'true'}"), vec![network.to_owned(), format!("error cilium-socket-lb {of}"), format!("error cilium-exclusive {of}")]),
            (cilium("{bpf-lb-sock: 'true', bpf-lb-sock-hostns-only: 'true', cni-exclusive: 'false'}"), vec![network.to_owned()]),
            (cilium("{cni-exclusive: 'false', enable-bpf-masquerade: 'true'}"), vec![network.to_owned(), format!("warning cilium-masquerade {of}")]),
            (
                "{kind: DaemonSet, metadata: {name: calico-node, namespace: c}, spec: {template: {spec: {containers: [{env: [{name: FELIX_BPFENABLED, value: 'true'}]}]}}}}".into(),
                vec!["note cni DaemonSet c/calico-node".into(), "warning calico-ebpf DaemonSet c/calico-node".into()],
            ),
            (
                "{kind: DaemonSet, metadata: {name: aws-node, namespace: s}, spec: {template: {spec: {containers: [{env: [{name: ENABLE_POD_ENI, value: 'true'}]}]}}}}".into(),
                vec!["note cni DaemonSet s/aws-node".into(), "warning aws-pod-eni DaemonSet s/aws-node".into()],
            ),
            (
                "{kind: DaemonSet, metadata: {name: istio-cni-node, namespace: i}}\n---\n{kind: DaemonSet, metadata: {name: ztunnel, namespace: i}}".into(),
                vec!["error istio-ambient DaemonSet i/istio-cni-node".into()],
            ),
            ("{kind: Namespace, metadata: {name: a, labels: {istio-injection: enabled}}}".into(), vec!["note other-mesh Namespace a".into()]),
            (
                "{kind: Namespace, metadata: {name: a, labels: {tulle.dev/mesh: enabled}, annotations: {linkerd.io/inject: enabled}}}\n---\n\
                 {kind: Pod, metadata: {name: p, namespace: a}, spec: {containers: [{name: linkerd-proxy}]}}".into(),
                vec!["error other-mesh Namespace a".into(), "error sidecar Pod a/p".into()],
            ),
            ("{kind: CiliumNetworkPolicy, metadata: {name: x, namespace: a}}".into(), vec!["warning foreign-policy CiliumNetworkPolicy".into()]),
            ("{kind: Node, metadata: {name: n}}".into(), vec!["note cni ".into()]),
        ] {
            assert_eq!(shown(&text), expected, "{text}");
        }
    }
}
