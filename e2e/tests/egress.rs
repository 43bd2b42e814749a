//! Promise: from a namespace labelled `tulle.dev/egress: deny` nothing leaves but what a rule allows by name or address, whatever a
//! client claims. Clients, servers and name servers are real ones. What a container's power over its own network gains it, and what can
//! be done with names, are tests of their own (`egress_attacks.rs`, `egress_names.rs`).

use std::path::Path;

use anyhow::Context as _;
use e2e::address;
use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

const POLICY: &str = "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: out, namespace: shop}\nspec:\n  rules:\n\
    \x20 - hosts: [api.example, inside.example]\n    ports: [{port: 443, protocol: TLS}]\n\
    \x20 - hosts: ['*.wild.example']\n    ports: [{port: 443}]\n\
    \x20 - hosts: [db.example]\n    ports: [{port: 9000, protocol: TCP}]\n";

/// Clients on node 1 in a closed and in an open namespace, servers in the mesh and outside of it, and the Internet: one host.
fn world(egress: &str) -> String {
    let labels = format!("tulle.dev/mesh: enabled, tulle.dev/egress: {egress}");
    let desk = scenario::server("plain", "desk", "desk", 2) + &scenario::service("plain", "desk");
    internet::world(&labels, &["inet"]) + &desk
}

/// The lab with an Internet, unless a tool is missing: a failure where `CI` is set, a loud skip elsewhere.
fn lab(egress: &str, policy: &str, folder: &Path) -> anyhow::Result<Option<(Lab, Vec<Running>)>> {
    if !scenario::has_tools(&internet::TOOLS) {
        return Ok(None);
    }
    let Some(lab) = internet::lab(LabConfig::of(&world(egress))) else { return Ok(None) };
    let running = internet(&lab, folder)?;
    if !policy.is_empty() {
        lab.apply_yaml(policy)?;
    }
    internet::answers(&lab)?;
    let known = format!("api.example:443:{}", address::outside(1).v4);
    eventually("the server answers", scenario::PATIENCE, || {
        let got = internet::curl(&lab, "plain/guest", &["-k", "--resolve", &known], "https://api.example/")?;
        if got.contains("inet") { Ok(()) } else { Err(got) }
    })?;
    Ok(Some((lab, running)))
}

/// A name server, a server with TLS for every name, and a server that speaks first.
fn internet(lab: &Lab, folder: &Path) -> anyhow::Result<Vec<Running>> {
    let ip = address::outside(1);
    let pod = lab.pod_ip("shop", "cart")?;
    let mut records = format!("inside A {pod}\napi HTTPS 1 . alpn=h2\n");
    for name in ["api", "evil", "db", "a.wild", "b.a.wild", "wild"] {
        records.push_str(&format!("{name} A {}\n{name} AAAA {}\n", ip.v4, ip.v6));
    }
    let names = internet::name_server(folder, &records)?;
    let web = internet::web_server(folder, &["*.example", "*.wild.example"])?;
    Ok(vec![
        lab.spawn("out/inet", &["unbound", "-d", "-c", &names])?,
        lab.spawn("out/inet", &["nginx", "-c", &web])?,
        lab.spawn("out/inet", &["shop", "serve", "--name", "db", "--tcp", "9000"])?,
    ])
}

/// What curl in the closed namespace prints, or says if it fails; certificates are not checked.
fn curl(lab: &Lab, more: &[&str], url: &str) -> Result<String, String> {
    internet::curl(lab, "shop/web", &[&["-k"], more].concat(), url)
}

fn dig(lab: &Lab, question: &[&str]) -> anyhow::Result<String> {
    internet::dig(lab, "shop/web", question)
}

#[test]
fn what_no_rule_names_does_not_leave_whatever_a_client_claims() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let Some((lab, _internet)) = lab("deny", POLICY, folder.path())? else { return Ok(()) };
    let ip = address::outside(1).v4.to_string();
    let refused = |what: &str, more: &[&str], url: &str, words: &[&str]| -> anyhow::Result<()> {
        let got = curl(&lab, more, url);
        anyhow::ensure!(got.is_err(), "{what} went through: {got:?}");
        scenario::await_log(&lab, "node-1", words).with_context(|| what.to_owned()).map(drop)
    };
    // What is allowed works, by the node's own address.
    for host in ["api.example", "a.wild.example", "b.a.wild.example"] {
        let got = curl(&lab, &[], &format!("https://{host}/")).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(got.contains(&format!("inet {host}")), "{got}");
    }
    scenario::await_log(&lab, "node-1", &["egress=\"allowed\"", "api.example", "EgressPolicy/shop/out"])?;
    let spoken = lab.exec_ok("shop/web", &["shop", "tcp", "db.example:9000"])?;
    anyhow::ensure!(spoken.contains("HELLO"), "a server that speaks first: {spoken}");
    // Names.
    for (name, status) in
        [("evil.example", "NXDOMAIN"), ("wild.example", "NXDOMAIN"), ("secret.evil.example", "NXDOMAIN")]
    {
        let answer = dig(&lab, &[name])?;
        anyhow::ensure!(answer.contains(status) && answer.contains("EDE: 15 (Blocked)"), "{name}: {answer}");
    }
    let virtual_ip = dig(&lab, &["+short", "api.example"])?.trim().to_owned();
    anyhow::ensure!(virtual_ip.starts_with("240.240."), "{virtual_ip}");
    let own = dig(&lab, &["+short", &format!("@{ip}"), "api.example"])?.trim().to_owned();
    anyhow::ensure!(own == virtual_ip, "the name server that a pod chooses is not asked: {own}");
    let https = dig(&lab, &["api.example", "HTTPS"])?;
    anyhow::ensure!(https.contains("NOERROR") && https.contains("ANSWER: 0"), "{https}");
    // Another host, an address, an allowed name at another address, another name at an allowed address.
    let denied = "EGRESS_DENIED";
    anyhow::ensure!(curl(&lab, &[], "https://evil.example/").is_err());
    refused("an address", &[], &format!("https://{ip}/"), &[denied, &ip, "no rule allows it"])?;
    let spoofed = format!("api.example:443:{ip}");
    refused(
        "a spoofed server name",
        &["--resolve", &spoofed],
        "https://api.example/",
        &[denied, "server name api.example"],
    )?;
    let fronted = format!("evil.example:443:{virtual_ip}");
    let words = [denied, "its server name is evil.example, and api.example was looked up"];
    refused("another server name", &["--resolve", &fronted], "https://evil.example/", &words)?;
    refused("no server name", &[], &format!("https://{virtual_ip}/"), &[denied, "TLS without server name"])?;
    refused("another port", &[], "https://api.example:8443/", &[denied, "port 8443"])?;
    refused("plain text where TLS is", &[], "http://api.example:443/", &[denied, "GET /"])?;
    refused("a virtual address of nobody", &[], "https://240.240.1.1/", &[denied, "was not given for any name"])?;
    refused("a name that leads inside", &[], "https://inside.example/", &[denied, "not where it leads"])?;
    refused("metadata", &[], "http://169.254.169.254/", &[denied, "169.254.169.254"])?;
    // Asked why, the node says the same of what was tried above.
    for (to, verdict) in
        [(&*ip, "refused"), (&*virtual_ip, "plain"), ("240.240.1.1", "refused"), ("169.254.169.254", "refused")]
    {
        let explained = lab.control_get(&format!("/debug/explain?from=shop/web&to={to}:443"))?;
        anyhow::ensure!(explained["verdict"] == verdict, "{to}: {explained}");
    }
    // What is inside still works, in the mesh and not.
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    scenario::reaches(&lab, "shop/web", "http://desk.plain/")?;
    // An edit ends what it forbids.
    lab.delete("EgressPolicy", "shop/out")?;
    eventually("without the policy nothing leaves", scenario::PATIENCE, || {
        match curl(&lab, &["--resolve", &format!("api.example:443:{virtual_ip}")], "https://api.example/") {
            Err(_) => Ok(()),
            Ok(got) => Err(got),
        }
    })?;
    Ok(())
}

#[test]
fn an_audited_namespace_goes_on_as_before_and_says_what_it_did() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let Some((lab, _internet)) = lab("audit", "", folder.path())? else { return Ok(()) };
    let ip = address::outside(1).v4.to_string();
    let known = format!("api.example:443:{ip}");
    let got = curl(&lab, &["--resolve", &known], "https://api.example/").map_err(anyhow::Error::msg)?;
    anyhow::ensure!(got.contains("inet api.example"), "{got}");
    let spoken = lab.exec_ok("shop/web", &["shop", "tcp", &format!("{ip}:9000")])?;
    anyhow::ensure!(spoken.contains("HELLO"), "{spoken}");
    // Nobody waits long for what is only watched, so a client that is slow to say its name is seen without it.
    eventually("the name was seen", scenario::PATIENCE, || {
        let got = curl(&lab, &["--resolve", &known], "https://api.example/")?;
        let policy = lab.exec_ok("control", &["tulle", "egress", "--policy", "shop"]).map_err(|e| e.to_string())?;
        if policy.contains("api.example") { Ok(()) } else { Err(format!("{got}{policy}")) }
    })?;
    scenario::await_log(&lab, "node-1", &["egress=\"audited\"", "api.example"])?;
    let listed = lab.exec_ok("control", &["tulle", "egress"])?;
    anyhow::ensure!(listed.contains("api.example") && listed.contains("audited"), "{listed}");
    // The policy that it prints allows exactly that.
    let policy = lab.exec_ok("control", &["tulle", "egress", "--policy", "shop"])?;
    anyhow::ensure!(policy.contains("api.example") && policy.contains(&format!("{ip}/32")), "{policy}");
    lab.apply_yaml(&format!("---\n{policy}"))?;
    lab.apply_yaml(&world("deny"))?;
    let got = curl(&lab, &[], "https://api.example/").map_err(anyhow::Error::msg)?;
    anyhow::ensure!(got.contains("inet api.example"), "{got}");
    anyhow::ensure!(curl(&lab, &[], "https://evil.example/").is_err());
    Ok(())
}

#[test]
fn a_namespace_that_is_opened_again_is_as_it_was_before_the_mesh() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let Some((lab, _internet)) = lab("deny", "", folder.path())? else { return Ok(()) };
    let ip = address::outside(1).v4.to_string();
    let page = format!("http://{ip}/");
    anyhow::ensure!(curl(&lab, &[], &page).is_err(), "a closed namespace");
    let held = scenario::hold(&lab, "shop/web")?;
    // All labels at once: out of the mesh, and open.
    lab.apply_yaml(&internet::world("", &["inet"]))?;
    eventually("an address outside is reached directly", scenario::PATIENCE, || {
        let got = curl(&lab, &["--max-time", "2"], &page)?;
        if got.contains("inet") { Ok(()) } else { Err(got) }
    })?;
    // Names are what their server says, also while a connection of before goes on.
    for _ in 0..5 {
        for more in [&["+notcp"][..], &["+tcp"]] {
            let said = dig(&lab, &[more, &["+short", &format!("@{ip}"), "evil.example"]].concat())?;
            anyhow::ensure!(said.trim() == ip, "{more:?}: {said}");
        }
        lab.exec_ok("shop/web", &["getent", "hosts", "cart.shop.svc.cluster.local"])?;
    }
    let end = held.finish()?;
    anyhow::ensure!(end["ok"] == true, "what went on has ended: {end}");
    Ok(())
}
