//! Resources as JSON for `/debug/resources` and `tulle get`: addresses as text, enums by name.
//!
//! Made from the encoded bytes, so that what is shown is what was sent. Empty fields are left out.

use std::net::IpAddr;

use prost::Message;
use serde_json::{Map, Value, json};
use tulle_proto::mesh;
use tulle_proto::names;
use tulle_proto::security;
use tulle_proto::tulle_workload;
use tulle_proto::workload;

use crate::resource::{Kind, Resource};

/// The resource with its name and version.
pub fn resource(resource: &Resource) -> Value {
    let view = match resource.kind {
        Kind::Address => workload::Address::decode(resource.body.clone()).map(|address| match address.r#type {
            Some(workload::address::Type::Workload(w)) => json!({"workload": workload(&w)}),
            Some(workload::address::Type::Service(s)) => json!({"service": service(&s)}),
            None => Value::Null,
        }),
        Kind::Authorization => security::Authorization::decode(resource.body.clone()).map(|a| authorization(&a)),
        Kind::TrustBundle => mesh::TrustBundle::decode(resource.body.clone()).map(|bundle| {
            json!({
                "trustDomain": bundle.trust_domain,
                "roots": bundle.roots.iter().map(|root| tulle_certs::fingerprint(root)).collect::<Vec<_>>(),
            })
        }),
        Kind::NetworkPolicy => mesh::NetworkPolicy::decode(resource.body.clone()).map(|p| network_policy(&p)),
        Kind::Route => mesh::Route::decode(resource.body.clone()).map(|route| plain(&route)),
        Kind::TrafficPolicy => mesh::TrafficPolicy::decode(resource.body.clone()).map(|policy| plain(&policy)),
        Kind::EgressPolicy => mesh::EgressPolicy::decode(resource.body.clone()).map(|policy| egress(&policy)),
        Kind::RequestAuth => mesh::RequestAuth::decode(resource.body.clone()).map(|auth| plain(&auth)),
    };
    json!({
        "type": resource.kind.short(),
        "name": &*resource.name,
        "version": &*resource.version,
        "resource": view.unwrap_or(Value::Null),
    })
}

/// As it is, without what is empty.
fn plain(message: &impl serde::Serialize) -> Value {
    fn bare(value: Value) -> Value {
        match value {
            Value::Object(map) => {
                let bared =
                    map.into_iter().map(|(key, value)| (key, bare(value))).filter(|(_, value)| *value != json!(0));
                pruned(Value::Object(bared.collect()))
            }
            Value::Array(list) => list.into_iter().map(bare).collect(),
            other => other,
        }
    }
    serde_json::to_value(message).map(bare).unwrap_or_default()
}

/// Address bytes as text.
pub fn ip(bytes: &[u8]) -> String {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(four).to_string()
    } else if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        IpAddr::from(sixteen).to_string()
    } else {
        format!("{} bytes", bytes.len())
    }
}

fn pruned(value: Value) -> Value {
    let Value::Object(map) = value else {
        return value;
    };
    let is_empty = |v: &Value| match v {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::Bool(b) => !b,
        Value::Number(_) => false,
    };
    Value::Object(map.into_iter().filter(|(_, v)| !is_empty(v)).collect())
}

fn workload(w: &workload::Workload) -> Value {
    let info = w
        .extensions
        .iter()
        .find(|e| e.name == names::EXTENSION_WORKLOAD)
        .and_then(|e| e.config.as_ref())
        .and_then(|any| tulle_workload::WorkloadInfo::decode(any.value.as_slice()).ok())
        .unwrap_or_default();
    let services: Map<String, Value> =
        w.services.iter().map(|(name, list)| (name.clone(), ports(&list.ports))).collect();
    pruned(json!({
        "uid": w.uid,
        "name": w.name,
        "namespace": w.namespace,
        "addresses": w.addresses.iter().map(|a| ip(a)).collect::<Vec<_>>(),
        "network": w.network,
        "protocol": w.tunnel_protocol().as_str_name(),
        "trustDomain": w.trust_domain,
        "serviceAccount": w.service_account,
        "node": w.node,
        "canonicalName": w.canonical_name,
        "canonicalRevision": w.canonical_revision,
        "workloadType": w.workload_type().as_str_name(),
        "workloadName": w.workload_name,
        "policies": w.authorization_policies,
        "status": w.status().as_str_name(),
        "clusterId": w.cluster_id,
        "services": services,
        "locality": w.locality.as_ref().map(|l| pruned(json!({"region": l.region, "zone": l.zone, "subzone": l.subzone}))),
        "hostNetwork": w.network_mode() == workload::NetworkMode::HostNetwork,
        "podUid": info.pod_uid,
        "hints": info.hints.iter().map(|one| format!("{}: zones {:?}, nodes {:?}", one.service, one.zones, one.nodes)).collect::<Vec<_>>(),
        "probePorts": info.probe_ports,
        "egress": info.egress().as_str_name(),
        "dnsName": if info.hostname.is_empty() { String::new() } else { format!("{}.{}", info.hostname, info.subdomain) },
        "policyVersions": info.policy_versions,
        "networkPolicies": info.network_policies,
        "requestAuths": info.request_auths,
        "egressPolicies": info.egress_policies,
        "groups": info.groups.iter().map(|id| group(*id)).collect::<Vec<_>>(),
    }))
}

fn ports(ports: &[workload::Port]) -> Value {
    ports
        .iter()
        .map(|p| {
            json!({
                "port": p.service_port,
                "target": p.target_port,
                "protocol": p.app_protocol().as_str_name(),
            })
        })
        .collect()
}

fn service(s: &workload::Service) -> Value {
    let balancing = s.load_balancing.as_ref().map(|lb| {
        pruned(json!({
            "mode": lb.mode().as_str_name(),
            "preference": lb.routing_preference().map(|scope| scope.as_str_name()).collect::<Vec<_>>(),
            "health": lb.health_policy().as_str_name(),
        }))
    });
    pruned(json!({
        "name": s.name,
        "namespace": s.namespace,
        "hostname": s.hostname,
        "addresses": s.addresses.iter().map(|a| ip(&a.address)).collect::<Vec<_>>(),
        "ports": ports(&s.ports),
        "subjectAltNames": s.subject_alt_names,
        "loadBalancing": balancing,
        "ipFamilies": s.ip_families().as_str_name(),
        "canonical": s.canonical,
        "info": service_info(&s.extensions),
    }))
}

fn service_info(extensions: &[workload::Extension]) -> Value {
    let info = extensions
        .iter()
        .find(|e| e.name == names::EXTENSION_SERVICE)
        .and_then(|e| e.config.as_ref())
        .and_then(|any| tulle_workload::ServiceInfo::decode(any.value.as_slice()).ok())
        .unwrap_or_default();
    let port = |port: &tulle_workload::PortInfo| {
        let transport = port.protocol().as_str_name().trim_start_matches("TRANSPORT_");
        format!("{}/{transport} {}", port.number, port.name).trim_end().to_owned()
    };
    let datagrams = |port: &tulle_workload::DatagramPort| {
        let transport = port.protocol().as_str_name().trim_start_matches("TRANSPORT_");
        let endpoints = port.endpoints.iter().map(|at| format!("{}:{}", ip(&at.address), at.port));
        json!({"port": format!("{}/{transport}", port.number), "endpoints": endpoints.collect::<Vec<_>>()})
    };
    pruned(json!({
        "datagrams": info.datagrams.iter().map(datagrams).collect::<Vec<_>>(),
        "ports": info.ports.iter().map(port).collect::<Vec<_>>(),
        "externalName": info.external_name,
        "headless": info.headless,
        "sessionAffinitySeconds": Some(info.session_affinity_seconds).filter(|seconds| *seconds > 0),
        "clusterAddresses": info.cluster_addresses.iter().map(|a| ip(a)).collect::<Vec<_>>(),
    }))
}

fn authorization(a: &security::Authorization) -> Value {
    let rules: Vec<Value> = a
        .rules
        .iter()
        .map(|rule| rule.clauses.iter().map(|clause| clause.matches.iter().map(one_match).collect::<Value>()).collect())
        .collect();
    let mut shown = json!({
        "name": a.name,
        "namespace": a.namespace,
        "scope": a.scope().as_str_name(),
        "action": a.action().as_str_name(),
        "dryRun": a.dry_run,
        "deniesAll": a.extensions.iter().any(|e| e.name == names::EXTENSION_DENIES_ALL),
        "rules": rules,
        "http": http_rules(a),
    });
    // Most policies have none.
    if shown["http"].is_null()
        && let Value::Object(map) = &mut shown
    {
        map.remove("http");
    }
    shown
}

/// The form for requests.
fn http_rules(a: &security::Authorization) -> Value {
    let config = a.extensions.iter().find(|e| e.name == names::EXTENSION_L7).and_then(|e| e.config.as_ref());
    let decoded = config.and_then(|config| mesh::HttpAuthorization::decode(&*config.value).ok());
    let clause = |clause: &mesh::HttpClause| clause.matches.iter().map(http_match).collect::<Value>();
    let rule = |rule: &mesh::HttpRule| rule.clauses.iter().map(clause).collect::<Value>();
    decoded.map(|http| http.rules.iter().map(rule).collect()).unwrap_or_default()
}

fn http_match(m: &mesh::HttpMatch) -> Value {
    let mut shown = serde_json::Map::new();
    if let Some(connection) = &m.connection
        && let Value::Object(fields) = one_match(connection)
    {
        shown.extend(fields);
    }
    let mut put = |name: &str, any: Vec<String>, none: Vec<String>| {
        shown.insert(name.to_owned(), json!(any));
        shown.insert(format!("not {name}"), json!(none));
    };
    let texts = |list: &[security::StringMatch]| -> Vec<String> { list.iter().map(text).collect() };
    let groups = [
        ("hosts", &m.hosts),
        ("methods", &m.methods),
        ("requestPrincipals", &m.request_principals),
        ("audiences", &m.audiences),
        ("presenters", &m.presenters),
        ("trustDomains", &m.trust_domains),
    ];
    for (name, group) in groups.into_iter().filter_map(|(name, group)| Some((name, group.as_ref()?))) {
        put(name, texts(&group.any), texts(&group.none));
    }
    if let Some(paths) = &m.paths {
        let path = |path: &mesh::PathMatch| match &path.path {
            Some(mesh::path_match::Path::Text(matched)) => text(matched),
            Some(mesh::path_match::Path::Template(template)) => template.clone(),
            None => "?".to_owned(),
        };
        put("paths", paths.any.iter().map(path).collect(), paths.none.iter().map(path).collect());
    }
    for header in &m.headers {
        let values = header.values.clone().unwrap_or_default();
        put(&format!("header {}", header.name), texts(&values.any), texts(&values.none));
    }
    for claim in &m.claims {
        let values = claim.values.clone().unwrap_or_default();
        put(&format!("claim {}", claim.claim.join(".")), texts(&values.any), texts(&values.none));
    }
    if let Some(ips) = &m.remote_ips {
        let block = |a: &security::Address| format!("{}/{}", ip(&a.address), a.length);
        put("remoteIps", ips.any.iter().map(block).collect(), ips.none.iter().map(block).collect());
    }
    pruned(Value::Object(shown))
}

fn one_match(m: &security::Match) -> Value {
    let texts = |list: &[security::StringMatch]| -> Vec<String> { list.iter().map(text).collect() };
    let blocks = |list: &[security::Address]| -> Vec<String> {
        list.iter().map(|a| format!("{}/{}", ip(&a.address), a.length)).collect()
    };
    let accounts = |list: &[security::ServiceAccountMatch]| -> Vec<String> {
        list.iter().map(|a| format!("{}/{}", a.namespace, a.service_account)).collect()
    };
    pruned(json!({
        "namespaces": texts(&m.namespaces),
        "notNamespaces": texts(&m.not_namespaces),
        "principals": texts(&m.principals),
        "notPrincipals": texts(&m.not_principals),
        "sourceIps": blocks(&m.source_ips),
        "notSourceIps": blocks(&m.not_source_ips),
        "destinationIps": blocks(&m.destination_ips),
        "notDestinationIps": blocks(&m.not_destination_ips),
        "destinationPorts": m.destination_ports,
        "notDestinationPorts": m.not_destination_ports,
        "serviceAccounts": accounts(&m.service_accounts),
        "notServiceAccounts": accounts(&m.not_service_accounts),
    }))
}

fn text(m: &security::StringMatch) -> String {
    use security::string_match::MatchType;
    match &m.match_type {
        Some(MatchType::Exact(t)) => t.clone(),
        Some(MatchType::Prefix(t)) => format!("{t}*"),
        Some(MatchType::Suffix(t)) => format!("*{t}"),
        Some(MatchType::Presence(())) => "*".into(),
        None => String::new(),
    }
}

/// An id as people compare it.
fn group(id: u64) -> String {
    format!("{id:016x}")
}

fn egress(policy: &mesh::EgressPolicy) -> Value {
    use mesh::egress_endpoint::At;
    let cidr = |c: &mesh::Cidr| format!("{}/{}", ip(&c.address), c.length);
    let port = |port: &mesh::EgressPort| {
        let target = if port.target == 0 { String::new() } else { format!(" to {}", port.target) };
        format!("{} {}{target}", port.number, port.protocol().as_str_name())
    };
    let endpoint = |one: &mesh::EgressEndpoint| {
        let at = match &one.at {
            Some(At::Address(address)) => ip(address),
            Some(At::Host(host)) => host.clone(),
            None => String::new(),
        };
        pruned(json!({"at": at, "ports": one.ports}))
    };
    let gateway = |gateway: &mesh::EgressGateway| {
        gateway.service.as_ref().map(|service| format!("{}/{}", service.namespace, service.hostname))
    };
    let rule = |rule: &mesh::EgressRule| {
        pruned(json!({
            "hosts": rule.hosts,
            "cidrs": rule.cidrs.iter().map(cidr).collect::<Vec<_>>(),
            "ports": rule.ports.iter().map(port).collect::<Vec<_>>(),
            "http": rule.http.as_ref().map(|http| json!({"methods": http.methods, "paths": http.paths})),
            "gateway": rule.gateway.as_ref().and_then(gateway),
            "originate": rule.originate.as_ref().map(|tls| pruned(json!({
                "serverName": tls.server_name, "roots": tls.roots.len(), "clientCertificate": tls.client_certificate,
            }))),
            "verify": rule.proof.as_ref().map(|proof| json!({"roots": proof.roots.len()})),
            "endpoints": rule.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
            "standsFor": rule.stands_for.iter().map(cidr).collect::<Vec<_>>(),
        }))
    };
    pruned(json!({
        "namespace": policy.namespace,
        "name": policy.name,
        "action": policy.action().as_str_name(),
        "ceiling": policy.ceiling,
        "rules": policy.rules.iter().map(rule).collect::<Vec<_>>(),
        "unreadable": policy.unreadable,
    }))
}

fn network_policy(p: &mesh::NetworkPolicy) -> Value {
    let rules = |isolates: bool, rules: &[mesh::NetworkRule]| {
        if isolates { rules.iter().map(network_rule).collect() } else { Value::Null }
    };
    let mut value = pruned(json!({"namespace": p.namespace, "name": p.name, "unreadable": p.unreadable}));
    // An empty list isolates and must be seen.
    for (direction, list) in
        [("ingress", rules(p.ingress, &p.ingress_rules)), ("egress", rules(p.egress, &p.egress_rules))]
    {
        if !list.is_null() {
            value[direction] = list;
        }
    }
    value
}

fn network_rule(rule: &mesh::NetworkRule) -> Value {
    let cidr = |c: &mesh::Cidr| format!("{}/{}", ip(&c.address), c.length);
    let peer = |peer: &mesh::NetworkPeer| match &peer.peer {
        Some(mesh::network_peer::Peer::Group(id)) => json!({"group": group(*id)}),
        Some(mesh::network_peer::Peer::Block(block)) => pruned(json!({
            "cidr": block.cidr.as_ref().map(cidr),
            "except": block.except.iter().map(cidr).collect::<Vec<_>>(),
        })),
        None => Value::Null,
    };
    let port = |port: &mesh::NetworkPort| {
        let numbers = match (port.first, port.last) {
            (0, 65535) => "any".to_owned(),
            (first, last) if first > last => "none".to_owned(),
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        let of = Some(port.destination_group).filter(|id| *id != 0).map(group);
        pruned(json!({"protocol": port.protocol().as_str_name(), "port": numbers, "of": of}))
    };
    pruned(json!({
        "peers": rule.peers.iter().map(peer).collect::<Vec<_>>(),
        "ports": rule.ports.iter().map(port).collect::<Vec<_>>(),
    }))
}
