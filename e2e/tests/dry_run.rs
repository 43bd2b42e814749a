//! Promise: a policy that is only tried, or that only records (AUDIT), changes no verdict, and everything says what it would
//! have done, or what it has seen.

use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::{Value, json};

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
    audits(&lab)
}

/// Of connections first, then of requests, of which one is denied by another policy.
fn audits(lab: &Lab) -> anyhow::Result<()> {
    lab.delete("AuthorizationPolicy", "shop/tried")?;
    let by_web = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/web']}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "watched", "cart", "AUDIT", by_web))?;
    let seen = |from: &str, more: &str| -> anyhow::Result<Value> {
        let explained = lab.control_get(&format!("/debug/explain?from={from}&to=shop/cart:80{more}"))?;
        Ok(explained["endpoints"][0]["inbound"].clone())
    };
    for (from, expected) in [("shop/web", json!(["shop/watched audited by rules[0]"])), ("shop/other", json!([]))] {
        let report = scenario::call(lab, from, "http://cart.shop/")?;
        assert_eq!(report["ok"], true, "it has no effect on {from}: {report}");
        let inbound = seen(from, "")?;
        assert_eq!((&inbound["allowed"], &inbound["audit"]), (&json!(true), &expected), "{from}: {inbound}");
    }
    let words = ["connection complete", "direction=\"inbound\"", "audit=\"shop/watched audited by rules[0]\""];
    scenario::await_log(lab, "node-2", &words)?;

    let paths = "[{to: [{operation: {methods: [PUT]}}]}, {to: [{operation: {paths: ['/shelf/{*}/book/{**}']}}]}]";
    let deny = "[{to: [{operation: {paths: ['/shelf/1/book/denied']}}]}]";
    lab.apply_yaml(&format!(
        "{}{}",
        scenario::authorization("shop", "paths", "cart", "AUDIT", paths),
        scenario::authorization("shop", "closed", "cart", "DENY", deny)
    ))?;
    let (watched, by_path) = ("shop/watched audited by rules[0]", "shop/paths audited by rules[1]");
    for (path, status, expected) in [
        ("/shelf/1/book/2/3", 200, vec![by_path, watched]),
        ("/shelf/1/book", 200, vec![by_path, watched]),
        ("/shelf/1/2/book", 200, vec![watched]),
        ("/shelf//book", 200, vec![watched]),
        ("/shelf/1/book/denied", 403, vec![by_path, watched]),
    ] {
        let report = scenario::call(lab, "shop/web", &format!("http://cart.shop{path}"))?;
        assert_eq!(report["status"], status, "{path}: {report}");
        let inbound = seen("shop/web", &format!("&path={path}"))?;
        assert_eq!(inbound["audit"], json!(expected), "{path}: {inbound}");
        let audit = format!(" audit=\"{}\"", expected.join(", "));
        let path = format!(" path=\"{path}\"");
        scenario::await_log(lab, "node-2", &["request complete", "direction=\"inbound\"", &audit, &path])?;
    }
    let (_, metrics) = lab.get("node-2", 15020, "/metrics")?;
    for counted in ["{policy=\"shop/watched\",rule=\"0\"} 6", "{policy=\"shop/paths\",rule=\"1\"} 3"] {
        assert!(metrics.contains(&format!("tulle_audit_total{counted}")), "{counted}: {metrics}");
    }
    Ok(())
}
