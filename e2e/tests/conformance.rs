//! Promise: the rules of every mesh feature of Gateway API's conformance profiles (MESH-HTTP, MESH-GRPC, their extended
//! features, and the filters that a mesh may have besides) hold: the answer on the wire, the conditions of the routes, and
//! `tulle explain`, which says the same route and status as the record of the request.
//!
//! The suite itself needs a cluster; here are its rules, over routes of our own (`testdata/conformance.yaml`). Features
//! share one lab, each with a Service of its own, so that all of it takes seconds. Limits: gRPC is asked for by its
//! path and content type over HTTP/1.1, since what is routed is only that; clients of grpcio are in `programs.rs`.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::Value;

const ROUTES: &str = include_str!("testdata/conformance.yaml");

/// Services with the pods of `v1` behind them, each the parent of a route.
const FRONTENDS: &[&str] = &[
    "plain",
    "simple",
    "matching",
    "queries",
    "weights",
    "headers",
    "redirects",
    "rewrites",
    "named",
    "frontend",
    "ports",
    "names",
    "consumed",
    "grpc",
    "mirrors",
    "timeouts",
    "retries",
    "pages",
    "failures",
];

/// What is looked at of an answer.
#[derive(Clone, Copy, Debug)]
enum Look {
    /// Who answered.
    By(&'static str),
    /// Path and query as the server saw them.
    Path(&'static str),
    /// A header as the server saw it; empty: it did not.
    Seen(&'static str, &'static str),
    /// A header of the answer; empty: it is not there.
    Said(&'static str, &'static str),
    /// A field of the record of the client's proxy.
    Recorded(&'static str, &'static str),
    /// A pod that got a copy.
    Copied(&'static str),
}

/// One request and what must come of it.
struct Row {
    feature: &'static str,
    from: &'static str,
    /// Host, and perhaps a port: what is dialled.
    to: &'static str,
    path: &'static str,
    /// Lines of headers, after the method; `host` in the place of what is dialled.
    method: &'static str,
    headers: &'static [&'static str],
    status: u16,
    looks: &'static [Look],
}

const fn row(feature: &'static str, to: &'static str, path: &'static str, status: u16, looks: &'static [Look]) -> Row {
    Row { feature, from: "shop/web", to, path, method: "GET", headers: &[], status, looks }
}

impl Row {
    const fn with(self, headers: &'static [&'static str]) -> Self {
        Self { headers, ..self }
    }

    const fn by(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    const fn from(self, from: &'static str) -> Self {
        Self { from, ..self }
    }

    fn what(&self) -> String {
        format!("{}: {} {} {}{} {:?}", self.feature, self.from, self.method, self.to, self.path, self.headers)
    }
}

const V1: Look = Look::By("v1");
const V2: Look = Look::By("v2");
const GRPC: &str = "content-type: application/grpc";

fn core() -> Vec<Row> {
    use Look::Seen;
    let (matching, queries) = ("MeshHTTPRouteMatching", "MeshHTTPRouteQueryParamMatching");
    let changed = &[V1, Seen("x-set", "new"), Seen("x-add", "old,more"), Seen("x-gone", "")];
    let by_backend = &[V1, Seen("x-set", "backend"), Seen("x-add", "old,backend"), Seen("x-gone", "")];
    let told = &["x-set: old", "x-add: old", "x-gone: old"];
    vec![
        row("MeshBasic", "plain.shop", "/", 200, &[V1]),
        row("MeshHTTPRouteSimpleSameNamespace", "simple.shop", "/", 200, &[V1]),
        row(matching, "matching.shop", "/", 200, &[V1]),
        row(matching, "matching.shop", "/example", 200, &[V1]),
        row(matching, "matching.shop", "/", 200, &[V1]).with(&["version: one"]),
        row(matching, "matching.shop", "/", 200, &[V2]).with(&["version: two"]),
        row(matching, "matching.shop", "/two", 200, &[V2]),
        row(matching, "matching.shop", "/two/", 200, &[V2]),
        row(matching, "matching.shop", "/two/example", 200, &[V2]),
        row(matching, "matching.shop", "/twofold", 200, &[V1]),
        row(matching, "matching.shop", "/foo/two/example", 200, &[V1]),
        row(matching, "matching.shop", "/exact", 200, &[V1]),
        row(matching, "matching.shop", "/exact", 200, &[V2]).by("PUT"),
        row(queries, "queries.shop", "/?animal=whale", 200, &[V1]),
        row(queries, "queries.shop", "/?animal=dolphin", 200, &[V2]),
        row(queries, "queries.shop", "/path?color=blue&animal=dog", 200, &[V2]),
        row(queries, "queries.shop", "/path?color=red&animal=dog", 404, &[]),
        row(queries, "queries.shop", "/?animal=whale&animal=dolphin", 200, &[V1]),
        row("MeshHTTPRouteRequestHeaderModifier", "headers.shop", "/request", 200, changed).with(told),
        row("MeshHTTPRouteBackendRequestHeaderModifier", "headers.shop", "/backend", 200, by_backend).with(told),
    ]
}

fn frontends() -> Vec<Row> {
    use Look::{Recorded, Said};
    vec![
        row(
            "HTTPRouteResponseHeaderModification",
            "headers.shop",
            "/response",
            200,
            &[V1, Said("content-length-was", "set"), Said("x-added", "yes"), Said("x-gone", "")],
        ),
        row("MeshFrontend", "frontend.shop", "/", 200, &[V1, Said("x-route", "frontend")]),
        row("MeshFrontendHostname", "frontend.shop", "/", 200, &[V1, Said("x-route", "frontend")])
            .with(&["host: plain.shop"]),
        row("MeshFrontendHostname", "plain.shop", "/", 200, &[V1, Said("x-route", "")]).with(&["host: frontend.shop"]),
        row("MeshConsumerRoute", "consumed.shop", "/consumer", 200, &[V1, Said("x-route", "producer")]),
        row("MeshConsumerRoute", "consumed.shop", "/consumer", 200, &[V2, Said("x-route", "consumer")])
            .from("other/web"),
        row("MeshConsumerRoute", "consumed.shop", "/", 404, &[Said("x-route", "")]).from("other/web"),
        row("MeshPorts", "ports.shop", "/", 200, &[V1, Said("x-route", "by-port")]),
        row("MeshPorts", "ports.shop:8080", "/", 200, &[V1, Said("x-route", "")]),
        row("MeshPorts", "names.shop", "/", 200, &[V1, Said("x-route", "")]),
        row("MeshPorts", "names.shop:8080", "/", 200, &[V1, Said("x-route", "by-name")]),
        row(
            "MeshHTTPRouteNamedRule",
            "named.shop",
            "/named",
            200,
            &[V1, Recorded("route", "HTTPRoute/shop/named rules[0] (first)")],
        ),
        row(
            "MeshHTTPRouteNamedRule",
            "named.shop",
            "/unnamed",
            200,
            &[V2, Recorded("route", "HTTPRoute/shop/named rules[1]")],
        ),
    ]
}

fn grpc() -> Vec<Row> {
    use Look::{Copied, Said, Seen};
    let changed = &[V1, Seen("x-set", "new"), Seen("x-add", "old,more"), Seen("x-gone", "")];
    vec![
        row("MeshGRPCRouteRequestHeaderModifier", "grpc.shop:7070", "/demo.Echo/Headers", 200, changed)
            .by("POST")
            .with(&["x-set: old", "x-add: old", "x-gone: old", GRPC]),
        row("GRPCRoute: no rule", "grpc.shop:7070", "/demo.Echo/Other", 200, &[Said("grpc-status", "12")])
            .by("POST")
            .with(&[GRPC]),
        row("MeshGRPCRouteRequestMirror", "grpc.shop:7070", "/demo.Echo/Mirror", 200, &[V1, Copied("shop/v2")])
            .by("POST")
            .with(&["x-mirror: yes", GRPC]),
    ]
}

fn redirects() -> Vec<Row> {
    use Look::{Path, Said, Seen};
    let (redirect, rewrite) = ("MeshHTTPRouteRedirect", "MeshHTTPRouteRewritePath");
    let location = |path: &'static str, status, looks| row(redirect, "redirects.shop", path, status, looks);
    vec![
        location("/host", 302, &[Said("location", "http://example.org/host")]),
        location("/301", 301, &[Said("location", "http://example.org/301")]),
        location("/303", 303, &[Said("location", "http://redirects.shop/303")]),
        location("/307", 307, &[Said("location", "http://example.org/307")]),
        location("/308", 308, &[Said("location", "http://example.org/308")]),
        location("/port", 302, &[Said("location", "http://redirects.shop:8083/port")]),
        location("/scheme", 302, &[Said("location", "https://redirects.shop/scheme")]),
        location("/scheme-and-port", 302, &[Said("location", "https://redirects.shop:8443/scheme-and-port")]),
        location("/prefix/a?b=c", 302, &[Said("location", "http://redirects.shop/instead/a?b=c")]),
        location("/full/a", 302, &[Said("location", "http://redirects.shop/all-of-it")]),
        row(rewrite, "rewrites.shop", "/prefix/a?b=c", 200, &[V1, Path("/a?b=c"), Seen("host", "rewrites.shop")]),
        row(rewrite, "rewrites.shop", "/prefix", 200, &[V1, Path("/")]),
        row(
            rewrite,
            "rewrites.shop",
            "/full/a",
            200,
            &[V1, Path("/one"), Seen("host", "other.example"), Seen("x-set", "new")],
        ),
    ]
}

fn filters() -> Vec<Row> {
    use Look::{Copied, Recorded};
    vec![
        row(
            "HTTPRouteRequestMirror",
            "mirrors.shop",
            "/copied-by-http",
            200,
            &[V1, Copied("shop/v2"), Copied("shop/v3")],
        ),
        row("HTTPRouteRequestTimeout", "timeouts.shop", "/delay?ms=20000", 504, &[]).with(&["x-which: request"]),
        row("HTTPRouteBackendTimeout", "timeouts.shop", "/delay?ms=20000", 504, &[]).with(&["x-which: backend"]),
        row("HTTPRouteRequestTimeout", "timeouts.shop", "/delay?ms=500", 200, &[V1]).with(&["x-which: none"]),
        row("HTTPRouteRetry", "retries.shop", "/status/503", 503, &[V1, Recorded("attempts", "3")]),
        row("all backends invalid", "failures.shop", "/gone", 500, &[]),
        row("no endpoints", "failures.shop", "/empty", 503, &[]),
        row("no backends", "failures.shop", "/nothing", 500, &[]),
        row("unknown filter", "failures.shop", "/unknown-filter", 500, &[]),
        row("no rule", "failures.shop", "/elsewhere", 404, &[]),
        row("HTTPRouteRetry", "retries.shop", "/status/500", 500, &[V1, Recorded("attempts", "")]),
    ]
}

fn pages() -> Vec<Row> {
    use Look::Said;
    let cors = "HTTPRouteCORS";
    let preflight =
        |path: &'static str, headers, looks| row(cors, "pages.shop", path, 204, looks).by("OPTIONS").with(headers);
    vec![
        preflight(
            "/list",
            &["origin: https://a.shop.example", "access-control-request-method: PUT"],
            &[
                Said("access-control-allow-origin", "https://a.shop.example"),
                Said("access-control-allow-methods", "PUT, DELETE"),
                Said("access-control-allow-headers", "X-A"),
                Said("access-control-max-age", "60"),
                Said("access-control-allow-credentials", ""),
                Said("vary", "origin"),
            ],
        ),
        preflight(
            "/list",
            &["origin: http://shop.example:8080", "access-control-request-method: PUT"],
            &[Said("access-control-allow-origin", "http://shop.example:8080")],
        ),
        preflight(
            "/list",
            &["origin: https://evil.example", "access-control-request-method: PUT"],
            &[
                Said("access-control-allow-origin", ""),
                Said("access-control-allow-methods", ""),
                Said("vary", "origin"),
            ],
        ),
        preflight(
            "/all",
            &["origin: https://any.example", "access-control-request-method: PUT"],
            &[
                Said("access-control-allow-origin", "*"),
                Said("access-control-allow-methods", "*"),
                Said("access-control-max-age", "5"),
            ],
        ),
        preflight(
            "/with-cookies",
            &[
                "origin: https://any.example",
                "access-control-request-method: PUT",
                "access-control-request-headers: x-a",
            ],
            &[
                Said("access-control-allow-origin", "https://any.example"),
                Said("access-control-allow-methods", "PUT"),
                Said("access-control-allow-headers", "x-a"),
                Said("access-control-allow-credentials", "true"),
            ],
        ),
        row(
            cors,
            "pages.shop",
            "/list",
            200,
            &[
                V1,
                Said("access-control-allow-origin", "https://a.shop.example"),
                Said("access-control-expose-headers", "X-B"),
            ],
        )
        .with(&["origin: https://a.shop.example"]),
        row(cors, "pages.shop", "/list", 200, &[V1, Said("access-control-allow-origin", "")])
            .with(&["origin: https://evil.example"]),
        row(cors, "pages.shop", "/list", 200, &[V1]).by("OPTIONS").with(&["origin: https://a.shop.example"]),
        // What the proxy answers itself says it, too: a page must be able to see that it failed.
        row(cors, "pages.shop", "/with-cookies", 500, &[Said("access-control-allow-origin", "https://any.example")])
            .with(&["origin: https://any.example"]),
    ]
}

fn world() -> String {
    let mut text = scenario::namespace("shop", true) + &scenario::namespace("other", true);
    for part in [scenario::client("shop", "web", 1), scenario::client("other", "web", 1)] {
        text.push_str(&part);
    }
    for name in ["v1", "v2", "v3"] {
        text.push_str(&scenario::server("shop", name, name, 2));
        text.push_str(&scenario::service("shop", name));
    }
    for (name, app) in FRONTENDS.iter().map(|name| (*name, "v1")).chain([("empty", "nobody")]) {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  selector: {{app: {app}}}\n\
             \x20 ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: more, port: 8080, appProtocol: http}}, \
             {{name: grpc, port: 7070, targetPort: 8080}}]\n"
        ));
    }
    text
}

/// An answer, as curl shows it.
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    /// What the server saw; null where it was not the server that answered.
    seen: Value,
}

fn ask(lab: &Lab, row: &Row, id: &str) -> anyhow::Result<Answer> {
    let (url, id) = (format!("http://{}{}", row.to, row.path), format!("x-request-id: {id}"));
    let mut argv = vec!["curl", "-sS", "-i", "--max-time", "60", "-X", row.method, "-H", &id];
    argv.extend(row.headers.iter().flat_map(|line| ["-H", *line]));
    argv.push(&url);
    let text = lab.exec_ok(row.from, &argv)?;
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text:?}"))?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status")?.parse()?;
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    Ok(Answer { status, headers, seen: serde_json::from_str(body).unwrap_or_default() })
}

/// What `tulle explain` says of such a request: the route, and every status that may come of it before the server has a say.
fn explain(lab: &Lab, row: &Row) -> anyhow::Result<(String, Vec<u64>)> {
    let (host, port) = row.to.split_once(':').unwrap_or((row.to, "80"));
    let to = format!("shop/{}:{port}", host.trim_end_matches(".shop"));
    let named = row.headers.iter().find_map(|line| line.strip_prefix("host: ")).unwrap_or(row.to);
    let mut argv = vec!["tulle", "explain", row.from, &to, "-o", "json", "--path", row.path, "--host", named];
    argv.extend(["--method", row.method]);
    argv.extend(row.headers.iter().filter(|line| !line.starts_with("host: ")).flat_map(|line| ["--header", *line]));
    let output = lab.exec("control", &argv)?;
    let value: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{argv:?}: {output:?}"))?;
    let answers = value["request"]["answers"].as_array().into_iter().flatten();
    let statuses = answers.filter_map(|answer| answer["status"].as_u64()).collect();
    Ok((value["request"]["route"].as_str().unwrap_or_default().to_owned(), statuses))
}

fn check(lab: &Lab, row: &Row, number: usize) -> anyhow::Result<()> {
    let id = format!("row-{number}-");
    let answer = ask(lab, row, &id)?;
    ensure!(answer.status == row.status, "status {}, not {}", answer.status, row.status);
    // What neither a route nor a policy speaks of is not read.
    let (route, statuses) = explain(lab, row)?;
    let read = !route.is_empty() || !statuses.is_empty();
    let line = match read {
        true => scenario::await_log(lab, "node-1", &["request complete", "direction=\"outbound\"", &id])?,
        false => String::new(),
    };
    ensure!(scenario::field(&line, "route") == route, "explained as {route:?}, recorded: {line}");
    // Nobody explains what a server will do, or a gRPC client's way of being told.
    let own = answer.seen.is_null() && !matches!(row.status, 503 | 504) && !row.headers.contains(&GRPC);
    ensure!(!own || statuses == [u64::from(row.status)], "explained as {statuses:?}");
    for look in row.looks {
        let (found, wanted) = match *look {
            Look::By(name) => (answer.seen["name"].as_str().unwrap_or_default().to_owned(), name),
            Look::Path(path) => (answer.seen["path"].as_str().unwrap_or_default().to_owned(), path),
            Look::Seen(name, value) => (answer.seen["headers"][name].as_str().unwrap_or_default().to_owned(), value),
            Look::Said(name, value) => (answer.headers.get(name).cloned().unwrap_or_default(), value),
            Look::Recorded(name, value) => (scenario::field(&line, name), value),
            Look::Copied(pod) => {
                scenario::await_log(lab, pod, &["\"kind\":\"http\"", row.path])?;
                continue;
            }
        };
        ensure!(found == wanted, "{look:?}, but found {found:?}");
    }
    Ok(())
}

/// Shares of 100 requests: what the profiles allow to be five off is exact to two here.
fn shares(lab: &Lab, url: &str, more: &[&str]) -> anyhow::Result<()> {
    let reports = scenario::calls(lab, "shop/web", url, &[&["--count", "100"], more].concat())?;
    scenario::all_well(&reports, 100)?;
    let of = |name: &str| reports.iter().filter(|report| report["name"] == name).count();
    let (v1, v2) = (of("v1"), of("v2"));
    ensure!(v1 + v2 == 100 && (68..=72).contains(&v1), "{url}: {v1} and {v2}");
    Ok(())
}

/// Each route's `Accepted` and `ResolvedRefs`, for each of its parents.
fn conditions(lab: &Lab) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let all = lab.control_get("/debug/conditions")?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let routes = list(&all).into_iter().filter(|one| one["kind"].as_str().is_some_and(|kind| kind.ends_with("Route")));
    let said = |parent: &Value| {
        let reasons = list(&parent["conditions"]);
        let reasons = reasons.iter().filter(|one| one["type"] == "Accepted" || one["type"] == "ResolvedRefs");
        reasons.map(|one| one["reason"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>().join(" ")
    };
    let of = |route: &Value| list(&route["parents"]).iter().map(said).collect();
    Ok(routes.map(|one| (one["name"].as_str().unwrap_or_default().to_owned(), of(&one))).collect())
}

#[test]
fn the_rules_of_every_mesh_feature_hold() -> anyhow::Result<()> {
    if !scenario::has_tools(&["curl"]) {
        return Ok(());
    }
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return Ok(()) };
    lab.apply_yaml(ROUTES)?;
    let conditions = conditions(&lab)?;
    assert_eq!(conditions.len(), ROUTES.matches("\nkind: ").count(), "{conditions:#?}");
    for (name, said) in &conditions {
        let expected: &[&str] = match name.as_str() {
            "pages" => &["Accepted BackendNotFound"],
            "failures" => &["UnsupportedValue BackendNotFound"],
            "nobodys" => &["NoMatchingParent ResolvedRefs", "NoMatchingParent ResolvedRefs"],
            _ => &["Accepted ResolvedRefs"],
        };
        assert_eq!(said, expected, "{name}");
    }
    let mut wrong = Vec::new();
    let rows = [core(), frontends(), grpc(), redirects(), filters(), pages()].into_iter().flatten();
    for (number, row) in rows.enumerate() {
        if let Err(error) = check(&lab, &row, number) {
            wrong.push(format!("{}: {error:#}", row.what()));
        }
    }
    // MeshFrontend: who dials a pod has no routes.
    let direct = format!("http://{}:8080/", lab.pod_ip("shop", "v1")?);
    let text = lab.exec_ok("shop/web", &["curl", "-sS", "-i", "--max-time", "60", &direct])?;
    if !text.starts_with("HTTP/1.1 200") || text.contains("x-route") {
        wrong.push(format!("MeshFrontend, by the pod's address: {text}"));
    }
    for (url, more) in [
        ("http://weights.shop/", &[][..]),
        ("http://grpc.shop:7070/demo.Echo/Split", &["--data", "x", "--header", GRPC][..]),
    ] {
        wrong.extend(shares(&lab, url, more).err().map(|error| format!("weights: {error:#}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
