//! Discovery: the stream on which control says what the mesh is, and the one on which it asks what this node does.
//!
//! `session` is the protocol without I/O, `decode` makes exact types of what arrives, and `client` joins them to a gRPC
//! stream that reconnects for ever. `node` answers control's questions. The node keeps working with its last good state
//! whatever happens here.

mod client;
pub mod decode;
pub mod local;
mod monitor;
mod node;
mod session;
#[cfg(test)]
mod tests;
mod wire;

pub use client::{Config, run};
pub use monitor::{Monitor, Received, Status, Termination};
pub use node::{NodeConfig, run_node_service};
pub use session::{Outcome, Session, own_types};
