//! TLS with hosts outside the mesh: the roots that their certificates are checked with, and the versions that are spoken.
//!
//! Servers outside are not ours to choose, so TLS 1.2 is spoken besides 1.3. A rule may bring roots of its own; otherwise the
//! system's count, which are read at the first use and kept.

use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use tokio::sync::OnceCell;

use crate::identity::RootCa;
use crate::tls;

/// Whom hosts outside are believed to be signed by.
pub struct HostRoots {
    system: RootCa,
    read: OnceCell<Arc<RootCertStore>>,
}

impl HostRoots {
    /// `system`, where a rule has none of its own.
    pub fn new(system: RootCa) -> Self {
        Self { system, read: OnceCell::new() }
    }

    /// The beginning of a configuration that believes `roots`, DER; none: the system's.
    ///
    /// # Errors
    /// Which of them cannot be used.
    pub async fn config(&self, roots: &[Arc<[u8]>]) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
        let store = if roots.is_empty() { self.system().await? } else { Arc::new(store(roots)?) };
        let config = ClientConfig::builder_with_provider(provider());
        let config = config.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
        Ok(config.with_root_certificates(store))
    }

    async fn system(&self) -> Result<Arc<RootCertStore>, String> {
        let read = self.read.get_or_try_init(|| async {
            let pem = self.system.read().await.map_err(|error| error.to_string())?;
            let roots: Vec<_> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
            let mut store = RootCertStore::empty();
            // Bundles of systems have a few that no verifier takes.
            let (taken, _) = store.add_parsable_certificates(roots);
            match taken {
                0 => Err("there is no root among those of the system (TULLE_GATEWAY_ROOT_CA of a gateway)".to_owned()),
                _ => Ok(Arc::new(store)),
            }
        });
        read.await.cloned()
    }
}

fn store(roots: &[Arc<[u8]>]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for root in roots {
        let root = CertificateDer::from(root.to_vec());
        store.add(root).map_err(|error| format!("a root of the rule is none: {error}"))?;
    }
    Ok(store)
}

/// The mesh's key exchanges, and the cipher suites of both versions.
fn provider() -> Arc<CryptoProvider> {
    let mesh = tls::provider();
    let all = rustls::crypto::aws_lc_rs::default_provider();
    Arc::new(CryptoProvider { cipher_suites: all.cipher_suites, ..(*mesh).clone() })
}
