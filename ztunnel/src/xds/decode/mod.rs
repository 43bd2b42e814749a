//! From the bytes of a resource to exact types, or to a reason why not.
//!
//! Everything that control sends passes here once; nothing behind it parses. Functions are pure and total: any bytes give
//! a value or a sentence, never a panic, and each resource is judged alone. A resource with a value that this program
//! does not know (an enum of a later version) is rejected rather than guessed at, with the exceptions that the .proto
//! files name. [`address`], [`authorization`], [`network_policy`], [`route`], [`traffic_policy`],
//! [`request_auth`], [`egress_policy`] and [`trust_bundle`] are the fuzz targets.

mod egress;
mod field;
mod http_rules;
mod network;
mod policy;
mod route;
mod schemas;
mod service;
mod traffic;
mod trust;
mod workload;

use std::sync::Arc;

use prost::Message;
use tulle_proto::discovery::Resource;
use tulle_proto::names::{
    TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_EGRESS_POLICY, TYPE_NETWORK_POLICY, TYPE_REQUEST_AUTH, TYPE_ROUTE,
    TYPE_TRAFFIC_POLICY, TYPE_TRUST_BUNDLE,
};
use tulle_proto::workload::Address;
use tulle_proto::workload::address::Type;

use crate::state::{
    Change, EgressPolicy, NETWORK_POLICY, NetworkPolicy, Policy, RequestAuth, Route, Scope, TrafficPolicy, TrustBundle,
};

pub use field::Strings;

/// Longest name of a resource, bytes: a Kubernetes name has 253, and a uid joins four parts.
const MAX_NAME: usize = 1024;

/// A resource that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its resource name.
    pub name: Arc<str>,
    /// What is wrong with it, for the people who run control.
    pub reason: String,
}

/// Decodes an `istio.workload.Address`. `version` is recorded with it.
///
/// # Errors
/// What is wrong, as one clause.
pub fn address(bytes: &[u8], version: &str, strings: &mut Strings) -> Result<Change, String> {
    let address = Address::decode(bytes).map_err(|error| format!("it is no istio.workload.Address: {error}"))?;
    match address.r#type {
        Some(Type::Workload(workload)) => {
            Ok(Change::Workload(Arc::new(workload::workload(workload, version, strings)?)))
        }
        Some(Type::Service(service)) => Ok(Change::Service(Arc::new(service::service(service, version, strings)?))),
        None => Err("it is neither a workload nor a service that this proxy knows".to_owned()),
    }
}

/// Decodes an `istio.security.Authorization` with the resource name `id`.
///
/// # Errors
/// What is wrong, as one clause, and what could be read of whom it applies to and whether it is a dry run.
pub fn authorization(bytes: &[u8], id: &str, version: &str) -> Result<Policy, PolicyError> {
    policy::policy(bytes, id, version)
}

/// Decodes a `tulle.mesh.v1alpha1.NetworkPolicy` with the resource name `id`.
///
/// # Errors
/// What is wrong, as one clause.
pub fn network_policy(bytes: &[u8], id: &str, version: &str) -> Result<NetworkPolicy, String> {
    network::policy(bytes, id, version)
}

/// Decodes a `tulle.mesh.v1alpha1.TrustBundle` with the resource name `id`.
///
/// # Errors
/// What is wrong, as one clause.
pub fn trust_bundle(bytes: &[u8], id: &str, version: &str) -> Result<TrustBundle, String> {
    trust::bundle(bytes, id, version)
}

/// Decodes a `tulle.mesh.v1alpha1.Route` with the resource name `id`, for the node of this name.
///
/// # Errors
/// What is wrong, as one clause.
pub fn route(bytes: &[u8], id: &str, version: &str, node: &str, strings: &mut Strings) -> Result<Route, String> {
    route::route(bytes, id, version, node, strings)
}

/// Decodes a `tulle.mesh.v1alpha1.TrafficPolicy` with the resource name `id`.
///
/// # Errors
/// What is wrong, as one clause.
pub fn traffic_policy(bytes: &[u8], id: &str, version: &str, strings: &mut Strings) -> Result<TrafficPolicy, String> {
    traffic::policy(bytes, id, version, strings)
}

/// Decodes a `tulle.mesh.v1alpha1.RequestAuth` with the resource name `id`.
///
/// # Errors
/// What is wrong, as one clause.
pub fn request_auth(bytes: &[u8], id: &str, version: &str) -> Result<RequestAuth, String> {
    traffic::request_auth(bytes, id, version)
}

/// Decodes a `tulle.mesh.v1alpha1.EgressPolicy` with the resource name `id`.
///
/// # Errors
/// Whether it is, or may be, a ceiling, and what is wrong, as one clause.
pub fn egress_policy(bytes: &[u8], id: &str, version: &str) -> Result<EgressPolicy, (bool, String)> {
    egress::policy(bytes, id, version)
}

/// Decodes one resource of an own type that is no NetworkPolicy, for the node of this name.
pub(super) fn own_resource(
    resource: &Resource,
    type_url: &str,
    node: &str,
    strings: &mut Strings,
) -> Result<Change, (Rejected, Option<Change>)> {
    let rejected = |reason| Rejected { name: printable(&resource.name), reason };
    let (id, version) = (&resource.name, &resource.version);
    let bytes = payload(resource, type_url).map_err(|reason| (rejected(reason), None))?;
    match type_url {
        TYPE_ROUTE => route(bytes, id, version, node, strings).map(|route| Change::Route(Arc::new(route))),
        TYPE_TRAFFIC_POLICY => {
            traffic_policy(bytes, id, version, strings).map(|policy| Change::TrafficPolicy(Arc::new(policy)))
        }
        TYPE_TRUST_BUNDLE => trust_bundle(bytes, id, version).map(|bundle| Change::TrustBundle(Arc::new(bundle))),
        TYPE_EGRESS_POLICY => match egress_policy(bytes, id, version) {
            Ok(policy) => Ok(Change::EgressPolicy(Arc::new(policy))),
            Err((ceiling, reason)) => {
                let (id, version) = (id.as_str().into(), version.as_str().into());
                let stand_in = EgressPolicy::allows_nothing(&id, &version, ceiling, &reason);
                return Err((rejected(reason), Some(Change::EgressPolicyRejected(Arc::new(stand_in)))));
            }
        },
        TYPE_REQUEST_AUTH => match request_auth(bytes, id, version) {
            Ok(auth) => Ok(Change::RequestAuth(Arc::new(auth))),
            Err(reason) => {
                let unreadable = Some(reason.as_str().into());
                let (id, version) = (id.as_str().into(), version.as_str().into());
                let stand_in = RequestAuth { id, version, rules: Vec::new(), unreadable };
                return Err((rejected(reason), Some(Change::RequestAuthRejected(Arc::new(stand_in)))));
            }
        },
        _ => Err("the type is not one of this proxy's".to_owned()),
    }
    .map_err(|reason| (rejected(reason), None))
}

/// See [`authorization`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// What is wrong.
    pub reason: String,
    /// Whom it would have applied to; the namespace if that cannot be read.
    pub scope: Scope,
    /// It would have had no effect.
    pub dry_run: bool,
}

/// Decodes one resource of the Address type.
pub(super) fn address_resource(
    resource: &Resource,
    strings: &mut Strings,
) -> Result<Change, (Rejected, Option<Change>)> {
    let reject = |reason| (Rejected { name: printable(&resource.name), reason }, None);
    let bytes = payload(resource, TYPE_ADDRESS).map_err(reject)?;
    let change = address(bytes, &resource.version, strings).map_err(reject)?;
    let named = match &change {
        Change::Workload(workload) => *workload.uid == *resource.name,
        Change::Service(spec) => spec.key() == resource.name,
        _ => false,
    };
    if named { Ok(change) } else { Err(reject("its content has another name than the resource".to_owned())) }
}

/// Decodes one resource of the Authorization type. A rejected one comes with a stand-in that denies.
pub(super) fn authorization_resource(resource: &Resource) -> Result<Change, (Rejected, Option<Change>)> {
    let rejected = |reason| Rejected { name: printable(&resource.name), reason };
    if resource.name.len() > MAX_NAME || !resource.name.contains('/') {
        // Without a namespace there is nothing that a stand-in could apply to.
        let reason = "the name of a policy is <namespace>/<name>, of at most 1024 bytes".to_owned();
        return Err((rejected(reason), None));
    }
    let unread = |reason| PolicyError { reason, scope: Scope::Namespace, dry_run: false };
    let decoded = payload(resource, TYPE_AUTHORIZATION)
        .map_err(unread)
        .and_then(|bytes| authorization(bytes, &resource.name, &resource.version));
    match decoded {
        Ok(policy) => Ok(Change::Policy(Arc::new(policy))),
        Err(PolicyError { reason, scope, dry_run }) => {
            let (id, version) = (resource.name.as_str().into(), resource.version.as_str().into());
            let stand_in = Policy::denies_all(&id, &version, scope, dry_run, &reason);
            Err((rejected(reason), Some(Change::PolicyRejected(Arc::new(stand_in)))))
        }
    }
}

/// Decodes one resource of the NetworkPolicy type. A rejected one comes with a stand-in that isolates.
pub(super) fn network_resource(resource: &Resource) -> Result<Change, (Rejected, Option<Change>)> {
    let rejected = |reason| Rejected { name: printable(&resource.name), reason };
    let named = resource.name.strip_prefix(NETWORK_POLICY).is_some_and(|path| path.contains('/'));
    if resource.name.len() > MAX_NAME || !named {
        let reason =
            "the name of a NetworkPolicy is NetworkPolicy/<namespace>/<name>, of at most 1024 bytes".to_owned();
        return Err((rejected(reason), None));
    }
    let decoded = payload(resource, TYPE_NETWORK_POLICY)
        .and_then(|bytes| network_policy(bytes, &resource.name, &resource.version));
    decoded.map(|policy| Change::NetworkPolicy(Arc::new(policy))).map_err(|reason| {
        let (id, version) = (resource.name.as_str().into(), resource.version.as_str().into());
        let stand_in = NetworkPolicy::isolates(&id, &version, &reason);
        (rejected(reason), Some(Change::NetworkPolicyRejected(Arc::new(stand_in))))
    })
}

fn payload<'a>(resource: &'a Resource, type_url: &str) -> Result<&'a [u8], String> {
    if resource.name.is_empty() || resource.name.len() > MAX_NAME {
        return Err("its name is empty or longer than 1024 bytes".to_owned());
    }
    let any = resource.resource.as_ref().ok_or_else(|| "it has no content".to_owned())?;
    if any.type_url != type_url {
        return Err(format!("its content is a {:?} and not a {type_url}", shorten(&any.type_url)));
    }
    Ok(&any.value)
}

/// A foreign name, fit for a log line.
fn printable(name: &str) -> Arc<str> {
    shorten(name).escape_debug().to_string().into()
}

fn shorten(text: &str) -> &str {
    text.char_indices().nth(200).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod skew;
#[cfg(test)]
mod tests;
