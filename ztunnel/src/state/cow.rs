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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_after_a_clone_copies_one_shard_and_leaves_the_clone_alone() {
        let mut map = CowMap::new();
        for key in 0..10_000u32 {
            map.insert(key, key);
        }
        let published = map.clone();
        map.insert(7, 700);
        map.remove(&999_999);
        let copied = map.shards.iter().zip(&published.shards).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!(copied, 1);
        assert_eq!((map.get(&7), published.get(&7)), (Some(&700), Some(&7)));
        map.remove(&7);
        assert_eq!((map.len(), published.len(), published.values().count()), (9_999, 10_000, 10_000));
    }

    #[test]
    fn a_group_keeps_its_order_and_goes_away_with_its_last_member() {
        let mut groups: Groups<u8, u32> = CowMap::new();
        for value in [3u32, 1, 2] {
            groups.regroup(&0, |old| *old == value, Some(&Arc::new(value)), |value| *value);
        }
        assert_eq!(groups.group(&0).iter().map(|value| **value).collect::<Vec<_>>(), [1, 2, 3]);
        for value in [1u32, 2, 3] {
            groups.regroup(&0, |old| *old == value, None, |value| *value);
        }
        assert_eq!(groups.len(), 0);
        assert!(groups.group(&0).is_empty());
    }
}
