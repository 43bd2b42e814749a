//! Plain mesh objects as control understands them, whoever they came from: `World` holds all of one moment.
//!
//! No Kubernetes type, no protobuf and no I/O here, so that a test can write a world by hand and translation can be a
//! pure function of it. Values are already checked: an object that could not be read whole is either absent or, for a
//! policy, present as [`Spec::Unreadable`] so that it can fail closed.

mod condition;
mod meta;
mod network;
mod policy;
mod service;
mod trust;
mod workload;
mod world;

pub use condition::{Condition, ObjectConditions, ObjectKey, Status};
pub use meta::{Expression, Meta, Operator, Owner, Selector};
pub use network::{NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, PortMatch};
pub use policy::{
    Action, AuthorizationPolicy, AuthorizationSpec, Compare, ConditionKey, MtlsMode, Operation, PeerAuthentication,
    PeerAuthenticationSpec, Rule, Source, Spec, Target, TextMatch, Unenforced, When,
};
pub use service::{
    Endpoint, EndpointSlice, Hints, LegacyEndpoints, NamedPort, Service, ServiceNames, ServicePort, SlicePort,
    TargetPort, TrafficScope, Transport,
};
pub use trust::TrustBundle;
pub use workload::{ContainerPort, Namespace, Node, Phase, Pod, ServiceAccount};
pub use world::{ByKey, Key, Object, ObjectChange, World, in_namespace};
