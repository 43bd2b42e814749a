//! The node's small DNS server: names of Services and of their pods, and nothing else.
//!
//! It stands in for the cluster's DNS, so it answers as Kubernetes specifies: a Service's addresses, a headless
//! Service's ready pods, `<pod>.<service>` for each of them, and no error but an empty answer when a name exists without
//! the asked type. Limits: UDP only, A, AAAA and CNAME, answers cut to 512 bytes' worth of records; it forwards nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
use tulle_proto::names;

use crate::address::Pair;
use crate::netns::NetNs;
use crate::objects::Service;

/// Short, because addresses of headless Services change within a test.
const TTL_S: u32 = 2;
/// Records of one answer: 512 bytes hold that many addresses beside a long name.
const RECORDS_MAX: usize = 12;

/// What one name stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
    alias: Option<String>,
}

/// All names, in lower case and without the final dot.
pub type Zone = BTreeMap<String, Entry>;

/// The names that follow from Services, and hosts outside by a name of their own.
pub fn zone(services: &[Service], hosts: &[(String, Pair)]) -> Zone {
    let mut zone = Zone::new();
    let mut add = |name: String, pairs: &[Pair], alias: Option<&String>| {
        let entry = zone.entry(name.to_lowercase()).or_default();
        entry.v4.extend(pairs.iter().map(|pair| pair.v4));
        entry.v6.extend(pairs.iter().map(|pair| pair.v6));
        entry.alias = alias.cloned();
    };
    for service in services {
        let (namespace, name) = &service.key;
        let fqdn = format!("{name}.{namespace}.svc.{}", names::DEFAULT_DOMAIN);
        let pods: Vec<Pair> = service.pods.iter().map(|(_, pair)| *pair).collect();
        match (service.addresses, &service.external) {
            (_, Some(external)) => add(fqdn, &[], Some(external)),
            (Some(own), None) => add(fqdn, &[own], None),
            (None, None) => {
                for (pod, pair) in &service.pods {
                    add(format!("{pod}.{fqdn}"), &[*pair], None);
                }
                add(fqdn, &pods, None);
            }
        }
    }
    for (name, pair) in hosts {
        add(name.clone(), &[*pair], None);
    }
    zone
}

/// The answer to one datagram; none = not a question worth answering.
pub fn answer(zone: &Zone, datagram: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(datagram).ok()?;
    let query = request.queries.first()?.clone();
    let mut response = Message::response(request.metadata.id, OpCode::Query);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.authoritative = true;
    response.add_query(query.clone());
    let asked = query.name().to_string().to_lowercase();
    match zone.get(asked.trim_end_matches('.')) {
        None => response.metadata.response_code = ResponseCode::NXDomain,
        Some(entry) => {
            for data in records(entry, query.query_type()).into_iter().take(RECORDS_MAX) {
                response.add_answer(Record::from_rdata(query.name().clone(), TTL_S, data));
            }
        }
    }
    response.to_vec().ok()
}

fn records(entry: &Entry, kind: RecordType) -> Vec<RData> {
    if let Some(alias) = &entry.alias {
        return Name::from_utf8(alias).map(|name| vec![RData::CNAME(CNAME(name))]).unwrap_or_default();
    }
    match kind {
        RecordType::A => entry.v4.iter().map(|address| RData::A(A(*address))).collect(),
        RecordType::AAAA => entry.v6.iter().map(|address| RData::AAAA(AAAA(*address))).collect(),
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
        let stop = Arc::new(AtomicBool::new(false));
        for address in addresses.both() {
            let socket = netns.run(|| bind(address))??;
            let (zone, stop) = (zone.clone(), stop.clone());
            std::thread::Builder::new().name(format!("dns {address}")).spawn(move || serve(&socket, &zone, &stop))?;
        }
        Ok(Self { stop })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn bind(address: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(address, 53))
        .map_err(|error| io::Error::new(error.kind(), format!("DNS server on {address}: {error}")))?;
    // So that the thread sees that it should stop.
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

fn serve(socket: &UdpSocket, zone: &RwLock<Zone>, stop: &AtomicBool) {
    let mut buffer = [0_u8; 4096];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let response = zone.read().ok().and_then(|zone| answer(&zone, &buffer[..length]));
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
    use crate::objects::Service;

    fn ask(zone: &dns::Zone, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_utf8(name).unwrap(), kind));
        let bytes = dns::answer(zone, &message.to_vec().unwrap()).unwrap();
        let response = Message::from_vec(&bytes).unwrap();
        let texts = response.answers.iter().map(|record| record.data.to_string()).collect();
        (response.metadata.response_code, texts)
    }

    #[test]
    fn services_headless_and_unknown_names_answer_as_a_cluster_does() {
        let pods = vec![("a-0".to_owned(), address::pod(1, 2)), ("a-1".to_owned(), address::pod(2, 2))];
        let service = |name: &str, addresses| Service {
            key: ("shop".into(), name.into()),
            addresses,
            ports: vec![],
            pods: pods.clone(),
            external: None,
        };
        let zone = dns::zone(&[service("cart", Some(address::service(10))), service("db", None)], &[]);
        let cases = [
            ("cart.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.96.0.10"]),
            ("CART.shop.svc.cluster.local.", RecordType::AAAA, ResponseCode::NoError, vec!["fd00:10:96::a"]),
            ("cart.shop.svc.cluster.local.", RecordType::TXT, ResponseCode::NoError, vec![]),
            ("db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.1.2", "10.20.2.2"]),
            ("a-1.db.shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, vec!["10.20.2.2"]),
            ("example.com.", RecordType::A, ResponseCode::NXDomain, vec![]),
        ];
        for (name, kind, code, answers) in cases {
            let (got_code, got) = ask(&zone, name, kind);
            assert_eq!((got_code, got), (code, answers.into_iter().map(str::to_owned).collect()), "{name} {kind}");
        }
        assert_eq!(dns::answer(&zone, b"\x00\x01"), None);
    }
}
