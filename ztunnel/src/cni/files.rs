//! Reading with a bound, and replacing a file so that nobody ever sees half of it.
//!
//! Runtimes read these folders at any moment, and a node may lose its power at any other. So a file is written beside its place,
//! brought to the disk, and renamed; the name it has meanwhile is none that a runtime takes for a configuration. Errors name the
//! path, and of a file system that cannot be written what to do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The content of a file of at most `most` bytes.
///
/// # Errors
/// That it cannot be read, or is longer.
pub fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let named = |error: io::Error| format!("{}: {error}", path.display());
    let mut content = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(named)?;
    file.take(most + 1).read_to_end(&mut content).map_err(named)?;
    if content.len() as u64 > most {
        return Err(format!("{} has more than {most} bytes", path.display()));
    }
    Ok(content)
}

/// Writes a file by renaming; says whether it was another one before.
///
/// # Errors
/// What failed, where, and what to do.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> Result<bool, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let same = fs::metadata(path)
        .is_ok_and(|meta| meta.len() == content.len() as u64 && meta.permissions().mode() & 0o777 == mode);
    if same && fs::read(path).is_ok_and(|now| now == content) {
        return Ok(false);
    }
    let (mut file, temporary) = beside(path, mode)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    settle(path, &temporary, written).map(|()| true)
}

/// Copies a program the same way; says whether it was another one before.
///
/// # Errors
/// What failed, where, and what to do.
pub fn copy_program(from: &Path, to: &Path) -> Result<bool, String> {
    let mut source = File::open(from).map_err(|error| format!("{}: {error}", from.display()))?;
    if same_content(&mut source, to).unwrap_or(false) {
        return Ok(false);
    }
    let mut source = File::open(from).map_err(|error| format!("{}: {error}", from.display()))?;
    let (mut file, temporary) = beside(to, 0o755)?;
    let written = io::copy(&mut source, &mut file).and_then(|_| file.sync_all());
    settle(to, &temporary, written).map(|()| true)
}

/// Removes a file; one that is not there is as good.
///
/// # Errors
/// What failed, and where.
pub fn remove(path: &Path) -> Result<bool, String> {
    match fs::remove_file(path) {
        Ok(()) => {
            sync_folder(path);
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(advice(path, &error)),
    }
}

/// Makes a folder, for root alone where it is new.
///
/// # Errors
/// What failed, where, and what to do.
pub fn make_folder(path: &Path, mode: u32) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|error| advice(path, &error))
}

/// The name that a file has until it is whole.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tulle-tmp"))
}

fn beside(path: &Path, mode: u32) -> Result<(File, PathBuf), String> {
    let temporary = temporary(path);
    // One that was left by a process which was killed.
    remove(&temporary)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary);
    let file = file.map_err(|error| advice(path, &error))?;
    // Whatever the mask of this process is: a runtime has to be able to run and read it.
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(|error| advice(path, &error))?;
    Ok((file, temporary))
}

fn settle(path: &Path, temporary: &Path, written: io::Result<()>) -> Result<(), String> {
    if let Err(error) = written.and_then(|()| fs::rename(temporary, path)) {
        let _ = fs::remove_file(temporary);
        return Err(advice(path, &error));
    }
    sync_folder(path);
    Ok(())
}

/// A rename is on the disk when its folder is. A file system that cannot do that has at least renamed.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}

fn same_content(source: &mut File, path: &Path) -> io::Result<bool> {
    let mut other = File::open(path)?;
    if source.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 256 << 10], vec![0; 256 << 10]);
    loop {
        let length = source.read(&mut left)?;
        if length == 0 {
            return Ok(true);
        }
        other.read_exact(&mut right[..length])?;
        if left[..length] != right[..length] {
            return Ok(false);
        }
    }
}

fn advice(path: &Path, error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; the file system is read-only there, as on images that are never written: give TULLE_CNI_BIN_DIR and TULLE_CNI_CONF_DIR the folders that this node's container runtime is configured with and that can be written"
        }
        io::ErrorKind::PermissionDenied => "; it takes root, and the folder has to be mounted for writing",
        io::ErrorKind::StorageFull => "; there is no room left on the node's disk",
        _ => "",
    };
    format!("{}: {error}{what}", path.display())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::{copy_program, read_bounded, remove, replace, temporary};

    #[test]
    fn a_file_is_replaced_whole_and_only_if_it_differs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("00-tulle.conflist");
        fs::write(temporary(&path), "left by a process that was killed").unwrap();
        assert_eq!(replace(&path, b"one", 0o600), Ok(true));
        assert_eq!(replace(&path, b"one", 0o600), Ok(false));
        assert_eq!(replace(&path, b"two", 0o600), Ok(true));
        assert_eq!(replace(&path, b"two", 0o644), Ok(true));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(read_bounded(&path, 3).unwrap(), b"two");
        assert!(read_bounded(&path, 2).unwrap_err().contains("more than 2 bytes"));
        assert_eq!((remove(&path), remove(&path)), (Ok(true), Ok(false)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_program_is_copied_while_the_old_one_runs() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, vec![7; 300 << 10]).unwrap();
        assert_eq!(copy_program(&from, &to), Ok(true));
        assert_eq!(copy_program(&from, &to), Ok(false));
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o755);
        fs::write(&from, vec![8; 300 << 10]).unwrap();
        assert_eq!(copy_program(&from, &to), Ok(true));
        assert!(copy_program(&from, &folder.path().join("none/to")).is_err());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let error = replace(std::path::Path::new("/proc/nothing.conflist"), b"", 0o600).unwrap_err();
        assert!(error.contains("/proc/nothing.conflist"), "{error}");
    }
}
