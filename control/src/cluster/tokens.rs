//! TokenReview (authentication.k8s.io/v1): the API server says whose a token is. Whether that is enough, and what it may
//! do, is decided by who asks.
//!
//! The token is in the request's body and nowhere else: errors name what the server said, never what it was asked.

use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::Client;
use kube::api::{Api, PostParams};

use crate::cluster::words;

/// What the API server says of a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Review {
    /// It knows the token, and it is valid.
    pub authenticated: bool,
    /// Why it is not.
    pub error: String,
    /// Those of the audiences that were asked about that the token is for.
    pub audiences: Vec<String>,
    /// `system:serviceaccount:<namespace>:<name>` of a service account.
    pub username: String,
    /// More about the user, by key.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// Asks about a token that must be for `audience`.
///
/// # Errors
/// The API server did not answer, or refused to: nothing is known about the token.
pub async fn review(client: &Client, token: String, audience: &str) -> Result<Review, String> {
    let question = TokenReview {
        spec: TokenReviewSpec { token: Some(token), audiences: Some(vec![audience.to_owned()]) },
        ..TokenReview::default()
    };
    let answer = Api::<TokenReview>::all(client.clone()).create(&PostParams::default(), &question).await;
    let status = match answer {
        Ok(answer) => answer.status.unwrap_or_default(),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            return Err(format!(
                "control may not ask: its account needs `create` on tokenreviews.authentication.k8s.io ({})",
                status.message
            ));
        }
        Err(error) => return Err(words(&error)),
    };
    let user = status.user.unwrap_or_default();
    Ok(Review {
        authenticated: status.authenticated.unwrap_or_default(),
        error: status.error.unwrap_or_default(),
        audiences: status.audiences.unwrap_or_default(),
        username: user.username.unwrap_or_default(),
        extra: user.extra.unwrap_or_default().into_iter().collect(),
    })
}
