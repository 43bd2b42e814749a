//! What a node's agent would find under `/proc` of a real node: for each pod one process, whose control group names the
//! pod's uid and whose network namespace is the pod's.
//!
//! The lab's pods have no control groups, and a pod without a command has no process, so the tree is made of files; the
//! link to the namespace is real. Limits: nothing but `cgroup` and `ns/net`; process ids are made up and count upwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// First made-up process id.
const FIRST: u32 = 1000;

/// The tree of one node.
#[derive(Debug, Default)]
pub struct Tree {
    pods: BTreeMap<String, u32>,
    last: u32,
}

impl Tree {
    /// Makes the tree at `dir` that of these pods: uid and network namespace.
    pub fn show<'a>(&mut self, dir: &Path, pods: impl Iterator<Item = (&'a str, &'a PathBuf)>) -> anyhow::Result<()> {
        let wanted: BTreeMap<&str, &PathBuf> = pods.collect();
        let gone: Vec<String> = self.pods.keys().filter(|uid| !wanted.contains_key(uid.as_str())).cloned().collect();
        for uid in gone {
            if let Some(pid) = self.pods.remove(&uid) {
                std::fs::remove_dir_all(dir.join(pid.to_string()))?;
            }
        }
        for (uid, netns) in wanted {
            if self.pods.contains_key(uid) {
                continue;
            }
            self.last = self.last.max(FIRST) + 1;
            write(&dir.join(self.last.to_string()), uid, netns)
                .with_context(|| format!("the process of pod {uid} cannot be shown in {}", dir.display()))?;
            self.pods.insert(uid.to_owned(), self.last);
        }
        Ok(())
    }
}

fn write(process: &Path, uid: &str, netns: &Path) -> std::io::Result<()> {
    // Renamed when it is whole: a process does not appear without its control group.
    let hidden = process.with_extension("new");
    std::fs::create_dir_all(hidden.join("ns"))?;
    let group = uid.replace('-', "_");
    let scope = "0".repeat(64);
    std::fs::write(
        hidden.join("cgroup"),
        format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{group}.slice/cri-containerd-{scope}.scope\n"
        ),
    )?;
    std::os::unix::fs::symlink(netns, hidden.join("ns/net"))?;
    std::fs::rename(&hidden, process)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::supervise::proc::Tree;

    #[test]
    fn a_pod_has_one_process_as_long_as_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let netns = PathBuf::from("/proc/self/ns/net");
        let mut tree = Tree::default();
        let shown = |tree: &mut Tree, uids: &[&str]| {
            tree.show(dir.path(), uids.iter().map(|uid| (*uid, &netns))).unwrap();
            let mut seen: Vec<String> = std::fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| std::fs::read_to_string(entry.unwrap().path().join("cgroup")).unwrap())
                .collect();
            seen.sort();
            seen
        };
        assert_eq!(shown(&mut tree, &["a-1", "b-2"]).len(), 2);
        let left = shown(&mut tree, &["b-2"]);
        assert!(left.len() == 1 && left[0].contains("podb_2.slice"), "{left:?}");
    }
}
