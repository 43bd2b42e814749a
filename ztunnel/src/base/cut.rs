//! An order to end, given once to something that somebody else on the same thread waits for.

use std::cell::RefCell;

use tokio::sync::Notify;

/// The order and its reason. Not for other threads.
#[derive(Debug)]
pub struct Cut<T> {
    reason: RefCell<Option<T>>,
    notify: Notify,
}

impl<T> Default for Cut<T> {
    fn default() -> Self {
        Self { reason: RefCell::default(), notify: Notify::new() }
    }
}

impl<T: Clone> Cut<T> {
    /// Gives the order. A later reason replaces an earlier one that nobody has seen.
    pub fn order(&self, reason: T) {
        *self.reason.borrow_mut() = Some(reason);
        self.notify.notify_waiters();
    }

    /// Completes with the reason once the order is given.
    pub async fn ordered(&self) -> T {
        loop {
            let notified = self.notify.notified();
            if let Some(reason) = self.reason.borrow().clone() {
                return reason;
            }
            notified.await;
        }
    }
}
