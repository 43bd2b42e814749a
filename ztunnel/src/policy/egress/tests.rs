//! Decisions about what leaves: tables of single cases, and a property: whatever the policies and whatever an attempt claims, what
//! is dialled is a name or address that some enforced rule names, and no address inside.

use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Attempt, Spoken, decide, may_dial, may_look_up, needs_first_bytes};
use crate::outcome::Code;
use crate::state::fixtures::{service, snapshot_of_node, workload};
use crate::state::{
    Change, EgressHttp, EgressMode, EgressPath, EgressPolicy, EgressPort, EgressProtocol, EgressRule, HostPattern,
    Snapshot, Workload,
};

fn host(text: &str) -> HostPattern {
    match text.strip_prefix("*.") {
        _ if text == "*" => HostPattern::Any,
        Some(parent) => HostPattern::Below(parent.into()),
        None => HostPattern::Exact(text.into()),
    }
}

fn rule(hosts: &[&str], cidrs: &[&str], ports: &[(u16, EgressProtocol)]) -> EgressRule {
    let port = |(number, protocol): &(u16, EgressProtocol)| EgressPort {
        number: *number,
        protocol: *protocol,
        target: *number,
    };
    EgressRule {
        hosts: hosts.iter().map(|text| host(text)).collect(),
        cidrs: cidrs.iter().map(|text| text.parse().unwrap()).collect(),
        ports: ports.iter().map(port).collect(),
        ..EgressRule::default()
    }
}

fn policy(name: &str, rules: Vec<EgressRule>) -> EgressPolicy {
    EgressPolicy {
        id: format!("EgressPolicy/shop/{name}").into(),
        version: "1".into(),
        record_only: false,
        ceiling: false,
        rules,
        unreadable: None,
    }
}

/// A closed pod, and what it knows.
fn world(policies: Vec<EgressPolicy>) -> (Arc<Snapshot>, Workload) {
    let pod = Workload {
        egress: EgressMode::Deny,
        egress_policies: policies.iter().map(|policy| policy.id.clone()).collect(),
        ..workload("shop", "cart", "10.0.0.1")
    };
    let mut changes: Vec<Change> = policies.into_iter().map(|policy| Change::EgressPolicy(policy.into())).collect();
    changes.push(Change::Workload(Arc::new(pod.clone())));
    changes.push(Change::Service(service("shop", "cart", "10.96.0.1").into()));
    (snapshot_of_node(changes, &["198.51.100.1".parse().unwrap()]), pod)
}

fn name<'a>(host: &'a str, port: u16, spoken: Spoken<'a>) -> Attempt<'a> {
    Attempt { host: Some(host), address: None, port, spoken }
}

fn address<'a>(ip: &str, port: u16, spoken: Spoken<'a>) -> Attempt<'a> {
    Attempt { host: None, address: Some(ip.parse().unwrap()), port, spoken }
}

fn request<'a>(host: &'a str, method: &'a str, path: &'a str) -> Spoken<'a> {
    Spoken::Http { host: Some(host), method, path }
}

#[test]
fn what_no_rule_names_does_not_leave() {
    use EgressProtocol as P;
    let http = EgressHttp { methods: vec!["GET".into()], paths: vec![EgressPath::Below("/v1/".into())] };
    let (snapshot, pod) = world(vec![
        policy("tls", vec![rule(&["api.example", "*.wild.example"], &[], &[(443, P::Tls)])]),
        policy("bytes", vec![rule(&["db.example"], &["192.0.2.0/24"], &[(5432, P::Bytes)])]),
        policy("any", vec![rule(&["any.example"], &["198.51.100.64/26"], &[])]),
        policy("http", vec![EgressRule { http: Some(http), ..rule(&["web.example"], &[], &[(80, P::Http)]) }]),
        EgressPolicy { record_only: true, ..policy("trial", vec![rule(&["*"], &["0.0.0.0/0"], &[])]) },
    ]);
    let tls = |name| Spoken::Tls(Some(name));
    let cases: &[(&str, Attempt<'_>, Option<&str>)] = &[
        ("an allowed host", name("api.example", 443, tls("api.example")), Some("tls")),
        ("below a wildcard", name("a.b.wild.example", 443, tls("a.b.wild.example")), Some("tls")),
        ("the wildcard's own name", name("wild.example", 443, tls("wild.example")), None),
        ("another host", name("evil.example", 443, tls("evil.example")), None),
        ("another port", name("api.example", 8443, tls("api.example")), None),
        ("another name in TLS", name("api.example", 443, tls("evil.example")), None),
        ("an allowed name in TLS for another one", name("evil.example", 443, tls("api.example")), None),
        ("no name in TLS", name("api.example", 443, Spoken::Tls(None)), None),
        ("no TLS", name("api.example", 443, Spoken::Bytes), None),
        ("HTTP where TLS is", name("api.example", 443, request("api.example", "GET", "/")), None),
        ("an address with an allowed name in TLS", address("203.0.113.1", 443, tls("api.example")), None),
        ("an allowed address", address("192.0.2.7", 5432, Spoken::Bytes), Some("bytes")),
        ("an address next to it", address("192.0.3.7", 5432, Spoken::Bytes), None),
        ("bytes to a name", name("db.example", 5432, Spoken::Bytes), Some("bytes")),
        ("TLS to a name of bytes", name("db.example", 5432, tls("db.example")), Some("bytes")),
        ("any port by name needs to be told", name("any.example", 22, Spoken::Bytes), None),
        ("any port by name in TLS", name("any.example", 22, tls("any.example")), Some("any")),
        ("any port by address", address("198.51.100.65", 22, Spoken::Bytes), Some("any")),
        ("a request", name("web.example", 80, request("web.example", "GET", "/v1/x")), Some("http")),
        ("another method", name("web.example", 80, request("web.example", "POST", "/v1/x")), None),
        ("another path", name("web.example", 80, request("web.example", "GET", "/v2/x")), None),
        ("another Host", name("web.example", 80, request("evil.example", "GET", "/v1/x")), None),
        ("bytes where requests are asked for", name("web.example", 80, Spoken::Bytes), None),
        ("what is only recorded", address("203.0.113.9", 80, Spoken::Bytes), None),
    ];
    for (what, attempt, expected) in cases {
        let decided = decide(&snapshot, &pod, attempt);
        let by = decided.as_ref().ok().map(|grant| grant.policy.id.trim_start_matches("EgressPolicy/shop/"));
        assert_eq!(by, *expected, "{what}: {decided:?}");
        if let Err(outcome) = decided {
            assert_eq!(outcome.code, Code::EgressDenied, "{what}");
            assert!(outcome.detail.contains("tulle.dev/egress: deny"), "{what}: {outcome}");
        }
    }
    assert!(
        !needs_first_bytes(&snapshot, &pod, &name("db.example", 5432, Spoken::Bytes)),
        "the server may speak first"
    );
    assert!(needs_first_bytes(&snapshot, &pod, &name("api.example", 443, Spoken::Bytes)));
    assert!(may_look_up(&snapshot, &pod, "x.wild.example").is_ok());
    assert!(may_look_up(&snapshot, &pod, "evil.example").is_err());
}

#[test]
fn a_ceiling_is_a_limit_and_no_grant_and_what_is_missing_lets_nothing_pass() {
    let grant = || policy("grant", vec![rule(&["a.example", "b.example"], &[], &[])]);
    let ceiling = |rules| EgressPolicy { ceiling: true, ..policy("top", rules) };
    let ask = |policies: Vec<EgressPolicy>, host: &str| {
        let (snapshot, pod) = world(policies);
        decide(&snapshot, &pod, &name(host, 443, Spoken::Tls(Some(host)))).map(drop).map_err(|outcome| outcome.code)
    };
    let only_a = || vec![rule(&["a.example"], &[], &[])];
    assert_eq!(ask(vec![grant()], "a.example"), Ok(()));
    assert_eq!(ask(vec![grant(), ceiling(only_a())], "a.example"), Ok(()));
    assert_eq!(ask(vec![grant(), ceiling(only_a())], "b.example"), Err(Code::EgressDenied));
    assert_eq!(ask(vec![ceiling(only_a())], "a.example"), Err(Code::EgressDenied));
    let broken = EgressPolicy { unreadable: Some("x".into()), ..ceiling(Vec::new()) };
    assert_eq!(ask(vec![grant(), broken], "a.example"), Err(Code::EgressDenied));
    let (snapshot, mut pod) = world(vec![grant()]);
    pod.egress_policies.push("EgressPolicy/tulle-system/late".into());
    let attempt = name("a.example", 443, Spoken::Tls(Some("a.example")));
    assert_eq!(decide(&snapshot, &pod, &attempt).unwrap_err().code, Code::PolicyPending);
    assert_eq!(may_look_up(&snapshot, &pod, "a.example").unwrap_err().code, Code::PolicyPending);
}

#[test]
fn a_name_does_not_lead_back_inside() {
    let (snapshot, _) = world(vec![policy("p", Vec::new())]);
    let cases: &[(&[&str], &str, bool)] = &[
        (&[], "203.0.113.1", true),
        (&[], "2001:db8::1", true),
        (&[], "10.1.2.3", false),
        (&["10.0.0.0/8"], "10.1.2.3", true),
        (&["10.0.0.0/8"], "10.0.0.1", false),
        (&["10.0.0.0/8"], "10.96.0.1", false),
        (&["0.0.0.0/0"], "127.0.0.1", false),
        (&["127.0.0.0/8"], "127.0.0.1", false),
        (&["0.0.0.0/0"], "169.254.169.254", false),
        (&["169.254.169.254/32"], "169.254.169.254", true),
        (&["0.0.0.0/0"], "198.51.100.1", false),
        (&["198.51.100.1/32"], "198.51.100.1", true),
        (&[], "168.63.129.16", false),
        (&["168.63.129.16/32"], "168.63.129.16", true),
        (&["::/0"], "fd00:ec2::254", false),
        (&["::/0"], "::1", false),
        (&["::/0"], "::ffff:127.0.0.1", false),
        (&["::/0"], "64:ff9b::a9fe:a9fe", false),
        (&[], "64:ff9b::a9fe:a9fe", false),
        (&["240.0.0.0/4", "0.0.0.0/0"], "240.240.0.1", false),
        (&["::/0"], "2001:2::7", false),
    ];
    for (cidrs, ip, expected) in cases {
        let rule = rule(&["x.example"], cidrs, &[]);
        let found = may_dial(&snapshot, "", &rule, ip.parse().unwrap());
        assert_eq!(found.is_ok(), *expected, "{cidrs:?} {ip}: {found:?}");
    }
}

const NAMES: [&str; 6] = ["a.example", "b.a.example", "example", "xa.example", "a.example.evil", "*.example"];
const NETS: [&str; 6] =
    ["203.0.113.0/25", "203.0.113.7/32", "10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", "169.254.0.0/16"];
const IPS: [&str; 8] = [
    "203.0.113.7",
    "203.0.113.200",
    "10.0.0.1",
    "10.3.3.3",
    "169.254.169.254",
    "2001:db8::7",
    "127.0.0.1",
    "198.51.100.1",
];
const PROTOCOLS: [EgressProtocol; 5] =
    [EgressProtocol::Detected, EgressProtocol::Bytes, EgressProtocol::Tls, EgressProtocol::Http, EgressProtocol::Https];

fn rules() -> impl Strategy<Value = Vec<EgressRule>> {
    let hosts = prop::collection::vec(prop::sample::select(&NAMES[..]), 0..3);
    let nets = prop::collection::vec(prop::sample::select(&NETS[..]), 0..2);
    let ports =
        prop::collection::vec((prop::sample::select(&[80u16, 443][..]), prop::sample::select(&PROTOCOLS[..])), 0..3);
    prop::collection::vec((hosts, nets, ports).prop_map(|(hosts, nets, ports)| rule(&hosts, &nets, &ports)), 0..4)
}

/// Written for this test alone: does the text of a rule name this host?
fn names(rule: &EgressRule, host: &str) -> bool {
    rule.hosts.iter().any(|pattern| match pattern {
        HostPattern::Any => true,
        HostPattern::Exact(own) => **own == *host,
        HostPattern::Below(parent) => {
            let (own, theirs): (Vec<&str>, Vec<&str>) = (parent.split('.').collect(), host.split('.').collect());
            theirs.len() > own.len() && theirs[theirs.len() - own.len()..] == own[..]
        }
    })
}

proptest! {
    #[test]
    fn no_name_or_address_outside_policy_is_ever_dialled(
        sets in prop::collection::vec((rules(), any::<bool>(), any::<bool>()), 0..4),
        host in prop::option::of(prop::sample::select(&NAMES[..5])),
        claimed in prop::option::of(prop::sample::select(&NAMES[..5])),
        dialled in prop::sample::select(&IPS[..]),
        resolved in prop::sample::select(&IPS[..]),
        port in prop::sample::select(&[80u16, 443, 22][..]),
        speech in 0u8..3,
    ) {
        let policies = sets.into_iter().enumerate().map(|(index, (rules, record_only, ceiling))| {
            EgressPolicy { record_only, ceiling, ..policy(&index.to_string(), rules) }
        });
        let (snapshot, pod) = world(policies.collect());
        let spoken = match speech {
            0 => Spoken::Bytes,
            1 => Spoken::Tls(claimed),
            _ => Spoken::Http { host: claimed, method: "GET", path: "/" },
        };
        let address = host.is_none().then(|| dialled.parse::<IpAddr>().unwrap());
        let attempt = Attempt { host, address, port, spoken };
        let Ok(grant) = decide(&snapshot, &pod, &attempt) else { return Ok(()) };
        // What the caller dials: its own resolution of the name, or the address.
        let target = address.unwrap_or_else(|| resolved.parse().unwrap());
        if may_dial(&snapshot, "", grant.rule(), target).is_err() {
            return Ok(());
        }
        prop_assert!(!grant.policy.record_only && !grant.policy.ceiling);
        let covers = |rule: &EgressRule| rule.cidrs.iter().any(|net| net.contains(&target));
        match host {
            Some(host) => {
                prop_assert!(names(grant.rule(), host));
                // Nothing that the client claims is another name.
                prop_assert!(speech == 0 || claimed.is_none_or(|claimed| claimed == host));
            }
            None => prop_assert!(covers(grant.rule())),
        }
        let here = grant.rule().ports.is_empty() || grant.rule().ports.iter().any(|one| one.number == port);
        prop_assert!(here);
        prop_assert!(!["10.0.0.1", "127.0.0.1"].contains(&target.to_string().as_str()), "inside");
        let special = ["10.3.3.3", "169.254.169.254", "198.51.100.1"].contains(&target.to_string().as_str());
        prop_assert!(!special || covers(grant.rule()), "private without being named");
        for id in &pod.egress_policies {
            let policy = snapshot.egress_policy(id).unwrap();
            if policy.ceiling && !policy.record_only {
                let within = policy.rules.iter().any(|rule| match host {
                    Some(host) => names(rule, host),
                    None => covers(rule),
                });
                prop_assert!(within, "above a ceiling");
            }
        }
    }
}
