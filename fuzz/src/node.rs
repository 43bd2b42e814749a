//! Parsers of the node proxy and of the certificates crate.
//!
//! A target takes bytes, ignores those that cannot reach the parser (most take text), and asserts what must hold for
//! everything that was accepted.

use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use tulle_certs::{Issued, Roots, SpiffeId, Usage};
use ztunnel::dns::wire;
use ztunnel::hbone::headers::{self, Authority, Baggage, Forwarded, TraceId};
use ztunnel::xds::decode::{self, Strings};

/// A target.
pub type Target = fn(&[u8]);

/// Every target of this file, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("connect", connect),
    ("baggage", baggage),
    ("forwarded", forwarded),
    ("traceparent", traceparent),
    ("denial", denial),
    ("pods", pods),
    ("address", address),
    ("authorization", authorization),
    ("network-policy", network_policy),
    ("trust-bundle", trust_bundle),
    ("duration", duration),
    ("spiffe", spiffe),
    ("csr", csr),
    ("roots", roots),
    ("issued", issued),
    ("certificate", certificate),
    ("crl", crl),
    ("dns", dns),
];

/// The authority of a CONNECT request, from a peer.
pub fn connect(data: &[u8]) {
    let Ok(uri) = Uri::builder().authority(data).build() else { return };
    let Ok(request) = Request::builder().method(Method::CONNECT).uri(uri).body(()) else { return };
    match headers::destination(&request) {
        Ok(Authority::Address(address)) => {
            assert!(address.port() != 0, "port 0 was accepted");
            assert_eq!(address.to_string().parse(), Ok(Authority::Address(address)));
        }
        Ok(Authority::Host(host, port)) => {
            assert!(port != 0 && !host.is_empty() && host.len() <= 253, "{host}:{port}");
            // A host of digits and dots alone could be read as an address the second time, and then is one.
            assert!(format!("{host}:{port}").parse::<Authority>().is_ok());
        }
        Err(outcome) => assert!(!outcome.detail.is_empty(), "a refusal without a reason"),
    }
}

/// What a peer says about its workload.
pub fn baggage(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = Baggage::parse(text);
    if let Some(header) = parsed.to_header("deployment") {
        let written = header.to_str().unwrap_or_default();
        assert_eq!(Baggage::parse(written), parsed, "{written:?}");
    }
}

/// What a peer says about its client.
pub fn forwarded(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = Forwarded::parse(text);
    assert!(parsed.host.as_ref().is_none_or(|host| !host.is_empty() && host.len() <= 253));
    let _ = parsed.to_header();
}

/// A trace id.
pub fn traceparent(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match TraceId::parse(text) {
        Ok(id) => {
            let header = id.to_header(1).expect("a trace id can be written");
            assert_eq!(TraceId::parse(header.to_str().unwrap_or_default()), Ok(id));
        }
        Err(reason) => assert!(reason.contains("traceparent"), "{reason}"),
    }
}

/// The reason that another proxy gives for a refusal.
pub fn denial(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::FORBIDDEN;
    *response.headers_mut() = HeaderMap::from_iter([(headers::DENIAL, value)]);
    let outcome = headers::refused(&response);
    assert!(!outcome.code.is_success(), "a refusal that is no failure");
    // It goes on to the next proxy as it came.
    let again = headers::refused(&headers::refusal(&outcome));
    assert_eq!(again.code, outcome.code);
}

/// The list of the node's pods.
pub fn pods(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(reason) = ztunnel::capture::pods::parse(text) {
        assert!(!reason.is_empty());
    }
}

/// A workload or a service, from control.
pub fn address(data: &[u8]) {
    if let Err(reason) = decode::address(data, "1", &mut Strings::default()) {
        assert!(!reason.is_empty());
    }
}

/// A policy, from control.
pub fn authorization(data: &[u8]) {
    match decode::authorization(data, "shop/policy", "1") {
        Ok(policy) => assert_eq!(&*policy.id, "shop/policy"),
        Err(error) => assert!(!error.reason.is_empty()),
    }
}

/// The roots of another trust domain, from control.
pub fn trust_bundle(data: &[u8]) {
    match decode::trust_bundle(data, "TrustBundle/b.example", "1") {
        Ok(bundle) => {
            assert_eq!(&*bundle.trust_domain, "b.example");
            assert!(!bundle.roots.certificates().is_empty(), "a bundle that vouches for nobody");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// A NetworkPolicy, from control.
pub fn network_policy(data: &[u8]) {
    match decode::network_policy(data, "NetworkPolicy/shop/policy", "1") {
        Ok(policy) => {
            assert_eq!(&*policy.id, "NetworkPolicy/shop/policy");
            let rules = policy.ingress.iter().chain(&policy.egress).flatten().count();
            assert!(policy.unreadable.is_none() || rules == 0, "an unreadable policy that allows");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// A setting.
pub fn duration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = ztunnel::config::duration(text);
}

/// An identity.
pub fn spiffe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "an identity is written as it was read");
        assert_eq!(SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()).as_ref(), Ok(&id));
    }
}

/// A certificate request, from a node.
pub fn csr(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = tulle_certs::parse_csr(text);
}

/// A bundle of roots.
pub fn roots(data: &[u8]) {
    if let Ok(roots) = Roots::from_pem(data) {
        let again = Roots::from_pem(roots.to_pem().as_bytes()).expect("a bundle that was written can be read");
        assert_eq!(again.certificates(), roots.certificates());
    }
}

/// What the CA answers.
pub fn issued(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(expected) = SpiffeId::new("cluster.local", "shop", "cart") else { return };
    let parts: Vec<String> = text.split("\n\n").map(str::to_owned).collect();
    if let Ok(issued) = Issued::parse(&parts, &expected) {
        assert_eq!(issued.identity, expected);
    }
}

/// A certificate of a peer, before anything is known about it.
pub fn certificate(data: &[u8]) {
    let leaf = rustls_pki_types::CertificateDer::from(data);
    let _ = tulle_certs::leaf_identity(&leaf);
    let _ = tulle_certs::not_after(&leaf);
    let now = rustls_pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_800_000_000));
    if let Ok(roots) = Roots::from_der(vec![leaf.clone().into_owned()]) {
        let _ = tulle_certs::verify_chain(&[leaf], &roots, &tulle_certs::Crls::default(), Usage::Server, now);
    }
}

/// The file that `CRL_PATH` names.
pub fn crl(data: &[u8]) {
    if let Ok(crls) = tulle_certs::Crls::parse(data) {
        // A file of something else must not pass for one that takes nothing back.
        assert_eq!(crls.is_empty(), data.trim_ascii().is_empty());
    }
}

/// A question of a pod, or an answer of a name server.
pub fn dns(data: &[u8]) {
    let Ok(message) = wire::parse(data) else { return };
    let _ = message.lifetime(data);
    let again = wire::parse(&wire::normalised(&message, data)).expect("a question that is written can be read");
    assert_eq!((again.kind, again.class, &again.name), (message.kind, message.class, &message.name));
    let refused = wire::refusal(&message, data, 2, &wire::OwnEdns::default());
    assert!(wire::parse(&refused).is_ok_and(|refused| refused.flags.is_response()));
    if let Some(body) = wire::Body::new(data.to_vec(), message.clone()) {
        for limit in [0, 64, 512, 65_535] {
            let answer = body.respond(&message, data, 1, &wire::OwnEdns::default(), limit);
            assert!(wire::parse(&answer).is_ok(), "an answer cut to {limit} bytes is no message");
        }
    }
}
