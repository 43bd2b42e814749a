//! Control's own certificate: issued by its own CA, renewed while running, and swapped without touching connections.
//!
//! A renewed intermediate comes from the CA directory, where another replica may have put it first.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use tulle_certs::ca::Authority;
use tulle_certs::ca::past_half_life;

use crate::base;
use crate::base::Stop;

/// Between two looks at the clock. Certificates live for days.
const CHECK: Duration = Duration::from_secs(60);

struct Current {
    config: Arc<ServerConfig>,
    not_before: i64,
    not_after: i64,
}

/// The TLS configuration for new connections.
#[derive(Clone)]
pub(super) struct ServerTls {
    names: Arc<[String]>,
    current: Arc<ArcSwap<Current>>,
}

impl ServerTls {
    pub(super) fn new(authority: &Authority, names: Vec<String>, now: i64) -> anyhow::Result<Self> {
        let current = issue(authority, &names, now)?;
        Ok(Self { names: names.into(), current: Arc::new(ArcSwap::from_pointee(current)) })
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().config)
    }
}

fn issue(authority: &Authority, names: &[String], now: i64) -> anyhow::Result<Current> {
    let certificate =
        authority.server_certificate(names, now).context("cannot make control's own certificate (see --tls-san)")?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key.into())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Current { config: Arc::new(config), not_before: certificate.not_before, not_after: certificate.not_after })
}

/// Renews the intermediate and the server certificate until it is told to stop.
pub(super) async fn renew(ca_dir: PathBuf, authority: Arc<ArcSwap<Authority>>, tls: ServerTls, mut stop: Stop) {
    loop {
        tokio::select! {
            () = stop.requested() => return,
            () = tokio::time::sleep(CHECK) => {}
        }
        let now = base::unix_now();
        if authority.load().wants_renewal(now) {
            match Authority::open(&ca_dir, now) {
                Ok(renewed) => {
                    authority.store(Arc::new(renewed));
                    tracing::info!("the intermediate certificate was renewed");
                }
                Err(error) => tracing::error!(%error, "cannot renew the intermediate certificate"),
            }
        }
        let current = tls.current.load();
        if past_half_life(current.not_before, current.not_after, now) {
            match issue(&authority.load(), &tls.names, now) {
                Ok(renewed) => tls.current.store(Arc::new(renewed)),
                Err(error) => tracing::error!(%error, "cannot renew control's own certificate"),
            }
        }
    }
}
