//! What happened lately, counted in two halves of a window: so it is known to half a window with a few numbers.
//! Nothing here reads a clock: the time is an argument, and what is too old goes when it is next asked.

use std::time::{Duration, Instant};

/// Counts of two kinds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recent {
    since: Instant,
    /// This half, and the one before.
    halves: [[u32; 2]; 2],
}

impl Recent {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, halves: [[0; 2]; 2] }
    }

    fn turn(&mut self, window: Duration, now: Instant) {
        let half = (window / 2).max(Duration::from_nanos(1));
        let over = now.saturating_duration_since(self.since).as_nanos() / half.as_nanos();
        match over {
            0 => return,
            1 => self.halves = [[0; 2], self.halves[0]],
            _ => self.halves = [[0; 2]; 2],
        }
        self.since = now;
    }

    /// One more of a kind, 0 or 1.
    pub(super) fn add(&mut self, kind: usize, window: Duration, now: Instant) {
        self.turn(window, now);
        if let Some(count) = self.halves[0].get_mut(kind) {
            *count = count.saturating_add(1);
        }
    }

    /// How many there were of each within the window, or within the half of it that is over.
    pub(super) fn counts(&mut self, window: Duration, now: Instant) -> [u32; 2] {
        self.turn(window, now);
        let [[a, b], [c, d]] = self.halves;
        [a.saturating_add(c), b.saturating_add(d)]
    }

    /// Nothing happened lately.
    pub(super) fn is_empty(&self, window: Duration, now: Instant) -> bool {
        self.halves == [[0; 2]; 2] || now.saturating_duration_since(self.since) >= window
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Recent;

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        let (began, window) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut recent = Recent::new(began);
        (0..3).for_each(|_| recent.add(0, window, at(1)));
        recent.add(1, window, at(4));
        assert_eq!(recent.counts(window, at(4)), [3, 1]);
        recent.add(1, window, at(6));
        assert_eq!(recent.counts(window, at(10)), [3, 2]);
        assert_eq!(recent.counts(window, at(11)), [0, 1], "the half before is over");
        assert!(!recent.is_empty(window, at(12)) && recent.is_empty(window, at(21)));
        assert_eq!(recent.counts(window, at(30)), [0, 0]);
    }
}
