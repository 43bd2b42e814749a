//! What control does in a cluster besides serving: the source, the Lease, the CA's Secret, status, NetworkPolicies, TokenReview.
//!
//! Each is a task of its own over one client. Everything that writes asks the Lease first; whose tokens are believed does
//! not depend on it, as every replica serves.

use std::path::PathBuf;
use std::sync::Arc;

use rand::RngExt as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::admin::{Others, State, View, authority};
use crate::authn::{Ask, FindPod, PodPlace, Reviews};
use crate::base::Stop;
use crate::cluster::authority::Mirror;
use crate::cluster::lease::{self, Leader};
use crate::cluster::{Client, bundle, plugged, tokens};
use crate::source;
use crate::source::statuses::Statuses;
use crate::source::{Followed, Loaded};
use crate::status;

/// Name of the Lease in the root namespace.
const LEASE: &str = "tulle-control";

/// What the tasks of a cluster need.
pub(super) struct Parts {
    pub(super) client: Client,
    /// This process.
    pub(super) identity: String,
    /// What is shown, of which much is written to the API server as well.
    pub(super) shown: State,
    /// `None`: the CA is in files alone.
    pub(super) mirror: Option<Mirror>,
    /// The Secret of another CA that it follows, and where to work on that.
    pub(super) plugged: Option<(plugged::Names, PathBuf)>,
    /// Where the roots are that are published as a ClusterTrustBundle, if they are.
    pub(super) published: Option<PathBuf>,
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
pub(super) fn start(
    parts: Parts,
    loaded: watch::Sender<Option<Arc<Loaded>>>,
    followed: watch::Sender<Arc<Vec<Followed>>>,
    stop: &Stop,
) -> Vec<JoinHandle<()>> {
    let Parts { client, identity, shown, mirror, plugged, published: roots } = parts;
    let State { view, published, node_states: nodes, settings, .. } = shown.clone();
    let root_namespace = settings.root_namespace.clone();
    let statuses = Arc::new(Statuses::default());
    let outputs = source::kube::Outputs { loaded, followed, statuses: Arc::clone(&statuses) };
    let (term, held) = watch::channel(None);
    let leader = Leader::new(held);
    let lease = lease::run(client.clone(), root_namespace.clone(), LEASE, identity.clone(), term, stop.clone());
    let acks = status::acks::say(
        client.clone(),
        root_namespace.clone(),
        identity.clone(),
        Arc::clone(&nodes),
        published.clone(),
        Box::new(move || {
            let shown = shown.clone();
            Box::pin(async move { authority::word(&shown).await })
        }),
        stop.clone(),
    );
    let inputs = status::Inputs {
        view: view.clone(),
        statuses,
        nodes,
        published,
        root_namespace,
        identity,
        leader: leader.clone(),
    };
    let mut tasks = vec![
        tokio::spawn(source::kube::run(client.clone(), outputs, stop.clone())),
        tokio::spawn(lease),
        tokio::spawn(acks),
        tokio::spawn(status::run(client.clone(), inputs, stop.clone())),
        tokio::spawn(status::beside::run(client.clone(), settings, view, leader.clone(), stop.clone())),
    ];
    if let Some(dir) = roots {
        tasks.push(tokio::spawn(bundle::publish(client.clone(), dir, leader.clone(), stop.clone())));
    }
    if let Some((names, dir)) = plugged {
        tasks.push(tokio::spawn(plugged::follow(client, names, dir, leader.clone(), stop.clone())));
    }
    tasks.extend(mirror.map(|mirror| tokio::spawn(mirror.keep(leader, stop.clone()))));
    tasks
}

/// What other replicas say of their nodes' certificates.
pub(super) fn others(client: Client, root_namespace: String, identity: String) -> Others {
    Arc::new(move || {
        let (client, namespace, identity) = (client.clone(), root_namespace.clone(), identity.clone());
        Box::pin(async move { status::acks::others(&client, &namespace, &identity).await })
    })
}

/// This process, and none that ever was: the host's name, which is the pod's, tells people where it runs.
pub(super) fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_owned());
    let random: u64 = rand::rng().random();
    format!("{}_{random:016x}", host.unwrap_or_else(|| "control".to_owned()))
}
