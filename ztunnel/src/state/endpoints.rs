//! A service's endpoints, prepared for the weighted choice: one table a port.
//!
//! Built when a workload or the service changes, so that a choice costs the same with three endpoints and with ten
//! thousand: one step where all weights are equal, two in an alias table where they differ, and it allocates nothing.
//! Only candidates are in a table: healthy ones unless the service takes all, with the port, an address of an allowed
//! family or a gateway, and a weight above zero. A client of one family gets the endpoints that have an address of it, as it would from
//! the cluster's own balancing; only if none has one, the others. What depends on the client's place (locality, its
//! network) is a list of nearer and farther tables: clients of one node are in one place, so each table keeps the list of
//! the first place that asked, and others compute theirs.

use std::sync::{Arc, Mutex, OnceLock};

use crate::state::{HealthPolicy, IpFamily, Layout, Nearness, Port, Record, ServiceSpec};

/// One row of a [`PortTable`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Index into [`Endpoints::all`].
    pub endpoint: u32,
    /// Port of the application.
    pub target_port: u16,
    /// Share of the draws, relative to the other rows; not 0.
    pub weight: u32,
}

/// One column of an alias table: a draw that lands here stays here for `keep` of 2⁶⁴ draws, else goes to `alias`.
#[derive(Clone, Copy, Debug)]
struct Column {
    keep: u64,
    alias: u32,
}

/// A place, and tables by nearness to it.
pub type Tiers = (String, Arc<[PortTable]>);

/// Tables for the clients of one place under a traffic policy that speaks of places.
#[derive(Debug)]
pub struct Placed {
    /// The place.
    pub place: String,
    /// What the policy says.
    pub by: Arc<Nearness>,
    /// The rows by place, nearest first, or in the order of `shares`.
    pub tables: Box<[PortTable]>,
    /// The weight of each table. None: they are used one after the other.
    pub shares: Box<[u32]>,
}

/// Which row of a [`PortTable`] a hash means.
#[derive(Debug)]
pub enum KeyTable {
    /// Points of the rows on a ring of hashes, in order, each with its row.
    Ring(Box<[(u64, u32)]>),
    /// The row of each remainder.
    Maglev(Box<[u32]>),
}

/// Tables of hashes by how they are laid out.
pub type KeyTables = Mutex<Vec<(Layout, Arc<KeyTable>)>>;

/// Candidates to draw from.
#[derive(Debug, Default)]
pub struct PortTable {
    /// In the order of their uids.
    pub candidates: Vec<Candidate>,
    total: u64,
    /// None: all weights are equal.
    columns: Option<Box<[Column]>>,
    /// The rows by nearness to the first place that asked, nearest first: `lb` makes it, and says by the key which place
    /// that was.
    pub tiers: OnceLock<Box<Tiers>>,
    /// The same under traffic policies, for the first few places and policies that asked.
    pub placed: OnceLock<Box<Mutex<Vec<Arc<Placed>>>>>,
    /// What hashes mean: `lb` makes it for the first choice by hash.
    pub keys: OnceLock<Box<KeyTables>>,
}

impl PortTable {
    /// A table of (endpoint, target port, weight); rows of weight 0 are left out.
    pub fn new(rows: impl Iterator<Item = (u32, u16, u32)>) -> Self {
        let mut candidates: Vec<Candidate> = rows
            .filter(|(_, _, weight)| *weight > 0)
            .map(|(endpoint, target_port, weight)| Candidate { endpoint, target_port, weight })
            .collect();
        candidates.shrink_to_fit();
        let total = candidates.iter().map(|row| u64::from(row.weight)).sum();
        let columns =
            (!candidates.windows(2).all(|pair| pair[0].weight == pair[1].weight)).then(|| columns(&candidates, total));
        Self { candidates, total, columns, tiers: OnceLock::new(), placed: OnceLock::new(), keys: OnceLock::new() }
    }

    /// Sum of all weights.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The row that 64 uniform bits mean, by weight. `None`: there are no rows.
    pub fn draw(&self, random: u64) -> Option<usize> {
        // The high half of the product is uniform over the rows, the low half over the inside of one row.
        let product = u128::from(random) * self.candidates.len() as u128;
        let (row, inside) = ((product >> 64) as usize, product as u64);
        match &self.columns {
            None => (row < self.candidates.len()).then_some(row),
            Some(columns) => {
                columns.get(row).map(|column| if inside <= column.keep { row } else { column.alias as usize })
            }
        }
    }

    /// The row of an endpoint, by its index in [`Endpoints::all`].
    pub fn row_of(&self, endpoint: u32) -> Option<usize> {
        self.candidates.binary_search_by_key(&endpoint, |row| row.endpoint).ok()
    }
}

/// Vose's method: every column is filled to the average by at most one other row. Whole numbers, so that no rounding can
/// give a row more than its share by more than 2⁻⁶⁴.
fn columns(candidates: &[Candidate], total: u64) -> Box<[Column]> {
    let average = u128::from(total);
    // A row's weight in units in which the average is `total`.
    let mut left: Vec<u128> = candidates.iter().map(|row| u128::from(row.weight) * candidates.len() as u128).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..left.len()).partition(|row| left[*row] < average);
    let mut columns: Vec<Column> =
        (0..left.len()).map(|row| Column { keep: u64::MAX, alias: u32::try_from(row).unwrap_or(0) }).collect();
    while let (Some(poor), Some(rich)) = (small.pop(), large.last().copied()) {
        columns[poor] = Column { keep: scale(left[poor], average), alias: u32::try_from(rich).unwrap_or(0) };
        left[rich] -= average - left[poor];
        if left[rich] < average {
            large.pop();
            small.push(rich);
        }
    }
    columns.into()
}

/// `part` of `whole` as a fraction of 2⁶⁴; `part` is the smaller, and `whole` below 2⁶⁴.
fn scale(part: u128, whole: u128) -> u64 {
    u64::try_from((part << 64) / whole.max(1)).unwrap_or(u64::MAX)
}

/// The tables of one service port.
#[derive(Debug, Default)]
pub struct PortTables {
    /// Every candidate.
    pub all: PortTable,
    /// Those with an IPv4 address, if there are others too.
    v4: Option<Box<PortTable>>,
    /// Those with an IPv6 address, if there are others too.
    v6: Option<Box<PortTable>>,
}

impl PortTables {
    /// What a client that dialled an address of `family` draws from.
    pub fn of(&self, family: IpFamily) -> &PortTable {
        let own = match family {
            IpFamily::V4 => &self.v4,
            IpFamily::V6 => &self.v6,
        };
        own.as_deref().unwrap_or(&self.all)
    }
}

/// Tables by service port. A sorted list and not a map: there are one or two, in each of thousands of Services.
#[derive(Debug, Default)]
pub struct Ports(Box<[(u16, PortTables)]>);

impl Ports {
    /// The tables of a port. `None`: the service does not have it.
    pub fn get(&self, port: &u16) -> Option<&PortTables> {
        let index = self.0.binary_search_by_key(port, |(own, _)| *own).ok()?;
        self.0.get(index).map(|(_, tables)| tables)
    }

    /// The ports, in order.
    pub fn keys(&self) -> impl Iterator<Item = &u16> {
        self.0.iter().map(|(port, _)| port)
    }

    /// The ports with their tables, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&u16, &PortTables)> {
        self.0.iter().map(|(port, tables)| (port, tables))
    }
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// Every endpoint, also those that are no candidates, in the order of their uids.
    pub all: Box<[Arc<Record>]>,
    /// Candidates by service port.
    pub ports: Ports,
    /// All endpoints are in one network.
    pub one_network: bool,
    /// Some say for whom they are.
    pub hinted: bool,
    takes_all: bool,
}

impl Endpoints {
    /// Prepares `all`, which must be sorted by uid.
    pub(super) fn build(spec: &ServiceSpec, key: &str, all: Vec<Arc<Record>>) -> Self {
        let takes_all = spec.lb.health_policy == HealthPolicy::AllowAll;
        let mut ports: Vec<(u16, PortTables)> =
            spec.ports.iter().map(|port| (port.service_port, tables(spec, key, &all, port, takes_all))).collect();
        // Of equal ones the last counts, as in a map.
        ports.reverse();
        ports.sort_by_key(|(port, _)| *port);
        ports.dedup_by_key(|(port, _)| *port);
        let one_network = all.windows(2).all(|pair| pair[0].place().network == pair[1].place().network);
        let hinted = all.iter().any(|endpoint| endpoint.hints_for(key).is_some());
        Self { all: all.into(), ports: Ports(ports.into()), one_network, hinted, takes_all }
    }

    /// Whether the service's health policy admits an endpoint.
    pub fn admits(&self, endpoint: &Record) -> bool {
        self.takes_all || endpoint.healthy()
    }
}

fn tables(spec: &ServiceSpec, key: &str, all: &[Arc<Record>], port: &Port, takes_all: bool) -> PortTables {
    // Row, and whether it has an address of each family.
    let rows: Vec<((u32, u16, u32), [bool; 2])> = all
        .iter()
        .enumerate()
        .filter_map(|(index, endpoint)| {
            let has = |family| endpoint.addresses().any(|ip| IpFamily::of(ip) == family && spec.ip_families.allow(ip));
            // Through a gateway it is reached whatever the client dialled.
            let behind = endpoint.addresses().next().is_none() && endpoint.network_gateway().is_some();
            let families = [behind || has(IpFamily::V4), behind || has(IpFamily::V6)];
            if !(takes_all || endpoint.healthy()) || families == [false; 2] {
                return None;
            }
            let target_port = target_port(endpoint, key, port)?;
            Some(((u32::try_from(index).ok()?, target_port, endpoint.capacity()), families))
        })
        .filter(|((_, _, weight), _)| *weight > 0)
        .collect();
    let narrowed = |family: usize| {
        let with = rows.iter().filter(|(_, families)| families[family]).count();
        let own = rows.iter().filter(|(_, families)| families[family]).map(|(row, _)| *row);
        (with > 0 && with < rows.len()).then(|| Box::new(PortTable::new(own)))
    };
    PortTables { all: PortTable::new(rows.iter().map(|(row, _)| *row)), v4: narrowed(0), v6: narrowed(1) }
}

/// The endpoint's own mapping comes first, then the service's. `None`: the endpoint does not have the port.
fn target_port(endpoint: &Record, key: &str, port: &Port) -> Option<u16> {
    let own = endpoint.services().get(key)?.iter().find(|own| own.service_port == port.service_port);
    match own {
        Some(own) if own.target_port != 0 => Some(own.target_port),
        _ if port.target_port != 0 => Some(port.target_port),
        _ => None,
    }
}
