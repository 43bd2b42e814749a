//! The `tulle` and `control` programs as users run them: output, exit codes, and errors that say what to do.
//!
//! Without a control plane; what needs one is in `serve.rs` and in the lab's scenarios.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

const MANIFESTS: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: cart-0, namespace: shop, labels: {app: cart}}\nspec: {nodeName: node-1}\nstatus: {podIP: 10.1.1.2}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {selector: {app: cart}, clusterIP: 10.96.0.1, ports: [{port: 80}]}\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: cart, namespace: shop}\nspec: {action: DENY}\n";

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(program: &str, arguments: &[&str]) -> Ran {
    let mut command = Command::new(program);
    command.args(arguments).env_remove("TULLE_CONTROL");
    let output = command.output().expect("runs");
    Ran {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn tulle(arguments: &[&str]) -> Ran {
    run(env!("CARGO_BIN_EXE_tulle"), arguments)
}

fn folder(extra: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::write(dir.path().join("shop.yaml"), MANIFESTS).expect("write");
    if !extra.is_empty() {
        std::fs::write(dir.path().join("extra.yaml"), extra).expect("write");
    }
    dir
}

#[test]
fn a_folder_is_listed_without_a_control_plane() {
    let dir = folder("");
    let path = dir.path().to_str().expect("text");
    for (kind, expected) in [
        ("workloads", "cart-0  node-1  HBONE"),
        ("services", "10.96.0.1  80→80"),
        ("policies", "shop/cart  DENY"),
        ("conditions", "AuthorizationPolicy  shop/cart"),
    ] {
        let ran = tulle(&["get", kind, "--files", path]);
        assert!(ran.code == Some(0) && ran.out.contains(expected), "{kind}: {}{}", ran.out, ran.err);
        let json = tulle(&["get", kind, "--files", path, "-o", "json"]);
        let parsed: serde_json::Value = serde_json::from_str(&json.out).expect("JSON");
        assert_eq!(parsed.as_array().map(Vec::len), Some(1), "{kind}");
        assert!(tulle(&["get", kind, "--files", path, "-o", "yaml"]).out.starts_with("- "), "{kind}");
        let other = tulle(&["get", kind, "--files", path, "-n", "elsewhere"]);
        assert_eq!(other.out, "none\n", "{kind}");
    }
}

#[test]
fn check_is_0_for_good_folders_and_1_with_file_line_and_field_for_bad_ones() {
    let good = folder("");
    let ran = tulle(&["check", "--files", good.path().to_str().expect("text")]);
    assert!(ran.code == Some(0) && ran.out.ends_with("1 files, 0 errors\n"), "{}{}", ran.out, ran.err);
    let bad = folder("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec:\n  nodeName: 7\n");
    let ran = tulle(&["check", "--files", bad.path().to_str().expect("text")]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.out.contains("error: extra.yaml:5: Pod default/x: spec.nodeName: must be a string"), "{}", ran.out);
    let missing = tulle(&["check", "--files", "/nonexistent/folder"]);
    assert!(missing.code == Some(1) && missing.err.contains("cannot read /nonexistent/folder"), "{}", missing.err);
}

#[test]
fn what_cannot_be_done_says_why_and_what_to_do() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["status", "--control", "http://127.0.0.1:1"], 1, "is it running, and is --control right?"),
        (&["status", "--control", "https://127.0.0.1:1"], 1, "only http://host:port"),
        (&["explain", "a/b", "c/d", "--files", "."], 2, "needs --control"),
        (&["get", "nodes", "--files", "."], 2, "needs --control"),
        (&["check"], 2, "needs --files"),
        (&["install", "--dry-run", "--set", "control.replica=1"], 1, "unknown field `replica`"),
        (&["install", "--dry-run", "--values", "/nonexistent"], 1, "cannot read /nonexistent"),
        (&["install", "--kubeconfig", "/nonexistent"], 1, "cannot read the kubeconfig /nonexistent"),
        (&["uninstall", "--purge", "--nodes-only"], 2, "cannot be used with"),
        (&["get", "nonsense"], 2, "possible values"),
        (&["get", "workloads", "-o", "xml"], 2, "possible values"),
    ];
    for (arguments, code, text) in cases {
        let ran = tulle(arguments);
        assert!(ran.code == Some(*code) && ran.err.contains(text), "{arguments:?}: {:?} {}", ran.code, ran.err);
    }
}

#[test]
fn an_installation_is_printed_without_a_cluster() {
    let ran = tulle(&["install", "--dry-run", "--namespace", "mesh", "--set", "image.tag=v9"]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    for text in ["kind: DaemonSet", "namespace: mesh", "tulle/ztunnel:v9", "https://control.mesh.svc:15012"] {
        assert!(ran.out.contains(text), "no `{text}` in {}", ran.out);
    }
    let values = tulle(&["install", "--show-values"]);
    assert!(values.out.contains("egressGateway:"), "{}", values.out);
}

#[test]
fn a_control_plane_that_is_not_there_is_neither_alive_nor_ready() {
    for what in ["live", "ready"] {
        let ran = run(env!("CARGO_BIN_EXE_control"), &["probe", what, "--http-listen", "127.0.0.1:1"]);
        assert!(ran.code == Some(1) && ran.err.contains("cannot reach control"), "{:?} {}", ran.code, ran.err);
    }
}

#[test]
fn control_refuses_a_bad_command_line_with_the_reason() {
    let dir = tempfile::tempdir().expect("dir");
    let ca = dir.path().join("ca");
    let ca = ca.to_str().expect("text");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["serve", "--ca-dir", ca], 2, "--source"),
        (&["serve", "--ca-dir", ca, "--source", "kube"], 1, "there is no --kubeconfig"),
        (&["serve", "--ca-dir", ca, "--source", "files:"], 2, "neither files:"),
        (&["serve", "--ca-dir", ca, "--source", "files:/nonexistent"], 1, "no such folder"),
        (&["token", "--ca-dir", ca], 2, "--node"),
        (&["token", "--ca-dir", ca, "--node", "n", "--ttl", "soon"], 2, "not a duration"),
        (&["token", "--ca-dir", ca, "--node", "n", "--ttl", "0"], 2, "between 1 s"),
        (&["token", "--ca-dir", ca, "--service-account", "cart"], 1, "not <namespace>/<account>"),
        (&["token", "--ca-dir", ca, "--service-account", "a b/c"], 1, "namespace"),
        (&["token", "--ca-dir", "/proc/nothing", "--node", "n"], 1, "cannot open the CA"),
    ];
    for (arguments, code, text) in cases {
        let ran = run(env!("CARGO_BIN_EXE_control"), arguments);
        assert!(ran.code == Some(*code) && ran.err.contains(text), "{arguments:?}: {:?} {}", ran.code, ran.err);
    }
    let ran = run(env!("CARGO_BIN_EXE_control"), &["token", "--ca-dir", ca, "--node", "n"]);
    assert!(ran.code == Some(0) && ran.out.trim().split('.').count() == 3, "{}{}", ran.out, ran.err);
}
