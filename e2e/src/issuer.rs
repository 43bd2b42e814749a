//! An issuer of tokens: a key of its own, the key set that verifies what it signs, and the objects that name it.
//!
//! For the demonstration and for scenarios about RequestAuthentication. Limits: ES256 only, one key.

use anyhow::Context as _;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};

/// What the tokens say under `iss`.
pub const ISSUER: &str = "https://issuer.example";
/// Far away; tokens that have expired are made with another claim.
const EXPIRES: i64 = 4_000_000_000;

/// An issuer.
pub struct Issuer {
    key: EncodingKey,
    jwk: Value,
}

impl Issuer {
    /// With a new key, named `kid`.
    pub fn new(kid: &str) -> anyhow::Result<Self> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let key = EncodingKey::from_ec_der(&pair.serialize_der());
        let mut jwk = serde_json::to_value(Jwk::from_encoding_key(&key, Algorithm::ES256)?)?;
        jwk["kid"] = json!(kid);
        Ok(Self { key, jwk })
    }

    /// The key set as JSON text.
    pub fn jwks(&self) -> String {
        json!({"keys": [self.jwk]}).to_string()
    }

    /// A token for `subject`, with `more` claims besides.
    pub fn token(&self, subject: &str, more: Value) -> anyhow::Result<String> {
        let mut claims = json!({"iss": ISSUER, "sub": subject, "exp": EXPIRES});
        for (name, value) in more.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        let kid = self.jwk["kid"].as_str().map(str::to_owned);
        let header = Header { kid, ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, &claims, &self.key).context("a token cannot be signed")
    }

    /// A RequestAuthentication for the pods of `app` that has the keys in itself.
    pub fn authentication(&self, namespace: &str, name: &str, app: &str) -> String {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
             metadata: {{name: {name}, namespace: {namespace}}}\n\
             spec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  jwtRules: [{{issuer: '{ISSUER}', jwks: '{}'}}]\n",
            self.jwks()
        )
    }
}
