//! The CA directory as one value, for who keeps a copy elsewhere: all its files, read and written under its lock.
//!
//! Several replicas share one authority through such a copy. Only files of the authority are looked at; whatever else lies
//! in the directory stays out of the copy and is left alone. Limits: a directory is replaced file by file, so a process
//! that dies in between leaves it for the next [`write`], which ends it; nobody else reads without the lock but for
//! certificates, which are looked at again under it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::ca::CaError;
use crate::ca::files::{self, CA_CERT, CA_KEY, CRL, NEXT_ROOT_KEY, OLD_ROOT_KEY, ROOT_CERT, ROOT_KEY, TOKEN_KEY, io};
use crate::ca::replaced;

/// Content by file name. No `Debug`: there are keys in it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Files(pub BTreeMap<String, String>);

/// Every file of an authority, keys before the certificates that need them.
const ALL: [&str; 9] =
    [TOKEN_KEY, ROOT_KEY, NEXT_ROOT_KEY, OLD_ROOT_KEY, ROOT_CERT, replaced::FILE, CA_KEY, CA_CERT, CRL];

impl Files {
    /// Whether it holds an authority that a process could open without making a new one.
    pub fn is_authority(&self) -> bool {
        [ROOT_CERT, CA_CERT, CA_KEY, TOKEN_KEY].iter().all(|file| self.0.contains_key(*file))
    }

    /// Names that are no file of an authority; none of them is ever written.
    pub fn strangers(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).filter(|name| !ALL.contains(name)).collect()
    }
}

/// Reads the files that are there.
///
/// # Errors
/// If the directory cannot be locked or a file cannot be read.
pub fn read(dir: &Path) -> Result<Files, CaError> {
    std::fs::create_dir_all(dir).map_err(|source| io("create", dir, source))?;
    let _lock = files::lock(dir)?;
    let mut all = BTreeMap::new();
    for name in ALL {
        if let Some(text) = files::read_at_most(&dir.join(name), most(name))? {
            all.insert(name.to_owned(), text);
        }
    }
    Ok(Files(all))
}

fn most(name: &str) -> u64 {
    if name == CRL { crate::MAX_CRL_BYTES as u64 } else { files::MAX_FILE_BYTES }
}

/// Makes the directory hold these files, mode 0600, and no other ones of an authority.
///
/// # Errors
/// If the directory cannot be locked or a file cannot be written.
pub fn write(dir: &Path, files: &Files) -> Result<(), CaError> {
    std::fs::create_dir_all(dir).map_err(|source| io("create", dir, source))?;
    let _lock = files::lock(dir)?;
    for name in ALL {
        let path = dir.join(name);
        match files.0.get(name) {
            // Whoever watches a file is not woken for nothing.
            Some(text) if files::read_at_most(&path, most(name))?.as_ref() == Some(text) => {}
            Some(text) => files::write(&path, text, 0o600)?,
            None => match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io("remove", &path, source));
                }
                _ => {}
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::ca::{Authority, rotate};

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn a_copy_is_the_same_authority_through_all_steps_of_a_rotation() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second) = (first.path(), second.path());
        assert!(!read(first).unwrap().is_authority());
        std::fs::write(second.join("other"), "stays").unwrap();
        let same = |step: &str| {
            Authority::open(first, NOW).unwrap();
            let files = read(first).unwrap();
            assert!(files.is_authority() && files.strangers().is_empty(), "{step}");
            write(second, &files).unwrap();
            assert!(read(second).unwrap() == files, "{step}");
            let (a, b) = (Authority::open(first, NOW).unwrap(), Authority::open(second, NOW).unwrap());
            assert_eq!(a.intermediate(), b.intermediate(), "{step}");
            assert_eq!(a.rotation(), b.rotation(), "{step}");
            assert_eq!(a.roots().fingerprints(), b.roots().fingerprints(), "{step}");
            assert!(read(second).unwrap() == files, "{step}: opening it makes nothing new");
        };
        same("made");
        rotate::announce(first, NOW).unwrap();
        same("announced");
        rotate::switch(first).unwrap();
        same("switched");
        rotate::retire(first, NOW).unwrap();
        same("retired");
        assert_eq!(std::fs::read_to_string(second.join("other")).unwrap(), "stays");
        let mode = std::fs::metadata(second.join(ROOT_KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
