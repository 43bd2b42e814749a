//! Completing manifests to what an API server would hold: addresses, nodes, uids, status, conditions. Services and their
//! EndpointSlices are the business of [`services`].
//!
//! Pure: wanted objects, planned pods and what is known of them in; files out. What the lab does not interpret passes
//! through untouched, so that control is the only judge of policies. Limits: hosts outside the cluster and everything
//! in their namespaces are left out.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use serde_json::Value;
use serde_json::json;
use tulle_proto::names;

use crate::address;
use crate::manifest::Key;
use crate::manifest::Objects;
use crate::manifest::strings;
use crate::manifest::text;
use crate::plan;
use crate::plan::Allocator;
use crate::plan::Pod;
use crate::plan::PodKey;
use crate::services;
use crate::services::Service;

/// What is known of a pod besides its plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its processes run or have been started.
    pub started: bool,
    /// Its declared ports listen.
    pub ready: bool,
    /// All its processes have ended; the worst exit code.
    pub finished: Option<i32>,
    /// It is being removed.
    pub leaving: bool,
    /// Value of the redirection annotation.
    pub redirection: Option<&'static str>,
}

/// Everything that follows from the plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completed {
    /// Objects for control.
    pub objects: Objects,
    /// Services for the nodes.
    pub services: Vec<Service>,
}

/// Completes all objects. Errors are exhausted addresses.
pub fn complete(
    wanted: &Objects,
    pods: &[Pod],
    facts: &BTreeMap<PodKey, Facts>,
    allocator: &mut Allocator,
    nodes: u16,
) -> anyhow::Result<Completed> {
    let outside: BTreeSet<&str> = wanted
        .iter()
        .filter(|(key, object)| {
            key.kind == "Namespace"
                && strings(object, "/metadata/annotations").get(plan::OUTSIDE).is_some_and(|value| value == "true")
        })
        .map(|(key, _)| key.name.as_str())
        .collect();
    let mut all = Completed::default();
    for node in 1..=nodes {
        insert(&mut all.objects, node_object(node));
    }
    let zones = zones(wanted);
    let none = Facts::default();
    for pod in pods.iter().filter(|pod| !pod.is_outside()) {
        insert(&mut all.objects, pod_object(pod, facts.get(&pod.key()).unwrap_or(&none)));
    }
    for (key, object) in wanted {
        let is_outside = outside.contains(key.namespace.as_str())
            || (key.kind == "Namespace" && outside.contains(key.name.as_str()));
        match key.kind.as_str() {
            _ if is_outside => {}
            "Pod" | "Deployment" => {}
            // Nodes are the lab's; what a manifest says of one is its labels (zones).
            "Node" => {
                let labels = object.pointer("/metadata/labels").and_then(Value::as_object).cloned().unwrap_or_default();
                if let Some(node) = all.objects.get_mut(&Key::new("Node", "", &key.name)) {
                    labels.into_iter().for_each(|(name, value)| node["metadata"]["labels"][name] = value);
                }
            }
            "Service" => {
                let (object, slices, service) = services::service(key, object, pods, facts, &zones, allocator)?;
                insert(&mut all.objects, object);
                slices.into_iter().for_each(|slice| insert(&mut all.objects, slice));
                all.services.push(service);
            }
            _ => {
                all.objects.insert(key.clone(), object.clone());
            }
        }
    }
    for name in needed_namespaces(&all.objects) {
        let key = Key::new("Namespace", "", &name);
        all.objects
            .entry(key)
            .or_insert_with(|| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
    }
    Ok(all)
}

fn insert(objects: &mut Objects, object: Value) {
    let key = Key::new(text(&object, "/kind"), text(&object, "/metadata/namespace"), text(&object, "/metadata/name"));
    objects.insert(key, object);
}

fn needed_namespaces(objects: &Objects) -> BTreeSet<String> {
    let named = objects.keys().filter(|key| !key.namespace.is_empty()).map(|key| key.namespace.clone());
    named.chain([names::DEFAULT_ROOT_NAMESPACE.to_owned()]).collect()
}

/// Zones of nodes, from the labels that manifests give them.
fn zones(wanted: &Objects) -> BTreeMap<u16, String> {
    let nodes = wanted.iter().filter(|(key, _)| key.kind == "Node");
    nodes
        .filter_map(|(key, object)| {
            let zone = strings(object, "/metadata/labels").remove("topology.kubernetes.io/zone")?;
            Some((key.name.strip_prefix("node-")?.parse().ok()?, zone))
        })
        .collect()
}

fn node_object(node: u16) -> Value {
    let addresses: Vec<Value> = address::node(node)
        .texts()
        .into_iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    let (v4, v6) = address::pod_ranges(node);
    let name = format!("node-{node}");
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn pod_object(pod: &Pod, facts: &Facts) -> Value {
    let mut object = pod.manifest.clone();
    let addresses = pod.spot.addresses();
    let node = pod.spot.node().unwrap_or_default();
    object["apiVersion"] = "v1".into();
    object["kind"] = "Pod".into();
    object["metadata"]["namespace"] = pod.namespace.clone().into();
    object["metadata"]["uid"] = pod.uid.clone().into();
    if let Some(redirection) = facts.redirection {
        object["metadata"]["annotations"][names::ANNOTATION_REDIRECTION] = redirection.into();
    }
    if facts.leaving {
        object["metadata"]["deletionTimestamp"] = "2000-01-01T00:00:00Z".into();
    }
    object["spec"]["nodeName"] = format!("node-{node}").into();
    object["spec"]["serviceAccountName"] = pod.account.clone().into();
    let phase = match facts.finished {
        Some(0) => "Succeeded",
        Some(_) => "Failed",
        None if facts.started => "Running",
        None => "Pending",
    };
    // Leaving changes nothing about it: the deletion timestamp says that already.
    let ready = if facts.ready && facts.finished.is_none() { "True" } else { "False" };
    object["status"] = json!({
        "phase": phase,
        "hostIP": address::node(node).v4.to_string(),
        "podIP": addresses.v4.to_string(),
        "podIPs": addresses.texts().map(|ip| json!({"ip": ip})),
        "conditions": [{"type": "Ready", "status": ready}],
    });
    object
}

/// Name of the file of an object, relative to control's source directory.
pub fn file_name(key: &Key) -> String {
    let directory = if key.namespace.is_empty() { "_cluster" } else { &key.namespace };
    format!("{directory}/{}-{}.yaml", key.kind.to_lowercase(), key.name)
}

#[cfg(test)]
mod tests;
