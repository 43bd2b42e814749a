//! What a client speaks, told from its first bytes. Pure; the caller says how long to wait for more of them.
//!
//! Only what decides is looked at: the HTTP/2 preface, or a method and the space behind it. TLS, database greetings and
//! everything else that is not text of this form is "not HTTP" from its first byte on.

/// What the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Something else.
    Other,
    /// Too few bytes to tell.
    More,
}

/// How every HTTP/2 connection begins (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes that always suffice: the preface, and longer than any registered method.
pub const ENOUGH: usize = 32;

/// Tells what the client speaks by the `first` bytes of it.
pub fn sniff(first: &[u8]) -> Sniffed {
    if first.is_empty() {
        return Sniffed::More;
    }
    let known = first.len().min(PREFACE.len());
    if first[..known] == PREFACE[..known] {
        return if known == PREFACE.len() { Sniffed::Http2 } else { Sniffed::More };
    }
    // Empty lines before a request are to be tolerated (RFC 9112 §2.2).
    let start = first.iter().take(4).take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let text = &first[start..];
    match text.iter().position(|byte| *byte == b' ') {
        Some(0) => Sniffed::Other,
        Some(end) if text[..end].iter().all(|byte| is_token(*byte)) => match text.get(end + 1) {
            None => Sniffed::More,
            // A path, `*`, or `http:`; anything but these two words of a line in another protocol of text.
            Some(b'/' | b'*' | b'h' | b'H') => Sniffed::Http1,
            Some(_) if &text[..end] == b"CONNECT" => Sniffed::Http1,
            Some(_) => Sniffed::Other,
        },
        None if text.len() < ENOUGH && text.iter().all(|byte| is_token(*byte)) => Sniffed::More,
        Some(_) | None => Sniffed::Other,
    }
}

/// Letters of methods in use. RFC 9110 allows more, which would take text protocols for HTTP.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_uppercase() || matches!(byte, b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use super::{ENOUGH, PREFACE, Sniffed, sniff};

    #[test]
    fn the_first_bytes_tell_the_protocol() {
        let tls = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc];
        let cases: &[(&[u8], Sniffed)] = &[
            (b"", Sniffed::More),
            (b"G", Sniffed::More),
            (b"GET ", Sniffed::More),
            (b"GET /", Sniffed::Http1),
            (b"\r\nPOST /a HTTP/1.1", Sniffed::Http1),
            (b"OPTIONS *", Sniffed::Http1),
            (b"CONNECT a:1", Sniffed::Http1),
            (b"PR", Sniffed::More),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", Sniffed::More),
            (PREFACE, Sniffed::Http2),
            (b"PROPFIND /", Sniffed::Http1),
            (b"get /", Sniffed::Other),
            (b" GET /", Sniffed::Other),
            (b"*3\r\n$3\r\nSET", Sniffed::Other),
            (b"SSH-2.0-OpenSSH_9.2", Sniffed::Other),
            (b"EHLO mail.example", Sniffed::Other),
            (b"GET http://a/", Sniffed::Http1),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Sniffed::Other),
            (&tls, Sniffed::Other),
        ];
        for (first, expected) in cases {
            assert_eq!(sniff(first), *expected, "{:?}", String::from_utf8_lossy(first));
        }
        assert_eq!(sniff(&[b'A'; ENOUGH]), Sniffed::Other, "enough is enough");
    }

    #[test]
    fn more_bytes_never_change_an_answer() {
        for whole in [&b"DELETE /a HTTP/1.1\r\n\r\n"[..], PREFACE, b"SSH-2.0-x\r\n", b"\x16\x03\x01"] {
            let last = sniff(whole);
            for size in 1..whole.len() {
                let found = sniff(&whole[..size]);
                assert!(found == Sniffed::More || found == last, "{size} of {whole:?}: {found:?}");
            }
        }
    }
}
