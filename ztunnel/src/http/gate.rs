//! Where each HTTP/1 request of a client begins and ends, followed beside the parser and before it, so that a message that
//! another reader could frame in another way is refused and not interpreted.
//!
//! The parser forgives what RFC 9112 §6.1 lets it forgive: a message with chunks and a length is read by its chunks, and
//! codings in front of `chunked` are left in the body. Both are how requests are smuggled past a proxy, and the program
//! behind the parser cannot see them any more. So the bytes are looked at on their way to it. [`Gate::follow`] accepts a
//! strict part of what the parser accepts, and says at which byte it stops; whoever reads puts a byte there that no parser
//! takes, so both agree about every message that passes. Pure, and fuzzed. Not followed: what comes behind CONNECT or a
//! wish for another protocol, which may be another protocol.

/// Bytes of a line that are looked at. Lines that say something about framing are shorter; a chunk extension that is longer
/// is refused, as nothing uses them.
const LINE: usize = 512;

/// Digits of a length: fewer than overflow.
const DIGITS: usize = 18;

/// Why a message is refused, and at which byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// The first byte that must not pass.
    pub at: usize,
    /// In words for the record.
    pub why: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a request, where empty lines may be.
    Before,
    Headers,
    /// Bytes of a body that are still to come, and whether they are a chunk's.
    Data(u64, Chunked),
    ChunkSize,
    /// The line break behind a chunk.
    ChunkEnd,
    Trailers,
    /// Nothing is known any more.
    Unknown,
}

type Chunked = bool;

/// See the module's header.
#[derive(Debug)]
pub struct Gate {
    state: State,
    line: Vec<u8>,
    /// The line is longer than what is kept of it.
    long: bool,
    /// Its last byte so far.
    last: u8,
    length: Option<u64>,
    chunked: bool,
    /// Another protocol may follow this message.
    switch: bool,
}

impl Default for Gate {
    fn default() -> Self {
        let (line, state) = (Vec::new(), State::Before);
        Self { state, line, long: false, last: 0, length: None, chunked: false, switch: false }
    }
}

impl Gate {
    /// Follows the next `bytes`.
    ///
    /// # Errors
    /// Where they stop being a message that everybody reads alike. Nothing may be followed after that.
    pub fn follow(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self.state {
                State::Unknown => return Ok(()),
                State::Data(left, chunked) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    at += taken;
                    let left = left - taken as u64;
                    self.state = match (left, chunked) {
                        (1.., _) => State::Data(left, chunked),
                        (0, true) => State::ChunkEnd,
                        (0, false) => self.next(),
                    };
                }
                _ => {
                    let end = rest.iter().position(|byte| *byte == b'\n');
                    self.keep(&rest[..end.unwrap_or(rest.len())]);
                    at += end.unwrap_or(rest.len());
                    if end.is_some() {
                        self.state = self.line().map_err(|why| Stop { at, why })?;
                        self.line.clear();
                        (self.long, self.last) = (false, 0);
                        at += 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn keep(&mut self, part: &[u8]) {
        let room = LINE - self.line.len();
        self.line.extend_from_slice(&part[..part.len().min(room)]);
        self.long |= part.len() > room;
        self.last = part.last().copied().unwrap_or(self.last);
    }

    /// What comes behind a message.
    fn next(&mut self) -> State {
        (self.length, self.chunked) = (None, false);
        if self.switch { State::Unknown } else { State::Before }
    }

    /// What comes behind the line that has just ended.
    fn line(&mut self) -> Result<State, &'static str> {
        let line = std::mem::take(&mut self.line);
        let text = if self.long { &line[..] } else { line.strip_suffix(b"\r").unwrap_or(&line) };
        let next = match self.state {
            State::Before if text.is_empty() => Ok(State::Before),
            State::Before => {
                self.switch = text.starts_with(b"CONNECT ");
                Ok(State::Headers)
            }
            State::Headers if text.is_empty() => self.body(),
            State::Headers => self.header(text).map(|()| State::Headers),
            _ if self.last != b'\r' => Err("a line between chunks that does not end in CR LF"),
            State::ChunkSize if self.long => Err("a chunk extension that is too long"),
            State::ChunkSize => size(text).map(|size| match size {
                0 => State::Trailers,
                size => State::Data(size, true),
            }),
            State::ChunkEnd if text.is_empty() => Ok(State::ChunkSize),
            State::ChunkEnd => Err("a chunk that is longer than it says"),
            State::Trailers if text.is_empty() => Ok(self.next()),
            State::Trailers | State::Data(..) | State::Unknown => Ok(self.state),
        };
        self.line = line;
        next
    }

    fn header(&mut self, line: &[u8]) -> Result<(), &'static str> {
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Err("a folded header line");
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return if self.long { Ok(()) } else { Err("a header line without a colon") };
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        let framing = name.eq_ignore_ascii_case(b"content-length") || name.eq_ignore_ascii_case(b"transfer-encoding");
        if framing && self.long {
            return Err("a header about the message's length is too long");
        }
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked {
                return Err("more than one Transfer-Encoding header");
            }
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err("a transfer coding other than chunked");
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let length = decimal(value).ok_or("a Content-Length that is none")?;
            if self.length.is_some_and(|before| before != length) {
                return Err("two lengths that differ");
            }
            self.length = Some(length);
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.switch = true;
        }
        if self.chunked && self.length.is_some() {
            return Err("both Content-Length and Transfer-Encoding");
        }
        Ok(())
    }

    /// What comes behind a head.
    fn body(&mut self) -> Result<State, &'static str> {
        Ok(match self.length {
            _ if self.chunked => State::ChunkSize,
            Some(length @ 1..) => State::Data(length, false),
            _ => self.next(),
        })
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = (1..=DIGITS).contains(&text.len()) && text.iter().all(u8::is_ascii_digit);
    digits.then(|| text.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0')))
}

/// The size of a chunk; extensions are passed over.
fn size(line: &[u8]) -> Result<u64, &'static str> {
    let end = line.iter().position(|byte| matches!(byte, b';' | b' ' | b'\t')).unwrap_or(line.len());
    let text = std::str::from_utf8(&line[..end]).unwrap_or_default();
    let hex = (1..16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let size = if hex { u64::from_str_radix(text, 16).ok() } else { None };
    let rest = line[end..].trim_ascii_start();
    if rest.contains(&b'\r') {
        return Err("a line break in a chunk extension");
    }
    match size {
        Some(size) if rest.is_empty() || rest[0] == b';' => Ok(size),
        _ => Err("a chunk size that is none"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Gate, LINE};

    /// Why `bytes` are refused, followed as a whole and byte by byte.
    fn refused(bytes: &[u8]) -> Option<&'static str> {
        let whole = Gate::default().follow(bytes).err();
        let mut gate = Gate::default();
        let single =
            bytes.iter().enumerate().find_map(|(at, byte)| gate.follow(&[*byte]).err().map(|stop| (at, stop.why)));
        assert_eq!(whole.map(|stop| (stop.at, stop.why)), single, "{:?}", String::from_utf8_lossy(bytes));
        single.map(|(_, why)| why)
    }

    #[test]
    fn what_two_readers_could_frame_differently_is_refused() {
        let post = |headers: &str, body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{headers}\r\n{body}");
        let long = "a".repeat(LINE);
        let both = Some("both Content-Length and Transfer-Encoding");
        let coding = Some("a transfer coding other than chunked");
        for (headers, body, expected) in [
            ("content-length: 2\r\n", "ab", None),
            ("content-length: 2\r\ncontent-length: 2\r\n", "ab", None),
            ("content-length: 2\r\ncontent-length: 3\r\n", "ab", Some("two lengths that differ")),
            ("content-length: 2, 2\r\n", "ab", Some("a Content-Length that is none")),
            ("content-length: +2\r\n", "ab", Some("a Content-Length that is none")),
            ("content-length:\r\n", "", Some("a Content-Length that is none")),
            ("content-length: 99999999999999999999\r\n", "", Some("a Content-Length that is none")),
            ("Transfer-Encoding: chunked\r\n", "2\r\nab\r\n0\r\n\r\n", None),
            ("Transfer-Encoding:\tChunked \r\n", "2;x=y\r\nab\r\n0\r\nx-trailer: 1\r\n\r\n", None),
            ("content-length: 2\r\nTransfer-Encoding: chunked\r\n", "", both),
            ("Transfer-Encoding: chunked\r\ncontent-length: 2\r\n", "", both),
            (
                "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
                "",
                Some("more than one Transfer-Encoding header"),
            ),
            ("transfer-encoding: gzip, chunked\r\n", "", coding),
            ("transfer-encoding: xchunked\r\n", "", coding),
            ("transfer-encoding: identity\r\n", "", coding),
            ("transfer-encoding: chunked, identity\r\n", "", coding),
            ("x-a: 1\r\n folded\r\n", "", Some("a folded header line")),
            ("nothing\r\n", "", Some("a header line without a colon")),
            ("transfer-encoding: chunked\r\n", "zz\r\n", Some("a chunk size that is none")),
            ("transfer-encoding: chunked\r\n", "0x2\r\nab", Some("a chunk size that is none")),
            ("transfer-encoding: chunked\r\n", "\r\n", Some("a chunk size that is none")),
            ("transfer-encoding: chunked\r\n", "2 3\r\n", Some("a chunk size that is none")),
            ("transfer-encoding: chunked\r\n", "ffffffffffffffff\r\n", Some("a chunk size that is none")),
            ("transfer-encoding: chunked\r\n", "2\nab", Some("a line between chunks that does not end in CR LF")),
            ("transfer-encoding: chunked\r\n", "2\r\nabc\r\n", Some("a chunk that is longer than it says")),
            (
                "transfer-encoding: chunked\r\n",
                "0\r\nx: 1\n\r\n",
                Some("a line between chunks that does not end in CR LF"),
            ),
        ] {
            assert_eq!(refused(post(headers, body).as_bytes()), expected, "{headers:?} {body:?}");
        }
        let extension = post("transfer-encoding: chunked\r\n", &format!("2;{long}\r\nab\r\n0\r\n\r\n"));
        assert_eq!(refused(extension.as_bytes()), Some("a chunk extension that is too long"));
        let trailer = post("transfer-encoding: chunked\r\n", &format!("0\r\nx: {long}\r\n\r\n"));
        assert_eq!(refused(trailer.as_bytes()), None);
        let value = post(&format!("content-length: {long}\r\n"), "");
        assert_eq!(refused(value.as_bytes()), Some("a header about the message's length is too long"));
        assert_eq!(refused(post(&format!("x-long: {long}\r\n"), "").as_bytes()), None);
    }

    #[test]
    fn the_message_behind_a_message_is_followed_too() {
        let bad = "POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n";
        for before in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "\r\nGET / HTTP/1.1\nhost: a\n\n",
            "POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\n12345",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
        ] {
            assert_eq!(refused(before.as_bytes()), None, "{before:?}");
            assert!(refused(format!("{before}{bad}").as_bytes()).is_some(), "{before:?}");
            // What looks like a message inside of a body is none.
            let inside = format!("POST / HTTP/1.1\r\ncontent-length: {}\r\n\r\n{bad}{before}", bad.len());
            assert_eq!(refused(inside.as_bytes()), None);
        }
        for before in ["CONNECT a:1 HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nupgrade: websocket\r\n\r\n"] {
            assert_eq!(refused(format!("{before}{bad}").as_bytes()), None, "another protocol may follow {before:?}");
        }
    }
}
