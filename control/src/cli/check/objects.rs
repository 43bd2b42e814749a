//! The objects that checks look at, as plain JSON, and readers of what checks ask of them.
//!
//! Plain JSON because checks look at kinds and fields that the mesh itself does not read (webhooks, DaemonSets of other programs,
//! ConfigMaps), leniently: what is not there is not there. What could not be listed is kept with its reason, so that a check can
//! tell "none" from "unknown". Limits: `managedFields` are dropped; of one kind at most [`MOST`] objects are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use crate::cli::Failure;
use crate::source::files::{MAX_FILE_BYTES, documents};

/// Objects of one kind that are read. A cluster of 5,000 nodes has at most 150,000 pods.
pub(super) const MOST: usize = 200_000;

/// Objects by kind.
#[derive(Debug, Default)]
pub(super) struct Objects {
    kinds: BTreeMap<String, Vec<Value>>,
    /// Kinds of which nothing is known, and why.
    unknown: BTreeMap<String, String>,
}

impl Objects {
    /// Those of a kind.
    pub(super) fn of(&self, kind: &str) -> &[Value] {
        self.kinds.get(kind).map_or(&[], Vec::as_slice)
    }

    /// Those of a kind in a namespace.
    pub(super) fn within<'a>(&'a self, kind: &str, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
        self.of(kind).iter().filter(move |object| meta(object, "namespace") == namespace)
    }

    /// One object; cluster-scoped ones have no namespace.
    pub(super) fn one(&self, kind: &str, namespace: &str, wanted: &str) -> Option<&Value> {
        self.of(kind).iter().find(|object| name(object) == wanted && meta(object, "namespace") == namespace)
    }

    /// Kinds of which nothing is known, and why.
    pub(super) fn unknown(&self) -> &BTreeMap<String, String> {
        &self.unknown
    }

    /// A kind that could not be listed.
    pub(super) fn cannot(&mut self, kind: &str, why: String) {
        self.unknown.insert(kind.to_owned(), why);
    }

    /// Adds an object, or those of a list. Namespaced kinds from files may leave their namespace out.
    pub(super) fn add(&mut self, kind: &str, mut object: Value) {
        let kind = object["kind"].as_str().unwrap_or(kind).to_owned();
        let items = object.get_mut("items").and_then(Value::as_array_mut).filter(|_| kind.ends_with("List"));
        if let Some(items) = items {
            let of = kind.trim_end_matches("List");
            for item in std::mem::take(items) {
                self.add(of, item);
            }
            return;
        }
        if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            meta.remove("managedFields");
        }
        let list = self.kinds.entry(kind).or_default();
        if list.len() < MOST {
            list.push(object);
        }
    }

    /// All of a folder of manifests, in the way of `--files`.
    pub(super) fn of_folder(dir: &Path) -> Result<Self, Failure> {
        let mut objects = Self::default();
        let mut folders = vec![dir.to_owned()];
        let cannot = |path: &Path, error: String| Failure::wrong(format!("cannot read {}: {error}", path.display()));
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder).map_err(|error| cannot(&folder, error.to_string()))?;
            for entry in entries.flatten() {
                let path = entry.path();
                let hidden = entry.file_name().to_string_lossy().starts_with('.');
                let ours = path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json");
                if hidden {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else if ours {
                    let size = entry.metadata().map_err(|error| cannot(&path, error.to_string()))?.len();
                    if size > MAX_FILE_BYTES {
                        return Err(cannot(&path, format!("it is larger than {MAX_FILE_BYTES} bytes")));
                    }
                    let text = std::fs::read_to_string(&path).map_err(|error| cannot(&path, error.to_string()))?;
                    objects.add_text(&text).map_err(|error| cannot(&path, error))?;
                }
            }
        }
        Ok(objects)
    }

    /// Adds the objects of a file's text.
    fn add_text(&mut self, text: &str) -> Result<(), String> {
        for (line, document) in documents(text) {
            // As the folder source reads: a pod may be called `y`.
            let options = serde_saphyr::options! { strict_booleans: true };
            let object: Value = serde_saphyr::from_str_with_options(document, options)
                .map_err(|error| format!("line {line}: {}", error.to_string().lines().next().unwrap_or_default()))?;
            if object.is_object() {
                self.add("", object);
            }
        }
        Ok(())
    }

    /// From manifests.
    #[cfg(test)]
    pub(super) fn of_text(text: &str) -> Self {
        let mut objects = Self::default();
        objects.add_text(text).unwrap();
        objects
    }
}

/// A field of the metadata; empty if it is not there.
pub(super) fn meta<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// metadata.name.
pub(super) fn name(object: &Value) -> &str {
    meta(object, "name")
}

/// `namespace/name`, or the name.
pub(super) fn path(object: &Value) -> String {
    match meta(object, "namespace") {
        "" => name(object).to_owned(),
        namespace => format!("{namespace}/{}", name(object)),
    }
}

/// A label's value.
pub(super) fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["labels"][key].as_str()
}

/// An annotation's value.
pub(super) fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["annotations"][key].as_str()
}

/// The elements of a list; none if it is not there.
pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> + Clone {
    value.as_array().into_iter().flatten()
}

/// Whether all pairs of a selector are labels of an object. An absent or empty one selects nothing here.
pub(super) fn selects(selector: &Value, object: &Value) -> bool {
    let pairs = selector.as_object().filter(|pairs| !pairs.is_empty());
    pairs.is_some_and(|pairs| pairs.iter().all(|(key, value)| label(object, key) == value.as_str()))
}

/// Whether a pod has ended.
pub(super) fn is_finished(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

/// Status of a condition.
pub(super) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    list(&object["status"]["conditions"]).find(|condition| condition["type"] == kind)
}

/// Kind and name of who made a pod, as metrics have it: the Deployment of a ReplicaSet; the pod itself if nobody did.
pub(super) fn workload(pod: &Value) -> (String, String) {
    let mut owners = list(&pod["metadata"]["ownerReferences"]);
    let owner = owners.clone().find(|owner| owner["controller"] == true).or_else(|| owners.next());
    let Some(owner) = owner else { return ("Pod".to_owned(), name(pod).to_owned()) };
    let (kind, of) = (owner["kind"].as_str().unwrap_or_default(), owner["name"].as_str().unwrap_or_default());
    let hash = label(pod, "pod-template-hash").filter(|_| kind == "ReplicaSet").unwrap_or_default();
    match of.strip_suffix(hash).and_then(|rest| rest.strip_suffix('-')).filter(|_| !hash.is_empty()) {
        Some(deployment) => ("Deployment".to_owned(), deployment.to_owned()),
        None => (kind.to_owned(), of.to_owned()),
    }
}

/// Labels that all pods of a workload have and others hardly do: its controller's selector, else the labels of the pod without
/// those that differ from pod to pod.
pub(super) fn selector_of(objects: &Objects, pod: &Value) -> Map<String, Value> {
    let (kind, of) = workload(pod);
    let controller = objects.one(&kind, meta(pod, "namespace"), &of);
    if let Some(labels) = controller.and_then(|found| found["spec"]["selector"]["matchLabels"].as_object())
        && !labels.is_empty()
    {
        return labels.clone();
    }
    let own = [
        "pod-template-hash",
        "controller-revision-hash",
        "pod-template-generation",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/controller-uid",
        "controller-uid",
    ];
    let labels = pod["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    labels.into_iter().filter(|(key, _)| !own.contains(&key.as_str())).collect()
}

/// Number of a port that may be a name of one that the pod's containers declare.
pub(super) fn port_number(pod: &Value, port: &Value) -> Option<u16> {
    if let Some(number) = port.as_u64() {
        return u16::try_from(number).ok();
    }
    let wanted = port.as_str()?;
    let declared = containers(pod).flat_map(|container| list(&container["ports"]));
    let found = declared.filter(|declared| declared["name"] == wanted).find_map(|port| port["containerPort"].as_u64());
    found.and_then(|number| u16::try_from(number).ok()).or_else(|| wanted.parse().ok())
}

/// Containers that run beside each other, init containers that stay included.
pub(super) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let stays = |container: &&Value| container["restartPolicy"] == "Always";
    list(&pod["spec"]["containers"]).chain(list(&pod["spec"]["initContainers"]).filter(stays))
}

/// Ports of the pods behind a Service's port, for each pod that its selector selects.
pub(super) fn behind<'a>(objects: &'a Objects, service: &'a Value, port: &Value) -> Vec<(&'a Value, u16)> {
    let wanted = list(&service["spec"]["ports"])
        .filter(|own| port.is_null() || own["port"] == *port || (port.is_string() && own["name"] == *port));
    let targets: Vec<&Value> =
        wanted.map(|own| if own["targetPort"].is_null() { &own["port"] } else { &own["targetPort"] }).collect();
    let pods = objects.within("Pod", meta(service, "namespace"));
    let selected = pods.filter(|pod| !is_finished(pod) && selects(&service["spec"]["selector"], pod));
    let each = |pod: &'a Value| {
        let ports: BTreeSet<u16> = targets.iter().filter_map(|target| port_number(pod, target)).collect();
        ports.into_iter().map(move |port| (pod, port)).collect::<Vec<_>>()
    };
    selected.flat_map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::{Objects, behind, selector_of, workload};

    #[test]
    fn a_services_port_leads_to_ports_of_pods_by_number_and_name() {
        let objects = Objects::of_text(
            "
apiVersion: v1
kind: List
items:
- {kind: Service, metadata: {name: s, namespace: a}, spec: {selector: {app: x}, ports: [{name: web, port: 80, targetPort: http}, {port: 81}]}}
- kind: Pod
  metadata: {name: x-abc-1, namespace: a, labels: {app: x, pod-template-hash: abc}, managedFields: [{}], ownerReferences: [{controller: true, kind: ReplicaSet, name: x-abc}]}
  spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
- {kind: Pod, metadata: {name: y, namespace: a, labels: {app: y}}}
---
kind: Deployment
metadata: {name: x, namespace: a}
spec: {selector: {matchLabels: {app: x}}}
",
        );
        let service = &objects.of("Service")[0];
        for (port, expected) in
            [("80", vec![8080]), ("\"web\"", vec![8080]), ("81", vec![81]), ("null", vec![81, 8080]), ("9", vec![])]
        {
            let port = serde_json::from_str(port).unwrap();
            let found: Vec<u16> = behind(&objects, service, &port).into_iter().map(|(_, port)| port).collect();
            assert_eq!(found, expected, "{port}");
        }
        let pod = objects.one("Pod", "a", "x-abc-1").unwrap();
        assert_eq!(workload(pod), ("Deployment".to_owned(), "x".to_owned()));
        assert_eq!(serde_json::to_string(&selector_of(&objects, pod)).unwrap(), r#"{"app":"x"}"#);
        assert!(pod["metadata"]["managedFields"].is_null());
        let alone = objects.one("Pod", "a", "y").unwrap();
        assert_eq!(workload(alone).1, "y");
    }
}
