//! The steps of the demonstration, in order; each builds on those before.
//!
//! Every step compares what it saw with what would have been seen otherwise: a marker that was readable before, a
//! client that got through before, the same impostor with the right name. Limits: they share one lab, so their order
//! matters.

use std::time::Duration;

use anyhow::Context;
use anyhow::ensure;
use serde_json::Value;

use crate::demo::Step;
use crate::demo::breaker;
use crate::demo::canary;
use crate::demo::egress;
use crate::demo::gateway;
use crate::demo::requests;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::Running;
use crate::scenario;

/// Parts that `--break` can break.
pub(super) const PARTS: [&str; 11] =
    ["rules", "authz", "tls", "weights", "mirror", "retries", "jwt", "breaker", "gateway", "sni", "fence"];
/// Without it there is nothing to show.
pub(super) const FIRST: &str = "shop-runs";

pub(super) const STEPS: &[Step] = &[
    Step { name: FIRST, claim: "The shop runs on two nodes, outside the mesh.", rests_on: &[], show: shop_runs },
    Step {
        name: "readable-before",
        claim: "Outside the mesh, what the shop says can be read on the link between the nodes.",
        rests_on: &[],
        show: readable_before,
    },
    Step {
        name: "labelled-while-running",
        claim: "Its namespaces are labelled while clients keep running: nothing restarts, no request fails.",
        rests_on: &[],
        show: labelled_while_running,
    },
    Step {
        name: "unreadable-after",
        claim: "In the mesh the same words are gone from the link, which carries TLS 1.3 only.",
        rests_on: &["rules"],
        show: unreadable_after,
    },
    Step {
        name: "both-identities",
        claim: "Both ends have proven who they are.",
        rests_on: &["rules"],
        show: both_identities,
    },
    Step {
        name: "policy-denies",
        claim: "A policy denies one client, and the denial names policy and rule.",
        rests_on: &["rules", "authz"],
        show: policy_denies,
    },
    Step {
        name: "explain-agrees",
        claim: "Asked why, the proxies give the verdict that the traffic got.",
        rests_on: &["rules", "authz"],
        show: explain_agrees,
    },
    Step {
        name: "impostor-refused",
        claim: "A server that proves another identity than the expected one gets no byte.",
        rests_on: &["rules", "tls"],
        show: impostor_refused,
    },
    Step {
        name: "plaintext-refused",
        claim: "Under STRICT a client without an identity is refused.",
        rests_on: &["rules", "authz"],
        show: plaintext_refused,
    },
    Step {
        name: "canary",
        claim: "A new version of the catalog gets 10 % of the requests of a live connection, then half, and none is lost.",
        rests_on: &["rules", "weights"],
        show: canary::shifts,
    },
    Step {
        name: "canary-pin",
        claim: "Who asks for the new version by a header gets it, whatever the weights.",
        rests_on: &["rules"],
        show: canary::pins,
    },
    Step {
        name: "shadow",
        claim: "The new version gets a copy of every request, and neither delays nor fails one.",
        rests_on: &["rules", "mirror"],
        show: canary::shadows,
    },
    Step {
        name: "retries",
        claim: "A server that fails every fifth answer: a route's retries hide it from its clients.",
        rests_on: &["rules", "retries"],
        show: canary::retries,
    },
    Step {
        name: "jwt",
        claim: "A path asks for a token of the right issuer; others do not.",
        rests_on: &["rules", "authz", "jwt"],
        show: requests::token_asked,
    },
    Step {
        name: "rate-limit",
        claim: "Each caller may come three times an hour, whoever else comes.",
        rests_on: &["rules"],
        show: requests::limited,
    },
    Step {
        name: "breaker",
        claim: "One of two carts gets slow, then dies: a breaker leaves it alone, tries it, and takes it back when it is well.",
        rests_on: &["rules", "breaker"],
        show: breaker::opens_and_closes,
    },
    Step {
        name: "egress-gateway",
        claim: "What may leave a closed namespace leaves by the gateway, from its address, or not at all.",
        rests_on: &["rules", "gateway"],
        show: gateway::leads_out,
    },
    Step {
        name: "egress-names",
        claim: "What leaves a namespace is listed before it is closed; then one name leaves, whatever a client claims.",
        rests_on: &["rules", "sni"],
        show: egress::bound_to_names,
    },
    Step {
        name: "egress-fence",
        claim: "A root container that takes its own rules away does not get out either.",
        rests_on: &["rules", "fence"],
        show: egress::fenced,
    },
    Step {
        name: "control-killed",
        claim: "Control is killed; connections old and new go on.",
        rests_on: &[],
        show: control_killed,
    },
];

const SHOP: [&str; 6] = [
    include_str!("../../examples/shop/10-namespaces.yaml"),
    include_str!("../../examples/shop/20-cart.yaml"),
    include_str!("../../examples/shop/20-catalog.yaml"),
    include_str!("../../examples/shop/20-payments.yaml"),
    include_str!("../../examples/shop/30-frontend.yaml"),
    include_str!("../../examples/shop/40-office.yaml"),
];

/// A passer-by who is never in the mesh, and a ledger that ends tunnels itself, so that anybody can sit there.
const EXTRAS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: street}
---
apiVersion: v1
kind: Pod
metadata: {name: guest, namespace: street}
spec: {nodeName: node-2, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: ledger
  namespace: shop
  annotations: {lab.tulle.dev/own-tunnel: 'true'}
spec: {nodeName: node-1, serviceAccountName: ledger, containers: [{name: main, image: none}]}
";

pub(super) const FRONTEND: &str = "shop/frontend";
pub(super) const CLERK: &str = "office/clerk";
const PAYMENTS: &str = "http://payments.shop/";

fn shop_runs(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(&format!("{}\n---\n{EXTRAS}", SHOP.join("\n---\n")))?;
    for url in ["http://cart/", "http://catalog/", "http://payments/"] {
        scenario::all_well(&scenario::calls(lab, FRONTEND, url, &[])?, 1)?;
    }
    let pods = lab.view()?.pods;
    Ok(format!("{} pods run, and the frontend reaches cart, catalog and payments", pods.len()))
}

/// Says `word` from the frontend to payments, which run on different nodes, and counts it on the link.
fn say(lab: &Lab, word: &str) -> anyhow::Result<crate::sniff::Sniffed> {
    let view = lab.view()?;
    let node = |name: &str| view.pod("shop", name).and_then(|pod| pod.node.clone());
    ensure!(node("frontend") != node("payments"), "frontend and payments share a node; nothing would cross the link");
    let sniffer = lab.sniff("node-1", &[word])?;
    scenario::all_well(&scenario::calls(lab, FRONTEND, PAYMENTS, &["--data", word, "--count", "5"])?, 5)?;
    lab.exec_ok(FRONTEND, &["shop", "tcp", "payments:9000", "--send", word])?;
    sniffer.finish()
}

fn readable_before(lab: &Lab) -> anyhow::Result<String> {
    let word = scenario::marker();
    let seen = say(lab, &word)?;
    ensure!(
        seen.markers[&word] > 0,
        "the marker did not show up on the link, so its absence later would prove nothing"
    );
    Ok(format!("a random marker was read {} times", seen.markers[&word]))
}

fn labelled_while_running(lab: &Lab) -> anyhow::Result<String> {
    let pids = || anyhow::Ok(lab.view()?.pods.into_iter().map(|pod| (pod.name, pod.pids)).collect::<Vec<_>>());
    let before = pids()?;
    let targets = ["http://cart/", "http://catalog/", "tcp://payments:9000"];
    let fresh = lab.load(FRONTEND, &targets, 40.0, &[])?;
    let kept = lab.load(CLERK, &["http://cart.shop/"], 40.0, &["--keep-alive"])?;
    lab.apply_yaml(&format!("{}{}", scenario::namespace("shop", true), scenario::namespace("office", true)))?;
    // A moment inside the mesh belongs to the claim.
    std::thread::sleep(Duration::from_secs(1));
    let (fresh, kept) = (fresh.finish()?, kept.finish()?);
    scenario::all_well(&fresh, 60)?;
    scenario::all_well(&kept, 20)?;
    ensure!(pids()? == before, "a process was restarted");
    let captured = lab.view()?.pods.iter().filter(|pod| pod.capture == "Captured").count();
    Ok(format!("{captured} pods captured, {} requests meanwhile, none failed", fresh.len() + kept.len()))
}

fn unreadable_after(lab: &Lab) -> anyhow::Result<String> {
    let word = scenario::marker();
    let seen = say(lab, &word)?;
    ensure!(seen.markers[&word] == 0, "the marker was read {} times", seen.markers[&word]);
    let tls = &seen.tls;
    ensure!(tls.encrypted_bytes >= 12 * word.len() as u64, "the words cannot have crossed: {tls:?}");
    ensure!(tls.not_tls == 0 && tls.server_hellos_other == 0, "something else than TLS 1.3 crossed: {tls:?}");
    Ok(format!("marker read 0 times; {} encrypted records, {} bytes", tls.encrypted_records, tls.encrypted_bytes))
}

fn both_identities(lab: &Lab) -> anyhow::Result<String> {
    let (from, to) = ("spiffe://cluster.local/ns/shop/sa/frontend", "spiffe://cluster.local/ns/shop/sa/payments");
    let words = [format!("src.identity={from}"), format!("dst.identity={to}")];
    for node in ["node-1", "node-2"] {
        scenario::await_log(lab, node, &[&words[0], &words[1]])?;
    }
    Ok(format!("{from} → {to}, logged on both nodes"))
}

fn reaches_payments(lab: &Lab, from: &str) -> anyhow::Result<bool> {
    Ok(scenario::call(lab, from, PAYMENTS)?["ok"] == true)
}

fn policy_denies(lab: &Lab) -> anyhow::Result<String> {
    ensure!(reaches_payments(lab, CLERK)?, "the clerk cannot reach payments even without a policy");
    let rules = "[{from: [{source: {namespaces: [office]}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "no-office", "payments", "DENY", rules))?;
    ensure!(reaches_payments(lab, FRONTEND)?, "the frontend is denied too");
    ensure!(!reaches_payments(lab, CLERK)?, "the clerk still reaches payments");
    scenario::await_log(lab, "node-1", &["POLICY_DENIED", "shop/no-office", "rule=0", "sa/clerk"])?;
    Ok("the clerk is denied by shop/no-office, rule 0; the frontend is not".into())
}

fn explain(lab: &Lab, from: &str) -> anyhow::Result<Value> {
    lab.control_get(&format!("/debug/explain?from={from}&to=shop/payments:80"))
}

fn explain_agrees(lab: &Lab) -> anyhow::Result<String> {
    for (from, expected) in [(FRONTEND, "allowed"), (CLERK, "denied")] {
        let explained = explain(lab, from)?;
        let verdict = explained["verdict"].as_str().unwrap_or_default().to_owned();
        let passes = reaches_payments(lab, from)?;
        ensure!(passes == (verdict == "allowed"), "{from}: explain says {verdict}, the traffic passes: {passes}");
        ensure!(verdict == expected, "{from} is {verdict}, by explain and traffic alike, and should be {expected}");
    }
    let explained = explain(lab, CLERK)?.to_string();
    ensure!(explained.contains("shop/no-office"), "explain does not name the policy: {explained}");
    Ok("frontend allowed, clerk denied by shop/no-office, as the traffic shows".into())
}

/// Runs a tunnel server at the ledger's address that proves `identity`; gone when dropped.
fn sit_at_ledger(lab: &Lab, identity: &str) -> anyhow::Result<Running> {
    let authority = lab.paths().ca().display().to_string();
    let mut running = lab.spawn("shop/ledger", &["lab", "impostor", "--ca-dir", &authority, "--identity", identity])?;
    let stdout = running.child().and_then(|child| child.stdout.take()).context("no output of the impostor")?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    ensure!(line.contains("listening"), "the impostor did not start");
    Ok(running)
}

fn impostor_refused(lab: &Lab) -> anyhow::Result<String> {
    let url = format!("http://{}:8080/", lab.pod_ip("shop", "ledger")?);
    let ask = || scenario::call(lab, FRONTEND, &url);
    let own = sit_at_ledger(lab, "spiffe://cluster.local/ns/shop/sa/ledger")?;
    let report = ask()?;
    ensure!(report["ok"] == true, "the right identity must get through, or a refusal proves nothing: {report}");
    drop(own);
    let wrong = "spiffe://cluster.local/ns/office/sa/clerk";
    let _impostor = sit_at_ledger(lab, wrong)?;
    let report = ask()?;
    ensure!(report["ok"] != true, "the impostor was believed: {report}");
    scenario::await_log(lab, "node-2", &["WRONG_IDENTITY", wrong])?;
    Ok(format!("{wrong} at the ledger's address was refused; the ledger's own identity was not"))
}

fn plaintext_refused(lab: &Lab) -> anyhow::Result<String> {
    let guest = || anyhow::Ok(scenario::call(lab, "street/guest", "http://cart.shop/")?["ok"] == true);
    ensure!(guest()?, "PERMISSIVE should have let the guest in");
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    ensure!(!guest()?, "the guest is let in under STRICT");
    scenario::all_well(&scenario::calls(lab, FRONTEND, "http://cart/", &["--count", "3"])?, 3)?;
    Ok("the guest is refused, the frontend is not".into())
}

fn control_killed(lab: &Lab) -> anyhow::Result<String> {
    let kept = lab.load(FRONTEND, &["http://cart/"], 40.0, &["--keep-alive"])?;
    lab.kill("control", "KILL")?;
    let fresh = lab.load(FRONTEND, &["http://catalog/", "tcp://cart:9000"], 40.0, &[])?;
    std::thread::sleep(Duration::from_secs(5));
    let (kept, fresh) = (kept.finish()?, fresh.finish()?);
    scenario::all_well(&kept, 100)?;
    scenario::all_well(&fresh, 200)?;
    lab.restart("control")?;
    eventually("the nodes are connected again", Duration::from_secs(20), || {
        let nodes = lab.control_get("/debug/sync")?["nodes"].clone();
        let connected = ["node-1", "node-2"].iter().all(|node| nodes[*node]["connected"] == true);
        if connected { Ok(()) } else { Err(anyhow::anyhow!("{nodes}")) }
    })?;
    Ok(format!(
        "{} requests without control, none failed; both nodes reconnected when it returned",
        kept.len() + fresh.len()
    ))
}
