//! Promise: certificates are renewed at half their life, and no request notices.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

fn not_after(lab: &Lab) -> anyhow::Result<i64> {
    let status = lab.node_admin("node-2", "/status")?;
    let certificates = status["certificates"].as_array().cloned().unwrap_or_default();
    let of_cart = certificates.iter().find(|it| it["identity"] == "spiffe://cluster.local/ns/shop/sa/cart");
    of_cart
        .and_then(|it| it["notAfter"].as_i64())
        .filter(|time| *time > 0)
        .ok_or_else(|| anyhow::anyhow!("no certificate: {status}"))
}

#[test]
fn short_certificates_are_renewed_under_load_without_a_failure() -> anyhow::Result<()> {
    let config = LabConfig::of(&scenario::world(true)).env("ztunnel", "SECRET_TTL", "60s");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let first = not_after(&lab)?;
    let kept = lab.load("shop/web", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;
    eventually("the certificate is renewed", Duration::from_secs(60), || match not_after(&lab) {
        Ok(now) if now > first => Ok(()),
        Ok(now) => Err(format!("it is valid until {now}, as before")),
        Err(error) => Err(error.to_string()),
    })?;
    scenario::all_well(&scenario::calls(&lab, "shop/other", "http://cart.shop/", &["--count", "10"])?, 10)?;
    scenario::all_well(&kept.finish()?, 20)?;
    scenario::all_well(&fresh.finish()?, 40)?;
    Ok(())
}
