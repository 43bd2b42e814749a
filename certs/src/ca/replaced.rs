//! `replaced-ca.pem` in the CA directory: intermediates of before, with their keys, oldest first, 0600.
//!
//! A certificate is taken back by whoever signed it, so what a replaced intermediate signed could not be taken back if its
//! key went with it. It is kept for that alone, until the last certificate that it can have signed has ended: 30 days
//! after its successor was made, as control's own live so long. Why that is no new danger: who reads this file reads the
//! key in use beside it. Limits: the newest [`MOST`] are kept.

use std::path::Path;

use rcgen::KeyPair;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::ca::files::{self, CA_CERT, CA_KEY};
use crate::ca::{CaError, SERVER_LIFE_S, rotate};
use crate::pem;

pub(super) const FILE: &str = "replaced-ca.pem";
/// Each has a list of its own in `crl.pem`, of which nodes read 64; who replaces the intermediate twice a day for a week
/// has other troubles.
const MOST: usize = 16;

type Pair = (CertificateDer<'static>, KeyPair);

/// All of them. The caller holds the lock.
pub(super) fn list(dir: &Path) -> Result<Vec<Pair>, CaError> {
    let path = dir.join(FILE);
    let Some(text) = files::read(&path)? else { return Ok(Vec::new()) };
    let wrong = |reason: String| CaError::Content { path: path.clone(), reason };
    let bad = |error: &dyn std::fmt::Debug| wrong(format!("{error:?}; move it away to go on without it"));
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let keys: Result<Vec<_>, _> = PrivatePkcs8KeyDer::pem_slice_iter(text.as_bytes()).collect();
    let (certificates, keys) = (certificates.map_err(|error| bad(&error))?, keys.map_err(|error| bad(&error))?);
    let mut pairs = Vec::with_capacity(keys.len());
    for (certificate, key) in certificates.into_iter().zip(&keys) {
        let key = KeyPair::try_from(key).map_err(|error| bad(&error))?;
        if !files::fits(&certificate, &key) {
            return Err(wrong("a key in it is not that of the certificate before it; move it away".into()));
        }
        pairs.push((certificate, key));
    }
    Ok(pairs)
}

/// Keeps the intermediate that is about to be replaced. Doing it again changes nothing. The caller holds the lock.
pub(super) fn keep(dir: &Path) -> Result<(), CaError> {
    let (Some(text), Some(key)) = (files::read(&dir.join(CA_CERT))?, files::read_key(&dir.join(CA_KEY))?) else {
        return Ok(());
    };
    // What does not fit signed nothing.
    let Ok(certificate) = CertificateDer::from_pem_slice(text.as_bytes()) else { return Ok(()) };
    let mut all = list(dir)?;
    if !files::fits(&certificate, &key) || all.iter().any(|(kept, _)| *kept == certificate) {
        return Ok(());
    }
    all.push((certificate, key));
    write(dir, &all[all.len().saturating_sub(MOST)..])
}

/// Lets those go of which nothing lives any more at `now`, Unix seconds; `current` is the intermediate in use.
pub(super) fn prune(dir: &Path, current: &CertificateDer<'_>, now: i64) -> Result<(), CaError> {
    let all = list(dir)?;
    let mut gone = 0;
    for (index, (certificate, _)) in all.iter().enumerate() {
        let next = all.get(index + 1).map_or(current, |(next, _)| next);
        // The one in use is here if its replacement was interrupted.
        if certificate != current && rotate::begin(next)? + SERVER_LIFE_S <= now {
            gone = index + 1;
        }
    }
    if gone == 0 { Ok(()) } else { write(dir, &all[gone..]) }
}

fn write(dir: &Path, pairs: &[Pair]) -> Result<(), CaError> {
    let path = dir.join(FILE);
    if pairs.is_empty() {
        return std::fs::remove_file(&path).map_err(|source| files::io("remove", &path, source));
    }
    let pair = |(certificate, key): &Pair| pem::encode("CERTIFICATE", certificate) + &key.serialize_pem();
    files::write(&path, &pairs.iter().map(pair).collect::<String>(), 0o600)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::{FILE, MOST, list};
    use crate::ca::{Authority, SERVER_LIFE_S, rotate};

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn replaced_intermediates_are_kept_with_their_keys_until_nothing_of_them_lives() {
        let dir = tempfile::tempdir().unwrap();
        let open = |now| Authority::open(dir.path(), now).unwrap().intermediate().clone();
        let first = open(NOW);
        assert!(list(dir.path()).unwrap().is_empty());
        rotate::renew_intermediate(dir.path()).unwrap();
        // The first one has gone already, and stays known.
        let second = open(NOW + 10);
        rotate::renew_intermediate(dir.path()).unwrap();
        let third = open(NOW + 20);
        let kept = || list(dir.path()).unwrap().into_iter().map(|(certificate, _)| certificate).collect::<Vec<_>>();
        assert_eq!(kept(), [first, second.clone()]);
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "keys are secrets");
        assert_eq!(open(NOW + 10 + SERVER_LIFE_S), third);
        assert_eq!(kept(), [second]);
        assert_eq!(open(NOW + 20 + SERVER_LIFE_S), third);
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn an_interrupted_replacement_keeps_the_intermediate_once_and_only_the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        Authority::open(dir.path(), NOW).unwrap();
        for _ in 0..2 {
            super::keep(dir.path()).unwrap();
        }
        assert_eq!(list(dir.path()).unwrap().len(), 1);
        for _ in 0..MOST + 2 {
            rotate::renew_intermediate(dir.path()).unwrap();
            Authority::open(dir.path(), NOW).unwrap();
        }
        assert_eq!(list(dir.path()).unwrap().len(), MOST);
    }
}
