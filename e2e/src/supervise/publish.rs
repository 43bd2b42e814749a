//! Writing completed objects for control, one file an object, and asking control whether it and the nodes have them.
//!
//! One file an object makes a change small and lets control name the culprit. Pods are written before namespaces, so
//! that a label never takes effect before the pods' capture state says whether it may. Limits: files of different
//! objects do not change at one instant, as objects of a real API server do not either.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use sha2::Digest;
use sha2::Sha256;

use crate::manifest::Objects;
use crate::objects::file_name;
use crate::state::replace;

/// Files as they are on disk: name relative to the directory, and the SHA-256 of the content in hex.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    files: BTreeMap<String, String>,
    removed: BTreeSet<String>,
}

impl Published {
    /// Names and hashes.
    pub fn files(&self) -> &BTreeMap<String, String> {
        &self.files
    }

    /// What control should publish, and what it should not any more. Where its source is an API server (`elsewhere`), the
    /// files say nothing about that, and what counts is that the nodes have what control has.
    pub fn missing(&self, sync: &Value, nodes: &[String], elsewhere: bool) -> Vec<String> {
        if elsewhere {
            return missing(sync, &BTreeMap::new(), &BTreeSet::new(), nodes);
        }
        missing(sync, &self.files, &self.removed, nodes)
    }

    /// Makes the directory equal to `objects`; returns how many files changed.
    pub fn publish(&mut self, dir: &Path, objects: &Objects) -> anyhow::Result<usize> {
        let mut wanted: Vec<(u8, String, String)> = Vec::new();
        for (key, object) in objects {
            let text = serde_saphyr::to_string(object).with_context(|| format!("{key} cannot be written as YAML"))?;
            wanted.push((order(&key.kind), file_name(key), text));
        }
        wanted.sort();
        let mut changed = 0;
        let mut files = BTreeMap::new();
        for (_, name, text) in wanted {
            let hash = hash(text.as_bytes());
            if self.files.get(&name) != Some(&hash) {
                let path = dir.join(&name);
                if let Some(parent) = path.parent() {
                    std::fs::create_dir_all(parent)?;
                }
                replace(&path, &text).with_context(|| format!("{} cannot be written", path.display()))?;
                changed += 1;
            }
            files.insert(name, hash);
        }
        self.removed.retain(|name| !files.contains_key(name));
        for name in self.files.keys().filter(|name| !files.contains_key(*name)) {
            self.removed.insert(name.clone());
            let path = dir.join(name);
            std::fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
            changed += 1;
        }
        self.files = files;
        Ok(changed)
    }
}

fn order(kind: &str) -> u8 {
    match kind {
        "Pod" => 0,
        "Namespace" => 2,
        _ => 1,
    }
}

/// SHA-256 in hex.
pub fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What control's `/debug/sync` says is missing: files not published, nodes not connected, answers outstanding.
fn missing(
    sync: &Value,
    files: &BTreeMap<String, String>,
    removed: &BTreeSet<String>,
    nodes: &[String],
) -> Vec<String> {
    let mut missing = Vec::new();
    let empty = serde_json::Map::new();
    let theirs = sync["files"].as_object().unwrap_or(&empty);
    let late: Vec<&str> = files
        .iter()
        .filter(|(name, hash)| theirs.get(*name).and_then(Value::as_str) != Some(hash.as_str()))
        .map(|(name, _)| name.as_str())
        .collect();
    if let Some(first) = late.first() {
        missing.push(format!("control has not published {} of {} files yet, such as {first}", late.len(), files.len()));
    }
    if let Some(name) = theirs.keys().find(|name| removed.contains(*name)) {
        missing.push(format!("control still publishes {name}, which was removed"));
    }
    let generation = sync["generation"].as_u64().unwrap_or_default();
    for node in nodes {
        let state = &sync["nodes"][node];
        let acked = state["acked_generation"].as_u64().unwrap_or_default();
        if state["connected"] != true {
            missing.push(format!("{node} is not connected to control"));
        } else if acked < generation {
            missing.push(format!("{node} has acknowledged generation {acked} of {generation}"));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use crate::supervise::publish::missing;

    #[test]
    fn sync_is_reached_when_files_agree_and_nodes_acknowledge() {
        let files: BTreeMap<String, String> = [("a.yaml".to_owned(), "1".to_owned())].into();
        let nodes = ["node-1".to_owned()];
        let state = |hash: &str, extra: bool, connected: bool, acked: u64| {
            let mut sync = json!({"generation": 3, "files": {"a.yaml": hash},
                "nodes": {"node-1": {"connected": connected, "acked_generation": acked, "nacks": []}}});
            if extra {
                sync["files"]["old.yaml"] = "9".into();
            }
            missing(&sync, &files, &["old.yaml".to_owned()].into(), &nodes)
        };
        assert_eq!(state("1", false, true, 3), [""; 0]);
        for (sync, word) in [
            (state("2", false, true, 3), "a.yaml"),
            (state("1", true, true, 3), "old.yaml"),
            (state("1", false, false, 3), "not connected"),
            (state("1", false, true, 2), "generation 2 of 3"),
        ] {
            assert!(sync.len() == 1 && sync[0].contains(word), "{sync:?}");
        }
    }
}
