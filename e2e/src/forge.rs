//! Frames as a container with raw sockets may write them: any source, any destination, and VLAN tags before them. What must
//! hold against a pod itself is tried with it.
//!
//! One TCP segment that opens a connection, of IPv4. Limits: nothing is read; for tests only.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Context;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};

/// Arguments of `lab forge`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Interface.
    #[arg(long, default_value = "eth0")]
    interface: String,
    /// Hardware address that it is sent to.
    #[arg(long)]
    mac: String,
    /// Whom it says that it comes from.
    #[arg(long)]
    from: SocketAddrV4,
    /// Where it goes.
    #[arg(long)]
    to: SocketAddrV4,
    /// Empty VLAN tags before it.
    #[arg(long, default_value_t = 0)]
    tags: u8,
}

/// Sends the frame.
pub fn main(options: &Options) -> anyhow::Result<()> {
    let link = nix::ifaddrs::getifaddrs()?
        .filter(|one| one.interface_name == options.interface)
        .find_map(|one| Some(*one.address?.as_link_addr()?))
        .with_context(|| format!("there is no interface {}", options.interface))?;
    let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("no packet socket; it takes CAP_NET_RAW in the namespace")?;
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &link)?;
    let mut bytes = mac(&options.mac)?.to_vec();
    bytes.extend(link.addr().context("the interface has no hardware address")?);
    for _ in 0..options.tags {
        bytes.extend([0x81, 0x00, 0, 0]);
    }
    bytes.extend([0x08, 0x00]);
    bytes.extend(segment(options.from, options.to));
    let sent = nix::unistd::write(&socket, &bytes)?;
    anyhow::ensure!(sent == bytes.len(), "{sent} of {} bytes were sent", bytes.len());
    Ok(())
}

fn mac(text: &str) -> anyhow::Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let wrong = || format!("`{text}` is no hardware address");
    bytes.with_context(wrong)?.try_into().ok().with_context(wrong)
}

/// An IPv4 packet with a TCP segment that has SYN alone (RFC 791, RFC 9293), with valid checksums: connection tracking looks.
fn segment(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let ends = [from.ip(), to.ip()].map(Ipv4Addr::octets).concat();
    let mut tcp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    tcp.extend([0, 0, 3, 232, 0, 0, 0, 0, 5 << 4, 2, 16, 0, 0, 0, 0, 0]);
    let sum = checksum(&[&ends, &[0, 6, 0, 20][..], &tcp].concat());
    tcp[16..18].copy_from_slice(&sum);
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(&ends);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(tcp);
    packet
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::{checksum, mac, segment};

    #[test]
    fn a_segment_has_the_checksums_that_its_receiver_computes() {
        let packet = segment("10.0.0.1:443".parse().unwrap(), "192.0.2.7:15008".parse().unwrap());
        assert_eq!(packet.len(), 40);
        assert_eq!(checksum(&packet[..20]), [0, 0]);
        assert_eq!(checksum(&[&packet[12..20], &[0, 6, 0, 20][..], &packet[20..]].concat()), [0, 0]);
        assert_eq!(mac("02:00:00:00:00:fe").unwrap()[5], 0xfe);
        assert!(mac("02:00").is_err() && mac("x").is_err());
    }
}
