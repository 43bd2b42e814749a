//! RequestAuthentication to RequestAuth, and whom it applies to.
//!
//! It has no stand-in for proxies that do not take it: by itself it lets requests without a token pass, so it keeps nobody
//! out, and a policy that asks for a token is closed there in its plain form.

use tulle_proto::mesh;

use crate::model::{Condition, JwtRule, Pod, RequestAuthentication, Spec, Target, World};
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

/// It is made of nothing but itself.
pub(super) fn translate(auth: &RequestAuthentication) -> (Resource, Condition) {
    let meta = &auth.meta;
    let (rules, unreadable) = match &auth.spec {
        Spec::Good(spec) => (&spec.rules[..], None),
        Spec::Unreadable { reason, .. } => (&[][..], Some(reason)),
    };
    let message = mesh::RequestAuth {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        rules: rules.iter().map(rule).collect(),
        unreadable: unreadable.cloned().unwrap_or_default(),
    };
    let resource = Resource::new(Kind::RequestAuth, name(auth), &message, Vec::new());
    (resource, condition(target(auth), rules, unreadable))
}

fn condition(target: &Target, rules: &[JwtRule], unreadable: Option<&String>) -> Condition {
    if let Some(reason) = unreadable {
        let message = format!("The spec cannot be read, so every token is refused: {reason}");
        return Condition::failing("Accepted", "Invalid", message);
    }
    if *target == Target::Nothing {
        let message = "It names gateways only, which no node proxy serves";
        return Condition::failing("Enforced", "UnsupportedTarget", message.into());
    }
    let without: Vec<&str> =
        rules.iter().filter(|rule| rule.jwks.is_empty()).map(|rule| rule.issuer.as_str()).collect();
    if without.is_empty() {
        return Condition::holding("Enforced", "Enforced", "Enforced whole".into());
    }
    let message = format!(
        "Keys are taken from `jwks` only and not fetched, so every token of these issuers is refused: {}",
        without.join(", ")
    );
    Condition::failing("Enforced", "NotEnforcedWhole", message)
}

fn rule(from: &JwtRule) -> mesh::JwtRule {
    let header = |(name, prefix): &(String, String)| mesh::JwtHeader { name: name.clone(), prefix: prefix.clone() };
    let claim =
        |(header, claim): &(String, Vec<String>)| mesh::ClaimHeader { header: header.clone(), claim: claim.clone() };
    mesh::JwtRule {
        issuer: from.issuer.clone(),
        audiences: from.audiences.clone(),
        jwks: from.jwks.clone(),
        from_headers: from.from_headers.iter().map(header).collect(),
        from_params: from.from_params.clone(),
        from_cookies: from.from_cookies.clone(),
        forward: from.forward,
        payload_header: from.payload_header.clone(),
        claim_headers: from.claim_headers.iter().map(claim).collect(),
        no_keys: match (from.jwks.is_empty(), from.jwks_uri.is_empty()) {
            (false, _) => String::new(),
            (true, true) => "neither jwks nor jwksUri is given".to_owned(),
            (true, false) => format!("keys are not fetched from {}", from.jwks_uri),
        },
    }
}
