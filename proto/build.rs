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
];

/// It uses messages of another package, which must be named where `src/lib.rs` puts them and not be generated again. So it is
/// compiled by itself, and first: what is generated of that package then is replaced.
const MESH: &[&str] = &["tulle_mesh.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(MESH, ["proto"])?;
    let own = tonic_prost_build::configure().extern_path(".istio.security", "crate::security");
    own.btree_map(".").bytes(".").compile_fds(descriptors)?;
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
