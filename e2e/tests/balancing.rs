//! Promise: connections to a Service spread over its ready endpoints, on whatever node they are, and follow changes.

use std::collections::BTreeMap;

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

fn spread(lab: &Lab, count: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let reports = scenario::calls(lab, "shop/web", "http://many.shop/", &["--count", &count.to_string()])?;
    scenario::all_well(&reports, count)?;
    let mut pods = BTreeMap::new();
    for report in reports {
        *pods.entry(report["pod"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok(pods)
}

#[test]
fn connections_spread_over_ready_endpoints() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 1), ("c", 2), ("d", 2)] {
        objects.push_str(&scenario::server("shop", name, "many", node));
    }
    objects.push_str(&scenario::service("shop", "many"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let seen = spread(&lab, 400)?;
    assert_eq!(seen.len(), 4, "{seen:?}");
    // A fair choice of 4 gives each 100 of 400 with a deviation of 9; 60 is more than four deviations away.
    assert!(seen.values().all(|count| (60..=140).contains(count)), "{seen:?}");

    lab.delete("Pod", "shop/b")?;
    lab.delete("Pod", "shop/d")?;
    let seen = spread(&lab, 100)?;
    assert_eq!(seen.keys().map(String::as_str).collect::<Vec<_>>(), ["a", "c"], "removed endpoints get nothing");

    lab.delete("Pod", "shop/a")?;
    lab.delete("Pod", "shop/c")?;
    let report = scenario::call(&lab, "shop/web", "http://many.shop/")?;
    assert_ne!(report["ok"], true, "no endpoint, no answer: {report}");
    scenario::await_log(&lab, "node-1", &["NO_ENDPOINT"])?;
    Ok(())
}
