//! The redirect rules that Istio's CNI agent installs in a pod, in nftables' words, and the routes that go with them.
//!
//! A proxy that is handed its pods expects these to be there already. They mean what Istio's agent's rules mean, so that
//! a proxy made for that agent works here unchanged. Limits: names are not captured (port 53), as the lab's other rules
//! do not either; connections from before the rules are left to conntrack, which redirects only a connection's first
//! packet.

use tulle_proto::names::CONNMARK_PROXY;
use tulle_proto::names::MARK_MASK;
use tulle_proto::names::MARK_PROXY;
use tulle_proto::names::PORT_HBONE;
use tulle_proto::names::PORT_INBOUND_PLAINTEXT;
use tulle_proto::names::PORT_OUTBOUND;
use tulle_proto::names::PROBE_V4;
use tulle_proto::names::PROBE_V6;

/// Removes the rules, whether they are there or not.
pub(super) const REMOVE: &str = "table inet handed\ndelete table inet handed\n";

/// `ip` commands, for each family, that bring replies to a client's address back to the proxy, which spoke in the
/// client's name.
pub(super) const ROUTE: [(&str, &str); 2] = [
    ("-4", "rule add fwmark 0x111/0xfff pref 32764 lookup 100\nroute replace local 0.0.0.0/0 dev lo table 100\n"),
    ("-6", "rule add fwmark 0x111/0xfff pref 32764 lookup 100\nroute replace local ::/0 dev lo table 100\n"),
];

/// `ip` commands that take that back; they fail when it is not there.
pub(super) const UNROUTE: &str = "rule del pref 32764\nroute flush table 100\n";

/// One transaction that installs the rules, in place of any before.
pub(super) fn install() -> String {
    let from_proxy = format!("meta mark & {MARK_MASK:#x} == {MARK_PROXY:#x}");
    let not_from_proxy = format!("meta mark & {MARK_MASK:#x} != {MARK_PROXY:#x}");
    let reply = format!("& {MARK_MASK:#x} == {CONNMARK_PROXY:#x}");
    let mut inbound = String::new();
    let mut outbound = String::new();
    for (family, local, probe) in [("ip", "127.0.0.1", PROBE_V4.to_string()), ("ip6", "::1", PROBE_V6.to_string())] {
        inbound += &format!("    {family} saddr {probe} meta l4proto tcp counter accept\n");
        inbound += &format!(
            "    {family} daddr != {local} tcp dport != {PORT_HBONE} {not_from_proxy} counter redirect to :{PORT_INBOUND_PLAINTEXT}\n"
        );
        outbound += &format!("    {family} daddr {probe} meta l4proto tcp counter accept\n");
        outbound += &format!("    {family} daddr != {local} oifname \"lo\" counter accept\n");
        outbound += &format!(
            "    {family} daddr != {local} meta l4proto tcp {not_from_proxy} counter redirect to :{PORT_OUTBOUND}\n"
        );
    }
    format!(
        "{REMOVE}table inet handed {{\n  \
         chain mark_in {{\n    type filter hook prerouting priority mangle; policy accept;\n    \
         {from_proxy} counter ct mark set {CONNMARK_PROXY:#x}\n  }}\n  \
         chain mark_out {{\n    type route hook output priority mangle; policy accept;\n    \
         ct mark {reply} counter meta mark set ct mark\n  }}\n  \
         chain inbound {{\n    type nat hook prerouting priority dstnat; policy accept;\n{inbound}  }}\n  \
         chain outbound {{\n    type nat hook output priority -100; policy accept;\n    \
         meta l4proto tcp meta mark {reply} counter accept\n{outbound}  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use tulle_proto::names::CONNMARK_PROXY;
    use tulle_proto::names::MARK_MASK;

    use crate::zds::rules::ROUTE;
    use crate::zds::rules::install;

    /// What a proxy made for Istio's agent relies on, as a table: chain, and the words of one rule in it.
    #[test]
    fn every_rule_that_the_proxy_relies_on_is_there() {
        let text = install();
        for (chain, rule) in [
            ("mark_in", "meta mark & 0xfff == 0x539 counter ct mark set 0x111"),
            ("mark_out", "ct mark & 0xfff == 0x111 counter meta mark set ct mark"),
            (
                "inbound",
                "ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006",
            ),
            ("inbound", "ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006"),
            ("inbound", "ip saddr 169.254.7.127 meta l4proto tcp counter accept"),
            ("outbound", "meta l4proto tcp meta mark & 0xfff == 0x111 counter accept"),
            ("outbound", "ip daddr != 127.0.0.1 oifname \"lo\" counter accept"),
            (
                "outbound",
                "ip daddr != 127.0.0.1 meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001",
            ),
            ("outbound", "ip6 daddr != ::1 meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001"),
        ] {
            let body = text.split(&format!("chain {chain} {{")).nth(1).and_then(|rest| rest.split("\n  }").next());
            assert!(body.is_some_and(|body| body.contains(rule)), "{chain} lacks {rule:?} in\n{text}");
        }
    }

    #[test]
    fn accepting_comes_before_redirecting() {
        let text = install();
        let at = |rule: &str| text.find(rule).unwrap_or(usize::MAX);
        assert!(at("saddr 169.254.7.127") < at("redirect to :15006"));
        assert!(at("== 0x111 counter accept") < at("redirect to :15001"));
        assert!(at("ip daddr != 127.0.0.1 oifname \"lo\"") < at("redirect to :15001"));
        let mark = format!("fwmark {CONNMARK_PROXY:#x}/{MARK_MASK:#x} ");
        assert!(ROUTE.iter().all(|(_, script)| script.contains(&mark)), "the routes are for the mark of the rules");
    }
}
