//! Promise: policies decide by proven identity, DENY before ALLOW, and every denial names its policy and rule.

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

const WEB: &str = "cluster.local/ns/shop/sa/web";
const OTHER: &str = "cluster.local/ns/shop/sa/other";

fn may(lab: &Lab, from: &str) -> anyhow::Result<bool> {
    Ok(scenario::call(lab, from, "http://cart.shop/")?["ok"] == true)
}

#[test]
fn allow_and_deny_decide_by_identity_and_name_themselves() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "without a policy {from} is let in");
    }

    let rules = format!("[{{from: [{{source: {{principals: ['{WEB}']}}}}]}}]");
    lab.apply_yaml(&scenario::authorization("shop", "only-web", "cart", "ALLOW", &rules))?;
    assert!(may(&lab, "shop/web")?, "the allowed identity is let in");
    assert!(!may(&lab, "shop/other")?, "another identity is not");
    assert!(!may(&lab, "plain/guest")?, "nor somebody without one");
    let line = scenario::await_log(&lab, "node-2", &["NOT_ALLOWED", "sa/other"])?;
    assert!(line.contains("only-web") || line.contains("no ALLOW"), "the denial says why: {line}");

    let rules = format!(
        "[{{from: [{{source: {{principals: ['{OTHER}']}}}}]}}, {{from: [{{source: {{principals: ['{WEB}']}}}}], to: [{{operation: {{ports: ['9000']}}}}]}}]"
    );
    lab.apply_yaml(&scenario::authorization("shop", "no-ledger", "cart", "DENY", &rules))?;
    assert!(may(&lab, "shop/web")?, "the DENY is about another port");
    let raw = lab.exec("shop/web", &["shop", "tcp", "cart.shop:9000", "--json"])?;
    assert!(!raw.status.success(), "DENY wins over ALLOW");
    scenario::await_log(&lab, "node-2", &["POLICY_DENIED", "shop/no-ledger", "rule=1", "sa/web"])?;

    lab.delete("AuthorizationPolicy", "shop/no-ledger")?;
    lab.delete("AuthorizationPolicy", "shop/only-web")?;
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "after the policies are gone {from} is let in again");
    }
    Ok(())
}

#[test]
fn explain_says_what_the_traffic_shows() -> anyhow::Result<()> {
    let rules = format!("[{{from: [{{source: {{principals: ['{WEB}']}}}}]}}]");
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::authorization("shop", "only-web", "cart", "ALLOW", &rules));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    for (from, expected) in [("shop/web", true), ("shop/other", false)] {
        assert_eq!(may(&lab, from)?, expected, "{from}");
        let explained = lab.control_get(&format!("/debug/explain?from={from}&to=shop/cart:80"))?;
        let verdict = if expected { "allowed" } else { "denied" };
        assert_eq!(explained["verdict"], verdict, "{from}: {explained}");
    }
    Ok(())
}
