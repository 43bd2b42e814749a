//! The supervisor's socket: one request a connection as a JSON line, answers as JSON lines, the last one `Done`.
//!
//! Questions are answered here from the published view, so they work while the engine waits for a change to settle;
//! changes go to the engine. Limits: 64 connections at once, a request of at most 32 MiB.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde::Serialize;

use crate::client;
use crate::state::Paths;
use crate::state::View;
use crate::supervise::Job;
use crate::supervise::process::signal_group;

const CONNECTIONS_MAX: usize = 64;
const REQUEST_LIMIT: u64 = 32 << 20;

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "op")]
pub enum Request {
    /// Wait until everything wanted is so.
    Settle {
        /// Seconds.
        timeout_s: f64,
    },
    /// Apply manifests.
    Apply {
        /// Names the text in errors.
        origin: String,
        /// YAML.
        text: String,
        /// Seconds.
        timeout_s: f64,
    },
    /// Delete an object.
    Delete {
        /// In any case, plural or not.
        kind: String,
        /// Ignored for kinds without one.
        namespace: String,
        /// `metadata.name`.
        name: String,
        /// Seconds.
        timeout_s: f64,
    },
    /// The view.
    Status,
    /// HTTP GET from inside a component's network namespace.
    Get {
        /// `control`, `node-1`, or `namespace/pod`.
        component: String,
        /// On loopback.
        port: u16,
        /// Path and query.
        path: String,
    },
    /// Send a signal to a component's processes.
    Kill {
        /// `control`, `node-1`, or `namespace/pod`.
        component: String,
        /// `KILL`, `TERM`, `STOP`, …
        signal: String,
    },
    /// Start control or a node's proxy again.
    Start {
        /// `control` or `node-1`.
        component: String,
        /// Another program than before.
        program: Option<PathBuf>,
        /// Further variables, kept for later starts.
        env: std::collections::BTreeMap<String, String>,
    },
    /// Start a node's proxy beside the one that runs, to take its place.
    Replace {
        /// `node-1`.
        component: String,
        /// Another program than before.
        program: Option<PathBuf>,
    },
    /// End the lab.
    Down,
}

/// What the supervisor answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Something was reached on the way.
    Progress(String),
    /// The change is in; what is not as it should be yet.
    Done {
        /// Empty: everything is so.
        missing: Vec<String>,
    },
    /// Answer to `Status`.
    View(Box<View>),
    /// Answer to `Get`.
    Answer {
        /// HTTP status.
        status: u16,
        /// Body.
        body: String,
    },
    /// The request was refused and changed nothing.
    Error(String),
}

/// Starts accepting clients.
pub(super) fn listen(paths: &Paths, jobs: mpsc::SyncSender<Job>, view: Arc<Mutex<View>>) -> anyhow::Result<()> {
    let path = paths.socket();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("{} cannot be made", path.display()))?;
    let live = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("socket".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if live.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
                live.fetch_sub(1, Ordering::SeqCst);
                let _ = send(&stream, &Reply::Error("too many clients at once; try again".into()));
                continue;
            }
            let (jobs, view, count) = (jobs.clone(), view.clone(), live.clone());
            let spawned = std::thread::Builder::new().name("client".into()).spawn(move || {
                if let Err(error) = serve(&stream, &jobs, &view) {
                    let _ = send(&stream, &Reply::Error(format!("{error:#}")));
                }
                count.fetch_sub(1, Ordering::SeqCst);
            });
            if spawned.is_err() {
                live.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })?;
    Ok(())
}

fn serve(stream: &UnixStream, jobs: &mpsc::SyncSender<Job>, view: &Mutex<View>) -> anyhow::Result<()> {
    let mut line = String::new();
    BufReader::new(stream.take(REQUEST_LIMIT)).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line).context("not a request of this version of the lab")?;
    let view = || view.lock().map(|view| view.clone()).unwrap_or_default();
    match request {
        Request::Status => send(stream, &Reply::View(Box::new(view()))),
        Request::Get { component, port, path } => {
            let netns = netns_of(&view(), &component)?;
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // Explaining asks two nodes in turn; everything else is faster.
            let answer = client::get_in(&netns, address, &path, Duration::from_secs(10))?;
            send(stream, &Reply::Answer { status: answer.status, body: answer.body })
        }
        Request::Kill { component, signal } => {
            let name = format!("SIG{}", signal.to_uppercase().trim_start_matches("SIG"));
            let signal: Signal = name.parse().with_context(|| format!("{name} is not a signal"))?;
            let pids = pids_of(&view(), &component)?;
            anyhow::ensure!(!pids.is_empty(), "{component} has no running process");
            pids.into_iter().for_each(|pid| signal_group(pid, signal));
            send(stream, &Reply::Done { missing: vec![] })
        }
        request => {
            // Room for every line of one change; the engine never waits for a slow client.
            let (replies, answers) = mpsc::sync_channel(256);
            jobs.send(Job::Client(request, replies)).context("the lab is ending")?;
            for answer in answers {
                send(stream, &answer)?;
            }
            Ok(())
        }
    }
}

fn send(mut stream: &UnixStream, reply: &Reply) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(reply)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    Ok(())
}

fn netns_of(view: &View, component: &str) -> anyhow::Result<PathBuf> {
    if let Some((namespace, pod)) = component.split_once('/') {
        let pod = view.pod(namespace, pod).with_context(|| format!("there is no pod {component}"))?;
        return Ok(pod.netns.clone());
    }
    if component == "fabric" {
        return Ok(view.fabric.clone());
    }
    let mut all = view.nodes.iter().chain([&view.control]);
    let found = all.find(|candidate| candidate.name == component);
    Ok(found.with_context(|| format!("there is no component {component}"))?.netns.clone())
}

fn pids_of(view: &View, component: &str) -> anyhow::Result<Vec<u32>> {
    if let Some((namespace, pod)) = component.split_once('/') {
        let pod = view.pod(namespace, pod).with_context(|| format!("there is no pod {component}"))?;
        return Ok(pod.pids.values().copied().collect());
    }
    let mut all = view.nodes.iter().chain([&view.control]);
    let found = all.find(|candidate| candidate.name == component);
    Ok(found.with_context(|| format!("there is no component {component}"))?.pid.into_iter().collect())
}
