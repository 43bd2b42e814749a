//! A node that learns a large mesh goes on with its traffic: all that is work there is done by the thread that listens to
//! control, and none by those that carry connections.
//!
//! What control sends goes through the session, the decoder and the store, while a hundred connections are open, which
//! each snapshot is asked about. Processor time is what is asked of a machine that others use, too: for the first half the
//! workers may use a fraction of what learning costs. Then requests go through a tunnel, and how long they took is printed.
//! 10,000 workloads by default, 100,000 with `TULLE_SLOW=1`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "node/crowd.rs"]
mod crowd;
mod node;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crowd::{RESPONSE, part, response};
use node::{Lab, Node, greeting, serve};
use tulle_proto::discovery::Node as Metadata;
use ztunnel::xds::Session;

const PATIENCE: Duration = Duration::from_secs(60);
/// Connections that are open meanwhile.
const OPEN: usize = 100;
/// Requests before it begins.
const BEFORE: usize = 500;
/// What the workers may use of what learning costs. Each snapshot, of a hundred workloads, is one that all connections are
/// asked about again, and nothing else.
const SHARE: f64 = 0.5;

/// Processor time of threads whose names begin so.
fn cpu(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named =
        tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name)));
    named.map(|task| own(&task.join("schedstat"))).sum()
}

/// The first number of a thread's `schedstat`: nanoseconds that it ran.
fn own(path: &std::path::Path) -> Duration {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or_default())
}

fn connected() -> TcpStream {
    let mut tcp = TcpStream::connect("10.99.0.2:8080").unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(greeting(&mut tcp).unwrap(), "10.99.0.1", "from the client, through a tunnel");
    tcp
}

/// There and back.
fn request(tcp: &mut TcpStream) -> Duration {
    let (began, mut back) = (Instant::now(), [0; 64]);
    tcp.write_all(&[7; 64]).unwrap();
    tcp.read_exact(&mut back).unwrap();
    began.elapsed()
}

fn told(when: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 1000];
    println!(
        "{when}: {} requests, p50 {:?}, p99 {:?}, p99.9 {:?}, the slowest {:?}",
        times.len(),
        at(500),
        at(990),
        at(999),
        at(1000)
    );
}

/// Learns the workloads `from..to`, and gives the processor time that it took.
fn learn(node: &mut Node, session: &mut Session, from: usize, to: usize) -> Duration {
    let began = own("/proc/thread-self/schedstat".as_ref());
    for start in (from..to).step_by(RESPONSE) {
        let outcome = session.respond(response(part(start)));
        assert!(outcome.rejected.is_empty(), "{:?}", outcome.rejected);
        node.apply(outcome.changes);
    }
    own("/proc/thread-self/schedstat".as_ref()) - began
}

#[test]
fn learning_a_large_mesh_is_no_work_for_those_who_carry_connections() {
    let all = if std::env::var_os("TULLE_SLOW").is_some() { 100_000 } else { 10_000 };
    let lab = Lab::new("l");
    drop(lab.within("b", || serve(TcpListener::bind("[::]:8080").unwrap())));
    let mut node = Node::start(&lab, lab.pods_file(&["a", "b"]));
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured")]);
    let (open, mut client) =
        lab.within("a", || ((0..OPEN).map(|_| connected()).collect::<Vec<_>>(), connected())).join().unwrap();
    told("before", (0..BEFORE).map(|_| request(&mut client)).collect());

    // While nobody speaks, what the workers do is done because of the snapshots.
    let mut session = Session::new(Metadata::default(), false, true);
    session.open([], &[]);
    let began = cpu("worker-");
    let learning = learn(&mut node, &mut session, 0, all / 2);
    // One more, for which the workers have had their turn.
    told("once after the first half", vec![request(&mut client)]);
    let spent = cpu("worker-") - began;
    println!("{} workloads: {learning:?} to learn them, and {spent:?} of the workers", all / 2);
    assert!(spent < learning.mul_f64(SHARE), "the workers used {spent:?}, learning {learning:?}");

    let done = Arc::new(AtomicBool::new(false));
    let ended = done.clone();
    let requests = std::thread::spawn(move || {
        let mut times = vec![request(&mut client)];
        while !ended.load(Ordering::Relaxed) {
            times.push(request(&mut client));
        }
        times
    });
    learn(&mut node, &mut session, all / 2, all);
    done.store(true, Ordering::Relaxed);
    told("during the second half", requests.join().unwrap());
    assert_eq!(node.reader.load().counts().0, all + node::PODS.len());
    drop(open);
}
