//! Frames of an HTTP/2 client that carry nothing, counted on their way to the protocol's own code, so that a flood of them
//! ends the connection and not the worker's time.
//!
//! A ping, a stream that is opened and reset at once, a change of settings, an empty frame: each costs its sender a few
//! bytes and us an answer, a task, or a look into a table, as often as bytes arrive. h2 bounds what it keeps of each kind;
//! this bounds how many there are, all kinds together, by one bucket for a connection. Frames with a message or a part of
//! one, and window updates, are free: they are paid for by bytes, by requests, and by what we send. Pure, and fuzzed.

use std::time::Duration;

use crate::base::bucket::{Bucket, Rate};

/// Bytes of a frame's head (RFC 9113 §4.1).
pub(super) const HEAD: usize = 9;

/// Bytes before the first frame (§3.4).
const PREFACE: usize = 24;

/// Frames that carry nothing, a second: what a gRPC client that measures its line or gives up every second call sends at
/// most, and less than a hundredth of what a worker can answer.
const A_SECOND: u32 = 2_000;

/// How many may come at once: every request of a full connection is taken back, some times over.
const AT_ONCE: u32 = 10_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// See the module's header.
#[derive(Debug)]
pub struct Frames {
    head: [u8; HEAD],
    have: usize,
    /// Bytes until the next head.
    left: usize,
    bucket: Bucket,
}

impl Default for Frames {
    fn default() -> Self {
        Self { head: [0; HEAD], have: 0, left: PREFACE, bucket: Bucket::default() }
    }
}

impl Frames {
    /// Follows the next `bytes` of the client, at `now`.
    ///
    /// # Errors
    /// What there are too many of.
    pub fn follow(&mut self, mut bytes: &[u8], now: Duration) -> Result<(), &'static str> {
        let rate = Rate::per_second(A_SECOND, AT_ONCE);
        loop {
            let skipped = self.left.min(bytes.len());
            self.left -= skipped;
            bytes = &bytes[skipped..];
            let taken = (HEAD - self.have).min(bytes.len());
            if taken == 0 {
                return Ok(());
            }
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            (self.have, bytes) = (self.have + taken, &bytes[taken..]);
            if self.have < HEAD {
                return Ok(());
            }
            self.have = 0;
            let [a, b, c, kind, flags, ..] = self.head;
            self.left = length([a, b, c]);
            if let Some(what) = idle(kind, flags, self.left) {
                if !self.bucket.wait(rate, now).is_zero() {
                    return Err(what);
                }
                self.bucket.take(rate, now);
            }
        }
    }
}

/// Bytes of a frame behind its head, as the head begins.
pub(super) fn length([a, b, c]: [u8; 3]) -> usize {
    usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)
}

/// What a frame is called that carries nothing.
fn idle(kind: u8, flags: u8, length: usize) -> Option<&'static str> {
    match kind {
        DATA if length == 0 && flags & END_STREAM == 0 => Some("a flood of empty DATA frames"),
        HEADERS if length == 0 => Some("a flood of empty HEADERS frames"),
        CONTINUATION if flags & END_HEADERS == 0 => Some("a flood of CONTINUATION frames"),
        PRIORITY => Some("a flood of PRIORITY frames"),
        RST_STREAM => Some("a flood of RST_STREAM frames"),
        SETTINGS => Some("a flood of SETTINGS frames"),
        PING => Some("a flood of PING frames"),
        DATA | HEADERS | CONTINUATION | WINDOW_UPDATE => None,
        _ => Some("a flood of frames of no known kind"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{AT_ONCE, Frames, PREFACE};

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.resize(9 + usize::from(length), 6);
        frame
    }

    fn begun() -> Frames {
        let mut frames = Frames::default();
        frames.follow(&[b'x'; PREFACE], Duration::ZERO).unwrap();
        frames
    }

    #[test]
    fn only_frames_that_carry_nothing_are_counted() {
        let often = AT_ONCE as usize + 1;
        for (kind, flags, length, expected) in [
            (0, 0, 100, None),
            (0, 1, 0, None),
            (0, 0, 0, Some("a flood of empty DATA frames")),
            (1, 5, 10, None),
            (2, 0, 5, Some("a flood of PRIORITY frames")),
            (3, 0, 4, Some("a flood of RST_STREAM frames")),
            (4, 0, 6, Some("a flood of SETTINGS frames")),
            (6, 0, 8, Some("a flood of PING frames")),
            (8, 0, 4, None),
            (9, 0, 10, Some("a flood of CONTINUATION frames")),
            (77, 0, 0, Some("a flood of frames of no known kind")),
        ] {
            let bytes = frame(kind, flags, length).repeat(often);
            assert_eq!(begun().follow(&bytes, Duration::ZERO).err(), expected, "{kind}");
            // In pieces of any size, and what is sent slowly is none.
            let mut pieces = begun();
            let found = bytes.chunks(7).find_map(|piece| pieces.follow(piece, Duration::ZERO).err());
            assert_eq!(found, expected, "{kind} in pieces");
            let mut slow = begun();
            let one = frame(kind, flags, length);
            for second in 0..20 {
                assert_eq!(slow.follow(&one.repeat(1000), Duration::from_secs(second)), Ok(()), "{kind}");
            }
        }
    }
}
