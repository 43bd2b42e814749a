//! Who is calling: a bearer token in, a proven caller or a refusal out. Never a guess.
//!
//! Tokens are the ones that `control token` prints. What a caller may do is decided elsewhere, by the part that he
//! calls; here only stands who he is.

mod token;

pub use token::{Caller, Issuer, MAX_TOKEN_BYTES, TokenError, Verifier};

use tonic::Status;
use tonic::metadata::MetadataMap;

/// Reads the caller from a request's `authorization` metadata. `now`: Unix seconds.
pub fn caller(verifier: &Verifier, metadata: &MetadataMap, now: i64) -> Result<Caller, Status> {
    let mut values = metadata.get_all("authorization").iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(Status::unauthenticated(
            "exactly one `authorization: Bearer <token>` is needed; make a token with `control token`",
        ));
    };
    let text = value.to_str().map_err(|_| Status::unauthenticated("the authorization metadata is not text"))?;
    let Some(token) = text.strip_prefix("Bearer ") else {
        return Err(Status::unauthenticated("the authorization metadata does not begin with `Bearer `"));
    };
    verifier
        .verify(token.trim(), now)
        .map_err(|error| Status::unauthenticated(format!("the token is refused: {error}")))
}
