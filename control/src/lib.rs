//! Tulle's control plane as a library: the `control` and `tulle` programs are thin shells around it.
//!
//! One way through: source → model → translate → resources → xDS sessions, and conditions beside it. A module imports
//! only modules above it in this order: base, model, resource, telemetry, authn, source, translate, xds, ca, nodes,
//! admin, config, app, cli.

/// HTTP for people and scripts.
pub mod admin;
/// Wiring, start and stop.
pub mod app;
/// Who is calling.
pub mod authn;
/// Clock and the order to stop.
pub mod base;
/// Who may have which certificate, and signing it.
pub mod ca;
/// The `tulle` command.
pub mod cli;
/// Flags and environment.
pub mod config;
/// Plain mesh objects.
pub mod model;
/// Questions to the node proxies.
pub mod nodes;
/// What nodes are told, and its versions.
pub mod resource;
/// Where objects come from.
pub mod source;
/// Log output.
pub mod telemetry;
/// From objects to resources and conditions; pure.
pub mod translate;
/// Serving resources to nodes.
pub mod xds;
