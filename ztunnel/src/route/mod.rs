//! From a request and the routes of a Service port to a plan without choices: pure functions, asked by the data path and by
//! `tulle explain` alike.
//!
//! [`find`] walks the candidates, which the snapshot keeps in Gateway API's order of precedence, and gives the first whose
//! match holds. [`Found::plan`] then says what becomes of the request: forward, redirect or respond. Chance is an argument,
//! the turn of the rule ([`crate::state::Turns`]): which backend it means is computed ([`share`]), so that a share of 1 % is
//! ten of any 1,000 turns, whichever worker takes them. Paths are compared as [`path::normalise`] makes them, which is also
//! what authorization compares and what the backend gets to see.
//!
//! ```text
//! let path = path::normalise(uri.path())?;                                         // 400
//! let candidates = snapshot.routes_for(service, port, client_namespace)?;          // None: bytes
//! let found = route::find(candidates, &facts);                                     // None: NO_ROUTE, 404
//! found.limits()                                                                   // 429
//! match found.plan(&facts, found.rule().turns.take()) { Forward(..) | Redirect(..) | Respond(..) }
//! forward.on_request(&mut parts.headers); forward.on_response(&mut response.headers);
//! ```

mod change;
mod cors;
mod find;
pub mod path;
mod plan;
pub mod session;
pub mod share;
#[cfg(test)]
mod tests;

pub use change::split_authority;
pub use cors::Granted;
pub use find::{Found, RequestFacts, find};
pub use plan::{Forward, NO_ROUTE, Preflight, Reason, Redirection, Respond, RoutePlan, grpc_of};
