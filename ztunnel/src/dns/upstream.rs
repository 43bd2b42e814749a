//! Asking a pod's name server, from inside the pod: by datagram, or by stream as the client did.
//!
//! Each attempt has a socket of its own, so that its port is as random as its id, and a socket that takes datagrams from
//! that server only. What does not answer the question (id, question, response bit) is ignored and the wait goes on:
//! ending it would let anybody who can guess an address end a look-up. Servers are not chosen here: a client that has
//! several asks the next one itself, as it always did.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use crate::base::sockets::PodSockets;
use crate::dns::wire::{self, Message};

/// When a datagram is sent again, and when the wait is over; after the first one. Over before the five seconds after
/// which resolvers ask their next server, so that they learn why.
const ATTEMPTS: [Duration; 3] = [Duration::from_millis(1200), Duration::from_millis(2400), Duration::from_millis(4500)];
/// The same for a stream.
const STREAM_PATIENCE: Duration = Duration::from_millis(4500);

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// Nothing came.
    Silent,
    /// The system or the network refused.
    Unreachable(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => write!(f, "the name server did not answer"),
            Self::Unreachable(error) => write!(f, "the name server cannot be reached: {error}"),
        }
    }
}

/// An answer, walked if it can be.
#[derive(Debug)]
pub struct Reply {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// `None`: the question is of a kind that is relayed unseen.
    pub message: Option<Message>,
}

/// Asks by datagram. `question` has any id; `walked` is what is in it, if it is a plain question. `chance` gives ids.
///
/// # Errors
/// See [`Failure`].
pub async fn by_datagram(
    sockets: &PodSockets,
    to: SocketAddr,
    question: &[u8],
    walked: Option<&Message>,
    mut chance: impl FnMut() -> u16,
) -> Result<Reply, Failure> {
    let begin = Instant::now();
    let mut question = question.to_vec();
    let mut waiting = FuturesUnordered::new();
    for until in ATTEMPTS {
        let id = chance();
        wire::set_id(&mut question, id);
        let socket = sockets.datagrams(to).await.map_err(Failure::Unreachable)?;
        socket.send(&question).await.map_err(Failure::Unreachable)?;
        // Earlier ones are still listened to: the server may just be slow.
        waiting.push(receive(socket, id, question.clone(), walked));
        if let Ok(Some(reply)) = timeout_at(begin + until, waiting.next()).await {
            return reply.map_err(Failure::Unreachable);
        }
    }
    Err(Failure::Silent)
}

async fn receive(socket: UdpSocket, id: u16, question: Vec<u8>, walked: Option<&Message>) -> io::Result<Reply> {
    // A server does not send more than it was told to.
    let mut buffer = vec![0; walked.map_or_else(|| usize::from(u16::MAX), Message::datagram_limit)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(reply) = accepted(&buffer[..length], id, &question, walked) {
            return Ok(reply);
        }
    }
}

/// Asks by stream.
///
/// # Errors
/// See [`Failure`].
pub async fn by_stream(
    sockets: &PodSockets,
    to: SocketAddr,
    question: &[u8],
    walked: Option<&Message>,
    id: u16,
) -> Result<Reply, Failure> {
    let mut question = question.to_vec();
    wire::set_id(&mut question, id);
    let exchange = async {
        let mut stream = sockets.connect(to).await?;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        // In one piece: some servers take a length without its message for a broken client.
        stream.write_all(&[&length.to_be_bytes()[..], &question].concat()).await?;
        loop {
            let length = stream.read_u16().await?;
            let mut bytes = vec![0; length.into()];
            stream.read_exact(&mut bytes).await?;
            if let Some(reply) = accepted(&bytes, id, &question, walked) {
                return Ok(reply);
            }
        }
    };
    match timeout_at(Instant::now() + STREAM_PATIENCE, exchange).await {
        Ok(result) => result.map_err(Failure::Unreachable),
        Err(_) => Err(Failure::Silent),
    }
}

/// The reply, if it answers the question.
fn accepted(bytes: &[u8], id: u16, question: &[u8], walked: Option<&Message>) -> Option<Reply> {
    let (own, flags) = wire::header(bytes)?;
    let (_, asked) = wire::header(question)?;
    if own != id || !flags.is_response() || flags.opcode() != asked.opcode() {
        return None;
    }
    let parsed = wire::parse(bytes).ok();
    let Some(walked) = walked else { return Some(Reply { bytes: bytes.to_vec(), message: parsed }) };
    match parsed {
        Some(message) => {
            let same = walked.same_question(question, &message, bytes);
            same.then(|| Reply { bytes: bytes.to_vec(), message: Some(message) })
        }
        // Servers that do not understand a question need not repeat it.
        None => (flags.rcode() != 0 && bytes.len() == 12).then(|| Reply { bytes: bytes.to_vec(), message: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::{accepted, receive};
    use crate::dns::wire;
    use tokio::net::UdpSocket;

    fn question(id: u16, name: &str) -> Vec<u8> {
        let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        wire::set_id(&mut bytes, id);
        bytes.push(u8::try_from(name.len()).unwrap());
        bytes.extend(name.as_bytes());
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    }

    fn response(id: u16, name: &str) -> Vec<u8> {
        let mut bytes = question(id, name);
        bytes[2] |= 0x80;
        bytes
    }

    #[test]
    fn only_an_answer_to_the_question_is_one() {
        let asked = question(7, "cart");
        let walked = wire::parse(&asked).unwrap();
        let mut refused = response(7, "cart")[..12].to_vec();
        refused[3] = 1;
        refused[5] = 0;
        for (reply, good, what) in [
            (response(7, "cart"), true, "the answer"),
            (response(7, "CaRt"), true, "another spelling"),
            (response(8, "cart"), false, "another id"),
            (response(7, "card"), false, "another question"),
            (question(7, "cart"), false, "no response"),
            (refused, true, "an error without question"),
            (response(7, "cart")[..14].to_vec(), false, "a piece"),
            (Vec::new(), false, "nothing"),
        ] {
            assert_eq!(accepted(&reply, 7, &asked, Some(&walked)).is_some(), good, "{what}");
        }
    }

    #[tokio::test]
    async fn forged_answers_are_waited_out() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(server.local_addr().unwrap()).await.unwrap();
        let to = client.local_addr().unwrap();
        let asked = question(7, "cart");
        let walked = wire::parse(&asked).unwrap();
        let mut good = response(7, "cart");
        good[3] = 0x80;
        stranger.send_to(&response(7, "cart"), to).await.unwrap();
        for forged in [response(8, "cart"), response(7, "card"), question(7, "cart"), vec![7; 40], Vec::new()] {
            server.send_to(&forged, to).await.unwrap();
        }
        server.send_to(&good, to).await.unwrap();
        let reply = receive(client, 7, asked, Some(&walked)).await.unwrap();
        assert_eq!(reply.bytes, good);
    }
}
