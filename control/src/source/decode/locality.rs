//! `loadBalancer.localityLbSetting` of a DestinationRule: which places come first, or get which share.
//!
//! What Istio refuses is refused here: shares that do not add up to 100, places that overlap, shares beside an order. An order
//! needs `outlierDetection`, as there; without it nothing would be known of an endpoint that fails.

use crate::model::{Distribution, LocalityBalancing, LocalityScope};
use crate::source::decode::balancer::ignore;
use crate::source::decode::traffic::{count, unknown};
use crate::source::tree::{Cursor, Read};

/// Places of one object; a choice for a client looks at each.
const MOST_PLACES: usize = 64;

/// The order where none is given.
const NEAREST: [LocalityScope; 3] = [LocalityScope::Region, LocalityScope::Zone, LocalityScope::Subzone];

/// `ejects`: endpoints that fail are ejected.
pub(super) fn locality(at: &Cursor<'_>, ejects: bool, ignored: &mut Vec<String>) -> Read<Option<LocalityBalancing>> {
    // Where it is off nothing is asked for: no outlierDetection brings it with it, as it would in Istio.
    if at.is_absent() || at.get("enabled").boolean()? == Some(false) {
        return Ok(None);
    }
    unknown(at, &["enabled", "distribute", "failover", "failoverPriority"], ignored)?;
    let [distribute, failover, priority] = ["distribute", "failover", "failoverPriority"].map(|key| at.get(key));
    let shares = distribute.list()?;
    let (regions, labels) = (failover.list()?, priority.texts()?);
    if !shares.is_empty() {
        if !regions.is_empty() {
            return Err(failover.error("cannot be beside distribute"));
        }
        if !labels.is_empty() {
            ignore(&priority, "distribute decides", ignored);
        }
        return Ok(Some(LocalityBalancing::Distribute(distributions(&distribute, &shares)?)));
    }
    if !ejects {
        ignore(at, "only distribute counts without an outlierDetection", ignored);
        return Ok(None);
    }
    let scopes = if labels.is_empty() { NEAREST.to_vec() } else { scopes(&labels, ignored) };
    if !labels.is_empty() && !regions.is_empty() {
        ignore(&failover, "failoverPriority decides", ignored);
        return Ok(Some(LocalityBalancing::Nearest { scopes, failover: Vec::new() }));
    }
    let failover = regions.iter().map(region).collect::<Read<_>>()?;
    Ok(Some(LocalityBalancing::Nearest { scopes, failover }))
}

fn distributions(at: &Cursor<'_>, shares: &[Cursor<'_>]) -> Read<Vec<Distribution>> {
    let mut found: Vec<Distribution> = Vec::new();
    for item in shares {
        let from = place(&item.get("from"), item.get("from").required_text()?)?;
        let mut to: Vec<(String, u32)> = Vec::new();
        for (key, weight) in item.get("to").map()? {
            let name = place(&weight, key)?;
            if to.iter().any(|(other, _)| overlap(other, &name)) {
                return Err(weight.error("overlaps another place"));
            }
            let percent = count(&weight)?;
            if !(1..=100).contains(&percent) {
                return Err(weight.error(format!("{percent} is not from 1 to 100")));
            }
            to.push((name, percent));
        }
        let sum: u32 = to.iter().map(|(_, percent)| percent).sum();
        if sum != 100 {
            return Err(item.get("to").error(format!("the shares add up to {sum}, not to 100")));
        }
        if found.iter().any(|other| overlap(&other.from, &from)) {
            return Err(item.get("from").error("overlaps another place"));
        }
        found.push(Distribution { from, to });
    }
    let places: usize = found.iter().map(|one| one.to.len()).sum();
    match places > MOST_PLACES {
        true => Err(at.error(format!("has {places} places; at most {MOST_PLACES} are allowed"))),
        false => Ok(found),
    }
}

/// `region`, `region/zone` or `region/zone/subzone`, or with `*` at the end.
fn place(at: &Cursor<'_>, text: &str) -> Read<String> {
    let parts: Vec<&str> = text.split('/').collect();
    let is_any_before_the_end = parts.iter().rev().skip(1).any(|part| *part == "*");
    if parts.len() > 3 || parts.contains(&"") || is_any_before_the_end {
        return Err(at.error(format!("`{text}` is no place such as region/zone/*")));
    }
    Ok(text.to_owned())
}

/// Whether there may be a place that is in both.
fn overlap(one: &str, other: &str) -> bool {
    one.split('/').zip(other.split('/')).all(|(one, other)| one == other || one == "*" || other == "*")
}

fn region(at: &Cursor<'_>) -> Read<(String, String)> {
    let (from, to) = (at.get("from").required_text()?, at.get("to").required_text()?);
    if from == to || to.contains('*') {
        return Err(at.error("must name two regions"));
    }
    Ok((from.to_owned(), to.to_owned()))
}

/// Labels up to the first that nodes cannot compare: they know where pods are, and not their labels.
fn scopes(labels: &[(&str, Cursor<'_>)], ignored: &mut Vec<String>) -> Vec<LocalityScope> {
    let mut scopes = Vec::new();
    for (label, at) in labels {
        scopes.push(match *label {
            "topology.kubernetes.io/region" => LocalityScope::Region,
            "topology.kubernetes.io/zone" => LocalityScope::Zone,
            "topology.istio.io/subzone" => LocalityScope::Subzone,
            "kubernetes.io/hostname" => LocalityScope::Node,
            "topology.istio.io/cluster" => LocalityScope::Cluster,
            "topology.istio.io/network" => LocalityScope::Network,
            _ => {
                ignore(
                    at,
                    "nodes compare the labels of topology alone, so neither this nor what follows counts",
                    ignored,
                );
                break;
            }
        });
    }
    scopes
}

#[cfg(test)]
mod tests {
    use super::{locality, overlap};
    use crate::source::tree::{Cursor, parse};

    #[test]
    fn what_istio_refuses_is_an_error_and_what_has_no_effect_is_told() {
        let read = |text: &str, ejects| {
            let node = parse(text).unwrap();
            let mut ignored = Vec::new();
            match locality(&Cursor::root(&node), ejects, &mut ignored) {
                Ok(found) => format!("{} {}", found.is_some(), ignored.join(", ")),
                Err(error) => format!("{} {}", error.field, error.message),
            }
        };
        let cases = [
            ("{enabled: false, distribute: [{from: a, to: {b: 100}}]}", true, "false "),
            ("{}", true, "true "),
            ("{failover: [{from: a, to: b}]}", false, "only distribute counts without"),
            ("{distribute: [{from: a, to: {b: 100}}]}", false, "true "),
            ("{distribute: [{from: a, to: {b: 90}}]}", true, "distribute[0].to the shares add up to 90"),
            ("{distribute: [{from: a, to: {b: 0, c: 100}}]}", true, "0 is not from 1 to 100"),
            ("{distribute: [{from: a, to: {'b/*': 50, b/c: 50}}]}", true, "overlaps another place"),
            ("{distribute: [{from: a, to: {b: 100}}, {from: a/b, to: {b: 100}}]}", true, "[1].from overlaps"),
            ("{distribute: [{from: a/*/c, to: {b: 100}}]}", true, "`a/*/c` is no place"),
            ("{distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]}", true, "beside distribute"),
            ("{failover: [{from: a, to: a}]}", true, "must name two regions"),
            ("{failoverPriority: [topology.kubernetes.io/zone]}", true, "true "),
            (
                "{failoverPriority: [topology.kubernetes.io/zone, version]}",
                true,
                "neither this nor what follows counts",
            ),
            (
                "{failoverPriority: [kubernetes.io/hostname], failover: [{from: a, to: b}]}",
                true,
                "failoverPriority decides",
            ),
            ("{zones: 1}", true, "true zones"),
        ];
        for (text, ejects, expected) in cases {
            let found = read(text, ejects);
            assert!(found.contains(expected), "{text}: {found:?} does not say {expected:?}");
        }
    }

    #[test]
    fn places_overlap_where_one_may_be_in_the_other() {
        for (one, other, expected) in [
            ("a", "a/b", true),
            ("a/*", "a/b/c", true),
            ("*", "a", true),
            ("a/b", "a/c", false),
            ("a", "b", false),
            ("a/b/c", "a/b/d", false),
        ] {
            assert_eq!(overlap(one, other), expected, "{one} {other}");
            assert_eq!(overlap(other, one), expected, "{other} {one}");
        }
    }
}
