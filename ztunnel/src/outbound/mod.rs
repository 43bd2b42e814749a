//! From a captured connection of a local pod to its next hop: listen → decide → dial → relay. `attempts` goes around
//! decide and dial where a service has another endpoint to try. Where a route speaks of the destination, `requests` takes
//! the place of dial and relay.
//!
//! [`serve`] is the life of a connection from top to bottom. Whatever refuses it resets the client's connection, because
//! bytes that nobody will answer must not look accepted.

mod ask;
mod attempts;
mod breaker;
pub mod decide;
mod dial;
mod egress;
mod elsewhere;
mod exchange;
pub mod explained;
mod forward;
mod gateway;
mod leaving;
mod mirror;
pub mod recheck;
mod requests;
mod room;
mod waypoint;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::base::sockets::{original_destination, reset};
use crate::base::{Counts, canonical};
use crate::capture::probe;
use crate::flow::{LocalPod, Shared};
use crate::hbone;
use crate::hbone::pool::Pool;
use crate::http::{Framing, pool};
use crate::lb::Failing;
use crate::outbound::attempts::{Attempts, Next};
use crate::outbound::breaker::Lasting;
pub use crate::outbound::egress::Outside;
pub use crate::outbound::leaving::{WayOut, explained as leaving, explained_name as leaving_by_name};
use crate::outbound::recheck::{Left, Live, Registration};
pub use crate::outbound::requests::wanted;
pub use crate::outbound::waypoint::decides as waypoint_decides;
use crate::outcome::{Code, Outcome};
use crate::state::{EgressMode, Lease};
use crate::telemetry::{ConnRecord, Direction};

/// What a worker has for its outbound connections. Cheap to clone.
#[derive(Clone)]
pub struct Means {
    /// Its tunnels.
    pub pool: Rc<Pool>,
    /// Endpoints that it could not reach lately.
    pub failing: Rc<RefCell<Failing>>,
    /// Its live outbound connections.
    pub live: Rc<Live>,
    /// Connections for requests.
    pub connections: Rc<pool::Pool>,
    /// What it takes to leave the cluster from the node.
    pub outside: Outside,
}

impl Means {
    /// A new worker's.
    pub fn new(config: hbone::Config, outside: Outside) -> Self {
        Self {
            pool: Pool::new(config),
            failing: Rc::default(),
            live: recheck::live(),
            connections: pool::Pool::new(),
            outside,
        }
    }
}

/// Serves one captured connection to its end.
pub async fn serve(shared: Arc<Shared>, means: Means, pod: Arc<LocalPod>, tcp: TcpStream) {
    // Not redirected: somebody dialled the proxy's port itself. There is nothing to proxy to.
    let (Ok(destination), Ok(source)) = (original_destination(&tcp), tcp.peer_addr()) else { return reset(tcp) };
    // Dialled directly while connection tracking is on: the "original" destination is the listener itself.
    if tcp.local_addr().is_ok_and(|local| canonical(local) == destination) {
        return reset(tcp);
    }
    if probe::is_outbound_probe(destination) {
        // Not `try_write`: a stream that was just registered does not know yet that it is writable.
        let _ = AsyncWriteExt::write_all(&mut { tcp }, probe::TOKEN).await;
        return;
    }
    let mut record = ConnRecord::new(shared.metrics.clone(), Direction::Outbound, canonical(source), destination);
    let counts = record.counts.clone();
    let outcome = carry(&shared, &means, &pod, tcp, destination, &mut record, &counts).await;
    record.finish(&outcome);
}

/// Completes when the pod's flows have to end.
async fn ended(pod: &LocalPod) -> Outcome {
    pod.drained.forced().await;
    Outcome::new(Code::Drained, "the proxy or the pod went away")
}

/// Completes when the connection may not go on: the pod's flows have to end, or a policy forbids it.
async fn stopped(pod: &LocalPod, registration: &Registration) -> Outcome {
    tokio::select! {
        outcome = registration.cut() => outcome,
        outcome = ended(pod) => outcome,
    }
}

/// Completes when the pod may no longer reach the outside.
async fn forbidden(shared: &Shared, pod: &LocalPod) -> Outcome {
    let mut changes = shared.reader.subscribe();
    loop {
        let snapshot = shared.reader.load();
        if pod.workload(&snapshot).is_some_and(|workload| workload.egress == EgressMode::Deny) {
            let text = "the namespace was labelled tulle.dev/egress: deny";
            return Outcome::new(Code::EgressDenied, text);
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// How a connection goes on.
enum Way {
    Bytes(Next, Registration, Option<Box<Lasting>>),
    /// With what keeps the Service known, where not everything is.
    Requests(Framing, Vec<Lease>),
}

async fn carry(
    shared: &Arc<Shared>,
    means: &Means,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    destination: SocketAddr,
    record: &mut ConnRecord,
    counts: &Rc<Counts>,
) -> Outcome {
    // Boxed: what it takes to open a connection must not weigh on it while it is idle.
    let opened = Box::pin(async {
        let permit = pod.connection(&pod.outbound)?;
        let lease = shared.ask(pod, destination.ip())?;
        shared.answered(pod, lease.as_ref(), destination.ip()).await?;
        let known = ask::destination(shared, pod, destination, lease.into_iter().collect()).await?;
        let ask::Known { snapshot, source, leases } = known;
        record.source.workload = Some(source.clone());
        let attempts = Attempts { shared, pool: &means.pool, failing: &means.failing, pod };
        if let Some(bound) = egress::bound(&snapshot, pod, &source, &shared.network, destination) {
            let reached = egress::reach(attempts, &means.outside, &snapshot, &source, bound, &tcp, record).await?;
            if let Some((next, target)) = reached {
                record.opened();
                let left = Left { pod: pod.clone(), target, leases };
                let registration = means.live.register_decided(left, &shared.reader);
                return Ok((permit, Way::Bytes(next, registration, None)));
            }
        }
        if let Some(declared) = requests::wanted(&snapshot, &source, &shared.network, destination)
            && let Some(framing) = requests::told(&tcp, declared).await?
        {
            let client = &source.namespace;
            record.service = snapshot.service_at(&shared.network, destination, client).cloned();
            record.opened();
            return Ok((permit, Way::Requests(framing, leases)));
        }
        let (next, target, lasting) = attempts.reach(&snapshot, &source, destination, &tcp, record).await?;
        record.opened();
        let left = Left { pod: pod.clone(), target, leases };
        let registration = means.live.register_decided(left, &shared.reader);
        Ok((permit, Way::Bytes(next, registration, lasting)))
    });
    let opened = tokio::select! {
        opened = opened => opened,
        outcome = ended(pod) => Err(outcome),
    };
    match opened {
        Err(outcome) => {
            reset(tcp);
            outcome
        }
        Ok((_permit, Way::Bytes(Next::Tunnel(next), registration, mut lasting))) => {
            dial::relay_tunnel(shared, pod, tcp, next, &registration, &mut lasting, counts).await
        }
        Ok((_permit, Way::Bytes(Next::Plain { server, outside }, registration, mut lasting))) => {
            // Boxed: tunnels are not to make room for it.
            let relay = dial::relay_plain(shared, pod, (tcp, server), outside, &registration, &mut lasting, counts);
            Box::pin(relay).await
        }
        Ok((_permit, Way::Bytes(Next::Outside { server, leave }, registration, _))) => {
            Box::pin(dial::relay_outside(shared, pod, tcp, server, &leave, &registration, counts)).await
        }
        Ok((_permit, Way::Requests(framing, _leases))) => {
            let addr = record.source.addr.unwrap_or(destination);
            Box::pin(requests::serve(shared, means, pod, (addr, destination), framing, tcp, counts)).await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::serve;

    fn size<A, B, C, D, R>(_: impl Fn(A, B, C, D) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn an_idle_connection_is_small() {
        let size = size(serve);
        assert!(size <= 3 * 1024, "{size} bytes: is a future passed on by value, or kept that only opening needs?");
    }
}
