//! What single filters of a route say: CORS, and the objects of `tulle.dev` that filters may name.
//!
//! As in `route`, what the API's schema would take and nobody could carry out is a problem of the rule; objects of our own
//! group are refused instead, since their definition refuses them too.

use std::sync::Arc;

use crate::model::{Cors, HttpFault, HttpRateLimit, Meta, Object};
use crate::source::decode::route::{Problem, bounded, duration, is_header_name, milliseconds, note};
use crate::source::tree::{Cursor, Read};

/// The API's limit of each list.
const MAX_ITEMS: usize = 64;
/// What a browser keeps the answer to a preflight for if nothing is said, seconds.
const MAX_AGE: i64 = 5;

pub(super) fn cors(at: &Cursor<'_>, problem: &mut Problem) -> Read<Cors> {
    at.only(&["allowOrigins", "allowCredentials", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge"])?;
    let mut list = |key: &str, fits: fn(&str) -> bool, what: &str| -> Read<Vec<String>> {
        let mut texts = Vec::new();
        for item in bounded(&at.get(key), MAX_ITEMS)? {
            let text = item.required_text()?;
            if text != "*" && !fits(text) {
                note(problem, &item, &format!("`{text}` is no {what}"));
            }
            texts.push(text.to_owned());
        }
        if texts.len() > 1 && texts.iter().any(|text| text == "*") {
            note(problem, &at.get(key), "has `*` beside others");
        }
        Ok(texts)
    };
    let origins = list("allowOrigins", is_origin, "origin such as https://shop.example or https://*.example:8443")?;
    let methods = list("allowMethods", is_header_name, "name of a method")?;
    let headers = list("allowHeaders", is_header_name, "name of a header")?;
    let expose = list("exposeHeaders", is_header_name, "name of a header")?;
    let age = at.get("maxAge");
    let seconds = age.int()?.unwrap_or(MAX_AGE);
    let max_age = u32::try_from(seconds).ok().filter(|seconds| *seconds > 0);
    if max_age.is_none() {
        note(problem, &age, &format!("{seconds} is no number of seconds"));
    }
    Ok(Cors {
        origins,
        credentials: at.get("allowCredentials").boolean()?.unwrap_or(false),
        methods,
        headers,
        expose,
        max_age: max_age.unwrap_or_default(),
    })
}

/// `scheme://host`, perhaps with a port; a `*` may stand for the beginning of the host, or for the port.
fn is_origin(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (rest, "*"),
    };
    let named = host.strip_prefix('*').unwrap_or(host);
    let plain = |letter: u8| letter.is_ascii_alphanumeric() || b".-_[]:".contains(&letter);
    matches!(scheme, "http" | "https")
        && !host.is_empty()
        && named.bytes().all(plain)
        && (port == "*" || port.parse::<u16>().is_ok_and(|port| port > 0))
}

pub(super) fn fault(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    spec.only(&["delay", "abort"])?;
    let (delay_at, abort_at) = (spec.get("delay"), spec.get("abort"));
    delay_at.only(&["duration", "percent"])?;
    abort_at.only(&["httpStatus", "grpcStatus", "percent"])?;
    let mut problem = None;
    let delay = match delay_at.is_absent() {
        true => None,
        false => Some((duration(&delay_at.get("duration"), &mut problem)?, percent(&delay_at.get("percent"))?)),
    };
    if let Some(problem) = problem {
        return Err(delay_at.error(problem));
    }
    let abort = match abort_at.is_absent() {
        true => None,
        false => {
            let (http, grpc) = (abort_at.get("httpStatus").int()?, abort_at.get("grpcStatus").int()?);
            let http = match http {
                None => 0,
                Some(status @ 200..=599) => u16::try_from(status).unwrap_or_default(),
                Some(other) => return Err(abort_at.error(format!("httpStatus {other} is not from 200 to 599"))),
            };
            let grpc = u32::try_from(grpc.unwrap_or(0)).ok().filter(|code| *code <= 16);
            let grpc = grpc.ok_or_else(|| abort_at.error("grpcStatus is not from 0 to 16"))?;
            if (http == 0) == (grpc == 0) {
                return Err(abort_at.error("needs one of httpStatus and grpcStatus"));
            }
            Some((http, grpc, percent(&abort_at.get("percent"))?))
        }
    };
    Ok(Object::HttpFault(Arc::new(HttpFault { meta, delay, abort })))
}

/// 0 to 100, with a fraction; in millionths. Absent: 0, as in Istio, so that a fault is never an accident.
fn percent(at: &Cursor<'_>) -> Read<u32> {
    use crate::source::tree::Value;
    let value = match at.value() {
        None | Some(Value::Null) => 0.0,
        Some(Value::Int(value)) => *value as f64,
        Some(Value::Float(value)) => *value,
        Some(_) => return Err(at.error("must be a number from 0 to 100")),
    };
    if !(0.0..=100.0).contains(&value) {
        return Err(at.error(format!("{value} is not from 0 to 100")));
    }
    Ok((value * 10_000.0).round() as u32)
}

pub(super) fn rate_limit(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    spec.only(&["requests", "interval", "burst", "per"])?;
    let requests_at = spec.get("requests");
    let count = |at: &Cursor<'_>| -> Read<u32> {
        let value = at.int()?.unwrap_or(0);
        u32::try_from(value).map_err(|_| at.error(format!("{value} is out of range")))
    };
    let requests = count(&requests_at)?;
    if requests == 0 {
        return Err(requests_at.error("must be at least 1"));
    }
    let interval_at = spec.get("interval");
    let interval_ms = match interval_at.text()? {
        None => 1_000,
        Some(text) => match milliseconds(text) {
            Some(value) if value > 0 => value,
            _ => return Err(interval_at.error(format!("`{text}` is no duration such as 1s or 1m"))),
        },
    };
    let per = spec.get("per");
    let per_identity = match per.text()? {
        None | Some("Route") => false,
        Some("Identity") => true,
        Some(other) => return Err(per.error(format!("`{other}` is neither Route nor Identity"))),
    };
    let burst = count(&spec.get("burst"))?;
    Ok(Object::HttpRateLimit(Arc::new(HttpRateLimit { meta, requests, interval_ms, burst, per_identity })))
}
