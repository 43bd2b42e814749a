//! Whom a node believes: which roots for which trust domain, and when that ends for a peer that was believed.
//!
//! The own roots come with each certificate. Those of federated domains come from control and may change at any time, as
//! revocation lists do: a handshake asks what is in force, and an open tunnel waits for the moment in which its peer would
//! not be believed any more.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;
use tulle_certs::{Aliases, Bundles, Roots, SpiffeId, Trusted, Usage, VerifyError, leaf_identity, verify_peer};

use crate::base::unix_now;
use crate::outcome::{Code, Outcome};
use crate::tls::Revoked;

/// Whom a node believes, besides the roots that come with each certificate. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Other names of the trust domain.
    pub aliases: Aliases,
    /// Certificates that were taken back.
    pub revoked: Revoked,
    /// Other trust domains.
    pub federated: Federated,
}

/// The roots of federated trust domains in force. Cheap to clone; all clones are one store.
#[derive(Clone, Debug)]
pub struct Federated {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bundles: ArcSwap<Bundles>,
    changes: watch::Sender<()>,
}

impl Default for Federated {
    fn default() -> Self {
        Self { shared: Arc::new(Shared { bundles: ArcSwap::default(), changes: watch::channel(()).0 }) }
    }
}

impl Federated {
    /// The bundles of this moment.
    pub fn bundles(&self) -> Arc<Bundles> {
        self.shared.bundles.load_full()
    }

    /// New bundles; open tunnels of foreign domains are asked again if they differ. Whether they do.
    pub fn replace(&self, bundles: Bundles) -> bool {
        if *self.bundles() == bundles {
            return false;
        }
        self.shared.bundles.store(Arc::new(bundles));
        self.shared.changes.send_replace(());
        true
    }
}

impl Trust {
    /// The identity that a chain proves to a verifier of the trust domain `own` with these roots, at this moment.
    pub(super) fn verify(
        &self,
        own: &str,
        roots: &Roots,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<SpiffeId, VerifyError> {
        let foreign = self.federated.bundles();
        let trusted = Trusted { own, aliases: &self.aliases, roots, foreign: &foreign };
        verify_peer(chain, &trusted, &self.revoked.lists(), usage, now)
    }

    /// Completes once a chain that was believed is not any more.
    pub(super) async fn distrusted(
        &self,
        own: &str,
        roots: &Roots,
        chain: &[CertificateDer<'_>],
        usage: Usage,
    ) -> Outcome {
        let identity = chain.first().and_then(|leaf| leaf_identity(leaf).ok());
        let Some(identity) = identity.filter(|identity| !self.aliases.covers(own, identity.trust_domain())) else {
            let error = self.revoked.hit(chain, roots, usage).await;
            return Outcome::new(Code::CertRevoked, error.to_string());
        };
        // Subscribed before the first look, so that no change falls between.
        let mut bundles = self.federated.shared.changes.subscribe();
        let mut lists = self.revoked.changes();
        loop {
            // Streams go on past the end of the certificate that opened them: it is asked about as it was in force.
            let now = in_force(chain);
            match self.verify(own, roots, chain, usage, now) {
                Ok(_) => {}
                Err(error @ VerifyError::Revoked { .. }) => return Outcome::new(Code::CertRevoked, error.to_string()),
                Err(error @ (VerifyError::UntrustedDomain { .. } | VerifyError::ExpiredRoots { .. })) => {
                    return Outcome::new(Code::UntrustedDomain, error.to_string());
                }
                Err(error) => {
                    let domain = identity.trust_domain();
                    let text = format!("the roots of {domain} that are in force now do not prove {identity}: {error}");
                    return Outcome::new(Code::UntrustedDomain, text);
                }
            }
            let changed = tokio::select! {
                changed = bundles.changed() => changed,
                changed = lists.changed() => changed,
            };
            if changed.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// Now, or the end of the leaf if that is past.
pub(super) fn in_force(chain: &[CertificateDer<'_>]) -> UnixTime {
    let end = chain.first().and_then(tulle_certs::not_after).map_or(0, i64::unsigned_abs);
    UnixTime::since_unix_epoch(Duration::from_secs(end.min(unix_now().unsigned_abs())))
}
