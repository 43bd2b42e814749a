//! DestinationRule to TrafficPolicy: its host resolved to Services.
//!
//! A host is a Service of the rule's namespace by its short name, or any Service by a longer one; with `*` in front, every
//! Service whose name ends so. Of several rules of one namespace about one Service the oldest counts. Subsets have no
//! effect: no route of the Gateway API can name one.

use std::collections::BTreeMap;

use tulle_proto::mesh;
use tulle_proto::mesh::hash_key::Key;

use crate::model::{
    Balancer, Condition, DestinationRule, HashKey, Layout, LocalityBalancing, LocalityScope, OutlierDetection, Pings,
    RetryBudget, Service, SuccessRate, TcpKeepalive, TrafficSettings, Warmup, World,
};
use crate::resource::{Kind, Resource};
use crate::translate::route::reference;
use crate::translate::{Settings, age};

/// All rules, with their conditions.
pub(super) fn translate<'w>(
    world: &'w World,
    settings: &Settings,
) -> Vec<(&'w DestinationRule, Option<Resource>, Vec<Condition>)> {
    let mut rules: Vec<&DestinationRule> = world.destination_rules.values().map(|rule| &**rule).collect();
    rules.sort_by_key(|rule| age(&rule.meta));
    // Which rule of a namespace has a Service.
    let mut taken: BTreeMap<(&str, &str, &str), &DestinationRule> = BTreeMap::new();
    let mut translated = Vec::new();
    for rule in rules {
        let named: Vec<&Service> = world
            .services
            .values()
            .map(|service| &**service)
            .filter(|service| !service.external_name && is_meant(rule, service, settings))
            .collect();
        let mut older = None;
        let mut services = Vec::new();
        for service in &named {
            let key = (rule.meta.namespace.as_str(), service.meta.namespace.as_str(), service.meta.name.as_str());
            match taken.get(&key) {
                Some(first) => older = Some(first.meta.path()),
                None => {
                    taken.insert(key, rule);
                    services.push(*service);
                }
            }
        }
        let resource = (!services.is_empty()).then(|| resource(rule, &services, settings));
        translated.push((rule, resource, conditions(rule, named.is_empty(), older)));
    }
    translated
}

fn is_meant(rule: &DestinationRule, service: &Service, settings: &Settings) -> bool {
    let hostname = settings.hostname(&service.meta);
    let host = rule.host.trim_end_matches('.');
    if let Some(suffix) = host.strip_prefix('*') {
        return hostname.ends_with(suffix);
    }
    match host.split_once('.') {
        None => service.meta.name == host && service.meta.namespace == rule.meta.namespace,
        // `cart.shop`, `cart.shop.svc` and the whole name.
        Some(_) => hostname.strip_prefix(host).is_some_and(|rest| {
            let of_two = host.split('.').count() >= 2;
            of_two && (rest.is_empty() || rest.starts_with('.'))
        }),
    }
}

fn conditions(rule: &DestinationRule, nobody: bool, older: Option<String>) -> Vec<Condition> {
    let accepted = match (nobody, older) {
        (true, _) => {
            let message = format!("There is no Service {}", rule.host);
            Condition::failing("Accepted", "HostNotFound", message)
        }
        (false, Some(older)) => {
            let message = format!("DestinationRule {older} of this namespace is older and about the same Service");
            Condition::failing("Accepted", "Conflicted", message)
        }
        (false, None) => Condition::holding("Accepted", "Accepted", "Its host was found".into()),
    };
    let enforced = match rule.ignored.is_empty() {
        true => Condition::holding("Enforced", "Enforced", "Enforced whole".into()),
        false => {
            let message = format!("These fields have no effect: {}", rule.ignored.join(", "));
            Condition::failing("Enforced", "NotEnforcedWhole", message)
        }
    };
    vec![accepted, enforced]
}

fn resource(rule: &DestinationRule, services: &[&Service], settings: &Settings) -> Resource {
    let own = services.iter().all(|service| service.meta.namespace == rule.meta.namespace);
    let scope = if settings.is_root(&rule.meta.namespace) && !rule.own_namespace {
        mesh::TrafficScope::Mesh
    } else if own && !rule.own_namespace {
        mesh::TrafficScope::AllClients
    } else {
        mesh::TrafficScope::OwnNamespace
    };
    let message = mesh::TrafficPolicy {
        namespace: rule.meta.namespace.clone(),
        name: rule.meta.name.clone(),
        services: services.iter().map(|service| reference(service, settings)).collect(),
        scope: scope.into(),
        settings: Some(traffic(&rule.settings)),
        ports: rule.ports.iter().map(|(port, settings)| (u32::from(*port), traffic(settings))).collect(),
    };
    Resource::new(Kind::TrafficPolicy, format!("DestinationRule/{}", rule.meta.path()), &message, Vec::new())
}

fn traffic(from: &TrafficSettings) -> mesh::TrafficSettings {
    let balancer = match &from.balancer {
        Balancer::Default => mesh::Balancer::DefaultBalancer,
        Balancer::RoundRobin => mesh::Balancer::RoundRobin,
        Balancer::Random => mesh::Balancer::Random,
        Balancer::LeastRequest => mesh::Balancer::LeastRequest,
        Balancer::Passthrough => mesh::Balancer::Passthrough,
        Balancer::Hash(_, Layout::Ring(_)) => mesh::Balancer::RingHash,
        Balancer::Hash(_, Layout::Maglev(_)) => mesh::Balancer::Maglev,
    };
    mesh::TrafficSettings {
        max_connections: from.max_connections,
        connect_timeout_ms: from.connect_timeout_ms,
        idle_timeout_ms: from.idle_timeout_ms,
        http_idle_timeout_ms: from.http_idle_timeout_ms,
        max_connection_duration_ms: from.max_connection_duration_ms,
        max_pending_requests: from.max_pending_requests,
        max_requests: from.max_requests,
        max_requests_per_connection: from.max_requests_per_connection,
        max_retries: from.max_retries,
        outlier: from.outlier.as_ref().map(outlier),
        balancer: balancer.into(),
        hash_key: match &from.balancer {
            Balancer::Hash(key, _) => hash_key(key),
            _ => None,
        },
        table_size: match &from.balancer {
            Balancer::Hash(_, Layout::Ring(size) | Layout::Maglev(size)) => *size,
            _ => 0,
        },
        retry_budget: from.retry_budget.as_ref().map(|budget| {
            let RetryBudget { share, least, interval_ms } = *budget;
            mesh::RetryBudget { share, least, interval_ms }
        }),
        warmup: from.warmup.as_ref().map(|warmup| {
            let Warmup { duration_ms, least_percent, aggression } = *warmup;
            mesh::Warmup { duration_ms, least_percent, aggression }
        }),
        max_concurrent_streams: from.max_concurrent_streams,
        locality: from.locality.as_ref().map(locality),
        keepalive: from.keepalive.as_ref().map(|keepalive| {
            let TcpKeepalive { time_ms, interval_ms, probes } = *keepalive;
            mesh::TcpKeepalive { time_ms, interval_ms, probes }
        }),
        pings: from.pings.as_ref().map(|pings| {
            let Pings { interval_ms, timeout_ms } = *pings;
            mesh::Pings { interval_ms, timeout_ms }
        }),
    }
}

fn locality(from: &LocalityBalancing) -> mesh::LocalityBalancing {
    let share = |(place, weight): &(String, u32)| mesh::LocalityShare { place: place.clone(), weight: *weight };
    match from {
        LocalityBalancing::Distribute(list) => mesh::LocalityBalancing {
            distribute: list
                .iter()
                .map(|one| mesh::Distribution { from: one.from.clone(), to: one.to.iter().map(share).collect() })
                .collect(),
            ..Default::default()
        },
        LocalityBalancing::Nearest { scopes, failover } => mesh::LocalityBalancing {
            scopes: scopes.iter().map(|scope| self::scope(*scope).into()).collect(),
            failover: failover
                .iter()
                .map(|(from, to)| mesh::RegionFailover { from: from.clone(), to: to.clone() })
                .collect(),
            ..Default::default()
        },
    }
}

fn scope(from: LocalityScope) -> mesh::LocalityScope {
    match from {
        LocalityScope::Region => mesh::LocalityScope::Region,
        LocalityScope::Zone => mesh::LocalityScope::Zone,
        LocalityScope::Subzone => mesh::LocalityScope::Subzone,
        LocalityScope::Node => mesh::LocalityScope::Node,
        LocalityScope::Cluster => mesh::LocalityScope::Cluster,
        LocalityScope::Network => mesh::LocalityScope::Network,
    }
}

fn hash_key(key: &HashKey) -> Option<mesh::HashKey> {
    let key = match key {
        HashKey::SourceIp => return None,
        HashKey::Header(name) => Key::Header(name.clone()),
        HashKey::Query(name) => Key::Query(name.clone()),
        HashKey::Cookie(cookie) => Key::Cookie(mesh::Cookie {
            name: cookie.name.clone(),
            path: cookie.path.clone(),
            ttl_seconds: cookie.seconds.unwrap_or_default(),
            passive: cookie.seconds.is_none(),
            attributes: cookie.attributes.clone(),
        }),
    };
    Some(mesh::HashKey { key: Some(key) })
}

fn outlier(from: &OutlierDetection) -> mesh::OutlierDetection {
    mesh::OutlierDetection {
        consecutive_5xx: from.consecutive_5xx,
        consecutive_gateway_errors: from.consecutive_gateway_errors,
        consecutive_local_failures: from.consecutive_local_failures,
        split_local_failures: from.split_local_failures,
        interval_ms: from.interval_ms,
        base_ejection_ms: from.base_ejection_ms,
        max_ejection_percent: from.max_ejection_percent,
        min_health_percent: from.min_health_percent,
        success_rate: from.success_rate.as_ref().map(|rate| {
            let SuccessRate { percent, window_ms, least_requests } = *rate;
            mesh::SuccessRate { percent, window_ms, least_requests }
        }),
    }
}
