//! A bundle of trusted roots, so that a root can be replaced while certificates of the old one still live.
//!
//! Every certificate of the bundle is parsed when the bundle is made; a bundle with one unusable root is refused
//! whole, because silently trusting fewer roots would cut off peers later and far from the cause.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::TrustAnchor;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::pem;

/// Most roots in a bundle. A rotation needs two; federation some more; anything else is a mistake.
pub const MAX_ROOTS: usize = 64;

/// One or more root certificates. Cheap to clone; equal if the certificates are, in order.
#[derive(Clone)]
pub struct Roots(Arc<Inner>);

struct Inner {
    certificates: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    facts: Vec<Facts>,
}

/// What a root says of itself.
#[derive(Clone, Copy)]
struct Facts {
    /// Start and end of its validity, seconds since the Unix epoch.
    validity: (i64, i64),
    /// It may sign certificates.
    is_ca: bool,
}

/// Why a bundle cannot be used.
#[derive(Debug, Error)]
pub enum RootsError {
    /// Nothing in it.
    #[error("the root bundle has no certificate in PEM")]
    Empty,
    /// More than [`MAX_ROOTS`].
    #[error("the root bundle has more than {MAX_ROOTS} certificates")]
    TooMany,
    /// A PEM block is damaged.
    #[error("certificate {index} of the root bundle is not valid PEM: {reason}")]
    Pem {
        /// Counted from 1.
        index: usize,
        /// What the PEM reader says.
        reason: String,
    },
    /// A certificate cannot be used as trust anchor.
    #[error("certificate {index} of the root bundle cannot be used as a root: {reason}")]
    Anchor {
        /// Counted from 1.
        index: usize,
        /// What webpki says.
        reason: webpki::Error,
    },
    /// A certificate is of somebody who may not sign others.
    #[error("certificate {index} of the root bundle is not a certificate authority's; put its root there")]
    NotAuthority {
        /// Counted from 1.
        index: usize,
    },
}

impl Roots {
    /// Reads a bundle of one or more PEM certificates; text between the blocks is skipped.
    pub fn from_pem(bundle: &[u8]) -> Result<Self, RootsError> {
        let mut certificates = Vec::new();
        for (index, certificate) in CertificateDer::pem_slice_iter(bundle).enumerate() {
            if index == MAX_ROOTS {
                return Err(RootsError::TooMany);
            }
            certificates
                .push(certificate.map_err(|error| RootsError::Pem { index: index + 1, reason: format!("{error:?}") })?);
        }
        Self::from_der(certificates)
    }

    /// Makes a bundle of certificates that are already decoded.
    pub fn from_der(certificates: Vec<CertificateDer<'static>>) -> Result<Self, RootsError> {
        if certificates.is_empty() {
            return Err(RootsError::Empty);
        }
        if certificates.len() > MAX_ROOTS {
            return Err(RootsError::TooMany);
        }
        let mut anchors = Vec::with_capacity(certificates.len());
        let mut facts = Vec::with_capacity(certificates.len());
        for (index, certificate) in certificates.iter().enumerate() {
            let anchor = webpki::anchor_from_trusted_cert(certificate)
                .map_err(|reason| RootsError::Anchor { index: index + 1, reason })?;
            anchors.push(anchor.to_owned());
            facts.push(self::facts(certificate));
        }
        Ok(Self(Arc::new(Inner { certificates, anchors, facts })))
    }

    /// The same for a bundle that somebody else wrote: every certificate must be an authority's, since one that is not
    /// would be trusted to sign all the same.
    pub fn of_authorities(self) -> Result<Self, RootsError> {
        match self.0.facts.iter().position(|facts| !facts.is_ca) {
            Some(index) => Err(RootsError::NotAuthority { index: index + 1 }),
            None => Ok(self),
        }
    }

    /// The roots that are valid at `now` (Unix seconds); `None`: there are none.
    pub fn valid_at(&self, now: i64) -> Option<Self> {
        let valid = |facts: &Facts| (facts.validity.0..=facts.validity.1).contains(&now);
        if self.0.facts.iter().all(valid) {
            return Some(self.clone());
        }
        let left = self.certificates().iter().zip(&self.0.facts).filter(|(_, facts)| valid(facts));
        Self::from_der(left.map(|(certificate, _)| certificate.clone()).collect()).ok()
    }

    /// End of each root's validity, Unix seconds, in order.
    pub fn ends(&self) -> impl Iterator<Item = i64> {
        self.0.facts.iter().map(|facts| facts.validity.1)
    }

    /// SHA-256 of each certificate, lower-case hex, in order.
    pub fn fingerprints(&self) -> Vec<String> {
        self.certificates().iter().map(|certificate| fingerprint(certificate)).collect()
    }

    /// The bundle as PEM, in order.
    pub fn to_pem(&self) -> String {
        self.certificates().iter().map(|certificate| pem::encode("CERTIFICATE", certificate)).collect()
    }

    /// The certificates, in order.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0.certificates
    }

    /// The same as webpki wants them.
    pub fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.0.anchors
    }
}

/// What cannot be read is never valid, and no authority's.
fn facts(certificate: &[u8]) -> Facts {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return Facts { validity: (i64::MAX, i64::MIN), is_ca: false };
    };
    let validity = parsed.validity();
    Facts { validity: (validity.not_before.timestamp(), validity.not_after.timestamp()), is_ca: parsed.is_ca() }
}

/// SHA-256 of a certificate in DER, lower-case hex: what people compare (`openssl x509 -fingerprint -sha256`).
pub fn fingerprint(certificate: &[u8]) -> String {
    Sha256::digest(certificate).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl PartialEq for Roots {
    fn eq(&self, other: &Self) -> bool {
        self.certificates() == other.certificates()
    }
}

impl Eq for Roots {}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roots({})", self.certificates().len())
    }
}
