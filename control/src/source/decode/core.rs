//! Kubernetes' own kinds: namespaces, nodes, accounts, pods, services, endpoint slices, Endpoints.
//!
//! Only fields that the mesh uses are read, so that a manifest with newer or misspelt other fields still works; a
//! field that is used must be right.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    ContainerPort, Endpoint, EndpointSlice, Hints, LegacyEndpoints, Meta, NamedPort, Namespace, Node, Object, Phase,
    Pod, Service, ServiceAccount, ServiceNames, ServicePort, SlicePort, TargetPort, TrafficScope, Transport,
};
use crate::source::decode::text_map;
use crate::source::tree::{Cursor, Read, Value};

pub(super) fn namespace(_: &Cursor<'_>, meta: Meta) -> Read<Object> {
    Ok(Object::Namespace(Arc::new(Namespace { meta })))
}

pub(super) fn node(_: &Cursor<'_>, meta: Meta) -> Read<Object> {
    Ok(Object::Node(Arc::new(Node { meta })))
}

pub(super) fn service_account(_: &Cursor<'_>, meta: Meta) -> Read<Object> {
    Ok(Object::ServiceAccount(Arc::new(ServiceAccount { meta })))
}

pub(super) fn pod(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    spec.map()?;
    let status = at.get("status");
    status.map()?;
    let account = spec.get("serviceAccountName").text()?;
    let mut ports = Vec::new();
    let mut probe_ports = BTreeSet::new();
    let containers = spec.get("containers").list()?.into_iter();
    for container in containers.chain(spec.get("initContainers").list()?) {
        container.map()?;
        read_ports(&container, &mut ports)?;
        read_probes(&container, &ports, &mut probe_ports)?;
    }
    let phase = status.get("phase");
    let phase = match phase.text()? {
        None | Some("Running" | "Unknown" | "") => Phase::Running,
        Some("Pending") => Phase::Pending,
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        Some(other) => return Err(phase.error(format!("`{other}` is not a pod phase"))),
    };
    Ok(Object::Pod(Arc::new(Pod {
        meta,
        node: spec.get("nodeName").text_or_empty()?,
        service_account: account.filter(|a| !a.is_empty()).unwrap_or("default").to_owned(),
        host_network: spec.get("hostNetwork").boolean()?.unwrap_or(false),
        addresses: pod_addresses(&status)?,
        phase,
        ready: pod_ready(&status)?,
        ports,
        probe_ports,
        hostname: spec.get("hostname").text_or_empty()?,
        subdomain: spec.get("subdomain").text_or_empty()?,
    })))
}

fn pod_addresses(status: &Cursor<'_>) -> Read<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    let primary = status.get("podIP");
    if let Some(text) = primary.text()?.filter(|text| !text.is_empty()) {
        addresses.push(address(&primary, text)?);
    }
    for item in status.get("podIPs").list()? {
        let at = item.get("ip");
        let one = address(&at, at.required_text()?)?;
        if !addresses.contains(&one) {
            addresses.push(one);
        }
    }
    Ok(addresses)
}

fn pod_ready(status: &Cursor<'_>) -> Read<bool> {
    let conditions = status.get("conditions").list()?;
    if conditions.is_empty() {
        return Ok(true);
    }
    for condition in conditions {
        if condition.get("type").text()? == Some("Ready") {
            return Ok(condition.get("status").text()? == Some("True"));
        }
    }
    Ok(false)
}

fn read_ports(container: &Cursor<'_>, ports: &mut Vec<ContainerPort>) -> Read<()> {
    for item in container.get("ports").list()? {
        let number = item.get("containerPort");
        let Some(port) = number.port()? else {
            return Err(number.error("is missing"));
        };
        ports.push(ContainerPort {
            name: item.get("name").text_or_empty()?,
            port,
            protocol: transport(&item.get("protocol"))?,
        });
    }
    Ok(())
}

fn read_probes(container: &Cursor<'_>, ports: &[ContainerPort], into: &mut BTreeSet<u16>) -> Read<()> {
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        for action in ["httpGet", "tcpSocket", "grpc"] {
            let at = container.get(probe).get(action).get("port");
            match at.value() {
                None | Some(Value::Null) => {}
                Some(Value::Text(name)) => {
                    into.extend(ports.iter().filter(|p| p.name == *name).map(|p| p.port));
                }
                Some(_) => into.extend(at.port()?),
            }
        }
    }
    Ok(())
}

pub(super) fn service(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let spec = at.get("spec");
    spec.map()?;
    let mut addresses = Vec::new();
    let single = spec.get("clusterIP");
    let all = spec.get("clusterIPs").list()?;
    for at in std::iter::once(single).chain(all) {
        match at.text()? {
            None | Some("" | "None") => {}
            Some(text) => {
                let one = address(&at, text)?;
                if !addresses.contains(&one) {
                    addresses.push(one);
                }
            }
        }
    }
    let mut ports = Vec::new();
    for item in spec.get("ports").list()? {
        ports.extend(service_port(&item)?);
    }
    let mut families = (false, false);
    for (family, at) in spec.get("ipFamilies").texts()? {
        match family {
            "IPv4" => families.0 = true,
            "IPv6" => families.1 = true,
            other => return Err(at.error(format!("`{other}` is neither IPv4 nor IPv6"))),
        }
    }
    Ok(Object::Service(Arc::new(Service {
        selector: text_map(&spec.get("selector"))?,
        external: external_addresses(&spec, &at.get("status"), &addresses)?,
        addresses,
        ports,
        families,
        scope: traffic_scope(&spec)?,
        publish_not_ready: spec.get("publishNotReadyAddresses").boolean()?.unwrap_or(false),
        affinity: affinity(&spec)?,
        external_name: spec.get("type").text()? == Some("ExternalName"),
        names: service_names(&spec)?,
        meta,
    })))
}

/// sessionAffinity, with the API server's default and its limit of a day.
fn affinity(spec: &Cursor<'_>) -> Read<Option<u32>> {
    let kind = spec.get("sessionAffinity");
    match kind.text()? {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => return Err(kind.error(format!("`{other}` is neither None nor ClientIP"))),
    }
    let at = spec.get("sessionAffinityConfig").get("clientIP").get("timeoutSeconds");
    match at.value() {
        None | Some(Value::Null) => Ok(Some(10_800)),
        Some(Value::Int(seconds @ 1..=86_400)) => Ok(u32::try_from(*seconds).ok()),
        Some(_) => Err(at.error("must be a number of seconds from 1 to 86400")),
    }
}

/// Addresses that the cluster's balancing takes over besides the cluster addresses. A load balancer's are not among them
/// when it wants to see the traffic itself (ipMode Proxy), or when only some sources may use it.
fn external_addresses(spec: &Cursor<'_>, status: &Cursor<'_>, cluster: &[IpAddr]) -> Read<Vec<IpAddr>> {
    let mut found = Vec::new();
    if cluster.is_empty() {
        // Headless: nothing balances, whatever the address.
        return Ok(found);
    }
    for (text, at) in spec.get("externalIPs").texts()? {
        found.push(address(&at, text)?);
    }
    let restricted = !spec.get("loadBalancerSourceRanges").list()?.is_empty();
    for ingress in status.get("loadBalancer").get("ingress").list()? {
        let at = ingress.get("ip");
        if let Some(text) = at.text()?.filter(|text| !text.is_empty())
            && ingress.get("ipMode").text()? != Some("Proxy")
            && !restricted
        {
            found.push(address(&at, text)?);
        }
    }
    found.retain(|ip| !cluster.contains(ip));
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// What the name stands for. An ExternalName that is an address is no name, as in kube-dns.
fn service_names(spec: &Cursor<'_>) -> Read<ServiceNames> {
    let cluster_ip = spec.get("clusterIP").text()?;
    let mut names = ServiceNames { headless: cluster_ip == Some("None"), ..ServiceNames::default() };
    for at in std::iter::once(spec.get("clusterIP")).chain(spec.get("clusterIPs").list()?) {
        if let Some(text) = at.text()?.filter(|text| !matches!(*text, "" | "None")) {
            let one = address(&at, text)?;
            if !names.addresses.contains(&one) {
                names.addresses.push(one);
            }
        }
    }
    for item in spec.get("ports").list()? {
        let protocol = item.get("protocol");
        let number = item.get("port").port()?.unwrap_or_default();
        names.ports.push(NamedPort {
            name: item.get("name").text_or_empty()?,
            number,
            target: target_port(&item, number)?,
            transport: match protocol.text()? {
                Some("UDP") => Transport::Udp,
                Some("SCTP") => Transport::Sctp,
                _ => Transport::Tcp,
            },
            app_protocol: item.get("appProtocol").text_or_empty()?,
        });
    }
    if spec.get("type").text()? == Some("ExternalName") {
        let target = spec.get("externalName").text_or_empty()?;
        let target = target.trim_end_matches('.');
        if target.parse::<IpAddr>().is_err() {
            target.clone_into(&mut names.external_name);
        }
    }
    Ok(names)
}

fn service_port(item: &Cursor<'_>) -> Read<Option<ServicePort>> {
    let number = item.get("port");
    let Some(port) = number.port()? else {
        return Err(number.error("is missing"));
    };
    if !is_tcp(&item.get("protocol"))? {
        return Ok(None);
    }
    let target = target_port(item, port)?;
    Ok(Some(ServicePort {
        name: item.get("name").text_or_empty()?,
        port,
        target,
        app_protocol: item.get("appProtocol").text_or_empty()?,
    }))
}

/// Where `port` leads.
fn target_port(item: &Cursor<'_>, port: u16) -> Read<TargetPort> {
    let at = item.get("targetPort");
    Ok(match at.value() {
        None | Some(Value::Null) => TargetPort::Number(port),
        Some(Value::Text(name)) => match name.parse::<u16>() {
            Ok(0) => return Err(at.error("0 is not a port (1-65535)")),
            Ok(number) => TargetPort::Number(number),
            Err(_) if name.is_empty() => TargetPort::Number(port),
            Err(_) => TargetPort::Name(name.clone()),
        },
        // 0 means: not set.
        Some(Value::Int(0)) => TargetPort::Number(port),
        Some(_) => TargetPort::Number(at.port()?.unwrap_or(port)),
    })
}

fn traffic_scope(spec: &Cursor<'_>) -> Read<TrafficScope> {
    let policy = spec.get("internalTrafficPolicy");
    match policy.text()? {
        None | Some("Cluster") => {}
        Some("Local") => return Ok(TrafficScope::NodeOnly),
        Some(other) => return Err(policy.error(format!("`{other}` is neither Cluster nor Local"))),
    }
    Ok(match spec.get("trafficDistribution").text()? {
        Some("PreferClose" | "PreferSameZone") => TrafficScope::PreferZone,
        Some("PreferSameNode") => TrafficScope::PreferNode,
        // A hint: an unknown one changes nothing, as in kube-proxy.
        _ => TrafficScope::Cluster,
    })
}

pub(super) fn endpoint_slice(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let (ports, datagrams) = slice_ports(at)?;
    let mut endpoints = Vec::new();
    // Names instead of addresses are a form that nobody balances to.
    let named = at.get("addressType").text()? == Some("FQDN");
    for item in at.get("endpoints").list()?.into_iter().filter(|_| !named) {
        let conditions = item.get("conditions");
        let ready = conditions.get("ready").boolean()?.unwrap_or(true);
        endpoints.push(Endpoint {
            addresses: item
                .get("addresses")
                .texts()?
                .into_iter()
                .map(|(text, at)| address(&at, text))
                .collect::<Read<_>>()?,
            ready,
            serving: conditions.get("serving").boolean()?.unwrap_or(ready),
            terminating: conditions.get("terminating").boolean()?.unwrap_or(false),
            pod: target_pod(&item)?,
            node: item.get("nodeName").text_or_empty()?,
            zone: item.get("zone").text_or_empty()?,
            hints: hints(&item.get("hints"))?,
            hostname: item.get("hostname").text_or_empty()?,
        });
    }
    let service = meta.label("kubernetes.io/service-name").unwrap_or_default().to_owned();
    Ok(Object::EndpointSlice(Arc::new(EndpointSlice { meta, service, ports, datagrams, endpoints })))
}

fn hints(at: &Cursor<'_>) -> Read<Hints> {
    let names = |field: &str| -> Read<BTreeSet<String>> {
        at.get(field).list()?.iter().map(|item| Ok(item.get("name").required_text()?.to_owned())).collect()
    };
    Ok(Hints { zones: names("forZones")?, nodes: names("forNodes")? })
}

fn target_pod(item: &Cursor<'_>) -> Read<Option<String>> {
    let target = item.get("targetRef");
    let is_pod = target.get("kind").text()? == Some("Pod");
    Ok(target.get("name").text()?.filter(|_| is_pod).map(str::to_owned))
}

pub(super) fn endpoints(at: &Cursor<'_>, meta: Meta) -> Read<Object> {
    let mut subsets = Vec::new();
    for subset in at.get("subsets").list()? {
        let (ports, datagrams) = slice_ports(&subset)?;
        let mut endpoints = Vec::new();
        for (field, ready) in [("addresses", true), ("notReadyAddresses", false)] {
            for item in subset.get(field).list()? {
                let ip = item.get("ip");
                endpoints.push(Endpoint {
                    addresses: vec![address(&ip, ip.required_text()?)?],
                    ready,
                    serving: ready,
                    terminating: false,
                    pod: target_pod(&item)?,
                    node: item.get("nodeName").text_or_empty()?,
                    zone: String::new(),
                    hints: Hints::default(),
                    hostname: item.get("hostname").text_or_empty()?,
                });
            }
        }
        let service = meta.name.clone();
        subsets.push(EndpointSlice { meta: meta.clone(), service, ports, datagrams, endpoints });
    }
    Ok(Object::Endpoints(Arc::new(LegacyEndpoints { meta, subsets })))
}

/// Ports of TCP, and the others as (name, transport, number).
type SlicePorts = (Vec<SlicePort>, Vec<(String, Transport, u16)>);

fn slice_ports(at: &Cursor<'_>) -> Read<SlicePorts> {
    let (mut ports, mut datagrams) = (Vec::new(), Vec::new());
    for item in at.get("ports").list()? {
        let Some(port) = item.get("port").port()? else { continue };
        let name = item.get("name").text_or_empty()?;
        match transport(&item.get("protocol"))? {
            Transport::Tcp => ports.push(SlicePort { name, port }),
            other => datagrams.push((name, other, port)),
        }
    }
    Ok((ports, datagrams))
}

fn address(at: &Cursor<'_>, text: &str) -> Read<IpAddr> {
    text.parse::<IpAddr>().map(|ip| ip.to_canonical()).map_err(|_| at.error(format!("`{text}` is not an IP address")))
}

fn is_tcp(protocol: &Cursor<'_>) -> Read<bool> {
    Ok(transport(protocol)? == Transport::Tcp)
}

/// A protocol; TCP if absent.
pub(super) fn transport(protocol: &Cursor<'_>) -> Read<Transport> {
    match protocol.text()? {
        None | Some("TCP" | "") => Ok(Transport::Tcp),
        Some("UDP") => Ok(Transport::Udp),
        Some("SCTP") => Ok(Transport::Sctp),
        Some(other) => Err(protocol.error(format!("`{other}` is none of TCP, UDP, SCTP"))),
    }
}
