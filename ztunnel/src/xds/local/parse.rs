//! Istio's YAML of workloads, services and policies, as the messages of discovery.
//!
//! Entries are read one by one, so that each error has a place. Field names and values are those that Istio's ztunnel
//! writes in its dump and reads in its examples; a field that is not known is an error, because a rule that was not
//! understood would be a rule that is not enforced. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tulle_proto::names::{DEFAULT_CLUSTER, TYPE_ADDRESS, TYPE_AUTHORIZATION};
use tulle_proto::security as policy;
use tulle_proto::security::string_match::MatchType;
use tulle_proto::workload as wds;
use tulle_proto::workload::address::Type;
use tulle_proto::workload::gateway_address::Destination;

/// What a file says.
#[derive(Debug, Default)]
pub struct Document {
    /// Policies first.
    pub entries: Vec<Entry>,
    /// What is wrong with single ones.
    pub errors: Vec<String>,
}

/// One resource.
#[derive(Debug)]
pub struct Entry {
    /// Its type.
    pub type_url: &'static str,
    /// Its name. `None`: it cannot be told.
    pub name: Option<String>,
    /// Where it stands, for people.
    pub place: String,
    /// Its bytes. `None`: it cannot be read.
    pub value: Option<Vec<u8>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    workloads: Vec<serde_json::Value>,
    #[serde(default)]
    services: Vec<serde_json::Value>,
    #[serde(default)]
    policies: Vec<serde_json::Value>,
}

/// Reads a file.
///
/// # Errors
/// If it is no such document at all; line and column where the parser stopped.
pub fn parse(text: &str) -> Result<Document, String> {
    if text.trim().is_empty() {
        return Err("the file is empty; a mesh without anything is written as {}".to_owned());
    }
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let mut document = Document::default();
    let policy_name = |value: &serde_json::Value| joined(value, "namespace", "name");
    document.add("policies", TYPE_AUTHORIZATION, file.policies, policy_name, |from: Policy| from.message());
    let service_name = |value: &serde_json::Value| joined(value, "namespace", "hostname");
    document.add("services", TYPE_ADDRESS, file.services, service_name, |from: Service| from.message());
    document.add("workloads", TYPE_ADDRESS, file.workloads, uid, |from: Workload| from.message());
    Ok(document)
}

impl Document {
    fn add<T: DeserializeOwned>(
        &mut self,
        list: &str,
        type_url: &'static str,
        values: Vec<serde_json::Value>,
        name: impl Fn(&serde_json::Value) -> Option<String>,
        message: impl Fn(T) -> Result<Vec<u8>, String>,
    ) {
        for (index, value) in values.into_iter().enumerate() {
            let name = name(&value);
            let place = match &name {
                Some(name) => format!("{list}[{index}] ({name})"),
                None => format!("{list}[{index}], which has no readable name"),
            };
            let read = serde_json::from_value::<T>(value).map_err(|error| error.to_string()).and_then(&message);
            if let Err(error) = &read {
                self.errors.push(format!("{place}: {error}"));
            }
            self.entries.push(Entry { type_url, name, place, value: read.ok() });
        }
    }
}

fn text<'a>(value: &'a serde_json::Value, field: &str) -> Option<&'a str> {
    value.get(field).and_then(serde_json::Value::as_str).filter(|text| !text.is_empty())
}

fn joined(value: &serde_json::Value, namespace: &str, name: &str) -> Option<String> {
    Some(format!("{}/{}", text(value, namespace)?, text(value, name)?))
}

/// Without a uid it is taken for a pod of this cluster.
fn uid(value: &serde_json::Value) -> Option<String> {
    text(value, "uid").map(str::to_owned).or_else(|| {
        let cluster = text(value, "clusterId").unwrap_or(DEFAULT_CLUSTER);
        Some(format!("{cluster}//Pod/{}", joined(value, "namespace", "name")?))
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Gateway {
    destination: String,
    #[serde(alias = "hbone_mtls_port")]
    hbone_mtls_port: u16,
}

impl Gateway {
    fn message(&self) -> Result<wds::GatewayAddress, String> {
        let (first, second) = self.destination.split_once('/').ok_or_else(|| {
            format!("destination {:?} is neither <namespace>/<hostname> nor <network>/<address>", self.destination)
        })?;
        let destination = match second.parse::<IpAddr>() {
            Ok(ip) => Destination::Address(address(first, ip)),
            Err(_) => {
                let (namespace, hostname) = (first.to_owned(), second.to_owned());
                Destination::Hostname(wds::NamespacedHostname { namespace, hostname })
            }
        };
        Ok(wds::GatewayAddress { destination: Some(destination), hbone_mtls_port: self.hbone_mtls_port.into() })
    }
}

fn optional(gateway: Option<&Gateway>) -> Result<Option<wds::GatewayAddress>, String> {
    gateway.map(Gateway::message).transpose()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address(network: &str, ip: IpAddr) -> wds::NetworkAddress {
    wds::NetworkAddress { network: network.to_owned(), address: octets(ip).into(), length: None }
}

fn ports(of: &BTreeMap<u16, u16>) -> Vec<wds::Port> {
    let port = |(service, target): (&u16, &u16)| wds::Port {
        service_port: (*service).into(),
        target_port: (*target).into(),
        ..wds::Port::default()
    };
    of.iter().map(port).collect()
}

/// The number that a word stands for.
fn word<T: Copy + Into<i32>>(field: &str, word: &str, words: &[(&str, T)]) -> Result<i32, String> {
    words.iter().find(|(known, _)| *known == word).map(|(_, value)| (*value).into()).ok_or_else(|| {
        let known: Vec<&str> = words.iter().map(|(known, _)| *known).collect();
        format!("{field} is {word:?}; it may be {}", known.join(", "))
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Tunnel {
    protocol: String,
    port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Locality {
    region: String,
    zone: String,
    subzone: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Workload {
    workload_ips: Vec<IpAddr>,
    namespace: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    name: String,
    waypoint: Option<Gateway>,
    network_gateway: Option<Gateway>,
    #[serde(default = "tcp")]
    protocol: String,
    #[serde(default = "standard")]
    network_mode: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default = "pod")]
    workload_type: String,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<Tunnel>,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default = "healthy")]
    status: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    locality: Locality,
    capacity: Option<u32>,
    #[serde(default)]
    services: BTreeMap<String, BTreeMap<u16, u16>>,
}

fn tcp() -> String {
    "TCP".to_owned()
}
fn standard() -> String {
    "Standard".to_owned()
}
fn pod() -> String {
    "pod".to_owned()
}
fn healthy() -> String {
    "Healthy".to_owned()
}

impl Workload {
    fn message(self) -> Result<Vec<u8>, String> {
        use wds::{NetworkMode, TunnelProtocol, WorkloadStatus, WorkloadType};
        let cluster = if self.cluster_id.is_empty() { DEFAULT_CLUSTER } else { &self.cluster_id };
        let uid = match self.uid.as_str() {
            "" => format!("{cluster}//Pod/{}/{}", self.namespace, self.name),
            uid => uid.to_owned(),
        };
        let protocols = [("TCP", TunnelProtocol::None), ("HBONE", TunnelProtocol::Hbone)];
        let modes = [("Standard", NetworkMode::Standard), ("HostNetwork", NetworkMode::HostNetwork)];
        let types = [
            ("deployment", WorkloadType::Deployment),
            ("cronjob", WorkloadType::Cronjob),
            ("pod", WorkloadType::Pod),
            ("job", WorkloadType::Job),
        ];
        let states = [("Healthy", WorkloadStatus::Healthy), ("Unhealthy", WorkloadStatus::Unhealthy)];
        let workload = wds::Workload {
            uid,
            addresses: self.workload_ips.iter().map(|ip| octets(*ip).into()).collect(),
            waypoint: optional(self.waypoint.as_ref())?,
            network_gateway: optional(self.network_gateway.as_ref())?,
            tunnel_protocol: word("protocol", &self.protocol, &protocols)?,
            network_mode: word("networkMode", &self.network_mode, &modes)?,
            workload_type: word("workloadType", &self.workload_type.to_ascii_lowercase(), &types)?,
            status: word("status", &self.status, &states)?,
            application_tunnel: self.application_tunnel.map(tunnel).transpose()?,
            locality: Some(wds::Locality {
                region: self.locality.region,
                zone: self.locality.zone,
                subzone: self.locality.subzone,
            }),
            services: self.services.into_iter().map(|(key, of)| (key, wds::PortList { ports: ports(&of) })).collect(),
            name: self.name,
            namespace: self.namespace,
            trust_domain: self.trust_domain,
            service_account: self.service_account,
            network: self.network,
            workload_name: self.workload_name,
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            hostname: self.hostname,
            node: self.node,
            native_tunnel: self.native_tunnel,
            authorization_policies: self.authorization_policies,
            cluster_id: self.cluster_id,
            capacity: self.capacity,
            ..wds::Workload::default()
        };
        Ok(wds::Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec())
    }
}

fn tunnel(from: Tunnel) -> Result<wds::ApplicationTunnel, String> {
    use wds::application_tunnel::Protocol;
    let protocols = [("NONE", Protocol::None), ("PROXY", Protocol::Proxy)];
    let protocol = word("applicationTunnel.protocol", &from.protocol, &protocols)?;
    Ok(wds::ApplicationTunnel { protocol, port: from.port.unwrap_or(0).into() })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Balancing {
    #[serde(default)]
    routing_preferences: Vec<String>,
    mode: String,
    #[serde(default = "only_healthy")]
    health_policy: String,
}

fn only_healthy() -> String {
    "OnlyHealthy".to_owned()
}

impl Balancing {
    fn message(&self) -> Result<wds::LoadBalancing, String> {
        use wds::load_balancing::{HealthPolicy, Mode, Scope};
        let scopes = [
            ("Region", Scope::Region),
            ("Zone", Scope::Zone),
            ("Subzone", Scope::Subzone),
            ("Node", Scope::Node),
            ("Cluster", Scope::Cluster),
            ("Network", Scope::Network),
        ];
        let modes = [
            ("Standard", Mode::UnspecifiedMode),
            ("Strict", Mode::Strict),
            ("Failover", Mode::Failover),
            ("Passthrough", Mode::Passthrough),
        ];
        let health = [("OnlyHealthy", HealthPolicy::OnlyHealthy), ("AllowAll", HealthPolicy::AllowAll)];
        let scope = |scope: &String| word("loadBalancer.routingPreferences", scope, &scopes);
        Ok(wds::LoadBalancing {
            routing_preference: self.routing_preferences.iter().map(scope).collect::<Result<_, _>>()?,
            mode: word("loadBalancer.mode", &self.mode, &modes)?,
            health_policy: word("loadBalancer.healthPolicy", &self.health_policy, &health)?,
        })
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Weighted {
    destination: Gateway,
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Service {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<String>,
    ports: BTreeMap<u16, u16>,
    /// Workloads say of which services they are; a dump has both.
    #[serde(default, rename = "endpoints")]
    _endpoints: serde_json::Value,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<Gateway>,
    #[serde(default)]
    weighted_waypoints: Vec<Weighted>,
    load_balancer: Option<Balancing>,
    ip_families: Option<String>,
    #[serde(default)]
    canonical: bool,
    #[serde(default = "public")]
    visibility: String,
}

fn public() -> String {
    "Public".to_owned()
}

impl Service {
    fn message(self) -> Result<Vec<u8>, String> {
        use wds::IpFamilies;
        use wds::service::Visibility;
        let vip = |text: &String| {
            let parsed = text.split_once('/').and_then(|(network, ip)| Some(address(network, ip.parse().ok()?)));
            parsed.ok_or_else(|| {
                format!("vip {text:?} is not <network>/<address>; the usual network is empty: /10.0.0.1")
            })
        };
        let families = [("Dual", IpFamilies::Dual), ("IPv4", IpFamilies::Ipv4Only), ("IPv6", IpFamilies::Ipv6Only)];
        let ip_families = self.ip_families.as_deref().map(|text| word("ipFamilies", text, &families)).transpose()?;
        let visibilities = [("Public", Visibility::Public), ("Namespace", Visibility::Namespace)];
        let weighted = |one: &Weighted| {
            let destination = Some(one.destination.message()?);
            Ok::<_, String>(wds::WeightedWaypoint { destination, weight: one.weight })
        };
        let service = wds::Service {
            addresses: self.vips.iter().map(vip).collect::<Result<_, _>>()?,
            ports: ports(&self.ports),
            waypoint: optional(self.waypoint.as_ref())?,
            weighted_waypoints: self.weighted_waypoints.iter().map(weighted).collect::<Result<_, _>>()?,
            load_balancing: self.load_balancer.as_ref().map(Balancing::message).transpose()?,
            ip_families: ip_families.unwrap_or_default(),
            visibility: word("visibility", &self.visibility, &visibilities)?,
            name: self.name,
            namespace: self.namespace,
            hostname: self.hostname,
            subject_alt_names: self.subject_alt_names,
            canonical: self.canonical,
            ..wds::Service::default()
        };
        Ok(wds::Address { r#type: Some(Type::Service(service)) }.encode_to_vec())
    }
}

#[derive(Debug, Deserialize)]
enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(#[allow(dead_code, reason = "an empty list is how the word is written")] [(); 0]),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Account {
    namespace: String,
    service_account: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Match {
    namespaces: Vec<Text>,
    not_namespaces: Vec<Text>,
    service_accounts: Vec<Account>,
    not_service_accounts: Vec<Account>,
    principals: Vec<Text>,
    not_principals: Vec<Text>,
    source_ips: Vec<IpNet>,
    not_source_ips: Vec<IpNet>,
    destination_ips: Vec<IpNet>,
    not_destination_ips: Vec<IpNet>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Policy {
    name: String,
    namespace: String,
    scope: String,
    action: String,
    rules: Vec<Vec<Vec<Match>>>,
    #[serde(default)]
    dry_run: bool,
}

impl Policy {
    fn message(self) -> Result<Vec<u8>, String> {
        use policy::{Action, Scope};
        let scopes =
            [("Global", Scope::Global), ("Namespace", Scope::Namespace), ("WorkloadSelector", Scope::WorkloadSelector)];
        let actions = [("Allow", Action::Allow), ("Deny", Action::Deny)];
        let clause =
            |matches: Vec<Match>| policy::Clause { matches: matches.into_iter().map(Match::message).collect() };
        let rule = |clauses: Vec<Vec<Match>>| policy::Rule { clauses: clauses.into_iter().map(clause).collect() };
        let authorization = policy::Authorization {
            scope: word("scope", &self.scope, &scopes)?,
            action: word("action", &self.action, &actions)?,
            rules: self.rules.into_iter().map(rule).collect(),
            name: self.name,
            namespace: self.namespace,
            dry_run: self.dry_run,
            ..policy::Authorization::default()
        };
        Ok(authorization.encode_to_vec())
    }
}

impl Match {
    fn message(self) -> policy::Match {
        let numbers = |ports: Vec<u16>| ports.into_iter().map(u32::from).collect();
        policy::Match {
            namespaces: texts(self.namespaces),
            not_namespaces: texts(self.not_namespaces),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            principals: texts(self.principals),
            not_principals: texts(self.not_principals),
            source_ips: nets(&self.source_ips),
            not_source_ips: nets(&self.not_source_ips),
            destination_ips: nets(&self.destination_ips),
            not_destination_ips: nets(&self.not_destination_ips),
            destination_ports: numbers(self.destination_ports),
            not_destination_ports: numbers(self.not_destination_ports),
            ..policy::Match::default()
        }
    }
}

fn texts(of: Vec<Text>) -> Vec<policy::StringMatch> {
    let one = |text| match text {
        Text::Exact(text) => MatchType::Exact(text),
        Text::Prefix(text) => MatchType::Prefix(text),
        Text::Suffix(text) => MatchType::Suffix(text),
        Text::Presence(_) => MatchType::Presence(()),
    };
    of.into_iter().map(|text| policy::StringMatch { match_type: Some(one(text)) }).collect()
}

fn accounts(of: Vec<Account>) -> Vec<policy::ServiceAccountMatch> {
    let one = |account: Account| policy::ServiceAccountMatch {
        namespace: account.namespace,
        service_account: account.service_account,
    };
    of.into_iter().map(one).collect()
}

fn nets(of: &[IpNet]) -> Vec<policy::Address> {
    let one = |net: &IpNet| policy::Address { address: octets(net.addr()).into(), length: net.prefix_len().into() };
    of.iter().map(one).collect()
}
