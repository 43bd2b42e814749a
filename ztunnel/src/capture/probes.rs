//! The kubelet's probes, made recognisable: what a process of the node itself sends to a declared probe port of a pod in the
//! mesh leaves with the probe address, which the pod's own rules let in without mutual TLS ([`crate::capture::rules`]).
//!
//! The node's network has one table for it. Nobody else may use that address: a packet that arrives at the node with it,
//! from a pod or from another node, is dropped, as is one that says it is the node's own and would be passed on (IPv6 forwards such).
//! What one pod sends another over a bridge the node does not route, so bridges have a table of their own. A connection by way of a Service is no probe and keeps its address. Limits:
//! any process on the host network that connects to a pod's probe port directly counts as the kubelet, as nothing in a
//! packet tells the two apart; a kernel without tables for bridges is told of in the log. The tables stay when the proxy stops; `ztunnel cni uninstall` removes them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Once;

use tulle_proto::names::{PROBE_V4, PROBE_V6};

use crate::base::netns::{Netns, run_blocking};
use crate::capture::nft;

/// Name of the table.
pub const TABLE: &str = "tulle_probes";

/// Removes the table, whether it is there or not.
pub const REMOVE: &str = "table inet tulle_probes\ndelete table inet tulle_probes\n";

/// The transaction that replaces whatever is installed. `ports`: addresses of pods with their probe ports.
pub fn render(ports: &BTreeSet<SocketAddr>) -> String {
    let mut text = String::from(REMOVE);
    let _ = writeln!(text, "table inet {TABLE} {{");
    for (number, kind, v6) in [(4, "ipv4_addr", false), (6, "ipv6_addr", true)] {
        let of_family = ports.iter().filter(|at| at.is_ipv6() == v6);
        let elements: Vec<String> = of_family.map(|at| format!("{} . {}", at.ip(), at.port())).collect();
        let _ = writeln!(text, "  set ports{number} {{\n    type {kind} . inet_service");
        if !elements.is_empty() {
            let _ = writeln!(text, "    elements = {{ {} }}", elements.join(", "));
        }
        text.push_str("  }\n");
    }
    // Before what other programs translate: the first translation of a connection is the one that holds.
    text.push_str("  chain probes {\n    type nat hook postrouting priority srcnat - 10; policy accept;\n");
    for (family, number, address) in [("ip", 4, PROBE_V4.to_string()), ("ip6", 6, PROBE_V6.to_string())] {
        let _ = writeln!(
            text,
            "    {family} daddr . tcp dport @ports{number} fib saddr type local ct status & dnat == 0 counter snat {family} to {address}"
        );
    }
    text.push_str("  }\n  chain guard {\n    type filter hook prerouting priority raw; policy accept;\n");
    let _ = writeln!(text, "    iifname != \"lo\" ip saddr {PROBE_V4} counter drop");
    let _ = writeln!(text, "    iifname != \"lo\" ip6 saddr {PROBE_V6} counter drop");
    for (family, number) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(
            text,
            "    iifname != \"lo\" {family} daddr . tcp dport @ports{number} fib saddr type local counter drop"
        );
    }
    // Also for UDP: NetworkPolicies let in what the node itself sends. Of IPv4 Linux passes on no such packet.
    text.push_str("  }\n  chain forward {\n    type filter hook forward priority filter; policy accept;\n");
    text.push_str("    iifname != \"lo\" meta nfproto ipv6 fib saddr type local counter drop\n  }\n}\n");
    text
}

/// The transaction for what bridges pass on from port to port. Receivers take empty VLAN tags off, as many as there are, and
/// nft one: so what has two is dropped, which nobody needs.
pub fn render_bridges() -> String {
    let mut text = format!(
        "table bridge {TABLE}\ndelete table bridge {TABLE}\ntable bridge {TABLE} {{\n  chain guard {{\n    \
         type filter hook forward priority filter; policy accept;\n"
    );
    for outer in ["", "ether type 8021ad "] {
        let _ = writeln!(text, "    {outer}vlan id 0 vlan type {{ 8021q, 8021ad }} counter drop");
    }
    let _ = writeln!(text, "    ip saddr {PROBE_V4} counter drop\n    ip6 saddr {PROBE_V6} counter drop\n  }}\n}}");
    text
}

/// Replaces the node's tables.
///
/// # Errors
/// What `nft` said; nothing was changed then.
pub async fn apply(node: &Netns, text: String) -> io::Result<()> {
    static TOLD: Once = Once::new();
    run_blocking(node, move || {
        nft(&text)?;
        if let Err(error) = nft(&render_bridges()) {
            TOLD.call_once(|| {
                tracing::warn!(%error, "pods on one bridge can pose as the kubelet to each other's probe ports; does the kernel lack nf_tables_bridge?");
            });
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{render, render_bridges};

    #[test]
    fn the_table_matches_its_golden_file() {
        let ports = ["10.0.0.2:8080", "10.0.0.2:9000", "[fd00::2]:8080"].map(|at| at.parse().unwrap()).into();
        let rendered = render(&ports);
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata/node-probes.nft");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &rendered).unwrap();
        }
        assert_eq!(rendered, std::fs::read_to_string(&path).unwrap_or_default());
        let bridges = path.with_file_name("node-probes-bridge.nft");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&bridges, render_bridges()).unwrap();
        }
        assert_eq!(render_bridges(), std::fs::read_to_string(&bridges).unwrap_or_default());
        let empty = render(&[].into());
        assert!(empty.contains("drop") && !empty.contains("elements"), "the guard stands without pods too");
    }
}
