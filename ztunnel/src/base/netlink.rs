//! Messages to the kernel's tables over netlink: a header, a fixed part, and attributes that may hold attributes
//! (`man 7 netlink`). As much of it as connection tracking and policy routing need, whose messages have some hundred bytes:
//! starting a program for each of them costs a hundred times as much.
//!
//! Limits: one question, one answer; no dumps, no notifications.

use std::io;

/// A request, which every message of ours is.
pub(super) const REQUEST: u16 = 1;
/// The kernel says whether it did it.
pub(super) const ACK: u16 = 4;
/// Bytes of a message's header.
pub(super) const HEADER: usize = 16;

const NLMSG_ERROR: u16 = 2;
const TYPE_MASK: u16 = 0x3fff;

/// A whole message.
pub(super) fn message(kind: u16, flags: u16, fixed: &[u8], attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + fixed.len() + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port: there is one question at a time, and the kernel fills in who asks.
    message.extend([0; 8]);
    message.extend(fixed);
    message.extend(attributes);
    message
}

/// Length, type, value, padding to four bytes.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    bytes.extend(u16::try_from(4 + value.len()).unwrap_or_default().to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// What the kernel says of a request, if the answer is a verdict and no data. `None` also for what is no message.
pub(super) fn verdict(answer: &[u8]) -> Option<io::Result<()>> {
    if number(answer.get(4..6)?) != NLMSG_ERROR {
        return None;
    }
    let code = answer.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    Some(match code {
        Some(0) => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.unwrap_or(-libc::EIO).saturating_neg())),
    })
}

/// The attributes of a level, without the flags in their types. Ends at the first one that does not fit.
pub(super) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(number(rest.get(..2)?));
        let kind = number(rest.get(2..4)?) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn number(bytes: &[u8]) -> u16 {
    bytes.try_into().map(u16::from_ne_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{attribute, attributes, message, verdict};

    #[test]
    fn a_verdict_is_the_kernels_and_nothing_else_is_one() {
        let said = |code: i32| message(2, 0, &code.to_ne_bytes(), &[0; 16]);
        assert!(verdict(&said(0)).unwrap().is_ok());
        assert_eq!(verdict(&said(-libc::EEXIST)).unwrap().unwrap_err().raw_os_error(), Some(libc::EEXIST));
        assert!(verdict(&said(i32::MIN)).unwrap().is_err());
        assert!(verdict(&said(0)[..18]).unwrap().is_err(), "cut off");
        assert!(verdict(&message(24, 0, &[], &[])).is_none());
        for cut in 0..6 {
            assert!(verdict(&said(0)[..cut]).is_none());
        }
    }

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let both = [attribute(3, &[1, 2, 3]), attribute(4 | 0x8000, &[4])].concat();
        assert_eq!(attributes(&both).collect::<Vec<_>>(), [(3, &[1, 2, 3][..]), (4, &[4][..])]);
        for cut in 0..both.len() {
            assert!(attributes(&both[..cut]).count() < 2 || cut > 12, "{cut}");
        }
    }
}
