//! What the nodes of all replicas have acknowledged: each replica says it of its own nodes, in a Lease of its own.
//!
//! A node is attached to one replica, and the one that writes status may be another. Generations are counted by each
//! process for itself, so what is said is the digest of the policies and routes that a node has, which all replicas compute
//! alike; whoever reads it knows when it published the same. While the CA is rotated, it says as well how far its nodes'
//! certificates are (`ca::rotation::Word`), because the step waits for the nodes of all replicas. Leases, because they are made for being renewed and carry
//! no meaning for others. Limits: names of nodes beyond [`MAX_SAID`] bytes are left out, and so count as not having it yet; a
//! digest that this replica never published (it gathered changes otherwise) counts as not yet, until both have the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams};
use tokio::sync::watch;
use tokio::time::Instant;
use tulle_proto::names;

use crate::base::Stop;
use crate::cluster::{FIELD_MANAGER, words};
use crate::status::write::REQUEST;
use crate::xds::Published;
use crate::xds::server::Nodes;

/// Label of these Leases.
const LABEL: &str = "tulle.dev/replica";
/// What it says: names of nodes by digest, JSON.
const SAID: &str = "tulle.dev/acknowledged";
/// How far its nodes' certificates are, while the CA is rotated.
const CERTIFICATES: &str = "tulle.dev/certificates";
/// Between two questions to the own nodes about them: each asks all of its nodes, for a day at most.
const ASK: Duration = Duration::from_secs(5);
/// Annotations may have 256 KiB together.
const MAX_SAID: usize = 200 * 1024;
/// Between two looks at the own nodes, and between two writes.
const APART: Duration = Duration::from_secs(2);
/// A Lease is renewed this often although nothing changed.
const RENEW: Duration = Duration::from_secs(20);
/// One that says that it was renewed longer ago is of a replica that is gone. Clocks may differ by the half of it.
const STALE_S: i64 = 90;
/// One that is older is removed.
const GONE_S: i64 = 600;
/// Digests that are remembered: who is behind further is told of as not having it.
const REMEMBERED: usize = 1024;

/// Which digest was published when. Pure.
#[derive(Debug, Default)]
pub struct History {
    /// Since which generation each was in force, in order.
    digests: VecDeque<(u64, Arc<str>)>,
    latest: u64,
}

impl History {
    /// What was published now.
    pub fn note(&mut self, published: &Published) {
        self.latest = published.generation;
        if published.generation == 0 || self.digests.back().is_some_and(|(_, last)| *last == published.policies) {
            return;
        }
        if self.digests.len() == REMEMBERED {
            self.digests.pop_front();
        }
        self.digests.push_back((published.generation, Arc::clone(&published.policies)));
    }

    /// The digest that was in force in a generation.
    fn at(&self, generation: u64) -> Option<&Arc<str>> {
        self.digests.iter().rev().find(|(since, _)| *since <= generation).map(|(_, digest)| digest)
    }

    /// The last generation with a digest.
    fn last_with(&self, digest: &str) -> Option<u64> {
        let at = self.digests.iter().rposition(|(_, known)| **known == *digest)?;
        // It was in force until the next one, or is.
        Some(self.digests.get(at + 1).map_or(self.latest, |(next, _)| next - 1))
    }

    /// What is said of the own nodes: names by digest.
    fn said(&self, acked: &BTreeMap<String, u64>) -> BTreeMap<String, BTreeSet<String>> {
        let mut said: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut room = MAX_SAID;
        for (node, generation) in acked {
            let Some(digest) = self.at(*generation).filter(|_| *generation > 0) else { continue };
            let size = node.len() + 3;
            if room < size + digest.len() + 8 {
                break;
            }
            room -= size;
            said.entry(digest.to_string()).or_default().insert(node.clone());
        }
        said
    }

    /// Adds what another replica says: a node has what any replica says that it has.
    fn join(&self, acked: &mut BTreeMap<String, u64>, said: &str) {
        let said: BTreeMap<String, BTreeSet<String>> = serde_json::from_str(said).unwrap_or_default();
        for (digest, nodes) in said {
            let Some(generation) = self.last_with(&digest) else { continue };
            for node in nodes {
                let known = acked.entry(node).or_default();
                *known = (*known).max(generation);
            }
        }
    }
}

/// Asks the own nodes how far their certificates are. Empty: nothing is rotated.
pub type AskCertificates = Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// Says what the own nodes have until it is told to stop. `identity` is this process's alone.
pub async fn say(
    client: Client,
    namespace: String,
    identity: String,
    nodes: Arc<Nodes>,
    published: watch::Receiver<Published>,
    certificates: AskCertificates,
    mut stop: Stop,
) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let name = name(&identity);
    let mut history = History::default();
    let (mut last, mut failed): (Option<(Said, Instant)>, bool) = (None, false);
    let (mut held, mut asked): (String, Option<Instant>) = (String::new(), None);
    loop {
        tokio::select! {
            () = stop.requested() => break,
            () = tokio::time::sleep(APART) => {}
        }
        history.note(&published.borrow());
        if asked.is_none_or(|at| at.elapsed() >= ASK) {
            held = tokio::select! { () = stop.requested() => break, held = certificates() => held };
            asked = Some(Instant::now());
        }
        let nodes = serde_json::to_string(&history.said(&nodes.acked())).unwrap_or_default();
        let said = Said { nodes, certificates: held.clone() };
        if last.as_ref().is_some_and(|(known, at)| *known == said && at.elapsed() < RENEW) {
            continue;
        }
        let (lease, params) = (lease(&name, &identity, &said), PatchParams::apply(FIELD_MANAGER).force());
        let apply = Patch::Apply(&lease);
        match tokio::time::timeout(REQUEST, api.patch(&name, &params, &apply)).await {
            Ok(Ok(_)) => (last, failed) = (Some((said, Instant::now())), false),
            Ok(Err(error)) if !failed => {
                tracing::warn!(
                    lease = name,
                    error = words(&error),
                    "other replicas do not hear what this one's nodes have"
                );
                failed = true;
            }
            _ => failed = true,
        }
    }
    let _ = tokio::time::timeout(REQUEST, api.delete(&name, &DeleteParams::default())).await;
}

/// What one Lease says.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    nodes: String,
    certificates: String,
}

/// What the other replicas say of their nodes' certificates.
pub async fn others(client: &Client, namespace: &str, identity: &str) -> Vec<String> {
    let api: Api<Lease> = Api::namespaced(client.clone(), namespace);
    let heard = leases(&api, identity).await.into_iter().filter(|(_, age, _)| *age < STALE_S);
    heard.filter_map(|(_, _, mut annotations)| annotations.remove(CERTIFICATES)).collect()
}

/// The Leases of other replicas: name, seconds since it was renewed, annotations. None when nobody answers.
async fn leases(api: &Api<Lease>, identity: &str) -> Vec<(String, i64, BTreeMap<String, String>)> {
    let params = ListParams::default().labels(LABEL);
    let Ok(Ok(leases)) = tokio::time::timeout(REQUEST, api.list(&params)).await else { return Vec::new() };
    let now = Timestamp::now().as_second();
    let of_others = leases.into_iter().filter_map(|lease| {
        let spec = lease.spec.unwrap_or_default();
        let age = spec.renew_time.map_or(i64::MAX, |at| now.saturating_sub(at.0.as_second()));
        let name = lease.metadata.name.filter(|_| spec.holder_identity.as_deref() != Some(identity))?;
        Some((name, age, lease.metadata.annotations.unwrap_or_default()))
    });
    of_others.collect()
}

/// What the nodes of other replicas have, added to those of this one.
pub async fn heard(
    client: &Client,
    namespace: &str,
    identity: &str,
    history: &History,
    acked: &mut BTreeMap<String, u64>,
) {
    let api: Api<Lease> = Api::namespaced(client.clone(), namespace);
    for (name, age, annotations) in leases(&api, identity).await {
        if age > GONE_S {
            let _ = tokio::time::timeout(REQUEST, api.delete(&name, &DeleteParams::default())).await;
        } else if age < STALE_S
            && let Some(said) = annotations.get(SAID)
        {
            history.join(acked, said);
        }
    }
}

/// The random half of an identity is enough, and a name.
fn name(identity: &str) -> String {
    format!("tulle-control-{}", identity.rsplit('_').next().unwrap_or_default())
}

fn lease(name: &str, identity: &str, said: &Said) -> Lease {
    let mut annotations = BTreeMap::from([(SAID.to_owned(), said.nodes.clone())]);
    if !said.certificates.is_empty() {
        annotations.insert(CERTIFICATES.to_owned(), said.certificates.clone());
    }
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(BTreeMap::from([
                (names::LABEL_MANAGED.to_owned(), names::MANAGED.to_owned()),
                (LABEL.to_owned(), "control".to_owned()),
            ])),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(identity.to_owned()),
            lease_duration_seconds: i32::try_from(STALE_S).ok(),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_replica_says_is_what_this_one_published_at_its_own_time() {
        let history = |all: &[(u64, &str)]| {
            let mut history = History::default();
            for (generation, digest) in all {
                history.note(&Published {
                    generation: *generation,
                    policies: (*digest).into(),
                    ..Published::default()
                });
            }
            history
        };
        let acked =
            |all: &[(&str, u64)]| all.iter().map(|(node, at)| ((*node).to_owned(), *at)).collect::<BTreeMap<_, _>>();
        let other = history(&[(1, "a"), (2, "b"), (3, "b"), (9, "c")]);
        let said = other.said(&acked(&[("n1", 1), ("n2", 8), ("n3", 9), ("n4", 0), ("n5", 12)]));
        let expected = [("a", vec!["n1"]), ("b", vec!["n2"]), ("c", vec!["n3", "n5"])];
        let shown: Vec<_> =
            said.iter().map(|(d, n)| (d.as_str(), n.iter().map(String::as_str).collect::<Vec<_>>())).collect();
        assert_eq!(shown, expected);
        // This one has gathered otherwise: it never published b.
        let own = history(&[(1, "a"), (40, "c")]);
        let mut known = acked(&[("n3", 3), ("own", 41)]);
        own.join(&mut known, &serde_json::to_string(&said).expect("json"));
        assert_eq!(known, acked(&[("n1", 39), ("n3", 40), ("n5", 40), ("own", 41)]));
        for garbage in ["", "[]", "{\"a\": 5}", "{\"a\": [5]}"] {
            let mut none = BTreeMap::new();
            own.join(&mut none, garbage);
            assert!(none.is_empty(), "{garbage}");
        }
        let many: Vec<(u64, String)> = (1..5000).map(|at| (at, at.to_string())).collect();
        let many: Vec<(u64, &str)> = many.iter().map(|(at, digest)| (*at, digest.as_str())).collect();
        assert_eq!(history(&many).digests.len(), REMEMBERED);
        let names: BTreeMap<String, u64> = (0..100_000).map(|at| (format!("node-{at}"), 1)).collect();
        assert!(serde_json::to_string(&other.said(&names)).expect("json").len() <= MAX_SAID, "it fits");
    }
}
