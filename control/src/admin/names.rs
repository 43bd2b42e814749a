//! What a name means to a pod that looks it up: a Service or a pod behind one, something outside, or nothing, and what was meant.
//!
//! Pure. The pod's resolv.conf is the one that the kubelet writes: its namespace, `svc` and the cluster's domain are tried in
//! turn, and the name as it is at last. Limits: a pod with a `dnsPolicy` or `dnsConfig` of its own may have another list, and is
//! treated as if it had this one; names of ServiceEntries are names outside.

use crate::model::{Pod, World, in_namespace};
use crate::translate::Settings;

/// What a name means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A Service, by namespace and name.
    Service(String, String),
    /// One pod of a headless Service, by namespace and name.
    Pod(String, String),
    /// Nothing in the cluster, so the name servers of the pod are asked for it. In lower case, without a final dot.
    Outside(String),
}

/// The letters that one must change, add or leave out to make one word of the other.
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (line, own) in a.chars().enumerate() {
        let mut before = row[0];
        row[0] = line + 1;
        for (column, other) in b.iter().enumerate() {
            let changed = before + usize::from(own != *other);
            before = row[column + 1];
            row[column + 1] = changed.min(before + 1).min(row[column] + 1);
        }
    }
    row[b.len()]
}

/// The name that `wanted` may be a slip of the pen for. Two letters amiss in a word of four are the same word; in one of three
/// they are another.
pub(super) fn closest<'a>(names: impl Iterator<Item = &'a str>, wanted: &str) -> Option<&'a str> {
    let alike =
        names.map(|name| (distance(name, wanted), name)).filter(|(far, _)| *far <= (wanted.len() / 2).clamp(1, 3));
    alike.min().map(|(_, name)| name)
}

/// Whether text could be a name of DNS at all.
pub(super) fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let text = text.strip_suffix('.').unwrap_or(text);
    text.len() <= 253 && text.split('.').all(label)
}

/// What `name` means to a pod.
///
/// # Errors
/// It means nothing, in a sentence that says what was tried and what may have been meant.
pub(super) fn meaning(world: &World, settings: &Settings, pod: &Pod, name: &str) -> Result<Meaning, String> {
    let lower = name.to_ascii_lowercase();
    let (bare, absolute) = match lower.strip_suffix('.') {
        Some(bare) => (bare, true),
        None => (lower.as_str(), false),
    };
    let namespace = &pod.meta.namespace;
    let domain = &settings.cluster_domain;
    let search = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
    let mut tried: Vec<String> = Vec::new();
    if !absolute {
        tried.extend(search.iter().map(|suffix| format!("{bare}.{suffix}")));
    }
    tried.push(bare.to_owned());
    if let Some(found) = tried.iter().find_map(|full| inside(world, domain, full)) {
        return Ok(found);
    }
    let labels: Vec<&str> = bare.split('.').collect();
    let of_cluster = bare.ends_with(&format!(".{domain}")) || bare.ends_with(".svc");
    let of_namespace = labels.len() == 2 && world.namespaces.contains_key(labels[1]);
    if labels.len() > 1 && !of_cluster && !of_namespace {
        return Ok(Meaning::Outside(bare.to_owned()));
    }
    let (service, wanted) = (labels[0], labels.get(1).copied().unwrap_or(namespace));
    let tried = if absolute { format!("as it is, since it ends with a dot: {bare}") } else { tried.join(", ") };
    let meant = nearest(world, service, wanted, namespace).map_or_else(String::new, |meant| format!("; {meant}"));
    Err(format!(
        "the name {name} means nothing to {}: there is no Service {service} in namespace {wanted}{meant} (looked up: {tried})",
        pod.meta.path()
    ))
}

/// What has the full name.
fn inside(world: &World, domain: &str, full: &str) -> Option<Meaning> {
    let rest = full.strip_suffix(&format!(".svc.{domain}"))?;
    let labels: Vec<&str> = rest.split('.').collect();
    let key = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
    match labels[..] {
        [service, namespace] => {
            let (namespace, name) = key(namespace, service);
            world.services.contains_key(&(namespace.clone(), name.clone())).then_some(Meaning::Service(namespace, name))
        }
        [host, service, namespace] => {
            let headless = world.services.get(&key(namespace, service))?.names.headless;
            let of = |pod: &Pod| pod.meta.namespace == namespace && pod.subdomain == service && pod.hostname == host;
            let pod = world.pods.values().find(|pod| headless && of(pod))?;
            Some(Meaning::Pod(pod.meta.namespace.clone(), pod.meta.name.clone()))
        }
        _ => None,
    }
}

/// What may have been meant by a Service that is not there.
fn nearest(world: &World, service: &str, namespace: &str, own: &str) -> Option<String> {
    let same = world.services.values().map(|found| &found.meta).find(|meta| {
        // Its own namespace is the usual one that a name without namespace forgets.
        meta.name == service && (namespace == own || meta.namespace == own)
    });
    if let Some(meta) = same {
        return Some(format!("there is one in {}: say {}.{}", meta.namespace, meta.name, meta.namespace));
    }
    let here = || in_namespace(&world.services, namespace).map(|found| found.meta.name.as_str());
    match closest(here(), service) {
        Some(name) => Some(format!("there is {name} in {namespace}")),
        None => here().next().is_none().then(|| format!("namespace {namespace} has no Services")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Meaning, distance, is_name, meaning};
    use crate::admin::fixtures;
    use crate::translate::Settings;

    const WORLD: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: office}}
---
{apiVersion: v1, kind: Pod, metadata: {name: clerk-0, namespace: office}, spec: {nodeName: a, containers: [{name: c}]}, status: {podIP: 10.0.0.1}}
---
{apiVersion: v1, kind: Pod, metadata: {name: db-0, namespace: shop}, spec: {nodeName: a, hostname: db-0, subdomain: db, containers: [{name: c}]}, status: {podIP: 10.0.0.2}}
---
{apiVersion: v1, kind: Service, metadata: {name: cart, namespace: shop}, spec: {clusterIP: 10.1.0.1, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop}, spec: {clusterIP: None, ports: [{port: 5432}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: printer, namespace: office}, spec: {clusterIP: 10.1.0.2, ports: [{port: 80}]}}
";

    #[test]
    fn names_mean_what_the_search_path_makes_of_them() {
        let world = fixtures::world(WORLD);
        let pod = world.pods.get(&("office".to_owned(), "clerk-0".to_owned())).unwrap();
        let service = |namespace: &str, name: &str| Meaning::Service(namespace.to_owned(), name.to_owned());
        for (name, expected) in [
            ("printer", service("office", "printer")),
            ("cart.shop", service("shop", "cart")),
            ("Cart.Shop.svc", service("shop", "cart")),
            ("cart.shop.svc.cluster.local", service("shop", "cart")),
            ("cart.shop.svc.cluster.local.", service("shop", "cart")),
            ("db.shop", service("shop", "db")),
            ("db-0.db.shop", Meaning::Pod("shop".into(), "db-0".into())),
            ("API.example.com", Meaning::Outside("api.example.com".into())),
            ("example.dev.", Meaning::Outside("example.dev".into())),
        ] {
            assert_eq!(meaning(&world, &Settings::default(), pod, name), Ok(expected), "{name}");
        }
    }

    #[test]
    fn a_name_that_means_nothing_is_told_with_what_was_meant() {
        let world = fixtures::world(WORLD);
        let pod = world.pods.get(&("office".to_owned(), "clerk-0".to_owned())).unwrap();
        for (name, expected) in [
            (
                "cart",
                "the name cart means nothing to office/clerk-0: there is no Service cart in namespace office; there is one in \
                 shop: say cart.shop (looked up: cart.office.svc.cluster.local, cart.svc.cluster.local, cart.cluster.local, cart)",
            ),
            ("crat.shop", "no Service crat in namespace shop; there is cart in shop ("),
            ("printer.shop", "no Service printer in namespace shop; there is one in office: say printer.office ("),
            // `.shop` is a top-level domain, and here a namespace besides, which then counts.
            ("other.shop", "no Service other in namespace shop (looked up: "),
            ("x.nowhere.svc", "no Service x in namespace nowhere; namespace nowhere has no Services ("),
            ("printer.", "looked up: as it is, since it ends with a dot: printer)"),
        ] {
            let found = meaning(&world, &Settings::default(), pod, name).unwrap_err();
            assert!(found.contains(expected), "{name}: {found}");
        }
    }

    #[test]
    fn words_are_near_by_their_letters() {
        for (a, b, expected) in
            [("", "", 0), ("cart", "cart", 0), ("crat", "cart", 2), ("", "ab", 2), ("web", "wbe", 2)]
        {
            assert_eq!((distance(a, b), distance(b, a)), (expected, expected), "{a} {b}");
        }
        for (text, expected) in [("a.b-c.d_e.", true), ("a..b", false), ("", false), ("a/b", false), ("a b", false)] {
            assert_eq!(is_name(text), expected, "{text}");
        }
    }
}
