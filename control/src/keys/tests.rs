//! Fetching from a real HTTPS server on loopback, with a certificate of a root of its own: what arrives, what is kept when
//! the server fails, and what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tulle_certs::ca::Authority;

use super::fetch::{Client, FetchError};
use super::{FIRST_RETRY, LONGEST_RETRY, Settings, jittered, retry, run};
use crate::base;
use crate::model::{KeySource, KeySources};

const DEADLINE: Duration = Duration::from_secs(30);
const ONE: &str = r#"{"keys":[{"kid":"one"}]}"#;
const BOTH: &str = r#"{"keys":[{"kid":"one"},{"kid":"two"}]}"#;

/// What is answered to each path: status, headers and body.
type Answers = BTreeMap<String, (u16, String, String)>;

/// An issuer.
struct Issuer {
    at: String,
    answers: Arc<Mutex<Answers>>,
    folder: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Issuer {
    async fn start(tls: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = base::unix_now();
        let authority = Authority::open(folder.path(), now).unwrap();
        let certificate = authority.server_certificate(&["localhost".to_owned()], now).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificate.chain, certificate.key.into())
            .unwrap();
        let acceptor = tls.then(|| TlsAcceptor::from(Arc::new(config)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let at = format!("{}://localhost:{port}", if tls { "https" } else { "http" });
        let answers = Arc::new(Mutex::new(BTreeMap::new()));
        let shared = Arc::clone(&answers);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, answers) = (acceptor.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    match acceptor {
                        None => serve(stream, &answers).await,
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, &answers).await;
                            }
                        }
                    }
                });
            }
        });
        Self { at, answers, folder, server }
    }

    fn says(&self, path: &str, status: u16, headers: &str, body: &str) {
        self.answers.lock().unwrap().insert(path.to_owned(), (status, headers.to_owned(), body.to_owned()));
    }

    fn uri(&self, path: &str) -> KeySource {
        KeySource::Uri(format!("{}{path}", self.at))
    }

    fn client(&self) -> Client {
        Client::new(Some(self.folder.path().join("root-cert.pem")), Vec::new())
    }
}

async fn serve(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, answers: &Mutex<Answers>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let found = answers.lock().unwrap().get(&path).cloned();
    let (status, headers, body) = found.unwrap_or_else(|| (404, String::new(), "not here".to_owned()));
    let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len());
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.shutdown().await;
}

#[tokio::test]
async fn keys_come_over_verified_tls_and_from_where_the_issuer_says() {
    let issuer = Issuer::start(true).await;
    issuer.says("/keys", 200, "", ONE);
    issuer.says("/moved", 302, "location: /keys\r\n", "");
    issuer.says(
        "/tenant/.well-known/openid-configuration",
        200,
        "",
        &format!(r#"{{"jwks_uri":"{}/keys"}}"#, issuer.at),
    );
    let client = issuer.client();
    for source in [issuer.uri("/keys"), issuer.uri("/moved"), KeySource::Issuer(format!("{}/tenant/", issuer.at))] {
        assert_eq!(client.keys(&source).await, Ok(ONE.to_owned()), "{source}");
    }
    let stranger = Issuer::start(true).await;
    assert!(matches!(stranger.client().keys(&issuer.uri("/keys")).await, Err(FetchError::Tls(..))));
}

#[tokio::test]
async fn what_is_no_small_key_set_of_an_allowed_server_is_refused() {
    let (issuer, plain) = (Issuer::start(true).await, Issuer::start(false).await);
    issuer.says("/page", 200, "", "<html>secret of somebody</html>");
    issuer.says("/large", 200, "", &" ".repeat(300 * 1024));
    issuer.says("/loop", 302, "location: /loop\r\n", "");
    issuer.says("/down", 302, &format!("location: {}/keys\r\n", plain.at), "");
    issuer.says("/nowhere", 302, "", "");
    plain.says("/keys", 200, "", ONE);
    let client = issuer.client();
    assert_eq!(client.keys(&plain.uri("/keys")).await, Ok(ONE.to_owned()), "asked for without TLS");
    for (path, expected) in [
        ("/page", "is no JSON"),
        ("/large", "more than 262144 bytes"),
        ("/loop", "redirects to"),
        ("/down", "redirects to"),
        ("/nowhere", "redirects to"),
        ("/absent", "answered 404"),
    ] {
        let error = client.keys(&issuer.uri(path)).await.unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains("secret"), "{path}: {error}");
    }
    for (source, expected) in [
        ("ftp://localhost/", "is no http:// or https:// address"),
        ("https://", "is no http:// or https:// address"),
        ("https://no-such-name.invalid/", "cannot be resolved"),
    ] {
        let error = client.keys(&KeySource::Uri(source.into())).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{source}: {error}");
    }
    let careful = Client::new(None, vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
    let error = careful.keys(&plain.uri("/keys")).await.unwrap_err();
    assert!(matches!(error, FetchError::Blocked(..)), "{error}");
}

async fn until(keys: &mut watch::Receiver<KeySources>, what: &str, holds: impl Fn(&KeySources) -> bool) {
    let found = tokio::time::timeout(DEADLINE, keys.wait_for(holds)).await.map(|found| found.is_ok());
    assert_eq!(found, Ok(true), "{what}: {:?}", keys.borrow());
}

#[tokio::test]
async fn a_set_is_followed_kept_while_its_server_fails_and_forgotten_when_nobody_names_it() {
    let issuer = Issuer::start(true).await;
    issuer.says("/keys", 200, "", ONE);
    let source = issuer.uri("/keys");
    let settings = Settings {
        refresh: Duration::from_millis(50),
        ca: Some(issuer.folder.path().join("root-cert.pem")),
        blocked: Vec::new(),
    };
    let (wanted, wanted_receiver) = watch::channel(Arc::new(BTreeSet::new()));
    let (publish, mut keys) = watch::channel(KeySources::default());
    let (_stop, stop) = base::stop();
    let task = tokio::spawn(run(settings, wanted_receiver, publish, stop));
    let has = |keys: &KeySources, jwks: &str, fails: bool| {
        keys.get(&source).is_some_and(|found| &*found.jwks == jwks && found.failure.is_empty() != fails)
    };
    wanted.send_replace(Arc::new([source.clone()].into()));
    until(&mut keys, "the first set", |keys| has(keys, ONE, false)).await;
    issuer.says("/keys", 200, "", BOTH);
    until(&mut keys, "a second key", |keys| has(keys, BOTH, false)).await;
    issuer.says("/keys", 500, "", "");
    until(&mut keys, "both are kept while it fails", |keys| has(keys, BOTH, true)).await;
    issuer.says("/keys", 200, "", ONE);
    until(&mut keys, "one again", |keys| has(keys, ONE, false)).await;
    wanted.send_replace(Arc::default());
    until(&mut keys, "nobody names it", KeySources::is_empty).await;
    issuer.server.abort();
    task.abort();
}

#[test]
fn waits_grow_and_are_not_in_step() {
    assert_eq!((retry(1), retry(2), retry(3)), (FIRST_RETRY, FIRST_RETRY * 2, FIRST_RETRY * 4));
    assert_eq!(retry(u32::MAX), LONGEST_RETRY);
    let minute = Duration::from_secs(60);
    assert_eq!(jittered(minute, 0), Duration::from_secs(54));
    assert_eq!(jittered(minute, u64::MAX), Duration::from_secs(66));
}
