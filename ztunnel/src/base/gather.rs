//! What is written in one turn of a tunnel leaves together.
//!
//! `h2` writes and flushes each DATA frame of more than 256 bytes by itself, so that every response of a few hundred
//! bytes costs a TLS record, a system call and a packet. It gets [`Gathered`] as its transport instead: small writes
//! are kept, a flush does nothing, and whoever drives the connection sends what is there at the end of its turn
//! ([`Gathered::drive`]). Nothing waits longer than that; large writes take with them what was kept and are not copied.
//! Invariants: order is kept; what is kept is never more than [`ROOM`]; an idle tunnel keeps no buffer. One thread.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes kept: two TLS records, some thirty responses.
const ROOM: usize = 32 * 1024;

/// Parts of one large write that go with what was kept. `h2` has two, header and payload.
const PARTS: usize = 8;

thread_local! {
    /// The buffer that the next turn takes: turns of one worker follow each other.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A transport for somebody who flushes too often. Clones are the same transport.
#[derive(Debug)]
pub struct Gathered<T>(Rc<RefCell<Inner<T>>>);

impl<T> Clone for Gathered<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[derive(Debug)]
struct Inner<T> {
    io: T,
    kept: Vec<u8>,
    /// Why the end of a turn could not send, for whoever asks next.
    broken: Option<io::Error>,
}

impl<T: AsyncWrite + Unpin> Gathered<T> {
    /// Gathers what is written to `io`.
    pub fn new(io: T) -> Self {
        Self(Rc::new(RefCell::new(Inner { io, kept: Vec::new(), broken: None })))
    }

    /// Polls `connection`, which writes to a clone of this, and sends at the end of each turn what it has written.
    pub async fn drive<F: Future>(&self, connection: F) -> F::Output {
        let mut connection = pin!(connection);
        poll_fn(|cx| {
            let result = connection.as_mut().poll(cx);
            self.0.borrow_mut().end_turn(cx);
            result
        })
        .await
    }
}

impl<T: AsyncWrite + Unpin> Inner<T> {
    /// Sends; what fails or does not fit into the socket is met again, by the next turn or by the connection.
    fn end_turn(&mut self, cx: &mut Context<'_>) {
        if let Poll::Ready(Err(error)) = self.send(cx) {
            self.broken = Some(error);
            cx.waker().wake_by_ref();
        }
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.kept.is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, &self.kept))?;
            self.sent(sent)?;
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// The transport took `bytes` of what was kept.
    fn sent(&mut self, bytes: usize) -> io::Result<()> {
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if bytes < self.kept.len() {
            drop(self.kept.drain(..bytes));
        } else {
            let mut spare = std::mem::take(&mut self.kept);
            spare.clear();
            SPARE.set(spare);
        }
        Ok(())
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.kept.capacity() == 0 {
            self.kept = SPARE.take();
            self.kept.reserve_exact(ROOM);
        }
        self.kept.extend_from_slice(bytes);
    }

    fn write(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Err(error));
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if self.kept.len() + total <= ROOM {
            parts.iter().for_each(|part| self.keep(part));
            return Poll::Ready(Ok(total));
        }
        while !self.kept.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS];
            slices[0] = IoSlice::new(&self.kept);
            let more = parts.len().min(PARTS - 1);
            slices[1..=more].copy_from_slice(&parts[..more]);
            let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &slices[..=more]))?;
            let kept = self.kept.len();
            self.sent(written.min(kept))?;
            if written > kept {
                return Poll::Ready(Ok(written - kept));
            }
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, parts)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gathered<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gathered<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow_mut().broken.take().map_or(Ok(()), Err))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.send(cx))?;
        Pin::new(&mut inner.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;
    use std::pin::Pin;
    use std::rc::Rc;
    use std::task::{Context, Poll};

    use super::{Gathered, ROOM};
    use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

    /// Counts writes, and fails once it is told to.
    struct Counted<T>(T, Rc<Cell<usize>>, Rc<Cell<bool>>);

    impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            if self.2.get() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.1.set(self.1.get() + 1);
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    fn counted(room: usize) -> (Gathered<Counted<tokio::io::DuplexStream>>, tokio::io::DuplexStream, Rc<Cell<usize>>) {
        let (near, far) = tokio::io::duplex(room);
        let writes = Rc::<Cell<usize>>::default();
        (Gathered::new(Counted(near, writes.clone(), Rc::default())), far, writes)
    }

    #[tokio::test]
    async fn small_writes_of_a_turn_are_one_and_come_at_its_end() {
        let (io, mut far, writes) = counted(1 << 20);
        let mut writer = io.clone();
        io.drive(async {
            for _ in 0..10 {
                writer.write_all(b"frame").await.unwrap();
                writer.flush().await.unwrap();
            }
            assert_eq!(writes.get(), 0, "nothing before the end of the turn");
        })
        .await;
        assert_eq!(writes.get(), 1);
        let mut got = [0; 50];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got[45..], b"frame");
    }

    #[tokio::test]
    async fn nothing_is_lost_or_reordered_however_little_the_socket_takes() {
        for room in [7, 1000, 40_000] {
            let (io, mut far, _) = counted(room);
            let sent: Vec<u8> = (0..300_000_u32).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
            let copy = sent.clone();
            let mut writer = io.clone();
            let write = io.drive(async move {
                let mut rest = &copy[..];
                for size in [1, 600, 9, ROOM - 1, 5, ROOM + 1, 70_000, 3].into_iter().cycle() {
                    let (now, later) = rest.split_at(size.min(rest.len()));
                    writer.write_all(now).await.unwrap();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                writer.shutdown().await.unwrap();
            });
            let mut got = Vec::new();
            let (_, read) = tokio::join!(write, far.read_to_end(&mut got));
            read.unwrap();
            assert!(got == sent, "{room}: {} of {} bytes", got.len(), sent.len());
        }
    }

    #[tokio::test]
    async fn a_failure_at_the_end_of_a_turn_reaches_the_connection() {
        let (near, _far) = tokio::io::duplex(100);
        let fails = Rc::new(Cell::new(true));
        let io = Gathered::new(Counted(near, Rc::default(), fails));
        let mut writer = io.clone();
        let error = io.drive(async move {
            writer.write_all(b"frame").await.unwrap();
            tokio::task::yield_now().await;
            writer.flush().await.unwrap_err()
        });
        assert_eq!(error.await.kind(), io::ErrorKind::BrokenPipe);
    }
}
