//! Completing manifests to what an API server would hold: addresses, nodes, uids, status, conditions, EndpointSlices.
//!
//! Pure: wanted objects, planned pods and what is known of them in; files out. What the lab does not interpret passes
//! through untouched, so that control is the only judge of policies. Limits: hosts outside the cluster and everything
//! in their namespaces are left out; a Service of type ExternalName gets no address.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;
use serde_json::json;
use tulle_proto::names;

use crate::address;
use crate::address::Pair;
use crate::manifest::Key;
use crate::manifest::Objects;
use crate::manifest::strings;
use crate::manifest::text;
use crate::plan;
use crate::plan::Allocator;
use crate::plan::Pod;
use crate::plan::PodKey;

/// What is known of a pod besides its plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its processes run or have been started.
    pub started: bool,
    /// Its declared ports listen.
    pub ready: bool,
    /// All its processes have ended; the worst exit code.
    pub finished: Option<i32>,
    /// It is being removed.
    pub leaving: bool,
    /// Value of the redirection annotation.
    pub redirection: Option<&'static str>,
}

/// A Service as the lab's own address translation and DNS need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: PodKey,
    /// None: headless.
    pub addresses: Option<Pair>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Ready pods (all pods with `publishNotReadyAddresses`).
    pub pods: Vec<ServicePod>,
    /// Target of an ExternalName Service.
    pub external: Option<String>,
    /// What else its address translation must know.
    pub proxy: Proxy,
}

/// How a Service is balanced, and where else it is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    /// spec.externalIPs and the addresses of status.loadBalancer.
    pub addresses: Vec<IpAddr>,
    /// Port on every node, by port of the Service; TCP only.
    pub node_ports: BTreeMap<u16, u16>,
    /// internalTrafficPolicy: Local.
    pub internal_local: bool,
    /// externalTrafficPolicy: Local.
    pub external_local: bool,
    /// sessionAffinity: ClientIP.
    pub affinity: bool,
}

/// A pod behind a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePod {
    /// Its name.
    pub name: String,
    /// Its name below the Service: spec.hostname, if spec.subdomain is the Service.
    pub label: Option<String>,
    /// Its addresses.
    pub pair: Pair,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; may be empty.
    pub name: String,
    /// Port of the Service.
    pub port: u16,
    /// False: UDP. SCTP is left out.
    pub tcp: bool,
    /// Where the port leads at each ready pod.
    pub endpoints: Vec<(Pair, u16)>,
}

/// Everything that follows from the plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completed {
    /// Objects for control.
    pub objects: Objects,
    /// Services for the nodes.
    pub services: Vec<Service>,
}

/// Completes all objects. Errors are exhausted addresses.
pub fn complete(
    wanted: &Objects,
    pods: &[Pod],
    facts: &BTreeMap<PodKey, Facts>,
    allocator: &mut Allocator,
    nodes: u16,
) -> anyhow::Result<Completed> {
    let outside: BTreeSet<&str> = wanted
        .iter()
        .filter(|(key, object)| {
            key.kind == "Namespace"
                && strings(object, "/metadata/annotations").get(plan::OUTSIDE).is_some_and(|value| value == "true")
        })
        .map(|(key, _)| key.name.as_str())
        .collect();
    let mut all = Completed::default();
    for node in 1..=nodes {
        insert(&mut all.objects, node_object(node));
    }
    let none = Facts::default();
    for pod in pods.iter().filter(|pod| !pod.is_outside()) {
        insert(&mut all.objects, pod_object(pod, facts.get(&pod.key()).unwrap_or(&none)));
    }
    for (key, object) in wanted {
        let is_outside = outside.contains(key.namespace.as_str())
            || (key.kind == "Namespace" && outside.contains(key.name.as_str()));
        match key.kind.as_str() {
            _ if is_outside => {}
            "Pod" | "Deployment" => {}
            // Nodes are the lab's; what a manifest says of one is its labels (zones).
            "Node" => {
                let labels = object.pointer("/metadata/labels").and_then(Value::as_object).cloned().unwrap_or_default();
                if let Some(node) = all.objects.get_mut(&Key::new("Node", "", &key.name)) {
                    labels.into_iter().for_each(|(name, value)| node["metadata"]["labels"][name] = value);
                }
            }
            "Service" => {
                let (object, slices, service) = service(key, object, pods, facts, allocator)?;
                insert(&mut all.objects, object);
                slices.into_iter().for_each(|slice| insert(&mut all.objects, slice));
                all.services.push(service);
            }
            _ => {
                all.objects.insert(key.clone(), object.clone());
            }
        }
    }
    for name in needed_namespaces(&all.objects) {
        let key = Key::new("Namespace", "", &name);
        all.objects
            .entry(key)
            .or_insert_with(|| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
    }
    Ok(all)
}

fn insert(objects: &mut Objects, object: Value) {
    let key = Key::new(text(&object, "/kind"), text(&object, "/metadata/namespace"), text(&object, "/metadata/name"));
    objects.insert(key, object);
}

fn needed_namespaces(objects: &Objects) -> BTreeSet<String> {
    let named = objects.keys().filter(|key| !key.namespace.is_empty()).map(|key| key.namespace.clone());
    named.chain([names::DEFAULT_ROOT_NAMESPACE.to_owned()]).collect()
}

fn node_object(node: u16) -> Value {
    let addresses: Vec<Value> = address::node(node)
        .texts()
        .into_iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    let (v4, v6) = address::pod_ranges(node);
    let name = format!("node-{node}");
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn pod_object(pod: &Pod, facts: &Facts) -> Value {
    let mut object = pod.manifest.clone();
    let addresses = pod.spot.addresses();
    let node = pod.spot.node().unwrap_or_default();
    object["apiVersion"] = "v1".into();
    object["kind"] = "Pod".into();
    object["metadata"]["namespace"] = pod.namespace.clone().into();
    object["metadata"]["uid"] = pod.uid.clone().into();
    if let Some(redirection) = facts.redirection {
        object["metadata"]["annotations"][names::ANNOTATION_REDIRECTION] = redirection.into();
    }
    if facts.leaving {
        object["metadata"]["deletionTimestamp"] = "2000-01-01T00:00:00Z".into();
    }
    object["spec"]["nodeName"] = format!("node-{node}").into();
    object["spec"]["serviceAccountName"] = pod.account.clone().into();
    let phase = match facts.finished {
        Some(0) => "Succeeded",
        Some(_) => "Failed",
        None if facts.started => "Running",
        None => "Pending",
    };
    let ready = if facts.ready && !facts.leaving && facts.finished.is_none() { "True" } else { "False" };
    object["status"] = json!({
        "phase": phase,
        "hostIP": address::node(node).v4.to_string(),
        "podIP": addresses.v4.to_string(),
        "podIPs": addresses.texts().map(|ip| json!({"ip": ip})),
        "conditions": [{"type": "Ready", "status": ready}],
    });
    object
}

type CompletedService = (Value, Vec<Value>, Service);

fn service(
    key: &Key,
    object: &Value,
    pods: &[Pod],
    facts: &BTreeMap<PodKey, Facts>,
    allocator: &mut Allocator,
) -> anyhow::Result<CompletedService> {
    let mut object = object.clone();
    object["metadata"]["namespace"] = key.namespace.clone().into();
    let own = (key.namespace.clone(), key.name.clone());
    if text(&object, "/spec/type") == "ExternalName" {
        let external = Some(text(&object, "/spec/externalName").to_owned());
        let proxy = Proxy::default();
        let service = Service { key: own, addresses: None, ports: vec![], pods: vec![], external, proxy };
        return Ok((object, vec![], service));
    }
    let headless = text(&object, "/spec/clusterIP") == "None";
    let addresses = if headless { None } else { Some(allocator.service(&own)?) };
    object["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
    object["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
    match addresses {
        Some(pair) => {
            object["spec"]["clusterIP"] = pair.v4.to_string().into();
            object["spec"]["clusterIPs"] = json!(pair.texts());
        }
        None => object["spec"]["clusterIPs"] = json!(["None"]),
    }
    let members = members(key, &object, pods, facts);
    let slices = if object.pointer("/spec/selector").is_some() { slices(key, &object, &members) } else { vec![] };
    let publish = object.pointer("/spec/publishNotReadyAddresses") == Some(&Value::Bool(true));
    let serving: Vec<&Member<'_>> = members.iter().filter(|member| member.ready || publish).collect();
    let ports = ports(&object)
        .filter_map(|port| {
            let number = u16::try_from(port["port"].as_u64()?).ok()?;
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            let endpoints = serving
                .iter()
                .filter_map(|member| Some((member.pod.spot.addresses(), target(port, member.pod)?)))
                .collect();
            let name = port["name"].as_str().unwrap_or_default().to_owned();
            (protocol != "SCTP").then(|| ServicePort { name, port: number, tcp: protocol == "TCP", endpoints })
        })
        .collect();
    let pods = serving.iter().map(|member| service_pod(member.pod, &key.name)).collect();
    let proxy = proxy(&mut object);
    Ok((object, slices, Service { key: own, addresses, ports, pods, external: None, proxy }))
}

/// Gives the ports of the node that are missing, and reads what kube-proxy reads.
fn proxy(object: &mut Value) -> Proxy {
    let mut node_ports = BTreeMap::new();
    if matches!(text(object, "/spec/type"), "NodePort" | "LoadBalancer") {
        let seed: u16 =
            text(object, "/spec/clusterIP").bytes().fold(0, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let ports = object.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for (index, port) in ports.into_iter().flatten().enumerate() {
            let wanted = port["nodePort"].as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
            // Anywhere in Kubernetes' range; two Services that meet there must say which they want.
            let given = wanted.unwrap_or(30_000 + (seed.wrapping_add(index as u16)) % 2_768);
            port["nodePort"] = given.into();
            if let Some(number) = port["port"].as_u64().and_then(|port| u16::try_from(port).ok()) {
                node_ports.insert(number, given);
            }
        }
    }
    let external = object.pointer("/spec/externalIPs").and_then(Value::as_array).into_iter().flatten();
    let balancer = object.pointer("/status/loadBalancer/ingress").and_then(Value::as_array).into_iter().flatten();
    let addresses = external.chain(balancer.map(|entry| &entry["ip"])).filter_map(Value::as_str);
    Proxy {
        addresses: addresses.filter_map(|ip| ip.parse().ok()).collect(),
        node_ports,
        internal_local: text(object, "/spec/internalTrafficPolicy") == "Local",
        external_local: text(object, "/spec/externalTrafficPolicy") == "Local",
        affinity: text(object, "/spec/sessionAffinity") == "ClientIP",
    }
}

fn service_pod(pod: &Pod, service: &str) -> ServicePod {
    let own = text(&pod.manifest, "/spec/hostname");
    let label = (!own.is_empty() && text(&pod.manifest, "/spec/subdomain") == service).then(|| own.to_owned());
    ServicePod { name: pod.name.clone(), label, pair: pod.spot.addresses() }
}

struct Member<'a> {
    pod: &'a Pod,
    ready: bool,
    serving: bool,
    leaving: bool,
}

fn members<'a>(key: &Key, object: &Value, pods: &'a [Pod], facts: &BTreeMap<PodKey, Facts>) -> Vec<Member<'a>> {
    let selector = strings(object, "/spec/selector");
    if selector.is_empty() {
        return vec![];
    }
    pods.iter()
        .filter(|pod| pod.namespace == key.namespace && !pod.is_outside())
        .filter(|pod| {
            let labels = strings(&pod.manifest, "/metadata/labels");
            selector.iter().all(|(name, value)| labels.get(name) == Some(value))
        })
        .filter_map(|pod| {
            let facts = facts.get(&pod.key()).cloned().unwrap_or_default();
            let ready = facts.ready && !facts.leaving;
            let (serving, leaving) = (facts.ready, facts.leaving);
            facts.finished.is_none().then_some(Member { pod, ready, serving, leaving })
        })
        .collect()
}

fn ports(service: &Value) -> impl Iterator<Item = &Value> {
    service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten()
}

fn target(port: &Value, pod: &Pod) -> Option<u16> {
    match &port["targetPort"] {
        Value::Null => u16::try_from(port["port"].as_u64()?).ok(),
        target => plan::resolve_port(target, &pod.manifest),
    }
}

/// One slice per family and per set of resolved ports, as the endpoint slice controller makes them.
fn slices(key: &Key, service: &Value, members: &[Member<'_>]) -> Vec<Value> {
    let publish = service.pointer("/spec/publishNotReadyAddresses") == Some(&Value::Bool(true));
    let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&Member<'_>>> = BTreeMap::new();
    for member in members {
        groups.entry(ports(service).map(|port| target(port, member.pod)).collect()).or_default().push(member);
    }
    if groups.is_empty() {
        groups.insert(ports(service).map(|_| None).collect(), vec![]);
    }
    let mut slices = Vec::new();
    for (number, (targets, members)) in groups.into_iter().enumerate() {
        for (family, family_name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let ports: Vec<Value> = ports(service)
                .zip(&targets)
                .filter_map(|(port, target)| {
                    let mut entry = json!({
                        "name": port["name"].as_str().unwrap_or_default(),
                        "port": (*target)?,
                        "protocol": port["protocol"].as_str().unwrap_or("TCP"),
                    });
                    if let Some(protocol) = port["appProtocol"].as_str() {
                        entry["appProtocol"] = protocol.into();
                    }
                    Some(entry)
                })
                .collect();
            let endpoints: Vec<Value> = members
                .iter()
                .map(|member| {
                    json!({
                        "addresses": [member.pod.spot.addresses().texts()[family]],
                        "conditions": {
                            "ready": member.ready || publish,
                            "serving": member.serving || publish,
                            "terminating": member.leaving,
                        },
                        "nodeName": format!("node-{}", member.pod.spot.node().unwrap_or_default()),
                        "targetRef": {
                            "kind": "Pod", "namespace": member.pod.namespace,
                            "name": member.pod.name, "uid": member.pod.uid,
                        },
                    })
                })
                .collect();
            slices.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}-{number}", key.name, family_name.to_lowercase()),
                    "namespace": key.namespace,
                    "labels": {"kubernetes.io/service-name": key.name},
                },
                "addressType": family_name, "ports": ports, "endpoints": endpoints,
            }));
        }
    }
    slices
}

/// Name of the file of an object, relative to control's source directory.
pub fn file_name(key: &Key) -> String {
    let directory = if key.namespace.is_empty() { "_cluster" } else { &key.namespace };
    format!("{directory}/{}-{}.yaml", key.kind.to_lowercase(), key.name)
}

#[cfg(test)]
mod tests;
