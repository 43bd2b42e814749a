//! Promise: a node that learns only what its pods use (`XDS_ON_DEMAND`) decides as one that knows everything: the first
//! connection to an address waits until control has said whose it is, policies hold from the first one on, and what
//! nobody asked for is not there.

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// The usual world, and another namespace of the mesh on node 2.
fn world() -> String {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::namespace("far", true));
    for app in ["used", "idle"] {
        objects.push_str(&scenario::server("far", app, app, 2));
        objects.push_str(&scenario::service("far", app));
    }
    objects
}

fn lab(objects: &str) -> Option<Lab> {
    scenario::lab(LabConfig::of(objects).env("ztunnel", "XDS_ON_DEMAND", "true"))
}

/// What node 1 knows: pods, and Services by host name.
fn known(lab: &Lab) -> anyhow::Result<BTreeSet<String>> {
    let dump = lab.node_admin("node-1", "/config_dump")?;
    let names = |list: &str, key: &str| {
        let entries = dump[list].as_array().cloned().unwrap_or_default();
        entries.into_iter().filter_map(|entry| entry[key].as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    let pods = names("workloads", "uid").into_iter().filter_map(|uid| Some(uid.split_once("//Pod/")?.1.to_owned()));
    Ok(pods.chain(names("services", "hostname")).collect())
}

fn knows(lab: &Lab, name: &str) -> anyhow::Result<bool> {
    Ok(known(lab)?.contains(name))
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_node_learns_what_its_pods_use_when_they_use_it() -> anyhow::Result<()> {
    let Some(lab) = lab(&world()) else { return Ok(()) };
    assert_eq!(known(&lab)?, set(&["shop/web", "shop/other", "plain/guest"]), "at first, what is on the node");

    // The first connection of all: through the mesh, not past it.
    assert_eq!(scenario::call(&lab, "shop/web", "http://cart.shop/")?["ok"], true);
    scenario::await_log(&lab, "node-2", &["sa/web", "sa/cart"])?;
    let learnt = known(&lab)?;
    assert!(learnt.contains("shop/cart") && learnt.contains("cart.shop.svc.cluster.local"), "{learnt:?}");
    assert!(!learnt.iter().any(|name| name.contains("used") || name.contains("idle")), "{learnt:?}");

    // By its address alone, which no name server was asked for.
    let ip = lab.pod_ip("far", "used")?;
    assert_eq!(scenario::call(&lab, "shop/other", &format!("http://{ip}:8080/"))?["ok"], true);
    scenario::await_log(&lab, "node-2", &["sa/other", "sa/used"])?;
    assert!(knows(&lab, "far/used")? && !knows(&lab, "far/idle")?);

    // A Service brings what comes to be behind it, and what goes is gone.
    lab.apply_yaml(&scenario::server("shop", "cart-2", "cart", 2))?;
    eventually("node-1 knows the second endpoint", scenario::PATIENCE, || {
        if knows(&lab, "shop/cart-2")? { Ok(()) } else { Err(anyhow::anyhow!("{:?}", known(&lab)?)) }
    })?;
    lab.delete("Pod", "shop/cart-2")?;
    eventually("node-1 knows it no longer", scenario::PATIENCE, || {
        if knows(&lab, "shop/cart-2")? { Err(anyhow::anyhow!("{:?}", known(&lab)?)) } else { Ok(()) }
    })?;
    Ok(())
}

#[test]
fn a_name_that_a_pod_asks_for_is_learnt_before_it_connects() -> anyhow::Result<()> {
    let Some(lab) = lab(&world()) else { return Ok(()) };
    lab.exec("shop/web", &["getent", "hosts", "idle.far.svc.cluster.local"])?;
    eventually("node-1 knows the Service of the name, and its endpoint", scenario::PATIENCE, || {
        let known = known(&lab)?;
        let both = ["far/idle", "idle.far.svc.cluster.local"].iter().all(|name| known.contains(*name));
        if both { Ok(()) } else { Err(anyhow::anyhow!("{known:?}")) }
    })
}

#[test]
fn an_address_that_a_name_server_tells_is_learnt_before_the_pod_connects() -> anyhow::Result<()> {
    let Some(lab) = lab(&world()) else { return Ok(()) };
    assert!(!knows(&lab, "far/idle")?);
    // A name that the mesh cannot read an address from, as it does not know that there is such a pod.
    let name = format!("{}.far.pod.cluster.local", lab.pod_ip("far", "idle")?.to_string().replace('.', "-"));
    lab.exec_ok("shop/web", &["getent", "ahostsv4", &name])?;
    eventually("node-1 knows the pod at the address", scenario::PATIENCE, || {
        if knows(&lab, "far/idle")? { Ok(()) } else { Err(anyhow::anyhow!("{:?}", known(&lab)?)) }
    })
}

#[test]
fn what_a_route_leads_to_is_learnt_by_the_first_request() -> anyhow::Result<()> {
    let mut objects = world();
    objects.push_str(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: cart, namespace: shop}\nspec:\n\
         \x20 parentRefs: [{kind: Service, group: '', name: cart, port: 80}]\n\
         \x20 rules: [{backendRefs: [{name: used, namespace: far, port: 80}]}]\n\
         ---\napiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: shop, namespace: far}\nspec:\n\
         \x20 from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]\n\
         \x20 to: [{group: '', kind: Service}]\n",
    );
    let Some(lab) = lab(&objects) else { return Ok(()) };
    assert!(!knows(&lab, "far/used")?);
    let report = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
    assert_eq!((&report["ok"], &report["status"]), (&true.into(), &200.into()), "{report}");
    scenario::await_log(&lab, "node-2", &["sa/web", "sa/used"])?;
    assert!(knows(&lab, "far/used")? && !knows(&lab, "far/idle")?, "{:?}", known(&lab)?);
    Ok(())
}

#[test]
fn policies_hold_from_the_first_connection_on() -> anyhow::Result<()> {
    let mut objects = world();
    let from_web =
        "{podSelector: {matchLabels: {app: cart}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}";
    objects.push_str(&scenario::network_policy("shop", "from-web", from_web));
    objects
        .push_str("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: fenced, labels: {tulle.dev/egress: deny}}\n");
    objects.push_str(&scenario::client("fenced", "client", 1));
    let Some(lab) = lab(&objects) else { return Ok(()) };
    for (from, expected) in [("shop/other", false), ("shop/web", true), ("plain/guest", false)] {
        let report = scenario::call(&lab, from, "http://cart.shop/")?;
        assert_eq!(report["ok"] == true, expected, "{from}: {report}");
    }
    // Where nothing may leave, an address that is not known yet is neither outside nor allowed.
    let inside = scenario::call(&lab, "fenced/client", "http://used.far/")?;
    assert_eq!(inside["ok"], true, "{inside}");
    let outside = scenario::calls(&lab, "fenced/client", "http://192.0.2.7/", &["--timeout-ms", "3000"])?;
    assert_ne!(outside[0]["ok"], true, "{outside:?}");
    scenario::await_log(&lab, "node-1", &["EGRESS_DENIED", "192.0.2.7"])?;
    Ok(())
}

#[test]
fn without_control_what_is_known_goes_on_and_what_is_not_known_is_refused() -> anyhow::Result<()> {
    let Some(lab) = lab(&world()) else { return Ok(()) };
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    lab.kill("control", "KILL")?;
    assert_eq!(scenario::call(&lab, "shop/other", "http://cart.shop/")?["ok"], true);
    let ip = lab.pod_ip("far", "idle")?;
    let url = format!("http://{ip}:8080/");
    let unknown = scenario::calls(&lab, "shop/web", &url, &["--timeout-ms", "8000"])?;
    assert_ne!(unknown[0]["ok"], true, "nobody knows whether that would have to be encrypted: {unknown:?}");
    scenario::await_log(&lab, "node-1", &["UNKNOWN_WORKLOAD", "XDS_ON_DEMAND"])?;
    lab.restart("control")?;
    eventually(
        "what was asked for is learnt from the next control",
        Duration::from_secs(60),
        || match scenario::calls(&lab, "shop/web", &url, &["--timeout-ms", "8000"]) {
            Ok(reports) if reports[0]["ok"] == true => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )?;
    scenario::await_log(&lab, "node-2", &["sa/web", "sa/idle"])?;
    Ok(())
}
