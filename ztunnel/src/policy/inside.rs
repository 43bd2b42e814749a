//! Addresses that a name outside the cluster must not lead to. Pure.
//!
//! A name that may be reached is somebody else's to point anywhere: at a pod, at the node, at the cloud's metadata (DNS
//! rebinding). So what the proxy resolves itself is dialled only if it is an address of the Internet, whatever the name;
//! a rule that names the addresses themselves (`cidrs`) is the one thing that lifts this. Addresses that carry others in
//! themselves (mapped, NAT64, 6to4) are judged by those. Limits: a public address of the own network that the mesh does not
//! know (an office, a NAT gateway's own) is not told from the Internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::state::Snapshot;

/// Why `ip` is not of the Internet; `None`: it is.
pub fn inside(snapshot: &Snapshot, network: &str, ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let special = match ip {
        IpAddr::V4(ip) => special_v4(ip),
        IpAddr::V6(ip) => special_v6(ip),
    };
    special.or_else(|| {
        if snapshot.is_own_node(ip) {
            return Some("an address of the node");
        }
        if snapshot.workload_by_ip(network, ip).is_some_and(|workload| workload.is_pod()) {
            return Some("a pod's address");
        }
        snapshot.is_cluster_address(network, ip).then_some("a Service's address")
    })
}

fn special_v4(ip: Ipv4Addr) -> Option<&'static str> {
    match ip.octets() {
        [169, 254, ..] => Some("a link-local address, as of cloud metadata"),
        [127, ..] => Some("a loopback address"),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Some("a private address"),
        [100, 64..=127, ..] => Some("a carrier's private address"),
        [0, ..] => Some("an address of no host"),
        // Among them metadata of some clouds (192.0.0.192).
        [192, 0, 0, _] => Some("a protocol's address"),
        [198, 18..=19, ..] => Some("a benchmark's address"),
        [224..=239, ..] => Some("a multicast address"),
        [240..=255, ..] => Some("a reserved address"),
        _ => None,
    }
}

fn special_v6(ip: Ipv6Addr) -> Option<&'static str> {
    let embedded = |high: u16, low: u16| special_v4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("a loopback address"),
        // Unspecified, and addresses of IPv4 in a form that nobody routes.
        [0, 0, 0, 0, 0, 0, _, _] => Some("an address of no host"),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => Some("a private translation's address"),
        [0x2002, high, low, ..] => embedded(high, low).or(Some("an address of a transition that has ended")),
        [0x2001, 0, ..] => Some("an address of a transition that has ended"),
        [0x2001, 2, 0, ..] => Some("a virtual address"),
        [0xfc00..=0xfdff, ..] => Some("a private address"),
        [0xfe80..=0xfebf, ..] => Some("a link-local address"),
        [0xfec0..=0xfeff, ..] => Some("a private address"),
        [0xff00..=0xffff, ..] => Some("a multicast address"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::inside;
    use crate::state::Change;
    use crate::state::fixtures::{service, snapshot_of_node, workload};

    #[test]
    fn only_the_internet_is_reached_by_a_name() {
        let changes = [
            Change::Workload(Arc::new(workload("shop", "cart", "198.51.100.1"))),
            Change::Service(service("shop", "cart", "198.51.100.2").into()),
        ];
        let snapshot = snapshot_of_node(changes, &["198.51.100.3".parse().unwrap()]);
        for (ip, open) in [
            ("203.0.113.10", true),
            ("8.8.8.8", true),
            ("2001:db8:203::a", true),
            ("2606:4700::1", true),
            ("64:ff9b::808:808", true),
            ("198.51.100.1", false),
            ("198.51.100.2", false),
            ("198.51.100.3", false),
            ("::ffff:198.51.100.1", false),
            ("169.254.169.254", false),
            ("::ffff:169.254.169.254", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("2002:a9fe:a9fe::1", false),
            ("2002:808:808::1", false),
            ("fd00:ec2::254", false),
            ("10.0.0.1", false),
            ("172.31.0.1", false),
            ("172.32.0.1", true),
            ("192.168.1.1", false),
            ("192.0.0.192", false),
            ("100.100.100.200", false),
            ("127.0.0.1", false),
            ("0.0.0.0", false),
            ("240.240.0.1", false),
            ("255.255.255.255", false),
            ("::1", false),
            ("::", false),
            ("::7f00:1", false),
            ("fe80::1", false),
            ("ff02::1", false),
            ("2001:2::1", false),
            ("2001::1", false),
        ] {
            let found = inside(&snapshot, "", ip.parse().unwrap());
            assert_eq!(found.is_none(), open, "{ip}: {found:?}");
        }
    }
}
