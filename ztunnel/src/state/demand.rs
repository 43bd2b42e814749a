//! What this node has asked control for, where it does not want to know everything: names, whether they were answered,
//! and who still needs them.
//!
//! Flows and name servers put names in, the discovery task sends them, and marks them when their answer is in force.
//! Absence is an answer too, and a name stays subscribed, so that control says when it comes to exist. Nothing may be
//! decided about an address that was not answered: it could be anybody's. A name is given up when it was not used for
//! [`KEEP`] and nobody holds its [`Lease`]; a live connection holds one, because it is judged again by what is known of
//! its peer. Limits: [`MOST`] names, a quarter of them for one pod, so that a pod that tries every address of a network
//! does not take the others' place. One short lock for each new connection; none where everything is known anyway.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tulle_proto::names::{ALL_OF_GROUP, ALL_OF_NODE};

use crate::state::{NetworkRule, ServiceSpec, Snapshot};

/// Names, some 3 MB: a node talks to some thousand addresses. Control takes 50,000 of one stream.
const MOST: usize = 16_384;
/// How long a name is kept that nobody uses: longer than clients keep a name's address.
const KEEP: Duration = Duration::from_secs(600);
/// The same when there is no room left.
const KEEP_AT_LEAST: Duration = Duration::from_secs(10);
/// How often room is looked for: it is a walk over all names.
const SEARCH: Duration = Duration::from_secs(1);

/// `<network>/<ip>`: how control finds a workload or service by address.
pub fn address_name(network: &str, ip: IpAddr) -> String {
    format!("{network}/{}", ip.to_canonical())
}

fn group_name(group: u64) -> String {
    format!("{ALL_OF_GROUP}{group:016x}")
}

/// Keeps a name subscribed.
#[derive(Clone, Debug)]
pub struct Lease {
    name: Arc<str>,
    _held: Arc<()>,
}

impl Lease {
    /// The name that was asked for.
    pub fn name(&self) -> &str {
        &self.name
    }
}

#[derive(Debug)]
struct Entry {
    answered: bool,
    /// The node itself needs it.
    pinned: bool,
    used: Instant,
    held: Arc<()>,
    /// The pod that asked first. Empty: the node.
    owner: Arc<str>,
}

impl Entry {
    fn is_unused(&self, now: Instant, keep: Duration) -> bool {
        !self.pinned && Arc::strong_count(&self.held) == 1 && now.saturating_duration_since(self.used) >= keep
    }
}

#[derive(Debug, Default)]
struct Table {
    names: HashMap<Arc<str>, Entry>,
    owners: HashMap<Arc<str>, usize>,
    subscribe: Vec<Arc<str>>,
    unsubscribe: Vec<Arc<str>>,
    searched: Option<Instant>,
}

impl Table {
    fn want(&mut self, name: &str, owner: &str, pinned: bool, now: Instant) -> Option<Lease> {
        if let Some((name, entry)) = self.names.get_key_value(name).map(|(name, entry)| (name.clone(), entry)) {
            let held = entry.held.clone();
            if let Some(entry) = self.names.get_mut(&name) {
                entry.used = now;
                entry.pinned |= pinned;
            }
            return Some(Lease { name, _held: held });
        }
        let is_full = |table: &Self| {
            let own = table.owners.get(owner).copied().unwrap_or(0);
            !pinned && (table.names.len() >= MOST || own >= MOST / 4)
        };
        if is_full(self) && self.searched.is_none_or(|last| now >= last + SEARCH) {
            self.searched = Some(now);
            self.expire(now, KEEP_AT_LEAST);
        }
        if is_full(self) {
            return None;
        }
        let (name, owner): (Arc<str>, Arc<str>) = (name.into(), owner.into());
        *self.owners.entry(owner.clone()).or_default() += 1;
        let held = Arc::new(());
        let entry = Entry { answered: false, pinned, used: now, held: held.clone(), owner };
        self.names.insert(name.clone(), entry);
        self.subscribe.push(name.clone());
        Some(Lease { name, _held: held })
    }

    fn has_address_of(&self, service: &ServiceSpec) -> bool {
        service.vips.iter().any(|(network, vip)| {
            let single = vip.prefix_len() == vip.max_prefix_len();
            if single {
                return self.names.contains_key(&*address_name(network, vip.addr()));
            }
            // A range is found by any address in it.
            let inside = |name: &str| {
                let ip =
                    name.rsplit_once('/').filter(|(own, _)| *own == &**network).and_then(|(_, ip)| ip.parse().ok());
                ip.is_some_and(|ip: IpAddr| vip.contains(&ip))
            };
            self.names.keys().any(|name| inside(name))
        })
    }

    fn expire(&mut self, now: Instant, keep: Duration) -> bool {
        let Self { names, owners, unsubscribe, .. } = self;
        let before = names.len();
        names.retain(|name, entry| {
            let unused = entry.is_unused(now, keep);
            if unused {
                unsubscribe.push(name.clone());
                if let Some(count) = owners.get_mut(&entry.owner) {
                    *count -= 1;
                    if *count == 0 {
                        owners.remove(&entry.owner);
                    }
                }
            }
            !unused
        });
        names.len() < before
    }
}

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demands {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Name of this node. Unset: everything is known, and nothing asked for.
    node: OnceLock<String>,
    table: Mutex<Table>,
    work: Notify,
    answers: watch::Sender<u64>,
}

impl Demands {
    pub(super) fn new() -> Self {
        let (node, table, work) = (OnceLock::new(), Mutex::default(), Notify::new());
        Self { inner: Arc::new(Inner { node, table, work, answers: watch::channel(0).0 }) }
    }

    /// From now on only what is asked for is known, everything on the node of this name, and the API server: its addresses are
    /// inside for closed pods, whose connections to it must not wait for somebody to ask for its Service. `cluster_domain`: names of
    /// Services end in it.
    pub fn enable(&self, node: &str, cluster_domain: &str) {
        if self.inner.node.set(node.to_owned()).is_ok() {
            self.pin([format!("{ALL_OF_NODE}{node}"), format!("default/kubernetes.default.svc.{cluster_domain}")]);
        }
    }

    /// Whether only what is asked for is known.
    pub fn enabled(&self) -> bool {
        self.inner.node.get().is_some()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for `name` on behalf of a pod, unless that is done. `None`: there is no room.
    pub fn want(&self, name: &str, pod: &str, now: Instant) -> Option<Lease> {
        let mut table = self.table();
        let lease = table.want(name, pod, false, now);
        let new = !table.subscribe.is_empty() || !table.unsubscribe.is_empty();
        drop(table);
        if new {
            self.inner.work.notify_one();
        }
        lease
    }

    /// Whether control has said what there is of this name, and that is in force.
    pub fn is_answered(&self, lease: &Lease) -> bool {
        self.table().names.get(&lease.name).is_some_and(|entry| entry.answered)
    }

    /// Tells of new answers.
    pub fn answers(&self) -> watch::Receiver<u64> {
        self.inner.answers.subscribe()
    }

    /// These names were answered, and the answers are in force.
    pub fn answered<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        let mut table = self.table();
        let mut new = false;
        for name in names {
            if let Some(entry) = table.names.get_mut(name) {
                new |= !std::mem::replace(&mut entry.answered, true);
            }
        }
        drop(table);
        if new {
            self.inner.answers.send_modify(|count| *count += 1);
        }
    }

    /// Completes when there is something to send.
    pub async fn work(&self) {
        self.inner.work.notified().await;
    }

    /// Names to subscribe to and to give up since the last call.
    pub fn changes(&self) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
        let mut table = self.table();
        let (subscribe, unsubscribe) = (std::mem::take(&mut table.subscribe), std::mem::take(&mut table.unsubscribe));
        // Given up and wanted again in the meantime: the subscription goes on.
        let unsubscribe = unsubscribe.into_iter().filter(|name| !table.names.contains_key(name)).collect();
        (subscribe, unsubscribe)
    }

    /// All names, for a new stream, which is told nothing else.
    pub fn all(&self) -> Vec<Arc<str>> {
        let mut table = self.table();
        table.subscribe.clear();
        table.unsubscribe.clear();
        table.names.keys().cloned().collect()
    }

    /// Gives names up that nobody uses. Whether there were some.
    pub fn expire(&self, now: Instant) -> bool {
        self.table().expire(now, KEEP)
    }

    /// The node itself needs these names.
    fn pin(&self, names: impl IntoIterator<Item = String>) {
        let mut table = self.table();
        for name in names {
            table.want(&name, "", true, Instant::now());
        }
        let new = !table.subscribe.is_empty();
        drop(table);
        if new {
            self.inner.work.notify_one();
        }
    }

    /// Asks for what the node's own pods need whoever they talk to: the services that they are behind, whose names tunnels
    /// may ask for, and the groups that their NetworkPolicies name, of which sets of addresses are made.
    pub fn pin_own(&self, snapshot: &Snapshot) {
        let Some(node) = self.inner.node.get() else { return };
        let mut names = BTreeSet::new();
        for own in snapshot.records().filter(|record| *record.place().node == **node) {
            names.extend(own.services().keys().map(ToString::to_string));
            for policy in own.network_policies().iter().filter_map(|id| snapshot.network_policy(id)) {
                let rules = policy.ingress.iter().chain(&policy.egress).flatten();
                names.extend(rules.flat_map(groups).map(group_name));
            }
        }
        self.pin(names);
    }

    /// Resource names of what nobody asks for any more: control says no longer what becomes of it.
    pub fn unwanted(&self, snapshot: &Snapshot) -> Vec<Arc<str>> {
        let Some(node) = self.inner.node.get() else { return Vec::new() };
        let table = self.table();
        let (wanted, unwanted): (BTreeSet<String>, BTreeSet<String>) =
            snapshot.services().map(|service| service.key()).partition(|key| {
                let service = key.split_once('/').and_then(|(namespace, name)| snapshot.service(namespace, name));
                table.names.contains_key(&**key) || service.is_some_and(|service| table.has_address_of(service))
            });
        let gone = snapshot.records().filter(|record| {
            let has = |name: &str| table.names.contains_key(name);
            *record.place().node != **node
                && !has(&record.uid())
                && !record.addresses().any(|ip| has(&address_name(&record.place().network, ip)))
                && !record.services().keys().any(|key| wanted.contains(&**key))
                && !record.groups().iter().any(|group| has(&group_name(*group)))
        });
        gone.map(|record| record.uid()).chain(unwanted).map(Arc::from).collect()
    }
}

fn groups(rule: &NetworkRule) -> impl Iterator<Item = u64> {
    let peers = rule.peers.iter().flat_map(|peers| &peers.groups).copied();
    peers.chain(rule.ports.iter().flatten().filter_map(|port| port.destination_group))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{behind, service, snapshot, workload};
    use crate::state::{Change, Workload};

    fn names(list: Vec<Arc<str>>) -> Vec<String> {
        let mut names: Vec<String> = list.iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    const API_SERVER: &str = "default/kubernetes.default.svc.cluster.local";

    fn enabled() -> Demands {
        let demands = Demands::new();
        demands.enable("node-1", "cluster.local");
        demands.changes();
        demands
    }

    #[test]
    fn a_name_is_asked_for_once_and_given_up_when_nobody_holds_or_uses_it() {
        let (demands, start) = (enabled(), Instant::now());
        let lease = demands.want("/10.0.0.1", "a", start).unwrap();
        demands.want("/10.0.0.1", "b", start).unwrap();
        demands.want("/10.0.0.2", "a", start).unwrap();
        assert_eq!(names(demands.changes().0), ["/10.0.0.1", "/10.0.0.2"]);
        assert!(!demands.is_answered(&lease));
        demands.answered(["/10.0.0.1", "/other"]);
        assert!(demands.is_answered(&lease));
        assert!(!demands.expire(start + KEEP - SEARCH));
        assert!(demands.expire(start + KEEP));
        assert_eq!(names(demands.changes().1), ["/10.0.0.2"], "the other is held");
        drop(lease);
        assert!(demands.expire(start + KEEP));
        let again = demands.want("/10.0.0.1", "a", start + KEEP).unwrap();
        assert!(!demands.is_answered(&again), "what was given up has to be answered again");
        let (subscribe, unsubscribe) = demands.changes();
        assert_eq!((names(subscribe), unsubscribe.len()), (vec!["/10.0.0.1".to_owned()], 0));
        let stays = ["/10.0.0.1", API_SERVER, "node/node-1"];
        assert_eq!(names(demands.all()), stays, "what the node needs stays");
    }

    #[test]
    fn one_pod_gets_its_share_of_names_and_unused_ones_make_room() {
        let (demands, start) = (enabled(), Instant::now());
        let all = |pod: &str, now| {
            (0..MOST).filter(|name| demands.want(&format!("{pod}/{name}"), pod, now).is_some()).count()
        };
        assert_eq!(all("a", start), MOST / 4);
        assert_eq!(all("b", start), MOST / 4);
        assert_eq!(demands.want("x", "c", start).map(|lease| lease.name().to_owned()).as_deref(), Some("x"));
        assert!(demands.want("y", "a", start + KEEP_AT_LEAST).is_some(), "unused for long enough");
    }

    #[test]
    fn what_nobody_asks_for_is_unwanted_and_what_came_with_a_service_is_wanted() {
        let demands = enabled();
        let far = |name: &str, ip: &str| Workload { node: "node-2".into(), ..workload("shop", name, ip) };
        let put = |workload: Workload| Change::Workload(workload.into());
        let snapshot = snapshot([
            put(workload("shop", "own", "10.0.0.1")),
            put(behind(far("cart-0", "10.0.0.2"), "shop", "cart")),
            put(far("web-0", "10.0.0.3")),
            put(Workload { groups: [7].into(), ..far("grouped", "10.0.0.4") }),
            Change::Service(service("shop", "cart", "10.96.0.1").into()),
            put(behind(far("api-0", "192.0.2.1"), "default", "kubernetes")),
            Change::Service(service("default", "kubernetes", "10.96.0.2").into()),
        ]);
        let cart = "shop/cart.shop.svc.cluster.local";
        let pod = |name: &str| format!("Kubernetes//Pod/shop/{name}");
        let cases: [(&[&str], Vec<String>); 4] = [
            (&[], vec![pod("cart-0"), pod("grouped"), pod("web-0"), cart.to_owned()]),
            (&["/10.0.0.3"], vec![pod("cart-0"), pod("grouped"), cart.to_owned()]),
            (&["/10.96.0.1"], vec![pod("grouped")]),
            (&["group/0000000000000007"], vec![]),
        ];
        let mut leases = Vec::new();
        for (wanted, expected) in cases {
            leases.extend(wanted.iter().map(|name| demands.want(name, "a", Instant::now()).unwrap()));
            assert_eq!(names(demands.unwanted(&snapshot)), expected, "{wanted:?}");
        }
        assert!(Demands::new().unwanted(&snapshot).is_empty(), "where everything is known nothing is unwanted");
    }
}
