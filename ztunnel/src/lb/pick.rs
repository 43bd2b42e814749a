//! The weighted draw, and what to say when there is nothing to draw from.
//!
//! [`pick`] maps 64 random bits to a row without bias that matters (multiply and shift over the sum of weights), and
//! [`shares`] lists the same rows with their weights, so an explanation cannot differ from traffic.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::lb::locality;
use crate::state::{Candidate, IpFamilies, IpFamily, Mode, PortTable, Service, Snapshot, Workload};

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// Which of its addresses.
    pub ip: IpAddr,
    /// Port of the application.
    pub port: u16,
}

/// Why there is no choice. The text is for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoChoice {
    /// The service is not balanced: dial the address that the client asked for.
    Passthrough,
    /// The service has no such port.
    NoPort {
        /// `<namespace>/<hostname>`.
        service: String,
        /// The port asked for.
        port: u16,
        /// Ports that it has.
        has: Vec<u16>,
    },
    /// No endpoint can be chosen.
    NoEndpoint {
        /// `<namespace>/<hostname>`.
        service: String,
        /// The port asked for.
        port: u16,
        /// Endpoints known.
        known: usize,
        /// Of those, healthy ones, or all if the service takes all.
        healthy: usize,
        /// Of those, the ones with the port, an allowed address, and a weight.
        candidates: usize,
        /// What narrows the choice.
        mode: Mode,
    },
}

impl fmt::Display for NoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passthrough => f.write_str("the service is not balanced; the connection goes where it was addressed"),
            Self::NoPort { service, port, has } => {
                let has = has.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
                write!(f, "service {service} has no port {port} (it has: {has}); correct the client or the Service")
            }
            Self::NoEndpoint { service, port, known, healthy, candidates, mode } => {
                write!(f, "service {service} has no endpoint for port {port}: ")?;
                match (*known, *healthy, *candidates, mode) {
                    (0, _, _, _) => f.write_str("no workload belongs to it; check its selector and that pods run"),
                    (known, 0, _, _) => write!(f, "none of its {known} workloads is ready; check the pods' readiness"),
                    (_, healthy, 0, _) => write!(
                        f,
                        "none of its {healthy} ready workloads has the port, an address of an allowed family and a \
                         weight above 0"
                    ),
                    (_, _, candidates, Mode::Strict) => write!(
                        f,
                        "none of its {candidates} ready workloads is where its traffic policy requires \
                         (internalTrafficPolicy: Local or the like); run one near the client"
                    ),
                    (_, _, candidates, _) => {
                        write!(f, "its {candidates} ready workloads are in networks that are not reachable from here")
                    }
                }
            }
        }
    }
}

/// Chooses an endpoint of `service` for a connection to its `port`. `random` is 64 uniform bits; `prefer` is the family
/// of the address that the client dialled.
pub fn pick(
    snapshot: &Snapshot,
    service: &Service,
    port: u16,
    client: &Workload,
    prefer: IpFamily,
    random: u64,
) -> Result<Choice, NoChoice> {
    let _ = snapshot; // Waypoints and gateways will be looked up in it.
    with_view(service, port, client, |table| {
        let total = table.total();
        // 0 ≤ drawn < total: the high half of a 128-bit product.
        let drawn = ((u128::from(random) * u128::from(total)) >> 64) as u64;
        let index = table.candidates.partition_point(|row| row.cumulative <= drawn);
        table.candidates.get(index).and_then(|row| choice(service, row, prefer))
    })?
    .ok_or_else(|| no_endpoint(service, port))
}

/// Every endpoint that [`pick`] may choose, with its share in percent.
pub fn shares(
    snapshot: &Snapshot,
    service: &Service,
    port: u16,
    client: &Workload,
    prefer: IpFamily,
) -> Result<Vec<(Choice, f64)>, NoChoice> {
    let _ = snapshot;
    let shares: Vec<_> = with_view(service, port, client, |table| {
        let percent = |index| table.weight(index) as f64 * 100.0 / table.total() as f64;
        let rows = table.candidates.iter().enumerate();
        rows.filter_map(|(index, row)| Some((choice(service, row, prefer)?, percent(index)))).collect()
    })?;
    if shares.is_empty() { Err(no_endpoint(service, port)) } else { Ok(shares) }
}

/// Calls `then` with the table that `client` draws from.
fn with_view<T>(
    service: &Service,
    port: u16,
    client: &Workload,
    then: impl FnOnce(&PortTable) -> T,
) -> Result<T, NoChoice> {
    if service.lb.mode == Mode::Passthrough {
        return Err(NoChoice::Passthrough);
    }
    let endpoints = &service.endpoints;
    let Some(table) = endpoints.ports.get(&port) else {
        let has = endpoints.ports.keys().copied().collect();
        return Err(NoChoice::NoPort { service: service.key(), port, has });
    };
    if locality::is_the_same_for_all(service, endpoints, client) {
        return Ok(then(table));
    }
    let place = locality::place(client);
    let (of, kept) = table.view.get_or_init(|| (place.clone(), locality::view(service, table, client)));
    if *of == place { Ok(then(kept)) } else { Ok(then(&locality::view(service, table, client))) }
}

fn choice(service: &Service, row: &Candidate, prefer: IpFamily) -> Option<Choice> {
    let workload = &service.endpoints.all.get(row.endpoint as usize)?.workload;
    let ip = address(workload, service.ip_families, prefer)?;
    Some(Choice { workload: workload.clone(), ip, port: row.target_port })
}

/// The first address of an allowed family, the preferred family first.
fn address(workload: &Workload, families: IpFamilies, prefer: IpFamily) -> Option<IpAddr> {
    let mut allowed = workload.addresses.iter().copied().filter(|ip| families.allow(*ip));
    let preferred = allowed.clone().find(|ip| IpFamily::of(*ip) == prefer);
    preferred.or_else(|| allowed.next())
}

fn no_endpoint(service: &Service, port: u16) -> NoChoice {
    let all = &service.endpoints.all;
    NoChoice::NoEndpoint {
        service: service.key(),
        port,
        known: all.len(),
        healthy: all.iter().filter(|endpoint| endpoint.admitted).count(),
        candidates: service.endpoints.ports.get(&port).map_or(0, |table| table.candidates.len()),
        mode: service.lb.mode,
    }
}
