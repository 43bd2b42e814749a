//! The edges of the algebra, one row each, and what a verdict says about them.
//!
//! The property test in `reference` covers the middle; here are the cases that people argue about.

use std::sync::Arc;

use crate::policy::{Code, Facts, WouldBe, evaluate, evaluated};
use crate::state::fixtures::{identity, policy, snapshot, workload};
use crate::state::{Action, Change, Clause, Match, Policy, Rule, Scope, ServiceAccount, StringMatch, Workload, store};

/// Evaluates plaintext or `spiffe://cluster.local/ns/shop/sa/<account>` to cart-0, port 8080, under `policies`.
fn verdict(policies: Vec<Policy>, destination: &Workload, account: Option<&str>) -> crate::policy::Verdict {
    let snapshot = snapshot(policies.into_iter().map(|policy| Change::Policy(Arc::new(policy))));
    let source = account.map(|account| identity("shop", account));
    evaluate(&snapshot, &facts(destination, source.as_ref()))
}

fn facts<'a>(destination: &'a Workload, source: Option<&'a tulle_certs::SpiffeId>) -> Facts<'a> {
    Facts {
        source_identity: source,
        source_ip: "10.0.0.7".parse().unwrap(),
        destination,
        destination_ip: "10.0.0.9".parse().unwrap(),
        destination_port: 8080,
        foreign: source.is_some_and(|id| id.trust_domain() != destination.identity.trust_domain()),
    }
}

fn cart() -> Workload {
    workload("shop", "cart-0", "10.0.0.9")
}

fn principal(account: &str) -> Match {
    let exact = format!("cluster.local/ns/shop/sa/{account}");
    Match { principals: vec![StringMatch::Exact(exact.into())], ..Match::default() }
}

fn namespaced(name: &str, action: Action, only: Match) -> Policy {
    policy("shop", name, Scope::Namespace, action, Some(only))
}

fn with_rules(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
    Policy { rules, ..policy("shop", name, Scope::Namespace, action, None) }
}

fn ruled(only: Match) -> Rule {
    Rule { clauses: vec![clause(vec![only])], unknown: false }
}

fn clause(matches: Vec<Match>) -> Clause {
    Clause { matches, unknown: false }
}

#[test]
fn the_edges_of_the_algebra() {
    use Action::{Allow, Deny};
    let empty_rule = || vec![Rule::default()];
    let empty_clause = || vec![Rule { clauses: vec![clause(vec![])], unknown: false }];
    let empty_match = || vec![Rule { clauses: vec![clause(vec![Match::default()])], unknown: false }];
    let unknown = || Match { unknown: true, ..Match::default() };
    let not_presence = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let web = Some("web");
    let cases: Vec<(&str, Vec<Policy>, Option<&str>, Code)> = vec![
        ("no policy", vec![], web, Code::NoPolicy),
        ("ALLOW without rules denies all", vec![with_rules("a", Allow, vec![])], web, Code::NotAllowed),
        ("DENY without rules does nothing", vec![with_rules("d", Deny, vec![])], web, Code::NoPolicy),
        ("an empty rule matches all", vec![with_rules("a", Allow, empty_rule())], None, Code::Allowed),
        ("an empty clause is true", vec![with_rules("a", Allow, empty_clause())], None, Code::Allowed),
        ("an empty match is false in ALLOW", vec![with_rules("a", Allow, empty_match())], web, Code::NotAllowed),
        ("an empty match is false in DENY", vec![with_rules("d", Deny, empty_match())], web, Code::NoPolicy),
        ("an unknown attribute fails in ALLOW", vec![namespaced("a", Allow, unknown())], web, Code::NotAllowed),
        ("an unknown attribute holds in DENY", vec![namespaced("d", Deny, unknown())], web, Code::PolicyDenied),
        (
            "an unknown attribute beside one that fails",
            vec![namespaced("d", Deny, Match { unknown: true, ..principal("cart") })],
            web,
            Code::NoPolicy,
        ),
        ("ALLOW for it", vec![namespaced("a", Allow, principal("web"))], web, Code::Allowed),
        ("ALLOW for another", vec![namespaced("a", Allow, principal("cart"))], web, Code::NotAllowed),
        ("plaintext has no principal", vec![namespaced("a", Allow, principal("web"))], None, Code::NotAllowed),
        (
            "DENY before ALLOW",
            vec![namespaced("a", Allow, principal("web")), namespaced("d", Deny, principal("web"))],
            web,
            Code::PolicyDenied,
        ),
        (
            "one ALLOW of several is enough",
            vec![namespaced("a", Allow, principal("cart")), namespaced("b", Allow, principal("web"))],
            web,
            Code::Allowed,
        ),
        ("strict denies plaintext", vec![namespaced("d", Deny, not_presence.clone())], None, Code::PolicyDenied),
        ("strict lets mTLS pass", vec![namespaced("d", Deny, not_presence)], web, Code::NoPolicy),
        (
            "plaintext is in the namespace with no name",
            vec![namespaced(
                "d",
                Deny,
                Match { not_namespaces: vec![StringMatch::Exact("shop".into())], ..Match::default() },
            )],
            None,
            Code::PolicyDenied,
        ),
        (
            "another namespace's policy",
            vec![policy("bank", "d", Scope::Namespace, Deny, Some(principal("web")))],
            web,
            Code::NoPolicy,
        ),
        (
            "a mesh-wide policy",
            vec![policy("tulle-system", "d", Scope::Global, Deny, Some(principal("web")))],
            web,
            Code::PolicyDenied,
        ),
        (
            "a selector policy that nobody named",
            vec![policy("shop", "d", Scope::Selector, Deny, Some(principal("web")))],
            web,
            Code::NoPolicy,
        ),
    ];
    for (name, policies, account, code) in cases {
        let verdict = verdict(policies, &cart(), account);
        assert_eq!(verdict.code, code, "{name}: {verdict}");
        assert_eq!(verdict.allowed, matches!(code, Code::Allowed | Code::NoPolicy), "{name}");
    }
}

#[test]
fn a_denial_names_policy_and_rule() {
    let mut deny = namespaced("deny-web", Action::Deny, principal("cart"));
    deny.rules.push(Rule { clauses: vec![clause(vec![principal("web")])], unknown: false });
    let denied = verdict(vec![deny], &cart(), Some("web"));
    assert_eq!((denied.policy.as_deref(), denied.rule), (Some("shop/deny-web"), Some(1)));
    assert_eq!(denied.text(), "denied by policy shop/deny-web, rules[1]");

    let strict = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let name = "istio_converted_static_strict";
    let strict = policy("tulle-system", name, Scope::Global, Action::Deny, Some(strict));
    let denied = verdict(vec![strict], &cart(), None);
    assert_eq!(denied.code, Code::MtlsRequired);
    assert!(denied.text().contains("mutual TLS only"), "{denied}");
}

#[test]
fn a_dry_run_policy_is_reported_and_changes_nothing() {
    let dry = |name, action, only| Policy { dry_run: true, ..namespaced(name, action, only) };
    let verdict = verdict(
        vec![
            dry("allow-cart", Action::Allow, principal("cart")),
            dry("deny-cart", Action::Deny, principal("cart")),
            dry("deny-web", Action::Deny, principal("web")),
        ],
        &cart(),
        Some("web"),
    );
    assert_eq!(verdict.code, Code::NoPolicy);
    let said: Vec<_> = verdict.dry_run.iter().map(|dry| (&*dry.policy, dry.would_be)).collect();
    assert_eq!(said, [("shop/allow-cart", WouldBe::NotAllowed), ("shop/deny-web", WouldBe::Denied)]);
}

#[test]
fn an_audit_policy_names_the_rule_that_matches_and_changes_nothing() {
    let audit = |name, only| namespaced(name, Action::Audit, only);
    let unknown = Match { unknown: true, ..principal("web") };
    let said = |policies: Vec<Policy>| {
        let verdict = verdict(policies, &cart(), Some("web"));
        (verdict.code, verdict.dry_run.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let second = with_rules("second", Action::Audit, [principal("cart"), principal("web")].map(ruled).into());
    for (name, policies, code, expected) in [
        ("alone", vec![audit("web", principal("web"))], Code::NoPolicy, vec!["shop/web audited by rules[0]"]),
        ("another caller", vec![audit("cart", principal("cart"))], Code::NoPolicy, vec![]),
        ("no rules", vec![with_rules("none", Action::Audit, vec![])], Code::NoPolicy, vec![]),
        ("the second rule", vec![second], Code::NoPolicy, vec!["shop/second audited by rules[1]"]),
        (
            "rather recorded than missed",
            vec![audit("new", unknown)],
            Code::NoPolicy,
            vec!["shop/new audited by rules[0]"],
        ),
        (
            "of what is denied, too",
            vec![namespaced("deny", Action::Deny, principal("web")), audit("web", principal("web"))],
            Code::PolicyDenied,
            vec!["shop/web audited by rules[0]"],
        ),
        (
            "it is no ALLOW",
            vec![namespaced("allow", Action::Allow, principal("cart")), audit("web", principal("web"))],
            Code::NotAllowed,
            vec!["shop/web audited by rules[0]"],
        ),
    ] {
        assert_eq!(said(policies), (code, expected.into_iter().map(str::to_owned).collect()), "{name}");
    }
}

#[test]
fn nothing_is_allowed_before_the_policies_are_here() {
    let (mut writer, reader) = store();
    writer.apply([Change::Workload(Arc::new(cart())), Change::AddressesSynced], 1);
    let destination = cart();
    let verdict = evaluate(&reader.load(), &facts(&destination, None));
    assert_eq!((verdict.allowed, verdict.code), (false, Code::PolicyPending));

    let named = Workload { policies: vec!["shop/late".into()], ..cart() };
    let pending = self::verdict(vec![], &named, Some("web"));
    assert_eq!((pending.code, pending.policy.as_deref()), (Code::PolicyPending, Some("shop/late")));
}

#[test]
fn a_stand_in_says_why_it_denies() {
    let id: Arc<str> = "shop/broken".into();
    let stand_in = Policy::denies_all(&id, &"v7".into(), Scope::Namespace, false, "its CIDR is none");
    let verdict = verdict(vec![stand_in, namespaced("a", Action::Allow, principal("web"))], &cart(), Some("web"));
    assert_eq!(verdict.code, Code::PolicyDenied);
    assert!(verdict.text().contains("its CIDR is none"), "{verdict}");
}

#[test]
fn what_is_evaluated_is_listed_with_versions() {
    let mut destination = cart();
    destination.policies = vec!["shop/named".into()];
    let policies = [
        policy("tulle-system", "mesh", Scope::Global, Action::Deny, None),
        policy("shop", "ns", Scope::Namespace, Action::Deny, None),
        policy("shop", "named", Scope::Selector, Action::Deny, None),
        policy("shop", "not-named", Scope::Selector, Action::Deny, None),
    ];
    let snapshot = snapshot(policies.map(|policy| Change::Policy(Arc::new(policy))));
    let names: Vec<_> =
        evaluated(&snapshot, &destination).into_iter().map(|(id, version)| format!("{id}@{version}")).collect();
    assert_eq!(names, ["tulle-system/mesh@v1", "shop/ns@v1", "shop/named@v1"]);
}

#[test]
fn a_foreign_domains_namespace_lets_nobody_in_and_keeps_out_whom_it_names() {
    use Action::{Allow, Deny};
    let text = |text: &str| vec![StringMatch::Exact(text.into())];
    let account = || vec![ServiceAccount { namespace: "shop".into(), name: "web".into() }];
    let namespaces = || Match { namespaces: text("shop"), ..Match::default() };
    let any_namespace = || Match { namespaces: vec![StringMatch::Presence], ..Match::default() };
    let not_namespaces = |name: &str| Match { not_namespaces: text(name), ..Match::default() };
    let accounts = || Match { service_accounts: account(), ..Match::default() };
    let not_accounts = || Match { not_service_accounts: account(), ..Match::default() };
    let principals = |id: &str| Match { principals: text(id), ..Match::default() };
    let suffix = || Match { principals: vec![StringMatch::Suffix("/sa/web".into())], ..Match::default() };
    // What is said of spiffe://cluster.local/ns/shop/sa/web, and of the same name in other.example.
    let table = [
        ("namespaces", Allow, namespaces(), true, false),
        ("any namespace", Allow, any_namespace(), true, false),
        ("namespaces", Deny, namespaces(), false, false),
        ("notNamespaces", Allow, not_namespaces("shop"), false, false),
        ("other notNamespaces", Allow, not_namespaces("bank"), true, true),
        ("notNamespaces", Deny, not_namespaces("shop"), true, false),
        ("serviceAccounts", Allow, accounts(), true, false),
        ("serviceAccounts", Deny, accounts(), false, false),
        ("notServiceAccounts", Allow, not_accounts(), false, false),
        ("notServiceAccounts", Deny, not_accounts(), true, false),
        ("our principal", Allow, principals("cluster.local/ns/shop/sa/web"), true, false),
        ("their principal", Allow, principals("other.example/ns/shop/sa/web"), false, true),
        ("their principal", Deny, principals("other.example/ns/shop/sa/web"), true, false),
        ("a principal of any domain", Allow, suffix(), true, true),
    ];
    let cart = cart();
    let ours = identity("shop", "web");
    let theirs: tulle_certs::SpiffeId = "spiffe://other.example/ns/shop/sa/web".parse().unwrap();
    for (what, action, only, of_ours, of_theirs) in table {
        let snapshot = snapshot([Change::Policy(Arc::new(namespaced("p", action, only)))]);
        for (source, allowed) in [(&ours, of_ours), (&theirs, of_theirs)] {
            let verdict = evaluate(&snapshot, &facts(&cart, Some(source)));
            assert_eq!(verdict.allowed, allowed, "{what} {action:?} {source}: {verdict}");
        }
    }
}
