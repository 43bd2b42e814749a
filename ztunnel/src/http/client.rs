//! The server's side: one connection to an application or to its proxy, and the sending of requests on it.
//!
//! What can be known of a request that failed is kept apart ([`Failed`]), because it decides whether it may be sent again.

use std::cell::Cell;
use std::error::Error as _;
use std::future::{Future, pending, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT, HeaderValue, TRANSFER_ENCODING};
use http::{Method, Request, Response, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};
use tulle_certs::SpiffeId;

use crate::base::{Pings, workers};
use crate::http::io::OnWorker;
use crate::http::offer::Offer;
use crate::http::{
    Body, BoxIo, CONNECTION_WINDOW, Framing, HEAD_BYTES, HEADER_LIST, PING, PONG, SEND_BUFFER, STREAM_WINDOW, headers,
    offer,
};
use crate::outcome::{Code, Outcome, chain};

/// Requests under way on one connection: what servers allow at least (RFC 9113 §6.5.2). More are queued by h2 if one allows less.
const STREAMS: usize = 100;

/// How long a server may take to say that it wants a body that was offered: what curl gives it.
const CONTINUE: Duration = Duration::from_secs(1);
/// How long a connection for many requests is kept without one, unless a policy says otherwise: as long as it may get new
/// ones, since it costs little and its server says goodbye before it closes.
const MOST_IDLE: Duration = Duration::from_secs(600);

/// A connection without its protocol.
pub struct Raw {
    /// Bytes.
    pub io: BoxIo,
    /// Bytes that were read already.
    pub read: Bytes,
    /// Completes when it may not go on.
    pub stop: Pin<Box<dyn Future<Output = ()>>>,
}

/// Comes when both sides have changed the protocol. None: the server hung up.
pub type Below = Pin<Box<dyn Future<Output = Option<Raw>>>>;

/// A connection for one request at a time.
pub struct One {
    sender: http1::SendRequest<Body>,
    raw: oneshot::Receiver<Raw>,
    switch: Rc<Cell<bool>>,
    /// Who the other side proved to be.
    pub peer: Option<SpiffeId>,
    /// Requests sent before.
    pub uses: u32,
    /// Told when it begins to wait for the next request (true), and when it is taken for one.
    pub waits: Option<Rc<dyn Fn(bool)>>,
}

/// A connection for many requests at a time. Cheap to clone.
#[derive(Clone)]
pub struct Two {
    sender: http2::SendRequest<Body>,
    /// Requests under way.
    pub streams: Rc<Cell<usize>>,
    /// The server takes no more requests; hyper finds out in its own time.
    closing: Rc<Cell<bool>>,
    /// When it was opened.
    pub since: Instant,
    /// Requests sent before.
    pub uses: Rc<Cell<u32>>,
    /// Requests that it may carry altogether.
    pub most_uses: u32,
    /// Requests that it may carry at once.
    pub most_streams: usize,
    /// How long it may be without a request.
    pub idle: Duration,
    /// Whether its server takes WebSockets.
    pub offer: Offer,
    /// Since when it was seen without one.
    pub idle_since: Rc<Cell<Option<Instant>>>,
    /// Who the other side proved to be.
    pub peer: Option<SpiffeId>,
}

/// A connection.
pub enum Conn {
    /// HTTP/1.
    One(One),
    /// HTTP/2.
    Two(Two),
}

/// Why there is no answer.
pub struct Failed {
    /// Nobody has read it: it was not sent, or the server says so.
    pub unsent: bool,
    /// There was an answer, which is none.
    pub malformed: bool,
    /// It asks for another protocol, and the server does not offer that.
    pub unoffered: bool,
    /// What happened.
    pub outcome: Outcome,
}

impl One {
    /// Whether the next request may be sent now.
    pub fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Completes when the next request may be sent; false: never again.
    pub async fn ready(&mut self) -> bool {
        self.sender.ready().await.is_ok()
    }
}

impl Two {
    /// Whether there is room for another request.
    pub fn has_room(&self) -> bool {
        self.is_open() && self.streams.get() < self.most_streams && self.uses.get() < self.most_uses
    }

    /// Whether it may be of use later.
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed() && !self.closing.get()
    }
}

impl Conn {
    /// Begins to speak HTTP on `io`. The connection ends by itself, or when `stop` completes. `pings`: how a server of HTTP/2
    /// is asked whether it is there, with and without requests; none: while requests are under way.
    ///
    /// # Errors
    /// `ServerReset` if the other side does not take it.
    pub async fn begin(
        io: BoxIo,
        framing: Framing,
        peer: Option<SpiffeId>,
        pings: Option<Pings>,
        stop: impl Future<Output = ()> + 'static,
    ) -> Result<Self, Outcome> {
        let failed = |error: hyper::Error| Outcome::new(Code::ServerReset, chain(&error));
        match framing {
            Framing::One => {
                let (sender, connection) = http1::Builder::new()
                    .max_buf_size(HEAD_BYTES)
                    .max_headers(headers::MOST_HEADERS)
                    .max_header_size(HEAD_BYTES)
                    .handshake(TokioIo::new(io))
                    .await
                    .map_err(failed)?;
                let switch = Rc::<Cell<bool>>::default();
                let (give, raw) = oneshot::channel();
                workers::spawn(drive(connection, switch.clone(), give, stop));
                Ok(Self::One(One { sender, raw, switch, peer, uses: 0, waits: None }))
            }
            Framing::Two => {
                let (io, offer) = offer::watched(io);
                let (sender, connection) = http2::Builder::new(OnWorker)
                    .timer(TokioTimer::new())
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_header_list_size(HEADER_LIST)
                    .max_send_buf_size(SEND_BUFFER)
                    .keep_alive_interval(pings.map_or(PING, |pings| pings.interval))
                    .keep_alive_timeout(pings.map_or(PONG, |pings| pings.timeout))
                    .keep_alive_while_idle(pings.is_some())
                    .handshake(TokioIo::new(io))
                    .await
                    .map_err(failed)?;
                workers::spawn(async move {
                    tokio::select! {
                        biased;
                        () = stop => {}
                        _ = connection => {}
                    }
                });
                let since = Instant::now();
                Ok(Self::Two(Two {
                    sender,
                    streams: Rc::default(),
                    closing: Rc::default(),
                    since,
                    uses: Rc::default(),
                    most_uses: u32::MAX,
                    most_streams: STREAMS,
                    idle: MOST_IDLE,
                    offer,
                    idle_since: Rc::default(),
                    peer,
                }))
            }
        }
    }

    /// Who the other side proved to be.
    pub fn peer(&self) -> Option<&SpiffeId> {
        match self {
            Self::One(one) => one.peer.as_ref(),
            Self::Two(two) => two.peer.as_ref(),
        }
    }

    /// Sends `request` and waits for the head of the answer. `switch`: it asks for another protocol.
    ///
    /// # Errors
    /// What is known of the request.
    pub async fn send(&mut self, mut request: Request<Body>, switch: bool) -> Result<Response<Incoming>, Failed> {
        let answer = match self {
            Self::One(one) => {
                frame(&mut request);
                until_wanted(&mut request);
                one.switch.set(switch);
                one.uses += 1;
                one.sender.try_send_request(request).await
            }
            Self::Two(two) => {
                let _stream = Stream::new(&two.streams);
                if switch {
                    if two.offer.said().await != Some(true) {
                        let text = "the server does not offer other protocols over HTTP/2 (RFC 8441)";
                        let outcome = Outcome::new(Code::BadRequest, text);
                        return Err(Failed { unsent: true, malformed: false, unoffered: true, outcome });
                    }
                    *request.method_mut() = Method::CONNECT;
                }
                two.uses.set(two.uses.get().saturating_add(1));
                two.idle_since.set(None);
                two.sender.try_send_request(request).await
            }
        };
        answer.map_err(|mut error| {
            let malformed = error.error().is_parse();
            let unsent = error.take_message().is_some() || is_unread(error.error());
            if let (Self::Two(two), true) = (&*self, unsent) {
                two.closing.set(true);
            }
            Failed {
                unsent,
                malformed,
                unoffered: false,
                outcome: Outcome::new(Code::ServerReset, chain(error.error())),
            }
        })
    }

    /// Whether the answer to a request grants another protocol, for which the request has asked (`switch`).
    pub fn grants(&self, switch: bool, answer: StatusCode) -> bool {
        match self {
            Self::One(_) => answer == StatusCode::SWITCHING_PROTOCOLS,
            Self::Two(_) => switch && answer == StatusCode::OK,
        }
    }

    /// The bytes below, after the server has granted it by this answer.
    pub fn below(self, answer: &mut Response<Incoming>) -> Below {
        match self {
            Self::One(one) => {
                let raw = one.raw;
                Box::pin(async move { raw.await.ok() })
            }
            Self::Two(two) => {
                // The connection stays as long as one of its senders.
                let (used, upgrade) = ((Stream::new(&two.streams), two), hyper::upgrade::on(answer));
                Box::pin(async move {
                    let io = Box::new(TokioIo::new(upgrade.await.ok()?));
                    // The connection's own end ends its streams.
                    let stop = Box::pin(async move {
                        pending::<()>().await;
                        drop(used);
                    });
                    Some(Raw { io, read: Bytes::new(), stop })
                })
            }
        }
    }

    /// Whether a request was sent on it before.
    pub fn was_used(&self) -> bool {
        match self {
            Self::One(one) => one.uses > 0,
            Self::Two(_) => true,
        }
    }

    /// Counts a request of an HTTP/2 connection until it is dropped.
    pub fn stream(&self) -> Option<Stream> {
        match self {
            Self::One(_) => None,
            Self::Two(two) => Some(Stream::new(&two.streams)),
        }
    }
}

/// Whether the server proves that it has not read a request: it refused the stream, or said goodbye before it (RFC 9113
/// §8.7). h2 gives that error to the streams behind the last one that the server names, and to no others.
fn is_unread(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        let refused = cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM);
        cause.is_remote() && (cause.is_go_away() || refused)
    })
}

/// Says that chunks follow where the body's length is not known: without, hyper would leave the body of a GET out.
fn frame(request: &mut Request<Body>) {
    let length = request.body().size_hint().exact();
    if length.is_none() && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Holds a body back that its client offers (`Expect: 100-continue`) until the server wants it or [`CONTINUE`] is over:
/// asking the client for it is what tells it to go on.
fn until_wanted(request: &mut Request<Body>) {
    let offered =
        request.headers().get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if !offered || request.body().is_end_stream() {
        return;
    }
    let wanted = Arc::new(Notify::new());
    let said = wanted.clone();
    hyper::ext::on_informational(request, move |answer| {
        if answer.status() == StatusCode::CONTINUE {
            said.notify_one();
        }
    });
    request.body_mut().wait(async move {
        // Servers that know nothing of it say nothing; clients wait as long for us.
        let _ = timeout(CONTINUE, wanted.notified()).await;
    });
}

/// One request under way.
pub struct Stream(Rc<Cell<usize>>);

impl Stream {
    fn new(streams: &Rc<Cell<usize>>) -> Self {
        streams.set(streams.get() + 1);
        Self(streams.clone())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Keeps an HTTP/1 connection going, and gives its bytes back when both sides change the protocol.
async fn drive(
    mut connection: http1::Connection<TokioIo<BoxIo>, Body>,
    switch: Rc<Cell<bool>>,
    give: oneshot::Sender<Raw>,
    stop: impl Future<Output = ()> + 'static,
) {
    let mut stop: Pin<Box<dyn Future<Output = ()>>> = Box::pin(stop);
    let ended = {
        tokio::select! {
            biased;
            () = &mut stop => return,
            ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => ended,
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %chain(&error), "a connection to a server ended");
        return;
    }
    let parts = connection.into_parts();
    let mut raw = Raw { io: parts.io.into_inner(), read: parts.read_buf, stop };
    if switch.get() {
        match give.send(raw) {
            Ok(()) => return,
            Err(back) => raw = back,
        }
    }
    // The other side has closed, or nobody sends any more.
    let _ = raw.io.shutdown().await;
}
