//! The egress gateway's objects: a Service of a few pods through which connections leave the cluster (docs/egress-gateway.md).
//!
//! It is the node proxy's program with another command and without any privilege; it ends tunnels itself and is not captured.

use serde_json::{Value, json};

use super::{
    Input, add_spread, confined, confined_pod, deployment, disruption_budget, env, map, proxy_mounts, proxy_volumes,
    selector, template,
};

pub(super) fn objects(input: &Input<'_>) -> Vec<Value> {
    let chosen = &input.values.egress_gateway;
    let name = &chosen.name;
    let meta = || input.meta(name, name);
    let mut labels = input.labels(name);
    labels["networking.istio.io/tunnel"] = json!("http");
    let ports = json!([{"name": "hbone", "port": 15008, "targetPort": "hbone", "protocol": "TCP"}]);
    vec![
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(), "automountServiceAccountToken": false,
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta(),
            "spec": {"selector": selector(name), "ports": ports},
        }),
        disruption_budget(meta(), chosen.min_available, name),
        deployment(meta(), chosen.replicas, name, template(labels, &chosen.pod_annotations, pod(input))),
    ]
}

fn pod(input: &Input<'_>) -> Value {
    let chosen = &input.values.egress_gateway;
    let port = |name: &str, port: u16| json!({"name": name, "containerPort": port, "protocol": "TCP"});
    let own = map(&[("TULLE_GATEWAY_NAME", &chosen.name)]);
    let container = json!({
        "name": "gateway",
        "image": input.image(&input.values.image.ztunnel),
        "imagePullPolicy": input.pull_policy(),
        "command": ["/usr/local/bin/ztunnel", "gateway"],
        "env": env(&[&input.proxy_env(), &own, &chosen.env]),
        "ports": [port("hbone", 15008), port("metrics", 15020), port("readiness", 15021)],
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": "readiness"},
            "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3,
        },
        "resources": chosen.resources,
        "securityContext": confined(),
        "volumeMounts": proxy_mounts(),
    });
    let mut pod = json!({
        "serviceAccountName": chosen.name,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 60,
        "securityContext": confined_pod(),
        "nodeSelector": chosen.node_selector,
        "tolerations": chosen.tolerations,
        "containers": [container],
        "volumes": proxy_volumes(),
    });
    input.add_pull_secrets(&mut pod);
    add_spread(&mut pod, &chosen.name);
    pod
}
