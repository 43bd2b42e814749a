//! Connections to servers that wait for the next request. Belongs to one worker.
//!
//! A connection is used again only for its exact key, which holds everything that a new one would be opened with: the pod
//! that it comes from, the endpoint, and the identities at both ends. So a request never rides on another pod's
//! connection. Unused ones are closed after [`IDLE`], before most servers close them, and one task sleeps until the next
//! is due.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};
use tulle_certs::SpiffeId;

use crate::base::{Pings, workers};
use crate::http::Framing;
use crate::http::client::{Conn, One, Two};

/// How long a connection without a request is kept. Servers close theirs after 5 s (Node.js), 15 s (Apache) or 75 s
/// (nginx), and a request that is sent in that moment is lost; a new connection costs a stream of a tunnel.
pub const IDLE: Duration = Duration::from_secs(4);

/// Shortest time between two looks for what is over: a policy may say any idle time.
const LOOK: Duration = Duration::from_millis(100);

/// Waiting connections of one key: a burst's worth.
const MOST_WAITING: usize = 64;

/// Age at which an HTTP/2 connection gets no new requests: it holds a tunnel with an old certificate open.
const MOST_AGE: Duration = Duration::from_secs(600);

/// How long a connection whose answer was read may take until it is ready again: its request body is still being sent.
const SETTLE: Duration = Duration::from_secs(5);

/// What makes two requests alike enough to share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Uid of the pod that the connection comes from.
    pub pod: Arc<str>,
    /// The application's address, or its waypoint's or gateway's.
    pub endpoint: SocketAddr,
    /// What a waypoint or gateway at that address is asked for; none: the endpoint is the application.
    pub asked: Option<Arc<str>>,
    /// Who we are and who may be there; none: plain TCP.
    pub identities: Option<(SpiffeId, Arc<[SpiffeId]>)>,
    /// What is spoken.
    pub framing: Framing,
    /// How its server is asked whether it is there (HTTP/2); none: as the proxy does by itself.
    pub pings: Option<Pings>,
}

#[derive(Default)]
struct Entry {
    /// With the end of their time.
    waiting: Vec<(One, Instant)>,
    shared: Vec<Two>,
    /// Held by who opens a connection for many requests, so that a burst opens one.
    opening: Rc<Mutex<()>>,
}

/// The pool.
pub struct Pool {
    entries: RefCell<HashMap<Key, Entry>>,
    janitor: Cell<bool>,
    /// The shortest idle time that was asked for.
    shortest: Cell<Duration>,
    this: Weak<Self>,
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            entries: RefCell::default(),
            janitor: Cell::new(false),
            shortest: Cell::new(IDLE),
            this: this.clone(),
        })
    }

    /// A connection that waits, the last used first: the others may reach their end.
    pub fn take(&self, key: &Key) -> Option<Conn> {
        let mut entries = self.entries.borrow_mut();
        let entry = entries.get_mut(key)?;
        match key.framing {
            Framing::One => {
                while let Some((one, until)) = entry.waiting.pop() {
                    tell(&one, false);
                    if one.is_ready() && Instant::now() < until {
                        return Some(Conn::One(one));
                    }
                }
                None
            }
            Framing::Two => {
                entry.shared.retain(Two::is_open);
                let young = entry.shared.iter().filter(|two| two.has_room() && two.since.elapsed() < MOST_AGE);
                young.min_by_key(|two| two.streams.get()).cloned().map(Conn::Two)
            }
        }
    }

    /// To be held while a connection for many requests is opened; look again with it in hand.
    pub fn opening(&self, key: &Key) -> Rc<Mutex<()>> {
        self.entries.borrow_mut().entry(key.clone()).or_default().opening.clone()
    }

    /// A connection that others may use as well.
    pub fn share(&self, key: &Key, two: Two) {
        self.shortest.set(self.shortest.get().min(two.idle));
        self.entries.borrow_mut().entry(key.clone()).or_default().shared.push(two);
        self.start_janitor();
    }

    /// Gives a connection back whose answer was read. It waits here as soon as it is ready, for at most `idle`.
    pub fn give_back(&self, key: Key, mut one: One, idle: Duration) {
        if one.is_ready() {
            return self.keep(key, one, idle);
        }
        let this = self.this.clone();
        workers::spawn(async move {
            if let Ok(true) = tokio::time::timeout(SETTLE, one.ready()).await
                && let Some(pool) = this.upgrade()
            {
                pool.keep(key, one, idle);
            }
        });
    }

    fn keep(&self, key: Key, one: One, idle: Duration) {
        self.shortest.set(self.shortest.get().min(idle));
        let waits = one.waits.clone();
        let mut entries = self.entries.borrow_mut();
        let entry = entries.entry(key).or_default();
        if entry.waiting.len() >= MOST_WAITING {
            entry.waiting.remove(0);
        }
        entry.waiting.push((one, Instant::now() + idle));
        drop(entries);
        if let Some(waits) = waits {
            waits(true);
        }
        self.start_janitor();
    }

    /// Connections for one request at a time that wait.
    pub fn waiting(&self) -> usize {
        self.entries.borrow().values().map(|entry| entry.waiting.len()).sum()
    }

    fn start_janitor(&self) {
        if self.janitor.replace(true) {
            return;
        }
        let this = self.this.clone();
        workers::spawn(async move {
            loop {
                let Some(pause) = this.upgrade().map(|pool| pool.shortest.get()) else { return };
                sleep_until(Instant::now() + pause.max(LOOK)).await;
                let Some(pool) = this.upgrade() else { return };
                pool.sweep();
                if pool.entries.borrow().is_empty() {
                    pool.janitor.set(false);
                    return;
                }
            }
        });
    }

    /// Closes what has waited for long enough.
    fn sweep(&self) {
        self.entries.borrow_mut().retain(|_, entry| {
            entry.waiting.retain(|(one, until)| one.is_ready() && Instant::now() < *until);
            entry.shared.retain(|two| {
                let quiet = two.streams.get() == 0;
                let since = two.idle_since.get().filter(|_| quiet).unwrap_or_else(Instant::now);
                two.idle_since.set(quiet.then_some(since));
                let old = two.since.elapsed() > MOST_AGE || two.uses.get() >= two.most_uses;
                two.is_open() && !(quiet && (old || since.elapsed() >= two.idle))
            });
            let opening = Rc::strong_count(&entry.opening) > 1;
            opening || !entry.waiting.is_empty() || !entry.shared.is_empty()
        });
    }
}

fn tell(one: &One, waits: bool) {
    if let Some(told) = &one.waits {
        told(waits);
    }
}
