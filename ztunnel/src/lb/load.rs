//! How busy endpoints are: requests under way, and how long answers take. Pure; the times are arguments.
//!
//! The estimate of an endpoint rises at once with a slow answer and falls slowly with fast ones (peak-sensitive, decay
//! [`MEMORY`]). One that has got no request for so long is not held to what it did before: it is tried again, by one request,
//! and judged by that. One that never answered is taken to be as fast as the one that it is compared with, so that a new
//! replica has its share at once, whether the others need 1 ms or 1 s; but no faster than what its first request has waited.
//! The table is bounded: quiet entries make room.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Time in which an old answer loses two thirds of its weight, and after which, without another one, it has none.
const MEMORY: Duration = Duration::from_secs(10);

/// What an answer counts as at least that asked for fewer requests (429): nobody else answers faster than who refuses.
const REFUSED: Duration = Duration::from_secs(5);

/// What such an answer counts as at most, whatever its Retry-After says.
const REFUSED_MOST: Duration = Duration::from_secs(300);

/// Entries of one destination: some 1 MB.
const MOST: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Load {
    under_way: u32,
    /// Seconds, as of `at`. None: it never answered.
    estimate: Option<f64>,
    /// The last answer; before the first one, the first request.
    at: Instant,
}

impl Load {
    fn new(now: Instant) -> Self {
        Self { under_way: 0, estimate: None, at: now }
    }

    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.at)
    }

    fn weight(&self, now: Instant) -> f64 {
        (-self.age(now).as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }

    /// Whether the last answers count. Who asked to be left alone for longer (429) is.
    fn is_remembered(&self, now: Instant) -> bool {
        let asked = self.estimate.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        self.age(now) < asked.unwrap_or_default().max(MEMORY)
    }

    /// What an answer takes, as far as is known.
    fn estimate(&self, now: Instant) -> Option<f64> {
        match self.estimate {
            Some(estimate) if self.is_remembered(now) => Some(estimate * self.weight(now)),
            // Somebody tries it again.
            Some(estimate) if self.under_way > 0 => Some(estimate),
            Some(_) | None => None,
        }
    }

    /// What one more request would wait for where an answer of the other endpoint takes `other`.
    fn cost(&self, other: Option<f64>, now: Instant) -> f64 {
        let waited = if self.estimate.is_none() && self.under_way > 0 { self.age(now).as_secs_f64() } else { 0.0 };
        let unknown = || other.unwrap_or(1.0).max(waited);
        self.estimate(now).unwrap_or_else(unknown) * f64::from(self.under_way + 1)
    }
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Loads {
    entries: HashMap<SocketAddr, Load>,
}

/// How a 429 with or without Retry-After counts.
pub fn refused(retry_after: Option<Duration>) -> Duration {
    retry_after.unwrap_or_default().clamp(REFUSED, REFUSED_MOST)
}

impl Loads {
    fn entry(&mut self, endpoint: SocketAddr, now: Instant) -> &mut Load {
        if self.entries.len() >= MOST && !self.entries.contains_key(&endpoint) {
            self.entries.retain(|_, load| load.under_way > 0);
        }
        self.entries.entry(endpoint).or_insert_with(|| Load::new(now))
    }

    /// A request begins.
    pub(super) fn begin(&mut self, endpoint: SocketAddr, now: Instant) {
        let load = self.entry(endpoint, now);
        if load.estimate.is_none() && load.under_way == 0 {
            load.at = now;
        }
        load.under_way = load.under_way.saturating_add(1);
    }

    /// It is over.
    pub(super) fn end(&mut self, endpoint: SocketAddr) {
        if let Some(load) = self.entries.get_mut(&endpoint) {
            load.under_way = load.under_way.saturating_sub(1);
        }
    }

    /// It took so long until its answer began.
    pub(super) fn took(&mut self, endpoint: SocketAddr, time: Duration, now: Instant) {
        let load = self.entry(endpoint, now);
        let (time, weight) = (time.as_secs_f64(), load.weight(now));
        let recent = load.estimate.filter(|_| load.is_remembered(now));
        load.estimate = Some(match recent {
            Some(old) if time <= old => old * weight + time * (1.0 - weight),
            _ => time,
        });
        load.at = now;
    }

    /// Requests under way.
    pub(super) fn under_way(&self, endpoint: SocketAddr) -> u32 {
        self.entries.get(&endpoint).map_or(0, |load| load.under_way)
    }

    /// Whether one more request would wait less at the second than at the first: estimate × requests under way with it.
    pub(super) fn is_better(&mut self, first: SocketAddr, second: SocketAddr, now: Instant) -> bool {
        let (first, second) = (*self.entry(first, now), *self.entry(second, now));
        second.cost(first.estimate(now), now) < first.cost(second.estimate(now), now)
    }
}

#[cfg(test)]
mod tests;
