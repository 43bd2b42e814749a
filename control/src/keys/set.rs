//! What counts as a key set (RFC 7517), and what of it goes on to nodes.
//!
//! Pure. The keys are told to every node, so what is private of them is taken out, and so is what is no part of a key set:
//! only a change of keys is a change for nodes. Which of the keys can be used is the nodes' to say.

use serde_json::{Map, Value, json};

/// Most keys of a set. Issuers have two to ten.
const MAX_KEYS: usize = 128;
/// Members that only the issuer may know (RFC 7518 §6.2.2, §6.3.2, §6.4.1).
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// The key set as JSON text, always in the same spelling.
///
/// # Errors
/// What is wrong with the document.
pub fn key_set(document: &[u8]) -> Result<String, String> {
    let mut set = object(document)?;
    let Some(Value::Array(mut keys)) = set.remove("keys") else {
        return Err("has no list `keys`, which a JWK Set has".to_owned());
    };
    if keys.len() > MAX_KEYS {
        return Err(format!("has {} keys; at most {MAX_KEYS} are taken", keys.len()));
    }
    for key in keys.iter_mut().filter_map(Value::as_object_mut) {
        key.retain(|name, _| !PRIVATE.contains(&name.as_str()));
    }
    Ok(json!({"keys": keys}).to_string())
}

/// Where an issuer's own description (OpenID Connect Discovery §4) says that its keys are.
///
/// # Errors
/// What is wrong with the document.
pub fn keys_of_issuer(document: &[u8]) -> Result<String, String> {
    match object(document)?.remove("jwks_uri") {
        Some(Value::String(uri)) => Ok(uri),
        _ => Err("has no text `jwks_uri`, which the description of an issuer has".to_owned()),
    }
}

fn object(document: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(document) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("is no JSON object".to_owned()),
        Err(error) => Err(format!("is no JSON: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{key_set, keys_of_issuer};

    #[test]
    fn a_key_set_keeps_its_public_keys_and_nothing_else() {
        for (document, expected) in [
            (r#"{"keys":[]}"#, Ok(r#"{"keys":[]}"#)),
            (r#"{"b":1,"keys":[{"kty":"EC","x":"1","d":"secret"}]}"#, Ok(r#"{"keys":[{"kty":"EC","x":"1"}]}"#)),
            (r#"{"keys":[{"kty":"oct","k":"secret","kid":"a"}]}"#, Ok(r#"{"keys":[{"kid":"a","kty":"oct"}]}"#)),
            ("{}", Err("has no list `keys`, which a JWK Set has")),
            (r#"{"keys":{}}"#, Err("has no list `keys`, which a JWK Set has")),
            ("[]", Err("is no JSON object")),
            ("<html>", Err("is no JSON: expected value at line 1 column 1")),
        ] {
            assert_eq!(key_set(document.as_bytes()), expected.map(str::to_owned).map_err(str::to_owned), "{document}");
        }
        let many = format!(r#"{{"keys":[{}{{}}]}}"#, "{},".repeat(128));
        assert_eq!(key_set(many.as_bytes()), Err("has 129 keys; at most 128 are taken".to_owned()));
    }

    #[test]
    fn an_issuer_says_where_its_keys_are() {
        let found = keys_of_issuer(br#"{"issuer":"https://a","jwks_uri":"https://a/keys"}"#);
        assert_eq!(found, Ok("https://a/keys".to_owned()));
        assert!(keys_of_issuer(br#"{"jwks_uri":7}"#).is_err());
    }
}
