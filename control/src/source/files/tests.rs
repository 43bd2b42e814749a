//! Bad input by table: every case names its file, line and field and leaves the rest of the folder alone. Besides: what
//! stays when a good file turns bad, and that no bytes panic.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::model::{Object, Spec};
use crate::source::Loaded;
use crate::source::files::{Content, Files, parse};

fn update(files: &mut Files, contents: &[(&str, &str)]) -> Loaded {
    let present: BTreeSet<String> = contents.iter().map(|(path, _)| (*path).to_owned()).collect();
    let changed: Vec<(String, Content)> =
        contents.iter().map(|(path, text)| ((*path).to_owned(), Ok(text.as_bytes().to_vec()))).collect();
    files.update(&present, changed)
}

const GOOD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: good, namespace: shop}\n";

fn with_head(kind: &str, rest: &str) -> String {
    let version = match kind {
        "AuthorizationPolicy" | "PeerAuthentication" => "security.istio.io/v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        "NetworkPolicy" => "networking.k8s.io/v1",
        _ => "v1",
    };
    // Three lines of head: the rest begins on line 4.
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\n{rest}")
}

/// (kind, rest of the document from line 4, line, field, part of the message)
const OBJECTS: &[(&str, &str, u64, &str, &str)] = &[
    ("Pod", "spec: 5", 4, "spec", "must be a map"),
    ("Pod", "spec: []", 4, "spec", "must be a map"),
    ("Pod", "spec:\n  nodeName: 7", 5, "spec.nodeName", "put it in quotes"),
    ("Pod", "spec:\n  nodeName: true", 5, "spec.nodeName", "put it in quotes"),
    ("Pod", "spec:\n  hostNetwork: maybe", 5, "spec.hostNetwork", "must be true or false"),
    ("Pod", "spec:\n  containers: {}", 5, "spec.containers", "must be a list"),
    ("Pod", "spec:\n  containers: [3]", 5, "spec.containers[0]", "must be a map"),
    ("Pod", "spec:\n  containers:\n  - ports: [{}]", 6, "spec.containers[0].ports[0].containerPort", "is missing"),
    (
        "Pod",
        "spec:\n  containers:\n  - ports: [{containerPort: 0}]",
        6,
        "spec.containers[0].ports[0].containerPort",
        "not a port",
    ),
    (
        "Pod",
        "spec:\n  containers:\n  - ports: [{containerPort: 65536}]",
        6,
        "spec.containers[0].ports[0].containerPort",
        "not a port",
    ),
    (
        "Pod",
        "spec:\n  containers:\n  - ports: [{containerPort: \"80\"}]",
        6,
        "spec.containers[0].ports[0].containerPort",
        "whole number",
    ),
    (
        "Pod",
        "spec:\n  containers:\n  - ports: [{containerPort: 80, protocol: tcp}]",
        6,
        "spec.containers[0].ports[0].protocol",
        "none of TCP",
    ),
    (
        "Pod",
        "spec:\n  containers:\n  - livenessProbe: {tcpSocket: {port: 70000}}",
        6,
        "spec.containers[0].livenessProbe.tcpSocket.port",
        "not a port",
    ),
    ("Pod", "status:\n  podIP: 10.0.0", 5, "status.podIP", "not an IP address"),
    ("Pod", "status:\n  podIPs: [{ip: x}]", 5, "status.podIPs[0].ip", "not an IP address"),
    ("Pod", "status:\n  podIPs: [{}]", 5, "status.podIPs[0].ip", "is missing"),
    ("Pod", "status:\n  phase: Sleeping", 5, "status.phase", "not a pod phase"),
    ("Pod", "status:\n  conditions: Ready", 5, "status.conditions", "must be a list"),
    ("Service", "spec:\n  clusterIP: 300.1.1.1", 5, "spec.clusterIP", "not an IP address"),
    ("Service", "spec:\n  clusterIPs: [fd00::g]", 5, "spec.clusterIPs[0]", "not an IP address"),
    ("Service", "spec:\n  ports: [{}]", 5, "spec.ports[0].port", "is missing"),
    ("Service", "spec:\n  ports: [{port: -1}]", 5, "spec.ports[0].port", "not a port"),
    ("Service", "spec:\n  ports: [{port: 1.5}]", 5, "spec.ports[0].port", "whole number"),
    ("Service", "spec:\n  ports: [{port: 80, targetPort: 99999}]", 5, "spec.ports[0].targetPort", "not a port"),
    ("Service", "spec:\n  ports: [{port: 80, targetPort: []}]", 5, "spec.ports[0].targetPort", "whole number"),
    ("Service", "spec:\n  ports: [{port: 80, protocol: HTTP}]", 5, "spec.ports[0].protocol", "none of TCP"),
    ("Service", "spec:\n  selector: app", 5, "spec.selector", "must be a map"),
    ("Service", "spec:\n  selector: {app: 1}", 5, "spec.selector.app", "put it in quotes"),
    ("Service", "spec:\n  ipFamilies: [IPv5]", 5, "spec.ipFamilies[0]", "neither IPv4"),
    ("Service", "spec:\n  internalTrafficPolicy: Near", 5, "spec.internalTrafficPolicy", "neither Cluster"),
    ("EndpointSlice", "endpoints: [{addresses: [here]}]", 4, "endpoints[0].addresses[0]", "not an IP address"),
    ("EndpointSlice", "ports: [{port: 0}]", 4, "ports[0].port", "not a port"),
    ("EndpointSlice", "endpoints: [{conditions: {ready: 1}}]", 4, "endpoints[0].conditions.ready", "true or false"),
    ("AuthorizationPolicy", "spec: deny", 4, "spec", "must be a map"),
    ("AuthorizationPolicy", "spec:\n  rule: []", 5, "spec.rule", "not a known field"),
    ("AuthorizationPolicy", "spec:\n  action: BLOCK", 5, "spec.action", "none of ALLOW"),
    ("AuthorizationPolicy", "spec:\n  rules: {}", 5, "spec.rules", "must be a list"),
    ("AuthorizationPolicy", "spec:\n  rules: [{form: []}]", 5, "spec.rules[0].form", "not a known field"),
    ("AuthorizationPolicy", "spec:\n  rules: [{from: []}]", 5, "spec.rules[0].from", "is empty"),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{from: [{source: {}}]}]",
        5,
        "spec.rules[0].from[0].source",
        "at least one",
    ),
    ("AuthorizationPolicy", "spec:\n  rules: [{from: [{}]}]", 5, "spec.rules[0].from[0].source", "at least one"),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        notPrincipal: [a]",
        8,
        "spec.rules[0].from[0].source.notPrincipal",
        "not a known field",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        ipBlocks: [10.0.0.0/33]",
        8,
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "neither an IP",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        notIpBlocks: [here]",
        8,
        "spec.rules[0].from[0].source.notIpBlocks[0]",
        "neither an IP",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        principals: [a*b]",
        8,
        "spec.rules[0].from[0].source.principals[0]",
        "neither first nor last",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        principals: ['spiffe://td/ns/a/sa/b']",
        8,
        "spec.rules[0].from[0].source.principals[0]",
        "without spiffe://",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        principals: ['']",
        8,
        "spec.rules[0].from[0].source.principals[0]",
        "is missing",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        principals: a",
        8,
        "spec.rules[0].from[0].source.principals",
        "must be a list",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        serviceAccounts: [a/b/c]",
        8,
        "spec.rules[0].from[0].source.serviceAccounts[0]",
        "neither `namespace/account`",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules:\n  - from:\n    - source:\n        namespaces: [1]",
        8,
        "spec.rules[0].from[0].source.namespaces[0]",
        "put it in quotes",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{to: [{operation: {ports: [80]}}]}]",
        5,
        "spec.rules[0].to[0].operation.ports[0]",
        "put it in quotes",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{to: [{operation: {ports: ['http']}}]}]",
        5,
        "spec.rules[0].to[0].operation.ports[0]",
        "not a port",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{to: [{operation: {ports: ['0']}}]}]",
        5,
        "spec.rules[0].to[0].operation.ports[0]",
        "not a port",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{to: [{operation: {ports: ['70000']}}]}]",
        5,
        "spec.rules[0].to[0].operation.ports[0]",
        "not a port",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{to: [{operation: {verbs: [GET]}}]}]",
        5,
        "spec.rules[0].to[0].operation.verbs",
        "not a known field",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{when: [{key: source.ip}]}]",
        5,
        "spec.rules[0].when[0]",
        "values or notValues",
    ),
    ("AuthorizationPolicy", "spec:\n  rules: [{when: [{values: [a]}]}]", 5, "spec.rules[0].when[0].key", "is missing"),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{when: [{key: source.color, values: [a]}]}]",
        5,
        "spec.rules[0].when[0].key",
        "not a known condition key",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{when: [{key: destination.port, values: [x]}]}]",
        5,
        "spec.rules[0].when[0].values[0]",
        "not a port",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  rules: [{when: [{key: source.ip, notValues: [x]}]}]",
        5,
        "spec.rules[0].when[0].notValues[0]",
        "neither an IP",
    ),
    ("AuthorizationPolicy", "spec:\n  selector: {matchLabel: {}}", 5, "spec.selector.matchLabel", "not a known field"),
    ("AuthorizationPolicy", "spec:\n  selector: {matchLabels: [a]}", 5, "spec.selector.matchLabels", "must be a map"),
    (
        "AuthorizationPolicy",
        "spec:\n  targetRefs: [{kind: Pod, name: x}]",
        5,
        "spec.targetRefs[0].kind",
        "none of Service",
    ),
    (
        "AuthorizationPolicy",
        "spec:\n  selector: {matchLabels: {a: b}}\n  targetRefs: [{kind: Service, name: x}]",
        5,
        "spec.selector",
        "beside targetRefs",
    ),
    ("PeerAuthentication", "spec:\n  mtls: STRICT", 5, "spec.mtls", "must be a map"),
    ("PeerAuthentication", "spec:\n  mtls: {mode: strict}", 5, "spec.mtls.mode", "none of UNSET"),
    ("PeerAuthentication", "spec:\n  mTLS: {mode: STRICT}", 5, "spec.mTLS", "not a known field"),
    ("PeerAuthentication", "spec:\n  portLevelMtls: {80: {mode: STRICT}}", 5, "spec.portLevelMtls", "needs a selector"),
    (
        "PeerAuthentication",
        "spec:\n  selector: {matchLabels: {a: b}}\n  portLevelMtls: {http: {mode: STRICT}}",
        6,
        "spec.portLevelMtls.http",
        "not a port",
    ),
    (
        "NetworkPolicy",
        "spec:\n  podSelector: {matchExpressions: [{key: a, operator: Is}]}",
        5,
        "spec.podSelector.matchExpressions[0].operator",
        "not a selector operator",
    ),
    ("NetworkPolicy", "spec:\n  policyTypes: [In]", 5, "spec.policyTypes[0]", "neither Ingress"),
];

#[test]
fn bad_objects_are_named_by_line_and_field_and_leave_others_alone() {
    for (kind, rest, line, field, message) in OBJECTS {
        let text = with_head(kind, rest);
        let loaded = update(&mut Files::default(), &[("a.yaml", &text), ("good.yaml", GOOD)]);
        let problem = loaded.problems.first().unwrap_or_else(|| panic!("accepted:\n{text}"));
        assert_eq!(
            (problem.file.as_str(), problem.line, problem.field.as_str()),
            ("a.yaml", *line, *field),
            "{problem}\n{text}"
        );
        assert!(problem.message.contains(message), "{problem}\n{text}");
        assert_eq!(problem.object, format!("{kind} shop/x"), "{problem}");
        assert!(loaded.world.pods.contains_key(&("shop".into(), "good".into())), "{text}");
        assert!(loaded.never_read.is_empty(), "{text}");
    }
}

#[test]
fn bad_documents_are_named_by_line() {
    let cases = [
        ("a: [", 1, ""),
        ("a: b: c", 1, ""),
        ("\ta: 1", 1, ""),
        ("kind: Pod\nkind: Pod\n", 2, "uplicate"),
        ("- 1\n- 2\n", 1, "must be a map"),
        ("just text", 1, "must be a map"),
        ("42", 1, "must be a map"),
        ("{}", 1, "is missing"),
        ("kind: Pod\n", 1, "is missing"),
        ("kind: 5\napiVersion: v1\n", 1, "put it in quotes"),
        ("apiVersion: v1\nkind: Pod\n", 1, "is missing"),
        ("apiVersion: v1\nkind: Pod\nmetadata: x\n", 3, "must be a map"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: ''}\n", 3, "is missing"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: UPPER}\n", 3, "not a Kubernetes name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: '../x'}\n", 3, "not a Kubernetes name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x, namespace: a.b}\n", 3, "not a namespace name"),
        ("apiVersion: v1\nkind: List\nitems: 3\n", 3, "must be a list"),
        ("apiVersion: v1\nkind: List\nitems: [3]\n", 3, "must be a map"),
        ("# fine\n---\n# still fine\n---\na: [", 5, ""),
    ];
    for (text, line, message) in cases {
        let loaded = update(&mut Files::default(), &[("a.yaml", text), ("good.yaml", GOOD)]);
        let problem = loaded.problems.first().unwrap_or_else(|| panic!("accepted:\n{text}"));
        assert_eq!((problem.file.as_str(), problem.line), ("a.yaml", line), "{problem}\n{text}");
        assert!(problem.message.contains(message), "{problem}\n{text}");
        assert_eq!(loaded.never_read, ["a.yaml"], "{text}");
        assert_eq!(loaded.world.pods.len(), 1, "{text}");
    }
}

#[test]
fn bad_metadata_of_a_policy_fails_closed_and_of_a_pod_leaves_it_out() {
    for rest in ["labels: {a: 1}", "labels: []", "creationTimestamp: soon", "annotations: 3", "generation: x"] {
        let meta = |version, kind| {
            format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop, {rest}}}\n")
        };
        let pod = meta("v1", "Pod");
        let policy = meta("security.istio.io/v1", "AuthorizationPolicy");
        let loaded = update(&mut Files::default(), &[("p.yaml", &pod), ("q.yaml", &policy)]);
        assert_eq!(loaded.problems.len(), 2, "{rest}: {:?}", loaded.problems);
        assert!(loaded.world.pods.is_empty());
        let policy = loaded.world.authorization_policies.get(&("shop".into(), "x".into())).expect("it fails closed");
        assert!(matches!(policy.spec, Spec::Unreadable { .. }), "{rest}");
    }
}

#[test]
fn last_good_version_stays_when_an_object_or_a_file_turns_bad() {
    let policy = |spec: &str| with_head("AuthorizationPolicy", &format!("{spec}\n"));
    let good = policy("spec: {action: DENY}");
    let mut files = Files::default();
    let first = update(&mut files, &[("a.yaml", &format!("{good}---\n{GOOD}"))]);
    // The object turns bad; its neighbour changes.
    let changed = GOOD.replace("shop}", "shop, labels: {v: two}}");
    let broken = format!("{}---\n{changed}", policy("spec: {action: NO}"));
    let second = update(&mut files, &[("a.yaml", &broken)]);
    assert_eq!(first.world.authorization_policies, second.world.authorization_policies);
    assert_ne!(first.world.pods, second.world.pods);
    assert!(second.problems[0].message.contains("last good version stays"), "{}", second.problems[0]);
    // The file turns bad as a whole.
    let third = update(&mut files, &[("a.yaml", "a: [")]);
    assert_eq!(third.world, second.world);
    assert!(third.never_read.is_empty());
    // It cannot even be opened.
    let unreadable = vec![("a.yaml".to_owned(), Err("permission denied".to_owned()))];
    let fourth = files.update(&BTreeSet::from(["a.yaml".into()]), unreadable);
    assert_eq!(fourth.world, second.world);
    // Repaired and emptied: now the objects are gone on purpose.
    assert_eq!(update(&mut files, &[("a.yaml", "# nothing\n")]).world, crate::model::World::default());
}

#[test]
fn policy_that_never_was_good_fails_closed_until_it_is() {
    let mut files = Files::default();
    let bad = with_head("AuthorizationPolicy", "spec: {selector: {matchLabels: {app: a}}, action: NO}");
    for _ in 0..2 {
        let loaded = update(&mut files, &[("a.yaml", &bad)]);
        let policy = loaded.world.authorization_policies.get(&("shop".into(), "x".into())).expect("it fails closed");
        assert!(matches!(&policy.spec, Spec::Unreadable { target: Some(crate::model::Target::Pods(_)), .. }));
    }
    let good = with_head("AuthorizationPolicy", "spec: {action: DENY}");
    let loaded = update(&mut files, &[("a.yaml", &good)]);
    assert!(loaded.problems.is_empty());
}

#[test]
fn duplicates_are_errors_and_the_first_file_wins() {
    let two = GOOD.replace("shop}", "shop, labels: {from: b}}");
    let loaded = update(&mut Files::default(), &[("a.yaml", GOOD), ("b.yaml", &two)]);
    assert!(loaded.problems[0].message.contains("the definition in a.yaml holds"), "{}", loaded.problems[0]);
    assert_eq!(loaded.problems[0].file, "b.yaml");
    assert!(loaded.world.pods.values().all(|pod| pod.meta.labels.is_empty()));
}

#[test]
fn many_documents_lists_and_json_are_read() {
    let json = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"j","namespace":"shop"}}"#;
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: n}\n- apiVersion: v1\n  kind: Service\n  metadata: {name: s}\n";
    let text = format!(
        "---\n# comment\n---\n{GOOD}\n--- # more\n{list}\n...\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\n"
    );
    let loaded = update(&mut Files::default(), &[("a.yaml", &text), ("b.json", json)]);
    assert_eq!(loaded.world.pods.len(), 2);
    assert_eq!(loaded.world.namespaces.len(), 1, "{:?}", loaded.problems);
    assert!(loaded.world.services.contains_key(&("default".into(), "s".into())));
    assert_eq!(loaded.problems.len(), 1, "{:?}", loaded.problems);
    assert!(!loaded.problems[0].error, "an unknown kind is only a hint");
}

#[test]
fn hostile_yaml_is_refused_in_time() {
    let bomb = (0..40)
        .fold("a0: &a0 [x]\n".to_owned(), |text, i| format!("{text}a{}: &a{} [*a{i}, *a{i}, *a{i}]\n", i + 1, i + 1));
    let deep = "[".repeat(50_000);
    for text in [bomb, deep] {
        assert!(!parse(text.as_bytes()).errors.is_empty());
    }
    assert_eq!(parse(b"kind: \xff").errors.len(), 1);
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn no_mutated_manifest_panics(kind in 0..OBJECTS.len(), cut in 0..400usize, insert in "[\\[\\]{}:,*&'\"\\-a0 \\n]{0,6}") {
        let mut text = with_head(OBJECTS[kind].0, OBJECTS[kind].1);
        let at = text.char_indices().map(|(i, _)| i).nth(cut % text.len()).unwrap_or(0);
        text.insert_str(at, &insert);
        for object in parse(text.as_bytes()).objects {
            prop_assert!(matches!(object, Object::Pod(_) | Object::Service(_) | Object::EndpointSlice(_) | Object::Endpoints(_)
                | Object::AuthorizationPolicy(_) | Object::PeerAuthentication(_) | Object::NetworkPolicy(_) | Object::TrustBundle(_)
                | Object::Namespace(_) | Object::Node(_) | Object::ServiceAccount(_) | Object::Unenforced(_)));
        }
    }
}
