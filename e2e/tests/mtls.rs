//! Promise: between nodes there is TLS 1.3 with certificates of both ends and nothing else, and a peer that cannot
//! prove an identity of this mesh is refused.

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::Value;

#[test]
fn the_link_carries_only_mutual_tls_and_both_ends_know_each_other() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let word = scenario::marker();
    let sniffer = lab.sniff("node-2", &[&word])?;
    let reports = scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--data", &word, "--count", "20"])?;
    scenario::all_well(&reports, 20)?;
    scenario::all_well(
        &scenario::json_lines(
            &lab.exec("shop/web", &["shop", "tcp", "cart.shop:9000", "--json", "--send", &word])?.stdout,
        ),
        1,
    )?;
    let seen = sniffer.finish()?;
    assert_eq!(seen.markers[&word], 0, "{seen:?}");
    assert!(seen.tls.client_hellos > 0 && seen.tls.server_hellos_13 > 0, "no handshake was seen: {seen:?}");
    assert_eq!(seen.tls.server_hellos_other, 0, "only TLS 1.3: {seen:?}");
    assert_eq!(seen.tls.not_tls, 0, "only TLS on the mesh's port: {seen:?}");
    assert!(seen.tls.encrypted_bytes >= 21 * 2 * word.len() as u64, "the payload crossed: {seen:?}");
    let other: Vec<_> = seen.tcp_ports.keys().filter(|port| ![15008, 15012].contains(*port)).collect();
    assert!(other.is_empty(), "only the mesh and control speak over the link, not {other:?}");

    for node in ["node-1", "node-2"] {
        let words = ["spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/cart"];
        scenario::await_log(&lab, node, &words)?;
    }
    Ok(())
}

#[test]
fn a_peer_without_a_valid_identity_is_refused() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let ours = lab.paths().ca().display().to_string();
    let other = tempfile::tempdir()?;
    let theirs = other.path().display().to_string();
    let identity = |text: &'static str| ["--identity", text];
    let guest = identity("spiffe://cluster.local/ns/plain/sa/guest");

    let good = dial(&lab, &["--ca-dir", &ours, guest[0], guest[1], "--send", "hello"])?;
    assert_eq!(good["status"], 200, "a right certificate is let in, or the refusals below prove nothing: {good}");

    let cases: [(&str, Vec<&str>); 5] = [
        ("no certificate", vec![]),
        ("another authority", vec!["--ca-dir", &theirs, guest[0], guest[1]]),
        ("another trust domain", vec!["--ca-dir", &ours, "--identity", "spiffe://evil.local/ns/plain/sa/guest"]),
        ("a certificate without an identity", vec!["--ca-dir", &ours, "--anonymous"]),
        ("plain bytes", vec!["--bare", "474554202f20485454502f312e310d0a0d0a"]),
    ];
    for (what, arguments) in cases {
        let report = dial(&lab, &arguments)?;
        assert!(report["status"].is_null(), "{what} must not get a tunnel: {report}");
        assert!(!report["error"].is_null() || report["answer"] != "", "{what}: {report}");
    }
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &[])?, 1)?;
    Ok(())
}

/// Dials the HBONE port of `cart` from outside the mesh.
fn dial(lab: &Lab, arguments: &[&str]) -> anyhow::Result<Value> {
    let ip = lab.pod_ip("shop", "cart")?;
    let (to, target) = (format!("{ip}:15008"), format!("{ip}:9000"));
    let mut argv = vec!["lab", "dial", &to, "--connect", &target];
    argv.extend(arguments);
    let output = lab.exec_ok("plain/guest", &argv)?;
    Ok(serde_json::from_str(&output)?)
}
