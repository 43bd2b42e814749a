//! Promise: on a node of a cluster labels alone decide who is captured; what the API says of a pod is so at every moment;
//! restarts of the proxy and of the API server change nothing for pods that run; a pod never gets another one's network;
//! and the kubelet's probes pass under STRICT while nobody else's plaintext does.
//!
//! The lab plays scheduler and kubelet through a real API server, and shows each node's agent one process for each pod.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube::cluster::PATIENCE;
use e2e::kube::{self, ApiServer, Options, crds};
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::{Value, json};

/// An API server with every kind, and a lab whose objects live in it and whose nodes find their pods there.
fn cluster(objects: &str) -> anyhow::Result<Option<(ApiServer, Lab)>> {
    let Some(api) = kube::start(Options::default()) else { return Ok(None) };
    crds::install(&api)?;
    let mut config = LabConfig::of(objects).in_cluster(&api, true)?;
    config.timeout = PATIENCE;
    Ok(scenario::lab(config).map(|lab| (api, lab)))
}

fn redirection(pod: &Value) -> &str {
    pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str().unwrap_or_default()
}

fn published(api: &ApiServer, pod: &str, wanted: &str) -> anyhow::Result<Value> {
    api.wait("Pod", pod, &format!("its redirection is {wanted:?}"), |it| redirection(it) == wanted)
}

fn capture(lab: &Lab, node: &str, pod: &str) -> anyhow::Result<String> {
    Ok(scenario::pod_status(lab, node, pod)?["capture"].as_str().unwrap_or_default().to_owned())
}

fn await_capture(lab: &Lab, node: &str, pod: &str, wanted: &str) -> anyhow::Result<()> {
    eventually(&format!("{pod} is {wanted}"), PATIENCE, || match capture(lab, node, pod) {
        Ok(seen) if seen == wanted => Ok(()),
        other => Err(format!("{other:?}")),
    })
}

/// Looks at the API and at the proxy again and again until `done`: whenever the API said the same before and after, the
/// proxy must have been as it said. Gives how often that was "enabled".
fn watch_truth(api: &ApiServer, lab: &Lab, done: &AtomicBool) -> anyhow::Result<u32> {
    let mut enabled = 0;
    while !done.load(Ordering::Relaxed) {
        let pod = || anyhow::Ok(api.get("Pod", "shop/cart")?.context("no pod")?);
        let before = pod()?;
        let capture = capture(lab, "node-2", "cart")?;
        let after = pod()?;
        if redirection(&before) == "enabled"
            && before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]
        {
            anyhow::ensure!(capture == "Captured", "the API says enabled, and the proxy {capture:?}");
            enabled += 1;
        }
    }
    Ok(enabled)
}

#[test]
fn labels_capture_and_release_and_the_api_says_what_is_so() -> anyhow::Result<()> {
    let Some((api, lab)) = cluster(&scenario::world(false))? else { return Ok(()) };
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;
    let done = AtomicBool::new(false);
    let enabled = std::thread::scope(|scope| -> anyhow::Result<u32> {
        let watcher = scope.spawn(|| watch_truth(&api, &lab, &done));
        let switch = || -> anyhow::Result<()> {
            for _ in 0..3 {
                api.label("Namespace", "shop", "tulle.dev/mesh", Some("enabled"))?;
                published(&api, "shop/cart", "enabled")?;
                await_capture(&lab, "node-2", "cart", "Captured")?;
                api.label("Namespace", "shop", "tulle.dev/mesh", None)?;
                published(&api, "shop/cart", "")?;
                await_capture(&lab, "node-2", "cart", "Uncaptured")?;
            }
            // A pod's own word wins, both ways.
            api.label("Pod", "shop/cart", "tulle.dev/mesh", Some("enabled"))?;
            published(&api, "shop/cart", "enabled")?;
            api.label("Namespace", "shop", "tulle.dev/mesh", Some("enabled"))?;
            api.label("Pod", "shop/cart", "tulle.dev/mesh", Some("disabled"))?;
            published(&api, "shop/cart", "")?;
            published(&api, "shop/web", "enabled").map(drop)
        };
        let switched = switch();
        done.store(true, Ordering::Relaxed);
        let watched = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
        switched?;
        watched
    })?;
    assert!(enabled > 0, "the watcher saw the pod captured");
    scenario::all_well(&fresh.finish()?, 20)?;
    let other = api.get("Pod", "plain/guest")?.context("no pod")?;
    assert_eq!(redirection(&other), "", "a pod outside the mesh is not touched");
    // Nothing is written once nothing changes, and never anything but the status of pods and of the node.
    let writes = |api: &ApiServer| -> anyhow::Result<Vec<Value>> {
        let events = api.audit()?;
        let own = events.iter().filter(|event| event.writes() && event.agent.starts_with("tulle-ztunnel"));
        Ok(own.map(|event| json!(format!("{} {}/{}", event.what(), event.namespace, event.name))).collect())
    };
    let of_pods = |all: &[Value]| {
        all.iter().filter(|one| one.as_str().is_some_and(|it| it.starts_with("patch pods/status shop/"))).count()
    };
    let (all, before) = (writes(&api)?, of_pods(&writes(&api)?));
    let strange: Vec<&Value> = all
        .iter()
        .filter(|one| {
            !one.as_str().is_some_and(|it| {
                it.starts_with("patch pods/status shop/") || it.starts_with("patch nodes/status /node-")
            })
        })
        .collect();
    assert!(strange.is_empty(), "written besides: {strange:?}");
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    assert_eq!(of_pods(&writes(&api)?), before, "a quiet node says nothing of its pods");
    // Of cart alone, three times: pending, enabled, and away.
    assert!(before >= 9, "{before} writes: {all:?}");
    Ok(())
}

#[test]
fn restarts_change_nothing_even_while_the_api_server_is_away() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    let Some((mut api, lab)) = cluster(&objects)? else { return Ok(()) };
    published(&api, "shop/cart", "enabled")?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;

    // Replaced while it serves: no connection is lost.
    let fresh = lab.load("shop/web", &["http://cart.shop/"], 20.0, &[])?;
    lab.replace("node-2")?;
    scenario::all_well(&fresh.finish()?, 1)?;
    assert_eq!(redirection(&api.get("Pod", "shop/cart")?.context("no pod")?), "enabled");

    // Killed, and back while nobody says which pods there are.
    api.kill();
    lab.kill("node-2", "KILL")?;
    lab.restart("node-2")?;
    await_capture(&lab, "node-2", "cart", "Captured")?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;

    // A label that is taken away is followed when the server is back.
    api.begin()?;
    api.await_ready()?;
    api.label("Namespace", "shop", "tulle.dev/mesh", None)?;
    published(&api, "shop/cart", "")?;
    await_capture(&lab, "node-2", "cart", "Uncaptured")
}

/// Asks the agent of node 2 as the CNI plugin does.
fn ask(lab: &Lab, request: &Value) -> anyhow::Result<Value> {
    let mut stream = UnixStream::connect(lab.paths().agent_state(2).join("cni.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

#[test]
fn the_cni_plugin_is_answered_and_a_foreign_network_is_refused() -> anyhow::Result<()> {
    let mut objects = scenario::world(false);
    objects.push_str(&scenario::server("plain", "far", "far", 2));
    let Some((api, lab)) = cluster(&objects)? else { return Ok(()) };
    let request = |namespace: &str, name: &str, of: &str| -> anyhow::Result<Value> {
        let pod = api.get("Pod", &format!("{namespace}/{name}"))?.context("no pod")?;
        let ips: Vec<&Value> = pod["status"]["podIPs"].as_array().into_iter().flatten().map(|one| &one["ip"]).collect();
        let view = lab.view()?;
        let netns = view.pods.iter().find(|it| format!("{}/{}", it.namespace, it.name) == of).context("no pod")?;
        Ok(json!({"version": 1, "command": "ADD", "containerId": format!("c-{name}"), "ifName": "eth0",
            "netns": netns.netns, "podNamespace": namespace, "podName": name, "podUid": pod["metadata"]["uid"], "ips": ips}))
    };
    eventually("the agent answers", PATIENCE, || match ask(&lab, &json!({"version": 1, "command": "STATUS"})) {
        Ok(answer) if answer["ok"] == true => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    let outside = ask(&lab, &request("plain", "far", "plain/far")?)?;
    assert_eq!((&outside["ok"], &outside["enrolled"]), (&json!(true), &json!(false)), "{outside}");

    api.label("Namespace", "shop", "tulle.dev/mesh", Some("enabled"))?;
    published(&api, "shop/cart", "enabled")?;
    let foreign = ask(&lab, &request("shop", "cart", "plain/far")?)?;
    assert_eq!(foreign["code"], 100, "another pod's network: {foreign}");
    assert!(foreign["message"].as_str().unwrap_or_default().contains("does not own"), "{foreign}");
    let inside = ask(&lab, &request("shop", "cart", "shop/cart")?)?;
    assert_eq!((&inside["ok"], &inside["enrolled"]), (&json!(true), &json!(true)), "{inside}");
    assert_eq!(capture(&lab, "node-2", "cart")?, "Captured", "ADD is answered once the pod is captured");
    let stranger = json!({"version": 1, "command": "ADD", "containerId": "c-x", "ifName": "eth0", "netns": "/run/netns/x",
        "podNamespace": "shop", "podName": "nobody", "podUid": "u", "ips": ["10.9.9.9"]});
    let stranger = ask(&lab, &stranger)?;
    assert_eq!(stranger["code"], 11, "a pod that nobody knows may be one of the mesh: {stranger}");

    // The sandbox ends: the pod's network is let go, though the API still has the pod.
    let del = json!({"version": 1, "command": "DEL", "containerId": "c-cart", "ifName": "eth0"});
    assert_eq!(ask(&lab, &del)?["ok"], true);
    assert_ne!(capture(&lab, "node-2", "cart")?, "Captured");
    // It begins anew, in a network that the runtime names.
    let again = ask(&lab, &request("shop", "cart", "shop/cart")?)?;
    assert_eq!(again["enrolled"], true, "{again}");
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}

#[test]
fn probes_of_the_kubelet_pass_under_strict_and_nothing_else_in_plaintext_does() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    let server = scenario::server("shop", "probed", "cart", 2);
    objects.push_str(
        &server.replace("    ports: [", "    readinessProbe: {httpGet: {port: 8080, path: /}}\n    ports: ["),
    );
    let Some((api, lab)) = cluster(&objects)? else { return Ok(()) };
    published(&api, "shop/probed", "enabled")?;
    let ip = lab.pod_ip("shop", "probed")?;
    let at = |port: u16| format!("http://{ip}:{port}/");
    scenario::reaches(&lab, "node-2", &at(8080))?;
    let denied = |from: &str, url: &str| -> anyhow::Result<()> {
        let report = scenario::call(&lab, from, url)?;
        anyhow::ensure!(report["ok"] != true, "{from} reached {url} in plaintext: {report}");
        Ok(())
    };
    denied("node-2", &at(9000))?;
    denied("node-1", &at(8080))?;
    denied("plain/guest", &at(8080))?;
    let other = lab.pod_ip("shop", "cart")?;
    denied("node-2", &format!("http://{other}:8080/"))?;
    let table = lab.exec_ok("node-2", &["nft", "list", "table", "inet", "tulle_probes"])?;
    assert!(table.contains("snat") && table.contains(&format!("{ip} . 8080")), "{table}");
    Ok(())
}
