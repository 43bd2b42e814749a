//! One direction each. A pump returns `Ok` when its source ended and the end was passed on.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::{Buf, BufMut, Bytes};
use h2::{RecvStream, SendStream};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use crate::base::budget::{Ledger, SMALL};
use crate::base::pace::{TURN, Turn};
use crate::base::window::Slot;
use crate::relay::Break;

/// Chunks of a tunnel written to the application with one call.
const GATHER: usize = 16;

/// Bytes read at once at most: with the header of a DATA frame (RFC 9113 §4.1) they fill whole TLS records.
const READ: usize = TURN - 9;

/// Which end of a TCP-to-TCP pump failed.
#[derive(Debug)]
pub(super) enum TcpFailure {
    Read(io::Error),
    Write(io::Error),
}

/// How much to read next: doubles while reads fill the buffer, returns to small when they do not.
struct ReadSize(usize);

impl Default for ReadSize {
    fn default() -> Self {
        Self(SMALL)
    }
}

impl ReadSize {
    fn adapt(&mut self, got: usize) {
        if got >= self.0 {
            self.0 = (self.0 * 4).min(READ);
        } else if got < self.0 / 4 {
            self.0 = SMALL;
        }
    }
}

/// What a socket that was said to be readable had.
enum Had {
    Bytes(Bytes),
    /// End of stream.
    End,
    /// It had been read empty already.
    Nothing,
}

/// Reads at most `limit` bytes of what is there. A read that does not fill its buffer has emptied the socket, which tokio
/// notes here and would not for `try_read`: without it each request costs a second, empty read.
async fn read_now(tcp: &mut ReadHalf<'_>, limit: usize, ledger: &Arc<Ledger>) -> io::Result<Had> {
    // The buffer exists only between readable and handed over: an idle connection owns none.
    let mut buffer = ledger.buffer(limit).await;
    let size = buffer.size();
    let read = {
        let mut room = (&mut buffer.data).limit(size);
        let mut read = pin!(tcp.read_buf(&mut room));
        poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await
    };
    match read {
        Poll::Ready(Ok(0)) => Ok(Had::End),
        Poll::Ready(Ok(_)) => Ok(Had::Bytes(buffer.freeze())),
        Poll::Ready(Err(error)) => Err(error),
        Poll::Pending => Ok(Had::Nothing),
    }
}

/// Waits until `tcp` is readable and reads at most `limit` bytes, while somebody else has the connection too. `None`: end
/// of stream.
pub(super) async fn read_chunk(tcp: &TcpStream, limit: usize, ledger: &Arc<Ledger>) -> io::Result<Option<Bytes>> {
    loop {
        tcp.readable().await?;
        let mut buffer = ledger.buffer(limit).await;
        let size = buffer.size();
        match tcp.try_read_buf(&mut (&mut buffer.data).limit(size)) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(buffer.freeze())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Application to tunnel.
pub(super) async fn tcp_to_stream(
    mut tcp: ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    count: &Cell<u64>,
    ledger: &Arc<Ledger>,
) -> Result<(), Break> {
    let mut size = ReadSize::default();
    let mut turn = Turn::default();
    loop {
        // Ask for the window only once there is something to send, and leave nothing of it: what an idle stream keeps is
        // lost to the others of its tunnel, and enough idle ones would stop them.
        tcp.readable().await.map_err(Break::Tcp)?;
        let window = capacity(send, size.0).await?;
        let had = read_now(&mut tcp, window.min(size.0), ledger).await.map_err(Break::Tcp)?;
        let bytes = match had {
            Had::Bytes(chunk) => {
                let bytes = chunk.len();
                count.set(count.get() + bytes as u64);
                size.adapt(bytes);
                send.send_data(chunk, false).map_err(Break::Stream)?;
                bytes
            }
            // A socket stays "readable" until it was asked once too often.
            Had::Nothing => 0,
            Had::End => {
                send.reserve_capacity(0);
                return send.send_data(Bytes::new(), true).map_err(Break::Stream);
            }
        };
        if bytes < window {
            send.reserve_capacity(0);
        }
        turn.spend(bytes).await;
    }
}

/// Waits for at least one byte of window.
async fn capacity(send: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, Break> {
    send.reserve_capacity(wanted);
    loop {
        let available = send.capacity();
        if available > 0 {
            return Ok(available);
        }
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(0)) => {}
            Some(Ok(available)) => return Ok(available),
            Some(Err(error)) => return Err(Break::Stream(error)),
            None => return Err(Break::Stream(h2::Reason::STREAM_CLOSED.into())),
        }
    }
}

/// Tunnel to application. The window is given back only after the application took the bytes, so that a slow reader
/// slows its own sender and the memory of a stream stays within its window.
pub(super) async fn stream_to_tcp(
    recv: &mut RecvStream,
    tcp: &TcpStream,
    count: &Cell<u64>,
    window: &Slot,
) -> Result<(), Break> {
    let mut turn = Turn::default();
    let mut chunks: Vec<Bytes> = Vec::new();
    loop {
        let ended = gather(recv, &mut chunks).await?;
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        write_all(tcp, &mut chunks, Some(window)).await.map_err(Break::Tcp)?;
        chunks.shrink_to(0);
        count.set(count.get() + bytes as u64);
        if bytes > 0 {
            recv.flow_control().release_capacity(bytes).map_err(Break::Stream)?;
            window.carried(bytes);
        }
        if ended {
            shutdown(tcp).map_err(Break::Tcp)?;
            return Ok(());
        }
        turn.spend(bytes).await;
    }
}

/// Waits for one chunk and takes what else is there. True: the stream ended behind them.
async fn gather(recv: &mut RecvStream, chunks: &mut Vec<Bytes>) -> Result<bool, Break> {
    let mut bytes = 0;
    poll_fn(|cx| {
        loop {
            match recv.poll_data(cx) {
                Poll::Ready(Some(Ok(chunk))) => {
                    bytes += chunk.len();
                    if !chunk.is_empty() {
                        chunks.push(chunk);
                    }
                    if chunks.len() >= GATHER || bytes >= TURN {
                        return Poll::Ready(Ok(false));
                    }
                }
                Poll::Ready(Some(Err(error))) if chunks.is_empty() => {
                    return Poll::Ready(Err(Break::Stream(error)));
                }
                // Deliver what came before the failure; the next call reports it again.
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Ok(false)),
                Poll::Ready(None) => return Poll::Ready(Ok(true)),
                Poll::Pending if chunks.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(Ok(false)),
            }
        }
    })
    .await
}

/// One TCP connection to another.
pub(super) async fn tcp_to_tcp(
    mut from: ReadHalf<'_>,
    to: &TcpStream,
    count: &Cell<u64>,
    ledger: &Arc<Ledger>,
) -> Result<(), TcpFailure> {
    let mut size = ReadSize::default();
    let mut turn = Turn::default();
    let mut chunks = Vec::with_capacity(1);
    loop {
        from.readable().await.map_err(TcpFailure::Read)?;
        let chunk = match read_now(&mut from, size.0, ledger).await.map_err(TcpFailure::Read)? {
            Had::Bytes(chunk) => chunk,
            Had::End => return shutdown(to).map_err(TcpFailure::Write),
            Had::Nothing => continue,
        };
        let bytes = chunk.len();
        size.adapt(bytes);
        chunks.push(chunk);
        write_all(to, &mut chunks, None).await.map_err(TcpFailure::Write)?;
        count.set(count.get() + bytes as u64);
        turn.spend(bytes).await;
    }
}

/// Writes all chunks and leaves the list empty. While the reader takes none, `window` knows that its stream is stalled.
async fn write_all(tcp: &TcpStream, chunks: &mut Vec<Bytes>, window: Option<&Slot>) -> io::Result<()> {
    let mut first = 0;
    while !write_now(tcp, chunks, &mut first)? {
        let _stalled = window.map(Slot::stalled);
        tcp.writable().await?;
    }
    chunks.clear();
    Ok(())
}

/// Writes what the socket takes of the chunks from `first` on. True: all. (A function of its own, so that the list of
/// slices does not weigh on an idle connection.)
fn write_now(tcp: &TcpStream, chunks: &mut [Bytes], first: &mut usize) -> io::Result<bool> {
    while *first < chunks.len() {
        let mut slices = [io::IoSlice::new(&[]); GATHER];
        let mut used = 0;
        for (slice, chunk) in slices.iter_mut().zip(&chunks[*first..]) {
            *slice = io::IoSlice::new(chunk);
            used += 1;
        }
        let mut written = match tcp.try_write_vectored(&slices[..used]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        while written > 0 {
            let step = written.min(chunks[*first].len());
            chunks[*first].advance(step);
            written -= step;
            if chunks[*first].is_empty() {
                *first += 1;
            }
        }
    }
    Ok(true)
}

/// Passes an end of stream on. A peer that is already gone does not mind.
fn shutdown(tcp: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(tcp).shutdown(std::net::Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}
