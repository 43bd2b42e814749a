//! Maglev: which row of a table a hash means, by a look-up table whose shares are even to one part in its size.
//!
//! Every endpoint goes through the places of the table in an order of its own, made of its uid, and in turns, by weight, each
//! takes the next free place of its order. An endpoint that goes moves its own keys and few others; where a ring has shares
//! that differ by some percent, here they do not. The table is made anew when endpoints change.

use std::sync::Arc;

use crate::lb::ring::hash;
use crate::state::{PortTable, Record};

/// Nobody's place.
const FREE: u32 = u32::MAX;

/// An endpoint's way through the places.
struct Order {
    /// Of the table.
    row: u32,
    weight: u64,
    /// Turns × weight at which it takes its next place.
    due: u64,
    next: u64,
    step: u64,
    looked: u64,
}

/// A table of `size` places; empty if there are no rows.
pub(super) fn build(table: &PortTable, all: &[Arc<Record>], size: u32) -> Box<[u32]> {
    let size = u64::from(size.max(1));
    let rows = table.candidates.iter().enumerate();
    let mut orders: Vec<Order> = rows
        .filter_map(|(row, candidate)| {
            let of = hash(all.get(candidate.endpoint as usize)?.uid().as_bytes());
            let (next, step) = (of % size, hash(&of.to_le_bytes()) % (size - 1).max(1) + 1);
            let weight = u64::from(candidate.weight);
            Some(Order { row: u32::try_from(row).ok()?, weight, due: 0, next, step, looked: 0 })
        })
        .collect();
    let heaviest = orders.iter().map(|order| order.weight).max().unwrap_or(0);
    if heaviest == 0 {
        return Box::default();
    }
    let mut places = vec![FREE; usize::try_from(size).unwrap_or(1)];
    let mut left = size;
    for turn in 1.. {
        for order in &mut orders {
            if turn * order.weight < order.due {
                continue;
            }
            order.due += heaviest;
            if let Some(place) = free(&places, order, size) {
                places[place] = order.row;
                left -= 1;
            }
            if left == 0 {
                return places.into();
            }
        }
    }
    places.into()
}

/// The next free place of an order. One that comes round (the size is no prime) goes on with the place after.
fn free(places: &[u32], order: &mut Order, size: u64) -> Option<usize> {
    loop {
        let place = usize::try_from(order.next).ok()?;
        order.looked += 1;
        order.next = (order.next + order.step) % size;
        if order.looked.is_multiple_of(size) {
            (order.next, order.step) = ((order.next + 1) % size, 1);
        }
        if places.get(place) == Some(&FREE) {
            return Some(place);
        }
        if order.looked > 3 * size {
            return places.iter().position(|row| *row == FREE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::build;
    use crate::state::fixtures::{behind, service, snapshot, workload};
    use crate::state::{Change, PortTable, Service, Workload};

    fn cart(endpoints: u8, weight: impl Fn(u8) -> u32) -> Arc<Service> {
        let endpoints = (1..=endpoints).map(|number| {
            let pod = behind(workload("shop", &format!("cart-{number}"), &format!("10.0.0.{number}")), "shop", "cart");
            Change::Workload(Arc::new(Workload { capacity: weight(number), ..pod }))
        });
        let spec = [Change::Service(service("shop", "cart", "10.96.0.1").into())];
        let snapshot = snapshot(spec.into_iter().chain(endpoints));
        snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap().clone()
    }

    /// Which endpoint each place is, by its uid.
    fn places(service: &Service, size: u32) -> Vec<String> {
        let table: &PortTable = &service.endpoints.ports.get(&80).unwrap().all;
        let of = |row: &u32| service.endpoints.all[table.candidates[*row as usize].endpoint as usize].uid().to_owned();
        build(table, &service.endpoints.all, size).iter().map(of).collect()
    }

    #[test]
    fn every_place_is_taken_and_shares_follow_the_weights() {
        for size in [1_009, 65_537, 1_000] {
            let mut counts = BTreeMap::new();
            for uid in places(&cart(5, |number| if number == 5 { 4 } else { 1 }), size) {
                *counts.entry(uid).or_insert(0_u32) += 1;
            }
            let one = size / 8;
            let near = |count: u32, of: u32| count.abs_diff(of) <= 2 + of / 100;
            let counts: Vec<u32> = counts.into_values().collect();
            assert!(
                counts[..4].iter().all(|count| near(*count, one)) && near(counts[4], one * 4),
                "{size}: {counts:?}"
            );
        }
    }

    #[test]
    fn an_endpoint_that_goes_moves_its_own_keys_and_few_others() {
        let (five, four) = (places(&cart(5, |_| 1), 65_537), places(&cart(4, |_| 1), 65_537));
        let gone = five.iter().filter(|uid| uid.ends_with("cart-5")).count();
        let moved = five.iter().zip(&four).filter(|(before, after)| before != after).count();
        assert!(moved >= gone && moved - gone < five.len() / 10, "{moved} moved, {gone} had to");
    }

    #[test]
    fn a_table_of_nobody_is_empty() {
        assert!(build(&PortTable::default(), &[], 7).is_empty());
    }
}
