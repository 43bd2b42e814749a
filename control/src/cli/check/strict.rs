//! Who would be refused when a namespace takes mutual TLS only, and the exceptions that keep their ports open.
//!
//! Pure. Certain are those whom the nodes saw without an identity, and the API server, which calls webhooks and aggregated APIs
//! from outside of the mesh. Likely are those that the objects invite: scrapers, node ports, load balancers. What an existing
//! PeerAuthentication keeps open is a note. An exception is made for each workload and names its ports, because Istio's
//! port-level modes need a selector; a note beside each port says why it is there, so that it can go when the reason goes.
//!
//! Limits: nodes remember callers for a day and since their proxy started; clients on the host network are told apart from the
//! kubelet by nothing, so they are named as the node.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::cli::check::before::some;
use crate::cli::check::objects::{
    Objects, annotation, behind, is_finished, label, list, meta, name, path, port_number, selector_of, selects,
    workload,
};
use crate::cli::check::others::is_labelled;
use crate::cli::check::{Finding, Severity};

/// A port of a workload that somebody reaches without an identity.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Need {
    /// Kind and name.
    workload: (String, String),
    /// Labels of its pods.
    selector: Value,
    port: u16,
    id: &'static str,
    /// It was seen, or cannot be otherwise.
    certain: bool,
    /// Who, as the end of "would refuse".
    who: String,
    /// What else can be done than to keep the port open; may be empty.
    instead: String,
    /// A PeerAuthentication keeps the port open already.
    open: Option<String>,
}

/// Everybody who would be refused.
pub(super) fn needs(objects: &Objects, namespace: &str, callers: Option<&Value>) -> Vec<Need> {
    let mut needs = Vec::new();
    if let Some(callers) = callers {
        needs.extend(seen(objects, namespace, callers));
    }
    needs.extend(api_server(objects, namespace));
    needs.extend(from_outside(objects, namespace));
    needs.extend(scrapes(objects, namespace));
    needs.sort_by(|a, b| (&a.workload, a.port, a.id, &a.who).cmp(&(&b.workload, b.port, b.id, &b.who)));
    needs.dedup();
    needs
}

/// One need for each workload among pods with a port.
fn at<'a>(
    objects: &Objects,
    pods: impl IntoIterator<Item = (&'a Value, u16)>,
    need: impl Fn() -> (&'static str, bool, String, String),
) -> Vec<Need> {
    let mut found: BTreeMap<((String, String), u16), Need> = BTreeMap::new();
    for (pod, port) in pods {
        let (id, certain, who, instead) = need();
        let key = (workload(pod), port);
        found.entry(key).or_insert_with(|| Need {
            workload: workload(pod),
            selector: Value::Object(selector_of(objects, pod)),
            port,
            id,
            certain,
            who,
            instead,
            open: keeps_open(objects, pod, port),
        });
    }
    found.into_values().collect()
}

/// The PeerAuthentication that keeps a pod's port open by name, the oldest that selects the pod.
fn keeps_open(objects: &Objects, pod: &Value, port: u16) -> Option<String> {
    let mut own: Vec<&Value> = objects
        .within("PeerAuthentication", meta(pod, "namespace"))
        .filter(|policy| selects(&policy["spec"]["selector"]["matchLabels"], pod))
        .collect();
    own.sort_by_key(|policy| (meta(policy, "creationTimestamp"), name(policy)));
    let policy = own.first()?;
    let of_port = &policy["spec"]["portLevelMtls"][port.to_string()]["mode"];
    let mode = if of_port.is_null() { &policy["spec"]["mtls"]["mode"] } else { of_port };
    matches!(mode.as_str(), Some("PERMISSIVE" | "DISABLE")).then(|| path(policy))
}

fn live_pods<'a>(objects: &'a Objects, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.within("Pod", namespace).filter(|pod| !is_finished(pod) && pod["spec"]["hostNetwork"] != true)
}

/// Those whom the nodes saw.
fn seen(objects: &Objects, namespace: &str, callers: &Value) -> Vec<Need> {
    let mut found = Vec::new();
    for caller in list(&callers["callers"]).filter(|caller| caller["namespace"] == namespace) {
        let Some(port) = caller["port"].as_u64().and_then(|port| u16::try_from(port).ok()) else { continue };
        let called = |pod: &&Value| workload(pod).1 == caller["workload"].as_str().unwrap_or_default();
        let pods = live_pods(objects, namespace).filter(called).map(|pod| (pod, port));
        let (who, instead) = client(objects, &caller["source"]);
        let number = |key: &str| caller[key].as_u64().unwrap_or_default();
        let open = if number("open") > 0 { format!(", {} open now", number("open")) } else { String::new() };
        let refused = if number("refused") > 0 { format!(", {} refused", number("refused")) } else { String::new() };
        let last = caller["last"].as_i64().and_then(|at| jiff::Timestamp::from_second(at).ok());
        let last = last.map_or_else(String::new, |at| format!(", last at {at}"));
        let times = number("connections");
        let who = format!("{who} ({times} connection{}{open}{refused}{last})", if times == 1 { "" } else { "s" });
        found.extend(at(objects, pods, || ("caller", true, who.clone(), instead.clone())));
    }
    found
}

/// Who a caller is, and what would give it an identity.
fn client(objects: &Objects, source: &Value) -> (String, String) {
    let text = |key: &str| source[key].as_str().unwrap_or_default();
    if !text("workload").is_empty() {
        let namespace = text("namespace");
        let labelled = objects.one("Namespace", "", namespace).is_some_and(is_labelled);
        let instead = match labelled {
            true => format!(
                "namespace {namespace} is labelled, so see in `tulle status` whether its pods are captured; connections from before that end by themselves"
            ),
            false => format!("kubectl label namespace {namespace} tulle.dev/mesh=enabled"),
        };
        return (format!("{}/{} of account {}", namespace, text("workload"), text("account")), instead);
    }
    let address = text("address");
    let node =
        objects.of("Node").iter().find(|node| list(&node["status"]["addresses"]).any(|own| own["address"] == address));
    if let Some(node) = node {
        let on_it = objects.of("Pod").iter().filter(|pod| {
            pod["spec"]["hostNetwork"] == true && pod["spec"]["nodeName"] == name(node) && !is_finished(pod)
        });
        let on_it: Vec<String> = on_it.map(path).collect();
        let names: Vec<&str> = on_it.iter().map(String::as_str).collect();
        let pods = if names.is_empty() {
            "no pod is on its host network".to_owned()
        } else {
            format!("on its host network: {}", some(&names))
        };
        return (
            format!("node {} ({address}): something on its host network, or clients of a node port", name(node)),
            format!("{pods}; what is on the host network has no identity"),
        );
    }
    (format!("{address}, which is no pod and no node"), "bring those clients in through a gateway".to_owned())
}

/// Calls that the API server makes.
fn api_server(objects: &Objects, namespace: &str) -> Vec<Need> {
    let mut found = Vec::new();
    let mut add = |what: String, service: &Value| {
        if service["namespace"] != namespace {
            return;
        }
        let Some(target) = objects.one("Service", namespace, service["name"].as_str().unwrap_or_default()) else {
            return;
        };
        let port = if service["port"].is_null() { json!(443) } else { service["port"].clone() };
        let who = format!("the API server, which calls {what}");
        found.extend(at(objects, behind(objects, target, &port), || ("api-server", true, who.clone(), String::new())));
    };
    for kind in ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"] {
        for configuration in objects.of(kind) {
            for webhook in list(&configuration["webhooks"]) {
                add(format!("{kind} {}", name(configuration)), &webhook["clientConfig"]["service"]);
            }
        }
    }
    for api in objects.of("APIService") {
        add(format!("APIService {}", name(api)), &api["spec"]["service"]);
    }
    for crd in objects.of("CustomResourceDefinition") {
        let service = &crd["spec"]["conversion"]["webhook"]["clientConfig"]["service"];
        add(format!("the conversion webhook of CustomResourceDefinition {}", name(crd)), service);
    }
    found
}

/// Services that are reached from outside of the cluster.
fn from_outside(objects: &Objects, namespace: &str) -> Vec<Need> {
    let mut found = Vec::new();
    for service in objects.within("Service", namespace) {
        let kind = service["spec"]["type"].as_str().unwrap_or_default();
        let by = match kind {
            "NodePort" => "its node ports",
            "LoadBalancer" => "its load balancer",
            _ if list(&service["spec"]["externalIPs"]).next().is_some() => "its external addresses",
            _ => continue,
        };
        let who = format!("clients outside of the cluster, which reach Service {} by {by}", path(service));
        let instead = "put a gateway that is in the mesh in front of it".to_owned();
        let pods = behind(objects, service, &Value::Null);
        found.extend(at(objects, pods, || ("outside", false, who.clone(), instead.clone())));
    }
    found
}

/// What scrapers of metrics are invited to.
fn scrapes(objects: &Objects, namespace: &str) -> Vec<Need> {
    let instead = "bring the namespace of Prometheus into the mesh".to_owned();
    let invited = |what: String| {
        ("scrape", false, format!("a Prometheus outside of the mesh, which {what} invites"), instead.clone())
    };
    let mut found = Vec::new();
    for pod in live_pods(objects, namespace) {
        if annotation(pod, "prometheus.io/scrape") == Some("true")
            && let Some(port) = annotation(pod, "prometheus.io/port").and_then(|port| port.parse().ok())
        {
            found.extend(at(objects, [(pod, port)], || invited("the annotation prometheus.io/scrape".to_owned())));
        }
    }
    let reaches = |monitor: &Value| {
        let of = &monitor["spec"]["namespaceSelector"];
        let own = of["matchNames"].is_null() && of["any"] != true;
        of["any"] == true
            || list(&of["matchNames"]).any(|one| one == namespace)
            || (own && meta(monitor, "namespace") == namespace)
    };
    for monitor in objects.of("ServiceMonitor").iter().filter(|monitor| reaches(monitor)) {
        let services = objects.within("Service", namespace);
        for service in services.filter(|service| selects(&monitor["spec"]["selector"]["matchLabels"], service)) {
            for endpoint in list(&monitor["spec"]["endpoints"]).filter(|endpoint| endpoint["port"].is_string()) {
                let pods = behind(objects, service, &endpoint["port"]);
                found.extend(at(objects, pods, || invited(format!("ServiceMonitor {}", path(monitor)))));
            }
        }
    }
    for monitor in objects.of("PodMonitor").iter().filter(|monitor| reaches(monitor)) {
        for endpoint in list(&monitor["spec"]["podMetricsEndpoints"]) {
            let selected =
                live_pods(objects, namespace).filter(|pod| selects(&monitor["spec"]["selector"]["matchLabels"], pod));
            let pods = selected.filter_map(|pod| Some((pod, port_number(pod, &endpoint["port"])?)));
            found.extend(at(objects, pods, || invited(format!("PodMonitor {}", path(monitor)))));
        }
    }
    found
}

/// What is said of them, and of what cannot be known.
pub(super) fn findings(
    objects: &Objects,
    namespace: &str,
    needs: &[Need],
    callers: Option<&Value>,
    why: &str,
) -> Vec<Finding> {
    let mut found: Vec<Finding> = needs.iter().map(|need| finding(namespace, need)).collect();
    found.extend(probes(objects, namespace));
    found.extend(ingresses(objects, namespace));
    let namespaced = objects.one("Namespace", "", namespace);
    if !namespaced.is_some_and(is_labelled)
        && !live_pods(objects, namespace).any(|pod| label(pod, "tulle.dev/mesh") == Some("enabled"))
    {
        found.push(
            Finding::new(
                Severity::Warning,
                "not-enrolled",
                format!("Namespace {namespace}"),
                "it is not in the mesh, so nobody has seen who calls it, and a PeerAuthentication has no effect there",
            )
            .fix(format!("kubectl label namespace {namespace} tulle.dev/mesh=enabled, and ask again after its usual traffic, say a day")),
        );
    }
    let Some(callers) = callers else {
        found.push(
            Finding::new(
                Severity::Warning,
                "callers",
                "",
                format!("the nodes could not be asked whom they saw without an identity: {why}"),
            )
            .fix("name control by --control, or ask where it can be reached"),
        );
        return found;
    };
    let unseen: Vec<&str> = list(&callers["unseenPods"]).filter_map(Value::as_str).collect();
    if !unseen.is_empty() {
        found.push(Finding::new(
            Severity::Warning,
            "unseen",
            "",
            format!("{} pods are not captured, so who calls them is not seen: {}", unseen.len(), some(&unseen)),
        ));
    }
    for (node, error) in callers["errors"].as_object().into_iter().flatten() {
        let error = error.as_str().unwrap_or_default();
        found.push(Finding::new(
            Severity::Warning,
            "callers",
            format!("Node {node}"),
            format!("whom it saw is not known: {error}"),
        ));
    }
    if let Some(untold) = callers["untold"].as_u64().filter(|untold| *untold > 0) {
        found.push(Finding::new(
            Severity::Warning,
            "callers",
            "",
            format!("the lists of nodes are full: {untold} more connections had no identity and are not told by whom"),
        ));
    }
    if list(&callers["callers"]).next().is_none() && needs.is_empty() {
        let text = "no connection without an identity was seen in the last day, or since the proxies started";
        found.push(Finding::new(Severity::Note, "callers", format!("Namespace {namespace}"), text));
    }
    found
}

fn finding(namespace: &str, need: &Need) -> Finding {
    let object = format!("{} {namespace}/{} port {}", need.workload.0, need.workload.1, need.port);
    if let Some(policy) = &need.open {
        let what = format!("stays open to {}, by PeerAuthentication {policy}", need.who);
        return Finding::new(Severity::Note, need.id, object, what);
    }
    let (severity, would) = if need.certain { (Severity::Error, "would") } else { (Severity::Warning, "may") };
    let exception = "keep the port open by the exception below";
    let fix = if need.instead.is_empty() { exception.to_owned() } else { format!("{}; or {exception}", need.instead) };
    Finding::new(severity, need.id, object, format!("{would} refuse {}", need.who)).fix(fix)
}

/// Probes whose port nobody knows are not told from other plaintext.
fn probes(objects: &Objects, namespace: &str) -> Vec<Finding> {
    let mut found: BTreeMap<(String, String), Finding> = BTreeMap::new();
    for pod in live_pods(objects, namespace) {
        for container in list(&pod["spec"]["containers"]).chain(list(&pod["spec"]["initContainers"])) {
            for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
                let probe = &container[kind];
                let ports = ["httpGet", "tcpSocket", "grpc"].into_iter().map(|how| &probe[how]["port"]);
                for port in ports.filter(|port| !port.is_null() && port_number(pod, port).is_none()) {
                    let object = format!("{} {namespace}/{}", workload(pod).0, workload(pod).1);
                    let what = format!(
                        "the {kind} of container {} names the port {port}, which no container declares: the kubelet itself cannot use it",
                        container["name"].as_str().unwrap_or_default()
                    );
                    let finding = Finding::new(Severity::Error, "probe", object, what)
                        .fix("declare the port, or give its number");
                    found.entry(workload(pod)).or_insert(finding);
                }
            }
        }
    }
    found.into_values().collect()
}

/// Ingress controllers are clients as others are.
fn ingresses(objects: &Objects, namespace: &str) -> Vec<Finding> {
    let names: Vec<&str> = objects.within("Ingress", namespace).map(name).collect();
    if names.is_empty() {
        return Vec::new();
    }
    let classes: BTreeSet<&str> = objects
        .within("Ingress", namespace)
        .filter_map(|ingress| ingress["spec"]["ingressClassName"].as_str())
        .collect();
    let classes = classes.into_iter().collect::<Vec<_>>().join(", ");
    let what = format!(
        "Ingresses ({}) send clients here through their controller{}, which needs an identity",
        some(&names),
        if classes.is_empty() { String::new() } else { format!(" ({classes})") }
    );
    vec![
        Finding::new(Severity::Warning, "ingress", format!("Namespace {namespace}"), what)
            .fix("bring the controller's namespace into the mesh, unless it runs on the host network; whom it reached is among the callers"),
    ]
}

/// One exception for each workload: the ports that are not open yet, with the reasons.
pub(super) fn exceptions(namespace: &str, needs: &[Need]) -> Vec<Value> {
    type Ports = BTreeMap<u16, BTreeSet<String>>;
    let mut workloads: BTreeMap<&(String, String), (Value, Ports)> = BTreeMap::new();
    for need in needs.iter().filter(|need| need.open.is_none()) {
        let entry = workloads.entry(&need.workload).or_insert_with(|| (need.selector.clone(), Ports::new()));
        entry.1.entry(need.port).or_default().insert(need.who.clone());
    }
    let one = |((kind, name), (selector, ports)): (&(String, String), (Value, Ports))| {
        let ports: Vec<Value> =
            ports.into_iter().map(|(port, reasons)| json!({"port": port, "reasons": reasons})).collect();
        json!({"namespace": namespace, "workload": format!("{kind} {name}"), "name": name, "selector": selector, "ports": ports})
    };
    workloads.into_iter().map(one).collect()
}

/// As a PeerAuthentication. Nothing in it but names and labels of objects, quoted.
pub(super) fn yaml(exception: &Value) -> String {
    let text = |value: &Value| {
        let plain: String = value.as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
        format!("'{}'", plain.replace('\'', "''"))
    };
    let comment = |value: &Value| value.as_str().unwrap_or_default().replace(char::is_control, " ");
    let mut out = format!(
        "# {}: everything by mutual TLS but these ports.\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  \
         name: {}\n  namespace: {}\nspec:\n",
        comment(&exception["workload"]),
        text(&json!(format!("plaintext-{}", exception["name"].as_str().unwrap_or_default()))),
        text(&exception["namespace"])
    );
    out.push_str("  selector:\n    matchLabels:\n");
    let labels = exception["selector"].as_object();
    if labels.is_none_or(serde_json::Map::is_empty) {
        out.push_str("      # Its pods have no labels: give them one, and name it here. Without it this is refused.\n");
    }
    for (key, value) in labels.into_iter().flatten() {
        out.push_str(&format!("      {}: {}\n", text(&json!(key)), text(value)));
    }
    out.push_str("  mtls:\n    mode: STRICT\n  portLevelMtls:\n");
    for port in list(&exception["ports"]) {
        for reason in list(&port["reasons"]) {
            out.push_str(&format!("    # {}\n", comment(reason)));
        }
        out.push_str(&format!("    '{}':\n      mode: PERMISSIVE\n", port["port"]));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{exceptions, findings, needs, yaml};
    use crate::cli::check::objects::Objects;

    const WORLD: &str = "
{kind: Namespace, metadata: {name: shop, labels: {tulle.dev/mesh: enabled}}}
---
{kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}
---
{kind: Service, metadata: {name: cart, namespace: shop}, spec: {selector: {app: cart}, ports: [{name: web, port: 80, targetPort: http}, {port: 443, targetPort: 8443}]}}
---
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart, pod-template-hash: abc}, ownerReferences: [{controller: true, kind: ReplicaSet, name: cart-abc}]}
spec: {nodeName: n1, containers: [{name: c, ports: [{name: http, containerPort: 8080}], readinessProbe: {httpGet: {port: http}}}]}
";

    fn caller(source: serde_json::Value) -> serde_json::Value {
        json!({"callers": [{"namespace": "shop", "workload": "cart", "port": 8080, "source": source,
                            "connections": 3, "refused": 0, "open": 1, "last": 0}], "untold": 0, "unseenPods": [], "errors": {}})
    }

    fn shown(more: &str, callers: &serde_json::Value) -> Vec<String> {
        let objects = Objects::of_text(&format!("{WORLD}---\n{more}"));
        let needs = needs(&objects, "shop", Some(callers));
        let found = findings(&objects, "shop", &needs, Some(callers), "");
        found
            .iter()
            .map(|one| format!("{} {} {}: {} | {}", one.severity.word(), one.id, one.object, one.what, one.fix))
            .collect()
    }

    #[test]
    fn whoever_would_be_refused_is_named_with_the_way_out() {
        let none = json!({"callers": []});
        let of = "Deployment shop/cart port";
        for (more, callers, expected) in [
            ("", none.clone(), vec!["note callers Namespace shop: no connection without".to_owned()]),
            (
                "",
                caller(json!({"namespace": "office", "workload": "clerk", "account": "default"})),
                vec![format!(
                    "error caller {of} 8080: would refuse office/clerk of account default (3 connections, 1 open now, last at 1970-01-01T00:00:00Z) | kubectl label namespace office tulle.dev/mesh=enabled; or keep"
                )],
            ),
            (
                "",
                caller(json!({"address": "192.0.2.1"})),
                vec![format!(
                    "error caller {of} 8080: would refuse node n1 (192.0.2.1): something on its host network"
                )],
            ),
            (
                "",
                caller(json!({"address": "203.0.113.5"})),
                vec![format!("error caller {of} 8080: would refuse 203.0.113.5, which is no pod and no node")],
            ),
            (
                "{kind: ValidatingWebhookConfiguration, metadata: {name: v}, webhooks: [{clientConfig: {service: {namespace: shop, name: cart}}}]}",
                none.clone(),
                vec![format!(
                    "error api-server {of} 8443: would refuse the API server, which calls ValidatingWebhookConfiguration v | keep the port open"
                )],
            ),
            (
                "{kind: APIService, metadata: {name: v1.x}, spec: {service: {namespace: shop, name: cart, port: 80}}}",
                none.clone(),
                vec![format!("error api-server {of} 8080: would refuse the API server, which calls APIService v1.x")],
            ),
            (
                "{kind: CustomResourceDefinition, metadata: {name: c}, spec: {conversion: {webhook: {clientConfig: {service: {namespace: shop, name: cart}}}}}}",
                none.clone(),
                vec![format!(
                    "error api-server {of} 8443: would refuse the API server, which calls the conversion webhook of CustomResourceDefinition c"
                )],
            ),
            (
                "{kind: APIService, metadata: {name: v1.x}, spec: {service: {namespace: other, name: cart}}}",
                none.clone(),
                vec!["note callers".into()],
            ),
            (
                "{kind: Service, metadata: {name: lb, namespace: shop}, spec: {type: LoadBalancer, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}}",
                none.clone(),
                vec![format!(
                    "warning outside {of} 8080: may refuse clients outside of the cluster, which reach Service shop/lb by its load balancer"
                )],
            ),
            (
                "{kind: ServiceMonitor, metadata: {name: m, namespace: mon, labels: {}}, spec: {namespaceSelector: {any: true}, selector: {matchLabels: {}}, endpoints: [{port: web}]}}",
                none.clone(),
                vec!["note callers".into()],
            ),
            (
                "{kind: PodMonitor, metadata: {name: m, namespace: shop}, spec: {selector: {matchLabels: {app: cart}}, podMetricsEndpoints: [{port: http}]}}",
                none.clone(),
                vec![format!(
                    "warning scrape {of} 8080: may refuse a Prometheus outside of the mesh, which PodMonitor shop/m invites"
                )],
            ),
            (
                "{kind: Pod, metadata: {name: odd, namespace: shop}, spec: {containers: [{name: c, livenessProbe: {tcpSocket: {port: nope}}}]}}",
                none.clone(),
                vec![
                    "error probe Pod shop/odd: the livenessProbe of container c names the port \"nope\"".into(),
                    "note callers".into(),
                ],
            ),
            (
                "{kind: Ingress, metadata: {name: i, namespace: shop}, spec: {ingressClassName: nginx}}",
                none.clone(),
                vec![
                    "warning ingress Namespace shop: Ingresses (i) send clients here through their controller (nginx)"
                        .into(),
                    "note callers".into(),
                ],
            ),
            (
                "{kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {'8080': {mode: PERMISSIVE}}}}",
                caller(json!({"address": "203.0.113.5"})),
                vec![format!("note caller {of} 8080: stays open to 203.0.113.5")],
            ),
        ] {
            let found = shown(more, &callers);
            let fits =
                found.len() == expected.len() && found.iter().zip(&expected).all(|(a, b)| a.starts_with(b.as_str()));
            assert!(fits, "{more}: {found:#?}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_nobody() {
        let callers = json!({"callers": [], "untold": 4, "unseenPods": ["shop/x"], "errors": {"n2": "older"}});
        let found = shown("", &callers);
        for expected in ["1 pods are not captured", "Node n2: whom it saw is not known: older", "4 more connections"] {
            assert!(found.iter().any(|line| line.contains(expected)), "{expected}: {found:#?}");
        }
        let objects = Objects::of_text("{kind: Namespace, metadata: {name: shop}}");
        let found = findings(&objects, "shop", &needs(&objects, "shop", None), None, "");
        let ids: Vec<_> = found.iter().map(|one| one.id).collect();
        assert_eq!(ids, ["not-enrolled", "callers"]);
    }

    #[test]
    fn exceptions_are_objects_that_keep_exactly_those_ports_open() {
        let callers = caller(json!({"address": "203.0.113.5"}));
        let more = "{kind: APIService, metadata: {name: v1.x}, spec: {service: {namespace: shop, name: cart}}}";
        let objects = Objects::of_text(&format!("{WORLD}---\n{more}"));
        let list = exceptions("shop", &needs(&objects, "shop", Some(&callers)));
        assert_eq!(list.len(), 1);
        let text = yaml(&list[0]);
        let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(value["metadata"], json!({"name": "plaintext-cart", "namespace": "shop"}));
        let spec = json!({"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "STRICT"},
                          "portLevelMtls": {"8080": {"mode": "PERMISSIVE"}, "8443": {"mode": "PERMISSIVE"}}});
        assert_eq!(value["spec"], spec, "{text}");
        assert!(text.contains("    # the API server, which calls APIService v1.x\n    '8443':"), "{text}");
        // Applied, it leaves nothing to do.
        let objects = Objects::of_text(&format!("{WORLD}---\n{more}\n---\n{text}"));
        let after = needs(&objects, "shop", Some(&callers));
        assert_eq!(exceptions("shop", &after), Vec::<serde_json::Value>::new());
        assert!(
            findings(&objects, "shop", &after, Some(&callers), "")
                .iter()
                .all(|one| one.severity == crate::cli::check::Severity::Note)
        );
    }
}
