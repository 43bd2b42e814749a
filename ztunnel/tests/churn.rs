//! Pods that come and go at 50 a second leave nothing behind: files, threads, tasks, flows, rules and memory are the same
//! after thousands of them as after the first hundred.
//!
//! Real namespaces, rules and probes, with a name server in each pod and one connection through a tunnel out of each.
//! The namespaces are a ring that is used again and again, as what the kernel frees with a namespace could hide what we
//! do not. 300 pods by default, 10,000 with `TULLE_SLOW=1`. The pace is what the machine gives, 50 a second at most; it is
//! printed, with the processor time of each pod, and no promise of this test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};
use node::{Node, Setup, sh};
use ztunnel::app::resolver::Names;
use ztunnel::dns::own::OwnResolver;

/// Namespaces.
const RING: usize = 100;
/// Pods that live at a time. Each lives a second at full pace.
const LIVE: usize = 50;
/// Pods that come at once, and as many go.
const STEP: usize = 5;
/// Between two steps: 50 a second.
const PAUSE: Duration = Duration::from_millis(100);
/// Service accounts.
const ACCOUNTS: usize = 20;
/// Sockets that the pod which stays may have ready for its next connections.
const READY: usize = 8;
const PATIENCE: Duration = Duration::from_secs(60);

/// A node's namespace, which this thread and its children live in, and a ring of pods' namespaces.
struct World {
    tag: String,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let world = Self { tag: format!("zc{}", std::process::id()), dir: tempfile::tempdir().unwrap() };
        // The node's own namespace gets a name, so that the pods' ends of the links can be made in it.
        sh(&format!("ip netns attach {}n {}; ip link set lo up", world.tag, nix::unistd::gettid()));
        let mut node = String::new();
        for slot in 0..=RING {
            let name = world.netns(slot);
            let ip = address(slot);
            let pod = format!(
                "link set lo up\nlink add eth0 type veth peer name v{slot} netns {0}n\naddr add {ip}/32 dev eth0\n\
                 link set eth0 up\nroute add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1\n",
                world.tag
            );
            sh(&format!("ip netns add {name}\nip -n {name} -batch - <<'END'\n{pod}END"));
            let _ =
                write!(node, "link set v{slot} up\naddr add 169.254.1.1/32 dev v{slot}\nroute add {ip} dev v{slot}\n");
        }
        sh(&format!("sysctl -qw net.ipv4.ip_forward=1\nip -batch - <<'END'\n{node}END"));
        world
    }

    fn netns(&self, slot: usize) -> String {
        format!("{}p{slot}", self.tag)
    }

    fn list(&self, pods: impl Iterator<Item = Pod>) -> PathBuf {
        let mut text = String::new();
        for Pod { number, slot } in pods {
            let (account, netns, ip) = (number % ACCOUNTS, self.netns(slot), address(slot));
            let _ = writeln!(
                text,
                "- {{uid: uid-{number}, name: p{number}, namespace: shop, serviceAccount: s{account}, netns: /run/netns/{netns}, ips: [{ip}], enrolled: true}}"
            );
        }
        let (path, fresh) = (self.dir.path().join("pods.yaml"), self.dir.path().join("pods.new"));
        std::fs::write(&fresh, if text.is_empty() { "[]".to_owned() } else { text }).unwrap();
        std::fs::rename(fresh, &path).unwrap();
        path
    }

    /// Rules, policy routing and routes of a pod's namespace, in lines.
    fn rules(&self, slot: usize) -> usize {
        let script = "nft list ruleset; ip rule; ip route show table 100";
        let output =
            Command::new("ip").args(["netns", "exec", &self.netns(slot), "sh", "-ec", script]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in (0..=RING).map(|slot| self.netns(slot)).chain([format!("{}n", self.tag)]) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

fn address(slot: usize) -> IpAddr {
    let [high, low] = u16::try_from(slot + 1).unwrap().to_be_bytes();
    Ipv4Addr::from([10, 98, high, low]).into()
}

/// The pod with this number, in this place of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pod {
    number: usize,
    slot: usize,
}

impl Pod {
    fn described(self) -> (String, String, IpAddr) {
        (format!("p{}", self.number), format!("s{}", self.number % ACCOUNTS), address(self.slot))
    }
}

/// Runs `work` in a namespace, on a thread of its own.
fn within<T: Send + 'static>(netns: &str, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    let path = Path::new("/run/netns").join(netns);
    std::thread::spawn(move || {
        setns(std::fs::File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

/// What must not grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    files: usize,
    threads: usize,
    tasks: usize,
    flows: usize,
    rules: usize,
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Memory in use, KB.
fn memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time of this process, and of programs that it ran, since it began.
fn cpu() -> [Duration; 2] {
    [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN].map(|who| {
        let usage = getrusage(who).unwrap();
        let micros = |time: TimeVal| Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap());
        micros(usage.user_time()) + micros(usage.system_time())
    })
}

struct Churn {
    world: World,
    node: Node,
    live: VecDeque<Pod>,
    next: usize,
    slowest: Duration,
}

/// The pod that stays: a server that all others connect to.
const SERVER: Pod = Pod { number: 0, slot: RING };

impl Churn {
    fn new() -> Self {
        let world = World::new();
        let listener = within(&world.netns(SERVER.slot), || TcpListener::bind("0.0.0.0:8080").unwrap()).join().unwrap();
        std::thread::spawn(move || {
            listener.incoming().for_each(|tcp| drop(tcp.map(|mut tcp| std::io::Write::write_all(&mut tcp, b"hello"))))
        });
        let path = world.list([SERVER].into_iter());
        let names =
            [SocketAddr::from(([127, 0, 0, 1], 15053)), SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 15053))];
        let outside = OwnResolver::new(node::own_sockets(), Vec::new());
        let names = Names::new("cluster.local", names.to_vec(), outside);
        let mut node = Node::start_with(world.dir.path(), path, Setup { names: Some(names), ..Setup::default() });
        node.change(&[SERVER.described()], &[]);
        let mut churn = Self { world, node, live: VecDeque::new(), next: 1, slowest: Duration::ZERO };
        churn.await_captured();
        churn
    }

    fn await_captured(&mut self) {
        let began = Instant::now();
        loop {
            let status = self.node.pods.status();
            let captured = status.iter().filter(|pod| pod.capture == "Captured").count();
            // The list may not have been read yet: these very pods, and no others.
            let latest =
                self.live.back().is_none_or(|last| status.iter().any(|pod| pod.uid == format!("uid-{}", last.number)));
            if latest && captured == self.live.len() + 1 && status.len() == captured {
                break;
            }
            let others: Vec<_> = status.iter().filter(|pod| pod.capture != "Captured").take(3).collect();
            assert!(began.elapsed() < PATIENCE, "{captured} of {} are captured: {others:?}", self.live.len() + 1);
            std::thread::sleep(Duration::from_millis(2));
        }
        self.slowest = self.slowest.max(began.elapsed());
    }

    /// Some come, some go; those that came are captured and talk.
    fn step(&mut self, come: usize, stay: usize) {
        let new: Vec<Pod> = (0..come).map(|n| Pod { number: self.next + n, slot: (self.next + n) % RING }).collect();
        self.next += come;
        self.live.extend(&new);
        let gone: Vec<Pod> = self.live.drain(..self.live.len().saturating_sub(stay)).collect();
        let come: Vec<_> = new.iter().map(|pod| pod.described()).collect();
        let names: Vec<_> = gone.iter().map(|pod| pod.described().0).collect();
        self.node.change(&come, &names);
        self.world.list([SERVER].into_iter().chain(self.live.iter().copied()));
        self.await_captured();
        let talks = new.iter().filter(|pod| self.live.contains(pod)).map(|pod| {
            within(&self.world.netns(pod.slot), || {
                let to = SocketAddr::new(address(SERVER.slot), 8080);
                let mut tcp = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
                tcp.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut text = String::new();
                tcp.read_to_string(&mut text).map(|_| text)
            })
        });
        for talk in talks.collect::<Vec<_>>() {
            assert_eq!(talk.join().unwrap().unwrap(), "hello");
        }
    }

    /// With nobody left but the server, once everything has come to rest.
    fn rest(&mut self) -> Held {
        self.step(0, 0);
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.held();
        loop {
            // Tunnels to pods that are gone end with their sockets, within moments.
            std::thread::sleep(Duration::from_millis(300));
            let now = self.held();
            if now == last && now.flows == 0 {
                return now;
            }
            assert!(Instant::now() < deadline, "it does not come to rest: {last:?}, then {now:?}");
            last = now;
        }
    }

    fn held(&self) -> Held {
        Held {
            files: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            tasks: self.node.runtime.metrics().num_alive_tasks(),
            flows: self.node.workers.loads(),
            rules: self.world.rules(0),
        }
    }
}

#[test]
fn pods_that_come_and_go_leave_nothing_behind() {
    let all = if std::env::var_os("TULLE_SLOW").is_some() { 10_000 } else { 300 };
    let mut churn = Churn::new();
    // Every namespace has been used, and every account has its certificate.
    while churn.next <= RING {
        churn.step(STEP, LIVE);
    }
    let before = churn.rest();
    let mut memories = vec![memory()];
    let (began, first, mut reported) = (Instant::now(), churn.next, 0);
    let (mut due, used) = (Instant::now(), cpu());
    while churn.next - first < all {
        churn.step(STEP, LIVE);
        due = (due + PAUSE).max(Instant::now() - PAUSE);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let done = churn.next - first;
        if done * 10 / all > reported {
            reported = done * 10 / all;
            memories.push(memory());
            println!(
                "{done} pods, {:.1} a second: {} KB, {:?}",
                done as f64 / began.elapsed().as_secs_f64(),
                memory(),
                churn.held()
            );
        }
    }
    let [own, programs] = [0, 1].map(|of| (cpu()[of] - used[of]) / u32::try_from(all).unwrap());
    println!("processor time of a pod, its connection included: {own:?}, and {programs:?} of programs");
    println!("the slowest step took {:?} until all were captured", churn.slowest);
    let after = churn.rest();
    memories.push(memory());
    println!("before {before:?}, after {after:?}; memory in KB: {memories:?}");
    assert!(after.files <= before.files + READY, "files are left of {all} pods: {before:?}, {after:?}");
    assert_eq!(Held { files: 0, ..after }, Held { files: 0, ..before }, "something is left of {all} pods");
    // The first pods fill caches, the allocator's pools and the log of applied versions, which has room for some 4,000 of them.
    // Whoever goes on from there would find a fifth of a kilobyte a pod; fewer pods show a leak of ten kilobytes each.
    let (from, most) = if all < 8000 { (1, 4096) } else { (5, 1024) };
    let grown = memories.last().unwrap().saturating_sub(memories[from]);
    assert!(grown < most, "memory grew by {grown} KB: {memories:?}");
}
