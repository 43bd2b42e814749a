//! Placement and enrolment, table by table.

use serde_json::json;

use crate::manifest::Objects;
use crate::manifest::parse;
use crate::plan;
use crate::plan::Allocator;
use crate::plan::Spot;

fn objects(text: &str) -> Objects {
    parse("test", text).unwrap().into_iter().collect()
}

#[test]
fn pods_go_round_robin_in_name_order_and_stay_where_they_are() {
    let mut allocator = Allocator::new(2, "seed");
    let first = objects(
        "kind: Deployment\nmetadata: {name: web, namespace: b}\nspec: {replicas: 3, template: {spec: {containers: []}}}\n---\nkind: Pod\nmetadata: {name: z, namespace: a}\nspec: {nodeName: node-2}\n",
    );
    let (before, _) = plan::pods(&first, &mut allocator, 2).unwrap();
    let spots: Vec<(&str, Spot)> = before.iter().map(|pod| (pod.name.as_str(), pod.spot)).collect();
    let expected = [
        ("z", Spot::Node { node: 2, index: 2 }),
        ("web-0", Spot::Node { node: 1, index: 2 }),
        ("web-1", Spot::Node { node: 2, index: 3 }),
        ("web-2", Spot::Node { node: 1, index: 3 }),
    ];
    assert_eq!(spots, expected);
    let mut second = first.clone();
    second.extend(objects("kind: Pod\nmetadata: {name: a, namespace: a}\n"));
    let (after, _) = plan::pods(&second, &mut allocator, 2).unwrap();
    assert!(before.iter().all(|pod| after.contains(pod)), "a new pod must move no other");
}

#[test]
fn a_pod_that_comes_back_has_another_uid_and_address() {
    let mut allocator = Allocator::new(1, "seed");
    let wanted = objects("kind: Pod\nmetadata: {name: a, namespace: a}\n");
    let (first, _) = plan::pods(&wanted, &mut allocator, 1).unwrap();
    allocator.forget(&first[0].key());
    let (second, _) = plan::pods(&wanted, &mut allocator, 1).unwrap();
    assert_ne!(first[0].uid, second[0].uid);
    assert_ne!(first[0].spot, second[0].spot);
}

#[test]
fn an_unknown_node_is_an_error() {
    let wanted = objects("kind: Pod\nmetadata: {name: a, namespace: a}\nspec: {nodeName: node-3}\n");
    assert!(plan::pods(&wanted, &mut Allocator::new(2, ""), 2).unwrap_err().to_string().contains("node-3"));
}

#[test]
fn labels_enrol_as_the_contract_says() {
    let ours = |value: &str| json!({"metadata": {"labels": {"tulle.dev/mesh": value}}});
    let istio = |value: &str| json!({"metadata": {"labels": {"istio.io/dataplane-mode": value}}});
    let none = json!({});
    let both = json!({"metadata": {"labels": {"tulle.dev/mesh": "disabled", "istio.io/dataplane-mode": "ambient"}}});
    let deny = json!({"metadata": {"labels": {"tulle.dev/egress": "deny"}}});
    let cases = [
        ("shop", &none, &none, false),
        ("shop", &ours("enabled"), &none, true),
        ("shop", &istio("ambient"), &none, true),
        ("shop", &ours("enabled"), &ours("disabled"), false),
        ("shop", &ours("disabled"), &ours("enabled"), true),
        ("shop", &both, &none, false),
        ("shop", &ours("enabled"), &istio("none"), false),
        ("shop", &deny, &ours("disabled"), true),
        ("kube-system", &none, &ours("enabled"), false),
        ("kube-system", &ours("enabled"), &none, true),
        ("tulle-system", &none, &none, false),
    ];
    for (name, namespace, pod, expected) in cases {
        assert_eq!(plan::is_enrolled(name, namespace, pod), expected, "{name} {namespace} {pod}");
    }
}

#[test]
fn probe_ports_come_from_all_probes_and_names() {
    let wanted = objects(
        "kind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - name: x\n    ports: [{name: web, containerPort: 8080}]\n    readinessProbe: {httpGet: {port: web}}\n    livenessProbe: {tcpSocket: {port: 9000}}\n",
    );
    let (pods, _) = plan::pods(&wanted, &mut Allocator::new(1, ""), 1).unwrap();
    assert_eq!(pods[0].probe_ports, [8080, 9000]);
    assert_eq!(pods[0].containers[0].ports, [8080]);
}
