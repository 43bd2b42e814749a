//! The fence: what leaves a pod whose egress is closed, held where the pod has no power, in the node's own network.
//!
//! A container with CAP_NET_RAW may mark its packets and walk past the redirect; one with CAP_NET_ADMIN may flush it. Neither changes
//! what the node does with a packet that comes out of the pod's interface. There everything is dropped but tunnels to the mesh, plain
//! TCP to what is inside the cluster without being in the mesh (pods, and the API server's endpoints), and replies. What a rule lets out
//! of the cluster, and look-ups of names, the proxy dials from the node's network, so nothing of it comes through here. Keyed by the
//! interface and not by an address, which a pod can choose. For the same reason a reply may leave the cluster only if no fenced pod
//! began its connection: a packet to the pod itself with a made-up source from outside would else turn what follows into replies. The
//! table stays when the proxy stops.
//!
//! Behind a bridge the node sees the bridge where a packet came from, so what comes out of such a pod gets a mark at its port, before
//! anything else sees it, and the mark is what is fenced: each frame, whatever it says that it carries, because the node unpacks empty
//! VLAN tags only behind the bridge. What the bridge itself passes on goes to other pods, which are inside, and to no other kind of
//! port. Limits: only pods on a pair of interfaces whose other end is the node's own; others (macvlan, ipvlan, SR-IOV)
//! are reported as `Unfenced`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use tulle_proto::names::PORT_HBONE;

use crate::base::netns::{Netns, run_blocking};
use crate::capture::{nft, run};

/// Name of the table.
pub const TABLE: &str = "tulle_fence";

/// Set at the bridge's port on what comes out of a fenced pod: a bit that neither kube-proxy (0x4000, 0x8000) nor Cilium (0xf00) nor
/// Calico (the upper half) nor the redirect (0x539) uses. The same bit of a connection's mark says that a fenced pod began it.
const MARK: &str = "0x00000040";

/// What may pass the fence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Addresses that take tunnels.
    pub mesh: BTreeSet<IpAddr>,
    /// Pods that are not in the mesh.
    pub plain: BTreeSet<IpAddr>,
    /// Endpoints of the API server.
    pub api: BTreeSet<SocketAddr>,
}

/// The transaction that replaces whatever is installed. `bridged`: those of `interfaces` that are ports of a bridge; `clear`: there may be
/// rules of the bridge to take away.
pub fn render(interfaces: &BTreeSet<String>, bridged: &BTreeSet<String>, inside: &Inside, clear: bool) -> String {
    let mut text = format!("table inet {TABLE}\ndelete table inet {TABLE}\n");
    // Not named without need: a kernel may have no tables for bridges.
    if clear || !bridged.is_empty() {
        let _ = writeln!(text, "table bridge {TABLE}\ndelete table bridge {TABLE}");
    }
    if interfaces.is_empty() {
        return text;
    }
    if !bridged.is_empty() {
        let _ = writeln!(
            text,
            "table bridge {TABLE} {{\n  set pods {{\n    type ifname\n    elements = {{ {} }}\n  }}",
            list(bridged)
        );
        text.push_str("  chain port {\n    type filter hook prerouting priority dstnat; policy accept;\n");
        let _ = writeln!(text, "    iifname @pods meta mark set meta mark or {MARK}\n  }}");
        text.push_str("  chain forward {\n    type filter hook forward priority filter; policy accept;\n");
        text.push_str("    iifname @pods meta oifkind != \"veth\" counter drop\n  }\n}\n");
    }
    let _ = writeln!(text, "table inet {TABLE} {{");
    let _ = writeln!(text, "  set pods {{\n    type ifname\n    elements = {{ {} }}\n  }}", list(interfaces));
    for (name, addresses) in [("mesh", &inside.mesh), ("plain", &inside.plain)] {
        for (v6, kind) in [(false, "ipv4_addr"), (true, "ipv6_addr")] {
            let all = addresses.iter().filter(|ip| ip.is_ipv6() == v6).map(ToString::to_string);
            set(&mut text, &format!("{name}{}", if v6 { 6 } else { 4 }), kind, all.collect());
        }
    }
    for (v6, kind) in [(false, "ipv4_addr"), (true, "ipv6_addr")] {
        let all = inside.api.iter().filter(|at| at.is_ipv6() == v6).map(|at| format!("{} . {}", at.ip(), at.port()));
        let kind = format!("{kind} . inet_service");
        set(&mut text, &format!("api{}", if v6 { 6 } else { 4 }), &kind, all.collect());
    }
    let _ = writeln!(text, "  chain fence {{\n    ct direction reply ct mark and {MARK} == 0 accept");
    let begun = format!("ct mark set ct mark or {MARK} accept");
    for (family, number) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(text, "    ct direction reply {family} daddr @mesh{number} accept");
        let _ = writeln!(text, "    {family} daddr @mesh{number} tcp dport {PORT_HBONE} {begun}");
        let _ = writeln!(text, "    {family} daddr @plain{number} meta l4proto tcp {begun}");
        let _ = writeln!(text, "    {family} daddr . tcp dport @api{number} {begun}");
    }
    text.push_str("    counter drop\n  }\n");
    // After a Service's address was translated, since what counts is where a packet goes.
    for (hook, neighbours) in [("forward", false), ("input", true)] {
        let _ = writeln!(text, "  chain {hook} {{\n    type filter hook {hook} priority filter; policy accept;");
        if neighbours {
            text.push_str(
                "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept\n",
            );
        } else if !bridged.is_empty() {
            // What a bridge passes on comes here where br_netfilter is on: pods behind it look for each other.
            for neighbours in ["{ fe80::/10, ff02::/16 }", "@mesh6", "@plain6"] {
                let _ = writeln!(
                    text,
                    "    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 daddr {neighbours} accept"
                );
            }
        }
        text.push_str("    iifname @pods jump fence\n");
        if !bridged.is_empty() {
            let _ = writeln!(text, "    meta mark and {MARK} == {MARK} jump fence");
        }
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    text
}

fn list(names: &BTreeSet<String>) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    names.join(", ")
}

fn set(text: &mut String, name: &str, kind: &str, elements: Vec<String>) {
    let _ = write!(text, "  set {name} {{\n    type {kind}\n");
    if !elements.is_empty() {
        let _ = writeln!(text, "    elements = {{ {} }}", elements.join(", "));
    }
    text.push_str("  }\n");
}

/// Replaces the node's table.
///
/// # Errors
/// What `nft` said; nothing was changed then.
pub async fn apply(node: &Netns, text: String) -> io::Result<()> {
    run_blocking(node, move || nft(&text)).await
}

/// Interfaces that a table from before fences.
///
/// # Errors
/// What `nft` said, if it is not that there is no table: nobody may take a fence down because it could not be seen.
pub async fn fenced(node: &Netns) -> io::Result<BTreeSet<String>> {
    let listed = run_blocking(node, || run("nft", &["-j", "list", "set", "inet", TABLE, "pods"], None)).await;
    let text = match listed {
        Err(error) if error.to_string().contains("No such file or directory") => return Ok(BTreeSet::new()),
        listed => listed?,
    };
    let value: Value = serde_json::from_str(&text)?;
    let sets = value["nftables"].as_array().into_iter().flatten();
    let elements = sets.filter_map(|one| one["set"]["elem"].as_array()).flatten();
    Ok(elements.filter_map(|one| one.as_str().map(str::to_owned)).collect())
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    name: String,
    /// Index of the other end, in the namespace of the other end.
    peer: Option<u64>,
    /// It is a port of this one.
    master: Option<String>,
    /// Which is a bridge.
    bridged: bool,
    /// Up. A pod may say so of its own ones as it likes.
    up: bool,
    /// Loopback.
    loopback: bool,
}

impl Link {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Interfaces by index, as `ip -d -j link` lists them.
pub fn links(text: &str) -> BTreeMap<u64, Link> {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let one = |link: &Value| {
        let flags: Vec<&str> = link["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let name = link["ifname"].as_str()?.to_owned();
        let (up, loopback) = (flags.contains(&"UP"), flags.contains(&"LOOPBACK"));
        let master = link["master"].as_str().map(str::to_owned);
        let bridged = link["linkinfo"]["info_slave_kind"] == "bridge";
        Some((
            link["ifindex"].as_u64()?,
            Link { name, peer: link["link_index"].as_u64(), master, bridged, up, loopback },
        ))
    };
    value.as_array().into_iter().flatten().filter_map(one).collect()
}

/// The node's ends of a pod's interfaces, and why that is not all that has to be fenced. What a pod that may make interfaces adds to
/// them takes no end out of the fence, nor does one that it has put down for the moment.
pub fn ends(pod: &BTreeMap<u64, Link>, node: &BTreeMap<u64, Link>) -> (BTreeSet<String>, Option<String>) {
    let mut found = BTreeSet::new();
    let mut problem = None;
    for (index, link) in pod.iter().filter(|(_, link)| !link.loopback) {
        let end = link.peer.and_then(|peer| node.get(&peer)).filter(|end| end.peer == Some(*index));
        let wrong = match end {
            None if !link.up => continue,
            None => format!("its interface {} does not end at the node", link.name),
            Some(end) => match &end.master {
                Some(master) if !end.bridged => format!(
                    "the node's end {} of its interface {} is a port of {master}, which is no bridge",
                    end.name, link.name
                ),
                // It goes into a transaction's text.
                _ if end.name.contains(['"', '\\', '*']) => {
                    format!("the node's end of its interface {} has a name that nft cannot take", link.name)
                }
                _ => {
                    found.insert(end.name.clone());
                    continue;
                }
            },
        };
        problem.get_or_insert(wrong);
    }
    if found.is_empty() {
        problem.get_or_insert_with(|| "it has no interface that ends at the node".to_owned());
    }
    (found, problem)
}

/// Those of `names` that are ports of a bridge.
pub fn bridged(names: &BTreeSet<String>, node: &BTreeMap<u64, Link>) -> BTreeSet<String> {
    node.values().filter(|link| link.bridged && names.contains(&link.name)).map(|link| link.name.clone()).collect()
}

/// The interfaces of a namespace.
///
/// # Errors
/// What `ip` said.
pub async fn interfaces(netns: &Netns) -> io::Result<BTreeMap<u64, Link>> {
    run_blocking(netns, || run("ip", &["-d", "-j", "link", "show"], None)).await.map(|text| links(&text))
}

/// Sabotage of test builds: `TULLE_BREAK=fence` leaves the fence away and says that it is there.
pub fn is_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "fence")
}

#[cfg(test)]
mod tests {
    use super::{Inside, bridged, ends, links, render};
    use std::path::PathBuf;

    #[test]
    fn the_fence_matches_its_golden_file() {
        let inside = Inside {
            mesh: ["10.0.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()).into(),
            plain: ["10.0.0.3".parse().unwrap()].into(),
            api: ["192.0.2.1:6443".parse().unwrap()].into(),
        };
        let pods = ["pod1", "pod2"].map(str::to_owned).into();
        for (file, bridged) in [("fence.nft", [].into()), ("fence-bridge.nft", ["pod2".to_owned()].into())] {
            let rendered = render(&pods, &bridged, &inside, false);
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata").join(file);
            if std::env::var_os("UPDATE").is_some() {
                std::fs::write(&path, &rendered).unwrap();
            }
            assert_eq!(rendered, std::fs::read_to_string(&path).unwrap_or_default(), "{file}");
        }
        assert!(!render(&[].into(), &[].into(), &inside, true).contains("chain"), "nobody is closed");
    }

    #[test]
    fn only_a_pair_that_ends_at_the_node_can_be_fenced() {
        let link = |index: u64, name: &str, rest: &str| {
            format!("{{\"ifindex\":{index},\"ifname\":\"{name}\",\"flags\":[\"UP\"]{rest}}}")
        };
        let lo = "{\"ifindex\":1,\"ifname\":\"lo\",\"flags\":[\"LOOPBACK\",\"UP\"]}";
        let pod = |rest: &str| links(&format!("[{lo},{}]", link(2, "eth0", rest)));
        let node = |rest: &str| links(&format!("[{lo},{}]", link(7, "pod1", rest)));
        let (near, far) = (",\"link_index\":7,\"link_netnsid\":0", ",\"link_index\":2,\"link_netnsid\":1");
        let held = (["pod1".to_owned()].into(), None);
        assert_eq!(ends(&pod(near), &node(far)), held);
        let port =
            format!("{far},\"master\":\"cni0\",\"linkinfo\":{{\"info_kind\":\"veth\",\"info_slave_kind\":\"bridge\"}}");
        assert_eq!(ends(&pod(near), &node(&port)), held);
        // What a pod does to its own interfaces takes it out of no fence.
        let down = links(&format!("[{}]", link(2, "eth0", near).replace("UP", "")));
        assert_eq!(ends(&down, &node(far)), held);
        let fallback = link(4, "tunl0", "").replace("UP", "");
        assert_eq!(ends(&links(&format!("[{},{fallback}]", link(2, "eth0", near))), &node(far)), held);
        let more = links(&format!("[{},{}]", link(2, "eth0", near), link(3, "dummy0", "")));
        let (found, problem) = ends(&more, &node(far));
        assert_eq!((found, problem.is_some_and(|why| why.contains("dummy0"))), (held.0, true));
        for (text, expected) in [(&*port, 1), (far, 0)] {
            assert_eq!(bridged(&["pod1".to_owned()].into(), &node(text)).len(), expected, "{text}");
        }
        for (near, far, why) in [
            ("", far, "does not end at the node"),
            (",\"link_index\":9", far, "does not end at the node"),
            (near, ",\"link_index\":3", "does not end at the node"),
            (near, ",\"link_index\":2,\"master\":\"blue\"", "a port of blue, which is no bridge"),
        ] {
            let (found, problem) = ends(&pod(near), &node(far));
            assert!(found.is_empty() && problem.as_ref().is_some_and(|said| said.contains(why)), "{problem:?}");
        }
        assert!(ends(&links("[]"), &node(far)).1.is_some());
    }
}
