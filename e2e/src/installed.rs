//! Programs of other people that tests run: where they are, and what they need so as to run as root in a namespace of a test.
//!
//! Distributions put servers and their libraries into folders that are in nobody's `PATH`, so those are looked through, too. What is
//! missing is a failure where `CI` is set, since a test that is skipped proves nothing there.

use std::path::{Path, PathBuf};

/// PostgreSQL and sshd refuse to be root, and want a name for who they are ([`write_names`]). For the front of a command.
pub const AS_USER: &str = "exec unshare --user --map-user=1000 --map-group=1000 \
                           env LD_PRELOAD=libnss_wrapper.so NSS_WRAPPER_PASSWD=$D/passwd NSS_WRAPPER_GROUP=$D/group HOME=$D";

/// The user of [`AS_USER`], as files in `folder`.
///
/// # Errors
/// A file cannot be written.
pub fn write_names(folder: &Path) -> std::io::Result<()> {
    std::fs::write(folder.join("passwd"), format!("tulle:x:1000:1000::{}:/bin/sh\n", folder.display()))?;
    std::fs::write(folder.join("group"), "tulle:x:1000:\n")
}

/// Whether all of these programs, libraries (`….so`) or folders below `/usr/lib` are here; says which one is missing.
///
/// # Panics
/// When one is missing and `CI` is set.
pub fn all(needs: &[&str]) -> bool {
    needs.iter().all(|program| {
        let found = find(program).is_some() || Path::new("/usr/lib").join(program).is_dir();
        if !found {
            assert!(std::env::var_os("CI").is_none(), "{program} is not installed; .ci/tools.sh installs it");
            eprintln!("SKIPPED: {program} is not installed");
        }
        found
    })
}

/// Where a program or library is.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/sbin", "/sbin"]).map(PathBuf::from);
    let postgres = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let library = if program.ends_with(".so") { libraries() } else { Vec::new() };
    folders
        .chain(postgres.map(|version| version.path().join("bin")))
        .chain(library)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Where Debian-like systems have libraries for any architecture.
fn libraries() -> Vec<PathBuf> {
    let lib = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    lib.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with("-linux-gnu")).collect()
}

/// A shell script that runs in `dir`, which is its `$D`, and finds all programs.
pub fn prepared(script: &str, dir: &Path) -> String {
    let postgres = find("initdb").and_then(|path| path.parent().map(Path::to_path_buf)).unwrap_or_default();
    format!("D={}; PATH=$PATH:/usr/sbin:/sbin:{}; export D PATH; cd $D\n{script}", dir.display(), postgres.display())
}
