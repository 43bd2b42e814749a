//! Tulle's control plane as a library: the `control` and `tulle` programs are thin shells around it.
//!
//! One way through: source → model → translate → resources → xDS sessions, and conditions beside it. Modules are
//! listed in layer order: each may use only those above it.

pub mod admin;
pub mod app;
pub mod authn;
pub mod base;
pub mod ca;
pub mod config;
pub mod model;
pub mod nodes;
pub mod resource;
pub mod source;
pub mod telemetry;
pub mod translate;
pub mod xds;
