//! A pod as the API server describes it, cut down to what the node needs. Everything else is forgotten at once.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tulle_proto::names;

use crate::capture::pods::check_name;
use crate::cni::enrolment::{Labels, relevant};

/// Annotation of the pod object that stands for a static pod: the uid under which the kubelet runs it.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// metadata.uid.
    pub uid: String,
    /// The uid by which the kubelet, its cgroups and CNI plugins know it: that of a static pod differs from its object's.
    pub runtime_uid: String,
    /// metadata.name.
    pub name: String,
    /// metadata.namespace.
    pub namespace: String,
    /// spec.serviceAccountName; `default` if empty.
    pub service_account: String,
    /// Labels that matter here.
    pub labels: Labels,
    /// Value of the redirection annotation.
    pub redirection: Option<String>,
    /// It uses the node's own network.
    pub host_network: bool,
    /// It has ended.
    pub finished: bool,
    /// status.podIPs, in order of their values.
    pub ips: Vec<IpAddr>,
    /// Ports on which the kubelet asks.
    pub probe_ports: Vec<u16>,
}

impl Member {
    /// What matters of `pod`. `None`: it is none that could be compared and printed.
    pub fn of(pod: &v1::Pod) -> Option<Self> {
        let meta = &pod.metadata;
        let (uid, name, namespace) = (meta.uid.clone()?, meta.name.clone()?, meta.namespace.clone()?);
        for (field, value) in [("uid", &uid), ("name", &name), ("namespace", &namespace)] {
            check_name(field, value).ok()?;
        }
        let annotation = |key: &str| meta.annotations.as_ref().and_then(|all| all.get(key)).cloned();
        let (spec, status) = (pod.spec.as_ref(), pod.status.as_ref());
        let account = spec.and_then(|spec| spec.service_account_name.clone()).filter(|account| !account.is_empty());
        let phase = status.and_then(|status| status.phase.as_deref());
        Some(Self {
            runtime_uid: annotation(MIRROR).filter(|uid| is_static(uid)).unwrap_or_else(|| uid.clone()),
            uid,
            name,
            namespace,
            service_account: account.unwrap_or_else(|| "default".to_owned()),
            labels: meta.labels.as_ref().map(relevant).unwrap_or_default(),
            redirection: annotation(names::ANNOTATION_REDIRECTION),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            ips: status.map(addresses).unwrap_or_default(),
            probe_ports: spec.map(probe_ports).unwrap_or_default(),
        })
    }
}

/// Whether a uid is one that the kubelet gives to static pods: a hash. Whoever may make pods may also write the annotation, and
/// must not name a pod of others by it, whose uid the API server gave.
fn is_static(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn addresses(status: &v1::PodStatus) -> Vec<IpAddr> {
    let texts = status.pod_ips.iter().flatten().map(|one| one.ip.as_str()).chain(status.pod_ip.as_deref());
    let parsed = texts.filter_map(|text| text.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical());
    parsed.collect::<BTreeSet<IpAddr>>().into_iter().collect()
}

/// Ports that the kubelet connects to, in order: probes of all containers and HTTP hooks of their life.
fn probe_ports(spec: &v1::PodSpec) -> Vec<u16> {
    let mut found = BTreeSet::new();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let mut port = |port: &IntOrString| found.extend(number(port, container));
        let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
        for probe in probes.into_iter().flatten() {
            // One that names a host asks somewhere else.
            probe.http_get.iter().filter(|action| action.host.is_none()).for_each(|action| port(&action.port));
            probe.tcp_socket.iter().filter(|action| action.host.is_none()).for_each(|action| port(&action.port));
            probe.grpc.iter().for_each(|action| port(&IntOrString::Int(action.port)));
        }
        let hooks = container.lifecycle.iter().flat_map(|life| [&life.post_start, &life.pre_stop]).flatten();
        for hook in hooks {
            hook.http_get.iter().filter(|action| action.host.is_none()).for_each(|action| port(&action.port));
            hook.tcp_socket.iter().filter(|action| action.host.is_none()).for_each(|action| port(&action.port));
        }
    }
    found.into_iter().collect()
}

/// The number of a port that may be a name, which the container declares.
fn number(port: &IntOrString, container: &v1::Container) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => {
            let mut declared = container.ports.iter().flatten();
            let named = declared.find(|port| port.name.as_deref() == Some(text.as_str()));
            named.map(|port| port.container_port).or_else(|| text.parse().ok())?
        }
    };
    u16::try_from(number).ok().filter(|number| *number != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Member;

    fn member(value: serde_json::Value) -> Option<Member> {
        Member::of(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_pod_is_cut_down_to_what_matters() {
        let pod = member(json!({
            "metadata": {"uid": "u1", "name": "a", "namespace": "shop",
                "labels": {"app": "a", "tulle.dev/mesh": "enabled"},
                "annotations": {"ambient.istio.io/redirection": "enabled", "x": "y"}},
            "spec": {"nodeName": "n", "serviceAccountName": "web", "containers": [{
                "name": "c", "ports": [{"name": "http", "containerPort": 8080}, {"name": "health", "containerPort": 9000}],
                "livenessProbe": {"httpGet": {"port": "health"}},
                "readinessProbe": {"tcpSocket": {"port": 8080}},
                "startupProbe": {"grpc": {"port": 9100}},
                "lifecycle": {"preStop": {"httpGet": {"port": "http", "path": "/stop"}},
                              "postStart": {"httpGet": {"port": 7777, "host": "example.com"}}},
            }], "initContainers": [{"name": "i", "restartPolicy": "Always",
                "startupProbe": {"httpGet": {"port": "9200"}}, "livenessProbe": {"httpGet": {"port": "absent"}}}]},
            "status": {"phase": "Running", "podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::2"}]},
        }))
        .unwrap();
        assert_eq!(pod.probe_ports, [8080, 9000, 9100, 9200]);
        assert_eq!(pod.ips, ["10.0.0.2", "fd00::2"].map(|ip| ip.parse::<std::net::IpAddr>().unwrap()));
        assert_eq!(pod.labels.len(), 1);
        assert_eq!((pod.service_account.as_str(), pod.redirection.as_deref()), ("web", Some("enabled")));
        assert_eq!((pod.runtime_uid.as_str(), pod.host_network, pod.finished), ("u1", false, false));
    }

    #[test]
    fn what_is_missing_or_odd_harms_nobody() {
        let bare = member(json!({"metadata": {"uid": "u", "name": "a", "namespace": "n"}})).unwrap();
        assert_eq!((bare.service_account.as_str(), bare.ips.len()), ("default", 0));
        assert!(member(json!({"metadata": {"name": "a", "namespace": "n"}})).is_none(), "no uid");
        assert!(member(json!({"metadata": {"uid": "u\n", "name": "a", "namespace": "n"}})).is_none());
        let odd = member(json!({
            "metadata": {"uid": "u", "name": "a", "namespace": "n",
                "annotations": {"kubernetes.io/config.mirror": "4d4b7e3e6f5c8a9b0c1d2e3f40516273"}},
            "spec": {"hostNetwork": true, "containers": [{"name": "c", "livenessProbe": {"httpGet": {"port": 70000}}}]},
            "status": {"phase": "Failed", "podIPs": [{"ip": "nonsense"}]},
        }))
        .unwrap();
        assert!(odd.host_network && odd.finished && odd.ips.is_empty() && odd.probe_ports.is_empty());
        assert_eq!(odd.runtime_uid, "4d4b7e3e6f5c8a9b0c1d2e3f40516273");
        // A uid of the API server is another pod's.
        let other = json!({"kubernetes.io/config.mirror": "0f47a1f6-9d1c-4a1f-8b54-2f0f6f2a7c11"});
        let posing = member(json!({"metadata": {"uid": "u", "name": "a", "namespace": "n", "annotations": other}}));
        assert_eq!(posing.unwrap().runtime_uid, "u");
    }
}
