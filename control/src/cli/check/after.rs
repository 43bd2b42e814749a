//! Whether an installation does what it should: control's replicas, a proxy on each node, certificates, versions, and pods whose
//! labels and capture differ.
//!
//! Pure, on objects and on what the nodes say of themselves through control, which may be missing: then a finding says why.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tulle_proto::enrol;
use tulle_proto::names;

use crate::base::unix_now;
use crate::cli::check::before::some;
use crate::cli::check::objects::{Objects, annotation, condition, is_finished, label, list, meta, name, path};
use crate::cli::check::{Finding, Severity};

/// The Node's condition that the agent on it writes.
const READY: &str = "TulleReady";
/// Certificates are renewed at half of their life of a day; what is this near to its end was not.
const EXPIRES_SOON: i64 = 6 * 3600;
/// The version of this program.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Whether there is an installation, or what is left of one.
pub(super) fn is_installed(objects: &Objects, root: &str) -> bool {
    objects.one("Deployment", root, "control").is_some() || objects.one("DaemonSet", root, "ztunnel").is_some()
}

pub(super) fn findings(objects: &Objects, root: &str, status: Option<&Value>, why: &str) -> Vec<Finding> {
    let mut found = deployment(objects, root);
    found.extend(daemon_set(objects, root));
    found.extend(nodes(objects, root));
    found.extend(trust(objects, root));
    found.extend(pods(objects, root, status));
    match status {
        Some(status) => {
            found.extend(said(status));
            found.extend(certificates(status, unix_now()));
        }
        None => found.push(
            Finding::new(
                Severity::Warning,
                "control",
                "",
                format!("control could not be asked what the nodes say: {why}"),
            )
            .fix("certificates, versions and capture as the proxies see them were not checked"),
        ),
    }
    found
}

fn deployment(objects: &Objects, root: &str) -> Vec<Finding> {
    let object = format!("Deployment {root}/control");
    let Some(control) = objects.one("Deployment", root, "control") else {
        return vec![
            Finding::new(Severity::Error, "control", object, "it is missing: proxies get no news and no certificates")
                .fix("install again: `tulle install`"),
        ];
    };
    let wanted = control["spec"]["replicas"].as_u64().unwrap_or(1);
    let ready = control["status"]["readyReplicas"].as_u64().unwrap_or(0);
    let logs = format!(
        "`kubectl -n {root} describe deployment control` and `kubectl -n {root} logs deployment/control` say why"
    );
    match ready {
        0 => vec![
            Finding::new(Severity::Error, "control", object, format!("none of {wanted} replicas is ready")).fix(logs),
        ],
        ready if ready < wanted => {
            vec![
                Finding::new(Severity::Warning, "control", object, format!("{ready} of {wanted} replicas are ready"))
                    .fix(logs),
            ]
        }
        _ => vec![Finding::new(Severity::Note, "control", object, format!("{ready} of {wanted} replicas are ready"))],
    }
}

fn daemon_set(objects: &Objects, root: &str) -> Vec<Finding> {
    let object = format!("DaemonSet {root}/ztunnel");
    let Some(set) = objects.one("DaemonSet", root, "ztunnel") else {
        return vec![
            Finding::new(
                Severity::Error,
                "proxies",
                object,
                "it is missing: enrolled pods have no proxy, and fail closed",
            )
            .fix("install again: `tulle install`"),
        ];
    };
    let mut found = ready_on(set, object.clone(), root);
    let alone = |node: &&Value| label(node, names::LABEL_PROXY) == Some("canary");
    let alone = objects.of("Node").iter().filter(alone).count() as u64;
    let canary = format!("DaemonSet {root}/{}", names::PROXY_CANARY);
    match objects.one("DaemonSet", root, names::PROXY_CANARY) {
        Some(canaries) if scheduled(canaries) > 0 => found.extend(ready_on(canaries, canary, root)),
        None if alone > 0 => {
            let key = names::LABEL_PROXY;
            let what = format!("it is missing, and {alone} nodes labelled {key}=canary have no other proxy");
            found.push(
                Finding::new(Severity::Error, "proxies", canary, what)
                    .fix(format!("kubectl label nodes -l {key}=canary {key}-")),
            );
        }
        _ => {}
    }
    let wanted = scheduled(set) + alone;
    let linux =
        objects.of("Node").iter().filter(|node| label(node, "kubernetes.io/os") != Some("windows")).count() as u64;
    if wanted < linux {
        let what = format!("{} of {linux} nodes have no proxy, so their pods cannot be in the mesh", linux - wanted);
        found.push(
            Finding::new(Severity::Warning, "proxies", object, what)
                .fix("see ztunnel.nodeSelector and ztunnel.tolerations of the installation"),
        );
    }
    found
}

/// How many nodes should have a pod of a DaemonSet.
fn scheduled(set: &Value) -> u64 {
    set["status"]["desiredNumberScheduled"].as_u64().unwrap_or(0)
}

/// On how many of its nodes a DaemonSet of proxies is ready.
fn ready_on(set: &Value, object: String, root: &str) -> Vec<Finding> {
    let (wanted, ready) = (scheduled(set), set["status"]["numberReady"].as_u64().unwrap_or(0));
    let what = format!("the proxy is ready on {ready} of {wanted} nodes");
    if ready >= wanted {
        return vec![Finding::new(Severity::Note, "proxies", object, what)];
    }
    let logs =
        format!("`kubectl -n {root} get pods -o wide` shows where; `kubectl -n {root} logs` of such a pod says why");
    let what = format!("{what}; enrolled pods of the others fail closed");
    vec![Finding::new(Severity::Error, "proxies", object, what).fix(logs)]
}

/// What each node's agent says in its condition, and nodes that say nothing.
fn nodes(objects: &Objects, root: &str) -> Vec<Finding> {
    let with_proxy: BTreeSet<&str> = objects
        .within("Pod", root)
        .filter(|pod| label(pod, "app.kubernetes.io/name") == Some("ztunnel") || name(pod).starts_with("ztunnel-"))
        .filter_map(|pod| pod["spec"]["nodeName"].as_str())
        .collect();
    let mut found = Vec::new();
    for node in objects.of("Node") {
        let object = format!("Node {}", name(node));
        match condition(node, READY) {
            Some(own) if own["status"] == "True" => {}
            Some(own) => {
                let text = |key: &str| own[key].as_str().unwrap_or_default();
                found.push(
                    Finding::new(
                        Severity::Error,
                        "node",
                        object,
                        format!("{READY} is {}: {} {}", text("status"), text("reason"), text("message")),
                    )
                    .fix(format!("`kubectl -n {root} logs` of the ztunnel pod of that node has more")),
                );
            }
            None if with_proxy.contains(name(node)) => found.push(
                Finding::new(
                    Severity::Warning,
                    "node",
                    object,
                    format!("its proxy has not written the condition {READY}"),
                )
                .fix("it may have just started; else it may not patch nodes/status: see its ClusterRole"),
            ),
            None => {}
        }
    }
    found
}

fn trust(objects: &Objects, root: &str) -> Vec<Finding> {
    if objects.unknown().contains_key("ConfigMap") {
        return Vec::new();
    }
    let object = format!("ConfigMap {root}/tulle-ca-root-cert");
    let bundle = objects.one("ConfigMap", root, "tulle-ca-root-cert");
    match bundle.and_then(|config| config["data"]["root-cert.pem"].as_str()) {
        Some(text) if text.contains("BEGIN CERTIFICATE") => Vec::new(),
        _ => vec![
            Finding::new(Severity::Error, "trust", object, "the roots are not there: no proxy can verify control")
                .fix("control writes it when it starts; its log says why it could not"),
        ],
    }
}

/// Nodes as control knows them.
fn said(status: &Value) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (node, state) in status["nodes"].as_object().into_iter().flatten() {
        let object = format!("Node {node}");
        if let Some(error) = state["error"].as_str() {
            found.push(
                Finding::new(Severity::Error, "attached", object.clone(), error.to_owned())
                    .fix("is its ztunnel running, and can it reach control on port 15012?"),
            );
            continue;
        }
        if let Some(version) = state["status"]["version"].as_str().filter(|version| !version.is_empty()) {
            versions.entry(version).or_default().push(node);
        }
        let waits: Vec<&str> = list(&state["status"]["pending"]).filter_map(Value::as_str).collect();
        if !waits.is_empty() {
            found.push(Finding::new(
                Severity::Error,
                "pending",
                object.clone(),
                format!("it is not ready: it waits for {}", waits.join("; ")),
            ));
        }
        let nacks: Vec<&str> = list(&state["nacks"]).filter_map(Value::as_str).collect();
        if !nacks.is_empty() {
            found.push(
                Finding::new(
                    Severity::Error,
                    "rejected",
                    object,
                    format!("it rejects what control sends: {}", nacks.join("; ")),
                )
                .fix("versions of control and proxy that differ by more than one are not tested"),
            );
        }
    }
    for waiting in list(&status["waiting"]).filter_map(Value::as_str) {
        found.push(Finding::new(
            Severity::Error,
            "control",
            "",
            format!("control is not ready, it waits for {waiting}"),
        ));
    }
    if versions.keys().any(|version| *version != VERSION) {
        let each: Vec<String> =
            versions.iter().map(|(version, nodes)| format!("{version} on {}", some(nodes))).collect();
        found.push(
            Finding::new(
                Severity::Warning,
                "versions",
                "",
                format!("this is {VERSION}; the proxies are {}", each.join(", ")),
            )
            .fix("an upgrade under way does this; else finish it, or use the `tulle` of that version"),
        );
    }
    found
}

fn certificates(status: &Value, now: i64) -> Vec<Finding> {
    let mut found = Vec::new();
    for (node, state) in status["nodes"].as_object().into_iter().flatten() {
        for certificate in list(&state["status"]["certificates"]) {
            let text = |key: &str| certificate[key].as_str().unwrap_or_default();
            let object = format!("Node {node}");
            let (identity, error) = (text("identity"), text("error"));
            let left = certificate["notAfter"].as_i64().filter(|at| *at > 0).map(|at| at - now);
            let because = if error.is_empty() { String::new() } else { format!(": {error}") };
            let fix = "control signs on port 15012; its log and the proxy's say why it did not";
            match left {
                Some(left) if left <= 0 => found.push(
                    Finding::new(
                        Severity::Error,
                        "certificate",
                        object,
                        format!("the certificate of {identity} has expired{because}"),
                    )
                    .fix(fix),
                ),
                Some(left) if left < EXPIRES_SOON => found.push(
                    Finding::new(
                        Severity::Warning,
                        "certificate",
                        object,
                        format!("the certificate of {identity} ends in {} min and was not renewed{because}", left / 60),
                    )
                    .fix(fix),
                ),
                None if !error.is_empty() => found.push(
                    Finding::new(
                        Severity::Error,
                        "certificate",
                        object,
                        format!("there is no certificate for {identity}{because}"),
                    )
                    .fix(fix),
                ),
                _ => {}
            }
        }
    }
    found
}

/// Whether labels want a pod in the mesh. What the mesh does by default about egress is not known here.
fn is_wanted(objects: &Objects, pod: &Value, root: &str) -> bool {
    if pod["spec"]["hostNetwork"] == true || is_finished(pod) {
        return false;
    }
    let name = meta(pod, "namespace");
    let namespace = objects.one("Namespace", "", name);
    let closed = enrol::is_closed(namespace.and_then(|it| label(it, names::LABEL_EGRESS)), false);
    let of_namespace = namespace.and_then(|it| enrol::wish(|key| label(it, key)));
    enrol::is_enrolled(closed, enrol::is_system(name, root), of_namespace, enrol::wish(|key| label(pod, key)))
}

/// Pods that labels want in the mesh and that are not, and the other way around.
fn pods(objects: &Objects, root: &str, status: Option<&Value>) -> Vec<Finding> {
    let mut said: BTreeMap<String, (&str, &str)> = BTreeMap::new();
    for (_, node) in status.and_then(|status| status["nodes"].as_object()).into_iter().flatten() {
        for pod in list(&node["status"]["pods"]) {
            let text = |key: &str| pod[key].as_str().unwrap_or_default();
            said.insert(format!("{}/{}", text("namespace"), text("name")), (text("capture"), text("reason")));
        }
    }
    let mut found = Vec::new();
    for pod in objects.of("Pod").iter().filter(|pod| !pod["spec"]["nodeName"].is_null() && !is_finished(pod)) {
        let (object, wanted) = (format!("Pod {}", path(pod)), is_wanted(objects, pod, root));
        let published = annotation(pod, "ambient.istio.io/redirection") == Some("enabled");
        let (captured, reason) = match said.get(&path(pod)) {
            Some((capture, reason)) => (*capture == "Captured", *reason),
            None => (published, ""),
        };
        let because = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        match (wanted, captured) {
            (true, false) if pod["status"]["podIP"].is_string() => found.push(
                Finding::new(
                    Severity::Error,
                    "capture",
                    object,
                    format!("its labels want it in the mesh, and it is not captured{because}"),
                )
                .fix("`tulle status` and the log of its node's ztunnel say why; new pods take some seconds"),
            ),
            (false, true) => found.push(
                Finding::new(
                    Severity::Warning,
                    "capture",
                    object,
                    "it is captured, and no label wants that (any more)",
                )
                .fix("it is released within some seconds; if not, the log of its node's ztunnel says why"),
            ),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{certificates, findings, said};
    use crate::cli::check::objects::Objects;
    use crate::cli::check::{Finding, Severity};

    const WHOLE: &str = "
{kind: Deployment, metadata: {name: control, namespace: tulle-system}, spec: {replicas: 2}, status: {readyReplicas: 2}}
---
{kind: DaemonSet, metadata: {name: ztunnel, namespace: tulle-system}, status: {desiredNumberScheduled: 1, numberReady: 1}}
---
{kind: ConfigMap, metadata: {name: tulle-ca-root-cert, namespace: tulle-system}, data: {root-cert.pem: '-----BEGIN CERTIFICATE-----'}}
---
{kind: Node, metadata: {name: n1}, status: {conditions: [{type: TulleReady, status: 'True'}]}}
---
{kind: Namespace, metadata: {name: shop, labels: {tulle.dev/mesh: enabled}}}
---
{kind: Pod, metadata: {name: cart, namespace: shop, annotations: {ambient.istio.io/redirection: enabled}}, spec: {nodeName: n1}, status: {podIP: 10.0.0.1}}
";

    fn lines(found: &[Finding]) -> Vec<String> {
        let bad = found.iter().filter(|finding| finding.severity != Severity::Note);
        bad.map(|one| format!("{} {} {}: {}", one.severity.word(), one.id, one.object, one.what)).collect()
    }

    fn shown(text: &str) -> Vec<String> {
        lines(&findings(&Objects::of_text(text), "tulle-system", Some(&json!({})), ""))
    }

    #[test]
    fn a_whole_installation_has_no_fault_and_each_fault_is_told() {
        assert_eq!(shown(WHOLE), Vec::<String>::new());
        for (from, to, expected) in [
            (
                "readyReplicas: 2",
                "readyReplicas: 1",
                "warning control Deployment tulle-system/control: 1 of 2 replicas are ready",
            ),
            (
                "readyReplicas: 2",
                "replicas: 2",
                "error control Deployment tulle-system/control: none of 2 replicas is ready",
            ),
            ("{name: control,", "{name: other,", "error control Deployment tulle-system/control: it is missing"),
            (
                "numberReady: 1",
                "numberReady: 0",
                "error proxies DaemonSet tulle-system/ztunnel: the proxy is ready on 0 of 1 nodes",
            ),
            (
                "Scheduled: 1, numberReady: 1",
                "Scheduled: 0",
                "warning proxies DaemonSet tulle-system/ztunnel: 1 of 1 nodes have no proxy",
            ),
            ("'-----BEGIN CERTIFICATE-----'", "''", "error trust ConfigMap tulle-system/tulle-ca-root-cert"),
            (
                "status: 'True'",
                "status: 'False', reason: NoTproxy, message: no module",
                "error node Node n1: TulleReady is False: NoTproxy no module",
            ),
            (
                "redirection: enabled",
                "redirection: pending",
                "error capture Pod shop/cart: its labels want it in the mesh",
            ),
            (
                "labels: {tulle.dev/mesh: enabled}",
                "labels: {}",
                "warning capture Pod shop/cart: it is captured, and no label",
            ),
        ] {
            let text = WHOLE.replacen(from, to, 1);
            assert_ne!(text, WHOLE, "{from}");
            let found = shown(&text);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{expected}: {found:?}");
        }
    }

    #[test]
    fn canaries_that_are_wanted_and_not_ready_are_told() {
        let set = |wanted: u32| {
            format!(
                "---\n{{kind: DaemonSet, metadata: {{name: ztunnel-canary, namespace: tulle-system}}, \
                 status: {{desiredNumberScheduled: {wanted}, numberReady: 0}}}}\n"
            )
        };
        for (label, more, expected) in [
            ("beside", set(0), None),
            ("beside", set(1), Some("ztunnel-canary: the proxy is ready on 0 of 1 nodes")),
            ("canary", set(1), Some("ztunnel-canary: the proxy is ready on 0 of 1 nodes")),
            ("canary", String::new(), Some("ztunnel-canary: it is missing, and 1 nodes")),
        ] {
            let labels = format!("{{name: n1, labels: {{tulle.dev/proxy: {label}}}}}");
            let found = shown(&(WHOLE.replacen("{name: n1}", &labels, 1) + &more));
            assert_eq!(found.len(), usize::from(expected.is_some()), "{label}: {found:?}");
            assert!(expected.is_none_or(|words| found[0].contains(words)), "{label}: {found:?}");
        }
    }

    #[test]
    fn labels_of_pods_and_closed_namespaces_count_as_the_mesh_counts_them() {
        for (from, to, faults) in [
            ("namespace: shop, annotations", "namespace: shop, labels: {tulle.dev/mesh: disabled}, annotations", 1),
            ("{tulle.dev/mesh: enabled}", "{istio.io/dataplane-mode: ambient}", 0),
            ("{tulle.dev/mesh: enabled}", "{tulle.dev/egress: deny}", 0),
            ("{tulle.dev/mesh: enabled}", "{tulle.dev/egress: audit}", 1),
            ("nodeName: n1", "nodeName: n1, hostNetwork: true", 1),
        ] {
            assert_eq!(shown(&WHOLE.replacen(from, to, 1)).len(), faults, "{to}");
        }
    }

    #[test]
    fn what_nodes_say_is_told() {
        let status = json!({"waiting": ["Pod"], "nodes": {
            "a": {"error": "node a is not attached"},
            "b": {"status": {"version": "0.0.1", "pending": ["x"]}, "nacks": ["bad"]},
        }});
        let found = lines(&said(&status));
        assert_eq!(found.len(), 5, "{found:?}");
        assert!(found.iter().any(|line| line.contains("the proxies are 0.0.1 on b")), "{found:?}");
        assert_eq!(lines(&findings(&Objects::of_text(WHOLE), "tulle-system", None, "no kubectl")).len(), 1);
    }

    #[test]
    fn a_certificate_that_was_not_renewed_is_told_before_it_ends() {
        let status = |not_after: i64, error: &str| -> Value {
            json!({"nodes": {"a": {"status": {"certificates": [{"identity": "i", "notAfter": not_after, "error": error}]}}}})
        };
        for (not_after, error, expected) in [
            (100_000, "", ""),
            (1000 + 3600, "", "warning certificate Node a: the certificate of i ends in 60 min and was not renewed"),
            (900, "no answer", "error certificate Node a: the certificate of i has expired: no answer"),
            (0, "denied", "error certificate Node a: there is no certificate for i: denied"),
            (0, "", ""),
        ] {
            assert_eq!(lines(&certificates(&status(not_after, error), 1000)).join(""), expected, "{not_after}");
        }
    }
}
