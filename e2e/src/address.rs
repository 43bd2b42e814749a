//! The lab's address plan, as pure arithmetic: which node, pod, Service and outside host has which addresses.
//!
//! Everything is private or for documentation, and nothing is discovered at run time, so that neighbour discovery,
//! DHCP and duplicate address detection never cost time. Limits: 50 nodes, 252 pods a node, 65,000 Services, 180
//! outside hosts; asking for more is an error of the caller's making, said when it happens.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

/// Most nodes of one lab: their outside addresses end at 203.0.113.250.
pub const NODES_MAX: u16 = 50;
/// Largest index of a pod on its node.
pub const POD_MAX: u16 = 254;
/// Largest index of an outside host.
pub const OUTSIDE_MAX: u16 = 190;

/// One address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Pair {
    /// Both, IPv4 first, as Kubernetes lists them.
    pub fn both(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.v4), IpAddr::V6(self.v6)]
    }

    /// Both as text.
    pub fn texts(self) -> [String; 2] {
        [self.v4.to_string(), self.v6.to_string()]
    }
}

/// Address of control on the fabric.
pub const CONTROL: Pair =
    Pair { v4: Ipv4Addr::new(10, 10, 0, 2), v6: Ipv6Addr::new(0xfd00, 0x10, 0x10, 0, 0, 0, 0, 2) };
/// All pods of all nodes.
pub const PODS: (&str, &str) = ("10.20.0.0/16", "fd00:10:20::/48");
/// All Service addresses.
pub const SERVICES: (&str, &str) = ("10.96.0.0/16", "fd00:10:96::/112");

/// Node `node` (from 1) on the fabric.
pub fn node(node: u16) -> Pair {
    let low = 10 + node;
    Pair { v4: Ipv4Addr::new(10, 10, 0, low as u8), v6: Ipv6Addr::new(0xfd00, 0x10, 0x10, 0, 0, 0, 0, low) }
}

/// Node `node` on the outside link.
pub fn node_outside(node: u16) -> Pair {
    let low = 200 + node;
    Pair { v4: Ipv4Addr::new(203, 0, 113, low as u8), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x203, 0, 0, 0, 0, low) }
}

/// Outside host `index` (from 0).
pub fn outside(index: u16) -> Pair {
    let low = 10 + index;
    Pair { v4: Ipv4Addr::new(203, 0, 113, low as u8), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x203, 0, 0, 0, 0, low) }
}

/// Pod `index` (2 to 254) of node `node`; index 1 is the node's own end, its pods' gateway and DNS server.
pub fn pod(node: u16, index: u16) -> Pair {
    Pair {
        v4: Ipv4Addr::new(10, 20, node as u8, index as u8),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x20, node, 0, 0, 0, index),
    }
}

/// The node's end of its pods' links.
pub fn gateway(node: u16) -> Pair {
    pod(node, 1)
}

/// All pods of a node.
pub fn pod_ranges(node: u16) -> (String, String) {
    (format!("10.20.{node}.0/24"), format!("fd00:10:20:{node:x}::/64"))
}

/// Service `index` (from 1).
pub fn service(index: u16) -> Pair {
    let [high, low] = index.to_be_bytes();
    Pair { v4: Ipv4Addr::new(10, 96, high, low), v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, index) }
}

/// Hardware address of one end of a pod's link: `host` is the node's end.
pub fn mac(node: u16, index: u16, host: bool) -> String {
    format!("02:{:02x}:00:{node:02x}:{:02x}:{:02x}", u8::from(host), index >> 8, index & 0xff)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::address;

    #[test]
    fn no_address_is_given_twice() {
        let mut seen = BTreeSet::new();
        for node in 1..=address::NODES_MAX {
            for pair in [address::node(node), address::node_outside(node)] {
                assert!(seen.insert(pair), "{pair:?}");
            }
            for index in 1..=address::POD_MAX {
                assert!(seen.insert(address::pod(node, index)));
            }
        }
        for index in 0..address::OUTSIDE_MAX {
            assert!(seen.insert(address::outside(index)));
        }
        for index in 1..1000 {
            assert!(seen.insert(address::service(index)));
        }
        assert!(seen.insert(address::CONTROL));
    }
}
