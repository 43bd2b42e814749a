//! Who may open a tunnel to a pod, and when: handshakes under way, handshakes a second, open tunnels, each for the pod
//! and for one source of it.
//!
//! A handshake is the most expensive thing that a stranger can make us do, so it is bounded before anything is
//! computed. No source gets more than its share, so that one that floods is slowed down and the others are not. A burst
//! waits for a moment rather than being refused: after a restart all peers of a pod come at once. Whether one may go on
//! is a pure function of the gate's state and the time. Not on the path of bytes: one short lock a tunnel.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use crate::base::bucket::{Bucket, Rate};
use crate::outcome::{Code, Outcome};

/// How long a handshake waits for its turn. Peers give up after 10 s.
const PATIENCE: Duration = Duration::from_secs(3);

/// Handshakes that wait for their turn, at most: a quarter of a second of one core.
const WAITING: usize = 512;

/// Sources that are told apart, twice the usual number of tunnels. Beyond, new ones share one place.
const SOURCES: usize = 4096;

/// How often a full table is searched for sources that are gone.
const SEARCH: Duration = Duration::from_millis(100);

/// What a pod may be asked for.
#[derive(Clone, Copy, Debug)]
pub struct GateLimits {
    /// Handshakes under way; a source gets a quarter.
    pub handshakes: usize,
    /// Handshakes a second.
    pub rate: u32,
    /// Handshakes a second of one source.
    pub source_rate: u32,
    /// Open tunnels; a source gets half.
    pub tunnels: usize,
}

/// What one source has.
#[derive(Debug, Default)]
struct Source {
    under_way: usize,
    waiting: usize,
    tunnels: usize,
    bucket: Bucket,
}

/// Whether a handshake may begin.
#[derive(Debug, PartialEq, Eq)]
enum Admission {
    /// It may, and was counted.
    Go,
    /// Not before this much time has passed.
    Wait(Duration),
    /// Not before another one is done.
    Full,
}

#[derive(Debug)]
struct State {
    limits: GateLimits,
    under_way: usize,
    waiting: usize,
    tunnels: usize,
    bucket: Bucket,
    sources: HashMap<IpAddr, Source>,
    searched: Duration,
}

/// Everything that may be remembered of a source was used up or is long ago.
fn is_gone(source: &Source, now: Duration) -> bool {
    source.under_way + source.waiting + source.tunnels == 0 && source.bucket.is_full(now)
}

impl State {
    fn new(limits: GateLimits) -> Self {
        Self {
            limits,
            under_way: 0,
            waiting: 0,
            tunnels: 0,
            bucket: Bucket::default(),
            sources: HashMap::new(),
            searched: Duration::ZERO,
        }
    }

    /// A source's part of the handshakes under way. At least two, or a limit of one would be none.
    fn share(&self) -> usize {
        (self.limits.handshakes / 4).max(2)
    }

    /// Where `source` is counted.
    fn place(&mut self, source: IpAddr, now: Duration) -> IpAddr {
        if self.sources.len() < SOURCES || self.sources.contains_key(&source) {
            return source;
        }
        if now >= self.searched + SEARCH {
            self.searched = now;
            self.sources.retain(|_, source| !is_gone(source, now));
        }
        if self.sources.len() < SOURCES { source } else { IpAddr::from([0; 4]) }
    }

    fn tunnel(&mut self, source: IpAddr) -> Result<(), String> {
        let most = (self.limits.tunnels / 2).max(1);
        let tunnels = self.tunnels;
        let of_source = self.sources.entry(source).or_default();
        if tunnels >= self.limits.tunnels {
            return Err(format!("the pod has {tunnels} open tunnels, its limit (TULLE_POD_MAX_TUNNELS); retry later"));
        }
        if of_source.tunnels >= most {
            return Err(format!("{source} has {most} open tunnels to the pod, which is a source's share; retry later"));
        }
        of_source.tunnels += 1;
        self.tunnels += 1;
        Ok(())
    }

    fn handshake(&mut self, source: IpAddr, now: Duration) -> Admission {
        let share = self.share();
        let (pod_rate, source_rate) = (rate(self.limits.rate), rate(self.limits.source_rate));
        let full = self.under_way >= self.limits.handshakes;
        let of_source = self.sources.entry(source).or_default();
        if full || of_source.under_way >= share {
            return Admission::Full;
        }
        let wait = self.bucket.wait(pod_rate, now).max(of_source.bucket.wait(source_rate, now));
        if !wait.is_zero() {
            return Admission::Wait(wait);
        }
        self.bucket.take(pod_rate, now);
        of_source.bucket.take(source_rate, now);
        of_source.under_way += 1;
        self.under_way += 1;
        Admission::Go
    }

    /// Room to wait in, for the pod and for the source.
    fn may_wait(&mut self, source: IpAddr) -> bool {
        let share = WAITING / 4;
        let of_source = self.sources.entry(source).or_default();
        let room = self.waiting < WAITING && of_source.waiting < share;
        if room {
            of_source.waiting += 1;
            self.waiting += 1;
        }
        room
    }

    fn leave(&mut self, source: IpAddr, what: What) {
        let of_source = self.sources.entry(source).or_default();
        let (pod, own) = match what {
            What::Tunnel => (&mut self.tunnels, &mut of_source.tunnels),
            What::Handshake => (&mut self.under_way, &mut of_source.under_way),
            What::Waiting => (&mut self.waiting, &mut of_source.waiting),
        };
        *pod = pod.saturating_sub(1);
        *own = own.saturating_sub(1);
    }
}

/// Two seconds' worth at once: all peers of a pod come back together.
fn rate(per_second: u32) -> Rate {
    Rate::per_second(per_second, per_second.saturating_mul(2))
}

#[derive(Clone, Copy, Debug)]
enum What {
    Tunnel,
    Handshake,
    Waiting,
}

/// The gate of one pod.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    freed: Notify,
    began: Instant,
}

/// A place behind the gate, until dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    source: IpAddr,
    what: What,
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.state().leave(self.source, self.what);
        if matches!(self.what, What::Handshake) {
            self.gate.freed.notify_waiters();
        }
    }
}

impl Gate {
    /// An open gate.
    pub fn new(limits: GateLimits) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::new(limits)), freed: Notify::new(), began: Instant::now() })
    }

    /// Open tunnels.
    pub fn tunnels(&self) -> usize {
        self.state().tunnels
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(self: &Arc<Self>, source: IpAddr, what: What) -> Pass {
        Pass { gate: self.clone(), source, what }
    }

    /// One more tunnel from `source`.
    ///
    /// # Errors
    /// `OverBudget`.
    pub fn tunnel(self: &Arc<Self>, source: IpAddr) -> Result<Pass, Outcome> {
        let mut state = self.state();
        let source = state.place(source, self.began.elapsed());
        state.tunnel(source).map_err(|text| Outcome::new(Code::OverBudget, text))?;
        drop(state);
        Ok(self.pass(source, What::Tunnel))
    }

    /// One more handshake from `source`, when it is its turn.
    ///
    /// # Errors
    /// `HandshakeLimit` if that takes too long, or too many wait already.
    pub async fn handshake(self: &Arc<Self>, source: IpAddr) -> Result<Pass, Outcome> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting: Option<Pass> = None;
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Heard first, looked second: whoever is done in between is not missed.
            freed.as_mut().enable();
            let (source, admission) = {
                let (mut state, now) = (self.state(), self.began.elapsed());
                let source = state.place(source, now);
                let admission = state.handshake(source, now);
                if admission != Admission::Go && waiting.is_none() {
                    if !state.may_wait(source) {
                        return Err(refused(source, "too many wait for their turn already"));
                    }
                    waiting = Some(self.pass(source, What::Waiting));
                }
                (source, admission)
            };
            match admission {
                Admission::Go => return Ok(self.pass(source, What::Handshake)),
                Admission::Wait(wait) if Instant::now() + wait < deadline => sleep(wait).await,
                Admission::Wait(_) => return Err(refused(source, "its rate or the pod's is used up for seconds")),
                Admission::Full => {
                    if timeout_at(deadline, freed).await.is_err() {
                        return Err(refused(source, "too many are under way"));
                    }
                }
            }
        }
    }
}

fn refused(source: IpAddr, why: &str) -> Outcome {
    let text = format!(
        "a TLS handshake from {source} was not begun: {why}; retry later, or raise TULLE_POD_MAX_HANDSHAKES, \
         TULLE_POD_MAX_HANDSHAKE_RATE or TULLE_SOURCE_MAX_HANDSHAKE_RATE"
    );
    Outcome::new(Code::HandshakeLimit, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: GateLimits = GateLimits { handshakes: 8, rate: 100, source_rate: 10, tunnels: 6 };

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn one_source_leaves_places_for_others() {
        let mut state = State::new(LIMITS);
        for _ in 0..2 {
            assert_eq!(state.handshake(ip(1), Duration::ZERO), Admission::Go);
        }
        assert_eq!(state.handshake(ip(1), Duration::ZERO), Admission::Full, "a quarter");
        assert_eq!(state.handshake(ip(2), Duration::ZERO), Admission::Go);
        state.leave(ip(1), What::Handshake);
        assert_eq!(state.handshake(ip(1), Duration::ZERO), Admission::Go);
        for _ in 0..3 {
            state.tunnel(ip(1)).unwrap();
        }
        assert!(state.tunnel(ip(1)).unwrap_err().contains("share"));
        for n in 2..5 {
            state.tunnel(ip(n)).unwrap();
        }
        assert!(state.tunnel(ip(9)).unwrap_err().contains("TULLE_POD_MAX_TUNNELS"));
    }

    /// Begins and ends one handshake.
    fn quick(state: &mut State, source: IpAddr, now: Duration) -> Admission {
        let admission = state.handshake(source, now);
        if admission == Admission::Go {
            state.leave(source, What::Handshake);
        }
        admission
    }

    #[test]
    fn the_rate_of_a_source_and_of_the_pod_hold() {
        let mut state = State::new(LIMITS);
        let at = Duration::from_millis;
        let mut went = 0;
        for ms in 0..1000 {
            went += u32::from(quick(&mut state, ip(1), at(ms)) == Admission::Go);
        }
        assert!((29..=31).contains(&went), "a burst of 20 and 10 in the second: {went}");
        assert_eq!(quick(&mut state, ip(2), at(999)), Admission::Go, "another source has its own");
        assert!(matches!(quick(&mut state, ip(1), at(999)), Admission::Wait(wait) if wait <= at(100)));
        let mut all = 0;
        for n in 10..200 {
            for _ in 0..2 {
                all += u32::from(quick(&mut state, ip(n), at(1000)) == Admission::Go);
            }
        }
        assert!((150..=200).contains(&all), "all sources together get the pod's: {all}");
    }

    #[test]
    fn a_flood_of_sources_stays_within_the_table_and_shares_one_place() {
        let mut state = State::new(GateLimits { rate: u32::MAX, ..LIMITS });
        let now = Duration::from_secs(1);
        for n in 0..u32::try_from(SOURCES).unwrap() + 500 {
            let source = state.place(IpAddr::from(n.to_be_bytes()), now);
            let _ = quick(&mut state, source, now);
        }
        assert!(state.sources.len() <= SOURCES + 1);
        let later = Duration::from_secs(60);
        assert_eq!(state.place(ip(1), later), ip(1), "those that are gone make room");
        assert!(state.sources.len() < 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_waits_for_its_turn_and_a_flood_is_refused() {
        let gate = Gate::new(GateLimits { handshakes: 128, rate: 100, source_rate: 50, tunnels: 2048 });
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..400 {
            let gate = gate.clone();
            tasks.spawn(async move {
                let pass = gate.handshake(ip(1)).await?;
                sleep(Duration::from_millis(1)).await;
                drop(pass);
                Ok::<_, Outcome>(())
            });
        }
        let (mut went, mut refused) = (0, 0);
        while let Some(done) = tasks.join_next().await {
            match done.unwrap() {
                Ok(()) => went += 1,
                Err(outcome) => {
                    assert_eq!(outcome.code, Code::HandshakeLimit);
                    refused += 1;
                }
            }
        }
        assert!(went >= 100 && refused > 0, "{went} went, {refused} were refused");
        assert!(gate.handshake(ip(2)).await.is_ok(), "another source does not notice");
        let state = gate.state();
        assert_eq!((state.under_way, state.waiting), (0, 0));
    }
}
