//! One machine of the cluster, played by namespaces: its own processes, network, mounts and host name; the kernel is
//! shared.
//!
//! A *keeper* makes the namespaces and its only child becomes the machine's first process, so that ending the keeper
//! (or that process) is a power cut: the kernel ends everything inside, and mounts and links go with it. Nothing of it
//! can outlive its machine, and nothing has to be found again to be stopped. What a machine writes below the places of
//! [`DISKS`] and `/etc` is kept in its folder and is there after the next start, as a disk would. Kernel settings that a
//! kubelet wants are shown to it as if they were so, since they belong to the whole machine and not to this cluster.
//! Limits: it takes root; all other files are the machine's own.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde::Serialize;

use crate::cluster::layout::Machine;
use crate::eventually::eventually;
use crate::topology;

/// Places that a node writes to and that outlive a reboot.
const DISKS: [&str; 7] = [
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/lib/tulle",
    "/var/log/pods",
    "/var/log/containers",
    "/opt/cni/bin",
];
/// Folders of the machine that are hidden by empty ones, so that the places above can be put there. The cluster's own
/// folder and programs cannot be below them.
pub const HIDDEN: [&str; 4] = ["/run", "/var/lib", "/var/log", "/opt"];
/// What a kubelet sets, and would set for the whole machine.
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
/// The link to the fabric is made from outside right after the namespace.
const LINK_WAIT: Duration = Duration::from_secs(30);
/// Between two tries of a command.
const AGAIN: Duration = Duration::from_millis(200);

/// What a machine becomes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Host name.
    pub name: String,
    /// Files of its own, written at each start.
    pub files: BTreeMap<PathBuf, String>,
    /// Input of `ip -batch`.
    pub network: String,
    /// The link `eth0` comes from outside.
    pub linked: bool,
    /// Name of the cgroup that its kubelet divides; empty = none.
    pub cgroup: String,
    /// What is run, in this order.
    pub steps: Vec<Step>,
}

/// One thing to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Until it ends well; tried again for so many seconds.
    Run {
        /// Program and arguments.
        argv: Vec<String>,
        /// Seconds.
        within: u64,
    },
    /// And left running.
    Start {
        /// Name of its log.
        name: String,
        /// Program and arguments.
        argv: Vec<String>,
    },
}

impl Step {
    /// A command that ends.
    pub fn run(argv: &[&str], within: u64) -> Self {
        Self::Run { argv: argv.iter().map(|word| (*word).to_owned()).collect(), within }
    }

    /// A program that stays.
    pub fn start(name: &str, argv: Vec<String>) -> Self {
        Self::Start { name: name.to_owned(), argv }
    }
}

/// `lab cluster keep`: makes the machine and waits for its end.
///
/// With `tied`, the machine ends with standard input.
///
/// # Errors
/// When the namespaces cannot be made, which takes root.
pub fn keep(folder: &Path, tied: bool) -> anyhow::Result<()> {
    let machine = Machine(folder.to_path_buf());
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS;
    nix::sched::unshare(namespaces).context("a machine's namespaces cannot be made; that takes root")?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["cluster", "init"]).arg(folder);
    // It is the child that watches the input: this process can start no thread any more.
    match tied {
        true => command.arg("--tied").stdin(Stdio::inherit()),
        false => command.stdin(Stdio::null()),
    };
    let mut init = command.spawn().context("the machine's first process cannot be started")?;
    fs::write(machine.init(), init.id().to_string())?;
    let status = init.wait()?;
    eprintln!("the machine has ended: {status}");
    Ok(())
}

/// Ends a machine's first process, and with it the machine.
pub fn end(init: u32) {
    if let Ok(pid) = i32::try_from(init) {
        // Gone already is as good.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// `lab cluster init`: the first process of the machine.
///
/// # Errors
/// When a step fails, after it was written down for who waits.
pub fn init(folder: &Path, tied: bool) -> anyhow::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if tied {
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            // The first process ends, and the kernel ends all others.
            std::process::exit(0);
        });
    }
    let machine = Machine(folder.to_path_buf());
    let spec: Spec = serde_json::from_str(&fs::read_to_string(machine.spec())?)?;
    let result = boot(&machine, &spec);
    let said = result.as_ref().map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned());
    fs::write(machine.booted(), said)?;
    result?;
    loop {
        // What its parents left behind is everybody's last duty here.
        match nix::sys::wait::wait() {
            Ok(status) => eprintln!("ended: {status:?}"),
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

fn boot(machine: &Machine, spec: &Spec) -> anyhow::Result<()> {
    mounts(machine)?;
    fs::write("/proc/sys/kernel/hostname", &spec.name)?;
    for (path, text) in &spec.files {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    make_cgroup(&spec.cgroup)?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    if spec.linked {
        eventually("the link eth0", LINK_WAIT, || {
            let links = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
            if links.contains("eth0:") { Ok(()) } else { Err(links) }
        })?;
    }
    topology::ip(Path::new("/proc/self/ns/net"), &spec.network)?;
    fs::create_dir_all(machine.logs())?;
    spec.steps.iter().try_for_each(|step| take(machine, step))
}

fn take(machine: &Machine, step: &Step) -> anyhow::Result<()> {
    match step {
        Step::Start { name, argv } => {
            let log =
                fs::OpenOptions::new().create(true).append(true).open(machine.logs().join(format!("{name}.log")))?;
            let mut command = command(argv)?;
            command.process_group(0).stdout(log.try_clone()?).stderr(log);
            command.spawn().with_context(|| format!("{argv:?} cannot be started"))?;
            Ok(())
        }
        Step::Run { argv, within } => {
            let deadline = Instant::now() + Duration::from_secs(*within);
            loop {
                let output = command(argv)?.output().with_context(|| format!("{argv:?} cannot be run"))?;
                if output.status.success() {
                    return Ok(());
                }
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                anyhow::ensure!(Instant::now() < deadline, "{argv:?}: {}: {}", output.status, said.trim());
                std::thread::sleep(AGAIN);
            }
        }
    }
}

fn command(argv: &[String]) -> anyhow::Result<Command> {
    let (program, arguments) = argv.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", topology::search_path()).env("HOME", "/root").stdin(Stdio::null());
    Ok(command)
}

fn mounts(machine: &Machine) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    nix::mount::mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("/proc")?;
    let (upper, work) = (machine.disk("/etc"), machine.disk("/.etc-work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let layers = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    nix::mount::mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
        .context("an overlay over /etc; the kernel may lack overlayfs")?;
    for place in HIDDEN {
        nix::mount::mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context(place)?;
    }
    for place in DISKS {
        let disk = machine.disk(place);
        fs::create_dir_all(&disk)?;
        fs::create_dir_all(place)?;
        nix::mount::mount(Some(&disk), place, none, MsFlags::MS_BIND, none).context(place)?;
    }
    fs::create_dir_all("/run/lock")?;
    fs::create_dir_all("/run/netns")?;
    for (name, value) in SETTINGS {
        let shown = Path::new("/run/settings").join(name);
        fs::create_dir_all(shown.parent().unwrap_or_else(|| Path::new("/run")))?;
        fs::write(&shown, format!("{value}\n"))?;
        let real = Path::new("/proc/sys").join(name);
        if real.exists() {
            nix::mount::mount(Some(&shown), &real, none, MsFlags::MS_BIND, none).context(name)?;
        }
    }
    // Containers see mounts that appear later only where their source is shared.
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)?;
    Ok(())
}

/// Where a cgroup of this name is: one place with version 2, one for each controller with version 1.
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if name.is_empty() {
        return vec![];
    }
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(name)];
    }
    let mounted = fs::read_dir(root).into_iter().flatten().flatten();
    mounted.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|it| it.path().join(name)).collect()
}

/// What a kubelet would change, as it is on this machine.
pub fn settings() -> BTreeMap<String, String> {
    let value = |name: &str| fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
    SETTINGS.iter().map(|(name, _)| ((*name).to_owned(), value(name))).collect()
}

fn make_cgroup(name: &str) -> anyhow::Result<()> {
    for path in cgroups(name) {
        fs::create_dir_all(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        for setting in ["cpuset.cpus", "cpuset.mems"] {
            // Without processors of its own, a group of version 1 takes no process.
            if let Some(all) = path.parent().and_then(|parent| fs::read_to_string(parent.join(setting)).ok())
                && path.join(setting).exists()
            {
                let _ = fs::write(path.join(setting), all.trim());
            }
        }
        if path.join("cgroup.subtree_control").exists() && path.join("cgroup.controllers").exists() {
            let controllers = "+cpu +cpuset +memory +pids +io";
            let parent = path.parent().unwrap_or_else(|| Path::new("/sys/fs/cgroup"));
            let _ = fs::write(parent.join("cgroup.subtree_control"), controllers);
            let _ = fs::write(path.join("cgroup.subtree_control"), controllers);
        }
    }
    Ok(())
}

/// Removes the cgroups of a machine that has ended; true when none is left.
pub fn remove_cgroup(name: &str) -> bool {
    fn remove(path: &Path) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path());
            }
        }
        // One that still has a process stays, and the caller sees that.
        let _ = fs::remove_dir(path);
    }
    cgroups(name).iter().for_each(|path| remove(path));
    cgroups(name).iter().all(|path| !path.exists())
}
