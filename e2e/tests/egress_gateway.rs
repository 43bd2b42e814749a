//! The egress gateway's promises: hosts outside see its address, it decides again whatever a peer asks, nothing leaves
//! another way while it is gone, and of several replicas any one is enough.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

const WEB: &str = "shop/web";
const API: &str = "http://api.example.test:8080/";

/// A closed namespace with a client on node 1, a gateway with a replica on each node, and a host outside with two names, of
/// which one is allowed.
fn world() -> String {
    let outside = scenario::outside("api.example.test,blocked.example.test,secure.example.test,tls.example.test");
    let policy = "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: api, namespace: shop}\nspec:\n\
         \x20 rules:\n  - hosts: [api.example.test]\n    ports: [{port: 8080, protocol: HTTP}, {port: 9000, protocol: TCP}]\n\
         \x20   via: {gateway: {namespace: egress, name: out}}\n";
    let closed = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled, tulle.dev/egress: deny}}\n";
    let open = scenario::namespace("plain", false);
    let clients = scenario::client("shop", "web", 1) + &scenario::client("plain", "guest", 1);
    let gateway = internet::gateway_service() + &internet::gateway("out-0", 1) + &internet::gateway("out-1", 2);
    format!("{closed}{open}{outside}{clients}{gateway}{policy}")
}

/// Addresses of the gateway's replicas.
fn addresses(lab: &Lab) -> Vec<String> {
    let view = lab.view().unwrap();
    view.pods.into_iter().filter(|pod| pod.namespace == "egress").flat_map(|pod| pod.addresses).collect()
}

/// Requests that the host outside has logged.
fn served(lab: &Lab) -> usize {
    scenario::log_lines(lab, "net/api", &["\"kind\":\"http\""]).len()
}

fn kill(lab: &Lab, name: &str) {
    let pod = format!("egress/{name}");
    lab.kill(&pod, "KILL").unwrap();
    eventually(&format!("{pod} ends"), Duration::from_secs(60), || {
        let view = lab.view().map_err(|error| error.to_string())?;
        let found = view.pod("egress", name).map(|pod| pod.pids.clone()).unwrap_or_default();
        if found.is_empty() { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .unwrap();
}

/// What people see of gateways is what these say.
fn asked_themselves(lab: &Lab) {
    let tulle = |argv: &[&str]| lab.exec_ok("control", &[&["tulle"][..], argv].concat()).map_err(|e| e.to_string());
    eventually("gateways say how they are and what they let out", Duration::from_secs(60), || {
        let (status, egress) = (tulle(&["status"])?, tulle(&["egress", "-n", "shop"])?);
        let row = |text: &str, words: &[&str]| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
        let well = row(&status, &["gateway egress/out-0 on node-1", "true"])
            && row(&status, &["gateway egress/out-1 on node-2", "true"])
            && !status.contains("not attached")
            && row(&egress, &["api.example.test", "allowed", "gateway"])
            && row(&egress, &["api.example.test", "allowed", "node"]);
        if well { Ok(()) } else { Err(format!("{status}{egress}")) }
    })
    .unwrap();
    let explained = |to: &str| lab.control_get(&format!("/debug/explain?from={WEB}&to={to}")).unwrap();
    let allowed = explained("api.example.test:8080");
    assert_eq!(allowed["verdict"], "allowed", "{allowed}");
    let replicas = allowed["endpoints"].as_array().unwrap();
    assert_eq!(replicas.len(), 2, "{allowed}");
    for replica in replicas {
        assert_eq!(replica["asked"], "api.example.test:8080", "{allowed}");
        assert_eq!(replica["inbound"]["policy"], "EgressPolicy/shop/api", "{allowed}");
        assert_eq!(replica["inbound"]["allowed"], true, "{allowed}");
    }
    assert_eq!(explained("blocked.example.test:8080")["verdict"], "refused");
}

#[test]
fn hosts_outside_are_reached_through_the_gateway_or_not_at_all() {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return };
    scenario::reaches(&lab, WEB, API).unwrap();
    let gateway = addresses(&lab);

    // Both kinds of traffic come from the gateway's address.
    let report = scenario::call(&lab, WEB, API).unwrap();
    let source = report["answer"]["source"].as_str().unwrap_or_default().to_owned();
    assert!(gateway.contains(&source), "the host outside saw {source}, and the gateway has {gateway:?}: {report}");
    let raw = lab.exec_ok(WEB, &["shop", "tcp", "api.example.test:9000", "--json"]).unwrap();
    let raw = scenario::json_lines(raw.as_bytes()).pop().unwrap();
    assert!(raw["ok"] == true && gateway.iter().any(|ip| raw["greeting"].as_str().unwrap().contains(ip)), "{raw}");

    asked_themselves(&lab);

    // Another name at the same host, and another Host on an allowed connection, are refused.
    let before = served(&lab);
    let other = scenario::call(&lab, WEB, "http://blocked.example.test:8080/").unwrap();
    assert!(other["ok"] != true, "a host that no rule names was reached: {other}");
    let header = scenario::calls(&lab, WEB, API, &["--header", "host: blocked.example.test"]).unwrap();
    assert!(header[0]["ok"] != true, "another Host was let out: {header:?}");
    assert_eq!(served(&lab), before, "the host outside saw a request that was refused");

    // Gone: closed. Back: open.
    kill(&lab, "out-0");
    kill(&lab, "out-1");
    for _ in 0..3 {
        let report = scenario::call(&lab, WEB, API).unwrap();
        assert!(report["ok"] != true, "something left without a gateway: {report}");
    }
    assert_eq!(served(&lab), before, "the host outside saw a request while there was no gateway");
    // The other one still counts as missing here.
    lab.try_delete("Pod", "egress/out-0", Duration::from_secs(60)).unwrap();
    lab.delete("Pod", "egress/out-1").unwrap();
    lab.apply_yaml(&internet::gateway("out-0", 1)).unwrap();
    scenario::reaches(&lab, WEB, API).unwrap();
}

/// A server with TLS at the host outside, and the PEM of who signed its certificate. `None`: a tool is missing.
fn secured(lab: &Lab, folder: &Path) -> Option<(Running, String)> {
    if !scenario::has_tools(&["nginx", "curl", "openssl"]) {
        return None;
    }
    let conf = internet::web_server(folder, &["secure.example.test", "tls.example.test"]).unwrap();
    let running = lab.spawn("net/api", &["nginx", "-c", &conf]).unwrap();
    Some((running, std::fs::read_to_string(folder.join("ca.pem")).unwrap()))
}

#[test]
fn tls_passes_through_by_its_name_and_is_added_where_a_rule_asks_for_it() {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some((_nginx, ca)) = secured(&lab, folder.path()) else { return };
    let ca = ca.trim().replace('\n', "\n        ");
    let via = "via: {gateway: {namespace: egress, name: out}}";
    lab.apply_yaml(&format!(
        "apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: tls, namespace: shop}}\nspec:\n  rules:\n\
         \x20 - hosts: [tls.example.test]\n    ports: [{{port: 443, protocol: TLS}}]\n    {via}\n\
         \x20 - hosts: [secure.example.test]\n    ports: [{{port: 443, protocol: HTTPS}}]\n    {via}\n\
         \x20   http: {{methods: [GET], paths: [/open/*]}}\n    tls: originate\n    originate:\n      caBundle: |\n        {ca}\n"
    ))
    .unwrap();
    let gateway = addresses(&lab);
    let curl = |more: &[&str]| {
        let argv = [&["curl", "-sk", "--max-time", "20", "-w", " %{http_code}"][..], more].concat();
        let output = lab.exec(WEB, &argv).unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let from_gateway = |said: &str| gateway.iter().any(|ip| said.contains(ip.as_str()));

    eventually("TLS passes through", scenario::PATIENCE, || {
        let said = curl(&["https://tls.example.test/"]);
        if said.ends_with("200") && from_gateway(&said) { Ok(()) } else { Err(said) }
    })
    .unwrap();
    // Another server name on a connection to the allowed host.
    let forged =
        curl(&["--connect-to", "secure.example.test:443:tls.example.test:443", "https://secure.example.test/"]);
    assert!(forged.ends_with("000"), "a forged server name was let out: {forged}");

    // The client speaks in plain text, the host is spoken to in TLS.
    let open = curl(&["http://secure.example.test:443/open/x"]);
    assert!(
        open.starts_with("inet secure.example.test") && open.contains("https TLSv1.3") && from_gateway(&open),
        "{open}"
    );
    for refused in [
        &["http://secure.example.test:443/closed"][..],
        &["http://secure.example.test:443/open/../closed", "--path-as-is"],
        &["http://secure.example.test:443/open/x", "-X", "POST"],
    ] {
        let said = curl(refused);
        assert!(!said.contains("https TLS") && !said.ends_with("200"), "{refused:?}: {said}");
    }
}

#[test]
fn one_replica_is_enough() {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return };
    scenario::reaches(&lab, WEB, API).unwrap();
    let load = lab.load(WEB, &[API], 20.0, &[]).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    kill(&lab, "out-0");
    let at = served(&lab);
    eventually("requests go on", Duration::from_secs(30), || {
        let now = served(&lab);
        if now >= at + 40 { Ok(()) } else { Err(format!("{at} before, {now} now")) }
    })
    .unwrap();
    let reports = load.finish().unwrap();
    let failed = scenario::failures(&reports);
    // What was on its way through the one that was killed.
    assert!(failed.len() <= 5, "{} of {} failed: {:?}", failed.len(), reports.len(), failed.first());
}

/// Zone and region of each node.
fn places() -> String {
    let node = |(number, zone, region): (u16, &str, &str)| {
        let labels = format!("topology.kubernetes.io/zone: {zone}, topology.kubernetes.io/region: {region}");
        scenario::node(number, &labels)
    };
    [(1, "a", "near"), (2, "b", "near"), (3, "c", "far")].map(node).concat()
}

#[test]
fn the_gateway_of_the_own_zone_is_used_then_of_the_region_then_any() {
    let near =
        world().replace("spec: {selector: {app: out}", "spec: {trafficDistribution: PreferClose, selector: {app: out}");
    let objects = near + &internet::gateway("out-2", 3) + &places();
    let Some(lab) = scenario::lab(LabConfig { nodes: 3, ..LabConfig::of(&objects) }) else { return };
    // Whom the host outside sees, and whom `explain` names.
    let seen = || -> Result<String, String> {
        let report = scenario::call(&lab, WEB, API).map_err(|error| error.to_string())?;
        report["answer"]["source"].as_str().map(str::to_owned).ok_or_else(|| report.to_string())
    };
    let told = || -> Vec<String> {
        let explained = lab.control_get(&format!("/debug/explain?from={WEB}&to=api.example.test:8080")).unwrap();
        let replicas = explained["endpoints"].as_array().cloned().unwrap_or_default();
        replicas.iter().map(|replica| replica["pod"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let only = |name: &str| {
        let own = lab.pod_ip("egress", name).unwrap();
        eventually(&format!("{name} is the nearest"), scenario::PATIENCE, || match (seen(), told()) {
            (Ok(source), names) if source == own && names == [format!("egress/{name}")] => Ok(()),
            other => Err(format!("{other:?}, and {name} is {own}")),
        })
        .unwrap();
        for _ in 0..10 {
            assert_eq!(seen(), Ok(own.clone()), "a gateway that is farther was used");
        }
    };
    only("out-0");
    kill(&lab, "out-0");
    only("out-1");
    kill(&lab, "out-1");
    only("out-2");
    lab.try_delete("Pod", "egress/out-0", scenario::PATIENCE).unwrap();
    lab.try_apply("the test", &internet::gateway("out-0", 1), scenario::PATIENCE).unwrap();
    only("out-0");
}

#[test]
fn a_peer_gets_no_more_than_its_own_policies_say() {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return };
    scenario::reaches(&lab, WEB, API).unwrap();
    let authority = lab.paths().ca().display().to_string();
    let gateway = format!("{}:15008", lab.pod_ip("egress", "out-0").unwrap());
    let ask = |identity: &str, target: &str| {
        let identity = format!("spiffe://cluster.local/ns/{identity}");
        let argv = [
            "lab",
            "dial",
            &gateway,
            "--ca-dir",
            &authority,
            "--identity",
            &identity,
            "--connect",
            target,
            "--send",
            "ping\n",
        ];
        let said = lab.exec_ok("plain/guest", &argv).unwrap();
        scenario::json_lines(said.as_bytes()).pop().unwrap()
    };
    let before = scenario::log_lines(&lab, "net/api", &["tcp-open"]).len();
    // With its own certificate, at its own address, and no policy; then with somebody else's certificate.
    let own = ask("plain/sa/guest", "api.example.test:9000");
    assert_eq!(own["status"], 403, "{own}");
    scenario::await_log(&lab, "egress/out-0", &["EGRESS_DENIED", "sa/guest", "api.example.test"]).unwrap();
    let stolen = ask("shop/sa/web", "api.example.test:9000");
    assert_eq!(stolen["status"], 403, "{stolen}");
    for target in ["10.96.0.1:443", "169.254.169.254:80", "[::1]:15000", "kubernetes.default.svc.cluster.local:443"] {
        let inside = ask("plain/sa/guest", target);
        assert_eq!(inside["status"], 403, "{target}: {inside}");
    }
    let opened = scenario::log_lines(&lab, "net/api", &["tcp-open"]).len();
    assert_eq!(opened, before, "the host outside saw a connection that was refused");
}
