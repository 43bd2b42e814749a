//! Decodes `tulle.mesh.v1alpha1.TrafficPolicy` and `RequestAuth`.
//!
//! A traffic policy that cannot be read is rejected and its last good version stays: without it a Service is used as it was
//! before there was one. A RequestAuth that cannot be read has a stand-in that refuses every token. A field of a later version counts
//! as what cannot be read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::jwk::{Jwk, JwkSet};
use prost::Message;
use serde_json::Value;
use tulle_proto::mesh as wire;
use tulle_proto::mesh::hash_key::Key;

use crate::base::Pings;
use crate::base::sockets::Keepalive;
use crate::state::{
    Balancer, DESTINATION_RULE, Distribution, HashKey, JwtRule, Layout, LocalityScope, Nearness, OutlierDetection,
    REQUEST_AUTHENTICATION, Region, RequestAuth, RetryBudget, SuccessRate, TrafficPolicy, TrafficScope,
    TrafficSettings, Warmup,
};
use crate::xds::decode::field::{self, Strings};
use crate::xds::decode::route::{header_name, service};
use crate::xds::decode::schemas::{self, whole};

/// Rows of a Maglev table of which no size is given: Envoy's.
const ROWS: u32 = 65_537;

/// Most rows of one: 2.6 MB, made in some 50 ms.
const MOST_ROWS: u32 = 655_373;

/// Largest weight of a place: the sum of all stays far from any limit.
const MOST_WEIGHT: u32 = 1 << 16;

/// The kernel's limits of TCP keepalive (`MAX_TCP_KEEPIDLE`, `MAX_TCP_KEEPCNT`).
const MOST_SECONDS: u32 = 32_767;
const MOST_PROBES: u32 = 127;

/// The shortest interval of PINGs: a rule must not make a node flood a server, which hangs up on who asks too often.
const LEAST_PING: Duration = Duration::from_millis(100);

/// Most points of a ring that may be asked for: 4 MB.
const MOST_POINTS: u32 = 262_144;

/// See the module's header. The error is what is wrong, as one clause.
pub(super) fn policy(bytes: &[u8], id: &str, version: &str, strings: &mut Strings) -> Result<TrafficPolicy, String> {
    let from = wire::TrafficPolicy::decode(bytes).map_err(|error| format!("it is no TrafficPolicy: {error}"))?;
    if format!("{DESTINATION_RULE}{}/{}", from.namespace, from.name) != id {
        return Err("its content has another name than the resource".to_owned());
    }
    whole(bytes, &schemas::TRAFFIC)?;
    let mut ports = BTreeMap::new();
    for (port, of_port) in &from.ports {
        ports.insert(field::port("ports", *port)?, settings(of_port)?);
    }
    Ok(TrafficPolicy {
        id: id.into(),
        version: version.into(),
        namespace: strings.share(&from.namespace),
        services: from.services.iter().map(|one| service(Some(one), strings)).collect::<Result<_, _>>()?,
        scope: match field::known("scope", from.scope)? {
            wire::TrafficScope::OwnNamespace => TrafficScope::OwnNamespace,
            wire::TrafficScope::AllClients => TrafficScope::AllClients,
            wire::TrafficScope::Mesh => TrafficScope::Mesh,
        },
        settings: from.settings.as_ref().map(settings).transpose()?.unwrap_or_default(),
        ports,
    })
}

fn settings(from: &wire::TrafficSettings) -> Result<TrafficSettings, String> {
    let limit = |value: u32| (value > 0).then_some(value);
    Ok(TrafficSettings {
        max_connections: limit(from.max_connections),
        connect_timeout: millis(from.connect_timeout_ms),
        idle_timeout: millis(from.idle_timeout_ms),
        http_idle_timeout: millis(from.http_idle_timeout_ms),
        max_connection_duration: millis(from.max_connection_duration_ms),
        max_pending_requests: limit(from.max_pending_requests),
        max_requests: limit(from.max_requests),
        max_requests_per_connection: limit(from.max_requests_per_connection),
        max_retries: limit(from.max_retries),
        outlier: from.outlier.as_ref().map(outlier),
        balancer: match field::known("balancer", from.balancer)? {
            wire::Balancer::DefaultBalancer => Balancer::Default,
            wire::Balancer::RoundRobin => Balancer::RoundRobin,
            wire::Balancer::Random => Balancer::Random,
            wire::Balancer::LeastRequest => Balancer::LeastRequest,
            wire::Balancer::RingHash => hashed(from, Layout::Ring(from.table_size.min(MOST_POINTS)))?,
            wire::Balancer::Maglev => hashed(
                from,
                Layout::Maglev(match from.table_size {
                    0 => ROWS,
                    size => size.min(MOST_ROWS),
                }),
            )?,
            wire::Balancer::Passthrough => Balancer::Passthrough,
        },
        retry_budget: from.retry_budget.as_ref().map(|budget| RetryBudget {
            share: budget.share.min(10_000),
            least: budget.least,
            interval: millis(budget.interval_ms),
        }),
        warmup: from.warmup.as_ref().and_then(|warmup| {
            Some(Warmup {
                duration: millis(warmup.duration_ms)?,
                least: f64::from(warmup.least_percent.clamp(1, 100)) / 100.0,
                aggression: f64::from(warmup.aggression.max(1)) / 1_000.0,
            })
        }),
        max_concurrent_streams: limit(from.max_concurrent_streams),
        keepalive: from.keepalive.as_ref().map(|from| Keepalive {
            time: seconds(from.time_ms),
            interval: seconds(from.interval_ms),
            probes: limit(from.probes).map(|probes| probes.min(MOST_PROBES)),
        }),
        pings: from.pings.as_ref().and_then(|from| {
            Some(Pings { interval: millis(from.interval_ms)?.max(LEAST_PING), timeout: millis(from.timeout_ms)? })
        }),
        nearness: from.locality.as_ref().map(nearness).transpose()?.map(Arc::new),
    })
}

/// Whole seconds as the system takes them, not less than was said.
fn seconds(millis: u32) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_secs(millis.div_ceil(1_000).min(MOST_SECONDS).into()))
}

fn nearness(from: &wire::LocalityBalancing) -> Result<Nearness, String> {
    let place = |text: &str| Region::new(text).ok_or_else(|| format!("`{text}` is no place"));
    if !from.distribute.is_empty() {
        let shares = |list: &[wire::LocalityShare]| -> Result<Vec<_>, String> {
            // Nobody would ever go to a place of weight 0.
            let list = list.iter().filter(|share| share.weight > 0);
            list.map(|share| Ok((place(&share.place)?, share.weight.min(MOST_WEIGHT)))).collect()
        };
        let one =
            |one: &wire::Distribution| Ok::<_, String>(Distribution { from: place(&one.from)?, to: shares(&one.to)? });
        return Ok(Nearness::Shares(from.distribute.iter().map(one).collect::<Result<_, _>>()?));
    }
    let scope = |scope: &i32| {
        Ok::<_, String>(match field::known("locality.scopes", *scope)? {
            wire::LocalityScope::Region => LocalityScope::Region,
            wire::LocalityScope::Zone => LocalityScope::Zone,
            wire::LocalityScope::Subzone => LocalityScope::Subzone,
            wire::LocalityScope::Node => LocalityScope::Node,
            wire::LocalityScope::Cluster => LocalityScope::Cluster,
            wire::LocalityScope::Network => LocalityScope::Network,
        })
    };
    let region = |one: &wire::RegionFailover| (one.from.as_str().into(), one.to.as_str().into());
    Ok(Nearness::Order {
        scopes: from.scopes.iter().map(scope).collect::<Result<_, _>>()?,
        failover: from.failover.iter().map(region).collect(),
    })
}

fn hashed(from: &wire::TrafficSettings, layout: Layout) -> Result<Balancer, String> {
    Ok(Balancer::Hash(hash_key(from.hash_key.as_ref())?, layout))
}

fn millis(value: u32) -> Option<Duration> {
    (value > 0).then(|| Duration::from_millis(value.into()))
}

fn hash_key(from: Option<&wire::HashKey>) -> Result<HashKey, String> {
    Ok(match from.map(|from| from.key.as_ref()) {
        None => HashKey::SourceIp,
        Some(None) => return Err("hash_key is of a kind that this proxy does not know".to_owned()),
        Some(Some(Key::Header(name))) => HashKey::Header(header_name(name)?),
        Some(Some(Key::Query(name))) => HashKey::Query(name.as_str().into()),
        Some(Some(Key::Cookie(cookie))) => HashKey::Cookie {
            name: cookie.name.as_str().into(),
            path: if cookie.path.is_empty() { "/".into() } else { cookie.path.as_str().into() },
            ttl: Duration::from_secs(cookie.ttl_seconds.into()),
            passive: cookie.passive,
            attributes: cookie.attributes.iter().map(|one| format!("; {one}")).collect::<String>().into(),
        },
    })
}

fn outlier(from: &wire::OutlierDetection) -> OutlierDetection {
    let count = |value: u32| (value > 0).then_some(value);
    let or = |value: u32, default: u64| Duration::from_millis(if value == 0 { default } else { value.into() });
    OutlierDetection {
        consecutive_5xx: count(from.consecutive_5xx),
        consecutive_gateway: count(from.consecutive_gateway_errors),
        consecutive_local: count(from.consecutive_local_failures),
        split_local: from.split_local_failures,
        interval: or(from.interval_ms, 10_000),
        base_ejection: or(from.base_ejection_ms, 30_000),
        max_ejection_percent: from.max_ejection_percent.min(100),
        min_health_percent: from.min_health_percent.min(100),
        success_rate: from.success_rate.as_ref().map(|rate| SuccessRate {
            percent: rate.percent.min(100),
            window: or(rate.window_ms, 10_000),
            least: rate.least_requests.max(1),
        }),
    }
}

/// The same for a RequestAuth.
pub(super) fn request_auth(bytes: &[u8], id: &str, version: &str) -> Result<RequestAuth, String> {
    let from = wire::RequestAuth::decode(bytes).map_err(|error| format!("it is no RequestAuth: {error}"))?;
    if format!("{REQUEST_AUTHENTICATION}{}/{}", from.namespace, from.name) != id {
        return Err("its content has another name than the resource".to_owned());
    }
    whole(bytes, &schemas::REQUEST_AUTH)?;
    Ok(RequestAuth {
        id: id.into(),
        version: version.into(),
        rules: from.rules.iter().map(jwt_rule).collect::<Result<_, _>>()?,
        unreadable: Some(from.unreadable).filter(|why| !why.is_empty()).map(Into::into),
    })
}

fn jwt_rule(from: &wire::JwtRule) -> Result<JwtRule, String> {
    let texts = |list: &[String]| -> Vec<Arc<str>> { list.iter().map(|text| text.as_str().into()).collect() };
    let header = |from: &wire::JwtHeader| Ok::<_, String>((header_name(&from.name)?, from.prefix.as_str().into()));
    let claim = |from: &wire::ClaimHeader| Ok::<_, String>((header_name(&from.header)?, texts(&from.claim)));
    let payload = Some(&from.payload_header).filter(|name| !name.is_empty());
    Ok(JwtRule {
        issuer: from.issuer.as_str().into(),
        audiences: texts(&from.audiences),
        keys: Arc::new(JwkSet { keys: keys(&from.jwks) }),
        from_headers: from.from_headers.iter().map(header).collect::<Result<_, _>>()?,
        from_params: texts(&from.from_params),
        from_cookies: texts(&from.from_cookies),
        forward: from.forward,
        payload_header: payload.map(|name| header_name(name)).transpose()?,
        claim_headers: from.claim_headers.iter().map(claim).collect::<Result<_, _>>()?,
    })
}

/// The keys of a JWK Set that this proxy understands; one that it does not is none (RFC 7517, section 5).
fn keys(jwks: &str) -> Vec<Jwk> {
    let Ok(Value::Object(mut set)) = serde_json::from_str::<Value>(jwks) else { return Vec::new() };
    let Some(Value::Array(keys)) = set.remove("keys") else { return Vec::new() };
    keys.into_iter().filter_map(|key| serde_json::from_value(key).ok()).collect()
}
