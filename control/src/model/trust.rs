//! Roots of other trust domains: ClusterTrustBundle of certificates.k8s.io, if it says whose it is. One that cannot be
//! read is kept with the reason, because its author must be told; it vouches for nobody.

use tulle_certs::Roots;

use crate::model::meta::Meta;

/// A ClusterTrustBundle that is labelled with a trust domain; others are nobody's business here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// Name.
    pub meta: Meta,
    /// The trust domain, and its roots; or why they cannot be read.
    pub spec: Result<(String, Roots), String>,
}
