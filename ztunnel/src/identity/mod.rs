//! Certificates of the service accounts whose pods run on this node, and the way to the CA that signs them.
//!
//! A certificate is there before traffic needs it, is renewed at half its life, and is kept while it is valid although
//! the CA is down. The schedule is a table without I/O (`renew`), the CA client one function (`client`), and the task
//! that joins them is in `cache`. A key never leaves this module except inside `tls` types, and is never written to disk.

mod cache;
mod client;
pub mod control;
mod link;
mod renew;
#[cfg(test)]
mod tests;
mod verify;

use std::sync::Arc;
use std::time::Duration;

pub use cache::{CertStatus, Clock, Fetch, Identities, IdentityError};
pub(crate) use client::text as status_text;
pub use client::{Client, FetchError};
pub use control::{Control, ControlError, RootCa, TokenSource, backoff, read_file};
pub use link::{Connected, Link, breaks};

use crate::base::unix_now_us;
use crate::tls::Trust;

/// Identities that come from the CA at `control` and live for `ttl`. They are fetched once [`Identities::run`] runs.
/// `trust`: whom their holders believe.
pub fn identities(control: Control, ttl: Duration, trust: Trust) -> Identities {
    let client = Arc::new(Client::new(control, ttl, trust));
    let fetch: Fetch = Arc::new(move |id| {
        let client = client.clone();
        Box::pin(async move { client.fetch(&id).await.map_err(|error| error.to_string()) })
    });
    Identities::new(fetch, Arc::new(unix_ms))
}

/// The wall clock, milliseconds since the Unix epoch.
fn unix_ms() -> i64 {
    i64::try_from(unix_now_us() / 1000).unwrap_or(i64::MAX)
}
