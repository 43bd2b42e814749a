//! Promise: what `tulle install` brings, a real API server takes; its rights are enough and no more; and it goes as it came.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube::cluster::{Cluster, code};
use e2e::kube::{self, ApiServer, Options, controllers};
use e2e::lab::programs_dir;
use http::Method;
use serde_json::{Value, json};

const SPACE: &str = "tulle-system";

fn tulle(api: &ApiServer, arguments: &[&str]) -> anyhow::Result<Output> {
    let output = command(api, arguments)?.output()?;
    Ok(output)
}

fn command(api: &ApiServer, arguments: &[&str]) -> anyhow::Result<Command> {
    let program = programs_dir()?.join("tulle");
    anyhow::ensure!(program.is_file(), "{} is missing; build it with `cargo build -p control`", program.display());
    let mut command = Command::new(program);
    command.args(arguments).arg("--kubeconfig").arg(api.kubeconfig()).stdin(Stdio::null());
    Ok(command)
}

fn start(api: &ApiServer, arguments: &[&str]) -> anyhow::Result<Child> {
    Ok(command(api, arguments)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn succeeded(output: Output) -> anyhow::Result<String> {
    anyhow::ensure!(output.status.success(), "{}: {}", output.status, said(&output));
    Ok(said(&output))
}

#[test]
fn every_object_passes_the_servers_dry_run_with_unknown_fields_as_errors() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    api.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SPACE}}}\n"))?;
    for values in [
        vec![],
        vec![
            "--set=egressGateway.enabled=true",
            "--set=ztunnel.seLinuxType=spc_t",
            "--set=image.pullSecrets=[a]",
            "--set=ztunnel.update={maxSurge: 0, maxUnavailable: 1}",
        ],
    ] {
        let mut arguments = vec!["install", "--dry-run"];
        arguments.extend(&values);
        let printed = tulle(&api, &arguments)?;
        anyhow::ensure!(printed.status.success(), "{}", said(&printed));
        let taken = api.dry_run(&String::from_utf8_lossy(&printed.stdout))?;
        assert!(taken.len() >= 18, "{} objects", taken.len());
        let mut arguments = vec!["install", "--dry-run=server"];
        arguments.extend(&values);
        let told = succeeded(tulle(&api, &arguments)?)?;
        assert!(told.contains("DaemonSet tulle-system/ztunnel would be applied"), "{told}");
    }
    assert!(api.get("DaemonSet", "tulle-system/ztunnel")?.is_none(), "a dry run kept something");
    Ok(())
}

/// What the controllers of a cluster would say of the workloads.
fn play_controllers(api: &Cluster) -> anyhow::Result<()> {
    for (kind, name, nodes) in
        [("Deployment", "control", 1), ("DaemonSet", "ztunnel", 1), ("DaemonSet", "ztunnel-canary", 0)]
    {
        let name = format!("{SPACE}/{name}");
        let object = api.wait(kind, &name, "it is there", |object| !object.is_null())?;
        controllers::serve(api, kind, &object, nodes)?;
    }
    Ok(())
}

#[test]
fn an_installation_is_awaited_upgraded_and_told_what_it_lacks() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let late = tulle(&api, &["install", "--timeout", "3s"])?;
    let text = said(&late);
    assert!(!late.status.success() && text.contains("not ready in time"), "{text}");
    assert!(text.contains("Deployment control") && text.contains("DaemonSet ztunnel"), "{text}");

    let install = start(&api, &["install", "--timeout", "120s", "--set", "egressGateway.enabled=false"])?;
    play_controllers(&api)?;
    let text = succeeded(install.wait_with_output()?)?;
    assert!(text.contains("installed"), "{text}");

    // What an upgrade no longer has goes.
    succeeded(tulle(&api, &["install", "--no-wait", "--set", "egressGateway.enabled=true"])?)?;
    assert!(api.get("Deployment", "tulle-system/egress")?.is_some());
    let text = succeeded(tulle(&api, &["install", "--no-wait"])?)?;
    assert!(text.contains("Deployment egress taken away"), "{text}");
    let gone = |object: &Value| object.is_null() || !object["metadata"]["deletionTimestamp"].is_null();
    api.wait("Deployment", "tulle-system/egress", "it goes", gone)?;

    // Fields of somebody else are left to them.
    let change = json!({"spec": {"replicas": 7}});
    api.patch("Deployment", "tulle-system/control", &change)?;
    let text = said(&tulle(&api, &["install", "--no-wait"])?);
    assert!(text.contains("--force-conflicts") && text.contains("replicas"), "{text}");
    succeeded(tulle(&api, &["install", "--no-wait", "--force-conflicts"])?)?;
    let control = api.get("Deployment", "tulle-system/control")?.unwrap_or_default();
    assert_eq!(control["spec"]["replicas"], 2);
    Ok(())
}

/// Whether RBAC lets an account do something: `verb group/resource[/subresource] [namespace/][name]`.
fn may(api: &Cluster, account: &str, what: &str) -> anyhow::Result<bool> {
    let mut words = what.split_whitespace();
    let (verb, resource) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (namespace, name) = words.next().and_then(|word| word.split_once('/')).unwrap_or_default();
    let (group, resource) = resource.split_once(':').unwrap_or(("", resource));
    let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:{SPACE}:{account}"),
            "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{SPACE}"), "system:authenticated"],
            "resourceAttributes": {"verb": verb, "group": group, "resource": resource, "subresource": sub,
                "namespace": namespace, "name": name},
        },
    });
    let uri = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    let answer = api.ask(Method::POST, uri, "application/json", &review)?;
    answer["status"]["allowed"].as_bool().context("a review without an answer")
}

#[test]
fn rights_are_those_that_are_needed_and_no_others() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    succeeded(tulle(&api, &["install", "--no-wait", "--set", "egressGateway.enabled=true"])?)?;
    let needed = [
        ("control", "watch pods"),
        ("control", "list nodes"),
        ("control", "watch discovery.k8s.io:endpointslices"),
        ("control", "watch gateway.networking.k8s.io:httproutes"),
        ("control", "patch gateway.networking.k8s.io:httproutes/status shop/a"),
        ("control", "patch security.istio.io:authorizationpolicies/status shop/a"),
        ("control", "patch tulle.dev:egresspolicies/status shop/a"),
        ("control", "create networking.k8s.io:networkpolicies shop/"),
        ("control", "delete networking.k8s.io:networkpolicies shop/tulle-mesh"),
        ("control", "create authentication.k8s.io:tokenreviews"),
        ("control", "watch apiextensions.k8s.io:customresourcedefinitions"),
        ("control", "create certificates.k8s.io:clustertrustbundles /tulle.dev:mesh-ca:root-cert"),
        ("control", "patch certificates.k8s.io:clustertrustbundles /tulle.dev:mesh-ca:root-cert"),
        ("control", "attest certificates.k8s.io:signers /tulle.dev/mesh-ca"),
        ("control", "create secrets tulle-system/"),
        ("control", "update secrets tulle-system/tulle-ca"),
        ("control", "patch configmaps tulle-system/tulle-ca-root-cert"),
        ("control", "update coordination.k8s.io:leases tulle-system/tulle-control"),
        ("control", "patch coordination.k8s.io:leases tulle-system/tulle-control-1"),
        ("ztunnel", "watch pods"),
        ("ztunnel", "watch namespaces"),
        ("ztunnel", "patch pods/status shop/a"),
        ("ztunnel", "patch nodes/status /node-1"),
    ];
    let needless = [
        ("control", "create certificates.k8s.io:clustertrustbundles"),
        ("control", "patch certificates.k8s.io:clustertrustbundles /tulle.dev:mesh-ca:other"),
        ("control", "delete certificates.k8s.io:clustertrustbundles /tulle.dev:mesh-ca:root-cert"),
        ("control", "attest certificates.k8s.io:signers /other.example/ca"),
        ("control", "sign certificates.k8s.io:signers /tulle.dev/mesh-ca"),
        ("control", "get secrets tulle-system/other"),
        ("control", "list secrets"),
        ("control", "patch secrets tulle-system/tulle-ca"),
        ("control", "delete secrets tulle-system/tulle-ca"),
        ("control", "update gateway.networking.k8s.io:httproutes/status shop/a"),
        ("control", "get secrets shop/a"),
        ("control", "create secrets shop/"),
        ("control", "update coordination.k8s.io:leases kube-system/kube-scheduler"),
        ("control", "patch pods shop/a"),
        ("control", "patch pods/status shop/a"),
        ("control", "delete pods shop/a"),
        ("control", "create pods shop/"),
        ("control", "create pods/exec shop/a"),
        ("control", "patch namespaces /shop"),
        ("control", "patch nodes /node-1"),
        ("control", "patch gateway.networking.k8s.io:httproutes shop/a"),
        ("control", "patch tulle.dev:egresspolicies shop/a"),
        ("control", "create serviceaccounts/token tulle-system/ztunnel"),
        ("control", "create rbac.authorization.k8s.io:clusterrolebindings"),
        ("control", "impersonate users"),
        ("ztunnel", "get secrets tulle-system/tulle-ca"),
        ("ztunnel", "list secrets"),
        ("ztunnel", "patch pods shop/a"),
        ("ztunnel", "update pods/status shop/a"),
        ("ztunnel", "delete pods shop/a"),
        ("ztunnel", "patch namespaces /shop"),
        ("ztunnel", "patch nodes /node-1"),
        ("ztunnel", "create authentication.k8s.io:tokenreviews"),
        ("ztunnel", "watch configmaps"),
        ("egress", "list pods"),
        ("egress", "list secrets"),
    ];
    for (account, what) in needed {
        assert!(may(&api, account, what)?, "{account} may not {what}");
    }
    for (account, what) in needless {
        assert!(!may(&api, account, what)?, "{account} may {what}");
    }
    Ok(())
}

fn pod(name: &str, namespace: &str, node: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, annotations: {{example.org/own: x}}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: a, image: a}}]}}\n",
        account = if namespace == SPACE { "ztunnel" } else { "default" }
    )
}

#[test]
fn a_node_proxy_writes_about_its_own_node_alone() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    succeeded(tulle(&api, &["install", "--no-wait"])?)?;
    let mut objects = vec!["apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n".to_owned()];
    for node in ["node-1", "node-2"] {
        objects.push(format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {node}}}\n"));
        objects.push(pod(&format!("a-{node}"), "shop", node));
    }
    objects.push(pod("ztunnel-1", SPACE, "node-1"));
    api.apply(&objects.join("---\n"))?;
    let proxy = |bound: Option<&str>| -> anyhow::Result<Cluster> {
        let token = api.token("tulle-system/ztunnel", "", bound)?;
        let file = api.dir().join(format!("proxy-{}.kubeconfig", bound.is_some()));
        kube::write_kubeconfig(&file, &api.url(), &api.authority(), &json!({"token": token}))?;
        Cluster::connect(&file, "a-proxy")
    };
    let captured = json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}});
    let annotated = json!({"metadata": {"annotations": {"example.org/other": ""}}});
    let cleared = json!({"metadata": {"annotations": null}});
    let labelled = json!({"metadata": {"labels": {"app": "other"}}});
    let addressed = json!({"status": {"podIP": "192.0.2.1"}});
    let condition = json!({"status": {"conditions": [{"type": "TulleReady", "status": "True"}]}});
    let bound = proxy(Some("tulle-system/ztunnel-1"))?;
    // The policy is in force some moments after it was made.
    eventually("the policy is in force", Duration::from_secs(60), || {
        let refused = bound.patch_status("Pod", "shop/a-node-2", &captured);
        anyhow::ensure!(refused.is_err(), "it is not");
        Ok(())
    })?;
    for (kind, name, change, allowed) in [
        ("Pod", "shop/a-node-1", &captured, true),
        ("Node", "node-1", &condition, true),
        ("Pod", "shop/a-node-2", &captured, false),
        ("Node", "node-2", &condition, false),
        ("Pod", "shop/a-node-1", &annotated, false),
        ("Pod", "shop/a-node-1", &cleared, false),
        ("Pod", "shop/a-node-1", &labelled, false),
        ("Node", "node-1", &labelled, false),
        ("Pod", "shop/a-node-1", &addressed, false),
    ] {
        let answer = bound.patch_status(kind, name, change);
        assert_eq!(answer.is_ok(), allowed, "{kind} {name} {change}: {answer:?}");
        if let Err(error) = answer {
            assert_eq!(code(&error), Some(403), "{error:#}");
            assert!(format!("{error:#}").contains("a proxy of Tulle"), "{error:#}");
        }
    }
    let unbound = proxy(None)?;
    assert!(unbound.patch_status("Pod", "shop/a-node-1", &captured).is_err(), "a token of no pod may write");
    Ok(())
}

#[test]
fn control_writes_network_policies_of_its_own_alone() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    succeeded(tulle(&api, &["install", "--no-wait"])?)?;
    api.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")?;
    let policy = |name: &str, by: &str| {
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": {}},
            "metadata": {"name": name, "namespace": "shop", "labels": {"app.kubernetes.io/managed-by": by}}})
    };
    let others = [("web", "tulle"), ("tulle-mesh-theirs", "helm")];
    for (name, by) in others {
        api.apply(&policy(name, by).to_string())?;
    }
    let control = Cluster::connect(&api.kubeconfig_for(&format!("{SPACE}/control"))?, "a-control")?;
    let uri = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies";
    let create = |name: &str, by: &str| control.ask(Method::POST, uri, "application/json", &policy(name, by)).map(drop);
    let delete = |name: &str| control.delete("NetworkPolicy", &format!("shop/{name}"));
    let label = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": "tulle"}}});
    // The policy is in force some moments after it was made.
    eventually("the policy is in force", Duration::from_secs(60), || {
        let answer = create("web", "tulle");
        anyhow::ensure!(answer.as_ref().is_err_and(|error| code(error) == Some(403)), "{answer:?}");
        Ok(())
    })?;
    let own = "tulle-mesh-1";
    let attempts = [
        ("its own is made", create(own, "tulle"), true),
        (
            "its own is changed",
            control
                .patch("NetworkPolicy", &format!("shop/{own}"), &json!({"spec": {"policyTypes": ["Ingress"]}}))
                .map(drop),
            true,
        ),
        ("another name", create("web-2", "tulle"), false),
        ("no label", create("tulle-mesh-2", "helm"), false),
        (
            "another one is taken over",
            control.patch("NetworkPolicy", "shop/tulle-mesh-theirs", &label).map(drop),
            false,
        ),
        ("another name is deleted", delete("web"), false),
        ("another label is deleted", delete("tulle-mesh-theirs"), false),
        ("its own is deleted", delete(own), true),
    ];
    for (what, answer, allowed) in attempts {
        assert_eq!(answer.is_ok(), allowed, "{what}: {answer:?}");
        if let Err(error) = answer {
            let said = format!("{error:#}");
            assert!(code(&error) == Some(403) && said.contains("NetworkPolicies of its own alone"), "{what}: {said}");
        }
    }
    for (name, by) in others {
        let there = api.get("NetworkPolicy", &format!("shop/{name}"))?.context(name)?;
        assert_eq!(there["metadata"]["labels"]["app.kubernetes.io/managed-by"], by);
    }
    Ok(())
}

#[test]
fn uninstalling_releases_pods_first_and_leaves_what_is_not_its_own() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    succeeded(tulle(&api, &["install", "--no-wait"])?)?;
    let namespaces = [
        ("ours", "tulle.dev/mesh: enabled"),
        ("both", "istio.io/dataplane-mode: ambient"),
        ("closed", "tulle.dev/egress: deny"),
    ];
    for (name, label) in namespaces {
        api.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{label}}}}}\n"))?;
    }
    api.apply("apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n")?;
    api.patch_status(
        "Node",
        "node-1",
        &json!({"status": {"conditions": [
        {"type": "Ready", "status": "True"}, {"type": "TulleReady", "status": "True"}]}}),
    )?;
    api.apply(&pod("a", "ours", "node-1"))?;
    let captured = json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}});
    api.patch_status("Pod", "ours/a", &captured)?;

    let text = said(&tulle(&api, &["uninstall", "--timeout", "3s"])?);
    assert!(text.contains("closed") && text.contains("--open-egress"), "{text}");
    let label = |name: &str| -> anyhow::Result<Value> {
        Ok(api.get("Namespace", name)?.unwrap_or_default()["metadata"]["labels"].clone())
    };
    assert_eq!(label("ours")?["tulle.dev/mesh"], "enabled", "nothing may have changed yet");

    // Nobody releases the pod: nothing is taken away.
    let text = said(&tulle(&api, &["uninstall", "--open-egress", "--timeout", "3s"])?);
    assert!(text.contains("ours/a") && text.contains("still captured"), "{text}");
    assert!(api.get("DaemonSet", "tulle-system/ztunnel")?.is_some(), "proxies were taken from captured pods");
    assert!(label("ours")?["tulle.dev/mesh"].is_null());
    assert_eq!(label("both")?["tulle.dev/mesh"], "disabled");
    assert!(label("closed")?["tulle.dev/egress"].is_null());

    // Roots that control published, and those of somebody else.
    let root = std::fs::read_to_string(api.authority())?;
    for (name, spec) in [
        ("tulle.dev:mesh-ca:root-cert", json!({"signerName": "tulle.dev/mesh-ca", "trustBundle": root})),
        ("other", json!({"trustBundle": root})),
    ] {
        let version = "certificates.k8s.io/v1beta1";
        let object =
            json!({"apiVersion": version, "kind": "ClusterTrustBundle", "metadata": {"name": name}, "spec": spec});
        api.apply(&object.to_string())?;
    }

    // NetworkPolicies: one that control could not take away itself, and one that has the label by chance.
    for name in ["tulle-mesh-1", "web"] {
        api.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: both, labels: \
             {{app.kubernetes.io/managed-by: tulle}}}}\nspec: {{podSelector: {{}}}}\n"
        ))?;
    }

    // The agent does, and whoever plays kubelet says that nodes are clean.
    let uninstall = start(&api, &["uninstall", "--timeout", "120s", "--purge"])?;
    api.patch_status("Pod", "ours/a", &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": null}}}))?;
    for set in ["ztunnel", "ztunnel-canary"] {
        controllers::finish_deletion(&api, "DaemonSet", set)?;
    }
    let cleaners = api.wait("DaemonSet", "tulle-system/tulle-uninstall", "it may run", controllers::is_let_go)?;
    let template = &cleaners["spec"]["template"]["spec"];
    assert_eq!(template["nodeSelector"], json!({"kubernetes.io/os": "linux"}));
    assert!(template["affinity"].is_null(), "nodes of the canary are not cleaned: {template}");
    assert_eq!(template["initContainers"][0]["command"], json!(["/usr/local/bin/ztunnel", "cni", "uninstall"]));
    controllers::clean(&api, "node-1")?;
    controllers::serve(&api, "DaemonSet", &cleaners, 1)?;
    for (kind, name) in [("DaemonSet", "tulle-uninstall"), ("Deployment", "control")] {
        controllers::finish_deletion(&api, kind, name)?;
    }
    let text = succeeded(uninstall.wait_with_output()?)?;
    assert!(text.contains("1 nodes are clean"), "{text}");
    for (kind, name) in [
        ("Service", "tulle-system/control"),
        ("ClusterRole", "tulle-control"),
        ("ClusterRoleBinding", "tulle-ztunnel"),
        ("ValidatingAdmissionPolicy", "tulle-node-restriction"),
        ("CustomResourceDefinition", "egresspolicies.tulle.dev"),
    ] {
        let gone = |object: &Value| object.is_null() || !object["metadata"]["deletionTimestamp"].is_null();
        api.wait(kind, name, "it is gone", gone)?;
    }
    assert!(api.get("ClusterTrustBundle", "tulle.dev:mesh-ca:root-cert")?.is_none(), "{text}");
    let goes = |name: &str| -> anyhow::Result<bool> {
        Ok(api.get("NetworkPolicy", name)?.is_none_or(|it| it["metadata"]["deletionTimestamp"].is_string()))
    };
    assert!(goes("both/tulle-mesh-1")?, "{text}");
    assert!(!goes("both/web")?, "a NetworkPolicy of somebody else was deleted");
    assert!(api.get("ClusterTrustBundle", "other")?.is_some(), "roots of somebody else were deleted");
    let node = api.get("Node", "node-1")?.unwrap_or_default();
    let types: Vec<_> = node["status"]["conditions"].as_array().into_iter().flatten().map(|one| &one["type"]).collect();
    assert_eq!(types, ["Ready"], "the proxies' condition stays behind");
    assert!(api.get("Pod", "ours/a")?.is_some_and(|pod| pod["metadata"]["deletionTimestamp"].is_null()));
    Ok(())
}
