//! What a pod of the cluster costs control's source: its answer from the API server goes through the reader and the
//! decoder, in pages as they come, into what is known; then a new list of the same pods, as after an outage.
//!
//! Pods are as a Deployment makes them, 7 KB each, with managed fields, volumes, statuses and annotations. 10,000 pods by
//! default, 100,000 with `TULLE_SLOW=1`. Resident memory is what is asked of a machine, so that is measured; alone in its
//! process, because all of it counts.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Instant;

use control::source::kube::json;
use control::source::kube::kinds::KINDS;
use control::source::kube::known::{Event, Known};

/// Most bytes for a pod. Measured: a third of it.
const MOST: usize = 4096;
const PAGE: usize = 500;

/// Resident and largest resident memory of this process, bytes.
fn resident() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let of = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    };
    (of("VmRSS:"), of("VmHWM:"))
}

fn pod(n: usize) -> String {
    let (namespace, app, node) =
        (format!("team-{}", n / 200), format!("service-{}", n / 10), format!("node-{}", n % 500));
    let ip = format!("10.{}.{}.{}", n / 65536, n / 256 % 256, n % 256);
    let env: Vec<String> =
        (0..20).map(|i| format!(r#"{{"name":"SETTING_{i}","value":"a value of some length, number {i}"}}"#)).collect();
    let managed = r#"{"manager":"kube-controller-manager","operation":"Update","apiVersion":"v1","time":"2026-01-01T00:00:00Z","fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{"f:labels":{".":{},"f:app":{},"f:pod-template-hash":{}},"f:ownerReferences":{".":{},"k:{\"uid\":\"x\"}":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"main\"}":{".":{},"f:env":{},"f:image":{},"f:ports":{},"f:resources":{}}}}}}"#;
    let conditions: Vec<String> = [
        "PodReadyToStartContainers",
        "Initialized",
        "Ready",
        "ContainersReady",
        "PodScheduled",
    ]
    .iter()
    .map(|kind| {
        format!(
            r#"{{"type":"{kind}","status":"True","lastProbeTime":null,"lastTransitionTime":"2026-01-01T00:00:00Z"}}"#
        )
    })
    .collect();
    format!(
        r#"{{"metadata":{{"name":"{app}-7d9c5b8f6d-{n:05}","generateName":"{app}-7d9c5b8f6d-","namespace":"{namespace}",
        "uid":"3f2a9c1e-0000-4000-8000-{n:012}","resourceVersion":"{n}","generation":1,"creationTimestamp":"2026-01-01T00:00:00Z",
        "labels":{{"app":"{app}","pod-template-hash":"7d9c5b8f6d","app.kubernetes.io/name":"{app}","app.kubernetes.io/version":"1.2.3"}},
        "annotations":{{"checksum/config":"{sum}","ambient.istio.io/redirection":"enabled","kubectl.kubernetes.io/restartedAt":"2026-01-01"}},
        "ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"{app}-7d9c5b8f6d","uid":"x","controller":true}}],
        "managedFields":[{managed},{managed},{managed}]}},
        "spec":{{"volumes":[{{"name":"kube-api-access","projected":{{"sources":[{{"serviceAccountToken":{{"expirationSeconds":3607,"path":"token"}}}}]}}}}],
        "containers":[{{"name":"main","image":"registry.example.com/{app}:1.2.3","ports":[{{"name":"http","containerPort":8080,"protocol":"TCP"}},
        {{"name":"metrics","containerPort":9090,"protocol":"TCP"}}],"env":[{env}],
        "livenessProbe":{{"httpGet":{{"path":"/healthz","port":"http"}}}},"readinessProbe":{{"httpGet":{{"path":"/ready","port":8080}}}}}}],
        "serviceAccountName":"{app}","nodeName":"{node}"}},
        "status":{{"phase":"Running","conditions":[{conditions}],"hostIP":"192.168.0.1","podIP":"{ip}","podIPs":[{{"ip":"{ip}"}},{{"ip":"fd00::{n:x}"}}],
        "containerStatuses":[{{"name":"main","state":{{"running":{{"startedAt":"2026-01-01T00:00:00Z"}}}},"ready":true,"restartCount":0,
        "image":"registry.example.com/{app}:1.2.3","imageID":"registry.example.com/{app}@sha256:{sum}","containerID":"containerd://{sum}"}}]}}}}"#,
        sum = "0123456789abcdef".repeat(4),
        env = env.join(","),
        conditions = conditions.join(","),
    )
}

fn list(known: &mut Known, place: usize, pods: usize) -> bool {
    known.apply(place, Event::Started, 1);
    for first in (0..pods).step_by(PAGE) {
        let items: Vec<String> = (first..pods.min(first + PAGE)).map(pod).collect();
        let text = format!(r#"{{"metadata":{{"resourceVersion":"1"}},"items":[{}]}}"#, items.join(","));
        let page = json::page(text.as_bytes(), &KINDS[place]).expect("a page");
        known.apply(place, Event::Page(page.items), 1);
    }
    known.apply(place, Event::Listed("1".into()), 1)
}

#[test]
fn a_pod_costs_little_and_a_new_list_of_the_same_pods_less() {
    let slow = std::env::var_os("TULLE_SLOW").is_some();
    let pods = if slow { 100_000 } else { 10_000 };
    let place = KINDS.iter().position(|kind| kind.name == "Pod").unwrap();
    let mut known = Known::default();
    // Once for what reading itself needs.
    list(&mut known, place, PAGE);
    let (before, _) = resident();
    let begun = Instant::now();
    assert!(list(&mut known, place, pods));
    let (took, (after, peak)) = (begun.elapsed(), resident());
    assert!(!list(&mut known, place, pods), "nothing changed");
    let (_, peak_again) = resident();
    let loaded = known.loaded();
    assert_eq!((loaded.world.pods.len(), loaded.problems.len()), (pods, 0));
    let new = pods - PAGE;
    let each = after.saturating_sub(before) / new;
    println!(
        "{pods} pods of {} bytes: {each} bytes of resident memory each, {} while they were listed, {} while they were \
         listed again; {:.0} µs each to read and take in (with writing the test's own JSON)",
        pod(7).len(),
        peak.saturating_sub(before) / new,
        peak_again.saturating_sub(before) / new,
        took.as_secs_f64() * 1e6 / pods as f64,
    );
    assert!(each < MOST, "{each} bytes for each pod");
    assert!(peak_again.saturating_sub(before) / new < 2 * MOST, "a new list takes too much beside the old one");
}
