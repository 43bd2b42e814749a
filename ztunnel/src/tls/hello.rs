//! The name in a ClientHello, read without taking part in the handshake.
//!
//! A hello with post-quantum key shares is larger than a packet and may be cut anywhere, also into several records, so it
//! is put together first, within [`MOST`]. Strict where two readers could differ: a second name, a name of another kind, a
//! length that does not add up, and a record of anything else in between make it no hello. RFC 8446 §4.1.2 and §5.1,
//! RFC 6066 §3. Limits: what is inside an Encrypted ClientHello stays hidden; that there is one is said.

/// Bytes of a hello, records' headers included. Browsers send 2 KB with a post-quantum share; rustls takes no more either.
pub const MOST: usize = 64 * 1024;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// Longest record, bytes (RFC 8446 §5.1).
const RECORD: usize = 1 << 14;
const SERVER_NAME: u16 = 0;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
/// Longest name, bytes (RFC 1035 §2.3.4, as text).
const NAME_MAX: usize = 253;

/// What the first bytes of a client are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// The beginning of a hello.
    More,
    /// No hello, and why.
    Not(&'static str),
    /// A hello.
    Client {
        /// The name that it asks for, in lower case. Nothing but letters, digits, `-`, `_` and dots, and no dot at the end.
        name: Option<String>,
        /// It carries an Encrypted ClientHello, so `name` may be a front for another one. Browsers send it without meaning
        /// it, too (GREASE).
        ech: bool,
    },
}

/// Reads the `first` bytes of a connection.
pub fn read(first: &[u8]) -> Hello {
    let message = match unwrap(first) {
        Ok(message) => message,
        Err(why) => return why,
    };
    parse(&message).unwrap_or(Hello::Not("its ClientHello is malformed"))
}

/// The ClientHello without its records.
fn unwrap(first: &[u8]) -> Result<Vec<u8>, Hello> {
    let mut message = Vec::new();
    let mut rest = first;
    loop {
        if let Some([kind, length @ ..]) = message.get(..4) {
            if *kind != CLIENT_HELLO {
                return Err(Hello::Not("its first handshake message is no ClientHello"));
            }
            let length = length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            if length + 4 > MOST {
                return Err(Hello::Not("its ClientHello is longer than 64 KiB"));
            }
            if message.len() >= length + 4 {
                // More of the same flight would be an error of the client's; whoever terminates TLS says so.
                message.truncate(length + 4);
                return Ok(message.split_off(4));
            }
        }
        match rest {
            [] => break,
            [HANDSHAKE] | [HANDSHAKE, 3] => break,
            [HANDSHAKE, 3, 0..=4, tail @ ..] => {
                let Some((length, tail)) = tail.split_first_chunk::<2>() else { break };
                let length = usize::from(u16::from_be_bytes(*length));
                if length == 0 || length > RECORD {
                    return Err(Hello::Not("a TLS record has a length that is not allowed"));
                }
                message.extend_from_slice(&tail[..length.min(tail.len())]);
                rest = tail.get(length..).unwrap_or_default();
            }
            _ => return Err(Hello::Not("it does not speak TLS")),
        }
    }
    if first.len() >= MOST { Err(Hello::Not("its ClientHello is longer than 64 KiB")) } else { Err(Hello::More) }
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of `size` bytes.
    fn number(&mut self, size: usize) -> Option<usize> {
        Some(self.take(size)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    }

    /// What follows a length of `size` bytes.
    fn vector(&mut self, size: usize) -> Option<Self> {
        let length = self.number(size)?;
        Some(Self(self.take(length)?))
    }
}

/// Reads the body of a ClientHello. `None`: it is malformed.
fn parse(body: &[u8]) -> Option<Hello> {
    let mut fields = Fields(body);
    fields.take(2 + 32)?;
    fields.vector(1)?;
    fields.vector(2)?;
    fields.vector(1)?;
    let (mut name, mut ech) = (None, false);
    if fields.0.is_empty() {
        return Some(Hello::Client { name, ech });
    }
    let mut extensions = fields.vector(2)?;
    if !fields.0.is_empty() {
        return None;
    }
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let content = extensions.vector(2)?;
        match u16::try_from(kind).ok()? {
            SERVER_NAME if name.is_some() => return None,
            SERVER_NAME => name = Some(server_name(content)?),
            ENCRYPTED_CLIENT_HELLO => ech = true,
            _ => {}
        }
    }
    Some(Hello::Client { name, ech })
}

/// The one name of the extension.
fn server_name(mut content: Fields<'_>) -> Option<String> {
    let mut list = content.vector(2)?;
    let kind = list.number(1)?;
    let name = list.vector(2)?.0;
    if !content.0.is_empty() || !list.0.is_empty() || kind != 0 {
        return None;
    }
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > NAME_MAX || !name.iter().all(legal) || name.ends_with(b".") {
        return None;
    }
    Some(name.iter().map(|byte| char::from(byte.to_ascii_lowercase())).collect())
}

#[cfg(test)]
mod tests {
    use super::{Hello, MOST, read};

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap();
        [&kind.to_be_bytes()[..], &length.to_be_bytes(), content].concat()
    }

    fn sni(kind: u8, name: &[u8]) -> Vec<u8> {
        let name_length = u16::try_from(name.len()).unwrap();
        let entry = [&[kind][..], &name_length.to_be_bytes(), name].concat();
        extension(0, &[&u16::try_from(entry.len()).unwrap().to_be_bytes()[..], &entry].concat())
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let length = u16::try_from(extensions.len()).unwrap();
        let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &length.to_be_bytes(), extensions].concat();
        let size = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[1][..], &size[1..], &body].concat()
    }

    /// In records of at most `size` bytes.
    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let record = |part: &[u8]| [&[22, 3, 1][..], &u16::try_from(part.len()).unwrap().to_be_bytes(), part].concat();
        message.chunks(size).flat_map(record).collect()
    }

    fn named(name: &str) -> Hello {
        Hello::Client { name: Some(name.to_owned()), ech: false }
    }

    #[test]
    fn a_hello_has_one_name_or_none() {
        let bad = Hello::Not("its ClientHello is malformed");
        let share = extension(51, &[9; 1300]);
        let cases = [
            ("a name", sni(0, b"api.Example.com"), named("api.example.com")),
            ("after a large key share", [&share[..], &sni(0, b"a.b")].concat(), named("a.b")),
            ("none", share.clone(), Hello::Client { name: None, ech: false }),
            (
                "with ECH",
                [&sni(0, b"front")[..], &extension(0xfe0d, &[1, 2])].concat(),
                Hello::Client { name: Some("front".to_owned()), ech: true },
            ),
            ("two extensions", [sni(0, b"a.b"), sni(0, b"c.d")].concat(), bad.clone()),
            ("another kind of name", sni(1, b"a.b"), bad.clone()),
            ("an empty name", sni(0, b""), bad.clone()),
            ("a dot at the end", sni(0, b"a.b."), bad.clone()),
            ("a zero inside", sni(0, b"a.b\0.evil"), bad.clone()),
            ("a name that is too long", sni(0, &[b'a'; 254]), bad.clone()),
            ("bytes behind the list", extension(0, &[0, 4, 0, 0, 1, b'a', b'x']), bad.clone()),
            ("two names in one list", extension(0, &[0, 8, 0, 0, 1, b'a', 0, 0, 1, b'b']), bad),
        ];
        for (what, extensions, expected) in cases {
            for size in [1 << 14, 100, 1] {
                assert_eq!(read(&records(&message(&extensions), size)), expected, "{what}, records of {size}");
            }
        }
    }

    #[test]
    fn a_hello_that_is_cut_anywhere_needs_more_and_never_changes_its_answer() {
        let whole = records(&message(&[extension(51, &[9; 1300]), sni(0, b"a.b")].concat()), 700);
        for size in 0..whole.len() {
            assert_eq!(read(&whole[..size]), Hello::More, "{size} of {}", whole.len());
        }
        assert_eq!(read(&whole), named("a.b"));
        assert_eq!(read(&[&whole[..], b"more"].concat()), named("a.b"));
    }

    #[test]
    fn what_is_no_hello_is_told_at_once() {
        for bytes in
            [&b"GET / HTTP/1.1"[..], b"SSH-2.0", &[22, 2, 0], &[21, 3, 1], &[22, 3, 1, 0, 0], &[22, 3, 1, 0x40, 1]]
        {
            assert!(matches!(read(bytes), Hello::Not(_)), "{bytes:?}");
        }
        assert!(matches!(read(&[22, 3, 1, 0, 4, 2, 0, 0, 0]), Hello::Not(_)), "a ServerHello");
        assert!(matches!(read(&[22, 3, 1, 0, 4, 1, 1, 0, 0]), Hello::Not(_)), "a length beyond the limit");
        let endless: Vec<u8> =
            [22, 3, 1, 0, 1, 1].into_iter().cycle().take(6).chain([22, 3, 1, 0, 1, 0].repeat(MOST)).collect();
        assert!(matches!(read(&endless), Hello::Not(_) | Hello::Client { .. }), "never read for ever");
    }

    #[test]
    fn what_rustls_sends_is_read() {
        let roots = rustls::RootCertStore::empty();
        let config = rustls::ClientConfig::builder_with_provider(crate::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = rustls::pki_types::ServerName::try_from("api.example.com").unwrap();
        let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        assert_eq!(read(&bytes), named("api.example.com"));
    }
}
