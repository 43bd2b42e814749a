//! The sockets of one pod's name server: datagrams and streams, each with its bound.
//!
//! A question that the mesh or the cache can answer is answered where it is read; the others become tasks of the same
//! worker, counted against the pod. What is over the bound is refused at once, because a client that hears nothing asks
//! again and makes it worse.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::base::drain::{Drained, Phase};
use crate::base::sockets::original_destination;
use crate::base::workers::{Listening, spawn};
use crate::capture::probe;
use crate::dns::resolve::Step;
use crate::dns::wire;
use crate::dns::{PodDns, QUESTIONS, STREAMS, take};
use crate::state::Protocol;

/// How long a stream may be silent (RFC 7766 §6.2.3 leaves it to the server).
const IDLE: Duration = Duration::from_secs(5);
/// After an error of the socket, so that one that stays does not take the worker.
const PAUSE: Duration = Duration::from_millis(5);
/// Questions of one stream that are under way. Resolvers send two.
const PIPELINED: usize = 16;
/// Transfers of whole zones.
const TRANSFERS: [u16; 2] = [251, 252];

impl PodDns {
    /// Answers datagrams until `drained` is forced; what was asked before is still answered. Others may see the socket in
    /// `shown`.
    pub async fn serve_datagrams(self: Arc<Self>, socket: std::net::UdpSocket, shown: Listening, drained: Drained) {
        let socket = match UdpSocket::from_std(socket) {
            Ok(socket) => Arc::new(socket),
            Err(error) => return tracing::error!(%error, "the pod's name server cannot listen"),
        };
        shown.show(&socket);
        let Ok(local) = socket.local_addr() else { return };
        let stop = drained.reached(Phase::Forced);
        tokio::pin!(stop);
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                () = &mut stop => return,
            };
            let Ok((length, client)) = received else {
                // Out of memory, or an answer that came back as unreachable.
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let upstream = self.conntrack.original_udp_destination(client, local).ok();
            if upstream.is_some_and(probe::is_outbound_probe) {
                let _ = socket.try_send_to(probe::TOKEN, client);
                continue;
            }
            // A question to ourselves would be asked for ever.
            let upstream = upstream.filter(|upstream| *upstream != local);
            match self.begin(&buffer[..length], upstream, false) {
                Step::Ignore => {}
                // If the socket is full the client asks again.
                Step::Done(answer) => drop(socket.try_send_to(&answer, client)),
                Step::Later(asked) => {
                    let Some(unit) = take(&self.pod.questions, QUESTIONS) else {
                        self.shed(&socket, client, &buffer[..length]);
                        continue;
                    };
                    let (this, socket) = (self.clone(), socket.clone());
                    spawn(async move {
                        if let Some(answer) = this.finish(asked).await {
                            let _ = socket.send_to(&answer, client).await;
                        }
                        drop(unit);
                    });
                }
            }
        }
    }

    fn shed(&self, socket: &UdpSocket, client: SocketAddr, bytes: &[u8]) {
        self.shared.metrics.dns.shed.inc();
        if let Some((id, flags)) = wire::header(bytes) {
            let _ = socket.try_send_to(&wire::without_question(id, flags, 2), client);
        }
    }

    /// Whether a stream to port 53 is ours to answer, and to whom it was going. Not ours: a server inside the mesh, which
    /// knows its clients by their identity; what is no DNS; a transfer; our own probe.
    pub async fn takes(&self, stream: &TcpStream) -> Option<SocketAddr> {
        let upstream = original_destination(stream).ok().filter(|upstream| !probe::is_outbound_probe(*upstream))?;
        let snapshot = self.shared.reader.load();
        let network = &*self.shared.network;
        let pod = snapshot.workload_by_ip(network, upstream.ip());
        let service = snapshot.service_at(network, upstream, &self.pod.namespace);
        let mut behind = service.iter().flat_map(|service| &service.endpoints.all);
        let in_mesh = pod.is_some_and(|workload| workload.protocol == Protocol::Hbone);
        if in_mesh || behind.any(|endpoint| endpoint.protocol() == Protocol::Hbone) {
            return None;
        }
        let mut start = [0; 512];
        let seen = timeout(IDLE, stream.peek(&mut start)).await.ok()?.ok()?;
        looks_like_a_question(&start[..seen]).then_some(upstream)
    }

    /// Answers the questions of a stream.
    pub async fn serve_stream(self: Arc<Self>, stream: TcpStream, upstream: SocketAddr) {
        let Some(_unit) = take(&self.streams, STREAMS) else {
            self.shared.metrics.dns.shed.inc();
            return;
        };
        let (mut reading, mut writing) = stream.into_split();
        let mut under_way = FuturesUnordered::new();
        let mut next = Box::pin(read(&mut reading));
        loop {
            let answer = tokio::select! {
                question = &mut next, if under_way.len() < PIPELINED => {
                    drop(next);
                    let Some(question) = question else { break };
                    next = Box::pin(read(&mut reading));
                    match self.begin(&question, Some(upstream), true) {
                        Step::Ignore => break,
                        Step::Done(answer) => answer,
                        Step::Later(asked) => {
                            let this = self.clone();
                            under_way.push(async move { this.finish(asked).await });
                            continue;
                        }
                    }
                }
                Some(answer) = under_way.next() => match answer {
                    Some(answer) => answer,
                    None => continue,
                },
            };
            if write(&mut writing, &answer).await.is_none() {
                return;
            }
        }
        // The client may have closed its side and still wait for answers.
        while let Some(answer) = under_way.next().await {
            let Some(answer) = answer else { continue };
            if write(&mut writing, &answer).await.is_none() {
                return;
            }
        }
    }
}

/// Nothing that has begun contradicts a plain question.
fn looks_like_a_question(start: &[u8]) -> bool {
    let Some(message) = start.get(2..) else { return true };
    let Some((_, flags)) = wire::header(message) else { return true };
    let plain = !flags.is_response() && flags.opcode() == 0 && message[4..6] == [0, 1];
    plain && wire::parse(message).map_or(true, |message| !TRANSFERS.contains(&message.kind))
}

/// The next message; none: the client is done, or silent for too long.
fn read(stream: &mut OwnedReadHalf) -> impl Future<Output = Option<Vec<u8>>> + '_ {
    let one = async {
        let length = stream.read_u16().await.ok()?;
        let mut bytes = vec![0; length.into()];
        stream.read_exact(&mut bytes).await.ok()?;
        Some(bytes)
    };
    async { timeout(IDLE, one).await.ok().flatten() }
}

async fn write(stream: &mut tokio::net::tcp::OwnedWriteHalf, answer: &[u8]) -> Option<()> {
    let length = u16::try_from(answer.len()).ok()?;
    let whole = [&length.to_be_bytes()[..], answer].concat();
    timeout(IDLE, stream.write_all(&whole)).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::looks_like_a_question;

    #[test]
    fn a_stream_is_taken_unless_it_says_something_else() {
        let question = |kind: u8| {
            let mut bytes = vec![0, 22, 0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            bytes.extend([4, b'c', b'a', b'r', b't', 0, 0, kind, 0, 1]);
            bytes
        };
        assert!(looks_like_a_question(&question(1)));
        for cut in 0..question(1).len() {
            assert!(looks_like_a_question(&question(1)[..cut]), "the first {cut} bytes");
        }
        assert!(!looks_like_a_question(&question(252)), "a transfer");
        assert!(!looks_like_a_question(b"SSH-2.0-OpenSSH_9.2p1"));
        assert!(!looks_like_a_question(b"GET / HTTP/1.1\r\n"));
        let mut update = question(6);
        update[4] = 0x28;
        assert!(!looks_like_a_question(&update), "an update");
    }
}
