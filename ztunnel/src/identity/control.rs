//! The way to control: address, trusted roots, token, and a gRPC channel made from them.
//!
//! xDS, the CA and the node service all speak to control like this. The connector is our own and not tonic's TLS, so that
//! there is one crypto provider and one place for time-outs, and so that a second host name can be accepted and revocation
//! lists are asked. Roots and token are files that others rotate: they are read again for each connection and each request,
//! and a bad file is an error of that attempt only. Limits: files of at most 1 MiB; connecting takes at most 5 s.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, RootCertStore};
use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::Service;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};
use tonic::transport::Endpoint;

use crate::identity::link::{Connected, Link};
use crate::identity::verify::{Anchors, ControlVerifier, Watched};
use crate::tls::{self, Revoked};

/// Istio's value. A control that does not answer a SYN in this time is tried again rather than waited for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 PING, so that a dead control is noticed within 40 s although nothing is sent.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bundles have a few KiB, tokens one or two.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Where distributions keep the system's roots.
const SYSTEM_BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];

/// What control's certificate is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootCa {
    /// A PEM file, read for each channel.
    File(PathBuf),
    /// The PEM itself.
    Pem(String),
    /// The system's bundle.
    System,
}

impl RootCa {
    /// Istio's notation: `SYSTEM`, a PEM, or a path.
    pub fn parse(value: &str) -> Self {
        match value {
            "SYSTEM" => Self::System,
            pem if pem.contains("-----BEGIN") => Self::Pem(pem.to_owned()),
            path => Self::File(path.into()),
        }
    }

    /// The PEM as it is now.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn read(&self) -> Result<Vec<u8>, ControlError> {
        match self {
            Self::Pem(pem) => Ok(pem.clone().into_bytes()),
            Self::File(path) => read_file(path).await.map_err(|source| ControlError::file("root CA", path, source)),
            Self::System => {
                for path in SYSTEM_BUNDLES {
                    if let Ok(pem) = read_file(Path::new(path)).await {
                        return Ok(pem);
                    }
                }
                Err(ControlError::NoSystemRoots)
            }
        }
    }
}

/// Where the bearer token comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// A file, read for each request, because tokens are rotated.
    File(PathBuf),
    /// The token itself.
    Literal(String),
    /// No token: control must not ask for one.
    None,
}

impl TokenSource {
    /// Istio's notation: a path, or the token itself; a token has dots and no slash. Empty: none.
    pub fn parse(value: &str) -> Self {
        match value {
            "" => Self::None,
            token if token.split('.').count() == 3 && !token.contains('/') => Self::Literal(token.to_owned()),
            path => Self::File(path.into()),
        }
    }

    async fn read(&self) -> Result<Option<String>, ControlError> {
        let text = match self {
            Self::None => return Ok(None),
            Self::Literal(token) => token.clone(),
            Self::File(path) => {
                let bytes = read_file(path).await.map_err(|source| ControlError::file("token", path, source))?;
                String::from_utf8(bytes).map_err(|_| ControlError::Token(path.display().to_string()))?
            }
        };
        Ok(Some(text.trim().to_owned()))
    }
}

// A token is a secret.
impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Literal(_) => f.write_str("Literal(…)"),
            Self::None => f.write_str("None"),
        }
    }
}

/// Why control could not be asked. Nothing was sent; try again later.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The address is no URI of the form `https://host:port`.
    #[error("the address {address:?} of control is not of the form https://host:port: {reason}; correct the setting")]
    Address {
        /// As configured.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file cannot be read.
    #[error("cannot read the {what} file {path}: {source}; check that it is mounted and readable")]
    File {
        /// Which one.
        what: &'static str,
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No bundle of the system was found.
    #[error("SYSTEM roots are asked for, and this system has none of {SYSTEM_BUNDLES:?}; install ca-certificates")]
    NoSystemRoots,
    /// The roots cannot be used.
    #[error("the root CA of control cannot be used: {0}")]
    Roots(String),
    /// The token is not one.
    #[error("the token in {0} is not text that fits an HTTP header; write the file again")]
    Token(String),
    /// Connecting failed.
    #[error("cannot connect to control at {address}: {reason}")]
    Connect {
        /// As configured.
        address: String,
        /// Why, from the outside in.
        reason: String,
    },
}

impl ControlError {
    fn file(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { what, path: path.display().to_string(), source }
    }
}

/// How control is reached, and who asks.
#[derive(Clone, Debug)]
pub struct Control {
    /// `https://host:port`; `http://` speaks plaintext, for tests and for a proxy that adds TLS.
    pub address: String,
    /// What its certificate is checked against.
    pub root_ca: RootCa,
    /// A second host name that its certificate may carry instead of the address's.
    pub alt_hostname: Option<String>,
    /// Who asks.
    pub token: TokenSource,
    /// Headers besides, `clusterid` among them.
    pub headers: Vec<(String, String)>,
    /// The connection, for all that reach control by the same address, roots and name.
    pub link: Link,
}

impl Control {
    /// The connection that all share, or a new one if there is none or the roots have changed.
    ///
    /// # Errors
    /// If it cannot be connected within 5 s, or the address or the roots cannot be used.
    pub async fn connect(&self) -> Result<Connected, ControlError> {
        let roots = self.root_ca.read().await?;
        let (endpoint, connector) = self.endpoint(&roots)?;
        let connect = async {
            match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await {
                Ok(connected) => connected.map_err(|error| chain(&error)),
                Err(_) => Err(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())),
            }
        };
        let failed = |reason| ControlError::Connect { address: self.address.clone(), reason };
        self.link.share(&roots, connect).await.map_err(failed)
    }

    /// Adds token and headers to a request.
    ///
    /// # Errors
    /// If the token cannot be read or does not fit a header.
    pub async fn authorize(&self, metadata: &mut MetadataMap) -> Result<(), ControlError> {
        if let Some(token) = self.token.read().await? {
            let source = format!("{:?}", self.token);
            let mut value: AsciiMetadataValue =
                format!("Bearer {token}").parse().map_err(|_| ControlError::Token(source))?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        for (name, value) in &self.headers {
            let bad = |_| ControlError::Address {
                address: self.address.clone(),
                reason: format!("the configured header {name:?} is not a legal HTTP header"),
            };
            let key = AsciiMetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes()).map_err(|_| bad(()))?;
            metadata.insert(key, value.parse().map_err(|_| bad(()))?);
        }
        Ok(())
    }

    fn endpoint(&self, roots: &[u8]) -> Result<(Endpoint, Connector), ControlError> {
        let bad = |reason: String| ControlError::Address { address: self.address.clone(), reason };
        let uri: Uri = self.address.parse().map_err(|error| bad(format!("{error}")))?;
        let host = uri.host().ok_or_else(|| bad("it has no host".to_owned()))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match uri.scheme_str() {
            Some("https") => Some(self.tls(&host, roots)?),
            Some("http") => None,
            _ => return Err(bad("its scheme is neither https nor http".to_owned())),
        };
        let default_port = if tls.is_some() { 443 } else { 80 };
        let port = uri.port_u16().unwrap_or(default_port);
        // tonic refuses https without its own TLS, so it dials what looks plain and names the true origin.
        let authority = uri.authority().map_or_else(String::new, ToString::to_string);
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .map_err(|error| bad(chain(&error)))?
            .origin(uri)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        Ok((endpoint, Connector { host, port, tls, revoked: self.link.revoked().clone() }))
    }

    fn tls(&self, host: &str, roots: &[u8]) -> Result<Tls, ControlError> {
        let unusable = |error: &dyn std::error::Error| ControlError::Roots(error.to_string());
        let name = |host: &str| {
            ServerName::try_from(host.to_owned()).map_err(|_| ControlError::Address {
                address: self.address.clone(),
                reason: format!("{host:?} is neither a host name nor an address"),
            })
        };
        // Not tulle_certs::Roots: that is for the few roots of a mesh, and the system's bundle has hundreds.
        let mut store = RootCertStore::empty();
        for root in <CertificateDer<'_> as rustls::pki_types::pem::PemObject>::pem_slice_iter(roots) {
            let root = root.map_err(|error| ControlError::Roots(error.to_string()))?;
            store.add(root).map_err(|error| unusable(&error))?;
        }
        let anchors: Anchors = store.roots.clone().into();
        let alternative = self.alt_hostname.as_deref().map(name).transpose()?;
        let verifier = ControlVerifier::new(store, alternative, self.link.revoked().clone())?;
        let mut config = ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Tls { connector: TlsConnector::from(Arc::new(config)), name: name(host)?, anchors })
    }
}

/// Istio's values. They find a peer that vanished while an HTTP/2 PING cannot be sent, because the socket is full.
fn tcp_keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(Duration::from_secs(300)).with_interval(Duration::from_secs(75)).with_retries(9)
}

/// A small file; one of more than 1 MiB is refused without being read.
///
/// # Errors
/// It cannot be read.
pub async fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let size = tokio::fs::metadata(path).await?.len();
    if size > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {size} bytes, more than 1 MiB")));
    }
    tokio::fs::read(path).await
}

/// An error with its causes, because transport errors say nothing themselves.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Time to wait after the given number of failures in a row: doubles from `initial` up to `cap`, and is spread by ±20 %
/// by `chance` (0 to 1), so that the nodes of a cluster do not come back all at once.
pub fn backoff(initial: Duration, cap: Duration, failures: u32, chance: f64) -> Duration {
    let doubled = initial.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX).max(1));
    doubled.min(cap).mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0))
}

/// A TCP or TLS connection.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Dials control.
#[derive(Clone)]
struct Connector {
    host: String,
    port: u16,
    tls: Option<Tls>,
    revoked: Revoked,
}

#[derive(Clone)]
struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    /// Who may vouch for control.
    anchors: Anchors,
}

impl Connector {
    async fn dial(self) -> io::Result<TokioIo<Box<dyn Stream>>> {
        let dial = async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
            tcp.set_nodelay(true)?;
            socket2::SockRef::from(&tcp).set_tcp_keepalive(&tcp_keepalive())?;
            Ok::<Box<dyn Stream>, io::Error>(match self.tls {
                None => Box::new(tcp),
                Some(Tls { connector, name, anchors }) => {
                    let stream = connector.connect(name, tcp).await.map_err(readable)?;
                    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
                    let shown: Vec<_> = shown.iter().cloned().map(CertificateDer::into_owned).collect();
                    let revoked = self.revoked;
                    Box::new(Watched::new(stream, async move { revoked.hit_server(&shown, &anchors).await }))
                }
            })
        };
        let silent = || io::Error::new(io::ErrorKind::TimedOut, "no TCP and TLS connection within 5 s");
        Ok(TokioIo::new(tokio::time::timeout(CONNECT_TIMEOUT, dial).await.map_err(|_| silent())??))
    }
}

/// A refusal of our own in its own words; rustls shows its insides.
fn readable(error: io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            io::Error::new(error.kind(), other.0.to_string())
        }
        _ => error,
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().dial())
    }
}
