//! Sessions of a rule (Gateway API's `sessionPersistence`): a client that shows what it was given goes to the backend and the
//! endpoint that it had. Pure; the time is an argument, in Unix seconds.
//!
//! What a client shows names the endpoint and the times, and no node keeps anything: `1~begun~used~host:port~uid`. It is a wish
//! and no right: an endpoint that others would not get either (gone, not ready, ejected) is not used, and every request is
//! authorised as any other. A backend keeps its sessions also when its weight is 0, so that it can be emptied slowly.

use std::sync::Arc;
use std::time::Duration;

use crate::state::{Backend, RouteRule, SessionRule};

/// The first part of what a client is given. Another one is of another version, and means nothing.
const VERSION: &str = "1";

/// What a client shows is no longer than this: host and uid are at most 253 and some 300 bytes.
const LONGEST: usize = 1024;

/// What a client has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    begun: i64,
    backend: Arc<str>,
    /// Uid of the endpoint.
    pub endpoint: Arc<str>,
}

impl Session {
    /// Reads what a client shows. `None`: it is over, or nothing that was given.
    pub fn read(rule: &SessionRule, text: &str, now: i64) -> Option<Self> {
        if text.len() > LONGEST {
            return None;
        }
        let mut parts = text.splitn(5, '~');
        let mut next = || parts.next().filter(|part| !part.is_empty());
        let (version, begun, used, backend, endpoint) = (next()?, next()?, next()?, next()?, next()?);
        let time = |text: &str| i64::from_str_radix(text, 16).ok().filter(|time| *time >= 0);
        let (begun, used) = (time(begun)?, time(used)?);
        let is_over = |since: i64, after: Option<Duration>| {
            after.is_some_and(|after| now.saturating_sub(since) >= i64::try_from(after.as_secs()).unwrap_or(i64::MAX))
        };
        let over = is_over(begun, rule.absolute) || is_over(used, rule.idle);
        (version == VERSION && !over).then(|| Self { begun, backend: backend.into(), endpoint: endpoint.into() })
    }

    /// Which backend of the rule it is of. `None`: the rule has it no more.
    pub fn backend(&self, rule: &RouteRule) -> Option<usize> {
        rule.backends.iter().position(|backend| backend.invalid.is_none() && *self.backend == *name(backend))
    }
}

fn name(backend: &Backend) -> String {
    format!("{}:{}", backend.service.hostname, backend.port)
}

/// What the client is given with an answer of `endpoint`, a uid: the value of the header or cookie. `None`: what it has shown
/// still holds, or the uid cannot be said.
pub fn given(
    rule: &SessionRule,
    shown: Option<&Session>,
    backend: &Backend,
    endpoint: &str,
    now: i64,
) -> Option<String> {
    let name = name(backend);
    let same = shown.filter(|shown| *shown.endpoint == *endpoint && *shown.backend == *name);
    // Of an idle time, each use is told.
    if same.is_some() && rule.idle.is_none() {
        return None;
    }
    let begun = same.map_or(now, |same| same.begun);
    let text = format!("{VERSION}~{begun:x}~{now:x}~{name}~{endpoint}");
    // RFC 6265, section 4.1.1.
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\",;\\".contains(&byte));
    if !plain || text.len() > LONGEST {
        return None;
    }
    let Some(cookie) = &rule.cookie else { return Some(text) };
    let left = rule.absolute.filter(|_| rule.permanent).map(|absolute| {
        let passed = u64::try_from(now.saturating_sub(begun)).unwrap_or(0);
        format!("; Max-Age={}", absolute.as_secs().saturating_sub(passed))
    });
    Some(format!("{cookie}={text}{}; Path=/; HttpOnly", left.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Session, given};
    use crate::state::{Backend, Filters, ServiceName, SessionRule};

    fn rule() -> SessionRule {
        SessionRule { cookie: Some("s".into()), header: None, permanent: false, absolute: None, idle: None }
    }

    fn backend(host: &str) -> Backend {
        let service = ServiceName { namespace: "shop".into(), hostname: host.into() };
        Backend { service, port: 80, weight: 1, filters: Filters::default(), invalid: None }
    }

    /// The value within a cookie.
    fn value(cookie: &str) -> &str {
        cookie.strip_prefix("s=").and_then(|rest| rest.split(';').next()).unwrap()
    }

    #[test]
    fn what_is_given_is_understood_again_until_its_times_are_over() {
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
        let (absolute, idle) = (SessionRule { absolute: hours(2), ..rule() }, SessionRule { idle: hours(1), ..rule() });
        let hour = 3600;
        for (name, rule, shown_at, holds) in [
            ("no time", rule(), 1000 * hour, true),
            ("before the absolute one", absolute.clone(), 2 * hour - 1, true),
            ("after it", absolute, 2 * hour, false),
            ("before the idle one", idle.clone(), hour - 1, true),
            ("after it", idle, hour, false),
        ] {
            let begun = 1_700_000_000;
            let cookie = given(&rule, None, &backend("cart"), "c//Pod/shop/a", begun).unwrap();
            assert!(cookie.ends_with("; Path=/; HttpOnly") && !cookie.contains("Max-Age"), "{cookie}");
            let session = Session::read(&rule, value(&cookie), begun + shown_at);
            assert_eq!(session.is_some(), holds, "{name}");
            let Some(session) = session else { continue };
            assert_eq!(&*session.endpoint, "c//Pod/shop/a");
            let again = given(&rule, Some(&session), &backend("cart"), "c//Pod/shop/a", begun + shown_at);
            assert_eq!(again.is_some(), rule.idle.is_some(), "{name}: each use is told where it counts");
            if let Some(again) = again {
                let later = Session::read(&rule, value(&again), begun + shown_at + hour - 1);
                assert_eq!(later.map(|later| later.begun), Some(begun), "it began when it began");
            }
            for (host, endpoint) in [("cart", "c//Pod/shop/b"), ("other", "c//Pod/shop/a")] {
                assert!(given(&rule, Some(&session), &backend(host), endpoint, begun).is_some(), "another one is told");
            }
        }
    }

    #[test]
    fn a_permanent_cookie_lasts_for_what_is_left_and_a_header_is_bare() {
        let rule = SessionRule {
            permanent: true,
            absolute: Some(Duration::from_secs(100)),
            idle: Some(Duration::from_secs(60)),
            ..rule()
        };
        let first = given(&rule, None, &backend("cart"), "a", 1000).unwrap();
        assert_eq!(first, "s=1~3e8~3e8~cart:80~a; Max-Age=100; Path=/; HttpOnly");
        let shown = Session::read(&rule, value(&first), 1030).unwrap();
        let next = given(&rule, Some(&shown), &backend("cart"), "a", 1030).unwrap();
        assert_eq!(next, "s=1~3e8~406~cart:80~a; Max-Age=70; Path=/; HttpOnly");
        let header = SessionRule { cookie: None, ..rule };
        assert_eq!(given(&header, None, &backend("cart"), "a", 1000).as_deref(), Some("1~3e8~3e8~cart:80~a"));
        assert_eq!(given(&header, None, &backend("cart"), "a;b", 1000), None, "it cannot be said");
    }

    #[test]
    fn what_nobody_was_given_means_nothing() {
        for text in
            ["", "1", "1~~~~", "2~3e8~3e8~cart:80~a", "1~x~3e8~cart:80~a", "1~-1~3e8~cart:80~a", "1~3e8~3e8~cart:80~"]
        {
            assert_eq!(Session::read(&rule(), text, 1000), None, "{text}");
        }
        let long = format!("1~3e8~3e8~cart:80~{}", "a".repeat(5000));
        assert_eq!(Session::read(&rule(), &long, 1000), None);
    }
}
