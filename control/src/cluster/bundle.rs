//! The mesh's roots as a ClusterTrustBundle: for workloads and controllers that are not in the mesh and have to check its
//! certificates, where the cluster serves that kind.
//!
//! It is a copy of `root-cert.pem`, written by the Lease holder; nothing of the mesh reads it, so whatever goes wrong here is
//! said once in the log and costs nobody anything. The object belongs to a signer, so the API server lets only those change
//! it who may attest for that signer. Limits: the kind is not served by default before it is stable; what others change in the
//! object is put right within [`LOOK_AGAIN`].

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use serde_json::json;
use tokio::time::Instant;
use tulle_certs::ca::files::ROOT_CERT;
use tulle_proto::names;

use crate::base::Stop;
use crate::cluster::FIELD_MANAGER;
use crate::cluster::authority::{Failure, in_time};
use crate::cluster::lease::Leader;

/// Whose roots they are, as the API server's rules for such names have it.
pub const SIGNER: &str = "tulle.dev/mesh-ca";
/// Name of the object: the signer's, and one of its own.
pub const NAME: &str = "tulle.dev:mesh-ca:root-cert";
const GROUP: &str = "certificates.k8s.io";
const PLURAL: &str = "clustertrustbundles";
/// The best one first.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];
/// Between two looks at the file, which changes when the root is rotated.
const LOOK: Duration = Duration::from_secs(2);
/// Between two looks at the object, and between two tries after a failure: each look costs up to five requests.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// A holder this young writes nothing: when all replicas are taken away, the Lease goes from one to the next, and none of them
/// is to bring the object back.
const SETTLED: Duration = Duration::from_secs(10);
/// Time of all requests of a look: shorter than a new Lease holder waits after the last one.
const STEP: Duration = Duration::from_secs(4);

/// Keeps the object equal to the roots in `dir` while this replica holds the Lease, until it is told to stop.
pub async fn publish(client: Client, dir: PathBuf, leader: Leader, mut stop: Stop) {
    let mut since: Option<Instant> = None;
    let mut done: Option<(String, Instant)> = None;
    let mut said = String::new();
    loop {
        tokio::select! {
            () = stop.requested() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        if !leader.holds_for(STEP) {
            (since, done) = (None, None);
            continue;
        }
        if since.get_or_insert_with(Instant::now).elapsed() < SETTLED {
            continue;
        }
        // One that is being replaced is there at the next look.
        let Ok(roots) = std::fs::read_to_string(dir.join(ROOT_CERT)) else { continue };
        if done.as_ref().is_some_and(|(written, until)| *written == roots && Instant::now() < *until) {
            continue;
        }
        let (word, pause) = match tokio::time::timeout(STEP, put(&client, &roots)).await {
            Ok(Ok(true)) => {
                tracing::info!("wrote the trusted roots to ClusterTrustBundle {NAME}");
                (String::new(), LOOK_AGAIN)
            }
            Ok(Ok(false)) => (String::new(), LOOK_AGAIN),
            Ok(Err(Failure::Missing(why))) => (why, LOOK_AGAIN),
            Ok(Err(error)) => (error.to_string(), TRY_AGAIN),
            Err(_) => (format!("the API server did not answer within {STEP:?}"), TRY_AGAIN),
        };
        // Most clusters do not have the kind.
        if !word.is_empty() && word != said {
            tracing::info!(why = word, "the roots are not published as ClusterTrustBundle {NAME}; the mesh needs none");
        }
        said = word;
        done = Some((roots, Instant::now() + pause));
    }
}

/// Makes the object say this; whether that was a change. [`Failure::Missing`]: the kind is not served.
async fn put(client: &Client, roots: &str) -> Result<bool, Failure> {
    let (api, resource) = api(client).await?;
    let now = in_time(api.get_opt(NAME)).await?;
    let spec = json!({"signerName": SIGNER, "trustBundle": roots});
    if now.is_some_and(|object| object.data["spec"] == spec) {
        return Ok(false);
    }
    let object = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": NAME, "labels": {names::LABEL_MANAGED: names::MANAGED}},
        "spec": spec,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    in_time(api.patch(NAME, &params, &Patch::Apply(&object))).await?;
    Ok(true)
}

/// Deletes the object; whether there was one.
///
/// # Errors
/// The API server's refusal, in words.
pub async fn remove(client: &Client) -> anyhow::Result<bool> {
    let deleted = async { in_time(api(client).await?.0.delete(NAME, &DeleteParams::default())).await };
    match deleted.await {
        Ok(_) => Ok(true),
        Err(Failure::Missing(_)) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot delete ClusterTrustBundle {NAME}")),
    }
}

/// The kind in the best version that is served.
async fn api(client: &Client) -> Result<(Api<DynamicObject>, ApiResource), Failure> {
    for version in VERSIONS {
        let list = match in_time(client.list_api_group_resources(&format!("{GROUP}/{version}"))).await {
            Ok(list) => list,
            Err(Failure::Missing(_)) => continue,
            Err(error) => return Err(error),
        };
        if list.resources.iter().any(|one| one.name == PLURAL) {
            let kind = GroupVersionKind::gvk(GROUP, version, "ClusterTrustBundle");
            let resource = ApiResource::from_gvk_with_plural(&kind, PLURAL);
            return Ok((Api::all_with(client.clone(), &resource), resource));
        }
    }
    Err(Failure::Missing(format!("this cluster does not serve {PLURAL}.{GROUP}")))
}
