//! Federation: ClusterTrustBundles to the roots of each trust domain.
//!
//! Several objects may be labelled with one domain, as while its roots are replaced: their roots count together. A bundle
//! for the own trust domain or an alias of it is refused, since its own roots come with the certificates; proxies refuse it
//! as well. Roots that have expired are told about here and not believed there.

use std::collections::BTreeMap;

use rustls_pki_types::CertificateDer;
use tulle_certs::{MAX_ROOTS, Roots, fingerprint};
use tulle_proto::{mesh, names};

use crate::model::{Condition, Meta, TrustBundle, World};
use crate::resource::{Kind, Resource};
use crate::translate::Settings;

/// Resources, and what is to be said of each object.
pub(super) fn translate<'a>(world: &'a World, settings: &Settings) -> (Vec<Resource>, Vec<(&'a Meta, Condition)>) {
    let mut conditions = Vec::new();
    let mut domains: BTreeMap<&str, BTreeMap<String, CertificateDer<'static>>> = BTreeMap::new();
    let mut accepted: Vec<(&TrustBundle, &str, &Roots)> = Vec::new();
    for bundle in world.trust_bundles.values() {
        match readable(bundle, settings) {
            Err(condition) => conditions.push((&bundle.meta, condition)),
            Ok((domain, roots)) => {
                let all = domains.entry(domain).or_default();
                all.extend(roots.certificates().iter().map(|root| (fingerprint(root), root.clone())));
                accepted.push((bundle, domain, roots));
            }
        }
    }
    for (bundle, domain, roots) in accepted {
        let of_domain = &domains[domain];
        let others: Vec<&str> = domains
            .iter()
            .filter(|(other, theirs)| {
                **other != domain && roots.fingerprints().iter().any(|one| theirs.contains_key(one))
            })
            .map(|(other, _)| *other)
            .collect();
        conditions.push((&bundle.meta, validity(domain, roots, settings.now)));
        if of_domain.len() > MAX_ROOTS {
            conditions.push((&bundle.meta, too_many(domain)));
        } else if !others.is_empty() {
            conditions.push((&bundle.meta, shared(domain, &others)));
        }
    }
    let resources = domains.into_iter().filter(|(_, roots)| roots.len() <= MAX_ROOTS).map(|(domain, roots)| {
        let roots = roots.into_values().map(|root| root.to_vec().into()).collect();
        let message = mesh::TrustBundle { trust_domain: domain.to_owned(), roots };
        Resource::new(Kind::TrustBundle, format!("{}{domain}", names::TRUST_BUNDLE), &message, Vec::new())
    });
    (resources.collect(), conditions)
}

fn readable<'a>(bundle: &'a TrustBundle, settings: &Settings) -> Result<(&'a str, &'a Roots), Condition> {
    let (domain, roots) = bundle.spec.as_ref().map_err(|reason| {
        let message = format!("It cannot be read, so it vouches for nobody: {reason}");
        Condition::failing("Accepted", "Invalid", message)
    })?;
    if *domain == settings.trust_domain || settings.trust_domain_aliases.contains(domain) {
        let message = format!(
            "{domain} is a name of this mesh's own trust domain, whose roots come with its certificates; the bundle is not used"
        );
        return Err(Condition::failing("Accepted", "OwnTrustDomain", message));
    }
    Ok((domain, roots))
}

/// What has expired is still sent, so that resources do not depend on the time.
fn validity(domain: &str, roots: &Roots, now: i64) -> Condition {
    let (all, expired) = (roots.ends().count(), roots.ends().filter(|end| *end < now).count());
    if expired == 0 {
        let until = roots.ends().min().and_then(|end| jiff::Timestamp::from_second(end).ok());
        let until = until.map_or_else(String::new, |until| format!(", the first until {until}"));
        let message = format!("Identities of {domain} are believed if one of its {all} roots signed{until}");
        return Condition::holding("Accepted", "Accepted", message);
    }
    let reason = if expired == all { "Expired" } else { "PartlyExpired" };
    let message =
        format!("{expired} of {all} roots of {domain} have expired and vouch for nobody; put the new ones in");
    Condition::failing("Accepted", reason, message)
}

fn too_many(domain: &str) -> Condition {
    let message = format!(
        "The bundles of {domain} have more than {MAX_ROOTS} roots together, so none is used; remove those that are gone"
    );
    Condition::failing("Enforced", "TooManyRoots", message)
}

fn shared(domain: &str, others: &[&str]) -> Condition {
    let message = format!(
        "{domain} shares a root with {}: whoever signs with it can name identities of each of them",
        others.join(", ")
    );
    Condition::failing("Exclusive", "SharedRoot", message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tulle_certs::ca::Authority;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn what_has_expired_is_told_and_sent_all_the_same() {
        let authority = Authority::open(tempfile::tempdir().expect("dir").path(), NOW).expect("open");
        let roots = authority.roots().clone();
        let end = roots.ends().min().expect("a root");
        let meta = Meta { name: "b".into(), ..Meta::default() };
        let bundle = TrustBundle { meta, spec: Ok(("b.example".into(), roots)) };
        let mut world = World::default();
        world.trust_bundles.insert("b".to_owned(), Arc::new(bundle));
        let at = |now: i64| {
            let (resources, conditions) = translate(&world, &Settings { now, ..Settings::default() });
            (resources, conditions.iter().map(|(_, condition)| condition.reason).collect::<Vec<_>>())
        };
        let (before, after) = (at(end), at(end + 1));
        assert_eq!((before.1, after.1), (vec!["Accepted"], vec!["Expired"]));
        assert_eq!(before.0, after.0, "versions must not depend on the time");
    }
}
