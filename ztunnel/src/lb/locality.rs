//! How near an endpoint is to a client, by a service's routing preference; and the rows of a table by nearness.
//!
//! The peer's rules: scopes are compared one by one and the first that differs ends the comparison, so a rank is the length
//! of the matching prefix. NETWORK as the first scope is preferred, not required. Scopes are not hierarchical. Where a
//! service has no preference, hints of its endpoints may narrow the choice as they do in kube-proxy. A traffic policy that
//! speaks of places (`localityLbSetting`) takes the place of all of these; what a service requires holds all the same.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use crate::state::{
    EndpointHints, Endpoints, LocalityScope, Mode, Nearness, Placed, PortTable, Record, Region, Service, Workload,
};

/// Whether client and endpoint are in the same place in this scope. Two unknown places are the same place, as for the
/// peer: a cluster without zones behaves as one zone.
fn same(scope: LocalityScope, client: &Workload, endpoint: &Record) -> bool {
    let endpoint = endpoint.place();
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
pub(super) fn rank(preference: &[LocalityScope], client: &Workload, endpoint: &Record) -> usize {
    match preference {
        // Any endpoint of the same network is nearer than any other, and among the others the rest still counts.
        [LocalityScope::Network, rest @ ..] => {
            let near = same(LocalityScope::Network, client, endpoint);
            matching(rest, client, endpoint) + if near { preference.len() } else { 0 }
        }
        _ => matching(preference, client, endpoint),
    }
}

fn matching(scopes: &[LocalityScope], client: &Workload, endpoint: &Record) -> usize {
    scopes.iter().take_while(|scope| same(**scope, client, endpoint)).count()
}

/// The rows of `table` that a client may choose from, nearest first; several tables only where what is near may be left
/// for what is farther.
pub(super) fn tiers(service: &Service, table: &PortTable, client: &Workload) -> Arc<[PortTable]> {
    let preference = &service.lb.routing_preference;
    let hints = Hinted::new(service, table, client);
    let groups = grouped(service, table, client, |endpoint| {
        Some(Reverse(match service.lb.mode {
            Mode::All | Mode::Passthrough => hints.rank(service, client, endpoint),
            Mode::Failover => rank(preference, client, endpoint),
            Mode::Strict => 0,
        }))
    });
    groups.into_values().collect()
}

/// The rows of `table` that a client can reach and may choose from, in groups. `None`: the endpoint is in none.
fn grouped<K: Ord>(
    service: &Service,
    table: &PortTable,
    client: &Workload,
    group: impl Fn(&Record) -> Option<K>,
) -> BTreeMap<K, PortTable> {
    let preference = &service.lb.routing_preference;
    let mut groups: BTreeMap<K, Vec<(u32, u16, u32)>> = BTreeMap::new();
    for row in &table.candidates {
        let Some(endpoint) = service.endpoints.all.get(row.endpoint as usize) else { continue };
        // Another network is reached through its gateway only.
        if endpoint.place().network != client.network && endpoint.network_gateway().is_none() {
            continue;
        }
        if service.lb.mode == Mode::Strict && rank(preference, client, endpoint) != full_rank(preference) {
            continue;
        }
        if let Some(key) = group(endpoint) {
            groups.entry(key).or_default().push((row.endpoint, row.target_port, row.weight));
        }
    }
    groups.into_iter().map(|(key, rows)| (key, PortTable::new(rows.into_iter()))).collect()
}

/// Places and policies that are kept for a table; a node is one place, and each namespace of its pods may have a policy of its own
/// for a Service. Each takes some 24 bytes for an endpoint.
const KEPT: usize = 32;

/// The rows of `table` by what a traffic policy says of places, in the place of what the service prefers. What the service
/// requires still holds.
pub(super) fn placed(service: &Service, table: &PortTable, client: &Workload, by: &Arc<Nearness>) -> Arc<Placed> {
    let place = place(client);
    let kept = table.placed.get_or_init(Box::default);
    let kept = || kept.lock().unwrap_or_else(PoisonError::into_inner);
    {
        let mut kept = kept();
        if let Some(at) = kept.iter().position(|one| one.by == *by && one.place == place) {
            kept[at..].rotate_left(1);
            return kept[kept.len() - 1].clone();
        }
    }
    let (tables, shares) = match &**by {
        Nearness::Order { scopes, failover } => (in_order(service, table, client, scopes, failover), Box::default()),
        Nearness::Shares(all) => match all.iter().find(|one| one.from.holds(&client.locality)) {
            None => (grouped(service, table, client, |_| Some(())).into_values().collect(), Box::default()),
            Some(one) => by_shares(service, table, client, &one.to),
        },
    };
    let new = Arc::new(Placed { place, by: by.clone(), tables, shares });
    let mut kept = kept();
    if kept.len() >= KEPT {
        // The one that was not used for longest: its policy may be gone.
        kept.remove(0);
    }
    kept.push(new.clone());
    new
}

fn in_order(
    service: &Service,
    table: &PortTable,
    client: &Workload,
    scopes: &[LocalityScope],
    failover: &[(Arc<str>, Arc<str>)],
) -> Box<[PortTable]> {
    let next = failover.iter().find(|(from, _)| *from == client.locality.region).map(|(_, to)| to);
    let groups = grouped(service, table, client, |endpoint| {
        let near = matching(scopes, client, endpoint);
        // Of those that have nothing in common with the client, the region that is named comes first.
        let named = near > 0 || next.is_none_or(|next| *next == endpoint.place().locality.region);
        Some(Reverse((near, named)))
    });
    groups.into_values().collect()
}

fn by_shares(
    service: &Service,
    table: &PortTable,
    client: &Workload,
    to: &[(Region, u32)],
) -> (Box<[PortTable]>, Box<[u32]>) {
    let groups = grouped(service, table, client, |endpoint| {
        to.iter().position(|(place, _)| place.holds(&endpoint.place().locality))
    });
    let shares = groups.keys().filter_map(|index| Some(to.get(*index)?.1)).collect();
    (groups.into_values().collect(), shares)
}

/// Which hints count for a client: those that all rows have, and of which some name its place. Nodes come before zones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hinted {
    No,
    Zones,
    Nodes,
}

impl Hinted {
    fn new(service: &Service, table: &PortTable, client: &Workload) -> Self {
        if !service.endpoints.hinted {
            return Self::No;
        }
        let key = service.key();
        let all = &service.endpoints.all;
        let rows = || table.candidates.iter().filter_map(|row| all.get(row.endpoint as usize));
        let hints = || rows().map(|endpoint| endpoint.hints_for(&key));
        let counts = |of: Of, place: &Arc<str>| {
            hints().all(|hints| hints.is_some_and(|hints| !of(hints).is_empty()))
                && hints().flatten().any(|hints| of(hints).contains(place))
        };
        if counts(|hints| &hints.nodes, &client.node) {
            Self::Nodes
        } else if counts(|hints| &hints.zones, &client.locality.zone) {
            Self::Zones
        } else {
            Self::No
        }
    }

    /// 1: meant for this client.
    fn rank(self, service: &Service, client: &Workload, endpoint: &Record) -> usize {
        let hints = if self == Self::No { None } else { endpoint.hints_for(&service.key()) };
        let meant = hints.is_some_and(|hints| match self {
            Self::No => false,
            Self::Zones => hints.zones.contains(&client.locality.zone),
            Self::Nodes => hints.nodes.contains(&client.node),
        });
        meant.into()
    }
}

/// One kind of hints.
type Of = fn(&EndpointHints) -> &[Arc<str>];

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
    let same_network = endpoints.all.first().is_none_or(|first| first.place().network == client.network);
    !narrows && !endpoints.hinted && endpoints.one_network && same_network
}

/// Names the place of a client: everything that [`same`] compares.
pub(super) fn place(client: &Workload) -> String {
    let Workload { network, cluster, node, locality, .. } = client;
    // Names cannot hold NUL, so joined ones cannot be confused.
    [network, cluster, node, &locality.region, &locality.zone, &locality.subzone].map(|part| &**part).join("\0")
}
