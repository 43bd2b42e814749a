//! Memory for each workload that a node's proxy knows, and for each proxy that is attached to control.
//!
//! Resident memory, as the kernel counts it, in processes that have done nothing else; it includes what an allocator
//! keeps of passing needs. Figures per workload are the growth between two steps, so that what every process has anyway
//! is not in them. Limits: a Service for each ten workloads is in the figure per workload.

use std::collections::BTreeSet;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use tulle_proto::names;

use crate::bench::Options;
use crate::bench::TULLE;
use crate::bench::machine;
use crate::bench::note;
use crate::bench::report::Report;
use crate::bench::rows;
use crate::bench::scale::Place;
use crate::bench::scale::Size;
use crate::bench::scale::attached::Attached;
use crate::bench::scale::crowd;
use crate::bench::scale::fail;
use crate::bench::world::Mesh;
use crate::scenario;

/// A pod on each node, so that they are nodes of the mesh.
fn objects(mesh: Mesh) -> String {
    let mut text = scenario::namespace(mesh.namespace, true);
    for (name, node) in ["near", "far"].into_iter().zip(mesh.nodes) {
        text += &scenario::client(mesh.namespace, name, node);
    }
    text
}

/// Node proxies that know ever more workloads.
pub(super) fn workloads(options: &Options, bin_dir: &Path, size: &Size, report: &mut Report) -> anyhow::Result<()> {
    let place = Place::start(options, bin_dir, objects)?;
    let mut known = 0;
    let mut before: Vec<[u64; 2]> = Vec::new();
    for step in [0].into_iter().chain(size.workloads) {
        place.grow(known, step)?;
        std::thread::sleep(size.settle);
        let test = format!("memory, {step} workloads known");
        for (index, (variant, mesh)) in place.meshes.iter().enumerate() {
            let [near, far] = mesh.nodes;
            let now = [machine::resident(place.proxy(near)?)?, machine::resident(place.proxy(far)?)?];
            for (name, bytes) in rows::RSS.into_iter().zip(now) {
                note(report, &test, name, variant, bytes as f64 / 1e6);
            }
            match before.get_mut(index) {
                None => before.push(now),
                Some(before) => {
                    // The two proxies know the same; their mean is steadier than either.
                    let grown = now.iter().sum::<u64>() as f64 - before.iter().sum::<u64>() as f64;
                    note(report, &test, rows::PER_WORKLOAD, variant, grown / 2e3 / (step - known) as f64);
                    *before = now;
                }
            }
        }
        known = step;
    }
    for (variant, mesh) in &place.meshes {
        match place.check_known(mesh.nodes[0], known) {
            Ok(line) => report.proven.push(format!("{variant}: {line}")),
            Err(error) => {
                for step in size.workloads {
                    fail(report, &format!("memory, {step} workloads known"), variant, format!("{error:#}"));
                }
            }
        }
    }
    Ok(())
}

/// Control with ever more proxies attached, at the smaller number of workloads.
pub(super) fn proxies(options: &Options, bin_dir: &Path, size: &Size, report: &mut Report) -> anyhow::Result<()> {
    let alone = Options { peer: None, ..options.clone() };
    let place = Place::start(&alone, bin_dir, objects)?;
    let crowd = size.workloads[0];
    place.grow(0, crowd)?;
    let tokens = place.lab.paths().0.join("tokens-sim");
    std::fs::write(&tokens, make_tokens(&place, size.proxies[1])?)?;
    let lab = &place.lab;
    let control = format!("https://127.0.0.1:{}", names::PORT_CONTROL_GRPC);
    let (root, tokens) = (lab.paths().ca().join("root-cert.pem").display().to_string(), tokens.display().to_string());
    let addresses = (crowd + crowd::services(crowd)).to_string();
    let argv = [
        "lab",
        "bench-agent",
        "attach",
        "--control",
        &control,
        "--root",
        &root,
        "--tokens",
        &tokens,
        "--addresses",
        &addresses,
    ];
    let mut running = lab.spawn("control", &argv)?;
    let child = running.child().context("the proxies have ended")?;
    let mut input = child.stdin.take().context("no input of the proxies")?;
    let mut output = BufReader::new(child.stdout.take().context("no output of the proxies")?);
    let pid = place.control()?;
    let mut before = (0, machine::resident(pid)?);
    for count in size.proxies {
        writeln!(input, "{count}")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        let said: Result<Attached, _> = serde_json::from_str(&line);
        if !said.is_ok_and(|said| said.proxies == count) {
            drop(input);
            anyhow::bail!(
                "{count} proxies could not be attached: {}",
                String::from_utf8_lossy(&running.finish()?.stderr).trim()
            );
        }
        // Control itself says that each has acknowledged all.
        place.wait_known(crowd, &(1..=count).map(|index| format!("sim-{index}")).collect::<BTreeSet<_>>())?;
        std::thread::sleep(size.settle);
        let now = machine::resident(pid)?;
        let test = format!("control, {count} proxies attached, {crowd} workloads");
        note(report, &test, rows::RSS_CONTROL, TULLE, now as f64 / 1e6);
        let grown = now as f64 - before.1 as f64;
        note(report, &test, rows::PER_PROXY, TULLE, grown / 1024.0 / (count - before.0) as f64);
        before = (count, now);
    }
    report.proven.push(format!(
        "control: {} simulated proxies of as many nodes held a stream each, subscribed to everything, and had acknowledged \
         {crowd} workloads",
        before.0
    ));
    Ok(())
}

/// A token on each line.
fn make_tokens(place: &Place, count: usize) -> anyhow::Result<String> {
    let mut text = String::new();
    let ca = place.lab.paths().ca().display().to_string();
    for index in 1..=count {
        let node = format!("sim-{index}");
        let token = place.lab.exec_ok("control", &["control", "token", "--ca-dir", &ca, "--node", &node])?;
        text += token.trim();
        text.push('\n');
    }
    Ok(text)
}
