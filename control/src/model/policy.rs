//! Who may talk to whom, as users wrote it, with every address and port already checked.
//!
//! A policy whose spec cannot be read keeps its name and, if that much was readable, its target, so that translation
//! can put a denial in its place; dropping it would fail open. Parts that only a request shows are kept by the name of the
//! field too: a connection cannot be judged by them.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::model::meta::Meta;
use crate::model::meta::Selector;

/// What could be read of a policy's spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec<T> {
    /// All of it.
    Good(T),
    /// Not all, so it must fail closed.
    Unreadable {
        /// What it applies to; `None` if not even that could be read: the whole namespace.
        target: Option<Target>,
        /// The first error.
        reason: String,
    },
}

/// What a policy applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The whole namespace, or the mesh for one in the root namespace.
    Everything,
    /// Pods by label.
    Pods(Selector),
    /// The pods behind these services of the policy's namespace (targetRefs of kind Service).
    Services(Vec<String>),
    /// Nothing that a node proxy serves (targetRefs to gateways).
    Nothing,
}

/// Istio's AuthorizationPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Name.
    pub meta: Meta,
    /// Target, action and rules.
    pub spec: Spec<AuthorizationSpec>,
    /// It changes no verdict, so it needs no denial in its place either: `action: AUDIT` or `istio.io/dry-run: "true"`.
    pub without_effect: bool,
}

/// Its spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationSpec {
    /// What it applies to.
    pub target: Target,
    /// What a match does.
    pub action: Action,
    /// Any may match. None: never matches.
    pub rules: Vec<Rule>,
}

/// What a match does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Allows.
    Allow,
    /// Denies, before any ALLOW.
    Deny,
    /// Records what matches; changes no verdict.
    Audit,
    /// Would ask an external authorizer; not supported.
    Custom,
}

/// All present parts must hold. Without any part: always matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// Any source; empty: not restricted.
    pub from: Vec<Source>,
    /// Any operation; empty: not restricted.
    pub to: Vec<Operation>,
    /// Every condition.
    pub when: Vec<When>,
}

/// Values that must match and values that must not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare<T> {
    /// Any must match, unless empty.
    pub any: Vec<T>,
    /// None may match.
    pub none: Vec<T>,
}

impl<T> Default for Compare<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> Compare<T> {
    /// True if it says nothing.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

/// `exact`, `prefix*`, `*suffix`, `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// The whole text.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Any non-empty text.
    Present,
}

/// rules[].from[].source: every non-empty field must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// SPIFFE ids without scheme.
    pub principals: Compare<TextMatch>,
    /// Namespaces of the identity.
    pub namespaces: Compare<TextMatch>,
    /// (namespace, account) of the identity.
    pub service_accounts: Compare<(String, String)>,
    /// Addresses of the source.
    pub ip_blocks: Compare<IpNet>,
    /// Fields that L4 cannot evaluate.
    pub http: Vec<HttpField>,
    /// Their names.
    pub beyond_l4: Vec<String>,
}

/// rules[].to[].operation: every non-empty field must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Operation {
    /// Ports of the workload.
    pub ports: Compare<u16>,
    /// Fields that L4 cannot evaluate.
    pub http: Vec<HttpField>,
    /// Their names.
    pub beyond_l4: Vec<String>,
}

/// What of a request is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpField {
    /// hosts, lower case.
    Hosts(Compare<TextMatch>),
    /// methods.
    Methods(Compare<TextMatch>),
    /// paths.
    Paths(Compare<PathPattern>),
    /// requestPrincipals, request.auth.principal.
    RequestPrincipals(Compare<TextMatch>),
    /// request.auth.audiences.
    Audiences(Compare<TextMatch>),
    /// request.auth.presenter.
    Presenters(Compare<TextMatch>),
    /// request.headers[…], lower case.
    Header(String, Compare<TextMatch>),
    /// request.auth.claims[…], from the outermost inwards.
    Claim(Vec<String>, Compare<TextMatch>),
    /// remoteIpBlocks, remote.ip.
    RemoteIps(Compare<IpNet>),
    /// trustDomains, source.trustDomain.
    TrustDomains(Compare<TextMatch>),
}

/// Which paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathPattern {
    /// As text.
    Text(TextMatch),
    /// With `{*}` for one element and, at the end, `{**}` for the rest.
    Template(String),
}

/// rules[].when[].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct When {
    /// What is compared, with its values.
    pub key: ConditionKey,
}

/// The attributes that `when` knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConditionKey {
    /// source.ip
    SourceIp(Compare<IpNet>),
    /// source.namespace
    SourceNamespace(Compare<TextMatch>),
    /// source.principal
    SourcePrincipal(Compare<TextMatch>),
    /// source.serviceAccount
    SourceServiceAccount(Compare<(String, String)>),
    /// destination.ip
    DestinationIp(Compare<IpNet>),
    /// destination.port
    DestinationPort(Compare<u16>),
    /// A key that only a request shows, by name.
    Http(String, HttpField),
    /// A known key that nothing here can evaluate, by name.
    BeyondL4(String),
}

/// Istio's PeerAuthentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Name.
    pub meta: Meta,
    /// Target and modes.
    pub spec: Spec<PeerAuthenticationSpec>,
}

/// Its spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuthenticationSpec {
    /// Everything or pods by label.
    pub target: Target,
    /// Mode of all ports.
    pub mode: MtlsMode,
    /// Modes of single workload ports.
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// Whether plaintext is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtlsMode {
    /// As the next wider policy says.
    Unset,
    /// Plaintext is accepted. DISABLE means the same here.
    Permissive,
    /// It is not.
    Strict,
}

/// An object of a kind that is read but not enforced yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unenforced {
    /// Its kind.
    pub kind: &'static str,
    /// Name.
    pub meta: Meta,
}
