//! Fairness on a worker: nobody moves more than a budget of bytes before the others had their turn.
//!
//! tokio counts operations, not bytes: one poll of a busy tunnel may decrypt megabytes while a 200-byte request waits.
//! [`Paced`] ends the turn of a tunnel after [`TURN`] bytes, [`Turn`] that of a copy loop. Both give way until the
//! worker has looked for new I/O, which a plain wake-up would not do.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant};

/// Bytes of a turn: as long as others wait for a tunnel that is always busy, tens to hundreds of microseconds by the
/// machine. Half of it costs bulk a third more CPU and makes small requests beside it no faster; half as much again makes
/// them slower (docs/performance.md).
pub const TURN: usize = 128 * 1024;

/// Time of a turn.
const TURN_TIME: Duration = Duration::from_micros(50);

/// Gives way now: the task is polled again after the worker has looked for I/O.
fn give_way(cx: &mut Context<'_>) {
    // Polled once: it registers the waker behind the I/O driver and is not needed again.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

/// The turn of a copy loop.
#[derive(Debug)]
pub struct Turn {
    bytes: usize,
    since: Instant,
}

impl Default for Turn {
    fn default() -> Self {
        Self { bytes: 0, since: Instant::now() }
    }
}

impl Turn {
    /// Accounts for `bytes`; gives way when the turn is over.
    pub async fn spend(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes >= TURN || (self.bytes >= TURN / 4 && self.since.elapsed() >= TURN_TIME) {
            tokio::task::yield_now().await;
            self.restart();
        }
    }

    /// Begins a new turn, after waiting for something else.
    pub fn restart(&mut self) {
        self.bytes = 0;
        self.since = Instant::now();
    }
}

/// A transport that ends the turn of its task after [`TURN`] bytes in one direction.
#[derive(Debug)]
pub struct Paced<T> {
    inner: T,
    read: usize,
    written: usize,
}

impl<T> Paced<T> {
    /// Paces `inner`.
    pub fn new(inner: T) -> Self {
        Self { inner, read: 0, written: 0 }
    }

    /// The transport below.
    pub fn get_ref(&self) -> &T {
        &self.inner
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Paced<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read >= TURN {
            self.read = 0;
            give_way(cx);
            return Poll::Pending;
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Ready(result) => {
                self.read += buf.filled().len() - before;
                Poll::Ready(result)
            }
            Poll::Pending => {
                self.read = 0;
                Poll::Pending
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Paced<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.as_mut().poll_turn(cx));
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.account(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.as_mut().poll_turn(cx));
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.account(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<T> Paced<T> {
    fn poll_turn(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>
    where
        T: Unpin,
    {
        // Twice the read budget: a tunnel that relays as fast as it reads must not fall behind.
        if self.written >= 2 * TURN {
            self.written = 0;
            give_way(cx);
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn account(&mut self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(Ok(bytes)) => self.written += bytes,
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.written = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Paced, TURN};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn pacing_loses_no_byte() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut paced = Paced::new(near);
        let sent: Vec<u8> = (0..8 * TURN).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        let copy = sent.clone();
        let writer = tokio::spawn(async move {
            far.write_all(&copy).await.unwrap();
            let mut back = vec![0; copy.len()];
            far.read_exact(&mut back).await.unwrap();
            back
        });
        let mut got = vec![0; sent.len()];
        paced.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
        paced.write_all(&got).await.unwrap();
        assert_eq!(writer.await.unwrap(), sent);
    }
}
