//! Promise: connections that began before capture live on and are counted, unless the operator or STRICT says reset.

use e2e::lab::LabConfig;
use e2e::scenario;

#[test]
fn old_connections_live_on_and_are_counted() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(false))) else { return Ok(()) };
    let held = scenario::hold(&lab, "shop/web")?;
    lab.apply_yaml(&scenario::namespace("shop", true))?;
    let status = scenario::pod_status(&lab, "node-2", "cart")?;
    assert!(status["preexisting"].as_u64() >= Some(1), "the old connection is counted: {status}");
    let report = held.finish()?;
    assert_eq!(report["ok"], true, "the old connection lived to its own end: {report}");
    Ok(())
}

#[test]
fn reset_ends_old_connections() -> anyhow::Result<()> {
    let config = LabConfig::of(&scenario::world(false)).env("ztunnel", "TULLE_PREEXISTING", "reset");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let mut held = scenario::hold(&lab, "shop/web")?;
    lab.apply_yaml(&scenario::namespace("shop", true))?;
    let report = held.report()?;
    assert_eq!(report["ok"], false, "the old connection is reset: {report}");
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--count", "5"])?, 5)?;
    Ok(())
}

#[test]
fn strict_ends_old_plaintext_connections_whatever_the_setting() -> anyhow::Result<()> {
    let mut objects = scenario::world(false);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let mut held = scenario::hold(&lab, "shop/web")?;
    lab.apply_yaml(&scenario::namespace("shop", true))?;
    let report = held.report()?;
    assert_eq!(report["ok"], false, "plaintext does not outlive STRICT: {report}");
    Ok(())
}
