//! Choice of an endpoint: pure, with chance and experience as arguments, over tables that the store prepared.
//!
//! A choice costs the same with three endpoints and with ten thousand. What narrows it to the client's surroundings
//! (failover, strict, its network) is computed once for the place that this node is and kept beside the table. Traffic
//! and `tulle explain` take the same path: [`shares`] reads the table that [`pick`] draws from.
//!
//! Two memories live here as plain data, their owners elsewhere: [`Failing`], endpoints that a worker could not reach
//! lately, and [`Bound`], the endpoints that a pod is bound to by a service's session affinity. Not here: retries
//! (`outbound`), load, ejection by answers.

mod affinity;
mod failing;
mod locality;
mod pick;
#[cfg(test)]
mod tests;
mod work;

pub use affinity::Bound;
pub use failing::Failing;
pub use pick::{Chance, Choice, NoChoice, pick, shares};
