//! Bringing objects into a cluster by server-side apply, in order, and waiting until they work.
//!
//! Fields that somebody else owns are left to them: a conflict ends the command with the owner's name, unless it is told to
//! take them over. What an earlier installation brought and this one does not is taken away at the end.
//! Limits: one deadline for everything; a failed request is tried again within it only where that can help.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Client, Error};
use serde_json::Value;
use tokio::time::Instant;

use crate::install::MANAGER;
use crate::install::kinds;

/// Between two looks at what is not ready yet, and before a request is tried again.
const INTERVAL: Duration = Duration::from_secs(1);

/// How it is to be done.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The API server checks everything and keeps nothing.
    pub dry_run: bool,
    /// Take over fields that somebody else owns.
    pub force: bool,
    /// When it has to be done.
    pub deadline: Instant,
}

/// Applies the objects in their order. `say` gets a line for each of them.
///
/// # Errors
/// The first object that cannot be applied, and why.
pub async fn apply(
    client: &Client,
    objects: &[Value],
    options: Options,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    for object in objects {
        one(client, object, options).await?;
        let change = if options.dry_run { "would be applied" } else { "applied" };
        say(format!("{} {change}", kinds::shown(object)));
        if object["kind"] == "CustomResourceDefinition" && !options.dry_run {
            established(client, object, options.deadline).await?;
        }
    }
    Ok(())
}

async fn one(client: &Client, object: &Value, options: Options) -> anyhow::Result<()> {
    let (kind, namespace, name) = kinds::identity(object);
    let api = kinds::api(client, kind, namespace)?;
    let mut params = PatchParams::apply(MANAGER);
    params.dry_run = options.dry_run;
    params.force = options.force;
    loop {
        match api.patch(name, &params, &Patch::Apply(object)).await {
            Ok(_) => return Ok(()),
            Err(error) if passes(&error) && Instant::now() + INTERVAL < options.deadline => {
                tokio::time::sleep(INTERVAL).await;
            }
            Err(error) => bail!("{}: {}", kinds::shown(object), explain(&error)),
        }
    }
}

/// Whether the same request may succeed later.
pub(super) fn passes(error: &Error) -> bool {
    match error {
        Error::Api(status) => status.code == 429 || status.code >= 500,
        Error::Service(_) | Error::HyperError(_) => true,
        _ => false,
    }
}

/// What the API server, or the way to it, says, and what to do about it.
pub(super) fn explain(error: &Error) -> String {
    let Error::Api(status) = error else {
        return format!("the API server cannot be asked: {error}");
    };
    let advice = match status.code {
        401 => "; the API server does not know who asks: check the kubeconfig",
        403 => "; whoever installs needs the rights of cluster-admin, because roles are made",
        404 => "; the API server is too old for it (1.30 is needed), or the namespace is not there",
        409 if status.message.contains("conflict") => {
            "; somebody else owns these fields: install with what installed it (`helm upgrade`), or take them over with \
             --force-conflicts"
        }
        _ => "",
    };
    format!("{}{advice}", status.message)
}

/// Waits until the API server serves a kind.
async fn established(client: &Client, object: &Value, deadline: Instant) -> anyhow::Result<()> {
    let (kind, _, name) = kinds::identity(object);
    let api = kinds::api(client, kind, None)?;
    loop {
        let now = api.get(name).await.map_err(|error| anyhow::anyhow!("{name}: {}", explain(&error)))?;
        let conditions = now.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        if conditions.iter().any(|one| one["type"] == "Established" && one["status"] == "True") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{name}: the API server does not serve it yet: {conditions:?}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Takes away what an earlier installation brought and `objects` lack.
///
/// # Errors
/// If the API server cannot be asked.
pub async fn prune(
    client: &Client,
    namespace: &str,
    objects: &[Value],
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    let kept: BTreeSet<_> = objects.iter().map(kinds::identity).map(|(kind, _, name)| (kind, name)).collect();
    let ours = ListParams::default()
        .labels(&format!("app.kubernetes.io/part-of=tulle,app.kubernetes.io/managed-by={MANAGER}"));
    for kind in kinds::disposable() {
        let api = kinds::api(client, kind, Some(namespace))?;
        let there = match api.list(&ours).await {
            Ok(there) => there,
            Err(Error::Api(status)) if status.code == 404 => continue,
            Err(error) => bail!("cannot list {kind}: {}", explain(&error)),
        };
        for object in there {
            let name = object.metadata.name.unwrap_or_default();
            if !kept.contains(&(kind, name.as_str())) {
                delete(client, kind, Some(namespace), &name).await?;
                say(format!("{kind} {name} taken away"));
            }
        }
    }
    Ok(())
}

/// Deletes an object with all that it owns; one that is not there is no error. Whether there was one.
pub(super) async fn delete(client: &Client, kind: &str, namespace: Option<&str>, name: &str) -> anyhow::Result<bool> {
    match kinds::api(client, kind, namespace)?.delete(name, &DeleteParams::foreground()).await {
        Ok(_) => Ok(true),
        Err(Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => bail!("cannot delete {kind} {name}: {}", explain(&error)),
    }
}

/// Waits until every Deployment and DaemonSet among the objects is served by new, ready pods.
///
/// # Errors
/// At the deadline: what is missing, with what kubelet says about its pods.
pub async fn ready(
    client: &Client,
    objects: &[Value],
    deadline: Instant,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    let mut told = String::new();
    loop {
        let mut missing = Vec::new();
        for object in objects {
            let (kind, namespace, name) = kinds::identity(object);
            if !matches!(kind, "Deployment" | "DaemonSet") {
                continue;
            }
            match kinds::api(client, kind, namespace)?.get(name).await {
                Ok(now) => {
                    let generation = now.metadata.generation.unwrap_or_default();
                    missing.extend(lacks(generation, &now.data).map(|text| format!("{kind} {name}: {text}")));
                }
                Err(error) if passes(&error) => missing.push(format!("{kind} {name}: {}", explain(&error))),
                Err(error) => bail!("{kind} {name}: {}", explain(&error)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let text = missing.join("; ");
        if Instant::now() > deadline {
            let namespace = objects.iter().find_map(|object| object["metadata"]["namespace"].as_str());
            let pods = waiting(client, namespace.unwrap_or_default()).await.unwrap_or_default();
            bail!(
                "not ready in time: {text}{pods}\n`tulle check` looks for the reason; installing again goes on from here"
            );
        }
        if text != told {
            say(format!("waiting: {text}"));
            told = text;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What a Deployment or DaemonSet lacks; pure.
fn lacks(generation: i64, object: &Value) -> Option<String> {
    let status = &object["status"];
    let count = |key: &str| status[key].as_u64().unwrap_or_default();
    if status["observedGeneration"].as_i64().unwrap_or_default() < generation {
        return Some("the controller manager has not seen it yet".to_owned());
    }
    let wanted = match object["spec"]["replicas"].as_u64() {
        Some(replicas) => replicas,
        None => count("desiredNumberScheduled"),
    };
    let (new, ready) = match object["spec"]["replicas"].is_u64() {
        true => (count("updatedReplicas"), count("availableReplicas")),
        false => (count("updatedNumberScheduled"), count("numberAvailable")),
    };
    // Old pods that are still counted are in `replicas` alone.
    let old = count("replicas").saturating_sub(new);
    if new < wanted || ready < wanted || old > 0 {
        return Some(format!("{} of {wanted} pods are new and ready", new.min(ready)));
    }
    None
}

/// Why pods of the namespace are not ready, as kubelet says it.
async fn waiting(client: &Client, namespace: &str) -> anyhow::Result<String> {
    let ours = ListParams::default().labels("app.kubernetes.io/part-of=tulle").limit(500);
    let pods = kinds::api(client, "Pod", Some(namespace))?.list(&ours).await.context("pods")?;
    let mut text = String::new();
    for pod in pods.items.iter() {
        for reason in reasons(&pod.data).into_iter().take(2) {
            text.push_str(&format!("\n  pod {}: {reason}", pod.metadata.name.as_deref().unwrap_or_default()));
        }
    }
    Ok(text)
}

/// What keeps a pod from being ready; pure.
fn reasons(pod: &Value) -> Vec<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for container in list(&pod["status"]["containerStatuses"]) {
        let name = container["name"].as_str().unwrap_or_default();
        for state in ["waiting", "terminated"] {
            if let Some(reason) = container["state"][state]["reason"].as_str() {
                let message = container["state"][state]["message"].as_str().unwrap_or_default();
                found.push(format!("container {name}: {reason} {message}").trim_end().to_owned());
            }
        }
        if container["state"]["running"].is_object() && container["ready"] == false {
            found.push(format!("container {name} runs and is not ready"));
        }
    }
    for condition in list(&pod["status"]["conditions"]) {
        if condition["type"] == "PodScheduled" && condition["status"] == "False" {
            found.push(format!("not scheduled: {}", condition["message"].as_str().unwrap_or_default()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{lacks, reasons};

    #[test]
    fn a_workload_is_ready_when_all_its_pods_are_new_and_available() {
        let deployment = |replicas: u32, updated: u32, available: u32, seen: i64| {
            json!({"spec": {"replicas": 2}, "status": {
                "observedGeneration": seen, "replicas": replicas,
                "updatedReplicas": updated, "availableReplicas": available}})
        };
        assert_eq!(lacks(3, &deployment(2, 2, 2, 3)), None);
        for (object, word) in [
            (deployment(2, 2, 2, 2), "has not seen"),
            (deployment(3, 2, 2, 3), "2 of 2"),
            (deployment(2, 1, 2, 3), "1 of 2"),
            (deployment(2, 2, 0, 3), "0 of 2"),
            (json!({"spec": {"replicas": 2}}), "has not seen"),
        ] {
            assert!(lacks(3, &object).unwrap().contains(word), "{object}");
        }
        let daemons = |desired: u32, updated: u32, available: u32| {
            json!({"spec": {}, "status": {"observedGeneration": 1, "desiredNumberScheduled": desired,
                "updatedNumberScheduled": updated, "numberAvailable": available}})
        };
        assert_eq!(lacks(1, &daemons(3, 3, 3)), None);
        assert_eq!(lacks(1, &daemons(0, 0, 0)), None, "no node is no obstacle");
        assert!(lacks(1, &daemons(3, 3, 2)).unwrap().contains("2 of 3"));
    }

    #[test]
    fn what_keeps_a_pod_from_being_ready_is_told() {
        let pod = json!({"status": {
            "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}],
            "containerStatuses": [
                {"name": "a", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}},
                {"name": "b", "ready": false, "state": {"running": {}}},
                {"name": "c", "ready": true, "state": {"running": {}}}],
        }});
        assert_eq!(
            reasons(&pod),
            [
                "container a: ImagePullBackOff no such image",
                "container b runs and is not ready",
                "not scheduled: 0/3 nodes are available"
            ]
        );
        assert!(reasons(&json!({})).is_empty());
    }
}
