//! What becomes of a request that a rule was found for.
//!
//! A plan holds its candidate, so it outlives the snapshot that it was made from and nothing is looked up again. What the
//! proxy answers itself has a [`Reason`], one for each way in which it can happen, with the status and response flag that
//! Envoy would give.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::{HeaderValue, LOCATION};

use crate::route::change;
use crate::route::cors::{self, Granted};
use crate::route::find::{Found, RequestFacts};
use crate::route::session::Session;
use crate::route::share::{self, Salt};
use crate::state::{Abort, Backend, Mirror, Retry, RouteEntry, SessionRule};

/// What shares of faults are parts of.
const MILLION: u32 = 1_000_000;

/// See the module's header.
#[derive(Clone, Debug)]
pub enum RoutePlan {
    /// To a backend.
    Forward(Forward),
    /// The client goes elsewhere.
    Redirect(Redirection),
    /// The proxy tells a browser what it may do.
    Preflight(Preflight),
    /// The proxy answers.
    Respond(Respond),
}

/// To a backend.
#[derive(Clone, Debug)]
pub struct Forward {
    candidate: RouteEntry,
    backend: usize,
    /// Indexes of the mirrors that get a copy.
    mirrors: Vec<usize>,
    /// To wait before.
    pub delay: Option<Duration>,
    /// The new path, without a query. `None`: as the request, normalised.
    pub path: Option<String>,
    /// The new authority. `None`: as the request.
    pub authority: Option<Arc<str>>,
    /// What the client has shown of its session with the backend.
    pub session: Option<Session>,
}

impl Forward {
    /// Route, rule and match.
    pub fn candidate(&self) -> &RouteEntry {
        &self.candidate
    }

    /// Who gets it.
    pub fn backend(&self) -> &Backend {
        &self.candidate.rule().backends[self.backend]
    }

    /// Who gets copies.
    pub fn mirrors(&self) -> impl Iterator<Item = &Mirror> {
        self.mirrors.iter().map(|index| &self.candidate.rule().filters.mirrors[*index])
    }

    /// Until the response has ended, with all retries.
    pub fn request_timeout(&self) -> Option<Duration> {
        self.candidate.rule().request_timeout
    }

    /// Until the response to one attempt has ended.
    pub fn backend_timeout(&self) -> Option<Duration> {
        self.candidate.rule().backend_timeout
    }

    /// Whether to try again.
    pub fn retry(&self) -> Option<&Retry> {
        self.candidate.rule().retry.as_ref()
    }

    /// Who keeps its endpoint, and how.
    pub fn session_rule(&self) -> Option<&SessionRule> {
        self.candidate.rule().session.as_ref()
    }

    /// Changes the headers of the request.
    pub fn on_request(&self, headers: &mut HeaderMap) {
        change::headers(&self.candidate.rule().filters.request, headers);
        change::headers(&self.backend().filters.request, headers);
    }

    /// Changes the headers of the backend's response.
    pub fn on_response(&self, headers: &mut HeaderMap) {
        change::headers(&self.backend().filters.response, headers);
        change::headers(&self.candidate.rule().filters.response, headers);
    }
}

/// The client goes elsewhere.
#[derive(Clone, Debug)]
pub struct Redirection {
    candidate: RouteEntry,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// Where to.
    pub location: HeaderValue,
}

impl Redirection {
    /// Route, rule and match.
    pub fn candidate(&self) -> &RouteEntry {
        &self.candidate
    }

    /// Headers of the answer.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, self.location.clone());
        change::headers(&self.candidate.rule().filters.response, &mut headers);
        headers
    }
}

/// What a browser asks before it lets a page of another origin ask.
#[derive(Clone, Debug)]
pub struct Preflight {
    /// Whether its origin is one that the rule allows.
    pub allowed: bool,
    /// Of the answer, which is a 204.
    pub headers: HeaderMap,
}

/// The proxy answers.
#[derive(Clone, Debug)]
pub struct Respond {
    /// Route, rule and match; `None`: none was found.
    pub candidate: Option<RouteEntry>,
    /// To wait before.
    pub delay: Option<Duration>,
    /// HTTP status.
    pub status: u16,
    /// For clients that speak gRPC, with HTTP status 200.
    pub grpc_status: u32,
    /// Why.
    pub reason: Reason,
    /// More about it, for the record.
    pub detail: Option<Arc<str>>,
}

/// Why the proxy answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The Service's port has routes, and none matches.
    NoRoute,
    /// The rule cannot be carried out.
    RuleBroken,
    /// The rule names no backend, or all weights are 0.
    NoBackend,
    /// The backend whose turn it is cannot be sent to.
    BackendInvalid,
    /// A fault, on purpose.
    Fault,
}

impl Reason {
    /// As in Envoy's access log; empty: none.
    pub fn flag(self) -> &'static str {
        match self {
            Self::NoRoute => "NR",
            Self::RuleBroken | Self::NoBackend | Self::BackendInvalid => "",
            Self::Fault => "FI",
        }
    }

    /// One clause, for the record and for people.
    pub fn text(self) -> &'static str {
        match self {
            Self::NoRoute => "the Service has routes, and none matches the request",
            Self::RuleBroken => "the rule of the route cannot be carried out; see the route's conditions",
            Self::NoBackend => "the rule of the route sends nothing anywhere: it has no backend with a weight",
            Self::BackendInvalid => "the backend of the route cannot be sent to; see the route's conditions",
            Self::Fault => "answered by an HTTPFault, on purpose",
        }
    }
}

/// What a request gets that no rule matches.
pub const NO_ROUTE: Respond =
    Respond { candidate: None, delay: None, status: 404, grpc_status: 12, reason: Reason::NoRoute, detail: None };

impl Found {
    /// What becomes of the request. `turn` is the rule's next.
    pub fn plan(&self, facts: &RequestFacts<'_>, turn: u64) -> RoutePlan {
        self.plan_of(facts, turn, None)
    }

    /// The same for one of a client's session, which may have its backend already.
    pub fn plan_of(&self, facts: &RequestFacts<'_>, turn: u64, session: Option<Session>) -> RoutePlan {
        if let Some(decided) = self.without_backend(facts) {
            return decided;
        }
        let (delay, abort) = self.fault(turn);
        if let Some(abort) = abort {
            return self.abort(delay, abort);
        }
        let kept = session.as_ref().and_then(|session| session.backend(self.rule()));
        let Some(backend) = kept.or_else(|| share::pick(&self.weights(), turn)) else {
            return self.fails(Reason::NoBackend, None);
        };
        let plan = self.to_backend(facts, backend, delay, self.copies(turn));
        match plan {
            RoutePlan::Forward(forward) => {
                RoutePlan::Forward(Forward { session: session.filter(|_| kept.is_some()), ..forward })
            }
            plan => plan,
        }
    }

    /// Everything that may become of the request, with its share of all such requests: for explanations. One of a client's
    /// session may have its backend already. Delays and copies are left out; they change nobody's answer.
    pub fn plans(&self, facts: &RequestFacts<'_>, session: Option<&Session>) -> Vec<(f64, RoutePlan)> {
        if let Some(decided) = self.without_backend(facts) {
            return vec![(1.0, decided)];
        }
        let abort = self.rule().filters.fault.as_ref().and_then(|fault| fault.abort);
        let aborted = abort.map_or(0.0, |(_, share)| (f64::from(share) / f64::from(MILLION)).min(1.0));
        let mut plans: Vec<(f64, RoutePlan)> =
            abort.filter(|_| aborted > 0.0).map(|(abort, _)| (aborted, self.abort(None, abort))).into_iter().collect();
        let mut weights = self.weights();
        let kept = session.and_then(|session| session.backend(self.rule()));
        if let Some(kept) = kept {
            weights.iter_mut().enumerate().for_each(|(index, weight)| *weight = u32::from(index == kept));
        }
        let all: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let passed = 1.0 - aborted;
        if passed > 0.0 && all == 0.0 {
            plans.push((passed, self.fails(Reason::NoBackend, None)));
        }
        for (index, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0 && passed > 0.0) {
            let plan = match self.to_backend(facts, index, None, Vec::new()) {
                RoutePlan::Forward(forward) if kept.is_some() => {
                    RoutePlan::Forward(Forward { session: session.cloned(), ..forward })
                }
                plan => plan,
            };
            plans.push((passed * f64::from(*weight) / all, plan));
        }
        plans
    }

    /// Who may see the answer to the request. `None`: the rule does not say.
    pub fn granted(&self, facts: &RequestFacts<'_>) -> Option<Granted> {
        self.rule().filters.cors.as_ref().map(|cors| Granted::of(cors, facts))
    }

    fn weights(&self) -> Vec<u32> {
        self.rule().backends.iter().map(|backend| backend.weight).collect()
    }

    /// What is the same whoever's turn it is.
    fn without_backend(&self, facts: &RequestFacts<'_>) -> Option<RoutePlan> {
        let (candidate, rule) = (self.candidate(), self.rule());
        if let Some(why) = &rule.broken {
            return Some(self.fails(Reason::RuleBroken, Some(why)));
        }
        if let Some((granted, headers)) = rule.filters.cors.as_ref().and_then(|cors| cors::preflight(cors, facts)) {
            return Some(RoutePlan::Preflight(Preflight { allowed: granted.is_allowed(), headers }));
        }
        let redirect = rule.filters.redirect.as_ref()?;
        // Host and path come from the request and the route, and both are visible ASCII.
        let Ok(location) = HeaderValue::from_str(&change::location(redirect, &candidate.wanted().path, facts)) else {
            return Some(self.fails(Reason::RuleBroken, None));
        };
        let status = redirect.status;
        Some(RoutePlan::Redirect(Redirection { candidate: candidate.clone(), status, location }))
    }

    fn to_backend(
        &self,
        facts: &RequestFacts<'_>,
        backend: usize,
        delay: Option<Duration>,
        mirrors: Vec<usize>,
    ) -> RoutePlan {
        let (candidate, rule) = (self.candidate(), self.rule());
        if let Some(why) = &rule.backends[backend].invalid {
            return self.fails(Reason::BackendInvalid, Some(why));
        }
        let path = &candidate.wanted().path;
        let rewrites = [&rule.backends[backend].filters.rewrite, &rule.filters.rewrite];
        let rewritten = |part: fn(&crate::state::Rewrite) -> bool| rewrites.into_iter().flatten().find(|r| part(r));
        let new_path = rewritten(|rewrite| rewrite.path.is_some()).and_then(|rewrite| rewrite.path.as_ref());
        let new_host = rewritten(|rewrite| rewrite.hostname.is_some()).and_then(|rewrite| rewrite.hostname.clone());
        RoutePlan::Forward(Forward {
            candidate: candidate.clone(),
            backend,
            mirrors,
            delay,
            path: new_path.map(|new| change::path(new, path, facts.path)),
            authority: new_host,
            session: None,
        })
    }

    fn abort(&self, delay: Option<Duration>, abort: Abort) -> RoutePlan {
        let (status, grpc_status) = match abort {
            Abort::Http(status) => (status, grpc_of(status)),
            Abort::Grpc(code) => (200, code),
        };
        RoutePlan::Respond(Respond { delay, ..self.respond(status, grpc_status, Reason::Fault, None) })
    }

    fn fails(&self, reason: Reason, detail: Option<&Arc<str>>) -> RoutePlan {
        RoutePlan::Respond(self.respond(500, 14, reason, detail))
    }

    fn respond(&self, status: u16, grpc_status: u32, reason: Reason, detail: Option<&Arc<str>>) -> Respond {
        let candidate = Some(self.candidate().clone());
        Respond { candidate, delay: None, status, grpc_status, reason, detail: detail.cloned() }
    }

    fn fault(&self, turn: u64) -> (Option<Duration>, Option<Abort>) {
        let Some(fault) = &self.rule().filters.fault else { return (None, None) };
        let delay = fault.delay.filter(|(_, share)| share::hits(Salt::Delay, *share, MILLION, turn));
        let abort = fault.abort.filter(|(_, share)| share::hits(Salt::Abort, *share, MILLION, turn));
        (delay.map(|(delay, _)| delay), abort.map(|(abort, _)| abort))
    }

    fn copies(&self, turn: u64) -> Vec<usize> {
        let mirrors = self.rule().filters.mirrors.iter().enumerate();
        let hit = |(index, mirror): &(usize, &Mirror)| {
            share::hits(Salt::Mirror(*index), mirror.share.0, mirror.share.1, turn)
        };
        mirrors.filter(hit).map(|(index, _)| index).collect()
    }
}

/// The gRPC status for an HTTP status that the proxy makes up.
pub fn grpc_of(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 => 8,
        502 | 503 => 14,
        504 => 4,
        500 => 14,
        _ => 2,
    }
}
