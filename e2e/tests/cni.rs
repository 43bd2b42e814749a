//! Promise: a pod of the mesh starts behind the proxy or waits, every other pod starts whatever state our parts are in, and the
//! plugin comes and goes without a trace. Driven as a container runtime drives it, after the real `bridge` and `host-local`.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "cni/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::runtime::Runtime;
use e2e::runtime::prepared;
use e2e::runtime::said;
use serde_json::Value;
use serde_json::json;
use world::World;
use world::as_root;

/// For a machine that is slow and busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn enrolled(_: &Value) -> Option<Value> {
    Some(json!({"ok": true, "enrolled": true}))
}

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| Some(ip["address"].as_str()?.split('/').next()?.to_owned())).collect()
}

#[test]
fn thirty_pods_at_once_get_their_network_and_the_agent_hears_of_each() {
    as_root("thirty_pods_at_once_get_their_network_and_the_agent_hears_of_each", || {
        let world = World::installed()?;
        let agent = world.agent(enrolled)?;
        let pods: Vec<_> = (0..30).map(|number| world.pod(&format!("shop/cart-{number}"))).collect::<Result<_, _>>()?;
        let results: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> =
                pods.iter().map(|(_, sandbox)| scope.spawn(|| (sandbox.clone(), world.runtime.add(sandbox)))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let heard = agent.heard();
        anyhow::ensure!(heard.len() == 30, "{} requests", heard.len());
        let mut all = BTreeSet::new();
        for (sandbox, result) in results {
            let result = result?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
            // The last plugin's result is that of the one before: both addresses, and the interface that bridge made.
            let ips = addresses(&result);
            anyhow::ensure!(ips.len() == 2 && result["interfaces"].as_array().map(Vec::len) == Some(3), "{result}");
            let request = heard.iter().find(|request| request["podName"] == sandbox.name.as_str());
            let request = request.with_context(|| format!("nobody asked for {}", sandbox.name))?;
            let expected = json!({
                "version": 1, "command": "ADD", "containerId": sandbox.id, "netns": sandbox.netns, "ifName": "eth0",
                "podNamespace": "shop", "podName": sandbox.name, "podUid": format!("uid-shop-{}", sandbox.name), "ips": ips,
            });
            anyhow::ensure!(*request == expected, "{request}\ninstead of\n{expected}");
            all.extend(ips);
        }
        anyhow::ensure!(all.len() == 60, "addresses are used twice: {all:?}");
        for (_, sandbox) in &pods {
            world.runtime.check(sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
            world.runtime.del(sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        }
        let count = |command: &str| agent.heard().iter().filter(|request| request["command"] == command).count();
        anyhow::ensure!((count("CHECK"), count("DEL")) == (30, 30), "{} and {}", count("CHECK"), count("DEL"));
        let log = fs::read_to_string(world.at("state/plugin.log"))?;
        anyhow::ensure!(log.lines().count() == 90 && log.contains("K8S_POD_NAME=cart-7"), "{log}");
        Ok(())
    });
}

#[test]
fn while_the_agent_is_away_only_pods_of_the_mesh_wait() {
    as_root("while_the_agent_is_away_only_pods_of_the_mesh_wait", || {
        let world = World::installed()?;
        world.know()?;
        let away = || -> anyhow::Result<()> {
            for (pod, starts, says) in [
                ("office/desk", true, ""),
                ("shop/cart", false, "pod shop/cart has to wait: the node's agent does not answer at"),
                ("mixed/one", false, "enrol themselves"),
                ("unheard-of/one", false, "is not known"),
            ] {
                let (_netns, sandbox) = world.pod(pod)?;
                match world.runtime.add(&sandbox)? {
                    Ok(result) => anyhow::ensure!(starts && addresses(&result).len() == 2, "{pod}: {result}"),
                    Err(failed) => {
                        let message = failed.error["msg"].as_str().unwrap_or_default();
                        let good = failed.plugin == "tulle-cni" && failed.error["code"] == 11 && message.contains(says);
                        anyhow::ensure!(!starts && good, "{pod}: {failed:?}");
                        anyhow::ensure!(failed.error["cniVersion"] == "1.0.0", "{failed:?}");
                    }
                }
                // An agent that is away keeps nobody from ending.
                world.runtime.del(&sandbox)?.map_err(|failed| anyhow::anyhow!("{pod}: {failed:?}"))?;
            }
            Ok(())
        };
        away().context("no socket")?;
        let dying = world.agent(|_| None)?;
        away().context("an agent that dies in the middle")?;
        let adds = dying.heard().iter().filter(|request| request["command"] == "ADD").count();
        anyhow::ensure!(adds == 4, "{:?}", dying.heard());
        let babbling = world.agent(|_| Some(json!(["no answer"])))?;
        away().context("an agent that answers nonsense")?;
        drop((dying, babbling));
        // It comes back: the pod that waited starts.
        let _agent = world.agent(enrolled)?;
        let (_netns, sandbox) = world.pod("shop/cart")?;
        world.runtime.add(&sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        Ok(())
    });
}

#[test]
fn what_the_agent_refuses_is_what_the_runtime_hears() {
    as_root("what_the_agent_refuses_is_what_the_runtime_hears", || {
        let world = World::installed()?;
        let refusal =
            json!({"ok": false, "code": 11, "message": "pod shop/cart: no certificate yet", "details": "wait"});
        let _agent = world.agent(move |_| Some(refusal.clone()))?;
        let (netns, sandbox) = world.pod("shop/cart")?;
        let failed = world.runtime.add(&sandbox)?.err().context("it was added")?;
        let expected =
            json!({"cniVersion": "1.0.0", "code": 11, "msg": "pod shop/cart: no certificate yet", "details": "wait"});
        anyhow::ensure!(failed.error == expected, "{failed:?}");
        // The runtime told everybody to delete it: its interface and address are free again.
        let links = netns.run(|| Command::new("ip").args(["-o", "link"]).output())??;
        anyhow::ensure!(!String::from_utf8_lossy(&links.stdout).contains("eth0"), "{links:?}");
        let left: Vec<_> = fs::read_dir(world.at("ipam/net"))?.flatten().map(|entry| entry.file_name()).collect();
        anyhow::ensure!(!left.iter().any(|name| name.to_string_lossy().starts_with("10.88")), "{left:?}");
        Ok(())
    });
}

#[test]
fn an_agent_that_hangs_is_given_up_before_the_runtime_does() {
    as_root("an_agent_that_hangs_is_given_up_before_the_runtime_does", || {
        let world = World::installed()?;
        world.know()?;
        let _agent = world.agent(|_| {
            std::thread::sleep(PATIENCE * 10);
            None
        })?;
        let pods = ["shop/cart", "office/desk"].map(|name| world.pod(name));
        let [in_mesh, outside] = pods.map(Result::unwrap);
        let (waits, starts) = std::thread::scope(|scope| {
            let waits = scope.spawn(|| world.runtime.add(&in_mesh.1));
            let starts = scope.spawn(|| world.runtime.add(&outside.1));
            (waits.join().unwrap(), starts.join().unwrap())
        });
        let failed = waits?.err().context("it was added")?;
        let message = failed.error["msg"].as_str().unwrap_or_default();
        anyhow::ensure!(failed.error["code"] == 11 && message.contains("did not answer in time"), "{failed:?}");
        starts?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        Ok(())
    });
}

#[test]
fn a_plugin_that_is_killed_in_the_middle_leaves_nothing_that_a_second_try_would_find() {
    as_root("a_plugin_that_is_killed_in_the_middle_leaves_nothing_that_a_second_try_would_find", || {
        let world = World::installed()?;
        let (asked, asks) = channel();
        let answers = std::sync::Arc::new(AtomicBool::new(false));
        let (asked, ready) = (std::sync::Mutex::new(asked), answers.clone());
        let agent = world.agent(move |request| {
            let _ = asked.lock().unwrap().send(());
            // A DEL is answered; an ADD only later.
            if request["command"] == "ADD" && !ready.load(Ordering::SeqCst) {
                std::thread::sleep(PATIENCE * 10);
            }
            enrolled(request)
        })?;
        let (_netns, sandbox) = world.pod("shop/cart")?;
        let list = world.runtime.configuration()?;
        let (bridge, own) = (&list["plugins"][0], world.own()?);
        let result = world.runtime.run("ADD", bridge, &prepared(&list, bridge, None), &sandbox)?.json();
        let conf = prepared(&list, &own, Some(&result)).to_string();
        let mut child = world.runtime.start("ADD", &own, &conf, &sandbox)?;
        asks.recv_timeout(PATIENCE).context("the agent was not asked")?;
        child.kill()?;
        child.wait()?;
        // kubelet makes the same sandbox again: DEL, then ADD.
        answers.store(true, Ordering::SeqCst);
        world.runtime.del(&sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        world.runtime.add(&sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        let commands: Vec<Value> = agent.heard().iter().map(|request| request["command"].clone()).collect();
        anyhow::ensure!(commands == ["ADD", "DEL", "ADD"], "{commands:?}");
        Ok(())
    });
}

#[test]
fn after_a_reboot_everything_can_be_deleted_and_begun_again() {
    as_root("after_a_reboot_everything_can_be_deleted_and_begun_again", || {
        let world = World::installed()?;
        let agent = world.agent(enrolled)?;
        let (netns, sandbox) = world.pod("shop/cart")?;
        world.runtime.add(&sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        // No network namespace, no state folder, no agent, and a runtime that remembers no result.
        drop((netns, agent));
        fs::remove_dir_all(world.at("state"))?;
        let runtime = Runtime::new(world.node.path(), &world.runtime.conf_dir, &world.runtime.bin_dir);
        let own = world.own()?;
        for netns in [sandbox.netns.clone(), "".into(), "not/absolute".into()] {
            let sandbox = e2e::runtime::Sandbox { netns, ..sandbox.clone() };
            let conf = prepared(&runtime.configuration()?, &own, None);
            let deleted = runtime.run("DEL", &own, &conf, &sandbox)?;
            anyhow::ensure!(deleted.success && deleted.stdout.is_empty(), "{deleted:?}");
        }
        runtime.del(&sandbox)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        // The list is still there and first: pods outside of the mesh start as soon as it is known which those are.
        world.know()?;
        let (_netns, desk) = world.pod("office/desk")?;
        runtime.add(&desk)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
        Ok(())
    });
}

#[test]
fn a_network_namespace_that_is_not_the_pod_s_is_refused() {
    as_root("a_network_namespace_that_is_not_the_pod_s_is_refused", || {
        let world = World::installed()?;
        world.know()?;
        let agent = world.agent(enrolled)?;
        let list = world.runtime.configuration()?;
        let (bridge, own) = (&list["plugins"][0], world.own()?);
        let (_netns, cart) = world.pod("shop/cart")?;
        let (_other, other) = world.pod("shop/other")?;
        let result = world.runtime.run("ADD", bridge, &prepared(&list, bridge, None), &cart)?.json();
        let conf = prepared(&list, &own, Some(&result));
        fs::write(world.at("file"), "")?;
        nix::unistd::mkfifo(&world.at("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
        for (netns, says) in [
            (other.netns.clone(), "has no interface with 10.88.0."),
            (world.node.path().to_owned(), "node's own network namespace"),
            (world.at("file"), "no network namespace"),
            (world.at("fifo"), "no network namespace"),
            (world.at("none"), "cannot be opened"),
        ] {
            for (pod, code) in [("shop/cart", 100), ("office/desk", 0)] {
                let sandbox = e2e::runtime::Sandbox { netns: netns.clone(), ..e2e::runtime::Sandbox::new(pod, &netns) };
                let said = world.runtime.run("ADD", &own, &conf, &sandbox)?;
                if code == 0 {
                    anyhow::ensure!(said.success && said.json() == result, "{}: {said:?}", netns.display());
                    continue;
                }
                let error = said.json();
                let message = error["msg"].as_str().unwrap_or_default();
                anyhow::ensure!(!said.success && error["code"] == code && message.contains(says), "{says}: {said:?}");
            }
        }
        anyhow::ensure!(agent.heard().is_empty(), "the agent is not troubled with it: {:?}", agent.heard());
        let good = world.runtime.run("ADD", &own, &conf, &cart)?;
        anyhow::ensure!(good.success && agent.heard().len() == 1, "{good:?}");
        Ok(())
    });
}

#[test]
fn every_version_and_command_of_the_specification_is_answered() {
    as_root("every_version_and_command_of_the_specification_is_answered", || {
        let world = World::installed()?;
        let (_netns, sandbox) = world.pod("shop/cart")?;
        let own = world.own()?;
        let run = |command: &str, conf: &Value| world.runtime.run(command, &own, conf, &sandbox);
        let version = run("VERSION", &json!({"cniVersion": "1.0.0"}))?.json();
        let spoken = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        anyhow::ensure!(version == json!({"cniVersion": "1.1.0", "supportedVersions": spoken}), "{version}");
        // What stands in a result of another plugin is nobody's business, and passed on as it is.
        let conf = |version: &str, more: &str| {
            let own = own.to_string();
            format!(r#"{{"cniVersion":"{version}","name":"net",{more}{}"#, &own[1..])
        };
        let result = r#"{"ips":[],"mtu":1.50e3,"big":123456789012345678901234567890,"z":1,"a":{"ü":[null]}}"#;
        let agent = world.agent(|request| Some(json!({"ok": true, "enrolled": request["command"] == "ADD"})))?;
        for version in spoken {
            let conf = conf(version, &format!(r#""prevResult":{result},"#));
            let added = said(world.runtime.start("ADD", &own, &conf, &sandbox)?)?;
            anyhow::ensure!(added.success && added.stdout.trim_end() == result, "{version}: {added:?}");
            let checked = said(world.runtime.start("CHECK", &own, &conf, &sandbox)?)?;
            anyhow::ensure!(checked.success && checked.stdout.is_empty(), "{version}: {checked:?}");
        }
        let valid = r#""cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}],"#;
        for (command, more) in [("STATUS", ""), ("GC", valid)] {
            let done = said(world.runtime.start(command, &own, &conf("1.1.0", more), &sandbox)?)?;
            anyhow::ensure!(done.success && done.stdout.is_empty(), "{command}: {done:?}");
        }
        let heard = agent.heard();
        anyhow::ensure!(heard[10] == json!({"version": 1, "command": "STATUS"}), "{heard:?}");
        anyhow::ensure!(heard[11]["valid"] == json!([{"containerId": "c1", "ifName": "eth0"}]), "{heard:?}");
        drop(agent);
        // Without the agent: a node whose other pods can start has a network.
        let nothing_known = said(world.runtime.start("STATUS", &own, &conf("1.1.0", ""), &sandbox)?)?;
        anyhow::ensure!(!nothing_known.success && nothing_known.json()["code"] == 50, "{nothing_known:?}");
        world.know()?;
        let known = said(world.runtime.start("STATUS", &own, &conf("1.1.0", ""), &sandbox)?)?;
        anyhow::ensure!(known.success && known.stdout.is_empty(), "{known:?}");
        for (command, text, code) in [
            ("ADD", "{".to_owned(), 6),
            ("ADD", conf("0.2.0", ""), 1),
            ("ADD", conf("1.0.0", ""), 7),
            ("GC", conf("1.1.0", ""), 7),
            ("EXPLODE", conf("1.0.0", ""), 4),
        ] {
            let refused = said(world.runtime.start(command, &own, &text, &sandbox)?)?;
            anyhow::ensure!(!refused.success && refused.json()["code"] == code, "{command} {text}: {refused:?}");
        }
        Ok(())
    });
}

#[test]
fn the_list_follows_the_node_s_network_and_stays_over_a_reboot() {
    as_root("the_list_follows_the_node_s_network_and_stays_over_a_reboot", || {
        let world = World::new()?;
        let mut command = world.command(&["install", "--watch"])?;
        let mut keeper = world.node.run(|| command.stderr(Stdio::piped()).spawn())??;
        let first = || world.runtime.configuration().map(|list| list["plugins"][1].clone());
        let follows = |what: &str, check: &dyn Fn() -> anyhow::Result<bool>| {
            eventually(what, PATIENCE, || {
                let seen = world.runtime.configuration();
                if check().unwrap_or(false) { Ok(()) } else { Err(format!("{seen:?}")) }
            })
        };
        follows("ours is first", &|| Ok(first()?["primary"] == "10-net.conflist"))?;
        fs::write(world.conf("10-net.conflist"), world.network("0.4.0"))?;
        follows("a new version is taken over", &|| Ok(world.runtime.configuration()?["cniVersion"] == "0.4.0"))?;
        fs::write(world.conf("05-other.conf"), r#"{"cniVersion":"0.3.1","name":"other","type":"ptp"}"#)?;
        follows("a new primary is taken over", &|| Ok(first()?["primary"] == "05-other.conf"))?;
        fs::remove_file(world.conf("05-other.conf"))?;
        follows("it is gone again", &|| Ok(first()?["primary"] == "10-net.conflist"))?;
        fs::remove_file(world.conf("00-tulle.conflist"))?;
        fs::remove_file(world.at("bin/tulle-cni"))?;
        follows("ours is put back", &|| Ok(first()?["type"] == "tulle-cni" && world.at("bin/tulle-cni").exists()))?;
        keeper.kill()?;
        keeper.wait()?;
        anyhow::ensure!(first()?["type"] == "tulle-cni", "ours is read before anything of ours runs");
        Ok(())
    });
}

#[test]
fn uninstalling_may_be_killed_anywhere_and_leaves_no_trace() {
    as_root("uninstalling_may_be_killed_anywhere_and_leaves_no_trace", || {
        for killed_after in 0..=5 {
            uninstall(killed_after).with_context(|| format!("killed after {killed_after} steps"))?;
        }
        Ok(())
    });
}

fn uninstall(killed_after: usize) -> anyhow::Result<()> {
    let world = World::new()?;
    let before = world.folders()?;
    let output = world.cni(&["install"])?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    world.know()?;
    // A pod that is still captured, as its own processes show it, and the node's own tables.
    let (netns, _sandbox) = world.pod("shop/captured")?;
    let ruleset = || -> anyhow::Result<Vec<String>> {
        [&netns, &world.node]
            .into_iter()
            .map(|place| {
                let output = place.run(|| Command::new("nft").args(["list", "ruleset"]).output())??;
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            })
            .collect()
    };
    let rules_before = ruleset()?;
    let process = world.at("proc/17/ns");
    fs::create_dir_all(&process)?;
    std::os::unix::fs::symlink(netns.path(), process.join("net"))?;
    fs::create_dir_all(world.at("proc/self/ns"))?;
    std::os::unix::fs::symlink(world.node.path(), world.at("proc/self/ns/net"))?;
    for (place, tables) in [(&netns, ["tulle", "tulle_network"]), (&world.node, ["tulle_fence", "tulle_probes"])] {
        for table in tables {
            let added = place.run(|| Command::new("nft").args(["add", "table", "inet", table]).status())??;
            anyhow::ensure!(added.success(), "nft add table inet {table}");
        }
    }
    let mut command = world.command(&["uninstall"])?;
    let mut child = world.node.run(|| command.stdout(Stdio::piped()).spawn())??;
    let mut lines = BufReader::new(child.stdout.take().context("it has an output")?).lines();
    for _ in 0..killed_after {
        lines.next().context("a step for each line")??;
    }
    child.kill()?;
    child.wait()?;
    // Whatever was killed where: who is not in the mesh starts.
    let (_desk, desk) = world.pod("office/desk")?;
    world.runtime.add(&desk)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
    let output = world.cni(&["uninstall"])?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    anyhow::ensure!(world.folders()? == before, "the folders are not as before");
    anyhow::ensure!(ruleset()? == rules_before, "rules are left: {:?}", ruleset()?);
    anyhow::ensure!(!world.at("state").exists(), "the state folder is left");
    world.runtime.del(&desk)?.map_err(|failed| anyhow::anyhow!("{failed:?}"))?;
    Ok(())
}
