//! When each certificate is asked for: a table without I/O, clock or chance of its own.
//!
//! The rules are the peer's: renewal at half life, spread so that a node's certificates do not fall due together; the old
//! certificate is kept while it is valid; failures back off, and a waiter during back-off gets the cached error at once
//! instead of a queue. Someone who waits comes before prefetching. Limits: at most [`MAX_IN_FLIGHT`] requests at
//! a time and [`MAX_ENTRIES`] identities. Times are milliseconds since the Unix epoch.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tulle_certs::SpiffeId;

use crate::identity::backoff;

/// The peer's number: enough to fill a node quickly, few enough that a cluster that restarts does not crush its CA.
pub(super) const MAX_IN_FLIGHT: usize = 8;
/// Identities on one node: one a service account with a pod, of at most a few hundred pods.
pub(super) const MAX_ENTRIES: usize = 4096;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// A certificate that is this close to its end is not handed out: its handshake might finish too late.
const MARGIN_MS: i64 = 1000;
/// Over which time the certificates of a node are asked for when the CA's roots or intermediate change.
const TRUST_SPREAD_MS: f64 = 5_000.0;
/// How often, and how much later, a certificate is asked for again that still has other roots than control announced: a
/// replica of the CA may be behind. More would only load the CA; half-life comes anyway.
const TRUST_RETRIES: u32 = 3;
const TRUST_RETRY_MS: i64 = 30_000;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Priority {
    /// Nobody yet.
    Background,
    /// A connection waits.
    RealTime,
}

/// The validity of a certificate in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) not_before_ms: i64,
    pub(super) not_after_ms: i64,
    /// Which roots it came with and who signed it; see [`origin`].
    pub(super) origin: u64,
}

/// A number for a set of roots and the intermediate that signs, by their fingerprints. Only compared within a process.
pub(super) fn origin<'a>(roots: impl IntoIterator<Item = &'a str>, issuer: &str) -> u64 {
    let roots: BTreeSet<&str> = roots.into_iter().collect();
    let mut hasher = DefaultHasher::new();
    (roots, issuer).hash(&mut hasher);
    hasher.finish()
}

/// What is known about one identity.
#[derive(Clone, Debug)]
struct Entry {
    /// A local pod has it. Others were asked for once, and are forgotten with their certificate.
    wanted: bool,
    held: Option<Validity>,
    priority: Priority,
    in_flight: bool,
    /// When to ask next.
    due_ms: i64,
    /// In a row.
    failures: u32,
    error: Option<String>,
    /// Answers in a row with another origin than announced.
    strangers: u32,
}

/// What a table says about an identity, for status pages and waiters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// There is a valid certificate.
    Available,
    /// The first request has not been answered.
    Initializing,
    /// The last request failed and there is no valid certificate.
    Unavailable {
        /// What went wrong.
        error: String,
        /// When it is asked again.
        retry_ms: i64,
    },
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: BTreeMap<SpiffeId, Entry>,
    /// What control says that the CA gives now.
    announced: Option<u64>,
}

impl Table {
    /// The identities of the local pods: new ones are due now, others are forgotten. Gives those.
    pub(super) fn want(&mut self, wanted: &BTreeSet<SpiffeId>, now_ms: i64) -> Vec<SpiffeId> {
        let gone: Vec<_> = self.entries.keys().filter(|id| !wanted.contains(*id)).cloned().collect();
        for id in &gone {
            self.entries.remove(id);
        }
        for id in wanted.iter().take(MAX_ENTRIES) {
            self.entries.entry(id.clone()).or_insert_with(|| Entry::new(now_ms)).wanted = true;
        }
        gone
    }

    /// Somebody waits for this identity. `false`: the table is full.
    pub(super) fn ask(&mut self, id: &SpiffeId, now_ms: i64) -> bool {
        if !self.entries.contains_key(id) && self.entries.len() >= MAX_ENTRIES {
            return false;
        }
        self.entries.entry(id.clone()).or_insert_with(|| Entry::new(now_ms)).priority = Priority::RealTime;
        true
    }

    /// Control says what the CA gives now: certificates of another origin are due soon, spread by `chance` (uniform in
    /// 0..1 at each call). Gives their number.
    pub(super) fn announce(&mut self, origin: u64, now_ms: i64, mut chance: impl FnMut() -> f64) -> u32 {
        self.announced = Some(origin);
        let mut renewing = 0;
        for entry in self.entries.values_mut() {
            entry.strangers = 0;
            // What is in flight may still be of before; its answer is looked at when it comes.
            if entry.held.is_some_and(|held| held.origin != origin) {
                let soon = now_ms.saturating_add((TRUST_SPREAD_MS * chance().clamp(0.0, 1.0)) as i64);
                entry.due_ms = entry.due_ms.min(soon);
                renewing += 1;
            }
        }
        renewing
    }

    /// A certificate in force was taken back: it is due now.
    pub(super) fn hurry(&mut self, id: &SpiffeId, now_ms: i64) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.due_ms = entry.due_ms.min(now_ms);
        }
    }

    /// The next request to make, which counts as in flight from now on. `None`: nothing is due, or enough is in flight.
    pub(super) fn start(&mut self, now_ms: i64) -> Option<SpiffeId> {
        if self.entries.values().filter(|entry| entry.in_flight).count() >= MAX_IN_FLIGHT {
            return None;
        }
        let due = self.entries.iter_mut().filter(|(_, entry)| !entry.in_flight && entry.due_ms <= now_ms);
        let (id, entry) = due.min_by_key(|(_, entry)| (std::cmp::Reverse(entry.priority), entry.due_ms))?;
        entry.in_flight = true;
        Some(id.clone())
    }

    /// When something falls due, if nothing else happens before. `None`: never.
    pub(super) fn next_due_ms(&self) -> Option<i64> {
        self.entries.values().filter(|entry| !entry.in_flight).map(|entry| entry.due_ms).min()
    }

    /// A request was answered. `chance` is uniform in 0..1. `false`: nobody wants the certificate any more.
    pub(super) fn finish(&mut self, id: &SpiffeId, result: Result<Validity, String>, now_ms: i64, chance: f64) -> bool {
        let Some(entry) = self.entries.get_mut(id) else { return false };
        entry.in_flight = false;
        match result {
            Ok(validity) => {
                entry.due_ms = renewal_ms(validity, now_ms, chance);
                if self.announced.is_none_or(|announced| announced == validity.origin) {
                    entry.strangers = 0;
                } else if entry.strangers < TRUST_RETRIES {
                    entry.strangers += 1;
                    entry.due_ms = entry.due_ms.min(now_ms.saturating_add(TRUST_RETRY_MS));
                }
                entry.priority = Priority::Background;
                entry.failures = 0;
                entry.error = None;
                entry.held = Some(validity);
            }
            Err(error) => {
                entry.failures = entry.failures.saturating_add(1);
                let wait = backoff(FIRST_RETRY, LAST_RETRY, entry.failures, chance);
                let retry_ms = now_ms.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX));
                // While the old certificate holds there is no hurry, but at its end there is.
                let end_ms = entry.held.filter(|held| held.is_valid(now_ms)).map(|held| held.not_after_ms - MARGIN_MS);
                entry.due_ms = end_ms.filter(|end| *end > now_ms).map_or(retry_ms, |end| retry_ms.min(end));
                entry.error = Some(error);
            }
        }
        true
    }

    /// Drops entries that nobody wants and whose certificate is used up. Gives them.
    pub(super) fn forget_unwanted(&mut self, now_ms: i64) -> Vec<SpiffeId> {
        let done = |entry: &Entry| {
            !entry.wanted && !entry.in_flight && entry.due_ms <= now_ms && entry.priority == Priority::Background
        };
        let gone: Vec<_> = self.entries.iter().filter(|(_, entry)| done(entry)).map(|(id, _)| id.clone()).collect();
        for id in &gone {
            self.entries.remove(id);
        }
        gone
    }

    /// How one identity stands. `None`: it is not in the table.
    pub(super) fn standing(&self, id: &SpiffeId, now_ms: i64) -> Option<Standing> {
        let entry = self.entries.get(id)?;
        Some(match (&entry.held, &entry.error) {
            (Some(held), _) if held.is_valid(now_ms) => Standing::Available,
            (_, Some(error)) => Standing::Unavailable { error: error.clone(), retry_ms: entry.due_ms },
            (_, None) => Standing::Initializing,
        })
    }

    /// The last error, also while an old certificate is still valid.
    pub(super) fn last_error(&self, id: &SpiffeId) -> Option<&str> {
        self.entries.get(id)?.error.as_deref()
    }

    /// Every identity in the table.
    pub(super) fn identities(&self) -> impl Iterator<Item = &SpiffeId> {
        self.entries.keys()
    }
}

impl Entry {
    fn new(now_ms: i64) -> Self {
        Self {
            wanted: false,
            held: None,
            priority: Priority::Background,
            in_flight: false,
            due_ms: now_ms,
            failures: 0,
            error: None,
            strangers: 0,
        }
    }
}

impl Validity {
    /// Whether it can be handed out.
    pub(super) fn is_valid(self, now_ms: i64) -> bool {
        now_ms < self.not_after_ms - MARGIN_MS
    }
}

/// Half life, spread by ±5 % of the life. A CA may date certificates back, so that half of a short life is over already
/// when it arrives: then a quarter of what remains is waited, so that renewal never becomes a loop.
fn renewal_ms(validity: Validity, now_ms: i64, chance: f64) -> i64 {
    let life = validity.not_after_ms.saturating_sub(validity.not_before_ms).max(0);
    let remaining = validity.not_after_ms.saturating_sub(now_ms).max(0);
    let part = 0.45 + 0.1 * chance.clamp(0.0, 1.0);
    let half = validity.not_before_ms.saturating_add((life as f64 * part) as i64);
    // At least a second, also for a certificate that was expired when it came.
    half.max(now_ms.saturating_add((remaining / 4).max(1000)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::new("cluster.local", "shop", name).unwrap()
    }

    fn want(table: &mut Table, names: &[&str], now_ms: i64) -> Vec<SpiffeId> {
        table.want(&names.iter().map(|name| id(name)).collect(), now_ms)
    }

    const LIFE: Validity = Validity { not_before_ms: 0, not_after_ms: 100_000, origin: 1 };

    #[test]
    fn wanted_identities_are_fetched_at_once_and_at_most_eight_at_a_time() {
        let mut table = Table::default();
        let names: Vec<String> = (0..20).map(|i| format!("account-{i:02}")).collect();
        want(&mut table, &names.iter().map(String::as_str).collect::<Vec<_>>(), 0);
        let started: Vec<_> = std::iter::from_fn(|| table.start(0)).collect();
        assert_eq!(started.len(), MAX_IN_FLIGHT);
        assert!(table.finish(&started[0], Ok(LIFE), 10, 0.5));
        assert!(table.start(10).is_some(), "an answer makes room for one more");
        assert!(table.start(10).is_none());
    }

    #[test]
    fn a_waiter_comes_before_prefetching() {
        let mut table = Table::default();
        want(&mut table, &["a", "b", "c"], 0);
        assert!(table.ask(&id("c"), 5));
        assert_eq!(table.start(5), Some(id("c")));
    }

    #[test]
    fn renewal_is_at_half_life_within_five_percent() {
        for (chance, expected) in [(0.0, 45_000), (0.5, 50_000), (1.0, 55_000)] {
            assert_eq!(renewal_ms(LIFE, 0, chance), expected);
        }
        // Dated back: half is over already, so a quarter of the rest is waited.
        assert_eq!(renewal_ms(LIFE, 80_000, 0.5), 85_000);
        // Expired when it came.
        assert_eq!(renewal_ms(LIFE, 200_000, 0.5), 201_000);
        // Nonsense.
        assert_eq!(
            renewal_ms(Validity { not_before_ms: i64::MAX, not_after_ms: i64::MIN, origin: 0 }, 7, 0.5),
            i64::MAX
        );
    }

    #[test]
    fn failures_double_the_wait_up_to_the_cap_and_keep_the_error() {
        let mut table = Table::default();
        want(&mut table, &["a"], 0);
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(table.start(now), Some(id("a")));
            table.finish(&id("a"), Err("no answer".to_owned()), now, 0.5);
            let due = table.next_due_ms().unwrap();
            waits.push(due - now);
            let standing = table.standing(&id("a"), now).unwrap();
            assert_eq!(standing, Standing::Unavailable { error: "no answer".to_owned(), retry_ms: due });
            assert!(table.start(due - 1).is_none(), "nobody hurries a back-off");
            now = due;
        }
        assert_eq!(waits[..4], [500, 1000, 2000, 4000]);
        assert_eq!(waits[11], 150_000);
    }

    #[test]
    fn a_failed_renewal_keeps_the_old_certificate_and_tries_again_before_its_end() {
        let mut table = Table::default();
        want(&mut table, &["a"], 0);
        table.start(0);
        table.finish(&id("a"), Ok(LIFE), 0, 0.5);
        let mut now = table.next_due_ms().unwrap();
        let mut tried_at_the_end = false;
        while now < LIFE.not_after_ms {
            assert_eq!(table.start(now), Some(id("a")));
            table.finish(&id("a"), Err("CA is down".to_owned()), now, 0.5);
            let expected = if LIFE.is_valid(now) { Some(Standing::Available) } else { None };
            assert!(expected.is_none_or(|expected| table.standing(&id("a"), now) == Some(expected)));
            assert_eq!(table.last_error(&id("a")), Some("CA is down"));
            now = table.next_due_ms().unwrap();
            tried_at_the_end |= now == LIFE.not_after_ms - MARGIN_MS;
        }
        assert!(tried_at_the_end, "the last try is not later than needed");
        assert!(matches!(table.standing(&id("a"), now), Some(Standing::Unavailable { .. })));
    }

    #[test]
    fn identities_that_no_pod_has_are_forgotten_also_while_in_flight() {
        let mut table = Table::default();
        want(&mut table, &["a", "b"], 0);
        assert_eq!(table.start(0), Some(id("a")));
        assert_eq!(want(&mut table, &["b"], 1), [id("a")]);
        assert!(!table.finish(&id("a"), Ok(LIFE), 2, 0.5), "its answer is dropped");
        assert_eq!(table.identities().collect::<Vec<_>>(), [&id("b")]);
    }

    #[test]
    fn other_roots_are_fetched_soon_and_only_where_they_differ() {
        let mut table = Table::default();
        want(&mut table, &["a", "b"], 0);
        let new = Validity { origin: 2, not_after_ms: 100_000_000, ..LIFE };
        for (name, validity) in [("a", LIFE), ("b", new)] {
            assert_eq!(table.start(0), Some(id(name)));
            table.finish(&id(name), Ok(validity), 0, 0.5);
        }
        assert_eq!(table.announce(2, 1000, || 0.5), 1);
        assert_eq!(table.next_due_ms(), Some(1000 + 2500));
        assert_eq!(table.start(3500), Some(id("a")));
        table.finish(&id("a"), Ok(new), 3500, 0.5);
        assert!(table.next_due_ms().unwrap() > 40_000_000, "both are of the new origin: half-life is next");
    }

    #[test]
    fn an_answer_with_the_old_roots_is_asked_for_again_three_times_and_not_for_ever() {
        let mut table = Table::default();
        want(&mut table, &["a"], 0);
        let old = Validity { not_before_ms: 0, not_after_ms: 1_000_000_000, origin: 1 };
        table.start(0);
        table.finish(&id("a"), Ok(old), 0, 0.5);
        table.announce(2, 0, || 0.0);
        let mut now = 0;
        for tries in 0..=TRUST_RETRIES {
            assert_eq!(table.start(now), Some(id("a")), "try {tries}");
            table.finish(&id("a"), Ok(old), now, 0.5);
            now = table.next_due_ms().unwrap();
        }
        assert!(now > 400_000_000, "then half-life: {now}");
        // A request that was under way when the announcement came is not taken for an answer to it.
        let mut table = Table::default();
        want(&mut table, &["a"], 0);
        table.start(0);
        assert_eq!(table.announce(2, 0, || 0.0), 0);
        table.finish(&id("a"), Ok(old), 10, 0.5);
        assert_eq!(table.next_due_ms(), Some(10 + TRUST_RETRY_MS));
    }

    #[test]
    fn an_origin_is_a_set_of_roots_and_an_issuer() {
        assert_eq!(origin(["a", "b"], "i"), origin(["b", "a", "a"], "i"));
        assert_ne!(origin(["a", "b"], "i"), origin(["a"], "i"));
        assert_ne!(origin(["a"], "i"), origin(["a"], "j"));
    }

    #[test]
    fn an_identity_asked_for_but_not_wanted_is_not_renewed() {
        let mut table = Table::default();
        table.ask(&id("a"), 0);
        table.start(0);
        table.finish(&id("a"), Ok(LIFE), 0, 0.5);
        assert!(table.forget_unwanted(10).is_empty());
        assert_eq!(table.forget_unwanted(60_000), [id("a")]);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = Table::default();
        for i in 0..MAX_ENTRIES {
            assert!(table.ask(&id(&format!("a{i}")), 0));
        }
        assert!(!table.ask(&id("one-more"), 0));
        assert!(table.ask(&id("a1"), 0));
    }
}
