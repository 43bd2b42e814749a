//! TLS that the gateway adds for a client that speaks in plain text: the server's certificate is checked against the
//! system's roots or those of the rule, for the name that was asked for.
//!
//! That name is also what is sent as SNI, and nothing of the client's counts for either. TLS 1.2 is spoken besides 1.3,
//! because servers outside are not ours to choose. Configurations are made once for each set of roots, protocol and client
//! certificate, and kept up to [`MOST`]. The system's roots are read at the first use. What a host agreed to while it was
//! shown a client certificate is never resumed, so that a certificate which was replaced counts no longer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::gateway::clients::ClientCertificates;
use crate::http::Framing;
use crate::identity::RootCa;
use crate::outcome::{Code, Outcome, chain};
use crate::state::Origination;
use crate::tls;

/// Configurations kept. Rules with roots of their own are few.
const MOST: usize = 64;

/// What decides a configuration: the rule's roots, the protocol inside, and the client certificate with its print.
type Key = (Vec<CertificateDer<'static>>, Option<Framing>, Option<(Arc<str>, Arc<str>)>);

/// Makes TLS connections to servers outside.
pub struct Originator {
    system: RootCa,
    read: OnceCell<Arc<RootCertStore>>,
    clients: ClientCertificates,
    made: Mutex<HashMap<Key, Arc<ClientConfig>>>,
}

impl Originator {
    /// Believes `system` where a rule has no roots of its own, and shows certificates of `clients`.
    pub fn new(system: RootCa, clients: ClientCertificates) -> Self {
        Self { system, read: OnceCell::new(), clients, made: Mutex::default() }
    }

    /// How TLS is spoken by a rule that says `tls`. `inside`: the HTTP that will be spoken.
    ///
    /// # Errors
    /// What this gateway lacks: `NoCertificate` for a client certificate, `TlsFailed` for roots.
    pub async fn prepare(&self, tls: &Origination, inside: Option<Framing>) -> Result<Arc<ClientConfig>, Outcome> {
        let shown = match &tls.client_certificate {
            None => None,
            Some(name) => Some((name.clone(), self.clients.get(name).await?)),
        };
        let roots: Vec<_> = tls.roots.iter().map(|root| CertificateDer::from(root.to_vec())).collect();
        let print = shown.as_ref().map(|(name, shown)| (name.clone(), shown.print.clone()));
        let key = (roots, inside, print);
        let known = || self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(config) = known() {
            return Ok(config);
        }
        let failed = |why: String| Outcome::new(Code::TlsFailed, format!("TLS cannot be added: {why}"));
        let store = if key.0.is_empty() { self.system().await } else { store(&key.0).map(Arc::new) };
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(error.to_string()))?
            .with_root_certificates(store.map_err(failed)?);
        let mut config = match shown {
            None => config.with_no_client_auth(),
            Some((_, shown)) => {
                let mut config = config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(shown.key.clone())));
                config.resumption = Resumption::disabled();
                config
            }
        };
        config.alpn_protocols = match inside {
            None => Vec::new(),
            Some(Framing::One) => vec![b"http/1.1".to_vec()],
            Some(Framing::Two) => vec![b"h2".to_vec()],
        };
        let config = Arc::new(config);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() >= MOST {
            made.clear();
        }
        // No key is kept longer than it counts.
        let replaced = |old: &Key| match (&old.2, &key.2) {
            (Some((old, before)), Some((name, now))) => old == name && before != now,
            _ => false,
        };
        made.retain(|old, _| !replaced(old));
        made.insert(key, config.clone());
        Ok(config)
    }

    /// Handshakes as `config` says with the server at the other end of `tcp`, which must prove `name`. `inside`: as it was
    /// prepared.
    ///
    /// # Errors
    /// `TlsFailed`.
    pub async fn handshake(
        config: Arc<ClientConfig>,
        tcp: TcpStream,
        name: &str,
        inside: Option<Framing>,
    ) -> Result<TlsStream<TcpStream>, Outcome> {
        let failed = |why: String| Outcome::new(Code::TlsFailed, format!("TLS with {name}: {why}"));
        let server = ServerName::try_from(name.to_owned()).map_err(|error| failed(error.to_string()))?;
        let stream = TlsConnector::from(config).connect(server, tcp).await.map_err(|error| failed(chain(&error)))?;
        let agreed = stream.get_ref().1.alpn_protocol();
        // A server that says nothing speaks HTTP/1.1, and does not speak HTTP/2.
        if inside == Some(Framing::Two) && agreed != Some(b"h2") {
            return Err(failed("it does not offer HTTP/2, which the client speaks".to_owned()));
        }
        Ok(stream)
    }

    async fn system(&self) -> Result<Arc<RootCertStore>, String> {
        let read = self.read.get_or_try_init(|| async {
            let pem = self.system.read().await.map_err(|error| error.to_string())?;
            let roots: Vec<_> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
            let mut store = RootCertStore::empty();
            // Bundles of systems have a few that no verifier takes.
            let (taken, _) = store.add_parsable_certificates(roots);
            if taken == 0 { Err("there is no root in TULLE_GATEWAY_ROOT_CA".to_owned()) } else { Ok(Arc::new(store)) }
        });
        read.await.cloned()
    }
}

fn store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(|error| format!("a root of the rule is none: {error}"))?;
    }
    Ok(store)
}

/// The mesh's key exchanges, and the cipher suites of both versions.
fn provider() -> Arc<CryptoProvider> {
    let mesh = tls::provider();
    let all = rustls::crypto::aws_lc_rs::default_provider();
    Arc::new(CryptoProvider { cipher_suites: all.cipher_suites, ..(*mesh).clone() })
}
