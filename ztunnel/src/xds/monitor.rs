//! What the discovery stream counts and how it stands, for metrics, readiness and status pages.
//!
//! Plain counters beside the code that counts; whoever exports them reads them here. Nothing waits on them.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tulle_proto::names::{TYPE_ADDRESS, TYPE_NETWORK_POLICY, TYPE_TRUST_BUNDLE};

/// Why a stream ended. The names are the `reason` label of `istio_xds_connection_terminations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Termination {
    /// It never began: no connection.
    ConnectionError,
    /// Control ended it with an error.
    Error,
    /// Control or something between is restarting.
    Reconnect,
    /// Control ended it in good order.
    Complete,
}

impl Termination {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 4] = [Self::ConnectionError, Self::Error, Self::Reconnect, Self::Complete];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// Messages and bytes of one resource type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Responses.
    pub messages: u64,
    /// Bytes of their resources.
    pub bytes: u64,
}

/// How the stream stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A stream is open.
    pub connected: bool,
    /// Since when it is so, microseconds since the Unix epoch. 0: since the start.
    pub since_unix_us: u64,
    /// Why the last stream ended, or could not begin. Empty while one is open.
    pub last_error: String,
    /// Own types that the server offers.
    pub offered_types: Vec<String>,
    /// Rejected resources of the last response that had some: `name: reason`.
    pub last_rejections: Vec<String>,
}

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Monitor {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    terminations: [AtomicU64; 4],
    messages: [AtomicU64; 4],
    bytes: [AtomicU64; 4],
    rejected: AtomicU64,
    status: Mutex<Status>,
}

impl Monitor {
    /// Streams ended for `reason`.
    pub fn terminations(&self, reason: Termination) -> u64 {
        self.inner.terminations[reason as usize].load(Ordering::Relaxed)
    }

    /// What arrived of a type, by its URL; one that is not known counts as authorization policies.
    pub fn received(&self, type_url: &str) -> Received {
        let index = index(type_url);
        let load = |counters: &[AtomicU64; 4]| counters[index].load(Ordering::Relaxed);
        Received { messages: load(&self.inner.messages), bytes: load(&self.inner.bytes) }
    }

    /// Resources rejected.
    pub fn rejected(&self) -> u64 {
        self.inner.rejected.load(Ordering::Relaxed)
    }

    /// How the stream stands.
    pub fn status(&self) -> Status {
        self.inner.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn connected(&self, now_unix_us: u64, offered_types: Vec<String>) {
        self.update(|status| {
            status.connected = true;
            status.since_unix_us = now_unix_us;
            status.offered_types = offered_types;
            status.last_error.clear();
        });
    }

    pub(super) fn terminated(&self, reason: Termination, error: &dyn fmt::Display, now_unix_us: u64) {
        self.inner.terminations[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.update(|status| {
            if std::mem::take(&mut status.connected) {
                status.since_unix_us = now_unix_us;
            }
            status.last_error = error.to_string();
        });
    }

    pub(super) fn message(&self, type_url: &str, bytes: u64) {
        let index = index(type_url);
        self.inner.messages[index].fetch_add(1, Ordering::Relaxed);
        self.inner.bytes[index].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn rejections(&self, rejected: &[crate::xds::decode::Rejected]) {
        /// A status page shows examples, not a million lines.
        const SHOWN: usize = 100;
        self.inner.rejected.fetch_add(rejected.len() as u64, Ordering::Relaxed);
        let texts = rejected.iter().take(SHOWN).map(|one| format!("{}: {}", one.name, one.reason)).collect();
        self.update(|status| status.last_rejections = texts);
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.inner.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn index(type_url: &str) -> usize {
    match type_url {
        TYPE_ADDRESS => 0,
        TYPE_NETWORK_POLICY => 2,
        TYPE_TRUST_BUNDLE => 3,
        _ => 1,
    }
}
