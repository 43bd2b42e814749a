//! A route in the form that is carried out: an HTTPRoute or GRPCRoute with every reference resolved and every pattern made.
//!
//! Nothing in here is parsed again for a request. Which rule a request gets, and what becomes of it, is decided by `route`.
//! Limits: a regular expression that would need more memory than [`Pattern`] allows makes its rule a broken one, which answers
//! 500; a rule is never left out, because what it was written to catch would go somewhere else.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use regex::{Regex, RegexBuilder};

/// Beginning of the resource name of an HTTPRoute, before `<namespace>/<name>`.
pub const HTTP_ROUTE: &str = "HTTPRoute/";
/// The same for a GRPCRoute.
pub const GRPC_ROUTE: &str = "GRPCRoute/";

/// Names a Service as its resource does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Fully qualified host name.
    pub hostname: Arc<str>,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// HTTPRoute.
    Http,
    /// GRPCRoute.
    Grpc,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Route {
    /// Resource name, `<Kind>/<namespace>/<name>`.
    pub id: Arc<str>,
    /// Version of the resource as control named it.
    pub version: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// What was written.
    pub kind: RouteKind,
    /// When it was created, Unix seconds.
    pub created: i64,
    /// Whose traffic it decides.
    pub parents: Vec<RouteParent>,
    /// In the order of the object.
    pub rules: Vec<RouteRule>,
}

/// Ports of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteParent {
    /// The Service.
    pub service: ServiceName,
    /// Its ports.
    pub ports: Vec<u16>,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// Its name, else empty.
    pub name: Arc<str>,
    /// Any of them; never empty.
    pub matches: Vec<RouteMatch>,
    /// What is done to its requests.
    pub filters: Filters,
    /// Who gets its requests.
    pub backends: Vec<Backend>,
    /// Until the response has ended, with all retries. `None`: no limit.
    pub request_timeout: Option<Duration>,
    /// Until the response to one attempt has ended. `None`: no limit.
    pub backend_timeout: Option<Duration>,
    /// Whether to try again.
    pub retry: Option<Retry>,
    /// Clients keep the backend and the endpoint that they had.
    pub session: Option<SessionRule>,
    /// Why it cannot be carried out: its requests are answered 500.
    pub broken: Option<Arc<str>>,
    /// Whose turn it is: one count for the node, which survives edits of the route.
    pub turns: Arc<Turns>,
}

impl RouteRule {
    /// What a rule is known by when the route is edited: its name, or else its place.
    pub fn key(&self, index: usize) -> String {
        if self.name.is_empty() { format!("[{index}]") } else { self.name.to_string() }
    }
}

/// Counts the requests of one rule on this node, over all workers.
#[derive(Debug, Default)]
pub struct Turns(AtomicU64);

impl Turns {
    /// Begins anywhere: where, is the phase of the node. Kept below 2^48, so that no node ever reaches the end.
    pub fn starting_at(phase: u64) -> Self {
        Self(AtomicU64::new(phase >> 16))
    }

    /// Begins where this node does for a rule: nodes begin in different places, so that a small share is met somewhere
    /// soon, and each in the same place after every restart.
    pub fn of(node: &str, route: &str, rule: &str) -> Self {
        // FNV-1a, and a last step that spreads it over all bits.
        let bytes = [node, "/", route, "/", rule].into_iter().flat_map(str::bytes);
        let hash = bytes
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        Self::starting_at(hash ^ hash >> 33)
    }

    /// The next turn. Nobody else gets it.
    pub fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// The turn that the next request would get: for explanations.
    pub fn peek(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteMatch {
    /// Of the normalised path.
    pub path: PathMatch,
    /// `None`: every method.
    pub method: Option<Arc<str>>,
    /// Each must be there, once for each name.
    pub headers: Vec<(HeaderName, Wanted)>,
    /// Each must be there, once for each name.
    pub query: Vec<(Arc<str>, Wanted)>,
}

/// Which paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PathMatch {
    /// All: a prefix of `/`.
    #[default]
    Any,
    /// This one.
    Exact(Arc<str>),
    /// These elements and what is below them. Without a final slash; not empty.
    Prefix(Arc<str>),
    /// All of it.
    Regex(Pattern),
    /// `/<service>/<method>`. `None`: any. Not both are `None`.
    Grpc {
        /// The first element.
        service: Option<Wanted>,
        /// The second and last.
        method: Option<Wanted>,
    },
}

/// Which values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This one.
    Exact(Arc<str>),
    /// All of it.
    Regex(Pattern),
}

impl Wanted {
    /// Whether `value` is one of them.
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *value,
            Self::Regex(pattern) => pattern.matches(value),
        }
    }
}

/// A regular expression of the whole of a text. Equal if it is written equally. `None`: what was written cannot be used;
/// then every text is one that it may have meant.
#[derive(Clone)]
pub struct Pattern(Option<Regex>);

impl Pattern {
    /// Memory of a compiled expression and of its lazily built automaton. There are at most 128 matches in a route, of
    /// which tenants write many; and what people write needs some kilobytes.
    const MAX_BYTES: usize = 256 * 1024;

    /// # Errors
    /// What is wrong with the expression, in one line.
    pub fn new(text: &str) -> Result<Self, String> {
        RegexBuilder::new(&format!("^(?:{text})$"))
            .size_limit(Self::MAX_BYTES)
            .dfa_size_limit(Self::MAX_BYTES)
            .build()
            .map(|regex| Self(Some(regex)))
            .map_err(|error| error.to_string().lines().last().unwrap_or_default().to_owned())
    }

    /// For a rule that is broken because its expression is: whatever it may have meant must not go to another rule.
    pub fn unclear() -> Self {
        Self(None)
    }

    /// Whether all of `value` is as described. Takes time in proportion to its length.
    pub fn matches(&self, value: &str) -> bool {
        self.0.as_ref().is_none_or(|regex| regex.is_match(value))
    }

    /// As it was written, with what anchors it; empty: it cannot be used.
    pub fn as_str(&self) -> &str {
        self.0.as_ref().map_or("", Regex::as_str)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.as_str())
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Pattern {}

/// What is done to the requests of a rule, or of one backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filters {
    /// To the request's headers.
    pub request: HeaderChanges,
    /// To the response's headers.
    pub response: HeaderChanges,
    /// Answers in the place of a backend. Rules only.
    pub redirect: Option<Redirect>,
    /// To host and path.
    pub rewrite: Option<Rewrite>,
    /// Who gets copies.
    pub mirrors: Vec<Mirror>,
    /// What goes wrong on purpose.
    pub fault: Option<Fault>,
    /// What may come.
    pub limits: Vec<RateLimit>,
    /// Which pages of other origins may use it. Rules only.
    pub cors: Option<Arc<Cors>>,
}

/// Which pages of other origins may use a rule, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cors {
    /// `*`, or `scheme://host`, perhaps with a port, perhaps with a `*` before the host's end.
    pub origins: Vec<Arc<str>>,
    /// With cookies and the like.
    pub credentials: bool,
    /// Methods. `None`: nothing is said.
    pub methods: Option<Listed>,
    /// Headers of requests.
    pub headers: Option<Listed>,
    /// Headers of answers.
    pub expose: Option<Listed>,
    /// For how long browsers keep what they were told, seconds.
    pub max_age: u32,
}

/// A list as a header says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listed {
    /// Written as `*`.
    All,
    /// With commas between.
    These(HeaderValue),
}

/// Applied in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// In the place of what is there.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Besides what is there.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Taken out.
    pub remove: Vec<HeaderName>,
}

/// Where the client is sent. `None`: as the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// Host.
    pub hostname: Option<Arc<str>>,
    /// Port.
    pub port: Option<u16>,
    /// Path.
    pub path: Option<PathChange>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// What the backend gets to see. `None`: as the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Host.
    pub hostname: Option<Arc<str>>,
    /// Path.
    pub path: Option<PathChange>,
}

/// Another path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathChange {
    /// In the place of all of it.
    Full(Arc<str>),
    /// In the place of the prefix that matched.
    Prefix(Arc<str>),
}

/// Who gets a copy of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The Service.
    pub service: ServiceName,
    /// Its port.
    pub port: u16,
    /// Of this share of the requests: numerator and denominator, which is not 0.
    pub share: (u32, u32),
}

/// What goes wrong on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How long, and of how many requests, in millionths.
    pub delay: Option<(Duration, u32)>,
    /// With what, and how many requests, in millionths.
    pub abort: Option<(Abort, u32)>,
}

/// An answer in the place of the backend's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// HTTP status.
    Http(u16),
    /// gRPC status.
    Grpc(u32),
}

/// How much may come, counted on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// All rules that name it share its count.
    pub name: Arc<str>,
    /// So many ...
    pub requests: u32,
    /// ... in this time.
    pub interval: Duration,
    /// May come at once.
    pub burst: u32,
    /// Counted for each client identity by itself.
    pub per_identity: bool,
}

/// Who gets requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The Service.
    pub service: ServiceName,
    /// Its port.
    pub port: u16,
    /// Its share is its weight over the sum of all.
    pub weight: u32,
    /// Besides those of the rule.
    pub filters: Filters,
    /// Why there is nobody: its share is answered 500.
    pub invalid: Option<Arc<str>>,
}

/// How clients are known that keep their endpoint, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRule {
    /// Name of the cookie.
    pub cookie: Option<Arc<str>>,
    /// Name of the header, where there is no cookie.
    pub header: Option<HeaderName>,
    /// The cookie outlasts the client's own session.
    pub permanent: bool,
    /// Since it began.
    pub absolute: Option<Duration>,
    /// Since it was used.
    pub idle: Option<Duration>,
}

/// When to try again. Failures to connect count always.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Beyond the first; at least 1.
    pub attempts: u32,
    /// After these statuses.
    pub codes: Vec<u16>,
    /// At least so long between two attempts.
    pub backoff: Duration,
    /// Also what is not idempotent, after the backend may have seen the request.
    pub any_method: bool,
}
