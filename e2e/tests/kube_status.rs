//! Promise: what control has to say of an object is in its status, written once by one replica, beside what others wrote,
//! and left alone as long as nothing changes; behind other network plugins the mesh's own traffic is let through.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube::control::Control;
use e2e::kube::{self, ApiServer, Options, crds};
use e2e::lab::{LabConfig, programs_dir};
use e2e::scenario;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
const ROUTE: &str = "shop/cart";

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: tulle-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {tulle.dev/mesh: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: next, namespace: shop}
spec: {selector: {app: next}, ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: front, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: nobody, namespace: shop}
spec: {host: nobody, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 10}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: lost, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: nothing}], rules: [{backendRefs: [{name: cart, port: 80}]}]}
";

fn route(weight: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: cart, namespace: shop}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: cart, port: 80}}]\n  \
         rules: [{{backendRefs: [{{name: cart, port: 80, weight: {}}}, {{name: next, port: 80, weight: {weight}}}]}}]\n",
        100 - weight
    )
}

fn control(api: &ApiServer, dir: &Path) -> anyhow::Result<Control> {
    let control = Control::of_cluster(dir, &api.kubeconfig(), &["--ca-secret", "tulle-ca"])?;
    control.await_ready()?;
    Ok(control)
}

/// How often control has written statuses, and other things but its Lease.
fn writes(api: &ApiServer) -> anyhow::Result<Vec<String>> {
    let written = api.audit()?.into_iter().filter(|it| it.agent.starts_with("tulle-control") && it.writes());
    let written = written.filter(|it| !matches!(it.resource.as_str(), "leases" | "tokenreviews"));
    Ok(written.map(|it| format!("{} {}/{} {}", it.what(), it.namespace, it.name, it.code)).collect())
}

fn conditions<'a>(object: &'a Value, controller: &str) -> &'a [Value] {
    let list = match &object["status"]["parents"] {
        Value::Array(parents) => {
            parents.iter().find(|it| it["controllerName"] == controller).map(|it| &it["conditions"])
        }
        _ => Some(&object["status"]["conditions"]),
    };
    list.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    conditions(object, "tulle.dev/controller").iter().find(|it| it["type"] == kind).unwrap_or(&Value::Null)
}

/// Whether a condition has this status for the object's own generation.
fn says(object: &Value, kind: &str, status: &str) -> bool {
    let found = condition(object, kind);
    found["status"] == status && found["observedGeneration"] == object["metadata"]["generation"]
}

/// Waits until nothing was written for some seconds; gives what was.
fn settled(api: &ApiServer) -> anyhow::Result<usize> {
    let (mut last, mut since, began) = (writes(api)?.len(), Instant::now(), Instant::now());
    while since.elapsed() < Duration::from_secs(8) {
        anyhow::ensure!(began.elapsed() < PATIENCE, "it is written on and on: {:?}", writes(api)?);
        std::thread::sleep(Duration::from_millis(500));
        let now = writes(api)?.len();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

#[test]
fn a_status_is_written_once_beside_others_and_then_left_alone() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(OBJECTS)?;
    api.apply(&route(10))?;
    let foreign = json!({"parentRef": {"group": "", "kind": "Service", "name": "cart"}, "controllerName": "example.com/x",
        "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "theirs"}]});
    api.patch_status("HTTPRoute", ROUTE, &json!({"status": {"parents": [foreign]}}))?;
    let dir = tempfile::tempdir()?;
    let (one, two) = (control(&api, &dir.path().join("one"))?, control(&api, &dir.path().join("two"))?);

    let first = api.wait("HTTPRoute", ROUTE, "its route is accepted", |it| {
        says(it, "Accepted", "True") && says(it, "ResolvedRefs", "True") && says(it, "Programmed", "True")
    })?;
    assert_eq!(first["status"]["parents"][0], foreign, "what others say stays");
    assert_eq!(
        first["status"]["parents"][1]["parentRef"], first["spec"]["parentRefs"][0],
        "to the letter: Flagger compares them"
    );
    api.wait("HTTPRoute", "shop/lost", "there is no such parent", |it| {
        says(it, "Accepted", "False") && condition(it, "Accepted")["reason"] == "NoMatchingParent"
    })?;
    api.wait("AuthorizationPolicy", "shop/front", "it is enforced", |it| says(it, "Enforced", "True"))?;
    api.wait("DestinationRule", "shop/nobody", "nobody is its host", |it| {
        condition(it, "Accepted")["reason"] == "HostNotFound"
    })?;

    // Control's last word of its own: a new Lease holder waits before it publishes the roots.
    api.wait("ClusterTrustBundle", "tulle.dev:mesh-ca:root-cert", "the roots are published", |it| {
        it["metadata"]["uid"].is_string()
    })?;
    // Nothing happens: nothing is written, by either replica.
    let before = settled(&api)?;
    let quiet = Duration::from_secs(if std::env::var_os("TULLE_SLOW").is_some() { 300 } else { 45 });
    std::thread::sleep(quiet);
    let all = writes(&api)?;
    assert_eq!(all.len(), before, "written while nothing happened: {:?}", &all[before..]);

    // A change of one object: its status at once, and a bounded number of writes.
    api.apply(&route(25))?;
    let second = api.wait("HTTPRoute", ROUTE, "the new generation is accepted", |it| {
        it["metadata"]["generation"] != first["metadata"]["generation"]
            && says(it, "Accepted", "True")
            && says(it, "ResolvedRefs", "True")
            && says(it, "Programmed", "True")
    })?;
    let since = |object: &Value| condition(object, "Accepted")["lastTransitionTime"].clone();
    assert_eq!(since(&second), since(&first), "it was accepted before");
    assert_eq!(second["status"]["parents"][0], foreign);
    let after = settled(&api)?;
    let all = writes(&api)?;
    assert!((1..=3).contains(&(after - before)), "for one change: {:?}", &all[before..]);

    // Somebody wipes it.
    api.patch_status("HTTPRoute", ROUTE, &json!({"status": {"parents": []}}))?;
    api.wait("HTTPRoute", ROUTE, "it is written again", |it| {
        says(it, "Accepted", "True") && says(it, "Programmed", "True")
    })?;
    // What it refers to goes, and its generation stays.
    api.delete("Service", "shop/next")?;
    api.wait("HTTPRoute", ROUTE, "a backend is missing", |it| {
        condition(it, "ResolvedRefs")["reason"] == "BackendNotFound" && says(it, "ResolvedRefs", "False")
    })?;
    let refused: Vec<String> =
        writes(&api)?.into_iter().filter(|it| it.contains("/status") && !it.ends_with(" 200")).collect();
    assert!(refused.len() <= 2, "conflicts at most: {refused:?}");
    one.stop();
    two.stop();
    Ok(())
}

/// Whether a control holds the Lease, by its own word.
fn holds(dir: &Path) -> bool {
    let log = std::fs::read_to_string(dir.join("control.log")).unwrap_or_default();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| line.pointer("/fields/held").and_then(Value::as_bool)).next_back().unwrap_or(false)
}

#[test]
fn another_replica_writes_when_the_one_that_wrote_is_gone() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(OBJECTS)?;
    let dir = tempfile::tempdir()?;
    let (first, second, third) = (dir.path().join("one"), dir.path().join("two"), dir.path().join("three"));
    let one = control(&api, &first)?;
    eventually("the first one holds the Lease", PATIENCE, || if holds(&first) { Ok(()) } else { Err("not yet") })?;
    let two = control(&api, &second)?;
    let accepted = |weight: u32| {
        api.apply(&route(weight))?;
        api.wait("HTTPRoute", ROUTE, "it is accepted", |it| says(it, "Accepted", "True"))
    };
    accepted(1)?;
    assert!(!holds(&second), "one at a time");

    // It hangs: the other one takes over, and when it wakes up it does not write on.
    one.pause();
    accepted(2)?;
    assert!(holds(&second));
    let lease = || -> anyhow::Result<Value> {
        let lease = api.get("Lease", "tulle-system/tulle-control")?.context("no Lease")?;
        Ok(lease["spec"]["holderIdentity"].clone())
    };
    let holder = lease()?;
    one.resume();
    eventually("the first one knows", PATIENCE, || if holds(&first) { Err("not yet") } else { Ok(()) })?;
    accepted(3)?;
    assert_eq!(lease()?, holder);

    // It is killed, and the other one is there.
    two.kill();
    accepted(4)?;
    assert!(holds(&first));
    // It stops in order: the next one need not wait for the Lease's time.
    one.stop();
    assert!(lease()?.is_null(), "it was given up");
    let _three = control(&api, &third)?;
    accepted(5)?;
    Ok(())
}

const POLICIES: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress], ingress: [{ports: [{port: 5432}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: lone}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
";

#[test]
fn isolated_pods_of_the_mesh_get_policies_for_its_own_traffic_until_they_leave() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(OBJECTS)?;
    api.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: lone}\n")?;
    // By name alone and by label alone they are somebody else's.
    let theirs = [("tulle-mesh-theirs", "helm"), ("web", "tulle")];
    for (name, by) in theirs {
        api.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: theirs}}\n---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: {name}, namespace: theirs, labels: {{app.kubernetes.io/managed-by: {by}}}}}\nspec: {{podSelector: {{}}}}\n"
        ))?;
    }
    let dir = tempfile::tempdir()?;
    let control = control(&api, &dir.path().join("one"))?;
    let ours = |namespace: &str| -> anyhow::Result<Vec<Value>> {
        let all = api.list("NetworkPolicy", namespace)?;
        Ok(all.into_iter().filter(|it| it["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "tulle").collect())
    };
    api.apply(POLICIES)?;
    let found = eventually("a policy beside db's", PATIENCE, || match &ours("shop")?[..] {
        [one] => Ok(one.clone()),
        other => Err(anyhow::anyhow!("{other:?}")),
    })?;
    assert_eq!(found["spec"]["podSelector"], json!({"matchLabels": {"app": "db"}}), "and of no other pod");
    assert_eq!(found["spec"]["policyTypes"], json!(["Ingress"]));
    assert_eq!(found["spec"]["ingress"][0]["ports"][0]["port"], 15008);
    assert!(ours("lone")?.is_empty(), "it is not in the mesh");
    let resources = control.json("/debug/resources")?;
    assert!(!resources.to_string().contains("shop/tulle-mesh"), "the mesh does not enforce it: {resources}");

    api.label("Namespace", "lone", "tulle.dev/mesh", Some("enabled"))?;
    eventually("one for all pods of lone", PATIENCE, || match &ours("lone")?[..] {
        [one] if one["metadata"]["name"] == "tulle-mesh" => Ok(()),
        other => Err(anyhow::anyhow!("{other:?}")),
    })?;
    // Taken away by somebody, it comes back; not wanted any more, it goes after the drain.
    api.delete("NetworkPolicy", "lone/tulle-mesh")?;
    eventually(
        "it is back",
        PATIENCE,
        || if ours("lone")?.len() == 1 { Ok(()) } else { Err(anyhow::anyhow!("gone")) },
    )?;
    let before = settled(&api)?;
    api.label("Namespace", "lone", "tulle.dev/mesh", None)?;
    eventually("it goes", PATIENCE, || if ours("lone")?.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("there")) })?;
    assert_eq!(ours("shop")?.len(), 1);
    assert_eq!(api.list("NetworkPolicy", "theirs")?.len(), theirs.len(), "those of somebody else were deleted");
    let all = writes(&api)?;
    assert!(all.len() - before <= 2, "{:?}", &all[before..]);
    Ok(())
}

/// A lab in a cluster, and a second replica of control in it, which has no node attached.
#[test]
fn programmed_counts_the_nodes_of_every_replica() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    let mut config = LabConfig::of(&scenario::world(true)).in_cluster(&api, false)?;
    config.timeout = kube::cluster::PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let inside = api.in_lab(&api.kubeconfig())?.display().to_string();
    let ca = lab.paths().ca().display().to_string();
    let program = programs_dir()?.join("control").display().to_string();
    let listen = ["--grpc-listen", "0.0.0.0:15112", "--http-listen", "127.0.0.1:15114", "--tls-san", "10.10.0.2"];
    let mut argv = vec![program.as_str(), "serve", "--source", "kube", "--kubeconfig", &inside, "--ca-dir", &ca];
    argv.extend(listen);
    let holder = || -> anyhow::Result<Value> {
        let lease = api.get("Lease", "tulle-system/tulle-control")?.context("no Lease")?;
        Ok(lease["spec"]["holderIdentity"].clone())
    };
    let first = eventually("somebody holds the Lease", PATIENCE, || match holder()? {
        Value::Null => Err(anyhow::anyhow!("nobody")),
        holder => Ok(holder),
    })?;
    let _second = lab.spawn("control", &argv)?;
    eventually("the second one is ready", PATIENCE, || match lab.get("control", 15114, "/readyz")? {
        (200, _) => Ok(()),
        other => Err(anyhow::anyhow!("{other:?}")),
    })?;
    // The nodes stay with the one that is started again, and the other one writes.
    lab.kill("control", "TERM")?;
    lab.restart("control")?;
    let second = eventually("the second one holds the Lease", PATIENCE, || match holder()? {
        Value::Null => Err(anyhow::anyhow!("nobody")),
        now if now == first => Err(anyhow::anyhow!("still the first")),
        now => Ok(now),
    })?;
    api.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: cart, namespace: shop}\nspec:\n  \
         parentRefs: [{group: '', kind: Service, name: cart, port: 80}]\n  \
         rules: [{backendRefs: [{name: cart, port: 80}]}]\n",
    )?;
    let route = api.wait("HTTPRoute", ROUTE, "every node has it", |it| says(it, "Programmed", "True"))?;
    let message = condition(&route, "Programmed")["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.starts_with("Programmed on ") && !message.contains(" 0 "), "{message}");
    assert_eq!(holder()?, second, "who wrote has no node");
    Ok(())
}
