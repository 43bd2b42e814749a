//! Promise: the root and the intermediate are replaced, and the trust domain is renamed, without a dropped connection.

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// `control rotate` beside the lab's control: what it printed, once the step is safe and done.
fn rotate(lab: &Lab, what: &str, more: &[&str]) -> anyhow::Result<String> {
    let mut argv = vec!["control", "rotate", what];
    argv.extend(more);
    let output = lab.exec("control", &argv)?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    anyhow::ensure!(output.status.success(), "{argv:?}: {text}");
    Ok(text)
}

fn step(lab: &Lab, expected: &str) -> anyhow::Result<()> {
    let text = rotate(lab, "root", &["--wait", "60s"])?;
    anyhow::ensure!(text.contains(expected), "{text}");
    Ok(())
}

/// A field of all certificates that the nodes hold.
fn of_certificates(lab: &Lab, field: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for node in ["node-1", "node-2"] {
        let status = lab.node_admin(node, "/status")?;
        for certificate in status["certificates"].as_array().into_iter().flatten() {
            all.insert(certificate[field].to_string());
        }
    }
    Ok(all)
}

fn words(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn root_and_intermediate_are_replaced_under_load_without_a_failure() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let old = lab.control_get("/debug/ca")?;
    let old_root = words(&old["roots"]);
    let kept = lab.load("shop/web", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;

    // The intermediate alone.
    let issuers = of_certificates(&lab, "issuer")?;
    rotate(&lab, "intermediate", &[])?;
    eventually("all certificates have the new issuer", PATIENCE, || {
        let now = of_certificates(&lab, "issuer").map_err(|error| error.to_string())?;
        if now.len() == 1 && now.is_disjoint(&issuers) { Ok(()) } else { Err(format!("{issuers:?} became {now:?}")) }
    })?;

    // The root.
    step(&lab, "step 1 of 3")?;
    let early = rotate(&lab, "root", &[]);
    anyhow::ensure!(early.is_err(), "the nodes cannot know the new root yet: {early:?}");
    step(&lab, "step 2 of 3")?;
    step(&lab, "step 3 of 3")?;
    let new = eventually("one root is left, another one, and every node has it alone", PATIENCE, || {
        let new = lab.control_get("/debug/ca").map_err(|error| error.to_string())?;
        let roots = of_certificates(&lab, "roots").map_err(|error| error.to_string())?;
        let expected = BTreeSet::from([new["roots"].to_string()]);
        let settled = new["rotation"] == "settled" && words(&new["roots"]).len() == 1;
        if settled && words(&new["roots"]) != old_root && roots == expected {
            return Ok(new);
        }
        Err(format!("control: {new}; the nodes' certificates: {roots:?}"))
    })?;
    anyhow::ensure!(new["intermediate"] != old["intermediate"], "{new}");

    scenario::all_well(&scenario::calls(&lab, "shop/other", "http://cart.shop/", &["--count", "10"])?, 10)?;
    scenario::all_well(&kept.finish()?, 5)?;
    scenario::all_well(&fresh.finish()?, 10)?;

    // A proxy that starts now has never known the old root.
    lab.kill("node-2", "KILL")?;
    lab.restart("node-2")?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}

#[test]
fn the_trust_domain_is_renamed_with_an_alias() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    let rules = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/web, new.example/ns/shop/sa/other]}}]}]";
    objects.push_str(&scenario::authorization("shop", "callers", "cart", "ALLOW", rules));
    let both = "new.example,cluster.local";
    let config = LabConfig::of(&objects).env("ztunnel", "TULLE_TRUST_DOMAIN_ALIASES", both).env(
        "control",
        "TULLE_CONTROL_TRUST_DOMAIN_ALIASES",
        "new.example",
    );
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let kept = lab.load("shop/web", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;
    lab.kill("control", "TERM")?;
    lab.restart_with(
        "control",
        None,
        &[("TULLE_CONTROL_TRUST_DOMAIN", "new.example"), ("TULLE_CONTROL_TRUST_DOMAIN_ALIASES", "cluster.local")],
    )?;
    eventually("all identities are of the new domain", PATIENCE, || {
        let identities = of_certificates(&lab, "identity").map_err(|error| error.to_string())?;
        let new = identities.iter().all(|identity| identity.contains("spiffe://new.example/"));
        if new && !identities.is_empty() { Ok(()) } else { Err(format!("{identities:?}")) }
    })?;
    scenario::all_well(&scenario::calls(&lab, "shop/other", "http://cart.shop/", &["--count", "10"])?, 10)?;
    scenario::all_well(&kept.finish()?, 5)?;
    scenario::all_well(&fresh.finish()?, 10)
}
