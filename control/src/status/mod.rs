//! Writing to users' objects what control has to say about them: `status.conditions`, and `status.parents` of routes.
//!
//! Only the Lease holder writes, only what differs from what the object has, and at most [`RATE`] times a second: 10,000
//! objects of a new installation take some minutes, a change of one is written at once. A write names the version that it
//! was made from, so that nobody's work is lost: on a conflict the object is read again. Its own write, come back by the
//! watch, leads to no other: [`desired`] leaves what says the same, and an answer that is not what was asked for (a field
//! that the API server does not keep) is remembered. [`tracker`] knows how far the nodes are, [`beside`] keeps the
//! NetworkPolicies for other CNIs. Limits: one request at a time; a status is about the objects as this replica knows them.

pub mod acks;
pub mod beside;
mod desired;
mod tracker;
mod write;

pub use desired::CONTROLLER;

use std::collections::BTreeMap;
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
use crate::status::acks::History;
use crate::status::desired::{Programmed, Said, is_programmed};
use crate::status::tracker::Tracker;
use crate::status::write::{Outcome, Writer};
use crate::xds::Published;
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

/// Objects that are looked at before what happened meanwhile is taken in: half a second's writes.
const TOGETHER: usize = 10;

/// What the writer reads.
pub struct Inputs {
    /// Conditions, and the objects that they are about.
    pub view: watch::Receiver<Arc<View>>,
    /// What objects say now.
    pub statuses: Arc<Statuses>,
    /// What this replica's nodes have acknowledged.
    pub nodes: Arc<Nodes>,
    /// What it publishes.
    pub published: watch::Receiver<Published>,
    /// Where replicas say what their nodes have, and as whom this one does.
    pub root_namespace: String,
    /// See `root_namespace`.
    pub identity: String,
    /// Whether this replica writes.
    pub leader: Leader,
}

/// An object that is to be looked at.
#[derive(Debug, Clone, Copy)]
struct Due {
    at: Instant,
    failures: u32,
    /// Somebody has just changed it, and waits; not one of many that a new holder looks at.
    urgent: bool,
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
    history: History,
    /// When other replicas were last asked what their nodes have.
    heard: Option<Instant>,
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
        history: History::default(),
        heard: None,
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
        tokio::select! {
            () = stop.requested() => return,
            () = state.hear(&now) => {}
        }
        for key in state.next() {
            let began = Instant::now();
            let sent = tokio::select! {
                () = stop.requested() => return,
                sent = state.look(&key, &now) => sent,
            };
            if sent {
                tokio::time::sleep((Duration::from_secs(1) / RATE).saturating_sub(began.elapsed())).await;
            }
            // The rest waits for its turn, not for another change.
            view.mark_changed();
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
        let urgent = self.generation > 0;
        if self.generation != view.generation {
            dirty.extend(self.tracker.update(view.generation, view.conditions.clone()));
            let problems = problems(&view.loaded);
            let differs = |key: &&ObjectKey| problems.get(*key) != self.problems.get(*key);
            dirty.extend(self.problems.keys().chain(problems.keys()).filter(differs).cloned().collect::<Vec<_>>());
            self.problems = problems;
            self.generation = view.generation;
        }
        self.history.note(&self.inputs.published.borrow());
        dirty.extend(self.told(self.inputs.nodes.acked()));
        let holds = self.inputs.leader.holds_for(write::REQUEST);
        if !holds {
            // The next holder looks at everything; so does this one, when it holds again.
            self.due.clear();
            self.held = false;
            return;
        }
        if !std::mem::replace(&mut self.held, true) {
            for key in self.inputs.statuses.keys() {
                self.due.insert(key, Due { at: now, failures: 0, urgent: false });
            }
        }
        for key in dirty {
            self.due.entry(key).or_insert(Due { at: now, failures: 0, urgent }).urgent |= urgent;
        }
        self.written.retain(|_, at| now.duration_since(*at) < PROGRESS);
    }

    /// Takes what nodes have; gives the objects that it may matter to. What other replicas said stays until it is heard
    /// anew: a node that goes from one to another has what it had.
    fn told(&mut self, acked: BTreeMap<String, u64>) -> Vec<ObjectKey> {
        let mut changed = false;
        for (node, generation) in acked {
            let known = self.acked.entry(node).or_default();
            changed |= generation > *known;
            *known = generation.max(*known);
        }
        if changed { self.tracker.unfinished().cloned().collect() } else { Vec::new() }
    }

    /// Asks other replicas what their nodes have, as long as something depends on it.
    async fn hear(&mut self, view: &View) {
        let own = self.inputs.nodes.acked();
        let of_others = view.nodes.iter().any(|node| !own.contains_key(node));
        let wanted = of_others && self.held && self.tracker.unfinished().next().is_some();
        if !wanted || self.heard.is_some_and(|at| at.elapsed() < APART) {
            return;
        }
        self.heard = Some(Instant::now());
        let (mut acked, inputs) = (BTreeMap::new(), &self.inputs);
        let (namespace, identity) = (&inputs.root_namespace, &inputs.identity);
        acks::heard(self.writer.client(), namespace, identity, &self.history, &mut acked).await;
        let now = Instant::now();
        for key in self.told(acked) {
            self.due.entry(key).or_insert(Due { at: now, failures: 0, urgent: true });
        }
    }

    /// Some of those that are due, the urgent and the oldest first.
    fn next(&self) -> Vec<ObjectKey> {
        let now = Instant::now();
        let mut ready: Vec<(&ObjectKey, &Due)> = self.due.iter().filter(|(_, due)| due.at <= now).collect();
        ready.sort_by_key(|(_, due)| (!due.urgent, due.at));
        ready.into_iter().take(TOGETHER).map(|(key, _)| key.clone()).collect()
    }

    /// Writes an object's status if it is to say something else. Whether it sent anything.
    async fn look(&mut self, key: &ObjectKey, view: &View) -> bool {
        let now = Instant::now();
        let Some(due) = self.due.remove(key) else { return false };
        let Some(seen) = self.inputs.statuses.get(key) else { return false };
        let Some(said) = self.said(key, &seen) else { return false };
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
        let Some(patch) = write::patch(key, &seen, &whole) else { return false };
        // Nothing but how many nodes have it, and not all of them yet.
        let only_progress = write::patch(key, &seen, &as_is).is_none()
            && matches!(&programmed, Programmed::On { have, of, .. } if have < of);
        let apart = if only_progress { PROGRESS } else { APART };
        if let Some(last) = self.written.get(key)
            && now < *last + apart
        {
            self.due.insert(key.clone(), Due { at: *last + apart, ..due });
            return false;
        }
        if !self.inputs.leader.holds_for(write::REQUEST) {
            return false;
        }
        match self.writer.write(key, &seen, &patch).await {
            Outcome::Written(new) => {
                self.written.insert(key.clone(), now);
                self.inputs.statuses.note(key.clone(), new);
            }
            Outcome::Same => return false,
            Outcome::Changed(new) => {
                self.inputs.statuses.note(key.clone(), new);
                self.due.insert(key.clone(), due);
            }
            Outcome::Gone => self.inputs.statuses.forget(&key.kind, &key.namespace, &key.name),
            Outcome::Failed => {
                let wait = (BACK_OFF.0 * 2u32.saturating_pow(due.failures.min(10))).min(BACK_OFF.1);
                self.due.insert(key.clone(), Due { at: now + wait, failures: due.failures + 1, ..due });
            }
        }
        true
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
