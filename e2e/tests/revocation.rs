//! Promise: a certificate that was taken back opens nothing any more, and what it had open is cut by who was shown it.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;

const PATIENCE: Duration = Duration::from_secs(30);

/// Serial number of an account's certificate, as its node holds it.
fn serial(lab: &Lab, node: &str, account: &str) -> Result<String, String> {
    let status = lab.node_admin(node, "/status").map_err(|error| error.to_string())?;
    let certificates = status["certificates"].as_array().cloned().unwrap_or_default();
    let own = certificates.iter().find(|held| held["identity"].as_str().is_some_and(|id| id.ends_with(account)));
    let serial = own.and_then(|held| held["serial"].as_str()).filter(|serial| !serial.is_empty());
    serial.map(str::to_owned).ok_or_else(|| format!("{node} has no certificate of {account}: {status}"))
}

#[test]
fn tunnels_of_a_revoked_certificate_are_cut_and_its_node_goes_on_with_a_new_one() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--count", "3"])?, 3)?;
    let bystander = lab.load("shop/other", &["http://cart.shop/"], 20.0, &["--keep-alive"])?;
    let (mut kept, spared) = (scenario::hold(&lab, "shop/web")?, scenario::hold(&lab, "shop/other")?);
    let old = eventually("web has a certificate", PATIENCE, || serial(&lab, "node-1", "/sa/web"))?;

    let said = lab.exec_ok("control", &["control", "revoke", &old])?;
    anyhow::ensure!(said.contains("takes back 1"), "{said}");
    scenario::await_log(&lab, "node-2", &["CERT_REVOKED", &old, "inbound"])?;
    eventually("web has another certificate", PATIENCE, || {
        let now = serial(&lab, "node-1", "/sa/web")?;
        if now == old { Err(format!("still {now}")) } else { Ok(()) }
    })?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    let cut = kept.report()?;
    anyhow::ensure!(cut["ok"] == false, "a connection of the old certificate lived on: {cut}");
    let spared = spared.finish()?;
    anyhow::ensure!(spared["ok"] == true, "another account's connection lives: {spared}");
    // It may all be over before many of them were made.
    scenario::all_well(&bystander.finish()?, 1)
}

#[test]
fn clients_leave_a_server_whose_certificate_was_taken_back() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let mut kept = scenario::hold(&lab, "shop/web")?;
    let old = eventually("cart has a certificate", PATIENCE, || serial(&lab, "node-2", "/sa/cart"))?;
    lab.exec_ok("control", &["control", "revoke", &old])?;
    scenario::await_log(&lab, "node-1", &["CERT_REVOKED", &old, "outbound"])?;
    let cut = kept.report()?;
    anyhow::ensure!(cut["ok"] == false, "a connection to the old certificate lived on: {cut}");
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}

#[test]
fn a_list_that_cannot_be_read_changes_nothing_and_keeps_a_proxy_from_starting() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let list = lab.paths().ca().join("crl.pem");
    std::fs::write(&list, "serial 17, please")?;
    scenario::await_log(&lab, "node-1", &["the revocation lists cannot be used", "crl.pem"])?;
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--count", "3"])?, 3)?;
    lab.kill("node-1", "KILL")?;
    // Started it is, and ends by itself.
    lab.restart("node-1")?;
    scenario::await_log(&lab, "node-1", &["CRL_PATH cannot be used", "an empty one takes nothing back"])?;
    let silent = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
    anyhow::ensure!(silent["ok"] == false, "a proxy serves that does not know whom to refuse: {silent}");
    std::fs::write(&list, "")?;
    lab.restart("node-1")?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}

/// Serial numbers of control's own certificates, by its log, the newest last.
fn of_control(lab: &Lab) -> Vec<String> {
    let log = lab.log("control");
    let lines = log.lines().filter(|line| line.contains("control's own certificate"));
    let serial = |line: &str| {
        let rest = line.split("serial=").nth(1)?;
        Some(rest.chars().filter(|c| *c != '"').take_while(char::is_ascii_hexdigit).collect::<String>())
    };
    lines.filter_map(serial).filter(|serial| !serial.is_empty()).collect()
}

#[test]
fn nodes_leave_a_control_whose_certificate_was_taken_back_and_find_it_with_a_new_one() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let kept = scenario::hold(&lab, "shop/web")?;
    let before = of_control(&lab);
    let old = before.last().ok_or_else(|| anyhow::anyhow!("control does not tell its certificate"))?;
    lab.exec_ok("control", &["control", "revoke", old])?;
    for node in ["node-1", "node-2"] {
        scenario::await_log(&lab, node, &["the connection to control is cut", old])?;
    }
    eventually("control has another certificate", PATIENCE, || {
        let now = of_control(&lab);
        if now.last() == Some(old) { Err(anyhow::anyhow!("still {now:?}")) } else { Ok(()) }
    })?;
    // Answered, acknowledged and in force on both nodes.
    lab.apply_yaml(&scenario::server("shop", "late", "late", 2))?;
    let kept = kept.finish()?;
    anyhow::ensure!(kept["ok"] == true, "a connection of a pod lives: {kept}");
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}
