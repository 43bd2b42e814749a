//! Who is calling: a bearer token in, a proven caller or a refusal out. Never a guess.
//!
//! Tokens are the ones that `control token` prints; in a cluster also those of service accounts, which the API server
//! knows ([`review`]). Which of the two a token is stands in its issuer, so that neither is ever tried as the other.
//! What a caller may do is decided elsewhere, by the part that he calls; here only stands who he is.

mod review;
mod token;

pub use review::{Ask, Claims, FindPod, MAX_REVIEWS, PodPlace, Refusal, Reviews, unverified};
pub use token::{Caller, Issuer, MAX_TOKEN_BYTES, TokenError, Verifier};

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use tonic::Status;
use tonic::transport::server::TcpConnectInfo;
use tonic::transport::server::TlsConnectInfo;
use tulle_proto::names;

/// Knows callers by their tokens.
pub struct Authn {
    own: Verifier,
    reviews: Option<Arc<Reviews>>,
}

impl Authn {
    /// By tokens of `control token`, and by those that the API server knows if there is one.
    pub fn new(own: Verifier, reviews: Option<Arc<Reviews>>) -> Self {
        Self { own, reviews }
    }

    /// The caller at address `from` that a request's headers prove. `now`: Unix seconds.
    ///
    /// # Errors
    /// UNAUTHENTICATED: the caller's fault, with what to change. UNAVAILABLE: nobody can say now, to be tried again.
    pub async fn caller(&self, headers: &HeaderMap, from: Option<IpAddr>, now: i64) -> Result<Caller, Status> {
        let token = bearer(headers)?;
        if let Some(reviews) = &self.reviews
            && let Some(claims) = unverified(token)
            && claims.issuer != names::TOKEN_ISSUER
        {
            return reviews.caller(token, &claims, from, now).await.map_err(|refusal| match refusal {
                Refusal::Refused(reason) => Status::unauthenticated(format!("the token is refused: {reason}")),
                Refusal::Unavailable(reason) => {
                    Status::unavailable(format!("nobody can say whose the token is: {reason}; try again"))
                }
            });
        }
        self.own.verify(token, now).map_err(|error| Status::unauthenticated(format!("the token is refused: {error}")))
    }
}

/// The address that a request came from, if the server noted it.
pub fn source<B>(request: &http::Request<B>) -> Option<IpAddr> {
    let noted = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()?;
    Some(noted.get_ref().remote_addr()?.ip())
}

fn bearer(headers: &HeaderMap) -> Result<&str, Status> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(Status::unauthenticated(
            "exactly one `authorization: Bearer <token>` is needed; make a token with `control token`",
        ));
    };
    let text = value.to_str().map_err(|_| Status::unauthenticated("the authorization metadata is not text"))?;
    let Some(token) = text.strip_prefix("Bearer ") else {
        return Err(Status::unauthenticated("the authorization metadata does not begin with `Bearer `"));
    };
    Ok(token.trim())
}
