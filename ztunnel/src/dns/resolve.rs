//! One question, from its bytes to the bytes of its answer.
//!
//! Three ways, in this order: the mesh knows ([`crate::dns::zone`]); the cache knows; the pod's name server is asked. What is
//! no plain question (a signature, options that concern both ends, another operation than a query) takes the last way, and
//! not a byte of it changes but the id.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::Message as Decoded;
use tokio::time::timeout;

use crate::dns::PodDns;
use crate::dns::allow::may_ask;
use crate::dns::answer::Writing;
use crate::dns::cache::{Asking, Ended, Given, Kept, Key, LONGEST, LONGEST_ABSENCE, LONGEST_IN_CLUSTER, Turn};
use crate::dns::upstream::{self, Failure, Reply};
use crate::dns::wire::{self, Body, EDE, IN, Message, OwnEdns};
use crate::dns::zone::{Client, Found, Kind, lookup};
use crate::policy::egress;
use crate::state::{Snapshot, Workload};
use crate::telemetry::dns::{DnsAnswerLabels, DnsLabels};

/// Aliases that are followed.
const HOPS: usize = 8;
/// How long a client waits for a name server while there is an old answer (RFC 8767 §5).
const STALE_AFTER: Duration = Duration::from_millis(1800);
/// Others who wait for the same answer are told in any case; this is for a teller that is stuck.
const TOLD_WITHIN: Duration = Duration::from_secs(6);
/// Time to live of an answer that does not hold any more, seconds.
const STALE_TTL: u32 = 5;

/// Addresses of one answer that are asked for before the pod connects: clients try the first ones.
const PREFETCHED: usize = 8;

// Outcomes (RFC 1035 §4.1.1) and explanations (RFC 8914 §4).
pub(super) const NOERROR: u16 = 0;
pub(super) const SERVFAIL: u16 = 2;
pub(super) const NXDOMAIN: u16 = 3;
pub(super) const REFUSED: u16 = 5;
const EDE_OTHER: u16 = 0;
const EDE_STALE: u16 = 3;
pub(super) const EDE_PROHIBITED: u16 = 18;
pub(super) const EDE_UNREACHABLE: u16 = 22;

// Options that concern one hop and are not the next one's: cookie, keep-alive, padding.
const HOP_BY_HOP: [u16; 3] = [10, 11, 12];
// Questions that are not about one answer: transfers, any type.
const WHOLE_ZONES: [u16; 3] = [251, 252, 255];

/// A question as it arrived.
pub(super) struct Asked {
    pub(super) bytes: Vec<u8>,
    /// `None`: no plain question.
    pub(super) message: Option<Message>,
    upstream: SocketAddr,
    pub(super) stream: bool,
    since: Instant,
    labels: DnsLabels,
    /// The pod and its policies were known when it was looked at first.
    judged: bool,
}

/// What to do with a question.
pub(super) enum Step {
    /// Nothing: it is no question.
    Ignore,
    /// The answer.
    Done(Vec<u8>),
    /// Somebody has to be asked.
    Later(Box<Asked>),
}

/// An answer, and where it came from.
struct Obtained {
    kept: Kept,
    source: &'static str,
}

impl PodDns {
    /// Everything that needs no waiting.
    pub(super) fn begin(&self, bytes: &[u8], upstream: Option<SocketAddr>, stream: bool) -> Step {
        let Some((id, flags)) = wire::header(bytes).filter(|(_, flags)| !flags.is_response()) else {
            return Step::Ignore;
        };
        let message = wire::parse(bytes).ok();
        let snapshot = self.shared.reader.load();
        let labels = self.labels(&snapshot, message.as_ref(), stream);
        self.shared.metrics.dns.requests.get_or_create(&labels).inc();
        let Some(upstream) = upstream.or(self.fallback) else {
            let text = "the node's proxy cannot find out which name server was asked; set resolvConf for the pod";
            tracing::debug!(target: "dns", pod = %self.name(), text);
            return Step::Done(failure(message.as_ref(), bytes, (id, flags), SERVFAIL, EDE_OTHER, text));
        };
        if let Some(name) = message.as_ref().and_then(|message| message.name.as_deref()) {
            self.prefetch(name);
        }
        let known = snapshot.synced().then(|| self.pod.workload(&snapshot)).flatten();
        let judged = known.is_some();
        let asked = Asked { bytes: bytes.to_vec(), message, upstream, stream, since: Instant::now(), labels, judged };
        match known.and_then(|workload| self.at_once(&snapshot, workload, &asked)) {
            Some(answer) => Step::Done(answer),
            None => Step::Later(Box::new(asked)),
        }
    }

    /// Asks control for the Service of a name before the pod connects to it, where not everything is known. Without room
    /// the connection asks.
    fn prefetch(&self, name: &str) {
        let demands = self.shared.reader.demands();
        if !demands.enabled() {
            return;
        }
        let below = name.strip_suffix(&*self.node.domain).and_then(|rest| rest.strip_suffix(".svc."));
        let mut labels = below.unwrap_or_default().rsplit('.');
        if let (Some(namespace), Some(service)) = (labels.next(), labels.next()) {
            let key = format!("{namespace}/{service}.{namespace}.svc.{}", self.node.domain);
            demands.want(&key, &self.pod.uid, Instant::now());
        }
    }

    /// The same for the addresses in an answer of a name server: the pod is about to connect to one of them.
    fn prefetch_addresses(&self, answer: &Body) {
        if !self.shared.reader.demands().enabled() {
            return;
        }
        for ip in addresses(answer).take(PREFETCHED) {
            // Without room the connection asks, and is told so.
            let _ = self.shared.ask(&self.pod, ip);
        }
    }

    /// The answer by policy, by the mesh or by the cache, in this order.
    fn at_once(&self, snapshot: &Snapshot, workload: &Workload, asked: &Asked) -> Option<Vec<u8>> {
        if let Err(outcome) = may_ask(snapshot, workload, asked.upstream) {
            self.finished(asked, "refused", REFUSED);
            let header = wire::header(&asked.bytes).unwrap_or((0, wire::Flags(0)));
            let text = outcome.to_string();
            return Some(failure(asked.message.as_ref(), &asked.bytes, header, REFUSED, EDE_PROHIBITED, &text));
        }
        let by_mesh = self.by_mesh(snapshot, asked);
        if by_mesh.is_some() || egress::asked(workload) == egress::Asked::Enforce {
            return by_mesh;
        }
        self.by_cache(asked)
    }

    /// The rest of a question that [`Self::begin`] could not answer.
    pub(super) async fn finish(&self, asked: Box<Asked>) -> Option<Vec<u8>> {
        let closed = |workload: &Workload| egress::asked(workload) == egress::Asked::Enforce;
        if !asked.judged {
            // As any connection of the pod: what is not known yet may forbid it.
            match self.shared.known(&self.pod).await {
                Ok((snapshot, workload)) => {
                    if let Some(answer) = self.at_once(&snapshot, &workload, &asked) {
                        return Some(answer);
                    }
                }
                Err(outcome) => {
                    self.finished(&asked, "failed", SERVFAIL);
                    let header = wire::header(&asked.bytes).unwrap_or((0, wire::Flags(0)));
                    let text = outcome.to_string();
                    let answer = failure(asked.message.as_ref(), &asked.bytes, header, SERVFAIL, EDE_OTHER, &text);
                    return Some(answer);
                }
            }
        }
        let snapshot = self.shared.reader.load();
        if let Some(workload) = self.pod.workload(&snapshot).filter(|workload| closed(workload)).cloned() {
            return Some(self.closed(&snapshot, &workload, &asked).await);
        }
        let Some(message) = &asked.message else { return self.relay(&asked).await };
        if let Some(target) = self.alias(&asked) {
            return Some(
                self.follow(&asked, message, target).await.unwrap_or_else(|failed| self.failed(&asked, &failed)),
            );
        }
        let Some(key) = self.key(&asked) else { return self.relay(&asked).await };
        match self.obtain(&asked, message, &key).await {
            Ok(Some(obtained)) => {
                self.finished(&asked, obtained.source, obtained.kept.given.body.message.flags.rcode());
                self.prefetch_addresses(&obtained.kept.given.body);
                Some(reply(&asked, message, &obtained.kept))
            }
            Ok(None) => self.relay(&asked).await,
            Err(failed) => Some(self.failed(&asked, &failed)),
        }
    }

    /// The answer by the snapshot, if no alias is in the way.
    fn by_mesh(&self, snapshot: &Snapshot, asked: &Asked) -> Option<Vec<u8>> {
        let message = asked.message.as_ref().filter(|message| is_plain(message))?;
        let name = message.name.as_deref()?;
        let Found::Records { answers, extra } = self.lookup(snapshot, name, message.kind) else { return None };
        let mut writing = Writing::new(message, &asked.bytes)?;
        writing.answers(None, &answers, rand::random());
        writing.extra(&extra);
        let answer = self.written(writing, asked, message, snapshot)?;
        self.finished(asked, "mesh", NOERROR);
        Some(answer)
    }

    pub(super) fn lookup(&self, snapshot: &Snapshot, name: &str, kind: u16) -> Found {
        let client = Client { namespace: &self.pod.namespace, network: &self.shared.network };
        lookup(snapshot, client, &self.node.domain, name, Kind::from(kind))
    }

    /// Gives a response of our own the client's id, EDNS and size.
    pub(super) fn written(
        &self,
        writing: Writing,
        asked: &Asked,
        message: &Message,
        snapshot: &Snapshot,
    ) -> Option<Vec<u8>> {
        let in_domain = message.name.as_deref().is_some_and(|name| self.in_domain(name));
        let serial = u32::try_from(snapshot.generation() & u64::from(u32::MAX)).unwrap_or_default();
        let bytes = writing.finish(&self.node.domain, in_domain, serial)?;
        let walked = wire::parse(&bytes).ok()?;
        let edns = OwnEdns { dnssec: message.edns.as_ref().is_some_and(|edns| edns.dnssec), ..OwnEdns::default() };
        Some(Body::new(bytes, walked)?.respond(message, &asked.bytes, 0, &edns, limit(asked, message)))
    }

    pub(super) fn in_domain(&self, name: &str) -> bool {
        name.strip_suffix(&*self.node.domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    fn by_cache(&self, asked: &Asked) -> Option<Vec<u8>> {
        let message = asked.message.as_ref()?;
        if self.alias(asked).is_some() {
            return None;
        }
        let kept = self.node.cache.fresh(&self.key(asked)?, Instant::now())?;
        self.finished(asked, if kept.stale { "stale" } else { "cache" }, kept.given.body.message.flags.rcode());
        self.prefetch_addresses(&kept.given.body);
        Some(reply(asked, message, &kept))
    }

    fn alias(&self, asked: &Asked) -> Option<String> {
        let message = asked.message.as_ref().filter(|message| is_plain(message))?;
        match self.lookup(&self.shared.reader.load(), message.name.as_deref()?, message.kind) {
            Found::Alias(target) => Some(target),
            _ => None,
        }
    }

    /// Follows an alias through the mesh's own names, and at their end through the pod's name server.
    async fn follow(&self, asked: &Asked, message: &Message, mut target: String) -> Result<Vec<u8>, Failure> {
        let unwritable = || Failure::Unreachable(std::io::Error::other("an alias leads to no name"));
        let snapshot = self.shared.reader.load();
        let mut writing = Writing::new(message, &asked.bytes).ok_or_else(unwritable)?;
        let mut owner = None;
        for _ in 0..HOPS {
            let next = writing.alias(owner.as_ref(), &target).ok_or_else(unwritable)?;
            if Kind::from(message.kind) == Kind::Cname {
                break;
            }
            match self.lookup(&snapshot, &target, message.kind) {
                Found::Records { answers, .. } => {
                    writing.answers(Some(&next), &answers, rand::random());
                    break;
                }
                Found::Alias(further) => (owner, target) = (Some(next), further),
                Found::Unknown => {
                    writing.foreign(self.ask_for(asked, message, &next).await?);
                    break;
                }
            }
        }
        self.finished(asked, "mesh", NOERROR);
        self.written(writing, asked, message, &snapshot).ok_or_else(unwritable)
    }

    /// The answer of the pod's name server for another name.
    async fn ask_for(
        &self,
        asked: &Asked,
        message: &Message,
        name: &hickory_proto::rr::Name,
    ) -> Result<Vec<hickory_proto::rr::Record>, Failure> {
        let broken = |_| Failure::Unreachable(std::io::Error::other("the name server's answer cannot be read"));
        for stream in [asked.stream, true] {
            let bytes = wire::renamed(message, &asked.bytes, name.iter());
            let walked = wire::parse(&bytes).map_err(|error| {
                Failure::Unreachable(std::io::Error::other(format!("an alias leads to a bad name: {error}")))
            })?;
            let (labels, upstream) = (asked.labels.clone(), asked.upstream);
            let question = Asked {
                bytes,
                message: Some(walked.clone()),
                upstream,
                stream,
                since: asked.since,
                labels,
                judged: true,
            };
            let Some(key) = self.key(&question) else { break };
            let Some(obtained) = self.obtain(&question, &walked, &key).await? else { break };
            let kept = obtained.kept;
            if kept.given.body.message.flags.is_truncated() && !stream {
                continue;
            }
            let edns = OwnEdns::default();
            let whole = kept.given.body.respond(&walked, &question.bytes, kept.age, &edns, usize::from(u16::MAX));
            return Decoded::from_vec(&whole).map(|decoded| decoded.answers).map_err(broken);
        }
        Ok(Vec::new())
    }

    /// What makes the question the same as another one. `None`: it is nobody else's.
    fn key(&self, asked: &Asked) -> Option<Key> {
        let message = asked.message.as_ref()?;
        let edns = message.edns.as_ref();
        let only_hop = |edns: &wire::Edns| edns.options.iter().all(|(code, _)| HOP_BY_HOP.contains(code));
        let usual = message.flags.opcode() == 0
            && message.flags.recursion_desired()
            && !message.rigid
            && message.records.is_empty()
            && !WHOLE_ZONES.contains(&message.kind)
            && edns.is_none_or(|edns| edns.version == 0 && only_hop(edns));
        let question = asked.bytes.get(message.question.clone()).filter(|_| usual)?;
        Some(Key {
            group: self.group.clone(),
            upstream: asked.upstream,
            question: question.to_ascii_lowercase().into(),
            flags: message.flags.of_query(),
            edns: edns.map(|edns| (edns.payload, edns.dnssec)),
        })
    }

    /// The answer from the cache or the name server. `None`: it cannot be shared, and has to be relayed.
    async fn obtain(&self, asked: &Asked, message: &Message, key: &Key) -> Result<Option<Obtained>, Failure> {
        if let Some(kept) = self.node.cache.fresh(key, Instant::now()) {
            return Ok(Some(Obtained { source: if kept.stale { "stale" } else { "cache" }, kept }));
        }
        // Twice, if the one who asked was stopped.
        for _ in 0..2 {
            let mut told = match self.node.cache.turn(key, asked.stream) {
                Turn::Ask(asking) => return self.ask(asked, message, key, asking).await,
                Turn::Wait(told) => told,
            };
            let ended = match timeout(TOLD_WITHIN, told.wait_for(Option::is_some)).await {
                Ok(Ok(ended)) => ended.clone(),
                Ok(Err(_)) => continue,
                Err(_) => break,
            };
            return match ended {
                Some(Ended::Given(given)) => {
                    Ok(Some(Obtained { kept: Kept { given, age: 0, stale: false }, source: "cache" }))
                }
                Some(Ended::Unshared) | None => Ok(None),
                Some(Ended::Failed) => self.stale(key).map(Some).ok_or(Failure::Silent),
            };
        }
        self.stale(key).map(Some).ok_or(Failure::Silent)
    }

    fn stale(&self, key: &Key) -> Option<Obtained> {
        let kept = self.node.cache.stale(key, Instant::now())?;
        Some(Obtained { kept: Kept { stale: true, ..kept }, source: "stale" })
    }

    /// Asks the name server, keeps the answer and tells the others.
    async fn ask(
        &self,
        asked: &Asked,
        message: &Message,
        key: &Key,
        asking: Asking,
    ) -> Result<Option<Obtained>, Failure> {
        let question = wire::normalised(message, &asked.bytes);
        let walked = wire::parse(&question).ok();
        let exchange = self.exchange(asked, &question, walked.as_ref());
        let replied = if self.node.cache.stale(key, Instant::now()).is_some() {
            timeout(STALE_AFTER, exchange).await.unwrap_or(Err(Failure::Silent))
        } else {
            exchange.await
        };
        let unusable = matches!(&replied, Ok(reply) if rcode(reply) == SERVFAIL);
        if replied.is_err() || unusable {
            self.node.cache.failed(key, Instant::now());
            if let Some(old) = self.stale(key) {
                asking.ended(Ended::Failed);
                return Ok(Some(old));
            }
        }
        let reply = match replied {
            Ok(reply) => reply,
            Err(failed) => {
                asking.ended(Ended::Failed);
                return Err(failed);
            }
        };
        let Some(given) = given(reply) else {
            asking.ended(Ended::Unshared);
            return Ok(None);
        };
        if let Some(lifetime) = self.lifetime(&given, message) {
            self.node.cache.keep(key.clone(), given.clone(), lifetime, Instant::now());
            let bytes = i64::try_from(self.node.cache.bytes()).unwrap_or(i64::MAX);
            self.shared.metrics.dns.cache_bytes.set(bytes);
        }
        asking.ended(Ended::Given(given.clone()));
        Ok(Some(Obtained { kept: Kept { given, age: 0, stale: false }, source: "upstream" }))
    }

    /// How long an answer may be kept, seconds.
    fn lifetime(&self, given: &Given, message: &Message) -> Option<u32> {
        let answer = &given.body.message;
        if answer.flags.is_truncated()
            || !matches!(answer.flags.rcode(), NOERROR | NXDOMAIN)
            || given.edns.extended_rcode != 0
        {
            return None;
        }
        let absent = !answer.records.iter().any(|record| record.section == 1);
        let in_cluster = message.name.as_deref().is_some_and(|name| self.in_domain(name));
        let longest = match (in_cluster, absent) {
            (true, _) => LONGEST_IN_CLUSTER,
            (false, true) => LONGEST_ABSENCE,
            (false, false) => LONGEST,
        };
        answer.lifetime(&given.body.bytes).map(|lifetime| lifetime.min(longest))
    }

    /// Asks as the client asked, and gives back what comes.
    async fn relay(&self, asked: &Asked) -> Option<Vec<u8>> {
        match self.exchange(asked, &asked.bytes, asked.message.as_ref()).await {
            Ok(mut reply) => {
                self.finished(asked, "upstream", rcode(&reply));
                wire::set_id(&mut reply.bytes, wire::header(&asked.bytes)?.0);
                Some(reply.bytes)
            }
            Err(failed) => Some(self.failed(asked, &failed)),
        }
    }

    async fn exchange(&self, asked: &Asked, question: &[u8], walked: Option<&Message>) -> Result<Reply, Failure> {
        let metrics = &self.shared.metrics.dns;
        metrics.upstream_requests.get_or_create(&asked.labels).inc();
        let begin = Instant::now();
        let (sockets, to) = (&self.pod.sockets, asked.upstream);
        let result = if asked.stream {
            upstream::by_stream(sockets, to, question, walked, rand::random()).await
        } else {
            upstream::by_datagram(sockets, to, question, walked, rand::random).await
        };
        metrics.upstream_duration.get_or_create(&asked.labels).observe(begin.elapsed().as_secs_f64());
        if result.is_err() {
            metrics.upstream_failures.get_or_create(&asked.labels).inc();
        }
        result
    }

    /// SERVFAIL, with the reason.
    fn failed(&self, asked: &Asked, failed: &Failure) -> Vec<u8> {
        self.finished(asked, "failed", SERVFAIL);
        let text = format!("{failed} ({})", asked.upstream);
        let header = wire::header(&asked.bytes).unwrap_or((0, wire::Flags(0)));
        failure(asked.message.as_ref(), &asked.bytes, header, SERVFAIL, EDE_UNREACHABLE, &text)
    }

    pub(super) fn finished(&self, asked: &Asked, source: &'static str, rcode: u16) {
        self.shared.metrics.dns.answers.get_or_create(&DnsAnswerLabels { source }).inc();
        tracing::debug!(
            target: "dns",
            pod = %self.name(),
            name = asked.message.as_ref().and_then(|message| message.name.as_deref()).unwrap_or("?"),
            kind = asked.labels.request_query_type,
            protocol = asked.labels.request_protocol,
            upstream = %asked.upstream,
            source,
            rcode,
            micros = asked.since.elapsed().as_micros(),
            "answered",
        );
    }

    fn name(&self) -> String {
        format!("{}/{}", self.pod.namespace, self.pod.name)
    }

    fn labels(&self, snapshot: &Snapshot, message: Option<&Message>, stream: bool) -> DnsLabels {
        let workload = self.pod.workload(snapshot);
        let or_unknown =
            |text: Option<&Arc<str>>| text.filter(|t| !t.is_empty()).cloned().unwrap_or_else(|| "unknown".into());
        DnsLabels {
            request_query_type: message.map_or("other", |message| type_name(message.kind)),
            request_protocol: if stream { "tcp" } else { "udp" },
            source_canonical_service: or_unknown(workload.map(|workload| &workload.canonical_name)),
            source_canonical_revision: or_unknown(workload.map(|workload| &workload.canonical_revision)),
        }
    }
}

/// The addresses that an answer leads to.
fn addresses(answer: &Body) -> impl Iterator<Item = IpAddr> {
    let records = answer.message.records.iter().filter(|record| record.section == 1);
    records.filter_map(|record| {
        let data = answer.bytes.get(record.data.clone())?;
        match record.kind {
            wire::A => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
            wire::AAAA => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
            _ => None,
        }
    })
}

/// A query of the Internet class with nothing unusual about it: one that we may answer ourselves.
pub(super) fn is_plain(message: &Message) -> bool {
    message.flags.opcode() == 0 && message.class == IN && !message.rigid && message.records.is_empty()
}

fn limit(asked: &Asked, message: &Message) -> usize {
    if asked.stream { usize::from(u16::MAX) } else { message.datagram_limit() }
}

pub(super) fn rcode(reply: &Reply) -> u16 {
    wire::header(&reply.bytes).map_or(SERVFAIL, |(_, flags)| flags.rcode())
}

/// A reply without its EDNS record, of which what clients must know is kept.
pub(super) fn given(reply: Reply) -> Option<Arc<Given>> {
    let message = reply.message?;
    let mut edns = OwnEdns::default();
    if let Some(theirs) = &message.edns {
        edns.extended_rcode = theirs.extended_rcode;
        edns.dnssec = theirs.dnssec;
        for (_, range) in theirs.options.iter().filter(|(code, _)| *code == EDE) {
            edns.options.extend(reply.bytes.get(range.start - 4..range.end)?);
        }
    }
    Some(Arc::new(Given { body: Body::new(reply.bytes, message)?, edns }))
}

/// The answer of somebody else, for this client.
fn reply(asked: &Asked, message: &Message, kept: &Kept) -> Vec<u8> {
    let (body, limit) = (&kept.given.body, limit(asked, message));
    if !kept.stale {
        return body.respond(message, &asked.bytes, kept.age, &kept.given.edns, limit);
    }
    let mut edns = kept.given.edns.clone();
    edns.explain(EDE_STALE, "the name server does not answer");
    body.clone().with_ttl(STALE_TTL).respond(message, &asked.bytes, 0, &edns, limit)
}

pub(super) fn failure(
    message: Option<&Message>,
    bytes: &[u8],
    (id, flags): (u16, wire::Flags),
    rcode: u16,
    code: u16,
    text: &str,
) -> Vec<u8> {
    let Some(message) = message else { return wire::without_question(id, flags, rcode) };
    let mut edns = OwnEdns::default();
    edns.explain(code, text);
    wire::refusal(message, bytes, rcode, &edns)
}

/// Names of the types that are usual.
fn type_name(kind: u16) -> &'static str {
    match kind {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        43 => "DS",
        64 => "SVCB",
        65 => "HTTPS",
        257 => "CAA",
        _ => "other",
    }
}
