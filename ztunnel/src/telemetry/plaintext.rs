//! Who still talks to the node's pods without an identity: what `tulle check --strict` asks before plaintext is refused.
//!
//! Kinds of connections are kept (from whom, to which pod's port) and not connections, in at most [`MOST`] places, and for a
//! day after the last one ended. A client that is no workload of the mesh is known by its address, so a node port that the
//! Internet uses could fill the list: of each port at most [`STRANGERS`] such addresses are told apart, and what finds no
//! place is counted. Time is an argument. Probes of the kubelet on declared ports never pass the proxy, so they are not here.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::state::Workload;

/// Kinds of connections that are told apart on a node: some 300 bytes each.
const MOST: usize = 2048;
/// Addresses outside of the mesh that are told apart at one port.
const STRANGERS: usize = 64;
/// Seconds that a kind is kept after its last connection.
const KEPT: i64 = 24 * 3600;

/// A kind of connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Namespace of the pod that was dialled.
    pub namespace: Arc<str>,
    /// Its workload: the Deployment, or the pod where there is none.
    pub workload: Arc<str>,
    /// The application's port.
    pub port: u16,
    /// Who dialled.
    pub client: Client,
}

/// The client's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// A workload that control told of.
    Workload {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name, as of the pod dialled.
        name: Arc<str>,
        /// Its account.
        account: Arc<str>,
    },
    /// None that is known.
    Address(IpAddr),
}

/// What there was of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that began.
    pub connections: u64,
    /// Those of them that a policy refused or ended.
    pub refused: u64,
    /// Those that are open.
    pub open: u64,
    /// When the last one began or ended, Unix seconds.
    pub last: i64,
}

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Callers(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    seen: HashMap<Kind, Seen>,
    untold: u64,
}

impl Inner {
    fn forget(&mut self, now: i64) {
        self.seen.retain(|_, seen| seen.open > 0 || seen.last.saturating_add(KEPT) > now);
    }

    fn has_place(&mut self, kind: &Kind, now: i64) -> bool {
        if self.seen.contains_key(kind) {
            return true;
        }
        if self.seen.len() >= MOST {
            self.forget(now);
        }
        let is_stranger = |client: &Client| matches!(client, Client::Address(_));
        let beside = |other: &&Kind| {
            let same = other.port == kind.port && other.workload == kind.workload && other.namespace == kind.namespace;
            same && is_stranger(&other.client)
        };
        self.seen.len() < MOST && (!is_stranger(&kind.client) || self.seen.keys().filter(beside).count() < STRANGERS)
    }
}

impl Kind {
    /// Of a connection to a port of a workload.
    pub fn of(to: &Workload, port: u16, from: Option<&Workload>, address: IpAddr) -> Self {
        let name = |workload: &Workload| match workload.workload_name.is_empty() {
            true => workload.name.clone(),
            false => workload.workload_name.clone(),
        };
        let client = from.map_or(Client::Address(address), |from| Client::Workload {
            namespace: from.namespace.clone(),
            name: name(from),
            account: from.identity.service_account().into(),
        });
        Self { namespace: to.namespace.clone(), workload: name(to), port, client }
    }
}

impl Callers {
    /// A connection began.
    pub fn began(&self, kind: &Kind, now: i64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !inner.has_place(kind, now) {
            inner.untold += 1;
            return;
        }
        let seen = inner.seen.entry(kind.clone()).or_default();
        seen.connections += 1;
        seen.open += 1;
        seen.last = now;
    }

    /// A connection that began has ended.
    pub fn ended(&self, kind: &Kind, refused: bool, now: i64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // None: it found no place when it began.
        let Some(seen) = inner.seen.get_mut(kind) else { return };
        seen.open = seen.open.saturating_sub(1);
        seen.refused += u64::from(refused);
        seen.last = now;
    }

    /// All kinds in order, and how many connections found no place.
    pub fn list(&self, now: i64) -> (Vec<(Kind, Seen)>, u64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.forget(now);
        let mut all: Vec<_> = inner.seen.iter().map(|(kind, seen)| (kind.clone(), *seen)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        (all, inner.untold)
    }
}

#[cfg(test)]
mod tests {
    use super::{Callers, Client, KEPT, Kind, MOST, STRANGERS, Seen};

    fn kind(workload: &str, client: Client) -> Kind {
        Kind { namespace: "shop".into(), workload: workload.into(), port: 80, client }
    }

    fn workload(name: &str) -> Client {
        Client::Workload { namespace: "office".into(), name: name.into(), account: "default".into() }
    }

    fn address(number: u32) -> Client {
        Client::Address(std::net::Ipv4Addr::from(number).into())
    }

    #[test]
    fn a_caller_is_listed_while_it_is_connected_and_a_day_longer() {
        let (callers, clerk) = (Callers::default(), kind("cart", workload("clerk")));
        callers.began(&clerk, 10);
        callers.began(&clerk, 20);
        callers.ended(&clerk, true, 30);
        let open = Seen { connections: 2, refused: 1, open: 1, last: 30 };
        assert_eq!(callers.list(30 + 10 * KEPT).0, [(clerk.clone(), open)]);
        callers.ended(&clerk, false, 40);
        assert_eq!(callers.list(39 + KEPT).0.len(), 1);
        assert!(callers.list(40 + KEPT).0.is_empty());
        callers.ended(&clerk, true, 50);
        assert!(callers.list(50).0.is_empty(), "an end alone begins nothing");
    }

    #[test]
    fn strangers_fill_neither_the_list_nor_the_places_of_workloads() {
        let callers = Callers::default();
        for number in 0..STRANGERS as u32 + 5 {
            callers.began(&kind("cart", address(number)), 1);
        }
        callers.began(&kind("cart", workload("clerk")), 1);
        callers.began(&kind("catalog", address(1)), 1);
        let (list, untold) = callers.list(1);
        assert_eq!((list.len(), untold), (STRANGERS + 2, 5));
        for number in 0..MOST {
            callers.began(&kind(&format!("w{number}"), workload("clerk")), 2);
        }
        assert_eq!(callers.list(2).0.len(), MOST);
        let late = 2 + KEPT;
        for number in 0..MOST {
            callers.ended(&kind(&format!("w{number}"), workload("clerk")), false, 2);
        }
        callers.began(&kind("new", workload("clerk")), late);
        let (list, _) = callers.list(late);
        assert!(list.iter().any(|(kind, _)| &*kind.workload == "new"), "old ones make room");
    }
}
