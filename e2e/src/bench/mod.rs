//! `lab bench`: how fast the mesh is, beside no mesh and beside another one, in one run that proves the work was done.
//!
//! One load on every variant, then the next load, so that what else the machine does hits all alike; the order rotates,
//! rounds repeat, medians count. Everything a row claims is checked in the same run ([`proof`]), and a row that fails
//! has no figure. Limits: the generator and the server share the processors with the proxies, so rates are those of the
//! whole machine and CPU per unit of work is the steadier figure; two nodes on one machine have no wire between them.

mod agent;
mod closed;
mod machine;
mod measure;
mod paced;
mod proof;
mod report;
mod rows;
mod server;
mod work;
mod world;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

pub use agent::Agent;
pub use agent::main as agent;

use crate::bench::measure::Bench;
use crate::bench::measure::Proved;
use crate::bench::report::Failure;
use crate::bench::report::Report;
use crate::bench::rows::Values;
use crate::bench::rows::figures;
use crate::bench::work::Line;

/// No mesh.
const DIRECT: &str = "direct";
/// Ours.
const TULLE: &str = "tulle";
/// Another mesh's node proxy under our control plane.
const PEER: &str = "peer";

/// Arguments of `lab bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Rounds; the table has medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One short round: shows that everything works, its figures say little.
    #[arg(long)]
    quick: bool,
    /// Only loads whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
    /// Without the memory rows.
    #[arg(long)]
    no_memory: bool,
    /// Where all values go.
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
    /// Directory with the programs `control` and `ztunnel` [default: that of lab].
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// A ztunnel of Istio to compare with.
    #[arg(long, env = "PEER_ZTUNNEL")]
    peer: Option<PathBuf>,
}

impl Options {
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds.max(1) }
    }

    /// Warming and measuring, milliseconds.
    fn times(&self) -> (u64, u64) {
        if self.quick { (150, 400) } else { (300, 2500) }
    }
}

/// Runs the bench; success only if every proof held.
pub fn main(options: &Options) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let machine = machine::describe();
    let peer = match &options.peer {
        None => "no peer binary; PEER_ZTUNNEL names one".to_owned(),
        Some(path) => format!("{} was named, but running a peer is not supported yet", path.display()),
    };
    eprintln!("lab bench: starting a lab of two nodes");
    let bench = Bench::start(options.bin_dir.as_deref())?;
    let (warm_ms, run_ms) = options.times();
    let mut report = Report {
        machine,
        commit: commit(),
        settings: json!({
            "rounds": options.rounds(), "warm_ms": warm_ms, "run_ms": run_ms, "policies": world::POLICIES,
            "request_bytes": work::REQUEST, "response_bytes": work::RESPONSE, "workers": "default",
            "log": "default: info, a record of each connection",
        }),
        variants: vec![DIRECT, TULLE],
        peer,
        order: Vec::new(),
        values: Values::new(),
        failures: BTreeSet::new(),
        others: BTreeMap::new(),
        proven: Vec::new(),
    };
    whole_run(&mut report, bench.check_policies().map(|line| vec![line]));
    whole_run(&mut report, bench.first_contact(TULLE));
    let denied = bench.start_denied()?;
    if !options.no_memory {
        // First, while the proxies are fresh: a peak of before would be in every later figure.
        memory(&bench, options, &mut report);
    }
    let mut proved = Proved::default();
    loads(&bench, options, &mut report, &mut proved);
    whole_run(&mut report, bench.judge(&proved));
    whole_run(&mut report, bench.finish_denied(denied));
    whole_run(&mut report, bench.check_policies().map(|_| Vec::new()));
    let notes = format!("{}took: {:.0} s\n", report.notes(), began.elapsed().as_secs_f64());
    println!("{}\n{notes}", report.table());
    save(&options.json, &report)?;
    drop(bench);
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Notes what was proven, or that the whole of the mesh's rows is not.
fn whole_run(report: &mut Report, checked: anyhow::Result<Vec<String>>) {
    match checked {
        Ok(lines) => report.proven.extend(lines),
        Err(error) => {
            let wrong = format!("{error:#}");
            report.failures.insert(Failure { test: String::new(), variant: TULLE, wrong });
        }
    }
}

fn loads(bench: &Bench, options: &Options, report: &mut Report, proved: &mut Proved) {
    let (warm_ms, run_ms) = options.times();
    let tests: Vec<_> = rows::tests().into_iter().filter(|test| test.name.contains(&options.only)).collect();
    let variants = report.variants.clone();
    for round in 0..options.rounds() {
        for (index, test) in tests.iter().enumerate() {
            let mut said = format!("round {}/{} · {}", round + 1, options.rounds(), test.name);
            for at in rows::rotation(variants.len(), round, index) {
                let variant = variants[at];
                let fail = |wrong: String| Failure { test: test.name.to_owned(), variant, wrong };
                match bench.run(variant, &test.work, warm_ms, run_ms) {
                    Ok(outcome) => {
                        let found = figures(&test.work, &outcome.run);
                        if let Some((name, value)) = found.first() {
                            said += &format!(" · {variant} {value:.2} {name}");
                        }
                        for (name, value) in found {
                            note(report, test.name, name, variant, value);
                        }
                        let others = report.others.entry((test.name.to_owned(), variant)).or_default();
                        others.push(outcome.others);
                        report.failures.extend(outcome.wrong.into_iter().map(fail));
                    }
                    Err(error) => {
                        report.failures.insert(fail(format!("{error:#}")));
                    }
                }
                if round == 0 {
                    match bench.prove(variant, test, proved) {
                        Ok(wrong) => report.failures.extend(wrong.into_iter().map(fail)),
                        Err(error) => {
                            report.failures.insert(fail(format!("no proof: {error:#}")));
                        }
                    }
                }
            }
            eprintln!("{said}");
        }
    }
}

fn note(report: &mut Report, test: &str, name: &'static str, variant: &'static str, value: f64) {
    let row = (test.to_owned(), name);
    if !report.values.contains_key(&row) {
        report.order.push(row.clone());
    }
    report.values.entry(row).or_default().entry(variant).or_default().push(value);
}

/// Resident memory of both proxies with ever more idle connections, and after they are gone.
fn memory(bench: &Bench, options: &Options, report: &mut Report) {
    let mut nothing = None;
    for held in rows::HELD {
        // A short run shows the way with fewer connections.
        let held = if options.quick { held / 10 } else { held };
        let name = if held == 0 { "memory, one tunnel".to_owned() } else { format!("memory, {held} idle connections") };
        let fail = |wrong: String| Failure { test: name.clone(), variant: TULLE, wrong };
        let result = if held == 0 { bench.resident().map(|rss| (rss, vec![])) } else { bench.hold(TULLE, held) };
        match result {
            Ok((rss, wrong)) => {
                for (metric, bytes) in rows::RSS.into_iter().zip(rss) {
                    note(report, &name, metric, TULLE, bytes as f64 / 1e6);
                }
                let base = *nothing.get_or_insert(rss);
                if held > 0 {
                    for ((metric, bytes), base) in rows::PER_CONNECTION.into_iter().zip(rss).zip(base) {
                        let grown = bytes.saturating_sub(base) as f64 / 1e3 / held as f64;
                        note(report, &name, metric, TULLE, grown);
                    }
                }
                report.failures.extend(wrong.into_iter().map(fail));
            }
            Err(error) => {
                report.failures.insert(fail(format!("{error:#}")));
            }
        }
    }
    std::thread::sleep(measure::AFTER_CLOSE);
    if let Ok(rss) = bench.resident() {
        for (metric, bytes) in rows::RSS.into_iter().zip(rss) {
            note(report, "memory, 1.5 s after they closed", metric, TULLE, bytes as f64 / 1e6);
        }
    }
}

fn save(path: &Path, report: &Report) -> anyhow::Result<()> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(&report.json())?;
    std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// What `git describe` says of the working directory.
fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=10"]).output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map_or_else(|| "unknown".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `length` bytes of the marker over and over.
fn filler(marker: &str, length: usize) -> Vec<u8> {
    let marker = if marker.is_empty() { "x" } else { marker };
    marker.bytes().cycle().take(length).collect()
}

/// A line from a generator to whoever measures.
fn say(line: &Line) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(line)?)?;
    out.flush()?;
    Ok(())
}
