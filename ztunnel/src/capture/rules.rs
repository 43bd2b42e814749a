//! The redirect rules as data, and their text for `nft`.
//!
//! One table, `inet tulle`, for both families. Its rules are those that Istio's agent installs, in nftables' words, with
//! these differences: only connections that begin with SYN are redirected, so that those from before capture live on;
//! probe traffic is let in on the declared probe ports only; old connections can be reset, one by one; and a SYN that was
//! not redirected although it should have been is refused.
//!
//! The last is there because the kernel translates a connection when it first sees it, and takes any packet for a part of
//! one. A lone ACK that nobody answers, late or made up, leaves an entry behind, and a SYN of the same addresses and ports
//! would then pass by the proxy, in or out. Where the kernel can do that ([`Kernel`]), such entries are kept for [`STRAY`]
//! seconds only, so that an honest client that comes to the same port again is redirected and not refused; and a packet in
//! the middle of nothing never reaches a socket that listens. That would leave entries behind in any number, and with SYN
//! cookies (RFC 4987), whose secret is one for all namespaces of a kernel, a lone ACK even opens a connection.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;

use tulle_proto::names::{
    CONNMARK_PROXY, MARK_MASK, MARK_PROXY, PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, PROBE_V4, PROBE_V6,
};

use crate::base::routes::Marked;
use crate::capture::run;

/// Name of the table.
pub const TABLE: &str = "tulle";

/// Removes the table, whether it is there or not.
pub const REMOVE: &str = "table inet tulle\ndelete table inet tulle\n";

/// Routing of the replies to spoofed clients, which brings them to the proxy.
pub const ROUTING: Marked = Marked { mark: CONNMARK_PROXY, mask: MARK_MASK, priority: 32_764, table: 100 };

/// What is installed in a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The pod has IPv6.
    pub v6: bool,
    /// Declared ports of the kubelet's probes, which its address may reach in plaintext.
    pub probe_ports: Vec<u16>,
    /// Connections from before capture that must end: (local, remote).
    pub reset: Vec<(SocketAddr, SocketAddr)>,
    /// Port of the DNS proxy, which port 53 is redirected to. `None`: names are none of our business.
    pub dns: Option<u16>,
    /// Nothing but TCP (which the proxy decides about) and name look-ups may leave: `tulle.dev/egress: deny`.
    pub tcp_only: bool,
    /// The pod is being released: nothing new is redirected, but connections that the proxy carries go on, and their
    /// replies still need the marks.
    pub released: bool,
    /// A CNI agent installs the redirects and their routes: what remains here is what may not pass.
    pub by_agent: bool,
    /// What the kernel can do.
    pub kernel: Kernel,
}

/// What not every kernel is built with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Entries of connection tracking can be kept for times of their own.
    pub timeouts: bool,
    /// It can be asked which socket a packet would reach.
    pub sockets: bool,
}

impl Kernel {
    /// Asks it, in the current network namespace; takes some milliseconds.
    pub fn ask() -> Self {
        let takes = |object: &str, rule: &str| {
            let table = format!(
                "table inet {TABLE}_probe {{\n{object}  chain probe {{\n    type filter hook input priority filter; policy accept;\n    \
                 {rule}\n  }}\n}}\n"
            );
            run("nft", &["-c", "-f", "-"], Some(&table)).is_ok()
        };
        let timeout =
            format!("  ct timeout stray {{\n    protocol tcp;\n    policy = {{ established : {STRAY} }};\n  }}\n");
        Self { timeouts: takes(&timeout, "ct timeout set \"stray\""), sockets: takes("", "socket wildcard 1 accept") }
    }
}

impl Rules {
    /// Families that need policy routing: whether each is IPv6.
    pub fn routed(&self) -> impl Iterator<Item = bool> + use<> {
        let own = !self.by_agent;
        [own.then_some(false), (own && self.v6).then_some(true)].into_iter().flatten()
    }

    /// Whether nothing has to be installed.
    pub fn is_nothing(&self) -> bool {
        self.by_agent && self.reset.is_empty() && !self.tcp_only
    }

    /// The transaction that replaces whatever is installed.
    pub fn render(&self) -> String {
        let mut text = String::from(REMOVE);
        if self.is_nothing() {
            return text;
        }
        text.push_str("table inet tulle {\n");
        self.reset_sets(&mut text);
        if self.by_agent {
            self.filters(&mut text);
        } else {
            self.redirects(&mut text);
        }
        text.push_str("}\n");
        text
    }

    fn redirects(&self, text: &mut String) {
        text.push_str(&marks());
        if !self.released {
            self.prerouting(text);
            self.output(text);
            self.guards(text);
            self.filters(text);
        } else {
            text.push_str(&still_translated());
            text.push_str(PLAIN_NAMES);
        }
        if self.dns.is_some() {
            text.push_str(&dns_zones());
        }
    }

    fn prerouting(&self, text: &mut String) {
        text.push_str("  chain prerouting {\n    type nat hook prerouting priority dstnat; policy accept;\n");
        let _ = writeln!(text, "    {LATER} counter accept");
        self.probes(text);
        if !rules_are_broken() {
            for not_local in ["ip daddr != 127.0.0.1", "ip6 daddr != ::1"] {
                let _ = writeln!(
                    text,
                    "    {not_local} tcp dport != {PORT_HBONE} meta mark & {MARK_MASK:#x} != {MARK_PROXY:#x} counter redirect to :{PORT_INBOUND_PLAINTEXT}"
                );
            }
        }
        text.push_str("  }\n");
    }

    fn output(&self, text: &mut String) {
        text.push_str("  chain output {\n    type nat hook output priority -100; policy accept;\n");
        let _ = writeln!(text, "    {LATER} counter accept");
        let _ = writeln!(text, "    ip daddr {PROBE_V4} meta l4proto tcp counter accept");
        let _ = writeln!(text, "    ip6 daddr {PROBE_V6} meta l4proto tcp counter accept");
        if let Some(port) = self.dns {
            // Which interface such an address belongs to is lost in a redirect.
            text.push_str("    ip6 daddr fe80::/10 udp dport 53 counter accept\n");
            for protocol in ["udp", "tcp"] {
                let _ = writeln!(
                    text,
                    "    oifname != \"lo\" {protocol} dport 53 meta mark & {MARK_MASK:#x} != {MARK_PROXY:#x} counter redirect to :{port}"
                );
            }
        }
        let _ = writeln!(text, "    meta l4proto tcp meta mark & {MARK_MASK:#x} == {CONNMARK_PROXY:#x} counter accept");
        if !rules_are_broken() {
            for not_local in ["ip daddr != 127.0.0.1", "ip6 daddr != ::1"] {
                let _ = writeln!(text, "    {not_local} oifname \"lo\" counter accept");
                let _ = writeln!(
                    text,
                    "    {not_local} meta l4proto tcp meta mark & {MARK_MASK:#x} != {MARK_PROXY:#x} counter redirect to :{PORT_OUTBOUND}"
                );
            }
        }
        text.push_str("  }\n");
    }

    /// Refuses what begins a connection and was not redirected.
    fn guards(&self, text: &mut String) {
        if rules_are_broken() {
            return;
        }
        if self.kernel.timeouts {
            let states = "syn_sent syn_recv established fin_wait close_wait last_ack time_wait unack retrans";
            let policy = states.split(' ').map(|state| format!("{state} : {STRAY}")).collect::<Vec<_>>().join(", ");
            let _ = writeln!(text, "  ct timeout stray {{\n    protocol tcp;\n    policy = {{ {policy} }};\n  }}");
        }
        let stray = if self.kernel.timeouts {
            format!("    ct state new {LATER} ct timeout set \"stray\"\n")
        } else {
            String::new()
        };
        let rest = format!("    {LATER} accept\n    meta l4proto != tcp accept\n");
        text.push_str("  chain guard_in {\n    type filter hook input priority filter; policy accept;\n    iifname \"lo\" accept\n");
        if self.kernel.sockets {
            let _ = writeln!(
                text,
                "    ct state {{ new, invalid }} {LATER} socket wildcard 1 counter reject with tcp reset"
            );
        }
        let _ = write!(text, "{stray}{rest}");
        let _ = writeln!(text, "    tcp dport {{ {PORT_INBOUND_PLAINTEXT}, {PORT_HBONE} }} accept");
        self.probes(text);
        text.push_str("    counter reject with tcp reset\n  }\n");
        text.push_str("  chain guard_out {\n    type filter hook output priority filter; policy accept;\n    oifname \"lo\" accept\n");
        let _ = write!(text, "{stray}{rest}");
        for mark in [MARK_PROXY, CONNMARK_PROXY] {
            let _ = writeln!(text, "    meta mark & {MARK_MASK:#x} == {mark:#x} accept");
        }
        for (family, local, probe) in [("ip", "127.0.0.1", PROBE_V4.to_string()), ("ip6", "::1", PROBE_V6.to_string())]
        {
            let _ = writeln!(text, "    {family} daddr {{ {local}, {probe} }} accept");
        }
        text.push_str("    counter reject with tcp reset\n  }\n");
    }

    /// Lets the kubelet's probes in.
    fn probes(&self, text: &mut String) {
        if self.probe_ports.is_empty() {
            return;
        }
        let ports = self.probe_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "    ip saddr {PROBE_V4} tcp dport {{ {ports} }} counter accept");
        let _ = writeln!(text, "    ip6 saddr {PROBE_V6} tcp dport {{ {ports} }} counter accept");
    }

    /// Connections to end, and what a pod under `egress: deny` may send.
    fn filters(&self, text: &mut String) {
        if self.reset.is_empty() && !self.tcp_only {
            return;
        }
        if !self.reset.is_empty() {
            // A new connection may come to have the same addresses and ports; it goes through the proxy. And a reset has to
            // reach its socket, also the one that the other chain sends.
            let _ = writeln!(
                text,
                "  chain cut {{\n    ct status dnat return\n    ct mark & {MARK_MASK:#x} == {CONNMARK_PROXY:#x} return\n    \
                 tcp flags & rst == rst return\n    counter reject with tcp reset\n  }}"
            );
        }
        for (hook, near, far) in [("output", "s", "d"), ("input", "d", "s")] {
            if hook == "input" && self.reset.is_empty() {
                continue;
            }
            let _ =
                writeln!(text, "  chain filter_{hook} {{\n    type filter hook {hook} priority filter; policy accept;");
            for (family, v6) in [("ip", false), ("ip6", true)] {
                if self.reset.iter().any(|(local, _)| local.is_ipv6() == v6) {
                    let _ = writeln!(
                        text,
                        "    {family} {near}addr . tcp {near}port . {family} {far}addr . tcp {far}port @reset_{family} jump cut"
                    );
                }
            }
            if self.tcp_only && hook == "output" {
                text.push_str("    oifname \"lo\" accept\n");
                text.push_str("    meta l4proto tcp accept\n");
                text.push_str(
                    "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept\n",
                );
                text.push_str("    udp dport 53 accept\n");
                if let Some(port) = self.dns {
                    // Redirected to us by now, though the interface is still the one it would have left by.
                    let _ = writeln!(text, "    ip daddr 127.0.0.1 udp dport {port} accept");
                    let _ = writeln!(text, "    ip6 daddr ::1 udp dport {port} accept");
                }
                text.push_str("    ct direction reply accept\n");
                text.push_str("    counter reject with icmpx admin-prohibited\n");
            }
            text.push_str("  }\n");
        }
    }

    fn reset_sets(&self, text: &mut String) {
        for (family, kind, v6) in [("ip", "ipv4_addr", false), ("ip6", "ipv6_addr", true)] {
            let elements: Vec<String> = self
                .reset
                .iter()
                .filter(|(local, _)| local.is_ipv6() == v6)
                .map(|(local, remote)| {
                    format!("{} . {} . {} . {}", local.ip(), local.port(), remote.ip(), remote.port())
                })
                .collect();
            if !elements.is_empty() {
                let _ = writeln!(
                    text,
                    "  set reset_{family} {{\n    type {kind} . inet_service . {kind} . inet_service\n    elements = {{ {} }}\n  }}",
                    elements.join(", ")
                );
            }
        }
    }
}

/// A short name of a transaction's text, by which a successor knows what is installed. Not the same for all versions of
/// this program, which costs one more transaction.
pub fn fingerprint(transaction: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    transaction.hash(&mut hasher);
    hasher.finish()
}

/// Not the first packet of a connection: one from before the rules is picked up in its middle.
const LATER: &str = "tcp flags & (fin | syn | rst | ack) != syn";

/// How long an entry of connection tracking is kept that did not begin with a SYN, seconds after its last packet. The next
/// packet makes another one. Shorter than any client needs to come back to a port.
const STRAY: u32 = 5;

/// Tag connections from the proxy to the application, and route the application's replies back to the proxy, although
/// they are addressed to a client elsewhere.
///
/// The proxy has the client's address and a port of the pod's choice; the client may have the same port for a connection
/// of its own to the same application, and one of the two would be taken for a part of the other. So what the proxy sends
/// is looked up in a conntrack zone of its own. Only that: replies to the client come from the proxy's port, replies to
/// the proxy from the application's, so they differ without one.
fn marks() -> String {
    format!(
        "  chain zone_app {{\n    type filter hook output priority raw; policy accept;\n    \
         oifname \"lo\" meta l4proto tcp meta mark & {MARK_MASK:#x} == {MARK_PROXY:#x} ct original zone set 1\n  }}\n  \
         chain mark_in {{\n    type filter hook prerouting priority mangle; policy accept;\n    \
         meta mark & {MARK_MASK:#x} == {MARK_PROXY:#x} counter ct mark set {CONNMARK_PROXY:#x}\n  }}\n  \
         chain mark_out {{\n    type route hook output priority mangle; policy accept;\n    \
         ct mark & {MARK_MASK:#x} == {CONNMARK_PROXY:#x} counter meta mark set ct mark\n  }}\n"
    )
}

/// Chains without a rule. With its last chain of this type a namespace loses the translation itself, also of connections
/// that were redirected before: their replies would leave with the proxy's port, and nobody would know them.
fn still_translated() -> String {
    ["prerouting priority dstnat", "output priority -100"]
        .map(|hook| {
            let name = hook.split(' ').next().unwrap_or_default();
            format!("  chain {name} {{\n    type nat hook {hook}; policy accept;\n  }}\n")
        })
        .concat()
}

/// The transaction that leaves nothing but that names go by no entry of connection tracking.
pub fn names_only() -> String {
    format!("{REMOVE}table inet {TABLE} {{\n{PLAIN_NAMES}}}\n")
}

/// Name look-ups go by no entry of connection tracking. Entries from before the release are kept for 30 s after their last
/// packet and lead to our name server, which may be gone: a look-up from a port that was used in that time would be refused.
const PLAIN_NAMES: &str = "  chain plain_names_out {\n    type filter hook output priority raw; policy accept;\n    \
                           udp dport 53 notrack\n  }\n  \
                           chain plain_names_in {\n    type filter hook prerouting priority raw; policy accept;\n    \
                           udp sport 53 notrack\n  }\n";

/// A conntrack zone of its own for the DNS proxy's upstream queries: an application's query may have the same ports.
fn dns_zones() -> String {
    format!(
        "  chain zone_out {{\n    type filter hook output priority raw; policy accept;\n    \
         udp dport 53 meta mark & {MARK_MASK:#x} == {MARK_PROXY:#x} ct zone set 1\n  }}\n  \
         chain zone_in {{\n    type filter hook prerouting priority raw; policy accept;\n    \
         udp sport 53 meta mark & {MARK_MASK:#x} != {MARK_PROXY:#x} ct zone set 1\n  }}\n"
    )
}

/// Sabotage of test builds: `TULLE_BREAK=rules` installs the table without its redirects.
pub(crate) fn rules_are_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "rules")
}

#[cfg(test)]
mod tests {
    use super::{Kernel, Rules, names_only};
    use std::path::PathBuf;

    fn golden(name: &str, rules: &Rules) {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata").join(name);
        let rendered = rules.render();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &rendered).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(rendered, expected, "{name} differs; run the tests with UPDATE=1 and review the difference");
    }

    #[test]
    fn what_stays_for_names_tracks_no_connection() {
        let text = names_only();
        assert_eq!(text.matches("notrack").count(), 2);
        assert!(!text.contains(" ct ") && !text.contains("type nat"), "{text}");
    }

    #[test]
    fn rules_match_their_golden_files() {
        golden("plain.nft", &Rules::default());
        golden("guards.nft", &Rules { kernel: Kernel { timeouts: true, sockets: true }, ..Rules::default() });
        golden("probes.nft", &Rules { v6: true, probe_ports: vec![8080, 9090], ..Rules::default() });
        golden(
            "reset.nft",
            &Rules {
                v6: true,
                reset: vec![
                    ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:5000".parse().unwrap()),
                    ("[fd00::1]:80".parse().unwrap(), "[fd00::2]:5000".parse().unwrap()),
                ],
                ..Rules::default()
            },
        );
        golden("dns.nft", &Rules { v6: true, dns: Some(15053), ..Rules::default() });
        golden("released.nft", &Rules { released: true, ..Rules::default() });
        golden("by-agent.nft", &Rules { v6: true, tcp_only: true, by_agent: true, ..Rules::default() });
        golden("by-agent-nothing.nft", &Rules { by_agent: true, dns: Some(15053), ..Rules::default() });
        golden("tcp-only.nft", &Rules { v6: true, tcp_only: true, ..Rules::default() });
        golden("tcp-only-dns.nft", &Rules { v6: true, tcp_only: true, dns: Some(15053), ..Rules::default() });
    }
}
