//! What one host outside is asked at a time, by all workers of this gateway: connections that are open, connections that
//! begin, and none for a while after it could not be reached several times in a row.
//!
//! A gateway is shared, so a client that floods one host, or a host that is dead, must not take the gateway from the
//! others; and the host sees one address, which it may block for everybody. For the same reason a failure that a rule's own
//! settings may explain (its roots, its endpoints) counts for that [`Way`] alone and not for the host.
//!
//! Pure but for the lock: the time is an argument.
//! Not on the path of bytes: one short lock for each connection that begins or ends. Hosts are told apart by name and port,
//! up to [`MOST_HOSTS`]; beyond, new ones share one place.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::base::bucket::{Bucket, Rate};
use crate::outcome::{Code, Outcome};

/// Hosts that are told apart: some 200 bytes each.
const MOST_HOSTS: usize = 8192;
/// Ways that failed the last time, of all hosts: 40 bytes each. Beyond, one that is not known yet is not counted, and so not left alone.
const MOST_WAYS: usize = 8192;
/// How often a full table is searched for hosts that are quiet.
const SEARCH: Duration = Duration::from_millis(100);
/// Failures in a row after which a host is left alone.
const FAILURES: u32 = 5;
/// For how long. Then one connection is tried, and the others wait for what becomes of it.
const ALONE: Duration = Duration::from_secs(5);

/// What one host may be asked.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// Open connections.
    pub connections: usize,
    /// New connections a second; twice as many at once. 0: any number.
    pub rate: u32,
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Streak {
    failures: u32,
    /// What failed is left alone until then.
    alone_until: Duration,
}

#[derive(Debug, Default)]
struct Host {
    open: usize,
    bucket: Bucket,
    streak: Streak,
}

#[derive(Debug, Default)]
struct Table {
    hosts: HashMap<Arc<str>, Host>,
    /// Those that failed the last time, by their print.
    ways: HashMap<u64, Streak>,
    searched: Duration,
}

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hosts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: HostLimits,
    table: Mutex<Table>,
    prints: RandomState,
    began: Instant,
}

/// How the rule of one namespace has a host reached, as far as that is the rule's own choice.
#[derive(Debug)]
pub struct Way<'p> {
    place: &'p Place,
    print: u64,
}

/// One connection to a host, until dropped.
#[derive(Debug)]
pub struct Place {
    hosts: Hosts,
    host: Arc<str>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(host) = self.hosts.lock().hosts.get_mut(&self.host) {
            host.open = host.open.saturating_sub(1);
        }
    }
}

impl Place {
    /// What became of reaching the host.
    pub fn reached(&self, reached: bool) {
        let now = self.hosts.0.began.elapsed();
        if let Some(host) = self.hosts.lock().hosts.get_mut(&self.host) {
            host.streak.ended(reached, now);
        }
    }

    /// The way to the host that `namespace` and `settings` tell apart from others.
    pub fn way(&self, namespace: &str, settings: impl Hash) -> Way<'_> {
        Way { place: self, print: self.hosts.0.prints.hash_one((&self.host, namespace, settings)) }
    }
}

impl Way<'_> {
    /// Whether it may be tried now.
    ///
    /// # Errors
    /// `Overflow`.
    pub fn enter(&self) -> Result<(), Outcome> {
        let now = self.place.hosts.0.began.elapsed();
        let mut table = self.place.hosts.lock();
        let Some(streak) = table.ways.get_mut(&self.print) else { return Ok(()) };
        streak.refusal(&format!("{} by this rule's own settings", self.place.host), now).map_or(Ok(()), Err)?;
        streak.tried(now);
        Ok(())
    }

    /// What became of it.
    pub fn reached(&self, reached: bool) {
        let now = self.place.hosts.0.began.elapsed();
        self.place.hosts.lock().went(self.print, reached, now);
    }
}

impl Streak {
    /// Why what has `name` is left alone, if it is.
    fn refusal(&self, name: &str, now: Duration) -> Option<Outcome> {
        (self.alone_until > now).then(|| {
            let text = format!(
                "{name} could not be reached {} times in a row and is left alone for {} s; retry later",
                self.failures,
                (self.alone_until - now).as_secs() + 1
            );
            Outcome::new(Code::Overflow, text)
        })
    }

    /// One tries; after too many failures the others find it alone until that one has its answer.
    fn tried(&mut self, now: Duration) {
        if self.failures >= FAILURES {
            self.alone_until = now + ALONE;
        }
    }

    fn ended(&mut self, reached: bool, now: Duration) {
        if reached {
            *self = Self::default();
            return;
        }
        self.failures = self.failures.saturating_add(1);
        self.tried(now);
    }
}

impl Host {
    fn is_quiet(&self, now: Duration) -> bool {
        self.open == 0 && self.bucket.is_full(now) && self.streak.alone_until <= now && self.streak.failures == 0
    }

    fn enter(&mut self, name: &str, limits: HostLimits, now: Duration) -> Result<(), Outcome> {
        self.streak.refusal(name, now).map_or(Ok(()), Err)?;
        if self.open >= limits.connections {
            let text = format!(
                "{name} has {} open connections from this gateway, the limit (TULLE_GATEWAY_HOST_MAX_CONNECTIONS); retry \
                 later",
                self.open
            );
            return Err(Outcome::new(Code::Overflow, text));
        }
        if limits.rate > 0 {
            let rate = Rate::per_second(limits.rate, limits.rate.saturating_mul(2));
            if !self.bucket.wait(rate, now).is_zero() {
                let text = format!(
                    "{name} is asked for more than {} new connections a second, the limit \
                     (TULLE_GATEWAY_HOST_MAX_RATE); retry later",
                    limits.rate
                );
                return Err(Outcome::new(Code::Overflow, text));
            }
            self.bucket.take(rate, now);
        }
        self.streak.tried(now);
        self.open += 1;
        Ok(())
    }
}

impl Table {
    /// Where `host` is counted.
    fn place(&mut self, host: Arc<str>, now: Duration) -> Arc<str> {
        if self.hosts.len() < MOST_HOSTS || self.hosts.contains_key(&host) {
            return host;
        }
        if now >= self.searched + SEARCH {
            self.searched = now;
            self.hosts.retain(|_, host| !host.is_quiet(now));
        }
        if self.hosts.len() < MOST_HOSTS { host } else { "other hosts".into() }
    }

    /// What became of a way.
    fn went(&mut self, print: u64, reached: bool, now: Duration) {
        if reached {
            self.ways.remove(&print);
            return;
        }
        if self.ways.len() >= MOST_WAYS && !self.ways.contains_key(&print) {
            self.ways.retain(|_, streak| streak.alone_until > now);
            if self.ways.len() >= MOST_WAYS {
                return;
            }
        }
        self.ways.entry(print).or_default().ended(false, now);
    }
}

impl Hosts {
    /// No connections yet.
    pub fn new(limits: HostLimits) -> Self {
        Self(Arc::new(Inner { limits, table: Mutex::default(), prints: RandomState::new(), began: Instant::now() }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more connection to `host`, as it was asked for: name or address, and port.
    ///
    /// # Errors
    /// `Overflow`.
    pub fn enter(&self, host: &str) -> Result<Place, Outcome> {
        let now = self.0.began.elapsed();
        let mut table = self.lock();
        let host = table.place(host.into(), now);
        table.hosts.entry(host.clone()).or_default().enter(&host, self.0.limits, now)?;
        drop(table);
        Ok(Place { hosts: self.clone(), host })
    }

    /// Hosts with their open connections and failures in a row, for the dump.
    pub fn list(&self) -> Vec<(Arc<str>, usize, u32)> {
        let table = self.lock();
        let mut all: Vec<_> =
            table.hosts.iter().map(|(name, host)| (name.clone(), host.open, host.streak.failures)).collect();
        all.sort();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::{ALONE, FAILURES, Host, HostLimits, Hosts, MOST_HOSTS, MOST_WAYS, Table};
    use std::time::Duration;

    const LIMITS: HostLimits = HostLimits { connections: 2, rate: 0 };

    #[test]
    fn each_host_has_its_own_connections() {
        let hosts = Hosts::new(LIMITS);
        let one = hosts.enter("a:443").unwrap();
        let _two = hosts.enter("a:443").unwrap();
        assert!(hosts.enter("a:443").unwrap_err().detail.contains("TULLE_GATEWAY_HOST_MAX_CONNECTIONS"));
        let _other = hosts.enter("b:443").unwrap();
        drop(one);
        let _three = hosts.enter("a:443").unwrap();
        assert_eq!(hosts.list(), [("a:443".into(), 2, 0), ("b:443".into(), 1, 0)]);
    }

    #[test]
    fn the_rate_of_a_host_holds() {
        let limits = HostLimits { connections: usize::MAX, rate: 10 };
        let mut host = Host::default();
        let mut went = 0;
        for ms in 0..1000 {
            went += u32::from(host.enter("a", limits, Duration::from_millis(ms)).is_ok());
        }
        assert!((29..=31).contains(&went), "a burst of 20 and 10 in the second: {went}");
    }

    #[test]
    fn a_dead_host_is_left_alone_and_then_tried_by_one() {
        let mut host = Host::default();
        let mut now = Duration::from_secs(1);
        for _ in 0..FAILURES {
            host.enter("a", HostLimits { connections: 100, rate: 0 }, now).unwrap();
            host.streak.ended(false, now);
        }
        assert!(host.enter("a", LIMITS, now).unwrap_err().detail.contains("left alone"));
        host.open = 0;
        now += ALONE;
        host.enter("a", LIMITS, now).unwrap();
        assert!(host.enter("a", LIMITS, now).is_err(), "one tries");
        host.streak.ended(true, now);
        assert!(host.enter("a", LIMITS, now).is_ok());
    }

    #[test]
    fn any_number_of_names_stays_within_the_table() {
        let mut table = Table::default();
        let now = Duration::from_secs(1);
        for n in 0..MOST_HOSTS + 500 {
            let host = table.place(format!("h{n}").into(), now);
            let _ = table.hosts.entry(host).or_default().enter("h", HostLimits { connections: 9, rate: 0 }, now);
        }
        assert!(table.hosts.len() <= MOST_HOSTS + 1, "{}", table.hosts.len());
        table.hosts.values_mut().for_each(|host| host.open = 0);
        let later = now + Duration::from_secs(60);
        assert_eq!(&*table.place("new".into(), later), "new", "those that are quiet make room");
        assert!(table.hosts.len() < 10);
    }

    #[test]
    fn a_way_that_fails_is_left_alone_and_the_host_and_other_ways_are_not() {
        let hosts = Hosts::new(HostLimits { connections: 100, rate: 0 });
        let place = hosts.enter("a:443").unwrap();
        for _ in 0..FAILURES {
            place.way("evil", "wrong roots").enter().unwrap();
            place.way("evil", "wrong roots").reached(false);
        }
        let refused = place.way("evil", "wrong roots").enter().unwrap_err();
        assert!(refused.detail.contains("this rule's own settings") && refused.detail.contains("left alone"));
        for (namespace, settings) in [("evil", "right roots"), ("shop", "wrong roots")] {
            place.way(namespace, settings).enter().unwrap();
        }
        let _other = hosts.enter("a:443").unwrap();
        hosts.enter("b:443").unwrap().way("evil", "wrong roots").enter().unwrap();
        place.way("evil", "wrong roots").reached(true);
        place.way("evil", "wrong roots").enter().unwrap();
    }

    #[test]
    fn any_number_of_ways_stays_within_the_table() {
        let mut table = Table::default();
        let now = Duration::from_secs(1);
        for print in 0..MOST_WAYS as u64 + 500 {
            (0..FAILURES).for_each(|_| table.went(print, false, now));
        }
        assert_eq!(table.ways.len(), MOST_WAYS);
        table.went(u64::MAX, false, now + ALONE);
        assert_eq!(table.ways.len(), 1, "those that are tried again make room");
    }
}
