//! Choice of an endpoint: pure, with chance as an argument, over tables that the store prepared.
//!
//! A choice is one binary search. What narrows it to the client's surroundings (failover, strict, its network) is computed
//! once for the place that this node is and kept beside the table. Traffic and `tulle explain` take the same path:
//! [`shares`] reads the table that [`pick`] draws from. Not here: retries, load, ejection of bad endpoints.

mod locality;
mod pick;
#[cfg(test)]
mod tests;

pub use pick::{Choice, NoChoice, pick, shares};
