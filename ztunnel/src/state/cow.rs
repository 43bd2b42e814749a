//! A map that is cheap to clone and cheap to change: shards behind `Arc`, copied when first written after a clone.
//!
//! A snapshot is published by cloning the writer's copy, which costs one reference count a shard; the next update then
//! copies only the shards that it touches. A persistent tree would copy less per write, and cost readers a walk per
//! look-up; look-ups happen per connection and writes per push, so readers win. The number of shards is fixed.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// With 10,000 entries a shard holds about 80, and copying one is about as much work as cloning the map.
const SHARDS: usize = 128;

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct CowMap<K, V> {
    hasher: RandomState,
    shards: Vec<Arc<HashMap<K, V, RandomState>>>,
    len: usize,
}

impl<K: Hash + Eq + Clone, V: Clone> CowMap<K, V> {
    pub(super) fn new() -> Self {
        let hasher = RandomState::new();
        let empty = Arc::new(HashMap::with_hasher(hasher.clone()));
        Self { shards: vec![empty; SHARDS], hasher, len: 0 }
    }

    fn shard_of<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The low bits choose the bucket inside the shard, so the high ones choose the shard.
        (self.hasher.hash_one(key) >> 40) as usize % SHARDS
    }

    pub(super) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.shards[self.shard_of(key)].get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let shard = self.shard_of(&key);
        let old = Arc::make_mut(&mut self.shards[shard]).insert(key, value);
        if old.is_none() {
            self.len += 1;
        }
        old
    }

    pub(super) fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let shard = self.shard_of(key);
        if !self.shards[shard].contains_key(key) {
            return None; // and do not copy the shard for nothing
        }
        let old = Arc::make_mut(&mut self.shards[shard]).remove(key);
        self.len -= 1;
        old
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }
}

/// Several things under one key, in an order given by the caller: the first is the preferred one.
pub(super) type Groups<K, T> = CowMap<K, Arc<[Arc<T>]>>;

impl<K: Hash + Eq + Clone, T> Groups<K, T> {
    /// Everything under `key`.
    pub(super) fn group<Q>(&self, key: &Q) -> &[Arc<T>]
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.get(key).map_or(&[], |group| &**group)
    }

    /// Puts `new` under `key` in place of what `is_old` finds; `None` only removes.
    pub(super) fn regroup<O: Ord>(
        &mut self,
        key: &K,
        is_old: impl Fn(&T) -> bool,
        new: Option<&Arc<T>>,
        order: impl Fn(&T) -> O,
    ) {
        let mut group: Vec<Arc<T>> = self.group(key).iter().filter(|item| !is_old(item)).cloned().collect();
        group.extend(new.cloned());
        if group.is_empty() {
            self.remove(key);
            return;
        }
        group.sort_by_cached_key(|item| order(item));
        self.insert(key.clone(), group.into());
    }
}
