//! The lab: a cluster played by one machine's network namespaces, for trying, demonstrating and testing the mesh
//! without Kubernetes. It takes manifests as users write them and runs the real `control` and `ztunnel`.
//!
//! Read in this order. Pure parts first (what should be), then the hands (how it comes to be), then what uses both.
//! Limits: it plays only what the mesh needs of a cluster; each module says what it leaves out.

pub mod address;
pub mod manifest;
pub mod plan;

pub mod objects;
pub mod services;

pub mod kubeproxy;

pub mod dns;

pub mod eventually;
pub mod netns;
pub mod place;
pub mod rootless;
pub mod runtime;
pub mod topology;

pub mod client;

pub mod zds;

pub mod state;
pub mod supervise;

pub mod dial;
pub mod exec;
pub mod forge;
pub mod impostor;
pub mod lab;
pub mod shop;
pub mod sniff;

pub mod kube;

pub mod installed;
pub mod internet;
pub mod issuer;
pub mod scenario;

pub mod oracle;

pub mod pages;

pub mod bench;

pub mod soak;

pub mod demo;

pub mod interop;

pub mod cluster;

pub mod demo_kube;

pub mod cli;
