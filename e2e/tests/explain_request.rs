//! Promise: `tulle explain` for a request says what becomes of it: the same route and status, and for a refusal the same
//! policy and rule, as the records of the very request that is made afterwards.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use e2e::issuer::Issuer;
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::{Value, json};

const ROUTE: &str = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: cart, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {statusCode: 302, path: {type: ReplaceFullPath, replaceFullPath: /new}}}]
  - matches: [{path: {type: PathPrefix, value: /nowhere}}]
    backendRefs: [{name: not-there, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /hidden}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /private}}}]
    backendRefs: [{name: cart, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /split}}]
    backendRefs: [{name: cart, port: 80, weight: 1}, {name: next, port: 80, weight: 1}]
  - matches: [{path: {type: PathPrefix, value: /open}}, {path: {type: PathPrefix, value: /private}}, {headers: [{name: x-any, value: 'yes'}]}]
    backendRefs: [{name: cart, port: 80}]
";

fn policies(issuer: &Issuer) -> String {
    let private = "[{from: [{source: {notRequestPrincipals: ['*']}}], to: [{operation: {paths: [/private*]}}]}, \
                   {to: [{operation: {methods: [DELETE]}}]}]";
    let split = "[{to: [{operation: {paths: [/split*]}}]}]";
    [
        issuer.authentication("shop", "users", "cart"),
        scenario::authorization("shop", "private", "cart", "DENY", private),
        scenario::authorization("shop", "no-split", "next", "DENY", split),
        scenario::authorization("shop", "no-other", "cart", "DENY", "[{from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}], to: [{operation: {notPaths: [/open/*]}}]}]"),
    ]
    .concat()
}

/// One request, as both the client and `explain` are told.
struct Case<'a> {
    from: &'a str,
    path: &'a str,
    header: Option<&'a str>,
    /// Status that a client gets; of several, one.
    expected: &'a [u16],
}

/// What `explain` says: statuses that a client may get, the route, and policy and rule of a refusal at the destination.
struct Said {
    statuses: Vec<u16>,
    route: String,
    refusals: Vec<(String, Value)>,
}

fn explain(lab: &Lab, case: &Case<'_>, path: &str) -> anyhow::Result<Said> {
    let mut argv =
        vec!["tulle", "explain", case.from, "shop/cart:80", "-o", "json", "--path", path, "--host", "cart.shop"];
    if let Some(header) = case.header {
        argv.extend(["--header", header]);
    }
    let output = lab.exec("control", &argv)?;
    let value: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{argv:?}: {output:?}"))?;
    let status = |value: &Value| u16::try_from(value.as_u64().unwrap_or(200)).unwrap_or_default();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut said = Said {
        statuses: list(&value["request"]["answers"]).iter().map(|answer| status(&answer["status"])).collect(),
        route: value["request"]["route"].as_str().unwrap_or_default().to_owned(),
        refusals: Vec::new(),
    };
    for endpoint in list(&value["endpoints"]) {
        let inbound = &endpoint["inbound"];
        ensure!(inbound.is_object(), "no verdict of an endpoint: {value:#}");
        said.statuses.push(status(&inbound["status"]));
        if inbound["allowed"] == false {
            said.refusals.push((inbound["policy"].as_str().unwrap_or_default().to_owned(), inbound["rule"].clone()));
        }
    }
    Ok(said)
}

#[test]
fn what_is_said_of_a_request_is_what_becomes_of_it() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::server("shop", "next", "next", 2));
    objects.push_str(&scenario::service("shop", "next"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let (issuer, stranger) = (Issuer::new("one")?, Issuer::new("one")?);
    lab.apply_yaml(&format!("{ROUTE}{}", policies(&issuer)))?;
    let good = format!("authorization: Bearer {}", issuer.token("ann", json!({}))?);
    let forged = format!("authorization: Bearer {}", stranger.token("ann", json!({}))?);
    let (web, other) = ("shop/web", "shop/other");
    let case = |from, path, header, expected| Case { from, path, header, expected };
    let cases = [
        case(web, "/open", None, &[200][..]),
        case(web, "/open/%2e%2e/private", None, &[403]),
        case(web, "/private", None, &[403]),
        case(web, "/private", Some(&*good), &[200]),
        case(web, "/private", Some(&*forged), &[401]),
        case(web, "/open", Some(&*forged), &[401]),
        case(web, "/hidden/a", None, &[403]),
        case(web, "/hidden/a", Some(&*good), &[200]),
        case(web, "/old", None, &[302]),
        case(web, "/nowhere", None, &[500]),
        case(web, "/elsewhere", None, &[404]),
        case(web, "/elsewhere", Some("x-any: yes"), &[200]),
        case(web, "/split", None, &[200, 403]),
        case(other, "/open/a", None, &[200]),
        case(other, "/open", None, &[403]),
    ];
    for (number, case) in cases.iter().enumerate() {
        // The record is found by it.
        let path = format!("{}?case={number}", case.path);
        let what = format!("{} {path} {:?}", case.from, case.header);
        let said = explain(&lab, case, &path)?;
        assert_eq!(said.statuses, case.expected, "{what}");
        let more = case.header.map(|header| vec!["--header", header]).unwrap_or_default();
        let reports = scenario::calls(&lab, case.from, &format!("http://cart.shop{path}"), &more)?;
        let status = u16::try_from(reports[0]["status"].as_u64().unwrap_or_default())?;
        assert!(said.statuses.contains(&status), "{what}: explained {:?}, got {status}", said.statuses);
        let mark = format!("case={number}\"");
        let words = ["request complete", "direction=\"outbound\"", &mark];
        let line = scenario::await_log(&lab, "node-1", &words)?;
        assert_eq!(scenario::field(&line, "route"), said.route, "{what}: {line}");
        if matches!(status, 401 | 403) {
            let words = ["request complete", "direction=\"inbound\"", &mark];
            let line = scenario::await_log(&lab, "node-2", &words)?;
            let rule = scenario::field(&line, "rule").parse::<u64>().map_or(Value::Null, Value::from);
            let found = (scenario::field(&line, "policy"), rule);
            assert!(said.refusals.contains(&found), "{what}: explained {:?}, recorded {found:?}", said.refusals);
        }
    }
    // What was counted meanwhile.
    let services = lab.exec_ok("control", &["tulle", "get", "services", "-o", "json"])?;
    let services: Value = serde_json::from_str(&services)?;
    let cart = services.as_array().into_iter().flatten().find(|item| item["resource"]["service"]["name"] == "cart");
    let seen = cart.context("no cart")?["traffic"]["source"].clone();
    assert_eq!(seen["requests"], cases.len(), "{seen}");
    assert_eq!(seen["failed"], 1, "{seen}");
    Ok(())
}

/// Two Services whose requests are hashed, over the pods of a third.
const HASHED: &str = "
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: by-user, namespace: shop}
spec: {host: by-user, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x-user}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: by-cookie, namespace: shop}
spec: {host: by-cookie, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: who, ttl: 0s}, maglev: {}}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bound, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: bound, port: 80}]
  rules: [{sessionPersistence: {sessionName: sid}, backendRefs: [{name: bound, port: 80}, {name: cart, port: 80}]}]
";

/// Names of the pods that `explain` says may get the request, with their percentages.
fn choices(lab: &Lab, service: &str, header: Option<&str>) -> anyhow::Result<Vec<(String, f64)>> {
    let to = format!("shop/{service}:80");
    let mut argv = vec!["tulle", "explain", "shop/web", &to, "-o", "json", "--path", "/"];
    argv.extend(header.iter().flat_map(|header| ["--header", header]));
    let output = lab.exec("control", &argv)?;
    let value: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{argv:?}: {output:?}"))?;
    // A pod has an entry for each address of the Service.
    let mut found = BTreeMap::new();
    for endpoint in value["endpoints"].as_array().into_iter().flatten() {
        let name = endpoint["pod"].as_str().unwrap_or_default().trim_start_matches("shop/");
        *found.entry(name.to_owned()).or_default() += endpoint["sharePercent"].as_f64().unwrap_or_default();
    }
    Ok(found.into_iter().collect())
}

#[test]
fn a_request_that_is_bound_to_an_endpoint_is_explained_with_that_one() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 2), ("c", 2), ("d", 2)] {
        objects.push_str(&scenario::server("shop", name, "many", node));
    }
    for name in ["bound", "by-user", "by-cookie"] {
        objects.push_str(&scenario::service("shop", "many").replace("{name: many,", &format!("{{name: {name},")));
    }
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    lab.apply_yaml(HASHED)?;
    let all = |count, share: f64| {
        move |found: &[(String, f64)]| found.len() == count && found.iter().all(|(_, own)| (own - share).abs() < 0.1)
    };
    for service in ["by-user", "by-cookie"] {
        let found = choices(&lab, service, None)?;
        assert!(all(4, 25.0)(&found), "{service}: a request that carries nothing may go to each: {found:?}");
    }
    // What a client shows names backend and endpoint; times are in hexadecimal.
    let session = |pod| format!("cookie: sid=1~1~1~bound.shop.svc.cluster.local:80~Kubernetes//Pod/shop/{pod}");
    let users = (0..6).map(|user| ("by-user", format!("x-user: user-{user}")));
    let cookies = (0..6).map(|user| ("by-cookie", format!("cookie: a=b; who=user-{user}")));
    let sessions = ["a", "b", "c", "d"].map(|pod| ("bound", session(pod)));
    for (number, (service, header)) in users.chain(cookies).chain(sessions).enumerate() {
        let found = choices(&lab, service, Some(&header))?;
        assert!(all(1, 100.0)(&found), "{service}, {header}: {found:?}");
        let url = format!("http://{service}.shop/?bound={number}");
        let reports = scenario::calls(&lab, "shop/web", &url, &["--header", &header])?;
        scenario::all_well(&reports, 1)?;
        let words = ["request complete", "direction=\"outbound\"", &format!("bound={number}\"")];
        let line = scenario::await_log(&lab, "node-1", &words)?;
        assert_eq!(scenario::field(&line, "dst.workload"), found[0].0, "{service}, {header}: {line}");
    }
    // One of an endpoint that is not there goes to any of its backend, and one of another Service to all.
    let found = choices(&lab, "bound", Some(&session("gone")))?;
    assert!(all(4, 25.0)(&found), "its backend keeps it: {found:?}");
    assert_eq!(choices(&lab, "bound", None)?.len(), 5, "no session");
    Ok(())
}

#[test]
fn too_few_that_are_left_are_explained_as_they_are_used() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 2), ("c", 2), ("d", 2)] {
        objects.push_str(&scenario::server("shop", name, "many", node));
    }
    objects.push_str(&scenario::service("shop", "many"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let rule = |least| {
        lab.apply_yaml(&format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: many, namespace: shop}}\n\
             spec: {{host: many, trafficPolicy: {{loadBalancer: {{consistentHash: {{httpHeaderName: x-user}}}}, outlierDetection: \
             {{consecutive5xxErrors: 1, baseEjectionTime: 300s, maxEjectionPercent: 100, minHealthPercent: {least}}}}}}}\n"
        ))
    };
    rule(50)?;
    let header = "x-user: ann";
    let first = choices(&lab, "many", Some(header))?;
    let url = format!("http://{}:8080/become?status=503", lab.pod_ip("shop", &first[0].0)?);
    scenario::all_well(&scenario::calls(&lab, "shop/web", &url, &[])?, 1)?;
    scenario::calls(&lab, "shop/web", "http://many.shop/", &["--header", header])?;
    scenario::await_log(&lab, "node-1", &["endpoint ejected"])?;
    // Three of four are left: enough of 50 %, too few of 80 %.
    for (least, is_first) in [(50, false), (80, true)] {
        rule(least)?;
        let found = choices(&lab, "many", Some(header))?;
        assert_eq!(found == first, is_first, "at least {least} %: {found:?}");
        let url = format!("http://many.shop/?least={least}");
        scenario::calls(&lab, "shop/web", &url, &["--header", header])?;
        let words = ["request complete", "direction=\"outbound\"", &format!("least={least}\"")];
        let line = scenario::await_log(&lab, "node-1", &words)?;
        assert_eq!(scenario::field(&line, "dst.workload"), found[0].0, "at least {least} %: {line}");
        let told = lab.control_get("/debug/explain?from=shop/web&to=shop/many:80")?.to_string();
        assert_eq!(told.contains("used all the same"), is_first, "at least {least} %: {told}");
    }
    Ok(())
}
