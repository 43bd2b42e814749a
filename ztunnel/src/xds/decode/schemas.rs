//! The fields of routes, traffic policies and request authentications that this version knows, to find those of a later one.
//!
//! Control may be a version ahead of a node. A match, a limit or a condition that an older node skipped would send requests
//! where nobody meant them to go, so a skipped field is found and counted against what it is part of. `skew.rs` fails when a field
//! of the protocol is missing here.

use crate::xds::wire::{Schema, unknown_fields};

const SERVICE: Schema = Schema { scalars: &[1, 2], messages: &[] };
const PARENT: Schema = Schema { scalars: &[2], messages: &[(1, &SERVICE)] };
/// A message of two or three values.
const VALUE: Schema = Schema { scalars: &[1, 2, 3], messages: &[] };
const MATCH: Schema = Schema { scalars: &[2], messages: &[(1, &VALUE), (3, &VALUE), (4, &VALUE), (5, &VALUE)] };
const HEADER: Schema = Schema { scalars: &[1, 2], messages: &[] };
const CHANGES: Schema = Schema { scalars: &[3], messages: &[(1, &HEADER), (2, &HEADER)] };
const PATH_CHANGE: Schema = Schema { scalars: &[1, 2], messages: &[] };
const REDIRECT: Schema = Schema { scalars: &[1, 2, 3, 5], messages: &[(4, &PATH_CHANGE)] };
const REWRITE: Schema = Schema { scalars: &[1], messages: &[(2, &PATH_CHANGE)] };
const MIRROR: Schema = Schema { scalars: &[2, 3, 4, 5], messages: &[(1, &SERVICE)] };
/// Five values: of a fault, a rate limit, a session.
const FIVE: Schema = Schema { scalars: &[1, 2, 3, 4, 5], messages: &[] };
const CORS: Schema = Schema { scalars: &[1, 2, 3, 4, 5, 6], messages: &[] };
const FILTER: Schema = Schema {
    scalars: &[],
    messages: &[
        (1, &CHANGES),
        (2, &CHANGES),
        (3, &REDIRECT),
        (4, &REWRITE),
        (5, &MIRROR),
        (6, &FIVE),
        (7, &FIVE),
        (8, &CORS),
    ],
};
const BACKEND: Schema = Schema { scalars: &[2, 3, 5], messages: &[(1, &SERVICE), (4, &FILTER)] };
const RETRY: Schema = Schema { scalars: &[1, 2, 3, 4], messages: &[] };
const ROUTE_RULE: Schema = Schema {
    scalars: &[1, 5, 6, 8],
    messages: &[(2, &MATCH), (3, &FILTER), (RULE_BACKENDS, &BACKEND), (7, &RETRY), (9, &FIVE)],
};
/// `Route`.
pub(super) const ROUTE: Schema =
    Schema { scalars: &[1, 2, 3, 4], messages: &[(5, &PARENT), (ROUTE_RULES, &ROUTE_RULE)] };
/// `Route.rules`.
pub(super) const ROUTE_RULES: u32 = 6;
/// `RouteRule.backends`.
pub(super) const RULE_BACKENDS: u32 = 4;

const COOKIE: Schema = FIVE;
const HASH_KEY: Schema = Schema { scalars: &[1, 3], messages: &[(2, &COOKIE)] };
const OUTLIER: Schema = Schema { scalars: &[1, 2, 3, 4, 5, 6, 7, 8], messages: &[(9, &VALUE)] };
const DISTRIBUTION: Schema = Schema { scalars: &[1], messages: &[(2, &HEADER)] };
const LOCALITY: Schema = Schema { scalars: &[2], messages: &[(1, &DISTRIBUTION), (3, &HEADER)] };
const SETTINGS: Schema = Schema {
    scalars: &[1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16],
    messages: &[
        (9, &OUTLIER),
        (11, &HASH_KEY),
        (13, &VALUE),
        (14, &VALUE),
        (17, &LOCALITY),
        (18, &VALUE),
        (19, &VALUE),
    ],
};
const PORT_SETTINGS: Schema = Schema { scalars: &[1], messages: &[(2, &SETTINGS)] };
/// `TrafficPolicy`.
pub(super) const TRAFFIC: Schema =
    Schema { scalars: &[1, 2, 4], messages: &[(3, &SERVICE), (5, &SETTINGS), (6, &PORT_SETTINGS)] };

const JWT_RULE: Schema = Schema { scalars: &[1, 2, 3, 5, 6, 7, 8, 10], messages: &[(4, &HEADER), (9, &HEADER)] };
/// `RequestAuth`.
pub(super) const REQUEST_AUTH: Schema = Schema { scalars: &[1, 2, 4], messages: &[(3, &JWT_RULE)] };

/// Fails if there is a field that is not known, wherever it is.
///
/// # Errors
/// What follows, as one clause.
pub(super) fn whole(bytes: &[u8], schema: &Schema) -> Result<(), String> {
    let unknown = unknown_fields(bytes, schema).ok_or("its bytes cannot be walked, or have too many unknown fields")?;
    if unknown.is_empty() { Ok(()) } else { Err(NOT_KNOWN.to_owned()) }
}

/// What is said of a field of a later version.
pub(super) const NOT_KNOWN: &str = "it has a field that this proxy does not know and must not ignore";
