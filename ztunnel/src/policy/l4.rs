//! Evaluation of policies on what a connection shows: identity, addresses, port.
//!
//! Why it is written as plain loops over the policy's own lists: the usual workload has a handful of policies, and the
//! order of evaluation is the documentation. Invariants: no I/O, no clock, total; for the same facts and snapshot the
//! same verdict. What cannot be evaluated is false in an ALLOW policy and true in the others.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tulle_certs::SpiffeId;

use crate::policy::{Code, DryRun, Verdict, WouldBe};
use crate::state::{Action, Clause, Match, Policy, Rule, ServiceAccount, Snapshot, StringMatch, Workload};

/// Names by which control and istiod send the DENY policies made from PeerAuthentication.
const STRICT_NAMES: [&str; 3] = ["tulle_strict_", "istio_converted_static_strict", "converted_peer_authentication_"];

/// What is known of a connection when it asks for admission.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Identity proven in TLS. `None`: plaintext.
    pub source_identity: Option<&'a SpiffeId>,
    /// Source address of the connection.
    pub source_ip: IpAddr,
    /// The workload that is asked.
    pub destination: &'a Workload,
    /// Address of the application, after service and tunnel were taken off.
    pub destination_ip: IpAddr,
    /// Port of the application.
    pub destination_port: u16,
    /// `source_identity` is of another trust domain: its namespace and account are not ones of this mesh.
    pub foreign: bool,
}

/// Decides.
pub fn evaluate(snapshot: &Snapshot, facts: &Facts<'_>) -> Verdict {
    decide(snapshot, facts, |policy| matching_rule(policy, facts))
}

/// The same, with `matching` to say which rule of a policy matches.
pub(super) fn decide(snapshot: &Snapshot, facts: &Facts<'_>, matching: impl Fn(&Policy) -> Option<usize>) -> Verdict {
    if !snapshot.policies_synced() {
        return refusal(Code::PolicyPending, None);
    }
    // The caller's workload may be older than the snapshot, so its own mark is not enough.
    if facts.destination.policies_pending || snapshot.missing_policy(facts.destination).is_some() {
        return refusal(Code::PolicyPending, snapshot.missing_policy(facts.destination).cloned());
    }
    let mut dry_run = Vec::new();
    let mut allowed: Option<(&Arc<Policy>, usize)> = None;
    let mut denied: Option<(&Arc<Policy>, usize)> = None;
    let mut first_allow: Option<&Arc<Policy>> = None;
    let mut allow_policies = 0;
    for policy in snapshot.policies_for(facts.destination) {
        let matched = matching(policy);
        let by_rule = matched.map(|rule| (policy, rule));
        if policy.dry_run || policy.action == Action::Audit {
            dry_run.extend(would_be(policy, matched));
            continue;
        }
        match policy.action {
            Action::Audit => {}
            Action::Deny => denied = denied.or(by_rule),
            Action::Allow => {
                allow_policies += 1;
                first_allow = first_allow.or(Some(policy));
                allowed = allowed.or(by_rule);
            }
        }
    }
    let verdict = match (denied, allowed, first_allow) {
        (Some((policy, rule)), _, _) => Verdict {
            rule: Some(rule),
            stand_in: policy.stand_in.clone(),
            ..refusal(denial(policy, facts), Some(policy.id.clone()))
        },
        (None, Some((policy, rule)), _) => {
            Verdict { allowed: true, rule: Some(rule), ..refusal(Code::Allowed, Some(policy.id.clone())) }
        }
        (None, None, Some(first)) => Verdict { allow_policies, ..refusal(Code::NotAllowed, Some(first.id.clone())) },
        (None, None, None) => Verdict { allowed: true, ..refusal(Code::NoPolicy, None) },
    };
    Verdict { dry_run, ..verdict }
}

/// Names and versions of the policies that apply to a workload, in the order of evaluation: what `evaluate` looks at.
pub fn evaluated(snapshot: &Snapshot, workload: &Workload) -> Vec<(Arc<str>, Arc<str>)> {
    let network = workload.network_policies.iter().filter_map(|id| snapshot.network_policy(id));
    let network = network.map(|policy| (policy.id.clone(), policy.version.clone()));
    network.chain(snapshot.policies_for(workload).map(|policy| (policy.id.clone(), policy.version.clone()))).collect()
}

pub(super) fn refusal(code: Code, policy: Option<Arc<str>>) -> Verdict {
    Verdict { allowed: false, code, policy, rule: None, allow_policies: 0, stand_in: None, dry_run: Vec::new() }
}

/// A plaintext client that a converted PeerAuthentication denies should be told about mTLS, not about the policy.
fn denial(policy: &Policy, facts: &Facts<'_>) -> Code {
    let name = policy.id.split_once('/').map_or("", |(_, name)| name);
    let strict = policy.stand_in.is_none() && STRICT_NAMES.iter().any(|strict| name.starts_with(strict));
    if strict && facts.source_identity.is_none() { Code::MtlsRequired } else { Code::PolicyDenied }
}

fn would_be(policy: &Policy, matched: Option<usize>) -> Option<DryRun> {
    let would_be = match (policy.action, matched) {
        (Action::Deny | Action::Audit, None) => return None,
        (Action::Audit, Some(_)) => WouldBe::Audited,
        (Action::Deny, Some(_)) => WouldBe::Denied,
        (Action::Allow, Some(_)) => WouldBe::Allowed,
        (Action::Allow, None) => WouldBe::NotAllowed,
    };
    Some(DryRun { policy: policy.id.clone(), rule: matched, would_be })
}

/// Index of the first rule that matches.
pub(super) fn matching_rule(policy: &Policy, facts: &Facts<'_>) -> Option<usize> {
    policy.rules.iter().position(|rule| rule_matches(rule, policy.action, facts))
}

/// An unknown part is one more condition: one that fails in an ALLOW policy and holds in the others.
fn unknown_holds(unknown: bool, action: Action) -> bool {
    !unknown || action.suspects()
}

fn rule_matches(rule: &Rule, action: Action, facts: &Facts<'_>) -> bool {
    unknown_holds(rule.unknown, action) && rule.clauses.iter().all(|clause| clause_matches(clause, action, facts))
}

fn clause_matches(clause: &Clause, action: Action, facts: &Facts<'_>) -> bool {
    let any = clause.matches.is_empty() || clause.matches.iter().any(|only| match_holds(only, action, facts));
    // What is unknown in a clause may be one more alternative, which only widens: that is what a DENY and an AUDIT
    // must assume, and what an ALLOW must not.
    if clause.unknown { action.suspects() } else { any }
}

pub(super) fn match_holds(only: &Match, action: Action, facts: &Facts<'_>) -> bool {
    if only.is_empty() {
        return only.unknown && action.suspects();
    }
    let identity = facts.source_identity;
    let namespace = identity.map_or("", SpiffeId::namespace);
    let principal = identity.map_or("", SpiffeId::principal);
    // What a foreign domain calls a namespace is none of ours, so a positive match must not let it in; but what its name
    // would keep out stays out. Either way the reading that denies more.
    let positive = !facts.foreign || action.suspects();
    let negative = !facts.foreign || action == Action::Allow;
    let by_namespace = |wanted: &StringMatch| wanted.matches(namespace);
    // Without a proven identity no principal matches, not even a prefix of nothing.
    let by_principal = |wanted: &StringMatch| identity.is_some() && wanted.matches(principal);
    let by_account = |wanted: &ServiceAccount| {
        identity.is_some_and(|id| *wanted.namespace == *id.namespace() && *wanted.name == *id.service_account())
    };
    let net = |ip: IpAddr| move |wanted: &IpNet| wanted.contains(&ip);
    let port = |wanted: &u16| *wanted == facts.destination_port;
    let (source, destination) = (facts.source_ip.to_canonical(), facts.destination_ip.to_canonical());

    unknown_holds(only.unknown, action)
        && group(&only.destination_ports, &only.not_destination_ports, port)
        && group(&only.source_ips, &only.not_source_ips, net(source))
        && group(&only.destination_ips, &only.not_destination_ips, net(destination))
        && group(&only.namespaces, &[], |wanted| positive && by_namespace(wanted))
        && group(&[], &only.not_namespaces, |wanted| negative && by_namespace(wanted))
        && group(&only.service_accounts, &[], |wanted| positive && by_account(wanted))
        && group(&[], &only.not_service_accounts, |wanted| negative && by_account(wanted))
        && group(&only.principals, &only.not_principals, by_principal)
}

/// Any of the positives, if there are any, and none of the negatives.
fn group<T>(positive: &[T], negative: &[T], hits: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&hits)) && !negative.iter().any(&hits)
}
