//! What std or tokio could have shipped: the wall clock in one place, the order to stop, an error's causes, a map that is cheap to
//! copy, turns by source address, and what a DNS name is.
//!
//! Everything that decides takes the time as an argument; only the outermost callers read it here. Nothing in this
//! module knows what a mesh is.

mod shared;
pub mod sources;

use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use tokio::sync::watch;

pub use shared::{Change, SharedMap};

/// Now, seconds since the Unix epoch. A clock before 1970 counts as 1970.
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// An error with its causes, as far as they say something new: the outermost is often only "error trying to connect".
pub fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// True for a DNS-1123 subdomain.
pub fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        })
}

/// How long a new stream may stay silent before its first message.
pub const FIRST_MESSAGE: std::time::Duration = std::time::Duration::from_secs(10);

/// Tells every task to finish. Dropping the sender means the same.
pub type StopSender = watch::Sender<bool>;

/// Resolves once the process is to stop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

/// A new pair: send `true` to stop.
pub fn stop() -> (StopSender, Stop) {
    let (sender, receiver) = watch::channel(false);
    (sender, Stop(receiver))
}

impl Stop {
    /// Waits for the order to stop; at once if it was given already.
    pub async fn requested(&mut self) {
        // An error means that the sender is gone, which is an order to stop, too.
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }
}
