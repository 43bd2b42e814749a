//! Promise: while the node's agent is away, what the API server says now decides who waits; where it cannot be asked, what the
//! agent wrote last. Against a real API server, with the rights that the chart gives.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "cni/world.rs"]
mod world;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube;
use e2e::kube::Options;
use e2e::kube::cluster::PATIENCE;
use e2e::kube::crds;
use e2e::lab::LabConfig;
use e2e::netns::NetNs;
use e2e::runtime::Runtime;
use e2e::runtime::prepared;
use e2e::scenario;
use serde_json::Value;
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

fn tables(netns: &NetNs) -> anyhow::Result<String> {
    let output = netns.run(|| Command::new("nft").args(["list", "tables"]).output())??;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_pod_begins_behind_the_real_agent_and_not_before() {
    as_root_here("a_pod_begins_behind_the_real_agent_and_not_before", || {
        let Some(api) = kube::start(Options::default()) else { return Ok(()) };
        crds::install(&api)?;
        let mut config = LabConfig::of(&scenario::world(true)).in_cluster(&api, true)?;
        config.timeout = PATIENCE;
        let Some(lab) = scenario::lab(config) else { return Ok(()) };
        if lab.view()?.rootless {
            // Its nodes are in a user namespace that this process cannot enter.
            assert!(std::env::var_os("CI").is_none(), "this test enters the lab's nodes, which takes a root");
            eprintln!("SKIPPED: this test enters the lab's nodes, which takes a root");
            return Ok(());
        }
        let state = lab.paths().agent_state(2);
        let world = World::new()?;
        let mut command = world.command(&["install"])?;
        command.env("TULLE_CNI_SOCKET", state.join("cni.sock")).env("TULLE_CNI_STATE_DIR", state.join("cni"));
        let installed = command.output()?;
        anyhow::ensure!(installed.status.success(), "{installed:?}");
        let view = lab.view()?;
        let node = view.nodes.iter().find(|node| node.name == "node-2").context("no node-2")?;
        let runtime = Runtime::new(&node.netns, &world.runtime.conf_dir, &world.runtime.bin_dir);
        eventually("the agent takes pods", PATIENCE, || {
            let own = world.own()?;
            let conf = prepared(&json!({"cniVersion": "1.1.0", "name": "net"}), &own, None);
            let (_netns, sandbox) = world.pod("shop/nobody")?;
            let said = runtime.run("STATUS", &own, &conf, &sandbox)?;
            anyhow::ensure!(
                said.success && fs::read_to_string(state.join("cni/plugin.log"))?.contains("takes pods"),
                "{said:?}"
            );
            Ok(())
        })?;
        for (name, enrolled) in [("shop/late", true), ("plain/late", false)] {
            let (namespace, own_name) = name.split_once('/').context("a pod has a namespace")?;
            let made = api.apply(&format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {own_name}, namespace: {namespace}}}\n\
                 spec: {{nodeName: node-2, serviceAccountName: default, containers: [{{name: main, image: none}}]}}\n"
            ))?;
            let (netns, mut sandbox) = world.pod(name)?;
            sandbox.uid = made.first().and_then(|pod| pod["metadata"]["uid"].as_str()).context("no uid")?.to_owned();
            // The order of a real node: no address is in the API before the runtime is done.
            let result: Value = runtime.add(&sandbox)?.map_err(|failed| anyhow::anyhow!("{name}: {failed:?}"))?;
            anyhow::ensure!(result["ips"].as_array().map(Vec::len) == Some(2), "{result}");
            let seen = tables(&netns)?;
            anyhow::ensure!(seen.contains("table inet tulle\n") == enrolled, "{name}: {seen}");
            runtime.check(&sandbox)?.map_err(|failed| anyhow::anyhow!("{name}: {failed:?}"))?;
            runtime.del(&sandbox)?.map_err(|failed| anyhow::anyhow!("{name}: {failed:?}"))?;
            // Again, as kubelet makes a new sandbox for the same pod.
            runtime.add(&sandbox)?.map_err(|failed| anyhow::anyhow!("{name}, again: {failed:?}"))?;
            anyhow::ensure!(tables(&netns)?.contains("table inet tulle\n") == enrolled, "{name}, again");
            runtime.del(&sandbox)?.map_err(|failed| anyhow::anyhow!("{name}: {failed:?}"))?;
        }
        // Dead: what belongs in the mesh waits, by what the agent itself wrote.
        lab.kill("node-2", "KILL")?;
        for (name, starts) in [("shop/last", false), ("plain/last", true)] {
            let (_netns, sandbox) = world.pod(name)?;
            let added = runtime.add(&sandbox)?;
            anyhow::ensure!(added.is_ok() == starts, "{name}: {added:?}");
        }
        Ok(())
    });
}
