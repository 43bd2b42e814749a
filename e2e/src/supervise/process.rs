//! One child process: started in its place with its log, noticed when it ends, ended with everything it started.
//!
//! Each child leads a process group and dies with the supervisor, so nothing survives a killed lab. Nothing is
//! restarted: an ended process is a fact to be shown. Limits: a child that leaves its group outlives its pod until the
//! supervisor ends.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::place::Placement;
use crate::topology;

/// What to start.
#[derive(Debug)]
pub struct Start<'a> {
    /// Program and arguments.
    pub argv: &'a [String],
    /// The whole environment but `PATH`; nothing else is inherited.
    pub env: &'a BTreeMap<String, String>,
    /// Directory that comes first on `PATH`.
    pub bin: &'a Path,
    /// Where.
    pub placement: &'a Placement,
    /// Output is appended here.
    pub log: &'a Path,
}

/// A child process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    exited: Option<i32>,
    log: PathBuf,
}

impl Process {
    /// Starts a child. Fails when the program or the network namespace does not exist.
    pub fn start(start: &Start<'_>) -> anyhow::Result<Self> {
        let (program, arguments) = start.argv.split_first().context("an empty command")?;
        let path = path_with(start.bin);
        // Looked up here: the child's PATH is not the supervisor's.
        let resolved = if program.contains('/') {
            PathBuf::from(program)
        } else {
            std::env::split_paths(&path)
                .map(|dir| dir.join(program))
                .find(|file| file.is_file())
                .with_context(|| format!("{program}: no such program on this machine (images are ignored)"))?
        };
        let log = OpenOptions::new().create(true).append(true).open(start.log)?;
        let mut command = Command::new(&resolved);
        command.args(arguments).env_clear().envs(start.env).env("PATH", &path).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        start.placement.apply(&mut command)?;
        let child = command.spawn().with_context(|| format!("{} cannot be started", resolved.display()))?;
        Ok(Self { child, exited: None, log: start.log.to_path_buf() })
    }

    /// Process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.exited.is_none().then(|| self.child.id())
    }

    /// Exit code, or the negated signal, once it has ended.
    pub fn exited(&mut self) -> Option<i32> {
        if self.exited.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.exited = Some(status.code().unwrap_or_else(|| -status.signal().unwrap_or_default()));
            // Whatever it started ends with it.
            signal_group(self.child.id(), Signal::SIGKILL);
        }
        self.exited
    }

    /// The same as last seen.
    pub fn ended_with(&self) -> Option<i32> {
        self.exited
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Asks it to end; call [`Process::end`] later.
    pub fn ask_to_end(&self) {
        if let Some(pid) = self.pid() {
            signal_group(pid, Signal::SIGTERM);
        }
    }

    /// Waits until it has ended, and kills it at `deadline`.
    pub fn end(&mut self, deadline: Instant) {
        while self.exited().is_none() {
            if Instant::now() >= deadline {
                signal_group(self.child.id(), Signal::SIGKILL);
                let _ = self.child.wait();
                self.exited = Some(-(Signal::SIGKILL as i32));
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Instant::now());
    }
}

/// Sends a signal to a process group that this lab made.
pub fn signal_group(leader: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(leader) {
        // Gone already is as good.
        let _ = nix::sys::signal::killpg(Pid::from_raw(pid), signal);
    }
}

/// The supervisor's search path with `bin` before it.
pub fn path_with(bin: &Path) -> std::ffi::OsString {
    let mut path = bin.as_os_str().to_owned();
    path.push(":");
    path.push(topology::search_path());
    path
}

/// Whether anything in the network namespace of process `pid` listens on all of `ports`.
///
/// Read from the kernel's tables instead of by connecting: a connection would show up in the application's log and
/// could be captured.
pub fn listens(pid: u32, ports: &[u16]) -> bool {
    let mut listening = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        listening.extend(text.lines().skip(1).filter_map(listening_port));
    }
    ports.iter().all(|port| listening.contains(port))
}

fn listening_port(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    if state != "0A" {
        return None;
    }
    u16::from_str_radix(local.rsplit(':').next()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use crate::supervise::process::listening_port;

    #[test]
    fn only_listening_sockets_count() {
        let line = "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1";
        assert_eq!(listening_port(line), Some(8080));
        assert_eq!(listening_port(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening_port("junk"), None);
    }
}
