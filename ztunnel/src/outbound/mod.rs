//! From a captured connection of a local pod to its next hop: listen → decide → dial → relay.
//!
//! [`serve`] is the life of a connection from top to bottom. Whatever refuses it resets the client's connection, because
//! bytes that nobody will answer must not look accepted.

pub mod decide;
mod dial;
pub mod recheck;

use std::rc::Rc;
use std::sync::Arc;

use rand::RngExt as _;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::base::sockets::{original_destination, reset};
use crate::base::{Counts, canonical};
use crate::capture::probe;
use crate::flow::{LocalPod, Shared};
use crate::hbone::pool::Pool;
use crate::outbound::recheck::{Left, Live, Registration};
use crate::outcome::{Code, Outcome};
use crate::state::EgressMode;
use crate::telemetry::{ConnRecord, Direction};

/// Serves one captured connection to its end.
pub async fn serve(shared: Shared, pool: Rc<Pool>, live: Rc<Live>, pod: Arc<LocalPod>, tcp: TcpStream) {
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
    let outcome = carry(&shared, &pool, &live, &pod, tcp, destination, &mut record, &counts).await;
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
    shared: &Shared,
    pool: &Rc<Pool>,
    live: &Rc<Live>,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    destination: std::net::SocketAddr,
    record: &mut ConnRecord,
    counts: &Rc<Counts>,
) -> Outcome {
    // Boxed, here and below: what it takes to open a connection must not weigh on it while it is idle.
    let planned = Box::pin(async {
        let permit = pod.connection(&pod.outbound)?;
        let (snapshot, source) = shared.known(pod).await?;
        record.source.workload = Some(source.clone());
        let plan = decide::decide(&snapshot, &source, &shared.network, destination, rand::rng().random())?;
        record.service = plan.service().cloned();
        record.destination.workload = plan.destination().cloned();
        let left = Left { pod: pod.clone(), target: plan.target() };
        let registration = live.register_decided(left, &shared.reader);
        Ok((permit, source, plan, registration))
    });
    let planned = tokio::select! {
        planned = planned => planned,
        outcome = ended(pod) => Err(outcome),
    };
    let (_permit, source, plan, registration) = match planned {
        Ok(planned) => planned,
        Err(outcome) => {
            reset(tcp);
            return outcome;
        }
    };
    match plan {
        decide::Plan::Hbone(plan) => {
            dial::tunnel(shared, pool, pod, tcp, &source, &plan, &registration, record, counts).await
        }
        decide::Plan::Plain(plan) => dial::plain(shared, pod, tcp, &plan, &registration, record, counts).await,
    }
}
