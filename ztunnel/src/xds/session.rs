//! The delta protocol's client half as a state machine: responses in, changes and requests out, no I/O.
//!
//! It outlives streams: what is known is told to the next server as `initial_resource_versions`, so that only differences
//! travel and removals are not missed. Workloads and services are known by the store, which says them when a stream opens;
//! only what differs from it is remembered here. A rejected resource is named in the NACK, does not hold up the others, and is told
//! with version "" after a reconnect, so that it is sent again or its removal is. Limits: what is remembered is a name and
//! a version per policy that the server sent; a NACK's text has at most [`MAX_NACK_BYTES`].
//!
//! Own types are subscribed to once the server has offered them ([`Session::offered`]). A NetworkPolicy names groups that
//! workloads carry, so where both change, the server says that workloads follow, and the changes are held until the last
//! of them is here: one without the other would cut connections that both versions allow.

use std::collections::BTreeMap;
use std::sync::Arc;

use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use tulle_proto::names::{
    MORE, TOGETHER, TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_EGRESS_POLICY, TYPE_NETWORK_POLICY, TYPE_REQUEST_AUTH,
    TYPE_ROUTE, TYPE_TRAFFIC_POLICY, TYPE_TRUST_BUNDLE,
};

use crate::state::{Change, OwnType, Record, Shapes};
use crate::xds::decode::{self, Rejected, Strings};

/// A NACK is read by people and logged; more rejections than fit are counted.
const MAX_NACK_BYTES: usize = 4096;
/// google.rpc.Code.INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;

/// What a response led to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// For the store, in order.
    pub changes: Vec<Change>,
    /// Resources that cannot be used, and why.
    pub rejected: Vec<Rejected>,
    /// Names that were answered, where not everything is known: those of resources, the addresses that led to them, and
    /// what does not exist.
    pub answered: Vec<String>,
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
    /// More parts of an answer follow, and what was answered so far.
    partial: bool,
    answered: Vec<String>,
    /// Rejections of the parts of a response that were taken so far ([`in_steps`]).
    unanswered: Vec<Rejected>,
    strings: Strings,
    shapes: Shapes,
}

#[derive(Debug)]
struct TypeState {
    url: &'static str,
    /// Version by name; "" for what is wanted or was rejected. Of workloads and services only those.
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
        let (strings, shapes) = (Strings::default(), Shapes::default());
        let (partial, answered, unanswered) = (false, Vec::new(), Vec::new());
        Self {
            node,
            on_demand,
            types,
            network_policy,
            held,
            held_names,
            partial,
            answered,
            unanswered,
            strings,
            shapes,
        }
    }

    /// The first requests of a stream. `addresses`: names and versions of the workloads and services in the store.
    /// `demanded`: what is asked for, if not everything.
    pub fn open(
        &mut self,
        addresses: impl IntoIterator<Item = (String, String)>,
        demanded: &[Arc<str>],
    ) -> Vec<DeltaDiscoveryRequest> {
        self.unanswered.clear();
        self.answered.clear();
        self.partial = false;
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
        let mut second = self.subscribe(TYPE_ADDRESS);
        if let Some(second) = &mut second {
            for (name, version) in addresses {
                second.initial_resource_versions.entry(name).or_insert(version);
            }
            if self.on_demand {
                second.resource_names_subscribe.extend(demanded.iter().map(ToString::to_string));
            }
        }
        first.into_iter().chain(second).collect()
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
        let (subscribe, unsubscribe) = if on_demand { (star(), star()) } else { (Vec::new(), Vec::new()) };
        Some(DeltaDiscoveryRequest {
            type_url: url.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: state.known.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Parts of an answer are missing, where not everything is known. A service that is known before its endpoints would be
    /// one without any, so nothing is to take effect before they are here.
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Every subscribed type has been answered since the process started.
    pub fn synced(&self) -> bool {
        self.types.iter().all(|state| state.synced)
    }

    /// Takes a response apart. Every resource stands for itself.
    pub fn respond(&mut self, response: DeltaDiscoveryResponse) -> Outcome {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, system_version_info } = response;
        let addresses_synced = self.types.iter().any(|state| state.url == TYPE_ADDRESS && state.synced);
        let Some(state) = self.types.iter_mut().find(|state| state.url == type_url) else {
            let reason = "the type was not subscribed to".to_owned();
            let rejected = vec![Rejected { name: type_url.as_str().into(), reason }];
            return Outcome { answer: answer(type_url, nonce, &rejected), rejected, ..Outcome::default() };
        };
        let together = system_version_info.ends_with(TOGETHER);
        let more = system_version_info.trim_end_matches(TOGETHER).ends_with(MORE);
        // Before the first state is complete nothing is decided, and nothing that is half there can do harm.
        let hold = (together && addresses_synced) || !self.held.is_empty();
        let mut outcome = Outcome::default();
        if self.on_demand && state.url == TYPE_ADDRESS {
            let sent = resources.iter().flat_map(|resource| resource.aliases.iter().chain([&resource.name]));
            self.answered.extend(sent.chain(&removed_resources).cloned());
            self.partial = more;
            if !more {
                outcome.answered = std::mem::take(&mut self.answered);
            }
        }
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
            let good = decoded.is_ok();
            match decoded {
                Ok(Change::Workload(mut workload)) => {
                    if !self.network_policy {
                        Arc::make_mut(&mut workload).network_policies.clear();
                    }
                    // Packed one by one, so that a large response is never here unpacked.
                    outcome.changes.push(Change::Record(Record::pack(&workload, &mut self.shapes).into()));
                }
                Ok(change) => outcome.changes.push(change),
                Err((rejected, stand_in)) => {
                    outcome.changes.extend(stand_in);
                    outcome.rejected.push(rejected);
                }
            }
            if hold {
                self.held_names.push((state.url, resource.name.as_str().into()));
            }
            if good && state.url == TYPE_ADDRESS {
                state.known.remove(&*resource.name);
            } else {
                let version = if good { resource.version.as_str() } else { "" };
                state.known.insert(resource.name.into(), version.into());
            }
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
        let mut rejected = std::mem::take(&mut self.unanswered);
        rejected.extend_from_slice(&outcome.rejected);
        if more && nonce.is_empty() {
            self.unanswered = rejected;
        } else {
            outcome.answer = answer(type_url, nonce, &rejected);
        }
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
    [TYPE_TRUST_BUNDLE].into_iter().chain(network).chain([
        TYPE_REQUEST_AUTH,
        TYPE_EGRESS_POLICY,
        TYPE_TRAFFIC_POLICY,
        TYPE_ROUTE,
    ])
}

/// The types whose changes say of which they are.
fn own_type(url: &str) -> Option<OwnType> {
    match url {
        TYPE_ROUTE => Some(OwnType::Route),
        TYPE_TRAFFIC_POLICY => Some(OwnType::TrafficPolicy),
        TYPE_REQUEST_AUTH => Some(OwnType::RequestAuth),
        TYPE_TRUST_BUNDLE => Some(OwnType::TrustBundle),
        TYPE_EGRESS_POLICY => Some(OwnType::EgressPolicy),
        _ => None,
    }
}

/// Asks for more names of workloads and services, and for some no longer.
pub(super) fn demand(subscribe: &[Arc<str>], unsubscribe: &[Arc<str>]) -> DeltaDiscoveryRequest {
    let names = |list: &[Arc<str>]| list.iter().map(ToString::to_string).collect();
    DeltaDiscoveryRequest {
        type_url: TYPE_ADDRESS.to_owned(),
        resource_names_subscribe: names(subscribe),
        resource_names_unsubscribe: names(unsubscribe),
        ..DeltaDiscoveryRequest::default()
    }
}

/// A large response as smaller ones that mean the same, of at most `size` resources. The answer comes with the last.
pub(super) fn in_steps(response: DeltaDiscoveryResponse, size: usize) -> impl Iterator<Item = DeltaDiscoveryResponse> {
    let DeltaDiscoveryResponse { type_url, mut nonce, resources, removed_resources, system_version_info } = response;
    let (together, version) = match system_version_info.strip_suffix(TOGETHER) {
        Some(version) => (true, version.to_owned()),
        None => (false, system_version_info),
    };
    let (mut resources, mut removed) = (resources.into_iter(), Some(removed_resources));
    std::iter::from_fn(move || {
        if removed.is_none() && resources.len() == 0 {
            return None;
        }
        let part: Vec<_> = resources.by_ref().take(size).collect();
        let mut system_version_info = version.clone();
        if resources.len() > 0 {
            system_version_info.push(MORE);
        }
        if together {
            system_version_info.push(TOGETHER);
        }
        Some(DeltaDiscoveryResponse {
            system_version_info,
            resources: part,
            type_url: type_url.clone(),
            nonce: if resources.len() > 0 { String::new() } else { std::mem::take(&mut nonce) },
            removed_resources: removed.take().unwrap_or_default(),
        })
    })
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
