//! Where in a JSON text a value stands, so that it can be passed on byte for byte.
//!
//! Configurations and results of other plugins go through this one. Reading them into values and writing them again would
//! change what nobody here understands: numbers beyond 64 bits, `1.0` for `1`, the order of keys. So a text is first checked
//! whole by `serde_json`, and then only cut and joined. What is not JSON gives `None`.

use std::ops::Range;

use serde_json::Value;

/// The span of the value of `key` in the object that `text` is; of the last one, if the key is there twice, as every reader
/// of CNI configurations takes it.
pub fn value_span(text: &str, key: &str) -> Option<Range<usize>> {
    // What follows relies on it.
    serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
    let bytes = text.as_bytes();
    let mut at = skip_space(bytes, 0);
    if bytes.get(at) != Some(&b'{') {
        return None;
    }
    at += 1;
    let mut found = None;
    loop {
        at = skip_space(bytes, at);
        match bytes.get(at)? {
            b'}' => return found,
            b',' => at += 1,
            _ => {
                let end = skip_value(bytes, at)?;
                let name: String = serde_json::from_str(text.get(at..end)?).ok()?;
                let colon = skip_space(bytes, end);
                let start = skip_space(bytes, colon + 1);
                let end = skip_value(bytes, start)?;
                if name == key {
                    found = Some(start..end);
                }
                at = end;
            }
        }
    }
}

/// The value of `key`, as it stands there.
pub fn raw<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.get(value_span(text, key)?)
}

/// `text` with `item`, a JSON value, added to the end of the array of its `key`.
pub fn appended(text: &str, key: &str, item: &str) -> Option<String> {
    let span = value_span(text, key)?;
    let array = text.get(span.clone())?;
    let inside = array.strip_prefix('[')?.strip_suffix(']')?;
    let comma = if inside.trim().is_empty() { "" } else { "," };
    // Before the array's last white space, so that a text of many lines stays readable.
    let kept = inside.trim_end();
    let rest = &inside[kept.len()..];
    Some(format!("{}[{kept}{comma}{item}{rest}]{}", &text[..span.start], &text[span.end..]))
}

/// Whether some object in `value`, however deep, has `type` equal to `plugin`.
pub fn mentions_type(value: &Value, plugin: &str) -> bool {
    match value {
        Value::Object(fields) => {
            fields.get("type").and_then(Value::as_str) == Some(plugin)
                || fields.values().any(|field| mentions_type(field, plugin))
        }
        Value::Array(items) => items.iter().any(|item| mentions_type(item, plugin)),
        _ => false,
    }
}

fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while matches!(bytes.get(at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
        at += 1;
    }
    at
}

/// The end of the value that begins at `at`, in a text that is known to be JSON.
fn skip_value(bytes: &[u8], at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut here = at;
    loop {
        match bytes.get(here)? {
            b'"' => here = skip_string(bytes, here)?,
            b'{' | b'[' => {
                depth += 1;
                here += 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                here += 1;
            }
            // Numbers and words end before what separates them.
            _ => {
                let plain = |byte: &u8| !matches!(byte, b',' | b':' | b'}' | b']' | b'{' | b'[' | b'"');
                let space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
                let length = bytes[here..].iter().take_while(|byte| plain(byte) && !space(byte)).count();
                // Inside of an object or array, separators and spaces are passed one by one.
                here += length.max(1);
            }
        }
        if depth == 0 {
            return Some(here);
        }
    }
}

fn skip_string(bytes: &[u8], at: usize) -> Option<usize> {
    let mut here = at + 1;
    loop {
        match bytes.get(here)? {
            b'\\' => here += 2,
            b'"' => return Some(here + 1),
            _ => here += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{appended, mentions_type, raw};

    #[test]
    fn a_value_is_found_as_it_stands() {
        let text = r#" { "a" : 1.0 , "b":{"a":[2,{"a":3}]} , "c\"}": "x,}]\"", "big":123456789012345678901234567890,"a":  "last" , "e":[ ], "t":true}"#;
        for (key, expected) in [
            ("a", Some("\"last\"")),
            ("b", Some(r#"{"a":[2,{"a":3}]}"#)),
            ("c\"}", Some(r#""x,}]\"""#)),
            ("big", Some("123456789012345678901234567890")),
            ("e", Some("[ ]")),
            ("t", Some("true")),
            ("none", None),
        ] {
            assert_eq!(raw(text, key), expected, "{key}");
        }
        for text in ["", "[]", "[{\"a\":1}]", "{\"a\":1", "{\"a\" 1}", "\"a\"", "{\"a\":1}x"] {
            assert_eq!(raw(text, "a"), None, "{text}");
        }
    }

    #[test]
    fn appending_changes_nothing_else() {
        for (text, expected) in [
            (r#"{"plugins":[]}"#, r#"{"plugins":[{"n":1}]}"#),
            (r#"{"x":1.50,"plugins":[{"mtu":1e3}],"y":[1]}"#, r#"{"x":1.50,"plugins":[{"mtu":1e3},{"n":1}],"y":[1]}"#),
            ("{\n \"plugins\": [\n  {}\n ]\n}\n", "{\n \"plugins\": [\n  {},{\"n\":1}\n ]\n}\n"),
        ] {
            assert_eq!(appended(text, "plugins", r#"{"n":1}"#).as_deref(), Some(expected));
        }
        for text in ["{}", r#"{"plugins":{}}"#, r#"{"plugins":3}"#, "["] {
            assert_eq!(appended(text, "plugins", "1"), None, "{text}");
        }
    }

    #[test]
    fn a_plugin_is_found_however_deep() {
        let nested = json!({"type": "multus", "delegates": [{"plugins": [{"type": "bridge"}, {"type": "tulle-cni"}]}]});
        assert!(mentions_type(&nested, "tulle-cni") && mentions_type(&nested, "multus"));
        assert!(!mentions_type(&nested, "calico") && !mentions_type(&json!({"name": "tulle-cni"}), "tulle-cni"));
    }
}
