//! A stream of a tunnel as bytes to read and write, for whoever speaks a protocol over it instead of copying.
//!
//! Like the pumps it gives the window back only for bytes that were taken, asks for the peer's window only for bytes that
//! are there, and keeps none of it while idle. Dropping it before the end resets the stream, so that a cut never looks
//! like an end. `H` is what keeps the tunnel in use.

use std::borrow::Borrow;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::base::pace::TURN;
use crate::base::window::Slot;

/// See the module's header.
#[derive(Debug)]
pub struct StreamIo<H> {
    send: SendStream<Bytes>,
    recv: RecvStream,
    chunk: Bytes,
    held: H,
    ended: bool,
}

impl<H: Borrow<Slot>> StreamIo<H> {
    /// A stream whose two halves are open.
    pub fn new(send: SendStream<Bytes>, recv: RecvStream, held: H) -> Self {
        Self { send, recv, chunk: Bytes::new(), held, ended: false }
    }

    /// Waits for window and sends what fits of `bytes` bytes, which `take` makes.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: usize,
        take: impl FnOnce(usize) -> Bytes,
    ) -> Poll<io::Result<usize>> {
        if bytes == 0 {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(bytes.min(TURN));
        let room = loop {
            let room = self.send.capacity();
            if room > 0 {
                break room;
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        };
        let sent = room.min(bytes).min(TURN);
        let result = self.send.send_data(take(sent), false);
        self.send.reserve_capacity(0);
        Poll::Ready(result.map(|()| sent).map_err(broken))
    }
}

fn broken(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl<H: Borrow<Slot> + Unpin> AsyncRead for StreamIo<H> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.chunk.is_empty() {
            match ready!(this.recv.poll_data(cx)) {
                Some(Ok(chunk)) => this.chunk = chunk,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = buf.remaining().min(this.chunk.len());
        buf.put_slice(&this.chunk[..taken]);
        this.chunk.advance(taken);
        if taken > 0 {
            this.recv.flow_control().release_capacity(taken).map_err(broken)?;
            this.held.borrow().carried(taken);
        }
        Poll::Ready(Ok(()))
    }
}

impl<H: Borrow<Slot> + Unpin> AsyncWrite for StreamIo<H> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, buf.len(), |size| Bytes::copy_from_slice(&buf[..size]))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = bufs.iter().map(|buf| buf.len()).sum();
        self.poll_send(cx, all, |size| {
            let mut data = BytesMut::with_capacity(size);
            for buf in bufs {
                let part = buf.len().min(size - data.len());
                data.extend_from_slice(&buf[..part]);
            }
            data.freeze()
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::replace(&mut self.ended, true) {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(broken))
    }
}
