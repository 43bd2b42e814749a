//! The controllers that an installation waits for, played through the API: Deployments and DaemonSets of the mesh's namespace get
//! the status that real controllers would write when all pods are ready, and what is deleted goes.
//!
//! Of their pods there are those of DaemonSets, as objects without a process: where a proxy is, and that a node was cleaned, is
//! told by them. Limits: no node is labelled to have a canary; pods are always well; a test of what is not well writes the status by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::eventually::INTERVAL;
use crate::kube::Cluster;
use crate::kube::cluster::code;
use crate::manifest::text;

/// The mesh's namespace.
const SPACE: &str = "tulle-system";
/// The DaemonSet of proxies that has no nodes before one is labelled.
const CANARIES: &str = "ztunnel-canary";
/// The DaemonSet whose pods clean nodes.
const CLEANERS: &str = "tulle-uninstall";

/// They work until this is dropped.
pub struct Controllers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Controllers {
    /// Starts them, for a cluster of these nodes. What the server refuses is tried again, and said when it is another thing
    /// than before.
    pub fn start(cluster: &Cluster, nodes: &[&str]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (cluster, stopped) = (cluster.clone(), stop.clone());
        let nodes: Vec<String> = nodes.iter().map(|node| (*node).to_owned()).collect();
        let thread = std::thread::spawn(move || {
            let mut last = String::new();
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = turn(&cluster, &nodes) {
                    let said = format!("{error:#}");
                    if said != last {
                        eprintln!("the controllers: {said}");
                        last = said;
                    }
                }
                std::thread::sleep(INTERVAL * 10);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Controllers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Does what is to be done now.
fn turn(cluster: &Cluster, nodes: &[String]) -> anyhow::Result<()> {
    for kind in ["Deployment", "DaemonSet"] {
        for object in cluster.list(kind, SPACE)? {
            let name = text(&object, "/metadata/name").to_owned();
            if object["metadata"]["deletionTimestamp"].is_string() {
                finish_deletion(cluster, kind, &name)?;
                nodes.iter().try_for_each(|node| cluster.remove("Pod", &format!("{SPACE}/{name}-{node}")))?;
                continue;
            }
            if object["status"]["observedGeneration"] == object["metadata"]["generation"] {
                continue;
            }
            let waits = name == CANARIES || name == CLEANERS && !is_let_go(&object);
            let nodes = if waits { &[] } else { nodes };
            for node in nodes {
                match (kind, name.as_str()) {
                    (_, CLEANERS) => clean(cluster, node)?,
                    ("DaemonSet", _) => run(cluster, &name, node)?,
                    _ => {}
                }
            }
            serve(cluster, kind, &object, nodes.len())?;
        }
    }
    Ok(())
}

/// Whether cleaners may run on nodes.
pub fn is_let_go(cleaners: &Value) -> bool {
    let place = &cleaners["spec"]["template"]["spec"]["nodeSelector"];
    place.is_object() && place["tulle.dev/uninstall"].is_null()
}

/// Says that all pods of a Deployment, or of a DaemonSet on this many nodes, are new and ready.
pub fn serve(cluster: &Cluster, kind: &str, object: &Value, nodes: usize) -> anyhow::Result<()> {
    let generation = &object["metadata"]["generation"];
    let replicas = &object["spec"]["replicas"];
    let status = match kind {
        "Deployment" => json!({"observedGeneration": generation, "replicas": replicas, "updatedReplicas": replicas,
            "readyReplicas": replicas, "availableReplicas": replicas}),
        _ => json!({"observedGeneration": generation, "desiredNumberScheduled": nodes, "currentNumberScheduled": nodes,
            "updatedNumberScheduled": nodes, "numberMisscheduled": 0, "numberAvailable": nodes, "numberReady": nodes}),
    };
    let name = format!("{SPACE}/{}", text(object, "/metadata/name"));
    match cluster.patch_status(kind, &name, &json!({"status": status})) {
        Err(error) if code(&error) != Some(404) => Err(error),
        _ => Ok(()),
    }
}

/// What the garbage collector does when an object is deleted with all that it owns: waits until it is to go, and lets it.
pub fn finish_deletion(cluster: &Cluster, kind: &str, name: &str) -> anyhow::Result<()> {
    let name = format!("{SPACE}/{name}");
    let going = |object: &Value| object.is_null() || !object["metadata"]["deletionTimestamp"].is_null();
    if cluster.wait(kind, &name, "it is to go", going)?.is_null() {
        return Ok(());
    }
    match cluster.patch(kind, &name, &json!({"metadata": {"finalizers": null}})) {
        Err(error) if code(&error) != Some(404) => Err(error),
        _ => Ok(()),
    }
}

/// A pod of a DaemonSet on a node.
fn run(cluster: &Cluster, name: &str, node: &str) -> anyhow::Result<()> {
    let object = pod(name, node, "containers: [{name: a, image: a}]");
    cluster.apply(&object).map(drop)
}

fn pod(name: &str, node: &str, containers: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-{node}, namespace: {SPACE}, labels: \
         {{app.kubernetes.io/name: {name}, app.kubernetes.io/part-of: tulle}}}}\nspec: {{nodeName: {node}, {containers}}}\n"
    )
}

/// The cleaners' pod on a node has done its work.
pub fn clean(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let containers = "initContainers: [{name: clean, image: a}], containers: [{name: done, image: a}]";
    cluster.apply(&pod(CLEANERS, node, containers))?;
    let ended = json!({"name": "clean", "image": "a", "imageID": "", "ready": true, "restartCount": 0,
        "state": {"terminated": {"exitCode": 0}}});
    let status = json!({"status": {"initContainerStatuses": [ended]}});
    cluster.patch_status("Pod", &format!("{SPACE}/{CLEANERS}-{node}"), &status).map(drop)
}
