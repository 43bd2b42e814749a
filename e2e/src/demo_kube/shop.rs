//! What the steps share: the shop in the cluster, its clients, and what can be asked about its pods.
//!
//! Clients are commands in running pods (`kubectl exec`), so that no step needs a pod that the mesh could have been told
//! of beforehand. Limits: a Deployment's only or first pod stands for it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use anyhow::ensure;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::eventually::eventually;
use crate::lab::Load;
use crate::lab::Running;
use crate::lab::Sniffer;
use crate::scenario;
use crate::sniff::Sniffed;

/// Long enough for pods to start on a slow machine; nothing waits that long when all is well.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// Where a node's agent says that a pod's traffic goes through the mesh.
const CAPTURED: &str = "ambient.istio.io/redirection";

/// The cluster, and what was seen of it before.
pub(super) struct World {
    pub(super) cluster: Cluster,
    /// The part of the proxy that is broken on purpose.
    pub(super) broken: Option<String>,
    /// What every node was like before anything was installed.
    pub(super) before: BTreeMap<String, String>,
}

/// Who a pod is, and how often its containers were started again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Life {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) restarts: u64,
}

impl World {
    pub(super) fn new(cluster: Cluster, broken: Option<&str>) -> Self {
        Self { cluster, broken: broken.map(str::to_owned), before: BTreeMap::new() }
    }

    /// Pods of a namespace that are not on their way out.
    pub(super) fn pods(&self, namespace: &str) -> anyhow::Result<Vec<Value>> {
        let list = self.cluster.get(&["pods", "-n", namespace])?;
        let all = list["items"].as_array().cloned().unwrap_or_default();
        Ok(all.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect())
    }

    /// Their lives, in the order of their names.
    pub(super) fn lives(&self, namespace: &str) -> anyhow::Result<Vec<Life>> {
        let life = |pod: &Value| Life {
            name: pod["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
            uid: pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
            restarts: restarts(pod),
        };
        let mut lives: Vec<Life> = self.pods(namespace)?.iter().map(life).collect();
        lives.sort();
        Ok(lives)
    }

    /// Name of the first pod of an app.
    pub(super) fn pod(&self, app: &str) -> anyhow::Result<String> {
        let pods = self.pods("shop")?;
        let pod = pods.iter().find(|pod| pod["metadata"]["labels"]["app"] == app);
        let name = pod.and_then(|pod| pod["metadata"]["name"].as_str());
        name.map(str::to_owned).with_context(|| format!("there is no pod of {app}"))
    }

    /// Waits until all Deployments of a namespace are rolled out.
    pub(super) fn rolled_out(&self, namespace: &str) -> anyhow::Result<()> {
        let wait = format!("--timeout={}s", PATIENCE.as_secs());
        for deployment in self.cluster.get(&["deployments", "-n", namespace])?["items"].as_array().into_iter().flatten()
        {
            let name = format!("deployment/{}", deployment["metadata"]["name"].as_str().unwrap_or_default());
            self.cluster.kubectl(&["rollout", "status", &name, "-n", namespace, &wait])?;
        }
        Ok(())
    }

    /// Waits until every pod of the shop is said to be captured, or none; how many there are.
    pub(super) fn await_captured(&self, wanted: bool) -> anyhow::Result<usize> {
        let what = if wanted { "every pod is captured" } else { "no pod is captured" };
        eventually(what, PATIENCE, || {
            let pods = self.pods("shop")?;
            let said = |pod: &Value| pod["metadata"]["annotations"][CAPTURED] == "enabled";
            let other: Vec<&Value> = pods.iter().filter(|pod| said(pod) != wanted).collect();
            let names: Vec<&Value> = other.iter().map(|pod| &pod["metadata"]["name"]).collect();
            if other.is_empty() { Ok(pods.len()) } else { Err(anyhow::anyhow!("otherwise: {names:?}")) }
        })
    }

    /// `shop call` in the frontend.
    pub(super) fn calls(&self, url: &str, more: &[&str]) -> anyhow::Result<Vec<Value>> {
        let argv = [&["shop", "call", url, "--json"], more].concat();
        let output = self.cluster.exec("shop", &self.pod("frontend")?, &argv)?;
        let reports = scenario::json_lines(&output.stdout);
        ensure!(!reports.is_empty(), "{argv:?} said: {}", String::from_utf8_lossy(&output.stderr));
        Ok(reports)
    }

    /// Waits until a call from the frontend goes well.
    pub(super) fn reaches(&self, url: &str) -> anyhow::Result<()> {
        eventually(&format!("the frontend reaches {url}"), PATIENCE, || {
            let reports = self.calls(url, &[])?;
            scenario::all_well(&reports, 1)
        })
    }

    /// Requests from the frontend until they are finished by the caller.
    pub(super) fn load(&self, targets: &[&str], rate: f64, more: &[&str]) -> anyhow::Result<Load> {
        let pod = self.pod("frontend")?;
        Load::start(targets, rate, more, |argv| {
            Running::start(self.cluster.exec_command("shop", &pod, argv)?, "a load in the frontend")
        })
    }

    /// Says `word` from the frontend to payments, on different nodes, and looks for it on the link.
    pub(super) fn say(&self, word: &str) -> anyhow::Result<Sniffed> {
        let sniffer = Sniffer::start(&[word], |argv| {
            Running::start(self.cluster.command("node-1", argv)?, "a capture on node-1")
        })?;
        scenario::all_well(&self.calls("http://payments/", &["--data", word, "--count", "5"])?, 5)?;
        sniffer.finish()
    }

    /// Fails unless what is said crosses the link and cannot be read there; how much crossed.
    pub(super) fn unreadable(&self) -> anyhow::Result<u64> {
        let word = scenario::marker();
        let seen = self.say(&word)?;
        let (read, tls) = (seen.markers[&word], &seen.tls);
        ensure!(read == 0, "the marker was read {read} times on the link");
        ensure!(tls.encrypted_bytes >= 10 * word.len() as u64, "the words cannot have crossed: {tls:?}");
        ensure!(tls.not_tls == 0 && tls.server_hellos_other == 0, "something else than TLS 1.3 crossed: {tls:?}");
        Ok(tls.encrypted_bytes)
    }

    /// Fails unless what is said can be read on the link; how often it was.
    pub(super) fn readable(&self) -> anyhow::Result<u64> {
        let word = scenario::marker();
        let read = self.say(&word)?.markers[&word];
        ensure!(read > 0, "the marker did not show up on the link, so its absence would prove nothing");
        Ok(read)
    }

    /// What is on a node's disk and in its packet filter that a mesh could leave behind.
    pub(super) fn node_state(&self, node: &str) -> anyhow::Result<String> {
        let script = "cd /opt/cni/bin && sha256sum * && cd /etc/cni/net.d && sha256sum * && nft list tables | grep -v kube-proxy; true";
        let output = self.cluster.command(node, &["sh", "-c", script])?.output()?;
        ensure!(output.status.success(), "{node}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// How a load went of which nothing failed: how much there was, and how long somebody waited who waited longest.
pub(super) fn went(reports: &[Value]) -> String {
    let slowest = reports.iter().filter_map(|report| report["ms"].as_f64()).fold(0.0, f64::max);
    format!("{} requests meanwhile, none failed, the slowest took {slowest:.0} ms", reports.len())
}

/// How often the containers of a pod were started again.
pub(super) fn restarts(pod: &Value) -> u64 {
    let statuses = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    statuses.filter_map(|status| status["restartCount"].as_u64()).sum()
}
