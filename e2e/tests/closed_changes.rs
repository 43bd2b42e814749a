//! Promise: pods come into the mesh and leave it while pods of a closed namespace talk to them, or are those pods, and the fence drops
//! nothing that the proxy means to send; and what was open in a pod that left lives on when its proxy is replaced.
//!
//! A dropped SYN shows as a second that somebody waits, and a dropped look-up as five. No time is measured here: all packets of the pod
//! are counted before the fence and behind it, by rules that are not the fence's own.

use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// Of new connections, a second.
const RATE: f64 = 60.0;
/// The same where what may go wrong lasts for the time of one transaction.
const DENSE: f64 = 250.0;

fn namespace(name: &str, labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}

/// `shop` is closed; `open` is not, and its desk is on the other node.
fn world(mesh: bool) -> String {
    let mut text = scenario::world(true);
    text.push_str(&namespace("shop", "tulle.dev/mesh: enabled, tulle.dev/egress: deny"));
    text.push_str(&scenario::namespace("open", mesh));
    text.push_str(&scenario::server("open", "desk", "desk", 2));
    text.push_str(&scenario::service("open", "desk"));
    text
}

/// Begins to count what web sends, before the fence and behind it.
fn count(lab: &Lab) -> anyhow::Result<()> {
    let view = lab.view()?;
    let pod = view.pod("shop", "web").context("there is no web")?;
    let family = |ip: &String| if ip.contains(':') { "ip6" } else { "ip" };
    let each: String = pod.addresses.iter().map(|ip| format!("    {} saddr {ip} counter\n", family(ip))).collect();
    let chain = |name: &str, priority: i32| {
        format!("  chain {name} {{\n    type filter hook forward priority {priority}; policy accept;\n{each}  }}\n")
    };
    let rules = format!("table inet counted {{\n{}{}}}\n", chain("before", -1), chain("behind", 1));
    lab.exec_ok("node-1", &["sh", "-c", &format!("echo '{rules}' | PATH=$PATH:/usr/sbin nft -f -")]).map(drop)
}

/// Packets that came to the fence and packets that passed.
fn counted(lab: &Lab) -> anyhow::Result<(u64, u64)> {
    let text = lab.exec_ok("node-1", &["sh", "-c", "PATH=$PATH:/usr/sbin nft list table inet counted"])?;
    let (before, behind) = text.split_once("chain behind").context("no chain behind the fence")?;
    Ok((scenario::packets(before)?, scenario::packets(behind)?))
}

/// Fails unless all of what came has passed, and something came.
fn nothing_dropped(lab: &Lab, when: &str) -> anyhow::Result<()> {
    let (came, passed) = counted(lab)?;
    ensure!(came > 0, "nothing came to the fence, {when}");
    ensure!(came == passed, "of {came} packets {passed} passed, {when}");
    Ok(())
}

#[test]
fn whom_a_closed_pod_calls_joins_and_leaves() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world(false))) else { return Ok(()) };
    scenario::reaches(&lab, "shop/web", "http://desk.open/")?;
    count(&lab)?;
    let targets = ["http://desk.open/", "tcp://desk.open:9000"];
    let fresh = scenario::strict_load(&lab, "shop/web", &targets, RATE, &[])?;
    let held = scenario::hold_to(&lab, "shop/web", "desk.open:9000")?;
    for mesh in [true, false, true, false, true] {
        lab.apply_yaml(&scenario::namespace("open", mesh))?;
        // Some traffic in between: a fault may be in what an earlier change has left.
        std::thread::sleep(Duration::from_secs(1));
    }
    let (reports, ended) = (fresh.finish()?, held.finish()?);
    nothing_dropped(&lab, "while the desk came into the mesh and left it")?;
    scenario::all_well(&reports, 300)?;
    ensure!(ended["ok"] == true, "a connection from before the first change: {ended}");
    Ok(())
}

#[test]
fn a_closed_pod_leaves_the_mesh() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world(true))) else { return Ok(()) };
    scenario::reaches(&lab, "shop/web", "http://desk.open/")?;
    count(&lab)?;
    let fresh = scenario::strict_load(&lab, "shop/web", &["http://desk.open/", "tcp://cart.shop:9000"], DENSE, &[])?;
    std::thread::sleep(Duration::from_secs(1));
    lab.apply_yaml(&namespace("shop", "tulle.dev/mesh: disabled"))?;
    std::thread::sleep(Duration::from_secs(1));
    let reports = fresh.finish()?;
    nothing_dropped(&lab, "while the pod left the mesh")?;
    scenario::all_well(&reports, 200)
}

#[test]
fn what_was_open_in_a_pod_that_left_outlives_its_proxy() -> anyhow::Result<()> {
    let config = LabConfig::of(&world(true)).env("ztunnel", "CONNECTION_TERMINATION_DEADLINE", "120s");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let held = scenario::hold(&lab, "shop/web")?;
    lab.apply_yaml(&namespace("shop", "tulle.dev/mesh: disabled"))?;
    let left = scenario::pod_status(&lab, "node-1", "web")?;
    ensure!(left["capture"] == "Uncaptured" && left["outbound_connections"] == 1, "it still carries one: {left}");
    for node in ["node-1", "node-2"] {
        lab.replace(node)?;
        scenario::await_log(&lab, node, &["draining"])?;
    }
    // As long as something takes that ends everything at once.
    std::thread::sleep(Duration::from_secs(2));
    let ended = held.finish()?;
    ensure!(ended["ok"] == true, "a connection that a replaced proxy carries for a pod that left: {ended}");
    Ok(())
}
