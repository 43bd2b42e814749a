//! DestinationRule (networking.istio.io) and RequestAuthentication (security.istio.io), as far as nodes carry them out.
//!
//! Fields that they do not are kept by name, so that a condition can say which have no effect.

use std::collections::BTreeMap;

use crate::model::meta::Meta;
use crate::model::policy::{Spec, Target};

/// Istio's DestinationRule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationRule {
    /// Name.
    pub meta: Meta,
    /// host, as written.
    pub host: String,
    /// exportTo says that only clients of its own namespace are meant.
    pub own_namespace: bool,
    /// trafficPolicy.
    pub settings: TrafficSettings,
    /// trafficPolicy.portLevelSettings, by port of the Service.
    pub ports: BTreeMap<u16, TrafficSettings>,
    /// Fields without effect.
    pub ignored: Vec<String>,
}

/// Limits: 0 is none, or the default. Durations are milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrafficSettings {
    /// connectionPool.tcp.maxConnections.
    pub max_connections: u32,
    /// connectionPool.tcp.connectTimeout.
    pub connect_timeout_ms: u32,
    /// connectionPool.tcp.idleTimeout.
    pub idle_timeout_ms: u32,
    /// connectionPool.http.idleTimeout.
    pub http_idle_timeout_ms: u32,
    /// connectionPool.tcp.maxConnectionDuration.
    pub max_connection_duration_ms: u32,
    /// connectionPool.http.http1MaxPendingRequests.
    pub max_pending_requests: u32,
    /// connectionPool.http.http2MaxRequests.
    pub max_requests: u32,
    /// connectionPool.http.maxRequestsPerConnection.
    pub max_requests_per_connection: u32,
    /// connectionPool.http.maxRetries.
    pub max_retries: u32,
    /// outlierDetection.
    pub outlier: Option<OutlierDetection>,
    /// loadBalancer.
    pub balancer: Balancer,
    /// retryBudget.
    pub retry_budget: Option<RetryBudget>,
    /// loadBalancer.warmup.
    pub warmup: Option<Warmup>,
    /// connectionPool.http.maxConcurrentStreams.
    pub max_concurrent_streams: u32,
    /// loadBalancer.localityLbSetting.
    pub locality: Option<LocalityBalancing>,
    /// connectionPool.tcp.tcpKeepalive.
    pub keepalive: Option<TcpKeepalive>,
    /// connectionPool.http.http2KeepAlive.
    pub pings: Option<Pings>,
}

/// connectionPool.http.http2KeepAlive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pings {
    /// interval.
    pub interval_ms: u32,
    /// timeout.
    pub timeout_ms: u32,
}

/// connectionPool.tcp.tcpKeepalive; 0: not said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// time.
    pub time_ms: u32,
    /// interval.
    pub interval_ms: u32,
    /// probes.
    pub probes: u32,
}

/// loadBalancer.localityLbSetting. Places are written `region/zone/subzone`, with `*` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalityBalancing {
    /// distribute.
    Distribute(Vec<Distribution>),
    /// Nearest first.
    Nearest {
        /// What is compared one after the other: failoverPriority.
        scopes: Vec<LocalityScope>,
        /// failover: from, to.
        failover: Vec<(String, String)>,
    },
}

/// distribute[].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution {
    /// from.
    pub from: String,
    /// to: places and percent.
    pub to: Vec<(String, u32)>,
}

/// What of two places is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalityScope {
    /// topology.kubernetes.io/region.
    Region,
    /// topology.kubernetes.io/zone.
    Zone,
    /// topology.istio.io/subzone.
    Subzone,
    /// kubernetes.io/hostname.
    Node,
    /// topology.istio.io/cluster.
    Cluster,
    /// topology.istio.io/network.
    Network,
}

/// retryBudget, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryBudget {
    /// percent, in hundredths.
    pub share: u32,
    /// minRetryConcurrency.
    pub least: u32,
    /// budgetInterval.
    pub interval_ms: u32,
}

/// loadBalancer.warmup, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warmup {
    /// duration.
    pub duration_ms: u32,
    /// minimumPercent, 1 to 100.
    pub least_percent: u32,
    /// aggression, in thousandths.
    pub aggression: u32,
}

/// Ejection by the share of what went well; 0 nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuccessRate {
    /// Least share, percent.
    pub percent: u32,
    /// What is counted is so old at most.
    pub window_ms: u32,
    /// Fewer say nothing.
    pub least_requests: u32,
}

/// outlierDetection, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlierDetection {
    /// consecutive5xxErrors; 0: off.
    pub consecutive_5xx: u32,
    /// consecutiveGatewayErrors; 0: off.
    pub consecutive_gateway_errors: u32,
    /// consecutiveLocalOriginFailures; 0: off.
    pub consecutive_local_failures: u32,
    /// splitExternalLocalOriginErrors.
    pub split_local_failures: bool,
    /// interval.
    pub interval_ms: u32,
    /// baseEjectionTime.
    pub base_ejection_ms: u32,
    /// maxEjectionPercent.
    pub max_ejection_percent: u32,
    /// minHealthPercent.
    pub min_health_percent: u32,
    /// The object's annotations `tulle.dev/success-rate-*`.
    pub success_rate: Option<SuccessRate>,
}

/// loadBalancer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Balancer {
    /// Not said.
    #[default]
    Default,
    /// ROUND_ROBIN.
    RoundRobin,
    /// RANDOM.
    Random,
    /// LEAST_REQUEST, LEAST_CONN.
    LeastRequest,
    /// PASSTHROUGH.
    Passthrough,
    /// consistentHash: its key, and how keys are laid out over endpoints.
    Hash(HashKey, Layout),
}

/// How keys are laid out over endpoints. 0: the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// ringHash, with minimumRingSize.
    Ring(u32),
    /// maglev, with tableSize.
    Maglev(u32),
}

/// What is hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// useSourceIp.
    SourceIp,
    /// httpHeaderName.
    Header(String),
    /// httpQueryParameterName.
    Query(String),
    /// httpCookie.
    Cookie(HashCookie),
}

/// httpCookie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashCookie {
    /// name.
    pub name: String,
    /// path.
    pub path: String,
    /// ttl, seconds; none: the proxy sets no cookie.
    pub seconds: Option<u32>,
    /// attributes, each `name` or `name=value`.
    pub attributes: Vec<String>,
}

/// Istio's RequestAuthentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestAuthentication {
    /// Name.
    pub meta: Meta,
    /// Target and rules.
    pub spec: Spec<RequestAuthenticationSpec>,
}

/// Its spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestAuthenticationSpec {
    /// What it applies to.
    pub target: Target,
    /// jwtRules.
    pub rules: Vec<JwtRule>,
}

/// jwtRules[].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JwtRule {
    /// issuer.
    pub issuer: String,
    /// audiences.
    pub audiences: Vec<String>,
    /// jwks; empty: none is given.
    pub jwks: String,
    /// jwksUri; empty: none is given.
    pub jwks_uri: String,
    /// fromHeaders: name, lower case, and prefix.
    pub from_headers: Vec<(String, String)>,
    /// fromParams.
    pub from_params: Vec<String>,
    /// fromCookies.
    pub from_cookies: Vec<String>,
    /// forwardOriginalToken.
    pub forward: bool,
    /// outputPayloadToHeader; empty: none.
    pub payload_header: String,
    /// outputClaimToHeaders: header, and claim from the outermost inwards.
    pub claim_headers: Vec<(String, Vec<String>)>,
}
