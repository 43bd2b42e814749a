//! Manifests as users write them: YAML or JSON text to objects with a key, and the merged set of what is wanted.
//!
//! Objects stay `serde_json` values, because most kinds only pass through to control, which alone judges them; the lab
//! reads the few fields that a scheduler and a kubelet need. Limits: a file is at most 16 MiB; a file that is not YAML
//! changes nothing and is reported with its place.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

/// Far above any manifest written by people; a wrong path should not fill memory.
const FILE_LIMIT: u64 = 16 << 20;

/// Kinds without a namespace that people put beside a shop; anything else belongs to one.
const CLUSTER_KINDS: [&str; 9] = [
    "ClusterTrustBundle",
    "Namespace",
    "Node",
    "GatewayClass",
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
    "PersistentVolume",
    "StorageClass",
];

/// What an object is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// `Pod`, `Service`, …
    pub kind: String,
    /// Empty for kinds without one.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl Key {
    /// A key from its parts; the namespace is dropped for kinds without one.
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        let namespace = if CLUSTER_KINDS.contains(&kind) { "" } else { namespace };
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(out, "{} {}", self.kind, self.name),
            namespace => write!(out, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// A set of wanted objects.
pub type Objects = BTreeMap<Key, Value>;

/// Reads the objects of one text; `origin` names it in errors.
pub fn parse(origin: &str, text: &str) -> anyhow::Result<Vec<(Key, Value)>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).with_context(|| format!("{origin} is not YAML"))?;
    let mut objects = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        if document.is_null() {
            continue;
        }
        if document["kind"] == "List" {
            for item in document["items"].as_array().into_iter().flatten() {
                objects.push(keyed(origin, index, item.clone())?);
            }
            continue;
        }
        objects.push(keyed(origin, index, document)?);
    }
    Ok(objects)
}

fn keyed(origin: &str, index: usize, value: Value) -> anyhow::Result<(Key, Value)> {
    let place = || format!("{origin}, document {}", index + 1);
    let kind = value["kind"].as_str().with_context(|| format!("{}: no `kind`", place()))?;
    let name = value["metadata"]["name"].as_str().with_context(|| format!("{}: no `metadata.name`", place()))?;
    // Both become parts of file names.
    for (field, text) in [("kind", kind), ("metadata.name", name)] {
        let fits = text.len() <= 253 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
        anyhow::ensure!(
            fits && !text.is_empty() && !text.starts_with('.'),
            "{}: `{field}` {text:?} is not a name",
            place()
        );
    }
    let namespace = value["metadata"]["namespace"].as_str().unwrap_or("default");
    let fits = namespace.len() <= 63 && namespace.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    anyhow::ensure!(fits && !namespace.is_empty(), "{}: `metadata.namespace` {namespace:?} is not a name", place());
    Ok((Key::new(kind, namespace, name), value))
}

/// Every manifest below `dir`, sorted by path; dot files are skipped.
pub fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).with_context(|| format!("{} cannot be listed", next.display()))? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end)) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Reads one file.
pub fn read(path: &Path) -> anyhow::Result<Vec<(Key, Value)>> {
    let length = std::fs::metadata(path).with_context(|| format!("{} cannot be read", path.display()))?.len();
    anyhow::ensure!(length <= FILE_LIMIT, "{} has {length} bytes, more than a manifest can be", path.display());
    let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    parse(&path.display().to_string(), &text)
}

/// `text` of a field, or nothing.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A map of strings, such as labels.
pub fn strings(value: &Value, pointer: &str) -> BTreeMap<String, String> {
    let map = value.pointer(pointer).and_then(Value::as_object);
    map.into_iter().flatten().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use crate::manifest::Key;
    use crate::manifest::parse;

    #[test]
    fn documents_and_lists_become_keyed_objects() {
        let text = "kind: Namespace\nmetadata: {name: shop}\n---\n---\nkind: List\nitems:\n- kind: Pod\n  metadata: {name: a, namespace: shop}\n- kind: Pod\n  metadata: {name: b}\n";
        let keys: Vec<Key> = parse("x", text).unwrap().into_iter().map(|(key, _)| key).collect();
        let expected =
            [Key::new("Namespace", "", "shop"), Key::new("Pod", "shop", "a"), Key::new("Pod", "default", "b")];
        assert_eq!(keys, expected);
    }

    #[test]
    fn bad_text_is_refused_with_its_place() {
        for bad in ["kind: [", "metadata: {name: a}", "kind: Pod", "kind: Pod\nmetadata: {name: ../../x}", "3"] {
            let error = format!("{:#}", parse("file.yaml", bad).unwrap_err());
            assert!(error.contains("file.yaml"), "{error}");
        }
    }

    #[test]
    fn text_that_looks_like_numbers_survives_writing_and_reading() {
        let value = serde_json::json!({"a": "true", "b": "12", "c": "1e3", "d": "", "e": null, "f": "no", "g": ["~", "0x1f", "a: b", "multi\nline\n"], "h": "2001:db8::1", "i": 3, "j": {}});
        let text = serde_saphyr::to_string(&value).unwrap();
        let back: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(back, value, "{text}");
    }
}
