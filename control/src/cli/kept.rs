//! Changing a CA that is kept in a cluster: the Secret is brought into a folder, the step is done there, and the folder
//! becomes the Secret if nobody else has changed it.
//!
//! So a step happens whole or not at all, for all replicas, and two people who rotate at the same time hear of each other.
//! The folder is below `--ca-dir`, which is memory in a pod; it is removed whatever happens.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::cluster;
use crate::cluster::authority::Checkout;
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
        Checkout::open(client, &kept.root_namespace, &kept.ca_secret, &folder.0).await
    })?;
    let said = step(&folder.0)?;
    runtime.block_on(checkout.write_back(&folder.0))?;
    Ok(said)
}

struct Folder(PathBuf);

impl Folder {
    fn new(ca_dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(ca_dir).with_context(|| format!("cannot make {}", ca_dir.display()))?;
        let path = ca_dir.join(format!(".step-{}", std::process::id()));
        // Left by a process of the same number that was killed.
        let _ = std::fs::remove_dir_all(&path);
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
