//! Whether a server of HTTP/2 lets clients ask for another protocol, as WebSockets do there (extended CONNECT, RFC 8441).
//!
//! A client may ask only after the server has said so in its settings, and hyper tells nobody when those have come. They are
//! the server's first frame (RFC 9113 §3.4), so the first bytes are looked at on their way to hyper. Pure but for that, and
//! fuzzed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::http::BoxIo;
use crate::http::frames::{HEAD, SETTINGS, length};

/// How long a server may take for its settings, which it says before anything else. Without them it has offered nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// Most bytes of the first frame that are looked at: some sixty settings, of which there are ten.
const MOST: usize = HEAD + 64 * SETTING;

/// Bytes of one setting: its name and its value.
const SETTING: usize = 6;

const ACK: u8 = 1;

/// SETTINGS_ENABLE_CONNECT_PROTOCOL.
const ENABLE_CONNECT: u16 = 8;

/// What the server of a connection has said. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Offer(watch::Receiver<Option<bool>>);

impl Offer {
    /// Waits for it, not for long. None: the server has said nothing.
    pub async fn said(&self) -> Option<bool> {
        let mut said = self.0.clone();
        let said = timeout(PATIENCE, said.wait_for(Option::is_some)).await;
        said.ok()?.ok().and_then(|said| *said)
    }
}

/// A connection to a server, and what the server will have said.
pub(super) fn watched(io: BoxIo) -> (BoxIo, Offer) {
    let (say, said) = watch::channel(None);
    (Box::new(Watched { io, first: Vec::new(), say: Some(say) }), Offer(said))
}

struct Watched {
    io: BoxIo,
    /// What has come of the first frame.
    first: Vec<u8>,
    /// None: it was said.
    say: Option<watch::Sender<Option<bool>>>,
}

/// What the `first` bytes of a server say. None: there are too few of them.
pub fn offers(first: &[u8]) -> Option<bool> {
    let head = first.get(..HEAD)?;
    let length = length([head[0], head[1], head[2]]);
    if head[3] != SETTINGS || head[4] & ACK != 0 || HEAD + length > MOST {
        return Some(false);
    }
    let mut offers = false;
    for setting in first.get(HEAD..HEAD + length)?.chunks_exact(SETTING) {
        if setting[..2] == ENABLE_CONNECT.to_be_bytes() {
            offers = setting[2..] == 1_u32.to_be_bytes();
        }
    }
    Some(offers)
}

impl Watched {
    fn look(&mut self, bytes: &[u8]) {
        let Some(say) = &self.say else { return };
        let room = MOST - self.first.len();
        self.first.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if let Some(offers) = offers(&self.first) {
            say.send_replace(Some(offers));
            self.say = None;
            self.first = Vec::new();
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.look(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::{offers, watched};

    fn settings(all: &[(u16, u32)]) -> Vec<u8> {
        let mut frame = vec![0, 0, u8::try_from(all.len() * 6).unwrap(), 4, 0, 0, 0, 0, 0];
        for (name, value) in all {
            frame.extend(name.to_be_bytes());
            frame.extend(value.to_be_bytes());
        }
        frame
    }

    #[test]
    fn a_server_offers_it_in_its_first_frame_or_not_at_all() {
        for (all, expected) in [
            (&[][..], false),
            (&[(3, 100), (4, 65_535)], false),
            (&[(3, 100), (8, 1), (4, 65_535)], true),
            (&[(8, 0)], false),
            (&[(8, 2)], false),
        ] {
            let frame = settings(all);
            assert_eq!(offers(&frame), Some(expected), "{all:?}");
            assert_eq!(offers(&[&frame[..], b"more"].concat()), Some(expected), "{all:?}");
            assert!((0..frame.len()).all(|part| offers(&frame[..part]).is_none()), "{all:?}: less than a frame");
        }
        let mut other = settings(&[(8, 1)]);
        other[3] = 0;
        assert_eq!(offers(&other), Some(false), "another frame");
        assert_eq!(offers(&[255, 255, 255, 4, 0, 0, 0, 0, 0]), Some(false), "a frame that is too long");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_hears_it_and_the_bytes_pass() {
        let (mut server, proxy) = tokio::io::duplex(1 << 10);
        let (mut io, offer) = watched(Box::new(proxy));
        assert_eq!(offer.said().await, None, "not for ever");
        for byte in settings(&[(8, 1)]) {
            server.write_all(&[byte]).await.unwrap();
            assert_eq!(io.read_u8().await.unwrap(), byte);
        }
        assert_eq!(offer.said().await, Some(true));
        let (io, offer) = watched(Box::new(tokio::io::duplex(1).0));
        drop(io);
        assert_eq!(offer.said().await, None);
    }
}
