//! TLS for the raw protocol, for what a proxy sees of a client that names the server in its greeting.
//!
//! The server makes itself a certificate that nobody has signed, and the client believes it: what is shown is who lets which
//! name through, not who proves what.

use std::sync::Arc;

use anyhow::Context;
use rustls::ServerConfig;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::TlsConnector;

use crate::dial;

/// What ends TLS for any server name.
pub(super) fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let own = rcgen::generate_simple_self_signed(["shop.invalid".to_owned()]).context("no certificate")?;
    let key = PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The client's side, made before there is a connection so that its greeting follows at once.
pub(super) fn connector() -> anyhow::Result<TlsConnector> {
    Ok(TlsConnector::from(Arc::new(dial::believing()?.with_no_client_auth())))
}

/// Asks for the server `name`.
pub(super) async fn connect(
    connector: &TlsConnector,
    tcp: TcpStream,
    name: &str,
) -> anyhow::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned()).with_context(|| format!("`{name}` is no server name"))?;
    Ok(connector.connect(name, tcp).await?)
}
