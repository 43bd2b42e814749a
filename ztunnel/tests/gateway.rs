//! An egress gateway in a network namespace, with real tunnels, a name server and a host outside, but without control: what
//! it lets out, by which address, and what it refuses although a peer asks for it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use node::{Lab, serve};
use prost::Message as _;
use tokio::task::LocalSet;
use tulle_certs::SpiffeId;
use tulle_proto::names;
use tulle_proto::tulle_workload::{EgressMode, WorkloadInfo};
use tulle_proto::workload::address::Type;
use tulle_proto::workload::{Address, Extension, TunnelProtocol, Workload};
use ztunnel::base::budget::Budget;
use ztunnel::base::drain::drain;
use ztunnel::base::netns::{Netns, NetnsThread};
use ztunnel::base::sockets::{Options, PodSockets};
use ztunnel::dns::own::OwnResolver;
use ztunnel::flow::proof::Proofs;
use ztunnel::flow::{Limits, LocalPod, PodName, Shared};
use ztunnel::gateway::clients::ClientCertificates;
use ztunnel::gateway::limits::{HostLimits, Hosts};
use ztunnel::gateway::originate::Originator;
use ztunnel::gateway::{Gateway, recheck};
use ztunnel::hbone::client::{Dialer, Patience};
use ztunnel::hbone::headers::connect_request;
use ztunnel::hbone::pool::{Key, Pool};
use ztunnel::identity::{Identities, RootCa};
use ztunnel::state::{
    Change, EgressPolicy, EgressPort, EgressProtocol, EgressRule, HostPattern, ServiceName, Writer, store,
};
use ztunnel::telemetry::metrics::Metrics;
use ztunnel::{hbone, relay, xds};

const PORT: u16 = 15008;

fn sockets(netns: &str) -> Arc<PodSockets> {
    let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: true };
    let netns = Netns::open(Path::new(netns)).unwrap();
    Arc::new(PodSockets::new(netns, NetnsThread::start().unwrap(), options))
}

/// A name server on loopback that answers every A question with `address`, and everything else with nothing.
fn name_server(address: [u8; 4]) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((size, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..size].to_vec();
            answer[2] |= 0x80;
            if answer[size - 3] == 1 {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    at
}

/// What the gateway knows: pod a, whose namespace is closed, with the policies `named`, and pod b, which is open.
fn describe(writer: &mut Writer, named: &[&str]) {
    let workload = |pod: &str, ip: [u8; 4], info: WorkloadInfo| {
        let config = prost_types::Any { type_url: names::TYPE_WORKLOAD_INFO.to_owned(), value: info.encode_to_vec() };
        let workload = Workload {
            uid: format!("Kubernetes//Pod/shop/{pod}"),
            name: pod.to_owned(),
            namespace: "shop".to_owned(),
            service_account: pod.to_owned(),
            addresses: vec![ip.to_vec().into()],
            tunnel_protocol: i32::from(TunnelProtocol::Hbone),
            extensions: vec![Extension { name: names::EXTENSION_WORKLOAD.to_owned(), config: Some(config) }],
            ..Workload::default()
        };
        let bytes = Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec();
        xds::decode::address(&bytes, "v", &mut xds::decode::Strings::default()).unwrap()
    };
    let closed = WorkloadInfo {
        egress: i32::from(EgressMode::Deny),
        egress_policies: named.iter().map(|name| (*name).to_owned()).collect(),
        ..WorkloadInfo::default()
    };
    let changes = [
        workload("a", [10, 99, 0, 1], closed),
        workload("b", [10, 99, 0, 2], WorkloadInfo::default()),
        Change::AddressesSynced,
        Change::PoliciesSynced,
    ];
    writer.apply(changes, 0);
}

/// Lets `host` out at port 9000, through `gateway` and into `cidrs`.
fn policy(name: &str, host: &str, gateway: Option<&str>, cidrs: &[&str]) -> Change {
    let mut policy = EgressPolicy::allows_nothing(&format!("EgressPolicy/shop/{name}").into(), &"1".into(), false, "");
    policy.unreadable = None;
    policy.rules = vec![EgressRule {
        hosts: vec![HostPattern::Exact(host.into())],
        cidrs: cidrs.iter().map(|net| net.parse().unwrap()).collect(),
        ports: vec![EgressPort { number: 9000, protocol: EgressProtocol::Bytes, target: 9000 }],
        gateway: gateway.map(service),
        ..EgressRule::default()
    }];
    Change::EgressPolicy(Arc::new(policy))
}

fn service(name: &str) -> ServiceName {
    ServiceName { namespace: "egress".into(), hostname: format!("{name}.egress.svc.cluster.local").into() }
}

/// Starts the gateway in pod b's namespace, on a thread of its own; it lives as long as the test.
fn start(lab: &Lab, reader: ztunnel::state::Reader) {
    let (place, netns) = (lab.dir.path().to_owned(), format!("/run/netns/{}", lab.netns("b")));
    let (ready, listens) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async move {
            let identity: SpiffeId = "spiffe://cluster.local/ns/egress/sa/out".parse().unwrap();
            let fetch: ztunnel::identity::Fetch = Arc::new(move |id: SpiffeId| {
                let place = place.clone();
                Box::pin(async move { Ok(node::signed(&place, &id)) })
            });
            let identities = Identities::new(fetch, Arc::new(|| node::now() * 1000));
            tokio::spawn(identities.clone().run(std::future::pending()));
            let mut registry = prometheus_client::registry::Registry::default();
            let (_drain, drained) = drain();
            let sockets = sockets(&netns);
            let listener = sockets.listen(PORT).await.unwrap();
            let name = PodName { uid: "", name: "out", namespace: "egress", service_account: "out", cluster: "" };
            let names = OwnResolver::new(node::own_sockets(), vec![name_server([10, 99, 0, 3])]);
            let gateway = Arc::new(Gateway {
                shared: Shared {
                    reader: reader.clone(),
                    identities,
                    metrics: Arc::new(Metrics::new(&mut registry)),
                    hbone: hbone::Config::default(),
                    relay: relay::Limits::default(),
                    network: "".into(),
                    cluster: "".into(),
                    limits: Arc::default(),
                    destinations: Arc::default(),
                },
                pod: Arc::new(LocalPod::new(name, Vec::new(), sockets, drained, Limits::default())),
                identity,
                service: Arc::new(service("out")),
                from: Vec::new(),
                names,
                hosts: Hosts::new(HostLimits { connections: 1, rate: 0 }),
                tls: Originator::new(RootCa::System, ClientCertificates::new(None)),
                proofs: Proofs::new(RootCa::System),
            });
            let live = recheck::live();
            live.watch(reader);
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            ready.send(()).unwrap();
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::task::spawn_local(ztunnel::gateway::serve(gateway.clone(), live.clone(), tcp));
            }
        });
    });
    listens.recv_timeout(Duration::from_secs(30)).unwrap();
}

/// A stream through the gateway, opened from pod a with the certificate of `account`.
struct Asked {
    status: u16,
    /// What `ping` was answered with.
    answer: String,
    body: h2::RecvStream,
    _send: h2::SendStream<Bytes>,
    _lease: hbone::pool::Lease,
}

async fn ask(lab: &Lab, pool: &Pool, account: &str, target: &str) -> Asked {
    let cert = Arc::new(lab.certificate(account));
    let key = Key {
        source: cert.identity.clone(),
        pod: "a".into(),
        expected: ["spiffe://cluster.local/ns/egress/sa/out".parse().unwrap()].into(),
        address: SocketAddr::from(([10, 99, 0, 2], PORT)),
        beyond: None,
        keepalive: None,
    };
    let patience = Patience { connect: Duration::from_secs(30), refused: Duration::ZERO };
    let sockets = sockets(&format!("/run/netns/{}", lab.netns("a")));
    let dialer = Dialer { sockets, cert, budget: Budget::new(1 << 20), patience };
    let request = connect_request(target, http::HeaderMap::new()).unwrap();
    let opened = pool.open(&key, &dialer, &request).await.unwrap();
    let (mut send, lease) = (opened.send, opened.lease);
    let response = tokio::time::timeout(Duration::from_secs(30), opened.response).await.unwrap().unwrap();
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut answer = String::new();
    if status == 200 {
        send.send_data(Bytes::from_static(b"ping"), false).unwrap();
        while !answer.ends_with("ping") {
            let data = tokio::time::timeout(Duration::from_secs(30), body.data()).await.unwrap();
            answer.push_str(std::str::from_utf8(&data.unwrap().unwrap()).unwrap());
        }
    }
    Asked { status, answer, body, _send: send, _lease: lease }
}

/// The same once the place of the connection before is free, which takes the gateway a moment.
async fn ask_when_free(lab: &Lab, pool: &Pool, account: &str, target: &str) -> Asked {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let asked = ask(lab, pool, account, target).await;
        if asked.status != 503 || Instant::now() >= deadline {
            return asked;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn what_a_peer_may_ask_for_is_what_its_own_policies_send_through_this_gateway() {
    let lab = Lab::new("gw");
    // It says from which address it is called.
    let listener = lab.within("c", || TcpListener::bind("0.0.0.0:9000").unwrap()).join().unwrap();
    std::thread::spawn(move || serve(listener));
    let (mut writer, reader) = store();
    start(&lab, reader);
    let named = ["EgressPolicy/shop/api", "EgressPolicy/shop/direct", "EgressPolicy/shop/inside"];
    writer.apply(
        [
            policy("api", "api.example.test", Some("out"), &["10.99.0.3/32"]),
            policy("direct", "direct.example.test", None, &["10.99.0.3/32"]),
            policy("inside", "inside.example.test", Some("out"), &[]),
            policy("other", "other.example.test", Some("out"), &["10.99.0.3/32"]),
        ],
        0,
    );
    describe(&mut writer, &named);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let pool = Pool::new(hbone::Config::default());
        let allowed = 200;
        for (what, account, target, expected) in [
            ("the rule's host", "a", "api.example.test:9000", allowed),
            ("in other letters", "a", "API.Example.test.:9000", allowed),
            ("another port", "a", "api.example.test:9001", 403),
            ("a host of the rules that leaves from the node", "a", "direct.example.test:9000", 403),
            ("a host of a policy that is not the pod's", "a", "other.example.test:9000", 403),
            ("a name that leads inside", "a", "inside.example.test:9000", 403),
            ("a host of no rule", "a", "evil.example.test:9000", 403),
            ("an address that the rule's cidrs cover", "a", "10.99.0.3:9000", allowed),
            ("an address of no rule", "a", "203.0.113.1:9000", 403),
            ("another account's certificate", "c", "api.example.test:9000", 403),
        ] {
            let asked = ask_when_free(&lab, &pool, account, target).await;
            assert_eq!(asked.status, expected, "{what}");
            if expected == allowed {
                assert!(asked.answer.contains("10.99.0.2"), "{what}: the host saw {:?}", asked.answer);
            }
            drop(asked);
        }

        // One host has so many connections.
        let mut kept = ask_when_free(&lab, &pool, "a", "api.example.test:9000").await;
        assert_eq!((kept.status, ask(&lab, &pool, "a", "api.example.test:9000").await.status), (allowed, 503));

        // A live connection ends with the rule that let it out.
        describe(&mut writer, &named[1..]);
        let ended = tokio::time::timeout(Duration::from_secs(30), kept.body.data()).await.unwrap();
        assert!(matches!(ended, Some(Err(_))), "it went on: {ended:?}");
        assert_eq!(ask(&lab, &pool, "a", "api.example.test:9000").await.status, 403);
    });
}
