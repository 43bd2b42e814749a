//! The node proxy: captures the TCP traffic of the node's pods, tunnels it over mutual TLS, and enforces policy.
//!
//! Modules are listed in layer order: a module imports only modules above it (ARCHITECTURE.md has the table, and
//! `e2e/tests/tidy.rs` holds it). A connection is *listen → decide → dial → relay*: `decide` is a pure function of one
//! immutable snapshot, everything after it carries the plan out without further choices.

/// Status, dumps, metrics, readiness.
pub mod admin;
/// Wiring, start and stop.
pub mod app;
/// Sockets in pod namespaces, worker placement, drain, time.
pub mod base;
/// Redirect rules in pod namespaces, and their proof.
pub mod capture;
/// The command line.
pub mod cli;
/// Flags and environment.
pub mod config;
/// What every connection of a local pod needs.
pub mod flow;
/// HTTP/2 CONNECT tunnels and their pools.
pub mod hbone;
/// Certificates of the node's service accounts.
pub mod identity;
/// From a tunnel or a plain connection to the local application.
pub mod inbound;
/// Choice of an endpoint.
pub mod lb;
/// From a captured application connection to its next hop.
pub mod outbound;
/// What happened to a connection, whose fault it was, and whether to retry.
pub mod outcome;
/// Authorization: pure evaluation and its explanation.
pub mod policy;
/// Copying bytes, fairly.
pub mod relay;
/// The immutable snapshot of workloads, services and policies.
pub mod state;
/// One record a connection: log line and metrics.
pub mod telemetry;
/// Mutual TLS with SPIFFE identities.
pub mod tls;
/// Discovery stream to control.
pub mod xds;
