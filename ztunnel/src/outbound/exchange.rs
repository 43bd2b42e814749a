//! One request of a client: checked, routed on the newest snapshot, carried out, recorded.
//!
//! Whatever the proxy answers itself is a [`Refused`] with the [`Reply`] for the client and the reason for the record.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep};

use crate::base::unix_now;
use crate::http::reply::{self, Reply};
use crate::http::server::Switches;
use crate::http::{Body, Framing, Original, headers, recorded};
use crate::outbound::ask::{self, Known};
use crate::outbound::breaker::{Toward, cookie};
use crate::outbound::forward::{Job, Target};
use crate::outbound::requests::Client;
use crate::outbound::waypoint;
use crate::outcome::{Code, Fault, Outcome};
use crate::route::session::{self, Session};
use crate::route::{self, Forward, Granted, NO_ROUTE, Respond, RoutePlan, path};
use crate::state::{Service, ServiceName, SessionRule, Snapshot, Workload};
use crate::telemetry::{Direction, HttpRecord, Peer};

/// The proxy answers.
pub(super) struct Refused {
    /// To the client.
    pub(super) reply: Reply,
    /// For the record.
    pub(super) outcome: Box<Outcome>,
}

impl Refused {
    pub(super) fn new(reply: Reply, code: Code, text: impl Into<std::borrow::Cow<'static, str>>) -> Self {
        Self { reply, outcome: Box::new(Outcome::new(code, text)) }
    }
}

impl From<Outcome> for Refused {
    /// What a client is told of a next hop that could not be reached or must not be.
    fn from(outcome: Outcome) -> Self {
        let reply = match outcome.code {
            Code::NoEndpoint | Code::Ejected | Code::UnknownWorkload => reply::NO_ENDPOINT,
            Code::OverBudget | Code::Overflow => reply::OVER_BUDGET,
            Code::ServerReset => reply::RESET,
            code if code.fault() == Fault::Policy => reply::DENIED,
            _ => reply::CONNECT_FAILED,
        };
        Self { reply, outcome: Box::new(outcome) }
    }
}

/// What comes back, and the rest of the record's life.
type Answered = Result<Response<Body>, Refused>;

impl Client {
    /// Answers one request.
    pub(super) async fn exchange(self: Rc<Self>, mut request: Request<Incoming>, switches: Switches) -> Response<Body> {
        let snapshot = self.shared.reader.load();
        let mut record = self.record(&snapshot, &request);
        record.trace(request.headers_mut());
        let grpc = record.grpc;
        let mut granted = None;
        let answered = self.answer(&snapshot, request, switches, &mut record, &mut granted).await;
        let say = |mut response: Response<Body>| {
            if let Some(granted) = &granted {
                granted.say(response.headers_mut());
            }
            response
        };
        let Refused { reply, outcome } = match answered {
            Ok(response) => return recorded(say(response), record),
            Err(refused) => refused,
        };
        record.flag = reply.flag;
        record.policy = outcome.policy.clone();
        record.rule = outcome.rule;
        if !outcome.code.is_success() {
            record.error = Some(outcome.to_string().into());
        }
        if grpc {
            record.grpc_status = Some(reply.grpc_status().to_string());
        }
        recorded(say(reply.response(grpc)), record)
    }

    fn record<B>(&self, snapshot: &Snapshot, request: &Request<B>) -> HttpRecord {
        let mut record = self.empty_record(snapshot);
        record.describe(request);
        record.authority = headers::authority(request).into();
        record.grpc = headers::wants_grpc(request);
        record
    }

    pub(super) fn empty_record(&self, snapshot: &Snapshot) -> HttpRecord {
        let source = self.pod.workload(snapshot).cloned();
        let peer = |addr, workload| Peer { addr: Some(addr), workload, identity: None };
        let (source, destination) = (peer(self.addr, source), peer(self.destination, None));
        HttpRecord::new(self.shared.metrics.clone(), Direction::Outbound, source, destination)
    }

    async fn answer(
        self: &Rc<Self>,
        snapshot: &Arc<Snapshot>,
        mut request: Request<Incoming>,
        switches: Switches,
        record: &mut HttpRecord,
        granted: &mut Option<Granted>,
    ) -> Answered {
        let (path, switch) = prepare(&mut request, self.destination)?;
        let gone = |text| Refused::new(reply::NO_ENDPOINT, Code::UnknownWorkload, text);
        let source = self.pod.workload(snapshot).ok_or_else(|| gone("control no longer describes the pod"))?;
        let port = self.destination.port();
        let service = snapshot
            .service_at(&self.shared.network, self.destination, &source.namespace)
            .ok_or_else(|| gone("the Service has gone"))?;
        record.service = Some(service.clone());
        // It may have got a waypoint since the connection began.
        let decides = !waypoint::decides(snapshot, source, service);
        let routes = snapshot.routes_for(service, port, &source.namespace).filter(|_| decides);
        let Some(candidates) = routes else {
            let own = ServiceName { namespace: service.namespace.clone(), hostname: service.hostname.clone() };
            let to = self.target(snapshot, source, &own, port).await?;
            return self.forward(to, request, path, None, switch, switches, record).await;
        };
        let facts = headers::facts(&request, &path, port);
        let Some(found) = route::find(candidates, &facts) else { return Err(respond(&NO_ROUTE)) };
        record.route = Some(found.text().into());
        *granted = found.granted(&facts);
        for limit in found.limits() {
            let whose = if limit.per_identity { source.identity.to_string() } else { String::new() };
            let taken = self.shared.limits.take(&limit.name, &whose, limit.requests, limit.interval, limit.burst);
            taken.map_err(|wait| limited(&limit.name, wait))?;
        }
        let session = found.rule().session.as_ref().and_then(|rule| shown(rule, request.headers()));
        let plan = found.plan_of(&facts, if is_broken("weights") { 0 } else { found.rule().turns.take() }, session);
        match plan {
            RoutePlan::Redirect(redirection) => {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::from_u16(redirection.status).unwrap_or(StatusCode::FOUND);
                *response.headers_mut() = redirection.headers();
                Ok(response)
            }
            RoutePlan::Preflight(preflight) => {
                // It says all of it itself.
                *granted = None;
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::NO_CONTENT;
                *response.headers_mut() = preflight.headers;
                Ok(response)
            }
            RoutePlan::Respond(answer) => {
                if let Some(delay) = answer.delay {
                    sleep(delay).await;
                }
                Err(respond(&answer))
            }
            RoutePlan::Forward(forward) => {
                if let Some(delay) = forward.delay {
                    record.flag = "DI";
                    sleep(delay).await;
                }
                let backend = forward.backend();
                let to = self.target(snapshot, source, &backend.service, backend.port).await?;
                record.backend = Some(format!("{}:{}", to.service.hostname, backend.port).into());
                let forward = Some(forward);
                self.forward(to, request, path, forward, switch, switches, record).await
            }
        }
    }

    /// A Service's port as a backend of a route, asked for where not everything is known. The Service that the client
    /// addressed keeps its address.
    pub(super) async fn target(
        &self,
        snapshot: &Arc<Snapshot>,
        source: &Arc<Workload>,
        name: &ServiceName,
        port: u16,
    ) -> Result<Target, Refused> {
        let asked = ask::service(&self.shared, &self.pod, name).await?;
        let as_it_is = || Known { snapshot: snapshot.clone(), source: source.clone(), leases: Vec::new() };
        let known = asked.unwrap_or_else(as_it_is);
        let Some(service) = known.snapshot.service(&name.namespace, &name.hostname) else {
            let text = format!("the route's backend {}/{} is not known here", name.namespace, name.hostname);
            let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "", "NC");
            return Err(Refused::new(reply, Code::NoEndpoint, text));
        };
        let ip = address_of(service, self.destination.ip());
        let (shared, pod) = (&self.shared, &self.pod);
        let toward = Toward::of_requests(shared, pod, &known.snapshot, &known.source, service, port);
        Ok(Target { service: service.clone(), at: SocketAddr::new(ip, port), toward, known })
    }

    #[allow(clippy::too_many_arguments, reason = "what is known of one request, each used once")]
    async fn forward(
        self: &Rc<Self>,
        to: Target,
        request: Request<Incoming>,
        path: String,
        forward: Option<Forward>,
        switch: bool,
        switches: Switches,
        record: &mut HttpRecord,
    ) -> Answered {
        let (mut parts, body) = request.into_parts();
        if let Some(forward) = &forward {
            forward.on_request(&mut parts.headers);
        }
        let authority = forward.as_ref().and_then(|forward| forward.authority.clone());
        let path = forward.as_ref().and_then(|forward| forward.path.clone()).unwrap_or(path);
        retarget(&mut parts, self.framing, &path, authority.as_deref())
            .map_err(|text| Refused::new(reply::BAD_REQUEST, Code::BadRequest, text))?;
        let now = Instant::now();
        let original = Original::new(body, &self.pod.buffers);
        let mirrored = forward.as_ref().is_some_and(|forward| forward.mirrors().next().is_some()) && !switch;
        if mirrored
            && !is_broken("mirror")
            && let Some(forward) = &forward
        {
            self.mirror(&to.known, forward, &parts, &original);
        }
        let job = Job {
            client: self,
            to,
            parts,
            original,
            switch,
            keep: mirrored,
            retry: forward.as_ref().and_then(Forward::retry).filter(|_| !switch && !is_broken("retries")),
            deadline: forward.as_ref().and_then(Forward::request_timeout).filter(|_| !switch).map(|time| now + time),
            attempt: forward.as_ref().and_then(Forward::backend_timeout).filter(|_| !switch),
            hash: None,
            session: forward.as_ref().and_then(|forward| forward.session.as_ref()).map(|own| own.endpoint.clone()),
        };
        let mut response = job.run(switches, record).await?;
        if let Some(forward) = &forward {
            forward.on_response(response.headers_mut());
            if let (Some(rule), Some(endpoint)) = (forward.session_rule(), &record.destination.workload) {
                give(rule, forward, &endpoint.uid, response.headers_mut());
            }
        }
        Ok(response)
    }
}

/// What the client shows of its session.
pub(super) fn shown(rule: &SessionRule, headers: &HeaderMap) -> Option<Session> {
    let text = match (&rule.cookie, &rule.header) {
        (Some(name), _) => cookie(headers, name)?,
        (None, Some(name)) => headers.get(name)?.to_str().ok()?,
        (None, None) => return None,
    };
    Session::read(rule, text, unix_now())
}

/// Tells the client which endpoint it had, if it does not know.
fn give(rule: &SessionRule, forward: &Forward, endpoint: &str, headers: &mut HeaderMap) {
    let given = session::given(rule, forward.session.as_ref(), forward.backend(), endpoint, unix_now());
    let Some(value) = given.and_then(|given| HeaderValue::try_from(given).ok()) else { return };
    match &rule.header {
        Some(name) if rule.cookie.is_none() => headers.insert(name, value).is_some(),
        _ => headers.append(header::SET_COOKIE, value),
    };
}

/// The address of a backend that stands for it in decisions: the one that was dialled, or one of its family.
pub(super) fn address_of(service: &Service, dialled: IpAddr) -> IpAddr {
    let own = service.vips.iter().any(|(_, vip)| vip.contains(&dialled.to_canonical()));
    let vips = service.vips.iter().map(|(_, vip)| vip.addr());
    if own { dialled } else { vips.min_by_key(|ip| ip.is_ipv4() != dialled.is_ipv4()).unwrap_or(dialled) }
}

/// Checks a request and takes out of it what goes no further. Its path, normalised, and whether it asks to go on with another
/// protocol.
///
/// # Errors
/// The answer to what is no request for a Service.
pub(super) fn prepare<B>(request: &mut Request<B>, destination: SocketAddr) -> Result<(String, bool), Refused> {
    if request.method() == Method::CONNECT {
        return Err(Refused::new(reply::NO_CONNECT, Code::BadRequest, "CONNECT to a Service with routes"));
    }
    let malformed = |text| Refused::new(reply::BAD_REQUEST, Code::BadRequest, text);
    headers::check(request, &destination.to_string()).map_err(|error| malformed(error.0.to_owned()))?;
    let upgrade = headers::upgrade(request.headers(), request.version());
    headers::strip_hop(request.headers_mut(), upgrade.as_ref());
    headers::strip_forged(request.headers_mut());
    let path = path::normalise(request.uri().path()).map_err(|error| malformed(error.to_string()))?.into_owned();
    Ok((path, upgrade.is_some() || headers::is_extended(request)))
}

/// Sabotage of test builds, by `TULLE_BREAK`: with `weights` it is always the first turn, with `mirror` nobody gets a copy, with
/// `retries` nothing is tried again.
fn is_broken(what: &str) -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == what)
}

/// The target of the request to the backend: path alone for HTTP/1, with scheme and authority for HTTP/2.
pub(super) fn retarget(
    parts: &mut http::request::Parts,
    framing: Framing,
    path: &str,
    authority: Option<&str>,
) -> Result<(), &'static str> {
    let target = match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let target = PathAndQuery::try_from(target).map_err(|_| "a path that is none")?;
    let host = |name: &str| HeaderValue::from_str(name).map_err(|_| "a host that is none");
    match framing {
        Framing::One => {
            if let Some(name) = authority {
                parts.headers.insert(header::HOST, host(name)?);
            }
            parts.uri = Uri::from(target);
            parts.version = http::Version::HTTP_11;
        }
        Framing::Two => {
            let given = parts.uri.authority().map(ToString::to_string);
            let given = authority
                .map(str::to_owned)
                .or(given)
                .or_else(|| parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned));
            parts.headers.remove(header::HOST);
            let authority = Authority::try_from(given.unwrap_or_default()).map_err(|_| "a host that is none")?;
            let uri = Uri::builder()
                .scheme(parts.uri.scheme().cloned().unwrap_or(Scheme::HTTP))
                .authority(authority)
                .path_and_query(target);
            parts.uri = uri.build().map_err(|_| "a target that is none")?;
        }
    }
    Ok(())
}

/// The answer when a limit is used up for `wait`.
fn limited(name: &str, wait: Duration) -> Refused {
    // Whole seconds, and never one in which it would be too early.
    let retry_after = Some(wait.as_secs() + u64::from(wait.subsec_nanos() > 0));
    let reply = Reply { retry_after, grpc: Some(8), ..reply::RATE_LIMITED };
    Refused::new(reply, Code::RateLimited, format!("HTTPRateLimit {name} is used up"))
}

/// What the route says in the place of a backend.
pub(super) fn respond(answer: &Respond) -> Refused {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let text = match answer.reason {
        route::Reason::Fault => "fault filter abort",
        _ => "",
    };
    let flag = if answer.reason.flag().is_empty() { "-" } else { answer.reason.flag() };
    let reply = Reply { grpc: Some(answer.grpc_status), ..Reply::new(status, text, flag) };
    let detail = answer.detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
    Refused::new(reply, Code::NoRoute, format!("{}{detail}", answer.reason.text()))
}
