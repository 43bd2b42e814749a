//! Promise: while the node's agent is away, what the API server says now decides who waits; where it cannot be asked, what the
//! agent wrote last. Against a real API server, with the rights that the chart gives.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "cni/world.rs"]
mod world;

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use e2e::kube;
use e2e::kube::Options;
use e2e::runtime::Runtime;
use e2e::runtime::prepared;
use serde_json::json;
use world::World;
use world::as_root_here;

const RIGHTS: &str = "\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: cni}
rules: [{apiGroups: [''], resources: [pods, namespaces], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: cni}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cni}
subjects: [{kind: ServiceAccount, name: ztunnel, namespace: tulle-system}]
";

fn pod(namespace: &str, name: &str, mesh: &str) -> String {
    let labels = if mesh.is_empty() { String::new() } else { format!(", labels: {{tulle.dev/mesh: {mesh}}}") };
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{labels}}}\n\
         spec: {{containers: [{{name: main, image: none}}]}}\n"
    )
}

#[test]
fn the_api_server_says_who_waits_while_the_agent_is_away() {
    as_root_here("the_api_server_says_who_waits_while_the_agent_is_away", || {
        let Some(mut server) = kube::start(Options::default()) else { return Ok(()) };
        let kubeconfig = server.kubeconfig_for("tulle-system/ztunnel")?;
        let mut objects = RIGHTS.to_owned();
        for (name, labels) in [("shop", "{tulle.dev/mesh: enabled}"), ("office", "{}")] {
            objects += &format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {labels}}}\n");
        }
        for (namespace, name, mesh) in
            [("shop", "in", ""), ("shop", "out", "disabled"), ("office", "out", ""), ("office", "in", "enabled")]
        {
            objects += &pod(namespace, name, mesh);
        }
        server.apply(&objects)?;

        let world = World::new()?;
        let mut command = world.command(&["install"])?;
        let installed = command.env("KUBECONFIG", &kubeconfig).output()?;
        anyhow::ensure!(installed.status.success(), "{installed:?}");
        // Here, where the API server listens; the other plugins of the chain are not run.
        let runtime = Runtime::new(Path::new("/proc/self/ns/net"), &world.runtime.conf_dir, &world.runtime.bin_dir);
        let (list, own) = (world.runtime.configuration()?, world.own()?);
        let conf = prepared(&list, &own, Some(&json!({"cniVersion": "1.0.0", "ips": []})));
        let expect = |when: &str, cases: &[(&str, bool)], says: &str| -> anyhow::Result<()> {
            for (name, starts) in cases {
                let (_netns, sandbox) = world.pod(name)?;
                let said = runtime.run("ADD", &own, &conf, &sandbox)?;
                anyhow::ensure!(said.success == *starts, "{when}: {name}: {said:?}");
                if !said.success {
                    anyhow::ensure!(said.json()["code"] == 11, "{when}: {name}: {said:?}");
                    anyhow::ensure!(said.stdout.contains(says), "{when}: {name}: {said:?}");
                }
            }
            Ok(())
        };
        let all =
            [("shop/in", false), ("shop/out", true), ("office/out", true), ("office/in", false), ("shop/gone", false)];
        expect("nothing written", &all, "by its labels")?;
        world.know()?;
        expect("as the agent wrote", &all, "by its labels")?;
        server.label("Namespace", "office", "tulle.dev/mesh", Some("enabled"))?;
        expect("labelled since", &[("office/out", false)], "by its labels")?;
        server.label("Namespace", "office", "tulle.dev/mesh", None)?;

        // What it cannot be asked, the agent's last word decides.
        let cached = [("shop/in", false), ("shop/out", false), ("office/out", true), ("office/in", true)];
        server.delete("ClusterRoleBinding", "cni")?;
        expect("forbidden", &cached, "when the agent last saw them")?;
        expect("forbidden and never seen", &[("new/one", false)], "get pods and namespaces")?;
        server.pause();
        expect("it hangs", &cached[1..3], "when the agent last saw them")?;
        server.resume();
        server.kill();
        expect("it is down", &cached, "when the agent last saw them")?;
        expect("down and never seen", &[("new/one", false)], "the API server 127.0.0.1:")?;
        let log = fs::read_to_string(world.at("state/plugin.log")).context("no log")?;
        anyhow::ensure!(!log.contains("eyJ"), "a token is in the log");
        Ok(())
    });
}
