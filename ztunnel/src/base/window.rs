//! The receive window of a tunnel, drawn from a budget: what a peer may make us hold.
//!
//! Credit that a peer was given cannot be taken back; it can only be left unrenewed while it is used up. So a tunnel
//! begins with little and gets more when it shows that it needs it: it carries bytes at speed, or its streams are
//! stalled by applications that do not read and would stop the others. The wish is one stream window for each stalled
//! stream and for [`ACTIVE`] others; what the budget has decides. Invariants: what was advertised and not yet used up is
//! charged; a tunnel always has [`FLOOR`]. Belongs to one worker.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::base::budget::Budget;

/// What every HTTP/2 connection begins with, bytes; no setting lowers it (RFC 9113 §6.9.2).
pub const FLOOR: usize = 65_535;

/// Streams for which a window is kept full at once. 8 × 256 KiB is 16 Gbit/s over a millisecond of round trip.
const ACTIVE: usize = 8;

/// Half of a window within this time is speed: with less, a larger window would change nothing.
const BUSY: Duration = Duration::from_millis(250);

/// A wish that is gone after this time was none: most streams wait for a moment when they begin.
const LASTING: Duration = Duration::from_millis(2);

/// See the module's header.
#[derive(Debug)]
pub struct Window {
    budget: Arc<Budget>,
    /// Window of a stream, bytes.
    stream: usize,
    /// The largest that is of use, bytes.
    most: usize,
    open: Cell<usize>,
    stalled: Cell<usize>,
    /// Bytes since `since`.
    carried: Cell<usize>,
    since: Cell<Instant>,
    busy: Cell<bool>,
    /// What is wanted to be outstanding.
    target: Cell<usize>,
    /// What may be outstanding: more than the target while a smaller one is being reached.
    charge: Cell<usize>,
    short: Cell<bool>,
    changed: Notify,
    /// When to look at the wish again.
    due: Cell<Option<Instant>>,
}

impl Window {
    /// The window of a new tunnel: one stream's, if the budget has it.
    pub fn new(budget: &Arc<Budget>, stream: u32, most: u32) -> Rc<Self> {
        let (stream, most) = (size(stream), size(most).max(FLOOR));
        budget.overdraw(FLOOR);
        let first = FLOOR + budget.draw(stream.min(most).saturating_sub(FLOOR));
        Rc::new(Self {
            budget: budget.clone(),
            stream,
            most,
            open: Cell::new(0),
            stalled: Cell::new(0),
            carried: Cell::new(0),
            since: Cell::new(Instant::now()),
            busy: Cell::new(false),
            target: Cell::new(first),
            charge: Cell::new(first),
            short: Cell::new(false),
            changed: Notify::new(),
            due: Cell::new(None),
        })
    }

    /// The window to keep open, bytes.
    pub fn target(&self) -> u32 {
        u32::try_from(self.target.get()).unwrap_or(u32::MAX >> 1)
    }

    /// One more stream.
    pub fn enter(self: &Rc<Self>) -> Slot {
        self.open.set(self.open.get() + 1);
        Slot(self.clone())
    }

    /// Completes with the new target when it has to change. For the one task that drives the tunnel.
    pub async fn changed(&self) -> u32 {
        if self.short.get() {
            // Something may have been given back while nobody was here.
            self.due.set(Some(Instant::now()));
        }
        loop {
            let freed = self.budget.freed();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(due) = self.due.get() {
                sleep_until(due).await;
                self.due.set(None);
                if self.adjust() {
                    return self.target();
                }
            }
            tokio::select! {
                () = self.changed.notified() => self.due.set(Some(Instant::now() + LASTING)),
                () = freed, if self.short.get() => self.due.set(Some(Instant::now())),
            }
        }
    }

    fn demand(&self) -> usize {
        let stalled = self.stalled.get();
        let streams = stalled + self.open.get().saturating_sub(stalled).min(ACTIVE);
        (streams * self.stream).clamp(FLOOR, self.most)
    }

    /// Moves the target; whether it moved.
    fn adjust(&self) -> bool {
        let (demand, target, charge) = (self.demand(), self.target.get(), self.charge.get());
        if demand > target && (self.stalled.get() > 0 || self.busy.get()) {
            self.busy.set(false);
            // What is outstanding already needs no budget.
            let granted = if demand > charge { self.budget.draw(demand - charge) } else { 0 };
            self.charge.set(charge + granted);
            let reached = demand.min(charge + granted);
            self.mark_short(reached < demand);
            self.target.set(reached);
            return reached > target;
        }
        self.mark_short(false);
        if demand < target && self.budget.is_pressed() {
            self.target.set(demand);
            return true;
        }
        false
    }

    fn mark_short(&self, short: bool) {
        if self.short.replace(short) != short {
            self.budget.count_short(short);
        }
    }

    fn carry(&self, bytes: usize) {
        let (target, charge) = (self.target.get(), self.charge.get());
        if charge > target {
            // Used up and not renewed.
            let back = bytes.min(charge - target);
            self.charge.set(charge - back);
            self.budget.give_back(back);
        }
        let carried = self.carried.get() + bytes;
        self.carried.set(carried);
        if carried < target / 2 {
            return;
        }
        // The clock is asked once in half a window, not once a chunk.
        let now = Instant::now();
        let busy = now.duration_since(self.since.replace(now)) < BUSY;
        self.carried.set(0);
        self.busy.set(busy);
        let demand = self.demand();
        if (busy && demand > target) || (demand < target && self.budget.is_pressed()) {
            self.changed.notify_one();
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.mark_short(false);
        self.budget.give_back(self.charge.get());
    }
}

/// A stream's part in its tunnel's window, until dropped.
#[derive(Debug)]
pub struct Slot(Rc<Window>);

impl Slot {
    /// The stream passed `bytes` on, and its peer may send as many again.
    pub fn carried(&self, bytes: usize) {
        self.0.carry(bytes);
    }

    /// The stream waits for somebody who does not read, or who is not there yet, until the guard is dropped.
    pub fn stalled(&self) -> Stalled<'_> {
        let window = &self.0;
        window.stalled.set(window.stalled.get() + 1);
        if window.demand() > window.target.get() {
            window.changed.notify_one();
        }
        Stalled(window)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let window = &self.0;
        window.open.set(window.open.get() - 1);
        if window.demand() < window.target.get() && window.budget.is_pressed() {
            window.changed.notify_one();
        }
    }
}

/// A stream that waits.
#[derive(Debug)]
pub struct Stalled<'a>(&'a Window);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.0.stalled.set(self.0.stalled.get() - 1);
    }
}

fn size(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{FLOOR, Window};
    use crate::base::budget::Budget;
    use tokio::time::timeout;

    const STREAM: u32 = 256 << 10;
    const MOST: u32 = 32 << 20;

    fn stream(count: usize) -> usize {
        count * (256 << 10)
    }

    #[test]
    fn a_window_grows_with_stalled_streams_and_with_speed_and_comes_back() {
        let budget = Budget::new(64 << 20);
        let window = Window::new(&budget, STREAM, MOST);
        assert_eq!(window.target.get(), stream(1));
        let slots: Vec<_> = (0..20).map(|_| window.enter()).collect();
        assert!(!window.adjust(), "open streams alone need nothing");
        slots[0].carried(stream(1));
        assert!(window.adjust(), "speed");
        assert_eq!(window.target.get(), stream(super::ACTIVE));
        let stalled: Vec<_> = slots[..12].iter().map(super::Slot::stalled).collect();
        assert!(window.adjust());
        assert_eq!(window.target.get(), stream(20), "those that stall have their own, eight others as before");
        drop(stalled);
        drop(slots);
        assert!(!window.adjust(), "nobody needs it elsewhere");
        budget.overdraw(60 << 20);
        assert!(window.adjust(), "somebody does");
        assert_eq!((window.target.get(), window.charge.get()), (FLOOR, stream(20)), "credit given is still charged");
        let slot = window.enter();
        slot.carried(stream(20));
        assert_eq!(window.charge.get(), FLOOR, "until it is used up");
        budget.give_back(60 << 20);
        drop((slot, window));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn windows_never_promise_more_than_the_budget_and_a_floor_each() {
        let budget = Budget::new(4 << 20);
        let windows: Vec<_> = (0..50).map(|_| Window::new(&budget, STREAM, MOST)).collect();
        let slots: Vec<_> = windows.iter().flat_map(|window| (0..30).map(|_| window.enter())).collect();
        let stalled: Vec<_> = slots.iter().map(super::Slot::stalled).collect();
        for window in windows.iter().chain(&windows) {
            window.adjust();
        }
        let promised: usize = windows.iter().map(|window| window.charge.get()).sum();
        assert_eq!(promised, budget.used());
        assert!(promised <= (4 << 20) + 50 * FLOOR, "{promised}");
        assert!(windows.iter().all(|window| window.target.get() >= FLOOR && window.short.get()));
        assert!(budget.waits() > 0);
        drop(stalled);
        drop((slots, windows));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn who_is_short_is_told_when_there_is_room_again() {
        let budget = Budget::new(8 << 20);
        budget.overdraw(8 << 20);
        let window = Window::new(&budget, STREAM, MOST);
        let slot = window.enter();
        let _stalled = slot.stalled();
        let grown = window.changed();
        tokio::pin!(grown);
        assert!(timeout(Duration::from_millis(20), &mut grown).await.is_err());
        budget.give_back(8 << 20);
        assert_eq!(grown.await, STREAM);
    }
}
