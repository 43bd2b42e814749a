//! Promise: in a cluster the mesh is switched by labels in the API while traffic runs, policies and routes take effect
//! from there, and none of it needs the API server to be up once it has been said.
//!
//! The lab plays scheduler, kubelet and controllers through the API; the API server is a real one.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube::{self, ApiServer, Options, crds};
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::Value;

/// An API server with every kind, and a lab whose objects live in it.
fn cluster(objects: &str, agents: bool) -> anyhow::Result<Option<(ApiServer, Lab)>> {
    let Some(api) = kube::start(Options::default()) else { return Ok(None) };
    crds::install(&api)?;
    let mut config = LabConfig::of(objects).in_cluster(&api, agents)?;
    config.timeout = kube::cluster::PATIENCE;
    Ok(scenario::lab(config).map(|lab| (api, lab)))
}

/// Whether a marker that `shop/web` sends to cart crosses the node's link in the clear.
fn is_readable(lab: &Lab) -> anyhow::Result<bool> {
    let word = scenario::marker();
    let sniffer = lab.sniff("node-1", &[&word])?;
    let reports = scenario::calls(lab, "shop/web", "http://cart.shop/", &["--count", "5", "--data", &word])?;
    let seen = sniffer.finish()?;
    scenario::all_well(&reports, 5)?;
    let readable = seen.markers[&word] > 0;
    anyhow::ensure!(readable || seen.tls.encrypted_bytes > 5 * word.len() as u64, "its bytes went nowhere: {seen:?}");
    Ok(readable)
}

fn await_readable(lab: &Lab, wanted: bool) -> anyhow::Result<()> {
    eventually("the marker on the link", kube::cluster::PATIENCE, || match is_readable(lab) {
        Ok(readable) if readable == wanted => Ok(()),
        other => Err(format!("readable: {other:?}")),
    })
}

fn denied(lab: &Lab, from: &str, wanted: bool) -> anyhow::Result<()> {
    eventually(&format!("{from} is denied: {wanted}"), kube::cluster::PATIENCE, || {
        let report = scenario::call(lab, from, "http://cart.shop/")?;
        if (report["ok"] != true) == wanted { Ok(()) } else { Err(anyhow::anyhow!("{report}")) }
    })
}

const NOT_OTHER: &str = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";

#[test]
fn a_label_in_the_api_switches_the_mesh_while_traffic_runs() -> anyhow::Result<()> {
    let Some((api, lab)) = cluster(&scenario::world(false), false)? else { return Ok(()) };
    assert!(is_readable(&lab)?, "outside the mesh the marker crosses the link in the clear");
    let uid = |api: &ApiServer| anyhow::Ok(api.get("Pod", "shop/cart")?.context("no pod")?["metadata"]["uid"].clone());
    let before = uid(&api)?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 30.0, &[])?;
    let kept = lab.load("shop/other", &["http://cart.shop/"], 30.0, &["--keep-alive"])?;

    lab.apply_yaml(&scenario::namespace("shop", true))?;
    let pod = api.wait("Pod", "shop/cart", "its capture is published", |it| {
        it["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"
    })?;
    assert_eq!(pod["metadata"]["uid"], before, "nothing was restarted");
    await_readable(&lab, false)?;
    assert!(!is_readable(&lab)?, "and it stays so");

    lab.apply_yaml(&scenario::namespace("shop", false))?;
    await_readable(&lab, true)?;
    scenario::all_well(&fresh.finish()?, 3)?;
    scenario::all_well(&kept.finish()?, 3)?;
    assert_eq!(uid(&api)?, before);
    Ok(())
}

#[test]
fn agents_follow_a_label_that_a_user_sets() -> anyhow::Result<()> {
    let Some((api, lab)) = cluster(&scenario::world(false), true)? else { return Ok(()) };
    assert!(is_readable(&lab)?, "outside the mesh the marker crosses the link in the clear");
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 30.0, &[])?;
    let kept = lab.load("shop/other", &["http://cart.shop/"], 30.0, &["--keep-alive"])?;
    let published = |pod: &str, wanted: Value| {
        api.wait("Pod", pod, "what its agent says", |it| {
            it["metadata"]["annotations"]["ambient.istio.io/redirection"] == wanted
        })
    };
    // Nobody tells the lab: what follows is the work of agents and control.
    api.label("Namespace", "shop", "tulle.dev/mesh", Some("enabled"))?;
    for pod in ["shop/web", "shop/other", "shop/cart"] {
        published(pod, "enabled".into())?;
    }
    await_readable(&lab, false)?;
    api.label("Namespace", "shop", "tulle.dev/mesh", None)?;
    for pod in ["shop/web", "shop/other", "shop/cart"] {
        published(pod, Value::Null)?;
    }
    await_readable(&lab, true)?;
    scenario::all_well(&fresh.finish()?, 3)?;
    scenario::all_well(&kept.finish()?, 3)?;
    let by_agents = api.audit()?.into_iter().filter(|it| it.agent.starts_with("tulle-ztunnel") && it.writes());
    let strays: Vec<String> =
        by_agents.filter(|it| it.code == 403).map(|it| format!("{} {}", it.what(), it.code)).collect();
    assert!(strays.is_empty(), "agents were refused: {strays:?}");
    Ok(())
}

#[test]
fn policies_and_routes_take_effect_from_the_api() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::server("shop", "next", "next", 2));
    objects.push_str(&scenario::service("shop", "next"));
    let Some((api, lab)) = cluster(&objects, false)? else { return Ok(()) };
    scenario::reaches(&lab, "shop/other", "http://cart.shop/")?;

    api.apply(&scenario::authorization("shop", "not-other", "cart", "DENY", NOT_OTHER))?;
    denied(&lab, "shop/other", true)?;
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &[])?, 1)?;
    api.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: cart, namespace: shop}\nspec:\n\
         \x20 parentRefs: [{kind: Service, group: '', name: cart, port: 80}]\n\
         \x20 rules: [{backendRefs: [{name: next, port: 80}]}]\n",
    )?;
    eventually("the route takes effect", kube::cluster::PATIENCE, || {
        let report = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
        if report["name"] == "next" { Ok(()) } else { Err(anyhow::anyhow!("{report}")) }
    })?;
    api.delete("HTTPRoute", "shop/cart")?;
    api.delete("AuthorizationPolicy", "shop/not-other")?;
    denied(&lab, "shop/other", false)?;
    Ok(())
}

/// The promise is ten minutes; the short form keeps a run of all tests short. `TULLE_SLOW=1` takes the whole time.
fn outage() -> Duration {
    Duration::from_secs(if std::env::var_os("TULLE_SLOW").is_some() { 600 } else { 60 })
}

#[test]
fn traffic_and_policy_outlive_the_api_server() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::authorization("shop", "not-other", "cart", "DENY", NOT_OTHER));
    let Some((mut api, lab)) = cluster(&objects, false)? else { return Ok(()) };
    denied(&lab, "shop/other", true)?;
    let fresh = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 20.0, &[])?;
    let refused = lab.load("shop/other", &["http://cart.shop/"], 5.0, &[])?;

    // Silent for the first part, closed for the second: both happen to real ones.
    let began = Instant::now();
    api.pause();
    std::thread::sleep(outage() / 3);
    api.kill();
    while began.elapsed() < outage() {
        let (status, said) = lab.get("control", 15014, "/readyz")?;
        anyhow::ensure!(status == 200, "control keeps what it knows: {said}");
        std::thread::sleep(Duration::from_secs(1));
    }
    let least = usize::try_from(outage().as_secs())? * 10;
    scenario::all_well(&fresh.finish()?, least)?;
    let refused = refused.finish()?;
    assert!(
        !refused.is_empty() && refused.iter().all(|report| report["ok"] != true),
        "a denial outlives the API server"
    );

    api.begin()?;
    api.await_ready()?;
    api.delete("AuthorizationPolicy", "shop/not-other")?;
    denied(&lab, "shop/other", false)?;
    Ok(())
}

#[test]
fn a_second_replica_of_control_goes_on_when_the_first_is_killed() -> anyhow::Result<()> {
    let Some((api, lab)) = cluster(&scenario::world(true), false)? else { return Ok(()) };
    let inside = api.in_lab(&api.kubeconfig())?.display().to_string();
    let ca = lab.paths().ca().display().to_string();
    let bin = e2e::lab::programs_dir()?.join("control").display().to_string();
    let argv = [
        bin.as_str(),
        "serve",
        "--source",
        "kube",
        "--kubeconfig",
        &inside,
        "--ca-dir",
        &ca,
        "--tls-san",
        "10.10.0.2",
        "--grpc-listen",
        "0.0.0.0:15112",
        "--http-listen",
        "127.0.0.1:15114",
    ];
    let _second = lab.spawn("control", &argv)?;
    let resources = |port: u16| -> anyhow::Result<Vec<(Value, Value)>> {
        let (status, body) = lab.get("control", port, "/debug/resources")?;
        anyhow::ensure!(status == 200, "{status}: {body}");
        let list: Vec<Value> = serde_json::from_str(&body)?;
        Ok(list.into_iter().map(|it| (it["name"].clone(), it["version"].clone())).collect())
    };
    eventually("both replicas publish the same versions", kube::cluster::PATIENCE, || {
        let (one, two) = (resources(15014)?, resources(15114)?);
        if one == two && !one.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("{} and {}", one.len(), two.len())) }
    })?;

    // Who has no certificate yet gets none from a control that is dead.
    for client in ["shop/web", "shop/other"] {
        scenario::reaches(&lab, client, "http://cart.shop/")?;
    }
    let load = lab.load("shop/web", &["http://cart.shop/"], 20.0, &[])?;
    lab.kill("control", "KILL")?;
    api.apply(&scenario::authorization("shop", "not-other", "cart", "DENY", NOT_OTHER))?;
    eventually("the second replica knows the policy", kube::cluster::PATIENCE, || {
        let found = resources(15114)?.iter().any(|(name, _)| name.as_str().is_some_and(|it| it.contains("not-other")));
        if found { Ok(()) } else { Err(anyhow::anyhow!("not yet")) }
    })?;
    lab.restart("control")?;
    denied(&lab, "shop/other", true)?;
    scenario::all_well(&load.finish()?, 3)?;
    Ok(())
}
