//! A bound on buffered bytes, shared by everything that buffers for one owner, and back-pressure when it is reached.
//!
//! Two kinds of buffers count. Bytes on their way out are memory that we allocated: each buffer holds its place in the
//! [`Budget`] until it is dropped, wherever that happens, so no path can forget to give it back. Bytes on their way in
//! are credit that a peer was given and may use at any time: `window` draws it before it is advertised.
//! Nothing fails for lack of budget. A flow that finds none goes on with one small buffer at a time, so what is stuck
//! never stops what is not; the bound is the limit plus [`SMALL`] for each direction of a connection. No locks: one
//! addition for a buffer taken and one for it given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

/// What a flow may always buffer in one direction, in bytes. Most requests fit.
pub const SMALL: usize = 4 * 1024;

/// Bytes that one owner may buffer.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    waits: AtomicU64,
    /// Windows that got less than they want.
    short: AtomicUsize,
    freed: Notify,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
            waits: AtomicU64::new(0),
            short: AtomicUsize::new(0),
            freed: Notify::new(),
        })
    }

    /// The bound, bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Buffered, or promised to peers, bytes. May be above the limit by what everybody may always have.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// How often somebody was slowed down because the budget was used up.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Takes `bytes` if there is room for all of them.
    fn take(&self, bytes: usize) -> bool {
        let room = self.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= self.limit;
        if !room {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        room
    }

    /// Counts `bytes` that are held already, if there is room for all of them.
    pub fn charge(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        let room = self.take(bytes);
        if !room {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
        room.then(|| Charge { budget: self.clone(), bytes })
    }

    /// Takes `bytes` although there may be no room: what everybody may always have.
    pub(super) fn overdraw(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes what is wanted, but at most half of what is left: who comes later finds something, too.
    pub(super) fn draw(&self, wanted: usize) -> usize {
        let granted = wanted.min(self.limit.saturating_sub(self.used()) / 2);
        let granted = if granted > 0 && self.take(granted) { granted } else { 0 };
        if granted < wanted {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
        granted
    }

    /// More than three quarters are used: who has more than it needs gives it back.
    pub fn is_pressed(&self) -> bool {
        self.used() > self.limit / 4 * 3
    }

    /// Gives `bytes` back.
    pub(super) fn give_back(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed);
        // Once a sixteenth of the budget, not once a buffer.
        let step = (self.limit / 16).max(1);
        if before / step != before.saturating_sub(bytes) / step && self.short.load(Ordering::Relaxed) > 0 {
            self.freed.notify_waiters();
        }
    }

    /// Completes when a good part of the budget was given back, for who is counted as short.
    pub(super) fn freed(&self) -> tokio::sync::futures::Notified<'_> {
        self.freed.notified()
    }

    /// Counts who wants more, up or down.
    pub(super) fn count_short(&self, short: bool) {
        if short {
            self.short.fetch_add(1, Ordering::Relaxed);
        } else {
            self.short.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Bytes that count until it is dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// What one direction of a flow has buffered.
#[derive(Debug)]
pub struct Ledger {
    budget: Arc<Budget>,
    held: AtomicUsize,
    waiting: AtomicBool,
    drained: Notify,
}

impl Ledger {
    /// Of a flow that has buffered nothing.
    pub fn new(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            budget: budget.clone(),
            held: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            drained: Notify::new(),
        })
    }

    /// An empty buffer for `wanted` bytes, or for [`SMALL`] when the budget is used up; then only once everything that
    /// this flow had buffered is gone.
    pub async fn buffer(self: &Arc<Self>, wanted: usize) -> Buffer {
        loop {
            if self.budget.take(wanted) {
                return self.charged(wanted);
            }
            self.budget.waits.fetch_add(1, Ordering::Relaxed);
            let drained = self.drained.notified();
            // Said first, looked second: whoever gives back in between sees it.
            self.waiting.store(true, Ordering::SeqCst);
            if self.held.load(Ordering::SeqCst) == 0 {
                self.waiting.store(false, Ordering::Relaxed);
                let size = wanted.min(SMALL);
                self.budget.overdraw(size);
                return self.charged(size);
            }
            drained.await;
        }
    }

    fn charged(self: &Arc<Self>, size: usize) -> Buffer {
        self.held.fetch_add(size, Ordering::SeqCst);
        Buffer { data: Vec::with_capacity(size), charge: size, ledger: self.clone() }
    }

    fn give_back(&self, bytes: usize) {
        self.budget.give_back(bytes);
        if self.held.fetch_sub(bytes, Ordering::SeqCst) == bytes && self.waiting.swap(false, Ordering::SeqCst) {
            self.drained.notify_one();
        }
    }
}

/// Memory that counts until it is dropped.
#[derive(Debug)]
pub struct Buffer {
    /// Empty at first. Growing it beyond its capacity would not be counted.
    pub data: Vec<u8>,
    charge: usize,
    ledger: Arc<Ledger>,
}

impl Buffer {
    /// Its content, which counts as long as any part of it lives.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Bytes that it has room for.
    pub fn size(&self) -> usize {
        self.charge
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.ledger.give_back(self.charge);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Budget, Ledger, SMALL};
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_flow_over_budget_goes_on_with_one_small_buffer_at_a_time() {
        let budget = Budget::new(100_000);
        let (stuck, other) = (Ledger::new(&budget), Ledger::new(&budget));
        let all = stuck.buffer(90_000).await;
        assert_eq!(all.size(), 90_000);
        let small = other.buffer(64_000).await;
        assert_eq!(small.size(), SMALL, "what is stuck does not stop the others");
        assert!(budget.used() <= budget.limit() + 2 * SMALL);
        let more = other.buffer(64_000);
        tokio::pin!(more);
        assert!(timeout(Duration::from_millis(20), &mut more).await.is_err(), "one at a time");
        drop(small.freeze());
        assert_eq!(more.await.size(), SMALL);
        assert!(budget.waits() >= 2);
        drop(all);
        assert_eq!(other.buffer(64_000).await.size(), 64_000);
        assert_eq!(budget.used(), 0, "every byte came back");
    }

    #[test]
    fn what_is_held_counts_if_there_is_room() {
        let budget = Budget::new(100);
        let held = budget.charge(60);
        assert!(held.is_some() && budget.charge(60).is_none());
        assert_eq!((budget.used(), budget.waits()), (60, 1));
        drop(held);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_buffer_counts_until_its_last_part_is_gone() {
        let budget = Budget::new(10_000);
        let mut buffer = Ledger::new(&budget).buffer(1000).await;
        buffer.data.extend_from_slice(b"abcdef");
        let whole = buffer.freeze();
        let part = whole.slice(2..4);
        drop(whole);
        assert_eq!((&part[..], budget.used()), (&b"cd"[..], 1000));
        drop(part);
        assert_eq!(budget.used(), 0);
    }
}
