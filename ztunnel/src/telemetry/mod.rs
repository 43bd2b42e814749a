//! One record a connection: opened at accept, filled in by each phase, written exactly once.
//!
//! The record ends when it is finished or dropped; a dropped one says so, so that no connection is missing from the log
//! or counted twice. The log line goes through tracing's `access` target to a writer thread that drops lines (counted)
//! rather than blocking a worker. Metric and label names are Istio's, because people's dashboards know them.

pub mod breakers;
mod conn;
pub mod dns;
pub mod egress;
mod http;
pub mod lines;
pub mod metrics;
pub mod plaintext;
mod services;
pub mod trace;

pub use conn::{ConnRecord, Direction, Peer};
pub use http::{HttpMetrics, HttpRecord};
pub use services::{Seen, ServiceTimes};
