//! The time between a CONNECT and its answer, for a client that may still be sent elsewhere.
//!
//! The application's first bytes travel at once, as everywhere else, and a copy of them stays here until the destination
//! has taken the connection: if it has not, the next endpoint gets the same bytes. What waits is bounded; a client that
//! says more is read again after the answer.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use h2::SendStream;
use tokio::net::TcpStream;

use crate::base::Counts;
use crate::base::budget::{Budget, Ledger};
use crate::outcome::{Code, Outcome};
use crate::relay::pumps::read_chunk;

/// Most bytes kept: many times a first request, and what one turn of a relay moves.
const MOST_BYTES: usize = 64 * 1024;

/// Most chunks kept: each may own a buffer of [`READ`] whatever its length.
const MOST_CHUNKS: usize = 16;

/// Bytes read at once.
const READ: usize = 4 * 1024;

/// What the client has said to nobody yet.
#[derive(Debug)]
pub struct Said {
    ledger: Arc<Ledger>,
    chunks: Vec<Bytes>,
    bytes: usize,
    /// The client has said all: the relay will find the end again.
    ended: bool,
}

impl Said {
    /// Nothing so far. What is kept counts in `budget`.
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self { ledger: Ledger::new(budget), chunks: Vec::new(), bytes: 0, ended: false }
    }

    /// Whether there is nothing that an application could have received.
    pub fn is_nothing(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The bytes, in order.
    pub fn chunks(&self) -> &[Bytes] {
        &self.chunks
    }

    fn is_full(&self) -> bool {
        self.bytes >= MOST_BYTES || self.chunks.len() >= MOST_CHUNKS
    }
}

/// Sends what the client says, and has said before, until `answer` is there.
///
/// # Errors
/// `ClientReset`: there is nobody left to answer to.
pub async fn until_answered<T>(
    tcp: &TcpStream,
    send: &mut SendStream<Bytes>,
    said: &mut Said,
    counts: &Counts,
    answer: impl Future<Output = T>,
) -> Result<T, Outcome> {
    // A stream that takes no bytes has failed, which the answer tells.
    for chunk in &said.chunks {
        let _ = send.send_data(chunk.clone(), false);
    }
    let mut answer = pin!(answer);
    loop {
        let listens = !said.ended && !said.is_full();
        let chunk = tokio::select! {
            biased;
            answer = &mut answer => return Ok(answer),
            chunk = read_chunk(tcp, READ, &said.ledger), if listens => chunk,
        };
        match chunk {
            Err(error) => return Err(Outcome::new(Code::ClientReset, error.to_string())),
            Ok(None) => said.ended = true,
            Ok(Some(chunk)) => {
                counts.up.set(counts.up.get() + chunk.len() as u64);
                said.bytes += chunk.len();
                said.chunks.push(chunk.clone());
                let _ = send.send_data(chunk, false);
            }
        }
    }
}
