//! Promise: NetworkPolicies hold between pods of the mesh as they do in any cluster, and each denial names the policies
//! that isolate.

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// A NetworkPolicy; `spec` is YAML in flow style.
fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n"
    )
}

fn may(lab: &Lab, from: &str) -> anyhow::Result<bool> {
    Ok(scenario::call(lab, from, "http://cart.shop/")?["ok"] == true)
}

#[test]
fn the_frontend_may_reach_the_backend_and_others_may_not() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "without a policy {from} is let in");
    }
    let spec = "{podSelector: {matchLabels: {app: cart}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], \
                ports: [{port: 8080}]}]}";
    lab.apply_yaml(&policy("shop", "backend", spec))?;
    for (from, expected) in [("shop/web", true), ("shop/other", false), ("plain/guest", false)] {
        assert_eq!(may(&lab, from)?, expected, "{from}");
    }
    scenario::await_log(
        &lab,
        "node-2",
        &["NETWORK_POLICY_INGRESS", "policy=\"NetworkPolicy/shop/backend\"", "sa/other"],
    )?;
    let raw = lab.exec("shop/web", &["shop", "tcp", "cart.shop:9000", "--json"])?;
    assert!(!raw.status.success(), "another port is closed to the frontend as well");
    lab.delete("NetworkPolicy", "shop/backend")?;
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "after the policy is gone {from} is let in again");
    }
    Ok(())
}
