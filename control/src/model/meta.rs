//! What every object has: name, labels, age; and the label selector that picks objects by it.
//!
//! Only the part of Kubernetes' ObjectMeta that the mesh looks at. Creation times order policies of one rank; objects
//! from files usually have none and then count as the oldest, by name.

use std::collections::BTreeMap;

/// Identity and labels of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// Name, unique per kind and namespace.
    pub name: String,
    /// metadata.uid; may be empty.
    pub uid: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// metadata.generation; 0 if absent.
    pub generation: i64,
    /// metadata.creationTimestamp, Unix seconds; 0 if absent.
    pub created: i64,
    /// True once deletion was asked for.
    pub deleting: bool,
    /// The controlling owner, if any.
    pub owner: Option<Owner>,
}

/// The controller of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// `ReplicaSet`, `Job`, …
    pub kind: String,
    /// Its name.
    pub name: String,
}

impl Meta {
    /// `namespace/name`.
    pub fn path(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// A label's value.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }
}

/// Selects by labels: `matchLabels` and `matchExpressions`, all of which must hold. Empty: everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Label equals value.
    pub labels: BTreeMap<String, String>,
    /// Set-based requirements.
    pub expressions: Vec<Expression>,
}

/// One set-based requirement.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Expression {
    /// Label key.
    pub key: String,
    /// How its value is compared.
    pub operator: Operator,
    /// With what; empty for Exists and DoesNotExist.
    pub values: Vec<String>,
}

/// Kubernetes' four selector operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operator {
    /// The label exists and its value is in the list.
    In,
    /// The label is absent or its value is not in the list.
    NotIn,
    /// The label exists.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl Selector {
    /// A selector of plain equalities.
    pub fn of_labels(labels: BTreeMap<String, String>) -> Self {
        Self { labels, expressions: Vec::new() }
    }

    /// True if there is no requirement.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.expressions.is_empty()
    }

    /// True if the labels meet every requirement.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|e| e.holds(labels))
    }
}

impl Expression {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}
