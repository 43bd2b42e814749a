//! Limits that all workers of a node share: how often a rule may be asked.
//!
//! One lock, held for a few instructions and only by requests whose route sets a limit. What is idle is forgotten; a flood
//! of identities shares one count, so that the table stays small. Limits of what is under way are in `lb`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::bucket::{Bucket, Rate};

/// Counts kept: some 200 bytes each.
const MOST: usize = 16_384;

/// Name of a limit, and whose requests are counted; empty: everybody's.
type Whose = (Arc<str>, Arc<str>);

/// See the module's header.
#[derive(Debug)]
pub struct Limits {
    began: Instant,
    buckets: Mutex<HashMap<Whose, Bucket>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { began: Instant::now(), buckets: Mutex::default() }
    }
}

impl Limits {
    /// Takes one of `requests` in each `interval`, of which `burst` may come at once.
    ///
    /// # Errors
    /// How long to wait.
    pub fn take(
        &self,
        name: &Arc<str>,
        whose: &str,
        requests: u32,
        interval: Duration,
        burst: u32,
    ) -> Result<(), Duration> {
        let rate = Rate { interval: interval / requests.max(1), burst };
        let now = self.began.elapsed();
        let mut buckets = lock(&self.buckets);
        if buckets.len() >= MOST {
            buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        let whose = if buckets.len() >= MOST { "" } else { whose };
        let bucket = buckets.entry((name.clone(), whose.into())).or_default();
        let wait = bucket.wait(rate, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        bucket.take(rate, now);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_count_and_all_workers_share_it() {
        let limits = Limits::default();
        let name: Arc<str> = "shop/slow".into();
        let take = |whose: &str| limits.take(&name, whose, 1, Duration::from_secs(3600), 3).is_ok();
        assert_eq!((0..10).filter(|_| take("a")).count(), 3);
        assert!(take("b"));
        let wait = limits.take(&name, "a", 1, Duration::from_secs(3600), 3).unwrap_err();
        assert!(wait > Duration::from_secs(3500) && wait <= Duration::from_secs(3600), "{wait:?}");
    }
}
