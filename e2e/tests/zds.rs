//! Promise: under an Istio CNI agent, which hands the pods over and installs the redirect rules, a pod's traffic is what
//! it is under our own rules: mutual TLS both ways, both identities known, names answered, policy in force.

use std::time::Duration;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// The usual world on nodes whose pods an agent hands over.
fn handed(world: &str) -> Option<Lab> {
    let mut config = LabConfig::of(world);
    config.handed.extend(["node-1".to_owned(), "node-2".to_owned()]);
    scenario::lab(config)
}

#[test]
fn traffic_of_pods_that_an_agent_handed_over_is_mutual_tls_both_ways() -> anyhow::Result<()> {
    let world = scenario::world(true)
        + &scenario::server("shop", "front", "front", 1)
        + &scenario::service("shop", "front")
        + &scenario::client("shop", "back", 2);
    let Some(lab) = handed(&world) else { return Ok(()) };
    let word = scenario::marker();
    let sniffer = lab.sniff("node-2", &[&word])?;
    for (from, to, node, client) in [("shop/web", "cart", "node-2", "web"), ("shop/back", "front", "node-1", "back")] {
        let url = format!("http://{to}.shop/");
        scenario::all_well(&scenario::calls(&lab, from, &url, &["--data", &word, "--count", "10"])?, 10)?;
        let identities = [client, to].map(|account| format!("spiffe://cluster.local/ns/shop/sa/{account}"));
        let words = [identities[0].as_str(), identities[1].as_str(), "direction=\"inbound\""];
        scenario::await_log(&lab, node, &words)?;
    }
    let seen = sniffer.finish()?;
    assert_eq!(seen.markers[&word], 0, "{seen:?}");
    assert!(seen.tls.encrypted_bytes >= 20 * 2 * word.len() as u64, "the payload crossed: {seen:?}");
    // The rules are the agent's, and a probe went through them.
    for node in ["node-1", "node-2"] {
        eventually("every pod is proven to be captured", Duration::from_secs(20), || {
            let status = lab.node_admin(node, "/status")?;
            let pods = status["pods"].as_array().context("no pods")?;
            let all = pods.len() >= 2 && pods.iter().all(|pod| pod["capture"] == "Captured");
            anyhow::ensure!(all, "{status}");
            Ok(())
        })?;
    }
    let rules = lab.exec_ok("shop/cart", &["nft", "list", "ruleset"])?;
    assert!(!rules.contains("table inet tulle "), "redirects are the agent's business:\n{rules}");
    Ok(())
}

#[test]
fn policy_holds_and_a_new_proxy_takes_the_node_over() -> anyhow::Result<()> {
    let Some(lab) = handed(&scenario::world(true)) else { return Ok(()) };
    let deny = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "no-other", "cart", "DENY", deny))?;
    let allowed = |lab: &Lab| scenario::all_well(&scenario::calls(lab, "shop/web", "http://cart.shop/", &[])?, 1);
    let denied = |lab: &Lab| -> anyhow::Result<()> {
        let reports = scenario::calls(lab, "shop/other", "http://cart.shop/", &[])?;
        anyhow::ensure!(scenario::all_well(&reports, 1).is_err(), "it must be refused: {reports:?}");
        Ok(())
    };
    allowed(&lab)?;
    denied(&lab)?;
    scenario::await_log(&lab, "node-2", &["POLICY_DENIED", "shop/no-other"])?;
    // A restart begins with nothing but what the agent says.
    lab.kill("node-2", "KILL")?;
    lab.restart("node-2")?;
    let missing = lab.settle(scenario::PATIENCE, &mut |_| {})?;
    anyhow::ensure!(missing.is_empty(), "{missing:?}");
    allowed(&lab)?;
    denied(&lab)?;
    lab.replace("node-2")?;
    allowed(&lab)?;
    denied(&lab)?;
    Ok(())
}
