//! Control and the node proxies as the lab runs them: their command lines, tokens, pod files, and the questions the
//! lab asks them.
//!
//! The lab uses only what any orchestrator could: flags, environment, files and HTTP. Limits: every question has a
//! deadline of its own, because the thing asked may be what was just killed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use tulle_proto::names;

use crate::address;
use crate::client;
use crate::place::Placement;
use crate::plan::Pod;
use crate::state::Config;
use crate::state::Paths;
use crate::state::replace;
use crate::supervise::process::Process;
use crate::supervise::process::Start;

/// A local answer takes milliseconds; a stopped process never answers.
const ASK_TIMEOUT: Duration = Duration::from_millis(1500);

/// Starts control in its namespace.
pub fn start_control(config: &Config, paths: &Paths, netns: &Path) -> anyhow::Result<Process> {
    let mut argv = vec![program(config, "control", &["control"])?.display().to_string()];
    let source = match &config.api {
        Some(_) => "kube".to_owned(),
        None => format!("files:{}", paths.objects().display()),
    };
    argv.extend(
        [
            "serve",
            "--source",
            &source,
            "--ca-dir",
            &paths.ca().display().to_string(),
            "--tls-san",
            &address::CONTROL.v4.to_string(),
            "--tls-san",
            &address::CONTROL.v6.to_string(),
        ]
        .map(str::to_owned),
    );
    if let Some(api) = &config.api {
        argv.extend(["--kubeconfig".to_owned(), api.control.display().to_string()]);
    }
    argv.extend(config.args.get("control").cloned().unwrap_or_default());
    let mut env = BTreeMap::from([("HOME".to_owned(), "/".to_owned())]);
    env.extend(config.env.get("control").cloned().unwrap_or_default());
    Process::start(&Start {
        argv: &argv,
        env: &env,
        bin: &paths.bin(),
        placement: &Placement { netns: Some(netns.to_path_buf()), ..Placement::default() },
        log: &paths.log("control"),
    })
}

/// Has control make the token of a node; control's authority is made by whoever comes first.
pub fn write_token(config: &Config, paths: &Paths, node: u16) -> anyhow::Result<()> {
    token(config, paths, &paths.token(node), &["--node", &format!("node-{node}")])
}

/// Has control make a token into `file`.
fn token(config: &Config, paths: &Paths, file: &Path, of: &[&str]) -> anyhow::Result<()> {
    let program = program(config, "control", &["control"])?;
    let mut command = Command::new(&program);
    command.arg("token").args(of).arg("--ca-dir").arg(paths.ca());
    let output = command.output().with_context(|| format!("{} cannot be run", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "no token for {}: {}", of.join(" "), said.trim());
    replace(file, String::from_utf8_lossy(&output.stdout).trim())?;
    Ok(())
}

/// The program of an egress gateway's pod, and what it is told: control, a token of its own account, and its name.
pub fn gateway(config: &Config, paths: &Paths, pod: &Pod) -> anyhow::Result<(PathBuf, BTreeMap<String, String>)> {
    let node = format!("node-{}", pod.spot.node().unwrap_or_default());
    let file = paths.etc(&pod.namespace, &pod.name).join("token");
    let account = format!("{}/{}", pod.namespace, pod.account);
    token(config, paths, &file, &["--service-account", &account, "--node", &node])?;
    let mut env = of_control(paths);
    env.extend(
        [
            ("AUTH_TOKEN", file.display().to_string()),
            ("SERVICE_ACCOUNT", pod.account.clone()),
            ("INSTANCE_IP", pod.spot.addresses().v4.to_string()),
            ("TULLE_GATEWAY_NAME", pod.gateway.clone().unwrap_or_default()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    env.extend(config.env.get("gateway").cloned().unwrap_or_default());
    Ok((program(config, "ztunnel", &["gateway", "ztunnel"])?, env))
}

/// How proxies find control.
fn of_control(paths: &Paths) -> BTreeMap<String, String> {
    let control = format!("https://{}:{}", address::CONTROL.v4, names::PORT_CONTROL_GRPC);
    let root = paths.ca().join("root-cert.pem").display().to_string();
    [
        ("XDS_ADDRESS", control.clone()),
        ("CA_ADDRESS", control),
        ("XDS_ROOT_CA", root.clone()),
        ("CA_ROOT_CA", root),
        ("CLUSTER_ID", names::DEFAULT_CLUSTER.to_owned()),
        ("TRUST_DOMAIN", names::DEFAULT_DOMAIN.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// Starts the proxy of a node.
pub fn start_ztunnel(config: &Config, paths: &Paths, node: u16, netns: &Path) -> anyhow::Result<Process> {
    let name = format!("node-{node}");
    let handed = config.handed.contains(&name);
    // `proxy` is what a proxy made for Istio's agent calls it.
    let command = if handed { "proxy" } else { "node" };
    let mut argv = vec![program(config, "ztunnel", &[&name, "ztunnel"])?.display().to_string(), command.to_owned()];
    let mut env = of_control(paths);
    let own = [
        ("HOME", "/".to_owned()),
        ("NODE_NAME", name.clone()),
        ("AUTH_TOKEN", paths.token(node).display().to_string()),
        ("POD_NAMESPACE", names::DEFAULT_ROOT_NAMESPACE.to_owned()),
        ("POD_NAME", format!("ztunnel-{name}")),
        ("SERVICE_ACCOUNT", names::NODE_SERVICE_ACCOUNT.to_owned()),
        ("INSTANCE_IP", address::node(node).v4.to_string()),
        ("TULLE_NAME_SERVERS", address::gateway(node).v4.to_string()),
        ("TULLE_HANDOVER", paths.handover_socket(node).display().to_string()),
    ];
    env.extend(own.map(|(name, value)| (name.to_owned(), value)));
    env.extend(source_of_pods(config, paths, node, handed));
    if !handed {
        env.insert("CRL_PATH".to_owned(), paths.ca().join("crl.pem").display().to_string());
    }
    for component in ["ztunnel", &name] {
        argv.extend(config.args.get(component).cloned().unwrap_or_default());
        env.extend(config.env.get(component).cloned().unwrap_or_default());
    }
    if config.api.as_ref().is_some_and(|api| api.agent.is_some()) {
        let state = paths.agent_state(node);
        for folder in [state.join("run"), state.join("cni"), paths.proc(node)] {
            std::fs::create_dir_all(folder)?;
        }
    }
    Process::start(&Start {
        argv: &argv,
        env: &env,
        bin: &paths.bin(),
        placement: &Placement { netns: Some(netns.to_path_buf()), ..Placement::default() },
        log: &paths.log(&name),
    })
}

/// Where a proxy learns of the pods of its node.
fn source_of_pods(config: &Config, paths: &Paths, node: u16, handed: bool) -> BTreeMap<String, String> {
    let path = |path: PathBuf| path.display().to_string();
    let state = paths.agent_state(node);
    let settings = match config.api.as_ref().and_then(|api| api.agent.clone()) {
        _ if handed => vec![("INPOD_UDS", path(paths.agent_socket(node)))],
        None => vec![("TULLE_PODS", path(paths.pods_file(node)))],
        Some(kubeconfig) => vec![
            ("TULLE_CLUSTER", "on".to_owned()),
            ("KUBECONFIG", path(kubeconfig)),
            ("TULLE_PROC", path(paths.proc(node))),
            ("TULLE_RUN_DIR", path(state.join("run"))),
            ("TULLE_CNI_STATE_DIR", path(state.join("cni"))),
            ("TULLE_CNI_SOCKET", path(state.join("cni.sock"))),
        ],
    };
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn program(config: &Config, usual: &str, components: &[&str]) -> anyhow::Result<PathBuf> {
    let chosen = components.iter().find_map(|component| config.programs.get(*component));
    let path = chosen.cloned().unwrap_or_else(|| config.bin_dir.join(usual));
    anyhow::ensure!(
        path.is_file(),
        "{} does not exist; build it with `cargo build -p {usual}`, or name the directory with --bin-dir",
        path.display()
    );
    Ok(path)
}

/// One entry of the pods file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodEntry {
    uid: String,
    name: String,
    namespace: String,
    service_account: String,
    netns: PathBuf,
    ips: [String; 2],
    enrolled: bool,
    probe_ports: Vec<u16>,
}

/// Writes the pods of a node; each comes with its namespace and whether it is to be captured.
pub fn write_pods<'a>(
    paths: &Paths,
    node: u16,
    pods: impl Iterator<Item = (&'a Pod, &'a PathBuf, bool)>,
) -> anyhow::Result<()> {
    let entries: Vec<PodEntry> = pods
        .map(|(pod, netns, enrolled)| PodEntry {
            uid: pod.uid.clone(),
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.account.clone(),
            netns: netns.clone(),
            ips: pod.spot.addresses().texts(),
            enrolled,
            probe_ports: pod.probe_ports.clone(),
        })
        .collect();
    let text = serde_saphyr::to_string(&entries).context("the pods file cannot be written as YAML")?;
    let path = paths.pods_file(node);
    if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    replace(&path, &text).with_context(|| format!("{} cannot be written", path.display()))
}

/// What a node says of its pods and itself.
pub fn node_status(netns: &Path) -> anyhow::Result<Value> {
    ask(netns, names::PORT_ADMIN, "/status")
}

/// Whether a node says that it is ready, or what it still waits for.
pub fn node_ready(netns: &Path) -> anyhow::Result<Result<(), String>> {
    let address = SocketAddr::from(([127, 0, 0, 1], names::PORT_READINESS));
    let answer = client::get_in(netns, address, "/healthz/ready", ASK_TIMEOUT)?;
    Ok(if answer.status == 200 { Ok(()) } else { Err(answer.body.trim().to_owned()) })
}

/// What control has published and who has it.
pub fn control_sync(netns: &Path) -> anyhow::Result<Value> {
    ask(netns, names::PORT_CONTROL_HTTP, "/debug/sync")
}

/// How control follows each kind of object in an API server.
pub fn control_source(netns: &Path) -> anyhow::Result<Value> {
    ask(netns, names::PORT_CONTROL_HTTP, "/debug/source")
}

fn ask(netns: &Path, port: u16, path: &str) -> anyhow::Result<Value> {
    let answer = client::get_in(netns, SocketAddr::from(([127, 0, 0, 1], port)), path, ASK_TIMEOUT)?;
    anyhow::ensure!(answer.status == 200, "port {port}{path} answers {}: {}", answer.status, answer.body.trim());
    serde_json::from_str(&answer.body).with_context(|| format!("port {port}{path} does not answer JSON"))
}

/// Capture state and reason of a pod in a node's status.
pub fn capture_of<'a>(status: &'a Value, uid: &str) -> (&'a str, &'a str) {
    let pod = status["pods"].as_array().into_iter().flatten().find(|pod| pod["uid"] == uid);
    let text = |field: &str| pod.and_then(|pod| pod[field].as_str()).unwrap_or_default();
    (text("capture"), text("reason"))
}
