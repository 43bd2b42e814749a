//! Answers of the API server, read into what is kept of them: pages of a list, and lines of a watch.
//!
//! Each object of a page is decoded as soon as it is read, so that only one tree of a page is in memory at a time.
//! `managedFields`, often half of an object, never gets into a tree. Bytes come from the API server, which an attacker
//! does not write but whose users do: nothing here panics, and depth is bounded by the JSON reader (128).

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::source::decode;
use crate::source::kube::kinds::Kind;
use crate::source::kube::known::Item;
use crate::source::tree::{Cursor, Node, Value};

/// Part of a list.
#[derive(Debug, Default)]
pub struct Page {
    /// Its objects.
    pub items: Vec<Item>,
    /// Where a watch may begin, if this is the last page.
    pub version: String,
    /// Asks for the next page; empty: there is none.
    pub next: String,
}

/// One line of a watch.
#[derive(Debug)]
pub enum Line {
    /// An object is there, and what it is now.
    Applied(Box<Item>, String),
    /// An object is gone.
    Gone {
        /// Empty for what has none.
        namespace: String,
        /// Its name.
        name: String,
        /// Where a watch may go on.
        version: String,
    },
    /// Nothing happened until this version.
    Bookmark(String),
    /// The watch is over: HTTP status and words.
    Failed(u16, String),
}

/// Reads a page of a list.
///
/// # Errors
/// It is no list of Kubernetes objects; in words.
pub fn page(bytes: &[u8], kind: &'static Kind) -> Result<Page, String> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let page = PageOf(kind).deserialize(&mut reader).map_err(|error| error.to_string())?;
    reader.end().map_err(|error| error.to_string())?;
    Ok(page)
}

/// Reads a line of a watch.
///
/// # Errors
/// It is no watch event; in words.
pub fn line(bytes: &[u8], kind: &'static Kind) -> Result<Line, String> {
    let event: Event = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let root = Cursor::root(&event.object.0);
    let version = || root.get("metadata").get("resourceVersion").text_or_empty().unwrap_or_default();
    match event.kind.as_str() {
        "ADDED" | "MODIFIED" => {
            let version = version();
            Ok(Line::Applied(Box::new(item(event.object.0, kind)?), version))
        }
        "DELETED" => {
            let (namespace, name) = name_of(&root)?;
            Ok(Line::Gone { namespace, name, version: version() })
        }
        "BOOKMARK" => Ok(Line::Bookmark(version())),
        "ERROR" => {
            let code = root.get("code").int().ok().flatten().and_then(|code| u16::try_from(code).ok());
            let message = root.get("message").text().ok().flatten().unwrap_or("without a word");
            Ok(Line::Failed(code.unwrap_or(500), message.to_owned()))
        }
        other => Err(format!("`{other}` is no event of a watch")),
    }
}

/// From one object's tree to what is kept of it.
fn item(mut node: Node, kind: &Kind) -> Result<Item, String> {
    let (namespace, name) = name_of(&Cursor::root(&node))?;
    if let Value::Map(entries) = &mut node.value {
        // In lists, the API server leaves out what all items have in common.
        let version = kind.versions.first().copied().unwrap_or_default();
        for (key, text) in [("apiVersion", kind.api_version(version)), ("kind", kind.name.to_owned())] {
            if !entries.iter().any(|(present, _)| present == key) {
                entries.push((key.to_owned(), Node { line: 0, value: Value::Text(text) }));
            }
        }
    }
    let decoded = decode::document(&node);
    let error = decoded.errors.into_iter().next();
    Ok(Item {
        namespace,
        name,
        nameless: error.as_ref().is_some_and(|error| error.object.is_none()),
        error: error.map(|error| error.error),
        object: decoded.objects.into_iter().next().filter(|object| object.kind() == kind.name),
    })
}

fn name_of(root: &Cursor<'_>) -> Result<(String, String), String> {
    let meta = root.get("metadata");
    let name = meta.get("name").required_text().map_err(|error| error.to_string())?.to_owned();
    let namespace = meta.get("namespace").text_or_empty().map_err(|error| error.to_string())?;
    Ok((namespace, name))
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Json,
}

/// An object's tree.
#[derive(Debug, PartialEq)]
pub struct Json(pub Node);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Place::Object.deserialize(deserializer)?))
    }
}

/// Where in an object a value stands.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Object,
    Metadata,
    Below,
}

impl<'de> DeserializeSeed<'de> for Place {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Ok(Node { line: 0, value: deserializer.deserialize_any(self)? })
    }
}

impl<'de> Visitor<'de> for Place {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
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
        while let Some(item) = seq.next_element_seed(Self::Below)? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let place = match (self, key.as_str()) {
                (Self::Object, "metadata") => Self::Metadata,
                (Self::Metadata, "managedFields") => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                _ => Self::Below,
            };
            entries.push((key, map.next_value_seed(place)?));
        }
        Ok(Value::Map(entries))
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ListMeta {
    #[serde(rename = "resourceVersion")]
    version: String,
    #[serde(rename = "continue")]
    next: String,
}

struct PageOf(&'static Kind);

impl<'de> DeserializeSeed<'de> for PageOf {
    type Value = Page;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Page, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for PageOf {
    type Value = Page;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.0.plural)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Page, A::Error> {
        let mut page = Page::default();
        let mut listed = false;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "metadata" => {
                    let meta: ListMeta = map.next_value()?;
                    (page.version, page.next) = (meta.version, meta.next);
                }
                "items" => {
                    page.items = map.next_value_seed(Items(self.0))?;
                    listed = true;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if !listed || page.version.is_empty() {
            return Err(A::Error::custom("it is no list with a resourceVersion"));
        }
        Ok(page)
    }
}

struct Items(&'static Kind);

impl<'de> DeserializeSeed<'de> for Items {
    type Value = Vec<Item>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Item>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items {
    type Value = Vec<Item>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_unit<E>(self) -> Result<Vec<Item>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Item>, A::Error> {
        let mut items = Vec::new();
        while let Some(node) = seq.next_element_seed(Place::Object)? {
            items.push(item(node, self.0).map_err(A::Error::custom)?);
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::{Json, Line, line, page};
    use crate::model::Object;
    use crate::source::kube::kinds::{KINDS, Kind};
    use crate::source::tree::{Cursor, Value};

    fn kind(name: &str) -> &'static Kind {
        KINDS.iter().find(|kind| kind.name == name).unwrap()
    }

    #[test]
    fn items_of_a_page_need_no_type_and_keep_no_managed_fields() {
        let text = r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"7","continue":"abc",
            "remainingItemCount":3},"items":[{"metadata":{"name":"a","namespace":"shop",
            "managedFields":[{"manager":"kubelet"}]},"spec":{"nodeName":"n"}}]}"#;
        let page = page(text.as_bytes(), kind("Pod")).unwrap();
        assert_eq!((page.version.as_str(), page.next.as_str(), page.items.len()), ("7", "abc", 1));
        let item = &page.items[0];
        assert_eq!((item.namespace.as_str(), item.name.as_str(), &item.error), ("shop", "a", &None));
        assert!(matches!(&item.object, Some(Object::Pod(pod)) if pod.node == "n"));
        let Json(node) = serde_json::from_str(
            r#"{"metadata":{"name":"a","labels":{"managedFields":"kept"},"managedFields":[1]},"x":1.5,"y":null}"#,
        )
        .unwrap();
        let root = Cursor::root(&node);
        assert!(root.get("metadata").get("managedFields").is_absent());
        assert_eq!(root.get("metadata").get("labels").get("managedFields").text().unwrap(), Some("kept"));
        assert_eq!(root.get("x").value(), Some(&Value::Float(1.5)));
    }

    #[test]
    fn a_page_without_items_is_empty_and_what_is_no_list_is_refused() {
        for items in ["[]", "null"] {
            let text = format!(r#"{{"metadata":{{"resourceVersion":"7"}},"items":{items}}}"#);
            assert!(page(text.as_bytes(), kind("Pod")).unwrap().items.is_empty());
        }
        let deep =
            format!(r#"{{"metadata":{{"resourceVersion":"7"}},"items":[{}1{}]}}"#, "[".repeat(500), "]".repeat(500));
        for text in [
            "",
            "{}",
            "[]",
            r#"{"items":[]}"#,
            r#"{"metadata":{"resourceVersion":"7"}}"#,
            r#"{"metadata":{"resourceVersion":"7"},"items":[3]}"#,
            r#"{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{}}]}"#,
            r#"{"metadata":{"resourceVersion":"7"},"items":[]} more"#,
            r#"{"metadata":{"resourceVersion":"7"},"items":["#,
            &deep,
        ] {
            assert!(page(text.as_bytes(), kind("Pod")).is_err(), "{text}");
        }
    }

    #[test]
    fn lines_of_a_watch_say_what_happened() {
        let read = |text: &str| line(text.as_bytes(), kind("Service")).unwrap();
        let object =
            r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"n","resourceVersion":"9"}}"#;
        for event in ["ADDED", "MODIFIED"] {
            let found = read(&format!(r#"{{"type":"{event}","object":{object}}}"#));
            let Line::Applied(item, version) = found else { panic!("{found:?}") };
            assert!(item.object.is_some() && version == "9");
        }
        let gone = read(&format!(r#"{{"object":{object},"type":"DELETED"}}"#));
        assert!(
            matches!(gone, Line::Gone { namespace, name, version } if namespace == "n" && name == "s" && version == "9")
        );
        let bookmark = r#"{"type":"BOOKMARK","object":{"kind":"Service","metadata":{"resourceVersion":"12"}}}"#;
        assert!(matches!(read(bookmark), Line::Bookmark(version) if version == "12"));
        let expired = r#"{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}"#;
        assert!(matches!(read(expired), Line::Failed(410, message) if message == "too old"));
        for text in
            ["", "{}", r#"{"type":"ADDED"}"#, r#"{"type":"NEW","object":{}}"#, r#"{"type":"ADDED","object":{}}"#]
        {
            assert!(line(text.as_bytes(), kind("Service")).is_err(), "{text}");
        }
    }

    #[test]
    fn an_object_that_cannot_be_read_names_its_field_and_a_policy_is_still_there() {
        let policy = r#"{"type":"ADDED","object":{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy",
            "metadata":{"name":"p","namespace":"n"},"spec":{"action":"NO"}}}"#;
        let Line::Applied(item, _) = line(policy.as_bytes(), kind("AuthorizationPolicy")).unwrap() else { panic!() };
        assert_eq!(item.error.as_ref().map(|error| error.field.as_str()), Some("spec.action"));
        assert!(item.object.is_some() && !item.nameless);
        let pod = r#"{"type":"ADDED","object":{"metadata":{"name":"p","namespace":"n"},"spec":{"nodeName":4}}}"#;
        let Line::Applied(item, _) = line(pod.as_bytes(), kind("Pod")).unwrap() else { panic!() };
        assert!(item.object.is_none() && item.error.is_some());
    }
}
