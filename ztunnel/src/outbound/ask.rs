//! Asking control for what a decision looks up besides the address that the client dialled, where not everything is known
//! (`XDS_ON_DEMAND`): the waypoint in front of a destination, the gateways to other networks that its endpoints are in, the
//! backends of a route and who their requests are copied to.
//!
//! What is asked for here is waited for within the time of one address, and decided on the newest snapshot afterwards. Each
//! name stays subscribed as long as a connection that depends on it holds its lease. Limits: a waypoint that changes while
//! it is waited for is not asked for again; the connection ends with `NO_WAYPOINT`, and the next one finds it. So is the
//! gateway to a waypoint's own network.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;

use crate::flow::{LocalPod, PATIENCE, Shared};
use crate::outcome::Outcome;
use crate::state::{GatewayAddress, GatewayTarget, Lease, Service, ServiceName, Snapshot, Workload, address_name};

/// Most gateways that are asked for before one connection: a mesh has one for each of its networks.
const GATEWAYS: usize = 16;

/// What to decide on once everything was answered.
pub(super) struct Known {
    /// The newest.
    pub(super) snapshot: Arc<Snapshot>,
    /// The pod, in it.
    pub(super) source: Arc<Workload>,
    /// What keeps it known.
    pub(super) leases: Vec<Lease>,
}

/// The waypoint of what the client dialled, which itself was asked for (`leases`).
///
/// # Errors
/// `OverBudget`, or `UnknownWorkload` if control says nothing.
pub(super) async fn destination(
    shared: &Shared,
    pod: &LocalPod,
    destination: SocketAddr,
    mut leases: Vec<Lease>,
) -> Result<Known, Outcome> {
    let (snapshot, source) = shared.known(pod).await?;
    if !shared.reader.demands().enabled() {
        return Ok(Known { snapshot, source, leases });
    }
    let names = match snapshot.service_at(&shared.network, destination, &source.namespace) {
        Some(service) => behind(service, &source.network),
        None => {
            let workload = snapshot.workload_by_ip(&shared.network, destination.ip());
            Vec::from_iter(workload.and_then(|workload| workload.waypoint.as_deref()).map(name))
        }
    };
    if names.is_empty() {
        return Ok(Known { snapshot, source, leases });
    }
    wait(shared, pod, &names, Instant::now() + PATIENCE, &mut leases).await?;
    let (snapshot, source) = shared.known(pod).await?;
    Ok(Known { snapshot, source, leases })
}

/// A Service that a route names, and its waypoint. `None`: there was nothing to ask.
///
/// # Errors
/// `OverBudget`, or `UnknownWorkload` if control says nothing.
pub(super) async fn service(shared: &Shared, pod: &LocalPod, of: &ServiceName) -> Result<Option<Known>, Outcome> {
    if !shared.reader.demands().enabled() {
        return Ok(None);
    }
    let (deadline, mut leases) = (Instant::now() + PATIENCE, Vec::new());
    wait(shared, pod, &[format!("{}/{}", of.namespace, of.hostname)], deadline, &mut leases).await?;
    let snapshot = shared.reader.load();
    let waypoints = snapshot.service(&of.namespace, &of.hostname).map(|service| behind(service, &shared.network));
    wait(shared, pod, &waypoints.unwrap_or_default(), deadline, &mut leases).await?;
    let (snapshot, source) = shared.known(pod).await?;
    Ok(Some(Known { snapshot, source, leases }))
}

/// The waypoints of `service`, and the gateways to its endpoints in other networks than `network`.
fn behind(service: &Service, network: &str) -> Vec<String> {
    let mut names: Vec<String> = service.waypoints().map(name).collect();
    if !names.is_empty() {
        return names;
    }
    let elsewhere = service.endpoints.all.iter().filter(|endpoint| *endpoint.place().network != *network);
    for gateway in elsewhere.filter_map(|endpoint| endpoint.network_gateway()) {
        let name = name(gateway);
        if names.len() < GATEWAYS && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// As control finds it.
fn name(gateway: &GatewayAddress) -> String {
    match &gateway.target {
        GatewayTarget::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
        GatewayTarget::Address { network, ip } => address_name(network, *ip),
    }
}

async fn wait(
    shared: &Shared,
    pod: &LocalPod,
    names: &[String],
    deadline: Instant,
    leases: &mut Vec<Lease>,
) -> Result<(), Outcome> {
    // All are asked for before the first is waited for.
    let begin = leases.len();
    for name in names {
        leases.extend(shared.ask_for(pod, name)?);
    }
    for lease in &leases[begin..] {
        shared.answered_for(Some(lease), deadline, || false).await?;
    }
    Ok(())
}
