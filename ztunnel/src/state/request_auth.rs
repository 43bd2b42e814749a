//! A RequestAuthentication in the form that is evaluated: which tokens are valid, and where they are looked for.
//!
//! Keys are kept as the JWK Set that control sent, already read; `policy::jwt` verifies with them. One that cannot be read
//! refuses every token, and lets requests without any pass, as one without a valid rule would.

use std::sync::Arc;

use http::HeaderName;
use jsonwebtoken::jwk::JwkSet;

/// Beginning of the resource name, before `<namespace>/<name>`.
pub const REQUEST_AUTHENTICATION: &str = "RequestAuthentication/";

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuth {
    /// Resource name, `RequestAuthentication/<namespace>/<name>`.
    pub id: Arc<str>,
    /// Version of the resource as control named it, or of the rejected resource that a stand-in stands for.
    pub version: Arc<str>,
    /// Issuers.
    pub rules: Vec<JwtRule>,
    /// Why it cannot be read; then it has no rules, and every token is refused.
    pub unreadable: Option<Arc<str>>,
}

/// Tokens of one issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    /// Claim `iss`.
    pub issuer: Arc<str>,
    /// One of them must be in `aud`. Empty: not looked at.
    pub audiences: Vec<Arc<str>>,
    /// What they are signed with. None: every token of the issuer is refused.
    pub keys: Arc<JwkSet>,
    /// Headers, with what stands before the token.
    pub from_headers: Vec<(HeaderName, Arc<str>)>,
    /// Parameters of the query.
    pub from_params: Vec<Arc<str>>,
    /// Cookies.
    pub from_cookies: Vec<Arc<str>>,
    /// The application sees the token.
    pub forward: bool,
    /// Gets the payload, base64url.
    pub payload_header: Option<HeaderName>,
    /// Get claims, by the names from the outermost inwards.
    pub claim_headers: Vec<(HeaderName, Vec<Arc<str>>)>,
}
