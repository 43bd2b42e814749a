//! Endpoints that could not be reached lately: a table that a worker keeps from its own experience.
//!
//! An endpoint is avoided for a second after its first failure and twice as long after each further one, so that a dead
//! one costs few attempts and a recovered one is found soon. Nobody is asked and nobody told: an endpoint that only this
//! node cannot reach is avoided by this node only, and a wrong entry costs nothing but the detour. The table is bounded;
//! when it is full the entry that ends first makes room.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// First time of avoidance.
const FIRST: Duration = Duration::from_secs(1);

/// Longest time of avoidance: how late a recovered endpoint is used again at most.
const LONGEST: Duration = Duration::from_secs(16);

/// How long after its end an entry is remembered as a former failure.
const MEMORY: Duration = Duration::from_secs(60);

/// Most entries, some 64 KB. A choice may look at all endpoints only when most of a service fail, so this bounds its work
/// too.
const MOST: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Entry {
    until: Instant,
    pause: Duration,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Failing {
    entries: HashMap<SocketAddr, Entry>,
}

impl Failing {
    /// `endpoint` could not be reached.
    pub fn failed(&mut self, endpoint: SocketAddr, now: Instant) {
        let before = self.entries.get(&endpoint).filter(|entry| now < entry.until + MEMORY).copied();
        let entry = match before {
            // Connections that failed together count once.
            Some(entry) if now < entry.until => entry,
            Some(entry) => {
                let pause = (entry.pause * 2).min(LONGEST);
                Entry { until: now + pause, pause }
            }
            None => Entry { until: now + FIRST, pause: FIRST },
        };
        if self.entries.len() >= MOST && !self.entries.contains_key(&endpoint) {
            self.make_room(now);
        }
        self.entries.insert(endpoint, entry);
    }

    /// `endpoint` was reached.
    pub fn reached(&mut self, endpoint: SocketAddr) {
        if !self.entries.is_empty() {
            self.entries.remove(&endpoint);
        }
    }

    /// Whether `endpoint` is to be avoided.
    pub fn is(&self, endpoint: SocketAddr, now: Instant) -> bool {
        !self.entries.is_empty() && self.entries.get(&endpoint).is_some_and(|entry| now < entry.until)
    }

    /// Endpoints avoided now.
    pub fn count(&self, now: Instant) -> usize {
        self.entries.values().filter(|entry| now < entry.until).count()
    }

    fn make_room(&mut self, now: Instant) {
        self.entries.retain(|_, entry| now < entry.until + MEMORY);
        if self.entries.len() >= MOST
            && let Some(first) = self.entries.iter().min_by_key(|(_, entry)| entry.until).map(|(endpoint, _)| *endpoint)
        {
            self.entries.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use super::{Failing, LONGEST, MEMORY, MOST};

    fn endpoint(number: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 80))
    }

    #[test]
    fn an_endpoint_is_avoided_for_longer_each_time_and_forgiven_when_it_is_reached() {
        let mut failing = Failing::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..6 {
            failing.failed(endpoint(1), now);
            // The same failure seen by several connections.
            failing.failed(endpoint(1), now + Duration::from_millis(1));
            let begin = now;
            while failing.is(endpoint(1), now) {
                now += Duration::from_millis(500);
            }
            pauses.push((now - begin).as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16]);
        failing.reached(endpoint(1));
        failing.failed(endpoint(1), now);
        assert!(!failing.is(endpoint(1), now + Duration::from_secs(1)));
        failing.failed(endpoint(1), now + LONGEST + MEMORY * 2);
        assert!(
            !failing.is(endpoint(1), now + LONGEST + MEMORY * 2 + Duration::from_secs(1)),
            "long ago counts no more"
        );
    }

    #[test]
    fn the_table_is_bounded() {
        let mut failing = Failing::default();
        let now = Instant::now();
        for number in 0..MOST * 2 {
            failing.failed(endpoint(number), now);
        }
        assert_eq!(failing.count(now), MOST);
        assert!(failing.is(endpoint(MOST * 2 - 1), now));
    }
}
