//! Into a local pod: from a tunnel (15008) or as plaintext (15006), authorised before anything is dialled.
//!
//! Every connection is registered for re-checking before its first check, so a policy that arrives in between cannot
//! miss it. The answer 200 is sent only after the application took the connection. Where a policy speaks of requests, what can
//! be decided of the connection is decided then, and each request for itself (`requests`).

pub mod decide;
mod hbone;
mod plaintext;
mod proxy_header;
pub mod recheck;
mod requests;
mod target;

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tulle_certs::SpiffeId;

pub use hbone::serve as serve_tunnel;
pub use plaintext::serve as serve_plaintext;
pub use requests::explained as explained_request;

use crate::base::drain::Drained;
use crate::flow::{LocalPod, PATIENCE, Shared};
use crate::inbound::recheck::{Admitted, Live, Registration};
use crate::outcome::{Code, Outcome};
use crate::state::{Snapshot, Workload};
use crate::telemetry::ConnRecord;

/// What is known of a connection when it asks to be let in.
#[derive(Clone, Debug)]
struct Request {
    /// Identity proven in TLS.
    identity: Option<SpiffeId>,
    /// The client's address.
    source: IpAddr,
    /// The application's address.
    target: SocketAddr,
    /// The application is to be reached from inside the pod, at its loopback: it is told who the client is.
    inside: bool,
}

impl Request {
    /// Where to connect to.
    fn to(&self) -> SocketAddr {
        let loopback = match self.target {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        if self.inside { SocketAddr::new(loopback, self.target.port()) } else { self.target }
    }
}

/// Completes when the connection may not go on: a policy forbids it, or the pod's flows have to end.
async fn stopped(drained: &Drained, registration: &Registration) -> Outcome {
    tokio::select! {
        outcome = registration.cut() => outcome,
        () = drained.forced() => Outcome::new(Code::Drained, "the proxy or the pod went away"),
    }
}

/// Registers, authorises, dials. The registration ends with the connection.
async fn admit(
    shared: &Shared,
    live: &Rc<Live>,
    pod: &Arc<LocalPod>,
    request: &Request,
    record: &mut ConnRecord,
) -> Result<(TcpStream, Registration, Arc<Workload>), Outcome> {
    let (identity, source, target) = (request.identity.clone(), request.source, request.target);
    let isolated = pod.workload(&shared.reader.load()).is_none_or(|workload| !workload.network_policies.is_empty());
    // Only a NetworkPolicy asks which workload the client is; others go by its identity.
    let lease = if isolated { shared.ask(pod, source)? } else { None };
    let asked = lease.clone();
    let requests = Cell::new(false);
    let admitted = Admitted { pod: pod.clone(), identity, source, target, requests, lease };
    let registration = live.register(admitted);
    shared.answered(pod, asked.as_ref(), source).await?;
    let (_, workload) = shared.known(pod).await?;
    let decide = |snapshot: &Snapshot, workload: &Workload| {
        let requests = decide::requests_are_read(snapshot, workload, request.target.port());
        registration.facts().requests.set(requests);
        let decide = if requests { decide::decide_connection } else { decide::decide };
        decide(snapshot, workload, request.identity.as_ref(), request.source, request.target)
    };
    // Wait for policies that are on their way; anything else is decided at once.
    let decided = shared.wait_for(|snapshot| {
        let workload = pod.workload(snapshot).unwrap_or(&workload);
        match decide(snapshot, workload) {
            Err(outcome) if outcome.code == Code::PolicyPending => None,
            other => Some(other),
        }
    });
    match decided.await {
        Some(result) => record.dry_run = result?.dry_run,
        None => {
            // Still pending: say which policy is missing.
            let snapshot = shared.reader.load();
            record.dry_run = decide(&snapshot, &workload)?.dry_run;
        }
    }
    let to = request.to();
    let dial = async {
        match request.inside {
            true => pod.sockets.connect(to).await,
            false => pod.sockets.connect_from(request.source, to).await,
        }
    };
    let dialled = tokio::select! {
        biased;
        outcome = stopped(&pod.drained, &registration) => return Err(outcome),
        dialled = timeout(shared.hbone.connect_timeout.min(PATIENCE * 2), dial) => dialled,
    };
    match dialled {
        Ok(Ok(tcp)) => Ok((tcp, registration, workload)),
        Ok(Err(error)) => Err(Outcome::new(Code::ConnectFailed, format!("application at {to}: {error}"))),
        Err(_) => Err(Outcome::new(Code::ConnectTimeout, format!("the application at {to} did not answer"))),
    }
}
