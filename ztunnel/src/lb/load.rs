//! How busy endpoints are: requests under way, and how long answers take. Pure; the times are arguments.
//!
//! The estimate of an endpoint rises at once with a slow answer and falls slowly with fast ones (peak-sensitive, decay
//! [`DECAY`]); while it gets no requests it falls towards nothing, so that it is tried again. One that was never used counts
//! as [`UNKNOWN`] from the moment in which it is first looked at. The table is bounded: quiet entries make room.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Time in which an old answer loses two thirds of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// What an endpoint is believed to need that was never asked.
const UNKNOWN: Duration = Duration::from_millis(30);

/// What an answer counts as at least that asked for fewer requests (429): nobody else answers faster than who refuses.
const REFUSED: Duration = Duration::from_secs(5);

/// What such an answer counts as at most, whatever its Retry-After says.
const REFUSED_MOST: Duration = Duration::from_secs(300);

/// Entries of one destination: some 1 MB.
const MOST: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Load {
    under_way: u32,
    /// Seconds, as of `at`.
    estimate: f64,
    at: Instant,
}

impl Load {
    fn new(now: Instant) -> Self {
        Self { under_way: 0, estimate: UNKNOWN.as_secs_f64(), at: now }
    }

    fn weight(&self, now: Instant) -> f64 {
        (-now.saturating_duration_since(self.at).as_secs_f64() / DECAY.as_secs_f64()).exp()
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
        let old = load.estimate;
        load.estimate = if time > old { time } else { old * weight + time * (1.0 - weight) };
        load.at = now;
    }

    /// Requests under way.
    pub(super) fn under_way(&self, endpoint: SocketAddr) -> u32 {
        self.entries.get(&endpoint).map_or(0, |load| load.under_way)
    }

    /// What one more request would wait for: estimate × requests under way with it.
    pub(super) fn cost(&mut self, endpoint: SocketAddr, now: Instant) -> f64 {
        let load = self.entry(endpoint, now);
        load.estimate * load.weight(now) * f64::from(load.under_way + 1)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use super::{Loads, MOST, refused};

    const A: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 80);
    const B: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), 80);

    #[test]
    fn a_slow_answer_counts_at_once_and_is_forgotten_slowly() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        let at = |seconds| now + Duration::from_secs(seconds);
        let ms = |loads: &mut Loads, at| (loads.cost(A, at) * 1e3).round();
        assert_eq!(ms(&mut loads, now), 30.0, "never asked");
        loads.took(A, Duration::from_millis(200), at(0));
        assert_eq!(ms(&mut loads, at(0)), 200.0, "a peak counts whole");
        loads.took(A, Duration::from_millis(10), at(0));
        assert_eq!(ms(&mut loads, at(0)), 200.0, "one fast answer in the same moment says little");
        loads.took(A, Duration::from_millis(10), at(10));
        assert_eq!(ms(&mut loads, at(10)), 80.0, "10 s later it says much");
        assert_eq!(ms(&mut loads, at(100)), 0.0, "who is not asked is tried again");
    }

    #[test]
    fn requests_under_way_multiply_the_cost() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        loads.begin(A, now);
        loads.begin(A, now);
        assert_eq!((loads.under_way(A), loads.under_way(B)), (2, 0));
        assert!((loads.cost(A, now) / loads.cost(B, now) - 3.0).abs() < 1e-9);
        loads.end(A);
        loads.end(A);
        loads.end(A);
        assert_eq!(loads.under_way(A), 0);
        assert_eq!(refused(None).as_secs(), 5);
        assert_eq!(refused(Some(Duration::from_secs(60))).as_secs(), 60);
        assert_eq!(refused(Some(Duration::from_secs(6000))).as_secs(), 300);
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        for number in 0..(MOST as u32) * 2 {
            loads.cost(SocketAddr::from((number.to_be_bytes(), 80)), now);
        }
        assert!(loads.entries.len() <= MOST);
    }
}
