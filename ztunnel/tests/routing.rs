//! Routes and request policies from the wire to the decision: what control sends is decoded, stored, found and carried out.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use prost::Message;
use tulle_proto::mesh::route_filter::Filter;
use tulle_proto::mesh::{self, route_path, route_value};
use tulle_proto::workload as wds;
use ztunnel::route::{self, Reason, RequestFacts, RoutePlan};
use ztunnel::state::{Change, Reader, Snapshot, Writer, store};
use ztunnel::xds::decode::{self, Strings};

const CART: &str = "cart.shop.svc.cluster.local";

fn service_ref(name: &str) -> Option<mesh::ServiceRef> {
    Some(mesh::ServiceRef { namespace: "shop".into(), hostname: format!("{name}.shop.svc.cluster.local") })
}

fn service(name: &str) -> Change {
    let service = wds::Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: vec![wds::NetworkAddress { address: vec![10, 96, 0, 1].into(), ..Default::default() }],
        ports: vec![wds::Port { service_port: 80, target_port: 8080, ..Default::default() }],
        ..Default::default()
    };
    let address = wds::Address { r#type: Some(wds::address::Type::Service(service)) };
    decode::address(&address.encode_to_vec(), "1", &mut Strings::default()).unwrap()
}

fn backend(name: &str, weight: u32) -> mesh::RouteBackend {
    mesh::RouteBackend { service: service_ref(name), port: 80, weight, ..Default::default() }
}

fn path(path: route_path::Path) -> Option<mesh::RoutePath> {
    Some(mesh::RoutePath { path: Some(path) })
}

fn prefix(text: &str) -> mesh::RouteMatch {
    mesh::RouteMatch { path: path(route_path::Path::Prefix(text.into())), ..Default::default() }
}

/// A rule named after its only backend.
fn rule(to: &str, matches: Vec<mesh::RouteMatch>) -> mesh::RouteRule {
    mesh::RouteRule { name: to.into(), matches, backends: vec![backend(to, 1)], ..Default::default() }
}

fn route_of(namespace: &str, name: &str, created: i64, rules: Vec<mesh::RouteRule>) -> mesh::Route {
    let parent = mesh::RouteParent { service: service_ref("cart"), ports: vec![80] };
    mesh::Route {
        namespace: namespace.into(),
        name: name.into(),
        created,
        parents: vec![parent],
        rules,
        ..Default::default()
    }
}

fn decoded(route: &mesh::Route, version: &str) -> Change {
    let id = format!("HTTPRoute/{}/{}", route.namespace, route.name);
    let bytes = route.encode_to_vec();
    Change::Route(Arc::new(decode::route(&bytes, &id, version, "node-1", &mut Strings::default()).unwrap()))
}

struct Mesh {
    writer: Writer,
    reader: Reader,
}

impl Mesh {
    fn new(routes: &[mesh::Route]) -> Self {
        let (writer, reader) = store();
        let mut mesh = Self { writer, reader };
        mesh.apply([service("cart")]);
        mesh.apply(routes.iter().map(|route| decoded(route, "1")).collect::<Vec<_>>());
        mesh
    }

    fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.writer.apply(changes, 1);
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.reader.load()
    }

    /// Name of the rule that a request gets; empty: none. `None`: there are no routes at all.
    fn rule(&self, client: &str, request: &str) -> Option<String> {
        let snapshot = self.snapshot();
        let service = snapshot.service("shop", CART).unwrap();
        let candidates = snapshot.routes_for(service, 80, client)?;
        let mut parts = request.split(' ');
        let (method, target) = (parts.next().unwrap(), parts.next().unwrap());
        let mut headers = HeaderMap::new();
        for header in parts {
            let (name, value) = header.split_once(':').unwrap();
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let facts =
            RequestFacts { method, scheme: "http", authority: "cart", port: 80, path, query, headers: &headers };
        Some(route::find(candidates, &facts).map(|found| found.rule().name.to_string()).unwrap_or_default())
    }
}

fn header(name: &str, value: route_value::Value) -> mesh::RouteValue {
    mesh::RouteValue { name: name.into(), value: Some(value) }
}

#[test]
fn a_request_gets_the_rule_that_the_api_says() {
    use route_value::Value::{Exact, Regex};
    let any = mesh::RouteMatch::default;
    let pinned = |value| mesh::RouteMatch { headers: vec![header("x-canary", value)], ..any() };
    let rules = vec![
        rule("all", vec![]),
        rule("regex", vec![mesh::RouteMatch { path: path(route_path::Path::Regex("/r[0-9]+.*".into())), ..any() }]),
        rule("api", vec![prefix("/api")]),
        rule("api-v2", vec![prefix("/api/v2/")]),
        rule("api-post", vec![mesh::RouteMatch { method: "POST".into(), ..prefix("/api") }]),
        rule("exact", vec![mesh::RouteMatch { path: path(route_path::Path::Exact("/api/v2".into())), ..any() }]),
        rule("pinned", vec![pinned(Exact("yes".into()))]),
        rule("cookie", vec![mesh::RouteMatch { headers: vec![header("cookie", Regex(".*v=2.*".into()))], ..any() }]),
        rule("query", vec![mesh::RouteMatch { query: vec![header("v", Exact("2 3".into()))], ..any() }]),
        rule(
            "two",
            vec![mesh::RouteMatch {
                headers: vec![header("x-canary", Exact("yes".into())), header("x-b", Exact("1".into()))],
                ..any()
            }],
        ),
        rule("host", vec![mesh::RouteMatch { headers: vec![header("host", Exact("nobody".into()))], ..any() }]),
    ];
    let mesh = Mesh::new(&[route_of("shop", "cart", 0, rules)]);
    let cases = [
        ("GET /", "all"),
        ("GET /r1/x", "regex"),
        ("GET /xr1", "all"),
        ("GET /api", "api"),
        ("GET /api/", "api"),
        ("GET /api/x", "api"),
        ("GET /apix", "all"),
        ("POST /api/x", "api-post"),
        ("POST /api/v2/x", "api-v2"),
        ("GET /api/v2", "exact"),
        ("GET /API", "all"),
        ("GET / x-canary:yes", "pinned"),
        ("GET / X-Canary:yes", "pinned"),
        ("GET / x-canary:no", "all"),
        ("GET /api x-canary:yes", "api"),
        ("GET / x-canary:yes x-b:1", "two"),
        ("GET / cookie:a=1;v=2", "cookie"),
        ("GET / cookie:a=1 cookie:v=2", "cookie"),
        ("GET /?v=2+3", "query"),
        ("GET /?v=2%203&v=4", "query"),
        ("GET /?v=4&v=2+3", "all"),
    ];
    for (request, expected) in cases {
        assert_eq!(mesh.rule("shop", request).as_deref(), Some(expected), "{request}");
    }
}

#[test]
fn of_equal_matches_the_older_route_counts_then_the_name_then_the_place() {
    let one = |namespace: &str, name: &str, created| route_of(namespace, name, created, vec![rule(name, vec![])]);
    let first = |routes: &[mesh::Route]| Mesh::new(routes).rule("shop", "GET /").unwrap();
    assert_eq!(first(&[one("shop", "a", 2), one("shop", "b", 1)]), "b");
    assert_eq!(first(&[one("shop", "b", 1), one("shop", "a", 1)]), "a");
    let twice = route_of("shop", "c", 1, vec![rule("first", vec![]), rule("second", vec![])]);
    assert_eq!(first(&[twice]), "first");
}

#[test]
fn consumer_routes_replace_producer_routes_for_their_own_clients() {
    let producer = route_of("shop", "p", 0, vec![rule("producer", vec![prefix("/p")])]);
    let consumer = route_of("web", "c", 0, vec![rule("consumer", vec![prefix("/c")])]);
    let mut mesh = Mesh::new(&[producer, consumer]);
    let cases = [("shop", "/p", "producer"), ("shop", "/c", ""), ("web", "/c", "consumer"), ("web", "/p", "")];
    for (client, path, expected) in cases {
        assert_eq!(mesh.rule(client, &format!("GET {path}")).as_deref(), Some(expected), "{client} {path}");
    }
    mesh.apply([Change::OwnRemoved(ztunnel::state::OwnType::Route, "HTTPRoute/web/c".into())]);
    assert_eq!(mesh.rule("web", "GET /p").as_deref(), Some("producer"));
    mesh.apply([Change::OwnRemoved(ztunnel::state::OwnType::Route, "HTTPRoute/shop/p".into())]);
    assert_eq!(mesh.rule("web", "GET /p"), None, "without routes bytes go through");
}

fn plan(mesh: &Mesh, headers: &HeaderMap) -> RoutePlan {
    let snapshot = mesh.snapshot();
    let candidates = snapshot.routes_for(snapshot.service("shop", CART).unwrap(), 80, "shop").unwrap();
    let facts =
        RequestFacts { method: "GET", scheme: "http", authority: "cart", port: 80, path: "/a/b", query: None, headers };
    let found = route::find(candidates, &facts).unwrap();
    found.plan(&facts, found.rule().turns.take())
}

fn counts(mesh: &Mesh, requests: usize) -> BTreeMap<String, usize> {
    let headers = HeaderMap::new();
    let mut counts = BTreeMap::new();
    for _ in 0..requests {
        let to = match plan(mesh, &headers) {
            RoutePlan::Forward(forward) => forward.backend().service.hostname.split('.').next().unwrap().to_owned(),
            RoutePlan::Respond(respond) => format!("{} {:?}", respond.status, respond.reason),
            RoutePlan::Redirect(redirection) => redirection.location.to_str().unwrap().to_owned(),
            RoutePlan::Preflight(preflight) => format!("{:?}", preflight.headers),
        };
        *counts.entry(to).or_default() += 1;
    }
    counts
}

#[test]
fn weights_invalid_shares_and_edits_are_counted_exactly() {
    let split = |canary: mesh::RouteBackend, weight| {
        let rule = mesh::RouteRule { backends: vec![backend("v1", weight), canary], ..Default::default() };
        route_of("shop", "r", 0, vec![rule])
    };
    let mut mesh = Mesh::new(&[split(backend("v2", 10), 90)]);
    assert_eq!(counts(&mesh, 1_000), BTreeMap::from([("v1".into(), 900), ("v2".into(), 100)]));
    let before = mesh.snapshot().route("HTTPRoute/shop/r").unwrap().rules[0].turns.peek();
    mesh.apply([decoded(&split(backend("v2", 50), 50), "2")]);
    assert_eq!(
        mesh.snapshot().route("HTTPRoute/shop/r").unwrap().rules[0].turns.peek(),
        before,
        "an edit keeps its place"
    );
    assert_eq!(counts(&mesh, 1_000), BTreeMap::from([("v1".into(), 500), ("v2".into(), 500)]));
    let gone = mesh::RouteBackend { invalid: "there is no Service shop/v2".into(), service: None, ..backend("v2", 1) };
    mesh.apply([decoded(&split(gone, 3), "3")]);
    assert_eq!(counts(&mesh, 400), BTreeMap::from([("v1".into(), 300), ("500 BackendInvalid".into(), 100)]));
    mesh.apply([decoded(&split(backend("v2", 0), 0), "4")]);
    assert_eq!(counts(&mesh, 10), BTreeMap::from([("500 NoBackend".into(), 10)]));
    mesh.apply([decoded(&split(backend("v2", 0), 1), "5")]);
    assert_eq!(counts(&mesh, 10), BTreeMap::from([("v1".into(), 10)]));
}

#[test]
fn what_cannot_be_carried_out_answers_and_is_never_skipped() {
    let with = |filters: Vec<mesh::RouteFilter>| {
        route_of("shop", "r", 0, vec![mesh::RouteRule { filters, ..rule("v1", vec![]) }])
    };
    let reason = |route: mesh::Route| match plan(&Mesh::new(&[route]), &HeaderMap::new()) {
        RoutePlan::Respond(respond) => (respond.status, respond.grpc_status, respond.reason),
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(with(vec![mesh::RouteFilter { filter: None }])), (500, 14, Reason::RuleBroken));
    let told = route_of("shop", "r", 0, vec![mesh::RouteRule { broken: "why".into(), ..rule("v1", vec![]) }]);
    assert_eq!(reason(told), (500, 14, Reason::RuleBroken));
    // What cannot be used of a match may have meant any request, and the rule behind it gets none of them.
    use route_path::Path::Regex as PathRegex;
    use route_value::Value::Regex;
    let any = mesh::RouteMatch::default;
    let grpc = mesh::GrpcMethod { service: "(".into(), regex: true, ..Default::default() };
    for (name, wanted, target, expected) in [
        ("a path", mesh::RouteMatch { path: path(PathRegex("/(".into())), ..any() }, "GET /x", "broken"),
        ("a way that is not known", mesh::RouteMatch { path: Some(<_>::default()), ..any() }, "GET /x", "broken"),
        ("a gRPC method", mesh::RouteMatch { grpc: Some(grpc), ..any() }, "POST /a.B/c", "broken"),
        (
            "a header",
            mesh::RouteMatch { headers: vec![header("x-a", Regex("(".into()))], ..any() },
            "GET /x x-a:1",
            "broken",
        ),
        (
            "who has it not",
            mesh::RouteMatch { headers: vec![header("x-a", Regex("(".into()))], ..any() },
            "GET /x",
            "all",
        ),
        ("a more special rule", mesh::RouteMatch { path: path(PathRegex("/(".into())), ..any() }, "GET /api", "api"),
        ("too large", mesh::RouteMatch { path: path(PathRegex("(.{999}){999}".into())), ..any() }, "GET /x", "broken"),
    ] {
        let rules = vec![rule("all", vec![]), rule("broken", vec![wanted]), rule("api", vec![prefix("/api")])];
        let mesh = Mesh::new(&[route_of("shop", "r", 0, rules)]);
        assert_eq!(mesh.rule("shop", target).as_deref(), Some(expected), "{name}");
        assert!(mesh.snapshot().route("HTTPRoute/shop/r").unwrap().rules[1].broken.is_some(), "{name}");
    }
    let fault = mesh::Fault { abort_status: 503, abort_millionths: 1_000_000, ..Default::default() };
    let fault = mesh::RouteFilter { filter: Some(Filter::Fault(fault)) };
    assert_eq!(reason(with(vec![fault])), (503, 14, Reason::Fault));
}

#[test]
fn a_plan_changes_headers_host_and_path_and_names_its_mirrors() {
    let changes = |name: &str, value: &str| {
        Some(mesh::HeaderChanges {
            set: vec![mesh::Header { name: name.into(), value: value.into() }],
            ..Default::default()
        })
    };
    let filter = |filter| mesh::RouteFilter { filter: Some(filter) };
    let to_v2 = mesh::PathChange { change: Some(mesh::path_change::Change::Prefix("/v2".into())) };
    let filters = vec![
        filter(Filter::RequestHeaders(changes("x-rule", "rule").unwrap())),
        filter(Filter::ResponseHeaders(changes("x-to", "client").unwrap())),
        filter(Filter::Rewrite(mesh::Rewrite { hostname: "v2.internal".into(), path: Some(to_v2) })),
        filter(Filter::Mirror(mesh::Mirror { service: service_ref("shadow"), port: 80, ..Default::default() })),
        filter(Filter::Mirror(mesh::Mirror { invalid: "nobody".into(), ..Default::default() })),
    ];
    let of_backend = vec![filter(Filter::RequestHeaders(changes("x-rule", "backend").unwrap()))];
    let backends = vec![mesh::RouteBackend { filters: of_backend, ..backend("v1", 1) }];
    let rule = mesh::RouteRule { filters, backends, ..rule("v1", vec![prefix("/a")]) };
    let mesh = Mesh::new(&[route_of("shop", "r", 0, vec![rule])]);
    let RoutePlan::Forward(forward) = plan(&mesh, &HeaderMap::new()) else { panic!("not forwarded") };
    assert_eq!((forward.path.as_deref(), forward.authority.as_deref()), (Some("/v2/b"), Some("v2.internal")));
    assert_eq!(
        forward.mirrors().map(|mirror| &*mirror.service.hostname).collect::<Vec<_>>(),
        ["shadow.shop.svc.cluster.local"]
    );
    let (mut request, mut response) = (HeaderMap::new(), HeaderMap::new());
    forward.on_request(&mut request);
    forward.on_response(&mut response);
    assert_eq!((request["x-rule"].to_str().unwrap(), response["x-to"].to_str().unwrap()), ("backend", "client"));
}
