//! Promise: a policy that is only tried changes no verdict, and everything says what it would have done.

use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::json;

#[test]
fn a_dry_run_is_told_by_log_metric_and_explain() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/web']}}]}]";
    let policy = scenario::authorization("shop", "tried", "cart", "DENY", rules)
        .replace("{name: tried,", "{name: tried, annotations: {istio.io/dry-run: 'true'},");
    lab.apply_yaml(&policy)?;
    for (from, said) in [("shop/web", true), ("shop/other", false)] {
        let report = scenario::call(&lab, from, "http://cart.shop/")?;
        assert_eq!(report["ok"], true, "it has no effect on {from}: {report}");
        let path = format!("/debug/explain?from={from}&to=shop/cart:80");
        let explained = lab.control_get(&path)?;
        let expected = if said { json!(["shop/tried denied by rules[0]"]) } else { json!([]) };
        assert_eq!(explained["endpoints"][0]["inbound"]["dryRun"], expected, "{explained}");
        assert_eq!(explained["endpoints"][0]["inbound"]["allowed"], true, "{explained}");
    }
    let line =
        scenario::await_log(&lab, "node-2", &["connection complete", "dry_run", "shop/tried denied by rules[0]"])?;
    assert!(line.contains("sa/web"), "{line}");
    let (_, metrics) = lab.get("node-2", 15020, "/metrics")?;
    let counted = "tulle_dry_run_total{policy=\"shop/tried\",would_be=\"denied\",rule=\"0\"} 1";
    assert!(metrics.contains(counted), "{metrics}");
    Ok(())
}
