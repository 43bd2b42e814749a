//! Tulle's control plane as a library: the `control` and `tulle` programs are thin shells around it.
//!
//! One way through: source → model → translate → resources → xDS sessions, and conditions beside it. A module imports
//! only modules above it in this order: base, model, resource, telemetry, authn, cluster, source, keys, translate, stream, xds, ca,
//! nodes, admin, install, config, app, cli.

/// Clock and the order to stop.
pub mod base;
/// Log output.
pub mod telemetry;
/// Plain mesh objects.
pub mod model;
/// What nodes are told, and its versions.
pub mod resource;
/// The Kubernetes API server.
pub mod cluster;
/// Where objects come from.
pub mod source;
/// The key sets of token issuers, fetched for all nodes.
pub mod keys;
/// From objects to resources and conditions; pure.
pub mod translate;
/// Who is calling.
pub mod authn;
/// gRPC streams without lasting buffers.
pub mod stream;
/// Serving resources to nodes.
pub mod xds;
/// Who may have which certificate, and signing it.
pub mod ca;
/// Questions to the node proxies.
pub mod nodes;
/// HTTP for people and scripts.
pub mod admin;
/// Putting Tulle into a cluster, and taking it away.
pub mod install;
/// Flags and environment.
pub mod config;
/// Wiring, start and stop.
pub mod app;
/// The `tulle` command.
pub mod cli;
