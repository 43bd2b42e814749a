//! Promise: where an egress gateway adds TLS, it shows a host the client certificate that the rule names, and nobody else's. It has the
//! key from files of its own, follows them when they are replaced, and lets nobody see it. And where TLS passes through, a rule may
//! ask that the host proves its name first, to the node or to the gateway, whoever dials: then a lie of a name server leads nowhere.
//!
//! The hosts are nginx and openssl, with certificates of CAs that the tests make.

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

#[test]
fn a_rule_that_cannot_be_right_keeps_nobody_else_from_the_host() -> anyhow::Result<()> {
    if !scenario::has_tools(&internet::TOOLS) {
        return Ok(());
    }
    let (folder, strangers) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let rival = format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: rival, labels: {{{CLOSED}}}}}\n");
    let gateway = internet::gateway_service() + &internet::gateway("out-0", 2);
    let objects = internet::world(CLOSED, &["inet"]) + &rival + &scenario::client("rival", "web", 1) + &gateway;
    let Some(lab) = internet::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let _servers = servers(&lab, folder.path())?;
    internet::certificate(strangers.path(), &["stranger.example"])?;
    let roots = |of: &Path| std::fs::read_to_string(of.join("ca.pem"));
    let wrong = policy("rival", &roots(strangers.path())?, "");
    lab.apply_yaml(&(policy("shop", &roots(folder.path())?, "") + &wrong))?;
    internet::answers(&lab)?;

    // Nobody shows a certificate, so this is what the host says to whoever reaches it.
    let served = |from: &str| {
        let said = said(&lab, from, NGINX).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(said.contains("No required SSL certificate"), "{from}: {said}");
        anyhow::Ok(())
    };
    answers(&lab, "shop/web", NGINX, &["400"])?;
    // Rules of one namespace that get nowhere: the wrong roots, and another name.
    let named = policy("rival", &roots(folder.path())?, "      serverName: other.example\n");
    let alone = ["rival", "by this rule's own settings", "left alone"];
    for (objects, word) in [(wrong, "TLS with bank.example"), (named, "TLS with other.example")] {
        let known = scenario::log_lines(&lab, "egress/out-0", &alone).len();
        lab.apply_yaml(&objects)?;
        for _ in 0..2 {
            for _ in 0..8 {
                answers(&lab, "rival/web", NGINX, &["503"])?;
            }
            served("shop/web")?;
        }
        scenario::await_log(&lab, "egress/out-0", &["rival", word, "invalid peer certificate"])?;
        eventually("these settings are left alone, too", scenario::PATIENCE, || {
            let lines = scenario::log_lines(&lab, "egress/out-0", &alone).len();
            if lines > known { Ok(()) } else { Err(format!("{lines} lines, {known} of them from before")) }
        })?;
    }
    // Mended, it counts at once.
    lab.apply_yaml(&policy("rival", &roots(folder.path())?, ""))?;
    answers(&lab, "rival/web", NGINX, &["400"])
}

/// Hosts, and whether they are reached by the gateway, and have to prove their names.
const HOSTS: [(&str, bool, bool); 4] =
    [("near", false, true), ("far", true, true), ("half", false, true), ("loose", false, false)];

/// A rule for each of them.
fn rules(authority: &str) -> String {
    let authority = authority.trim().replace('\n', "\n        ");
    let rule = |(name, by_gateway, proven): (&str, bool, bool)| {
        let via = if by_gateway { "    via: {gateway: {namespace: egress, name: out}}\n" } else { "" };
        let verify =
            if proven { format!("    verify:\n      caBundle: |\n        {authority}\n") } else { String::new() };
        format!("  - hosts: [{name}.example]\n    ports: [{{port: 443, protocol: TLS}}]\n{via}{verify}")
    };
    format!(
        "apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: proven, namespace: shop}}\nspec:\n  rules:\n{}",
        HOSTS.map(rule).concat()
    )
}

#[test]
fn a_host_that_does_not_prove_its_name_gets_nothing() -> anyhow::Result<()> {
    if !scenario::has_tools(&internet::TOOLS) {
        return Ok(());
    }
    let gateway = internet::gateway_service() + &internet::gateway("out-0", 2);
    let objects = internet::world(CLOSED, &["inet", "other"]) + &gateway;
    let Some(lab) = internet::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let (own, thief) = (lab.pod_ip("out", "inet")?, lab.pod_ip("out", "other")?);
    let (folder, strange) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let names = HOSTS.map(|(name, ..)| format!("{name}.example"));
    let serve = |place: &str, folder: &Path| {
        let conf = internet::web_server(folder, &names)?;
        if place == "out/other" {
            let text = std::fs::read_to_string(&conf)?;
            std::fs::write(&conf, text.replace("inet $host", "thief $host"))?;
        }
        lab.spawn(place, &["nginx", "-c", &conf])
    };
    let _servers = [serve("out/inet", folder.path())?, serve("out/other", strange.path())?];
    // A host with two addresses has one of somebody else's.
    let zone = |at: &str| {
        let one = HOSTS.map(|(name, ..)| format!("{name} A {at}\n")).concat();
        format!("api A {own}\n{one}half A {own}\n")
    };
    let answer = |at: &str| -> anyhow::Result<Running> {
        let conf = internet::name_server(folder.path(), &zone(at))?;
        let running = lab.spawn("out/inet", &["unbound", "-d", "-c", &conf])?;
        internet::answers(&lab)?;
        Ok(running)
    };
    let honest = answer(&own)?;
    lab.apply_yaml(&rules(&std::fs::read_to_string(folder.path().join("ca.pem"))?))?;
    // The client itself checks nothing.
    let curl = |name: &str| internet::curl(&lab, "shop/web", &["-k"], &format!("https://{name}.example/"));
    let reaches = |name: &str, who: &str| {
        eventually(&format!("{name} is reached"), scenario::PATIENCE, || {
            let said = curl(name)?;
            if said.starts_with(who) { Ok(()) } else { Err(said) }
        })
    };
    for (name, ..) in HOSTS {
        reaches(name, "inet ")?;
    }

    // The name server begins to lie.
    drop(honest);
    let _lying = answer(&thief)?;
    reaches("loose", "thief ")?;
    for (name, seen) in [("near", "node-1"), ("far", "egress/out-0")] {
        let refused = eventually(&format!("{name} is refused"), scenario::PATIENCE, || match curl(name) {
            Err(error) => Ok(error),
            // As long as the answer of before holds.
            Ok(said) if said.starts_with("inet ") => Err(said),
            Ok(said) => Ok(format!("went through: {said}")),
        })?;
        anyhow::ensure!(!refused.contains("went through"), "{name}: {refused}");
        let words =
            ["EGRESS_DENIED", &thief, "not proven to be", &format!("{name}.example"), "EgressPolicy/shop/proven"];
        scenario::await_log(&lab, seen, &words)?;
    }
    // Of two addresses the one that proves the name is used.
    for _ in 0..5 {
        let said = curl("half").map_err(anyhow::Error::msg)?;
        anyhow::ensure!(said.starts_with("inet "), "{said}");
    }
    // What is not TLS proves nothing.
    let plain = internet::curl(&lab, "shop/web", &[], "http://near.example:443/");
    anyhow::ensure!(plain.is_err(), "{plain:?}");
    Ok(())
}
