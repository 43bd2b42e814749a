//! The supervisor: one process that owns a lab's namespaces and child processes and brings them to what is wanted.
//!
//! One thread owns everything and works off one change at a time (`engine`), because the order of steps is the point: a
//! pod's capture before its start, its publication after its capture. Clients (`socket`) only hand in changes and read
//! the published view. Limits: one change at a time; a change that does not settle in its time is reported, kept, and
//! tried again.

pub mod process;

pub mod mesh;
pub mod mirror;
pub mod pods;
pub mod proc;
pub mod proxies;
pub mod publish;
pub mod relay;
pub mod wanted;

mod engine;
mod socket;

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc;

use anyhow::Context;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use notify::Watcher;

use crate::state::Config;
use crate::state::Paths;
use crate::state::View;

pub use socket::Reply;
pub use socket::Request;

/// Waiting changes; clients beyond wait for their turn to hand in theirs.
const JOBS_MAX: usize = 64;

/// What the engine is asked to do.
#[derive(Debug)]
enum Job {
    /// A client's change, and where its replies go.
    Client(Request, mpsc::SyncSender<Reply>),
    /// Something in the watched directory changed.
    DirChanged,
    /// The lab should end.
    End,
}

/// Runs the supervisor of the lab at `state` until it is told to end.
pub fn run(state: &Path) -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    // Children that a pod leaves behind come to us, so that ending the lab ends them.
    nix::sys::prctl::set_child_subreaper(true)?;
    let paths = Paths(state.to_path_buf());
    let lock = std::fs::File::create(paths.lock())?;
    lock.try_lock().with_context(|| format!("another lab is starting at {}", state.display()))?;
    let config: Config = serde_json::from_str(&std::fs::read_to_string(paths.config())?)
        .with_context(|| format!("{} is not a configuration", paths.config().display()))?;
    let (jobs, queue) = mpsc::sync_channel(JOBS_MAX);
    end_on_signals(jobs.clone())?;
    if config.tied {
        end_with_stdin(jobs.clone())?;
    }
    let view = Arc::new(Mutex::new(View::default()));
    let mut engine = engine::Engine::new(config.clone(), paths.clone(), view.clone())?;
    let _watcher = config.dir.as_deref().map(|dir| watch(dir, jobs.clone())).transpose()?;
    socket::listen(&paths, jobs, view)?;
    engine.run(&queue);
    // Dropped before the socket file: a client that still connects is refused, not left waiting.
    let _ = std::fs::remove_file(paths.socket());
    engine.end();
    Ok(())
}

fn watch(dir: &Path, jobs: mpsc::SyncSender<Job>) -> anyhow::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let matters = event.is_ok_and(|event| !event.kind.is_access());
        if matters {
            // A full queue holds a change already, and the engine reads the whole directory anyway.
            let _ = jobs.try_send(Job::DirChanged);
        }
    })?;
    watcher
        .watch(dir, notify::RecursiveMode::Recursive)
        .with_context(|| format!("{} cannot be watched", dir.display()))?;
    Ok(watcher)
}

/// Blocked in this thread before any other starts, so that only the waiting thread takes them.
fn end_on_signals(jobs: mpsc::SyncSender<Job>) -> anyhow::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if set.wait().is_ok() {
            let _ = jobs.send(Job::End);
        }
    })?;
    Ok(())
}

fn end_with_stdin(jobs: mpsc::SyncSender<Job>) -> anyhow::Result<()> {
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = jobs.send(Job::End);
    })?;
    Ok(())
}
