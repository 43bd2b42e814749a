//! Promise: identities of another trust domain are believed exactly as long as a ClusterTrustBundle vouches for them, and
//! are nobody's namespace here.

use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::time::Duration;
use std::time::SystemTime;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::Value;
use tulle_certs::ca::Authority;

const PATIENCE: Duration = Duration::from_secs(60);
const THEIRS: &str = "spiffe://b.example/ns/shop/sa/web";
const OURS: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// The bundle of the authority in `dir` for a trust domain.
fn bundle(dir: &Path, domain: &str) -> anyhow::Result<String> {
    let now = i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())?;
    let pem = Authority::open(dir, now)?.roots().to_pem().replace('\n', "\n    ");
    Ok(format!(
        "apiVersion: certificates.k8s.io/v1beta1\nkind: ClusterTrustBundle\nmetadata:\n  name: {domain}\n  labels: \
         {{tulle.dev/trust-domain: {domain}}}\nspec:\n  trustBundle: |\n    {pem}\n"
    ))
}

/// Arguments of a client that calls the raw port of `cart` from outside the mesh, as `identity` signed in `dir`.
fn caller(lab: &Lab, dir: &Path, identity: &str) -> anyhow::Result<Vec<String>> {
    let ip = lab.pod_ip("shop", "cart")?;
    let (to, target, dir) = (format!("{ip}:15008"), format!("{ip}:9000"), dir.display().to_string());
    let argv =
        ["lab", "dial", &to, "--connect", &target, "--ca-dir", &dir, "--identity", identity, "--send", "hello\n"];
    Ok(argv.map(str::to_owned).to_vec())
}

fn dial(lab: &Lab, dir: &Path, identity: &str) -> anyhow::Result<Value> {
    let argv = caller(lab, dir, identity)?;
    let output = lab.exec_ok("plain/guest", &argv.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(serde_json::from_str(&output)?)
}

/// Waits until the caller's answer is so; `None`: there is no tunnel at all.
fn answers(lab: &Lab, dir: &Path, identity: &str, status: Option<u64>) -> anyhow::Result<()> {
    eventually(&format!("{identity} is answered {status:?}"), PATIENCE, || {
        let report = dial(lab, dir, identity).map_err(|error| error.to_string())?;
        if report["status"].as_u64() == status { Ok(()) } else { Err(report.to_string()) }
    })
}

#[test]
fn a_foreign_trust_domain_is_believed_as_long_as_its_bundle_is_there() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let (dir, ours) = (tempfile::tempdir()?, lab.paths().ca());
    let theirs = dir.path();
    answers(&lab, &ours, OURS, Some(200))?;
    answers(&lab, theirs, THEIRS, None)?;
    scenario::await_log(&lab, "node-2", &["UNTRUSTED_DOMAIN", THEIRS, "ClusterTrustBundle"])?;

    lab.apply_yaml(&bundle(theirs, "b.example")?)?;
    answers(&lab, theirs, THEIRS, Some(200))?;
    scenario::await_log(&lab, "node-2", &[THEIRS, "inbound"])?;
    answers(&lab, theirs, OURS, None)?;
    answers(&lab, &ours, THEIRS, None)?;
    answers(&lab, theirs, "spiffe://c.example/ns/shop/sa/web", None)?;
    let listed = lab.exec_ok("control", &["tulle", "get", "trust-bundles"])?;
    anyhow::ensure!(listed.contains("b.example"), "{listed}");

    let argv = caller(&lab, theirs, THEIRS)?;
    let argv: Vec<&str> = argv.iter().map(String::as_str).chain(["--hold"]).collect();
    let mut held = lab.spawn("plain/guest", &argv)?;
    let stdout = held.child().and_then(|child| child.stdout.take()).context("no output")?;
    let mut reports = BufReader::new(stdout).lines();
    let opened = reports.next().context("no report")??;
    anyhow::ensure!(opened.contains("200"), "{opened}");
    lab.delete("ClusterTrustBundle", "b.example")?;
    let ended: Value = serde_json::from_str(&reports.next().context("no second report")??)?;
    anyhow::ensure!(!ended["ended"].is_null(), "a tunnel of a domain that is not believed lives: {ended}");
    scenario::await_log(&lab, "node-2", &["UNTRUSTED_DOMAIN", THEIRS, "connection "])?;
    answers(&lab, theirs, THEIRS, None)?;
    answers(&lab, &ours, OURS, Some(200))
}

#[test]
fn a_foreign_namespace_is_none_of_ours_and_a_principal_is_named_whole() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let (dir, ours) = (tempfile::tempdir()?, lab.paths().ca());
    let theirs = dir.path();
    lab.apply_yaml(&bundle(theirs, "b.example")?)?;
    answers(&lab, theirs, THEIRS, Some(200))?;
    let principal = |id: &str| format!("[{{from: [{{source: {{principals: [{}]}}}}]}}]", &id["spiffe://".len()..]);
    for (action, rules, of_ours, of_theirs) in [
        ("ALLOW", "[{from: [{source: {namespaces: [shop]}}]}]".to_owned(), 200, 401),
        ("DENY", "[{from: [{source: {notNamespaces: [shop]}}]}]".to_owned(), 200, 401),
        ("ALLOW", principal(THEIRS), 401, 200),
        ("ALLOW", principal(OURS), 200, 401),
    ] {
        lab.apply_yaml(&scenario::authorization("shop", "callers", "cart", action, &rules))?;
        answers(&lab, &ours, OURS, Some(of_ours)).context(rules.clone())?;
        answers(&lab, theirs, THEIRS, Some(of_theirs)).context(rules)?;
    }
    Ok(())
}

#[test]
fn bundles_that_cannot_count_say_why() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let theirs = dir.path();
    lab.apply_yaml(&bundle(theirs, "cluster.local")?)?;
    lab.apply_yaml(&bundle(theirs, "b.example")?.replace("MII", "!!!"))?;
    answers(&lab, theirs, OURS, None)?;
    answers(&lab, theirs, THEIRS, None)?;
    let conditions = lab.exec_ok("control", &["tulle", "get", "conditions"])?;
    for (name, reason) in [("cluster.local", "OwnTrustDomain"), ("b.example", "Invalid")] {
        let told = conditions.lines().any(|line| line.contains(name) && line.contains(reason));
        anyhow::ensure!(told, "nothing says {reason} of {name}:\n{conditions}");
    }
    Ok(())
}
