//! Promise: the first `tulle.dev/egress: deny` breaks no operator. A controller that holds a Lease by way of the API server's Service,
//! by address or by name, keeps it while its namespace is closed around it, and everything else outside is closed to it.
//!
//! The API server is a real one, and rivals in an open namespace would take each Lease as soon as it ran out.

use anyhow::Context as _;
use e2e::address;
use e2e::eventually::eventually;
use e2e::kube::cluster::PATIENCE;
use e2e::kube::{self, ApiServer, LAB_PORT, Options, crds};
use e2e::lab::{Lab, LabConfig, Running};
use e2e::scenario;
use serde_json::Value;

/// Each Lease with the host by which its controllers know the API server.
const LEASES: [(&str, &str); 2] = [("by-address", "10.96.0.1"), ("by-name", "kubernetes.default.svc")];

/// Who may write Leases of `shop`: the operator there, and its rival in `plain`.
const RIGHTS: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: operator, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: rival, namespace: plain}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: leases, namespace: shop}
rules: [{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: leases, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: leases}
subjects:
- {kind: ServiceAccount, name: operator, namespace: shop}
- {kind: ServiceAccount, name: rival, namespace: plain}
";

/// A controller for each Lease, which run in a pod until they are dropped.
fn controllers(api: &ApiServer, lab: &Lab, namespace: &str, pod: &str) -> anyhow::Result<Vec<Running>> {
    let (program, token) = (api.dir().join("leader.py"), api.dir().join(format!("{pod}.token")));
    std::fs::write(&program, include_str!("testdata/leader.py"))?;
    std::fs::write(&token, api.token(&format!("{namespace}/{pod}"), "", None)?)?;
    let text = |path: &std::path::Path| path.display().to_string();
    let (program, token, authority) = (text(&program), text(&token), text(&api.authority()));
    let start = |(lease, host): (&str, &str)| {
        let argv = ["/usr/bin/python3", &program, host, &authority, &token, &format!("shop/{lease}"), pod];
        lab.spawn(&format!("{namespace}/{pod}"), &argv)
    };
    LEASES.into_iter().map(start).collect()
}

/// Renewals of a Lease that the API server has accepted, by the operator.
fn renewals(api: &ApiServer, lease: &str) -> anyhow::Result<usize> {
    let events = api.audit()?.into_iter();
    let own = events.filter(|it| it.user == "system:serviceaccount:shop:operator" && it.what() == "update leases");
    Ok(own.filter(|it| it.name == lease && it.code == 200).count())
}

/// Waits for as many more renewals of each Lease.
fn renewed(api: &ApiServer, more: usize) -> anyhow::Result<()> {
    for (lease, _) in LEASES {
        let before = renewals(api, lease)?;
        eventually(&format!("{lease} is renewed"), PATIENCE, || match renewals(api, lease)? {
            now if now >= before + more => Ok(()),
            now => Err(anyhow::anyhow!("{now} renewals, {before} before")),
        })?;
    }
    Ok(())
}

fn kept(api: &ApiServer) -> anyhow::Result<()> {
    for (lease, _) in LEASES {
        let spec = api.get("Lease", &format!("shop/{lease}"))?.context("no Lease")?["spec"].clone();
        anyhow::ensure!(spec["holderIdentity"] == "operator" && spec["leaseTransitions"] == 0, "{lease}: {spec}");
    }
    Ok(())
}

#[test]
fn an_operator_keeps_its_lease_when_its_namespace_is_closed() -> anyhow::Result<()> {
    if !scenario::has_tools(&["python3", "curl"]) {
        return Ok(());
    }
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    let mut objects = scenario::namespace("shop", false) + &scenario::namespace("plain", false);
    objects += &(scenario::client("shop", "operator", 1) + &scenario::client("plain", "rival", 2));
    let mut config = LabConfig::of(&objects).in_cluster(&api, true)?;
    config.timeout = PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    api.apply(RIGHTS)?;
    let _operators = controllers(&api, &lab, "shop", "operator")?;
    renewed(&api, 3)?;
    let _rivals = controllers(&api, &lab, "plain", "rival")?;
    let endpoint = format!("https://{}:{LAB_PORT}/version", address::CONTROL.v4);
    let direct = || lab.exec("shop/operator", &["curl", "-sk", "--max-time", "5", &endpoint]);
    anyhow::ensure!(direct()?.status.success(), "what is closed later is open now");

    // The very first label: the namespace was not in the mesh, either.
    api.label("Namespace", "shop", "tulle.dev/egress", Some("deny"))?;
    eventually("the operator is fenced", PATIENCE, || match scenario::pod_status(&lab, "node-1", "operator")? {
        Value::Object(pod) if pod.get("fence").is_some_and(|fence| fence == "Fenced") => Ok(()),
        other => Err(anyhow::anyhow!("{other}")),
    })?;
    // Longer than the Lease, so that a rival would have it by now.
    renewed(&api, 20)?;
    kept(&api)?;
    anyhow::ensure!(!direct()?.status.success(), "the same server by its node's address is outside");
    scenario::await_log(&lab, "node-1", &["EGRESS_DENIED", &address::CONTROL.v4.to_string()])?;

    // Also while the node's proxy is replaced.
    lab.replace("node-1")?;
    renewed(&api, 10)?;
    kept(&api)
}
