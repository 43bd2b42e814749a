//! Control's own certificate: issued by its own CA, renewed while running, and swapped without touching connections.
//!
//! A renewed intermediate comes from the CA directory, where another replica may have put it first. A certificate that
//! `control revoke` took back is replaced at once: nodes that have heard of it come back and must find another.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::UnixTime;
use tokio::sync::watch;
use tulle_certs::ca::files::CRL;
use tulle_certs::ca::past_half_life;
use tulle_certs::ca::{Authority, CaError};
use tulle_certs::fingerprint;
use tulle_certs::server_not_revoked;
use tulle_certs::{Crls, MAX_CRL_BYTES, Roots, VerifyError};
use tulle_proto::node::TrustQuestion;

use crate::base;
use crate::base::Stop;

/// Between two looks at the clock and at the CA directory. Certificates live for days, but who rotates waits for it.
const CHECK: Duration = Duration::from_secs(2);

struct Current {
    config: Arc<ServerConfig>,
    chain: Vec<CertificateDer<'static>>,
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
    tracing::info!(serial = certificate.serial, "control's own certificate");
    let chain = certificate.chain.clone();
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key.into())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Nodes stay connected, so nobody resumes: no tickets, and no memory of sessions.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let (not_before, not_after) = (certificate.not_before, certificate.not_after);
    Ok(Current { config: Arc::new(config), chain, not_before, not_after })
}

/// What nodes are told about the CA.
pub(super) fn trust(authority: &Authority) -> TrustQuestion {
    TrustQuestion { roots: authority.roots().fingerprints(), issuer: fingerprint(authority.intermediate()) }
}

/// Renews the intermediate and the server certificate, and takes over what others changed in the CA directory (another
/// replica, `control rotate`), until it is told to stop.
pub(super) async fn renew(
    ca_dir: PathBuf,
    authority: Arc<ArcSwap<Authority>>,
    tls: ServerTls,
    told: watch::Sender<TrustQuestion>,
    mut stop: Stop,
) {
    let mut last_error = String::new();
    let mut lists = Lists::default();
    loop {
        tokio::select! {
            () = stop.requested() => return,
            () = tokio::time::sleep(CHECK) => {}
        }
        let now = base::unix_now();
        let mut new_issuer = false;
        match reopen(&ca_dir, &authority.load(), now) {
            Ok(None) => last_error.clear(),
            Ok(Some(renewed)) => {
                last_error.clear();
                let question = trust(&renewed);
                tracing::info!(roots = question.roots.len(), rotation = ?renewed.rotation(), "took over the CA directory");
                new_issuer = renewed.intermediate() != authority.load().intermediate();
                authority.store(Arc::new(renewed));
                told.send_if_modified(|last| std::mem::replace(last, question.clone()) != question);
            }
            Err(error) => {
                // Once for each kind of trouble, not at each look. What is loaded goes on signing.
                let error = error.to_string();
                if error != last_error {
                    tracing::error!(error, "cannot use the CA directory; the CA goes on as it was loaded");
                    last_error = error;
                }
            }
        }
        let current = tls.current.load();
        let taken_back = lists.name(&ca_dir, &current.chain, authority.load().roots(), now);
        if new_issuer || taken_back || past_half_life(current.not_before, current.not_after, now) {
            match issue(&authority.load(), &tls.names, now) {
                Ok(renewed) => tls.current.store(Arc::new(renewed)),
                Err(error) => {
                    tracing::error!(%error, "cannot renew control's own certificate");
                    // It is looked at again, so that it is tried again.
                    lists = Lists::default();
                }
            }
        }
    }
}

/// Looks into `crl.pem` when it has changed.
#[derive(Default)]
struct Lists {
    /// Inode and length as they were read, and when the file was written.
    read: Option<(u64, u64, SystemTime)>,
}

impl Lists {
    /// Whether control's own certificate was taken back since the last look.
    fn name(&mut self, ca_dir: &Path, chain: &[CertificateDer<'_>], roots: &Roots, now: i64) -> bool {
        let path = ca_dir.join(CRL);
        let Ok(meta) = std::fs::metadata(&path) else { return false };
        let stamp = meta.modified().ok().map(|written| (meta.ino(), meta.len(), written));
        if stamp == self.read || meta.len() > MAX_CRL_BYTES as u64 {
            return false;
        }
        self.read = stamp;
        // What cannot be read takes nothing back here, as on the nodes; `control revoke` refuses to add to it.
        let Ok(crls) = std::fs::read(&path).map_err(|_| ()).and_then(|bytes| Crls::parse(&bytes).map_err(|_| ()))
        else {
            return false;
        };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()));
        matches!(server_not_revoked(chain, roots.anchors(), &crls, now), Err(VerifyError::Revoked { .. }))
    }
}

/// The authority anew, if its time is half over or its files have changed.
fn reopen(ca_dir: &Path, loaded: &Authority, now: i64) -> Result<Option<Authority>, CaError> {
    let rotation_moved = || Ok::<_, CaError>(loaded.rotation_in(ca_dir)? != *loaded.rotation());
    if !loaded.wants_renewal(now) && !loaded.is_stale(ca_dir)? && !rotation_moved()? {
        return Ok(None);
    }
    let renewed = Authority::open(ca_dir, now)?;
    // Past half-life without the root's key, opening gives the same again.
    let same = renewed.intermediate() == loaded.intermediate()
        && renewed.roots() == loaded.roots()
        && renewed.rotation() == loaded.rotation();
    Ok((!same).then_some(renewed))
}
