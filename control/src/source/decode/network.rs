//! NetworkPolicy of networking.k8s.io/v1, as strictly as the API server reads it.
//!
//! The first error makes the whole policy isolate what it selects, in the directions that it names; both are read on
//! their own, so that a wrong rule closes no more than it must. Unknown fields are errors: one may be a restriction.

use std::sync::Arc;

use ipnet::IpNet;
use tulle_proto::names;

use crate::model::{
    Expression, Meta, NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, Object, Operator, PortMatch, Selector,
};
use crate::source::decode::core::transport;
use crate::source::decode::policy::PolicyResult;
use crate::source::decode::text_map;
use crate::source::tree::{Cursor, FieldError, Read, Value};

/// Most rules of a direction, and most peers or ports of a rule. The API has no limit; an object of 1.5 MiB, the most
/// that it stores, has some ten thousand.
const MAX_ITEMS: usize = 16_384;

/// Whether control wrote it: by the label and the name that it gives to what it makes.
pub(super) fn is_ours(at: &Cursor<'_>) -> bool {
    let meta = at.get("metadata");
    let text = |at: Cursor<'_>| at.text().ok().flatten().unwrap_or_default().to_owned();
    text(meta.get("labels").get(names::LABEL_MANAGED)) == names::MANAGED
        && text(meta.get("name")).starts_with(names::BESIDE)
}

pub(super) fn network(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let spec = at.get("spec");
    let pods = spec.map().and_then(|_| selector(&spec.get("podSelector"), &[]));
    let directions = directions(&spec);
    let rules = match (&error, &pods, &directions) {
        (Some(error), ..) | (None, Err(error), _) | (None, _, Err(error)) => Err(error.clone()),
        (None, Ok(_), Ok(_)) => rules(&spec),
    };
    let (isolates_ingress, isolates_egress) = directions.unwrap_or((true, true));
    let (rules, error) = match rules {
        Ok(rules) => (rules, None),
        Err(error) => ((Vec::new(), Vec::new()), Some(error)),
    };
    let policy = NetworkPolicy {
        meta,
        pods: pods.ok(),
        ingress: isolates_ingress.then_some(rules.0),
        egress: isolates_egress.then_some(rules.1),
        unreadable: error.as_ref().map(ToString::to_string),
    };
    Ok((Object::NetworkPolicy(Arc::new(policy)), error))
}

/// Whether it isolates ingress and egress. Without policyTypes: ingress always, egress if there are rules for it.
fn directions(spec: &Cursor<'_>) -> Read<(bool, bool)> {
    spec.map()?;
    let types = spec.get("policyTypes").texts()?;
    if types.is_empty() {
        return Ok((true, !spec.get("egress").list()?.is_empty()));
    }
    let mut found = (false, false);
    for (text, at) in types {
        match text {
            "Ingress" => found.0 = true,
            "Egress" => found.1 = true,
            other => return Err(at.error(format!("`{other}` is neither Ingress nor Egress"))),
        }
    }
    Ok(found)
}

/// The rules of both directions.
fn rules(spec: &Cursor<'_>) -> Read<(Vec<NetworkRule>, Vec<NetworkRule>)> {
    spec.only(&["podSelector", "policyTypes", "ingress", "egress"])?;
    let list = |field: &str, peers: &str| -> Read<Vec<NetworkRule>> {
        bounded(&spec.get(field))?.iter().map(|at| rule(at, peers)).collect()
    };
    Ok((list("ingress", "from")?, list("egress", "to")?))
}

fn bounded<'a>(at: &Cursor<'a>) -> Read<Vec<Cursor<'a>>> {
    let items = at.list()?;
    if items.len() > MAX_ITEMS {
        return Err(at.error(format!("has {} items; at most {MAX_ITEMS} are read", items.len())));
    }
    Ok(items)
}

fn rule(at: &Cursor<'_>, peers: &str) -> Read<NetworkRule> {
    at.only(&[peers, "ports"])?;
    Ok(NetworkRule {
        peers: bounded(&at.get(peers))?.iter().map(peer).collect::<Read<_>>()?,
        ports: bounded(&at.get("ports"))?.iter().map(port).collect::<Read<_>>()?,
    })
}

fn peer(at: &Cursor<'_>) -> Read<NetworkPeer> {
    at.only(&["podSelector", "namespaceSelector", "ipBlock"])?;
    let (pods, namespaces, block) = (at.get("podSelector"), at.get("namespaceSelector"), at.get("ipBlock"));
    match (pods.is_absent() && namespaces.is_absent(), block.is_absent()) {
        (true, true) => Err(at.error("names no peer: podSelector, namespaceSelector or ipBlock")),
        (false, false) => Err(block.error("cannot stand beside podSelector or namespaceSelector")),
        (true, false) => ip_block(&block),
        (false, true) => Ok(NetworkPeer::Pods {
            namespaces: if namespaces.is_absent() { None } else { Some(selector(&namespaces, &[])?) },
            pods: selector(&pods, &[])?,
        }),
    }
}

fn ip_block(at: &Cursor<'_>) -> Read<NetworkPeer> {
    at.only(&["cidr", "except"])?;
    let cidr_at = at.get("cidr");
    let cidr = net(cidr_at.required_text()?, &cidr_at)?;
    let mut except = Vec::new();
    for (text, at) in at.get("except").texts()? {
        let part = net(text, &at)?;
        if !cidr.contains(&part) {
            return Err(at.error(format!("`{text}` is no part of {cidr}")));
        }
        except.push(part);
    }
    Ok(NetworkPeer::Block { cidr, except })
}

pub(super) fn net(text: &str, at: &Cursor<'_>) -> Read<IpNet> {
    text.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| at.error(format!("`{text}` is not a CIDR block")))
}

fn port(at: &Cursor<'_>) -> Read<NetworkPort> {
    at.only(&["protocol", "port", "endPort"])?;
    let (first, last) = (at.get("port"), at.get("endPort"));
    let matched = match (first.value(), last.port()?) {
        (None | Some(Value::Null), None) => PortMatch::Any,
        (Some(Value::Text(name)), None) if !name.is_empty() => PortMatch::Name(name.clone()),
        (Some(Value::Int(_)), end) => {
            let first = first.port()?.unwrap_or_default();
            let end = end.unwrap_or(first);
            if end < first {
                return Err(last.error(format!("{end} is less than port, which is {first}")));
            }
            PortMatch::Range(first, end)
        }
        (_, Some(_)) => return Err(last.error("needs a port that is a number")),
        _ => return Err(first.error("is neither a port number nor a port name")),
    };
    Ok(NetworkPort { protocol: transport(&at.get("protocol"))?, port: matched })
}

/// Kubernetes' label selector, which may have these fields `besides`.
pub(super) fn selector(at: &Cursor<'_>, besides: &[&str]) -> Read<Selector> {
    at.only(&[&["matchLabels", "matchExpressions"], besides].concat())?;
    let mut selector = Selector::of_labels(text_map(&at.get("matchLabels"))?);
    for item in bounded(&at.get("matchExpressions"))? {
        item.only(&["key", "operator", "values"])?;
        let operator_at = item.get("operator");
        let operator = match operator_at.required_text()? {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => return Err(operator_at.error(format!("`{other}` is not a selector operator"))),
        };
        let values: Vec<String> = item.get("values").list()?.iter().map(Cursor::text_or_empty).collect::<Read<_>>()?;
        match (operator, values.is_empty()) {
            (Operator::In | Operator::NotIn, true) => {
                return Err(item.get("values").error("is needed by In and NotIn"));
            }
            (Operator::Exists | Operator::DoesNotExist, false) => {
                return Err(item.get("values").error("must be empty with Exists and DoesNotExist"));
            }
            _ => {}
        }
        selector.expressions.push(Expression { key: item.get("key").required_text()?.to_owned(), operator, values });
    }
    Ok(selector)
}
