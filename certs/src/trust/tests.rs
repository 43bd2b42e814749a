//! Every domain against every signer: a table of confusions by hand, and all combinations against one sentence.

use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::*;
use crate::Roots;
use crate::ca::Authority;
use crate::{Issued, RootsError, parse_csr, request};

const NOW: i64 = 1_800_000_000;
/// Our own, another name of it that may be configured, and three others.
const DOMAINS: [&str; 5] = ["own.example", "alias.example", "b.example", "c.example", "d.example"];

fn at(unix_s: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(unix_s.unsigned_abs()))
}

/// A chain, leaf first.
type Chain = Vec<CertificateDer<'static>>;

/// Three authorities, and what each would sign for every domain. The first one is ours.
struct Pki {
    roots: Vec<Roots>,
    chains: Vec<Vec<Chain>>,
}

static PKI: LazyLock<Pki> = LazyLock::new(|| {
    let authorities: Vec<Authority> =
        (0..3).map(|_| Authority::open(tempfile::tempdir().expect("dir").path(), NOW).expect("open")).collect();
    let sign = |authority: &Authority, domain: &str| {
        let id = SpiffeId::new(domain, "shop", "cart").expect("valid");
        let csr = parse_csr(&request(&id).expect("request").csr_pem).expect("csr");
        Issued::parse(&authority.sign(&csr, &id, 0, NOW).expect("signed"), &id).expect("own answer").chain
    };
    Pki {
        roots: authorities.iter().map(|authority| authority.roots().clone()).collect(),
        chains: authorities.iter().map(|one| DOMAINS.iter().map(|domain| sign(one, domain)).collect()).collect(),
    }
});

fn union(signers: &[usize]) -> Roots {
    let all = signers.iter().flat_map(|signer| PKI.roots[*signer].certificates().to_vec());
    Roots::from_der(all.collect()).expect("roots")
}

fn verify(chain: &Chain, aliases: &Aliases, foreign: &Bundles) -> Result<SpiffeId, VerifyError> {
    let trusted = Trusted { own: DOMAINS[0], aliases, roots: &PKI.roots[0], foreign };
    let client = verify_peer(chain, &trusted, &Crls::default(), Usage::Client, at(NOW));
    assert_eq!(client, verify_peer(chain, &trusted, &Crls::default(), Usage::Server, at(NOW)));
    client
}

#[test]
fn who_signs_for_whom_is_never_confused() {
    let (own, alias, b, c) = (0, 1, 2, 3);
    let (ours, theirs, third) = (0, 1, 2);
    let none = Bundles::default();
    let with_b = none.with("b.example", union(&[theirs]));
    let both = with_b.with("c.example", union(&[third]));
    let shared = none.with("b.example", union(&[theirs, third])).with("c.example", union(&[third]));
    let of_us = none.with("own.example", union(&[theirs])).with("alias.example", union(&[theirs]));
    let ours_too = none.with("b.example", union(&[ours]));
    let table: [(&str, &Bundles, bool, usize, usize, &str); 18] = [
        ("our own", &none, false, ours, own, "ok"),
        ("theirs without a bundle", &none, false, theirs, b, "no roots for the trust domain b.example"),
        ("theirs with a bundle", &with_b, false, theirs, b, "ok"),
        ("our domain by a foreign root", &with_b, false, theirs, own, "not valid"),
        ("a foreign domain by our root", &with_b, false, ours, b, "not valid"),
        ("a foreign domain by our root, without a bundle", &none, false, ours, b, "no roots"),
        ("one foreign domain by another's root", &both, false, theirs, c, "not valid"),
        ("the other way", &both, false, third, b, "not valid"),
        ("a shared root for the one", &shared, false, third, b, "ok"),
        ("a shared root for the other", &shared, false, third, c, "ok"),
        ("the root that is not shared", &shared, false, theirs, c, "not valid"),
        ("a bundle for our domain is not asked", &of_us, false, theirs, own, "not valid"),
        ("and takes nothing away", &of_us, false, ours, own, "ok"),
        ("nor for an alias of it", &of_us, true, theirs, alias, "not valid"),
        ("an alias by our root", &none, true, ours, alias, "ok"),
        ("what is no alias any more is foreign", &none, false, ours, alias, "no roots"),
        ("whoever says so is believed with our root", &ours_too, false, ours, b, "ok"),
        ("but then only with that one", &ours_too, false, theirs, b, "not valid"),
    ];
    for (what, foreign, aliased, signer, domain, expected) in table {
        let aliases = Aliases::new(aliased.then(|| "alias.example".to_owned()));
        let found = match verify(&PKI.chains[signer][domain], &aliases, foreign) {
            Ok(id) => {
                assert_eq!(id.trust_domain(), DOMAINS[domain], "{what}");
                "ok".to_owned()
            }
            Err(error) => error.to_string(),
        };
        assert!(found.contains(expected), "{what}: {found}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_chain_is_good_exactly_if_its_domains_own_roots_signed_it(
        aliased in any::<bool>(),
        bundles in proptest::collection::vec(0u8..8, DOMAINS.len()),
    ) {
        let aliases = Aliases::new(aliased.then(|| "alias.example".to_owned()));
        let signers = |mask: u8| (0..3).filter(|bit| mask & (1 << bit) != 0).collect::<Vec<_>>();
        let mut foreign = Bundles::default();
        for (domain, mask) in DOMAINS.iter().zip(&bundles).filter(|(_, mask)| **mask != 0) {
            foreign = foreign.with(domain, union(&signers(*mask)));
        }
        for (signer, chains) in PKI.chains.iter().enumerate() {
            for (domain, chain) in chains.iter().enumerate() {
                let ours = domain == 0 || (domain == 1 && aliased);
                let expected = if ours { signer == 0 } else { signers(bundles[domain]).contains(&signer) };
                let found = verify(chain, &aliases, &foreign);
                prop_assert_eq!(found.is_ok(), expected, "{} signed by {}: {:?}", DOMAINS[domain], signer, found);
            }
        }
    }
}

/// A foreign authority that does what ours never would.
struct Rogue {
    params: CertificateParams,
    key: KeyPair,
    root: CertificateDer<'static>,
}

impl Rogue {
    fn new(days: (i64, i64)) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        lives(&mut params, days);
        let key = KeyPair::generate().expect("key");
        let root = params.self_signed(&key).expect("root").der().clone();
        Self { params, key, root }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn leaf(&self, uris: &[&str]) -> CertificateDer<'static> {
        let key = KeyPair::generate().expect("key");
        leaf_params(uris).signed_by(&key, &self.issuer()).expect("leaf").der().clone()
    }
}

/// From and until, days from now.
fn lives(params: &mut CertificateParams, (first, last): (i64, i64)) {
    let day = |days: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs((NOW + days * 86_400).unsigned_abs());
    (params.not_before, params.not_after) = (day(first), day(last));
}

fn leaf_params(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    lives(&mut params, (-1, 1));
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth, rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().expect("ASCII"))).collect();
    params
}

const THEIRS: &str = "spiffe://b.example/ns/shop/sa/cart";
const OURS: &str = "spiffe://own.example/ns/shop/sa/cart";

#[test]
fn a_leaf_with_two_names_is_refused_whichever_of_them_is_trusted() {
    let rogue = Rogue::new((-10, 10));
    let foreign = Bundles::default().with("b.example", Roots::from_der(vec![rogue.root.clone()]).expect("root"));
    let check = |uris: &[&str]| verify(&vec![rogue.leaf(uris)], &Aliases::default(), &foreign);
    assert_eq!(check(&[THEIRS]).expect("good").as_str(), THEIRS);
    assert_eq!(check(&[THEIRS, OURS]), Err(VerifyError::SeveralIdentities(2)));
    assert_eq!(check(&[OURS, THEIRS]), Err(VerifyError::SeveralIdentities(2)));
    assert!(matches!(check(&[OURS]), Err(VerifyError::Invalid(_))));
}

#[test]
fn an_intermediate_counts_for_the_domain_of_its_root_only() {
    let rogue = Rogue::new((-10, 10));
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().expect("key");
    let intermediate = params.signed_by(&key, &rogue.issuer()).expect("signed").der().clone();
    let issuer = Issuer::from_params(&params, &key);
    let chain = |uri: &str| {
        let leaf = leaf_params(&[uri]).signed_by(&KeyPair::generate().expect("key"), &issuer).expect("leaf");
        vec![leaf.der().clone(), intermediate.clone()]
    };
    let root = Roots::from_der(vec![rogue.root.clone()]).expect("root");
    let (b, c) = (Bundles::default().with("b.example", root.clone()), Bundles::default().with("c.example", root));
    let none = Aliases::default();
    assert!(verify(&chain(THEIRS), &none, &b).is_ok());
    assert!(matches!(verify(&chain(OURS), &none, &b), Err(VerifyError::Invalid(_))));
    assert!(matches!(verify(&chain(THEIRS), &none, &c), Err(VerifyError::UntrustedDomain { .. })));
    // Our own chain hung below their intermediate, or theirs below ours, is no path.
    let mixed = vec![PKI.chains[0][2][0].clone(), intermediate.clone(), PKI.chains[0][2][1].clone()];
    assert!(matches!(verify(&mixed, &none, &b), Err(VerifyError::Invalid(_))));
}

#[test]
fn an_expired_root_counts_for_nobody() {
    let (old, new) = (Rogue::new((-10, -1)), Rogue::new((-2, 10)));
    let roots = |of: &[&Rogue]| Roots::from_der(of.iter().map(|one| one.root.clone()).collect()).expect("roots");
    let check = |signer: &Rogue, of: &[&Rogue]| {
        let foreign = Bundles::default().with("b.example", roots(of));
        verify(&vec![signer.leaf(&[THEIRS])], &Aliases::default(), &foreign)
    };
    assert!(check(&new, &[&old, &new]).is_ok());
    assert!(matches!(check(&old, &[&old, &new]), Err(VerifyError::Invalid(_))));
    assert_eq!(check(&old, &[&old]), Err(VerifyError::ExpiredRoots { trust_domain: "b.example".into() }));
}

#[test]
fn a_bundle_of_somebody_else_holds_authorities_only() {
    let rogue = Rogue::new((-10, 10));
    let bundle = |second| Roots::from_der(vec![rogue.root.clone(), second]).expect("both are certificates");
    assert!(bundle(rogue.root.clone()).of_authorities().is_ok());
    let leaf = bundle(rogue.leaf(&[THEIRS])).of_authorities();
    assert!(matches!(leaf, Err(RootsError::NotAuthority { index: 2 })), "{leaf:?}");
}

#[test]
fn an_alias_stands_for_the_own_domain_and_for_no_other() {
    let id = |domain: &str, account: &str| SpiffeId::new(domain, "shop", account).expect("valid");
    let aliases = Aliases::new(["old.example".to_owned(), " ".to_owned()]);
    let cases = [
        ("own.example", "own.example", "cart", true),
        ("own.example", "old.example", "cart", true),
        ("old.example", "own.example", "cart", true),
        ("own.example", "old.example", "admin", false),
        ("own.example", "else.example", "cart", false),
        ("else.example", "own.example", "cart", false),
        ("else.example", "old.example", "cart", false),
        // Another mesh's endpoint is who it is.
        ("else.example", "else.example", "cart", true),
    ];
    for (expected, proven, account, same) in cases {
        let got = aliases.same("own.example", &id(expected, "cart"), &id(proven, account));
        assert_eq!(got, same, "{expected} {proven}/{account}");
    }
    assert!(!Aliases::default().same("own.example", &id("own.example", "cart"), &id("old.example", "cart")));
    assert!(!aliases.covers("own.example", ""));
}
