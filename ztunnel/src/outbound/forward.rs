//! Sending a request to a backend: an endpoint, a connection to it, the answer's head, and again where the route says so.
//!
//! An endpoint that cannot be reached is left for another one as with any connection (`attempts`); that is no retry. A
//! retry of the route happens only for what `http::retry` allows, within the budget, and with a body that was kept whole.
//! One more attempt is made unasked: a connection that waited may be closed by its server in the moment in which it is used.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{Request, Response};
use hyper::body::Incoming;
use rand::RngExt as _;
use tokio::time::{Instant, sleep, timeout_at};

use crate::base::cut::Cut;
use crate::http::client::{Conn, Failed};
use crate::http::pool::Key;
use crate::http::reply;
use crate::http::retry::{Tried, is_idempotent, may_repeat, pause};
use crate::http::server::{Switch, Switches};
use crate::http::{Body, End, Original};
use crate::outbound::ask::Known;
use crate::outbound::attempts::{Failure, LONGEST, MOST, SHORT};
use crate::outbound::decide::{Plan, permit, to_service};
use crate::outbound::dial;
use crate::outbound::exchange::Refused;
use crate::outbound::recheck::Left;
use crate::outbound::requests::Client;
use crate::outbound::{forbidden, stopped};
use crate::outcome::{Code, Outcome};
use crate::route::Forward;
use crate::state::{Retry, Service, Workload};
use crate::telemetry::HttpRecord;

/// Copies of requests of one client connection that are under way: a mirror that is slow loses copies and nothing else.
const MIRRORED: usize = 16;

/// How long a copy may take altogether.
const MIRROR_TIME: Duration = Duration::from_secs(15);

/// A port of a Service.
pub(super) struct Target {
    pub(super) service: Arc<Service>,
    /// One of its addresses, or one of the family that is preferred, and the port.
    pub(super) at: SocketAddr,
    /// What the request is decided on.
    pub(super) known: Known,
}

/// One request to be sent.
pub(super) struct Job<'a> {
    pub(super) client: &'a Client,
    pub(super) to: Target,
    pub(super) parts: Parts,
    pub(super) original: Original,
    /// It asks for another protocol.
    pub(super) switch: bool,
    /// Somebody else needs the body afterwards.
    pub(super) keep: bool,
    pub(super) retry: Option<&'a Retry>,
    /// For all attempts together, answer included.
    pub(super) deadline: Option<Instant>,
    /// For each.
    pub(super) attempt: Option<Duration>,
}

/// The head of an answer, and what it came on.
struct Got {
    response: Response<Incoming>,
    conn: Conn,
    key: Key,
    deadline: Option<Instant>,
}

/// An attempt without an answer.
struct Missed {
    tried: Tried,
    /// On a connection that had waited.
    reused: bool,
    refused: Refused,
}

impl Missed {
    fn final_(refused: impl Into<Refused>) -> Self {
        Self { tried: Tried::Answered(http::StatusCode::OK), reused: false, refused: refused.into() }
    }
}

impl Job<'_> {
    /// Sends it until there is an answer to pass on.
    pub(super) async fn run(self, switches: Switches, record: &mut HttpRecord) -> Result<Response<Body>, Refused> {
        let (service, port) = (&self.to.service, self.to.at.port());
        let policy = self.to.known.snapshot.traffic_for(service, port, &self.to.known.source.namespace);
        let settings = policy.map(|(_, settings)| settings);
        let active = match settings.and_then(|settings| settings.max_requests) {
            None => None,
            Some(most) => {
                let limits = &self.client.shared.limits;
                let active = limits.request(&self.client.pod.uid, &service.hostname, port, most);
                Some(active.ok_or_else(|| {
                    let text = format!("{most} requests of the pod to {}:{port} are under way", service.hostname);
                    Refused::from(Outcome::new(Code::Overflow, text))
                })?)
            }
        };
        let most_retries = settings.and_then(|settings| settings.max_retries);
        let budget = self.client.means.budget(&self.client.pod.uid, &self.to.service, self.to.at.port());
        let counted = budget.request();
        if self.retry.is_none() && !self.keep {
            self.original.last();
        }
        let (mut retries, mut fresh) = (0, false);
        let mut avoid = Vec::new();
        let mut held = Vec::new();
        let got = loop {
            record.attempts += 1;
            let result = self.try_once(fresh, &avoid, record).await;
            let again = |tried| self.may_again(tried, retries);
            let missed = match result {
                Ok(got) => {
                    if !again(Tried::Answered(got.response.status())) {
                        break got;
                    }
                    let Some(counted) = budget.retry(most_retries) else { break got };
                    held.push(counted);
                    avoid.push(got.key.endpoint);
                    None
                }
                Err(missed) => Some(missed),
            };
            if let Some(missed) = missed {
                let lost = missed.tried == Tried::Lost && is_idempotent(&self.parts.method);
                if missed.reused && !fresh && (lost || missed.tried == Tried::Unreached) && self.original.is_kept() {
                    fresh = true;
                    continue;
                }
                let counted = if again(missed.tried) { budget.retry(most_retries) } else { None };
                let Some(counted) = counted else { return Err(missed.refused) };
                held.push(counted);
            }
            retries += 1;
            let least = self.retry.map_or(Duration::ZERO, |retry| retry.backoff);
            sleep(pause(least, retries, rand::rng().random())).await;
        };
        drop(held);
        Ok(self.pass_on(got, switches, record).map(|body| body.hold(counted).hold(active)))
    }

    fn may_again(&self, tried: Tried, retries: u32) -> bool {
        let late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        self.retry.is_some_and(|retry| {
            retries < retry.attempts
                && !late
                && self.original.is_kept()
                && may_repeat(tried, &self.parts.method, &retry.codes, retry.any_method)
        })
    }

    /// One attempt, at the first endpoint that can be reached.
    async fn try_once(&self, fresh: bool, avoid: &[SocketAddr], record: &mut HttpRecord) -> Result<Got, Missed> {
        let own = self.attempt.map(|time| Instant::now() + time);
        let deadline = [self.deadline, own].into_iter().flatten().min();
        let attempt = async {
            let (conn, key, reused) = self.connected(fresh, avoid, record).await?;
            self.send(conn, key, reused, deadline, record).await
        };
        let Some(at) = deadline else { return attempt.await };
        timeout_at(at, attempt).await.unwrap_or_else(|_| {
            let text = "the backend did not answer in the time that the route gives";
            let refused = Refused::new(reply::TIMEOUT, Code::RequestTimeout, text);
            Err(Missed { tried: Tried::Late, reused: false, refused })
        })
    }

    async fn send(
        &self,
        mut conn: Conn,
        key: Key,
        reused: bool,
        deadline: Option<Instant>,
        record: &mut HttpRecord,
    ) -> Result<Got, Missed> {
        let count = record.request_bytes.clone();
        let body = Body::from(self.original.attempt()).until(deadline).then(move |ended| count.set(ended.bytes));
        let request = Request::from_parts(self.parts.clone(), body);
        match conn.send(request, self.switch).await {
            Ok(response) => Ok(Got { response, conn, key, deadline }),
            Err(Failed { unsent, outcome }) => {
                let tried = if unsent.is_some() { Tried::Unreached } else { Tried::Lost };
                Err(Missed { tried, reused, refused: outcome.into() })
            }
        }
    }

    /// A connection to an endpoint; true: it was used before.
    async fn connected(
        &self,
        fresh: bool,
        avoid: &[SocketAddr],
        record: &mut HttpRecord,
    ) -> Result<(Conn, Key, bool), Missed> {
        let (client, begin) = (self.client, Instant::now());
        let mut tried: Vec<SocketAddr> = avoid.to_vec();
        let mut failures = 0;
        let mut last: Option<Outcome> = None;
        loop {
            let plan = match self.choose(&tried) {
                Ok(plan) => plan,
                Err(_) if failures == 0 && !tried.is_empty() => {
                    // A retry would rather go elsewhere, but there is only this one.
                    tried.clear();
                    continue;
                }
                Err(outcome) => return Err(self.unreached(last.unwrap_or(outcome))),
            };
            permit(&self.to.known.snapshot, &self.to.known.source, &plan).map_err(Missed::final_)?;
            record.destination.workload = plan.destination().cloned();
            record.destination.addr = Some(plan.endpoint());
            let key = self.key(&plan);
            let waiting = if fresh || self.switch { None } else { client.means.connections.take(&key) };
            if let Some(conn) = waiting {
                prove(record, &self.to.known.source, &conn);
                return Ok((conn, key, true));
            }
            let others = plan.others() && failures + 1 < MOST && begin.elapsed() < LONGEST;
            match self.open(&plan, &key, others).await {
                Ok(conn) => {
                    prove(record, &self.to.known.source, &conn);
                    client.attempts().reached(&plan, self.to.at.port());
                    return Ok((conn, key, false));
                }
                Err(Failure { outcome, elsewhere }) => {
                    if !elsewhere {
                        return Err(Missed::final_(outcome));
                    }
                    let endpoint = plan.endpoint();
                    client.means.failing.borrow_mut().failed(endpoint, std::time::Instant::now());
                    if !others {
                        return Err(self.unreached(outcome));
                    }
                    failures += 1;
                    tried.push(endpoint);
                    last = Some(outcome);
                }
            }
        }
    }

    fn unreached(&self, outcome: Outcome) -> Missed {
        Missed { tried: Tried::Unreached, reused: false, refused: outcome.into() }
    }

    fn choose(&self, tried: &[SocketAddr]) -> Result<Plan, Outcome> {
        self.client.attempts().with_chance(tried, |chance| {
            to_service(&self.to.known.snapshot, &self.to.known.source, &self.to.service, self.to.at, chance)
        })
    }

    fn key(&self, plan: &Plan) -> Key {
        let identities = match plan {
            Plan::Hbone(plan) => Some((self.to.known.source.identity.clone(), plan.believed())),
            Plan::Plain(_) => None,
        };
        let (pod, framing) = (self.client.pod.uid.clone(), self.client.framing);
        let asked = match plan {
            Plan::Hbone(plan) if plan.through => Some(plan.asks_for()),
            _ => None,
        };
        Key { pod, endpoint: plan.endpoint(), asked, identities, framing }
    }

    async fn open(&self, plan: &Plan, key: &Key, others: bool) -> Result<Conn, Failure> {
        let client = self.client;
        let connections = &client.means.connections;
        let opening = connections.opening(key);
        // Streams of many requests share a connection, so a burst of them opens one.
        let _one = if key.framing == crate::http::Framing::Two { Some(opening.lock().await) } else { None };
        if _one.is_some()
            && let Some(conn) = connections.take(key)
        {
            return Ok(conn);
        }
        let held = client.pod.connection(&client.pod.outbound).map_err(Failure::last)?;
        let patience = if others { SHORT } else { client.shared.hbone.patience() };
        let (io, peer, order) =
            dial::connection(client.attempts(), client.addr, &self.to.known.source, plan, patience).await?;
        // What else had to be asked for is held by the client's own connection.
        let leases = self.to.known.leases.clone();
        let left = Left { pod: client.pod.clone(), target: plan.endpoint(), leases };
        let registration = client.means.live.register_decided(left, &client.shared.reader);
        let outside = plan.destination().is_none_or(|workload| !workload.is_pod());
        let (pod, shared) = (client.pod.clone(), client.shared.clone());
        let stop = async move {
            let outcome = tokio::select! {
                outcome = stopped(&pod, &registration) => outcome,
                outcome = ordered(order) => outcome,
                outcome = forbidden(&shared, &pod), if outside => outcome,
            };
            tracing::debug!(%outcome, "a connection for requests is cut");
            drop(held);
        };
        let conn = Conn::begin(io, key.framing, peer, stop).await.map_err(Failure::last)?;
        if let Conn::Two(two) = &conn {
            connections.share(key, two.clone());
        }
        Ok(conn)
    }

    /// The answer as the client gets it. Its connection waits for the next request once it was read.
    fn pass_on(&self, got: Got, switches: Switches, record: &mut HttpRecord) -> Response<Body> {
        let Got { response, conn, key, deadline } = got;
        let (mut parts, incoming) = response.into_parts();
        let switched = parts.status == http::StatusCode::SWITCHING_PROTOCOLS;
        let protocol = parts.headers.get(http::header::UPGRADE).cloned().filter(|_| switched);
        crate::http::headers::strip_hop(&mut parts.headers, protocol.as_ref());
        parts.version = http::Version::HTTP_11;
        if switched {
            if let Conn::One(one) = conn {
                *switches.borrow_mut() = Some(Switch { server: one.into_raw(), held: Box::new(()) });
            }
            return Response::from_parts(parts, Body::empty());
        }
        record.grpc_status = crate::http::grpc_status(&parts.headers);
        let stream = conn.stream();
        let connections = Rc::downgrade(&self.client.means.connections);
        let policy =
            self.to.known.snapshot.traffic_for(&self.to.service, self.to.at.port(), &self.to.known.source.namespace);
        let uses = policy.and_then(|(_, settings)| settings.max_requests_per_connection).unwrap_or(u32::MAX);
        let body = Body::from(incoming).until(deadline).then(move |ended| {
            drop(stream);
            if let (End::Complete, Conn::One(one), Some(connections)) = (&ended.end, conn, connections.upgrade())
                && one.uses < uses
            {
                connections.give_back(key, one);
            }
        });
        Response::from_parts(parts, body)
    }
}

async fn ordered(order: Option<Rc<Cut<Outcome>>>) -> Outcome {
    match order {
        Some(order) => order.ordered().await,
        None => std::future::pending().await,
    }
}

/// Both ends of a tunnel are proven.
fn prove(record: &mut HttpRecord, source: &Workload, conn: &Conn) {
    record.destination.identity = conn.peer().cloned();
    record.source.identity = conn.peer().map(|_| source.identity.clone());
}

impl Client {
    /// Sends copies, as soon as the body has passed if there is one. Nobody waits for them.
    pub(super) fn mirror(self: &Rc<Self>, known: &Known, forward: &Forward, parts: &Parts, original: &Original) {
        for mirror in forward.mirrors() {
            if self.copies.get() >= MIRRORED {
                tracing::debug!(service = %mirror.service.hostname, "a mirror is too slow; a copy is left out");
                continue;
            }
            self.copies.set(self.copies.get() + 1);
            let (client, snapshot, source) = (self.clone(), known.snapshot.clone(), known.source.clone());
            let (mirror, parts, original) = (mirror.clone(), parts.clone(), original.clone());
            crate::base::workers::spawn(async move {
                let copy = async {
                    // Asked for here, so that the request itself does not wait for it.
                    let Ok(to) = client.target(&snapshot, &source, &mirror.service, mirror.port).await else { return };
                    client.copy(to, parts, original).await;
                };
                let _ = tokio::time::timeout(MIRROR_TIME, copy).await;
                client.copies.set(client.copies.get() - 1);
            });
        }
    }

    async fn copy(&self, to: Target, parts: Parts, original: Original) {
        let Some(body) = original.passed().await else { return };
        let mut record = self.empty_record(&to.known.snapshot);
        record.attempts = 1;
        let job = Job {
            client: self,
            to,
            parts,
            original: Original::of(body),
            switch: false,
            keep: false,
            retry: None,
            deadline: Some(Instant::now() + MIRROR_TIME),
            attempt: None,
        };
        let Ok(response) = job.run(Switches::default(), &mut record).await else { return };
        record.answered(response.status().as_u16());
        // Read and forgotten, so that the connection can be used again.
        let mut body = response.into_body();
        while let Some(Ok(_)) = http_body_util::BodyExt::frame(&mut body).await {}
    }
}
