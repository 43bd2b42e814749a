//! Cleaning the nodes: `ztunnel cni uninstall` on each, where the proxy was and after it has gone.
//!
//! The agent would put its CNI configuration back, so it has to be gone first; and the configuration has to be gone before
//! the program that it names. The DaemonSet that does it waits, bound to a label that no node has, until the proxies are
//! gone; its annotation keeps the selector that the proxies had.

use anyhow::bail;
use kube::Client;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::Instant;
use tulle_proto::names;

use crate::install::MANAGER;
use crate::install::apply::{delete, explain};
use crate::install::kinds;

use super::{INTERVAL, Options, get, pages};

const PROXIES: &str = "ztunnel";
const CLEANERS: &str = "tulle-uninstall";
/// Annotation of the cleaners: where the proxies were.
const WHERE: &str = "tulle.dev/node-selector";
/// A label that no node has.
const NOWHERE: &str = "tulle.dev/uninstall";

pub(super) async fn clean(client: &Client, options: &Options, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
    let namespace = options.namespace.as_str();
    let deadline = Instant::now() + options.timeout;
    let proxies = get(client, "DaemonSet", namespace, PROXIES).await?;
    if let Some(proxies) = &proxies {
        let params = PatchParams::apply(MANAGER).force();
        let cleaners = cleaners(proxies, namespace);
        let api = kinds::api(client, "DaemonSet", Some(namespace))?;
        if let Err(error) = api.patch(CLEANERS, &params, &Patch::Apply(&cleaners)).await {
            bail!("DaemonSet {CLEANERS}: {}", explain(&error));
        }
        for set in [PROXIES, names::PROXY_CANARY] {
            delete(client, "DaemonSet", Some(namespace), set).await?;
        }
        say(format!("DaemonSet {PROXIES} deleted; open connections of its proxies drain"));
    }
    let Some(waiting) = get(client, "DaemonSet", namespace, CLEANERS).await? else {
        say("there are no proxies whose nodes could be cleaned".to_owned());
        return Ok(());
    };
    until_gone(client, namespace, deadline).await?;
    let api = kinds::api(client, "DaemonSet", Some(namespace))?;
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    if let Err(error) = api.patch(CLEANERS, &params, &Patch::Merge(let_go(&waiting))).await {
        bail!("DaemonSet {CLEANERS}: {}", explain(&error));
    }
    cleaned(client, options, deadline, say).await?;
    delete(client, "DaemonSet", Some(namespace), CLEANERS).await?;
    Ok(())
}

/// The cleaners, made from the proxies; pure.
fn cleaners(proxies: &Value, namespace: &str) -> Value {
    let labels = json!({"app.kubernetes.io/name": CLEANERS, "app.kubernetes.io/part-of": "tulle"});
    let mut spec = proxies["spec"]["template"]["spec"].clone();
    let place = spec["nodeSelector"].clone();
    let mut container = spec["containers"][0].clone();
    for key in ["readinessProbe", "livenessProbe", "startupProbe", "args", "lifecycle"] {
        if let Value::Object(map) = &mut container {
            map.remove(key);
        }
    }
    let mut idle = container.clone();
    container["name"] = json!("clean");
    container["command"] = json!(["/usr/local/bin/ztunnel", "cni", "uninstall"]);
    // Pods of a DaemonSet never end. That this one is done is told by its first container, which has ended well.
    idle["name"] = json!("done");
    idle["command"] = json!(["/bin/sleep", "86400"]);
    spec["initContainers"] = json!([container]);
    spec["containers"] = json!([idle]);
    spec["nodeSelector"] = json!({NOWHERE: "pending"});
    // It keeps them from nodes where the canaries were.
    spec["affinity"] = Value::Null;
    spec["terminationGracePeriodSeconds"] = json!(0);
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {
            "name": CLEANERS, "namespace": namespace, "labels": labels,
            "annotations": {WHERE: place.to_string()},
        },
        "spec": {
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    })
}

/// What binds the cleaners to the nodes of the proxies; pure.
fn let_go(cleaners: &Value) -> Value {
    let was = cleaners["metadata"]["annotations"][WHERE].as_str().unwrap_or("null");
    let mut place: Value = serde_json::from_str(was).unwrap_or(Value::Null);
    if !place.is_object() {
        place = json!({});
    }
    place[NOWHERE] = Value::Null;
    json!({"spec": {"template": {"spec": {"nodeSelector": place}}}})
}

/// Waits until no proxy runs.
async fn until_gone(client: &Client, namespace: &str, deadline: Instant) -> anyhow::Result<()> {
    let sets = format!("{PROXIES}, {}", names::PROXY_CANARY);
    let theirs = format!("app.kubernetes.io/name in ({sets}),app.kubernetes.io/part-of=tulle");
    let theirs = ListParams::default().labels(&theirs);
    loop {
        let pods = kinds::api(client, "Pod", Some(namespace))?.list(&theirs).await;
        let pods = pods.map_err(|error| anyhow::anyhow!("cannot list pods: {}", explain(&error)))?;
        if pods.items.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let names: Vec<_> = pods.items.iter().filter_map(|pod| pod.metadata.name.as_deref()).take(5).collect();
            bail!("{} proxies have not ended yet, such as {}; run this again", pods.items.len(), names.join(", "));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Waits until every node is cleaned.
async fn cleaned(
    client: &Client,
    options: &Options,
    deadline: Instant,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    let namespace = options.namespace.as_str();
    let ours =
        ListParams::default().labels(&format!("app.kubernetes.io/name={CLEANERS},app.kubernetes.io/part-of=tulle"));
    loop {
        let set = get(client, "DaemonSet", namespace, CLEANERS).await?.unwrap_or(Value::Null);
        let pods = kinds::api(client, "Pod", Some(namespace))?.list(&ours).await;
        let pods = pods.map_err(|error| anyhow::anyhow!("cannot list pods: {}", explain(&error)))?;
        let done = pods.items.iter().filter(|pod| is_clean(&pod.data)).count() as u64;
        let wanted = set["status"]["desiredNumberScheduled"].as_u64().unwrap_or_default();
        let seen = set["status"]["observedGeneration"].as_i64() >= set["metadata"]["generation"].as_i64();
        if seen && done >= wanted {
            say(format!("{done} nodes are clean"));
            return Ok(());
        }
        if Instant::now() > deadline {
            let late: Vec<_> = pods.items.iter().filter(|pod| !is_clean(&pod.data)).collect();
            let nodes: Vec<_> = late.iter().filter_map(|pod| pod.data["spec"]["nodeName"].as_str()).take(5).collect();
            let text = match seen {
                false => "the controller manager does not start the pods that clean the nodes".to_owned(),
                true => format!("{done} of {wanted} nodes are clean; not {}", nodes.join(", ")),
            };
            if options.force {
                say(format!("{text}: `ztunnel cni uninstall` has to be run there by hand"));
                return Ok(());
            }
            bail!("{text}; see `kubectl -n {namespace} logs daemonset/{CLEANERS} -c clean`, and run this again");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn is_clean(pod: &Value) -> bool {
    pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
}

/// Removes the condition that proxies set on their nodes.
pub(super) async fn forget(client: &Client) -> anyhow::Result<()> {
    let gone = json!({"status": {"conditions": [{"type": "TulleReady", "$patch": "delete"}]}});
    for node in pages(client, "Node", None).await? {
        let has =
            node.data["status"]["conditions"].as_array().into_iter().flatten().any(|one| one["type"] == "TulleReady");
        let name = node.metadata.name.unwrap_or_default();
        if !has {
            continue;
        }
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let api = kinds::api(client, "Node", None)?;
        match api.patch_status(&name, &params, &Patch::Strategic(&gone)).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => bail!("Node {name}: {}", explain(&error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{cleaners, is_clean, let_go};

    #[test]
    fn the_cleaners_are_the_proxies_with_another_command_and_run_nowhere_at_first() {
        let proxies = json!({"spec": {"template": {"spec": {
            "hostNetwork": true, "nodeSelector": {"kubernetes.io/os": "linux"}, "affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "ztunnel", "image": "i", "readinessProbe": {}, "env": [{"name": "A", "value": "1"}],
                "command": ["/usr/local/bin/ztunnel", "node"], "volumeMounts": [{"name": "cni-bin"}]}],
            "volumes": [{"name": "cni-bin"}]}}}});
        let made = cleaners(&proxies, "tulle-system");
        let spec = &made["spec"]["template"]["spec"];
        assert_eq!(spec["nodeSelector"], json!({"tulle.dev/uninstall": "pending"}));
        assert!(spec["affinity"].is_null(), "nodes of the canaries are cleaned, too");
        assert_eq!(spec["initContainers"][0]["command"], json!(["/usr/local/bin/ztunnel", "cni", "uninstall"]));
        assert_eq!(spec["initContainers"][0]["env"][0]["name"], "A");
        assert_eq!(spec["initContainers"][0]["volumeMounts"][0]["name"], "cni-bin");
        assert!(spec["initContainers"][0]["readinessProbe"].is_null());
        assert_eq!(spec["tolerations"][0]["operator"], "Exists");
        assert_eq!(
            let_go(&made),
            json!({"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/os": "linux", "tulle.dev/uninstall": null}}}}})
        );
        assert_eq!(
            let_go(&json!({})),
            json!({"spec": {"template": {"spec": {"nodeSelector": {"tulle.dev/uninstall": null}}}}})
        );
    }

    #[test]
    fn a_node_is_clean_when_its_pod_says_so() {
        let ended =
            |code: i32| json!({"status": {"initContainerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}});
        assert!(is_clean(&ended(0)));
        assert!(!is_clean(&ended(1)));
        assert!(!is_clean(&json!({})));
    }
}
