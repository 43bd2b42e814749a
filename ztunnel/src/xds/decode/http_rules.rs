//! Decodes `tulle.mesh.v1alpha1.HttpAuthorization`, the HTTP form of an authorization policy.
//!
//! All or nothing: with a part that this proxy does not know, the plain rules of the policy stay in force, which allow no
//! more than the policy does.

use std::sync::Arc;

use prost::Message;
use tulle_proto::mesh as wire;
use tulle_proto::mesh::path_match::Path;
use tulle_proto::names::{EXTENSION_L7, TYPE_HTTP_AUTHORIZATION};
use tulle_proto::security::{Address, Extension, StringMatch as WireText};

use crate::state::{Element, Group, HttpMatch, HttpRule, PathPattern, StringMatch};
use crate::xds::decode::field;
use crate::xds::decode::policy::{MATCH, PAIR, STRING_MATCH, match_, string_match};
use crate::xds::decode::route::header_name;
use crate::xds::wire::{Schema, unknown_fields};

const TEXTS: Schema = Schema { scalars: &[], messages: &[(1, &STRING_MATCH), (2, &STRING_MATCH)] };
const PATH: Schema = Schema { scalars: &[2], messages: &[(1, &STRING_MATCH)] };
const PATHS: Schema = Schema { scalars: &[], messages: &[(1, &PATH), (2, &PATH)] };
const NAMED: Schema = Schema { scalars: &[1], messages: &[(2, &TEXTS)] };
const ADDRESSES: Schema = Schema { scalars: &[], messages: &[(1, &PAIR), (2, &PAIR)] };
const HTTP_MATCH: Schema = Schema {
    scalars: &[],
    messages: &[
        (1, &MATCH),
        (2, &TEXTS),
        (3, &TEXTS),
        (4, &PATHS),
        (5, &TEXTS),
        (6, &TEXTS),
        (7, &TEXTS),
        (8, &NAMED),
        (9, &NAMED),
        (10, &ADDRESSES),
        (11, &TEXTS),
    ],
};
const CLAUSE: Schema = Schema { scalars: &[], messages: &[(1, &HTTP_MATCH)] };
const RULE: Schema = Schema { scalars: &[], messages: &[(1, &CLAUSE)] };
const WHOLE: Schema = Schema { scalars: &[], messages: &[(1, &RULE)] };

/// The HTTP form among the extensions of a policy with so many plain rules. `None`: there is none that can be used.
pub(super) fn of(extensions: &[Extension], plain_rules: usize) -> Option<Arc<[HttpRule]>> {
    let extension = extensions.iter().find(|extension| extension.name == EXTENSION_L7)?;
    let config = extension.config.as_ref().filter(|config| config.type_url == TYPE_HTTP_AUTHORIZATION)?;
    let rules = rules(&config.value).filter(|rules| rules.len() == plain_rules);
    if rules.is_none() {
        tracing::warn!("the HTTP form of a policy cannot be used; its plain rules are, which allow no more");
    }
    rules.map(Into::into)
}

/// `None`: there is something that is not understood.
pub(super) fn rules(bytes: &[u8]) -> Option<Vec<HttpRule>> {
    let from = wire::HttpAuthorization::decode(bytes).ok()?;
    if !unknown_fields(bytes, &WHOLE)?.is_empty() {
        return None;
    }
    let matches = |clause: &wire::HttpClause| clause.matches.iter().map(http_match).collect::<Option<Vec<_>>>();
    let rule =
        |rule: &wire::HttpRule| Some(HttpRule { clauses: rule.clauses.iter().map(matches).collect::<Option<_>>()? });
    from.rules.iter().map(rule).collect()
}

fn http_match(from: &wire::HttpMatch) -> Option<HttpMatch> {
    let connection = from.connection.clone().map(match_).transpose().ok()?.unwrap_or_default();
    if connection.unknown {
        return None;
    }
    let names = |list: &[String]| -> Vec<Arc<str>> { list.iter().map(|name| name.as_str().into()).collect() };
    let header = |from: &wire::HeaderGroup| Some((header_name(&from.name).ok()?, texts(from.values.as_ref())?));
    let claim = |from: &wire::ClaimGroup| Some((names(&from.claim), texts(from.values.as_ref())?));
    Some(HttpMatch {
        connection,
        hosts: texts(from.hosts.as_ref())?,
        methods: texts(from.methods.as_ref())?,
        paths: paths(from.paths.as_ref())?,
        request_principals: texts(from.request_principals.as_ref())?,
        audiences: texts(from.audiences.as_ref())?,
        presenters: texts(from.presenters.as_ref())?,
        headers: from.headers.iter().map(header).collect::<Option<_>>()?,
        claims: from.claims.iter().map(claim).collect::<Option<_>>()?,
        remote_ips: addresses(from.remote_ips.as_ref())?,
        trust_domains: texts(from.trust_domains.as_ref())?,
    })
}

fn texts(from: Option<&wire::TextGroup>) -> Option<Group<StringMatch>> {
    let list = |list: &[WireText]| list.iter().cloned().map(string_match).collect::<Option<Vec<_>>>();
    from.map_or_else(|| Some(Group::default()), |from| Some(Group { any: list(&from.any)?, none: list(&from.none)? }))
}

fn paths(from: Option<&wire::PathGroup>) -> Option<Group<PathPattern>> {
    let one = |from: &wire::PathMatch| match from.path.as_ref()? {
        Path::Text(text) => string_match(text.clone()).map(PathPattern::Text),
        Path::Template(text) => template(text).map(PathPattern::Template),
    };
    let list = |list: &[wire::PathMatch]| list.iter().map(one).collect::<Option<Vec<_>>>();
    from.map_or_else(|| Some(Group::default()), |from| Some(Group { any: list(&from.any)?, none: list(&from.none)? }))
}

fn template(text: &str) -> Option<Vec<Element>> {
    let parts: Vec<&str> = text.strip_prefix('/')?.split('/').collect();
    let last = parts.len() - 1;
    let element = |(index, part): (usize, &&str)| match *part {
        "{*}" => Some(Element::One),
        "{**}" => (index == last).then_some(Element::Rest),
        exact => (!exact.contains(['*', '{', '}'])).then(|| Element::Exact(exact.into())),
    };
    parts.iter().enumerate().map(element).collect()
}

fn addresses(from: Option<&wire::AddressGroup>) -> Option<Group<ipnet::IpNet>> {
    let one = |from: &Address| field::net("remote_ips", &from.address, Some(from.length)).ok();
    let list = |list: &[Address]| list.iter().map(one).collect::<Option<Vec<_>>>();
    from.map_or_else(|| Some(Group::default()), |from| Some(Group { any: list(&from.any)?, none: list(&from.none)? }))
}
