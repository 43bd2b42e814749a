//! Mutual TLS between proxies: TLS 1.3 only, ALPN `h2`, SPIFFE identities instead of host names.
//!
//! Configurations are built once a certificate ([`WorkloadCert`]), not once a handshake: building them costs more than
//! the bookkeeping of a connection. There is no session resumption: a resumed session would carry an old
//! authentication past a rotated root. Verification itself is `tulle_certs`; this module binds it to rustls and to the
//! expectation of the caller, and gives every refusal a sentence that names both identities.

pub mod hello;
mod revoked;
mod trust;
mod verify;

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use tulle_certs::{Issued, SpiffeId, Usage, fingerprint};

pub use revoked::Revoked;
pub use trust::{Federated, Trust};
pub use verify::{WrongIdentity, peer_identity, refusal};

use crate::outcome::Outcome;

/// Why a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The key does not fit the certificate, or is of a kind that is not supported.
    #[error("the private key cannot be used with the certificate of {identity}: {source}; request a new certificate")]
    Key {
        /// Whose certificate.
        identity: SpiffeId,
        /// What rustls said.
        source: rustls::Error,
    },
    /// rustls refused the versions or suites.
    #[error("TLS 1.3 cannot be configured: {0}; this is an error of the build")]
    Config(rustls::Error),
}

/// The one crypto provider: AES-GCM suites in the order that peers use, post-quantum key exchange first.
///
/// X25519MLKEM768 comes with an X25519 share besides, so a peer without it costs no extra round trip.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
            Arc::new(CryptoProvider {
                cipher_suites: vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256],
                kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

/// A certificate of a local service account, with everything that handshakes need ready-made.
pub struct WorkloadCert {
    /// Whose it is.
    pub identity: SpiffeId,
    /// Start of validity, Unix seconds.
    pub not_before: i64,
    /// End of validity, Unix seconds.
    pub not_after: i64,
    /// What the CA said, for dumps. Holds no key.
    pub issued: Issued,
    /// The roots that came with it, SHA-256 in hex.
    pub root_fingerprints: Vec<String>,
    /// The certificate that signed it, the same way. Empty: it came alone.
    pub issuer_fingerprint: String,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    roots: tulle_certs::Roots,
    trust: Trust,
}

impl std::fmt::Debug for WorkloadCert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadCert")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl WorkloadCert {
    /// Binds what the CA issued to its key.
    ///
    /// # Errors
    /// If the key does not fit the certificate.
    pub fn new(issued: Issued, key: PrivatePkcs8KeyDer<'static>, trust: &Trust) -> Result<Self, TlsError> {
        let identity = issued.identity.clone();
        let provider = provider();
        let key = PrivateKeyDer::Pkcs8(key);
        let certified = CertifiedKey::from_der(issued.chain.clone(), key, &provider)
            .map_err(|source| TlsError::Key { identity: identity.clone(), source })?;
        let resolver = Arc::new(SingleCertAndKey::from(certified));

        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Config)?
            .with_client_cert_verifier(Arc::new(verify::ClientVerifier::new(
                issued.roots.clone(),
                identity.trust_domain(),
                trust.clone(),
                provider.clone(),
            )))
            .with_cert_resolver(resolver.clone());
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Config)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verify::ServerVerifier::new(
                issued.roots.clone(),
                Vec::new(),
                (identity.trust_domain(), trust),
                provider,
            )))
            .with_client_cert_resolver(resolver);
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();

        Ok(Self {
            not_before: issued.not_before,
            not_after: issued.not_after,
            roots: issued.roots.clone(),
            root_fingerprints: issued.roots.fingerprints(),
            issuer_fingerprint: issued.chain.get(1).map(|issuer| fingerprint(issuer)).unwrap_or_default(),
            trust: trust.clone(),
            identity,
            issued,
            server: Arc::new(server),
            client,
        })
    }

    /// Configuration of the HBONE server: a client certificate of our trust domain or a federated one is mandatory.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Configuration of a tunnel that accepts exactly one of `expected` (none: nobody).
    pub fn client_config(&self, expected: &[SpiffeId]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(Arc::new(verify::ServerVerifier::new(
            self.roots.clone(),
            expected.to_vec(),
            (self.identity.trust_domain(), &self.trust),
            provider(),
        )));
        Arc::new(config)
    }

    /// Completes once the chain of a peer that was verified as `usage` is no longer believed: a revocation list names it,
    /// or the roots of its foreign trust domain have changed.
    pub async fn distrusted(&self, chain: &[CertificateDer<'_>], usage: Usage) -> Outcome {
        self.trust.distrusted(self.identity.trust_domain(), &self.roots, chain, usage).await
    }

    /// Whether this certificate itself is in a revocation list, so that peers will refuse it.
    pub fn is_revoked(&self) -> bool {
        self.trust.revoked.look(&self.issued.chain, &self.roots, Usage::Client).is_some()
    }

    /// Whether the certificate can still be shown, `now` in Unix seconds.
    pub fn is_valid(&self, now: i64) -> bool {
        now < self.not_after
    }
}
