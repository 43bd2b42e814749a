//! How long requests to each service take: every one is counted, so percentiles are those of all requests and not of a sample
//! or of a few buckets.
//!
//! Histograms with two significant digits (hdrhistogram): a percentile is right to 1 %. They cover the last five to ten
//! minutes: two halves, of which the older is forgotten when the newer is full. Memory: an entry has at most 26 KB (values up
//! to an hour), usually 10; [`MAX_SERVICES`] of them at most 14 MB. Time is an argument.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::state::Service;
use crate::telemetry::conn::Direction;

/// One half of the time that is covered.
const HALF: Duration = Duration::from_secs(300);
/// Most services in each direction together. What is beyond is counted in the metrics only.
const MAX_SERVICES: usize = 512;
/// Longest time that is told from longer ones, microseconds: an hour.
const LONGEST_US: u64 = 3_600_000_000;
/// Significant digits of a time.
const DIGITS: u8 = 2;

/// Times of all services. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ServiceTimes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    table: Mutex<HashMap<Key, Entry>>,
}

/// `<namespace>/<hostname>` and who saw it.
type Key = (Arc<str>, Arc<str>, Direction);

#[derive(Debug)]
struct Entry {
    /// Number of the half that `newer` is.
    half: u64,
    newer: Half,
    older: Half,
}

#[derive(Debug)]
struct Half {
    times: Histogram<u32>,
    failed: u64,
}

/// What was seen of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `<namespace>/<hostname>`.
    pub service: String,
    /// Whether its clients' proxy saw it, or its own.
    pub direction: Direction,
    /// Requests that failed by the service's fault.
    pub failed: u64,
    /// Requests by time, microseconds.
    pub times: BTreeMap<u64, u64>,
}

impl Half {
    /// `None`: there is no memory for it.
    fn new() -> Option<Self> {
        Some(Self { times: Histogram::new(DIGITS).ok()?, failed: 0 })
    }

    fn clear(&mut self) {
        self.times.reset();
        self.failed = 0;
    }
}

impl Entry {
    fn new(half: u64) -> Option<Self> {
        Some(Self { half, newer: Half::new()?, older: Half::new()? })
    }

    /// Forgets what is too old in the half with this number.
    fn turn(&mut self, half: u64) {
        match half.saturating_sub(self.half) {
            0 => return,
            1 => std::mem::swap(&mut self.newer, &mut self.older),
            _ => self.older.clear(),
        }
        self.newer.clear();
        self.half = half;
    }

    fn is_empty(&self) -> bool {
        self.newer.times.is_empty() && self.older.times.is_empty()
    }
}

impl ServiceTimes {
    /// Nothing was seen yet.
    pub fn new(now: Instant) -> Self {
        Self(Arc::new(Inner { began: now, table: Mutex::default() }))
    }

    fn half(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.0.began).as_secs() / HALF.as_secs()
    }

    /// Counts a request that took `time` and ended `now`.
    pub fn record(&self, service: &Service, direction: Direction, time: Duration, failed: bool, now: Instant) {
        let half = self.half(now);
        let key = (service.namespace.clone(), service.hostname.clone(), direction);
        let mut table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        if !table.contains_key(&key) {
            if table.len() >= MAX_SERVICES {
                table.retain(|_, entry| {
                    entry.turn(half);
                    !entry.is_empty()
                });
            }
            let Some(entry) = Entry::new(half).filter(|_| table.len() < MAX_SERVICES) else { return };
            table.insert(key.clone(), entry);
        }
        let Some(entry) = table.get_mut(&key) else { return };
        entry.turn(half);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min(LONGEST_US);
        // It grows with the longest time that came.
        let _ = entry.newer.times.record(micros);
        entry.newer.failed += u64::from(failed);
    }

    /// What was seen in the time that is covered.
    pub fn seen(&self, now: Instant) -> Vec<Seen> {
        let half = self.half(now);
        let mut table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::with_capacity(table.len());
        for ((namespace, hostname, direction), entry) in table.iter_mut() {
            entry.turn(half);
            let mut times = BTreeMap::new();
            for value in entry.newer.times.iter_recorded().chain(entry.older.times.iter_recorded()) {
                *times.entry(value.value_iterated_to()).or_insert(0) += u64::from(value.count_at_value());
            }
            if !times.is_empty() {
                let failed = entry.newer.failed + entry.older.failed;
                all.push(Seen { service: format!("{namespace}/{hostname}"), direction: *direction, failed, times });
            }
        }
        all
    }
}

/// Whether a request failed by the fault of the service or of the way to it: by status, or for gRPC by `grpc-status` (those
/// of its codes that are a server's fault).
pub(super) fn is_failure(status: u16, grpc_status: Option<&str>, flag: &str) -> bool {
    let by_grpc = grpc_status.is_some_and(|code| matches!(code, "2" | "4" | "12" | "13" | "14" | "15"));
    status >= 500 || by_grpc || (status == 0 && flag != "DC")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{HALF, MAX_SERVICES, ServiceTimes, is_failure};
    use crate::state::Change;
    use crate::state::Service;
    use crate::state::fixtures::{service, snapshot};
    use crate::telemetry::Direction;

    fn known(name: &str) -> std::sync::Arc<Service> {
        let snapshot = snapshot([Change::Service(service("shop", name, "10.0.0.1").into())]);
        snapshot.services().next().unwrap().clone()
    }

    #[test]
    fn every_request_counts_for_five_to_ten_minutes() {
        let (cart, began) = (known("cart"), Instant::now());
        let times = ServiceTimes::new(began);
        let count = |at: Duration| {
            times.seen(began + at).first().map_or((0, 0), |seen| (seen.times.values().sum::<u64>(), seen.failed))
        };
        let record = |at: Duration, failed: bool| {
            times.record(&cart, Direction::Outbound, Duration::from_millis(7), failed, began + at);
        };
        record(Duration::ZERO, true);
        record(HALF - Duration::from_secs(1), false);
        assert_eq!(count(HALF - Duration::from_secs(1)), (2, 1));
        record(HALF, false);
        assert_eq!(count(HALF), (3, 1));
        assert_eq!(count(HALF * 2), (1, 0), "the first half is over");
        assert_eq!(count(HALF * 3), (0, 0));
        record(HALF * 9, true);
        assert_eq!(count(HALF * 9), (1, 1));
    }

    #[test]
    fn times_are_right_to_one_percent() {
        let (cart, now) = (known("cart"), Instant::now());
        let times = ServiceTimes::new(now);
        for micros in [1, 130, 99_999, 3_600_000_000, 7_200_000_000] {
            times.record(&cart, Direction::Inbound, Duration::from_micros(micros), false, now);
        }
        let seen = times.seen(now);
        let found: Vec<u64> = seen[0].times.keys().copied().collect();
        assert_eq!(found.len(), 4, "what is longer than an hour is an hour: {found:?}");
        for (found, expected) in found.iter().zip([1_f64, 130.0, 99_999.0, 3_600_000_000.0]) {
            assert!((*found as f64 - expected).abs() <= expected / 100.0, "{found} for {expected}");
        }
    }

    #[test]
    fn memory_is_bounded_and_goes_to_whom_is_asked_for() {
        let now = Instant::now();
        let times = ServiceTimes::new(now);
        for index in 0..MAX_SERVICES + 10 {
            let one = known(&format!("s{index}"));
            times.record(&one, Direction::Outbound, Duration::from_millis(1), false, now);
        }
        assert_eq!(times.seen(now).len(), MAX_SERVICES);
        let late = now + HALF * 2;
        times.record(&known("late"), Direction::Outbound, Duration::from_millis(1), false, late);
        let seen = times.seen(late);
        assert_eq!(seen.len(), 1);
        assert!(seen[0].service.starts_with("shop/late."), "{}", seen[0].service);
    }

    #[test]
    fn what_a_service_did_wrong_is_a_failure_and_what_its_client_did_is_none() {
        for (status, grpc, flag, expected) in [
            (200, None, "-", false),
            (404, None, "-", false),
            (429, None, "RL", false),
            (500, None, "-", true),
            (503, None, "UF", true),
            (200, Some("0"), "-", false),
            (200, Some("5"), "-", false),
            (200, Some("14"), "-", true),
            (0, None, "DC", false),
            (0, None, "UC", true),
        ] {
            assert_eq!(is_failure(status, grpc, flag), expected, "{status} {grpc:?} {flag}");
        }
    }
}
