//! The node's pods: which there are, which are to be captured, and each one's way there and back.
//!
//! One task reads the list and the snapshot and says what is wanted; one task a pod brings it about and reports the
//! actual state. A pod is `Captured` only when its rules were proven by probing, and `Failed` says why and is tried again.
//! On release the redirect goes first; port 15008 stays open for a while, because peers learn of it later than we, and
//! connections that are under way go on to their own end.

mod rules;
mod serving;
mod task;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::app::fence::Fence;
use crate::app::handover::Open;
use crate::app::handover::successor::Taken;
use crate::app::pods::task::PodTask;
use crate::app::resolver::Names;
use crate::app::wanted::{Filters, Wanted, identity, wanted};
use crate::app::worker::Worker;
use crate::base::drain::{Drain, Drained};
use crate::base::netns::{Netns, NetnsThread};
use crate::base::sockets::Options;
use crate::base::workers::Workers;
use crate::capture::pods::{Pod, Source};
use crate::capture::preexisting;
use crate::capture::rules::Kernel;
use crate::config::Preexisting;
use crate::flow::{Limits, LocalPod, Shared, describes};
use crate::state::{Snapshot, Workload};

/// Captures at a time: each runs `nft` and takes some tens of milliseconds of a core.
const AT_ONCE: usize = 8;
/// How often the list's file is looked at, besides notifications.
const LOOK: Duration = Duration::from_millis(250);

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
    /// Holds pods whose egress is closed.
    pub fence: Arc<Fence>,
    /// What the kernel can do for the rules in pods.
    pub kernel: Kernel,
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
    /// Its egress is closed: inside the fence, or why it is not. `None`: it is open.
    pub(super) fence: Option<Result<(), String>>,
    /// Its listeners are open, and what may not pass is held back.
    pub(super) served: bool,
    /// How the last try ended to bring about what is wanted. `None`: none has ended yet.
    pub(super) tried: Option<Result<(), String>>,
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
    /// Pods that were to be captured when mesh and list were first known: the node serves once each was tried. `None`: not yet known.
    pub(super) first: Arc<Mutex<Option<BTreeSet<String>>>>,
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
        let lasting = |pod: &Pod| Pod { enrolled: None, closed: false, ..pod.clone() };
        let as_started = lasting(&self.pod);
        !self.task.is_finished() && listed.iter().any(|pod| pod.uid == uid && lasting(pod) == as_started)
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

    /// These are to be captured, now that mesh and list are known.
    fn look(&self, captured: &BTreeSet<&str>) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.get_or_insert_with(|| captured.iter().map(|uid| (*uid).to_owned()).collect());
        // Pods that went, or left the mesh, are not waited for.
        first.retain(|uid| captured.contains(uid.as_str()));
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
        let (mut unclaimed, mut captured) = (BTreeSet::new(), BTreeSet::new());
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
            if wanted.capture {
                captured.insert(pod.uid.as_str());
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
            if snapshot.synced() {
                self.look(&captured);
            }
        }
        environment.shared.identities.want(&identities);
    }
}
/// Control's description of `pod`.
fn described<'a>(pod: &'a Pod, snapshot: &'a Snapshot, environment: &Environment) -> Option<&'a Arc<Workload>> {
    let cluster = environment.shared.cluster.clone();
    snapshot
        .workloads_by_pod(&pod.namespace, &pod.name)
        .find(|workload| describes(workload, &pod.uid, &pod.service_account, &cluster))
}
