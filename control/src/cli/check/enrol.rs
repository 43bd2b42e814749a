//! What labelling a namespace would mean for its pods: who cannot take part, what stays outside of the mesh, and what else holds
//! there.
//!
//! Pure. Labelling itself changes no status code and breaks no connection, so most of this is worth knowing and little is an
//! error: what would make it fail is a second mesh in the same pods.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tulle_proto::enrol;

use crate::cli::check::before::some;
use crate::cli::check::objects::{Objects, annotation, is_finished, label, list, name, selects, workload};
use crate::cli::check::others::{foreign_policies, is_labelled, sidecar};
use crate::cli::check::{Finding, Severity};

pub(super) fn findings(objects: &Objects, namespace: &str, root: &str) -> Vec<Finding> {
    let object = format!("Namespace {namespace}");
    let own = objects.one("Namespace", "", namespace);
    let pods: Vec<&Value> = objects.within("Pod", namespace).filter(|pod| !is_finished(pod)).collect();
    let mut found = Vec::new();
    if own.is_none() && pods.is_empty() {
        return vec![
            Finding::new(Severity::Error, "namespace", object, "there is no such namespace, and no pod in it")
                .fix("see `kubectl get namespaces`"),
        ];
    }
    if own.is_some_and(is_labelled) {
        found.push(Finding::new(Severity::Note, "namespace", object.clone(), "it is labelled already"));
    }
    if enrol::is_system(namespace, root) {
        found.push(
            Finding::new(
                Severity::Warning,
                "system",
                object.clone(),
                "it holds what the cluster itself needs; in the mesh, its pods fail closed while their node's proxy is down",
            )
            .fix("leave it out, unless a policy must know its pods by identity"),
        );
    }
    found.extend(outside(&pods, namespace));
    found.extend(policies(objects, namespace, &pods));
    found.extend(foreign_policies(objects, Some(namespace)));
    found.extend(without_proxy(objects, &pods, namespace, root));
    found.extend(jobs(&pods, namespace));
    let number = pods.iter().filter(|pod| pod["spec"]["hostNetwork"] != true && !opts_out(pod)).count();
    let text = format!(
        "{number} pods would be captured as they run; nothing restarts, and plaintext is still taken (PERMISSIVE)"
    );
    found.push(Finding::new(Severity::Note, "pods", object, text));
    found
}

/// Whether a pod's own labels keep it out.
fn opts_out(pod: &Value) -> bool {
    match label(pod, "tulle.dev/mesh") {
        Some("disabled") => true,
        Some("enabled") => false,
        _ => label(pod, "istio.io/dataplane-mode") == Some("none"),
    }
}

/// Pods that cannot take part, or only by one of their interfaces.
fn outside(pods: &[&Value], namespace: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut named = |severity, id, list: Vec<&Value>, what: &str, fix: &str| {
        let names: BTreeSet<String> = list.into_iter().map(|pod| workload(pod).1).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if !names.is_empty() {
            let text = format!("{} {what}", some(&names));
            found.push(Finding::new(severity, id, format!("Namespace {namespace}"), text).fix(fix));
        }
    };
    let filter = |wanted: &dyn Fn(&Value) -> bool| pods.iter().copied().filter(|pod| wanted(pod)).collect::<Vec<_>>();
    named(
        Severity::Warning,
        "host-network",
        filter(&|pod| pod["spec"]["hostNetwork"] == true),
        "run on the host network and stay outside: they have no identity, and servers under STRICT refuse them",
        "keep the ports that they call open (`tulle check --strict` of the servers' namespaces says which), or move them off the host network",
    );
    named(
        Severity::Error,
        "sidecar",
        filter(&|pod| sidecar(pod).is_some()),
        "contain the proxy of another mesh: both would intercept the same connections",
        "switch that injection off and restart them, or label those pods tulle.dev/mesh=disabled until then",
    );
    named(
        Severity::Warning,
        "interfaces",
        filter(&|pod| annotation(pod, "k8s.v1.cni.cncf.io/networks").is_some()),
        "have further network interfaces: what goes by those is captured, too, and arrives from the first one's address",
        "see that what they reach by those interfaces does not depend on the interface; else label them tulle.dev/mesh=disabled",
    );
    named(Severity::Note, "opted-out", filter(&opts_out), "stay outside by labels of their own", "");
    found
}

/// NetworkPolicies go on to hold, inside of the tunnels.
fn policies(objects: &Objects, namespace: &str, pods: &[&Value]) -> Vec<Finding> {
    let isolating: Vec<&str> = objects
        .within("NetworkPolicy", namespace)
        .filter(|policy| {
            policy["spec"]["ingress"].is_array() || list(&policy["spec"]["policyTypes"]).any(|kind| kind == "Ingress")
        })
        .filter(|policy| {
            let labels = &policy["spec"]["podSelector"]["matchLabels"];
            let all = labels.as_object().is_none_or(serde_json::Map::is_empty);
            all || pods.iter().any(|pod| selects(labels, pod))
        })
        .map(name)
        .collect();
    if isolating.is_empty() {
        return Vec::new();
    }
    let what = format!(
        "NetworkPolicies isolate pods here ({}): the network sees tunnels to port 15008, so control adds one policy that admits that \
         port, and the proxies judge these policies on what is inside",
        some(&isolating)
    );
    vec![Finding::new(Severity::Note, "network-policy", format!("Namespace {namespace}"), what)]
}

/// Nodes with pods of the namespace and without a proxy.
fn without_proxy(objects: &Objects, pods: &[&Value], namespace: &str, root: &str) -> Vec<Finding> {
    let proxies: BTreeSet<&str> = objects
        .within("Pod", root)
        .filter(|pod| label(pod, "app.kubernetes.io/name") == Some("ztunnel") || name(pod).starts_with("ztunnel-"))
        .filter_map(|pod| pod["spec"]["nodeName"].as_str())
        .collect();
    if objects.one("DaemonSet", root, "ztunnel").is_none() {
        return Vec::new();
    }
    let used: BTreeSet<&str> = pods.iter().filter_map(|pod| pod["spec"]["nodeName"].as_str()).collect();
    let missing: Vec<&str> = used.difference(&proxies).copied().collect();
    if missing.is_empty() {
        return Vec::new();
    }
    let what = format!("pods of it run on nodes without a proxy ({}), where they cannot be captured", some(&missing));
    vec![
        Finding::new(Severity::Error, "no-proxy", format!("Namespace {namespace}"), what)
            .fix("see ztunnel.nodeSelector and ztunnel.tolerations of the installation"),
    ]
}

/// What people ask about first.
fn jobs(pods: &[&Value], namespace: &str) -> Vec<Finding> {
    let mut kinds: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for pod in pods {
        let (kind, name) = workload(pod);
        match kind.as_str() {
            "Job" => kinds.entry("Jobs end as before, since nothing is added to their pods").or_default().insert(name),
            "StatefulSet" => kinds
                .entry("StatefulSets keep their names and addresses; pods that call each other by address do so with an identity")
                .or_default()
                .insert(name),
            _ => continue,
        };
    }
    let one = |(text, names): (&str, BTreeSet<String>)| {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Finding::new(
            Severity::Note,
            "workloads",
            format!("Namespace {namespace}"),
            format!("{text} ({})", some(&names)),
        )
    };
    kinds.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::findings;
    use crate::cli::check::objects::Objects;

    fn shown(text: &str) -> Vec<String> {
        let found = findings(&Objects::of_text(text), "shop", "tulle-system");
        found.iter().map(|one| format!("{} {}: {}", one.severity.word(), one.id, one.what)).collect()
    }

    #[test]
    fn what_labelling_means_is_told_before_it_is_done() {
        let pod = |meta: &str, spec: &str| {
            format!(
                "\n---\n{{kind: Pod, metadata: {{name: p, namespace: shop, {meta}}}, spec: {{nodeName: n1, {spec}}}}}"
            )
        };
        let own = "{kind: Namespace, metadata: {name: shop}}".to_owned();
        let last = "note pods: 1 pods would be captured as they run";
        for (text, expected) in [
            (own.clone() + &pod("labels: {}", "containers: []"), vec![last]),
            (
                own.clone() + &pod("labels: {}", "hostNetwork: true"),
                vec!["warning host-network: p run on the host network", "note pods: 0 pods"],
            ),
            (
                own.clone() + &pod("labels: {}", "containers: [{name: istio-proxy}]"),
                vec!["error sidecar: p contain the proxy", last],
            ),
            (
                own.clone() + &pod("annotations: {k8s.v1.cni.cncf.io/networks: a}", "containers: []"),
                vec!["warning interfaces: p have further", last],
            ),
            (
                own.clone() + &pod("labels: {tulle.dev/mesh: disabled}", "containers: []"),
                vec!["note opted-out: p stay outside", "note pods: 0 pods"],
            ),
            (
                own.clone()
                    + &pod("labels: {}", "containers: []")
                    + "\n---\n{kind: NetworkPolicy, metadata: {name: deny, namespace: shop}, spec: {podSelector: {}, policyTypes: [Ingress]}}",
                vec!["note network-policy: NetworkPolicies isolate pods here (deny)", last],
            ),
            (
                own.clone()
                    + &pod("labels: {}", "containers: []")
                    + "\n---\n{kind: DaemonSet, metadata: {name: ztunnel, namespace: tulle-system}}",
                vec!["error no-proxy: pods of it run on nodes without a proxy (n1)", last],
            ),
            (
                own.clone() + &pod("ownerReferences: [{controller: true, kind: Job, name: j}]", "containers: []"),
                vec!["note workloads: Jobs end as before", last],
            ),
            (String::new(), vec!["error namespace: there is no such namespace"]),
            (
                own.replace("{name: shop}", "{name: shop, labels: {tulle.dev/mesh: enabled}}"),
                vec!["note namespace: it is labelled already", "note pods: 0 pods"],
            ),
        ] {
            let found = shown(&text);
            let fits = found.len() == expected.len() && found.iter().zip(&expected).all(|(a, b)| a.starts_with(b));
            assert!(fits, "{text}: {found:#?}");
        }
    }
}
