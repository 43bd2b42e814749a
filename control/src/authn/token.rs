//! ES256 tokens of `control token`: making them, and checking them.
//!
//! Claims are `iss` tulle, `aud` istio-ca, `sub` system:serviceaccount:NS:SA, `exp`, and `tulle.dev/node` for node
//! proxies. Only ES256 is accepted, whatever the header says. A token lives until it expires: there is no revocation,
//! so keep them short or replace `token-key.pem`.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;
use tulle_certs::ca::TokenKey;
use tulle_proto::names;

/// Longest token that is looked at, bytes. Ours have about 300.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// How far the clocks of the maker and ours may differ, seconds.
const LEEWAY_S: i64 = 30;

/// A proven caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Namespace of the account.
    pub namespace: String,
    /// The account.
    pub service_account: String,
    /// Node that the token is bound to.
    pub node: Option<String>,
}

/// Why a token is refused. The caller's fault; the same token is refused again, except `NotYet`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    /// Longer than [`MAX_TOKEN_BYTES`].
    #[error("it has {0} bytes; at most {MAX_TOKEN_BYTES} are read")]
    TooLarge(usize),
    /// Not a JWT of ours: shape, algorithm, signature, audience or issuer.
    #[error("{0}; tokens must be made with the token-key.pem of this control plane")]
    Invalid(String),
    /// Over.
    #[error("it expired {0} s ago; make a new one with `control token`")]
    Expired(i64),
    /// Its time has not come.
    #[error("it is valid only {0} s from now; compare the clocks")]
    NotYet(i64),
    /// The subject is no service account.
    #[error("its subject `{0}` is not system:serviceaccount:<namespace>:<name>")]
    Subject(String),
    /// The node claim is empty or too long.
    #[error("its tulle.dev/node claim is not a node name")]
    Node,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    sub: String,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
    #[serde(rename = "tulle.dev/node", default, skip_serializing_if = "Option::is_none")]
    node: Option<String>,
}

/// RFC 7519 allows one text or a list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

/// Checks tokens.
pub struct Verifier {
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    /// From the public half of the token key.
    pub fn new(key: &TokenKey) -> Result<Self, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[names::TOKEN_AUDIENCE]);
        validation.set_issuer(&[names::TOKEN_ISSUER]);
        // Time is checked below, against the caller's clock.
        validation.validate_exp = false;
        validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        Ok(Self { key: DecodingKey::from_ec_pem(key.public_pem.as_bytes()).map_err(invalid)?, validation })
    }

    /// The caller that a token proves at `now`, Unix seconds.
    pub fn verify(&self, token: &str, now: i64) -> Result<Caller, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLarge(token.len()));
        }
        let data = jsonwebtoken::decode::<Claims>(token, &self.key, &self.validation).map_err(invalid)?;
        let claims = data.claims;
        if now > claims.exp.saturating_add(LEEWAY_S) {
            return Err(TokenError::Expired(now.saturating_sub(claims.exp)));
        }
        if let Some(start) = claims.nbf
            && now < start.saturating_sub(LEEWAY_S)
        {
            return Err(TokenError::NotYet(start.saturating_sub(now)));
        }
        let (namespace, service_account) =
            subject(&claims.sub).ok_or_else(|| TokenError::Subject(claims.sub.clone()))?;
        if claims.node.as_ref().is_some_and(|node| node.is_empty() || node.len() > 253) {
            return Err(TokenError::Node);
        }
        Ok(Caller { namespace, service_account, node: claims.node })
    }
}

pub(super) fn subject(text: &str) -> Option<(String, String)> {
    let rest = text.strip_prefix("system:serviceaccount:")?;
    let (namespace, account) = rest.split_once(':')?;
    let good = !namespace.is_empty() && !account.is_empty() && !account.contains(':');
    good.then(|| (namespace.to_owned(), account.to_owned()))
}

fn invalid(error: impl std::fmt::Display) -> TokenError {
    TokenError::Invalid(error.to_string())
}

/// Makes tokens.
pub struct Issuer(EncodingKey);

impl Issuer {
    /// From the private half of the token key.
    pub fn new(key: &TokenKey) -> Result<Self, TokenError> {
        EncodingKey::from_ec_pem(key.private_pem.as_bytes()).map(Self).map_err(invalid)
    }

    /// A token for a caller that is valid for `life_s` seconds from `now`, Unix seconds.
    pub fn issue(&self, caller: &Caller, now: i64, life_s: i64) -> Result<String, TokenError> {
        let claims = Claims {
            iss: names::TOKEN_ISSUER.into(),
            aud: Audience::One(names::TOKEN_AUDIENCE.into()),
            sub: format!("system:serviceaccount:{}:{}", caller.namespace, caller.service_account),
            exp: now.saturating_add(life_s),
            iat: Some(now),
            nbf: None,
            node: caller.node.clone(),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.0).map_err(invalid)
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{Algorithm, EncodingKey, Header};
    use proptest::prelude::*;
    use serde_json::json;
    use tulle_certs::ca::{Authority, TokenKey};

    use crate::authn::token::{Caller, Issuer, Verifier};

    const NOW: i64 = 1_800_000_000;

    fn key() -> TokenKey {
        let dir = tempfile::tempdir().expect("dir");
        Authority::open(dir.path(), NOW).expect("open").token_key().clone()
    }

    fn signed(key: &TokenKey, claims: &serde_json::Value) -> String {
        let key = EncodingKey::from_ec_pem(key.private_pem.as_bytes()).expect("key");
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).expect("token")
    }

    #[test]
    fn issued_token_proves_its_caller_until_it_expires() {
        let key = key();
        let caller = Caller { namespace: "shop".into(), service_account: "cart".into(), node: Some("node-1".into()) };
        let token = Issuer::new(&key).expect("issuer").issue(&caller, NOW, 60).expect("token");
        let verifier = Verifier::new(&key).expect("verifier");
        assert_eq!(verifier.verify(&token, NOW), Ok(caller.clone()));
        assert_eq!(verifier.verify(&token, NOW + 80), Ok(caller), "leeway");
        let late = verifier.verify(&token, NOW + 100).expect_err("late").to_string();
        assert!(late.contains("expired 40 s ago"), "{late}");
    }

    #[test]
    fn every_other_token_is_refused_with_the_reason() {
        let own = key();
        let good =
            json!({"iss": "tulle", "aud": "istio-ca", "sub": "system:serviceaccount:shop:cart", "exp": NOW + 60});
        let with = |key: &str, value: serde_json::Value| {
            let mut claims = good.clone();
            claims[key] = value;
            if claims[key].is_null() {
                claims.as_object_mut().expect("map").remove(key);
            }
            signed(&own, &claims)
        };
        let hs256 = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &good,
            &EncodingKey::from_secret(own.public_pem.as_bytes()),
        )
        .expect("token");
        let unsigned = {
            let parts: Vec<String> = signed(&own, &good).split('.').map(str::to_owned).collect();
            // {"alg":"none"}
            format!("eyJhbGciOiJub25lIn0.{}.", parts[1])
        };
        let cases = [
            ("empty", String::new(), "must be made with"),
            ("text", "hello".into(), "must be made with"),
            ("dots", "..".into(), "must be made with"),
            ("huge", "a".repeat(9000), "at most"),
            ("another key", signed(&key(), &good), "must be made with"),
            ("symmetric with the public key", hs256, "must be made with"),
            ("alg none", unsigned, "must be made with"),
            ("other issuer", with("iss", json!("istio")), "must be made with"),
            ("no issuer", with("iss", json!(null)), "must be made with"),
            ("other audience", with("aud", json!("kubernetes")), "must be made with"),
            ("no expiry", with("exp", json!(null)), "must be made with"),
            ("expiry is text", with("exp", json!("tomorrow")), "must be made with"),
            ("expired", with("exp", json!(NOW - 31)), "expired"),
            ("long expired", with("exp", json!(0)), "expired"),
            ("not yet", with("nbf", json!(NOW + 100)), "valid only"),
            ("no subject", with("sub", json!(null)), "must be made with"),
            ("a user", with("sub", json!("alice")), "subject"),
            ("no account", with("sub", json!("system:serviceaccount:shop:")), "subject"),
            ("three parts", with("sub", json!("system:serviceaccount:a:b:c")), "subject"),
            ("empty node", with("tulle.dev/node", json!("")), "node"),
            ("node is a number", with("tulle.dev/node", json!(1)), "must be made with"),
        ];
        let verifier = Verifier::new(&own).expect("verifier");
        assert!(verifier.verify(&signed(&own, &good), NOW).is_ok());
        assert!(verifier.verify(&with("aud", json!(["x", "istio-ca"])), NOW).is_ok());
        for (name, token, expected) in cases {
            let error = verifier.verify(&token, NOW).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_or_passes(text in "[A-Za-z0-9_.=-]{0,200}") {
            static KEY: std::sync::OnceLock<Verifier> = std::sync::OnceLock::new();
            let verifier = KEY.get_or_init(|| Verifier::new(&key()).expect("verifier"));
            prop_assert!(verifier.verify(&text, NOW).is_err());
        }
    }
}
