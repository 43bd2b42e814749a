//! Policies. The first error of a spec makes the whole policy fail closed; its target is read on its own, so that the
//! denial reaches no further than it must.
//!
//! Fields follow Istio's AuthorizationPolicy and PeerAuthentication. Unknown fields and unknown `when` keys are errors: ignoring a restriction that we do not know would allow more than was meant.

use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{
    Action, AuthorizationPolicy, AuthorizationSpec, Compare, ConditionKey, HttpField, Meta, MtlsMode, Object,
    Operation, PathPattern, PeerAuthentication, PeerAuthenticationSpec, Rule, Selector, Source, Spec, Target,
    TextMatch, When,
};
use crate::source::decode::route::is_header_name;
use crate::source::decode::text_map;
use crate::source::tree::{Cursor, FieldError, Read};

pub(super) type PolicyResult = Read<(Object, Option<FieldError>)>;

/// Most rules, and most sources or operations of a rule: Istio's limit.
const MAX_ITEMS: usize = 512;

pub(super) fn authorization(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let spec = at.get("spec");
    let read = error.map_or_else(|| authorization_spec(&spec, &meta), Err);
    let (spec, error) = or_unreadable(read, authorization_target(&spec));
    let audits = at.get("spec").get("action").text().is_ok_and(|action| action == Some("AUDIT"));
    let without_effect = audits || dry_run(&meta);
    let policy = AuthorizationPolicy { meta, spec, without_effect };
    Ok((Object::AuthorizationPolicy(Arc::new(policy)), error))
}

pub(super) fn or_unreadable<T>(read: Read<T>, target: Read<Target>) -> (Spec<T>, Option<FieldError>) {
    match read {
        Ok(spec) => (Spec::Good(spec), None),
        Err(error) => (Spec::Unreadable { target: target.ok(), reason: error.to_string() }, Some(error)),
    }
}

fn authorization_spec(spec: &Cursor<'_>, meta: &Meta) -> Read<AuthorizationSpec> {
    spec.only(&["selector", "targetRef", "targetRefs", "action", "rules", "provider"])?;
    let action = spec.get("action");
    let action = match action.text()? {
        None | Some("ALLOW") => Action::Allow,
        Some("DENY") => Action::Deny,
        Some("AUDIT") => Action::Audit,
        Some("CUSTOM") => Action::Custom,
        Some(other) => {
            return Err(action.error(format!("`{other}` is none of ALLOW, DENY, AUDIT, CUSTOM")));
        }
    };
    let rules = bounded_list(&spec.get("rules"))?;
    Ok(AuthorizationSpec {
        target: authorization_target(spec)?,
        action,
        rules: rules.iter().map(|at| rule(at, meta)).collect::<Read<_>>()?,
    })
}

fn dry_run(meta: &Meta) -> bool {
    meta.annotation("istio.io/dry-run") == Some("true")
}

pub(super) fn authorization_target(spec: &Cursor<'_>) -> Read<Target> {
    spec.map()?;
    let selector = selector_target(&spec.get("selector"))?;
    let mut references = spec.get("targetRefs").list()?;
    let single = spec.get("targetRef");
    if !single.is_absent() {
        references.push(single);
    }
    if references.is_empty() {
        return Ok(selector);
    }
    if selector != Target::Everything {
        return Err(spec.get("selector").error("cannot stand beside targetRefs"));
    }
    let mut services = Vec::new();
    for reference in references {
        let name = reference.get("name").required_text()?;
        match reference.get("kind").required_text()? {
            "Service" => services.push(name.to_owned()),
            "Gateway" | "GatewayClass" | "ServiceEntry" => {}
            other => {
                let at = reference.get("kind");
                return Err(at.error(format!("`{other}` is none of Service, ServiceEntry, Gateway, GatewayClass")));
            }
        }
    }
    if services.is_empty() {
        return Ok(Target::Nothing);
    }
    Ok(Target::Services(services))
}

/// Istio's workload selector: `matchLabels` only.
fn selector_target(at: &Cursor<'_>) -> Read<Target> {
    at.only(&["matchLabels"])?;
    let labels = text_map(&at.get("matchLabels"))?;
    if labels.is_empty() {
        return Ok(Target::Everything);
    }
    Ok(Target::Pods(Selector::of_labels(labels)))
}

fn bounded_list<'a>(at: &Cursor<'a>) -> Read<Vec<Cursor<'a>>> {
    let items = at.list()?;
    if items.len() > MAX_ITEMS {
        return Err(at.error(format!("has {} items; at most {MAX_ITEMS} are allowed", items.len())));
    }
    Ok(items)
}

/// A list that, if it is written at all, must not be empty: empty would match everything or nothing by accident.
fn filled_list<'a>(at: &Cursor<'a>) -> Read<Vec<Cursor<'a>>> {
    let items = bounded_list(at)?;
    if items.is_empty() && !at.is_absent() {
        return Err(at.error("is empty; leave it out or fill it"));
    }
    Ok(items)
}

fn rule(at: &Cursor<'_>, meta: &Meta) -> Read<Rule> {
    at.only(&["from", "to", "when"])?;
    let mut rule = Rule::default();
    for item in filled_list(&at.get("from"))? {
        item.only(&["source"])?;
        rule.from.push(source(&item.get("source"), meta)?);
    }
    for item in filled_list(&at.get("to"))? {
        item.only(&["operation"])?;
        rule.to.push(operation(&item.get("operation"))?);
    }
    for item in filled_list(&at.get("when"))? {
        rule.when.push(condition(&item, meta)?);
    }
    Ok(rule)
}

const SOURCE_L4: &[&str] = &["principals", "namespaces", "serviceAccounts", "ipBlocks"];
const SOURCE_BEYOND: &[&str] = &["requestPrincipals", "remoteIpBlocks", "trustDomains"];
const OPERATION_BEYOND: &[&str] = &["hosts", "methods", "paths"];

fn source(at: &Cursor<'_>, meta: &Meta) -> Read<Source> {
    refuse_unknown(at, SOURCE_L4, SOURCE_BEYOND)?;
    let source = Source {
        principals: compare(at, "principals", text_match)?,
        namespaces: compare(at, "namespaces", text_match)?,
        service_accounts: compare(at, "serviceAccounts", |text, at| account(text, at, meta))?,
        ip_blocks: compare(at, "ipBlocks", ip_block)?,
        http: said([
            HttpField::RequestPrincipals(compare(at, "requestPrincipals", text_match)?),
            HttpField::RemoteIps(compare(at, "remoteIpBlocks", ip_block)?),
            HttpField::TrustDomains(compare(at, "trustDomains", text_match)?),
        ]),
        beyond_l4: beyond(at, SOURCE_BEYOND)?,
    };
    let says_nothing = source.principals.is_empty()
        && source.namespaces.is_empty()
        && source.service_accounts.is_empty()
        && source.ip_blocks.is_empty()
        && source.beyond_l4.is_empty();
    if says_nothing {
        return Err(at.error("must name at least one field"));
    }
    Ok(source)
}

fn operation(at: &Cursor<'_>) -> Read<Operation> {
    refuse_unknown(at, &["ports"], OPERATION_BEYOND)?;
    let operation = Operation {
        ports: compare(at, "ports", port)?,
        http: said([
            HttpField::Hosts(compare(at, "hosts", |text, at| text_match(&text.to_ascii_lowercase(), at))?),
            HttpField::Methods(compare(at, "methods", text_match)?),
            HttpField::Paths(compare(at, "paths", path_pattern)?),
        ]),
        beyond_l4: beyond(at, OPERATION_BEYOND)?,
    };
    if operation.ports.is_empty() && operation.beyond_l4.is_empty() {
        return Err(at.error("must name at least one field"));
    }
    Ok(operation)
}

/// Those that are not empty.
fn said<const N: usize>(fields: [HttpField; N]) -> Vec<HttpField> {
    let is_empty = |field: &HttpField| match field {
        HttpField::Paths(values) => values.is_empty(),
        HttpField::RemoteIps(values) => values.is_empty(),
        HttpField::Hosts(values)
        | HttpField::Methods(values)
        | HttpField::RequestPrincipals(values)
        | HttpField::Audiences(values)
        | HttpField::Presenters(values)
        | HttpField::Header(_, values)
        | HttpField::Claim(_, values)
        | HttpField::TrustDomains(values) => values.is_empty(),
    };
    fields.into_iter().filter(|field| !is_empty(field)).collect()
}

/// Escapes are written in capitals, as nodes spell them.
fn path_pattern(text: &str, at: &Cursor<'_>) -> Read<PathPattern> {
    let mut spelled = String::with_capacity(text.len());
    let mut escape = 0;
    for letter in text.chars() {
        spelled.push(if escape > 0 { letter.to_ascii_uppercase() } else { letter });
        escape = if letter == '%' { 2 } else { u8::saturating_sub(escape, 1) };
    }
    if !spelled.contains("{*}") && !spelled.contains("{**}") {
        return text_match(&spelled, at).map(PathPattern::Text);
    }
    let elements: Vec<&str> = spelled.split('/').collect();
    let last = elements.len() - 1;
    let fits = |(index, element): (usize, &&str)| match *element {
        "{*}" => true,
        "{**}" => index == last,
        plain => !plain.contains(['*', '{', '}']),
    };
    if !spelled.starts_with('/') || !elements.iter().enumerate().all(fits) {
        return Err(at.error(format!(
            "`{text}`: a template begins with a slash, its operators stand alone between slashes, and {{**}} comes last"
        )));
    }
    Ok(PathPattern::Template(spelled))
}

fn refuse_unknown(at: &Cursor<'_>, l4: &[&str], beyond: &[&str]) -> Read<()> {
    for (key, field) in at.map()? {
        let known = |name: &&str| *name == key || negated(name) == key;
        if !l4.iter().chain(beyond).any(known) {
            return Err(field.error("is not a known field"));
        }
    }
    Ok(())
}

/// `principals` → `notPrincipals`.
fn negated(name: &str) -> String {
    let mut letters = name.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    format!("not{}{}", first.map_or_else(String::new, String::from), letters.as_str())
}

fn beyond(at: &Cursor<'_>, names: &[&str]) -> Read<Vec<String>> {
    let mut found = Vec::new();
    for name in names {
        for field in [(*name).to_owned(), negated(name)] {
            if !filled_list(&at.get(&field))?.is_empty() {
                found.push(field);
            }
        }
    }
    Ok(found)
}

fn compare<T>(at: &Cursor<'_>, name: &str, parse: impl Fn(&str, &Cursor<'_>) -> Read<T>) -> Read<Compare<T>> {
    Ok(Compare { any: values(&at.get(name), &parse)?, none: values(&at.get(&negated(name)), &parse)? })
}

fn values<T>(at: &Cursor<'_>, parse: impl Fn(&str, &Cursor<'_>) -> Read<T>) -> Read<Vec<T>> {
    filled_list(at)?.iter().map(|item| parse(item.required_text()?, item)).collect()
}

fn text_match(text: &str, at: &Cursor<'_>) -> Read<TextMatch> {
    let matched = if text == "*" {
        TextMatch::Present
    } else if let Some(prefix) = text.strip_suffix('*') {
        TextMatch::Prefix(prefix.to_owned())
    } else if let Some(suffix) = text.strip_prefix('*') {
        TextMatch::Suffix(suffix.to_owned())
    } else {
        TextMatch::Exact(text.to_owned())
    };
    let rest = match &matched {
        TextMatch::Prefix(t) | TextMatch::Suffix(t) | TextMatch::Exact(t) => t.as_str(),
        TextMatch::Present => "",
    };
    if rest.contains('*') {
        return Err(at.error(format!("`{text}` has a `*` that is neither first nor last")));
    }
    if rest.starts_with("spiffe://") {
        return Err(at.error(format!("`{text}`: write principals without spiffe://")));
    }
    Ok(matched)
}

fn account(text: &str, at: &Cursor<'_>, meta: &Meta) -> Read<(String, String)> {
    let (namespace, name) = text.split_once('/').unwrap_or((meta.namespace.as_str(), text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
        return Err(at.error(format!("`{text}` is neither `namespace/account` nor `account`")));
    }
    Ok((namespace.to_owned(), name.to_owned()))
}

fn ip_block(text: &str, at: &Cursor<'_>) -> Read<IpNet> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map(|net| net.trunc())
        .map_err(|_| at.error(format!("`{text}` is neither an IP address nor a CIDR block")))
}

fn port(text: &str, at: &Cursor<'_>) -> Read<u16> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(at.error(format!("`{text}` is not a port (1-65535)"))),
    }
}

fn condition(at: &Cursor<'_>, meta: &Meta) -> Read<When> {
    at.only(&["key", "values", "notValues"])?;
    let key_at = at.get("key");
    let key = key_at.required_text()?;
    if at.get("values").is_absent() && at.get("notValues").is_absent() {
        return Err(at.error("must have values or notValues"));
    }
    let key = match key {
        "source.ip" => ConditionKey::SourceIp(compare(at, "values", ip_block)?),
        "source.namespace" => ConditionKey::SourceNamespace(compare(at, "values", text_match)?),
        "source.principal" => ConditionKey::SourcePrincipal(compare(at, "values", text_match)?),
        "source.serviceAccount" => {
            ConditionKey::SourceServiceAccount(compare(at, "values", |text, at| account(text, at, meta))?)
        }
        "destination.ip" => ConditionKey::DestinationIp(compare(at, "values", ip_block)?),
        "destination.port" => ConditionKey::DestinationPort(compare(at, "values", port)?),
        _ if is_beyond_l4(key) => match http_key(key, at, &key_at)? {
            Some(field) => ConditionKey::Http(key.to_owned(), field),
            None => ConditionKey::BeyondL4(key.to_owned()),
        },
        _ => return Err(key_at.error(format!("`{key}` is not a known condition key"))),
    };
    Ok(When { key })
}

/// `None`: a key that nothing here can evaluate.
fn http_key(key: &str, at: &Cursor<'_>, key_at: &Cursor<'_>) -> Read<Option<HttpField>> {
    let texts = || compare(at, "values", text_match);
    let inner = |prefix: &str| key.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(']'));
    if let Some(name) = inner("request.headers[") {
        if !is_header_name(name) {
            return Err(key_at.error(format!("`{name}` is no name of a header")));
        }
        return Ok(Some(HttpField::Header(name.to_ascii_lowercase(), texts()?)));
    }
    if let Some(path) = inner("request.auth.claims[") {
        let names: Vec<String> = path.split("][").map(str::to_owned).collect();
        if names.iter().any(|name| name.is_empty() || name.contains(['[', ']'])) {
            return Err(key_at.error("names a claim as `request.auth.claims[a]` or `request.auth.claims[a][b]`"));
        }
        return Ok(Some(HttpField::Claim(names, texts()?)));
    }
    Ok(Some(match key {
        "remote.ip" => HttpField::RemoteIps(compare(at, "values", ip_block)?),
        "source.trustDomain" => HttpField::TrustDomains(texts()?),
        "request.auth.principal" => HttpField::RequestPrincipals(texts()?),
        "request.auth.audiences" => HttpField::Audiences(texts()?),
        "request.auth.presenter" => HttpField::Presenters(texts()?),
        _ => return Ok(None),
    }))
}

fn is_beyond_l4(key: &str) -> bool {
    matches!(
        key,
        "remote.ip"
            | "connection.sni"
            | "source.trustDomain"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
    ) || (key.ends_with(']')
        && (key.starts_with("request.headers[")
            || key.starts_with("request.auth.claims[")
            || key.starts_with("experimental.envoy.filters.")))
}

pub(super) fn peer_authentication(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let spec = at.get("spec");
    let target = spec.map().and_then(|_| selector_target(&spec.get("selector")));
    let read = error.map_or_else(|| peer_spec(&spec), Err);
    let (spec, error) = or_unreadable(read, target);
    let policy = PeerAuthentication { meta, spec };
    Ok((Object::PeerAuthentication(Arc::new(policy)), error))
}

fn peer_spec(spec: &Cursor<'_>) -> Read<PeerAuthenticationSpec> {
    spec.only(&["selector", "mtls", "portLevelMtls"])?;
    let target = selector_target(&spec.get("selector"))?;
    let ports_at = spec.get("portLevelMtls");
    let mut ports = std::collections::BTreeMap::new();
    for (key, at) in ports_at.map()? {
        ports.insert(port(key, &at)?, mode(&at)?);
    }
    if !ports.is_empty() && target == Target::Everything {
        return Err(ports_at.error("needs a selector"));
    }
    Ok(PeerAuthenticationSpec { target, mode: mode(&spec.get("mtls"))?, ports })
}

fn mode(at: &Cursor<'_>) -> Read<MtlsMode> {
    at.only(&["mode"])?;
    let mode = at.get("mode");
    match mode.text()? {
        None | Some("UNSET") => Ok(MtlsMode::Unset),
        Some("PERMISSIVE" | "DISABLE") => Ok(MtlsMode::Permissive),
        Some("STRICT") => Ok(MtlsMode::Strict),
        Some(other) => Err(mode.error(format!("`{other}` is none of UNSET, DISABLE, PERMISSIVE, STRICT"))),
    }
}
