//! CORS as a route allows it: what a preflight is told, and what is said with other answers. Pure.
//!
//! By Gateway API's HTTPCORSFilter and the Fetch standard: an origin that is not allowed gets the same answer without the
//! headers, and it is the browser that then refuses. With credentials nothing is said with a `*`, because browsers do not
//! take that; what was asked for is repeated instead. What a rule says counts, and not what the server says besides, for the
//! origins that the rule allows.

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};

use crate::route::RequestFacts;
use crate::state::{Cors, Listed};

/// What is said to the origin of one request.
#[derive(Clone, Debug)]
pub struct Granted {
    /// `access-control-allow-origin`; `None`: the origin is not allowed, or there is none.
    origin: Option<HeaderValue>,
    credentials: bool,
    expose: Option<Listed>,
    /// Another origin would be answered otherwise.
    varies: bool,
}

impl Granted {
    /// Of a request that a rule with the filter got.
    pub(super) fn of(cors: &Cors, facts: &RequestFacts<'_>) -> Self {
        let everybody = cors.origins.iter().any(|origin| &**origin == "*");
        let asked = facts.headers.get(ORIGIN).filter(|origin| allows(cors, origin));
        let origin = asked.map(|origin| match everybody && !cors.credentials {
            true => HeaderValue::from_static("*"),
            false => origin.clone(),
        });
        Self {
            origin,
            credentials: cors.credentials,
            expose: cors.expose.clone(),
            varies: !everybody || cors.credentials,
        }
    }

    /// Whether the origin may see the answer.
    pub fn is_allowed(&self) -> bool {
        self.origin.is_some()
    }

    /// Says so in an answer.
    pub fn say(&self, headers: &mut HeaderMap) {
        self.vary(headers);
        let Some(origin) = &self.origin else { return };
        for name in [ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS] {
            headers.remove(name);
        }
        let exposed = self.expose.as_ref().and_then(|expose| match expose {
            Listed::These(list) => Some(list.clone()),
            Listed::All if !self.credentials => Some(HeaderValue::from_static("*")),
            Listed::All => names(headers),
        });
        headers.extend(exposed.map(|list| (ACCESS_CONTROL_EXPOSE_HEADERS, list)));
        self.say_origin(origin, headers);
    }

    fn say_origin(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }

    fn vary(&self, headers: &mut HeaderMap) {
        if self.varies {
            headers.append(VARY, HeaderValue::from_static("origin"));
        }
    }
}

/// Headers of the answer to a preflight. `None`: it is none, and goes its way.
pub(super) fn preflight(cors: &Cors, facts: &RequestFacts<'_>) -> Option<(Granted, HeaderMap)> {
    let method = facts.headers.get(ACCESS_CONTROL_REQUEST_METHOD)?;
    if facts.method != "OPTIONS" || !facts.headers.contains_key(ORIGIN) {
        return None;
    }
    let granted = Granted::of(cors, facts);
    let mut headers = HeaderMap::new();
    granted.vary(&mut headers);
    if let Some(origin) = &granted.origin {
        granted.say_origin(origin, &mut headers);
        let wanted = facts.header(&ACCESS_CONTROL_REQUEST_HEADERS);
        let wanted = wanted.and_then(|list| HeaderValue::from_str(&list).ok());
        let mut list = |name: HeaderName, allowed: &Option<Listed>, asked: Option<&HeaderValue>| {
            let said = match allowed {
                None => None,
                Some(Listed::These(list)) => Some(list.clone()),
                Some(Listed::All) if !cors.credentials => Some(HeaderValue::from_static("*")),
                Some(Listed::All) => asked.cloned(),
            };
            headers.extend(said.map(|list| (name, list)));
        };
        list(ACCESS_CONTROL_ALLOW_METHODS, &cors.methods, Some(method));
        list(ACCESS_CONTROL_ALLOW_HEADERS, &cors.headers, wanted.as_ref());
        headers.insert(ACCESS_CONTROL_MAX_AGE, cors.max_age.into());
    }
    Some((granted, headers))
}

/// The names of an answer's headers, as a list, without those that browsers take for themselves.
fn names(headers: &HeaderMap) -> Option<HeaderValue> {
    let names = headers.keys().map(HeaderName::as_str).filter(|name| !name.starts_with("access-control-"));
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    (!names.is_empty()).then(|| HeaderValue::from_str(&names.join(", ")).ok())?
}

fn allows(cors: &Cors, origin: &HeaderValue) -> bool {
    // What browsers send is ASCII; anything else is nobody's origin.
    origin.to_str().is_ok_and(|origin| cors.origins.iter().any(|wanted| is(wanted, origin)))
}

/// Whether an origin is one that is allowed: scheme and port are the same, the port of the scheme where none is written, and
/// a `*` at the beginning of the host stands for at least one letter of any labels.
fn is(wanted: &str, origin: &str) -> bool {
    if wanted == "*" {
        return true;
    }
    let (Some(wanted), Some(found)) = (parts(wanted), parts(origin)) else { return false };
    let host = match wanted.1.strip_prefix('*') {
        Some(end) => {
            let begin = found.1.len().checked_sub(end.len()).filter(|begin| *begin > 0);
            begin.and_then(|begin| found.1.get(begin..)).is_some_and(|last| last.eq_ignore_ascii_case(end))
        }
        None => wanted.1.eq_ignore_ascii_case(found.1),
    };
    host && wanted.0.eq_ignore_ascii_case(found.0) && (wanted.2 == "*" || wanted.2 == found.2)
}

/// Scheme, host and port.
fn parts(origin: &str) -> Option<(&str, &str, &str)> {
    let (scheme, rest) = origin.split_once("://")?;
    let well_known = if scheme.eq_ignore_ascii_case("https") { "443" } else { "80" };
    match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => Some((scheme, host, port)),
        _ => Some((scheme, rest, well_known)),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use http::header::{HeaderName, HeaderValue};

    use super::{Granted, is, preflight};
    use crate::route::RequestFacts;
    use crate::state::{Cors, Listed};

    #[test]
    fn an_origin_is_its_scheme_host_and_port() {
        for (wanted, origin, expected) in [
            ("*", "https://a.example", true),
            ("*", "null", true),
            ("https://a.example", "https://a.example", true),
            ("https://a.example", "https://A.Example", true),
            ("https://a.example", "https://a.example:443", true),
            ("https://a.example:443", "https://a.example", true),
            ("http://a.example", "http://a.example:80", true),
            ("https://a.example", "http://a.example", false),
            ("https://a.example", "https://a.example:8443", false),
            ("https://a.example:*", "https://a.example:8443", true),
            ("https://a.example", "https://b.a.example", false),
            ("https://a.example", "https://a.example.evil", false),
            ("https://*.example", "https://a.example", true),
            ("https://*.example", "https://a.b.example", true),
            ("https://*.example", "https://example", false),
            ("https://*.example", "https://.example", false),
            ("https://*.example", "https://a.example.evil", false),
            ("https://*", "https://a.example", true),
            ("https://*", "http://a.example", false),
            ("http://[::1]", "http://[::1]:80", true),
            ("https://a.example", "null", false),
            ("https://a.example", "", false),
        ] {
            assert_eq!(is(wanted, origin), expected, "{wanted} {origin}");
        }
    }

    fn cors(origin: &str, credentials: bool, list: Option<Listed>) -> Cors {
        let [methods, headers, expose] = [list.clone(), list.clone(), list];
        Cors { origins: vec![origin.into()], credentials, methods, headers, expose, max_age: 5 }
    }

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn facts<'a>(method: &'a str, headers: &'a HeaderMap) -> RequestFacts<'a> {
        RequestFacts { method, scheme: "http", authority: "cart", port: 80, path: "/", query: None, headers }
    }

    fn shown(headers: &HeaderMap) -> String {
        let mut lines: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines.join("; ").replace("access-control-", "")
    }

    const ASKED: &[(&str, &str)] = &[
        ("origin", "https://a.example"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-a,x-b"),
    ];

    #[test]
    fn a_preflight_is_told_what_the_rule_allows() {
        let these = || Some(Listed::These(HeaderValue::from_static("x")));
        let (a, echo) = ("https://a.example", "allow-origin: https://a.example");
        for (cors, expected) in [
            (cors(a, false, None), format!("{echo}; max-age: 5; vary: origin")),
            (cors("*", false, None), "allow-origin: *; max-age: 5".to_owned()),
            (cors("*", true, None), format!("allow-credentials: true; {echo}; max-age: 5; vary: origin")),
            (cors(a, false, these()), format!("allow-headers: x; allow-methods: x; {echo}; max-age: 5; vary: origin")),
            (
                cors("*", false, Some(Listed::All)),
                "allow-headers: *; allow-methods: *; allow-origin: *; max-age: 5".to_owned(),
            ),
            (
                cors(a, true, Some(Listed::All)),
                format!(
                    "allow-credentials: true; allow-headers: x-a,x-b; allow-methods: PUT; {echo}; max-age: 5; vary: origin"
                ),
            ),
            (cors("https://b.example", true, these()), "vary: origin".to_owned()),
        ] {
            let asked = map(ASKED);
            let (granted, headers) = preflight(&cors, &facts("OPTIONS", &asked)).unwrap();
            assert_eq!(shown(&headers), expected, "{cors:?}");
            assert_eq!(granted.is_allowed(), expected.contains("allow-origin"), "{cors:?}");
        }
        let cors = cors(a, true, Some(Listed::All));
        let without = map(&ASKED[..2]);
        let (_, headers) = preflight(&cors, &facts("OPTIONS", &without)).unwrap();
        assert!(!headers.contains_key("access-control-allow-headers"), "none were asked for: {headers:?}");
    }

    #[test]
    fn only_an_options_request_that_asks_is_a_preflight() {
        let cors = cors("*", false, None);
        for (method, left_out) in
            [("GET", None), ("OPTIONS", Some("origin")), ("OPTIONS", Some("access-control-request-method"))]
        {
            let mut headers = map(ASKED);
            if let Some(name) = left_out {
                headers.remove(name);
            }
            assert!(preflight(&cors, &facts(method, &headers)).is_none(), "{method} without {left_out:?}");
        }
    }

    #[test]
    fn an_answer_says_who_may_see_it_and_what() {
        let these = || Some(Listed::These(HeaderValue::from_static("x-b")));
        let (asked, none) = (map(&ASKED[..1]), HeaderMap::new());
        let (a, echo) = ("https://a.example", "allow-origin: https://a.example");
        for (cors, request, expected) in [
            (cors(a, false, None), &asked, format!("{echo}; vary: origin; x-a: 1")),
            (
                cors(a, true, these()),
                &asked,
                format!("allow-credentials: true; {echo}; expose-headers: x-b; vary: origin; x-a: 1"),
            ),
            (cors("*", false, Some(Listed::All)), &asked, "allow-origin: *; expose-headers: *; x-a: 1".to_owned()),
            (
                cors("*", true, Some(Listed::All)),
                &asked,
                format!("allow-credentials: true; {echo}; expose-headers: vary, x-a; vary: origin; x-a: 1"),
            ),
            (
                cors(a, true, these()),
                &none,
                "allow-credentials: true; allow-origin: server; vary: origin; x-a: 1".to_owned(),
            ),
        ] {
            let mut answer = map(&[
                ("x-a", "1"),
                ("access-control-allow-origin", "server"),
                ("access-control-allow-credentials", "true"),
            ]);
            Granted::of(&cors, &facts("GET", request)).say(&mut answer);
            assert_eq!(shown(&answer), expected, "{cors:?}");
        }
    }
}
