//! A slow, literal evaluator, to test the fast one against. It follows the words of `authorization.proto`.
//!
//! It shares no helper with what it checks: every attribute becomes a row of three facts (does it constrain, does a
//! positive hit, does a negative hit), and the algebra is written out over the rows.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;

use crate::policy::{Code, Facts, evaluate};
use crate::state::fixtures;
use crate::state::{Action, Change, Clause, Match, Policy, Rule, Scope, ServiceAccount, StringMatch, Workload};

/// What must come out.
fn expected(policies: &[Policy], facts: &Facts<'_>) -> (bool, Code) {
    let applies = |policy: &&Policy| {
        policy.scope == Scope::Global
            || (policy.scope == Scope::Namespace && policy.namespace == facts.destination.namespace)
            || facts.destination.policies.contains(&policy.id)
    };
    let enforced: Vec<&Policy> =
        policies.iter().filter(applies).filter(|policy| !policy.dry_run && policy.action != Action::Audit).collect();
    let mut allow_policies = 0;
    let mut allowed = false;
    for policy in enforced {
        let mut matched = false;
        for rule in &policy.rules {
            matched = matched || rule_holds(rule, policy.action, facts);
        }
        if policy.action == Action::Deny && matched {
            return (false, Code::PolicyDenied);
        }
        if policy.action == Action::Allow {
            allow_policies += 1;
            allowed = allowed || matched;
        }
    }
    match (allow_policies, allowed) {
        (0, _) => (true, Code::NoPolicy),
        (_, true) => (true, Code::Allowed),
        (_, false) => (false, Code::NotAllowed),
    }
}

fn rule_holds(rule: &Rule, action: Action, facts: &Facts<'_>) -> bool {
    if rule.unknown && action == Action::Allow {
        return false;
    }
    for clause in &rule.clauses {
        if clause.unknown {
            if action == Action::Allow {
                return false;
            }
            continue;
        }
        let mut any = clause.matches.is_empty();
        for only in &clause.matches {
            any = any || match_holds(only, action, facts);
        }
        if !any {
            return false;
        }
    }
    true
}

fn match_holds(only: &Match, action: Action, facts: &Facts<'_>) -> bool {
    let mut rows: Vec<(bool, bool, bool)> = Vec::new();
    let who = facts.source_identity;
    let text = |list: &[StringMatch], value: &str| {
        list.iter().any(|wanted| match wanted {
            StringMatch::Exact(text) => value == &**text,
            StringMatch::Prefix(text) => value.get(..text.len()) == Some(&**text),
            StringMatch::Suffix(text) => value.len() >= text.len() && value[value.len() - text.len()..] == **text,
            StringMatch::Presence => !value.is_empty(),
        })
    };
    let namespace = who.map(|id| id.namespace().to_owned()).unwrap_or_default();
    // Of a foreign identity: a name of ours is no reason to let it in, and no reason to spare it a denial.
    let (lets_in, spares) = match (facts.foreign, action) {
        (false, _) => (true, true),
        (true, Action::Allow) => (false, true),
        (true, Action::Deny | Action::Audit) => (true, false),
    };
    rows.push((
        !only.namespaces.is_empty(),
        lets_in && text(&only.namespaces, &namespace),
        spares && text(&only.not_namespaces, &namespace),
    ));
    let principal = |list: &[StringMatch]| who.is_some_and(|id| text(list, &id.to_string()["spiffe://".len()..]));
    rows.push((!only.principals.is_empty(), principal(&only.principals), principal(&only.not_principals)));
    let account = |list: &[ServiceAccount]| {
        who.is_some_and(|id| list.iter().any(|a| (&*a.namespace, &*a.name) == (id.namespace(), id.service_account())))
    };
    rows.push((
        !only.service_accounts.is_empty(),
        lets_in && account(&only.service_accounts),
        spares && account(&only.not_service_accounts),
    ));
    let net = |list: &[IpNet], ip: IpAddr| {
        list.iter().any(|net| match (net.network(), net.broadcast(), ip) {
            (IpAddr::V4(low), IpAddr::V4(high), IpAddr::V4(ip)) => low <= ip && ip <= high,
            (IpAddr::V6(low), IpAddr::V6(high), IpAddr::V6(ip)) => low <= ip && ip <= high,
            _ => false,
        })
    };
    rows.push((
        !only.source_ips.is_empty(),
        net(&only.source_ips, facts.source_ip),
        net(&only.not_source_ips, facts.source_ip),
    ));
    rows.push((
        !only.destination_ips.is_empty(),
        net(&only.destination_ips, facts.destination_ip),
        net(&only.not_destination_ips, facts.destination_ip),
    ));
    rows.push((
        !only.destination_ports.is_empty(),
        only.destination_ports.contains(&facts.destination_port),
        only.not_destination_ports.contains(&facts.destination_port),
    ));
    let attributes = only.namespaces.len()
        + only.not_namespaces.len()
        + only.principals.len()
        + only.not_principals.len()
        + only.service_accounts.len()
        + only.not_service_accounts.len()
        + only.source_ips.len()
        + only.not_source_ips.len()
        + only.destination_ips.len()
        + only.not_destination_ips.len()
        + only.destination_ports.len()
        + only.not_destination_ports.len();
    if only.unknown && action == Action::Allow {
        return false;
    }
    if attributes == 0 {
        return only.unknown;
    }
    rows.iter().all(|(constrains, hit, miss)| (!constrains || *hit) && !miss)
}

fn arc(text: &str) -> Arc<str> {
    text.into()
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    let word = prop::sample::select(vec![
        "",
        "shop",
        "sh",
        "op",
        "bank",
        "cluster.local/ns/shop/sa/cart",
        "cluster.local/",
        "/sa/cart",
    ]);
    prop_oneof![
        word.clone().prop_map(|text| StringMatch::Exact(arc(text))),
        word.clone().prop_map(|text| StringMatch::Prefix(arc(text))),
        word.prop_map(|text| StringMatch::Suffix(arc(text))),
        Just(StringMatch::Presence),
    ]
}

fn strings() -> impl Strategy<Value = Vec<StringMatch>> {
    few(string_match())
}

fn few<S: Strategy>(of: S) -> impl Strategy<Value = Vec<S::Value>> {
    // Mostly empty, because most lists of a policy are, and a full match hardly ever holds.
    prop_oneof![4 => Just(0usize), 1 => 1..3usize].prop_flat_map({
        let of = std::rc::Rc::new(of);
        move |count| prop::collection::vec(Shared(of.clone()), count)
    })
}

/// A strategy that can be used several times.
struct Shared<S>(std::rc::Rc<S>);

impl<S: Strategy> Strategy for Shared<S> {
    type Tree = S::Tree;
    type Value = S::Value;

    fn new_tree(&self, runner: &mut proptest::test_runner::TestRunner) -> proptest::strategy::NewTree<Self> {
        self.0.new_tree(runner)
    }
}

impl<S> std::fmt::Debug for Shared<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

fn nets() -> impl Strategy<Value = Vec<IpNet>> {
    few(prop::sample::select(vec!["10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0", "::/0", "2001:db8::/32", "192.168.0.0/16"]))
        .prop_map(|list| list.into_iter().map(|net| net.parse().unwrap()).collect())
}

fn ports() -> impl Strategy<Value = Vec<u16>> {
    few(prop::sample::select(vec![80u16, 8080, 443]))
}

fn accounts() -> impl Strategy<Value = Vec<ServiceAccount>> {
    few(prop::sample::select(vec![("shop", "cart"), ("shop", "web"), ("bank", "cart")]))
        .prop_map(|list| list.into_iter().map(|(ns, n)| ServiceAccount { namespace: arc(ns), name: arc(n) }).collect())
}

fn only() -> impl Strategy<Value = Match> {
    let text = (strings(), strings(), strings(), strings());
    let ips = (nets(), nets(), nets(), nets());
    (text, ips, ports(), ports(), accounts(), accounts(), prop::bool::weighted(0.1)).prop_map(
        |(text, ips, ports, not_ports, accounts, not_accounts, unknown)| Match {
            namespaces: text.0,
            not_namespaces: text.1,
            principals: text.2,
            not_principals: text.3,
            source_ips: ips.0,
            not_source_ips: ips.1,
            destination_ips: ips.2,
            not_destination_ips: ips.3,
            destination_ports: ports,
            not_destination_ports: not_ports,
            service_accounts: accounts,
            not_service_accounts: not_accounts,
            unknown,
        },
    )
}

fn rule() -> impl Strategy<Value = Rule> {
    let clause = (prop::collection::vec(only(), 0..3), prop::bool::weighted(0.05))
        .prop_map(|(matches, unknown)| Clause { matches, unknown });
    (prop::collection::vec(clause, 0..3), prop::bool::weighted(0.05))
        .prop_map(|(clauses, unknown)| Rule { clauses, unknown })
}

fn policies() -> impl Strategy<Value = Vec<Policy>> {
    let scope = prop::sample::select(vec![Scope::Global, Scope::Namespace, Scope::Selector]);
    let namespace = prop::sample::select(vec!["shop", "bank"]);
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Allow, Action::Deny, Action::Audit]);
    let one = (scope, namespace, action, prop::bool::weighted(0.1), prop::collection::vec(rule(), 0..3));
    prop::collection::vec(one, 0..5).prop_map(|list| {
        let policy =
            |(index, (scope, namespace, action, dry_run, rules)): (usize, (Scope, &str, Action, bool, Vec<Rule>))| {
                let plain = fixtures::policy(namespace, &format!("p{index}"), scope, action, None);
                Policy { dry_run, rules, ..plain }
            };
        list.into_iter().enumerate().map(policy).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn evaluation_equals_the_literal_reading_of_the_contract(
        policies in policies(),
        named in prop::collection::vec(0..5usize, 0..3),
        identity in prop::sample::select(vec![None, Some(("shop", "cart")), Some(("shop", "web")), Some(("bank", "cart"))]),
        source in prop::sample::select(vec!["10.0.0.1", "10.1.2.3", "192.168.1.1", "2001:db8::1", "fd00::1"]),
        destination_ip in prop::sample::select(vec!["10.0.0.1", "172.16.0.1", "2001:db8::2"]),
        destination_port in prop::sample::select(vec![80u16, 8080, 9999]),
        foreign in prop::bool::weighted(0.3),
    ) {
        let mut destination: Workload = fixtures::workload("shop", "cart-0", "10.0.0.9");
        for index in named {
            if let Some(policy) = policies.get(index) && !destination.policies.contains(&policy.id) {
                destination.policies.push(policy.id.clone());
            }
        }
        let changes = policies.iter().cloned().map(|policy| Change::Policy(Arc::new(policy)));
        let snapshot = fixtures::snapshot(changes);
        let identity = identity.map(|(namespace, account)| fixtures::identity(namespace, account));
        let facts = Facts {
            source_identity: identity.as_ref(),
            source_ip: source.parse().unwrap(),
            destination: &destination,
            destination_ip: destination_ip.parse().unwrap(),
            destination_port,
            foreign: foreign && identity.is_some(),
        };
        let verdict = evaluate(&snapshot, &facts);
        prop_assert_eq!((verdict.allowed, verdict.code), expected(&policies, &facts));
        let begins = if verdict.allowed { "allowed" } else { "denied" };
        prop_assert!(verdict.text().starts_with(begins));
        prop_assert_eq!(verdict.policy.is_some(), verdict.code != Code::NoPolicy);
        let again = evaluate(&snapshot, &facts);
        prop_assert_eq!(again, verdict);
    }
}
