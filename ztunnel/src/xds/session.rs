//! The delta protocol's client half as a state machine: responses in, changes and requests out, no I/O.
//!
//! It outlives streams: what is known is told to the next server as `initial_resource_versions`, so that only differences
//! travel and removals are not missed. A rejected resource is named in the NACK, does not hold up the others, and is told
//! with version "" after a reconnect, so that it is sent again or its removal is. Limits: what is remembered is a name and
//! a version per resource that the server sent; a NACK's text has at most [`MAX_NACK_BYTES`].
//!
//! Own types are subscribed to once the server has offered them ([`Session::offered`]). A NetworkPolicy names groups that
//! workloads carry, so where both change, the server says that workloads follow, and the changes are held until the last
//! of them is here: one without the other would cut connections that both versions allow.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use tulle_proto::names::{
    MORE, TOGETHER, TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_NETWORK_POLICY, TYPE_REQUEST_AUTH, TYPE_ROUTE,
    TYPE_TRAFFIC_POLICY,
};

use crate::state::{Change, OwnType};
use crate::xds::decode::{self, Rejected, Strings};

/// A NACK is read by people and logged; more rejections than fit are counted.
const MAX_NACK_BYTES: usize = 4096;
/// google.rpc.Code.INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;
/// Names that may be asked for on demand. Beyond it the oldest answer is as good as none: connections go without.
const MAX_DEMANDED: usize = 65_536;

/// What a response led to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// For the store, in order.
    pub changes: Vec<Change>,
    /// Resources that cannot be used, and why.
    pub rejected: Vec<Rejected>,
    /// ACK or NACK. `None`: there is no nonce to answer to.
    pub answer: Option<DeltaDiscoveryRequest>,
}

/// See the module's header.
#[derive(Debug)]
pub struct Session {
    node: Node,
    on_demand: bool,
    /// Those that are subscribed to.
    types: Vec<TypeState>,
    /// NetworkPolicies are wanted.
    network_policy: bool,
    /// Changes that take effect with workloads that have not all arrived, and the names of their resources by type.
    held: Vec<Change>,
    held_names: Vec<(&'static str, Arc<str>)>,
    demanded: BTreeSet<Arc<str>>,
    strings: Strings,
}

#[derive(Debug)]
struct TypeState {
    url: &'static str,
    /// Version by name; "" for what is wanted or was rejected.
    known: BTreeMap<Arc<str>, Arc<str>>,
    /// A response of this type was applied since the process started.
    synced: bool,
    /// It is subscribed to on this stream.
    open: bool,
}

impl TypeState {
    fn new(url: &'static str) -> Self {
        Self { url, known: BTreeMap::new(), synced: false, open: false }
    }
}

impl Session {
    /// `on_demand`: workloads and services are sent when asked for, and those of the node. `network_policy`:
    /// NetworkPolicies are taken where they are offered, else ignored.
    pub fn new(node: Node, on_demand: bool, network_policy: bool) -> Self {
        // Policies first: then most workloads find theirs when they arrive.
        let types = vec![TypeState::new(TYPE_AUTHORIZATION), TypeState::new(TYPE_ADDRESS)];
        let (held, held_names) = (Vec::new(), Vec::new());
        let (demanded, strings) = (BTreeSet::new(), Strings::default());
        Self { node, on_demand, types, network_policy, held, held_names, demanded, strings }
    }

    /// The first requests of a stream.
    pub fn open(&mut self) -> Vec<DeltaDiscoveryRequest> {
        // What was held never took effect, so it must come again: known with no version.
        self.held.clear();
        for (url, name) in std::mem::take(&mut self.held_names) {
            if let Some(state) = self.types.iter_mut().find(|state| state.url == url) {
                state.known.insert(name, "".into());
            }
        }
        self.types.iter_mut().for_each(|state| state.open = false);
        let mut first = self.subscribe(TYPE_AUTHORIZATION);
        if let Some(first) = &mut first {
            first.node = Some(self.node.clone());
        }
        first.into_iter().chain(self.subscribe(TYPE_ADDRESS)).collect()
    }

    /// The server offers these own types, by URL: what to tell the store, and what to ask for.
    pub fn offered(&mut self, offered: &[String]) -> (Vec<Change>, Vec<DeltaDiscoveryRequest>) {
        let (mut expected, mut asked) = (Vec::new(), Vec::new());
        for url in own_types(self.network_policy) {
            if !offered.iter().any(|offered| offered == url) {
                continue;
            }
            if self.types.iter().all(|state| state.url != url) {
                self.types.push(TypeState::new(url));
            }
            expected.push(own_type(url).map_or(Change::NetworkPoliciesExpected, Change::OwnExpected));
            asked.extend(self.subscribe(url));
        }
        (expected, asked)
    }

    /// The request that begins the subscription to a type; `None`: it began.
    fn subscribe(&mut self, url: &str) -> Option<DeltaDiscoveryRequest> {
        let on_demand = self.on_demand && url == TYPE_ADDRESS;
        let state = self.types.iter_mut().find(|state| state.url == url && !state.open)?;
        state.open = true;
        let star = || vec!["*".to_owned()];
        // istiod's notation for "nothing until I ask" is both at once. An empty subscription means everything.
        let (mut subscribe, unsubscribe) = if on_demand { (star(), star()) } else { (Vec::new(), Vec::new()) };
        if on_demand {
            subscribe.extend(self.demanded.iter().map(ToString::to_string));
        }
        Some(DeltaDiscoveryRequest {
            type_url: url.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: state.known.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Asks for a workload or service: a uid, `<namespace>/<hostname>` or `<network>/<ip>`. `None`: asked already, not on
    /// demand, or too many.
    pub fn demand(&mut self, name: &str) -> Option<DeltaDiscoveryRequest> {
        if !self.on_demand || self.demanded.contains(name) || self.demanded.len() >= MAX_DEMANDED {
            return None;
        }
        self.demanded.insert(name.into());
        Some(DeltaDiscoveryRequest {
            type_url: TYPE_ADDRESS.to_owned(),
            resource_names_subscribe: vec![name.to_owned()],
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Every subscribed type has been answered since the process started.
    pub fn synced(&self) -> bool {
        self.types.iter().all(|state| state.synced)
    }

    /// Resources known with a version, of all types.
    pub fn known(&self) -> usize {
        self.types.iter().map(|state| state.known.len()).sum()
    }

    /// Takes a response apart. Every resource stands for itself.
    pub fn respond(&mut self, response: DeltaDiscoveryResponse) -> Outcome {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, system_version_info } = response;
        let Some(state) = self.types.iter_mut().find(|state| state.url == type_url) else {
            let reason = "the type was not subscribed to".to_owned();
            let rejected = vec![Rejected { name: type_url.as_str().into(), reason }];
            return Outcome { answer: answer(type_url, nonce, &rejected), rejected, changes: Vec::new() };
        };
        let together = system_version_info.ends_with(TOGETHER);
        let more = system_version_info.trim_end_matches(TOGETHER).ends_with(MORE);
        let hold = together || !self.held.is_empty();
        let mut outcome = Outcome::default();
        // Removals first: a name that is removed and sent in one response was replaced.
        for name in removed_resources {
            let name: Arc<str> = name.into();
            state.known.remove(&name);
            if hold {
                self.held_names.push((state.url, name.clone()));
            }
            outcome.changes.push(match (state.url, own_type(state.url)) {
                (TYPE_ADDRESS, _) => Change::AddressRemoved(name),
                (TYPE_NETWORK_POLICY, _) => Change::NetworkPolicyRemoved(name),
                (_, Some(own)) => Change::OwnRemoved(own, name),
                _ => Change::PolicyRemoved(name),
            });
        }
        for resource in resources {
            let decoded = match state.url {
                TYPE_ADDRESS => decode::address_resource(&resource, &mut self.strings),
                TYPE_NETWORK_POLICY => decode::network_resource(&resource),
                url if own_type(url).is_some() => {
                    decode::own_resource(&resource, url, &self.node.id, &mut self.strings)
                }
                _ => decode::authorization_resource(&resource),
            };
            let (name, version): (Arc<str>, Arc<str>) = match decoded {
                Ok(mut change) => {
                    // The names and versions that the store keeps serve here too.
                    let named = match &mut change {
                        Change::Workload(workload) => {
                            if !self.network_policy {
                                Arc::make_mut(workload).network_policies.clear();
                            }
                            (workload.uid.clone(), workload.version.clone())
                        }
                        Change::Policy(policy) => (policy.id.clone(), policy.version.clone()),
                        _ => (resource.name.into(), resource.version.into()),
                    };
                    outcome.changes.push(change);
                    named
                }
                Err((rejected, stand_in)) => {
                    outcome.changes.extend(stand_in);
                    outcome.rejected.push(rejected);
                    (resource.name.into(), "".into())
                }
            };
            if hold {
                self.held_names.push((state.url, name.clone()));
            }
            state.known.insert(name, version);
        }
        if !state.synced && !more {
            state.synced = true;
            outcome.changes.push(match (state.url, own_type(state.url)) {
                (TYPE_ADDRESS, _) => Change::AddressesSynced,
                (TYPE_NETWORK_POLICY, _) => Change::NetworkPoliciesSynced,
                (_, Some(own)) => Change::OwnSynced(own),
                _ => Change::PoliciesSynced,
            });
        }
        outcome.answer = answer(type_url, nonce, &outcome.rejected);
        if hold {
            self.held.append(&mut outcome.changes);
            // The last part of the workloads lets everything go.
            if !together && !more && state.url == TYPE_ADDRESS {
                outcome.changes = std::mem::take(&mut self.held);
                self.held_names.clear();
            }
        }
        outcome
    }
}

/// Own types that are taken where they are offered, in the order of asking: what decides over requests before what they are
/// decided for.
pub fn own_types(network_policy: bool) -> impl Iterator<Item = &'static str> {
    let network = network_policy.then_some(TYPE_NETWORK_POLICY);
    network.into_iter().chain([TYPE_REQUEST_AUTH, TYPE_TRAFFIC_POLICY, TYPE_ROUTE])
}

/// The types about HTTP.
fn own_type(url: &str) -> Option<OwnType> {
    match url {
        TYPE_ROUTE => Some(OwnType::Route),
        TYPE_TRAFFIC_POLICY => Some(OwnType::TrafficPolicy),
        TYPE_REQUEST_AUTH => Some(OwnType::RequestAuth),
        _ => None,
    }
}

/// An ACK, or a NACK that names what was rejected.
fn answer(type_url: String, nonce: String, rejected: &[Rejected]) -> Option<DeltaDiscoveryRequest> {
    if nonce.is_empty() {
        return None;
    }
    let error_detail = (!rejected.is_empty()).then(|| Status {
        code: INVALID_ARGUMENT,
        message: nack_text(rejected),
        ..Status::default()
    });
    Some(DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..DeltaDiscoveryRequest::default() })
}

fn nack_text(rejected: &[Rejected]) -> String {
    let mut text = String::new();
    for (index, one) in rejected.iter().enumerate() {
        let next = format!("{}{}: {}", if index == 0 { "" } else { "; " }, one.name, one.reason);
        if text.len() + next.len() > MAX_NACK_BYTES {
            if text.is_empty() {
                text = next.chars().take(MAX_NACK_BYTES / 4).collect();
            }
            let more = rejected.len() - index;
            return format!("{text}; and {more} more");
        }
        text.push_str(&next);
    }
    text
}
