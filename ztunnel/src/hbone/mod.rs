//! HBONE: TCP connections as HTTP/2 CONNECT streams over mutual TLS, wire-compatible with Istio's ztunnel.
//!
//! The `h2` crate does the framing; this module sets every one of its limits, because a default that fits a web server
//! is wrong here. Windows differ from the peer's on purpose: with its 4 MiB streams in a 16 MiB connection four stalled
//! receivers stop the other ninety-six streams. Ours let every stream of a full tunnel stall without touching the rest.

pub mod client;
pub mod headers;
pub mod pool;
pub mod server;

use std::time::Duration;

/// Limits and times of tunnels.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Receive window of a stream, bytes.
    pub stream_window: u32,
    /// Largest receive window of a tunnel, bytes: `stream_window` for each of `max_streams`, so that slow streams never
    /// stop the others. A tunnel begins with one stream's and gets more as it needs it and the pod's budget has it.
    pub connection_window: u32,
    /// Largest DATA frame accepted, bytes.
    pub frame_size: u32,
    /// Streams that we open on a tunnel before another one is made.
    pub max_streams: usize,
    /// How long an unused tunnel stays open.
    pub idle: Duration,
    /// TCP connect to the next hop.
    pub connect_timeout: Duration,
    /// TLS and HTTP/2 handshake together, either side.
    pub handshake_timeout: Duration,
    /// How long a refused port 15008 is tried again: a pod that was just captured opens it a moment later.
    pub refused_retry: Duration,
}

impl Config {
    /// For the last or only address that may be tried.
    pub fn patience(&self) -> client::Patience {
        client::Patience { connect: self.connect_timeout, refused: self.refused_retry }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stream_window: 256 << 10,
            connection_window: 32 << 20,
            frame_size: 1 << 20,
            max_streams: 100,
            idle: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            refused_retry: Duration::from_secs(2),
        }
    }
}

/// Streams of a tunnel behind a gateway. Each leads to the one endpoint that the gateway chose for it, so few share one.
const BEYOND_STREAMS: usize = 16;
/// Age at which such a tunnel gets no new streams, so that endpoints that came later get their share.
const BEYOND_AGE: Duration = Duration::from_secs(30);
/// Streams that a peer may have open with us at once.
const SERVER_STREAMS: u32 = 200;
/// Bytes queued in a stream before the application is slowed down.
const SEND_BUFFER: usize = 256 * 1024;
/// Header bytes of a request or response. Ours are a few hundred.
const HEADER_LIST: u32 = 16 * 1024;
/// Small DATA frames that may wait unread, in h2's overhead units of up to 256 each: without it a stalled reader of a
/// chatty database connection makes h2 close the whole tunnel.
const FRAME_BUDGET: usize = 64 << 20;
/// Streams that a peer may reset before we have seen them (rapid reset).
const PENDING_RESETS: usize = 64;
/// Bytes that rustls may hold encrypted: sixteen records a write instead of four.
pub(crate) const TLS_BUFFER: usize = 256 * 1024;
/// Bytes read from a tunnel's socket at once, instead of rustls' one record a call.
pub(crate) const READ_BUFFER: usize = 64 * 1024;
