//! The API server of a cluster as a source: one list and watch for each kind, one world.
//!
//! [`known`] is the pure half: what follows from what was reported. [`watch`] follows one kind, [`discover`] says which
//! kinds there are, [`json`] reads what the API server sends, [`wire`] asks it. Nothing is served before each kind that
//! the API server has was listed once: serving without a policy could fail open. After that, what is known stays in force
//! for as long as the API server is away.

pub mod discover;
pub mod json;
pub mod kinds;
pub mod known;
pub mod watch;
pub mod wire;

use std::sync::Arc;

use kube::Client;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::base::Stop;
use crate::base::unix_now;
use crate::source::kube::kinds::KINDS;
use crate::source::kube::known::{Known, Note};
use crate::source::kube::watch::Served;
use crate::source::{Followed, Loaded};

/// Reports that wait to be taken in. Each is an event or a page; who is behind makes the API server wait.
const REPORTS: usize = 64;
/// Most reports taken in before the world is published.
const BATCH: usize = 512;

/// Where the world goes.
pub struct Outputs {
    /// The objects.
    pub loaded: tokio::sync::watch::Sender<Option<Arc<Loaded>>>,
    /// How each kind is followed.
    pub followed: tokio::sync::watch::Sender<Arc<Vec<Followed>>>,
}

/// Publishes what is in the cluster until it is told to stop.
pub async fn run(client: Client, outputs: Outputs, mut stop: Stop) {
    let (reports, mut reported) = mpsc::channel(REPORTS);
    // Dropped at the end, which ends all of them.
    let mut tasks = JoinSet::new();
    let mut told = Vec::new();
    for (place, kind) in KINDS.iter().enumerate() {
        let (sender, served) = tokio::sync::watch::channel(Served::Unknown(String::new()));
        told.push((kind, sender));
        tasks.spawn(watch::follow(client.clone(), place, served, reports.clone()));
    }
    tasks.spawn(discover::run(client, told));
    drop(reports);
    let mut known = Known::default();
    outputs.loaded.send_replace(Some(Arc::new(known.loaded())));
    loop {
        let first = tokio::select! {
            () = stop.requested() => return,
            first = reported.recv() => first,
        };
        let Some((kind, event)) = first else {
            tracing::error!(
                "nobody follows the API server any more, which is a defect; the last state stays published"
            );
            return;
        };
        let mut changed = known.apply(kind, event, unix_now());
        for _ in 1..BATCH {
            let Ok((kind, event)) = reported.try_recv() else { break };
            changed |= known.apply(kind, event, unix_now());
        }
        for note in known.notes() {
            match note {
                Note::Warn(text) => tracing::warn!("{text}"),
                Note::Info(text) => tracing::info!("{text}"),
            }
        }
        if changed {
            outputs.loaded.send_replace(Some(Arc::new(known.loaded())));
        }
        outputs.followed.send_replace(Arc::new(known.followed()));
    }
}
