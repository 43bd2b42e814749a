//! `lab demo`: the promises of the mesh, shown one by one on a small shop with two nodes.
//!
//! A step looks at what really happened (bytes on the link, answers that clients got, records of the proxies) and says
//! whether its promise held and by what that was seen. With `--break` one part of the proxies is broken on purpose; then
//! exactly the steps that rest on that part must fail, which is what makes the others worth reading. The results are
//! printed and written to `target/demo.json`.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::ensure;
use serde::Serialize;
use serde_json::Value;

use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::programs_dir;
use crate::scenario;
use crate::state::Paths;

/// The shop, as a user would write it.
const MANIFESTS: [&str; 6] = [
    include_str!("../examples/shop/10-namespaces.yaml"),
    include_str!("../examples/shop/20-cart.yaml"),
    include_str!("../examples/shop/20-catalog.yaml"),
    include_str!("../examples/shop/20-payments.yaml"),
    include_str!("../examples/shop/30-frontend.yaml"),
    include_str!("../examples/shop/40-office.yaml"),
];

/// How long clients run before and after a change, so that each of them sends some dozens of requests on either side.
const WHILE: Duration = Duration::from_millis(1500);

/// How long traffic goes on without control.
const OUTAGE: Duration = Duration::from_secs(3);

/// Arguments of `lab demo`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Part to break on purpose, in a test build: rules, authz or tls.
    #[arg(long = "break", env = "BREAK")]
    broken: Option<String>,
    /// Leave the lab running.
    #[arg(long)]
    keep: bool,
    /// Where the results are written.
    #[arg(long, default_value = "target/demo.json")]
    results: PathBuf,
}

/// A promise and whether it held.
#[derive(Debug, Serialize)]
struct Step {
    step: &'static str,
    held: bool,
    detail: String,
}

/// One promise: its name, and how it is tried. The text says by what it was seen.
type Promise = (&'static str, fn(&Demo) -> anyhow::Result<String>);

const PROMISES: [Promise; 10] = [
    ("before the label, traffic between nodes is readable", readable),
    ("labelling the namespace disturbs nobody", label),
    ("after the label, nothing between nodes is readable", unreadable),
    ("both ends prove their identities", identities),
    ("a policy denies one client, and names itself", denial),
    ("explain says what traffic does", explain),
    ("STRICT refuses plaintext", strict),
    ("a wrong identity is refused", wrong_identity),
    ("what the policies forbid stays forbidden, and the rest works", both_ways),
    ("without control, traffic goes on", outage),
];

/// Steps that rest on a part.
fn resting_on(part: &str) -> Option<&'static [&'static str]> {
    Some(match part {
        "rules" => &[
            "after the label, nothing between nodes is readable",
            "both ends prove their identities",
            "a policy denies one client, and names itself",
            "explain says what traffic does",
            "STRICT refuses plaintext",
            "what the policies forbid stays forbidden, and the rest works",
        ],
        "authz" => &[
            "a policy denies one client, and names itself",
            "explain says what traffic does",
            "STRICT refuses plaintext",
            "what the policies forbid stays forbidden, and the rest works",
        ],
        "tls" => &["a wrong identity is refused"],
        _ => return None,
    })
}

struct Demo {
    lab: Lab,
}

/// Runs the demo; true if every promise held.
pub fn main(options: &Options) -> anyhow::Result<bool> {
    let broken = options.broken.as_deref().filter(|part| !part.is_empty());
    let own = match broken {
        Some(part) => resting_on(part).with_context(|| format!("BREAK={part} is not one of rules, authz, tls"))?,
        None => &[],
    };
    let keep = options.keep || std::env::var("KEEP").is_ok_and(|keep| keep == "1");
    let begun = Instant::now();
    say("bringing up two nodes with a small shop");
    let demo = Demo { lab: up(broken, keep)? };
    let mut steps = Vec::new();
    for (step, promise) in PROMISES {
        print!("  {step} … ");
        let _ = std::io::stdout().flush();
        let (held, detail) = match promise(&demo) {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        println!("{}\n      {}", if held { "yes" } else { "NO" }, detail.replace('\n', "\n      "));
        steps.push(Step { step, held, detail });
    }
    write(&options.results, &steps)?;
    finish(demo, keep)?;
    Ok(summary(&steps, broken, own, begun.elapsed()))
}

fn say(text: &str) {
    println!("{text}");
}

fn up(broken: Option<&str>, keep: bool) -> anyhow::Result<Lab> {
    let mut config = LabConfig::default();
    if let Some(part) = broken {
        let program = programs_dir()?.join("ztunnel-sabotage");
        ensure!(
            program.exists(),
            "{} is missing; build it with `cargo build -p ztunnel --features sabotage --bin ztunnel-sabotage`",
            program.display()
        );
        config.programs.insert("ztunnel".into(), program);
        config = config.env("ztunnel", "TULLE_BREAK", part);
    }
    if keep {
        config.state = Some(Paths::default_dir());
    }
    let lab = Lab::start(&config, !keep)?;
    lab.apply_yaml(&MANIFESTS.join("\n---\n"))?;
    Ok(lab)
}

fn write(path: &PathBuf, steps: &[Step]) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, format!("{}\n", serde_json::to_string_pretty(steps)?))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn finish(mut demo: Demo, keep: bool) -> anyhow::Result<()> {
    if !keep {
        return demo.lab.down(false);
    }
    println!("\nThe lab is left running. Try:");
    for hint in [
        "lab status",
        "lab exec shop/frontend -- shop call http://cart/",
        "lab exec control -- tulle explain shop/cart shop/payments:80",
        "lab logs node-1",
        "lab down",
    ] {
        println!("  target/debug/{hint}");
    }
    demo.lab.leave();
    Ok(())
}

fn summary(steps: &[Step], broken: Option<&str>, own: &[&str], took: Duration) -> bool {
    let held = steps.iter().filter(|step| step.held).count();
    println!("\n{held} of {} promises held, in {:.0} s", steps.len(), took.as_secs_f64());
    if let Some(part) = broken {
        let red: Vec<&str> = steps.iter().filter(|step| !step.held).map(|step| step.step).collect();
        let exact = red.len() == own.len() && own.iter().all(|step| red.contains(step));
        println!(
            "{part} was broken on purpose: {}",
            if exact { "exactly the steps that rest on it failed" } else { "NOT exactly the steps that rest on it failed" }
        );
    }
    held == steps.len()
}

/// Sends a fresh marker from frontend to payments, which run on different nodes, and looks at the link in between.
fn send_marker(demo: &Demo) -> anyhow::Result<(crate::sniff::Sniffed, u64, u64)> {
    let word = scenario::marker();
    let sniffer = demo.lab.sniff("node-1", &[&word])?;
    let more = ["--data", &word, "--count", "10"];
    let reports = scenario::calls(&demo.lab, "shop/frontend", "http://payments/", &more)?;
    scenario::all_well(&reports, 10)?;
    let seen = sniffer.finish()?;
    let found = seen.markers.get(&word).copied().unwrap_or(0);
    // Each marker is sent and echoed.
    Ok((seen, found, 2 * 10 * word.len() as u64))
}

fn readable(demo: &Demo) -> anyhow::Result<String> {
    let (seen, found, _) = send_marker(demo)?;
    ensure!(found > 0, "the marker was not found in {} bytes: the capture would prove nothing", seen.tcp_bytes);
    Ok(format!("a random marker was found in {found} packets on node-1's link"))
}

fn label(demo: &Demo) -> anyhow::Result<String> {
    let lab = &demo.lab;
    let pids = |lab: &Lab| -> anyhow::Result<Vec<_>> { Ok(lab.view()?.pods.iter().map(|pod| pod.pids.clone()).collect()) };
    let before = pids(lab)?;
    let kept = lab.load("shop/frontend", &["http://payments/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/frontend", &["http://cart/", "http://catalog/", "tcp://payments:9000"], 30.0, &[])?;
    let outside = lab.load("office/clerk", &["http://cart.shop/"], 10.0, &[])?;
    std::thread::sleep(WHILE);
    let began = Instant::now();
    lab.apply_yaml(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n",
    )?;
    let took = began.elapsed();
    std::thread::sleep(WHILE);
    let mut total = 0;
    for load in [kept, fresh, outside] {
        let reports = load.finish()?;
        scenario::all_well(&reports, 20)?;
        total += reports.len();
    }
    ensure!(pids(lab)? == before, "a process of a pod was started anew");
    let captured = lab.view()?.pods.iter().filter(|pod| pod.namespace == "shop" && pod.capture == "Captured").count();
    ensure!(captured == 6, "{captured} of 6 pods are captured");
    Ok(format!(
        "6 pods captured in {:.1} s; {total} requests on kept and new connections meanwhile, none failed, nothing restarted",
        took.as_secs_f64()
    ))
}

fn unreadable(demo: &Demo) -> anyhow::Result<String> {
    let (seen, found, payload) = send_marker(demo)?;
    ensure!(found == 0, "the marker was found in {found} packets");
    ensure!(seen.tls.server_hellos_other == 0 && seen.tls.not_tls == 0, "something else than TLS 1.3: {:?}", seen.tls);
    ensure!(seen.tls.encrypted_bytes >= payload, "the payload did not cross this link: {:?}", seen.tls);
    let other: Vec<_> = seen.tcp_ports.keys().filter(|port| ![15008, 15012].contains(*port)).collect();
    ensure!(other.is_empty(), "TCP to the ports {other:?} bypasses the mesh");
    Ok(format!(
        "no marker in {} bytes; {} of them in encrypted TLS records to port 15008",
        seen.tcp_bytes, seen.tls.encrypted_bytes
    ))
}

fn identities(demo: &Demo) -> anyhow::Result<String> {
    let client = "spiffe://cluster.local/ns/shop/sa/frontend";
    let server = "spiffe://cluster.local/ns/shop/sa/payments";
    for (node, direction) in [("node-2", "outbound"), ("node-1", "inbound")] {
        let words = [&format!("src.identity={client}"), &format!("dst.identity={server}"), direction];
        found_soon(&demo.lab, node, &words)?;
    }
    Ok(format!("the records of both nodes agree: {client} called {server}"))
}

/// A line of a proxy's log with all of `words`, which is written when the connection ends.
fn found_soon(lab: &Lab, node: &str, words: &[&impl AsRef<str>]) -> anyhow::Result<String> {
    let words: Vec<&str> = words.iter().map(|word| word.as_ref()).collect();
    crate::eventually::eventually(&format!("a record of {node} with {words:?}"), Duration::from_secs(3), || {
        scenario::log_lines(lab, node, &words).pop().ok_or_else(|| "none".to_owned())
    })
}

const POLICY: &str = "shop/no-cart-at-the-till";

fn denial(demo: &Demo) -> anyhow::Result<String> {
    demo.lab.apply_yaml(&scenario::authorization(
        "shop",
        "no-cart-at-the-till",
        "payments",
        "DENY",
        "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/cart']}}]}]",
    ))?;
    let frontend = scenario::call(&demo.lab, "shop/frontend", "http://payments/")?;
    ensure!(frontend["ok"] == true, "frontend, which is not denied, was answered {frontend}");
    let cart = scenario::call(&demo.lab, "shop/cart", "http://payments/")?;
    ensure!(cart["ok"] != true, "cart, which is denied, was answered {cart}");
    let policy = format!("policy=\"{POLICY}\"");
    for node in ["node-1", "node-2"] {
        found_soon(&demo.lab, node, &[&policy, &"rule=0".to_owned(), &"POLICY_DENIED".to_owned()])?;
    }
    Ok(format!("cart → payments: reset; both nodes' records name {POLICY}, rule 0; frontend → payments: answered"))
}

fn explained(demo: &Demo, from: &str, to: &str) -> anyhow::Result<Value> {
    demo.lab.control_get(&format!("/debug/explain?from={from}&to={to}"))
}

fn explain(demo: &Demo) -> anyhow::Result<String> {
    for (from, expected) in [("shop/cart", false), ("shop/frontend", true)] {
        let answer = explained(demo, from, "shop/payments:80")?;
        let says = answer["verdict"] == "allowed";
        let real = scenario::call(&demo.lab, from, "http://payments/")?["ok"] == true;
        ensure!(says == real, "{from} → payments: explain says {}, traffic says {real}", answer["verdict"]);
        ensure!(says == expected, "{from} → payments is {}", answer["verdict"]);
        if !expected {
            let inbound = &answer["endpoints"][0]["inbound"];
            ensure!(inbound["policy"] == POLICY && inbound["rule"] == 0, "explain names {inbound}");
        }
    }
    Ok(format!("asked of the proxies themselves: cart denied by {POLICY} rule 0, frontend allowed; traffic agrees"))
}

fn strict(demo: &Demo) -> anyhow::Result<String> {
    let before = scenario::call(&demo.lab, "office/clerk", "http://catalog.shop/")?;
    ensure!(before["ok"] == true, "PERMISSIVE takes plaintext, but clerk was answered {before}");
    demo.lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    let after = scenario::call(&demo.lab, "office/clerk", "http://catalog.shop/")?;
    ensure!(after["ok"] != true, "plaintext was answered {after}");
    let mesh = scenario::call(&demo.lab, "shop/frontend", "http://catalog/")?;
    ensure!(mesh["ok"] == true, "mutual TLS was answered {mesh}");
    Ok("clerk, who is not in the mesh: answered before, reset after; frontend: answered".into())
}

fn wrong_identity(demo: &Demo) -> anyhow::Result<String> {
    let ip = demo.lab.pod_ip("shop", "catalog-0")?;
    let (to, target) = (format!("{ip}:15008"), format!("{ip}:8080"));
    let ca = demo.lab.paths().ca().display().to_string();
    let dial = |identity: &str| -> anyhow::Result<Value> {
        let argv = ["lab", "dial", &to, "--connect", &target, "--ca-dir", &ca, "--identity", identity];
        Ok(serde_json::from_str(&demo.lab.exec_ok("office/clerk", &argv)?)?)
    };
    let right = dial("spiffe://cluster.local/ns/office/sa/clerk")?;
    ensure!(right["status"] == 200, "a right certificate must be let in, or the refusal proves nothing: {right}");
    let wrong = dial("spiffe://elsewhere.example/ns/office/sa/clerk")?;
    ensure!(wrong["status"].is_null(), "a certificate of another trust domain was answered {wrong}");
    Ok("a hand-made tunnel with a certificate of another trust domain gets no answer; one of ours does".into())
}

fn both_ways(demo: &Demo) -> anyhow::Result<String> {
    for (from, url, expected) in [
        ("shop/frontend", "http://cart/", true),
        ("shop/frontend", "http://catalog/", true),
        ("shop/frontend", "http://payments/", true),
        ("shop/cart", "http://catalog/", true),
        ("shop/cart", "http://payments/", false),
        ("office/clerk", "http://cart.shop/", false),
    ] {
        let answer = scenario::call(&demo.lab, from, url)?;
        ensure!((answer["ok"] == true) == expected, "{from} → {url}: expected {expected}, got {answer}");
    }
    Ok("six pairs of client and service, four allowed and two not, all as written".into())
}

fn outage(demo: &Demo) -> anyhow::Result<String> {
    let lab = &demo.lab;
    let kept = lab.load("shop/frontend", &["http://payments/"], 20.0, &["--keep-alive"])?;
    let fresh = lab.load("shop/frontend", &["http://cart/", "http://catalog/"], 20.0, &[])?;
    lab.kill("control", "KILL")?;
    std::thread::sleep(OUTAGE);
    let least = usize::try_from(OUTAGE.as_secs() * 10)?;
    let (kept, fresh) = (kept.finish()?, fresh.finish()?);
    scenario::all_well(&kept, least)?;
    scenario::all_well(&fresh, least)?;
    lab.restart("control")?;
    Ok(format!("control killed for {} s: {} requests, none failed", OUTAGE.as_secs(), kept.len() + fresh.len()))
}
