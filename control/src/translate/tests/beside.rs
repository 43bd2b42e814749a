//! Which policies other plugins get: one for every selector that isolates pods, and nothing more.

use crate::model::World;
use crate::source::decode;
use crate::source::tree;
use crate::translate::{Settings, beside};
use tulle_proto::names;

fn world(text: &str) -> World {
    let mut world = World::default();
    for document in text.split("---\n") {
        for object in decode::document(&tree::parse(document).expect("yaml")).objects {
            world.put(object);
        }
    }
    world
}

fn policy(name: &str, pods: &str, types: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{podSelector: {pods}, policyTypes: [{types}]}}\n"
    )
}

#[test]
fn every_selector_that_isolates_pods_gets_one_and_nothing_else_is_selected() {
    let namespace =
        |labels: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n");
    let pod = |labels: &str, annotations: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, labels: {{{labels}}}, \
             annotations: {{{annotations}}}}}\nspec: {{nodeName: n}}\nstatus: {{podIP: 10.0.0.1}}\n"
        )
    };
    let on = namespace("tulle.dev/mesh: enabled");
    let db = policy("db", "{matchLabels: {app: db}}", "Ingress");
    let ours = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: tulle-mesh, namespace: shop, \
                labels: {app.kubernetes.io/managed-by: tulle}}\nspec: {podSelector: {}}\n";
    // world; for each policy: all pods?, ingress, egress
    type Case = (&'static str, String, &'static [(bool, bool, bool)]);
    let cases: Vec<Case> = vec![
        ("no policies", on.clone(), &[]),
        ("not in the mesh", namespace("") + &db, &[]),
        ("some pods", on.clone() + &db, &[(false, true, false)]),
        ("our own is none", on.clone() + ours, &[]),
        (
            "two policies of the same pods",
            on.clone() + &db + &policy("db2", "{matchLabels: {app: db}}", "Egress"),
            &[(false, true, true)],
        ),
        ("all pods besides", on.clone() + &db + &policy("all", "{}", "Ingress, Egress"), &[(true, true, true)]),
        (
            "all pods in the other direction",
            on.clone() + &db + &policy("all", "{}", "Egress"),
            &[(true, false, true), (false, true, false)],
        ),
        ("a pod by itself", namespace("") + &db + &pod("tulle.dev/mesh: enabled", ""), &[(false, true, false)]),
        (
            "a pod that is being released",
            namespace("") + &db + &pod("", "ambient.istio.io/redirection: enabled"),
            &[(false, true, false)],
        ),
        ("egress is denied", namespace("tulle.dev/egress: deny") + &db, &[(false, true, false)]),
    ];
    for (name, text, expected) in cases {
        let found = beside::beside(&world(&text), &Settings::default());
        let shape: Vec<_> = found.values().map(|one| (one.pods.is_empty(), one.ingress, one.egress)).collect();
        assert_eq!(shape, expected, "{name}: {found:?}");
        assert!(
            found.iter().all(|((_, name), one)| (name == names::BESIDE) == one.pods.is_empty()),
            "{name}: {found:?}"
        );
    }
}
