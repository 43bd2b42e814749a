//! What translation looks up in a world by something else than a name, kept from one world to the next.
//!
//! Each index is brought up to date by the objects that changed, before and after, and by nothing else; an entry goes with
//! the last object that made it. Limits: it is as large as the world, and nothing here decides.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{EndpointSlice, Key, ObjectChange, Pod, Service, Transport};
use crate::translate::Accounts;
use crate::translate::work::Changed;

/// Pods of one namespace by the value of a label, by name.
type Labelled = HashMap<String, HashMap<String, BTreeMap<String, Arc<Pod>>>>;

/// All indexes.
#[derive(Default)]
pub(super) struct Index {
    /// Pods that take part, by namespace.
    labelled: HashMap<String, Labelled>,
    /// Pods that take part and have an address of their own.
    addresses: HashMap<IpAddr, BTreeMap<Key, Arc<Pod>>>,
    /// Numbers that the same pods give to port names.
    ports: BTreeMap<(Transport, String), Counts<u16>>,
    /// By Service.
    slices: HashMap<Key, BTreeMap<String, Arc<EndpointSlice>>>,
    /// Cluster addresses of Services.
    cluster: HashMap<IpAddr, usize>,
    /// Services that ask for external addresses.
    external: BTreeSet<Key>,
    /// Accounts of the unfinished pods of each node, as they are counted and as they are given out.
    counted: HashMap<String, Counts<(String, String)>>,
    accounts: Accounts,
}

/// How often each is there.
type Counts<T> = BTreeMap<T, usize>;

fn count<T: Ord>(counts: &mut Counts<T>, what: T) {
    *counts.entry(what).or_default() += 1;
}

fn uncount<T: Ord>(counts: &mut Counts<T>, what: &T) {
    if let Some(number) = counts.get_mut(what) {
        *number -= 1;
        if *number == 0 {
            counts.remove(what);
        }
    }
}

/// Changes what is kept at `key`, and forgets it when it is empty afterwards.
fn at<K: Hash + Eq, V: Default>(map: &mut HashMap<K, V>, key: K, change: impl FnOnce(&mut V) -> bool) {
    match map.entry(key) {
        std::collections::hash_map::Entry::Occupied(mut entry) => {
            if change(entry.get_mut()) {
                entry.remove();
            }
        }
        std::collections::hash_map::Entry::Vacant(entry) => {
            let mut value = V::default();
            if !change(&mut value) {
                entry.insert(value);
            }
        }
    }
}

fn key(pod: &Pod) -> Key {
    (pod.meta.namespace.clone(), pod.meta.name.clone())
}

impl Index {
    /// Takes all changes.
    pub(super) fn update(&mut self, changed: &Changed<'_>) {
        changed.pods.iter().for_each(|change| self.change_pod(change));
        changed.slices.iter().for_each(|change| self.change_slice(change));
        changed.services.iter().for_each(|change| self.change_service(change));
    }

    fn change_pod(&mut self, change: &ObjectChange<'_, Pod>) {
        for (pod, added) in sides(change) {
            if pod.takes_part() {
                self.label(pod, added);
            }
            if pod.takes_part() && !pod.host_network {
                self.address(pod, added);
            }
            if !pod.node.is_empty() && !pod.finished() {
                self.account(pod, added);
            }
        }
    }

    fn label(&mut self, pod: &Arc<Pod>, added: bool) {
        at(&mut self.labelled, pod.meta.namespace.clone(), |labelled| {
            for (label, value) in &pod.meta.labels {
                at(labelled, label.clone(), |values| {
                    at(values, value.clone(), |pods| {
                        if added {
                            pods.insert(pod.meta.name.clone(), Arc::clone(pod));
                        } else {
                            pods.remove(&pod.meta.name);
                        }
                        pods.is_empty()
                    });
                    values.is_empty()
                });
            }
            labelled.is_empty()
        });
    }

    fn address(&mut self, pod: &Arc<Pod>, added: bool) {
        for ip in &pod.addresses {
            at(&mut self.addresses, *ip, |pods| {
                if added {
                    pods.insert(key(pod), Arc::clone(pod));
                } else {
                    pods.remove(&key(pod));
                }
                pods.is_empty()
            });
        }
        for port in pod.ports.iter().filter(|port| !port.name.is_empty()) {
            let numbers = self.ports.entry((port.protocol, port.name.clone())).or_default();
            if added {
                count(numbers, port.port)
            } else {
                uncount(numbers, &port.port)
            }
            if numbers.is_empty() {
                self.ports.remove(&(port.protocol, port.name.clone()));
            }
        }
    }

    fn account(&mut self, pod: &Pod, added: bool) {
        let account = (pod.meta.namespace.clone(), pod.service_account.clone());
        let accounts = &mut self.accounts;
        at(&mut self.counted, pod.node.clone(), |counts| {
            let had = counts.contains_key(&account);
            if added {
                count(counts, account.clone())
            } else {
                uncount(counts, &account)
            }
            let has = counts.contains_key(&account);
            if counts.is_empty() {
                accounts.remove(&pod.node);
            } else if had != has {
                let of_node = Arc::make_mut(accounts.entry(pod.node.clone()).or_default());
                if has {
                    of_node.insert(account);
                } else {
                    of_node.remove(&account);
                }
            }
            counts.is_empty()
        });
    }

    fn change_slice(&mut self, change: &ObjectChange<'_, EndpointSlice>) {
        for (slice, added) in sides(change).filter(|(slice, _)| !slice.service.is_empty()) {
            at(&mut self.slices, (slice.meta.namespace.clone(), slice.service.clone()), |slices| {
                if added {
                    slices.insert(slice.meta.name.clone(), Arc::clone(slice));
                } else {
                    slices.remove(&slice.meta.name);
                }
                slices.is_empty()
            });
        }
    }

    fn change_service(&mut self, change: &ObjectChange<'_, Service>) {
        for (service, added) in sides(change) {
            for ip in &service.addresses {
                at(&mut self.cluster, *ip, |number| {
                    *number = if added { *number + 1 } else { *number - 1 };
                    *number == 0
                });
            }
            if added && !service.external.is_empty() {
                self.external.insert(change.key.clone());
            } else {
                self.external.remove(change.key);
            }
        }
    }

    /// The pods of a namespace that have all these labels; none without any, rather than all.
    pub(super) fn select(&self, namespace: &str, selector: &BTreeMap<String, String>) -> Vec<&Arc<Pod>> {
        let Some(labelled) = self.labelled.get(namespace) else { return Vec::new() };
        let of = |(label, value): (&String, &String)| labelled.get(label).and_then(|values| values.get(value));
        let mut fewest: Option<&BTreeMap<String, Arc<Pod>>> = None;
        for one in selector {
            let Some(pods) = of(one) else { return Vec::new() };
            fewest = Some(fewest.filter(|fewest| fewest.len() <= pods.len()).unwrap_or(pods));
        }
        let selected =
            |pod: &&Arc<Pod>| selector.iter().all(|(label, value)| pod.meta.labels.get(label) == Some(value));
        fewest.into_iter().flat_map(BTreeMap::values).filter(selected).collect()
    }

    /// The pod that has an address of its own.
    pub(super) fn pod_at(&self, ip: &IpAddr) -> Option<&Arc<Pod>> {
        self.addresses.get(ip)?.values().next_back()
    }

    /// Whether it is the cluster address of a Service, or that of a pod.
    pub(super) fn is_inside(&self, ip: &IpAddr) -> bool {
        self.cluster.contains_key(ip) || self.addresses.contains_key(ip)
    }

    /// The endpoint slices of a Service; `None`: there are none.
    pub(super) fn slices_of(&self, service: &Key) -> Option<Vec<&EndpointSlice>> {
        Some(self.slices.get(service)?.values().map(|slice| &**slice).collect())
    }

    /// Services that ask for external addresses, in order.
    pub(super) fn external(&self) -> &BTreeSet<Key> {
        &self.external
    }

    /// Numbers that pods give to a port name.
    pub(super) fn numbers(&self, name: &(Transport, String)) -> BTreeSet<u16> {
        self.ports.get(name).into_iter().flatten().map(|(number, _)| *number).collect()
    }

    /// (namespace, account) of the unfinished pods of each node.
    pub(super) fn accounts(&self) -> &Accounts {
        &self.accounts
    }
}

/// Before, to be taken out, and after, to be put in.
fn sides<'a, T>(change: &ObjectChange<'a, T>) -> impl Iterator<Item = (&'a Arc<T>, bool)> + use<'a, T> {
    let before = change.before.into_iter().map(|object| (object, false));
    before.chain(change.after.into_iter().map(|object| (object, true)))
}
