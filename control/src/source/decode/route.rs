//! HTTPRoute and GRPCRoute; what single filters say is in `filter`.
//!
//! What the API server's schema would refuse (a number where a string belongs) refuses the object. What it would take and we
//! cannot carry out (an expression that does not compile, a filter that we do not have) is kept as the problem of its rule:
//! the rule then answers 500, and a condition says why.

use std::sync::Arc;

use regex::RegexBuilder;

use crate::model::{
    BackendRef, HeaderChanges, Meta, Object, ParentRef, PathChange, PathMatch, Route, RouteFilter, RouteKind,
    RouteMatch, RouteRetry, RouteRule, Wanted,
};
use crate::source::decode::filter;
use crate::source::decode::session::session;
use crate::source::tree::{Cursor, Read};

/// The API's limits.
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;
const MAX_REFS: usize = 32;
/// What the node allows an expression, bytes.
const MAX_EXPRESSION: usize = 256 * 1024;
/// 0 to 1,000,000, as the API says.
const MAX_WEIGHT: i64 = 1_000_000;

/// The first problem of a rule; the rest is read all the same.
pub(super) type Problem = Option<String>;

pub(super) fn route(kind: RouteKind, at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    spec.only(&["parentRefs", "hostnames", "rules", "useDefaultGateways"])?;
    let parents = bounded(&spec.get("parentRefs"), MAX_REFS)?.iter().map(parent).collect::<Read<_>>()?;
    let rules_at = spec.get("rules");
    let mut rules = bounded(&rules_at, MAX_RULES)?.iter().map(|at| rule(kind, at)).collect::<Read<Vec<_>>>()?;
    if rules.is_empty() && rules_at.is_absent() {
        // The API's default.
        rules.push(RouteRule::default());
    }
    for (index, rule) in rules.iter_mut().enumerate() {
        if let Some(session) = rule.session.as_mut().filter(|session| session.name.is_empty()) {
            let which = if rule.name.is_empty() { index.to_string() } else { rule.name.clone() };
            session.name = format!("tulle-session-{}-{which}", meta.name);
        }
    }
    Ok(Object::Route(Arc::new(Route { kind, meta, parents, rules })))
}

pub(super) fn bounded<'a>(at: &Cursor<'a>, most: usize) -> Read<Vec<Cursor<'a>>> {
    let items = at.list()?;
    if items.len() > most {
        return Err(at.error(format!("has {} items; at most {most} are allowed", items.len())));
    }
    Ok(items)
}

fn optional(at: &Cursor<'_>) -> Read<Option<String>> {
    Ok(at.text()?.map(str::to_owned))
}

fn parent(at: &Cursor<'_>) -> Read<ParentRef> {
    at.only(&["group", "kind", "namespace", "name", "sectionName", "port"])?;
    Ok(ParentRef {
        group: optional(&at.get("group"))?,
        kind: optional(&at.get("kind"))?,
        namespace: optional(&at.get("namespace"))?,
        name: at.get("name").required_text()?.to_owned(),
        section_name: optional(&at.get("sectionName"))?,
        port: at.get("port").port()?,
    })
}

fn rule(kind: RouteKind, at: &Cursor<'_>) -> Read<RouteRule> {
    let mut problem: Problem = None;
    for (key, field) in at.map()? {
        if !matches!(key, "name" | "matches" | "filters" | "backendRefs" | "timeouts" | "retry" | "sessionPersistence")
        {
            problem = problem.or_else(|| Some(field.error("is not supported").to_string()));
        }
    }
    let mut matches = Vec::new();
    for item in bounded(&at.get("matches"), MAX_MATCHES)? {
        matches.push(match kind {
            RouteKind::Http => http_match(&item, &mut problem)?,
            RouteKind::Grpc => grpc_match(&item, &mut problem)?,
        });
    }
    let filters = filters(&at.get("filters"), &mut problem)?;
    let mut backends = Vec::new();
    for item in bounded(&at.get("backendRefs"), MAX_RULES)? {
        backends.push(backend(&item, true, &mut problem)?);
    }
    let timeouts = at.get("timeouts");
    timeouts.only(&["request", "backendRequest"])?;
    let request_timeout_ms = duration(&timeouts.get("request"), &mut problem)?;
    let backend_timeout_ms = duration(&timeouts.get("backendRequest"), &mut problem)?;
    if request_timeout_ms > 0 && backend_timeout_ms > request_timeout_ms {
        note(&mut problem, &timeouts, "backendRequest is longer than request");
    }
    let retry = retry(&at.get("retry"), &mut problem)?;
    let session = session(&at.get("sessionPersistence"), &mut problem)?;
    let name = at.get("name").text_or_empty()?;
    let timed = RouteRule { request_timeout_ms, backend_timeout_ms, retry, session, ..RouteRule::default() };
    let rule = RouteRule { name, matches, filters, backends, ..timed };
    Ok(RouteRule { problem: problem.or_else(|| incompatible(&rule, at)), ..rule })
}

/// What the API forbids together.
fn incompatible(rule: &RouteRule, at: &Cursor<'_>) -> Problem {
    let has = |wanted: fn(&RouteFilter) -> bool| rule.filters.iter().filter(|filter| wanted(filter)).count();
    let redirects = has(|filter| matches!(filter, RouteFilter::Redirect { .. }));
    let rewrites = has(|filter| matches!(filter, RouteFilter::Rewrite { .. }));
    let filters = at.get("filters");
    if redirects > 0 && rewrites > 0 {
        return Some(filters.error("RequestRedirect and URLRewrite exclude each other").to_string());
    }
    if redirects > 0 && !rule.backends.is_empty() {
        return Some(filters.error("a RequestRedirect excludes backendRefs").to_string());
    }
    let changes_prefix = rule.filters.iter().any(|filter| {
        matches!(
            filter,
            RouteFilter::Rewrite { path: Some(PathChange::Prefix(_)), .. }
                | RouteFilter::Redirect { path: Some(PathChange::Prefix(_)), .. }
        )
    });
    let is_prefix = |wanted: &RouteMatch| matches!(wanted.path, None | Some(PathMatch::Prefix(_)));
    if changes_prefix && !rule.matches.iter().all(is_prefix) {
        return Some(filters.error("ReplacePrefixMatch needs PathPrefix in every match of the rule").to_string());
    }
    let twice = redirects > 1
        || rewrites > 1
        || has(|filter| matches!(filter, RouteFilter::RequestHeaders(_))) > 1
        || has(|filter| matches!(filter, RouteFilter::ResponseHeaders(_))) > 1;
    twice.then(|| filters.error("has a filter twice that may be there once").to_string())
}

pub(super) fn note(problem: &mut Problem, at: &Cursor<'_>, message: &str) {
    if problem.is_none() {
        *problem = Some(at.error(message).to_string());
    }
}

fn http_match(at: &Cursor<'_>, problem: &mut Problem) -> Read<RouteMatch> {
    at.only(&["path", "method", "headers", "queryParams"])?;
    Ok(RouteMatch {
        path: path(&at.get("path"), problem)?,
        method: at.get("method").text_or_empty()?,
        headers: values(&at.get("headers"), true, problem)?,
        query: values(&at.get("queryParams"), false, problem)?,
        grpc: None,
    })
}

fn grpc_match(at: &Cursor<'_>, problem: &mut Problem) -> Read<RouteMatch> {
    at.only(&["method", "headers"])?;
    let method = at.get("method");
    method.only(&["type", "service", "method"])?;
    let (service, name) = (method.get("service").text_or_empty()?, method.get("method").text_or_empty()?);
    let regex = is_regex(&method, problem)?;
    if regex {
        compiles(&service, &method.get("service"), problem);
        compiles(&name, &method.get("method"), problem);
    }
    let grpc = (!service.is_empty() || !name.is_empty()).then_some((service, name, regex));
    let headers = values(&at.get("headers"), true, problem)?;
    Ok(RouteMatch { grpc, headers, ..RouteMatch::default() })
}

fn is_regex(at: &Cursor<'_>, problem: &mut Problem) -> Read<bool> {
    let kind = at.get("type");
    Ok(match kind.text()? {
        None | Some("Exact") => false,
        Some("RegularExpression") => true,
        Some(other) => {
            note(problem, &kind, &format!("`{other}` is neither Exact nor RegularExpression"));
            false
        }
    })
}

fn compiles(text: &str, at: &Cursor<'_>, problem: &mut Problem) {
    let built = RegexBuilder::new(&format!("^(?:{text})$")).size_limit(MAX_EXPRESSION).build();
    if let Err(error) = built {
        let message = error.to_string();
        note(problem, at, &format!("cannot be used as an expression: {}", message.lines().last().unwrap_or_default()));
    }
}

fn path(at: &Cursor<'_>, problem: &mut Problem) -> Read<Option<PathMatch>> {
    at.only(&["type", "value"])?;
    if at.is_absent() {
        return Ok(None);
    }
    let (kind, value) = (at.get("type"), at.get("value"));
    let text = value.text()?.unwrap_or("/").to_owned();
    if !text.starts_with('/') && kind.text()? != Some("RegularExpression") {
        note(problem, &value, "does not begin with a slash");
    }
    Ok(Some(match kind.text()? {
        None | Some("PathPrefix") => PathMatch::Prefix(text),
        Some("Exact") => PathMatch::Exact(text),
        Some("RegularExpression") => {
            compiles(&text, &value, problem);
            PathMatch::Regex(text)
        }
        Some(other) => {
            note(problem, &kind, &format!("`{other}` is none of Exact, PathPrefix, RegularExpression"));
            PathMatch::Exact(text)
        }
    }))
}

fn values(at: &Cursor<'_>, header: bool, problem: &mut Problem) -> Read<Vec<(String, Wanted)>> {
    let mut values = Vec::new();
    for item in bounded(at, MAX_RULES)? {
        item.only(&["type", "name", "value"])?;
        let name = item.get("name").required_text()?;
        let value = item.get("value").text_or_empty()?;
        let wanted = if is_regex(&item, problem)? {
            compiles(&value, &item.get("value"), problem);
            Wanted::Regex(value)
        } else {
            Wanted::Exact(value)
        };
        if header && !is_header_name(name) {
            note(problem, &item.get("name"), "is no name of a header");
        }
        let name = if header { name.to_ascii_lowercase() } else { name.to_owned() };
        values.push((name, wanted));
    }
    Ok(values)
}

/// RFC 9110, section 5.1.
pub(super) fn is_header_name(text: &str) -> bool {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.len() <= 256 && text.bytes().all(token)
}

fn filters(at: &Cursor<'_>, problem: &mut Problem) -> Read<Vec<RouteFilter>> {
    let mut filters = Vec::new();
    for item in bounded(at, MAX_RULES)? {
        let kind = item.get("type");
        match kind.required_text()? {
            "RequestHeaderModifier" => {
                let changes = header_changes(&item.get("requestHeaderModifier"), problem)?;
                filters.push(RouteFilter::RequestHeaders(changes));
            }
            "ResponseHeaderModifier" => {
                let changes = header_changes(&item.get("responseHeaderModifier"), problem)?;
                filters.push(RouteFilter::ResponseHeaders(changes));
            }
            "RequestRedirect" => filters.push(redirect(&item.get("requestRedirect"), problem)?),
            "URLRewrite" => {
                let at = item.get("urlRewrite");
                at.only(&["hostname", "path"])?;
                let path = path_change(&at.get("path"), problem)?;
                filters.push(RouteFilter::Rewrite { hostname: at.get("hostname").text_or_empty()?, path });
            }
            "CORS" if filters.iter().any(|one| matches!(one, RouteFilter::Cors(_))) => {
                note(problem, &kind, "comes twice in a rule");
            }
            "CORS" => filters.push(RouteFilter::Cors(filter::cors(&item.get("cors"), problem)?)),
            "RequestMirror" => filters.push(mirror(&item.get("requestMirror"), problem)?),
            "ExtensionRef" => {
                let at = item.get("extensionRef");
                filters.push(RouteFilter::Extension {
                    group: at.get("group").text_or_empty()?,
                    kind: at.get("kind").required_text()?.to_owned(),
                    name: at.get("name").required_text()?.to_owned(),
                });
            }
            other => note(problem, &kind, &format!("the filter `{other}` is not supported")),
        }
    }
    Ok(filters)
}

fn header_changes(at: &Cursor<'_>, problem: &mut Problem) -> Read<HeaderChanges> {
    at.only(&["set", "add", "remove"])?;
    let mut pairs = |key: &str| -> Read<Vec<(String, String)>> {
        let mut pairs = Vec::new();
        for item in bounded(&at.get(key), MAX_RULES)? {
            let (name, value) = (item.get("name").required_text()?, item.get("value").text_or_empty()?);
            if !is_header_name(name) || value.bytes().any(|byte| byte < 0x20 && byte != b'\t' || byte == 0x7f) {
                note(problem, &item, "is no header");
            }
            pairs.push((name.to_ascii_lowercase(), value));
        }
        Ok(pairs)
    };
    let (set, add) = (pairs("set")?, pairs("add")?);
    let remove: Vec<String> =
        at.get("remove").texts()?.into_iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
    if remove.iter().any(|name| !is_header_name(name)) {
        note(problem, &at.get("remove"), "has what is no name of a header");
    }
    if set.iter().chain(&add).map(|(name, _)| name).chain(&remove).any(|name| name == "host") {
        note(problem, at, "changes `host`; use URLRewrite with hostname");
    }
    Ok(HeaderChanges { set, add, remove })
}

fn redirect(at: &Cursor<'_>, problem: &mut Problem) -> Read<RouteFilter> {
    at.only(&["scheme", "hostname", "path", "port", "statusCode"])?;
    let status_at = at.get("statusCode");
    let status = status_at.int()?.unwrap_or(302);
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        note(problem, &status_at, &format!("{status} is none of 301, 302, 303, 307, 308"));
    }
    let scheme = at.get("scheme").text_or_empty()?;
    if !matches!(scheme.as_str(), "" | "http" | "https") {
        note(problem, &at.get("scheme"), "is neither http nor https");
    }
    Ok(RouteFilter::Redirect {
        scheme,
        hostname: at.get("hostname").text_or_empty()?,
        port: at.get("port").port()?,
        path: path_change(&at.get("path"), problem)?,
        status: u16::try_from(status).unwrap_or(302),
    })
}

fn path_change(at: &Cursor<'_>, problem: &mut Problem) -> Read<Option<PathChange>> {
    at.only(&["type", "replaceFullPath", "replacePrefixMatch"])?;
    if at.is_absent() {
        return Ok(None);
    }
    let kind = at.get("type");
    let change = match kind.required_text()? {
        "ReplaceFullPath" => PathChange::Full(at.get("replaceFullPath").text_or_empty()?),
        "ReplacePrefixMatch" => PathChange::Prefix(at.get("replacePrefixMatch").text_or_empty()?),
        other => {
            note(problem, &kind, &format!("`{other}` is neither ReplaceFullPath nor ReplacePrefixMatch"));
            return Ok(None);
        }
    };
    let (PathChange::Full(text) | PathChange::Prefix(text)) = &change;
    if !text.bytes().all(|byte| matches!(byte, 0x21..=0x7e) && byte != b'?' && byte != b'#') {
        note(problem, at, "has a character that has no place in a path");
    }
    Ok(Some(change))
}

fn mirror(at: &Cursor<'_>, problem: &mut Problem) -> Read<RouteFilter> {
    at.only(&["backendRef", "percent", "fraction"])?;
    let to = backend(&at.get("backendRef"), false, problem)?;
    let (percent, fraction) = (at.get("percent"), at.get("fraction"));
    let number = |at: &Cursor<'_>, otherwise: i64| -> Read<u32> {
        let value = at.int()?.unwrap_or(otherwise);
        u32::try_from(value).map_err(|_| at.error(format!("{value} is out of range")))
    };
    let share = match (percent.is_absent(), fraction.is_absent()) {
        (true, true) => (1, 1),
        (false, _) => (number(&percent, 100)?, 100),
        (true, false) => (number(&fraction.get("numerator"), 0)?, number(&fraction.get("denominator"), 100)?),
    };
    if share.1 == 0 || share.0 > share.1 {
        note(problem, at, "mirrors more than all requests");
    }
    Ok(RouteFilter::Mirror { to, share: (share.0, share.1.max(1)) })
}

fn backend(at: &Cursor<'_>, in_rule: bool, problem: &mut Problem) -> Read<BackendRef> {
    let weight_at = at.get("weight");
    let weight = weight_at.int()?.unwrap_or(1);
    if !(0..=MAX_WEIGHT).contains(&weight) {
        return Err(weight_at.error(format!("{weight} is not from 0 to {MAX_WEIGHT}")));
    }
    let filters = if in_rule { filters(&at.get("filters"), problem)? } else { Vec::new() };
    if filters.iter().any(|filter| {
        matches!(
            filter,
            RouteFilter::Redirect { .. }
                | RouteFilter::Mirror { .. }
                | RouteFilter::Extension { .. }
                | RouteFilter::Cors(_)
        )
    }) {
        note(problem, &at.get("filters"), "a backend takes header modifiers and URLRewrite only");
    }
    Ok(BackendRef {
        group: at.get("group").text_or_empty()?,
        kind: at.get("kind").text()?.unwrap_or("Service").to_owned(),
        namespace: at.get("namespace").text_or_empty()?,
        name: at.get("name").required_text()?.to_owned(),
        port: at.get("port").port()?,
        weight: u32::try_from(weight).unwrap_or_default(),
        filters,
    })
}

fn retry(at: &Cursor<'_>, problem: &mut Problem) -> Read<Option<RouteRetry>> {
    at.only(&["codes", "attempts", "backoff"])?;
    if at.is_absent() {
        return Ok(None);
    }
    let mut codes = Vec::new();
    for code in bounded(&at.get("codes"), 200)? {
        match code.int()?.and_then(|code| u16::try_from(code).ok()).filter(|code| (400..=599).contains(code)) {
            Some(code) => codes.push(code),
            None => note(problem, &code, "is no status from 400 to 599"),
        }
    }
    let attempts = at.get("attempts").int()?.unwrap_or(1);
    let backoff_ms = duration(&at.get("backoff"), problem)?;
    Ok(Some(RouteRetry { attempts: u32::try_from(attempts).unwrap_or(1).clamp(1, 100), codes, backoff_ms }))
}

/// GEP-2257: up to four of `<digits><h|m|s|ms>`. Milliseconds; absent is 0.
pub(super) fn duration(at: &Cursor<'_>, problem: &mut Problem) -> Read<u32> {
    let Some(text) = at.text()? else { return Ok(0) };
    match milliseconds(text) {
        Some(value) => Ok(value),
        None => {
            note(problem, at, &format!("`{text}` is no duration such as 10s or 1m30s"));
            Ok(0)
        }
    }
}

pub(super) fn milliseconds(text: &str) -> Option<u32> {
    let mut rest = text;
    let mut sum: u64 = 0;
    for _ in 0..4 {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = rest.get(..digits)?.parse().ok().filter(|_| digits <= 5)?;
        rest = rest.get(digits..)?;
        let (unit, after) = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)]
            .into_iter()
            .find_map(|(unit, factor)| Some((factor, rest.strip_prefix(unit)?)))?;
        sum += number * unit;
        rest = after;
        if rest.is_empty() {
            return Some(u32::try_from(sum).unwrap_or(u32::MAX));
        }
    }
    None
}
