//! Sending a request to a backend: an endpoint, a connection to it, the answer's head, and again where the route says so.
//!
//! An endpoint that cannot be reached is left for another one as with any connection (`attempts`); that is no retry. A
//! retry of the route happens only for what `http::retry` allows, within the budget, and with a body that was kept whole.
//! Unasked, and counted in no budget, a request is sent anew that nobody has read, or that was lost with a connection that
//! waited: its server may close it in the moment in which it is used (RFC 9110 §9.2.2, RFC 9112 §9.3.1, RFC 9113 §8.7).
//! How endpoints are chosen and what limits hold is the traffic policy's (`breaker`).

use std::cell::{Cell, RefCell};
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
use crate::http::headers::{self, check_answer, strip_hop};
use crate::http::pool::{IDLE, Key};
use crate::http::reply::{self, Reply};
use crate::http::retry::{Tried, is_idempotent, may_repeat, pause};
use crate::http::server::{Switches, switch_to};
use crate::http::{Body, End, Framing, Original};
use crate::lb::outlier::Seen;
use crate::lb::{Chance, Held, Kind, Live};
use crate::outbound::ask::Known;
use crate::outbound::attempts::{Failure, LONGEST, MOST, SHORT};
use crate::outbound::breaker::{Passage, Toward};
use crate::outbound::decide::{Plan, is_outside, permit, to_service};
use crate::outbound::dial;
use crate::outbound::exchange::Refused;
use crate::outbound::recheck::Left;
use crate::outbound::requests::Client;
use crate::outbound::room::{Room, retry, squeezed};
use crate::outbound::{forbidden, stopped};
use crate::outcome::{Code, Outcome};
use crate::state::{Retry, Service, TrafficSettings, Workload};
use crate::telemetry::HttpRecord;

/// How often a request that nobody has read is sent anew: a server that closes each connection has another reason.
const MOST_ANEW: u32 = 4;

/// A port of a Service.
pub(super) struct Target {
    pub(super) service: Arc<Service>,
    /// One of its addresses, or one of the family that is preferred, and the port.
    pub(super) at: SocketAddr,
    /// How it is used. None: a waypoint decides.
    pub(super) toward: Option<Rc<Toward>>,
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
    /// What chooses the endpoint, where a policy says so.
    pub(super) hash: Option<u64>,
    /// Uid of the endpoint that the client's session is with.
    pub(super) session: Option<Arc<str>>,
}

/// The head of an answer, and what it came on.
struct Got {
    response: Response<Incoming>,
    conn: Conn,
    key: Key,
    passage: Option<Passage>,
    deadline: Option<Instant>,
}

/// The use of an endpoint that is under way; whoever ends it takes it out.
type UnderWay = RefCell<Option<Passage>>;

/// An attempt without an answer.
struct Missed {
    tried: Tried,
    /// Nobody has read the request, or the connection had waited and was closed by its server: sent anew, it is no retry.
    anew: bool,
    refused: Refused,
}

impl Missed {
    fn final_(refused: impl Into<Refused>) -> Self {
        Self { tried: Tried::Answered(http::StatusCode::OK), anew: false, refused: refused.into() }
    }
}

impl Job<'_> {
    /// Sends it until there is an answer to pass on.
    pub(super) async fn run(mut self, switches: Switches, record: &mut HttpRecord) -> Result<Response<Body>, Refused> {
        let toward = self.to.toward.clone();
        let live = self.live();
        let active = match &toward {
            Some(toward) => Some(toward.take(&live, Kind::Requests)?),
            None => live.take(Kind::Requests, None),
        };
        let interval = self.settings().and_then(|settings| settings.retry_budget?.interval);
        if let Some(interval) = interval {
            live.begins(interval, std::time::Instant::now());
        }
        let mut cookie = None;
        if let Some(toward) = &toward {
            (self.hash, cookie) = toward.key_of_request(&self.parts, self.client.addr.ip());
        }
        let retry = || retry(&live, toward.as_ref());
        let (mut retries, mut sent_anew) = (0, 0);
        let mut avoid = Vec::new();
        let mut held = Vec::new();
        let got = loop {
            record.attempts += 1;
            let result = self.try_once(sent_anew > 0, &avoid, record).await;
            let again = |tried| self.may_again(tried, retries);
            let missed = match result {
                Ok(got) => {
                    if !again(Tried::Answered(got.response.status())) {
                        break got;
                    }
                    let Some(counted) = retry() else { break got };
                    held.push(counted);
                    avoid.push(got.key.endpoint);
                    None
                }
                Err(missed) => Some(missed),
            };
            if let Some(missed) = missed {
                if let Some(code) = self.original.failed() {
                    let flag = if code == Code::ClientReset { "DC" } else { reply::BAD_REQUEST.flag };
                    let reply = Reply { flag, ..reply::BAD_REQUEST };
                    return Err(Refused::new(reply, code, "the body of the request broke off"));
                }
                if missed.anew && sent_anew < MOST_ANEW && self.original.is_kept() {
                    sent_anew += 1;
                    continue;
                }
                let counted = if again(missed.tried) { retry() } else { None };
                let Some(counted) = counted else { return Err(missed.refused) };
                held.push(counted);
            }
            retries += 1;
            let least = self.retry.map_or(Duration::ZERO, |retry| retry.backoff);
            sleep(pause(least, retries, rand::rng().random())).await;
        };
        drop(held);
        let mut response = self.pass_on(got, active, switches, record);
        if let Some(cookie) = cookie {
            response.headers_mut().append(http::header::SET_COOKIE, cookie);
        }
        Ok(response)
    }

    /// What the pod has under way there.
    fn live(&self) -> Arc<Live> {
        match &self.to.toward {
            Some(toward) => toward.live(),
            None => {
                let known = self.client.shared.destinations.of(&self.to.service, self.to.at.port());
                known.live(&self.client.pod.uid)
            }
        }
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
        let under_way = UnderWay::default();
        let attempt = async {
            let (conn, key, reused) = self.connected(fresh, avoid, record, &under_way).await?;
            self.send(conn, key, reused, deadline, record, &under_way).await
        };
        let Some(at) = deadline else { return attempt.await };
        timeout_at(at, attempt).await.unwrap_or_else(|_| {
            if let Some(passage) = under_way.take() {
                passage.saw(Seen::Lost { late: true });
            }
            let text = "the backend did not answer in the time that the route gives";
            let refused = Refused::new(reply::TIMEOUT, Code::RequestTimeout, text);
            Err(Missed { tried: Tried::Late, anew: false, refused })
        })
    }

    async fn send(
        &self,
        mut conn: Conn,
        key: Key,
        reused: bool,
        deadline: Option<Instant>,
        record: &mut HttpRecord,
        under_way: &UnderWay,
    ) -> Result<Got, Missed> {
        if !reused && self.retry.is_none() && !self.keep {
            self.original.last();
        }
        let count = record.request_bytes.clone();
        let body = Body::from(self.original.attempt()).until(deadline).then(move |ended| count.set(ended.bytes));
        let request = Request::from_parts(self.parts.clone(), body);
        if let Some(passage) = &*under_way.borrow() {
            passage.sent();
        }
        let sent = conn.send(request, self.switch).await;
        let passage = under_way.take();
        let saw = |seen| {
            if let Some(passage) = &passage {
                passage.saw(seen)
            }
        };
        match sent {
            Ok(mut response) => {
                if let Err(error) = check_answer(response.headers_mut()) {
                    saw(Seen::Lost { late: false });
                    let text = format!("the backend's answer: {}", error.0);
                    return Err(Missed::final_(Refused::new(reply::PROTOCOL, Code::ServerReset, text)));
                }
                if let Some(passage) = &passage {
                    passage.answered(response.status(), response.headers(), headers::is_grpc(&self.parts.headers));
                }
                Ok(Got { response, conn, key, passage, deadline })
            }
            Err(Failed { unoffered: true, outcome, .. }) => {
                Err(Missed::final_(Refused { reply: reply::NO_CONNECT, outcome: Box::new(outcome) }))
            }
            Err(Failed { unsent, malformed, outcome, .. }) => {
                // A connection that waited may have ended by itself, and a body may break off at the client: neither says
                // anything of the endpoint.
                if (!reused || malformed) && self.original.failed().is_none() {
                    saw(Seen::Lost { late: false });
                }
                let tried = if unsent { Tried::Unreached } else { Tried::Lost };
                let anew = unsent || (reused && !malformed && is_idempotent(&self.parts.method));
                let refused = Refused::from(outcome);
                let refused = if malformed { Refused { reply: reply::PROTOCOL, ..refused } } else { refused };
                Err(Missed { tried, anew, refused })
            }
        }
    }

    /// A connection to an endpoint; true: it was used before.
    async fn connected(
        &self,
        fresh: bool,
        avoid: &[SocketAddr],
        record: &mut HttpRecord,
        under_way: &UnderWay,
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
            let endpoint = plan.endpoint();
            let passage = match self.to.toward.as_ref().map(|toward| toward.enter(&plan)) {
                None => None,
                Some(Some(passage)) => Some(passage),
                // Somebody else began to try it in this moment, so it is not chosen again.
                Some(None) => continue,
            };
            record.destination.workload = plan.destination().cloned();
            record.destination.addr = Some(endpoint);
            let key = self.key(&plan);
            // One that many share says of itself when it is closing; one that waits may be as dead as the one before.
            let as_dead = fresh && key.framing == Framing::One;
            // Another protocol takes a connection for itself, or a stream of one that is shared.
            let may_reuse = (!self.switch || key.framing == Framing::Two) && !as_dead;
            let (held, pending) = match self.room(&key, may_reuse).await.map_err(Missed::final_)? {
                Room::Waited(conn) => {
                    under_way.replace(passage);
                    prove(record, &self.to.known.source, &conn);
                    return Ok((conn, key, true));
                }
                Room::New { held, pending } => (held, pending),
            };
            under_way.replace(passage);
            let others = plan.others() && failures + 1 < MOST && begin.elapsed() < LONGEST;
            let opened = self.open(&plan, &key, others, held).await;
            drop(pending);
            match opened {
                Ok((conn, used)) => {
                    if let Some(passage) = &*under_way.borrow() {
                        passage.saw(Seen::Connected);
                    }
                    prove(record, &self.to.known.source, &conn);
                    client.attempts().reached(&plan, self.to.at.port());
                    return Ok((conn, key, used));
                }
                Err(Failure { outcome, elsewhere }) => {
                    if let Some(passage) = under_way.take().filter(|_| elsewhere) {
                        passage.saw(Seen::Lost { late: outcome.code == Code::ConnectTimeout });
                    }
                    if !elsewhere {
                        return Err(Missed::final_(outcome));
                    }
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
        Missed { tried: Tried::Unreached, anew: false, refused: outcome.into() }
    }

    fn choose(&self, tried: &[SocketAddr]) -> Result<Plan, Outcome> {
        let decide = |chance: &Chance<'_>| {
            let chance = Chance { session: self.session.as_deref(), ..*chance };
            to_service(&self.to.known.snapshot, &self.to.known.source, &self.to.service, self.to.at, &chance)
        };
        let attempts = self.client.attempts();
        match &self.to.toward {
            None => attempts.with_chance(tried, decide),
            Some(toward) => toward.with_chance(attempts, tried, self.hash, decide),
        }
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
        let pings = self.settings().filter(|_| framing == Framing::Two).and_then(|settings| settings.pings);
        Key { pod, endpoint: plan.endpoint(), asked, identities, framing, pings }
    }

    /// A new connection, or one that somebody else has opened meanwhile (true).
    async fn open(&self, plan: &Plan, key: &Key, others: bool, room: Option<Held>) -> Result<(Conn, bool), Failure> {
        let client = self.client;
        let connections = &client.means.connections;
        let opening = connections.opening(key);
        // Streams of many requests share a connection, so a burst of them opens one.
        let _one = if key.framing == Framing::Two { Some(opening.lock().await) } else { None };
        if _one.is_some()
            && let Some(conn) = connections.take(key)
        {
            return Ok((conn, true));
        }
        let held = client.pod.connection(&client.pod.outbound).map_err(Failure::last)?;
        let patience = if others { SHORT } else { client.shared.hbone.patience() };
        let settings = self.settings();
        let dialled = dial::connection(client.attempts(), client.addr, &self.to.known.source, plan, patience);
        let limit = settings.and_then(|settings| settings.connect_timeout);
        let (io, peer, order) = dial::within(limit, dialled).await?;
        // What else had to be asked for is held by the client's own connection.
        let leases = self.to.known.leases.clone();
        let left = Left { pod: client.pod.clone(), target: plan.endpoint(), leases };
        let registration = client.means.live.register_decided(left, &client.shared.reader);
        let outside = is_outside(plan.service().map(AsRef::as_ref), plan.destination().map(AsRef::as_ref));
        let (pod, shared) = (client.pod.clone(), client.shared.clone());
        let waits = Rc::<Cell<bool>>::default();
        let live = room.as_ref().map(|room| room.live().clone());
        let (idle, squeezed_by) = (waits.clone(), live.clone());
        let stop = async move {
            let outcome = tokio::select! {
                outcome = stopped(&pod, &registration) => outcome,
                outcome = ordered(order) => outcome,
                outcome = forbidden(&shared, &pod), if outside => outcome,
                outcome = squeezed(squeezed_by, &idle) => outcome,
            };
            tracing::debug!(%outcome, "a connection for requests is cut");
            drop((held, room));
        };
        let mut conn = Conn::begin(io, key.framing, peer, key.pings, stop).await.map_err(Failure::last)?;
        match (&mut conn, live) {
            (Conn::One(one), Some(live)) => {
                one.waits = Some(Rc::new(move |waiting| {
                    waits.set(waiting);
                    if waiting {
                        live.freed.notify_waiters();
                    }
                }));
            }
            (Conn::Two(two), live) => {
                two.most_uses = settings.and_then(|settings| settings.max_requests_per_connection).unwrap_or(u32::MAX);
                let streams = settings.and_then(|settings| settings.max_concurrent_streams);
                two.most_streams = streams.map_or(two.most_streams, |most| two.most_streams.min(most as usize));
                two.idle = settings.and_then(|settings| settings.http_idle_timeout).unwrap_or(two.idle);
                connections.share(key, two.clone());
                client.learn(two.offer.clone());
                if let Some(live) = live {
                    live.freed.notify_waiters();
                }
            }
            (Conn::One(_), None) => {}
        }
        Ok((conn, false))
    }

    fn settings(&self) -> Option<&TrafficSettings> {
        self.to.toward.as_ref()?.settings()
    }

    /// The answer as the client gets it. Its connection waits for the next request once it was read.
    fn pass_on(&self, got: Got, active: Option<Held>, switches: Switches, record: &mut HttpRecord) -> Response<Body> {
        let Got { response, conn, key, passage, deadline } = got;
        if conn.grants(self.switch, response.status()) {
            return switch_to(conn, response, (passage, active), &switches);
        }
        let (mut parts, incoming) = response.into_parts();
        strip_hop(&mut parts.headers, None);
        parts.version = http::Version::HTTP_11;
        record.grpc_status = crate::http::grpc_status(&parts.headers);
        let stream = conn.stream();
        let connections = Rc::downgrade(&self.client.means.connections);
        let settings = self.settings();
        let uses = settings.and_then(|settings| settings.max_requests_per_connection).unwrap_or(u32::MAX);
        let idle = settings.and_then(|settings| settings.http_idle_timeout).unwrap_or(IDLE);
        let live = settings.and(self.to.toward.as_ref()).map(|toward| toward.live());
        let told = record.grpc_status.is_some();
        let body = Body::from(incoming).until(deadline).then(move |ended| {
            drop(stream);
            if let Some(passage) = passage.filter(|_| !told) {
                passage.ended(ended.grpc_status.as_deref());
            }
            if let (End::Complete, Conn::One(one), Some(connections)) = (&ended.end, conn, connections.upgrade())
                && one.uses < uses
            {
                connections.give_back(key, one, idle);
            }
            // A stream of a shared connection has ended.
            if let Some(live) = live {
                live.freed.notify_waiters();
            }
        });
        Response::from_parts(parts, body.hold(active))
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
