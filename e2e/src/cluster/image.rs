//! Images without a registry and without a container engine: archives with one layer, made from files of this machine.
//!
//! A dynamic program is taken with the libraries that the loader says it needs, at the paths where the loader looks.
//! Archives are read by `ctr images import`. Limits: one layer; names of at most 100 bytes (plain tar headers); owners
//! are root.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use serde_json::json;
use sha2::Digest;
use sha2::Sha256;

/// An image in the making.
#[derive(Debug, Default)]
pub struct Image {
    /// Content by place in the image, without the first slash.
    files: BTreeMap<String, Content>,
}

#[derive(Clone, Debug)]
enum Content {
    File(PathBuf),
    Text(String),
    Link(String),
}

impl Image {
    /// Puts a program at `place`, with the libraries that it needs.
    pub fn program(mut self, program: &Path, place: &str) -> anyhow::Result<Self> {
        for library in libraries(program)? {
            let at = library.display().to_string();
            self.put(&at, Content::File(library));
        }
        self.put(place, Content::File(program.to_path_buf()));
        Ok(self)
    }

    /// Another name for a place.
    pub fn link(mut self, place: &str, target: &str) -> Self {
        self.put(place, Content::Link(target.to_owned()));
        self
    }

    /// A small file.
    pub fn text(mut self, place: &str, text: &str) -> Self {
        self.put(place, Content::Text(text.to_owned()));
        self
    }

    fn put(&mut self, place: &str, content: Content) {
        self.files.insert(place.trim_start_matches('/').to_owned(), content);
    }

    /// Writes the archive; `names` are what the image is called, `entry` what a container runs by default.
    pub fn write(&self, archive: &Path, names: &[&str], entry: &[&str]) -> anyhow::Result<()> {
        let layer_file = archive.with_extension("layer");
        let digest = self.write_layer(&layer_file)?;
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": entry, "Env": [path], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
            "history": [{"created_by": "lab"}],
        })
        .to_string();
        let config_name = format!("{}.json", hex(&Sha256::digest(config.as_bytes())));
        let layer_name = format!("{}.tar", &digest[..40]);
        let manifest = json!([{"Config": config_name, "RepoTags": names, "Layers": [layer_name]}]).to_string();
        let mut out = fs::File::create(archive).with_context(|| format!("{} cannot be made", archive.display()))?;
        append(&mut out, &config_name, 0o644, config.as_bytes())?;
        append(&mut out, "manifest.json", 0o644, manifest.as_bytes())?;
        append(&mut out, &layer_name, 0o644, &fs::read(&layer_file)?)?;
        out.write_all(&[0; 1024])?;
        fs::remove_file(&layer_file)?;
        Ok(())
    }

    /// Writes the layer; its digest.
    fn write_layer(&self, path: &Path) -> anyhow::Result<String> {
        let mut out = Hashing { file: fs::File::create(path)?, hash: Sha256::new() };
        let mut folders = BTreeSet::from(["tmp".to_owned()]);
        for place in self.files.keys() {
            let parents = Path::new(place).ancestors().skip(1).filter(|it| *it != Path::new(""));
            folders.extend(parents.map(|it| it.display().to_string()));
        }
        for folder in &folders {
            let mode = if folder == "tmp" { 0o1777 } else { 0o755 };
            out.write_all(&header(&format!("{folder}/"), mode, 0, b'5', "")?)?;
        }
        for (place, content) in &self.files {
            match content {
                Content::Link(target) => out.write_all(&header(place, 0o777, 0, b'2', target)?)?,
                Content::Text(text) => append(&mut out, place, 0o644, text.as_bytes())?,
                Content::File(file) => {
                    let bytes = fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
                    let executable = fs::metadata(file)?.permissions().mode() & 0o111 != 0;
                    append(&mut out, place, if executable { 0o755 } else { 0o644 }, &bytes)?;
                }
            }
        }
        out.write_all(&[0; 1024])?;
        Ok(hex(&out.hash.finalize()))
    }
}

struct Hashing {
    file: fs::File,
    hash: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn append(out: &mut impl Write, name: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
    out.write_all(&header(name, mode, bytes.len(), b'0', "")?)?;
    out.write_all(bytes)?;
    out.write_all(&vec![0; bytes.len().next_multiple_of(512) - bytes.len()])?;
    Ok(())
}

/// A header of POSIX.1-1988 (ustar); its time is 0, so that the same files give the same image.
fn header(name: &str, mode: u32, size: usize, kind: u8, target: &str) -> anyhow::Result<[u8; 512]> {
    anyhow::ensure!(name.len() <= 100 && target.len() <= 100, "{name}: a name of more than 100 bytes");
    let mut block = [0_u8; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, target.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    Ok(block)
}

/// The libraries that a program is linked with, and its loader, at the paths where it looks for them; none for a static
/// one.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd cannot be run")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let missing: Vec<&str> = text.lines().filter(|line| line.contains("not found")).collect();
    anyhow::ensure!(missing.is_empty(), "{} lacks libraries: {}", program.display(), missing.join(", "));
    Ok(loaded(&text))
}

/// Paths in what `ldd` says.
fn loaded(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    text.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use crate::cluster::image::Image;
    use crate::cluster::image::loaded;

    #[test]
    fn the_loader_and_the_libraries_are_found_in_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(loaded(text), expected);
        assert!(loaded("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn tar_reads_what_is_written() {
        let folder = std::env::temp_dir().join(format!("tulle-image-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let archive = folder.join("some.tar");
        let image = Image::default().text("/etc/passwd", "root:x:0:0::/:/bin/sh\n").link("/bin/sh", "/bin/busybox");
        image.write(&archive, &["lab.local/some:1"], &["/bin/sh"]).unwrap();
        let list = |file: &std::path::Path| {
            let output = Command::new("tar").arg("-tf").arg(file).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let names = list(&archive);
        assert!(names.contains("manifest.json"), "{names}");
        let layer = names.lines().find(|name| name.ends_with(".tar")).unwrap().to_owned();
        let unpacked = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&folder).status().unwrap();
        assert!(unpacked.success());
        assert_eq!(list(&folder.join(layer)), "bin/\netc/\ntmp/\nbin/sh\netc/passwd\n");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
