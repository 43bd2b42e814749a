//! Whether the program will run where the container runtime starts it, which is on the node and not in our image.
//!
//! A plugin that cannot be started fails every pod of the node, also those that the mesh has nothing to do with. So before it
//! is copied, what it needs is compared with what the node has: its loader (a node may have another C library, or none), and the
//! newest version of glibc that it names. A static program needs neither. What cannot be found out is no reason to refuse; what is
//! found missing is. Limits: 64-bit little-endian ELF, glibc; other libraries than the C library are taken to be there.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

/// Bytes of a program in which its headers and its loader's path are.
const HEAD: u64 = 64 << 10;
/// Program header of the loader's path.
const PT_INTERP: u32 = 3;
/// Longest path of a loader.
const PATH_MAX: usize = 4096;
/// Where systems have their C library.
const LIBRARIES: [&str; 8] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib64",
    "usr/lib64",
    "lib",
    "usr/lib",
];

/// Whether `program` runs on a node whose files are below `root`.
///
/// # Errors
/// What the node lacks, and what to do.
pub(super) fn runs_on(program: &Path, root: &Path) -> Result<(), String> {
    let named = |error: io::Error| format!("{}: {error}", program.display());
    let mut head = Vec::new();
    File::open(program).and_then(|file| file.take(HEAD).read_to_end(&mut head)).map_err(named)?;
    let Some(loader) = loader(&head) else { return Ok(()) };
    // Nothing is seen of the node.
    if fs::read_dir(root).is_err() {
        return Ok(());
    }
    let remedy = "build the image's ztunnel as a static program, or for the C library of the oldest node";
    if fs::symlink_metadata(root.join(loader.trim_start_matches('/'))).is_err() {
        return Err(format!("the program would not run on this node, which has no {loader}; {remedy}"));
    }
    let Some(needed) = newest(program).map_err(named)? else { return Ok(()) };
    let Some((path, provided)) = library(root) else { return Ok(()) };
    if needed > provided {
        return Err(format!(
            "the program would not run on this node: it needs glibc 2.{needed}, and {} is 2.{provided}; {remedy}",
            path.display()
        ));
    }
    Ok(())
}

/// The path of the loader that a program asks for; `None`: it is static, or not understood.
fn loader(program: &[u8]) -> Option<String> {
    if program.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = program.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0_usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        let header = table.checked_add(index.checked_mul(size)?)?;
        if number(header, 4)? == PT_INTERP as usize {
            let (at, length) = (number(header.checked_add(8)?, 8)?, number(header.checked_add(32)?, 8)?);
            let path = program.get(at..at.checked_add(length.min(PATH_MAX))?)?;
            let path = path.split(|byte| *byte == 0).next()?;
            return String::from_utf8(path.to_vec()).ok().filter(|path| path.starts_with('/'));
        }
    }
    None
}

/// The newest `GLIBC_2.<n>` among a file's strings, as libraries define them and programs need them.
fn newest(path: &Path) -> io::Result<Option<u32>> {
    let mut file = BufReader::with_capacity(256 << 10, File::open(path)?);
    let (mut word, mut newest) = (Vec::new(), None);
    while file.read_until(0, &mut word)? > 0 {
        let text = word.strip_suffix(b"\0").and_then(|word| word.strip_prefix(b"GLIBC_2."));
        let version =
            text.and_then(|text| std::str::from_utf8(text.split(|byte| *byte == b'.').next()?).ok()?.parse().ok());
        newest = newest.max(version);
        word.clear();
    }
    Ok(newest)
}

fn library(root: &Path) -> Option<(PathBuf, u32)> {
    LIBRARIES.iter().find_map(|folder| {
        let version = newest(&root.join(folder).join("libc.so.6")).ok()??;
        Some((Path::new("/").join(folder).join("libc.so.6"), version))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::{loader, newest, runs_on};

    /// A program with one header, for the loader, and the versions that it needs.
    fn program(loader: &str, needs: &[&str]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64 + 56, 0);
        let at = file.len() as u64;
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        file[56..58].copy_from_slice(&u16::from(!loader.is_empty()).to_le_bytes());
        file[64..68].copy_from_slice(&3_u32.to_le_bytes());
        file[72..80].copy_from_slice(&at.to_le_bytes());
        file[96..104].copy_from_slice(&(loader.len() as u64 + 1).to_le_bytes());
        [&file, loader.as_bytes(), b"\0", &versions(needs)].concat()
    }

    fn versions(versions: &[&str]) -> Vec<u8> {
        let words: Vec<String> = versions.iter().map(|version| format!("\0GLIBC_{version}\0")).collect();
        words.concat().into_bytes()
    }

    #[test]
    fn a_program_that_the_node_cannot_run_is_found_out() {
        let node = tempfile::tempdir().unwrap();
        let path = |name: &str| node.path().join(name);
        for folder in ["lib64", "usr/lib64"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        fs::write(path("lib64/ld-linux-x86-64.so.2"), "").unwrap();
        fs::write(path("usr/lib64/libc.so.6"), versions(&["2.2.5", "2.31", "2.9", "PRIVATE"])).unwrap();
        let gnu = "/lib64/ld-linux-x86-64.so.2";
        for (file, says) in [
            (program(gnu, &["2.2.5", "2.31"]), ""),
            (program(gnu, &["2.34", "2.4"]), "needs glibc 2.34, and /usr/lib64/libc.so.6 is 2.31"),
            (program(gnu, &[]), ""),
            (program("/lib/ld-musl-x86_64.so.1", &[]), "no /lib/ld-musl-x86_64.so.1"),
            (program("", &["2.34"]), ""),
            (b"#!/bin/sh".to_vec(), ""),
        ] {
            fs::write(path("program"), file).unwrap();
            match runs_on(&path("program"), node.path()) {
                Ok(()) => assert!(says.is_empty(), "{says}"),
                Err(why) => assert!(!says.is_empty() && why.contains(says), "{says}: {why}"),
            }
        }
        fs::write(path("program"), program(gnu, &["2.99"])).unwrap();
        assert_eq!(runs_on(&path("program"), Path::new("/none")), Ok(()), "the node is not seen");
    }

    #[test]
    fn this_very_program_runs_here() {
        let own = Path::new("/proc/self/exe");
        assert_eq!(runs_on(own, Path::new("/")), Ok(()));
        let bytes = fs::read(own).unwrap();
        // It is what the test claims to have looked at, or static.
        assert_eq!(loader(&bytes).is_some(), newest(own).unwrap().is_some());
        for length in [0, 5, 6, 40, 63, 100] {
            assert_eq!(loader(&bytes[..length]), None);
        }
    }
}
