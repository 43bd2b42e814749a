//! The steps about what may leave a namespace: by which name, and that the pod itself cannot change it.
//!
//! The host outside has two names and one address, so a proxy that looked at the address alone would let both through. Limits:
//! what the gateway adds has a step of its own, and the scenarios have the longer list of what a client may try.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;

use crate::eventually::eventually;
use crate::lab::Lab;
use crate::scenario;

/// A namespace that is watched before it is closed, and a host outside that answers to two names.
fn vault(egress: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: vault, labels: {{tulle.dev/mesh: enabled, tulle.dev/egress: {egress}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: teller, namespace: vault}}
spec: {{nodeName: node-1, serviceAccountName: teller, containers: [{{name: main, image: none}}]}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: abroad, annotations: {{lab.tulle.dev/outside: 'true'}}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: bourse
  namespace: abroad
  annotations: {{lab.tulle.dev/hostnames: 'bourse.example.test,tipster.example.test'}}
spec:
  containers:
  - {{name: main, image: shop, command: [shop, serve, --name, bourse, --tls, '443', --tcp, '9000']}}
"
    )
}

const POLICY: &str = "
apiVersion: tulle.dev/v1alpha1
kind: EgressPolicy
metadata: {name: bourse, namespace: vault}
spec:
  rules:
  - hosts: [bourse.example.test]
    ports: [{port: 443, protocol: TLS}]
";

const TELLER: &str = "vault/teller";
const HOST: &str = "abroad/bourse";

/// Says hello to `host`, naming `name` in the greeting of TLS.
fn dial(lab: &Lab, host: &str, name: &str) -> anyhow::Result<Value> {
    let output = lab.exec(TELLER, &["shop", "tcp", &format!("{host}:443"), "--tls", name, "--json"])?;
    Ok(scenario::json_lines(&output.stdout).pop().unwrap_or_default())
}

fn reached(lab: &Lab, host: &str, name: &str) -> anyhow::Result<Value> {
    let mut seen = Value::Null;
    eventually("the host outside is reached", Duration::from_secs(20), || match dial(lab, host, name) {
        Ok(report) if report["ok"] == true => {
            seen = report["source"].clone();
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })?;
    Ok(seen)
}

/// Watched, the calls are listed, with the policy that would allow them; closed, one name passes and no trick makes another.
pub(super) fn bound_to_names(lab: &Lab) -> anyhow::Result<String> {
    let (allowed, other) = ("bourse.example.test", "tipster.example.test");
    lab.apply_yaml(&vault("audit"))?;
    reached(lab, other, other)?;
    // Nobody waits long for what is only watched, so a client that is slow to say its name is seen without it.
    eventually("the policy that would allow what was seen names the host", Duration::from_secs(20), || {
        let seen = dial(lab, other, other).map_err(|error| error.to_string())?;
        let proposed =
            lab.exec_ok("control", &["tulle", "egress", "--policy", "vault"]).map_err(|error| error.to_string())?;
        if proposed.contains(other) { Ok(()) } else { Err(format!("{seen}\n{proposed}")) }
    })?;
    lab.apply_yaml(&format!("{}---{POLICY}", vault("deny")))?;
    let seen = reached(lab, allowed, allowed)?;
    let address = lab.pod_ip("abroad", "bourse")?;
    for (what, host, name, words) in [
        ("a name that no rule has", other, other, None),
        ("an address", &*address, allowed, Some("server name bourse.example.test")),
        ("a spoofed server name", allowed, other, Some("its server name is tipster.example.test")),
    ] {
        let report = dial(lab, host, name)?;
        ensure!(report["ok"] == false, "{what} got through: {report}");
        if let Some(words) = words {
            scenario::await_log(lab, "node-1", &["EGRESS_DENIED", words])?;
        }
    }
    let seen = seen.as_str().unwrap_or_default();
    Ok(format!("{allowed} was reached from {seen}; {other}, the bare address and a spoofed server name were refused"))
}

/// A root container takes its own rules away and marks its packets as the proxy does: none comes out.
pub(super) fn fenced(lab: &Lab) -> anyhow::Result<String> {
    reached(lab, "bourse.example.test", "bourse.example.test")?;
    let (address, pod) = (lab.pod_ip("abroad", "bourse")?, lab.pod_ip("vault", "teller")?);
    scenario::count_packets(lab, HOST, &pod)?;
    let marked =
        "table inet evil { chain out { type route hook output priority -300; policy accept; meta mark set 0x539; }; }";
    let script = format!(
        "PATH=$PATH:/usr/sbin:/sbin; nft '{marked}'; shop tcp {address}:9000 --timeout-ms 1000; \
         nft flush ruleset; shop tcp {address}:9000 --timeout-ms 1000; shop udp {address}:9000 --timeout-ms 500; true"
    );
    let output = lab.exec(TELLER, &["sh", "-c", &script])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!said.contains("HELLO"), "the pod got around its proxy: {said}");
    let count = scenario::counted_packets(lab, HOST)?;
    ensure!(count == 0, "{count} packets of the pod arrived outside");
    Ok("a container with all power over its own network marked its packets, then flushed its rules: 0 packets arrived"
        .into())
}
