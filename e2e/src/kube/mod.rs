//! A real API server for tests: etcd and kube-apiserver as child processes on loopback, with TLS, RBAC and an audit
//! log, and nothing else of a cluster. Tests and the lab play scheduler, kubelet and controllers.
//!
//! Each [`ApiServer`] is a cluster of its own, gone when it is dropped, or when its process dies. Ports are chosen by the
//! kernel and kept by a bound socket that never listens, so that nobody else gets them while the server restarts. The
//! admission plugin that wants every service account to exist is off, because no controller makes them; a Namespace's
//! deletion is finished by [`Cluster::delete`]. Limits: one etcd, no controller manager: nothing makes EndpointSlices,
//! tokens' Secrets or owners' garbage collection.

pub mod audit;
pub mod cluster;
pub mod control;
pub mod controllers;
pub mod crds;
pub mod programs;

pub mod pki;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

pub use cluster::Cluster;

use crate::address;
use crate::client;
use crate::kube::audit::{Event, Summary};
use crate::kube::pki::Pki;
use crate::place::Placement;
use crate::supervise::process::{Process, Start, signal_group};

/// A cold start takes some seconds on a fast machine; five tests on two cores take minutes.
const START: Duration = Duration::from_secs(240);
/// Open requests get this long to end before the server is killed.
const STOP: Duration = Duration::from_secs(20);

/// What a test wants besides the usual.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Further arguments of kube-apiserver; of a flag given twice the last one counts.
    pub arguments: Vec<String>,
}

/// A running API server; the administrator's [`Cluster`] besides.
pub struct ApiServer {
    cluster: Cluster,
    dir: PathBuf,
    pki: Pki,
    options: Options,
    port: Port,
    etcd_port: Port,
    server: Option<Child>,
    etcd: Option<Child>,
}

/// Starts an API server, or says why this machine has none and returns none.
///
/// # Panics
/// When there is none and `CI` is set, or when it could start and did not.
#[allow(clippy::panic)]
pub fn start(options: Options) -> Option<ApiServer> {
    if let Err(why) = programs::find("kube-apiserver").and_then(|_| programs::find("etcd")) {
        assert!(std::env::var_os("CI").is_none(), "no API server on this machine: {why}");
        eprintln!("SKIPPED: no API server on this machine: {why}");
        return None;
    }
    match ApiServer::start(options) {
        Ok(server) => Some(server),
        Err(error) => panic!("the API server did not come up: {error:#}"),
    }
}

impl ApiServer {
    /// Starts etcd and the server, and waits until it is ready.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let dir = folder()?;
        let pki = Pki::create(&dir)?;
        pki.user("admin", "admin", &["system:masters"])?;
        std::fs::write(dir.join("audit-policy.yaml"), audit::POLICY)?;
        let (port, etcd_port) = (Port::reserve()?, Port::reserve()?);
        let admin = dir.join("admin.kubeconfig");
        let user = json!({"client-certificate": pki.file("admin.crt"), "client-key": pki.file("admin.key")});
        write_kubeconfig(&admin, &port.url(), &pki.file("ca.crt"), &user)?;
        let cluster = Cluster::connect(&admin, "tulle-test")?;
        let mut server = Self { cluster, dir, pki, options, port, etcd_port, server: None, etcd: None };
        server.start_etcd()?;
        server.begin()?;
        server.await_ready()?;
        Ok(server)
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        self.port.url()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address
    }

    /// Its URL for whoever is inside a lab that is told of it.
    pub fn url_in_lab(&self) -> String {
        format!("https://{}:{}", address::CONTROL.v4, LAB_PORT)
    }

    /// The folder with its files, gone with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The certificate of its authority.
    pub fn authority(&self) -> PathBuf {
        self.pki.file("ca.crt")
    }

    /// The kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    /// The kubeconfig of a service account, `namespace/name`, with a token of an hour. Both are made if they are
    /// missing; what it may do is up to RBAC.
    pub fn kubeconfig_for(&self, account: &str) -> anyhow::Result<PathBuf> {
        let (namespace, name) = account.split_once('/').context("a service account is `namespace/name`")?;
        self.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
        ))?;
        let token = self.token(account, "", None)?;
        let path = self.dir.join(format!("{namespace}_{name}.kubeconfig"));
        write_kubeconfig(&path, &self.url(), &self.authority(), &json!({"token": token}))?;
        Ok(path)
    }

    /// A copy of a kubeconfig made here, for use inside a lab.
    pub fn in_lab(&self, kubeconfig: &Path) -> anyhow::Result<PathBuf> {
        let text = std::fs::read_to_string(kubeconfig)?.replace(&self.url(), &self.url_in_lab());
        let path = kubeconfig.with_extension("lab.kubeconfig");
        pki::write_secret(&path, &text)?;
        Ok(path)
    }

    /// The audit log so far.
    pub fn audit(&self) -> anyhow::Result<Vec<Event>> {
        audit::read(&self.dir.join("audit.jsonl"))
    }

    /// Ends the server in order and starts it again; returns when it is ready. etcd goes on.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop();
        self.begin()?;
        self.await_ready()
    }

    /// Ends the server in order. Its clients find the port closed.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.process.ask_to_end();
            server.process.end(Instant::now() + STOP);
        }
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.process.end(Instant::now());
        }
    }

    /// Starts a server that was ended; does not wait until it is ready.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.server.is_none(), "the API server runs already");
        let mut argv = vec![program("kube-apiserver")?];
        argv.extend(self.arguments());
        argv.extend(self.options.arguments.clone());
        self.server = Some(Child::start(argv, self.dir.join("kube-apiserver.log"))?);
        Ok(())
    }

    /// Waits until it is ready.
    pub fn await_ready(&mut self) -> anyhow::Result<()> {
        let (port, cluster) = (self.port.address.port(), self.cluster.clone());
        let mut children = [("etcd", self.etcd.as_mut()), ("kube-apiserver", self.server.as_mut())];
        let began = Instant::now();
        loop {
            for (name, child) in &mut children {
                let child = child.as_mut().with_context(|| format!("{name} was not started"))?;
                if let Some(code) = child.process.exited() {
                    anyhow::bail!("{name} ended with {code}:\n{}", tail(child.process.log()));
                }
            }
            // The answer is a word and no JSON: what counts is that it is no refusal.
            let ask = http::Request::get("/readyz").body(Vec::new())?;
            // A deadline belongs to the runtime, so it is made inside of it.
            let client = cluster.client();
            let asked = async { tokio::time::timeout(Duration::from_secs(5), client.request_text(ask)).await };
            let answer = cluster.run(asked);
            match answer {
                Ok(Ok(_)) => return Ok(()),
                last if began.elapsed() > START => {
                    anyhow::bail!("the API server on port {port} is not ready: {last:?}")
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Stops the server's process without ending it: clients get no answer, not even a refusal.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            signal_group(pid, signal);
        }
    }

    /// Puts objects of the core, as `<plural>/<namespace>/<name>`, straight into etcd, as a restored backup has them: by way of
    /// the server a hundred thousand would take a quarter of an hour. The server does not check them.
    pub fn restore(&self, objects: impl Iterator<Item = (String, Value)>) -> anyhow::Result<()> {
        /// etcd takes 128 in a transaction.
        const AT_ONCE: usize = 100;
        let base64 = |bytes: Vec<u8>| json!(k8s_openapi::ByteString(bytes));
        let puts = objects.map(|(key, object)| {
            let (key, value) = (format!("/registry/{key}").into_bytes(), object.to_string().into_bytes());
            json!({"requestPut": {"key": base64(key), "value": base64(value)}})
        });
        let mut puts = puts.peekable();
        while puts.peek().is_some() {
            let some: Vec<Value> = puts.by_ref().take(AT_ONCE).collect();
            let body = json!({"success": some}).to_string();
            let answer = client::post(self.etcd_port.address, "/v3/kv/txn", &body, Duration::from_secs(60))?;
            anyhow::ensure!(answer.status == 200, "etcd answers {}: {}", answer.status, answer.body);
        }
        Ok(())
    }

    /// Makes etcd forget everything but the present. The server's own memory of changes goes with a restart; after both,
    /// watches from before are refused with 410 and must list again.
    pub fn compact(&self) -> anyhow::Result<()> {
        let ask = |path: &str, body: Value| -> anyhow::Result<Value> {
            let answer = client::post(self.etcd_port.address, path, &body.to_string(), Duration::from_secs(30))?;
            anyhow::ensure!(answer.status == 200, "etcd answers {}: {}", answer.status, answer.body);
            Ok(serde_json::from_str(&answer.body)?)
        };
        // Base64 of one zero byte: any key does, the revision is in the header.
        let now = ask("/v3/kv/range", json!({"key": "AA=="}))?;
        let revision = now["header"]["revision"].as_str().context("etcd does not say its revision")?;
        ask("/v3/kv/compaction", json!({"revision": revision, "physical": true})).map(drop)
    }

    /// Process id of the server, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref()?.process.pid()
    }

    fn start_etcd(&mut self) -> anyhow::Result<()> {
        let url = format!("http://{}", self.etcd_port.address);
        let argv = vec![
            program("etcd")?,
            format!("--data-dir={}", self.dir.join("etcd").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            // Nobody else is in this cluster of one; the address is never used.
            "--listen-peer-urls=http://127.0.0.1:0".into(),
            "--unsafe-no-fsync".into(),
            "--quota-backend-bytes=4294967296".into(),
            "--log-level=warn".into(),
        ];
        self.etcd = Some(Child::start(argv, self.dir.join("etcd.log"))?);
        Ok(())
    }

    fn arguments(&self) -> Vec<String> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let issuer = "https://kubernetes.default.svc.cluster.local";
        let pairs: [(&str, String); 23] = [
            ("etcd-servers", format!("http://{}", self.etcd_port.address)),
            ("bind-address", Ipv4Addr::LOCALHOST.to_string()),
            ("secure-port", self.port.address.port().to_string()),
            ("advertise-address", address::CONTROL.v4.to_string()),
            ("endpoint-reconciler-type", "none".into()),
            ("service-cluster-ip-range", format!("{},{}", address::SERVICES.0, address::SERVICES.1)),
            ("tls-cert-file", file("apiserver.crt")),
            ("tls-private-key-file", file("apiserver.key")),
            ("client-ca-file", file("ca.crt")),
            ("service-account-issuer", issuer.into()),
            ("service-account-key-file", file("sa.pub")),
            ("service-account-signing-key-file", file("sa.key")),
            ("api-audiences", issuer.into()),
            ("authorization-mode", "Node,RBAC".into()),
            ("disable-admission-plugins", "ServiceAccount".into()),
            ("allow-privileged", "true".into()),
            ("audit-policy-file", file("audit-policy.yaml")),
            ("audit-log-path", file("audit.jsonl")),
            // Beta, and off unless it is asked for: roots of federated trust domains.
            ("feature-gates", "ClusterTrustBundle=true".into()),
            ("runtime-config", "certificates.k8s.io/v1beta1=true".into()),
            ("profiling", "false".into()),
            ("shutdown-delay-duration", "0s".into()),
            ("v", "1".into()),
        ];
        pairs.into_iter().map(|(name, value)| format!("--{name}={value}")).collect()
    }

    /// What was asked of the server by whom, on one line that the summary of `make test-kube` takes up.
    fn say_evidence(&self) {
        if let Ok(events) = self.audit() {
            let summary = serde_json::to_string(&Summary::of(&events)).unwrap_or_default();
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            // In one write: lines of tests that run beside each other must not mix.
            let mut line = String::new();
            let _ = writeln!(line, "EVIDENCE {test} {summary}");
            eprint!("{line}");
        }
    }
}

impl Deref for ApiServer {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.resume();
        // The server before etcd, which it would wait for.
        if let Some(mut server) = self.server.take() {
            server.process.ask_to_end();
            server.process.end(Instant::now() + Duration::from_secs(5));
        }
        self.etcd = None;
        self.say_evidence();
        if std::thread::panicking() || std::env::var_os("KEEP_LOGS").is_some() {
            eprintln!("logs of the API server are kept in {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Port at which a lab shows the API server, at the address of control.
pub const LAB_PORT: u16 = 6443;

/// A child process, and the thread that it dies with.
struct Child {
    process: Process,
    _keeper: mpsc::Sender<()>,
}

impl Child {
    /// Children die with the thread that starts them; a test's thread may end before its server does.
    fn start(argv: Vec<String>, log: PathBuf) -> anyhow::Result<Self> {
        let (keeper, ended) = mpsc::channel::<()>();
        let (started, process) = mpsc::channel();
        std::thread::Builder::new().name("keeper".into()).spawn(move || {
            let env = BTreeMap::from([("HOME".to_owned(), "/".to_owned())]);
            let start = Start {
                argv: &argv,
                env: &env,
                bin: log.parent().unwrap_or_else(|| Path::new("/")),
                placement: &Placement::default(),
                log: &log,
            };
            let _ = started.send(Process::start(&start));
            // Until the value is dropped.
            let _ = ended.recv();
        })?;
        let process = process.recv().context("the thread that starts a process ended")??;
        Ok(Self { process, _keeper: keeper })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Before the keeper, whose end would kill it as well.
        self.process.end(Instant::now());
    }
}

/// A port of loopback that the kernel gives to nobody else: the socket is bound and never listens, and a server that
/// allows addresses to be reused may bind beside it.
struct Port {
    _socket: Socket,
    address: SocketAddr,
}

impl Port {
    fn reserve() -> anyhow::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        let address = socket.local_addr()?.as_socket().context("a socket without an address")?;
        Ok(Self { _socket: socket, address })
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

/// A folder that no other server uses, for its owner only.
fn folder() -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt as _;
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("tulle-kube-{}-{count}", std::process::id()));
    // Left by a process of the same number that was killed.
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| format!("{}", dir.display()))?;
    Ok(dir)
}

fn program(name: &str) -> anyhow::Result<String> {
    Ok(programs::find(name).map_err(anyhow::Error::msg)?.display().to_string())
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// Writes the kubeconfig of a user, who is a token or a certificate with its key.
pub fn write_kubeconfig(path: &Path, server: &str, authority: &Path, user: &Value) -> anyhow::Result<()> {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": authority}}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    pki::write_secret(path, &serde_json::to_string_pretty(&config)?)
}
