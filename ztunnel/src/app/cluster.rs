//! The node's agent in a Kubernetes cluster: one loop that brings together what the API server says, what the CNI plugin
//! asks, where pods' networks are and how far their capture has come.
//!
//! The loop decides by [`crate::cluster::plan`] and hands the same list of pods on as `TULLE_PODS` does; everything slow
//! (questions to the API, looks at `/proc`) is a task of its own whose result comes back to it. While the API server is
//! away nothing changes for pods that run. Nothing is published and no plugin answered before this process serves, if it
//! takes the place of another one.

mod plugin;
mod state;
mod writes;

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::app::answers::Answers;
use crate::app::cluster::state::{Located, State};
use crate::app::cluster::writes::Writes;
use crate::app::pods::Pods;
use crate::base::drain::Drained;
use crate::base::netns::Netns;
use crate::capture::pods::{Pod, Pods as List};
use crate::capture::probes;
use crate::cluster::find::{Sought, at_path, by_process};
use crate::cluster::view::News;
use crate::cluster::watch::Health;
use crate::cluster::{Client, saved, serve};
use crate::cni::install::{Keeper, Report};
use crate::config::cluster::{Cluster as Settings, EgressDefault};
use crate::config::{Node, Switch};
use crate::state::{Protocol, Reader};

/// How soon pods are looked at again while something is on its way: their capture has no signal, and takes some tens of
/// milliseconds.
const SOON: Duration = Duration::from_millis(50);
/// The same while nothing is.
const LATER: Duration = Duration::from_secs(1);
/// How often the files and the probes' table are tried again that could not be written.
const AGAIN: Duration = Duration::from_secs(5);
/// How long the API server may take before pods are served by what was remembered of them.
const REMEMBER: Duration = Duration::from_secs(2);
/// Pieces of news that are taken at a time.
const BATCH: usize = 64;

/// What the agent is made of; shared with the tasks that answer plugins.
pub(super) struct Agent {
    settings: Settings,
    node: String,
    /// The root namespace.
    root: String,
    client: Client,
    reader: Reader,
    cluster_id: String,
    answers: Answers,
    pods: Pods,
    state: Mutex<State>,
    /// Something happened that the loop has no channel for.
    wake: Notify,
}

/// What the agent gets and gives.
pub(super) struct Ends {
    /// The list, for [`Pods::run`].
    pub list: watch::Sender<List>,
    /// Wakes it.
    pub changed: Arc<Notify>,
    /// This process serves the node from now on.
    pub begun: oneshot::Receiver<()>,
    /// A successor serves it.
    pub replaced: Drained,
    /// It stops.
    pub stop: Drained,
}

impl Agent {
    /// An agent by the node's settings.
    ///
    /// # Errors
    /// What is missing or wrong among them.
    pub(super) async fn new(config: &Node, answers: &Answers) -> anyhow::Result<Arc<Self>> {
        anyhow::ensure!(
            !config.node_name.is_empty(),
            "TULLE_CLUSTER is on, and NODE_NAME does not say which node this is"
        );
        let settings = config.cluster.clone();
        let client = crate::cluster::client(settings.kubeconfig.as_deref()).await?;
        let closed = settings.egress_default == EgressDefault::Deny;
        let state = State::new(&config.pod_namespace, closed, saved::Saved::read(&settings.run_dir));
        Ok(Arc::new(Self {
            settings,
            node: config.node_name.clone(),
            root: config.pod_namespace.clone(),
            client,
            reader: answers.shared.reader.clone(),
            cluster_id: config.cluster_id.clone(),
            answers: answers.clone(),
            pods: answers.pods.clone(),
            state: Mutex::new(state),
            wake: Notify::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs until the end of the process.
    pub(super) async fn run(self: Arc<Self>, ends: Ends) {
        let (mut news, health) = crate::cluster::watch::start(&self.client, &self.node);
        let mut turn = Turn::new(&self, ends);
        let mut locating: JoinSet<Vec<Located>> = JoinSet::new();
        let (stop, replaced) = (turn.ends.stop.clone(), turn.ends.replaced.clone());
        loop {
            let pause = turn.look(&self, &health, &mut locating).await;
            tokio::select! {
                () = self.wake.notified() => {}
                () = sleep(pause) => {}
                () = take_all(&self, &mut news) => {}
                done = turn.writes.next() => turn.writes.done(&self, done),
                Some(located) = locating.join_next() => {
                    if let Ok(located) = located {
                        self.state().located(located, Instant::now());
                    }
                }
                begun = &mut turn.ends.begun, if !turn.serves => turn.begin(&self, begun.is_ok()),
                () = stop.draining() => break,
                () = replaced.draining() => break,
            }
        }
        if turn.serves && !turn.ends.replaced.is_draining() {
            turn.writes.say_stopping(&self.client, &self.node).await;
        }
    }

    /// Whether control still tells others to send tunnels to a pod.
    fn in_use(&self, pod: &crate::cluster::pod::Member) -> bool {
        let snapshot = self.reader.load();
        let cluster: Arc<str> = self.cluster_id.as_str().into();
        let mut workloads = snapshot.workloads_by_pod(&pod.namespace, &pod.name);
        workloads.any(|workload| {
            workload.protocol == Protocol::Hbone
                && crate::flow::describes(workload, &pod.uid, &pod.service_account, &cluster)
        })
    }
}

/// Takes the next news, and what waits behind it.
async fn take_all(agent: &Agent, news: &mut mpsc::Receiver<News>) {
    let mut taken = Vec::new();
    if news.recv_many(&mut taken, BATCH).await == 0 {
        // The watches end with the process only.
        return std::future::pending().await;
    }
    let mut state = agent.state();
    taken.into_iter().for_each(|one| state.view.take(one));
}

/// The loop's own variables.
struct Turn {
    ends: Ends,
    /// This process serves the node.
    serves: bool,
    /// The CNI plugin cannot be answered.
    deaf: bool,
    writes: Writes,
    since: Instant,
    /// What was handed on last.
    listed: Option<List>,
    probes: Kept<BTreeSet<SocketAddr>>,
    saved: Kept<saved::Saved>,
    known: Kept<Vec<u8>>,
    node: Option<Netns>,
    /// Keeps the CNI plugin installed as long as it lives.
    keeper: Option<Keeper>,
}

/// A thing outside that is kept equal to a value.
struct Kept<T> {
    value: Option<T>,
    failed: Option<Instant>,
}

impl<T: PartialEq> Kept<T> {
    fn new() -> Self {
        Self { value: None, failed: None }
    }

    /// Whether it is to be written now.
    fn differs(&self, wanted: &T) -> bool {
        self.value.as_ref() != Some(wanted) && self.failed.is_none_or(|at| at.elapsed() >= AGAIN)
    }

    /// What became of it.
    fn done(&mut self, value: T, result: Result<(), impl std::fmt::Display>, what: &str) {
        match result {
            Ok(()) => (self.value, self.failed) = (Some(value), None),
            Err(error) => {
                tracing::error!(%error, "{what}; trying again");
                self.failed = Some(Instant::now());
            }
        }
    }
}

impl Turn {
    fn new(agent: &Agent, ends: Ends) -> Self {
        let node = match agent.settings.probes {
            Switch::On => Netns::open(Path::new("/proc/self/ns/net")).ok(),
            Switch::Off => None,
        };
        Self {
            ends,
            serves: false,
            deaf: false,
            writes: Writes::new(),
            since: Instant::now(),
            listed: None,
            probes: Kept::new(),
            saved: Kept::new(),
            known: Kept::new(),
            node,
            keeper: None,
        }
    }

    /// This process serves from now on: plugins are answered, and what is so is published.
    fn begin(&mut self, agent: &Arc<Agent>, begun: bool) {
        self.serves = true;
        if !begun {
            return;
        }
        self.install(agent);
        let path: PathBuf = agent.settings.cni_socket.clone();
        match serve::bind(&path) {
            Ok(listener) => {
                let answering = agent.clone();
                let answer = move |request| answering.clone().answer(request);
                let ends = self.ends.replaced.clone();
                tokio::spawn(serve::serve(listener, answer, ends));
                tracing::info!(socket = %path.display(), "answering the CNI plugin");
            }
            Err(error) => {
                let problem = format!("the CNI plugin cannot be answered: {error}");
                tracing::error!(%problem, "pods of the mesh that start now are not let start");
                agent.pods.set_problem(Some(problem));
                self.deaf = true;
            }
        }
    }

    /// Has the CNI plugin installed, and kept so.
    fn install(&mut self, agent: &Agent) {
        let settings = &agent.settings;
        if settings.cni_install == Switch::Off {
            return;
        }
        let (state, socket) = (settings.cni_state_dir.clone(), settings.cni_socket.clone());
        let made = settings.plugin.settings(settings.kubeconfig.clone(), state, socket, agent.root.clone());
        let told = |report: &Report| tracing::info!(%report, "the CNI plugin's installation");
        match made.and_then(|settings| Keeper::start(settings, told)) {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => tracing::error!(%error, "the CNI plugin is not installed (TULLE_CNI_INSTALL)"),
        }
    }

    /// Looks at everything once, and does what follows; gives how long nothing else has to be done.
    async fn look(
        &mut self,
        agent: &Arc<Agent>,
        health: &[Health; 2],
        locating: &mut JoinSet<Vec<Located>>,
    ) -> Duration {
        let now = Instant::now();
        let status = agent.pods.status();
        let remember = now.duration_since(self.since) >= REMEMBER;
        let (list, probe_ports, moving, saved, known) = {
            let mut state = agent.state();
            state.view.forget_early(now);
            let steps = state.step(&status, |pod| agent.in_use(pod), remember, now);
            if self.serves {
                self.writes.want(steps.writes);
            }
            if locating.is_empty()
                && let Some(sought) = state.seek(now)
            {
                locating.spawn(locate(agent.settings.proc.clone(), sought, state.runtime_uids()));
            }
            let known = state.view.listed().1.then(|| state.view.known_to_plugin().encode());
            (steps.list, steps.probe_ports, steps.moving, state.saved(), known)
        };
        self.keep_probes(probe_ports).await;
        if self.listed.as_ref() != Some(&list) && (list.complete || remember || !list.pods.is_empty()) {
            self.listed = Some(list.clone());
            self.ends.list.send_replace(list);
            self.ends.changed.notify_one();
        }
        self.tell_problem(agent, health);
        self.keep_files(agent, saved, known).await;
        if self.serves {
            self.writes.start(agent, now);
            self.writes.condition(agent, &status);
        }
        if moving || self.writes.under_way() { SOON } else { LATER }
    }

    /// Before the first list, readiness says why there is none.
    fn tell_problem(&self, agent: &Agent, health: &[Health; 2]) {
        let (pods, namespaces) = agent.state().view.listed();
        if pods && namespaces {
            if self.listed.as_ref().is_some_and(|list| list.complete) && !self.deaf {
                agent.pods.set_problem(None);
            }
            return;
        }
        let whys: Vec<String> = health.iter().map(|one| one.borrow().clone()).filter(|why| !why.is_empty()).collect();
        if self.since.elapsed() >= REMEMBER {
            agent.pods.set_problem(Some(format!("the API server: {}", whys.join("; "))));
        }
    }

    async fn keep_probes(&mut self, ports: BTreeSet<SocketAddr>) {
        let Some(node) = &self.node else { return };
        if self.probes.differs(&ports) {
            let applied = probes::apply(node, probes::render(&ports)).await;
            self.probes.done(ports, applied, "probes of the kubelet are not recognised, and fail where mTLS is STRICT");
        }
    }

    async fn keep_files(&mut self, agent: &Agent, saved: saved::Saved, known: Option<Vec<u8>>) {
        if self.saved.differs(&saved) {
            let (folder, content) = (agent.settings.run_dir.clone(), saved.clone());
            let written = blocking(move || content.write(&folder)).await;
            self.saved.done(saved, written, "what a restart needs cannot be remembered (TULLE_RUN_DIR)");
        }
        if let Some(known) = known.filter(|known| self.known.differs(known)) {
            let (folder, content) = (agent.settings.cni_state_dir.clone(), known.clone());
            let written = blocking(move || saved::replace(&folder, NAMESPACES, &content)).await;
            self.known.done(known, written, "the CNI plugin cannot be told the namespaces (TULLE_CNI_STATE_DIR)");
        }
    }
}

/// What the CNI plugin reads while the agent is away.
const NAMESPACES: &str = "namespaces.json";

async fn blocking(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Result<(), String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

/// Looks for the networks of pods: where the plugin said, else at processes.
async fn locate(proc: PathBuf, sought: Vec<state::Wanted>, known: HashSet<String>) -> Vec<Located> {
    let mut located = Vec::new();
    let mut by_cgroup: Vec<(String, Sought, Option<String>)> = Vec::new();
    for wanted in sought {
        let mut said = None;
        if let Some(path) = &wanted.path {
            match at_path(path, &proc, &wanted.ips).await {
                Ok(found) => {
                    located.push(Located { uid: wanted.uid, ips: wanted.ips, result: Ok(found) });
                    continue;
                }
                Err(why) => said = Some(format!("{} {why}", path.display())),
            }
        }
        by_cgroup.push((wanted.uid, Sought { runtime_uid: wanted.runtime_uid, ips: wanted.ips }, said));
    }
    if by_cgroup.is_empty() {
        return located;
    }
    let pods: Vec<Sought> = by_cgroup.iter().map(|(_, sought, _)| sought.clone()).collect();
    let mut results = match by_process(proc, pods, known).await {
        Ok(results) => results.into_iter().map(|(_, result)| result).collect::<Vec<_>>().into_iter(),
        Err(error) => {
            let all = vec![Err(error.to_string()); by_cgroup.len()];
            all.into_iter()
        }
    };
    for (uid, sought, said) in by_cgroup {
        let result = results.next().unwrap_or_else(|| Err("it was not looked for".to_owned()));
        let result = result.map_err(|why| said.into_iter().chain([why]).collect::<Vec<_>>().join("; "));
        located.push(Located { uid, ips: sought.ips, result });
    }
    located
}

/// An entry of the list.
fn entry(pod: &crate::cluster::pod::Member) -> Pod {
    Pod {
        uid: pod.uid.clone(),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        netns: PathBuf::new(),
        ips: pod.ips.clone(),
        enrolled: Some(false),
        probe_ports: pod.probe_ports.clone(),
        resolv_conf: None,
        handle: None,
        by_agent: false,
        lost: None,
        closed: false,
    }
}
