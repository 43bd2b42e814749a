//! Two processes keep one fence while one of them takes over from the other: neither opens what the other holds, and neither
//! holds on to what the other has let go. Real interfaces and rules, in namespaces of the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::path::Path;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use node::sh;
use tokio::time::timeout;
use ztunnel::app::fence::Fence;
use ztunnel::base::netns::Netns;
use ztunnel::capture::fence;
use ztunnel::state::store;

/// A node and four pods on it, whose ends on the node are `v1` to `v4`; and a network with nothing in it.
struct World(String);

impl World {
    fn new() -> Self {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let world = Self(format!("zf{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)));
        sh(&format!("ip netns add {0}n; ip netns add {0}c", world.0));
        for pod in 1..=4 {
            sh(&format!(
                "ip netns add {0}p{pod}; ip -n {0}p{pod} link add eth0 index 1{pod} type veth peer name v{pod} netns {0}n\n\
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
        let ip = IpAddr::from([10, 9, 9, pod]);
        keeper.release(&format!("uid-{pod}"), &[ip], &self.open(&format!("p{pod}"))).await;
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
        for name in ["n", "p1", "p2", "p3", "p4", "c"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}{name}", self.0)]).status();
        }
    }
}

#[tokio::test]
async fn neither_of_two_keepers_opens_what_the_other_holds() {
    let world = World::new();
    let (_old_writer, old_reader) = store();
    let (_new_writer, new_reader) = store();
    let dir = tempfile::tempdir().unwrap();
    let lock = Some(dir.path().join("lock"));
    let old = Fence::new(Some(world.open("n")), lock.clone(), Arc::default(), old_reader).await;
    world.hold(&old, 1).await;
    let new = Fence::new(Some(world.open("n")), lock, Arc::default(), new_reader).await;

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

#[tokio::test]
async fn a_process_whose_successor_is_there_only_adds() {
    let world = World::new();
    let (_old_writer, old_reader) = store();
    let (_new_writer, new_reader) = store();
    let dir = tempfile::tempdir().unwrap();
    let (lock, attended) = (Some(dir.path().join("lock")), Arc::new(AtomicBool::new(false)));
    let old = Fence::new(Some(world.open("n")), lock.clone(), attended.clone(), old_reader).await;
    world.hold(&old, 1).await;
    world.hold(&old, 2).await;
    world.release(&old, 1).await;
    assert_eq!(world.inside().await.0, "v2");

    // The successor hears that pod 1 is closed again, and the old process does not.
    attended.store(true, Ordering::Relaxed);
    let new = Fence::new(Some(world.open("n")), lock, Arc::default(), new_reader).await;
    world.hold(&new, 1).await;
    world.hold(&old, 3).await;
    assert_eq!(world.inside().await.0, "v1 v2 v3", "the old process opened what its successor closed");
    world.release(&old, 2).await;
    assert_eq!(world.inside().await.0, "v1 v2 v3", "the old process opened a pod");

    // The successor opens, also what it has never held and what the old process adds afterwards.
    world.release(&new, 2).await;
    world.release(&new, 4).await;
    assert_eq!(world.inside().await.0, "v1 v3");
    world.hold(&old, 4).await;
    assert_eq!(world.inside().await.0, "v1 v3 v4");
    world.hold(&new, 2).await;
    assert_eq!(world.inside().await.0, "v1 v2 v3");

    // It ends before it is ready: what the old process knows counts again.
    drop(new);
    attended.store(false, Ordering::Relaxed);
    world.release(&old, 4).await;
    assert_eq!(world.inside().await.0, "v3");
}

#[tokio::test]
async fn a_table_is_not_written_while_another_process_has_the_lock_and_who_keeps_it_stops_nobody() {
    let world = World::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let (_writer, reader) = store();
    let keeper = Fence::new(Some(world.open("n")), Some(path.clone()), Arc::default(), reader).await;
    world.hold(&keeper, 1).await;
    let other = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
    let mut waits = pin!(world.hold(&keeper, 2));
    assert!(timeout(Duration::from_millis(500), &mut waits).await.is_err(), "it was written beside another process");
    assert_eq!(world.inside().await.0, "v1");
    waits.await;
    assert_eq!(world.inside().await.0, "v1 v2");
    drop(other);
}

/// A pod that is open, and has power over its own network, makes an interface with the numbers of another pod's, whose other end
/// is in a namespace of its own.
#[tokio::test]
async fn an_open_pod_that_says_another_ones_interface_is_its_own_opens_nothing() {
    let world = World::new();
    let (_old_writer, old_reader) = store();
    let (_new_writer, new_reader) = store();
    let old = Fence::new(Some(world.open("n")), None, Arc::default(), old_reader).await;
    world.hold(&old, 1).await;
    sh(&format!(
        "number=$(ip -n {0}n -o link show v1 | cut -d: -f1)\n\
         ip -n {0}p4 link add x index 11 type veth peer name y index $number netns {0}c",
        world.0
    ));
    // A process that knows of pod 1 only what the table says.
    let new = Fence::new(Some(world.open("n")), None, Arc::default(), new_reader).await;
    world.release(&new, 4).await;
    world.hold(&new, 2).await;
    assert_eq!(world.inside().await.0, "v1 v2");
    world.release(&new, 1).await;
    assert_eq!(world.inside().await.0, "v2", "and its own one does");
}
