//! The file of revocation lists (`CRL_PATH`): read before anything is served, and again whenever it changes.
//!
//! A proxy whose file cannot be read does not start, because it could not know whom to refuse. While it runs, lists that
//! cannot be used change nothing: those of before stay in force, and the log says what is wrong.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::sync::Notify;
use tulle_certs::Crls;

use crate::base::drain::{Drained, Phase};
use crate::base::unix_now;
use crate::capture::pods::watch_directory;
use crate::identity::Identities;
use crate::tls::Revoked;

/// How often the file is looked at besides notifications, which some file systems do not send.
const LOOK: Duration = Duration::from_secs(5);

/// A file that has not changed for this long is read again only when it has: the times of some file systems tick once in
/// two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// Reads the file for the first time.
///
/// # Errors
/// What is wrong with it, and what to do.
pub fn load(path: Option<&Path>) -> anyhow::Result<Revoked> {
    let revoked = Revoked::default();
    if let Some(path) = path {
        let crls = read(path).map_err(anyhow::Error::msg).context(
            "CRL_PATH cannot be used, so it is not known which certificates were taken back; mend the file (an empty \
             one takes nothing back) or unset CRL_PATH",
        )?;
        revoked.replace(crls);
    }
    Ok(revoked)
}

/// Takes over what changes in the file until the proxy stops.
pub async fn watch(path: PathBuf, revoked: Revoked, identities: Identities, stopping: Drained) {
    let changed = Arc::new(Notify::new());
    let _watcher = watch_directory(&path, changed.clone());
    let mut last_error = String::new();
    let mut read_as: Option<Stamp> = None;
    loop {
        tokio::select! {
            () = stopping.reached(Phase::Forced) => return,
            () = changed.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        // Taken before reading: what is written meanwhile differs from it.
        let stamp = stamp(&path, SystemTime::now());
        if stamp.is_some() && stamp == read_as {
            continue;
        }
        read_as = stamp;
        match read(&path) {
            Ok(crls) => {
                last_error.clear();
                let (lists, certificates, overdue) = (crls.lists(), crls.serials(), crls.overdue(unix_now()));
                if revoked.replace(crls) {
                    let own = identities.replace_revoked();
                    tracing::info!(lists, certificates, overdue, own, "took over the revocation lists");
                }
            }
            // Once for each kind of trouble, not at each look.
            Err(error) if error != last_error => {
                tracing::error!(error, "the revocation lists cannot be used; those of before stay in force");
                last_error = error;
            }
            Err(_) => {}
        }
    }
}

/// What tells a file from another or a later one: device, inode, length, and the times of its last change, ns.
type Stamp = (u64, u64, u64, i64, i64);

/// `None`: it cannot be asked, or it changed so shortly before `now` that a clock of coarse ticks would not show the next
/// change.
fn stamp(path: &Path, now: SystemTime) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    let is_old = |time: SystemTime| now.duration_since(time).is_ok_and(|age| age > SETTLED);
    let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
    let (modified, changed) = (ns(meta.mtime(), meta.mtime_nsec()), ns(meta.ctime(), meta.ctime_nsec()));
    is_old(meta.modified().ok()?).then_some((meta.dev(), meta.ino(), meta.len(), modified, changed))
}

fn read(path: &Path) -> Result<Crls, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    // A file that is too large is refused by what it says, without being read.
    let size = std::fs::metadata(path).map_err(|error| named(&error))?.len();
    if size > tulle_certs::MAX_CRL_BYTES as u64 {
        return Err(named(&format!("{size} bytes; at most {} are read", tulle_certs::MAX_CRL_BYTES)));
    }
    let bytes = std::fs::read(path).map_err(|error| named(&error))?;
    Crls::parse(&bytes).map_err(|error| named(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_if_anything_of_it_has_changed_or_may_have() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crl.pem");
        assert_eq!(stamp(&path, SystemTime::now()), None, "there is none");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(stamp(&path, SystemTime::now()), None, "it has just been written");
        let later = SystemTime::now() + SETTLED * 2;
        let first = stamp(&path, later);
        assert!(first.is_some() && stamp(&path, later) == first);
        // Another file of the same length in its place, as it is replaced by rename.
        let fresh = dir.path().join("fresh");
        std::fs::write(&fresh, "two").unwrap();
        std::fs::rename(&fresh, &path).unwrap();
        let second = stamp(&path, later);
        assert!(second.is_some() && second != first);
        std::fs::write(&path, "three").unwrap();
        assert_ne!(stamp(&path, later), second);
    }
}
