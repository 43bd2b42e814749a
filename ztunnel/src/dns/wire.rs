//! A DNS message as bytes, walked once: where its question, records, times to live and EDNS record are.
//!
//! What a pod asks its own name server is relayed as it came, of whatever type and class, so messages are not decoded and
//! written again: only the id, the times to live, the case of the name and the EDNS record are changed in place. RFC 1035
//! §4, RFC 6891. Limits: a message of at most 65,535 bytes with one question; compressed names in the question, records
//! behind the last one, or an EDNS record that is not the last are refused or passed through untouched.

use std::fmt;
use std::ops::Range;

/// Type A.
pub const A: u16 = 1;
/// Type AAAA.
pub const AAAA: u16 = 28;
/// Type SOA.
pub const SOA: u16 = 6;
/// Type OPT, the EDNS pseudo record.
pub const OPT: u16 = 41;
/// Class IN.
pub const IN: u16 = 1;
/// Answers that a client without EDNS takes, bytes (RFC 1035 §4.2.1).
pub const PLAIN_LIMIT: usize = 512;

const HEADER: usize = 12;
/// Longest name, bytes (RFC 1035 §2.3.4).
const NAME_MAX: usize = 255;

const QR: u16 = 1 << 15;
const TC: u16 = 1 << 9;
const RD: u16 = 1 << 8;
const RA: u16 = 1 << 7;
const AD: u16 = 1 << 5;
const CD: u16 = 1 << 4;

/// Why bytes are no DNS message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The header's second word, and what is asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub u16);

impl Flags {
    /// It is a response.
    pub fn is_response(self) -> bool {
        self.0 & QR != 0
    }
    /// 0: a query.
    pub fn opcode(self) -> u16 {
        (self.0 >> 11) & 0xf
    }
    /// Cut to what the client takes.
    pub fn is_truncated(self) -> bool {
        self.0 & TC != 0
    }
    /// The client wants the server to find out.
    pub fn recursion_desired(self) -> bool {
        self.0 & RD != 0
    }
    /// Outcome, without the bits that EDNS adds.
    pub fn rcode(self) -> u16 {
        self.0 & 0xf
    }
    /// What of a query changes its answer: RD, AD, CD.
    pub fn of_query(self) -> u16 {
        self.0 & (RD | AD | CD)
    }
}

/// The header of anything that is long enough to have one.
pub fn header(bytes: &[u8]) -> Option<(u16, Flags)> {
    Some((word(bytes, 0)?, Flags(word(bytes, 2)?))).filter(|_| bytes.len() >= HEADER)
}

/// The EDNS record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edns {
    /// Where it is.
    pub range: Range<usize>,
    /// Largest datagram that its sender takes, bytes.
    pub payload: u16,
    /// High bits of the outcome.
    pub extended_rcode: u8,
    /// 0 is the only version there is.
    pub version: u8,
    /// DNSSEC records are wanted.
    pub dnssec: bool,
    /// Codes and places of its options.
    pub options: Vec<(u16, Range<usize>)>,
}

/// One record, apart from its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// 1: answer, 2: authority, 3: additional.
    pub section: u8,
    /// Type.
    pub kind: u16,
    /// Where its time to live is written.
    pub ttl_at: usize,
    /// Seconds.
    pub ttl: u32,
    /// Its data.
    pub data: Range<usize>,
    /// Where it ends.
    pub end: usize,
}

/// A walked message. It borrows nothing: offsets are into the bytes that were walked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Chosen by the client.
    pub id: u16,
    /// See [`Flags`].
    pub flags: Flags,
    /// Where the question is: name, type and class.
    pub question: Range<usize>,
    /// The name asked for, in lower case and without the final dot. `None`: it has bytes that no host name has.
    pub name: Option<String>,
    /// Type asked for.
    pub kind: u16,
    /// Class asked for.
    pub class: u16,
    /// Records but for EDNS.
    pub records: Vec<Record>,
    /// EDNS.
    pub edns: Option<Edns>,
    /// Something is signed or placed such that no byte may be changed but the id.
    pub rigid: bool,
}

/// Walks a message with exactly one question.
///
/// # Errors
/// What is wrong with it.
pub fn parse(bytes: &[u8]) -> Result<Message, Malformed> {
    let cut = Malformed("it ends in the middle");
    if bytes.len() > usize::from(u16::MAX) {
        return Err(Malformed("it is longer than 65535 bytes"));
    }
    let (id, flags) = header(bytes).ok_or(cut)?;
    let counts: [u16; 4] = std::array::from_fn(|index| word(bytes, 4 + 2 * index).unwrap_or_default());
    if counts[0] != 1 {
        return Err(Malformed("it does not have one question"));
    }
    let (name, name_end) = question_name(bytes)?;
    let (kind, class) = (word(bytes, name_end).ok_or(cut)?, word(bytes, name_end + 2).ok_or(cut)?);
    let question = HEADER..name_end + 4;
    let mut message = Message { id, flags, question, name, kind, class, records: Vec::new(), edns: None, rigid: false };
    let mut at = message.question.end;
    for (section, count) in (1u8..).zip(&counts[1..]) {
        for _ in 0..*count {
            // After EDNS only a signature may come, and then nothing may be changed.
            message.rigid |= message.edns.is_some();
            at = record(bytes, at, section, &mut message)?;
        }
    }
    message.rigid |= at != bytes.len();
    Ok(message)
}

/// The name of the question, and where it ends.
fn question_name(bytes: &[u8]) -> Result<(Option<String>, usize), Malformed> {
    let mut at = HEADER;
    let mut name = Some(String::new());
    loop {
        let length = usize::from(*bytes.get(at).ok_or(Malformed("it ends in the middle"))?);
        at += 1;
        match length {
            0 => break,
            1..64 => {}
            _ => return Err(Malformed("the name in its question is compressed")),
        }
        let label = bytes.get(at..at + length).ok_or(Malformed("it ends in the middle"))?;
        at += length;
        if at - HEADER >= NAME_MAX {
            return Err(Malformed("the name in its question is longer than 255 bytes"));
        }
        let plain = label.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_*".contains(byte));
        name = name.filter(|_| plain).map(|mut name| {
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
            name
        });
    }
    Ok((name, at))
}

/// Reads the record at `at` into `message`; where it ends.
fn record(bytes: &[u8], at: usize, section: u8, message: &mut Message) -> Result<usize, Malformed> {
    let cut = Malformed("it ends in the middle");
    let start = at;
    let at = skip_name(bytes, at)?;
    let kind = word(bytes, at).ok_or(cut)?;
    let class = word(bytes, at + 2).ok_or(cut)?;
    let ttl = u32::from(word(bytes, at + 4).ok_or(cut)?) << 16 | u32::from(word(bytes, at + 6).ok_or(cut)?);
    let data = at + 10..at + 10 + usize::from(word(bytes, at + 8).ok_or(cut)?);
    let end = data.end;
    let content = bytes.get(data.clone()).ok_or(cut)?;
    if kind != OPT || section != 3 {
        // A signature over the message: TSIG, SIG(0).
        message.rigid |= section == 3 && matches!(kind, 250 | 24);
        message.records.push(Record { section, kind, ttl_at: at + 4, ttl, data, end });
        return Ok(end);
    }
    if message.edns.is_some() || at != start + 1 {
        return Err(Malformed("it has two EDNS records, or one with a name"));
    }
    let mut options = Vec::new();
    let mut next = 0;
    while next < content.len() {
        let (code, length) = (word(content, next).ok_or(cut)?, word(content, next + 2).ok_or(cut)?);
        let value = next + 4..next + 4 + usize::from(length);
        if value.end > content.len() {
            return Err(cut);
        }
        next = value.end;
        options.push((code, data.start + value.start..data.start + value.end));
    }
    let [extended_rcode, version, high, _] = ttl.to_be_bytes();
    let dnssec = high & 0x80 != 0;
    message.edns = Some(Edns { range: start..end, payload: class, extended_rcode, version, dnssec, options });
    Ok(end)
}

/// Where the name at `at` ends. A pointer ends it; where it points to is nobody's business here.
fn skip_name(bytes: &[u8], mut at: usize) -> Result<usize, Malformed> {
    let start = at;
    loop {
        let length = usize::from(*bytes.get(at).ok_or(Malformed("it ends in the middle"))?);
        at += 1;
        match length {
            0 => return Ok(at),
            1..64 => at += length,
            0xc0.. => return Ok(at + 1),
            _ => return Err(Malformed("a name has a label of an unknown kind")),
        }
        if at - start > NAME_MAX {
            return Err(Malformed("a name is longer than 255 bytes"));
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Writes another id.
pub fn set_id(bytes: &mut [u8], id: u16) {
    put(bytes, 0, &id.to_be_bytes());
}

impl Message {
    /// Whether `other`, walked from `bytes`, has the same question. Case does not count (RFC 4343).
    pub fn same_question(&self, own: &[u8], other: &Self, bytes: &[u8]) -> bool {
        match (own.get(self.question.clone()), bytes.get(other.question.clone())) {
            (Some(one), Some(two)) => one.eq_ignore_ascii_case(two),
            _ => false,
        }
    }

    /// The largest answer that the sender takes in a datagram, bytes.
    pub fn datagram_limit(&self) -> usize {
        self.edns.as_ref().map_or(PLAIN_LIMIT, |edns| usize::from(edns.payload).max(PLAIN_LIMIT))
    }

    /// How long the answer holds, in seconds: the shortest time to live of its records, and for one without answers
    /// that of its SOA (RFC 2308 §5). `None`: it must not be kept.
    pub fn lifetime(&self, bytes: &[u8]) -> Option<u32> {
        if self.records.iter().any(|record| record.section == 1) {
            return self.records.iter().map(|record| record.ttl).min();
        }
        let soa = self.records.iter().find(|record| record.section == 2 && record.kind == SOA)?;
        let at = soa.data.end.checked_sub(4).filter(|at| *at >= soa.data.start)?;
        let minimum = u32::from(word(bytes, at)?) << 16 | u32::from(word(bytes, at + 2)?);
        Some(soa.ttl.min(minimum))
    }
}

/// EDNS of an answer that we send: what we take, what the upstream said, and options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnEdns {
    /// High bits of the outcome.
    pub extended_rcode: u8,
    /// DNSSEC records were wanted.
    pub dnssec: bool,
    /// Options, in wire form.
    pub options: Vec<u8>,
}

/// Code of the option Extended DNS Error (RFC 8914).
pub const EDE: u16 = 15;

impl OwnEdns {
    /// Adds an Extended DNS Error.
    pub fn explain(&mut self, code: u16, text: &str) {
        let length = u16::try_from(2 + text.len()).unwrap_or(2);
        self.options.extend(EDE.to_be_bytes());
        self.options.extend(length.to_be_bytes());
        self.options.extend(code.to_be_bytes());
        self.options.extend(&text.as_bytes()[..usize::from(length) - 2]);
    }

    fn append(&self, bytes: &mut Vec<u8>) {
        // The root's name, and the largest datagram that crosses every network in one piece.
        bytes.push(0);
        bytes.extend(OPT.to_be_bytes());
        bytes.extend(1232_u16.to_be_bytes());
        bytes.extend([self.extended_rcode, 0, if self.dnssec { 0x80 } else { 0 }, 0]);
        bytes.extend(u16::try_from(self.options.len()).unwrap_or_default().to_be_bytes());
        bytes.extend(&self.options);
        let count = word(bytes, 10).unwrap_or_default().saturating_add(1);
        put(bytes, 10, &count.to_be_bytes());
    }

    fn len(&self) -> usize {
        11 + self.options.len()
    }
}

/// A message without EDNS, ready to be answered from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Where what is in them.
    pub message: Message,
}

impl Body {
    /// Takes the EDNS record off. `None`: nothing may be changed in the message.
    pub fn new(mut bytes: Vec<u8>, mut message: Message) -> Option<Self> {
        if message.rigid {
            return None;
        }
        if let Some(edns) = message.edns.take() {
            bytes.truncate(edns.range.start);
            let count = word(&bytes, 10)?.checked_sub(1)?;
            put(&mut bytes, 10, &count.to_be_bytes());
        }
        Some(Self { bytes, message })
    }

    /// The response to `request`: its id and its spelling of the name, records `age` seconds older, EDNS if it was
    /// asked with, and no more than `limit` bytes.
    pub fn respond(&self, request: &Message, asked: &[u8], age: u32, edns: &OwnEdns, limit: usize) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        set_id(&mut bytes, request.id);
        if let (Some(spelling), true) = (asked.get(request.question.clone()), request.question == self.message.question)
        {
            put(&mut bytes, HEADER, spelling);
        }
        for record in &self.message.records {
            put(&mut bytes, record.ttl_at, &record.ttl.saturating_sub(age).to_be_bytes());
        }
        let room = limit.saturating_sub(if request.edns.is_some() { edns.len() } else { 0 });
        self.shorten(&mut bytes, room);
        if request.edns.is_some() {
            edns.append(&mut bytes);
        }
        bytes
    }

    /// Drops records from the end until `room` bytes are enough. Names point backwards only, so what stays is whole.
    fn shorten(&self, bytes: &mut Vec<u8>, room: usize) {
        if bytes.len() <= room {
            return;
        }
        let kept = self.message.records.iter().take_while(|record| record.end <= room).count();
        let end = kept.checked_sub(1).map_or(self.message.question.end, |last| self.message.records[last].end);
        bytes.truncate(end);
        for section in 1..=3u8 {
            let count = self.message.records[..kept].iter().filter(|record| record.section == section).count();
            put(bytes, 4 + 2 * usize::from(section), &u16::try_from(count).unwrap_or_default().to_be_bytes());
        }
        // Additional records are a courtesy; without an answer or a proof the client has to ask again by TCP.
        if self.message.records[kept..].iter().any(|record| record.section < 3) {
            let flags = word(bytes, 2).unwrap_or_default() | TC;
            put(bytes, 2, &flags.to_be_bytes());
        }
    }

    /// Every time to live becomes `seconds`.
    pub fn with_ttl(mut self, seconds: u32) -> Self {
        for record in &mut self.message.records {
            record.ttl = seconds;
        }
        self
    }
}

/// A response without records: outcome `rcode` (RFC 1035 §4.1.1), with an explanation for clients that speak EDNS.
pub fn refusal(request: &Message, asked: &[u8], rcode: u16, edns: &OwnEdns) -> Vec<u8> {
    let mut bytes = bare(request.id, request.flags, rcode, 1);
    bytes.extend(asked.get(request.question.clone()).unwrap_or_default());
    if request.edns.is_some() {
        edns.append(&mut bytes);
    }
    bytes
}

/// The same for bytes that have a header and no question that could be read.
pub fn without_question(id: u16, flags: Flags, rcode: u16) -> Vec<u8> {
    bare(id, flags, rcode, 0)
}

fn bare(id: u16, flags: Flags, rcode: u16, questions: u16) -> Vec<u8> {
    let flags = QR | (flags.0 & (0xf << 11 | RD | CD)) | RA | rcode & 0xf;
    [id, flags, questions, 0, 0, 0].iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The question as it goes upstream: the client's flags, name, type and class, its EDNS without options.
pub fn normalised(request: &Message, asked: &[u8]) -> Vec<u8> {
    let counts = [request.id, request.flags.of_query(), 1, 0, 0, 0];
    let mut bytes: Vec<u8> = counts.iter().flat_map(|word| word.to_be_bytes()).collect();
    bytes.extend(asked.get(request.question.clone()).unwrap_or_default());
    if let Some(edns) = &request.edns {
        OwnEdns { dnssec: edns.dnssec, ..OwnEdns::default() }.append(&mut bytes);
        let payload = u16::try_from(request.datagram_limit()).unwrap_or(u16::MAX);
        let at = bytes.len() - 8;
        put(&mut bytes, at, &payload.to_be_bytes());
    }
    bytes
}

/// The same question about another name.
pub fn renamed<'a>(request: &Message, asked: &[u8], labels: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let question = request.question.clone();
    let tail = asked.get(question.end.saturating_sub(4)..question.end).unwrap_or_default();
    let mut name = Vec::with_capacity(NAME_MAX);
    for label in labels {
        name.push(u8::try_from(label.len()).unwrap_or_default());
        name.extend(label);
    }
    name.push(0);
    let mut bytes = normalised(request, asked);
    bytes.splice(question.start..question.end, name.into_iter().chain(tail.iter().copied()));
    bytes
}

#[cfg(test)]
mod tests;
