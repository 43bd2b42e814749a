//! A DestinationRule in the form that is carried out: limits, ejection and balancing towards a Service.
//!
//! Every limit is absent unless the object says so: a Service without a policy is used as before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use crate::state::ServiceName;

/// Beginning of the resource name, before `<namespace>/<name>`.
pub const DESTINATION_RULE: &str = "DestinationRule/";

/// Whose clients a policy is for. In the order in which they count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TrafficScope {
    /// Those of its namespace.
    OwnNamespace,
    /// All: it is of the Service's namespace.
    AllClients,
    /// All: it is of the root namespace.
    Mesh,
}

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// Resource name, `DestinationRule/<namespace>/<name>`.
    pub id: Arc<str>,
    /// Version of the resource as control named it.
    pub version: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// What it is about.
    pub services: Vec<ServiceName>,
    /// Whose clients it is for.
    pub scope: TrafficScope,
    /// For every port that has none of its own.
    pub settings: TrafficSettings,
    /// For single ports of the Service, as a whole.
    pub ports: BTreeMap<u16, TrafficSettings>,
}

impl TrafficPolicy {
    /// What holds for a port of the Service.
    pub fn at(&self, port: u16) -> &TrafficSettings {
        self.ports.get(&port).unwrap_or(&self.settings)
    }
}

/// Limits: `None` is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficSettings {
    /// Connections to all endpoints together.
    pub max_connections: Option<u32>,
    /// Until a connection is there.
    pub connect_timeout: Option<Duration>,
    /// Without a byte, of a connection whose requests are not read.
    pub idle_timeout: Option<Duration>,
    /// Without a request, of a connection for requests.
    pub http_idle_timeout: Option<Duration>,
    /// Of a connection whose requests are not read.
    pub max_connection_duration: Option<Duration>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests under way.
    pub max_requests: Option<u32>,
    /// 1: no connection is used twice.
    pub max_requests_per_connection: Option<u32>,
    /// Retries under way.
    pub max_retries: Option<u32>,
    /// Endpoints that fail are left alone for a while.
    pub outlier: Option<OutlierDetection>,
    /// How an endpoint is chosen.
    pub balancer: Balancer,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Balancer {
    /// As without a policy.
    #[default]
    Default,
    /// In turn.
    RoundRobin,
    /// By chance.
    Random,
    /// The better of two by requests under way.
    LeastRequest,
    /// By what the request says.
    RingHash(HashKey),
    /// Where the client addressed it: not carried out, since it would leave the mesh.
    Passthrough,
}

/// What of a request is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// Address of the client.
    SourceIp,
    /// A header.
    Header(HeaderName),
    /// A parameter of the query.
    Query(Arc<str>),
    /// A cookie.
    Cookie {
        /// Name.
        name: Arc<str>,
        /// Path of one that the proxy sets.
        path: Arc<str>,
        /// How long it holds. Zero: for the session.
        ttl: Duration,
        /// The proxy sets none.
        passive: bool,
    },
}

/// When an endpoint is left alone. `None`: not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// 5xx in a row.
    pub consecutive_5xx: Option<u32>,
    /// 502, 503, 504 in a row.
    pub consecutive_gateway: Option<u32>,
    /// Failures to connect and resets in a row, where they are counted apart.
    pub consecutive_local: Option<u32>,
    /// They are counted apart from 5xx.
    pub split_local: bool,
    /// How often ejected endpoints are looked at.
    pub interval: Duration,
    /// Times the number of ejections.
    pub base_ejection: Duration,
    /// Of all endpoints; one may always be ejected.
    pub max_ejection_percent: u32,
    /// With fewer healthy ones all are used.
    pub min_health_percent: u32,
}
