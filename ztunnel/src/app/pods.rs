//! The node's pods: which there are, which are to be captured, and each one's way there and back.
//!
//! One task reads the list and the snapshot and says what is wanted; one task a pod brings it about and reports the
//! actual state. A pod is `Captured` only when its rules were proven by probing, and `Failed` says why and is tried again.
//! On release the redirect goes first; port 15008 stays open for [`LINGER`], because peers learn of it later than we, and
//! connections that are under way go on to their own end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::app::handover::Open;
use crate::app::handover::successor::Taken;
use crate::app::resolver::{GivenNames, Names, NamesEnd};
use crate::app::wanted::{Filters, Wanted, identity, wanted};
use crate::app::worker::{Listeners, Worker, serve_pod};
use crate::base::budget::Budget;
use crate::base::drain::{Drain, Drained, Phase, drain};
use crate::base::netns::{Netns, NetnsThread, local_addresses, run_blocking};
use crate::base::sockets::{Options, PodSockets};
use crate::base::workers::Workers;
use crate::capture::pods::{Pod, Source};
use crate::capture::rules::{Rules, fingerprint, rules_are_broken};
use crate::capture::{self, preexisting, probe};
use crate::config::Preexisting;
use crate::flow::{Gate, Limits, LocalPod, Shared, describes};
use crate::policy::datagrams::Filter;
use crate::state::{Snapshot, Workload};

/// How long port 15008 stays open after release.
const LINGER: Duration = Duration::from_secs(30);
/// How often a released pod is looked at, whether anything still flows.
const LINGER_LOOK: Duration = Duration::from_secs(1);
/// Captures at a time: each runs `nft` and takes some tens of milliseconds of a core.
const AT_ONCE: usize = 8;
/// How often the list's file is looked at, besides notifications.
const LOOK: Duration = Duration::from_millis(250);
/// How soon the redirects of a CNI agent are probed again that did not lead here: it installs them about when it hands
/// the pod over.
const PROVE: Duration = Duration::from_secs(1);
/// Pause after a failed capture, growing.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What pods are started with.
pub struct Environment {
    /// Handles of all flows.
    pub shared: Shared,
    /// Where flows run.
    pub workers: Workers<Worker>,
    /// Makes sockets.
    pub netns: NetnsThread,
    /// Their options.
    pub options: Options,
    /// A pod's budget.
    pub limits: Limits,
    /// Connections from before capture.
    pub preexisting: Preexisting,
    /// Trust domain of pods that are not described yet.
    pub trust_domain: String,
    /// How names are answered. `None`: not by us.
    pub names: Option<Names>,
    /// What the process before this one left to us.
    pub taken: Arc<Taken>,
    /// Drains when a successor has taken over.
    pub replaced: Drained,
}

/// What others may see of a pod.
pub(super) struct Entry {
    pub(super) pod: Pod,
    pub(super) state: &'static str,
    pub(super) reason: String,
    pub(super) old: BTreeSet<preexisting::Pair>,
    pub(super) netns: Option<Netns>,
    pub(super) local: Option<Arc<LocalPod>>,
    /// Its listeners.
    pub(super) open: Vec<Open>,
    /// Fingerprints of what is installed; none while that changes.
    pub(super) rules: Option<u64>,
    pub(super) datagrams: Option<u64>,
    /// Its listeners are open, and what may not pass is held back.
    pub(super) served: bool,
}

type Board = Arc<Mutex<BTreeMap<String, Entry>>>;

/// A view of the pods. Cheap to clone.
#[derive(Clone, Default)]
pub struct Pods {
    pub(super) board: Board,
    /// The list could not be read, and why.
    pub(super) problem: Arc<Mutex<Option<String>>>,
    /// The list was read once.
    pub(super) listed: Arc<AtomicBool>,
    /// A successor has taken over.
    pub(super) frozen: Arc<AtomicBool>,
}

struct Running {
    desired: watch::Sender<Option<Wanted>>,
    pod: Pod,
    task: JoinHandle<()>,
}

impl Running {
    /// Whether the list still has the pod as it was started, apart from its enrolment.
    fn is_for(&self, uid: &str, listed: &[Pod]) -> bool {
        let as_started = Pod { enrolled: None, ..self.pod.clone() };
        !self.task.is_finished()
            && listed.iter().any(|pod| pod.uid == uid && Pod { enrolled: None, ..pod.clone() } == as_started)
    }
}

impl Pods {
    /// Keeps the pods as listed by `source` until `stop` drains; then ends their flows by its phases. `changed` says when
    /// to look.
    pub async fn run(self, environment: Arc<Environment>, mut source: Source, changed: Arc<Notify>, stop: Arc<Drain>) {
        let mut listed: Vec<Pod> = Vec::new();
        let mut running: HashMap<String, Running> = HashMap::new();
        let mut filters = Filters::default();
        let mut snapshots = environment.shared.reader.subscribe();
        let stopping = stop.watch();
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        let next_home = AtomicUsize::new(0);
        loop {
            match source.changed() {
                Ok(Some(list)) => {
                    let problem = (!list.errors.is_empty()).then(|| list.errors.join("; "));
                    if let Some(problem) = &problem {
                        tracing::error!(%problem, "entries of the pod list are ignored");
                    }
                    if matches!(source, Source::File(_)) {
                        self.set_problem(problem);
                    }
                    self.listed.fetch_or(list.complete, Ordering::Relaxed);
                    let bad = !list.errors.is_empty();
                    let before = std::mem::replace(&mut listed, list.pods);
                    if bad {
                        // One of the unreadable entries may be any of them.
                        let new: BTreeSet<String> = listed.iter().map(|pod| pod.uid.clone()).collect();
                        listed.extend(before.into_iter().filter(|pod| !new.contains(&pod.uid)));
                    }
                }
                Ok(None) => {}
                Err(error) => self.set_problem(Some(error)),
            }
            let snapshot = environment.shared.reader.load();
            if !self.frozen.load(Ordering::Relaxed) {
                self.reconcile(&environment, &listed, &snapshot, &mut filters, &mut running, &slots, &stop, &next_home);
            }
            tokio::select! {
                () = changed.notified() => {}
                result = snapshots.changed() => if result.is_err() { return },
                () = sleep(LOOK) => {}
                () = stopping.draining() => break,
            }
        }
        // The pods' own tasks watch the same drain.
        stopping.forced().await;
    }

    /// Whether flows of the pod may still need its certificate.
    fn is_served(&self, uid: &str) -> bool {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.get(uid).is_some_and(|entry| entry.local.is_some())
    }

    pub(super) fn set_problem(&self, problem: Option<String>) {
        let mut current = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.is_some() && *current != problem {
            tracing::error!(problem = problem.as_deref().unwrap_or(""), "the list of pods has a problem");
        }
        *current = problem;
    }

    #[allow(clippy::too_many_arguments, reason = "one loop's own variables")]
    fn reconcile(
        &self,
        environment: &Arc<Environment>,
        listed: &[Pod],
        snapshot: &Snapshot,
        filters: &mut Filters,
        running: &mut HashMap<String, Running>,
        slots: &Arc<Semaphore>,
        stop: &Arc<Drain>,
        next_home: &AtomicUsize,
    ) {
        let mut identities = BTreeSet::new();
        let pods: Vec<(&Pod, Option<Arc<Workload>>)> =
            listed.iter().map(|pod| (pod, described(pod, snapshot, environment).cloned())).collect();
        filters.refresh(snapshot, &pods, Instant::now());
        let mut unclaimed = BTreeSet::new();
        // Gone, or another pod under the same uid: its task ends and cleans up.
        let mut ended: HashMap<String, JoinHandle<()>> = HashMap::new();
        let changed: Vec<String> =
            running.iter().filter(|(uid, run)| !run.is_for(uid, listed)).map(|(uid, _)| uid.clone()).collect();
        for uid in changed {
            if let Some(run) = running.remove(&uid) {
                let _ = run.desired.send(None);
                ended.insert(uid, run.task);
            }
        }
        for (pod, workload) in &pods {
            let (pod, workload) = (*pod, workload.as_deref());
            let wanted = wanted(pod, workload, snapshot, filters, environment.preexisting == Preexisting::Reset);
            if wanted.capture || !wanted.known {
                unclaimed.insert(pod.uid.as_str());
            }
            if wanted.capture || self.is_served(&pod.uid) {
                identities.extend(identity(pod, workload, &environment.trust_domain));
            }
            if let Some(run) = running.get(&pod.uid) {
                run.desired.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(&wanted);
                    *current = Some(wanted);
                    changed
                });
                continue;
            }
            let (desired, watch) = watch::channel(Some(wanted));
            let task = PodTask {
                environment: environment.clone(),
                board: self.board.clone(),
                pod: pod.clone(),
                desired: watch,
                slots: slots.clone(),
                stop: stop.clone(),
                home: next_home.fetch_add(1, Ordering::Relaxed),
                lingering: None,
                predecessor: ended.remove(&pod.uid),
                rules: Arc::default(),
                datagrams: tokio::sync::Mutex::default(),
                cleaned: false,
            };
            let task = tokio::spawn(task.run());
            running.insert(pod.uid.clone(), Running { desired, pod: pod.clone(), task });
        }
        if self.listed.load(Ordering::Relaxed) {
            environment.taken.keep(|uid| unclaimed.contains(uid));
        }
        environment.shared.identities.want(&identities);
    }
}

fn filter_fingerprint(filter: Option<&Filter>) -> u64 {
    fingerprint(&filter.map_or_else(String::new, capture::datagrams::render))
}

/// Control's description of `pod`.
fn described<'a>(pod: &'a Pod, snapshot: &'a Snapshot, environment: &Environment) -> Option<&'a Arc<Workload>> {
    let cluster = environment.shared.cluster.clone();
    snapshot
        .workloads_by_pod(&pod.namespace, &pod.name)
        .find(|workload| describes(workload, &pod.uid, &pod.service_account, &cluster))
}

/// Brings one pod to what is wanted.
struct PodTask {
    environment: Arc<Environment>,
    board: Board,
    pod: Pod,
    /// `None`: the pod is gone.
    desired: watch::Receiver<Option<Wanted>>,
    slots: Arc<Semaphore>,
    stop: Arc<Drain>,
    home: usize,
    /// An earlier serving that still carries connections: `Draining` says that the pod is captured again, being dropped
    /// that it is gone.
    lingering: Option<Drain>,
    /// The task that had the pod before its entry changed; nothing is touched before it has ended.
    predecessor: Option<JoinHandle<()>>,
    /// What is installed. Held while it changes, so that a late release cannot take away what a new capture brought.
    rules: Arc<tokio::sync::Mutex<Option<Rules>>>,
    /// The filter that is installed. `None`: not known.
    datagrams: tokio::sync::Mutex<Option<Option<Arc<Filter>>>>,
    /// Rules that an earlier proxy left behind were looked for.
    cleaned: bool,
}

/// A pod that is being served.
struct Serving {
    netns: Netns,
    local: Arc<LocalPod>,
    captured: Drain,
    tunnels: Drain,
    flows: Drain,
    names: Drain,
    open: Vec<Open>,
    /// What the process before this one said of the pod: connections from before capture, and fingerprints.
    inherited: Option<Inherited>,
    /// A probe went through the rules.
    proven: bool,
}

struct Inherited {
    old: BTreeSet<preexisting::Pair>,
    rules: Option<u64>,
    datagrams: Option<u64>,
}

impl PodTask {
    async fn run(mut self) {
        if let Some(predecessor) = self.predecessor.take() {
            let _ = predecessor.await;
        }
        self.post(|_| {});
        let mut pause = RETRY.0;
        let mut serving: Option<Serving> = None;
        let taken = self.environment.taken.clone();
        let mut more = taken.more();
        loop {
            let desired = self.desired.borrow_and_update().clone();
            let Some(wanted) = desired else { break };
            let done = match (serving.take(), wanted.capture) {
                (None, true) => match self.start(&wanted).await {
                    Ok(mut started) => {
                        // Only now are the connections from before known, which may have to end.
                        let adjusted = self.adjust(&mut started, &wanted).await;
                        serving = Some(started);
                        adjusted
                    }
                    Err(reason) => Err(reason),
                },
                (Some(released), false) => self.release(released).await,
                (Some(mut running), true) => {
                    self.serve_more(&mut running).await;
                    let adjusted = self.adjust(&mut running, &wanted).await;
                    serving = Some(running);
                    adjusted
                }
                (None, false) => self.stay_out(&wanted).await,
            };
            let again = match done {
                Ok(()) => {
                    pause = RETRY.0;
                    None
                }
                Err(reason) => {
                    tracing::warn!(pod = %self.name(), %reason, "capture failed; trying again");
                    self.state("Failed", reason);
                    pause = (pause * 2).min(RETRY.1);
                    Some(pause)
                }
            };
            let draining = self.draining();
            let unproven = serving.as_ref().is_some_and(|serving| !serving.proven);
            let cleans_later = serving.is_none() && !self.cleaned && !taken.is_alone();
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { break },
                // Sockets of this pod that the process before this one opened after all.
                _ = more.changed(), if serving.is_some() => {}
                () = taken.alone(), if cleans_later => {}
                () = sleep(again.unwrap_or_default()), if again.is_some() => {}
                () = sleep(PROVE), if unproven => {}
                () = draining => break,
            }
        }
        self.finish(serving).await;
    }

    /// Not captured: makes sure that no rules are left from another time.
    async fn stay_out(&mut self, wanted: &Wanted) -> Result<(), String> {
        if !wanted.known {
            // Rules that are there stay: better no traffic than traffic past the mesh.
            self.state("Uncaptured", "control has not said yet whether the pod is in the mesh".into());
            return Ok(());
        }
        // Rules that a draining process still needs for its connections stay, too.
        if !self.cleaned && self.lingering.is_none() && self.environment.taken.is_alone() {
            let _slot = self.slots.acquire().await.map_err(|error| error.to_string())?;
            if let Ok(netns) = self.pod.open()
                && capture::installed(&netns).await.is_ok()
            {
                capture::remove(&netns).await.map_err(|error| format!("rules of an earlier capture stay: {error}"))?;
            }
            self.cleaned = true;
        }
        self.state("Uncaptured", String::new());
        Ok(())
    }

    fn name(&self) -> String {
        format!("{}/{}", self.pod.namespace, self.pod.name)
    }

    fn draining(&self) -> impl Future<Output = ()> + use<> {
        let stop = self.stop.watch();
        async move { stop.draining().await }
    }

    fn post(&self, change: impl FnOnce(&mut Entry)) {
        let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = board.entry(self.pod.uid.clone()).or_insert_with(|| Entry {
            pod: self.pod.clone(),
            state: "Uncaptured",
            reason: String::new(),
            old: BTreeSet::new(),
            netns: None,
            local: None,
            open: Vec::new(),
            rules: None,
            datagrams: None,
            served: false,
        });
        change(entry);
    }

    fn state(&self, state: &'static str, reason: String) {
        self.post(|entry| {
            entry.state = state;
            entry.reason = reason;
        });
    }

    /// Listeners, rules, proof; in this order, so that nothing is redirected to nowhere.
    async fn start(&mut self, wanted: &Wanted) -> Result<Serving, String> {
        self.state("Pending", "installing".into());
        if let Some(lingering) = &self.lingering {
            lingering.advance(Phase::Draining);
        }
        let _slot = self.slots.acquire().await.map_err(|error| error.to_string())?;
        let netns = self.pod.open()?;
        self.check_owner(&netns).await?;
        self.cleaned = false;
        let mut serving = self.listen(netns).await?;
        let inherited = serving.inherited.as_ref();
        let mut rules = self.rules(wanted, inherited.map_or(&BTreeSet::new(), |it| &it.old));
        if wanted.tcp_only.is_none() {
            // Control has not said; what an earlier proxy installed stays until it does.
            rules.tcp_only =
                capture::installed(&serving.netns).await.is_ok_and(|table| table.contains("filter_output"));
        }
        self.inherit(inherited, &rules, wanted.datagrams.as_ref()).await;
        self.install(&serving.netns, rules).await?;
        self.filter(&serving.netns, wanted.datagrams.clone()).await?;
        if !self.is_by_agent()
            && let Err(reason) = self.prove(&mut serving).await
        {
            end(&serving);
            return Err(reason);
        }
        let old = match &serving.inherited {
            // The tunnels of the process before this one would look like strangers.
            Some(inherited) => inherited.old.clone(),
            None => preexisting::list(&serving.netns).await.map_err(|error| error.to_string())?,
        };
        tracing::info!(pod = %self.name(), preexisting = old.len(), by_agent = self.is_by_agent(), "captured");
        self.post(|entry| {
            entry.state = if serving.proven { "Captured" } else { "Pending" };
            entry.reason = String::new();
            entry.old = old;
        });
        Ok(serving)
    }

    /// Whether redirects are not ours to install.
    fn is_by_agent(&self) -> bool {
        self.pod.handle.is_some()
    }

    async fn prove(&self, serving: &mut Serving) -> Result<(), String> {
        // A sabotaged build skips the proof, which would find the sabotage out.
        if !rules_are_broken() {
            probe::verify(&serving.netns, &self.pod.ips, self.is_by_agent()).await?;
        }
        serving.proven = true;
        Ok(())
    }

    /// What the process before this one installed is not installed again.
    async fn inherit(&self, inherited: Option<&Inherited>, rules: &Rules, wanted: Option<&Option<Arc<Filter>>>) {
        let Some(inherited) = inherited else { return };
        if inherited.rules == Some(fingerprint(&rules.render())) {
            *self.rules.lock().await = Some(rules.clone());
        }
        if let Some(wanted) = wanted.filter(|wanted| inherited.datagrams == Some(filter_fingerprint(wanted.as_deref())))
        {
            *self.datagrams.lock().await = Some(wanted.clone());
        }
        self.post(|entry| (entry.rules, entry.datagrams) = (inherited.rules, inherited.datagrams));
    }

    /// Serves sockets of this pod that came late, besides its own: clients may stand in their queues.
    async fn serve_more(&self, serving: &mut Serving) {
        while let Some(claim) = self.environment.taken.claim(&self.pod.uid, serving.netns.id()) {
            let (listeners, names) = (claim.listeners, Some(claim.names));
            match self
                .serve(&serving.local, listeners, names, [&serving.captured, &serving.tunnels, &serving.names])
                .await
            {
                Ok(open) => serving.open.push(open),
                Err(reason) => tracing::warn!(pod = %self.name(), %reason, "late sockets are not served"),
            }
        }
        self.post(|entry| entry.open.clone_from(&serving.open));
    }

    /// A path may lead to another pod's namespace by now; its traffic must not get this pod's identity.
    async fn check_owner(&self, netns: &Netns) -> Result<(), String> {
        let has = run_blocking(netns, local_addresses).await.map_err(|error| error.to_string())?;
        match self.pod.ips.iter().find(|ip| !has.contains(ip)) {
            None => Ok(()),
            Some(ip) => Err(format!(
                "the network namespace {} does not own the pod's address {ip}; is it another pod's?",
                self.pod.netns.display()
            )),
        }
    }

    async fn listen(&self, netns: Netns) -> Result<Serving, String> {
        let env = &self.environment;
        let sockets = Arc::new(PodSockets::new(netns.clone(), env.netns.clone(), env.options.clone()));
        let claim = env.taken.claim(&self.pod.uid, netns.id());
        let (listeners, names, inherited) = match claim {
            Some(claim) => {
                let adopt =
                    |one| sockets.adopt(one).map_err(|error| format!("a listener cannot be taken over: {error}"));
                let Listeners { outbound, plaintext, hbone } = &claim.listeners;
                [outbound, plaintext, hbone].into_iter().try_for_each(adopt)?;
                let inherited = Inherited { old: claim.old, rules: claim.rules, datagrams: claim.datagrams };
                (claim.listeners, Some(claim.names), Some(inherited))
            }
            None => {
                let port = async |port: u16| {
                    let failed = |error| format!("cannot listen on port {port} in the pod: {error}");
                    sockets.listen(port).await.map_err(failed)
                };
                let (outbound, plaintext) = (port(PORT_OUTBOUND).await?, port(PORT_INBOUND_PLAINTEXT).await?);
                (Listeners { outbound, plaintext, hbone: port(PORT_HBONE).await? }, None, None)
            }
        };
        let [captured, tunnels, names_end] = [(); 3].map(|()| drain().0);
        let (flows, flows_watch) = drain();
        let local = Arc::new(LocalPod {
            uid: self.pod.uid.as_str().into(),
            name: self.pod.name.as_str().into(),
            namespace: self.pod.namespace.as_str().into(),
            addresses: self.pod.ips.clone(),
            sockets,
            drained: flows_watch,
            limits: env.limits,
            inbound: Arc::default(),
            outbound: Arc::default(),
            questions: Arc::default(),
            gate: Gate::new(env.limits.gate),
            buffers: Budget::new(env.limits.buffer),
            service_account: self.pod.service_account.as_str().into(),
            cluster: env.shared.cluster.clone(),
            refused: AtomicU64::new(0),
            bound: Mutex::default(),
        });
        let open = self.serve(&local, listeners, names, [&captured, &tunnels, &names_end]).await?;
        // From here on a successor can have them.
        self.post(|entry| {
            entry.netns = Some(netns.clone());
            entry.local = Some(local.clone());
            entry.open = vec![open.clone()];
        });
        Ok(Serving {
            netns,
            local,
            captured,
            tunnels,
            flows,
            names: names_end,
            open: vec![open],
            inherited,
            proven: false,
        })
    }

    /// Serves the pod at `listeners`, and its names; `ends` are those of redirected connections, tunnels and datagrams.
    async fn serve(
        &self,
        local: &Arc<LocalPod>,
        listeners: Listeners,
        names: Option<GivenNames>,
        ends: [&Drain; 3],
    ) -> Result<Open, String> {
        let env = &self.environment;
        let [captured, tunnels, datagrams] = ends.map(Drain::watch);
        let served = serve_pod(&env.workers, self.home, &env.shared, local, listeners, &captured, &tunnels);
        let mut sockets = served.map_err(|error| error.to_string())?.to_vec();
        if let Some(resolver) = &env.names {
            let ends = NamesEnd { streams: &captured, datagrams: &datagrams };
            sockets.extend(resolver.serve(env, self.home, &self.pod, local, names, ends).await?);
        }
        Ok(Open::new(sockets))
    }

    fn rules(&self, wanted: &Wanted, old: &BTreeSet<preexisting::Pair>) -> Rules {
        Rules {
            v6: self.pod.ips.iter().any(IpAddr::is_ipv6),
            probe_ports: self.pod.probe_ports.clone(),
            reset: if wanted.reset { old.iter().copied().collect() } else { Vec::new() },
            dns: self.environment.names.as_ref().map(Names::port),
            tcp_only: wanted.tcp_only.unwrap_or(false),
            released: false,
            by_agent: self.is_by_agent(),
        }
    }

    async fn install(&self, netns: &Netns, rules: Rules) -> Result<(), String> {
        let mut installed = self.rules.lock().await;
        if installed.as_ref() == Some(&rules) {
            return Ok(());
        }
        *installed = None;
        self.post(|entry| entry.rules = None);
        if let Err(error) = capture::apply(netns, rules.clone()).await {
            if !rules.is_nothing() {
                return Err(error.to_string());
            }
            tracing::debug!(pod = %self.name(), %error, "what an earlier proxy may have installed was not looked for");
        }
        self.post(|entry| entry.rules = Some(fingerprint(&rules.render())));
        *installed = Some(rules);
        Ok(())
    }

    /// Brings the filter of UDP and SCTP up to date. What an earlier proxy left stays until control has said.
    async fn filter(&self, netns: &Netns, wanted: Option<Option<Arc<Filter>>>) -> Result<(), String> {
        let Some(wanted) = wanted else { return Ok(()) };
        let mut installed = self.datagrams.lock().await;
        if installed.as_ref() != Some(&wanted) {
            *installed = None;
            self.post(|entry| entry.datagrams = None);
            capture::datagrams::apply(netns, wanted.as_deref()).await.map_err(|error| error.to_string())?;
            self.post(|entry| entry.datagrams = Some(filter_fingerprint(wanted.as_deref())));
            *installed = Some(wanted);
        }
        Ok(())
    }

    /// Brings the rules of a served pod up to date.
    async fn adjust(&self, serving: &mut Serving, wanted: &Wanted) -> Result<(), String> {
        let mut old = BTreeSet::new();
        self.post(|entry| old.clone_from(&entry.old));
        let mut rules = self.rules(wanted, &old);
        if wanted.tcp_only.is_none() {
            rules.tcp_only = self.rules.lock().await.as_ref().is_some_and(|installed| installed.tcp_only);
        }
        self.install(&serving.netns, rules).await?;
        self.filter(&serving.netns, wanted.datagrams.clone()).await?;
        self.post(|entry| entry.served = true);
        match if serving.proven { Ok(()) } else { self.prove(serving).await } {
            Ok(()) => self.state("Captured", String::new()),
            Err(reason) => self.state("Pending", format!("it is served, but by the CNI agent's rules {reason}")),
        }
        Ok(())
    }

    /// Back to plain networking. What flows goes on; tunnels that peers still open are served for a while.
    async fn release(&mut self, serving: Serving) -> Result<(), String> {
        let rules = Rules { released: true, v6: self.pod.ips.iter().any(IpAddr::is_ipv6), ..Rules::default() };
        // A failure is told and tried again by `stay_out`, which finds the table.
        let released = self.install(&serving.netns, rules).await;
        let released = released.and(self.filter(&serving.netns, Some(None)).await);
        serving.captured.advance(Phase::Draining);
        tracing::info!(pod = %self.name(), "released");
        let (again, watch) = drain();
        let taken = self.environment.taken.clone();
        tokio::spawn(linger(serving, watch, self.stop.watch(), self.rules.clone(), taken));
        if released.is_ok() {
            self.lingering = Some(again);
            self.state("Uncaptured", String::new());
        }
        released
    }

    /// The pod is gone, or the proxy stops. The rules stay either way: a namespace that is still there although the pod
    /// is not listed any more fails closed.
    async fn finish(self, serving: Option<Serving>) {
        let stop = self.stop.watch();
        if !stop.is_draining() {
            if let Some(serving) = serving {
                end(&serving);
                if self.is_by_agent() {
                    // The agent takes its own rules back; the pod may go on outside the mesh.
                    let nothing = Rules { by_agent: true, ..Rules::default() };
                    let _ = self.install(&serving.netns, nothing).await;
                    let _ = self.filter(&serving.netns, Some(None)).await;
                }
                let pod = self.pod.uid.clone();
                self.environment.workers.run_all(move |worker| worker.pool.forget(&pod));
            }
            self.board.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.pod.uid);
            return;
        }
        if let Some(serving) = serving {
            // A successor accepts from the very same sockets: what is in their queues is its own now.
            let listeners = if self.environment.replaced.is_draining() { Phase::Forced } else { Phase::Draining };
            serving.captured.advance(listeners);
            serving.tunnels.advance(listeners);
            if listeners == Phase::Forced {
                serving.names.advance(listeners);
            }
            serving.flows.advance(Phase::Draining);
            stop.forced().await;
            end(&serving);
        }
    }
}

/// The last part of a release: until nothing flows any more, the pod is captured `again`, it is gone (then `again` is
/// forced), or the proxy stops.
async fn linger(
    serving: Serving,
    again: Drained,
    stop: Drained,
    rules: Arc<tokio::sync::Mutex<Option<Rules>>>,
    taken: Arc<Taken>,
) {
    tokio::select! { () = sleep(LINGER) => {}, () = again.draining() => {}, () = stop.draining() => {} }
    serving.tunnels.advance(Phase::Draining);
    serving.flows.advance(Phase::Draining);
    let live = || serving.local.inbound.load(Ordering::Relaxed) + serving.local.outbound.load(Ordering::Relaxed);
    while live() > 0 {
        tokio::select! { () = sleep(LINGER_LOOK) => {}, () = again.forced() => break, () = stop.forced() => break }
    }
    end(&serving);
    // A process from before may still have connections of this pod, which need the rules.
    tokio::select! { () = taken.alone() => {}, () = again.draining() => {}, () = stop.forced() => {} }
    // Under the lock, so that a new capture is either seen here or installs after us.
    let mut installed = rules.lock().await;
    if !again.is_draining() && !stop.is_draining() {
        *installed = None;
        if let Err(error) = capture::remove(&serving.netns).await {
            tracing::warn!(%error, "the rules of a released pod could not be removed");
        }
    }
}

fn end(serving: &Serving) {
    for drain in [&serving.captured, &serving.tunnels, &serving.flows, &serving.names] {
        drain.advance(Phase::Forced);
    }
}
