//! Entering and re-entering the one user namespace in which a lab of an unprivileged user runs.
//!
//! The supervisor makes it (user, mount and network namespace at once, its own uid and gid mapped to 0 and nothing
//! else) and replaces itself; other commands join it by the supervisor's pid. All of it must happen before the process
//! has a second thread, which the kernel demands. Limits: one uid, so files of others appear as `nobody`'s.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use nix::sched::CloneFlags;

/// Set in the environment of the process that has entered.
const ENTERED: &str = "LAB_ENTERED";

/// Whether the calling user needs the namespace, or is in it already.
pub fn is_rootless() -> bool {
    std::env::var_os(ENTERED).is_some() || !nix::unistd::geteuid().is_root()
}

/// Makes the namespaces and runs this program again inside them; returns at once when inside, or root.
pub fn enter_new() -> anyhow::Result<()> {
    if std::env::var_os(ENTERED).is_some() || nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context(
        "no user namespace; the kernel may forbid them to users (user.max_user_namespaces, \
         kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns): allow them or run as root",
    )?;
    // The kernel wants setgroups denied before an unprivileged gid map.
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    let program = std::env::current_exe().context("the path of this program is unknown")?;
    let error = Command::new(program).args(std::env::args_os().skip(1)).env(ENTERED, "1").exec();
    Err(error).context("this program cannot be run again inside its namespaces")
}

/// Joins the user namespace of process `pid`, for a command of the same user.
pub fn join(pid: u32) -> anyhow::Result<()> {
    let file = File::open(format!("/proc/{pid}/ns/user")).with_context(|| {
        format!("the lab's supervisor (pid {pid}) cannot be looked into; is it another user's lab?")
    })?;
    nix::sched::setns(file.as_fd(), CloneFlags::CLONE_NEWUSER).context("the lab's user namespace cannot be joined")
}

fn write(path: &str, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{path} cannot be written"))
}
