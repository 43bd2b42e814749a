//! A connection that leaves the cluster: what it is meant for, what the client says first, whether it may, and where it goes.
//!
//! What it is meant for is bound before a byte is read: by the virtual address that the pod was given for a name, or by the address
//! that was dialled. The first bytes (a ClientHello, the head of a request) may only agree with that. Then the proxy dials what it
//! resolves itself, from the node's own network, or a gateway; never the address of the client for a name. Under `audit` the same is
//! decided and recorded, and the connection goes where the client wanted. Limits: a request in plain text is let out by its rule for
//! one connection of one request unless a gateway sees to the others; TLS is added by gateways only.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::net::TcpStream;
use tokio::time::{Duration, sleep, timeout};

use crate::dns::own::OwnResolver;
use crate::flow::proof::Proofs;
use crate::flow::{LocalPod, Shared, names};
use crate::http::{Sniffed, sniff};
use crate::outbound::attempts::{Attempts, Next};
use crate::outbound::gateway;
use crate::outcome::{Code, Outcome};
use crate::policy::egress::{self, Asked, Attempt, Grant, Spoken};
use crate::policy::network;
use crate::state::{EgressEndpoint, EgressMode, EgressPlace, HostPattern, Snapshot, Transport, Workload};
use crate::telemetry::ConnRecord;
use crate::telemetry::egress::{Left, Verdict};
use crate::tls::hello::{self, Hello};

/// How long a client may take for its first words, where a rule asks what they are. OpenSSL on a busy machine needs some 100 ms.
const FIRST_WORDS: Duration = Duration::from_secs(10);
/// The same where it is only recorded: what a client waits longer whose server speaks first.
const AUDIT_WORDS: Duration = Duration::from_millis(100);
/// The same where it is refused whatever it says, and the record is to tell what that was.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Before the second look at a client that has sent too little to tell; the socket wakes nobody for bytes that were peeked.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes of a request's head that are looked at.
const HEAD: usize = 16 << 10;
/// Addresses of one name that are tried, one after another.
const ADDRESSES: usize = 4;
/// How long one of them is waited for.
const CONNECT: Duration = Duration::from_secs(5);

/// What a node has for what leaves from it directly.
#[derive(Clone)]
pub struct Outside {
    /// Looks names up, and dials.
    pub names: OwnResolver,
    /// What hosts have proven.
    pub proofs: Arc<Proofs>,
}

/// What a connection that leaves is meant for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    /// The name; `None`: the address.
    pub(super) host: Option<Arc<str>>,
    /// The address, if that is what was dialled.
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
}

/// What the client said first, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Bytes,
    Tls { name: Option<String> },
    Http { host: Option<String>, method: String, path: String },
}

impl Said {
    fn spoken(&self) -> Spoken<'_> {
        match self {
            Self::Bytes => Spoken::Bytes,
            Self::Tls { name } => Spoken::Tls(name.as_deref()),
            Self::Http { host, method, path } => Spoken::Http { host: host.as_deref(), method, path },
        }
    }

    /// As if the client had said the name that it is bound to.
    fn spelt_as(self, bound: &Bound) -> Self {
        match self {
            Self::Tls { name } => Self::Tls { name: bound.host.as_deref().map(str::to_owned).or(name) },
            other => other,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Bytes => "TCP",
            Self::Tls { .. } => "TLS",
            Self::Http { .. } => "HTTP",
        }
    }
}

/// What a connection that was let out depends on.
#[derive(Clone, Debug)]
pub(super) struct Leave {
    bound: Bound,
    said: Said,
}

impl Leave {
    /// Why it may not go on; `None`: it may.
    pub(super) fn forbidden(&self, snapshot: &Snapshot, workload: &Workload) -> Option<Outcome> {
        if workload.egress != EgressMode::Deny {
            return None;
        }
        egress::decide(snapshot, workload, &self.bound.attempt(self.said.spoken())).err()
    }
}

impl Bound {
    pub(super) fn attempt<'a>(&'a self, spoken: Spoken<'a>) -> Attempt<'a> {
        Attempt { host: self.host.as_deref(), address: self.address, port: self.port, spoken }
    }
}

/// Whether a connection of a pod leaves the cluster and is to be decided here. `None`: no.
///
/// # Errors
/// It goes to a virtual address that was given for nothing.
pub(super) fn bound(
    snapshot: &Snapshot,
    pod: &LocalPod,
    source: &Workload,
    network: &str,
    destination: SocketAddr,
) -> Option<Result<Bound, Outcome>> {
    let given = |number| pod.names.lock().unwrap_or_else(PoisonError::into_inner).name(number, Instant::now());
    meant(snapshot, source, network, destination, given)
}

/// The same, where `given` knows the name that the pod was given a virtual address for.
pub(super) fn meant(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    destination: SocketAddr,
    given: impl Fn(u16) -> Option<Arc<str>>,
) -> Option<Result<Bound, Outcome>> {
    let asked = egress::asked(source);
    let (ip, port) = (destination.ip().to_canonical(), destination.port());
    if asked == Asked::Nothing || ip.is_loopback() {
        return None;
    }
    let is_service = snapshot.service_at(network, destination, &source.namespace).is_some();
    if is_service || snapshot.api_server_at(destination).is_some() {
        return None;
    }
    let of_name = |host: Arc<str>| Some(Ok(Bound { host: Some(host), address: None, port }));
    if let Some(number) = names::number(ip).filter(|_| asked == Asked::Enforce) {
        return match given(number).or_else(|| spelled_out(snapshot, source, number)) {
            Some(host) => of_name(host),
            None => {
                let text = format!(
                    "{ip} is a virtual address that the pod was not given for any name; look the name up again"
                );
                Some(Err(Outcome::new(Code::EgressDenied, text)))
            }
        };
    }
    if let Some(host) = egress::stands_for(snapshot, source, ip) {
        return of_name(host.clone());
    }
    let inside =
        snapshot.workload_by_ip(network, ip).is_some_and(|workload| workload.is_pod() || workload.waypoint.is_some());
    (!inside).then_some(Ok(Bound { host: None, address: Some(ip), port }))
}

/// The one name among those that the pod's rules spell out which has this number: after a restart of the proxy.
fn spelled_out(snapshot: &Snapshot, source: &Workload, number: u16) -> Option<Arc<str>> {
    let policies = source.egress_policies.iter().filter_map(|id| snapshot.egress_policy(id));
    let hosts = policies.flat_map(|policy| &policy.rules).flat_map(|rule| &rule.hosts);
    let mut found: Vec<&Arc<str>> = hosts
        .filter_map(|host| match host {
            HostPattern::Exact(name) if names::first(name) == number => Some(name),
            _ => None,
        })
        .collect();
    found.sort();
    found.dedup();
    match found.as_slice() {
        [only] => Some((*only).clone()),
        _ => None,
    }
}

/// Decides and dials. `Ok(None)`: nothing is asked but the record, and the connection goes on as any other.
///
/// # Errors
/// Why it may not leave, or how dialling failed.
pub(super) async fn reach(
    attempts: Attempts<'_>,
    outside: &Outside,
    snapshot: &Snapshot,
    source: &Workload,
    bound: Result<Bound, Outcome>,
    tcp: &TcpStream,
    record: &mut ConnRecord,
) -> Result<Option<(Next, SocketAddr)>, Outcome> {
    let bound = bound?;
    let enforced = egress::asked(source) == Asked::Enforce;
    let silent = bound.attempt(Spoken::Bytes);
    let said = if !enforced {
        first_words(tcp, AUDIT_WORDS).await.unwrap_or(Said::Bytes)
    } else if egress::needs_first_bytes(snapshot, source, &silent) {
        first_words(tcp, FIRST_WORDS).await?
    } else if egress::decide(snapshot, source, &silent).is_err() {
        first_words(tcp, LAST_WORDS).await.unwrap_or(Said::Bytes)
    } else {
        Said::Bytes
    };
    let said = if server_names_are_broken() { said.spelt_as(&bound) } else { said };
    let attempt = bound.attempt(said.spoken());
    let decided = egress::decide(snapshot, source, &attempt);
    record.left = Some(Box::new(left(&bound, &said, source, &decided)));
    let grant = match decided {
        Ok(grant) if enforced => grant,
        Err(outcome) if enforced => return Err(outcome),
        _ => return Ok(None),
    };
    let leave = Leave { bound: bound.clone(), said };
    go(attempts, outside, snapshot, source, (&grant, leave), tcp, record).await.map(Some)
}

fn left(bound: &Bound, said: &Said, source: &Workload, decided: &Result<Grant, Outcome>) -> Left {
    let claimed = match said {
        Said::Bytes => None,
        Said::Tls { name } => name.clone(),
        Said::Http { host, .. } => host.clone(),
    };
    let host = bound.host.as_deref().map(str::to_owned).or_else(|| claimed.clone());
    Left {
        namespace: source.namespace.clone(),
        account: source.identity.service_account().into(),
        host: host.map(Into::into),
        address: bound.address,
        port: bound.port,
        spoken: said.word(),
        claimed: claimed.map(Into::into),
        request: match said {
            Said::Http { method, path, .. } => Some(format!("{method} {path}").into()),
            _ => None,
        },
        verdict: match decided {
            Ok(_) => Verdict::Allowed,
            Err(_) if source.egress == EgressMode::Deny => Verdict::Denied,
            Err(_) => Verdict::WouldBeDenied,
        },
        policy: match decided {
            Ok(grant) => Some(grant.policy.id.clone()),
            Err(outcome) => outcome.policy.clone(),
        },
        rule: decided.as_ref().ok().map(|grant| grant.rule),
    }
}

/// A rule allows it, and yet it is refused.
pub(super) fn allowed_but(grant: &Grant, why: &str) -> Outcome {
    let text = format!("{} allows it, {why}", grant.policy.id);
    let (policy, rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
    Outcome { policy, rule, ..Outcome::new(Code::EgressDenied, text) }
}

/// Why what a rule allows without a gateway needs one.
pub(super) fn gateways_only(grant: &Grant, bound: &Bound, spoken: &Spoken<'_>) -> Option<Outcome> {
    if grant.rule().originate.is_some() {
        return Some(allowed_but(grant, "and asks for TLS that only gateways add; give the rule a gateway (via)"));
    }
    let in_the_clear = matches!(spoken, Spoken::Http { .. }) && bound.host.is_some();
    in_the_clear.then(|| {
        allowed_but(grant, "and requests in plain text are led out by gateways only; give the rule a gateway (via)")
    })
}

/// Host or address, and port, as an egress gateway is asked for it.
pub(super) fn asked_of_gateway(bound: &Bound) -> Arc<str> {
    let target = bound.host.as_deref().map(str::to_owned).or_else(|| bound.address.map(bracketed)).unwrap_or_default();
    format!("{target}:{}", bound.port).into()
}

async fn go(
    attempts: Attempts<'_>,
    outside: &Outside,
    snapshot: &Snapshot,
    source: &Workload,
    (grant, leave): (&Grant, Leave),
    tcp: &TcpStream,
    record: &mut ConnRecord,
) -> Result<(Next, SocketAddr), Outcome> {
    let rule = grant.rule();
    let bound = &leave.bound;
    if let Some(service) = rule.gateway.as_ref().filter(|_| !gateway::is_broken()) {
        let name = asked_of_gateway(bound);
        let at = (&*service.namespace, &*service.hostname);
        let choose = |tried: &[SocketAddr]| {
            attempts.with_chance(tried, |chance| gateway::plan(snapshot, source, at, &name, chance))
        };
        let port = tulle_proto::names::PORT_HBONE;
        let (next, target, _) = attempts.reach_by(snapshot, source, (port, None), choose, tcp, record).await?;
        return Ok((next, target));
    }
    if let Some(outcome) = gateways_only(grant, bound, &leave.said.spoken()) {
        return Err(outcome);
    }
    let refused = |why: &str| allowed_but(grant, why);
    let targets = targets(&outside.names, grant, bound).await.map_err(|why| {
        let host = bound.host.as_deref().unwrap_or_default();
        Outcome::new(Code::NoEndpoint, format!("{host}: {why}"))
    })?;
    let mut last = None;
    for target in targets.into_iter().take(ADDRESSES) {
        if let Err(why) = egress::may_dial(snapshot, &attempts.shared.network, rule, target.ip()) {
            last = last.or_else(|| Some(refused(&format!("but not where it leads: {why}"))));
            continue;
        }
        network::egress(snapshot, source, Transport::Tcp, target).outcome()?;
        record.destination.addr = Some(target);
        let connect = || outside.names.sockets().connect(target);
        let spoken = leave.said.spoken();
        if let Err(outcome) = outside.proofs.check(&source.namespace, (grant, &spoken), target, connect()).await {
            last = Some(outcome);
            continue;
        }
        match timeout(CONNECT, connect()).await {
            Ok(Ok(server)) => return Ok((Next::Outside { server, leave: Box::new(leave) }, target)),
            Ok(Err(error)) => last = Some(Outcome::new(Code::ConnectFailed, format!("{target}: {error}"))),
            Err(_) => last = Some(Outcome::new(Code::ConnectTimeout, format!("{target} did not answer"))),
        }
    }
    Err(last.unwrap_or_else(|| Outcome::new(Code::NoEndpoint, "the name has no address")))
}

fn bracketed(ip: IpAddr) -> String {
    if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() }
}

/// Where to dial, in the order of trying.
async fn targets(names: &OwnResolver, grant: &Grant, bound: &Bound) -> Result<Vec<SocketAddr>, String> {
    let port = grant.target;
    let Some(host) = &bound.host else {
        return Ok(bound.address.into_iter().map(|ip| SocketAddr::new(ip, port)).collect());
    };
    let endpoints = &grant.rule().endpoints;
    if endpoints.is_empty() {
        let all = names.both(host).await.map_err(|error| error.to_string())?;
        return Ok(all.into_iter().map(|ip| SocketAddr::new(ip, port)).collect());
    }
    let at = |endpoint: &EgressEndpoint| {
        endpoint.ports.iter().find(|(from, _)| *from == bound.port).map_or(port, |(_, to)| *to)
    };
    let mut found = Vec::new();
    let mut failed = None;
    for endpoint in endpoints {
        match &endpoint.at {
            EgressPlace::Address(ip) => found.push(SocketAddr::new(*ip, at(endpoint))),
            EgressPlace::Host(name) => match names.both(name).await {
                Ok(all) => found.extend(all.into_iter().map(|ip| SocketAddr::new(ip, at(endpoint)))),
                Err(error) => failed = Some(format!("{name}: {error}")),
            },
        }
    }
    match (found.is_empty(), failed) {
        (true, Some(failed)) => Err(failed),
        _ => {
            // Any of them: connections are shared out by where they begin.
            let begin = usize::from(rand::random::<u16>()) % found.len().max(1);
            found.rotate_left(begin);
            Ok(found)
        }
    }
}

/// What the client says first, without taking it. Nothing within `patience`: bytes.
///
/// # Errors
/// What cannot be what it begins as: a ClientHello that is malformed or too long, or a head that is.
async fn first_words(tcp: &TcpStream, patience: Duration) -> Result<Said, Outcome> {
    let begin = Instant::now();
    let mut buffer = vec![0; 4096];
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        let size = match timeout(left, tcp.peek(&mut buffer)).await {
            Ok(Ok(size)) if size > 0 => size,
            _ => return Ok(Said::Bytes),
        };
        let first = &buffer[..size];
        match told(first)? {
            Some(said) => return Ok(said),
            // As much as fits was seen, and more is needed.
            None if size == buffer.len() && size < hello::MOST => buffer.resize(size * 2, 0),
            None => sleep(LOOK.max(begin.elapsed() / 4)).await,
        }
    }
}

/// What the first bytes are; `None`: too few to tell.
fn told(first: &[u8]) -> Result<Option<Said>, Outcome> {
    if first.first() == Some(&22) {
        return match hello::read(first) {
            Hello::More => Ok(None),
            Hello::Client { name, ech: _ } => Ok(Some(Said::Tls { name })),
            Hello::Not(why) => Err(Outcome::new(Code::EgressDenied, format!("it begins like TLS, and {why}"))),
        };
    }
    match sniff(first) {
        Sniffed::Http1 => head(first),
        Sniffed::More => Ok(None),
        // HTTP/2 in plain text shows its names only to who takes part in it.
        Sniffed::Http2 | Sniffed::Other => Ok(Some(Said::Bytes)),
    }
}

/// Method, path and Host of the first request.
fn head(first: &[u8]) -> Result<Option<Said>, Outcome> {
    let bad = |why: &str| Outcome::new(Code::EgressDenied, format!("it begins like HTTP, and {why}"));
    let Some(end) = first.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if first.len() >= HEAD { Err(bad("its head is longer than 16 KiB")) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&first[..end]).map_err(|_| bad("its head is not text"))?;
    let mut lines = text.trim_start_matches(['\r', '\n']).split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Err(bad("has no target")) };
    let hosts = lines.filter_map(|line| line.split_once(':')).filter(|(name, _)| name.eq_ignore_ascii_case("host"));
    let hosts: Vec<&str> = hosts.map(|(_, value)| value.trim()).collect();
    let [host] = hosts.as_slice() else { return Err(bad("has not exactly one Host")) };
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    Ok(Some(Said::Http { host: Some(plain_host(host)), method: method.to_owned(), path: path.to_owned() }))
}

/// A Host without its port, in the form in which names are compared.
fn plain_host(host: &str) -> String {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Sabotage of test builds: `TULLE_BREAK=sni` believes every server name.
fn server_names_are_broken() -> bool {
    cfg!(feature = "sabotage") && std::env::var("TULLE_BREAK").is_ok_and(|part| part == "sni")
}

/// The pod may no longer reach the outside as it does.
pub(super) async fn forbidden(shared: &Shared, pod: &LocalPod, leave: &Leave) -> Outcome {
    let mut changes = shared.reader.subscribe();
    loop {
        let snapshot = shared.reader.load();
        let why = pod.workload(&snapshot).and_then(|workload| leave.forbidden(&snapshot, workload));
        if let Some(outcome) = why {
            return outcome;
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Said, told};

    #[test]
    fn the_first_words_tell_what_is_spoken() {
        let http = |host: &str| Said::Http { host: Some(host.into()), method: "GET".into(), path: "/a".into() };
        let cases: &[(&[u8], Option<Said>)] = &[
            (b"GET /a?b HTTP/1.1\r\nHost: Api.Example:80\r\n\r\n", Some(http("api.example"))),
            (b"GET /a HTTP/1.1\r\nX: y\r\nhost: api.example.\r\n\r\nrest", Some(http("api.example"))),
            (b"GET /a HTTP/1.1\r\nHost: api.ex", None),
            (b"SSH-2.0-x\r\n", Some(Said::Bytes)),
            (b"\x00\x00\x00\x08", Some(Said::Bytes)),
            (b"\x16\x03\x01\x02", None),
        ];
        for (first, expected) in cases {
            assert_eq!(told(first).ok(), Some(expected.clone()), "{:?}", String::from_utf8_lossy(first));
        }
        for wrong in [
            &b"GET /a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"[..],
            b"GET /a HTTP/1.1\r\n\r\n",
            b"\x16\x02\x00\x00\x05hello",
        ] {
            assert!(told(wrong).is_err(), "{:?}", String::from_utf8_lossy(wrong));
        }
    }
}
