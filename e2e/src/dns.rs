//! The node's small DNS server: names of Services and of their pods, and nothing else.
//!
//! It stands in for the cluster's DNS, so it answers as Kubernetes specifies: a Service's addresses, a headless
//! Service's ready pods, `<pod>.<service>` for each of them, and no error but an empty answer when a name exists without
//! the asked type. It is also what the DNS proxy's answers are compared with. Limits: one stream at a time; A, AAAA, SRV, PTR
//! and CNAME; it forwards nothing.

use std::collections::BTreeMap;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hickory_proto::op::Edns;
use hickory_proto::op::Message;
use hickory_proto::op::OpCode;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;
use hickory_proto::rr::RData;
use hickory_proto::rr::Record;
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::rdata::AAAA;
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::rdata::SRV;
use tulle_proto::names;

use crate::address::Pair;
use crate::netns::NetNs;
use crate::services::Service;
use crate::services::ServicePod;

/// Questions that may wait, in bytes as the kernel counts: as many as the proxy's own name server takes.
const WAITING: usize = 1 << 20;
/// How often threads look whether they should stop.
const LOOK: Duration = Duration::from_millis(500);
/// Short, because addresses of headless Services change within a test.
const TTL_S: u32 = 2;
/// Datagram that a client without EDNS takes, bytes.
const LIMIT_PLAIN: usize = 512;
/// Datagram that this server takes, bytes.
const LIMIT_EDNS: u16 = 1232;

/// What one name stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
    alias: Option<String>,
    /// Weight, port and name of each server.
    servers: Vec<(u16, u16, String)>,
    /// Name of an address.
    owner: Option<String>,
}

/// All names, in lower case and without the final dot.
pub type Zone = BTreeMap<String, Entry>;

/// The names that follow from Services, and hosts outside by a name of their own.
pub fn zone(services: &[Service], hosts: &[(String, Pair)]) -> Zone {
    let mut zone = Zone::new();
    for service in services {
        let (namespace, name) = &service.key;
        let fqdn = format!("{name}.{namespace}.svc.{}", names::DEFAULT_DOMAIN).to_lowercase();
        if let Some(external) = &service.external {
            zone.entry(fqdn).or_default().alias = Some(external.clone());
            continue;
        }
        let endpoints = endpoints(service, &fqdn);
        for (name, address) in &endpoints {
            add(&mut zone, name, *address);
        }
        for pod in service.pods.iter().filter(|_| service.addresses.is_none()) {
            for address in pod.pair.both() {
                add(&mut zone, &format!("{}.{fqdn}", pod.name), address);
                add(&mut zone, &fqdn, address);
            }
        }
        for pod in &service.pods {
            let Some(label) = &pod.label else { continue };
            for address in pod.pair.both() {
                zone.entry(reverse(address)).or_default().owner = Some(format!("{label}.{fqdn}"));
            }
        }
        for address in service.addresses.iter().flat_map(|pair| pair.both()) {
            add(&mut zone, &fqdn, address);
            zone.entry(reverse(address)).or_default().owner = Some(fqdn.clone());
        }
        servers(&mut zone, service, &fqdn);
    }
    for (name, pair) in hosts {
        for address in pair.both() {
            add(&mut zone, &name.to_lowercase(), address);
        }
    }
    zone
}

/// Names with their addresses, and nothing else.
pub fn plain(names: impl IntoIterator<Item = (String, IpAddr)>) -> Zone {
    let mut zone = Zone::new();
    names.into_iter().for_each(|(name, address)| add(&mut zone, &name, address));
    zone
}

fn add(zone: &mut Zone, name: &str, address: IpAddr) {
    let entry = zone.entry(name.to_lowercase()).or_default();
    match address {
        IpAddr::V4(v4) if !entry.v4.contains(&v4) => entry.v4.push(v4),
        IpAddr::V6(v6) if !entry.v6.contains(&v6) => entry.v6.push(v6),
        _ => {}
    }
}

/// Every address behind a Service with its own name below the Service's.
fn endpoints(service: &Service, fqdn: &str) -> Vec<(String, IpAddr)> {
    let of = |pod: &ServicePod, address: IpAddr| {
        let label = pod.label.clone().unwrap_or_else(|| address.to_string().replace(['.', ':'], "-"));
        (format!("{label}.{fqdn}"), address)
    };
    service.pods.iter().flat_map(|pod| pod.pair.both().map(|address| of(pod, address))).collect()
}

/// SRV records of each named port, and of all ports together, with a hundred shared among their entries as CoreDNS does.
fn servers(zone: &mut Zone, service: &Service, fqdn: &str) {
    let mut all: Vec<(u16, String)> = Vec::new();
    for port in &service.ports {
        let own: Vec<(u16, String)> = match service.addresses {
            Some(pair) => pair.both().into_iter().map(|_| (port.port, fqdn.to_owned())).collect(),
            None => endpoints(service, fqdn)
                .into_iter()
                .filter_map(|(name, address)| {
                    let member = port.endpoints.iter().find(|member| member.pair.both().contains(&address))?;
                    Some((member.port, name))
                })
                .collect(),
        };
        if !port.name.is_empty() {
            let protocol = if port.tcp { "tcp" } else { "udp" };
            share(zone, format!("_{}._{protocol}.{fqdn}", port.name).to_lowercase(), &own);
        }
        all.extend(own);
    }
    share(zone, fqdn.to_owned(), &all);
}

fn share(zone: &mut Zone, name: String, servers: &[(u16, String)]) {
    if servers.is_empty() {
        return;
    }
    let weight = u16::try_from(100 / servers.len()).unwrap_or(1).max(1);
    let entry = zone.entry(name).or_default();
    for (port, target) in servers {
        let server = (weight, *port, target.clone());
        if !entry.servers.contains(&server) {
            entry.servers.push(server);
        }
    }
}

/// The name under which an address is looked up.
fn reverse(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(v6) => {
            let digits: String =
                v6.octets().iter().rev().map(|byte| format!("{:x}.{:x}.", byte & 15, byte >> 4)).collect();
            format!("{digits}ip6.arpa")
        }
    }
}

/// The answer to one message; none = not a question worth answering. `limit`: as many bytes as the client's way back takes.
pub fn answer(zone: &Zone, message: &[u8], stream: bool) -> Option<Vec<u8>> {
    let request = Message::from_vec(message).ok()?;
    let query = request.queries.first()?.clone();
    let mut response = Message::response(request.metadata.id, OpCode::Query);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.authoritative = true;
    response.add_query(query.clone());
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(LIMIT_EDNS);
        response.set_edns(edns);
    }
    let asked = query.name().to_string().to_lowercase();
    let asked = asked.trim_end_matches('.');
    let (mut entry, mut owner) = match zone.get(asked).cloned().or_else(|| pod_entry(asked)) {
        Some(entry) => (entry, query.name().clone()),
        None => {
            response.metadata.response_code = ResponseCode::NXDomain;
            (Entry::default(), query.name().clone())
        }
    };
    if let Some(alias) = entry.alias.clone() {
        let target = Name::from_utf8(&alias).ok()?;
        response.add_answer(Record::from_rdata(owner, TTL_S, RData::CNAME(CNAME(target.clone()))));
        entry = zone.get(&alias).cloned().unwrap_or_default();
        owner = target;
    }
    for data in records(&entry, query.query_type()) {
        response.add_answer(Record::from_rdata(owner.clone(), TTL_S, data));
    }
    if response.answers.is_empty() {
        let name = |text: &str| Name::from_utf8(text).ok();
        let soa =
            SOA::new(name("ns.dns.cluster.local.")?, name("hostmaster.cluster.local.")?, 1, 7200, 1800, 86_400, TTL_S);
        response.add_authority(Record::from_rdata(name("cluster.local.")?, TTL_S, RData::SOA(soa)));
    }
    let payload = request.edns.as_ref().map_or(LIMIT_PLAIN, |edns| usize::from(edns.max_payload()).max(LIMIT_PLAIN));
    let mut bytes = response.to_vec().ok()?;
    while !stream && bytes.len() > payload && !response.answers.is_empty() {
        response.metadata.truncation = true;
        response.answers.pop();
        bytes = response.to_vec().ok()?;
    }
    Some(bytes)
}

/// `10-0-1-5.<namespace>.pod`, whether there is such a pod or not, as kubeadm's CoreDNS answers.
fn pod_entry(name: &str) -> Option<Entry> {
    let (label, _) = name.strip_suffix(&format!(".pod.{}", names::DEFAULT_DOMAIN))?.split_once('.')?;
    let mut entry = Entry::default();
    match label.replace('-', ".").parse() {
        Ok(v4) => entry.v4.push(v4),
        Err(_) => entry.v6.push(label.replace('-', ":").parse().ok()?),
    }
    Some(entry)
}

fn records(entry: &Entry, kind: RecordType) -> Vec<RData> {
    match kind {
        RecordType::A => entry.v4.iter().map(|address| RData::A(A(*address))).collect(),
        RecordType::AAAA => entry.v6.iter().map(|address| RData::AAAA(AAAA(*address))).collect(),
        RecordType::SRV => {
            let server = |(weight, port, target): &(u16, u16, String)| {
                Some(RData::SRV(SRV::new(0, *weight, *port, Name::from_utf8(format!("{target}.")).ok()?)))
            };
            entry.servers.iter().filter_map(server).collect()
        }
        RecordType::PTR => {
            let owner = entry.owner.iter().filter_map(|owner| Name::from_utf8(format!("{owner}.")).ok());
            owner.map(|owner| RData::PTR(PTR(owner))).collect()
        }
        _ => vec![],
    }
}

/// A node's server; it stops when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
}

impl Server {
    /// Starts answering on port 53 of `addresses`, inside `netns`. Fails when the port cannot be bound.
    pub fn start(netns: &NetNs, addresses: Pair, zone: Arc<RwLock<Zone>>) -> anyhow::Result<Self> {
        Self::bound(&addresses.both(), zone, |address| netns.run(|| bind(address))?)
    }

    /// The same where the caller is.
    pub fn here(address: IpAddr, zone: Arc<RwLock<Zone>>) -> anyhow::Result<Self> {
        Self::bound(&[address], zone, bind)
    }

    fn bound(
        addresses: &[IpAddr],
        zone: Arc<RwLock<Zone>>,
        bind: impl Fn(IpAddr) -> io::Result<(UdpSocket, TcpListener)>,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for &address in addresses {
            let (socket, listener) = bind(address)?;
            let (shared, end) = (zone.clone(), stop.clone());
            std::thread::Builder::new().name(format!("dns {address}")).spawn(move || serve(&socket, &shared, &end))?;
            let (shared, end) = (zone.clone(), stop.clone());
            std::thread::Builder::new().name(format!("dns {address}")).spawn(move || {
                serve_streams(&listener, &shared, &end);
            })?;
        }
        Ok(Self { stop })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn bind(address: IpAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("DNS server on {address}: {error}"));
    let socket = UdpSocket::bind(SocketAddr::new(address, 53)).map_err(named)?;
    // A burst that is lost would look like the mesh's fault. Without the privilege the usual size has to do.
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &WAITING);
    // So that the thread sees that it should stop.
    socket.set_read_timeout(Some(LOOK))?;
    let listener = TcpListener::bind(SocketAddr::new(address, 53)).map_err(named)?;
    // Accepted sockets do not inherit it; the listener itself must wake up.
    socket2::SockRef::from(&listener).set_read_timeout(Some(LOOK))?;
    Ok((socket, listener))
}

fn serve_streams(listener: &TcpListener, zone: &RwLock<Zone>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((mut stream, _)) = listener.accept() else { continue };
        let _ = stream.set_read_timeout(Some(LOOK));
        let mut length = [0; 2];
        while stream.read_exact(&mut length).is_ok() {
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            let response = stream
                .read_exact(&mut message)
                .ok()
                .and_then(|()| zone.read().ok().and_then(|zone| answer(&zone, &message, true)));
            let Some(response) = response else { break };
            let Ok(length) = u16::try_from(response.len()) else { break };
            if stream.write_all(&[&length.to_be_bytes()[..], &response].concat()).is_err() {
                break;
            }
        }
    }
}

fn serve(socket: &UdpSocket, zone: &RwLock<Zone>, stop: &AtomicBool) {
    let mut buffer = [0_u8; 4096];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let response = zone.read().ok().and_then(|zone| answer(&zone, &buffer[..length], false));
        if let Some(response) = response {
            // An unreachable client asks again.
            let _ = socket.send_to(&response, peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Message;
    use hickory_proto::op::Query;
    use hickory_proto::op::ResponseCode;
    use hickory_proto::rr::Name;
    use hickory_proto::rr::RecordType;

    use crate::address;
    use crate::dns;
    use crate::services::Member;
    use crate::services::Proxy;
    use crate::services::Service;
    use crate::services::ServicePod;
    use crate::services::ServicePort;

    fn ask(zone: &dns::Zone, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_utf8(name).unwrap(), kind));
        let bytes = dns::answer(zone, &message.to_vec().unwrap(), false).unwrap();
        let response = Message::from_vec(&bytes).unwrap();
        let texts = response.answers.iter().map(|record| record.data.to_string()).collect();
        (response.metadata.response_code, texts)
    }

    #[test]
    fn services_headless_and_unknown_names_answer_as_a_cluster_does() {
        let pod = |name: &str, label: Option<&str>, pair| ServicePod {
            name: name.into(),
            label: label.map(Into::into),
            pair,
        };
        let pods = vec![pod("a-0", Some("first"), address::pod(1, 2)), pod("a-1", None, address::pod(2, 2))];
        let service = |name: &str, addresses| Service {
            key: ("shop".into(), name.into()),
            addresses,
            ports: vec![ServicePort {
                name: "http".into(),
                port: 80,
                tcp: true,
                endpoints: pods.iter().map(|pod| Member::ready(pod.pair, 8080, 1)).collect(),
            }],
            pods: pods.clone(),
            external: None,
            proxy: Proxy::default(),
        };
        let zone = dns::zone(&[service("cart", Some(address::service(10))), service("db", None)], &[]);
        let cases = [
            ("cart.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.96.0.10"]),
            ("CART.shop.svc.cluster.local.", RecordType::AAAA, ResponseCode::NoError, vec!["fd00:10:96::a"]),
            ("cart.shop.svc.cluster.local.", RecordType::TXT, ResponseCode::NoError, vec![]),
            ("db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.1.2", "10.20.2.2"]),
            ("a-1.db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.2.2"]),
            ("first.db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.1.2"]),
            ("10-20-2-2.db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.2.2"]),
            ("10-20-9-9.shop.pod.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.9.9"]),
            (
                "_http._tcp.cart.shop.svc.cluster.local.",
                RecordType::SRV,
                ResponseCode::NoError,
                vec!["0 50 80 cart.shop.svc.cluster.local."],
            ),
            ("10.0.96.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NoError, vec!["cart.shop.svc.cluster.local."]),
            (
                "2.1.20.10.in-addr.arpa.",
                RecordType::PTR,
                ResponseCode::NoError,
                vec!["first.db.shop.svc.cluster.local."],
            ),
            ("example.com.", RecordType::A, ResponseCode::NXDomain, vec![]),
        ];
        for (name, kind, code, answers) in cases {
            let (got_code, got) = ask(&zone, name, kind);
            assert_eq!((got_code, got), (code, answers.into_iter().map(str::to_owned).collect()), "{name} {kind}");
        }
        assert_eq!(dns::answer(&zone, b"\x00\x01", false), None);
    }
}
