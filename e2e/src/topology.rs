//! The links: a fabric between nodes and control, an outside network, and a routed pair of interfaces for every pod.
//!
//! Pods are routed, not bridged: a bridge would carry traffic between two pods of one node past the node's address
//! translation, and a rule keyed by a pod's interface would never see it. Scripts are pure text for `ip -batch`, one
//! process per namespace; addresses come without duplicate address detection, and the neighbours on pods' links are
//! permanent. Limits: no
//! link or route leads to the machine's own network.

use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;

use crate::address;
use crate::address::Pair;
use crate::kubeproxy;
use crate::netns::NetNs;
use crate::place::Placement;

/// The fabric's commands: two bridges, control's link, and two links to each node.
pub fn fabric_script(nodes: u16, control: &Path, node_path: impl Fn(u16) -> PathBuf) -> String {
    // Snooping would drop neighbour solicitations until a querier shows up, and none does.
    let mut script = String::from(
        "link set lo up\n\
         link add br0 type bridge mcast_snooping 0\nlink set br0 up\n\
         link add br-out type bridge mcast_snooping 0\nlink set br-out up\n",
    );
    let mut link = |near: &str, bridge: &str, far: &str, path: &Path| {
        script.push_str(&format!(
            "link add {near} type veth peer name {far} netns {path}\nlink set {near} master {bridge} up\n",
            path = path.display()
        ));
    };
    link("control", "br0", "eth0", control);
    for node in 1..=nodes {
        link(&format!("node-{node}"), "br0", "eth0", &node_path(node));
        link(&format!("out-{node}"), "br-out", "out0", &node_path(node));
    }
    script
}

/// Control's own end: it knows the way to every node's pods, some of which ask it.
pub fn control_script(nodes: u16) -> String {
    let Pair { v4, v6 } = address::CONTROL;
    let mut script = format!(
        "link set lo up\nlink set eth0 up\n\
         addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"
    );
    for node in 1..=nodes {
        let (range4, range6) = address::pod_ranges(node);
        let via = address::node(node);
        script.push_str(&format!("route add {range4} via {}\nroute add {range6} via {}\n", via.v4, via.v6));
    }
    script
}

/// A node: its addresses, the way to other nodes' pods, and a route that makes Service addresses reach the
/// translation.
pub fn node_script(node: u16, nodes: u16) -> String {
    let (own, outside, gateway) = (address::node(node), address::node_outside(node), address::gateway(node));
    let mut script = format!(
        "link set lo up\n\
         link set eth0 up\nlink set out0 up\n\
         addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
         addr add {}/24 dev out0\naddr add {}/64 dev out0 nodad\n\
         addr add {}/32 dev lo\naddr add {}/128 dev lo nodad\n\
         route add {} dev eth0\nroute add {} dev eth0\n",
        own.v4,
        own.v6,
        outside.v4,
        outside.v6,
        gateway.v4,
        gateway.v6,
        address::SERVICES.0,
        address::SERVICES.1
    );
    for other in (1..=nodes).filter(|other| *other != node) {
        let (v4, v6) = address::pod_ranges(other);
        let via = address::node(other);
        script.push_str(&format!("route add {v4} via {}\nroute add {v6} via {}\n", via.v4, via.v6));
    }
    script
}

/// Name of the node's end of the link of pod `index`.
pub fn pod_interface(index: u16) -> String {
    format!("pod{index}")
}

/// The node's end of a pod's link.
pub fn pod_host_script(node: u16, index: u16, pod: &Path) -> String {
    let name = pod_interface(index);
    let (own, gateway) = (address::pod(node, index), address::gateway(node));
    let (host_mac, pod_mac) = (address::mac(node, index, true), address::mac(node, index, false));
    format!(
        "link add {name} type veth peer name eth0 address {pod_mac} netns {path}\n\
         link set {name} address {host_mac} addrgenmode none\nlink set {name} up\n\
         addr add fe80::1/64 dev {name} nodad\n\
         route add {v4}/32 dev {name} src {gateway4}\nroute add {v6}/128 dev {name} src {gateway6}\n\
         neigh replace {v4} lladdr {pod_mac} dev {name} nud permanent\n\
         neigh replace {v6} lladdr {pod_mac} dev {name} nud permanent\n",
        path = pod.display(),
        v4 = own.v4,
        v6 = own.v6,
        gateway4 = gateway.v4,
        gateway6 = gateway.v6,
    )
}

/// The pod's end.
pub fn pod_script(node: u16, index: u16) -> String {
    let (own, gateway, host_mac) = (address::pod(node, index), address::gateway(node), address::mac(node, index, true));
    format!(
        "link set lo up\nlink set eth0 addrgenmode none\nlink set eth0 up\n\
         addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n\
         route add {gateway4} dev eth0 scope link\n\
         route add default via {gateway4} dev eth0\nroute add default via fe80::1 dev eth0\n\
         neigh replace {gateway4} lladdr {host_mac} dev eth0 nud permanent\n\
         neigh replace fe80::1 lladdr {host_mac} dev eth0 nud permanent\n",
        v4 = own.v4,
        v6 = own.v6,
        gateway4 = gateway.v4,
    )
}

/// The fabric's end of an outside host's link.
pub fn outside_fabric_script(index: u16, host: &Path) -> String {
    format!("link add x{index} type veth peer name eth0 netns {}\nlink set x{index} master br-out up\n", host.display())
}

/// An outside host: it knows the way to every node's pods, as a router of the company would.
pub fn outside_script(index: u16, nodes: u16) -> String {
    let Pair { v4, v6 } = address::outside(index);
    let mut script = format!(
        "link set lo up\nlink set eth0 up\n\
         addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"
    );
    for node in 1..=nodes {
        let (range4, range6) = address::pod_ranges(node);
        let via = address::node_outside(node);
        script.push_str(&format!("route add {range4} via {}\nroute add {range6} via {}\n", via.v4, via.v6));
    }
    script
}

/// Runs `ip -batch` in a namespace.
pub fn ip(netns: &Path, script: &str) -> anyhow::Result<()> {
    feed(netns, "ip", &["-batch", "-"], script).map(drop)
}

/// The same for what needs to be told the family, which is an option (`-4`, `-6`) and no word of the script.
pub fn ip_of(netns: &Path, family: &str, script: &str) -> anyhow::Result<()> {
    feed(netns, "ip", &[family, "-batch", "-"], script).map(drop)
}

/// Runs `nft -f -` in a namespace: one transaction.
pub fn nft(netns: &Path, script: &str) -> anyhow::Result<()> {
    feed(netns, "nft", &["-f", "-"], script).map(drop)
}

/// Replaces the address translation of Services; clients stay bound.
pub fn services(netns: &Path, rules: &str) -> anyhow::Result<()> {
    if !kubeproxy::has_clients(rules) {
        return nft(netns, rules);
    }
    // There is no table before the first time.
    let listed = feed(netns, "nft", &["list", "table", "inet", "lab_services"], "").unwrap_or_default();
    nft(netns, &kubeproxy::with_clients(rules, &listed))
}

/// Sets kernel parameters in a namespace; names as under `/proc/sys`.
pub fn sysctl(netns: &NetNs, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    netns.run(|| {
        settings.iter().try_for_each(|(name, value)| {
            let path = format!("/proc/sys/{name}");
            std::fs::write(&path, value).with_context(|| {
                format!(
                    "{path} cannot be set; the kernel may lack IPv6, which the lab needs, or /proc/sys is read-only"
                )
            })
        })
    })?
}

/// Parameters of every namespace: IPv6 on, and no time lost on detecting duplicate addresses.
pub const SYSCTL_ALL: [(&str, &str); 3] = [
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
];

/// Parameters of nodes besides: they are routers.
pub const SYSCTL_NODE: [(&str, &str); 2] = [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")];

fn feed(netns: &Path, program: &str, arguments: &[&str], script: &str) -> anyhow::Result<String> {
    let tool = find_tool(program).with_context(|| missing_tools().unwrap_or_default())?;
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Placement { netns: Some(netns.to_path_buf()), ..Placement::default() }.apply(&mut command)?;
    let mut child = command.spawn().with_context(|| format!("{program} cannot be run in {}", netns.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // An early end of the program shows in its exit status below.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output()?;
    anyhow::ensure!(
        output.status.success(),
        "{program} in {}: {}\nscript:\n{script}",
        netns.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `PATH` for everything the lab starts: the caller's, and where administrators' tools are kept, which users' paths
/// often leave out.
pub fn search_path() -> std::ffi::OsString {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from);
    let mut all: Vec<PathBuf> = std::env::split_paths(&own).collect();
    all.extend(more.into_iter().filter(|path| !std::env::split_paths(&own).any(|have| have == *path)));
    std::env::join_paths(all).unwrap_or(own)
}

fn find_tool(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path()).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Says which needed programs this machine lacks, and how to get them.
pub fn missing_tools() -> Option<String> {
    let missing: Vec<(&str, &str)> =
        [("ip", "iproute2"), ("nft", "nftables")].into_iter().filter(|(tool, _)| find_tool(tool).is_none()).collect();
    if missing.is_empty() {
        return None;
    }
    let (tools, packages): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
    Some(format!(
        "this machine lacks {}; install with `apt-get install -y {}` (Debian, Ubuntu) or `dnf install -y {}` (Fedora)",
        tools.join(" and "),
        packages.join(" "),
        packages.join(" ")
    ))
}
