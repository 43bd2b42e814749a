//! Our proxies beside a real Istio ztunnel in one mesh, under our control: who talks to whom, as whom, and who may not.
//!
//! Node 1 runs ours with rules of its own, node 2 the other program under a CNI agent that the lab plays, and node 3 ours
//! again in that program's place: the same agent, the same variables, the same command line. Every claim is checked at
//! both ends, by what each proxy recorded itself and by the bytes on the link. Limits: the program that `--peer` names is
//! somebody else's and is not built here; without one there is nothing to show, and that is an error.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::Context as _;
use anyhow::ensure;
use serde_json::Value;

use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::scenario;
use crate::scenario::PATIENCE;

/// Arguments of `lab interop`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The other ztunnel's program.
    #[arg(long, env = "PEER_ZTUNNEL")]
    peer: Option<PathBuf>,
}

/// A node's client and server, both accounts of namespace `shop`, and whose proxy it has.
struct Node {
    number: u16,
    client: &'static str,
    server: &'static str,
    proxy: &'static str,
}

const NODES: [Node; 3] = [
    Node { number: 1, client: "web", server: "cart", proxy: "ours" },
    Node { number: 2, client: "desk", server: "till", proxy: "theirs" },
    Node { number: 3, client: "van", server: "yard", proxy: "ours in its place" },
];

type Step = (&'static str, fn(&Lab) -> anyhow::Result<String>);

const STEPS: [Step; 6] = [
    ("every client reaches every server, and both ends prove who they are", every_pair),
    ("bytes that are sent first by the server, and half-closed connections, pass", raw_bytes),
    ("nothing but TLS crosses the link of the other program's node", nothing_in_clear),
    ("a DENY policy holds at whoever has the server", denied),
    ("a connection that a new policy forbids is ended at whoever has the server", cut),
    ("under STRICT nobody without an identity is let in", strict),
];

/// Shows all of it; true when every claim held.
///
/// # Errors
/// If there is no peer, or no mesh came up.
pub fn main(options: &Options) -> anyhow::Result<bool> {
    let Some(peer) = options.peer.as_deref().filter(|path| !path.as_os_str().is_empty()) else {
        anyhow::bail!("PEER_ZTUNNEL names no program; build Istio's ztunnel and say where it is: PEER_ZTUNNEL=<path>");
    };
    ensure!(peer.is_file(), "PEER_ZTUNNEL names {}, which is no file", peer.display());
    println!("Starting a node of ours, one of {}, and one of ours in its place …", peer.display());
    let lab = Lab::up(config(peer))?;
    let mut held = 0;
    for (claim, show) in STEPS {
        let (sign, detail) = match show(&lab) {
            Ok(detail) => ("✓", detail),
            Err(error) => ("✗", format!("{error:#}")),
        };
        held += usize::from(sign == "✓");
        println!("{sign} {claim}\n    {detail}");
    }
    println!("{held} of {} claims held.", STEPS.len());
    if held < STEPS.len() {
        let kept = std::env::temp_dir().join(format!("tulle-interop-{}", std::process::id()));
        keep_logs(&lab, &kept)?;
        println!("Logs are kept in {}.", kept.display());
    }
    Ok(held == STEPS.len())
}

fn keep_logs(lab: &Lab, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(lab.paths().logs())?.flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn config(peer: &Path) -> LabConfig {
    let mut text = scenario::namespace("shop", true) + &scenario::namespace("plain", false);
    text += &scenario::client("plain", "guest", 1);
    for Node { number, client, server, .. } in NODES {
        text += &scenario::client("shop", client, number);
        text += &scenario::server("shop", server, server, number);
        text += &scenario::service("shop", server);
    }
    let mut config = LabConfig { nodes: 3, ..LabConfig::of(&text) };
    config.handed.extend(["node-2".to_owned(), "node-3".to_owned()]);
    config.programs = BTreeMap::from([("node-2".to_owned(), peer.to_path_buf())]);
    // The lab's agent does not redirect names.
    for node in ["node-2", "node-3"] {
        config = config.env(node, "ISTIO_META_DNS_CAPTURE", "false");
    }
    config
}

/// Every client with every server of another node.
fn pairs() -> impl Iterator<Item = (&'static Node, &'static Node)> {
    NODES.iter().flat_map(|from| NODES.iter().map(move |to| (from, to))).filter(|(from, to)| from.number != to.number)
}

/// The line of an access log about a connection between two accounts, seen from one side.
fn recorded(lab: &Lab, node: u16, from: &Node, to: &Node, direction: &str) -> anyhow::Result<()> {
    let source = format!("src.identity=\"spiffe://cluster.local/ns/shop/sa/{}\"", from.client);
    let destination = format!("dst.identity=\"spiffe://cluster.local/ns/shop/sa/{}\"", to.server);
    let direction = format!("direction=\"{direction}\"");
    let component = format!("node-{node}");
    // Ours writes identities without quotes, since they have no spaces.
    let plain = [source.replace('"', ""), destination.replace('"', "")];
    eventually(&format!("{component} recorded {} to {}", from.client, to.server), PATIENCE, || {
        let found = [[&source, &destination], [&plain[0], &plain[1]]].iter().any(|[source, destination]| {
            !scenario::log_lines(lab, &component, &[source, destination, &direction]).is_empty()
        });
        if found { Ok(()) } else { Err("no such line") }
    })
}

fn every_pair(lab: &Lab) -> anyhow::Result<String> {
    let mut count = 0;
    for (from, to) in pairs() {
        let url = format!("http://{}.shop/", to.server);
        let reports = scenario::calls(lab, &format!("shop/{}", from.client), &url, &["--count", "20"])?;
        let which = || format!("{} ({}) to {} ({})", from.client, from.proxy, to.server, to.proxy);
        scenario::all_well(&reports, 20).with_context(which)?;
        recorded(lab, from.number, from, to, "outbound").with_context(which)?;
        recorded(lab, to.number, from, to, "inbound").with_context(which)?;
        count += 1;
    }
    Ok(format!("{count} pairs, 20 requests each; each pair in the records of both nodes with both identities"))
}

fn raw_bytes(lab: &Lab) -> anyhow::Result<String> {
    for (from, to) in pairs() {
        let word = scenario::marker();
        let target = format!("{}.shop:9000", to.server);
        let argv = ["shop", "tcp", &target, "--json", "--send", &word];
        let output = lab.exec(&format!("shop/{}", from.client), &argv)?;
        scenario::all_well(&scenario::json_lines(&output.stdout), 1)
            .with_context(|| format!("{} ({}) to {} ({})", from.client, from.proxy, to.server, to.proxy))?;
    }
    Ok("each pair greeted and echoed".to_owned())
}

fn nothing_in_clear(lab: &Lab) -> anyhow::Result<String> {
    let word = scenario::marker();
    let sniffer = lab.sniff("node-2", &[&word])?;
    for (from, to) in pairs().filter(|(from, to)| from.number == 2 || to.number == 2) {
        let url = format!("http://{}.shop/", to.server);
        let more = ["--data", &word, "--count", "10"];
        scenario::all_well(&scenario::calls(lab, &format!("shop/{}", from.client), &url, &more)?, 10)?;
    }
    let seen = sniffer.finish()?;
    let least = 4 * 10 * 2 * word.len() as u64;
    ensure!(seen.markers[&word] == 0, "the payload can be read: {seen:?}");
    ensure!(seen.tls.server_hellos_other == 0 && seen.tls.not_tls == 0, "something else than TLS 1.3: {seen:?}");
    ensure!(seen.tls.encrypted_bytes >= least, "too little crossed: {seen:?}");
    Ok(format!("{} bytes in TLS records, TLS 1.3 only, no word of the payload", seen.tls.encrypted_bytes))
}

fn principal(client: &str) -> String {
    format!("cluster.local/ns/shop/sa/{client}")
}

fn denied(lab: &Lab) -> anyhow::Result<String> {
    for to in &NODES {
        let from = NODES.iter().find(|from| from.number != to.number).context("one node")?;
        let rules = format!("[{{from: [{{source: {{principals: ['{}']}}}}]}}]", principal(from.client));
        let policy = format!("no-{}", from.client);
        lab.apply_yaml(&scenario::authorization("shop", &policy, to.server, "DENY", &rules))?;
        let url = format!("http://{}.shop/", to.server);
        await_refusal(lab, from.client, &url).with_context(|| format!("at {} ({})", to.server, to.proxy))?;
        let named = format!("shop/{policy}");
        scenario::await_log(lab, &format!("node-{}", to.number), &[&named, from.client])?;
        let other = NODES.iter().find(|it| it.number != to.number && it.number != from.number).context("two nodes")?;
        scenario::all_well(&scenario::calls(lab, &format!("shop/{}", other.client), &url, &[])?, 1)?;
        lab.delete("AuthorizationPolicy", &named)?;
        scenario::reaches(lab, &format!("shop/{}", from.client), &url)?;
    }
    Ok("refused at each of the three, recorded with the policy's name; others pass; lifted with it".to_owned())
}

/// The other program does not say when a policy is in force.
fn await_refusal(lab: &Lab, client: &str, url: &str) -> anyhow::Result<()> {
    eventually(&format!("{client} is refused at {url}"), PATIENCE, || {
        let report = scenario::call(lab, &format!("shop/{client}"), url).map_err(|error| error.to_string())?;
        if report["ok"] == true { Err(format!("it was answered: {report}")) } else { Ok(()) }
    })
}

fn cut(lab: &Lab) -> anyhow::Result<String> {
    for to in &NODES {
        let from = NODES.iter().find(|from| from.number != to.number).context("one node")?;
        let target = format!("{}.shop:9000", to.server);
        let mut held = scenario::hold_to(lab, &format!("shop/{}", from.client), &target)?;
        // For the whole namespace: the other program asks its live connections again when a policy changes, and not when
        // a workload gets one.
        lab.apply_yaml(&format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-more, namespace: shop}}\n\
             spec: {{action: DENY, rules: [{{from: [{{source: {{principals: ['{}']}}}}]}}]}}\n",
            principal(from.client)
        ))?;
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(held.report()));
        let last: Value = told.recv_timeout(PATIENCE).with_context(|| {
            format!("the connection from {} ({}) to {} ({}) goes on", from.client, from.proxy, to.server, to.proxy)
        })??;
        ensure!(last["kind"] != "open", "at {} ({}) the connection goes on: {last}", to.server, to.proxy);
        lab.delete("AuthorizationPolicy", "shop/no-more")?;
    }
    Ok("ended at each of the three".to_owned())
}

fn strict(lab: &Lab) -> anyhow::Result<String> {
    for to in &NODES {
        let url = format!("http://{}.shop/", to.server);
        scenario::reaches(lab, "plain/guest", &url).with_context(|| format!("PERMISSIVE at {}", to.server))?;
    }
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    for to in &NODES {
        let url = format!("http://{}.shop/", to.server);
        eventually(&format!("the guest is refused at {}", to.server), PATIENCE, || {
            let report = scenario::call(lab, "plain/guest", &url).map_err(|error| error.to_string())?;
            if report["ok"] == true { Err(format!("{}: {report}", to.proxy)) } else { Ok(()) }
        })?;
    }
    for (from, to) in pairs() {
        let url = format!("http://{}.shop/", to.server);
        scenario::all_well(&scenario::calls(lab, &format!("shop/{}", from.client), &url, &[])?, 1)?;
    }
    Ok("the guest was let in before and is refused at each of the three; the mesh's own clients pass".to_owned())
}
