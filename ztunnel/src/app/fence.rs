//! Keeps the node's fence: which pods are inside it, and what may pass.
//!
//! A pod is held before it is called captured, and the fence follows the mesh's addresses at most every [`PACE`]. What an earlier
//! process fenced stays fenced until its pod is known again to be open, or its interface is gone; so a restart opens nothing. Nothing is
//! installed before control has said all, since without addresses the fence would be shut.
//!
//! Two processes keep it during a handover, and other programs may flush the node's rules. So nobody writes the table without having
//! looked whether it is still the own one, alone at that moment by a lock on a file beside the handover's socket, which no other user
//! can open; what somebody else fenced is kept; and every [`CHECK`] a table that is not the own one any more is replaced. A process
//! whose successor is getting ready, or serves, opens nothing: the older one may have stopped hearing of control, and the successor
//! was told everything when it began. If that one ends before it is ready, the older one's word counts again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::base::drain::Drained;
use crate::base::netns::Netns;
use crate::base::outlet::{Filter, Outlet};
use crate::capture::fence::{self, Fenced, Inside};
use crate::state::{Protocol, Reader, Snapshot};

/// A walk over 10,000 workloads takes some milliseconds, and the transaction some tens.
const PACE: Duration = Duration::from_millis(200);
/// Before the next try after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Before another look whether the table is still there: what a flush opens is open no longer. A look costs some milliseconds.
const CHECK: Duration = Duration::from_secs(5);
/// For another process to finish its transaction, which takes some tens of milliseconds. Who cannot have the lock writes without:
/// at worst, what the other one wrote at that moment comes back with its next [`CHECK`].
const OTHER: Duration = Duration::from_secs(2);

/// See the module's header.
pub struct Fence {
    /// The node's own network; `None`: switched off.
    node: Option<Netns>,
    /// Locked while the table is written; `None`: there is never another process.
    lock: Option<PathBuf>,
    /// A successor is getting ready, or serves.
    attended: Arc<AtomicBool>,
    reader: Reader,
    state: Mutex<State>,
    /// What is in force, for those who connect.
    passing: watch::Sender<Arc<dyn Filter>>,
}

/// What passes, as the table that is installed says.
#[derive(Default)]
struct Passing {
    /// Uids of the pods inside.
    held: BTreeSet<String>,
    inside: Arc<Inside>,
}

impl Filter for Passing {
    fn passes(&self, pod: &str, to: SocketAddr) -> bool {
        !self.held.contains(pod) || self.inside.takes(to)
    }
}

/// A pod that is open.
#[derive(Debug, Default)]
struct Opened {
    /// Its interfaces in the node's network, as its own network tells.
    ends: BTreeSet<String>,
    /// Its addresses.
    addresses: BTreeSet<IpAddr>,
}

#[derive(Default)]
struct State {
    /// Interfaces by pod uid.
    pods: BTreeMap<String, BTreeSet<String>>,
    /// Those of these pods that have other ways out, too.
    partly: BTreeSet<String>,
    /// Interfaces that another process fenced and this one does not.
    before: BTreeSet<String>,
    /// Interfaces of pods that this process knows to be open, by pod uid: whatever another one says, unless that is its successor.
    open: BTreeMap<String, Opened>,
    /// Those of all these that were ports of a bridge when they were looked at, and of which one.
    bridged: BTreeMap<String, String>,
    /// Addresses of pods by interface.
    own: BTreeMap<String, BTreeSet<IpAddr>>,
    /// The kernel can be asked for its routes.
    routes: bool,
    /// What is installed, and as which table.
    installed: Option<(String, u64)>,
    /// What it lets through.
    inside: Arc<Inside>,
    /// When that was last looked at.
    looked: Option<Instant>,
}

impl State {
    /// Finds out what others fenced, unless the table is the own one: whether it is.
    async fn look(&mut self, node: &Netns) -> Result<bool, String> {
        let failed = |error: io::Error| error.to_string();
        let table = fence::table(node).await.map_err(failed)?;
        let first = self.looked.is_none();
        if !first && table == self.installed.as_ref().map(|(_, table)| *table) {
            self.looked = Some(Instant::now());
            return Ok(true);
        }
        if self.installed.take().is_some() && table.is_none() {
            tracing::warn!("the fence was taken away by another program; it is put up again");
        }
        if first {
            self.routes = fence::knows_routes(node).await;
        }
        let links = fence::interfaces(node).await.map_err(failed)?;
        let (fenced, own) = fence::fenced(node).await.map_err(failed)?;
        let held: BTreeSet<&String> = self.pods.values().flatten().collect();
        let others: BTreeSet<String> = fenced.into_iter().filter(|name| !held.contains(name)).collect();
        self.bridged.extend(fence::bridged(&others, &links));
        for (name, addresses) in own {
            self.own.entry(name).or_insert(addresses);
        }
        // What is in nobody's table any more was opened by whoever wrote it; a flush opens nothing.
        if table.is_some() {
            self.before = others;
        }
        self.looked = Some(Instant::now());
        Ok(false)
    }

    /// Interfaces that others fenced and that this process does not know to be open.
    fn unknown(&self) -> impl Iterator<Item = &String> {
        self.before.iter().filter(|name| !self.is_open(name))
    }

    /// Whether an interface is one of a pod that is open. A pod with power over its own network can say that another pod's
    /// interface is its own, so the addresses that are fenced there, if any are known, have to be its own, too.
    fn is_open(&self, name: &str) -> bool {
        let own = self.own.get(name);
        let belongs = |opened: &Opened| own.is_none_or(|own| own.is_subset(&opened.addresses));
        self.open.values().any(|opened| opened.ends.contains(name) && belongs(opened))
    }
}

impl Fence {
    /// The fence in this network, with what is there of it; `None`: none. `lock`: a file that whoever else keeps it locks, too.
    /// `attended`: a successor is getting ready, or serves.
    pub async fn new(
        node: Option<Netns>,
        lock: Option<PathBuf>,
        attended: Arc<AtomicBool>,
        reader: Reader,
    ) -> Arc<Self> {
        let mut state = State::default();
        if let Some(node) = &node
            && let Err(error) = state.look(node).await
        {
            tracing::warn!(%error, "what is fenced cannot be seen; nothing is changed before it can");
        }
        let (passing, _) = watch::channel::<Arc<dyn Filter>>(Arc::new(Passing::default()));
        Arc::new(Self { node, lock, attended, reader, state: Mutex::new(state), passing })
    }

    /// A pod's way through it: open where it does not hold the pod.
    pub fn outlet(&self, uid: &str) -> Outlet {
        Outlet::new(uid, self.passing.subscribe())
    }

    /// Takes a pod with these `addresses` into the fence; done when that is in force.
    ///
    /// # Errors
    /// Why it is not, or not wholly: what can be held is held all the same.
    pub async fn hold(&self, uid: &str, addresses: &[IpAddr], pod: &Netns) -> Result<(), String> {
        let Some(node) = &self.node else { return Err("the fence is switched off (TULLE_FENCE)".to_owned()) };
        if fence::is_broken() {
            return Ok(());
        }
        let mut state = self.state.lock().await;
        if state.pods.contains_key(uid) && !state.partly.contains(uid) {
            return Ok(());
        }
        let failed = |error: io::Error| error.to_string();
        let inner = fence::interfaces(pod).await.map_err(failed)?;
        let outer = fence::interfaces(node).await.map_err(failed)?;
        let (ends, problem) = fence::ends(&inner, &outer);
        let problem = problem.map_or(Ok(()), Err);
        if ends.is_empty() {
            return problem;
        }
        state.before.retain(|name| !ends.contains(name));
        state.open.remove(uid);
        state.bridged.extend(fence::bridged(&ends, &outer));
        let own: BTreeSet<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
        state.own.extend(ends.iter().map(|name| (name.clone(), own.clone())));
        // What was an end of it stays one, however it looks now.
        state.pods.entry(uid.to_owned()).or_default().extend(ends);
        if problem.is_err() {
            state.partly.insert(uid.to_owned());
        } else {
            state.partly.remove(uid);
        }
        if let Err(error) = self.bring(node, &mut state).await {
            // Asked again, it is tried again.
            let ends = state.pods.remove(uid).unwrap_or_default();
            state.before.extend(ends);
            return Err(error);
        }
        problem
    }

    /// Whether a pod may be inside: it is, or somebody is of whom this process knows nothing.
    pub async fn may_hold(&self, uid: &str) -> bool {
        let state = self.state.lock().await;
        state.pods.contains_key(uid) || state.unknown().next().is_some()
    }

    /// Lets a pod out of the fence, which control says is open.
    pub async fn release(&self, uid: &str, addresses: &[IpAddr], pod: &Netns) {
        let Some(node) = &self.node else { return };
        let mut state = self.state.lock().await;
        let held = state.pods.remove(uid).unwrap_or_default();
        state.partly.remove(uid);
        let mut ends = held.clone();
        // Where there may be another process, it may hold the pod later, too.
        let unseen = self.lock.is_some() && !state.open.contains_key(uid);
        if (unseen || state.unknown().next().is_some())
            && let (Ok(inner), Ok(outer)) = (fence::interfaces(pod).await, fence::interfaces(node).await)
        {
            ends.extend(fence::ends(&inner, &outer).0);
        }
        let changed = !held.is_empty() || state.unknown().any(|name| ends.contains(name));
        // Whether it is opened now is decided when the table is written.
        state.before.extend(held);
        let opened = state.open.entry(uid.to_owned()).or_default();
        opened.ends.extend(ends);
        opened.addresses = addresses.iter().map(IpAddr::to_canonical).collect();
        if changed && let Err(error) = self.bring(node, &mut state).await {
            tracing::warn!(%error, "the fence stays around a pod that is open; trying again");
        }
    }

    /// A pod is gone: its interface goes with its network, and until then stays fenced.
    pub async fn gone(&self, uid: &str) {
        let mut state = self.state.lock().await;
        state.partly.remove(uid);
        state.open.remove(uid);
        if let Some(ends) = state.pods.remove(uid) {
            state.before.extend(ends);
        }
    }

    /// Follows the mesh until `stop` drains.
    pub async fn run(self: Arc<Self>, stop: Drained) {
        let Some(node) = self.node.clone() else { return };
        let mut changes = self.reader.subscribe();
        loop {
            let mut state = self.state.lock().await;
            let failed = match self.reader.load().synced() {
                true => self.sweep(&node, &mut state).await.err(),
                false => None,
            };
            drop(state);
            let pause = if failed.is_some() { RETRY } else { PACE };
            if let Some(error) = failed {
                tracing::error!(%error, "the fence cannot be brought up to date; what is installed stays");
            }
            tokio::select! {
                () = stop.draining() => return,
                changed = async { sleep(pause).await; timeout(CHECK, changes.changed()).await } => {
                    if matches!(changed, Ok(Err(_))) { return }
                }
            }
        }
    }

    /// Forgets interfaces that are gone, and brings the table up to date.
    async fn sweep(&self, node: &Netns, state: &mut State) -> Result<(), String> {
        if !state.before.is_empty() {
            let there = fence::interfaces(node).await.map_err(|error| error.to_string())?;
            let names: BTreeSet<String> = there.values().map(|link| link.name().to_owned()).collect();
            state.before.retain(|name| names.contains(name));
        }
        self.bring(node, state).await
    }

    /// Makes the table what it should be, if it is not.
    async fn bring(&self, node: &Netns, state: &mut State) -> Result<(), String> {
        if state.pods.is_empty() && state.before.is_empty() && state.installed.is_none() && state.looked.is_some() {
            return Ok(());
        }
        let inside = Arc::new(inside(&self.reader.load()));
        let mut clear = !state.bridged.is_empty();
        let mut text = self.text(node, state, &inside, clear).await?;
        let due = state.looked.is_none_or(|at| at.elapsed() >= CHECK);
        if !due && state.installed.as_ref().is_some_and(|(installed, _)| *installed == text) {
            self.tell(state);
            return Ok(());
        }
        let _alone = self.alone().await;
        // What somebody else has changed meanwhile is known only now.
        if !state.look(node).await? {
            clear |= !state.bridged.is_empty();
            text = self.text(node, state, &inside, clear).await?;
        }
        if state.installed.as_ref().is_some_and(|(installed, _)| *installed == text) {
            self.tell(state);
            return Ok(());
        }
        let failed = |error: io::Error| format!("the fence could not be installed: {error}");
        fence::apply(node, text.clone()).await.map_err(failed)?;
        state.inside = inside;
        self.tell(state);
        state.installed = fence::table(node).await.map_err(failed)?.map(|table| (text, table));
        if !self.attended.load(Ordering::Relaxed) {
            // They are out now, and stay so when their pods are gone.
            state.before = state.unknown().cloned().collect();
        }
        Ok(())
    }

    /// Lets those go who wait for what is in force now.
    fn tell(&self, state: &State) {
        let held = state.pods.keys().cloned().collect();
        self.passing.send_replace(Arc::new(Passing { held, inside: state.inside.clone() }));
    }

    /// Waits for [`OTHER`] at most until no other process has the lock.
    async fn alone(&self) -> Option<Flock<File>> {
        let locked = timeout(OTHER, locked(self.lock.as_ref()?)).await;
        let failed = match locked {
            Ok(Ok(held)) => return Some(held),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "another process does not let go of it".to_owned(),
        };
        tracing::warn!(lock = %self.lock.as_ref()?.display(), error = %failed, "the fence is written without its lock");
        None
    }

    /// The transaction that makes the table what it should be. `clear`: also for bridges, which go when the last port has gone.
    async fn text(&self, node: &Netns, state: &mut State, inside: &Inside, clear: bool) -> Result<String, String> {
        let mut interfaces: BTreeSet<String> = state.pods.values().flatten().cloned().collect();
        if self.attended.load(Ordering::Relaxed) {
            interfaces.extend(state.before.iter().cloned());
        } else {
            interfaces.extend(state.unknown().cloned());
        }
        if clear {
            let links = fence::interfaces(node).await.map_err(|error| error.to_string())?;
            state.bridged = fence::bridged(&interfaces, &links);
        }
        let bridges: BTreeSet<&String> = state.bridged.values().collect();
        state.own.retain(|name, _| interfaces.contains(name) || bridges.contains(name));
        let fenced =
            Fenced { interfaces, bridged: state.bridged.clone(), own: state.own.clone(), routes: state.routes };
        Ok(fence::render(&fenced, inside, clear))
    }
}

/// The file at `path`, locked as soon as nobody else has it. The caller bounds the wait.
async fn locked(path: &Path) -> io::Result<Flock<File>> {
    let mut file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, error)) => return Err(error.into()),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// What may pass, by what control says.
fn inside(snapshot: &Snapshot) -> Inside {
    let mut found = Inside::default();
    for record in snapshot.records() {
        match record.protocol() {
            Protocol::Hbone => found.mesh.extend(record.addresses()),
            // On the host network a pod has the node's address, which is outside.
            Protocol::Plain if record.is_pod() && !record.host_network() => found.plain.extend(record.addresses()),
            Protocol::Plain => {}
        }
    }
    if let Some(service) = snapshot.api_server() {
        found.api.extend(service.endpoints.all.iter().flat_map(|endpoint| service.sockets(endpoint)));
    }
    found
}
