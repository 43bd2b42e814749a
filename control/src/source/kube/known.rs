//! What is known of the cluster: reports of the watchers in, one world and its problems out. Pure.
//!
//! A list replaces what was known of its kind in one step, once its last page is there: what vanished while nobody
//! watched is gone at once, and the world is never emptier in between. An object that cannot be read keeps its last good
//! version; a policy that never had one fails closed. A kind that cannot be reached keeps all of its objects.

use std::collections::BTreeMap;
use std::collections::HashSet;

use crate::model::{Object, World};
use crate::source::kube::kinds::{KINDS, Kind};
use crate::source::statuses::Seen;
use crate::source::tree::FieldError;
use crate::source::{Followed, Loaded, Problem, Standing, consequence, show};

/// Most problems that are shown. People repair the first ones first, and a bad template makes thousands.
const MAX_PROBLEMS: usize = 1000;

/// An object, and what was wrong with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Empty for what has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// It can be used, or is a policy that fails closed. None: left out, or not for us.
    pub object: Option<Object>,
    /// Why it cannot be read.
    pub error: Option<FieldError>,
    /// Not even what it is could be read.
    pub nameless: bool,
    /// What its status says, of kinds whose status is written.
    pub seen: Option<Box<Seen>>,
}

/// What a watcher reports.
#[derive(Debug)]
pub enum Event {
    /// The API server has the kind, in this version.
    Served(&'static str),
    /// The API server does not have the kind.
    Absent,
    /// A list begins.
    Started,
    /// Part of the list.
    Page(Vec<Item>),
    /// The list is complete, as of this version.
    Listed(String),
    /// An object is there, and what it is now; version.
    Applied(Box<Item>, String),
    /// An object is gone: namespace, name, version.
    Gone(String, String, String),
    /// The API server answers; nothing happened until this version, if it says so.
    Heard(Option<String>),
    /// The API server cannot be asked, and why.
    Failed(String),
}

/// What is worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Somebody must do something.
    Warn(String),
    /// It goes well.
    Info(String),
}

/// A list that is not complete yet.
#[derive(Default)]
struct Staged {
    seen: HashSet<(String, String)>,
    /// What differs from the world.
    changed: Vec<Item>,
}

/// What is wrong with an object.
struct Bad {
    problem: Problem,
    /// Its last good version is in the world.
    kept: bool,
    nameless: bool,
}

/// One kind.
#[derive(Default)]
struct State {
    version: &'static str,
    absent: bool,
    listed: bool,
    staged: Option<Staged>,
    /// Why it cannot be asked at present.
    trouble: Option<String>,
    /// When it was heard of last, Unix seconds.
    contact: i64,
    objects: usize,
    resource_version: String,
    lists: u64,
    events: u64,
    failures: u64,
}

/// All that is known.
pub struct Known {
    world: World,
    kinds: Vec<State>,
    bad: BTreeMap<(usize, String, String), Bad>,
    notes: Vec<Note>,
}

impl Default for Known {
    fn default() -> Self {
        let kinds = KINDS.iter().map(|_| State::default()).collect();
        Self { world: World::default(), kinds, bad: BTreeMap::new(), notes: Vec::new() }
    }
}

impl Known {
    /// Takes a report on a kind (its place in [`KINDS`]) at a time (Unix seconds). True if [`Known::loaded`] differs now.
    pub fn apply(&mut self, kind: usize, event: Event, now: i64) -> bool {
        let (Some(of), Some(state)) = (KINDS.get(kind), self.kinds.get_mut(kind)) else { return false };
        let waited = state.waits();
        let changed = match event {
            Event::Failed(reason) => return self.failed(kind, of, reason),
            Event::Absent => self.absent(kind, of),
            Event::Served(version) => {
                if state.absent {
                    self.notes.push(Note::Info(format!("{}: the API server has it now", of.resource())));
                }
                (state.absent, state.version) = (false, version);
                // It was not asked for its objects yet.
                return state.waits() != waited;
            }
            Event::Started => {
                state.staged = Some(Staged::default());
                // It was asked; nobody has answered.
                return false;
            }
            Event::Page(items) => {
                self.stage(kind, of, items);
                false
            }
            Event::Listed(version) => {
                state.resource_version = version;
                state.lists += 1;
                self.listed(kind, of)
            }
            Event::Applied(item, version) => {
                state.resource_version = version;
                state.events += 1;
                self.put(kind, of, *item)
            }
            Event::Gone(namespace, name, version) => {
                state.resource_version = version;
                state.events += 1;
                self.drop(kind, of, namespace, name)
            }
            Event::Heard(version) => {
                if let Some(version) = version {
                    state.resource_version = version;
                }
                false
            }
        };
        changed | self.heard(kind, of, now) | (self.kinds[kind].waits() != waited)
    }

    /// What goes to the log since the last call.
    pub fn notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// All of it.
    pub fn loaded(&self) -> Loaded {
        let mut problems: Vec<Problem> = self.bad.values().take(MAX_PROBLEMS).map(|bad| bad.problem.clone()).collect();
        if self.bad.len() > MAX_PROBLEMS {
            problems.push(Problem {
                message: format!("{} more objects cannot be read", self.bad.len() - MAX_PROBLEMS),
                error: true,
                ..Problem::default()
            });
        }
        let nameless = self.bad.values().filter(|bad| bad.nameless && !bad.kept);
        let waiting = KINDS.iter().zip(&self.kinds).filter(|(_, state)| state.waits()).map(|(kind, state)| {
            let reason = state.trouble.as_deref().unwrap_or("the API server was not heard of them yet");
            format!("{}: {reason}", kind.resource())
        });
        let waiting = waiting.chain(nameless.map(|bad| bad.problem.to_string())).collect();
        Loaded { world: self.world.clone(), problems, waiting, ..Loaded::default() }
    }

    /// How each kind is followed.
    pub fn followed(&self) -> Vec<Followed> {
        let both = KINDS.iter().zip(&self.kinds);
        both.map(|(kind, state)| Followed {
            resource: kind.resource(),
            version: state.version.to_owned(),
            standing: match state {
                State { absent: true, .. } => Standing::Absent,
                State { trouble: Some(_), .. } => Standing::Stale,
                State { listed: false, .. } => Standing::Listing,
                _ => Standing::Current,
            },
            reason: state.trouble.clone().unwrap_or_default(),
            heard: state.contact,
            objects: state.objects,
            resource_version: state.resource_version.clone(),
            lists: state.lists,
            events: state.events,
            failures: state.failures,
        })
        .collect()
    }

    fn failed(&mut self, kind: usize, of: &Kind, reason: String) -> bool {
        let state = &mut self.kinds[kind];
        state.failures += 1;
        // A list that did not come to its end says nothing about what is missing in it.
        state.staged = None;
        if state.trouble.as_ref() == Some(&reason) {
            return false;
        }
        let kept = if state.listed { "; what is known of them stays in force" } else { "" };
        self.notes.push(Note::Warn(format!("{}: {reason}{kept}", of.resource())));
        state.trouble = Some(reason);
        state.waits()
    }

    /// The API server answered. True if that ends a reason to wait that was shown.
    fn heard(&mut self, kind: usize, of: &Kind, now: i64) -> bool {
        let state = &mut self.kinds[kind];
        state.contact = now;
        let ended = state.trouble.take().is_some();
        if ended {
            self.notes.push(Note::Info(format!("{}: the API server answers again", of.resource())));
        }
        ended && !state.listed
    }

    fn absent(&mut self, kind: usize, of: &Kind) -> bool {
        let state = &mut self.kinds[kind];
        if state.listed {
            self.notes.push(Note::Warn(format!(
                "{}: the API server does not have it any more; its objects are gone",
                of.resource()
            )));
        }
        let version = state.version;
        *state = State {
            absent: true,
            version,
            lists: state.lists,
            events: state.events,
            failures: state.failures,
            trouble: state.trouble.take(),
            ..State::default()
        };
        let bad = self.bad.len();
        self.bad.retain(|(of, ..), _| *of != kind);
        let gone: Vec<Object> = self.world.objects(of.name).collect();
        let changed = !gone.is_empty() || bad != self.bad.len();
        for object in gone {
            self.world.remove(object);
        }
        changed
    }

    fn stage(&mut self, kind: usize, of: &Kind, items: Vec<Item>) {
        let Some(mut staged) = self.kinds[kind].staged.take() else { return };
        for item in items {
            let known = self.world.find(of.name, &item.namespace, &item.name);
            // What did not change is not held a second time while the list goes on.
            let same = item.error.is_none() && item.object.is_some() && item.object == known;
            staged.seen.insert((item.namespace.clone(), item.name.clone()));
            if !same || self.bad.contains_key(&(kind, item.namespace.clone(), item.name.clone())) {
                staged.changed.push(item);
            }
        }
        self.kinds[kind].staged = Some(staged);
    }

    fn listed(&mut self, kind: usize, of: &Kind) -> bool {
        let Some(staged) = self.kinds[kind].staged.take() else { return false };
        let mut changed = false;
        for item in staged.changed {
            changed |= self.put(kind, of, item);
        }
        let names = self.world.objects(of.name).map(|object| {
            let meta = object.meta();
            (meta.namespace.clone(), meta.name.clone())
        });
        let bad = self.bad.keys().filter(|(of, ..)| *of == kind).map(|(_, space, name)| (space.clone(), name.clone()));
        let gone: Vec<(String, String)> = names.chain(bad).filter(|key| !staged.seen.contains(key)).collect();
        for (namespace, name) in gone {
            changed |= self.drop(kind, of, namespace, name);
        }
        self.kinds[kind].listed = true;
        changed
    }

    fn put(&mut self, kind: usize, of: &Kind, item: Item) -> bool {
        let before = self.world.find(of.name, &item.namespace, &item.name);
        let id = (kind, item.namespace, item.name);
        let Some(error) = item.error else {
            let repaired = self.bad.remove(&id).is_some();
            return self.replace(kind, before, item.object) | repaired;
        };
        let kept = before.is_some() && self.bad.get(&id).is_none_or(|bad| bad.kept);
        let consequence = consequence(kept, item.object.is_some());
        let problem = Problem {
            object: show(of.name, &id.1, &id.2),
            field: error.field,
            message: format!("{}{consequence}", error.message),
            error: true,
            ..Problem::default()
        };
        let new = self.bad.get(&id).is_none_or(|bad| bad.problem != problem);
        if new {
            self.notes.push(Note::Warn(problem.to_string()));
        }
        self.bad.insert(id, Bad { problem, kept, nameless: item.nameless });
        if kept { new } else { self.replace(kind, before, item.object) | new }
    }

    fn drop(&mut self, kind: usize, of: &Kind, namespace: String, name: String) -> bool {
        let before = self.world.find(of.name, &namespace, &name);
        let was_bad = self.bad.remove(&(kind, namespace, name)).is_some();
        self.replace(kind, before, None) | was_bad
    }

    /// Brings the world from one version of an object to another. True if they differ.
    fn replace(&mut self, kind: usize, before: Option<Object>, after: Option<Object>) -> bool {
        let objects = &mut self.kinds[kind].objects;
        if before == after {
            return false;
        }
        match (before, after) {
            (Some(before), None) => {
                *objects = objects.saturating_sub(1);
                self.world.remove(before);
            }
            (before, Some(after)) => {
                *objects += usize::from(before.is_none());
                self.world.put(after);
            }
            (None, None) => {}
        }
        true
    }
}

impl State {
    /// Whether nothing may be served without it: never listed, and not known to be absent.
    fn waits(&self) -> bool {
        !self.listed && !self.absent
    }
}

#[cfg(test)]
mod tests;
