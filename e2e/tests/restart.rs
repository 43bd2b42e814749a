//! Promise: a killed proxy takes down only what runs through it, fails closed while it is gone, and serves again soon
//! after its return (how soon is printed, as the machine has a part in it); without control it says what it waits for and
//! recovers by itself.

use std::time::Duration;
use std::time::Instant;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

fn world() -> String {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::server("shop", "near", "near", 1));
    objects.push_str(&scenario::service("shop", "near"));
    objects
}

fn reaches(lab: &Lab, url: &str) -> anyhow::Result<bool> {
    let reports = scenario::calls(lab, "shop/web", url, &["--timeout-ms", "1000"])?;
    Ok(reports.iter().all(|report| report["ok"] == true))
}

#[test]
fn a_killed_proxy_fails_closed_and_serves_again_on_its_return() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return Ok(()) };
    let near = lab.load("shop/web", &["http://near.shop/"], 50.0, &["--keep-alive"])?;
    lab.kill("node-2", "KILL")?;
    assert!(!reaches(&lab, "http://cart.shop/")?, "a captured pod without its proxy is closed");
    let ip = lab.pod_ip("shop", "cart")?;
    let guest = scenario::calls(&lab, "plain/guest", &format!("http://{ip}:8080/"), &["--timeout-ms", "1000"])?;
    assert_ne!(guest[0]["ok"], true, "also for plaintext: {guest:?}");

    lab.restart("node-2")?;
    let began = Instant::now();
    eventually("node-2 serves again", scenario::PATIENCE, || match reaches(&lab, "http://cart.shop/") {
        Ok(true) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    println!("it served {:?} after its return", began.elapsed());
    scenario::all_well(&near.finish()?, 20)?;
    Ok(())
}

#[test]
fn a_proxy_that_starts_without_control_waits_closed_and_recovers() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return Ok(()) };
    lab.kill("control", "KILL")?;
    lab.kill("node-2", "KILL")?;
    lab.restart("node-2")?;
    let pending = eventually("node-2 answers and is not ready", scenario::PATIENCE, || {
        let status = lab.node_admin("node-2", "/status")?;
        if status["ready"] == false { Ok(status["pending"].clone()) } else { Err(anyhow::anyhow!("{status}")) }
    })?;
    assert!(pending.to_string().contains("control"), "readiness says what is waited for: {pending}");
    let (code, body) = lab.get("node-2", 15021, "/healthz/ready")?;
    assert_eq!(code, 500, "{body}");
    assert!(!reaches(&lab, "http://cart.shop/")?, "its pods are closed");

    lab.restart("control")?;
    eventually("node-2 recovers by itself", Duration::from_secs(60), || match reaches(&lab, "http://cart.shop/") {
        Ok(true) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    Ok(())
}
