//! A handover, seen from the new process: what it got, what it waits for, and how it says that it serves.
//!
//! Listeners lie in [`Taken`] until the pod's own task claims them, and only for the very namespace that they were opened
//! in. What nobody will claim, because its pod is gone or not to be captured any more, is closed: a listener that nobody
//! accepts from would let its clients hang.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use socket2::{SockRef, Type};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::app::handover::{Given, Giver, Left, MOST_LEFT, MOST_PODS, VERSION, Word, hear, odd, say, waits};
use crate::app::pods::Pods;
use crate::app::resolver::GivenNames;
use crate::app::worker::Listeners;
use crate::base::handover::{Channel, PATIENCE};
use crate::capture::preexisting::Pair;
use crate::state::Reader;

/// How long a successor waits for its pods after it knows the mesh. What is not captured by then was not before.
const CAPTURE: Duration = Duration::from_secs(15);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);

/// A pod's part of what was taken.
#[derive(Debug)]
pub struct Claim {
    /// Ports of the proxy.
    pub listeners: Listeners,
    /// Its name server.
    pub names: GivenNames,
    /// Connections from before its capture.
    pub old: BTreeSet<Pair>,
    /// Fingerprint of its redirect rules.
    pub rules: Option<u64>,
    /// Fingerprint of its filter of datagrams.
    pub datagrams: Option<u64>,
}

/// By uid, with device and inode of their namespaces. A pod has a second set when it was captured by both.
type Sets = HashMap<String, Vec<((u64, u64), Claim)>>;

/// What a process got from the one before it, and whether that still runs.
#[derive(Debug)]
pub struct Taken {
    pods: Mutex<Sets>,
    left: Mutex<Vec<Left>>,
    /// Answers that came whole.
    ends: watch::Sender<u32>,
    /// The process before this one has ended, or there was none.
    gone: watch::Sender<bool>,
    refused: Mutex<Option<String>>,
}

impl Default for Taken {
    /// Nobody was there.
    fn default() -> Self {
        Self {
            pods: Mutex::default(),
            left: Mutex::default(),
            ends: watch::Sender::new(0),
            gone: watch::Sender::new(true),
            refused: Mutex::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Taken {
    /// A set of listeners of a pod, if there is one of this very namespace.
    pub fn claim(&self, uid: &str, netns: (u64, u64)) -> Option<Claim> {
        let mut pods = lock(&self.pods);
        let sets = pods.get_mut(uid)?;
        sets.retain(|(of, _)| *of == netns);
        let (_, claim) = sets.pop()?;
        if sets.is_empty() {
            pods.remove(uid);
        }
        Some(claim)
    }

    /// Closes what belongs to none of the pods that `wanted` says.
    pub fn keep(&self, wanted: impl Fn(&str) -> bool) {
        lock(&self.pods).retain(|uid, _| wanted(uid));
    }

    /// Changes when further sets may have come.
    pub fn more(&self) -> watch::Receiver<u32> {
        self.ends.subscribe()
    }

    /// Whether no process from before runs beside this one.
    pub fn is_alone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Until that is so.
    pub async fn alone(&self) {
        let mut gone = self.gone.subscribe();
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// What processes from before still carry.
    pub fn left(&self) -> Vec<Left> {
        if self.is_alone() { Vec::new() } else { lock(&self.left).clone() }
    }

    fn put(&self, given: Given, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut pods = lock(&self.pods);
        if pods.values().map(Vec::len).sum::<usize>() >= MOST_PODS {
            return Err(odd("more pods than a node has"));
        }
        let uid = given.uid.clone();
        let netns = given.netns;
        pods.entry(uid).or_default().push((netns, claim(given, fds)?));
        Ok(())
    }
}

/// Checks that the sockets are what they are said to be.
fn claim(given: Given, fds: Vec<OwnedFd>) -> io::Result<Claim> {
    let wrong = || odd("a pod's sockets are not its listeners");
    let mut fds = fds.into_iter();
    let mut port = |wanted: u16| {
        let listener = listener(fds.next().ok_or_else(wrong)?)?;
        if listener.local_addr()?.port() == wanted { Ok(listener) } else { Err(wrong()) }
    };
    let listeners = Listeners {
        outbound: port(PORT_OUTBOUND)?,
        plaintext: port(PORT_INBOUND_PLAINTEXT)?,
        hbone: port(PORT_HBONE)?,
    };
    let rest: Vec<OwnedFd> = fds.collect();
    if given.names.checked_mul(2) != Some(rest.len()) {
        return Err(wrong());
    }
    let mut rest = rest.into_iter();
    let datagrams = rest.by_ref().take(given.names).map(datagrams).collect::<io::Result<_>>()?;
    let streams = rest.map(listener).collect::<io::Result<_>>()?;
    Ok(Claim {
        listeners,
        names: GivenNames { datagrams, streams },
        old: given.old.into_iter().collect(),
        rules: given.rules,
        datagrams: given.datagrams,
    })
}

fn listener(fd: OwnedFd) -> io::Result<TcpListener> {
    if !SockRef::from(&fd).is_listener()? {
        return Err(odd("a socket that does not listen"));
    }
    let listener = TcpListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn datagrams(fd: OwnedFd) -> io::Result<UdpSocket> {
    if SockRef::from(&fd).r#type()? != Type::DGRAM {
        return Err(odd("a socket that is not for datagrams"));
    }
    let socket = UdpSocket::from(fd);
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// A handover under way.
pub struct Taking {
    /// The pods' listeners.
    pub taken: Arc<Taken>,
    /// Those of admin, metrics and readiness.
    pub admin: Vec<TcpListener>,
    channel: Arc<Channel>,
    path: PathBuf,
}

/// Asks the process before this one for its listeners. `None`: there is none, or it did not answer.
///
/// # Errors
/// It runs and refuses.
pub fn take(path: &Path) -> io::Result<Option<Taking>> {
    match ask(path) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => {
            let path = path.display();
            tracing::warn!(%path, %error, "the process before this one gave no listeners; opening fresh ones");
            Ok(None)
        }
        other => other,
    }
}

fn ask(path: &Path) -> io::Result<Option<Taking>> {
    let Some(channel) = Channel::connect(path)? else { return Ok(None) };
    say(&channel, &Word::Hello { version: VERSION }, &[])?;
    let taken = Arc::new(Taken { gone: watch::Sender::new(false), ..Taken::default() });
    let mut admin = Vec::new();
    while *taken.ends.borrow() == 0 {
        if !hear_one(&channel, &taken, &mut admin)? {
            return Err(odd("it ended in the middle"));
        }
        if let Some(reason) = lock(&taken.refused).take() {
            let text = format!("the process before this one does not hand over: {reason}");
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
        }
    }
    tracing::info!(pods = lock(&taken.pods).len(), "got the listeners of the process before this one");
    let channel = Arc::new(channel);
    let (heard, book) = (channel.clone(), taken.clone());
    thread::Builder::new().name("handover".into()).spawn(move || {
        loop {
            match hear_one(&heard, &book, &mut Vec::new()) {
                Ok(true) => {}
                Err(error) if waits(&error) => {}
                Ok(false) | Err(_) => break,
            }
        }
        book.gone.send_replace(true);
    })?;
    Ok(Some(Taking { taken, admin, channel, path: path.to_owned() }))
}

/// Takes one word in; false: the other side is gone.
fn hear_one(channel: &Channel, taken: &Taken, admin: &mut Vec<TcpListener>) -> io::Result<bool> {
    let Some((word, fds)) = hear(channel)? else { return Ok(false) };
    match word {
        Word::Pod(given) => taken.put(given, fds)?,
        Word::Admin => *admin = fds.into_iter().map(listener).collect::<io::Result<_>>()?,
        Word::End => taken.ends.send_modify(|ends| *ends += 1),
        Word::Refused { reason } => *lock(&taken.refused) = Some(reason),
        Word::Draining { mut left } => {
            left.truncate(MOST_LEFT);
            *lock(&taken.left) = left;
        }
        Word::Hello { .. } | Word::Again | Word::Ready => return Err(odd("the old process said what is ours to say")),
    }
    Ok(true)
}

impl Taking {
    /// Until control has described the mesh. As long as it has not, the old process serves better than this one could;
    /// if that ends, there is nothing to wait for. Then what came since is taken, too.
    ///
    /// # Errors
    /// The old process runs and will not wait any longer.
    pub async fn known(&self, reader: &Reader) -> io::Result<()> {
        let mut changes = reader.subscribe();
        let synced = async { while !reader.load().synced() && changes.changed().await.is_ok() {} };
        tokio::select! { () = synced => {}, () = self.taken.alone() => {} }
        if let Some(reason) = lock(&self.taken.refused).take() {
            return Err(odd(&format!("the process before this one does not hand over: {reason}")));
        }
        self.ask(&Word::Again).await;
        Ok(())
    }

    /// Says `word`, and waits until the answer came whole, or none will.
    async fn ask(&self, word: &Word) {
        let mut ends = self.taken.ends.subscribe();
        let count = *ends.borrow() + 1;
        if say(&self.channel, word, &[]).is_err() {
            // It is gone, which is as good.
            return;
        }
        let all = async {
            tokio::select! { _ = ends.wait_for(|ends| *ends >= count) => {}, () = self.taken.alone() => {} }
        };
        if timeout(PATIENCE, all).await.is_err() {
            tracing::warn!("the process before this one does not answer any more; going on with what it gave");
        }
    }

    /// Until the pods are captured, or will not be, and every listener is served or closed on purpose.
    pub async fn captured(&self, pods: &Pods) {
        let deadline = Instant::now() + CAPTURE;
        let ready = async {
            // A pod that fails may have lost a race for its sockets, and the process before this one still serves it.
            let waits = || !pods.looked() || !pods.pending().is_empty() || !pods.failing().is_empty();
            while waits() || !lock(&self.taken.pods).is_empty() {
                sleep(LOOK).await;
            }
        };
        if timeout_at(deadline, ready).await.is_err() {
            tracing::warn!(pending = ?pods.pending(), failing = ?pods.failing(), "taking over although not everything is as it should be");
        }
    }

    /// The listeners of admin, metrics and readiness, if they are at `addresses`.
    pub fn admin_at(&mut self, addresses: &[SocketAddr]) -> Option<Vec<TcpListener>> {
        let admin = std::mem::take(&mut self.admin);
        let at = admin.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>().ok()?;
        (at == addresses).then_some(admin)
    }

    /// This process serves from now on: successors find it, and the old one drains.
    ///
    /// # Errors
    /// If successors could not find it.
    pub async fn ready(self, giver: Giver) -> io::Result<()> {
        giver.wait(&self.path)?;
        self.ask(&Word::Ready).await;
        tracing::info!("took the place of the process before this one");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::drain::{Drain, Drained, drain};
    use std::sync::atomic::AtomicBool;

    fn giver() -> (Giver, Drained) {
        let (stop, stopping) = drain();
        let replaced: Arc<Drain> = Arc::new(drain().0);
        let admin = vec![TcpListener::bind("127.0.0.1:0").unwrap()];
        let (stop, attended) = (Arc::new(stop), Arc::new(AtomicBool::default()));
        let before = Arc::default();
        (Giver { pods: Pods::default(), admin, attended, replaced, stop, before, over: Arc::default() }, stopping)
    }

    #[tokio::test]
    async fn the_old_process_drains_only_when_the_new_one_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        assert!(take(&path).unwrap().is_none(), "nobody is there");
        let (old, stopping) = giver();
        old.wait(&path).unwrap();
        let first = take(&path).unwrap().unwrap();
        assert_eq!(first.admin.len(), 1);
        first.channel.close();
        let second = take(&path).unwrap().unwrap();
        assert!(!stopping.is_draining(), "the first one died, and nothing happened");
        let taken = second.taken.clone();
        assert!(!taken.is_alone());
        let (new, _stopping) = giver();
        second.ready(new).await.unwrap();
        timeout(Duration::from_secs(5), stopping.draining()).await.unwrap();
        let told = async {
            while taken.left().is_empty() {
                sleep(LOOK).await;
            }
        };
        timeout(Duration::from_secs(5), told).await.expect("the old one says what it carries");
        assert!(take(&path).unwrap().is_some(), "the next one finds the new process");
    }

    #[test]
    fn another_version_and_nonsense_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        giver().0.wait(&path).unwrap();
        for (body, refused) in
            [(&br#"{"say":"hello","version":2}"#[..], true), (b"{", false), (b"{\"say\":\"end\"}", false)]
        {
            let channel = Channel::connect(&path).unwrap().unwrap();
            channel.send(body, &[]).unwrap();
            let answer = hear(&channel).ok().flatten().map(|(word, _)| word);
            assert_eq!(matches!(answer, Some(Word::Refused { .. })), refused, "{body:?}: {answer:?}");
        }
        assert!(take(&path).unwrap().is_some(), "it serves the next one all the same");
    }

    #[test]
    fn what_is_no_listener_is_not_taken() {
        let one = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(one.local_addr().unwrap()).unwrap();
        assert!(listener(OwnedFd::from(stream)).is_err());
        assert!(datagrams(OwnedFd::from(one.try_clone().unwrap())).is_err());
        assert!(listener(OwnedFd::from(one)).is_ok());
        let given = Given { uid: "a".into(), netns: (1, 2), names: 0, old: vec![], rules: None, datagrams: None };
        let wrong = (0..3).map(|_| OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap())).collect();
        assert!(claim(given.clone(), wrong).is_err(), "other ports");
        assert!(claim(given, vec![]).is_err(), "none at all");
    }
}
