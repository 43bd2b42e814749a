//! Promise: a DestinationRule's breakers open and close as its outlierDetection says, its limits hold for each source pod
//! across all workers, and its balancing is what it names; the servers' own logs count.

use std::collections::BTreeMap;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::Value;

/// Generous: a slow and busy machine must not fail a promise.
const PATIENCE: Duration = Duration::from_secs(60);

const URL: &str = "http://cart.shop/work";

/// A DestinationRule for cart; `policy` is YAML in flow style.
fn rule(policy: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: cart, namespace: shop}}\n\
         spec: {{host: cart, trafficPolicy: {policy}}}\n"
    )
}

/// Two carts, one on each node, and their clients on node 1.
fn carts() -> String {
    scenario::world(true) + &scenario::server("shop", "cart-b", "cart", 1)
}

/// Changes how a cart behaves, past its Service; `how` is a query.
fn become_(lab: &Lab, pod: &str, how: &str) -> anyhow::Result<()> {
    let url = format!("http://{}:8080/become?{how}", lab.pod_ip("shop", pod)?);
    scenario::all_well(&scenario::calls(lab, "shop/other", &url, &[])?, 1)
}

/// Requests for work that a cart has answered, by its own log.
fn served(lab: &Lab, pod: &str) -> usize {
    scenario::log_lines(lab, &format!("shop/{pod}"), &["\"kind\":\"http\"", "\"path\":\"/work"]).len()
}

/// Makes `count` requests on one connection; the reports, and how many of them each cart has answered.
fn made(lab: &Lab, count: usize, more: &[&str]) -> anyhow::Result<(Vec<Value>, [usize; 2])> {
    let both = || ["cart", "cart-b"].map(|pod| served(lab, pod));
    let (before, many) = (both(), count.to_string());
    let options = [&["--keep-alive", "--count", &many][..], more].concat();
    let reports = scenario::calls(lab, "shop/web", URL, &options)?;
    let after = both();
    Ok((reports, [after[0] - before[0], after[1] - before[1]]))
}

fn with_status(reports: &[Value], status: u16) -> usize {
    reports.iter().filter(|report| report["status"] == status).count()
}

fn ejections(lab: &Lab, words: &[&str]) -> usize {
    scenario::log_lines(lab, "node-1", &[&["endpoint ejected"], words].concat()).len()
}

#[test]
fn an_endpoint_that_fails_is_left_alone_and_tried_again_by_one_request() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&carts())) else { return Ok(()) };
    let outlier = "{consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 1s, maxEjectionPercent: 50}";
    lab.apply_yaml(&rule(&format!("{{loadBalancer: {{simple: ROUND_ROBIN}}, outlierDetection: {outlier}}}")))?;
    assert_eq!(made(&lab, 20, &[])?.1, [10, 10], "in turn");

    become_(&lab, "cart-b", "status=503")?;
    let (reports, counts) = made(&lab, 60, &[])?;
    // Three in a row, and one for each time that it was tried again.
    let (failed, probes) = (with_status(&reports, 503), ejections(&lab, &["why=\"probe\""]));
    assert_eq!(failed, counts[1], "every failure is one of the server's own");
    assert_eq!(failed, 3 + probes, "{counts:?}");
    assert!(failed < 20 && with_status(&reports, 200) == 60 - failed, "{failed} of 60 failed");
    assert_eq!(ejections(&lab, &["why=\"consecutive_5xx\"", "DestinationRule/shop/cart"]), 1);

    let explained = lab.control_get("/debug/explain?from=shop/web&to=shop/cart:80")?.to_string();
    assert!(explained.contains("by DestinationRule/shop/cart") && explained.contains("ejected ("), "{explained}");
    let known = lab.node_admin("node-1", "/debug/destinations")?.to_string();
    assert!(known.contains("\"policy\":\"DestinationRule/shop/cart\""), "{known}");
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    let counted = "tulle_outlier_detection_ejections_enforced_total{destination_service=\"cart.shop.svc.cluster.local\",kind=\"consecutive_5xx\"} 1";
    assert!(metrics.contains(counted), "{metrics}");

    become_(&lab, "cart-b", "")?;
    eventually("the endpoint is used again", PATIENCE, || {
        made(&lab, 2, &[]).map_err(|error| error.to_string())?;
        let back = scenario::log_lines(&lab, "node-1", &["endpoint is used again"]);
        if back.is_empty() { Err("it is not".to_owned()) } else { Ok(()) }
    })?;
    let (reports, counts) = made(&lab, 20, &[])?;
    scenario::all_well(&reports, 20)?;
    assert_eq!(counts, [10, 10], "closed");
    Ok(())
}

#[test]
fn one_that_is_slow_then_dead_is_left_and_without_any_other_the_client_is_told() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&carts())) else { return Ok(()) };
    let outlier = "{consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 120s, maxEjectionPercent: 100}";
    let late = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: cart, namespace: shop}\nspec:\n\
         \x20 parentRefs: [{kind: Service, group: '', name: cart, port: 80}]\n\
         \x20 rules: [{timeouts: {backendRequest: 1s}, backendRefs: [{name: cart, port: 80}]}]\n";
    lab.apply_yaml(&(rule(&format!("{{loadBalancer: {{simple: ROUND_ROBIN}}, outlierDetection: {outlier}}}")) + late))?;
    become_(&lab, "cart-b", "ms=30000")?;
    let (reports, counts) = made(&lab, 20, &["--timeout-ms", "20000"])?;
    assert_eq!((with_status(&reports, 504), counts[0]), (2, 18), "two were too late, then it was left");
    assert_eq!(ejections(&lab, &["why=\"consecutive_5xx\""]), 1);
    scenario::await_log(&lab, "node-1", &["request complete", "flags=\"UT\"", "status=504"])?;

    // A process that is stopped takes connections, by its kernel, and answers nothing.
    lab.kill("shop/cart", "STOP")?;
    let (reports, _) = made(&lab, 6, &["--timeout-ms", "20000"])?;
    assert_eq!((with_status(&reports, 504), with_status(&reports, 503)), (2, 4), "{reports:?}");
    assert_eq!(reports[5]["answer"], "no healthy upstream");
    scenario::await_log(&lab, "node-1", &["request complete", "flags=\"UH\"", "EJECTED", "status=503"])?;
    lab.kill("shop/cart", "CONT")?;
    Ok(())
}

/// The most requests for work that a cart had at one time, by its own log.
fn most_at_once(lab: &Lab, pod: &str) -> usize {
    let lines = scenario::json_lines(lab.log(&format!("shop/{pod}")).as_bytes());
    let mut moments = Vec::new();
    for line in lines.iter().filter(|line| line["path"].as_str().is_some_and(|path| path.starts_with("/delay"))) {
        let end = line["t_us"].as_f64().unwrap_or_default();
        moments.push((end - line["ms"].as_f64().unwrap_or_default() * 1000.0, 1));
        moments.push((end, -1));
    }
    moments.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut live = 0i64;
    let all = moments.iter().map(|(_, step)| {
        live += step;
        live
    });
    usize::try_from(all.max().unwrap_or_default()).unwrap_or_default()
}

/// Starts `count` requests at once, each by a process of its own; their reports.
fn together(lab: &Lab, from: &str, count: usize, path: &str) -> anyhow::Result<Vec<Value>> {
    let script =
        format!("for i in $(seq {count}); do shop call http://cart.shop{path} --json --timeout-ms 50000 & done; wait");
    let output = lab.exec(from, &["sh", "-c", &script])?;
    Ok(scenario::json_lines(&output.stdout))
}

#[test]
fn limits_hold_for_each_pod_and_what_goes_beyond_is_told() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    lab.apply_yaml(&rule(
        "{connectionPool: {tcp: {maxConnections: 2}, http: {http1MaxPendingRequests: 3}}, loadBalancer: {simple: RANDOM}}",
    ))?;
    let reports = together(&lab, "shop/web", 12, "/delay?ms=3000")?;
    assert_eq!(reports.len(), 12);
    let (well, refused) = (with_status(&reports, 200), with_status(&reports, 503));
    assert_eq!(well + refused, 12, "{reports:?}");
    assert!(refused > 0 && well > 0, "{well} went well");
    assert!(most_at_once(&lab, "cart") <= 2, "{} at once", most_at_once(&lab, "cart"));
    assert!(
        reports
            .iter()
            .any(|report| report["answer"].as_str().is_some_and(|text| text.ends_with("reset reason: overflow")))
    );
    scenario::await_log(&lab, "node-1", &["flags=\"UO\"", "http1MaxPendingRequests", "DestinationRule/shop/cart"])?;
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    assert!(metrics.contains("kind=\"rq_pending\"") && metrics.contains("tulle_upstream_overflow_total"), "{metrics}");

    // Whoever waits gets a connection that another request gives back, and none is opened beside.
    lab.apply_yaml(&rule("{connectionPool: {tcp: {maxConnections: 1}}}"))?;
    scenario::all_well(&together(&lab, "shop/web", 8, "/delay?ms=20")?, 8)?;
    assert!(most_at_once(&lab, "cart") <= 2);

    lab.apply_yaml(&rule("{connectionPool: {http: {maxRequestsPerConnection: 2}}}"))?;
    scenario::all_well(&scenario::calls(&lab, "shop/web", URL, &["--keep-alive", "--count", "10"])?, 10)?;
    let lines = scenario::json_lines(lab.log("shop/cart").as_bytes());
    let mut uses: BTreeMap<String, usize> = BTreeMap::new();
    for line in lines.iter().filter(|line| line["path"] == "/work") {
        *uses.entry(line["source"].to_string()).or_default() += 1;
    }
    assert!(uses.values().all(|uses| *uses <= 2) && uses.values().sum::<usize>() == 10, "{uses:?}");

    // Bytes: the third connection is one too many until one has ended; another pod has its own.
    lab.apply_yaml(&rule("{connectionPool: {tcp: {maxConnections: 2}}}"))?;
    let first = scenario::hold(&lab, "shop/web")?;
    let second = scenario::hold(&lab, "shop/web")?;
    let open = |from: &str| anyhow::Ok(lab.exec(from, &["shop", "tcp", "cart.shop:9000"])?.status.success());
    assert!(!open("shop/web")?, "a third one");
    scenario::await_log(&lab, "node-1", &["OVERFLOW", "tcp.maxConnections", "cart.shop.svc.cluster.local"])?;
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    let failed =
        |line: &&str| line.starts_with("istio_tcp_connections_failed") && line.contains("response_flags=\"UO\"");
    assert!(metrics.lines().find(failed).is_some_and(|line| line.contains("cart.shop.svc")), "{metrics}");
    assert!(open("shop/other")?, "another pod's first");
    first.finish()?;
    eventually("there is room again", PATIENCE, || match open("shop/web") {
        Ok(true) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    second.finish()?;

    // A silent connection is ended.
    lab.apply_yaml(&rule("{connectionPool: {tcp: {idleTimeout: 1s}}}"))?;
    let hold = ["shop", "tcp", "cart.shop:9000", "--hold-ms", "600000"];
    let silent = lab.spawn("shop/web", &hold)?;
    scenario::await_log(&lab, "node-1", &["EXPIRED", "tcp.idleTimeout"])?;
    drop(silent);
    Ok(())
}

#[test]
fn connections_that_fail_eject_and_requests_with_one_key_have_one_endpoint() -> anyhow::Result<()> {
    let nobody = "---\napiVersion: v1\nkind: Service\nmetadata: {name: nobody, namespace: shop}\n\
         spec: {selector: {app: cart}, ports: [{name: tcp-raw, port: 9001}]}\n\
         ---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: nobody, namespace: shop}\n\
         spec: {host: nobody, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 2, baseEjectionTime: 120s, maxEjectionPercent: 100}}}\n";
    let Some(lab) = scenario::lab(LabConfig::of(&(carts() + nobody))) else { return Ok(()) };
    for layout in ["ringHash: {minimumRingSize: 1024}", "maglev: {tableSize: 1009}"] {
        lab.apply_yaml(&rule(&format!("{{loadBalancer: {{consistentHash: {{httpHeaderName: x-user, {layout}}}}}}}")))?;
        let mut met = [0, 0];
        for user in 0..12 {
            let counts = made(&lab, 5, &["--header", &format!("x-user: user-{user}")])?.1;
            assert!(counts == [5, 0] || counts == [0, 5], "{layout}, user-{user}: {counts:?}");
            met[usize::from(counts[1] > 0)] += 1;
        }
        assert!(met[0] > 0 && met[1] > 0, "{layout}: all users have the same endpoint: {met:?}");
    }

    // Nobody listens: every attempt is refused, by one endpoint after the other.
    eventually("every endpoint is ejected", PATIENCE, || {
        lab.exec("shop/web", &["shop", "tcp", "nobody.shop:9001"]).map_err(|error| error.to_string())?;
        let lines = scenario::log_lines(&lab, "node-1", &["EJECTED", "outlierDetection"]);
        if lines.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    })?;
    assert_eq!(ejections(&lab, &["DestinationRule/shop/nobody"]), 2);
    Ok(())
}

/// Routes the Service to itself with one retry after 503.
const RETRIED: &str = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: cart, namespace: shop}\nspec:\n\
     \x20 parentRefs: [{kind: Service, group: '', name: cart, port: 80}]\n\
     \x20 rules: [{retry: {codes: [503], attempts: 1, backoff: 1ms}, backendRefs: [{name: cart, port: 80}]}]\n";

#[test]
fn retries_keep_to_their_budget_new_endpoints_begin_slowly_and_sessions_stay() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&carts())) else { return Ok(()) };
    lab.apply_yaml(RETRIED)?;
    for pod in ["cart", "cart-b"] {
        become_(&lab, pod, "status=503")?;
    }
    let all = |counts: [usize; 2]| counts[0] + counts[1];
    let (reports, counts) = made(&lab, 10, &[])?;
    assert_eq!((with_status(&reports, 503), all(counts)), (10, 20), "each is tried again");
    for pod in ["cart", "cart-b"] {
        become_(&lab, pod, "status=503&ms=2000")?;
    }
    let before = served(&lab, "cart") + served(&lab, "cart-b");
    let reports = together(&lab, "shop/web", 16, "/work")?;
    let retried = served(&lab, "cart") + served(&lab, "cart-b") - before - 16;
    // Without a policy three at once, for two seconds each; a slow machine has time for three more, and again.
    assert_eq!(with_status(&reports, 503), 16, "{reports:?}");
    assert!((1..=9).contains(&retried), "{retried} of 16 were tried again");
    for pod in ["cart", "cart-b"] {
        become_(&lab, pod, "status=503")?;
    }
    // Ten minutes are longer than this test: what was spent stays spent.
    lab.apply_yaml(&rule("{retryBudget: {percent: 0, minRetryConcurrency: 2, budgetInterval: 600s}}"))?;
    let (reports, counts) = made(&lab, 10, &[])?;
    assert_eq!((with_status(&reports, 503), all(counts)), (10, 12), "two are, and the others' answers stand");
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    let counted = format!(
        "tulle_upstream_overflow_total{{destination_service=\"cart.shop.svc.cluster.local\",kind=\"rq_retry\"}} {}\n",
        16 - retried + 8
    );
    assert!(metrics.contains(&counted), "{metrics}");

    for pod in ["cart", "cart-b"] {
        become_(&lab, pod, "")?;
    }
    lab.apply_yaml(&rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 3600s, minimumPercent: 1}}}"))?;
    assert_eq!(made(&lab, 20, &[])?.1, [10, 10], "those that were there are as old as the Service");
    lab.apply_yaml(&scenario::server("shop", "cart-c", "cart", 2))?;
    let (reports, counts) = made(&lab, 100, &[])?;
    scenario::all_well(&reports, 100)?;
    assert!(all(counts) >= 80, "the new one got {} of 100 in its first minutes of an hour", 100 - all(counts));
    lab.apply_yaml(&rule("{loadBalancer: {simple: ROUND_ROBIN}}"))?;
    let (reports, counts) = made(&lab, 99, &[])?;
    scenario::all_well(&reports, 99)?;
    assert_eq!(counts, [33, 33], "without it each has a third");

    // Turns would go round; who shows what it was given stays.
    lab.apply_yaml(
        &RETRIED.replace("rules: [{", "rules: [{sessionPersistence: {sessionName: sid, absoluteTimeout: 1h}, "),
    )?;
    let cookies = || -> anyhow::Result<Vec<String>> {
        let asked = "exec 3<>/dev/tcp/cart.shop/80 && printf 'GET /work HTTP/1.1\\r\\nHost: cart.shop\\r\\nConnection: close\\r\\n\\r\\n' >&3 && cat <&3";
        let output = lab.exec("shop/web", &["bash", "-c", asked])?;
        let answer = String::from_utf8_lossy(&output.stdout);
        Ok(answer.lines().filter_map(|line| line.strip_prefix("set-cookie: ").map(str::to_owned)).collect())
    };
    let given = cookies()?;
    let [cookie] = &given[..] else { anyhow::bail!("cookies: {given:?}") };
    anyhow::ensure!(cookie.ends_with("; Path=/; HttpOnly") && !cookie.contains("Max-Age"), "{cookie}");
    let shown = format!("cookie: a=b; {}", cookie.split(';').next().unwrap_or_default());
    let (reports, counts) = made(&lab, 12, &["--header", &shown])?;
    scenario::all_well(&reports, 12)?;
    assert!(matches!(counts, [12, 0] | [0, 12] | [0, 0]), "{shown}: {counts:?}");
    // cart-c is the third; who is with it has gone to neither of the others.
    let (reports, spread) = made(&lab, 12, &[])?;
    scenario::all_well(&reports, 12)?;
    assert_eq!(spread, [4, 4], "without a cookie");
    Ok(())
}

/// Waits until one of the client's connections to a port is to be probed in such a time, in seconds. While bytes are on their
/// way the kernel has another timer.
fn await_probes(lab: &Lab, port: u16, what: &str, is_it: impl Fn(f64) -> bool) -> anyhow::Result<()> {
    eventually(what, PATIENCE, || {
        let output = lab.exec_ok("shop/web", &["ss", "-tnoH", "dport", "=", &format!(":{port}")]);
        let output = output.map_err(|error| error.to_string())?;
        // `timer:(keepalive,19sec,0)`, in other units where it is longer: `timer:(keepalive,2min59sec,0)`.
        let mut timers = output.lines().filter_map(|line| line.split_once("timer:(keepalive,")?.1.split(',').next());
        let found = timers.any(|time| is_it(time.trim_end_matches("sec").parse().unwrap_or(f64::INFINITY)));
        if found { Ok(()) } else { Err(output) }
    })
}

#[test]
fn connections_to_endpoints_are_probed_as_often_as_the_rule_says() -> anyhow::Result<()> {
    if !scenario::has_tools(&["ss"]) {
        return Ok(());
    }
    let outside = scenario::server("plain", "far", "far", 2)
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: far, namespace: plain}\n\
           spec: {selector: {app: far}, ports: [{name: raw, port: 9000}]}\n";
    let Some(lab) = scenario::lab(LabConfig::of(&(carts() + &outside))) else { return Ok(()) };
    // Each port has a Service of its own: pods of the mesh by their tunnel, others by themselves.
    let cases = [("cart", "cart.shop:9000", 15008), ("far.plain", "far.plain:9000", 9000)];
    for (host, target, port) in cases {
        let before = scenario::hold_to(&lab, "shop/web", target)?;
        await_probes(&lab, port, &format!("{host}: the node's own"), |time| time > 20.0)?;
        let name = host.replace('.', "-");
        lab.apply_yaml(&format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{host: {host}, trafficPolicy: {{connectionPool: {{tcp: {{tcpKeepalive: {{time: 20s, interval: 5s}}}}}}}}}}\n"
        ))?;
        let held = scenario::hold_to(&lab, "shop/web", target)?;
        await_probes(&lab, port, &format!("{host}: as the rule says"), |time| time <= 20.0)?;
        drop((before, held));
    }
    Ok(())
}
