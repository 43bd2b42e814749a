//! What nodes are told: typed resources with a version by content, and the set of them that is published.
//!
//! A resource is encoded once and shared by all sessions. Its version is a hash of its bytes, hence equal on every
//! replica and after every restart, and a reconnecting node is sent only what it lacks.

mod set;
pub mod view;

pub use set::{Changes, ResourceSet};

use std::sync::Arc;

use prost::Message;
use prost::bytes::Bytes;
use sha2::Digest;
use sha2::Sha256;
use tulle_proto::names;

/// The types that are served. In the order in which they must reach a node: a policy before a workload that names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `istio.security.Authorization`.
    Authorization,
    /// `istio.workload.Address`.
    Address,
}

impl Kind {
    /// All of them, in sending order.
    pub const ALL: [Self; 2] = [Self::Authorization, Self::Address];

    /// Type URL.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => names::TYPE_AUTHORIZATION,
            Self::Address => names::TYPE_ADDRESS,
        }
    }

    /// Short name, as `/debug/resources?type=` takes it.
    pub fn short(self) -> &'static str {
        match self {
            Self::Authorization => "Authorization",
            Self::Address => "Address",
        }
    }

    /// By type URL.
    pub fn of_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }
}

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Its type.
    pub kind: Kind,
    /// Unique per type.
    pub name: Arc<str>,
    /// First half of the SHA-256 of `body`, hex.
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Bytes,
    /// `<network>/<ip>` names that find it on demand.
    pub aliases: Vec<String>,
    /// Only for proxies that know dry-run policies: others would enforce it.
    pub dry_run: bool,
}

impl Resource {
    /// Encodes a message. Deterministic: the generated maps are ordered.
    pub fn new(kind: Kind, name: String, message: &impl Message, aliases: Vec<String>) -> Self {
        let body = message.encode_to_vec();
        let version: String = Sha256::digest(&body)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { kind, name: name.into(), version: version.into(), body: body.into(), aliases, dry_run: false }
    }
}
