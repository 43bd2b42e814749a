//! Decodes `tulle.mesh.v1alpha1.Route`.
//!
//! What is not understood in a rule makes that rule a broken one, which answers 500: leaving a match or a filter out would
//! send requests where nobody meant them to go. What is not understood of a backend makes its share invalid. A field of
//! a later version is such a thing. Only a route that cannot be read at all, says that it is another one, or has such a field
//! outside its rules is rejected; then its last good version stays.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use prost::Message;
use tulle_proto::mesh as wire;
use tulle_proto::mesh::path_change::Change as WirePath;
use tulle_proto::mesh::route_filter::Filter;
use tulle_proto::mesh::{route_path, route_value};

use crate::state::{
    Abort, Backend, Cors, Fault, Filters, GRPC_ROUTE, HTTP_ROUTE, HeaderChanges, Listed, Mirror, PathChange, PathMatch,
    Pattern, RateLimit, Redirect, Retry, Rewrite, Route, RouteKind, RouteMatch, RouteParent, RouteRule, ServiceName,
    SessionRule, Turns, Wanted,
};
use crate::xds::decode::field::{self, Strings};
use crate::xds::decode::schemas;
use crate::xds::wire::unknown_fields;

/// More than the API allows; each match is one step of a walk that every request makes.
const MAX_MATCHES: usize = 1024;
/// Retries of one request beyond which only load is made.
const MAX_ATTEMPTS: u32 = 100;

/// See the module's header. `node` decides in which place its turns begin. The error is what is wrong, as one clause.
pub(super) fn route(bytes: &[u8], id: &str, version: &str, node: &str, strings: &mut Strings) -> Result<Route, String> {
    let from = wire::Route::decode(bytes).map_err(|error| format!("it is no Route: {error}"))?;
    let (kind, prefix) = match field::known("kind", from.kind)? {
        wire::RouteKind::Http => (RouteKind::Http, HTTP_ROUTE),
        wire::RouteKind::Grpc => (RouteKind::Grpc, GRPC_ROUTE),
    };
    if format!("{prefix}{}/{}", from.namespace, from.name) != id {
        return Err("its content has another name than the resource".to_owned());
    }
    if from.rules.iter().map(|rule| rule.matches.len().max(1)).sum::<usize>() > MAX_MATCHES {
        return Err(format!("it has more than {MAX_MATCHES} matches"));
    }
    let mut parents = Vec::with_capacity(from.parents.len());
    for parent in &from.parents {
        parents.push(RouteParent {
            service: service(parent.service.as_ref(), strings)?,
            ports: parent.ports.iter().map(|port| field::port("parents.ports", *port)).collect::<Result<_, _>>()?,
        });
    }
    let mut rules: Vec<RouteRule> = from.rules.iter().map(|one| rule(one, strings)).collect();
    let unknown = unknown_fields(bytes, &schemas::ROUTE).ok_or("its bytes cannot be walked")?;
    for path in &unknown {
        mark_unknown(&mut rules, path)?;
    }
    for (index, rule) in rules.iter_mut().enumerate() {
        rule.turns = Arc::new(Turns::of(node, id, &rule.key(index)));
    }
    Ok(Route {
        id: id.into(),
        version: version.into(),
        namespace: strings.share(&from.namespace),
        kind,
        created: from.created,
        parents,
        rules,
    })
}

/// Counts a field of a later version against the share of the backend, or the rule, that it is in.
fn mark_unknown(rules: &mut [RouteRule], path: &[(u32, usize)]) -> Result<(), String> {
    let Some((schemas::ROUTE_RULES, index)) = path.first() else { return Err(schemas::NOT_KNOWN.to_owned()) };
    let rule = rules.get_mut(*index).ok_or(schemas::NOT_KNOWN)?;
    let of_backend = match path.get(1) {
        Some((schemas::RULE_BACKENDS, index)) => rule.backends.get_mut(*index),
        _ => None,
    };
    let why = of_backend.map_or(&mut rule.broken, |backend| &mut backend.invalid);
    why.get_or_insert_with(|| schemas::NOT_KNOWN.into());
    Ok(())
}

pub(super) fn service(from: Option<&wire::ServiceRef>, strings: &mut Strings) -> Result<ServiceName, String> {
    let from = from.filter(|from| !from.namespace.is_empty() && !from.hostname.is_empty());
    let from = from.ok_or_else(|| "a reference names no service".to_owned())?;
    Ok(ServiceName { namespace: strings.share(&from.namespace), hostname: strings.share(&from.hostname) })
}

fn rule(from: &wire::RouteRule, strings: &mut Strings) -> RouteRule {
    let mut broken = Some(from.broken.clone()).filter(|why| !why.is_empty());
    let mut matches: Vec<RouteMatch> = Vec::new();
    for one in &from.matches {
        match route_match(one, &mut broken) {
            Ok(wanted) => matches.push(wanted),
            // No request has a header of such a name. It catches nothing.
            Err(why) => broken = broken.or(Some(why)),
        }
    }
    if from.matches.is_empty() {
        matches.push(RouteMatch::default());
    }
    let filters = filters(&from.filters, strings).unwrap_or_else(|why| {
        broken = broken.take().or(Some(why));
        Filters::default()
    });
    let session = from.session.as_ref().map(session).transpose().unwrap_or_else(|why| {
        broken = broken.take().or(Some(why));
        None
    });
    let millis = |value: u32| (value > 0).then(|| Duration::from_millis(value.into()));
    RouteRule {
        name: from.name.as_str().into(),
        matches,
        filters,
        backends: from.backends.iter().map(|one| backend(one, strings)).collect(),
        request_timeout: millis(from.request_timeout_ms),
        backend_timeout: millis(from.backend_request_timeout_ms),
        retry: from.retry.as_ref().and_then(retry),
        session,
        broken: broken.map(Into::into),
        turns: Arc::default(),
    }
}

fn session(from: &wire::RouteSession) -> Result<SessionRule, String> {
    // The name of a cookie is a token, too.
    let name = header_name(&from.name)?;
    let millis = |value: u32| (value > 0).then(|| Duration::from_millis(value.into()));
    Ok(SessionRule {
        cookie: (!from.header).then(|| from.name.as_str().into()),
        header: from.header.then_some(name),
        permanent: from.permanent,
        absolute: millis(from.absolute_ms),
        idle: millis(from.idle_ms),
    })
}

fn retry(from: &wire::RouteRetry) -> Option<Retry> {
    (from.attempts > 0).then(|| Retry {
        attempts: from.attempts.min(MAX_ATTEMPTS),
        codes: from.codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect(),
        backoff: Duration::from_millis(if from.backoff_ms == 0 { 25 } else { from.backoff_ms.into() }),
        any_method: from.any_method,
    })
}

/// What is not understood of a match holds for everything, and `broken` says why the rule answers 500: which requests were
/// meant is not known, and none of them may get to the next rule.
fn route_match(from: &wire::RouteMatch, broken: &mut Option<String>) -> Result<RouteMatch, String> {
    let mut headers = Vec::with_capacity(from.headers.len());
    for header in &from.headers {
        let name = header_name(&header.name)?;
        // The first entry of a name counts, as the API says.
        if !headers.iter().any(|(known, _)| *known == name) {
            headers.push((name, wanted(header, broken)));
        }
    }
    let mut query: Vec<(Arc<str>, Wanted)> = Vec::with_capacity(from.query.len());
    for parameter in &from.query {
        if !query.iter().any(|(known, _)| **known == *parameter.name) {
            query.push((parameter.name.as_str().into(), wanted(parameter, broken)));
        }
    }
    let path = match &from.grpc {
        Some(grpc) => grpc_path(grpc, broken),
        None => path(from.path.as_ref(), broken),
    };
    let method = Some(from.method.as_str()).filter(|method| !method.is_empty()).map(Into::into);
    Ok(RouteMatch { path, method, headers, query })
}

fn unclear(why: String, broken: &mut Option<String>) -> Pattern {
    broken.get_or_insert(why);
    Pattern::unclear()
}

fn pattern(text: &str, broken: &mut Option<String>) -> Pattern {
    Pattern::new(text).unwrap_or_else(|why| unclear(format!("{text:?} cannot be used as an expression: {why}"), broken))
}

fn path(from: Option<&wire::RoutePath>, broken: &mut Option<String>) -> PathMatch {
    let Some(from) = from else { return PathMatch::Any };
    match &from.path {
        Some(route_path::Path::Exact(exact)) => PathMatch::Exact(exact.as_str().into()),
        Some(route_path::Path::Prefix(prefix)) => match prefix.trim_end_matches('/') {
            "" => PathMatch::Any,
            prefix => PathMatch::Prefix(prefix.into()),
        },
        Some(route_path::Path::Regex(text)) => PathMatch::Regex(pattern(text, broken)),
        None => {
            let why = "a path is compared in a way that this proxy does not know";
            PathMatch::Regex(unclear(why.to_owned(), broken))
        }
    }
}

fn grpc_path(from: &wire::GrpcMethod, broken: &mut Option<String>) -> PathMatch {
    let mut part = |text: &str| {
        (!text.is_empty()).then(|| match from.regex {
            true => Wanted::Regex(pattern(text, broken)),
            false => Wanted::Exact(text.into()),
        })
    };
    let (service, method) = (part(&from.service), part(&from.method));
    if service.is_none() && method.is_none() { PathMatch::Any } else { PathMatch::Grpc { service, method } }
}

fn wanted(from: &wire::RouteValue, broken: &mut Option<String>) -> Wanted {
    match &from.value {
        Some(route_value::Value::Exact(exact)) => Wanted::Exact(exact.as_str().into()),
        Some(route_value::Value::Regex(text)) => Wanted::Regex(pattern(text, broken)),
        None => {
            let why = "a value is compared in a way that this proxy does not know";
            Wanted::Regex(unclear(why.to_owned(), broken))
        }
    }
}

pub(super) fn header_name(text: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("{text:?} is no name of a header"))
}

fn filters(from: &[wire::RouteFilter], strings: &mut Strings) -> Result<Filters, String> {
    let mut filters = Filters::default();
    for one in from {
        match one.filter.as_ref().ok_or("it has a filter that this proxy does not know")? {
            Filter::RequestHeaders(changes) => filters.request = header_changes(changes)?,
            Filter::ResponseHeaders(changes) => filters.response = header_changes(changes)?,
            Filter::Redirect(from) => filters.redirect = Some(redirect(from)?),
            Filter::Rewrite(from) => {
                let path = from.path.as_ref().map(path_change).transpose()?;
                filters.rewrite = Some(Rewrite { hostname: text(&from.hostname), path });
            }
            // One that cannot be sent anywhere is dropped, as the API says; the route's conditions tell.
            Filter::Mirror(from) if !from.invalid.is_empty() => {}
            Filter::Mirror(from) => filters.mirrors.push(Mirror {
                service: service(from.service.as_ref(), strings)?,
                port: field::port("mirror.port", from.port)?,
                share: if from.denominator == 0 { (1, 1) } else { (from.numerator, from.denominator) },
            }),
            Filter::Fault(from) => filters.fault = Some(fault(from)?),
            Filter::RateLimit(from) => filters.limits.push(rate_limit(from)),
            Filter::Cors(from) => filters.cors = Some(Arc::new(cors(from)?)),
        }
    }
    Ok(filters)
}

fn header_changes(from: &wire::HeaderChanges) -> Result<HeaderChanges, String> {
    let pair = |from: &wire::Header| {
        let value = HeaderValue::from_str(&from.value);
        Ok::<_, String>((
            header_name(&from.name)?,
            value.map_err(|_| format!("the value of {} cannot be one", from.name))?,
        ))
    };
    Ok(HeaderChanges {
        set: from.set.iter().map(pair).collect::<Result<_, _>>()?,
        add: from.add.iter().map(pair).collect::<Result<_, _>>()?,
        remove: from.remove.iter().map(|name| header_name(name)).collect::<Result<_, _>>()?,
    })
}

fn redirect(from: &wire::Redirect) -> Result<Redirect, String> {
    let status = match from.status {
        0 => 302,
        status @ (301 | 302 | 303 | 307 | 308) => status as u16,
        other => return Err(format!("{other} is no status of a redirect")),
    };
    let port = Some(field::port_or_zero("redirect.port", from.port)?).filter(|port| *port != 0);
    let path = from.path.as_ref().map(path_change).transpose()?;
    Ok(Redirect { scheme: text(&from.scheme), hostname: text(&from.hostname), port, path, status })
}

fn text(from: &str) -> Option<Arc<str>> {
    Some(from).filter(|text| !text.is_empty()).map(Into::into)
}

fn path_change(from: &wire::PathChange) -> Result<PathChange, String> {
    let visible = |text: &str| match text.bytes().all(|byte| matches!(byte, 0x21..=0x7e)) {
        true => Ok(Arc::<str>::from(text)),
        false => Err("a path has characters that have no place in one".to_owned()),
    };
    Ok(match from.change.as_ref().ok_or("a path is changed in a way that this proxy does not know")? {
        WirePath::Full(full) if full.starts_with('/') => PathChange::Full(visible(full)?),
        WirePath::Full(full) => PathChange::Full(visible(&format!("/{full}"))?),
        WirePath::Prefix(prefix) => PathChange::Prefix(visible(prefix)?),
    })
}

fn fault(from: &wire::Fault) -> Result<Fault, String> {
    let abort = match (from.abort_status, from.abort_grpc_status) {
        (0, 0) => None,
        (0, code) => Some(Abort::Grpc(code)),
        (status @ 200..=599, _) => Some(Abort::Http(status as u16)),
        (other, _) => return Err(format!("{other} is no status to answer with")),
    };
    let delay = (from.delay_ms > 0).then(|| (Duration::from_millis(from.delay_ms.into()), from.delay_millionths));
    Ok(Fault { delay, abort: abort.map(|abort| (abort, from.abort_millionths)) })
}

fn cors(from: &wire::Cors) -> Result<Cors, String> {
    let listed = |from: &[String]| match from {
        [] => Ok(None),
        [all] if all == "*" => Ok(Some(Listed::All)),
        these => HeaderValue::from_str(&these.join(", "))
            .map(|list| Some(Listed::These(list)))
            .map_err(|_| "a list for CORS has what no header can say".to_owned()),
    };
    Ok(Cors {
        origins: from.origins.iter().map(|origin| origin.as_str().into()).collect(),
        credentials: from.credentials,
        methods: listed(&from.methods)?,
        headers: listed(&from.headers)?,
        expose: listed(&from.expose)?,
        max_age: from.max_age_seconds,
    })
}

fn rate_limit(from: &wire::RateLimit) -> RateLimit {
    RateLimit {
        name: from.name.as_str().into(),
        requests: from.requests,
        interval: Duration::from_millis(from.interval_ms.max(1).into()),
        burst: if from.burst == 0 { from.requests } else { from.burst },
        per_identity: from.per_identity,
    }
}

fn backend(from: &wire::RouteBackend, strings: &mut Strings) -> Backend {
    let read = (|| {
        let filters = filters(&from.filters, strings)?;
        if filters.redirect.is_some() || filters.fault.is_some() || !filters.limits.is_empty() || filters.cors.is_some()
        {
            return Err("a filter of a backend is one that only a rule may have".to_owned());
        }
        Ok((service(from.service.as_ref(), strings)?, field::port("backends.port", from.port)?, filters))
    })();
    let said = Some(from.invalid.as_str()).filter(|why| !why.is_empty());
    match (read, said) {
        (Ok((service, port, filters)), None) => Backend { service, port, weight: from.weight, filters, invalid: None },
        (read, said) => {
            let why = said.map(str::to_owned).or_else(|| read.err()).unwrap_or_default();
            let nobody = ServiceName { namespace: "".into(), hostname: "".into() };
            let service = service(from.service.as_ref(), strings).unwrap_or(nobody);
            let port = u16::try_from(from.port).unwrap_or_default();
            Backend { service, port, weight: from.weight, filters: Filters::default(), invalid: Some(why.into()) }
        }
    }
}
