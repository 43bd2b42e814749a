//! One connection, several endpoints: decide and dial again where a service has another endpoint and nothing has been
//! delivered yet.
//!
//! An endpoint is left only when the destination's application cannot have seen a byte: its port refused or did not
//! answer, the tunnel was not opened, or the proxy there said that the application did not take the connection. A refusal
//! by policy is an answer and stands. A connection to a pod's own address has no other endpoint. All attempts decide on one
//! snapshot, and each passes the same rules.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::net::TcpStream;

use crate::flow::{LocalPod, Shared};
use crate::hbone::client::Patience;
use crate::hbone::pool::Pool;
use crate::lb::outlier::Seen;
use crate::lb::{Chance, Failing, Kind};
use crate::outbound::breaker::{Lasting, Toward};
use crate::outbound::decide::{Plan, choose, is_outside, permit};
use crate::outbound::dial;
use crate::outbound::egress::Leave;
use crate::outcome::{Code, Outcome};
use crate::relay::early::Said;
use crate::state::{Service, Snapshot, Workload};
use crate::telemetry::ConnRecord;
use crate::telemetry::metrics::ElsewhereLabels;

/// Most endpoints tried for one connection: with half of a large service down, one in 32 connections runs out, and that
/// only until the worker has learnt which ones are down.
pub(super) const MOST: usize = 5;

/// After this, no further endpoint is tried: the client has waited for what it would have waited for one.
pub(super) const LONGEST: Duration = Duration::from_secs(10);

/// How long an endpoint is waited for that others can stand in for. A lost SYN is sent again after a second, and another
/// endpoint is the better answer to it.
pub(super) const SHORT: Patience = Patience { connect: Duration::from_secs(1), refused: Duration::ZERO };

/// What attempts are made with.
#[derive(Clone, Copy)]
pub(super) struct Attempts<'a> {
    pub(super) shared: &'a Shared,
    pub(super) pool: &'a Rc<Pool>,
    pub(super) failing: &'a RefCell<Failing>,
    pub(super) pod: &'a Arc<LocalPod>,
}

/// A next hop that is there.
pub(super) enum Next {
    /// A stream of a tunnel.
    Tunnel(dial::Stream),
    /// A connection. `outside`: it leads out of the cluster.
    Plain {
        /// The connection.
        server: TcpStream,
        /// It leads out of the cluster.
        outside: bool,
    },
    /// A connection out of the cluster, from the node, that a rule lets out.
    Outside {
        /// The connection.
        server: TcpStream,
        /// What lets it out.
        leave: Box<Leave>,
    },
}

/// An attempt that failed.
pub(super) struct Failure {
    /// How.
    pub(super) outcome: Outcome,
    /// The application cannot have seen anything, and another endpoint may do better.
    pub(super) elsewhere: bool,
}

impl Failure {
    /// Another endpoint cannot help, or must not be asked.
    pub(super) fn last(outcome: Outcome) -> Self {
        Self { outcome, elsewhere: false }
    }
}

impl Attempts<'_> {
    /// Decides and dials until a next hop is there or none is left. What a traffic policy counts lasts as long as the third.
    ///
    /// # Errors
    /// How the last attempt failed.
    pub(super) async fn reach(
        self,
        snapshot: &Snapshot,
        source: &Workload,
        destination: SocketAddr,
        tcp: &TcpStream,
        record: &mut ConnRecord,
    ) -> Result<(Next, SocketAddr, Option<Box<Lasting>>), Outcome> {
        let toward = Toward::of_connection(self.shared, self.pod, snapshot, source, destination);
        let toward = toward.as_ref();
        record.service = toward.map(|toward| toward.service.clone());
        let choose = |tried: &[SocketAddr]| self.choose(snapshot, source, destination, tried, toward);
        self.reach_by(snapshot, source, (destination.port(), toward), choose, tcp, record).await
    }

    /// The same where `choose` decides, told what was tried, for a connection to `port` of a Service, under the traffic
    /// policy that there may be.
    ///
    /// # Errors
    /// How the last attempt failed.
    pub(super) async fn reach_by(
        self,
        snapshot: &Snapshot,
        source: &Workload,
        (port, toward): (u16, Option<&Rc<Toward>>),
        choose: impl Fn(&[SocketAddr]) -> Result<Plan, Outcome>,
        tcp: &TcpStream,
        record: &mut ConnRecord,
    ) -> Result<(Next, SocketAddr, Option<Box<Lasting>>), Outcome> {
        let begin = Instant::now();
        let mut held = toward.map(|toward| toward.take(&toward.live(), Kind::Connections)).transpose()?;
        let limit = toward.and_then(|toward| toward.settings()?.connect_timeout);
        let mut tried: Vec<SocketAddr> = Vec::new();
        let mut said = Said::new(&self.pod.buffers);
        let mut last = None;
        loop {
            let plan = match choose(&tried) {
                Ok(plan) => plan,
                // What a real attempt met says more than that nothing else is left.
                Err(outcome) => return Err(last.unwrap_or(outcome)),
            };
            record.service = plan.service().cloned();
            record.destination.workload = plan.destination().cloned();
            permit(snapshot, source, &plan).map_err(|outcome| last.take().unwrap_or(outcome))?;
            let others = plan.others() && tried.len() + 1 < MOST && begin.elapsed() < LONGEST;
            let patience = if others { SHORT } else { self.shared.hbone.patience() };
            let endpoint = plan.endpoint();
            let passage = match toward.map(|toward| toward.enter(&plan)) {
                None => None,
                Some(Some(passage)) => Some(passage),
                Some(None) => {
                    tried.push(endpoint);
                    continue;
                }
            };
            let result = dial::within(limit, async {
                match &plan {
                    Plan::Hbone(plan) => {
                        // A policy wants to know whether the application took the connection.
                        let waits = plan.others || !said.is_nothing() || passage.is_some();
                        let kept = waits.then_some(&mut said);
                        dial::tunnel(self, tcp, source, plan, patience, kept, record).await.map(Next::Tunnel)
                    }
                    Plan::Plain(plan) => {
                        record.hbone = None;
                        let outside = is_outside(plan.service.as_deref(), plan.destination.as_deref());
                        dial::plain(self.pod, plan, patience, &said).await.map(|server| Next::Plain { server, outside })
                    }
                }
            });
            match result.await {
                Ok(next) => {
                    self.reached(&plan, port);
                    let counted = passage.zip(held.take());
                    let lasting = counted.map(|(passage, held)| {
                        passage.saw(Seen::Served);
                        Lasting::new(held, passage, &record.counts)
                    });
                    return Ok((next, endpoint, lasting));
                }
                Err(Failure { outcome, elsewhere }) => {
                    if let Some(passage) = passage.filter(|_| elsewhere) {
                        passage.saw(Seen::Lost { late: outcome.code == Code::ConnectTimeout });
                    }
                    if elsewhere && plan.service().is_some() {
                        self.failing.borrow_mut().failed(endpoint, Instant::now());
                    }
                    if !elsewhere || !others {
                        return Err(outcome);
                    }
                    self.note(record, endpoint, &outcome);
                    tried.push(endpoint);
                    last = Some(outcome);
                }
            }
        }
    }

    fn choose(
        self,
        snapshot: &Snapshot,
        source: &Workload,
        destination: SocketAddr,
        tried: &[SocketAddr],
        toward: Option<&Rc<Toward>>,
    ) -> Result<Plan, Outcome> {
        let decide = |chance: &Chance<'_>| choose(snapshot, source, &self.shared.network, destination, chance);
        match toward {
            None => self.with_chance(tried, decide),
            Some(toward) => toward.with_chance(self, tried, toward.key_of_connection(), decide),
        }
    }

    /// Calls `then` with the worker's experience.
    pub(super) fn with_chance<T>(self, tried: &[SocketAddr], then: impl FnOnce(&Chance<'_>) -> T) -> T {
        let failing = self.failing.borrow();
        let now = Instant::now();
        let bound = |service: &Service, port: u16| {
            self.pod.bound.lock().unwrap_or_else(PoisonError::into_inner).get(&service.key(), port, now)
        };
        then(&Chance {
            pod: &self.pod.uid,
            tried,
            failing: &|endpoint| failing.is(endpoint, now),
            bound: &bound,
            ..Chance::of(rand::rng().random())
        })
    }

    /// The endpoint of `plan` took the connection.
    pub(super) fn reached(self, plan: &Plan, port: u16) {
        if plan.others() {
            self.failing.borrow_mut().reached(plan.endpoint());
        }
        if let (Some(service), Some(endpoint)) = (plan.service(), plan.destination())
            && let Some(timeout) = service.lb.affinity
            && !matches!(plan, Plan::Hbone(plan) if plan.through)
        {
            let mut bound = self.pod.bound.lock().unwrap_or_else(PoisonError::into_inner);
            bound.bind(&service.key(), port, endpoint.uid.clone(), timeout, Instant::now());
        }
    }

    /// An endpoint is left for another one.
    fn note(self, record: &mut ConnRecord, endpoint: SocketAddr, outcome: &Outcome) {
        self.shared.metrics.elsewhere.get_or_create(&ElsewhereLabels { code: outcome.code.name() }).inc();
        let before = record.tried.as_deref().map(|before| format!("{before}, ")).unwrap_or_default();
        record.tried = Some(format!("{before}{endpoint} {}", outcome.code.name()).into());
        tracing::debug!(%endpoint, %outcome, "endpoint left for another one");
    }
}

/// Whether a tunnel that could not be opened may be tried at another endpoint. Nothing was sent.
pub(super) fn not_opened(outcome: Outcome) -> Failure {
    let elsewhere = matches!(
        outcome.code,
        Code::ConnectFailed | Code::ConnectTimeout | Code::TlsFailed | Code::WrongIdentity | Code::TunnelFailed
    );
    Failure { outcome, elsewhere }
}
