//! Names for pods whose egress is closed: those that some rule allows, as virtual addresses; no others, and nothing past us.
//!
//! Nothing is asked from inside the pod, and the name server that the pod chose is never asked: a question is a message that leaves.
//! What the mesh does not know itself goes to the proxy's own name servers, and only for names in the cluster's domain, for reverse
//! names of private addresses, and for names that a rule allows. Addresses of those are virtual and the pod's own
//! ([`crate::flow::names`]), given only if the name exists; HTTPS and SVCB records are left out, since they carry keys for hiding server
//! names (ECH) and addresses besides. All else is NXDOMAIN with the Extended DNS Error "Blocked" (RFC 8914 §4.16) and the rule.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Instant;

use crate::dns::PodDns;
use crate::dns::answer::Writing;
use crate::dns::own::Unresolved;
use crate::dns::resolve::{
    Asked, EDE_PROHIBITED, EDE_UNREACHABLE, NOERROR, NXDOMAIN, REFUSED, SERVFAIL, failure, is_plain, rcode,
};
use crate::dns::wire::{self, Message};
use crate::dns::zone::Data;
use crate::flow::names;
use crate::policy::egress;
use crate::state::{Snapshot, Workload};

const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;
const SVCB: u16 = 64;
const HTTPS: u16 = 65;
const EDE_BLOCKED: u16 = 15;

/// What a name is to a pod whose egress is closed.
enum Asks<'a> {
    /// Of the cluster: asked as it is.
    Inside,
    /// Addresses of a name outside, in this family.
    Addresses(&'a str, bool),
    /// Anything else about a name outside.
    Other(&'a str),
}

impl PodDns {
    /// The answer to what the mesh does not know.
    pub(super) async fn closed(&self, snapshot: &Snapshot, workload: &Workload, asked: &Asked) -> Vec<u8> {
        let Some((message, asks)) = asked.message.as_ref().filter(|message| is_plain(message)).and_then(|message| {
            let name = message.name.as_deref()?;
            Some((message, self.asks(name, message.kind)))
        }) else {
            let text = "only plain questions leave a namespace labelled tulle.dev/egress: deny";
            return self.refuse(asked, REFUSED, EDE_PROHIBITED, text);
        };
        if let Asks::Addresses(name, _) | Asks::Other(name) = asks
            && let Err(outcome) = egress::may_look_up(snapshot, workload, name)
        {
            return self.refuse(asked, NXDOMAIN, EDE_BLOCKED, &outcome.to_string());
        }
        match asks {
            Asks::Addresses(name, v6) => self.virtual_address(snapshot, asked, message, (name, v6)).await,
            Asks::Other(_) if matches!(message.kind, SVCB | HTTPS) => self.nothing(snapshot, asked, message),
            Asks::Inside | Asks::Other(_) => self.by_own(asked, message).await,
        }
    }

    fn asks<'a>(&self, name: &'a str, kind: u16) -> Asks<'a> {
        if self.in_domain(name) || (kind == PTR && is_private_reverse(name)) {
            return Asks::Inside;
        }
        match kind {
            A => Asks::Addresses(name, false),
            AAAA => Asks::Addresses(name, true),
            _ => Asks::Other(name),
        }
    }

    async fn virtual_address(
        &self,
        snapshot: &Snapshot,
        asked: &Asked,
        message: &Message,
        (name, v6): (&str, bool),
    ) -> Vec<u8> {
        match self.node.own.both(name).await {
            Ok(_) => {}
            Err(Unresolved::NoAddress) => return self.nothing(snapshot, asked, message),
            Err(Unresolved::NoSuchName | Unresolved::NoName) => {
                return self.refuse(asked, NXDOMAIN, EDE_UNREACHABLE, "there is no such name");
            }
            Err(why) => return self.refuse(asked, SERVFAIL, EDE_UNREACHABLE, &why.to_string()),
        }
        // One family is enough, since the proxy dials either: the one that the pod has, and IPv4 where it has both.
        if v6 == self.pod.addresses.iter().any(IpAddr::is_ipv4) {
            return self.nothing(snapshot, asked, message);
        }
        let given = self.pod.names.lock().unwrap_or_else(PoisonError::into_inner).give(name, Instant::now());
        let Some(number) = given else {
            let text =
                "the pod looks up more names than it may have at a time; retry in an hour, or narrow its wildcards";
            return self.refuse(asked, SERVFAIL, EDE_PROHIBITED, text);
        };
        let written = Writing::new(message, &asked.bytes).and_then(|mut writing| {
            writing.answers(None, &[Data::Address(names::address(number, v6))], 0);
            self.written(writing, asked, message, snapshot)
        });
        self.finished(asked, "egress", NOERROR);
        written.unwrap_or_else(|| self.refuse(asked, SERVFAIL, EDE_PROHIBITED, "the answer cannot be written"))
    }

    /// The name exists, without what is asked for.
    fn nothing(&self, snapshot: &Snapshot, asked: &Asked, message: &Message) -> Vec<u8> {
        let writing = Writing::new(message, &asked.bytes);
        let written = writing.and_then(|writing| self.written(writing, asked, message, snapshot));
        self.finished(asked, "egress", NOERROR);
        written.unwrap_or_else(|| self.refuse(asked, SERVFAIL, EDE_PROHIBITED, "the answer cannot be written"))
    }

    /// As the proxy's own name servers answer.
    async fn by_own(&self, asked: &Asked, message: &Message) -> Vec<u8> {
        match self.node.own.relay(&asked.bytes, Some(message), asked.stream).await {
            Ok(mut reply) => {
                self.finished(asked, "upstream", rcode(&reply));
                wire::set_id(&mut reply.bytes, wire::header(&asked.bytes).map_or(0, |(id, _)| id));
                reply.bytes
            }
            Err(failure) => self.refuse(asked, SERVFAIL, EDE_UNREACHABLE, &failure.to_string()),
        }
    }

    fn refuse(&self, asked: &Asked, rcode: u16, code: u16, text: &str) -> Vec<u8> {
        self.finished(asked, if rcode == SERVFAIL { "failed" } else { "refused" }, rcode);
        let header = wire::header(&asked.bytes).unwrap_or((0, wire::Flags(0)));
        failure(asked.message.as_ref(), &asked.bytes, header, rcode, code, text)
    }
}

/// Reverse names of addresses that nobody outside answers for: 10/8, 172.16/12, 192.168/16, fc00::/7, fe80::/10. Those of others are
/// zones that anybody may have, and be told things through.
fn is_private_reverse(name: &str) -> bool {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut labels = rest.rsplit('.').map(|label| label.parse::<u8>().ok());
        return match (labels.next().flatten(), labels.next().flatten()) {
            (Some(10), _) | (Some(192), Some(168)) => true,
            (Some(172), Some(second)) => (16..32).contains(&second),
            _ => false,
        };
    }
    let Some(rest) = name.strip_suffix(".ip6.arpa") else { return false };
    let first: String = rest.rsplit('.').take(3).collect();
    first.starts_with("fc") || first.starts_with("fd") || ["fe8", "fe9", "fea", "feb"].contains(&first.as_str())
}

#[cfg(test)]
mod tests {
    use super::is_private_reverse;

    #[test]
    fn only_reverse_names_of_private_addresses_are_asked_for() {
        for (name, expected) in [
            ("5.0.0.10.in-addr.arpa", true),
            ("1.1.16.172.in-addr.arpa", true),
            ("1.1.32.172.in-addr.arpa", false),
            ("1.1.168.192.in-addr.arpa", true),
            ("8.8.8.8.in-addr.arpa", false),
            ("secret.8.8.8.8.in-addr.arpa", false),
            ("1.0.d.f.ip6.arpa", true),
            ("1.0.8.e.f.ip6.arpa", true),
            ("1.0.0.2.ip6.arpa", false),
            ("10.in-addr.arpa.evil.example", false),
        ] {
            assert_eq!(is_private_reverse(name), expected, "{name}");
        }
    }
}
