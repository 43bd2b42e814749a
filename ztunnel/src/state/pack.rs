//! Numbers, addresses and texts as few bytes, for `record`.
//!
//! What is read was written here, in the same process; a [`Cursor`] that meets its end gives zeroes and empty texts.

use std::net::IpAddr;

/// Forms of a text: its length is in units of its form.
const PLAIN: usize = 0;
/// Two lower-case hexadecimal digits to a byte.
const HEX: usize = 1;
/// A UUID, lower case: 16 bytes.
const UUID: usize = 2;
/// Where a UUID has hyphens.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

/// Seven bits to a byte, the lowest first.
pub(super) fn put_number(to: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        to.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

/// An address with its length.
pub(super) fn put_ip(to: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            to.push(4);
            to.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            to.push(16);
            to.extend(ip.octets());
        }
    }
}

/// A text that is read in place.
pub(super) fn put_words(to: &mut Vec<u8>, text: &str) {
    put_number(to, text.len());
    to.extend(text.as_bytes());
}

/// A text in its shortest form.
pub(super) fn put_text(to: &mut Vec<u8>, text: &str) {
    let uuid = text.len() == 36 && HYPHENS.iter().all(|at| text.as_bytes()[*at] == b'-');
    let packed = if uuid { from_hex(&text.replace('-', "")).filter(|bytes| bytes.len() == 16) } else { from_hex(text) };
    let (form, bytes) = match &packed {
        Some(bytes) if uuid => (UUID, bytes.as_slice()),
        Some(bytes) => (HEX, bytes.as_slice()),
        None => (PLAIN, text.as_bytes()),
    };
    put_number(to, bytes.len() * 4 + form);
    to.extend(bytes);
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
    if rest.is_empty() { bytes.collect() } else { None }
}

/// Reads what was put, in the same order.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at_checked(length).unwrap_or_default();
        self.0 = rest;
        head
    }

    pub(super) fn number(&mut self) -> usize {
        let mut number = 0;
        for shift in (0..usize::BITS).step_by(7) {
            let Some(byte) = self.take(1).first() else { break };
            number |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        number
    }

    pub(super) fn ip(&mut self) -> Option<IpAddr> {
        let length = usize::from(*self.take(1).first()?);
        let bytes = self.take(length);
        let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
    }

    pub(super) fn words(&mut self) -> &'a str {
        let length = self.number();
        std::str::from_utf8(self.take(length)).unwrap_or_default()
    }

    pub(super) fn text(&mut self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let header = self.number();
        let bytes = self.take(header / 4);
        if header % 4 == PLAIN {
            return String::from_utf8_lossy(bytes).into_owned();
        }
        let mut text = String::with_capacity(2 * bytes.len() + HYPHENS.len());
        for byte in bytes {
            if header % 4 == UUID && HYPHENS.contains(&text.len()) {
                text.push('-');
            }
            text.extend([byte >> 4, byte & 15].map(|digit| char::from(DIGITS[usize::from(digit)])));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_out_as_they_went_in_and_known_forms_are_short() {
        let cases = [
            ("", 1),
            ("v1", 3),
            ("0123456789abcdef", 9),
            ("0123456789ABCDEF", 17),
            ("abc", 4),
            ("6f1c9a52-3b7d-4e08-9a41-00000000002a", 17),
            ("6f1c9a52-3b7d-4e08-9a41-00000000002A", 38),
            ("6f1c9a52-3b7d-4e08-9a41-0000000000-a", 38),
            ("é", 3),
        ];
        for (text, length) in cases {
            let mut bytes = Vec::new();
            put_text(&mut bytes, text);
            assert_eq!(bytes.len(), length, "{text}");
            assert_eq!(Cursor::new(&bytes).text(), text);
        }
    }

    #[test]
    fn bytes_that_nobody_wrote_read_as_nothing() {
        let mut cursor = Cursor::new(&[0xff; 3]);
        assert_eq!((cursor.number() > 0, cursor.words(), cursor.ip()), (true, "", None));
        assert_eq!(Cursor::new(&[200, 200]).text(), "");
    }
}
