//! An authorization policy in the form that is evaluated: exact types, nothing left to parse.
//!
//! The algebra (which list means what, and what emptiness means) is written in `authorization.proto` and carried out in
//! `policy`. What could not be decoded is part of the value ([`Match::unknown`]), because leaving it out would widen an
//! ALLOW or narrow a DENY.

use std::sync::Arc;

use ipnet::IpNet;

use crate::state::HttpRule;

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of its namespace.
    Namespace,
    /// Workloads that name it.
    Selector,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The connection is allowed.
    Allow,
    /// The connection is denied, before any ALLOW.
    Deny,
    /// The connection is recorded; nothing else.
    Audit,
}

impl Action {
    /// How what cannot be evaluated counts: as met, so that more is denied or recorded; in an ALLOW as failed.
    pub fn suspects(self) -> bool {
        self != Self::Allow
    }
}

/// A policy. It matches if any rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Resource name, `<namespace>/<name>`.
    pub id: Arc<str>,
    /// Version of the resource as control named it, or of the rejected resource that a stand-in stands for.
    pub version: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Whom it applies to.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// Evaluated and reported, but without effect on the verdict. An AUDIT never has one.
    pub dry_run: bool,
    /// Rules. Where `http` is there: what is left of them for bytes that are not HTTP, such that no more is allowed.
    pub rules: Vec<Rule>,
    /// The rules for requests, in the same places.
    pub http: Option<Arc<[HttpRule]>>,
    /// Stands in for a policy that cannot be read, with the reason: denies all.
    pub stand_in: Option<Arc<str>>,
}

impl Policy {
    /// What takes the place of a policy that cannot be read and has no good version: denies everything it applies to.
    pub fn denies_all(id: &Arc<str>, version: &Arc<str>, scope: Scope, dry_run: bool, reason: &str) -> Self {
        Self {
            id: id.clone(),
            version: version.clone(),
            namespace: id.split_once('/').map_or("", |(namespace, _)| namespace).into(),
            scope,
            action: Action::Deny,
            dry_run,
            rules: vec![Rule::default()],
            http: None,
            stand_in: Some(reason.into()),
        }
    }
}

/// Matches if all clauses do; without clauses, always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Clauses.
    pub clauses: Vec<Clause>,
    /// The rule has a part that this proxy does not know.
    pub unknown: bool,
}

/// Matches if any of its matches does; without any, always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// Matches.
    pub matches: Vec<Match>,
    /// The clause has a part that this proxy does not know.
    pub unknown: bool,
}

/// Holds if every group that is not empty holds; without any attribute, never.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Namespaces of the proven identity.
    pub namespaces: Vec<StringMatch>,
    /// None of these.
    pub not_namespaces: Vec<StringMatch>,
    /// SPIFFE ids without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// None of these.
    pub not_principals: Vec<StringMatch>,
    /// Source addresses.
    pub source_ips: Vec<IpNet>,
    /// None of these.
    pub not_source_ips: Vec<IpNet>,
    /// Application addresses.
    pub destination_ips: Vec<IpNet>,
    /// None of these.
    pub not_destination_ips: Vec<IpNet>,
    /// Application ports.
    pub destination_ports: Vec<u16>,
    /// None of these.
    pub not_destination_ports: Vec<u16>,
    /// Accounts of the proven identity.
    pub service_accounts: Vec<ServiceAccount>,
    /// None of these.
    pub not_service_accounts: Vec<ServiceAccount>,
    /// It has an attribute that this proxy cannot evaluate: false in an ALLOW policy, true in the others.
    pub unknown: bool,
}

impl Match {
    /// Whether it has no attribute that this proxy knows.
    pub fn is_empty(&self) -> bool {
        let Self {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            service_accounts,
            not_service_accounts,
            unknown: _,
        } = self;
        namespaces.is_empty()
            && not_namespaces.is_empty()
            && principals.is_empty()
            && not_principals.is_empty()
            && source_ips.is_empty()
            && not_source_ips.is_empty()
            && destination_ips.is_empty()
            && not_destination_ips.is_empty()
            && destination_ports.is_empty()
            && not_destination_ports.is_empty()
            && service_accounts.is_empty()
            && not_service_accounts.is_empty()
    }
}

/// A service account; the trust domain is not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// How a string is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Is not empty.
    Presence,
}

impl StringMatch {
    /// Whether `value` compares as asked for.
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => value == &**exact,
            Self::Prefix(prefix) => value.starts_with(&**prefix),
            Self::Suffix(suffix) => value.ends_with(&**suffix),
            Self::Presence => !value.is_empty(),
        }
    }
}
