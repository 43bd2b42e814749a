//! From a document's tree to model objects, one function per kind.
//!
//! An object without readable kind and name is an error of its document. A policy with both but with an unreadable
//! spec is an object that fails closed, and an error besides. Unknown fields are ignored in core kinds, as the API
//! server would have dropped them, but not in policies, where a misspelt field would silently mean something else.

mod balancer;
mod core;
#[cfg(test)]
mod crds;
mod egress;
mod filter;
mod locality;
mod network;
mod policy;
mod route;
mod session;
mod traffic;
mod trust;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::base::is_dns_name;
use crate::model::{Meta, Object, Owner, RouteKind, Unenforced};
use crate::source::tree::{Cursor, FieldError, Node, Read};

/// Kinds that are read so that a condition can say that they have no effect yet.
const UNENFORCED: &[(&str, &str)] = &[("gateway.networking.k8s.io", "ReferenceGrant")];

/// What one document holds.
#[derive(Debug, Default, PartialEq)]
pub struct Decoded {
    /// Objects that can be used, also policies that fail closed.
    pub objects: Vec<Object>,
    /// What is wrong.
    pub errors: Vec<DecodeError>,
    /// `apiVersion kind` of objects that are not ours.
    pub unknown: Vec<String>,
}

/// An error, and the object that it is about, if its name could be read.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeError {
    /// Kind, namespace, name.
    pub object: Option<(String, String, String)>,
    /// Where and what.
    pub error: FieldError,
}

/// Reads a document: an object, a `List` of objects, or nothing.
pub fn document(node: &Node) -> Decoded {
    let mut decoded = Decoded::default();
    let root = Cursor::root(node);
    if root.is_absent() {
        return decoded;
    }
    match list_items(&root) {
        Ok(Some(items)) => {
            for item in items {
                object(&item, &mut decoded);
            }
        }
        Ok(None) => object(&root, &mut decoded),
        Err(error) => decoded.errors.push(DecodeError { object: None, error }),
    }
    decoded
}

fn list_items<'a>(root: &Cursor<'a>) -> Read<Option<Vec<Cursor<'a>>>> {
    root.map()?;
    match root.get("kind").text()? {
        Some("List") => Ok(Some(root.get("items").list()?)),
        _ => Ok(None),
    }
}

fn object(at: &Cursor<'_>, decoded: &mut Decoded) {
    let mut fail = |object, error| decoded.errors.push(DecodeError { object, error });
    let (group, kind) = match type_of(at) {
        Ok(found) => found,
        Err(error) => return fail(None, error),
    };
    let Some(decode) = decoder(group, kind) else {
        decoded.unknown.push(if group.is_empty() { kind.to_owned() } else { format!("{kind} of {group}") });
        return;
    };
    let left_out = match kind {
        "ClusterTrustBundle" => !trust::is_labelled(at),
        // What control wrote for the network plugins of others is no wish of a user.
        "NetworkPolicy" => network::is_ours(at),
        _ => false,
    };
    if left_out {
        return;
    }
    let namespaced = !matches!(kind, "Namespace" | "Node" | "ClusterTrustBundle");
    let (namespace, name) = match name_of(at, namespaced) {
        Ok(found) => found,
        Err(error) => return fail(None, error),
    };
    let id = Some((kind.to_owned(), namespace.clone(), name.clone()));
    let (meta, meta_error) = match meta(at, namespace.clone(), name.clone()) {
        Ok(meta) => (meta, None),
        Err(error) => {
            // Enough to fail closed with; kinds that cannot are refused below.
            let bare = Meta { namespace, name, ..Meta::default() };
            (bare, Some(error))
        }
    };
    match decode(at, meta, meta_error.clone()) {
        Ok((object, error)) => {
            decoded.objects.push(object);
            if let Some(error) = meta_error.or(error) {
                decoded.errors.push(DecodeError { object: id, error });
            }
        }
        Err(error) => decoded.errors.push(DecodeError { object: id, error: meta_error.unwrap_or(error) }),
    }
}

/// Gives the object, and for a policy that fails closed also the error that made it do so. The last argument is an
/// error of the metadata: a policy fails closed with it, another kind is refused.
type Decode = fn(&Cursor<'_>, Meta, Option<FieldError>) -> Read<(Object, Option<FieldError>)>;

fn decoder(group: &str, kind: &str) -> Option<Decode> {
    Some(match (group, kind) {
        ("", "Namespace") => |at, meta, error| plain(core::namespace(at, meta), error),
        ("", "Node") => |at, meta, error| plain(core::node(at, meta), error),
        ("", "ServiceAccount") => |at, meta, error| plain(core::service_account(at, meta), error),
        ("", "Pod") => |at, meta, error| plain(core::pod(at, meta), error),
        ("", "Service") => |at, meta, error| plain(core::service(at, meta), error),
        ("", "Endpoints") => |at, meta, error| plain(core::endpoints(at, meta), error),
        ("discovery.k8s.io", "EndpointSlice") => |at, meta, error| plain(core::endpoint_slice(at, meta), error),
        ("security.istio.io", "AuthorizationPolicy") => policy::authorization,
        ("security.istio.io", "PeerAuthentication") => policy::peer_authentication,
        ("networking.k8s.io", "NetworkPolicy") => network::network,
        ("certificates.k8s.io", "ClusterTrustBundle") => trust::bundle,
        ("gateway.networking.k8s.io", "HTTPRoute") => |at, m, e| plain(route::route(RouteKind::Http, at, m), e),
        ("gateway.networking.k8s.io", "GRPCRoute") => |at, m, e| plain(route::route(RouteKind::Grpc, at, m), e),
        ("gateway.networking.k8s.io", "ReferenceGrant") => |_, m, e| unenforced("ReferenceGrant", m, e),
        ("tulle.dev", "HTTPFault") => |at, m, e| plain(filter::fault(at, m), e),
        ("tulle.dev", "HTTPRateLimit") => |at, m, e| plain(filter::rate_limit(at, m), e),
        ("networking.istio.io", "DestinationRule") => |at, m, e| plain(traffic::destination_rule(at, m), e),
        ("networking.istio.io", "ServiceEntry") => egress::entry,
        ("security.istio.io", "RequestAuthentication") => traffic::request_authentication,
        ("tulle.dev", "EgressPolicy") => egress::policy,
        _ => {
            debug_assert!(!UNENFORCED.contains(&(group, kind)));
            return None;
        }
    })
}

fn plain(object: Read<Object>, error: Option<FieldError>) -> Read<(Object, Option<FieldError>)> {
    match error {
        Some(error) => Err(error),
        None => Ok((object?, None)),
    }
}

fn unenforced(kind: &'static str, meta: Meta, error: Option<FieldError>) -> Read<(Object, Option<FieldError>)> {
    plain(Ok(Object::Unenforced(Arc::new(Unenforced { kind, meta }))), error)
}

fn type_of<'a>(at: &Cursor<'a>) -> Read<(&'a str, &'a str)> {
    at.map()?;
    let kind = at.get("kind").required_text()?;
    let version = at.get("apiVersion").required_text()?;
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    Ok((group, kind))
}

fn name_of(at: &Cursor<'_>, namespaced: bool) -> Read<(String, String)> {
    let meta = at.get("metadata");
    meta.map()?;
    let name = meta.get("name");
    let text = name.required_text()?;
    if !is_dns_name(text) {
        return Err(name.error(format!(
            "`{text}` is not a Kubernetes name (lower-case letters, digits, '-' and '.', at most 253)"
        )));
    }
    if !namespaced {
        return Ok((String::new(), text.to_owned()));
    }
    let namespace = meta.get("namespace");
    // As kubectl would: without a namespace an object lands in `default`.
    let space = namespace.text()?.filter(|n| !n.is_empty()).unwrap_or("default");
    if !is_dns_name(space) || space.len() > 63 || space.contains('.') {
        return Err(namespace.error(format!("`{space}` is not a namespace name")));
    }
    Ok((space.to_owned(), text.to_owned()))
}

fn meta(at: &Cursor<'_>, namespace: String, name: String) -> Read<Meta> {
    let meta = at.get("metadata");
    let created = meta.get("creationTimestamp");
    let created = match created.text()? {
        None => 0,
        Some(text) => text
            .parse::<jiff::Timestamp>()
            .map_err(|_| created.error(format!("`{text}` is not an RFC 3339 time")))?
            .as_second(),
    };
    let mut owner = None;
    for reference in meta.get("ownerReferences").list()? {
        let this = Owner { kind: reference.get("kind").text_or_empty()?, name: reference.get("name").text_or_empty()? };
        if reference.get("controller").boolean()? == Some(true) || owner.is_none() {
            owner = Some(this);
        }
    }
    Ok(Meta {
        namespace,
        name,
        uid: meta.get("uid").text_or_empty()?,
        labels: text_map(&meta.get("labels"))?,
        annotations: annotations(&meta.get("annotations"))?,
        generation: meta.get("generation").int()?.unwrap_or(0),
        created,
        deleting: !meta.get("deletionTimestamp").is_absent(),
        owner,
    })
}

/// Those that the mesh may look at. The others belong to somebody else, are often larger than the object, and some change
/// at every event.
fn annotations(at: &Cursor<'_>) -> Read<BTreeMap<String, String>> {
    let mut all = text_map(at)?;
    all.retain(|key, _| {
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        ["tulle.dev", "istio.io"].iter().any(|ours| domain == *ours || domain.ends_with(&format!(".{ours}")))
    });
    Ok(all)
}

pub(crate) fn text_map(at: &Cursor<'_>) -> Read<BTreeMap<String, String>> {
    at.map()?.into_iter().map(|(key, value)| Ok((key.to_owned(), value.text_or_empty()?))).collect()
}
