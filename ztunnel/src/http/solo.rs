//! The requests of one client to one server, on a connection of that client alone, which is dialled again when the server
//! has closed it between two requests.
//!
//! Where what a connection may do hangs on who the client is, connections are not shared among clients. One request at a
//! time with HTTP/1; any number with HTTP/2, on one connection.

use std::cell::RefCell;
use std::future::{Future, pending};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use http::{Request, Response, Version};
use hyper::body::Incoming;

use crate::base::budget::Budget;
use crate::http::client::{Conn, Failed};
use crate::http::reply::{self, Reply};
use crate::http::retry::is_idempotent;
use crate::http::server::{Switches, switch_to};
use crate::http::{Body, BoxIo, End, Framing, Original, grpc_status, headers};
use crate::outcome::{Code, Outcome};
use crate::telemetry::HttpRecord;

/// Makes a connection to the server.
pub type Dial = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<BoxIo, Outcome>>>>>;

/// See the module's header.
pub struct Solo {
    framing: Framing,
    budget: Arc<Budget>,
    dial: Dial,
    /// The server's side while no request is under way (HTTP/1), or for all of them (HTTP/2).
    waiting: RefCell<Option<Conn>>,
}

impl Solo {
    /// Dials at the first request. What is kept of requests for another attempt counts in `budget`.
    pub fn new(framing: Framing, budget: &Arc<Budget>, dial: Dial) -> Self {
        Self { framing, budget: budget.clone(), dial, waiting: RefCell::default() }
    }

    /// Begins on a connection that is there.
    ///
    /// # Errors
    /// If the server does not take it.
    pub async fn begin(io: BoxIo, framing: Framing, budget: &Arc<Budget>, dial: Dial) -> Result<Self, Outcome> {
        let conn = Conn::begin(io, framing, None, None, pending()).await?;
        Ok(Self { waiting: RefCell::new(Some(conn)), ..Self::new(framing, budget, dial) })
    }

    /// Passes a request on. `switch`: it asks for another protocol.
    ///
    /// # Errors
    /// What the client is told, and what happened.
    pub async fn pass(
        self: &Rc<Self>,
        request: Request<Incoming>,
        switch: bool,
        switches: Switches,
        record: &mut HttpRecord,
    ) -> Result<Response<Body>, (Reply, Outcome)> {
        let (mut parts, body) = request.into_parts();
        if self.framing == Framing::One {
            parts.version = Version::HTTP_11;
        }
        let original = Original::new(body, &self.budget);
        let mut fresh = false;
        let (mut response, conn) = loop {
            let (mut conn, reused) = self.connected(fresh).await.map_err(|outcome| (reply::CONNECT_FAILED, outcome))?;
            if !reused {
                original.last();
            }
            let count = record.request_bytes.clone();
            let body = Body::from(original.attempt()).then(move |ended| count.set(ended.bytes));
            match conn.send(Request::from_parts(parts.clone(), body), switch).await {
                Ok(response) => break (response, conn),
                Err(Failed { unoffered: true, outcome, .. }) => return Err((reply::NO_CONNECT, outcome)),
                Err(Failed { unsent, malformed, outcome, .. }) => {
                    if let Some(code) = original.failed() {
                        let outcome = Outcome::new(code, "the body of the request broke off");
                        return Err((reply::BAD_REQUEST, outcome));
                    }
                    // Closed by the server between two requests.
                    let again = unsent || (reused && is_idempotent(&parts.method));
                    if fresh || !again || !original.is_kept() {
                        return Err((if malformed { reply::PROTOCOL } else { reply::RESET }, outcome));
                    }
                    fresh = true;
                }
            }
        };
        headers::check_answer(response.headers_mut()).map_err(|error| {
            let text = format!("the server's answer: {}", error.0);
            (reply::PROTOCOL, Outcome::new(Code::ServerReset, text))
        })?;
        if conn.grants(switch, response.status()) {
            return Ok(switch_to(conn, response, self.clone(), &switches));
        }
        let (mut parts, incoming) = response.into_parts();
        headers::strip_hop(&mut parts.headers, None);
        parts.version = Version::HTTP_11;
        record.grpc_status = grpc_status(&parts.headers);
        let this = self.clone();
        let body = Body::from(incoming).then(move |ended| {
            if matches!((&ended.end, &conn), (End::Complete, Conn::One(_))) {
                *this.waiting.borrow_mut() = Some(conn);
            }
        });
        Ok(Response::from_parts(parts, body))
    }

    /// Whether the server takes WebSockets over HTTP/2.
    pub async fn offers(&self) -> bool {
        let offer = match &*self.waiting.borrow() {
            Some(Conn::Two(two)) => two.offer.clone(),
            _ => return false,
        };
        offer.said().await == Some(true)
    }

    /// The connection to the server, or a new one; true: it was used before.
    async fn connected(&self, fresh: bool) -> Result<(Conn, bool), Outcome> {
        let waiting = self.waiting.borrow_mut().take().filter(|_| !fresh);
        let again = match waiting {
            // Ready as soon as the connection's own task has seen the end of the answer before.
            Some(Conn::One(mut one)) => one.ready().await.then_some(Conn::One(one)),
            Some(Conn::Two(two)) if two.is_open() => {
                *self.waiting.borrow_mut() = Some(Conn::Two(two.clone()));
                Some(Conn::Two(two))
            }
            _ => None,
        };
        if let Some(conn) = again {
            let used = conn.was_used();
            return Ok((conn, used));
        }
        let conn = Conn::begin((self.dial)().await?, self.framing, None, None, pending()).await?;
        if let Conn::Two(two) = &conn {
            *self.waiting.borrow_mut() = Some(Conn::Two(two.clone()));
        }
        Ok((conn, false))
    }
}
