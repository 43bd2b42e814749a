//! Two processes keep one fence while one of them takes over from the other: neither opens what the other holds, and neither
//! holds on to what the other has let go. Real interfaces and rules, in namespaces of the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use node::sh;
use ztunnel::app::fence::Fence;
use ztunnel::base::netns::Netns;
use ztunnel::capture::fence;
use ztunnel::state::store;

/// A node and four pods on it, whose ends on the node are `v1` to `v4`.
struct World(String);

impl World {
    fn new() -> Self {
        let world = Self(format!("zf{}", std::process::id()));
        sh(&format!("ip netns add {0}n", world.0));
        for pod in 1..=4 {
            sh(&format!(
                "ip netns add {0}p{pod}; ip -n {0}p{pod} link add eth0 type veth peer name v{pod} netns {0}n\n\
                 ip -n {0}p{pod} link set eth0 up; ip -n {0}n link set v{pod} up",
                world.0
            ));
        }
        world
    }

    fn open(&self, name: &str) -> Netns {
        Netns::open(&Path::new("/run/netns").join(format!("{}{name}", self.0))).unwrap()
    }

    async fn hold(&self, keeper: &Fence, pod: u8) {
        let ip = IpAddr::from([10, 9, 9, pod]);
        keeper.hold(&format!("uid-{pod}"), &[ip], &self.open(&format!("p{pod}"))).await.unwrap();
    }

    async fn release(&self, keeper: &Fence, pod: u8) {
        keeper.release(&format!("uid-{pod}"), &self.open(&format!("p{pod}"))).await;
    }

    /// The pods that are inside, and those whose addresses are known.
    async fn inside(&self) -> (String, String) {
        let (names, own) = fence::fenced(&self.open("n")).await.unwrap();
        let own: BTreeSet<String> = own.into_keys().collect();
        let text = |all: BTreeSet<String>| all.into_iter().collect::<Vec<_>>().join(" ");
        (text(names), text(own))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["n", "p1", "p2", "p3", "p4"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}{name}", self.0)]).status();
        }
    }
}

#[tokio::test]
async fn neither_of_two_keepers_opens_what_the_other_holds() {
    let world = World::new();
    let (_old_writer, old_reader) = store();
    let (_new_writer, new_reader) = store();
    let old = Fence::new(Some(world.open("n")), old_reader).await;
    world.hold(&old, 1).await;
    let new = Fence::new(Some(world.open("n")), new_reader).await;

    // Each holds a pod that the other has not heard of.
    world.hold(&old, 2).await;
    world.hold(&new, 3).await;
    assert_eq!(world.inside().await, ("v1 v2 v3".to_owned(), "v1 v2 v3".to_owned()));
    world.hold(&old, 4).await;
    assert_eq!(world.inside().await.0, "v1 v2 v3 v4");

    // What is let go by both stays open, whoever is the last to write.
    world.release(&old, 1).await;
    world.release(&new, 1).await;
    world.release(&new, 3).await;
    world.release(&old, 3).await;
    world.hold(&new, 2).await;
    assert_eq!(world.inside().await.0, "v2 v4");
    world.release(&new, 2).await;
    world.hold(&new, 4).await;
    assert_eq!(world.inside().await.0, "v4");

    // And what was let go can be held again.
    world.hold(&new, 1).await;
    assert_eq!(world.inside().await.0, "v1 v4");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_is_had_by_one_at_a_time() {
    let world = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    let first = world.alone().await.unwrap();
    let mut second = tokio::spawn(async move { world.alone().await.map(drop) });
    assert!(tokio::time::timeout(std::time::Duration::from_millis(50), &mut second).await.is_err(), "two have it");
    drop(first);
    second.await.unwrap().unwrap();
}
