//! Outlier ejection: when an endpoint that fails is left alone, for how long, and how it comes back. Pure, with the time as
//! an argument; one [`Outliers`] holds what one policy makes of one destination.
//!
//! Closed → (failures in a row) → open, for the base time × the number of ejections in a row → half open: exactly one
//! request or connection may try it, and its end closes the breaker or opens it for longer. A timed return would give the
//! endpoint everybody's requests at once. The number of ejections goes down by one for each interval without another.
//!
//! Besides failures in a row, a share of successes may be asked for: what went well and what failed lately is then counted for
//! each endpoint, and with a failure that leaves the share too small it is ejected, too.
//!
//! What a server *answered* counts for every pod of the node. What could not be *delivered* (connect failures, resets, time-
//! outs) counts for the pod that met it: a firewall between one pod and the endpoint says nothing about the others. Unless
//! the policy splits the two, both are added up for a pod. Refusals by policy are counted by nobody.
//!
//! Only endpoints that failed, or whose successes are counted, have an entry, and at most [`MOST`]; the one that has been
//! quiet for longest makes room.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::lb::recent::Recent;
use crate::state::{OutlierDetection, SuccessRate};

/// Entries of one destination: some 100 KB.
const MOST: usize = 1024;

/// An ejection is no longer than this, or than the base time if that is longer: Envoy's `max_ejection_time`.
const LONGEST: Duration = Duration::from_secs(300);

/// What became of a request or connection at an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It answered with this status. gRPC: the status that stands for its own.
    Answer(u16),
    /// It could not be delivered, was reset before an answer, or got none in time. `late`: the last.
    Lost {
        /// No answer in time, which counts as 504; otherwise it counts as 503.
        late: bool,
    },
    /// It took the connection; what it answers is still to come.
    Connected,
    /// It took a connection whose bytes are not read.
    Served,
}

/// Which count was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// 5xx in a row.
    Consecutive5xx,
    /// 502, 503, 504 in a row.
    ConsecutiveGatewayFailure,
    /// Failures to deliver in a row, counted apart.
    ConsecutiveLocalOriginFailure,
    /// Too little went well lately.
    SuccessRate,
    /// It failed again when it was tried.
    Probe,
}

impl Why {
    /// The end of Envoy's name for the counter of such ejections.
    pub fn name(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive_5xx",
            Self::ConsecutiveGatewayFailure => "consecutive_gateway_failure",
            Self::ConsecutiveLocalOriginFailure => "consecutive_local_origin_failure",
            Self::SuccessRate => "success_rate",
            Self::Probe => "probe",
        }
    }
}

/// What a report led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Nothing,
    /// It is left alone for so long.
    Ejected(Why, Duration),
    /// It would be, but too many are already.
    TooMany(Why),
    /// It is used again.
    Back,
}

/// Whether an endpoint may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Yes.
    Closed,
    /// Not before then.
    Open(Instant),
    /// Once, to see. `probed`: somebody is doing so.
    HalfOpen {
        /// Somebody tries it.
        probed: bool,
    },
}

/// Failures in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    all: u32,
    gateway: u32,
}

impl Run {
    fn failed(&mut self, gateway: bool) {
        self.all = self.all.saturating_add(1);
        self.gateway = if gateway { self.gateway.saturating_add(1) } else { 0 };
    }
}

#[derive(Clone, Copy, Debug)]
struct Ejection {
    why: Why,
    until: Instant,
    probed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    run: Run,
    ejection: Option<Ejection>,
    /// Ejections in a row, as of `since`.
    times: u32,
    since: Instant,
    /// The last report.
    at: Instant,
    /// What went well and what failed, where a share is asked for.
    lately: Recent,
}

/// Places in [`Entry::lately`].
const WELL: usize = 0;
const FAILED: usize = 1;

impl Entry {
    fn new(at: Instant) -> Self {
        Self { run: Run::default(), ejection: None, times: 0, since: at, at, lately: Recent::new(at) }
    }

    /// Counts a failure; whether too little goes well with it.
    fn is_too_bad(&mut self, rate: &SuccessRate, now: Instant) -> bool {
        self.lately.add(FAILED, rate.window, now);
        let [well, failed] = self.lately.counts(rate.window, now).map(u64::from);
        let all = well + failed;
        all >= rate.least.into() && well * 100 < all * u64::from(rate.percent)
    }

    fn standing(&self, now: Instant) -> Standing {
        match self.ejection {
            None => Standing::Closed,
            Some(ejection) if now < ejection.until => Standing::Open(ejection.until),
            Some(ejection) => Standing::HalfOpen { probed: ejection.probed },
        }
    }

    /// Ejections in a row: one is forgiven for each interval since the end of the last one.
    fn times(&self, now: Instant, interval: Duration) -> u32 {
        let quiet = now.saturating_duration_since(self.since).as_nanos() / interval.as_nanos().max(1);
        let forgiven = if self.ejection.is_some() { 0 } else { u32::try_from(quiet).unwrap_or(u32::MAX) };
        self.times.saturating_sub(forgiven)
    }

    fn says_nothing(&self, now: Instant, rules: &OutlierDetection) -> bool {
        let quiet = rules.success_rate.is_none_or(|rate| self.lately.is_empty(rate.window, now));
        self.ejection.is_none() && self.run.all == 0 && self.times(now, rules.interval) == 0 && quiet
    }
}

/// Endpoint, and the pod whose experience it is; none: everybody's.
type Whose = (SocketAddr, Option<Arc<str>>);

/// What is shown of an ejected endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ejected {
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// Uid of the pod for which it is; none: for all of the node.
    pub pod: Option<Arc<str>>,
    /// Why.
    pub why: Why,
    /// Time until it is tried again; none: the next request tries it.
    pub left: Option<Duration>,
    /// Ejections in a row.
    pub times: u32,
}

impl fmt::Display for Ejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whom = if self.pod.is_some() { " for this pod" } else { "" };
        write!(f, "ejected{whom} ({}, {} in a row), ", self.why.name(), self.times)?;
        match self.left {
            Some(left) => write!(f, "tried again in {:.1} s", left.as_secs_f64()),
            None => f.write_str("and tried again by the next one that comes"),
        }
    }
}

/// See the module's header.
#[derive(Debug)]
pub struct Outliers {
    began: Instant,
    entries: HashMap<Whose, Entry>,
}

/// A report, and what it is judged by.
#[derive(Clone, Copy)]
pub struct Report<'a> {
    /// The policy.
    pub rules: &'a OutlierDetection,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// Uid of the pod that met it.
    pub pod: &'a Arc<str>,
    /// What it met.
    pub seen: Seen,
    /// It was the one that tried a half-open endpoint.
    pub probe: bool,
    /// Every endpoint of the destination; asked only where one may be ejected.
    pub all: &'a dyn Fn() -> Vec<SocketAddr>,
    /// Now.
    pub now: Instant,
}

impl Outliers {
    /// Nothing is known.
    pub fn new(began: Instant) -> Self {
        Self { began, entries: HashMap::new() }
    }

    /// Whether there is nothing to look at.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn both(&self, endpoint: SocketAddr, pod: &Arc<str>) -> [Whose; 2] {
        [(endpoint, None), (endpoint, Some(pod.clone()))]
    }

    /// Whether `pod` may use `endpoint`.
    pub fn standing(&self, endpoint: SocketAddr, pod: &Arc<str>, now: Instant) -> Standing {
        let mut worst = Standing::Closed;
        if self.entries.is_empty() {
            return worst;
        }
        for whose in self.both(endpoint, pod) {
            let standing = self.entries.get(&whose).map_or(Standing::Closed, |entry| entry.standing(now));
            worst = match (worst, standing) {
                (Standing::Open(a), Standing::Open(b)) => Standing::Open(a.max(b)),
                (Standing::Open(_), _) | (_, Standing::Closed) => worst,
                (Standing::HalfOpen { probed: a }, Standing::HalfOpen { probed: b }) => {
                    Standing::HalfOpen { probed: a || b }
                }
                (_, standing) => standing,
            };
        }
        worst
    }

    /// Whether `endpoint` must not be chosen for `pod` now.
    pub fn is_out(&self, endpoint: SocketAddr, pod: &Arc<str>, now: Instant) -> bool {
        matches!(self.standing(endpoint, pod, now), Standing::Open(_) | Standing::HalfOpen { probed: true })
    }

    /// `pod` is about to use `endpoint`. `Some(true)`: as the one that tries it, which it has to report or [`Self::leave`].
    /// `None`: somebody was faster.
    pub fn enter(&mut self, endpoint: SocketAddr, pod: &Arc<str>, now: Instant) -> Option<bool> {
        match self.standing(endpoint, pod, now) {
            Standing::Closed => Some(false),
            Standing::Open(_) | Standing::HalfOpen { probed: true } => None,
            Standing::HalfOpen { probed: false } => {
                self.set_probed(endpoint, pod, true);
                Some(true)
            }
        }
    }

    /// Who tried `endpoint` has nothing to say of it.
    pub fn leave(&mut self, endpoint: SocketAddr, pod: &Arc<str>) {
        self.set_probed(endpoint, pod, false);
    }

    fn set_probed(&mut self, endpoint: SocketAddr, pod: &Arc<str>, probed: bool) {
        for whose in self.both(endpoint, pod) {
            if let Some(ejection) = self.entries.get_mut(&whose).and_then(|entry| entry.ejection.as_mut()) {
                ejection.probed = probed;
            }
        }
    }

    /// Endpoints that `pod`, or for none everybody, may not use before some time.
    fn open(&self, pod: Option<&Arc<str>>, now: Instant) -> BTreeSet<SocketAddr> {
        let counts = |whose: &Whose| whose.1.is_none() || whose.1.as_ref() == pod;
        let open = self
            .entries
            .iter()
            .filter(|(whose, entry)| counts(whose) && matches!(entry.standing(now), Standing::Open(_)));
        open.map(|((endpoint, _), _)| *endpoint).collect()
    }

    /// Whether so few of `all` endpoints are left to `pod` that ejection does not count (`minHealthPercent`).
    pub fn panics(&self, rules: &OutlierDetection, all: usize, pod: &Arc<str>, now: Instant) -> bool {
        if rules.min_health_percent == 0 || self.entries.is_empty() {
            return false;
        }
        let well = all.saturating_sub(self.open(Some(pod), now).len());
        well * 100 < all * rules.min_health_percent as usize
    }

    /// Takes what was seen.
    pub fn saw(&mut self, report: Report<'_>) -> Verdict {
        let Report { rules, seen, .. } = report;
        match seen {
            Seen::Answer(status) if status >= 500 => self.failed(report, None, matches!(status, 502..=504)),
            Seen::Lost { .. } => self.failed(report, Some(report.pod.clone()), true),
            Seen::Answer(_) | Seen::Served => self.worked(report, true),
            Seen::Connected if rules.split_local => self.worked(report, false),
            Seen::Connected => Verdict::Nothing,
        }
    }

    /// `whole`: everything about it was well, not only its delivery.
    fn worked(&mut self, report: Report<'_>, whole: bool) -> Verdict {
        let Report { rules, endpoint, pod, probe, now, .. } = report;
        let mut back = false;
        if let Some(rate) = rules.success_rate.filter(|_| whole) {
            self.went_well(report, &rate);
        }
        for whose in self.both(endpoint, pod) {
            if whose.1.is_none() && !whole {
                continue;
            }
            let Some(entry) = self.entries.get_mut(&whose) else { continue };
            match entry.ejection {
                // An answer to what was asked before the ejection, or beside the one that tries it.
                Some(_) if !probe || !whole => continue,
                Some(_) => {
                    entry.ejection = None;
                    (entry.since, entry.at) = (now, now);
                    back = true;
                }
                None => {}
            }
            entry.run = Run::default();
            if entry.says_nothing(now, rules) {
                self.entries.remove(&whose);
            }
        }
        if back { Verdict::Back } else { Verdict::Nothing }
    }

    /// Counts a success for everybody and, beside what this pod alone has met, for it.
    fn went_well(&mut self, report: Report<'_>, rate: &SuccessRate) {
        let Report { rules, endpoint, pod, now, .. } = report;
        self.make_room(now, rules, (endpoint, None));
        self.entries.entry((endpoint, None)).or_insert_with(|| Entry::new(now));
        for whose in self.both(endpoint, pod) {
            let Some(entry) = self.entries.get_mut(&whose) else { continue };
            entry.lately.add(WELL, rate.window, now);
            entry.at = now;
        }
    }

    fn failed(&mut self, report: Report<'_>, whose: Option<Arc<str>>, gateway: bool) -> Verdict {
        let Report { rules, endpoint, pod, probe, now, .. } = report;
        let tried = self.both(endpoint, pod).into_iter().find(|whose| {
            let standing = self.entries.get(whose).map(|entry| entry.standing(now));
            matches!(standing, Some(Standing::HalfOpen { .. }))
        });
        if let Some(tried) = tried {
            if !probe {
                return Verdict::Nothing;
            }
            self.leave(endpoint, pod);
            return self.eject(report, tried.1, Why::Probe);
        }
        if matches!(self.standing(endpoint, pod, now), Standing::Open(_)) {
            return Verdict::Nothing;
        }
        self.make_room(now, rules, (endpoint, whose.clone()));
        let entry = self.entries.entry((endpoint, whose.clone())).or_insert_with(|| Entry::new(now));
        entry.at = now;
        entry.run.failed(gateway);
        let too_bad = rules.success_rate.is_some_and(|rate| entry.is_too_bad(&rate, now));
        let run_of =
            |whose: Option<Arc<str>>| self.entries.get(&(endpoint, whose)).map(|entry| entry.run).unwrap_or_default();
        let (everybody, own) = (run_of(None), run_of(Some(pod.clone())));
        let full = |limit: Option<u32>, count: u32| limit.is_some_and(|limit| count >= limit);
        let (local, answers) = (whose.is_some(), !rules.split_local || whose.is_none());
        if local && rules.split_local && full(rules.consecutive_local, own.all) {
            return self.eject(report, whose, Why::ConsecutiveLocalOriginFailure);
        }
        // Everybody's count alone, then together with what this pod met, which ejects for it alone.
        let together = if rules.split_local { Run::default() } else { own };
        for (whose, more) in [(None, Run::default()), (Some(pod.clone()), together)] {
            if !answers || (whose.is_none() && local) || (whose.is_some() && more.all == 0) {
                continue;
            }
            if full(rules.consecutive_5xx, everybody.all + more.all) {
                return self.eject(report, whose, Why::Consecutive5xx);
            }
            if full(rules.consecutive_gateway, everybody.gateway + more.gateway) {
                return self.eject(report, whose, Why::ConsecutiveGatewayFailure);
            }
        }
        if too_bad { self.eject(report, whose, Why::SuccessRate) } else { Verdict::Nothing }
    }

    fn eject(&mut self, report: Report<'_>, whose: Option<Arc<str>>, why: Why) -> Verdict {
        let Report { rules, endpoint, now, .. } = report;
        let all = (report.all)();
        let mut open = self.open(whose.as_ref(), now);
        open.remove(&endpoint);
        let others = all.iter().filter(|one| open.contains(one)).count();
        // `maxEjectionPercent`, but at least one.
        let most = (all.len() * rules.max_ejection_percent as usize / 100).max(1);
        let began = self.began;
        let entry = self.entries.entry((endpoint, whose)).or_insert_with(|| Entry::new(now));
        if others >= most {
            // One that failed when it was tried goes on being tried by one at a time.
            entry.run = Run::default();
            return Verdict::TooMany(why);
        }
        let times = entry.times(now, rules.interval).saturating_add(1);
        let length = rules.base_ejection.saturating_mul(times).min(LONGEST.max(rules.base_ejection));
        let until = at_interval(now + length, began, rules.interval);
        let ejection = Some(Ejection { why, until, probed: false });
        *entry = Entry { ejection, times, ..Entry::new(now) };
        Verdict::Ejected(why, until.saturating_duration_since(now))
    }

    fn make_room(&mut self, now: Instant, rules: &OutlierDetection, new: Whose) {
        if self.entries.len() < MOST || self.entries.contains_key(&new) {
            return;
        }
        self.entries.retain(|_, entry| !entry.says_nothing(now, rules));
        if self.entries.len() >= MOST
            && let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| entry.at).map(|(whose, _)| whose.clone())
        {
            self.entries.remove(&oldest);
        }
    }

    /// Everything that is ejected or waits for being tried, in the order of addresses.
    pub fn ejected(&self, now: Instant) -> Vec<Ejected> {
        let shown = |((endpoint, pod), entry): (&Whose, &Entry)| {
            let ejection = entry.ejection?;
            let left = ejection.until.checked_duration_since(now).filter(|left| !left.is_zero());
            Some(Ejected { endpoint: *endpoint, pod: pod.clone(), why: ejection.why, left, times: entry.times })
        };
        let mut all: Vec<Ejected> = self.entries.iter().filter_map(shown).collect();
        all.sort_by(|a, b| (a.endpoint, &a.pod).cmp(&(b.endpoint, &b.pod)));
        all
    }
}

/// The first look at or after `moment`: ejected endpoints are looked at every `interval` from `began` on.
fn at_interval(moment: Instant, began: Instant, interval: Duration) -> Instant {
    let (since, every) = (moment.saturating_duration_since(began).as_nanos(), interval.as_nanos().max(1));
    let rest = since % every;
    let wait = if rest == 0 { 0 } else { every - rest };
    moment + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX).min(LONGEST.as_nanos() as u64))
}

#[cfg(test)]
mod tests;
