//! One spelling for each path, for routing, authorization and the backend alike.
//!
//! What Istio's default does (RFC 3986, section 6.2.2; `\` is `/`): dot segments are taken out, escapes of letters, digits and
//! `-._~` are written plainly, all others in capitals, bytes beyond ASCII as escapes. Left as they are: `//`, `%2F`, `;`; they
//! mean different things to different applications. What has no one reading is refused rather than guessed at: an escape
//! that is none, NUL, control characters, a fragment. The result of a result is itself.

use std::borrow::Cow;
use std::fmt;

/// Why a path is refused; the request is answered 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    /// It does not begin with `/`.
    Relative,
    /// `%` without two hexadecimal digits after it.
    Escape,
    /// A character that has no place in a path: a control character, a space, `#`, `?`, or NUL, also as an escape.
    Character,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Relative => "the path does not begin with a slash",
            Self::Escape => "the path has a % that begins no escape",
            Self::Character => "the path has a character that has no place in one",
        })
    }
}

/// The path in its one spelling. `*`, of OPTIONS, is itself.
///
/// # Errors
/// See [`PathError`].
pub fn normalise(path: &str) -> Result<Cow<'_, str>, PathError> {
    if path == "*" {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with(['/', '\\']) {
        return Err(PathError::Relative);
    }
    if is_normal(path.as_bytes()) {
        return Ok(Cow::Borrowed(path));
    }
    Ok(Cow::Owned(without_dots(&spelled(path.as_bytes())?)))
}

/// Most paths are, and then nothing is copied. Says no where it would have to look twice.
fn is_normal(path: &[u8]) -> bool {
    let plain = |byte: &u8| matches!(byte, 0x21..=0x7e) && !matches!(byte, b'%' | b'\\' | b'#' | b'?');
    path.iter().all(plain) && !path.windows(2).any(|pair| pair == b"/.")
}

fn spelled(path: &[u8]) -> Result<String, PathError> {
    let mut text = String::with_capacity(path.len());
    let mut rest = path.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(*digit).to_digit(16));
                let (Some(high), Some(low)) = (digit(), digit()) else { return Err(PathError::Escape) };
                let byte = (high << 4 | low) as u8;
                match byte {
                    0 => return Err(PathError::Character),
                    b'-' | b'.' | b'_' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => text.push(char::from(byte)),
                    _ => escape(&mut text, byte),
                }
            }
            b'\\' => text.push('/'),
            b'#' | b'?' | 0..=0x20 | 0x7f => return Err(PathError::Character),
            0x80.. => escape(&mut text, *byte),
            byte => text.push(char::from(*byte)),
        }
    }
    Ok(text)
}

fn escape(text: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.push('%');
    text.push(char::from(DIGITS[usize::from(byte >> 4)]));
    text.push(char::from(DIGITS[usize::from(byte & 15)]));
}

/// RFC 3986, section 5.2.4: `.` and `..` are taken out; above the root is the root.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_with_slash = false;
    for element in path.split('/').skip(1) {
        ends_with_slash = matches!(element, "." | "..");
        match element {
            "." => {}
            ".." => drop(kept.pop()),
            other => kept.push(other),
        }
    }
    let mut text = String::with_capacity(path.len());
    for element in kept {
        text.push('/');
        text.push_str(element);
    }
    if ends_with_slash || text.is_empty() {
        text.push('/');
    }
    text
}
