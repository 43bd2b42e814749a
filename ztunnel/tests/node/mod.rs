//! One node in one process, with real namespaces, real rules and real TLS, but without control: the snapshot is written
//! by the test. Least power that can find a broken flow; the lab's scenarios add processes and nodes.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod frames;
pub mod messages;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use prost::Message as _;
use prost_types::Any;
use tulle_certs::ca::Authority;
use tulle_certs::{Issued, Roots, SpiffeId, request};
use tulle_proto::names;
use tulle_proto::tulle_workload::{EgressMode, WorkloadInfo};
use tulle_proto::workload::address::Type;
use tulle_proto::workload::{
    Address, AppProtocol, Extension, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload,
};
use ztunnel::app::federation;
use ztunnel::app::fence::Fence;
use ztunnel::app::pods::{Environment, Pods};
use ztunnel::app::resolver::Names;
use ztunnel::app::worker::Worker;
use ztunnel::base::drain::{Drain, Phase, drain};
use ztunnel::base::netns::{Netns, NetnsThread};
use ztunnel::base::sockets::{Options, PodSockets};
use ztunnel::base::workers::Workers;
use ztunnel::capture::pods::{ListFile, Source, watch_directory};
use ztunnel::capture::rules::Kernel;
use ztunnel::config::Preexisting;
use ztunnel::dns::own::OwnResolver;
use ztunnel::flow::proof::Proofs;
use ztunnel::flow::{Limits, Shared};
use ztunnel::identity::{Identities, RootCa};
use ztunnel::state::{Change, OwnType, Reader, TrustBundle, Writer, store};
use ztunnel::telemetry::metrics::Metrics;
use ztunnel::tls::{Trust, WorkloadCert};
use ztunnel::{hbone, outbound, relay, xds};

/// One node with three pods: a and b in the mesh, c not.
pub struct Lab {
    tag: String,
    pub dir: tempfile::TempDir,
}

pub fn sh(script: &str) {
    let output = Command::new("sh").arg("-ec").arg(script).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

pub const PODS: [(&str, u8); 3] = [("a", 1), ("b", 2), ("c", 3)];

impl Lab {
    pub fn new(tag: &str) -> Self {
        let tag = format!("zt{}{tag}", std::process::id());
        let lab = Self { tag, dir: tempfile::tempdir().unwrap() };
        let mut script = format!("ip netns add {0}\n", lab.tag);
        script +=
            &format!("ip netns exec {0} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\n", lab.tag);
        for (pod, n) in PODS {
            let (node, ns) = (&lab.tag, lab.netns(pod));
            script += &format!(
                "ip netns add {ns}; ip -n {ns} link set lo up
                 ip -n {node} link add v{pod} type veth peer name eth0 netns {ns}
                 ip -n {ns} addr add 10.99.0.{n}/32 dev eth0; ip -n {ns} addr add fd99::{n}/128 dev eth0 nodad
                 ip -n {ns} link set eth0 up; ip -n {node} link set v{pod} up
                 ip -n {node} addr add 169.254.1.1/32 dev v{pod}; ip -n {node} addr add fe80::1/64 dev v{pod} nodad
                 ip -n {node} route add 10.99.0.{n}/32 dev v{pod}; ip -n {node} -6 route add fd99::{n}/128 dev v{pod}
                 ip -n {ns} route add 169.254.1.1 dev eth0; ip -n {ns} route add default via 169.254.1.1
                 ip -n {ns} -6 route add default via fe80::1 dev eth0\n"
            );
        }
        sh(&script);
        lab
    }

    pub fn netns(&self, pod: &str) -> String {
        format!("{}{pod}", self.tag)
    }

    /// Runs `work` on a thread inside the pod.
    pub fn within<T: Send + 'static>(
        &self,
        pod: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let path = PathBuf::from("/run/netns").join(self.netns(pod));
        std::thread::spawn(move || {
            let file = std::fs::File::open(path).unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    pub fn pods_file(&self, enrolled: &[&str]) -> PathBuf {
        let mut text = String::new();
        for (pod, n) in PODS {
            let on = enrolled.contains(&pod);
            text += &format!(
                "- {{uid: uid-{pod}, name: {pod}, namespace: shop, serviceAccount: {pod}, netns: /run/netns/{}, ips: [10.99.0.{n}, \"fd99::{n}\"], enrolled: {on}}}\n",
                self.netns(pod)
            );
        }
        self.write_pods(&text)
    }

    /// Replaces the list of pods.
    pub fn write_pods(&self, text: &str) -> PathBuf {
        let (path, fresh) = (self.dir.path().join("pods.yaml"), self.dir.path().join("pods.new"));
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, &path).unwrap();
        path
    }

    /// A certificate of a pod's account, as its node would have it.
    pub fn certificate(&self, pod: &str) -> WorkloadCert {
        signed(self.dir.path(), &format!("spiffe://cluster.local/ns/shop/sa/{pod}").parse().unwrap())
    }

    /// The rules in force in a pod.
    pub fn rules(&self, pod: &str) -> String {
        let output = Command::new("ip").args(["netns", "exec", &self.netns(pod), "nft", "list", "ruleset"]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in PODS.map(|(pod, _)| self.netns(pod)).into_iter().chain([self.tag.clone()]) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

/// The proxy's parts, put together as `app` does it.
pub struct Node {
    pub pods: Pods,
    pub workers: Workers<Worker>,
    writer: Writer,
    pub reader: Reader,
    stop: Arc<Drain>,
    pub runtime: tokio::runtime::Runtime,
    /// Its counters, and what it would send to a collector.
    pub metrics: Arc<Metrics>,
    foreign: Vec<(&'static str, &'static str)>,
    /// Tells of changes of the list.
    watcher: Option<notify::RecommendedWatcher>,
}

/// The authority of a trust domain.
pub fn authority(dir: &Path, domain: &str) -> Authority {
    let name = if domain == "cluster.local" { "ca".to_owned() } else { format!("ca-{domain}") };
    Authority::open(&dir.join(name), now()).unwrap()
}

/// A certificate for `id` by the authority that lies in `dir`.
pub fn signed(dir: &Path, id: &SpiffeId) -> WorkloadCert {
    let authority = Authority::open(&dir.join("ca"), now()).unwrap();
    let asked = request(id).unwrap();
    let chain = authority.sign(&tulle_certs::parse_csr(&asked.csr_pem).unwrap(), id, 3600, now()).unwrap();
    WorkloadCert::new(Issued::parse(&chain, id).unwrap(), asked.key, &Trust::default()).unwrap()
}

pub fn now() -> i64 {
    i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// Sockets of the test's own network.
pub fn own_sockets() -> Arc<PodSockets> {
    let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
    let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    Arc::new(PodSockets::new(netns, NetnsThread::start().unwrap(), options))
}

/// What a test may want otherwise.
#[derive(Default)]
pub struct Setup {
    pub hbone: hbone::Config,
    pub relay: relay::Limits,
    /// How names are answered; not at all.
    pub names: Option<Names>,
    /// Pods of other trust domains than cluster.local, and theirs.
    pub foreign: Vec<(&'static str, &'static str)>,
    /// Workers; two.
    pub workers: Option<usize>,
}

impl Node {
    pub fn start(lab: &Lab, path: PathBuf) -> Self {
        Self::start_with(lab.dir.path(), path, Setup::default())
    }

    /// The same with other settings; the CA lies in `dir`.
    pub fn start_with(dir: &Path, path: PathBuf, setup: Setup) -> Self {
        let Setup { hbone, relay, names, foreign, workers } = setup;
        let _ = (*ztunnel::tls::provider()).clone().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (writer, reader) = store();
        let (trust, place) = (Trust::default(), dir.to_owned());
        let believed = trust.clone();
        let fetch: ztunnel::identity::Fetch = Arc::new(move |id: SpiffeId| {
            let (authority, believed) = (authority(&place, id.trust_domain()), believed.clone());
            Box::pin(async move {
                let asked = request(&id).map_err(|error| error.to_string())?;
                let csr = tulle_certs::parse_csr(&asked.csr_pem).map_err(|error| error.to_string())?;
                let chain = authority.sign(&csr, &id, 3600, now()).map_err(|error| error.to_string())?;
                let issued = Issued::parse(&chain, &id).map_err(|error| error.to_string())?;
                WorkloadCert::new(issued, asked.key, &believed).map_err(|error| error.to_string())
            })
        });
        let identities = Identities::new(fetch, Arc::new(|| now() * 1000));
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = Arc::new(Metrics::new(&mut registry));
        let shared = Shared {
            reader,
            identities: identities.clone(),
            metrics: metrics.clone(),
            hbone,
            relay,
            network: "".into(),
            cluster: "Kubernetes".into(),
            limits: Arc::default(),
            destinations: Arc::default(),
        };
        let context = shared.clone();
        // Nobody answers names outside: what leaves the cluster by name has tests of its own.
        let outside = OwnResolver::new(own_sockets(), Vec::new());
        let own = outbound::Outside { names: outside.clone(), proofs: Arc::new(Proofs::new(RootCa::System)) };
        let workers = Workers::start(workers.unwrap_or(2), move |_| Worker::new(&context, own.clone())).unwrap();
        let watched = shared.reader.clone();
        workers.run_all(move |worker| {
            worker.entered.watch(watched.clone());
            worker.out.live.watch(watched.clone());
        });
        let fence = runtime.block_on(Fence::new(None, None, Arc::default(), shared.reader.clone()));
        let environment = Environment {
            fence,
            kernel: Kernel::default(),
            shared,
            workers,
            netns: NetnsThread::start().unwrap(),
            options: Options { mark: 0x539, keepalive: None, user_timeout: None, reuse_port: true },
            limits: Limits::default(),
            preexisting: Preexisting::Keep,
            trust_domain: "cluster.local".into(),
            names,
            taken: Arc::default(),
            replaced: drain().1,
        };
        let pods = Pods::default();
        let (workers, reader) = (environment.workers.clone(), environment.shared.reader.clone());
        let stop = Arc::new(drain().0);
        runtime.spawn(identities.run(std::future::pending()));
        runtime.spawn(federation::watch(environment.shared.reader.clone(), trust.federated));
        let changed = Arc::default();
        let watcher = watch_directory(&path, Arc::clone(&changed));
        let source = Source::File(ListFile::new(path));
        runtime.spawn(pods.clone().run(Arc::new(environment), source, changed, stop.clone()));
        Self { pods, workers, writer, reader, stop, runtime, metrics, foreign, watcher }
    }

    pub fn describe(&mut self, hbone: &[&str]) {
        self.describe_egress(hbone, &[]);
    }

    /// The same, `denied` pods being in a namespace that may not leave the cluster.
    pub fn describe_egress(&mut self, hbone: &[&str], denied: &[&str]) {
        self.describe_selected(hbone, denied, None);
    }

    /// The same, `selected` naming a pod and the policy that selects it.
    pub fn describe_selected(&mut self, hbone: &[&str], denied: &[&str], selected: Option<(&str, &str)>) {
        let mut changes: Vec<Change> = PODS
            .iter()
            .map(|(pod, n)| {
                let workload = Workload {
                    uid: format!("Kubernetes//Pod/shop/{pod}"),
                    name: (*pod).to_owned(),
                    namespace: "shop".to_owned(),
                    service_account: (*pod).to_owned(),
                    trust_domain: self
                        .foreign
                        .iter()
                        .find(|(of, _)| of == pod)
                        .map(|(_, domain)| (*domain).to_owned())
                        .unwrap_or_default(),
                    addresses: [format!("10.99.0.{n}"), format!("fd99::{n}")]
                        .map(|ip| octets(ip.parse().unwrap()))
                        .to_vec(),
                    tunnel_protocol: i32::from(if hbone.contains(pod) {
                        TunnelProtocol::Hbone
                    } else {
                        TunnelProtocol::None
                    }),
                    extensions: extensions(denied.contains(pod)),
                    authorization_policies: selected
                        .iter()
                        .filter(|(of, _)| of == pod)
                        .map(|(_, policy)| (*policy).to_owned())
                        .collect(),
                    ..Workload::default()
                };
                let bytes = Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec();
                xds::decode::address(&bytes, "v", &mut xds::decode::Strings::default()).unwrap()
            })
            .collect();
        changes.extend([Change::AddressesSynced, Change::PoliciesSynced]);
        self.writer.apply(changes, 0);
    }

    /// Pods come and go, as control would say it: names with accounts and addresses, and names.
    pub fn change(&mut self, come: &[(String, String, IpAddr)], gone: &[String]) {
        let uid = |name: &str| format!("Kubernetes//Pod/shop/{name}");
        let come = come.iter().map(|(name, account, ip)| {
            let workload = Workload {
                uid: uid(name),
                name: name.clone(),
                namespace: "shop".to_owned(),
                service_account: account.clone(),
                addresses: vec![octets(*ip)],
                tunnel_protocol: i32::from(TunnelProtocol::Hbone),
                extensions: extensions(false),
                ..Workload::default()
            };
            let bytes = Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec();
            xds::decode::address(&bytes, "v", &mut xds::decode::Strings::default()).unwrap()
        });
        let gone = gone.iter().map(|name| Change::AddressRemoved(uid(name).into()));
        let synced = [Change::AddressesSynced, Change::PoliciesSynced];
        let changes: Vec<Change> = come.chain(gone).chain(synced).collect();
        self.writer.apply(changes, 0);
    }

    /// Who signs for a trust domain as control says it; `None`: nobody any more.
    pub fn bundle(&mut self, domain: &str, roots: Option<Roots>) {
        let id: Arc<str> = format!("{}{domain}", names::TRUST_BUNDLE).into();
        let change = match roots {
            None => Change::OwnRemoved(OwnType::TrustBundle, id),
            Some(roots) => {
                let (version, trust_domain) = ("v".into(), domain.into());
                Change::TrustBundle(Arc::new(TrustBundle { id, version, trust_domain, roots }))
            }
        };
        self.writer.apply([change], 0);
    }

    /// Denies everybody who is `account`.
    pub fn deny(&mut self, account: &str) {
        self.policy(account, tulle_proto::security::Scope::Namespace);
    }

    /// The policy `shop/no`, which denies everybody who is `account`.
    pub fn policy(&mut self, account: &str, scope: tulle_proto::security::Scope) {
        use tulle_proto::security::{Action, Authorization, Clause, Match, Rule, ServiceAccountMatch};
        let policy = Authorization {
            name: "no".to_owned(),
            namespace: "shop".to_owned(),
            scope: i32::from(scope),
            action: i32::from(Action::Deny),
            rules: vec![Rule {
                clauses: vec![Clause {
                    matches: vec![Match {
                        service_accounts: vec![ServiceAccountMatch {
                            namespace: "shop".to_owned(),
                            service_account: account.to_owned(),
                        }],
                        ..Match::default()
                    }],
                }],
            }],
            ..Authorization::default()
        };
        let policy = xds::decode::authorization(&policy.encode_to_vec(), "shop/no", "v1").unwrap();
        self.writer.apply([Change::Policy(Arc::new(policy))], 0);
    }

    /// Applies what control would have said.
    pub fn apply(&mut self, changes: Vec<Change>) {
        self.writer.apply(changes, 0);
    }

    /// Describes pods in the mesh as endpoints of Services on port 8080: pod and Services; and Services with addresses and
    /// protocols of their port 80.
    pub fn describe_services(&mut self, pods: &[(&str, &[&str])], services: &[(&str, &str, AppProtocol)]) {
        let hostname = |name: &str| format!("{name}.shop.svc.cluster.local");
        let port = |app_protocol| Port { service_port: 80, target_port: 8080, app_protocol: i32::from(app_protocol) };
        let mut addresses: Vec<Type> = Vec::new();
        for (pod, of) in pods {
            let n = PODS.iter().find(|(name, _)| name == pod).unwrap().1;
            let ports = PortList { ports: vec![port(AppProtocol::Unknown)] };
            addresses.push(Type::Workload(Workload {
                uid: format!("Kubernetes//Pod/shop/{pod}"),
                name: (*pod).to_owned(),
                namespace: "shop".to_owned(),
                service_account: (*pod).to_owned(),
                addresses: [format!("10.99.0.{n}"), format!("fd99::{n}")]
                    .map(|ip| octets(ip.parse().unwrap()))
                    .to_vec(),
                tunnel_protocol: i32::from(TunnelProtocol::Hbone),
                extensions: extensions(false),
                services: of.iter().map(|name| (format!("shop/{}", hostname(name)), ports.clone())).collect(),
                ..Workload::default()
            }));
        }
        for (name, vip, protocol) in services {
            let address = NetworkAddress { address: octets(vip.parse().unwrap()), ..NetworkAddress::default() };
            addresses.push(Type::Service(Service {
                name: (*name).to_owned(),
                namespace: "shop".to_owned(),
                hostname: hostname(name),
                addresses: vec![address],
                ports: vec![port(*protocol)],
                canonical: true,
                ..Service::default()
            }));
        }
        let strings = &mut xds::decode::Strings::default();
        let mut changes: Vec<Change> = addresses
            .into_iter()
            .map(|address| {
                let bytes = Address { r#type: Some(address) }.encode_to_vec();
                xds::decode::address(&bytes, "v", strings).unwrap()
            })
            .collect();
        changes.extend([Change::AddressesSynced, Change::PoliciesSynced]);
        self.writer.apply(changes, 0);
    }

    pub fn wait(&self, states: &[(&str, &str)]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.pods.status();
            let is =
                |(pod, state): &(&str, &str)| status.iter().any(|entry| entry.name == *pod && entry.capture == *state);
            if states.iter().all(is) {
                return;
            }
            assert!(Instant::now() < deadline, "not {states:?} but {status:#?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _enter = self.runtime.enter();
        self.stop.advance(Phase::Forced);
    }
}

fn extensions(deny: bool) -> Vec<tulle_proto::workload::Extension> {
    let egress = if deny { EgressMode::Deny } else { EgressMode::Allow };
    let info = WorkloadInfo { egress: i32::from(egress), ..WorkloadInfo::default() };
    let config = Any { type_url: names::TYPE_WORKLOAD_INFO.to_owned(), value: info.encode_to_vec() };
    vec![Extension { name: names::EXTENSION_WORKLOAD.to_owned(), config: Some(config) }]
}

fn octets(ip: IpAddr) -> prost::bytes::Bytes {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// A server that greets with the client's address and echoes.
pub fn serve(listener: TcpListener) {
    for tcp in listener.incoming() {
        let mut tcp = tcp.unwrap();
        std::thread::spawn(move || {
            let peer = tcp.peer_addr().unwrap().ip().to_canonical();
            writeln!(tcp, "{peer}").unwrap();
            let mut buffer = [0; 65_536];
            while let Ok(read @ 1..) = tcp.read(&mut buffer) {
                if tcp.write_all(&buffer[..read]).is_err() {
                    return;
                }
            }
        });
    }
}

/// Connects, reads the greeting, and echoes `bytes`.
pub fn talk(to: &str, bytes: usize) -> std::io::Result<String> {
    let to: SocketAddr = to.parse().unwrap();
    let mut tcp = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
    let greeting = greeting(&mut tcp)?;
    let mut writer = tcp.try_clone()?;
    let sender = std::thread::spawn(move || {
        let _ = writer.write_all(&vec![b'x'; bytes]);
        let _ = writer.shutdown(std::net::Shutdown::Write);
    });
    let mut back = Vec::new();
    tcp.read_to_end(&mut back)?;
    sender.join().unwrap();
    assert_eq!(back.len(), bytes);
    Ok(greeting)
}

/// The server's first line, which may come in pieces.
pub fn greeting(tcp: &mut TcpStream) -> std::io::Result<String> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        tcp.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8(line).unwrap().trim().to_owned())
}

/// Waits until the pods' inbound connections are as many as wanted.
pub fn await_inbound(node: &Node, wanted: usize, patience: Duration) {
    let deadline = Instant::now() + patience;
    while node.pods.connections().0 != wanted {
        assert!(Instant::now() < deadline, "{:?} connections, not {wanted}", node.pods.connections());
        std::thread::sleep(Duration::from_millis(5));
    }
}
