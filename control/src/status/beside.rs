//! Keeps the NetworkPolicies of [`translate::beside`] in the cluster: made before pods are captured, gone after release.
//!
//! They are known by their label, and nobody else's object is touched: a policy of the name without the label is left
//! alone, with a warning. Only the Lease holder writes. One that is not wanted any more stays for [`LINGER`], as long as
//! released pods may still serve tunnels.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Client;
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch;
use tokio::time::Instant;
use tulle_proto::names;

use crate::admin::View;
use crate::base::Stop;
use crate::cluster::lease::Leader;
use crate::cluster::{FIELD_MANAGER, words};
use crate::model::{Key, Operator, Selector};
use crate::status::write::REQUEST;
use crate::translate::{Beside, Settings, beside};

/// A released pod's port 15008 stays open for 30 s.
const LINGER: Duration = Duration::from_secs(35);
/// Between two looks if nothing happens: for what failed, and for what lingered long enough.
const LOOK: Duration = Duration::from_secs(2);
/// Between two writes: twenty a second, as for status.
const APART: Duration = Duration::from_millis(50);
/// After a failure, for one object.
const BACK_OFF: Duration = Duration::from_secs(10);

/// On each of ours.
const LABEL: &str = "app.kubernetes.io/managed-by=tulle";

struct State {
    client: Client,
    /// Ours that are there, once all are known.
    there: BTreeMap<Key, Arc<NetworkPolicy>>,
    listed: bool,
    /// Since when those are not wanted.
    unwanted: BTreeMap<Key, Instant>,
    /// Not to be tried before.
    not_before: BTreeMap<Key, Instant>,
}

/// Keeps them until it is told to stop.
pub async fn run(
    client: Client,
    settings: Settings,
    mut view: watch::Receiver<Arc<View>>,
    leader: Leader,
    mut stop: Stop,
) {
    let api: Api<NetworkPolicy> = Api::all(client.clone());
    let ours = watcher::Config::default().labels(LABEL);
    let mut events = std::pin::pin!(watcher(api, ours).default_backoff());
    let mut state =
        State { client, there: BTreeMap::new(), listed: false, unwanted: BTreeMap::new(), not_before: BTreeMap::new() };
    let mut fresh = BTreeMap::new();
    let (mut wanted, mut generation) = (BTreeMap::new(), 0);
    loop {
        tokio::select! {
            () = stop.requested() => return,
            changed = view.changed() => if changed.is_err() { return },
            event = events.next() => match event {
                Some(Ok(event)) => state.take(event, &mut fresh),
                Some(Err(error)) => tracing::debug!(%error, "watch of NetworkPolicies interrupted"),
                None => return,
            },
            () = tokio::time::sleep(LOOK) => {}
        }
        let now = Arc::clone(&view.borrow_and_update());
        if now.generation == 0 || !state.listed || !leader.holds_for(REQUEST) {
            continue;
        }
        if generation != now.generation {
            (wanted, generation) = (beside(now.world(), &settings), now.generation);
        }
        tokio::select! {
            () = stop.requested() => return,
            () = state.reconcile(&wanted, &leader) => {}
        }
    }
}

impl State {
    fn take(&mut self, event: Event<NetworkPolicy>, fresh: &mut BTreeMap<Key, Arc<NetworkPolicy>>) {
        let key = |policy: &NetworkPolicy| {
            let text = |field: &Option<String>| field.clone().unwrap_or_default();
            (text(&policy.metadata.namespace), text(&policy.metadata.name))
        };
        // The label may be on what others made with our help: only by label and name is it ours.
        if let Event::InitApply(policy) | Event::Apply(policy) = &event
            && !key(policy).1.starts_with(names::BESIDE)
        {
            return;
        }
        match event {
            Event::Init => fresh.clear(),
            Event::InitApply(policy) => drop(fresh.insert(key(&policy), Arc::new(policy))),
            Event::InitDone => (self.there, self.listed) = (std::mem::take(fresh), true),
            Event::Apply(policy) => drop(self.there.insert(key(&policy), Arc::new(policy))),
            Event::Delete(policy) => drop(self.there.remove(&key(&policy))),
        }
    }

    async fn reconcile(&mut self, wanted: &BTreeMap<Key, Beside>, leader: &Leader) {
        let now = Instant::now();
        self.not_before.retain(|_, until| now < *until);
        self.unwanted.retain(|key, _| self.there.contains_key(key) && !wanted.contains_key(key));
        let waits = |state: &Self, key: &Key| state.not_before.contains_key(key);
        for (key, one) in wanted {
            let spec = spec(one);
            let there = self.there.get(key);
            if there.is_some_and(|there| there.spec.as_ref() == Some(&spec)) || waits(self, key) {
                continue;
            }
            if !leader.holds_for(REQUEST) {
                return;
            }
            let policy = object(key, spec);
            match write(&self.client, key, policy, there.map(|there| &there.metadata)).await {
                Ok(written) => {
                    tracing::info!(namespace = key.0, name = key.1, "wrote a NetworkPolicy for the mesh's own traffic");
                    self.there.insert(key.clone(), Arc::new(written));
                }
                Err(error) => self.failed(key, &error),
            }
            tokio::time::sleep(APART).await;
        }
        let gone: Vec<Key> = self.there.keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in gone {
            let since = *self.unwanted.entry(key.clone()).or_insert(now);
            if now.duration_since(since) < LINGER || waits(self, &key) || !leader.holds_for(REQUEST) {
                continue;
            }
            let Some(policy) = self.there.get(&key) else { continue };
            match delete(&self.client, &key, policy).await {
                Ok(()) => {
                    tracing::info!(namespace = key.0, name = key.1, "removed a NetworkPolicy of the mesh");
                    self.there.remove(&key);
                }
                Err(error) => self.failed(&key, &error),
            }
            tokio::time::sleep(APART).await;
        }
    }

    fn failed(&mut self, key: &Key, error: &str) {
        tracing::warn!(
            namespace = key.0,
            name = key.1,
            error,
            "cannot write a NetworkPolicy: where another network plugin enforces policies, it may drop tunnels (port \
             15008) and probes of this namespace"
        );
        self.not_before.insert(key.clone(), Instant::now() + BACK_OFF);
    }
}

/// `there`: the one that it replaces, as it was seen last; changed since, it may be somebody else's by now.
async fn write(
    client: &Client,
    key: &Key,
    mut policy: NetworkPolicy,
    there: Option<&ObjectMeta>,
) -> Result<NetworkPolicy, String> {
    let api: Api<NetworkPolicy> = Api::namespaced(client.clone(), &key.0);
    let (create, apply) = (
        PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() },
        PatchParams::apply(FIELD_MANAGER).force(),
    );
    let new = there.is_none();
    if let Some(there) = there {
        policy.metadata.uid.clone_from(&there.uid);
        policy.metadata.resource_version.clone_from(&there.resource_version);
    }
    let request = async {
        match new {
            // Creating, so that one of somebody else is not overwritten.
            true => api.create(&create, &policy).await,
            false => api.patch(&key.1, &apply, &Patch::Apply(&policy)).await,
        }
    };
    match tokio::time::timeout(REQUEST, request).await {
        Err(_) => Err(format!("no answer within {REQUEST:?}")),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 && new => {
            Err(format!("there is one of this name without the label {LABEL}; rename it"))
        }
        Ok(result) => result.map_err(|error| words(&error)),
    }
}

async fn delete(client: &Client, key: &Key, policy: &NetworkPolicy) -> Result<(), String> {
    let api: Api<NetworkPolicy> = Api::namespaced(client.clone(), &key.0);
    // Changed since it was seen last, it may be somebody else's by now.
    let NetworkPolicy { metadata: ObjectMeta { uid, resource_version, .. }, .. } = policy;
    let preconditions = Preconditions { uid: uid.clone(), resource_version: resource_version.clone() };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match tokio::time::timeout(REQUEST, api.delete(&key.1, &params)).await {
        Err(_) => Err(format!("no answer within {REQUEST:?}")),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(()),
        Ok(result) => result.map(drop).map_err(|error| words(&error)),
    }
}

fn object((namespace, name): &Key, spec: NetworkPolicySpec) -> NetworkPolicy {
    let about = "Lets the mesh's tunnels and the kubelet's probes through to pods that other NetworkPolicies isolate; those \
                 are enforced inside the tunnels. Kept by Tulle's control plane.";
    NetworkPolicy {
        metadata: ObjectMeta {
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            labels: Some(BTreeMap::from([(names::LABEL_MANAGED.to_owned(), names::MANAGED.to_owned())])),
            annotations: Some(BTreeMap::from([("tulle.dev/about".to_owned(), about.to_owned())])),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
    }
}

fn spec(one: &Beside) -> NetworkPolicySpec {
    let tunnels = || {
        Some(vec![NetworkPolicyPort {
            port: Some(IntOrString::Int(names::PORT_HBONE.into())),
            protocol: Some("TCP".into()),
            ..NetworkPolicyPort::default()
        }])
    };
    let block = |cidr: String| NetworkPolicyPeer {
        ip_block: Some(IPBlock { cidr, except: None }),
        ..NetworkPolicyPeer::default()
    };
    let probes = vec![block(format!("{}/32", names::PROBE_V4)), block(format!("{}/128", names::PROBE_V6))];
    let pods = NetworkPolicyPeer { namespace_selector: Some(LabelSelector::default()), ..NetworkPolicyPeer::default() };
    let ingress = vec![
        NetworkPolicyIngressRule { from: None, ports: tunnels() },
        NetworkPolicyIngressRule { from: Some(probes), ports: None },
    ];
    let egress = vec![NetworkPolicyEgressRule { ports: tunnels(), to: Some(vec![pods]) }];
    let types = [(one.ingress, "Ingress"), (one.egress, "Egress")];
    NetworkPolicySpec {
        pod_selector: Some(selector(&one.pods)),
        policy_types: Some(types.into_iter().filter(|(is, _)| *is).map(|(_, name)| name.to_owned()).collect()),
        ingress: one.ingress.then_some(ingress),
        egress: one.egress.then_some(egress),
    }
}

fn selector(selector: &Selector) -> LabelSelector {
    let expressions = selector.expressions.iter().map(|one| LabelSelectorRequirement {
        key: one.key.clone(),
        operator: match one.operator {
            Operator::In => "In",
            Operator::NotIn => "NotIn",
            Operator::Exists => "Exists",
            Operator::DoesNotExist => "DoesNotExist",
        }
        .to_owned(),
        values: (!one.values.is_empty()).then(|| one.values.clone()),
    });
    let expressions: Vec<_> = expressions.collect();
    LabelSelector {
        match_labels: (!selector.labels.is_empty()).then(|| selector.labels.clone()),
        match_expressions: (!expressions.is_empty()).then_some(expressions),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Expression;

    #[test]
    fn a_policy_adds_tunnels_and_probes_in_the_directions_that_are_closed() {
        let pods = Selector {
            labels: BTreeMap::from([("app".into(), "db".into())]),
            expressions: vec![Expression { key: "tier".into(), operator: Operator::In, values: vec!["a".into()] }],
        };
        let both = spec(&Beside { pods, ingress: true, egress: true });
        assert_eq!(
            serde_json::to_value(&both).expect("json"),
            json!({
                "podSelector": {
                    "matchLabels": {"app": "db"},
                    "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a"]}],
                },
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"ports": [{"port": 15008, "protocol": "TCP"}]},
                    {"from": [
                        {"ipBlock": {"cidr": "169.254.7.127/32"}},
                        {"ipBlock": {"cidr": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}},
                    ]},
                ],
                "egress": [{"ports": [{"port": 15008, "protocol": "TCP"}], "to": [{"namespaceSelector": {}}]}],
            })
        );
        let one = spec(&Beside { pods: Selector::default(), ingress: false, egress: true });
        let one = serde_json::to_value(&one).expect("json");
        assert_eq!(one["podSelector"], json!({}));
        assert_eq!((&one["policyTypes"], one.get("ingress")), (&json!(["Egress"]), None));
    }
}
