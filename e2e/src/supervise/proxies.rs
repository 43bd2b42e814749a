//! The node proxies of a lab: started, told their pods, and asked what they made of them.
//!
//! There are two ways to do it. Ours reads a file of pods, installs its rules itself and shows its state. A proxy made
//! for Istio's CNI agent is handed its pods by one ([`zds`]), which installs the rules, and says no more than whether
//! it is ready. The rest of the lab does not see which it is. Limits: a proxy that is handed its pods cannot say why it
//! is not ready but in its own words.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use crate::plan::Pod;
use crate::state::Config;
use crate::state::Paths;
use crate::supervise::mesh;
use crate::supervise::proc::Tree;
use crate::supervise::process::Process;
use crate::zds;
use crate::zds::Handed;

/// Every node's proxy, by number of the node.
#[derive(Debug, Default)]
pub struct Proxies {
    of: BTreeMap<u16, Proxy>,
    /// What agents see of their nodes.
    processes: BTreeMap<u16, Tree>,
}

#[derive(Debug)]
struct Proxy {
    process: Process,
    /// It is handed its pods.
    agent: Option<zds::Agent>,
    /// Processes that it has replaced, which carry their last connections.
    before: Vec<Process>,
}

impl Proxies {
    /// Starts the proxy of a node, and its agent if it needs one and there is none. Fails when it runs already.
    pub fn start(&mut self, config: &Config, paths: &Paths, node: u16, netns: &Path) -> anyhow::Result<()> {
        let before = self.of.get_mut(&node);
        let runs = before.as_ref().is_some_and(|proxy| proxy.process.ended_with().is_none());
        anyhow::ensure!(!runs, "node-{node} runs already");
        let handed = config.handed.contains(&format!("node-{node}"));
        // The agent outlives the proxy, as on a real node.
        let (agent, draining) = match before {
            Some(proxy) => (proxy.agent.take(), std::mem::take(&mut proxy.before)),
            None => (None, Vec::new()),
        };
        let agent = match agent {
            None if handed => Some(zds::Agent::start(&paths.agent_socket(node))?),
            agent => agent,
        };
        let process = mesh::start_ztunnel(config, paths, node, netns)?;
        self.of.insert(node, Proxy { process, agent, before: draining });
        Ok(())
    }

    /// Starts another proxy beside a running one, which drains once the new one has taken its listeners.
    pub fn replace(&mut self, config: &Config, paths: &Paths, node: u16, netns: &Path) -> anyhow::Result<()> {
        let runs = |process: &Process| process.ended_with().is_none();
        let proxy = self.of.get_mut(&node).with_context(|| format!("node-{node} was never started"))?;
        // The one that serves may be one from before, whose successor died.
        let running = runs(&proxy.process) || proxy.before.iter().any(runs);
        anyhow::ensure!(running, "node-{node} does not run; start it");
        let new = mesh::start_ztunnel(config, paths, node, netns)?;
        proxy.before.push(std::mem::replace(&mut proxy.process, new));
        Ok(())
    }

    /// Process of a node's proxy.
    pub fn process(&self, node: u16) -> Option<&Process> {
        self.of.get(&node).map(|proxy| &proxy.process)
    }

    /// Whether a node's proxy runs.
    pub fn runs(&self, node: u16) -> bool {
        self.process(node).is_some_and(|process| process.pid().is_some())
    }

    /// Whether any proxy runs.
    pub fn any_runs(&self) -> bool {
        self.of.values().any(|proxy| proxy.process.pid().is_some())
    }

    /// Notices ended processes; true when there is a new one.
    pub fn observe(&mut self) -> bool {
        let mut ended = false;
        for proxy in self.of.values_mut() {
            let ran = proxy.process.pid().is_some();
            ended |= ran && proxy.process.exited().is_some();
            proxy.before.retain_mut(|process| process.exited().is_none());
        }
        ended
    }

    /// Tells a node its pods; each comes with its namespace and whether it is to be captured. An agent that asks the API
    /// server is told nothing, and finds each pod's process.
    pub fn tell<'a>(
        &mut self,
        config: &Config,
        paths: &Paths,
        node: u16,
        pods: impl Iterator<Item = (&'a Pod, &'a PathBuf, bool)>,
    ) -> anyhow::Result<()> {
        let Some(agent) = self.of.get(&node).and_then(|proxy| proxy.agent.as_ref()) else {
            if config.api.as_ref().is_some_and(|api| api.agent.is_some()) {
                let processes = pods.map(|(pod, netns, _)| (pod.uid.as_str(), netns));
                return self.processes.entry(node).or_default().show(&paths.proc(node), processes);
            }
            return mesh::write_pods(paths, node, pods);
        };
        let handed = pods.filter(|(.., enrolled)| *enrolled).map(|(pod, netns, _)| {
            let handed = zds::Pod {
                name: pod.name.clone(),
                namespace: pod.namespace.clone(),
                account: pod.account.clone(),
                netns: netns.clone(),
            };
            (pod.uid.clone(), handed)
        });
        agent.set(handed.collect());
        Ok(())
    }

    /// What is known of the capture of a node's pods; none when nobody answers.
    pub fn captures(&self, node: u16, netns: &Path) -> Option<Captures> {
        let proxy = self.of.get(&node).filter(|proxy| proxy.process.pid().is_some())?;
        match &proxy.agent {
            Some(agent) => Some(Captures::Handed(agent.handed())),
            None => mesh::node_status(netns).ok().map(Captures::Status),
        }
    }

    /// Why a node's proxy is not ready; none when it is.
    pub fn unready(&self, node: u16, netns: &Path) -> Option<String> {
        let proxy = self.of.get(&node).filter(|proxy| proxy.process.pid().is_some());
        let Some(proxy) = proxy else {
            return Some(format!("the proxy of node-{node} does not run; see logs/node-{node}.log"));
        };
        let problem = match proxy.agent {
            Some(_) => mesh::node_ready(netns),
            None => mesh::node_status(netns).map(|status| match status["ready"] == true {
                true => Ok(()),
                false => Err(status["pending"].to_string()),
            }),
        };
        match problem {
            Ok(Ok(())) => None,
            Ok(Err(pending)) => Some(format!("node-{node} is not ready: {pending}")),
            Err(error) => Some(format!("node-{node} does not answer: {error:#}")),
        }
    }

    /// The processes, to be ended; the agents end here.
    pub fn into_processes(self) -> impl Iterator<Item = Process> {
        self.of.into_values().flat_map(|proxy| proxy.before.into_iter().chain([proxy.process]))
    }
}

/// What a node knows of the capture of its pods.
#[derive(Debug)]
pub enum Captures {
    /// Status of a proxy that captures by itself.
    Status(Value),
    /// By uid: how far the agent has come.
    Handed(BTreeMap<String, Handed>),
}

impl Captures {
    /// `Uncaptured`, `Pending`, `Captured` or `Failed`.
    pub fn of(&self, uid: &str) -> String {
        let capture = match self {
            Self::Status(status) => mesh::capture_of(status, uid).0,
            Self::Handed(handed) => match handed.get(uid) {
                Some(Handed::Pending) => "Pending",
                Some(Handed::Captured) => "Captured",
                Some(Handed::Failed(_)) => "Failed",
                None => "",
            },
        };
        if capture.is_empty() { "Uncaptured".to_owned() } else { capture.to_owned() }
    }
}
