//! Certificates that were taken back: the lists of `CRL_PATH` (RFC 5280 §5), and the question whether a chain is in one.
//!
//! A list counts for an issuer only if that issuer signed it; names are not enough, since a renewed intermediate has the
//! name of its predecessor. What no list speaks of is good, and a list past its `nextUpdate` still counts: a late list
//! must not cut a mesh in half, and a certificate that was taken back does not become good again by it. Limits: whole
//! lists only (no deltas, no indirect ones), [`MAX_CRL_BYTES`] and [`MAX_LISTS`].

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use thiserror::Error;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::der_parser::oid::Oid;
use x509_parser::oid_registry::{
    OID_PKCS1_RSASSAPSS, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
    OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519,
};
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};
use x509_parser::revocation_list::CertificateRevocationList;

/// Largest file that is read, bytes: some 200,000 serial numbers.
pub const MAX_CRL_BYTES: usize = 8 << 20;
/// Most lists in a file: one for each root and intermediate of the last year is a handful.
pub(crate) const MAX_LISTS: usize = 64;
/// Remembered answers to "did this issuer sign that list"; more issuers than this do not exist in one mesh.
const MAX_ANSWERS: usize = 1024;

/// Signatures that [`signature`] can check.
const CHECKED: [Oid<'static>; 7] = [
    OID_PKCS1_SHA256WITHRSA,
    OID_PKCS1_SHA384WITHRSA,
    OID_PKCS1_SHA512WITHRSA,
    OID_PKCS1_RSASSAPSS,
    OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384,
    OID_SIG_ED25519,
];

/// The lists in force. Cheap to clone; the default holds none.
#[derive(Clone, Default)]
pub struct Crls(Arc<Inner>);

#[derive(Default)]
struct Inner {
    lists: Vec<List>,
    /// Different serial numbers in them.
    serials: usize,
    /// Whether list `.0` was signed with the key whose digest is `.1`; a signature is checked once, not once a handshake.
    answers: Mutex<HashMap<(usize, [u8; 32]), bool>>,
}

struct List {
    der: CertificateRevocationListDer<'static>,
    parsed: CertRevocationList<'static>,
    next_update: Option<i64>,
}

/// Why a file of lists cannot be used. Its author's fault; the lists of before stay in force.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CrlError {
    /// Too large.
    #[error("the revocation lists have {0} bytes; at most {MAX_CRL_BYTES} are read")]
    TooLarge(usize),
    /// Too many.
    #[error("there are more than {MAX_LISTS} revocation lists; leave out those of issuers that are gone")]
    TooMany,
    /// A block is damaged.
    #[error("revocation list {index} is not valid PEM: {reason}")]
    Pem {
        /// Counted from 1.
        index: usize,
        /// What the reader says.
        reason: String,
    },
    /// Text without a list in it: a file of certificates, say.
    #[error("there is no `X509 CRL` block in it; a file that takes nothing back is empty")]
    NoList,
    /// Not a list, or one of a kind that is not supported.
    #[error("revocation list {index} cannot be used: {reason}")]
    Unusable {
        /// Counted from 1.
        index: usize,
        /// What is wrong.
        reason: String,
    },
}

/// A certificate and its issuer's public key, as a verified path has them.
pub(crate) struct Link<'a> {
    /// Issuer's name, as webpki gives it.
    pub(crate) issuer: &'a [u8],
    /// Serial number.
    pub(crate) serial: &'a [u8],
    /// The issuer's SubjectPublicKeyInfo, DER.
    pub(crate) key: &'a [u8],
}

impl Crls {
    /// Reads lists in PEM (text between the blocks is skipped), or one in DER. Nothing at all is no list.
    pub fn parse(bytes: &[u8]) -> Result<Self, CrlError> {
        if bytes.len() > MAX_CRL_BYTES {
            return Err(CrlError::TooLarge(bytes.len()));
        }
        let (mut lists, mut serials) = (Vec::new(), HashSet::new());
        // A SEQUENCE of DER; PEM begins with text.
        if bytes.first() == Some(&0x30) {
            lists.push(list(CertificateRevocationListDer::from(bytes.to_vec()), 1, &mut serials)?);
            return Ok(Self::of(lists, &serials));
        }
        for (index, der) in CertificateRevocationListDer::pem_slice_iter(bytes).enumerate() {
            let index = index + 1;
            if index > MAX_LISTS {
                return Err(CrlError::TooMany);
            }
            let der = der.map_err(|error| CrlError::Pem { index, reason: format!("{error:?}") })?;
            lists.push(list(der, index, &mut serials)?);
        }
        if lists.is_empty() && !bytes.trim_ascii().is_empty() {
            return Err(CrlError::NoList);
        }
        Ok(Self::of(lists, &serials))
    }

    fn of(lists: Vec<List>, serials: &HashSet<Vec<u8>>) -> Self {
        Self(Arc::new(Inner { lists, serials: serials.len(), answers: Mutex::default() }))
    }

    /// Number of lists.
    pub fn lists(&self) -> usize {
        self.0.lists.len()
    }

    /// Certificates that were taken back. One whose issuer is not known for sure is in the lists of all that it may be, and
    /// counts once.
    pub fn serials(&self) -> usize {
        self.0.serials
    }

    /// Lists that should have been replaced before `now` (Unix seconds).
    pub fn overdue(&self, now: i64) -> usize {
        self.0.lists.iter().filter(|list| list.next_update.is_some_and(|next| next < now)).count()
    }

    /// Whether there is nothing to look up.
    pub fn is_empty(&self) -> bool {
        self.0.lists.is_empty()
    }

    /// Whether a list of its issuer names the certificate.
    pub(crate) fn revoke(&self, link: &Link<'_>) -> bool {
        self.0.lists.iter().enumerate().any(|(index, list)| {
            list.parsed.issuer() == link.issuer
                && matches!(list.parsed.find_serial(link.serial), Ok(Some(_)))
                && self.signed(index, list, link.key)
        })
    }

    fn signed(&self, index: usize, list: &List, key: &[u8]) -> bool {
        let name = (index, Sha256::digest(key).into());
        let answers = || self.0.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = answers().get(&name) {
            return *answer;
        }
        let answer = signature(&list.der, key).unwrap_or(false);
        let mut answers = answers();
        if answers.len() < MAX_ANSWERS {
            answers.insert(name, answer);
        }
        answer
    }
}

/// `None`: one of both cannot be read.
fn signature(der: &[u8], key: &[u8]) -> Option<bool> {
    let (_, list) = CertificateRevocationList::from_der(der).ok()?;
    let (_, key) = SubjectPublicKeyInfo::from_der(key).ok()?;
    Some(list.verify_signature(&key).is_ok())
}

/// Reads one list; what it names joins `serials`.
fn list(
    der: CertificateRevocationListDer<'static>,
    index: usize,
    serials: &mut HashSet<Vec<u8>>,
) -> Result<List, CrlError> {
    let unusable = |reason: String| CrlError::Unusable { index, reason };
    // Refuses what is not understood: versions, critical extensions, deltas, indirect lists.
    let parsed = OwnedCertRevocationList::from_der(&der).map_err(|error| unusable(error.to_string()))?;
    let (rest, facts) = CertificateRevocationList::from_der(&der).map_err(|error| unusable(error.to_string()))?;
    if !rest.is_empty() {
        return Err(unusable("there are bytes after its end".to_owned()));
    }
    // A list whose signature nobody here can check would count for nobody, and nobody would know.
    let algorithm = &facts.signature_algorithm.algorithm;
    if !CHECKED.contains(algorithm) {
        return Err(unusable(format!(
            "signatures of kind {algorithm} cannot be checked; sign it with SHA-256 or SHA-384"
        )));
    }
    serials.extend(facts.iter_revoked_certificates().map(|entry| entry.raw_serial().to_vec()));
    let next_update = facts.next_update().map(|time| time.timestamp());
    Ok(List { next_update, parsed: parsed.into(), der })
}

impl PartialEq for Crls {
    fn eq(&self, other: &Self) -> bool {
        self.0.lists.iter().map(|list| &list.der).eq(other.0.lists.iter().map(|list| &list.der))
    }
}

impl Eq for Crls {}

impl fmt::Debug for Crls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Crls({} lists, {} certificates)", self.lists(), self.serials())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_no_list_and_something_else_is_an_error() {
        assert!(Crls::parse(b"").unwrap().is_empty());
        assert!(Crls::parse(b" \n").unwrap().is_empty());
        assert_eq!(Crls::parse(b"serial 17"), Err(CrlError::NoList));
        let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(Crls::parse(certificate.as_bytes()), Err(CrlError::NoList));
        let damaged = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
        let error = Crls::parse(damaged.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("revocation list 1 cannot be used"), "{error}");
        assert!(matches!(Crls::parse(b"\x30\x03\x01"), Err(CrlError::Unusable { index: 1, .. })));
        assert!(matches!(Crls::parse(&vec![b' '; MAX_CRL_BYTES + 1]), Err(CrlError::TooLarge(_))));
    }

    #[test]
    fn a_list_whose_signature_cannot_be_checked_is_refused() {
        for (algorithm, usable) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, true),
            (&rcgen::PKCS_ECDSA_P384_SHA384, true),
            (&rcgen::PKCS_ED25519, true),
            (&rcgen::PKCS_ECDSA_P521_SHA512, false),
        ] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let mut ca = rcgen::CertificateParams::default();
            ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            ca.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
            let params = rcgen::CertificateRevocationListParams {
                this_update: rcgen::date_time_ymd(2026, 1, 1),
                next_update: rcgen::date_time_ymd(2027, 1, 1),
                crl_number: rcgen::SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: vec![rcgen::RevokedCertParams {
                    serial_number: rcgen::SerialNumber::from(7),
                    revocation_time: rcgen::date_time_ymd(2026, 1, 1),
                    reason_code: None,
                    invalidity_date: None,
                }],
                key_identifier_method: rcgen::KeyIdMethod::Sha256,
            };
            let list = params.signed_by(&rcgen::Issuer::new(ca, key)).unwrap();
            let found = Crls::parse(list.der());
            assert_eq!(found.is_ok(), usable, "{found:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Crls::parse(&bytes);
            let mut der = vec![0x30];
            der.extend_from_slice(&bytes);
            prop_assert!(Crls::parse(&der).is_err());
        }
    }
}
