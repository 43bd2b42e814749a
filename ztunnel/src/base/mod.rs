//! What the standard library or tokio could have shipped: sockets in other namespaces, workers, drain, fairness.
//!
//! Nothing here knows the word "workload". Everything above may use it.

pub mod bucket;
pub mod budget;
pub mod conntrack;
pub mod cut;
pub mod drain;
pub mod gather;
pub mod handover;
pub mod lent;
pub mod memory;
mod netlink;
pub mod netns;
pub mod outlet;
pub mod pace;
pub mod packets;
pub mod routes;
pub mod sockets;
pub mod window;
pub mod workers;

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The address with an IPv4-mapped IPv6 address turned into plain IPv4, as every look-up expects it.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Wall clock, seconds since the Unix epoch.
pub fn unix_now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX))
}

/// Wall clock, microseconds since the Unix epoch.
pub fn unix_now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX))
}

/// When the server of an HTTP/2 connection is asked whether it is there, by a PING.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pings {
    /// Silence before it is asked.
    pub interval: Duration,
    /// How long its answer may take.
    pub timeout: Duration,
}

/// Bytes moved by a connection, seen from the client.
#[derive(Debug, Default)]
pub struct Counts {
    /// Client to server.
    pub up: Cell<u64>,
    /// Server to client.
    pub down: Cell<u64>,
}

impl Counts {
    /// Both directions.
    pub fn total(&self) -> u64 {
        self.up.get().wrapping_add(self.down.get())
    }
}
