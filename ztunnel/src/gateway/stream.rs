//! One CONNECT through the gateway, from its headers to its record.
//!
//! The client's first bytes are read before it is answered where they say which host is meant or what is spoken; the
//! source's proxy sends them without waiting. They stay within the stream's window, which is given back when they go on.
//! A host that fails is told apart from a gateway that does (status 502), so that the source does not try the next replica
//! for it.

use std::cell::RefCell;
use std::future::{Future, poll_fn, ready};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Response, StatusCode};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::base::pace::Paced;
use crate::base::sockets::reset;
use crate::base::window::Slot;
use crate::flow::tunnel::Proven;
use crate::gateway::decide::{self, Asked, Decision, Spoken};
use crate::gateway::limits::Place;
use crate::gateway::outside::{Failed, Server};
use crate::gateway::recheck::{Facts, Live, Registration};
use crate::gateway::{Gateway, requests};
use crate::hbone::headers::{self, Authority, TraceId};
use crate::http::client::Raw;
use crate::http::{BoxIo, Downstream, Framing, HeadClock, Sniffed, server, sniff};
use crate::outcome::{Code, Outcome};
use crate::policy::egress;
use crate::relay::{self, StreamIo, TcpSide, Terms};
use crate::telemetry::egress::{Left, Verdict};
use crate::telemetry::{ConnRecord, Direction};
use crate::tls::hello::{self, Hello};

/// How long a client may take for the bytes that say which host it means. Its proxy had them before it asked.
const FIRST_BYTES: Duration = Duration::from_secs(10);

/// A stream of a tunnel.
pub(super) struct Stream {
    pub(super) gateway: Arc<Gateway>,
    pub(super) live: Rc<Live>,
    pub(super) proven: Rc<Proven>,
}

/// A connection that may begin.
enum Open {
    /// Bytes, to a host that was reached.
    Bytes(Server, Place),
    /// Requests, each of which is decided and sent for itself.
    Requests(Framing, Place),
}

/// What the client has said and nobody has taken yet.
#[derive(Default)]
struct First {
    bytes: BytesMut,
    ended: bool,
}

impl First {
    /// Waits for more.
    async fn more(&mut self, body: &mut RecvStream) -> Result<(), Outcome> {
        match poll_fn(|cx| body.poll_data(cx)).await {
            Some(Ok(chunk)) => self.bytes.extend_from_slice(&chunk),
            Some(Err(error)) => return Err(Outcome::new(Code::ClientReset, error.to_string())),
            None => self.ended = true,
        }
        Ok(())
    }

    /// Gives the window back, and the bytes.
    fn taken(self, body: &mut RecvStream, slot: &Slot) -> Bytes {
        let size = self.bytes.len();
        // Fails only if the stream has ended, which whoever reads on learns.
        let _ = body.flow_control().release_capacity(size);
        slot.carried(size);
        self.bytes.freeze()
    }
}

impl Stream {
    /// Serves it to its end.
    pub(super) async fn serve(self, request: Box<http::Request<RecvStream>>, mut respond: SendResponse<Bytes>) {
        let mut record = self.record(&request);
        let authority = headers::destination(&request);
        let body = request.into_body();
        let outcome = self.carry(authority, body, &mut respond, &mut record).await;
        record.finish(&outcome);
    }

    fn record<B>(&self, request: &http::Request<B>) -> ConnRecord {
        let (shared, proven) = (&self.gateway.shared, &self.proven);
        let mut record = ConnRecord::new(shared.metrics.clone(), Direction::Inbound, proven.peer, proven.local);
        record.source.identity = Some(proven.source_identity.clone());
        record.source.workload =
            decide::source(&shared.reader.load(), &shared.network, proven.peer.ip(), &proven.source_identity).cloned();
        if let Some(Ok(trace)) = headers::text(request.headers(), &headers::TRACEPARENT).map(TraceId::parse) {
            record.trace = Some(trace.to_string());
        }
        record
    }

    async fn carry(
        &self,
        authority: Result<Authority, Outcome>,
        mut body: RecvStream,
        respond: &mut SendResponse<Bytes>,
        record: &mut ConnRecord,
    ) -> Outcome {
        let pod = &self.gateway.pod;
        let slot = self.proven.window.enter();
        // First bytes may come with the request, and nobody takes them yet.
        let waiting = slot.stalled();
        // Boxed: what it takes to open a connection must not weigh on it while it is idle.
        let opened = Box::pin(async {
            let permit = pod.connection(&pod.inbound)?;
            let asked = self.asked(&authority?).await?;
            let facts = Facts { asked, spoken: RefCell::new(Spoken::Unread) };
            // Registered before its first check: a policy that comes in between cannot miss it.
            let registration = self.live.register(facts);
            let mut first = First::default();
            let open = tokio::select! {
                biased;
                outcome = self.stopped(&registration) => return Err(outcome.into()),
                open = self.open(&registration, &mut first, &mut body, record) => open?,
            };
            Ok((permit, registration, first, open))
        });
        let opened = tokio::select! {
            opened = opened => opened,
            _ = poll_fn(|cx| respond.poll_reset(cx)) => {
                let text = "the client's proxy took its request back before the host was reached";
                Err(Failed::from(Outcome::new(Code::ClientReset, text)))
            }
        };
        let (_permit, registration, first, open) = match opened {
            Ok(opened) => opened,
            Err(Failed { outcome, beyond }) => {
                let mut answer = headers::refusal(&outcome);
                if beyond {
                    *answer.status_mut() = StatusCode::BAD_GATEWAY;
                }
                // The peer may have gone; then there is nobody to tell.
                let _ = respond.send_response(answer, true);
                return outcome;
            }
        };
        let send = match respond.send_response(Response::new(()), false) {
            Ok(send) => send,
            Err(error) => return Outcome::new(Code::TunnelFailed, error.to_string()),
        };
        record.opened();
        drop(waiting);
        let first = first.taken(&mut body, &slot);
        let stop = self.stopped(&registration);
        match open {
            Open::Bytes(Server::Plain(tcp), _place) => {
                self.bytes(tcp, send, body, first, &slot, record, pin!(stop)).await
            }
            Open::Bytes(Server::Sealed(server), _place) => {
                let io: BoxIo = Box::new(Paced::new(StreamIo::new(send, body, slot)));
                let client = Downstream::new(first, io, record.counts.clone(), Rc::<HeadClock>::default());
                let server = Raw { io: server, read: Bytes::new(), stop: Box::pin(std::future::pending()) };
                let served = Box::pin(server::bytes(client, Bytes::new(), server));
                tokio::select! {
                    biased;
                    outcome = stop => outcome,
                    outcome = served => outcome,
                }
            }
            Open::Requests(framing, place) => {
                let io: BoxIo = Box::new(Paced::new(StreamIo::new(send, body, slot)));
                let asked = registration.facts().asked.clone();
                let prefer_v6 = self.proven.peer.is_ipv6();
                let connection = requests::Connection::new(&self.gateway, asked, framing, prefer_v6, place, record);
                Box::pin(requests::serve(connection, first, io, stop, record)).await
            }
        }
    }

    /// Who asks for what. A pod that has just begun may be known here a moment later.
    async fn asked(&self, authority: &Authority) -> Result<Arc<Asked>, Outcome> {
        let (shared, proven) = (&self.gateway.shared, &self.proven);
        let (ip, identity) = (proven.peer.ip(), &proven.source_identity);
        let asked = Asked::new(&shared.network, ip, identity, &self.gateway.service, authority);
        shared
            .wait_for(|snapshot| {
                let known = snapshot.workload_by_ip(&shared.network, ip).is_some();
                (snapshot.synced() && known).then_some(())
            })
            .await;
        Ok(Arc::new(asked))
    }

    /// Completes when the connection may not go on.
    async fn stopped(&self, registration: &Registration) -> Outcome {
        tokio::select! {
            outcome = registration.cut() => outcome,
            outcome = self.proven.cut.ordered() => outcome,
            () = self.gateway.pod.drained.forced() => Outcome::new(Code::Drained, "the gateway went away"),
        }
    }

    /// Decides and, for bytes, dials.
    async fn open(
        &self,
        registration: &Registration,
        first: &mut First,
        body: &mut RecvStream,
        record: &mut ConnRecord,
    ) -> Result<Open, Failed> {
        let (gateway, left) = (&self.gateway, registration.facts());
        let decided = self.decided(left, first, body).await;
        record.left = Some(Box::new(attempt(&left.asked, &left.spoken.borrow(), &decided)));
        let decision = decided?;
        let place = gateway.hosts.enter(&left.asked.target(), left.asked.identity.namespace())?;
        let grant = match decision {
            Decision::Leave(grant) => grant,
            Decision::Requests(framing) => return Ok(Open::Requests(framing, place)),
            Decision::Read => return Err(Outcome::new(Code::Internal, "what was read has to be read again").into()),
        };
        let said = left.spoken.borrow().clone();
        let spoken = match &said {
            Spoken::Tls(name) => egress::Spoken::Tls(name.as_deref()),
            Spoken::Unread | Spoken::Http(_) | Spoken::Bytes => egress::Spoken::Bytes,
        };
        let reached = gateway.reach(&left.asked, &grant, None, spoken, self.proven.peer.is_ipv6(), &place).await;
        let (server, at) = reached?;
        record.destination.addr = Some(at);
        Ok(Open::Bytes(server, place))
    }

    /// Decides, by the client's first bytes where they are needed.
    async fn decided(&self, left: &Facts, first: &mut First, body: &mut RecvStream) -> Result<Decision, Outcome> {
        let shared = &self.gateway.shared;
        let decided = shared.wait_for(|snapshot| match decide::decide(snapshot, &left.asked, &Spoken::Unread) {
            Err(outcome) if outcome.code == Code::PolicyPending => None,
            other => Some(other),
        });
        let decision = match decided.await {
            Some(decided) => decided?,
            // Still pending: say which policy is missing.
            None => decide::decide(&shared.reader.load(), &left.asked, &Spoken::Unread)?,
        };
        if !matches!(decision, Decision::Read) {
            return Ok(decision);
        }
        let spoken = timeout(FIRST_BYTES, told(first, body)).await.map_err(|_| {
            let text = format!("the client did not say within {} s which host it means", FIRST_BYTES.as_secs());
            Outcome::new(Code::EgressDenied, text)
        })??;
        left.spoken.replace(spoken);
        decide::decide(&shared.reader.load(), &left.asked, &left.spoken.borrow())
    }

    #[expect(clippy::too_many_arguments, reason = "what a stream is made of, once")]
    async fn bytes(
        &self,
        mut tcp: TcpStream,
        send: SendStream<Bytes>,
        body: RecvStream,
        first: Bytes,
        slot: &Slot,
        record: &ConnRecord,
        stop: Pin<&mut impl Future<Output = Outcome>>,
    ) -> Outcome {
        let counts = record.counts.clone();
        // A new connection's buffer takes a hello.
        if let Err(error) = tcp.write_all(&first).await {
            reset(tcp);
            return Outcome::new(Code::ServerReset, error.to_string());
        }
        counts.up.set(counts.up.get() + first.len() as u64);
        let (shared, pod) = (&self.gateway.shared, &self.gateway.pod);
        let terms = Terms { counts: &counts, limits: shared.relay, budget: &pod.buffers };
        relay::tunnel(tcp, send, ready(Ok(body)), TcpSide::Server, terms, slot, stop).await
    }
}

/// An attempt as records have it.
fn attempt(asked: &Asked, spoken: &Spoken, decided: &Result<Decision, Outcome>) -> Left {
    let grant = match decided {
        Ok(Decision::Leave(grant)) => Some(grant),
        _ => None,
    };
    let denied = decided.as_ref().err();
    Left {
        namespace: asked.identity.namespace().into(),
        account: asked.identity.service_account().into(),
        host: asked.host.as_deref().map(Into::into),
        address: asked.address,
        port: asked.port,
        spoken: match spoken {
            Spoken::Tls(_) => "TLS",
            Spoken::Http(_) => "HTTP",
            Spoken::Unread | Spoken::Bytes => "TCP",
        },
        claimed: match spoken {
            Spoken::Tls(name) => name.as_deref().map(Into::into),
            _ => None,
        },
        request: None,
        verdict: if denied.is_some() { Verdict::Denied } else { Verdict::Allowed },
        policy: grant
            .map(|grant| grant.policy.id.clone())
            .or_else(|| denied.and_then(|outcome| outcome.policy.clone())),
        rule: grant.map(|grant| grant.rule).or_else(|| denied.and_then(|outcome| outcome.rule)),
    }
}

/// What the client speaks, told from as few bytes as that takes.
async fn told(first: &mut First, body: &mut RecvStream) -> Result<Spoken, Outcome> {
    loop {
        if let Some(spoken) = spoken(&first.bytes, first.ended) {
            return Ok(spoken);
        }
        first.more(body).await?;
    }
}

/// The same, pure. `None`: it takes more bytes.
fn spoken(first: &[u8], ended: bool) -> Option<Spoken> {
    match hello::read(first) {
        Hello::Client { name, .. } => return Some(Spoken::Tls(name)),
        Hello::More if !ended && !first.is_empty() => return None,
        Hello::More | Hello::Not(_) => {}
    }
    match sniff(first) {
        Sniffed::Http1 => Some(Spoken::Http(Framing::One)),
        Sniffed::Http2 => Some(Spoken::Http(Framing::Two)),
        Sniffed::More if !ended => None,
        Sniffed::More | Sniffed::Other => Some(Spoken::Bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::spoken;
    use crate::gateway::decide::Spoken;
    use crate::http::Framing;

    #[test]
    fn a_client_is_told_by_its_first_bytes() {
        for (bytes, ended, expected) in [
            (&b""[..], false, None),
            (b"", true, Some(Spoken::Bytes)),
            (b"G", false, None),
            (b"GET /", false, Some(Spoken::Http(Framing::One))),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false, Some(Spoken::Http(Framing::Two))),
            (&[22, 3, 1], false, None),
            (&[22, 3, 1], true, Some(Spoken::Bytes)),
            (b"SSH-2.0-x", false, Some(Spoken::Bytes)),
        ] {
            assert_eq!(spoken(bytes, ended), expected, "{bytes:?}");
        }
    }
}
