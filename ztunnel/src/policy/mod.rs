//! Authorization: a pure function from facts and one snapshot to a verdict that names what decided.
//!
//! Istio's algebra (DENY before ALLOW; no ALLOW means allow), with the additions that keep it from failing open: a
//! policy that has not arrived refuses, and a part of a policy that cannot be evaluated counts against the connection.
//! The same function answers live traffic, the re-check of live connections and `tulle explain`. [`network`] is the sibling
//! for NetworkPolicies, which must allow as well, and [`datagrams`] their form for the kernel; [`egress`] says what may leave the cluster. [`evaluate_request`] decides one
//! request by the HTTP fields too, with the token that [`jwt`] has verified.

pub mod datagrams;
pub mod egress;
mod http;
pub mod inside;
pub mod jwt;
mod l4;
pub mod network;
#[cfg(test)]
mod network_reference;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
mod verdict;

pub use http::{HttpFacts, evaluate_connection, evaluate_request, needs_http};
pub use l4::{Facts, evaluate, evaluated};
pub use verdict::{Code, Verdict};

pub use crate::outcome::{DryRun, WouldBe};
