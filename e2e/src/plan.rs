//! What a scheduler and a kubelet would decide: which pods there are, where they run, with which addresses, and
//! whether the mesh takes them. Pure but for the [`Allocator`], which remembers what it gave so that nothing moves.
//!
//! Deployments become pods `<deployment>-<i>` from 0; the template's fields and nothing else make the pod. Limits: no
//! other controllers (StatefulSet, Job, …), no resources, no affinity; the lab warns about kinds it does not play.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use serde_json::Value;
use sha2::Digest;
use sha2::Sha256;
use tulle_proto::enrol;
use tulle_proto::names;

use crate::address;
use crate::address::Pair;
use crate::manifest::Objects;
use crate::manifest::strings;
use crate::manifest::text;

/// Annotation of namespaces whose pods are hosts outside the cluster.
pub const OUTSIDE: &str = "lab.tulle.dev/outside";

/// Annotation of pods that end tunnels themselves: control says that they speak HBONE, and no node captures them.
pub const OWN_TUNNEL: &str = "lab.tulle.dev/own-tunnel";

/// Annotation of pods that are egress gateways: the name of the Service in front of them. They end tunnels themselves, and what
/// `ztunnel gateway` needs to find control and to prove who it is comes in their environment.
pub const GATEWAY: &str = "lab.tulle.dev/gateway";

/// Namespace and name.
pub type PodKey = (String, String);

/// Where a pod runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// An own network namespace on a node; the index is that of its address.
    Node {
        /// From 1.
        node: u16,
        /// From 2.
        index: u16,
    },
    /// The node's own network namespace.
    Host {
        /// From 1.
        node: u16,
    },
    /// A host outside the cluster.
    Outside {
        /// From 0.
        index: u16,
    },
}

impl Spot {
    /// Number of the node; none for hosts outside.
    pub fn node(self) -> Option<u16> {
        match self {
            Self::Node { node, .. } | Self::Host { node } => Some(node),
            Self::Outside { .. } => None,
        }
    }

    /// The pod's addresses.
    pub fn addresses(self) -> Pair {
        match self {
            Self::Node { node, index } => address::pod(node, index),
            Self::Host { node } => address::node(node),
            Self::Outside { index } => address::outside(index),
        }
    }
}

/// One process of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Name in the manifest.
    pub name: String,
    /// `command` and `args`; empty = nothing runs.
    pub argv: Vec<String>,
    /// Own variables, without those every pod gets.
    pub env: BTreeMap<String, String>,
    /// Declared TCP ports; the pod is ready when they listen.
    pub ports: Vec<u16>,
}

/// A pod that should run.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Where.
    pub spot: Spot,
    /// Service account.
    pub account: String,
    /// Whether labels enrol it.
    pub enrolled: bool,
    /// Whether it ends tunnels itself.
    pub own_tunnel: bool,
    /// The Service whose egress gateway it is.
    pub gateway: Option<String>,
    /// Ports the kubelet probes.
    pub probe_ports: Vec<u16>,
    /// Its processes.
    pub containers: Vec<Container>,
    /// The object as written, or as the Deployment's template makes it.
    pub manifest: Value,
}

impl Pod {
    /// Namespace and name.
    pub fn key(&self) -> PodKey {
        (self.namespace.clone(), self.name.clone())
    }

    /// Whether it is a host outside the cluster.
    pub fn is_outside(&self) -> bool {
        matches!(self.spot, Spot::Outside { .. })
    }

    /// Whether going from `self` to `new` needs another process: everything but metadata counts.
    pub fn must_restart(&self, new: &Self) -> bool {
        self.containers != new.containers || self.spot != new.spot || self.account != new.account
    }
}

/// Remembers places and addresses.
#[derive(Clone, Debug)]
pub struct Allocator {
    nodes: u16,
    seed: String,
    incarnations: u64,
    turn: u16,
    pods: BTreeMap<PodKey, (Spot, String)>,
    last_index: BTreeMap<u16, u16>,
    last_outside: u16,
    services: BTreeMap<PodKey, u16>,
    last_service: u16,
}

impl Allocator {
    /// For `nodes` nodes; `seed` makes the uids of two labs differ.
    pub fn new(nodes: u16, seed: &str) -> Self {
        Self {
            nodes,
            seed: seed.into(),
            incarnations: 0,
            turn: 0,
            pods: BTreeMap::new(),
            last_index: BTreeMap::new(),
            last_outside: 0,
            services: BTreeMap::new(),
            last_service: 9,
        }
    }

    /// Place and uid of a pod: as before if it has them, else new ones.
    fn pod(&mut self, key: &PodKey, kind: SpotKind, wanted_node: Option<u16>) -> anyhow::Result<(Spot, String)> {
        if let Some((spot, uid)) = self.pods.get(key)
            && kind.fits(*spot)
            && wanted_node.is_none_or(|node| spot.node() == Some(node))
        {
            return Ok((*spot, uid.clone()));
        }
        let node = match (kind, wanted_node) {
            (SpotKind::Outside, _) => 0,
            (_, Some(node)) => node,
            (_, None) => {
                self.turn += 1;
                (self.turn - 1) % self.nodes + 1
            }
        };
        let spot = match kind {
            SpotKind::Outside => Spot::Outside { index: self.free_outside()? },
            SpotKind::Host => Spot::Host { node },
            SpotKind::Node => Spot::Node { node, index: self.free_index(node)? },
        };
        self.incarnations += 1;
        let uid = uid(&self.seed, key, self.incarnations);
        self.pods.insert(key.clone(), (spot, uid.clone()));
        Ok((spot, uid))
    }

    /// Addresses are reused as late as possible, so that a client of a removed pod does not meet its successor.
    fn free_index(&mut self, node: u16) -> anyhow::Result<u16> {
        let taken: BTreeSet<u16> = self
            .pods
            .values()
            .filter_map(|(spot, _)| match spot {
                Spot::Node { node: at, index } if *at == node => Some(*index),
                _ => None,
            })
            .collect();
        let last = self.last_index.get(&node).copied().unwrap_or(1);
        let index = next_free(last, 2, address::POD_MAX, &taken)
            .ok_or_else(|| anyhow::anyhow!("node-{node} has no address left for another pod (253 pods a node)"))?;
        self.last_index.insert(node, index);
        Ok(index)
    }

    fn free_outside(&mut self) -> anyhow::Result<u16> {
        let taken: BTreeSet<u16> = self
            .pods
            .values()
            .filter_map(|(spot, _)| if let Spot::Outside { index } = spot { Some(*index) } else { None })
            .collect();
        let index = next_free(self.last_outside, 0, address::OUTSIDE_MAX - 1, &taken)
            .ok_or_else(|| anyhow::anyhow!("no address left for another outside host (190)"))?;
        self.last_outside = index;
        Ok(index)
    }

    /// Addresses of a Service.
    pub fn service(&mut self, key: &PodKey) -> anyhow::Result<Pair> {
        if let Some(index) = self.services.get(key) {
            return Ok(address::service(*index));
        }
        let taken: BTreeSet<u16> = self.services.values().copied().collect();
        let index = next_free(self.last_service, 10, u16::MAX - 1, &taken)
            .ok_or_else(|| anyhow::anyhow!("no address left for another Service"))?;
        self.last_service = index;
        self.services.insert(key.clone(), index);
        Ok(address::service(index))
    }

    /// Forgets what is no longer wanted, after it has stopped.
    pub fn release(&mut self, pods: &BTreeSet<PodKey>, services: &BTreeSet<PodKey>) {
        self.pods.retain(|key, _| pods.contains(key));
        self.services.retain(|key, _| services.contains(key));
    }

    /// Takes over the uid that an API server has given a pod.
    pub fn rename(&mut self, key: &PodKey, uid: &str) {
        if let Some((_, own)) = self.pods.get_mut(key) {
            uid.clone_into(own);
        }
    }

    /// Forgets one pod, so that its successor of the same name gets a new uid and address.
    pub fn forget(&mut self, key: &PodKey) {
        self.pods.remove(key);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum SpotKind {
    Node,
    Host,
    Outside,
}

impl SpotKind {
    fn fits(self, spot: Spot) -> bool {
        self == match spot {
            Spot::Node { .. } => Self::Node,
            Spot::Host { .. } => Self::Host,
            Spot::Outside { .. } => Self::Outside,
        }
    }
}

fn next_free(last: u16, first: u16, max: u16, taken: &BTreeSet<u16>) -> Option<u16> {
    (last + 1..=max).chain(first..=last.min(max)).find(|index| *index >= first && !taken.contains(index))
}

fn uid(seed: &str, key: &PodKey, incarnation: u64) -> String {
    let digest = Sha256::digest(format!("{seed}/{}/{}/{incarnation}", key.0, key.1));
    let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-4{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

/// The pods that should run, in (namespace, name) order; the second value is what could not be understood.
pub fn pods(objects: &Objects, allocator: &mut Allocator, nodes: u16) -> anyhow::Result<(Vec<Pod>, Vec<String>)> {
    let mut wanted: BTreeMap<PodKey, Value> = BTreeMap::new();
    let mut warnings = Vec::new();
    for (key, object) in objects {
        match key.kind.as_str() {
            "Pod" => {
                wanted.insert((key.namespace.clone(), key.name.clone()), object.clone());
            }
            "Deployment" => {
                for (name, pod) in deployment_pods(&key.namespace, &key.name, object) {
                    wanted.entry((key.namespace.clone(), name)).or_insert(pod);
                }
            }
            kind @ ("StatefulSet" | "DaemonSet" | "Job" | "CronJob" | "ReplicaSet") => {
                warnings.push(format!("{key}: the lab does not run a {kind}; write a Deployment or Pods"));
            }
            _ => {}
        }
    }
    let mut pods = Vec::new();
    for (key, manifest) in wanted {
        pods.push(pod(objects, allocator, nodes, key, manifest)?);
    }
    Ok((pods, warnings))
}

fn deployment_pods(namespace: &str, name: &str, object: &Value) -> Vec<(String, Value)> {
    // A typing error in `replicas` should not make thousands of processes.
    let replicas = object.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1).min(500);
    (0..replicas)
        .map(|i| {
            let mut pod = object.pointer("/spec/template").cloned().unwrap_or_default();
            pod["apiVersion"] = "v1".into();
            pod["kind"] = "Pod".into();
            pod["metadata"]["name"] = format!("{name}-{i}").into();
            pod["metadata"]["namespace"] = namespace.into();
            // Control names workloads after what made them, as it would from the API server's objects.
            pod["metadata"]["ownerReferences"] = serde_json::json!([{
                "apiVersion": "apps/v1", "kind": "Deployment", "name": name, "controller": true,
                "uid": uid("deployment", &(namespace.to_owned(), name.to_owned()), 0),
            }]);
            (format!("{name}-{i}"), pod)
        })
        .collect()
}

fn pod(objects: &Objects, allocator: &mut Allocator, nodes: u16, key: PodKey, manifest: Value) -> anyhow::Result<Pod> {
    let namespace = objects.get(&crate::manifest::Key::new("Namespace", "", &key.0)).unwrap_or(&Value::Null);
    let host_network = manifest.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
    let outside = strings(namespace, "/metadata/annotations").get(OUTSIDE).is_some_and(|value| value == "true");
    let wanted_node = match text(&manifest, "/spec/nodeName") {
        "" => None,
        name => Some(node_number(name, nodes).ok_or_else(|| {
            anyhow::anyhow!(
                "Pod {}/{}: spec.nodeName {name:?} is no node of this lab (node-1 to node-{nodes})",
                key.0,
                key.1
            )
        })?),
    };
    let kind = match (outside, host_network) {
        (true, _) => SpotKind::Outside,
        (false, true) => SpotKind::Host,
        (false, false) => SpotKind::Node,
    };
    let wanted_node = wanted_node.filter(|_| !outside);
    let (spot, uid) = allocator.pod(&key, kind, wanted_node)?;
    let account = match text(&manifest, "/spec/serviceAccountName") {
        "" => "default",
        name => name,
    };
    let containers = containers(&manifest);
    let mut annotations = strings(&manifest, "/metadata/annotations");
    let gateway = annotations.remove(GATEWAY);
    let own_tunnel = gateway.is_some() || annotations.get(OWN_TUNNEL).is_some_and(|value| value == "true");
    Ok(Pod {
        own_tunnel,
        gateway,
        enrolled: !own_tunnel && !outside && !host_network && is_enrolled(&key.0, namespace, &manifest),
        probe_ports: probe_ports(&manifest),
        account: account.to_owned(),
        namespace: key.0,
        name: key.1,
        uid,
        spot,
        containers,
        manifest,
    })
}

fn node_number(name: &str, nodes: u16) -> Option<u16> {
    name.strip_prefix("node-")?.parse().ok().filter(|node| (1..=nodes).contains(node))
}

/// Whether labels enrol a pod: the pod's word before the namespace's, at each level ours before Istio's; namespaces of
/// the system only by their own word; `egress: deny` enrols always.
pub fn is_enrolled(namespace_name: &str, namespace: &Value, pod: &Value) -> bool {
    let labels = strings(namespace, "/metadata/labels");
    let closed = enrol::is_closed(labels.get(names::LABEL_EGRESS).map(String::as_str), false);
    let system = enrol::is_system(namespace_name, names::DEFAULT_ROOT_NAMESPACE);
    enrol::is_enrolled(closed, system, wish(&labels), wish(&strings(pod, "/metadata/labels")))
}

fn wish(labels: &BTreeMap<String, String>) -> Option<bool> {
    enrol::wish(|key| labels.get(key).map(String::as_str))
}

fn containers(manifest: &Value) -> Vec<Container> {
    let list = manifest.pointer("/spec/containers").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .enumerate()
        .map(|(index, container)| {
            let words = |field: &str| -> Vec<String> {
                let list = container[field].as_array().into_iter().flatten();
                list.filter_map(|word| word.as_str().map(str::to_owned)).collect()
            };
            let name = container["name"].as_str().map_or_else(|| index.to_string(), str::to_owned);
            Container {
                argv: words("command").into_iter().chain(words("args")).collect(),
                env: env(container, manifest),
                ports: container_ports(container).filter(|port| port.tcp).map(|port| port.number).collect(),
                name,
            }
        })
        .collect()
}

fn env(container: &Value, manifest: &Value) -> BTreeMap<String, String> {
    let list = container["env"].as_array().into_iter().flatten();
    list.filter_map(|entry| {
        let name = entry["name"].as_str()?.to_owned();
        let value = match text(entry, "/valueFrom/fieldRef/fieldPath") {
            "" => entry["value"].as_str().unwrap_or_default(),
            "metadata.name" => text(manifest, "/metadata/name"),
            "metadata.namespace" => text(manifest, "/metadata/namespace"),
            "spec.serviceAccountName" => text(manifest, "/spec/serviceAccountName"),
            _ => return None,
        };
        Some((name, value.to_owned()))
    })
    .collect()
}

/// A port that a container declares.
#[derive(Clone, Debug)]
pub struct ContainerPort {
    /// Name, or empty.
    pub name: String,
    /// Number.
    pub number: u16,
    /// False: UDP or SCTP.
    pub tcp: bool,
}

fn container_ports(container: &Value) -> impl Iterator<Item = ContainerPort> + '_ {
    let list = container["ports"].as_array().into_iter().flatten();
    list.filter_map(|port| {
        Some(ContainerPort {
            name: port["name"].as_str().unwrap_or_default().to_owned(),
            number: u16::try_from(port["containerPort"].as_u64()?).ok()?,
            tcp: port["protocol"].as_str().is_none_or(|protocol| protocol == "TCP"),
        })
    })
}

/// All ports that a pod declares.
pub fn declared_ports(manifest: &Value) -> Vec<ContainerPort> {
    let list = manifest.pointer("/spec/containers").and_then(Value::as_array);
    list.into_iter().flatten().flat_map(container_ports).collect()
}

/// The number behind a port that is written as a number or as the name of a declared port.
pub fn resolve_port(port: &Value, manifest: &Value) -> Option<u16> {
    if let Some(number) = port.as_u64() {
        return u16::try_from(number).ok();
    }
    let name = port.as_str()?;
    declared_ports(manifest).into_iter().find(|declared| declared.name == name).map(|declared| declared.number)
}

fn probe_ports(manifest: &Value) -> Vec<u16> {
    let list = manifest.pointer("/spec/containers").and_then(Value::as_array);
    let mut ports = BTreeSet::new();
    for container in list.into_iter().flatten() {
        for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
            for action in ["httpGet", "tcpSocket", "grpc"] {
                ports.extend(resolve_port(&container[probe][action]["port"], manifest));
            }
        }
    }
    ports.into_iter().collect()
}

#[cfg(test)]
mod tests;
