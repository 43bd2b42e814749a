//! What scenario tests share: whether a lab can run here, a small world to put promises to the test in, and readers of
//! what clients and proxies report.
//!
//! A scenario that cannot run is a failure where `CI` is set, and a loud skip elsewhere. Limits: the world is two nodes
//! with clients on the first and servers on the second, so that what they say crosses the node link.

use std::fmt::Write as _;
use std::io::BufRead as _;
use std::io::BufReader;
use std::process::ChildStdout;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::Load;
use crate::lab::Running;
use crate::lab::programs_dir;
use crate::topology;

/// Long enough for a slow machine under load; nothing waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a lab, or says why this machine cannot and returns none.
///
/// # Panics
/// When it cannot and `CI` is set, or when the lab could start and did not.
#[allow(clippy::panic)]
pub fn lab(config: LabConfig) -> Option<Lab> {
    if let Err(why) = possible() {
        assert!(std::env::var_os("CI").is_none(), "no lab on this machine: {why}");
        eprintln!("SKIPPED: no lab on this machine: {why}");
        return None;
    }
    match Lab::up(config) {
        Ok(lab) => Some(lab),
        Err(error) => panic!("the lab did not come up: {error:#}"),
    }
}

/// Whether these programs are here; says which one is missing.
///
/// # Panics
/// When one is missing and `CI` is set.
pub fn has_tools(names: &[&str]) -> bool {
    names.iter().all(|name| {
        let found = Command::new("sh").args(["-c", &format!("PATH=$PATH:/usr/sbin command -v {name}")]).output();
        let found = found.is_ok_and(|output| output.status.success());
        if !found {
            assert!(std::env::var_os("CI").is_none(), "{name} is missing; run .ci/tools.sh");
            eprintln!("SKIPPED: {name} is missing; run .ci/tools.sh");
        }
        found
    })
}

/// Whether namespaces can be made and the tools are there.
pub fn possible() -> Result<(), String> {
    if let Some(missing) = topology::missing_tools() {
        return Err(missing);
    }
    let program = programs_dir().map_err(|error| error.to_string())?.join("lab");
    let output = Command::new(program).arg("check").output().map_err(|error| format!("lab cannot be run: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

/// A namespace; `mesh` labels it.
pub fn namespace(name: &str, mesh: bool) -> String {
    let labels = if mesh { ", labels: {tulle.dev/mesh: enabled}" } else { "" };
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: '{name}'{labels}}}\n")
}

/// A Node; `labels` is YAML in flow style, without braces.
pub fn node(number: u16, labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{number}, labels: {{{labels}}}}}\n")
}

/// A pod with an own service account that serves HTTP on 8080 and raw TCP on 9000; `app` is its only label.
pub fn server(namespace: &str, name: &str, app: &str, node: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: {app}\n  containers:\n  - name: main\n    image: shop\n\
         \x20   command: [shop, serve, --name, {app}, --http, '8080', --tcp, '9000']\n\
         \x20   ports: [{{containerPort: 8080}}, {{containerPort: 9000}}]\n"
    )
}

/// A pod from which tests run commands.
pub fn client(namespace: &str, name: &str, node: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: node-{node}, serviceAccountName: {name}, containers: [{{name: main, image: none}}]}}\n"
    )
}

/// A Service over the pods of `app`: HTTP on 80, raw TCP on 9000.
pub fn service(namespace: &str, app: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {app}, namespace: {namespace}}}\n\
         spec:\n  selector: {{app: {app}}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: raw, port: 9000}}]\n"
    )
}

/// The usual world: `shop/web` (client) and `shop/other` (another client) on node 1, `shop/cart` behind a Service on
/// node 2, and `plain/guest`, which is never in the mesh, on node 1.
pub fn world(mesh: bool) -> String {
    let mut text = namespace("shop", mesh);
    for part in [
        client("shop", "web", 1),
        client("shop", "other", 1),
        server("shop", "cart", "cart", 2),
        service("shop", "cart"),
        namespace("plain", false),
        client("plain", "guest", 1),
    ] {
        text.push_str(&part);
    }
    text
}

/// An AuthorizationPolicy for the pods of `app`; `rules` is YAML in flow style.
pub fn authorization(namespace: &str, name: &str, app: &str, action: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: {action}, rules: {rules}}}\n"
    )
}

/// A NetworkPolicy; `spec` is YAML in flow style.
pub fn network_policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n"
    )
}

/// A PeerAuthentication of a namespace.
pub fn peer_authentication(namespace: &str, mode: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// One `shop call`; its report, failed or not.
pub fn call(lab: &Lab, from: &str, url: &str) -> anyhow::Result<Value> {
    Ok(calls(lab, from, url, &[])?.into_iter().next().unwrap_or_default())
}

/// `shop call` with further arguments; one report a request.
pub fn calls(lab: &Lab, from: &str, url: &str, more: &[&str]) -> anyhow::Result<Vec<Value>> {
    let mut argv = vec!["shop", "call", url, "--json"];
    argv.extend(more);
    let output = lab.exec(from, &argv)?;
    let reports = json_lines(&output.stdout);
    anyhow::ensure!(!reports.is_empty(), "{argv:?} in {from} said: {}", String::from_utf8_lossy(&output.stderr));
    Ok(reports)
}

/// Waits until a call from there goes well.
pub fn reaches(lab: &Lab, from: &str, url: &str) -> anyhow::Result<()> {
    eventually(&format!("{from} reaches {url}"), PATIENCE, || match call(lab, from, url) {
        Ok(report) if report["ok"] == true => Ok(()),
        other => Err(format!("{other:?}")),
    })
}

/// The JSON lines of an output; others are skipped.
pub fn json_lines(bytes: &[u8]) -> Vec<Value> {
    String::from_utf8_lossy(bytes).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// A host `net/api` outside the cluster with these names, which serves requests and bytes.
pub fn outside(hostnames: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: net, annotations: {{lab.tulle.dev/outside: 'true'}}}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: api\n  namespace: net\n\
         \x20 annotations: {{lab.tulle.dev/hostnames: '{hostnames}'}}\n\
         spec:\n  containers:\n  - name: main\n    image: shop\n\
         \x20   command: [shop, serve, --name, api, --http, '8080', --tcp, '9000']\n    ports: [{{containerPort: 8080}}]\n"
    )
}

/// A load in a pod whose lost questions and connections are failures. A resolver that hears nothing asks again after 5 s, and a
/// lost question would hide in a slow request; here it asks again only after the client has given up.
pub fn strict_load(lab: &Lab, from: &str, targets: &[&str], rate: f64, more: &[&str]) -> anyhow::Result<Load> {
    let more = [&["--timeout-ms", "25000"], more].concat();
    Load::start(targets, rate, &more, |argv| lab.spawn(from, &[&["env", "RES_OPTIONS=timeout:30"], argv].concat()))
}

/// Reports that are not `ok`, for a message.
pub fn failures(reports: &[Value]) -> Vec<&Value> {
    reports.iter().filter(|report| report["ok"] != true).collect()
}

/// Asserts on reports that all went well, and that there were at least `least`.
///
/// # Errors
/// The first failures, as they were reported.
pub fn all_well(reports: &[Value], least: usize) -> anyhow::Result<()> {
    let failed = failures(reports);
    let mut text = String::new();
    for report in failed.iter().take(3) {
        let _ = write!(text, "\n  {report}");
    }
    anyhow::ensure!(failed.is_empty(), "{} of {} failed:{text}", failed.len(), reports.len());
    anyhow::ensure!(reports.len() >= least, "only {} requests were made, expected {least}", reports.len());
    Ok(())
}

/// Lines of a proxy's log that hold all of `words`.
pub fn log_lines(lab: &Lab, component: &str, words: &[&str]) -> Vec<String> {
    let log = lab.log(component);
    log.lines().filter(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned).collect()
}

/// Waits for such a line.
pub fn await_log(lab: &Lab, component: &str, words: &[&str]) -> anyhow::Result<String> {
    eventually(&format!("the log of {component} has a line with {words:?}"), PATIENCE, || {
        log_lines(lab, component, words).pop().ok_or_else(|| "none".to_owned())
    })
}

/// The value of a field of a log line; empty: it has none.
pub fn field(line: &str, name: &str) -> String {
    let Some((_, rest)) = line.split_once(&format!(" {name}=")) else { return String::new() };
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next().unwrap_or_default().to_owned(),
        None => rest.split(' ').next().unwrap_or_default().to_owned(),
    }
}

/// The status of a pod on its node.
pub fn pod_status(lab: &Lab, node: &str, pod: &str) -> anyhow::Result<Value> {
    let status = lab.node_admin(node, "/status")?;
    let pods = status["pods"].as_array().cloned().unwrap_or_default();
    Ok(pods.into_iter().find(|entry| entry["name"] == pod).unwrap_or_default())
}

/// A client's connection that stays open.
pub struct Held {
    running: Running,
    lines: BufReader<ChildStdout>,
}

/// A connection to cart with a line back and forth every 50 ms; returns once it is open.
pub fn hold(lab: &Lab, from: &str) -> anyhow::Result<Held> {
    hold_to(lab, from, "cart.shop:9000")
}

/// The same to another raw server.
pub fn hold_to(lab: &Lab, from: &str, target: &str) -> anyhow::Result<Held> {
    let mut running = lab.spawn(from, &["shop", "tcp", target, "--hold-ms", "50"])?;
    let stdout = running.child().and_then(|child| child.stdout.take()).context("no output")?;
    let mut held = Held { running, lines: BufReader::new(stdout) };
    let opened = held.report()?;
    anyhow::ensure!(opened["kind"] == "open", "{from} could not connect: {opened}");
    Ok(held)
}

impl Held {
    /// Its next report; blocks until there is one.
    pub fn report(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Closes it; its last report.
    pub fn finish(mut self) -> anyhow::Result<Value> {
        if let Some(child) = self.running.child() {
            drop(child.stdin.take());
        }
        self.report()
    }
}

/// A random word that no traffic holds by chance.
pub fn marker() -> String {
    format!("marker{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>())
}

/// Begins to count the packets that come to `host` from the address `source`.
pub fn count_packets(lab: &Lab, host: &str, source: &str) -> anyhow::Result<()> {
    let rules = format!(
        "table inet seen {{\n  chain in {{\n    type filter hook prerouting priority -400; policy accept;\n    ip saddr {source} counter\n  }}\n}}\n"
    );
    lab.exec_ok(host, &["sh", "-c", &format!("echo '{rules}' | PATH=$PATH:/usr/sbin nft -f -")]).map(drop)
}

/// Begins to count all packets that come to `host`, whoever says to have sent them; neighbours' talk aside.
pub fn count_all_packets(lab: &Lab, host: &str) -> anyhow::Result<()> {
    let rules = "table inet seen {\n  chain in {\n    type filter hook prerouting priority -400; policy accept;\n\
        \x20   iifname lo accept\n    icmpv6 type { 130-137, 143 } accept\n    counter\n  }\n}\n\
        table netdev seen {\n  chain in {\n    type filter hook ingress device eth0 priority 0; policy accept;\n\
        \x20   meta protocol { ip, ip6, arp } accept\n    counter\n  }\n}\n";
    lab.exec_ok(host, &["sh", "-c", &format!("echo '{rules}' | PATH=$PATH:/usr/sbin nft -f -")]).map(drop)
}

/// How many have come since.
pub fn counted_packets(lab: &Lab, host: &str) -> anyhow::Result<u64> {
    let text = lab.exec_ok(host, &["sh", "-c", "PATH=$PATH:/usr/sbin nft list ruleset"])?;
    packets(&text).with_context(|| format!("at {host}"))
}

/// What all counters of a listing by `nft` have counted together; an error if there is none.
pub fn packets(text: &str) -> anyhow::Result<u64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let counts = words.windows(2).filter(|pair| pair[0] == "packets").map(|pair| pair[1].parse::<u64>());
    let counts = counts.collect::<Result<Vec<_>, _>>()?;
    anyhow::ensure!(!counts.is_empty(), "no counter");
    Ok(counts.iter().sum())
}
