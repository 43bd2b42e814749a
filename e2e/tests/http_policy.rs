//! Promise: an AuthorizationPolicy with HTTP fields decides each request at its destination, by the proven identity, and
//! bytes that are not HTTP do not get past it. A rate limit on a route counts for each identity, or for all of a node's pods.

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

/// Two limits of two requests an hour each: one for each identity, one for all.
const LIMITS: &str = "
apiVersion: tulle.dev/v1alpha1
kind: HTTPRateLimit
metadata: {name: each, namespace: shop}
spec: {requests: 2, interval: 1h, per: Identity}
---
apiVersion: tulle.dev/v1alpha1
kind: HTTPRateLimit
metadata: {name: all, namespace: shop}
spec: {requests: 2, interval: 1h}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, port: 80}]
  rules:
  - matches: [{path: {value: /each}}]
    filters: [{type: ExtensionRef, extensionRef: {group: tulle.dev, kind: HTTPRateLimit, name: each}}]
    backendRefs: [{name: cart, port: 80}]
  - matches: [{path: {value: /all}}]
    filters: [{type: ExtensionRef, extensionRef: {group: tulle.dev, kind: HTTPRateLimit, name: all}}]
    backendRefs: [{name: cart, port: 80}]
  - backendRefs: [{name: cart, port: 80}]
";

#[test]
fn a_rate_limit_counts_for_each_identity_or_for_all_of_the_node() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    lab.apply_yaml(LIMITS)?;
    let statuses = |from: &str, path: &str| -> anyhow::Result<Vec<serde_json::Value>> {
        // A connection for each: whichever worker it is on, the count is the same.
        let reports = scenario::calls(&lab, from, &format!("http://cart.shop{path}"), &["--count", "4"])?;
        Ok(reports.iter().map(|report| report["status"].clone()).collect())
    };
    for (from, path, expected) in [
        ("shop/web", "/each", [200, 200, 429, 429]),
        ("shop/other", "/each", [200, 200, 429, 429]),
        ("shop/web", "/all", [200, 200, 429, 429]),
        ("shop/other", "/all", [429; 4]),
        ("shop/web", "/open", [200; 4]),
    ] {
        assert_eq!(statuses(from, path)?, expected, "{from} {path}");
    }
    let served = scenario::log_lines(&lab, "shop/cart", &["\"kind\":\"http\"", "\"path\":\"/each"]).len();
    assert_eq!(served, 4, "by the server's own log");
    let asked = "exec 3<>/dev/tcp/cart.shop/80 && printf 'GET /all HTTP/1.1\\r\\nHost: cart.shop\\r\\nConnection: close\\r\\n\\r\\n' >&3 && cat <&3";
    let output = lab.exec("shop/web", &["bash", "-c", asked])?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    let after = answer.lines().find_map(|line| line.strip_prefix("retry-after: ")?.parse::<u32>().ok());
    assert!(after.is_some_and(|seconds| (1..=3600).contains(&seconds)), "{answer}");
    scenario::await_log(&lab, "node-1", &["request complete", "status=429", "flags=\"RL\"", "RATE_LIMITED"])?;
    Ok(())
}
