//! Replacing the root while every connection goes on.
//!
//! A verifier that does not know the new root must never meet a leaf that it signed, and no leaf of the old root may be
//! left when that goes. So there are three steps, and time between them: *announce* (a new root joins the bundle, the
//! old one signs on), *switch* (the new root signs), *retire* (the old root leaves the bundle). Each step ends with one
//! atomic rename, so that a step that dies has happened or not, and doing it again completes it. The files are the only
//! state, and which step comes next is read from them. Whether it is safe yet is the caller's to find out: see
//! [`Rotation::safe_after`].

use std::path::Path;

use rustls_pki_types::CertificateDer;

use crate::Roots;
use crate::ca::files::{self, NEXT_ROOT_KEY, OLD_ROOT_KEY, ROOT_CERT, ROOT_KEY};
use crate::ca::replaced;
use crate::ca::{CaError, LEAF_LIFE_S, LONGEST_BACKDATE_S, crypto, self_signed_root};
use crate::fingerprint;
use crate::issued;
use crate::pem;

/// Where a rotation of the root stands. Times are Unix seconds; fingerprints are SHA-256 in hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rotation {
    /// None is under way.
    Settled,
    /// A new root is in the bundle and does not sign yet.
    Announced {
        /// The new root.
        new: String,
        /// Since when.
        since: i64,
    },
    /// The new root signs; the old one is still trusted.
    Switched {
        /// The old root.
        old: String,
        /// Since when.
        since: i64,
    },
}

impl Rotation {
    /// When the next step is safe whatever the nodes say: every leaf of before has ended then, so every proxy that still
    /// works has asked for a new one and got the new bundle. Unix seconds; `None`: nothing is under way.
    pub fn safe_after(&self) -> Option<i64> {
        match self {
            Self::Settled => None,
            Self::Announced { since, .. } | Self::Switched { since, .. } => Some(since + LEAF_LIFE_S),
        }
    }
}

/// Reads where the rotation stands. The caller holds the lock.
pub(super) fn state(dir: &Path, roots: &Roots, intermediate: &CertificateDer<'_>) -> Result<Rotation, CaError> {
    let of = |file: &str| -> Result<Option<CertificateDer<'static>>, CaError> {
        Ok(files::read_key(&dir.join(file))?.and_then(|key| files::of_key(roots, &key)))
    };
    let signing = of(ROOT_KEY)?;
    // A key that signs already is no next one: the last rename of a switch was lost.
    if let Some(new) = of(NEXT_ROOT_KEY)?.filter(|new| Some(new) != signing.as_ref()) {
        return Ok(Rotation::Announced { new: fingerprint(&new), since: begin(&new)? });
    }
    if let Some(old) = of(OLD_ROOT_KEY)?.filter(|old| Some(old) != signing.as_ref()) {
        return Ok(Rotation::Switched { old: fingerprint(&old), since: begin(intermediate)? });
    }
    Ok(Rotation::Settled)
}

/// When a certificate of ours was made: its validity begins a little before.
pub(super) fn begin(certificate: &CertificateDer<'_>) -> Result<i64, CaError> {
    Ok(issued::facts(certificate).map_err(crypto)?.not_before + LONGEST_BACKDATE_S)
}

/// Makes a new root and adds it to the bundle. `now`: Unix seconds.
///
/// # Errors
/// If a rotation is under way, or the key of the root that signs is not here.
pub fn announce(dir: &Path, now: i64) -> Result<(), CaError> {
    let _lock = files::lock(dir)?;
    let roots = all_roots(dir)?;
    if dir.join(OLD_ROOT_KEY).exists() {
        return Err(not_now(dir, OLD_ROOT_KEY, "the last rotation is not finished: retire its old root first"));
    }
    let path = dir.join(NEXT_ROOT_KEY);
    let key = match files::read_key(&path)? {
        Some(key) if files::of_key(&roots, &key).is_some() => {
            return Err(not_now(dir, NEXT_ROOT_KEY, "a new root is announced already: switch to it next"));
        }
        Some(key) => key,
        None => files::make_key(&path)?,
    };
    let certificate = self_signed_root(&key, now)?;
    let mut all = roots.certificates().to_vec();
    all.push(certificate.into());
    write_bundle(dir, all)
}

/// Lets the announced root sign. The intermediate is made anew when the directory is next opened.
///
/// # Errors
/// If no root is announced.
pub fn switch(dir: &Path) -> Result<(), CaError> {
    let _lock = files::lock(dir)?;
    let roots = all_roots(dir)?;
    let (_, old_key) = files::signing_root(dir)?;
    let next = dir.join(NEXT_ROOT_KEY);
    let announced = files::read_key(&next)?.and_then(|key| files::of_key(&roots, &key));
    if announced.is_none() {
        return Err(not_now(dir, NEXT_ROOT_KEY, "no new root is announced: announce one first"));
    }
    files::write(&dir.join(OLD_ROOT_KEY), &old_key.serialize_pem(), 0o600)?;
    let current = dir.join(ROOT_KEY);
    std::fs::rename(&next, &current).map_err(|source| files::io("rename to", &current, source))
}

/// Takes the old root out of the bundle and removes its key.
///
/// # Errors
/// If the new root does not sign yet, or has signed no intermediate yet (opening the directory makes it do so).
pub fn retire(dir: &Path, now: i64) -> Result<(), CaError> {
    let _lock = files::lock(dir)?;
    let roots = all_roots(dir)?;
    let path = dir.join(OLD_ROOT_KEY);
    let Some(old) = files::read_key(&path)? else {
        return Err(not_now(dir, OLD_ROOT_KEY, "no old root is left to retire"));
    };
    if dir.join(NEXT_ROOT_KEY).exists() {
        return Err(not_now(dir, NEXT_ROOT_KEY, "the announced root does not sign yet: switch to it first"));
    }
    let stays = |root: &&CertificateDer<'static>| !files::fits(root, &old);
    let kept: Vec<_> = roots.certificates().iter().filter(stays).cloned().collect();
    if let Err(why) = files::load_intermediate(dir, &kept, now)? {
        return Err(not_now(dir, files::CA_CERT, &format!("the intermediate would end with the old root: it {why}")));
    }
    write_bundle(dir, kept)?;
    std::fs::remove_file(&path).map_err(|source| files::io("remove", &path, source))
}

/// Makes the intermediate anew although its time is not over, for a key that may be known to others.
///
/// # Errors
/// If the root's key is not here.
pub fn renew_intermediate(dir: &Path) -> Result<(), CaError> {
    let _lock = files::lock(dir)?;
    files::signing_root(dir)?;
    replaced::keep(dir)?;
    // Without its key the certificate does not count; opening makes both.
    let path = dir.join(files::CA_KEY);
    std::fs::remove_file(&path).map_err(|source| files::io("remove", &path, source))
}

/// The bundle. The root that signs must be here too, with its key.
fn all_roots(dir: &Path) -> Result<Roots, CaError> {
    files::signing_root(dir)?;
    files::read_roots(dir)?.ok_or_else(|| not_now(dir, ROOT_CERT, "it is missing"))
}

fn write_bundle(dir: &Path, certificates: Vec<CertificateDer<'static>>) -> Result<(), CaError> {
    let path = dir.join(ROOT_CERT);
    let roots = Roots::from_der(certificates).map_err(|source| CaError::Roots { path: path.clone(), source })?;
    let text: String = roots.certificates().iter().map(|root| pem::encode("CERTIFICATE", root)).collect();
    files::write(&path, &text, 0o644)
}

fn not_now(dir: &Path, file: &str, reason: &str) -> CaError {
    CaError::Content { path: dir.join(file), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::UnixTime;

    use super::*;
    use crate::ca::Authority;
    use crate::{Crls, Issued, SpiffeId, Usage, parse_csr, request, verify_chain};

    const NOW: i64 = 1_800_000_000;

    fn leaf(authority: &Authority, now: i64) -> Issued {
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        let csr = parse_csr(&request(&id).unwrap().csr_pem).unwrap();
        Issued::parse(&authority.sign(&csr, &id, 0, now).unwrap(), &id).unwrap()
    }

    fn trusts(holder: &Issued, peer: &Issued, now: i64) -> bool {
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.unsigned_abs()));
        verify_chain(&peer.chain, &holder.roots, &Crls::default(), Usage::Client, at).is_ok()
    }

    #[test]
    fn holders_of_neighbouring_steps_trust_each_other_and_the_old_root_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let open = |now| Authority::open(path, now).unwrap();
        let before = open(NOW);
        assert_eq!(*before.rotation(), Rotation::Settled);
        let first = leaf(&before, NOW);

        announce(path, NOW + 10).unwrap();
        assert!(before.is_stale(path).unwrap());
        let announced = open(NOW + 10);
        assert!(!announced.is_stale(path).unwrap());
        let new = announced.roots().fingerprints()[1].clone();
        assert_eq!(*announced.rotation(), Rotation::Announced { new: new.clone(), since: NOW + 10 });
        assert_eq!(announced.rotation().safe_after(), Some(NOW + 10 + LEAF_LIFE_S));
        let second = leaf(&announced, NOW + 10);
        assert_eq!(announced.intermediate(), before.intermediate(), "the old root signs on");

        switch(path).unwrap();
        let switched = open(NOW + 20);
        assert!(announced.is_stale(path).unwrap());
        let old = before.roots().fingerprints()[0].clone();
        assert_eq!(*switched.rotation(), Rotation::Switched { old, since: NOW + 20 });
        let third = leaf(&switched, NOW + 20);

        retire(path, NOW + 30).unwrap();
        let settled = open(NOW + 30);
        assert_eq!(*settled.rotation(), Rotation::Settled);
        assert_eq!(settled.roots().fingerprints(), [new]);
        assert_eq!(settled.intermediate(), switched.intermediate(), "retiring signs nothing anew");
        let fourth = leaf(&settled, NOW + 30);

        let now = NOW + 40;
        for (a, b) in [(&first, &second), (&second, &third), (&third, &fourth)] {
            assert!(trusts(a, b, now) && trusts(b, a, now));
        }
        assert!(!trusts(&first, &third, now), "who missed the announcement does not know the new root");
        assert!(!trusts(&fourth, &first, now), "the old root is not trusted any more");
        for file in [NEXT_ROOT_KEY, OLD_ROOT_KEY] {
            assert!(!path.join(file).exists(), "{file}");
        }
    }

    #[test]
    fn steps_out_of_order_are_refused_and_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        Authority::open(path, NOW).unwrap();
        let refused = |result: Result<(), CaError>, text: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(switch(path), "announce one first");
        refused(retire(path, NOW), "no old root");
        announce(path, NOW).unwrap();
        refused(announce(path, NOW), "switch to it next");
        refused(retire(path, NOW), "no old root");
        switch(path).unwrap();
        refused(announce(path, NOW), "retire its old root first");
        refused(switch(path), "announce one first");
        refused(retire(path, NOW), "would end with the old root");
        Authority::open(path, NOW).unwrap();
        retire(path, NOW).unwrap();
        std::fs::remove_file(path.join(ROOT_KEY)).unwrap();
        refused(announce(path, NOW), "it is missing");
        assert_eq!(Authority::open(path, NOW).unwrap().roots().certificates().len(), 1);
    }

    #[test]
    fn a_step_that_died_is_completed_by_doing_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        Authority::open(path, NOW).unwrap();
        // Died after the key was written, before the bundle.
        files::make_key(&path.join(NEXT_ROOT_KEY)).unwrap();
        assert_eq!(*Authority::open(path, NOW).unwrap().rotation(), Rotation::Settled);
        announce(path, NOW).unwrap();
        // Died after the old key was kept, before the rename.
        std::fs::copy(path.join(ROOT_KEY), path.join(OLD_ROOT_KEY)).unwrap();
        let open = Authority::open(path, NOW).unwrap();
        assert!(matches!(open.rotation(), Rotation::Announced { .. }), "{:?}", open.rotation());
        switch(path).unwrap();
        assert!(matches!(Authority::open(path, NOW).unwrap().rotation(), Rotation::Switched { .. }));
        // Died after the bundle, before the key was removed.
        let key = std::fs::read(path.join(OLD_ROOT_KEY)).unwrap();
        retire(path, NOW).unwrap();
        std::fs::write(path.join(OLD_ROOT_KEY), key).unwrap();
        assert_eq!(*Authority::open(path, NOW).unwrap().rotation(), Rotation::Settled);
        retire(path, NOW).unwrap();
        announce(path, NOW).unwrap();
    }

    #[test]
    fn the_intermediate_is_made_anew_on_demand() {
        let dir = tempfile::tempdir().unwrap();
        let first = Authority::open(dir.path(), NOW).unwrap();
        renew_intermediate(dir.path()).unwrap();
        let second = Authority::open(dir.path(), NOW).unwrap();
        assert_ne!(first.intermediate(), second.intermediate());
        assert_eq!(first.roots(), second.roots());
        assert!(trusts(&leaf(&first, NOW), &leaf(&second, NOW), NOW));
    }
}
