//! The record of one connection: opened at accept, filled in by each step, finished once.
//!
//! One log line and one set of counters come from it, so that the two can never disagree. A record that is dropped
//! unfinished, by a panic or a cancelled task, ends as `DRAINED` and is counted like the others.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tulle_certs::SpiffeId;

use crate::base::{Counts, unix_now};
use crate::outcome::{Code, DryRun, Fault, Outcome};
use crate::state::{Service, Workload};
use crate::telemetry::egress::Left;
use crate::telemetry::metrics::{DenialLabels, EgressLabels, Metrics, TcpLabels};
use crate::telemetry::plaintext::Kind;

/// Which side of the mesh reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Into a local pod.
    Inbound,
    /// Out of a local pod.
    Outbound,
}

impl Direction {
    /// `source` or `destination`.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Its address.
    pub addr: Option<SocketAddr>,
    /// The workload there.
    pub workload: Option<Arc<Workload>>,
    /// The identity proven in TLS.
    pub identity: Option<SpiffeId>,
}

/// See the module's header.
pub struct ConnRecord {
    metrics: Arc<Metrics>,
    direction: Direction,
    started: Instant,
    /// The client.
    pub source: Peer,
    /// The server.
    pub destination: Peer,
    /// Where the tunnel goes, on both sides.
    pub hbone: Option<SocketAddr>,
    /// The service that the client addressed.
    pub service: Option<Arc<Service>>,
    /// Trace id shared by the records of both nodes.
    pub trace: Option<String>,
    /// What policies would have said that are only tried.
    pub dry_run: Vec<DryRun>,
    /// Endpoints that were tried in vain before, and why.
    pub tried: Option<Box<str>>,
    /// What was asked of it because it leaves the cluster.
    pub left: Option<Box<Left>>,
    /// Bytes so far.
    pub counts: Rc<Counts>,
    opened: bool,
    finished: bool,
}

impl ConnRecord {
    /// Opens a record at accept.
    pub fn new(metrics: Arc<Metrics>, direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        let live = if direction == Direction::Inbound { &metrics.inbound } else { &metrics.outbound };
        live.inc();
        Self {
            metrics,
            direction,
            started: Instant::now(),
            source: Peer { addr: Some(source), ..Peer::default() },
            destination: Peer { addr: Some(destination), ..Peer::default() },
            hbone: None,
            service: None,
            trace: None,
            dry_run: Vec::new(),
            tried: None,
            left: None,
            counts: Rc::default(),
            opened: false,
            finished: false,
        }
    }

    /// Everything is known, and does not change any more: counts the connection as opened. Its labels are made anew at its
    /// end, so that an idle connection keeps none.
    pub fn opened(&mut self) {
        if !std::mem::replace(&mut self.opened, true) {
            self.metrics.opened.get_or_create(&self.make_labels()).inc();
            if let Some(kind) = self.plaintext() {
                self.metrics.callers.began(&kind, unix_now());
            }
        }
    }

    /// What it is to those who ask who reaches pods without an identity; `None` if it does not.
    fn plaintext(&self) -> Option<Kind> {
        if self.direction != Direction::Inbound || self.hbone.is_some() || self.source.identity.is_some() {
            return None;
        }
        let (from, to) = (self.source.addr?, self.destination.addr?);
        let workload = self.destination.workload.as_deref()?;
        Some(Kind::of(workload, to.port(), self.source.workload.as_deref(), from.ip()))
    }

    /// The one ending.
    pub fn finish(mut self, outcome: &Outcome) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: &Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        // It may have failed before anything was opened; both counters move, so that opened - closed stays the live ones.
        self.opened();
        let metrics = &self.metrics;
        if let Some(kind) = self.plaintext() {
            metrics.callers.ended(&kind, outcome.code.fault() == Fault::Policy, unix_now());
        }
        let live = if self.direction == Direction::Inbound { &metrics.inbound } else { &metrics.outbound };
        live.dec();
        let mut labels = self.make_labels();
        metrics.received.get_or_create(&labels).inc_by(self.counts.up.get());
        metrics.sent.get_or_create(&labels).inc_by(self.counts.down.get());
        labels.response_flags = outcome.code.flag();
        metrics.closed.get_or_create(&labels).inc();
        if outcome.code.flag() != "-" {
            metrics.failed.get_or_create(&labels).inc();
        }
        if outcome.code.fault() == Fault::Policy {
            let rule = outcome
                .rule
                .filter(|_| self.direction == Direction::Inbound)
                .map_or_else(String::new, |rule| rule.to_string());
            // The far proxy's word for a policy is for the log; as a label it could make any number of series.
            let own = self.direction == Direction::Inbound || outcome.code == Code::NetworkPolicyEgress;
            let policy = outcome.policy.clone().filter(|_| own).unwrap_or_default();
            let reporter = self.direction.reporter();
            let labels = DenialLabels { reporter, code: outcome.code.name(), policy, rule };
            metrics.denials.get_or_create(&labels).inc();
        }
        for said in self.dry_run.iter().chain(&outcome.dry_run) {
            self.metrics.without_effect(said);
        }
        if let Some(left) = &self.left {
            let labels = EgressLabels { namespace: left.namespace.clone(), verdict: left.verdict.word() };
            metrics.egress.get_or_create(&labels).inc();
            metrics.talks.ended(left, self.counts.up.get() + self.counts.down.get());
        }
        self.log(outcome);
    }

    fn log(&self, outcome: &Outcome) {
        let duration = format!("{}ms", self.started.elapsed().as_millis());
        let (source, destination) = (&self.source, &self.destination);
        let (up, down) = (self.counts.up.get(), self.counts.down.get());
        // Bytes sent and received by the local workload.
        let (sent, received) = if self.direction == Direction::Outbound { (up, down) } else { (down, up) };
        let ok = outcome.code.is_success();
        let left = self.left.as_deref();
        let (audited, tried) = DryRun::texts(self.dry_run.iter().chain(&outcome.dry_run));
        macro_rules! line {
            ($level:ident, $message:literal) => {
                tracing::$level!(
                    target: "access",
                    {
                    src.addr = source.addr.map(tracing::field::display),
                    src.workload = source.workload.as_deref().map(|w| &*w.name),
                    src.namespace = source.workload.as_deref().map(|w| &*w.namespace),
                    src.identity = source.identity.as_ref().map(tracing::field::display),
                    dst.addr = destination.addr.map(tracing::field::display),
                    dst.hbone_addr = self.hbone.map(tracing::field::display),
                    dst.service = self.service.as_deref().map(|s| &*s.hostname),
                    dst.workload = destination.workload.as_deref().map(|w| &*w.name),
                    dst.namespace = destination.workload.as_deref().map(|w| &*w.namespace),
                    dst.identity = destination.identity.as_ref().map(tracing::field::display),
                    direction = self.direction.word(),
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration,
                    trace = self.trace.as_deref(),
                    tried = self.tried.as_deref(),
                    egress = left.map(|left| left.verdict.word()),
                    egress.host = left.and_then(|left| left.host.as_deref()),
                    egress.spoken = left.map(|left| left.spoken),
                    egress.claimed = left.and_then(|left| left.claimed.as_deref()),
                    egress.request = left.and_then(|left| left.request.as_deref()),
                    egress.policy = left.and_then(|left| left.policy.as_deref()),
                    egress.rule = left.and_then(|left| left.rule),
                    code = (!ok).then(|| outcome.code.name()),
                    policy = outcome.policy.as_deref(),
                    rule = outcome.rule,
                    audit = (!audited.is_empty()).then(|| audited.join(", ")),
                    dry_run = (!tried.is_empty()).then(|| tried.join(", ")),
                    error = (!ok).then_some(&*outcome.detail)
                    },
                    $message
                )
            };
        }
        if ok {
            line!(info, "connection complete");
        } else if outcome.code.fault() == Fault::Mesh || outcome.code.fault() == Fault::Destination {
            line!(error, "connection failed");
        } else {
            line!(warn, "connection refused");
        }
    }

    fn make_labels(&self) -> TcpLabels {
        labels(self.direction, &self.source, &self.destination, self.service.as_deref())
    }
}

impl Drop for ConnRecord {
    fn drop(&mut self) {
        self.end(&Outcome::new(Code::Drained, "the proxy dropped the connection"));
    }
}

/// The labels of what goes on between two ends.
pub(super) fn labels(direction: Direction, source: &Peer, destination: &Peer, service: Option<&Service>) -> TcpLabels {
    let mutual = source.identity.is_some() && destination.identity.is_some();
    let (source, destination) = (WorkloadLabels::of(source), WorkloadLabels::of(destination));
    let name = |value: Option<&Arc<str>>| value.cloned().unwrap_or_else(unknown);
    TcpLabels {
        reporter: direction.reporter(),
        source_workload: source.workload,
        source_canonical_service: source.canonical.clone(),
        source_canonical_revision: source.revision.clone(),
        source_workload_namespace: source.namespace,
        source_principal: source.principal,
        source_app: source.canonical,
        source_version: source.revision,
        source_cluster: source.cluster,
        destination_service: name(service.map(|service| &service.hostname)),
        destination_service_namespace: name(service.map(|service| &service.namespace)),
        destination_service_name: name(service.map(|service| &service.name)),
        destination_workload: destination.workload,
        destination_canonical_service: destination.canonical.clone(),
        destination_canonical_revision: destination.revision.clone(),
        destination_workload_namespace: destination.namespace,
        destination_principal: destination.principal,
        destination_app: destination.canonical,
        destination_version: destination.revision,
        destination_cluster: destination.cluster,
        request_protocol: "tcp",
        response_flags: "-",
        connection_security_policy: if mutual { "mutual_tls" } else { "unknown" },
    }
}

struct WorkloadLabels {
    workload: Arc<str>,
    canonical: Arc<str>,
    revision: Arc<str>,
    namespace: Arc<str>,
    principal: Arc<str>,
    cluster: Arc<str>,
}

impl WorkloadLabels {
    fn of(peer: &Peer) -> Self {
        let workload = peer.workload.as_deref();
        let text = |value: Option<&Arc<str>>| value.filter(|text| !text.is_empty()).cloned().unwrap_or_else(unknown);
        Self {
            workload: text(workload.map(|w| &w.workload_name)),
            canonical: text(workload.map(|w| &w.canonical_name)),
            revision: text(workload.map(|w| &w.canonical_revision)),
            namespace: text(workload.map(|w| &w.namespace)),
            principal: peer.identity.as_ref().map_or_else(unknown, SpiffeId::shared),
            cluster: text(workload.map(|w| &w.cluster)),
        }
    }
}

fn unknown() -> Arc<str> {
    thread_local!(static UNKNOWN: Arc<str> = Arc::from("unknown"));
    UNKNOWN.with(Arc::clone)
}
