//! What this node knows of the mesh: workloads, services and policies, as one immutable snapshot at a time.
//!
//! [`store`] gives two halves. The [`Writer`] cannot be cloned: one task (xDS) applies [`Change`]s to it. Any number of
//! [`Reader`]s load the newest [`Snapshot`] without a lock, keep it for the length of one decision, and never see half
//! an update. Building happens off the readers' path and shares everything that did not change, so an update costs what
//! it touches and not what is known. Workloads are kept packed ([`Record`]), since a node knows all and talks to few. Not
//! here: protobuf (`xds::decode`), verdicts (`policy`), choice of an endpoint (`lb`).
//!
//! Policy never fails open, and the store is where that is held:
//! * a workload that names a policy which is not here is **staged**: its version in force stays, and with none in force it
//!   is known with [`Workload::policies_pending`], which `policy` answers with a refusal;
//! * a removed policy stays in force as long as a workload names it;
//! * a rejected policy leaves its last good version in force, or, if it never had one, a stand-in that denies.

mod change;
mod cow;
mod demand;
mod egress;
mod endpoints;
#[cfg(test)]
pub mod fixtures;
mod gateway;
mod http_rules;
mod index;
mod known;
mod l7;
mod members;
mod narrowed;
mod network;
mod pack;
mod policy;
mod record;
mod request_auth;
mod route;
mod service;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod traffic;
mod trust;
mod versions;
mod workload;

pub use change::{Change, OwnType};
pub use demand::{Demands, Lease, address_name};
pub use egress::{
    EGRESS_POLICY, EgressEndpoint, EgressHttp, EgressPath, EgressPlace, EgressPolicy, EgressPort, EgressProtocol,
    EgressRule, HostPattern, Origination, SERVICE_ENTRY,
};
pub use endpoints::{Candidate, Endpoints, KeyTable, KeyTables, Placed, PortTable, PortTables, Ports, Tiers};
pub use gateway::Gateway;
pub use http_rules::{Element, Group, HttpMatch, HttpRule, PathPattern};
pub use l7::RouteEntry;
pub use network::{IpBlock, NETWORK_POLICY, NetworkPeers, NetworkPolicy, NetworkPort, NetworkRule, Way};
pub use policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccount, StringMatch};
pub use record::{Place, Record, Shapes};
pub use request_auth::{JwtRule, REQUEST_AUTHENTICATION, RequestAuth};
pub use route::{
    Abort, Backend, Cors, Fault, Filters, GRPC_ROUTE, HTTP_ROUTE, HeaderChanges, Listed, Mirror, PathChange, PathMatch,
    Pattern, RateLimit, Redirect, Retry, Rewrite, Route, RouteKind, RouteMatch, RouteParent, RouteRule, ServiceName,
    SessionRule, Turns, Wanted,
};
pub use service::{
    DatagramPort, HealthPolicy, IpFamilies, IpFamily, LoadBalancing, LocalityScope, Mode, NamedPort, Service,
    ServiceInfo, ServiceSpec, Transport, Visibility,
};
pub use snapshot::Snapshot;
pub use store::{Applied, Reader, Writer, store};
pub use traffic::{
    Balancer, DESTINATION_RULE, Distribution, HashKey, Layout, Nearness, OutlierDetection, Region, RetryBudget,
    SuccessRate, TrafficPolicy, TrafficScope, TrafficSettings, Warmup,
};
pub use trust::TrustBundle;
pub use versions::{LogEntry, LogName};
pub use workload::{
    AppProtocol, ApplicationTunnel, DnsName, EgressMode, EndpointHints, GatewayAddress, GatewayTarget, Locality,
    Memberships, Port, Protocol, Workload, WorkloadType,
};
