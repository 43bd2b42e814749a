//! Promise: an AuthorizationPolicy with HTTP fields decides each request at its destination, by the proven identity, and
//! bytes that are not HTTP do not get past it.

use e2e::lab::LabConfig;
use e2e::scenario;

#[test]
fn paths_and_methods_are_decided_for_each_request() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let status = |from: &str, path: &str, more: &[&str]| -> anyhow::Result<serde_json::Value> {
        let reports = scenario::calls(&lab, from, &format!("http://cart.shop{path}"), more)?;
        Ok(reports.last().map(|report| report["status"].clone()).unwrap_or_default())
    };
    assert_eq!(status("shop/web", "/secret", &[])?, 200, "without a policy");
    let rules = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}], to: [{operation: {methods: [GET], paths: [/open, /open/*]}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "open", "cart", "ALLOW", rules))?;
    for (from, path, more, expected) in [
        ("shop/web", "/open", &["--count", "3", "--keep-alive"][..], 200),
        ("shop/web", "/open/a?b=c", &[], 200),
        ("shop/web", "/secret", &[], 403),
        ("shop/web", "/open/../secret", &[], 403),
        ("shop/web", "/open/%2e%2e/secret", &[], 403),
        ("shop/web", "/open", &["--data", "a body makes it a POST"], 403),
        ("shop/other", "/open", &[], 403),
        ("plain/guest", "/open", &[], 403),
    ] {
        assert_eq!(status(from, path, more)?, expected, "{from} {path} {more:?}");
    }
    scenario::await_log(&lab, "node-2", &["request complete", "status=403", "shop/open", "/secret"])?;
    let raw = lab.exec("shop/web", &["shop", "tcp", "cart.shop:9000", "--json"])?;
    let reports = scenario::json_lines(&raw.stdout);
    assert!(reports.iter().all(|report| report["ok"] != true), "raw TCP gets past a policy of requests: {reports:?}");
    lab.delete("AuthorizationPolicy", "shop/open")?;
    assert_eq!(status("plain/guest", "/secret", &[])?, 200);
    Ok(())
}
