//! The plugin's log: one line a call, in a file of the state folder.
//!
//! Standard output belongs to the runtime, and what a plugin writes to standard error runtimes drop, so that a call which was
//! slow or refused could otherwise not be found again. Two files of at most [`LARGEST`] bytes; nothing waits for them, and a log
//! that cannot be written fails no call.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::base::unix_now;

/// Name of the file; the one before it has `.1` at its end.
pub const FILE: &str = "plugin.log";
/// Bytes after which a new file begins: some 5,000 calls.
pub const LARGEST: u64 = 1 << 20;
/// Longest line: a refusal with its details.
const LINE_MAX: usize = 8 << 10;

/// Adds a line.
pub fn add(folder: &Path, line: &str) {
    let path = folder.join(FILE);
    if fs::metadata(&path).is_ok_and(|meta| meta.len() >= LARGEST) {
        // Two calls at once may both do this; then some lines are lost, and nothing else.
        let _ = fs::rename(&path, folder.join(format!("{FILE}.1")));
    }
    let Ok(mut file) = OpenOptions::new().append(true).create(true).mode(0o600).open(&path) else { return };
    let time = jiff::Timestamp::from_second(unix_now()).map(|time| time.to_string()).unwrap_or_default();
    let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LINE_MAX).collect();
    // One write, so that lines of concurrent calls do not mix.
    let _ = file.write_all(format!("{time} [{}] {line}\n", std::process::id()).as_bytes());
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{FILE, LARGEST, add};

    #[test]
    fn the_log_has_two_files_of_a_bounded_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        add(folder.path(), "first\nline");
        assert!(fs::read_to_string(&path).unwrap().ends_with(" first line\n"));
        for _ in 0..3 {
            fs::write(&path, vec![b'x'; usize::try_from(LARGEST).unwrap()]).unwrap();
            add(folder.path(), "next");
            assert!(fs::metadata(&path).unwrap().len() < 100);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        add(std::path::Path::new("/nowhere/at/all"), "lost");
    }
}
