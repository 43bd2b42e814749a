//! Promise: the Helm chart and `tulle install` give the same objects, for every table of values, and refuse the same mistakes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::Context as _;
use e2e::lab::programs_dir;
use e2e::manifest;
use serde_json::Value;

/// Values that both get, as YAML. Together they touch every value of the chart.
const TABLE: &[(&str, &str)] = &[
    ("the defaults", ""),
    (
        "a gateway, a registry and other names",
        "image: {registry: registry.example/mesh, control: c, ztunnel: z, tag: 'v1', pullPolicy: Never, pullSecrets: [a, b]}\n\
         trustDomain: example.org\nclusterDomain: cluster.example\nclusterId: west\nlog: {level: 'info,xds=debug', format: json}\n\
         egressGateway: {enabled: true, name: way-out, replicas: 3, minAvailable: 2, env: {TULLE_GATEWAY_PORT: '15008'},\n\
           trafficDistribution: '', clientCertificates: [{namespace: shop, name: bank, secret: shop-bank}],\n\
           nodeSelector: {pool: edge}, tolerations: [{key: edge, operator: Exists}], podAnnotations: {a: b},\n\
           resources: {requests: {cpu: 1}}}\n",
    ),
    (
        "another control plane",
        "control: {metrics: {from: [{namespaceSelector: {matchLabels: {a: b}}}, {ipBlock: {cidr: 192.0.2.0/24}}]}, replicas: 3, minAvailable: 2, caSecret: cacerts, clusterTrustBundle: 'off', pluggedCaSecret: mesh-issuer, egressDefault: deny, tlsSan: [a.example, 192.0.2.1],\n\
           env: {TULLE_CONTROL_JWKS_REFRESH: 1m, RUST_LOG: 'debug', EMPTY: ''}, resources: {}, podAnnotations: {x: 'true'},\n\
           nodeSelector: {kubernetes.io/os: null, pool: infra}, tolerations: [{key: infra, operator: Equal, value: 'yes', effect: NoSchedule}],\n\
           priorityClassName: ''}\n",
    ),
    (
        "other nodes",
        "ztunnel: {networkPolicy: 'off', env: {TULLE_FENCE: 'off', LOG_FORMAT: json}, resources: {limits: {memory: 2Gi}}, podAnnotations: {prometheus.io/scrape: null, prometheus.io/port: null},\n\
           nodeSelector: {}, tolerations: [], priorityClassName: high, terminationGracePeriodSeconds: 300, seLinuxType: spc_t,\n\
           update: {maxSurge: 0, maxUnavailable: 2, minReadySeconds: 0}, canary: {tag: v3},\n\
           cni: {binDir: /var/lib/cni/bin, confDir: /etc/kubernetes/cni/net.d}}\n\
         control: {pluggedCaSecret: '', metrics: {enabled: false, from: [{podSelector: {}}]}}\nnodeRestriction: {enabled: false}\ncrds: {install: false}\n",
    ),
];

/// Mistakes, and a word that both name.
const MISTAKES: &[(&str, &str)] = &[
    ("control: {replica: 3}", "replica"),
    ("control: {replicas: 0}", "replicas"),
    ("control: {egressDefault: maybe}", "egressDefault"),
    ("control: {env: {A: 1}}", ""),
    ("control: {metrics: {from: monitoring}}", ""),
    ("control: {clusterTrustBundle: yes}", "clusterTrustBundle"),
    ("ztunnel: {networkPolicy: perhaps}", "networkPolicy"),
    ("ztunnel: {canary: {nodes: a}}", "nodes"),
    ("ztunnel: {cni: {binDir: opt/cni}}", "binDir"),
    ("image: {pullPolicy: Sometimes}", ""),
    ("egressGateway: {name: Not A Name}", "name"),
    ("egressGateway: {clientCertificates: [{namespace: shop, name: bank-, secret: a}]}", "clientCertificates"),
    ("egressGateway: {clientCertificates: [{namespace: shop, name: bank, secret: ''}]}", "secret"),
    ("extra: {a: b}", "extra"),
];

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/tulle")
}

/// The Helm program: what `HELM` names, or what `.ci/helm.sh` built.
fn helm() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("HELM") {
        return Some(path.into());
    }
    let sums = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("helm/go.sum")).ok()?;
    let found = e2e::kube::programs::cache_of("helm", &sums)?.join("helm");
    if !found.is_file() {
        assert!(std::env::var_os("CI").is_none(), "there is no helm; run .ci/helm.sh");
        eprintln!("SKIPPED: there is no {}; build it with .ci/helm.sh, or name one in HELM", found.display());
        return None;
    }
    Some(found)
}

struct Both {
    helm: PathBuf,
    home: tempfile::TempDir,
}

impl Both {
    fn helm(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let output = Command::new(&self.helm).args(arguments).env("HOME", self.home.path()).output();
        output.with_context(|| format!("{} does not run", self.helm.display()))
    }

    /// What Helm makes of the chart.
    fn of_helm(&self, values: &str) -> anyhow::Result<Output> {
        let file = self.file(values)?;
        let chart = chart().display().to_string();
        self.helm(&[
            "template",
            "tulle",
            &chart,
            "--kube-version",
            "1.36.0",
            "--namespace",
            "mesh",
            "--no-hooks",
            "--values",
            &file,
        ])
    }

    /// What the command gives.
    fn of_tulle(&self, values: &str) -> anyhow::Result<Output> {
        let file = self.file(values)?;
        let program = programs_dir()?.join("tulle");
        let output =
            Command::new(&program).args(["install", "--dry-run", "--namespace", "mesh", "--values", &file]).output();
        output.with_context(|| format!("{} does not run; build it with `cargo build -p control`", program.display()))
    }

    fn file(&self, values: &str) -> anyhow::Result<String> {
        let path = self.home.path().join("values.yaml");
        std::fs::write(&path, values)?;
        Ok(path.display().to_string())
    }
}

/// Objects by kind and name, as if one tool had brought all.
fn objects(output: &Output) -> anyhow::Result<BTreeMap<String, Value>> {
    let text = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut all = BTreeMap::new();
    for (key, object) in manifest::parse("the output", &text)? {
        let text = object.to_string().replace("\"tulle-install\"", "\"Helm\"");
        let kept = all.insert(format!("{} {}/{}", key.kind, key.namespace, key.name), serde_json::from_str(&text)?);
        anyhow::ensure!(kept.is_none(), "two objects are {} {}/{}", key.kind, key.namespace, key.name);
    }
    Ok(all)
}

#[test]
fn the_chart_and_the_command_give_the_same_objects() -> anyhow::Result<()> {
    let Some(helm) = helm() else { return Ok(()) };
    let both = Both { helm, home: tempfile::tempdir()? };
    let lint = both.helm(&["lint", "--strict", &chart().display().to_string()])?;
    anyhow::ensure!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
    for (what, values) in TABLE {
        let chart = objects(&both.of_helm(values)?).with_context(|| format!("helm, {what}"))?;
        let mut command = objects(&both.of_tulle(values)?).with_context(|| format!("tulle, {what}"))?;
        // Helm keeps its own records in the namespace, so that it must be there before.
        anyhow::ensure!(command.remove("Namespace /mesh").is_some(), "{what}: tulle makes no namespace");
        let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&chart), names(&command), "{what}");
        for (name, object) in &chart {
            assert_eq!(object, &command[name], "{what}: {name}: the chart, and the command");
        }
    }
    Ok(())
}

#[test]
fn mistakes_in_values_are_refused_by_both() -> anyhow::Result<()> {
    let Some(helm) = helm() else { return Ok(()) };
    let both = Both { helm, home: tempfile::tempdir()? };
    for (values, word) in MISTAKES {
        for output in [both.of_helm(values)?, both.of_tulle(values)?] {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{values} is taken");
            assert!(said.contains(word), "{values}: {said}");
        }
    }
    Ok(())
}
