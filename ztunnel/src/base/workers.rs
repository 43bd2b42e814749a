//! Data-plane workers: single-threaded runtimes, so that a flow and its tunnel share a thread and no lock.
//!
//! Work is not stolen. A connection is accepted on the home worker of its pod and stays there while that worker is not
//! clearly busier than another one ([`SLACK`]); only then it moves, once, before anything was read. A panic ends the
//! task it happens in and nothing else.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::base::drain::Drained;

/// How many more flows the home worker may have than the idlest one before a new connection moves. Small enough to
/// spread load, large enough that a quiet node makes no thread hops.
const SLACK: usize = 8;

/// Hand-overs that may wait for a worker. A full queue refuses the connection, as a full backlog would.
const QUEUE: usize = 4096;

/// How long to wait when the system has no room for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a listener that is told to stop still accepts. What was redirected to it before, or is in its queue, would be
/// reset if it closed at once; a handshake within a pod takes far less.
const LAST_CALL: Duration = Duration::from_millis(100);

type Job<C> = Box<dyn FnOnce(Rc<C>) + Send>;

struct Worker<C> {
    jobs: mpsc::Sender<Job<C>>,
    load: Arc<AtomicUsize>,
}

/// All workers. Cheap to clone.
pub struct Workers<C>(Arc<[Worker<C>]>);

impl<C> Clone for Workers<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// One more flow on a worker, until dropped.
#[derive(Debug)]
pub struct LoadGuard(Arc<AtomicUsize>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<C: 'static> Workers<C> {
    /// Starts `count` workers, each with its own context.
    ///
    /// # Errors
    /// If the system refuses a thread or a runtime.
    pub fn start<F>(count: usize, context: F) -> io::Result<Self>
    where
        F: Fn(usize) -> C + Clone + Send + 'static,
    {
        let mut workers = Vec::with_capacity(count);
        for index in 0..count.max(1) {
            let (jobs, queue) = mpsc::channel::<Job<C>>(QUEUE);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                // Look for new I/O after a few task polls: a busy tunnel must not hide a small request behind it.
                .event_interval(13)
                .build()?;
            let context = context.clone();
            thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || run(&runtime, queue, context(index)))?;
            workers.push(Worker { jobs, load: Arc::default() });
        }
        Ok(Self(workers.into()))
    }

    /// Number of workers.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The worker for a new connection that was accepted on `home`.
    pub fn place(&self, home: usize) -> usize {
        let loads: Vec<usize> = self.0.iter().map(|worker| worker.load.load(Ordering::Relaxed)).collect();
        choose(&loads, home)
    }

    /// Counts a flow on `worker` until the guard is dropped.
    pub fn load(&self, worker: usize) -> LoadGuard {
        let load = self.0[worker % self.0.len()].load.clone();
        load.fetch_add(1, Ordering::Relaxed);
        LoadGuard(load)
    }

    /// Flows of all workers.
    pub fn loads(&self) -> usize {
        self.0.iter().map(|worker| worker.load.load(Ordering::Relaxed)).sum()
    }

    /// Runs `job` on `worker`.
    ///
    /// # Errors
    /// `WouldBlock` if too many wait, so that the caller can refuse the connection.
    pub fn run(&self, worker: usize, job: impl FnOnce(Rc<C>) + Send + 'static) -> io::Result<()> {
        let worker = &self.0[worker % self.0.len()];
        worker.jobs.try_send(Box::new(job)).map_err(|_| {
            io::Error::new(io::ErrorKind::WouldBlock, "the worker has too many connections waiting; retry later")
        })
    }

    /// Runs `job` on every worker.
    pub fn run_all(&self, job: impl Fn(Rc<C>) + Clone + Send + 'static) {
        for index in 0..self.count() {
            let job = job.clone();
            let _ = self.run(index, job);
        }
    }
}

fn run<C: 'static>(runtime: &tokio::runtime::Runtime, mut queue: mpsc::Receiver<Job<C>>, context: C) {
    let context = Rc::new(context);
    let local = LocalSet::new();
    local.block_on(runtime, async move {
        while let Some(job) = queue.recv().await {
            job(context.clone());
        }
    });
}

/// What is done with an accepted connection, on the worker it was placed on.
pub type Accepted<C> = Arc<dyn Fn(Rc<C>, TcpStream, LoadGuard) + Send + Sync>;

/// A socket that a worker takes connections or datagrams from, as others may see it. It does not keep the socket open.
#[derive(Clone, Default)]
pub struct Listening(Arc<OnceLock<Weak<dyn AsFd + Send + Sync>>>);

impl Listening {
    /// Another descriptor of the same socket; none before it is served and after it was closed.
    pub fn duplicate(&self) -> Option<OwnedFd> {
        self.0.get()?.upgrade()?.as_fd().try_clone_to_owned().ok()
    }

    /// From now on this is the socket. Only the first one counts.
    pub fn show<S: AsFd + Send + Sync + 'static>(&self, socket: &Arc<S>) {
        let weak = Arc::downgrade(socket);
        let _ = self.0.set(weak);
    }
}

impl<C: 'static> Workers<C> {
    /// Accepts on `home` until `drained` says stop, and places each connection.
    ///
    /// # Errors
    /// If the home worker takes no more jobs.
    pub fn accept(
        &self,
        home: usize,
        listener: std::net::TcpListener,
        drained: Drained,
        accepted: Accepted<C>,
    ) -> io::Result<Listening> {
        let workers = self.clone();
        let listening = Listening::default();
        let shown = listening.clone();
        self.run(home, move |context| {
            spawn(async move {
                if let Err(error) = workers.accept_loop(home, listener, &shown, &drained, accepted, context).await {
                    tracing::error!(%error, "a listener failed");
                }
            });
        })?;
        Ok(listening)
    }

    async fn accept_loop(
        &self,
        home: usize,
        listener: std::net::TcpListener,
        shown: &Listening,
        drained: &Drained,
        accepted: Accepted<C>,
        context: Rc<C>,
    ) -> io::Result<()> {
        let listener = Arc::new(TcpListener::from_std(listener)?);
        shown.show(&listener);
        let stop = async {
            drained.draining().await;
            tokio::select! { () = tokio::time::sleep(LAST_CALL) => {}, () = drained.forced() => {} }
        };
        tokio::pin!(stop);
        loop {
            let tcp = tokio::select! {
                result = listener.accept() => match result {
                    Ok((tcp, _)) => tcp,
                    Err(error) => {
                        // Out of descriptors or memory: the backlog keeps the clients while we wait for some to return.
                        tracing::warn!(%error, "cannot accept a connection; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = &mut stop => return Ok(()),
            };
            let worker = self.place(home);
            let guard = self.load(worker);
            if worker == home {
                accepted(context.clone(), tcp, guard);
                continue;
            }
            let tcp = tcp.into_std()?;
            let accepted = accepted.clone();
            let moved = self.run(worker, move |context| match TcpStream::from_std(tcp) {
                Ok(tcp) => accepted(context, tcp, guard),
                Err(error) => tracing::warn!(%error, "a connection could not be handed to another worker"),
            });
            if let Err(error) = moved {
                // The closure, and with it the connection, is gone: the client sees it closed.
                tracing::warn!(%error, "a connection was refused");
            }
        }
    }
}

/// Spawns a task on the current worker.
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    tokio::task::spawn_local(future);
}

fn choose(loads: &[usize], home: usize) -> usize {
    let home = home % loads.len().max(1);
    let idlest = loads.iter().enumerate().min_by_key(|(_, load)| **load).map_or(home, |(index, _)| index);
    if loads.get(home).copied().unwrap_or(0) > loads.get(idlest).copied().unwrap_or(0) + SLACK { idlest } else { home }
}

#[cfg(test)]
mod tests {
    use super::{SLACK, choose};

    #[test]
    fn a_connection_moves_only_when_its_home_is_clearly_busier() {
        assert_eq!(choose(&[0, 0], 1), 1);
        assert_eq!(choose(&[0, SLACK], 1), 1);
        assert_eq!(choose(&[0, SLACK + 1], 1), 0);
        assert_eq!(choose(&[5], 7), 0);
    }
}
