//! The egress gateway: takes tunnels of the mesh's pods and leads them out of the cluster, to hosts that are asked for by
//! name, from an address that stays the same.
//!
//! A stream goes *tunnel → who is it → decide → resolve → dial → relay (or requests)*. The peer is the pod whose address
//! the tunnel comes from, and that is believed only if the pod's account is the identity that the tunnel proved. Then the
//! pod's own egress policies decide again, as on its node, and only rules that name this gateway count; so a node that
//! asks for what it may not ask gets nothing. The name is resolved here, whatever anybody was told elsewhere. Limits: a
//! gateway has no policies of its own, keeps no state besides connections, and reaches nothing inside the cluster.

pub mod clients;
pub mod decide;
pub mod limits;
pub mod originate;
mod outside;
pub mod recheck;
mod requests;
mod stream;

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;
use tulle_certs::SpiffeId;

use crate::base::sockets::reset;
use crate::base::{canonical, workers};
use crate::dns::own::OwnResolver;
use crate::flow::proof::Proofs;
use crate::flow::tunnel;
use crate::flow::{LocalPod, Shared};
use crate::gateway::limits::Hosts;
use crate::gateway::originate::Originator;
use crate::gateway::recheck::Live;
use crate::state::ServiceName;

/// A gateway, shared by its workers.
pub struct Gateway {
    /// Snapshot, certificates, counters.
    pub shared: Shared,
    /// Its sockets, budgets and end. The gateway's own pod is nobody's to capture, so nothing else of it is used.
    pub pod: Arc<LocalPod>,
    /// Who it proves to be.
    pub identity: SpiffeId,
    /// The Service that stands for it.
    pub service: Arc<ServiceName>,
    /// Addresses that it leaves by, at most one of a family. None: as the system chooses.
    pub from: Vec<IpAddr>,
    /// Looks names up.
    pub names: OwnResolver,
    /// What each host is asked at a time.
    pub hosts: Hosts,
    /// Adds TLS.
    pub tls: Originator,
    /// What hosts have proven.
    pub proofs: Proofs,
}

/// Serves one tunnel to its end.
pub async fn serve(gateway: Arc<Gateway>, live: Rc<Live>, tcp: TcpStream) {
    let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else { return reset(tcp) };
    let ends = (canonical(peer), canonical(local));
    let cert = gateway.shared.certificate_of(&gateway.identity);
    let result = tunnel::serve(&gateway.shared, &gateway.pod, tcp, ends, cert, |proven, (request, respond)| {
        let stream = stream::Stream { gateway: gateway.clone(), live: live.clone(), proven: proven.clone() };
        let request = Box::new(request);
        workers::spawn(async move { stream.serve(request, respond).await });
    });
    if let Err(outcome) = result.await {
        tunnel::failed(&gateway.shared, &gateway.pod, ends, &outcome);
    }
}
