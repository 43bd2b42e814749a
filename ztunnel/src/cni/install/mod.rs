//! Putting the plugin into the node's chain, keeping it there, and taking it out.
//!
//! Our list is a file of our own that sorts first, made of whatever the node's network has; it is made again whenever that
//! changes ([`Keeper`]), and stays over reboots, when it is read before anything of ours runs. The order of steps is the
//! whole point: a configuration never names a program that is not there, and one that was killed between any two steps, coming or
//! going, leaves a node on which pods outside of the mesh start. What cannot be done is said with what to change, and tried again.

pub mod primary;
mod program;
pub mod uninstall;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use notify::Watcher as _;
use serde_json::json;

use crate::cni::conf::PLUGIN;
use crate::cni::files;
use crate::cni::kubeconfig::{self, Access, FILE_MAX};
use primary::{Candidate, Choice, OWN, choose, is_configuration, primary_of};

/// How often everything is looked at again: tokens are replaced without an event, and notifications can be lost.
const POLL: Duration = Duration::from_secs(30);
/// A change is rarely alone; what writes a configuration writes a file or two more.
const SETTLE: Duration = Duration::from_millis(100);
/// How long our list stays when what it was made of is gone: networks replace their file by removing and writing it.
const GRACE: Duration = Duration::from_secs(20);
/// Configurations of a folder that are looked at; nodes have one or two.
const FILES_MAX: usize = 128;
/// Longest configuration that is read.
const CONFIGURATION_MAX: u64 = 1 << 20;
/// In the state folder while the plugin is being uninstalled: nobody puts anything back.
pub const GOING: &str = "uninstalling";
/// In the state folder, locked by who looks.
pub const LOCK: &str = "lock";
/// What Cilium adds to the names of configurations that it takes away (`cni.exclusive`).
const CILIUM: &str = ".cilium_bak";

/// Where the plugin is installed, and what it is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The program to install.
    pub program: PathBuf,
    /// Folder of plugins.
    pub bin_dir: PathBuf,
    /// Folder of configurations.
    pub conf_dir: PathBuf,
    /// Folder of what the plugin knows.
    pub state_dir: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The mesh's root namespace.
    pub root_namespace: String,
    /// Where the way to the API server is taken from.
    pub api: ApiSource,
    /// The node's own files, as its first process sees them.
    pub node_root: PathBuf,
}

/// Where the way to the API server is taken from.
#[derive(Clone, Debug)]
pub enum ApiSource {
    /// A kubeconfig.
    File(PathBuf),
    /// What Kubernetes gives a pod.
    Pod {
        /// KUBERNETES_SERVICE_HOST.
        host: String,
        /// KUBERNETES_SERVICE_PORT.
        port: String,
        /// Folder with `token` and `ca.crt`.
        folder: PathBuf,
    },
    /// There is none: while the agent is away, what it wrote last decides alone.
    None,
}

/// How it stands with our list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is in force, made of this file.
    Installed(String),
    /// There is nothing to chain to yet.
    Waiting(String),
    /// It stays as it was.
    Kept(String),
    /// It could not be made, or is not used, and somebody has to change something.
    Failed(String),
    /// It was taken out, for good.
    Uninstalled,
}

/// What one look came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How it stands.
    pub state: State,
    /// What else is not as it should be.
    pub notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Installed(primary) => write!(f, "installed behind {primary}")?,
            State::Waiting(why) => write!(f, "waiting: {why}")?,
            State::Kept(why) => write!(f, "kept: {why}")?,
            State::Failed(why) => write!(f, "not installed: {why}")?,
            State::Uninstalled => f.write_str("uninstalled")?,
        }
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub struct Memory {
    /// Since when there is nothing to chain to.
    nothing_since: Option<Instant>,
    /// When our list was last put back where Cilium had taken it away.
    put_back: Option<Instant>,
    /// The program was copied. Once is enough: another one that appears later is a newer agent's, which takes over.
    copied: bool,
    /// What our list was to be the last time; the same reason.
    composed: String,
}

/// Forgets that the plugin was on its way out, so that it can be installed.
///
/// # Errors
/// What cannot be written, and what to do.
pub fn begin(settings: &Settings) -> Result<(), String> {
    files::make_folder(&settings.state_dir, 0o700)?;
    files::remove(&settings.state_dir.join(GOING)).map(drop)
}

/// Brings everything to what it should be, once.
pub fn once(settings: &Settings, memory: &mut Memory, now: Instant) -> Report {
    let lock = lock(&settings.state_dir);
    if lock.is_none() || settings.state_dir.join(GOING).exists() {
        return Report { state: State::Uninstalled, notes: Vec::new() };
    }
    let mut notes = Vec::new();
    if let Err(why) = write_kubeconfig(settings) {
        notes.push(format!("while the agent is away the plugin cannot ask the API server: {why}"));
    }
    let state = match program(settings, memory) {
        Ok(()) => chain(settings, memory, now),
        // Without its program a list would keep every pod from starting.
        Err(why) => State::Failed(why),
    };
    Report { state, notes }
}

/// Held during a look, so that who uninstalls knows when the last one is over. `None`: the folder is gone.
fn lock(state_dir: &Path) -> Option<File> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(state_dir.join(LOCK)).ok()?;
    file.lock().ok()?;
    Some(file)
}

fn program(settings: &Settings, memory: &mut Memory) -> Result<(), String> {
    let copy = settings.bin_dir.join(PLUGIN);
    if memory.copied && copy.exists() {
        return Ok(());
    }
    program::runs_on(&settings.program, &settings.node_root)?;
    files::make_folder(&settings.bin_dir, 0o755)?;
    files::copy_program(&settings.program, &copy)?;
    memory.copied = true;
    Ok(())
}

fn chain(settings: &Settings, memory: &mut Memory, now: Instant) -> State {
    let folder = &settings.conf_dir;
    if !folder.exists() {
        let text = "is not there yet; TULLE_CNI_CONF_DIR has to be the folder that the container runtime reads";
        return State::Waiting(format!("{} {text}", folder.display()));
    }
    let listed = match list(folder) {
        Ok(listed) => listed,
        Err(why) => return State::Failed(why),
    };
    let own = OWN.iter().find_map(|name| files::read_bounded(&folder.join(name), CONFIGURATION_MAX).ok());
    let last = own.and_then(|text| primary_of(&String::from_utf8(text).ok()?));
    let fields = json!({
        "socket": settings.socket,
        "stateDir": settings.state_dir,
        "rootNamespace": settings.root_namespace,
    });
    let choice = choose(listed.configurations, last.as_deref(), &fields);
    if !matches!(choice, Choice::Nothing(_)) {
        memory.nothing_since = None;
    }
    match choice {
        Choice::Keep(why) => State::Kept(why),
        Choice::Refuse(why) => withdraw(folder, why),
        Choice::Nothing(why) => {
            let since = *memory.nothing_since.get_or_insert(now);
            if last.is_some() && now.saturating_duration_since(since) < GRACE {
                return State::Kept(why);
            }
            // The network is gone; a list of its plugins would only look like one.
            match remove_lists(folder) {
                Ok(()) => State::Waiting(why),
                Err(error) => State::Failed(error),
            }
        }
        Choice::Chain(chain) => {
            let taken = OWN.iter().any(|name| listed.names.contains(&format!("{name}{CILIUM}")));
            let missing = !listed.names.contains(chain.name);
            if taken && missing && memory.put_back.is_some_and(|at| now.saturating_duration_since(at) < POLL) {
                return State::Failed(cilium());
            }
            // A list that leads to us and is not what it was to be is that of a newer agent, which runs beside this one.
            let theirs = memory.composed == chain.text && last.as_ref() == Some(&chain.primary) && !missing;
            let written = if theirs {
                Ok(())
            } else {
                files::replace(&folder.join(chain.name), chain.text.as_bytes(), 0o600)
                    .and_then(|_| remove_others(folder, chain.name))
            };
            memory.composed = chain.text;
            match written {
                Err(why) => State::Failed(why),
                Ok(()) if taken && missing => {
                    memory.put_back = Some(now);
                    State::Failed(cilium())
                }
                Ok(()) => State::Installed(chain.primary),
            }
        }
    }
}

/// Our list would make pods fail, or stand behind another one: it is taken away, and why is said.
fn withdraw(folder: &Path, why: String) -> State {
    match remove_lists(folder) {
        Ok(()) => State::Failed(why),
        Err(error) => State::Failed(format!("{why}, and our list cannot be removed: {error}")),
    }
}

fn cilium() -> String {
    "Cilium renames every other CNI configuration (cni.exclusive), and ours too, so that pods begin outside of the mesh until the agent sees them; set cni.exclusive=false in Cilium's values".to_owned()
}

/// Removes our list under whatever name.
///
/// # Errors
/// What cannot be removed.
pub fn remove_lists(folder: &Path) -> Result<(), String> {
    remove_others(folder, "")
        .and_then(|()| OWN.iter().try_for_each(|name| files::remove(&folder.join(format!("{name}{CILIUM}"))).map(drop)))
}

fn remove_others(folder: &Path, kept: &str) -> Result<(), String> {
    OWN.iter().filter(|name| **name != kept).try_for_each(|name| {
        files::remove(&folder.join(name))?;
        files::remove(&files::temporary(&folder.join(name))).map(drop)
    })
}

/// What is in the folder of configurations.
struct Listed {
    names: BTreeSet<String>,
    configurations: Vec<Candidate>,
}

fn list(folder: &Path) -> Result<Listed, String> {
    let named = |error: io::Error| {
        format!("{}: {error}; give TULLE_CNI_CONF_DIR the folder that the container runtime reads", folder.display())
    };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(named)? {
        names.insert(entry.map_err(named)?.file_name().to_string_lossy().into_owned());
    }
    let wanted = names.iter().filter(|name| is_configuration(name) && !OWN.contains(&name.as_str()));
    let configurations = wanted.take(FILES_MAX).map(|name| {
        let bytes = files::read_bounded(&folder.join(name), CONFIGURATION_MAX);
        let text = bytes.and_then(|bytes| String::from_utf8(bytes).map_err(|_| "it is no text".to_owned()));
        Candidate { name: name.clone(), text }
    });
    let configurations = configurations.collect();
    Ok(Listed { names, configurations })
}

/// Writes the plugin's kubeconfig; the same one again is no write.
fn write_kubeconfig(settings: &Settings) -> Result<(), String> {
    let text = |path: &Path| {
        let bytes = files::read_bounded(path, FILE_MAX)?;
        String::from_utf8(bytes).map_err(|_| format!("{} is no text", path.display()))
    };
    let path = settings.state_dir.join(kubeconfig::FILE);
    let access = match &settings.api {
        ApiSource::File(file) => {
            let folder = file.parent().unwrap_or_else(|| Path::new("/"));
            Access::read(&text(file)?, folder, text).map_err(|why| format!("{}: {why}", file.display()))?
        }
        ApiSource::Pod { host, port, folder } => Access {
            server: if host.contains(':') {
                format!("https://[{host}]:{port}")
            } else {
                format!("https://{host}:{port}")
            },
            tls_server_name: None,
            roots: text(&folder.join("ca.crt"))?,
            token: Some(text(&folder.join("token"))?.trim().to_owned()),
            certificate: None,
        },
        ApiSource::None => return files::remove(&path).map(drop),
    };
    files::replace(&path, access.render().as_bytes(), 0o600).map(drop)
}

/// Keeps the plugin installed, on a thread of its own, until it is dropped or somebody uninstalls.
#[derive(Debug)]
pub struct Keeper {
    wake: SyncSender<Wake>,
    thread: Option<JoinHandle<()>>,
}

enum Wake {
    Look,
    Stop,
}

impl Keeper {
    /// Starts. `told` hears what every look came to, if it is not what the one before came to.
    ///
    /// # Errors
    /// That the system refuses a thread.
    pub fn start(settings: Settings, mut told: impl FnMut(&Report) + Send + 'static) -> io::Result<Self> {
        // One wake-up that waits is enough: a look sees everything.
        let (wake, woken) = sync_channel(1);
        let watching = watch(&settings, wake.clone());
        let work = move || {
            // Notifications end with it.
            let _watching = watching;
            let mut memory = Memory::default();
            let mut before = None;
            let mut begun = false;
            loop {
                let beginning = if begun { Ok(()) } else { begin(&settings) };
                begun |= beginning.is_ok();
                let report = match beginning {
                    Ok(()) => once(&settings, &mut memory, Instant::now()),
                    Err(why) => Report { state: State::Failed(why), notes: Vec::new() },
                };
                if before.as_ref() != Some(&report) {
                    told(&report);
                }
                if report.state == State::Uninstalled {
                    return;
                }
                before = Some(report);
                match woken.recv_timeout(POLL) {
                    Ok(Wake::Look) => thread::sleep(SETTLE),
                    Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        };
        let thread = thread::Builder::new().name("cni-install".into()).spawn(work)?;
        Ok(Self { wake, thread: Some(thread) })
    }

    /// Waits until somebody uninstalls.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.wake.send(Wake::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(settings: &Settings, wake: SyncSender<Wake>) -> Option<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading is an event too; a look reads.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = wake.try_send(Wake::Look);
        }
    })
    .ok()?;
    for folder in [&settings.conf_dir, &settings.bin_dir] {
        // A folder that is not there yet is found by the next look.
        let _ = watcher.watch(folder, notify::RecursiveMode::NonRecursive);
    }
    Some(watcher)
}

#[cfg(test)]
mod tests;
