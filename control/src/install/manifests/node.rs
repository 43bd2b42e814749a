//! The DaemonSets of node proxies: of all nodes, and of those that are labelled to try another version first.
//!
//! A node's label `tulle.dev/proxy` says which of the two it has: none, the usual one; `beside`, both, of which the one that
//! started last serves; `canary`, the canary alone. Both are always there, so a labelled node never lacks a proxy.
//! A proxy works in the node's network and among the node's processes, because there the rules, the fence and the network
//! namespaces of pods are; beyond that it has four capabilities and a read-only image. It declares no ports: they are the
//! node's, and the scheduler would not start a new proxy beside the old one that hands over to it.

use serde_json::{Value, json};
use tulle_proto::names;

use super::{Input, env, map, proxy_mounts, proxy_volumes, selector, template};

const NAME: &str = "ztunnel";
/// Values of the node's label.
const BOTH: &str = "beside";
const ALONE: &str = "canary";

pub(super) fn objects(input: &Input<'_>) -> Vec<Value> {
    let tag = input.values.ztunnel.canary.tag.as_str();
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": input.meta(NAME, NAME)}),
        daemon_set(input, NAME, "", json!({"key": names::LABEL_PROXY, "operator": "NotIn", "values": [ALONE]})),
        daemon_set(
            input,
            names::PROXY_CANARY,
            tag,
            json!({"key": names::LABEL_PROXY, "operator": "In", "values": [BOTH, ALONE]}),
        ),
    ]
}

/// The proxies of the nodes whose labels are `wanted`. `tag` is that of the image; empty: that of all.
fn daemon_set(input: &Input<'_>, name: &str, tag: &str, wanted: Value) -> Value {
    let chosen = &input.values.ztunnel;
    let update = &chosen.update;
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": input.meta(name, name),
        "spec": {
            "minReadySeconds": update.min_ready_seconds,
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": update.max_surge, "maxUnavailable": update.max_unavailable},
            },
            "selector": {"matchLabels": selector(name)},
            "template": template(input.labels(name), &chosen.pod_annotations, pod(input, tag, wanted)),
        },
    })
}

fn pod(input: &Input<'_>, tag: &str, wanted: Value) -> Value {
    let chosen = &input.values.ztunnel;
    let mut security = json!({
        "runAsUser": 0,
        "runAsGroup": 0,
        "seccompProfile": {"type": "RuntimeDefault"},
        // The default profile forbids looking at processes of others.
        "appArmorProfile": {"type": "Unconfined"},
    });
    if !chosen.se_linux_type.is_empty() {
        security["seLinuxOptions"] = json!({"type": chosen.se_linux_type});
    }
    let host = |name: &str, path: &str| json!({"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate"}});
    let mut volumes = proxy_volumes().to_vec();
    volumes.extend([
        // Sockets: of the CNI plugin, and between a proxy and its successor.
        host("run", "/run/tulle"),
        // What the CNI plugin knows while no proxy runs.
        host("state", "/var/lib/tulle"),
        host("netns", "/run/netns"),
        host("cni-bin", &chosen.cni.bin_dir),
        host("cni-conf", &chosen.cni.conf_dir),
    ]);
    let mut pod = json!({
        "serviceAccountName": NAME,
        "priorityClassName": chosen.priority_class_name,
        "terminationGracePeriodSeconds": chosen.termination_grace_period_seconds,
        "hostNetwork": true,
        "hostPID": true,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "securityContext": security,
        "nodeSelector": chosen.node_selector,
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [wanted]}],
        }}},
        "tolerations": chosen.tolerations,
        "containers": [container(input, tag)],
        "volumes": volumes,
    });
    input.add_pull_secrets(&mut pod);
    pod
}

fn container(input: &Input<'_>, tag: &str) -> Value {
    let chosen = &input.values.ztunnel;
    let own = map(&[
        ("TULLE_CLUSTER", "on"),
        ("TULLE_NETWORK_POLICY", &chosen.network_policy),
        ("TULLE_EGRESS_DEFAULT", &input.values.control.egress_default),
        ("TULLE_HANDOVER", "/run/tulle/handover.sock"),
        ("TULLE_RUN_DIR", "/run/tulle"),
        ("TULLE_CNI_INSTALL", "on"),
        ("TULLE_CNI_SOCKET", "/run/tulle/cni.sock"),
        ("TULLE_CNI_STATE_DIR", "/var/lib/tulle/cni"),
        ("TULLE_CNI_BIN_DIR", &chosen.cni.bin_dir),
        ("TULLE_CNI_CONF_DIR", &chosen.cni.conf_dir),
    ]);
    let mut mounts = proxy_mounts().to_vec();
    // The same paths as on the node: what is written into files there is true in both places.
    mounts.extend([
        json!({"name": "run", "mountPath": "/run/tulle"}),
        json!({"name": "state", "mountPath": "/var/lib/tulle"}),
        json!({"name": "netns", "mountPath": "/run/netns", "mountPropagation": "HostToContainer"}),
        json!({"name": "cni-bin", "mountPath": chosen.cni.bin_dir}),
        json!({"name": "cni-conf", "mountPath": chosen.cni.conf_dir}),
    ]);
    json!({
        "name": NAME,
        "image": input.image_of(&input.values.image.ztunnel, tag),
        "imagePullPolicy": input.pull_policy(),
        "command": ["/usr/local/bin/ztunnel", "node"],
        "env": env(&[&input.proxy_env(), &own, &chosen.env]),
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": 15021},
            "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3,
        },
        "resources": chosen.resources,
        "securityContext": {
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {
                "drop": ["ALL"],
                // Rules, marks and transparent sockets; packets that prove a capture; entering network namespaces; finding
                // them by the processes in them.
                "add": ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"],
            },
        },
        "volumeMounts": mounts,
    })
}
