//! The writer of snapshots: applies changes, stages what is not complete, and publishes.
//!
//! Why one writer: order is meaning here (a policy before the workload that names it), and one owner needs no lock. The
//! writer keeps a working copy and publishes a clone; see `cow` for why both are cheap. Limits: everything held is what
//! control sent, bounded by its responses, plus the bounded version log.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tulle_certs::Aliases;
use tulle_proto::names::TRUST_BUNDLE;

use crate::state::known::Free;
use crate::state::members::Delta;
use crate::state::narrowed::Narrowed;
use crate::state::versions::{Kept, Logged, VersionLog};
use crate::state::{
    Change, Demands, Endpoints, LogEntry, LogName, NetworkPolicy, OwnType, Policy, Record, Scope, Service, ServiceSpec,
    Shapes, Snapshot,
};

/// Services whose endpoints are prepared in one step of [`Writer::prepare`]: a few milliseconds.
const STEP: usize = 256;

/// What has been said completely: of the first types, and of each [`OwnType`] whether it is offered and complete.
type Progress = ([bool; 4], [u8; 2]);

/// What [`Writer::apply`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Generation in force now.
    pub generation: u64,
    /// Whether a new snapshot was published; not if nothing changed.
    pub published: bool,
    /// Workloads that wait for policies.
    pub staged: usize,
    /// When to apply again although nothing was said (an empty update does), microseconds since the Unix epoch.
    pub again_us: Option<u64>,
}

/// A new, empty store.
pub fn store() -> (Writer, Reader) {
    let next = Snapshot::empty();
    let (generation, _) = watch::channel(0);
    let shared = Arc::new(Shared {
        current: ArcSwap::from_pointee(next.clone()),
        generation,
        log: Mutex::new(VersionLog::default()),
        demands: Demands::new(),
    });
    let writer = Writer {
        next,
        free: Free::new(),
        shapes: Shapes::default(),
        orphans: HashMap::new(),
        staged: BTreeMap::new(),
        users: HashMap::new(),
        rejected: HashMap::new(),
        zombies: BTreeSet::new(),
        narrowed: Narrowed::default(),
        touched: BTreeMap::new(),
        log: Vec::new(),
        shown: Progress::default(),
        shared: shared.clone(),
    };
    (writer, Reader { shared })
}

#[derive(Debug)]
struct Shared {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    log: Mutex<VersionLog>,
    demands: Demands,
}

/// Loads snapshots. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reader {
    shared: Arc<Shared>,
}

impl Reader {
    /// The newest snapshot. Keep it for one decision, not longer.
    pub fn load(&self) -> Arc<Snapshot> {
        self.shared.current.load_full()
    }

    /// Tells of every new generation; several may be seen as one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Says which addresses the node itself has. Only these do not come from control, so they change without a new
    /// generation; readers see them at their next look, and whoever waits for changes is woken.
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) {
        let _writing = self.shared.log.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.shared.current.load_full();
        if *current.node != *addresses {
            let next = Snapshot { node: addresses.into(), ..Snapshot::clone(&current) };
            self.shared.current.store(Arc::new(next));
            self.shared.generation.send_modify(|_| {});
        }
    }

    /// What was asked for, where not everything is known.
    pub fn demands(&self) -> &Demands {
        &self.shared.demands
    }

    /// Says which other names the node's trust domain has; they do not come from control either.
    pub fn set_aliases(&self, aliases: Aliases) {
        let _writing = self.shared.log.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Snapshot { aliases, ..Snapshot::clone(&self.shared.current.load_full()) };
        self.shared.current.store(Arc::new(next));
        self.shared.generation.send_modify(|_| {});
    }

    /// What took effect when, oldest first.
    pub fn versions(&self) -> Vec<Arc<LogEntry>> {
        let kept = self.shared.log.lock().unwrap_or_else(PoisonError::into_inner).entries();
        kept.iter().map(|entry| Arc::new(entry.entry())).collect()
    }
}

/// Applies changes. There is one.
#[derive(Debug)]
pub struct Writer {
    next: Snapshot,
    free: Free,
    /// For workloads that come unpacked.
    shapes: Shapes,
    /// Service name to its endpoints, for services that are not known; those of others are in the service.
    orphans: HashMap<Arc<str>, Vec<Arc<Record>>>,
    /// Newest version of the workloads that wait for a policy, by uid.
    staged: BTreeMap<Arc<str>, Arc<Record>>,
    /// Policy name to how many workloads name it, counted in force and staged.
    users: HashMap<Arc<str>, usize>,
    /// Versions of policies that could not be read: a workload that wants one of them gets what is in force.
    rejected: HashMap<Arc<str>, Arc<str>>,
    /// Removed policies that workloads still name.
    zombies: BTreeSet<Arc<str>>,
    /// Old versions that hold a little longer.
    narrowed: Narrowed,
    /// Services whose endpoints must be prepared again before the next publication.
    touched: BTreeMap<Arc<str>, Delta>,
    /// What the next publication changes.
    log: Vec<Logged>,
    /// What was said completely when the last snapshot was published.
    shown: Progress,
    shared: Arc<Shared>,
}

impl Writer {
    /// Applies `changes` as one update: readers see all of them or none.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>, now_unix_us: u64) -> Applied {
        self.take(changes, now_unix_us);
        while self.prepare() {}
        self.finish(now_unix_us)
    }

    /// The first part of an update that is applied in steps: readers see it with [`Self::finish`].
    pub fn take(&mut self, changes: impl IntoIterator<Item = Change>, now_unix_us: u64) {
        let mut policies_changed = false;
        for change in changes {
            match change {
                Change::Workload(workload) => {
                    let record = Record::pack(&workload, &mut self.shapes);
                    self.offer(record.into());
                }
                Change::Record(record) => self.offer(record),
                Change::Service(spec) => self.put_service(spec),
                Change::Policy(policy) => {
                    self.put_policy(policy, now_unix_us);
                    policies_changed = true;
                }
                Change::PolicyRejected(stand_in) => {
                    self.reject_policy(stand_in, now_unix_us);
                    policies_changed = true;
                }
                Change::NetworkPolicy(policy) => {
                    self.zombies.remove(&policy.id);
                    self.enforce_network(policy);
                    policies_changed = true;
                }
                Change::NetworkPolicyRejected(stand_in) => {
                    self.reject_network(stand_in);
                    policies_changed = true;
                }
                Change::NetworkPolicyRemoved(id) => {
                    if self.next.network_policies.get(&id).is_some() {
                        self.zombies.insert(id);
                    }
                }
                Change::TrustBundle(_)
                | Change::Route(_)
                | Change::TrafficPolicy(_)
                | Change::RequestAuth(_)
                | Change::RequestAuthRejected(_)
                | Change::EgressPolicy(_)
                | Change::EgressPolicyRejected(_)
                | Change::OwnRemoved(..) => self.put_own(change),
                Change::OwnExpected(own) => self.next.own_expected |= own.bit(),
                Change::OwnSynced(own) => self.next.own_synced |= own.bit(),
                Change::AddressRemoved(name) => self.remove_address(&name),
                Change::PolicyRemoved(id) => self.remove_policy(&id),
                Change::AddressesSynced => self.next.addresses_synced = true,
                Change::PoliciesSynced => self.next.policies_synced = true,
                Change::NetworkPoliciesExpected => self.next.network_expected = true,
                Change::NetworkPoliciesSynced => self.next.network_synced = true,
            }
        }
        if policies_changed {
            self.unstage();
        }
        self.bury_zombies();
        self.expire_narrowed(now_unix_us);
    }

    /// The second part: prepares the endpoints of some services. Whether more are left.
    pub fn prepare(&mut self) -> bool {
        for _ in 0..STEP {
            let Some((key, delta)) = self.touched.pop_first() else { return false };
            self.rebuild(&key, delta);
        }
        !self.touched.is_empty()
    }

    /// The last part of an update: readers see it, if it changed anything.
    pub fn finish(&mut self, now_unix_us: u64) -> Applied {
        let published = self.progress() != self.shown || !self.log.is_empty();
        if published {
            self.publish(now_unix_us);
        }
        let again_us = self.narrowed.next();
        Applied { generation: self.next.generation, published, staged: self.staged.len(), again_us }
    }

    /// Notes in the log when the last update was in force for every new decision: the time before [`Self::finish`] and the
    /// one after it bound the moment, however long the thread was kept from running in between.
    pub fn settled(&self, now_unix_us: u64) {
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner).settled(now_unix_us);
    }

    /// What has been said completely.
    fn progress(&self) -> Progress {
        let Snapshot { addresses_synced, policies_synced, network_expected, network_synced, .. } = self.next;
        let own = [self.next.own_expected, self.next.own_synced];
        ([addresses_synced, policies_synced, network_expected, network_synced], own)
    }

    /// Brings what is known of HTTP and of other trust domains up to date.
    fn put_own(&mut self, change: Change) {
        let l7 = Arc::make_mut(&mut self.next.l7);
        let (id, version, changed) = match change {
            Change::Route(route) => (route.id.clone(), Some(route.version.clone()), l7.put_route(route)),
            Change::TrafficPolicy(policy) => (policy.id.clone(), Some(policy.version.clone()), l7.put_traffic(policy)),
            Change::RequestAuth(auth) => {
                self.zombies.remove(&auth.id);
                (auth.id.clone(), Some(auth.version.clone()), l7.put_request_auth(auth))
            }
            Change::RequestAuthRejected(stand_in) => {
                self.zombies.remove(&stand_in.id);
                let (id, version) = (stand_in.id.clone(), stand_in.version.clone());
                (id, Some(version), l7.reject_request_auth(stand_in))
            }
            Change::EgressPolicy(policy) => {
                self.zombies.remove(&policy.id);
                (policy.id.clone(), Some(policy.version.clone()), l7.put_egress(policy))
            }
            Change::EgressPolicyRejected(stand_in) => {
                self.zombies.remove(&stand_in.id);
                (stand_in.id.clone(), Some(stand_in.version.clone()), l7.reject_egress(stand_in))
            }
            Change::TrustBundle(bundle) => {
                let changed = self.next.trust.get(&bundle.trust_domain) != Some(&bundle.roots);
                if changed {
                    self.next.trust = self.next.trust.with(&bundle.trust_domain, bundle.roots.clone());
                }
                (bundle.id.clone(), Some(bundle.version.clone()), changed)
            }
            Change::OwnRemoved(OwnType::TrustBundle, id) => {
                let domain = id.strip_prefix(TRUST_BUNDLE).unwrap_or_default();
                let changed = self.next.trust.get(domain).is_some();
                if changed {
                    self.next.trust = self.next.trust.without(domain);
                }
                (id, None, changed)
            }
            Change::OwnRemoved(OwnType::Route, id) => (id.clone(), None, l7.remove_route(&id)),
            Change::OwnRemoved(OwnType::TrafficPolicy, id) => (id.clone(), None, l7.remove_traffic(&id)),
            Change::OwnRemoved(OwnType::RequestAuth, id) => {
                // It stays in force as long as a workload names it.
                if l7.request_auth(&id).is_some() {
                    self.zombies.insert(id);
                }
                return;
            }
            Change::OwnRemoved(OwnType::EgressPolicy, id) => {
                if l7.egress_policy(&id).is_some() {
                    self.zombies.insert(id);
                }
                return;
            }
            _ => return,
        };
        if changed {
            self.note(LogName::Own(id), version);
        }
    }

    /// Nothing is left to do between updates.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.touched.is_empty() && self.log.is_empty()
    }

    fn publish(&mut self, now_unix_us: u64) {
        self.next.generation += 1;
        self.shown = self.progress();
        let entry = Kept {
            generation: self.next.generation,
            applied_unix_us: now_unix_us,
            settled_unix_us: AtomicU64::new(0),
            items: std::mem::take(&mut self.log).into(),
        };
        self.show(Some(entry));
        self.shared.generation.send_replace(self.next.generation);
    }

    /// Makes the working copy the one in force.
    fn show(&mut self, entry: Option<Kept>) {
        // Held while the snapshot is replaced, so that addresses of the node that change meanwhile are not lost.
        let mut log = self.shared.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entry {
            log.push(entry);
        }
        let current = self.shared.current.load();
        (self.next.node, self.next.aliases) = (current.node.clone(), current.aliases.clone());
        self.shared.current.store(Arc::new(self.next.clone()));
    }

    /// What was asked for, where not everything is known.
    pub fn demands(&self) -> &Demands {
        &self.shared.demands
    }

    /// The working copy, which is the snapshot in force between two updates.
    pub fn current(&self) -> &Snapshot {
        &self.next
    }

    /// Names and newest versions of all workloads and services.
    pub fn addresses(&self) -> impl Iterator<Item = (String, String)> {
        let newest = |record: &Arc<Record>| {
            let uid = record.uid();
            let staged = if self.staged.is_empty() { None } else { self.staged.get(&*uid) };
            let version = staged.unwrap_or(record).version();
            (uid, version)
        };
        let services = self.next.services().map(|service| (service.key(), service.version.to_string()));
        self.next.records().map(newest).chain(services)
    }

    /// Packs some workloads again that somebody asked for once and nobody uses, if there are more than `keep`. Nothing
    /// changes for readers. How many.
    pub fn forget(&mut self, keep: usize) -> usize {
        let idle: Vec<Arc<Record>> = self.next.records().filter(|record| record.is_idle()).cloned().collect();
        let over = idle.len().saturating_sub(keep).min(4 * STEP);
        let mut others = HashMap::with_capacity(over);
        for old in &idle[..over] {
            let new = Arc::new(old.packed_again());
            self.next.workloads.put(new.clone(), &mut self.free);
            self.index_services(Some(old), Some(&new));
            others.insert(Arc::as_ptr(old), new);
        }
        while self.prepare() {}
        if over > 0 {
            self.shared.log.lock().unwrap_or_else(PoisonError::into_inner).exchange(&others);
            self.show(None);
        }
        over
    }

    // Workloads.

    /// Takes a workload into force, or stages it.
    fn offer(&mut self, record: Arc<Record>) {
        let uid: Arc<str> = record.uid().into();
        let named_before = self.named_by(&uid);
        self.staged.remove(&uid);
        if self.is_complete(&record) {
            self.put_workload(record);
        } else {
            let in_force = self.next.workloads.by_uid(&uid);
            // A version in force that was complete stays, if it is of the same pod.
            let stays = in_force.is_some_and(|old| !old.policies_pending() && old.pod_uid() == record.pod_uid());
            self.staged.insert(uid.clone(), record.clone());
            if !stays {
                self.put_workload(record.pending().into());
            }
        }
        self.count_users(&uid, &named_before);
    }

    /// Whether every policy that the workload names is here, in the version that it names or another that is as good.
    fn is_complete(&self, record: &Record) -> bool {
        if record.network_policies().iter().any(|id| self.next.network_policies.get(id).is_none()) {
            return false;
        }
        record.policies().all(|(id, wanted)| {
            let Some(held) = self.next.policies.get(id) else { return false };
            let Some(wanted) = wanted else { return true };
            held.version == *wanted || self.rejected.get(id) == Some(wanted)
        })
    }

    fn put_workload(&mut self, record: Arc<Record>) {
        if self.next.workloads.by_uid(&record.uid()) == Some(&record) {
            return;
        }
        let old = self.next.workloads.put(record.clone(), &mut self.free);
        self.index_services(old.as_ref(), Some(&record));
        self.log.push(Logged::Workload(record));
    }

    fn remove_workload(&mut self, uid: &Arc<str>) -> bool {
        let named_before = self.named_by(uid);
        self.staged.remove(uid);
        let Some(old) = self.next.workloads.remove(uid, &mut self.free) else { return false };
        self.index_services(Some(&old), None);
        self.log.push(Logged::Gone(old));
        self.count_users(uid, &named_before);
        true
    }

    /// Takes note of the services that `old` or `new` of one workload is behind.
    fn index_services(&mut self, old: Option<&Arc<Record>>, new: Option<&Arc<Record>>) {
        if let Some(old) = old {
            for service in old.services().keys() {
                self.touched.entry(service.clone()).or_default().gone(old);
            }
        }
        if let Some(new) = new {
            for service in new.services().keys() {
                self.touched.entry(service.clone()).or_default().come(new);
            }
        }
    }

    // Services.

    fn remove_address(&mut self, name: &Arc<str>) {
        if !self.remove_workload(name)
            && let Some((namespace, hostname)) = name.split_once('/')
            && let Some(old) = self.next.service(namespace, hostname).cloned()
        {
            self.index_service(Some(&old), None);
            if !old.endpoints.all.is_empty() {
                self.orphans.insert(name.clone(), old.endpoints.all.to_vec());
            }
            self.note(LogName::Address(name.clone()), None);
        }
    }

    fn put_service(&mut self, spec: Arc<ServiceSpec>) {
        let old = self.next.service(&spec.namespace, &spec.hostname).cloned();
        if old.as_ref().is_some_and(|old| **old.spec() == *spec) {
            return;
        }
        let key: Arc<str> = spec.key().into();
        self.note(LogName::Address(key.clone()), Some(spec.version.clone()));
        // The endpoints follow at the end of the update, once for all its changes.
        let new = match &old {
            Some(old) => old.respecified(spec),
            None => Service::new(spec, Endpoints::default()),
        };
        self.index_service(old.as_ref(), Some(&Arc::new(new)));
        self.touched.entry(key).or_default();
    }

    fn note(&mut self, name: LogName, version: Option<Arc<str>>) {
        self.log.push(Logged::Other(Box::new((name, version))));
    }

    /// Brings every index from `old` to `new` of one service.
    fn index_service(&mut self, old: Option<&Arc<Service>>, new: Option<&Arc<Service>>) {
        let Some(any) = new.or(old).cloned() else { return };
        let is_old = |service: &Service| service.namespace == any.namespace && service.hostname == any.hostname;
        let order = |service: &Service| (service.namespace.clone(), service.hostname.clone());
        let (new_ips, new_ranges) = new.map(|new| split_vips(new)).unwrap_or_default();
        let (old_ips, old_ranges) = old.map(|old| split_vips(old)).unwrap_or_default();
        for ip in old_ips.iter().filter(|ip| !new_ips.contains(ip)) {
            self.next.vips.regroup(ip, is_old, None, order);
        }
        for ip in &new_ips {
            self.next.vips.regroup(ip, is_old, new, order);
        }
        if !old_ranges.is_empty() || !new_ranges.is_empty() {
            let ranges = Arc::make_mut(&mut self.next.ranges);
            ranges.retain(|(_, _, service)| !is_old(service));
            if let Some(new) = new {
                ranges.extend(new_ranges.iter().map(|(network, range)| (network.clone(), *range, new.clone())));
            }
            ranges.sort_by_cached_key(|(network, range, service)| (network.clone(), *range, order(service)));
        }
        self.next.services.regroup(&any.hostname, is_old, new, order);
        if any.is_api_server() {
            self.next.api_server = new.cloned();
        }
        self.next.service_count += usize::from(new.is_some());
        self.next.service_count -= usize::from(old.is_some());
    }

    /// Prepares the endpoints of a service, of which `delta` came and went.
    fn rebuild(&mut self, key: &Arc<str>, delta: Delta) {
        let orphans = self.orphans.remove(key).unwrap_or_default();
        let known = key.split_once('/').and_then(|(namespace, hostname)| self.next.service(namespace, hostname));
        let Some(old) = known.cloned() else {
            let orphans = delta.applied(orphans.into_iter());
            if !orphans.is_empty() {
                self.orphans.insert(key.clone(), orphans);
            }
            return;
        };
        let all = delta.applied(old.endpoints.all.iter().cloned().chain(orphans));
        let new = Service::new(old.spec().clone(), Endpoints::build(old.spec(), key, all));
        self.index_service(Some(&old), Some(&Arc::new(new)));
    }

    // Policies.

    fn put_policy(&mut self, policy: Arc<Policy>, now_us: u64) {
        self.zombies.remove(&policy.id);
        self.rejected.remove(&policy.id);
        self.enforce(policy, now_us);
    }

    fn reject_policy(&mut self, stand_in: Arc<Policy>, now_us: u64) {
        self.rejected.insert(stand_in.id.clone(), stand_in.version.clone());
        let held = self.next.policies.get(&stand_in.id);
        if held.is_none_or(|held| held.stand_in.is_some()) {
            self.zombies.remove(&stand_in.id);
            self.enforce(stand_in, now_us);
        } else {
            // A removed policy that came back unreadable is not removed.
            self.zombies.remove(&stand_in.id);
        }
    }

    fn remove_policy(&mut self, id: &Arc<str>) {
        self.rejected.remove(id);
        if self.next.policies.get(id).is_some() {
            self.zombies.insert(id.clone());
        }
        if self.narrowed.removed(id) {
            self.show_narrowed([id.clone()]);
        }
    }

    /// Lets old versions go that held long enough.
    fn expire_narrowed(&mut self, now_us: u64) {
        let over = self.narrowed.expire(now_us);
        if !over.is_empty() {
            self.show_narrowed(over);
        }
    }

    /// The old versions of `ids` hold no longer.
    fn show_narrowed(&mut self, ids: impl IntoIterator<Item = Arc<str>>) {
        self.next.narrowed = self.narrowed.list();
        for id in ids {
            let left = self.next.policies.get(&id).map(|policy| policy.version.clone());
            self.note(LogName::Authorization(id), left);
        }
    }

    fn enforce(&mut self, policy: Arc<Policy>, now_us: u64) {
        let old = self.next.policies.get(&policy.id).cloned();
        if old.as_ref() == Some(&policy) {
            return;
        }
        self.note(LogName::Authorization(policy.id.clone()), Some(policy.version.clone()));
        self.next.policies.insert(policy.id.clone(), policy.clone());
        if self.narrowed.replaced(old.as_ref(), &policy, now_us) {
            self.next.narrowed = self.narrowed.list();
        }
        self.index_policy(old.as_deref(), Some(&policy));
    }

    fn enforce_network(&mut self, policy: Arc<NetworkPolicy>) {
        if self.next.network_policies.get(&policy.id) == Some(&policy) {
            return;
        }
        self.note(LogName::NetworkPolicy(policy.id.clone()), Some(policy.version.clone()));
        self.next.network_policies.insert(policy.id.clone(), policy);
    }

    fn reject_network(&mut self, stand_in: Arc<NetworkPolicy>) {
        // A removed policy that came back unreadable is not removed.
        self.zombies.remove(&stand_in.id);
        let held = self.next.network_policies.get(&stand_in.id);
        if held.is_none_or(|held| held.unreadable.is_some()) {
            self.enforce_network(stand_in);
        }
    }

    /// Keeps the lists of implied policies.
    fn index_policy(&mut self, old: Option<&Policy>, new: Option<&Arc<Policy>>) {
        let Some(id) = old.map(|old| old.id.clone()).or_else(|| new.map(|new| new.id.clone())) else { return };
        let implied = |policy: &Policy| policy.scope != Scope::Selector;
        for policy in old.into_iter().chain(new.map(|new| &**new)).filter(|policy| implied(policy)) {
            let list = match policy.scope {
                Scope::Global => &*self.next.global_policies,
                _ => self.next.namespace_policies.get(&policy.namespace).map_or(&[][..], |list| &**list),
            };
            let mut list: Vec<Arc<Policy>> = list.iter().filter(|other| other.id != id).cloned().collect();
            list.extend(new.filter(|new| new.scope == policy.scope && new.namespace == policy.namespace).cloned());
            list.sort_by(|a, b| a.id.cmp(&b.id));
            match policy.scope {
                Scope::Global => self.next.global_policies = list.into(),
                _ => {
                    self.next.namespace_policies.insert(policy.namespace.clone(), list.into());
                }
            }
        }
    }

    /// Takes into force what was waiting for a policy that is here now.
    fn unstage(&mut self) {
        let ready: Vec<_> = self.staged.values().filter(|workload| self.is_complete(workload)).cloned().collect();
        for workload in ready {
            self.offer(workload);
        }
    }

    /// Drops removed policies that nobody names any more.
    fn bury_zombies(&mut self) {
        let dead: Vec<_> = self.zombies.iter().filter(|id| !self.users.contains_key(*id)).cloned().collect();
        for id in dead {
            self.zombies.remove(&id);
            if let Some(old) = self.next.policies.remove(&id) {
                self.index_policy(Some(&old), None);
                self.note(LogName::Authorization(id.clone()), None);
            }
            if self.next.network_policies.remove(&id).is_some() {
                self.note(LogName::NetworkPolicy(id.clone()), None);
            }
            if self.next.l7.request_auth(&id).is_some() {
                Arc::make_mut(&mut self.next.l7).remove_request_auth(&id);
                self.note(LogName::Own(id.clone()), None);
            }
            if self.next.l7.egress_policy(&id).is_some() {
                Arc::make_mut(&mut self.next.l7).remove_egress(&id);
                self.note(LogName::Own(id), None);
            }
        }
    }

    /// Policies that a workload names, of its versions in force and staged; those of both twice.
    fn named_by(&self, uid: &str) -> Vec<Arc<str>> {
        let versions = [self.next.workloads.by_uid(uid), self.staged.get(uid)];
        versions.into_iter().flatten().flat_map(|record| record.named().cloned()).collect()
    }

    /// Brings `users` up to date for one workload that named `before`.
    fn count_users(&mut self, uid: &str, before: &[Arc<str>]) {
        for id in self.named_by(uid) {
            *self.users.entry(id).or_default() += 1;
        }
        for id in before {
            if let Some(users) = self.users.get_mut(id) {
                *users -= 1;
                if *users == 0 {
                    self.users.remove(id);
                }
            }
        }
    }
}

type Vips = (Vec<IpAddr>, Vec<(Arc<str>, ipnet::IpNet)>);

/// Single addresses, and ranges.
fn split_vips(service: &ServiceSpec) -> Vips {
    let (hosts, ranges): (Vec<_>, Vec<_>) =
        service.vips.iter().cloned().partition(|(_, vip)| vip.prefix_len() == vip.max_prefix_len());
    (hosts.into_iter().map(|(_, vip)| vip.addr()).collect(), ranges)
}
