//! The wire contract of the mesh: generated messages, and the names, ports and marks both programs must agree on.
//!
//! There is no logic here but what labels mean ([`enrol`]). The .proto files in `proto/` are the source; they are compiled without protoc by `build.rs`.
//! The packages named `istio.*` and `envoy.*` are wire-compatible with the software that people already run.

#![allow(missing_docs, clippy::all, unreachable_pub)]

pub mod enrol;
pub mod names;

/// `istio.workload`: workloads and services (WDS), and below it the pod hand-over protocol (ZDS).
pub mod workload {
    tonic::include_proto!("istio.workload");

    /// `istio.workload.zds`.
    pub mod zds {
        tonic::include_proto!("istio.workload.zds");
    }
}

/// `istio.security`: authorization policies.
pub mod security {
    tonic::include_proto!("istio.security");
}

/// `envoy.service.discovery.v3`: incremental ADS.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// `istio.v1.auth`: the certificate authority.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}

/// `tulle.workload.v1alpha1`: our extensions of a workload and of a service.
pub mod tulle_workload {
    tonic::include_proto!("tulle.workload.v1alpha1");
}

/// `tulle.mesh.v1alpha1`: our own resource types.
pub mod mesh {
    tonic::include_proto!("tulle.mesh.v1alpha1");
}

/// `tulle.node.v1alpha1`: questions to the nodes.
pub mod node {
    tonic::include_proto!("tulle.node.v1alpha1");
}

/// The part of OpenTelemetry's trace format that is sent.
pub mod otlp {
    tonic::include_proto!("tulle.otlp");
}
