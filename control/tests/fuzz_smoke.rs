//! The fuzz targets of control's parsers, for a bounded time on stable: good input, damaged in the usual ways.
//! `PROPTEST_CASES` sets how often; `fuzz/` searches without end.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(unreachable_pub, reason = "the included files are a library in fuzz/")]

#[path = "../../fuzz/src/control.rs"]
mod targets;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/smoke.rs"]
mod smoke;

use std::fs;
use std::path::PathBuf;

use prost::Message as _;
use tulle_proto::discovery::{DeltaDiscoveryRequest, Node};
use tulle_proto::names;

/// Good input for a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        // What users write, and every case of translation.
        "manifest" => ["../e2e/examples/shop", "src/translate/testdata"].into_iter().flat_map(files).collect(),
        "cluster" => vec![
            // After the byte that chooses the kind: pods, AuthorizationPolicies, EgressPolicies.
            b"\x03{\"metadata\":{\"resourceVersion\":\"7\",\"continue\":\"a\"},\"items\":[{\"metadata\":{\"name\":\"a\",\"namespace\":\"b\",\
              \"labels\":{\"c\":\"d\"}},\"spec\":{\"nodeName\":\"n\"},\"status\":{\"podIP\":\"10.0.0.1\"}}]}"
                .to_vec(),
            b"\x0b{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"a\",\"namespace\":\"b\"},\"spec\":{\"action\":\"DENY\",\
              \"rules\":[{\"to\":[{\"operation\":{\"paths\":[\"/a*\"]}}]}]}}}"
                .to_vec(),
            b"\x10{\"type\":\"ERROR\",\"object\":{\"code\":410,\"message\":\"too old\"}}".to_vec(),
        ],
        "token" => vec![b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJ0dWxsZSJ9.c2lnbmF0dXJl".to_vec()],
        "discovery" => vec![stream()],
        "keys" => vec![
            br#"{"keys":[{"kty":"EC","crv":"P-256","kid":"a","x":"AA","y":"AQ","d":"Ag"}],"more":null}"#.to_vec(),
            br#"{"issuer":"https://a","jwks_uri":"https://a/keys"}"#.to_vec(),
        ],
        "plugged" => vec![intermediate()],
        other => panic!("{other} has no seed; add one"),
    }
}

fn files(folder: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

/// A whole authority, as another CA would hand it over.
fn intermediate() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    tulle_certs::ca::Authority::open(dir.path(), 1_800_000_000).unwrap();
    ["root-cert.pem", "ca-cert.pem", "ca-key.pem"].map(|name| fs::read(dir.path().join(name)).unwrap()).join(&0)
}

/// The beginning of a stream: both types, then an acknowledgement.
fn stream() -> Vec<u8> {
    let request = |type_url: &str| DeltaDiscoveryRequest {
        node: Some(Node { id: "node-1".into(), ..Default::default() }),
        type_url: type_url.into(),
        resource_names_subscribe: vec!["*".into()],
        initial_resource_versions: [("shop/cart".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let mut bytes = Vec::new();
    for request in [
        request(names::TYPE_ADDRESS),
        request(names::TYPE_AUTHORIZATION),
        DeltaDiscoveryRequest { response_nonce: "1".into(), ..request(names::TYPE_ADDRESS) },
    ] {
        request.encode_length_delimited(&mut bytes).unwrap();
    }
    bytes
}

#[test]
fn no_target_breaks_on_damaged_input() {
    smoke::damaged(targets::TARGETS, seeds);
}

#[test]
fn no_target_breaks_on_noise() {
    smoke::noise(targets::TARGETS);
}
