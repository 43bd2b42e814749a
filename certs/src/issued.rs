//! The CA's answer as the node keeps it: leaf and intermediates to present, roots to verify peers with.
//!
//! The roots that come with a certificate are the ones its holder trusts for workloads, not the file that the control
//! plane's own certificate is checked against; that is how a node learns of a new root before any peer uses it.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::Roots;
use crate::RootsError;
use crate::SpiffeId;
use crate::VerifyError;
use crate::leaf_identity;

/// Most entries of an answer that are read: leaf, a few intermediates, roots.
const MAX_ENTRIES: usize = 16;

/// A certificate as the CA issued it.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first, then intermediates, no root: what is presented to peers.
    pub chain: Vec<CertificateDer<'static>>,
    /// What peers are verified with.
    pub roots: Roots,
    /// The leaf's identity.
    pub identity: SpiffeId,
    /// Start of the leaf's validity, seconds since the Unix epoch.
    pub not_before: i64,
    /// End of it.
    pub not_after: i64,
    /// The leaf's serial number, lower-case hex.
    pub serial: String,
}

/// Why an answer of the CA cannot be used. The CA's fault; another try may reach another replica.
#[derive(Debug, Error)]
pub enum IssuedError {
    /// Fewer than two entries: no root came along.
    #[error("the CA's answer has {0} entries; it needs a leaf and, last, the roots")]
    TooShort(usize),
    /// More than sixteen entries.
    #[error("the CA's answer has {0} entries; at most {MAX_ENTRIES} are read")]
    TooLong(usize),
    /// An entry is not PEM.
    #[error("entry {index} of the CA's answer is not a certificate in PEM: {reason}")]
    Pem {
        /// Counted from 1.
        index: usize,
        /// What the PEM reader says.
        reason: String,
    },
    /// The last entry is no usable bundle.
    #[error("the roots in the CA's answer cannot be used: {0}")]
    Roots(#[from] RootsError),
    /// The leaf cannot be read or has no identity.
    #[error("the leaf in the CA's answer cannot be used: {0}")]
    Leaf(#[from] VerifyError),
    /// The leaf is for somebody else.
    #[error("the CA issued a certificate for {found}, asked was for {expected}")]
    WrongIdentity {
        /// What the leaf names.
        found: SpiffeId,
        /// What was asked for.
        expected: SpiffeId,
    },
}

impl Issued {
    /// Reads the `cert_chain` of a CA response: leaf, intermediates, and last all roots in one string.
    pub fn parse(cert_chain: &[String], expected: &SpiffeId) -> Result<Self, IssuedError> {
        let (last, entries) = match cert_chain {
            [] | [_] => return Err(IssuedError::TooShort(cert_chain.len())),
            [entries @ .., last] => (last, entries),
        };
        if cert_chain.len() > MAX_ENTRIES {
            return Err(IssuedError::TooLong(cert_chain.len()));
        }
        let roots = Roots::from_pem(last.as_bytes())?;
        let mut chain = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            read_entry(entry, index + 1, &mut chain)?;
        }
        let Some(leaf) = chain.first() else {
            return Err(IssuedError::TooShort(0));
        };
        let identity = leaf_identity(leaf)?;
        if identity != *expected {
            return Err(IssuedError::WrongIdentity { found: identity, expected: expected.clone() });
        }
        let facts = facts(leaf)?;
        Ok(Self {
            roots,
            identity,
            not_before: facts.not_before,
            not_after: facts.not_after,
            serial: facts.serial,
            chain,
        })
    }
}

/// What is read from a certificate besides its names.
pub(crate) struct Facts {
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
    pub(crate) serial: String,
}

pub(crate) fn facts(certificate: &CertificateDer<'_>) -> Result<Facts, VerifyError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| VerifyError::Unreadable(error.to_string()))?;
    Ok(Facts {
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
        serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

fn read_entry(entry: &str, index: usize, chain: &mut Vec<CertificateDer<'static>>) -> Result<(), IssuedError> {
    let before = chain.len();
    for certificate in CertificateDer::pem_slice_iter(entry.as_bytes()) {
        chain.push(certificate.map_err(|error| IssuedError::Pem { index, reason: format!("{error:?}") })?);
        if chain.len() > MAX_ENTRIES {
            return Err(IssuedError::TooLong(chain.len()));
        }
    }
    if chain.len() == before {
        return Err(IssuedError::Pem { index, reason: "no certificate in it".into() });
    }
    Ok(())
}

/// End of a certificate's validity, seconds since the Unix epoch; `None` if it is not a certificate.
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    X509Certificate::from_der(certificate).ok().map(|(_, parsed)| parsed.validity().not_after.timestamp())
}
