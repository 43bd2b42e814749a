//! Promise: `tulle` finds control in a cluster and `tulle check` finds what is wrong with one, asked of a real API server with the
//! objects that such clusters have.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use e2e::kube::crds::{GATEWAY_API, ISTIO, definition};
use e2e::kube::{self, ApiServer, Options};
use e2e::lab::programs_dir;
use serde_json::{Value, json};

/// What Cilium's chart leaves in a cluster, as far as it counts here.
const CILIUM: &str = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: cilium, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: cilium}}
  template:
    metadata: {labels: {k8s-app: cilium}}
    spec: {hostNetwork: true, containers: [{name: cilium-agent, image: cilium}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: cilium-config, namespace: kube-system}
data: {kube-proxy-replacement: 'true', cni-exclusive: 'true'}
";

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: guard, namespace: shop}
spec: {selector: {app: guard}, ports: [{name: https, port: 443, targetPort: hook}]}
---
apiVersion: v1
kind: Pod
metadata: {name: guard, namespace: shop, labels: {app: guard}}
spec: {nodeName: n1, containers: [{name: c, image: none, ports: [{name: hook, containerPort: 9443}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: shop}
spec: {nodeName: n1, hostNetwork: true, containers: [{name: c, image: none}]}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: guard}
webhooks:
- name: guard.shop.example
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Ignore
  clientConfig: {service: {name: guard, namespace: shop}}
  rules: [{apiGroups: [nobody.example], apiVersions: [v1], operations: [CREATE], resources: [things]}]
";

const INSTALLED: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: tulle-system}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: control, namespace: tulle-system}
spec:
  replicas: 1
  selector: {matchLabels: {app: control}}
  template: {metadata: {labels: {app: control}}, spec: {containers: [{name: control, image: none}]}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: ztunnel, namespace: tulle-system}
spec:
  selector: {matchLabels: {app: ztunnel}}
  template: {metadata: {labels: {app: ztunnel}}, spec: {containers: [{name: ztunnel, image: none}]}}
---
apiVersion: v1
kind: Service
metadata: {name: control, namespace: tulle-system}
spec: {selector: {app: control}, ports: [{port: 15012}]}
---
apiVersion: v1
kind: Pod
metadata: {name: control-0, namespace: tulle-system, labels: {app: control}}
spec: {nodeName: n1, containers: [{name: control, image: none}]}
";

/// Runs `tulle` as somebody with a kubeconfig; `path` comes before the system's programs.
fn tulle(kubeconfig: &Path, path: Option<&Path>, argv: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(programs_dir()?.join("tulle"));
    command.args(argv).args(["--kubeconfig".as_ref(), kubeconfig.as_os_str()]).env_remove("TULLE_CONTROL");
    let path = path.map_or_else(|| "/nowhere".into(), |path| format!("{}:/usr/bin:/bin", path.display()));
    Ok(command.env("PATH", path).output()?)
}

/// The findings of `tulle check`, as `severity id object`.
fn check(kubeconfig: &Path, argv: &[&str]) -> anyhow::Result<(Value, Vec<String>)> {
    let output = tulle(kubeconfig, None, &[&["check", "-o", "json"][..], argv].concat())?;
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{argv:?}: {output:?}"))?;
    let good = report["errors"] == 0;
    ensure!(output.status.code() == Some(if good { 0 } else { 1 }), "exit code {}: {report:#}", output.status);
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let line =
        |finding: &Value| format!("{} {} {}", text(finding, "severity"), text(finding, "id"), text(finding, "object"));
    let found = report["findings"].as_array().into_iter().flatten().map(line).collect();
    Ok((report, found))
}

/// Kinds of the Gateway API and of Istio.
fn foreign_kinds(api: &ApiServer) -> anyhow::Result<()> {
    let all = GATEWAY_API.iter().chain(ISTIO);
    api.apply(&all.map(|kind| definition(*kind)).collect::<String>()).map(drop)
}

fn has(found: &[String], expected: &[&str]) -> anyhow::Result<()> {
    for one in expected {
        ensure!(found.iter().any(|line| line.starts_with(one)), "no `{one}` in {found:#?}");
    }
    Ok(())
}

/// A node, which only its status describes.
fn node(api: &ApiServer, name: &str, info: &Value) -> anyhow::Result<()> {
    api.apply(&format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"))?;
    let mut whole = json!({
        "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "6.1.0", "osImage": "Debian", "operatingSystem": "linux",
        "architecture": "amd64", "containerRuntimeVersion": "containerd://2.0", "kubeletVersion": "v1.36.2", "kubeProxyVersion": "",
    });
    if let (Some(whole), Some(info)) = (whole.as_object_mut(), info.as_object()) {
        whole.extend(info.clone());
    }
    api.patch_status("Node", name, &json!({"status": {"nodeInfo": whole}})).map(drop)
}

#[test]
fn a_cluster_is_checked_before_and_after_an_installation() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let admin = api.kubeconfig();
    node(&api, "n1", &json!({}))?;
    node(&api, "n2", &json!({"kernelVersion": "4.18.0-305.el8", "kubeletVersion": "v1.36.2+k3s1"}))?;
    let (report, found) = check(&admin, &[])?;
    ensure!(report["stage"] == "not installed", "{report:#}");
    // A server that is built from its module alone does not know its release.
    ensure!(found.iter().any(|line| line.ends_with("api-version API server")), "{found:#?}");
    has(
        &found,
        &["error kernel Node n2", "warning cni-paths", "warning gateway-api CustomResourceDefinition httproutes"],
    )?;
    ensure!(!found.iter().any(|line| line.contains("kernel Node n1") || line.contains("rights")), "{found:#?}");

    api.apply(CILIUM)?;
    let (_, found) = check(&admin, &[])?;
    let of = "ConfigMap kube-system/cilium-config";
    has(
        &found,
        &[
            "note cni DaemonSet kube-system/cilium",
            &format!("error cilium-socket-lb {of}"),
            &format!("error cilium-exclusive {of}"),
        ],
    )?;
    api.patch(
        "ConfigMap",
        "kube-system/cilium-config",
        &json!({"data": {"bpf-lb-sock-hostns-only": "true", "cni-exclusive": "false"}}),
    )?;
    let (_, found) = check(&admin, &[])?;
    ensure!(!found.iter().any(|line| line.contains("error cilium")), "{found:#?}");

    api.apply(INSTALLED)?;
    let (report, found) = check(&admin, &[])?;
    ensure!(report["stage"] == "installed", "{report:#}");
    has(
        &found,
        &[
            "error control Deployment tulle-system/control",
            "error trust ConfigMap",
            "error definitions",
            "warning control",
        ],
    )?;
    let ready =
        json!({"type": "TulleReady", "status": "False", "reason": "NoTproxy", "message": "the module is missing"});
    api.patch_status("Node", "n1", &json!({"status": {"conditions": [ready]}}))?;
    let (report, found) = check(&admin, &[])?;
    has(&found, &["error node Node n1"])?;
    ensure!(report.to_string().contains("NoTproxy the module is missing"), "{report:#}");
    Ok(())
}

#[test]
fn who_may_see_little_is_told_what_was_not_checked() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let (_, found) = check(&api.kubeconfig_for("shop/reader")?, &[])?;
    has(&found, &["warning unreadable Pod", "warning unreadable Node", "error rights"])?;
    let away = api.dir().join("away.kubeconfig");
    let text = fs::read_to_string(api.kubeconfig())?.replace(&api.url(), "https://127.0.0.1:1");
    fs::write(&away, text)?;
    let output = tulle(&away, None, &["check"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && said.contains("the API server does not answer"), "{output:?}");
    Ok(())
}

#[test]
fn what_enrolment_and_strict_mean_for_a_namespace_is_told_from_its_objects() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let admin = api.kubeconfig();
    node(&api, "n1", &json!({}))?;
    api.apply(SHOP)?;
    let (_, found) = check(&admin, &["--enrol", "shop"])?;
    has(&found, &["warning host-network Namespace shop", "note pods Namespace shop"])?;
    let (_, found) = check(&admin, &["--strict", "shop"])?;
    has(
        &found,
        &["error api-server Pod shop/guard port 9443", "warning not-enrolled Namespace shop", "warning callers"],
    )?;

    // The exceptions that it prints are objects, and leave nothing to be said.
    let output = tulle(&admin, None, &["check", "--strict", "shop", "--exceptions"])?;
    ensure!(output.status.success(), "{output:?}");
    let exceptions = String::from_utf8(output.stdout)?;
    ensure!(exceptions.contains("'9443':\n      mode: PERMISSIVE"), "{exceptions}");
    foreign_kinds(&api)?;
    api.apply(&exceptions)?;
    let (report, found) = check(&admin, &["--strict", "shop"])?;
    ensure!(report["errors"] == 0 && report["exceptions"] == json!([]), "{report:#}");
    has(&found, &["note api-server Pod shop/guard port 9443"])?;
    // Now there are none: told by the exit code, since `kubectl` takes no file without objects.
    let output = tulle(&admin, None, &["check", "--strict", "shop", "--exceptions"])?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(3) && said.starts_with("# Nothing in namespace shop"), "{said}");
    Ok(())
}

/// A `kubectl` that forwards to where control really is, or fails as the real one does.
fn kubectl(dir: &Path, script: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join("bin");
    fs::create_dir_all(&path)?;
    let program = path.join("kubectl");
    fs::write(&program, format!("#!/bin/sh\necho \"$@\" >> {}\n{script}\n", dir.join("kubectl.log").display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn control_is_found_in_the_cluster_of_the_kubeconfig() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let (admin, dir) = (api.kubeconfig(), tempfile::tempdir()?);
    let fails = |path: Option<&Path>, expected: &str| {
        let output = tulle(&admin, path, &["get", "conditions"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && said.contains(expected), "expected `{expected}`: {output:?}");
        anyhow::Ok(())
    };
    fails(None, "there is no Service control in namespace tulle-system")?;
    api.apply(INSTALLED)?;
    fails(None, "no pod of control is ready in namespace tulle-system (1 there are)")?;
    let ready = json!([{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    api.patch_status("Pod", "tulle-system/control-0", &json!({"status": {"phase": "Running", "conditions": ready}}))?;
    fails(None, "there is no kubectl on PATH")?;
    let path = kubectl(dir.path(), "echo 'error: unable to forward port' >&2; exit 1")?;
    fails(Some(&path), "kubectl port-forward to pod tulle-system/control-0 failed: error: unable to forward port")?;

    // Whoever answers on the forwarded port is asked.
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let answers = std::thread::spawn(move || -> std::io::Result<()> {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept()?;
        let mut head = [0; 4096];
        let _ = stream.read(&mut head)?;
        let body = r#"[{"kind": "Namespace", "namespace": "", "name": "shop", "conditions": []}]"#;
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    });
    let path = kubectl(dir.path(), &format!("echo 'Forwarding from 127.0.0.1:{port} -> 15014'; exec sleep 600"))?;
    let output = tulle(&admin, Some(&path), &["get", "conditions", "-o", "json"])?;
    ensure!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("\"shop\""), "{output:?}");
    answers.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let said = fs::read_to_string(dir.path().join("kubectl.log"))?;
    let last = said.lines().last().unwrap_or_default();
    ensure!(last.contains("port-forward --address 127.0.0.1 --namespace tulle-system"), "{said}");
    ensure!(last.ends_with("pod/control-0 :15014"), "{said}");
    Ok(())
}
