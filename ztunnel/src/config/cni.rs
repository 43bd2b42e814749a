//! Settings of the CNI plugin's installation, and the variables that a container runtime sets for one call of it.
//!
//! The plugin itself has no settings: runtimes give it an environment of their own, so that what it has to know stands in the
//! configuration that the installer writes.

use std::path::PathBuf;

use clap::Args;

use crate::cni::conf::Environment;
use crate::cni::install::{ApiSource, Settings};

/// Where Kubernetes gives a pod its token.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The folders of the node's network, and the way to the API server that the plugin is given.
#[derive(Clone, Debug, Args)]
pub struct Plugin {
    /// Folder of CNI plugins, as the container runtime is configured.
    #[arg(long, env = "TULLE_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Folder of CNI configurations, as the container runtime is configured.
    #[arg(long, env = "TULLE_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Address of the API server, as Kubernetes tells it to pods.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", default_value = "", hide = true)]
    pub kubernetes_service_host: String,
    /// Its port.
    #[arg(long, env = "KUBERNETES_SERVICE_PORT", default_value = "443", hide = true)]
    pub kubernetes_service_port: String,
    /// The node's own files, by which it is found out whether the plugin would run there.
    #[arg(long, env = "TULLE_NODE_ROOT", default_value = "/proc/1/root", hide = true)]
    pub node_root: PathBuf,
}

impl Plugin {
    /// Where the plugin is installed and what it is told; the rest are settings that the agent has too.
    ///
    /// # Errors
    /// If the running program cannot be found, which is what is installed.
    pub fn settings(
        &self,
        kubeconfig: Option<PathBuf>,
        state_dir: PathBuf,
        socket: PathBuf,
        root_namespace: String,
    ) -> std::io::Result<Settings> {
        let api = match kubeconfig {
            Some(file) => ApiSource::File(file),
            None if self.kubernetes_service_host.is_empty() => ApiSource::None,
            None => ApiSource::Pod {
                host: self.kubernetes_service_host.clone(),
                port: self.kubernetes_service_port.clone(),
                folder: ACCOUNT.into(),
            },
        };
        Ok(Settings {
            program: std::env::current_exe()?,
            bin_dir: self.cni_bin_dir.clone(),
            conf_dir: self.cni_conf_dir.clone(),
            state_dir,
            socket,
            root_namespace,
            api,
            node_root: self.node_root.clone(),
        })
    }
}

/// Settings of `ztunnel cni install` and `uninstall`.
#[derive(Clone, Debug, Args)]
pub struct Installation {
    #[command(flatten)]
    pub plugin: Plugin,
    /// Namespace of the node proxy's pod, the mesh's root namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "tulle-system")]
    pub pod_namespace: String,
    /// How the plugin reaches the API server while the agent is away. Absent: as a pod of the cluster does.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Folder for what the CNI plugin may read while the agent is away, and its log.
    #[arg(long, env = "TULLE_CNI_STATE_DIR", default_value = "/var/lib/tulle/cni")]
    pub cni_state_dir: PathBuf,
    /// Socket at which the agent answers the CNI plugin.
    #[arg(long, env = "TULLE_CNI_SOCKET", default_value = "/run/tulle/cni.sock")]
    pub cni_socket: PathBuf,
    /// The node's /proc, where network namespaces are looked for that have to be released.
    #[arg(long, env = "TULLE_PROC", default_value = "/proc")]
    pub proc: PathBuf,
}

impl Installation {
    /// See [`Plugin::settings`].
    ///
    /// # Errors
    /// If the running program cannot be found.
    pub fn settings(&self) -> std::io::Result<Settings> {
        let (state_dir, socket) = (self.cni_state_dir.clone(), self.cni_socket.clone());
        self.plugin.settings(self.kubeconfig.clone(), state_dir, socket, self.pod_namespace.clone())
    }
}

/// What a container runtime has set for this call.
pub fn environment() -> Environment {
    // A value that is no text is none that may stand there, and is refused like one.
    let variable = |name: &str| std::env::var_os(name).unwrap_or_default().to_string_lossy().into_owned();
    Environment {
        command: variable("CNI_COMMAND"),
        container_id: variable("CNI_CONTAINERID"),
        netns: variable("CNI_NETNS"),
        if_name: variable("CNI_IFNAME"),
        args: variable("CNI_ARGS"),
    }
}
