//! Whether a pod may ask a name server at all. A place of its own, because rules about what may leave a pod are somebody
//! else's to make and this is the one question that names put to them.

use std::net::SocketAddr;

use crate::outcome::Outcome;
use crate::policy::network;
use crate::state::{Snapshot, Transport, Workload};

/// Asked once for every question, before anything is answered, also from the mesh's own knowledge or the cache: a pod
/// whose egress rules forbid its name server (UDP and TCP 53 at `upstream`) must not learn through us what that server
/// would have said. The outcome's text goes to the client as an Extended DNS Error, and the answer is REFUSED.
///
/// A pod whose NetworkPolicies let it reach the server by UDP or by TCP may ask it by either: what it learns is the same.
/// `tulle.dev/egress: deny` lets names be looked up on purpose (docs/defaults.md).
///
/// # Errors
/// The rule that forbids it.
pub fn may_ask(snapshot: &Snapshot, pod: &Workload, upstream: SocketAddr) -> Result<(), Outcome> {
    let by = |transport| network::egress(snapshot, pod, transport, upstream).outcome();
    by(Transport::Udp).or_else(|refused| by(Transport::Tcp).map_err(|_| refused))
}
