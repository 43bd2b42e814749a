//! What is wanted: the watched directory's files with `lab apply` and `lab delete` on top.
//!
//! A file that cannot be read keeps its last good objects and is reported, so that a typing error in one takes nothing
//! away. Limits: an applied or deleted object holds until its file says something new.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;

use serde_json::Value;

use crate::manifest;
use crate::manifest::Key;
use crate::manifest::Objects;

/// The wanted objects and where they come from.
#[derive(Debug, Default)]
pub struct Wanted {
    files: BTreeMap<PathBuf, Vec<(Key, Value)>>,
    bad: BTreeMap<PathBuf, String>,
    overlay: BTreeMap<Key, Option<Value>>,
}

impl Wanted {
    /// Reads the directory again.
    pub fn reload(&mut self, dir: &Path) -> anyhow::Result<()> {
        let before = self.of_files();
        let paths = manifest::files(dir)?;
        self.files.retain(|path, _| paths.contains(path));
        self.bad.clear();
        for path in paths {
            match manifest::read(&path) {
                Ok(objects) => {
                    self.files.insert(path, objects);
                }
                Err(error) => {
                    self.bad.insert(path, format!("{error:#}; its last good objects stay"));
                }
            }
        }
        let after = self.of_files();
        self.overlay.retain(|key, _| before.get(key) == after.get(key));
        Ok(())
    }

    /// Puts objects on top.
    pub fn apply(&mut self, objects: Vec<(Key, Value)>) {
        self.overlay.extend(objects.into_iter().map(|(key, value)| (key, Some(value))));
    }

    /// Takes an object away. Kinds compare as people write them: any case, plural or not.
    pub fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Key> {
        let key = self.objects().into_keys().find(|key| {
            is_kind(&key.kind, kind) && key.name == name && (key.namespace == namespace || key.namespace.is_empty())
        });
        let Some(key) = key else { anyhow::bail!("there is no {kind} {namespace}/{name} to delete") };
        self.overlay.insert(key.clone(), None);
        Ok(key)
    }

    /// Everything wanted; of two files with one key the first by path wins.
    pub fn objects(&self) -> Objects {
        let mut all = self.of_files();
        for (key, value) in &self.overlay {
            match value {
                Some(value) => all.insert(key.clone(), value.clone()),
                None => all.remove(key),
            };
        }
        all
    }

    /// Files that cannot be read, and why.
    pub fn bad(&self) -> Vec<String> {
        self.bad.values().cloned().collect()
    }

    fn of_files(&self) -> Objects {
        let mut all = Objects::new();
        for (key, value) in self.files.values().flatten() {
            all.entry(key.clone()).or_insert_with(|| value.clone());
        }
        all
    }
}

fn is_kind(kind: &str, written: &str) -> bool {
    let (kind, written) = (kind.to_lowercase(), written.to_lowercase());
    let plural = kind.strip_suffix('y').map_or_else(|| format!("{kind}s"), |stem| format!("{stem}ies"));
    let short = match kind.as_str() {
        "namespace" => "ns",
        "pod" => "po",
        "service" => "svc",
        "deployment" => "deploy",
        _ => "",
    };
    written == kind || written == plural || written == short
}

#[cfg(test)]
mod tests {
    use crate::manifest::Key;
    use crate::manifest::parse;
    use crate::supervise::wanted::Wanted;

    #[test]
    fn the_last_word_wins_and_a_bad_file_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let pod = |label: &str| format!("kind: Pod\nmetadata: {{name: a, namespace: s, labels: {{v: '{label}'}}}}\n");
        let key = Key::new("Pod", "s", "a");
        let mut wanted = Wanted::default();
        let label = |wanted: &Wanted| wanted.objects()[&key]["metadata"]["labels"]["v"].as_str().map(str::to_owned);

        std::fs::write(&file, pod("file")).unwrap();
        wanted.reload(dir.path()).unwrap();
        wanted.apply(parse("x", &pod("applied")).unwrap());
        wanted.reload(dir.path()).unwrap();
        assert_eq!(label(&wanted).as_deref(), Some("applied"), "an unchanged file says nothing new");
        std::fs::write(&file, "kind: [").unwrap();
        wanted.reload(dir.path()).unwrap();
        assert_eq!(label(&wanted).as_deref(), Some("applied"));
        assert_eq!(wanted.bad().len(), 1);
        std::fs::write(&file, pod("edited")).unwrap();
        wanted.reload(dir.path()).unwrap();
        assert_eq!(label(&wanted).as_deref(), Some("edited"));
        assert_eq!(wanted.delete("pods", "s", "a").unwrap(), key);
        assert!(wanted.objects().is_empty());
        assert!(wanted.delete("pod", "s", "a").is_err());
    }
}
