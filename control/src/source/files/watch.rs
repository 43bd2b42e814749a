//! Watches the folder: a kernel notification starts a look at once, and a look every second finds what notifications
//! miss (network file systems, overflown queues, folders replaced by rename).
//!
//! A look lists the folder and reads only files whose identity, size or times changed, so a look without changes costs
//! one stat per file. Limits: depth and number of files are bounded, so that a link to `/` does no harm.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use notify::RecursiveMode;
use notify::Watcher;
use tokio::sync::mpsc;
use tokio::sync::watch;

use crate::base::Stop;
use crate::source::Loaded;
use crate::source::files::{Content, Files, MAX_FILE_BYTES};

/// Between two looks without notification.
const POLL: Duration = Duration::from_secs(1);
/// Deepest folder below the root that is looked into.
const MAX_DEPTH: usize = 16;
/// Most files. One object a file, 10,000 pods and their services fit several times.
const MAX_FILES: usize = 100_000;

/// Identity, size and times of a file.
type Stamp = (u64, u64, u64, i64, i64, i64, i64);

/// Remembers what the last look saw.
pub struct Folder {
    root: PathBuf,
    files: Files,
    stamps: BTreeMap<String, Stamp>,
    first: bool,
}

impl Folder {
    /// A folder that was not looked at yet. It may be absent; then it is empty.
    pub fn new(root: PathBuf) -> Self {
        Self { root, files: Files::default(), stamps: BTreeMap::new(), first: true }
    }

    /// Looks at the disk. `None`: nothing changed since the last look. Fails if the folder itself cannot be listed.
    pub fn look(&mut self) -> std::io::Result<Option<Loaded>> {
        let mut found = BTreeMap::new();
        list(&self.root, &self.root, 0, &mut found)?;
        if found == self.stamps && !self.first {
            return Ok(None);
        }
        let changed: Vec<(String, Content)> = found
            .iter()
            .filter(|(path, stamp)| self.stamps.get(*path) != Some(stamp))
            .map(|(path, stamp)| (path.clone(), read(&self.root.join(path), stamp.2)))
            .collect();
        let present: BTreeSet<String> = found.keys().cloned().collect();
        self.stamps = found;
        self.first = false;
        Ok(Some(self.files.update(&present, changed)))
    }
}

fn read(path: &Path, size: u64) -> Content {
    if size > MAX_FILE_BYTES {
        return Err(format!("it has {size} bytes; at most {MAX_FILE_BYTES} are read"));
    }
    std::fs::read(path).map_err(|error| error.to_string())
}

fn list(root: &Path, folder: &Path, depth: usize, found: &mut BTreeMap<String, Stamp>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // A file that vanished between listing and stat is one that is not there.
        let Ok(meta) = std::fs::metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            if depth < MAX_DEPTH {
                let _ = list(root, &path, depth + 1, found);
            }
            continue;
        }
        let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if !manifest || !meta.is_file() || found.len() >= MAX_FILES {
            continue;
        }
        let relative = path.strip_prefix(root).unwrap_or(&path);
        found.insert(
            relative.to_string_lossy().into_owned(),
            (meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()),
        );
    }
    Ok(())
}

/// Publishes what is in the folder until it is told to stop.
pub async fn run(root: PathBuf, publish: watch::Sender<Option<Arc<Loaded>>>, mut stop: Stop) {
    // One slot: a pending wake-up already means "look again".
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let watcher = watcher(&root, wake);
    if let Err(error) = &watcher {
        tracing::warn!(folder = %root.display(), %error, "cannot watch the folder; it is looked at every second instead");
    }
    let mut folder = Folder::new(root.clone());
    let mut failing = false;
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            let result = folder.look();
            (folder, result)
        });
        let Ok((back, result)) = looked.await else {
            tracing::error!("reading the manifests failed inside control; the last state stays published");
            return;
        };
        folder = back;
        match result {
            Ok(Some(loaded)) => {
                for problem in &loaded.problems {
                    tracing::warn!(error = problem.error, "{problem}");
                }
                publish.send_replace(Some(Arc::new(loaded)));
                failing = false;
            }
            Ok(None) => failing = false,
            Err(error) if !failing => {
                tracing::error!(folder = %root.display(), %error, "cannot list the folder of manifests; the last state stays published");
                failing = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = stop.requested() => return,
            _ = woken.recv(), if watcher.is_ok() => {}
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

fn watcher(root: &Path, wake: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is not a change of it; looking itself must not wake us.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _ = wake.try_send(());
        }
    })?;
    watcher.watch(root, RecursiveMode::Recursive)?;
    Ok(watcher)
}
