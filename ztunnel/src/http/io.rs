//! Connections as hyper takes them: what a client sends is followed on its way in (`gate`, `frames`), and a slow header is
//! measured by a clock. hyper's own clock would close connections that are kept for later; the limit itself is the server's.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::rt::Executor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::base::{Counts, workers};
use crate::http::Framing;
use crate::http::frames::Frames;
use crate::http::gate::{Gate, Stop};

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

/// A TCP connection or a stream of a tunnel: one machine code for both.
pub type BoxIo = Box<dyn Duplex>;

/// Runs hyper's tasks on the worker that the connection is on.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnWorker;

impl<F> Executor<F> for OnWorker
where
    F: Future + 'static,
{
    fn execute(&self, future: F) {
        workers::spawn(async move {
            future.await;
        });
    }
}

/// How long a client takes for the head of a request, from its first byte on. hyper's own clock runs while a connection
/// is idle as well, and would close connections that are kept for later.
#[derive(Debug, Default)]
pub struct HeadClock {
    since: Cell<Option<Instant>>,
    busy: Cell<bool>,
    began: Notify,
    refused: Cell<Option<&'static str>>,
}

impl HeadClock {
    fn bytes(&self) {
        if !self.busy.get() && self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
            self.began.notify_one();
        }
    }

    /// The head is complete.
    pub fn complete(&self) {
        self.since.set(None);
        self.busy.set(true);
    }

    /// The next bytes are a new head.
    pub fn next(&self) {
        self.busy.set(false);
    }

    /// Why no more of the client's bytes are taken.
    pub fn refused(&self) -> Option<&'static str> {
        self.refused.get()
    }

    /// Completes when a head has taken longer than `limit`.
    pub async fn overdue(&self, limit: Duration) {
        loop {
            match self.since.get() {
                Some(since) if since.elapsed() >= limit => return,
                Some(since) => sleep_until(since + limit).await,
                None => self.began.notified().await,
            }
        }
    }
}

/// Put in the place of a byte that must not pass. No parser takes it in a head or between chunks, so hyper refuses the
/// message, with an answer where one can still be given.
const POISON: u8 = 0;

/// Comes behind it: a head that has an end is looked at.
const END: &[u8] = b"\r\n\r\n";

/// What follows a client's bytes.
enum Guard {
    Nobody,
    Messages(Gate),
    Frames(Frames, Instant),
    /// Nothing is read any more.
    Closed,
}

/// A client's connection: bytes that were read to tell its protocol come first, and bytes are counted as the client's.
pub struct Downstream {
    first: Bytes,
    io: BoxIo,
    counts: Rc<Counts>,
    clock: Rc<HeadClock>,
    guard: Guard,
}

impl Downstream {
    /// A connection of which `first` was read already.
    pub fn new(first: Bytes, io: BoxIo, counts: Rc<Counts>, clock: Rc<HeadClock>) -> Self {
        Self { first, io, counts, clock, guard: Guard::Nobody }
    }

    /// Follows what the client sends from now on.
    #[must_use]
    pub fn guarded(mut self, framing: Framing) -> Self {
        self.guard = match framing {
            Framing::One => Guard::Messages(Gate::default()),
            Framing::Two => Guard::Frames(Frames::default(), Instant::now()),
        };
        self
    }

    /// Lets everything pass: it is another protocol from now on, or nobody reads it as anything.
    pub fn unguarded(&mut self) {
        if matches!(self.guard, Guard::Closed) {
            self.first.clear();
        }
        self.guard = Guard::Nobody;
    }

    /// Looks at what was read into `buf` behind `before`.
    fn look(&mut self, buf: &mut ReadBuf<'_>, before: usize) -> io::Result<()> {
        match &mut self.guard {
            Guard::Nobody | Guard::Closed => {}
            Guard::Messages(gate) => {
                if let Err(Stop { at, why }) = gate.follow(&buf.filled()[before..]) {
                    buf.filled_mut()[before + at] = POISON;
                    buf.set_filled(before + at + 1);
                    self.first = Bytes::from_static(END);
                    self.clock.refused.set(Some(why));
                    self.guard = Guard::Closed;
                }
            }
            Guard::Frames(frames, began) => {
                if let Err(why) = frames.follow(&buf.filled()[before..], began.elapsed()) {
                    self.clock.refused.set(Some(why));
                    self.guard = Guard::Closed;
                    return Err(io::Error::other(why));
                }
            }
        }
        Ok(())
    }
}

impl AsyncRead for Downstream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        if !this.first.is_empty() {
            let taken = this.first.len().min(buf.remaining());
            buf.put_slice(&this.first[..taken]);
            this.first.advance(taken);
        } else if matches!(this.guard, Guard::Closed) {
            return Poll::Ready(Ok(()));
        } else {
            std::task::ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        }
        this.look(buf, before)?;
        let read = buf.filled().len() - before;
        if read > 0 {
            this.counts.up.set(this.counts.up.get() + read as u64);
            this.clock.bytes();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Downstream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.counts.down.set(self.counts.down.get() + written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.counts.down.set(self.counts.down.get() + written as u64);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
