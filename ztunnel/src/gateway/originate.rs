//! TLS that the gateway adds for a client that speaks in plain text: the server's certificate is checked against the
//! system's roots or those of the rule, for the name that was asked for.
//!
//! That name is also what is sent as SNI, and nothing of the client's counts for either. Configurations are made once for
//! each set of roots, protocol and client certificate, and kept up to [`MOST`]. What a host agreed to while it was
//! shown a client certificate is never resumed, so that a certificate which was replaced counts no longer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::flow::hosts::HostRoots;
use crate::gateway::clients::ClientCertificates;
use crate::http::Framing;
use crate::identity::RootCa;
use crate::outcome::{Code, Outcome, chain};
use crate::state::Origination;

/// Configurations kept. Rules with roots of their own are few.
const MOST: usize = 64;

/// What decides a configuration: the rule's roots, the protocol inside, and the client certificate with its print.
type Key = (Vec<Arc<[u8]>>, Option<Framing>, Option<(Arc<str>, Arc<str>)>);

/// Makes TLS connections to servers outside.
pub struct Originator {
    roots: HostRoots,
    clients: ClientCertificates,
    made: Mutex<HashMap<Key, Arc<ClientConfig>>>,
}

impl Originator {
    /// Believes `system` where a rule has no roots of its own, and shows certificates of `clients`.
    pub fn new(system: RootCa, clients: ClientCertificates) -> Self {
        Self { roots: HostRoots::new(system), clients, made: Mutex::default() }
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
        let print = shown.as_ref().map(|(name, shown)| (name.clone(), shown.print.clone()));
        let key = (tls.roots.clone(), inside, print);
        let known = || self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(config) = known() {
            return Ok(config);
        }
        let failed = |why: String| Outcome::new(Code::TlsFailed, format!("TLS cannot be added: {why}"));
        let config = self.roots.config(&tls.roots).await.map_err(failed)?;
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
}
