//! Hygiene of headers between two connections: what belongs to one of them goes no further, what only a proxy may say is
//! not taken from an application, and a request that two readers could read differently is refused.
//!
//! `gate` and hyper have framed the message before (bad chunking, folded lines, contradicting lengths never come here); this
//! is what they leave to the program. Pure, and fuzzed.

use http::header::{
    CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Uri, Version};
use hyper::ext::Protocol;

use crate::route::RequestFacts;

/// Headers of one connection (RFC 9110 §7.6.1, RFC 9112), besides those that `Connection` names.
const HOP: [&str; 5] =
    ["keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "http2-settings"];

/// Most headers of a message: what Envoy takes.
pub const MOST_HEADERS: usize = 100;

/// Why a request is refused, for its client. Always status 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// What routes and policies are asked about a request; `path` is the normalised one, `port` that of the destination.
pub fn facts<'a, B>(request: &'a Request<B>, path: &'a str, port: u16) -> RequestFacts<'a> {
    RequestFacts {
        method: request.method().as_str(),
        scheme: "http",
        authority: authority(request),
        port,
        path,
        query: request.uri().query(),
        headers: request.headers(),
    }
}

/// The protocol that a request asks to continue with, if it is a proper request for that. Not another HTTP or TLS, which
/// would take the requests behind it past routes and policies: such a wish is passed over (RFC 9110 §7.8 leaves it to the
/// server), and the request is answered as any other.
pub fn upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    if version != Version::HTTP_11 || !names(headers, "upgrade") {
        return None;
    }
    let protocol = headers.get(UPGRADE)?;
    let hidden = protocol.to_str().ok()?.split(',').any(|one| {
        let name = one.split('/').next().unwrap_or_default().trim();
        ["h2c", "h2", "h3", "http", "tls"].iter().any(|known| name.eq_ignore_ascii_case(known))
    });
    (!hidden).then(|| protocol.clone())
}

/// The wish for a WebSocket over HTTP/2 (extended CONNECT, RFC 8441): turned into the GET that it would be over HTTP/1.1, which
/// is what routes and policies are asked about, as with Envoy. False: it is none, and stays what it is; so do wishes for anything
/// else, since policies may not know what a tunnel of that kind reaches.
pub fn extended<B>(request: &mut Request<B>) -> bool {
    let protocol = request.extensions().get::<Protocol>();
    let wish = protocol.is_some_and(|protocol| protocol.as_str().eq_ignore_ascii_case("websocket"));
    let wish = wish && request.version() == Version::HTTP_2 && request.method() == Method::CONNECT;
    if wish {
        *request.method_mut() = Method::GET;
    }
    wish
}

/// Whether a request is such a wish that was turned.
pub fn is_extended<B>(request: &Request<B>) -> bool {
    request.extensions().get::<Protocol>().is_some() && request.method() != Method::CONNECT
}

/// Whether `Connection` names `option`.
fn names(headers: &HeaderMap, option: &str) -> bool {
    options(headers).any(|name| name.eq_ignore_ascii_case(option))
}

fn options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
}

/// Removes what belongs to one connection. `keep_upgrade`: the message takes part in a change of protocol, which both
/// connections make.
pub fn strip_hop(headers: &mut HeaderMap, keep_upgrade: Option<&HeaderValue>) {
    let named: Vec<HeaderName> = options(headers).filter_map(|name| name.parse().ok()).collect();
    for name in named {
        // A client cannot have the mesh remove what the mesh or the framing needs.
        if name != HOST && name != CONTENT_LENGTH && name != TE && name != TRAILER {
            headers.remove(name);
        }
    }
    headers.remove(CONNECTION);
    headers.remove(TRANSFER_ENCODING);
    headers.remove(UPGRADE);
    for name in HOP {
        headers.remove(name);
    }
    // "trailers" is the one thing that TE may say to the next hop (gRPC needs it).
    let trailers = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    let trailers = trailers.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case("trailers"));
    headers.remove(TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = keep_upgrade {
        headers.insert(UPGRADE, protocol.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

/// Removes what only a proxy may say: who the client is and what a proxy shall do. An application that sends these could
/// otherwise pass for another one with whoever believes them.
pub fn strip_forged(headers: &mut HeaderMap) {
    headers.remove(FORWARDED);
    headers.remove("x-forwarded-client-cert");
    let envoy: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with("x-envoy-")).cloned().collect();
    for name in envoy {
        headers.remove(name);
    }
}

/// Checks what hyper leaves open and brings the target into the form in which both versions are routed: path and query
/// alone for HTTP/1, with the authority in `Host`.
///
/// # Errors
/// What two readers could read differently.
pub fn check<B>(request: &mut Request<B>, default_host: &str) -> Result<(), Malformed> {
    let hosts = request.headers().get_all(HOST).iter().count();
    if hosts > 1 {
        return Err(Malformed("more than one Host header"));
    }
    if request.headers().get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err(Malformed("more than one Content-Length header"));
    }
    let none = |host: &HeaderValue| host.as_bytes().contains(&b'@') || Authority::try_from(host.as_bytes()).is_err();
    if request.headers().get(HOST).is_some_and(none) {
        return Err(Malformed("a Host header that is none"));
    }
    if request.uri().path() == "*" && request.method() != Method::OPTIONS {
        return Err(Malformed("a target that only OPTIONS may have"));
    }
    if request.uri().path().bytes().any(|byte| byte == b'#') {
        return Err(Malformed("a fragment in the request target"));
    }
    if request.version() == Version::HTTP_2 {
        return check_h2(request);
    }
    if request.method() == Method::CONNECT {
        return Ok(());
    }
    if let Some(authority) = request.uri().authority().cloned() {
        // An absolute target wins over Host (RFC 9112 §3.2.2), so there is only one of them from here on.
        let host = HeaderValue::from_str(host_of(&authority)).map_err(|_| Malformed("a bad authority"))?;
        request.headers_mut().insert(HOST, host);
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
    } else if hosts == 0 {
        if request.version() == Version::HTTP_11 {
            return Err(Malformed("no Host header"));
        }
        let host = HeaderValue::from_str(default_host).map_err(|_| Malformed("no Host header"))?;
        request.headers_mut().insert(HOST, host);
    }
    Ok(())
}

/// Checks how an answer says its length, and leaves one way of saying it.
///
/// # Errors
/// What two readers could read differently: such an answer is two (RFC 9112 §6.3).
pub fn check_answer(headers: &mut HeaderMap) -> Result<(), Malformed> {
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        return Err(Malformed("both Content-Length and Transfer-Encoding"));
    }
    // hyper has compared them.
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    if let (Some(first), Some(_)) = (lengths.next().cloned(), lengths.next()) {
        headers.insert(CONTENT_LENGTH, first);
    }
    Ok(())
}

fn check_h2<B>(request: &mut Request<B>) -> Result<(), Malformed> {
    let Some(authority) = request.uri().authority() else {
        return if request.headers().contains_key(HOST) { Ok(()) } else { Err(Malformed("no :authority")) };
    };
    let host = host_of(authority);
    if host != authority.as_str() {
        return Err(Malformed("a user in :authority"));
    }
    if request.headers().get(HOST).is_some_and(|given| !given.as_bytes().eq_ignore_ascii_case(host.as_bytes())) {
        return Err(Malformed("Host differs from :authority"));
    }
    request.headers_mut().remove(HOST);
    Ok(())
}

/// Host and port, without the user that an authority may carry.
fn host_of(authority: &Authority) -> &str {
    authority.as_str().rsplit('@').next().unwrap_or_default()
}

/// Gives the application the path that was decided about.
pub fn respell<B>(request: &mut Request<B>, path: &str) -> Option<()> {
    if request.uri().path() == path {
        return Some(());
    }
    let target = match request.uri().query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    *request.uri_mut() = Uri::from_parts(parts).ok()?;
    Some(())
}

/// The authority that a request is for.
pub fn authority<B>(request: &Request<B>) -> &str {
    let header = || request.headers().get(HOST).and_then(|host| host.to_str().ok());
    request.uri().authority().map(host_of).or_else(header).unwrap_or_default()
}

/// Whether a request wants errors as gRPC has them, in an answer of 200: to a wish for a WebSocket that would be a grant.
pub fn wants_grpc<B>(request: &Request<B>) -> bool {
    is_grpc(request.headers()) && !is_extended(request)
}

/// Whether the client is a gRPC one, which wants errors in its own form.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(http::header::CONTENT_TYPE) else { return false };
    let kind = kind.as_bytes();
    kind.starts_with(b"application/grpc") && matches!(kind.get(16), None | Some(b'+' | b';'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn what_belongs_to_one_connection_goes_no_further() {
        let mut headers = map(&[
            ("connection", "close, X-Secret"),
            ("connection", "host"),
            ("host", "cart"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("upgrade", "websocket"),
            ("x-kept", "1"),
        ]);
        strip_hop(&mut headers, None);
        assert_eq!(headers, map(&[("host", "cart"), ("x-kept", "1"), ("te", "trailers")]));
        let websocket = HeaderValue::from_static("websocket");
        let mut headers = map(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(upgrade(&headers, Version::HTTP_11), Some(websocket.clone()));
        assert_eq!(upgrade(&headers, Version::HTTP_10), None);
        strip_hop(&mut headers, Some(&websocket));
        assert_eq!(headers, map(&[("upgrade", "websocket"), ("connection", "upgrade")]));
        for protocol in ["h2c", "H2C", "websocket, h2c", "HTTP/2.0", "TLS/1.2", "h2c/1"] {
            let mut headers = map(&[("connection", "upgrade"), ("upgrade", protocol), ("http2-settings", "AAMAAABk")]);
            let wish = upgrade(&headers, Version::HTTP_11);
            assert_eq!(wish, None, "{protocol}");
            strip_hop(&mut headers, wish.as_ref());
            assert!(headers.is_empty(), "{protocol}: {headers:?}");
        }
    }

    #[test]
    fn what_only_a_proxy_may_say_is_not_taken_from_an_application() {
        let mut headers = map(&[
            ("x-forwarded-client-cert", "By=spiffe://a;URI=spiffe://b"),
            ("x-envoy-attempt-count", "3"),
            ("x-envoy-retry-on", "5xx"),
            ("forwarded", "for=10.0.0.1"),
            ("x-forwarded-for", "10.0.0.1"),
        ]);
        strip_forged(&mut headers);
        assert_eq!(headers, map(&[("x-forwarded-for", "10.0.0.1")]));
    }

    #[test]
    fn a_request_has_exactly_one_host() {
        type Case<'a> = (&'a str, Version, &'a [(&'static str, &'static str)], Result<(&'a str, &'a str), &'a str>);
        let cases: &[Case<'_>] = &[
            ("/a?b", Version::HTTP_11, &[("host", "cart:80")], Ok(("/a?b", "cart:80"))),
            ("http://real/a", Version::HTTP_11, &[("host", "other")], Ok(("/a", "real"))),
            ("http://u@real", Version::HTTP_11, &[], Ok(("/", "real"))),
            ("/", Version::HTTP_11, &[], Err("no Host header")),
            ("/", Version::HTTP_10, &[], Ok(("/", "10.0.0.1:80"))),
            ("/", Version::HTTP_11, &[("host", "a"), ("host", "a")], Err("more than one Host header")),
            ("/", Version::HTTP_11, &[("host", "a b")], Err("a Host header that is none")),
            ("/", Version::HTTP_11, &[("host", "cart@admin")], Err("a Host header that is none")),
            ("*", Version::HTTP_11, &[("host", "a")], Err("a target that only OPTIONS may have")),
            ("http://u@a/x", Version::HTTP_2, &[], Err("a user in :authority")),
            ("http://a/x", Version::HTTP_2, &[("host", "A")], Ok(("/x", "a"))),
            ("http://a/x", Version::HTTP_2, &[("host", "b")], Err("Host differs from :authority")),
            ("/x", Version::HTTP_2, &[], Err("no :authority")),
            (
                "/",
                Version::HTTP_11,
                &[("host", "a"), ("content-length", "1"), ("content-length", "1")],
                Err("more than one Content-Length header"),
            ),
        ];
        for (uri, version, headers, expected) in cases {
            let mut request = Request::builder().uri(*uri).version(*version).body(()).unwrap();
            *request.headers_mut() = map(headers);
            let found = check(&mut request, "10.0.0.1:80");
            let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
            let found = found.map(|()| (path.as_str(), authority(&request))).map_err(|error| error.0);
            assert_eq!(found, *expected, "{uri} {version:?} {headers:?}");
        }
    }

    #[test]
    fn an_answer_says_its_length_in_one_way() {
        let mut headers = map(&[("content-length", "1"), ("content-length", "1")]);
        assert_eq!((check_answer(&mut headers), headers), (Ok(()), map(&[("content-length", "1")])));
        let mut headers = map(&[("content-length", "1"), ("transfer-encoding", "chunked")]);
        assert!(check_answer(&mut headers).is_err());
    }

    #[test]
    fn grpc_is_told_from_its_look_alikes() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&map(&[("content-type", kind)])), expected, "{kind}");
        }
    }
}
