//! The fence: what leaves a pod whose egress is closed, held where the pod has no power, in the node's own network.
//!
//! A container with CAP_NET_RAW may mark its packets and walk past the redirect; one with CAP_NET_ADMIN may flush it. Neither changes
//! what the node does with a packet that comes out of the pod's interface. There everything is dropped but tunnels to the mesh, plain
//! TCP to what is inside the cluster without being in the mesh (pods, and the API server's endpoints), and replies. What a rule lets out
//! of the cluster, and look-ups of names, the proxy dials from the node's network, so nothing of it comes through here. Keyed by the
//! interface and not by an address, which a pod can choose. The table stays when the proxy stops.
//!
//! A reply passes, so a pod must not be able to make one up: with a source that is not its own it could begin, from the outside's
//! address, the connection that it then answers, or have another pod answer. So what claims to come from elsewhere is dropped before it
//! is tracked: a source is one of the pod's addresses, or one that the node itself would look for behind that interface (a second
//! network of the pod). And a reply may leave the cluster only if no fenced pod began its connection, since the node's routes may say
//! too much: where a pod is a router for others, any address is behind it.
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

/// Who is inside the fence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fenced {
    /// The node's ends of pods' interfaces.
    pub interfaces: BTreeSet<String>,
    /// Those of them that are ports of a bridge, and of which one.
    pub bridged: BTreeMap<String, String>,
    /// Addresses of the pods behind them, or behind a bridge, as far as they are known.
    pub own: BTreeMap<String, BTreeSet<IpAddr>>,
    /// The kernel can be asked where it would look for an address.
    pub routes: bool,
}

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

impl Inside {
    /// Whether a new connection to `to` passes.
    pub fn takes(&self, to: SocketAddr) -> bool {
        let ip = to.ip().to_canonical();
        let tunnel = to.port() == PORT_HBONE && self.mesh.contains(&ip);
        tunnel || self.plain.contains(&ip) || self.api.contains(&SocketAddr::new(ip, to.port()))
    }
}

/// The transaction that replaces whatever is installed. `bridged`: those of `interfaces` that are ports of a bridge; `clear`: there may be
/// rules of the bridge to take away.
pub fn render(fenced: &Fenced, inside: &Inside, clear: bool) -> String {
    let Fenced { interfaces, bridged, .. } = fenced;
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
            list(bridged.keys())
        );
        text.push_str("  chain port {\n    type filter hook prerouting priority dstnat; policy accept;\n");
        let _ = writeln!(text, "    iifname @pods meta mark set meta mark or {MARK}\n  }}");
        text.push_str("  chain forward {\n    type filter hook forward priority filter; policy accept;\n");
        text.push_str("    iifname @pods meta oifkind != \"veth\" counter drop\n  }\n}\n");
    }
    let _ = writeln!(text, "table inet {TABLE} {{");
    let _ = writeln!(text, "  set pods {{\n    type ifname\n    elements = {{ {} }}\n  }}", list(interfaces.iter()));
    sources(&mut text, fenced);
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
    // An error about somebody else's connection (ICMP) counts as related to that, whoever sends it: it has to be about an own one.
    let answers = format!("ct direction reply ct mark and {MARK} == 0");
    let _ = writeln!(text, "  chain fence {{\n    ct state established {answers} accept");
    for (family, number) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(text, "    ct state related {answers} iifname . ct reply {family} saddr @own{number} accept");
    }
    let begun = format!("ct mark set ct mark or {MARK} accept");
    for (family, number) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(text, "    ct direction reply {family} daddr @mesh{number} accept");
        let _ = writeln!(text, "    {family} daddr @mesh{number} tcp dport {PORT_HBONE} {begun}");
        let _ = writeln!(text, "    {family} daddr @plain{number} meta l4proto tcp {begun}");
        // Begun while the other pod was not in the mesh, to which it has come since: that ends no connection.
        let _ = writeln!(
            text,
            "    {family} daddr @mesh{number} ct mark and {MARK} == {MARK} tcp flags & (fin | syn | rst | ack) != syn accept"
        );
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
        jump(&mut text, bridged, "fence");
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    text
}

/// Sends what comes out of a pod to `chain`.
fn jump(text: &mut String, bridged: &BTreeMap<String, String>, chain: &str) {
    let _ = writeln!(text, "    iifname @pods jump {chain}");
    if !bridged.is_empty() {
        let _ = writeln!(text, "    meta mark and {MARK} == {MARK} jump {chain}");
    }
}

/// Drops what comes out of a pod with a source that is not its own, before connections are tracked.
fn sources(text: &mut String, fenced: &Fenced) {
    for (v6, number, kind) in [(false, 4, "ipv4_addr"), (true, 6, "ipv6_addr")] {
        let each = fenced.own.iter().flat_map(|(name, all)| all.iter().map(move |ip| (name, ip)));
        // What comes through a bridge is seen to come from the bridge.
        let seen = |name: &String, ip| format!("\"{}\" . {ip}", fenced.bridged.get(name).unwrap_or(name));
        let all: BTreeSet<String> =
            each.filter(|(_, ip)| ip.is_ipv6() == v6).map(|(name, ip)| seen(name, ip)).collect();
        set(text, &format!("own{number}"), &format!("ifname . {kind}"), all.into_iter().collect());
    }
    text.push_str("  chain source {\n    iifname . ip saddr @own4 return\n    iifname . ip6 saddr @own6 return\n");
    // Neighbours' talk, which no router passes on.
    text.push_str("    ip6 saddr { ::, fe80::/10 } return\n");
    if fenced.routes {
        text.push_str("    fib saddr . iif oif exists return\n");
    }
    text.push_str("    counter drop\n  }\n");
    text.push_str("  chain prerouting {\n    type filter hook prerouting priority raw; policy accept;\n");
    jump(text, &fenced.bridged, "source");
    text.push_str("  }\n");
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<String> = names.map(|name| format!("\"{name}\"")).collect();
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

/// Whether the kernel can be asked where it would look for an address; not every one is built so.
pub async fn knows_routes(node: &Netns) -> bool {
    let rule = format!(
        "table inet {TABLE}_probe {{\n  chain prerouting {{\n    type filter hook prerouting priority raw; policy accept;\n\
         \x20   fib saddr . iif oif exists accept\n  }}\n}}\n"
    );
    run_blocking(node, move || run("nft", &["-c", "-f", "-"], Some(&rule))).await.is_ok()
}

/// The table that is there, by the number that the kernel gives each new one.
///
/// # Errors
/// What `nft` said.
pub async fn table(node: &Netns) -> io::Result<Option<u64>> {
    let listed = run_blocking(node, || run("nft", &["-j", "list", "tables", "inet"], None)).await?;
    let listed: Value = serde_json::from_str(&listed)?;
    let mut tables = listed["nftables"].as_array().into_iter().flatten().map(|one| &one["table"]);
    Ok(tables.find(|table| table["name"] == TABLE).and_then(|table| table["handle"].as_u64()))
}

/// Interfaces that a table from before fences, and the addresses behind them.
///
/// # Errors
/// What `nft` said, if it is not that there is no table: nobody may take a fence down because it could not be seen.
pub async fn fenced(node: &Netns) -> io::Result<(BTreeSet<String>, BTreeMap<String, BTreeSet<IpAddr>>)> {
    let listed = run_blocking(node, || run("nft", &["-j", "list", "table", "inet", TABLE], None)).await;
    match listed {
        Err(error) if error.to_string().contains("No such file or directory") => Ok(Default::default()),
        listed => Ok(listed_sets(&serde_json::from_str(&listed?)?)),
    }
}

/// The same of a table as `nft -j` lists it.
fn listed_sets(listed: &Value) -> (BTreeSet<String>, BTreeMap<String, BTreeSet<IpAddr>>) {
    let elements = |wanted: &[&str]| -> Vec<Value> {
        let sets = listed["nftables"].as_array().into_iter().flatten().map(|one| &one["set"]);
        let wanted = sets.filter(|set| set["name"].as_str().is_some_and(|name| wanted.contains(&name)));
        wanted.filter_map(|set| set["elem"].as_array()).flatten().cloned().collect()
    };
    let interfaces = elements(&["pods"]).iter().filter_map(|one| one.as_str().map(str::to_owned)).collect();
    let mut own: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for pair in elements(&["own4", "own6"]) {
        let (name, ip) = (pair["concat"][0].as_str(), pair["concat"][1].as_str());
        if let (Some(name), Some(Ok(ip))) = (name, ip.map(str::parse)) {
            own.entry(name.to_owned()).or_default().insert(ip);
        }
    }
    (interfaces, own)
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

/// Those of `names` that are ports of a bridge, and of which one.
pub fn bridged(names: &BTreeSet<String>, node: &BTreeMap<u64, Link>) -> BTreeMap<String, String> {
    let ports = node.values().filter(|link| link.bridged && names.contains(&link.name));
    ports.filter_map(|link| Some((link.name.clone(), link.master.clone()?))).collect()
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
    use super::{Fenced, Inside, bridged, ends, links, listed_sets, render};
    use std::path::PathBuf;

    #[test]
    fn the_fence_matches_its_golden_file() {
        let inside = Inside {
            mesh: ["10.0.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()).into(),
            plain: ["10.0.0.3".parse().unwrap()].into(),
            api: ["192.0.2.1:6443".parse().unwrap()].into(),
        };
        let own = |name: &str, ips: &[&str]| (name.to_owned(), ips.iter().map(|ip| ip.parse().unwrap()).collect());
        let fenced = |bridged, routes| Fenced {
            interfaces: ["pod1", "pod2"].map(str::to_owned).into(),
            bridged,
            own: [own("pod1", &["10.0.0.2", "fd00::2"]), own("pod2", &["10.0.0.4"])].into(),
            routes,
        };
        let cases = [
            ("fence.nft", fenced([].into(), false)),
            ("fence-bridge.nft", fenced([("pod2".to_owned(), "cni0".to_owned())].into(), true)),
        ];
        for (file, fenced) in cases {
            let rendered = render(&fenced, &inside, false);
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/capture/testdata").join(file);
            if std::env::var_os("UPDATE").is_some() {
                std::fs::write(&path, &rendered).unwrap();
            }
            assert_eq!(rendered, std::fs::read_to_string(&path).unwrap_or_default(), "{file}");
        }
        assert!(!render(&Fenced::default(), &inside, true).contains("chain"), "nobody is closed");
    }

    #[test]
    fn an_installed_table_says_whom_it_fences() {
        let text = "{\"nftables\":[{\"metainfo\":{}},{\"set\":{\"name\":\"pods\",\"elem\":[\"pod1\",\"pod2\"]}},\
            {\"set\":{\"name\":\"own4\",\"elem\":[{\"concat\":[\"pod1\",\"10.0.0.2\"]}]}},{\"set\":{\"name\":\"mesh4\",\"elem\":[\"10.0.0.9\"]}},\
            {\"set\":{\"name\":\"own6\",\"elem\":[{\"concat\":[\"pod1\",\"fd00::2\"]}]}}]}";
        let own = ["10.0.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(
            listed_sets(&serde_json::from_str(text).unwrap()),
            (["pod1", "pod2"].map(str::to_owned).into(), [("pod1".to_owned(), own)].into())
        );
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
