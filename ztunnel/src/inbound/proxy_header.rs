//! The PROXY header, version 2, which tells an application behind a tunnel who is at its other end (the PROXY protocol's
//! specification, §2.2). Written only, never read.
//!
//! Addresses of two families are written as IPv6, the IPv4 one mapped. One TLV, of a type that the specification leaves to
//! users (§2.2.7) and Istio's waypoints read: the client's SPIFFE id.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use tulle_certs::SpiffeId;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, on behalf of somebody.
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Type of the TLV that holds the client's identity.
const IDENTITY: u8 = 0xd0;
/// Longest SPIFFE id (the SPIFFE-ID specification, §2.3); it keeps all lengths within their two bytes.
const LONGEST: usize = 2048;

/// The header for a connection from `client`, who proved `identity`, to `destination`.
pub(super) fn of(client: SocketAddr, destination: SocketAddr, identity: &SpiffeId) -> Vec<u8> {
    let v6 = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let (family, addresses) = match (client.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (TCP4, [from.octets(), to.octets()].concat()),
        (from, to) => (TCP6, [v6(from), v6(to)].map(|ip: Ipv6Addr| ip.octets()).concat()),
    };
    let identity = identity.to_string();
    let identity = identity.as_bytes().get(..identity.len().min(LONGEST)).unwrap_or_default();
    let rest = addresses.len() + 4 + 3 + identity.len();
    let mut header = Vec::with_capacity(SIGNATURE.len() + 4 + rest);
    header.extend(SIGNATURE);
    header.extend([PROXY, family]);
    header.extend(length(rest));
    header.extend(addresses);
    header.extend(client.port().to_be_bytes());
    header.extend(destination.port().to_be_bytes());
    header.push(IDENTITY);
    header.extend(length(identity.len()));
    header.extend(identity);
    header
}

fn length(of: usize) -> [u8; 2] {
    u16::try_from(of).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::of;

    #[test]
    fn the_header_is_what_the_specification_says_byte_by_byte() {
        let id = "spiffe://c/ns/a/sa/b".parse().unwrap();
        let signature: &[u8] = &[0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
        let tlv: &[u8] = b"\xd0\x00\x14spiffe://c/ns/a/sa/b";
        let mapped: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
        let six: &[u8] = &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        for (client, destination, expected) in [
            (
                "10.0.0.1:4660",
                "10.96.0.1:80",
                [signature, &[0x21, 0x11, 0, 35], &[10, 0, 0, 1, 10, 96, 0, 1, 0x12, 0x34, 0, 80], tlv].concat(),
            ),
            (
                "10.0.0.1:4660",
                "[fd00::2]:80",
                [signature, &[0x21, 0x21, 0, 59], mapped, six, &[0x12, 0x34, 0, 80], tlv].concat(),
            ),
        ] {
            assert_eq!(of(client.parse().unwrap(), destination.parse().unwrap(), &id), expected, "{destination}");
        }
    }
}
