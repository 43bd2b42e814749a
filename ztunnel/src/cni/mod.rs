//! The CNI plugin: a pod's first packet goes through the proxy, because the runtime waits for it.
//!
//! A container runtime runs the plugin at the end of the node's chain of plugins, for every pod that begins or ends. It
//! knows little itself: it asks the node's agent ([`wire`]), and while that is away it finds out only whether the pod
//! belongs in the mesh ([`enrolment`]). Such a pod waits; every other one starts.

pub mod conf;
pub mod enrolment;
pub mod json;
pub mod wire;
