//! The HTTP form of an AuthorizationPolicy: all of it, as `extensions[tulle.dev/l7]` carries it.
//!
//! Rules keep their places. A key that nothing here can evaluate closes its rule as it does in the plain form: an ALLOW rule
//! never matches, and in a DENY rule it counts as met.

use prost::Message;
use tulle_proto::mesh;
use tulle_proto::mesh::path_match::Path;
use tulle_proto::names;
use tulle_proto::security;

use crate::model::{Compare, ConditionKey, HttpField, PathPattern, Rule, TextMatch};
use crate::translate::authorization::{blocks, condition, operation, source, texts};

/// Keys of a rule that nothing here can evaluate.
pub(super) fn beyond(rule: &Rule) -> Vec<&str> {
    let keys = rule.when.iter().filter_map(|when| match &when.key {
        ConditionKey::BeyondL4(key) => Some(key.as_str()),
        _ => None,
    });
    keys.collect()
}

/// The extension of a policy with these rules.
pub(super) fn extension(rules: &[Rule], action: security::Action) -> security::Extension {
    let message = mesh::HttpAuthorization { rules: rules.iter().map(|one| rule(one, action)).collect() };
    let config =
        prost_types::Any { type_url: names::TYPE_HTTP_AUTHORIZATION.to_owned(), value: message.encode_to_vec() };
    security::Extension { name: names::EXTENSION_L7.to_owned(), config: Some(config) }
}

fn rule(rule: &Rule, action: security::Action) -> mesh::HttpRule {
    if action == security::Action::Allow && !beyond(rule).is_empty() {
        // A match without attributes never matches.
        return mesh::HttpRule { clauses: vec![mesh::HttpClause { matches: vec![mesh::HttpMatch::default()] }] };
    }
    let mut clauses = Vec::new();
    let from = rule.from.iter().map(|one| http_match(source(one), &one.http)).collect::<Vec<_>>();
    let to = rule.to.iter().map(|one| http_match(operation(one), &one.http)).collect::<Vec<_>>();
    clauses.extend([from, to].into_iter().filter(|matches| !matches.is_empty()));
    clauses.extend(rule.when.iter().filter_map(|when| match &when.key {
        ConditionKey::Http(_, field) => Some(vec![http_match(security::Match::default(), std::slice::from_ref(field))]),
        ConditionKey::BeyondL4(_) => None,
        plain => Some(vec![http_match(condition(plain), &[])]),
    }));
    mesh::HttpRule { clauses: clauses.into_iter().map(|matches| mesh::HttpClause { matches }).collect() }
}

fn http_match(connection: security::Match, fields: &[HttpField]) -> mesh::HttpMatch {
    let mut matched = mesh::HttpMatch {
        connection: (connection != security::Match::default()).then_some(connection),
        ..mesh::HttpMatch::default()
    };
    for field in fields {
        match field {
            HttpField::Hosts(values) => matched.hosts = Some(text_group(values)),
            HttpField::Methods(values) => matched.methods = Some(text_group(values)),
            HttpField::Paths(values) => {
                let list = |list: &[PathPattern]| list.iter().map(path).collect();
                matched.paths = Some(mesh::PathGroup { any: list(&values.any), none: list(&values.none) });
            }
            HttpField::RequestPrincipals(values) => matched.request_principals = Some(text_group(values)),
            HttpField::Audiences(values) => matched.audiences = Some(text_group(values)),
            HttpField::Presenters(values) => matched.presenters = Some(text_group(values)),
            HttpField::Header(name, values) => {
                let group = mesh::HeaderGroup { name: name.clone(), values: Some(text_group(values)) };
                matched.headers.push(group);
            }
            HttpField::Claim(claim, values) => {
                let group = mesh::ClaimGroup { claim: claim.clone(), values: Some(text_group(values)) };
                matched.claims.push(group);
            }
            HttpField::RemoteIps(values) => {
                let group = mesh::AddressGroup { any: blocks(&values.any), none: blocks(&values.none) };
                matched.remote_ips = Some(group);
            }
            HttpField::TrustDomains(values) => matched.trust_domains = Some(text_group(values)),
        }
    }
    matched
}

fn text_group(values: &Compare<TextMatch>) -> mesh::TextGroup {
    mesh::TextGroup { any: texts(&values.any), none: texts(&values.none) }
}

fn path(pattern: &PathPattern) -> mesh::PathMatch {
    let path = match pattern {
        PathPattern::Text(matched) => texts(std::slice::from_ref(matched)).pop().map(Path::Text),
        PathPattern::Template(template) => Some(Path::Template(template.clone())),
    };
    mesh::PathMatch { path }
}
