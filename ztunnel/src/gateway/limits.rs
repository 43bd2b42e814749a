//! What one host outside is asked at a time, by all workers of this gateway: connections that are open, connections that
//! begin, and none for a while after it could not be reached several times in a row.
//!
//! A gateway is shared, so a client that floods one host, or a host that is dead, must not take the gateway from the
//! others; and the host sees one address, which it may block for everybody. So no namespace gets more than three quarters of
//! what a host may be asked: others still reach it. For the same reason a failure that a rule's own settings may explain (its
//! roots, its endpoints) counts for these settings of that namespace alone, and whether the host is left alone is asked and
//! told by those only that go to it as its name says.
//!
//! Pure but for the lock: the time is an argument.
//! Not on the path of bytes: one short lock for each connection that begins or ends. Hosts are told apart by name and port,
//! up to [`MOST_HOSTS`]; beyond, new ones share one place.

use std::collections::HashMap;
use std::fmt;
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
/// How often a full table is searched for hosts that are quiet, or ways that may be tried again.
const SEARCH: Duration = Duration::from_millis(100);
/// Namespaces of a host of which none is forgotten: 100 bytes each.
const FEW_SHARES: usize = 16;
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

impl HostLimits {
    /// What one namespace gets of it: three quarters.
    fn share(self) -> Self {
        let connections = self.connections - self.connections / 4;
        Self { connections, rate: self.rate - self.rate / 4 }
    }
}

/// What a host is asked by all, or by one namespace.
#[derive(Debug, Default)]
struct Used {
    open: usize,
    bucket: Bucket,
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
    all: Used,
    /// By namespace. Those with a connection or a token taken are as many as the limits of the host let in; the others go
    /// each time that there are twice as many.
    shares: HashMap<Arc<str>, Used>,
    streak: Streak,
}

#[derive(Debug, Default)]
struct Table {
    hosts: HashMap<Arc<str>, Host>,
    /// Those that failed the last time, by their print.
    ways: HashMap<u64, Streak>,
    searched: Duration,
    ways_searched: Duration,
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

/// What is left alone when it fails.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The host, for everybody who goes to it as its name says.
    Host,
    /// What a rule of one namespace makes of it, by its print.
    Own(u64),
}

/// One who tries a way. Dropped before it has said what became of it, it lets another one try.
#[derive(Debug)]
pub struct Try<'p> {
    place: &'p Place,
    way: Way,
    /// The others wait for what becomes of it.
    alone: bool,
}

/// One connection of a namespace to a host, until dropped.
#[derive(Debug)]
pub struct Place {
    hosts: Hosts,
    host: Arc<str>,
    namespace: Arc<str>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(host) = self.hosts.lock().hosts.get_mut(&self.host) {
            let share = host.shares.get_mut(&self.namespace);
            [Some(&mut host.all), share]
                .into_iter()
                .flatten()
                .for_each(|asked| asked.open = asked.open.saturating_sub(1));
        }
    }
}

impl Place {
    /// Goes to the host as its name says.
    ///
    /// # Errors
    /// `Overflow`, if it is left alone.
    pub fn by_name(&self) -> Result<Try<'_>, Outcome> {
        self.enter(Way::Host)
    }

    /// Goes to the host in the way that this namespace and `settings` tell apart from others.
    ///
    /// # Errors
    /// `Overflow`, if it is left alone.
    pub fn by_rule(&self, settings: impl Hash) -> Result<Try<'_>, Outcome> {
        self.enter(Way::Own(self.hosts.0.prints.hash_one((&self.host, &self.namespace, settings))))
    }

    fn enter(&self, way: Way) -> Result<Try<'_>, Outcome> {
        let now = self.hosts.0.began.elapsed();
        let mut table = self.hosts.lock();
        let alone = match table.streak(&self.host, way) {
            None => false,
            Some(streak) => {
                let whose = match way {
                    Way::Host => "",
                    Way::Own(_) => " by this rule's own settings",
                };
                streak.refusal(format_args!("{}{whose}", self.host), now).map_or(Ok(()), Err)?;
                streak.tried(now)
            }
        };
        Ok(Try { place: self, way, alone })
    }
}

impl Try<'_> {
    /// What became of it.
    pub fn ended(mut self, reached: bool) {
        self.alone = false;
        let now = self.place.hosts.0.began.elapsed();
        let mut table = self.place.hosts.lock();
        match self.way {
            Way::Own(print) => table.went(print, reached, now),
            Way::Host => {
                if let Some(streak) = table.streak(&self.place.host, Way::Host) {
                    streak.ended(reached, now);
                }
            }
        }
    }
}

impl Drop for Try<'_> {
    fn drop(&mut self) {
        if self.alone
            && let Some(streak) = self.place.hosts.lock().streak(&self.place.host, self.way)
        {
            streak.alone_until = Duration::ZERO;
        }
    }
}

impl Streak {
    /// Why what has `name` is left alone, if it is.
    fn refusal(&self, name: fmt::Arguments<'_>, now: Duration) -> Option<Outcome> {
        (self.alone_until > now).then(|| {
            let text = format!(
                "{name} could not be reached {} times in a row and is left alone for {} s; retry later",
                self.failures,
                (self.alone_until - now).as_secs() + 1
            );
            Outcome::new(Code::Overflow, text)
        })
    }

    /// One tries; after too many failures the others find it alone until that one has its answer. Whether they do.
    fn tried(&mut self, now: Duration) -> bool {
        let alone = self.failures >= FAILURES;
        if alone {
            self.alone_until = now + ALONE;
        }
        alone
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

impl Used {
    fn is_quiet(&self, now: Duration) -> bool {
        self.open == 0 && self.bucket.is_full(now)
    }

    fn rate(limits: HostLimits) -> Option<Rate> {
        (limits.rate > 0).then(|| Rate::per_second(limits.rate, limits.rate.saturating_mul(2)))
    }

    /// Why `whose` gets no more, if so. `limits`: those of the settings, or a share of them.
    fn refusal(&self, whose: fmt::Arguments<'_>, limits: HostLimits, now: Duration) -> Option<Outcome> {
        let text = if self.open >= limits.connections {
            format!(
                "{whose} has {} open connections from this gateway, the most it gets of \
                 TULLE_GATEWAY_HOST_MAX_CONNECTIONS; retry later",
                self.open
            )
        } else if Self::rate(limits).is_some_and(|rate| !self.bucket.wait(rate, now).is_zero()) {
            format!(
                "{whose} is asked for more than {} new connections a second, the most it gets of \
                 TULLE_GATEWAY_HOST_MAX_RATE; retry later",
                limits.rate
            )
        } else {
            return None;
        };
        Some(Outcome::new(Code::Overflow, text))
    }

    fn take(&mut self, limits: HostLimits, now: Duration) {
        self.open += 1;
        if let Some(rate) = Self::rate(limits) {
            self.bucket.take(rate, now);
        }
    }
}

impl Host {
    fn is_quiet(&self, now: Duration) -> bool {
        self.all.is_quiet(now) && self.streak.alone_until <= now && self.streak.failures == 0
    }

    fn enter(&mut self, name: &str, namespace: &Arc<str>, limits: HostLimits, now: Duration) -> Result<(), Outcome> {
        self.all.refusal(format_args!("{name}"), limits, now).map_or(Ok(()), Err)?;
        let many = self.shares.len() >= FEW_SHARES && self.shares.len().is_power_of_two();
        if many && !self.shares.contains_key(namespace) {
            self.shares.retain(|_, share| !share.is_quiet(now));
        }
        let share = self.shares.entry(namespace.clone()).or_default();
        let whose = format_args!("{name} for namespace {namespace}");
        share.refusal(whose, limits.share(), now).map_or(Ok(()), Err)?;
        share.take(limits.share(), now);
        self.all.take(limits, now);
        Ok(())
    }
}

impl Table {
    /// The failures of a way in a row, if there are any of it.
    fn streak(&mut self, host: &str, way: Way) -> Option<&mut Streak> {
        match way {
            Way::Host => self.hosts.get_mut(host).map(|host| &mut host.streak),
            Way::Own(print) => self.ways.get_mut(&print),
        }
    }

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
            if now >= self.ways_searched + SEARCH {
                self.ways_searched = now;
                self.ways.retain(|_, streak| streak.alone_until > now);
            }
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

    /// One more connection of a namespace to `host`, as it was asked for: name or address, and port.
    ///
    /// # Errors
    /// `Overflow`.
    pub fn enter(&self, host: &str, namespace: &str) -> Result<Place, Outcome> {
        let namespace = Arc::from(namespace);
        let now = self.0.began.elapsed();
        let mut table = self.lock();
        let host = table.place(host.into(), now);
        table.hosts.entry(host.clone()).or_default().enter(&host, &namespace, self.0.limits, now)?;
        drop(table);
        Ok(Place { hosts: self.clone(), host, namespace })
    }

    /// Hosts with their open connections and failures in a row, for the dump.
    pub fn list(&self) -> Vec<(Arc<str>, usize, u32)> {
        let table = self.lock();
        let mut all: Vec<_> =
            table.hosts.iter().map(|(name, host)| (name.clone(), host.all.open, host.streak.failures)).collect();
        all.sort();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::{ALONE, FAILURES, FEW_SHARES, Host, HostLimits, Hosts, MOST_HOSTS, MOST_WAYS, Table};
    use std::time::Duration;

    const LIMITS: HostLimits = HostLimits { connections: 2, rate: 0 };

    #[test]
    fn each_host_has_its_own_connections() {
        let hosts = Hosts::new(LIMITS);
        let one = hosts.enter("a:443", "shop").unwrap();
        let _two = hosts.enter("a:443", "shop").unwrap();
        assert!(hosts.enter("a:443", "shop").unwrap_err().detail.contains("TULLE_GATEWAY_HOST_MAX_CONNECTIONS"));
        let _other = hosts.enter("b:443", "evil").unwrap();
        drop(one);
        let _three = hosts.enter("a:443", "shop").unwrap();
        assert_eq!(hosts.list(), [("a:443".into(), 2, 0), ("b:443".into(), 1, 0)]);
    }

    #[test]
    fn the_rate_of_a_host_holds() {
        let limits = HostLimits { connections: 40_000, rate: 10 };
        let mut host = Host::default();
        let mut went = 0;
        for ms in 0..1000 {
            let namespace = if ms % 2 == 0 { "shop" } else { "office" };
            went += u32::from(host.enter("a", &namespace.into(), limits, Duration::from_millis(ms)).is_ok());
        }
        assert!((29..=31).contains(&went), "a burst of 20 and 10 in the second: {went}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_host_is_left_alone_and_then_tried_by_one() {
        let hosts = Hosts::new(HostLimits { connections: 100, rate: 0 });
        let place = hosts.enter("a:443", "shop").unwrap();
        for _ in 0..FAILURES {
            place.by_name().unwrap().ended(false);
        }
        assert!(place.by_name().unwrap_err().detail.contains("left alone"));
        place.by_rule("its own endpoints").unwrap().ended(true);
        tokio::time::advance(ALONE).await;
        let one = place.by_name().unwrap();
        place.by_name().expect_err("one tries");
        drop(one);
        let one = place.by_name().expect("who has not said what became of it lets another one try");
        one.ended(true);
        let _both = [place.by_name().unwrap(), place.by_name().unwrap()];
    }

    #[test]
    fn any_number_of_names_stays_within_the_table() {
        let mut table = Table::default();
        let now = Duration::from_secs(1);
        for n in 0..MOST_HOSTS + 500 {
            let host = table.place(format!("h{n}").into(), now);
            let _ = table.hosts.entry(host).or_default().enter(
                "h",
                &"shop".into(),
                HostLimits { connections: 9, rate: 0 },
                now,
            );
        }
        assert!(table.hosts.len() <= MOST_HOSTS + 1, "{}", table.hosts.len());
        table.hosts.values_mut().for_each(|host| host.all.open = 0);
        let later = now + Duration::from_secs(60);
        assert_eq!(&*table.place("new".into(), later), "new", "those that are quiet make room");
        assert!(table.hosts.len() < 10);
    }

    #[test]
    fn a_way_that_fails_is_left_alone_and_the_host_and_other_ways_are_not() {
        let hosts = Hosts::new(HostLimits { connections: 100, rate: 0 });
        let (evil, shop) = (hosts.enter("a:443", "evil").unwrap(), hosts.enter("a:443", "shop").unwrap());
        for _ in 0..FAILURES {
            evil.by_rule("wrong roots").unwrap().ended(false);
        }
        let refused = evil.by_rule("wrong roots").unwrap_err();
        assert!(refused.detail.contains("this rule's own settings") && refused.detail.contains("left alone"));
        let others = [evil.by_rule("right roots"), shop.by_rule("wrong roots"), shop.by_name(), evil.by_name()];
        others.into_iter().for_each(|other| other.unwrap().ended(true));
        hosts.enter("b:443", "evil").unwrap().by_rule("wrong roots").unwrap().ended(true);
        evil.by_rule("wrong roots").expect_err("what succeeds elsewhere says nothing of it");
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

    #[test]
    fn no_namespace_gets_all_of_a_host() {
        let hosts = Hosts::new(HostLimits { connections: 8, rate: 0 });
        let mut held: Vec<_> = (0..6).map(|_| hosts.enter("a:443", "evil").unwrap()).collect();
        let refused = hosts.enter("a:443", "evil").unwrap_err().detail;
        assert!(refused.contains("namespace evil has 6 open connections"), "{refused}");
        let _shop = [(); 2].map(|()| hosts.enter("a:443", "shop").unwrap());
        assert!(
            hosts.enter("a:443", "shop").unwrap_err().detail.starts_with("a:443 has 8 open"),
            "the host's own limit"
        );
        held.truncate(5);
        held.push(hosts.enter("a:443", "evil").unwrap());

        let (mut host, limits) = (Host::default(), HostLimits { connections: 100, rate: 8 });
        let mut went = |namespace: &str| {
            (0..100).filter(|_| host.enter("a", &namespace.into(), limits, Duration::from_secs(1)).is_ok()).count()
        };
        assert_eq!((went("evil"), went("shop")), (12, 4), "of a burst of 16");
    }

    #[test]
    fn namespaces_that_are_quiet_are_forgotten() {
        let hosts = Hosts::new(LIMITS);
        (0..1000).for_each(|n| drop(hosts.enter("a:443", &format!("n{n}")).unwrap()));
        let (held, most) = (hosts.lock().hosts["a:443"].shares.len(), FEW_SHARES * 2);
        assert!(held <= most, "{held} of at most {most}");
    }
}
