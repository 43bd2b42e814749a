//! What grows with the cluster: memory for each workload known and for each proxy attached, the time from an object to
//! its effect, and what the first use of an identity costs.
//!
//! Each part has a lab of its own with fresh processes, because memory that a proxy once had is in every later figure.
//! The workloads are a [`crowd`]; whether they are really known is read back from control's acknowledgements, and at the
//! end from the proxies themselves. Limits: one control, pods of the crowd do not answer.

pub(super) mod attached;
mod crowd;
mod events;
pub(super) mod identity;
mod memory;
pub(super) mod watch;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::bench::Options;
use crate::bench::TULLE;
use crate::bench::measure::WORKERS;
use crate::bench::note;
use crate::bench::proof;
use crate::bench::report::Failure;
use crate::bench::report::Report;
use crate::bench::rows;
use crate::bench::world::Mesh;
use crate::bench::world::OURS;
use crate::bench::world::THEIRS;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;

/// For a change of the crowd to reach every proxy.
const KNOWN: Duration = Duration::from_secs(120);
/// Between two looks whether it has: control writes a list of all files for each.
const LOOK: Duration = Duration::from_millis(200);

/// How much of everything.
struct Size {
    /// Workloads known, in steps; the last must be the largest.
    workloads: [usize; 2],
    /// Events of each kind.
    events: usize,
    /// Attached proxies, in two steps.
    proxies: [usize; 2],
    /// New pods of each kind.
    pods: usize,
    /// After a change, before memory is read: allocators give back after seconds.
    settle: Duration,
}

impl Size {
    fn of(options: &Options) -> Self {
        if options.quick {
            let settle = Duration::from_millis(500);
            return Self { workloads: [500, 1000], events: 10, proxies: [10, 20], pods: 4, settle };
        }
        let settle = super::measure::AFTER_CLOSE;
        Self { workloads: [10_000, 50_000], events: 200, proxies: [100, 400], pods: 32, settle }
    }
}

/// A lab with the nodes of each mesh.
struct Place {
    lab: Lab,
    meshes: Vec<(&'static str, Mesh)>,
}

impl Place {
    /// Starts a lab for these meshes; `objects` gives those of one.
    fn start(options: &Options, bin_dir: &Path, objects: impl Fn(Mesh) -> String) -> anyhow::Result<Self> {
        let meshes: Vec<(&'static str, Mesh)> = options
            .meshes()
            .into_iter()
            .map(|variant| (variant, if variant == TULLE { OURS } else { THEIRS }))
            .collect();
        let mut config = LabConfig::of(&meshes.iter().map(|(_, mesh)| objects(*mesh)).collect::<String>());
        config.bin_dir = Some(bin_dir.to_path_buf());
        for (name, value) in [("ZTUNNEL_WORKER_THREADS", WORKERS), ("RUST_LOG", "info")] {
            config = config.env("ztunnel", name, value);
        }
        let theirs = meshes.iter().filter(|(_, mesh)| *mesh == THEIRS).flat_map(|(_, mesh)| mesh.nodes);
        for node in theirs.collect::<BTreeSet<_>>() {
            config = super::measure::as_peer(config, node, options.peer.as_deref());
        }
        Ok(Self { lab: Lab::up(config)?, meshes })
    }

    /// Process of a node's proxy.
    fn proxy(&self, node: u16) -> anyhow::Result<u32> {
        let (view, name) = (self.lab.view()?, format!("node-{node}"));
        let node = view.nodes.iter().find(|it| it.name == name);
        node.and_then(|node| node.pid).with_context(|| format!("{name} has no proxy"))
    }

    /// Process of control.
    fn control(&self) -> anyhow::Result<u32> {
        self.lab.view()?.control.pid.context("control does not run")
    }

    /// Makes the crowd larger, and waits until every proxy has acknowledged all of it.
    fn grow(&self, from: usize, to: usize) -> anyhow::Result<()> {
        crowd::write(&self.lab.paths().objects(), from, to)?;
        self.wait_known(to, &BTreeSet::new())
    }

    /// Waits until control has read so much of the crowd, and these nodes besides the lab's have all of it.
    fn wait_known(&self, crowd: usize, more: &BTreeSet<String>) -> anyhow::Result<()> {
        let nodes = self.meshes.iter().flat_map(|(_, mesh)| mesh.nodes).map(|node| format!("node-{node}"));
        let nodes: BTreeSet<String> = nodes.chain(more.iter().cloned()).collect();
        eventually(&format!("{crowd} workloads are known"), KNOWN, || {
            let sync = self.lab.control_get("/debug/sync")?;
            let missing = missing(&sync, crowd, &nodes);
            if missing.is_empty() {
                return Ok(());
            }
            std::thread::sleep(LOOK);
            Err(anyhow::anyhow!(missing))
        })
    }

    /// That the proxy of a node itself says that it knows so many pods of the crowd. Asked last: a dump of everything
    /// makes a proxy larger.
    fn check_known(&self, node: u16, crowd: usize) -> anyhow::Result<String> {
        let name = format!("node-{node}");
        let dump = self.lab.node_admin(&name, "/config_dump")?;
        let count = proof::of_crowd(&dump);
        anyhow::ensure!(count == crowd, "the proxy of {name} knows {count} of {crowd} workloads");
        Ok(format!("the proxy of {name} has {count} workloads in its dump besides the lab's own"))
    }
}

/// What is missing until everybody knows the crowd; empty: nothing.
fn missing(sync: &serde_json::Value, crowd: usize, nodes: &BTreeSet<String>) -> String {
    let files = sync["files"].as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("crowd/")).count();
    if files != crowd / crowd::PER_FILE {
        return format!("control has published {files} of {} files", crowd / crowd::PER_FILE);
    }
    let generation = sync["generation"].as_u64().unwrap_or(u64::MAX);
    let behind: Vec<&str> = nodes
        .iter()
        .filter(|node| {
            let state = &sync["nodes"][node.as_str()];
            state["connected"] != true || state["acked_generation"].as_u64().unwrap_or_default() < generation
        })
        .map(String::as_str)
        .collect();
    match behind.first() {
        Some(first) => format!("{} nodes have not acknowledged generation {generation}, such as {first}", behind.len()),
        None => String::new(),
    }
}

/// Every part whose name holds `--only`.
pub(super) fn run(options: &Options, bin_dir: &Path, report: &mut Report) {
    let size = Size::of(options);
    type Part = fn(&Options, &Path, &Size, &mut Report) -> anyhow::Result<()>;
    let parts: [(&str, Part); 4] = [
        ("workloads known", memory::workloads),
        ("proxies attached", memory::proxies),
        ("events", events::run),
        ("first use of an identity", identity::run),
    ];
    for (name, part) in parts.into_iter().filter(|(name, _)| name.contains(&options.only)) {
        eprintln!("lab bench: {name}");
        if let Err(error) = part(options, bin_dir, &size, report) {
            for variant in options.meshes() {
                fail(report, name, variant, format!("{error:#}"));
            }
        }
    }
}

/// A part whose figures are not proven.
fn fail(report: &mut Report, test: &str, variant: &'static str, wrong: String) {
    report.failures.insert(Failure { test: test.to_owned(), variant, wrong });
}

/// Percentiles of times in milliseconds.
fn times(report: &mut Report, test: &str, variant: &'static str, milliseconds: &[f64]) {
    for (name, share) in rows::TIMES {
        if let Some(value) = rows::percentile(milliseconds, share) {
            note(report, test, name, variant, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::bench::scale::missing;

    #[test]
    fn a_crowd_is_known_when_its_files_are_published_and_acknowledged_by_all() {
        let nodes = ["node-1".to_owned(), "sim-1".to_owned()].into();
        let sync = |files: &[&str], acked: u64| {
            let files: serde_json::Map<_, _> = files.iter().map(|name| ((*name).to_owned(), json!("hash"))).collect();
            json!({"generation": 7, "files": files, "nodes": {
                "node-1": {"connected": true, "acked_generation": 7},
                "sim-1": {"connected": true, "acked_generation": acked}}})
        };
        let all = ["crowd/00000.yaml", "crowd/00001.yaml", "bench/pod-x.yaml"];
        assert_eq!(missing(&sync(&all, 7), 200, &nodes), "");
        assert!(missing(&sync(&all[1..], 7), 200, &nodes).contains("1 of 2 files"));
        assert!(missing(&sync(&all, 6), 200, &nodes).contains("sim-1"));
    }
}
