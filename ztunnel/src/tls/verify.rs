//! rustls' verifier traits on top of `tulle_certs::verify_peer`.
//!
//! Names in certificates are never looked at, and SNI is not sent: the only identity is the SPIFFE id, which must be
//! the single URI of the leaf, so that the identity that is checked is the identity that policy sees.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme,
};
use tulle_certs::{Roots, SpiffeId, Usage, VerifyError, leaf_identity};

use crate::outcome::{Code, Outcome, chain};
use crate::tls::Trust;

/// The peer's certificate is good, but it is somebody else's.
#[derive(Debug, Clone)]
pub struct WrongIdentity {
    /// Who it is.
    pub proven: SpiffeId,
    /// Who was expected.
    pub expected: String,
}

impl fmt::Display for WrongIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the peer proved {}, expected {}", self.proven, self.expected)
    }
}

impl std::error::Error for WrongIdentity {}

/// Sorts a failed handshake: somebody else's certificate, one that was taken back, or anything else.
pub fn refusal(error: &io::Error, place: &str) -> Outcome {
    let ours = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).and_then(|inner| match inner {
        Error::InvalidCertificate(CertificateError::Other(other)) => Some(&other.0),
        _ => None,
    });
    if let Some(wrong) = ours.and_then(|inner| inner.downcast_ref::<WrongIdentity>()) {
        return Outcome::new(Code::WrongIdentity, format!("{place}{wrong}"));
    }
    match ours.and_then(|inner| inner.downcast_ref::<VerifyError>()) {
        Some(revoked @ VerifyError::Revoked { .. }) => Outcome::new(Code::CertRevoked, format!("{place}{revoked}")),
        Some(foreign @ (VerifyError::UntrustedDomain { .. } | VerifyError::ExpiredRoots { .. })) => {
            Outcome::new(Code::UntrustedDomain, format!("{place}{foreign}"))
        }
        _ => Outcome::new(Code::TlsFailed, format!("{place}{}", chain(error))),
    }
}

/// Identity of the peer of an established connection, from the certificates it showed.
///
/// # Errors
/// If there is no certificate or its identity cannot be read; neither can happen after our own verification.
pub fn peer_identity(certificates: Option<&[CertificateDer<'_>]>) -> Result<SpiffeId, String> {
    let leaf = certificates.and_then(|chain| chain.first()).ok_or("the peer showed no certificate")?;
    leaf_identity(leaf).map_err(|error| error.to_string())
}

fn refuse(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn chain_of<'a>(
    end_entity: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
) -> Vec<CertificateDer<'a>> {
    let mut chain = Vec::with_capacity(1 + intermediates.len());
    chain.push(end_entity.clone());
    chain.extend_from_slice(intermediates);
    chain
}

/// Accepts servers with one of the expected identities.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    roots: Roots,
    expected: Vec<SpiffeId>,
    trust_domain: String,
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl ServerVerifier {
    /// `own` is the trust domain of who connects, and whom it believes.
    pub(super) fn new(
        roots: Roots,
        expected: Vec<SpiffeId>,
        own: (&str, &Trust),
        provider: Arc<CryptoProvider>,
    ) -> Self {
        Self { roots, expected, trust_domain: own.0.to_owned(), trust: own.1.clone(), provider }
    }
}

/// Sabotage of test builds: `TULLE_BREAK=tls` accepts every identity that the CA signed.
fn identity_check_is_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "tls")
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = chain_of(end_entity, intermediates);
        let verified = self.trust.verify(&self.trust_domain, &self.roots, &chain, Usage::Server, now);
        let proven = verified.map_err(refuse)?;
        let fits = |expected: &SpiffeId| self.trust.aliases.same(&self.trust_domain, expected, &proven);
        if self.expected.iter().any(fits) || identity_check_is_broken() {
            return Ok(ServerCertVerified::assertion());
        }
        let expected = self.expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
        let expected = if expected.is_empty() { "nobody".to_owned() } else { expected };
        Err(refuse(WrongIdentity { proven, expected }))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts clients of the own trust domain, its aliases, and federated domains.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    roots: Roots,
    trust_domain: String,
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl ClientVerifier {
    pub(super) fn new(roots: Roots, trust_domain: &str, trust: Trust, provider: Arc<CryptoProvider>) -> Self {
        Self { roots, trust_domain: trust_domain.to_owned(), trust, provider }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Every proxy has one certificate for the identity it acts for; hints would only cost bytes.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = chain_of(end_entity, intermediates);
        let verified = self.trust.verify(&self.trust_domain, &self.roots, &chain, Usage::Client, now);
        verified.map(|_| ClientCertVerified::assertion()).map_err(refuse)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
