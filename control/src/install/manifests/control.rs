//! The control plane's objects. Its pods need no privilege: they read the API server and answer nodes.
//!
//! HTTP stays inside the pod (dumps of the mesh are not for everybody) but for metrics, so that probes are commands.

use serde_json::{Value, json};

use super::{Input, add_spread, confined, confined_pod, deployment, disruption_budget, env, map, selector, template};

const NAME: &str = "control";

pub(super) fn objects(input: &Input<'_>) -> Vec<Value> {
    let meta = || input.meta(NAME, NAME);
    let ports = json!([{
        "name": "grpc", "port": 15012, "targetPort": "grpc", "protocol": "TCP", "appProtocol": "tls",
    }]);
    let chosen = &input.values.control;
    let mut objects = vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta()}),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta(),
            "spec": {"selector": selector(NAME), "ports": ports},
        }),
        disruption_budget(meta(), chosen.min_available, NAME),
    ];
    if chosen.metrics.enabled && !chosen.metrics.from.is_empty() {
        objects.push(network_policy(meta(), &chosen.metrics.from));
    }
    let template = template(input.labels(NAME), &chosen.pod_annotations, pod(input));
    objects.push(deployment(meta(), chosen.replicas, NAME, template));
    objects
}

/// Nodes from anywhere, because they prove who they are; collectors of metrics from where they are said to be.
fn network_policy(meta: Value, from: &[Value]) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta,
        "spec": {
            "podSelector": {"matchLabels": selector(NAME)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"ports": [{"port": 15012, "protocol": "TCP"}]},
                {"ports": [{"port": 15014, "protocol": "TCP"}], "from": from},
            ],
        },
    })
}

fn pod(input: &Input<'_>) -> Value {
    let chosen = &input.values.control;
    let mut pod = json!({
        "serviceAccountName": NAME,
        "priorityClassName": chosen.priority_class_name,
        "terminationGracePeriodSeconds": 30,
        "securityContext": confined_pod(),
        "nodeSelector": chosen.node_selector,
        "tolerations": chosen.tolerations,
        "containers": [container(input)],
        // The mirror of Secret tulle-ca: keys are never on a disk.
        "volumes": [{"name": "ca", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    });
    input.add_pull_secrets(&mut pod);
    add_spread(&mut pod, NAME);
    pod
}

fn container(input: &Input<'_>) -> Value {
    let values = input.values;
    let chosen = &values.control;
    let mut own = map(&[
        ("TULLE_CONTROL_SOURCE", "kube"),
        ("TULLE_CONTROL_CA_DIR", "/var/run/tulle/ca"),
        ("TULLE_CONTROL_CA_SECRET", &chosen.ca_secret),
        ("TULLE_CONTROL_CA_PLUGGED_SECRET", &chosen.plugged_ca_secret),
        ("TULLE_CONTROL_CLUSTER_TRUST_BUNDLE", &chosen.cluster_trust_bundle),
        ("TULLE_CONTROL_TRUST_DOMAIN", &values.trust_domain),
        ("TULLE_CONTROL_CLUSTER_DOMAIN", &values.cluster_domain),
        ("TULLE_CONTROL_CLUSTER_ID", &values.cluster_id),
        ("TULLE_CONTROL_ROOT_NAMESPACE", input.namespace),
        ("TULLE_CONTROL_EGRESS_DEFAULT", &chosen.egress_default),
        ("TULLE_CONTROL_TLS_SAN", &chosen.tls_san.join(",")),
        ("RUST_LOG", &values.log.level),
        ("LOG_FORMAT", &values.log.format),
    ]);
    let mut ports = vec![json!({"name": "grpc", "containerPort": 15012, "protocol": "TCP"})];
    if chosen.metrics.enabled {
        // Filled in by the kubelet, from the pod's own address.
        own.insert("TULLE_CONTROL_METRICS_LISTEN".to_owned(), "$(INSTANCE_IP)".to_owned());
        ports.push(json!({"name": "metrics", "containerPort": 15014, "protocol": "TCP"}));
    }
    let probe = |what: &str, period: u32, timeout: u32, failures: u32| {
        json!({
            "exec": {"command": ["/usr/local/bin/control", "probe", what]},
            "periodSeconds": period, "timeoutSeconds": timeout, "failureThreshold": failures,
        })
    };
    json!({
        "name": NAME,
        "image": input.image(&values.image.control),
        "imagePullPolicy": input.pull_policy(),
        "command": ["/usr/local/bin/control", "serve"],
        "env": env(&[&own, &chosen.env]),
        "ports": ports,
        "startupProbe": probe("live", 2, 5, 60),
        "readinessProbe": probe("ready", 5, 5, 3),
        "livenessProbe": probe("live", 20, 10, 6),
        "resources": chosen.resources,
        "securityContext": confined(),
        "volumeMounts": [{"name": "ca", "mountPath": "/var/run/tulle"}],
    })
}
