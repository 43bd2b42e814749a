//! Tests of the certificate task with a CA in memory and paused time.
//!
//! Real keys and certificates, made by `tulle_certs::ca`, with no socket in between. The clock of the certificates is the
//! runtime's paused clock, so that days pass in milliseconds.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tulle_certs::SpiffeId;
use tulle_certs::ca::Authority;

use crate::identity::{Clock, Fetch, Identities, IdentityError};
use crate::tls::{Trust, WorkloadCert};

/// A CA that the test controls.
struct Ca {
    authority: Authority,
    life_s: AtomicI64,
    clock: Clock,
    down: Mutex<Option<&'static str>>,
    /// When set, requests wait until told.
    gate: Mutex<Option<Arc<Notify>>>,
    asked: Mutex<Vec<SpiffeId>>,
    running: AtomicUsize,
    most: AtomicUsize,
    _dir: tempfile::TempDir,
}

fn id(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", name).unwrap()
}

fn ids(names: &[&str]) -> BTreeSet<SpiffeId> {
    names.iter().map(|name| id(name)).collect()
}

fn ca(life_s: i64) -> (Arc<Ca>, Identities) {
    let dir = tempfile::tempdir().unwrap();
    let begin_s = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    let authority = Authority::open(dir.path(), begin_s).unwrap();
    let begin = Instant::now();
    let clock: Clock = Arc::new(move || begin_s * 1000 + i64::try_from(begin.elapsed().as_millis()).unwrap());
    let ca = Arc::new(Ca {
        authority,
        life_s: AtomicI64::new(life_s),
        clock: clock.clone(),
        down: Mutex::default(),
        gate: Mutex::default(),
        asked: Mutex::default(),
        running: AtomicUsize::new(0),
        most: AtomicUsize::new(0),
        _dir: dir,
    });
    let fetch: Fetch = {
        let ca = ca.clone();
        Arc::new(move |id| Box::pin(ca.clone().answer(id)))
    };
    (ca, Identities::new(fetch, clock))
}

impl Ca {
    async fn answer(self: Arc<Self>, id: SpiffeId) -> Result<WorkloadCert, String> {
        self.asked.lock().unwrap().push(id.clone());
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        let gate = self.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.notified().await;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.running.fetch_sub(1, Ordering::SeqCst);
        if let Some(error) = *self.down.lock().unwrap() {
            return Err(error.to_owned());
        }
        let made = tulle_certs::request(&id).unwrap();
        let csr = tulle_certs::parse_csr(&made.csr_pem).unwrap();
        let now_s = (self.clock)() / 1000;
        let chain = self.authority.sign(&csr, &id, self.life_s.load(Ordering::SeqCst), now_s).unwrap();
        Ok(WorkloadCert::new(tulle_certs::Issued::parse(&chain, &id).unwrap(), made.key, &Trust::default()).unwrap())
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    fn set_down(&self, down: Option<&'static str>) {
        *self.down.lock().unwrap() = down;
    }
}

fn start(identities: &Identities) -> tokio::task::JoinHandle<()> {
    tokio::spawn(identities.clone().run(std::future::pending()))
}

#[tokio::test(start_paused = true)]
async fn certificates_are_fetched_before_anybody_asks() {
    let (ca, identities) = ca(3600);
    identities.want(&ids(&["cart", "web"]));
    let task = start(&identities);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(identities.current(&id("cart")).is_some() && identities.current(&id("web")).is_some());
    assert_eq!(ca.asked(), 2);
    let states: Vec<_> = identities.status().into_iter().map(|status| status.state).collect();
    assert_eq!(states, ["Available", "Available"]);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_at_half_life_again_and_again() {
    let (ca, identities) = ca(3600);
    identities.want(&ids(&["cart"]));
    let mut renewals = identities.subscribe();
    let task = start(&identities);
    let first = identities.certificate(&id("cart")).await.unwrap();
    renewals.mark_unchanged();
    let begin = Instant::now();
    renewals.changed().await.unwrap();
    let waited = begin.elapsed().as_secs();
    assert!((1250..2000).contains(&waited), "renewed after {waited} s of 3600");
    let second = identities.current(&id("cart")).unwrap();
    assert_ne!(first.issued.serial, second.issued.serial);
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert!(identities.current(&id("cart")).is_some(), "there is always a valid one");
    }
    assert!(ca.asked() < 50, "and it is not asked for in a loop: {}", ca.asked());
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn the_old_certificate_is_kept_while_the_ca_is_down_and_expires_in_the_end() {
    let (ca, identities) = ca(3600);
    identities.want(&ids(&["cart"]));
    let task = start(&identities);
    let first = identities.certificate(&id("cart")).await.unwrap();
    ca.set_down(Some("CA is down"));
    tokio::time::sleep(Duration::from_secs(3000)).await;
    let kept = identities.current(&id("cart")).unwrap();
    assert_eq!(first.issued.serial, kept.issued.serial);
    let status = identities.status().remove(0);
    assert_eq!((status.state, status.error.as_str()), ("Available", "CA is down"));
    assert!(ca.asked() > 5, "it is asked again meanwhile");
    tokio::time::sleep(Duration::from_secs(700)).await;
    assert!(identities.current(&id("cart")).is_none());
    assert_eq!(identities.status().remove(0).state, "Unavailable");
    let begin = Instant::now();
    let error = identities.certificate(&id("cart")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Unavailable { reason, .. } if reason == "CA is down"), "{error}");
    assert_eq!(begin.elapsed(), Duration::ZERO, "the cached error comes at once");
    ca.set_down(None);
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(identities.current(&id("cart")).is_some(), "it recovers by itself");
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_requests_run_and_a_waiter_comes_first() {
    let (ca, identities) = ca(3600);
    let gate = Arc::new(Notify::new());
    *ca.gate.lock().unwrap() = Some(gate.clone());
    let names: Vec<String> = (0..40).map(|index| format!("a{index:02}")).collect();
    identities.want(&ids(&names.iter().map(String::as_str).collect::<Vec<_>>()));
    let task = start(&identities);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(ca.asked(), 8);
    let waiter = tokio::spawn({
        let identities = identities.clone();
        async move { identities.certificate(&id("a39")).await.map(|cert| cert.identity.clone()) }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    gate.notify_one();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(ca.asked.lock().unwrap().last(), Some(&id("a39")), "the next request is the waiter's");
    *ca.gate.lock().unwrap() = None;
    for _ in 0..8 {
        gate.notify_one();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(waiter.await.unwrap().unwrap(), id("a39"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(ca.asked(), 40);
    assert_eq!(ca.most.load(Ordering::SeqCst), 8);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn many_waiters_share_one_request() {
    let (ca, identities) = ca(3600);
    let task = start(&identities);
    let waiters = (0..100).map(|_| {
        let identities = identities.clone();
        tokio::spawn(async move { identities.certificate(&id("cart")).await.is_ok() })
    });
    for waiter in waiters.collect::<Vec<_>>() {
        assert!(waiter.await.unwrap());
    }
    assert_eq!(ca.asked(), 1);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_silent_ca_does_not_hold_a_connection_for_ever() {
    let (ca, identities) = ca(3600);
    *ca.gate.lock().unwrap() = Some(Arc::new(Notify::new()));
    let task = start(&identities);
    let begin = Instant::now();
    let error = identities.certificate(&id("cart")).await.unwrap_err();
    assert!(matches!(error, IdentityError::Timeout { .. }));
    assert_eq!(begin.elapsed().as_secs(), 15);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn identities_without_a_pod_are_forgotten() {
    let (ca, identities) = ca(3600);
    identities.want(&ids(&["cart", "web"]));
    let task = start(&identities);
    identities.certificate(&id("cart")).await.unwrap();
    identities.certificate(&id("web")).await.unwrap();
    identities.want(&ids(&["web"]));
    assert!(identities.current(&id("cart")).is_none());
    tokio::time::sleep(Duration::from_secs(10_000)).await;
    assert!(!ca.asked.lock().unwrap()[2..].contains(&id("cart")));
    assert_eq!(identities.status().len(), 1);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn waiters_are_told_when_the_task_stops() {
    let (ca, identities) = ca(3600);
    *ca.gate.lock().unwrap() = Some(Arc::new(Notify::new()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let task = tokio::spawn(identities.clone().run(async {
        let _ = stopped.await;
    }));
    let waiter = tokio::spawn({
        let identities = identities.clone();
        async move { identities.certificate(&id("cart")).await.map(|_| ()) }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(stop);
    assert!(matches!(waiter.await.unwrap(), Err(IdentityError::Stopped { .. })));
    task.await.unwrap();
    assert!(matches!(identities.certificate(&id("web")).await, Err(IdentityError::Stopped { .. })));
}
