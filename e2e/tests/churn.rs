//! Promise: under constant change every verdict is that of a policy in force, and nobody else notices.
//!
//! Three clients send 10,000 requests while a policy and a Service's endpoints change every 100 ms: one is always
//! allowed (no failure), one always denied (no pass), one flips, and each of its verdicts must be that of a version that
//! the node had in force between the request's start and end, by the node's own log of applied versions. `SEED` repeats
//! a run.

use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value;

const CHANGE_EVERY: Duration = Duration::from_millis(100);
const FLIPS_MIN: usize = 200;
const REQUESTS_MIN: usize = 10_000;
/// The log's time stamp is taken beside the swap of the snapshot, not in the same instant.
const STAMP_SLACK_US: u64 = 5_000;
/// A file's change reaches the node within this.
const LAG_MAX_US: u64 = 1_000_000;

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Replaces a file of control's source behind the lab's back.
fn write(lab: &Lab, name: &str, text: &str) -> anyhow::Result<()> {
    let path = lab.paths().objects().join("shop").join(name);
    let hidden = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&hidden, text)?;
    Ok(std::fs::rename(&hidden, &path)?)
}

fn flip(lab: &Lab, deny: bool) -> anyhow::Result<()> {
    let who = if deny { "flip" } else { "nobody" };
    let rules = format!("[{{from: [{{source: {{principals: ['cluster.local/ns/shop/sa/{who}']}}}}]}}]");
    write(
        lab,
        "churn-flip.yaml",
        scenario::authorization("shop", "flip", "flux", "DENY", &rules).trim_start_matches("---\n"),
    )
}

fn endpoints(lab: &Lab, addresses: &[(String, String)], present: &[bool]) -> anyhow::Result<()> {
    let list: Vec<Value> = addresses
        .iter()
        .zip(present)
        .filter(|(_, present)| **present)
        .map(|((pod, ip), _)| {
            serde_json::json!({"addresses": [ip], "conditions": {"ready": true}, "nodeName": "node-2",
                "targetRef": {"kind": "Pod", "namespace": "shop", "name": pod}})
        })
        .collect();
    let slice = serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "flux-churn", "namespace": "shop", "labels": {"kubernetes.io/service-name": "flux"}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": list,
    });
    write(lab, "churn-slice.yaml", &slice.to_string())
}

/// The node's log of one policy: when which version came into force.
fn versions(lab: &Lab) -> anyhow::Result<Vec<(u64, String)>> {
    let log = lab.node_admin("node-2", "/debug/versions")?;
    let mut changes: Vec<(u64, String)> = Vec::new();
    for entry in log.as_array().context("the log is a list")? {
        let time = entry["applied_unix_us"].as_u64().context("an entry without a time")?;
        for (name, version) in entry["resources"].as_object().into_iter().flatten() {
            if name.contains("Authorization") && name.ends_with("/flip") {
                changes.push((time, version.as_str().unwrap_or("removed").to_owned()));
            }
        }
    }
    Ok(changes)
}

/// Version of the policy in force once the node has applied something newer than `after` changes.
fn newest(lab: &Lab, after: usize) -> anyhow::Result<String> {
    eventually("the node applies the policy", scenario::PATIENCE, || {
        let changes = versions(lab)?;
        match changes.last() {
            Some((_, version)) if changes.len() > after => Ok(version.clone()),
            _ => Err(anyhow::anyhow!("{} changes so far", changes.len())),
        }
    })
}

/// Whether the verdict of a request can be that of a version in force during it.
fn is_justified(changes: &[(u64, String)], denying: &str, report: &Value) -> bool {
    let (Some(start), Some(end)) = (report["t_us"].as_u64(), report["end_us"].as_u64()) else { return false };
    let (start, end) = (start.saturating_sub(STAMP_SLACK_US), end + STAMP_SLACK_US);
    let before = changes.iter().rev().find(|(time, _)| *time <= start);
    let during = changes.iter().filter(|(time, _)| *time > start && *time <= end);
    let passed = report["ok"] == true;
    before.into_iter().chain(during).any(|(_, version)| (version == denying) != passed)
}

/// Longest time from writing a version to its being in force; a version overtaken by the next is as good.
fn lag_us(changes: &[(u64, String)], written: &[(u64, bool)], denying: &str) -> Option<u64> {
    let state_at = |time: u64| changes.iter().rev().find(|(at, _)| *at <= time).map(|(_, version)| version == denying);
    let mut longest = 0;
    for (time, deny) in written {
        if state_at(*time) == Some(*deny) {
            continue;
        }
        let applied = changes.iter().find(|(at, version)| at > time && (version == denying) == *deny);
        longest = longest.max(applied?.0 - time);
    }
    Some(longest)
}

fn world() -> String {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::client("shop", "flip", 1));
    for name in ["flux-a", "flux-b", "flux-c"] {
        objects.push_str(&scenario::server("shop", name, "flux", 2));
    }
    objects.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: flux, namespace: shop}\nspec: {ports: [{name: http, port: 80, targetPort: 8080}]}\n",
    );
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";
    objects.push_str(&scenario::authorization("shop", "never", "flux", "DENY", rules));
    objects
}

#[test]
fn every_verdict_is_that_of_a_policy_in_force() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return Ok(()) };
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    let mut random = StdRng::seed_from_u64(seed);
    let addresses: Vec<(String, String)> = ["flux-a", "flux-b", "flux-c"]
        .into_iter()
        .map(|pod| anyhow::Ok((pod.to_owned(), lab.pod_ip("shop", pod)?)))
        .collect::<anyhow::Result<_>>()?;
    endpoints(&lab, &addresses, &[true; 3])?;
    flip(&lab, true)?;
    let denying = newest(&lab, 0)?;
    flip(&lab, false)?;
    let allowing = newest(&lab, 1)?;
    assert_ne!(denying, allowing);
    eventually("the Service answers", scenario::PATIENCE, || {
        let report = scenario::call(&lab, "shop/web", "http://flux.shop/")?;
        if report["ok"] == true { Ok(()) } else { Err(anyhow::anyhow!("{report}")) }
    })?;

    let url = ["http://flux.shop/"];
    let allowed = lab.load("shop/web", &url, 120.0, &[])?;
    let denied = lab.load("shop/other", &url, 60.0, &[])?;
    let flipping = lab.load("shop/flip", &url, 100.0, &[])?;
    let began = Instant::now();
    let mut written = Vec::new();
    // 280 requests a second in all; a little longer than the least, since clients start at different times.
    let long_enough = Duration::from_secs_f64(REQUESTS_MIN as f64 / 280.0 + 3.0);
    while written.len() < FLIPS_MIN || began.elapsed() < long_enough {
        let deny = written.len() % 2 == 0;
        written.push((now_us(), deny));
        flip(&lab, deny)?;
        let mut present = [random.random::<bool>(), random.random(), random.random()];
        // Never empty: having no endpoint is another promise.
        present[random.random_range(0..3)] = true;
        endpoints(&lab, &addresses, &present)?;
        let next = began + CHANGE_EVERY * u32::try_from(written.len())?;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let (allowed, denied, flipping) = (allowed.finish()?, denied.finish()?, flipping.finish()?);
    std::thread::sleep(Duration::from_micros(LAG_MAX_US));
    let changes = versions(&lab)?;
    report(seed, &[&allowed, &denied, &flipping], &written, &changes);

    scenario::all_well(&allowed, 1000)?;
    let passed: Vec<_> = denied.iter().filter(|report| report["ok"] == true).collect();
    assert!(passed.is_empty(), "{} of {} denied requests passed: {:?}", passed.len(), denied.len(), passed.first());
    let unjust: Vec<_> = flipping.iter().filter(|report| !is_justified(&changes, &denying, report)).collect();
    assert!(
        unjust.is_empty(),
        "{} of {} verdicts are of no version in force, such as {:?}",
        unjust.len(),
        flipping.len(),
        unjust.first()
    );
    let (ok, not) = (scenario::failures(&flipping).len(), flipping.len());
    assert!(ok * 10 > not && ok * 10 < not * 9, "a flipping policy gives both verdicts often: {ok} of {not} denied");
    let lag = lag_us(&changes, &written, &denying).context("a written version never came into force")?;
    assert!(lag <= LAG_MAX_US, "a change took {} ms to the node", lag / 1000);
    let all = allowed.len() + denied.len() + flipping.len();
    assert!(all >= REQUESTS_MIN && written.len() >= FLIPS_MIN, "{all} requests, {} flips", written.len());
    Ok(())
}

fn report(seed: u64, groups: &[&Vec<Value>; 3], written: &[(u64, bool)], changes: &[(u64, String)]) {
    let [allowed, denied, flipping] = groups.map(|group| (group.len(), scenario::failures(group).len()));
    println!(
        "seed {seed}: {} flips written, {} applied; allowed {} ({} failed), denied {} ({} refused), flipping {} ({} refused)",
        written.len(),
        changes.len(),
        allowed.0,
        allowed.1,
        denied.0,
        denied.1,
        flipping.0,
        flipping.1
    );
}
