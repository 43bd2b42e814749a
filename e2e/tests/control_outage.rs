//! Promise: with control dead, existing and new connections work and policies hold; when it returns, nodes reconnect
//! by themselves and changes take effect again.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::LabConfig;
use e2e::scenario;

/// The promise is 60 s; the short form keeps a run of all tests short. `TULLE_SLOW=1` takes the whole time.
fn outage() -> Duration {
    Duration::from_secs(if std::env::var_os("TULLE_SLOW").is_some() { 60 } else { 8 })
}

#[test]
fn the_data_plane_outlives_control() -> anyhow::Result<()> {
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::authorization("shop", "not-other", "cart", "DENY", rules));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let kept = lab.load("shop/web", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;
    let denied = lab.load("shop/other", &["http://cart.shop/"], 5.0, &[])?;
    lab.kill("control", "KILL")?;
    std::thread::sleep(outage());
    let least = outage().as_secs() as usize * 15;
    scenario::all_well(&kept.finish()?, least)?;
    scenario::all_well(&fresh.finish()?, least * 2)?;
    let denied = denied.finish()?;
    assert!(!denied.is_empty() && denied.iter().all(|report| report["ok"] != true), "a denial outlives control");

    lab.restart("control")?;
    eventually("both nodes are connected again", Duration::from_secs(60), || {
        let sync = lab.control_get("/debug/sync")?;
        let connected = ["node-1", "node-2"].iter().all(|node| sync["nodes"][*node]["connected"] == true);
        if connected { Ok(()) } else { Err(anyhow::anyhow!("{}", sync["nodes"])) }
    })?;
    lab.delete("AuthorizationPolicy", "shop/not-other")?;
    scenario::all_well(&scenario::calls(&lab, "shop/other", "http://cart.shop/", &[])?, 1)?;
    Ok(())
}
