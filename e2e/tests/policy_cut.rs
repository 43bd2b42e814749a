//! Promise: a policy change cuts the live connections that it forbids, with a reason, and no others.

use std::time::Instant;

use e2e::lab::LabConfig;
use e2e::scenario;
use e2e::scenario::hold;

#[test]
fn a_new_policy_cuts_what_it_forbids_and_nothing_else() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let mut web = hold(&lab, "shop/web")?;
    let other = hold(&lab, "shop/other")?;
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/web']}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "not-web", "cart", "DENY", rules))?;
    let began = Instant::now();
    let cut = web.report()?;
    assert_eq!(cut["ok"], false, "the forbidden connection ends: {cut}");
    assert!(began.elapsed() < scenario::PATIENCE);
    scenario::await_log(&lab, "node-2", &["POLICY_CHANGED", "shop/not-web"])?;
    let spared = other.finish()?;
    assert_eq!(spared["ok"], true, "another identity's connection lives: {spared}");
    Ok(())
}

#[test]
fn strict_cuts_live_plaintext() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let mut guest = hold(&lab, "plain/guest")?;
    let web = hold(&lab, "shop/web")?;
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    let cut = guest.report()?;
    assert_eq!(cut["ok"], false, "plaintext ends: {cut}");
    assert_eq!(web.finish()?["ok"], true, "mutual TLS lives");
    Ok(())
}
