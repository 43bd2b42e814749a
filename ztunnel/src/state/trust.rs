//! The roots of another trust domain, as control sent them. They are kept with the rest of what control says, so that one
//! generation says all, and are taken from there to where handshakes ask for them.

use std::sync::Arc;

use tulle_certs::Roots;

/// A bundle of a federated trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    /// Resource name, `TrustBundle/<trust domain>`.
    pub id: Arc<str>,
    /// Version of the resource.
    pub version: Arc<str>,
    /// The trust domain.
    pub trust_domain: Arc<str>,
    /// What signs its identities.
    pub roots: Roots,
}
