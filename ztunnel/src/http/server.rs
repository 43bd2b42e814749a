//! The client's side: one connection, its requests one after another (HTTP/1) or together (HTTP/2), and the change to
//! another protocol when both sides agree on it.
//!
//! A request that is under way when the proxy drains is finished, and the client is told to open another connection for the
//! next one (`Connection: close`, GOAWAY).

use std::any::Any;
use std::cell::RefCell;
use std::convert::Infallible;
use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional, split};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::base::drain::Drained;
use crate::http::client::Conn;
use crate::http::io::{Duplex, HeadClock, OnWorker};
use crate::http::{
    Body, CONNECTION_WINDOW, Downstream, Framing, HEAD_BYTES, HEAD_TIME, HEADER_LIST, LOCAL_RESETS, PENDING_RESETS,
    PING, PONG, SEND_BUFFER, STREAM_WINDOW, STREAMS, client, headers,
};
use crate::outcome::{Code, Outcome, chain};

/// How long a client may go on sending after the last answer, and how many bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// How long the second side of a WebSocket over HTTP/2 may go on after the first one has ended. A WebSocket says by itself that
/// it ends, and a stream that was reset looks like one that has ended.
const SECOND: Duration = Duration::from_secs(10);

/// How long a client of HTTP/1 keeps its connection without a request when the proxy goes away. Its next request, or its first
/// one, may be under way, and would be lost with the connection; the answer to it says that it was the last.
const QUIET: Duration = Duration::from_secs(5);

/// An answer on its way.
pub type Answer = Pin<Box<dyn Future<Output = Response<Body>>>>;

/// What becomes of a request.
pub type Service = Rc<dyn Fn(Request<Incoming>, Switches) -> Answer>;

/// The server's side of a connection that is to become another protocol's.
pub struct Switch {
    /// Comes when the server has granted it.
    pub server: client::Below,
    /// Kept until the end.
    pub held: Box<dyn Any>,
}

/// Where the answer to a request to change the protocol leaves the server's side.
pub type Switches = Rc<RefCell<Option<Switch>>>;

/// An answer that grants another protocol, as the client gets it. What comes behind it is left in `switches`, and `held`
/// until its end.
pub fn switch_to(conn: Conn, mut answer: Response<Incoming>, held: impl Any, switches: &Switches) -> Response<Body> {
    let server = conn.below(&mut answer);
    switches.replace(Some(Switch { server, held: Box::new(held) }));
    let (mut parts, _) = answer.into_parts();
    let protocol = parts.headers.get(header::UPGRADE).cloned();
    headers::strip_hop(&mut parts.headers, protocol.as_ref());
    parts.version = Version::HTTP_11;
    Response::from_parts(parts, Body::empty())
}

/// Serves the requests of `connection` by `service` until it ends, `stop` says so, or the drain is over. `offers`: clients of
/// HTTP/2 may ask for another protocol.
pub async fn serve(
    connection: Downstream,
    clock: Rc<HeadClock>,
    (framing, offers): (Framing, bool),
    drained: &Drained,
    stop: impl Future<Output = Outcome>,
    service: Service,
) -> Outcome {
    let (connection, mut stop) = (connection.guarded(framing), pin!(stop));
    match framing {
        Framing::One => one(connection, clock, drained, stop.as_mut(), service).await,
        Framing::Two => two(connection, &clock, offers, drained, stop.as_mut(), service).await,
    }
}

/// The next bytes of the client are a new head.
struct Next(Rc<HeadClock>);

impl Drop for Next {
    fn drop(&mut self) {
        self.0.next();
    }
}

async fn one(
    connection: Downstream,
    clock: Rc<HeadClock>,
    drained: &Drained,
    mut stop: Pin<&mut impl Future<Output = Outcome>>,
    service: Service,
) -> Outcome {
    let switches = Switches::default();
    let (slot, heads, leaving) = (switches.clone(), clock.clone(), drained.clone());
    let service = service_fn(move |request| {
        heads.complete();
        let (next, leaving) = (Next(heads.clone()), leaving.clone());
        let answer = service(request, slot.clone());
        let answer = async move {
            let mut answer = answer.await.map(|body| body.hold(next));
            if leaving.is_draining() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        };
        Box::pin(answer) as Pin<Box<dyn Future<Output = _>>>
    });
    let mut connection = http1::Builder::new()
        // A client that hangs up does not wait for its answer; so do Envoy and nginx.
        .half_close(false)
        .max_buf_size(HEAD_BYTES)
        .max_headers(headers::MOST_HEADERS)
        .max_header_size(HEAD_BYTES)
        .header_read_timeout(None)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(connection), service);
    let mut quiet = pin!(async {
        drained.draining().await;
        sleep(QUIET).await;
    });
    let mut over = false;
    let ended = loop {
        tokio::select! {
            biased;
            outcome = &mut stop => return outcome,
            () = clock.overdue(HEAD_TIME) => {
                let text = format!("the head of a request was not complete {} s after its begin", HEAD_TIME.as_secs());
                return Outcome::new(Code::BadRequest, text);
            }
            () = &mut quiet, if !over => {
                over = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => break ended,
        }
    };
    let failed = failed(&clock, ended);
    let parts = connection.into_parts();
    let mut io = parts.io.into_inner();
    if let Err(outcome) = failed {
        if outcome.code == Code::BadRequest {
            farewell(io).await;
        }
        return outcome;
    }
    let Some(switch) = switches.borrow_mut().take() else {
        farewell(io).await;
        return Outcome::ok();
    };
    drop(parts.service);
    io.unguarded();
    tokio::select! {
        biased;
        outcome = stop => outcome,
        outcome = switched(io, parts.read_buf, switch) => outcome,
    }
}

/// Bytes both ways after a change of protocol.
async fn switched(client: Downstream, said: Bytes, switch: Switch) -> Outcome {
    let Some(server) = switch.server.await else {
        return Outcome::new(Code::ServerReset, "the server hung up while it changed the protocol");
    };
    bytes(client, said, server).await
}

/// Bytes both ways: what was `said` by the client and read already comes first.
pub async fn bytes(mut client: impl Duplex, said: Bytes, server: client::Raw) -> Outcome {
    let client::Raw { mut io, read, mut stop } = server;
    let begun = async {
        io.write_all(&said).await?;
        client.write_all(&read).await?;
        client.flush().await?;
        copy_bidirectional(&mut client, &mut io).await
    };
    let ended = tokio::select! {
        biased;
        () = &mut stop => return Outcome::new(Code::PolicyChanged, "the connection may not go on"),
        ended = begun => ended,
    };
    match ended {
        Ok(_) => Outcome::ok(),
        Err(error) => Outcome::new(Code::ServerReset, error.to_string()),
    }
}

async fn two(
    connection: Downstream,
    clock: &HeadClock,
    offers: bool,
    drained: &Drained,
    mut stop: Pin<&mut impl Future<Output = Outcome>>,
    service: Service,
) -> Outcome {
    // Streams of other protocols, which end with the connection. Those that are reset count until they are gone.
    let (begin, mut begun) = mpsc::channel(STREAMS as usize);
    let (mut others, counted) = (FuturesUnordered::new(), Rc::new(()));
    let service = service_fn(move |mut request: Request<Incoming>| {
        let switches = Switches::default();
        // The closure's own is one more.
        let room = Rc::strong_count(&counted) <= STREAMS as usize;
        let wish = room && headers::extended(&mut request);
        let below = wish.then(|| (counted.clone(), hyper::upgrade::on(&mut request)));
        let (answer, begin) = (service(request, switches.clone()), begin.clone());
        async move {
            let response = answer.await;
            if let (Some(below), Some(switch)) = (below, switches.take()) {
                let _ = begin.try_send(joined(below, switch));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut builder = http2::Builder::new(OnWorker);
    if offers {
        builder.enable_connect_protocol();
    }
    let mut connection = pin!(
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEADER_LIST)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(LOCAL_RESETS)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(connection), service)
    );
    let mut draining = false;
    loop {
        tokio::select! {
            biased;
            outcome = &mut stop => return outcome,
            () = drained.draining(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            Some(other) = begun.recv() => others.push(other),
            Some(()) = others.next(), if !others.is_empty() => {}
            ended = &mut connection => return failed(clock, ended).map_or_else(|outcome| outcome, |()| Outcome::ok()),
        }
    }
}

/// Bytes both ways on a stream of HTTP/2 that has become another protocol's. `counted`: dropped when it is over.
async fn joined((_counted, client): (Rc<()>, OnUpgrade), switch: Switch) {
    let Switch { server, held } = switch;
    if let (Ok(client), Some(server)) = (client.await, server.await) {
        let client::Raw { io, stop, .. } = server;
        tokio::select! {
            biased;
            () = stop => {}
            () = until_both_end(TokioIo::new(client), io) => {}
        }
    }
    drop(held);
}

/// Bytes both ways until both sides have ended, or one has and the other had [`SECOND`] since.
async fn until_both_end(client: impl AsyncRead + AsyncWrite, server: impl AsyncRead + AsyncWrite) {
    let ((mut heard, mut told), (mut back, mut forth)) = (split(client), split(server));
    let mut up = pin!(async {
        let _ = copy(&mut heard, &mut forth).await;
        let _ = forth.shutdown().await;
    });
    let mut down = pin!(async {
        let _ = copy(&mut back, &mut told).await;
        let _ = told.shutdown().await;
    });
    let _ = tokio::select! {
        () = &mut up => timeout(SECOND, down).await,
        () = &mut down => timeout(SECOND, up).await,
    };
}

/// Closes a connection. Closing with bytes unread would reset it and take the last answer back, so they are read for a
/// moment.
async fn farewell(mut io: Downstream) {
    io.unguarded();
    let rest = async {
        // A client that is gone already misses nothing.
        if io.shutdown().await.is_err() {
            return;
        }
        let mut left = LINGER_BYTES;
        let mut buffer = [0; 1024];
        while let Ok(size @ 1..) = io.read(&mut buffer).await
            && left > 0
        {
            left = left.saturating_sub(size);
        }
    };
    let _ = timeout(LINGER, Box::pin(rest)).await;
}

/// How a connection failed, if it did.
fn failed(clock: &HeadClock, ended: hyper::Result<()>) -> Result<(), Outcome> {
    match (clock.refused(), ended) {
        (Some(why), _) => Err(Outcome::new(Code::BadRequest, why)),
        (None, Err(error)) => Err(refused(&error)),
        (None, Ok(())) => Ok(()),
    }
}

/// What a connection's failure means: the client went away, or it said what HTTP forbids and got status 400 or 431, or h2's
/// goodbye, as floods do.
fn refused(error: &hyper::Error) -> Outcome {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    let goodbye = cause.is_some_and(|cause| cause.is_go_away() && cause.is_library());
    if error.is_parse() || error.is_parse_too_large() || goodbye {
        return Outcome::new(Code::BadRequest, chain(error));
    }
    Outcome::new(Code::ClientReset, chain(error))
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::rc::Rc;
    use std::time::Duration;

    use bytes::Bytes;
    use http::Response;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::{Answer, QUIET, Service, serve};
    use crate::base::drain::{Phase, drain};
    use crate::http::io::HeadClock;
    use crate::http::{Body, Downstream, Framing};

    /// Serves a client of HTTP/1 that says `head` after `late`, while the proxy goes away from the beginning on. What the
    /// client hears until the end of the connection, and when that was.
    async fn leaving(late: Duration, head: &str) -> (String, Duration) {
        let (mut client, server) = duplex(4096);
        let (owner, drained) = drain();
        owner.advance(Phase::Draining);
        let clock = Rc::new(HeadClock::default());
        let connection = Downstream::new(Bytes::new(), Box::new(server), Rc::default(), clock.clone());
        let service: Service =
            Rc::new(|_, _| Box::pin(async { Response::new(Body::full(Bytes::from_static(b"yes"))) }) as Answer);
        let begun = Instant::now();
        let served = serve(connection, clock, (Framing::One, false), &drained, pending(), service);
        let asked = async {
            tokio::time::sleep(late).await;
            let mut said = String::new();
            client.write_all(head.as_bytes()).await.unwrap();
            client.read_to_string(&mut said).await.unwrap();
            (said, begun.elapsed())
        };
        tokio::join!(served, asked).1
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_goes_away_answers_the_request_that_is_under_way_and_says_that_it_was_the_last() {
        let head = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";
        for late in [QUIET / 100, QUIET / 2] {
            let (said, took) = leaving(late, head).await;
            assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("yes"), "{said}");
            assert!(said.contains("connection: close"), "{said}");
            assert!(took < QUIET, "{took:?}");
        }
        let (said, took) = leaving(Duration::ZERO, "").await;
        assert!(said.is_empty() && took >= QUIET, "nothing was asked: {said}");
    }
}
