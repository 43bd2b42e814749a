//! The installer on folders as container runtimes have them: other plugins before it, lists that change, break or vanish, two
//! installers at once, and taking it away again, byte for byte.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::uninstall::{STEPS, Step};
use super::{ApiSource, Keeper, Memory, Settings, State, begin, once};

const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","mtu":1500}]}"#;

struct Node {
    folder: TempDir,
    settings: Settings,
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("ztunnel"), "the program").unwrap();
        fs::create_dir(at("net.d")).unwrap();
        fs::create_dir(at("account")).unwrap();
        fs::write(at("account/token"), "one\n").unwrap();
        fs::write(at("account/ca.crt"), "roots").unwrap();
        let settings = Settings {
            program: at("ztunnel"),
            bin_dir: at("bin"),
            conf_dir: at("net.d"),
            state_dir: at("state"),
            socket: at("cni.sock"),
            root_namespace: "tulle-system".into(),
            api: ApiSource::Pod { host: "10.96.0.1".into(), port: "443".into(), folder: at("account") },
            node_root: at("node"),
        };
        Self { folder, settings }
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.settings.conf_dir.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.conf(name), text).unwrap();
    }

    fn list(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.conf("00-tulle.conflist")).ok()?).ok()
    }

    fn look(&self, memory: &mut Memory, now: Instant) -> State {
        once(&self.settings, memory, now).state
    }

    /// Every file below the folders of the node's network.
    fn everything(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let below = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let paths = below(&self.settings.conf_dir).chain(below(&self.settings.bin_dir));
        paths.map(|path| (path.clone(), fs::read(&path).unwrap_or_default())).collect()
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_is_installed_follows_the_network_s_configuration() {
    let node = Node::new();
    let (mut memory, now) = (Memory::default(), Instant::now());
    begin(&node.settings).unwrap();
    assert!(matches!(node.look(&mut memory, now), State::Waiting(_)));
    assert!(node.list().is_none(), "nothing to chain to");
    node.write("10-bridge.conflist", BRIDGE);
    assert_eq!(node.look(&mut memory, now), State::Installed("10-bridge.conflist".into()));
    let list = node.list().unwrap();
    assert_eq!((&list["plugins"][0]["type"], &list["plugins"][1]["type"]), (&"bridge".into(), &"tulle-cni".into()));
    assert_eq!(list["plugins"][1]["stateDir"], node.settings.state_dir.to_str().unwrap());
    assert_eq!(mode(&node.settings.bin_dir.join("tulle-cni")), 0o755);
    // Rewritten by the network.
    node.write("10-bridge.conflist", &BRIDGE.replace("1500", "9000"));
    node.look(&mut memory, now);
    assert_eq!(node.list().unwrap()["plugins"][0]["mtu"], 9000);
    // Half written: the last good one stays.
    node.write("10-bridge.conflist", "{\"cniVersion\":");
    assert!(matches!(node.look(&mut memory, now), State::Kept(_)));
    assert_eq!(node.list().unwrap()["plugins"][0]["mtu"], 9000);
    // Gone: after a while ours goes too.
    fs::remove_file(node.conf("10-bridge.conflist")).unwrap();
    assert!(matches!(node.look(&mut memory, now), State::Kept(_)));
    assert!(matches!(node.look(&mut memory, now + Duration::from_secs(60)), State::Waiting(_)));
    assert!(node.list().is_none());
    // A single plugin, and a name before ours.
    node.write("00-a.conf", r#"{"cniVersion":"0.3.1","name":"a","type":"ptp"}"#);
    assert_eq!(node.look(&mut memory, now), State::Installed("00-a.conf".into()));
    assert!(node.list().is_none() && node.conf("00--tulle.conflist").exists());
    // A version without chains.
    node.write("00-a.conf", r#"{"cniVersion":"0.1.0","name":"a","type":"ptp"}"#);
    assert!(matches!(node.look(&mut memory, now), State::Failed(why) if why.contains("0.1.0")));
    assert!(!node.conf("00--tulle.conflist").exists());
}

#[test]
fn the_kubeconfig_is_for_root_alone_and_follows_the_token() {
    let node = Node::new();
    begin(&node.settings).unwrap();
    let mut memory = Memory::default();
    let path = node.settings.state_dir.join("kubeconfig");
    for token in ["one", "two"] {
        fs::write(node.folder.path().join("account/token"), token).unwrap();
        assert!(once(&node.settings, &mut memory, Instant::now()).notes.is_empty());
        assert!(fs::read_to_string(&path).unwrap().contains(&format!("\"token\": \"{token}\"")));
        assert_eq!((mode(&path), mode(&node.settings.state_dir)), (0o600, 0o700));
    }
    fs::remove_file(node.folder.path().join("account/token")).unwrap();
    let report = once(&node.settings, &mut memory, Instant::now());
    assert!(report.notes[0].contains("account/token"), "{report}");
}

#[test]
fn a_configuration_that_cilium_took_away_is_reported_and_put_back_seldom() {
    let node = Node::new();
    begin(&node.settings).unwrap();
    let (mut memory, now) = (Memory::default(), Instant::now());
    node.write("05-cilium.conflist", &BRIDGE.replace("bridge", "cilium-cni"));
    assert_eq!(node.look(&mut memory, now), State::Installed("05-cilium.conflist".into()));
    let (ours, taken) = (node.conf("00-tulle.conflist"), node.conf("00-tulle.conflist.cilium_bak"));
    for (seconds, back) in [(1, true), (2, false), (40, true)] {
        if ours.exists() {
            fs::rename(&ours, &taken).unwrap();
        }
        let state = node.look(&mut memory, now + Duration::from_secs(seconds));
        assert!(matches!(&state, State::Failed(why) if why.contains("cni.exclusive=false")), "{state:?}");
        assert_eq!(ours.exists(), back, "after {seconds} s");
    }
    assert_eq!(node.look(&mut memory, now), State::Installed("05-cilium.conflist".into()), "it was left alone");
    Step::Configuration.take(&node.settings, Path::new("/proc")).unwrap();
    assert!(!ours.exists() && !taken.exists());
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let mut node = Node::new();
    begin(&node.settings).unwrap();
    node.write("10-bridge.conflist", BRIDGE);
    node.settings.bin_dir = "/proc/bin".into();
    let state = node.look(&mut Memory::default(), Instant::now());
    assert!(matches!(&state, State::Failed(why) if why.contains("/proc/bin")), "{state:?}");
    assert!(node.list().is_none(), "a list without its program keeps pods from starting");
    node.settings.bin_dir = node.folder.path().join("bin");
    node.settings.conf_dir = node.folder.path().join("none");
    let state = node.look(&mut Memory::default(), Instant::now());
    assert!(matches!(&state, State::Waiting(why) if why.contains("TULLE_CNI_CONF_DIR")), "{state:?}");
}

#[test]
fn two_agents_that_differ_do_not_fight_and_the_newer_one_stays() {
    let node = Node::new();
    node.write("10-bridge.conflist", BRIDGE);
    begin(&node.settings).unwrap();
    let now = Instant::now();
    let newer =
        Settings { program: node.folder.path().join("newer"), socket: "/run/new.sock".into(), ..node.settings.clone() };
    fs::write(&newer.program, "the newer program").unwrap();
    let (mut old_memory, mut new_memory) = (Memory::default(), Memory::default());
    once(&node.settings, &mut old_memory, now);
    once(&newer, &mut new_memory, now);
    let then = node.everything();
    for _ in 0..3 {
        assert_eq!(node.look(&mut old_memory, now), State::Installed("10-bridge.conflist".into()));
        once(&newer, &mut new_memory, now);
        assert_eq!(node.everything(), then);
    }
    assert_eq!(node.list().unwrap()["plugins"][1]["socket"], "/run/new.sock");
    // Damage is repaired all the same.
    node.write("00-tulle.conflist", "{}");
    fs::remove_file(node.settings.bin_dir.join("tulle-cni")).unwrap();
    once(&newer, &mut new_memory, now);
    assert_eq!(node.everything(), then);
}

/// Steps that touch nothing but files.
fn of_files() -> impl Iterator<Item = Step> {
    STEPS.into_iter().filter(|step| *step != Step::Release)
}

#[test]
fn after_every_step_out_a_list_still_has_its_program_and_what_that_needs() {
    for killed_after in 0..=of_files().count() {
        let node = Node::new();
        node.write("10-bridge.conflist", BRIDGE);
        node.write("note.txt", "somebody's");
        fs::create_dir(&node.settings.bin_dir).unwrap();
        fs::write(node.settings.bin_dir.join("bridge"), "somebody's too").unwrap();
        let before = node.everything();
        begin(&node.settings).unwrap();
        let mut memory = Memory::default();
        once(&node.settings, &mut memory, Instant::now());
        fs::write(node.settings.state_dir.join("namespaces.json"), "{}").unwrap();
        of_files().take(killed_after).for_each(|step| step.take(&node.settings, Path::new("/proc")).unwrap());
        if node.list().is_some() {
            assert!(node.settings.bin_dir.join("tulle-cni").exists(), "after {killed_after}");
            assert!(node.settings.state_dir.join("namespaces.json").exists(), "after {killed_after}");
        }
        // Who keeps it installed puts nothing back.
        let looked = once(&node.settings, &mut memory, Instant::now());
        assert_eq!(looked.state == State::Uninstalled, killed_after > 0, "{looked}");
        of_files().for_each(|step| step.take(&node.settings, Path::new("/proc")).unwrap());
        assert_eq!(node.everything(), before, "after {killed_after}");
        assert!(!node.settings.state_dir.exists());
    }
}

#[test]
fn a_keeper_notices_what_changes_and_ends_with_the_uninstallation() {
    let node = Node::new();
    let (tell, told) = channel();
    let keeper = Keeper::start(node.settings.clone(), move |report| drop(tell.send(report.clone()))).unwrap();
    let next = || told.recv_timeout(Duration::from_secs(60)).unwrap().state;
    assert!(matches!(next(), State::Waiting(_)));
    node.write("10-bridge.conflist", BRIDGE);
    // The file may have been seen before it was written.
    let installed = std::iter::repeat_with(next).find(|state| matches!(state, State::Installed(_))).unwrap();
    assert_eq!(installed, State::Installed("10-bridge.conflist".into()));
    of_files().for_each(|step| step.take(&node.settings, Path::new("/proc")).unwrap());
    assert_eq!(next(), State::Uninstalled);
    keeper.wait();
    assert!(node.list().is_none());
}
