//! Promise: nothing that comes from outside can stop the mesh. Each bad input gets its own clear error, both processes
//! live, and other traffic does not notice.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::Value;

/// Files for control that are wrong as YAML, as objects, or as policies.
fn bad_files() -> Vec<(String, String)> {
    let policy = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: NAME, namespace: far}}\nspec: {spec}\n"
        )
    };
    let texts = [
        "kind: [".to_owned(),
        "\t- a: b".to_owned(),
        "a: &x [*x]".to_owned(),
        "just text".to_owned(),
        "- 1\n- 2".to_owned(),
        "{".repeat(2000),
        "\u{0}\u{1}".to_owned(),
        "kind: Pod".to_owned(),
        "apiVersion: v1\nkind: Pod\nmetadata: {name: NAME, namespace: far}\nstatus: {podIP: 999.1.1.1}\nspec: {nodeName: node-1}\n".to_owned(),
        "apiVersion: v1\nkind: Pod\nmetadata: {name: NAME, namespace: [far]}\nspec: 3\n".to_owned(),
        "apiVersion: v1\nkind: Service\nmetadata: {name: NAME, namespace: far}\nspec: {clusterIP: nonsense, ports: [{port: 99999}]}\n".to_owned(),
        "apiVersion: v1\nkind: Service\nmetadata: {name: NAME, namespace: far}\nspec: {ports: -1, selector: []}\n".to_owned(),
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: NAME, namespace: far}\naddressType: IPv9\nendpoints: {}\n".to_owned(),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: 7}\n".to_owned(),
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: NAME, namespace: far}\nspec: {mtls: {mode: SOMETIMES}}\n".to_owned(),
        policy("{action: MAYBE}"),
        policy("{action: ALLOW, rules: {}}"),
        policy("{rules: [{from: [{source: {ipBlocks: [300.0.0.0/8]}}]}]}"),
        policy("{rules: [{to: [{operation: {ports: [notaport]}}]}]}"),
        policy("{rules: [{when: [{key: no.such.key, values: [x]}]}]}"),
        policy("{selector: {matchLabels: 3}}"),
        policy("[1, 2]"),
    ];
    texts
        .into_iter()
        .enumerate()
        .map(|(i, text)| (format!("bad-{i:02}.yaml"), text.replace("NAME", &format!("bad-{i}"))))
        .collect()
}

#[test]
fn bad_files_are_named_and_disturb_nobody() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let load = lab.load("shop/web", &["http://cart.shop/"], 50.0, &[])?;
    let pid = lab.view()?.control.pid;
    let dir = lab.paths().objects().join("far");
    std::fs::create_dir_all(&dir)?;
    let files = bad_files();
    for (name, text) in &files {
        std::fs::write(dir.join(name), text)?;
    }
    eventually("control has looked at every file", scenario::PATIENCE, || {
        let sync = lab.control_get("/debug/sync")?;
        let late = files.iter().find(|(name, _)| sync["files"][format!("far/{name}")].is_null());
        late.map_or(Ok(()), |(name, _)| Err(anyhow::anyhow!("{name} is not in the generation")))
    })?;
    let (_, reasons) = lab.get("control", 15014, "/readyz")?;
    let said = format!("{}{reasons}{}", lab.log("control"), lab.control_get("/debug/conditions")?);
    for (index, (name, text)) in files.iter().enumerate() {
        let named =
            said.contains(name) || said.contains(&format!("bad-{index}\"")) || said.contains(&format!("bad-{index} "));
        assert!(named, "nothing is said about {name}: {text:?}");
    }
    // A change to something else still goes through.
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    assert_eq!(lab.view()?.control.pid, pid, "control is the same process");
    scenario::all_well(&load.finish()?, 2)
}

#[test]
fn bad_tunnels_are_refused_one_by_one() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let load = lab.load("shop/web", &["http://cart.shop/"], 50.0, &[])?;
    let pids: Vec<_> = lab.view()?.nodes.into_iter().map(|node| node.pid).collect();
    let ip = lab.pod_ip("shop", "cart")?;
    let target = format!("{ip}:8080");
    let far = format!("{}:8080", lab.pod_ip("shop", "web")?);
    let own_port = format!("{ip}:15008");

    let good = dial(&lab, &ip, &["--connect", &target])?;
    assert_eq!(good["status"], 200, "a right request is answered, or the refusals prove nothing: {good}");

    let bad: [(&str, Vec<&str>); 9] = [
        ("another pod's address", vec!["--connect", &far]),
        ("the proxy's own port", vec!["--connect", &own_port]),
        ("a name that is no service", vec!["--connect", "nobody.nowhere:80"]),
        ("port zero", vec!["--connect", "10.20.2.2:0"]),
        ("another method", vec!["--method", "GET", "--connect", &target]),
        ("bytes that are no HTTP/2", vec!["--raw", "00000000000000000000"]),
        ("a request of HTTP/1", vec!["--raw", "434f4e4e45435420780d0a0d0a"]),
        (
            "an endless header frame",
            vec!["--raw", "505249202a20485454502f322e300d0a0d0a534d0d0a0d0affffff0100000000010000"],
        ),
        ("bytes that are no TLS", vec!["--bare", "160301ffff010000"]),
    ];
    for (what, arguments) in bad {
        let report = dial(&lab, &ip, &arguments)?;
        assert_ne!(report["status"], 200, "{what}: {report}");
    }
    // A header that cannot be read is not a reason to refuse; it must only do no harm.
    for header in [
        "traceparent: 00-00000000000000000000000000000000-0000000000000000-00",
        "traceparent: 00-zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz-zzzzzzzzzzzzzzzz-zz",
        "traceparent: \u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}\u{00e9}x",
        "baggage: ,,,=;=",
        "forwarded: for=",
    ] {
        let report = dial(&lab, &ip, &["--connect", &target, "--header", header])?;
        assert!(!report["status"].is_null(), "{header:?} must be answered: {report}");
    }
    let after: Vec<_> = lab.view()?.nodes.into_iter().map(|node| node.pid).collect();
    assert_eq!(after, pids, "no proxy was restarted");
    scenario::all_well(&load.finish()?, 2)
}

#[test]
fn a_bad_token_gets_nothing_and_is_read_again() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let path = lab.paths().token(2);
    let good = std::fs::read_to_string(&path)?;
    let other = std::fs::read_to_string(lab.paths().token(1))?;
    for bad in ["", "x", "a.b.c", &good[..good.len() - 4], &other] {
        std::fs::write(&path, bad)?;
        lab.kill("node-2", "KILL")?;
        lab.restart("node-2")?;
        let pending = eventually("node-2 says what it waits for", scenario::PATIENCE, || {
            let status = lab.node_admin("node-2", "/status")?;
            let said = status["pending"].to_string();
            if status["ready"] == false && said.len() > 4 { Ok(said) } else { Err(anyhow::anyhow!("{status}")) }
        })?;
        // Long enough for a stream that was let in wrongly to make it ready.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(lab.node_admin("node-2", "/status")?["ready"], false, "with the token {bad:?}: {pending}");
    }
    std::fs::write(&path, &good)?;
    eventually("node-2 is ready with its own token again", Duration::from_secs(60), || {
        let status = lab.node_admin("node-2", "/status")?;
        if status["ready"] == true { Ok(()) } else { Err(anyhow::anyhow!("{}", status["pending"])) }
    })?;
    Ok(())
}

fn dial(lab: &Lab, ip: &str, arguments: &[&str]) -> anyhow::Result<Value> {
    let (to, ca) = (format!("{ip}:15008"), lab.paths().ca().display().to_string());
    let mut argv = vec!["lab", "dial", &to, "--ca-dir", &ca, "--identity", "spiffe://cluster.local/ns/plain/sa/guest"];
    argv.extend(arguments);
    let output = lab.exec_ok("plain/guest", &argv)?;
    Ok(serde_json::from_str(&output)?)
}
