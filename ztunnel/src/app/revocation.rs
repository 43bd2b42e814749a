//! The file of revocation lists (`CRL_PATH`): read before anything is served, and again whenever it changes.
//!
//! A proxy whose file cannot be read does not start, because it could not know whom to refuse. While it runs, lists that
//! cannot be used change nothing: those of before stay in force, and the log says what is wrong.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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
    loop {
        tokio::select! {
            () = stopping.reached(Phase::Forced) => return,
            () = changed.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
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
