//! Which rule a request gets: the first candidate, in order of precedence, whose match holds.
//!
//! A header that comes several times counts as one with its values joined, and `host` is what the request is addressed to in
//! either version of HTTP. Of a query parameter that comes several times the first counts.

use std::borrow::Cow;

use http::HeaderMap;
use http::header::{COOKIE, HOST, HeaderName};

use crate::state::{PathMatch, RateLimit, RouteEntry, RouteMatch, RouteRule, Wanted};

/// What is looked at of a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestFacts<'a> {
    /// Method, as it came.
    pub method: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Host and perhaps port: `:authority`, or else the header `host`.
    pub authority: &'a str,
    /// Port of the Service that it came to.
    pub port: u16,
    /// Path, normalised.
    pub path: &'a str,
    /// What comes after the `?`.
    pub query: Option<&'a str>,
    /// Headers.
    pub headers: &'a HeaderMap,
}

impl<'a> RequestFacts<'a> {
    /// A header as one text. `None`: it is not there.
    pub fn header(&self, name: &HeaderName) -> Option<Cow<'a, str>> {
        if *name == HOST {
            return Some(Cow::Borrowed(self.authority));
        }
        let mut values = self.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
        let first = values.next()?;
        let separator = if *name == COOKIE { "; " } else { "," };
        Some(values.fold(first, |text, next| Cow::Owned(format!("{text}{separator}{next}"))))
    }

    /// The first value of a query parameter. `None`: it is not there.
    pub fn parameter(&self, name: &str) -> Option<Cow<'a, str>> {
        let pairs = self.query?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.map(|(key, value)| (decoded(key), value)).find(|(key, _)| key == name).map(|(_, value)| decoded(value))
    }

    /// Whether its client takes gRPC's way of saying no.
    pub fn is_grpc(&self) -> bool {
        let kind = self.headers.get(http::header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
        kind.is_some_and(|kind| kind.starts_with(b"application/grpc") && !kind.starts_with(b"application/grpc-web"))
    }
}

/// A form's text: `+` is a space, and escapes that are none are themselves.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['+', '%']) {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digit = |index: usize| after.get(index).and_then(|digit| char::from(*digit).to_digit(16));
        rest = after;
        match (first, digit(0), digit(1)) {
            (b'+', ..) => bytes.push(b' '),
            (b'%', Some(high), Some(low)) => {
                bytes.push((high << 4 | low) as u8);
                rest = after.get(2..).unwrap_or_default();
            }
            (byte, ..) => bytes.push(*byte),
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

/// The rule that a request gets.
#[derive(Clone, Debug)]
pub struct Found(RouteEntry);

impl Found {
    /// The rule.
    pub fn rule(&self) -> &RouteRule {
        self.0.rule()
    }

    /// What was found.
    pub fn candidate(&self) -> &RouteEntry {
        &self.0
    }

    /// What may come at all; to be asked before a turn is taken.
    pub fn limits(&self) -> &[RateLimit] {
        &self.rule().filters.limits
    }

    /// `HTTPRoute/shop/cart rules[0]`, or with its name: for records and explanations.
    pub fn text(&self) -> String {
        format!(
            "{} rules{}",
            self.0.route.id,
            match self.rule().name.is_empty() {
                true => format!("[{}]", self.0.rule),
                false => format!("[{}] ({})", self.0.rule, self.rule().name),
            }
        )
    }
}

/// The first candidate that matches. `None`: the request is answered 404.
pub fn find(candidates: &[RouteEntry], facts: &RequestFacts<'_>) -> Option<Found> {
    candidates.iter().find(|candidate| holds(candidate.wanted(), facts)).cloned().map(Found)
}

fn holds(wanted: &RouteMatch, facts: &RequestFacts<'_>) -> bool {
    let header = |(name, wanted): &(HeaderName, Wanted)| facts.header(name).is_some_and(|value| wanted.matches(&value));
    wanted.method.as_ref().is_none_or(|method| **method == *facts.method)
        && path_holds(&wanted.path, facts.path)
        && wanted.headers.iter().all(header)
        && wanted.query.iter().all(|(name, wanted)| facts.parameter(name).is_some_and(|value| wanted.matches(&value)))
}

fn path_holds(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Any => true,
        PathMatch::Exact(exact) => **exact == *path,
        PathMatch::Prefix(prefix) => below(path, prefix).is_some(),
        PathMatch::Regex(pattern) => pattern.matches(path),
        PathMatch::Grpc { service, method } => {
            let Some((of, name)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else { return false };
            let fits =
                |wanted: &Option<Wanted>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted.matches(value));
            !name.contains('/') && fits(service, of) && fits(method, name)
        }
    }
}

/// What follows a prefix of whole elements: nothing, or something with a slash in front.
pub(super) fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}
