//! HTTP through the gateway: each request is decided for itself, and passed on by the connection of this one client.
//!
//! A request is for the host that the stream asked for, or it is refused: a connection that was let out for one name must
//! not carry another one's requests. What a client says about itself for proxies to believe goes no further.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::Scheme;
use http::{HeaderValue, Method, Request, Response, Uri};
use hyper::body::Incoming;

use crate::gateway::Gateway;
use crate::gateway::decide::{Asked, request, same_way};
use crate::gateway::limits::Place;
use crate::gateway::outside::Failed;
use crate::http::reply::{self, Reply};
use crate::http::server::{self, Switches};
use crate::http::solo::{Dial, Solo};
use crate::http::{Body, BoxIo, Downstream, Framing, HeadClock, headers, recorded};
use crate::outcome::{Code, Fault, Outcome};
use crate::policy::egress::{Grant, Spoken};
use crate::route::path;
use crate::telemetry::{ConnRecord, Direction, HttpRecord, Peer};

/// A client's connection.
pub(super) struct Connection {
    gateway: Arc<Gateway>,
    asked: Arc<Asked>,
    framing: Framing,
    prefer_v6: bool,
    place: Place,
    source: Peer,
    destination: Peer,
    /// Where the last request went, and by what.
    way: RefCell<Option<(Grant, Rc<Solo>)>>,
}

impl Connection {
    pub(super) fn new(
        gateway: &Arc<Gateway>,
        asked: Arc<Asked>,
        framing: Framing,
        prefer_v6: bool,
        place: Place,
        record: &ConnRecord,
    ) -> Self {
        let (source, destination) = (record.source.clone(), record.destination.clone());
        let (gateway, way) = (gateway.clone(), RefCell::default());
        Self { gateway, asked, framing, prefer_v6, place, source, destination, way }
    }
}

/// Serves a connection to its end. `first` of it was read already.
pub(super) async fn serve(
    connection: Connection,
    first: Bytes,
    io: BoxIo,
    stop: impl Future<Output = Outcome>,
    record: &ConnRecord,
) -> Outcome {
    let (framing, drained) = (connection.framing, connection.gateway.pod.drained.clone());
    let connection = Rc::new(connection);
    let clock = Rc::<HeadClock>::default();
    let client = Downstream::new(first, io, record.counts.clone(), clock.clone());
    let service: server::Service = Rc::new(move |request, switches| {
        let connection = connection.clone();
        Box::pin(async move { connection.exchange(request, switches).await })
    });
    server::serve(client, clock, (framing, false), &drained, stop, service).await
}

impl Connection {
    /// The connection to the host for a request that may leave by `grant`: the last one's, if it went the same way.
    fn solo(self: &Rc<Self>, grant: Grant) -> Rc<Solo> {
        let mut way = self.way.borrow_mut();
        if let Some((last, solo)) = &*way
            && same_way(last, &grant)
        {
            return solo.clone();
        }
        // Held weakly: the connection holds what holds this.
        let (this, by) = (Rc::downgrade(self), grant.clone());
        let dial: Dial = Box::new(move || {
            let (this, by) = (this.upgrade(), by.clone());
            Box::pin(async move {
                let gone = || Outcome::new(Code::ClientReset, "the client went away");
                let this = this.ok_or_else(gone)?;
                let framing = Some(this.framing);
                let reached = this.gateway.reach(&this.asked, &by, framing, Spoken::Bytes, this.prefer_v6, &this.place);
                let (server, _) = reached.await.map_err(|Failed { outcome, .. }| outcome)?;
                Ok(server.into_io())
            })
        });
        let solo = Rc::new(Solo::new(self.framing, &self.gateway.pod.buffers, dial));
        *way = Some((grant, solo.clone()));
        solo
    }

    async fn exchange(self: Rc<Self>, mut incoming: Request<Incoming>, switches: Switches) -> Response<Body> {
        let shared = &self.gateway.shared;
        let mut record =
            HttpRecord::new(shared.metrics.clone(), Direction::Inbound, self.source.clone(), self.destination.clone());
        record.describe(&incoming);
        record.trace(incoming.headers_mut());
        record.authority = headers::authority(&incoming).into();
        record.grpc = headers::is_grpc(incoming.headers());
        let grpc = record.grpc;
        let switch = headers::upgrade(incoming.headers(), incoming.version());
        let response = match self.admit(&mut incoming, switch.as_ref(), &mut record) {
            Err(refused) => Err(*refused),
            Ok(grant) => self.solo(grant).pass(incoming, switch.is_some(), switches, &mut record).await,
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

    /// Whether a request may leave, and by which rule; brings it into the form in which the host gets it.
    fn admit(
        &self,
        incoming: &mut Request<Incoming>,
        switch: Option<&HeaderValue>,
        record: &mut HttpRecord,
    ) -> Result<Grant, Box<(Reply, Outcome)>> {
        let malformed = |text: &str| Box::new((reply::BAD_REQUEST, Outcome::new(Code::BadRequest, text.to_owned())));
        if incoming.method() == Method::CONNECT {
            let text = "CONNECT inside a connection that leaves by an egress gateway";
            return Err(Box::new((reply::NO_CONNECT, Outcome::new(Code::BadRequest, text))));
        }
        headers::check(incoming, &self.asked.target()).map_err(|error| malformed(error.0))?;
        headers::strip_hop(incoming.headers_mut(), switch);
        headers::strip_forged(incoming.headers_mut());
        let path = path::normalise(incoming.uri().path()).map_err(|error| malformed(&error.to_string()))?.into_owned();
        let host = host(headers::authority(incoming));
        // The newest: a policy applies to the next request of a live connection.
        let snapshot = self.gateway.shared.reader.load();
        let method = incoming.method().as_str();
        let grant = request(&snapshot, &self.asked, host.as_deref(), method, &path).map_err(|outcome| {
            let pending = outcome.code == Code::PolicyPending;
            Box::new((if pending { reply::PENDING } else { reply::DENIED }, outcome))
        })?;
        (record.policy, record.rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
        headers::respell(incoming, &path).ok_or_else(|| malformed("a path that is none"))?;
        if grant.rule().originate.is_some() && incoming.uri().scheme().is_some() {
            let mut parts = incoming.uri().clone().into_parts();
            parts.scheme = Some(Scheme::HTTPS);
            *incoming.uri_mut() = Uri::from_parts(parts).map_err(|_| malformed("a target that is none"))?;
        }
        Ok(grant)
    }
}

/// The host of an authority in the form in which rules have it. `None`: it is an address, or none.
fn host(authority: &str) -> Option<String> {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty() && !host.starts_with('[')).then(|| host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::host;

    #[test]
    fn the_host_of_a_request_is_compared_without_port_dot_and_case() {
        for (authority, expected) in [
            ("api.example.com", Some("api.example.com")),
            ("API.example.com.:8080", Some("api.example.com")),
            ("api.example.com:", Some("api.example.com")),
            ("[2001:db8::1]:80", None),
            ("", None),
            (":80", None),
        ] {
            assert_eq!(host(authority).as_deref(), expected, "{authority}");
        }
    }
}
