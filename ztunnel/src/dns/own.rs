//! Names that the proxy looks up for itself: where a host outside the cluster is, asked from the proxy's own network.
//!
//! What a pod was told counts for nothing here, so no pod can lead the proxy to another place. Answers are shared through a
//! [`Cache`] of their own, within its bounds, for as long as they hold, and a while longer when no name server answers; who
//! asks for the same name at the same time waits for one question. Whether an address may be dialled is not decided here.
//! Limits: search paths are not used, as names of egress rules are whole; of several name servers each is asked in turn.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::base::sockets::PodSockets;
use crate::dns::cache::{Cache, Ended, Given, Kept, Key, LONGEST, LONGEST_ABSENCE, Turn};
use crate::dns::resolve::given;
use crate::dns::upstream::{Failure, Reply, by_datagram, by_stream};
use crate::dns::wire::{self, A, IN, Message};

/// Type AAAA.
const AAAA: u16 = 28;
/// Recursion is desired; nothing else.
const FLAGS: u16 = 0x0100;
const NOERROR: u16 = 0;
const NXDOMAIN: u16 = 3;
/// How long all name servers together may take: less than a client waits for a connection.
const PATIENCE: Duration = Duration::from_secs(8);
/// Addresses of one family that are of use. A name with more is served as well by these.
const MOST_ADDRESSES: usize = 32;
/// Name servers that are asked: what resolv.conf(5) allows.
const MOST_SERVERS: usize = 3;
/// Bytes of a resolv.conf.
const RESOLV_CONF: u64 = 64 << 10;
const PORT: u16 = 53;

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unresolved {
    /// There is no such name.
    NoSuchName,
    /// The name has no address of this family.
    NoAddress,
    /// It cannot be put into a question.
    NoName,
    /// No name server answered, and why the last one did not.
    Unanswered(String),
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchName => f.write_str("there is no such name"),
            Self::NoAddress => f.write_str("the name has no address"),
            Self::NoName => f.write_str("it is no name that can be looked up"),
            Self::Unanswered(why) => write!(f, "no name server answered: {why}; retry later"),
        }
    }
}

/// Looks names up. Cheap to clone.
#[derive(Clone)]
pub struct OwnResolver {
    sockets: Arc<PodSockets>,
    servers: Arc<[SocketAddr]>,
    cache: Cache,
    /// All answers are one group's: everybody gets the same.
    group: Arc<str>,
}

impl OwnResolver {
    /// Asks `servers`, the first ones first, by `sockets`.
    pub fn new(sockets: Arc<PodSockets>, servers: Vec<SocketAddr>) -> Self {
        let servers: Vec<SocketAddr> = servers.into_iter().take(MOST_SERVERS).collect();
        Self { sockets, servers: servers.into(), cache: Cache::default(), group: "".into() }
    }

    /// Opens sockets in the proxy's own network.
    pub fn sockets(&self) -> &PodSockets {
        &self.sockets
    }

    /// The addresses of `host` of both families, IPv4 first.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn both(&self, host: &str) -> Result<Vec<IpAddr>, Unresolved> {
        let (v4, v6) = tokio::join!(self.addresses(host, false), self.addresses(host, true));
        match (v4, v6) {
            (Ok(v4), Ok(v6)) => Ok(v4.into_iter().chain(v6).collect()),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(why), Err(_)) => Err(why),
        }
    }

    /// Asks what a pod asks, as it is, the first name server that answers.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn relay(&self, question: &[u8], message: Option<&Message>, stream: bool) -> Result<Reply, Failure> {
        let mut last = Failure::Silent;
        for server in self.servers.iter() {
            let asked = match stream {
                true => by_stream(&self.sockets, *server, question, message, rand::random()).await,
                false => by_datagram(&self.sockets, *server, question, message, rand::random).await,
            };
            match asked {
                Ok(reply) => return Ok(reply),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// The addresses of `host`, in the order of the answer; `v6`: of which family.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn addresses(&self, host: &str, v6: bool) -> Result<Vec<IpAddr>, Unresolved> {
        let kind = if v6 { AAAA } else { A };
        let question = question(host, kind).ok_or(Unresolved::NoName)?;
        let message = wire::parse(&question).map_err(|_| Unresolved::NoName)?;
        let asked = timeout(PATIENCE, self.ask(&question, &message)).await;
        asked.unwrap_or_else(|_| Err(Unresolved::Unanswered(format!("nothing came within {} s", PATIENCE.as_secs()))))
    }

    async fn ask(&self, question: &[u8], message: &Message) -> Result<Vec<IpAddr>, Unresolved> {
        let mut last = Unresolved::Unanswered("there is no name server to ask".to_owned());
        for server in self.servers.iter() {
            let key = self.key(*server, question, message);
            match self.ask_one(&key, question, message).await {
                Ok(kept) => match read(&kept.given) {
                    Err(Unresolved::Unanswered(why)) => last = Unresolved::Unanswered(format!("{why} ({server})")),
                    settled => return settled,
                },
                Err(why) => last = Unresolved::Unanswered(format!("{why} ({server})")),
            }
        }
        let stale = self.servers.iter().find_map(|server| {
            let key = self.key(*server, question, message);
            self.cache.stale(&key, Instant::now())
        });
        stale.and_then(|kept| read(&kept.given).ok()).ok_or(last)
    }

    fn key(&self, upstream: SocketAddr, question: &[u8], message: &Message) -> Key {
        let question = question.get(message.question.clone()).unwrap_or_default().into();
        Key { group: self.group.clone(), upstream, question, flags: FLAGS, edns: None }
    }

    /// One name server's answer, from the cache if it holds.
    async fn ask_one(&self, key: &Key, question: &[u8], message: &Message) -> Result<Kept, String> {
        if let Some(kept) = self.cache.fresh(key, Instant::now()) {
            return Ok(kept);
        }
        let asking = match self.cache.turn(key, false) {
            Turn::Ask(asking) => asking,
            Turn::Wait(mut told) => {
                return match told.wait_for(Option::is_some).await.as_deref() {
                    Ok(Some(Ended::Given(given))) => Ok(Kept { given: given.clone(), age: 0, stale: false }),
                    _ => Err("it did not answer".to_owned()),
                };
            }
        };
        match self.exchange(key.upstream, question, message).await {
            Ok(reply) => {
                let Some(given) = given(reply) else {
                    return Err("its answer is signed as no answer for us is".to_owned());
                };
                if let Some(lifetime) = lifetime(&given) {
                    self.cache.keep(key.clone(), given.clone(), lifetime, Instant::now());
                }
                asking.ended(Ended::Given(given.clone()));
                Ok(Kept { given, age: 0, stale: false })
            }
            Err(failure) => {
                self.cache.failed(key, Instant::now());
                asking.ended(Ended::Failed);
                Err(failure.to_string())
            }
        }
    }

    async fn exchange(&self, server: SocketAddr, question: &[u8], message: &Message) -> Result<Reply, Failure> {
        let reply = by_datagram(&self.sockets, server, question, Some(message), rand::random).await?;
        if wire::header(&reply.bytes).is_some_and(|(_, flags)| flags.is_truncated()) {
            return by_stream(&self.sockets, server, question, Some(message), rand::random()).await;
        }
        Ok(reply)
    }
}

/// How long an answer may be kept, seconds. `None`: not at all.
fn lifetime(given: &Given) -> Option<u32> {
    let message = &given.body.message;
    if message.flags.is_truncated() || !matches!(message.flags.rcode(), NOERROR | NXDOMAIN) {
        return None;
    }
    let absent = !message.records.iter().any(|record| record.section == 1);
    let longest = if absent { LONGEST_ABSENCE } else { LONGEST };
    message.lifetime(&given.body.bytes).map(|lifetime| lifetime.min(longest))
}

/// The addresses in an answer, of the type that was asked for.
fn read(given: &Given) -> Result<Vec<IpAddr>, Unresolved> {
    let (bytes, message) = (&given.body.bytes, &given.body.message);
    match message.flags.rcode() {
        NOERROR => {}
        NXDOMAIN => return Err(Unresolved::NoSuchName),
        rcode => return Err(Unresolved::Unanswered(format!("its outcome is {rcode}"))),
    }
    let answers = message.records.iter().filter(|record| record.section == 1 && record.kind == message.kind);
    let addresses: Vec<IpAddr> =
        answers.filter_map(|record| address(bytes.get(record.data.clone())?)).take(MOST_ADDRESSES).collect();
    if addresses.is_empty() { Err(Unresolved::NoAddress) } else { Ok(addresses) }
}

fn address(data: &[u8]) -> Option<IpAddr> {
    match data.len() {
        4 => <[u8; 4]>::try_from(data).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(data).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// A question for the addresses of `host`, with id 0. `None`: it is no name.
fn question(host: &str, kind: u16) -> Option<Vec<u8>> {
    let mut bytes: Vec<u8> = [0, FLAGS, 1, 0, 0, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
    for label in host.split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..64).contains(length))?;
        bytes.push(length);
        bytes.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    bytes.push(0);
    bytes.extend([kind, IN].iter().flat_map(|word| word.to_be_bytes()));
    Some(bytes)
}

/// The name servers of a resolv.conf. An address with a zone is none that can be asked from anywhere.
///
/// # Errors
/// If it cannot be read.
pub fn system_servers(path: &Path) -> std::io::Result<Vec<SocketAddr>> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(RESOLV_CONF).read_to_string(&mut text)?;
    Ok(servers(&text))
}

fn servers(text: &str) -> Vec<SocketAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    lines.filter_map(|rest| Some(SocketAddr::new(rest.split_whitespace().next()?.parse().ok()?, PORT))).collect()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::UdpSocket;

    use super::{AAAA, OwnResolver, Unresolved, question, servers};
    use crate::base::netns::{Netns, NetnsThread};
    use crate::base::sockets::{Options, PodSockets};
    use crate::dns::wire;

    fn sockets() -> Arc<PodSockets> {
        let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        Arc::new(PodSockets::new(netns, NetnsThread::start().unwrap(), options))
    }

    /// A name server that answers `host.test` by an alias and two addresses, `gone.test` by NXDOMAIN, anything else by
    /// SERVFAIL, and counts.
    async fn server(asked: Arc<AtomicUsize>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((size, from)) = socket.recv_from(&mut buffer).await {
                asked.fetch_add(1, Ordering::Relaxed);
                let message = wire::parse(&buffer[..size]).unwrap();
                let mut answer = buffer[..message.question.end].to_vec();
                answer[2] |= 0x80;
                match message.name.as_deref() {
                    Some("host.test") if message.kind == wire::A => {
                        answer[7] = 3;
                        // host.test CNAME x (a pointer to the name itself does), then two addresses.
                        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0, 12]);
                        for last in [10, 11] {
                            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, last]);
                        }
                    }
                    Some("host.test") => {}
                    Some("gone.test") => answer[3] |= 3,
                    _ => answer[3] |= 2,
                }
                let _ = socket.send_to(&answer, from).await;
            }
        });
        at
    }

    #[tokio::test]
    async fn a_name_is_asked_for_once_and_each_outcome_has_its_word() {
        let asked = Arc::new(AtomicUsize::new(0));
        let resolver = OwnResolver::new(sockets(), vec![server(asked.clone()).await]);
        let addresses = ["203.0.113.10", "203.0.113.11"].map(|ip| ip.parse().unwrap()).to_vec();
        let (one, two) = tokio::join!(resolver.addresses("host.test", false), resolver.addresses("HOST.test", false));
        assert_eq!((one, two), (Ok(addresses.clone()), Ok(addresses.clone())));
        assert_eq!(resolver.addresses("host.test", false).await, Ok(addresses));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(resolver.addresses("host.test", true).await, Err(Unresolved::NoAddress));
        assert_eq!(resolver.addresses("gone.test", false).await, Err(Unresolved::NoSuchName));
        let failed = resolver.addresses("broken.test", false).await;
        assert!(matches!(&failed, Err(Unresolved::Unanswered(why)) if why.contains("outcome is 2")), "{failed:?}");
        for bad in ["", "a..b", ".", &"a".repeat(64)] {
            assert_eq!(resolver.addresses(bad, false).await, Err(Unresolved::NoName), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn the_next_name_server_is_asked_when_one_cannot_answer() {
        let (broken, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let _ = broken;
        let resolver = OwnResolver::new(sockets(), vec![nobody, server(asked).await]);
        assert_eq!(resolver.addresses("host.test", false).await.map(|found| found.len()), Ok(2));
        let none = OwnResolver::new(sockets(), Vec::new()).addresses("host.test", false).await;
        assert!(matches!(none, Err(Unresolved::Unanswered(_))));
    }

    #[test]
    fn name_servers_are_read_as_the_system_does() {
        let text =
            "# nameserver 1.1.1.1\nsearch x\nnameserver 10.0.0.1\n nameserver  fd00::1 # x\nnameserver fe80::1%eth0\n";
        assert_eq!(servers(text), ["10.0.0.1:53", "[fd00::1]:53"].map(|at| at.parse().unwrap()));
        assert!(question("a.b", AAAA).is_some_and(|bytes| wire::parse(&bytes).unwrap().name.as_deref() == Some("a.b")));
    }
}
