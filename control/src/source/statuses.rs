//! What the status of objects says now, as the API server has it: kept beside the world, so that writing a status is no
//! change of the mesh.
//!
//! Only the kinds whose status control writes are kept, and of them only what a write needs. The source notes each object
//! as it comes and forgets it as it goes; the writer takes the keys that changed, and notes what its own writes made.
//! Limits: none of its own; an object has at most the 1.5 MiB that the API server takes, its status usually one KiB.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use serde_json::Value;
use tokio::sync::Notify;

use crate::model::ObjectKey;

/// Group, kind, and name in URLs of the kinds whose status control writes.
pub const KINDS: &[(&str, &str, &str)] = &[
    ("gateway.networking.k8s.io", "HTTPRoute", "httproutes"),
    ("gateway.networking.k8s.io", "GRPCRoute", "grpcroutes"),
    ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies"),
    ("security.istio.io", "PeerAuthentication", "peerauthentications"),
    ("security.istio.io", "RequestAuthentication", "requestauthentications"),
    ("networking.istio.io", "DestinationRule", "destinationrules"),
    ("networking.istio.io", "ServiceEntry", "serviceentries"),
    ("tulle.dev", "EgressPolicy", "egresspolicies"),
    ("tulle.dev", "HTTPFault", "httpfaults"),
    ("tulle.dev", "HTTPRateLimit", "httpratelimits"),
];

/// Whether the status of a kind is written.
pub fn is_kept(kind: &str) -> bool {
    KINDS.iter().any(|(_, of, _)| *of == kind)
}

/// One object's status, and what a write of it names.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// apiVersion under which it was read.
    pub api_version: String,
    /// metadata.uid.
    pub uid: String,
    /// metadata.resourceVersion.
    pub version: String,
    /// metadata.generation.
    pub generation: i64,
    /// status; null if there is none.
    pub status: Value,
}

/// The status of all objects.
#[derive(Debug, Default)]
pub struct Statuses {
    // Held for single map operations only.
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    seen: BTreeMap<ObjectKey, Arc<Seen>>,
    changed: BTreeSet<ObjectKey>,
}

impl Statuses {
    /// Takes what is known of an object now. What is older than that changes nothing.
    pub fn note(&self, key: ObjectKey, seen: Seen) {
        let mut inner = self.lock();
        if let Some(known) = inner.seen.get(&key)
            && (**known == seen || is_older(&seen, known))
        {
            return;
        }
        inner.seen.insert(key.clone(), Arc::new(seen));
        inner.changed.insert(key);
        drop(inner);
        self.changed.notify_one();
    }

    /// The object is gone.
    pub fn forget(&self, kind: &str, namespace: &str, name: &str) {
        if !is_kept(kind) {
            return;
        }
        let key = ObjectKey { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        let mut inner = self.lock();
        inner.changed.remove(&key);
        inner.seen.remove(&key);
    }

    /// Those that are there, after a list of the kind: all others of it are gone.
    pub fn retain(&self, kind: &str, is_there: impl Fn(&ObjectKey) -> bool) {
        let stays = |key: &ObjectKey| key.kind != kind || is_there(key);
        let mut inner = self.lock();
        inner.seen.retain(|key, _| stays(key));
        inner.changed.retain(stays);
    }

    /// What is known of an object.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<Seen>> {
        self.lock().seen.get(key).cloned()
    }

    /// All objects that are known.
    pub fn keys(&self) -> Vec<ObjectKey> {
        self.lock().seen.keys().cloned().collect()
    }

    /// Those that changed since they were taken last.
    pub fn take_changed(&self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut self.lock().changed)
    }

    /// Waits until something changes; at once if something did that nobody has waited for.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads an object as the API server gives it, `apiVersion` and `kind` included. `None`: its kind is not among [`KINDS`].
pub fn read(object: &Value) -> Option<(ObjectKey, Seen)> {
    let (api_version, kind) = (object["apiVersion"].as_str()?, object["kind"].as_str()?);
    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    KINDS.iter().find(|(of, name, _)| *of == group && *name == kind)?;
    let meta = &object["metadata"];
    let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
    let key = ObjectKey { kind: kind.to_owned(), namespace: text("namespace"), name: text("name") };
    let seen = Seen {
        api_version: api_version.to_owned(),
        uid: text("uid"),
        version: text("resourceVersion"),
        generation: meta["generation"].as_i64().unwrap_or_default(),
        status: object["status"].clone(),
    };
    Some((key, seen))
}

/// A watch may bring what a write has overtaken. Versions of one object grow.
fn is_older(new: &Seen, known: &Seen) -> bool {
    let number = |seen: &Seen| seen.version.parse::<u64>().ok();
    new.uid == known.uid && number(new).zip(number(known)).is_some_and(|(new, known)| new < known)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_of_each_object_is_kept_until_it_goes() {
        let route = |uid: &str, version: &str| {
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
                "metadata": {"namespace": "shop", "name": "web", "uid": uid, "resourceVersion": version, "generation": 3},
                "status": {"parents": [version]},
            })
        };
        let key = ObjectKey { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "web".into() };
        let statuses = Statuses::default();
        let changed = || !statuses.take_changed().is_empty();
        let version = || statuses.get(&key).map(|seen| seen.version.clone());
        // object, whether it changes something, version that is known then
        let steps = [
            (route("u", "9"), true, "9"),
            (route("u", "9"), false, "9"),
            (route("u", "10"), true, "10"),
            (route("u", "9"), false, "10"),
            (route("v", "8"), true, "8"),
            (json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}), false, "8"),
            (json!({"apiVersion": "other/v1", "kind": "HTTPRoute"}), false, "8"),
            (json!(null), false, "8"),
        ];
        for (object, changes, known) in steps {
            if let Some((key, seen)) = read(&object) {
                statuses.note(key, seen);
            }
            assert_eq!((changed(), version().as_deref()), (changes, Some(known)), "{object}");
        }
        assert_eq!(statuses.get(&key).map(|seen| seen.generation), Some(3));
        statuses.retain("GRPCRoute", |_| false);
        assert_eq!(statuses.keys(), std::slice::from_ref(&key));
        statuses.retain("HTTPRoute", |_| false);
        assert!(statuses.keys().is_empty());
        let (key, seen) = read(&route("w", "1")).unwrap();
        statuses.note(key, seen);
        statuses.forget("HTTPRoute", "shop", "web");
        assert!(statuses.keys().is_empty() && !changed(), "nothing is left to write");
    }
}
