//! Changing a CA that is kept in a cluster: the Secret is brought into a folder, the step is done there, and the folder
//! becomes the Secret if nobody else has changed it.
//!
//! So a step happens whole or not at all, for all replicas, and two people who rotate at the same time hear of each other.
//! The folder is below `--ca-dir`, which is memory in a pod; it is removed whatever happens.

use std::path::Path;

use crate::cluster;
use crate::cluster::plugged::{Checkout, Folder};
use crate::config::{Kept, Source};

/// Does a step on the files of the CA, wherever that is kept.
///
/// # Errors
/// The step's own, or the Secret cannot be read or written.
pub(super) fn change(
    kept: &Kept,
    ca_dir: &Path,
    step: impl FnOnce(&Path) -> anyhow::Result<String>,
) -> anyhow::Result<String> {
    if kept.source != Some(Source::Kube) || kept.ca_secret.is_empty() {
        return step(ca_dir);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let folder = Folder::new(ca_dir)?;
    let checkout = runtime.block_on(async {
        let client = cluster::client(kept.kubeconfig.as_deref()).await?;
        Checkout::open(client, &kept.root_namespace, &kept.ca_secret, folder.path()).await
    })?;
    let said = step(folder.path())?;
    runtime.block_on(checkout.write_back(folder.path()))?;
    Ok(said)
}
