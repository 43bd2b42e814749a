//! Policies of one request, from the wire to the verdict: HTTP fields of AuthorizationPolicies, and tokens.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use prost::Message;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256};
use serde_json::json;
use tulle_certs::SpiffeId;
use tulle_proto::mesh;
use tulle_proto::names;
use tulle_proto::security;
use tulle_proto::security::string_match::MatchType;
use tulle_proto::tulle_workload::WorkloadInfo;
use tulle_proto::workload as wds;
use ztunnel::policy::jwt::{self, Authenticated, TokenRefused};
use ztunnel::policy::{self, Code, Facts, HttpFacts, Verdict};
use ztunnel::route::RequestFacts;
use ztunnel::state::{Change, RequestAuth, Snapshot, Workload, store};
use ztunnel::xds::decode::{self, Strings};

const NOW: i64 = 1_800_000_000;
const ISSUER: &str = "https://issuer";

fn text(text: &str) -> security::StringMatch {
    let matched = match (text, text.strip_suffix('*'), text.strip_prefix('*')) {
        ("*", ..) => MatchType::Presence(()),
        (_, Some(prefix), _) => MatchType::Prefix(prefix.into()),
        (_, _, Some(suffix)) => MatchType::Suffix(suffix.into()),
        (exact, ..) => MatchType::Exact(exact.into()),
    };
    security::StringMatch { match_type: Some(matched) }
}

fn group(any: &[&str], none: &[&str]) -> Option<mesh::TextGroup> {
    Some(mesh::TextGroup { any: any.iter().map(|t| text(t)).collect(), none: none.iter().map(|t| text(t)).collect() })
}

fn paths(any: &[&str], none: &[&str]) -> Option<mesh::PathGroup> {
    use mesh::path_match::Path;
    let path = |path: &&str| mesh::PathMatch {
        path: Some(match path.contains('{') {
            true => Path::Template((*path).to_owned()),
            false => Path::Text(text(path)),
        }),
    };
    Some(mesh::PathGroup { any: any.iter().map(path).collect(), none: none.iter().map(path).collect() })
}

/// A policy whose rules are of one match each, with a plain form that allows nothing and denies all.
fn policy_of(name: &str, action: security::Action, matches: Vec<mesh::HttpMatch>) -> Change {
    let plain = match action {
        security::Action::Allow => security::Clause { matches: vec![security::Match::default()] },
        security::Action::Deny | security::Action::Audit => security::Clause::default(),
    };
    let count = matches.len();
    let rule = |matched| mesh::HttpRule { clauses: vec![mesh::HttpClause { matches: vec![matched] }] };
    let http = mesh::HttpAuthorization { rules: matches.into_iter().map(rule).collect() };
    let value = http.encode_to_vec();
    let config = prost_types::Any { type_url: names::TYPE_HTTP_AUTHORIZATION.into(), value };
    decoded(name, action, vec![security::Rule { clauses: vec![plain] }; count], config)
}

fn decoded(name: &str, action: security::Action, rules: Vec<security::Rule>, config: prost_types::Any) -> Change {
    let message = security::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: action.into(),
        rules,
        extensions: vec![security::Extension { name: names::EXTENSION_L7.into(), config: Some(config) }],
        ..Default::default()
    };
    let policy = decode::authorization(&message.encode_to_vec(), &format!("shop/{name}"), "1").unwrap();
    Change::Policy(Arc::new(policy))
}

fn snapshot(changes: Vec<Change>, request_auths: &[&str]) -> (Arc<Snapshot>, Arc<Workload>) {
    let info = WorkloadInfo {
        request_auths: request_auths.iter().map(|name| format!("RequestAuthentication/shop/{name}")).collect(),
        ..Default::default()
    };
    let config = prost_types::Any { type_url: names::TYPE_WORKLOAD_INFO.into(), value: info.encode_to_vec() };
    let pod = wds::Workload {
        uid: "k//Pod/shop/cart".into(),
        name: "cart".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        addresses: vec![vec![10, 0, 0, 2].into()],
        extensions: vec![wds::Extension { name: names::EXTENSION_WORKLOAD.into(), config: Some(config) }],
        ..Default::default()
    };
    let address = wds::Address { r#type: Some(wds::address::Type::Workload(pod)) };
    let (mut writer, reader) = store();
    writer.apply([decode::address(&address.encode_to_vec(), "1", &mut Strings::default()).unwrap()], 1);
    writer.apply(changes.into_iter().chain([Change::PoliciesSynced, Change::AddressesSynced]), 1);
    let snapshot = reader.load();
    let workload = snapshot.workload("k//Pod/shop/cart").unwrap().clone();
    (snapshot, workload)
}

fn headers(of: &[(&str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&str, &str)| {
        (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap())
    };
    of.iter().map(pair).collect()
}

fn request<'a>(method: &'a str, authority: &'a str, target: &'a str, headers: &'a HeaderMap) -> RequestFacts<'a> {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    RequestFacts { method, scheme: "http", authority, port: 80, path, query, headers }
}

fn judge(snapshot: &Snapshot, pod: &Workload, request: RequestFacts<'_>, token: Option<&jwt::Token>) -> Verdict {
    let web = SpiffeId::new("cluster.local", "shop", "web").unwrap();
    let connection = Facts {
        source_identity: Some(&web),
        source_ip: [10, 0, 0, 1].into(),
        destination: pod,
        destination_ip: [10, 0, 0, 2].into(),
        destination_port: 80,
        foreign: false,
    };
    policy::evaluate_request(snapshot, &HttpFacts { connection, request, token })
}

#[test]
fn each_http_field_allows_what_it_says() {
    let m = mesh::HttpMatch::default;
    let of_header =
        |any: &[&str], none: &[&str]| vec![mesh::HeaderGroup { name: "x-env".into(), values: group(any, none) }];
    // What the rule says; method, authority, target, header; whether it is allowed.
    type Case = (mesh::HttpMatch, &'static str, &'static str, &'static str, &'static str, bool);
    let cases: Vec<Case> = vec![
        (m(), "GET", "cart", "/", "", false),
        (mesh::HttpMatch { methods: group(&["GET"], &[]), ..m() }, "GET", "cart", "/", "", true),
        (mesh::HttpMatch { methods: group(&["GET"], &[]), ..m() }, "get", "cart", "/", "", false),
        (mesh::HttpMatch { methods: group(&[], &["DELETE"]), ..m() }, "DELETE", "cart", "/", "", false),
        (mesh::HttpMatch { methods: group(&[], &["DELETE"]), ..m() }, "GET", "cart", "/", "", true),
        (mesh::HttpMatch { paths: paths(&["/api/*"], &["/api/admin*"]), ..m() }, "GET", "cart", "/api/x?y", "", true),
        (
            mesh::HttpMatch { paths: paths(&["/api/*"], &["/api/admin*"]), ..m() },
            "GET",
            "cart",
            "/api/admin",
            "",
            false,
        ),
        (mesh::HttpMatch { paths: paths(&["*.html"], &[]), ..m() }, "GET", "cart", "/a/b.html", "", true),
        (mesh::HttpMatch { paths: paths(&["/v/{*}/x"], &[]), ..m() }, "GET", "cart", "/v/1/x", "", true),
        (mesh::HttpMatch { paths: paths(&["/v/{*}/x"], &[]), ..m() }, "GET", "cart", "/v//x", "", false),
        (mesh::HttpMatch { paths: paths(&["/v/{*}/x"], &[]), ..m() }, "GET", "cart", "/v/1/2/x", "", false),
        (mesh::HttpMatch { paths: paths(&["/v/{**}"], &[]), ..m() }, "GET", "cart", "/v/1/2", "", true),
        (mesh::HttpMatch { paths: paths(&["/v/{**}"], &[]), ..m() }, "GET", "cart", "/v", "", true),
        (mesh::HttpMatch { paths: paths(&["/v/{**}"], &[]), ..m() }, "GET", "cart", "/vv", "", false),
        (mesh::HttpMatch { hosts: group(&["cart.shop"], &[]), ..m() }, "GET", "Cart.Shop:8080", "/", "", true),
        (mesh::HttpMatch { hosts: group(&["cart.shop:80"], &[]), ..m() }, "GET", "cart.shop:8080", "/", "", false),
        (mesh::HttpMatch { hosts: group(&["*"], &["cart.*"]), ..m() }, "GET", "cart.shop", "/", "", false),
        (mesh::HttpMatch { headers: of_header(&["prod"], &[]), ..m() }, "GET", "cart", "/", "prod", true),
        (mesh::HttpMatch { headers: of_header(&["prod"], &[]), ..m() }, "GET", "cart", "/", "", false),
        (mesh::HttpMatch { headers: of_header(&[], &["test"]), ..m() }, "GET", "cart", "/", "", true),
        (mesh::HttpMatch { headers: of_header(&[], &["test"]), ..m() }, "GET", "cart", "/", "test", false),
        (mesh::HttpMatch { request_principals: group(&["*"], &[]), ..m() }, "GET", "cart", "/", "", false),
        (mesh::HttpMatch { request_principals: group(&[], &["*"]), ..m() }, "GET", "cart", "/", "", true),
        (mesh::HttpMatch { trust_domains: group(&["cluster.local"], &[]), ..m() }, "GET", "cart", "/", "", true),
        (
            mesh::HttpMatch {
                connection: Some(security::Match { namespaces: vec![text("other")], ..Default::default() }),
                methods: group(&["GET"], &[]),
                ..m()
            },
            "GET",
            "cart",
            "/",
            "",
            false,
        ),
    ];
    for (rule, method, authority, target, env, expected) in cases {
        let sent = [("x-env", env)];
        let headers = headers(if env.is_empty() { &[] } else { &sent });
        let request = request(method, authority, target, &headers);
        let (allowing, pod) = snapshot(vec![policy_of("p", security::Action::Allow, vec![rule.clone()])], &[]);
        let (denying, same) = snapshot(vec![policy_of("p", security::Action::Deny, vec![rule.clone()])], &[]);
        assert!(policy::needs_http(&allowing, &pod));
        let verdict = judge(&allowing, &pod, request, None);
        assert_eq!(verdict.allowed, expected, "{rule:?} {request:?}");
        assert_eq!(verdict.rule, expected.then_some(0));
        assert_eq!(judge(&denying, &same, request, None).allowed, !expected, "DENY {rule:?} {request:?}");
    }
}

#[test]
fn what_an_application_may_read_in_several_ways_is_read_as_denies_more() {
    let hosts = |any: &[&str], none: &[&str]| mesh::HttpMatch { hosts: group(any, none), ..Default::default() };
    let header = |name: &str, any: &[&str], none: &[&str]| mesh::HttpMatch {
        headers: vec![mesh::HeaderGroup { name: name.into(), values: group(any, none) }],
        ..Default::default()
    };
    let twice = [("x-env", "prod"), ("x-env", "test")];
    let same = [("x-env", "prod"), ("x-env", "prod")];
    // What the rule says, authority, headers. Neither an ALLOW nor a DENY policy of it lets the request in.
    type Case<'a> = (mesh::HttpMatch, &'a str, &'a [(&'a str, &'a str)]);
    let cases: [Case<'_>; 8] = [
        (hosts(&["admin.shop"], &[]), "Admin.shop.:80", &[]),
        (hosts(&["*"], &["admin.shop"]), "admin.shop.", &[]),
        (hosts(&["*.shop"], &[]), "admin.shop.", &[]),
        (header("x-env", &["prod"], &[]), "cart", &twice),
        (header("x-env", &["prod"], &[]), "cart", &same),
        (header("x-env", &["prod*"], &[]), "cart", &twice),
        (header("x-env", &["*"], &["test"]), "cart", &twice),
        (header("host", &["admin"], &[]), "ADMIN", &[]),
    ];
    for (rule, authority, sent) in cases {
        let headers = headers(sent);
        let request = request("GET", authority, "/", &headers);
        let (allowing, pod) = snapshot(vec![policy_of("p", security::Action::Allow, vec![rule.clone()])], &[]);
        let (denying, same) = snapshot(vec![policy_of("p", security::Action::Deny, vec![rule.clone()])], &[]);
        assert!(!judge(&allowing, &pod, request, None).allowed, "ALLOW {rule:?} {request:?}");
        assert!(!judge(&denying, &same, request, None).allowed, "DENY {rule:?} {request:?}");
    }
}

#[test]
fn a_denial_comes_first_and_names_policy_and_rule() {
    let all = mesh::HttpMatch { methods: group(&["*"], &[]), ..Default::default() };
    let admin = mesh::HttpMatch { paths: paths(&["/admin*"], &[]), ..Default::default() };
    let other = mesh::HttpMatch { paths: paths(&["/x"], &[]), ..Default::default() };
    let changes = vec![
        policy_of("allow", security::Action::Allow, vec![all]),
        policy_of("deny", security::Action::Deny, vec![other, admin]),
    ];
    let (snapshot, pod) = snapshot(changes, &[]);
    let none = HeaderMap::new();
    let verdict = judge(&snapshot, &pod, request("GET", "cart", "/admin/x", &none), None);
    assert_eq!(
        (verdict.code, verdict.policy.as_deref(), verdict.rule),
        (Code::PolicyDenied, Some("shop/deny"), Some(1))
    );
    let verdict = judge(&snapshot, &pod, request("GET", "cart", "/", &none), None);
    assert_eq!((verdict.allowed, verdict.policy.as_deref()), (true, Some("shop/allow")));
}

#[test]
fn where_the_http_form_cannot_be_used_the_plain_form_decides() {
    let good = mesh::HttpAuthorization { rules: vec![mesh::HttpRule::default()] }.encode_to_vec();
    let unknown_field = [good.clone(), vec![0x78, 1]].concat();
    let one_rule_too_many = mesh::HttpAuthorization { rules: vec![mesh::HttpRule::default(); 2] }.encode_to_vec();
    let bad_template = mesh::HttpAuthorization {
        rules: vec![mesh::HttpRule {
            clauses: vec![mesh::HttpClause {
                matches: vec![mesh::HttpMatch { paths: paths(&["/{**}/x"], &[]), ..Default::default() }],
            }],
        }],
    };
    let none = HeaderMap::new();
    let never = security::Rule { clauses: vec![security::Clause { matches: vec![security::Match::default()] }] };
    for (what, bytes, used) in [
        ("good", good, true),
        ("a field of a later version", unknown_field, false),
        ("another number of rules", one_rule_too_many, false),
        ("a template that is none", bad_template.encode_to_vec(), false),
        ("no protobuf", vec![0xff], false),
    ] {
        let config = prost_types::Any { type_url: names::TYPE_HTTP_AUTHORIZATION.into(), value: bytes };
        let change = decoded("p", security::Action::Allow, vec![never.clone()], config);
        let (snapshot, pod) = snapshot(vec![change], &[]);
        assert_eq!(policy::needs_http(&snapshot, &pod), used, "{what}");
        // A rule without clauses allows all, and what is left of it nothing.
        assert_eq!(judge(&snapshot, &pod, request("GET", "cart", "/", &none), None).allowed, used, "{what}");
    }
}

struct Issuer {
    key: EncodingKey,
    alg: Algorithm,
    jwk: serde_json::Value,
}

impl Issuer {
    fn new(alg: Algorithm, kid: &str) -> Self {
        let kind = match alg {
            Algorithm::ES256 => &PKCS_ECDSA_P256_SHA256,
            Algorithm::RS256 => &PKCS_RSA_SHA256,
            _ => &PKCS_ED25519,
        };
        let pair = KeyPair::generate_for(kind).unwrap();
        let key = match alg {
            Algorithm::ES256 => EncodingKey::from_ec_der(&pair.serialize_der()),
            Algorithm::RS256 => EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes()).unwrap(),
            _ => EncodingKey::from_ed_der(&pair.serialize_der()),
        };
        let mut jwk = match alg {
            Algorithm::EdDSA => json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(pair.public_key_raw())}),
            _ => serde_json::to_value(Jwk::from_encoding_key(&key, alg).unwrap()).unwrap(),
        };
        jwk["kid"] = json!(kid);
        Self { key, alg, jwk }
    }

    fn sign(&self, kid: Option<&str>, claims: serde_json::Value) -> String {
        let header = Header { kid: kid.map(str::to_owned), ..Header::new(self.alg) };
        jsonwebtoken::encode(&header, &claims, &self.key).unwrap()
    }
}

fn base64url(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect::<Vec<u8>>();
    let letter = |six: &[u8]| (0..6).fold(0, |all, bit| all << 1 | six.get(bit).copied().unwrap_or(0));
    bits.chunks(6).map(|six| char::from(LETTERS[usize::from(letter(six))])).collect()
}

fn jwt_rule(keys: &[&Issuer]) -> mesh::JwtRule {
    let keys: Vec<_> = keys.iter().map(|issuer| issuer.jwk.clone()).chain([json!({"kty": "later"})]).collect();
    mesh::JwtRule { issuer: ISSUER.into(), jwks: json!({ "keys": keys }).to_string(), ..Default::default() }
}

fn auth(rules: Vec<mesh::JwtRule>) -> RequestAuth {
    let message = mesh::RequestAuth { namespace: "shop".into(), name: "users".into(), rules, ..Default::default() };
    decode::request_auth(&message.encode_to_vec(), "RequestAuthentication/shop/users", "1").unwrap()
}

fn check(auth: &RequestAuth, target: &str, of: &[(&str, &str)]) -> Result<Authenticated, TokenRefused> {
    let headers = headers(of);
    jwt::by_rules(&[auth], &request("GET", "cart", target, &headers), NOW)
}

/// The subject, or the status and a part of the answer's body.
type Expected = Result<&'static str, (u16, &'static str)>;

#[test]
fn a_token_is_valid_or_refused_as_envoy_would() {
    let (ec, ed, other) =
        (Issuer::new(Algorithm::ES256, "ec"), Issuer::new(Algorithm::EdDSA, "ed"), Issuer::new(Algorithm::ES256, "ec"));
    let rsa = Issuer::new(Algorithm::RS256, "rsa");
    let auth = auth(vec![mesh::JwtRule { audiences: vec!["cart".into()], ..jwt_rule(&[&ec, &ed, &rsa]) }]);
    let claims = |extra: serde_json::Value| {
        let mut claims = json!({"iss": ISSUER, "sub": "ann", "aud": ["x", "cart"], "exp": NOW + 10});
        claims.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        claims
    };
    let good = ec.sign(Some("ec"), claims(json!({})));
    let (head, signature) = good.rsplit_once('.').unwrap();
    let forged = {
        let payload = other.sign(None, claims(json!({"sub": "root"})));
        let payload = payload.split('.').nth(1).unwrap().to_owned();
        format!("{}.{payload}.{signature}", head.split('.').next().unwrap())
    };
    let unsigned = "eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwczovL2lzc3VlciJ9.";
    let shared = {
        let key = EncodingKey::from_secret(ec.jwk["x"].as_str().unwrap().as_bytes());
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims(json!({})), &key).unwrap()
    };
    let cases: Vec<(&str, String, Expected)> = vec![
        ("ES256", good.clone(), Ok("https://issuer/ann")),
        ("EdDSA", ed.sign(Some("ed"), claims(json!({}))), Ok("https://issuer/ann")),
        ("RS256", rsa.sign(Some("rsa"), claims(json!({}))), Ok("https://issuer/ann")),
        ("no kid", ed.sign(None, claims(json!({}))), Ok("https://issuer/ann")),
        ("within the skew", ec.sign(None, claims(json!({"exp": NOW - 59, "nbf": NOW + 59}))), Ok("https://issuer/ann")),
        ("one audience", ec.sign(None, claims(json!({"aud": "cart"}))), Ok("https://issuer/ann")),
        ("expired", ec.sign(None, claims(json!({"exp": NOW - 61}))), Err((401, "Jwt is expired"))),
        ("too early", ec.sign(None, claims(json!({"nbf": NOW + 61}))), Err((401, "Jwt not yet valid"))),
        ("no time", ec.sign(None, claims(json!({"exp": "soon"}))), Err((401, "Jwt payload is an invalid JSON"))),
        ("wrong audience", ec.sign(None, claims(json!({"aud": "x"}))), Err((403, "Audiences in Jwt are not allowed"))),
        ("wrong issuer", ec.sign(None, claims(json!({"iss": "x"}))), Err((401, "Jwt issuer is not configured"))),
        ("another key of that name", other.sign(Some("ec"), claims(json!({}))), Err((401, "Jwt verification fails"))),
        (
            "a key that is not there",
            ec.sign(Some("z"), claims(json!({}))),
            Err((401, "Jwks doesn't have key to match kid or alg from Jwt")),
        ),
        ("another payload", forged, Err((401, "Jwt verification fails"))),
        ("no signature", unsigned.into(), Err((401, "Jwt header [alg] is not supported"))),
        ("a public key as a secret", shared, Err((401, "Jwt header [alg] is not supported"))),
        (
            "two parts",
            "a.b".into(),
            Err((401, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")),
        ),
        ("no JSON", "a.b.c".into(), Err((401, "Jwt header is an invalid JSON"))),
    ];
    for (what, token, expected) in cases {
        let found = check(&auth, "/a?b", &[("authorization", &format!("Bearer {token}"))]);
        match (found, expected) {
            (Ok(found), Ok(principal)) => {
                assert_eq!(found.token.unwrap().principal().as_deref(), Some(principal), "{what}")
            }
            (Err(refused), Err((status, body))) => {
                assert_eq!((refused.status, refused.body), (status, body), "{what}");
                assert_eq!(refused.challenge, "Bearer realm=\"http://cart/a\", error=\"invalid_token\"");
            }
            (found, _) => panic!("{what}: {found:?}"),
        }
    }
    assert_eq!(check(&auth, "/", &[]).unwrap().token, None, "without a token a request passes");
    assert_eq!(check(&auth, "/", &[("authorization", "Basic eA==")]).unwrap().token, None);
    assert!(check(&auth, &format!("/?access_token={good}"), &[]).unwrap().token.is_some());
    assert!(check(&auth, "/", &[("authorization", "bearer x")]).is_err(), "any spelling of the word is a token");
}

#[test]
fn a_token_is_looked_for_where_its_rule_says_and_its_headers_are_nobody_elses() {
    let issuer = Issuer::new(Algorithm::ES256, "k");
    let auth = auth(vec![mesh::JwtRule {
        from_headers: vec![mesh::JwtHeader { name: "x-token".into(), prefix: "T ".into() }],
        from_cookies: vec!["session".into()],
        payload_header: "x-payload".into(),
        claim_headers: vec![mesh::ClaimHeader { header: "x-role".into(), claim: vec!["realm".into(), "role".into()] }],
        ..jwt_rule(&[&issuer])
    }]);
    let token = issuer.sign(None, json!({"iss": ISSUER, "sub": "ann", "realm": {"role": "admin"}}));
    let with_header = [("x-token", &*format!("T {token}")), ("x-role", "root")];
    let passed = check(&auth, "/", &with_header).unwrap();
    let mut seen = headers(&with_header);
    passed.on_request(&mut seen);
    assert_eq!((seen.get("x-token"), seen["x-role"].to_str().unwrap()), (None, "admin"));
    assert_eq!(seen["x-payload"].to_str().unwrap(), token.split('.').nth(1).unwrap());
    assert!(check(&auth, "/", &[("cookie", &format!("a=b; session={token}"))]).unwrap().token.is_some());
    let elsewhere = check(&auth, "/", &[("authorization", &format!("Bearer {token}"))]).unwrap();
    assert_eq!(elsewhere.token, None);
    let mut spoofed = headers(&[("x-role", "root"), ("x-payload", "e30"), ("x_role", "root")]);
    elsewhere.on_request(&mut spoofed);
    assert!(spoofed.is_empty(), "what only a token may set is taken from a client that has none");
}

#[test]
fn claims_decide_and_what_has_not_arrived_refuses() {
    let issuer = Issuer::new(Algorithm::ES256, "k");
    let auth = auth(vec![jwt_rule(&[&issuer])]);
    let claim = |name: &[&str], any: &[&str]| mesh::HttpMatch {
        claims: vec![mesh::ClaimGroup {
            claim: name.iter().map(|n| (*n).to_owned()).collect(),
            values: group(any, &[]),
        }],
        ..Default::default()
    };
    let none = HeaderMap::new();
    let cases = [
        (claim(&["role"], &["admin"]), json!({"role": "admin"}), true),
        (claim(&["role"], &["admin"]), json!({"role": ["x", "admin"]}), true),
        (claim(&["role"], &["admin"]), json!({"role": {"admin": 1}}), false),
        (claim(&["a", "b"], &["x*"]), json!({"a": {"b": "xy"}}), true),
        (claim(&["scope"], &["write"]), json!({"scope": "read write"}), true),
        (claim(&["role"], &["write"]), json!({"role": "read write"}), false),
        (
            mesh::HttpMatch { request_principals: group(&["https://issuer/*"], &[]), ..Default::default() },
            json!({}),
            true,
        ),
        (mesh::HttpMatch { presenters: group(&["app"], &[]), ..Default::default() }, json!({"azp": "app"}), true),
        (mesh::HttpMatch { audiences: group(&["b"], &[]), ..Default::default() }, json!({"aud": ["a", "b"]}), true),
    ];
    for (rule, extra, expected) in cases {
        let mut claims = json!({"iss": ISSUER, "sub": "ann"});
        claims.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let passed =
            check(&auth, "/", &[("authorization", &format!("Bearer {}", issuer.sign(None, claims.clone())))]).unwrap();
        let allow = policy_of("p", security::Action::Allow, vec![rule.clone()]);
        let (snapshot, pod) = snapshot(vec![allow, Change::RequestAuth(Arc::new(auth.clone()))], &["users"]);
        let verdict = judge(&snapshot, &pod, request("GET", "cart", "/", &none), passed.token.as_ref());
        assert_eq!(verdict.allowed, expected, "{rule:?} {claims}");
        assert!(!judge(&snapshot, &pod, request("GET", "cart", "/", &none), None).allowed, "without a token");
    }
    let (snapshot, pod) = snapshot(Vec::new(), &["users"]);
    assert!(policy::needs_http(&snapshot, &pod));
    assert_eq!(judge(&snapshot, &pod, request("GET", "cart", "/", &none), None).code, Code::PolicyPending);
}

#[test]
fn one_that_cannot_be_read_refuses_every_token() {
    let message = mesh::RequestAuth {
        namespace: "shop".into(),
        name: "users".into(),
        unreadable: "no issuer".into(),
        ..Default::default()
    };
    let auth = decode::request_auth(&message.encode_to_vec(), "RequestAuthentication/shop/users", "1").unwrap();
    let token = Issuer::new(Algorithm::ES256, "k").sign(None, json!({"iss": ISSUER}));
    let refused = check(&auth, "/", &[("authorization", &format!("Bearer {token}"))]).unwrap_err();
    assert_eq!((refused.status, refused.by.as_deref()), (401, Some("RequestAuthentication/shop/users")));
    assert!(check(&auth, "/", &[]).is_ok());
}
