//! One HTTP GET to a server that a user named: what it costs and where it goes is bounded here.
//!
//! Users of a namespace choose the address, control has the connection; so the answer is small, the time short, redirects
//! are few and never from HTTPS to HTTP, addresses of the machine itself and of cloud metadata are refused after the name
//! was resolved, and nothing of an answer that is no key set is shown to anybody. Limits: HTTP/1.1, TLS 1.3, no proxy.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, HOST, LOCATION, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::keys::set;
use crate::model::KeySource;

/// For all of one source: names, redirects, answers. Istio's `timeout` of a rule has the same default.
const DEADLINE: Duration = Duration::from_secs(5);
/// One address may be dead and the next one not.
const CONNECT: Duration = Duration::from_secs(2);
/// Addresses of a name that are tried.
const MAX_ADDRESSES: usize = 4;
/// Largest answer. Sets of ten RSA keys with certificate chains have 30 KiB.
const MAX_BYTES: usize = 256 * 1024;
/// Some issuers redirect from a name to another; more is a loop.
const MAX_REDIRECTS: usize = 3;
/// Largest file of roots; that of a Linux system has 250 KB.
const MAX_ROOTS_BYTES: u64 = 8 * 1024 * 1024;
/// Where systems keep their roots; `SSL_CERT_FILE` comes before them.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Why there are no new keys. All of them are the issuer's or the user's fault and are tried again.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum FetchError {
    #[error("{0} is no http:// or https:// address")]
    Address(String),
    #[error("{0} cannot be resolved: {1}")]
    Name(String, String),
    #[error("{0} is at {1}, which control does not connect to; see --jwks-blocked-cidrs")]
    Blocked(String, IpAddr),
    #[error("{0} cannot be connected to: {1}")]
    Connect(SocketAddr, String),
    #[error("TLS with {0} failed: {1}")]
    Tls(String, String),
    #[error("no root certificate to verify {0} with: {1}")]
    Roots(String, String),
    #[error("{0} did not answer: {1}")]
    Http(String, String),
    #[error("{0} answered {1}")]
    Status(String, u16),
    #[error("{0} answered with more than {MAX_BYTES} bytes")]
    TooLarge(String),
    #[error("{0} redirects to {1}, which is not followed")]
    Redirect(String, String),
    #[error("the answer of {0} {1}")]
    Document(String, String),
    #[error("{0} did not answer within {DEADLINE:?}")]
    Late(String),
}

/// What all fetches share.
pub(super) struct Client {
    /// Roots besides the system's.
    ca: Option<PathBuf>,
    blocked: Vec<IpNet>,
}

/// An answer that is not the last word.
enum Answer {
    Body(Bytes),
    Elsewhere(Uri),
}

impl Client {
    pub(super) fn new(ca: Option<PathBuf>, blocked: Vec<IpNet>) -> Self {
        Self { ca, blocked }
    }

    /// The keys of a source, as [`set::key_set`] writes them.
    pub(super) async fn keys(&self, source: &KeySource) -> Result<String, FetchError> {
        let found = async {
            let uri = match source {
                KeySource::Uri(uri) => uri.clone(),
                KeySource::Issuer(_) => {
                    let description = source.to_string();
                    let document = self.get(&description).await?;
                    set::keys_of_issuer(&document).map_err(|why| FetchError::Document(description, why))?
                }
            };
            let document = self.get(&uri).await?;
            set::key_set(&document).map_err(|why| FetchError::Document(uri, why))
        };
        tokio::time::timeout(DEADLINE, found).await.unwrap_or_else(|_| Err(FetchError::Late(source.to_string())))
    }

    async fn get(&self, first: &str) -> Result<Bytes, FetchError> {
        let mut uri = first.parse::<Uri>().map_err(|_| FetchError::Address(first.to_owned()))?;
        for _ in 0..=MAX_REDIRECTS {
            match self.once(&uri).await? {
                Answer::Body(body) => return Ok(body),
                Answer::Elsewhere(next) if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") => {
                    return Err(FetchError::Redirect(uri.to_string(), next.to_string()));
                }
                Answer::Elsewhere(next) => uri = next,
            }
        }
        Err(FetchError::Redirect(first.to_owned(), uri.to_string()))
    }

    async fn once(&self, uri: &Uri) -> Result<Answer, FetchError> {
        let address = || FetchError::Address(uri.to_string());
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(address()),
        };
        let host = uri.host().ok_or_else(address)?.trim_matches(['[', ']']);
        let stream = self.connect(host, uri.port_u16().unwrap_or(if tls { 443 } else { 80 })).await?;
        if !tls {
            return ask(uri, stream).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| address())?;
        let config = self.tls(host).await?;
        let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        ask(uri, connected.map_err(|error| FetchError::Tls(host.to_owned(), error.to_string()))?).await
    }

    /// The name is resolved once, and what was looked at is what is connected to.
    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, FetchError> {
        let name = |why: String| FetchError::Name(host.to_owned(), why);
        let found = tokio::net::lookup_host((host, port)).await.map_err(|error| name(error.to_string()))?;
        let mut failed = name("it has no address".to_owned());
        for address in found.take(MAX_ADDRESSES) {
            let ip = address.ip().to_canonical();
            if self.blocked.iter().any(|net| net.contains(&ip)) {
                failed = FetchError::Blocked(host.to_owned(), ip);
                continue;
            }
            match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = FetchError::Connect(address, error.to_string()),
                Err(_) => failed = FetchError::Connect(address, format!("no answer within {CONNECT:?}")),
            }
        }
        Err(failed)
    }

    /// Read for each fetch, of which there is one in minutes: roots that were replaced hold at once.
    async fn tls(&self, host: &str) -> Result<ClientConfig, FetchError> {
        let ca = self.ca.clone();
        let read = tokio::task::spawn_blocking(move || roots(ca.as_deref())).await;
        let none = |why: String| FetchError::Roots(host.to_owned(), why);
        let roots = read.map_err(|error| none(error.to_string()))?.map_err(none)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| none(error.to_string()))?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The system's roots and those of a file.
fn roots(ca: Option<&Path>) -> Result<RootCertStore, String> {
    let of_system = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let of_system = of_system.or_else(|| SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()));
    let mut store = RootCertStore::empty();
    for path in ca.map(Path::to_owned).into_iter().chain(of_system) {
        let cannot = |why: String| format!("{}: {why}", path.display());
        let size = std::fs::metadata(&path).map_err(|error| cannot(error.to_string()))?.len();
        if size > MAX_ROOTS_BYTES {
            return Err(cannot(format!("it has {size} bytes; at most {MAX_ROOTS_BYTES} are read")));
        }
        let bundle = std::fs::read(&path).map_err(|error| cannot(error.to_string()))?;
        store.add_parsable_certificates(CertificateDer::pem_slice_iter(&bundle).filter_map(Result::ok));
    }
    match store.is_empty() {
        true => Err("the system has none; give --jwks-ca a file of them".to_owned()),
        false => Ok(store),
    }
}

/// The request and its answer on a connection that ends with it.
async fn ask<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(uri: &Uri, stream: S) -> Result<Answer, FetchError> {
    let http = |error: String| FetchError::Http(uri.to_string(), error);
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| http(error.to_string()))?;
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let request = Request::get(path)
        .header(HOST, uri.authority().map_or("", http::uri::Authority::as_str))
        .header(USER_AGENT, concat!("tulle/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|error| http(error.to_string()))?;
    let answered = async {
        let response = sender.send_request(request).await.map_err(|error| http(error.to_string()))?;
        let (head, body) = response.into_parts();
        if head.status.is_redirection() {
            let location = head.headers.get(LOCATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let next = elsewhere(uri, location);
            return next
                .map(Answer::Elsewhere)
                .ok_or_else(|| FetchError::Redirect(uri.to_string(), location.to_owned()));
        }
        if head.status != StatusCode::OK {
            return Err(FetchError::Status(uri.to_string(), head.status.as_u16()));
        }
        let body =
            Limited::new(body, MAX_BYTES).collect().await.map_err(|error| match error.is::<LengthLimitError>() {
                true => FetchError::TooLarge(uri.to_string()),
                false => http(error.to_string()),
            })?;
        Ok(Answer::Body(body.to_bytes()))
    };
    // Driven in this task, so that whoever gives up the fetch ends the connection.
    let driven = async {
        // What went wrong is told to the request; what came before the end is still to be read.
        let _ = connection.await;
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        answer = answered => answer,
        never = driven => match never {},
    }
}

/// Where a redirect leads: a whole address, or a path on the same server.
fn elsewhere(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        let mut parts = from.clone().into_parts();
        parts.path_and_query = Some(location.parse().ok()?);
        return Uri::from_parts(parts).ok();
    }
    location.parse::<Uri>().ok().filter(|uri| uri.host().is_some())
}
