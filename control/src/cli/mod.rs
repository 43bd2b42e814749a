//! The `tulle` command: what the mesh is, what it would do, and what is wrong with a folder of manifests. Besides,
//! `control rotate` and `control revoke`, which work on the CA directory.
//!
//! It asks a running control plane over HTTP, of a cluster through a port-forward (`connect`), or reads a folder itself with
//! `--files`, through the same source and translation. `explain` and `status` show what the node proxies say of themselves and
//! therefore need a running mesh. `check` looks at the cluster's objects themselves.
//! Exit codes: 0 done, 1 something is wrong, 2 wrong usage or not in this version; `explain` tells its verdict by more, and `check
//! --exceptions` that there are none.

mod check;
mod connect;
mod egress;
mod fetch;
mod install;
mod kept;
mod local;
mod probe;
mod render;
mod replicas;
mod revoke;
mod rotate;

use std::cell::OnceCell;
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
    #[command(flatten)]
    flags: connect::Flags,
    /// Read this folder of manifests instead of asking a control plane.
    #[arg(long, global = true)]
    files: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, default_value = "table", global = true)]
    output: Output,
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
        /// `ns/service[:port]`, `ns/pod:port`, `ip:port`, or a name as the client would look it up, `cart` or `api.example.com:443`.
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
    /// Says what is wrong with the cluster before and after Tulle is installed, or with the manifests of `--files DIR`, and what
    /// to do about it. Exit code 1 if there is an error.
    Check(check::Flags),
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
    // One provider for everything, before the first use of TLS. A second installation could only be ours, too.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
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
    let session = Session { cli, mesh: OnceCell::new() };
    let print = |value: &Value, table: fn(&Value) -> String| match cli.output {
        Output::Table => Ok(table(value)),
        Output::Json => Ok(format!("{value:#}\n")),
        Output::Yaml => {
            serde_saphyr::to_string(value).map_err(|error| Failure::wrong(format!("cannot write YAML: {error}")))
        }
    };
    match &cli.command {
        Command::Status => {
            let status = session.live("status", "/debug/status")?;
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
            let answer = session.live("explain", &path)?;
            Ok((print(&answer, render::explain)?, exit_code(&answer)))
        }
        Command::Get { kind, namespace } => {
            let list = session.get(*kind, namespace.as_deref())?;
            Ok((print(&list, table_of(*kind))?, 0))
        }
        Command::Check(flags) => {
            if let (Some(dir), None) = (&cli.files, flags.namespace()) {
                let report = local::check(dir)?;
                let good = report["errors"] == 0;
                return Ok((print(&report, render::check)?, u8::from(!good)));
            }
            let report = check::run(cli, flags)?;
            if flags.exceptions {
                let code = if check::all_exceptions(&report).is_empty() { check::NO_EXCEPTIONS } else { 0 };
                return Ok((check::exceptions(&report), code));
            }
            let good = report["errors"] == 0;
            Ok((print(&report, check::table)?, u8::from(!good)))
        }
        Command::Egress { namespace, policy } => {
            let status = session.live("egress", "/debug/status")?;
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
    let named = cli.flags.kubeconfig.as_deref().filter(|files| !files.as_os_str().is_empty());
    install::Where { kubeconfig: named, context: cli.flags.context.as_deref() }
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

/// One command line, and control once it was asked.
struct Session<'a> {
    cli: &'a Cli,
    mesh: OnceCell<connect::Mesh>,
}

impl Session<'_> {
    fn ask(&self, path: &str) -> Result<Value, Failure> {
        if self.mesh.get().is_none() {
            // Nobody else has set it: one command runs on one thread.
            let _ = self.mesh.set(connect::Mesh::open(&self.cli.flags)?);
        }
        match self.mesh.get() {
            Some(mesh) => mesh.get(path),
            None => Err(Failure::wrong("control could not be asked")),
        }
    }

    fn live(&self, command: &str, path: &str) -> Result<Value, Failure> {
        if self.cli.files.is_some() {
            return Err(Failure::unsupported(format!(
                "{command} asks the running proxies, so it needs --control and not --files"
            )));
        }
        self.ask(path)
    }

    fn get(&self, kind: Kind, namespace: Option<&str>) -> Result<Value, Failure> {
        let value = match (kind, &self.cli.files) {
            (Kind::Nodes, _) => self.live("get nodes", "/debug/nodes")?,
            (Kind::Certificates, _) => {
                return Ok(certificates(&self.live("get certificates", "/debug/status")?, namespace));
            }
            (Kind::Conditions, Some(dir)) => local::conditions(dir)?,
            (Kind::Conditions, None) => self.ask("/debug/conditions")?,
            (_, Some(dir)) => local::resources(dir)?,
            (_, None) => self.ask("/debug/resources")?,
        };
        let Value::Array(list) = value else {
            return Ok(value);
        };
        let mut list = chosen(list, kind, namespace);
        if kind == Kind::Services && self.cli.files.is_none() {
            let traffic = self.ask("/debug/traffic")?;
            for item in &mut list {
                let service = &item["resource"]["service"];
                let name = |key: &str| service[key].as_str().unwrap_or_default();
                let seen = traffic[format!("{}/{}", name("namespace"), name("hostname"))].clone();
                item["traffic"] = seen;
            }
        }
        Ok(Value::Array(list))
    }
}

/// Those of a kind and namespace.
fn chosen(list: Vec<Value>, kind: Kind, namespace: Option<&str>) -> Vec<Value> {
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
    list.into_iter().filter(|item| wanted(item) && here(item)).collect()
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::Cli;

    /// Commands of `tulle` in the `sh` and `console` blocks of a page. Installing has tests of its own.
    fn commands(page: &str) -> Vec<String> {
        let (mut inside, mut found) = (false, Vec::new());
        for line in page.lines().map(str::trim) {
            if line.starts_with("```") {
                inside = matches!(line, "```sh" | "```console");
            } else if inside {
                // What the shell makes of quotes is one word.
                let parts = line.split('"').enumerate().map(|(at, part)| if at % 2 == 0 { part } else { "quoted" });
                let line: String = parts.collect();
                let line = line.split(['#', '|', '>']).next().unwrap_or_default();
                let command = line.split("tulle ").nth(1).filter(|_| {
                    line.starts_with("tulle ") || line.starts_with("$ tulle ") || line.contains("-- tulle ")
                });
                found.extend(command.filter(|rest| !rest.contains("install")).map(|rest| rest.trim().to_owned()));
            }
        }
        found
    }

    #[test]
    fn commands_in_the_documents_are_commands_of_this_program() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let mut number = 0;
        for entry in std::fs::read_dir(docs)
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|ext| ext == "md"))
        {
            for command in commands(&std::fs::read_to_string(entry.path()).unwrap()) {
                let words = std::iter::once("tulle").chain(command.split_whitespace());
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{}: `tulle {command}`: {}", entry.path().display(), parsed.unwrap_err());
                number += 1;
            }
        }
        assert!(number >= 15, "only {number} commands were found");
    }
}
