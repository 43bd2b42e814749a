//! Does this chain prove an identity? webpki decides about signatures, time and usage, the revocation lists whether one of
//! its certificates was taken back, and this module about the name.
//!
//! A leaf with several URI SANs is refused outright: if one reader took the first and another any, the pair could be
//! played off against each other. The caller compares the identity, or its trust domain, with what it expects.

use std::sync::LazyLock;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::Crls;
use crate::Roots;
use crate::SpiffeId;
use crate::crl::Link;

/// Longest chain that is looked at, certificates. Ours has 2; a deeper PKI rarely more than 4.
const MAX_CHAIN: usize = 10;
/// Longest certificate that is looked at, bytes.
const MAX_CERTIFICATE_BYTES: usize = 64 * 1024;

/// What the peer is on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// The peer accepted the connection; its certificate must allow serverAuth.
    Server,
    /// The peer opened it; its certificate must allow clientAuth.
    Client,
}

/// Why a chain proves nothing. Always the peer's fault or that of its CA; retrying helps only for expiry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VerifyError {
    /// No certificate at all.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// More than ten certificates.
    #[error("the peer sent a chain of {0} certificates; at most {MAX_CHAIN} are looked at")]
    ChainTooLong(usize),
    /// The leaf is not a certificate.
    #[error("the peer's certificate cannot be read: {0}")]
    Unreadable(String),
    /// webpki's verdict: unknown issuer, expired, wrong usage, bad signature.
    #[error("the peer's certificate is not valid: {0}")]
    Invalid(webpki::Error),
    /// A certificate of the chain was taken back.
    #[error("the peer's certificate was revoked: serial number {serial} is in a revocation list of its issuer")]
    Revoked {
        /// Of the leaf or an intermediate, lower-case hex.
        serial: String,
    },
    /// The leaf names no URI.
    #[error("the peer's certificate names no identity (no URI among its subject alternative names)")]
    NoIdentity,
    /// The leaf names several URIs.
    #[error("the peer's certificate names {0} URIs; exactly one is allowed")]
    SeveralIdentities(usize),
    /// It names a trust domain that nobody vouches for.
    #[error(
        "the peer's certificate names {identity}, and there are no roots for the trust domain {}: add a \
         ClusterTrustBundle labelled tulle.dev/trust-domain: {} if its identities are to be believed",
        identity.trust_domain(),
        identity.trust_domain()
    )]
    UntrustedDomain {
        /// What it says; nothing is proven.
        identity: SpiffeId,
    },
    /// It names a federated trust domain whose roots have all ended.
    #[error("every root in the bundle of the trust domain {trust_domain} has expired or is not valid yet; renew it")]
    ExpiredRoots {
        /// The domain.
        trust_domain: String,
    },
    /// The URI is not a SPIFFE id of a service account.
    #[error("the peer's certificate names no usable identity: {0}")]
    BadIdentity(#[from] crate::SpiffeIdError),
}

/// The identity that a leaf names, unverified. Exactly one URI SAN, and it is a SPIFFE id.
pub fn leaf_identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, VerifyError> {
    if leaf.len() > MAX_CERTIFICATE_BYTES {
        return Err(VerifyError::Unreadable(format!("{} bytes", leaf.len())));
    }
    let (rest, certificate) =
        X509Certificate::from_der(leaf).map_err(|error| VerifyError::Unreadable(error.to_string()))?;
    if !rest.is_empty() {
        return Err(VerifyError::Unreadable("bytes after its end".into()));
    }
    let names = certificate.subject_alternative_name().map_err(|error| VerifyError::Unreadable(error.to_string()))?;
    let Some(names) = names else {
        return Err(VerifyError::NoIdentity);
    };
    let uris: Vec<&str> = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [] => Err(VerifyError::NoIdentity),
        [uri] => Ok(uri.parse()?),
        several => Err(VerifyError::SeveralIdentities(several.len())),
    }
}

/// Verifies a chain (leaf first) against the roots and revocation lists, for the usage, at a time; gives the identity it
/// proves.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    roots: &Roots,
    crls: &Crls,
    usage: Usage,
    now: UnixTime,
) -> Result<SpiffeId, VerifyError> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(VerifyError::NoCertificate);
    };
    if chain.len() > MAX_CHAIN {
        return Err(VerifyError::ChainTooLong(chain.len()));
    }
    let end_entity = EndEntityCert::try_from(leaf).map_err(VerifyError::Invalid)?;
    let usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    let path = end_entity
        .verify_for_usage(algorithms().all, roots.anchors(), intermediates, now, usage, None, None)
        .map_err(VerifyError::Invalid)?;
    if !crls.is_empty() {
        not_revoked(&path, sequence(path.anchor().subject_public_key_info.as_ref()), crls)?;
    }
    leaf_identity(leaf)
}

/// Whether the lists let a server's chain be that names no identity of the mesh, as control's own: `anchors` are all that
/// may vouch for it. Names are the caller's to check.
///
/// # Errors
/// [`VerifyError::Revoked`]; else why the chain proves nothing at all.
pub fn server_not_revoked(
    chain: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    crls: &Crls,
    now: UnixTime,
) -> Result<(), VerifyError> {
    let (leaf, intermediates) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
    if crls.is_empty() {
        return Ok(());
    }
    if chain.len() > MAX_CHAIN {
        return Err(VerifyError::ChainTooLong(chain.len()));
    }
    let end_entity = EndEntityCert::try_from(leaf).map_err(VerifyError::Invalid)?;
    let usage = KeyUsage::server_auth();
    let path = end_entity
        .verify_for_usage(algorithms().all, anchors, intermediates, now, usage, None, None)
        .map_err(VerifyError::Invalid)?;
    not_revoked(&path, sequence(path.anchor().subject_public_key_info.as_ref()), crls)
}

/// What an anchor holds of its root's SubjectPublicKeyInfo, as the DER that it was (X.690 §8.1.3).
fn sequence(value: &[u8]) -> Vec<u8> {
    let length = value.len().to_be_bytes();
    let digits = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    let mut der = vec![0x30];
    match value.len() {
        short @ ..128 => der.push(u8::try_from(short).unwrap_or_default()),
        _ => {
            der.push(0x80 | u8::try_from(digits.len()).unwrap_or_default());
            der.extend(digits);
        }
    }
    der.extend(value);
    der
}

/// Looks up each certificate of a verified path, with the key of the one above it; `root`: that of the anchor.
fn not_revoked(path: &VerifiedPath<'_>, root: Vec<u8>, crls: &Crls) -> Result<(), VerifyError> {
    let mut links: Vec<(&[u8], &[u8])> = vec![(path.end_entity().issuer(), path.end_entity().serial())];
    let mut keys: Vec<Vec<u8>> = Vec::new();
    for intermediate in path.intermediate_certificates() {
        keys.push(intermediate.subject_public_key_info().to_vec());
        links.push((intermediate.issuer(), intermediate.serial()));
    }
    keys.push(root);
    for ((issuer, serial), key) in links.into_iter().zip(&keys) {
        if crls.revoke(&Link { issuer, serial, key }) {
            return Err(VerifyError::Revoked { serial: serial.iter().map(|byte| format!("{byte:02x}")).collect() });
        }
    }
    Ok(())
}

fn algorithms() -> &'static WebPkiSupportedAlgorithms {
    static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
        LazyLock::new(|| rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms);
    &ALGORITHMS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls_pki_types::CertificateDer;

    use crate::leaf_identity;
    use crate::verify::sequence;

    #[test]
    fn an_anchors_key_is_the_der_of_its_root() {
        let cases: [(usize, &[u8]); 6] = [
            (0, &[0]),
            (1, &[1]),
            (127, &[127]),
            (128, &[0x81, 128]),
            (256, &[0x82, 1, 0]),
            (70_000, &[0x83, 1, 0x11, 0x70]),
        ];
        for (length, octets) in cases {
            let expected = [&[0x30], octets, &vec![7; length]].concat();
            assert_eq!(sequence(&vec![7; length]), expected, "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(der in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(leaf_identity(&CertificateDer::from(der)).is_err());
        }
    }
}
