//! A service's endpoints, prepared for the weighted choice: one table a port, with running sums of the weights.
//!
//! Built when a workload or the service changes, so that a choice is one binary search (O(log n)) and allocates nothing.
//! Only candidates are in a table: healthy ones unless the service takes all, with the port, an address of an allowed
//! family, and a weight above zero. What depends on the client (locality, its network) is a view of the table: clients of
//! one node are in one place, so each table keeps the view of the first place that asked, and others compute theirs.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crate::state::{HealthPolicy, Port, ServiceSpec, Workload};

/// A workload behind a service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Whether the service's health policy admits it.
    pub admitted: bool,
}

/// One row of a [`PortTable`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Index into [`Endpoints::all`].
    pub endpoint: u32,
    /// Port of the application.
    pub target_port: u16,
    /// Sum of the weights up to and including this row.
    pub cumulative: u64,
}

/// Candidates of one service port.
#[derive(Debug, Default)]
pub struct PortTable {
    /// In the order of their uids; the sums rise strictly.
    pub candidates: Vec<Candidate>,
    /// The view of the first place that asked: `lb` makes it, and says by the key which place that was.
    pub view: OnceLock<(String, Arc<Self>)>,
}

impl PortTable {
    /// A table of (endpoint, target port, weight); rows of weight 0 are left out.
    pub fn new(rows: impl Iterator<Item = (u32, u16, u32)>) -> Self {
        let mut candidates: Vec<Candidate> = Vec::new();
        let mut cumulative = 0u64;
        for (endpoint, target_port, weight) in rows.filter(|(_, _, weight)| *weight > 0) {
            cumulative += u64::from(weight);
            candidates.push(Candidate { endpoint, target_port, cumulative });
        }
        candidates.shrink_to_fit();
        Self { candidates, view: OnceLock::new() }
    }

    /// Sum of all weights.
    pub fn total(&self) -> u64 {
        self.candidates.last().map_or(0, |last| last.cumulative)
    }

    /// Weight of the row at `index`.
    pub fn weight(&self, index: usize) -> u64 {
        let before = index.checked_sub(1).and_then(|before| self.candidates.get(before));
        self.candidates.get(index).map_or(0, |row| row.cumulative) - before.map_or(0, |row| row.cumulative)
    }
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// Every endpoint, also those that are no candidates, in the order of their uids.
    pub all: Vec<Endpoint>,
    /// Candidates by service port.
    pub ports: BTreeMap<u16, PortTable>,
    /// All endpoints are in one network.
    pub one_network: bool,
}

impl Endpoints {
    /// Prepares `workloads`, which must be sorted by uid.
    pub(super) fn build(spec: &ServiceSpec, key: &str, workloads: Vec<Arc<Workload>>) -> Self {
        let all: Vec<Endpoint> = workloads
            .into_iter()
            .map(|workload| {
                let admitted = workload.healthy || spec.lb.health_policy == HealthPolicy::AllowAll;
                Endpoint { workload, admitted }
            })
            .collect();
        let ports = spec.ports.iter().map(|port| (port.service_port, table(spec, key, &all, port))).collect();
        let one_network = all.windows(2).all(|pair| pair[0].workload.network == pair[1].workload.network);
        Self { all, ports, one_network }
    }
}

fn table(spec: &ServiceSpec, key: &str, all: &[Endpoint], port: &Port) -> PortTable {
    let rows = all.iter().enumerate().filter_map(|(index, endpoint)| {
        let workload = &endpoint.workload;
        let reachable = workload.addresses.iter().any(|ip| spec.ip_families.allow(*ip));
        if !endpoint.admitted || !reachable {
            return None;
        }
        let target_port = target_port(workload, key, port)?;
        Some((u32::try_from(index).ok()?, target_port, workload.capacity))
    });
    PortTable::new(rows)
}

/// The endpoint's own mapping comes first, then the service's. `None`: the endpoint does not have the port.
fn target_port(workload: &Workload, key: &str, port: &Port) -> Option<u16> {
    let own = workload.services.get(key)?.iter().find(|own| own.service_port == port.service_port);
    match own {
        Some(own) if own.target_port != 0 => Some(own.target_port),
        _ if port.target_port != 0 => Some(port.target_port),
        _ => None,
    }
}
