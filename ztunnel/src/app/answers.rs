//! What this node says about itself: to control's questions, and on its admin pages.
//!
//! Explanations come from the same `decide` functions that traffic goes through, on the snapshot in force; there is no
//! second implementation that could disagree.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde_json::{Value, json};
use tulle_certs::SpiffeId;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{
    CertificateStatus, EndpointChoice, InboundAnswer, InboundQuestion, NodeMessage, NodeQuestion, NodeStatus,
    OutboundAnswer, OutboundQuestion, PodStatus, TrustAnswer,
};

use crate::app::handover::successor::Taken;
use crate::app::pods::Pods;
use crate::app::view::Status;
use crate::flow::Shared;
use crate::identity::CertStatus;
use crate::inbound;
use crate::lb::{self, Chance};
use crate::outbound::decide::{Plan, choose, decide};
use crate::policy;
use crate::policy::network::{self, Finding};
use crate::state::{IpFamily, Protocol, Service, Snapshot, Transport, Workload};
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
}

impl Answers {
    /// Answers one of control's questions.
    pub fn answer(&self, question: NodeQuestion) -> NodeMessage {
        let answer = match question.question {
            Some(Question::Status(_)) => Ok(Answer::Status(self.status())),
            Some(Question::Outbound(question)) => self.outbound(&question).map(Answer::Outbound),
            Some(Question::Inbound(question)) => self.inbound(&question).map(Answer::Inbound),
            Some(Question::Trust(question)) => {
                let renewing = self.shared.identities.trust(&question.roots, &question.issuer);
                tracing::info!(renewing, "control told the CA's roots and issuer");
                Ok(Answer::Trust(TrustAnswer { renewing }))
            }
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
        }
        pending.extend(self.pods.pending());
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
            "pods": self.pods.status(),
            "certificates": status.certificates.iter().map(|cert| json!({
                "identity": cert.identity,
                "state": cert.state,
                "notAfter": cert.not_after,
                "error": cert.error,
                "roots": cert.roots,
                "issuer": cert.issuer,
            })).collect::<Vec<_>>(),
            "xds": {
                "connected": self.monitor.status().connected,
                "lastError": self.monitor.status().last_error,
                "rejected": self.monitor.status().last_rejections,
            },
        })
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
        json!({
            "workloads": snapshot.workloads().map(|workload| workload_json(workload)).collect::<Vec<_>>(),
            "services": snapshot.services().map(|service| service_json(service)).collect::<Vec<_>>(),
            "policies": snapshot.policies().map(|policy| json!({
                "name": &*policy.id,
                "version": &*policy.version,
                "detail": format!("{policy:?}"),
            })).collect::<Vec<_>>(),
            "networkPolicies": snapshot.network_policies().map(|policy| json!({
                "name": &*policy.id,
                "version": &*policy.version,
                "detail": format!("{policy:?}"),
            })).collect::<Vec<_>>(),
            "certificates": self.shared.identities.status().iter().map(|cert| json!({
                "identity": cert.identity.to_string(),
                "state": cert.state,
                "notAfter": cert.not_after,
                "serialNumber": cert.certificate.as_ref().map(|cert| cert.issued.serial.clone()),
            })).collect::<Vec<_>>(),
            "workloadState": self.pods.status().into_iter()
                .map(|pod| (pod.uid.clone(), json!({
                    "state": if pod.capture == "Captured" { "Up" } else { "Pending" },
                    "info": { "name": pod.name, "namespace": pod.namespace },
                })))
                .collect::<serde_json::Map<_, _>>(),
            "version": { "version": VERSION, "cryptoProvider": "aws-lc-rs" },
        })
    }

    fn outbound(&self, question: &OutboundQuestion) -> Result<OutboundAnswer, String> {
        let snapshot = self.shared.reader.load();
        let source = snapshot
            .workload(&question.source_uid)
            .ok_or_else(|| format!("this node does not know the workload {}", question.source_uid))?;
        let destination = SocketAddr::new(ip(&question.address)?, port(question.port)?);
        let mut answer = OutboundAnswer {
            source_address: source.address(IpFamily::of(destination.ip())).map(octets).unwrap_or_default().into(),
            generation: snapshot.generation(),
            ..OutboundAnswer::default()
        };
        let enrolled = source.protocol == Protocol::Hbone;
        if !enrolled {
            answer.plan = "plain".to_owned();
            answer.text = format!("{}/{} is not in the mesh; nothing intercepts it", source.namespace, source.name);
            self.unenrolled(&snapshot, source, destination, &mut answer);
            return Ok(answer);
        }
        // Endpoints have each their own verdict, so the plan is made without those that the source's policies forbid; where
        // there is no endpoint to tell it of, the plan itself is refused.
        let chosen = choose(&snapshot, source, &self.shared.network, destination, &Chance::of(0));
        match chosen.and_then(|plan| match plan.destination() {
            Some(_) => Ok(plan),
            None => decide(&snapshot, source, &self.shared.network, destination, &Chance::of(0)),
        }) {
            Err(outcome) => {
                answer.plan = "refuse".to_owned();
                answer.code = outcome.code.name().to_owned();
                answer.text = outcome.detail.into_owned();
                answer.policy = outcome.policy.as_deref().unwrap_or_default().to_owned();
            }
            Ok(plan) => {
                answer.service = plan.service().map(|service| service.key()).unwrap_or_default();
                answer.endpoints = self.endpoints(&snapshot, source, &plan, destination);
                match plan {
                    Plan::Hbone(_) => {
                        answer.plan = "hbone".to_owned();
                        answer.source_identity = source.identity.to_string();
                        answer.text = "through a mutual TLS tunnel".to_owned();
                    }
                    Plan::Plain(plan) => {
                        answer.plan = "plain".to_owned();
                        answer.text = match plan.destination {
                            Some(workload) => {
                                format!("plain TCP: {}/{} is not in the mesh", workload.namespace, workload.name)
                            }
                            None => format!("plain TCP: {destination} is outside the mesh"),
                        };
                    }
                }
            }
        }
        Ok(answer)
    }

    fn endpoints(
        &self,
        snapshot: &Snapshot,
        source: &Workload,
        plan: &Plan,
        destination: SocketAddr,
    ) -> Vec<EndpointChoice> {
        let shares = plan.service().and_then(|service| {
            lb::shares(snapshot, service, destination.port(), source, IpFamily::of(destination.ip())).ok()
        });
        let endpoint = |workload: &Workload, ip: IpAddr, port: u16, percent: f64| {
            let finding = network::egress(snapshot, source, Transport::Tcp, SocketAddr::new(ip, port));
            with_finding(endpoint(workload, ip, port, percent), &finding)
        };
        match (shares, plan.destination()) {
            (Some(shares), _) => shares
                .into_iter()
                .map(|(choice, percent)| endpoint(&choice.workload, choice.ip, choice.port, percent))
                .collect(),
            (None, Some(workload)) => vec![endpoint(workload, destination.ip(), destination.port(), 100.0)],
            (None, None) => Vec::new(),
        }
    }

    /// An unenrolled pod is balanced by the cluster; what it can reach is still worth saying.
    fn unenrolled(&self, snapshot: &Snapshot, source: &Workload, destination: SocketAddr, answer: &mut OutboundAnswer) {
        let Ok(plan) = choose(snapshot, source, &self.shared.network, destination, &Chance::of(0)) else { return };
        answer.service = plan.service().map(|service| service.key()).unwrap_or_default();
        answer.endpoints = self.endpoints(snapshot, source, &plan, destination);
        for endpoint in &mut answer.endpoints {
            "plain".clone_into(&mut endpoint.protocol);
            // Nothing intercepts it, so none of its policies is enforced here.
            (endpoint.code, endpoint.text, endpoint.policy) = Default::default();
        }
    }

    fn inbound(&self, question: &InboundQuestion) -> Result<InboundAnswer, String> {
        let snapshot = self.shared.reader.load();
        let workload = snapshot
            .workload(&question.destination_uid)
            .ok_or_else(|| format!("this node does not know the workload {}", question.destination_uid))?;
        let target = SocketAddr::new(ip(&question.address)?, port(question.port)?);
        let source = ip(&question.source_address)?;
        let identity = match question.source_identity.as_str() {
            "" => None,
            text => Some(text.parse::<SpiffeId>().map_err(|error| error.to_string())?),
        };
        let evaluated = policy::evaluated(&snapshot, workload);
        let mut answer = InboundAnswer {
            evaluated: evaluated.iter().map(|(name, _)| name.to_string()).collect(),
            policy_versions: evaluated.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect(),
            generation: snapshot.generation(),
            rule: -1,
            ..InboundAnswer::default()
        };
        let rule = |rule: Option<usize>| rule.and_then(|rule| i32::try_from(rule).ok()).unwrap_or(-1);
        if workload.protocol != Protocol::Hbone {
            answer.allowed = true;
            answer.code = "OK".to_owned();
            answer.text = format!("{}/{} is not in the mesh; no policy is enforced", workload.namespace, workload.name);
            return Ok(answer);
        }
        match inbound::decide::decide(&snapshot, workload, identity.as_ref(), source, target) {
            Ok(verdict) => {
                answer.allowed = true;
                answer.code = "OK".to_owned();
                let by_network =
                    network::ingress(&snapshot, workload, identity.as_ref(), source, Transport::Tcp, target.port());
                answer.text = match by_network {
                    Finding::Open => verdict.text(),
                    by_network => format!("{by_network}; {}", verdict.text()),
                };
                answer.policy = verdict.policy.as_deref().unwrap_or_default().to_owned();
                answer.rule = rule(verdict.rule);
                answer.dry_run = verdict.dry_run.iter().map(ToString::to_string).collect();
            }
            Err(outcome) => {
                answer.code = outcome.code.name().to_owned();
                answer.dry_run = outcome.dry_run.iter().map(ToString::to_string).collect();
                answer.text = outcome.detail.into_owned();
                answer.policy = outcome.policy.as_deref().unwrap_or_default().to_owned();
                answer.rule = rule(outcome.rule);
            }
        }
        Ok(answer)
    }
}

fn certificate_status(status: CertStatus) -> CertificateStatus {
    let (roots, issuer) = status
        .certificate
        .map(|held| (held.root_fingerprints.clone(), held.issuer_fingerprint.clone()))
        .unwrap_or_default();
    CertificateStatus {
        identity: status.identity.to_string(),
        state: status.state.to_owned(),
        not_after: status.not_after,
        error: status.error,
        roots,
        issuer,
    }
}

fn pod_status(pod: Status) -> PodStatus {
    PodStatus {
        uid: pod.uid,
        name: pod.name,
        namespace: pod.namespace,
        capture: pod.capture.to_owned(),
        reason: pod.reason,
        preexisting: pod.preexisting as u64,
        inbound_connections: pod.inbound_connections as u64,
        outbound_connections: pod.outbound_connections as u64,
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
    }
}

fn endpoint(workload: &Workload, ip: IpAddr, port: u16, percent: f64) -> EndpointChoice {
    let hbone = workload.protocol == Protocol::Hbone;
    EndpointChoice {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        node: workload.node.to_string(),
        address: octets(ip).into(),
        port: u32::from(port),
        share_percent: percent,
        protocol: if hbone { "hbone" } else { "plain" }.to_owned(),
        expected_identities: if hbone { vec![workload.identity.to_string()] } else { Vec::new() },
        ..EndpointChoice::default()
    }
}

/// Adds what the source's NetworkPolicies say.
fn with_finding(endpoint: EndpointChoice, finding: &Finding) -> EndpointChoice {
    match finding.outcome() {
        Ok(()) if *finding == Finding::Open => endpoint,
        Ok(()) => EndpointChoice { text: finding.to_string(), ..endpoint },
        Err(outcome) => EndpointChoice {
            code: outcome.code.name().to_owned(),
            text: outcome.detail.into_owned(),
            policy: outcome.policy.as_deref().unwrap_or_default().to_owned(),
            ..endpoint
        },
    }
}

fn workload_json(workload: &Workload) -> Value {
    json!({
        "uid": &*workload.uid,
        "name": &*workload.name,
        "namespace": &*workload.namespace,
        "workloadIps": workload.addresses,
        "protocol": if workload.protocol == Protocol::Hbone { "HBONE" } else { "TCP" },
        "trustDomain": workload.identity.trust_domain(),
        "serviceAccount": workload.identity.service_account(),
        "node": &*workload.node,
        "status": if workload.healthy { "Healthy" } else { "Unhealthy" },
        "workloadName": &*workload.workload_name,
        "workloadType": workload.workload_type.as_str(),
        "canonicalName": &*workload.canonical_name,
        "canonicalRevision": &*workload.canonical_revision,
        "clusterId": &*workload.cluster,
        "services": workload.services.keys().map(|key| &**key).collect::<Vec<_>>(),
        "authorizationPolicies": workload.policies.iter().map(|name| &**name).collect::<Vec<_>>(),
        "networkPolicies": workload.network_policies.iter().map(|name| &**name).collect::<Vec<_>>(),
        "policiesPending": workload.policies_pending,
        "capacity": workload.capacity,
        "version": &*workload.version,
    })
}

fn service_json(service: &Service) -> Value {
    json!({
        "name": &*service.name,
        "namespace": &*service.namespace,
        "hostname": &*service.hostname,
        "vips": service.vips.iter().map(|(network, net)| format!("{network}/{}", net.addr())).collect::<Vec<_>>(),
        "ports": service.ports.iter()
            .map(|port| (port.service_port.to_string(), port.target_port.into()))
            .collect::<serde_json::Map<String, Value>>(),
        "version": &*service.version,
    })
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ip(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| format!("an address has {} bytes, not 4 or 16", bytes.len()))?;
    Ok(IpAddr::from(v6).to_canonical())
}

fn port(port: u32) -> Result<u16, String> {
    u16::try_from(port).ok().filter(|port| *port != 0).ok_or_else(|| format!("{port} is not a port"))
}
