//! Stopping in two steps: first nothing new, then nothing at all.
//!
//! One value, watched by every task that has to end. A child that is dropped says nothing; a parent that is dropped
//! counts as forced, so that no task can outlive its owner.

use tokio::sync::watch;

/// How far stopping has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Business as usual.
    Running,
    /// Accept nothing new, finish what runs.
    Draining,
    /// End now.
    Forced,
}

/// The side that decides.
#[derive(Debug)]
pub struct Drain(watch::Sender<Phase>);

/// The side that obeys.
#[derive(Clone, Debug)]
pub struct Drained(watch::Receiver<Phase>);

/// A running pair.
pub fn drain() -> (Drain, Drained) {
    let (tx, rx) = watch::channel(Phase::Running);
    (Drain(tx), Drained(rx))
}

impl Drain {
    /// Moves to `phase`; going back is ignored.
    pub fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|current| {
            let forward = phase > *current;
            if forward {
                *current = phase;
            }
            forward
        });
    }

    /// Another obeying side.
    pub fn watch(&self) -> Drained {
        Drained(self.0.subscribe())
    }
}

impl Drained {
    /// Completes when `phase` is reached or the deciding side is gone.
    pub async fn reached(&self, phase: Phase) {
        let mut watch = self.0.clone();
        // An error means that the owner is gone: then everything has to end.
        let _ = watch.wait_for(|current| *current >= phase).await;
    }

    /// Completes when nothing new may begin.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Completes when everything has to end.
    pub async fn forced(&self) {
        self.reached(Phase::Forced).await;
    }

    /// Whether nothing new may begin.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining || self.0.has_changed().is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::{Phase, drain};

    #[tokio::test]
    async fn a_lost_owner_counts_as_forced() {
        let (owner, obeyer) = drain();
        assert!(!obeyer.is_draining());
        drop(owner);
        obeyer.forced().await;
        assert!(obeyer.is_draining());
    }

    #[tokio::test]
    async fn phases_never_go_back() {
        let (owner, obeyer) = drain();
        owner.advance(Phase::Forced);
        owner.advance(Phase::Draining);
        obeyer.forced().await;
    }
}
