//! What the re-check of live outbound connections asks: whether the pod's NetworkPolicies still let it reach the endpoint.
//!
//! The endpoint that was chosen stays; what is asked again is only whether it is allowed.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use crate::flow::LocalPod;
use crate::flow::recheck;
use crate::outcome::Outcome;
use crate::policy::network;
use crate::state::{Lease, Snapshot, Transport};

/// What the leave of a connection depends on.
pub struct Left {
    /// The pod that it comes from.
    pub pod: Arc<LocalPod>,
    /// The endpoint.
    pub target: SocketAddr,
    /// What was asked for to decide, and is asked again.
    pub leases: Vec<Lease>,
}

/// The table of a worker.
pub type Live = recheck::Live<Left>;
/// A connection's place in it.
pub type Registration = recheck::Registration<Left>;

/// An empty table.
pub fn live() -> Rc<Live> {
    Live::new(check)
}

fn check(snapshot: &Snapshot, conn: &Left) -> Option<Outcome> {
    let workload = conn.pod.workload(snapshot)?;
    network::egress(snapshot, workload, Transport::Tcp, conn.target).outcome().err()
}
