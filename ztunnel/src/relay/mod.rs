//! Copying bytes both ways until both sides are done, and saying exactly how it ended.
//!
//! Three pumps (TCP to tunnel, tunnel to TCP, TCP to TCP) and one rule for ending: an end of stream travels as a half
//! close, a reset as a reset, whoever stops a connection resets it (a cut must not look like an end), and a half-closed connection whose other half stays silent for too long is reaped.
//! An idle connection owns no buffer; a buffer lives from readable to written, and counts in its pod's budget. Nothing waits on a timer while both
//! halves are open.

pub mod early;
mod pumps;
mod stream;

pub use stream::StreamIo;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use tokio::net::TcpStream;

use crate::base::budget::{Budget, Ledger};
use crate::base::window::Slot;
use crate::base::{Counts, sockets};
use crate::outcome::{Code, Outcome};

/// Limits of a relay.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a half-closed connection may move no byte before it is closed.
    pub half_open: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        // Long enough for a server that thinks about a request whose client has finished sending.
        Self { half_open: Duration::from_secs(300) }
    }
}

/// What a relay counts in, and what bounds it.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Bytes moved.
    pub counts: &'a Counts,
    /// Limits of this relay.
    pub limits: Limits,
    /// Of the pod whose connection it is.
    pub budget: &'a Arc<Budget>,
}

/// How one direction ended when it did not end well.
#[derive(Debug)]
enum Break {
    /// The local TCP peer reset or failed.
    Tcp(std::io::Error),
    /// The tunnel stream was reset or failed.
    Stream(h2::Error),
    /// The other proxy refused the stream.
    Refused(Outcome),
}

/// Whether the TCP connection of a tunnel relay is the client or the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpSide {
    /// The captured application connection (source node).
    Client,
    /// The connection to the local application (destination node).
    Server,
}

/// Relays between a TCP connection and a stream of a tunnel. `recv` completes when the other proxy has answered: bytes
/// of the application are on their way before that, which saves a round trip in every new connection. Futures that are
/// passed on are passed by reference: by value each step would keep a copy of them as long as the connection lives.
pub async fn tunnel(
    mut tcp: TcpStream,
    mut send: SendStream<Bytes>,
    recv: impl Future<Output = Result<RecvStream, Outcome>>,
    side: TcpSide,
    terms: Terms<'_>,
    window: &Slot,
    stop: Pin<&mut impl Future<Output = Outcome>>,
) -> Outcome {
    let Terms { counts, limits, budget } = terms;
    let ledger = Ledger::new(budget);
    let (into_tunnel, from_tunnel) = match side {
        TcpSide::Client => (&counts.up, &counts.down),
        TcpSide::Server => (&counts.down, &counts.up),
    };
    let result = {
        let (reader, writer) = tcp.split();
        let up = pin!(pumps::tcp_to_stream(reader, &mut send, into_tunnel, &ledger));
        let down = pin!(async {
            let mut recv = recv.await.map_err(Break::Refused)?;
            pumps::stream_to_tcp(&mut recv, writer.as_ref(), from_tunnel, window).await
        });
        both(up, down, counts, limits, stop).await
    };
    match result {
        Ended::Finished => Outcome::ok(),
        Ended::HalfOpen => {
            send.send_reset(h2::Reason::CANCEL);
            sockets::reset(tcp);
            half_open(limits)
        }
        Ended::Broken(Break::Tcp(error)) => {
            send.send_reset(h2::Reason::CANCEL);
            sockets::reset(tcp);
            let code = if side == TcpSide::Client { Code::ClientReset } else { Code::ServerReset };
            Outcome::new(code, error.to_string())
        }
        Ended::Broken(Break::Stream(error)) => {
            sockets::reset(tcp);
            stream_outcome(&error, side)
        }
        Ended::Broken(Break::Refused(outcome)) | Ended::Stopped(outcome) => {
            send.send_reset(h2::Reason::CANCEL);
            sockets::reset(tcp);
            outcome
        }
    }
}

/// Relays between two TCP connections, `client` being the one that began.
pub async fn tcp(
    mut client: TcpStream,
    mut server: TcpStream,
    terms: Terms<'_>,
    stop: Pin<&mut impl Future<Output = Outcome>>,
) -> Outcome {
    let Terms { counts, limits, budget } = terms;
    let (up, down) = (Ledger::new(budget), Ledger::new(budget));
    let result = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let to_server = to_server.as_ref();
        let to_client = to_client.as_ref();
        let up = async { pumps::tcp_to_tcp(from_client, to_server, &counts.up, &up).await.map_err(TcpBreak::up) };
        let down =
            async { pumps::tcp_to_tcp(from_server, to_client, &counts.down, &down).await.map_err(TcpBreak::down) };
        both(pin!(up), pin!(down), counts, limits, stop).await
    };
    match result {
        Ended::Finished => Outcome::ok(),
        Ended::HalfOpen => {
            sockets::reset(client);
            sockets::reset(server);
            half_open(limits)
        }
        Ended::Stopped(outcome) => {
            sockets::reset(client);
            sockets::reset(server);
            outcome
        }
        Ended::Broken(TcpBreak { code, error }) => {
            sockets::reset(client);
            sockets::reset(server);
            Outcome::new(code, error.to_string())
        }
    }
}

/// Which of two TCP connections broke.
struct TcpBreak {
    code: Code,
    error: std::io::Error,
}

impl TcpBreak {
    fn up(failure: pumps::TcpFailure) -> Self {
        match failure {
            pumps::TcpFailure::Read(error) => Self { code: Code::ClientReset, error },
            pumps::TcpFailure::Write(error) => Self { code: Code::ServerReset, error },
        }
    }

    fn down(failure: pumps::TcpFailure) -> Self {
        match failure {
            pumps::TcpFailure::Read(error) => Self { code: Code::ServerReset, error },
            pumps::TcpFailure::Write(error) => Self { code: Code::ClientReset, error },
        }
    }
}

fn half_open(limits: Limits) -> Outcome {
    Outcome::new(Code::HalfOpen, format!("one half was closed and nothing moved for {} s", limits.half_open.as_secs()))
}

fn stream_outcome(error: &h2::Error, side: TcpSide) -> Outcome {
    let other = if side == TcpSide::Client { Code::ServerReset } else { Code::ClientReset };
    let code = if error.is_remote() && error.is_reset() { other } else { Code::TunnelFailed };
    Outcome::new(code, error.to_string())
}

enum Ended<E> {
    Finished,
    Stopped(Outcome),
    HalfOpen,
    Broken(E),
}

/// Runs both directions until `stop`; the first failure ends both.
async fn both<E>(
    mut up: Pin<&mut impl Future<Output = Result<(), E>>>,
    mut down: Pin<&mut impl Future<Output = Result<(), E>>>,
    counts: &Counts,
    limits: Limits,
    mut stop: Pin<&mut impl Future<Output = Outcome>>,
) -> Ended<E> {
    // A connection that may no longer be moves not one more byte: `stop` is looked at first.
    let up_first = tokio::select! {
        biased;
        outcome = &mut stop => return Ended::Stopped(outcome),
        result = &mut up => match result { Ok(()) => true, Err(error) => return Ended::Broken(error) },
        result = &mut down => match result { Ok(()) => false, Err(error) => return Ended::Broken(error) },
    };
    loop {
        let before = counts.total();
        let rest = async { if up_first { down.as_mut().await } else { up.as_mut().await } };
        // Boxed: most connections are never half closed for long, and a timer is large.
        let rest = Box::pin(tokio::time::timeout(limits.half_open, rest));
        let ended = tokio::select! {
            biased;
            outcome = &mut stop => return Ended::Stopped(outcome),
            ended = rest => ended,
        };
        match ended {
            Ok(Ok(())) => return Ended::Finished,
            Ok(Err(error)) => return Ended::Broken(error),
            Err(_) if counts.total() == before => return Ended::HalfOpen,
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
