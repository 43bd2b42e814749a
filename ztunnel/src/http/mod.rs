//! HTTP/1 and HTTP/2 between two connections: told apart, served, cleaned and sent on, in constant memory and within limits.
//!
//! This module knows connections, messages and their limits, and nothing of workloads, routes or policies: `outbound` and
//! `inbound` say what becomes of a request. It is used only where a route or a policy needs HTTP to be read; everything
//! else stays bytes in `relay`. hyper parses and frames, `headers` holds what hyper leaves to the program. A client's
//! version of HTTP is also the one that is spoken to the server. Limits: each constant says why.

mod body;
pub mod client;
pub mod export;
pub mod frames;
pub mod gate;
pub mod headers;
mod io;
pub mod limit;
pub mod offer;
pub mod pool;
mod recorded;
mod replay;
pub mod reply;
pub mod retry;
pub mod server;
mod sniff;
pub mod solo;

pub use body::{Body, End, Ended, grpc_status};
pub use io::{BoxIo, Downstream, HeadClock};
pub use recorded::recorded;
pub use replay::Original;
pub use sniff::{ENOUGH, Sniffed, sniff};

use std::time::Duration;

/// The two ways in which HTTP is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Framing {
    /// HTTP/1.0 and 1.1.
    One,
    /// HTTP/2.
    Two,
}

/// Bytes of an HTTP/1 head, and of what is read ahead of it: Envoy's limit for heads, and hyper's buffer.
const HEAD_BYTES: usize = 64 * 1024;
/// Bytes of the headers of an HTTP/2 message, as HPACK counts them.
const HEADER_LIST: u32 = 64 * 1024;
/// How long a client takes for a head from its first byte on. A browser on a bad line takes two seconds.
pub const HEAD_TIME: Duration = Duration::from_secs(15);
/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 200;
/// Receive window of a stream: what a request body or an answer may be ahead of its reader, bytes.
const STREAM_WINDOW: u32 = 256 << 10;
/// Receive window of a connection, bytes. Four stalled streams do not stop a fifth one that is small.
const CONNECTION_WINDOW: u32 = 2 << 20;
/// Bytes queued in a stream before its sender is slowed down.
const SEND_BUFFER: usize = 64 * 1024;
/// Streams that a client may reset before they were looked at (rapid reset).
const PENDING_RESETS: usize = 64;
/// Streams that are reset by us for a client's errors before its connection is.
const LOCAL_RESETS: usize = 256;
/// How long an HTTP/2 connection may be silent before it is asked whether anybody is there.
const PING: Duration = Duration::from_secs(60);
/// How long the answer to that may take.
const PONG: Duration = Duration::from_secs(20);
