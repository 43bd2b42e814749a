//! The pods' hands: namespaces and links made and unmade, processes started in them, readiness read off the kernel.
//!
//! Many pods are made at once: links of a node in one transaction, ends in parallel. Limits: init containers and
//! lifecycle hooks are not run, probes are not sent; a pod is ready when its processes live and its declared TCP ports
//! listen.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;

use crate::address;
use crate::address::Pair;
use crate::manifest;
use crate::netns::NetNs;
use crate::objects::Facts;
use crate::place::Placement;
use crate::plan::Pod;
use crate::plan::Spot;
use crate::state::Paths;
use crate::state::replace;
use crate::supervise::process::Process;
use crate::supervise::process::Start;
use crate::supervise::process::listens;
use crate::topology;

/// Time a pod's processes get to end by themselves; Kubernetes gives 30 s, and tests are in a hurry.
pub const GRACE: Duration = Duration::from_secs(3);

/// Annotation of outside hosts: names, by commas, under which the DNS server knows them.
const HOSTNAMES: &str = "lab.tulle.dev/hostnames";

/// A pod that exists.
#[derive(Debug)]
pub struct Running {
    /// What it should be.
    pub plan: Pod,
    /// None: it lives in its node's namespace.
    netns: Option<NetNs>,
    netns_path: PathBuf,
    processes: Vec<(String, Process)>,
    /// What is known of it.
    pub facts: Facts,
    /// Whether the node was told to capture it.
    pub told_enrolled: bool,
    /// The node's word: `Uncaptured`, `Pending`, `Captured`, `Failed`.
    pub capture: String,
    /// For an egress gateway: the program, and what it is told.
    pub mesh: Option<(PathBuf, BTreeMap<String, String>)>,
}

impl Running {
    /// Link to its network namespace.
    pub fn netns_path(&self) -> &PathBuf {
        &self.netns_path
    }

    /// Whether its processes may start: at once outside the mesh, after capture inside.
    pub fn may_start(&self) -> bool {
        !self.told_enrolled || self.capture == "Captured"
    }

    /// Starts its processes. A command that does not exist finishes the pod, as an image that cannot run would.
    pub fn start(&mut self, paths: &Paths) -> Result<(), String> {
        self.facts.started = true;
        let placement = self.placement(paths);
        let several = self.plan.containers.len() > 1;
        for container in &self.plan.containers {
            if container.argv.is_empty() {
                continue;
            }
            let component = match several {
                true => format!("{}_{}_{}", self.plan.namespace, self.plan.name, container.name),
                false => format!("{}_{}", self.plan.namespace, self.plan.name),
            };
            let (mut env, mut argv) = (self.env(), container.argv.clone());
            if let Some((program, told)) = &self.mesh {
                env.extend(told.clone());
                argv.iter_mut()
                    .take(1)
                    .filter(|word| *word == "ztunnel")
                    .for_each(|word| *word = program.display().to_string());
            }
            env.extend(container.env.clone());
            let start =
                Start { argv: &argv, env: &env, bin: &paths.bin(), placement: &placement, log: &paths.log(&component) };
            match Process::start(&start) {
                Ok(process) => self.processes.push((container.name.clone(), process)),
                Err(error) => {
                    // 127: what a shell says of a command that it cannot find.
                    self.facts.finished = Some(127);
                    return Err(format!("Pod {}/{}: {error:#}", self.plan.namespace, self.plan.name));
                }
            }
        }
        Ok(())
    }

    /// Where its processes run.
    pub fn placement(&self, paths: &Paths) -> Placement {
        Placement {
            netns: Some(self.netns_path.clone()),
            etc: Some(paths.etc(&self.plan.namespace, &self.plan.name)),
            hostname: Some(self.plan.name.clone()),
        }
    }

    fn env(&self) -> BTreeMap<String, String> {
        let addresses = self.plan.spot.addresses();
        let node = self.plan.spot.node().map(|node| format!("node-{node}")).unwrap_or_default();
        [
            ("HOME", "/".to_owned()),
            ("HOSTNAME", self.plan.name.clone()),
            ("POD_NAME", self.plan.name.clone()),
            ("POD_NAMESPACE", self.plan.namespace.clone()),
            ("POD_IP", addresses.v4.to_string()),
            ("NODE_NAME", node),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Brings the facts up to date with the processes; true when they changed.
    pub fn observe(&mut self) -> bool {
        let before = self.facts.clone();
        if !self.facts.started || self.facts.finished == Some(127) {
            return false;
        }
        let exits: Vec<Option<i32>> = self.processes.iter_mut().map(|(_, process)| process.exited()).collect();
        if !exits.is_empty() && exits.iter().all(Option::is_some) {
            self.facts.finished = exits.into_iter().flatten().max_by_key(|code| code.unsigned_abs());
            self.facts.ready = false;
            return self.facts != before;
        }
        let all_live = exits.iter().all(Option::is_none);
        let ports: Vec<u16> = self
            .plan
            .containers
            .iter()
            .filter(|container| !container.argv.is_empty())
            .flat_map(|c| c.ports.clone())
            .collect();
        let pid = self.processes.first().and_then(|(_, process)| process.pid());
        // Once it listens it counts as listening while it lives: reading the tables walks every socket of the machine.
        self.facts.ready =
            all_live && (self.facts.ready || ports.is_empty() || pid.is_some_and(|pid| listens(pid, &ports)));
        self.facts != before
    }

    /// Processes by container.
    pub fn pids(&self) -> BTreeMap<String, u32> {
        self.processes.iter().filter_map(|(name, process)| Some((name.clone(), process.pid()?))).collect()
    }

    /// Logs of its processes.
    pub fn logs(&self) -> Vec<PathBuf> {
        self.processes.iter().map(|(_, process)| process.log().to_path_buf()).collect()
    }

    /// Asks the processes to end; [`Running::end`] waits.
    pub fn ask_to_end(&self) {
        self.processes.iter().for_each(|(_, process)| process.ask_to_end());
    }

    /// Waits for the processes until `deadline` and kills the rest.
    pub fn end(&mut self, deadline: Instant) {
        self.processes.iter_mut().for_each(|(_, process)| process.end(deadline));
    }
}

/// Makes namespaces, links and files of new pods.
pub fn create(paths: &Paths, fabric: &NetNs, nodes: &[NetNs], plans: Vec<Pod>) -> anyhow::Result<Vec<Running>> {
    let mut made = Vec::new();
    let mut scripts: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut ends: Vec<(PathBuf, String)> = Vec::new();
    for plan in plans {
        let running = create_netns(paths, nodes, plan)?;
        let path = running.netns_path.clone();
        match running.plan.spot {
            Spot::Node { node, index } => {
                let host = nodes.get(usize::from(node) - 1).context("a pod on a node that does not exist")?.path();
                let script = scripts.entry(host.to_path_buf()).or_default();
                script.push_str(&topology::pod_host_script(node, index, &path));
                ends.push((path, topology::pod_script(node, index)));
            }
            Spot::Outside { index } => {
                let script = scripts.entry(fabric.path().to_path_buf()).or_default();
                script.push_str(&topology::outside_fabric_script(index, &path));
                ends.push((path, topology::outside_script(index, nodes.len() as u16)));
            }
            Spot::Host { .. } => {}
        }
        write_etc(paths, &running.plan)?;
        made.push(running);
    }
    // Links first: the ends exist only then.
    in_parallel(scripts.into_iter().collect())?;
    in_parallel(ends)?;
    Ok(made)
}

fn create_netns(paths: &Paths, nodes: &[NetNs], plan: Pod) -> anyhow::Result<Running> {
    let (netns, netns_path) = match plan.spot {
        Spot::Host { node } => {
            let host = nodes.get(usize::from(node) - 1).context("a pod on a node that does not exist")?;
            (None, host.path().to_path_buf())
        }
        _ => {
            let netns = NetNs::create(&paths.netns(), &format!("{}_{}", plan.namespace, plan.name))?;
            topology::sysctl(&netns, &topology::SYSCTL_ALL)?;
            let path = netns.path().to_path_buf();
            (Some(netns), path)
        }
    };
    Ok(Running {
        plan,
        netns,
        netns_path,
        processes: Vec::new(),
        facts: Facts::default(),
        told_enrolled: false,
        capture: "Uncaptured".into(),
        mesh: None,
    })
}

/// Names under which hosts outside the cluster are known, and their addresses.
pub fn hosts<'a>(pods: impl Iterator<Item = &'a Running>) -> Vec<(String, Pair)> {
    let outside = pods.filter(|pod| pod.plan.is_outside());
    outside
        .flat_map(|pod| {
            let names = manifest::strings(&pod.plan.manifest, "/metadata/annotations").remove(HOSTNAMES);
            let names: Vec<String> = names.unwrap_or_default().split(',').map(|name| name.trim().to_owned()).collect();
            names.into_iter().filter(|name| !name.is_empty()).map(|name| (name, pod.plan.spot.addresses()))
        })
        .collect()
}

/// Removes the link of a pod that has ended; its namespace goes with the value.
pub fn unlink(fabric: &NetNs, nodes: &[NetNs], pod: &Running) {
    let (netns, interface) = match pod.plan.spot {
        Spot::Node { node, index } => match nodes.get(usize::from(node) - 1) {
            Some(host) => (host.path(), topology::pod_interface(index)),
            None => return,
        },
        Spot::Outside { index } => (fabric.path(), format!("x{index}")),
        Spot::Host { .. } => return,
    };
    debug_assert!(pod.netns.is_some());
    if let Err(error) = topology::ip(netns, &format!("link del {interface}\n")) {
        tracing::warn!("the link of {}/{} stays: {error:#}", pod.plan.namespace, pod.plan.name);
    }
}

fn write_etc(paths: &Paths, plan: &Pod) -> anyhow::Result<()> {
    let dir = paths.etc(&plan.namespace, &plan.name);
    std::fs::create_dir_all(&dir)?;
    let addresses = plan.spot.addresses();
    let hosts = format!(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost\n{} {name}\n{} {name}\n",
        addresses.v4,
        addresses.v6,
        name = plan.name
    );
    let resolv = match plan.spot.node() {
        Some(node) => format!(
            "search {}.svc.cluster.local svc.cluster.local cluster.local\nnameserver {}\noptions ndots:5 timeout:2 attempts:3\n",
            plan.namespace,
            address::gateway(node).v4
        ),
        None => "# No DNS outside the cluster.\n".to_owned(),
    };
    replace(&dir.join("hosts"), &hosts)?;
    replace(&dir.join("resolv.conf"), &resolv)?;
    Ok(())
}

/// Runs `ip` scripts in their namespaces, a few at a time: as many as a small machine runs at once anyway.
pub fn in_parallel(scripts: Vec<(PathBuf, String)>) -> anyhow::Result<()> {
    const AT_ONCE: usize = 4;
    for chunk in scripts.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                chunk.iter().map(|(netns, script)| scope.spawn(|| topology::ip(netns, script))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that ran ip panicked"))))
                .collect::<anyhow::Result<Vec<()>>>()
        })?;
    }
    Ok(())
}
