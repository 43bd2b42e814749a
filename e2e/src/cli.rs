//! The `lab` program: arguments to calls of the library, and its answers to text for people.
//!
//! Exit codes: 0 as wanted, 1 not, with what is missing on standard error; `exec` passes the command's own. Limits: no
//! decisions here.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use clap::Args;
use clap::Parser;
use clap::Subcommand;

use crate::bench;
use crate::cluster;
use crate::demo;
use crate::demo_kube;
use crate::dial;
use crate::exec;
use crate::forge;
use crate::impostor;
use crate::interop;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::netns::NetNs;
use crate::rootless;
use crate::shop;
use crate::sniff;
use crate::soak;
use crate::state::Paths;
use crate::state::View;
use crate::supervise;

/// A cluster in network namespaces, for trying Tulle without Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct State {
    /// Directory of the lab's state [default: /run/tulle-lab, or $XDG_RUNTIME_DIR/tulle-lab for a user].
    #[arg(long)]
    state: Option<PathBuf>,
}

impl State {
    fn dir(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(Paths::default_dir)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a lab with the manifests below a directory, and wait until all of it runs.
    Up(Up),
    /// Run a command in a pod, on a node or in control's place.
    Exec {
        #[command(flatten)]
        state: State,
        /// namespace/pod, namespace/deployment, node-N, control or fabric.
        place: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Apply manifests and wait until they are in force.
    Apply {
        #[command(flatten)]
        state: State,
        /// File, or `-` for standard input.
        file: PathBuf,
        /// Seconds, or with a unit: 30s, 2m.
        #[arg(long, default_value = "60s", value_parser = duration)]
        timeout: Duration,
    },
    /// Delete an object and wait until that is in force.
    Delete {
        #[command(flatten)]
        state: State,
        /// Kind, in any case.
        kind: String,
        /// namespace/name, or name for kinds without a namespace.
        name: String,
        /// Seconds, or with a unit.
        #[arg(long, default_value = "60s", value_parser = duration)]
        timeout: Duration,
    },
    /// Print the log of control, node-N, lab, or namespace/pod.
    Logs {
        #[command(flatten)]
        state: State,
        /// Component.
        component: String,
    },
    /// Show what runs.
    Status {
        #[command(flatten)]
        state: State,
        /// `table` or `json`.
        #[arg(short, long, default_value = "table")]
        output: String,
    },
    /// Send a signal to control, node-N or namespace/pod.
    Kill {
        #[command(flatten)]
        state: State,
        /// Component.
        component: String,
        /// KILL, TERM, STOP, …
        #[arg(long, default_value = "KILL")]
        signal: String,
    },
    /// Start control or node-N again after it has ended.
    Start {
        #[command(flatten)]
        state: State,
        /// Component.
        component: String,
    },
    /// Replace the proxy of node-N while it serves: a new process takes its listeners over, the old one drains.
    Replace {
        #[command(flatten)]
        state: State,
        /// node-N.
        component: String,
    },
    /// End the lab and remove its state.
    Down {
        #[command(flatten)]
        state: State,
        /// Leave the logs.
        #[arg(long)]
        keep_logs: bool,
    },
    /// Measure the mesh beside no mesh, and prove that it did the work.
    Bench(bench::Options),
    /// Churn for a long time; nothing may grow, no verdict may be wrong.
    Soak(soak::Options),
    /// A process of the bench inside a pod.
    #[command(hide = true)]
    BenchAgent {
        #[command(subcommand)]
        agent: bench::Agent,
    },
    /// The lab's own process.
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        state: PathBuf,
    },
    /// Say whether this machine can run a lab.
    #[command(hide = true)]
    Check,
    /// Dial a tunnel by hand.
    #[command(hide = true)]
    Dial(dial::Options),
    /// Answer tunnels as somebody else.
    #[command(hide = true)]
    Impostor(impostor::Options),
    /// Send a frame that says what it likes.
    #[command(hide = true)]
    Forge(forge::Options),
    /// Show what the mesh does, step by step, and prove each.
    Demo(demo::Options),
    /// Show what the mesh does on a real cluster, step by step, and prove each.
    DemoKube(demo_kube::Options),
    /// Run our proxies and another ztunnel in one mesh, and prove what each does with the other.
    Interop(interop::Options),
    /// A real Kubernetes cluster on this machine.
    Cluster {
        #[command(subcommand)]
        command: cluster::cli::Command,
    },
    /// Capture a link until standard input ends, and say what was seen.
    #[command(hide = true)]
    Sniff(sniff::Options),
}

#[derive(Debug, Args)]
struct Up {
    #[command(flatten)]
    state: State,
    /// Directory with manifests; it is watched for changes.
    dir: PathBuf,
    /// Number of nodes.
    #[arg(long, default_value_t = 2)]
    nodes: u16,
    /// Directory with the programs `control` and `ztunnel` [default: that of lab].
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Time until everything must run: seconds, or with a unit.
    #[arg(long, default_value = "60s", value_parser = duration)]
    timeout: Duration,
    /// Variable of a component: control:NAME=VALUE, ztunnel:NAME=VALUE, node-1:NAME=VALUE.
    #[arg(long, value_parser = component_env)]
    env: Vec<(String, String, String)>,
    /// Without control and ztunnel.
    #[arg(long, hide = true)]
    no_mesh: bool,
}

/// Runs the program; also as `shop`, by its name.
pub fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if PathBuf::from(&name).file_name().is_some_and(|name| name == "shop") {
        return shop::main(std::env::args_os());
    }
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Up(options) => up(options),
        Command::Exec { state, place, argv } => match exec::exec(&state.dir(), &place, &argv)? {},
        Command::Apply { state, file, timeout } => {
            let text = match file.as_os_str() == "-" {
                true => std::io::read_to_string(std::io::stdin())?,
                false => std::fs::read_to_string(&file)
                    .map_err(|error| anyhow::anyhow!("{} cannot be read: {error}", file.display()))?,
            };
            let missing = Lab::attach(&state.dir())?.try_apply(&file.display().to_string(), &text, timeout)?;
            Ok(report(&missing, "applied"))
        }
        Command::Delete { state, kind, name, timeout } => {
            let missing = Lab::attach(&state.dir())?.try_delete(&kind, &name, timeout)?;
            Ok(report(&missing, "deleted"))
        }
        Command::Logs { state, component } => {
            let path = Paths(state.dir()).log(&component.replace('/', "_"));
            let mut file = std::fs::File::open(&path)
                .map_err(|error| anyhow::anyhow!("{}: {error}; `lab status` lists components", path.display()))?;
            std::io::copy(&mut file, &mut std::io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { state, output } => {
            let view = Lab::attach(&state.dir())?.view()?;
            match output.as_str() {
                "json" => println!("{}", serde_json::to_string_pretty(&view)?),
                "table" => print!("{}", table(&view)),
                other => anyhow::bail!("{other} is no output; choose table or json"),
            }
            Ok(if view.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Kill { state, component, signal } => {
            Lab::attach(&state.dir())?.kill(&component, &signal)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Start { state, component } => {
            Lab::attach(&state.dir())?.restart(&component)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Replace { state, component } => {
            Lab::attach(&state.dir())?.replace(&component)?;
            println!("a new process serves {component}; the old one drains");
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { state, keep_logs } => {
            Lab::attach(&state.dir())?.down(keep_logs)?;
            println!("the lab at {} is down", state.dir().display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench(options) => bench::main(&options),
        Command::Soak(options) => soak::main(&options),
        Command::BenchAgent { agent } => {
            bench::agent(&agent)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Supervise { state } => {
            rootless::enter_new()?;
            supervise::run(&state)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check => {
            rootless::enter_new()?;
            let dir = std::env::temp_dir().join(format!("tulle-lab-check-{}", std::process::id()));
            std::fs::create_dir(&dir)?;
            let made = NetNs::create(&dir, "check").map(drop);
            let _ = std::fs::remove_dir_all(&dir);
            made?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Dial(options) => {
            dial::main(&options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Impostor(options) => {
            impostor::main(&options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Forge(options) => {
            forge::main(&options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo(options) => Ok(if demo::main(&options)? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Command::DemoKube(options) => {
            Ok(if demo_kube::main(&options)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Interop(options) => Ok(if interop::main(&options)? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Command::Cluster { command } => {
            cluster::cli::main(command)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Sniff(options) => {
            sniff::main(&options)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn up(options: Up) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let mut config = LabConfig {
        dir: Some(options.dir.clone()),
        nodes: options.nodes,
        bin_dir: options.bin_dir,
        state: Some(options.state.dir()),
        timeout: options.timeout,
        mesh: !options.no_mesh,
        ..LabConfig::default()
    };
    for (component, name, value) in options.env {
        config = config.env(&component, &name, &value);
    }
    anyhow::ensure!(options.dir.is_dir(), "{} is not a directory", options.dir.display());
    let seconds = move || format!("{:5.1} s", began.elapsed().as_secs_f64());
    println!("{}  {} nodes at {}", seconds(), options.nodes, options.state.dir().display());
    let lab = Lab::start(&config, false)?;
    let missing = lab.settle(options.timeout, &mut |text| println!("{}  {text}", seconds()))?;
    let view = lab.view()?;
    lab.leave();
    print!("\n{}", table(&view));
    Ok(report(&missing, &format!("up after {}", seconds().trim())))
}

fn report(missing: &[String], done: &str) -> ExitCode {
    if missing.is_empty() {
        println!("{done}");
        return ExitCode::SUCCESS;
    }
    eprintln!("not everything is as wanted:");
    missing.iter().for_each(|line| eprintln!("  {line}"));
    ExitCode::FAILURE
}

/// The view for people.
pub fn table(view: &View) -> String {
    let mut rows = vec![["PLACE", "NODE", "ADDRESS", "CAPTURE", "STATE"].map(str::to_owned)];
    for component in [&view.control].into_iter().chain(&view.nodes) {
        let state = match (component.pid, component.exited) {
            _ if !view.mesh => "no mesh".to_owned(),
            (Some(pid), _) => format!("running ({pid})"),
            (None, Some(code)) => format!("ended ({code})"),
            (None, None) => "not started".to_owned(),
        };
        rows.push([component.name.clone(), String::new(), first(&component.addresses), String::new(), state]);
    }
    for pod in &view.pods {
        let node = pod.node.clone().unwrap_or_else(|| "outside".into());
        let state = if pod.ready { "ready" } else { "not ready" };
        let name = format!("{}/{}", pod.namespace, pod.name);
        rows.push([name, node, first(&pod.addresses), pod.capture.clone(), state.to_owned()]);
    }
    let widths: Vec<usize> = (0..5).map(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or_default()).collect();
    let mut text: String = rows
        .iter()
        .map(|row| {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            format!("{}\n", cells.join("  ").trim_end())
        })
        .collect();
    view.warnings.iter().for_each(|warning| text.push_str(&format!("warning: {warning}\n")));
    view.missing.iter().for_each(|missing| text.push_str(&format!("missing: {missing}\n")));
    text
}

fn first(addresses: &[String]) -> String {
    addresses.first().cloned().unwrap_or_default()
}

fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text {
        _ if text.ends_with("ms") => (text.trim_end_matches("ms"), 0.001),
        _ if text.ends_with('s') => (text.trim_end_matches('s'), 1.0),
        _ if text.ends_with('m') => (text.trim_end_matches('m'), 60.0),
        _ => (text, 1.0),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a time such as 60s or 2m"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

fn component_env(text: &str) -> Result<(String, String, String), String> {
    let parts = text.split_once(':').and_then(|(component, rest)| Some((component, rest.split_once('=')?)));
    let (component, (name, value)) = parts.ok_or_else(|| format!("{text:?} is not COMPONENT:NAME=VALUE"))?;
    Ok((component.to_owned(), name.to_owned(), value.to_owned()))
}
