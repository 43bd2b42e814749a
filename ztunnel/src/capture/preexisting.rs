//! Connections that began before capture: they live on outside the mesh, and are counted.
//!
//! The kernel's socket table of the pod is the truth. A socket counts when it is established, not ours, not loopback,
//! and has no twin in the same table: after capture both ends of a redirected connection are in the pod.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tulle_proto::names::{PORT_DNS, PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::base::canonical;
use crate::base::netns::{Netns, run_blocking};

/// Local and remote address of a connection, from the pod's view.
pub type Pair = (SocketAddr, SocketAddr);

/// Connections that are remembered for a pod. More than a pod's connection budget is not told apart from "many".
const MOST: usize = 65_536;

/// How often the number of sockets is looked at, a millisecond apart: those of the last probe may be closing.
const LOOKS: usize = 5;

/// Established connections of the namespace that the proxy has no part in. `listening`: how many TCP sockets of ours wait
/// there for connections, where nothing of ours is established yet.
///
/// # Errors
/// If the kernel's table cannot be read.
pub async fn list(netns: &Netns, listening: Option<usize>) -> io::Result<BTreeSet<Pair>> {
    let table = run_blocking(netns, move || {
        for _ in 0..listening.map_or(0, |_| LOOKS) {
            if sockets() == listening {
                return Ok(String::new());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut text = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
        // Absent without IPv6.
        text.push_str(&std::fs::read_to_string("/proc/thread-self/net/tcp6").unwrap_or_default());
        Ok(text)
    })
    .await?;
    Ok(foreign(&parse(&table)))
}

/// TCP sockets of the current namespace that listen or are connected. `None`: the kernel does not say.
fn sockets() -> Option<usize> {
    let v4 = in_use(&std::fs::read_to_string("/proc/thread-self/net/sockstat").ok()?, "TCP:")?;
    // Absent without IPv6.
    let v6 = std::fs::read_to_string("/proc/thread-self/net/sockstat6").unwrap_or_default();
    Some(v4 + in_use(&v6, "TCP6:").unwrap_or(0))
}

/// The number behind `inuse` in the line that begins with `protocol`.
fn in_use(text: &str, protocol: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(protocol))?;
    let mut words = line.split_ascii_whitespace().skip_while(|word| *word != "inuse");
    words.nth(1)?.parse().ok()
}

/// Established connections of a `/proc/net/tcp` table.
fn parse(table: &str) -> BTreeSet<Pair> {
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
            // ESTABLISHED, SYN_SENT, SYN_RECV, CLOSE_WAIT: whatever may still carry bytes.
            matches!(state, "01" | "02" | "03" | "08").then_some(())?;
            Some((address(local)?, address(remote)?))
        })
        .take(MOST)
        .collect()
}

fn foreign(all: &BTreeSet<Pair>) -> BTreeSet<Pair> {
    let ours = |port: u16| matches!(port, PORT_OUTBOUND | PORT_INBOUND_PLAINTEXT | PORT_HBONE | PORT_DNS);
    let own: BTreeSet<IpAddr> = all.iter().map(|(local, _)| local.ip()).collect();
    let captured: BTreeSet<SocketAddr> =
        all.iter().filter(|(local, _)| ours(local.port())).map(|(_, remote)| *remote).collect();
    all.iter()
        .filter(|(local, remote)| {
            let of_proxy = ours(local.port()) || (ours(remote.port()) && own.contains(&remote.ip()));
            let within_pod = local.ip().is_loopback() || all.contains(&(*remote, *local));
            !(of_proxy || within_pod || captured.contains(local))
        })
        .copied()
        .collect()
}

/// `0100007F:1F90`, each 32-bit word in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |index: usize| -> Option<[u8; 4]> {
        Some(u32::from_str_radix(ip.get(index * 8..index * 8 + 8)?, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use super::{foreign, in_use, parse};

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100000A:1F90 0200000A:C001 01 00000000:00000000 00:00000000 00000000     0        0 1
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100000A:C002 0300000A:0050 01 00000000:00000000 00:00000000 00000000     0        0 3
   3: 0100000A:3A99 0100000A:C002 01 00000000:00000000 00:00000000 00000000     0        0 4
   4: 0100000A:C003 0300000A:3AA0 01 00000000:00000000 00:00000000 00000000     0        0 5
   5: 0100007F:C004 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 6
   6: garbage
";

    #[test]
    fn only_connections_without_the_proxy_count() {
        let all = parse(TABLE);
        assert_eq!(all.len(), 5);
        let found = foreign(&all);
        let expected = [("10.0.0.1:8080", "10.0.0.2:49153"), ("10.0.0.1:49155", "10.0.0.3:15008")]
            .map(|(local, remote)| (local.parse().unwrap(), remote.parse().unwrap()));
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            expected,
            "a port of ours at another host is nothing of ours"
        );
    }

    #[test]
    fn the_kernel_tells_how_many_sockets_there_are() {
        let text = "sockets: used 9\nTCP: inuse 3 orphan 16 tw 0 alloc 381 mem 174\nUDP: inuse 1 mem 234\n";
        assert_eq!(in_use(text, "TCP:"), Some(3));
        assert_eq!(in_use(text, "TCP6:"), None);
        assert_eq!(in_use("TCP: orphan 3\n", "TCP:"), None);
    }
}
