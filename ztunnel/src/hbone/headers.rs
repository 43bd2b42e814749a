//! The headers of a CONNECT request: made and read here only, once, into exact types.
//!
//! Everything comes from a peer that proved an identity of the mesh and may still send anything: every parser returns
//! a value or an error and cannot panic. Only the authority decides something; the others are for telemetry.

use std::fmt;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, Uri};

use crate::outcome::{Code, Outcome};

/// What describes the source workload (W3C baggage).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// The client's address (RFC 7239).
pub const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
/// W3C trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Network of the source, in the inner tunnel to another network.
pub const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
/// Why a CONNECT was refused: `code=…; policy=<namespace>/<name>; rule=<index>; text=…`. Peers without it see the status.
pub const DENIAL: HeaderName = HeaderName::from_static("tulle-denial");

/// Longest header value that is looked at. Longer ones are ignored or, in the authority, refused.
const LONGEST: usize = 4096;

/// Where a tunnel stream wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// `ip:port`, `[v6]:port`.
    Address(SocketAddr),
    /// `service-hostname:servicePort`, from another network.
    Host(String, u16),
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Authority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("the authority has {} bytes; at most {LONGEST} are allowed", text.len()));
        }
        if let Ok(addr) = text.parse::<SocketAddr>() {
            if addr.port() == 0 {
                return Err(format!("the authority {text:?} has port 0"));
            }
            return Ok(Self::Address(SocketAddr::new(addr.ip().to_canonical(), addr.port())));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("the authority {text:?} has no port"))?;
        let digits = port.bytes().all(|b| b.is_ascii_digit());
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|port| digits && *port != 0)
            .ok_or_else(|| format!("the authority {text:?} has a port that is not 1 to 65535"))?;
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if host.is_empty() || host.len() > 253 || !host.chars().all(legal) {
            return Err(format!("the authority {text:?} has no valid host name or address"));
        }
        Ok(Self::Host(host.to_ascii_lowercase(), port))
    }
}

/// What the source says about itself, besides its identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<String>,
    /// `k8s.namespace.name`.
    pub namespace: Option<String>,
    /// Name of the workload: the value of `k8s.<type>.name`.
    pub workload: Option<String>,
    /// `service.name`.
    pub service: Option<String>,
    /// `service.version`.
    pub version: Option<String>,
    /// `cloud.region`.
    pub region: Option<String>,
    /// `cloud.availability_zone`.
    pub zone: Option<String>,
}

impl Baggage {
    /// As Istio writes it: a key only where there is a value.
    pub fn to_header(&self, kind: &str) -> Option<HeaderValue> {
        let mut text = String::new();
        let workload_key = format!("k8s.{kind}.name");
        let entries = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (workload_key.as_str(), &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        for (key, value) in entries {
            let Some(value) = value.as_deref().filter(|value| !value.is_empty()) else { continue };
            if !text.is_empty() {
                text.push(',');
            }
            let _ = write!(text, "{key}={value}");
        }
        HeaderValue::from_str(&text).ok().filter(|_| !text.is_empty())
    }

    /// Reads what it can; anything else is skipped.
    pub fn parse(text: &str) -> Self {
        let mut baggage = Self::default();
        for entry in text.get(..text.len().min(LONGEST)).unwrap_or("").split(',') {
            // Properties behind a semicolon are legal and unused.
            let entry = entry.split(';').next().unwrap_or("");
            let Some((key, value)) = entry.split_once('=') else { continue };
            let value = value.trim();
            if !is_name(value) {
                continue;
            }
            let slot = match key.trim() {
                "k8s.cluster.name" => &mut baggage.cluster,
                "k8s.namespace.name" => &mut baggage.namespace,
                "k8s.deployment.name" | "k8s.cronjob.name" | "k8s.pod.name" | "k8s.job.name" => &mut baggage.workload,
                "service.name" => &mut baggage.service,
                "service.version" => &mut baggage.version,
                "cloud.region" => &mut baggage.region,
                "cloud.availability_zone" => &mut baggage.zone,
                _ => continue,
            };
            *slot = Some(value.to_owned());
        }
        baggage
    }
}

/// `for` and `host` of a `forwarded` header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// The client's address, where it is one.
    pub client: Option<SocketAddr>,
    /// Host name of the service that the client addressed.
    pub host: Option<String>,
}

impl Forwarded {
    /// As Istio writes it.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let mut text = String::new();
        if let Some(client) = self.client {
            let _ = write!(text, "for=\"{client}\"");
        }
        if let Some(host) = &self.host {
            let separator = if text.is_empty() { "" } else { ";" };
            let _ = write!(text, "{separator}host={host}");
        }
        HeaderValue::from_str(&text).ok().filter(|_| !text.is_empty())
    }

    /// Reads the first element; anything else is skipped.
    pub fn parse(text: &str) -> Self {
        let mut forwarded = Self::default();
        let first = text.get(..text.len().min(LONGEST)).unwrap_or("").split(',').next().unwrap_or("");
        for pair in first.split(';') {
            let Some((key, value)) = pair.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            if key.trim().eq_ignore_ascii_case("for") {
                forwarded.client = value
                    .parse::<SocketAddr>()
                    .ok()
                    .or_else(|| value.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0)));
            } else if key.trim().eq_ignore_ascii_case("host") && is_name(value) {
                forwarded.host = Some(value.to_owned());
            }
        }
        forwarded
    }
}

/// W3C trace context, version 00: only the trace id is used, to join the two log lines of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl TraceId {
    /// From a random number; zero is not allowed by the format.
    pub fn new(random: u128) -> Self {
        Self(random.max(1))
    }

    /// The header, with `span` as the parent.
    pub fn to_header(self, span: u64) -> Option<HeaderValue> {
        HeaderValue::from_str(&format!("00-{:032x}-{:016x}-00", self.0, span.max(1))).ok()
    }

    /// Reads `00-<32 hex>-<16 hex>-<2 hex>`.
    ///
    /// # Errors
    /// What is wrong with it. The connection goes on with an id of its own.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split('-');
        let [version, trace, span, flags] = [parts.next(), parts.next(), parts.next(), parts.next()];
        let (Some(version), Some(trace), Some(_), Some(_)) =
            (hex(version, 2), hex(trace, 32), hex(span, 16), hex(flags, 2))
        else {
            return Err(format!(
                "traceparent {text:?} is not version-trace-span-flags in hex (W3C Trace Context §3.2)"
            ));
        };
        if version.eq_ignore_ascii_case("ff") || (version == "00" && parts.next().is_some()) {
            return Err(format!("traceparent {text:?} has an invalid version"));
        }
        match u128::from_str_radix(trace, 16) {
            Ok(0) | Err(_) => Err(format!("traceparent {text:?} has trace id zero")),
            Ok(id) => Ok(Self(id)),
        }
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Whether `value` may be a name: short, and of visible ASCII, so that it can be written into a header as it was read.
fn is_name(value: &str) -> bool {
    (1..=253).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic())
}

/// `part`, if it is exactly `len` hexadecimal digits.
fn hex(part: Option<&str>, len: usize) -> Option<&str> {
    part.filter(|part| part.len() == len && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A CONNECT request (RFC 9113 §8.5).
///
/// # Errors
/// If the authority is not one, which would be our own mistake.
pub fn connect_request(authority: &str, headers: HeaderMap) -> Result<Request<()>, http::Error> {
    let uri = Uri::builder().authority(authority).build()?;
    let mut request = Request::builder().method(Method::CONNECT).uri(uri).body(())?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// Where a request wants to go.
///
/// # Errors
/// `BadRequest` with the sentence that the peer gets back.
pub fn destination<B>(request: &Request<B>) -> Result<Authority, Outcome> {
    if request.method() != Method::CONNECT {
        let text = format!("HBONE takes CONNECT requests only, this is {}", request.method());
        return Err(Outcome::new(Code::BadRequest, text));
    }
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    authority.parse().map_err(|error: String| Outcome::new(Code::BadRequest, error))
}

/// A header as text, if it is short and visible.
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|value| value.len() <= LONGEST)
}

/// The answer that refuses a stream, with the reason for the other proxy's log.
pub fn refusal(outcome: &Outcome) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = outcome.code.status();
    let mut value = format!("code={}", outcome.code.name());
    if let Some(policy) = &outcome.policy {
        let _ = write!(value, "; policy={policy}");
    }
    if let Some(rule) = outcome.rule {
        let _ = write!(value, "; rule={rule}");
    }
    if !outcome.detail.is_empty() {
        let visible: String =
            outcome.detail.chars().filter(|c| c.is_ascii() && !c.is_ascii_control()).take(512).collect();
        let _ = write!(value, "; text={visible}");
    }
    if let Ok(value) = HeaderValue::from_str(&value) {
        response.headers_mut().insert(DENIAL, value);
    }
    response
}

/// The outcome of an answer that is not 200.
pub fn refused<B>(response: &Response<B>) -> Outcome {
    let header = text(response.headers(), &DENIAL).unwrap_or("");
    let mut outcome =
        Outcome::new(Code::TunnelRefused, format!("the destination's proxy answered {}", response.status()));
    let (fields, detail) = match header.split_once("; text=") {
        Some((fields, detail)) => (fields, Some(detail)),
        None => (header, None),
    };
    for field in fields.split("; ") {
        match field.split_once('=') {
            Some(("code", name)) => {
                // Who may leave is decided here; no other proxy can say it.
                let code = Code::from_name(name).filter(|code| *code != Code::NetworkPolicyEgress);
                outcome.code = code.unwrap_or(Code::TunnelRefused);
            }
            Some(("policy", policy)) => outcome.policy = Some(Arc::from(policy)),
            Some(("rule", rule)) => outcome.rule = rule.parse().ok(),
            _ => {}
        }
    }
    if outcome.code == Code::Ok {
        outcome.code = Code::TunnelRefused;
    }
    if let Some(detail) = detail {
        outcome.detail = format!("the destination's proxy says: {detail}").into();
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::{Authority, Baggage, Forwarded, TraceId, refusal, refused};
    use crate::outcome::{Code, Outcome};
    use proptest::prelude::*;

    #[test]
    fn authorities_are_addresses_or_hosts() {
        for (text, good) in [
            ("10.0.0.1:80", true),
            ("[fd00::1]:80", true),
            ("[::ffff:10.0.0.1]:80", true),
            ("cart.shop.svc.cluster.local:80", true),
            ("10.0.0.1", false),
            ("10.0.0.1:0", false),
            ("10.0.0.1:65536", false),
            (":80", false),
            ("", false),
            ("a b:80", false),
            ("fd00::1:80x", false),
            ("host:-1", false),
            ("host:+80", false),
            ("user@host:80", false),
        ] {
            assert_eq!(text.parse::<Authority>().is_ok(), good, "{text}");
        }
        assert_eq!("[::ffff:10.0.0.1]:80".parse::<Authority>().unwrap().to_string(), "10.0.0.1:80");
    }

    #[test]
    fn a_traceparent_of_55_characters_with_two_segments_is_refused_and_does_not_panic() {
        assert!(TraceId::parse(&format!("00-{}1", "0".repeat(51))).is_err());
        assert!(TraceId::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").is_ok());
        for bad in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4bf92f3577b34da6a3ce929d0e0e473ö-00f067aa0ba902b7-01",
        ] {
            assert!(TraceId::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_refusal_survives_the_wire() {
        let mut outcome = Outcome::new(Code::PolicyDenied, "denied by policy shop/no-cart rule 0");
        outcome.policy = Some("shop/no-cart".into());
        outcome.rule = Some(0);
        let back = refused(&refusal(&outcome));
        assert_eq!(back.code, Code::PolicyDenied);
        assert_eq!(back.policy.as_deref(), Some("shop/no-cart"));
        assert_eq!(back.rule, Some(0));
        assert!(back.detail.contains("no-cart"));
    }

    #[test]
    fn telemetry_headers_round_trip() {
        let baggage = Baggage {
            cluster: Some("c1".into()),
            namespace: Some("shop".into()),
            workload: Some("cart".into()),
            service: None,
            version: Some("v1".into()),
            region: Some("r1".into()),
            zone: None,
        };
        let header = baggage.to_header("deployment").unwrap();
        assert_eq!(Baggage::parse(header.to_str().unwrap()), baggage);
        let forwarded = Forwarded { client: Some("10.0.0.1:5".parse().unwrap()), host: Some("a.b".into()) };
        assert_eq!(Forwarded::parse(forwarded.to_header().unwrap().to_str().unwrap()), forwarded);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,200}") {
            let _ = text.parse::<Authority>();
            let _ = TraceId::parse(&text);
            let _ = Baggage::parse(&text);
            let _ = Forwarded::parse(&text);
        }
    }
}
