//! Parsers of the node proxy and of the certificates crate.
//!
//! A target takes bytes, ignores those that cannot reach the parser (most take text), and asserts what must hold for
//! everything that was accepted.

use std::path::Path;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use prost::Message as _;
use tulle_certs::{Issued, Roots, SpiffeId, Usage};
use tulle_proto::workload::address::Type;
use ztunnel::capture::zds::{self, PACKET_MAX};
use ztunnel::cluster::cgroup::pod_uids;
use ztunnel::cni::conf;
use ztunnel::cni::enrolment::Known;
use ztunnel::cni::install::primary::{Candidate, Choice, choose, primary_of};
use ztunnel::cni::kubeconfig::Access;
use ztunnel::cni::wire::{self as cni, MESSAGE_MAX};
use ztunnel::dns::wire;
use ztunnel::hbone::headers::{self, Authority, Baggage, Forwarded, TraceId};
use ztunnel::http::frames::Frames;
use ztunnel::http::gate::Gate;
use ztunnel::http::headers as hygiene;
use ztunnel::http::offer::offers;
use ztunnel::http::{Sniffed, sniff};
use ztunnel::policy::jwt::by_rules;
use ztunnel::route::path::normalise;
use ztunnel::route::session::{self, Session};
use ztunnel::route::{RequestFacts, RoutePlan, find};
use ztunnel::state::{Backend, Change, ServiceName, ServiceSpec, SessionRule, Snapshot, store};
use ztunnel::telemetry::trace::Context;
use ztunnel::tls::hello::{self, Hello};
use ztunnel::xds::decode::{self, Strings};

/// A target.
pub type Target = fn(&[u8]);

/// Every target of this file, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("connect", connect),
    ("baggage", baggage),
    ("forwarded", forwarded),
    ("traceparent", traceparent),
    ("denial", denial),
    ("pods", pods),
    ("zds", handed),
    ("cni-request", cni_request),
    ("cni-answer", cni_answer),
    ("cni-known", cni_known),
    ("cni-conf", cni_conf),
    ("cni-list", cni_list),
    ("cni-api", cni_api),
    ("cgroup", cgroup),
    ("kubeconfig", kubeconfig),
    ("local", local),
    ("address", address),
    ("authorization", authorization),
    ("network-policy", network_policy),
    ("trust-bundle", trust_bundle),
    ("route", route),
    ("traffic-policy", traffic_policy),
    ("request-auth", request_auth),
    ("egress-policy", egress_policy),
    ("path", path),
    ("request", request),
    ("first-words", first_words),
    ("messages", messages),
    ("frames", frames),
    ("offers", offered),
    ("headers", sanitised),
    ("token", token),
    ("duration", duration),
    ("spiffe", spiffe),
    ("csr", csr),
    ("roots", roots),
    ("issued", issued),
    ("certificate", certificate),
    ("crl", crl),
    ("dns", dns),
    ("hello", hello),
];

/// The first bytes of a client that may speak TLS.
pub fn hello(data: &[u8]) {
    let whole = hello::read(data);
    if let Hello::Client { name: Some(name), .. } = &whole {
        assert!(!name.is_empty() && name.len() <= 253 && *name == name.to_ascii_lowercase(), "{name:?}");
    }
    // Less of it is never another answer.
    let part = hello::read(&data[..data.len() / 2]);
    assert!(part == Hello::More || part == whole, "{part:?}, then {whole:?}");
}

/// A request of the CNI plugin, from whoever reaches the agent's socket.
pub fn cni_request(data: &[u8]) {
    match cni::Request::decode(data) {
        Ok(request) => {
            // One that was just as long as it may be has no room for the newline.
            if let Ok(line) = request.encode() {
                assert_eq!(cni::Request::decode(&line).as_ref(), Ok(&request));
            }
        }
        Err(refusal) => {
            assert!(refusal.code != 0 && !refusal.message.is_empty());
            assert!(cni::encode(&Err(refusal)).len() <= MESSAGE_MAX);
        }
    }
}

/// An answer of the agent.
pub fn cni_answer(data: &[u8]) {
    if let Ok(answer) = cni::decode(data) {
        assert_eq!(cni::decode(&cni::encode(&answer)), Ok(answer));
    }
}

/// The configuration of one call, from the runtime.
pub fn cni_conf(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(conf) = conf::read(text) {
        assert_eq!(conf::version_of(text), conf.version);
        if let Some(result) = &conf.prev_result {
            let value: serde_json::Value = serde_json::from_str(result).expect("a result that is passed on is JSON");
            assert!(!value.is_null());
        }
    }
    let _ = conf::pod_name(text);
}

/// A configuration of the node's network, to which ours is added.
pub fn cni_list(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for name in ["10-a.conflist", "10-a.conf"] {
        let candidate = Candidate { name: name.to_owned(), text: Ok(text.to_owned()) };
        let Choice::Chain(chain) = choose(vec![candidate], None, &serde_json::json!({})) else { continue };
        let list: serde_json::Value = serde_json::from_str(&chain.text).expect("what is written is JSON");
        let plugins = list["plugins"].as_array().expect("what is written has plugins");
        assert!(plugins.last().is_some_and(|last| last["type"] == "tulle-cni") && plugins.len() > 1);
        assert_eq!(primary_of(&chain.text).as_deref(), Some(name));
    }
}

/// An answer of the API server to the plugin.
pub fn cni_api(data: &[u8]) {
    let _ = ztunnel::cni::api::read(data);
}

/// Where a process belongs; a container chooses the ends of its cgroups' names.
pub fn cgroup(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for uid in pod_uids(text) {
        assert!(matches!(uid.len(), 32 | 36) && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-'));
    }
}

/// A kubeconfig that the installer is given.
pub fn kubeconfig(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let none = |_: &Path| Err("no files here".to_owned());
    if let Ok(access) = Access::read(text, Path::new("/"), none) {
        assert_eq!(Access::read(&access.render(), Path::new("/"), none), Ok(access));
    }
}

/// The file of namespaces.
pub fn cni_known(data: &[u8]) {
    if let Ok(known) = Known::decode(data) {
        assert_eq!(Known::decode(&known.encode()).as_ref(), Ok(&known));
        for (name, labels) in &known.namespaces {
            let fixed = known.whatever_the_pod_says(name, labels);
            assert!(fixed.is_none_or(|fixed| fixed == known.enrolled(name, labels, labels)));
        }
    }
}

/// The authority of a CONNECT request, from a peer.
pub fn connect(data: &[u8]) {
    let Ok(uri) = Uri::builder().authority(data).build() else { return };
    let Ok(request) = Request::builder().method(Method::CONNECT).uri(uri).body(()) else { return };
    match headers::destination(&request) {
        Ok(Authority::Address(address)) => {
            assert!(address.port() != 0, "port 0 was accepted");
            assert_eq!(address.to_string().parse(), Ok(Authority::Address(address)));
        }
        Ok(Authority::Host(host, port)) => {
            assert!(port != 0 && !host.is_empty() && host.len() <= 253, "{host}:{port}");
            // A host of digits and dots alone could be read as an address the second time, and then is one.
            assert!(format!("{host}:{port}").parse::<Authority>().is_ok());
        }
        Err(outcome) => assert!(!outcome.detail.is_empty(), "a refusal without a reason"),
    }
}

/// What a peer says about its workload.
pub fn baggage(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = Baggage::parse(text);
    if let Some(header) = parsed.to_header("deployment") {
        let written = header.to_str().unwrap_or_default();
        assert_eq!(Baggage::parse(written), parsed, "{written:?}");
    }
}

/// What a peer says about its client.
pub fn forwarded(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = Forwarded::parse(text);
    assert!(parsed.host.as_ref().is_none_or(|host| !host.is_empty() && host.len() <= 253));
    let _ = parsed.to_header();
}

/// A trace id.
pub fn traceparent(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match TraceId::parse(text) {
        Ok(id) => {
            let header = id.to_header(1).expect("a trace id can be written");
            assert_eq!(TraceId::parse(header.to_str().unwrap_or_default()), Ok(id));
        }
        Err(reason) => assert!(reason.contains("traceparent"), "{reason}"),
    }
    // That of a request.
    if let Some(context) = Context::parse(data) {
        assert_eq!(Context::parse(context.header().as_bytes()), Some(context));
    }
}

/// The reason that another proxy gives for a refusal.
pub fn denial(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::FORBIDDEN;
    *response.headers_mut() = HeaderMap::from_iter([(headers::DENIAL, value)]);
    let outcome = headers::refused(&response);
    assert!(!outcome.code.is_success(), "a refusal that is no failure");
    // It goes on to the next proxy as it came.
    let again = headers::refused(&headers::refusal(&outcome));
    assert_eq!(again.code, outcome.code);
}

/// The mesh as a file.
pub fn local(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match ztunnel::xds::local::parse(text) {
        Ok(document) => {
            let (_, errors) = ztunnel::xds::local::Local::default().changes(document);
            assert!(errors.iter().all(|error| !error.is_empty()));
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// A packet from a CNI agent, with a descriptor and without.
pub fn handed(data: &[u8]) {
    for fds in 0..3 {
        match zds::request(data, fds, false) {
            Ok(zds::Request::Add(added)) => {
                assert_eq!(fds, 1, "an addition without its one namespace");
                let fields = [&added.uid, &added.name, &added.namespace, &added.service_account];
                assert!(fields.iter().all(|field| !field.is_empty() && field.len() <= 253));
            }
            Ok(zds::Request::Keep(_) | zds::Request::Del(_) | zds::Request::SnapshotSent) => assert_eq!(fds, 0),
            Err(reason) => assert!(zds::answer(Err(reason)).len() <= PACKET_MAX),
        }
    }
}

/// The list of the node's pods.
pub fn pods(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(reason) = ztunnel::capture::pods::parse(text) {
        assert!(!reason.is_empty());
    }
}

/// A workload or a service, from control.
pub fn address(data: &[u8]) {
    if let Err(reason) = decode::address(data, "1", &mut Strings::default()) {
        assert!(!reason.is_empty());
    }
}

/// A policy, from control.
pub fn authorization(data: &[u8]) {
    match decode::authorization(data, "shop/policy", "1") {
        Ok(policy) => assert_eq!(&*policy.id, "shop/policy"),
        Err(error) => assert!(!error.reason.is_empty()),
    }
}

/// The roots of another trust domain, from control.
pub fn trust_bundle(data: &[u8]) {
    match decode::trust_bundle(data, "TrustBundle/b.example", "1") {
        Ok(bundle) => {
            assert_eq!(&*bundle.trust_domain, "b.example");
            assert!(!bundle.roots.certificates().is_empty(), "a bundle that vouches for nobody");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// A route, from control; what is accepted has a rule for a request, or none, and a plan for it.
pub fn route(data: &[u8]) {
    match decode::route(data, "HTTPRoute/shop/cart", "1", "node-1", &mut Strings::default()) {
        Ok(route) => {
            assert!(route.rules.iter().all(|rule| rule.broken.is_some() || !rule.matches.is_empty()));
            let (mut writer, reader) = store();
            writer.apply([Change::Service(cart()), Change::Route(Arc::new(route))], 1);
            follow(&reader.load(), "GET", "/api/v2?v=2", &[("x-canary", "yes")]);
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

fn cart() -> Arc<ServiceSpec> {
    let service = tulle_proto::workload::Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop.svc.cluster.local".into(),
        ..Default::default()
    };
    let address = tulle_proto::workload::Address { r#type: Some(Type::Service(service)) };
    match decode::address(&address.encode_to_vec(), "1", &mut Strings::default()) {
        Ok(Change::Service(spec)) => spec,
        other => panic!("{other:?}"),
    }
}

/// What a client shows of its session. What is given to it instead is a value that a header can have.
fn show(text: &str) {
    let cookie = Some("s".into());
    let absolute = Some(std::time::Duration::from_secs(1 << 40));
    let rule = SessionRule { cookie, header: None, permanent: true, absolute, idle: absolute };
    let Some(shown) = Session::read(&rule, text, 1_000) else { return };
    let service = ServiceName { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() };
    let backend = Backend { service, port: 80, weight: 1, filters: Default::default(), invalid: None };
    let given = session::given(&rule, Some(&shown), &backend, &shown.endpoint, 2_000);
    assert!(given.is_none_or(|given| HeaderValue::try_from(given).is_ok()));
}

/// What becomes of a request.
fn follow(snapshot: &Snapshot, method: &str, target: &str, headers: &[(&str, &str)]) {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    let Ok(path) = normalise(path) else { return };
    let header = |(name, value): &(&str, &str)| {
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(value).ok()?))
    };
    let headers: HeaderMap = headers.iter().filter_map(header).collect();
    headers.values().filter_map(|value| value.to_str().ok()).for_each(show);
    let facts =
        RequestFacts { method, scheme: "http", authority: "cart", port: 80, path: &path, query, headers: &headers };
    let service = snapshot.service("shop", "cart.shop.svc.cluster.local");
    let candidates = service.and_then(|service| snapshot.routes_for(service, 80, "shop"));
    let Some(found) = candidates.and_then(|candidates| find(candidates, &facts)) else { return };
    for turn in 0..4 {
        let plan = found.plan(&facts, turn);
        if let RoutePlan::Preflight(preflight) = &plan {
            let origin = preflight.headers.get("access-control-allow-origin");
            assert!(
                origin.is_none_or(|origin| preflight.allowed && Some(origin) == headers.get("origin")),
                "{origin:?}"
            );
        }
        if let RoutePlan::Forward(forward) = plan {
            let mut changed = headers.clone();
            if let Some(granted) = found.granted(&facts) {
                granted.say(&mut changed);
            }
            forward.on_request(&mut changed);
            forward.on_response(&mut changed);
            assert!(forward.path.as_ref().is_none_or(|path| path.starts_with('/')), "{:?}", forward.path);
        }
    }
}

/// A request, against routes with every kind of match: method, target and headers, one on a line.
pub fn request(data: &[u8]) {
    use tulle_proto::mesh::{self, route_path, route_value};
    let Ok(text) = std::str::from_utf8(data) else { return };
    let value = |name: &str, value| mesh::RouteValue { name: name.into(), value: Some(value) };
    let path = |path| Some(mesh::RoutePath { path: Some(path) });
    let wanted = [
        mesh::RouteMatch { path: path(route_path::Path::Prefix("/api".into())), ..Default::default() },
        mesh::RouteMatch { path: path(route_path::Path::Regex("/[a-z]+(/.*)?".into())), ..Default::default() },
        mesh::RouteMatch {
            headers: vec![value("cookie", route_value::Value::Regex("^(.*;)?v=(1|2)+.*".into()))],
            query: vec![value("v", route_value::Value::Exact("2".into()))],
            ..Default::default()
        },
    ];
    let to = Some(mesh::ServiceRef { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() });
    let rewrite = mesh::PathChange { change: Some(mesh::path_change::Change::Prefix("/v2".into())) };
    let rewrite = mesh::Rewrite { hostname: String::new(), path: Some(rewrite) };
    let all = || vec!["*".to_owned()];
    let origins = vec!["https://*.shop.example".to_owned(), "http://[::1]:8080".to_owned()];
    let cors =
        mesh::Cors { origins, credentials: true, methods: all(), headers: all(), expose: all(), max_age_seconds: 5 };
    let filters = [mesh::route_filter::Filter::Rewrite(rewrite), mesh::route_filter::Filter::Cors(cors)];
    let filters = filters.map(|filter| mesh::RouteFilter { filter: Some(filter) });
    let rule = |wanted: &mesh::RouteMatch| mesh::RouteRule {
        matches: vec![wanted.clone()],
        filters: filters.to_vec(),
        backends: vec![mesh::RouteBackend { service: to.clone(), port: 80, weight: 1, ..Default::default() }],
        ..Default::default()
    };
    let route = mesh::Route {
        namespace: "shop".into(),
        name: "cart".into(),
        parents: vec![mesh::RouteParent { service: to.clone(), ports: vec![80] }],
        rules: wanted.iter().map(rule).collect(),
        ..Default::default()
    };
    let bytes = route.encode_to_vec();
    let route = decode::route(&bytes, "HTTPRoute/shop/cart", "1", "node-1", &mut Strings::default());
    let (mut writer, reader) = store();
    writer.apply([Change::Service(cart()), Change::Route(Arc::new(route.expect("a good route")))], 1);
    let mut lines = text.lines();
    let (method, target) = lines.next().unwrap_or_default().split_once(' ').unwrap_or(("GET", "/"));
    let headers: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(':')).take(32).collect();
    follow(&reader.load(), method, target, &headers);
}

/// The first words of a client: more of them never change an answer that was given.
pub fn first_words(data: &[u8]) {
    let all = sniff(data);
    for size in 0..data.len().min(64) {
        let found = sniff(&data[..size]);
        assert!(found == Sniffed::More || found == all, "{found:?} became {all:?}");
    }
}

/// Requests of a client, followed: in pieces of any size the answer is the same, at the same byte.
pub fn messages(data: &[u8]) {
    let whole = Gate::default().follow(data);
    for size in [1, 3, 64] {
        let mut gate = Gate::default();
        let mut before = 0;
        let mut found = Ok(());
        for piece in data.chunks(size) {
            found = gate.follow(piece);
            if found.is_err() {
                break;
            }
            before += piece.len();
        }
        let found = found.map_err(|stop| (stop.at + before, stop.why));
        assert_eq!(found, whole.map_err(|stop| (stop.at, stop.why)), "in pieces of {size}");
    }
    assert!(whole.is_ok() || whole.is_err_and(|stop| stop.at < data.len()));
}

/// Frames of a client, followed in pieces.
pub fn frames(data: &[u8]) {
    let whole = Frames::default().follow(data, std::time::Duration::ZERO);
    let mut frames = Frames::default();
    let pieces = data.chunks(7).try_for_each(|piece| frames.follow(piece, std::time::Duration::ZERO));
    assert_eq!(pieces, whole);
}

/// The first bytes of a server of HTTP/2: more of them never take back what was said.
pub fn offered(data: &[u8]) {
    let whole = offers(data);
    for part in 0..data.len().min(512) {
        let said = offers(&data[..part]);
        assert!(said.is_none() || said == whole, "{said:?}, then {whole:?}");
    }
}

/// Headers of a request, one on a line: what goes on has one Host and nothing that belongs to one connection.
pub fn sanitised(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.lines();
    let Ok(uri) = lines.next().unwrap_or_default().parse::<Uri>() else { return };
    let mut request = Request::new(());
    *request.uri_mut() = uri;
    for line in lines.take(64) {
        let Some((name, value)) = line.split_once(':') else { continue };
        let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) else { continue };
        request.headers_mut().append(name, value);
    }
    if hygiene::check(&mut request, "10.0.0.1:80").is_err() {
        return;
    }
    let upgrade = hygiene::upgrade(request.headers(), request.version());
    hygiene::strip_hop(request.headers_mut(), upgrade.as_ref());
    hygiene::strip_forged(request.headers_mut());
    assert_eq!(request.headers().get_all("host").iter().count(), 1, "one Host");
    assert!(!hygiene::authority(&request).contains('@'));
    for name in request.headers().keys() {
        let name = name.as_str();
        let own =
            ["transfer-encoding", "keep-alive", "proxy-connection", "http2-settings", "forwarded"].contains(&name);
        assert!(!own && !name.starts_with("x-envoy-"), "{name} went on");
        assert!(upgrade.is_some() || !["connection", "upgrade"].contains(&name), "{name} went on");
    }
}

/// A DestinationRule, from control.
pub fn traffic_policy(data: &[u8]) {
    if let Err(reason) = decode::traffic_policy(data, "DestinationRule/shop/cart", "1", &mut Strings::default()) {
        assert!(!reason.is_empty());
    }
}

/// An EgressPolicy, from control.
pub fn egress_policy(data: &[u8]) {
    if let Err((_, reason)) = decode::egress_policy(data, "EgressPolicy/shop/out", "1") {
        assert!(!reason.is_empty());
    }
}

/// A RequestAuthentication, from control.
pub fn request_auth(data: &[u8]) {
    if let Err(reason) = decode::request_auth(data, "RequestAuthentication/shop/users", "1") {
        assert!(!reason.is_empty());
    }
}

/// A path, from a client.
pub fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(once) = normalise(text) {
        assert_eq!(normalise(&once).as_deref(), Ok(&*once));
        assert!(!once.split('/').any(|element| element == "." || element == ".."), "{once:?}");
    }
}

/// A token, from a client: no damage makes one that was never signed valid.
pub fn token(data: &[u8]) {
    use tulle_proto::mesh;
    const JWKS: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"a","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(value) = HeaderValue::from_str(&format!("Bearer {text}")) else { return };
    let rule = mesh::JwtRule { issuer: "joe".into(), jwks: JWKS.into(), ..Default::default() };
    let auth =
        mesh::RequestAuth { namespace: "shop".into(), name: "users".into(), rules: vec![rule], ..Default::default() };
    let auth = decode::request_auth(&auth.encode_to_vec(), "RequestAuthentication/shop/users", "1");
    let auth = auth.expect("a good one");
    let headers = HeaderMap::from_iter([(http::header::AUTHORIZATION, value)]);
    let facts = RequestFacts {
        method: "GET",
        scheme: "http",
        authority: "cart",
        port: 80,
        path: "/",
        query: None,
        headers: &headers,
    };
    let refused = by_rules(&[&auth], &facts, 1_800_000_000).expect_err("nobody signed it");
    assert!(matches!(refused.status, 401 | 403) && !refused.body.is_empty());
}

/// A NetworkPolicy, from control.
pub fn network_policy(data: &[u8]) {
    match decode::network_policy(data, "NetworkPolicy/shop/policy", "1") {
        Ok(policy) => {
            assert_eq!(&*policy.id, "NetworkPolicy/shop/policy");
            let rules = policy.ingress.iter().chain(&policy.egress).flatten().count();
            assert!(policy.unreadable.is_none() || rules == 0, "an unreadable policy that allows");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// A setting.
pub fn duration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = ztunnel::config::duration(text);
}

/// An identity.
pub fn spiffe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "an identity is written as it was read");
        assert_eq!(SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()).as_ref(), Ok(&id));
    }
}

/// A certificate request, from a node.
pub fn csr(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = tulle_certs::parse_csr(text);
}

/// A bundle of roots.
pub fn roots(data: &[u8]) {
    if let Ok(roots) = Roots::from_pem(data) {
        let again = Roots::from_pem(roots.to_pem().as_bytes()).expect("a bundle that was written can be read");
        assert_eq!(again.certificates(), roots.certificates());
    }
}

/// What the CA answers.
pub fn issued(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(expected) = SpiffeId::new("cluster.local", "shop", "cart") else { return };
    let parts: Vec<String> = text.split("\n\n").map(str::to_owned).collect();
    if let Ok(issued) = Issued::parse(&parts, &expected) {
        assert_eq!(issued.identity, expected);
    }
}

/// A certificate of a peer, before anything is known about it.
pub fn certificate(data: &[u8]) {
    let leaf = rustls_pki_types::CertificateDer::from(data);
    let _ = tulle_certs::leaf_identity(&leaf);
    let _ = tulle_certs::not_after(&leaf);
    let now = rustls_pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_800_000_000));
    if let Ok(roots) = Roots::from_der(vec![leaf.clone().into_owned()]) {
        let _ = tulle_certs::verify_chain(&[leaf], &roots, &tulle_certs::Crls::default(), Usage::Server, now);
    }
}

/// The file that `CRL_PATH` names.
pub fn crl(data: &[u8]) {
    if let Ok(crls) = tulle_certs::Crls::parse(data) {
        // A file of something else must not pass for one that takes nothing back.
        assert_eq!(crls.is_empty(), data.trim_ascii().is_empty());
    }
}

/// A question of a pod, or an answer of a name server.
pub fn dns(data: &[u8]) {
    let Ok(message) = wire::parse(data) else { return };
    let _ = message.lifetime(data);
    let again = wire::parse(&wire::normalised(&message, data)).expect("a question that is written can be read");
    assert_eq!((again.kind, again.class, &again.name), (message.kind, message.class, &message.name));
    let refused = wire::refusal(&message, data, 2, &wire::OwnEdns::default());
    assert!(wire::parse(&refused).is_ok_and(|refused| refused.flags.is_response()));
    if let Some(body) = wire::Body::new(data.to_vec(), message.clone()) {
        for limit in [0, 64, 512, 65_535] {
            let answer = body.respond(&message, data, 1, &wire::OwnEdns::default(), limit);
            assert!(wire::parse(&answer).is_ok(), "an answer cut to {limit} bytes is no message");
        }
    }
}
