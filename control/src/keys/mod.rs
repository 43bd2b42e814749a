//! The key sets of token issuers (`jwksUri`): fetched here for the whole mesh, sent to nodes within the RequestAuth.
//!
//! One place fetches, so that an issuer sees one client, nodes need no way out of the cluster, and all of them have the
//! same keys. What was fetched stays in force until something newer was: an issuer that is down costs no token. Who is named
//! by nobody any more is forgotten. Limits: nothing is kept on disk, so control that starts while an issuer is down has no
//! keys of it, and its tokens are refused; [`FIRST`] is how long a start waits.

mod fetch;
mod set;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use set::{key_set, keys_of_issuer};

use crate::base::Stop;
use crate::keys::fetch::{Client, FetchError};
use crate::model::{FetchedKeys, KeySource, KeySources};

/// How long the first publication waits for keys, so that a start of control takes no key from nodes that have it. Above the
/// time that one fetch may take.
pub const FIRST: Duration = Duration::from_secs(6);
/// Most sources of a mesh. Issuers are few; each costs a connection now and then and at most 256 KiB.
pub const MAX_SOURCES: usize = 256;
/// Fetches at a time: some slow issuers hold nobody else up.
const AT_A_TIME: usize = 8;
/// After a failure it is tried again; doubled each time, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// How to fetch.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Between two fetches of a source that answers.
    pub refresh: Duration,
    /// Further roots (PEM) besides the system's.
    pub ca: Option<PathBuf>,
    /// Addresses that are never connected to.
    pub blocked: Vec<IpNet>,
}

/// A source that somebody names.
struct Known {
    next: Instant,
    failures: u32,
    under_way: bool,
}

/// Fetches what is wanted until it is told to stop.
pub async fn run(
    settings: Settings,
    mut wanted: watch::Receiver<Arc<BTreeSet<KeySource>>>,
    publish: watch::Sender<KeySources>,
    mut stop: Stop,
) {
    let client = Arc::new(Client::new(settings.ca, settings.blocked));
    let mut known: BTreeMap<KeySource, Known> = BTreeMap::new();
    let mut fetches: JoinSet<(KeySource, Result<String, FetchError>)> = JoinSet::new();
    loop {
        while fetches.len() < AT_A_TIME
            && let Some((source, state)) = due(&mut known, Instant::now())
        {
            state.under_way = true;
            let (client, source) = (Arc::clone(&client), source.clone());
            fetches.spawn(async move {
                let answer = client.keys(&source).await;
                (source, answer)
            });
        }
        let full = fetches.len() >= AT_A_TIME;
        let next = known.values().filter(|state| !state.under_way).map(|state| state.next).min();
        tokio::select! {
            () = stop.requested() => return,
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                take_over(&mut known, &wanted.borrow_and_update().clone(), &publish);
            }
            Some(done) = fetches.join_next() => {
                // A fetch that panicked is tried no more: it would do so again.
                if let Ok((source, answer)) = done {
                    finish(&mut known, source, answer, settings.refresh, &publish);
                }
            }
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() && !full => {}
        }
    }
}

/// The source whose turn it is.
fn due(known: &mut BTreeMap<KeySource, Known>, now: Instant) -> Option<(&KeySource, &mut Known)> {
    let waiting = known.iter_mut().filter(|(_, state)| !state.under_way && state.next <= now);
    waiting.min_by_key(|(_, state)| state.next)
}

/// What is named now. Who was here before stays when there are too many.
fn take_over(
    known: &mut BTreeMap<KeySource, Known>,
    wanted: &BTreeSet<KeySource>,
    publish: &watch::Sender<KeySources>,
) {
    known.retain(|source, _| wanted.contains(source));
    let mut beyond = Vec::new();
    for source in wanted {
        if known.contains_key(source) {
            continue;
        }
        if known.len() >= MAX_SOURCES {
            beyond.push(source);
            continue;
        }
        known.insert(source.clone(), Known { next: Instant::now(), failures: 0, under_way: false });
    }
    publish.send_if_modified(|keys| {
        let gone: Vec<KeySource> = keys.keys().filter(|source| !wanted.contains(*source)).cloned().collect();
        gone.iter().for_each(|source| drop(keys.remove(source)));
        let failure = format!("more than {MAX_SOURCES} key sets are named in the mesh, and this one is not fetched");
        let new: Vec<&KeySource> = beyond.into_iter().filter(|source| !keys.contains_key(*source)).collect();
        for source in &new {
            keys.insert((*source).clone(), Arc::new(FetchedKeys { jwks: "".into(), failure: failure.clone() }));
        }
        !gone.is_empty() || !new.is_empty()
    });
}

/// Notes what a fetch brought, and when to look again.
fn finish(
    known: &mut BTreeMap<KeySource, Known>,
    source: KeySource,
    answer: Result<String, FetchError>,
    refresh: Duration,
    publish: &watch::Sender<KeySources>,
) {
    // Nobody names it any more.
    let Some(state) = known.get_mut(&source) else { return };
    state.under_way = false;
    let wait = match &answer {
        Ok(_) => {
            if std::mem::take(&mut state.failures) > 0 {
                tracing::info!(%source, "its keys can be fetched again");
            }
            refresh
        }
        Err(error) => {
            if state.failures == 0 {
                tracing::warn!(%source, %error, "its keys cannot be fetched; what was fetched before stays in force");
            }
            state.failures = state.failures.saturating_add(1);
            retry(state.failures).min(refresh)
        }
    };
    state.next = Instant::now() + jittered(wait, rand::random());
    publish.send_if_modified(|keys| {
        let before = keys.get(&source);
        let after = match answer {
            Ok(jwks) => FetchedKeys { jwks: jwks.into(), failure: String::new() },
            Err(error) => FetchedKeys {
                jwks: before.map_or_else(|| "".into(), |before| Arc::clone(&before.jwks)),
                failure: error.to_string(),
            },
        };
        if before.is_some_and(|before| **before == after) {
            return false;
        }
        keys.insert(source, Arc::new(after));
        true
    });
}

/// The wait after so many failures in a row.
fn retry(failures: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1))).min(LONGEST_RETRY)
}

/// A tenth more or less, so that replicas do not ask an issuer in step.
fn jittered(wait: Duration, chance: u64) -> Duration {
    wait.mul_f64(0.9 + 0.2 * (chance as f64 / u64::MAX as f64))
}

#[cfg(test)]
mod tests;
