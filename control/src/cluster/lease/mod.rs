//! Who of several replicas writes: a Lease (coordination.k8s.io/v1) as a pure state machine, and in [`holder`] the task
//! that moves it.
//!
//! Never two at once: the holder believes in its lease for [`HELD`] from the moment when it *sent* the last write that was
//! taken, by its own monotonic clock; another takes the lease only after it saw it unchanged for [`DURATION`] by its own.
//! So clocks may differ as they like, as long as they run about equally fast (one third slower or faster is too much).
//! The times in the object are for people. Limits: who holds the lease may be without it for [`DURATION`] after a crash.

mod holder;

pub use holder::{Leader, Term, run};

use std::time::Duration;

/// How long a lease is left alone after its last change.
pub const DURATION: Duration = Duration::from_secs(15);
/// How long the holder believes in it: what it began then has ended before another may begin.
pub const HELD: Duration = Duration::from_secs(10);
/// Between two renewals, and between two tries of everybody else.
const RENEW: Duration = Duration::from_secs(5);
/// Between two looks at a lease of another.
const LOOK: Duration = Duration::from_secs(2);
/// After a failure: soon enough that one lost answer does not cost the lease.
const AGAIN: Duration = Duration::from_millis(500);

/// What the API server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// holderIdentity; empty: it was released.
    pub holder: String,
    /// resourceVersion: a write names the one that it replaces.
    pub version: String,
    /// leaseTransitions.
    pub transitions: i32,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Look at it.
    Read,
    /// Make it, held by oneself.
    Create,
    /// Take or renew it, if it is of this version still.
    Write(Record),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// As it is now: read, or as it was written.
    Is(Record),
    /// There is none.
    Absent,
    /// Somebody else wrote or made it in between.
    Conflict,
    /// No answer, or an error: it may have been written or not.
    Failed,
}

/// One candidate. Times are those of any clock that never goes back, from any beginning.
#[derive(Debug)]
pub struct Elector {
    identity: String,
    seen: Option<Seen>,
    absent: bool,
    /// Until when the lease is held.
    until: Duration,
    /// Nothing is to be done before.
    next: Duration,
}

#[derive(Debug)]
struct Seen {
    record: Record,
    /// Since when it is known to be like this.
    since: Duration,
}

impl Elector {
    /// A candidate; no other has ever had this identity.
    pub fn new(identity: String) -> Self {
        Self { identity, seen: None, absent: false, until: Duration::ZERO, next: Duration::ZERO }
    }

    /// Whether the lease is held at `now`, and until when.
    pub fn held_until(&self, now: Duration) -> Option<Duration> {
        (now < self.until).then_some(self.until)
    }

    /// What is to be done at `now`, or for how long there is nothing to do.
    pub fn step(&self, now: Duration) -> Result<Action, Duration> {
        if now < self.next {
            return Err(self.next - now);
        }
        let Some(seen) = &self.seen else {
            return Ok(if self.absent { Action::Create } else { Action::Read });
        };
        let of_another = !seen.record.holder.is_empty() && seen.record.holder != self.identity;
        if of_another && now.saturating_sub(seen.since) < DURATION {
            return Ok(Action::Read);
        }
        let renews = seen.record.holder == self.identity;
        let transitions = seen.record.transitions.saturating_add(i32::from(!renews));
        Ok(Action::Write(Record { holder: self.identity.clone(), version: seen.record.version.clone(), transitions }))
    }

    /// Takes the answer to an action that was begun at `sent`.
    pub fn answered(&mut self, action: &Action, sent: Duration, now: Duration, answer: Answer) {
        match answer {
            Answer::Is(record) => {
                if *action != Action::Read && record.holder == self.identity {
                    self.until = sent + HELD;
                }
                let own = record.holder == self.identity;
                let unchanged = self.seen.as_ref().is_some_and(|seen| seen.record.version == record.version);
                if !unchanged {
                    self.seen = Some(Seen { record, since: now });
                }
                self.absent = false;
                // One's own after a look: its write had no answer, so it is written again, with one.
                self.next = match (own, action) {
                    (true, Action::Read) => now,
                    (true, _) => sent + RENEW,
                    // A released one is taken at once.
                    (false, _) if self.seen.as_ref().is_some_and(|seen| seen.record.holder.is_empty()) => now,
                    (false, _) => now + LOOK,
                };
            }
            Answer::Absent => {
                (self.seen, self.absent) = (None, *action == Action::Read);
                self.next = now;
            }
            // What is there is not known any more.
            Answer::Conflict => {
                (self.seen, self.absent) = (None, false);
                self.next = now;
            }
            Answer::Failed => {
                if *action != Action::Read {
                    // It may have been written. When it was seen before says nothing about what is there now.
                    (self.seen, self.absent) = (None, false);
                }
                self.next = now + AGAIN;
            }
        }
    }

    /// Gives the lease up: the write that lets another take it at once, if it is held.
    pub fn release(&mut self, now: Duration) -> Option<Record> {
        let held = self.held_until(now).is_some();
        self.until = Duration::ZERO;
        let record = &self.seen.as_ref()?.record;
        held.then(|| Record { holder: String::new(), ..record.clone() })
    }
}

#[cfg(test)]
mod tests;
