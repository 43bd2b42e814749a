//! One process takes the place of another without a connection refused: the new one gets the listeners of the old one.
//!
//! The old process waits at a unix socket (`TULLE_HANDOVER`). The new one asks there when it starts and gets the listeners
//! of every captured pod, of its name server and of the admin pages; it learns the mesh from control while the old one
//! goes on, then accepts beside it from the same sockets, and says `Ready` once its pods are captured. Only then the old
//! one stops accepting and drains: tunnels say goodbye, live connections go on to their end, and policy changes still
//! reach them. No listener is ever closed in between, so no queue is lost.
//!
//! If the new one ends before it is ready, the old one has lost nothing; if the old one ends before, the new one goes on
//! at once. Pods that came in the meantime are asked for again twice, and their sockets are served besides the own ones.
//! Both are one user's processes on one node, so what is passed is believed, but checked for what it is. Keys are never
//! passed. Limits: budgets hold for each of the two by itself while both run.

pub mod successor;

use std::collections::HashSet;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::app::pods::Pods;
use crate::base::drain::{Drain, Phase};
use crate::base::handover::{Channel, Desk};
use crate::base::workers::Listening;
use crate::capture::preexisting::Pair;

/// Version of the words below. Another one is refused.
const VERSION: u32 = 1;
/// How long a successor may take until it is ready. It waits for control, and control may be away.
const READY: Duration = Duration::from_secs(600);
/// How often the old process says what it still carries.
const TELL: Duration = Duration::from_millis(500);
/// Pause after a conversation that failed.
const PAUSE: Duration = Duration::from_millis(20);
/// Sets of listeners that are passed on. A node has a few hundred pods, each with one set, rarely two.
const MOST_PODS: usize = 4096;
/// Connections from before capture that are passed on for a pod, so that a packet holds them. Beyond, they are no
/// longer counted.
const MOST_OLD: usize = 1000;
/// Draining processes that are told of. They end within their drain time, and each took the time to start.
const MOST_LEFT: usize = 16;

/// What the two say to each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "say")]
enum Word {
    /// The new one, first: everything, please.
    Hello { version: u32 },
    /// The new one: what has come since?
    Again,
    /// The new one serves; what came since, and then drain.
    Ready,
    /// A pod, with its listeners: outbound, plaintext, tunnel, then `names` for datagrams and as many for streams.
    Pod(Given),
    /// The listeners of admin, metrics and readiness.
    Admin,
    /// That was all.
    End,
    /// No, and why.
    Refused { reason: String },
    /// What the draining process and those before it still carry.
    Draining { left: Vec<Left> },
}

/// What is said of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Given {
    /// metadata.uid.
    pub uid: String,
    /// Device and inode of its network namespace.
    pub netns: (u64, u64),
    /// Addresses that its name server listens at.
    pub names: usize,
    /// Connections from before capture.
    pub old: Vec<Pair>,
    /// Fingerprint of the redirect rules that are installed.
    pub rules: Option<u64>,
    /// Fingerprint of the filter of datagrams that is installed.
    pub datagrams: Option<u64>,
}

/// What a draining process still carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Left {
    /// Its process id, in its own pid namespace.
    pub pid: u32,
    /// Live inbound connections.
    pub inbound_connections: usize,
    /// Live outbound connections.
    pub outbound_connections: usize,
}

/// The listeners of a served pod, as a successor may get them.
#[derive(Clone)]
pub struct Open {
    /// Tells sets apart.
    serial: u64,
    /// Outbound, plaintext, tunnel; of the name server those for datagrams, and as many for streams.
    pub sockets: Vec<Listening>,
}

impl Open {
    /// A set of its own.
    pub fn new(sockets: Vec<Listening>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { serial: NEXT.fetch_add(1, Ordering::Relaxed), sockets }
    }

    /// Descriptors of all of them; none if one is closed.
    pub fn duplicate(&self) -> Option<Vec<OwnedFd>> {
        self.sockets.iter().map(Listening::duplicate).collect()
    }
}

fn say(channel: &Channel, word: &Word, fds: &[OwnedFd]) -> io::Result<()> {
    let body = serde_json::to_vec(word)?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    channel.send(&body, &fds)
}

fn hear(channel: &Channel) -> io::Result<Option<(Word, Vec<OwnedFd>)>> {
    let Some((body, fds)) = channel.receive()? else { return Ok(None) };
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// What a process gives its successor, and what it does then.
pub struct Giver {
    /// The pods.
    pub pods: Pods,
    /// Listeners of admin, metrics and readiness.
    pub admin: Vec<TcpListener>,
    /// A successor is getting ready, or serves.
    pub attended: Arc<AtomicBool>,
    /// Ends our own admin pages and name servers.
    pub replaced: Arc<Drain>,
    /// Begins the drain.
    pub stop: Arc<Drain>,
    /// What those before us still carry.
    pub before: Arc<successor::Taken>,
    /// Who took over, and whether anything is left here.
    pub over: Arc<Over>,
}

/// The end of a process that was replaced.
#[derive(Debug, Default)]
pub struct Over {
    /// Process id of the successor; 0: there is none, or it is not seen from here.
    successor: AtomicI32,
    /// Nothing is carried any more.
    drained: AtomicBool,
}

impl Over {
    /// Tells the successor that it is alone now, and waits until neither it nor any later one holds the `desk`. A container that
    /// ends is started anew, and would take the node back from who serves it; when that ends, somebody has to.
    pub async fn stay(&self, desk: &Path) {
        self.drained.store(true, Ordering::Relaxed);
        let mut serves = self.successor.load(Ordering::Relaxed);
        while serves != 0 {
            tokio::time::sleep(TELL).await;
            if !PathBuf::from(format!("/proc/{serves}")).exists() {
                let later = Channel::connect(desk).ok().flatten();
                serves = later.map_or(0, |later| later.peer());
            }
        }
    }
}

impl Giver {
    /// Waits for a successor at `path`, on a thread of its own, until one is ready.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn wait(mut self, path: &Path) -> io::Result<()> {
        let desk = Desk::open(path)?;
        thread::Builder::new().name("handover".into()).spawn(move || {
            let channel = loop {
                match desk.accept().and_then(|channel| Ok(self.serve(&channel)?.then_some(channel))) {
                    Ok(Some(channel)) => break channel,
                    Ok(None) => tracing::warn!("a successor left before it was ready; this process goes on"),
                    Err(error) => {
                        tracing::warn!(%error, "a successor was not served; this process goes on");
                        thread::sleep(PAUSE);
                    }
                }
                self.attended.store(false, Ordering::Relaxed);
            };
            tracing::info!("a successor serves the node; draining");
            self.over.successor.store(channel.peer(), Ordering::Relaxed);
            self.replaced.advance(Phase::Draining);
            self.stop.advance(Phase::Draining);
            // Should the successor die, the next one finds the ports free.
            self.admin.clear();
            drop(desk);
            let carries = || !self.over.drained.load(Ordering::Relaxed);
            while carries() && say(&channel, &Word::Draining { left: self.left() }, &[]).is_ok() {
                thread::sleep(TELL);
            }
        })?;
        Ok(())
    }

    fn left(&self) -> Vec<Left> {
        let (inbound_connections, outbound_connections) = self.pods.connections();
        let own = Left { pid: std::process::id(), inbound_connections, outbound_connections };
        std::iter::once(own).chain(self.before.left()).take(MOST_LEFT).collect()
    }

    /// Whether the successor became ready.
    fn serve(&self, channel: &Channel) -> io::Result<bool> {
        match hear(channel)? {
            Some((Word::Hello { version: VERSION }, _)) => {}
            Some((Word::Hello { version }, _)) => {
                let reason = format!("it speaks version {VERSION} of the handover, not {version}; stop it first");
                return say(channel, &Word::Refused { reason }, &[]).map(|()| false);
            }
            Some(_) => return Err(odd("the successor did not say hello")),
            None => return Ok(false),
        }
        // Before it knows anything that it could act on.
        self.attended.store(true, Ordering::Relaxed);
        let mut given = HashSet::new();
        let admin = self.admin.iter().map(|one| one.as_fd().try_clone_to_owned()).collect::<io::Result<Vec<_>>>()?;
        say(channel, &Word::Admin, &admin)?;
        drop(admin);
        self.give(channel, &mut given)?;
        let deadline = Instant::now() + READY;
        loop {
            match hear(channel) {
                Ok(Some((Word::Again, _))) => self.give(channel, &mut given)?,
                Ok(Some((Word::Ready, _))) => {
                    // From here on the list of pods is the successor's business.
                    self.pods.freeze();
                    if let Err(error) = self.give(channel, &mut given) {
                        tracing::warn!(%error, "a successor serves, but did not take the latest pods");
                    }
                    return Ok(true);
                }
                Ok(Some(_)) => return Err(odd("the successor said what is ours to say")),
                Ok(None) => return Ok(false),
                Err(error) if waits(&error) && Instant::now() < deadline => {}
                Err(error) if waits(&error) => {
                    let reason = format!("it waited {} s for this process to become ready", READY.as_secs());
                    return say(channel, &Word::Refused { reason }, &[]).map(|()| false);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn give(&self, channel: &Channel, given: &mut HashSet<u64>) -> io::Result<()> {
        for (mut pod, open) in self.pods.give() {
            if given.len() >= MOST_PODS || given.contains(&open.serial) {
                continue;
            }
            let Some(fds) = open.duplicate() else { continue };
            pod.old.truncate(MOST_OLD);
            say(channel, &Word::Pod(pod), &fds)?;
            given.insert(open.serial);
        }
        say(channel, &Word::End, &[])
    }
}

/// Nothing came, which is no failure.
fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use tokio::time::timeout;

    use super::{Over, TELL};
    use crate::base::handover::Desk;

    fn process() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn who_was_replaced_stays_while_its_successor_or_a_later_one_serves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("desk");
        let waiting = |successor: &Child| {
            let (over, path) = (Arc::new(Over::default()), path.clone());
            over.successor.store(successor.id().cast_signed(), Ordering::Relaxed);
            tokio::spawn(async move { over.stay(&path).await })
        };
        // Its successor ends, and nobody has taken over from that.
        let successor = process();
        let mut alone = waiting(&successor);
        assert!(timeout(TELL * 3, &mut alone).await.is_err(), "its successor serves");
        end(successor);
        alone.await.unwrap();
        // Somebody has: this process holds the desk.
        let successor = process();
        let mut followed = waiting(&successor);
        let _desk = Desk::open(&path).unwrap();
        end(successor);
        assert!(timeout(TELL * 3, &mut followed).await.is_err(), "a later one serves");
        followed.abort();
    }
}
