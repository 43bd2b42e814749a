//! A captured connection whose requests are routed one by one: whether it is one, and serving it.
//!
//! Only a port of a Service that a route or a traffic policy speaks of is looked at, and only if no waypoint is in front of
//! it, which would decide its requests; everything else goes the way of bytes, unread. What the client speaks is told by peeking, so a connection that turns out not to be HTTP goes that way too with
//! nothing lost. Each request is decided on the newest snapshot (`exchange`), so an edit applies to the next one.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

use crate::base::{Counts, workers};
use crate::flow::{LocalPod, Shared};
use crate::http::offer::Offer;
use crate::http::{Downstream, ENOUGH, Framing, HEAD_TIME, HeadClock, Sniffed, server, sniff};
use crate::lb::Destination;
use crate::outbound::attempts::Attempts;
use crate::outbound::{Means, ended, waypoint};
use crate::outcome::{Code, Outcome};
use crate::state::{AppProtocol, Snapshot, Workload};

/// How long a client of a port whose protocol is not declared may be silent before its bytes go through unread. It is what
/// such a client of a protocol in which the server speaks first waits longer than without the route.
const SILENCE: Duration = Duration::from_millis(200);

/// How long such a client may take for its first word. Longer, it is somebody who speaks another protocol of words.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// Before the second look at a client that has sent too little to tell; the socket wakes nobody for bytes that were peeked.
const LOOK: Duration = Duration::from_millis(5);

/// A connection that speaks HTTP.
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) means: Means,
    pub(super) pod: Arc<LocalPod>,
    /// The client's address.
    pub(super) addr: SocketAddr,
    /// Where it wanted to go.
    pub(super) destination: SocketAddr,
    pub(super) framing: Framing,
    /// What the node knows of it, where it is a Service's port.
    pub(super) known: Option<Arc<Destination>>,
    /// Copies for mirrors that are under way.
    pub(super) copies: Cell<usize>,
}

impl Client {
    pub(super) fn attempts(&self) -> Attempts<'_> {
        Attempts { shared: &self.shared, pool: &self.means.pool, failing: &self.means.failing, pod: &self.pod }
    }

    /// Keeps what a server of HTTP/2 offers, for clients that come later: they are told at once or not at all.
    pub(super) fn learn(&self, offer: Offer) {
        let Some(known) = self.known.clone() else { return };
        let namespace = self.pod.namespace.clone();
        workers::spawn(async move {
            if let Some(offers) = offer.said().await {
                known.websockets(&namespace, offers, std::time::Instant::now());
            }
        });
    }
}

/// Whether requests to `destination` are routed, and what is declared of its port.
pub fn wanted(snapshot: &Snapshot, source: &Workload, network: &str, destination: SocketAddr) -> Option<AppProtocol> {
    let service = snapshot.service_at(network, destination, &source.namespace)?;
    let routed = snapshot.speaks_of_http(service, destination.port(), &source.namespace);
    if !routed || waypoint::decides(snapshot, source, service) {
        return None;
    }
    let declared = service.port(destination.port())?.app_protocol;
    (!matches!(declared, AppProtocol::Tcp | AppProtocol::Tls)).then_some(declared)
}

/// What the client speaks. `None`: bytes.
///
/// # Errors
/// `NotHttp` if the port is declared to be HTTP and the client speaks something else: it cannot be routed.
pub(super) async fn told(tcp: &TcpStream, declared: AppProtocol) -> Result<Option<Framing>, Outcome> {
    let sure = declared != AppProtocol::Unknown;
    let begin = Instant::now();
    let patient = if sure { HEAD_TIME } else { FIRST_WORD };
    // A client that knows that it speaks first may take its time, as on any idle connection; a head has its own clock.
    let patience = if sure { None } else { Some(begin + SILENCE) };
    let mut first = [0; ENOUGH];
    loop {
        let peeked = match patience {
            None => tcp.peek(&mut first).await,
            Some(deadline) => match timeout_at(deadline, tcp.peek(&mut first)).await {
                Ok(peeked) => peeked,
                Err(_) => return Ok(None),
            },
        };
        let Ok(size) = peeked else { return Ok(None) };
        match sniff(&first[..size]) {
            Sniffed::Http1 => return Ok(Some(Framing::One)),
            Sniffed::Http2 => return Ok(Some(Framing::Two)),
            Sniffed::More if size > 0 && begin.elapsed() < patient => sleep(pause(begin.elapsed())).await,
            _ if size == 0 || !sure => return Ok(None),
            _ => {
                let text = "the Service's port is declared to be HTTP and has routes, and the client speaks something else; \
                            correct appProtocol or the name of the port";
                return Err(Outcome::new(Code::NotHttp, text));
            }
        }
    }
}

/// How long after `waited` to look again: ever longer, so that thousands of clients that stop in their first word cost nothing.
fn pause(waited: Duration) -> Duration {
    LOOK.max(waited / 4)
}

/// What the node knows of a Service's port.
fn known(shared: &Shared, pod: &LocalPod, destination: SocketAddr) -> Option<Arc<Destination>> {
    let snapshot = shared.reader.load();
    let source = pod.workload(&snapshot)?;
    let service = snapshot.service_at(&shared.network, destination, &source.namespace)?;
    Some(shared.destinations.of(service, destination.port()))
}

/// Serves the requests of a connection to its end. `ends`: the client's address, and where it wanted to go.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    means: &Means,
    pod: &Arc<LocalPod>,
    ends: (SocketAddr, SocketAddr),
    framing: Framing,
    tcp: TcpStream,
    counts: &Rc<Counts>,
) -> Outcome {
    let clock = Rc::<HeadClock>::default();
    let connection = Downstream::new(Bytes::new(), Box::new(tcp), counts.clone(), clock.clone());
    let known = known(shared, pod, ends.1);
    let offers = known.as_ref().is_some_and(|known| known.takes_websockets(&pod.namespace, std::time::Instant::now()));
    let client = Rc::new(Client {
        shared: shared.clone(),
        means: means.clone(),
        pod: pod.clone(),
        addr: ends.0,
        destination: ends.1,
        framing,
        known,
        copies: Cell::new(0),
    });
    let service: server::Service = Rc::new(move |request, switches| {
        let client = client.clone();
        Box::pin(async move { client.exchange(request, switches).await })
    });
    server::serve(connection, clock, (framing, offers), &pod.drained, ended(pod), service).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{HEAD_TIME, LOOK, pause};

    #[test]
    fn a_client_that_stops_in_its_first_word_is_looked_at_a_few_times() {
        let mut waited = Duration::ZERO;
        let looks = (0..).take_while(|_| {
            waited += pause(waited);
            waited < HEAD_TIME
        });
        assert!(looks.count() < 50);
        assert_eq!(pause(4 * LOOK), LOOK, "and soon if it goes on at once");
    }
}
