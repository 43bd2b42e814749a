//! Whether a request is sent again, and when. Pure; the budget is a count that its owner keeps.
//!
//! What the backend cannot have seen may always be sent again. What it may have seen is repeated only for methods that say
//! the same twice (RFC 9110 §9.2.2), unless the route says otherwise. Retries never make an outage worse: those under way
//! are at most [`SHARE`] percent of the requests under way, [`LEAST`] at least, as Envoy counts its retry budget.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use http::{Method, StatusCode};

/// Percent of the requests under way that may be retries.
const SHARE: usize = 20;

/// Retries under way that are always allowed, so that quiet services have them too.
const LEAST: usize = 3;

/// Pause before the first retry where the route says none: Envoy's.
const PAUSE: Duration = Duration::from_millis(25);

/// Pauses grow up to so many times the first one.
const MOST_PAUSES: u32 = 10;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// Not a byte of it reached the application.
    Unreached,
    /// The connection ended before an answer, and the application may have read it.
    Lost,
    /// The backend took too long.
    Late,
    /// It answered.
    Answered(StatusCode),
}

/// Whether the same request twice does what it does once.
pub fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE)
}

/// Whether an attempt that ended so may be made again. `codes` are the statuses after which it is, `any_method` lets
/// requests be repeated that are not idempotent.
pub fn may_repeat(tried: Tried, method: &Method, codes: &[u16], any_method: bool) -> bool {
    let safe = any_method || is_idempotent(method);
    match tried {
        Tried::Unreached => true,
        Tried::Lost => safe,
        // What is said of 504 holds for one that we make of it.
        Tried::Late => safe && codes.contains(&504),
        Tried::Answered(status) => safe && codes.contains(&status.as_u16()),
    }
}

/// The pause before retry `number`, from 1: at least `least`, and by chance up to twice, four, eight times that.
pub fn pause(least: Duration, number: u32, random: u64) -> Duration {
    let base = if least.is_zero() { PAUSE } else { least };
    let most = base * (1_u32 << number.min(4)).min(MOST_PAUSES);
    let spread = most.saturating_sub(base).as_nanos();
    let share = u128::from(random >> 32);
    let extra = u64::try_from((spread * share) >> 32).unwrap_or(u64::MAX);
    let floor = if least.is_zero() { Duration::ZERO } else { base };
    if floor.is_zero() { Duration::from_nanos(extra) } else { floor + Duration::from_nanos(extra) }
}

/// Requests and retries under way towards one service, from one pod on one worker.
#[derive(Clone, Debug, Default)]
pub struct Budget(Rc<(Cell<usize>, Cell<usize>)>);

/// One more, until dropped.
#[derive(Debug)]
pub struct Counted {
    of: Budget,
    retry: bool,
}

impl Budget {
    fn count(&self, retry: bool) -> &Cell<usize> {
        if retry { &self.0.1 } else { &self.0.0 }
    }

    fn counted(&self, retry: bool) -> Counted {
        let count = self.count(retry);
        count.set(count.get() + 1);
        Counted { of: self.clone(), retry }
    }

    /// A request begins.
    pub fn request(&self) -> Counted {
        self.counted(false)
    }

    /// A retry begins, if there is room for it.
    pub fn retry(&self) -> Option<Counted> {
        let most = (self.count(false).get() * SHARE / 100).max(LEAST);
        (self.count(true).get() < most).then(|| self.counted(true))
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.count(false).get() == 0 && self.count(true).get() == 0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let count = self.of.count(self.retry);
        count.set(count.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_be_repeated_is() {
        let ok = |status: u16| Tried::Answered(StatusCode::from_u16(status).unwrap());
        let codes = &[503, 504];
        for (tried, method, any, expected) in [
            (Tried::Unreached, Method::POST, false, true),
            (Tried::Lost, Method::POST, false, false),
            (Tried::Lost, Method::POST, true, true),
            (Tried::Lost, Method::GET, false, true),
            (Tried::Late, Method::GET, false, true),
            (ok(503), Method::GET, false, true),
            (ok(503), Method::POST, false, false),
            (ok(500), Method::GET, false, false),
            (ok(200), Method::GET, true, false),
        ] {
            assert_eq!(may_repeat(tried, &method, codes, any), expected, "{tried:?} {method} {any}");
        }
        assert!(!may_repeat(Tried::Late, &Method::GET, &[503], false));
    }

    #[test]
    fn pauses_grow_and_keep_their_bounds() {
        let least = Duration::from_millis(100);
        for number in 1..9 {
            assert_eq!(pause(least, number, 0), least);
            let most = pause(least, number, u64::MAX);
            assert!(most > least && most < least * MOST_PAUSES + Duration::from_millis(1), "{number}: {most:?}");
        }
        assert!(pause(Duration::ZERO, 1, u64::MAX) <= PAUSE);
        assert!(pause(Duration::ZERO, 3, u64::MAX) > pause(Duration::ZERO, 1, u64::MAX));
    }

    #[test]
    fn a_fifth_of_the_requests_under_way_may_be_retries() {
        let budget = Budget::default();
        let requests: Vec<_> = (0..50).map(|_| budget.request()).collect();
        let retries: Vec<_> = std::iter::from_fn(|| budget.retry()).collect();
        assert_eq!(retries.len(), 10);
        drop(retries);
        drop(requests);
        assert!(budget.is_idle());
        let few: Vec<_> = std::iter::from_fn(|| budget.retry()).collect();
        assert_eq!(few.len(), LEAST);
        assert!(budget.retry().is_none());
    }
}
