//! What the node knows of the Services that its pods use, shared by all workers: whose turn it is, how busy endpoints are,
//! which are ejected, and what each pod has under way.
//!
//! Limits are counted for each source pod, as a sidecar counts them: numbers that were tuned there mean the same here. One
//! lock for each table, held for a few look-ups and never while anything is waited for; only requests, and connections to
//! Services with a traffic policy, come here. Everything is bounded: what is idle is forgotten, and beyond that a destination
//! is served without being remembered.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::lb::load::Loads;
use crate::lb::outlier::{Ejected, Outliers};
use crate::lb::recent::Recent;
use crate::lb::warmup::Arrivals;
use crate::state::{OutlierDetection, Service, Warmup};

/// Destinations that are remembered, some 1 KB each.
const MOST: usize = 16_384;

/// Pods of a destination, policies about it and namespaces of its clients, of which something is remembered. A node has some
/// hundred pods.
const MOST_EACH: usize = 1024;

/// How long a server is remembered that does not take WebSockets: longer than connections to it are used (10 min), so each
/// that is still there has said it again.
const REMEMBERED: Duration = Duration::from_secs(1_200);

/// Namespace and host name of a Service, and its port.
type Key = (Arc<str>, Arc<str>, u16);

/// See the module's header.
#[derive(Debug, Default)]
pub struct Destinations(Mutex<HashMap<Key, Arc<Destination>>>);

impl Destinations {
    /// What is known of a port of a Service.
    pub fn of(&self, service: &Service, port: u16) -> Arc<Destination> {
        let key = (service.namespace.clone(), service.hostname.clone(), port);
        let mut all = lock(&self.0);
        if let Some(known) = all.get(&key) {
            return known.clone();
        }
        if all.len() >= MOST {
            all.retain(|_, known| Arc::strong_count(known) > 1);
        }
        let new = Arc::new(Destination::new(service, port));
        if all.len() < MOST {
            all.insert(key, new.clone());
        }
        new
    }

    /// The same without making it known.
    pub fn known(&self, service: &Service, port: u16) -> Option<Arc<Destination>> {
        lock(&self.0).get(&(service.namespace.clone(), service.hostname.clone(), port)).cloned()
    }

    /// Every one that is known, in the order of names.
    pub fn all(&self) -> Vec<Arc<Destination>> {
        let mut all: Vec<_> = lock(&self.0).values().cloned().collect();
        all.sort_by(|a, b| (&a.namespace, &a.hostname, a.port).cmp(&(&b.namespace, &b.hostname, b.port)));
        all
    }
}

/// What is known of a port of a Service.
#[derive(Debug)]
pub struct Destination {
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Its host name.
    pub hostname: Arc<str>,
    /// Its port.
    pub port: u16,
    turns: AtomicU64,
    loads: Mutex<Loads>,
    arrivals: Mutex<Arrivals>,
    /// By the resource name of the policy: clients of different namespaces may have different ones.
    outliers: Mutex<HashMap<Arc<str>, Outliers>>,
    /// By the uid of the pod.
    live: Mutex<HashMap<Arc<str>, Arc<Live>>>,
    /// By the namespace of the clients, whose routes may lead to other servers than those of others.
    websockets: Mutex<HashMap<Arc<str>, Websockets>>,
}

/// What servers of HTTP/2 have said of WebSockets.
#[derive(Debug, Default)]
struct Websockets {
    /// One takes them.
    take: bool,
    /// When one said last that it does not.
    refuse: Option<Instant>,
}

impl Destination {
    fn new(service: &Service, port: u16) -> Self {
        Self {
            namespace: service.namespace.clone(),
            hostname: service.hostname.clone(),
            port,
            // Nodes do not all begin with the same endpoint.
            turns: AtomicU64::new(RandomState::new().hash_one(port) >> 32),
            loads: Mutex::default(),
            arrivals: Mutex::default(),
            outliers: Mutex::default(),
            live: Mutex::default(),
            websockets: Mutex::default(),
        }
    }

    /// The next turn.
    pub fn turn(&self) -> u64 {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// A server that requests of clients in `namespace` were sent to takes WebSockets over HTTP/2, or does not.
    pub fn websockets(&self, namespace: &Arc<str>, take: bool, now: Instant) {
        let mut said = lock(&self.websockets);
        if said.len() < MOST_EACH || said.contains_key(namespace) {
            let said = said.entry(namespace.clone()).or_default();
            said.take |= take;
            said.refuse = if take { said.refuse } else { Some(now) };
        }
    }

    /// Whether clients in `namespace` are offered them: some server takes them, and none has said in [`REMEMBERED`] that it does
    /// not.
    pub fn takes_websockets(&self, namespace: &str, now: Instant) -> bool {
        let recent = |at: Instant| now.saturating_duration_since(at) < REMEMBERED;
        lock(&self.websockets).get(namespace).is_some_and(|said| said.take && !said.refuse.is_some_and(recent))
    }

    /// One more request or connection at an endpoint.
    pub fn begin(&self, endpoint: SocketAddr, now: Instant) {
        lock(&self.loads).begin(endpoint, now);
    }

    /// It is over.
    pub fn end(&self, endpoint: SocketAddr) {
        lock(&self.loads).end(endpoint);
    }

    /// Its answer began after that time.
    pub fn took(&self, endpoint: SocketAddr, time: Duration, now: Instant) {
        lock(&self.loads).took(endpoint, time, now);
    }

    /// Requests and connections under way at an endpoint.
    pub fn under_way(&self, endpoint: SocketAddr) -> u32 {
        lock(&self.loads).under_way(endpoint)
    }

    /// Whether one more request would wait less at the second than at the first.
    pub fn is_better(&self, first: SocketAddr, second: SocketAddr, now: Instant) -> bool {
        lock(&self.loads).is_better(first, second, now)
    }

    /// Looks at which endpoints are new, for [`Self::is_held_back`].
    pub fn look(&self, service: &Service, now: Instant) {
        let all = || crate::lb::addresses(service, self.port);
        lock(&self.arrivals).look(&service.endpoints, all, now);
    }

    /// Whether an endpoint is so new that it is passed over in the choice that `random` belongs to.
    pub fn is_held_back(&self, endpoint: SocketAddr, warmup: &Warmup, random: u64, now: Instant) -> bool {
        lock(&self.arrivals).is_held_back(endpoint, warmup, random, now)
    }

    /// Calls `then` with what a policy made of the endpoints.
    pub fn outliers<T>(&self, policy: &Arc<str>, now: Instant, then: impl FnOnce(&mut Outliers) -> T) -> T {
        let mut all = lock(&self.outliers);
        if all.len() >= MOST_EACH && !all.contains_key(policy) {
            all.retain(|_, one| !one.is_empty());
        }
        then(all.entry(policy.clone()).or_insert_with(|| Outliers::new(now)))
    }

    /// Whether ejection counts for `pod` now: something is ejected by the policy of these rules, and not so much that what is
    /// left would be too little (`minHealthPercent`).
    pub fn ejects(
        &self,
        policy: &Arc<str>,
        rules: &OutlierDetection,
        all: usize,
        pod: &Arc<str>,
        now: Instant,
    ) -> bool {
        self.outliers(policy, now, |outliers| !outliers.is_empty() && !outliers.panics(rules, all, pod, now))
    }

    /// Everything that is ejected, with the policy that did it.
    pub fn ejected(&self, now: Instant) -> Vec<(Arc<str>, Ejected)> {
        let all = lock(&self.outliers);
        let mut list: Vec<_> = all
            .iter()
            .flat_map(|(policy, one)| one.ejected(now).into_iter().map(|ejected| (policy.clone(), ejected)))
            .collect();
        list.sort_by(|a, b| (&a.0, a.1.endpoint).cmp(&(&b.0, b.1.endpoint)));
        list
    }

    /// What `pod` has under way.
    pub fn live(&self, pod: &Arc<str>) -> Arc<Live> {
        let mut all = lock(&self.live);
        if all.len() >= MOST_EACH && !all.contains_key(pod) {
            all.retain(|_, live| Arc::strong_count(live) > 1);
        }
        all.entry(pod.clone()).or_default().clone()
    }

    /// The same for every pod that has anything.
    pub fn pods(&self) -> Vec<(Arc<str>, Arc<Live>)> {
        let all = lock(&self.live);
        let mut list: Vec<_> = all.iter().map(|(pod, live)| (pod.clone(), live.clone())).collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Connections to endpoints.
    Connections,
    /// Requests that wait for one.
    Pending,
    /// Requests under way.
    Requests,
    /// Retries under way.
    Retries,
}

impl Kind {
    /// As Envoy names the counter of what went beyond.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connections => "cx",
            Self::Pending => "rq_pending",
            Self::Requests => "rq",
            Self::Retries => "rq_retry",
        }
    }
}

/// What one pod has under way to a destination.
#[derive(Debug, Default)]
pub struct Live {
    counts: [AtomicUsize; 4],
    /// Requests and retries that began lately, where a retry budget has an interval.
    began: Mutex<Option<Recent>>,
    /// A connection has come to wait for a request, or has gone.
    pub freed: Notify,
    /// Somebody waits for a connection that none may be opened for: those that wait elsewhere should go.
    pub wanted: Notify,
}

impl Live {
    /// One more, if there are fewer than `most`.
    pub fn take(self: &Arc<Self>, kind: Kind, most: Option<u32>) -> Option<Held> {
        let most = most.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
        let count = &self.counts[kind as usize];
        let taken = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |live| (live < most).then_some(live + 1));
        taken.is_ok().then(|| Held { live: self.clone(), kind })
    }

    /// A request begins that a retry budget counts for so long.
    pub fn begins(&self, interval: Duration, now: Instant) {
        lock(&self.began).get_or_insert_with(|| Recent::new(now)).add(0, interval, now);
    }

    /// A retry begins, if `most` allows more of them than began lately; it is asked with the requests that did, or that are
    /// under way if those are more.
    pub fn retries(&self, interval: Duration, now: Instant, most: impl FnOnce(usize) -> usize) -> bool {
        let mut began = lock(&self.began);
        let began = began.get_or_insert_with(|| Recent::new(now));
        let [requests, retries] = began.counts(interval, now).map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        let allowed = retries < most(requests.max(self.count(Kind::Requests)));
        if allowed {
            began.add(1, interval, now);
        }
        allowed
    }

    /// How many there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }
}

/// One that is counted, until dropped.
#[derive(Debug)]
pub struct Held {
    live: Arc<Live>,
    kind: Kind,
}

impl Held {
    /// Where it is counted.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.live.counts[self.kind as usize].fetch_sub(1, Ordering::Relaxed);
        if self.kind == Kind::Connections {
            self.live.freed.notify_waiters();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::task::{Context, Waker};
    use std::time::{Duration, Instant};

    use super::{Destinations, Kind, MOST_EACH, REMEMBERED};
    use crate::state::Service;
    use crate::state::fixtures::{service, snapshot};

    fn cart() -> Arc<Service> {
        let spec = service("shop", "cart", "10.96.0.1");
        let snapshot = snapshot([crate::state::Change::Service(Arc::new(spec))]);
        snapshot.service("shop", "cart.shop.svc.cluster.local").unwrap().clone()
    }

    #[test]
    fn websockets_are_offered_when_some_server_takes_them_and_none_refuses() {
        let (known, now) = (Destinations::default().of(&cart(), 80), Instant::now());
        assert!(!known.takes_websockets("shop", now), "nobody was asked");
        known.websockets(&"shop".into(), true, now);
        assert!(known.takes_websockets("shop", now));
        known.websockets(&"shop".into(), false, now);
        known.websockets(&"shop".into(), true, now);
        assert!(!known.takes_websockets("shop", now), "one does not");
        assert!(known.takes_websockets("shop", now + REMEMBERED), "none has said so for long");
    }

    #[test]
    fn limits_are_for_each_pod_and_port_and_what_ends_is_given_back() {
        let (all, service) = (Destinations::default(), cart());
        let pods: [Arc<str>; 2] = ["a".into(), "b".into()];
        let live = |port, pod: usize| all.of(&service, port).live(&pods[pod]);
        let held: Vec<_> = (0..5).filter_map(|_| live(80, 0).take(Kind::Requests, Some(2))).collect();
        assert_eq!(held.len(), 2, "whoever asks");
        assert!(live(80, 0).take(Kind::Retries, Some(1)).is_some(), "another count");
        assert!(live(80, 1).take(Kind::Requests, Some(1)).is_some(), "another pod");
        assert!(live(81, 0).take(Kind::Requests, Some(1)).is_some(), "another port");
        drop(held);
        assert_eq!(live(80, 0).count(Kind::Requests), 0);
        assert!(live(80, 0).take(Kind::Requests, Some(1)).is_some());
        assert!(live(80, 0).take(Kind::Requests, None).is_some(), "no limit");
    }

    #[test]
    fn retries_of_an_interval_are_a_share_of_its_requests() {
        let live = Destinations::default().of(&cart(), 80).live(&"a".into());
        let (began, interval) = (Instant::now(), Duration::from_secs(10));
        (0..50).for_each(|_| live.begins(interval, began));
        let retries = |now| (0..100).filter(|_| live.retries(interval, now, |requests| requests / 5)).count();
        assert_eq!(retries(began), 10);
        assert_eq!(retries(began + interval / 4), 0, "they are over, and count all the same");
        assert_eq!(retries(began + interval * 2), 0, "nothing was asked for lately");
    }

    #[test]
    fn whoever_waits_is_told_of_a_connection_that_ends() {
        let (all, service, pod) = (Destinations::default(), cart(), Arc::<str>::from("a"));
        let live = all.of(&service, 80).live(&pod);
        let held = live.take(Kind::Connections, Some(1)).unwrap();
        assert!(live.take(Kind::Connections, Some(1)).is_none());
        let mut freed = std::pin::pin!(live.freed.notified());
        freed.as_mut().enable();
        let mut context = Context::from_waker(Waker::noop());
        assert!(freed.as_mut().poll(&mut context).is_pending());
        drop(held);
        assert!(freed.poll(&mut context).is_ready());
    }

    #[test]
    fn pods_that_are_idle_make_room() {
        let destination = Destinations::default().of(&cart(), 80);
        let kept = destination.live(&"kept".into());
        let _held = kept.take(Kind::Requests, None);
        for pod in 0..MOST_EACH * 2 {
            destination.live(&pod.to_string().into());
        }
        assert!(destination.pods().len() <= MOST_EACH);
        assert_eq!(destination.live(&"kept".into()).count(Kind::Requests), 1);
        assert!(destination.ejected(Instant::now()).is_empty());
    }
}
