//! What is known of HTTP and of the way out: routes by Service, traffic policies by Service, RequestAuthentications and
//! EgressPolicies by name.
//!
//! Kept apart from the rest of the snapshot and shared as one: there are few of these objects and they change rarely, so a
//! change rebuilds the lists of the Services that it touches, in the order in which a request tries them, and a request only
//! walks a list. Counters of rules outlive edits: a new version of a route takes over those of the rules that it still has.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::state::{
    EgressPolicy, PathMatch, RequestAuth, Route, RouteMatch, RouteRule, Service, ServiceName, Snapshot, TrafficPolicy,
    TrafficScope, TrafficSettings,
};

/// One match of one rule, in the order in which requests try them.
#[derive(Clone, Debug)]
pub struct RouteEntry {
    /// The route.
    pub route: Arc<Route>,
    /// Index of its rule.
    pub rule: usize,
    /// Index of the rule's match.
    pub matched: usize,
}

impl RouteEntry {
    /// Its rule.
    pub fn rule(&self) -> &RouteRule {
        &self.route.rules[self.rule]
    }

    /// Its match.
    pub fn wanted(&self) -> &RouteMatch {
        &self.rule().matches[self.matched]
    }

    /// Smaller comes first: Gateway API's order of precedence. A regular expression comes after every prefix but `/`, which
    /// matches everything.
    fn rank(&self) -> impl Ord + use<> {
        let wanted = self.wanted();
        let path = match &wanted.path {
            PathMatch::Exact(path) => (0, path.len(), 0),
            PathMatch::Grpc { service, method } => {
                let length = |part: &Option<crate::state::Wanted>| match part {
                    Some(crate::state::Wanted::Exact(text)) => text.len() + 1,
                    Some(crate::state::Wanted::Regex(_)) => 1,
                    None => 0,
                };
                (1, length(service), length(method))
            }
            PathMatch::Prefix(prefix) => (2, prefix.len(), 0),
            PathMatch::Regex(_) => (3, 0, 0),
            PathMatch::Any => (4, 0, 0),
        };
        (
            path.0,
            std::cmp::Reverse((path.1, path.2)),
            wanted.method.is_none(),
            std::cmp::Reverse((wanted.headers.len(), wanted.query.len())),
            self.route.created,
            self.route.id.clone(),
            (self.rule, self.matched),
        )
    }
}

/// The routes of one port.
#[derive(Clone, Debug, Default)]
struct PortRoutes {
    producer: Option<Arc<[RouteEntry]>>,
    /// By the namespace of the clients.
    consumers: BTreeMap<Arc<str>, Arc<[RouteEntry]>>,
}

/// Something of each Service that has it, by the Service's host name, then by its namespace.
type ByNamespace<T> = HashMap<Arc<str>, Vec<(Arc<str>, T)>>;

/// See the module's header.
#[derive(Clone, Debug, Default)]
pub(super) struct L7 {
    routes: BTreeMap<Arc<str>, Arc<Route>>,
    /// By host name, then namespace, then port.
    by_service: ByNamespace<BTreeMap<u16, PortRoutes>>,
    traffic: BTreeMap<Arc<str>, Arc<TrafficPolicy>>,
    traffic_of: ByNamespace<Vec<Arc<TrafficPolicy>>>,
    request_auths: BTreeMap<Arc<str>, Arc<RequestAuth>>,
    egress: BTreeMap<Arc<str>, Arc<EgressPolicy>>,
}

impl L7 {
    /// Takes a route in the place of another version of it. `false`: it is that version.
    pub(super) fn put_route(&mut self, mut route: Arc<Route>) -> bool {
        let old = self.routes.get(&route.id).cloned();
        if old.as_ref().is_some_and(|old| old.version == route.version && !old.version.is_empty()) {
            return false;
        }
        if let Some(old) = &old {
            let counted: HashMap<_, _> =
                old.rules.iter().enumerate().map(|(index, rule)| (rule.key(index), &rule.turns)).collect();
            for (index, rule) in Arc::make_mut(&mut route).rules.iter_mut().enumerate() {
                if let Some(turns) = counted.get(&rule.key(index)) {
                    rule.turns = Arc::clone(turns);
                }
            }
        }
        let touched = services_of(old.as_deref().into_iter().chain([&*route]));
        self.routes.insert(route.id.clone(), route);
        touched.iter().for_each(|service| self.index_routes(service));
        true
    }

    pub(super) fn remove_route(&mut self, id: &str) -> bool {
        let Some(old) = self.routes.remove(id) else { return false };
        services_of([&*old]).iter().for_each(|service| self.index_routes(service));
        true
    }

    /// Makes the lists of one Service anew.
    fn index_routes(&mut self, service: &ServiceName) {
        let mut producer: BTreeMap<u16, Vec<RouteEntry>> = BTreeMap::new();
        let mut consumers: BTreeMap<(u16, Arc<str>), Vec<RouteEntry>> = BTreeMap::new();
        for route in self.routes.values() {
            let parents = route.parents.iter().filter(|parent| parent.service == *service);
            let ports: BTreeSet<u16> = parents.flat_map(|parent| parent.ports.iter().copied()).collect();
            for port in ports {
                let list = match route.namespace == service.namespace {
                    true => producer.entry(port).or_default(),
                    false => consumers.entry((port, route.namespace.clone())).or_default(),
                };
                let of_rule = |rule: usize| (0..route.rules[rule].matches.len()).map(move |matched| (rule, matched));
                let all = (0..route.rules.len()).flat_map(of_rule);
                list.extend(all.map(|(rule, matched)| RouteEntry { route: route.clone(), rule, matched }));
            }
        }
        let ordered = |mut list: Vec<RouteEntry>| {
            list.sort_by_cached_key(RouteEntry::rank);
            Arc::<[RouteEntry]>::from(list)
        };
        let mut ports: BTreeMap<u16, PortRoutes> = BTreeMap::new();
        for (port, list) in producer {
            ports.entry(port).or_default().producer = Some(ordered(list));
        }
        for ((port, namespace), list) in consumers {
            ports.entry(port).or_default().consumers.insert(namespace, ordered(list));
        }
        set(&mut self.by_service, service, (!ports.is_empty()).then_some(ports));
    }

    pub(super) fn put_traffic(&mut self, policy: Arc<TrafficPolicy>) -> bool {
        let old = self.traffic.insert(policy.id.clone(), policy.clone());
        if old.as_ref() == Some(&policy) {
            return false;
        }
        let touched: BTreeSet<ServiceName> =
            old.iter().chain([&policy]).flat_map(|policy| policy.services.iter().cloned()).collect();
        touched.iter().for_each(|service| self.index_traffic(service));
        true
    }

    pub(super) fn remove_traffic(&mut self, id: &str) -> bool {
        let Some(old) = self.traffic.remove(id) else { return false };
        old.services.iter().for_each(|service| self.index_traffic(service));
        true
    }

    fn index_traffic(&mut self, service: &ServiceName) {
        let about = self.traffic.values().filter(|policy| policy.services.contains(service));
        let mut list: Vec<Arc<TrafficPolicy>> = about.cloned().collect();
        // The map's order settles the rest.
        list.sort_by_key(|policy| policy.scope);
        set(&mut self.traffic_of, service, (!list.is_empty()).then_some(list));
    }

    pub(super) fn put_request_auth(&mut self, auth: Arc<RequestAuth>) -> bool {
        let old = self.request_auths.insert(auth.id.clone(), auth.clone());
        old != Some(auth)
    }

    /// A stand-in takes the place of nothing that can be read.
    pub(super) fn reject_request_auth(&mut self, stand_in: Arc<RequestAuth>) -> bool {
        let held = self.request_auths.get(&stand_in.id);
        held.is_none_or(|held| held.unreadable.is_some()) && self.put_request_auth(stand_in)
    }

    pub(super) fn remove_request_auth(&mut self, id: &str) -> bool {
        self.request_auths.remove(id).is_some()
    }

    pub(super) fn put_egress(&mut self, policy: Arc<EgressPolicy>) -> bool {
        let old = self.egress.insert(policy.id.clone(), policy.clone());
        old != Some(policy)
    }

    /// A stand-in takes the place of nothing that can be read.
    pub(super) fn reject_egress(&mut self, stand_in: Arc<EgressPolicy>) -> bool {
        let held = self.egress.get(&stand_in.id);
        held.is_none_or(|held| held.unreadable.is_some()) && self.put_egress(stand_in)
    }

    pub(super) fn remove_egress(&mut self, id: &str) -> bool {
        self.egress.remove(id).is_some()
    }

    pub(super) fn egress_policy(&self, id: &str) -> Option<&Arc<EgressPolicy>> {
        self.egress.get(id)
    }

    pub(super) fn request_auth(&self, id: &str) -> Option<&Arc<RequestAuth>> {
        self.request_auths.get(id)
    }
}

fn services_of<'a>(routes: impl IntoIterator<Item = &'a Route>) -> BTreeSet<ServiceName> {
    routes.into_iter().flat_map(|route| &route.parents).map(|parent| parent.service.clone()).collect()
}

fn set<T>(map: &mut HashMap<Arc<str>, Vec<(Arc<str>, T)>>, service: &ServiceName, value: Option<T>) {
    let of_name = map.entry(service.hostname.clone()).or_default();
    of_name.retain(|(namespace, _)| *namespace != service.namespace);
    of_name.extend(value.map(|value| (service.namespace.clone(), value)));
    if of_name.is_empty() {
        map.remove(&service.hostname);
    }
}

fn get<'a, T>(map: &'a HashMap<Arc<str>, Vec<(Arc<str>, T)>>, service: &Service) -> Option<&'a T> {
    let of_name = map.get(&service.hostname)?;
    of_name.iter().find(|(namespace, _)| *namespace == service.namespace).map(|(_, value)| value)
}

impl Snapshot {
    /// What decides the requests of a client of `client_namespace` to a port of a Service, in order of precedence. `None`:
    /// there are no routes, and bytes go through as they are. A request that none matches is answered 404.
    pub fn routes_for(&self, service: &Service, port: u16, client_namespace: &str) -> Option<&Arc<[RouteEntry]>> {
        let routes = get(&self.l7.by_service, service)?.get(&port)?;
        routes.consumers.get(client_namespace).or(routes.producer.as_ref())
    }

    /// How a client of `client_namespace` talks to a port of a Service: the policy, and its settings for that port.
    pub fn traffic_for(
        &self,
        service: &Service,
        port: u16,
        client_namespace: &str,
    ) -> Option<(&Arc<TrafficPolicy>, &TrafficSettings)> {
        let list = get(&self.l7.traffic_of, service)?;
        let applies = |policy: &&Arc<TrafficPolicy>| {
            policy.scope != TrafficScope::OwnNamespace || *policy.namespace == *client_namespace
        };
        // The client's own namespace first, whatever it says of others.
        let own = list.iter().find(|policy| *policy.namespace == *client_namespace);
        own.or_else(|| list.iter().find(applies)).map(|policy| (policy, policy.at(port)))
    }

    /// Whether anything is said of HTTP to a Service's port.
    pub fn speaks_of_http(&self, service: &Service, port: u16, client_namespace: &str) -> bool {
        self.routes_for(service, port, client_namespace).is_some()
            || self.traffic_for(service, port, client_namespace).is_some()
    }

    /// A route in force, by resource name.
    pub fn route(&self, id: &str) -> Option<&Arc<Route>> {
        self.l7.routes.get(id)
    }

    /// Every route in force, by resource name.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.l7.routes.values()
    }

    /// An EgressPolicy or ServiceEntry in force, by resource name.
    pub fn egress_policy(&self, id: &str) -> Option<&Arc<EgressPolicy>> {
        self.l7.egress_policy(id)
    }

    /// A RequestAuthentication in force, by resource name.
    pub fn request_auth(&self, id: &str) -> Option<&Arc<RequestAuth>> {
        self.l7.request_auth(id)
    }
}
