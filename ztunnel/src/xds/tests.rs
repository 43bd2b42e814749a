//! The session against a model of a server, with lost streams; and the client against a real server on loopback.
//!
//! The simulation is seeded and prints its seed when it fails. The socket test waits for states, never for time.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use prost_types::Any;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tulle_certs::ca::{Authority, revoke};
use tulle_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use tulle_proto::mesh;
use tulle_proto::names::{TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_NETWORK_POLICY, TYPE_TRUST_BUNDLE};
use tulle_proto::security as sec;
use tulle_proto::workload as wds;
use tulle_proto::workload::address::Type;

use crate::identity::{Control, Link, RootCa, TokenSource};
use crate::state::{Change, Reader, Writer, store};
use crate::tls;
use crate::xds::session::in_steps;
use crate::xds::{Config, Monitor, Session, Termination, run};

fn config(control: Control) -> Config {
    Config {
        control,
        node_name: "node-1".to_owned(),
        instance_ip: "10.0.0.1".to_owned(),
        pod_name: "ztunnel-abc".to_owned(),
        pod_namespace: "tulle-system".to_owned(),
        metadata: BTreeMap::from([("TULLE_VERSION".to_owned(), "0".into())]),
        network_policy: true,
        on_demand: false,
        cluster_domain: "cluster.local".into(),
    }
}

fn session(on_demand: bool) -> Session {
    let control = Control {
        address: "https://control:15012".to_owned(),
        root_ca: RootCa::System,
        alt_hostname: None,
        token: TokenSource::None,
        headers: vec![],
        link: Link::default(),
    };
    Session::new(config(control).node(), on_demand, true)
}

fn resource(type_url: &str, name: &str, version: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any { type_url: type_url.to_owned(), value }),
        ..Resource::default()
    }
}

fn pod(name: &str, version: &str, policies: &[String]) -> Resource {
    let uid = format!("Kubernetes//Pod/shop/{name}");
    let workload = wds::Workload {
        uid: uid.clone(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        authorization_policies: policies.to_vec(),
        ..wds::Workload::default()
    };
    let address = wds::Address { r#type: Some(Type::Workload(workload)) };
    resource(TYPE_ADDRESS, &uid, version, address.encode_to_vec())
}

fn policy(name: &str, version: &str) -> Resource {
    let policy = sec::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: 2,
        ..sec::Authorization::default()
    };
    resource(TYPE_AUTHORIZATION, &format!("shop/{name}"), version, policy.encode_to_vec())
}

fn broken(mut resource: Resource) -> Resource {
    if let Some(content) = &mut resource.resource {
        content.value = vec![0xff; 3];
    }
    resource.version.push_str("-broken");
    resource
}

fn response(type_url: &str, nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

#[test]
fn the_first_requests_subscribe_to_everything_and_say_who_asks() {
    let requests = session(false).open([], &[]);
    let types: Vec<_> = requests.iter().map(|request| request.type_url.as_str()).collect();
    assert_eq!(types, [TYPE_AUTHORIZATION, TYPE_ADDRESS]);
    assert!(requests.iter().all(|request| request.resource_names_subscribe.is_empty()));
    let node = requests[0].node.as_ref().unwrap();
    assert_eq!(node.id, "ztunnel~10.0.0.1~ztunnel-abc.tulle-system~tulle-system.svc.cluster.local");
    let keys: Vec<_> = node.metadata.as_ref().unwrap().fields.keys().map(String::as_str).collect();
    assert_eq!(keys, ["INSTANCE_IPS", "NAME", "NAMESPACE", "NODE_NAME", "TULLE_VERSION"]);
}

#[test]
fn on_demand_begins_with_what_is_asked_for_and_hears_what_was_answered() {
    let mut session = session(true);
    let first = session.open([], &["/10.0.0.1".into()]).pop().unwrap();
    assert_eq!(first.resource_names_subscribe, ["*", "/10.0.0.1"]);
    assert_eq!(first.resource_names_unsubscribe, ["*"]);
    let found = Resource { aliases: vec!["/10.0.0.1".to_owned()], ..pod("a", "1", &[]) };
    let outcome = session.respond(response(TYPE_ADDRESS, "n", vec![found], &["/10.0.0.9"]));
    assert_eq!(outcome.answered, ["/10.0.0.1", "Kubernetes//Pod/shop/a", "/10.0.0.9"], "an absence is an answer");
}

#[test]
fn good_resources_of_a_bad_response_are_applied_and_the_bad_ones_are_named() {
    let mut session = session(false);
    let resources = vec![pod("a", "1", &[]), broken(pod("b", "1", &[])), pod("c", "1", &[])];
    let outcome = session.respond(response(TYPE_ADDRESS, "n1", resources, &[]));
    assert_eq!(outcome.changes.len(), 3, "two workloads and the end of the first response");
    let (mut writer, _) = store();
    writer.apply(outcome.changes, 1);
    let nack = outcome.answer.unwrap();
    assert_eq!(nack.response_nonce, "n1");
    let text = nack.error_detail.unwrap().message;
    assert!(text.starts_with("Kubernetes//Pod/shop/b: it is no istio.workload.Address"), "{text}");
    let told = session.open(writer.addresses(), &[]).pop().unwrap().initial_resource_versions;
    let versions: Vec<_> = told.iter().map(|(name, version)| format!("{}={version}", &name[21..])).collect();
    assert_eq!(versions, ["a=1", "b=", "c=1"], "a rejected one is asked for again");
}

#[test]
fn a_nack_has_a_bounded_length() {
    let resources = (0..1000).map(|index| broken(pod(&format!("p{index}"), "1", &[]))).collect();
    let outcome = session(false).respond(response(TYPE_ADDRESS, "n", resources, &[]));
    let text = outcome.answer.unwrap().error_detail.unwrap().message;
    assert!(text.len() < 5000 && text.contains("; and 9"), "{text}");
}

#[test]
fn a_large_response_in_steps_is_one_response() {
    let pods = |range: std::ops::Range<usize>| range.map(|index| pod(&format!("p{index}"), "1", &[]));
    for (version, steps) in [("7", ["7+", "7+", "7"]), ("7&", ["7+&", "7+&", "7&"]), ("7+", ["7++", "7++", "7+"])] {
        let mut resources: Vec<_> = pods(0..25).collect();
        resources[3] = broken(resources[3].clone());
        let whole = DeltaDiscoveryResponse {
            system_version_info: version.to_owned(),
            ..response(TYPE_ADDRESS, "n1", resources, &["gone"])
        };
        let parts: Vec<_> = in_steps(whole, 10).collect();
        assert_eq!(parts.iter().map(|part| part.resources.len()).collect::<Vec<_>>(), [10, 10, 5]);
        assert_eq!(parts.iter().map(|part| &*part.system_version_info).collect::<Vec<_>>(), steps);
        assert_eq!(parts.iter().map(|part| part.removed_resources.len()).collect::<Vec<_>>(), [1, 0, 0]);
        let mut session = session(false);
        let outcomes: Vec<_> = parts.into_iter().map(|part| session.respond(part)).collect();
        let answers: Vec<_> = outcomes.iter().map(|outcome| outcome.answer.is_some()).collect();
        assert_eq!(answers, [false, false, true]);
        let nack = outcomes[2].answer.as_ref().unwrap();
        assert!(nack.response_nonce == "n1" && nack.error_detail.as_ref().unwrap().message.contains("p3:"), "{nack:?}");
        let complete = outcomes[2].changes.iter().any(|change| matches!(change, Change::AddressesSynced));
        assert_eq!(complete, version != "7+");
    }
    let empty: Vec<_> = in_steps(response(TYPE_ADDRESS, "n", vec![], &[]), 10).collect();
    assert_eq!(empty.len(), 1, "an empty one is answered too");
}

#[test]
fn a_state_in_several_responses_is_complete_with_the_last() {
    let mut session = session(false);
    let part = |version: &str, resources| DeltaDiscoveryResponse {
        system_version_info: version.to_owned(),
        ..response(TYPE_AUTHORIZATION, "n", resources, &[])
    };
    let (mut writer, reader) = store();
    writer.apply(session.respond(part("7+", vec![policy("a", "1")])).changes, 1);
    assert!(!reader.load().policies_synced(), "a policy that denies may be in the next one");
    writer.apply(session.respond(part("7", vec![policy("b", "1")])).changes, 2);
    assert!(reader.load().policies_synced());
}

fn network_policy(name: &str, version: &str) -> Resource {
    let policy = mesh::NetworkPolicy {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        ingress: true,
        ..mesh::NetworkPolicy::default()
    };
    resource(TYPE_NETWORK_POLICY, &format!("NetworkPolicy/shop/{name}"), version, policy.encode_to_vec())
}

/// A session to which NetworkPolicies were offered.
fn with_network_policies() -> Session {
    let mut session = session(false);
    session.open([], &[]);
    let (expected, asked) = session.offered(&["other".to_owned(), TYPE_NETWORK_POLICY.to_owned()]);
    assert!(matches!(expected[..], [Change::NetworkPoliciesExpected]));
    assert_eq!(asked[0].type_url, TYPE_NETWORK_POLICY);
    session
}

#[test]
fn own_types_are_asked_for_where_they_are_offered_and_once() {
    let mut session = session(false);
    assert_eq!(session.open([], &[]).len(), 2);
    assert!(session.offered(&["type.googleapis.com/other".to_owned()]).1.is_empty());
    assert_eq!(session.offered(&[TYPE_NETWORK_POLICY.to_owned()]).1.len(), 1);
    assert!(session.offered(&[TYPE_NETWORK_POLICY.to_owned()]).1.is_empty());
    assert_eq!(session.offered(&[TYPE_NETWORK_POLICY.to_owned(), TYPE_TRUST_BUNDLE.to_owned()]).1.len(), 1);
    session.respond(response(TYPE_NETWORK_POLICY, "n", vec![network_policy("a", "1")], &[]));
    assert_eq!(session.open([], &[]).len(), 2, "a new stream asks for them when they are offered again");
    let again = session.offered(&[TYPE_NETWORK_POLICY.to_owned()]).1.remove(0);
    assert_eq!(again.initial_resource_versions["NetworkPolicy/shop/a"], "1");
}

#[test]
fn nothing_is_complete_before_the_network_policies_that_are_offered() {
    let mut session = with_network_policies();
    let (mut writer, reader) = store();
    writer.apply([Change::NetworkPoliciesExpected], 1);
    for type_url in [TYPE_AUTHORIZATION, TYPE_ADDRESS, TYPE_NETWORK_POLICY] {
        assert!(!reader.load().synced());
        writer.apply(session.respond(response(type_url, "n", vec![], &[])).changes, 1);
    }
    assert!(reader.load().synced());
}

#[test]
fn a_trust_domain_is_believed_as_long_as_its_bundle_is_there() {
    let mut session = session(false);
    session.open([], &[]);
    let (mut writer, reader) = store();
    let (expected, _) = session.offered(&[TYPE_TRUST_BUNDLE.to_owned()]);
    writer.apply(expected, 1);
    for type_url in [TYPE_AUTHORIZATION, TYPE_ADDRESS] {
        writer.apply(session.respond(response(type_url, "n", vec![], &[])).changes, 1);
    }
    assert!(!reader.load().synced(), "who is believed is part of what must be known");
    let authority = Authority::open(tempfile::tempdir().unwrap().path(), 1_800_000_000).unwrap();
    let bundle = |domain: &str, roots: Vec<Vec<u8>>| {
        let roots = roots.into_iter().map(Into::into).collect();
        let bundle = mesh::TrustBundle { trust_domain: domain.to_owned(), roots };
        resource(TYPE_TRUST_BUNDLE, &format!("TrustBundle/{domain}"), "1", bundle.encode_to_vec())
    };
    let good = bundle("b.example", vec![authority.roots().certificates()[0].to_vec()]);
    writer.apply(session.respond(response(TYPE_TRUST_BUNDLE, "n", vec![good], &[])).changes, 1);
    assert!(reader.load().synced());
    assert_eq!(reader.load().trust().get("b.example"), Some(authority.roots()));
    let outcome = session.respond(response(TYPE_TRUST_BUNDLE, "n", vec![bundle("b.example", vec![])], &[]));
    assert_eq!(outcome.rejected.len(), 1);
    writer.apply(outcome.changes, 2);
    assert!(reader.load().trust().get("b.example").is_some(), "what cannot be read changes nothing");
    writer.apply(session.respond(response(TYPE_TRUST_BUNDLE, "n", vec![], &["TrustBundle/b.example"])).changes, 3);
    assert!(reader.load().trust().get("b.example").is_none());
    let names: Vec<String> =
        reader.versions().iter().flat_map(|entry| entry.resources.keys().map(ToString::to_string)).collect();
    assert_eq!(names, ["TrustBundle/b.example", "TrustBundle/b.example"]);
}

#[test]
fn policies_and_the_groups_that_they_name_change_in_one_step() {
    let part = |version: &str, type_url: &str, resources| DeltaDiscoveryResponse {
        system_version_info: version.to_owned(),
        ..response(type_url, "n", resources, &[])
    };
    let mut session = with_network_policies();
    let early = session.respond(part("6&", TYPE_NETWORK_POLICY, vec![network_policy("a", "1")]));
    assert_eq!(early.changes.len(), 2, "before the first state is complete nothing is decided");
    session.respond(part("6", TYPE_ADDRESS, vec![]));
    let held = session.respond(part("7&", TYPE_NETWORK_POLICY, vec![network_policy("a", "2")]));
    assert!(held.changes.is_empty() && held.answer.is_some(), "taken, and not in force before its workloads");
    let more = session.respond(part("7+", TYPE_ADDRESS, vec![pod("w", "2", &[])]));
    assert!(more.changes.is_empty());
    let last = session.respond(part("7", TYPE_ADDRESS, vec![pod("v", "2", &[])]));
    assert!(matches!(last.changes[..], [Change::NetworkPolicy(_), Change::Record(_), Change::Record(_)]));
    assert_eq!(session.respond(part("8", TYPE_NETWORK_POLICY, vec![network_policy("a", "3")])).changes.len(), 1);

    session.respond(part("9&", TYPE_NETWORK_POLICY, vec![network_policy("a", "4"), broken(network_policy("b", "4"))]));
    session.open([], &[]);
    let told = session.offered(&[TYPE_NETWORK_POLICY.to_owned()]).1.remove(0).initial_resource_versions;
    assert_eq!(told["NetworkPolicy/shop/a"], "", "what was held when the stream broke must come again");
}

#[test]
fn odd_responses_are_answered_and_change_nothing() {
    let mut session = session(false);
    let unknown = session.respond(response("type.googleapis.com/other", "n1", vec![], &["x"]));
    assert!(unknown.changes.is_empty());
    assert!(unknown.answer.unwrap().error_detail.is_some());
    assert!(!session.synced());
    let silent = session.respond(response(TYPE_ADDRESS, "", vec![], &[]));
    assert!(silent.answer.is_none(), "there is nothing to answer to");
}

/// A server as the protocol describes it, with one client.
#[derive(Default)]
struct Model {
    /// What is true: by type and name.
    world: BTreeMap<(&'static str, String), Resource>,
    /// What the client of the open stream has, as far as the server knows.
    sent: BTreeMap<(&'static str, String), String>,
    queue: VecDeque<DeltaDiscoveryResponse>,
    nonce: u64,
}

impl Model {
    fn put(&mut self, type_url: &'static str, resource: Resource) {
        self.world.insert((type_url, resource.name.clone()), resource);
    }

    fn open(&mut self, requests: Vec<DeltaDiscoveryRequest>) {
        self.queue.clear();
        self.sent.clear();
        for request in requests {
            let type_url = if request.type_url == TYPE_ADDRESS { TYPE_ADDRESS } else { TYPE_AUTHORIZATION };
            let told = request.initial_resource_versions.into_iter();
            self.sent.extend(told.map(|(name, version)| ((type_url, name), version)));
            self.push(type_url, true);
        }
    }

    /// Queues the difference of one type. The first response is sent even if it is empty.
    fn push(&mut self, type_url: &'static str, first: bool) {
        let of_type = |key: &&(&str, String)| key.0 == type_url;
        let changed = |(key, resource): &(&(&'static str, String), &Resource)| {
            key.0 == type_url && self.sent.get(*key) != Some(&resource.version)
        };
        let resources: Vec<_> = self.world.iter().filter(changed).map(|(_, resource)| resource.clone()).collect();
        let gone = |key: &&(&'static str, String)| !self.world.contains_key(*key);
        let removed: Vec<_> = self.sent.keys().filter(of_type).filter(gone).map(|(_, name)| name.clone()).collect();
        if resources.is_empty() && removed.is_empty() && !first {
            return;
        }
        self.sent.retain(|key, _| key.0 != type_url);
        let now = self.world.iter().filter(|(key, _)| key.0 == type_url);
        self.sent.extend(now.map(|(key, resource)| (key.clone(), resource.version.clone())));
        self.nonce += 1;
        let removed: Vec<_> = removed.iter().map(String::as_str).collect();
        self.queue.push_back(response(type_url, &self.nonce.to_string(), resources, &removed));
    }
}

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

fn deliver(model: &mut Model, session: &mut Session, writer: &mut Writer) -> bool {
    let Some(response) = model.queue.pop_front() else { return false };
    let nonce = response.nonce.clone();
    let outcome = session.respond(response);
    let answer = outcome.answer.unwrap();
    assert_eq!(answer.response_nonce, nonce);
    assert_eq!(answer.error_detail.is_some(), !outcome.rejected.is_empty());
    writer.apply(outcome.changes, 1);
    true
}

/// Random changes, deliveries and lost streams; in the end everything is corrected and delivered.
fn simulate(seed: u64) -> (Model, Reader) {
    let mut numbers = Numbers(seed);
    let mut model = Model::default();
    let mut session = session(false);
    let (mut writer, reader) = store();
    model.open(session.open(writer.addresses(), &[]));
    for step in 0..300u32 {
        let name = numbers.below(6);
        let version = step.to_string();
        match numbers.below(12) {
            0..3 => {
                let names: Vec<_> = (0..numbers.below(3)).map(|index| format!("shop/p{index}")).collect();
                let pod = pod(&format!("w{name}"), &version, &names);
                model.put(TYPE_ADDRESS, if numbers.below(5) == 0 { broken(pod) } else { pod });
            }
            3..5 => {
                let policy = policy(&format!("p{}", name % 4), &version);
                model.put(TYPE_AUTHORIZATION, if numbers.below(5) == 0 { broken(policy) } else { policy });
            }
            5 => drop(model.world.remove(&(TYPE_ADDRESS, format!("Kubernetes//Pod/shop/w{name}")))),
            6 => drop(model.world.remove(&(TYPE_AUTHORIZATION, format!("shop/p{}", name % 4)))),
            7..9 => {
                model.push(TYPE_ADDRESS, false);
                model.push(TYPE_AUTHORIZATION, false);
            }
            9 => model.open(session.open(writer.addresses(), &[])),
            _ => {
                deliver(&mut model, &mut session, &mut writer);
            }
        }
    }
    let keys: Vec<_> = model.world.keys().cloned().collect();
    for (type_url, name) in keys {
        let short = name.rsplit('/').next().unwrap_or_default();
        let corrected = match type_url {
            TYPE_ADDRESS => pod(short, "final", &[]),
            _ => policy(short, "final"),
        };
        model.put(type_url, corrected);
    }
    model.push(TYPE_AUTHORIZATION, false);
    model.push(TYPE_ADDRESS, false);
    while deliver(&mut model, &mut session, &mut writer) {}
    (model, reader)
}

#[test]
fn client_and_server_agree_in_the_end_whatever_happened_between() {
    for seed in 1..200u64 {
        let (model, reader) = simulate(seed);
        let snapshot = reader.load();
        let mut known: Vec<_> = snapshot.workloads().map(|w| (TYPE_ADDRESS, w.uid.to_string())).collect();
        known.extend(snapshot.policies().map(|p| (TYPE_AUTHORIZATION, p.id.to_string())));
        known.sort();
        let mut expected: Vec<_> = model.world.keys().cloned().collect();
        expected.sort();
        assert_eq!(known, expected, "seed {seed}");
        assert!(snapshot.workloads().all(|w| &*w.version == "final" && !w.policies_pending), "seed {seed}");
        assert!(snapshot.policies().all(|p| &*p.version == "final" && p.stand_in.is_none()), "seed {seed}");
    }
}

// A server on loopback.

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// One stream as the server sees it.
struct Accepted {
    authorization: String,
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: Responses,
}

struct Server {
    accepted: mpsc::Sender<Accepted>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type DeltaAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let authorization = header.unwrap_or_default().to_owned();
        let (responses, queue) = mpsc::channel(16);
        let requests = request.into_inner();
        let accepted = Accepted { authorization, requests, responses };
        self.accepted.send(accepted).await.map_err(|_| Status::unavailable("the test is over"))?;
        let mut response = Response::new(Box::pin(ReceiverStream::new(queue)) as Self::DeltaAggregatedResourcesStream);
        response.metadata_mut().insert("x-tulle-types", "a, b".parse().unwrap());
        Ok(response)
    }
}

/// Serves xDS over TLS with a certificate of a new CA. Gives the address, the CA's directory, and the streams.
async fn serve() -> (String, tempfile::TempDir, mpsc::Receiver<Accepted>, tokio::task::JoinHandle<()>) {
    let (address, dir, _, streams, task) = serve_as().await;
    (address, dir, streams, task)
}

type Serving = (String, tempfile::TempDir, String, mpsc::Receiver<Accepted>, tokio::task::JoinHandle<()>);

/// The same, and with the serial number of the server's certificate.
async fn serve_as() -> Serving {
    let dir = tempfile::tempdir().unwrap();
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    let authority = tulle_certs::ca::Authority::open(dir.path(), now).unwrap();
    let certificate = authority.server_certificate(&["localhost".to_owned(), "127.0.0.1".to_owned()], now).unwrap();
    let mut tls = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key.into())
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let (accepted, streams) = mpsc::channel(16);
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener).then(move |tcp| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(tcp?).await }
    });
    let service = AggregatedDiscoveryServiceServer::new(Server { accepted });
    let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
    let task = tokio::spawn(async move { serving.await.unwrap_or_default() });
    (address, dir, certificate.serial, streams, task)
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("it happens within 20 s")
}

#[tokio::test]
async fn the_client_applies_reconnects_and_tells_what_it_has() {
    let (address, dir, mut streams, server) = serve().await;
    let token = dir.path().join("token");
    std::fs::write(&token, "first\n").unwrap();
    let control = Control {
        address,
        root_ca: RootCa::File(dir.path().join("root-cert.pem")),
        alt_hostname: None,
        token: TokenSource::File(token.clone()),
        headers: vec![("ClusterID".to_owned(), "Kubernetes".to_owned())],
        link: Link::default(),
    };
    let (writer, reader) = store();
    let monitor = Monitor::default();
    let (stop, stopped) = oneshot::channel::<()>();
    let client = tokio::spawn(run(config(control), writer, monitor.clone(), async {
        let _ = stopped.await;
    }));

    let mut first = soon(streams.recv()).await.unwrap();
    assert_eq!(first.authorization, "Bearer first");
    for expected in [TYPE_AUTHORIZATION, TYPE_ADDRESS] {
        let request = soon(first.requests.message()).await.unwrap().unwrap();
        assert_eq!(request.type_url, expected);
        assert!(request.initial_resource_versions.is_empty());
    }
    let policies = response(TYPE_AUTHORIZATION, "1", vec![policy("p", "7")], &[]);
    first.responses.send(Ok(policies)).await.unwrap();
    let addresses = vec![pod("a", "8", &["shop/p".to_owned()]), broken(pod("b", "8", &[]))];
    first.responses.send(Ok(response(TYPE_ADDRESS, "2", addresses, &[]))).await.unwrap();
    let ack = soon(first.requests.message()).await.unwrap().unwrap();
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("1", None));
    let nack = soon(first.requests.message()).await.unwrap().unwrap();
    assert_eq!(nack.response_nonce, "2");
    assert!(nack.error_detail.unwrap().message.contains("Kubernetes//Pod/shop/b"));
    assert!(reader.load().synced(), "an answer means effect");
    assert!(reader.load().workload("Kubernetes//Pod/shop/a").is_some());
    assert!(monitor.status().connected);
    assert_eq!(monitor.status().offered_types, ["a", "b"]);
    assert_eq!((monitor.received(TYPE_ADDRESS).messages, monitor.rejected()), (1, 1));

    std::fs::write(&token, "second").unwrap();
    first.responses.send(Err(Status::unavailable("going away"))).await.unwrap();
    drop(first);
    let mut second = soon(streams.recv()).await.unwrap();
    assert_eq!(second.authorization, "Bearer second", "tokens are rotated");
    let told = soon(second.requests.message()).await.unwrap().unwrap().initial_resource_versions;
    assert_eq!(told, BTreeMap::from([("shop/p".to_owned(), "7".to_owned())]));
    let told = soon(second.requests.message()).await.unwrap().unwrap().initial_resource_versions;
    assert_eq!(told["Kubernetes//Pod/shop/a"], "8");
    assert_eq!(told["Kubernetes//Pod/shop/b"], "");
    assert_eq!(monitor.terminations(Termination::Reconnect), 1);
    assert!(reader.load().workload("Kubernetes//Pod/shop/a").is_some(), "the last good state stays");

    drop(stop);
    soon(client).await.unwrap();
    server.abort();
}

#[tokio::test]
async fn a_server_that_the_root_does_not_vouch_for_is_refused() {
    let (address, _dir, mut streams, server) = serve().await;
    let (_, other, _, other_server) = serve().await;
    let control = Control {
        address,
        root_ca: RootCa::File(other.path().join("root-cert.pem")),
        alt_hostname: None,
        token: TokenSource::None,
        headers: vec![],
        link: Link::default(),
    };
    let error = soon(control.connect()).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    assert!(streams.try_recv().is_err());
    server.abort();
    other_server.abort();
}

#[tokio::test]
async fn a_server_whose_certificate_is_taken_back_is_left_and_not_believed_again() {
    let (address, dir, serial, mut streams, server) = serve_as().await;
    let revoked = tls::Revoked::default();
    let root_ca = RootCa::File(dir.path().join("root-cert.pem"));
    let (alt_hostname, token, headers) = (None, TokenSource::None, vec![]);
    let link = Link::new(revoked.clone());
    let control = Control { address, root_ca, alt_hostname, token, headers, link };
    let (monitor, (_stop, stopped)) = (Monitor::default(), oneshot::channel::<()>());
    let client = tokio::spawn(run(config(control.clone()), store().0, monitor.clone(), async {
        let _ = stopped.await;
    }));
    let mut stream = soon(streams.recv()).await.unwrap();
    soon(stream.requests.message()).await.unwrap();

    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    let list = |serials: &[String]| {
        let serials: Vec<_> = serials.iter().map(|serial| revoke::serial(serial).unwrap()).collect();
        revoke::revoke(dir.path(), revoke::Signed::Leaf, &serials, now).unwrap();
        revoked.replace(tulle_certs::Crls::parse(&std::fs::read(dir.path().join("crl.pem")).unwrap()).unwrap());
    };
    list(&["01".to_owned()]);
    control.connect().await.expect("a list of others changes nothing");
    list(&[serial]);
    while let Ok(Some(_)) = soon(stream.requests.message()).await {}
    let error = loop {
        match control.connect().await {
            Err(error) => break error.to_string(),
            // It may not have been noticed yet that the connection is gone.
            Ok(connected) => control.link.broken(&connected).await,
        }
    };
    assert!(error.contains("revoked"), "{error}");
    assert!(streams.try_recv().is_err(), "there is another stream");
    client.abort();
    server.abort();
}

#[tokio::test]
async fn a_wrong_setting_is_an_error_that_names_it() {
    let with = |address: &str, root_ca: RootCa| Control {
        address: address.to_owned(),
        root_ca,
        alt_hostname: None,
        token: TokenSource::None,
        headers: vec![],
        link: Link::default(),
    };
    let missing = || RootCa::File("/nonexistent/root.pem".into());
    let pem = |text: &str| RootCa::Pem(text.to_owned());
    let cases = [
        (with("https://localhost:1", missing()), "/nonexistent/root.pem"),
        (with("ftp://localhost:1", pem("")), "neither https nor http"),
        (with("not a uri", pem("")), "not a uri"),
        (with("https://localhost:1", pem("-----BEGIN CERTIFICATE-----\n????")), "root CA"),
        (with("https://localhost:1", pem("no certificate")), "root CA"),
    ];
    for (control, expected) in cases {
        let error = soon(control.connect()).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}
