//! Promise: `tulle explain` for a request says what becomes of it: the same route and status, and for a refusal the same
//! policy and rule, as the records of the very request that is made afterwards.

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
