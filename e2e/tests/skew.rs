//! Promise: this version and the one before it make one mesh, whichever of them control, a node or a gateway has: what both
//! know works, what the older one does not know fails closed and is told of, and going to the newer one and back costs no request.
//!
//! The programs of the version before come from the folder that `TULLE_PREVIOUS` names; `make test-skew` builds them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;
use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::programs_dir;
use e2e::scenario;
use serde_json::Value;

/// All of what has a version.
const ALL: [&str; 4] = ["control", "node-1", "node-2", "gateway"];
const API: &str = "http://api.example.test:8080/";
/// What the version before does not know. When it knows one of these, something newer takes its place here.
const NEWER_EGRESS: &str = "    verify: {}\n";
const NEWER_TRAFFIC: &str = "{connectionPool: {tcp: {tcpKeepalive: {time: 30s}}}}";

/// For what may never be in force as a whole.
const SHORT: Duration = Duration::from_secs(2);

/// The program of the version before, for a component.
fn previous(component: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("TULLE_PREVIOUS").map(PathBuf::from).context("TULLE_PREVIOUS is not set")?;
    let program = folder.join(program_of(component));
    ensure!(program.is_file(), "{} does not exist; `make test-skew` builds it", program.display());
    Ok(program)
}

fn present(component: &str) -> anyhow::Result<PathBuf> {
    Ok(programs_dir()?.join(program_of(component)))
}

fn program_of(component: &str) -> &'static str {
    if component == "control" { "control" } else { "ztunnel" }
}

/// A lab in which these are of the version before. None, and said so: there is no such version, or no lab, on this machine.
fn lab(old: &[&str]) -> anyhow::Result<Option<Lab>> {
    if std::env::var_os("TULLE_PREVIOUS").is_none() {
        ensure!(std::env::var_os("CI").is_none(), "TULLE_PREVIOUS names no version before; run `make test-skew`");
        eprintln!("SKIPPED: TULLE_PREVIOUS names no version before; run `make test-skew`");
        return Ok(None);
    }
    let mut config = LabConfig::of(&world());
    for component in old {
        config.programs.insert((*component).to_owned(), previous(component)?);
    }
    // Held connections outlive every replacement.
    Ok(scenario::lab(config.env("ztunnel", "CONNECTION_TERMINATION_DEADLINE", "300s")))
}

/// Shares of the requests for `cart`: what stays there, and what `next` gets.
fn route(cart: u32, next: u32) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: cart, namespace: shop}}\nspec:\n\
         \x20 parentRefs: [{{kind: Service, group: '', name: cart, port: 80}}]\n  rules:\n\
         \x20 - backendRefs: [{{name: cart, port: 80, weight: {cart}}}, {{name: next, port: 80, weight: {next}}}]\n"
    )
}

fn traffic(host: &str, policy: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}, namespace: shop}}\n\
         spec: {{host: {host}, trafficPolicy: {policy}}}\n"
    )
}

/// A rule by which a host's port is reached; `more` are further lines of it.
fn way_out(name: &str, port: &str, more: &str) -> String {
    format!(
        "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n\
         \x20 rules:\n  - hosts: [{name}.example.test]\n    ports: [{port}]\n{more}"
    )
}

/// A closed namespace with clients and servers on both nodes, a way out by the node (for bytes) and one by a gateway, and one of
/// each kind of policy: `other` may not ask `cart` or `next`, `desk` may ask `till` for one path, and `pay` has a breaker.
fn world() -> String {
    let closed = "---\napiVersion: v1\nkind: Namespace\n\
         metadata: {name: shop, labels: {tulle.dev/mesh: enabled, tulle.dev/egress: deny}}\n";
    let outside = scenario::outside("api.example.test,near.example.test,other.example.test,proof.example.test");
    let other = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]}]";
    let desk = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/desk]}}], \
                to: [{operation: {methods: [GET, POST], paths: [/open]}}]}]";
    let outlier = "{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {consecutive5xxErrors: 3, interval: 1s, \
                   baseEjectionTime: 1s, maxEjectionPercent: 50}}";
    [
        closed.to_owned(),
        outside.to_owned(),
        scenario::namespace("plain", false),
        scenario::client("plain", "guest", 1),
        scenario::client("shop", "web", 1),
        scenario::client("shop", "other", 1),
        scenario::client("shop", "desk", 2),
        scenario::server("shop", "cart", "cart", 2),
        scenario::service("shop", "cart"),
        scenario::server("shop", "next", "next", 2),
        scenario::service("shop", "next"),
        scenario::server("shop", "till", "till", 1),
        scenario::service("shop", "till"),
        scenario::server("shop", "pay", "pay", 2),
        scenario::server("shop", "pay-b", "pay", 1),
        scenario::service("shop", "pay"),
        scenario::peer_authentication("shop", "STRICT"),
        scenario::authorization("shop", "not-other", "cart", "DENY", other),
        scenario::authorization("shop", "not-other-either", "next", "DENY", other),
        scenario::authorization("shop", "open", "till", "ALLOW", desk),
        traffic("pay", outlier),
        internet::gateway_service(),
        internet::gateway("out-0", 1),
        internet::gateway("out-1", 2),
        way_out("near", "{port: 8080, protocol: TCP}", ""),
        way_out("api", "{port: 8080, protocol: HTTP}", "    via: {gateway: {namespace: egress, name: out}}\n"),
    ]
    .concat()
}

/// All that both versions know, with `share` percent of the requests for `next`, which may differ from what held before.
fn all_holds(lab: &Lab, share: u32) -> anyhow::Result<()> {
    lab.apply_yaml(&route(100 - share, share)).context("a route is changed")?;
    tunnels(lab).context("tunnels")?;
    policies(lab).context("policies")?;
    let reports = scenario::calls(lab, "shop/web", "http://cart.shop/", &["--count", "100", "--keep-alive"])?;
    scenario::all_well(&reports, 100).context("a canary")?;
    let next = reports.iter().filter(|report| report["name"] == "next").count();
    // Exact for all of a node's requests together, and others ask meanwhile.
    ensure!(next.abs_diff(share as usize) <= 5, "{next} of 100 requests went to the next version, and {share} should");
    breaker(lab).context("a breaker")?;
    egress(lab).context("what leaves")?;
    told(lab).context("what people are told")
}

/// Both ways between the nodes, what is said cannot be read, and both ends know each other.
fn tunnels(lab: &Lab) -> anyhow::Result<()> {
    let word = scenario::marker();
    let sniffer = lab.sniff("node-2", &[&word])?;
    for (from, url) in [("shop/web", "http://cart.shop/"), ("shop/desk", "http://till.shop/open")] {
        scenario::all_well(&scenario::calls(lab, from, url, &["--data", &word, "--count", "5"])?, 5)?;
    }
    let seen = sniffer.finish()?;
    ensure!(seen.markers[&word] == 0 && seen.tls.not_tls == 0 && seen.tls.server_hellos_other == 0, "{seen:?}");
    ensure!(seen.tls.encrypted_bytes >= 20 * word.len() as u64, "the words cannot have crossed: {seen:?}");
    for (client, server) in [("web", "cart"), ("desk", "till")] {
        let account = |name: &str| format!("spiffe://cluster.local/ns/shop/sa/{name}");
        for node in ["node-1", "node-2"] {
            scenario::await_log(lab, node, &[&account(client), &account(server)])?;
        }
    }
    Ok(())
}

fn status(lab: &Lab, from: &str, url: &str) -> anyhow::Result<Value> {
    Ok(scenario::call(lab, from, url)?["status"].clone())
}

fn policies(lab: &Lab) -> anyhow::Result<()> {
    let refused = scenario::call(lab, "shop/other", "http://cart.shop/")?;
    ensure!(refused["ok"] != true, "an identity that a policy forbids was let in: {refused}");
    let stranger = scenario::call(lab, "plain/guest", "http://cart.shop/")?;
    ensure!(stranger["ok"] != true, "plaintext got past STRICT: {stranger}");
    for (from, path, wanted) in [("shop/desk", "open", 200), ("shop/desk", "secret", 403), ("shop/web", "open", 403)] {
        let got = status(lab, from, &format!("http://till.shop/{path}"))?;
        ensure!(got == wanted, "{from} asks for /{path}: {got}, not {wanted}");
    }
    Ok(())
}

/// How often each of the two servers of `pay` answers ten requests, and how many failed.
fn paid(lab: &Lab) -> anyhow::Result<(BTreeMap<String, usize>, usize)> {
    let reports = scenario::calls(lab, "shop/web", "http://pay.shop/work", &["--keep-alive", "--count", "10"])?;
    let mut by_pod = BTreeMap::new();
    for report in reports.iter().filter(|report| report["ok"] == true) {
        *by_pod.entry(report["pod"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok((by_pod, scenario::failures(&reports).len()))
}

/// A server that fails is left alone, and used again when it is well.
fn breaker(lab: &Lab) -> anyhow::Result<()> {
    let become_ = |how: &str| -> anyhow::Result<()> {
        let url = format!("http://{}:8080/become?{how}", lab.pod_ip("shop", "pay-b")?);
        scenario::all_well(&scenario::calls(lab, "shop/other", &url, &[])?, 1)
    };
    let both = |lab: &Lab| {
        eventually("both servers are asked", scenario::PATIENCE, || {
            let (by_pod, failed) = paid(lab)?;
            ensure!(by_pod.len() == 2 && failed == 0, "{by_pod:?}, and {failed} failed");
            Ok(())
        })
    };
    both(lab)?;
    become_("status=503")?;
    let failed = (0..4).map(|_| paid(lab).map(|(_, failed)| failed)).sum::<anyhow::Result<usize>>()?;
    ensure!((3..20).contains(&failed), "{failed} of 40 requests failed, of which half would without a breaker");
    become_("")?;
    both(lab)
}

/// By the node and by the gateway what is allowed leaves, nothing else, and the fence stands around each pod.
fn egress(lab: &Lab) -> anyhow::Result<()> {
    scenario::reaches(lab, "shop/web", "http://near.example.test:8080/")?;
    scenario::reaches(lab, "shop/web", API)?;
    let source = scenario::call(lab, "shop/web", API)?["answer"]["source"].clone();
    let gateways = [lab.pod_ip("egress", "out-0")?, lab.pod_ip("egress", "out-1")?];
    ensure!(gateways.iter().any(|gateway| source == **gateway), "{source} is none of {gateways:?}");
    let address = lab.pod_ip("net", "api")?;
    for host in ["other.example.test", &address] {
        let report = scenario::call(lab, "shop/web", &format!("http://{host}:8080/"))?;
        ensure!(report["ok"] != true, "{host} was reached: {report}");
    }
    for node in ["node-1", "node-2"] {
        lab.exec_ok(node, &["nft", "list", "table", "inet", "tulle_fence"])?;
    }
    Ok(())
}

/// The command of this version, whatever control is.
fn told(lab: &Lab) -> anyhow::Result<()> {
    for (from, to, verdict, word) in [
        ("shop/other", "shop/cart:80", "denied", "shop/not-other"),
        ("shop/web", "shop/pay:80", "allowed", "shop/pay-b"),
        ("shop/web", "api.example.test:8080", "allowed", "EgressPolicy/shop/api"),
        ("shop/web", "other.example.test:8080", "refused", "other.example.test"),
    ] {
        let output = lab.exec("control", &["tulle", "explain", from, to, "-o", "json"])?;
        let said: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("explain said {output:?}"))?;
        ensure!(said["verdict"] == verdict && said.to_string().contains(word), "{from} to {to}: {said:#}");
    }
    let text = lab.exec_ok("control", &["tulle", "status"])?;
    let well = |name: &str| text.lines().any(|line| line.contains(name) && line.contains("true"));
    let all = ["node-1", "node-2", "gateway egress/out-0", "gateway egress/out-1"];
    ensure!(all.into_iter().all(well), "{text}");
    Ok(())
}

#[test]
fn an_older_control_serves_newer_proxies() -> anyhow::Result<()> {
    let Some(lab) = lab(&["control"])? else { return Ok(()) };
    all_holds(&lab, 10)
}

#[test]
fn a_newer_control_serves_older_proxies() -> anyhow::Result<()> {
    let Some(lab) = lab(&["node-1", "node-2", "gateway"])? else { return Ok(()) };
    all_holds(&lab, 10)
}

#[test]
fn an_older_and_a_newer_node_talk_to_each_other_both_ways() -> anyhow::Result<()> {
    for older in ["node-1", "node-2"] {
        let Some(lab) = lab(&[older])? else { return Ok(()) };
        all_holds(&lab, 10).with_context(|| format!("{older} is the older one"))?;
    }
    Ok(())
}

#[test]
fn a_running_mesh_goes_to_the_newer_version_and_back_without_losing_a_request() -> anyhow::Result<()> {
    let Some(lab) = lab(&ALL)? else { return Ok(()) };
    all_holds(&lab, 10).context("all are older")?;
    let held = scenario::hold(&lab, "shop/web")?;
    let targets = ["http://cart.shop/", "tcp://cart.shop:9000", API];
    let fresh = scenario::strict_load(&lab, "shop/web", &targets, 20.0, &[])?;
    let kept = scenario::strict_load(&lab, "shop/desk", &["http://till.shop/open"], 20.0, &["--keep-alive"])?;
    let newer = [("control", true), ("node-1", true), ("node-2", true)];
    let back = [("node-2", false), ("control", false), ("node-1", false)];
    for (step, (component, up)) in newer.into_iter().chain(back).enumerate() {
        let program = if up { present(component)? } else { previous(component)? };
        if component == "control" {
            lab.kill(component, "TERM")?;
            lab.restart_with(component, Some(&program), &[])?;
        } else {
            lab.replace_with(component, Some(&program))?;
        }
        let missing = lab.settle(scenario::PATIENCE, &mut |_| {})?;
        ensure!(missing.is_empty(), "{component} is replaced: {missing:?}");
        let share = if step % 2 == 0 { 30 } else { 10 };
        all_holds(&lab, share).with_context(|| format!("{component} is {}", program.display()))?;
    }
    let (fresh, kept, held) = (fresh.finish()?, kept.finish()?, held.finish()?);
    scenario::all_well(&fresh, 300)?;
    scenario::all_well(&kept, 100)?;
    ensure!(held["ok"] == true, "a connection from before did not live through it: {held}");
    println!("{} requests and a connection were carried through 6 replacements", fresh.len() + kept.len());
    Ok(())
}

/// Connections that the host outside has taken.
fn taken(lab: &Lab) -> usize {
    scenario::log_lines(lab, "net/api", &["\"kind\":\"tcp-open\""]).len()
}

/// Begins a TLS connection to the host that only a newer version can ask for a proof; how many more connections the host has seen.
fn tried(lab: &Lab) -> anyhow::Result<usize> {
    let before = taken(lab);
    let argv = ["shop", "tcp", "proof.example.test:9000", "--tls", "proof.example.test", "--timeout-ms", "2000"];
    lab.exec("shop/web", &argv)?;
    Ok(taken(lab) - before)
}

const TLS: &str = "{port: 9000, protocol: TLS}";

/// What `told` says of objects with fields of the newer version; then that nothing of them opened anything.
fn closed_for_what_is_newer(
    lab: &Lab,
    said: impl Fn() -> anyhow::Result<String>,
    words: &[&str],
) -> anyhow::Result<()> {
    let objects = way_out("proof", TLS, NEWER_EGRESS) + &traffic("next", NEWER_TRAFFIC);
    lab.try_apply("what is newer", &objects, SHORT)?;
    eventually("people are told", scenario::PATIENCE, || {
        let said = said()?;
        let missing = words.iter().find(|word| !said.contains(**word));
        missing.map_or(Ok(()), |word| {
            Err(anyhow::anyhow!("nothing of {word} (does the older version know it by now?): {said}"))
        })
    })?;
    ensure!(tried(lab)? == 0, "the host was reached by a rule that was not understood");
    scenario::reaches(lab, "shop/web", "http://next.shop/")?;
    // Without the newer fields the same is in force, so it was those.
    lab.try_delete("DestinationRule", "shop/next", SHORT)?;
    lab.apply_yaml(&way_out("proof", TLS, ""))?;
    eventually("the host is reached without the field, or this proves nothing", scenario::PATIENCE, || {
        let more = tried(lab)?;
        ensure!(more > 0, "it is not");
        Ok(())
    })?;
    all_holds(lab, 30)
}

#[test]
fn what_an_older_node_does_not_know_opens_nothing_and_is_told_of() -> anyhow::Result<()> {
    let Some(lab) = lab(&["node-1", "node-2", "gateway"])? else { return Ok(()) };
    let rejected = || Ok(lab.control_get("/debug/nodes")?["node-1"]["nacks"].to_string());
    closed_for_what_is_newer(&lab, rejected, &["EgressPolicy/shop/proof", "DestinationRule/shop/next"])
}

#[test]
fn what_an_older_control_does_not_know_opens_nothing_and_is_told_of() -> anyhow::Result<()> {
    let Some(lab) = lab(&["control"])? else { return Ok(()) };
    let conditions =
        || Ok(lab.control_get("/debug/conditions")?.to_string() + &lab.control_get("/debug/problems")?.to_string());
    closed_for_what_is_newer(&lab, conditions, &["verify", "tcpKeepalive"])
}
