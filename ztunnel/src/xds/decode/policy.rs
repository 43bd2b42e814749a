//! Decodes `istio.security.Authorization`, such that what is not understood never lets a connection pass.
//!
//! Two kinds of trouble are told apart. A value that is wrong (a prefix, a port, an enum, a field of the policy itself
//! that is not known) rejects the policy. An attribute that a later version added inside a rule is kept as
//! [`Match::unknown`]: evaluation counts it against the connection, and the other rules go on working.

use prost::Message;
use tulle_proto::names::EXTENSION_DENIES_ALL;
use tulle_proto::security as wire;
use tulle_proto::security::string_match::MatchType;

use crate::state::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccount, StringMatch};
use crate::xds::decode::{PolicyError, field, http_rules};
use crate::xds::wire::{Path, Schema, unknown_fields};

// The schema of authorization.proto, as far as it matters for what may be skipped.
pub(super) const STRING_MATCH: Schema = Schema { scalars: &[1, 2, 3, 4], messages: &[] };
pub(super) const PAIR: Schema = Schema { scalars: &[1, 2], messages: &[] };
pub(super) const MATCH: Schema = Schema {
    scalars: &[9, 10],
    messages: &[
        (1, &STRING_MATCH),
        (2, &STRING_MATCH),
        (3, &STRING_MATCH),
        (4, &STRING_MATCH),
        (5, &PAIR),
        (6, &PAIR),
        (7, &PAIR),
        (8, &PAIR),
        (11, &PAIR),
        (12, &PAIR),
        (13, &PAIR),
    ],
};
const CLAUSE: Schema = Schema { scalars: &[], messages: &[(2, &MATCH)] };
const RULE: Schema = Schema { scalars: &[], messages: &[(1, &CLAUSE)] };
const AUTHORIZATION: Schema = Schema { scalars: &[1, 2, 3, 4, 6], messages: &[(5, &RULE), (7, &PAIR)] };

/// See the module's header.
pub(super) fn policy(bytes: &[u8], id: &str, version: &str) -> Result<Policy, PolicyError> {
    let from = wire::Authorization::decode(bytes).map_err(|error| PolicyError {
        reason: format!("it is no istio.security.Authorization: {error}"),
        scope: Scope::Namespace,
        dry_run: false,
    })?;
    let scope = field::known("scope", from.scope).map(|scope| match scope {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::Selector,
    });
    let dry_run = from.dry_run;
    let readable = scope.as_ref().map_or(Scope::Namespace, |scope| *scope);
    let fail = |reason| PolicyError { reason, scope: readable, dry_run };
    let scope = scope.map_err(fail)?;
    check_name(&from, id, scope).map_err(fail)?;
    let unknown = unknown_fields(bytes, &AUTHORIZATION)
        .ok_or_else(|| fail("its bytes cannot be walked, or it has too many unknown fields".to_owned()))?;
    if unknown.iter().any(Vec::is_empty) {
        return Err(fail("it has a field that this proxy does not know and must not ignore".to_owned()));
    }
    decode(from, id, version, scope, &unknown).map_err(fail)
}

fn check_name(from: &wire::Authorization, id: &str, scope: Scope) -> Result<(), String> {
    let (namespace, name) = id.split_once('/').unwrap_or(("", id));
    let same_namespace = from.namespace == namespace || (scope == Scope::Global && from.namespace.is_empty());
    if same_namespace && from.name == name {
        return Ok(());
    }
    Err("its content has another name than the resource".to_owned())
}

fn decode(
    from: wire::Authorization,
    id: &str,
    version: &str,
    scope: Scope,
    unknown: &[Path],
) -> Result<Policy, String> {
    let action = match field::known("action", from.action)? {
        wire::Action::Allow => Action::Allow,
        wire::Action::Deny => Action::Deny,
        wire::Action::Audit => Action::Audit,
    };
    let mut rules = Vec::with_capacity(from.rules.len());
    for rule in from.rules {
        let clauses = rule.clauses.into_iter().map(clause).collect::<Result<_, _>>()?;
        rules.push(Rule { clauses, unknown: false });
    }
    for path in unknown {
        mark_unknown(&mut rules, path);
    }
    let plain_rules = rules.len();
    let denies_all = from.extensions.iter().any(|extension| extension.name == EXTENSION_DENIES_ALL);
    Ok(Policy {
        id: id.into(),
        version: version.into(),
        namespace: id.split_once('/').map_or("", |(namespace, _)| namespace).into(),
        scope,
        action,
        dry_run: from.dry_run,
        rules,
        http: http_rules::of(&from.extensions, plain_rules),
        stand_in: denies_all.then(|| "control could not read its spec; see the object's conditions".into()),
    })
}

fn clause(from: wire::Clause) -> Result<Clause, String> {
    let matches = from.matches.into_iter().map(match_).collect::<Result<_, _>>()?;
    Ok(Clause { matches, unknown: false })
}

pub(super) fn match_(from: wire::Match) -> Result<Match, String> {
    // An attribute that rides in an extension is one that this version does not evaluate.
    let mut unknown = !from.extensions.is_empty();
    let mut strings = |list: Vec<wire::StringMatch>| {
        let known: Option<Vec<_>> = list.into_iter().map(string_match).collect();
        unknown |= known.is_none();
        // A list of which a part is not known says nothing; see `Match::unknown` for what follows.
        known.unwrap_or_default()
    };
    let (namespaces, not_namespaces) = (strings(from.namespaces), strings(from.not_namespaces));
    let (principals, not_principals) = (strings(from.principals), strings(from.not_principals));
    let nets = |name: &str, list: &[wire::Address]| -> Result<Vec<_>, String> {
        list.iter().map(|net| field::net(name, &net.address, Some(net.length))).collect()
    };
    let ports = |name: &str, list: &[u32]| -> Result<Vec<_>, String> {
        list.iter().map(|port| field::port(name, *port)).collect()
    };
    let accounts = |list: Vec<wire::ServiceAccountMatch>| -> Vec<_> {
        let account = |from: wire::ServiceAccountMatch| ServiceAccount {
            namespace: from.namespace.into(),
            name: from.service_account.into(),
        };
        list.into_iter().map(account).collect()
    };
    Ok(Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips: nets("source_ips", &from.source_ips)?,
        not_source_ips: nets("not_source_ips", &from.not_source_ips)?,
        destination_ips: nets("destination_ips", &from.destination_ips)?,
        not_destination_ips: nets("not_destination_ips", &from.not_destination_ips)?,
        destination_ports: ports("destination_ports", &from.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &from.not_destination_ports)?,
        service_accounts: accounts(from.service_accounts),
        not_service_accounts: accounts(from.not_service_accounts),
        unknown,
    })
}

/// `None`: a way of comparing that this version does not know.
pub(super) fn string_match(from: wire::StringMatch) -> Option<StringMatch> {
    Some(match from.match_type? {
        MatchType::Exact(text) => StringMatch::Exact(text.into()),
        MatchType::Prefix(text) => StringMatch::Prefix(text.into()),
        MatchType::Suffix(text) => StringMatch::Suffix(text.into()),
        MatchType::Presence(_) => StringMatch::Presence,
    })
}

/// Marks the part of the rules that a path of the wire leads to. A path into an extension leads nowhere, which is right:
/// its content is not for this proxy.
fn mark_unknown(rules: &mut [Rule], path: &[(u32, usize)]) {
    let [(5, rule), path @ ..] = path else { return };
    let Some(rule) = rules.get_mut(*rule) else { return };
    let [(1, clause), path @ ..] = path else {
        rule.unknown = true;
        return;
    };
    let Some(clause) = rule.clauses.get_mut(*clause) else { return };
    let [(2, only), path @ ..] = path else {
        clause.unknown = true;
        return;
    };
    let Some(only) = clause.matches.get_mut(*only) else { return };
    only.unknown = true;
    // A value with an unknown part might mean more or less than it says, so its whole list says nothing.
    match path.first().map(|(field, _)| *field) {
        Some(1) => only.namespaces.clear(),
        Some(2) => only.not_namespaces.clear(),
        Some(3) => only.principals.clear(),
        Some(4) => only.not_principals.clear(),
        Some(5) => only.source_ips.clear(),
        Some(6) => only.not_source_ips.clear(),
        Some(7) => only.destination_ips.clear(),
        Some(8) => only.not_destination_ips.clear(),
        Some(11) => only.service_accounts.clear(),
        Some(12) => only.not_service_accounts.clear(),
        _ => {}
    }
}
