//! The certificates in force, and the task that keeps them so.
//!
//! Connections read a snapshot of the map and take no lock; the table of who is due is behind a mutex that is held for
//! moments and never across an await. Requests are made by the one task of [`Identities::run`], so that nothing is
//! fetched by a connection that goes away. A waiter waits at most [`WAIT`].

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch};
use tulle_certs::SpiffeId;

use crate::identity::renew::{Standing, Table, Validity, origin};
use crate::tls::WorkloadCert;

/// Longest wait for a certificate: a request that takes its whole 10 s and one that queued before it are an outage.
const WAIT: Duration = Duration::from_secs(15);
/// The wall clock may jump, so the table is looked at this often although nothing is due.
const LOOK: Duration = Duration::from_secs(30);

/// Why there is no certificate for an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The last request failed; it is repeated by itself.
    #[error("there is no certificate for {identity}: {reason}; it is asked for again in {retry_in_ms} ms")]
    Unavailable {
        /// Whose.
        identity: SpiffeId,
        /// What the CA or the way to it said.
        reason: String,
        /// Milliseconds until the next request.
        retry_in_ms: i64,
    },
    /// The CA was too slow.
    #[error("there is no certificate for {identity} after {} s: the CA is slow or overloaded; try again", WAIT.as_secs())]
    Timeout {
        /// Whose.
        identity: SpiffeId,
    },
    /// More identities than a node can have.
    #[error("no certificate is requested for {identity}: the node has too many identities already")]
    TooMany {
        /// Whose.
        identity: SpiffeId,
    },
    /// The proxy is stopping.
    #[error("no certificate is requested for {identity}: the proxy is stopping")]
    Stopped {
        /// Whose.
        identity: SpiffeId,
    },
}

/// How one certificate stands, for status pages and dumps. Holds no key.
#[derive(Clone, Debug)]
pub struct CertStatus {
    /// Whose.
    pub identity: SpiffeId,
    /// `Available`, `Initializing` or `Unavailable`.
    pub state: &'static str,
    /// The certificate in force.
    pub certificate: Option<Arc<WorkloadCert>>,
    /// End of its validity, Unix seconds. 0: none.
    pub not_after: i64,
    /// The last error, also while the old certificate is valid.
    pub error: String,
}

/// Requests one certificate.
pub type Fetch =
    Arc<dyn Fn(SpiffeId) -> Pin<Box<dyn Future<Output = Result<WorkloadCert, String>> + Send>> + Send + Sync>;
/// Milliseconds since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// A handle to the node's certificates. Cheap to clone.
#[derive(Clone)]
pub struct Identities {
    shared: Arc<Shared>,
}

struct Shared {
    in_force: ArcSwap<HashMap<SpiffeId, Arc<WorkloadCert>>>,
    table: Mutex<Table>,
    /// The table has changed in a way that the task should look at.
    wake: Notify,
    /// Counts answers, good or bad.
    answers: watch::Sender<u64>,
    stopped: watch::Sender<bool>,
    clock: Clock,
    fetch: Fetch,
}

impl Identities {
    /// Nothing happens before [`Self::run`].
    pub fn new(fetch: Fetch, clock: Clock) -> Self {
        let shared = Shared {
            in_force: ArcSwap::default(),
            table: Mutex::default(),
            wake: Notify::new(),
            answers: watch::channel(0).0,
            stopped: watch::channel(false).0,
            clock,
            fetch,
        };
        Self { shared: Arc::new(shared) }
    }

    /// The certificate in force, if there is a valid one. Takes no lock.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<WorkloadCert>> {
        let now_ms = (self.shared.clock)();
        self.shared.in_force.load().get(id).filter(|cert| validity(cert).is_valid(now_ms)).cloned()
    }

    /// The certificate in force, waiting for the first one.
    ///
    /// # Errors
    /// During back-off the cached error, at once. After [`WAIT`] a time-out.
    pub async fn certificate(&self, id: &SpiffeId) -> Result<Arc<WorkloadCert>, IdentityError> {
        if let Some(cert) = self.current(id) {
            return Ok(cert);
        }
        // Subscribed before the first look, so that no answer falls between.
        let mut answers = self.shared.answers.subscribe();
        let mut stopped = self.shared.stopped.subscribe();
        let wait = async {
            loop {
                if let Some(done) = self.look(id) {
                    return done;
                }
                tokio::select! {
                    _ = answers.changed() => {}
                    _ = stopped.wait_for(|stopped| *stopped) => {
                        return Err(IdentityError::Stopped { identity: id.clone() });
                    }
                }
            }
        };
        let late = |_| Err(IdentityError::Timeout { identity: id.clone() });
        tokio::time::timeout(WAIT, wait).await.unwrap_or_else(late)
    }

    /// What there is to say about an identity now; `None`: wait.
    fn look(&self, id: &SpiffeId) -> Option<Result<Arc<WorkloadCert>, IdentityError>> {
        if let Some(cert) = self.current(id) {
            return Some(Ok(cert));
        }
        let now_ms = (self.shared.clock)();
        let mut table = self.table();
        if let Some(Standing::Unavailable { error, retry_ms }) = table.standing(id, now_ms)
            && retry_ms > now_ms
        {
            let retry_in_ms = retry_ms - now_ms;
            return Some(Err(IdentityError::Unavailable { identity: id.clone(), reason: error, retry_in_ms }));
        }
        if !table.ask(id, now_ms) {
            return Some(Err(IdentityError::TooMany { identity: id.clone() }));
        }
        drop(table);
        self.shared.wake.notify_one();
        None
    }

    /// The identities of the local pods: they are fetched before traffic needs them, and all others are forgotten.
    pub fn want(&self, wanted: &BTreeSet<SpiffeId>) {
        let gone = self.table().want(wanted, (self.shared.clock)());
        self.drop_certificates(&gone);
        self.shared.wake.notify_one();
    }

    /// Control says which roots the CA gives now and who signs (SHA-256 in hex): certificates that came with others are
    /// asked for anew within seconds, the old ones kept meanwhile. Gives how many those are.
    pub fn trust(&self, roots: &[String], issuer: &str) -> u32 {
        let announced = origin(roots.iter().map(String::as_str), issuer);
        let renewing = self.table().announce(announced, (self.shared.clock)(), rand::random);
        self.shared.wake.notify_one();
        renewing
    }

    /// The revocation lists have changed: own certificates that they name are asked for anew. Gives how many those are.
    pub fn replace_revoked(&self) -> usize {
        let in_force = self.shared.in_force.load();
        let revoked: Vec<&SpiffeId> = in_force.iter().filter(|(_, cert)| cert.is_revoked()).map(|(id, _)| id).collect();
        let mut table = self.table();
        revoked.iter().for_each(|id| table.hurry(id, (self.shared.clock)()));
        drop(table);
        self.shared.wake.notify_one();
        revoked.len()
    }

    /// Tells of every answer of the CA, so of every renewal.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.answers.subscribe()
    }

    /// How each certificate stands, in the order of the identities.
    pub fn status(&self) -> Vec<CertStatus> {
        let now_ms = (self.shared.clock)();
        let in_force = self.shared.in_force.load();
        let table = self.table();
        let status = |id: &SpiffeId| {
            let certificate = in_force.get(id).cloned();
            let state = match table.standing(id, now_ms) {
                Some(Standing::Available) => "Available",
                Some(Standing::Unavailable { .. }) => "Unavailable",
                Some(Standing::Initializing) | None => "Initializing",
            };
            let not_after = certificate.as_ref().map_or(0, |cert| cert.not_after);
            let error = table.last_error(id).unwrap_or_default().to_owned();
            CertStatus { identity: id.clone(), state, certificate, not_after, error }
        };
        table.identities().map(status).collect()
    }

    /// Fetches and renews until `shutdown` completes. Run it once.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        let mut in_flight = FuturesUnordered::new();
        loop {
            let now_ms = (self.shared.clock)();
            let (started, due_ms) = {
                let mut table = self.table();
                let gone = table.forget_unwanted(now_ms);
                let started: Vec<_> = std::iter::from_fn(|| table.start(now_ms)).collect();
                let due_ms = table.next_due_ms();
                drop(table);
                self.drop_certificates(&gone);
                (started, due_ms)
            };
            for id in started {
                let answer = (self.shared.fetch)(id.clone());
                in_flight.push(async move { (id, answer.await) });
            }
            // What is due and could not start waits for an answer, not for the clock.
            let until_due = due_ms.map(|due| due - now_ms).filter(|wait| *wait > 0);
            let nap = until_due.and_then(|wait| u64::try_from(wait).ok()).map_or(LOOK, Duration::from_millis).min(LOOK);
            tokio::select! {
                () = &mut shutdown => break,
                Some((id, result)) = in_flight.next() => self.answer(&id, result),
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(nap) => {}
            }
        }
        self.shared.stopped.send_replace(true);
    }

    fn answer(&self, id: &SpiffeId, result: Result<WorkloadCert, String>) {
        let now_ms = (self.shared.clock)();
        let result = result.and_then(|cert| {
            let valid = validity(&cert).is_valid(now_ms);
            if valid {
                Ok(cert)
            } else {
                Err("the CA sent a certificate that has expired; compare the clocks".to_owned())
            }
        });
        let outcome = result.as_ref().map(validity).map_err(Clone::clone);
        if let Err(error) = &outcome {
            tracing::warn!(identity = %id, error, "certificate request failed; it is repeated");
        }
        let table_kept = self.table().finish(id, outcome, now_ms, rand::random());
        if let (true, Ok(cert)) = (table_kept, result) {
            tracing::debug!(identity = %id, not_after = cert.not_after, serial = cert.issued.serial, "certificate issued");
            let cert = Arc::new(cert);
            self.shared.in_force.rcu(|map| {
                let mut map = HashMap::clone(map);
                map.insert(id.clone(), cert.clone());
                map
            });
        }
        self.shared.answers.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn drop_certificates(&self, gone: &[SpiffeId]) {
        if !gone.is_empty() {
            self.shared.in_force.rcu(|map| {
                let mut map = HashMap::clone(map);
                map.retain(|id, _| !gone.contains(id));
                map
            });
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is changed by single calls that do not panic half-way; a poisoned one is still consistent.
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn validity(cert: &WorkloadCert) -> Validity {
    Validity {
        not_before_ms: cert.not_before.saturating_mul(1000),
        not_after_ms: cert.not_after.saturating_mul(1000),
        origin: origin(cert.root_fingerprints.iter().map(String::as_str), &cert.issuer_fingerprint),
    }
}
