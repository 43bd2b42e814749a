//! What control does in a cluster besides serving: the Lease, the CA's Secret, status, NetworkPolicies, TokenReview.
//!
//! Each is a task of its own over one client. Everything that writes asks the Lease first; whose tokens are believed does
//! not depend on it, as every replica serves.

use std::path::Path;
use std::sync::Arc;

use rand::RngExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::admin::View;
use crate::authn::{Ask, FindPod, PodPlace, Reviews};
use crate::base::Stop;
use crate::cluster::authority::Mirror;
use crate::cluster::lease::{self, Leader};
use crate::cluster::{Client, tokens};
use crate::source::statuses::Statuses;
use crate::status;
use crate::translate::Settings;
use crate::xds::server::Nodes;

/// Name of the Lease in the root namespace.
const LEASE: &str = "tulle-control";

/// What the tasks of a cluster need.
pub(super) struct Parts {
    pub(super) client: Client,
    pub(super) settings: Settings,
    pub(super) view: watch::Receiver<Arc<View>>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) statuses: Arc<Statuses>,
    pub(super) mirror: Mirror,
}

/// Makes `--ca-dir` a copy of the Secret, and the Secret if there is none.
pub(super) async fn mirror(client: &Client, root_namespace: &str, ca_dir: &Path) -> Mirror {
    Mirror::open(client.clone(), root_namespace, ca_dir).await
}

/// Knows callers by what the API server says.
pub(super) fn reviews(client: &Client, audience: String, view: watch::Receiver<Arc<View>>) -> Arc<Reviews> {
    let (client, asked) = (client.clone(), audience.clone());
    let ask: Ask = Box::new(move |token| {
        let (client, audience) = (client.clone(), asked.clone());
        Box::pin(async move { tokens::review(&client, token, &audience).await })
    });
    let pods: FindPod = Box::new(move |namespace, name| {
        let view = view.borrow();
        let pod = view.world().pods.get(&(namespace.to_owned(), name.to_owned()))?;
        Some(PodPlace { uid: pod.meta.uid.clone(), node: pod.node.clone() })
    });
    Reviews::new(audience, ask, pods)
}

/// Starts the tasks.
pub(super) fn start(parts: Parts, stop: &Stop) -> Vec<JoinHandle<()>> {
    let Parts { client, settings, view, nodes, statuses, mirror } = parts;
    let (term, held) = watch::channel(None);
    let leader = Leader::new(held);
    let lease = lease::run(client.clone(), settings.root_namespace.clone(), LEASE, identity(), term, stop.clone());
    let inputs = status::Inputs { view: view.clone(), statuses, nodes, leader: leader.clone() };
    vec![
        tokio::spawn(lease),
        tokio::spawn(mirror.keep(leader.clone(), stop.clone())),
        tokio::spawn(status::run(client.clone(), inputs, stop.clone())),
        tokio::spawn(status::beside::run(client, settings, view, leader, stop.clone())),
    ]
}

/// This process, and none that ever was: the host's name, which is the pod's, tells people where it runs.
fn identity() -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let random: u64 = rand::rng().random();
    format!("{}_{random:016x}", host.unwrap_or_else(|| "control".to_owned()))
}
