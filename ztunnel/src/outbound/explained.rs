//! What becomes of a single request, for an explanation: the steps of `exchange` without the exchange.
//!
//! The same functions check, route and choose; what depends on whose turn it is comes as a list with shares, unless the
//! request shows a session or carries what is hashed. Pure, but for the time, by which sessions and ejections end. Limits:
//! rate limits are named and not asked, because asking is taking; what is not known here is not asked for.

use std::net::SocketAddr;
use std::time::Instant;

use http::Request;

use crate::http::{Framing, headers};
use crate::lb::{Chance, Destinations, Way};
use crate::outbound::breaker::carried;
use crate::outbound::decide::{Plan, to_service};
use crate::outbound::exchange::{Refused, address_of, prepare, respond, retarget, shown};
use crate::outbound::requests::wanted;
use crate::outbound::waypoint;
use crate::outcome::{Code, Outcome};
use crate::route::{self, Forward, NO_ROUTE, Preflight, RoutePlan};
use crate::state::{Balancer, IpFamily, Service, ServiceName, Snapshot, Workload};

/// What becomes of a request.
#[derive(Debug, Default)]
pub struct Explained {
    /// Route and rule that decide; `None`: none does.
    pub route: Option<String>,
    /// Rate limits that it counts against.
    pub limits: Vec<String>,
    /// Everything that may become of it, with its share of all such requests.
    pub outcomes: Vec<(f64, Becomes)>,
}

/// One thing that may become of it.
#[derive(Debug)]
pub enum Becomes {
    /// The proxy answers.
    Answered {
        /// Status.
        status: u16,
        /// Why, in a sentence.
        text: String,
    },
    /// It goes to a Service.
    Sent(Box<Sent>),
}

/// To a Service.
#[derive(Debug)]
pub struct Sent {
    /// To one of its endpoints; the others are those of the plan's Service.
    pub plan: Plan,
    /// Address of the Service, and its port.
    pub at: SocketAddr,
    /// As the endpoint gets it.
    pub request: Request<()>,
    /// Why the plan's endpoint gets it and no other. `None`: the others get their share of such requests too.
    pub bound: Option<&'static str>,
}

impl From<Refused> for Becomes {
    fn from(refused: Refused) -> Self {
        Self::Answered { status: refused.reply.status.as_u16(), text: refused.outcome.detail.into_owned() }
    }
}

/// Explains one. `None`: requests on such a connection are not read here.
pub fn explained(
    snapshot: &Snapshot,
    source: &Workload,
    (network, destinations): (&str, &Destinations),
    destination: SocketAddr,
    mut request: Request<()>,
) -> Option<Explained> {
    wanted(snapshot, source, network, destination)?;
    let service = snapshot.service_at(network, destination, &source.namespace)?;
    let all = |becomes: Becomes| Explained { outcomes: vec![(1.0, becomes)], ..Explained::default() };
    let path = match prepare(&mut request, destination) {
        Ok((path, _)) => path,
        Err(refused) => return Some(all(refused.into())),
    };
    let port = destination.port();
    let send = |name: &ServiceName, port: u16, forward: Option<&Forward>| {
        let to = (name, SocketAddr::new(destination.ip(), port));
        send(snapshot, source, destinations, to, (&request, &path), forward).unwrap_or_else(Becomes::from)
    };
    let Some(candidates) = snapshot.routes_for(service, port, &source.namespace) else {
        // Only a traffic policy speaks of it.
        let own = ServiceName { namespace: service.namespace.clone(), hostname: service.hostname.clone() };
        return Some(all(send(&own, port, None)));
    };
    let facts = headers::facts(&request, &path, port);
    let Some(found) = route::find(candidates, &facts) else { return Some(all(respond(&NO_ROUTE).into())) };
    let becomes = |plan: RoutePlan| match plan {
        RoutePlan::Redirect(redirection) => Becomes::Answered {
            status: redirection.status,
            text: format!("the client is sent to {}", String::from_utf8_lossy(redirection.location.as_bytes())),
        },
        RoutePlan::Preflight(Preflight { allowed, .. }) => Becomes::Answered {
            status: 204,
            text: match allowed {
                true => "the route answers the preflight: its origin is allowed".to_owned(),
                false => "the route answers the preflight: its origin is not allowed".to_owned(),
            },
        },
        RoutePlan::Respond(answer) => respond(&answer).into(),
        RoutePlan::Forward(forward) => send(&forward.backend().service, forward.backend().port, Some(&forward)),
    };
    let session = found.rule().session.as_ref().and_then(|rule| shown(rule, request.headers()));
    let plans = found.plans(&facts, session.as_ref());
    Some(Explained {
        route: Some(found.text()),
        limits: found.limits().iter().map(|limit| limit.name.to_string()).collect(),
        outcomes: plans.into_iter().map(|(share, plan)| (share, becomes(plan))).collect(),
    })
}

/// Who of the endpoints of a Service's port is left alone for now by the traffic policy that `source` is under.
pub fn ejected<'a>(
    snapshot: &'a Snapshot,
    source: &'a Workload,
    destinations: &Destinations,
    service: &Service,
    port: u16,
) -> impl Fn(SocketAddr) -> bool + 'a {
    let (now, pod) = (Instant::now(), &source.pod_uid);
    let ejecting = snapshot.traffic_for(service, port, &source.namespace).and_then(|(policy, settings)| {
        let rules = settings.outlier.as_ref().filter(|_| !waypoint::decides(snapshot, source, service))?;
        let known = destinations.known(service, port)?;
        known.ejects(&policy.id, rules, service.candidates(port), pod, now).then_some((policy, known))
    });
    move |endpoint| {
        ejecting.as_ref().is_some_and(|(policy, known)| {
            known.outliers(&policy.id, now, |outliers| outliers.is_out(endpoint, pod, now))
        })
    }
}

/// To a Service's port, as its route has it. `to`: the Service, and where the client dialled, with the port of the backend.
fn send(
    snapshot: &Snapshot,
    source: &Workload,
    destinations: &Destinations,
    (name, dialled): (&ServiceName, SocketAddr),
    (request, path): (&Request<()>, &str),
    forward: Option<&Forward>,
) -> Result<Becomes, Refused> {
    let unknown = || format!("the route's backend {}/{} is not known here", name.namespace, name.hostname);
    let Some(service) = snapshot.service(&name.namespace, &name.hostname) else {
        let text = unknown();
        return Ok(Becomes::Answered { status: 500, text });
    };
    let at = SocketAddr::new(address_of(service, dialled.ip()), dialled.port());
    let (mut parts, ()) = request.clone().into_parts();
    if let Some(forward) = forward {
        forward.on_request(&mut parts.headers);
    }
    let authority = forward.and_then(|forward| forward.authority.as_deref());
    let path = forward.and_then(|forward| forward.path.as_deref()).unwrap_or(path);
    retarget(&mut parts, Framing::One, path, authority)
        .map_err(|text| Refused::from(Outcome::new(Code::BadRequest, text)))?;
    let policy = snapshot.traffic_for(service, at.port(), &source.namespace).map(|(policy, _)| policy);
    let policy = policy.filter(|_| !waypoint::decides(snapshot, source, service));
    let hash = policy.and_then(|policy| match &policy.at(at.port()).balancer {
        Balancer::Hash(key, layout) => Some((carried(key, &parts, source.address(IpFamily::of(at.ip()))?)?, *layout)),
        _ => None,
    });
    let ejected = ejected(snapshot, source, destinations, service, at.port());
    let session = forward.and_then(|forward| forward.session.as_ref()).map(|session| &*session.endpoint);
    let way = hash.map_or(Way::Usual, |(key, layout)| Way::Hash(key, layout));
    let chance = Chance { session, way, ejected: &ejected, ..Chance::of(0) };
    let plan = to_service(snapshot, source, service, at, &chance)?;
    let bound = match plan.destination() {
        Some(endpoint) if session == Some(&*endpoint.uid) => Some("its session is with this endpoint"),
        _ => hash.map(|_| "the hash of what it carries chooses this endpoint"),
    };
    Ok(Becomes::Sent(Box::new(Sent { plan, at, request: Request::from_parts(parts, ()), bound })))
}
