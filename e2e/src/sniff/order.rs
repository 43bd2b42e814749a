//! The segments of one direction of a TCP connection, put in order.
//!
//! A link between two namespaces is fed by whichever processor sends, so a capture sees segments overtake each other at
//! high rates, and repeated ones after a loss. What is early waits for what is missing, up to a bound; what was seen is
//! dropped. A gap that is never filled is counted, so that nobody takes the rest for the whole.

use std::collections::BTreeMap;

/// Bytes that may wait for one gap: some times the largest window that a connection here has (6 MiB, `tcp_rmem`).
const WAITING_MAX: usize = 32 << 20;

/// One direction.
#[derive(Debug)]
pub(super) struct Order {
    /// Sequence number of the first byte, on the wire.
    start: u32,
    /// Bytes handed out, and where the next ones belong.
    next: u64,
    /// Early segments, by their place in the stream.
    early: BTreeMap<u64, Vec<u8>>,
    waiting: usize,
    gaps: u64,
}

impl Order {
    /// A direction whose first seen byte has this sequence number.
    pub(super) fn starting(sequence: u32) -> Self {
        Self { start: sequence, next: 0, early: BTreeMap::new(), waiting: 0, gaps: 0 }
    }

    /// Takes a segment; gives what is now in order. Bytes before the first one seen are given as they are: they belong to
    /// the connection, and nobody may miss them.
    pub(super) fn insert(&mut self, sequence: u32, payload: &[u8]) -> Vec<Vec<u8>> {
        let expected = self.start.wrapping_add(self.next as u32);
        // Distances on the wire are of 32 bits with sign (RFC 9293 section 3.4).
        let ahead = i64::from(sequence.wrapping_sub(expected) as i32);
        let place = self.next as i64 + ahead;
        if place < 0 {
            self.gaps += 1;
            return vec![payload.to_vec()];
        }
        let place = place as u64;
        let seen = self.next.saturating_sub(place).min(payload.len() as u64) as usize;
        if seen < payload.len() {
            self.hold(place + seen as u64, &payload[seen..]);
        }
        let mut ready = self.in_order();
        if self.waiting > WAITING_MAX {
            ready.extend(self.drain());
        }
        ready
    }

    /// Everything that waits, in its order, with the gaps counted.
    pub(super) fn drain(&mut self) -> Vec<Vec<u8>> {
        let mut ready = Vec::new();
        while let Some((place, _)) = self.early.first_key_value() {
            self.gaps += u64::from(*place > self.next);
            self.next = self.next.max(*place);
            ready.extend(self.in_order());
        }
        ready
    }

    /// Gaps since this was asked last.
    pub(super) fn gaps(&mut self) -> u64 {
        std::mem::take(&mut self.gaps)
    }

    fn hold(&mut self, place: u64, bytes: &[u8]) {
        // Of two segments at one place the longer one has both.
        if self.early.get(&place).is_some_and(|held| held.len() >= bytes.len()) {
            return;
        }
        self.waiting += bytes.len();
        if let Some(shorter) = self.early.insert(place, bytes.to_vec()) {
            self.waiting -= shorter.len();
        }
    }

    fn in_order(&mut self) -> Vec<Vec<u8>> {
        let mut ready = Vec::new();
        while let Some(entry) = self.early.first_entry().filter(|entry| *entry.key() <= self.next) {
            let (place, mut bytes) = entry.remove_entry();
            self.waiting -= bytes.len();
            let seen = self.next - place;
            if seen < bytes.len() as u64 {
                bytes.drain(..seen as usize);
                self.next += bytes.len() as u64;
                ready.push(bytes);
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use crate::sniff::order::Order;

    fn all(order: &mut Order, segments: &[(u32, &str)]) -> String {
        let mut text: Vec<u8> = Vec::new();
        for (sequence, payload) in segments {
            text.extend(order.insert(*sequence, payload.as_bytes()).concat());
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn any_order_of_segments_gives_the_same_stream_across_the_end_of_the_numbers() {
        let start = u32::MAX - 2;
        let parts = [(start, "abc"), (start.wrapping_add(3), "def"), (start.wrapping_add(6), "gh")];
        for order in [[0, 1, 2], [0, 2, 1]] {
            let mut stream = Order::starting(start);
            let segments: Vec<_> = order.iter().map(|index| parts[*index]).collect();
            assert_eq!((all(&mut stream, &segments).as_str(), stream.gaps()), ("abcdefgh", 0), "{order:?}");
        }
    }

    #[test]
    fn repeated_and_overlapping_bytes_count_once() {
        let mut stream = Order::starting(10);
        let segments = [(10, "abc"), (10, "abc"), (14, "ef"), (14, "efgh"), (12, "cde"), (16, "gh"), (18, "i")];
        assert_eq!((all(&mut stream, &segments).as_str(), stream.gaps()), ("abcdefghi", 0));
    }

    #[test]
    fn a_gap_is_counted_and_what_follows_it_is_not_lost() {
        let mut stream = Order::starting(0);
        assert_eq!(all(&mut stream, &[(0, "ab"), (5, "fg"), (9, "k")]), "ab");
        assert_eq!((stream.drain().concat(), stream.gaps()), (b"fgk".to_vec(), 2));
        assert_eq!((stream.insert(u32::MAX, b"z").concat(), stream.gaps()), (b"z".to_vec(), 1));
    }
}
