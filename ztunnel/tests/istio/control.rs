//! Promise: under an istiod and its CA, configured by Istio's own variables, the program does what Istio's ztunnel does: who
//! it says it is, what it asks for, what it acknowledges, what it says after a reconnect, and that traffic needs neither.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use tulle_proto::discovery::DeltaDiscoveryRequest;
use tulle_proto::names::{TYPE_ADDRESS, TYPE_AUTHORIZATION};
use tulle_proto::workload::Workload;
use tulle_proto::workload::address::Type;

use crate::istiod::{Headers, Istiod, Told};
use crate::node::{Lab, talk};
use crate::{CALL, CART, application, cart, id, ip, only, pod};

const PATIENCE: Duration = Duration::from_secs(30);

/// The program as the node agent of an Istio starts it.
struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    fn start(lab: &Lab, istiod: &Istiod) -> Self {
        let (dir, log) = (lab.dir.path(), lab.dir.path().join("log"));
        let url = format!("https://localhost:{}", istiod.port);
        let root = dir.join("ca/root-cert.pem");
        let output = std::fs::File::create(&log).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &lab.netns(""), env!("CARGO_BIN_EXE_ztunnel")])
            .env("XDS_ADDRESS", &url)
            .env("CA_ADDRESS", &url)
            .env("XDS_ROOT_CA", &root)
            .env("CA_ROOT_CA", &root)
            .env("AUTH_TOKEN", dir.join("token"))
            .env("NODE_NAME", "node-1")
            .env("POD_NAME", "ztunnel-x")
            .env("POD_NAMESPACE", "istio-system")
            .env("SERVICE_ACCOUNT", "ztunnel")
            .env("INSTANCE_IP", "10.0.0.9")
            .env("CLUSTER_ID", "c1")
            .env("PROXY_MODE", "shared")
            .env("IPV6_ENABLED", "true")
            .env("ISTIO_META_DNS_CAPTURE", "false")
            .env("ISTIO_META_CLUSTER_ID", "c1")
            .env("ISTIO_METAJSON_LABELS", r#"{"app":"ztunnel"}"#)
            .env("XDS_HEADER_X-TEAM", "discovery")
            .env("CA_HEADER_X-TEAM", "certificates")
            .env("TERMINATION_GRACE_PERIOD_SECONDS", "30")
            .env("TULLE_PODS", lab.pods_file(&["a", "b"]))
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until something holds.
    fn until(&self, what: &str, mut holds: impl FnMut() -> Result<(), String>) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(last) = holds() {
            assert!(Instant::now() < deadline, "not {what}: {last}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A page of the proxy's, and its status line.
fn page(lab: &Lab, port: u16, path: &'static str) -> Result<(String, String), String> {
    let get = move || -> std::io::Result<String> {
        let mut tcp = TcpStream::connect(("127.0.0.1", port))?;
        write!(tcp, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        tcp.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = lab.within("", get).join().unwrap().map_err(|error| error.to_string())?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no head")?;
    Ok((head.lines().next().unwrap_or_default().to_owned(), body.to_owned()))
}

fn call(lab: &Lab, bytes: usize) -> std::io::Result<String> {
    lab.within("a", move || talk(CALL, bytes)).join().unwrap()
}

fn first<'a>(told: &'a Told, kind: &str) -> &'a DeltaDiscoveryRequest {
    told.requests.iter().find(|request| request.type_url == kind).unwrap()
}

fn header<'a>(headers: &'a Headers, name: &str) -> &'a str {
    headers.get(name).map_or("", String::as_str)
}

fn pods() -> Vec<Type> {
    let described = |name: &str| Workload {
        uid: format!("c1//Pod/shop/{name}"),
        cluster_id: "c1".to_owned(),
        node: "node-1".to_owned(),
        ..pod(name)
    };
    ["a", "b", "c"].map(|name| Type::Workload(described(name))).to_vec()
}

#[test]
fn the_program_is_at_home_under_an_istiod() {
    let lab = Lab::new("d");
    crate::node::sh(&format!("ip -n {} link set lo up", lab.netns("")));
    application(&lab);
    std::fs::write(lab.dir.path().join("token"), "one\n").unwrap();
    let istiod = Istiod::start(&lab);
    istiod.addresses(pods());
    istiod.addresses(vec![Type::Service(cart())]);
    let program = Program::start(&lab, &istiod);
    program.until("ready", || match page(&lab, 15021, "/healthz/ready")? {
        (status, _) if status.contains("200") => Ok(()),
        (status, body) => Err(format!("{status}: {body}")),
    });
    // A request that failed (the istiod was not there yet) is repeated, and until then connections are refused.
    program.until("certificates of both", || {
        let (_, dump) = page(&lab, 15000, "/config_dump")?;
        let there = dump.replace(' ', "").matches("\"state\":\"Available\"").count();
        if there == 2 { Ok(()) } else { Err(format!("{there}: {dump}")) }
    });
    assert_eq!(call(&lab, 1_000_000).unwrap_or_else(|error| panic!("{error}\n{}", program.log())), ip("a"));
    program.until("recorded with both identities", || {
        let both = [format!("src.identity={}", id("a")), format!("dst.identity={}", id("b"))];
        let log = program.log().replace('"', "");
        let found = ["inbound", "outbound"].iter().all(|way| {
            let way = format!("direction={way}");
            log.lines().any(|line| line.contains(&way) && both.iter().all(|one| line.contains(one)))
        });
        if found { Ok(()) } else { Err("no such lines".to_owned()) }
    });

    // Who it says it is, and what it asks for.
    let streams = istiod.streams();
    let [told] = &streams[..] else { panic!("{} streams", streams.len()) };
    for (name, value) in [("authorization", "Bearer one"), ("clusterid", "c1"), ("x-team", "discovery")] {
        assert_eq!(header(&told.headers, name), value, "{name}");
    }
    let node = told.requests[0].node.as_ref().unwrap();
    assert_eq!(node.id, "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local");
    let metadata = format!("{:?}", node.metadata);
    for key in ["NODE_NAME", "NAMESPACE", "INSTANCE_IPS", "NAME", "CLUSTER_ID", "DNS_CAPTURE", "LABELS"] {
        assert!(metadata.contains(&format!("{key:?}")), "{key}: {metadata}");
    }
    for kind in [TYPE_ADDRESS, TYPE_AUTHORIZATION] {
        let request = first(told, kind);
        assert!(request.resource_names_subscribe.is_empty() && request.initial_resource_versions.is_empty());
    }
    let foreign =
        told.requests.iter().find(|request| ![TYPE_ADDRESS, TYPE_AUTHORIZATION].contains(&&*request.type_url));
    assert!(foreign.is_none(), "who does not offer our own types is not asked for them: {foreign:?}");
    let acknowledged: Vec<_> = told.requests.iter().filter(|request| !request.response_nonce.is_empty()).collect();
    assert!(acknowledged.len() >= 2 && acknowledged.iter().all(|request| request.error_detail.is_none()));

    // Certificates: one for each account that has a pod here, asked for in its name.
    let asked = istiod.asked();
    for account in ["a", "b"] {
        let own: Vec<_> = asked.iter().filter(|one| one.impersonated == Some(id(account))).collect();
        let [one] = &own[..] else { panic!("{account}: {asked:?}") };
        assert_eq!((&*one.identity, one.validity), (&*id(account), 86_400));
        assert_eq!((header(&one.headers, "authorization"), header(&one.headers, "clusterid")), ("Bearer one", "c1"));
        assert_eq!(header(&one.headers, "x-team"), "certificates");
    }
    assert_eq!(asked.len(), 2, "and for nobody else: {asked:?}");

    // Policies come and go, and what cannot be read is refused by name.
    istiod.policy(&only("x"));
    program.until("refused", || call(&lab, 1).map_or(Ok(()), Err));
    istiod.remove(TYPE_AUTHORIZATION, "shop/only");
    program.until("allowed again", || call(&lab, 1).map(drop).map_err(|error| error.to_string()));
    istiod.broken(TYPE_ADDRESS, "c1//Pod/shop/broken");
    program.until("refused by name", || {
        let told = istiod.streams().pop().unwrap();
        let refused = told.requests.iter().filter_map(|request| request.error_detail.as_ref());
        let named = refused.into_iter().any(|error| error.message.contains("c1//Pod/shop/broken"));
        if named { Ok(()) } else { Err("no refusal names it".to_owned()) }
    });

    // Another istiod: the token is read anew, and everything that is known is told, so that what is gone is noticed.
    std::fs::write(lab.dir.path().join("token"), "two\n").unwrap();
    istiod.hang_up_without(&[(TYPE_ADDRESS, "c1//Pod/shop/c")]);
    program.until("back", || match istiod.streams().get(1) {
        Some(told) if told.requests.iter().any(|request| request.type_url == TYPE_ADDRESS) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let told = istiod.streams().remove(1);
    assert_eq!(header(&told.headers, "authorization"), "Bearer two");
    let has = &first(&told, TYPE_ADDRESS).initial_resource_versions;
    let names: Vec<_> = has.keys().map(String::as_str).collect();
    let service = format!("shop/{CART}");
    let pods = ["a", "b", "c"].map(|name| format!("c1//Pod/shop/{name}"));
    assert_eq!(names, [&pods[0], &pods[1], "c1//Pod/shop/broken", &pods[2], &service], "all of them");
    let unread: Vec<_> = has.iter().filter(|(_, version)| version.is_empty()).map(|(name, _)| name).collect();
    assert_eq!(unread, ["c1//Pod/shop/broken"], "what was refused is asked for again, or taken back");
    program.until("noticed as gone", || {
        let (_, dump) = page(&lab, 15000, "/config_dump")?;
        if dump.contains(&pods[1]) && !dump.contains(&pods[2]) { Ok(()) } else { Err(dump) }
    });

    drop(istiod);
    assert_eq!(call(&lab, 100_000).unwrap(), ip("a"), "traffic goes on without control");
}
