//! From hashes to slots, eight bytes an entry: for indexes whose keys can be read where the slots lead.
//!
//! Shards of sorted entries behind `Arc`, copied when first written after a clone, as in `cow`; but an entry is two numbers
//! and no `Arc`, so that copying a shard touches no counts all over the heap (an update of a hundred workloads copies
//! some twenty thousand entries), and there is neither a load factor nor a second copy of the key. Several entries may
//! have one hash: those of one key, in an order of the caller's, and now and then another key's, which the caller tells
//! apart by looking. Limit: 2³² slots.

use std::sync::Arc;

/// With 100,000 entries a shard has two hundred: a search of eight steps, and 1.6 KB to copy.
const SHARDS: usize = 512;
/// Room that a full shard gets: little, because the shards are where slack would add up.
const GROWTH: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u32,
    slot: u32,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Index {
    shards: Vec<Arc<Vec<Entry>>>,
}

/// Shard and hash inside it: different bits.
fn split(hash: u64) -> (usize, u32) {
    ((hash >> 32) as usize % SHARDS, hash as u32)
}

impl Index {
    pub(super) fn new() -> Self {
        Self { shards: vec![Arc::default(); SHARDS] }
    }

    /// Slots under `hash`, in their order.
    pub(super) fn get(&self, hash: u64) -> impl Iterator<Item = u32> {
        let (shard, hash) = split(hash);
        let entries = &self.shards[shard];
        let start = entries.partition_point(|entry| entry.hash < hash);
        entries[start..].iter().take_while(move |entry| entry.hash == hash).map(|entry| entry.slot)
    }

    /// Puts `slot` under `hash`, in front of the first that `is_after` finds.
    pub(super) fn insert(&mut self, hash: u64, slot: u32, is_after: impl Fn(u32) -> bool) {
        let (shard, hash) = split(hash);
        let entries = Arc::make_mut(&mut self.shards[shard]);
        let start = entries.partition_point(|entry| entry.hash < hash);
        let same = entries[start..].iter().take_while(|entry| entry.hash == hash && !is_after(entry.slot)).count();
        if entries.len() == entries.capacity() {
            entries.reserve_exact(GROWTH);
        }
        entries.insert(start + same, Entry { hash, slot });
    }

    /// Takes one entry of `slot` under `hash` away.
    pub(super) fn remove(&mut self, hash: u64, slot: u32) {
        let (shard, hash) = split(hash);
        let is_it = |entry: &Entry| entry.hash == hash && entry.slot == slot;
        // Looked at first, so that nothing is copied in vain.
        if let Some(at) = self.shards[shard].iter().position(is_it) {
            Arc::make_mut(&mut self.shards[shard]).remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_one_hash_keep_their_order_and_clones_see_no_change() {
        let mut index = Index::new();
        for hash in 0..10_000 {
            index.insert(hash << 20, 7, |_| false);
        }
        for slot in [3, 1, 2] {
            index.insert(42, slot, |other| other > slot);
        }
        let before = index.clone();
        index.remove(42, 1);
        index.remove(42, 99);
        assert_eq!(index.get(42).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(before.get(42).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((index.get(43).count(), index.get(9_999 << 20).collect::<Vec<_>>()), (0, vec![7]));
        let copied = index.shards.iter().zip(&before.shards).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!(copied, 1);
    }
}
