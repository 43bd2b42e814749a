//! The lab's objects in a real API server, as scheduler, kubelet and controllers would have put them there: pods with
//! their node, their status by patches, Services with their EndpointSlices.
//!
//! Only what changed since the last time is sent. Fields are applied as those of the lab, so that what a test or an agent
//! writes beside them stays. The server gives pods their uid; the lab takes it over. Limits: one request after another; a
//! server that is away is an error of that moment, and everything outstanding is tried again.

use std::collections::BTreeMap;

use anyhow::Context as _;
use http::Method;
use serde_json::{Value, json};
use tulle_proto::names;

use crate::address;
use crate::kube::cluster::code;
use crate::kube::{Cluster, LAB_PORT};
use crate::manifest::{Key, Objects, text};
use crate::netns::NetNs;
use crate::plan::PodKey;
use crate::state::Api;
use crate::supervise::relay::Relay;

/// Who owns the fields.
const FIELD_MANAGER: &str = "tulle-lab";

/// What the server was told.
pub struct Mirror {
    cluster: Cluster,
    /// What leads clients of the Service `default/kubernetes` to the server's door, until it was sent.
    door: Option<Value>,
    /// The server's door into the lab, open as long as this lives.
    _relay: Relay,
    /// Whether an agent on each node says which pods are captured.
    agents: bool,
    told: BTreeMap<Key, Told>,
    /// By resource: the newest version that the server gave to what was sent.
    versions: BTreeMap<String, u64>,
    /// Uids that were not returned yet, because something after them failed.
    given: Vec<(PodKey, String)>,
}

/// One object as it was sent.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    object: Value,
    status: Value,
    /// The lab's uid and the server's, of a pod.
    uids: Option<(String, String)>,
    leaving: bool,
}

impl Mirror {
    /// Connects, and opens the server's door in control's namespace; sends nothing yet.
    pub fn connect(api: &Api, control: &NetNs) -> anyhow::Result<Self> {
        let cluster = Cluster::connect(&api.kubeconfig, "tulle-lab")?;
        let relay = Relay::start(control, address::CONTROL.both(), LAB_PORT, api.server)?;
        Ok(Self {
            cluster,
            door: Some(door()),
            _relay: relay,
            agents: api.agent.is_some(),
            told: BTreeMap::new(),
            versions: BTreeMap::new(),
            given: Vec::new(),
        })
    }

    /// What control has not heard of yet, by its account of each kind that it follows. Kinds that it does not follow do not
    /// count.
    pub fn behind(&self, followed: &Value) -> Vec<String> {
        behind(&self.versions, followed)
    }

    /// Makes the server's objects those given; returns the uids of pods that are new to it.
    pub fn publish(&mut self, objects: &Objects) -> anyhow::Result<Vec<(PodKey, String)>> {
        if let Some(door) = self.door.clone() {
            self.send(&door)?;
            self.door = None;
        }
        // Nothing can be made in a namespace that is not there; its labels come after the pods that they speak of.
        let is_new = |key: &&Key| key.kind == "Namespace" && !self.told.contains_key(*key);
        let new: Vec<&Key> = objects.keys().filter(is_new).collect();
        for key in new {
            let bare = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": key.name}});
            self.send(&bare)?;
        }
        let gone: Vec<Key> = self.told.keys().filter(|key| !objects.contains_key(*key)).cloned().collect();
        for key in gone {
            self.remove(&key)?;
        }
        let last = |key: &&Key| key.kind == "Namespace";
        let order = objects.keys().filter(|key| !last(key)).chain(objects.keys().filter(last));
        for key in order {
            if let Some(uid) = self.tell(key, &objects[key]).with_context(|| format!("{key}"))? {
                self.given.push(((key.namespace.clone(), key.name.clone()), uid));
            }
        }
        Ok(std::mem::take(&mut self.given))
    }

    /// Sends what is new about an object; returns the uid of a new pod.
    fn tell(&mut self, key: &Key, wanted: &Value) -> anyhow::Result<Option<String>> {
        let (object, status) = split(wanted, self.agents);
        let uid = text(wanted, "/metadata/uid").to_owned();
        let leaving = wanted.pointer("/metadata/deletionTimestamp").is_some();
        let mut before = self.told.get(key).cloned().unwrap_or_default();
        if let Some((ours, theirs)) = &before.uids
            && uid != *ours
            && uid != *theirs
        {
            // Another pod of the same name.
            self.remove(key)?;
            before = Told::default();
        }
        let mut now = Told { object, status, uids: before.uids.clone(), leaving };
        let mut given = None;
        if now.object != before.object {
            let answer = self.send(&now.object)?;
            if key.kind == "Pod" && before.uids.is_none() {
                let theirs = text(&answer, "/metadata/uid").to_owned();
                now.uids = Some((uid, theirs.clone()));
                given = Some(theirs);
            }
        }
        if !now.status.is_null() && now.status != before.status {
            let uri = format!("{}/status?fieldManager={FIELD_MANAGER}", self.uri(&now.object)?);
            let change = json!({"status": now.status});
            let answer = self.cluster.ask(Method::PATCH, &uri, "application/merge-patch+json", &change)?;
            self.note(&answer)?;
        }
        if leaving && !before.leaving {
            self.cluster.delete(&kind_of(&now.object), &name_of(key))?;
        }
        self.told.insert(key.clone(), now);
        Ok(given)
    }

    fn send(&mut self, object: &Value) -> anyhow::Result<Value> {
        let uri = format!("{}?fieldManager={FIELD_MANAGER}&force=true", self.uri(object)?);
        let answer = self.cluster.ask(Method::PATCH, &uri, "application/apply-patch+yaml", object)?;
        self.note(&answer)?;
        Ok(answer)
    }

    fn note(&mut self, answer: &Value) -> anyhow::Result<()> {
        let resource = self.cluster.resource(&kind_of(answer))?;
        let version: u64 = text(answer, "/metadata/resourceVersion").parse().unwrap_or_default();
        let newest = self.versions.entry(resource).or_default();
        *newest = version.max(*newest);
        Ok(())
    }

    /// Takes an object away, which may be gone already.
    fn remove(&mut self, key: &Key) -> anyhow::Result<()> {
        let Some(told) = self.told.get(key) else { return Ok(()) };
        let kind = kind_of(&told.object);
        let removed = match key.kind.as_str() {
            "Namespace" => self.cluster.delete(&kind, &name_of(key)),
            _ => self.cluster.remove(&kind, &name_of(key)),
        };
        match removed {
            Err(error) if code(&error) != Some(404) => return Err(error.context(format!("{key} cannot be removed"))),
            _ => {}
        }
        self.told.remove(key);
        Ok(())
    }

    fn uri(&self, object: &Value) -> anyhow::Result<String> {
        self.cluster.uri(&kind_of(object), &name_of(&key_of(object)))
    }
}

/// The EndpointSlice of `default/kubernetes`, which a server of a real cluster writes itself.
fn door() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}
        },
        "ports": [{"name": "https", "port": LAB_PORT, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address::CONTROL.v4.to_string()], "conditions": {"ready": true}}],
    })
}

/// Versions of one server grow, and are numbers in every server that there is.
fn behind(versions: &BTreeMap<String, u64>, followed: &Value) -> Vec<String> {
    let kinds = followed.as_array().into_iter().flatten();
    kinds
        .filter_map(|kind| {
            let resource = text(kind, "/resource");
            let wanted = *versions.get(resource)?;
            let heard: u64 = text(kind, "/resourceVersion").parse().unwrap_or_default();
            (heard < wanted).then(|| format!("control knows {resource} as of version {heard}, not of {wanted}"))
        })
        .collect()
}

fn key_of(object: &Value) -> Key {
    let namespace = match text(object, "/metadata/namespace") {
        "" => "default",
        namespace => namespace,
    };
    Key::new(text(object, "/kind"), namespace, text(object, "/metadata/name"))
}

/// `Kind.group`, which is never two kinds.
fn kind_of(object: &Value) -> String {
    let group = text(object, "/apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
    format!("{}.{group}", text(object, "/kind"))
}

fn name_of(key: &Key) -> String {
    if key.namespace.is_empty() { key.name.clone() } else { format!("{}/{}", key.namespace, key.name) }
}

/// What a user would apply, and the status that somebody else would write.
fn split(wanted: &Value, agents: bool) -> (Value, Value) {
    let mut object = wanted.clone();
    let mut status = Value::Null;
    if let Some(fields) = object.as_object_mut() {
        status = fields.remove("status").unwrap_or_default();
    }
    if let Some(meta) = object["metadata"].as_object_mut() {
        for field in ["uid", "deletionTimestamp", "creationTimestamp", "resourceVersion", "generation"] {
            meta.remove(field);
        }
        let annotations = meta.get_mut("annotations").and_then(Value::as_object_mut);
        if let Some(annotations) = annotations
            && agents
        {
            annotations.remove(names::ANNOTATION_REDIRECTION);
        }
    }
    // Conditions of policies are the mesh's to write.
    let written = ["Pod", "Node"].contains(&text(wanted, "/kind"));
    (object, if written { status } else { Value::Null })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use crate::supervise::mirror::{behind, kind_of, split};

    #[test]
    fn what_the_server_decides_is_not_sent() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": {"nodeName": "node-1"}, "status": {"phase": "Running"},
            "metadata": {"name": "a", "namespace": "s", "uid": "1", "deletionTimestamp": "2000-01-01T00:00:00Z",
                "annotations": {"ambient.istio.io/redirection": "enabled", "mine": "1"}}});
        let (object, status) = split(&pod, false);
        assert_eq!(status, json!({"phase": "Running"}));
        assert!(object["metadata"]["uid"].is_null() && object["metadata"]["deletionTimestamp"].is_null());
        assert_eq!(object["metadata"]["annotations"]["ambient.istio.io/redirection"], "enabled");
        let (object, _) = split(&pod, true);
        assert_eq!(object["metadata"]["annotations"], json!({"mine": "1"}), "that is the agent's word");
    }

    #[test]
    fn control_is_behind_until_it_has_heard_of_what_was_sent() {
        let versions = BTreeMap::from([("pods".to_owned(), 12), ("leases.coordination.k8s.io".to_owned(), 99)]);
        let followed = |heard: &str| json!([{"resource": "pods", "resourceVersion": heard}, {"resource": "nodes"}]);
        assert!(behind(&versions, &followed("12")).is_empty() && behind(&versions, &followed("9000")).is_empty());
        assert_eq!(behind(&versions, &followed("9")).len(), 1);
        assert_eq!(behind(&versions, &followed("")).len(), 1, "nothing was heard");
    }

    #[test]
    fn a_kind_is_named_with_its_group() {
        assert_eq!(
            kind_of(&json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway"})),
            "Gateway.networking.istio.io"
        );
        assert_eq!(kind_of(&json!({"apiVersion": "v1", "kind": "Pod"})), "Pod.");
    }
}
