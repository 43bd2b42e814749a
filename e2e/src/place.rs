//! Where a process runs: the network namespace it enters, and the files of `/etc` it sees instead of the machine's.
//!
//! The same steps serve a child that the lab starts (between fork and exec) and `lab exec`, which enters and then
//! becomes the command. Everything that allocates happens in [`Placement::prepare`], because after a fork of a process
//! with threads only plain system calls are safe. Limits: the file system is the machine's own, but for two files.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;

/// Where a process runs.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Network namespace to enter; none = the caller's.
    pub netns: Option<PathBuf>,
    /// Directory with `resolv.conf` and `hosts` to be seen under `/etc`; none = the machine's own.
    pub etc: Option<PathBuf>,
    /// Host name to be seen; none = the machine's own. Takes effect with `etc` only.
    pub hostname: Option<String>,
}

/// A placement with everything opened and allocated, ready for the steps between fork and exec.
#[derive(Debug)]
pub struct Prepared {
    netns: Option<File>,
    binds: Vec<(CString, CString)>,
    hostname: Option<CString>,
}

impl Placement {
    /// Opens the namespace and forms the paths. Fails when the namespace is gone or `/etc` lacks a file to mount over.
    pub fn prepare(&self) -> io::Result<Prepared> {
        let netns = match &self.netns {
            Some(path) => Some(File::open(path).map_err(|error| named(path, error))?),
            None => None,
        };
        let mut binds = Vec::new();
        if let Some(etc) = &self.etc {
            for name in ["resolv.conf", "hosts"] {
                let over = Path::new("/etc").join(name);
                let over = over.canonicalize().map_err(|error| {
                    named(&over, io::Error::new(error.kind(), format!("{error}; an empty file is enough")))
                })?;
                binds.push((c_path(&etc.join(name))?, c_path(&over)?));
            }
        }
        let hostname = self.hostname.as_ref().map(|name| CString::new(name.as_str())).transpose()?;
        Ok(Prepared { netns, binds, hostname })
    }

    /// Lets `command` start there, in a process group of its own, and die when the calling thread does.
    pub fn apply(&self, command: &mut Command) -> io::Result<()> {
        let prepared = self.prepare()?;
        command.process_group(0);
        before_exec(command, move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The supervisor waits for its signals by blocking them; its children must get theirs.
            SigSet::empty().thread_set_mask()?;
            prepared.enter()
        });
        Ok(())
    }
}

impl Prepared {
    /// Moves the calling thread there. Plain system calls only.
    pub fn enter(&self) -> io::Result<()> {
        if let Some(netns) = &self.netns {
            nix::sched::setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        if self.binds.is_empty() {
            return Ok(());
        }
        nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
        let none: Option<&std::ffi::CStr> = None;
        nix::mount::mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        for (from, over) in &self.binds {
            nix::mount::mount(Some(from.as_c_str()), over.as_c_str(), none, MsFlags::MS_BIND, none)?;
        }
        if let Some(hostname) = &self.hostname {
            set_hostname(hostname)?;
        }
        Ok(())
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[allow(unsafe_code)]
fn before_exec(command: &mut Command, steps: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the only steps given are in `Placement::apply`: system calls on memory prepared before the fork. They
    // neither allocate nor take a lock.
    unsafe { command.pre_exec(steps) };
}

#[allow(unsafe_code)]
fn set_hostname(name: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: pointer and length describe the bytes of `name`, which outlives the call.
    let code = unsafe { libc::sethostname(name.as_ptr(), name.to_bytes().len()) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
