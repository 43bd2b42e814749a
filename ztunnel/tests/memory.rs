//! What a workload costs that the node knows and does not talk to, and how long one step of learning it takes.
//!
//! Responses as control sends them go through the session, the decoder and the store; ten pods have an account, an owner
//! and a Service of their own, as in `make bench`. The allocator counts what it really hands out, its own part of each
//! block included, so the figure does not depend on what was free before; the growth of resident memory is printed
//! beside it. 10,000 workloads by default, 100,000 with `TULLE_SLOW=1`. Alone in its process, because it counts all of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(unsafe_code, reason = "an allocator that counts")]

#[path = "node/crowd.rs"]
mod crowd;

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crowd::{ALIKE, RESPONSE, newer, part, response};
use tulle_proto::discovery::{DeltaDiscoveryResponse, Node};
use tulle_proto::names::TYPE_AUTHORIZATION;
use ztunnel::state::{Reader, Writer, store};
use ztunnel::xds::Session;

/// The goal, bytes for each workload with its tenth of a Service.
const GOAL: usize = 500;

/// Bytes of all blocks, with the eight that the allocator needs for itself.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn size(block: *mut u8) -> usize {
    // SAFETY: the block was given by the allocator that is asked, and is not freed yet.
    let usable = unsafe { libc::malloc_usable_size(block.cast()) };
    usable + size_of::<usize>()
}

fn came(block: *mut u8) -> *mut u8 {
    if !block.is_null() {
        let live = LIVE.fetch_add(size(block), Ordering::Relaxed) + size(block);
        PEAK.fetch_max(live, Ordering::Relaxed);
    }
    block
}

fn goes(block: *mut u8) {
    LIVE.fetch_sub(size(block), Ordering::Relaxed);
}

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        came(unsafe { System.alloc(layout) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        goes(block);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) };
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let before = size(block);
        // SAFETY: as the caller promises.
        let new = unsafe { System.realloc(block, layout, new_size) };
        if !new.is_null() {
            LIVE.fetch_sub(before, Ordering::Relaxed);
            came(new);
        }
        new
    }
}

struct Loader {
    session: Session,
    writer: Writer,
    reader: Reader,
    longest: Duration,
}

impl Loader {
    fn new() -> Self {
        let (writer, reader) = store();
        let mut this =
            Self { session: Session::new(Node::default(), false, true), writer, reader, longest: Duration::ZERO };
        this.session.open([], &[]);
        let empty = DeltaDiscoveryResponse { type_url: TYPE_AUTHORIZATION.to_owned(), ..Default::default() };
        let outcome = this.session.respond(empty);
        this.writer.apply(outcome.changes, 1);
        this
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) {
        let began = Instant::now();
        let outcome = self.session.respond(response);
        assert!(outcome.rejected.is_empty(), "{:?}", outcome.rejected);
        self.writer.apply(outcome.changes, 1);
        self.longest = self.longest.max(began.elapsed());
    }

    /// Workloads `from..to` with their Services.
    fn load(&mut self, from: usize, to: usize) {
        for start in (from..to).step_by(RESPONSE) {
            self.take(response(part(start)));
        }
    }
}

fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

#[test]
fn a_workload_that_is_only_known_costs_half_a_kilobyte() {
    ztunnel::base::memory::tame(1);
    let all = if std::env::var_os("TULLE_SLOW").is_some() { 100_000 } else { 10_000 };
    let mut loader = Loader::new();
    loader.load(0, all / 10);
    let (before, resident_before, began) = (live(), resident(), Instant::now());
    PEAK.store(before, Ordering::Relaxed);
    loader.load(all / 10, all);
    let took = began.elapsed();
    let peak = PEAK.load(Ordering::Relaxed);
    ztunnel::base::memory::give_back();
    let (after, resident_after) = (live(), resident());
    let each = (after - before) * 10 / (all * 9);
    let resident_each = resident_after.saturating_sub(resident_before) * 10 / (all * 9);
    println!(
        "{all} workloads: {each} bytes each in blocks, {resident_each} resident; peak {} KB over the end; {took:?} in all, \
         {:?} the longest response",
        (peak - after.min(peak)) / 1024,
        loader.longest,
    );
    let snapshot = loader.reader.load();
    assert_eq!(snapshot.counts().0, all);
    assert!(each <= GOAL, "{each} bytes each, and the goal is {GOAL}");
    // One response and the snapshot that it replaces.
    assert!(peak <= after + (4 << 20), "loading took {} KB more than what stays", (peak - after) / 1024);

    // Whoever is asked for is whole, and the same whole one for all; what nobody uses any more goes again.
    let found = snapshot.workload_by_ip("", Ipv4Addr::from(0x6440_0000 + 7).into()).unwrap();
    assert_eq!(&*found.namespace, "crowd-0");
    let service = snapshot.service("crowd-0", "app-0.crowd-0.svc.cluster.local").unwrap();
    assert_eq!(service.endpoints.all.len(), ALIKE);
    for index in 0..5000 {
        snapshot.workload_by_ip("", Ipv4Addr::from(0x6440_0000 + index).into()).unwrap();
    }
    let used = snapshot.workload_by_ip("", Ipv4Addr::from(0x6440_0000 + 9).into()).unwrap().clone();
    drop(snapshot);
    let whole = live();
    while loader.writer.forget(100) > 0 {}
    let packed = live();
    println!("5000 whole ones: {} bytes each", whole.saturating_sub(packed) / 4899);
    assert!(packed < after + 4000 * 100, "{} KB more than before", packed.saturating_sub(after) / 1024);
    let again = loader.reader.load().workload_by_ip("", Ipv4Addr::from(0x6440_0000 + 9).into()).unwrap().clone();
    assert!(std::sync::Arc::ptr_eq(&used, &again), "what is in use stays");

    // New versions of all of them leave nothing behind but the log.
    for start in (0..all).step_by(RESPONSE) {
        loader.take(response(newer(start, all)));
    }
    let churned = live().saturating_sub(packed);
    println!("{all} new versions: {} KB more", churned / 1024);
    assert!(churned <= 32_768 * 200, "{} KB more after new versions of all", churned / 1024);
}
