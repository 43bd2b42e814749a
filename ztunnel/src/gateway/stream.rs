//! One CONNECT through the gateway, from its headers to its record.
//!
//! The client's first bytes are read before it is answered where they say which host is meant or what is spoken; the
//! source's proxy sends them without waiting. They stay within the stream's window, which is given back when they go on.
//! A host that fails is told apart from a gateway that does (status 502), so that the source does not try the next replica
//! for it.

use std::cell::RefCell;
use std::future::{poll_fn, ready};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::base::pace::Paced;
use crate::base::sockets::reset;
use crate::base::window::Slot;
use crate::flow::tunnel::Proven;
use crate::gateway::decide::{self, Asked, Granted, Spoken, To};
use crate::gateway::limits::Place;
use crate::gateway::outside::{connect, outside, resolve};
use crate::gateway::recheck::{Left, Live, Registration};
use crate::gateway::{Gateway, requests};
use crate::hbone::headers::{self, Authority, TraceId};
use crate::http::client::Raw;
use crate::http::{BoxIo, Downstream, Framing, HeadClock, Sniffed, server, sniff};
use crate::outcome::{Code, Outcome};
use crate::relay::{self, StreamIo, TcpSide, Terms};
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

/// Why a stream is refused.
struct Refused {
    outcome: Outcome,
    /// It is the host outside that failed.
    beyond: bool,
}

impl From<Outcome> for Refused {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, beyond: false }
    }
}

/// The other side, ready.
enum Server {
    /// Bytes.
    Plain(TcpStream),
    /// Bytes into TLS that is added.
    Sealed(BoxIo),
    /// Requests, each decided for itself.
    Requests(BoxIo, Framing),
}

/// A connection that may begin.
struct Open {
    server: Server,
    granted: Granted,
    place: Place,
    first: First,
    addresses: Vec<SocketAddr>,
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
            let asked = self.asked(authority?).await?;
            let left = Left { asked, spoken: RefCell::new(Spoken::Unread) };
            // Registered before its first check: a policy that comes in between cannot miss it.
            let registration = self.live.register(left);
            let open = tokio::select! {
                biased;
                outcome = self.stopped(&registration) => return Err(outcome.into()),
                open = self.open(&registration, &mut body, record) => open?,
            };
            Ok((permit, registration, open))
        });
        let opened = tokio::select! {
            opened = opened => opened,
            _ = poll_fn(|cx| respond.poll_reset(cx)) => {
                let text = "the client's proxy took its request back before the host was reached";
                Err(Refused::from(Outcome::new(Code::ClientReset, text)))
            }
        };
        let (_permit, registration, open) = match opened {
            Ok(opened) => opened,
            Err(Refused { outcome, beyond }) => {
                let mut answer = headers::refusal(&outcome);
                if beyond {
                    *answer.status_mut() = StatusCode::BAD_GATEWAY;
                }
                // The peer may have gone; then there is nobody to tell.
                let _ = respond.send_response(answer, true);
                return outcome;
            }
        };
        let Open { server, granted, place, first, addresses } = open;
        let send = match respond.send_response(Response::new(()), false) {
            Ok(send) => send,
            Err(error) => return Outcome::new(Code::TunnelFailed, error.to_string()),
        };
        record.opened();
        drop(waiting);
        let _place = place;
        let first = first.taken(&mut body, &slot);
        let outcome = match server {
            Server::Plain(tcp) => self.bytes(tcp, send, body, first, &slot, &registration, record).await,
            Server::Sealed(server) => {
                let io: BoxIo = Box::new(Paced::new(StreamIo::new(send, body, slot)));
                let client = Downstream::new(first, io, record.counts.clone(), Rc::<HeadClock>::default());
                let server = Raw { io: server, read: Bytes::new(), stop: Box::pin(std::future::pending()) };
                let served = Box::pin(server::bytes(client, Bytes::new(), server));
                tokio::select! {
                    biased;
                    outcome = self.stopped(&registration) => outcome,
                    outcome = served => outcome,
                }
            }
            Server::Requests(server, framing) => {
                let io: BoxIo = Box::new(Paced::new(StreamIo::new(send, body, slot)));
                let stop = self.stopped(&registration);
                let to = requests::Host { gateway: self.gateway.clone(), granted, addresses, framing };
                Box::pin(requests::serve(to, &registration, first, io, server, stop, record)).await
            }
        };
        named(outcome, &registration)
    }

    /// Who asks for what: the pod at the tunnel's other end, if it is the one that was proven.
    async fn asked(&self, authority: Authority) -> Result<Arc<Asked>, Outcome> {
        let (shared, proven) = (&self.gateway.shared, &self.proven);
        let ip = proven.peer.ip();
        let look = |snapshot: &Arc<crate::state::Snapshot>| {
            let known = decide::source(snapshot, &shared.network, ip, &proven.source_identity).is_some();
            (snapshot.synced() && known).then_some(())
        };
        if shared.wait_for(look).await.is_none() {
            let text = format!(
                "the tunnel comes from {ip}, and no pod of {} is known there; an egress gateway serves pods of the mesh only",
                proven.source_identity
            );
            return Err(Outcome::new(Code::EgressDenied, text));
        }
        Ok(Arc::new(Asked {
            network: shared.network.clone(),
            source: ip,
            identity: proven.source_identity.clone(),
            gateway: self.gateway.service.clone(),
            authority,
        }))
    }

    /// Completes when the connection may not go on.
    async fn stopped(&self, registration: &Registration) -> Outcome {
        tokio::select! {
            outcome = registration.cut() => outcome,
            outcome = self.proven.cut.ordered() => outcome,
            () = self.gateway.pod.drained.forced() => Outcome::new(Code::Drained, "the gateway went away"),
        }
    }

    /// Decides and dials.
    async fn open(
        &self,
        registration: &Registration,
        body: &mut RecvStream,
        record: &mut ConnRecord,
    ) -> Result<Open, Refused> {
        let (gateway, left) = (&self.gateway, registration.facts());
        let (granted, first) = self.granted(left, body).await?;
        let place = gateway.hosts.enter(&left.asked.authority.to_string())?;
        let reached = self.reach(left, &granted, record).await;
        if reached.as_ref().is_err_and(|refused| refused.beyond) || reached.is_ok() {
            place.reached(reached.is_ok());
        }
        let (server, addresses) = reached?;
        Ok(Open { server, granted, place, first, addresses })
    }

    /// Reads what has to be read, and decides by it.
    async fn granted(&self, left: &Left, body: &mut RecvStream) -> Result<(Granted, First), Outcome> {
        let shared = &self.gateway.shared;
        let decided = shared.wait_for(|snapshot| match decide::decide(snapshot, &left.asked, &Spoken::Unread) {
            Err(outcome) if outcome.code == Code::PolicyPending => None,
            other => Some(other),
        });
        let granted = match decided.await {
            Some(decided) => decided?,
            // Still pending: say which policy is missing.
            None => decide::decide(&shared.reader.load(), &left.asked, &Spoken::Unread)?,
        };
        let mut first = First::default();
        if !granted.reads {
            return Ok((granted, first));
        }
        let told = timeout(FIRST_BYTES, told(&mut first, body)).await;
        let spoken = told.map_err(|_| {
            let text = format!("the client did not say within {} s which host it means", FIRST_BYTES.as_secs());
            Outcome::new(Code::EgressDenied, text)
        })??;
        left.spoken.replace(spoken);
        let granted = decide::decide(&shared.reader.load(), &left.asked, &left.spoken.borrow())?;
        Ok((granted, first))
    }

    async fn reach(
        &self,
        left: &Left,
        granted: &Granted,
        record: &mut ConnRecord,
    ) -> Result<(Server, Vec<SocketAddr>), Refused> {
        let gateway = &self.gateway;
        let beyond = |outcome| Refused { outcome, beyond: true };
        let addresses = self.addresses(granted).await?;
        let patience = gateway.shared.hbone.connect_timeout;
        let (tcp, at) =
            connect(&gateway.pod.sockets, &addresses, &gateway.from, patience).await.map_err(beyond)?;
        record.destination.addr = Some(at);
        let framing = left.spoken.borrow().framing();
        let server = match (&granted.originate, framing) {
            (None, None) => Server::Plain(tcp),
            (None, Some(framing)) => Server::Requests(Box::new(tcp), framing),
            (Some(tls), framing) => {
                let name = if tls.server_name.is_empty() { &*granted.host } else { &*tls.server_name };
                let shake = gateway.tls.handshake(tcp, name, &tls.roots, framing);
                let late = || Outcome::new(Code::TlsFailed, format!("TLS with {name} was not finished in time"));
                let shaken = timeout(gateway.shared.hbone.handshake_timeout, shake).await;
                let stream = shaken.map_err(|_| beyond(late()))?.map_err(beyond)?;
                match framing {
                    Some(framing) => Server::Requests(Box::new(stream), framing),
                    None => Server::Sealed(Box::new(stream)),
                }
            }
        };
        Ok((server, addresses))
    }

    /// Where to dial: what the rule says, or what the name resolves to here.
    async fn addresses(&self, granted: &Granted) -> Result<Vec<SocketAddr>, Refused> {
        let gateway = &self.gateway;
        let beyond = |outcome| Refused { outcome, beyond: true };
        let mut all: Vec<SocketAddr> = Vec::new();
        for to in &granted.to {
            match to {
                To::Address(at) => all.push(*at),
                To::Name(host, port) => {
                    let found = resolve(&gateway.names, host, self.proven.peer.is_ipv6()).await.map_err(beyond)?;
                    let snapshot = gateway.shared.reader.load();
                    let found: Vec<IpAddr> =
                        outside(&snapshot, &gateway.shared.network, host, found, &granted.named)?;
                    all.extend(found.into_iter().map(|ip| SocketAddr::new(ip, *port)));
                }
            }
        }
        Ok(all)
    }

    #[expect(clippy::too_many_arguments, reason = "what a stream is made of, once")]
    async fn bytes(
        &self,
        mut tcp: TcpStream,
        send: h2::SendStream<Bytes>,
        body: RecvStream,
        first: Bytes,
        slot: &Slot,
        registration: &Registration,
        record: &ConnRecord,
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
        let stop = pin!(self.stopped(registration));
        relay::tunnel(tcp, send, ready(Ok(body)), TcpSide::Server, terms, slot, stop).await
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
        Sniffed::More | Sniffed::Other => Some(Spoken::Other),
    }
}

/// An outcome with the rule that let the connection out, for its record.
fn named(outcome: Outcome, registration: &Registration) -> Outcome {
    let _ = registration;
    outcome
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
            (b"", true, Some(Spoken::Other)),
            (b"G", false, None),
            (b"GET /", false, Some(Spoken::Http(Framing::One))),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false, Some(Spoken::Http(Framing::Two))),
            (&[22, 3, 1], false, None),
            (&[22, 3, 1], true, Some(Spoken::Other)),
            (b"SSH-2.0-x", false, Some(Spoken::Other)),
        ] {
            assert_eq!(spoken(bytes, ended), expected, "{bytes:?}");
        }
    }
}
