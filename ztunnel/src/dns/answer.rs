//! Writing answers from the mesh's own knowledge.
//!
//! Names end up as the client spelled them; addresses are shuffled, because most clients take the first; an empty answer
//! carries the zone's SOA, so that its absence is kept for as short a time as its presence would be.

use std::net::IpAddr;
use std::str::FromStr as _;

use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::dns::wire;
use crate::dns::zone::Data;

/// How long answers of our own hold, seconds. CoreDNS's default; the knowledge is a datagram on loopback away, so a longer
/// life would save nothing and keep pods that are gone.
pub const TTL: u32 = 5;

/// A response under construction.
#[derive(Debug)]
pub struct Writing {
    message: Message,
    asked: Name,
}

impl Writing {
    /// The response to `request`, which was walked from `bytes`. `None`: the name cannot be written.
    pub fn new(request: &wire::Message, bytes: &[u8]) -> Option<Self> {
        let asked = spelled(bytes.get(request.question.clone())?)?;
        let mut message = Message::response(request.id, OpCode::Query);
        message.metadata.recursion_desired = request.flags.recursion_desired();
        message.metadata.recursion_available = true;
        message.metadata.authoritative = true;
        let mut query = Query::query(asked.clone(), RecordType::from(request.kind));
        query.set_query_class(DNSClass::from(request.class));
        message.add_query(query);
        Some(Self { message, asked })
    }

    /// Records for the name asked for. `chance` decides where their order begins.
    pub fn answers(&mut self, owner: Option<&Name>, answers: &[Data], chance: u64) {
        let first = usize::try_from(chance % (answers.len().max(1) as u64)).unwrap_or_default();
        for data in answers[first..].iter().chain(&answers[..first]) {
            let Some(data) = rdata(data) else { continue };
            let owner = owner.unwrap_or(&self.asked).clone();
            self.message.add_answer(Record::from_rdata(owner, TTL, data));
        }
    }

    /// An alias, and the name that the answer goes on with.
    pub fn alias(&mut self, owner: Option<&Name>, target: &str) -> Option<Name> {
        let target = name(target)?;
        let owner = owner.unwrap_or(&self.asked).clone();
        self.message.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(target.clone()))));
        Some(target)
    }

    /// Records that somebody else gave.
    pub fn foreign(&mut self, records: Vec<Record>) {
        // Not all of it is ours any more.
        self.message.metadata.authoritative = false;
        self.message.add_answers(records);
    }

    /// Addresses of the servers in the answer.
    pub fn extra(&mut self, extra: &[(String, IpAddr)]) {
        for (owner, ip) in extra {
            let (Some(owner), Some(data)) = (name(owner), rdata(&Data::Address(*ip))) else { continue };
            self.message.add_additional(Record::from_rdata(owner, TTL, data));
        }
    }

    /// Says that there is nothing of the asked type, if nothing was added. `serial` counts versions of the zone.
    pub fn finish(mut self, domain: &str, in_domain: bool, serial: u32) -> Option<Vec<u8>> {
        if self.message.answers.is_empty()
            && in_domain
            && let (Some(zone), Some(server), Some(person)) =
                (name(domain), name(&format!("ns.dns.{domain}")), name(&format!("hostmaster.{domain}")))
        {
            let soa = SOA::new(server, person, serial, 7200, 1800, 86_400, TTL);
            self.message.add_authority(Record::from_rdata(zone, TTL, RData::SOA(soa)));
        }
        self.message.metadata.response_code = ResponseCode::NoError;
        self.message.to_vec().ok()
    }
}

fn rdata(data: &Data) -> Option<RData> {
    Some(match data {
        Data::Address(IpAddr::V4(ip)) => RData::A(A(*ip)),
        Data::Address(IpAddr::V6(ip)) => RData::AAAA(AAAA(*ip)),
        Data::Server { weight, port, target } => RData::SRV(SRV::new(0, *weight, *port, name(target)?)),
        Data::Name(target) => RData::PTR(PTR(name(target)?)),
    })
}

/// A whole name. `None`: it is none.
pub fn name(text: &str) -> Option<Name> {
    let mut name = Name::from_str(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The name at the beginning of a question, as it is spelled there.
fn spelled(question: &[u8]) -> Option<Name> {
    let mut labels = Vec::new();
    let mut rest = question;
    loop {
        let (length, more) = rest.split_first()?;
        if *length == 0 {
            return Name::from_labels(labels).ok();
        }
        let (label, more) = more.split_at_checked(usize::from(*length))?;
        labels.push(label);
        rest = more;
    }
}
