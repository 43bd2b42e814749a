//! What nodes are told: typed resources with a version by content, and the set of them that is published.
//!
//! A resource is encoded once and shared by all sessions. Its version is a hash of its bytes, hence equal on every
//! replica and after every restart, and a reconnecting node is sent only what it lacks.

mod index;
mod set;
pub mod view;

pub use set::{ByName, Changes, ResourceSet};

use std::sync::Arc;

use prost::Message;
use prost::bytes::Bytes;
use sha2::Digest;
use sha2::Sha256;
use tulle_proto::names;
use tulle_proto::tulle_workload::WorkloadInfo;
use tulle_proto::workload::Address;
use tulle_proto::workload::address::Type;

/// The types that are served. In the order in which they must reach a node: who is believed before all
/// else, and a policy before a workload that names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `tulle.mesh.v1alpha1.TrustBundle`.
    TrustBundle,
    /// `istio.security.Authorization`.
    Authorization,
    /// `tulle.mesh.v1alpha1.NetworkPolicy`.
    NetworkPolicy,
    /// `tulle.mesh.v1alpha1.RequestAuth`.
    RequestAuth,
    /// `tulle.mesh.v1alpha1.EgressPolicy`.
    EgressPolicy,
    /// `istio.workload.Address`.
    Address,
    /// `tulle.mesh.v1alpha1.TrafficPolicy`.
    TrafficPolicy,
    /// `tulle.mesh.v1alpha1.Route`: last, since it names services that must be known.
    Route,
}

impl Kind {
    /// All of them, in sending order.
    pub const ALL: [Self; 8] = [
        Self::TrustBundle,
        Self::Authorization,
        Self::NetworkPolicy,
        Self::RequestAuth,
        Self::EgressPolicy,
        Self::Address,
        Self::TrafficPolicy,
        Self::Route,
    ];
    /// Those that every proxy of Istio's kind subscribes to.
    pub const BASIC: [Self; 2] = [Self::Authorization, Self::Address];
    /// Our own, which a proxy subscribes to only where they are advertised.
    pub const OWN: [Self; 6] = [
        Self::TrustBundle,
        Self::NetworkPolicy,
        Self::RequestAuth,
        Self::EgressPolicy,
        Self::TrafficPolicy,
        Self::Route,
    ];

    /// Type URL.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::TrustBundle => names::TYPE_TRUST_BUNDLE,
            Self::Authorization => names::TYPE_AUTHORIZATION,
            Self::NetworkPolicy => names::TYPE_NETWORK_POLICY,
            Self::RequestAuth => names::TYPE_REQUEST_AUTH,
            Self::EgressPolicy => names::TYPE_EGRESS_POLICY,
            Self::Address => names::TYPE_ADDRESS,
            Self::TrafficPolicy => names::TYPE_TRAFFIC_POLICY,
            Self::Route => names::TYPE_ROUTE,
        }
    }

    /// Short name, as `/debug/resources?type=` takes it.
    pub fn short(self) -> &'static str {
        match self {
            Self::TrustBundle => "TrustBundle",
            Self::Authorization => "Authorization",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::RequestAuth => "RequestAuth",
            Self::EgressPolicy => "EgressPolicy",
            Self::Address => "Address",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::Route => "Route",
        }
    }

    /// By type URL.
    pub fn of_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }
}

/// Which proxies are sent a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// All.
    Everyone,
    /// Those that know dry-run policies: others would enforce it.
    KnowsDryRun,
    /// Those that do not take this type: it stands in for a resource of it.
    Without(Kind),
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
    /// Who is sent it.
    pub audience: Audience,
}

impl Resource {
    /// Encodes a message. Deterministic: the generated maps are ordered.
    pub fn new(kind: Kind, name: String, message: &impl Message, aliases: Vec<String>) -> Self {
        let body = message.encode_to_vec();
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digits = |byte: &u8| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]].map(char::from);
        let version: String = Sha256::digest(&body)[..16].iter().flat_map(digits).collect();
        Self {
            kind,
            name: name.into(),
            version: version.into(),
            body: body.into(),
            aliases,
            audience: Audience::Everyone,
        }
    }

    /// What a workload is part of: names of its Services, its node, its groups. Empty for everything else. Read from the
    /// encoded message, because only proxies that do not take everything ask.
    pub fn part_of(&self) -> Vec<String> {
        let decoded = (self.kind == Kind::Address).then(|| Address::decode(self.body.clone()).ok()).flatten();
        let Some(Type::Workload(workload)) = decoded.and_then(|address| address.r#type) else { return Vec::new() };
        let info = workload.extensions.iter().find(|extension| extension.name == names::EXTENSION_WORKLOAD);
        let info = info.and_then(|extension| extension.config.as_ref());
        let info = info.and_then(|config| WorkloadInfo::decode(&*config.value).ok()).unwrap_or_default();
        let groups = info.groups.iter().map(|group| format!("{}{group:016x}", names::ALL_OF_GROUP));
        let node = (!workload.node.is_empty()).then(|| format!("{}{}", names::ALL_OF_NODE, workload.node));
        groups.chain(node).chain(workload.services.into_keys()).collect()
    }
}
