//! The whole control plane in process, over real TLS and gRPC on loopback: xDS as nodes use it, certificates, refusals.
//!
//! Every wait is for an event with a deadline; ports are given by the system; files are replaced by rename as users'
//! tools do.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use control::app;
use control::config::{Cli, Command};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tulle_proto::ca::IstioCertificateRequest;
use tulle_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use tulle_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use tulle_proto::names;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_service_client::NodeServiceClient;
use tulle_proto::node::{Hello, NodeMessage, NodeStatus};

const DEADLINE: Duration = Duration::from_secs(30);

struct Mesh {
    dir: tempfile::TempDir,
    running: Option<app::Running>,
    /// Further flags of `control serve`.
    more: &'static [&'static str],
}

impl Mesh {
    async fn start(files: &[(&str, &str)]) -> Self {
        Self::start_with(files, &[]).await
    }

    async fn start_with(files: &[(&str, &str)], more: &'static [&'static str]) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().expect("dir");
        std::fs::create_dir(dir.path().join("objects")).expect("mkdir");
        for (name, text) in files {
            put(dir.path(), name, text);
        }
        let mut mesh = Self { dir, running: None, more };
        mesh.restart().await;
        mesh
    }

    async fn restart(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
        let source = format!("files:{}", self.dir.path().join("objects").display());
        let ca = self.dir.path().join("ca");
        let args = [
            "control",
            "serve",
            "--source",
            &source,
            "--grpc-listen",
            "127.0.0.1:0",
            "--http-listen",
            "127.0.0.1:0",
            "--ca-dir",
        ];
        let args = args[..2].iter().chain(self.more).chain(&args[2..]).map(Into::into);
        let cli = Cli::try_parse_from(args.chain([ca.into_os_string()])).expect("arguments");
        let Command::Serve(serve) = cli.command else { unreachable!("serve was given") };
        self.running = Some(app::start(*serve).await.expect("start"));
    }

    fn put(&self, name: &str, text: &str) {
        put(self.dir.path(), name, text);
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join("objects").join(name)).expect("remove");
    }

    fn token(&self, arguments: &[&str]) -> String {
        let ca = self.dir.path().join("ca").into_os_string();
        let args = ["control", "token", "--ca-dir"]
            .into_iter()
            .map(Into::into)
            .chain([ca])
            .chain(arguments.iter().map(Into::into));
        let Command::Token(token) = Cli::try_parse_from(args).expect("arguments").command else {
            unreachable!("token was given")
        };
        app::token(&token).expect("token")
    }

    async fn channel(&self) -> Channel {
        self.try_channel().await.expect("connect")
    }

    async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        let root = std::fs::read(self.dir.path().join("ca/root-cert.pem")).expect("root");
        let port = self.running.as_ref().expect("running").grpc.port();
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name("localhost");
        Channel::from_shared(format!("https://127.0.0.1:{port}"))
            .expect("uri")
            .tls_config(tls)
            .expect("tls")
            .connect()
            .await
    }

    async fn get(&self, path: &str) -> (u16, String) {
        get_at(self.running.as_ref().expect("running").http, path).await.expect("an answer")
    }

    async fn json(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.get(path).await.1).unwrap_or_default()
    }

    /// Polls a view until it holds; panics with the last value.
    async fn until(&self, path: &str, holds: impl Fn(u16, &str) -> bool) {
        let start = tokio::time::Instant::now();
        loop {
            let (code, body) = self.get(path).await;
            if holds(code, &body) {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "{path} stays {code}: {body}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn put(dir: &Path, name: &str, text: &str) {
    let temporary = dir.join(format!(".{name}.new"));
    std::fs::write(&temporary, text).expect("write");
    std::fs::rename(temporary, dir.join("objects").join(name)).expect("rename");
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().expect("ascii");
    request.metadata_mut().insert("authorization", value);
    request
}

/// A scripted node.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    have: BTreeMap<String, BTreeMap<String, String>>,
}

fn struct_of(entries: &[(&str, &str)]) -> prost_types::Struct {
    let value = |text: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) };
    prost_types::Struct { fields: entries.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect() }
}

fn subscribe(url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node {
            id: "ztunnel~1.1.1.1~z.tulle-system~x".into(),
            metadata: Some(struct_of(&[("NODE_NAME", "node-1"), ("TULLE_VERSION", "0.1.0")])),
            ..Node::default()
        }),
        type_url: url.to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

impl Client {
    async fn open(mesh: &Mesh, first: Vec<DeltaDiscoveryRequest>) -> Self {
        let (requests, outgoing) = mpsc::channel(16);
        for request in first {
            requests.send(request).await.expect("room");
        }
        let token = mesh.token(&["--node", "node-1"]);
        let response = AggregatedDiscoveryServiceClient::new(mesh.channel().await)
            .delta_aggregated_resources(with_token(ReceiverStream::new(outgoing), &token))
            .await
            .expect("stream");
        assert!(response.metadata().contains_key(names::HEADER_TULLE_TYPES));
        Self { requests, responses: response.into_inner(), have: BTreeMap::new() }
    }

    async fn wildcard(mesh: &Mesh) -> Self {
        Self::open(mesh, vec![subscribe(names::TYPE_ADDRESS), subscribe(names::TYPE_AUTHORIZATION)]).await
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let next = tokio::time::timeout(DEADLINE, self.responses.next()).await;
        let response = next.expect("a response in time").expect("open").expect("good");
        let have = self.have.entry(response.type_url.clone()).or_default();
        for resource in &response.resources {
            have.insert(resource.name.clone(), resource.version.clone());
        }
        for name in &response.removed_resources {
            have.remove(name);
        }
        response
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| Status { code: 3, message: message.into(), details: Vec::new() }),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.expect("open");
    }

    async fn next_acked(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.answer(&response, None).await;
        response
    }
}

fn names_of(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart-0, namespace: shop, labels: {app: cart}}\nspec: {nodeName: node-1, serviceAccountName: cart}\nstatus: {podIP: 10.1.1.2}\n";
const POD2: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web-0, namespace: shop}\nspec: {nodeName: node-2, serviceAccountName: web}\nstatus: {podIP: 10.1.2.2}\n";
const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: cart, namespace: shop}\nspec: {selector: {matchLabels: {app: cart}}, action: DENY, rules: [{to: [{operation: {ports: ['9']}}]}]}\n";

#[tokio::test]
async fn wildcard_node_gets_everything_then_changes_then_removals() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("policy.yaml", POLICY)]).await;
    let mut client = Client::wildcard(&mesh).await;
    let (one, two) = (client.next_acked().await, client.next_acked().await);
    let mut all: Vec<_> = names_of(&one).into_iter().chain(names_of(&two)).collect();
    all.sort_unstable();
    assert_eq!(all, ["Kubernetes//Pod/shop/cart-0", "shop/cart"]);
    mesh.until("/debug/sync", |_, body| body.contains("\"acked_generation\":1")).await;

    mesh.put("pod2.yaml", POD2);
    let added = client.next_acked().await;
    assert_eq!(names_of(&added), ["Kubernetes//Pod/shop/web-0"]);

    mesh.remove("pod2.yaml");
    let removed = client.next_acked().await;
    assert_eq!(removed.removed_resources, ["Kubernetes//Pod/shop/web-0"]);
    assert!(removed.resources.is_empty());

    let sync = mesh.json("/debug/sync").await;
    assert_eq!(sync["files"]["pod.yaml"].as_str().map(str::len), Some(64), "{sync}");
    assert_eq!(sync["nodes"]["node-1"]["connected"], true, "{sync}");
}

#[tokio::test]
async fn policy_reaches_the_node_before_the_workload_that_names_it() {
    let mesh = Mesh::start(&[("pod.yaml", POD)]).await;
    let mut client = Client::wildcard(&mesh).await;
    client.next_acked().await;
    client.next_acked().await;
    mesh.until("/debug/sync", |_, body| body.contains("\"acked_generation\":1")).await;
    mesh.put("policy.yaml", POLICY);
    let first = client.next().await;
    let second = client.next().await;
    assert_eq!(first.type_url, names::TYPE_AUTHORIZATION);
    assert_eq!(second.type_url, names::TYPE_ADDRESS);
    assert_eq!(names_of(&second), ["Kubernetes//Pod/shop/cart-0"]);
}

#[tokio::test]
async fn reconnecting_node_is_sent_only_what_it_lacks_even_after_a_restart() {
    let mut mesh = Mesh::start(&[("pod.yaml", POD), ("pod2.yaml", POD2), ("policy.yaml", POLICY)]).await;
    let mut client = Client::wildcard(&mesh).await;
    client.next_acked().await;
    client.next_acked().await;
    let have = client.have.clone();
    drop(client);
    mesh.restart().await;
    let again = |have: &BTreeMap<String, BTreeMap<String, String>>| {
        [names::TYPE_ADDRESS, names::TYPE_AUTHORIZATION].map(|url| {
            let mut request = subscribe(url);
            request.initial_resource_versions = have[url].clone();
            request
        })
    };
    let mut client = Client::open(&mesh, again(&have).into()).await;
    for _ in 0..2 {
        let response = client.next_acked().await;
        assert!(response.resources.is_empty() && response.removed_resources.is_empty(), "{response:?}");
    }
    drop(client);
    mesh.remove("pod2.yaml");
    mesh.until("/debug/resources", |_, body| !body.contains("web-0")).await;
    let mut client = Client::open(&mesh, again(&have).into()).await;
    let (one, two) = (client.next_acked().await, client.next_acked().await);
    let removed: Vec<_> = one.removed_resources.iter().chain(&two.removed_resources).collect();
    assert_eq!(removed, ["Kubernetes//Pod/shop/web-0"]);
    assert_eq!(one.resources.len() + two.resources.len(), 0);
}

#[tokio::test]
async fn on_demand_node_gets_what_it_asks_for_by_name_or_address() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("pod2.yaml", POD2)]).await;
    let mut first = subscribe(names::TYPE_ADDRESS);
    first.resource_names_subscribe = vec!["*".into()];
    first.resource_names_unsubscribe = vec!["*".into()];
    let mut client = Client::open(&mesh, vec![first, subscribe(names::TYPE_AUTHORIZATION)]).await;
    for _ in 0..2 {
        assert!(client.next_acked().await.resources.is_empty());
    }
    let mut ask = DeltaDiscoveryRequest { type_url: names::TYPE_ADDRESS.into(), ..Default::default() };
    ask.resource_names_subscribe = vec!["/10.1.2.2".into(), "/10.9.9.9".into()];
    client.requests.send(ask).await.expect("open");
    let response = client.next_acked().await;
    assert_eq!(names_of(&response), ["Kubernetes//Pod/shop/web-0"]);
    assert_eq!(response.resources[0].aliases, ["/10.1.2.2"]);
    assert_eq!(response.removed_resources, ["/10.9.9.9"], "absence is told, so that nobody waits for ever");

    // A Service brings its endpoints, those of later too; a node brings what is on it.
    let (service, node) = ("shop/cart.shop.svc.cluster.local", "node/node-1");
    let asked = async |client: &mut Client, name: &str| {
        let mut ask = DeltaDiscoveryRequest { type_url: names::TYPE_ADDRESS.into(), ..Default::default() };
        ask.resource_names_subscribe = vec![name.into()];
        client.requests.send(ask).await.expect("open");
        client.next_acked().await
    };
    mesh.put("service.yaml", SERVICE);
    mesh.until("/debug/resources", |_, body| body.contains(service)).await;
    let found = asked(&mut client, "/10.96.0.7").await;
    assert_eq!(names_of(&found), ["Kubernetes//Pod/shop/cart-0", service]);
    mesh.put("pod3.yaml", &POD.replace("cart-0", "cart-1").replace("10.1.1.2", "10.1.1.3"));
    assert_eq!(names_of(&client.next_acked().await), ["Kubernetes//Pod/shop/cart-1"]);
    mesh.remove("pod3.yaml");
    assert_eq!(client.next_acked().await.removed_resources, ["Kubernetes//Pod/shop/cart-1"]);
    let on_node = asked(&mut client, node).await;
    assert_eq!(names_of(&on_node), ["Kubernetes//Pod/shop/cart-0"], "what is asked for is answered again");
    assert_eq!(on_node.removed_resources, [node], "which is no resource");
}

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {clusterIP: 10.96.0.7, selector: {app: cart}, ports: [{port: 80}]}\n";

#[tokio::test]
async fn rejection_is_shown_and_does_not_stop_the_stream() {
    let mesh = Mesh::start(&[("pod.yaml", POD)]).await;
    let mut client = Client::wildcard(&mesh).await;
    for _ in 0..2 {
        let response = client.next().await;
        let bad = (response.type_url == names::TYPE_ADDRESS).then_some("Kubernetes//Pod/shop/cart-0: bad address");
        client.answer(&response, bad).await;
    }
    mesh.until("/debug/sync", |_, body| body.contains("cart-0: bad address")).await;
    mesh.put("pod2.yaml", POD2);
    assert_eq!(names_of(&client.next_acked().await), ["Kubernetes//Pod/shop/web-0"]);
    mesh.until("/debug/sync", |_, body| !body.contains("bad address")).await;
}

#[tokio::test]
async fn unreadable_file_at_start_keeps_control_unready_and_serves_nothing() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("bad.yaml", "a: [")]).await;
    mesh.until("/readyz", |code, body| code == 503 && body.contains("bad.yaml")).await;
    assert_eq!(mesh.json("/debug/sync").await["generation"], 0);
    assert_eq!(mesh.get("/healthz").await.0, 200);
    mesh.put("bad.yaml", POD2);
    mesh.until("/readyz", |code, _| code == 200).await;
    // Later breakage keeps the last good version and readiness.
    mesh.put("bad.yaml", "a: [");
    mesh.until("/debug/problems", |_, body| body.contains("earlier objects stay")).await;
    assert!(mesh.get("/debug/resources").await.1.contains("web-0"));
    assert_eq!(mesh.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn streams_without_the_right_token_or_node_are_refused() {
    let mesh = Mesh::start(&[("pod.yaml", POD)]).await;
    let good = mesh.token(&["--node", "node-1"]);
    let tampered = format!("{}x", &good[..good.len() - 1]);
    let other = mesh.token(&["--node", "node-2"]);
    let without_node = mesh.token(&["--service-account", "shop/cart"]);
    let cases = [
        (None, tonic::Code::Unauthenticated, "Bearer"),
        (Some(""), tonic::Code::Unauthenticated, "refused"),
        (Some("x.y.z"), tonic::Code::Unauthenticated, "refused"),
        (Some(tampered.as_str()), tonic::Code::Unauthenticated, "refused"),
        (Some(other.as_str()), tonic::Code::PermissionDenied, "node-2"),
        (Some(without_node.as_str()), tonic::Code::PermissionDenied, "no tulle.dev/node claim"),
    ];
    for (token, code, text) in cases {
        let (requests, outgoing) = mpsc::channel(1);
        requests.send(subscribe(names::TYPE_ADDRESS)).await.expect("room");
        let stream = ReceiverStream::new(outgoing);
        let request = match token {
            None => Request::new(stream),
            Some(token) => with_token(stream, token),
        };
        let mut client = AggregatedDiscoveryServiceClient::new(mesh.channel().await);
        let status = match client.delta_aggregated_resources(request).await {
            Err(status) => status,
            Ok(response) => {
                let next = tokio::time::timeout(DEADLINE, response.into_inner().next()).await;
                next.expect("in time").expect("a status").expect_err("refused")
            }
        };
        assert_eq!(status.code(), code, "{token:?}: {status:?}");
        assert!(status.message().contains(text), "{token:?}: {status:?}");
    }
}

#[tokio::test]
async fn a_certificate_that_is_asked_for_before_the_mesh_is_known_waits_for_it() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("bad.yaml", "a: [")]).await;
    mesh.until("/readyz", |code, body| code == 503 && body.contains("bad.yaml")).await;
    let cart = tulle_certs::SpiffeId::new("cluster.local", "shop", "cart").expect("id");
    let request = IstioCertificateRequest {
        csr: tulle_certs::request(&cart).expect("request").csr_pem,
        validity_duration: 600,
        metadata: Some(struct_of(&[("ImpersonatedIdentity", cart.as_str())])),
    };
    let node = mesh.token(&["--node", "node-1"]);
    let mut client = IstioCertificateServiceClient::new(mesh.channel().await);
    let refused =
        client.create_certificate(with_token(request.clone(), &node)).await.expect_err("nobody knows the pods");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "to be tried again, not a verdict: {refused:?}");
    let waiting = tokio::spawn(async move { client.create_certificate(with_token(request, &node)).await });
    mesh.put("bad.yaml", POD2);
    waiting.await.expect("no panic").expect("it waited");
}

#[tokio::test]
async fn certificates_are_given_for_pods_of_the_node_only() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("pod2.yaml", POD2)]).await;
    mesh.until("/readyz", |code, _| code == 200).await;
    let cart = tulle_certs::SpiffeId::new("cluster.local", "shop", "cart").expect("id");
    let web = tulle_certs::SpiffeId::new("cluster.local", "shop", "web").expect("id");
    let own = tulle_certs::SpiffeId::new("cluster.local", "tulle-system", "ztunnel").expect("id");
    let node = mesh.token(&["--node", "node-1"]);
    let account = mesh.token(&["--service-account", "shop/cart"]);
    let csr = |id| tulle_certs::request(id).expect("request").csr_pem;
    let bad_csr = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
    let cases = [
        ("for a pod here", &node, csr(&cart), Some(&cart), None),
        ("for itself", &node, csr(&own), None, None),
        ("an account for itself", &account, csr(&cart), None, None),
        ("for a pod elsewhere", &node, csr(&web), Some(&web), Some(tonic::Code::PermissionDenied)),
        ("an account for another", &account, csr(&web), Some(&web), Some(tonic::Code::PermissionDenied)),
        ("CSR of another", &node, csr(&web), Some(&cart), Some(tonic::Code::PermissionDenied)),
        ("bad CSR", &node, bad_csr.into(), Some(&cart), Some(tonic::Code::InvalidArgument)),
        ("no CSR", &node, String::new(), Some(&cart), Some(tonic::Code::InvalidArgument)),
    ];
    let mut client = IstioCertificateServiceClient::new(mesh.channel().await);
    for (name, token, csr, impersonated, refused) in cases {
        let request = IstioCertificateRequest {
            csr,
            validity_duration: 600,
            metadata: impersonated.map(|id| struct_of(&[("ImpersonatedIdentity", id.as_str())])),
        };
        match (client.create_certificate(with_token(request, token)).await, refused) {
            (Ok(response), None) => {
                let chain = response.into_inner().cert_chain;
                let expected = match (impersonated, name) {
                    (Some(id), _) => id,
                    (None, "for itself") => &own,
                    _ => &cart,
                };
                let issued = tulle_certs::Issued::parse(&chain, expected).expect("usable answer");
                assert_eq!(issued.not_after - issued.not_before, 660, "{name}");
            }
            (Err(status), Some(code)) => assert_eq!(status.code(), code, "{name}: {status:?}"),
            (result, _) => panic!("{name}: {result:?}"),
        }
    }
}

#[tokio::test]
async fn attached_node_answers_status_and_a_silent_one_is_an_error_of_its_own() {
    let mesh = Mesh::start(&[("pod.yaml", POD), ("pod2.yaml", POD2)]).await;
    mesh.until("/readyz", |code, _| code == 200).await;
    let (answers, outgoing) = mpsc::channel(4);
    let hello = Hello { node: "node-1".into(), version: "t".into(), gateway_pod: String::new() };
    answers.send(NodeMessage { id: 0, answer: Some(Answer::Hello(hello)) }).await.expect("room");
    let token = mesh.token(&["--node", "node-1"]);
    let mut questions = NodeServiceClient::new(mesh.channel().await)
        .attach(with_token(ReceiverStream::new(outgoing), &token))
        .await
        .expect("attach")
        .into_inner();
    let node = tokio::spawn(async move {
        while let Some(Ok(question)) = questions.next().await {
            let status = NodeStatus { version: "t".into(), generation: 7, ..NodeStatus::default() };
            let message = NodeMessage { id: question.id, answer: Some(Answer::Status(status)) };
            if answers.send(message).await.is_err() {
                return;
            }
        }
    });
    mesh.until("/debug/status", |_, body| body.contains("\"generation\":7")).await;
    let status = mesh.json("/debug/status").await;
    assert!(status["nodes"]["node-2"]["error"].as_str().is_some_and(|e| e.contains("not attached")), "{status}");
    let (code, body) = mesh.get("/debug/explain?from=shop/web-0&to=shop/cart-0:80").await;
    assert_eq!(code, 502, "{body}");
    let (code, body) = mesh.get("/debug/explain?from=shop/none&to=shop/cart-0:80").await;
    assert_eq!(code, 404, "{body}");
    node.abort();
}

/// A server of key sets: whatever is asked for gets `body`; empty: 500.
async fn issuer(body: std::sync::Arc<std::sync::Mutex<String>>) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("port");
    let port = listener.local_addr().expect("address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let body = body.lock().expect("body").clone();
            let status = if body.is_empty() { 500 } else { 200 };
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await;
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_by_uri_are_in_the_first_publication_and_follow_their_issuer() {
    let body = std::sync::Arc::new(std::sync::Mutex::new(r#"{"keys":[{"kid":"one"}]}"#.to_owned()));
    let port = issuer(body.clone()).await;
    let object = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: users, namespace: shop}}\n\
         spec: {{jwtRules: [{{issuer: i, jwksUri: 'http://127.0.0.1:{port}/keys'}}]}}\n"
    );
    let flags = &["--jwks-blocked-cidrs=", "--jwks-refresh=1s"];
    let mut mesh = Mesh::start_with(&[("auth.yaml", &object)], flags).await;
    mesh.until("/readyz", |code, _| code == 200).await;
    let auths = "/debug/resources?type=RequestAuth";
    // Ready means published, and what is published first has the keys.
    assert!(mesh.get(auths).await.1.contains("one"), "{}", mesh.get(auths).await.1);
    // A second key comes before anything is signed with it, and the first one goes later.
    *body.lock().expect("body") = r#"{"keys":[{"kid":"one"},{"kid":"two"}]}"#.to_owned();
    mesh.until(auths, |_, text| text.contains("one") && text.contains("two")).await;
    *body.lock().expect("body") = String::new();
    mesh.until("/debug/conditions", |_, text| text.contains("FetchFailed") && text.contains("stay in force")).await;
    assert!(mesh.get(auths).await.1.contains("two"), "keys are kept while their server fails");
    *body.lock().expect("body") = r#"{"keys":[{"kid":"two"}]}"#.to_owned();
    mesh.until(auths, |_, text| !text.contains("one") && text.contains("two")).await;
    // A start without the issuer waits for it, and then refuses the tokens of this issuer only.
    *body.lock().expect("body") = String::new();
    mesh.restart().await;
    mesh.until(auths, |_, text| text.contains("no_keys")).await;
    // Loopback is nobody's issuer unless it is said to be.
    mesh.more = &[];
    mesh.restart().await;
    mesh.until("/debug/conditions", |_, text| text.contains("which control does not connect to")).await;
}

/// A page at an address; `None` if the connection is closed without one.
async fn get_at(at: std::net::SocketAddr, path: &str) -> Option<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(at).await.expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let mut text = String::new();
    stream.write_all(request.as_bytes()).await.ok()?;
    stream.read_to_string(&mut text).await.ok()?;
    let code = text.split(' ').nth(1)?.parse().ok()?;
    Some((code, text.split_once("\r\n\r\n")?.1.to_owned()))
}

#[tokio::test]
async fn the_port_of_metrics_answers_metrics_alone_however_many_hold_it() {
    let mesh = Mesh::start_with(&[("pod.yaml", POD)], &["--metrics-listen", "127.0.0.1:0"]).await;
    mesh.until("/readyz", |code, _| code == 200).await;
    let at = mesh.running.as_ref().and_then(|running| running.metrics).expect("it listens");
    let (code, body) = get_at(at, "/metrics").await.expect("metrics");
    assert!(code == 200 && body.contains("tulle_control_generation") && body.ends_with("# EOF\n"), "{code} {body}");
    for path in ["/", "/metrics/", "/healthz", "/readyz", "/debug/status", "/debug/resources", "/debug/ca"] {
        assert_eq!(get_at(at, path).await.map(|(code, _)| code), Some(404), "{path}");
    }
    // Strangers that connect and say nothing hold it for a while, and nothing else at all.
    let mut idle = Vec::new();
    for _ in 0..64 {
        idle.push(tokio::net::TcpStream::connect(at).await.expect("connect"));
    }
    assert_eq!(mesh.get("/healthz").await.0, 200);
    let started = tokio::time::Instant::now();
    while get_at(at, "/metrics").await.is_none_or(|(code, _)| code != 200) {
        assert!(started.elapsed() < DEADLINE, "nobody gets metrics any more");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(idle);
}

/// A connection from one of this machine's own addresses.
async fn connect_from(from: &str, to: std::net::SocketAddr) -> tokio::net::TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().expect("socket");
    socket.bind(format!("{from}:0").parse().expect("address")).expect("bind");
    socket.connect(to).await.expect("connect")
}

/// Whether the other end closes it before it has said anything.
async fn is_closed(mut stream: tokio::net::TcpStream) -> bool {
    use tokio::io::AsyncReadExt;
    !matches!(stream.read(&mut [0]).await, Ok(1..))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_cannot_take_all_places() {
    let mesh = Mesh::start(&[("pod.yaml", POD)]).await;
    mesh.until("/readyz", |code, _| code == 200).await;
    let at = mesh.running.as_ref().expect("it runs").grpc;
    // Strangers that connect and say nothing: what one of them may not have is closed at once, others are served.
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(connect_from("127.0.0.7", at).await);
    }
    assert!(is_closed(connect_from("127.0.0.7", at).await).await);
    let first = silent.first().and_then(|first| first.try_read(&mut [0]).err()).map(|error| error.kind());
    assert_eq!(first, Some(std::io::ErrorKind::WouldBlock), "it was closed for being late, as all of them are");
    let _others = mesh.channel().await;
    drop(silent);
    // Connections that are open count, too, until they end.
    let mut open = Vec::new();
    for _ in 1..512 {
        open.push(mesh.channel().await);
    }
    assert!(mesh.try_channel().await.is_err(), "the 513th");
    open.clear();
    let started = tokio::time::Instant::now();
    while mesh.try_channel().await.is_err() {
        assert!(started.elapsed() < DEADLINE, "no place becomes free");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
