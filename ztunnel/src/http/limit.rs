//! Limits that all workers of a node share: how often a rule may be asked, and how many requests a pod may have under way to
//! a Service.
//!
//! One lock for each kind, held for a few instructions and only by requests whose route or policy sets a limit. What is
//! idle is forgotten; a flood of identities shares one count, so that the table stays small.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::bucket::{Bucket, Rate};

/// Counts kept: some 200 bytes each.
const MOST: usize = 16_384;

/// Name of a limit, and whose requests are counted; empty: everybody's.
type Whose = (Arc<str>, Arc<str>);

/// Uid of a pod, host name of a Service, and its port.
type Between = (Arc<str>, Arc<str>, u16);

/// See the module's header.
#[derive(Debug)]
pub struct Limits {
    began: Instant,
    buckets: Mutex<HashMap<Whose, Bucket>>,
    active: Mutex<HashMap<Between, Arc<AtomicUsize>>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { began: Instant::now(), buckets: Mutex::default(), active: Mutex::default() }
    }
}

/// One request under way, until dropped.
#[derive(Debug)]
pub struct Active(Arc<AtomicUsize>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

    /// One more request of `pod` to a Service's port, if fewer than `most` are under way.
    pub fn request(&self, pod: &Arc<str>, service: &Arc<str>, port: u16, most: u32) -> Option<Active> {
        let mut active = lock(&self.active);
        if active.len() >= MOST {
            active.retain(|_, count| count.load(Ordering::Relaxed) > 0);
        }
        let count = active.entry((pod.clone(), service.clone(), port)).or_default().clone();
        drop(active);
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let taken = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |live| (live < most).then_some(live + 1));
        taken.is_ok().then(|| Active(count))
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

    #[test]
    fn requests_under_way_are_given_back() {
        let limits = Limits::default();
        let (pod, service): (Arc<str>, Arc<str>) = ("uid".into(), "cart".into());
        let held: Vec<_> = (0..5).filter_map(|_| limits.request(&pod, &service, 80, 2)).collect();
        assert_eq!(held.len(), 2);
        assert!(limits.request(&pod, &service, 81, 2).is_some(), "another port");
        drop(held);
        assert!(limits.request(&pod, &service, 80, 1).is_some());
    }
}
