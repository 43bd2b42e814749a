//! Where the Kubernetes programs of the tests are: the folder that `KUBEBUILDER_ASSETS` names, else the user's cache,
//! into which `.ci/kube.sh` builds them.
//!
//! The cache is named after the sum of what they are built from, so that a new version is another folder and an old
//! build is never taken for it. etcd comes from the system. Limits: nothing is built here; a test that finds no API
//! server says which command makes one.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::topology;

/// What the programs are built from, as `.ci/kube.sh` reads it.
const SUMS: &[u8] = include_bytes!("../../kube/go.sum");

/// The folder of the cache for this version.
pub fn cache() -> Option<PathBuf> {
    cache_of("kube", SUMS)
}

/// The folder of the cache for programs that are built from a module with these sums.
pub fn cache_of(name: &str, sums: &[u8]) -> Option<PathBuf> {
    let own = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let cache = own.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let sum: String = Sha256::digest(sums).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Some(cache.join("tulle").join(name).join(sum))
}

/// A program by name, such as `kube-apiserver` or `etcd`.
///
/// # Errors
/// Where it was looked for, and how to get it.
pub fn find(name: &str) -> Result<PathBuf, String> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let mut folders: Vec<PathBuf> = assets.into_iter().chain(cache()).collect();
    if name == "etcd" {
        folders.extend(std::env::split_paths(&topology::search_path()));
    }
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| match name {
        "etcd" => "there is no etcd; run .ci/tools.sh all, or install the package etcd-server".to_owned(),
        _ => {
            let places: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
            format!(
                "there is no {name} in {}; build it with .ci/kube.sh, or name a folder in KUBEBUILDER_ASSETS",
                places.join(" or ")
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use crate::kube::programs::{cache, find};

    #[test]
    fn the_cache_is_named_after_what_is_built() {
        let Some(cache) = cache() else { return };
        let name = cache.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        assert!(name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
        assert!(find("no-such-program").unwrap_err().contains(".ci/kube.sh"));
    }
}
