//! Taking Tulle away: pods are released first, then each node is cleaned, then the objects go.
//!
//! A captured pod whose proxy is gone has no network, so the order matters and every step waits for the one before. Killed
//! between any two steps, the command can be run again, and pods that are not enrolled start all the while. Nodes are
//! cleaned by a DaemonSet that is a copy of the proxies' with another command, so that it needs no values; it is made
//! before the proxies go and runs after, so that there is always one of the two to copy from.
//! What stays: the definitions of tulle.dev and the objects of users, the keys of the CA and the namespace; `purge` takes
//! them, too.

mod nodes;
mod plan;

use std::time::Duration;

use anyhow::bail;
use kube::Client;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::Value;
use tokio::time::Instant;
use tulle_proto::names;

use crate::cluster::bundle;
use crate::install::MANAGER;
use crate::install::apply::{delete, explain, passes};
use crate::install::kinds;

use plan::{Change, Labelled};

/// Between two looks at what is still there.
const INTERVAL: Duration = Duration::from_secs(1);
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Pods that are named in a message; the others are counted.
const NAMED: usize = 5;

/// How it is to be done.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where Tulle is.
    pub namespace: String,
    /// Namespaces whose egress is closed may open.
    pub open_egress: bool,
    /// Release pods and clean nodes; the objects are somebody else's to delete.
    pub nodes_only: bool,
    /// Definitions, keys and the namespace go, too.
    pub purge: bool,
    /// Go on when pods are not released in time.
    pub force: bool,
    /// When each of the waits ends.
    pub timeout: Duration,
}

/// Does all steps. `say` gets a line for each.
///
/// # Errors
/// The step that failed, what it waits for, and that running it again goes on from there.
pub async fn uninstall(client: &Client, options: &Options, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
    let told = told(client, &options.namespace).await?;
    release(client, options, told.closed, say).await?;
    nodes::clean(client, options, say).await?;
    if options.nodes_only {
        unpublish(client, say).await;
        return Ok(());
    }
    objects(client, options, say).await?;
    unpublish(client, say).await;
    if options.purge {
        purge(client, options, &told.ca_secret, say).await?;
    } else {
        let text = "the definitions of tulle.dev, Secret tulle-ca and the namespace stay; --purge takes them, too";
        say(text.to_owned());
    }
    Ok(())
}

/// Deletes the published roots. Nothing rests on them, so that what keeps them is told and no more.
pub async fn unpublish(client: &Client, say: &mut dyn FnMut(String)) {
    match bundle::remove(client).await {
        Ok(true) => say(format!("ClusterTrustBundle {} deleted", bundle::NAME)),
        Ok(false) => {}
        Err(error) => say(format!("{error:#}; delete it by hand")),
    }
}

/// Labels so that no pod is enrolled, and waits until the proxies have let go of all.
async fn release(
    client: &Client,
    options: &Options,
    by_default: bool,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    let namespaces = labelled(client, "Namespace", None).await?;
    let opening = plan::opens(&namespaces, &options.namespace, by_default);
    if !opening.is_empty() && !options.open_egress {
        bail!(
            "nothing may leave these namespaces (tulle.dev/egress), and they open when Tulle goes: {}; if that is meant, \
             label them tulle.dev/egress=allow, or uninstall with --open-egress",
            opening.join(", ")
        );
    }
    change(client, "Namespace", &plan::changes(&namespaces, false, &options.namespace, by_default), say).await?;
    let ours = format!("{}=enabled", names::LABEL_MESH);
    let istio = format!("{}=ambient", names::LABEL_ISTIO_MESH);
    for selector in [ours, istio] {
        let pods = labelled(client, "Pod", Some(&selector)).await?;
        change(client, "Pod", &plan::changes(&pods, true, &options.namespace, by_default), say).await?;
    }
    let deadline = Instant::now() + options.timeout;
    let mut told = usize::MAX;
    loop {
        let captured = captured(client).await?;
        if captured.is_empty() {
            say("no pod is captured".to_owned());
            return Ok(());
        }
        if Instant::now() > deadline {
            let named = captured.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            let text = format!("{} pods are still captured, such as {named}", captured.len());
            if options.force {
                say(format!("{text}; they are without network when their proxy goes, until they are started anew"));
                return Ok(());
            }
            bail!(
                "{text}; is `ztunnel` running on their nodes? Run this again once it is, or with --force: then these pods \
                 have no network until they are started anew"
            );
        }
        if captured.len() != told {
            say(format!("waiting for {} pods to be released", captured.len()));
            told = captured.len();
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What control is told that matters when it goes.
struct Told {
    /// Namespaces without a label are closed.
    closed: bool,
    /// Name of the Secret with the keys of the CA.
    ca_secret: String,
}

async fn told(client: &Client, namespace: &str) -> anyhow::Result<Told> {
    let control = match kinds::api(client, "Deployment", Some(namespace))?.get_opt("control").await {
        Ok(control) => control.map(|control| control.data).unwrap_or_default(),
        Err(error) if forbidden(&error) => Value::Null,
        Err(error) => bail!("cannot read Deployment control: {}", explain(&error)),
    };
    let set = control["spec"]["template"]["spec"]["containers"][0]["env"].as_array().cloned().unwrap_or_default();
    let value = |name: &str| set.iter().find(|one| one["name"] == name).and_then(|one| one["value"].as_str());
    Ok(Told {
        closed: value("TULLE_CONTROL_EGRESS_DEFAULT") == Some("deny"),
        ca_secret: value("TULLE_CONTROL_CA_SECRET").unwrap_or("tulle-ca").to_owned(),
    })
}

fn forbidden(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 403)
}

async fn pages(client: &Client, kind: &str, selector: Option<&str>) -> anyhow::Result<Vec<kube::api::DynamicObject>> {
    let api = kinds::api(client, kind, None)?;
    let mut params = ListParams::default().limit(PAGE);
    if let Some(selector) = selector {
        params = params.labels(selector);
    }
    let mut all = Vec::new();
    loop {
        let page =
            api.list(&params).await.map_err(|error| anyhow::anyhow!("cannot list {kind}: {}", explain(&error)))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(all),
        }
    }
}

async fn labelled(client: &Client, kind: &str, selector: Option<&str>) -> anyhow::Result<Vec<Labelled>> {
    let objects = pages(client, kind, selector).await?;
    let of = |object: kube::api::DynamicObject| Labelled {
        namespace: object.metadata.namespace,
        name: object.metadata.name.unwrap_or_default(),
        labels: object.metadata.labels.unwrap_or_default(),
    };
    Ok(objects.into_iter().map(of).collect())
}

async fn change(
    client: &Client,
    kind: &str,
    changes: &[Change<'_>],
    say: &mut dyn FnMut(String),
) -> anyhow::Result<()> {
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    for change in changes {
        let Labelled { namespace, name, .. } = change.of;
        match kinds::api(client, kind, namespace.as_deref())?.patch(name, &params, &Patch::Merge(change.patch())).await
        {
            Ok(_) => {
                let name = namespace.as_ref().map_or_else(|| name.clone(), |namespace| format!("{namespace}/{name}"));
                say(format!("{kind} {name}: {}", change.words()));
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => bail!("cannot label {kind} {name}: {}", explain(&error)),
        }
    }
    Ok(())
}

/// Pods that say that they are captured, finished ones aside.
async fn captured(client: &Client) -> anyhow::Result<Vec<String>> {
    let pods = pages(client, "Pod", None).await?;
    let is = |pod: &kube::api::DynamicObject| {
        let annotations = pod.metadata.annotations.as_ref();
        let said = annotations.and_then(|all| all.get(names::ANNOTATION_REDIRECTION));
        let over = matches!(pod.data["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        said.is_some_and(|said| said == "enabled") && !over
    };
    let name = |pod: kube::api::DynamicObject| {
        format!("{}/{}", pod.metadata.namespace.unwrap_or_default(), pod.metadata.name.unwrap_or_default())
    };
    Ok(pods.into_iter().filter(is).map(name).collect())
}

/// Deletes what an installation brought, and what control made for the mesh.
async fn objects(client: &Client, options: &Options, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
    let ours = ListParams::default()
        .labels(&format!("app.kubernetes.io/part-of=tulle,app.kubernetes.io/managed-by={MANAGER}"));
    for kind in kinds::disposable() {
        let api = kinds::api(client, kind, Some(&options.namespace))?;
        let there = api.list(&ours).await.map_err(|error| anyhow::anyhow!("{kind}: {}", explain(&error)))?;
        for object in there {
            let name = object.metadata.name.unwrap_or_default();
            if delete(client, kind, Some(&options.namespace), &name).await? {
                say(format!("{kind} {name} deleted"));
            }
        }
    }
    // Those that control made and, ended with its objects, could not take away itself.
    for policy in pages(client, "NetworkPolicy", Some("app.kubernetes.io/managed-by=tulle")).await? {
        let (namespace, name) =
            (policy.metadata.namespace.unwrap_or_default(), policy.metadata.name.unwrap_or_default());
        // The label alone may be on what somebody made with a tool of that name.
        if !name.starts_with(names::BESIDE) {
            continue;
        }
        if delete(client, "NetworkPolicy", Some(&namespace), &name).await? {
            say(format!("NetworkPolicy {namespace}/{name} deleted"));
        }
    }
    nodes::forget(client).await?;
    // That of the replica that wrote status, and those of replicas that were killed.
    let leases = kinds::api(client, "Lease", Some(&options.namespace))?.list(&ListParams::default()).await;
    for lease in leases.map_err(|error| anyhow::anyhow!("Lease: {}", explain(&error)))? {
        let name = lease.metadata.name.unwrap_or_default();
        if name.starts_with("tulle-control") {
            delete(client, "Lease", Some(&options.namespace), &name).await?;
        }
    }
    delete(client, "ConfigMap", Some(&options.namespace), "tulle-ca-root-cert").await?;
    Ok(())
}

async fn purge(client: &Client, options: &Options, ca_secret: &str, say: &mut dyn FnMut(String)) -> anyhow::Result<()> {
    for definition in crate::install::manifests::definitions().map_err(anyhow::Error::msg)? {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default();
        if delete(client, "CustomResourceDefinition", None, name).await? {
            say(format!("CustomResourceDefinition {name} and all its objects deleted"));
        }
    }
    delete(client, "Secret", Some(&options.namespace), ca_secret).await?;
    let api = kinds::api(client, "Namespace", None)?;
    let made_here = match api.get_opt(&options.namespace).await {
        Ok(Some(namespace)) => {
            let labels = namespace.metadata.labels.unwrap_or_default();
            labels.get("app.kubernetes.io/managed-by").is_some_and(|by| by == MANAGER)
        }
        Ok(None) => false,
        Err(error) => bail!("Namespace {}: {}", options.namespace, explain(&error)),
    };
    if !made_here {
        say(format!("Namespace {} stays: somebody else made it", options.namespace));
    } else if delete(client, "Namespace", None, &options.namespace).await? {
        say(format!("Namespace {} deleted", options.namespace));
    }
    Ok(())
}

/// An object, or nothing.
async fn get(client: &Client, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Option<Value>> {
    loop {
        match kinds::api(client, kind, Some(namespace))?.get_opt(name).await {
            Ok(Some(object)) => return Ok(Some(serde_json::to_value(object)?)),
            Ok(None) => return Ok(None),
            Err(error) if passes(&error) => tokio::time::sleep(INTERVAL).await,
            Err(error) => bail!("{kind} {name}: {}", explain(&error)),
        }
    }
}
