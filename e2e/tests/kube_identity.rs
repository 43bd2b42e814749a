//! Promise: in a cluster a caller is who the API server says, nobody passes without its word, and all replicas of control
//! are one authority through creation, rotation and loss of files, a step of a rotation waits for the nodes of all of them, and the roots
//! are published where the cluster can hold them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::kube::control::Control;
use e2e::kube::{self, ApiServer, Options, crds};
use e2e::lab::programs_dir;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Code, Request, Status};
use tulle_certs::SpiffeId;
use tulle_proto::ca::IstioCertificateRequest;
use tulle_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::node_service_client::NodeServiceClient;
use tulle_proto::node::{CertificateStatus, Hello, NodeMessage, NodeStatus, TrustAnswer};

const PATIENCE: Duration = Duration::from_secs(120);
const ROOT: &str = "tulle-system";

fn namespaces() -> String {
    let namespace = |name: &str| format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
    namespace(ROOT) + &namespace("shop")
}

/// A running pod of an account, which is made too.
fn pod(api: &ApiServer, namespace: &str, name: &str, account: &str, node: &str) -> anyhow::Result<()> {
    api.apply(&format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {namespace}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  nodeName: {node}\n  \
         serviceAccountName: {account}\n  containers: [{{name: app, image: none}}]\n"
    ))?;
    let status =
        serde_json::json!({"status": {"phase": "Running", "podIP": "10.44.0.9", "podIPs": [{"ip": "10.44.0.9"}]}});
    api.patch_status("Pod", &format!("{namespace}/{name}"), &status)?;
    Ok(())
}

/// The roots that nodes are given.
fn bundle(api: &ApiServer) -> anyhow::Result<String> {
    let map = api.get("ConfigMap", &format!("{ROOT}/tulle-ca-root-cert"))?.context("no ConfigMap")?;
    Ok(map["data"]["root-cert.pem"].as_str().context("no roots in the ConfigMap")?.to_owned())
}

/// Asks for the certificate of `identity`, as somebody else's if `impersonate`.
fn sign(
    api: &ApiServer,
    control: &Control,
    token: &str,
    (namespace, account): (&str, &str),
    impersonate: bool,
) -> anyhow::Result<Result<(), Status>> {
    let id = SpiffeId::new("cluster.local", namespace, account)?;
    let mut message = IstioCertificateRequest { csr: tulle_certs::request(&id)?.csr_pem, ..Default::default() };
    if impersonate {
        let value = Value { kind: Some(Kind::StringValue(id.to_string())) };
        message.metadata = Some(Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() });
    }
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(bundle(api)?)).domain_name("localhost");
    let uri = format!("https://{}", control.grpc());
    let answer = api.run(async {
        let channel = Channel::from_shared(uri)?.tls_config(tls)?.connect().await?;
        let mut client = IstioCertificateServiceClient::new(channel);
        anyhow::Ok(tokio::time::timeout(PATIENCE, client.create_certificate(request)).await?)
    })?;
    Ok(answer.map(drop))
}

#[test]
fn a_token_is_worth_what_the_api_server_says_of_it() -> anyhow::Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let Some(mut api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(&namespaces())?;
    for (namespace, name, account, node) in [
        (ROOT, "zt-1", "ztunnel", "node-1"),
        ("shop", "cart-1", "cart", "node-1"),
        ("shop", "web-1", "web", "node-2"),
        ("shop", "ztunnel-1", "ztunnel", "node-1"),
    ] {
        pod(&api, namespace, name, account, node)?;
    }
    let dir = tempfile::tempdir()?;
    let control = Control::of_cluster(&dir.path().join("one"), &api.kubeconfig(), &["--ca-secret", "tulle-ca"])?;
    control.await_ready()?;
    let token = |account: &str, audience: &str, pod: Option<&str>| api.token(account, audience, pod);
    let node = token("tulle-system/ztunnel", "istio-ca", Some("tulle-system/zt-1"))?;
    let cart = token("shop/cart", "istio-ca", Some("shop/cart-1"))?;
    let mut forged = cart.clone();
    forged.truncate(forged.len() - 8);
    forged.push_str("AAAAAAAA");
    let own = control_token(&dir.path().join("one/ca"))?;
    // what, token, whose certificate, as somebody else's; the refusal and a word of it
    let refused = |code: Code, word: &'static str| Some((code, word));
    let cases = [
        ("a node, what runs there", node.clone(), ("shop", "cart"), true, None),
        ("a node, what runs elsewhere", node.clone(), ("shop", "web"), true, refused(Code::PermissionDenied, "node-1")),
        ("a node, itself", node.clone(), (ROOT, "ztunnel"), false, None),
        ("a pod, itself", cart.clone(), ("shop", "cart"), false, None),
        (
            "a pod, another",
            cart.clone(),
            ("shop", "web"),
            true,
            refused(Code::PermissionDenied, "its own identity only"),
        ),
        (
            "the same account of another namespace",
            token("shop/ztunnel", "istio-ca", Some("shop/ztunnel-1"))?,
            ("shop", "cart"),
            true,
            refused(Code::PermissionDenied, "its own identity only"),
        ),
        (
            "the node account without a pod",
            token("tulle-system/ztunnel", "istio-ca", None)?,
            ("shop", "cart"),
            true,
            refused(Code::PermissionDenied, "node"),
        ),
        (
            "for the API server's audience",
            token("tulle-system/ztunnel", "", Some("tulle-system/zt-1"))?,
            ("shop", "cart"),
            true,
            refused(Code::Unauthenticated, "audience istio-ca"),
        ),
        ("forged", forged, ("shop", "cart"), false, refused(Code::Unauthenticated, "does not accept")),
        ("no token at all", "hello".to_owned(), ("shop", "cart"), false, refused(Code::Unauthenticated, "refused")),
        ("one of control's own", own, ("shop", "cart"), true, None),
    ];
    for (name, token, identity, impersonate, expected) in cases {
        // The pods may still be on their way to control.
        eventually(name, PATIENCE, || match (sign(&api, &control, &token, identity, impersonate)?, expected) {
            (Ok(()), None) => Ok(()),
            (Err(status), Some((code, word))) if status.code() == code && status.message().contains(word) => Ok(()),
            (other, _) => Err(anyhow::anyhow!("{other:?}")),
        })?;
    }

    // A pod goes; its token was never shown before.
    pod(&api, "shop", "cart-2", "cart", "node-1")?;
    let orphan = token("shop/cart", "istio-ca", Some("shop/cart-2"))?;
    api.remove("Pod", "shop/cart-2")?;
    eventually("the token of a pod that is gone", PATIENCE, || {
        match sign(&api, &control, &orphan, ("shop", "cart"), false)? {
            Err(status) if status.code() == Code::Unauthenticated => Ok(()),
            other => Err(anyhow::anyhow!("{other:?}")),
        }
    })?;

    // Nobody can be asked: a new token passes nobody, and it is said that it is worth trying again.
    let late = token("shop/cart", "istio-ca", Some("shop/cart-1"))?;
    let roots = bundle(&api)?;
    api.kill();
    let answer = sign_with(&roots, &control, &late)?;
    assert_eq!(answer.as_ref().map_err(Status::code), Err(Code::Unavailable), "{answer:?}");
    api.begin()?;
    api.await_ready()?;
    eventually("and passes afterwards", PATIENCE, || match sign(&api, &control, &late, ("shop", "cart"), false)? {
        Ok(()) => Ok(()),
        other => Err(anyhow::anyhow!("{other:?}")),
    })?;
    let log = std::fs::read_to_string(dir.path().join("one/control.log"))?;
    for secret in [&node, &cart, &late] {
        assert!(!log.contains(secret.as_str()), "a token is in the log");
    }
    assert!(!log.contains("PRIVATE KEY"), "a key is in the log");
    Ok(())
}

/// The same without an API server.
fn sign_with(roots: &str, control: &Control, token: &str) -> anyhow::Result<Result<(), Status>> {
    let id = SpiffeId::new("cluster.local", "shop", "cart")?;
    let mut request =
        Request::new(IstioCertificateRequest { csr: tulle_certs::request(&id)?.csr_pem, ..Default::default() });
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name("localhost");
    let uri = format!("https://{}", control.grpc());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = Channel::from_shared(uri)?.tls_config(tls)?.connect().await?;
        let mut client = IstioCertificateServiceClient::new(channel);
        Ok(tokio::time::timeout(PATIENCE, client.create_certificate(request)).await?.map(drop))
    })
}

fn run(arguments: &[&str]) -> anyhow::Result<String> {
    let output = std::process::Command::new(programs_dir()?.join("control")).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    anyhow::ensure!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

fn control_token(ca: &Path) -> anyhow::Result<String> {
    node_token(ca, "node-1")
}

fn node_token(ca: &Path, node: &str) -> anyhow::Result<String> {
    run(&["token", "--ca-dir", &ca.display().to_string(), "--node", node])
}

fn fingerprints(control: &Control) -> anyhow::Result<(serde_json::Value, String)> {
    let page = control.json("/debug/ca")?;
    Ok((page["roots"].clone(), page["rotation"].as_str().unwrap_or_default().to_owned()))
}

#[test]
fn replicas_that_start_at_once_are_one_authority_and_rotate_together() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    api.apply(&namespaces())?;
    let dir = tempfile::tempdir()?;
    let kubeconfig = api.kubeconfig();
    let start = |name: &str| Control::of_cluster(&dir.path().join(name), &kubeconfig, &["--ca-secret", "tulle-ca"]);
    let (started, starts) = mpsc::channel();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let (end, ended) = mpsc::channel::<()>();
        scope.spawn(move || {
            // Lives as long as this thread does.
            let second = start("two");
            let _ = started.send(second.as_ref().map(Control::http).map_err(|error| format!("{error:#}")));
            let _ = ended.recv();
        });
        let one = start("one")?;
        let two = starts.recv()?.map_err(anyhow::Error::msg)?;
        let files = |name: &str, file: &str| std::fs::read_to_string(dir.path().join(name).join("ca").join(file));
        let equal = |what: &str| {
            eventually(what, PATIENCE, || {
                for file in ["root-cert.pem", "root-key.pem", "ca-cert.pem", "ca-key.pem", "token-key.pem"] {
                    anyhow::ensure!(files("one", file)? == files("two", file)?, "{file} differs");
                }
                anyhow::ensure!(bundle(&api)? == files("one", "root-cert.pem")?, "the ConfigMap differs");
                Ok(())
            })
        };
        equal("both have the same authority")?;
        let secrets = api.list("Secret", ROOT)?;
        assert_eq!(secrets.len(), 1, "{} Secrets", secrets.len());
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(dir.path().join("two/ca/ca-key.pem"))?.permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);

        let (kube, ca) = (kubeconfig.display().to_string(), dir.path().join("one/ca").display().to_string());
        let rotate = || run(&["rotate", "root", "--force", "--ca-dir", &ca, "--source", "kube", "--kubeconfig", &kube]);
        let second = |path: &str| {
            let answer = e2e::client::get(two, path, Duration::from_secs(20))?;
            anyhow::Ok(serde_json::from_str::<serde_json::Value>(&answer.body)?)
        };
        for (step, roots) in [("announced", 2), ("switched", 2), ("settled", 1)] {
            rotate()?;
            eventually(step, PATIENCE, || {
                let (found, rotation) = fingerprints(&one)?;
                anyhow::ensure!(rotation == step, "the first says {rotation}");
                let page = second("/debug/ca")?;
                anyhow::ensure!(page["rotation"] == step && page["roots"] == found, "the second says {page}");
                anyhow::ensure!(bundle(&api)?.matches("BEGIN CERTIFICATE").count() == roots, "the ConfigMap is behind");
                Ok(())
            })?;
            equal(step)?;
        }

        // Somebody takes the ConfigMap away, then the files of a replica.
        api.delete("ConfigMap", &format!("{ROOT}/tulle-ca-root-cert"))?;
        equal("the ConfigMap is back")?;
        std::fs::remove_file(dir.path().join("two/ca/root-key.pem"))?;
        equal("its files are what they were")?;
        assert!(
            api.get("Secret", &format!("{ROOT}/tulle-ca"))?.is_some_and(|it| it["data"]["root-key.pem"].is_string())
        );
        drop(end);
        one.stop();
        Ok(())
    })
}

/// What a node holds: one certificate, which the test decides on.
type Held = Arc<Mutex<CertificateStatus>>;

/// Answers control's questions as a node does that holds one certificate, until the stream ends.
async fn answer(node: &str, grpc: SocketAddr, roots: String, token: String, held: Held) -> anyhow::Result<()> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name("localhost");
    let channel = Channel::from_shared(format!("https://{grpc}"))?.tls_config(tls)?.connect().await?;
    let (answers, outgoing) = tokio::sync::mpsc::channel(8);
    let hello = Hello { node: node.to_owned(), version: "t".to_owned(), gateway_pod: String::new() };
    answers.send(NodeMessage { id: 0, answer: Some(Answer::Hello(hello)) }).await?;
    let outgoing = futures_util::stream::unfold(outgoing, |mut outgoing| async move {
        outgoing.recv().await.map(|message| (message, outgoing))
    });
    let mut request = Request::new(outgoing);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    let mut questions = NodeServiceClient::new(channel).attach(request).await?.into_inner();
    while let Some(question) = questions.message().await? {
        let answer = match question.question {
            Some(Question::Trust(_)) => Answer::Trust(TrustAnswer::default()),
            _ => {
                let certificate = held.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Answer::Status(NodeStatus { certificates: vec![certificate], ..NodeStatus::default() })
            }
        };
        answers.send(NodeMessage { id: question.id, answer: Some(answer) }).await?;
    }
    Ok(())
}

/// A page of a replica that another thread holds.
fn page_of(http: SocketAddr, path: &str) -> anyhow::Result<serde_json::Value> {
    let answer = e2e::client::get(http, path, Duration::from_secs(20))?;
    serde_json::from_str(&answer.body).with_context(|| format!("{path}: {}", answer.body))
}

/// A list of texts.
fn texts(value: &serde_json::Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|text| Some(text.as_str()?.to_owned())).collect()
}

#[test]
fn a_step_of_a_rotation_waits_for_the_nodes_of_every_replica() -> anyhow::Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(&namespaces())?;
    pod(&api, "shop", "cart-1", "cart", "node-1")?;
    pod(&api, "shop", "web-1", "web", "node-2")?;
    let dir = tempfile::tempdir()?;
    let kubeconfig = api.kubeconfig();
    let start = |name: &str| Control::of_cluster(&dir.path().join(name), &kubeconfig, &["--ca-secret", "tulle-ca"]);
    let (one, two) = (start("one")?, start("two")?);
    one.await_ready()?;
    two.await_ready()?;
    let ca = dir.path().join("one/ca");
    let ca_page = |http: SocketAddr| page_of(http, "/debug/ca");
    let first = ca_page(one.http())?;
    let held: [Held; 2] = std::array::from_fn(|_| {
        Arc::new(Mutex::new(CertificateStatus {
            identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
            state: "Available".into(),
            not_after: i64::MAX,
            roots: texts(&first["roots"]),
            issuer: first["intermediate"].as_str().unwrap_or_default().to_owned(),
            ..CertificateStatus::default()
        }))
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for (at, (control, node)) in [(&one, "node-1"), (&two, "node-2")].into_iter().enumerate() {
        let (grpc, roots, token, held) = (control.grpc(), bundle(&api)?, node_token(&ca, node)?, held[at].clone());
        runtime.spawn(answer(node, grpc, roots, token, held));
        control
            .wait("/debug/status", &format!("{node} is attached"), |page| page["nodes"][node]["status"].is_object())?;
    }
    let (kube, dir_of_ca) = (kubeconfig.display().to_string(), ca.display().to_string());
    let control = format!("http://{}", one.http());
    let rotate = |more: &[&str]| {
        let mut argv = vec!["rotate", "root", "--ca-dir", &dir_of_ca, "--source", "kube", "--kubeconfig", &kube];
        argv.extend(["--control", &control]);
        argv.extend(more);
        run(&argv)
    };
    // Both replicas say the same, whichever has the node.
    let waits = |step: &str, expected: &[&str]| {
        eventually(&format!("{step}: waits for {expected:?}"), PATIENCE, || {
            for http in [one.http(), two.http()] {
                let page = ca_page(http)?;
                let found = texts(&page["waitsFor"]);
                let same = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.contains(b));
                anyhow::ensure!(page["rotation"] == step && same, "{http} says {page}");
            }
            Ok(())
        })
    };
    let set = |at: usize, change: &dyn Fn(&mut CertificateStatus)| {
        change(&mut held[at].lock().unwrap_or_else(PoisonError::into_inner));
    };
    let unknown = |node: &str| format!("node {node}: 1 of 1 certificates do not know the new root yet");
    let unsigned = |node: &str| format!("node {node}: 1 of 1 certificates are not signed under it yet");

    rotate(&[])?;
    waits("announced", &[&unknown("node-1"), &unknown("node-2")])?;
    let roots = texts(&ca_page(one.http())?["roots"]);
    set(0, &|held| held.roots.clone_from(&roots));
    waits("announced", &[&unknown("node-2")])?;
    let refused = rotate(&[]).err().context("a step went on although a node of the other replica is behind")?;
    assert!(refused.to_string().contains(&unknown("node-2")), "{refused}");
    set(1, &|held| held.roots.clone_from(&roots));
    rotate(&["--wait", "2m"])?;
    waits("switched", &[&unsigned("node-1"), &unsigned("node-2")])?;
    let issuer = ca_page(one.http())?["intermediate"].as_str().unwrap_or_default().to_owned();
    set(1, &|held| held.issuer.clone_from(&issuer));
    waits("switched", &[&unsigned("node-1")])?;
    set(0, &|held| held.issuer.clone_from(&issuer));
    rotate(&["--wait", "2m"])?;
    waits("settled", &[])?;
    eventually("nothing is said once nothing is rotated", PATIENCE, || {
        let leases = api.list("Lease", ROOT)?;
        let said = leases.iter().filter(|lease| lease["metadata"]["annotations"]["tulle.dev/certificates"].is_string());
        anyhow::ensure!(said.count() == 0, "{leases:?}");
        Ok(())
    })?;
    one.stop();
    two.stop();
    Ok(())
}

/// A CA of somebody else: a root, and what it puts into a Secret.
struct OtherCa {
    root: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl OtherCa {
    fn new() -> anyhow::Result<Self> {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key)?;
        Ok(Self { root, issuer: rcgen::Issuer::new(params, key) })
    }

    /// Applies a Secret with a new intermediate and the roots of `all`, and gives the intermediate's fingerprint.
    fn give(&self, api: &ApiServer, all: &[&Self]) -> anyhow::Result<String> {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        let intermediate = params.signed_by(&key, &self.issuer)?;
        let roots: String = all.iter().map(|it| it.root.pem()).collect();
        let text = |text: String| k8s_openapi::ByteString(text.into_bytes());
        let (certificate, key) = (text(intermediate.pem()), text(key.serialize_pem()));
        let secret = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts", "namespace": ROOT},
            "data": {"ca.crt": text(roots), "tls.crt": certificate, "tls.key": key},
        });
        api.apply(&secret.to_string())?;
        Ok(tulle_certs::fingerprint(intermediate.der()))
    }
}

#[test]
fn the_ca_of_somebody_else_is_followed_and_cuts_nobody_off() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    crds::install(&api)?;
    api.apply(&namespaces())?;
    let (one, two) = (OtherCa::new()?, OtherCa::new()?);
    let first = one.give(&api, &[&one])?;
    let dir = tempfile::tempdir()?;
    let arguments = ["--ca-secret", "tulle-ca", "--ca-plugged-secret", "cacerts"];
    let start = |name: &str| Control::of_cluster(&dir.path().join(name), &api.kubeconfig(), &arguments);
    let (left, right) = (start("left")?, start("right")?);
    let signs = |what: &str, intermediate: &str, roots: usize| {
        eventually(what, PATIENCE, || {
            for control in [&left, &right] {
                let page = control.json("/debug/ca")?;
                let same = page["intermediate"] == intermediate && texts(&page["roots"]).len() == roots;
                anyhow::ensure!(same, "expected {intermediate} under {roots} roots: {page}");
            }
            anyhow::ensure!(bundle(&api)?.matches("BEGIN CERTIFICATE").count() == roots, "the ConfigMap is behind");
            Ok(())
        })
    };
    signs("it is there from the beginning", &first, 1)?;
    let secret = api.get("Secret", &format!("{ROOT}/tulle-ca"))?.context("no Secret")?;
    assert!(
        secret["data"]["token-key.pem"].is_string() && secret["data"]["root-key.pem"].is_null(),
        "no root was made"
    );
    let second = one.give(&api, &[&one])?;
    signs("it is renewed", &second, 1)?;
    // Another root alone would cut off whoever was signed until now: nothing changes, and somebody says why.
    two.give(&api, &[&two])?;
    eventually("the log says why it is not taken", PATIENCE, || {
        let logs: Vec<_> = ["left", "right"]
            .iter()
            .map(|name| std::fs::read_to_string(dir.path().join(name).join("control.log")))
            .collect::<Result<_, _>>()?;
        anyhow::ensure!(logs.iter().any(|log| log.contains("would be cut off")), "{}", logs.concat());
        anyhow::ensure!(!logs.iter().any(|log| log.contains("PRIVATE KEY")), "a key is in the log");
        Ok(())
    })?;
    signs("it goes on", &second, 1)?;
    let third = two.give(&api, &[&one, &two])?;
    signs("both roots, and the new one signs", &third, 2)?;
    let fourth = two.give(&api, &[&two])?;
    signs("the old root goes", &fourth, 1)?;
    left.stop();
    right.stop();
    Ok(())
}

const BUNDLE: &str = "tulle.dev:mesh-ca:root-cert";

/// An API server with what `tulle install` brings, and a control that has no rights but those of its account there.
fn installed(api: &ApiServer, dir: &Path) -> anyhow::Result<Control> {
    let mut install = std::process::Command::new(programs_dir()?.join("tulle"));
    let output = install.args(["install", "--no-wait", "--kubeconfig"]).arg(api.kubeconfig()).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let account = api.kubeconfig_for(&format!("{ROOT}/control"))?;
    let control = Control::of_cluster(dir, &account, &["--ca-secret", "tulle-ca"])?;
    control.await_ready()?;
    Ok(control)
}

/// How often the log of a control says something.
fn told(dir: &Path, what: &str) -> anyhow::Result<usize> {
    Ok(std::fs::read_to_string(dir.join("control.log"))?.matches(what).count())
}

#[test]
fn the_roots_are_published_with_no_more_than_the_installed_rights_and_follow_a_rotation() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let control = installed(&api, dir.path())?;
    let published = |what: &str, roots: usize| {
        api.wait("ClusterTrustBundle", BUNDLE, what, |object| {
            let text = object["spec"]["trustBundle"].as_str().unwrap_or_default();
            object["spec"]["signerName"] == "tulle.dev/mesh-ca"
                && text.matches("BEGIN CERTIFICATE").count() == roots
                && bundle(&api).is_ok_and(|map| map == text)
        })
    };
    let object = published("it has the root", 1)?;
    assert_eq!(object["metadata"]["labels"]["tulle.dev/trust-domain"], serde_json::Value::Null, "it federates nobody");
    assert!(!object["spec"]["trustBundle"].to_string().contains("PRIVATE"), "a key is public");
    let ca = dir.path().join("ca").display().to_string();
    let (kube, http) = (api.kubeconfig().display().to_string(), format!("http://{}", control.http()));
    let rotate = [
        "rotate",
        "root",
        "--ca-dir",
        &ca,
        "--source",
        "kube",
        "--kubeconfig",
        &kube,
        "--control",
        &http,
        "--wait",
        "2m",
    ];
    run(&rotate)?;
    let object = published("it has both roots", 2)?;
    run(&rotate)?;
    run(&rotate)?;
    let last = published("it has the new root alone", 1)?;
    assert_ne!(last["spec"]["trustBundle"], object["spec"]["trustBundle"]);
    // Its rights are gone: that is said, and what the mesh needs goes on.
    let role = api.get("ClusterRole", "tulle-control")?.context("no ClusterRole")?;
    let rules = role["rules"].as_array().context("no rules")?.iter();
    let rules: Vec<_> = rules.filter(|rule| rule["resources"] != serde_json::json!(["signers"])).collect();
    api.patch("ClusterRole", "tulle-control", &serde_json::json!({"rules": rules}))?;
    run(&rotate)?;
    eventually("the log says what is missing", PATIENCE, || {
        let words = told(dir.path(), "user not permitted to attest")?;
        anyhow::ensure!(words == 1 && bundle(&api)?.matches("BEGIN CERTIFICATE").count() == 2, "{words} times");
        Ok(())
    })?;
    control.stop();
    Ok(())
}

#[test]
fn a_cluster_without_trust_bundles_lacks_nothing_else() -> anyhow::Result<()> {
    let arguments = ["--feature-gates=ClusterTrustBundle=false", "--runtime-config=certificates.k8s.io/v1beta1=false"];
    let arguments = arguments.map(str::to_owned).to_vec();
    let Some(api) = kube::start(Options { arguments }) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let control = installed(&api, dir.path())?;
    eventually("the log says that the kind is missing", PATIENCE, || {
        let words = told(dir.path(), "does not serve clustertrustbundles")?;
        anyhow::ensure!(words == 1, "{words} times");
        Ok(())
    })?;
    assert!(bundle(&api)?.contains("BEGIN CERTIFICATE"));
    control.stop();
    Ok(())
}
