//! A CA of somebody else: an intermediate in a Secret, as Istio's `cacerts` or as cert-manager writes one, becomes the mesh's
//! authority, and again each time that it changes.
//!
//! The authority stays Secret `tulle-ca`, so all that copies it goes on as it is; the Lease holder brings the other Secret
//! into it, as a step that happens whole or not at all. What cannot be used, or would cut off nodes, changes nothing: the
//! log says why, and the CA goes on as it was. Limits: as [`tulle_certs::ca::plugged`] has them; the other Secret is only read.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, PostParams};
use tulle_certs::ca::mirror;
use tulle_certs::ca::plugged::{self, Given};

use crate::base::{Stop, unix_now};
use crate::cluster::authority::{Failure, events, files, in_time, object};
use crate::cluster::lease::Leader;

/// Between two looks besides the watch: what was refused may be right by now, as after another replica took a step.
const AGAIN: Duration = Duration::from_secs(15);
/// A step's time: shorter than a new Lease holder waits after the last one.
const STEP: Duration = Duration::from_secs(4);

/// What is in the Secret of another CA; `None`: there is no such Secret.
pub(super) async fn given(secrets: &Api<Secret>, name: &str) -> anyhow::Result<Option<Given>> {
    if name.is_empty() {
        return Ok(None);
    }
    let found = in_time(secrets.get_opt(name)).await.with_context(|| format!("cannot read Secret {name}"))?;
    let Some(secret) = found else { return Ok(None) };
    let text = |(key, bytes): (String, k8s_openapi::ByteString)| Some((key, String::from_utf8(bytes.0).ok()?));
    let texts: BTreeMap<String, String> = secret.data.unwrap_or_default().into_iter().filter_map(text).collect();
    Ok(Some(Given::read(&texts).with_context(|| format!("Secret {name} is of no use"))?))
}

/// The two Secrets.
pub struct Names {
    /// Their namespace.
    pub namespace: String,
    /// The authority.
    pub authority: String,
    /// The other CA's.
    pub other: String,
}

/// Brings the other CA's Secret into the authority while this replica holds the Lease, until it is told to stop. `dir`: where
/// a step may be worked on.
pub async fn follow(client: Client, names: Names, dir: PathBuf, leader: Leader, mut stop: Stop) {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &names.namespace);
    let events = events(&secrets, &names.other);
    let mut events = std::pin::pin!(events);
    let mut last = String::new();
    loop {
        if leader.holds_for(STEP) {
            match step(&client, &secrets, &names, &dir).await {
                Ok(false) => last.clear(),
                Ok(true) => {
                    tracing::info!("the CA is now as Secret {} has it", names.other);
                    last.clear();
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if error != last {
                        tracing::error!(error, "Secret {} is not taken; the CA goes on as it was", names.other);
                        last = error;
                    }
                }
            }
        }
        tokio::select! {
            () = stop.requested() => return,
            Some(()) = events.next() => {}
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

/// True: the authority was changed.
async fn step(client: &Client, secrets: &Api<Secret>, names: &Names, dir: &Path) -> anyhow::Result<bool> {
    let Some(given) = given(secrets, &names.other).await? else { return Ok(false) };
    let folder = Folder::new(dir)?;
    let checkout = Checkout::open(client.clone(), &names.namespace, &names.authority, folder.path()).await?;
    if !plugged::take(folder.path(), &given, unix_now())? {
        return Ok(false);
    }
    checkout.write_back(folder.path()).await?;
    Ok(true)
}

/// A folder for the files of one step, with keys in it, that goes whatever happens.
pub struct Folder(PathBuf);

impl Folder {
    /// Makes one below a CA directory, which is memory in a pod.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(ca_dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(ca_dir).with_context(|| format!("cannot make {}", ca_dir.display()))?;
        let path = ca_dir.join(format!(".step-{}", std::process::id()));
        // Left by a process of the same number that was killed.
        let _ = std::fs::remove_dir_all(&path);
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The Secret as a command reads it, to be changed and written back.
pub struct Checkout {
    secrets: Api<Secret>,
    name: String,
    version: Option<String>,
}

impl Checkout {
    /// Writes the Secret's files into a directory.
    ///
    /// # Errors
    /// If there is no Secret, or it cannot be read.
    pub async fn open(client: Client, namespace: &str, name: &str, dir: &Path) -> anyhow::Result<Self> {
        let secrets: Api<Secret> = Api::namespaced(client, namespace);
        let found = in_time(secrets.get_opt(name)).await;
        let Some(secret) = found.with_context(|| format!("cannot read Secret {namespace}/{name}"))? else {
            bail!("there is no Secret {namespace}/{name}: control makes it when it starts");
        };
        mirror::write(dir, &files(&secret)?)?;
        Ok(Self { secrets, name: name.to_owned(), version: secret.metadata.resource_version })
    }

    /// Writes the directory back, if nobody has changed the Secret since.
    ///
    /// # Errors
    /// If somebody has, or it cannot be written; nothing has changed then.
    pub async fn write_back(self, dir: &Path) -> anyhow::Result<()> {
        let name = &self.name;
        let object = object(name, &mirror::read(dir)?, self.version);
        match in_time(self.secrets.replace(name, &PostParams::default(), &object)).await {
            Ok(_) => Ok(()),
            Err(Failure::Conflict(_)) => {
                bail!("Secret {name} was changed by somebody else meanwhile; nothing was done, so run this again")
            }
            Err(error) => Err(error).with_context(|| format!("cannot write Secret {name}; nothing was done")),
        }
    }
}
