//! Settings of a node in a Kubernetes cluster: where the API server is, and where files of the node are that others share. They stand apart
//! because a node without a cluster has none of them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::Switch;
use crate::config::cni::Plugin;

/// What may leave namespaces that do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EgressDefault {
    /// Everything.
    Allow,
    /// Everything, and it is written down.
    Audit,
    /// Nothing, so their pods are in the mesh.
    Deny,
}

/// See the module's header.
#[derive(Clone, Debug, Args)]
pub struct Cluster {
    /// The pods of this node come from the API server, and the CNI plugin is answered: on or off. The node's name is
    /// NODE_NAME, the root namespace POD_NAMESPACE.
    #[arg(long, env = "TULLE_CLUSTER", default_value = "off")]
    pub cluster: Switch,
    /// How to reach the API server. Absent: as a pod of the cluster does.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// What may leave namespaces without the label tulle.dev/egress; the same as control's `--egress-default`.
    #[arg(long, env = "TULLE_EGRESS_DEFAULT", default_value = "allow")]
    pub egress_default: EgressDefault,
    /// The node's /proc, where pods' processes are looked for.
    #[arg(long, env = "TULLE_PROC", default_value = "/proc")]
    pub proc: PathBuf,
    /// Folder for what lives until the node's next start.
    #[arg(long, env = "TULLE_RUN_DIR", default_value = "/run/tulle")]
    pub run_dir: PathBuf,
    /// Folder for what the CNI plugin may read while the agent is away.
    #[arg(long, env = "TULLE_CNI_STATE_DIR", default_value = "/var/lib/tulle/cni")]
    pub cni_state_dir: PathBuf,
    /// Socket at which the CNI plugin is answered.
    #[arg(long, env = "TULLE_CNI_SOCKET", default_value = "/run/tulle/cni.sock")]
    pub cni_socket: PathBuf,
    /// The CNI plugin is installed on this node, and kept installed: on or off.
    #[arg(long, env = "TULLE_CNI_INSTALL", default_value = "off")]
    pub cni_install: Switch,
    #[command(flatten)]
    pub plugin: Plugin,
    /// The probes of the node's kubelet get an address by which they are known: on or off.
    #[arg(long, env = "TULLE_PROBES", default_value = "on")]
    pub probes: Switch,
}
