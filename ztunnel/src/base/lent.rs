//! A transport that reads in large parts, and has a buffer only while there is something in it.
//!
//! Whoever reads a record at a time would ask the kernel for each. With a buffer of its own each idle tunnel would keep it;
//! here those of one worker share one, since a part is mostly taken before the next tunnel has its turn. A tunnel whose
//! reader is slow keeps what it was lent, and the next one gets a new buffer.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

thread_local! {
    /// The buffer that the next read takes. None but the first has the size of another.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// See the module's header.
#[derive(Debug)]
pub struct Lent<T> {
    inner: T,
    size: usize,
    /// What was read and not taken is `buffer[from..to]`; empty while nothing is.
    buffer: Vec<u8>,
    from: usize,
    to: usize,
}

impl<T> Lent<T> {
    /// Reads `size` bytes at once from `inner`.
    pub fn new(size: usize, inner: T) -> Self {
        Self { inner, size, buffer: Vec::new(), from: 0, to: 0 }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Lent<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.from == this.to {
            if buf.remaining() >= this.size {
                return Pin::new(&mut this.inner).poll_read(cx, buf);
            }
            let mut spare = SPARE.take();
            // Made once and then handed around, so this is no work for each read.
            spare.resize(this.size, 0);
            let mut room = ReadBuf::new(&mut spare);
            let read = Pin::new(&mut this.inner).poll_read(cx, &mut room);
            let size = room.filled().len();
            if size == 0 || !matches!(read, Poll::Ready(Ok(()))) {
                SPARE.set(spare);
                return read;
            }
            (this.buffer, this.from, this.to) = (spare, 0, size);
        }
        let taken = buf.remaining().min(this.to - this.from);
        buf.put_slice(&this.buffer[this.from..this.from + taken]);
        this.from += taken;
        if this.from == this.to {
            SPARE.set(std::mem::take(&mut this.buffer));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Lent<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::Lent;

    #[tokio::test]
    async fn what_is_read_is_what_was_written_and_nothing_is_kept_of_it() {
        let (mut there, here) = duplex(1000);
        let (mut other_there, other_here) = duplex(1000);
        let (mut one, mut other) = (Lent::new(100, here), Lent::new(100, other_here));
        let all: Vec<u8> = (0..250_u8).collect();
        there.write_all(&all).await.unwrap();
        other_there.write_all(&all[..30]).await.unwrap();
        let (mut read, mut buffer) = (Vec::<u8>::new(), [0; 70]);
        // Two readers by turns, one of which has not taken all of its part.
        while read.len() < all.len() {
            let size = one.read(&mut buffer).await.unwrap();
            read.extend(&buffer[..size]);
            let _ = other.read(&mut [0; 3]).await.unwrap();
        }
        assert_eq!(read, all);
        assert_eq!((one.buffer.capacity(), other.buffer.capacity()), (0, 100));
        there.write_all(&all[..200]).await.unwrap();
        let mut large = [0; 200];
        one.read_exact(&mut large).await.unwrap();
        assert_eq!(large[..], all[..200], "in one part, past the buffer");
        drop(there);
        assert_eq!(one.read(&mut buffer).await.unwrap(), 0);
        one.write_all(b"x").await.unwrap_err();
    }
}
