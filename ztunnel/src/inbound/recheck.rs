//! Live connections of one worker, re-checked whenever the snapshot changes.
//!
//! A connection is in the table from before its first check until its end. A new snapshot is applied to all of them with
//! the same `decide` that let them in; those that it forbids end at once, with the policy's name in their record.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::sync::Notify;
use tulle_certs::SpiffeId;

use crate::base::workers;
use crate::flow::LocalPod;
use crate::inbound::decide::decide;
use crate::outcome::{Code, Outcome};
use crate::state::{Reader, Snapshot};

/// Connections checked in one go: some 100 µs, then others have their turn.
const BATCH: usize = 128;

struct Conn {
    pod: Arc<LocalPod>,
    identity: Option<SpiffeId>,
    source: IpAddr,
    target: SocketAddr,
    cut: RefCell<Option<Outcome>>,
    notify: Notify,
}

/// The table. Belongs to one worker.
#[derive(Default)]
pub struct Live {
    next: Cell<u64>,
    connections: RefCell<HashMap<u64, Rc<Conn>>>,
}

/// A connection's place in the table, until dropped.
pub struct Registration {
    id: u64,
    conn: Rc<Conn>,
    table: Weak<Live>,
}

impl Registration {
    /// Completes when a snapshot forbids the connection.
    pub async fn cut(&self) -> Outcome {
        loop {
            let notified = self.conn.notify.notified();
            if let Some(outcome) = self.conn.cut.borrow().clone() {
                return outcome;
            }
            notified.await;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            table.connections.borrow_mut().remove(&self.id);
        }
    }
}

impl Live {
    /// Enters a connection.
    pub(super) fn register(
        self: &Rc<Self>,
        pod: &Arc<LocalPod>,
        identity: Option<SpiffeId>,
        source: IpAddr,
        target: SocketAddr,
    ) -> Registration {
        let id = self.next.get();
        self.next.set(id + 1);
        let conn = Rc::new(Conn {
            pod: pod.clone(),
            identity,
            source,
            target,
            cut: RefCell::default(),
            notify: Notify::new(),
        });
        self.connections.borrow_mut().insert(id, conn.clone());
        Registration { id, conn, table: Rc::downgrade(self) }
    }

    /// Starts the task that re-checks.
    pub fn watch(self: &Rc<Self>, reader: Reader) {
        let table = Rc::downgrade(self);
        workers::spawn(async move {
            let mut changes = reader.subscribe();
            while changes.changed().await.is_ok() {
                let Some(table) = table.upgrade() else { return };
                let all: Vec<Rc<Conn>> = table.connections.borrow().values().cloned().collect();
                for batch in all.chunks(BATCH) {
                    // Always the newest: a change in the meantime needs no second look at the rest.
                    let snapshot = reader.load();
                    batch.iter().for_each(|conn| check(&snapshot, conn));
                    tokio::task::yield_now().await;
                }
            }
        });
    }
}

fn check(snapshot: &Snapshot, conn: &Conn) {
    // A pod that control no longer describes is on its way out; its connections end with it.
    let Some(workload) = conn.pod.workload(snapshot) else { return };
    let Err(outcome) = decide(snapshot, workload, conn.identity.as_ref(), conn.source, conn.target) else { return };
    // A policy that is still on its way holds new connections; it does not cut live ones.
    if outcome.code == Code::PolicyPending {
        return;
    }
    let changed = Outcome { code: Code::PolicyChanged, ..outcome };
    *conn.cut.borrow_mut() = Some(changed);
    conn.notify.notify_waiters();
}
