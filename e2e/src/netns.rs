//! Network namespaces without mounts: the process that creates one keeps it alive by an open file, and everybody else
//! reaches it through a link `<state>/netns/<name>` to `/proc/<pid>/fd/<n>`.
//!
//! Bind mounts, as `ip netns` makes them, would outlive a killed lab and need a mount namespace shared with every
//! reader. A link to the descriptor needs neither: when the owner dies, so do its namespaces, and any process that may
//! look into the owner's `/proc` entry can enter them. Limits: the links are dead once the owner is gone.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use nix::sched::CloneFlags;

/// A network namespace that lives as long as this value.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    path: PathBuf,
}

impl NetNs {
    /// Creates a namespace and the link `<dir>/<name>` to it.
    ///
    /// Fails when the process lacks CAP_SYS_ADMIN in its user namespace, or the link cannot be written.
    pub fn create(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let file = std::thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<File> {
                    nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
                    File::open("/proc/thread-self/ns/net")
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the creating thread panicked")))
        })
        .with_context(|| {
            format!("network namespace {name} cannot be created; the kernel allows it to root, or to a user who may make user namespaces")
        })?;
        let path = dir.join(name);
        let target = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{} cannot be replaced", path.display()));
            }
            _ => {}
        }
        std::os::unix::fs::symlink(&target, &path).with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(Self { file, path })
    }

    /// The link by which other processes reach the namespace.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` on a thread inside the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        run_in(&self.file, f)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // The link is a convenience for others; a stale one points at a closed descriptor and is refused on opening.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Runs `f` on a thread inside the namespace at `path`, and waits for it.
///
/// A thread of its own, because a namespace belongs to a thread and the caller's must not change.
pub fn in_netns<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    let file = File::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("network namespace {}: {error}", path.display())))?;
    run_in(&file, f)
}

fn run_in<T: Send>(file: &File, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(f())
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
