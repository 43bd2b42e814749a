//! The oracle of churn: a world in which one client is always allowed, one always denied and one flips, and the judge of
//! what they saw.
//!
//! A policy and a Service's endpoints are rewritten behind the lab's back, as fast as the caller likes. Each verdict of
//! the flipping client must be that of a version that its node had in force between the request's start and end, by the
//! node's own log of applied versions. Used by the churn test and by `lab soak`. Limits: the node's log holds 2048
//! changes.

use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use serde_json::Value;

use crate::eventually::eventually;
use crate::lab::Lab;
use crate::scenario;

/// Between two changes.
pub const CHANGE_EVERY: Duration = Duration::from_millis(100);

/// The pods behind the Service that changes.
pub const BACKENDS: [&str; 3] = ["flux-a", "flux-b", "flux-c"];

/// For the clients of a run, whose promise is what they are answered and not how soon: a machine with other work to do must
/// not turn a late answer into a wrong one. A name whose first question is lost takes five seconds in any pod.
pub const PATIENT: [&str; 2] = ["--timeout-ms", "60000"];

/// Microseconds since the Unix epoch.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Replaces a file of control's source behind the lab's back.
fn write(lab: &Lab, name: &str, text: &str) -> anyhow::Result<()> {
    let path = lab.paths().objects().join("shop").join(name);
    let hidden = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&hidden, text)?;
    Ok(std::fs::rename(&hidden, &path)?)
}

/// Lets the policy deny the flipping client, or nobody.
pub fn flip(lab: &Lab, deny: bool) -> anyhow::Result<()> {
    let who = if deny { "flip" } else { "nobody" };
    let rules = format!("[{{from: [{{source: {{principals: ['cluster.local/ns/shop/sa/{who}']}}}}]}}]");
    write(
        lab,
        "churn-flip.yaml",
        scenario::authorization("shop", "flip", "flux", "DENY", &rules).trim_start_matches("---\n"),
    )
}

/// The Service has those of `addresses` (pod, IPv4 address) that are present.
pub fn endpoints(lab: &Lab, addresses: &[(String, String)], present: &[bool]) -> anyhow::Result<()> {
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

/// A version of the policy as the node's log has it.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Nobody decided by it before, microseconds since the Unix epoch.
    pub begun_us: u64,
    /// Nobody decided by the version before it after that.
    pub settled_us: u64,
    /// Its name.
    pub version: String,
}

/// The node's log of one policy: when which version came into force.
pub fn versions(lab: &Lab) -> anyhow::Result<Vec<Applied>> {
    let log = lab.node_admin("node-2", "/debug/versions")?;
    let mut changes = Vec::new();
    for entry in log.as_array().context("the log is a list")? {
        let begun_us = entry["applied_unix_us"].as_u64().context("an entry without a time")?;
        let settled_us = entry["settled_unix_us"].as_u64().unwrap_or(u64::MAX);
        for (name, version) in entry["resources"].as_object().into_iter().flatten() {
            if name.contains("Authorization") && name.ends_with("/flip") {
                let version = version.as_str().unwrap_or("removed").to_owned();
                changes.push(Applied { begun_us, settled_us, version });
            }
        }
    }
    Ok(changes)
}

/// Version of the policy in force once the node has applied something newer than `after` changes.
pub fn newest(lab: &Lab, after: usize) -> anyhow::Result<String> {
    eventually("the node applies the policy", scenario::PATIENCE, || {
        let changes = versions(lab)?;
        match changes.last() {
            Some(last) if changes.len() > after => Ok(last.version.clone()),
            _ => Err(anyhow::anyhow!("{} changes so far", changes.len())),
        }
    })
}

/// Whether the verdict of a request can be that of a version in force during it.
pub fn is_justified(changes: &[Applied], denying: &str, report: &Value) -> bool {
    let (Some(start), Some(end)) = (report["t_us"].as_u64(), report["end_us"].as_u64()) else { return false };
    let passed = report["ok"] == true;
    changes.iter().enumerate().any(|(index, one)| {
        let over = changes.get(index + 1).map_or(u64::MAX, |next| next.settled_us);
        one.begun_us <= end && over >= start && (one.version == denying) != passed
    })
}

/// Longest time from writing a version to its being in force; a version overtaken by the next is as good.
pub fn lag_us(changes: &[Applied], written: &[(u64, bool)], denying: &str) -> Option<u64> {
    let state_at = |time: u64| changes.iter().rev().find(|one| one.begun_us <= time).map(|one| one.version == denying);
    let mut longest = 0;
    for (time, deny) in written {
        if state_at(*time) == Some(*deny) {
            continue;
        }
        let applied = changes.iter().find(|one| one.begun_us > *time && (one.version == denying) == *deny);
        longest = longest.max(applied?.begun_us - time);
    }
    Some(longest)
}

/// The world: `shop/web` may always, `shop/other` never, `shop/flip` by the flipping policy.
pub fn world() -> String {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::client("shop", "flip", 1));
    for name in BACKENDS {
        objects.push_str(&scenario::server("shop", name, "flux", 2));
    }
    objects.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: flux, namespace: shop}\nspec: {ports: [{name: http, port: 80, targetPort: 8080}]}\n",
    );
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";
    objects.push_str(&scenario::authorization("shop", "never", "flux", "DENY", rules));
    objects
}

/// Addresses of the backends, once a denying and an allowing version have been in force and the Service answers; and the
/// denying version.
pub fn begin(lab: &Lab) -> anyhow::Result<(Vec<(String, String)>, String)> {
    let addresses: Vec<(String, String)> = BACKENDS
        .into_iter()
        .map(|pod| anyhow::Ok((pod.to_owned(), lab.pod_ip("shop", pod)?)))
        .collect::<anyhow::Result<_>>()?;
    endpoints(lab, &addresses, &[true; 3])?;
    flip(lab, true)?;
    let denying = newest(lab, 0)?;
    flip(lab, false)?;
    let allowing = newest(lab, 1)?;
    anyhow::ensure!(denying != allowing, "two versions of the policy have one name: {denying}");
    eventually("the Service answers", scenario::PATIENCE, || {
        let report = scenario::call(lab, "shop/web", "http://flux.shop/")?;
        if report["ok"] == true { Ok(()) } else { Err(anyhow::anyhow!("{report}")) }
    })?;
    Ok((addresses, denying))
}

/// What the three clients saw, judged.
///
/// # Errors
/// The first wrong verdict.
pub fn judge(
    allowed: &[Value],
    denied: &[Value],
    flipping: &[Value],
    changes: &[Applied],
    denying: &str,
) -> anyhow::Result<()> {
    scenario::all_well(allowed, 1)?;
    let passed: Vec<_> = denied.iter().filter(|report| report["ok"] == true).collect();
    anyhow::ensure!(
        passed.is_empty(),
        "{} of {} denied requests passed: {:?}",
        passed.len(),
        denied.len(),
        passed.first()
    );
    let unjust: Vec<_> = flipping.iter().filter(|report| !is_justified(changes, denying, report)).collect();
    anyhow::ensure!(
        unjust.is_empty(),
        "{} of {} verdicts are of no version in force, such as {:?}",
        unjust.len(),
        flipping.len(),
        unjust.first()
    );
    Ok(())
}

/// The slowest answer of all, milliseconds.
pub fn slowest_ms<'a>(reports: impl IntoIterator<Item = &'a Value>) -> f64 {
    reports.into_iter().filter_map(|report| report["ms"].as_f64()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Applied;
    use super::is_justified;

    #[test]
    fn a_verdict_is_that_of_a_version_that_somebody_may_have_decided_by() {
        let applied = |begun_us, settled_us, version: &str| Applied { begun_us, settled_us, version: version.into() };
        // Allowed, denied between 100 and 110 at the earliest, allowed again between 200 and 230.
        let changes = [applied(10, 12, "allow"), applied(100, 110, "deny"), applied(200, 230, "allow")];
        let cases = [
            ((20, 90), true, true),
            ((20, 90), false, false),
            ((90, 100), false, true),
            ((105, 190), true, true),
            ((111, 190), true, false),
            ((111, 190), false, true),
            ((190, 199), true, false),
            ((190, 200), true, true),
            ((225, 240), false, true),
            ((231, 240), false, false),
            ((231, 240), true, true),
            ((1, 9), true, false),
        ];
        for ((start, end), passed, expected) in cases {
            let report = json!({"t_us": start, "end_us": end, "ok": passed});
            assert_eq!(is_justified(&changes, "deny", &report), expected, "{start} to {end}, passed: {passed}");
        }
        assert!(!is_justified(&changes, "deny", &json!({"ok": true})), "a report without times");
    }
}
