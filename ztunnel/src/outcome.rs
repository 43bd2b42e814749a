//! What happened to a connection, whose fault it was, and whether to try again.
//!
//! One closed enum, and one exhaustive table for each thing derived from it (log code, metric flag, status on the
//! wire), so that a new way to end cannot be forgotten in one of them. The codes are part of the documentation
//! (`docs/reference.md` is generated from [`Code::ALL`]); text for people travels beside the code in [`Outcome`].

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// How a connection ended. Names are stable: they are in logs, metrics and `tulle explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Both sides finished.
    Ok,
    /// A DENY policy matched.
    PolicyDenied,
    /// ALLOW policies apply and none of them matched.
    NotAllowed,
    /// A RequestAuthentication applies, and the request's token is not valid.
    TokenRefused,
    /// The destination takes mutual TLS only, and this was plaintext.
    MtlsRequired,
    /// NetworkPolicies isolate the destination, and none of their rules allows the connection in.
    NetworkPolicyIngress,
    /// NetworkPolicies isolate the source, and none of their rules allows the connection out.
    NetworkPolicyEgress,
    /// A policy that the destination needs has not arrived; nothing is guessed.
    PolicyPending,
    /// A policy change forbade a live connection.
    PolicyChanged,
    /// The namespace may not leave the cluster.
    EgressDenied,
    /// The service has no endpoint to choose from.
    NoEndpoint,
    /// The destination is in another network, whose gateway cannot be used.
    NoNetworkGateway,
    /// Every endpoint of the service is ejected for now.
    Ejected,
    /// A route says that the request goes nowhere: none matches, or its backend is invalid.
    NoRoute,
    /// The destination is reached through a waypoint only, and that cannot be used.
    NoWaypoint,
    /// The destination is reached through an egress gateway only, and none can be used.
    NoGateway,
    /// The next hop refused or could not be reached.
    ConnectFailed,
    /// The next hop did not answer in time.
    ConnectTimeout,
    /// The TLS handshake failed.
    TlsFailed,
    /// The peer proved another identity than the expected one.
    WrongIdentity,
    /// The peer's certificate is in a revocation list.
    CertRevoked,
    /// The peer is of a trust domain whose roots are not known here, or not any more.
    UntrustedDomain,
    /// The HTTP/2 tunnel failed.
    TunnelFailed,
    /// The destination's proxy answered CONNECT with an error.
    TunnelRefused,
    /// There is no certificate for the local identity yet, or none that a rule wants shown to a host outside.
    NoCertificate,
    /// The pod is not known to the mesh yet.
    UnknownWorkload,
    /// A connection to the proxy's own ports, which would loop.
    SelfCall,
    /// A tunnel asked for an address that is not this pod's.
    WrongDestination,
    /// A CONNECT request or a header that cannot be understood.
    BadRequest,
    /// HTTP is needed here, for a policy or because the port is declared to be HTTP, and the bytes are something else.
    NotHttp,
    /// A route's HTTPRateLimit is used up.
    RateLimited,
    /// A traffic policy's limit of connections or requests is reached.
    Overflow,
    /// The pod's budget is used up.
    OverBudget,
    /// Too many TLS handshakes of this source, or to this pod.
    HandshakeLimit,
    /// The client reset the connection.
    ClientReset,
    /// The destination reset the connection.
    ServerReset,
    /// The destination did not answer a request in the time that its route gives it.
    RequestTimeout,
    /// One half was closed and the other side stayed silent for too long.
    HalfOpen,
    /// A traffic policy's idle time or longest duration is over.
    Expired,
    /// This proxy is shutting down and the drain time is over.
    Drained,
    /// The pod went away.
    PodRemoved,
    /// An error of this proxy.
    Internal,
}

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nobody's.
    None,
    /// The client's, or its operator's.
    Client,
    /// The destination's.
    Destination,
    /// A rule that somebody wrote.
    Policy,
    /// The mesh's own.
    Mesh,
}

/// Whether the client should try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Nothing to retry, or the answer will be the same.
    No,
    /// At once.
    Yes,
    /// After a while.
    Later,
}

/// One row of the table below.
struct Row {
    name: &'static str,
    /// `response_flags` label, in Istio's words.
    flag: &'static str,
    /// Status that answers a CONNECT.
    status: u16,
    fault: Fault,
    retry: Retry,
    meaning: &'static str,
}

const fn row(
    name: &'static str,
    flag: &'static str,
    status: u16,
    fault: Fault,
    retry: Retry,
    meaning: &'static str,
) -> Row {
    Row { name, flag, status, fault, retry, meaning }
}

// Rows that take several lines.
const NOT_HTTP: Row = row(
    "NOT_HTTP",
    "DENY",
    400,
    Fault::Client,
    Retry::No,
    "a policy or route needs HTTP here, and the bytes are something else",
);
const NO_ROUTE: Row =
    row("NO_ROUTE", "NR", 404, Fault::Client, Retry::No, "no rule of the Service's routes sends the request anywhere");
const NO_NETWORK_GATEWAY: Row = row(
    "NO_NETWORK_GATEWAY",
    "CONNECT",
    503,
    Fault::Destination,
    Retry::Later,
    "the destination is in another network, whose gateway cannot be used",
);
const REQUEST_TIMEOUT: Row =
    row("REQUEST_TIMEOUT", "UT", 504, Fault::Destination, Retry::Later, "no answer in the time that the route gives");
const TOKEN_REFUSED: Row = row("TOKEN_REFUSED", "-", 401, Fault::Policy, Retry::No, "the request's token is not valid");
const RATE_LIMITED: Row =
    row("RATE_LIMITED", "RL", 429, Fault::Client, Retry::Later, "the route's rate limit is used up");
const OVERFLOW: Row = row(
    "OVERFLOW",
    "UO",
    503,
    Fault::Client,
    Retry::Later,
    "a DestinationRule's limit of connections or requests is reached",
);
const EJECTED: Row = row(
    "EJECTED",
    "UH",
    503,
    Fault::Destination,
    Retry::Later,
    "every endpoint is ejected by the outlierDetection of a DestinationRule",
);
const EXPIRED: Row =
    row("EXPIRED", "DT", 504, Fault::None, Retry::Yes, "the idle time or duration of a DestinationRule is over");
const POLICY_PENDING: Row = row(
    "POLICY_PENDING",
    "DENY",
    503,
    Fault::Mesh,
    Retry::Later,
    "a policy that the destination names has not reached its node",
);
const CONNECT_TIMEOUT: Row = row(
    "CONNECT_TIMEOUT",
    "NETWORK_POLICY",
    503,
    Fault::Destination,
    Retry::Yes,
    "the next hop did not answer in time; maybe a firewall or NetworkPolicy drops port 15008",
);
const WRONG_IDENTITY: Row = row(
    "WRONG_IDENTITY",
    "IDENTITY_ERROR",
    503,
    Fault::Destination,
    Retry::No,
    "the peer proved another identity than the expected one",
);
const TUNNEL_REFUSED: Row = row(
    "TUNNEL_REFUSED",
    "CONNECT",
    503,
    Fault::Destination,
    Retry::No,
    "the destination's proxy answered CONNECT with an error",
);

impl Code {
    /// Every code, in the order of the documentation.
    pub const ALL: &[Self] = &[
        Self::Ok,
        Self::PolicyDenied,
        Self::NotAllowed,
        Self::TokenRefused,
        Self::MtlsRequired,
        Self::NetworkPolicyIngress,
        Self::NetworkPolicyEgress,
        Self::PolicyPending,
        Self::PolicyChanged,
        Self::EgressDenied,
        Self::NoEndpoint,
        Self::NoNetworkGateway,
        Self::Ejected,
        Self::NoRoute,
        Self::NoWaypoint,
        Self::NoGateway,
        Self::ConnectFailed,
        Self::ConnectTimeout,
        Self::TlsFailed,
        Self::WrongIdentity,
        Self::CertRevoked,
        Self::UntrustedDomain,
        Self::TunnelFailed,
        Self::TunnelRefused,
        Self::NoCertificate,
        Self::UnknownWorkload,
        Self::SelfCall,
        Self::WrongDestination,
        Self::BadRequest,
        Self::NotHttp,
        Self::RateLimited,
        Self::Overflow,
        Self::OverBudget,
        Self::HandshakeLimit,
        Self::ClientReset,
        Self::ServerReset,
        Self::RequestTimeout,
        Self::HalfOpen,
        Self::Expired,
        Self::Drained,
        Self::PodRemoved,
        Self::Internal,
    ];

    fn row(self) -> Row {
        use Fault as F;
        use Retry as R;
        match self {
            Self::Ok => row("OK", "-", 200, F::None, R::No, "both sides finished"),
            Self::PolicyDenied => row("POLICY_DENIED", "DENY", 401, F::Policy, R::No, "a DENY policy matched"),
            Self::NotAllowed => {
                row("NOT_ALLOWED", "DENY", 401, F::Policy, R::No, "ALLOW policies apply and none of them matched")
            }
            Self::TokenRefused => TOKEN_REFUSED,
            Self::MtlsRequired => {
                row("MTLS_REQUIRED", "DENY", 401, F::Policy, R::No, "the destination is STRICT and this was plaintext")
            }
            Self::NetworkPolicyIngress => {
                row("NETWORK_POLICY_INGRESS", "DENY", 401, F::Policy, R::No, "no NetworkPolicy lets it in")
            }
            Self::NetworkPolicyEgress => {
                row("NETWORK_POLICY_EGRESS", "DENY", 403, F::Policy, R::No, "no NetworkPolicy lets it out")
            }
            Self::PolicyPending => POLICY_PENDING,
            Self::PolicyChanged => {
                row("POLICY_CHANGED", "DENY", 401, F::Policy, R::No, "a policy change forbade the live connection")
            }
            Self::EgressDenied => {
                row("EGRESS_DENIED", "DENY", 403, F::Policy, R::No, "the namespace may not leave the cluster")
            }
            Self::NoEndpoint => {
                row("NO_ENDPOINT", "CONNECT", 503, F::Destination, R::Later, "the service has no usable endpoint")
            }
            Self::NoNetworkGateway => NO_NETWORK_GATEWAY,
            Self::Ejected => EJECTED,
            Self::NoRoute => NO_ROUTE,
            Self::NoWaypoint => row("NO_WAYPOINT", "CONNECT", 503, F::Destination, R::Later, "no usable waypoint"),
            Self::NoGateway => row("NO_GATEWAY", "CONNECT", 503, F::Destination, R::Later, "no usable egress gateway"),
            Self::ConnectFailed => {
                row("CONNECT_FAILED", "CONNECT", 503, F::Destination, R::Yes, "the next hop refused or is unreachable")
            }
            Self::ConnectTimeout => CONNECT_TIMEOUT,
            Self::TlsFailed => {
                row("TLS_FAILED", "TLS_FAILURE", 503, F::Destination, R::Later, "the TLS handshake failed")
            }
            Self::WrongIdentity => WRONG_IDENTITY,
            Self::CertRevoked => {
                row("CERT_REVOKED", "CERT_REVOKED", 401, F::Policy, R::Later, "the peer's certificate was taken back")
            }
            Self::UntrustedDomain => {
                row("UNTRUSTED_DOMAIN", "IDENTITY_ERROR", 401, F::Policy, R::No, "its trust domain is not believed")
            }
            Self::TunnelFailed => {
                row("TUNNEL_FAILED", "H2_HANDSHAKE_FAILURE", 503, F::Destination, R::Yes, "the HTTP/2 tunnel failed")
            }
            Self::TunnelRefused => TUNNEL_REFUSED,
            Self::NoCertificate => {
                row("NO_CERTIFICATE", "IDENTITY_ERROR", 503, F::Mesh, R::Later, "the local identity has no certificate")
            }
            Self::UnknownWorkload => {
                row("UNKNOWN_WORKLOAD", "CONNECT", 503, F::Mesh, R::Later, "control has not described the pod yet")
            }
            Self::SelfCall => row("SELF_CALL", "DENY", 503, F::Client, R::No, "a connection to the proxy's own port"),
            Self::WrongDestination => {
                row("WRONG_DESTINATION", "DENY", 400, F::Client, R::No, "the tunnel asked for another pod's address")
            }
            Self::BadRequest => {
                row("BAD_REQUEST", "DENY", 400, F::Client, R::No, "a request that is not valid, or frames without end")
            }
            Self::NotHttp => NOT_HTTP,
            Self::RateLimited => RATE_LIMITED,
            Self::Overflow => OVERFLOW,
            Self::OverBudget => row("OVER_BUDGET", "DENY", 429, F::Client, R::Later, "the pod's budget is used up"),
            Self::HandshakeLimit => {
                row("HANDSHAKE_LIMIT", "DENY", 429, F::Client, R::Later, "too many TLS handshakes with the pod")
            }
            Self::ClientReset => row("CLIENT_RESET", "-", 499, F::Client, R::No, "the client reset the connection"),
            Self::ServerReset => {
                row("SERVER_RESET", "-", 502, F::Destination, R::No, "the destination reset the connection")
            }
            Self::RequestTimeout => REQUEST_TIMEOUT,
            Self::HalfOpen => row("HALF_OPEN", "-", 504, F::Destination, R::No, "half closed, and silent for too long"),
            Self::Expired => EXPIRED,
            Self::Drained => row("DRAINED", "-", 503, F::Mesh, R::Yes, "the proxy shut down"),
            Self::PodRemoved => row("POD_REMOVED", "-", 503, F::None, R::No, "the pod went away or left the mesh"),
            Self::Internal => row("INTERNAL", "CONNECT", 500, F::Mesh, R::Later, "an error of the proxy itself"),
        }
    }

    /// Name in logs and answers, `POLICY_DENIED`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The `response_flags` label, in the words of Istio's dashboards.
    pub fn flag(self) -> &'static str {
        self.row().flag
    }

    /// HTTP status that answers a CONNECT.
    pub fn status(self) -> http::StatusCode {
        http::StatusCode::from_u16(self.row().status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Whose fault it was.
    pub fn fault(self) -> Fault {
        self.row().fault
    }

    /// Whether to try again.
    pub fn retry(self) -> Retry {
        self.row().retry
    }

    /// One line for the reference.
    pub fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// True for ends that are nobody's failure and are logged as completions.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Ok)
    }

    /// The code of a name, as it came in another proxy's answer.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.name() == name)
    }
}

/// What a dry-run policy would have done, or an AUDIT does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WouldBe {
    /// A rule of a DENY policy matched.
    Denied,
    /// A rule of an ALLOW policy matched.
    Allowed,
    /// An ALLOW policy, and none of its rules matched.
    NotAllowed,
    /// A rule of an AUDIT policy matched.
    Audited,
}

/// What one policy says that has no effect: a dry run, or an AUDIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    /// `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// Index of the rule that matched.
    pub rule: Option<usize>,
    /// What it would have done.
    pub would_be: WouldBe,
}

impl WouldBe {
    /// In logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Allowed => "allowed",
            Self::NotAllowed => "not-allowed",
            Self::Audited => "audited",
        }
    }
}

impl DryRun {
    /// What AUDIT policies say, each as one text, and what those would have done that are only tried.
    pub fn texts<'a>(all: impl Iterator<Item = &'a Self>) -> (Vec<String>, Vec<String>) {
        let (audited, tried): (Vec<_>, Vec<_>) = all.partition(|one| one.would_be == WouldBe::Audited);
        let texts = |list: Vec<&Self>| list.into_iter().map(ToString::to_string).collect();
        (texts(audited), texts(tried))
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.policy, self.would_be.word())?;
        match self.rule {
            Some(rule) => write!(f, " by rules[{rule}]"),
            None => Ok(()),
        }
    }
}

/// The end of a connection: code, text, and the policy that decided, if one did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What happened.
    pub code: Code,
    /// One sentence with the particulars: addresses, identities, system errors.
    pub detail: Cow<'static, str>,
    /// `<namespace>/<name>` of the policy that decided.
    pub policy: Option<Arc<str>>,
    /// Index of its rule, from 0.
    pub rule: Option<usize>,
    /// What policies without effect say.
    pub dry_run: Vec<DryRun>,
}

impl Outcome {
    /// An end without a policy.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: detail.into(), policy: None, rule: None, dry_run: Vec::new() }
    }

    /// Both sides finished.
    pub fn ok() -> Self {
        Self::new(Code::Ok, "")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.name())?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Outcome {}

/// The error chain of `error` in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::Code;
    use std::collections::HashSet;

    #[test]
    fn every_code_has_its_own_name_and_a_meaning() {
        let names: HashSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(!code.meaning().is_empty());
            assert_eq!(Code::from_name(code.name()), Some(*code));
        }
    }
}
