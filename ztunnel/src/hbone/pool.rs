//! The tunnels of one worker.
//!
//! A tunnel is used only for its exact key: source identity, source pod, expected identities and address; a stream can
//! therefore never ride on somebody else's authentication. Invariants: at most one connection attempt a key is under
//! way, and everybody who waits for it gets its result; a tunnel whose certificate was renewed, or that said goodbye,
//! gets no new streams and closes when its last one ends. The next tunnel of a pair is opened in the background when
//! the best one is [`CROWDED`] full, so that nobody waits for it. Idle tunnels are closed by one task a pool that
//! sleeps until the next one is due; an idle pool has no task. Of the tunnels of a key that are idle one stays, the others,
//! which a peak had opened, are closed soon: each holds some 200 KB at either end. A tunnel behind a gateway is one of the pool too: it lives in
//! a stream of the tunnel to the gateway, which is found here like any other.

use std::borrow::Borrow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use bytes::Bytes;
use h2::SendStream;
use h2::client::ResponseFuture;
use http::{HeaderMap, Request, StatusCode};
use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant, sleep, sleep_until, timeout};
use tulle_certs::SpiffeId;

use crate::base::cut::Cut;
use crate::base::sockets::Keepalive;
use crate::base::window::Slot;
use crate::base::workers;
use crate::hbone::client::{Dialer, Tunnel, connect, connect_over};
use crate::hbone::{BEYOND_AGE, BEYOND_STREAMS, Config, headers};
use crate::outcome::{Code, Outcome};
use crate::relay::StreamIo;

/// Share of a tunnel's streams, in percent, from which on the next tunnel is opened ahead.
const CROWDED: usize = 80;

/// Tunnels that are tried for one connection.
const ATTEMPTS: usize = 4;

/// Unused tunnels that a worker keeps: some 100 KB each. Beyond, the ones unused for longest go.
const MOST_IDLE: usize = 1024;

/// How long the other tunnels of a key stay open whose one is idle too: long enough for clients that come back at once.
const SURPLUS: Duration = Duration::from_secs(4);

/// Tunnels of one key. With 100 streams each it is far more than a pod's connection budget.
const MOST_TUNNELS: usize = 256;

/// A tunnel inside a stream of another one, whose end is only a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Beyond {
    /// What the gateway is asked for, `<hostname>:<port>` of a Service.
    pub authority: Arc<str>,
    /// Who may be at the end of the inner tunnel.
    pub expected: Arc<[SpiffeId]>,
}

/// What makes two connections alike enough to share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who we are.
    pub source: SpiffeId,
    /// Which of our pods (its uid), because the tunnel comes from its address.
    pub pod: Arc<str>,
    /// Who the other side may be.
    pub expected: Arc<[SpiffeId]>,
    /// Where it is.
    pub address: SocketAddr,
    /// The tunnel is the one behind it.
    pub beyond: Option<Beyond>,
    /// What its connection is asked to have.
    pub keepalive: Option<Keepalive>,
}

type Attempt = watch::Receiver<Option<Result<(), Outcome>>>;

#[derive(Default)]
struct Entry {
    tunnels: Vec<Rc<Tunnel>>,
    attempt: Option<Attempt>,
}

/// The pool. Belongs to one worker.
pub struct Pool {
    config: Config,
    entries: RefCell<HashMap<Key, Entry>>,
    janitor: Cell<bool>,
    /// When the janitor looks next.
    due: Cell<Option<Instant>>,
    sooner: Rc<Notify>,
    this: Weak<Self>,
}

/// A stream that was opened; the other proxy's answer is still to come.
pub struct Opened {
    /// The answer.
    pub response: ResponseFuture,
    /// Bytes for the other side.
    pub send: SendStream<Bytes>,
    /// Keeps the tunnel in use.
    pub lease: Lease,
}

/// One stream of a tunnel, until dropped.
pub struct Lease {
    /// Its part in the tunnel's receive window.
    pub window: Slot,
    tunnel: Rc<Tunnel>,
    pool: Weak<Pool>,
}

impl Lease {
    /// No new streams on this tunnel: it does not answer.
    pub fn retire(&self) {
        self.tunnel.retire();
    }

    /// Completes when the other side's certificate was taken back.
    pub async fn cut(&self) -> Outcome {
        self.tunnel.cut.ordered().await
    }

    /// What [`Self::cut`] waits for, for who has no lease.
    pub fn order(&self) -> Rc<Cut<Outcome>> {
        self.tunnel.cut.clone()
    }

    /// Who the other side proved to be.
    pub fn peer(&self) -> &SpiffeId {
        &self.tunnel.peer
    }
}

impl Borrow<Slot> for Lease {
    fn borrow(&self) -> &Slot {
        &self.window
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let streams = self.tunnel.streams.get().saturating_sub(1);
        self.tunnel.streams.set(streams);
        if streams == 0 {
            let now = Instant::now();
            self.tunnel.idle_since.set(now);
            if let Some(pool) = self.pool.upgrade() {
                pool.start_janitor();
                pool.look_by(now + SURPLUS);
            }
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(config: Config) -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            config,
            entries: RefCell::default(),
            janitor: Cell::new(false),
            due: Cell::new(None),
            sooner: Rc::default(),
            this: this.clone(),
        })
    }

    /// Opens a stream to the key's address, on a new tunnel if need be.
    ///
    /// # Errors
    /// Why there is no tunnel, or that every one failed.
    pub async fn open(&self, key: &Key, dialer: &Dialer, request: &Request<()>) -> Result<Opened, Outcome> {
        let mut last = None;
        // A tunnel may say goodbye between being chosen and being used; a third goodbye in a row is no accident.
        for _ in 0..3 {
            let tunnel = self.tunnel(key, dialer).await?;
            tunnel.streams.set(tunnel.streams.get() + 1);
            let lease = Lease { window: tunnel.enter(), tunnel, pool: self.this.clone() };
            match open_on(&lease.tunnel, request).await {
                Ok((response, send)) => return Ok(Opened { response, send, lease }),
                Err(error) => {
                    lease.tunnel.retire();
                    last = Some(error);
                }
            }
        }
        let text = last.map_or_else(String::new, |error| error.to_string());
        Err(Outcome::new(Code::TunnelFailed, format!("tunnel to {}: {text}", key.address)))
    }

    /// The least used tunnel of `key`, or a new one.
    async fn tunnel(&self, key: &Key, dialer: &Dialer) -> Result<Rc<Tunnel>, Outcome> {
        let most = self.streams(key);
        // A peer may finish the handshake and hang up, or others may fill a fresh tunnel before us.
        for _ in 0..ATTEMPTS {
            let mut attempt = {
                let mut entries = self.entries.borrow_mut();
                let entry = entries.entry(key.clone()).or_default();
                if key.beyond.is_some() {
                    entry.tunnels.iter().filter(|tunnel| tunnel.age() > BEYOND_AGE).for_each(|tunnel| tunnel.retire());
                }
                entry.tunnels.retain(|tunnel| tunnel.is_open() || tunnel.streams.get() > 0);
                let best = entry
                    .tunnels
                    .iter()
                    .filter(|tunnel| tunnel.is_open() && Arc::ptr_eq(&tunnel.cert, &dialer.cert))
                    .min_by_key(|tunnel| tunnel.streams.get())
                    .filter(|tunnel| tunnel.streams.get() < tunnel.limit(most))
                    .cloned();
                if let Some(tunnel) = best {
                    let limit = tunnel.limit(most);
                    if (tunnel.streams.get() + 1) * 100 >= limit * CROWDED && entry.tunnels.len() < MOST_TUNNELS {
                        self.attempt(key, dialer, entry);
                    }
                    return Ok(tunnel);
                }
                if entry.tunnels.len() >= MOST_TUNNELS {
                    let text = format!("{MOST_TUNNELS} tunnels to {} are full; retry later", key.address);
                    return Err(Outcome::new(Code::OverBudget, text));
                }
                self.attempt(key, dialer, entry)
            };
            let result = attempt.wait_for(Option::is_some).await.map(|value| value.clone());
            match result {
                Ok(Some(Ok(()))) => {}
                Ok(Some(Err(outcome))) => return Err(outcome),
                // The attempt panicked or the pool is being dropped.
                Ok(None) | Err(_) => return Err(Outcome::new(Code::Internal, "a tunnel attempt was lost")),
            }
        }
        let text = format!("{} tunnels to {} were of no use; retry later", ATTEMPTS, key.address);
        Err(Outcome::new(Code::TunnelFailed, text))
    }

    /// Streams that a tunnel of `key` may have.
    fn streams(&self, key: &Key) -> usize {
        let most = self.config.max_streams;
        if key.beyond.is_some() { most.min(BEYOND_STREAMS) } else { most }
    }

    /// The attempt under way, or a new one.
    fn attempt(&self, key: &Key, dialer: &Dialer, entry: &mut Entry) -> Attempt {
        if let Some(attempt) = entry.attempt.as_ref().filter(|attempt| attempt.has_changed().is_ok()) {
            return attempt.clone();
        }
        let (done, attempt) = watch::channel(None);
        entry.attempt = Some(attempt.clone());
        let (key, dialer, config, pool) = (key.clone(), dialer.clone(), self.config, self.this.clone());
        workers::spawn(async move {
            let result = match &key.beyond {
                None => connect(&dialer, (key.address, key.keepalive), &key.expected, config).await,
                // Boxed: tunnels to neighbours are not to make room for it.
                Some(beyond) => Box::pin(connect_beyond(&pool, &key, beyond, &dialer, config)).await,
            };
            let Some(pool) = pool.upgrade() else { return };
            let mut entries = pool.entries.borrow_mut();
            let result = match (result, entries.get_mut(&key)) {
                (Ok(tunnel), Some(entry)) => {
                    entry.tunnels.push(Rc::new(tunnel));
                    entry.attempt = None;
                    Ok(())
                }
                (Ok(_), None) => Err(Outcome::new(Code::PodRemoved, "the pod went away")),
                (Err(outcome), entry) => {
                    if let Some(entry) = entry {
                        entry.attempt = None;
                    }
                    Err(outcome)
                }
            };
            drop(entries);
            // Nobody may be waiting when the tunnel was opened ahead.
            let _ = done.send(Some(result));
            pool.start_janitor();
        });
        attempt
    }

    /// Drops the tunnels of a pod that went away. Their streams have ended or are about to.
    pub fn forget(&self, pod: &str) {
        self.entries.borrow_mut().retain(|key, _| &*key.pod != pod);
    }

    /// Open tunnels.
    pub fn tunnels(&self) -> usize {
        self.entries.borrow().values().map(|entry| entry.tunnels.iter().filter(|tunnel| tunnel.is_open()).count()).sum()
    }

    fn start_janitor(&self) {
        if self.janitor.replace(true) {
            return;
        }
        let this = self.this.clone();
        workers::spawn(async move {
            loop {
                let Some(pool) = this.upgrade() else { return };
                let Some(due) = pool.sweep() else {
                    pool.janitor.set(false);
                    return;
                };
                pool.due.set(Some(due));
                let sooner = pool.sooner.clone();
                drop(pool);
                tokio::select! {
                    () = sleep_until(due) => {}
                    () = sooner.notified() => sleep(SURPLUS).await,
                }
            }
        });
    }

    /// Has the janitor look no later than `latest`. It is told once for each of its looks, however many tunnels become idle.
    fn look_by(&self, latest: Instant) {
        if self.due.get().is_some_and(|due| due > latest) {
            self.due.set(Some(latest));
            self.sooner.notify_one();
        }
    }

    /// Retires the longest unused tunnels beyond [`MOST_IDLE`].
    fn cap_idle(&self) {
        let entries = self.entries.borrow();
        let mut idle: Vec<&Rc<Tunnel>> =
            entries.values().flat_map(|entry| &entry.tunnels).filter(|tunnel| tunnel.streams.get() == 0).collect();
        if idle.len() > MOST_IDLE {
            idle.sort_by_key(|tunnel| tunnel.idle_since.get());
            idle[..idle.len() - MOST_IDLE].iter().for_each(|tunnel| tunnel.retire());
        }
    }

    /// Closes what has been idle for long enough; when the next one is due.
    fn sweep(&self) -> Option<Instant> {
        let now = Instant::now();
        self.cap_idle();
        let mut next: Option<Instant> = None;
        self.entries.borrow_mut().retain(|_, entry| {
            let mut idle_ones = 0;
            entry.tunnels.retain(|tunnel| {
                if tunnel.streams.get() > 0 {
                    return true;
                }
                idle_ones += usize::from(tunnel.is_open());
                let patience = if idle_ones > 1 { SURPLUS.min(self.config.idle) } else { self.config.idle };
                let due = tunnel.idle_since.get() + patience;
                let keep = tunnel.is_open() && due > now;
                if keep {
                    next = Some(next.map_or(due, |next| next.min(due)));
                } else {
                    tunnel.retire();
                }
                keep
            });
            !entry.tunnels.is_empty() || entry.attempt.is_some()
        });
        next
    }
}

/// Opens the tunnel behind `key`'s address, in a stream of the one to it.
async fn connect_beyond(
    pool: &Weak<Pool>,
    key: &Key,
    beyond: &Beyond,
    dialer: &Dialer,
    config: Config,
) -> Result<Tunnel, Outcome> {
    let pool = pool.upgrade().ok_or_else(|| Outcome::new(Code::PodRemoved, "the pod went away"))?;
    let outer = Key { beyond: None, ..key.clone() };
    // It is for many connections, so it says nothing of any of them.
    let request = headers::connect_request(&beyond.authority, HeaderMap::new())
        .map_err(|error| Outcome::new(Code::Internal, error.to_string()))?;
    let Opened { response, send, lease } = pool.open(&outer, dialer, &request).await?;
    drop(pool);
    // It answers after a connect of its own.
    let recv = match timeout(config.connect_timeout * 2, response).await {
        Ok(Ok(response)) if response.status() == StatusCode::OK => response.into_body(),
        Ok(Ok(response)) => {
            let refused = headers::refused(&response);
            let detail = format!("the gateway at {}: {}", key.address, refused.detail).into();
            return Err(Outcome { detail, ..refused });
        }
        Ok(Err(error)) => {
            return Err(Outcome::new(Code::TunnelFailed, format!("the gateway at {}: {error}", key.address)));
        }
        Err(_) => {
            lease.retire();
            let text = format!("the gateway at {} did not answer CONNECT in time", key.address);
            return Err(Outcome::new(Code::ConnectTimeout, text));
        }
    };
    let (order, name) = (lease.order(), format!("{} behind {}", beyond.authority, key.address));
    connect_over(StreamIo::new(send, recv, lease), dialer, name, &beyond.expected, config, order).await
}

async fn open_on(tunnel: &Tunnel, request: &Request<()>) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
    let mut sender = tunnel.sender().ready().await?;
    sender.send_request(request.clone(), false)
}
