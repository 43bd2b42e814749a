//! Promise: with ten thousand pods in the API, a change to one of them is in force at a proxy as fast as with ten, and
//! control's memory stays small, also with a hundred thousand. `TULLE_SLOW=1` makes all of them; otherwise a tenth.
//!
//! Times are printed and not judged: a busy machine says nothing about them.

use std::time::Duration;

use anyhow::Context as _;
use e2e::bench::{peak_bytes as peak, resident_bytes as resident};
use e2e::eventually::eventually;
use e2e::kube::cluster::{Cluster, PATIENCE};
use e2e::kube::control::Control;
use e2e::kube::{self, Options, crds};
use e2e::lab::{Lab, LabConfig};
use e2e::oracle::now_us;
use e2e::scenario;
use futures_util::StreamExt as _;
use http::Method;
use serde_json::{Value, json};

/// Requests at a time: two cores are busy with a dozen.
const AT_ONCE: usize = 12;
/// Most bytes of control's memory for a pod of the mesh. Measured: the half.
const MOST_EACH: u64 = 6_000;
/// Changes that are measured.
const SAMPLES: usize = 100;

fn pods() -> usize {
    if std::env::var_os("TULLE_SLOW").is_some() { 10_000 } else { 1_000 }
}

fn name(index: usize) -> String {
    format!("p{index:05}")
}

fn object(index: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name(index), "namespace": "bulk", "labels": {"app": format!("app-{}", index % 500)}},
        "spec": {"nodeName": format!("far-{}", index % 100), "serviceAccountName": format!("app-{}", index % 500),
            "containers": [{"name": "main", "image": "none"}]},
    })
}

fn status(index: usize) -> Value {
    let ip = format!("10.{}.{}.{}", 100 + (index >> 16), (index >> 8) & 255, index & 255);
    json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// Makes a pod as scheduler and kubelet would; returns the time just before it got its address.
async fn make(api: &Cluster, index: usize) -> anyhow::Result<u64> {
    let pods = "/api/v1/namespaces/bulk/pods";
    api.asked(Method::POST, pods, "application/json", &object(index)).await?;
    let before = now_us();
    let uri = format!("{pods}/{}/status", name(index));
    api.asked(Method::PATCH, &uri, "application/merge-patch+json", &status(index)).await?;
    Ok(before)
}

/// Memory of control and of a node's proxy, bytes.
fn memory(lab: &Lab) -> anyhow::Result<(u64, u64)> {
    let view = lab.view()?;
    let node = view.nodes.first().and_then(|node| node.pid).context("no proxy runs")?;
    Ok((resident(view.control.pid.context("control does not run")?)?, resident(node)?))
}

/// When the node had a pod of the bulk in force, by its own log.
fn applied(lab: &Lab, index: usize) -> anyhow::Result<u64> {
    let wanted = format!("Pod/bulk/{}", name(index));
    let log = lab.node_admin("node-1", "/debug/versions")?;
    let entries = log.as_array().context("the log is a list")?;
    let holds =
        |entry: &&Value| entry["resources"].as_object().is_some_and(|it| it.keys().any(|key| key.ends_with(&wanted)));
    let entry = entries.iter().find(holds).with_context(|| format!("{wanted} is not in force"))?;
    entry["applied_unix_us"].as_u64().context("an entry without a time")
}

/// Control alone, with pods of the mesh that it reads, translates and publishes, and no node that asks for them.
#[test]
fn control_at_a_hundred_thousand_pods() -> anyhow::Result<()> {
    let Some(mut api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(&(scenario::namespace("tulle-system", false) + &scenario::namespace("bulk", true)))?;
    let dir = tempfile::tempdir()?;
    let control = Control::of_cluster(&dir.path().join("empty"), &api.kubeconfig(), &[])?;
    control.await_ready()?;
    let before = resident(control.pid().context("control does not run")?)?;
    control.stop();
    let count = pods() * 10;
    let stored = (0..count).map(|index| {
        let mut pod = object(index);
        pod["status"] = status(index)["status"].clone();
        pod["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{index:012}"));
        pod["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        (format!("pods/bulk/{}", name(index)), pod)
    });
    api.stop();
    api.restore(stored)?;
    api.begin()?;
    api.await_ready()?;
    let began = now_us();
    let control = Control::of_cluster(&dir.path().join("full"), &api.kubeconfig(), &[])?;
    eventually("control knows them all", Duration::from_secs(300), || {
        // What they are translated to.
        let metrics = control.page("/metrics")?.body;
        let line = metrics.lines().find_map(|line| line.strip_prefix("tulle_control_addresses "));
        let published: usize = line.context("no addresses")?.parse()?;
        anyhow::ensure!(published >= count, "{published} addresses");
        Ok(())
    })?;
    let started_ms = (now_us() - began) / 1000;
    let pid = control.pid().context("control does not run")?;
    let (after, most) = (resident(pid)?, peak(pid)?);
    let each = after.saturating_sub(before) / count as u64;
    let measured = json!({"pods": count, "started_ms": started_ms, "bytes_each": each,
        "control_bytes": {"empty": before, "resident": after, "peak": most}});
    eprintln!("MEASURED {measured}");
    assert!(each < MOST_EACH, "{measured}");
    control.stop();
    Ok(())
}

#[test]
fn ten_thousand_pods_through_the_api() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::namespace("bulk", true));
    let mut config = LabConfig::of(&objects).in_cluster(&api, false)?;
    config.timeout = PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let small = memory(&lab)?;

    let began = now_us();
    let count = pods();
    api.run(async {
        let mut all = futures_util::stream::iter(0..count).map(|index| make(&api, index)).buffer_unordered(AT_ONCE);
        while let Some(made) = all.next().await {
            made?;
        }
        anyhow::Ok(())
    })?;
    let filled_ms = (now_us() - began) / 1000;
    eventually("the node knows them all", Duration::from_secs(300), || {
        let status = lab.node_admin("node-1", "/status")?;
        let known = status["workloads"].as_u64().unwrap_or_default();
        if usize::try_from(known)? >= count { Ok(()) } else { Err(anyhow::anyhow!("{known} workloads: {status}")) }
    })?;

    let mut took: Vec<u64> = Vec::with_capacity(SAMPLES);
    for index in count..count + SAMPLES {
        let before = api.run(make(&api, index))?;
        let at = eventually("the change is in force", PATIENCE, || applied(&lab, index))?;
        took.push(at.saturating_sub(before));
    }
    took.sort_unstable();
    let large = memory(&lab)?;
    let measured = json!({
        "pods": count, "filled_ms": filled_ms,
        "effect_us": {"p50": took[SAMPLES / 2], "p99": took[SAMPLES * 99 / 100], "max": took[SAMPLES - 1]},
        "control_bytes": {"before": small.0, "after": large.0}, "ztunnel_bytes": {"before": small.1, "after": large.1},
        "apiserver_bytes": api.pid().map(resident).transpose()?,
    });
    eprintln!("MEASURED {measured}");
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--count", "20"])?, 20)?;
    let known = lab.node_admin("node-1", "/status")?["workloads"].clone();
    api.remove("Pod", &format!("bulk/{}", name(0)))?;
    eventually("a removed pod is forgotten", PATIENCE, || {
        let now = lab.node_admin("node-1", "/status")?["workloads"].clone();
        if now.as_u64() < known.as_u64() { Ok(()) } else { Err(anyhow::anyhow!("{now} of {known}")) }
    })?;
    Ok(())
}
