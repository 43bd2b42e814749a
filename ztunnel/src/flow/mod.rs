//! What every connection of a local pod needs: the shared handles, the pod itself, and its budget.
//!
//! A pod's budget is what keeps one pod from taking the proxy away from its neighbours: connections, tunnels,
//! handshakes under way and buffered bytes. Waiting for knowledge (the workload, its policies, its certificate) happens here too, always with a deadline:
//! nothing is guessed before, and nobody waits for ever.

mod gate;
pub mod hosts;
pub mod names;
pub mod proof;
pub mod recheck;
pub mod tunnel;

use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tulle_certs::SpiffeId;

use crate::base::budget::Budget;
use crate::base::drain::Drained;
use crate::base::sockets::PodSockets;
pub use crate::flow::gate::{Gate, GateLimits, Pass};
use crate::flow::names::Names;
use crate::hbone;
use crate::http;
use crate::identity::Identities;
use crate::lb::{Bound, Destinations};
use crate::outcome::{Code, Outcome};
use crate::relay;
use crate::state::{Lease, Reader, Snapshot, Workload, address_name};
use crate::telemetry::metrics::Metrics;
use crate::tls::WorkloadCert;

/// How long a new connection waits for what control has to say. The peer's number, and about what a client accepts.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Handles that all flows share. Cheap to clone.
#[derive(Clone)]
pub struct Shared {
    /// The snapshot in force.
    pub reader: Reader,
    /// Certificates.
    pub identities: Identities,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Tunnels.
    pub hbone: hbone::Config,
    /// Copying.
    pub relay: relay::Limits,
    /// Name of the node's network.
    pub network: Arc<str>,
    /// Cluster id, for telemetry.
    pub cluster: Arc<str>,
    /// What all workers count together for routes.
    pub limits: Arc<http::limit::Limits>,
    /// What all workers know of the Services that are used.
    pub destinations: Arc<Destinations>,
}

/// Limits of one pod.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections in both directions.
    pub connections: usize,
    /// Inbound tunnels and their handshakes.
    pub gate: GateLimits,
    /// Bytes in buffers, and in windows that peers were given.
    pub buffer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Each direction for itself, so that a flood from outside does not take the pod's own connections away. 5 KB each
        // make 160 MB. 128 handshakes are 60 ms of one core, 1000 a second half of one. A tunnel is 100 KB idle, and 100
        // of its streams are needed for the connections. 64 MiB is 256 streams at full window, or 25 Gbit/s over 20 ms.
        let gate = GateLimits { handshakes: 128, rate: 1000, source_rate: 200, tunnels: 2048 };
        Self { connections: 16_384, gate, buffer: 64 << 20 }
    }
}

/// A pod of this node, as its flows see it.
pub struct LocalPod {
    /// metadata.uid.
    pub uid: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Opens sockets in it.
    pub sockets: Arc<PodSockets>,
    /// Ends its flows.
    pub drained: Drained,
    /// What it may use.
    pub limits: Limits,
    /// Live inbound connections.
    pub inbound: Arc<AtomicUsize>,
    /// Live outbound connections.
    pub outbound: Arc<AtomicUsize>,
    /// Questions of its name server that are under way.
    pub questions: Arc<AtomicUsize>,
    /// Inbound tunnels and their handshakes.
    pub gate: Arc<Gate>,
    /// What its flows may buffer.
    pub buffers: Arc<Budget>,
    /// spec.serviceAccountName.
    pub service_account: Arc<str>,
    /// Id of this node's cluster: another cluster may have a pod of the same name.
    pub cluster: Arc<str>,
    /// Connections refused for lack of budget.
    pub refused: AtomicU64,
    /// Endpoints that services with session affinity have bound the pod to. Locked for such connections only, and not
    /// while anything is waited for.
    pub bound: Mutex<Bound>,
    /// Virtual addresses that it was given for names outside. Locked for look-ups and connections of pods whose egress is closed,
    /// and not while anything is waited for.
    pub names: Mutex<Names>,
}

/// One unit of a budget, until dropped.
#[derive(Debug)]
pub struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Which pod it is, as its list says.
#[derive(Clone, Copy, Debug)]
pub struct PodName<'a> {
    /// metadata.uid.
    pub uid: &'a str,
    /// Name.
    pub name: &'a str,
    /// Namespace.
    pub namespace: &'a str,
    /// spec.serviceAccountName.
    pub service_account: &'a str,
    /// Id of its cluster.
    pub cluster: &'a str,
}

impl LocalPod {
    /// A pod without flows, whose ones `drained` ends.
    pub fn new(
        name: PodName<'_>,
        addresses: Vec<IpAddr>,
        sockets: Arc<PodSockets>,
        drained: Drained,
        limits: Limits,
    ) -> Self {
        let PodName { uid, name, namespace, service_account, cluster } = name;
        Self {
            uid: uid.into(),
            name: name.into(),
            namespace: namespace.into(),
            addresses,
            sockets,
            drained,
            limits,
            inbound: Arc::default(),
            outbound: Arc::default(),
            questions: Arc::default(),
            gate: Gate::new(limits.gate),
            buffers: Budget::new(limits.buffer),
            service_account: service_account.into(),
            cluster: cluster.into(),
            refused: AtomicU64::new(0),
            bound: Mutex::default(),
            names: Mutex::default(),
        }
    }

    /// One more connection, counted in `direction`.
    ///
    /// # Errors
    /// `OverBudget`.
    pub fn connection(&self, direction: &Arc<AtomicUsize>) -> Result<Permit, Outcome> {
        let live = direction.load(Ordering::Relaxed);
        if live >= self.limits.connections {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let text = format!(
                "the pod has {live} connections in this direction, its limit (TULLE_POD_MAX_CONNECTIONS); retry later"
            );
            return Err(Outcome::new(Code::OverBudget, text));
        }
        direction.fetch_add(1, Ordering::Relaxed);
        Ok(Permit(direction.clone()))
    }

    /// One more inbound tunnel from `source`.
    ///
    /// # Errors
    /// `OverBudget`.
    pub fn tunnel(&self, source: IpAddr) -> Result<Pass, Outcome> {
        self.counted(self.gate.tunnel(source))
    }

    /// One more handshake from `source`, when it is its turn.
    ///
    /// # Errors
    /// `HandshakeLimit`.
    pub async fn handshake(&self, source: IpAddr) -> Result<Pass, Outcome> {
        self.counted(self.gate.handshake(source).await)
    }

    fn counted<T>(&self, result: Result<T, Outcome>) -> Result<T, Outcome> {
        if result.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    /// What control says about the pod. A description of an earlier pod of the same name, or of another cluster's, does
    /// not count: it would lend this pod their identity and policies.
    pub fn workload<'a>(&'a self, snapshot: &'a Snapshot) -> Option<&'a Arc<Workload>> {
        snapshot
            .workloads_by_pod(&self.namespace, &self.name)
            .find(|workload| describes(workload, &self.uid, &self.service_account, &self.cluster))
    }
}

/// Whether `workload` is control's description of the pod with this uid, account and cluster.
pub fn describes(workload: &Workload, uid: &str, service_account: &str, cluster: &str) -> bool {
    (workload.pod_uid.is_empty() || *workload.pod_uid == *uid)
        && workload.identity.service_account() == service_account
        && (cluster.is_empty() || *workload.cluster == *cluster)
}

impl Shared {
    /// The newest snapshot in which `look` finds something, waiting for it within [`PATIENCE`].
    pub async fn wait_for<T>(&self, look: impl Fn(&Arc<Snapshot>) -> Option<T>) -> Option<T> {
        let snapshot = self.reader.load();
        if let Some(found) = look(&snapshot) {
            return Some(found);
        }
        let mut changes = self.reader.subscribe();
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Subscribed first, looked second: no change can slip between.
            if let Some(found) = look(&self.reader.load()) {
                return Some(found);
            }
            timeout_at(deadline, changes.changed()).await.ok()?.ok()?;
        }
    }

    /// The pod's workload and the snapshot it is in.
    ///
    /// # Errors
    /// `UnknownWorkload` if control has not described it in time.
    pub async fn known(&self, pod: &LocalPod) -> Result<(Arc<Snapshot>, Arc<Workload>), Outcome> {
        let found = self.wait_for(|snapshot| {
            let workload = pod.workload(snapshot)?.clone();
            snapshot.synced().then(|| (snapshot.clone(), workload))
        });
        found.await.ok_or_else(|| {
            let text = format!(
                "control has not described pod {}/{} within {} s; is control reachable?",
                pod.namespace,
                pod.name,
                PATIENCE.as_secs()
            );
            Outcome::new(Code::UnknownWorkload, text)
        })
    }

    /// Asks control who has `ip`, where not everything is known. `None`: everything is.
    ///
    /// # Errors
    /// `OverBudget` if more is asked for than this node remembers.
    pub fn ask(&self, pod: &LocalPod, ip: IpAddr) -> Result<Option<Lease>, Outcome> {
        if ip.is_loopback() { Ok(None) } else { self.ask_for(pod, &address_name(&self.network, ip)) }
    }

    /// The same for any resource name: of a Service, `<namespace>/<host name>`.
    ///
    /// # Errors
    /// `OverBudget` if more is asked for than this node remembers.
    pub fn ask_for(&self, pod: &LocalPod, name: &str) -> Result<Option<Lease>, Outcome> {
        let demands = self.reader.demands();
        if !demands.enabled() {
            return Ok(None);
        }
        demands.want(name, &pod.uid, std::time::Instant::now()).map(Some).ok_or_else(|| {
            let text = format!(
                "control was not asked for {name}: the pod, or all pods of the node, use as many addresses as the node \
                 remembers (XDS_ON_DEMAND); retry in 10 s, or let the node know everything"
            );
            Outcome::new(Code::OverBudget, text)
        })
    }

    /// Waits until control has said who has an address: before, it could be anybody's, and nothing may be decided.
    ///
    /// # Errors
    /// `UnknownWorkload` if that was not said in time.
    pub async fn answered(&self, pod: &LocalPod, lease: Option<&Lease>, ip: IpAddr) -> Result<(), Outcome> {
        self.answered_for(lease, Instant::now() + PATIENCE, || self.is_known(pod, ip)).await
    }

    /// The same for any name, until `deadline`, and not if what it stands for `is_known` already.
    ///
    /// # Errors
    /// `UnknownWorkload` if that was not said in time.
    pub async fn answered_for(
        &self,
        lease: Option<&Lease>,
        deadline: Instant,
        is_known: impl Fn() -> bool,
    ) -> Result<(), Outcome> {
        let Some(lease) = lease else { return Ok(()) };
        let demands = self.reader.demands();
        let mut answers = demands.answers();
        loop {
            if demands.is_answered(lease) || is_known() {
                return Ok(());
            }
            // Subscribed first, looked second: no answer can slip between.
            if timeout_at(deadline, answers.changed()).await.is_err() {
                let text = format!(
                    "control has not said within {} s what {} is, and this node knows only what it asks for \
                     (XDS_ON_DEMAND); is control reachable? Retry",
                    PATIENCE.as_secs(),
                    lease.name()
                );
                return Err(Outcome::new(Code::UnknownWorkload, text));
            }
        }
    }

    /// Whether an address is known because something else was asked for: a service by its name, or one behind which it is.
    fn is_known(&self, pod: &LocalPod, ip: IpAddr) -> bool {
        let snapshot = self.reader.load();
        snapshot.workload_by_ip(&self.network, ip).is_some()
            || snapshot.service_by_vip(&self.network, ip, &pod.namespace).is_some()
            || snapshot.is_own_node(ip)
    }

    /// The certificate of `workload`.
    ///
    /// # Errors
    /// `NoCertificate` if the CA has not given one in time.
    pub async fn certificate(&self, workload: &Workload) -> Result<Arc<WorkloadCert>, Outcome> {
        self.certificate_of(&workload.identity).await
    }

    /// The certificate of `identity`.
    ///
    /// # Errors
    /// `NoCertificate` if the CA has not given one in time.
    pub async fn certificate_of(&self, identity: &SpiffeId) -> Result<Arc<WorkloadCert>, Outcome> {
        if let Some(cert) = self.identities.current(identity) {
            return Ok(cert);
        }
        let result = deadline(self.identities.certificate(identity)).await;
        let reason = match result {
            Some(Ok(cert)) => return Ok(cert),
            Some(Err(error)) => error.to_string(),
            None => format!("the CA did not answer within {} s", PATIENCE.as_secs()),
        };
        Err(Outcome::new(Code::NoCertificate, format!("no certificate for {identity}: {reason}")))
    }
}

/// `future`, if it completes within [`PATIENCE`].
async fn deadline<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(PATIENCE, future).await.ok()
}
