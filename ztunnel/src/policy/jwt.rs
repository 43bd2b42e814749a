//! Tokens: where a request carries one, whether it is valid, and what to say if it is not (RFC 7515, RFC 7519).
//!
//! As Envoy does it under Istio: a request without a token passes, and has no principal; one with a token that no rule
//! accepts is refused with 401 (403 where only the audience is wrong). The issuer chooses the rules, the header's `kid` the
//! key, and the key must be of the family of the header's algorithm. Only signatures by private keys count: a JWK Set is
//! public, so a shared secret in it would be none. The clock is an argument. Limits: a token is as long as a header may be;
//! of several tokens in one request the first valid one counts, and [`MAX_TOKENS`] are tried.

use std::sync::Arc;

use http::HeaderMap;
use http::header::{AUTHORIZATION, COOKIE, HeaderName, HeaderValue};
use jsonwebtoken::jwk::{Jwk, KeyAlgorithm};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, crypto, dangerous, decode_header};
use serde_json::{Map, Value};

use crate::route::RequestFacts;
use crate::state::{JwtRule, RequestAuth, Snapshot, Workload};

/// How far the clocks of an issuer and this node may be apart, seconds: Envoy's figure.
const SKEW: i64 = 60;
/// Verifying costs some 50 µs each, and one is what clients send.
const MAX_TOKENS: usize = 4;
/// Keys of one issuer that are tried for a token that does not say which signed it.
const MAX_KEYS: usize = 16;

/// A valid token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// What it says.
    pub claims: Map<String, Value>,
    /// Resource name of the RequestAuthentication whose rule accepted it.
    pub accepted_by: Arc<str>,
    /// As it came, base64url.
    payload: String,
}

impl Token {
    /// `<iss>/<sub>`. `None`: it has not both.
    pub fn principal(&self) -> Option<String> {
        let claim = |name: &str| self.claims.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        Some(format!("{}/{}", claim("iss")?, claim("sub")?))
    }
}

/// A request may go on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Authenticated {
    /// Its token, if it has one.
    pub token: Option<Token>,
    /// Headers to take out: the token, unless it is to be forwarded, and what only a token may set.
    remove: Vec<HeaderName>,
    add: Vec<(HeaderName, HeaderValue)>,
}

impl Authenticated {
    /// Changes the headers of the request, also where there is no token.
    pub fn on_request(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        // CGI and its heirs take `x_role` for `x-role`.
        let respelled = |name: &HeaderName| {
            name.as_str().contains('_')
                && self.remove.iter().any(|own| own.as_str().replace('_', "-") == name.as_str().replace('_', "-"))
        };
        let respelled: Vec<HeaderName> = headers.keys().filter(|name| respelled(name)).cloned().collect();
        for name in respelled {
            headers.remove(name);
        }
        for (name, value) in &self.add {
            headers.insert(name, value.clone());
        }
    }
}

/// A request is answered by the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRefused {
    /// 401, or 403 for a wrong audience.
    pub status: u16,
    /// The body, and for gRPC the message.
    pub body: &'static str,
    /// The header `www-authenticate`.
    pub challenge: String,
    /// Resource name of the RequestAuthentication; `None`: no rule is for its issuer.
    pub by: Option<Arc<str>>,
}

/// Why a token is refused, in Envoy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Invalid {
    Form,
    Header,
    Algorithm,
    Payload,
    Issuer,
    Key,
    Signature,
    Expired,
    NotYet,
    Audience,
}

impl Invalid {
    fn text(self) -> &'static str {
        match self {
            Self::Form => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Self::Header => "Jwt header is an invalid JSON",
            Self::Algorithm => "Jwt header [alg] is not supported",
            Self::Payload => "Jwt payload is an invalid JSON",
            Self::Issuer => "Jwt issuer is not configured",
            Self::Key => "Jwks doesn't have key to match kid or alg from Jwt",
            Self::Signature => "Jwt verification fails",
            Self::Expired => "Jwt is expired",
            Self::NotYet => "Jwt not yet valid",
            Self::Audience => "Audiences in Jwt are not allowed",
        }
    }
}

/// Looks for a token and verifies it. `now` is Unix seconds. A RequestAuthentication that has not arrived is not missed here:
/// `evaluate_request` refuses.
///
/// # Errors
/// The request has a token that no rule accepts.
pub fn authenticate(
    snapshot: &Snapshot,
    workload: &Workload,
    request: &RequestFacts<'_>,
    now: i64,
) -> Result<Authenticated, TokenRefused> {
    let auths: Vec<&RequestAuth> =
        workload.request_auths.iter().filter_map(|id| snapshot.request_auth(id)).map(|auth| &**auth).collect();
    by_rules(&auths, request, now)
}

/// The same for given rules; also the entry of the fuzz target.
///
/// # Errors
/// See [`authenticate`].
pub fn by_rules(auths: &[&RequestAuth], request: &RequestFacts<'_>, now: i64) -> Result<Authenticated, TokenRefused> {
    let rules = || auths.iter().flat_map(|auth| auth.rules.iter().map(|rule| (&auth.id, rule)));
    let unreadable = auths.iter().find(|auth| auth.unreadable.is_some());
    // What only a token may set is nobody else's.
    let only_ours =
        rules().flat_map(|(_, rule)| rule.payload_header.iter().chain(rule.claim_headers.iter().map(|c| &c.0)));
    let mut passed = Authenticated { remove: only_ours.cloned().collect(), ..Authenticated::default() };
    let found = tokens(rules().map(|(_, rule)| rule), unreadable.is_some(), request);
    let mut refused: Option<(Invalid, Option<Arc<str>>)> = None;
    for (text, place) in &found {
        match verify(text, *place, rules(), now) {
            Ok((rule, token)) => {
                if !rule.forward
                    && let Place::Header(name) = place
                {
                    passed.remove.push((*name).clone());
                }
                passed.add = additions(rule, &token);
                passed.token = Some(token);
                return Ok(passed);
            }
            Err((why, by)) => {
                let by = by.or_else(|| unreadable.map(|auth| auth.id.clone()));
                refused = refused.or(Some((why, by)));
            }
        }
    }
    let Some((why, by)) = refused else { return Ok(passed) };
    // What is visible ASCII in a request stays so in the header.
    let realm = format!("{}://{}{}", request.scheme, request.authority, request.path).replace(['"', '\\'], "");
    Err(TokenRefused {
        status: if why == Invalid::Audience { 403 } else { 401 },
        body: why.text(),
        challenge: format!("Bearer realm=\"{realm}\", error=\"invalid_token\""),
        by,
    })
}

/// Where a token was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'a> {
    Header(&'a HeaderName),
    Parameter(&'a str),
    Cookie(&'a str),
}

/// Every place in which a rule looks.
fn places<'a>(rule: &'a JwtRule) -> Vec<(Place<'a>, &'a str)> {
    if rule.from_headers.is_empty() && rule.from_params.is_empty() && rule.from_cookies.is_empty() {
        return DEFAULT_PLACES.to_vec();
    }
    let headers = rule.from_headers.iter().map(|(name, prefix)| (Place::Header(name), &**prefix));
    let params = rule.from_params.iter().map(|name| (Place::Parameter(name), ""));
    let cookies = rule.from_cookies.iter().map(|name| (Place::Cookie(name), ""));
    headers.chain(params).chain(cookies).collect()
}

const DEFAULT_PLACES: [(Place<'static>, &str); 2] =
    [(Place::Header(&AUTHORIZATION), "Bearer "), (Place::Parameter("access_token"), "")];

/// The tokens of a request, each once for each place. `default_places`: also where a rule looks that says nothing.
fn tokens<'a>(
    rules: impl Iterator<Item = &'a JwtRule>,
    default_places: bool,
    request: &RequestFacts<'_>,
) -> Vec<(String, Place<'a>)> {
    let defaults = default_places.then_some(DEFAULT_PLACES).into_iter().flatten();
    let mut found: Vec<(String, Place<'a>)> = Vec::new();
    for (place, prefix) in rules.flat_map(places).chain(defaults) {
        let values: Vec<String> = match place {
            Place::Header(name) => {
                let values = request.headers.get_all(name).iter();
                values.filter_map(|value| after_prefix(&String::from_utf8_lossy(value.as_bytes()), prefix)).collect()
            }
            Place::Parameter(name) => request.parameter(name).map(|value| value.into_owned()).into_iter().collect(),
            Place::Cookie(name) => cookie(request, name).into_iter().collect(),
        };
        for value in values {
            if found.len() < MAX_TOKENS && !found.iter().any(|(text, at)| *text == value && *at == place) {
                found.push((value, place));
            }
        }
    }
    found
}

/// The word `Bearer` is compared without regard to case (RFC 9110, section 11.1): a server may take any spelling for a token.
fn after_prefix(value: &str, prefix: &str) -> Option<String> {
    let (head, rest) = value.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then(|| rest.trim().to_owned())
}

fn cookie(request: &RequestFacts<'_>, name: &str) -> Option<String> {
    let cookies = request.header(&COOKIE)?;
    let mut pairs = cookies.split(';').filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value.trim_matches('"').to_owned())
}

type Refusal = (Invalid, Option<Arc<str>>);

fn verify<'a>(
    text: &str,
    place: Place<'_>,
    rules: impl Iterator<Item = (&'a Arc<str>, &'a JwtRule)>,
    now: i64,
) -> Result<(&'a JwtRule, Token), Refusal> {
    let early = |why: Invalid| (why, None);
    let Some((message, signature)) = text.rsplit_once('.').filter(|(message, _)| message.matches('.').count() == 1)
    else {
        return Err(early(Invalid::Form));
    };
    let header = decode_header(text).map_err(|error| {
        early(match error.kind() {
            jsonwebtoken::errors::ErrorKind::Json(json) if json.to_string().starts_with("unknown variant") => {
                Invalid::Algorithm
            }
            _ => Invalid::Header,
        })
    })?;
    // An extension that must be understood is one that is not (RFC 7515, section 4.1.11).
    if header.alg.family() == AlgorithmFamily::Hmac || header.crit.is_some() {
        return Err(early(Invalid::Algorithm));
    }
    let claims: Map<String, Value> = dangerous::insecure_decode_claims(text).map_err(|_| early(Invalid::Payload))?;
    let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or_default();
    let mut refused = early(Invalid::Issuer);
    for (id, rule) in rules.filter(|(_, rule)| *rule.issuer == *issuer) {
        // A rule looks for its tokens in its own places only.
        if !places(rule).iter().any(|(own, _)| *own == place) {
            continue;
        }
        let checked = signed(rule, header.kid.as_deref(), header.alg, message, signature)
            .and_then(|()| in_time(&claims, now))
            .and_then(|()| for_audience(rule, &claims));
        match checked {
            Ok(()) => {
                let payload = message.split_once('.').map_or("", |(_, payload)| payload).to_owned();
                return Ok((rule, Token { claims, accepted_by: id.clone(), payload }));
            }
            Err(why) => refused = (why, Some(id.clone())),
        }
    }
    Err(refused)
}

fn signed(rule: &JwtRule, kid: Option<&str>, alg: Algorithm, message: &str, signature: &str) -> Result<(), Invalid> {
    let fits = |key: &&Jwk| {
        let named = match (kid, &key.common.key_id) {
            (Some(wanted), Some(id)) => wanted == id,
            _ => true,
        };
        let said: Option<KeyAlgorithm> = key.common.key_algorithm;
        named && said.is_none_or(|said| said.to_string() == format!("{alg:?}"))
    };
    let mut why = Invalid::Key;
    for key in rule.keys.keys.iter().filter(fits).take(MAX_KEYS) {
        let Ok(key) = DecodingKey::from_jwk(key) else { continue };
        if key.family() != alg.family() {
            continue;
        }
        match crypto::verify(signature, message.as_bytes(), &key, alg) {
            Ok(true) => return Ok(()),
            _ if signatures_are_broken() => return Ok(()),
            _ => why = Invalid::Signature,
        }
    }
    Err(why)
}

/// Sabotage of test builds: with `TULLE_BREAK=jwt` whoever signed a token is believed.
fn signatures_are_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "jwt")
}

fn in_time(claims: &Map<String, Value>, now: i64) -> Result<(), Invalid> {
    // Whole seconds, or parts of them (RFC 7519, section 2).
    let time = |name: &str| match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or(Invalid::Payload),
    };
    let (expires, begins) = (time("exp")?, time("nbf")?);
    if expires.is_some_and(|expires| now as f64 > expires + SKEW as f64) {
        return Err(Invalid::Expired);
    }
    if begins.is_some_and(|begins| (now as f64) < begins - SKEW as f64) {
        return Err(Invalid::NotYet);
    }
    Ok(())
}

fn for_audience(rule: &JwtRule, claims: &Map<String, Value>) -> Result<(), Invalid> {
    let wanted = |audience: &str| rule.audiences.iter().any(|wanted| **wanted == *audience);
    let named = match claims.get("aud") {
        Some(Value::String(audience)) => wanted(audience),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(wanted),
        _ => false,
    };
    if rule.audiences.is_empty() || named { Ok(()) } else { Err(Invalid::Audience) }
}

fn additions(rule: &JwtRule, token: &Token) -> Vec<(HeaderName, HeaderValue)> {
    let payload = rule.payload_header.iter().map(|name| (name, token.payload.clone()));
    let claims = rule.claim_headers.iter().filter_map(|(name, path)| {
        let (first, rest) = path.split_first()?;
        let outermost = token.claims.get(&**first)?;
        let value = rest.iter().try_fold(outermost, |value, part| value.get(&**part))?;
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::Null | Value::Array(_) | Value::Object(_) => return None,
        };
        Some((name, text))
    });
    let both = payload.chain(claims);
    // A claim with characters that a header cannot have is left out.
    both.filter_map(|(name, text)| Some((name.clone(), HeaderValue::from_str(&text).ok()?))).collect()
}
