//! Parsers of the control plane.
//!
//! The same rules as for the node's: bytes in, a panic when a promise is broken.

use std::collections::BTreeMap;

use control::authn::Verifier;
use control::resource::Kind;
use control::source::files;
use control::source::kube::json;
use control::source::kube::kinds::KINDS;
use control::source::kube::known::{Event, Known};
use control::xds::session::{Abilities, Session};
use prost::Message as _;
use tulle_proto::discovery::DeltaDiscoveryRequest;

/// A target.
pub type Target = fn(&[u8]);

/// Every target of this file, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("manifest", manifest),
    ("cluster", cluster),
    ("token", token),
    ("discovery", discovery),
    ("keys", keys),
    ("plugged", plugged),
];

/// A file of objects, from a user.
pub fn manifest(data: &[u8]) {
    let parsed = files::parse(data);
    let lines = data.iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
    for error in &parsed.errors {
        let text = error.error.to_string();
        assert!(!text.is_empty());
        assert!((1..=lines + 1).contains(&error.error.line), "line {} of {lines}: {text}", error.error.line);
    }
}

/// A page of a list and a line of a watch, from the API server, with objects of its users in them.
pub fn cluster(data: &[u8]) {
    // The first byte chooses the kind, as the request does.
    let (chosen, rest) = data.split_first().unwrap_or((&0, data));
    let place = usize::from(*chosen) % KINDS.len();
    let mut known = Known::default();
    known.apply(place, Event::Started, 1);
    if let Ok(page) = json::page(rest, &KINDS[place]) {
        let most = page.items.len();
        known.apply(place, Event::Page(page.items), 1);
        known.apply(place, Event::Listed(page.version), 1);
        assert!(known.followed()[place].objects <= most);
    }
    match json::line(rest, &KINDS[place]) {
        Ok(json::Line::Applied(item, version)) => {
            let (namespace, name) = (item.namespace.clone(), item.name.clone());
            known.apply(place, Event::Applied(item, version), 2);
            assert!(known.loaded().problems.iter().all(|problem| !problem.to_string().is_empty()));
            known.apply(place, Event::Gone(namespace, name, String::new()), 3);
        }
        Ok(_) => {}
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// The public half of a key whose private half nobody has.
const KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeTUiPazQr9VMKRpXwwhBdgcXFFt1
4PI5qDf1iiiDO2EbzpWd3rXfwNrVPDYgWENEW0TCSjMmVV4IPDUGkav67Q==
-----END PUBLIC KEY-----
";

/// A bearer token, from a caller.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let key = tulle_certs::ca::TokenKey { private_pem: String::new(), public_pem: KEY.to_owned() };
    let verifier = Verifier::new(&key).expect("the key is one");
    let refused = verifier.verify(text, 1_800_000_000).expect_err("nobody can sign with this key");
    assert!(!refused.to_string().is_empty());
    // What tells a token of the API server from one of ours, before anybody has checked it.
    let issuer = control::authn::unverified(text).map(|claims| claims.issuer);
    assert!(issuer.is_none_or(|issuer| issuer.len() <= text.len()));
}

/// A key set, and an issuer's description, from a server that a user named.
pub fn keys(data: &[u8]) {
    match control::keys::key_set(data) {
        Ok(set) => assert_eq!(control::keys::key_set(set.as_bytes()), Ok(set.clone()), "what is sent is a key set"),
        Err(reason) => assert!(!reason.is_empty()),
    }
    let _ = control::keys::keys_of_issuer(data);
}

/// The Secret of another CA, from whoever plugged it in: its bundle, its certificate and its key, each after a zero byte.
pub fn plugged(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let names = ["root-cert.pem", "ca-cert.pem", "ca-key.pem"].map(str::to_owned);
    let secret: BTreeMap<String, String> = names.into_iter().zip(text.split('\0').map(str::to_owned)).collect();
    if let Err(error) = tulle_certs::ca::plugged::Given::read(&secret) {
        let said = error.to_string();
        assert!(!said.is_empty());
        let key = secret.get("ca-key.pem").map_or("", String::as_str);
        let quoted = key.lines().map(str::trim).find(|line| line.len() >= 16 && said.contains(line));
        assert_eq!(quoted, None, "the error quotes the key");
    }
}

/// A request on a discovery stream, from a node.
pub fn discovery(data: &[u8]) {
    let mut session = Session::new(Abilities { dry_run: true, takes: [Kind::NetworkPolicy].into() });
    // Several requests on one stream, each after its length.
    let mut rest = data;
    while let Ok(request) = DeltaDiscoveryRequest::decode_length_delimited(&mut rest) {
        if let Err(violation) = session.handle_request(&request) {
            assert!(!violation.to_string().is_empty());
            return;
        }
        let _ = (session.acked_generation(), session.nacks(), session.subscriptions());
        if rest.is_empty() {
            return;
        }
    }
}
