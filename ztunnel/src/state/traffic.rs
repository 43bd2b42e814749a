//! A DestinationRule in the form that is carried out: limits, ejection and balancing towards a Service.
//!
//! Every limit is absent unless the object says so: a Service without a policy is used as before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use crate::base::Pings;
use crate::base::sockets::Keepalive;
use crate::state::{Locality, LocalityScope, ServiceName};

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
    /// Retries as a share of the requests, in the place of `max_retries`.
    pub retry_budget: Option<RetryBudget>,
    /// New endpoints get their share little by little.
    pub warmup: Option<Warmup>,
    /// Requests at once on one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// Which places come first, or get which share; none: as the Service prefers.
    pub nearness: Option<Arc<Nearness>>,
    /// Of the connections to endpoints.
    pub keepalive: Option<Keepalive>,
    /// Of the HTTP/2 connections to endpoints.
    pub pings: Option<Pings>,
}

/// What the places of client and endpoint mean for a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nearness {
    /// Shares of places. The first that is about the client's place counts; without one all endpoints are alike.
    Shares(Vec<Distribution>),
    /// Nearest first.
    Order {
        /// Compared one after the other; the more are the same, the nearer.
        scopes: Vec<LocalityScope>,
        /// The client's region, and the one that comes first of those that are not the client's.
        failover: Vec<(Arc<str>, Arc<str>)>,
    },
}

/// Shares of places for the clients of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// Of the client.
    pub from: Region,
    /// Places of endpoints, and their weights; not 0.
    pub to: Vec<(Region, u32)>,
}

/// A place as a pattern: region, zone and subzone; none: any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region([Option<Arc<str>>; 3]);

impl Region {
    /// From `region/zone/subzone`, where a part that is absent or `*` is any. `None`: it has more parts.
    pub fn new(text: &str) -> Option<Self> {
        let mut parts = text.split('/').map(|part| (part != "*").then(|| part.into()));
        let found = Self(std::array::from_fn(|_| parts.next().flatten()));
        parts.next().is_none().then_some(found)
    }

    /// Whether a place is in it.
    pub fn holds(&self, place: &Locality) -> bool {
        let Locality { region, zone, subzone } = place;
        self.0.iter().zip([region, zone, subzone]).all(|(own, part)| own.as_ref().is_none_or(|own| own == part))
    }
}

/// How many retries there may be beside requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// Of the requests, in hundredths of a percent.
    pub share: u32,
    /// Always allowed.
    pub least: u32,
    /// What began so long ago counts too; none: what is under way alone.
    pub interval: Option<Duration>,
}

impl Default for RetryBudget {
    /// Envoy's.
    fn default() -> Self {
        Self { share: 2_000, least: 3, interval: None }
    }
}

/// How a new endpoint begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warmup {
    /// Until it has its whole share.
    pub duration: Duration,
    /// Part of its share that it has at once, above 0 and up to 1.
    pub least: f64,
    /// 1: the share grows evenly; above, faster at first.
    pub aggression: f64,
}

// Neither number is made by calculation, so neither is NaN.
impl Eq for Warmup {}

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
    Hash(HashKey, Layout),
    /// Where the client addressed it: not carried out, since it would leave the mesh.
    Passthrough,
}

/// How hashes are laid out over endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A ring with so many points at least.
    Ring(u32),
    /// Maglev's table, with so many rows.
    Maglev(u32),
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
        /// What else is written into one that the proxy sets, with `; ` before each. Empty: nothing.
        attributes: Arc<str>,
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
    /// What went well lately is less than a share.
    pub success_rate: Option<SuccessRate>,
}

/// What share must go well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuccessRate {
    /// Percent.
    pub percent: u32,
    /// What is older does not count.
    pub window: Duration,
    /// Fewer say nothing.
    pub least: u32,
}
