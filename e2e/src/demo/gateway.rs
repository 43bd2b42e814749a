//! The step about the egress gateway: what a host outside saw, against who asked.
//!
//! The host outside tells everybody from which address it is called, so a connection that went out another way shows. Limits:
//! bytes and not requests, since those have a step of their own in the scenarios.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;

use crate::eventually::eventually;
use crate::lab::Lab;
use crate::scenario;

/// A namespace from which nothing leaves but by the gateway, the gateway, and a host outside with two names.
const BANK: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {tulle.dev/mesh: enabled, tulle.dev/egress: deny}}
---
apiVersion: v1
kind: Pod
metadata: {name: courier, namespace: bank}
spec: {nodeName: node-1, serviceAccountName: courier, containers: [{name: main, image: none}]}
---
apiVersion: tulle.dev/v1alpha1
kind: EgressPolicy
metadata: {name: rates, namespace: bank}
spec:
  rules:
  - hosts: [rates.example.test]
    ports: [{port: 9000, protocol: TCP}]
    via: {gateway: {namespace: border, name: out}}
---
apiVersion: v1
kind: Namespace
metadata: {name: border}
---
apiVersion: v1
kind: Service
metadata: {name: out, namespace: border}
spec: {selector: {app: out}, ports: [{name: hbone, port: 15008}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: out-0
  namespace: border
  labels: {app: out, networking.istio.io/tunnel: http}
  annotations: {lab.tulle.dev/gateway: out}
spec:
  nodeName: node-2
  serviceAccountName: out
  containers:
  - {name: main, image: ztunnel, command: [ztunnel, gateway], ports: [{containerPort: 15008}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: internet, annotations: {lab.tulle.dev/outside: 'true'}}
---
apiVersion: v1
kind: Pod
metadata:
  name: rates
  namespace: internet
  annotations: {lab.tulle.dev/hostnames: 'rates.example.test,elsewhere.example.test'}
spec:
  containers:
  - {name: main, image: shop, command: [shop, serve, --name, rates, --tcp, '9000'], ports: [{containerPort: 9000}]}
";

const COURIER: &str = "bank/courier";

fn dial(lab: &Lab, host: &str) -> anyhow::Result<Value> {
    let output = lab.exec(COURIER, &["shop", "tcp", &format!("{host}:9000"), "--json"])?;
    Ok(scenario::json_lines(&output.stdout).pop().unwrap_or_default())
}

/// What is allowed leaves by the gateway's address, another name does not leave, and without the gateway nothing does.
pub(super) fn leads_out(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(BANK)?;
    let mut seen = Value::Null;
    eventually("the host outside is reached", Duration::from_secs(20), || match dial(lab, "rates.example.test") {
        Ok(report) if report["ok"] == true => {
            seen = report["source"].clone();
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })?;
    let (address, seen) = (lab.pod_ip("border", "out-0")?, seen.as_str().unwrap_or_default().to_owned());
    let view = lab.view()?;
    let own = view.pod("border", "out-0").map(|pod| pod.addresses.clone()).unwrap_or_default();
    ensure!(own.contains(&seen), "the host outside saw {seen}, and the gateway is at {address}");
    ensure!(dial(lab, "elsewhere.example.test")?["ok"] != true, "a name that no rule has was reached");
    lab.kill("border/out-0", "KILL")?;
    eventually("nothing leaves without the gateway", Duration::from_secs(20), || {
        match dial(lab, "rates.example.test") {
            Ok(report) if report["ok"] != true => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    lab.delete("Pod", "border/out-0")?;
    Ok(format!("the host outside saw {seen}, the gateway's; another name was refused; with the gateway gone, all is"))
}
