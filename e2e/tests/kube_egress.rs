//! Promise: the first label `tulle.dev/egress: deny` does not break an operator that runs in the namespace: it reaches the API server
//! as before, and keeps the Lease that it holds through the switch, over new connections and over ones that it has.

use std::fs;

use e2e::eventually::eventually;
use e2e::kube::{self, LAB_PORT, Options, crds};
use e2e::lab::LabConfig;
use e2e::scenario;

/// Renewals that may fail one after the other. They come every 200 ms, and a Lease lasts for 15 s.
const FAILURES: usize = 10;

/// What lets the account hold its Lease, and where the API server is for pods.
fn objects() -> String {
    let server = e2e::address::CONTROL.v4;
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: operator, namespace: shop}}\n---\n\
         apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {{name: operator, namespace: shop}}\n\
         spec: {{holderIdentity: nobody, leaseDurationSeconds: 15}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {{name: operator, namespace: shop}}\n\
         rules: [{{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, patch]}}]\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {{name: operator, namespace: shop}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: operator}}\n\
         subjects: [{{kind: ServiceAccount, name: operator, namespace: shop}}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: kubernetes, namespace: default, labels: {{kubernetes.io/service-name: kubernetes}}}}\n\
         addressType: IPv4\nports: [{{name: https, port: {LAB_PORT}, protocol: TCP}}]\n\
         endpoints: [{{addresses: ['{server}'], conditions: {{ready: true}}}}]\n"
    )
}

fn namespace(egress: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{egress}}}}}\n")
}

#[test]
fn an_operator_keeps_its_lease_through_the_first_deny() -> anyhow::Result<()> {
    if !scenario::has_tools(&["python3", "curl"]) {
        return Ok(());
    }
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    let world = format!("{}{}", namespace(""), scenario::client("shop", "operator", 1));
    let mut config = LabConfig::of(&world).in_cluster(&api, false)?;
    config.timeout = kube::cluster::PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    api.apply(&objects())?;
    let folder = tempfile::tempdir()?;
    let (program, said) = (folder.path().join("lease.py"), folder.path().join("said"));
    fs::write(&program, include_str!("testdata/lease.py"))?;
    let token = api.token("shop/operator", "", None)?;
    let server = api.get("Service", "default/kubernetes")?.unwrap_or_default()["spec"]["clusterIP"].clone();
    let server = server.as_str().unwrap_or_default().to_owned();
    let script = format!(
        "exec /usr/bin/python3 {} {server}:443 {token} {} /apis/coordination.k8s.io/v1/namespaces/shop/leases/operator > {}",
        program.display(),
        api.authority().display(),
        said.display()
    );
    let _operator = lab.spawn("shop/operator", &["sh", "-c", &script])?;
    let lines = || fs::read_to_string(&said).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>();
    let renewals = || lines().iter().filter(|line| *line == "ok").count();
    let more =
        |what: &str, count: usize| {
            let wanted = renewals() + count;
            eventually(what, kube::cluster::PATIENCE, || {
                if renewals() >= wanted { Ok(()) } else { Err(lines().join("\n")) }
            })
        };
    more("the Lease is held", 6)?;
    let before = lines().len();
    lab.apply_yaml(&namespace("tulle.dev/egress: deny"))?;
    eventually("the pod is fenced", kube::cluster::PATIENCE, || {
        let status = scenario::pod_status(&lab, "node-1", "operator").map_err(|error| error.to_string())?;
        if status["fence"] == "Fenced" { Ok(()) } else { Err(status.to_string()) }
    })?;
    more("the Lease is held behind the fence", 20)?;
    let all = lines();
    let longest = all.split(|line| line == "ok").map(<[String]>::len).max().unwrap_or_default();
    anyhow::ensure!(longest <= FAILURES, "{longest} renewals in a row failed: {:?}", &all[before..]);
    let lease = api.get("Lease", "shop/operator")?.unwrap_or_default();
    anyhow::ensure!(lease["spec"]["holderIdentity"] == "operator", "{lease}");
    // It is closed: the machine that the API server is on is not reached at another port, nor anybody else.
    for other in
        [format!("http://{}:15014/", e2e::address::CONTROL.v4), format!("http://{}:15021/", e2e::address::node(2).v4)]
    {
        let output = lab.exec("shop/operator", &["curl", "-sS", "--max-time", "20", &other])?;
        anyhow::ensure!(!output.status.success(), "{other} was reached");
    }
    // And it is the fence that lets it through: what it knows of the API server taken away, renewals fail.
    let failed = || lines().iter().filter(|line| *line != "ok").count();
    let failures = failed();
    lab.exec_ok("node-1", &["sh", "-c", "PATH=$PATH:/usr/sbin nft flush set inet tulle_fence api4"])?;
    eventually("renewals fail", kube::cluster::PATIENCE, || {
        if failed() > failures { Ok(()) } else { Err(lines().join("\n")) }
    })?;
    Ok(())
}
