//! What each machine of a cluster becomes, and what must be written before: certificates and images.
//!
//! The order of a machine's steps is the order of their needs; a program that another one waits for is followed by a
//! command that succeeds once it answers. Limits: paths of containerd, runc and the CNI plugins are those of Debian's
//! packages.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;

use crate::cluster::config;
use crate::cluster::image::Image;
use crate::cluster::layout;
use crate::cluster::layout::Folder;
use crate::cluster::machine::Spec;
use crate::cluster::machine::Step;
use crate::kube::pki::Pki;
use crate::lab::programs_dir;
use crate::topology;

/// Where Debian's package puts the CNI plugins.
pub const CNI_PROGRAMS: &str = "/usr/lib/cni";
/// The plugins that the nodes' network uses.
const PLUGINS: [&str; 4] = ["ptp", "host-local", "loopback", "portmap"];
/// Registry that the mesh's images are said to come from; nobody asks it.
pub const REGISTRY: &str = "lab.local";
/// The mesh's own programs, as the chart names them; the second tag is the same, to have something to upgrade to.
const TULLE: [&str; 4] = [
    "lab.local/tulle/control:1",
    "lab.local/tulle/control:2",
    "lab.local/tulle/ztunnel:1",
    "lab.local/tulle/ztunnel:2",
];
/// Image of the shop.
pub const SHOP: &str = "lab.local/shop:1";
/// Seconds for a program to answer, on a slow and busy machine.
const ANSWERS: u64 = 120;

/// Certificates, keys and kubeconfigs.
pub fn secrets(folder: &Folder, nodes: u16) -> anyhow::Result<()> {
    fs::create_dir_all(folder.pki())?;
    let pki = Pki::create(&folder.pki())?;
    let write = |name: &str| fs::write(folder.kubeconfig(name), config::kubeconfig(folder, name));
    for (name, user, groups) in [
        ("admin", "admin", &["system:masters"][..]),
        ("to-kubelet", "apiserver-kubelet", &["system:masters"]),
        ("controllers", "system:kube-controller-manager", &[]),
        ("scheduler", "system:kube-scheduler", &[]),
        ("kube-proxy", "system:kube-proxy", &[]),
    ] {
        pki.user(name, user, groups)?;
        write(name)?;
    }
    for node in 1..=nodes {
        pki.node(&layout::node_name(node), layout::node_address(node).into())?;
        write(&layout::node_name(node))?;
    }
    Ok(())
}

/// The archives that nodes import.
pub fn images(folder: &Folder, sabotaged: bool) -> anyhow::Result<()> {
    let programs = programs_dir()?;
    let busybox = tool("busybox")?;
    let small = || -> anyhow::Result<Image> {
        let image = Image::default().program(&busybox, "/bin/busybox")?;
        let image = image.text("/etc/passwd", "root:x:0:0::/:/bin/sh\n").text("/etc/group", "root:x:0:\n");
        let names = ["sh", "sleep", "cat", "cp", "ls", "rm", "mkdir", "mv", "true", "test", "hostname", "wget", "env"];
        Ok(names.iter().fold(image, |image, name| image.link(&format!("/bin/{name}"), "/bin/busybox")))
    };
    small()?.write(&folder.images().join("pause.tar"), &[config::PAUSE], &["/bin/sleep", "2147483647"])?;
    let shop = small()?.program(&programs.join("lab"), "/usr/local/bin/shop")?;
    shop.write(&folder.images().join("shop.tar"), &[SHOP], &["/usr/local/bin/shop"])?;
    let mut tulle = small()?;
    for program in ["ztunnel", "control", "tulle"] {
        let file = if sabotaged && program == "ztunnel" { "ztunnel-sabotage" } else { program };
        tulle = tulle.program(&programs.join(file), &format!("/usr/local/bin/{program}"))?;
    }
    for program in ["nft", "ip"] {
        tulle = tulle.program(&tool(program)?, &format!("/usr/sbin/{program}"))?;
    }
    tulle.write(&folder.images().join("tulle.tar"), &TULLE, &["/usr/local/bin/ztunnel"])
}

fn tool(name: &str) -> anyhow::Result<PathBuf> {
    let path = topology::search_path();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("this machine lacks {name}"))
}

/// The machine of the API server.
pub fn control(folder: &Folder, programs: &Path, nodes: u16) -> anyhow::Result<Spec> {
    let own = folder.machine(layout::CONTROL);
    let kubectl = programs.join("kubectl").display().to_string();
    let admin = folder.kubeconfig("admin").display().to_string();
    let lab = programs_dir()?.join("lab").display().to_string();
    let address = layout::CONTROL_ADDRESS.to_string();
    let steps = vec![
        Step::start("etcd", config::etcd(&tool("etcd")?, &own.disk("/etcd"))),
        Step::start("kube-apiserver", config::api_server(&programs.join("kube-apiserver"), folder)),
        Step::run(&[&kubectl, "--kubeconfig", &admin, "get", "--raw", "/readyz"], ANSWERS),
        Step::start("kube-controller-manager", config::controllers(&programs.join("kube-controller-manager"), folder)),
        Step::start("kube-scheduler", config::scheduler(&programs.join("kube-scheduler"), folder)),
        Step::start(
            "dns",
            [&lab, "cluster", "dns", "--kubeconfig", &admin, "--listen", &address].map(str::to_owned).to_vec(),
        ),
    ];
    Ok(Spec {
        name: layout::CONTROL.to_owned(),
        files: BTreeMap::new(),
        network: layout::control_network(nodes),
        linked: false,
        cgroup: String::new(),
        steps,
    })
}

/// The machine outside: two hosts that answer and say who they were asked by.
pub fn outside(nodes: u16) -> anyhow::Result<Spec> {
    let lab = programs_dir()?.join("lab");
    // The program is told by its name what it is.
    let shop = format!("exec -a shop {} serve --name outside --http 80 --tcp 9000", lab.display());
    let steps = vec![Step::start("shop", ["bash", "-c", &shop].map(str::to_owned).to_vec())];
    Ok(Spec {
        name: layout::OUTSIDE.to_owned(),
        files: BTreeMap::new(),
        network: layout::outside_network(nodes),
        linked: true,
        cgroup: String::new(),
        steps,
    })
}

/// Name of the cgroup of a node; of a cluster elsewhere it is another one.
pub fn cgroup(folder: &Folder, name: &str) -> String {
    use sha2::Digest;
    let place = folder.0.display().to_string();
    let mark: String = sha2::Sha256::digest(place.as_bytes()).iter().take(3).map(|it| format!("{it:02x}")).collect();
    if name.starts_with("node-") { format!("tulle-{mark}-{name}") } else { String::new() }
}

/// A node.
pub fn node(folder: &Folder, programs: &Path, node: u16, nodes: u16) -> anyhow::Result<Spec> {
    let name = layout::node_name(node);
    let cgroup = cgroup(folder, &name);
    let plugins = folder.machine(&name).disk("/opt/cni/bin");
    fs::create_dir_all(&plugins)?;
    for plugin in PLUGINS {
        fs::copy(Path::new(CNI_PROGRAMS).join(plugin), plugins.join(plugin)).with_context(|| plugin.to_owned())?;
    }
    // A file that others may add to: it belongs to the disk and is not written again at a reboot.
    let network = folder.machine(&name).disk("/etc/cni/net.d/10-lab.conflist");
    fs::create_dir_all(network.parent().context("a folder")?)?;
    fs::write(&network, serde_json::to_string_pretty(&config::cni(node))?)?;
    let files = BTreeMap::from([
        (PathBuf::from("/etc/containerd/config.toml"), config::containerd()),
        (PathBuf::from("/run/kubelet.json"), config::kubelet_config(folder, node, &cgroup).to_string()),
    ]);
    let containerd = ["containerd", "--config", "/etc/containerd/config.toml"].map(str::to_owned).to_vec();
    let mut steps = vec![Step::start("containerd", containerd), Step::run(&["ctr", "version"], ANSWERS)];
    for image in ["pause", "shop", "tulle"] {
        let archive = folder.images().join(format!("{image}.tar")).display().to_string();
        steps.push(Step::run(&["ctr", "--namespace", "k8s.io", "images", "import", &archive], 0));
    }
    steps.extend([
        Step::start("kube-proxy", config::kube_proxy(&programs.join("kube-proxy"), folder, &name)),
        Step::start("kubelet", config::kubelet(&programs.join("kubelet"), folder, node)),
    ]);
    let network = layout::node_network(node, nodes);
    Ok(Spec { name, files, network, linked: true, cgroup, steps })
}
