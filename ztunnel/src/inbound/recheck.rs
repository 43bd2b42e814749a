//! What the re-check of live inbound connections asks: the same [`decide`] that let them in.
//!
//! A connection is in the table from before its first check, so a policy that arrives in between cannot miss it.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::flow::LocalPod;
use crate::flow::recheck;
use crate::inbound::decide::decide;
use crate::outcome::Outcome;
use crate::state::{Lease, Snapshot};

/// What the admission of a connection depends on.
pub struct Admitted {
    /// The pod that it enters.
    pub pod: Arc<LocalPod>,
    /// Identity proven in TLS.
    pub identity: Option<SpiffeId>,
    /// The client's address.
    pub source: IpAddr,
    /// The application's address.
    pub target: SocketAddr,
    /// Keeps the client's workload known, where not everything is.
    pub lease: Option<Lease>,
}

/// The table of a worker.
pub type Live = recheck::Live<Admitted>;
/// A connection's place in it.
pub type Registration = recheck::Registration<Admitted>;

/// An empty table.
pub fn live() -> Rc<Live> {
    Live::new(check)
}

fn check(snapshot: &Snapshot, conn: &Admitted) -> Option<Outcome> {
    // A pod that control no longer describes is on its way out; its connections end with it.
    let workload = conn.pod.workload(snapshot)?;
    decide(snapshot, workload, conn.identity.as_ref(), conn.source, conn.target).err()
}
