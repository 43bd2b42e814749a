//! The `tulle` command: what the mesh is, what it would do, and what is wrong with a folder of manifests. Besides,
//! `control rotate` and `control revoke`, which work on the CA directory.
//!
//! It asks a running control plane over HTTP, or reads a folder itself with `--files`, through the same source and
//! translation. `explain` and `status` show what the node proxies say of themselves and therefore need a running mesh.
//! Exit codes: 0 done, 1 something is wrong, 2 wrong usage or not in this version; `explain` tells its verdict by more.

mod egress;
mod fetch;
mod install;
mod local;
mod probe;
mod render;
mod revoke;
mod rotate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;
use serde_json::Value;

pub use probe::probe;
pub use revoke::revoke;
pub use rotate::rotate;

/// Tulle, a service mesh without sidecars.
#[derive(Debug, Parser)]
#[command(name = "tulle", version)]
pub struct Cli {
    /// The control plane's HTTP address.
    #[arg(long, env = "TULLE_CONTROL", default_value = "http://127.0.0.1:15014", global = true)]
    control: String,
    /// Read this folder of manifests instead of asking a control plane.
    #[arg(long, global = true)]
    files: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, default_value = "table", global = true)]
    output: Output,
    /// The kubeconfig of the cluster, for `install` and `uninstall`. Else KUBECONFIG, ~/.kube/config, or the pod's own account.
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig.
    #[arg(long, global = true)]
    context: Option<String>,
    #[command(subcommand)]
    command: Command,
}

/// Formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Nodes, capture of their pods, versions, problems.
    Status,
    /// Lists what is published.
    Get {
        /// What to list.
        kind: Kind,
        /// Only of this namespace.
        #[arg(short, long)]
        namespace: Option<String>,
    },
    /// What would happen to a connection, or to one request, as the proxies of both ends decide it now. Exit code: 0 it is
    /// allowed, or nobody authorises it; 3 it is denied; 4 some of the endpoints allow it; 1 it cannot be found out.
    Explain {
        /// `ns/pod`, `ns/deployment`, or the address of a client outside the mesh.
        from: String,
        /// `ns/service[:port]`, `ns/pod:port` or `ip:port`.
        to: String,
        /// What carries it; what is not TCP is judged by NetworkPolicies alone.
        #[arg(long, default_value = "tcp")]
        transport: Transport,
        /// Address family to dial; else the target's first address.
        #[arg(long)]
        family: Option<Family>,
        #[command(flatten)]
        request: RequestFlags,
    },
    /// Checks the manifests of `--files DIR`; exit code 1 if something is wrong.
    Check,
    /// Who talked to what outside the cluster, of namespaces labelled tulle.dev/egress, since the proxies started.
    Egress {
        /// Only of this namespace.
        #[arg(short, long)]
        namespace: Option<String>,
        /// Print the EgressPolicies that would allow exactly what was seen in this namespace, as YAML to be reviewed.
        #[arg(long, value_name = "NAMESPACE", conflicts_with = "namespace")]
        policy: Option<String>,
    },
    /// Installs Tulle into a cluster, or upgrades it: the same objects as the Helm chart, without Helm.
    Install(Box<install::Install>),
    /// Takes Tulle away: releases all pods, cleans the nodes, deletes the objects.
    Uninstall(Box<install::Uninstall>),
}

/// A request to explain; without any of these, the connection.
#[derive(Debug, clap::Args)]
struct RequestFlags {
    /// Method of a request to explain [GET, if another part of a request is given].
    #[arg(long)]
    method: Option<String>,
    /// Its path, with query [/].
    #[arg(long)]
    path: Option<String>,
    /// Its host [the name of the target].
    #[arg(long)]
    host: Option<String>,
    /// A header of it, `name: value`; may come several times.
    #[arg(long)]
    header: Vec<String>,
    /// Its token, for `authorization: Bearer`; `@FILE` reads it from there, and keeps it out of the list of processes.
    #[arg(long)]
    token: Option<String>,
}

impl RequestFlags {
    /// As part of the query.
    fn query(&self) -> Result<String, Failure> {
        let mut headers = self.header.clone();
        if let Some(token) = &self.token {
            let token = match token.strip_prefix('@') {
                Some(file) => std::fs::read_to_string(file)
                    .map_err(|error| Failure::wrong(format!("--token: cannot read {file}: {error}")))?,
                None => token.clone(),
            };
            headers.push(format!("authorization: Bearer {}", token.trim()));
        }
        let lines = (!headers.is_empty()).then(|| headers.join("\n"));
        let parts = [("method", &self.method), ("path", &self.path), ("host", &self.host), ("headers", &lines)];
        let given = parts.iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        Ok(given.map(|(name, value)| format!("&{name}={}", fetch::escape(value))).collect())
    }
}

/// What carries a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Transport {
    Tcp,
    Udp,
    Sctp,
}

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    V4,
    V6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Workloads,
    Services,
    Policies,
    NetworkPolicies,
    TrustBundles,
    Nodes,
    Conditions,
    Certificates,
}

/// A failure in words for standard error, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    pub(crate) fn wrong(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    fn unsupported(text: impl Into<String>) -> Self {
        Self { code: 2, text: text.into() }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok((text, code)) => {
            // A closed pipe (`| head`) is not an error worth words.
            let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            ExitCode::from(code)
        }
        Err(failure) => {
            eprintln!("tulle: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn run(cli: &Cli) -> Result<(String, u8), Failure> {
    let print = |value: &Value, table: fn(&Value) -> String| match cli.output {
        Output::Table => Ok(table(value)),
        Output::Json => Ok(format!("{value:#}\n")),
        Output::Yaml => {
            serde_saphyr::to_string(value).map_err(|error| Failure::wrong(format!("cannot write YAML: {error}")))
        }
    };
    match &cli.command {
        Command::Status => {
            let status = live(cli, "status", "/debug/status")?;
            Ok((print(&status, render::status)?, 0))
        }
        Command::Explain { from, to, transport, family, request } => {
            let mut path = format!("/debug/explain?from={}&to={}", fetch::escape(from), fetch::escape(to));
            path.push_str(match transport {
                Transport::Tcp => "",
                Transport::Udp => "&transport=udp",
                Transport::Sctp => "&transport=sctp",
            });
            path.push_str(match family {
                None => "",
                Some(Family::V4) => "&family=v4",
                Some(Family::V6) => "&family=v6",
            });
            path.push_str(&request.query()?);
            let answer = live(cli, "explain", &path)?;
            Ok((print(&answer, render::explain)?, exit_code(&answer)))
        }
        Command::Get { kind, namespace } => {
            let list = get(cli, *kind, namespace.as_deref())?;
            Ok((print(&list, table_of(*kind))?, 0))
        }
        Command::Check => {
            let Some(dir) = &cli.files else {
                return Err(Failure::unsupported("check needs --files DIR"));
            };
            let report = local::check(dir)?;
            let good = report["errors"] == 0;
            Ok((print(&report, render::check)?, u8::from(!good)))
        }
        Command::Egress { namespace, policy } => {
            let status = live(cli, "egress", "/debug/status")?;
            if let Some(namespace) = policy {
                return Ok((egress::policies(&status, namespace), 0));
            }
            Ok((print(&egress::talks(&status, namespace.as_deref()), egress::table)?, 0))
        }
        Command::Install(options) => Ok((install::install(options, &place(cli))?, 0)),
        Command::Uninstall(options) => Ok((install::uninstall(options, &place(cli))?, 0)),
    }
}

/// Which cluster is meant.
fn place(cli: &Cli) -> install::Where<'_> {
    install::Where { kubeconfig: cli.kubeconfig.as_deref(), context: cli.context.as_deref() }
}

/// The exit code that tells a verdict; a word of another version is not known.
fn exit_code(answer: &Value) -> u8 {
    let refuses = |one: &Value| one["status"].as_u64().is_none_or(|status| status >= 400);
    match answer["verdict"].as_str() {
        Some("allowed" | "plain") => 0,
        Some("answered") => match answer["request"]["answers"].as_array() {
            Some(answers) if !answers.iter().any(refuses) => 0,
            _ => 3,
        },
        Some("denied" | "refused") => 3,
        Some("partly") => 4,
        _ => 1,
    }
}

fn live(cli: &Cli, command: &str, path: &str) -> Result<Value, Failure> {
    if cli.files.is_some() {
        return Err(Failure::unsupported(format!(
            "{command} asks the running proxies, so it needs --control and not --files"
        )));
    }
    fetch::get(&cli.control, path)
}

fn get(cli: &Cli, kind: Kind, namespace: Option<&str>) -> Result<Value, Failure> {
    let value = match (kind, &cli.files) {
        (Kind::Nodes, _) => live(cli, "get nodes", "/debug/nodes")?,
        (Kind::Certificates, _) => {
            return Ok(certificates(&live(cli, "get certificates", "/debug/status")?, namespace));
        }
        (Kind::Conditions, Some(dir)) => local::conditions(dir)?,
        (Kind::Conditions, None) => fetch::get(&cli.control, "/debug/conditions")?,
        (_, Some(dir)) => local::resources(dir)?,
        (_, None) => fetch::get(&cli.control, "/debug/resources")?,
    };
    let Value::Array(list) = value else {
        return Ok(value);
    };
    let wanted = |item: &Value| match kind {
        Kind::Workloads => item["resource"]["workload"].is_object(),
        Kind::Services => item["resource"]["service"].is_object(),
        Kind::Policies => item["type"] == "Authorization",
        Kind::NetworkPolicies => item["type"] == "NetworkPolicy",
        Kind::TrustBundles => item["type"] == "TrustBundle",
        _ => true,
    };
    let here = |item: &Value| {
        let of = [
            &item["namespace"],
            &item["resource"]["namespace"],
            &item["resource"]["workload"]["namespace"],
            &item["resource"]["service"]["namespace"],
        ];
        namespace.is_none_or(|namespace| of.iter().any(|value| **value == namespace))
    };
    let mut list: Vec<Value> = list.into_iter().filter(|item| wanted(item) && here(item)).collect();
    if kind == Kind::Services && cli.files.is_none() {
        let traffic = fetch::get(&cli.control, "/debug/traffic")?;
        for item in &mut list {
            let service = &item["resource"]["service"];
            let name = |key: &str| service[key].as_str().unwrap_or_default();
            let seen = traffic[format!("{}/{}", name("namespace"), name("hostname"))].clone();
            item["traffic"] = seen;
        }
    }
    Ok(Value::Array(list))
}

fn certificates(status: &Value, namespace: Option<&str>) -> Value {
    let mut list = Vec::new();
    for (node, state) in status["nodes"].as_object().into_iter().flatten() {
        for certificate in state["status"]["certificates"].as_array().into_iter().flatten() {
            let mut one = certificate.clone();
            one["node"] = Value::from(node.as_str());
            let identity = one["identity"].as_str().unwrap_or_default().to_owned();
            if namespace.is_none_or(|n| identity.contains(&format!("/ns/{n}/"))) {
                list.push(one);
            }
        }
    }
    Value::Array(list)
}

fn table_of(kind: Kind) -> fn(&Value) -> String {
    match kind {
        Kind::Workloads => render::workloads,
        Kind::Services => render::services,
        Kind::Policies => render::policies,
        Kind::NetworkPolicies => render::network_policies,
        Kind::TrustBundles => render::trust_bundles,
        Kind::Nodes => render::nodes,
        Kind::Conditions => render::conditions,
        Kind::Certificates => render::certificates,
    }
}
