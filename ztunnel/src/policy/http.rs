//! Evaluation of policies on one request: what the connection shows, and method, path, host, headers and token besides.
//!
//! The algebra, the order and the words of a verdict are those of `l4`; only what a rule looks at is more. A policy without
//! HTTP fields is evaluated by its plain rules, so one call decides a request whole. Where bytes are not HTTP, `l4` decides
//! by what is left of a policy, which allows no more. Paths are compared as `route::path::normalise` spells them; a path that
//! it refuses never gets here. Where applications may read a request in several ways (a header in several lines, a host with
//! a dot at its end), the reading that denies more counts.

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderName;
use http::header::{COOKIE, HOST};
use serde_json::Value;
use tulle_certs::SpiffeId;

use crate::policy::jwt::Token;
use crate::policy::l4::{self, Facts};
use crate::policy::{Code, Verdict};
use crate::route::{RequestFacts, split_authority};
use crate::state::{Action, Element, Group, HttpMatch, HttpRule, PathPattern, Policy, Snapshot, StringMatch, Workload};

/// What is known of a request when it asks for admission.
#[derive(Clone, Copy, Debug)]
pub struct HttpFacts<'a> {
    /// Of its connection.
    pub connection: Facts<'a>,
    /// Of the request itself.
    pub request: RequestFacts<'a>,
    /// Verified by [`super::jwt::authenticate`]. `None`: it has none.
    pub token: Option<&'a Token>,
}

/// Whether requests to a workload are decided one by one: a policy with HTTP fields or a RequestAuthentication applies.
pub fn needs_http(snapshot: &Snapshot, workload: &Workload) -> bool {
    !workload.request_auths.is_empty() || snapshot.policies_for(workload).any(|policy| policy.http.is_some())
}

/// Decides a request.
pub fn evaluate_request(snapshot: &Snapshot, facts: &HttpFacts<'_>) -> Verdict {
    let missing = facts.connection.destination.request_auths.iter().find(|id| snapshot.request_auth(id).is_none());
    if let Some(missing) = missing {
        return l4::refusal(Code::PolicyPending, Some(missing.clone()));
    }
    let seen =
        Seen { facts, authority: lower(facts.request.authority), principal: facts.token.and_then(Token::principal) };
    l4::decide(snapshot, &facts.connection, |policy| matching_rule(policy, &seen))
}

/// Decides what can be decided of a connection before its first request: as if every request were let in by each policy
/// with HTTP fields. What it refuses, no request could be allowed.
pub fn evaluate_connection(snapshot: &Snapshot, facts: &Facts<'_>) -> Verdict {
    let missing = facts.destination.request_auths.iter().find(|id| snapshot.request_auth(id).is_none());
    if let Some(missing) = missing {
        return l4::refusal(Code::PolicyPending, Some(missing.clone()));
    }
    let verdict = l4::decide(snapshot, facts, |policy| match policy.http {
        None => l4::matching_rule(policy, facts),
        Some(_) => (policy.action == Action::Allow).then_some(0),
    });
    // What policies without effect say is said of each request, and of the connection where none will come.
    let dry_run = if verdict.allowed { Vec::new() } else { l4::evaluate(snapshot, facts).dry_run };
    Verdict { dry_run, ..verdict }
}

/// What several rules look at, made once.
struct Seen<'a> {
    facts: &'a HttpFacts<'a>,
    authority: Cow<'a, str>,
    principal: Option<String>,
}

fn lower(text: &str) -> Cow<'_, str> {
    match text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        true => Cow::Owned(text.to_ascii_lowercase()),
        false => Cow::Borrowed(text),
    }
}

fn matching_rule(policy: &Policy, seen: &Seen<'_>) -> Option<usize> {
    match &policy.http {
        None => l4::matching_rule(policy, &seen.facts.connection),
        Some(rules) => rules.iter().position(|rule| rule_matches(rule, policy, seen)),
    }
}

fn rule_matches(rule: &HttpRule, policy: &Policy, seen: &Seen<'_>) -> bool {
    rule.clauses.iter().all(|matches| matches.iter().any(|only| match_holds(only, policy, seen)))
}

fn match_holds(only: &HttpMatch, policy: &Policy, seen: &Seen<'_>) -> bool {
    let HttpMatch {
        connection,
        hosts,
        methods,
        paths,
        request_principals,
        audiences,
        presenters,
        headers,
        claims,
        remote_ips,
        trust_domains,
    } = only;
    let says_something = !(connection.is_empty()
        && hosts.is_empty()
        && methods.is_empty()
        && paths.is_empty()
        && request_principals.is_empty()
        && audiences.is_empty()
        && presenters.is_empty()
        && headers.is_empty()
        && claims.is_empty()
        && remote_ips.is_empty()
        && trust_domains.is_empty());
    let Seen { facts, authority, principal } = seen;
    let (request, token) = (&facts.request, facts.token);
    let host = split_authority(authority).0;
    let claim = |group: &Group<StringMatch>, path: &[Arc<str>]| claim_holds(group, token, path);
    let named = |group: &Group<StringMatch>, name: &str| claim_holds(group, token, &[name.into()]);
    let trust_domain = facts.connection.source_identity.map(SpiffeId::trust_domain);

    says_something
        && (connection.is_empty() || l4::match_holds(connection, policy.action, &facts.connection))
        && methods.holds(|wanted| wanted.matches(request.method))
        && paths.holds(|wanted| path_matches(wanted, request.path))
        && in_doubt(
            hosts,
            policy.action,
            |wanted| [&**authority, host, relative(host)].into_iter().any(|read| wanted.matches(read)),
            |wanted| [&**authority, host].into_iter().any(|read| wanted.matches(read)),
        )
        && request_principals.holds(|wanted| principal.as_ref().is_some_and(|principal| wanted.matches(principal)))
        && named(audiences, "aud")
        && named(presenters, "azp")
        && headers.iter().all(|(name, group)| header_holds(name, group, policy.action, request))
        && claims.iter().all(|(path, group)| claim(group, path))
        && remote_ips.holds(|net| net.contains(&facts.connection.source_ip.to_canonical()))
        && trust_domains.holds(|wanted| trust_domain.is_some_and(|domain| wanted.matches(domain)))
}

/// Like [`Group::holds`] where a request can be read in several ways: `perhaps` says what one of them hits, `surely` what all
/// do. The reading that denies more counts.
fn in_doubt<T>(group: &Group<T>, action: Action, perhaps: impl Fn(&T) -> bool, surely: impl Fn(&T) -> bool) -> bool {
    let deny = action.suspects();
    let any = |wanted: &T| if deny { perhaps(wanted) } else { surely(wanted) };
    let none = |wanted: &T| if deny { surely(wanted) } else { perhaps(wanted) };
    (group.any.is_empty() || group.any.iter().any(any)) && !group.none.iter().any(none)
}

/// `cart.shop.` is the same host as `cart.shop`.
fn relative(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

/// Of a header that comes in several lines an application may take all for one text, the first, or the last.
fn header_holds(name: &HeaderName, group: &Group<StringMatch>, action: Action, request: &RequestFacts<'_>) -> bool {
    let Some(whole) = request.header(name) else { return group.holds(|_| false) };
    if *name == HOST {
        let small = lower(&whole);
        return in_doubt(group, action, |w| w.matches(&whole) || w.matches(&small), |w| w.matches(&whole));
    }
    // HTTP/2 sends one cookie a line (RFC 9113 §8.2.3).
    if *name == COOKIE {
        return group.holds(|wanted| wanted.matches(&whole));
    }
    let lines = request.headers.get_all(name).iter();
    let all: Vec<Cow<'_, str>> = lines.map(|line| String::from_utf8_lossy(line.as_bytes())).collect();
    let perhaps = |wanted: &StringMatch| wanted.matches(&whole) || all.iter().any(|line| wanted.matches(line));
    let surely = |wanted: &StringMatch| wanted.matches(&whole) && all.iter().all(|line| wanted.matches(line));
    in_doubt(group, action, perhaps, surely)
}

/// A claim is a text or a list of texts, of which any may hit; `scope` and `permission` hold several, with spaces between.
fn claim_holds(group: &Group<StringMatch>, token: Option<&Token>, path: &[Arc<str>]) -> bool {
    if group.is_empty() {
        return true;
    }
    let Some((first, rest)) = path.split_first() else { return false };
    let outermost = token.and_then(|token| token.claims.get(&**first));
    let value = rest.iter().try_fold(outermost, |value, name| value.map(|value| value.get(&**name)));
    let spaced = matches!(path.last().map(|name| &**name), Some("scope" | "permission"));
    let hits = |wanted: &StringMatch| match value.flatten() {
        Some(Value::String(text)) if spaced => text.split(' ').any(|part| wanted.matches(part)),
        Some(Value::String(text)) => wanted.matches(text),
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).any(|item| wanted.matches(item)),
        _ => false,
    };
    group.holds(hits)
}

fn path_matches(wanted: &PathPattern, path: &str) -> bool {
    match wanted {
        PathPattern::Text(text) => text.matches(path),
        PathPattern::Template(elements) => template_matches(elements, path),
    }
}

fn template_matches(elements: &[Element], path: &str) -> bool {
    let Some(path) = path.strip_prefix('/') else { return false };
    let mut parts = path.split('/');
    for element in elements {
        match element {
            // Also when nothing follows, with or without the slash before it.
            Element::Rest => return true,
            Element::One if parts.next().is_some_and(|part| !part.is_empty()) => {}
            Element::Exact(exact) if parts.next() == Some(exact) => {}
            Element::One | Element::Exact(_) => return false,
        }
    }
    parts.next().is_none()
}
