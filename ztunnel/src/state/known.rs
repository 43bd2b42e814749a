//! Every workload that is known, found by uid, by name, and by address.
//!
//! Records are in slots, and the indexes lead from hashes to slots. Both are shared with snapshots and copied in pieces
//! when they are written, so an update costs what it touches. Uid and name of a pod are one key, since the one tells the
//! other; a uid of another form has a second entry. Limits: 2³² slots; a free slot is used again before a new one.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use crate::state::index::Index;
use crate::state::{Protocol, Record};

/// A chunk is 1 KB to copy, and 100,000 workloads have 800 to count when a snapshot is published.
const CHUNK: usize = 128;

type Chunk = [Option<Arc<Record>>; CHUNK];

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Workloads {
    hasher: RandomState,
    slots: Vec<Arc<Chunk>>,
    /// By (namespace, name) and by uids that do not consist of them.
    names: Index,
    ips: Index,
    len: usize,
}

/// Slots that are free, the lowest first. The writer's, because snapshots do not need it.
pub(super) type Free = BinaryHeap<Reverse<u32>>;

impl Workloads {
    pub(super) fn new() -> Self {
        Self { hasher: RandomState::new(), slots: Vec::new(), names: Index::new(), ips: Index::new(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.slots.iter().flat_map(|chunk| chunk.iter().flatten())
    }

    fn at(&self, slot: u32) -> Option<&Arc<Record>> {
        self.slots.get(slot as usize / CHUNK)?[slot as usize % CHUNK].as_ref()
    }

    fn name_hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    fn uid_hash(&self, uid: &str) -> u64 {
        self.hasher.hash_one(uid)
    }

    fn slot_of(&self, uid: &str) -> Option<u32> {
        let is_it = |slot: &u32| self.at(*slot).is_some_and(|record| record.has_uid(uid));
        let names = uid.split_once("//Pod/").and_then(|(_, path)| path.split_once('/'));
        let named = names.and_then(|(namespace, name)| self.names.get(self.name_hash(namespace, name)).find(is_it));
        named.or_else(|| self.names.get(self.uid_hash(uid)).find(is_it))
    }

    /// By WDS uid.
    pub(super) fn by_uid(&self, uid: &str) -> Option<&Arc<Record>> {
        self.at(self.slot_of(uid)?)
    }

    /// Pods of this name, the preferred one first.
    pub(super) fn by_pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> impl Iterator<Item = &'a Arc<Record>> {
        let found = self.names.get(self.name_hash(namespace, name)).filter_map(|slot| self.at(slot));
        found.filter(move |record| record.is_pod() && record.is_named(namespace, name))
    }

    /// The workload that owns an address.
    pub(super) fn by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Record>> {
        let mut found = self.ips.get(self.hasher.hash_one(ip)).filter_map(|slot| self.at(slot));
        found.find(|record| *record.place().network == *network && record.addresses().any(|own| own == ip))
    }

    /// What leads to a record: hashes of its names, and of its addresses.
    fn keys(&self, record: &Record) -> (Vec<u64>, Vec<u64>) {
        let mut names = Vec::with_capacity(2);
        if record.is_regular() || record.is_pod() {
            names.push(self.name_hash(record.namespace(), &record.name()));
        }
        if !record.is_regular() {
            names.push(self.uid_hash(&record.uid()));
        }
        if record.host_network() {
            return (names, Vec::new());
        }
        let mut ips: Vec<u64> = record.addresses().map(|ip| self.hasher.hash_one(ip)).collect();
        ips.sort_unstable();
        ips.dedup();
        (names, ips)
    }

    /// Takes a record in, in the place of the one with its uid, which is given back.
    pub(super) fn put(&mut self, record: Arc<Record>, free: &mut Free) -> Option<Arc<Record>> {
        let known = self.slot_of(&record.uid());
        let slot = known.unwrap_or_else(|| self.vacant(free));
        let old = self.entry(slot)?.replace(record.clone());
        let found = self.keys(&record);
        let stays = old.as_ref().is_some_and(|old| self.keys(old) == found && old.protocol() == record.protocol());
        if !stays {
            if let Some(old) = &old {
                self.unindex(slot, old);
            }
            let Self { slots, names, ips, .. } = self;
            let is_after = |other: u32| {
                let other = slots.get(other as usize / CHUNK).and_then(|chunk| chunk[other as usize % CHUNK].as_ref());
                other.is_some_and(|other| order(other, &record) == Ordering::Greater)
            };
            found.0.into_iter().for_each(|hash| names.insert(hash, slot, is_after));
            found.1.into_iter().for_each(|hash| ips.insert(hash, slot, is_after));
        }
        self.len += usize::from(old.is_none());
        old
    }

    /// Takes a record out.
    pub(super) fn remove(&mut self, uid: &str, free: &mut Free) -> Option<Arc<Record>> {
        let slot = self.slot_of(uid)?;
        let old = self.entry(slot)?.take()?;
        self.unindex(slot, &old);
        self.len -= 1;
        free.push(Reverse(slot));
        // What is at the end is given back.
        let chunks = self.slots.len();
        while self.slots.last().is_some_and(|chunk| chunk.iter().all(Option::is_none)) {
            self.slots.pop();
        }
        if self.slots.len() < chunks {
            let end = self.slots.len() * CHUNK;
            free.retain(|slot| (slot.0 as usize) < end);
        }
        Some(old)
    }

    fn entry(&mut self, slot: u32) -> Option<&mut Option<Arc<Record>>> {
        let chunk = self.slots.get_mut(slot as usize / CHUNK)?;
        Some(&mut Arc::make_mut(chunk)[slot as usize % CHUNK])
    }

    fn vacant(&mut self, free: &mut Free) -> u32 {
        if let Some(Reverse(slot)) = free.pop() {
            return slot;
        }
        let start = u32::try_from(self.slots.len() * CHUNK).unwrap_or(u32::MAX);
        self.slots.push(Arc::new([const { None }; CHUNK]));
        free.extend((1..CHUNK as u32).map(|next| Reverse(start + next)));
        start
    }

    fn unindex(&mut self, slot: u32, old: &Record) {
        let (names, ips) = self.keys(old);
        names.into_iter().for_each(|hash| self.names.remove(hash, slot));
        ips.into_iter().for_each(|hash| self.ips.remove(hash, slot));
    }
}

/// Of several with one address or name: pods first, then HBONE, then by uid so that all nodes agree.
fn order(one: &Record, other: &Record) -> Ordering {
    let rank = |record: &Record| (!record.is_pod(), record.protocol() != Protocol::Hbone);
    rank(one).cmp(&rank(other)).then_with(|| one.cmp_uid(other))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Shapes;
    use crate::state::fixtures::workload;

    #[test]
    fn slots_are_used_again_and_given_back() {
        let (mut known, mut free, mut shapes) = (Workloads::new(), Free::new(), Shapes::default());
        let name = |pod: usize| format!("web-{pod}");
        let uid = |pod: usize| format!("Kubernetes//Pod/shop/{}", name(pod));
        let mut put = |known: &mut Workloads, free: &mut Free, pod: usize| {
            let ip = format!("10.0.{}.{}", pod / 250, pod % 250);
            known.put(Record::pack(&workload("shop", &name(pod), &ip), &mut shapes).into(), free).is_some()
        };
        for pod in 0..1000 {
            assert!(!put(&mut known, &mut free, pod));
            assert!(put(&mut known, &mut free, pod), "the second one finds the first");
        }
        let (before, chunks) = (known.clone(), known.slots.len());
        for pod in 0..500 {
            assert_eq!(known.remove(&uid(pod), &mut free).unwrap().uid(), uid(pod));
            assert!(known.remove(&uid(pod), &mut free).is_none());
        }
        for pod in 2000..2500 {
            put(&mut known, &mut free, pod);
        }
        assert_eq!((known.slots.len(), known.len(), known.iter().count()), (chunks, 1000, 1000));
        for pod in (500..1000).chain(2000..2500) {
            known.remove(&uid(pod), &mut free);
        }
        assert_eq!((known.slots.len(), known.len(), free.len()), (0, 0, 0));
        assert_eq!(before.iter().count(), 1000, "who reads goes on reading");
        assert!(before.by_uid(&uid(999)).is_some() && before.by_ip("", [10, 0, 3, 249].into()).is_some());
    }
}
