//! A hand-made tunnel client: it dials a pod's HBONE port with any certificate, or none, and asks for anything, so that
//! tests can be the wrong peer.
//!
//! It signs its own certificate with the authority in a directory, the lab's or another. Limits: it believes whatever
//! server answers, which only a test may do.

use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::Request;
use rustls::ClientConfig;
use rustls::DigitallySignedStruct;
use rustls::SignatureScheme;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::danger::ServerCertVerified;
use rustls::client::danger::ServerCertVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::ServerName;
use rustls_pki_types::UnixTime;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tulle_certs::SpiffeId;
use tulle_certs::ca::Authority;
use tulle_certs::parse_csr;
use tulle_certs::request;

/// Time for the whole attempt.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The same for one that is held.
const HELD: Duration = Duration::from_secs(120);

/// Arguments of `lab dial`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Address and port to dial.
    to: SocketAddr,
    /// Directory of the authority that signs; none = no client certificate.
    #[arg(long)]
    ca_dir: Option<PathBuf>,
    /// SPIFFE id to be.
    #[arg(long, default_value = "spiffe://cluster.local/ns/default/sa/default")]
    identity: SpiffeId,
    /// Sign a certificate that has no identity at all.
    #[arg(long)]
    anonymous: bool,
    /// Target of the CONNECT; none = the same address with port 8080.
    #[arg(long)]
    connect: Option<String>,
    /// `name: value`.
    #[arg(long)]
    header: Vec<String>,
    /// Method.
    #[arg(long, default_value = "CONNECT")]
    method: String,
    /// Instead of HTTP/2, send these bytes (hex) inside TLS.
    #[arg(long)]
    raw: Option<String>,
    /// Instead of TLS, send these bytes (hex) on the bare connection.
    #[arg(long)]
    bare: Option<String>,
    /// Bytes to send in the tunnel once it is open; what comes back first is reported.
    #[arg(long)]
    send: Option<String>,
    /// Then report at once, keep the tunnel open, and report again when it has ended.
    #[arg(long)]
    hold: bool,
}

/// Dials and prints one JSON line: `tls`, `status`, `answer`, `error`. Succeeds whatever the peer does.
pub fn main(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut report = json!({});
    let result = runtime.block_on(async {
        tokio::time::timeout(if options.hold { HELD } else { TIMEOUT }, attempt(options, &mut report))
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("timeout")))
    });
    if let Err(error) = result {
        report["error"] = format!("{error:#}").into();
    }
    println!("{report}");
    Ok(())
}

async fn attempt(options: &Options, report: &mut serde_json::Value) -> anyhow::Result<()> {
    let mut tcp = TcpStream::connect(options.to).await.context("connect")?;
    report["connected"] = true.into();
    if let Some(bytes) = &options.bare {
        tcp.write_all(&unhex(bytes)?).await?;
        return read_some(&mut tcp, report).await;
    }
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config(options)?));
    let name = ServerName::IpAddress(options.to.ip().into());
    let mut tls = connector.connect(name, tcp).await.context("TLS handshake")?;
    report["tls"] = format!("{:?}", tls.get_ref().1.protocol_version()).into();
    if let Some(leaf) = tls.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        report["peer"] = tulle_certs::leaf_identity(leaf).map_or_else(|e| e.to_string(), |id| id.to_string()).into();
    }
    if let Some(bytes) = &options.raw {
        tls.write_all(&unhex(bytes)?).await?;
        return read_some(&mut tls, report).await;
    }
    let (mut client, connection) = h2::client::handshake(tls).await.context("HTTP/2 handshake")?;
    let driver = tokio::spawn(connection);
    let target = options.connect.clone().unwrap_or_else(|| SocketAddr::new(options.to.ip(), 8080).to_string());
    let mut request = Request::builder().method(options.method.as_str()).uri(if options.method == "CONNECT" {
        target
    } else {
        format!("http://{target}/")
    });
    for header in &options.header {
        let (name, value) = header.split_once(':').context("a header is written `name: value`")?;
        request = request.header(name.trim(), value.trim());
    }
    client = client.ready().await.context("HTTP/2 is not ready")?;
    let (response, mut stream) = client.send_request(request.body(())?, false).context("request")?;
    let response = response.await.context("no response")?;
    report["status"] = response.status().as_u16().into();
    if let Some(text) = &options.send {
        stream.send_data(Bytes::from(text.clone()), false)?;
        let mut body = response.into_body();
        if let Some(data) = body.data().await {
            report["answer"] = String::from_utf8_lossy(&data?).into_owned().into();
        }
        if options.hold {
            println!("{report}");
            report["ended"] = loop {
                match body.data().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break error.to_string(),
                    None => break "closed".to_owned(),
                }
            }
            .into();
        }
    }
    driver.abort();
    Ok(())
}

async fn read_some(stream: &mut (impl AsyncReadExt + Unpin), report: &mut serde_json::Value) -> anyhow::Result<()> {
    let mut buffer = [0_u8; 1024];
    let length = stream.read(&mut buffer).await.context("read")?;
    report["answer"] = String::from_utf8_lossy(&buffer[..length]).into_owned().into();
    Ok(())
}

fn unhex(text: &str) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(text.len().is_multiple_of(2) && text.is_ascii(), "hex digits come in pairs");
    (0..text.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?)).collect()
}

/// TLS 1.3 with whoever answers.
pub(crate) fn believing() -> anyhow::Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believe(provider))))
}

fn client_config(options: &Options) -> anyhow::Result<ClientConfig> {
    let builder = believing()?;
    let mut config = match &options.ca_dir {
        None => builder.with_no_client_auth(),
        Some(dir) => {
            let (chain, key) = certificate(dir, options)?;
            builder.with_client_auth_cert(chain, key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

pub(crate) type Certificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn certificate(dir: &Path, options: &Options) -> anyhow::Result<Certificate> {
    let now = UnixTime::now().as_secs().cast_signed();
    let authority = Authority::open(dir, now).with_context(|| format!("no authority in {}", dir.display()))?;
    if options.anonymous {
        let made = authority.server_certificate(&["localhost".to_owned()], now)?;
        return Ok((made.chain, PrivateKeyDer::Pkcs8(made.key)));
    }
    sign(&authority, &options.identity, now)
}

/// A certificate for any identity, signed by the authority in a directory.
pub(crate) fn signed(dir: &Path, identity: &SpiffeId) -> anyhow::Result<Certificate> {
    let now = UnixTime::now().as_secs().cast_signed();
    let authority = Authority::open(dir, now).with_context(|| format!("no authority in {}", dir.display()))?;
    sign(&authority, identity, now)
}

fn sign(authority: &Authority, identity: &SpiffeId, now: i64) -> anyhow::Result<Certificate> {
    let asked = request(identity)?;
    // The last element is the bundle of roots, which no peer wants to see.
    let mut signed = authority.sign(&parse_csr(&asked.csr_pem)?, identity, 3600, now)?;
    signed.pop();
    let chain = signed.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes())).collect::<Result<_, _>>()?;
    Ok((chain, PrivateKeyDer::Pkcs8(asked.key)))
}

/// Believes any server.
#[derive(Debug)]
struct Believe(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Believe {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
