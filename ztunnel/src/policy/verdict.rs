//! What authorization decided, why, and the sentence that says so to people.
//!
//! A verdict owns what it names, so that it outlives the snapshot it was made from: it goes into logs and answers to
//! control. Text is made on demand, because most verdicts are never printed.

use std::fmt;
use std::sync::Arc;

use crate::outcome::DryRun;

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// A rule of an ALLOW policy matched.
    Allowed,
    /// No ALLOW policy applies and no DENY policy matched.
    NoPolicy,
    /// A rule of a DENY policy matched.
    PolicyDenied,
    /// ALLOW policies apply and none of them matched.
    NotAllowed,
    /// The destination takes mutual TLS only (PeerAuthentication STRICT), and this was plaintext.
    MtlsRequired,
    /// A policy that the destination needs has not arrived.
    PolicyPending,
}

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the connection may be made.
    pub allowed: bool,
    /// Why.
    pub code: Code,
    /// The policy that decided, or the one that is missing. With [`Code::NotAllowed`]: the first of those that did not.
    pub policy: Option<Arc<str>>,
    /// Index of the rule that matched, from 0.
    pub rule: Option<usize>,
    /// With [`Code::NotAllowed`]: how many ALLOW policies did not match.
    pub allow_policies: usize,
    /// The deciding policy stands in for one that could not be read, for this reason.
    pub stand_in: Option<Arc<str>>,
    /// What policies without effect say: dry runs and AUDIT.
    pub dry_run: Vec<DryRun>,
}

impl Verdict {
    /// One sentence naming policy and rule.
    pub fn text(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = self.policy.as_deref().unwrap_or("(none)");
        let rule = self.rule.unwrap_or_default();
        match (self.code, &self.stand_in) {
            (Code::Allowed, _) => write!(f, "allowed by policy {policy}, rules[{rule}]"),
            (Code::NoPolicy, _) => f.write_str("allowed: no ALLOW policy applies and no DENY policy matches"),
            (_, Some(reason)) => {
                write!(f, "denied: policy {policy} cannot be read and denies all until it is corrected: {reason}")
            }
            (Code::PolicyDenied, None) => write!(f, "denied by policy {policy}, rules[{rule}]"),
            (Code::NotAllowed, None) => match self.allow_policies {
                0 | 1 => write!(f, "denied: ALLOW policy {policy} applies and none of its rules match"),
                many => write!(f, "denied: {many} ALLOW policies apply ({policy} first) and none of their rules match"),
            },
            (Code::MtlsRequired, None) => write!(
                f,
                "denied by policy {policy}, rules[{rule}]: the destination takes mutual TLS only (PeerAuthentication \
                 STRICT) and the client sent plaintext; enrol the client, or the ingress that it comes through, or \
                 make the port PERMISSIVE with portLevelMtls"
            ),
            (Code::PolicyPending, None) => match &self.policy {
                Some(policy) => write!(f, "refused for now: policy {policy} of the destination has not arrived; retry"),
                None => f.write_str("refused for now: the policies of the mesh have not arrived from control; retry"),
            },
        }
    }
}
