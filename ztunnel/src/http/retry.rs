//! Whether a request is sent again, and when. Pure; what is under way is counted elsewhere (`lb`).
//!
//! What the backend cannot have seen may always be sent again. What it may have seen is repeated only for methods that say
//! the same twice (RFC 9110 §9.2.2), unless the route says otherwise. Retries never make an outage worse: there are at
//! most [`most`] beside so many requests, as Envoy counts its retry budget.

use std::time::Duration;

use http::{Method, StatusCode};

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

/// Retries that there may be beside so many requests: `share`, in hundredths of a percent, and always `least`, so that quiet
/// services have them too.
pub fn most(requests: usize, share: u32, least: u32) -> usize {
    let share = requests as u128 * u128::from(share) / 10_000;
    usize::try_from(share.max(least.into())).unwrap_or(usize::MAX)
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
    fn retries_are_a_share_of_the_requests_and_a_few_are_always_allowed() {
        for (requests, share, least, expected) in
            [(50, 2_000, 3, 10), (5, 2_000, 3, 3), (0, 2_000, 0, 0), (1_000, 50, 0, 5), (7, 10_000, 1, 7)]
        {
            assert_eq!(most(requests, share, least), expected, "{requests} {share} {least}");
        }
    }
}
