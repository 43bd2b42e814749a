//! The one parser of SPIFFE ids: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` and nothing else.
//!
//! A value is valid by construction and cheap to clone (one shared string). The characters are those of the SPIFFE
//! standard narrowed to what Kubernetes can name; percent-encoding, empty or dot segments, ports, queries and
//! fragments are refused rather than normalised, so that two ids are equal exactly if their bytes are.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

const SCHEME: &str = "spiffe://";
/// Longest trust domain, bytes (SPIFFE-ID 2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest namespace, bytes: a DNS label.
const MAX_NAMESPACE: usize = 63;
/// Longest service account name, bytes: a DNS subdomain.
const MAX_SERVICE_ACCOUNT: usize = 253;

/// A SPIFFE id of a service account. Equal, ordered and hashed by its text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Offset of the first byte after the trust domain.
    td_end: u16,
    /// Offset of the first byte after the namespace.
    ns_end: u16,
}

/// Why a text is not the id of a service account.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpiffeIdError {
    /// The shape is wrong.
    #[error("`{0}` is not a SPIFFE id of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape(String),
    /// A part is empty or too long.
    #[error("the {part} has {len} bytes; it must have 1 to {max}")]
    Length {
        /// Which part.
        part: &'static str,
        /// Its length, bytes.
        len: usize,
        /// The longest that is allowed, bytes.
        max: usize,
    },
    /// A part has a character that it must not have.
    #[error("the {part} has the character {found:?}; allowed are {allowed}")]
    Character {
        /// Which part.
        part: &'static str,
        /// The character.
        found: char,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// A path segment is `.` or `..`.
    #[error("the {part} is a dot segment")]
    DotSegment {
        /// Which part.
        part: &'static str,
    },
}

impl SpiffeId {
    /// Joins the parts. Fails if one is empty, too long, or has a character that SPIFFE does not allow.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        self::trust_domain(trust_domain)?;
        check_segment("namespace", namespace, MAX_NAMESPACE)?;
        check_segment("service account", service_account, MAX_SERVICE_ACCOUNT)?;
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        // At most 9 + 255 + 4 + 63, so it fits; the lengths were checked above.
        let td_end = (SCHEME.len() + trust_domain.len()) as u16;
        let ns_end = td_end + ("/ns/".len() + namespace.len()) as u16;
        Ok(Self { uri: uri.into(), td_end, ns_end })
    }

    /// The whole id, `spiffe://…`.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The text, shared: what keeps many needs no copies.
    pub fn shared(&self) -> Arc<str> {
        self.uri.clone()
    }

    /// The id without `spiffe://`, as policies write principals.
    pub fn principal(&self) -> &str {
        self.part(SCHEME.len(), self.uri.len())
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        self.part(SCHEME.len(), self.td_end.into())
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.part(usize::from(self.td_end) + "/ns/".len(), self.ns_end.into())
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        self.part(usize::from(self.ns_end) + "/sa/".len(), self.uri.len())
    }

    fn part(&self, start: usize, end: usize) -> &str {
        // The offsets were made together with the ASCII text; the fallback only spares a panic path.
        self.uri.get(start..end).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || SpiffeIdError::Shape(shorten(text));
        let rest = text.strip_prefix(SCHEME).ok_or_else(shape)?;
        let mut parts = rest.split('/');
        let (Some(td), Some("ns"), Some(ns), Some("sa"), Some(sa), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(shape());
        };
        Self::new(td, ns, sa)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

/// Whether a text can be a trust domain.
///
/// # Errors
/// What is wrong with it.
pub fn trust_domain(text: &str) -> Result<(), SpiffeIdError> {
    let part = "trust domain";
    check_length(part, text, MAX_TRUST_DOMAIN)?;
    check_characters(part, text, "lower-case letters, digits, '.', '-' and '_'", |c| {
        c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_')
    })
}

fn check_segment(part: &'static str, text: &str, max: usize) -> Result<(), SpiffeIdError> {
    check_length(part, text, max)?;
    check_characters(part, text, "letters, digits, '.', '-' and '_'", |c| {
        c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
    })?;
    if text == "." || text == ".." {
        return Err(SpiffeIdError::DotSegment { part });
    }
    Ok(())
}

fn check_length(part: &'static str, text: &str, max: usize) -> Result<(), SpiffeIdError> {
    if text.is_empty() || text.len() > max {
        return Err(SpiffeIdError::Length { part, len: text.len(), max });
    }
    Ok(())
}

fn check_characters(
    part: &'static str,
    text: &str,
    allowed: &'static str,
    is_allowed: impl Fn(char) -> bool,
) -> Result<(), SpiffeIdError> {
    match text.chars().find(|c| !is_allowed(*c)) {
        None => Ok(()),
        Some(found) => Err(SpiffeIdError::Character { part, found, allowed }),
    }
}

/// Foreign text goes into error messages at most this long, so that a peer cannot fill a log.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 120;
    match text.char_indices().nth(LONGEST) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::SpiffeId;

    #[test]
    fn parts_come_back_as_they_were_given() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().expect("valid");
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "cart");
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id, SpiffeId::new("cluster.local", "shop", "cart").expect("valid"));
    }

    #[test]
    fn every_other_shape_is_refused() {
        let long_ns = format!("spiffe://td/ns/{}/sa/x", "n".repeat(64));
        let long_td = format!("spiffe://{}/ns/n/sa/x", "t".repeat(256));
        let long_sa = format!("spiffe://td/ns/n/sa/{}", "s".repeat(254));
        let cases = [
            "",
            "spiffe://",
            "SPIFFE://td/ns/n/sa/s",
            "http://td/ns/n/sa/s",
            "spiffe:/td/ns/n/sa/s",
            "spiffe://td",
            "spiffe://td/",
            "spiffe://td/ns/n",
            "spiffe://td/ns/n/sa",
            "spiffe://td/ns/n/sa/",
            "spiffe://td/ns//sa/s",
            "spiffe:///ns/n/sa/s",
            "spiffe://td/ns/n/sa/s/",
            "spiffe://td/ns/n/sa/s/x",
            "spiffe://td//ns/n/sa/s",
            "spiffe://td/sa/s/ns/n",
            "spiffe://td/NS/n/sa/s",
            "spiffe://td/ns/n/pod/s",
            "spiffe://Td/ns/n/sa/s",
            "spiffe://td:80/ns/n/sa/s",
            "spiffe://user@td/ns/n/sa/s",
            "spiffe://td/ns/n/sa/s?q=1",
            "spiffe://td/ns/n/sa/s#f",
            "spiffe://td/ns/n/sa/%73",
            "spiffe://td/ns/./sa/s",
            "spiffe://td/ns/../sa/s",
            "spiffe://td/ns/n/sa/..",
            "spiffe://td/ns/n/sa/s\0",
            "spiffe://td/ns/n/sa/s ",
            " spiffe://td/ns/n/sa/s",
            "spiffe://tdé/ns/n/sa/s",
            "spiffe://td/ns/n*/sa/s",
            &long_ns,
            &long_td,
            &long_sa,
        ];
        for text in cases {
            assert!(text.parse::<SpiffeId>().is_err(), "accepted {text:?}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(td in "[a-z0-9._-]{1,255}", ns in "[a-zA-Z0-9_-]{1,63}", sa in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,252}") {
            let id = SpiffeId::new(&td, &ns, &sa).expect("valid parts");
            prop_assert_eq!(&id.to_string().parse::<SpiffeId>().expect("valid text"), &id);
            prop_assert_eq!(id.trust_domain(), td);
            prop_assert_eq!(id.namespace(), ns);
            prop_assert_eq!(id.service_account(), sa);
        }

        #[test]
        fn any_text_is_accepted_as_it_is_or_refused(text in "(spiffe://)?[a-zA-Z0-9./_%-]{0,60}(/ns/\\PC{0,9}/sa/\\PC{0,9})?") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
