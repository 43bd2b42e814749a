//! HTTPRoute and GRPCRoute to Route: every reference to a Service resolved, with the conditions of each parent.
//!
//! GAMMA: a route whose parent is a Service decides that Service's traffic, for all clients where both are of one namespace, else
//! for clients of the route's. Where HTTPRoutes and GRPCRoutes meet at one port for the same clients, the GRPCRoutes count.
//! Backends of other namespaces need no ReferenceGrant: a client could reach them anyway. A rule that cannot be carried out is
//! sent as one that answers 500, and a backend that is not there as an invalid share. Parents that are no Services are left
//! to those whose they are.

use std::collections::BTreeSet;

use tulle_proto::mesh;
use tulle_proto::mesh::path_change::Change;
use tulle_proto::mesh::route_filter::Filter;
use tulle_proto::mesh::{route_path, route_value};

use crate::model::{
    BackendRef, Condition, HeaderChanges, ParentRef, ParentStatus, PathChange, PathMatch, Route, RouteFilter,
    RouteKind, RouteMatch, RouteRule, Service, Wanted, World,
};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;

/// What became of one route.
pub(super) struct Translated {
    /// `None`: it is no route of the mesh.
    pub(super) resource: Option<Resource>,
    pub(super) parents: Vec<ParentStatus>,
}

/// Ports at which GRPCRoutes decide: (namespace of the Service, its name, port, namespace of the clients or "").
pub(super) type GrpcPorts = BTreeSet<(String, String, u16, String)>;

/// See [`GrpcPorts`].
pub(super) fn grpc_ports(world: &World) -> GrpcPorts {
    let mut ports = GrpcPorts::new();
    for route in world.routes.values().filter(|route| route.kind == RouteKind::Grpc) {
        for parent in route.parents.iter().filter(|parent| parent.is_service()) {
            if let Ok((service, found)) = attach(route, parent, world) {
                ports.extend(found.into_iter().map(|port| place(route, service, port)));
            }
        }
    }
    ports
}

fn place(route: &Route, service: &Service, port: u16) -> (String, String, u16, String) {
    let producer = route.meta.namespace == service.meta.namespace;
    let clients = if producer { String::new() } else { route.meta.namespace.clone() };
    (service.meta.namespace.clone(), service.meta.name.clone(), port, clients)
}

pub(super) fn translate(route: &Route, grpc_ports: &GrpcPorts, world: &World, settings: &Settings) -> Translated {
    let ours = || route.parents.iter().filter(|parent| parent.is_service());
    if ours().next().is_none() {
        return Translated { resource: None, parents: Vec::new() };
    }
    let mut unresolved: Option<(&'static str, String)> = None;
    let rules: Vec<mesh::RouteRule> =
        route.rules.iter().map(|one| rule(route, one, &mut unresolved, world, settings)).collect();
    let problem = rules.iter().map(|rule| &rule.broken).find(|broken| !broken.is_empty());
    let mut parents = Vec::new();
    let mut status = Vec::new();
    for parent in ours() {
        let attached = attach(route, parent, world).and_then(|(service, mut ports)| {
            if route.kind == RouteKind::Http {
                ports.retain(|port| !grpc_ports.contains(&place(route, service, *port)));
            }
            match ports.is_empty() {
                true => {
                    Err(("Conflicted", "GRPCRoutes decide for the port, and only one kind of route does".to_owned()))
                }
                false => Ok((service, ports)),
            }
        });
        let accepted = match (attached, problem) {
            (Err((reason, message)), _) => Condition::failing("Accepted", reason, message),
            (Ok((service, ports)), problem) => {
                parents.push(mesh::RouteParent {
                    service: Some(reference(service, settings)),
                    ports: ports.into_iter().map(u32::from).collect(),
                });
                match problem {
                    Some(problem) => {
                        let message =
                            format!("Requests of a rule that cannot be carried out are answered 500: {problem}");
                        Condition::failing("Accepted", "UnsupportedValue", message)
                    }
                    None => Condition::holding("Accepted", "Accepted", "Decides the traffic of the Service".into()),
                }
            }
        };
        let resolved = match &unresolved {
            Some((reason, message)) => Condition::failing("ResolvedRefs", reason, message.clone()),
            None => Condition::holding("ResolvedRefs", "ResolvedRefs", "Every reference was resolved".into()),
        };
        status.push(ParentStatus { parent_ref: parent.clone(), conditions: vec![accepted, resolved] });
    }
    let message = mesh::Route {
        namespace: route.meta.namespace.clone(),
        name: route.meta.name.clone(),
        kind: match route.kind {
            RouteKind::Http => mesh::RouteKind::Http.into(),
            RouteKind::Grpc => mesh::RouteKind::Grpc.into(),
        },
        created: route.meta.created,
        parents,
        rules,
    };
    let name = format!("{}/{}", route.kind.name(), route.meta.path());
    Translated { resource: Some(Resource::new(Kind::Route, name, &message, Vec::new())), parents: status }
}

/// The Service of a parent and the ports that it means, or the reason and message of `Accepted`.
fn attach<'w>(
    route: &Route,
    parent: &ParentRef,
    world: &'w World,
) -> Result<(&'w Service, Vec<u16>), (&'static str, String)> {
    let namespace = parent.namespace.as_deref().unwrap_or(&route.meta.namespace);
    let key = (namespace.to_owned(), parent.name.clone());
    let Some(service) = world.services.get(&key) else {
        return Err(("NoMatchingParent", format!("There is no Service {namespace}/{}", parent.name)));
    };
    if service.external_name || service.addresses.is_empty() {
        let message =
            format!("Service {namespace}/{} has no cluster address, by which its traffic is known", parent.name);
        return Err(("UnsupportedValue", message));
    }
    let ports: Vec<u16> = service
        .ports
        .iter()
        .filter(|port| parent.port.is_none_or(|wanted| wanted == port.port))
        .filter(|port| parent.section_name.as_ref().is_none_or(|wanted| *wanted == port.name))
        .map(|port| port.port)
        .collect();
    if ports.is_empty() {
        let message = format!("Service {namespace}/{} has no TCP port that the reference means", parent.name);
        return Err(("NoMatchingParent", message));
    }
    Ok((service, ports))
}

pub(super) fn reference(service: &Service, settings: &Settings) -> mesh::ServiceRef {
    mesh::ServiceRef { namespace: service.meta.namespace.clone(), hostname: settings.hostname(&service.meta) }
}

type Unresolved = Option<(&'static str, String)>;

fn rule(
    route: &Route,
    rule: &RouteRule,
    unresolved: &mut Unresolved,
    world: &World,
    settings: &Settings,
) -> mesh::RouteRule {
    let mut broken = rule.problem.clone().unwrap_or_default();
    let mut filters = Vec::new();
    for one in &rule.filters {
        match filter(route, one, unresolved, world, settings) {
            Ok(filter) => filters.push(filter),
            Err(why) if broken.is_empty() => broken = why,
            Err(_) => {}
        }
    }
    let mut backends = Vec::new();
    for backend in &rule.backends {
        let found = resolve(route, backend, world);
        let mut of_backend = Vec::new();
        for one in &backend.filters {
            match filter(route, one, unresolved, world, settings) {
                Ok(filter) => of_backend.push(filter),
                Err(why) if broken.is_empty() => broken = why,
                Err(_) => {}
            }
        }
        let invalid = found.as_ref().err().map(|(_, message)| message.clone()).unwrap_or_default();
        *unresolved = unresolved.take().or_else(|| found.as_ref().err().cloned());
        backends.push(mesh::RouteBackend {
            service: found.ok().map(|service| reference(service, settings)),
            port: backend.port.unwrap_or_default().into(),
            weight: backend.weight,
            filters: of_backend,
            invalid,
        });
    }
    mesh::RouteRule {
        name: rule.name.clone(),
        matches: rule.matches.iter().map(route_match).collect(),
        filters,
        backends,
        request_timeout_ms: rule.request_timeout_ms,
        backend_request_timeout_ms: rule.backend_timeout_ms,
        retry: rule.retry.as_ref().map(|retry| mesh::RouteRetry {
            attempts: retry.attempts,
            codes: retry.codes.iter().map(|code| u32::from(*code)).collect(),
            backoff_ms: retry.backoff_ms,
            any_method: route.meta.annotation("tulle.dev/retry-any-method") == Some("true"),
        }),
        session: rule.session.as_ref().map(|session| mesh::RouteSession {
            name: session.name.clone(),
            header: session.header,
            permanent: session.permanent,
            absolute_ms: session.absolute_ms,
            idle_ms: session.idle_ms,
        }),
        broken,
    }
}

fn resolve<'w>(route: &Route, backend: &BackendRef, world: &'w World) -> Result<&'w Service, (&'static str, String)> {
    let group = backend.group.as_str();
    if backend.kind != "Service" || !matches!(group, "" | "core") {
        return Err(("InvalidKind", format!("A backend is a Service, and not a {} of {group:?}", backend.kind)));
    }
    let namespace = if backend.namespace.is_empty() { &route.meta.namespace } else { &backend.namespace };
    let missing = |what: &str| ("BackendNotFound", format!("{what} {namespace}/{}", backend.name));
    let service = world.services.get(&(namespace.clone(), backend.name.clone()));
    let service = service.ok_or_else(|| missing("There is no Service"))?;
    let Some(port) = backend.port else {
        return Err(("BackendNotFound", format!("No port of Service {namespace}/{} is named", backend.name)));
    };
    if service.external_name || !service.ports.iter().any(|known| known.port == port) {
        return Err(missing(&format!("There is no TCP port {port} at Service")));
    }
    Ok(service)
}

fn filter(
    route: &Route,
    filter: &RouteFilter,
    unresolved: &mut Unresolved,
    world: &World,
    settings: &Settings,
) -> Result<mesh::RouteFilter, String> {
    let filter = match filter {
        RouteFilter::RequestHeaders(changes) => Filter::RequestHeaders(header_changes(changes)),
        RouteFilter::ResponseHeaders(changes) => Filter::ResponseHeaders(header_changes(changes)),
        RouteFilter::Redirect { scheme, hostname, port, path, status } => Filter::Redirect(mesh::Redirect {
            scheme: scheme.clone(),
            hostname: hostname.clone(),
            port: port.unwrap_or_default().into(),
            path: path.as_ref().map(path_change),
            status: (*status).into(),
        }),
        RouteFilter::Rewrite { hostname, path } => {
            Filter::Rewrite(mesh::Rewrite { hostname: hostname.clone(), path: path.as_ref().map(path_change) })
        }
        RouteFilter::Mirror { to, share: (numerator, denominator) } => {
            let found = resolve(route, to, world);
            *unresolved = unresolved.take().or_else(|| found.as_ref().err().cloned());
            Filter::Mirror(mesh::Mirror {
                invalid: found.as_ref().err().map(|(_, message)| message.clone()).unwrap_or_default(),
                service: found.ok().map(|service| reference(service, settings)),
                port: to.port.unwrap_or_default().into(),
                numerator: *numerator,
                denominator: *denominator,
            })
        }
        RouteFilter::Cors(cors) => Filter::Cors(mesh::Cors {
            origins: cors.origins.clone(),
            credentials: cors.credentials,
            methods: cors.methods.clone(),
            headers: cors.headers.clone(),
            expose: cors.expose.clone(),
            max_age_seconds: cors.max_age,
        }),
        RouteFilter::Extension { group, kind, name } => {
            extension(route, group, kind, name, world).ok_or_else(|| {
                format!("there is no {kind} of {group:?} named {}/{name} that a route could use", route.meta.namespace)
            })?
        }
    };
    Ok(mesh::RouteFilter { filter: Some(filter) })
}

fn extension(route: &Route, group: &str, kind: &str, name: &str, world: &World) -> Option<Filter> {
    let key = (route.meta.namespace.clone(), name.to_owned());
    match (group, kind) {
        ("tulle.dev", "HTTPFault") => world.http_faults.get(&key).map(|fault| {
            let (delay_ms, delay_millionths) = fault.delay.unwrap_or_default();
            let (status, grpc, abort_millionths) = fault.abort.unwrap_or_default();
            Filter::Fault(mesh::Fault {
                delay_ms,
                delay_millionths,
                abort_status: status.into(),
                abort_grpc_status: grpc,
                abort_millionths,
            })
        }),
        ("tulle.dev", "HTTPRateLimit") => world.http_rate_limits.get(&key).map(|limit| {
            Filter::RateLimit(mesh::RateLimit {
                name: limit.meta.path(),
                requests: limit.requests,
                interval_ms: limit.interval_ms,
                burst: limit.burst,
                per_identity: limit.per_identity,
            })
        }),
        _ => None,
    }
}

fn header_changes(changes: &HeaderChanges) -> mesh::HeaderChanges {
    let pair = |(name, value): &(String, String)| mesh::Header { name: name.clone(), value: value.clone() };
    mesh::HeaderChanges {
        set: changes.set.iter().map(pair).collect(),
        add: changes.add.iter().map(pair).collect(),
        remove: changes.remove.clone(),
    }
}

fn path_change(change: &PathChange) -> mesh::PathChange {
    mesh::PathChange {
        change: Some(match change {
            PathChange::Full(full) => Change::Full(full.clone()),
            PathChange::Prefix(prefix) => Change::Prefix(prefix.clone()),
        }),
    }
}

fn route_match(wanted: &RouteMatch) -> mesh::RouteMatch {
    let value = |(name, wanted): &(String, Wanted)| mesh::RouteValue {
        name: name.clone(),
        value: Some(match wanted {
            Wanted::Exact(text) => route_value::Value::Exact(text.clone()),
            Wanted::Regex(text) => route_value::Value::Regex(text.clone()),
        }),
    };
    mesh::RouteMatch {
        path: wanted.path.as_ref().map(|path| mesh::RoutePath {
            path: Some(match path {
                PathMatch::Exact(text) => route_path::Path::Exact(text.clone()),
                PathMatch::Prefix(text) => route_path::Path::Prefix(text.clone()),
                PathMatch::Regex(text) => route_path::Path::Regex(text.clone()),
            }),
        }),
        method: wanted.method.clone(),
        headers: wanted.headers.iter().map(value).collect(),
        query: wanted.query.iter().map(value).collect(),
        grpc: wanted.grpc.as_ref().map(|(service, method, regex)| mesh::GrpcMethod {
            service: service.clone(),
            method: method.clone(),
            regex: *regex,
        }),
    }
}
