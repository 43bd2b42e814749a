//! The CNI plugin: a pod's first packet goes through the proxy, because the runtime waits for it.
//!
//! A container runtime runs the plugin ([`plugin`]) at the end of the node's chain of plugins, for every pod that begins or
//! ends. It knows little itself: it asks the node's agent ([`wire`]), and while that is away it finds out only whether the pod
//! belongs in the mesh ([`away`]). Such a pod waits; every other one starts. [`install`] puts it into the chain and takes it out
//! again. A run of the plugin is a process for one pod, so it starts no runtime and reads no settings but its configuration.

pub mod api;
pub mod away;
pub mod conf;
pub mod enrolment;
pub mod files;
pub mod install;
pub mod journal;
pub mod json;
pub mod kubeconfig;
pub mod plugin;
pub mod wire;

/// What the agent knows of namespaces, for the plugin, in the state folder ([`enrolment::Known`]).
pub const KNOWN_FILE: &str = "namespaces.json";
