//! An ordered map whose copies share what they have in common.
//!
//! The source, translation and every stream each keep a moment of a mesh that changes by one object in ten thousand. So
//! entries are kept in order in chunks behind `Arc`s: a copy costs one count for each chunk, a change copies one chunk, and
//! the difference of two maps skips the chunks that they share. A tree of small nodes would copy less at each change and
//! cost more memory and time for everything else. Limits: not for maps that change much and are never copied.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::Serializer;

/// Most entries of a chunk. Copying as many costs some microseconds, and 10,000 entries are 80 to 160 chunks.
const CHUNK: usize = 128;

/// Entries in order; never empty within a map.
type Chunk<K, V> = Arc<Vec<(K, V)>>;

/// The map.
pub struct SharedMap<K, V> {
    chunks: Vec<Chunk<K, V>>,
    len: usize,
}

/// One entry that two maps do not have in common.
#[derive(Debug, PartialEq, Eq)]
pub struct Change<'a, K, V> {
    /// Its key.
    pub key: &'a K,
    /// In the older map.
    pub before: Option<&'a V>,
    /// In the newer one.
    pub after: Option<&'a V>,
}

impl<'a, K, V> Change<'a, K, V> {
    /// What is there of before and after.
    pub fn sides(&self) -> impl Iterator<Item = &'a V> + use<'a, K, V> {
        self.before.into_iter().chain(self.after)
    }
}

impl<K: Ord, V> SharedMap<K, V> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Chunk and place of a key, or where it would be.
    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> (usize, Result<usize, usize>)
    where
        K: Borrow<Q>,
    {
        let before = |chunk: &Chunk<K, V>| chunk.last().is_some_and(|(last, _)| last.borrow() < key);
        let at = self.chunks.partition_point(before);
        let place = |chunk: &Chunk<K, V>| chunk.binary_search_by(|(other, _)| other.borrow().cmp(key));
        (at, self.chunks.get(at).map_or(Err(0), place))
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let (at, place) = self.find(key);
        Some(&self.chunks.get(at)?.get(place.ok()?)?.1)
    }

    /// Whether there is a value of a key.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value))
    }

    /// All keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// The entries from a key on.
    pub fn range_from<'a, Q: Ord + ?Sized>(&'a self, key: &Q) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V, Q>
    where
        K: Borrow<Q>,
    {
        let (at, place) = self.find(key);
        let place = place.unwrap_or_else(|place| place);
        let entries = self.chunks[at..].iter().flat_map(|chunk| chunk.iter());
        entries.skip(place).map(|(key, value)| (key, value))
    }

    /// What leads from `old` to this map.
    pub fn changes_since<'a>(&'a self, old: &'a Self) -> Vec<Change<'a, K, V>>
    where
        V: PartialEq,
    {
        let mut changes = Vec::new();
        let (mut new, mut old) = (Walk::new(self), Walk::new(old));
        loop {
            if new.skip_if_shared(&mut old) {
                continue;
            }
            let order = match (new.peek(), old.peek()) {
                (Some((new, _)), Some((old, _))) => new.cmp(old),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return changes,
            };
            let after = if order == Ordering::Greater { None } else { new.next() };
            let before = if order == Ordering::Less { None } else { old.next() };
            let (before_value, after_value) = (before.map(|(_, value)| value), after.map(|(_, value)| value));
            if let Some((key, _)) = after.or(before).filter(|_| before_value != after_value) {
                changes.push(Change { key, before: before_value, after: after_value });
            }
        }
    }
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// Puts a value in the place of the one that there was. Copies one chunk if another map has it, too.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let (at, place) = self.find(&key);
        let at = at.min(self.chunks.len().saturating_sub(1));
        let Some(chunk) = self.chunks.get_mut(at) else {
            self.chunks.push(Arc::new(vec![(key, value)]));
            self.len = 1;
            return None;
        };
        let entries = Arc::make_mut(chunk);
        let place = match place {
            Ok(place) => return Some(std::mem::replace(&mut entries[place].1, value)),
            // Past the last chunk: at its end.
            Err(_) if entries.last().is_some_and(|(last, _)| *last < key) => entries.len(),
            Err(place) => place,
        };
        entries.insert(place, (key, value));
        self.len += 1;
        if entries.len() > CHUNK {
            // What is filled in order leaves full chunks behind.
            let half = if place == CHUNK { CHUNK } else { CHUNK / 2 };
            let rest = entries.split_off(half);
            self.chunks.insert(at + 1, Arc::new(rest));
        }
        None
    }

    /// Takes a value out.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (at, Ok(place)) = self.find(key) else { return None };
        let entries = Arc::make_mut(&mut self.chunks[at]);
        let (_, value) = entries.remove(place);
        self.len -= 1;
        if entries.is_empty() {
            self.chunks.remove(at);
        } else {
            // What was large and became small does not stay a row of small chunks.
            self.merge_after(at);
            self.merge_after(at.saturating_sub(1));
        }
        Some(value)
    }

    /// Makes one chunk of two small ones that follow each other.
    fn merge_after(&mut self, at: usize) {
        let small = |two: &[Chunk<K, V>]| two[0].len() + two[1].len() <= CHUNK / 2;
        if self.chunks.get(at..at + 2).is_some_and(small) {
            let next = self.chunks.remove(at + 1);
            Arc::make_mut(&mut self.chunks[at]).extend(Arc::unwrap_or_clone(next));
        }
    }
}

/// A place between two entries.
struct Walk<'a, K, V> {
    chunks: &'a [Chunk<K, V>],
    /// In the first of them.
    place: usize,
}

impl<'a, K, V> Walk<'a, K, V> {
    fn new(map: &'a SharedMap<K, V>) -> Self {
        Self { chunks: &map.chunks, place: 0 }
    }

    /// Steps over a chunk that both are about to begin.
    fn skip_if_shared(&mut self, other: &mut Self) -> bool {
        let shared = match (self.chunks.first(), other.chunks.first()) {
            (Some(one), Some(two)) => self.place == 0 && other.place == 0 && Arc::ptr_eq(one, two),
            _ => false,
        };
        if shared {
            self.chunks = &self.chunks[1..];
            other.chunks = &other.chunks[1..];
        }
        shared
    }

    fn peek(&self) -> Option<&'a (K, V)> {
        self.chunks.first().map(|chunk| &chunk[self.place])
    }

    fn next(&mut self) -> Option<&'a (K, V)> {
        let chunk = self.chunks.first()?;
        let entry = &chunk[self.place];
        self.place += 1;
        if self.place == chunk.len() {
            self.chunks = &self.chunks[1..];
            self.place = 0;
        }
        Some(entry)
    }
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), len: self.len }
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<K: Ord, V: Eq> Eq for SharedMap<K, V> {}

impl<K: Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

impl<K: Ord + Serialize, V: Serialize> Serialize for SharedMap<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::SharedMap;

    /// What leads from one plain map to another: key, before, after.
    fn expected(old: &BTreeMap<u16, u8>, new: &BTreeMap<u16, u8>) -> Vec<(u16, Option<u8>, Option<u8>)> {
        let keys: std::collections::BTreeSet<u16> = old.keys().chain(new.keys()).copied().collect();
        let both = keys.into_iter().map(|key| (key, old.get(&key).copied(), new.get(&key).copied()));
        both.filter(|(_, before, after)| before != after).collect()
    }

    proptest! {
        #[test]
        fn it_is_an_ordered_map_and_knows_what_changed(
            steps in prop::collection::vec((0u16..600, prop::option::weighted(0.7, 0u8..3)), 0..1500),
            look in 1usize..200,
        ) {
            let (mut map, mut plain) = (SharedMap::default(), BTreeMap::new());
            let mut earlier = (map.clone(), plain.clone());
            for (index, (key, value)) in steps.into_iter().enumerate() {
                match value {
                    Some(value) => prop_assert_eq!(map.insert(key, value), plain.insert(key, value)),
                    None => prop_assert_eq!(map.remove(&key), plain.remove(&key)),
                }
                prop_assert_eq!(map.len(), plain.len());
                if index % look == 0 {
                    prop_assert!(map.iter().eq(plain.iter()));
                    prop_assert!(map.range_from(&key).eq(plain.range(key..)));
                    prop_assert_eq!(map.get(&key), plain.get(&key));
                    let found = map.changes_since(&earlier.0);
                    let found: Vec<_> = found.iter().map(|c| (*c.key, c.before.copied(), c.after.copied())).collect();
                    prop_assert_eq!(found, expected(&earlier.1, &plain));
                    prop_assert!(earlier.0.iter().eq(earlier.1.iter()), "a copy stays as it was");
                    earlier = (map.clone(), plain.clone());
                }
            }
        }
    }

    #[test]
    fn a_map_that_was_filled_in_order_has_full_chunks_and_one_that_shrank_few() {
        let mut map: SharedMap<u32, u32> = (0..10_000).map(|key| (key, key)).collect();
        assert_eq!(map.chunks.len(), 10_000_usize.div_ceil(super::CHUNK));
        let copy = map.clone();
        map.insert(5_000, 0);
        let shared = map.chunks.iter().zip(&copy.chunks).filter(|(a, b)| std::sync::Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, map.chunks.len() - 1);
        for key in (0..10_000).filter(|key| key % 100 != 0) {
            map.remove(&key);
        }
        assert!(map.chunks.len() < 10, "{} chunks for {} entries", map.chunks.len(), map.len());
    }
}
