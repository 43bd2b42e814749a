//! Doing things inside a pod's network namespace.
//!
//! `setns` changes the calling thread, so it happens only on threads that do nothing else: one long-lived thread for
//! sockets ([`NetnsThread`]), which hands the finished sockets over, and short-lived ones for slow work such as
//! installing rules ([`run_blocking`]). A worker never changes its namespace, so it cannot be left in the wrong one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

/// Requests that may wait for the socket thread. One takes some 20 µs, so a full queue is 40 ms of work: more would
/// only make connections time out later instead of failing now.
const QUEUE: usize = 2048;

/// An open network namespace. Two values are equal if they name the same namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<OwnedFd>,
    device: u64,
    inode: u64,
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Netns {}

impl Netns {
    /// Opens the namespace at `path` (`/proc/<pid>/ns/net`, `/run/netns/<name>`).
    ///
    /// # Errors
    /// If the file cannot be opened. Whether it is a network namespace shows when it is entered.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(File::open(path)?.into())
    }

    /// The namespace that a descriptor stands for.
    ///
    /// # Errors
    /// If the system does not say which file it is. Whether it is a network namespace shows when it is entered.
    pub fn of(descriptor: OwnedFd) -> io::Result<Self> {
        let file = File::from(descriptor);
        let meta = file.metadata()?;
        Ok(Self { file: Arc::new(OwnedFd::from(file)), device: meta.dev(), inode: meta.ino() })
    }

    /// Device and inode, which identify it while it is open.
    pub fn id(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    fn enter(&self) -> io::Result<()> {
        setns(&*self.file, CloneFlags::CLONE_NEWNET).map_err(|error| {
            io::Error::other(format!("cannot enter the network namespace: {error} (needs CAP_SYS_ADMIN over it)"))
        })
    }
}

type Job = Box<dyn FnOnce(&mut Option<(u64, u64)>) + Send>;

/// The thread that makes sockets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetnsThread {
    jobs: SyncSender<Job>,
}

impl NetnsThread {
    /// Starts the thread. It ends with the last handle.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = sync_channel::<Job>(QUEUE);
        thread::Builder::new().name("netns".into()).spawn(move || {
            // Nothing is entered, and no privilege needed, for who works where it is.
            let mut current = Netns::open(Path::new("/proc/thread-self/ns/net")).ok().map(|own| own.id());
            while let Ok(job) = queue.recv() {
                job(&mut current);
            }
        })?;
        Ok(Self { jobs })
    }

    /// Runs `work` inside `netns` and gives its result back.
    ///
    /// # Errors
    /// What `work` says; `WouldBlock` if too many requests wait.
    pub async fn run<T, F>(&self, netns: &Netns, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let netns = netns.clone();
        let job: Job = Box::new(move |current| {
            if *current != Some(netns.id()) {
                if let Err(error) = netns.enter() {
                    *current = None;
                    let _ = reply.send(Err(error));
                    return;
                }
                *current = Some(netns.id());
            }
            let _ = reply.send(work());
        });
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => {
                io::Error::new(io::ErrorKind::WouldBlock, "too many sockets are being opened at once; retry later")
            }
            TrySendError::Disconnected(_) => io::Error::other("the namespace thread is gone"),
        })?;
        answer.await.map_err(|_| io::Error::other("the namespace thread dropped a request"))?
    }
}

/// Runs slow `work` inside `netns` on a thread of its own.
///
/// # Errors
/// What `work` says, or that the namespace cannot be entered.
pub async fn run_blocking<T, F>(netns: &Netns, work: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let netns = netns.clone();
    let (reply, answer) = oneshot::channel();
    // Not tokio's blocking pool: its threads are reused, and this one stays in the pod's namespace.
    thread::Builder::new().name("netns-work".into()).spawn(move || {
        let _ = reply.send(netns.enter().and_then(|()| work()));
    })?;
    answer.await.map_err(|_| io::Error::other("work inside the network namespace was lost"))?
}

/// Runs `work` inside `netns` on a thread of its own, and waits for it. For programs without a runtime.
///
/// # Errors
/// What `work` says, or that the namespace cannot be entered.
pub fn run_waiting<T, F>(netns: &Netns, work: F) -> io::Result<T>
where
    T: Send,
    F: FnOnce() -> io::Result<T> + Send,
{
    thread::scope(|scope| {
        let entered = thread::Builder::new().spawn_scoped(scope, || netns.enter().and_then(|()| work()))?;
        entered.join().unwrap_or_else(|_| Err(io::Error::other("work inside the network namespace was lost")))
    })
}

/// All addresses of the interfaces of the current network namespace.
///
/// # Errors
/// If the kernel does not list them.
pub fn local_addresses() -> io::Result<BTreeSet<IpAddr>> {
    let mut found = BTreeSet::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            found.insert(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            found.insert(IpAddr::V6(v6.ip()));
        }
    }
    Ok(found)
}
