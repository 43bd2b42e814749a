//! The HTTP form of an authorization policy, for one request at a time: the plain rules of `Policy` are what is left of it
//! where bytes are not HTTP.
//!
//! The rules have the same places as the plain ones, so an index means the same to its author. See `HttpAuthorization` in
//! `tulle_mesh.proto` for the algebra; `policy::http` carries it out.

use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;

use crate::state::{Match, StringMatch};

/// Matches if all clauses do; without clauses, always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpRule {
    /// Each matches if any of its matches does.
    pub clauses: Vec<Vec<HttpMatch>>,
}

/// Holds if everything that is given holds; with nothing given, never.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpMatch {
    /// What the connection shows.
    pub connection: Match,
    /// Host or :authority, lower case.
    pub hosts: Group<StringMatch>,
    /// Methods.
    pub methods: Group<StringMatch>,
    /// Of the normalised path, without the query.
    pub paths: Group<PathPattern>,
    /// `<iss>/<sub>` of the token.
    pub request_principals: Group<StringMatch>,
    /// Of the token.
    pub audiences: Group<StringMatch>,
    /// Claim `azp` of the token.
    pub presenters: Group<StringMatch>,
    /// Each for itself.
    pub headers: Vec<(HeaderName, Group<StringMatch>)>,
    /// Each for itself, by the names from the outermost inwards.
    pub claims: Vec<(Vec<Arc<str>>, Group<StringMatch>)>,
    /// Address of the client.
    pub remote_ips: Group<IpNet>,
    /// Of the proven identity.
    pub trust_domains: Group<StringMatch>,
}

/// Any of the first, if there are any, and none of the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group<T> {
    /// Any must hit, unless empty.
    pub any: Vec<T>,
    /// None may hit.
    pub none: Vec<T>,
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> Group<T> {
    /// It says nothing.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }

    /// Whether it holds for what `hits` says of each value.
    pub fn holds(&self, hits: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&hits)) && !self.none.iter().any(&hits)
    }
}

/// Which paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPattern {
    /// As text.
    Text(StringMatch),
    /// Element by element.
    Template(Vec<Element>),
}

/// One element of a template, between slashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Element {
    /// This one.
    Exact(Arc<str>),
    /// `{*}`: any one that is not empty.
    One,
    /// `{**}`: all that follow, also none. The last one.
    Rest,
}
