//! The lab's state directory: where things are, what the supervisor was told, and what it shows to others.
//!
//! `lab.json` is rewritten by rename after every step, so a reader sees one whole view. Limits: the directory holds
//! keys of the lab's own authority and is made for its owner only.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use serde::Deserialize;
use serde::Serialize;

/// What the supervisor is told, in `config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// Manifests to run and to watch; none = start empty.
    pub dir: Option<PathBuf>,
    /// Number of nodes.
    pub nodes: u16,
    /// Where `control`, `ztunnel` and `tulle` are.
    pub bin_dir: PathBuf,
    /// Seconds for one change to take effect.
    pub timeout_s: f64,
    /// False: no control and no ztunnel, so that nothing is ever captured.
    pub mesh: bool,
    /// Variables by component: `control`, `ztunnel` (all nodes), `node-1`, …
    #[serde(default)]
    pub env: BTreeMap<String, BTreeMap<String, String>>,
    /// Further arguments by component.
    #[serde(default)]
    pub args: BTreeMap<String, Vec<String>>,
    /// Programs in place of the usual ones, by component.
    #[serde(default)]
    pub programs: BTreeMap<String, PathBuf>,
    /// Nodes (`node-1`, …) whose proxy is handed its pods by an agent, as Istio's is, instead of reading them in a file.
    #[serde(default)]
    pub handed: BTreeSet<String>,
    /// The API server in which objects live; none = in files.
    #[serde(default)]
    pub api: Option<Api>,
    /// End when standard input ends: a test's lab must not outlive it.
    pub tied: bool,
}

/// An API server that stands beside control, and who comes to it with which kubeconfig.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Api {
    /// Where it listens, outside of the lab.
    pub server: SocketAddr,
    /// Of the lab itself, which plays scheduler, kubelet and controllers.
    pub kubeconfig: PathBuf,
    /// Of control, as seen inside the lab.
    pub control: PathBuf,
    /// Of the nodes' agents, as seen inside the lab; none = proxies read their pods in a file.
    pub agent: Option<PathBuf>,
}

/// Paths below the state directory.
#[derive(Clone, Debug)]
pub struct Paths(pub PathBuf);

impl Paths {
    /// The default place: `/run/tulle-lab`, or the user's runtime directory.
    pub fn default_dir() -> PathBuf {
        if nix::unistd::geteuid().is_root() {
            return PathBuf::from("/run/tulle-lab");
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) => PathBuf::from(dir).join("tulle-lab"),
            None => std::env::temp_dir().join(format!("tulle-lab-{}", nix::unistd::geteuid())),
        }
    }

    /// Completed objects, control's source.
    pub fn objects(&self) -> PathBuf {
        self.0.join("objects")
    }
    /// Links to network namespaces.
    pub fn netns(&self) -> PathBuf {
        self.0.join("netns")
    }
    /// One file a component.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }
    /// Control's authority.
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }
    /// Programs on every pod's path.
    pub fn bin(&self) -> PathBuf {
        self.0.join("bin")
    }
    /// What a pod sees in `/etc`.
    pub fn etc(&self, namespace: &str, pod: &str) -> PathBuf {
        self.0.join("etc").join(format!("{namespace}_{pod}"))
    }
    /// The pods of a node, for ztunnel.
    pub fn pods_file(&self, node: u16) -> PathBuf {
        self.0.join(format!("pods-node-{node}.yaml"))
    }
    /// What the agent of a node takes for `/proc`.
    pub fn proc(&self, node: u16) -> PathBuf {
        self.0.join(format!("proc-node-{node}"))
    }
    /// What the agent of a node keeps.
    pub fn agent_state(&self, node: u16) -> PathBuf {
        self.0.join(format!("agent-state-node-{node}"))
    }
    /// The socket on which a node's proxy is handed its pods.
    pub fn agent_socket(&self, node: u16) -> PathBuf {
        self.0.join(format!("agent-node-{node}.sock"))
    }
    /// The socket on which a node's proxy hands its listeners to the next one.
    pub fn handover_socket(&self, node: u16) -> PathBuf {
        self.0.join(format!("handover-node-{node}.sock"))
    }
    /// The token of a node.
    pub fn token(&self, node: u16) -> PathBuf {
        self.0.join(format!("token-node-{node}"))
    }
    /// The supervisor's socket.
    pub fn socket(&self) -> PathBuf {
        self.0.join("lab.sock")
    }
    /// Held by the supervisor.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
    /// The view for others.
    pub fn view(&self) -> PathBuf {
        self.0.join("lab.json")
    }
    /// What the supervisor was told.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }
    /// Log of a component.
    pub fn log(&self, component: &str) -> PathBuf {
        self.logs().join(format!("{component}.log"))
    }
}

/// What `lab.json` shows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct View {
    /// The supervisor.
    pub pid: u32,
    /// Whether it runs in a user namespace of its own.
    pub rootless: bool,
    /// Whether control and ztunnel run.
    pub mesh: bool,
    /// Namespace with the bridges; its `node-<n>` interfaces carry everything between nodes.
    pub fabric: PathBuf,
    /// Control.
    pub control: ComponentView,
    /// Nodes, in order.
    pub nodes: Vec<ComponentView>,
    /// Pods and outside hosts.
    pub pods: Vec<PodView>,
    /// Services with their addresses.
    pub services: Vec<ServiceView>,
    /// What is not as it should be, as of the last change.
    pub missing: Vec<String>,
    /// What the lab does not play, and files that cannot be read.
    pub warnings: Vec<String>,
}

/// Control or a node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ComponentView {
    /// `control`, `node-1`, …
    pub name: String,
    /// Link to its network namespace.
    pub netns: PathBuf,
    /// Addresses on the fabric.
    pub addresses: Vec<String>,
    /// Process, when it runs.
    pub pid: Option<u32>,
    /// Exit code or `-signal` of the last process that ended.
    pub exited: Option<i32>,
    /// Its log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PodView {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// None: a host outside.
    pub node: Option<String>,
    /// Link to its network namespace.
    pub netns: PathBuf,
    /// IPv4 and IPv6.
    pub addresses: Vec<String>,
    /// Directory seen as `/etc/resolv.conf` and `/etc/hosts`.
    pub etc: PathBuf,
    /// Service account.
    pub service_account: String,
    /// Whether labels enrol it.
    pub enrolled: bool,
    /// `Uncaptured`, `Pending`, `Captured` or `Failed`, as the node says.
    pub capture: String,
    /// Its processes run and its ports listen.
    pub ready: bool,
    /// Its processes by container.
    pub pids: BTreeMap<String, u32>,
    /// Its logs.
    pub logs: Vec<PathBuf>,
}

/// A Service.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ServiceView {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Empty: headless.
    pub addresses: Vec<String>,
}

impl View {
    /// Reads `lab.json`.
    pub fn read(paths: &Paths) -> anyhow::Result<Self> {
        let path = paths.view();
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("no lab at {}; start one with `lab up <dir>`, or name its --state", paths.0.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// A pod by name, or the first pod of a Deployment.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<&PodView> {
        let mut own = self.pods.iter().filter(|pod| pod.namespace == namespace);
        own.clone().find(|pod| pod.name == name).or_else(|| own.find(|pod| pod.name == format!("{name}-0")))
    }
}

/// Replaces a file in one step, so that nobody reads half of it.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    // A dot file, which readers of directories skip.
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let beside = path.with_file_name(hidden);
    std::fs::write(&beside, text)?;
    std::fs::rename(&beside, path)
}
