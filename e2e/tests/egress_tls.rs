//! Promise: where an egress gateway adds TLS, it shows a host the client certificate that the rule names, and nobody else's. It has the
//! key from files of its own, follows them when they are replaced, and lets nobody see it.
//!
//! The hosts are nginx and openssl, which let in who shows a certificate of their CA.

use std::path::Path;

use e2e::address;
use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::{Lab, LabConfig, Running};
use e2e::scenario;

const CLOSED: &str = "tulle.dev/mesh: enabled, tulle.dev/egress: deny";
/// The host that takes requests without a certificate of its CA, and says so; and the one that ends the connection.
const NGINX: &str = "http://bank.example:8444/";
const OPENSSL: &str = "http://bank.example:8445/";

/// A rule by which `namespace` reaches both hosts, with this certificate.
fn policy(namespace: &str, authority: &str, certificate: &str) -> String {
    let authority = authority.trim().replace('\n', "\n        ");
    format!(
        "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: bank, namespace: {namespace}}}\nspec:\n\
         \x20 rules:\n  - hosts: [bank.example]\n    ports: [{{port: 8444, protocol: HTTPS}}, {{port: 8445, protocol: HTTPS}}]\n\
         \x20   via: {{gateway: {{namespace: egress, name: out}}}}\n    tls: originate\n    originate:\n{certificate}\
         \x20     caBundle: |\n        {authority}\n"
    )
}

/// Who answers names, and both hosts.
fn servers(lab: &Lab, folder: &Path) -> anyhow::Result<Vec<Running>> {
    let ip = address::outside(1);
    let web = internet::web_server(folder, &["bank.example"])?;
    let names = internet::name_server(folder, &format!("api A {}\nbank A {}\n", ip.v4, ip.v4))?;
    let at = |file: &str| folder.join(file).display().to_string();
    let (certificate, key, authority) = (at("host.pem"), at("host.key"), at("ca.pem"));
    let strict = ["-Verify", "1", "-verify_return_error", "-www"];
    let files = ["-accept", "8445", "-cert", &certificate, "-key", &key, "-CAfile", &authority];
    Ok(vec![
        lab.spawn("out/inet", &["unbound", "-d", "-c", &names])?,
        lab.spawn("out/inet", &["nginx", "-c", &web])?,
        lab.spawn("out/inet", &[&["openssl", "s_server"][..], &files, &strict].concat())?,
    ])
}

/// Answer and status.
fn said(lab: &Lab, from: &str, url: &str) -> Result<String, String> {
    internet::curl(lab, from, &["-w", " %{http_code}"], url)
}

/// Waits until that is what a client gets.
fn answers(lab: &Lab, from: &str, url: &str, words: &[&str]) -> anyhow::Result<()> {
    eventually(&format!("{from} gets {words:?} of {url}"), scenario::PATIENCE, || {
        let said = said(lab, from, url)?;
        if words.iter().all(|word| said.contains(word)) { Ok(()) } else { Err(said) }
    })
    .map_err(|error| anyhow::anyhow!("{error}"))
}

#[test]
fn a_host_is_shown_the_certificate_of_the_rule_and_nobody_sees_its_key() -> anyhow::Result<()> {
    if !scenario::has_tools(&internet::TOOLS) {
        return Ok(());
    }
    let (folder, strangers, shown) = (tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?);
    let rival = format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: rival, labels: {{{CLOSED}}}}}\n");
    let gateway = internet::gateway_service() + &internet::gateway("out-0", 2);
    let objects = internet::world(CLOSED, &["inet"]) + &rival + &scenario::client("rival", "web", 1) + &gateway;
    let config = LabConfig::of(&objects).env(
        "gateway",
        "TULLE_GATEWAY_CLIENT_CERTIFICATES",
        &shown.path().display().to_string(),
    );
    let Some(lab) = internet::lab(config) else { return Ok(()) };
    let _servers = servers(&lab, folder.path())?;
    let authority = std::fs::read_to_string(folder.path().join("ca.pem"))?;
    let named = "      clientCertificate: bank\n";
    lab.apply_yaml(&(policy("shop", &authority, named) + &policy("rival", &authority, named)))?;
    internet::answers(&lab)?;
    let own = shown.path().join("shop/bank");

    // Not there yet: the record says where it has to be.
    answers(&lab, "shop/web", NGINX, &["503"])?;
    let missing = ["NO_CERTIFICATE", "shop/bank/tls.crt", "clientCertificate"];
    scenario::await_log(&lab, "egress/out-0", &missing)?;

    // Somebody else's CA signed it: the host says no, each in its own way.
    internet::certificate(strangers.path(), &["stranger.example"])?;
    internet::client_certificate(strangers.path(), &own, "bank")?;
    answers(&lab, "shop/web", NGINX, &["certificate error", "400"])?;
    answers(&lab, "shop/web", OPENSSL, &["503"])?;
    scenario::await_log(&lab, "egress/out-0", &["bank.example:8445", "alert"])?;

    // The right one counts without a restart, and so does the next one.
    for name in ["bank-one", "bank-two"] {
        internet::client_certificate(folder.path(), &own, name)?;
        answers(&lab, "shop/web", NGINX, &[&format!("inet CN={name}"), "200"])?;
        answers(&lab, "shop/web", OPENSSL, &["200"])?;
    }

    // Another namespace names it, and has none; and without the field nothing is shown.
    answers(&lab, "rival/web", NGINX, &["503"])?;
    scenario::await_log(&lab, "egress/out-0", &["NO_CERTIFICATE", "rival/bank/tls.crt"])?;
    lab.apply_yaml(&policy("rival", &authority, ""))?;
    answers(&lab, "rival/web", NGINX, &["No required SSL certificate", "400"])?;
    unseen(&lab, &std::fs::read_to_string(own.join("tls.key"))?)
}

/// Nothing that the mesh tells has a line of the key in it.
fn unseen(lab: &Lab, key: &str) -> anyhow::Result<()> {
    let dump = internet::curl(lab, "egress/out-0", &[], "http://127.0.0.1:15000/config_dump");
    let dump = dump.map_err(anyhow::Error::msg)?;
    anyhow::ensure!(dump.contains("shop"), "no dump: {dump}");
    let told = [
        dump,
        lab.node_admin("node-1", "/config_dump")?.to_string(),
        lab.log("egress/out-0"),
        lab.log("node-1"),
        lab.log("control"),
    ];
    for line in key.lines().filter(|line| !line.starts_with("-----")) {
        anyhow::ensure!(!told.iter().any(|text| text.contains(line)), "somebody told the key");
    }
    Ok(())
}
