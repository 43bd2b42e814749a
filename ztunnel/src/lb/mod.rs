//! Choice of an endpoint: pure, with chance and experience as arguments, over tables that the store prepared.
//!
//! A choice costs the same with three endpoints and with ten thousand. What narrows it to the client's surroundings
//! (failover, strict, its network) is computed once for the place that this node is and kept beside the table. Traffic
//! and `tulle explain` take the same path: [`shares`] reads the table that [`pick`] draws from.
//!
//! Memories live here as plain data, their owners elsewhere: [`Failing`], endpoints that a worker could not reach
//! lately, [`Bound`], the endpoints that a pod is bound to by a service's session affinity, and [`Destinations`], what all
//! workers of the node know of the Services that are used: whose turn it is, how busy and how well endpoints are, and what
//! each pod has under way. Not here: retries, and who reports what (`outbound`).

mod affinity;
mod destinations;
mod failing;
mod keys;
mod load;
mod locality;
mod maglev;
pub mod outlier;
mod pick;
mod recent;
mod ring;
#[cfg(test)]
mod tests;
mod warmup;
mod work;

pub use affinity::Bound;
pub use destinations::{Destination, Destinations, Held, Kind, Live};
pub use failing::Failing;
pub use load::refused;
pub use pick::{Chance, Choice, NoChoice, Way, addresses, pick, shares};
pub use ring::hash;
