//! Where everything of the cluster is: addresses, names, and the folders of a machine.
//!
//! Pure, so that the parts that write configurations and those that run programs agree without asking each other. The
//! addresses are the lab's, and no link leads out. Limits: IPv4 only; nine nodes.

use std::net::Ipv4Addr;
use std::path::Path;
use std::path::PathBuf;

use crate::address;

/// Most nodes: each takes some hundred MiB.
pub const NODES_MAX: u16 = 9;
/// The machine of etcd, the API server, its controllers and the cluster's name server.
pub const CONTROL: &str = "control-plane";
/// A machine beyond the cluster's border.
pub const OUTSIDE: &str = "outside";
/// Service `kube-dns`.
pub const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Fabric address of the control plane.
pub const CONTROL_ADDRESS: Ipv4Addr = address::CONTROL.v4;
/// Fabric address of the outside machine, which is a router to what is behind it.
pub const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 10, 0, 3);
/// What is outside.
pub const OUTSIDE_RANGE: &str = "203.0.113.0/24";
/// Names of two hosts outside.
pub const HOSTS: [&str; 2] = ["partner.example", "elsewhere.example"];
/// Port of the API server.
pub const API_PORT: u16 = 6443;

/// Name of node `node`, from 1.
pub fn node_name(node: u16) -> String {
    format!("node-{node}")
}

/// Fabric address of node `node`.
pub fn node_address(node: u16) -> Ipv4Addr {
    address::node(node).v4
}

/// Pod addresses of node `node`.
pub fn pod_range(node: u16) -> String {
    address::pod_ranges(node).0
}

/// Address of host `index` outside.
pub fn host_address(index: u16) -> Ipv4Addr {
    address::outside(index).v4
}

/// The folders of a cluster.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// Certificates and keys.
    pub fn pki(&self) -> PathBuf {
        self.0.join("pki")
    }

    /// A certificate, a key or a token.
    pub fn secret(&self, name: &str) -> PathBuf {
        self.pki().join(name)
    }

    /// How `user` reaches the API server.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.0.join(format!("{user}.kubeconfig"))
    }

    /// Archives of images.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// A machine.
    pub fn machine(&self, name: &str) -> Machine {
        Machine(self.0.join(name))
    }
}

/// The folders of one machine; what is in them outlives its reboots.
#[derive(Clone, Debug)]
pub struct Machine(pub PathBuf);

impl Machine {
    /// What it is to become.
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec.json")
    }

    /// Process id of the process that keeps it.
    pub fn keeper(&self) -> PathBuf {
        self.0.join("keeper.pid")
    }

    /// Process id of its first process, as this machine's kernel numbers it.
    pub fn init(&self) -> PathBuf {
        self.0.join("init.pid")
    }

    /// Written when its programs run: `ok`, or what went wrong.
    pub fn booted(&self) -> PathBuf {
        self.0.join("booted")
    }

    /// Logs of its programs.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// What stands in for `path` on this machine.
    pub fn disk(&self, path: &str) -> PathBuf {
        self.0.join("disk").join(Path::new(path).strip_prefix("/").unwrap_or_else(|_| Path::new(path)))
    }
}

/// `ip -batch` of the control plane: the switch that all hang on.
pub fn control_network(nodes: u16) -> String {
    let mut text = format!(
        "link set lo up\nlink add br0 type bridge mcast_snooping 0\naddr add {CONTROL_ADDRESS}/24 dev br0\n\
         link set br0 up\nroute add {OUTSIDE_RANGE} via {OUTSIDE_ADDRESS}\n"
    );
    text.push_str(&pod_routes(nodes, None));
    text
}

/// `ip -batch` of a node. Everything that is not the cluster goes to the control plane, where it ends, but what is
/// outside.
pub fn node_network(node: u16, nodes: u16) -> String {
    let own = node_address(node);
    format!(
        "link set lo up\nlink set eth0 up\naddr add {own}/24 dev eth0\nroute add default via {CONTROL_ADDRESS}\n\
         route add {OUTSIDE_RANGE} via {OUTSIDE_ADDRESS}\n{}",
        pod_routes(nodes, Some(node))
    )
}

/// `ip -batch` of the outside: it knows the way back, so that nobody's address is rewritten.
pub fn outside_network(nodes: u16) -> String {
    format!(
        "link set lo up\nlink set eth0 up\naddr add {OUTSIDE_ADDRESS}/24 dev eth0\naddr add {}/32 dev lo\n\
         addr add {}/32 dev lo\n{}",
        host_address(0),
        host_address(1),
        pod_routes(nodes, None)
    )
}

fn pod_routes(nodes: u16, but: Option<u16>) -> String {
    let all = (1..=nodes).filter(|node| Some(*node) != but);
    all.map(|node| format!("route add {} via {}\n", pod_range(node), node_address(node))).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::cluster::layout;

    #[test]
    fn a_node_has_no_route_to_its_own_pods_but_one_to_those_of_every_other() {
        let text = layout::node_network(2, 3);
        assert!(!text.contains("10.20.2.0/24"), "{text}");
        assert!(text.contains("10.20.1.0/24 via 10.10.0.11") && text.contains("10.20.3.0/24 via 10.10.0.13"));
    }

    #[test]
    fn what_stands_in_for_a_path_stays_below_the_machine() {
        let machine = layout::Folder("/x".into()).machine("node-1");
        assert_eq!(machine.disk("/var/lib/cni"), Path::new("/x/node-1/disk/var/lib/cni"));
    }
}
