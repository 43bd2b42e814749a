//! The node in a Kubernetes cluster: which pods run here, which of them are in the mesh, where their network is, and what
//! the API is told of it.
//!
//! Pieces, each for itself: [`watch`] keeps a [`view::View`] of this node's pods and of all namespaces, which decides by
//! `cni::enrolment` who is in the mesh; [`plan`] says what follows (pure), [`find`] looks for network namespaces, [`publish`] writes what is so, [`serve`] answers the CNI
//! plugin, [`saved`] remembers across restarts. They are put together in `app::cluster`, which hands the same list of pods
//! on as `TULLE_PODS` does. Only this module speaks to the API server.
//!
//! The API is never needed for what runs: while it is away, the last view holds.

pub mod cgroup;
pub mod find;
pub mod plan;
pub mod pod;
pub mod publish;
pub mod saved;
pub mod serve;
pub mod view;
pub mod watch;

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig};

pub use kube::Client;

use crate::outcome::chain;

/// How long one question to the API server may take, connecting included: within what a CNI plugin waits.
pub const QUESTION: Duration = Duration::from_secs(5);
/// How long connecting may take. A server that is gone is tried again soon, and what runs does not wait for it.
const CONNECT: Duration = Duration::from_secs(4);

/// How long the server may send nothing while something is expected of it: one that is stopped says not even that it is.
const SILENCE: Duration = Duration::from_secs(100);

/// A client of the API server: by `kubeconfig` (also `KUBECONFIG`), else as a pod of the cluster.
///
/// # Errors
/// That neither can be used, and why. Whether the server answers shows later.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("KUBECONFIG {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("KUBECONFIG {}", path.display()))?
        }
        None => kube::Config::incluster().context(
            "TULLE_CLUSTER is on, but this is no pod of a cluster; set KUBECONFIG, or run it as the DaemonSet ztunnel",
        )?,
    };
    config.connect_timeout = Some(CONNECT);
    // A watch is silent for a minute at most, between bookmarks.
    config.read_timeout = Some(SILENCE);
    // Waiting is ours: each question has its own time, and watches have theirs.
    config.default_retry = false;
    let agent = http::HeaderValue::from_static(concat!("tulle-ztunnel/", env!("CARGO_PKG_VERSION")));
    config.headers.push((http::header::USER_AGENT, agent));
    Client::try_from(config).context("no client of the API server")
}

/// What an error of the API server says, in one line, with what to do about it where that is known.
pub(crate) fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{}; the ServiceAccount of ztunnel lacks an RBAC rule", status.message)
        }
        kube::Error::Api(status) => status.message.clone(),
        // The sources say more than the outer error does.
        other => chain(other),
    }
}
