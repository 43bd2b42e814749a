//! The steps on a cluster, in order; each builds on those before.
//!
//! What a user would type is what is run: `kubectl`, and `tulle install`. Limits: they share one cluster, so their order
//! matters; the last ones take the mesh away again.

use std::time::Duration;

use anyhow::Context;
use anyhow::ensure;

use crate::cluster::layout;
use crate::cluster::spec;
use crate::demo::judge;
use crate::demo_kube::shop::PATIENCE;
use crate::demo_kube::shop::World;
use crate::demo_kube::shop::went;
use crate::eventually::eventually;
use crate::scenario;

/// One step.
type Step = judge::Step<fn(&mut World) -> anyhow::Result<String>>;

/// Parts that `--break` can break.
pub(super) const PARTS: [&str; 1] = ["weights"];
/// Without it there is nothing to show.
pub(super) const FIRST: &str = "shop-runs";

pub(super) const STEPS: &[Step] = &[
    Step {
        name: FIRST,
        claim: "A shop runs on the cluster; what it says can be read on the link between the nodes.",
        rests_on: &[],
        show: shop_runs,
    },
    Step { name: "install", claim: "The mesh is installed. No pod of the shop notices.", rests_on: &[], show: install },
    Step {
        name: "labelled-while-running",
        claim: "The namespace is labelled while clients keep running: nothing restarts, no request fails.",
        rests_on: &[],
        show: labelled,
    },
    Step {
        name: "unreadable-after",
        claim: "In the mesh the same words are gone from the link, which carries TLS 1.3 only; probes go on.",
        rests_on: &[],
        show: unreadable,
    },
    Step {
        name: "new-pods",
        claim: "New pods are in the mesh before their containers start.",
        rests_on: &[],
        show: new_pods,
    },
    Step {
        name: "canary",
        claim: "A new version of the catalog gets 20 % of the requests by an HTTPRoute, and none is lost.",
        rests_on: &["weights"],
        show: canary,
    },
    Step {
        name: "egress-denied",
        claim: "The namespace is closed to the outside but for one name; the rest of the world is refused.",
        rests_on: &[],
        show: egress,
    },
    Step {
        name: "node-reboot",
        claim: "A node loses its power and comes back: its pods of the mesh come back in the mesh.",
        rests_on: &[],
        show: reboot,
    },
    Step {
        name: "node-canary",
        claim: "One node tries another version of the proxy first; a version that does not start changes nothing.",
        rests_on: &[],
        show: node_canary,
    },
    Step {
        name: "upgrade",
        claim: "Control and proxies of all nodes are replaced by that version under traffic: no request fails.",
        rests_on: &[],
        show: upgrade,
    },
    Step {
        name: "uninstall",
        claim: "The mesh is removed. The pods run on, and the nodes are as they were.",
        rests_on: &[],
        show: uninstall,
    },
];

const ROUTES: &str = include_str!("../../examples/kube/routes-crd.yaml");
const SHOP: &str = include_str!("../../examples/kube/shop.yaml");
const NEXT: &str = include_str!("../../examples/kube/catalog-next.yaml");
const TARGETS: [&str; 3] = ["http://payments/", "http://catalog/", "tcp://payments:9000"];

fn route(stable: u32, canary: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: catalog, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: catalog, port: 80}}]
  rules:
  - backendRefs: [{{name: catalog, port: 80, weight: {stable}}}, {{name: catalog-next, port: 80, weight: {canary}}}]
"
    )
}

fn egress_policy() -> String {
    format!(
        "apiVersion: tulle.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: partner, namespace: shop}}
spec:
  rules: [{{hosts: [{}], ports: [{{port: 80, protocol: TCP}}]}}]
",
        layout::HOSTS[0]
    )
}

fn shop_runs(world: &mut World) -> anyhow::Result<String> {
    world.cluster.apply(ROUTES)?;
    world.cluster.apply(SHOP)?;
    world.rolled_out("shop")?;
    world.reaches("http://payments/")?;
    world.reaches("http://catalog/")?;
    for node in world.cluster.nodes() {
        let state = world.node_state(&node)?;
        world.before.insert(node, state);
    }
    let read = world.readable()?;
    Ok(format!("{} pods on two nodes; a random marker was read {read} times", world.pods("shop")?.len()))
}

/// The arguments of `tulle install` for a version of the images.
fn install_arguments(world: &World, tag: &str) -> Vec<String> {
    let mut arguments = vec![
        "tulle".to_owned(),
        "install".to_owned(),
        format!("--set=image.registry={}", spec::REGISTRY),
        // As text: the values are YAML.
        format!("--set=image.tag='{tag}'"),
        "--set=image.pullPolicy=Never".to_owned(),
    ];
    if let Some(part) = &world.broken {
        arguments.push(format!("--set=ztunnel.env.TULLE_BREAK={part}"));
    }
    arguments
}

fn run_install(world: &World, tag: &str, more: &[&str]) -> anyhow::Result<String> {
    let mut arguments = install_arguments(world, tag);
    arguments.extend(more.iter().map(|text| (*text).to_owned()));
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tulle(world, &words)
}

/// Runs `tulle` as an administrator of the cluster does.
fn tulle(world: &World, argv: &[&str]) -> anyhow::Result<String> {
    let output = world.cluster.command(layout::CONTROL, argv)?.output()?;
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {}\n{out}{error}", argv.join(" "), output.status);
    Ok(out.into_owned())
}

/// Waits until control and the proxies of all nodes are rolled out.
fn mesh_runs(world: &World) -> anyhow::Result<()> {
    let wait = format!("--timeout={}s", PATIENCE.as_secs());
    for what in ["deployment/control", "daemonset/ztunnel", "daemonset/ztunnel-canary"] {
        world.cluster.kubectl(&["rollout", "status", what, "-n", "tulle-system", &wait])?;
    }
    Ok(())
}

fn install(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    let load = world.load(&TARGETS, 10.0, &[])?;
    run_install(world, "1", &[])?;
    mesh_runs(world)?;
    let reports = load.finish()?;
    scenario::all_well(&reports, 10)?;
    ensure!(world.lives("shop")? == before, "a pod of the shop was restarted");
    world.readable().context("the shop is in the mesh without being asked")?;
    let pods = world.lives("tulle-system")?;
    Ok(format!("{} pods of the mesh run; {} requests of the shop meanwhile, none failed", pods.len(), reports.len()))
}

fn labelled(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    let fresh = world.load(&TARGETS, 20.0, &[])?;
    let kept = world.load(&["http://catalog/"], 20.0, &["--keep-alive"])?;
    world.cluster.kubectl(&["label", "namespace", "shop", "tulle.dev/mesh=enabled"])?;
    let captured = world.await_captured(true)?;
    // A moment inside the mesh belongs to the claim.
    std::thread::sleep(Duration::from_secs(2));
    let (fresh, kept) = (fresh.finish()?, kept.finish()?);
    scenario::all_well(&fresh, 60)?;
    scenario::all_well(&kept, 20)?;
    ensure!(world.lives("shop")? == before, "a pod was restarted");
    Ok(format!("{captured} pods captured, {}", went(&[fresh, kept].concat())))
}

fn unreadable(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    let bytes = world.unreadable()?;
    // Some rounds of every probe, whose periods are 2 s.
    std::thread::sleep(Duration::from_secs(8));
    ensure!(world.lives("shop")? == before, "a probe failed and the kubelet restarted a pod");
    world.rolled_out("shop").context("a probe fails")?;
    Ok(format!("marker read 0 times; {bytes} encrypted bytes crossed"))
}

fn new_pods(world: &mut World) -> anyhow::Result<String> {
    world.cluster.apply(NEXT)?;
    world.cluster.kubectl(&["rollout", "restart", "deployment/payments", "-n", "shop"])?;
    world.rolled_out("shop")?;
    let captured = world.await_captured(true)?;
    let bytes = world.unreadable()?;
    Ok(format!("{captured} pods captured, two of them new; {bytes} encrypted bytes to a new one"))
}

/// Requests of a hundred that the next version of the catalog answered.
fn hundred(world: &World) -> anyhow::Result<usize> {
    let reports = world.calls("http://catalog/", &["--count", "100", "--keep-alive"])?;
    scenario::all_well(&reports, 100)?;
    Ok(reports.iter().filter(|report| report["name"] == "catalog-next").count())
}

fn canary(world: &mut World) -> anyhow::Result<String> {
    ensure!(hundred(world)? == 0, "the next version is asked without a route");
    world.cluster.apply(&route(80, 20))?;
    let share = eventually("the canary gets its share", PATIENCE, || {
        let share = hundred(world)?;
        ensure!((19..=21).contains(&share), "of 100 requests at 80/20 the canary served {share}");
        Ok::<_, anyhow::Error>(share)
    })?;
    let load = world.load(&["http://catalog/"], 50.0, &["--keep-alive"])?;
    world.cluster.apply(&route(0, 100))?;
    let all = eventually("the canary gets all", PATIENCE, || {
        let all = hundred(world)?;
        ensure!(all == 100, "of 100 requests at 0/100 the canary served {all}");
        Ok::<_, anyhow::Error>(all)
    })?;
    let reports = load.finish()?;
    scenario::all_well(&reports, 10)?;
    Ok(format!("the canary served {share} of 100, then {all}; {} requests during the edit, none lost", reports.len()))
}

/// Whether a request to a host outside is answered.
fn answered(world: &World, url: &str) -> anyhow::Result<bool> {
    let reports = world.calls(url, &["--timeout-ms", "3000"])?;
    Ok(reports.iter().all(|report| report["ok"] == true))
}

fn egress(world: &mut World) -> anyhow::Result<String> {
    let urls = layout::HOSTS.map(|host| format!("http://{host}/"));
    let literal = format!("http://{}/", layout::host_address(1));
    for url in [&urls[0], &urls[1], &literal] {
        ensure!(answered(world, url)?, "{url} does not answer even without a policy");
    }
    world.cluster.apply(&egress_policy())?;
    world.cluster.kubectl(&["label", "namespace", "shop", "tulle.dev/egress=deny"])?;
    eventually("the outside is closed", PATIENCE, || {
        for url in [&urls[1], &literal] {
            ensure!(!answered(world, url)?, "{url} still answers");
        }
        ensure!(answered(world, &urls[0])?, "{} should be allowed by name", urls[0]);
        Ok::<_, anyhow::Error>(())
    })?;
    world.reaches("http://payments/")?;
    // What a container cannot walk around is in the node's network, by the pod's interface.
    for node in world.cluster.nodes() {
        let listed = world.cluster.command(&node, &["nft", "list", "set", "inet", "tulle_fence", "pods"])?.output()?;
        ensure!(String::from_utf8_lossy(&listed.stdout).contains("veth"), "{node} fences no pod");
    }
    Ok(format!(
        "{} answers, {} and its address do not; the cluster's own Services do",
        layout::HOSTS[0],
        layout::HOSTS[1]
    ))
}

fn reboot(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    world.cluster.power_off("node-2")?;
    world.cluster.power_on("node-2")?;
    let wanted = |world: &World| -> anyhow::Result<Vec<String>> {
        let on_node = world.pods("shop")?.into_iter().filter(|pod| pod["spec"]["nodeName"] == "node-2");
        Ok(on_node.map(|pod| pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned()).collect())
    };
    let pods = wanted(world)?;
    eventually("the pods of node-2 run again", PATIENCE, || {
        let lives = world.lives("shop")?;
        for uid in &pods {
            let then = before.iter().find(|life| life.uid == *uid).map(|life| life.restarts);
            let now = lives.iter().find(|life| life.uid == *uid).map(|life| life.restarts);
            ensure!(now > then, "{uid}: {then:?} restarts before, {now:?} now");
        }
        Ok::<_, anyhow::Error>(())
    })?;
    world.cluster.await_ready("node-2")?;
    mesh_runs(world)?;
    world.rolled_out("shop")?;
    world.await_captured(true)?;
    world.reaches("http://payments/")?;
    let bytes = world.unreadable()?;
    Ok(format!("{} pods came back as the same pods and captured; {bytes} encrypted bytes", pods.len()))
}

/// The node that tries a version first.
const CANARY_NODE: &str = "node-1";

fn node_label(world: &World, change: &str) -> anyhow::Result<()> {
    world.cluster.kubectl(&["label", "node", CANARY_NODE, "--overwrite", change]).map(drop)
}

/// Waits until a node has a ready proxy of each of these DaemonSets and no other one; returns their images.
fn proxies_of(world: &World, node: &str, wanted: &[&str]) -> anyhow::Result<Vec<String>> {
    eventually(&format!("{node} has proxies of {wanted:?}"), PATIENCE, || {
        let (mut sets, mut images) = (Vec::new(), Vec::new());
        for pod in world.pods("tulle-system")?.into_iter().filter(|pod| pod["spec"]["nodeName"] == node) {
            let name = pod["metadata"]["labels"]["app.kubernetes.io/name"].as_str().unwrap_or_default().to_owned();
            if !name.starts_with("ztunnel") {
                continue;
            }
            let status = &pod["status"]["containerStatuses"][0];
            ensure!(status["ready"] == true, "{name} is not ready: {status}");
            images.push(pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned());
            sets.push(name);
        }
        sets.sort();
        ensure!(sets == wanted, "it has {sets:?}");
        Ok::<_, anyhow::Error>(images)
    })
}

/// How often proxies were started anew, as one would be that ends beside its successor.
fn proxy_restarts(world: &World) -> anyhow::Result<u64> {
    Ok(world
        .lives("tulle-system")?
        .iter()
        .filter(|life| life.name.starts_with("ztunnel"))
        .map(|life| life.restarts)
        .sum())
}

/// Waits until the usual proxy of a node has drained and waits for its end beside the canary.
fn await_waiting(world: &World, node: &str) -> anyhow::Result<()> {
    eventually(&format!("the replaced proxy of {node} waits to be ended"), PATIENCE, || {
        let pods = world.pods("tulle-system")?;
        let replaced = |pod: &&serde_json::Value| {
            pod["spec"]["nodeName"] == node && pod["metadata"]["labels"]["app.kubernetes.io/name"] == "ztunnel"
        };
        let pod = pods.iter().find(replaced).and_then(|pod| pod["metadata"]["name"].as_str());
        let log = world.cluster.kubectl(&["logs", "-n", "tulle-system", pod.context("it has no such pod")?])?;
        ensure!(log.contains("a successor serves; waiting to be ended"), "its log does not say so");
        Ok::<_, anyhow::Error>(())
    })
}

fn node_canary(world: &mut World) -> anyhow::Result<String> {
    let before = (world.lives("shop")?, proxy_restarts(world)?);
    let load = world.load(&TARGETS, 20.0, &[])?;
    // No node has an image of this tag.
    run_install(world, "1", &["--set=ztunnel.canary.tag='3'"])?;
    node_label(world, "tulle.dev/proxy=beside")?;
    eventually("the canary does not start", PATIENCE, || {
        let pods = world.pods("tulle-system")?;
        let waits = |pod: &&serde_json::Value| {
            pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImageNeverPull"
        };
        ensure!(pods.iter().filter(waits).count() == 1, "no pod waits for its image");
        Ok::<_, anyhow::Error>(())
    })?;
    run_install(world, "1", &["--set=ztunnel.canary.tag='2'"])?;
    let images = proxies_of(world, CANARY_NODE, &["ztunnel", "ztunnel-canary"])?;
    ensure!(images.len() == 2 && images[0] != images[1], "both are {images:?}");
    // Drained, it stays: if it ended now, it would be started anew.
    await_waiting(world, CANARY_NODE)?;
    node_label(world, "tulle.dev/proxy=canary")?;
    let alone = proxies_of(world, CANARY_NODE, &["ztunnel-canary"])?;
    let others = proxies_of(world, "node-2", &["ztunnel"])?;
    ensure!(alone[0].ends_with(":2") && others[0].ends_with(":1"), "{alone:?} and {others:?}");
    let reports = load.finish()?;
    scenario::all_well(&reports, 60)?;
    let after = (world.lives("shop")?, proxy_restarts(world)?);
    ensure!(after == before, "started anew: {before:?} and {after:?}");
    world.unreadable()?;
    Ok(format!("{CANARY_NODE} of version 2, node-2 of version 1; {}", went(&reports)))
}

fn upgrade(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    let fresh = world.load(&TARGETS, 20.0, &[])?;
    let kept = world.load(&["http://catalog/"], 20.0, &["--keep-alive"])?;
    run_install(world, "2", &[])?;
    mesh_runs(world)?;
    // The canary's node goes back to the usual proxy, which is of that version now.
    node_label(world, "tulle.dev/proxy=beside")?;
    proxies_of(world, CANARY_NODE, &["ztunnel", "ztunnel-canary"])?;
    node_label(world, "tulle.dev/proxy-")?;
    proxies_of(world, CANARY_NODE, &["ztunnel"])?;
    let (fresh, kept) = (fresh.finish()?, kept.finish()?);
    scenario::all_well(&fresh, 60)?;
    scenario::all_well(&kept, 20)?;
    for pod in world.pods("tulle-system")? {
        let image = pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned();
        ensure!(image.ends_with(":2"), "{} still runs {image}", pod["metadata"]["name"]);
    }
    ensure!(world.lives("shop")? == before, "a pod of the shop was restarted");
    world.unreadable()?;
    Ok(format!("{}; the words are still not readable", went(&[fresh, kept].concat())))
}

fn uninstall(world: &mut World) -> anyhow::Result<String> {
    let before = world.lives("shop")?;
    world.cluster.kubectl(&["label", "namespace", "shop", "tulle.dev/egress-"])?;
    let load = world.load(&["http://payments/", "tcp://payments:9000"], 10.0, &[])?;
    tulle(world, &["tulle", "uninstall"])?;
    let reports = load.finish()?;
    scenario::all_well(&reports, 5)?;
    ensure!(world.lives("shop")? == before, "a pod of the shop was restarted");
    let read = world.readable().context("the pods are still in the mesh")?;
    for (node, was) in &world.before {
        let now = world.node_state(node)?;
        ensure!(now == *was, "{node} is not as it was:\n{now}\nit was:\n{was}");
    }
    Ok(format!(
        "the pods run on, {} requests, none failed; the marker is read {read} times; plugins, configuration and packet filter of both nodes are as before",
        reports.len()
    ))
}
