//! What this node says about itself: to control's questions, and on its admin pages.
//!
//! Explanations are made by [`explain`], on the snapshot in force.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{
    CallersAnswer, CertificateStatus, EgressTalk, NodeMessage, NodeQuestion, NodeStatus, PlainCaller, PodStatus,
    ServiceSeen, TrafficAnswer, TrustAnswer,
};

use crate::app::handover::successor::Taken;
use crate::app::pods::Pods;
use crate::app::view::Status;
use crate::app::{dump, explain};
use crate::base::unix_now;
use crate::flow::Shared;
use crate::identity::CertStatus;
use crate::lb::{Destination, Kind};
use crate::state::ServiceName;
use crate::telemetry::breakers::DestinationLabels;
use crate::telemetry::{Seen, egress, plaintext};
use crate::xds::Monitor;

/// Version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Everything that can be asked.
#[derive(Clone)]
pub struct Answers {
    /// Name of this node.
    pub node: Arc<str>,
    /// Snapshot, certificates, counters.
    pub shared: Shared,
    /// Pods.
    pub pods: Pods,
    /// Discovery.
    pub monitor: Monitor,
    /// What this process took over.
    pub before: Arc<Taken>,
    /// The Service of the egress gateway that this is; `None`: it is a node's proxy.
    pub gateway: Option<Arc<ServiceName>>,
    /// What is waited for besides.
    pub more: Option<Arc<dyn Fn() -> Vec<String> + Send + Sync>>,
}

impl Answers {
    /// Answers one of control's questions.
    pub fn answer(&self, question: NodeQuestion) -> NodeMessage {
        let answer = match question.question {
            Some(Question::Status(_)) => Ok(Answer::Status(self.status())),
            Some(Question::Outbound(question)) => {
                let Shared { reader, network, destinations, .. } = &self.shared;
                explain::outbound(&reader.load(), network, destinations, &question, unix_now()).map(Answer::Outbound)
            }
            Some(Question::Inbound(question)) => {
                explain::inbound(&self.shared.reader.load(), &question, unix_now()).map(Answer::Inbound)
            }
            Some(Question::Gateway(question)) => match &self.gateway {
                Some(service) => {
                    let Shared { reader, network, .. } = &self.shared;
                    explain::gateway::through(&reader.load(), network, service, &question).map(Answer::Inbound)
                }
                None => Err("this is no egress gateway".to_owned()),
            },
            Some(Question::Trust(question)) => {
                let renewing = self.shared.identities.trust(&question.roots, &question.issuer);
                tracing::info!(renewing, "control told the CA's roots and issuer");
                Ok(Answer::Trust(TrustAnswer { renewing }))
            }
            Some(Question::Traffic(_)) => Ok(Answer::Traffic(self.traffic())),
            Some(Question::Callers(question)) => Ok(Answer::Callers(self.callers(&question.namespace))),
            None => Err("this node does not know the question; is it older than control?".to_owned()),
        };
        NodeMessage { id: question.id, answer: Some(answer.unwrap_or_else(Answer::Error)) }
    }

    /// What the node waits for; empty when it is ready.
    pub fn pending(&self) -> Vec<String> {
        let mut pending = Vec::new();
        if !self.shared.reader.load().synced() {
            let status = self.monitor.status();
            let why = if status.last_error.is_empty() { String::new() } else { format!(": {}", status.last_error) };
            pending.push(format!("the first description of the mesh from control{why}"));
        } else if !self.pods.looked() && self.pods.pending().is_empty() {
            pending.push("the first look at the node's pods".to_owned());
        }
        pending.extend(self.pods.pending());
        pending.extend(self.more.iter().flat_map(|more| more()));
        pending
    }

    /// The node's state.
    pub fn status(&self) -> NodeStatus {
        // The count of old connections needs a look into each namespace; the next question gets it.
        let pods = self.pods.clone();
        tokio::spawn(async move { pods.recount().await });
        let snapshot = self.shared.reader.load();
        let (workloads, services, policies) = snapshot.counts();
        let (inbound, outbound) = self.pods.connections();
        NodeStatus {
            version: VERSION.to_owned(),
            pending: self.pending(),
            pods: self.pods.status().into_iter().map(pod_status).collect(),
            generation: snapshot.generation(),
            workloads: workloads as u64,
            services: services as u64,
            policies: policies as u64,
            certificates: self.shared.identities.status().into_iter().map(certificate_status).collect(),
            inbound_connections: inbound as u64,
            outbound_connections: outbound as u64,
            tunnels: u64::try_from(self.shared.metrics.tunnels.get()).unwrap_or(0),
            egress: self.shared.metrics.talks.list().0.into_iter().map(talk).collect(),
        }
    }

    /// How long requests took lately.
    fn traffic(&self) -> TrafficAnswer {
        let seen = |seen: Seen| ServiceSeen {
            service: seen.service,
            reporter: seen.direction.reporter().to_owned(),
            failed: seen.failed,
            micros: seen.times.keys().copied().collect(),
            counts: seen.times.values().copied().collect(),
        };
        TrafficAnswer { services: self.shared.metrics.services.seen(Instant::now()).into_iter().map(seen).collect() }
    }

    /// Who reaches pods of a namespace without an identity.
    fn callers(&self, namespace: &str) -> CallersAnswer {
        let of = |other: &str| namespace.is_empty() || namespace == other;
        let (list, untold) = self.shared.metrics.callers.list(unix_now());
        let captured = self.pods.status().into_iter().filter(|pod| of(&pod.namespace) && pod.capture == "Captured");
        CallersAnswer {
            callers: list.into_iter().filter(|(kind, _)| of(&kind.namespace)).map(caller).collect(),
            untold,
            captured: captured.map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect(),
        }
    }

    /// The same as JSON, for the admin page.
    pub fn status_json(&self) -> Value {
        let status = self.status();
        json!({
            "node": &*self.node,
            "version": VERSION,
            "pid": std::process::id(),
            "draining": self.before.left(),
            "ready": status.pending.is_empty(),
            "pending": status.pending,
            "generation": status.generation,
            "workloads": status.workloads,
            "services": status.services,
            "policies": status.policies,
            "inboundConnections": status.inbound_connections,
            "outboundConnections": status.outbound_connections,
            "tunnels": status.tunnels,
            "egress": status.egress.iter().map(|talk| json!({
                "namespace": talk.namespace,
                "account": talk.account,
                "target": talk.target,
                "port": talk.port,
                "spoken": talk.spoken,
                "verdict": talk.verdict,
                "policy": talk.policy,
                "attempts": talk.attempts,
                "bytes": talk.bytes,
            })).collect::<Vec<_>>(),
            "pods": self.pods.status(),
            "certificates": status.certificates.iter().map(|cert| json!({
                "identity": cert.identity,
                "state": cert.state,
                "notAfter": cert.not_after,
                "error": cert.error,
                "roots": cert.roots,
                "issuer": cert.issuer,
                "serial": cert.serial,
            })).collect::<Vec<_>>(),
            "xds": {
                "connected": self.monitor.status().connected,
                "lastError": self.monitor.status().last_error,
                "rejected": self.monitor.status().last_rejections,
            },
        })
    }

    /// The Services that pods of this node use, with what their traffic policies count and eject.
    pub fn destinations_json(&self) -> Value {
        let now = std::time::Instant::now();
        let of = |known: &Destination| {
            let ejected = known.ejected(now).into_iter().map(|(policy, ejected)| {
                json!({
                    "endpoint": ejected.endpoint,
                    "policy": &*policy,
                    "pod": ejected.pod.as_deref(),
                    "why": ejected.why.name(),
                    "secondsLeft": ejected.left.map(|left| left.as_secs_f64()),
                    "times": ejected.times,
                })
            });
            let pods = known.pods().into_iter().map(|(pod, live)| {
                let count = |kind| live.count(kind);
                json!({
                    "pod": &*pod,
                    "connections": count(Kind::Connections),
                    "pendingRequests": count(Kind::Pending),
                    "requests": count(Kind::Requests),
                    "retries": count(Kind::Retries),
                })
            });
            json!({
                "service": format!("{}/{}", known.namespace, known.hostname),
                "port": known.port,
                "pods": pods.collect::<Vec<_>>(),
                "ejected": ejected.collect::<Vec<_>>(),
            })
        };
        self.shared.destinations.all().iter().map(|known| of(known)).collect()
    }

    /// Brings the gauges of ejected endpoints up to date.
    pub fn show_ejected(&self) {
        let (now, active) = (std::time::Instant::now(), &self.shared.metrics.breakers.active);
        active.clear();
        for known in self.shared.destinations.all() {
            let out = known.ejected(now).iter().filter(|(_, ejected)| ejected.left.is_some()).count();
            let labels = DestinationLabels { destination_service: known.hostname.clone() };
            active.get_or_create(&labels).inc_by(i64::try_from(out).unwrap_or(i64::MAX));
        }
    }

    /// The applied-version log.
    pub fn versions_json(&self) -> Value {
        let entries = self.shared.reader.versions();
        entries
            .iter()
            .map(|entry| {
                json!({
                    "generation": entry.generation,
                    "applied_unix_us": entry.applied_unix_us,
                    "settled_unix_us": entry.settled_unix_us,
                    "resources": entry.resources.iter()
                        .map(|(name, version)| (name.to_string(), version.as_deref().map_or(Value::Null, Value::from)))
                        .collect::<serde_json::Map<_, _>>(),
                })
            })
            .collect()
    }

    /// What the node knows, with the keys that Istio's command line reads.
    pub fn config_dump(&self) -> Value {
        let snapshot = self.shared.reader.load();
        let state = |pod: Status| {
            let workload = snapshot.workload_by_pod(&pod.namespace, &pod.name);
            (pod.uid.clone(), dump::state(&pod, workload.map(|workload| &**workload)))
        };
        json!({
            "workloads": snapshot.workloads().map(|workload| dump::workload(&workload)).collect::<Vec<_>>(),
            "services": snapshot.services().map(|service| dump::service(service)).collect::<Vec<_>>(),
            "policies": snapshot.policies().map(|policy| dump::policy(policy)).collect::<Vec<_>>(),
            "networkPolicies": snapshot.network_policies().map(|policy| json!({
                "name": &*policy.id,
                "version": &*policy.version,
                "detail": format!("{policy:?}"),
            })).collect::<Vec<_>>(),
            "certificates": self.shared.identities.status().iter().map(dump::certificate).collect::<Vec<_>>(),
            "workloadState": self.pods.status().into_iter().map(state).collect::<serde_json::Map<_, _>>(),
            "version": { "version": VERSION, "cryptoProvider": "aws-lc-rs" },
        })
    }
}

fn certificate_status(status: CertStatus) -> CertificateStatus {
    let (roots, issuer, serial) = status
        .certificate
        .map(|held| (held.root_fingerprints.clone(), held.issuer_fingerprint.clone(), held.issued.serial.clone()))
        .unwrap_or_default();
    CertificateStatus {
        identity: status.identity.to_string(),
        state: status.state.to_owned(),
        not_after: status.not_after,
        error: status.error,
        roots,
        issuer,
        serial,
    }
}

fn talk((kind, seen): (egress::Kind, egress::Seen)) -> EgressTalk {
    EgressTalk {
        namespace: kind.namespace.to_string(),
        account: kind.account.to_string(),
        target: kind.target.to_string(),
        port: kind.port.into(),
        spoken: kind.spoken.to_owned(),
        verdict: kind.verdict.to_owned(),
        policy: kind.policy.to_string(),
        attempts: seen.attempts,
        bytes: seen.bytes,
    }
}

fn caller((kind, seen): (plaintext::Kind, plaintext::Seen)) -> PlainCaller {
    let mut caller = PlainCaller {
        namespace: kind.namespace.to_string(),
        workload: kind.workload.to_string(),
        port: kind.port.into(),
        connections: seen.connections,
        refused: seen.refused,
        open: seen.open,
        last: seen.last,
        ..PlainCaller::default()
    };
    match kind.client {
        plaintext::Client::Address(address) => caller.source_address = address.to_string(),
        plaintext::Client::Workload { namespace, name, account } => {
            caller.source_namespace = namespace.to_string();
            caller.source_workload = name.to_string();
            caller.source_account = account.to_string();
        }
    }
    caller
}

fn pod_status(pod: Status) -> PodStatus {
    PodStatus {
        uid: pod.uid,
        name: pod.name,
        namespace: pod.namespace,
        capture: pod.capture.to_owned(),
        reason: pod.reason,
        dns: pod.dns.to_owned(),
        fence: pod.fence,
        preexisting: pod.preexisting as u64,
        inbound_connections: pod.inbound_connections as u64,
        outbound_connections: pod.outbound_connections as u64,
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
    }
}
