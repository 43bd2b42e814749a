//! What left the cluster, or wanted to: one record for each attempt, in the log, as counters, and as a bounded list of who talks to
//! what, of which `tulle egress` makes policies.
//!
//! The list is of kinds of attempts (whose, to what, allowed or not) and not of attempts, and has [`MOST`] places: a pod that scans the
//! Internet fills them once, and what does not fit is counted. Paths are in the log alone.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Kinds of attempts that are told apart on a node: some 300 bytes each.
const MOST: usize = 4096;

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// A rule allows it.
    Allowed,
    /// No rule does, and it was refused.
    Denied,
    /// No rule does, and it passed: egress is audited.
    WouldBeDenied,
}

impl Verdict {
    /// As logs and answers have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::WouldBeDenied => "audited",
        }
    }
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Its account.
    pub account: Arc<str>,
    /// The name that it was for, or that the client claimed.
    pub host: Option<Arc<str>>,
    /// The address that was dialled as such.
    pub address: Option<IpAddr>,
    /// Port.
    pub port: u16,
    /// `TCP`, `TLS` or `HTTP`.
    pub spoken: &'static str,
    /// Server name or Host.
    pub claimed: Option<Arc<str>>,
    /// Method and path.
    pub request: Option<Arc<str>>,
    /// What was decided.
    pub verdict: Verdict,
    /// By which policy.
    pub policy: Option<Arc<str>>,
    /// By which of its rules.
    pub rule: Option<usize>,
}

/// A kind of attempts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Namespace of the pods.
    pub namespace: Arc<str>,
    /// Their account.
    pub account: Arc<str>,
    /// Name, or address.
    pub target: Arc<str>,
    /// Port.
    pub port: u16,
    /// `TCP`, `TLS` or `HTTP`.
    pub spoken: &'static str,
    /// As [`Verdict::word`] has it.
    pub verdict: &'static str,
    /// The policy that decided.
    pub policy: Arc<str>,
}

/// What there was of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Attempts.
    pub attempts: u64,
    /// Bytes that pods sent and received.
    pub bytes: u64,
}

/// Who talked to what. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Talks(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    seen: HashMap<Kind, Seen>,
    untold: u64,
}

impl Talks {
    /// An attempt has ended.
    pub fn ended(&self, left: &Left, bytes: u64) {
        let target = match (&left.host, left.address) {
            (Some(host), _) => host.clone(),
            (None, Some(address)) => address.to_string().into(),
            (None, None) => "?".into(),
        };
        let kind = Kind {
            namespace: left.namespace.clone(),
            account: left.account.clone(),
            target,
            port: left.port,
            spoken: left.spoken,
            verdict: left.verdict.word(),
            policy: left.policy.clone().unwrap_or_default(),
        };
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.seen.len() >= MOST && !inner.seen.contains_key(&kind) {
            inner.untold += 1;
            return;
        }
        let seen = inner.seen.entry(kind).or_default();
        seen.attempts += 1;
        seen.bytes += bytes;
    }

    /// All kinds in order, and how many attempts found no place.
    pub fn list(&self) -> (Vec<(Kind, Seen)>, u64) {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = inner.seen.iter().map(|(kind, seen)| (kind.clone(), *seen)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        (all, inner.untold)
    }
}

#[cfg(test)]
mod tests {
    use super::{Left, MOST, Talks, Verdict};

    #[test]
    fn any_number_of_targets_stays_within_the_list() {
        let talks = Talks::default();
        let left = |host: String| Left {
            namespace: "shop".into(),
            account: "cart".into(),
            host: Some(host.into()),
            address: None,
            port: 443,
            spoken: "TLS",
            claimed: None,
            request: None,
            verdict: Verdict::Denied,
            policy: None,
            rule: None,
        };
        for number in 0..MOST + 10 {
            talks.ended(&left(format!("h{number}")), 7);
        }
        talks.ended(&left("h0".into()), 7);
        let (list, untold) = talks.list();
        assert_eq!((list.len(), untold), (MOST, 10));
        let first = list.iter().find(|(kind, _)| *kind.target == *"h0").map(|(_, seen)| (seen.attempts, seen.bytes));
        assert_eq!(first, Some((2, 14)));
    }
}
