//! Tests of what endpoints are believed to cost: single rules, and seeded simulations of clients over minutes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::{Loads, MOST, refused};

const A: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 80);
const B: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), 80);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_slow_answer_counts_at_once_and_is_forgotten_within_ten_seconds() {
    let (mut loads, now) = (Loads::default(), Instant::now());
    let at = |seconds| now + Duration::from_secs(seconds);
    assert!(!loads.is_better(A, B, now) && !loads.is_better(B, A, now), "nothing is known of either");
    let estimate = |loads: &Loads, at| loads.entries[&A].estimate(at).map(|seconds| (seconds * 1e3).round());
    loads.took(A, ms(200), now);
    assert_eq!(estimate(&loads, now), Some(200.0), "a peak counts whole");
    loads.took(A, ms(10), now);
    assert_eq!(estimate(&loads, now), Some(200.0), "one fast answer in the same moment says little");
    loads.took(A, ms(10), at(5));
    assert_eq!(estimate(&loads, at(5)), Some(125.0), "later it says more");
    assert_eq!(estimate(&loads, at(15)), None, "without another one it is forgotten");
    loads.begin(A, at(15));
    assert_eq!(estimate(&loads, at(15)), Some(125.0), "but for one that tries it");
    loads.took(A, ms(20), at(16));
    assert_eq!(estimate(&loads, at(16)), Some(20.0), "whose answer is all that counts");
    loads.end(A);
    loads.took(A, refused(Some(Duration::from_secs(60))), at(20));
    assert!(estimate(&loads, at(79)).is_some() && estimate(&loads, at(80)).is_none(), "it asked for 60 s");
}

#[test]
fn requests_under_way_multiply_the_cost() {
    let (mut loads, now) = (Loads::default(), Instant::now());
    loads.took(A, ms(10), now);
    loads.took(B, ms(25), now);
    assert!(!loads.is_better(A, B, now), "10 ms or 25 ms");
    loads.begin(A, now);
    assert!(!loads.is_better(A, B, now), "2 × 10 ms or 25 ms");
    loads.begin(A, now);
    assert_eq!((loads.under_way(A), loads.under_way(B)), (2, 0));
    assert!(loads.is_better(A, B, now), "3 × 10 ms or 25 ms");
    (0..3).for_each(|_| loads.end(A));
    assert_eq!(loads.under_way(A), 0);
    assert_eq!(refused(None).as_secs(), 5);
    assert_eq!(refused(Some(Duration::from_secs(60))).as_secs(), 60);
    assert_eq!(refused(Some(Duration::from_secs(6000))).as_secs(), 300);
}

#[test]
fn one_that_never_answered_is_as_fast_as_the_other_until_it_is_waited_for() {
    let (mut loads, now) = (Loads::default(), Instant::now());
    loads.took(A, ms(1), now);
    assert!(!loads.is_better(A, B, now) && !loads.is_better(B, A, now));
    loads.begin(B, now);
    loads.begin(A, now);
    assert!(!loads.is_better(A, B, now), "as much is under way at both");
    loads.begin(A, now);
    assert!(loads.is_better(A, B, now), "less is under way there");
    assert!(!loads.is_better(A, B, now + ms(100)), "nobody waits 100 ms for the other one");
}

#[test]
fn the_table_is_bounded() {
    let (mut loads, now) = (Loads::default(), Instant::now());
    for number in 0..(MOST as u32) * 2 {
        loads.begin(SocketAddr::from((number.to_be_bytes(), 80)), now);
        loads.end(SocketAddr::from((number.to_be_bytes(), 80)));
    }
    assert!(loads.entries.len() <= MOST);
}

/// A client that sends one request after another, ten milliseconds apart, to two replicas.
struct Client {
    loads: Loads,
    now: Instant,
    seed: u64,
}

impl Client {
    fn new() -> Self {
        Self { loads: Loads::default(), now: Instant::now(), seed: 1 }
    }

    fn dice(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.seed >> 33
    }

    /// Makes requests for so long; how many each replica got. `takes` says what an answer takes in microseconds, from the
    /// replica and a number by chance.
    fn runs(&mut self, time: Duration, takes: impl Fn(SocketAddr, u64) -> u64) -> [u32; 2] {
        let (end, mut got) = (self.now + time, [0; 2]);
        while self.now < end {
            let (first, second) = if self.dice().is_multiple_of(2) { (A, B) } else { (B, A) };
            let to = if self.loads.is_better(first, second, self.now) { second } else { first };
            got[usize::from(to == B)] += 1;
            self.loads.begin(to, self.now);
            let dice = self.dice();
            let time = Duration::from_micros(takes(to, dice));
            self.loads.took(to, time, self.now + time);
            self.loads.end(to);
            self.now += time.max(ms(10));
        }
        got
    }
}

/// Replicas that are alike: 1 to 2 ms.
fn alike(_: SocketAddr, dice: u64) -> u64 {
    1_000 + dice % 1_000
}

/// Each has a quarter of the requests at least.
fn fair(got: [u32; 2]) -> bool {
    got.iter().all(|own| own * 4 >= got[0] + got[1])
}

#[test]
fn replicas_that_are_alike_share_from_the_beginning() {
    let mut client = Client::new();
    for second in 0..60 {
        let got = client.runs(Duration::from_secs(5), alike);
        assert!(fair(got), "after {} s: {got:?}", second * 5);
    }
}

#[test]
fn a_replica_that_was_slow_once_has_its_share_again_after_ten_seconds() {
    let mut client = Client::new();
    client.runs(Duration::from_secs(5), alike);
    client.loads.took(A, ms(500), client.now);
    let got = client.runs(Duration::from_secs(8), alike);
    assert!(got[0] * 20 < got[1], "it is left alone: {got:?}");
    client.runs(Duration::from_secs(3), alike);
    let got = client.runs(Duration::from_secs(5), alike);
    assert!(fair(got), "{got:?}");
}

#[test]
fn a_replica_that_comes_later_has_its_share_at_once_whatever_the_other_takes() {
    for slower in [1, 100] {
        let mut client = Client::new();
        client.loads.took(B, ms(slower), client.now);
        let got = client.runs(Duration::from_secs(5), |_, dice| alike(A, dice) * slower);
        assert!(fair(got), "{slower}: {got:?}");
    }
}

#[test]
fn a_replica_that_stays_slow_is_tried_once_in_ten_seconds() {
    let mut client = Client::new();
    let slow = |to, dice| if to == A { 200_000 } else { alike(to, dice) };
    let got = client.runs(Duration::from_secs(100), slow);
    assert!((9..=14).contains(&got[0]) && got[1] > 5_000, "{got:?}");
}
