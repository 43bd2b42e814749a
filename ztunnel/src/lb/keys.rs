//! Choice by hash: the table of the layout that a policy names, made on first use and kept beside the rows.
//! So a change of the rows forgets it, and ports that nobody hashes cost nothing.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use crate::lb::{maglev, ring};
use crate::state::{KeyTable, Layout, PortTable, Record};

/// Tables that are kept for one port: as many layouts as its clients' policies name. Others are made each time.
const MOST: usize = 4;

/// The usable row that `key` means, and how many rows were looked at. The next one in the order of the table stands in for
/// one that is not usable.
pub(super) fn row(
    table: &PortTable,
    all: &[Arc<Record>],
    layout: Layout,
    key: u64,
    usable: &dyn Fn(usize) -> bool,
) -> (Option<usize>, usize) {
    match &*kept(table, all, layout) {
        KeyTable::Ring(points) => {
            let first = points.partition_point(|(point, _)| *point < key);
            let (before, after) = points.split_at(first);
            find(after.iter().chain(before).map(|(_, row)| *row as usize), table.candidates.len(), usable)
        }
        KeyTable::Maglev(places) => {
            let first = usize::try_from(key % (places.len().max(1) as u64)).unwrap_or(0);
            let (before, after) = places.split_at(first);
            find(after.iter().chain(before).map(|row| *row as usize), table.candidates.len(), usable)
        }
    }
}

fn kept(table: &PortTable, all: &[Arc<Record>], layout: Layout) -> Arc<KeyTable> {
    let mut tables = table.keys.get_or_init(Box::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, made)) = tables.iter().find(|(own, _)| *own == layout) {
        return made.clone();
    }
    // Whoever wants the same one meanwhile waits, and does not make it too.
    let made = Arc::new(match layout {
        Layout::Ring(least) => KeyTable::Ring(ring::build(table, all, least)),
        Layout::Maglev(size) => KeyTable::Maglev(maglev::build(table, all, size)),
    });
    if tables.len() < MOST {
        tables.push((layout, made.clone()));
    }
    made
}

fn find(order: impl Iterator<Item = usize>, rows: usize, usable: &dyn Fn(usize) -> bool) -> (Option<usize>, usize) {
    let mut looked = 0;
    // Rows that were looked at and are of no use: most places are of those.
    let mut useless = BTreeSet::new();
    for row in order {
        if useless.contains(&row) {
            continue;
        }
        looked += 1;
        if usable(row) {
            return (Some(row), looked);
        }
        useless.insert(row);
        if useless.len() == rows {
            break;
        }
    }
    (None, looked)
}
