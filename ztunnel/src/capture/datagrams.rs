//! The nftables rules that hold a pod's UDP and SCTP to its NetworkPolicies.
//!
//! A table of its own beside the redirect rules, replaced in one transaction when what it says has changed. Each packet is
//! judged by the first packet of its flow, as connection tracking remembers it: replies too, so that a policy's edit ends
//! what it forbids in both directions, and port 53 is seen before its redirect. Other protocols are left alone: the proxy
//! has TCP, and NetworkPolicy says nothing of the rest. What tracking cannot place is refused. Like capture it is no
//! fence: who may mark packets passes.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use tulle_proto::names::{MARK_MASK, MARK_PROXY};

use crate::base::netns::{Netns, run_blocking};
use crate::capture::nft;
use crate::capture::probe::{OUTBOUND_V4, OUTBOUND_V6, PORT_NAMES};
use crate::policy::datagrams::{Allow, Filter, Peers};
use crate::state::Transport;

/// Name of the table.
pub const TABLE: &str = "tulle_network";

/// Removes the table, whether it is there or not.
pub const REMOVE: &str = "table inet tulle_network\ndelete table inet tulle_network\n";

/// Brings the namespace's rules to `filter`; see [`text`].
///
/// # Errors
/// What `nft` said; nothing was changed then.
pub async fn apply(netns: &Netns, filter: Option<&Filter>) -> io::Result<()> {
    let text = text(filter);
    run_blocking(netns, move || nft(&text)).await
}

/// The transaction that brings any namespace to `filter`; `None`: none.
pub fn text(filter: Option<&Filter>) -> String {
    filter.map_or_else(|| REMOVE.to_owned(), render)
}

/// The transaction that replaces whatever is installed.
pub fn render(filter: &Filter) -> String {
    let mut text = String::from(REMOVE);
    text.push_str("table inet tulle_network {\n");
    let exempt: Vec<IpNet> = filter.exempt.iter().copied().map(IpNet::from).collect();
    let near = filter.ingress.as_ref().map(|allows| {
        chain(
            &mut text,
            &Side { name: "ingress", address: ["ct original ip saddr", "ct original ip6 saddr"] },
            &exempt,
            allows.iter(),
        )
    });
    let far = filter.egress.as_ref().map(|allows| {
        let loopback = [IpAddr::from([127, 0, 0, 0]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
        let loopback =
            loopback.map(|ip| IpNet::new(ip, if ip.is_ipv4() { 8 } else { 128 }).unwrap_or_else(|_| ip.into()));
        let exempt: Vec<IpNet> = exempt.iter().copied().chain(loopback).collect();
        // The proof that names are redirected goes to an address that nobody has.
        let proof = Allow {
            peers: Some(Peers {
                nets: [IpAddr::V4(OUTBOUND_V4), IpAddr::V6(OUTBOUND_V6)].map(IpNet::from).into(),
                except: Vec::new(),
            }),
            ports: Some([(Transport::Udp, PORT_NAMES, PORT_NAMES)].into()),
        };
        chain(
            &mut text,
            &Side { name: "egress", address: ["ct original ip daddr", "ct original ip6 daddr"] },
            &exempt,
            std::iter::once(&proof).chain(allows),
        )
    });
    // The flow's own direction, and that of flows whose replies the packet is one of.
    hook(&mut text, "input", near, far);
    hook(&mut text, "output", far, near);
    text.push_str("}\n");
    text
}

/// How one direction looks at a flow.
struct Side {
    /// Name of its chain.
    name: &'static str,
    /// The peer's address, for IPv4 and IPv6.
    address: [&'static str; 2],
}

/// What may be exchanged in one direction; the rest comes back to the caller. Gives the chain's name.
fn chain<'a>(
    text: &mut String,
    side: &Side,
    exempt: &[IpNet],
    allows: impl Iterator<Item = &'a Allow>,
) -> &'static str {
    let _ = writeln!(text, "  chain {} {{", side.name);
    for (family, nets) in by_family(exempt) {
        let _ = writeln!(text, "    {} {nets} accept", side.address[family]);
    }
    for allow in allows {
        rule(text, side, allow);
    }
    text.push_str("  }\n");
    side.name
}

/// Packets at `hook`: those of flows that began there go to the chain `own`, replies to `others`. `None`: they pass.
fn hook(text: &mut String, hook: &str, own: Option<&str>, others: Option<&str>) {
    let _ = writeln!(text, "  chain {hook} {{\n    type filter hook {hook} priority filter; policy accept;");
    text.push_str("    meta l4proto != { udp, sctp } accept\n");
    if hook == "input" {
        text.push_str("    iifname \"lo\" accept\n");
        // Answers alone: a pod that marks its own replies must not keep letting in what a policy has ended.
        let _ = writeln!(text, "    ct direction reply ct mark & {MARK_MASK:#x} == {MARK_PROXY:#x} accept");
    } else {
        // The proxy's own look-ups, and the mark by which their answers are known.
        let _ = writeln!(text, "    meta mark & {MARK_MASK:#x} == {MARK_PROXY:#x} ct mark set {MARK_PROXY:#x} accept");
        text.push_str("    ct direction reply oifname \"lo\" accept\n");
    }
    for (direction, chain) in [("original", own), ("reply", others)] {
        let verdict = chain.map_or_else(|| "accept".to_owned(), |name| format!("jump {name}"));
        let _ = writeln!(text, "    ct direction {direction} {verdict}");
    }
    // The sender should hear of it rather than wait; a peer from outside should not.
    let verdict = if hook == "input" { "drop" } else { "reject with icmpx admin-prohibited" };
    let _ = writeln!(text, "    counter {verdict}\n  }}");
}

fn rule(text: &mut String, side: &Side, allow: &Allow) {
    let ports: Vec<String> = match &allow.ports {
        None => vec![String::new()],
        Some(ports) => [(Transport::Udp, "udp"), (Transport::Sctp, "sctp")]
            .into_iter()
            .filter_map(|(protocol, word)| {
                let ranges =
                    merged(ports.iter().filter(|(of, ..)| *of == protocol).map(|(_, first, last)| (*first, *last)));
                let set = ranges
                    .iter()
                    .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
                let set: Vec<String> = set.collect();
                (!set.is_empty())
                    .then(|| format!(" meta l4proto {word} ct original proto-dst {{ {} }}", set.join(", ")))
            })
            .collect(),
    };
    let addresses: Vec<String> = match &allow.peers {
        None => vec![String::new()],
        Some(peers) => by_family(&peers.nets)
            .map(|(family, nets)| {
                let except = by_family(&peers.except).find(|(of, _)| *of == family);
                let except =
                    except.map_or_else(String::new, |(_, nets)| format!(" {} != {nets}", side.address[family]));
                format!(" {} {nets}{except}", side.address[family])
            })
            .collect(),
    };
    for address in &addresses {
        for port in &ports {
            let _ = writeln!(text, "   {address}{port} accept");
        }
    }
}

/// Sets of the IPv4 and of the IPv6 blocks, without those that are empty.
fn by_family(nets: &[IpNet]) -> impl Iterator<Item = (usize, String)> {
    [false, true].into_iter().enumerate().filter_map(|(family, v6)| {
        let nets: Vec<IpNet> = nets.iter().filter(|net| net.addr().is_ipv6() == v6).copied().collect();
        let nets: Vec<String> = IpNet::aggregate(&nets).iter().map(ToString::to_string).collect();
        (!nets.is_empty()).then(|| (family, format!("{{ {} }}", nets.join(", "))))
    })
}

/// Ranges in order, without overlaps, which sets of the kernel do not take.
fn merged(ranges: impl Iterator<Item = (u16, u16)>) -> Vec<(u16, u16)> {
    let mut sorted: Vec<(u16, u16)> = ranges.collect();
    sorted.sort_unstable();
    let mut found: Vec<(u16, u16)> = Vec::new();
    for (first, last) in sorted {
        match found.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => found.push((first, last)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{merged, render};
    use crate::policy::datagrams::{Allow, Filter, Peers};
    use crate::state::Transport;
    use std::path::PathBuf;

    fn golden(name: &str, filter: &Filter) {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata").join(name);
        let rendered = render(filter);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &rendered).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(rendered, expected, "{name} differs; run the tests with UPDATE=1 and review the difference");
    }

    #[test]
    fn filters_match_their_golden_files() {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<_>>();
        let exempt = ["10.0.0.9", "fd00::9"].map(|ip| ip.parse().unwrap()).into();
        golden(
            "network-closed.nft",
            &Filter { ingress: Some(Vec::new()), egress: Some(Vec::new()), ..Filter::default() },
        );
        let everybody = Allow { peers: None, ports: Some([(Transport::Udp, 53, 53)].into()) };
        let some = Allow {
            peers: Some(Peers { nets: nets(&["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"]), except: Vec::new() }),
            ports: Some([(Transport::Udp, 0, 65535), (Transport::Sctp, 7, 9), (Transport::Sctp, 8, 12)].into()),
        };
        let block = Allow {
            peers: Some(Peers { nets: nets(&["172.17.0.0/16"]), except: nets(&["172.17.1.0/24"]) }),
            ports: None,
        };
        golden(
            "network-in.nft",
            &Filter {
                exempt,
                ingress: Some(vec![everybody.clone(), some.clone(), block.clone()]),
                ..Filter::default()
            },
        );
        golden(
            "network-out.nft",
            &Filter { egress: Some(vec![everybody, some, block, Allow::default()]), ..Filter::default() },
        );
    }

    #[test]
    fn port_ranges_are_merged() {
        assert_eq!(
            merged([(5, 9), (1, 3), (4, 4), (8, 12), (20, 65535), (65535, 65535)].into_iter()),
            [(1, 12), (20, 65535)]
        );
    }
}
