//! A body on its way from one connection to another: passed on frame by frame, counted, with a deadline, and with one
//! thing to do when it is over.
//!
//! Nothing is collected here: the next frame is asked for when the other side took the last one, so a body of any length
//! uses constant memory, and a slow reader slows its sender. Not here: keeping a body for a retry (`replay`).

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::http::replay::Replay;

/// How a body ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Whole.
    Complete,
    /// Its sender failed or it was not allowed to go on.
    Failed(String),
    /// Its reader went away.
    Dropped,
}

/// What is known at the end of a body.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// Bytes of data.
    pub bytes: u64,
    /// `grpc-status` of the trailers.
    pub grpc_status: Option<String>,
}

/// What is done at the end.
type Then = Box<dyn FnOnce(&Ended)>;

/// Why a body stops in the middle.
#[derive(Debug)]
pub(super) struct Cut(String);

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Cut {}

enum Kind {
    Nothing,
    Full(Bytes),
    Incoming(Incoming),
    Replay(Replay),
}

/// See the module's header.
pub struct Body {
    kind: Kind,
    bytes: u64,
    grpc_status: Option<String>,
    deadline: Option<Pin<Box<Sleep>>>,
    wait: Option<Pin<Box<dyn Future<Output = ()>>>>,
    then: Vec<Then>,
    held: Vec<Box<dyn Any>>,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self::of(Kind::Incoming(incoming))
    }
}

impl From<Replay> for Body {
    fn from(replay: Replay) -> Self {
        Self::of(Kind::Replay(replay))
    }
}

impl Body {
    fn of(kind: Kind) -> Self {
        Self { kind, bytes: 0, grpc_status: None, deadline: None, wait: None, then: Vec::new(), held: Vec::new() }
    }

    /// No body.
    pub fn empty() -> Self {
        Self::of(Kind::Nothing)
    }

    /// A body that is here.
    pub fn full(bytes: Bytes) -> Self {
        Self::of(if bytes.is_empty() { Kind::Nothing } else { Kind::Full(bytes) })
    }

    /// It has to be over by then.
    #[must_use]
    pub fn until(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline.map(|at| Box::pin(sleep_until(at)));
        self
    }

    /// Gives nothing before `ready`.
    pub fn wait(&mut self, ready: impl Future<Output = ()> + 'static) {
        self.wait = Some(Box::pin(ready));
    }

    /// Calls `then` once when it is over, however it ends; after what was asked for before.
    #[must_use]
    pub fn then(mut self, then: impl FnOnce(&Ended) + 'static) -> Self {
        self.then.push(Box::new(then));
        self
    }

    /// Keeps `what` as long as it lives.
    #[must_use]
    pub fn hold(mut self, what: impl Any) -> Self {
        self.held.push(Box::new(what));
        self
    }

    fn over(&mut self, end: End) {
        let all = std::mem::take(&mut self.then);
        if all.is_empty() {
            return;
        }
        let ended = Ended { end, bytes: self.bytes, grpc_status: self.grpc_status.take() };
        all.into_iter().for_each(|then| then(&ended));
    }

    fn see(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.bytes += data.len() as u64;
        }
        if let Some(trailers) = frame.trailers_ref() {
            self.grpc_status = grpc_status(trailers);
        }
    }
}

/// The status of a gRPC answer, from headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("grpc-status")?.to_str().ok()?;
    // A label: a number of two digits, or it is none.
    (text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.to_owned())
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Box<dyn Error + Send + Sync>>>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            let cut = Cut("the time for the request is over".to_owned());
            this.over(End::Failed(cut.to_string()));
            return Poll::Ready(Some(Err(cut.into())));
        }
        if let Some(wait) = &mut this.wait {
            ready!(wait.as_mut().poll(cx));
            this.wait = None;
        }
        let frame = match &mut this.kind {
            Kind::Nothing => None,
            Kind::Full(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Kind::Incoming(incoming) => {
                ready!(Pin::new(incoming).poll_frame(cx)).map(|frame| frame.map_err(Into::into))
            }
            Kind::Replay(replay) => ready!(Pin::new(replay).poll_frame(cx)),
        };
        if matches!(this.kind, Kind::Full(_)) {
            this.kind = Kind::Nothing;
        }
        match frame {
            Some(Ok(frame)) => {
                this.see(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                let error: Box<dyn Error + Send + Sync> = error;
                this.over(End::Failed(crate::outcome::chain(&*error)));
                Poll::Ready(Some(Err(error)))
            }
            None => {
                this.over(End::Complete);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Nothing => true,
            Kind::Full(_) => false,
            Kind::Incoming(incoming) => incoming.is_end_stream(),
            Kind::Replay(replay) => replay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Nothing => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Incoming(incoming) => incoming.size_hint(),
            Kind::Replay(replay) => replay.size_hint(),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if !self.then.is_empty() {
            // Whoever knows the length does not ask for what comes behind the last byte.
            let end = if self.is_end_stream() { End::Complete } else { End::Dropped };
            self.over(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use bytes::Bytes;
    use http_body_util::BodyExt;

    use super::{Body, End};

    #[tokio::test]
    async fn a_body_ends_once_and_says_how() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let body = |bytes: &'static [u8]| {
            let seen = seen.clone();
            Body::full(Bytes::from_static(bytes))
                .then(move |ended| seen.borrow_mut().push((ended.end.clone(), ended.bytes)))
        };
        assert_eq!(body(b"hello").collect().await.unwrap().to_bytes(), "hello");
        drop(body(b"hello"));
        drop(body(b""));
        let expected = [(End::Complete, 5), (End::Dropped, 0), (End::Complete, 0)];
        assert_eq!(*seen.borrow(), expected);
    }
}
