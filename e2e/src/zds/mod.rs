//! A CNI agent, played: it hands a node's pods to a proxy that takes them as Istio's ztunnel does (ZDS), and installs
//! the redirect rules that such a proxy expects to find.
//!
//! What a connection has still to be told is computed anew from what is wanted and what it was told ([`next`]), so a
//! proxy that restarts, or takes over from another, is brought up to date by the same code as one that stays. Additions
//! go to the newest connection only, removals to all. Limits: pods are not remembered beyond this process, so a
//! descriptor is never lost and `KeepWorkload` never sent.

mod rules;
mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use tulle_proto::workload::zds;

use crate::topology;
use crate::zds::wire::Packets;

/// The protocol's deadline for a message and for its answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How often a connection without work is looked at: has it closed, does it speak out of turn?
const LOOK: Duration = Duration::from_millis(100);
/// How long such a look takes.
const GLANCE: Duration = Duration::from_millis(1);
/// Connections at once: a proxy, its successor, and two more for whoever is in a hurry. Others are closed at once.
const CONNECTIONS_MAX: usize = 4;

/// A pod to hand over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// Service account.
    pub account: String,
    /// Its network namespace.
    pub netns: PathBuf,
}

/// How far a pod has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handed {
    /// Not yet, or not answered yet.
    Pending,
    /// Rules are installed and the proxy has said that it serves the pod.
    Captured,
    /// The rules could not be installed, or the proxy refused the pod; why.
    Failed(String),
}

/// An agent that serves until dropped.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
}

/// How a pod's traffic is brought to the proxy, and let go: given its network namespace.
#[derive(Clone, Copy, Debug)]
struct Redirect {
    install: fn(&Path) -> anyhow::Result<()>,
    remove: fn(&Path) -> anyhow::Result<()>,
}

/// The rules of [`rules`].
const REDIRECT: Redirect = Redirect {
    install: |netns| {
        topology::nft(netns, &rules::install())?;
        rules::ROUTE.into_iter().try_for_each(|(family, script)| topology::ip_of(netns, family, script))
    },
    remove: |netns| {
        topology::nft(netns, rules::REMOVE)?;
        rules::ROUTE.into_iter().try_for_each(|(family, _)| topology::ip_of(netns, family, rules::UNROUTE))
    },
};

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    redirect: Redirect,
}

#[derive(Debug, Default)]
struct State {
    /// Pods by uid.
    wanted: BTreeMap<String, Pod>,
    /// What became of them.
    handed: BTreeMap<String, Handed>,
    /// Pods whose rules are installed, with where.
    ruled: BTreeMap<String, PathBuf>,
    /// Number of the newest connection.
    newest: u64,
    /// Connections being served.
    open: usize,
    ended: bool,
}

impl Agent {
    /// Listens on the socket at `path`. Fails when it cannot be made.
    pub fn start(path: &Path) -> anyhow::Result<Self> {
        Self::start_with(path, REDIRECT)
    }

    fn start_with(path: &Path, redirect: Redirect) -> anyhow::Result<Self> {
        let listener = Arc::new(wire::listen(path).with_context(|| format!("the agent's socket {}", path.display()))?);
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), redirect });
        let (to_accept, to_serve) = (listener.clone(), shared.clone());
        let accepting = std::thread::Builder::new().name("zds".into()).spawn(move || accept(&to_accept, &to_serve))?;
        Ok(Self { shared, listener, accepting: Some(accepting) })
    }

    /// Says which pods, by uid, the proxy is to serve from now on.
    pub fn set(&self, pods: BTreeMap<String, Pod>) {
        let mut state = self.shared.lock();
        // A pod that is made again under its uid lives in another namespace: what is known of the old one is void.
        let gone: Vec<String> = state
            .wanted
            .iter()
            .filter(|(uid, pod)| pods.get(*uid).is_none_or(|new| new.netns != pod.netns))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in gone {
            state.handed.remove(&uid);
        }
        state.wanted = pods;
        self.shared.changed.notify_all();
    }

    /// How far each pod has come, by uid.
    pub fn handed(&self) -> BTreeMap<String, Handed> {
        let state = self.shared.lock();
        state
            .wanted
            .keys()
            .map(|uid| (uid.clone(), state.handed.get(uid).cloned().unwrap_or(Handed::Pending)))
            .collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        // Wakes the accepting thread; the others look at `ended` soon enough.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    /// Every change under the lock is complete in itself, so a panic elsewhere leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, uid: &str, handed: Handed) {
        let mut state = self.lock();
        if let Handed::Failed(why) = &handed {
            tracing::warn!("pod {uid} is not handed over: {why}");
        }
        state.handed.insert(uid.to_owned(), handed);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let mut state = shared.lock();
        if state.ended {
            return;
        }
        // An accept that failed is the caller's who went away.
        let Ok(stream) = stream else { continue };
        if state.open >= CONNECTIONS_MAX {
            let _ = stream.shutdown(Shutdown::Both);
            continue;
        }
        state.open += 1;
        state.newest += 1;
        let number = state.newest;
        drop(state);
        let of_thread = shared.clone();
        let served = std::thread::Builder::new().name(format!("zds-{number}")).spawn(move || {
            if let Err(error) = serve(stream, number, &of_thread) {
                tracing::warn!("connection {number} of a node's proxy to its agent: {error:#}");
            }
            of_thread.lock().open -= 1;
        });
        if served.is_err() {
            shared.lock().open -= 1;
        }
    }
}

/// What a connection is to be told next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Add(String, Pod),
    SnapshotSent,
    Del(String),
    Wait,
}

/// What a connection has been told.
#[derive(Clone, Debug, Default)]
struct Told {
    pods: BTreeMap<String, PathBuf>,
    snapshot: bool,
}

/// Everything that is there comes first, then the end of the snapshot, then changes; removals before additions, because
/// a pod that is made again is both.
fn next(wanted: &BTreeMap<String, Pod>, told: &Told, newest: bool) -> Step {
    let gone = told.pods.iter().find(|(uid, netns)| wanted.get(*uid).is_none_or(|pod| pod.netns != **netns));
    if let Some((uid, _)) = gone.filter(|_| told.snapshot) {
        return Step::Del(uid.clone());
    }
    let missing = wanted.iter().find(|(uid, _)| !told.pods.contains_key(*uid));
    match missing.filter(|_| newest) {
        Some((uid, pod)) => Step::Add(uid.clone(), pod.clone()),
        None if told.snapshot => Step::Wait,
        None => Step::SnapshotSent,
    }
}

fn serve(stream: UnixStream, number: u64, shared: &Shared) -> anyhow::Result<()> {
    let packets = Packets::new(stream);
    let hello: zds::ZdsHello = packets.receive(ANSWER)?.context("it left without a word")?;
    anyhow::ensure!(hello.version() == zds::Version::V1, "it speaks version {}; this agent speaks 1", hello.version);
    let mut told = Told::default();
    loop {
        let step = {
            let state = shared.lock();
            if state.ended {
                return Ok(());
            }
            match next(&state.wanted, &told, state.newest == number) {
                Step::Wait => {
                    drop(shared.changed.wait_timeout(state, LOOK));
                    None
                }
                step => Some(step),
            }
        };
        match step {
            Some(step) => take(&packets, step, &mut told, shared)?,
            None => match packets.receive::<zds::WorkloadResponse>(GLANCE) {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => anyhow::bail!("it spoke out of turn"),
                Err(error) if wire::is_timeout(&error) => {}
                Err(error) => return Err(error.into()),
            },
        }
    }
}

fn take(packets: &Packets, step: Step, told: &mut Told, shared: &Shared) -> anyhow::Result<()> {
    use zds::workload_request::Payload;
    match step {
        Step::Add(uid, pod) => {
            told.pods.insert(uid.clone(), pod.netns.clone());
            let netns = match open_and_redirect(&uid, &pod.netns, shared) {
                Ok(netns) => netns,
                Err(error) => {
                    // Without rules the pod must not be called captured; it stays untold until it is made again.
                    shared.note(&uid, Handed::Failed(format!("{error:#}")));
                    return Ok(());
                }
            };
            let Pod { name, namespace, account, .. } = pod;
            let workload_info = Some(zds::WorkloadInfo { name, namespace, service_account: account });
            let add = zds::AddWorkload { uid: uid.clone(), workload_info };
            let answer = ask(packets, Payload::Add(add), Some(&netns))?;
            shared.note(&uid, answer.map_or_else(Handed::Failed, |()| Handed::Captured));
        }
        Step::SnapshotSent => {
            told.snapshot = true;
            let answer = ask(packets, Payload::SnapshotSent(zds::SnapshotSent {}), None)?;
            answer.map_err(|why| anyhow::anyhow!("it refused the end of the snapshot: {why}"))?;
        }
        Step::Del(uid) => {
            told.pods.remove(&uid);
            let answer = ask(packets, Payload::Del(zds::DelWorkload { uid: uid.clone() }), None)?;
            // The proxy's side of it is the proxy's business; the pod's traffic goes its own way again in any case.
            if let Err(why) = answer {
                tracing::warn!("pod {uid}: the proxy did not let go of it: {why}");
            }
            let ruled = shared.lock().ruled.remove(&uid);
            if let Some(netns) = ruled.filter(|netns| netns.exists()) {
                (shared.redirect.remove)(&netns)?;
            }
        }
        Step::Wait => {}
    }
    Ok(())
}

/// One message and its answer; the inner error is the proxy's refusal.
fn ask(
    packets: &Packets,
    payload: zds::workload_request::Payload,
    netns: Option<&File>,
) -> anyhow::Result<Result<(), String>> {
    let request = zds::WorkloadRequest { payload: Some(payload) };
    packets.send(&request, netns.map(AsFd::as_fd), ANSWER).context("sending to it")?;
    let answer: io::Result<Option<zds::WorkloadResponse>> = packets.receive(ANSWER);
    let answer = answer.context("waiting 5 s for its answer")?.context("it left without an answer")?;
    match answer.payload {
        Some(zds::workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(Ok(())),
        Some(zds::workload_response::Payload::Ack(ack)) => Ok(Err(ack.error)),
        None => anyhow::bail!("an answer without content"),
    }
}

fn open_and_redirect(uid: &str, path: &Path, shared: &Shared) -> anyhow::Result<File> {
    let netns = File::open(path).with_context(|| format!("network namespace {}", path.display()))?;
    if shared.lock().ruled.get(uid).is_none_or(|ruled| ruled != path) {
        (shared.redirect.install)(path)?;
        shared.lock().ruled.insert(uid.to_owned(), path.to_path_buf());
    }
    Ok(netns)
}

#[cfg(test)]
mod tests;
