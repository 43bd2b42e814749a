//! What the re-check of live connections through the gateway asks: the same decision that let them out.
//!
//! The address that was dialled stays; what is asked again is whether the pod may still reach the host by this gateway.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use crate::flow::recheck;
use crate::gateway::decide::{Asked, Spoken, decide};
use crate::outcome::Outcome;
use crate::state::Snapshot;

/// What the leave of a connection depends on.
pub struct Facts {
    /// Who asked, and for what.
    pub asked: Arc<Asked>,
    /// What the client speaks, as far as it was told.
    pub spoken: RefCell<Spoken>,
}

/// The table of a worker.
pub type Live = recheck::Live<Facts>;
/// A connection's place in it.
pub type Registration = recheck::Registration<Facts>;

/// An empty table.
pub fn live() -> Rc<Live> {
    Live::new(check)
}

fn check(snapshot: &Snapshot, conn: &Facts) -> Option<Outcome> {
    decide(snapshot, &conn.asked, &conn.spoken.borrow()).err()
}
