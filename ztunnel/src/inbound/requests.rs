//! A connection into a local pod whose requests are decided one by one: told to be HTTP, each request authenticated and
//! authorised on the newest snapshot, and passed to the application on a connection of this one client.
//!
//! The identity is the one proven in TLS; what a request says of itself counts only as far as a token proves it. Bytes that
//! are not HTTP are decided by what is left of the policies, which allows no more, and never go past a token that would
//! have to be looked at. The application's connection is dialled again when it has closed it between two requests.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tulle_certs::SpiffeId;

use crate::base::{Counts, unix_now};
use crate::flow::{LocalPod, PATIENCE, Shared};
use crate::http::client::Raw;
use crate::http::reply::{self, Reply};
use crate::http::server::{self, Switches};
use crate::http::solo::{Dial, Solo};
use crate::http::{Body, BoxIo, Downstream, ENOUGH, Framing, HEAD_TIME, HeadClock, Sniffed, headers, recorded, sniff};
use crate::inbound::decide::{self, Declared, authorization_is_broken, declared};
use crate::inbound::recheck::{Admitted, Registration};
use crate::inbound::{decide::denial, stopped};
use crate::outcome::{Code, Fault, Outcome};
use crate::policy::{self, Facts, HttpFacts, Verdict, jwt};
use crate::route::path;
use crate::state::{Snapshot, Workload};
use crate::telemetry::{ConnRecord, Direction, HttpRecord, Peer};

/// How long a client of a port whose protocol is not declared may be silent before its bytes are taken for something else
/// than HTTP, if what is left of the policies lets them in.
const SILENCE: Duration = Duration::from_millis(200);

/// What all requests of a connection share.
pub(super) struct Connection {
    shared: Arc<Shared>,
    pod: Arc<LocalPod>,
    request: super::Request,
    source: Peer,
    destination: Peer,
    service: Option<Arc<crate::state::Service>>,
}

impl Connection {
    pub(super) fn new(
        shared: &Arc<Shared>,
        pod: &Arc<LocalPod>,
        registration: &Registration,
        record: &ConnRecord,
    ) -> Self {
        let Admitted { identity, source, target, .. } = registration.facts();
        Self {
            shared: shared.clone(),
            pod: pod.clone(),
            request: super::Request { identity: identity.clone(), source: *source, target: *target, inside: false },
            source: record.source.clone(),
            destination: Peer { addr: Some(*target), ..record.destination.clone() },
            service: record.service.clone(),
        }
    }

    fn decide_bytes(&self, snapshot: &Snapshot) -> Result<Verdict, Outcome> {
        let gone = || Outcome::new(Code::UnknownWorkload, "control no longer describes the pod");
        let workload = self.pod.workload(snapshot).ok_or_else(gone)?;
        let super::Request { identity, source, target, .. } = &self.request;
        decide::decide_bytes(snapshot, workload, identity.as_ref(), *source, *target)
    }
}

/// Serves a connection to its end. `server` is its connection to the application.
pub(super) async fn serve(
    connection: Connection,
    mut io: BoxIo,
    server: TcpStream,
    registration: &Registration,
    counts: &Rc<Counts>,
) -> Outcome {
    let pod = connection.pod.clone();
    let stop = stopped(&pod.drained, registration);
    tokio::pin!(stop);
    let told = tokio::select! {
        biased;
        outcome = &mut stop => return outcome,
        told = told(&connection, &mut io) => told,
    };
    let clock = Rc::<HeadClock>::default();
    let framing = match told {
        Err(outcome) => return outcome,
        Ok((first, None)) => {
            registration.facts().requests.set(false);
            // Looked at once more: a snapshot that came in between was asked about requests.
            let dry_run = match connection.decide_bytes(&connection.shared.reader.load()) {
                Ok(verdict) => verdict.dry_run,
                Err(outcome) => return outcome,
            };
            let client = Downstream::new(first, io, counts.clone(), clock);
            let server = Raw { io: Box::new(server), read: Bytes::new(), stop: Box::pin(std::future::pending()) };
            let outcome = tokio::select! {
                biased;
                outcome = stop => outcome,
                outcome = server::bytes(client, Bytes::new(), server) => outcome,
            };
            // No request will say it.
            return Outcome { dry_run, ..outcome };
        }
        Ok((first, Some(framing))) => {
            io = Box::new(Downstream::new(first, io, Rc::default(), Rc::default()));
            framing
        }
    };
    let connection = Rc::new(connection);
    let application = match Solo::begin(Box::new(server), framing, &pod.buffers, connection.dial()).await {
        Ok(application) => Rc::new(application),
        Err(outcome) => return outcome,
    };
    // Clients are offered what the application offers.
    let offers = tokio::select! {
        biased;
        outcome = &mut stop => return outcome,
        offers = application.offers() => offers,
    };
    let client = Downstream::new(Bytes::new(), io, counts.clone(), clock.clone());
    let service: server::Service = Rc::new(move |request, switches| {
        let (connection, application) = (connection.clone(), application.clone());
        Box::pin(async move { connection.exchange(request, &application, switches).await })
    });
    server::serve(client, clock, (framing, offers), &pod.drained, stop, service).await
}

/// What the client speaks, and its first bytes. `None`: not HTTP, and let in as bytes.
async fn told(connection: &Connection, io: &mut BoxIo) -> Result<(Bytes, Option<Framing>), Outcome> {
    let (begin, target) = (Instant::now(), connection.request.target);
    let mut first = BytesMut::with_capacity(ENOUGH);
    let bytes_may = |snapshot: &Snapshot| connection.decide_bytes(snapshot);
    loop {
        let snapshot = connection.shared.reader.load();
        let unsaid = connection
            .pod
            .workload(&snapshot)
            .is_some_and(|workload| declared(&snapshot, workload, target.port()) == Declared::Unknown);
        // Nothing is lost by waiting for somebody whose bytes would not be let in.
        let patience = if first.is_empty() && unsaid && bytes_may(&snapshot).is_ok() {
            Some(begin + SILENCE)
        } else if first.is_empty() {
            None
        } else {
            Some(begin + HEAD_TIME)
        };
        drop(snapshot);
        let mut chunk = [0; ENOUGH];
        let read = match patience {
            None => io.read(&mut chunk).await,
            Some(deadline) => match timeout_at(deadline, io.read(&mut chunk)).await {
                Ok(read) => read,
                Err(_) => break,
            },
        };
        let read = read.map_err(|error| Outcome::new(Code::ClientReset, error.to_string()))?;
        first.extend_from_slice(&chunk[..read]);
        match sniff(&first) {
            Sniffed::Http1 => return Ok((first.freeze(), Some(Framing::One))),
            Sniffed::Http2 => return Ok((first.freeze(), Some(Framing::Two))),
            Sniffed::More if read > 0 => {}
            Sniffed::More if first.is_empty() => return Err(Outcome::ok()),
            Sniffed::More | Sniffed::Other => break,
        }
    }
    bytes_may(&connection.shared.reader.load()).map_err(|outcome| {
        let said = if first.is_empty() { "said nothing" } else { "does not speak HTTP" };
        let detail = format!("a policy speaks of requests, and the client {said}: {}", outcome.detail);
        Outcome { code: Code::NotHttp, detail: detail.into(), ..outcome }
    })?;
    Ok((first.freeze(), None))
}

/// The proxy answers.
pub(super) struct Refused {
    reply: Reply,
    outcome: Box<Outcome>,
    /// Header `www-authenticate`.
    challenge: Option<HeaderValue>,
}

impl Refused {
    fn new(reply: Reply, outcome: Outcome) -> Self {
        Self { reply, outcome: Box::new(outcome), challenge: None }
    }
}

impl Connection {
    async fn exchange(
        self: Rc<Self>,
        mut request: Request<Incoming>,
        application: &Rc<Solo>,
        switches: Switches,
    ) -> Response<Body> {
        let mut record = HttpRecord::new(
            self.shared.metrics.clone(),
            Direction::Inbound,
            self.source.clone(),
            self.destination.clone(),
        );
        record.service = self.service.clone();
        record.describe(&request);
        record.trace(request.headers_mut());
        record.authority = headers::authority(&request).into();
        record.grpc = headers::wants_grpc(&request);
        let grpc = record.grpc;
        let switch = headers::upgrade(request.headers(), request.version());
        let wish = switch.is_some() || headers::is_extended(&request);
        let response = match self.admit(&mut request, switch.as_ref(), &mut record) {
            Err(refused) => Err(refused),
            Ok(()) => application
                .pass(request, wish, switches, &mut record)
                .await
                .map_err(|(reply, outcome)| Refused::new(reply, outcome)),
        };
        let response = response.unwrap_or_else(|Refused { reply, outcome, challenge }| {
            record.flag = reply.flag;
            record.error = Some(outcome.to_string().into());
            record.policy = outcome.policy.clone();
            record.rule = outcome.rule;
            record.denied = (outcome.code.fault() == Fault::Policy).then_some(outcome.code);
            record.dry_run.extend(outcome.dry_run);
            if grpc {
                record.grpc_status = Some(reply.grpc_status().to_string());
            }
            let mut response = reply.response(grpc);
            if let Some(challenge) = challenge {
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        });
        recorded(response, record)
    }

    /// Whether a request may pass, on the newest snapshot: a policy applies to the next request of a live connection.
    fn admit(
        &self,
        request: &mut Request<Incoming>,
        switch: Option<&HeaderValue>,
        record: &mut HttpRecord,
    ) -> Result<(), Refused> {
        let snapshot = self.shared.reader.load();
        let Some(workload) = self.pod.workload(&snapshot) else {
            let outcome = Outcome::new(Code::UnknownWorkload, "control no longer describes the pod");
            return Err(Refused::new(reply::NO_ENDPOINT, outcome));
        };
        let super::Request { identity, source, target, .. } = &self.request;
        let ends = (identity.as_ref(), *source, *target);
        record.dry_run = judge(&snapshot, workload, ends, request, switch, unix_now())?.dry_run;
        Ok(())
    }

    /// Dials the application, as the client.
    fn dial(self: &Rc<Self>) -> Dial {
        let this = self.clone();
        Box::new(move || {
            let this = this.clone();
            Box::pin(async move {
                let super::Request { source, target, .. } = this.request;
                let dial = this.pod.sockets.connect_from(source, target);
                match timeout(this.shared.hbone.connect_timeout.min(PATIENCE * 2), dial).await {
                    Ok(Ok(tcp)) => Ok(Box::new(tcp) as BoxIo),
                    Ok(Err(error)) => {
                        Err(Outcome::new(Code::ConnectFailed, format!("application at {target}: {error}")))
                    }
                    Err(_) => {
                        let text = format!("the application at {target} did not answer");
                        Err(Outcome::new(Code::ConnectTimeout, text))
                    }
                }
            })
        })
    }
}

/// Decides whether a request may pass, and brings it into the form in which the application gets it. `ends`: the identity
/// that its connection has proven, where it comes from, and where it goes. Pure, and asked by `tulle explain` as well.
///
/// # Errors
/// What the proxy answers, and why.
pub(super) fn judge<B>(
    snapshot: &Snapshot,
    workload: &Workload,
    ends: (Option<&SpiffeId>, IpAddr, SocketAddr),
    request: &mut Request<B>,
    switch: Option<&HeaderValue>,
    now: i64,
) -> Result<Verdict, Refused> {
    let malformed = |text: String| Refused::new(reply::BAD_REQUEST, Outcome::new(Code::BadRequest, text));
    if request.method() == Method::CONNECT {
        let text = "CONNECT to a pod whose requests are decided one by one";
        return Err(Refused::new(reply::NO_CONNECT, Outcome::new(Code::BadRequest, text)));
    }
    let (identity, source, target) = ends;
    headers::check(request, &target.to_string()).map_err(|error| malformed(error.0.to_owned()))?;
    headers::strip_hop(request.headers_mut(), switch);
    request.headers_mut().remove("x-forwarded-client-cert");
    let path = path::normalise(request.uri().path()).map_err(|error| malformed(error.to_string()))?.into_owned();
    let connection = decide::facts(snapshot, workload, identity, source, target);
    let verdict = authorise(snapshot, connection, request, &path, now).map_err(token_refused)?;
    if !verdict.allowed && !authorization_is_broken() {
        let outcome = denial(&verdict);
        let pending = outcome.code == Code::PolicyPending;
        return Err(Refused::new(if pending { reply::PENDING } else { reply::DENIED }, outcome));
    }
    headers::respell(request, &path).ok_or_else(|| malformed("a path that is none".to_owned()))?;
    Ok(verdict)
}

/// What [`judge`] says, for an explanation: the verdict, or the status of the proxy's answer and why.
///
/// # Errors
/// The status and its reason.
pub fn explained<B>(
    snapshot: &Snapshot,
    workload: &Workload,
    ends: (Option<&SpiffeId>, IpAddr, SocketAddr),
    mut request: Request<B>,
    now: i64,
) -> Result<Verdict, (u16, Outcome)> {
    let switch = headers::upgrade(request.headers(), request.version());
    judge(snapshot, workload, ends, &mut request, switch.as_ref(), now)
        .map_err(|refused| (refused.reply.status.as_u16(), *refused.outcome))
}

/// What token and policies say of a request. Policies see the headers that the application will see: those that only a token
/// may set are taken from the client before.
fn authorise<B>(
    snapshot: &Snapshot,
    connection: Facts<'_>,
    request: &mut Request<B>,
    path: &str,
    now: i64,
) -> Result<Verdict, jwt::TokenRefused> {
    let port = connection.destination_port;
    let authenticated = jwt::authenticate(snapshot, connection.destination, &headers::facts(request, path, port), now)?;
    authenticated.on_request(request.headers_mut());
    let token = authenticated.token.as_ref();
    Ok(policy::evaluate_request(
        snapshot,
        &HttpFacts { connection, request: headers::facts(request, path, port), token },
    ))
}

/// A token that no rule accepts, in Envoy's words.
fn token_refused(refused: jwt::TokenRefused) -> Refused {
    let status = StatusCode::from_u16(refused.status).unwrap_or(StatusCode::UNAUTHORIZED);
    let outcome = Outcome { policy: refused.by.clone(), ..Outcome::new(Code::TokenRefused, refused.body) };
    let challenge = HeaderValue::from_str(&refused.challenge).ok();
    Refused { challenge, ..Refused::new(Reply::new(status, refused.body, "-"), outcome) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{HeaderName, Request};

    use super::authorise;
    use crate::inbound::decide;
    use crate::state::fixtures::{policy, snapshot, workload};
    use crate::state::{Action, Change, Group, HttpMatch, HttpRule, JwtRule, RequestAuth, Scope, StringMatch};

    #[test]
    fn a_policy_does_not_believe_a_header_that_only_a_token_may_set() {
        let role = HeaderName::from_static("x-role");
        let admin = Group { any: vec![StringMatch::Exact("admin".into())], none: Vec::new() };
        let only = HttpMatch { headers: vec![(role.clone(), admin)], ..HttpMatch::default() };
        let rules: Arc<[HttpRule]> = [HttpRule { clauses: vec![vec![only]] }].into();
        let mut admins = policy("shop", "admins", Scope::Namespace, Action::Allow, None);
        admins.http = Some(rules);
        let id: Arc<str> = "RequestAuthentication/shop/users".into();
        let rule = JwtRule {
            issuer: "https://issuer".into(),
            audiences: Vec::new(),
            keys: Arc::new(jsonwebtoken::jwk::JwkSet { keys: Vec::new() }),
            from_headers: Vec::new(),
            from_params: Vec::new(),
            from_cookies: Vec::new(),
            forward: false,
            payload_header: None,
            claim_headers: vec![(role, vec!["role".into()])],
        };
        let auth = RequestAuth { id: id.clone(), version: "1".into(), rules: vec![rule], unreadable: None };
        for (tokens_set_it, expected) in [(false, true), (true, false)] {
            let mut pod = workload("shop", "cart", "10.0.0.2");
            if tokens_set_it {
                pod.request_auths = [id.clone()].into_iter().collect();
            }
            let snapshot = snapshot([
                Change::Policy(Arc::new(admins.clone())),
                Change::RequestAuth(Arc::new(auth.clone())),
                Change::PoliciesSynced,
                Change::Workload(Arc::new(pod.clone())),
            ]);
            let mut request = Request::builder().header("host", "cart").header("x-role", "admin").body(()).unwrap();
            let target = "10.0.0.2:80".parse().unwrap();
            let connection = decide::facts(&snapshot, &pod, None, "10.0.0.1".parse().unwrap(), target);
            let verdict = authorise(&snapshot, connection, &mut request, "/", 0).unwrap();
            assert_eq!(verdict.allowed, expected, "tokens set it: {tokens_set_it}");
        }
    }
}
