//! Names: a name server in each captured pod, on loopback, that port 53 is redirected to.
//!
//! What the mesh knows is answered from the snapshot ([`zone`]), at once and also while every name server is dead. All
//! else goes to the name server that the pod asked, from inside the pod, and comes back as it is ([`upstream`]); usual
//! questions through a bounded cache ([`cache`]). Why it is there: names lead to the addresses that the mesh knows, look-ups
//! of cluster names leave neither the node nor the pod's network, and a dead cluster DNS does not stop a namespace.
//!
//! Limits: a datagram to port 53 that is no DNS is dropped. A stream that is none, a zone transfer, and a stream to a name
//! server inside the mesh are connections like others and go the way of those.

pub mod allow;
pub mod answer;
pub mod cache;
pub mod own;
mod closed;
mod resolve;
mod serve;
pub mod upstream;
pub mod wire;
pub mod zone;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::base::conntrack::Conntrack;
use crate::dns::cache::Cache;
use crate::dns::own::OwnResolver;
use crate::flow::{LocalPod, Shared};

/// Questions of one pod that are under way. Each has three sockets at most while its name server is silent, with a buffer
/// as large as the client says: usually 1 KB, and 64 KB at the worst, which is 96 MB of one pod for five seconds.
const QUESTIONS: usize = 512;
/// Streams of one pod. Resolvers open one for an answer that was too large.
const STREAMS: usize = 64;

/// What all pods of the node share. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    /// The cluster's domain, lower case.
    pub domain: Arc<str>,
    /// Answers of name servers.
    pub cache: Cache,
    /// Asked for pods whose egress is closed.
    pub own: OwnResolver,
}

/// The name server of one pod.
pub struct PodDns {
    shared: Shared,
    node: Node,
    pod: Arc<LocalPod>,
    /// Where redirected datagrams were going.
    conntrack: Conntrack,
    /// Asked if that cannot be found out: the first name server of the pod's resolv.conf, where it is known.
    fallback: Option<SocketAddr>,
    /// Whose answers are shared: see [`cache`].
    group: Arc<str>,
    streams: Arc<AtomicUsize>,
}

impl PodDns {
    /// The name server of `pod`.
    pub fn new(
        shared: Shared,
        node: Node,
        pod: Arc<LocalPod>,
        conntrack: Conntrack,
        fallback: Option<SocketAddr>,
    ) -> Self {
        let group = format!("{}/{}", pod.namespace, pod.service_account).into();
        Self { shared, node, pod, conntrack, fallback, group, streams: Arc::default() }
    }
}

/// A unit of a budget, until dropped. `None`: it is used up.
fn take(used: &Arc<AtomicUsize>, most: usize) -> Option<Unit> {
    use std::sync::atomic::Ordering;
    let taken = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < most).then_some(now + 1));
    taken.ok().map(|_| Unit(used.clone()))
}

struct Unit(Arc<AtomicUsize>);

impl Drop for Unit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}
