//! A YAML document as a tree that remembers lines, so that every error can name line and field.
//!
//! Objects are read by hand from this tree and not by derive: the API server's strictness (a label must be a string)
//! and our own (an unknown field of a policy is an error) then read the same, and one bad object does not hide the
//! others of its file. Limits: those of the YAML reader's budget (depth, nodes, aliases) on files of bounded size.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Line in the document, from 1; 0 if unknown.
    pub line: u64,
    /// The value.
    pub value: Value,
}

/// JSON's values; maps keep the order of the text.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing.
    Null,
    /// true or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// Keys and values.
    Map(Vec<(String, Node)>),
}

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Line in the document, from 1; 0 if unknown.
    pub line: u64,
    /// Path of the field, `spec.rules[0].from`; empty for the document as a whole.
    pub field: String,
    /// The sentence.
    pub message: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// Reads one document.
pub fn parse(document: &str) -> Result<Node, FieldError> {
    // YAML 1.2: a pod may be called `n` or `on`; only true and false are booleans.
    let options = serde_saphyr::options! { strict_booleans: true };
    match serde_saphyr::from_str_with_options::<Spanned<Value>>(document, options) {
        Ok(spanned) => Ok(node(spanned)),
        Err(error) => Err(FieldError {
            line: error.location().map_or(0, |at| at.line()),
            field: String::new(),
            message: first_line(&error.without_snippet().to_string()),
        }),
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn node(spanned: Spanned<Value>) -> Node {
    Node { line: spanned.referenced.line(), value: spanned.value }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Value>>()? {
            list.push(node(item));
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let value: Spanned<Value> = map.next_value()?;
            // The key's line: a nested value begins on a later one, and people look for the key.
            let line = key.referenced.line();
            entries.push((key.value, Node { line, value: value.value }));
        }
        Ok(Value::Map(entries))
    }
}

/// A place in the tree; reading from it gives values or an error that names it.
#[derive(Clone)]
pub struct Cursor<'a> {
    node: Option<&'a Node>,
    line: u64,
    path: String,
}

/// Result of reading a field.
pub type Read<T> = Result<T, FieldError>;

impl<'a> Cursor<'a> {
    /// The whole document.
    pub fn root(node: &'a Node) -> Self {
        Self { line: node.line, node: Some(node), path: String::new() }
    }

    /// An error about this place.
    pub fn error(&self, message: impl Into<String>) -> FieldError {
        FieldError { line: self.line, field: self.path.clone(), message: message.into() }
    }

    /// True if there is nothing, or null.
    pub fn is_absent(&self) -> bool {
        self.node.is_none_or(|node| node.value == Value::Null)
    }

    /// A field. Absent if this is not a map; call [`Cursor::map`] to insist.
    pub fn get(&self, key: &str) -> Self {
        let found = self.node.and_then(|node| match &node.value {
            Value::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        });
        Self {
            line: found.map_or(self.line, |node| node.line),
            node: found,
            path: if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) },
        }
    }

    /// Entries of a map; none if absent.
    pub fn map(&self) -> Read<Vec<(&'a str, Self)>> {
        let Some(node) = self.node else {
            return Ok(Vec::new());
        };
        match &node.value {
            Value::Null => Ok(Vec::new()),
            Value::Map(entries) => Ok(entries.iter().map(|(key, _)| (key.as_str(), self.get(key))).collect()),
            other => Err(self.mismatch("a map", other)),
        }
    }

    /// Items of a list; none if absent.
    pub fn list(&self) -> Read<Vec<Self>> {
        let Some(node) = self.node else {
            return Ok(Vec::new());
        };
        match &node.value {
            Value::Null => Ok(Vec::new()),
            Value::List(items) => Ok(items
                .iter()
                .enumerate()
                .map(|(index, item)| Cursor {
                    line: item.line,
                    node: Some(item),
                    path: format!("{}[{index}]", self.path),
                })
                .collect()),
            other => Err(self.mismatch("a list", other)),
        }
    }

    /// Text, if present.
    pub fn text(&self) -> Read<Option<&'a str>> {
        match self.node.map(|node| &node.value) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other @ (Value::Bool(_) | Value::Int(_) | Value::Float(_))) => {
                Err(self.error(format!("must be a string, but is {}; put it in quotes", other.show())))
            }
            Some(other) => Err(self.mismatch("a string", other)),
        }
    }

    /// Text, empty if absent.
    pub fn text_or_empty(&self) -> Read<String> {
        Ok(self.text()?.unwrap_or_default().to_owned())
    }

    /// Text that must be there.
    pub fn required_text(&self) -> Read<&'a str> {
        match self.text()? {
            Some(text) if !text.is_empty() => Ok(text),
            _ => Err(self.error("is missing")),
        }
    }

    /// A boolean, if present.
    pub fn boolean(&self) -> Read<Option<bool>> {
        match self.node.map(|node| &node.value) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mismatch("true or false", other)),
        }
    }

    /// A whole number, if present.
    pub fn int(&self) -> Read<Option<i64>> {
        match self.node.map(|node| &node.value) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Int(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mismatch("a whole number", other)),
        }
    }

    /// A number, if present.
    pub fn number(&self) -> Read<Option<f64>> {
        match self.node.map(|node| &node.value) {
            None | Some(Value::Null) => Ok(None),
            // Exact up to 2^53, which no field of this kind comes near.
            Some(Value::Int(value)) => Ok(Some(*value as f64)),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mismatch("a number", other)),
        }
    }

    /// A port, if present.
    pub fn port(&self) -> Read<Option<u16>> {
        let Some(value) = self.int()? else {
            return Ok(None);
        };
        self.as_port(value).map(Some)
    }

    /// A number as a port.
    pub fn as_port(&self, value: i64) -> Read<u16> {
        match u16::try_from(value) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(self.error(format!("{value} is not a port (1-65535)"))),
        }
    }

    /// The raw value, if there is one.
    pub fn value(&self) -> Option<&'a Value> {
        self.node.map(|node| &node.value)
    }

    /// Items as texts.
    pub fn texts(&self) -> Read<Vec<(&'a str, Self)>> {
        self.list()?.into_iter().map(|item| Ok((item.required_text()?, item))).collect()
    }

    /// An error if the map has a field that is not in the list.
    pub fn only(&self, known: &[&str]) -> Read<()> {
        for (key, at) in self.map()? {
            if !known.contains(&key) {
                return Err(at.error(format!("is not a known field; known are {}", known.join(", "))));
            }
        }
        Ok(())
    }

    fn mismatch(&self, wanted: &str, found: &Value) -> FieldError {
        self.error(format!("must be {wanted}, but is {}", found.show()))
    }
}

impl Value {
    fn show(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Text(_) => "a string".into(),
            Self::List(_) => "a list".into(),
            Self::Map(_) => "a map".into(),
        }
    }
}
