//! The key sets of token issuers: where they are, and what was fetched.
//!
//! They are no objects of users and come from elsewhere than those, but nodes are told them with a RequestAuthentication, so
//! they are part of the world that is translated. Limits: no time in them, or a fetch that brings nothing new would be one.

use std::fmt;
use std::sync::Arc;

use crate::base::SharedMap;
use crate::model::traffic::JwtRule;

impl JwtRule {
    /// Where its keys are fetched from. `None`: they are given, or nobody knows where they are. As under Istio, an issuer that
    /// is an address says itself where its keys are.
    pub fn key_source(&self) -> Option<KeySource> {
        let is_address = |text: &str| text.starts_with("https://") || text.starts_with("http://");
        match (self.jwks.is_empty(), self.jwks_uri.is_empty()) {
            (false, _) => None,
            (true, false) => Some(KeySource::Uri(self.jwks_uri.clone())),
            (true, true) => is_address(&self.issuer).then(|| KeySource::Issuer(self.issuer.clone())),
        }
    }
}

/// Where a key set is fetched from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeySource {
    /// Its address.
    Uri(String),
    /// The issuer, whose description has the address (OpenID Connect Discovery §4).
    Issuer(String),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri(uri) => f.write_str(uri),
            Self::Issuer(issuer) => {
                write!(f, "{}/.well-known/openid-configuration", issuer.trim_end_matches('/'))
            }
        }
    }
}

/// What fetching a key set has brought so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedKeys {
    /// The last good one, JSON text; empty: there was none yet.
    pub jwks: Arc<str>,
    /// Why the newest fetch failed; empty: it did not.
    pub failure: String,
}

/// What was fetched, by source. A source that is not there was not tried yet.
pub type KeySources = SharedMap<KeySource, Arc<FetchedKeys>>;
