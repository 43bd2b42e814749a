//! Whether a pod may ask a name server at all. A place of its own, because rules about what may leave a pod are somebody
//! else's to make and this is the one question that names put to them.

use std::net::SocketAddr;

use crate::flow::LocalPod;
use crate::outcome::Outcome;
use crate::state::Snapshot;

/// Asked once for every question, before anything is answered, also from the mesh's own knowledge or the cache: a pod
/// whose egress rules forbid its name server (UDP and TCP 53 at `upstream`) must not learn through us what that server
/// would have said. The outcome's text goes to the client as an Extended DNS Error, and the answer is REFUSED.
///
/// Egress rules of NetworkPolicy belong here. Until a snapshot has them, every pod may ask; `tulle.dev/egress: deny`
/// lets names be looked up on purpose (docs/defaults.md).
///
/// # Errors
/// The rule that forbids it.
pub fn may_ask(_snapshot: &Snapshot, _pod: &LocalPod, _upstream: SocketAddr) -> Result<(), Outcome> {
    Ok(())
}
