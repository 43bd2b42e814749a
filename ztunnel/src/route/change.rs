//! What a route changes: headers, host, path, and where a redirect leads. Pure functions on http's types.
//!
//! Within one list of changes: set, then add, then remove. A rule's changes come before those of its backend on the request's
//! way, and after them on the response's. `host` is no header here: it follows the authority, which only a rewrite changes.

use http::HeaderMap;
use http::header::HOST;

use crate::route::find::{RequestFacts, below};
use crate::state::{HeaderChanges, PathChange, PathMatch, Redirect};

/// Makes the changes.
pub(super) fn headers(changes: &HeaderChanges, headers: &mut HeaderMap) {
    for (name, value) in &changes.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &changes.add {
        headers.append(name, value.clone());
    }
    for name in changes.remove.iter().filter(|name| **name != HOST) {
        headers.remove(name);
    }
}

/// The path after the change. A prefix is taken off as `matched` found it.
pub(super) fn path(change: &PathChange, matched: &PathMatch, path: &str) -> String {
    match change {
        PathChange::Full(full) => full.to_string(),
        PathChange::Prefix(replacement) => {
            let rest = match matched {
                PathMatch::Prefix(prefix) => below(path, prefix).unwrap_or_default(),
                PathMatch::Any => path,
                // Control refuses the change with any other match.
                _ => "",
            };
            let base = replacement.strip_suffix('/').unwrap_or(replacement);
            let text = format!("{base}{rest}");
            if text.starts_with('/') { text } else { format!("/{text}") }
        }
    }
}

/// The header `location`.
pub(super) fn location(redirect: &Redirect, matched: &PathMatch, facts: &RequestFacts<'_>) -> String {
    let (host, _) = split_authority(facts.authority);
    let host = redirect.hostname.as_deref().unwrap_or(host);
    let scheme = redirect.scheme.as_deref().unwrap_or(facts.scheme);
    let well_known = |scheme: &str| match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    let port = redirect.port.or_else(|| redirect.scheme.as_deref().and_then(well_known)).unwrap_or(facts.port);
    let port = if well_known(scheme) == Some(port) { String::new() } else { format!(":{port}") };
    let path = redirect.path.as_ref().map_or_else(|| facts.path.to_owned(), |c| self::path(c, matched, facts.path));
    let query = facts.query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{path}{query}")
}

/// Host and port of an authority; an IPv6 address keeps its brackets.
pub fn split_authority(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') && (!host.contains(':') || host.ends_with(']')) => (host, Some(port)),
        _ => (authority, None),
    }
}
