//! A request's body that may be sent again: what was passed on is kept, up to a bound, and given first the next time.
//!
//! Nothing waits for the whole of it: the first attempt streams as it would without. Once more than [`MOST`] has passed, or
//! more than the pod may buffer, what was kept is let go, and there is no further attempt.

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::Notify;

use crate::base::budget::{Budget, Charge};
use crate::outcome::Code;

/// Most bytes kept for another attempt. Linkerd's bound, and more than nearly every request that is not an upload.
const MOST: usize = 64 * 1024;

/// Most frames kept: each may hold a buffer that is much larger than it.
const MOST_FRAMES: usize = 64;

struct Kept {
    budget: Option<Arc<Budget>>,
    frames: Vec<Bytes>,
    charges: Vec<Charge>,
    trailers: Option<HeaderMap>,
    bytes: usize,
    /// More has passed than is kept.
    lost: bool,
    /// Why its sender did not get to the end.
    failed: Option<Code>,
    rest: Option<Incoming>,
    /// The attempt that may take the rest.
    attempt: u32,
    /// Told when the rest has passed, or will not.
    over: Rc<Notify>,
}

/// The body, for all of its attempts.
#[derive(Clone)]
pub struct Original(Rc<RefCell<Kept>>);

/// The body, for one attempt.
pub struct Replay {
    of: Original,
    attempt: u32,
    /// Kept frames that this attempt has sent.
    sent: usize,
    trailers_sent: bool,
}

impl Original {
    /// Of a request that was just received. What is kept of it counts in `budget`.
    pub fn new(body: Incoming, budget: &Arc<Budget>) -> Self {
        let rest = (!body.is_end_stream()).then_some(body);
        Self::with(Vec::new(), rest, Some(budget.clone()))
    }

    /// Of bytes.
    pub fn of(bytes: Bytes) -> Self {
        Self::with(if bytes.is_empty() { Vec::new() } else { vec![bytes] }, None, None)
    }

    fn with(frames: Vec<Bytes>, rest: Option<Incoming>, budget: Option<Arc<Budget>>) -> Self {
        let (charges, trailers, over) = (Vec::new(), None, Rc::default());
        Self(Rc::new(RefCell::new(Kept {
            budget,
            frames,
            charges,
            trailers,
            bytes: 0,
            lost: false,
            failed: None,
            rest,
            attempt: 0,
            over,
        })))
    }

    /// Whether all that has passed is still here.
    pub fn is_kept(&self) -> bool {
        !self.0.borrow().lost
    }

    /// Why its sender did not get to the end: it went away, or what it sent is no body.
    pub fn failed(&self) -> Option<Code> {
        self.0.borrow().failed
    }

    /// The body for the next attempt. The one before gets no more of it.
    pub fn attempt(&self) -> Replay {
        let mut kept = self.0.borrow_mut();
        kept.attempt += 1;
        Replay { of: self.clone(), attempt: kept.attempt, sent: 0, trailers_sent: false }
    }

    /// All of it, once it has passed. `None`: it was not kept, or its sender failed.
    pub async fn passed(&self) -> Option<Bytes> {
        loop {
            let over = {
                let kept = self.0.borrow();
                if kept.lost {
                    return None;
                }
                if kept.rest.as_ref().is_none_or(Body::is_end_stream) {
                    return Some(kept.frames.concat().into());
                }
                kept.over.clone()
            };
            over.notified().await;
        }
    }

    /// No further attempt: what passes from now on is not kept.
    pub fn last(&self) {
        self.0.borrow_mut().bytes = MOST;
    }
}

impl Kept {
    fn keep(&mut self, data: &Bytes) {
        self.bytes += data.len();
        let full = self.lost || self.bytes > MOST || self.frames.len() >= MOST_FRAMES;
        let charge = self.budget.as_ref().filter(|_| !full).and_then(|budget| budget.charge(data.len()));
        if full || (self.budget.is_some() && charge.is_none()) {
            self.lost = true;
            return;
        }
        self.charges.extend(charge);
        self.frames.push(data.clone());
    }
}

/// hyper says it of chunks that are none; of a connection that broke off it says something else.
fn is_malformed(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData))
}

impl Body for Replay {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Box<dyn Error + Send + Sync>>>> {
        let this = &mut *self;
        let mut kept = this.of.0.borrow_mut();
        if kept.attempt != this.attempt {
            return Poll::Ready(Some(Err("the request is being sent elsewhere".into())));
        }
        if let Some(frame) = kept.frames.get(this.sent).cloned() {
            this.sent += 1;
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if let Some(trailers) = kept.trailers.clone().filter(|_| !this.trailers_sent) {
            this.trailers_sent = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let Some(rest) = kept.rest.as_mut().filter(|rest| !rest.is_end_stream()) else {
            return Poll::Ready(None);
        };
        let polled = ready!(Pin::new(rest).poll_frame(cx));
        // Whoever waits for the end looks again at every frame; there is nobody else to tell.
        kept.over.notify_waiters();
        match polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    kept.keep(data);
                    if kept.lost {
                        kept.frames.clear();
                        kept.charges.clear();
                        this.sent = 0;
                    } else {
                        this.sent = kept.frames.len();
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    kept.trailers = Some(trailers.clone());
                    this.trailers_sent = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                kept.lost = true;
                kept.failed = Some(if is_malformed(&error) { Code::BadRequest } else { Code::ClientReset });
                Poll::Ready(Some(Err(error.into())))
            }
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        let kept = self.of.0.borrow();
        let behind = self.sent < kept.frames.len() || (kept.trailers.is_some() && !self.trailers_sent);
        !behind && kept.rest.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.of.0.borrow();
        let ahead: u64 = kept.frames.iter().skip(self.sent).map(|frame| frame.len() as u64).sum();
        let rest = kept.rest.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint);
        match rest.exact() {
            Some(exact) => SizeHint::with_exact(exact + ahead),
            None => SizeHint::default(),
        }
    }
}
