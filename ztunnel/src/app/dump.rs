//! `/config_dump`: what the node knows, in the keys and words that Istio's command line reads (`istioctl ztunnel-config`).
//!
//! Workloads, services and policies are written as a file for `LOCAL_XDS_PATH` has them, so one can be read back; what
//! only this proxy knows comes under keys of its own, which others ignore. Limits: live connections are counted and not
//! listed, and a certificate's key is nowhere.

use ipnet::IpNet;
use serde_json::{Map, Value, json};
use tulle_certs::pem;

use crate::app::view::Status;
use crate::identity::CertStatus;
use crate::state::{
    Action, GatewayAddress, GatewayTarget, HealthPolicy, IpFamilies, LocalityScope, Match, Mode, Policy, Port,
    Protocol, Scope, Service, ServiceAccount, StringMatch, Visibility, Workload,
};

/// An object without the entries that say nothing.
fn lean(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(map.into_iter().filter(|(_, value)| !is_nothing(value)).collect()),
        other => other,
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(flag) => !flag,
        Value::Number(_) => false,
    }
}

fn gateway(of: &GatewayAddress) -> Value {
    let destination = match &of.target {
        GatewayTarget::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
        GatewayTarget::Address { network, ip } => format!("{network}/{ip}"),
    };
    json!({ "destination": destination, "hboneMtlsPort": of.hbone_port })
}

fn ports(of: &[Port]) -> Map<String, Value> {
    of.iter().map(|port| (port.service_port.to_string(), port.target_port.into())).collect()
}

/// A workload.
pub(super) fn workload(of: &Workload) -> Value {
    let services: Map<String, Value> = of
        .services
        .keys()
        .map(|key| (key.to_string(), ports(of.services.get(key).unwrap_or_default()).into()))
        .collect();
    let tunnel = of.application_tunnel.map(|tunnel| {
        lean(json!({ "protocol": if tunnel.proxy_protocol { "PROXY" } else { "NONE" }, "port": tunnel.port }))
    });
    let mut value = lean(json!({
        "uid": &*of.uid,
        "waypoint": of.waypoint.as_deref().map(gateway),
        "networkGateway": of.network_gateway.as_deref().map(gateway),
        "name": &*of.name,
        "namespace": &*of.namespace,
        "trustDomain": of.identity.trust_domain(),
        "serviceAccount": of.identity.service_account(),
        "network": &*of.network,
        "workloadName": &*of.workload_name,
        "workloadType": of.workload_type.as_str(),
        "canonicalName": &*of.canonical_name,
        "canonicalRevision": &*of.canonical_revision,
        "hostname": &*of.hostname,
        "node": &*of.node,
        "nativeTunnel": of.native_tunnel,
        "applicationTunnel": tunnel,
        "authorizationPolicies": of.policies.iter().map(|name| &**name).collect::<Vec<_>>(),
        "clusterId": &*of.cluster,
        "locality": lean(json!({
            "region": &*of.locality.region, "zone": &*of.locality.zone, "subzone": &*of.locality.subzone,
        })),
        "services": services,
        "tulle": tulle(of),
    }));
    value["workloadIps"] = of.addresses.iter().map(ToString::to_string).collect();
    value["protocol"] = if of.protocol == Protocol::Hbone { "HBONE" } else { "TCP" }.into();
    value["networkMode"] = if of.host_network { "HostNetwork" } else { "Standard" }.into();
    value["status"] = if of.healthy { "Healthy" } else { "Unhealthy" }.into();
    value["capacity"] = of.capacity.into();
    value
}

/// What only this proxy knows of a workload.
fn tulle(of: &Workload) -> Value {
    lean(json!({
        "version": &*of.version,
        "networkPolicies": of.network_policies.iter().map(|name| &**name).collect::<Vec<_>>(),
        "policiesPending": of.policies_pending,
    }))
}

/// A service.
pub(super) fn service(of: &Service) -> Value {
    let (single, ranges): (Vec<_>, Vec<_>) =
        of.vips.iter().partition(|(_, net)| net.prefix_len() == net.max_prefix_len());
    let endpoints: Map<String, Value> = of
        .endpoints
        .all
        .iter()
        .map(|endpoint| {
            let workload = endpoint.workload();
            let own = workload.services.get(&of.key()).unwrap_or_default();
            (workload.uid.to_string(), json!({ "workloadUid": &*workload.uid, "port": ports(own) }))
        })
        .collect();
    let families = match of.ip_families {
        IpFamilies::Automatic => "",
        IpFamilies::V4Only => "IPv4",
        IpFamilies::V6Only => "IPv6",
        IpFamilies::Dual => "Dual",
    };
    let weighted: Vec<Value> = of
        .weighted_waypoints
        .iter()
        .map(|(waypoint, weight)| json!({ "destination": gateway(waypoint), "weight": weight }))
        .collect();
    let mut value = lean(json!({
        "name": &*of.name,
        "namespace": &*of.namespace,
        "hostname": &*of.hostname,
        "subjectAltNames": of.subject_alt_names.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "waypoint": of.waypoint.as_ref().map(gateway),
        "weightedWaypoints": weighted,
        "loadBalancer": balancing(of),
        "ipFamilies": families,
        "canonical": of.canonical,
        "tulle": lean(json!({
            "version": &*of.version,
            "ranges": ranges.iter().map(|(network, net)| format!("{network}/{net}")).collect::<Vec<_>>(),
        })),
    }));
    value["vips"] = single.iter().map(|(network, net)| format!("{network}/{}", net.addr())).collect();
    value["ports"] = ports(&of.ports).into();
    value["endpoints"] = endpoints.into();
    value["visibility"] = if of.visibility == Visibility::Public { "Public" } else { "Namespace" }.into();
    value
}

/// Nothing where it is the usual one.
fn balancing(of: &Service) -> Value {
    if of.lb.routing_preference.is_empty()
        && of.lb.mode == Mode::All
        && of.lb.health_policy == HealthPolicy::OnlyHealthy
    {
        return Value::Null;
    }
    let scope = |scope: &LocalityScope| match scope {
        LocalityScope::Region => "Region",
        LocalityScope::Zone => "Zone",
        LocalityScope::Subzone => "Subzone",
        LocalityScope::Node => "Node",
        LocalityScope::Cluster => "Cluster",
        LocalityScope::Network => "Network",
    };
    let mode = match of.lb.mode {
        Mode::All => "Standard",
        Mode::Strict => "Strict",
        Mode::Failover => "Failover",
        Mode::Passthrough => "Passthrough",
    };
    let health = match of.lb.health_policy {
        HealthPolicy::OnlyHealthy => "OnlyHealthy",
        HealthPolicy::AllowAll => "AllowAll",
    };
    json!({
        "routingPreferences": of.lb.routing_preference.iter().map(scope).collect::<Vec<_>>(),
        "mode": mode,
        "healthPolicy": health,
    })
}

/// A policy.
pub(super) fn policy(of: &Policy) -> Value {
    let name = of.id.split_once('/').map_or(&*of.id, |(_, name)| name);
    let scope = match of.scope {
        Scope::Global => "Global",
        Scope::Namespace => "Namespace",
        Scope::Selector => "WorkloadSelector",
    };
    let rules: Vec<Vec<Vec<Value>>> = of
        .rules
        .iter()
        .map(|rule| rule.clauses.iter().map(|clause| clause.matches.iter().map(one_match).collect()).collect())
        .collect();
    let mut value = json!({
        "name": name,
        "namespace": &*of.namespace,
        "scope": scope,
        "action": match of.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Audit => "Audit",
        },
        "rules": rules,
        "dryRun": of.dry_run,
        "tulle": { "version": &*of.version },
    });
    if let Some(reason) = &of.stand_in {
        value["tulle"]["deniesAllBecause"] = Value::from(&**reason);
    }
    value
}

fn one_match(of: &Match) -> Value {
    let texts = |texts: &[StringMatch]| -> Vec<Value> {
        let one = |text: &StringMatch| match text {
            StringMatch::Exact(text) => json!({ "Exact": &**text }),
            StringMatch::Prefix(text) => json!({ "Prefix": &**text }),
            StringMatch::Suffix(text) => json!({ "Suffix": &**text }),
            StringMatch::Presence => json!({ "Presence": [] }),
        };
        texts.iter().map(one).collect()
    };
    let nets = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    let accounts = |accounts: &[ServiceAccount]| -> Vec<Value> {
        let one =
            |account: &ServiceAccount| json!({ "namespace": &*account.namespace, "serviceAccount": &*account.name });
        accounts.iter().map(one).collect()
    };
    lean(json!({
        "namespaces": texts(&of.namespaces),
        "notNamespaces": texts(&of.not_namespaces),
        "serviceAccounts": accounts(&of.service_accounts),
        "notServiceAccounts": accounts(&of.not_service_accounts),
        "principals": texts(&of.principals),
        "notPrincipals": texts(&of.not_principals),
        "sourceIps": nets(&of.source_ips),
        "notSourceIps": nets(&of.not_source_ips),
        "destinationIps": nets(&of.destination_ips),
        "notDestinationIps": nets(&of.not_destination_ips),
        "destinationPorts": of.destination_ports,
        "notDestinationPorts": of.not_destination_ports,
    }))
}

/// A certificate, as presented and as verified with.
pub(super) fn certificate(of: &CertStatus) -> Value {
    let time = |seconds: i64| jiff::Timestamp::from_second(seconds).map_or_else(|_| String::new(), |at| at.to_string());
    let (mut chain, mut roots) = (Vec::new(), Vec::new());
    if let Some(held) = &of.certificate {
        let entry = |der: &[u8]| json!({ "pem": pem::base64(pem::certificate(der).as_bytes()) });
        chain.extend(held.issued.chain.iter().map(|der| entry(der)));
        roots.extend(held.issued.roots.certificates().iter().map(|der| entry(der)));
        if let Some(leaf) = chain.first_mut() {
            // Istio's command line reads a decimal number.
            leaf["serialNumber"] = decimal(&held.issued.serial).into();
            leaf["validFrom"] = time(held.not_before).into();
            leaf["expirationTime"] = time(held.not_after).into();
        }
    }
    json!({
        "identity": of.identity.to_string(),
        "state": of.state,
        "certChain": chain,
        "rootCerts": roots,
        "tulle": { "error": of.error, "notAfter": of.not_after },
    })
}

/// A hexadecimal number in decimal digits.
fn decimal(hex: &str) -> String {
    let mut digits = vec![0u32];
    for value in hex.chars().filter_map(|digit| digit.to_digit(16)) {
        let mut carry = value;
        for digit in &mut digits {
            let next = *digit * 16 + carry;
            (*digit, carry) = (next % 10, next / 10);
        }
        while carry > 0 {
            digits.push(carry % 10);
            carry /= 10;
        }
    }
    digits.iter().rev().filter_map(|digit| char::from_digit(*digit, 10)).collect()
}

/// A pod of this node.
pub(super) fn state(of: &Status, workload: Option<&Workload>) -> Value {
    let identity = workload.map(|workload| &workload.identity);
    json!({
        "state": if of.capture == "Captured" { "Up" } else { "Pending" },
        "info": {
            "name": of.name,
            "namespace": of.namespace,
            "trustDomain": identity.map(|identity| identity.trust_domain()).unwrap_or_default(),
            "serviceAccount": identity.map(|identity| identity.service_account()).unwrap_or_default(),
        },
        "tulle": {
            "capture": of.capture,
            "inboundConnections": of.inbound_connections,
            "outboundConnections": of.outbound_connections,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{decimal, policy, service, workload};
    use crate::state::fixtures::{behind, service as a_service, snapshot, workload as a_workload};
    use crate::state::{
        Change, GatewayAddress, GatewayTarget, LoadBalancing, LocalityScope, Mode, ServiceSpec, Workload, store,
    };
    use crate::xds::local::{Local, parse};

    fn without_own(mut value: Value) -> Value {
        if let Some(map) = value.as_object_mut() {
            map.remove("tulle");
        }
        value
    }

    #[test]
    fn a_dump_can_be_read_back_as_a_file() {
        let target = GatewayTarget::Address { network: "".into(), ip: "10.0.9.9".parse().unwrap() };
        let waypoint = GatewayAddress { target, hbone_port: 15008 };
        let lb = LoadBalancing {
            routing_preference: vec![LocalityScope::Network, LocalityScope::Zone],
            mode: Mode::Failover,
            ..LoadBalancing::default()
        };
        let spec = ServiceSpec {
            waypoint: Some(waypoint.clone()),
            weighted_waypoints: vec![(waypoint.clone(), 3)],
            lb,
            ..a_service("shop", "cart", "10.96.0.1")
        };
        let pod = Workload {
            waypoint: Some(Box::new(waypoint)),
            healthy: false,
            ..behind(a_workload("shop", "cart", "10.0.0.1"), "shop", "cart")
        };
        let before = snapshot([Change::Service(spec.into()), Change::Workload(pod.into())]);
        let rules = json!([[[{ "principals": [{ "Suffix": "web" }, { "Presence": [] }], "sourceIps": ["10.0.0.0/8"],
            "serviceAccounts": [{ "namespace": "shop", "serviceAccount": "web" }], "notDestinationPorts": [9999] }]]]);
        let own = json!({ "name": "p", "namespace": "shop", "scope": "Namespace", "action": "Deny", "dryRun": false,
            "rules": rules });
        let text = json!({
            "workloads": before.workloads().map(|one| without_own(workload(&one))).collect::<Vec<_>>(),
            "services": before.services().map(|one| without_own(service(one))).collect::<Vec<_>>(),
            "policies": [own],
        });
        let (mut writer, reader) = store();
        let (changes, errors) = Local::default().changes(parse(&text.to_string()).unwrap());
        assert_eq!(errors, Vec::<String>::new(), "{text:#}");
        writer.apply(changes, 1);
        let after = reader.load();
        let again = json!({
            "workloads": after.workloads().map(|one| without_own(workload(&one))).collect::<Vec<_>>(),
            "services": after.services().map(|one| without_own(service(one))).collect::<Vec<_>>(),
            "policies": after.policies().map(|one| without_own(policy(one))).collect::<Vec<_>>(),
        });
        assert_eq!(again, text);
    }

    #[test]
    fn istio_s_command_line_finds_its_keys() {
        let pod = behind(a_workload("shop", "cart", "10.0.0.1"), "shop", "cart");
        let snapshot =
            snapshot([Change::Service(a_service("shop", "cart", "10.96.0.1").into()), Change::Workload(pod.into())]);
        let one = workload(&snapshot.workloads().next().unwrap());
        for key in [
            "uid",
            "workloadIps",
            "protocol",
            "name",
            "namespace",
            "serviceAccount",
            "workloadName",
            "workloadType",
            "canonicalName",
            "canonicalRevision",
            "clusterId",
            "trustDomain",
            "node",
            "status",
        ] {
            assert!(!one[key].is_null(), "{key} in {one}");
        }
        let one = service(snapshot.services().next().unwrap());
        assert_eq!(one["vips"], json!(["/10.96.0.1"]));
        assert_eq!(one["ports"], json!({ "80": 8080 }));
        let uid = "Kubernetes//Pod/shop/cart";
        assert_eq!(one["endpoints"][uid], json!({ "workloadUid": uid, "port": { "80": 8080 } }));
    }

    #[test]
    fn serial_numbers_are_decimal() {
        for (hex, expected) in [("0", "0"), ("ff", "255"), ("0123456789abcdef01", "20988295479420645121")] {
            assert_eq!(decimal(hex), expected);
        }
    }
}
