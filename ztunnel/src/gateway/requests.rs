//! HTTP through the gateway: each request is decided for itself, and passed on by the connection of this one client.
//!
//! A request is for the host that the stream asked for, or it is refused: a connection that was let out for one name must
//! not carry another one's requests. What a client says about itself for proxies to believe goes no further.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, Uri};
use hyper::body::Incoming;

use crate::gateway::Gateway;
use crate::gateway::decide::{Asked, Granted, request};
use crate::gateway::outside::connect;
use crate::gateway::recheck::Registration;
use crate::http::reply::{self, Reply};
use crate::http::server::{self, Switches};
use crate::http::solo::{Dial, Solo};
use crate::http::{Body, BoxIo, Downstream, Framing, HeadClock, headers, recorded};
use crate::outcome::{Code, Fault, Outcome};
use crate::route::path;
use crate::telemetry::{ConnRecord, Direction, HttpRecord, Peer};

/// Where the requests go.
pub(super) struct Host {
    pub(super) gateway: Arc<Gateway>,
    pub(super) granted: Granted,
    /// Resolved when the connection began.
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) framing: Framing,
}

/// What the requests of a connection share.
struct Connection {
    host: Host,
    asked: Arc<Asked>,
    source: Peer,
    destination: Peer,
}

/// Serves a connection to its end. `first` of it was read already; `server` is its connection to the host.
pub(super) async fn serve(
    host: Host,
    registration: &Registration,
    first: Bytes,
    io: BoxIo,
    server: BoxIo,
    stop: impl Future<Output = Outcome>,
    record: &ConnRecord,
) -> Outcome {
    let framing = host.framing;
    let connection = Rc::new(Connection {
        asked: registration.facts().asked.clone(),
        source: record.source.clone(),
        destination: record.destination.clone(),
        host,
    });
    let solo = match Solo::begin(server, framing, connection.dial()).await {
        Ok(solo) => Rc::new(solo),
        Err(outcome) => return outcome,
    };
    let clock = Rc::<HeadClock>::default();
    let client = Downstream::new(first, io, record.counts.clone(), clock.clone());
    let drained = connection.host.gateway.pod.drained.clone();
    let service: server::Service = Rc::new(move |request, switches| {
        let (connection, solo) = (connection.clone(), solo.clone());
        Box::pin(async move { connection.exchange(request, &solo, switches).await })
    });
    server::serve(client, clock, framing, &drained, stop, service).await
}

impl Connection {
    /// Dials the host again, at the addresses that the connection began with.
    fn dial(self: &Rc<Self>) -> Dial {
        let this = self.clone();
        Box::new(move || {
            let this = this.clone();
            Box::pin(async move { this.again().await })
        })
    }

    async fn again(&self) -> Result<BoxIo, Outcome> {
        let Host { gateway, granted, addresses, framing } = &self.host;
        let hbone = &gateway.shared.hbone;
        let (tcp, _) = connect(&gateway.pod.sockets, addresses, &gateway.from, hbone.connect_timeout).await?;
        let Some(tls) = &granted.originate else { return Ok(Box::new(tcp)) };
        let name = if tls.server_name.is_empty() { &*granted.host } else { &*tls.server_name };
        let shake = gateway.tls.handshake(tcp, name, &tls.roots, Some(*framing));
        let late = |_| Outcome::new(Code::TlsFailed, format!("TLS with {name} was not finished in time"));
        Ok(Box::new(tokio::time::timeout(hbone.handshake_timeout, shake).await.map_err(late)??))
    }

    async fn exchange(self: Rc<Self>, mut incoming: Request<Incoming>, solo: &Rc<Solo>, switches: Switches) -> Response<Body> {
        let shared = &self.host.gateway.shared;
        let mut record = HttpRecord::new(
            shared.metrics.clone(),
            Direction::Inbound,
            self.source.clone(),
            self.destination.clone(),
        );
        record.describe(&incoming);
        record.authority = headers::authority(&incoming).into();
        record.grpc = headers::is_grpc(incoming.headers());
        let grpc = record.grpc;
        let switch = headers::upgrade(incoming.headers(), incoming.version());
        let response = match self.admit(&mut incoming, switch.as_ref(), &mut record) {
            Err(refused) => Err(refused),
            Ok(()) => solo.pass(incoming, switch.is_some(), switches, &mut record).await,
        };
        let response = response.unwrap_or_else(|(reply, outcome)| {
            record.flag = reply.flag;
            record.error = Some(outcome.to_string().into());
            record.policy = outcome.policy.clone();
            record.rule = outcome.rule;
            record.denied = (outcome.code.fault() == Fault::Policy).then_some(outcome.code);
            if grpc {
                record.grpc_status = Some(reply.grpc_status().to_string());
            }
            reply.response(grpc)
        });
        recorded(response, record)
    }

    /// Whether a request may leave; brings it into the form in which the host gets it.
    fn admit(
        &self,
        incoming: &mut Request<Incoming>,
        switch: Option<&http::HeaderValue>,
        record: &mut HttpRecord,
    ) -> Result<(), (Reply, Outcome)> {
        let malformed = |text: &str| (reply::BAD_REQUEST, Outcome::new(Code::BadRequest, text.to_owned()));
        if incoming.method() == Method::CONNECT {
            return Err((reply::NO_CONNECT, Outcome::new(Code::BadRequest, "CONNECT inside a connection that is let out")));
        }
        let default = self.asked.authority.to_string();
        headers::check(incoming, &default).map_err(|error| malformed(error.0))?;
        headers::strip_hop(incoming.headers_mut(), switch);
        headers::strip_forged(incoming.headers_mut());
        let path = path::normalise(incoming.uri().path()).map_err(|error| malformed(&error.to_string()))?.into_owned();
        // The newest: a policy applies to the next request of a live connection.
        let snapshot = self.host.gateway.shared.reader.load();
        let named = headers::authority(incoming);
        let rule = request(&snapshot, &self.asked, named, incoming.method().as_str(), &path);
        let (policy, rule) = rule.map_err(|outcome| (reply::DENIED, outcome))?;
        (record.policy, record.rule) = (Some(policy), Some(rule));
        let target = match incoming.uri().query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let target = PathAndQuery::try_from(target).map_err(|_| malformed("a path that is none"))?;
        let mut parts = incoming.uri().clone().into_parts();
        parts.path_and_query = Some(target);
        if self.host.granted.originate.is_some() && parts.scheme.is_some() {
            parts.scheme = Some(http::uri::Scheme::HTTPS);
        }
        *incoming.uri_mut() = Uri::from_parts(parts).map_err(|_| malformed("a target that is none"))?;
        Ok(())
    }
}
