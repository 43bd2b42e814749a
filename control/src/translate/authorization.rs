//! AuthorizationPolicy to Authorization: the part that a connection shows, closed where it does not; `l7` adds the whole.
//!
//! In an ALLOW, a rule with HTTP fields is replaced by one that never matches; in a DENY and an AUDIT, HTTP fields count
//! as met. That is for bytes that are not HTTP, and for proxies that do not know the rest.
//! Rules keep their index, so that a denial names the rule as the user numbered it. What could not be enforced whole
//! is said in a condition.

use tulle_proto::names;
use tulle_proto::security;
use tulle_proto::security::string_match::MatchType;

use crate::model::{
    Action, AuthorizationPolicy, AuthorizationSpec, Compare, Condition, ConditionKey, Meta, Operation, Pod, Rule,
    Source, Spec, Target, TextMatch, World,
};
use crate::resource::{Audience, Kind, Resource};
use crate::translate::Settings;
use crate::translate::aliases;
use crate::translate::denial;
use crate::translate::endpoints::Endpoints;
use crate::translate::l7;
use crate::translate::service::octets;

/// What became of one policy.
pub(super) struct Translated {
    pub(super) resource: Option<Resource>,
    /// Chooses the workloads that must name it; `None`: none must.
    pub(super) selects: Option<Target>,
    pub(super) conditions: Vec<Condition>,
}

pub(super) fn translate(policy: &AuthorizationPolicy, settings: &Settings) -> Translated {
    match &policy.spec {
        Spec::Unreadable { target, reason } => {
            let everything = Target::Everything;
            let target = target.as_ref().unwrap_or(&everything);
            unreadable(policy, target, reason, settings)
        }
        Spec::Good(spec) => readable(policy, spec, settings),
    }
}

fn unreadable(policy: &AuthorizationPolicy, target: &Target, reason: &str, settings: &Settings) -> Translated {
    let meta = &policy.meta;
    if policy.without_effect {
        let message = format!("The spec cannot be read; a dry run or AUDIT denies nothing: {reason}");
        return Translated {
            resource: None,
            selects: None,
            conditions: vec![Condition::failing("Accepted", "Invalid", message)],
        };
    }
    let scope = scope(policy, target, settings);
    let applies = match target {
        Target::Everything => "everything that it could apply to".to_owned(),
        _ => "all traffic to what it selects".to_owned(),
    };
    let message = format!("The spec cannot be read, so {applies} is denied: {reason}");
    Translated {
        resource: scope.map(|scope| denial(&meta.namespace, &meta.name, scope)),
        selects: selects(target),
        conditions: vec![Condition::failing("Accepted", "Invalid", message)],
    }
}

fn readable(policy: &AuthorizationPolicy, spec: &AuthorizationSpec, settings: &Settings) -> Translated {
    let mut conditions = Vec::new();
    let scope = scope(policy, &spec.target, settings);
    let action = action(spec.action);
    let Some(scope) = scope else {
        let message = "It names gateways only, which no node proxy serves";
        conditions.push(Condition::failing("Enforced", "UnsupportedTarget", message.into()));
        return Translated { resource: None, selects: None, conditions };
    };
    let mut closed = Vec::new();
    let rules = aliases::expand(&spec.rules, settings);
    let http = rules.iter().any(|rule| !beyond_l4(rule).is_empty()).then(|| l7::extension(&rules, action));
    let plain: Vec<security::Rule> = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let beyond = beyond_l4(rule);
            let nobodys = l7::beyond(rule);
            if !nobodys.is_empty() {
                closed.push(format!("rule {index} ({})", nobodys.join(", ")));
            }
            match action {
                security::Action::Allow if !beyond.is_empty() => never(),
                _ => l4_rule(rule),
            }
        })
        .collect();
    conditions.extend(said(policy, spec, &closed, settings));
    let meta = &policy.meta;
    let message = security::Authorization {
        name: meta.name.clone(),
        namespace: match scope {
            security::Scope::Global => String::new(),
            _ => meta.namespace.clone(),
        },
        scope: scope.into(),
        action: action.into(),
        rules: plain,
        dry_run: policy.without_effect,
        extensions: http.into_iter().collect(),
    };
    let mut resource = Resource::new(Kind::Authorization, meta.path(), &message, Vec::new());
    if policy.without_effect {
        resource.audience = Audience::KnowsDryRun;
    }
    Translated { resource: Some(resource), selects: selects(&spec.target), conditions }
}

/// The conditions of a policy that is enforced at least in part.
fn said(
    policy: &AuthorizationPolicy,
    spec: &AuthorizationSpec,
    closed: &[String],
    settings: &Settings,
) -> Vec<Condition> {
    let mut conditions = Vec::new();
    conditions.push(if spec.action == Action::Custom {
        let message = "External authorizers are not asked; what the rules match is denied";
        Condition::failing("Enforced", "UnsupportedAction", message.into())
    } else if closed.is_empty() {
        Condition::holding("Enforced", "Enforced", "Enforced whole".into())
    } else {
        let effect = match spec.action {
            Action::Allow => "they allow nothing",
            Action::Audit => "they record whatever the rest of the rule matches",
            _ => "they deny whatever the rest of the rule matches",
        };
        let message = format!("These rules name what no node can evaluate, so {effect}: {}", closed.join("; "));
        Condition::failing("Enforced", "NotEnforcedWhole", message)
    });
    if matches!(spec.target, Target::Services(_)) {
        let message = "It is enforced at the pods behind the named services, for all traffic to them";
        conditions.push(Condition::holding("AppliedToPods", "TargetRefs", message.into()));
    }
    if spec.target == Target::Everything
        && policy.meta.namespace == settings.istio_root_namespace
        && policy.meta.namespace != settings.root_namespace
    {
        let message = format!(
            "Found in {}, it applies to the whole mesh as it would under Istio; move it to {}",
            settings.istio_root_namespace, settings.root_namespace
        );
        conditions.push(Condition::holding("MeshWide", "IstioRootNamespace", message));
    }
    conditions
}

fn action(action: Action) -> security::Action {
    match action {
        Action::Allow => security::Action::Allow,
        Action::Deny | Action::Custom => security::Action::Deny,
        Action::Audit => security::Action::Audit,
    }
}

/// `None`: applies to nothing that a node proxy serves.
fn scope(policy: &AuthorizationPolicy, target: &Target, settings: &Settings) -> Option<security::Scope> {
    match target {
        Target::Everything if settings.is_root(&policy.meta.namespace) => Some(security::Scope::Global),
        Target::Everything => Some(security::Scope::Namespace),
        Target::Pods(_) | Target::Services(_) => Some(security::Scope::WorkloadSelector),
        Target::Nothing => None,
    }
}

/// Other policies need not be named: everybody in their scope has them.
fn selects(target: &Target) -> Option<Target> {
    match target {
        Target::Everything | Target::Nothing => None,
        Target::Pods(_) | Target::Services(_) => Some(target.clone()),
    }
}

/// Whether the policy with such a target is one that a pod must name.
pub(super) fn applies(
    policy: &Meta,
    target: &Target,
    pod: &Pod,
    world: &World,
    endpoints: &Endpoints,
    settings: &Settings,
) -> bool {
    let same = pod.meta.namespace == policy.namespace;
    match target {
        Target::Everything | Target::Nothing => false,
        Target::Pods(selector) => (same || settings.is_root(&policy.namespace)) && selector.matches(&pod.meta.labels),
        Target::Services(names) => same && names.iter().any(|name| behind(pod, policy, name, world, endpoints)),
    }
}

/// True for a pod that the service selects, or that serves it by an endpoint slice.
fn behind(pod: &Pod, policy: &Meta, service: &str, world: &World, endpoints: &Endpoints) -> bool {
    let key = (policy.namespace.clone(), service.to_owned());
    world.services.get(&key).is_some_and(|service| {
        let selector = &service.selector;
        let selected = !selector.is_empty() && selector.iter().all(|(k, v)| pod.meta.labels.get(k) == Some(v));
        selected || endpoints.serves(pod, &key)
    })
}

pub(super) fn beyond_l4(rule: &Rule) -> Vec<&str> {
    let from = rule.from.iter().flat_map(|source| &source.beyond_l4);
    let to = rule.to.iter().flat_map(|operation| &operation.beyond_l4);
    let when = rule.when.iter().filter_map(|when| match &when.key {
        ConditionKey::Http(key, _) | ConditionKey::BeyondL4(key) => Some(key),
        _ => None,
    });
    from.chain(to).chain(when).map(String::as_str).collect()
}

/// A match without attributes never matches.
fn never() -> security::Rule {
    security::Rule { clauses: vec![security::Clause { matches: vec![security::Match::default()] }] }
}

/// The L4 part of a rule; what is beyond L4 counts as met.
fn l4_rule(rule: &Rule) -> security::Rule {
    let mut clauses = Vec::new();
    // An alternative without L4 attributes is always met, and then so is the whole clause.
    let from: Vec<security::Match> = rule.from.iter().map(source).collect();
    if !from.is_empty() && !from.contains(&security::Match::default()) {
        clauses.push(security::Clause { matches: from });
    }
    let to: Vec<security::Match> = rule.to.iter().map(operation).collect();
    if !to.is_empty() && !to.contains(&security::Match::default()) {
        clauses.push(security::Clause { matches: to });
    }
    clauses.extend(rule.when.iter().filter_map(|when| {
        let matched = condition(&when.key);
        (matched != security::Match::default()).then(|| security::Clause { matches: vec![matched] })
    }));
    security::Rule { clauses }
}

pub(super) fn source(source: &Source) -> security::Match {
    let mut matched = security::Match::default();
    set_principals(&mut matched, &source.principals);
    set_namespaces(&mut matched, &source.namespaces);
    set_accounts(&mut matched, &source.service_accounts);
    matched.source_ips = blocks(&source.ip_blocks.any);
    matched.not_source_ips = blocks(&source.ip_blocks.none);
    matched
}

pub(super) fn operation(operation: &Operation) -> security::Match {
    security::Match {
        destination_ports: ports(&operation.ports.any),
        not_destination_ports: ports(&operation.ports.none),
        ..security::Match::default()
    }
}

pub(super) fn condition(key: &ConditionKey) -> security::Match {
    let mut matched = security::Match::default();
    match key {
        ConditionKey::SourceIp(values) => {
            matched.source_ips = blocks(&values.any);
            matched.not_source_ips = blocks(&values.none);
        }
        ConditionKey::DestinationIp(values) => {
            matched.destination_ips = blocks(&values.any);
            matched.not_destination_ips = blocks(&values.none);
        }
        ConditionKey::DestinationPort(values) => {
            matched.destination_ports = ports(&values.any);
            matched.not_destination_ports = ports(&values.none);
        }
        ConditionKey::SourcePrincipal(values) => set_principals(&mut matched, values),
        ConditionKey::SourceNamespace(values) => set_namespaces(&mut matched, values),
        ConditionKey::SourceServiceAccount(values) => set_accounts(&mut matched, values),
        ConditionKey::Http(..) | ConditionKey::BeyondL4(_) => {}
    }
    matched
}

fn set_principals(matched: &mut security::Match, values: &Compare<TextMatch>) {
    matched.principals = texts(&values.any);
    matched.not_principals = texts(&values.none);
}

fn set_namespaces(matched: &mut security::Match, values: &Compare<TextMatch>) {
    matched.namespaces = texts(&values.any);
    matched.not_namespaces = texts(&values.none);
}

fn set_accounts(matched: &mut security::Match, values: &Compare<(String, String)>) {
    matched.service_accounts = accounts(&values.any);
    matched.not_service_accounts = accounts(&values.none);
}

pub(super) fn texts(values: &[TextMatch]) -> Vec<security::StringMatch> {
    values
        .iter()
        .map(|value| security::StringMatch {
            match_type: Some(match value {
                TextMatch::Exact(text) => MatchType::Exact(text.clone()),
                TextMatch::Prefix(text) => MatchType::Prefix(text.clone()),
                TextMatch::Suffix(text) => MatchType::Suffix(text.clone()),
                TextMatch::Present => MatchType::Presence(()),
            }),
        })
        .collect()
}

fn accounts(values: &[(String, String)]) -> Vec<security::ServiceAccountMatch> {
    values
        .iter()
        .map(|(namespace, account)| security::ServiceAccountMatch {
            namespace: namespace.clone(),
            service_account: account.clone(),
        })
        .collect()
}

pub(super) fn blocks(values: &[ipnet::IpNet]) -> Vec<security::Address> {
    values
        .iter()
        .map(|net| security::Address { address: octets(&net.network()).into(), length: net.prefix_len().into() })
        .collect()
}

fn ports(values: &[u16]) -> Vec<u32> {
    values.iter().map(|port| u32::from(*port)).collect()
}

/// One match: callers without a proven identity.
pub(super) fn plaintext(ports: Vec<u32>) -> security::Match {
    security::Match {
        not_principals: texts(&[TextMatch::Present]),
        destination_ports: ports,
        ..security::Match::default()
    }
}

/// A DENY that workloads name, of rules of clauses of one match each.
pub(super) fn selected_denial(namespace: &str, name: &str, rules: Vec<Vec<security::Match>>) -> Resource {
    let message = security::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: rules
            .into_iter()
            .map(|clauses| security::Rule {
                clauses: clauses.into_iter().map(|matched| security::Clause { matches: vec![matched] }).collect(),
            })
            .collect(),
        dry_run: false,
        extensions: Vec::new(),
    };
    let path = format!("{namespace}/{name}");
    debug_assert!(!path.contains(names::EXTENSION_L7));
    Resource::new(Kind::Authorization, path, &message, Vec::new())
}
