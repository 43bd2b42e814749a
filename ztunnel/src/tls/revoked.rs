//! Certificates that were taken back: the lists in force, and who must be told when they change.
//!
//! A handshake asks the lists of the moment; an open tunnel waits for the lists that name its peer's chain. There is one
//! store in a node, handed to every certificate's configuration.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use tokio::sync::watch;
use tulle_certs::{Crls, Roots, Usage, VerifyError, verify_chain};

use crate::tls::trust::in_force;

/// The lists. Cheap to clone; all clones are one store.
#[derive(Clone, Debug)]
pub struct Revoked {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    crls: ArcSwap<Crls>,
    changes: watch::Sender<()>,
}

impl Default for Revoked {
    fn default() -> Self {
        Self { shared: Arc::new(Shared { crls: ArcSwap::default(), changes: watch::channel(()).0 }) }
    }
}

impl Revoked {
    /// The lists of this moment.
    pub fn lists(&self) -> Arc<Crls> {
        self.shared.crls.load_full()
    }

    /// New lists; open tunnels are asked again if they differ. Whether they do.
    pub fn replace(&self, crls: Crls) -> bool {
        if *self.lists() == crls {
            return false;
        }
        self.shared.crls.store(Arc::new(crls));
        self.shared.changes.send_replace(());
        true
    }

    /// Why a chain that was good is not any more, if a list of now names it.
    pub(super) fn look(&self, chain: &[CertificateDer<'_>], roots: &Roots, usage: Usage) -> Option<VerifyError> {
        let crls = self.lists();
        if crls.is_empty() {
            return None;
        }
        match verify_chain(chain, roots, &crls, usage, in_force(chain)) {
            Err(error @ VerifyError::Revoked { .. }) => Some(error),
            // Ends by itself are others' business; a chain that was verified once needs no second opinion.
            Ok(_) | Err(_) => None,
        }
    }

    /// Completes once a list names the chain of a server that is no workload's; `anchors` may vouch for it.
    pub async fn hit_server(&self, chain: &[CertificateDer<'_>], anchors: &[TrustAnchor<'_>]) -> VerifyError {
        let look = || match tulle_certs::server_not_revoked(chain, anchors, &self.lists(), in_force(chain)) {
            Err(error @ VerifyError::Revoked { .. }) => Some(error),
            Ok(()) | Err(_) => None,
        };
        self.await_error(look).await
    }

    /// Tells of every change of the lists.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changes.subscribe()
    }

    /// Completes once a list names the chain.
    pub(super) async fn hit(&self, chain: &[CertificateDer<'_>], roots: &Roots, usage: Usage) -> VerifyError {
        self.await_error(|| self.look(chain, roots, usage)).await
    }

    async fn await_error(&self, look: impl Fn() -> Option<VerifyError>) -> VerifyError {
        // Subscribed before the first look, so that no change falls between.
        let mut changes = self.changes();
        loop {
            if let Some(error) = look() {
                return error;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::unix_now;
    use tulle_certs::ca::revoke::{Signed, revoke, serial};
    use tulle_certs::ca::{Authority, files};
    use tulle_certs::{Issued, SpiffeId, parse_csr, request};

    #[test]
    fn a_chain_that_has_ended_is_still_looked_up_for_the_streams_it_opened() {
        let dir = tempfile::tempdir().unwrap();
        let before = unix_now() - 3 * 86_400;
        let authority = Authority::open(dir.path(), before).unwrap();
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        let csr = parse_csr(&request(&id).unwrap().csr_pem).unwrap();
        let leaf = Issued::parse(&authority.sign(&csr, &id, 0, before).unwrap(), &id).unwrap();
        assert!(leaf.not_after < unix_now());
        let revoked = Revoked::default();
        assert!(revoked.look(&leaf.chain, &leaf.roots, Usage::Client).is_none());
        revoke(dir.path(), Signed::Leaf, &[serial(&leaf.serial).unwrap()], before).unwrap();
        let text = std::fs::read(dir.path().join(files::CRL)).unwrap();
        assert!(revoked.replace(Crls::parse(&text).unwrap()));
        assert!(revoked.look(&leaf.chain, &leaf.roots, Usage::Client).is_some());
    }
}
