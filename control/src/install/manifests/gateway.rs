//! The egress gateway's objects: a Service of a few pods through which connections leave the cluster (docs/egress-gateway.md).
//!
//! It is the node proxy's program with another command and without any privilege; it ends tunnels itself and is not captured.

use serde_json::{Value, json};

use super::{
    Input, add_spread, confined, confined_pod, deployment, disruption_budget, env, map, proxy_mounts, proxy_volumes,
    selector, template,
};
use crate::install::values::ClientCertificate;

/// Where its certificates for hosts outside are.
const CLIENTS: &str = "/var/run/secrets/tulle-clients";

pub(super) fn objects(input: &Input<'_>) -> Vec<Value> {
    let chosen = &input.values.egress_gateway;
    let name = &chosen.name;
    let meta = || input.meta(name, name);
    let mut labels = input.labels(name);
    labels["networking.istio.io/tunnel"] = json!("http");
    let ports = json!([{"name": "hbone", "port": 15008, "targetPort": "hbone", "protocol": "TCP"}]);
    let mut spec = json!({"selector": selector(name), "ports": ports});
    if !chosen.traffic_distribution.is_empty() {
        spec["trafficDistribution"] = json!(chosen.traffic_distribution);
    }
    vec![
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(), "automountServiceAccountToken": false,
        }),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": meta(), "spec": spec}),
        disruption_budget(meta(), chosen.min_available, name),
        deployment(meta(), chosen.replicas, name, template(labels, &chosen.pod_annotations, pod(input))),
    ]
}

fn pod(input: &Input<'_>) -> Value {
    let chosen = &input.values.egress_gateway;
    let port = |name: &str, port: u16| json!({"name": name, "containerPort": port, "protocol": "TCP"});
    let mut own = map(&[("TULLE_GATEWAY_NAME", &chosen.name)]);
    let (mut mounts, mut volumes) = (proxy_mounts().to_vec(), proxy_volumes().to_vec());
    if !chosen.client_certificates.is_empty() {
        own.extend(map(&[("TULLE_GATEWAY_CLIENT_CERTIFICATES", CLIENTS)]));
        mounts.push(json!({"name": "client-certificates", "mountPath": CLIENTS, "readOnly": true}));
        let sources: Vec<Value> = chosen.client_certificates.iter().map(client_certificate).collect();
        volumes.push(json!({"name": "client-certificates", "projected": {"sources": sources}}));
    }
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
        "volumeMounts": mounts,
    });
    let mut pod = json!({
        "serviceAccountName": chosen.name,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 60,
        "securityContext": confined_pod(),
        "nodeSelector": chosen.node_selector,
        "tolerations": chosen.tolerations,
        "containers": [container],
        "volumes": volumes,
    });
    input.add_pull_secrets(&mut pod);
    add_spread(&mut pod, &chosen.name);
    pod
}

/// One that is not there yet does not keep the gateway from starting.
fn client_certificate(of: &ClientCertificate) -> Value {
    let item = |file: &str| json!({"key": file, "path": format!("{}/{}/{file}", of.namespace, of.name)});
    json!({"secret": {"name": of.secret, "optional": true, "items": [item("tls.crt"), item("tls.key")]}})
}
