//! A tunnel server with a certificate of anybody's choice: what an attacker at a pod's address would be. With the right
//! identity it is also the proof that only the identity made the difference.
//!
//! It accepts every client, answers every CONNECT with 200 and every request inside with one line. Limits: HTTP/1.1
//! without bodies inside the tunnel; for tests only.

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tulle_certs::SpiffeId;
use tulle_proto::names;

use crate::dial;

/// Arguments of `lab impostor`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Directory of the authority that signs.
    #[arg(long)]
    ca_dir: PathBuf,
    /// SPIFFE id to prove.
    #[arg(long)]
    identity: SpiffeId,
}

const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 20\r\nconnection: close\r\n\r\n{\"name\":\"impostor\"}\r\n";

/// Serves on the mesh's port until killed.
pub fn main(options: &Options) -> anyhow::Result<()> {
    let (chain, key) = dial::signed(&options.ca_dir, &options.identity)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener =
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, names::PORT_HBONE)).await.context("the mesh's port")?;
        println!("{{\"listening\":true}}");
        loop {
            let (tcp, _) = listener.accept().await?;
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that refuses us is the point; it says so in its own log.
                let _ = serve(acceptor, tcp).await;
            });
        }
    })
}

async fn serve(acceptor: tokio_rustls::TlsAcceptor, tcp: TcpStream) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(acceptor.accept(tcp).await?).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let mut stream = respond.send_response(http::Response::new(()), false)?;
        tokio::spawn(async move {
            let mut body = request.into_body();
            if let Some(Ok(data)) = body.data().await {
                let _ = body.flow_control().release_capacity(data.len());
                let _ = stream.send_data(Bytes::from_static(ANSWER.as_bytes()), true);
            }
        });
    }
    Ok(())
}
