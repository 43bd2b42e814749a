//! From a captured connection of a local pod to its next hop: listen → decide → dial → relay. `attempts` goes around
//! decide and dial where a service has another endpoint to try.
//!
//! [`serve`] is the life of a connection from top to bottom. Whatever refuses it resets the client's connection, because
//! bytes that nobody will answer must not look accepted.

mod attempts;
pub mod decide;
mod dial;
pub mod recheck;

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
use crate::hbone::pool::Pool;
use crate::lb::Failing;
use crate::outbound::attempts::{Attempts, Next};
use crate::outbound::recheck::{Left, Live, Registration};
use crate::outcome::{Code, Outcome};
use crate::state::EgressMode;
use crate::telemetry::{ConnRecord, Direction};

/// Serves one captured connection to its end.
pub async fn serve(
    shared: Arc<Shared>,
    pool: Rc<Pool>,
    failing: Rc<RefCell<Failing>>,
    live: Rc<Live>,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
) {
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
    let attempts = Attempts { shared: &shared, pool: &pool, failing: &failing, pod: &pod };
    let outcome = carry(attempts, &live, tcp, destination, &mut record, &counts).await;
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

#[allow(clippy::too_many_arguments, reason = "the parts of one connection, each used once")]
async fn carry(
    attempts: Attempts<'_>,
    live: &Rc<Live>,
    tcp: TcpStream,
    destination: SocketAddr,
    record: &mut ConnRecord,
    counts: &Rc<Counts>,
) -> Outcome {
    let Attempts { shared, pod, .. } = attempts;
    // Boxed: what it takes to open a connection must not weigh on it while it is idle.
    let opened = Box::pin(async {
        let permit = pod.connection(&pod.outbound)?;
        let lease = shared.ask(pod, destination.ip())?;
        shared.answered(pod, lease.as_ref(), destination.ip()).await?;
        let (snapshot, source) = shared.known(pod).await?;
        record.source.workload = Some(source.clone());
        let (next, target) = attempts.reach(&snapshot, &source, destination, &tcp, record).await?;
        record.opened();
        let registration = live.register_decided(Left { pod: pod.clone(), target, lease }, &shared.reader);
        Ok((permit, next, registration))
    });
    let opened = tokio::select! {
        opened = opened => opened,
        outcome = ended(pod) => Err(outcome),
    };
    let (_permit, next, registration) = match opened {
        Ok(opened) => opened,
        Err(outcome) => {
            reset(tcp);
            return outcome;
        }
    };
    match next {
        Next::Tunnel(next) => dial::relay_tunnel(shared, pod, tcp, next, &registration, counts).await,
        Next::Plain { server, outside } => {
            // Boxed: tunnels are not to make room for it.
            Box::pin(dial::relay_plain(shared, pod, tcp, server, outside, &registration, counts)).await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::serve;

    fn size<A, B, C, D, E, F, R>(_: impl Fn(A, B, C, D, E, F) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn an_idle_connection_is_small() {
        let size = size(serve);
        assert!(size <= 3 * 1024, "{size} bytes: is a future passed on by value, or kept that only opening needs?");
    }
}
