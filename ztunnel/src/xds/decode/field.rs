//! The small values that resources are made of: addresses, prefixes, ports, shared strings.
//!
//! Each function names the field in its error, because "invalid length" helps nobody who looks at a thousand resources.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use tulle_certs::SpiffeId;

/// Strings that repeat from resource to resource, kept once. What nothing else uses is dropped when the set has doubled.
#[derive(Debug, Default)]
pub struct Strings {
    kept: HashSet<Arc<str>>,
    after_sweep: usize,
    identities: HashSet<SpiffeId>,
}

impl Strings {
    /// Below this, a sweep is not worth its walk.
    const SMALL: usize = 1024;
    /// Accounts of a very large cluster.
    const MAX_IDENTITIES: usize = 65_536;

    /// `text`, shared with everybody who has the same.
    pub fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(kept) = self.kept.get(text) {
            return kept.clone();
        }
        if self.kept.len() > 2 * self.after_sweep.max(Self::SMALL) {
            self.kept.retain(|kept| Arc::strong_count(kept) > 1);
            self.after_sweep = self.kept.len();
        }
        let new: Arc<str> = text.into();
        self.kept.insert(new.clone());
        new
    }

    /// `identity`, shared with everybody who has the same: the pods of a Deployment have one.
    pub(super) fn share_identity(&mut self, identity: SpiffeId) -> SpiffeId {
        if let Some(kept) = self.identities.get(&identity) {
            return kept.clone();
        }
        // Whether somebody else uses one cannot be seen from outside; starting again costs only sharing.
        if self.identities.len() >= Self::MAX_IDENTITIES {
            self.identities.clear();
        }
        self.identities.insert(identity.clone());
        identity
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

/// 4 or 16 bytes. A v4-mapped address is its IPv4 address.
pub(super) fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| format!("{field} has {} bytes; an address has 4 or 16", bytes.len()))?;
    Ok(IpAddr::from(Ipv6Addr::from(v6)).to_canonical())
}

/// An address with the length of its prefix; `None`: all of it. Host bits are cleared.
pub(super) fn net(field: &str, bytes: &[u8], length: Option<u32>) -> Result<IpNet, String> {
    let address = ip(field, bytes)?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    // A prefix of the mapped range is a prefix of IPv4 once its first 96 bits are taken off.
    let mapped = address.is_ipv4() && bytes.len() == 16;
    let length = match length {
        None => full,
        Some(length) if mapped && (96..=128).contains(&length) => length - 96,
        Some(length) if !mapped && length <= full => length,
        Some(length) => return Err(format!("{field} has a prefix of {length} bits, which its address does not have")),
    };
    let length = u8::try_from(length).map_err(|_| format!("{field} has a prefix of {length} bits"))?;
    IpNet::new(address, length).map(|net| net.trunc()).map_err(|error| format!("{field}: {error}"))
}

/// 1 to 65535.
pub(super) fn port(field: &str, value: u32) -> Result<u16, String> {
    u16::try_from(value)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{field} is {value}; a port is 1 to 65535"))
}

/// 0 to 65535, where 0 has a meaning of its own.
pub(super) fn port_or_zero(field: &str, value: u32) -> Result<u16, String> {
    u16::try_from(value).map_err(|_| format!("{field} is {value}; a port is at most 65535"))
}

/// An enum value that this program knows.
pub(super) fn known<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{field} has the value {value}, which this proxy does not know"))
}
