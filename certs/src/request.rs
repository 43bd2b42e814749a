//! Certificate requests (PKCS#10): making them on the node, reading them at the CA.
//!
//! A request is foreign input to the CA. Of it only the public key and the one SPIFFE URI are used; everything else
//! that a requester may ask for (names, usages, life as a CA) is refused or ignored, because the CA alone decides what
//! a certificate says.

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256,
    PublicKeyData, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use thiserror::Error;

use crate::SpiffeId;

/// Longest request that is looked at, bytes. One of ours has about 600; RSA-4096 with names about 2500.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

/// A new private key and the request for its certificate.
pub struct Request {
    /// The key, PKCS#8. It stays on the node.
    pub key: PrivatePkcs8KeyDer<'static>,
    /// The request, PEM.
    pub csr_pem: String,
}

/// A request could not be made: an error of the cryptographic library, not of the caller.
#[derive(Debug, Error)]
#[error("cannot make a key and certificate request for {identity}: {reason}")]
pub struct RequestError {
    identity: SpiffeId,
    reason: rcgen::Error,
}

/// Makes a P-256 key and a request with an empty subject and one critical URI SAN.
pub fn request(identity: &SpiffeId) -> Result<Request, RequestError> {
    let fail = |reason| RequestError { identity: identity.clone(), reason };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(fail)?;
    let mut params = CertificateParams::default();
    // An empty subject is what makes the SAN critical.
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().map_err(fail)?)];
    let csr_pem = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(fail)?;
    Ok(Request { key: key.into(), csr_pem })
}

/// What the CA takes from a request.
#[derive(Debug)]
pub struct ParsedCsr {
    /// The identity that the request names.
    pub identity: SpiffeId,
    pub(crate) public_key: rcgen::PublicKey,
}

/// Why a request cannot be signed. Every case is the requester's fault; the same request fails again.
#[derive(Debug, Error)]
pub enum CsrError {
    /// Larger than [`MAX_CSR_BYTES`].
    #[error("the certificate request has {0} bytes; at most {MAX_CSR_BYTES} are read")]
    TooLarge(usize),
    /// Not PEM, or not a PEM block of a certificate request.
    #[error("the certificate request is not PEM of a CERTIFICATE REQUEST: {0}")]
    Pem(String),
    /// Not PKCS#10, or with extensions that are not understood.
    #[error("the certificate request cannot be read: {0}")]
    Read(String),
    /// The signature does not fit the public key.
    #[error("the signature of the certificate request is wrong: the requester does not hold the key")]
    Signature,
    /// Another key type than ECDSA P-256.
    #[error("the key of the certificate request is not ECDSA P-256")]
    KeyType,
    /// Asks to become a CA.
    #[error("the certificate request asks for a CA certificate")]
    AsksForCa,
    /// Not exactly one URI SAN.
    #[error("the certificate request names {0} subject alternative names; it must name exactly one, a SPIFFE URI")]
    Names(usize),
    /// The one SAN is not a SPIFFE id.
    #[error("the certificate request names something else than a SPIFFE id: {0}")]
    Identity(String),
}

/// Reads and checks a request in PEM, including its proof of possession.
pub fn parse_csr(pem: &str) -> Result<ParsedCsr, CsrError> {
    if pem.len() > MAX_CSR_BYTES {
        return Err(CsrError::TooLarge(pem.len()));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| CsrError::Pem(format!("{error:?}")))?;
    let csr = CertificateSigningRequestParams::from_der(&der).map_err(|error| match error {
        rcgen::Error::InvalidCertificationRequestSignature => CsrError::Signature,
        rcgen::Error::UnsupportedSignatureAlgorithm => CsrError::KeyType,
        other => CsrError::Read(other.to_string()),
    })?;
    if csr.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 || csr.public_key.der_bytes().len() != P256_POINT {
        return Err(CsrError::KeyType);
    }
    if matches!(csr.params.is_ca, IsCa::Ca(_)) {
        return Err(CsrError::AsksForCa);
    }
    let identity = match csr.params.subject_alt_names.as_slice() {
        [SanType::URI(uri)] => {
            uri.as_str().parse::<SpiffeId>().map_err(|error| CsrError::Identity(error.to_string()))?
        }
        [other] => return Err(CsrError::Identity(format!("{other:?}"))),
        names => return Err(CsrError::Names(names.len())),
    };
    Ok(ParsedCsr { identity, public_key: csr.public_key })
}

/// Bytes of an uncompressed P-256 point.
const P256_POINT: usize = 65;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SanType,
    };

    use crate::{SpiffeId, parse_csr, request};

    fn id() -> SpiffeId {
        SpiffeId::new("cluster.local", "shop", "cart").expect("valid")
    }

    fn csr(change: impl FnOnce(&mut CertificateParams)) -> String {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id().as_str().try_into().expect("ascii"))];
        change(&mut params);
        params.serialize_request(&key).expect("csr").pem().expect("pem")
    }

    #[test]
    fn own_request_is_read_back() {
        let request = request(&id()).expect("request");
        assert_eq!(parse_csr(&request.csr_pem).expect("own").identity, id());
    }

    #[test]
    fn bad_requests_are_refused_with_the_reason() {
        let p384 = {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("key");
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(id().as_str().try_into().expect("ascii"))];
            params.serialize_request(&key).expect("csr").pem().expect("pem")
        };
        let uri = |text: &str| SanType::URI(text.try_into().expect("ascii"));
        let other = uri("spiffe://cluster.local/ns/shop/sa/admin");
        let cases: Vec<(&str, String, &str)> = vec![
            ("empty", String::new(), "not PEM"),
            ("text", "hello".into(), "not PEM"),
            ("certificate block", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into(), "not PEM"),
            (
                "no DER inside",
                "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n".into(),
                "cannot be read",
            ),
            ("huge", format!("{}{}", "x".repeat(20_000), csr(|_| {})), "at most"),
            ("other curve", p384, "P-256"),
            ("no name", csr(|p| p.subject_alt_names.clear()), "0 subject"),
            ("two names", csr(|p| p.subject_alt_names.push(other)), "2 subject"),
            (
                "a DNS name",
                csr(|p| p.subject_alt_names = vec![SanType::DnsName("cart.shop".try_into().expect("ascii"))]),
                "something else",
            ),
            ("a web address", csr(|p| p.subject_alt_names = vec![uri("https://cart.shop/")]), "something else"),
        ];
        for (name, pem, expected) in cases {
            let error = parse_csr(&pem).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
        // rcgen refuses to write this one into a request, or we refuse to read it.
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        if let Ok(pem) = ca.serialize_request(&key).and_then(|csr| csr.pem()) {
            assert!(parse_csr(&pem).is_err());
        }
    }

    #[test]
    fn a_changed_byte_breaks_the_proof_of_possession() {
        let pem = request(&id()).expect("request").csr_pem;
        let lines: Vec<&str> = pem.lines().collect();
        let body: String = lines[1..lines.len() - 1].concat();
        // Another letter inside the SAN text changes the signed part only.
        let at = body.len() / 2;
        let mut changed = body.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).expect("ascii");
        let pem = format!("-----BEGIN CERTIFICATE REQUEST-----\n{changed}\n-----END CERTIFICATE REQUEST-----\n");
        assert!(parse_csr(&pem).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(der in proptest::collection::vec(any::<u8>(), 0..400)) {
            let pem = crate::pem::encode("CERTIFICATE REQUEST", &der);
            prop_assert!(parse_csr(&pem).is_err());
        }
    }
}
