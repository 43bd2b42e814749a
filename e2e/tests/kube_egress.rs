//! Promise: the first `tulle.dev/egress: deny` breaks no operator. A controller that holds a Lease by way of the API server's Service,
//! by address or by name, or at the address of the server's node, keeps it while its namespace is closed around it, and everything else outside is closed to it.
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
fn leases() -> [(&'static str, String); 3] {
    let node = format!("{}:{LAB_PORT}", address::CONTROL.v4);
    [("by-address", "10.96.0.1".to_owned()), ("by-name", "kubernetes.default.svc".to_owned()), ("by-node", node)]
}

/// A port of the API server's node that is not the API server's.
const BESIDE: &str = "6480";

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
    let start = |(lease, host): (&str, String)| {
        let argv = ["/usr/bin/python3", &program, &host, &authority, &token, &format!("shop/{lease}"), pod];
        lab.spawn(&format!("{namespace}/{pod}"), &argv)
    };
    leases().into_iter().map(start).collect()
}

/// Renewals of a Lease that the API server has accepted, by the operator.
fn renewals(api: &ApiServer, lease: &str) -> anyhow::Result<usize> {
    let events = api.audit()?.into_iter();
    let own = events.filter(|it| it.user == "system:serviceaccount:shop:operator" && it.what() == "update leases");
    Ok(own.filter(|it| it.name == lease && it.code == 200).count())
}

/// Waits for as many more renewals of each Lease.
fn renewed(api: &ApiServer, more: usize) -> anyhow::Result<()> {
    for (lease, _) in leases() {
        let before = renewals(api, lease)?;
        eventually(&format!("{lease} is renewed"), PATIENCE, || match renewals(api, lease)? {
            now if now >= before + more => Ok(()),
            now => Err(anyhow::anyhow!("{now} renewals, {before} before")),
        })?;
    }
    Ok(())
}

fn kept(api: &ApiServer) -> anyhow::Result<()> {
    for (lease, _) in leases() {
        let spec = api.get("Lease", &format!("shop/{lease}"))?.context("no Lease")?["spec"].clone();
        anyhow::ensure!(spec["holderIdentity"] == "operator" && spec["leaseTransitions"] == 0, "{lease}: {spec}");
    }
    Ok(())
}

#[test]
fn an_operator_keeps_its_lease_when_its_namespace_is_closed() -> anyhow::Result<()> {
    keeps_its_lease("false")
}

/// Nobody on the node has asked for the API server before.
#[test]
fn an_operator_keeps_its_lease_on_a_node_that_learns_what_its_pods_use() -> anyhow::Result<()> {
    keeps_its_lease("true")
}

fn keeps_its_lease(on_demand: &str) -> anyhow::Result<()> {
    if !scenario::has_tools(&["python3", "curl"]) {
        return Ok(());
    }
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    let mut objects = scenario::namespace("shop", false) + &scenario::namespace("plain", false);
    objects += &(scenario::client("shop", "operator", 1) + &scenario::client("plain", "rival", 2));
    let mut config = LabConfig::of(&objects).env("ztunnel", "XDS_ON_DEMAND", on_demand).in_cluster(&api, true)?;
    config.timeout = PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    api.apply(RIGHTS)?;
    let _operators = controllers(&api, &lab, "shop", "operator")?;
    renewed(&api, 3)?;
    let _rivals = controllers(&api, &lab, "plain", "rival")?;
    // Another port of the same address is not the API server.
    let beside = format!("http://{}:{BESIDE}/", address::CONTROL.v4);
    let _beside = lab.spawn("control", &["/usr/bin/python3", "-m", "http.server", BESIDE])?;
    let direct = || lab.exec("shop/operator", &["curl", "-s", "--max-time", "5", "-o", "/dev/null", &beside]);
    eventually("what is closed later is open now", PATIENCE, || match direct() {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("{other:?}")),
    })?;

    // The node knows the API server before anybody is closed.
    let dump = lab.node_admin("node-1", "/config_dump")?["services"].to_string();
    anyhow::ensure!(dump.contains("kubernetes.default.svc.cluster.local"), "{dump}");

    // The very first label: the namespace was not in the mesh, either.
    api.label("Namespace", "shop", "tulle.dev/egress", Some("deny"))?;
    eventually("the operator is fenced", PATIENCE, || match scenario::pod_status(&lab, "node-1", "operator")? {
        Value::Object(pod) if pod.get("fence").is_some_and(|fence| fence == "Fenced") => Ok(()),
        other => Err(anyhow::anyhow!("{other}")),
    })?;
    // Longer than the Lease, so that a rival would have it by now.
    renewed(&api, 20)?;
    kept(&api)?;
    anyhow::ensure!(!direct()?.status.success(), "another port of the server's node is outside");
    scenario::await_log(&lab, "node-1", &["EGRESS_DENIED", &format!("{}:{BESIDE}", address::CONTROL.v4)])?;

    // Also while the node's proxy is replaced.
    lab.replace("node-1")?;
    renewed(&api, 10)?;
    kept(&api)?;
    let server = format!("{}:{LAB_PORT}", address::CONTROL.v4);
    let denied = scenario::log_lines(&lab, "node-1", &["EGRESS_DENIED", &server]);
    anyhow::ensure!(denied.is_empty(), "the API server was taken for outside: {denied:?}");

    // Without the label it is neither in the mesh nor in the fence.
    api.label("Namespace", "shop", "tulle.dev/egress", None)?;
    eventually("what was closed is open again", PATIENCE, || match direct() {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    kept(&api)
}
