//! Compiles our .proto files with protox, so that no protoc has to be installed.

use std::error::Error;

const FILES: &[&str] = &[
    "workload.proto",
    "authorization.proto",
    "discovery.proto",
    "ca.proto",
    "zds.proto",
    "tulle_workload.proto",
    "tulle_node.proto",
    "otlp.proto",
];

/// Messages of it that are shown to people as JSON.
const SHOWN: &[&str] = &[
    "Route",
    "ServiceRef",
    "RouteParent",
    "RouteRule",
    "RouteMatch",
    "RoutePath",
    "RouteValue",
    "GrpcMethod",
    "RouteFilter",
    "HeaderChanges",
    "Header",
    "Redirect",
    "Rewrite",
    "PathChange",
    "Mirror",
    "Fault",
    "RateLimit",
    "Cors",
    "RouteBackend",
    "RouteRetry",
    "RouteSession",
    "TrafficPolicy",
    "TrafficSettings",
    "HashKey",
    "Cookie",
    "RetryBudget",
    "Warmup",
    "LocalityBalancing",
    "TcpKeepalive",
    "Pings",
    "Distribution",
    "LocalityShare",
    "RegionFailover",
    "OutlierDetection",
    "SuccessRate",
    "RequestAuth",
    "JwtRule",
    "JwtHeader",
    "ClaimHeader",
];

/// It uses messages of another package, which must be named where `src/lib.rs` puts them and not be generated again. So it is
/// compiled by itself, and first: what is generated of that package then is replaced.
const MESH: &[&str] = &["tulle_mesh.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(MESH, ["proto"])?;
    let own = tonic_prost_build::configure().extern_path(".istio.security", "crate::security");
    let own = SHOWN.iter().fold(own, |own, name| {
        own.type_attribute(format!(".tulle.mesh.v1alpha1.{name}"), "#[derive(serde::Serialize)]")
    });
    own.btree_map(".").bytes(".").compile_fds(descriptors)?;
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
