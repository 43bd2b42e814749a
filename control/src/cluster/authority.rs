//! The CA in a cluster: a Secret (`tulle-ca`) is the authority, one key for each file, `--ca-dir` of each replica a copy of it, and ConfigMap
//! `tulle-ca-root-cert` what everybody may see of it.
//!
//! The directory stays what all the rest works on. Whoever comes first makes an authority and creates the Secret; who comes
//! second at the same time is told that it exists, and takes it. A change of the Secret becomes files, which `app::tls`
//! takes over; a change of the files (a renewed intermediate) is written back only onto the Secret that they were a copy
//! of, so of two replicas that renew at once one wins and the other takes its work. Keys are in no log line and no error.
//! The ConfigMap is written by the Lease holder, but for its beginning: nodes cannot start without it. Limits: a Secret
//! holds 1 MiB, so a `crl.pem` may have about 700 KiB there; one beyond [`MAX_SHOWN_CRL`] is not in the ConfigMap.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use anyhow::bail;
use futures_util::Stream;
use futures_util::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use tulle_certs::ca::files::{CRL, ROOT_CERT};
use tulle_certs::ca::mirror::{self, Files};
use tulle_certs::ca::{self, Authority};
use tulle_proto::names;

use crate::base::{Stop, unix_now};
use crate::cluster::lease::Leader;
use crate::cluster::{FIELD_MANAGER, plugged, words};

/// What nodes need of it: `root-cert.pem` and `crl.pem`.
pub const BUNDLE: &str = "tulle-ca-root-cert";
/// A longer list would leave no room for the roots in an object of 1 MiB.
const MAX_SHOWN_CRL: usize = 512 * 1024;
/// Between two looks at the directory: its files change once a year, and when somebody rotates without the Secret.
const LOOK: Duration = Duration::from_secs(2);
/// Between two tries to reach the API server at the start.
const AGAIN: Duration = Duration::from_secs(2);
/// One request: shorter than a new Lease holder waits after the last one.
const REQUEST: Duration = Duration::from_secs(4);

/// What has to be done for directory and Secret to be equal.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// They are.
    Nothing,
    /// There is no authority anywhere.
    Make,
    /// The directory's becomes the Secret.
    Create,
    /// The Secret's becomes the directory.
    Take,
    /// The directory's replaces the Secret that it was a copy of.
    WriteBack,
}

/// `base`: what both were when they last were equal; `None`: never by this process.
fn step(base: Option<&Files>, dir: &Files, secret: Option<&Files>) -> Step {
    match secret {
        None if dir.is_authority() => Step::Create,
        None => Step::Make,
        Some(secret) if secret == dir => Step::Nothing,
        Some(secret) if base == Some(secret) && !has_lost(dir, secret) => Step::WriteBack,
        Some(_) => Step::Take,
    }
}

/// Files that went from the directory alone were lost: only a step on the Secret itself takes one away.
fn has_lost(dir: &Files, secret: &Files) -> bool {
    // Replaced intermediates go by themselves when nothing of theirs lives.
    secret.0.keys().any(|file| file != "replaced-ca.pem" && !dir.0.contains_key(file))
}

/// The copy of one replica.
pub struct Mirror {
    secrets: Api<Secret>,
    bundles: Api<ConfigMap>,
    name: String,
    /// The Secret of another CA, which comes first where there is no authority yet; empty: there is none.
    plugged: String,
    dir: PathBuf,
    base: Option<Files>,
}

impl Mirror {
    /// Makes a directory and the Secret `name` equal, and waits for the API server as long as that takes. Where there is no
    /// authority yet, it is that of Secret `plugged`, if there is one.
    pub async fn open(client: Client, namespace: &str, name: &str, plugged: &str, dir: &Path) -> Self {
        let (secrets, bundles) = (Api::namespaced(client.clone(), namespace), Api::namespaced(client, namespace));
        let (owned, plugged) = (name.to_owned(), plugged.to_owned());
        let mut this = Self { secrets, bundles, name: owned, plugged, dir: dir.to_owned(), base: None };
        let mut last = String::new();
        loop {
            let done = match this.sync().await {
                Ok(()) => this.show(false).await,
                Err(error) => Err(error),
            };
            match done {
                Ok(()) => return this,
                Err(error) => {
                    let error = format!("{error:#}");
                    if error != last {
                        tracing::error!(
                            error,
                            "control waits for Secret {name} and ConfigMap {BUNDLE} in namespace {namespace}"
                        );
                        last = error;
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// Once; several rounds if others write at the same time.
    async fn sync(&mut self) -> anyhow::Result<()> {
        let name = &self.name;
        for _ in 0..5 {
            let stored =
                in_time(self.secrets.get_opt(name)).await.with_context(|| format!("cannot read Secret {name}"))?;
            let theirs = stored.as_ref().map(files).transpose()?;
            let ours = mirror::read(&self.dir)?;
            let written = match step(self.base.as_ref(), &ours, theirs.as_ref()) {
                Step::Nothing => {
                    self.base = theirs;
                    return Ok(());
                }
                Step::Make => {
                    if let Some(given) = plugged::given(&self.secrets, &self.plugged).await? {
                        ca::plugged::take(&self.dir, &given, unix_now())
                            .with_context(|| format!("Secret {} is of no use", self.plugged))?;
                    }
                    Authority::open(&self.dir, unix_now())?;
                    continue;
                }
                Step::Take => {
                    let theirs = theirs.unwrap_or_default();
                    if self.base.as_ref().is_some_and(|base| *base != ours) {
                        tracing::warn!(
                            "Secret {name} was changed by another replica at the same time; its authority counts"
                        );
                    }
                    mirror::write(&self.dir, &theirs)?;
                    self.base = Some(theirs);
                    // Completes one that has only a root, as an administrator may give it.
                    Authority::open(&self.dir, unix_now())?;
                    continue;
                }
                Step::Create => in_time(self.secrets.create(&PostParams::default(), &object(name, &ours, None))).await,
                Step::WriteBack => {
                    let version = stored.and_then(|secret| secret.metadata.resource_version);
                    let object = object(name, &ours, version);
                    in_time(self.secrets.replace(name, &PostParams::default(), &object)).await
                }
            };
            match written {
                Ok(_) => {
                    tracing::info!("wrote the CA to Secret {name}");
                    self.base = Some(ours);
                    return Ok(());
                }
                // Somebody was faster: what he wrote is looked at.
                Err(Failure::Conflict(_)) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot write Secret {name}")),
            }
        }
        bail!("Secret {name} is changed all the time by others");
    }

    /// Makes the ConfigMap say what the directory has. Without `all` only if there is none.
    async fn show(&self, all: bool) -> anyhow::Result<()> {
        let files = mirror::read(&self.dir)?;
        let data: BTreeMap<String, String> = [ROOT_CERT, CRL]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), files.0.get(name)?.clone())))
            .filter(|(name, text)| name != CRL || text.len() <= MAX_SHOWN_CRL)
            .collect();
        let now = in_time(self.bundles.get_opt(BUNDLE)).await.with_context(|| format!("cannot read {BUNDLE}"))?;
        let shown = |map: &ConfigMap| map.data.as_ref().is_some_and(|shown| *shown == data);
        if now.as_ref().is_some_and(|map| !all || shown(map)) {
            return Ok(());
        }
        let map = ConfigMap {
            metadata: ObjectMeta { name: Some(BUNDLE.to_owned()), labels: Some(labels()), ..ObjectMeta::default() },
            data: Some(data),
            ..ConfigMap::default()
        };
        let params = PatchParams::apply(FIELD_MANAGER).force();
        in_time(self.bundles.patch(BUNDLE, &params, &Patch::Apply(&map)))
            .await
            .with_context(|| format!("cannot write {BUNDLE}"))?;
        tracing::info!("wrote the trusted roots to ConfigMap {BUNDLE}");
        Ok(())
    }

    /// Keeps them equal until it is told to stop.
    pub async fn keep(mut self, leader: Leader, mut stop: Stop) {
        let secrets = events(&self.secrets, &self.name);
        let bundles = events(&self.bundles, BUNDLE);
        let (mut secrets, mut bundles) = (std::pin::pin!(secrets), std::pin::pin!(bundles));
        let mut last = String::new();
        let (mut sync, mut show, mut held) = (true, true, false);
        loop {
            let holds = leader.holds_for(REQUEST);
            show |= holds && !held;
            held = holds;
            let mut done = if sync { self.sync().await } else { Ok(()) };
            if done.is_ok() && show && held {
                done = self.show(true).await;
            }
            match done {
                Ok(()) => {
                    (sync, show) = (false, false);
                    last.clear();
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if error != last {
                        tracing::error!(error, "the CA goes on as it was loaded");
                        last = error;
                    }
                }
            }
            tokio::select! {
                () = stop.requested() => return,
                Some(()) = secrets.next() => (sync, show) = (true, true),
                Some(()) = bundles.next() => show = true,
                () = tokio::time::sleep(LOOK) => {
                    let changed = mirror::read(&self.dir).is_ok_and(|files| self.base.as_ref() != Some(&files));
                    (sync, show) = (sync || changed, show || changed);
                }
            }
        }
    }
}

/// One element for each time that the object may have changed.
pub(super) fn events<K>(api: &Api<K>, name: &str) -> impl Stream<Item = ()> + use<K>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    // `default_backoff`: a second, then longer, at most half a minute.
    watch_object(api.clone(), name).default_backoff().filter_map(|event| async move {
        match event {
            Ok(_) => Some(()),
            Err(watcher::Error::WatchError(status)) if status.code == 410 => None,
            Err(error) => {
                tracing::debug!(%error, "a watch of the CA was interrupted");
                None
            }
        }
    })
}

/// Why a request failed. Says nothing of what was in it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("somebody else wrote it at the same time: {0}")]
    Conflict(String),
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Other(String),
}

pub(super) async fn in_time<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(REQUEST, request).await {
        Err(_) => Err(Failure::Other(format!("the API server did not answer within {REQUEST:?}"))),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => Err(Failure::Conflict(status.message.clone())),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(Failure::Missing(status.message.clone())),
        Ok(Err(error)) => Err(Failure::Other(words(&error))),
        Ok(Ok(found)) => Ok(found),
    }
}

fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([(names::LABEL_MANAGED.to_owned(), names::MANAGED.to_owned())])
}

pub(super) fn files(secret: &Secret) -> anyhow::Result<Files> {
    let mut all = BTreeMap::new();
    for (name, bytes) in secret.data.iter().flatten() {
        let text = String::from_utf8(bytes.0.clone());
        let text = text.map_err(|_| anyhow::anyhow!("key {name} of the CA's Secret is not text"))?;
        all.insert(name.clone(), text);
    }
    let files = Files(all);
    let strangers = files.strangers();
    if !strangers.is_empty() {
        bail!("the CA's Secret has keys that are no files of a CA: {}; remove them", strangers.join(", "));
    }
    Ok(files)
}

pub(super) fn object(name: &str, files: &Files, version: Option<String>) -> Secret {
    let data = files.0.iter().map(|(file, text)| (file.clone(), ByteString(text.clone().into_bytes()))).collect();
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: version,
            labels: Some(labels()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_counts_but_for_changes_of_its_own_copy() {
        let files = |text: &str| {
            let names = ["root-cert.pem", "ca-cert.pem", "ca-key.pem", "token-key.pem"];
            Files(names.iter().map(|name| ((*name).to_owned(), text.to_owned())).collect())
        };
        let (none, a, b, c) = (Files::default(), files("a"), files("b"), files("c"));
        let cases = [
            ("a new cluster", None, &none, None, Step::Make),
            ("an authority that was brought along", None, &a, None, Step::Create),
            ("a second replica", None, &none, Some(&a), Step::Take),
            ("two made one at once", None, &b, Some(&a), Step::Take),
            ("started anew", None, &a, Some(&a), Step::Nothing),
            ("quiet", Some(&a), &a, Some(&a), Step::Nothing),
            ("renewed here", Some(&a), &b, Some(&a), Step::WriteBack),
            ("rotated elsewhere", Some(&a), &a, Some(&b), Step::Take),
            ("both at once", Some(&a), &b, Some(&c), Step::Take),
            ("both at once, the same", Some(&a), &b, Some(&b), Step::Nothing),
            ("its files were lost", Some(&a), &none, Some(&a), Step::Take),
            ("the Secret was deleted", Some(&a), &a, None, Step::Create),
        ];
        for (name, base, dir, secret, expected) in cases {
            assert_eq!(step(base, dir, secret), expected, "{name}");
        }
    }

    #[test]
    fn a_secret_with_keys_of_something_else_is_not_taken() {
        let secret = |name: &str, bytes: &[u8]| Secret {
            data: Some(BTreeMap::from([(name.to_owned(), ByteString(bytes.to_vec()))])),
            ..Secret::default()
        };
        let said = |secret: &Secret| files(secret).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said(&secret("tls.crt", b"x")).contains("tls.crt"));
        assert!(said(&secret("../etc/passwd", b"x")).contains("no files of a CA"));
        assert!(said(&secret("ca-key.pem", &[0xff])).contains("not text"));
        assert!(files(&secret("ca-key.pem", b"x")).is_ok());
    }
}
