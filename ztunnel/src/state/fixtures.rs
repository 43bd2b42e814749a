//! Small meshes for the unit tests of this crate, so that a test names only what it is about.
//!
//! Everything has a plain default: namespace `shop` unless said, network "", healthy, weight 1. Only in test builds.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tulle_certs::SpiffeId;

use crate::state::store;
use crate::state::{
    Action, Change, Clause, EgressMode, IpFamilies, LoadBalancing, Locality, Match, Memberships, Policy, Port,
    Protocol, Rule, Scope, ServiceSpec, Snapshot, Visibility, Workload, WorkloadType,
};

/// `spiffe://cluster.local/ns/<namespace>/sa/<account>`.
pub fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", namespace, account).unwrap()
}

/// A healthy HBONE pod with its name as account, at `ip`.
pub fn workload(namespace: &str, name: &str, ip: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        version: "v1".into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses: vec![ip.parse::<IpAddr>().unwrap()],
        hostname: "".into(),
        network: "".into(),
        protocol: Protocol::Hbone,
        identity: identity(namespace, name),
        node: "node-1".into(),
        healthy: true,
        host_network: false,
        native_tunnel: false,
        services: Memberships::default(),
        hints: Box::default(),
        locality: Locality { region: "".into(), zone: "".into(), subzone: "".into() },
        capacity: 1,
        policies: Vec::new(),
        policy_versions: BTreeMap::new(),
        policies_pending: false,
        egress: EgressMode::Allow,
        pod_uid: "".into(),
        probe_ports: Vec::new(),
        groups: Box::default(),
        network_policies: Vec::new(),
        request_auths: Vec::new(),
        egress_policies: Vec::new(),
        dns_name: None,
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        workload_name: name.into(),
        workload_type: WorkloadType::Pod,
        cluster: "Kubernetes".into(),
        waypoint: None,
        network_gateway: None,
        application_tunnel: None,
    }
}

/// `service_port` to `target_port`.
pub fn port(service_port: u16, target_port: u16) -> Port {
    Port { service_port, target_port, app_protocol: Default::default() }
}

/// The resource name of a service made by [`service`].
pub fn key(namespace: &str, name: &str) -> Arc<str> {
    format!("{namespace}/{name}.{namespace}.svc.cluster.local").into()
}

/// A service on port 80, target 8080, at `vip`.
pub fn service(namespace: &str, name: &str, vip: &str) -> ServiceSpec {
    ServiceSpec {
        version: "v1".into(),
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: vec![("".into(), vip.parse::<IpAddr>().unwrap().into())],
        ports: vec![port(80, 8080)],
        subject_alt_names: Vec::new(),
        lb: LoadBalancing::default(),
        ip_families: IpFamilies::Automatic,
        canonical: true,
        visibility: Visibility::Public,
        waypoint: None,
        weighted_waypoints: Vec::new(),
        info: None,
    }
}

/// Makes a workload an endpoint of a service made by [`service`].
pub fn behind(workload: Workload, namespace: &str, name: &str) -> Workload {
    with_ports(workload, key(namespace, name), vec![port(80, 8080)])
}

/// Makes a workload an endpoint of the service `key`.
pub fn with_ports(mut workload: Workload, key: Arc<str>, ports: Vec<Port>) -> Workload {
    let others = workload.services.keys().map(|other| (other.clone(), workload.services.get(other).unwrap().to_vec()));
    workload.services = others.chain([(key, ports)]).collect();
    workload
}

/// A policy of one rule with one match; no match: a policy without rules.
pub fn policy(namespace: &str, name: &str, scope: Scope, action: Action, only: Option<Match>) -> Policy {
    let rules = only.map(|only| Rule { clauses: vec![Clause { matches: vec![only], unknown: false }], unknown: false });
    Policy {
        id: format!("{namespace}/{name}").into(),
        version: "v1".into(),
        namespace: namespace.into(),
        scope,
        action,
        dry_run: false,
        rules: rules.into_iter().collect(),
        http: None,
        stand_in: None,
    }
}

/// A synced snapshot with `changes` applied.
pub fn snapshot(changes: impl IntoIterator<Item = Change>) -> Arc<Snapshot> {
    snapshot_of_node(changes, &[])
}

/// The same on a node with these addresses.
pub fn snapshot_of_node(changes: impl IntoIterator<Item = Change>, node: &[IpAddr]) -> Arc<Snapshot> {
    let (mut writer, reader) = store();
    reader.set_node_addresses(node);
    writer.apply(changes, 1);
    writer.apply([Change::AddressesSynced, Change::PoliciesSynced], 2);
    reader.load()
}
