//! The weighted draw, and what to say when there is nothing to draw from.
//!
//! [`pick`] maps 64 random bits to a row without bias that matters, and [`shares`] lists the same rows with their weights,
//! so an explanation cannot differ from traffic. A draw that meets an endpoint which failed lately is repeated; the
//! nearest endpoints are left for farther ones only when all of them fail. An endpoint that is ejected is never chosen, also
//! when there is no other. Where a traffic policy gives places shares, chance chooses the place first. What takes the place of the draw, where a policy or HTTP asks for it, is a [`Way`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::lb::{Bound, keys, locality, work};
use crate::state::{
    Candidate, IpFamilies, IpFamily, Layout, Mode, Nearness, PortTable, Record, Service, Snapshot, Workload,
};

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// Which of its addresses. The unspecified one: it is in another network, behind that network's gateway.
    pub ip: IpAddr,
    /// Port of the application.
    pub port: u16,
    /// There are endpoints besides that were not tried yet.
    pub others: bool,
}

impl Choice {
    /// Whether it is in another network.
    pub fn is_elsewhere(&self) -> bool {
        self.ip.is_unspecified()
    }
}

/// How an endpoint is chosen among the nearest that can be used.
#[derive(Clone, Copy, Default)]
pub enum Way<'a> {
    /// By weight and chance; where the service binds clients, the one that the client had.
    #[default]
    Usual,
    /// By weight and chance.
    Random,
    /// In turn; this is the number of the turn.
    Turn(u64),
    /// Two by weight and chance, and of them the second if it is better than the first; both by their first addresses.
    Better(&'a dyn Fn(SocketAddr, SocketAddr) -> bool),
    /// The one that a hash means in a table of this layout.
    Hash(u64, Layout),
}

/// What a choice depends on besides facts: chance, and experience.
#[derive(Clone, Copy)]
pub struct Chance<'a> {
    /// 64 uniform bits.
    pub random: u64,
    /// The client pod's uid, in the place of chance where a service binds its clients.
    pub pod: &'a str,
    /// Endpoints that were tried for this connection. They are not chosen again.
    pub tried: &'a [SocketAddr],
    /// Whether an endpoint failed lately. It is chosen only if there is no other.
    pub failing: &'a dyn Fn(SocketAddr) -> bool,
    /// Whether an endpoint, by its first address, is ejected. It is not chosen.
    pub ejected: &'a dyn Fn(SocketAddr) -> bool,
    /// Whether an endpoint, by its first address, is so new that it is passed over this time, unless there are only such.
    pub held_back: Option<&'a dyn Fn(SocketAddr) -> bool>,
    /// The uid of the endpoint that the client's session is with. It is chosen wherever it is, as long as it can be used.
    pub session: Option<&'a str>,
    /// How to choose.
    pub way: Way<'a>,
    /// The uid of the endpoint that the client got last for this port, asked only if the service binds clients.
    pub bound: &'a dyn Fn(&Service, u16) -> Option<Arc<str>>,
}

impl Chance<'_> {
    /// No experience.
    pub fn of(random: u64) -> Self {
        let bound = &|_: &Service, _| None;
        let (failing, ejected) = (&|_: SocketAddr| false, &|_: SocketAddr| false);
        Self { random, pod: "", tried: &[], failing, ejected, held_back: None, session: None, way: Way::Usual, bound }
    }
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
    /// Every endpoint that could be chosen is ejected.
    Ejected {
        /// `<namespace>/<hostname>`.
        service: String,
        /// How many are.
        count: usize,
    },
    /// There are endpoints, and none where a traffic policy sends clients of this place.
    NotPlaced {
        /// `<namespace>/<hostname>`.
        service: String,
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
            Self::Ejected { service, count } => write!(
                f,
                "every endpoint of service {service} that is left ({count}) is ejected by the outlierDetection of its \
                 DestinationRule; one request will try each again"
            ),
            Self::NotPlaced { service } => write!(
                f,
                "no endpoint of service {service} can be used that is where the localityLbSetting.distribute of its \
                 DestinationRule sends clients of this place; run one there, or name another place"
            ),
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

/// Chooses an endpoint of `service` for a connection to its `port` at `dialled`, one of its addresses: endpoints of that
/// family come first, and at an external address no policy about clients of the node holds.
pub fn pick(
    snapshot: &Snapshot,
    service: &Service,
    port: u16,
    client: &Workload,
    dialled: IpAddr,
    chance: &Chance<'_>,
) -> Result<Choice, NoChoice> {
    let binds = service.lb.affinity.is_some() && matches!(chance.way, Way::Usual);
    let bound = if binds { (chance.bound)(service, port) } else { None };
    let prefer = IpFamily::of(dialled);
    let nearness = nearness(snapshot, service, port, client);
    with_tiers(service, port, client, (dialled, nearness), |tiers, shares| {
        let known = tiers.iter().map(|tier| tier.candidates.len()).sum::<usize>();
        let random = if binds { Bound::first(chance.pod, &service.key(), port) } else { chance.random };
        let chance = Chance { random, ..*chance };
        let drawn = draw(service, (tiers, shares), (prefer, &client.network), &chance, bound.as_deref());
        let others = known > chance.tried.len() + 1;
        let row = drawn.and_then(|(index, tier)| tier.candidates.get(index));
        row.and_then(|row| choice(service, row, (prefer, &client.network), others)).ok_or_else(|| {
            // Only now does it matter whether there was one that could not be used.
            let all = tiers.iter().flat_map(|tier| first_addresses(service, tier));
            let count = all.filter(|first| (chance.ejected)(*first)).count();
            match count {
                0 => none(service, port, nearness),
                count => NoChoice::Ejected { service: service.key(), count },
            }
        })
    })?
}

/// The first address of every endpoint for `port`: what it is known by, whichever of its addresses is used.
pub fn addresses(service: &Service, port: u16) -> Vec<SocketAddr> {
    let tables = service.endpoints.ports.get(&port);
    tables.map(|tables| first_addresses(service, &tables.all).collect()).unwrap_or_default()
}

fn first_addresses(service: &Service, table: &PortTable) -> impl Iterator<Item = SocketAddr> {
    table.candidates.iter().filter_map(move |row| first_address(&service.endpoints.all, row))
}

fn first_address(all: &[Arc<Record>], row: &Candidate) -> Option<SocketAddr> {
    Some(SocketAddr::new(all.get(row.endpoint as usize)?.addresses().next()?, row.target_port))
}

/// Every endpoint that [`pick`] may choose while none fails, with its share in percent, and the nearer ones that it passes over
/// because they are `ejected`, with none. When all are, nothing is passed over: none would be chosen.
pub fn shares(
    snapshot: &Snapshot,
    service: &Service,
    port: u16,
    client: &Workload,
    dialled: IpAddr,
    ejected: &dyn Fn(SocketAddr) -> bool,
) -> Result<Vec<(Choice, f64)>, NoChoice> {
    let from = (IpFamily::of(dialled), &*client.network);
    let nearness = nearness(snapshot, service, port, client);
    let shares: Vec<_> = with_tiers(service, port, client, (dialled, nearness), |tiers, shares| {
        let known = tiers.iter().map(|tier| tier.candidates.len()).sum::<usize>();
        let out = |row: &Candidate| first_address(&service.endpoints.all, row).is_some_and(ejected);
        let all_out = tiers.iter().flat_map(|tier| &tier.candidates).all(out);
        let weight = |row: &Candidate| if !all_out && out(row) { 0.0 } else { f64::from(row.weight) };
        let totals: Vec<f64> = tiers.iter().map(|tier| tier.candidates.iter().map(weight).sum()).collect();
        let nearest = totals.iter().position(|total| *total > 0.0);
        let part = |tier: usize| match shares.get(tier) {
            _ if totals[tier] == 0.0 => 0.0,
            Some(share) => f64::from(*share),
            None => f64::from(u8::from(Some(tier) == nearest)),
        };
        let parts: f64 = (0..tiers.len()).map(part).sum();
        let shown = if shares.is_empty() { nearest.map_or(0, |nearest| nearest + 1) } else { tiers.len() };
        let rows = (0..shown).flat_map(|tier| tiers[tier].candidates.iter().map(move |row| (tier, row)));
        rows.filter_map(|(tier, row)| {
            // Where nothing is left, nothing is divided by nothing.
            let share = weight(row) * part(tier) / (totals[tier] * parts).max(f64::MIN_POSITIVE);
            Some((choice(service, row, from, known > 1)?, share * 100.0))
        })
        .collect()
    })?;
    if shares.is_empty() { Err(none(service, port, nearness)) } else { Ok(shares) }
}

/// What the traffic policy of a client says of places.
fn nearness<'a>(snapshot: &'a Snapshot, service: &Service, port: u16, client: &Workload) -> Option<&'a Arc<Nearness>> {
    snapshot.traffic_for(service, port, &client.namespace)?.1.nearness.as_ref()
}

/// Calls `then` with the tables that `client` draws from, and with their shares; without any they are used one after the
/// other.
fn with_tiers<T>(
    service: &Service,
    port: u16,
    client: &Workload,
    (dialled, nearness): (IpAddr, Option<&Arc<Nearness>>),
    then: impl FnOnce(&[PortTable], &[u32]) -> T,
) -> Result<T, NoChoice> {
    if service.lb.mode == Mode::Passthrough {
        return Err(NoChoice::Passthrough);
    }
    let endpoints = &service.endpoints;
    let Some(tables) = endpoints.ports.get(&port) else {
        let has = endpoints.ports.keys().copied().collect();
        return Err(NoChoice::NoPort { service: service.key(), port, has });
    };
    let table = tables.of(IpFamily::of(dialled));
    // internalTrafficPolicy is about the cluster address alone.
    let anywhere = service.lb.mode == Mode::Strict && service.is_external(dialled) && endpoints.one_network;
    if let Some(nearness) = nearness.filter(|_| !anywhere) {
        let placed = locality::placed(service, table, client, nearness);
        return Ok(then(&placed.tables, &placed.shares));
    }
    if anywhere || locality::is_the_same_for_all(service, endpoints, client) {
        return Ok(then(std::slice::from_ref(table), &[]));
    }
    let place = locality::place(client);
    let (of, kept) = &**table.tiers.get_or_init(|| Box::new((place.clone(), locality::tiers(service, table, client))));
    if *of == place { Ok(then(kept, &[])) } else { Ok(then(&locality::tiers(service, table, client), &[])) }
}

/// What `of` finds in the first table where it finds anything: in their order, or, with shares, in one that chance chooses,
/// then in the others by their shares. Which one chance chooses says nothing of the row.
fn first_of<'a, T>(
    tiers: &'a [PortTable],
    shares: &[u32],
    random: u64,
    mut of: impl FnMut(&'a PortTable) -> Option<T>,
) -> Option<T> {
    if shares.is_empty() {
        return tiers.iter().find_map(of);
    }
    let mut left: Vec<(&PortTable, u32)> = tiers.iter().zip(shares.iter().copied()).collect();
    let mut random = mix(!random);
    while !left.is_empty() {
        let total: u64 = left.iter().map(|(_, share)| u64::from(*share)).sum();
        let mut at = ((u128::from(random) * u128::from(total)) >> 64) as u64;
        let is_it = |(_, share): &(&PortTable, u32)| {
            let found = at < u64::from(*share);
            at = at.saturating_sub(u64::from(*share));
            found
        };
        let (table, _) = left.remove(left.iter().position(is_it)?);
        if let Some(found) = of(table) {
            return Some(found);
        }
        random = mix(random);
    }
    None
}

/// The row to use and the table it is in: the nearest that was not tried and does not fail; where all fail, the nearest
/// that was not tried. A bound client keeps its endpoint as long as that one would do for others too.
fn draw<'a>(
    service: &Service,
    (tiers, shares): (&'a [PortTable], &[u32]),
    from: (IpFamily, &str),
    chance: &Chance<'_>,
    bound: Option<&str>,
) -> Option<(usize, &'a PortTable)> {
    let all = &service.endpoints.all;
    let address = |row: &Candidate| {
        let ip = address(all.get(row.endpoint as usize)?, service.ip_families, from)?;
        Some(SocketAddr::new(ip, row.target_port))
    };
    // One without an address is behind a gateway, and not known by it.
    let is_in = |row: &Candidate| first_address(all, row).is_none_or(|first| !(chance.ejected)(first));
    let untried = |row: &Candidate| address(row).is_some_and(|address| !chance.tried.contains(&address)) && is_in(row);
    let well = |row: &Candidate| {
        let may = |address| !chance.tried.contains(&address) && !(chance.failing)(address);
        address(row).is_some_and(may) && is_in(row)
    };
    let index_of = |uid: &str| u32::try_from(all.binary_search_by(|endpoint| endpoint.cmp_uid_with(uid)).ok()?).ok();
    if let Some(endpoint) = chance.session.and_then(index_of) {
        let row_in = |tier: &'a PortTable| tier.row_of(endpoint).filter(|row| well(&tier.candidates[*row]));
        if let Some(found) = tiers.iter().find_map(|tier| Some((row_in(tier)?, tier))) {
            return Some(found);
        }
    }
    let bound = bound.and_then(index_of);
    let drawn = |tier: &PortTable, usable: &dyn Fn(&Candidate) -> bool| match chance.way {
        Way::Usual | Way::Random => draw_usable(tier, chance.random, usable),
        Way::Turn(turn) => next_usable(tier, turn, usable),
        Way::Better(is_better) => {
            let first = draw_usable(tier, chance.random, usable)?;
            // Another one, or the draw says nothing.
            let is_other = |row: &Candidate| *row != tier.candidates[first] && usable(row);
            let random = mix(chance.random);
            let second = match tier.candidates.len() {
                1 => None,
                2..DRAWS => draw_usable(tier, random, &is_other),
                _ => draw_usable(tier, random, usable),
            };
            let known_by = |row: usize| first_address(all, &tier.candidates[row]);
            let better = |second: &usize| match (known_by(first), known_by(*second)) {
                (Some(first), Some(second)) => is_better(first, second),
                (first, _) => first.is_none(),
            };
            Some(second.filter(better).unwrap_or(first))
        }
        Way::Hash(key, layout) => {
            let (row, looked) = keys::row(tier, all, layout, key, &|row| usable(&tier.candidates[row]));
            work::looked_at(looked);
            row
        }
    };
    let of_tier = |tier: &'a PortTable, usable: &dyn Fn(&Candidate) -> bool| {
        let kept = bound.and_then(|endpoint| tier.row_of(endpoint)).filter(|row| usable(&tier.candidates[*row]));
        let grown = || {
            let held_back = chance.held_back?;
            let is_grown = |row: &Candidate| usable(row) && first_address(all, row).is_none_or(|at| !held_back(at));
            drawn(tier, &is_grown)
        };
        Some((kept.or_else(grown).or_else(|| drawn(tier, usable))?, tier))
    };
    // The same hash is always in the same place.
    let random = if let Way::Hash(key, _) = chance.way { key } else { chance.random };
    let first = first_of(tiers, shares, random, |tier| of_tier(tier, &well));
    first.or_else(|| first_of(tiers, shares, random, |tier| of_tier(tier, &untried)))
}

/// Draws that are made before all rows are looked at. With half of the weight unusable, one in 65,000 needs that.
const DRAWS: usize = 16;

/// The usable row whose turn it is: each in its place where all weights are equal; otherwise turns are spread over the
/// weights as evenly as can be (golden ratio), so that a heavy row does not get its turns all at once.
fn next_usable(table: &PortTable, turn: u64, usable: &dyn Fn(&Candidate) -> bool) -> Option<usize> {
    let rows = table.candidates.len();
    let equal = table.total() == table.candidates.first().map_or(0, |row| u64::from(row.weight)) * rows as u64;
    let place = usize::try_from(turn % rows.max(1) as u64).unwrap_or(0);
    let first = if equal { place } else { table.draw(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15))? };
    (0..rows).map(|step| (first + step) % rows).find(|row| {
        work::looked_at(1);
        usable(&table.candidates[*row])
    })
}

/// A usable row, by weight. The work does not depend on the number of rows unless most of them are unusable, and what
/// makes one unusable is bounded (`failing`).
fn draw_usable(table: &PortTable, random: u64, usable: &dyn Fn(&Candidate) -> bool) -> Option<usize> {
    let mut random = random;
    for _ in 0..DRAWS {
        let row = table.draw(random)?;
        work::looked_at(1);
        if usable(&table.candidates[row]) {
            return Some(row);
        }
        random = mix(random);
    }
    work::looked_at(table.candidates.len());
    let rest = table.candidates.iter().enumerate().filter(|(_, row)| usable(row));
    let total: u64 = rest.clone().map(|(_, row)| u64::from(row.weight)).sum();
    let mut left = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    let mut rest = rest;
    rest.find(|(_, row)| {
        let found = left < u64::from(row.weight);
        left = left.saturating_sub(row.weight.into());
        found
    })
    .map(|(index, _)| index)
}

/// The next number of a sequence that looks random (a step of SplitMix64).
fn mix(random: u64) -> u64 {
    let mixed = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn choice(service: &Service, row: &Candidate, from: (IpFamily, &str), others: bool) -> Option<Choice> {
    let endpoint = service.endpoints.all.get(row.endpoint as usize)?;
    let ip = address(endpoint, service.ip_families, from)?;
    Some(Choice { workload: endpoint.workload().clone(), ip, port: row.target_port, others })
}

/// The first address of an allowed family, the preferred family first; nobody's, if it is in another network than the
/// client: what it is there says nothing here, so no attempt counts against it.
fn address(endpoint: &Record, families: IpFamilies, (prefer, network): (IpFamily, &str)) -> Option<IpAddr> {
    if *endpoint.place().network != *network {
        return endpoint.network_gateway().map(|_| IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    }
    let mut allowed = endpoint.addresses().filter(|ip| families.allow(*ip));
    let preferred = allowed.clone().find(|ip| IpFamily::of(*ip) == prefer);
    preferred.or_else(|| allowed.next())
}

/// No endpoint is left, or none is where a traffic policy wants it.
fn none(service: &Service, port: u16, nearness: Option<&Arc<Nearness>>) -> NoChoice {
    let none = no_endpoint(service, port);
    match (&none, nearness.map(|by| &**by)) {
        (NoChoice::NoEndpoint { service, candidates: 1.., mode, .. }, Some(Nearness::Shares(_)))
            if *mode != Mode::Strict =>
        {
            NoChoice::NotPlaced { service: service.clone() }
        }
        _ => none,
    }
}

fn no_endpoint(service: &Service, port: u16) -> NoChoice {
    let all = &service.endpoints.all;
    NoChoice::NoEndpoint {
        service: service.key(),
        port,
        known: all.len(),
        healthy: all.iter().filter(|endpoint| service.endpoints.admits(endpoint)).count(),
        candidates: service.candidates(port),
        mode: service.lb.mode,
    }
}
