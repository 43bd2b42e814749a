//! Compiles our .proto files with protox, so that no protoc has to be installed.

use std::error::Error;

const FILES: &[&str] = &[
    "workload.proto",
    "authorization.proto",
    "discovery.proto",
    "ca.proto",
    "zds.proto",
    "tulle_workload.proto",
    "tulle_mesh.proto",
    "tulle_node.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
