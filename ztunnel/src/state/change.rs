//! What control can say, as the store takes it: decoded, one resource at a time.
//!
//! The kinds that were first have changes of their own, since each is staged in its own way; a type that only replaces what
//! is held is an [`OwnType`].

use std::sync::Arc;

use crate::state::{
    EgressPolicy, NetworkPolicy, Policy, Record, RequestAuth, Route, ServiceSpec, TrafficPolicy, TrustBundle, Workload,
};

/// One thing that control said.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload is so.
    Workload(Arc<Workload>),
    /// The same, packed already.
    Record(Arc<Record>),
    /// A service is so.
    Service(Arc<ServiceSpec>),
    /// A policy is so.
    Policy(Arc<Policy>),
    /// A policy cannot be read: this stand-in takes its place unless a good version is held.
    PolicyRejected(Arc<Policy>),
    /// The workload or service of this resource name is gone.
    AddressRemoved(Arc<str>),
    /// The policy of this resource name is gone.
    PolicyRemoved(Arc<str>),
    /// A NetworkPolicy is so.
    NetworkPolicy(Arc<NetworkPolicy>),
    /// A NetworkPolicy cannot be read: this stand-in takes its place unless a good version is held.
    NetworkPolicyRejected(Arc<NetworkPolicy>),
    /// The NetworkPolicy of this resource name is gone.
    NetworkPolicyRemoved(Arc<str>),
    /// Control offers NetworkPolicies, so nothing is complete without them.
    NetworkPoliciesExpected,
    /// The bundle of a trust domain is so.
    TrustBundle(Arc<TrustBundle>),
    /// A route is so.
    Route(Arc<Route>),
    /// A traffic policy is so.
    TrafficPolicy(Arc<TrafficPolicy>),
    /// A RequestAuthentication is so.
    RequestAuth(Arc<RequestAuth>),
    /// A RequestAuthentication cannot be read: this stand-in takes its place unless a good version is held.
    RequestAuthRejected(Arc<RequestAuth>),
    /// An EgressPolicy, or what a ServiceEntry allows, is so.
    EgressPolicy(Arc<EgressPolicy>),
    /// One that cannot be read: this stand-in takes its place unless a good version is held.
    EgressPolicyRejected(Arc<EgressPolicy>),
    /// The resource of this name is gone.
    OwnRemoved(OwnType, Arc<str>),
    /// Control offers the type, so nothing is complete without it.
    OwnExpected(OwnType),
    /// The first response of the type is complete.
    OwnSynced(OwnType),
    /// The first response with workloads and services is complete.
    AddressesSynced,
    /// The first response with policies is complete.
    PoliciesSynced,
    /// The first response with NetworkPolicies is complete.
    NetworkPoliciesSynced,
}

/// Own types whose changes come in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnType {
    /// HTTPRoutes and GRPCRoutes.
    Route,
    /// DestinationRules.
    TrafficPolicy,
    /// RequestAuthentications.
    RequestAuth,
    /// Roots of other trust domains.
    TrustBundle,
    /// EgressPolicies and ServiceEntries.
    EgressPolicy,
}

impl OwnType {
    pub(super) fn bit(self) -> u8 {
        1 << self as u8
    }
}
