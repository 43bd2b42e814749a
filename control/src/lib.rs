//! Tulle's control plane as a library: the `control` and `tulle` programs are thin shells around it.
//!
//! One way through: source → model → translate → resources → xDS sessions, and conditions beside it. Modules are
//! listed in layer order: each may use only those above it.

pub mod base;
pub mod model;
pub mod resource;
pub mod source;
pub mod translate;
