//! Writing to users' objects what control has to say about them: `status.conditions`, and `status.parents` of routes.
//!
//! Only the Lease holder writes, only what differs from what the object has, and at most [`RATE`] times a second: 10,000
//! objects of a new installation take some minutes, a change of one is written at once. A write names the version that it
//! was made from, so that nobody's work is lost: on a conflict the object is read again. Its own write, come back by the
//! watch, leads to no other: [`desired`] leaves what says the same, and an answer that is not what was asked for (a field
//! that the API server does not keep) is remembered. [`tracker`] knows how far the nodes are, [`beside`] keeps the
//! NetworkPolicies for other CNIs. Limits: one request at a time; a status is about the objects as this replica knows them.

pub mod beside;
mod desired;
mod tracker;
mod write;

pub use desired::CONTROLLER;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::admin::View;
use crate::base::Stop;
use crate::cluster::lease::Leader;
use crate::model::{ObjectConditions, ObjectKey};
use crate::source::Loaded;
use crate::source::statuses::{Seen, Statuses};
use crate::status::desired::{Programmed, Said, is_programmed};
use crate::status::tracker::Tracker;
use crate::status::write::{Outcome, Writer};
use crate::xds::server::Nodes;

/// Writes a second, of all objects. The API server has other clients.
const RATE: u32 = 20;
/// Between two writes to one object. The first one is at once; what the nodes say gathers meanwhile.
const APART: Duration = Duration::from_secs(2);
/// Between two writes that say no more than how many nodes have it.
const PROGRESS: Duration = Duration::from_secs(10);
/// Between two looks at what the nodes have acknowledged, as long as something is unfinished.
const LOOK: Duration = Duration::from_millis(500);
/// After a failure, doubled with each to the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the writer reads.
pub struct Inputs {
    /// Conditions, and the objects that they are about.
    pub view: watch::Receiver<Arc<View>>,
    /// What objects say now.
    pub statuses: Arc<Statuses>,
    /// What nodes have acknowledged.
    pub nodes: Arc<Nodes>,
    /// Whether this replica writes.
    pub leader: Leader,
}

/// An object that is to be looked at.
#[derive(Debug, Clone, Copy)]
struct Due {
    at: Instant,
    failures: u32,
}

struct State {
    inputs: Inputs,
    writer: Writer,
    tracker: Tracker,
    /// Objects with something to be looked at.
    due: BTreeMap<ObjectKey, Due>,
    /// When each was written last, as long as that matters.
    written: BTreeMap<ObjectKey, Instant>,
    /// What is wrong with objects, by name.
    problems: BTreeMap<ObjectKey, String>,
    /// Of what was published last.
    generation: u64,
    acked: BTreeMap<String, u64>,
    held: bool,
}

/// Writes until it is told to stop.
pub async fn run(client: Client, inputs: Inputs, mut stop: Stop) {
    let mut state = State {
        inputs,
        writer: Writer::new(client),
        tracker: Tracker::default(),
        due: BTreeMap::new(),
        written: BTreeMap::new(),
        problems: BTreeMap::new(),
        generation: 0,
        acked: BTreeMap::new(),
        held: false,
    };
    let mut view = state.inputs.view.clone();
    view.mark_changed();
    loop {
        let statuses = Arc::clone(&state.inputs.statuses);
        tokio::select! {
            () = stop.requested() => return,
            changed = view.changed() => if changed.is_err() { return },
            () = statuses.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        let now = Arc::clone(&view.borrow_and_update());
        state.take(&now);
        if let Some(key) = state.next() {
            let began = Instant::now();
            tokio::select! {
                () = stop.requested() => return,
                () = state.look(&key, &now) => {}
            }
            // The next one waits for its turn, not for another change.
            view.mark_changed();
            let spent = began.elapsed();
            tokio::time::sleep((Duration::from_secs(1) / RATE).saturating_sub(spent)).await;
        }
    }
}

impl State {
    /// Takes in what happened.
    fn take(&mut self, view: &View) {
        if view.generation == 0 {
            return;
        }
        let now = Instant::now();
        let mut dirty = self.inputs.statuses.take_changed();
        if self.generation != view.generation {
            dirty.extend(self.tracker.update(view.generation, view.conditions.clone()));
            let problems = problems(&view.loaded);
            let differs = |key: &&ObjectKey| problems.get(*key) != self.problems.get(*key);
            dirty.extend(self.problems.keys().chain(problems.keys()).filter(differs).cloned().collect::<Vec<_>>());
            self.problems = problems;
            self.generation = view.generation;
        }
        let acked = self.inputs.nodes.acked();
        if acked != self.acked {
            self.acked = acked;
            dirty.extend(self.tracker.unfinished().cloned());
        }
        let holds = self.inputs.leader.holds_for(write::REQUEST);
        if !holds {
            // The next holder looks at everything; so does this one, when it holds again.
            self.due.clear();
            self.held = false;
            return;
        }
        if !std::mem::replace(&mut self.held, true) {
            dirty.extend(self.inputs.statuses.keys());
        }
        for key in dirty {
            self.due.entry(key).or_insert(Due { at: now, failures: 0 });
        }
        self.written.retain(|_, at| now.duration_since(*at) < PROGRESS);
    }

    fn next(&self) -> Option<ObjectKey> {
        let now = Instant::now();
        self.due.iter().filter(|(_, due)| due.at <= now).min_by_key(|(_, due)| due.at).map(|(key, _)| key.clone())
    }

    /// Writes an object's status if it is to say something else.
    async fn look(&mut self, key: &ObjectKey, view: &View) {
        let now = Instant::now();
        let Some(due) = self.due.remove(key) else { return };
        let Some(seen) = self.inputs.statuses.get(key) else { return };
        let Some(said) = self.said(key, &seen) else { return };
        let before = is_programmed(&seen.status, said.generation);
        let programmed = match self.problems.contains_key(key) {
            true => Programmed::Stays,
            false => self.tracker.programmed(key, &self.acked, &view.nodes, before),
        };
        let moment = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let as_is = Said {
            generation: said.generation,
            conditions: &said.conditions,
            parents: &said.parents,
            programmed: &Programmed::Stays,
            now: &moment,
        };
        let whole = Said { programmed: &programmed, ..as_is };
        let Some(patch) = write::patch(key, &seen, &whole) else { return };
        // Nothing but how many nodes have it, and not all of them yet.
        let only_progress = write::patch(key, &seen, &as_is).is_none()
            && matches!(&programmed, Programmed::On { have, of, .. } if have < of);
        let apart = if only_progress { PROGRESS } else { APART };
        if let Some(last) = self.written.get(key)
            && now < *last + apart
        {
            self.due.insert(key.clone(), Due { at: *last + apart, ..due });
            return;
        }
        match self.writer.write(key, &seen, &patch).await {
            Outcome::Written(new) => {
                self.written.insert(key.clone(), now);
                self.inputs.statuses.note(key.clone(), new);
            }
            Outcome::Same => {}
            Outcome::Changed(new) => {
                self.inputs.statuses.note(key.clone(), new);
                self.due.insert(key.clone(), due);
            }
            Outcome::Gone => self.inputs.statuses.forget(&key.kind, &key.namespace, &key.name),
            Outcome::Failed => {
                let wait = (BACK_OFF.0 * 2u32.saturating_pow(due.failures.min(10))).min(BACK_OFF.1);
                self.due.insert(key.clone(), Due { at: now + wait, failures: due.failures + 1 });
            }
        }
    }

    /// What is to be said of an object. `None`: nothing yet, as what is known of it is of before.
    fn said(&self, key: &ObjectKey, seen: &Seen) -> Option<Arc<ObjectConditions>> {
        let said = self.tracker.get(key).map(|tracked| Arc::clone(&tracked.said));
        match (said, self.problems.get(key)) {
            (Some(said), Some(message)) if said.generation < seen.generation => {
                Some(Arc::new(tracker::outdated(&said, seen.generation, message)))
            }
            (None, Some(message)) => Some(Arc::new(tracker::unreadable(key, seen.generation, message))),
            (Some(said), _) => (said.generation >= seen.generation).then_some(said),
            // What was said once and is not any more is taken back.
            (None, None) => Some(Arc::new(ObjectConditions {
                object: key.clone(),
                generation: seen.generation,
                conditions: Vec::new(),
                parents: Vec::new(),
            })),
        }
    }
}

/// What is wrong with objects of the API server that could not be read.
fn problems(loaded: &Loaded) -> BTreeMap<ObjectKey, String> {
    let errors = loaded.problems.iter().filter(|problem| problem.error);
    let named = errors.filter_map(|problem| {
        let (kind, path) = problem.object.split_once(' ')?;
        let (namespace, name) = path.split_once('/')?;
        let key = ObjectKey { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
        Some((key, format!("{field}{}", problem.message)))
    });
    named.collect()
}
