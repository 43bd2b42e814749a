//! Services as an API server and the endpoint slice controller would have them: addresses, ports of the nodes, EndpointSlices
//! with their conditions and hints; and the same for the lab's own address translation and DNS.
//!
//! Pure. Hints follow trafficDistribution: an endpoint's are its own zone, and its own node for PreferSameNode; none where
//! some endpoint's node has no zone. Limits: a Service of type ExternalName gets no address; slices have no limit of size.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;
use serde_json::json;

use crate::address;
use crate::address::Pair;
use crate::manifest::Key;
use crate::manifest::strings;
use crate::manifest::text;
use crate::objects::Facts;
use crate::plan;
use crate::plan::Allocator;
use crate::plan::Pod;
use crate::plan::PodKey;

/// `timeoutSeconds` of a Service that says none.
const AFFINITY_S: u64 = 10_800;

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
    /// Port on every node, by port of the Service and whether that is one of TCP; else it is one of UDP.
    pub node_ports: BTreeMap<(u16, bool), u16>,
    /// internalTrafficPolicy: Local.
    pub internal_local: bool,
    /// externalTrafficPolicy: Local.
    pub external_local: bool,
    /// sessionAffinity: ClientIP, and for how long after a client's last connection, seconds.
    pub affinity: Option<u64>,
    /// spec.trafficDistribution.
    pub distribution: Distribution,
    /// Zone of each node that has one.
    pub zones: BTreeMap<u16, String>,
}

/// Which endpoints are named to which clients by hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// There are no hints.
    #[default]
    Anywhere,
    /// To clients of the same zone.
    Zone,
    /// To clients of the same node, and of the same zone.
    Node,
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
    /// Where the port leads at each pod.
    pub endpoints: Vec<Member>,
}

/// A pod at one port of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its addresses.
    pub pair: Pair,
    /// Where the port leads.
    pub port: u16,
    /// The node that it runs on.
    pub node: u16,
    /// It is ready, or nobody asks for that.
    pub ready: bool,
    /// It is being removed and still serves.
    pub leaving: bool,
}

impl Member {
    /// A ready one.
    pub fn ready(pair: Pair, port: u16, node: u16) -> Self {
        Self { pair, port, node, ready: true, leaving: false }
    }
}

/// The Service `default/kubernetes`, which a real API server makes itself: its door into the lab, at the first address of the
/// range. Nodes need it, and nobody applies it.
pub fn api_server(port: u16) -> Service {
    let endpoints = vec![Member::ready(address::CONTROL, port, 0)];
    Service {
        key: ("default".into(), "kubernetes".into()),
        addresses: Some(address::service(1)),
        ports: vec![ServicePort { name: "https".into(), port: 443, tcp: true, endpoints }],
        pods: vec![],
        external: None,
        proxy: Proxy::default(),
    }
}

/// The completed object, its slices, and what the nodes need.
type Completed = (Value, Vec<Value>, Service);

/// Completes one Service; its endpoints come from `pods`, and `zones` are the zones of nodes that have one.
pub fn service(
    key: &Key,
    object: &Value,
    pods: &[Pod],
    facts: &BTreeMap<PodKey, Facts>,
    zones: &BTreeMap<u16, String>,
    allocator: &mut Allocator,
) -> anyhow::Result<Completed> {
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
    let proxy = proxy(&mut object, zones);
    let has_selector = object.pointer("/spec/selector").is_some();
    let slices = if has_selector { slices(key, &object, &members, &proxy) } else { vec![] };
    let ports = ports(&object)
        .filter_map(|port| {
            let number = u16::try_from(port["port"].as_u64()?).ok()?;
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            let endpoints = members.iter().filter_map(|one| one.at(target(port, one.pod)?)).collect();
            let name = port["name"].as_str().unwrap_or_default().to_owned();
            (protocol != "SCTP").then(|| ServicePort { name, port: number, tcp: protocol == "TCP", endpoints })
        })
        .collect();
    let pods = members.iter().filter(|one| one.ready).map(|one| service_pod(one.pod, &key.name)).collect();
    Ok((object, slices, Service { key: own, addresses, ports, pods, external: None, proxy }))
}

/// Gives the ports of the node that are missing, and reads what kube-proxy reads.
fn proxy(object: &mut Value, zones: &BTreeMap<u16, String>) -> Proxy {
    let mut node_ports = BTreeMap::new();
    if matches!(text(object, "/spec/type"), "NodePort" | "LoadBalancer") {
        let seed: u16 =
            text(object, "/spec/clusterIP").bytes().fold(0, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let ports = object.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for (index, port) in ports.into_iter().flatten().enumerate() {
            let wanted = port["nodePort"].as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
            // Anywhere in Kubernetes' range; two Services that meet there must say which they want.
            let given = wanted.unwrap_or_else(|| 30_000 + seed.wrapping_add(index as u16) % 2_768);
            port["nodePort"] = given.into();
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            let number = port["port"].as_u64().and_then(|port| u16::try_from(port).ok());
            if let Some(number) = number.filter(|_| protocol != "SCTP") {
                node_ports.insert((number, protocol == "TCP"), given);
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
        affinity: (text(object, "/spec/sessionAffinity") == "ClientIP").then(|| {
            let timeout = object.pointer("/spec/sessionAffinityConfig/clientIP/timeoutSeconds");
            timeout.and_then(Value::as_u64).filter(|seconds| *seconds > 0).unwrap_or(AFFINITY_S)
        }),
        distribution: match text(object, "/spec/trafficDistribution") {
            "PreferClose" | "PreferSameZone" => Distribution::Zone,
            "PreferSameNode" => Distribution::Node,
            _ => Distribution::Anywhere,
        },
        zones: zones.clone(),
    }
}

fn service_pod(pod: &Pod, service: &str) -> ServicePod {
    let own = text(&pod.manifest, "/spec/hostname");
    let label = (!own.is_empty() && text(&pod.manifest, "/spec/subdomain") == service).then(|| own.to_owned());
    ServicePod { name: pod.name.clone(), label, pair: pod.spot.addresses() }
}

/// A pod behind a Service: its conditions as the endpoint slice controller gives them.
struct Behind<'a> {
    pod: &'a Pod,
    ready: bool,
    serving: bool,
    leaving: bool,
}

impl Behind<'_> {
    fn node(&self) -> u16 {
        self.pod.spot.node().unwrap_or_default()
    }

    /// As the address translation must know it, if it may ever get traffic.
    fn at(&self, port: u16) -> Option<Member> {
        let (ready, leaving) = (self.ready, self.serving && self.leaving);
        let member = Member { pair: self.pod.spot.addresses(), port, node: self.node(), ready, leaving };
        (ready || leaving).then_some(member)
    }
}

fn members<'a>(key: &Key, object: &Value, pods: &'a [Pod], facts: &BTreeMap<PodKey, Facts>) -> Vec<Behind<'a>> {
    let selector = strings(object, "/spec/selector");
    let publish = object.pointer("/spec/publishNotReadyAddresses") == Some(&Value::Bool(true));
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
            let ready = publish || (facts.ready && !facts.leaving);
            let (serving, leaving) = (facts.ready, facts.leaving);
            facts.finished.is_none().then_some(Behind { pod, ready, serving, leaving })
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
fn slices(key: &Key, service: &Value, members: &[Behind<'_>], proxy: &Proxy) -> Vec<Value> {
    let all_zoned = members.iter().filter(|one| one.ready).all(|one| proxy.zones.contains_key(&one.node()));
    let distribution = if all_zoned { proxy.distribution } else { Distribution::Anywhere };
    let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&Behind<'_>>> = BTreeMap::new();
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
            let endpoints: Vec<Value> =
                members.iter().map(|member| endpoint(member, family, distribution, &proxy.zones)).collect();
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

/// One endpoint of a slice of one family.
fn endpoint(member: &Behind<'_>, family: usize, distribution: Distribution, zones: &BTreeMap<u16, String>) -> Value {
    let node = format!("node-{}", member.node());
    let zone = zones.get(&member.node());
    let mut endpoint = json!({
        "addresses": [member.pod.spot.addresses().texts()[family]],
        "conditions": {"ready": member.ready, "serving": member.serving, "terminating": member.leaving},
        "nodeName": node,
        "targetRef": {
            "kind": "Pod", "namespace": member.pod.namespace, "name": member.pod.name, "uid": member.pod.uid,
        },
    });
    if let Some(zone) = zone {
        endpoint["zone"] = zone.clone().into();
    }
    if let (Some(zone), true) = (zone, member.ready && distribution != Distribution::Anywhere) {
        endpoint["hints"]["forZones"] = json!([{"name": zone}]);
        if distribution == Distribution::Node {
            endpoint["hints"]["forNodes"] = json!([{"name": node}]);
        }
    }
    endpoint
}
