//! Ring hash: which row of a table a hash means.
//!
//! Every endpoint has points on a ring of 64-bit numbers, by its uid and its weight, and a hash means the next point: so an
//! endpoint that comes or goes moves only the keys that are its own, and every node comes to the same endpoint. The hash is
//! our own (FNV-1a, mixed), because what std hashes with may change with the compiler, and nodes are not all alike.

use std::sync::Arc;

use crate::state::{PortTable, Record};

/// Points of an endpoint of the least weight, in tables of up to so many rows. They do not depend on the others, so that
/// these keep theirs; few rows need many points to have even shares (with 128, some 9 % beside), and 10,000 rows make a ring
/// of 1 MB, built in some 10 ms.
const EACH: [(usize, u64); 3] = [(64, 128), (1024, 32), (usize::MAX, 8)];

/// An endpoint has at most so many times the points of the lightest.
const MOST_WEIGHT: u64 = 64;

/// A hash of bytes that is the same on every node and in every version.
pub fn hash(bytes: &[u8]) -> u64 {
    let sum = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mixed = (sum ^ (sum >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The points of a table, in order: where on the ring, and which row. `least`: of them together.
pub(super) fn build(table: &PortTable, all: &[Arc<Record>], least: u32) -> Box<[(u64, u32)]> {
    let rows = table.candidates.len();
    let each = EACH.iter().find(|(most, _)| rows <= *most).map_or(1, |(_, each)| *each);
    // A power of two, so that it stays the same while few rows come and go.
    let asked = u64::from(least).div_ceil(rows.max(1) as u64).next_power_of_two();
    let each = each.max(asked);
    let lightest = table.candidates.iter().map(|row| u64::from(row.weight)).min().unwrap_or(1).max(1);
    let mut points = Vec::new();
    for (row, candidate) in table.candidates.iter().enumerate() {
        let Some(endpoint) = all.get(candidate.endpoint as usize) else { continue };
        let count = (u64::from(candidate.weight) * each / lightest).min(each * MOST_WEIGHT);
        let of = hash(endpoint.uid().as_bytes());
        let row = u32::try_from(row).unwrap_or(u32::MAX);
        points.extend((0..count).map(|number| (hash(&[of.to_le_bytes(), number.to_le_bytes()].concat()), row)));
    }
    points.sort_unstable();
    points.into()
}
