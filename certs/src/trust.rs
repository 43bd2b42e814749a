//! Whose roots count for which trust domain.
//!
//! A certificate's own name chooses the roots that it is verified with, and nothing else does: one of the own trust domain
//! (or an alias of it) is verified with the own roots only, one of a federated domain with the roots of that domain's bundle
//! only, and one of any other domain is refused. So a foreign authority cannot name somebody of the own domain, nor the own
//! one somebody of a foreign domain. A bundle for the own domain or an alias of it is never asked. Limits: two domains whose
//! bundles share a root can name each other's identities, which no verifier can tell apart.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, UnixTime};

use crate::Crls;
use crate::Roots;
use crate::SpiffeId;
use crate::verify::{Usage, VerifyError, leaf_identity, verify_chain};

/// Other names of the mesh's trust domain, as while it is renamed: who proves an identity there is who has that
/// namespace and account here. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases(Arc<[String]>);

impl Aliases {
    /// `names` are trust domains; empty ones are left out.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect())
    }

    /// Whether a peer of `domain` counts as one of `own`.
    pub fn covers(&self, own: &str, domain: &str) -> bool {
        own == domain || self.0.iter().any(|alias| alias == domain)
    }

    /// Whether `proven` is `expected`, by name or by alias. `own` is the verifier's trust domain: an alias stands for
    /// that one only, never for a third.
    pub fn same(&self, own: &str, expected: &SpiffeId, proven: &SpiffeId) -> bool {
        expected == proven
            || (expected.namespace() == proven.namespace()
                && expected.service_account() == proven.service_account()
                && self.covers(own, expected.trust_domain())
                && self.covers(own, proven.trust_domain()))
    }
}

/// Roots of federated trust domains, by name. Cheap to clone; the default has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bundles(Arc<BTreeMap<String, Roots>>);

impl Bundles {
    /// The roots of a domain.
    pub fn get(&self, domain: &str) -> Option<&Roots> {
        self.0.get(domain)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Roots)> {
        self.0.iter().map(|(domain, roots)| (domain.as_str(), roots))
    }

    /// The same with other roots for a domain.
    pub fn with(&self, domain: &str, roots: Roots) -> Self {
        let mut all = BTreeMap::clone(&self.0);
        all.insert(domain.to_owned(), roots);
        Self(Arc::new(all))
    }

    /// The same without a domain.
    pub fn without(&self, domain: &str) -> Self {
        let mut all = BTreeMap::clone(&self.0);
        all.remove(domain);
        Self(Arc::new(all))
    }
}

/// Whom a verifier believes.
#[derive(Clone, Copy, Debug)]
pub struct Trusted<'a> {
    /// Its trust domain.
    pub own: &'a str,
    /// Other names of it.
    pub aliases: &'a Aliases,
    /// Roots of both.
    pub roots: &'a Roots,
    /// Roots of others.
    pub foreign: &'a Bundles,
}

impl Trusted<'_> {
    /// Whether `domain` is neither the own one nor an alias of it.
    pub fn is_foreign(&self, domain: &str) -> bool {
        !self.aliases.covers(self.own, domain)
    }
}

/// Verifies a chain (leaf first) with the roots of the trust domain that the leaf names; gives the identity that it proves.
///
/// # Errors
/// Those of [`verify_chain`]; [`VerifyError::UntrustedDomain`] if there are no roots for the domain, and
/// [`VerifyError::ExpiredRoots`] if none of a foreign domain's roots is valid at `now`. (The own roots do not end by
/// themselves: they are replaced by a rotation, and nobody is there to say otherwise.)
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    trusted: &Trusted<'_>,
    crls: &Crls,
    usage: Usage,
    now: UnixTime,
) -> Result<SpiffeId, VerifyError> {
    let leaf = chain.first().ok_or(VerifyError::NoCertificate)?;
    // Only a claim until the chain is verified, with the roots of those who may make it.
    let claimed = leaf_identity(leaf)?;
    let domain = claimed.trust_domain();
    if !trusted.is_foreign(domain) {
        return verify_chain(chain, trusted.roots, crls, usage, now);
    }
    let roots =
        trusted.foreign.get(domain).ok_or_else(|| VerifyError::UntrustedDomain { identity: claimed.clone() })?;
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let roots = roots.valid_at(seconds).ok_or_else(|| VerifyError::ExpiredRoots { trust_domain: domain.to_owned() })?;
    verify_chain(chain, &roots, crls, usage, now)
}

#[cfg(test)]
mod tests;
