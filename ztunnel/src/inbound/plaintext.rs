//! Plaintext that was redirected on its way to the application.
//!
//! The same admission as for a tunnel, with no identity: what a STRICT destination refuses is decided there, not here.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::base::canonical;
use crate::base::sockets::{original_destination, reset};
use crate::capture::probe;
use crate::flow::{LocalPod, Shared};
use crate::inbound::recheck::Live;
use crate::inbound::requests::{self, Connection};
use crate::inbound::{Request, admit, stopped};
use crate::outcome::Outcome;
use crate::relay::{self, Terms};
use crate::telemetry::{ConnRecord, Direction};

/// Serves one connection to its end.
pub async fn serve(shared: Arc<Shared>, live: Rc<Live>, pod: Arc<LocalPod>, tcp: TcpStream) {
    let (Ok(target), Ok(source)) = (original_destination(&tcp), tcp.peer_addr()) else { return reset(tcp) };
    if target.port() == probe::PORT {
        // Not `try_write`: a stream that was just registered does not know yet that it is writable.
        let _ = AsyncWriteExt::write_all(&mut { tcp }, probe::TOKEN).await;
        return;
    }
    let source = canonical(source);
    let mut record = ConnRecord::new(shared.metrics.clone(), Direction::Inbound, source, target);
    let snapshot = shared.reader.load();
    record.source.workload = snapshot.workload_by_ip(&shared.network, source.ip()).cloned();
    record.destination.workload = pod.workload(&snapshot).cloned();
    drop(snapshot);
    let request = Request { identity: None, source: source.ip(), target, inside: false };
    let outcome = carry(&shared, &live, &pod, tcp, request, &mut record).await;
    record.finish(&outcome);
}

async fn carry(
    shared: &Arc<Shared>,
    live: &Rc<Live>,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    request: Request,
    record: &mut ConnRecord,
) -> Outcome {
    // Boxed: what it takes to open a connection must not weigh on it while it is idle.
    let admitted = Box::pin(async {
        let permit = pod.connection(&pod.inbound)?;
        let admitted = admit(shared, live, pod, &request, record).await?;
        Ok((permit, admitted))
    });
    let (_permit, (server, registration, workload)) = match admitted.await {
        Ok(admitted) => admitted,
        Err(outcome) => {
            reset(tcp);
            return outcome;
        }
    };
    record.destination.workload = Some(workload);
    record.opened();
    let counts = record.counts.clone();
    if registration.facts().requests.get() {
        let connection = Connection::new(shared, pod, &registration, record);
        return Box::pin(requests::serve(connection, Box::new(tcp), server, &registration, &counts)).await;
    }
    let terms = Terms { counts: &counts, limits: shared.relay, budget: &pod.buffers };
    relay::tcp(tcp, server, terms, pin!(stopped(&pod.drained, &registration))).await
}
