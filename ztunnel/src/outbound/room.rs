//! Room for a request where its traffic policy limits connections, waiting requests and retries.
//!
//! A request takes a connection that waits, or opens one if the policy lets it; else it waits for either. Connections that
//! wait for requests elsewhere, at another endpoint or on another worker, make room for it. Every wait is bounded.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::http::client::Conn;
use crate::http::pool::Key;
use crate::http::retry::most;
use crate::lb::{Held, Kind, Live};
use crate::outbound::breaker::Toward;
use crate::outbound::forward::Job;
use crate::outcome::{Code, Outcome};
use crate::state::RetryBudget;

/// How long a request waits for a connection where no more may be opened (`maxConnections`): a client's usual patience.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Before such a request looks again unasked: a connection may end without anybody being told.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A connection that waited, or room for a new one, with what is counted until it is there.
pub(super) enum Room {
    Waited(Conn),
    New { held: Option<Held>, pending: Option<Held> },
}

impl Job<'_> {
    /// A connection that waits, or leave to open one; waits for either where the policy's limit is reached.
    pub(super) async fn room(&self, key: &Key, may_reuse: bool) -> Result<Room, Outcome> {
        let connections = &self.client.means.connections;
        let waiting = || if may_reuse { connections.take(key) } else { None };
        if let Some(conn) = waiting() {
            return Ok(Room::Waited(conn));
        }
        let Some(toward) = self.to.toward.as_ref().filter(|toward| toward.settings().is_some()) else {
            return Ok(Room::New { held: None, pending: None });
        };
        let live = toward.live();
        let pending = toward.take(&live, Kind::Pending)?;
        let give_up = Instant::now() + LONGEST_WAIT;
        let mut counted = false;
        loop {
            // Listened first, looked second: nothing that is freed can slip between.
            let mut freed = pin!(live.freed.notified());
            freed.as_mut().enable();
            if let Some(conn) = waiting() {
                return Ok(Room::Waited(conn));
            }
            let most = toward.settings().and_then(|settings| settings.max_connections);
            if let Some(held) = live.take(Kind::Connections, most) {
                return Ok(Room::New { held: Some(held), pending: Some(pending) });
            }
            if !std::mem::replace(&mut counted, true) {
                toward.count_overflow(Kind::Connections);
            }
            live.wanted.notify_waiters();
            let look = Instant::now() + LOOK_AGAIN;
            if timeout_at(look.min(give_up), freed).await.is_err() && Instant::now() >= give_up {
                return Err(toward.overflow(Kind::Connections));
            }
        }
    }
}

/// A retry, within the policy's `retryBudget` or `maxRetries`, or within the budget that holds without them.
pub(super) fn retry(live: &Arc<Live>, toward: Option<&Rc<Toward>>) -> Option<Held> {
    let settings = toward.and_then(|toward| toward.settings());
    let budget = match settings {
        Some(settings) if settings.retry_budget.is_none() && settings.max_retries.is_some() => {
            return toward?.take(live, Kind::Retries).ok();
        }
        settings => settings.and_then(|settings| settings.retry_budget).unwrap_or_default(),
    };
    let held = within(&budget, live, std::time::Instant::now());
    if let (None, Some(toward)) = (&held, toward) {
        toward.count_overflow(Kind::Retries);
    }
    held
}

fn within(budget: &RetryBudget, live: &Arc<Live>, now: std::time::Instant) -> Option<Held> {
    let most = |requests| most(requests, budget.share, budget.least);
    match budget.interval {
        None => live.take(Kind::Retries, Some(u32::try_from(most(live.count(Kind::Requests))).unwrap_or(u32::MAX))),
        Some(interval) => live.retries(interval, now, most).then(|| live.take(Kind::Retries, None)).flatten(),
    }
}

/// Completes when a connection waits for a request while another one may not be opened because of it.
pub(super) async fn squeezed(live: Option<Arc<Live>>, waits: &Cell<bool>) -> Outcome {
    let Some(live) = live else { return std::future::pending().await };
    loop {
        live.wanted.notified().await;
        if waits.get() {
            return Outcome::new(Code::Ok, "another one is needed more");
        }
    }
}
