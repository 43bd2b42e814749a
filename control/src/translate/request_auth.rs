//! RequestAuthentication to RequestAuth, and whom it applies to.
//!
//! It has no stand-in for proxies that do not take it: by itself it lets requests without a token pass, so it keeps nobody
//! out, and a policy that asks for a token is closed there in its plain form.

use std::fmt;

use tulle_proto::mesh;

use crate::model::{Condition, JwtRule, KeySource, KeySources, Pod, RequestAuthentication, Spec, Target, World};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;
use crate::translate::authorization;
use crate::translate::endpoints::Endpoints;

/// Resource name.
pub(super) fn name(auth: &RequestAuthentication) -> String {
    format!("RequestAuthentication/{}", auth.meta.path())
}

/// Whether it is one that a pod must name: all that apply to it, also those of its namespace and of the mesh.
pub(super) fn applies(
    auth: &RequestAuthentication,
    pod: &Pod,
    world: &World,
    endpoints: &Endpoints,
    settings: &Settings,
) -> bool {
    let namespace = &auth.meta.namespace;
    match target(auth) {
        Target::Everything => *namespace == pod.meta.namespace || settings.is_root(namespace),
        target => authorization::applies(&auth.meta, target, pod, world, endpoints, settings),
    }
}

fn target(auth: &RequestAuthentication) -> &Target {
    match &auth.spec {
        Spec::Good(spec) => &spec.target,
        Spec::Unreadable { target, .. } => target.as_ref().unwrap_or(&Target::Everything),
    }
}

/// It is made of itself and of the keys that were fetched for it.
pub(super) fn translate(auth: &RequestAuthentication, keys: &KeySources) -> (Resource, Vec<Condition>) {
    let meta = &auth.meta;
    let (rules, unreadable) = match &auth.spec {
        Spec::Good(spec) => (&spec.rules[..], None),
        Spec::Unreadable { reason, .. } => (&[][..], Some(reason)),
    };
    let message = mesh::RequestAuth {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        rules: rules.iter().map(|one| rule(one, keys)).collect(),
        unreadable: unreadable.cloned().unwrap_or_default(),
    };
    let resource = Resource::new(Kind::RequestAuth, name(auth), &message, Vec::new());
    let conditions = std::iter::once(enforced(target(auth), rules, keys, unreadable)).chain(fetched(rules, keys));
    (resource, conditions.collect())
}

/// The keys of a rule, or why there are none.
fn keys_of<'a>(rule: &'a JwtRule, keys: &'a KeySources) -> Result<&'a str, NoKeys> {
    if !rule.jwks.is_empty() {
        return Ok(&rule.jwks);
    }
    let Some(source) = rule.key_source() else { return Err(NoKeys::Unknown) };
    match keys.get(&source) {
        None => Err(NoKeys::NotYet(source)),
        Some(fetched) if fetched.jwks.is_empty() => Err(NoKeys::Failed(source)),
        Some(fetched) => Ok(&fetched.jwks),
    }
}

/// Why a rule has no keys.
enum NoKeys {
    Unknown,
    NotYet(KeySource),
    Failed(KeySource),
}

impl fmt::Display for NoKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("neither jwks nor jwksUri is given"),
            Self::NotYet(source) => write!(f, "keys were not fetched from {source} yet"),
            Self::Failed(source) => write!(f, "keys cannot be fetched from {source}"),
        }
    }
}

fn enforced(target: &Target, rules: &[JwtRule], keys: &KeySources, unreadable: Option<&String>) -> Condition {
    if let Some(reason) = unreadable {
        let message = format!("The spec cannot be read, so every token is refused: {reason}");
        return Condition::failing("Accepted", "Invalid", message);
    }
    if *target == Target::Nothing {
        let message = "It names gateways only, which no node proxy serves";
        return Condition::failing("Enforced", "UnsupportedTarget", message.into());
    }
    let without = |rule: &JwtRule| Some(format!("{} ({})", rule.issuer, keys_of(rule, keys).err()?));
    let without: Vec<String> = rules.iter().filter_map(without).collect();
    if without.is_empty() {
        return Condition::holding("Enforced", "Enforced", "Enforced whole".into());
    }
    let message = format!("Without keys every token of these issuers is refused: {}", without.join(", "));
    Condition::failing("Enforced", "NotEnforcedWhole", message)
}

/// Whether what control fetches is what the issuers have now. Without a word of the time, which would make it another one at
/// each look.
fn fetched(rules: &[JwtRule], keys: &KeySources) -> Option<Condition> {
    let sources: Vec<KeySource> = rules.iter().filter_map(JwtRule::key_source).collect();
    if sources.is_empty() {
        return None;
    }
    let failures: Vec<String> = sources
        .iter()
        .filter_map(|source| {
            let fetched = keys.get(source)?;
            let what_holds = match fetched.jwks.is_empty() {
                true => "there are no keys",
                false => "the keys that were fetched before stay in force",
            };
            (!fetched.failure.is_empty()).then(|| format!("{}; {what_holds}", fetched.failure))
        })
        .collect();
    let waiting: Vec<String> =
        sources.iter().filter(|source| !keys.contains_key(*source)).map(ToString::to_string).collect();
    Some(match (failures.is_empty(), waiting.is_empty()) {
        (false, _) => Condition::failing("KeysFetched", "FetchFailed", failures.join(". ")),
        (true, false) => {
            let message = format!("Control has not asked yet: {}", waiting.join(", "));
            Condition::failing("KeysFetched", "Pending", message)
        }
        (true, true) => {
            let plain = |source: &KeySource| source.to_string().starts_with("http://");
            let message = match sources.iter().any(plain) {
                true => "The newest fetch brought keys; without TLS, so whoever is on the way may put in their own",
                false => "The newest fetch brought keys",
            };
            Condition::holding("KeysFetched", "Fetched", message.into())
        }
    })
}

fn rule(from: &JwtRule, keys: &KeySources) -> mesh::JwtRule {
    let header = |(name, prefix): &(String, String)| mesh::JwtHeader { name: name.clone(), prefix: prefix.clone() };
    let claim =
        |(header, claim): &(String, Vec<String>)| mesh::ClaimHeader { header: header.clone(), claim: claim.clone() };
    let found = keys_of(from, keys);
    mesh::JwtRule {
        issuer: from.issuer.clone(),
        audiences: from.audiences.clone(),
        jwks: found.as_ref().map(|jwks| (*jwks).to_owned()).unwrap_or_default(),
        from_headers: from.from_headers.iter().map(header).collect(),
        from_params: from.from_params.clone(),
        from_cookies: from.from_cookies.clone(),
        forward: from.forward,
        payload_header: from.payload_header.clone(),
        claim_headers: from.claim_headers.iter().map(claim).collect(),
        no_keys: found.err().map(|why| why.to_string()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prost::Message;
    use tulle_proto::mesh;

    use super::translate;
    use crate::model::{
        Condition, FetchedKeys, JwtRule, KeySource, KeySources, Meta, RequestAuthentication, RequestAuthenticationSpec,
        Spec, Status, Target,
    };

    fn translated(keys: &KeySources) -> (mesh::JwtRule, Vec<Condition>) {
        let rule = JwtRule { issuer: "i".into(), jwks_uri: "https://i/keys".into(), ..JwtRule::default() };
        let spec = Spec::Good(RequestAuthenticationSpec { target: Target::Everything, rules: vec![rule] });
        let auth = RequestAuthentication { meta: Meta::default(), spec };
        let (resource, conditions) = translate(&auth, keys);
        let mut message = mesh::RequestAuth::decode(&resource.body[..]).unwrap();
        (message.rules.remove(0), conditions)
    }

    #[test]
    fn fetched_keys_go_to_nodes_and_failures_to_people() {
        let source = KeySource::Uri("https://i/keys".into());
        // key set and failure → sent, and which condition holds
        for (fetched, sent, enforced, fetched_well) in [
            (None, "", Status::False, (Status::False, "Pending")),
            (Some(("", "it is down")), "", Status::False, (Status::False, "FetchFailed")),
            (Some(("{}", "")), "{}", Status::True, (Status::True, "Fetched")),
            (Some(("{}", "it is down")), "{}", Status::True, (Status::False, "FetchFailed")),
        ] {
            let mut keys = KeySources::default();
            if let Some((jwks, failure)) = fetched {
                let fetched = FetchedKeys { jwks: jwks.into(), failure: failure.into() };
                keys.insert(source.clone(), Arc::new(fetched));
            }
            let (rule, conditions) = translated(&keys);
            assert_eq!(rule.jwks, sent, "{fetched:?}");
            assert_eq!(rule.no_keys.is_empty(), !sent.is_empty(), "{fetched:?}: {}", rule.no_keys);
            assert_eq!((conditions[0].kind, conditions[0].status), ("Enforced", enforced), "{fetched:?}");
            let told = &conditions[1];
            assert_eq!((told.kind, told.status, told.reason), ("KeysFetched", fetched_well.0, fetched_well.1));
            assert!(fetched.is_none_or(|(_, failure)| told.message.contains(failure)), "{}", told.message);
        }
    }
}
