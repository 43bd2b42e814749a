//! Plain mesh objects as control understands them, whoever they came from: `World` holds all of one moment.
//!
//! No Kubernetes type, no protobuf and no I/O here, so that a test can write a world by hand and translation can be a
//! pure function of it. Values are already checked: an object that could not be read whole is either absent or, for a
//! policy, present as [`Spec::Unreadable`] so that it can fail closed.

mod condition;
mod egress;
mod keys;
mod meta;
mod network;
mod policy;
mod route;
mod service;
mod traffic;
mod trust;
mod workload;
mod world;

pub use condition::{Condition, ObjectConditions, ObjectKey, ParentStatus, Status};
pub use egress::{
    EgressEndpoint, EgressHttp, EgressKind, EgressPods, EgressPolicy, EgressPort, EgressProtocol, EgressRule,
    Origination,
};
pub use keys::{FetchedKeys, KeySource, KeySources};
pub use meta::{Expression, Meta, Operator, Owner, Selector};
pub use network::{NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, PortMatch};
pub use policy::{
    Action, AuthorizationPolicy, AuthorizationSpec, Compare, ConditionKey, HttpField, MtlsMode, Operation, PathPattern,
    PeerAuthentication, PeerAuthenticationSpec, Rule, Source, Spec, Target, TextMatch, Unenforced, When,
};
pub use route::{
    BackendRef, Cors, HeaderChanges, HttpFault, HttpRateLimit, ParentRef, PathChange, PathMatch, Route, RouteFilter,
    RouteKind, RouteMatch, RouteRetry, RouteRule, RouteSession, Wanted,
};
pub use service::{
    Endpoint, EndpointSlice, Hints, LegacyEndpoints, NamedPort, Service, ServiceNames, ServicePort, SlicePort,
    TargetPort, TrafficScope, Transport,
};
pub use traffic::{
    Balancer, DestinationRule, Distribution, HashCookie, HashKey, JwtRule, Layout, LocalityBalancing, LocalityScope,
    OutlierDetection, Pings, RequestAuthentication, RequestAuthenticationSpec, RetryBudget, SuccessRate, TcpKeepalive,
    TrafficSettings, Warmup,
};
pub use trust::TrustBundle;
pub use workload::{ContainerPort, Namespace, Node, Phase, Pod, ServiceAccount};
pub use world::{ByKey, Key, Object, ObjectChange, World, in_namespace};
