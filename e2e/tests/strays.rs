//! Promise: a packet that belongs to no connection, late or made up, leads nobody past the proxy: not into a pod that takes mutual TLS
//! only, and not out of a pod of the mesh, whose own client can use that port again soon. So it can the port of a connection that was
//! reset because it was older than the capture.
//!
//! The kernel takes a lone ACK for a part of a connection that it has not seen the beginning of, and does not translate what follows.

use std::io::BufRead as _;
use std::io::BufReader;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;
use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// The script, as a program in `folder` with its arguments.
fn program(folder: &Path, arguments: &[&str]) -> anyhow::Result<Vec<String>> {
    let program = folder.join("stray.py");
    std::fs::write(&program, include_str!("testdata/stray.py"))?;
    let argv = ["/usr/bin/python3", program.to_str().context("a path")?];
    Ok(argv.iter().chain(arguments).map(|&word| word.to_owned()).collect())
}

/// Runs the script in a pod; what it printed.
fn script(lab: &Lab, folder: &Path, from: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let argv = program(folder, arguments)?;
    Ok(lab.exec_ok(from, &argv.iter().map(String::as_str).collect::<Vec<_>>())?.trim().to_owned())
}

#[test]
fn a_made_up_packet_lets_nobody_in() -> anyhow::Result<()> {
    let world = scenario::world(true) + &scenario::peer_authentication("shop", "STRICT");
    let Some(lab) = scenario::lab(LabConfig::of(&world)) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let view = lab.view()?;
    let addresses = &view.pod("shop", "cart").context("there is no cart")?.addresses;
    let tries = |port: u16, stray: bool| {
        let deeds = if stray { vec![format!("stray:{port}-{port}")] } else { Vec::new() };
        let deeds = [deeds, vec![format!("ask:{port}")]].concat();
        let ask = |ip: &String| {
            let deeds = deeds.iter().map(String::as_str).collect::<Vec<_>>();
            script(&lab, folder.path(), "plain/guest", &[&[ip.as_str(), "8080"], &deeds[..]].concat())
        };
        addresses.iter().map(ask).collect::<anyhow::Result<Vec<String>>>()
    };
    let refused = |answers: &[String]| {
        answers.len() == 2 && answers.iter().all(|one| one.trim_start_matches("sent\n").starts_with("Connection"))
    };
    let honest = tries(30_000, false)?;
    ensure!(refused(&honest), "plaintext is refused under STRICT: {honest:?}");
    let led = tries(30_001, true)?;
    ensure!(refused(&led), "a stray packet leads past the proxy: {led:?}");
    // That the attack is one is seen without the guard.
    lab.exec_ok("shop/cart", &["sh", "-c", "PATH=$PATH:/usr/sbin nft flush chain inet tulle guard_in"])?;
    let unguarded = tries(30_002, true)?;
    ensure!(unguarded.iter().all(|one| one.contains("200 OK")), "it leads nowhere without the guard: {unguarded:?}");
    Ok(())
}

#[test]
fn a_port_can_be_used_again_after_a_stray_packet() -> anyhow::Result<()> {
    // Not in the mesh, whose pods answer stray packets with a reset, after which nothing is left.
    let world = scenario::world(true) + &scenario::server("plain", "desk", "desk", 2);
    let Some(lab) = scenario::lab(LabConfig::of(&world)) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let desk = lab.pod_ip("plain", "desk")?;
    scenario::reaches(&lab, "shop/web", &format!("http://{desk}:8080/"))?;
    let run = |deeds: &[&str]| script(&lab, folder.path(), "shop/web", &[&[desk.as_str(), "8080"], deeds].concat());
    let first = run(&["stray:30000-31999", "ask:30000"])?;
    ensure!(first.starts_with("sent\nConnectionRefused"), "a stray packet leads past the proxy: {first}");
    // Each port is tried once, as a refusal ends what the packet left. By itself that would last for five minutes.
    let mut port = 30_000;
    eventually("a port is redirected again", scenario::PATIENCE, || {
        port += 1;
        ensure!(port < 32_000, "no port is left");
        let answer = run(&[&format!("ask:{port}")])?;
        ensure!(answer.contains("200 OK"), "{answer}");
        Ok::<_, anyhow::Error>(())
    })?;
    let words = ["connection complete", &format!(":{port} "), "direction=\"outbound\""];
    let line = scenario::await_log(&lab, "node-1", &words)?;
    ensure!(line.contains("dst.workload=\"desk\""), "it went through the proxy: {line}");
    Ok(())
}

#[test]
fn the_port_of_a_connection_that_was_reset_can_be_used_again() -> anyhow::Result<()> {
    let config = LabConfig::of(&scenario::world(false)).env("ztunnel", "TULLE_PREEXISTING", "reset");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let cart = lab.pod_ip("shop", "cart")?;
    let argv = program(folder.path(), &[&cart, "8080", "hold:30000-30049"])?;
    let mut held = lab.spawn("shop/web", &argv.iter().map(String::as_str).collect::<Vec<_>>())?;
    let stdout = held.child().and_then(|child| child.stdout.take()).context("no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut line = || lines.next().context("it has ended")?.context("its output");
    ensure!(line()? == "open", "it could not connect");
    lab.apply_yaml(&scenario::namespace("shop", true))?;
    let end = line()?;
    ensure!(end == "ConnectionResetError", "the old connections: {end}");
    let mut port = 30_000;
    eventually("a port is used again", scenario::PATIENCE, || {
        // Each is tried once: connection tracking remembers the reset for some seconds, and an attempt renews that.
        port += 1;
        ensure!(port < 30_050, "no port is left");
        std::thread::sleep(Duration::from_secs(1));
        let again = script(&lab, folder.path(), "shop/web", &[&cart, "8080", &format!("ask:{port}")])?;
        ensure!(again.contains("200 OK"), "{again}");
        Ok::<_, anyhow::Error>(())
    })
}

#[test]
fn a_made_up_packet_shuts_nobody_out() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let view = lab.view()?;
    for ip in &view.pod("shop", "cart").context("there is no cart")?.addresses {
        let answer = script(&lab, folder.path(), "plain/guest", &[ip, "8080", "stray:30000-30000", "ask:30000"])?;
        ensure!(answer.contains("200 OK"), "an honest client at a port that somebody has made a packet of: {answer}");
    }
    scenario::await_log(&lab, "node-2", &["connection complete", ":30000 ", "direction=\"inbound\""]).map(drop)
}

#[test]
fn a_cookie_opens_no_connection() -> anyhow::Result<()> {
    let world = scenario::world(true) + &scenario::peer_authentication("shop", "STRICT");
    let Some(lab) = scenario::lab(LabConfig::of(&world)) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let cart = lab.pod_ip("shop", "cart")?;
    // As if the application's queue had run over a moment ago.
    lab.exec_ok("shop/cart", &["sh", "-c", "echo 2 >/proc/sys/net/ipv4/tcp_syncookies"])?;
    let attack = |port: &str| {
        scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
        script(&lab, folder.path(), "plain/guest", &[&cart, "8080", &format!("cookie:{port}")])
    };
    let answer = attack("30000")?;
    ensure!(!answer.contains("200 OK"), "a lone ACK opens a connection past the proxy: {answer}");
    lab.exec_ok("shop/cart", &["sh", "-c", "PATH=$PATH:/usr/sbin nft flush chain inet tulle guard_in"])?;
    let unguarded = attack("30001")?;
    ensure!(unguarded.contains("200 OK"), "it opens none without the guard either: {unguarded}");
    Ok(())
}
