//! Live connections of one worker, re-checked whenever the snapshot changes.
//!
//! A connection is in the table until its end, with what its decision depended on. A new snapshot is applied to all of
//! them by the function that the table was made with, which is the decision that let them pass; those that it forbids end
//! at once, with the policy's name in their record. One table for what comes in, and one for what goes out.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};

use crate::base::cut::Cut;
use crate::base::workers;
use crate::outcome::{Code, Outcome};
use crate::state::{Reader, Snapshot};

/// Connections checked in one go: some 100 µs, then others have their turn.
const BATCH: usize = 128;

/// Why a connection may not go on; `None`: it may.
pub type Check<T> = fn(&Snapshot, &T) -> Option<Outcome>;

struct Conn<T> {
    facts: T,
    cut: Cut<Outcome>,
}

/// The table. Belongs to one worker.
pub struct Live<T> {
    check: Check<T>,
    next: Cell<u64>,
    connections: RefCell<HashMap<u64, Rc<Conn<T>>>>,
}

/// A connection's place in the table, until dropped.
pub struct Registration<T> {
    id: u64,
    conn: Rc<Conn<T>>,
    table: Weak<Live<T>>,
}

impl<T> Registration<T> {
    /// What the connection is decided by.
    pub fn facts(&self) -> &T {
        &self.conn.facts
    }

    /// Completes when a snapshot forbids the connection.
    pub async fn cut(&self) -> Outcome {
        self.conn.cut.ordered().await
    }
}

impl<T> Drop for Registration<T> {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            table.connections.borrow_mut().remove(&self.id);
        }
    }
}

impl<T: 'static> Live<T> {
    /// An empty table.
    pub fn new(check: Check<T>) -> Rc<Self> {
        Rc::new(Self { check, next: Cell::default(), connections: RefCell::default() })
    }

    /// Enters a connection.
    pub fn register(self: &Rc<Self>, facts: T) -> Registration<T> {
        let id = self.next.get();
        self.next.set(id + 1);
        let conn = Rc::new(Conn { facts, cut: Cut::default() });
        self.connections.borrow_mut().insert(id, conn.clone());
        Registration { id, conn, table: Rc::downgrade(self) }
    }

    /// Enters a connection that was decided on an older snapshot, and looks whether that is still right.
    pub fn register_decided(self: &Rc<Self>, facts: T, reader: &Reader) -> Registration<T> {
        let registration = self.register(facts);
        self.look(&reader.load(), &registration.conn);
        registration
    }

    /// Starts the task that re-checks.
    pub fn watch(self: &Rc<Self>, reader: Reader) {
        let table = Rc::downgrade(self);
        workers::spawn(async move {
            let mut changes = reader.subscribe();
            while changes.changed().await.is_ok() {
                let Some(table) = table.upgrade() else { return };
                let all: Vec<Rc<Conn<T>>> = table.connections.borrow().values().cloned().collect();
                for batch in all.chunks(BATCH) {
                    // Always the newest: a change in the meantime needs no second look at the rest.
                    let snapshot = reader.load();
                    batch.iter().for_each(|conn| table.look(&snapshot, conn));
                    tokio::task::yield_now().await;
                }
            }
        });
    }

    fn look(&self, snapshot: &Snapshot, conn: &Conn<T>) {
        let Some(outcome) = (self.check)(snapshot, &conn.facts) else { return };
        // A policy that is still on its way holds new connections; it does not cut live ones.
        if outcome.code == Code::PolicyPending {
            return;
        }
        conn.cut.order(Outcome { code: Code::PolicyChanged, ..outcome });
    }
}
