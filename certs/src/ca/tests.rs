//! What the authority issues is checked with the verifier that the nodes use; the directory by racing and damaging it.
//! The clock is a number here.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rustls_pki_types::UnixTime;

use crate::ca::{Authority, INTERMEDIATE_LIFE_S, LEAF_LIFE_S, files};
use crate::{Crls, Issued, SpiffeId, Usage, VerifyError, parse_csr, request, verify_chain};

const NOW: i64 = 1_800_000_000;

fn at(unix_s: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(unix_s.unsigned_abs()))
}

fn id(sa: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", sa).expect("valid")
}

fn issue(authority: &Authority, sa: &str, life_s: i64, now: i64) -> Issued {
    let csr = parse_csr(&request(&id(sa)).expect("request").csr_pem).expect("csr");
    let chain = authority.sign(&csr, &id(sa), life_s, now).expect("signed");
    Issued::parse(&chain, &id(sa)).expect("own answer")
}

#[test]
fn issued_chain_proves_its_identity_in_both_roles() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), NOW).expect("open");
    let issued = issue(&authority, "cart", 0, NOW);
    assert_eq!(issued.chain.len(), 2);
    assert_eq!(issued.not_after, NOW + LEAF_LIFE_S);
    assert_eq!(issued.not_before, NOW - 60);
    assert_eq!(issued.serial.len(), 32);
    for usage in [Usage::Server, Usage::Client] {
        let proven = verify_chain(&issued.chain, &issued.roots, &Crls::default(), usage, at(NOW));
        assert_eq!(proven, Ok(id("cart")));
    }
    let late = verify_chain(&issued.chain, &issued.roots, &Crls::default(), Usage::Server, at(NOW + LEAF_LIFE_S + 1));
    assert!(matches!(late, Err(VerifyError::Invalid(_))), "{late:?}");
    assert_eq!(
        verify_chain(&[], &issued.roots, &Crls::default(), Usage::Server, at(NOW)),
        Err(VerifyError::NoCertificate)
    );
}

#[test]
fn another_root_is_not_trusted() {
    let (one, two) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    let one = Authority::open(one.path(), NOW).expect("open");
    let two = Authority::open(two.path(), NOW).expect("open");
    let issued = issue(&one, "cart", 0, NOW);
    let foreign = verify_chain(&issued.chain, two.roots(), &Crls::default(), Usage::Client, at(NOW));
    assert!(matches!(foreign, Err(VerifyError::Invalid(_))), "{foreign:?}");
}

#[test]
fn server_certificate_is_no_client_certificate_and_has_no_identity() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), NOW).expect("open");
    let names = ["localhost".to_owned(), "127.0.0.1".into(), "::1".into()];
    let server = authority.server_certificate(&names, NOW).expect("server");
    let as_client = verify_chain(&server.chain, authority.roots(), &Crls::default(), Usage::Client, at(NOW));
    assert!(matches!(as_client, Err(VerifyError::Invalid(_))), "{as_client:?}");
    let as_server = verify_chain(&server.chain, authority.roots(), &Crls::default(), Usage::Server, at(NOW));
    assert_eq!(as_server, Err(VerifyError::NoIdentity));
    assert!(authority.server_certificate(&["not a name".into()], NOW).is_err());
}

#[test]
fn life_is_capped_and_short_lives_are_backdated_little() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), NOW).expect("open");
    let cases = [
        (0, LEAF_LIFE_S, 60),
        (-5, LEAF_LIFE_S, 60),
        (1, 10, 1),
        (20, 20, 2),
        (600, 600, 60),
        (i64::MAX, LEAF_LIFE_S, 60),
    ];
    for (asked, life, back) in cases {
        let issued = issue(&authority, "cart", asked, NOW);
        assert_eq!((issued.not_after, issued.not_before), (NOW + life, NOW - back), "asked {asked}");
    }
}

#[test]
fn leaf_never_outlives_the_intermediate() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), NOW).expect("open");
    let late = authority.not_after() - 100;
    let csr = parse_csr(&request(&id("a")).expect("request").csr_pem).expect("csr");
    let chain = authority.sign(&csr, &id("a"), 0, late).expect("signed");
    let issued = Issued::parse(&chain, &id("a")).expect("answer");
    assert_eq!(issued.not_after, authority.not_after());
    assert!(authority.sign(&csr, &id("a"), 0, authority.not_after()).is_err());
}

#[test]
fn opening_again_changes_nothing_until_half_life_and_then_the_intermediate_only() {
    let dir = tempfile::tempdir().expect("dir");
    let first = Authority::open(dir.path(), NOW).expect("open");
    let before = first.sign_roots_and_intermediate();
    let again = Authority::open(dir.path(), NOW + 1000).expect("open");
    assert_eq!(again.sign_roots_and_intermediate(), before);
    let half = NOW + INTERMEDIATE_LIFE_S / 2 + 100;
    assert!(again.wants_renewal(half));
    let renewed = Authority::open(dir.path(), half).expect("open");
    assert_eq!(renewed.roots(), first.roots());
    assert_ne!(renewed.sign_roots_and_intermediate(), before);
    assert!(!renewed.wants_renewal(half));
    // Without the root's key the old intermediate goes on until it expires.
    std::fs::remove_file(dir.path().join(files::ROOT_KEY)).expect("remove");
    let later = half + INTERMEDIATE_LIFE_S / 2 + 100;
    Authority::open(dir.path(), later).expect("still valid");
    let error = Authority::open(dir.path(), half + INTERMEDIATE_LIFE_S + 100);
    let error = error.err().expect("expired").to_string();
    assert!(error.contains("restore the root's key"), "{error}");
}

#[test]
fn keys_are_private_and_racing_openers_agree() {
    let dir = tempfile::tempdir().expect("dir");
    let all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| Authority::open(dir.path(), NOW).expect("open"))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    for one in &all {
        assert_eq!(one.sign_roots_and_intermediate(), all[0].sign_roots_and_intermediate());
        assert_eq!(one.token_key().public_pem, all[0].token_key().public_pem);
    }
    for name in [files::ROOT_KEY, files::CA_KEY, files::TOKEN_KEY] {
        let mode = std::fs::metadata(dir.path().join(name)).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn damage_is_named_and_never_replaces_the_root() {
    let cases: &[(&str, &str, &str)] = &[
        (files::ROOT_CERT, "", "no certificate"),
        (files::ROOT_CERT, "garbage", "no certificate"),
        (files::ROOT_KEY, "garbage", "PKCS#8"),
        (files::CA_KEY, "garbage", "PKCS#8"),
        (files::CA_CERT, "garbage", "no certificate"),
        (files::TOKEN_KEY, "garbage", "PKCS#8"),
    ];
    for (name, content, expected) in cases {
        let dir = tempfile::tempdir().expect("dir");
        Authority::open(dir.path(), NOW).expect("open");
        std::fs::write(dir.path().join(name), content).expect("write");
        let error = Authority::open(dir.path(), NOW).err().expect("refused").to_string();
        assert!(error.contains(expected) && error.contains(name), "{name}: {error}");
    }
}

#[test]
fn an_interrupted_run_is_completed() {
    for lost in [files::ROOT_CERT, files::CA_CERT, files::CA_KEY, files::TOKEN_KEY] {
        let dir = tempfile::tempdir().expect("dir");
        let first = Authority::open(dir.path(), NOW).expect("open");
        std::fs::remove_file(dir.path().join(lost)).expect("remove");
        let second = Authority::open(dir.path(), NOW).expect(lost);
        let issued = issue(&second, "cart", 0, NOW);
        // Also with a new root certificate: it is of the same key.
        let proven = verify_chain(&issued.chain, first.roots(), &Crls::default(), Usage::Client, at(NOW));
        assert_eq!(proven, Ok(id("cart")), "{lost}");
    }
}

#[test]
fn answers_that_are_not_what_was_asked_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), NOW).expect("open");
    let csr = parse_csr(&request(&id("cart")).expect("request").csr_pem).expect("csr");
    let chain = authority.sign(&csr, &id("cart"), 0, NOW).expect("signed");
    let cases: Vec<(&str, Vec<String>, &str)> = vec![
        ("nothing", vec![], "0 entries"),
        ("no roots", chain[..1].to_vec(), "1 entries"),
        ("too many", vec![chain[0].clone(); 40], "at most"),
        ("leaf is text", vec!["x".into(), chain[2].clone()], "not a certificate"),
        ("roots are text", vec![chain[0].clone(), "x".into()], "roots"),
        ("root first", vec![chain[2].clone(), chain[2].clone()], "no identity"),
    ];
    for (name, chain, expected) in cases {
        let error = Issued::parse(&chain, &id("cart")).expect_err(name).to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let error = Issued::parse(&chain, &id("admin")).expect_err("other").to_string();
    assert!(error.contains("sa/cart, asked was for"), "{error}");
}

impl Authority {
    fn sign_roots_and_intermediate(&self) -> (String, Vec<u8>) {
        (self.roots().to_pem(), self.intermediate.to_vec())
    }
}
