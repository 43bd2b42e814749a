//! Where a redirected datagram was going, asked of the kernel's connection tracking.
//!
//! REDIRECT rewrites the destination before a datagram reaches its socket, so what IP_RECVORIGDSTADDR tells is the
//! proxy's own address, and SO_ORIGINAL_DST exists for streams only. The tracking table has the truth: the entry whose
//! reply goes from our socket to the client began with a packet to the name server. Asking for that entry is one netlink
//! round trip, answered within `send`, and works with whoever's redirect rules. (TPROXY keeps the destination, but needs
//! routes of its own and sockets bound to foreign addresses and port 53, and is not what Istio's agent installs.)
//!
//! Limits: the socket belongs to the namespace it was made in. Needs CAP_NET_ADMIN there, as the rules did.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use socket2::{Domain, Protocol, Socket, Type};

use crate::base::canonical;
use crate::base::netlink::{HEADER, REQUEST, attribute, attributes, message, verdict};

// linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
const NETLINK_NETFILTER: i32 = 12;
const CT_GET: u16 = 0x0101;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4: (u16, u16) = (1, 2);
const IP_V6: (u16, u16) = (3, 4);
const PROTO_NUM: u16 = 1;
const PROTO_PORTS: (u16, u16) = (2, 3);
const NESTED: u16 = 0x8000;
const UDP: u8 = 17;
/// An entry takes some 300 bytes.
const ANSWER: usize = 2048;
/// A netlink header and the netfilter header behind it.
const HEADERS: usize = HEADER + 4;

/// A channel to one namespace's table.
#[derive(Debug)]
pub struct Conntrack {
    /// One question at a time; an answer takes some microseconds.
    socket: Mutex<Socket>,
}

impl Conntrack {
    /// Opens it in the current namespace.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW.nonblocking(),
            Some(Protocol::from(NETLINK_NETFILTER)),
        )?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// The first destination of the datagrams that `client` sends and that arrive at `local`.
    ///
    /// # Errors
    /// `NotFound` if they were not redirected or are forgotten by now; else what the kernel says.
    pub fn original_udp_destination(&self, client: SocketAddr, local: SocketAddr) -> io::Result<SocketAddr> {
        let (client, local) = (canonical(client), canonical(local));
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; ANSWER];
        // What an interrupted question left behind must not answer this one.
        while socket.read(&mut buffer).is_ok() {}
        socket.send(&question(local, client)?)?;
        let length = socket.read(&mut buffer)?;
        destination(&buffer[..length.min(ANSWER)])
    }
}

/// Asks for the entry whose reply goes from `from` to `to`.
fn question(from: SocketAddr, to: SocketAddr) -> io::Result<Vec<u8>> {
    let (addresses, family) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            ([attribute(IP_V4.0, &from.octets()), attribute(IP_V4.1, &to.octets())].concat(), libc::AF_INET)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            ([attribute(IP_V6.0, &from.octets()), attribute(IP_V6.1, &to.octets())].concat(), libc::AF_INET6)
        }
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "the two addresses are of different families")),
    };
    let ports = [
        attribute(PROTO_NUM, &[UDP]),
        attribute(PROTO_PORTS.0, &from.port().to_be_bytes()),
        attribute(PROTO_PORTS.1, &to.port().to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(TUPLE_IP | NESTED, &addresses), attribute(TUPLE_PROTO | NESTED, &ports)].concat();
    let body = attribute(TUPLE_REPLY | NESTED, &tuple);
    // Family, version 0, resource 0.
    let fixed = [u8::try_from(family).unwrap_or_default(), 0, 0, 0];
    Ok(message(CT_GET, REQUEST, &fixed, &body))
}

/// The destination of the original direction.
fn destination(answer: &[u8]) -> io::Result<SocketAddr> {
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "connection tracking gave an answer without addresses");
    if let Some(verdict) = verdict(answer) {
        verdict?;
        return Err(broken());
    }
    let find = |within, kind| attributes(within).find(|(found, _)| *found == kind).map(|(_, value)| value);
    let tuple = find(answer.get(HEADERS..).unwrap_or_default(), TUPLE_ORIG).ok_or_else(broken)?;
    let (addresses, ports) = (find(tuple, TUPLE_IP).ok_or_else(broken)?, find(tuple, TUPLE_PROTO).ok_or_else(broken)?);
    let v4 = find(addresses, IP_V4.1).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(Ipv4Addr::from);
    let v6 = find(addresses, IP_V6.1).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(Ipv6Addr::from);
    let ip = v4.map(IpAddr::V4).or_else(|| v6.map(IpAddr::V6)).ok_or_else(broken)?;
    let port = find(ports, PROTO_PORTS.1).and_then(|bytes| <[u8; 2]>::try_from(bytes).ok()).ok_or_else(broken)?;
    Ok(canonical(SocketAddr::new(ip, u16::from_be_bytes(port))))
}

#[cfg(test)]
mod tests {
    use super::{TUPLE_ORIG, TUPLE_REPLY, destination, question};

    #[test]
    fn an_answer_is_read_as_a_question_is_written() {
        for (from, to) in [("10.0.0.10:53", "10.1.0.2:4000"), ("[fd00::a]:53", "[fd00::2]:4000")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let mut message = question(to, from).unwrap();
            assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize, message.len());
            let kind = u16::from_ne_bytes(message[22..24].try_into().unwrap());
            assert_eq!(kind & 0x3fff, TUPLE_REPLY);
            message[22..24].copy_from_slice(&(TUPLE_ORIG | 0x8000).to_ne_bytes());
            assert_eq!(destination(&message).unwrap(), from);
            for cut in 0..message.len() {
                let _ = destination(&message[..cut]);
            }
        }
    }

    #[test]
    fn an_error_is_the_kernels() {
        let mut message = vec![0; 36];
        message[4] = 2;
        message[16..20].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert_eq!(destination(&message).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
}
