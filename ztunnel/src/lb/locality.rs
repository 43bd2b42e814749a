//! How near an endpoint is to a client, by a service's routing preference; and the rows of a table that are near enough.
//!
//! The peer's rules: scopes are compared one by one and the first that differs ends the comparison, so a rank is the length
//! of the matching prefix. NETWORK as the first scope is preferred, not required. Scopes are not hierarchical.

use std::sync::Arc;

use crate::state::{Endpoints, LocalityScope, Mode, PortTable, Service, Workload};

/// Whether client and endpoint are in the same place in this scope. Two unknown places are the same place, as for the
/// peer: a cluster without zones behaves as one zone.
fn same(scope: LocalityScope, client: &Workload, endpoint: &Workload) -> bool {
    let (client, endpoint) = match scope {
        LocalityScope::Region => (&client.locality.region, &endpoint.locality.region),
        LocalityScope::Zone => (&client.locality.zone, &endpoint.locality.zone),
        LocalityScope::Subzone => (&client.locality.subzone, &endpoint.locality.subzone),
        LocalityScope::Node => (&client.node, &endpoint.node),
        LocalityScope::Cluster => (&client.cluster, &endpoint.cluster),
        LocalityScope::Network => (&client.network, &endpoint.network),
    };
    client == endpoint
}

/// How many scopes match, from the first.
pub(super) fn rank(preference: &[LocalityScope], client: &Workload, endpoint: &Workload) -> usize {
    let matching = |scopes: &[LocalityScope]| scopes.iter().take_while(|scope| same(**scope, client, endpoint)).count();
    match preference {
        // Any endpoint of the same network is nearer than any other, and among the others the rest still counts.
        [LocalityScope::Network, rest @ ..] => {
            let near = same(LocalityScope::Network, client, endpoint);
            matching(rest) + if near { preference.len() } else { 0 }
        }
        _ => matching(preference),
    }
}

/// The rows of `table` that a client may choose from.
pub(super) fn view(service: &Service, table: &PortTable, client: &Workload) -> Arc<PortTable> {
    let endpoints = &service.endpoints;
    let row = |index: usize| {
        let candidate = &table.candidates[index];
        let endpoint = &endpoints.all[candidate.endpoint as usize].workload;
        (candidate, endpoint)
    };
    let preference = &service.lb.routing_preference;
    // Another network is reached through its gateway only, which is not spoken yet.
    let near: Vec<(usize, usize)> = (0..table.candidates.len())
        .filter(|index| row(*index).1.network == client.network)
        .map(|index| (index, rank(preference, client, row(index).1)))
        .collect();
    let wanted = match service.lb.mode {
        Mode::All | Mode::Passthrough => None,
        Mode::Failover => near.iter().map(|(_, rank)| *rank).max(),
        Mode::Strict => Some(full_rank(preference)),
    };
    let rows = near.into_iter().filter(|(_, rank)| wanted.is_none_or(|wanted| wanted == *rank)).map(|(index, _)| {
        let weight = u32::try_from(table.weight(index)).unwrap_or(u32::MAX);
        (table.candidates[index].endpoint, table.candidates[index].target_port, weight)
    });
    Arc::new(PortTable::new(rows))
}

/// The rank of an endpoint that matches every scope.
fn full_rank(preference: &[LocalityScope]) -> usize {
    match preference {
        [LocalityScope::Network, rest @ ..] => rest.len() + preference.len(),
        _ => preference.len(),
    }
}

/// Whether every client sees the whole table.
pub(super) fn is_the_same_for_all(service: &Service, endpoints: &Endpoints, client: &Workload) -> bool {
    let narrows = matches!(service.lb.mode, Mode::Failover | Mode::Strict);
    let same_network = endpoints.all.first().is_none_or(|first| first.workload.network == client.network);
    !narrows && endpoints.one_network && same_network
}

/// Names the place of a client: everything that [`same`] compares.
pub(super) fn place(client: &Workload) -> String {
    let Workload { network, cluster, node, locality, .. } = client;
    // Names cannot hold NUL, so joined ones cannot be confused.
    [network, cluster, node, &locality.region, &locality.zone, &locality.subzone].map(|part| &**part).join("\0")
}
