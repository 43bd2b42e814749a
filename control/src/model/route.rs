//! HTTPRoute and GRPCRoute (gateway.networking.k8s.io/v1) as users wrote them, with every value already checked.
//!
//! References are kept as they were written: a status repeats them to the letter. A rule with a value that cannot be used is
//! kept with the reason, because dropping it would send its requests to another rule, or past all of them.

use crate::model::meta::Meta;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    /// HTTPRoute.
    Http,
    /// GRPCRoute.
    Grpc,
}

impl RouteKind {
    /// Kind as written in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
        }
    }
}

/// An HTTPRoute or GRPCRoute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// What was written.
    pub kind: RouteKind,
    /// Name.
    pub meta: Meta,
    /// Whose traffic it decides.
    pub parents: Vec<ParentRef>,
    /// In the order of the object.
    pub rules: Vec<RouteRule>,
}

/// parentRefs[], as written.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentRef {
    /// group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// name.
    pub name: String,
    /// sectionName.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl ParentRef {
    /// Whether it is a Service, and so of the mesh.
    pub fn is_service(&self) -> bool {
        let group = self.group.as_deref();
        self.kind.as_deref() == Some("Service") && matches!(group, Some("" | "core"))
    }
}

/// One rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteRule {
    /// name, else empty.
    pub name: String,
    /// Any of them; empty: everything.
    pub matches: Vec<RouteMatch>,
    /// In the order of the object.
    pub filters: Vec<RouteFilter>,
    /// Who gets its requests.
    pub backends: Vec<BackendRef>,
    /// timeouts.request, milliseconds; 0: none.
    pub request_timeout_ms: u32,
    /// timeouts.backendRequest, milliseconds; 0: none.
    pub backend_timeout_ms: u32,
    /// retry.
    pub retry: Option<RouteRetry>,
    /// sessionPersistence.
    pub session: Option<RouteSession>,
    /// A value that cannot be used, with its field.
    pub problem: Option<String>,
}

/// sessionPersistence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteSession {
    /// sessionName, or one made of the route's and the rule's.
    pub name: String,
    /// type Header; otherwise Cookie.
    pub header: bool,
    /// cookieConfig.lifetimeType Permanent.
    pub permanent: bool,
    /// absoluteTimeout; 0: none.
    pub absolute_ms: u32,
    /// idleTimeout; 0: none.
    pub idle_ms: u32,
}

/// All that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteMatch {
    /// HTTP: the path.
    pub path: Option<PathMatch>,
    /// HTTP: the method; empty: any.
    pub method: String,
    /// Headers.
    pub headers: Vec<(String, Wanted)>,
    /// HTTP: parameters of the query.
    pub query: Vec<(String, Wanted)>,
    /// gRPC: service, method, and whether both are regular expressions.
    pub grpc: Option<(String, String, bool)>,
}

/// Which paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// This one.
    Exact(String),
    /// What begins with these elements.
    Prefix(String),
    /// A regular expression of the whole.
    Regex(String),
}

/// Which values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// This one.
    Exact(String),
    /// A regular expression of the whole.
    Regex(String),
}

/// One filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteFilter {
    /// To the request's headers.
    RequestHeaders(HeaderChanges),
    /// To the response's headers.
    ResponseHeaders(HeaderChanges),
    /// The client goes elsewhere.
    Redirect {
        /// Scheme; empty: as the request.
        scheme: String,
        /// Host; empty: as the request.
        hostname: String,
        /// Port.
        port: Option<u16>,
        /// Path.
        path: Option<PathChange>,
        /// Status.
        status: u16,
    },
    /// To host and path.
    Rewrite {
        /// Host; empty: as the request.
        hostname: String,
        /// Path.
        path: Option<PathChange>,
    },
    /// A copy goes to this backend.
    Mirror {
        /// Who.
        to: BackendRef,
        /// Numerator and denominator of the share of requests.
        share: (u32, u32),
    },
    /// Which pages of other origins may use it.
    Cors(Cors),
    /// An object of `tulle.dev` in the route's namespace: kind and name.
    Extension {
        /// Group.
        group: String,
        /// Kind.
        kind: String,
        /// Name.
        name: String,
    },
}

/// Which pages of other origins may use the rule, and how. A list of `*`: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cors {
    /// `scheme://host`, perhaps with a port, perhaps with a `*` before the host's end.
    pub origins: Vec<String>,
    /// With cookies and the like.
    pub credentials: bool,
    /// Besides those that are always allowed.
    pub methods: Vec<String>,
    /// Of requests.
    pub headers: Vec<String>,
    /// Of answers.
    pub expose: Vec<String>,
    /// For how long browsers keep what they were told, seconds.
    pub max_age: u32,
}

/// Header changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// In the place of what is there.
    pub set: Vec<(String, String)>,
    /// Besides what is there.
    pub add: Vec<(String, String)>,
    /// Taken out.
    pub remove: Vec<String>,
}

/// Another path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathChange {
    /// In the place of all of it.
    Full(String),
    /// In the place of the prefix that matched.
    Prefix(String),
}

/// backendRefs[], or the backend of a mirror.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackendRef {
    /// group; empty: core.
    pub group: String,
    /// kind.
    pub kind: String,
    /// namespace; empty: the route's.
    pub namespace: String,
    /// name.
    pub name: String,
    /// port.
    pub port: Option<u16>,
    /// weight.
    pub weight: u32,
    /// filters.
    pub filters: Vec<RouteFilter>,
}

/// retry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteRetry {
    /// attempts.
    pub attempts: u32,
    /// codes.
    pub codes: Vec<u16>,
    /// backoff, milliseconds.
    pub backoff_ms: u32,
}

/// tulle.dev HTTPFault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpFault {
    /// Name.
    pub meta: Meta,
    /// Milliseconds, and share in millionths.
    pub delay: Option<(u32, u32)>,
    /// HTTP status or 0, gRPC status or 0, and share in millionths.
    pub abort: Option<(u16, u32, u32)>,
}

/// tulle.dev HTTPRateLimit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRateLimit {
    /// Name.
    pub meta: Meta,
    /// So many ...
    pub requests: u32,
    /// ... in so many milliseconds.
    pub interval_ms: u32,
    /// At once; 0: as `requests`.
    pub burst: u32,
    /// Counted for each client identity by itself.
    pub per_identity: bool,
}
