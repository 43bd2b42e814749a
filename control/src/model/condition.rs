//! What control has to say about a user's object: the conditions of its status.
//!
//! The same values are shown by `tulle` and, under Kubernetes, written to the object; so they use Kubernetes' words.

use serde::Serialize;

use crate::model::route::ParentRef;

/// Names an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ObjectKey {
    /// Kind, `AuthorizationPolicy`.
    pub kind: String,
    /// Namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Kubernetes' three-valued condition status; `Unknown` is never used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Status {
    /// Holds.
    True,
    /// Does not.
    False,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// `Accepted`, `Enforced`, …
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Whether it holds.
    pub status: Status,
    /// One word for programs.
    pub reason: &'static str,
    /// Sentences for people.
    pub message: String,
}

impl Condition {
    /// A condition that does not hold.
    pub fn failing(kind: &'static str, reason: &'static str, message: String) -> Self {
        Self { kind, status: Status::False, reason, message }
    }

    /// A condition that holds.
    pub fn holding(kind: &'static str, reason: &'static str, message: String) -> Self {
        Self { kind, status: Status::True, reason, message }
    }
}

/// All conditions of one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ObjectConditions {
    /// Which object.
    #[serde(flatten)]
    pub object: ObjectKey,
    /// metadata.generation that the conditions are about.
    pub generation: i64,
    /// In order of type.
    pub conditions: Vec<Condition>,
    /// Of routes: what each parent has to say. In the order of the object.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<ParentStatus>,
}

/// `status.parents[]` of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParentStatus {
    /// As the route has it, to the letter: tools compare it.
    #[serde(rename = "parentRef")]
    pub parent_ref: ParentRef,
    /// `Accepted` and `ResolvedRefs`.
    pub conditions: Vec<Condition>,
}
