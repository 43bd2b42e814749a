//! The engine: what is wanted against what is, step by step, in the order that a cluster's parts would take.
//!
//! [`Engine::settle`] is the whole life of a change, top to bottom: leave, make, publish, capture, start, ready,
//! publish, wait for control and the nodes, release. Every wait shares one deadline. What is not reached is returned,
//! not hidden, and tried again every second.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::RwLock;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;

use crate::address;
use crate::dns;
use crate::eventually;
use crate::kube::LAB_PORT;
use crate::kubeproxy;
use crate::manifest;
use crate::netns::NetNs;
use crate::objects;
use crate::objects::Completed;
use crate::plan;
use crate::plan::Allocator;
use crate::plan::Pod;
use crate::plan::PodKey;
use crate::services;
use crate::state::ComponentView;
use crate::state::Config;
use crate::state::Paths;
use crate::state::PodView;
use crate::state::ServiceView;
use crate::state::View;
use crate::state::replace;
use crate::supervise::Job;
use crate::supervise::mesh;
use crate::supervise::mirror::Mirror;
use crate::supervise::pods;
use crate::supervise::pods::Running;
use crate::supervise::process::Process;
use crate::supervise::proxies::Proxies;
use crate::supervise::publish::Published;
use crate::supervise::socket::Reply;
use crate::supervise::socket::Request;
use crate::supervise::wanted::Wanted;
use crate::topology;

/// How often ended processes are noticed.
const TICK: Duration = Duration::from_millis(100);
/// How often something that was not reached is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a leaving pod waits for the nodes to forget it before it is asked to end.
const FORGET: Duration = Duration::from_secs(2);
/// How long new pods wait for control to know them before the nodes are told.
const KNOWN: Duration = Duration::from_secs(2);
/// Several files saved at once are one change.
const COALESCE: Duration = Duration::from_millis(100);

pub(super) struct Engine {
    config: Config,
    paths: Paths,
    view: Arc<Mutex<View>>,
    fabric: NetNs,
    control_ns: NetNs,
    node_ns: Vec<NetNs>,
    control: Option<Process>,
    proxies: Proxies,
    wanted: Wanted,
    warnings: Vec<String>,
    allocator: Allocator,
    pods: BTreeMap<PodKey, Running>,
    completed: Completed,
    published: Published,
    mirror: Option<Mirror>,
    rules: Vec<String>,
    zone: Arc<RwLock<dns::Zone>>,
    _dns: Vec<dns::Server>,
    missing: Vec<String>,
}

impl Engine {
    /// Makes the topology and starts control and the proxies; pods come with the first settling.
    pub(super) fn new(config: Config, paths: Paths, view: Arc<Mutex<View>>) -> anyhow::Result<Self> {
        anyhow::ensure!(
            (1..=address::NODES_MAX).contains(&config.nodes),
            "{} nodes; a lab has 1 to {}",
            config.nodes,
            address::NODES_MAX
        );
        let make = |name: &str| -> anyhow::Result<NetNs> {
            let netns = NetNs::create(&paths.netns(), name)?;
            topology::sysctl(&netns, &topology::SYSCTL_ALL)?;
            Ok(netns)
        };
        let fabric = make("fabric")?;
        let control_ns = make("control")?;
        let mut node_ns = Vec::new();
        for node in 1..=config.nodes {
            let netns = make(&format!("node-{node}"))?;
            topology::sysctl(&netns, &topology::SYSCTL_NODE)?;
            node_ns.push(netns);
        }
        let node_path = |node: u16| node_ns[usize::from(node) - 1].path().to_path_buf();
        topology::ip(fabric.path(), &topology::fabric_script(config.nodes, control_ns.path(), node_path))?;
        let mut ends = vec![(control_ns.path().to_path_buf(), topology::control_script(config.nodes))];
        for node in 1..=config.nodes {
            ends.push((node_path(node), topology::node_script(node, config.nodes)));
        }
        pods::in_parallel(ends)?;
        let zone = Arc::new(RwLock::new(dns::Zone::new()));
        let mut servers = Vec::new();
        for (netns, node) in node_ns.iter().zip(1..) {
            servers.push(dns::Server::start(netns, address::gateway(node), zone.clone())?);
        }
        let mirror = config.api.as_ref().map(|api| Mirror::connect(api, &control_ns)).transpose()?;
        let seed = format!("{}/{}", paths.0.display(), std::process::id());
        let mut engine = Self {
            allocator: Allocator::new(config.nodes, &seed),
            config,
            paths,
            view,
            fabric,
            control_ns,
            node_ns,
            control: None,
            proxies: Proxies::default(),
            wanted: Wanted::default(),
            warnings: Vec::new(),
            pods: BTreeMap::new(),
            completed: Completed::default(),
            published: Published::default(),
            mirror,
            rules: Vec::new(),
            zone,
            _dns: servers,
            missing: Vec::new(),
        };
        if let Some(dir) = engine.config.dir.clone() {
            engine.wanted.reload(&dir)?;
        }
        engine.start_mesh()?;
        engine.show();
        Ok(engine)
    }

    fn start_mesh(&mut self) -> anyhow::Result<()> {
        if !self.config.mesh {
            return Ok(());
        }
        for node in 1..=self.config.nodes {
            mesh::write_token(&self.config, &self.paths, node)?;
        }
        // Control must not see an empty cluster first: it would be one more state that nobody wanted.
        self.replan()?;
        self.publish()?;
        self.start_component("control")?;
        for node in 1..=self.config.nodes {
            self.write_pods(node)?;
            self.start_component(&format!("node-{node}"))?;
        }
        Ok(())
    }

    /// Works off changes until the lab should end.
    pub(super) fn run(&mut self, queue: &mpsc::Receiver<Job>) {
        let mut last_try = Instant::now();
        loop {
            match queue.recv_timeout(TICK) {
                Ok(Job::End) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(Job::Client(Request::Down, replies)) => {
                    let _ = replies.try_send(Reply::Done { missing: vec![] });
                    return;
                }
                Ok(Job::Client(request, replies)) => self.serve(request, &replies),
                Ok(Job::DirChanged) => {
                    std::thread::sleep(COALESCE);
                    self.reload();
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let changed = self.observe();
            let retry = !self.missing.is_empty() && last_try.elapsed() >= RETRY;
            if changed || retry {
                last_try = Instant::now();
                // One look at everything: whoever waits for it asks again in a second.
                self.settle_or_log(Duration::ZERO);
            }
        }
    }

    fn reload(&mut self) {
        let Some(dir) = self.config.dir.clone() else { return };
        match self.wanted.reload(&dir) {
            Ok(()) => self.settle_or_log(self.timeout()),
            Err(error) => tracing::warn!("{error:#}"),
        }
    }

    fn settle_or_log(&mut self, timeout: Duration) {
        match self.settle(Instant::now() + timeout, &mut |_| {}) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!("{error:#}");
                self.missing = vec![format!("{error:#}")];
                self.show();
            }
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.config.timeout_s.clamp(0.1, 3600.0))
    }

    fn serve(&mut self, request: Request, replies: &mpsc::SyncSender<Reply>) {
        let mut say = |text: String| {
            let _ = replies.try_send(Reply::Progress(text));
        };
        let result = self.change(request).and_then(|timeout_s| {
            let deadline = Instant::now() + Duration::from_secs_f64(timeout_s.clamp(0.0, 3600.0));
            self.settle(deadline, &mut say)
        });
        let reply = match result {
            Ok(()) => Reply::Done { missing: self.missing.clone() },
            Err(error) => Reply::Error(format!("{error:#}")),
        };
        let _ = replies.try_send(reply);
    }

    /// Takes a change in; returns the time that settling may take.
    fn change(&mut self, request: Request) -> anyhow::Result<f64> {
        match request {
            Request::Settle { timeout_s } => Ok(timeout_s),
            Request::Apply { origin, text, timeout_s } => {
                let objects = manifest::parse(&origin, &text)?;
                anyhow::ensure!(!objects.is_empty(), "{origin} holds no object");
                self.wanted.apply(objects);
                Ok(timeout_s)
            }
            Request::Delete { kind, namespace, name, timeout_s } => {
                self.wanted.delete(&kind, &namespace, &name)?;
                Ok(timeout_s)
            }
            Request::Start { component, program, env } => {
                if let Some(program) = program {
                    self.config.programs.insert(component.clone(), program);
                }
                self.config.env.entry(component.clone()).or_default().extend(env);
                self.start_component(&component)?;
                Ok(0.0)
            }
            Request::Replace { component, program } => {
                let node = self.node(&component)?;
                self.config.programs.extend(program.map(|program| (component, program)));
                self.proxies.replace(&self.config, &self.paths, node, self.node_ns[usize::from(node) - 1].path())?;
                self.show();
                Ok(0.0)
            }
            Request::Status | Request::Get { .. } | Request::Kill { .. } | Request::Down => {
                anyhow::bail!("not a change")
            }
        }
    }

    fn start_component(&mut self, component: &str) -> anyhow::Result<()> {
        if component == "control" {
            anyhow::ensure!(self.control.as_mut().is_none_or(|p| p.exited().is_some()), "control runs already");
            self.control = Some(mesh::start_control(&self.config, &self.paths, self.control_ns.path())?);
            self.show();
            return Ok(());
        }
        let node = self.node(component)?;
        self.proxies.observe();
        self.proxies.start(&self.config, &self.paths, node, self.node_ns[usize::from(node) - 1].path())?;
        self.show();
        Ok(())
    }

    fn node(&self, component: &str) -> anyhow::Result<u16> {
        let node = component.strip_prefix("node-").and_then(|node| node.parse().ok());
        let node = node.filter(|node| (1..=self.config.nodes).contains(node));
        node.with_context(|| format!("{component} is neither control nor a node of this lab"))
    }

    /// Notices ended processes and readiness; true when something changed.
    fn observe(&mut self) -> bool {
        let mut changed = false;
        for (key, pod) in &mut self.pods {
            if pod.observe() {
                tracing::info!("{}/{}: {:?}", key.0, key.1, pod.facts);
                changed = true;
            }
        }
        let control = self.control.as_ref().and_then(Process::pid);
        self.control.as_mut().map(Process::exited);
        let ended = self.proxies.observe();
        if ended || control != self.control.as_ref().and_then(Process::pid) {
            tracing::warn!("control or a node's proxy has ended; see `lab status`");
            self.show();
        }
        changed
    }

    /// Brings everything to what is wanted; what is not reached by `deadline` is in `missing` afterwards.
    fn settle(&mut self, deadline: Instant, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
        self.observe();
        let plans = self.retire(deadline)?;
        let made = self.make(plans)?;
        if made > 0 {
            say(format!("{made} pods made"));
        }
        self.publish()?;
        if made > 0 && self.config.mesh {
            // Control gives no certificate for a pod that it has not heard of.
            self.await_published(deadline.min(Instant::now() + KNOWN));
        }
        for node in 1..=self.config.nodes {
            self.write_pods(node)?;
        }
        self.await_capture(deadline, say)?;
        self.publish()?;
        self.start_pods(deadline, say)?;
        self.publish()?;
        let mut missing = self.await_sync(deadline);
        if missing.is_empty() && self.config.mesh {
            say("control has published, the nodes have acknowledged".to_owned());
        }
        missing.extend(self.release(deadline)?);
        missing.extend(self.unsettled_pods());
        missing.extend(self.wanted.bad());
        self.missing = missing;
        self.show();
        Ok(())
    }

    fn replan(&mut self) -> anyhow::Result<Vec<Pod>> {
        let (plans, warnings) = plan::pods(&self.wanted.objects(), &mut self.allocator, self.config.nodes)?;
        self.warnings = warnings;
        Ok(plans)
    }

    /// Ends pods that are no longer wanted, or not like this; returns the plan without them.
    fn retire(&mut self, deadline: Instant) -> anyhow::Result<Vec<Pod>> {
        let plans = self.replan()?;
        let wanted: BTreeMap<PodKey, &Pod> = plans.iter().map(|pod| (pod.key(), pod)).collect();
        let leaving: Vec<PodKey> = self
            .pods
            .iter()
            .filter(|(key, pod)| {
                wanted.get(*key).is_none_or(|new| pod.plan.must_restart(new) || pod.plan.uid != new.uid)
            })
            .map(|(key, _)| key.clone())
            .collect();
        if leaving.is_empty() {
            return Ok(plans);
        }
        for key in &leaving {
            if let Some(pod) = self.pods.get_mut(key) {
                pod.facts.leaving = true;
            }
        }
        self.publish()?;
        self.await_sync(deadline.min(Instant::now() + FORGET));
        for key in &leaving {
            self.pods[key].ask_to_end();
        }
        let grace = Instant::now() + pods::GRACE;
        for key in &leaving {
            let Some(mut pod) = self.pods.remove(key) else { continue };
            pod.end(grace);
            pods::unlink(&self.fabric, &self.node_ns, &pod);
            // The same uid in the new plan means that it was made for this pod; its successor gets another.
            if wanted.get(key).is_none_or(|new| new.uid == pod.plan.uid) {
                self.allocator.forget(key);
            }
        }
        let plans = self.replan()?;
        let pods: BTreeSet<PodKey> = plans.iter().map(Pod::key).collect();
        let services =
            self.wanted.objects().into_keys().filter(|key| key.kind == "Service").map(|key| (key.namespace, key.name));
        self.allocator.release(&pods, &services.collect());
        Ok(plans)
    }

    /// Makes new pods and updates what changed about others; returns how many are new.
    fn make(&mut self, plans: Vec<Pod>) -> anyhow::Result<usize> {
        let mut new = Vec::new();
        for plan in plans {
            match self.pods.get_mut(&plan.key()) {
                Some(pod) => pod.plan = plan,
                None => new.push(plan),
            }
        }
        let count = new.len();
        for pod in pods::create(&self.paths, &self.fabric, &self.node_ns, new)? {
            self.pods.insert(pod.plan.key(), pod);
        }
        Ok(count)
    }

    /// Tells a node its pods. A pod that labels release stays captured here until control has published that.
    fn write_pods(&mut self, node: u16) -> anyhow::Result<()> {
        if !self.config.mesh {
            return Ok(());
        }
        for pod in self.pods.values_mut() {
            pod.told_enrolled |= pod.plan.enrolled;
        }
        let own =
            self.pods.values().filter(|pod| matches!(pod.plan.spot, plan::Spot::Node { node: at, .. } if at == node));
        self.proxies.tell(
            &self.config,
            &self.paths,
            node,
            own.map(|pod| (&pod.plan, pod.netns_path(), pod.told_enrolled)),
        )
    }

    /// Writes objects, names and address translation as they follow from what is known now.
    fn publish(&mut self) -> anyhow::Result<()> {
        let wanted = self.wanted.objects();
        for pod in self.pods.values_mut() {
            pod.facts.redirection = match (pod.plan.enrolled && self.config.mesh, pod.capture.as_str()) {
                (false, _) if pod.plan.own_tunnel => Some("enabled"),
                (false, _) => None,
                (true, "Captured") => Some("enabled"),
                (true, _) => Some("pending"),
            };
        }
        let plans: Vec<Pod> = self.pods.values().map(|pod| pod.plan.clone()).collect();
        let facts = self.pods.iter().map(|(key, pod)| (key.clone(), pod.facts.clone())).collect();
        self.completed = objects::complete(&wanted, &plans, &facts, &mut self.allocator, self.config.nodes)?;
        self.published.publish(&self.paths.objects(), &self.completed.objects)?;
        if let Some(mirror) = &mut self.mirror {
            for (key, uid) in mirror.publish(&self.completed.objects)? {
                self.allocator.rename(&key, &uid);
                self.pods.get_mut(&key).into_iter().for_each(|pod| pod.plan.uid.clone_from(&uid));
            }
            self.completed.services.push(services::api_server(LAB_PORT));
        }
        if let Ok(mut zone) = self.zone.write() {
            *zone = dns::zone(&self.completed.services, &pods::hosts(self.pods.values()));
        }
        let nodes = 1..=self.config.nodes;
        let rules: Vec<String> = nodes.map(|node| kubeproxy::rules(&self.completed.services, node)).collect();
        if rules != self.rules {
            for (netns, rules) in self.node_ns.iter().zip(&rules) {
                topology::services(netns.path(), rules)?;
            }
            self.rules = rules;
        }
        self.show();
        Ok(())
    }

    /// Asks the nodes for the capture state of their pods.
    fn read_capture(&mut self) {
        let mut known = BTreeMap::new();
        for node in self.pods.values().filter_map(|pod| pod.plan.spot.node()).collect::<BTreeSet<u16>>() {
            let captures = self.proxies.captures(node, self.node_ns[usize::from(node) - 1].path());
            known.extend(captures.map(|captures| (node, captures)));
        }
        for pod in self.pods.values_mut() {
            let Some(captures) = pod.plan.spot.node().and_then(|node| known.get(&node)) else { continue };
            pod.capture = captures.of(&pod.plan.uid);
        }
    }

    fn await_capture(&mut self, deadline: Instant, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
        let waiting =
            |engine: &Self| engine.pods.values().filter(|p| p.plan.enrolled && p.capture != "Captured").count();
        if !self.config.mesh || waiting(self) == 0 {
            return Ok(());
        }
        loop {
            self.observe();
            self.read_capture();
            if waiting(self) == 0 {
                say(format!("{} pods captured", self.pods.values().filter(|p| p.plan.enrolled).count()));
                return Ok(());
            }
            // Nothing will capture them when the proxies are gone.
            if !self.proxies.any_runs() || Instant::now() >= deadline {
                return Ok(());
            }
            std::thread::sleep(eventually::INTERVAL);
        }
    }

    fn start_pods(&mut self, deadline: Instant, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
        let waits = |pod: &Running| !pod.facts.started && pod.may_start();
        if !self.pods.values().any(waits) {
            return Ok(());
        }
        if self.config.mesh {
            // A client's first connection should not race its own pod's publication.
            self.await_sync(deadline.min(Instant::now() + Duration::from_secs(5)));
        }
        let mut started = 0;
        for pod in self.pods.values_mut().filter(|pod| waits(pod)) {
            if pod.plan.gateway.is_some() && self.config.mesh {
                pod.mesh = Some(mesh::gateway(&self.config, &self.paths, &pod.plan)?);
            }
            match pod.start(&self.paths) {
                Ok(()) => started += 1,
                Err(error) => tracing::warn!("{error}"),
            }
        }
        loop {
            self.observe();
            let waiting = self.pods.values().any(|p| p.facts.started && !p.facts.ready && p.facts.finished.is_none());
            if !waiting || Instant::now() >= deadline {
                say(format!("{started} pods started"));
                return Ok(());
            }
            std::thread::sleep(eventually::INTERVAL);
        }
    }

    fn await_published(&mut self, deadline: Instant) {
        while self.control.as_mut().is_some_and(|control| control.exited().is_none()) && Instant::now() < deadline {
            if self.unpublished(&[]).is_empty() {
                return;
            }
            std::thread::sleep(eventually::INTERVAL);
        }
    }

    /// Waits until control has published what is on disk and the nodes have it; returns what is missing.
    fn await_sync(&mut self, deadline: Instant) -> Vec<String> {
        if !self.config.mesh {
            return vec![];
        }
        loop {
            self.observe();
            if self.control.as_ref().and_then(Process::pid).is_none() {
                return vec!["control does not run; see logs/control.log".to_owned()];
            }
            let missing = self.sync_missing();
            if missing.is_empty() || Instant::now() >= deadline {
                return missing;
            }
            std::thread::sleep(eventually::INTERVAL);
        }
    }

    /// What control has not heard of or not published, and which nodes do not have it.
    fn unpublished(&self, nodes: &[String]) -> Vec<String> {
        let control = self.control_ns.path();
        let asked = match &self.mirror {
            // The source first: what it has heard of by then is in what is asked for afterwards.
            Some(mirror) => mesh::control_source(control).map(|followed| mirror.behind(&followed)),
            None => Ok(vec![]),
        };
        let sync = asked.and_then(|behind| Ok((behind, mesh::control_sync(control)?)));
        match sync {
            Ok((mut missing, sync)) => {
                missing.extend(self.published.missing(&sync, nodes, self.mirror.is_some()));
                missing
            }
            Err(error) => vec![format!("control does not answer: {error:#}")],
        }
    }

    fn sync_missing(&self) -> Vec<String> {
        let nodes: Vec<String> = (1..=self.config.nodes).map(|node| format!("node-{node}")).collect();
        let mut missing = self.unpublished(&nodes);
        for (node, netns) in (1..).zip(&self.node_ns) {
            missing.extend(self.proxies.unready(node, netns.path()));
        }
        missing
    }

    /// Lets pods go that labels released, now that nobody sends them tunnels any more.
    fn release(&mut self, deadline: Instant) -> anyhow::Result<Vec<String>> {
        let released = |pod: &Running| pod.told_enrolled && !pod.plan.enrolled;
        if !self.pods.values().any(released) {
            return Ok(vec![]);
        }
        let uids: Vec<(String, PodKey)> =
            self.pods.values().filter(|p| released(p)).map(|p| (p.plan.uid.clone(), p.plan.key())).collect();
        self.pods.values_mut().for_each(|pod| pod.told_enrolled = pod.plan.enrolled);
        for node in 1..=self.config.nodes {
            self.write_pods(node)?;
        }
        loop {
            self.observe();
            self.read_capture();
            let held: Vec<String> = uids
                .iter()
                .filter_map(|(_, key)| self.pods.get(key).filter(|pod| pod.capture != "Uncaptured"))
                .map(|pod| format!("Pod {}/{} is still {}", pod.plan.namespace, pod.plan.name, pod.capture))
                .collect();
            if held.is_empty() || Instant::now() >= deadline {
                return Ok(held);
            }
            std::thread::sleep(eventually::INTERVAL);
        }
    }

    fn unsettled_pods(&self) -> Vec<String> {
        let problem = |pod: &Running| -> Option<String> {
            if let Some(code) = pod.facts.finished {
                return (code != 0).then(|| format!("ended with {code}; see its log"));
            }
            if self.config.mesh && pod.plan.enrolled && pod.capture != "Captured" {
                return Some(format!("is enrolled but {}", pod.capture));
            }
            (pod.facts.started && !pod.facts.ready).then(|| "does not listen on its declared ports".to_owned())
        };
        let pods = self.pods.values();
        pods.filter_map(|pod| Some(format!("Pod {}/{} {}", pod.plan.namespace, pod.plan.name, problem(pod)?))).collect()
    }

    /// Publishes the view.
    fn show(&self) {
        let view = self.view();
        if let Ok(text) = serde_json::to_string_pretty(&view)
            && let Err(error) = replace(&self.paths.view(), &text)
        {
            tracing::warn!("{} cannot be written: {error}", self.paths.view().display());
        }
        if let Ok(mut shared) = self.view.lock() {
            *shared = view;
        }
    }

    fn view(&self) -> View {
        let component = |name: String, netns: PathBuf, pair: address::Pair, process: Option<&Process>| ComponentView {
            log: self.paths.log(&name),
            pid: process.and_then(Process::pid),
            exited: process.and_then(Process::ended_with),
            addresses: pair.texts().to_vec(),
            netns,
            name,
        };
        let nodes = (1..).zip(&self.node_ns).map(|(node, netns)| {
            let path = netns.path().to_path_buf();
            component(format!("node-{node}"), path, address::node(node), self.proxies.process(node))
        });
        let control_path = self.control_ns.path().to_path_buf();
        View {
            pid: std::process::id(),
            rootless: crate::rootless::is_rootless(),
            mesh: self.config.mesh,
            fabric: self.fabric.path().to_path_buf(),
            control: component("control".into(), control_path, address::CONTROL, self.control.as_ref()),
            nodes: nodes.collect(),
            pods: self.pods.values().map(|pod| self.pod_view(pod)).collect(),
            services: self
                .completed
                .services
                .iter()
                .map(|service| ServiceView {
                    namespace: service.key.0.clone(),
                    name: service.key.1.clone(),
                    addresses: service.addresses.map(|pair| pair.texts().to_vec()).unwrap_or_default(),
                })
                .collect(),
            missing: self.missing.clone(),
            warnings: self.warnings.clone(),
        }
    }

    fn pod_view(&self, pod: &Running) -> PodView {
        PodView {
            namespace: pod.plan.namespace.clone(),
            name: pod.plan.name.clone(),
            uid: pod.plan.uid.clone(),
            node: pod.plan.spot.node().map(|node| format!("node-{node}")),
            netns: pod.netns_path().clone(),
            addresses: pod.plan.spot.addresses().texts().to_vec(),
            etc: self.paths.etc(&pod.plan.namespace, &pod.plan.name),
            service_account: pod.plan.account.clone(),
            enrolled: pod.plan.enrolled,
            capture: pod.capture.clone(),
            ready: pod.facts.ready,
            pids: pod.pids(),
            logs: pod.logs(),
        }
    }

    /// Ends every process, then lets the namespaces go.
    pub(super) fn end(mut self) {
        self.pods.values().for_each(Running::ask_to_end);
        let grace = Instant::now() + Duration::from_secs(1);
        self.pods.values_mut().for_each(|pod| pod.end(grace));
        let mut mesh: Vec<Process> =
            std::mem::take(&mut self.proxies).into_processes().chain(self.control.take()).collect();
        mesh.iter().for_each(Process::ask_to_end);
        // Draining proxies have nobody left to serve.
        let grace = Instant::now() + Duration::from_millis(300);
        mesh.iter_mut().for_each(|process| process.end(grace));
        let _ = std::fs::remove_file(self.paths.view());
    }
}
