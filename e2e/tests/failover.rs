//! Promise: a Service works as long as one of its endpoints does. An endpoint that does not answer is left for another
//! one before anything was delivered, and is used again soon after it came back.

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// A pod that counts as ready and listens nowhere.
fn deaf(namespace: &str, name: &str, app: &str, node: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}}}}}\n\
         spec: {{nodeName: node-{node}, serviceAccountName: {app}, containers: [{{name: main, command: [sleep, infinity]}}]}}\n"
    )
}

/// Names of the pods that answered; every request must have been.
fn answered(lab: &Lab, url: &str, count: usize) -> anyhow::Result<BTreeSet<String>> {
    let reports = scenario::calls(lab, "shop/web", url, &["--count", &count.to_string()])?;
    scenario::all_well(&reports, count)?;
    Ok(reports.iter().filter_map(|report| report["pod"].as_str().map(str::to_owned)).collect())
}

fn names(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn an_endpoint_that_listens_nowhere_costs_no_connection_meshed_or_not() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for namespace in ["shop", "plain"] {
        objects.push_str(&scenario::server(namespace, "a", "trio", 1));
        objects.push_str(&scenario::server(namespace, "b", "trio", 2));
        objects.push_str(&deaf(namespace, "dead", "trio", 2));
        objects.push_str(&scenario::service(namespace, "trio"));
    }
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    for namespace in ["shop", "plain"] {
        // Each request is one connection; a third of the first choices is the dead endpoint.
        let seen = answered(&lab, &format!("http://trio.{namespace}/"), 150)?;
        assert_eq!(seen, names(&["a", "b"]), "{namespace}");
    }
    scenario::await_log(&lab, "node-1", &["tried=", ":8080 CONNECT_FAILED"])?;
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    let line = metrics.lines().find(|line| line.starts_with("tulle_endpoint_retries_total"));
    assert!(line.is_some_and(|line| line.contains("CONNECT_FAILED")), "{line:?}");

    // What is large is delivered once and whole, also when its first part went to the dead endpoint before.
    let body: String = (0..9_000).map(|number| format!("{number:09},")).collect();
    for _ in 0..10 {
        let reports = scenario::calls(&lab, "shop/web", "http://trio.shop/", &["--data", &body])?;
        scenario::all_well(&reports, 1)?;
        let arrived = reports[0]["answer"]["body"].as_str().unwrap_or_default();
        assert!(arrived == body, "{} of {} bytes arrived: {arrived:.200}", arrived.len(), body.len());
    }

    // A pod's own address means that pod and no other.
    let ip = lab.pod_ip("shop", "dead")?;
    let report = scenario::call(&lab, "shop/web", &format!("http://{ip}:8080/"))?;
    assert_ne!(report["ok"], true, "{report}");

    // When nobody is left, the reason is the last endpoint's.
    lab.delete("Pod", "shop/a")?;
    lab.delete("Pod", "shop/b")?;
    // Until the node has heard that they are gone, the reason may be that of one of them.
    eventually("the record names the last endpoint's reason", scenario::PATIENCE, || {
        let report = scenario::call(&lab, "shop/web", "http://trio.shop/").map_err(|error| error.to_string())?;
        if report["ok"] == true {
            return Err(format!("somebody answered: {report}"));
        }
        let words = ["dst.service=\"trio.shop.svc.cluster.local\"", "code=\"CONNECT_FAILED\""];
        scenario::log_lines(&lab, "node-1", &words).pop().ok_or_else(|| report.to_string())
    })?;
    Ok(())
}

#[test]
fn a_node_whose_proxy_is_gone_costs_no_connection_and_is_used_again_when_it_is_back() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 2), ("c", 3)] {
        objects.push_str(&scenario::server("shop", name, "trio", node));
    }
    objects.push_str(&scenario::service("shop", "trio"));
    let config = LabConfig { nodes: 3, ..LabConfig::of(&objects) };
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    assert_eq!(answered(&lab, "http://trio.shop/", 60)?, names(&["a", "b", "c"]));

    lab.kill("node-3", "KILL")?;
    assert_eq!(answered(&lab, "http://trio.shop/", 150)?, names(&["a", "b"]));

    lab.restart("node-3")?;
    eventually("the returned node's endpoint is used", Duration::from_secs(40), || {
        let seen = answered(&lab, "http://trio.shop/", 20)?;
        if seen.contains("c") { Ok(()) } else { Err(anyhow::anyhow!("{seen:?}")) }
    })?;
    Ok(())
}

#[test]
fn a_bound_client_keeps_its_endpoint_and_gets_another_when_it_goes() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 2), ("c", 2), ("d", 1)] {
        objects.push_str(&scenario::server("shop", name, "sticky", node));
    }
    objects.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: sticky, namespace: shop}\n\
         spec: {selector: {app: sticky}, sessionAffinity: ClientIP, ports: [{port: 80, targetPort: 8080}]}\n",
    );
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let first = answered(&lab, "http://sticky.shop/", 40)?;
    assert_eq!(first.len(), 1, "one client, one endpoint: {first:?}");
    let pod = first.first().cloned().unwrap_or_default();
    // The proxy forgets, and comes to the same endpoint.
    lab.kill("node-1", "KILL")?;
    lab.restart("node-1")?;
    eventually("node-1 serves again", scenario::PATIENCE, || answered(&lab, "http://sticky.shop/", 1))?;
    assert_eq!(answered(&lab, "http://sticky.shop/", 20)?, first);

    lab.delete("Pod", &format!("shop/{pod}"))?;
    let next = answered(&lab, "http://sticky.shop/", 40)?;
    assert!(next.len() == 1 && next != first, "another one, and only one: {next:?}");
    Ok(())
}

/// The lab's kube-proxy, outside the mesh: what a client has before its namespace is labelled.
#[test]
fn a_client_outside_the_mesh_is_bound_for_as_long_as_the_service_says() -> anyhow::Result<()> {
    let mut objects = scenario::world(false);
    for (name, node) in [("a", 1), ("b", 2), ("c", 2), ("d", 1)] {
        objects.push_str(&scenario::server("shop", name, "sticky", node));
    }
    for (name, config) in [("long", ""), ("short", ", sessionAffinityConfig: {clientIP: {timeoutSeconds: 1}}")] {
        objects.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{app: sticky}}, sessionAffinity: ClientIP{config}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
        ));
    }
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let first = answered(&lab, "http://long.shop/", 30)?;
    assert_eq!(first.len(), 1, "one client, one endpoint: {first:?}");
    // The rules are replaced; a hash of the client would lead elsewhere with other numbers of endpoints.
    for name in ["e", "f", "g"] {
        lab.apply_yaml(&scenario::server("shop", name, "sticky", 1))?;
        assert_eq!(answered(&lab, "http://long.shop/", 10)?, first, "after {name} came");
    }
    let before = answered(&lab, "http://short.shop/", 1)?;
    eventually("another endpoint answers after a while without a connection", scenario::PATIENCE, || {
        std::thread::sleep(Duration::from_millis(2_500));
        let seen = answered(&lab, "http://short.shop/", 1)?;
        if seen == before { Err(anyhow::anyhow!("still {seen:?}")) } else { Ok(()) }
    })?;
    assert_eq!(answered(&lab, "http://long.shop/", 10)?, first, "the other Service says nothing of seconds");
    Ok(())
}
