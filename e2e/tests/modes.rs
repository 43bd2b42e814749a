//! Promise: PERMISSIVE takes plaintext from outside the mesh, STRICT refuses it and says so, and neither touches mutual
//! TLS.

use e2e::lab::LabConfig;
use e2e::scenario;

#[test]
fn strict_refuses_plaintext_and_permissive_takes_it() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let ok = |from: &str| anyhow::Ok(scenario::call(&lab, from, "http://cart.shop/")?["ok"] == true);
    assert!(ok("plain/guest")?, "PERMISSIVE is the default");
    for (mode, expected) in [("STRICT", false), ("PERMISSIVE", true), ("STRICT", false)] {
        lab.apply_yaml(&scenario::peer_authentication("shop", mode))?;
        assert_eq!(ok("plain/guest")?, expected, "plaintext under {mode}");
        assert!(ok("shop/web")?, "mutual TLS under {mode}");
    }
    scenario::await_log(&lab, "node-2", &["MTLS_REQUIRED"])?;
    let ip = lab.pod_ip("shop", "cart")?;
    let direct = scenario::call(&lab, "plain/guest", &format!("http://{ip}:8080/"))?;
    assert_ne!(direct["ok"], true, "nor past the Service: {direct}");
    lab.delete("PeerAuthentication", "shop/default")?;
    assert!(ok("plain/guest")?, "back to the default");
    Ok(())
}
