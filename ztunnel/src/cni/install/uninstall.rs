//! Taking the plugin out of a node: pods are released first, then the configuration goes, then the program that it names.
//!
//! Killed between any two steps, the node is one on which pods outside of the mesh start: as long as the configuration is there
//! its program is too, and the program tells such pods apart without the agent ([`crate::cni::away`]). Running it again goes on
//! where it stopped. A step that fails does not keep the later ones from being done, since each of them leaves less behind; what
//! failed is said at the end. The folders of the node's network are then as they were before, byte for byte.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::base::netns::{Netns, run_waiting};
use crate::capture;
use crate::cni::conf::PLUGIN;
use crate::cni::install::{GOING, LOCK, Settings, lock, remove_lists};
use crate::cni::{KNOWN_FILE, files, journal, kubeconfig};

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Whoever keeps the plugin installed stops.
    Announce,
    /// No pod's traffic is redirected any more, and the node has none of our tables.
    Release,
    /// Runtimes read the network's own configuration again.
    Configuration,
    /// The program is gone.
    Program,
    /// What the plugin knew is gone.
    State,
}

/// All of them, in their order.
pub const STEPS: [Step; 5] = [Step::Announce, Step::Release, Step::Configuration, Step::Program, Step::State];

impl Step {
    /// What it did, for people.
    pub fn done(self) -> &'static str {
        match self {
            Self::Announce => "nobody puts the plugin back",
            Self::Release => "pods are released",
            Self::Configuration => "the CNI configuration is the network's own",
            Self::Program => "the program is removed",
            Self::State => "nothing is left",
        }
    }

    /// Takes it. Again is harmless.
    ///
    /// # Errors
    /// What could not be done.
    pub fn take(self, settings: &Settings, proc: &Path) -> Result<(), String> {
        match self {
            Self::Announce => {
                files::make_folder(&settings.state_dir, 0o700)?;
                files::replace(&settings.state_dir.join(GOING), b"", 0o600)?;
                // Whoever looks after this sees it, and whoever looked before has finished.
                drop(lock(&settings.state_dir));
                Ok(())
            }
            Self::Release => release(proc),
            Self::Configuration => remove_lists(&settings.conf_dir),
            Self::Program => {
                let program = settings.bin_dir.join(PLUGIN);
                files::remove(&program)?;
                files::remove(&files::temporary(&program)).map(drop)
            }
            Self::State => state(&settings.state_dir),
        }
    }
}

/// Takes every step; `done` hears of each that succeeded.
///
/// # Errors
/// What could not be done, all of it.
pub fn run(settings: &Settings, proc: &Path, mut done: impl FnMut(Step)) -> Result<(), String> {
    let mut wrong = Vec::new();
    for step in STEPS {
        match step.take(settings, proc) {
            Ok(()) => done(step),
            Err(why) => wrong.push(why),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

/// Pods that are still captured have nobody who would serve them for long: their own traffic is theirs again.
fn release(proc: &Path) -> Result<(), String> {
    let own = Netns::open(&proc.join("self/ns/net")).map_err(|error| format!("own network namespace: {error}"))?;
    let all = || {
        let mut seen = BTreeSet::from([own.id()]);
        // They may have ended meanwhile. One at a time is open: there may be more than a process may open.
        let opened = namespaces(proc).into_iter().filter_map(|path| Some((Netns::open(&path).ok()?, path)));
        opened.filter(move |(netns, _)| seen.insert(netns.id()))
    };
    // One wait for all of them. What fails here fails below, too.
    if all().filter(|(netns, _)| run_waiting(netns, capture::let_go_here).is_ok_and(|more| more)).count() > 0 {
        std::thread::sleep(capture::SETTLE);
    }
    let mut wrong = Vec::new();
    for (netns, path) in all() {
        if let Err(error) = run_waiting(&netns, capture::remove_here) {
            wrong.push(format!("{}: {error}", path.display()));
        }
    }
    if let Err(error) = capture::remove_from_node() {
        wrong.push(format!("the node's own tables: {error}"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("pods that are not released: {}", wrong.join(", "))) }
}

/// Paths of network namespaces: those of processes, and those that runtimes hold by a name.
fn namespaces(proc: &Path) -> Vec<PathBuf> {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let processes = entries(proc)
        .filter(|entry| entry.file_name().to_str().is_some_and(is_process))
        .map(|entry| entry.path().join("ns/net"));
    // As the node's first process sees them: a container's own mounts may lack those that came later.
    let named = entries(&proc.join("1/root/run/netns")).map(|entry| entry.path());
    processes.chain(named).collect()
}

fn state(folder: &Path) -> Result<(), String> {
    let old_log = format!("{}.1", journal::FILE);
    // The announcement last: without it a keeper that is still there would begin anew.
    for name in [KNOWN_FILE, kubeconfig::FILE, journal::FILE, &old_log, LOCK, GOING] {
        files::remove(&folder.join(name))?;
        files::remove(&files::temporary(&folder.join(name)))?;
    }
    // Somebody else's files stay, and the folder with them.
    let _ = fs::remove_dir(folder);
    Ok(())
}
