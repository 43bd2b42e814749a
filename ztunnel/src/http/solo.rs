//! The requests of one client to one server, on a connection of that client alone, which is dialled again when the server
//! has closed it between two requests.
//!
//! Where what a connection may do hangs on who the client is, connections are not shared among clients. One request at a
//! time with HTTP/1; any number with HTTP/2, on one connection.

use std::cell::RefCell;
use std::future::{Future, pending};
use std::pin::Pin;
use std::rc::Rc;

use http::{Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;

use crate::http::client::{Conn, Failed};
use crate::http::reply::{self, Reply};
use crate::http::server::{Switch, Switches};
use crate::http::{Body, BoxIo, End, Framing, grpc_status, headers};
use crate::outcome::Outcome;
use crate::telemetry::HttpRecord;

/// Makes a connection to the server.
pub type Dial = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<BoxIo, Outcome>>>>>;

/// See the module's header.
pub struct Solo {
    framing: Framing,
    dial: Dial,
    /// The server's side while no request is under way (HTTP/1), or for all of them (HTTP/2).
    waiting: RefCell<Option<Conn>>,
}

impl Solo {
    /// Dials at the first request.
    pub fn new(framing: Framing, dial: Dial) -> Self {
        Self { framing, dial, waiting: RefCell::default() }
    }

    /// Begins on a connection that is there.
    ///
    /// # Errors
    /// If the server does not take it.
    pub async fn begin(io: BoxIo, framing: Framing, dial: Dial) -> Result<Self, Outcome> {
        let conn = Conn::begin(io, framing, None, pending()).await?;
        Ok(Self { framing, dial, waiting: RefCell::new(Some(conn)) })
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
        let count = record.request_bytes.clone();
        let mut request = request.map(|body| Body::from(body).then(move |ended| count.set(ended.bytes)));
        if self.framing == Framing::One {
            *request.version_mut() = Version::HTTP_11;
        }
        let mut fresh = false;
        let (response, conn) = loop {
            let mut conn = self.connected(fresh).await.map_err(|outcome| (reply::CONNECT_FAILED, outcome))?;
            match conn.send(request, switch).await {
                Ok(response) => break (response, conn),
                // Closed by the server between two requests; nothing was sent.
                Err(Failed { unsent: Some(unsent), .. }) if !fresh => (request, fresh) = (unsent, true),
                Err(Failed { outcome, .. }) => return Err((reply::RESET, outcome)),
            }
        };
        let (mut parts, incoming) = response.into_parts();
        let switched = parts.status == StatusCode::SWITCHING_PROTOCOLS;
        let protocol = parts.headers.get(header::UPGRADE).cloned().filter(|_| switched);
        headers::strip_hop(&mut parts.headers, protocol.as_ref());
        parts.version = Version::HTTP_11;
        if switched {
            if let Conn::One(one) = conn {
                *switches.borrow_mut() = Some(Switch { server: one.into_raw(), held: Box::new(self.clone()) });
            }
            return Ok(Response::from_parts(parts, Body::empty()));
        }
        record.grpc_status = grpc_status(&parts.headers);
        let this = self.clone();
        let body = Body::from(incoming).then(move |ended| {
            if matches!((&ended.end, &conn), (End::Complete, Conn::One(_))) {
                *this.waiting.borrow_mut() = Some(conn);
            }
        });
        Ok(Response::from_parts(parts, body))
    }

    /// The connection to the server, or a new one.
    async fn connected(&self, fresh: bool) -> Result<Conn, Outcome> {
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
            return Ok(conn);
        }
        let conn = Conn::begin((self.dial)().await?, self.framing, None, pending()).await?;
        if let Conn::Two(two) = &conn {
            *self.waiting.borrow_mut() = Some(Conn::Two(two.clone()));
        }
        Ok(conn)
    }
}
