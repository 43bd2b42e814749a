//! What this node would do with a connection, for `tulle explain`: control asks, this answers.
//!
//! Explanations come from the same `decide` functions that traffic goes through, and for datagrams from the same
//! findings that their filters are made of; there is no second implementation that could disagree. Pure. What only a
//! handshake finds out is told as far as it is known before: that nobody vouches for the peer's trust domain. A question is
//! about a connection, or about one request on it ([`requests`]). Where requests are read and none is asked about, the answer
//! says so.

pub(super) mod gateway;
mod names;
mod requests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tulle_certs::{SpiffeId, VerifyError};
use tulle_proto::node::{
    EndpointChoice, InboundAnswer, InboundQuestion, OutboundAnswer, OutboundQuestion, RequestAnswer, Transport as Asked,
};

use crate::inbound;
use crate::inbound::decide::{decide_connection, requests_are_read};
use crate::lb::{self, Chance, Destinations};
use crate::outbound;
use crate::outbound::decide::{Plan, choose, decide, may_go_to, through_gateway};
use crate::outbound::explained::ejected;
use crate::outcome::{Code, DryRun, Outcome};
use crate::policy;
use crate::policy::network::{self, Finding};
use crate::state::{EgressMode, IpFamily, NETWORK_POLICY, Protocol, Service, Snapshot, Transport, Workload};

/// What would become of a connection that a pod of this node opens, at `now` (Unix seconds). `network` is the node's own.
///
/// # Errors
/// Why the question has no answer.
pub(super) fn outbound(
    snapshot: &Snapshot,
    network: &str,
    destinations: &Destinations,
    question: &OutboundQuestion,
    now: i64,
) -> Result<OutboundAnswer, String> {
    let source = snapshot
        .workload(&question.source_uid)
        .ok_or_else(|| format!("this node does not know the workload {}", question.source_uid))?;
    if !question.host.is_empty() {
        return names::outbound(snapshot, network, source, question);
    }
    let destination = SocketAddr::new(ip(&question.address)?, port(question.port)?);
    let transport = transport(question.transport)?;
    let mut answer = OutboundAnswer {
        source_address: source.address(IpFamily::of(destination.ip())).map(octets).unwrap_or_default().into(),
        generation: snapshot.generation(),
        transport: question.transport,
        plan: "plain".to_owned(),
        ..OutboundAnswer::default()
    };
    if source.protocol != Protocol::Hbone {
        answer.text = format!("{}/{} is not in the mesh; nothing intercepts it", source.namespace, source.name);
    }
    if transport != Transport::Tcp {
        datagram(snapshot, network, source, transport, destination, &mut answer);
    } else if source.protocol != Protocol::Hbone {
        unenrolled(snapshot, network, destinations, source, destination, &mut answer);
    } else if let Some(way) = outbound::leaving(snapshot, source, network, destination) {
        leave(snapshot, way, source, &mut answer);
    } else {
        stream(snapshot, network, destinations, source, destination, &mut answer);
        believe(snapshot, source, &mut answer, now);
        let service = snapshot.service_at(network, destination, &source.namespace);
        if let Some(service) = service.filter(|service| !outbound::waypoint_decides(snapshot, source, service)) {
            eject(snapshot, destinations, source, service, destination.port(), &mut answer.endpoints);
        }
        if let Some(head) = &question.request {
            let asked = requests::request(head)?;
            requests::leaving(snapshot, (network, destinations), source, destination, asked, &mut answer);
        }
    }
    if question.request.is_some() {
        answer.request.get_or_insert_default();
    }
    Ok(answer)
}

/// A connection that leaves the cluster, from a namespace whose pods need a rule for that.
fn leave(snapshot: &Snapshot, way: Result<outbound::WayOut, Outcome>, source: &Workload, answer: &mut OutboundAnswer) {
    match way {
        Err(outcome) => refuse(answer, outcome),
        Ok(way) => {
            if let Some(through) = way.gateway {
                answer.plan = "hbone".to_owned();
                answer.source_identity = source.identity.to_string();
                // No gateway is ever ejected. What a DestinationRule says of places counts (`lb::pick`).
                let nothing = Destinations::default();
                answer.endpoints = endpoints(snapshot, &nothing, source, &through.plan, through.dialled);
                answer.gateway_target = through.target;
            }
            answer.policy = way.grant.policy.id.to_string();
            answer.rule = u32::try_from(way.grant.rule).ok();
            answer.text = way.text;
        }
    }
}

/// A connection of a pod of the mesh.
fn stream(
    snapshot: &Snapshot,
    network: &str,
    destinations: &Destinations,
    source: &Workload,
    destination: SocketAddr,
    answer: &mut OutboundAnswer,
) {
    // Endpoints have each their own verdict, so the plan is made without those that the source's policies forbid; where
    // there is no endpoint to tell it of, the plan itself is refused.
    let chosen = choose(snapshot, source, network, destination, &Chance::of(0));
    let chosen = chosen.or_else(|outcome| inside(snapshot, source, network, destination).ok_or(outcome));
    let planned = chosen.and_then(|plan| match plan.destination() {
        Some(_) => Ok(plan),
        None => decide(snapshot, source, network, destination, &Chance::of(0)),
    });
    let plan = match planned {
        Ok(plan) => plan,
        Err(outcome) => return refuse(answer, outcome),
    };
    answer.service = plan.service().map(|service| service.key()).unwrap_or_default();
    answer.endpoints = endpoints(snapshot, destinations, source, &plan, destination);
    let routed = routed(snapshot, network, source, &plan, destination);
    match plan {
        Plan::Hbone(plan) => {
            answer.plan = "hbone".to_owned();
            answer.source_identity = source.identity.to_string();
            answer.text = match (plan.through, &plan.beyond) {
                (false, _) => "through a mutual TLS tunnel".to_owned(),
                (true, Some(beyond)) => format!(
                    "through a mutual TLS tunnel to {} inside another one to the gateway of network {} at {}",
                    beyond.authority, plan.destination.network, plan.address
                ),
                (true, None) => {
                    let waypoint = &plan.destination;
                    format!("through a mutual TLS tunnel to the waypoint {}/{}", waypoint.namespace, waypoint.name)
                }
            };
        }
        Plan::Plain(plan) => {
            answer.text = match &plan.destination {
                Some(workload) => format!("plain TCP: {}/{} is not in the mesh", workload.namespace, workload.name),
                None => format!("plain TCP: {destination} is outside the mesh"),
            };
            if plan.destination.is_none() {
                let_out(answer, &network::egress(snapshot, source, Transport::Tcp, plan.address));
            }
        }
    }
    answer.text.extend(routed);
}

/// Says of the endpoints which are left alone for now.
fn eject(
    snapshot: &Snapshot,
    destinations: &Destinations,
    source: &Workload,
    service: &Service,
    port: u16,
    endpoints: &mut [EndpointChoice],
) {
    let Some((policy, settings)) = snapshot.traffic_for(service, port, &source.namespace) else { return };
    let Some((rules, known)) = settings.outlier.as_ref().zip(destinations.known(service, port)) else { return };
    let now = std::time::Instant::now();
    let all = service.candidates(port);
    let unless = match known.ejects(&policy.id, rules, all, &source.pod_uid, now) {
        true => "",
        false => "; used all the same, since fewer than minHealthPercent are left",
    };
    for (by, ejected) in known.ejected(now) {
        let is_its = by == policy.id && ejected.pod.as_ref().is_none_or(|pod| *pod == source.pod_uid);
        let of = endpoints.iter_mut().filter(|endpoint| {
            let workload = snapshot.workload(&endpoint.uid);
            is_its
                && endpoint.port == u32::from(ejected.endpoint.port())
                && workload.is_some_and(|workload| workload.addresses.first() == Some(&ejected.endpoint.ip()))
        });
        of.for_each(|endpoint| endpoint.ejected = format!("{ejected}, by {by}{unless}"));
    }
}

/// The plan by those endpoints of a Service that the source may go to, where some are outside the cluster and some are not.
fn inside(snapshot: &Snapshot, source: &Workload, network: &str, destination: SocketAddr) -> Option<Plan> {
    let service = snapshot.service_at(network, destination, &source.namespace)?;
    let shares = lb::shares(snapshot, service, destination.port(), source, destination.ip(), &|_| false).ok()?;
    let at = shares.iter().map(|(choice, _)| (&choice.workload, SocketAddr::new(choice.ip, choice.port)));
    let outside: Vec<SocketAddr> =
        at.filter(|(workload, at)| may_go_to(source, service, workload, *at).is_err()).map(|(_, at)| at).collect();
    let chance = Chance { tried: &outside, ..Chance::of(0) };
    choose(snapshot, source, network, destination, &chance).ok()
}

/// Says of which endpoints the handshake fails, since nobody vouches for them.
fn believe(snapshot: &Snapshot, source: &Workload, answer: &mut OutboundAnswer, now: i64) {
    for endpoint in &mut answer.endpoints {
        let expected = endpoint.expected_identities.iter().map(|text| text.parse::<SpiffeId>());
        let doubts: Option<Vec<Outcome>> =
            expected.map(|identity| untrusted(snapshot, source, &identity.ok()?, now)).collect();
        if let Some(doubt) = doubts.and_then(|doubts| doubts.into_iter().next())
            && endpoint.code.is_empty()
        {
            *endpoint = refused(std::mem::take(endpoint), doubt);
        }
    }
}

/// Why nothing that `peer` shows proves to `own` that it is that, as handshakes say it.
fn untrusted(snapshot: &Snapshot, own: &Workload, peer: &SpiffeId, now: i64) -> Option<Outcome> {
    if !snapshot.is_foreign(own, peer) {
        return None;
    }
    let trust_domain = peer.trust_domain();
    let error = match snapshot.trust().get(trust_domain) {
        None => VerifyError::UntrustedDomain { identity: peer.clone() },
        Some(roots) if roots.valid_at(now).is_none() => {
            VerifyError::ExpiredRoots { trust_domain: trust_domain.to_owned() }
        }
        Some(_) => return None,
    };
    Some(Outcome::new(Code::UntrustedDomain, error.to_string()))
}

/// What is to be added where requests do not simply follow the connection.
fn routed(
    snapshot: &Snapshot,
    network: &str,
    source: &Workload,
    plan: &Plan,
    destination: SocketAddr,
) -> Option<String> {
    outbound::wanted(snapshot, source, network, destination)?;
    let mut routes: Vec<&str> = Vec::new();
    for entry in snapshot.routes_for(plan.service()?, destination.port(), &source.namespace)?.iter() {
        if !routes.contains(&&*entry.route.id) {
            routes.push(&entry.route.id);
        }
    }
    Some(format!("; its HTTP requests go where the routes say: {}", routes.join(", ")))
}

/// What the proxy does not carry: NetworkPolicies hold for it, in the pod's kernel.
fn datagram(
    snapshot: &Snapshot,
    network: &str,
    source: &Workload,
    transport: Transport,
    destination: SocketAddr,
    answer: &mut OutboundAnswer,
) {
    let service = snapshot.service_by_vip(network, destination.ip(), &source.namespace);
    answer.service = service.map(|service| service.key()).unwrap_or_default();
    if source.protocol != Protocol::Hbone {
        return;
    }
    answer.text = format!("{} does not go through the proxy", transport.as_str().to_uppercase());
    let is_name = transport == Transport::Udp && destination.port() == 53;
    let is_own = destination.ip().is_loopback() || source.addresses.contains(&destination.ip());
    if source.egress == EgressMode::Deny && !is_name && !is_own {
        let text = format!(
            "nothing but TCP and name look-ups leaves the pods of namespace {}, which is labelled tulle.dev/egress: deny",
            source.namespace
        );
        return refuse(answer, Outcome::new(Code::EgressDenied, text));
    }
    let finding = network::egress(snapshot, source, transport, destination);
    match finding.outcome() {
        Ok(()) => let_out(answer, &finding),
        Err(outcome) => refuse(answer, outcome),
    }
}

fn refuse(answer: &mut OutboundAnswer, outcome: Outcome) {
    answer.plan = "refuse".to_owned();
    answer.code = outcome.code.name().to_owned();
    answer.policy = outcome.policy.as_deref().unwrap_or_default().to_owned();
    answer.text = outcome.detail.into_owned();
}

/// Adds which NetworkPolicy lets it out.
fn let_out(answer: &mut OutboundAnswer, finding: &Finding) {
    if *finding != Finding::Open {
        answer.text = format!("{}; {finding}", answer.text);
    }
    (answer.policy, answer.rule) = allowing(finding);
}

/// The policy that allows and the index of its rule.
fn allowing(finding: &Finding) -> (String, Option<u32>) {
    match finding {
        Finding::Allowed { policy, rule, .. } => (policy.to_string(), u32::try_from(*rule).ok()),
        _ => (String::new(), None),
    }
}

fn endpoints(
    snapshot: &Snapshot,
    destinations: &Destinations,
    source: &Workload,
    plan: &Plan,
    destination: SocketAddr,
) -> Vec<EndpointChoice> {
    let shares = plan.service().and_then(|service| {
        let ejected = ejected(snapshot, source, destinations, service, destination.port());
        lb::shares(snapshot, service, destination.port(), source, destination.ip(), &ejected).ok()
    });
    let endpoint = |workload: &Arc<Workload>, ip: IpAddr, port: u16, percent: f64| {
        let elsewhere = plan.service().filter(|_| ip.is_unspecified());
        let found = match elsewhere {
            None => Ok(SocketAddr::new(ip, port)),
            Some(service) => through_gateway(snapshot, source, service, workload, destination),
        };
        let at = match found {
            Ok(at) => at,
            Err(outcome) => return refused(endpoint(workload, ip, port, percent), outcome),
        };
        let described = endpoint(workload, at.ip(), at.port(), percent);
        // The plan is about one endpoint; others may be outside the cluster. What a gateway is for was asked above.
        let inside = plan.service().filter(|_| elsewhere.is_none());
        match inside.map_or(Ok(()), |service| may_go_to(source, service, workload, at)) {
            Ok(()) => with_finding(described, &network::egress(snapshot, source, Transport::Tcp, at)),
            Err(outcome) => refused(described, outcome),
        }
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
fn unenrolled(
    snapshot: &Snapshot,
    network: &str,
    destinations: &Destinations,
    source: &Workload,
    destination: SocketAddr,
    answer: &mut OutboundAnswer,
) {
    let Ok(plan) = choose(snapshot, source, network, destination, &Chance::of(0)) else { return };
    answer.service = plan.service().map(|service| service.key()).unwrap_or_default();
    answer.endpoints = endpoints(snapshot, destinations, source, &plan, destination);
    for endpoint in &mut answer.endpoints {
        "plain".clone_into(&mut endpoint.protocol);
        // Nothing intercepts it, so none of its policies is enforced here.
        (endpoint.code, endpoint.text, endpoint.policy, endpoint.rule) = Default::default();
    }
}

/// What would become of a connection to a pod of this node, at `now` (Unix seconds).
///
/// # Errors
/// Why the question has no answer.
pub(super) fn inbound(snapshot: &Snapshot, question: &InboundQuestion, now: i64) -> Result<InboundAnswer, String> {
    let workload = snapshot
        .workload(&question.destination_uid)
        .ok_or_else(|| format!("this node does not know the workload {}", question.destination_uid))?;
    let target = SocketAddr::new(ip(&question.address)?, port(question.port)?);
    let (source, transport) = (ip(&question.source_address)?, transport(question.transport)?);
    let identity = match question.source_identity.as_str() {
        "" => None,
        text => Some(text.parse::<SpiffeId>().map_err(|error| error.to_string())?),
    };
    let mut evaluated = policy::evaluated(snapshot, workload);
    evaluated.retain(|(name, _)| transport == Transport::Tcp || name.starts_with(NETWORK_POLICY));
    let mut answer = InboundAnswer {
        evaluated: evaluated.iter().map(|(name, _)| name.to_string()).collect(),
        policy_versions: evaluated.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect(),
        generation: snapshot.generation(),
        allowed: true,
        code: "OK".to_owned(),
        rule: -1,
        transport: question.transport,
        request: question.request.as_ref().map(|_| RequestAnswer::default()),
        ..InboundAnswer::default()
    };
    if workload.protocol != Protocol::Hbone {
        answer.text = format!("{}/{} is not in the mesh; no policy is enforced", workload.namespace, workload.name);
        return Ok(answer);
    }
    let by_network = network::ingress(snapshot, workload, identity.as_ref(), source, transport, target.port());
    if transport != Transport::Tcp {
        match by_network.outcome() {
            Ok(()) => {
                let (policy, by) = allowing(&by_network);
                (answer.policy, answer.rule) = (policy, rule_index(by.map(|by| by as usize)));
                answer.text = format!("{by_network}; no AuthorizationPolicy holds for what is not TCP");
            }
            Err(outcome) => deny(&mut answer, outcome),
        }
        return Ok(answer);
    }
    if let Some(outcome) = identity.as_ref().and_then(|peer| untrusted(snapshot, workload, peer, now)) {
        deny(&mut answer, outcome);
        return Ok(answer);
    }
    let read = requests_are_read(snapshot, workload, target.port());
    let decided = match read {
        true => decide_connection(snapshot, workload, identity.as_ref(), source, target),
        false => inbound::decide::decide(snapshot, workload, identity.as_ref(), source, target),
    };
    match decided {
        Ok(verdict) => {
            let text = match read {
                true => "the connection may enter; HTTP is read there, and its policies decide each request".to_owned(),
                false => verdict.text(),
            };
            answer.text = match by_network {
                Finding::Open => text,
                by_network => format!("{by_network}; {text}"),
            };
            answer.policy = verdict.policy.as_deref().unwrap_or_default().to_owned();
            answer.rule = rule_index(verdict.rule);
            (answer.audit, answer.dry_run) = DryRun::texts(verdict.dry_run.iter());
        }
        Err(outcome) => deny(&mut answer, outcome),
    }
    if let Some(head) = question.request.as_ref().filter(|_| read && answer.allowed) {
        let ends = (identity.as_ref(), source, target);
        requests::entering(snapshot, workload, ends, requests::request(head)?, now, &mut answer);
    }
    Ok(answer)
}

/// On the wire; -1: none.
fn rule_index(rule: Option<usize>) -> i32 {
    rule.and_then(|rule| i32::try_from(rule).ok()).unwrap_or(-1)
}

fn deny(answer: &mut InboundAnswer, outcome: Outcome) {
    answer.allowed = false;
    answer.code = outcome.code.name().to_owned();
    (answer.audit, answer.dry_run) = DryRun::texts(outcome.dry_run.iter());
    answer.policy = outcome.policy.as_deref().unwrap_or_default().to_owned();
    answer.rule = rule_index(outcome.rule);
    answer.text = outcome.detail.into_owned();
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
        Ok(()) => {
            let (policy, rule) = allowing(finding);
            EndpointChoice { text: finding.to_string(), policy, rule, ..endpoint }
        }
        Err(outcome) => refused(endpoint, outcome),
    }
}

fn refused(endpoint: EndpointChoice, outcome: Outcome) -> EndpointChoice {
    EndpointChoice {
        code: outcome.code.name().to_owned(),
        policy: outcome.policy.as_deref().unwrap_or_default().to_owned(),
        text: outcome.detail.into_owned(),
        ..endpoint
    }
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

fn transport(asked: i32) -> Result<Transport, String> {
    match Asked::try_from(asked) {
        Ok(Asked::Tcp) => Ok(Transport::Tcp),
        Ok(Asked::Udp) => Ok(Transport::Udp),
        Ok(Asked::Sctp) => Ok(Transport::Sctp),
        Err(_) => Err(format!("this node does not know the transport {asked}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tulle_proto::node::{InboundQuestion, OutboundQuestion};

    use super::{inbound, outbound};
    use crate::lb::Destinations;
    use crate::state::fixtures::{behind, identity, policy, service, snapshot, workload};
    use crate::state::{
        Action, Change, EgressMode, Filters, GatewayAddress, GatewayTarget, HTTP_ROUTE, HttpMatch, HttpRule, Policy,
        Protocol, Route, RouteKind, RouteMatch, RouteParent, RouteRule, Scope, ServiceName, ServiceSpec, TrustBundle,
        Workload,
    };

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn an_endpoint_in_another_network_is_shown_at_its_gateway_with_who_may_be_behind_it() {
        let target = GatewayTarget::Address { network: "far".into(), ip: "198.51.100.1".parse().unwrap() };
        let remote = Workload {
            network: "far".into(),
            addresses: Vec::new(),
            network_gateway: Some(Box::new(GatewayAddress { target, hbone_port: 15008 })),
            ..behind(workload("shop", "cart", "10.0.0.1"), "shop", "cart")
        };
        let gateway = Workload { network: "far".into(), ..workload("infra", "east-west", "198.51.100.1") };
        let subject_alt_names = vec![identity("shop", "cart")];
        let snapshot = snapshot([
            Change::Workload(remote.into()),
            Change::Workload(gateway.into()),
            Change::Workload(workload("shop", "web", "10.0.0.9").into()),
            Change::Service(ServiceSpec { subject_alt_names, ..service("shop", "cart", "10.96.0.1") }.into()),
        ]);
        let question = OutboundQuestion {
            source_uid: "Kubernetes//Pod/shop/web".into(),
            address: vec![10, 96, 0, 1].into(),
            port: 80,
            ..OutboundQuestion::default()
        };
        let answer = outbound(&snapshot, "", &Destinations::default(), &question, NOW).unwrap();
        assert!(answer.text.contains("the gateway of network far at 198.51.100.1:15008"), "{}", answer.text);
        let [endpoint] = &answer.endpoints[..] else { panic!("{answer:?}") };
        assert_eq!((&endpoint.address[..], endpoint.port, &*endpoint.code), (&[198, 51, 100, 1][..], 15008, ""));
    }

    #[test]
    fn where_requests_are_read_the_connection_s_verdict_is_not_sold_as_theirs() {
        let (name, parent) = ("cart.shop.svc.cluster.local".into(), "shop".into());
        let rule = RouteRule {
            name: "".into(),
            matches: vec![RouteMatch::default()],
            filters: Filters::default(),
            backends: Vec::new(),
            request_timeout: None,
            backend_timeout: None,
            retry: None,
            session: None,
            broken: None,
            turns: Arc::default(),
        };
        let route = Route {
            id: format!("{HTTP_ROUTE}shop/cart").into(),
            version: "1".into(),
            namespace: "shop".into(),
            kind: RouteKind::Http,
            created: 0,
            parents: vec![RouteParent { service: ServiceName { namespace: parent, hostname: name }, ports: vec![80] }],
            rules: vec![rule],
        };
        let get = HttpRule { clauses: vec![vec![HttpMatch::default()]] };
        let open = Policy { http: Some([get].into()), ..policy("shop", "open", Scope::Namespace, Action::Allow, None) };
        let snapshot = snapshot([
            Change::Workload(behind(workload("shop", "cart", "10.0.0.1"), "shop", "cart").into()),
            Change::Workload(workload("shop", "web", "10.0.0.9").into()),
            Change::Service(service("shop", "cart", "10.96.0.1").into()),
            Change::Route(Arc::new(route)),
            Change::Policy(Arc::new(open)),
        ]);
        let out = outbound(
            &snapshot,
            "",
            &Destinations::default(),
            &OutboundQuestion {
                source_uid: "Kubernetes//Pod/shop/web".into(),
                address: vec![10, 96, 0, 1].into(),
                port: 80,
                ..OutboundQuestion::default()
            },
            NOW,
        );
        let text = out.unwrap().text;
        assert!(text.ends_with("go where the routes say: HTTPRoute/shop/cart"), "{text}");
        let into = inbound(
            &snapshot,
            &InboundQuestion {
                destination_uid: "Kubernetes//Pod/shop/cart".into(),
                source_identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
                source_address: vec![10, 0, 0, 9].into(),
                address: vec![10, 0, 0, 1].into(),
                port: 8080,
                ..InboundQuestion::default()
            },
            NOW,
        );
        let into = into.unwrap();
        assert!(into.allowed && into.text.contains("decide each request"), "{into:?}");
    }

    fn ask(port: u32) -> OutboundQuestion {
        OutboundQuestion {
            source_uid: "Kubernetes//Pod/shop/web".into(),
            address: vec![10, 96, 0, 1].into(),
            port,
            ..OutboundQuestion::default()
        }
    }

    #[test]
    fn of_a_service_that_leads_inside_and_outside_only_what_is_outside_is_refused() {
        let web = Workload { egress: EgressMode::Deny, ..workload("shop", "web", "10.0.0.9") };
        let inside = || behind(workload("shop", "b", "10.0.0.2"), "shop", "cart");
        let outside = |name: &str, ip: &str| Workload {
            uid: format!("Kubernetes/discovery.k8s.io/EndpointSlice/shop/{name}").into(),
            protocol: Protocol::Plain,
            ..behind(workload("shop", name, ip), "shop", "cart")
        };
        let changes = |inside: Option<Workload>| {
            let all = [outside("a", "203.0.113.1"), outside("c", "203.0.113.3"), web.clone()];
            let all = all.into_iter().chain(inside).map(|workload| Change::Workload(workload.into()));
            all.chain([Change::Service(service("shop", "cart", "10.96.0.1").into())]).collect::<Vec<_>>()
        };
        let answer = outbound(&snapshot(changes(Some(inside()))), "", &Destinations::default(), &ask(80), NOW).unwrap();
        assert_eq!((answer.plan.as_str(), answer.code.as_str()), ("hbone", ""), "{answer:?}");
        let mut codes: Vec<_> = answer.endpoints.iter().map(|one| (one.name.as_str(), one.code.as_str())).collect();
        codes.sort_unstable();
        assert_eq!(codes, [("a", "EGRESS_DENIED"), ("b", ""), ("c", "EGRESS_DENIED")]);
        let none = outbound(&snapshot(changes(None)), "", &Destinations::default(), &ask(80), NOW).unwrap();
        assert_eq!((none.plan.as_str(), none.code.as_str()), ("refuse", "EGRESS_DENIED"), "{none:?}");
    }

    #[test]
    fn whom_nobody_vouches_for_is_told_as_the_handshake_tells_it() {
        let foreign: tulle_certs::SpiffeId = "spiffe://other.example/ns/shop/sa/a".parse().unwrap();
        let there = Workload { identity: foreign.clone(), ..behind(workload("shop", "a", "10.0.0.1"), "shop", "cart") };
        let dir = tempfile::tempdir().unwrap();
        let roots = tulle_certs::ca::Authority::open(dir.path(), NOW).unwrap().roots().clone();
        let bundle = TrustBundle {
            id: "TrustBundle/other.example".into(),
            version: "v".into(),
            trust_domain: "other.example".into(),
            roots,
        };
        for (bundle, now, code) in [
            (None, NOW, "UNTRUSTED_DOMAIN"),
            (Some(&bundle), NOW, ""),
            (Some(&bundle), NOW + 20 * tulle_certs::ca::INTERMEDIATE_LIFE_S, "UNTRUSTED_DOMAIN"),
        ] {
            let bundle = bundle.map(|bundle| Change::TrustBundle(Arc::new(bundle.clone())));
            let changes = [
                Change::Workload(there.clone().into()),
                Change::Workload(workload("shop", "web", "10.0.0.9").into()),
                Change::Service(service("shop", "cart", "10.96.0.1").into()),
            ];
            let snapshot = snapshot(changes.into_iter().chain(bundle));
            let out = outbound(&snapshot, "", &Destinations::default(), &ask(80), now).unwrap();
            assert_eq!((out.plan.as_str(), out.endpoints[0].code.as_str()), ("hbone", code), "{out:?}");
            assert_eq!(out.endpoints[0].text.contains("other.example"), !code.is_empty(), "{out:?}");
            let question = InboundQuestion {
                destination_uid: "Kubernetes//Pod/shop/web".into(),
                source_identity: foreign.to_string(),
                source_address: vec![10, 0, 0, 1].into(),
                address: vec![10, 0, 0, 9].into(),
                port: 8080,
                ..InboundQuestion::default()
            };
            let into = inbound(&snapshot, &question, now).unwrap();
            assert_eq!(into.code, if code.is_empty() { "OK" } else { code }, "{into:?}");
        }
    }
}
