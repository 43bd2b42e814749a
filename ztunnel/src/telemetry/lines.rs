//! The writer of log lines: a worker appends to a buffer, one thread writes what has come together.
//!
//! A line for each connection, written by itself, wakes the writer and costs a system call each time, which is a good
//! part of what a short connection costs at all. So the writer, once woken, waits [`TOGETHER`] before it writes, and is not
//! woken again meanwhile. A line that finds no room, or cannot be written, is dropped and counted; nobody ever waits for
//! the log. At the end of the process the last lines are waited for, and what was lost is said on stderr; the thread itself
//! never ends, because other threads may have something to say until the very end.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that may wait: some 40,000 connections.
const MOST: usize = 20 << 20;
/// What an empty buffer keeps, bytes.
const SPARE: usize = 64 << 10;
/// How long lines wait for others. Whoever reads a log does not notice.
const TOGETHER: Duration = Duration::from_millis(10);
/// How long the end of the process waits for its last lines: the reader of a full pipe may never come back.
const LAST: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// The writer is on its way and need not be woken.
    awake: bool,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    dropped: AtomicU64,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where lines are written to. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<Shared>);

/// Waits for the last lines when it is dropped, and says how many were lost.
#[derive(Debug)]
pub struct Writer {
    lines: Lines,
    done: Receiver<()>,
}

impl Lines {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(out: impl Write + Send + 'static) -> io::Result<(Self, Writer)> {
        let lines = Self::default();
        let (done, wait) = sync_channel(1);
        let shared = lines.0.clone();
        thread::Builder::new().name("log".into()).spawn(move || write(&shared, out, &done))?;
        Ok((lines.clone(), Writer { lines, done: wait }))
    }

    /// Lines that found no room, or could not be written.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.waiting();
        if waiting.bytes.len() + line.len() > MOST {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        waiting.bytes.extend_from_slice(line);
        if !std::mem::replace(&mut waiting.awake, true) {
            self.0.wake.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.lines.0.waiting().ended = true;
        self.lines.0.wake.notify_one();
        let stuck = self.done.recv_timeout(LAST).is_err();
        if let Some(text) = lost(self.lines.dropped(), stuck) {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }
}

/// What is to be said of lines that were lost, if there are some.
fn lost(dropped: u64, stuck: bool) -> Option<String> {
    let rest = if stuck { ", and the last ones: nobody took them within a second" } else { "" };
    (dropped > 0 || stuck).then(|| format!("{dropped} lines of the log were lost since the start{rest}"))
}

fn write(shared: &Shared, mut out: impl Write, done: &SyncSender<()>) {
    let mut bytes = Vec::new();
    let mut told = false;
    loop {
        let waiting = shared.waiting();
        let idle = |waiting: &mut Waiting| {
            waiting.awake = !waiting.bytes.is_empty();
            !waiting.awake && (!waiting.ended || told)
        };
        let waiting = shared.wake.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
        let together = shared.wake.wait_timeout_while(waiting, TOGETHER, |waiting| !waiting.ended);
        let (mut waiting, _) = together.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut waiting.bytes, &mut bytes);
        let ended = waiting.ended && bytes.is_empty();
        drop(waiting);
        if ended {
            let _ = done.try_send(());
            told = true;
        }
        // A log that nobody takes must not stop the proxy.
        if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            shared.dropped.fetch_add(lines as u64, Ordering::Relaxed);
        }
        bytes.clear();
        bytes.shrink_to(SPARE);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::{Lines, MOST, lost};

    /// Each write as a message; waits for a permission first.
    struct Out(Sender<Vec<u8>>, Receiver<()>);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.recv().map_err(io::Error::other)?;
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk without room.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_leave_together_in_order_and_the_last_ones_at_the_end() {
        let (sent, got) = channel();
        let (go, may) = channel();
        let (mut lines, writer) = Lines::start(Out(sent, may)).unwrap();
        for n in 0..100 {
            writeln!(lines, "{n}").unwrap();
        }
        (0..50).for_each(|_| go.send(()).unwrap());
        let first = got.recv().unwrap();
        writeln!(lines, "last").unwrap();
        drop(writer);
        let all: Vec<u8> = first.into_iter().chain(got.try_iter().flatten()).collect();
        let expected: String = (0..100).map(|n| format!("{n}\n")).chain(["last\n".to_owned()]).collect();
        assert_eq!(String::from_utf8(all).unwrap(), expected);
        // Other threads may still have something to say.
        writeln!(lines, "later").unwrap();
        assert_eq!(got.recv().unwrap(), b"later\n");
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told() {
        let (mut lines, writer) = Lines::start(Full).unwrap();
        lines.write_all(b"one\ntwo\n").unwrap();
        drop(writer);
        assert_eq!(lines.dropped(), 2);
        for (dropped, stuck, expected) in [
            (0, false, None),
            (2, false, Some("2 lines of the log were lost since the start")),
            (
                0,
                true,
                Some(
                    "0 lines of the log were lost since the start, and the last ones: nobody took them within a second",
                ),
            ),
        ] {
            assert_eq!(lost(dropped, stuck).as_deref(), expected);
        }
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let (sent, _got) = channel();
        let (_go, may) = channel();
        let (mut lines, _writer) = Lines::start(Out(sent, may)).unwrap();
        let line = vec![b'x'; MOST / 4];
        // The writer may hold one buffer while the next one fills.
        (0..12).for_each(|_| lines.write_all(&line).unwrap());
        assert!(lines.dropped() >= 4, "{}", lines.dropped());
    }
}
