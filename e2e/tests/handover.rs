//! Promise: a node's proxy is replaced while clients open connections all the time, and nobody is refused, reset or lost;
//! what was open goes on in the old process until it ends, and policy still reaches it there.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Load;
use e2e::scenario;
use serde_json::Value;

const REPLACED: usize = 3;

/// The usual world under STRICT, and another pod in a namespace that takes plaintext.
fn world() -> String {
    let mut text = scenario::world(true);
    text.push_str(&scenario::peer_authentication("shop", "STRICT"));
    text.push_str(&scenario::namespace("open", true));
    text.push_str(&scenario::server("open", "desk", "desk", 2));
    text.push_str(&scenario::service("open", "desk"));
    text
}

fn config(drain: &str) -> LabConfig {
    LabConfig::of(&world()).env("ztunnel", "CONNECTION_TERMINATION_DEADLINE", drain)
}

/// Ends the load: nothing failed.
fn well(load: Load, least: usize) -> anyhow::Result<usize> {
    let reports = load.finish()?;
    scenario::all_well(&reports, least)?;
    Ok(reports.len())
}

fn pid(lab: &Lab, node: &str) -> anyhow::Result<Value> {
    Ok(lab.node_admin(node, "/status")?["pid"].clone())
}

#[test]
fn replacing_a_proxy_again_and_again_costs_no_connection() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(config("120s")) else { return Ok(()) };
    let held = scenario::hold(&lab, "shop/web")?;
    // A connection and a look-up for each request: through tunnels, and plaintext from outside the mesh.
    let url = format!("http://{}:8080/", lab.pod_ip("open", "desk")?);
    let meshed = scenario::strict_load(&lab, "shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 100.0, &[])?;
    let plain = scenario::strict_load(&lab, "plain/guest", &[&url], 50.0, &[])?;
    let kept = scenario::strict_load(&lab, "shop/other", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let first = pid(&lab, "node-2")?;
    for round in 0..REPLACED {
        lab.replace("node-2")?;
        lab.replace("node-1")?;
        if round == 0 {
            let status = lab.node_admin("node-2", "/status")?;
            assert_ne!(status["pid"], first);
            eventually("the new process knows what the old one still carries", scenario::PATIENCE, || {
                let draining = lab.node_admin("node-2", "/status")?["draining"].clone();
                let carries = draining[0]["pid"] == first && draining[0]["inboundConnections"].as_u64() >= Some(1);
                if carries { Ok(()) } else { Err(anyhow::anyhow!("{draining}")) }
            })?;
        }
        // Some traffic with this one alone.
        std::thread::sleep(Duration::from_secs(1));
    }
    println!("{} requests through tunnels", well(meshed, 300)?);
    println!("{} in plaintext, {} on kept connections", well(plain, 150)?, well(kept, 60)?);
    let ended = held.finish()?;
    assert_eq!(ended["ok"], true, "a connection from before the first replacement lived through all of them: {ended}");
    for node in ["node-1", "node-2"] {
        let log = lab.log(node);
        let taken = log.matches("got the listeners of the process before this one").count();
        assert_eq!(taken, REPLACED, "every one took the listeners over, or this proves nothing");
        assert!(!log.contains("opening fresh ones") && !log.contains("not everything is as it should be"), "{log}");
        // The connections of the old processes were not taken for strangers.
        let status = lab.node_admin(node, "/status")?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        assert!(!pods.is_empty() && pods.iter().all(|pod| pod["preexisting"] == 0), "{status}");
        eventually("the replaced processes have ended", scenario::PATIENCE, || {
            let ended = lab.log(node).matches(" drained").count();
            if ended >= REPLACED { Ok(()) } else { Err(format!("{ended} of {REPLACED}")) }
        })?;
    }
    Ok(())
}

#[test]
fn a_successor_that_dies_before_it_is_ready_changes_nothing() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(config("30s")) else { return Ok(()) };
    // Without control it never knows the mesh, and waits.
    lab.kill("control", "KILL")?;
    let before = pid(&lab, "node-2")?;
    let running = scenario::strict_load(&lab, "shop/web", &["http://cart.shop/"], 50.0, &[])?;
    lab.begin_replacing("node-2")?;
    scenario::await_log(&lab, "node-2", &["got the listeners of the process before this one"])?;
    assert_eq!(pid(&lab, "node-2")?, before, "it waits for control");
    lab.kill("node-2", "KILL")?;
    scenario::await_log(&lab, "node-2", &["a successor left before it was ready"])?;
    assert_eq!(pid(&lab, "node-2")?, before, "the process from before serves");
    std::thread::sleep(Duration::from_secs(1));
    well(running, 40)?;

    // The next one finds it, too.
    lab.restart("control")?;
    lab.replace("node-2")?;
    assert_ne!(pid(&lab, "node-2")?, before);
    let after = scenario::calls(&lab, "shop/web", "http://cart.shop/", &[])?;
    scenario::all_well(&after, 1)
}

#[test]
fn policy_reaches_connections_that_a_replaced_proxy_still_carries() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(config("120s")) else { return Ok(()) };
    let mut web = scenario::hold(&lab, "shop/web")?;
    let other = scenario::hold(&lab, "shop/other")?;
    lab.replace("node-2")?;
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/web']}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "not-web", "cart", "DENY", rules))?;
    let cut = web.report()?;
    assert_eq!(cut["ok"], false, "the forbidden connection ends: {cut}");
    scenario::await_log(&lab, "node-2", &["POLICY_CHANGED", "shop/not-web"])?;
    let refused = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
    assert_eq!(refused["ok"], false, "the new process knows the policy: {refused}");
    let spared = other.finish()?;
    assert_eq!(spared["ok"], true, "another identity's connection lives: {spared}");
    Ok(())
}
