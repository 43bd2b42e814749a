//! The server's half of one incremental ADS stream, without I/O and clock.
//!
//! Requests and newly published sets go in, responses come out. One batch is in flight at a time: policies first, then
//! Address, and nothing more before all its responses are answered, so that a workload never overtakes the policy that it
//! names, and a node that stops reading costs one batch. NetworkPolicies and the groups that they name must change in one
//! step, so their responses say whether workloads of the same batch follow. Limits: names of an on-demand subscription are
//! bounded; responses are cut at [`MAX_RESPONSE_BYTES`], and encoded one by one when they are sent, so that a thousand
//! nodes that connect at once do not need the whole mesh in memory a thousand times.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tulle_proto::names;

use crate::resource::{Audience, Changes, Kind, Resource, ResourceSet};
use crate::xds::Published;

/// A response is cut when it would grow beyond this, bytes. gRPC implementations accept 4 MiB unless told otherwise; but
/// the buffer in which a stream's messages are encoded stays as large as the largest of them was, as long as the stream
/// lasts, and control has as many streams as the cluster has nodes. The buffer doubles, and this fits 32 KiB.
pub const MAX_RESPONSE_BYTES: usize = 30 * 1024;
/// Most names that one stream may ask for on demand. A node talks to some thousand addresses at most.
pub const MAX_NAMES: usize = 50_000;
/// Longest name, bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Most remembered rejections a type; the text is for people.
const MAX_NACKS: usize = 16;

/// Why a stream is ended. The node's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Too many on-demand names.
    #[error("more than {MAX_NAMES} resource names are subscribed on one stream")]
    TooManyNames,
    /// A name is too long.
    #[error("a resource name has more than {MAX_NAME_BYTES} bytes")]
    LongName,
}

/// One stream's state.
#[derive(Debug, Default)]
pub struct Session {
    types: BTreeMap<Kind, Subscription>,
    /// Nonces that wait for an answer, with their type.
    in_flight: BTreeMap<String, Kind>,
    /// Generation of the batch in flight, or of the last one answered.
    sent_generation: u64,
    acked_generation: u64,
    next_nonce: u64,
    abilities: Abilities,
}

/// What the proxy said that it can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It does not enforce dry-run policies.
    pub dry_run: bool,
    /// Own types that it subscribes to.
    pub takes: BTreeSet<Kind>,
}

impl Abilities {
    fn is_for(&self, audience: Audience) -> bool {
        match audience {
            Audience::Everyone => true,
            Audience::KnowsDryRun => self.dry_run,
            Audience::Without(kind) => !self.takes.contains(&kind),
        }
    }
}

#[derive(Debug)]
struct Subscription {
    wildcard: bool,
    /// On-demand names.
    names: BTreeSet<String>,
    /// What was sent because of them, with its version.
    told: BTreeMap<Arc<str>, Arc<str>>,
    /// Names that must be answered even if nothing changed.
    asked: BTreeSet<String>,
    /// What the node has, for a wildcard: versions it brought along, until the first batch; then the set it was sent.
    initial: Option<BTreeMap<String, String>>,
    sent: Arc<ResourceSet>,
    /// Generation of `sent`.
    sent_generation: u64,
    answered_once: bool,
    nacks: Vec<String>,
}

impl Session {
    /// A new stream of a proxy that can do this.
    pub fn new(abilities: Abilities) -> Self {
        Self { abilities, ..Self::default() }
    }

    /// Generation that the node has acknowledged (or needs nothing of); 0: none.
    pub fn acked_generation(&self) -> u64 {
        self.acked_generation
    }

    /// What the node rejected and still has not taken.
    pub fn nacks(&self) -> Vec<String> {
        self.types.values().flat_map(|subscription| subscription.nacks.iter().cloned()).collect()
    }

    /// Subscribed types, and whether by wildcard.
    pub fn subscriptions(&self) -> Vec<(Kind, bool, usize)> {
        self.types.iter().map(|(kind, s)| (*kind, s.wildcard, s.names.len())).collect()
    }

    /// Takes a request. Unknown types are ignored: the node waits for nothing of them.
    pub fn handle_request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Violation> {
        let Some(kind) = Kind::of_url(&request.type_url) else {
            return Ok(());
        };
        check_names(request)?;
        if !request.response_nonce.is_empty() {
            self.handle_answer(kind, request);
        }
        let first = !self.types.contains_key(&kind);
        if first {
            let subscription = Subscription::first(request);
            self.types.insert(kind, subscription);
        } else if let Some(subscription) = self.types.get_mut(&kind) {
            subscription.change(request);
        }
        match self.types.get(&kind) {
            Some(subscription) if subscription.names.len() > MAX_NAMES => Err(Violation::TooManyNames),
            _ => Ok(()),
        }
    }

    fn handle_answer(&mut self, kind: Kind, request: &DeltaDiscoveryRequest) {
        // A stale or invented nonce answers nothing.
        if self.in_flight.remove(&request.response_nonce).is_none() {
            return;
        }
        if let Some(subscription) = self.types.get_mut(&kind) {
            match &request.error_detail {
                None => subscription.nacks.clear(),
                Some(error) => {
                    if subscription.nacks.len() < MAX_NACKS {
                        let text: String = error.message.chars().take(1000).collect();
                        subscription.nacks.push(text);
                    }
                }
            }
        }
        if self.in_flight.is_empty() {
            self.acked_generation = self.sent_generation;
        }
    }

    /// The next batch, if the node is ready for one. Empty: nothing to send now.
    pub fn next_batch(&mut self, published: &Published) -> Vec<Part> {
        if !self.in_flight.is_empty() || published.generation == 0 {
            return Vec::new();
        }
        let mut changes: Vec<(Kind, Changes)> = Vec::new();
        for kind in Kind::ALL {
            let Some(subscription) = self.types.get_mut(&kind) else {
                continue;
            };
            let of_kind = subscription.changes(kind, published, &self.abilities);
            // The first answer is sent even if empty: the node waits for it to be ready.
            if of_kind.is_empty() && subscription.answered_once {
                continue;
            }
            subscription.answered_once = true;
            changes.push((kind, of_kind));
        }
        let followed = changes.iter().any(|(kind, _)| *kind == Kind::Address);
        let mut batch = Vec::new();
        for (kind, of_kind) in changes {
            for mut part in parts(kind, of_kind, published.generation) {
                if kind == Kind::NetworkPolicy && followed {
                    part.version.push(names::TOGETHER);
                }
                self.next_nonce += 1;
                part.nonce = format!("{}-{}", published.generation, self.next_nonce);
                self.in_flight.insert(part.nonce.clone(), kind);
                batch.push(part);
            }
        }
        // All types must be subscribed before a generation can be said to have arrived.
        if Kind::BASIC.iter().chain(&self.abilities.takes).all(|kind| self.types.contains_key(kind)) {
            self.sent_generation = published.generation;
            if batch.is_empty() {
                self.acked_generation = published.generation;
            }
        }
        batch
    }
}

impl Subscription {
    fn first(request: &DeltaDiscoveryRequest) -> Self {
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let subscribed = &request.resource_names_subscribe;
        let wildcard = (subscribed.is_empty() || star(subscribed)) && !star(&request.resource_names_unsubscribe);
        let mut this = Self {
            wildcard,
            names: BTreeSet::new(),
            told: BTreeMap::new(),
            asked: BTreeSet::new(),
            initial: Some(request.initial_resource_versions.clone()),
            sent: Arc::default(),
            sent_generation: 0,
            answered_once: false,
            nacks: Vec::new(),
        };
        if !wildcard {
            let had = &request.initial_resource_versions;
            this.told = had.iter().map(|(name, version)| (name.as_str().into(), version.as_str().into())).collect();
            this.change(request);
            // Who says nothing else (Istio's ztunnel) goes on asking for what it has.
            if this.names.is_empty() {
                this.names.extend(had.keys().cloned());
            }
        }
        this
    }

    fn change(&mut self, request: &DeltaDiscoveryRequest) {
        for name in &request.resource_names_subscribe {
            if name == "*" {
                // `*` together with its own removal is the convention for "nothing yet".
                let removed = &request.resource_names_unsubscribe;
                if !removed.contains(name) && !self.wildcard {
                    self.wildcard = true;
                    self.initial = Some(BTreeMap::new());
                }
            } else if !self.wildcard {
                self.names.insert(name.clone());
                self.asked.insert(name.clone());
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(name);
                self.asked.remove(name);
            }
        }
    }

    fn changes(&mut self, kind: Kind, published: &Published, abilities: &Abilities) -> Changes {
        let set = &published.set;
        let mut changes = if self.wildcard {
            let changes = match self.initial.take() {
                Some(have) => set.changes_from_versions(have.iter(), kind),
                None if Arc::ptr_eq(set, &self.sent) => Changes::default(),
                // The usual case: the node has what was published just before.
                None if self.sent_generation + 1 == published.generation && published.step.contains_key(&kind) => {
                    published.step[&kind].clone()
                }
                None => set.changes_since(&self.sent, kind),
            };
            self.sent = Arc::clone(set);
            self.sent_generation = published.generation;
            changes
        } else {
            self.initial = None;
            let changes = self.on_demand(kind, set);
            self.sent = Arc::clone(set);
            changes
        };
        // A policy that became a dry run must not stay in force as it was.
        let hidden = changes.changed.extract_if(.., |_, resource| !abilities.is_for(resource.audience));
        changes.removed.extend(hidden.map(|(name, _)| name));
        changes
    }

    /// What the names mean now, against what was told of them. A Service brings its endpoints, as with istiod.
    fn on_demand(&mut self, kind: Kind, set: &Arc<ResourceSet>) -> Changes {
        if Arc::ptr_eq(set, &self.sent) && self.asked.is_empty() {
            return Changes::default();
        }
        let mut changes = Changes::default();
        let mut wanted: BTreeMap<&Arc<str>, &Arc<Resource>> = BTreeMap::new();
        let mut asked_for: BTreeSet<&Arc<str>> = BTreeSet::new();
        for name in &self.names {
            let asked = self.asked.contains(name);
            let found = set.find(kind, name);
            let collection = found.map_or(name.as_str(), |resource| &resource.name);
            let members = set.members(kind, collection);
            if found.is_none() && asked && !is_collection(name) {
                changes.removed.insert(Arc::from(name.as_str()));
            }
            for resource in found.into_iter().chain(members) {
                wanted.insert(&resource.name, resource);
                if asked {
                    asked_for.insert(&resource.name);
                }
            }
        }
        for (name, resource) in &wanted {
            let known = self.told.get(*name) == Some(&resource.version);
            if !known || asked_for.contains(*name) {
                changes.changed.insert(Arc::clone(name), Arc::clone(resource));
            }
        }
        changes.removed.extend(self.told.keys().filter(|name| !wanted.contains_key(*name)).cloned());
        // The names that stand for many are answered too, so that nobody waits: they are no resources.
        changes
            .removed
            .extend(self.asked.iter().filter(|name| is_collection(name)).map(|name| Arc::from(name.as_str())));
        self.told =
            wanted.into_iter().map(|(name, resource)| (Arc::clone(name), Arc::clone(&resource.version))).collect();
        self.asked.clear();
        changes
    }
}

/// Whether a name stands for all workloads of a node or of a group of NetworkPolicies.
fn is_collection(name: &str) -> bool {
    name.starts_with(names::ALL_OF_NODE) || name.starts_with(names::ALL_OF_GROUP)
}

fn check_names(request: &DeltaDiscoveryRequest) -> Result<(), Violation> {
    let subscribed = &request.resource_names_subscribe;
    if subscribed.len() > MAX_NAMES {
        return Err(Violation::TooManyNames);
    }
    if subscribed.iter().any(|name| name.len() > MAX_NAME_BYTES) {
        return Err(Violation::LongName);
    }
    Ok(())
}

/// A response that is not encoded yet.
#[derive(Debug)]
pub struct Part {
    kind: Kind,
    /// `system_version_info`.
    version: String,
    nonce: String,
    changed: Vec<Arc<Resource>>,
    removed: Vec<Arc<str>>,
}

impl From<Part> for DeltaDiscoveryResponse {
    fn from(part: Part) -> Self {
        Self {
            system_version_info: part.version,
            type_url: part.kind.type_url().to_owned(),
            nonce: part.nonce,
            resources: part.changed.iter().map(|resource| encode(resource)).collect(),
            removed_resources: part.removed.iter().map(|name| name.to_string()).collect(),
        }
    }
}

/// Cuts changes into parts of bounded size; at least one, even if there is nothing.
fn parts(kind: Kind, changes: Changes, generation: u64) -> Vec<Part> {
    let empty = || Part {
        kind,
        version: generation.to_string(),
        nonce: String::new(),
        changed: Vec::new(),
        removed: Vec::new(),
    };
    let mut done = Vec::new();
    let mut current = empty();
    let mut size = 0;
    let mut room = |current: &mut Part, more: usize| {
        if size + more > MAX_RESPONSE_BYTES && size > 0 {
            done.push(std::mem::replace(current, empty()));
            size = 0;
        }
        size += more;
    };
    for resource in changes.changed.into_values() {
        room(&mut current, encoded_size(&resource));
        current.changed.push(resource);
    }
    for name in changes.removed {
        room(&mut current, name.len() + FIELD);
        current.removed.push(name);
    }
    done.push(current);
    // The node must not take the first part of its first policies for all of them.
    if let Some((_last, parts)) = done.split_last_mut() {
        for part in parts {
            part.version.push(names::MORE);
        }
    }
    done
}

/// Tag and length of a field, at most.
const FIELD: usize = 8;

/// Bytes that a resource takes in a response, at most.
fn encoded_size(resource: &Resource) -> usize {
    let aliases: usize = resource.aliases.iter().map(|alias| alias.len() + FIELD).sum();
    let texts = resource.name.len() + resource.version.len() + resource.kind.type_url().len();
    texts + resource.body.len() + aliases + 6 * FIELD
}

fn encode(resource: &Resource) -> tulle_proto::discovery::Resource {
    tulle_proto::discovery::Resource {
        version: resource.version.to_string(),
        resource: Some(prost_types::Any {
            type_url: resource.kind.type_url().to_owned(),
            value: resource.body.to_vec(),
        }),
        name: resource.name.to_string(),
        aliases: resource.aliases.clone(),
        ttl: None,
    }
}

#[cfg(test)]
mod tests;
