//! Golden cases: each file of `testdata/` holds manifests and, below a marker line, the resources and conditions that
//! they must become. `UPDATE=1 cargo test -p control` rewrites them; the difference is reviewed.

mod beside;
mod enrol;
mod walk;

use std::path::PathBuf;

use serde_json::Value;
use serde_json::json;

use crate::resource::{Kind, view};
use crate::source::files::{Files, parse};
use crate::translate::{Memory, Settings, Translation, translate};

const MARKER: &str = "\n# ==== becomes ====\n";

fn load(text: &str) -> Translation {
    let mut files = Files::default();
    let path = "case.yaml".to_owned();
    let loaded =
        files.update(&std::collections::BTreeSet::from([path.clone()]), vec![(path, Ok(text.as_bytes().to_vec()))]);
    translate(&loaded.world, &Settings::default(), &mut Memory::default())
}

fn show(translation: Translation) -> Value {
    let accounts = json!(translation.accounts);
    let conditions = json!(translation.conditions);
    let of = |kind: Kind| -> Value { translation.resources.of(kind).values().map(|r| view::resource(r)).collect() };
    let mut shown = json!({
        "addresses": of(Kind::Address),
        "authorizations": of(Kind::Authorization),
        "networkPolicies": of(Kind::NetworkPolicy),
        "conditions": conditions,
        "accounts": accounts,
    });
    // Most cases have none of these.
    for (key, kind) in [
        ("requestAuths", Kind::RequestAuth),
        ("egressPolicies", Kind::EgressPolicy),
        ("routes", Kind::Route),
        ("trafficPolicies", Kind::TrafficPolicy),
        ("trustBundles", Kind::TrustBundle),
    ] {
        if !translation.resources.of(kind).is_empty() {
            shown[key] = of(kind);
        }
    }
    shown
}

#[test]
fn manifests_become_what_the_golden_files_say() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/translate/testdata");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(&folder).expect("testdata").map(|entry| entry.expect("entry").path()).collect();
    cases.sort();
    assert!(cases.len() >= 8, "cases are missing");
    let mut wrong = Vec::new();
    for path in cases {
        let text = std::fs::read_to_string(&path).expect("case");
        let (input, expected) = text.split_once(MARKER).unwrap_or((&text, ""));
        let found = serde_saphyr::to_string(&show(load(input))).expect("YAML");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, format!("{input}{MARKER}{found}")).expect("write");
        } else if found.trim() != expected.trim() {
            wrong.push(format!("{}:\n{found}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn translation_depends_on_nothing_but_the_world() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/translate/testdata");
    for entry in std::fs::read_dir(&folder).expect("testdata") {
        let text = std::fs::read_to_string(entry.expect("entry").path()).expect("case");
        let input = text.split_once(MARKER).map_or(text.as_str(), |(input, _)| input);
        // The order of documents must not matter.
        let mut documents: Vec<&str> = input.split("\n---\n").collect();
        let forward = load(input);
        documents.reverse();
        let backward = load(&documents.join("\n---\n"));
        assert_eq!(show(forward), show(backward));
        assert!(parse(input.as_bytes()).unknown.is_empty());
    }
}

#[test]
fn labels_decide_enrolment_by_precedence() {
    // namespace, its labels, pod labels, pod spec, annotations → HBONE
    let cases: &[(&str, &str, &str, &str, &str, bool)] = &[
        ("shop", "", "", "", "", false),
        ("shop", "tulle.dev/mesh: enabled", "", "", "", true),
        ("shop", "tulle.dev/mesh: enabled", "tulle.dev/mesh: disabled", "", "", false),
        ("shop", "", "tulle.dev/mesh: enabled", "", "", true),
        ("shop", "istio.io/dataplane-mode: ambient", "", "", "", true),
        ("shop", "istio.io/dataplane-mode: ambient", "istio.io/dataplane-mode: none", "", "", false),
        ("shop", "istio.io/dataplane-mode: ambient, tulle.dev/mesh: disabled", "", "", "", false),
        ("shop", "istio.io/dataplane-mode: none, tulle.dev/mesh: enabled", "", "", "", true),
        ("shop", "tulle.dev/mesh: enabled", "istio.io/dataplane-mode: none", "", "", false),
        ("shop", "tulle.dev/mesh: maybe", "", "", "", false),
        ("shop", "tulle.dev/mesh: enabled", "", "hostNetwork: true", "", false),
        ("shop", "tulle.dev/mesh: enabled", "", "", "ambient.istio.io/redirection: pending", false),
        ("shop", "tulle.dev/mesh: enabled", "", "", "ambient.istio.io/redirection: enabled", true),
        ("shop", "", "", "", "ambient.istio.io/redirection: enabled", false),
        ("shop", "tulle.dev/egress: deny", "", "", "", true),
        ("shop", "tulle.dev/egress: deny", "tulle.dev/mesh: disabled", "", "", true),
        ("shop", "tulle.dev/egress: dney", "", "", "", true),
        ("shop", "tulle.dev/egress: audit", "", "", "", false),
        ("shop", "tulle.dev/egress: deny", "", "hostNetwork: true", "", false),
        ("kube-system", "", "tulle.dev/mesh: enabled", "", "", false),
        ("kube-system", "tulle.dev/mesh: enabled", "", "", "", true),
        ("istio-system", "", "tulle.dev/mesh: enabled", "", "", false),
        ("tulle-system", "", "tulle.dev/mesh: enabled", "", "", false),
        ("tulle-system", "tulle.dev/mesh: enabled", "", "", "", true),
    ];
    for (namespace, of_namespace, of_pod, spec, annotations, expected) in cases {
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{{of_namespace}}}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: {namespace}, labels: {{{of_pod}}}, annotations: {{{annotations}}}}}\n\
             spec: {{nodeName: n, {spec}}}\nstatus: {{podIP: 10.0.0.1}}\n"
        );
        let shown = show(load(&text));
        let protocol = &shown["addresses"][0]["resource"]["workload"]["protocol"];
        assert_eq!(protocol == "HBONE", *expected, "{text}{shown}");
    }
}

#[test]
fn many_pods_become_as_many_workloads() {
    let mut text =
        String::from("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {tulle.dev/mesh: enabled}}\n");
    for i in 0..2_000 {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p-{i}, namespace: a, labels: {{app: x{}}}}}\nspec: {{nodeName: n{}}}\nstatus: {{podIP: 10.{}.{}.1}}\n",
            i % 50, i % 10, i / 250, i % 250
        ));
    }
    let translation = load(&text);
    assert_eq!(translation.resources.of(Kind::Address).len(), 2_000);
}

#[test]
fn a_mesh_wide_mode_that_is_left_open_does_not_hide_that_of_istios_root_namespace() {
    let strict_of = |namespace: &str| json!([format!("{namespace}/tulle_strict_of-{namespace}")]);
    let (ours, istios) = (strict_of("tulle-system"), strict_of("istio-system"));
    // mode in ours, mode in Istio's, mode of the namespace → what the pod names
    let cases: &[(&str, &str, &str, Value)] = &[
        ("UNSET", "STRICT", "UNSET", istios.clone()),
        ("UNSET", "STRICT", "PERMISSIVE", json!(null)),
        ("UNSET", "UNSET", "UNSET", json!(null)),
        ("UNSET", "PERMISSIVE", "UNSET", json!(null)),
        ("PERMISSIVE", "STRICT", "UNSET", json!(null)),
        ("STRICT", "PERMISSIVE", "UNSET", ours.clone()),
        ("STRICT", "STRICT", "UNSET", ours),
    ];
    for (of_ours, of_istios, of_namespace, expected) in cases {
        let mut text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}\n"
            .to_owned();
        for (namespace, mode) in [("tulle-system", of_ours), ("istio-system", of_istios), ("shop", of_namespace)] {
            text.push_str(&format!(
                "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                 metadata: {{name: of-{namespace}, namespace: {namespace}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
            ));
        }
        let shown = show(load(&text));
        let case = format!("ours {of_ours}, Istio's {of_istios}, the namespace's {of_namespace}: {shown:#}");
        assert_eq!(shown["addresses"][0]["resource"]["workload"]["policies"], *expected, "{case}");
        let sent = shown["authorizations"]
            .as_array()
            .is_some_and(|list| list.len() == expected.as_array().map_or(0, Vec::len));
        assert!(sent || *of_namespace == "PERMISSIVE", "what a pod names is sent: {case}");
    }
}

#[test]
fn what_is_remembered_changes_no_result() {
    let (mut files, mut memory) = (Files::default(), Memory::default());
    let pod = |name: &str, labels: &str, ready: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: a, labels: {{{labels}}}}}\nspec: {{nodeName: n}}\n\
             status: {{podIP: 10.0.0.{}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n",
            name.len()
        )
    };
    let namespace =
        |label: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{{label}}}}}\n");
    let service = |app: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a}}\nspec: {{selector: {{app: {app}}}, ports: [{{port: 80}}]}}\n"
        )
    };
    let policy = |app: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: a}}\n\
             spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: DENY, rules: [{{}}]}}\n"
        )
    };
    let node = |zone: &str| {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: n, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n")
    };
    let mut present = std::collections::BTreeSet::new();
    // Each step changes one thing that the workload of a pod, whose own file stays, may depend on.
    for (file, text) in [
        ("one", pod("p", "app: x", "True")),
        ("two", pod("pp", "app: x", "True")),
        ("namespace", namespace("tulle.dev/mesh: enabled")),
        ("service", service("x")),
        ("policy", policy("x")),
        ("node", node("z1")),
        ("node", node("z2")),
        ("one", pod("p", "app: x", "False")),
        ("service", service("y")),
        ("policy", policy("y")),
        ("namespace", namespace("tulle.dev/egress: deny")),
        ("two", pod("pp", "app: y", "True")),
    ] {
        let path = format!("{file}.yaml");
        present.insert(path.clone());
        let loaded = files.update(&present, vec![(path, Ok(text.into_bytes()))]);
        let settings = Settings::default();
        let remembering = translate(&loaded.world, &settings, &mut memory);
        assert_eq!(remembering, translate(&loaded.world, &settings, &mut Memory::default()), "{file}");
    }
}

#[test]
fn an_external_address_has_one_owner_for_each_port_and_transport() {
    let service = |name: &str, ip: &str, transport: &str, year: u32| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: \
             '{year}-01-01T00:00:00Z'}}\nspec: {{clusterIP: {ip}, externalIPs: [192.0.2.1], ports: [{{port: 53, \
             protocol: {transport}}}]}}\n"
        )
    };
    let all = [
        service("older", "10.96.0.1", "UDP", 2025),
        service("younger", "10.96.0.2", "UDP", 2026),
        service("stream", "10.96.0.3", "TCP", 2026),
    ];
    let conditions = json!(load(&all.join("---\n")).conditions);
    let refused: Vec<&str> = conditions
        .as_array()
        .into_iter()
        .flatten()
        .filter(|of| of.to_string().contains("AddressInUse"))
        .filter_map(|of| of["name"].as_str())
        .collect();
    assert_eq!(refused, ["younger"]);
}
