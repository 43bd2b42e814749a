//! Which code the programs under test were built from: a figure that is put down to another commit is worth nothing.
//!
//! `make bench` builds, and then writes what `git describe` says and the programs' SHA-256 beside them
//! (`built-from`). The programs are compared with that file, so that others, or older ones, are not taken for them.
//! Limits: of the peer only its own words and its hash are known.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use sha2::Digest;
use sha2::Sha256;

/// Programs whose speed is measured, and the one that measures.
const PROGRAMS: [&str; 3] = ["control", "lab", "ztunnel"];

/// What the programs in `dir` were built from, in words.
pub(crate) fn from(dir: &Path) -> String {
    let file = dir.join("built-from");
    let Ok(text) = std::fs::read_to_string(&file) else {
        return format!("unknown: {} does not exist; `make bench` writes it", file.display());
    };
    let hash = |name: &str| hash(&dir.join(name)).unwrap_or_default();
    judge(&text, hash)
}

/// The first line of the file, if its other lines (`<SHA-256>  <program>`) are those of the programs.
fn judge(text: &str, hash: impl Fn(&str) -> String) -> String {
    let mut lines = text.lines();
    let commit = lines.next().unwrap_or_default().trim();
    let hashes: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once("  ")).collect();
    let other: Vec<&str> =
        PROGRAMS.into_iter().filter(|name| !hashes.contains(&(hash(name).as_str(), *name))).collect();
    if commit.is_empty() || !other.is_empty() {
        return format!("unknown: {} changed since `make bench` built from {commit:?}", other.join(", "));
    }
    let dirty = if commit.ends_with("-dirty") { " (with changes that are in no commit)" } else { "" };
    format!("{commit}{dirty}")
}

/// A peer: what it says that it is, and its hash. Fails when it cannot be read; `variable` named it.
pub(super) fn peer(variable: &str, path: &Path, version: &str) -> anyhow::Result<String> {
    let hash = hash(path).with_context(|| format!("{variable} names {}, which cannot be read", path.display()))?;
    let output = Command::new(path).arg(version).output();
    let output = output.with_context(|| format!("{variable} names {}, which cannot be run", path.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', " ");
    Ok(format!("{said} (SHA-256 {})", hash.get(..16).unwrap_or_default()))
}

fn hash(path: &Path) -> std::io::Result<String> {
    Ok(Sha256::digest(std::fs::read(path)?).iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use crate::bench::built::judge;

    #[test]
    fn only_the_programs_that_were_built_then_are_put_down_to_a_commit() {
        let text = "v1-3-gabc\n1  control\n2  lab\n3  ztunnel\n";
        let hash = |name: &str| match name {
            "control" => "1".to_owned(),
            "lab" => "2".to_owned(),
            _ => "3".to_owned(),
        };
        assert_eq!(judge(text, hash), "v1-3-gabc");
        assert!(judge(&text.replace("gabc", "gabc-dirty"), hash).contains("in no commit"));
        for (what, text) in [
            ("another ztunnel", text.replace("3  ztunnel", "4  ztunnel")),
            ("no word of lab", text.replace("2  lab\n", "")),
            ("hashes of each other", text.replace("1  control", "2  control")),
            ("no commit", text.replace("v1-3-gabc", "")),
            ("nothing", String::new()),
        ] {
            assert!(judge(&text, hash).starts_with("unknown"), "{what}");
        }
    }
}
