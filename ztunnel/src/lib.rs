//! The node proxy: captures the TCP traffic of the node's pods, tunnels it over mutual TLS, and enforces policy.
//!
//! Modules are listed in layer order: a module imports only modules above it (ARCHITECTURE.md has the table, and
//! `e2e/tests/tidy.rs` holds it). A connection is *listen → decide → dial → relay*: `decide` is a pure function of one
//! immutable snapshot, everything after it carries the plan out without further choices.

/// Sockets in pod namespaces, worker placement, drain, time.
pub mod base;
/// What happened to a connection, whose fault it was, and whether to retry.
pub mod outcome;
/// The immutable snapshot of workloads, services and policies.
pub mod state;
/// Which rule of which route a request gets, and what becomes of it.
pub mod route;
/// Authorization: pure evaluation and its explanation.
pub mod policy;
/// Choice of an endpoint.
pub mod lb;
/// One record a connection: log line and metrics.
pub mod telemetry;
/// Mutual TLS with SPIFFE identities.
pub mod tls;
/// Copying bytes, fairly.
pub mod relay;
/// HTTP between two connections, where a route or policy needs it to be read.
pub mod http;
/// Redirect rules in pod namespaces, and their proof.
pub mod capture;
/// Certificates of the node's service accounts.
pub mod identity;
/// Discovery stream to control.
pub mod xds;
/// HTTP/2 CONNECT tunnels and their pools.
pub mod hbone;
/// What every connection of a local pod needs.
pub mod flow;
/// Names: a name server in each captured pod.
pub mod dns;
/// From a tunnel or a plain connection to the local application.
pub mod inbound;
/// From a captured application connection to its next hop.
pub mod outbound;
/// The egress gateway: from a tunnel to a host outside.
pub mod gateway;
/// Status, dumps, metrics, readiness.
pub mod admin;
/// The CNI plugin, and what it asks the node's agent.
pub mod cni;
/// The node in a Kubernetes cluster: its pods, their networks, what the API is told.
pub mod cluster;
/// Flags and environment.
pub mod config;
/// Wiring, start and stop.
pub mod app;
/// The command line.
pub mod cli;
