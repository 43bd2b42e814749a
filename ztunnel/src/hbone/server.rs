//! Serving a tunnel: the HTTP/2 side of an inbound connection after its TLS handshake.
//!
//! On drain it says goodbye and goes on accepting what the peer had already sent, until the last stream ends: a stream
//! that crossed the goodbye on the wire is served, not lost.

use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep, timeout};

use crate::base::drain::Drained;
use crate::base::gather::Gathered;
use crate::base::window::Window;
use crate::hbone::{Config, FRAME_BUDGET, HEADER_LIST, PENDING_RESETS, SEND_BUFFER, SERVER_STREAMS};
use crate::outcome::{Code, Outcome};

/// How long streams that crossed a goodbye on the wire are still taken.
const CROSSING: Duration = Duration::from_secs(5);

/// How long a tunnel without streams stays open. Our own peers close theirs after five minutes.
const IDLE: Duration = Duration::from_secs(900);

/// A request and the means to answer it.
pub type Incoming = (Request<RecvStream>, SendResponse<Bytes>);

/// Serves the tunnel until it ends. `handle` gets each stream and must not block. `expired` completes when the
/// peer's certificate proves nothing any more: after that it gets no new streams.
///
/// # Errors
/// Why the tunnel ended, if not in good order.
pub async fn serve<T>(
    io: T,
    config: Config,
    drained: Drained,
    expired: impl Future<Output = ()>,
    window: &Window,
    handle: impl FnMut(Incoming),
) -> Result<(), Outcome>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let io = Gathered::new(io);
    io.drive(serve_on(io.clone(), config, drained, expired, window, handle)).await
}

async fn serve_on<T>(
    io: Gathered<T>,
    config: Config,
    drained: Drained,
    expired: impl Future<Output = ()>,
    window: &Window,
    mut handle: impl FnMut(Incoming),
) -> Result<(), Outcome>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = h2::server::Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(window.target())
        .max_frame_size(config.frame_size)
        .max_header_list_size(HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(SERVER_STREAMS)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .data_frame_budget(FRAME_BUDGET)
        .handshake(io);
    let mut connection = timeout(config.handshake_timeout, handshake)
        .await
        .map_err(|_| Outcome::new(Code::TunnelFailed, "the peer sent no HTTP/2 preface in time"))?
        .map_err(|error| Outcome::new(Code::TunnelFailed, error.to_string()))?;

    let (mut goodbye, mut over) = (false, false);
    let mut closed_since: Option<Instant> = None;
    let idle = sleep(IDLE);
    let draining = drained.draining();
    let forced = drained.forced();
    tokio::pin!(draining, forced, expired, idle);
    loop {
        tokio::select! {
            stream = connection.accept() => match stream {
                // A peer that does not answer the goodbye may open streams for ever; it gets none.
                Some(Ok((_, mut respond))) if closed_since.is_some_and(|since| Instant::now() >= since) => {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                }
                Some(Ok(stream)) => {
                    idle.as_mut().reset(Instant::now() + IDLE);
                    handle(stream);
                }
                Some(Err(error)) if error.is_go_away() || error.is_io() => return Ok(()),
                Some(Err(error)) => return Err(Outcome::new(Code::TunnelFailed, error.to_string())),
                None => return Ok(()),
            },
            size = window.changed() => connection.set_target_window_size(size),
            () = &mut draining, if !goodbye => {
                goodbye = true;
                closed_since.get_or_insert_with(|| Instant::now() + CROSSING);
                connection.graceful_shutdown();
            }
            () = &mut expired, if !over => {
                // Whose certificate has expired, or was taken back, proves nothing any more, not even for a moment, and not
                // for streams either that cross an earlier goodbye.
                over = true;
                closed_since = Some(Instant::now());
                goodbye = true;
                connection.graceful_shutdown();
            }
            () = &mut idle, if !goodbye => {
                if connection.has_streams() {
                    idle.as_mut().reset(Instant::now() + IDLE);
                } else {
                    goodbye = true;
                    closed_since.get_or_insert_with(|| Instant::now() + CROSSING);
                    connection.graceful_shutdown();
                }
            }
            () = &mut forced => {
                connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                return Ok(());
            }
        }
    }
}
