//! DestinationRule and RequestAuthentication.
//!
//! A DestinationRule is no policy of access: a field that has no effect is kept by name and told, and the rest of it holds. A
//! RequestAuthentication is one: its first error makes it refuse every token of what it applies to.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{
    DestinationRule, JwtRule, Meta, Object, OutlierDetection, Pings, RequestAuthentication, RequestAuthenticationSpec,
    RetryBudget, SuccessRate, TcpKeepalive, TrafficSettings,
};
use crate::source::decode::balancer::{self, ignore};
use crate::source::decode::locality::locality;
use crate::source::decode::policy::{PolicyResult, authorization_target, or_unreadable};
use crate::source::decode::route::is_header_name;
use crate::source::tree::{Cursor, FieldError, Read, Value};

/// Issuers of one object; each costs a look at every token.
const MAX_RULES: usize = 64;

/// Fields of `connectionPool.tcp` that are known. Those of a DestinationRule that are not carried out are told.
const TCP: [&str; 5] = ["maxConnections", "connectTimeout", "idleTimeout", "maxConnectionDuration", "tcpKeepalive"];

/// The same for `connectionPool.http`. A client's version of HTTP is the server's, whatever `useClientProtocol` says.
const HTTP: [&str; 9] = [
    "http1MaxPendingRequests",
    "http2MaxRequests",
    "maxRequestsPerConnection",
    "maxRetries",
    "idleTimeout",
    "maxConcurrentStreams",
    "h2UpgradePolicy",
    "useClientProtocol",
    "http2KeepAlive",
];

/// The shortest interval of `http2KeepAlive`. Each PING wakes both ends, and servers of gRPC hang up on who asks too often.
const LEAST_PING: u32 = 100;

/// The same for `outlierDetection`.
const OUTLIER: [&str; 9] = [
    "consecutive5xxErrors",
    "consecutiveErrors",
    "consecutiveGatewayErrors",
    "consecutiveLocalOriginFailures",
    "splitExternalLocalOriginErrors",
    "interval",
    "baseEjectionTime",
    "maxEjectionPercent",
    "minHealthPercent",
];

pub(super) fn destination_rule(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    let mut ignored = Vec::new();
    unknown(&spec, &["host", "trafficPolicy", "exportTo", "subsets"], &mut ignored)?;
    let subsets = spec.get("subsets");
    if !subsets.list()?.is_empty() {
        ignored.push(format!("{} (no route of the Gateway API selects a subset)", subsets.error("").field));
    }
    let policy = spec.get("trafficPolicy");
    let export = spec.get("exportTo").texts()?;
    let own_namespace = !export.is_empty() && !export.iter().any(|(to, _)| *to == "*");
    let rate = success_rate(&at.get("metadata").get("annotations"), &policy, &mut ignored)?;
    let mut settings_of = |at: &Cursor<'_>, besides: &[&str]| -> Read<TrafficSettings> {
        let mut settings = settings(at, besides, &mut ignored)?;
        if let Some(outlier) = &mut settings.outlier {
            outlier.success_rate.clone_from(&rate);
        }
        Ok(settings)
    };
    let mut ports = BTreeMap::new();
    for item in policy.get("portLevelSettings").list()? {
        let number = item.get("port").get("number");
        let port = number.port()?.ok_or_else(|| number.error("is missing"))?;
        ports.insert(port, settings_of(&item, &["port"])?);
    }
    let settings = settings_of(&policy, &["portLevelSettings"])?;
    Ok(Object::DestinationRule(Arc::new(DestinationRule {
        host: spec.get("host").required_text()?.to_ascii_lowercase(),
        own_namespace,
        settings,
        ports,
        ignored,
        meta,
    })))
}

/// Notes the fields that are not in the list.
pub(super) fn unknown(at: &Cursor<'_>, known: &[&str], ignored: &mut Vec<String>) -> Read<()> {
    for (key, field) in at.map()? {
        if !known.contains(&key) && !field.is_absent() {
            // The path is what an error about the field would begin with.
            ignored.push(field.error("").field);
        }
    }
    Ok(())
}

fn settings(at: &Cursor<'_>, besides: &[&str], ignored: &mut Vec<String>) -> Read<TrafficSettings> {
    let known = ["connectionPool", "outlierDetection", "loadBalancer", "retryBudget", "tls", "proxyProtocol"];
    unknown(at, &[&known[..], besides].concat(), ignored)?;
    without_effect(at, ignored)?;
    let pool = at.get("connectionPool");
    unknown(&pool, &["tcp", "http"], ignored)?;
    let (tcp, http) = (pool.get("tcp"), pool.get("http"));
    unknown(&tcp, &TCP, ignored)?;
    unknown(&http, &HTTP, ignored)?;
    let outlier = outlier(&at.get("outlierDetection"), ignored)?;
    let locality = locality(&at.get("loadBalancer").get("localityLbSetting"), outlier.is_some(), ignored)?;
    Ok(TrafficSettings {
        max_connections: count(&tcp.get("maxConnections"))?,
        connect_timeout_ms: duration(&tcp.get("connectTimeout"))?,
        idle_timeout_ms: duration(&tcp.get("idleTimeout"))?,
        http_idle_timeout_ms: duration(&http.get("idleTimeout"))?,
        max_connection_duration_ms: duration(&tcp.get("maxConnectionDuration"))?,
        max_pending_requests: count(&http.get("http1MaxPendingRequests"))?,
        max_requests: count(&http.get("http2MaxRequests"))?,
        max_requests_per_connection: count(&http.get("maxRequestsPerConnection"))?,
        max_retries: count(&http.get("maxRetries"))?,
        outlier,
        locality,
        keepalive: keepalive(&tcp.get("tcpKeepalive"), ignored)?,
        pings: pings(&http.get("http2KeepAlive"), ignored)?,
        balancer: balancer::balancer(&at.get("loadBalancer"), ignored)?,
        retry_budget: retry_budget(&at.get("retryBudget"), ignored)?,
        warmup: balancer::warmup(&at.get("loadBalancer"), ignored)?,
        max_concurrent_streams: count(&http.get("maxConcurrentStreams"))?,
    })
}

/// Notes fields of which some values ask for what is done anyway, and the others have no effect.
fn without_effect(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<()> {
    let tls = at.get("tls");
    match tls.get("mode").text()? {
        // The mesh's own mutual TLS, wherever the endpoint is in the mesh.
        Some("ISTIO_MUTUAL") => {}
        Some("DISABLE") => {
            ignore(&tls, "between pods of the mesh there is mutual TLS always, and none to others", ignored)
        }
        _ if tls.is_absent() => {}
        _ => ignore(&tls, "the proxy adds TLS to connections out of the cluster alone; see EgressPolicy", ignored),
    }
    let proxy = at.get("proxyProtocol");
    if !proxy.is_absent() {
        ignore(&proxy, "a Service of the mesh sees its client's address without it", ignored);
    }
    let upgrade = at.get("connectionPool").get("http").get("h2UpgradePolicy");
    if upgrade.text()? == Some("UPGRADE") {
        ignore(&upgrade, "a client's version of HTTP is also the server's", ignored);
    }
    Ok(())
}

fn keepalive(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<TcpKeepalive>> {
    unknown(at, &["time", "interval", "probes"], ignored)?;
    if at.is_absent() {
        return Ok(None);
    }
    let (time_ms, interval_ms) = (duration(&at.get("time"))?, duration(&at.get("interval"))?);
    Ok(Some(TcpKeepalive { time_ms, interval_ms, probes: count(&at.get("probes"))? }))
}

fn pings(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<Pings>> {
    unknown(at, &["interval", "timeout"], ignored)?;
    if at.is_absent() {
        return Ok(None);
    }
    let (interval, timeout) = (at.get("interval"), at.get("timeout"));
    let (interval_ms, timeout_ms) = (duration(&interval)?, duration(&timeout)?);
    if interval_ms == 0 || timeout_ms == 0 {
        ignore(at, "it needs both an interval and a timeout", ignored);
        return Ok(None);
    }
    if interval_ms < LEAST_PING {
        ignore(&interval, "nobody is asked more often than every 100 ms, so 100 ms are used", ignored);
    }
    Ok(Some(Pings { interval_ms: interval_ms.max(LEAST_PING), timeout_ms }))
}

fn retry_budget(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<RetryBudget>> {
    if at.is_absent() {
        return Ok(None);
    }
    unknown(at, &["percent", "minRetryConcurrency", "budgetInterval"], ignored)?;
    let percent = at.get("percent");
    let share = percent.number()?.unwrap_or(20.0);
    if !(0.0..=100.0).contains(&share) {
        return Err(percent.error(format!("{share} is not from 0 to 100")));
    }
    Ok(Some(RetryBudget {
        share: (share * 100.0).round() as u32,
        // 0 is the default, as with every plain number of a DestinationRule.
        least: match count(&at.get("minRetryConcurrency"))? {
            0 => 3,
            least => least,
        },
        interval_ms: duration(&at.get("budgetInterval"))?,
    }))
}

/// Annotations, because no field of a DestinationRule says it.
fn success_rate(at: &Cursor<'_>, policy: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<SuccessRate>> {
    const PREFIX: &str = "tulle.dev/success-rate";
    let [threshold, window, least] =
        ["threshold", "window", "min-requests"].map(|end| at.get(&format!("{PREFIX}-{end}")));
    let Some(text) = threshold.text()? else { return Ok(None) };
    let percent = text.trim_end_matches('%').parse::<u32>().ok().filter(|percent| (1..=100).contains(percent));
    let percent = percent.ok_or_else(|| threshold.error(format!("`{text}` is no percentage from 1% to 100%")))?;
    let least_requests = match least.text()? {
        None => 5,
        Some(text) => text
            .parse::<u32>()
            .ok()
            .filter(|least| *least > 0)
            .ok_or_else(|| least.error(format!("`{text}` is no number of requests")))?,
    };
    let window_ms = match duration(&window)? {
        0 => 10_000,
        window => window,
    };
    let ports = policy.get("portLevelSettings").list()?;
    if policy.get("outlierDetection").is_absent() && ports.iter().all(|port| port.get("outlierDetection").is_absent()) {
        ignored.push(format!("{} (there is no outlierDetection that it could be part of)", threshold.error("").field));
    }
    Ok(Some(SuccessRate { percent, window_ms, least_requests }))
}

pub(super) fn count(at: &Cursor<'_>) -> Read<u32> {
    let value = at.int()?.unwrap_or(0);
    u32::try_from(value).map_err(|_| at.error(format!("{value} is out of range")))
}

fn outlier(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<OutlierDetection>> {
    if at.is_absent() {
        return Ok(None);
    }
    unknown(at, &OUTLIER, ignored)?;
    let or = |key: &str, default: u32| -> Read<u32> {
        let field = at.get(key);
        if field.is_absent() { Ok(default) } else { count(&field) }
    };
    let time = |key: &str, default: u32| -> Read<u32> {
        Ok(match duration(&at.get(key))? {
            0 => default,
            value => value,
        })
    };
    let split = at.get("splitExternalLocalOriginErrors").boolean()?.unwrap_or(false);
    Ok(Some(OutlierDetection {
        // The old name means the gateway errors, as Istio reads it.
        consecutive_5xx: or("consecutive5xxErrors", 5)?,
        consecutive_gateway_errors: or("consecutiveGatewayErrors", or("consecutiveErrors", 0)?)?,
        consecutive_local_failures: if split { or("consecutiveLocalOriginFailures", 5)? } else { 0 },
        split_local_failures: split,
        interval_ms: time("interval", 10_000)?,
        base_ejection_ms: time("baseEjectionTime", 30_000)?,
        max_ejection_percent: match or("maxEjectionPercent", 10)? {
            0 => 10,
            percent => percent.min(100),
        },
        min_health_percent: or("minHealthPercent", 0)?.min(100),
        success_rate: None,
    }))
}

/// As Go writes it: `1h`, `1m30s`, `1.5s`, `100ms`. Milliseconds; absent is 0.
pub(super) fn duration(at: &Cursor<'_>) -> Read<u32> {
    let Some(text) = at.text()? else { return Ok(0) };
    milliseconds(text).ok_or_else(|| at.error(format!("`{text}` is no duration such as 10s or 1m30s")))
}

fn milliseconds(text: &str) -> Option<u32> {
    const UNITS: [(&str, f64); 6] =
        [("ms", 1.0), ("us", 0.001), ("ns", 0.000_001), ("h", 3_600_000.0), ("m", 60_000.0), ("s", 1_000.0)];
    if text == "0" {
        return Some(0);
    }
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let number: f64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?;
        let (factor, after) = UNITS.iter().find_map(|(unit, factor)| Some((factor, rest.strip_prefix(unit)?)))?;
        sum += number * factor;
        rest = after;
    }
    // `as` saturates, and an empty text is none.
    (!text.is_empty()).then_some(sum as u32)
}

pub(super) fn request_authentication(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let spec = at.get("spec");
    let read = error.map_or_else(|| request_spec(&spec), Err);
    let (spec, error) = or_unreadable(read, authorization_target(&spec));
    Ok((Object::RequestAuthentication(Arc::new(RequestAuthentication { meta, spec })), error))
}

fn request_spec(spec: &Cursor<'_>) -> Read<RequestAuthenticationSpec> {
    spec.only(&["selector", "targetRef", "targetRefs", "jwtRules"])?;
    let rules_at = spec.get("jwtRules");
    let rules = rules_at.list()?;
    if rules.len() > MAX_RULES {
        return Err(rules_at.error(format!("has {} items; at most {MAX_RULES} are allowed", rules.len())));
    }
    let rules = rules.iter().map(jwt_rule).collect::<Read<_>>()?;
    Ok(RequestAuthenticationSpec { target: authorization_target(spec)?, rules })
}

fn jwt_rule(at: &Cursor<'_>) -> Read<JwtRule> {
    at.only(&[
        "issuer",
        "audiences",
        "jwksUri",
        "jwks_uri",
        "jwks",
        "fromHeaders",
        "fromParams",
        "fromCookies",
        "outputPayloadToHeader",
        "forwardOriginalToken",
        "outputClaimToHeaders",
        "timeout",
        "spaceDelimitedClaims",
    ])?;
    let texts = |key: &str| -> Read<Vec<String>> {
        Ok(at.get(key).texts()?.into_iter().map(|(text, _)| text.to_owned()).collect())
    };
    let mut from_headers = Vec::new();
    for item in at.get("fromHeaders").list()? {
        item.only(&["name", "prefix"])?;
        from_headers.push((header(&item.get("name"))?, item.get("prefix").text_or_empty()?));
    }
    let mut claim_headers = Vec::new();
    for item in at.get("outputClaimToHeaders").list()? {
        item.only(&["header", "claim"])?;
        let claim = item.get("claim").required_text()?.split('.').map(str::to_owned).collect();
        claim_headers.push((header(&item.get("header"))?, claim));
    }
    // Nodes take these two apart and no other; a DENY on part of another would let it in.
    let spaced = at.get("spaceDelimitedClaims");
    if let Some((claim, _)) = spaced.texts()?.iter().find(|(claim, _)| !["scope", "permission"].contains(claim)) {
        return Err(spaced.error(format!("`{claim}` is not taken apart at spaces; only scope and permission are")));
    }
    let payload = at.get("outputPayloadToHeader");
    let jwks_uri = match at.get("jwksUri").text()? {
        Some(uri) => uri.to_owned(),
        None => at.get("jwks_uri").text_or_empty()?,
    };
    Ok(JwtRule {
        issuer: at.get("issuer").required_text()?.to_owned(),
        audiences: texts("audiences")?,
        jwks: jwks(&at.get("jwks"))?,
        jwks_uri,
        from_headers,
        from_params: texts("fromParams")?,
        from_cookies: texts("fromCookies")?,
        forward: at.get("forwardOriginalToken").boolean()?.unwrap_or(false),
        payload_header: if payload.is_absent() { String::new() } else { header(&payload)? },
        claim_headers,
    })
}

fn header(at: &Cursor<'_>) -> Read<String> {
    let name = at.required_text()?;
    if !is_header_name(name) {
        return Err(at.error(format!("`{name}` is no name of a header")));
    }
    Ok(name.to_ascii_lowercase())
}

/// A JWK Set as JSON text, kept as it is.
fn jwks(at: &Cursor<'_>) -> Read<String> {
    if matches!(at.value(), Some(Value::Map(_))) {
        return Err(at.error("must be the text of a JWK Set; put a `|` in front of it"));
    }
    let text = at.text_or_empty()?;
    if text.is_empty() {
        return Ok(text);
    }
    let parsed: Result<serde_json::Value, _> = serde_json::from_str(&text);
    match parsed {
        Ok(set) if set.get("keys").is_some_and(serde_json::Value::is_array) => Ok(text),
        Ok(_) => Err(at.error("has no list `keys`, which a JWK Set has")),
        Err(error) => Err(at.error(format!("is no JSON: {error}"))),
    }
}
