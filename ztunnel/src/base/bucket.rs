//! A token bucket as one number: the time at which it is full again.
//!
//! Pure: the time is an argument, a [`Duration`] since any fixed moment. Nothing runs while nobody asks.

use std::time::Duration;

/// How fast a bucket fills.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Time in which one token comes.
    pub interval: Duration,
    /// Tokens in a full bucket; 0 counts as 1.
    pub burst: u32,
}

impl Rate {
    /// So many tokens a second; 0 counts as 1.
    pub fn per_second(tokens: u32, burst: u32) -> Self {
        Self { interval: Duration::from_secs(1) / tokens.max(1), burst }
    }

    /// How far in the future an empty bucket's moment lies before the last token is taken.
    fn slack(self) -> Duration {
        self.interval.saturating_mul(self.burst.max(1) - 1)
    }
}

/// A bucket, full at first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    full_at: Duration,
}

impl Bucket {
    /// How long it takes until there is a token; zero if there is one.
    pub fn wait(&self, rate: Rate, now: Duration) -> Duration {
        self.full_at.saturating_sub(now).saturating_sub(rate.slack())
    }

    /// Takes a token, whether or not there is one.
    pub fn take(&mut self, rate: Rate, now: Duration) {
        self.full_at = self.full_at.max(now).saturating_add(rate.interval);
    }

    /// Whether nothing is remembered.
    pub fn is_full(&self, now: Duration) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::{Bucket, Rate};
    use std::time::Duration;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let rate = Rate::per_second(10, 5);
        let mut bucket = Bucket::default();
        let mut now = Duration::from_secs(100);
        for _ in 0..5 {
            assert!(bucket.wait(rate, now).is_zero());
            bucket.take(rate, now);
        }
        assert_eq!(bucket.wait(rate, now), Duration::from_millis(100));
        now += Duration::from_millis(100);
        assert!(bucket.wait(rate, now).is_zero());
        bucket.take(rate, now);
        assert!(!bucket.is_full(now));
        assert!(bucket.is_full(now + Duration::from_millis(500)));
        let odd = Rate::per_second(0, 0);
        assert!(Bucket::default().wait(odd, now).is_zero(), "never a bucket without a token");
    }
}
