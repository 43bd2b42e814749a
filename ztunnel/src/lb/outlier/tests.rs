//! Tests of ejection: a table of what counts, the times, the bounds, and a random walk that keeps the invariants.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{Outliers, Report, Seen, Standing, Verdict, Why};
use crate::state::{OutlierDetection, SuccessRate};

fn rules() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: Some(3),
        consecutive_gateway: None,
        consecutive_local: None,
        split_local: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 100,
        min_health_percent: 0,
        success_rate: None,
    }
}

fn endpoint(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, number], 8080))
}

/// Four endpoints, seen by pods.
struct World {
    rules: OutlierDetection,
    outliers: Outliers,
    began: Instant,
    now: Duration,
}

impl World {
    fn new(rules: OutlierDetection) -> Self {
        let began = Instant::now();
        Self { rules, outliers: Outliers::new(began), began, now: Duration::ZERO }
    }

    fn at(&self) -> Instant {
        self.began + self.now
    }

    fn saw(&mut self, pod: &str, number: u8, seen: Seen, probe: bool) -> Verdict {
        let (now, all) = (self.at(), || (1..=4).map(endpoint).collect());
        let (rules, pod) = (&self.rules, &Arc::from(pod));
        self.outliers.saw(Report { rules, endpoint: endpoint(number), pod, seen, probe, all: &all, now })
    }

    fn standing(&self, pod: &str, number: u8) -> Standing {
        self.outliers.standing(endpoint(number), &pod.into(), self.at())
    }

    fn is_out(&self, pod: &str, number: u8) -> bool {
        self.outliers.is_out(endpoint(number), &pod.into(), self.at())
    }

    fn enter(&mut self, pod: &str, number: u8) -> Option<bool> {
        let now = self.at();
        self.outliers.enter(endpoint(number), &pod.into(), now)
    }

    /// Three failures in a row.
    fn fails(&mut self, number: u8) {
        for _ in 0..3 {
            self.uses("a", number, Seen::Answer(500));
        }
    }

    /// Uses an endpoint as traffic does: entered, and reported if it was.
    fn uses(&mut self, pod: &str, number: u8, seen: Seen) -> Option<Verdict> {
        let probe = self.enter(pod, number)?;
        Some(self.saw(pod, number, seen, probe))
    }
}

const LOST: Seen = Seen::Lost { late: false };

#[test]
fn what_counts_and_for_whom() {
    let split = OutlierDetection { split_local: true, consecutive_local: Some(2), ..rules() };
    let gateway = OutlierDetection { consecutive_5xx: None, consecutive_gateway: Some(2), ..rules() };
    let off = OutlierDetection { consecutive_5xx: None, ..rules() };
    let ok = Seen::Answer(200);
    let failed = Seen::Answer(500);
    // Rules, what pod a sees of endpoint 1, why it is ejected, and whether that is so for pod b too.
    type Case<'a> = (&'a str, OutlierDetection, &'a [Seen], Option<(Why, bool)>);
    let cases: [Case<'_>; 15] = [
        ("5xx", rules(), &[failed, Seen::Answer(503), failed], Some((Why::Consecutive5xx, true))),
        ("a success between", rules(), &[failed, failed, ok, failed, failed], None),
        ("4xx is an answer", rules(), &[failed, failed, Seen::Answer(404), failed], None),
        ("not delivered", rules(), &[LOST; 3], Some((Why::Consecutive5xx, false))),
        ("both together", rules(), &[failed, LOST, failed], Some((Why::Consecutive5xx, false))),
        (
            "a connection is no success of a request",
            rules(),
            &[LOST, LOST, Seen::Connected, LOST],
            Some((Why::Consecutive5xx, false)),
        ),
        ("but it is of bytes", rules(), &[LOST, LOST, Seen::Served, LOST], None),
        (
            "gateway errors",
            gateway.clone(),
            &[Seen::Answer(502), Seen::Answer(504)],
            Some((Why::ConsecutiveGatewayFailure, true)),
        ),
        ("500 is none", gateway.clone(), &[Seen::Answer(502), failed, Seen::Answer(504)], None),
        ("a lost one is 503", gateway, &[LOST, LOST], Some((Why::ConsecutiveGatewayFailure, false))),
        ("counted apart", split.clone(), &[LOST, LOST], Some((Why::ConsecutiveLocalOriginFailure, false))),
        ("apart from 5xx", split.clone(), &[failed, LOST, failed], None),
        ("where a connection is a success", split.clone(), &[LOST, Seen::Connected, LOST], None),
        ("and 5xx count as ever", split, &[failed, failed, failed], Some((Why::Consecutive5xx, true))),
        ("nothing is looked at", off, &[failed, failed, failed, failed, LOST, LOST, LOST], None),
    ];
    for (name, rules, seen, expected) in cases {
        let mut world = World::new(rules);
        let verdicts: Vec<Verdict> = seen.iter().map(|seen| world.saw("a", 1, *seen, false)).collect();
        let why = verdicts.iter().find_map(|verdict| match verdict {
            Verdict::Ejected(why, _) => Some(*why),
            _ => None,
        });
        let seen = why.map(|why| (why, world.is_out("b", 1)));
        assert_eq!(seen, expected, "{name}");
        assert_eq!(world.is_out("a", 1), expected.is_some(), "{name}");
    }
}

#[test]
fn too_small_a_share_of_successes_ejects_although_no_row_is_full() {
    let rate = SuccessRate { percent: 80, window: Duration::from_secs(10), least: 10 };
    let rules = || OutlierDetection { consecutive_5xx: None, success_rate: Some(rate), ..rules() };
    // One of every `bad` requests fails, one request each 100 ms; whether it is left alone for it, and by everybody.
    for (bad, seen, expected) in
        [(3, Seen::Answer(500), Some(true)), (10, Seen::Answer(500), None), (2, LOST, Some(false)), (10, LOST, None)]
    {
        let mut world = World::new(rules());
        let mut why = None;
        for number in 1..=300 {
            world.now += Duration::from_millis(100);
            let seen = if number % bad == 0 { seen } else { Seen::Answer(200) };
            if let Some(Verdict::Ejected(found, _)) = world.uses("a", 1, seen) {
                assert!(number >= 10, "{number} requests say nothing");
                why = Some(found);
                break;
            }
        }
        assert_eq!(why, expected.map(|_| Why::SuccessRate), "{bad} {seen:?}");
        assert_eq!((world.is_out("a", 1), world.is_out("b", 1)), (expected.is_some(), expected == Some(true)));
        assert!(!world.is_out("a", 2));
    }
    // What was long ago does not count.
    let mut world = World::new(rules());
    for _ in 0..9 {
        world.uses("a", 1, Seen::Answer(500));
    }
    world.now += Duration::from_secs(11);
    assert_eq!(world.uses("a", 1, Seen::Answer(500)), Some(Verdict::Nothing));
}

#[test]
fn pods_add_up_to_one_count_of_answers() {
    let mut world = World::new(rules());
    for pod in ["a", "b", "c"] {
        world.saw(pod, 1, Seen::Answer(503), false);
    }
    assert!(world.is_out("d", 1));
}

#[test]
fn each_ejection_lasts_longer_and_one_request_tries_the_endpoint() {
    let mut world = World::new(rules());
    let mut lasted = Vec::new();
    for round in 0..12 {
        while world.uses("a", 1, Seen::Answer(500)).is_some() {}
        let Standing::Open(until) = world.standing("a", 1) else { panic!("round {round}") };
        lasted.push((until - world.at()).as_secs());
        // What was asked before it was ejected does not bring it back.
        world.saw("a", 1, Seen::Answer(200), false);
        assert!(world.is_out("a", 1));
        world.now = until - world.began;
        assert_eq!(world.standing("a", 1), Standing::HalfOpen { probed: false });
        assert_eq!((world.enter("a", 1), world.enter("b", 1)), (Some(true), None), "one, and no other");
        world.outliers.leave(endpoint(1), &"a".into());
    }
    assert_eq!(lasted, [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300]);
    assert_eq!(world.uses("a", 1, Seen::Answer(200)), Some(Verdict::Back));
    assert_eq!(world.standing("b", 1), Standing::Closed);
    // One ejection is forgiven for each interval in which all is well.
    world.now += Duration::from_secs(50);
    while world.uses("a", 1, Seen::Answer(500)).is_some() {}
    let Standing::Open(until) = world.standing("a", 1) else { panic!("closed") };
    assert_eq!((until - world.at()).as_secs(), 240, "12 - 5 + 1 times 30 s");
}

#[test]
fn ejected_endpoints_are_looked_at_at_intervals() {
    let mut world = World::new(OutlierDetection { base_ejection: Duration::from_secs(1), ..rules() });
    world.now = Duration::from_secs(3);
    world.fails(1);
    world.now = Duration::from_millis(9_999);
    assert!(world.is_out("a", 1));
    world.now = Duration::from_secs(10);
    assert!(!world.is_out("a", 1));
}

#[test]
fn no_more_than_a_share_is_ejected_but_always_one() {
    for (percent, expected) in [(0, 1), (10, 1), (49, 1), (50, 2), (74, 2), (75, 3), (100, 4)] {
        let mut world = World::new(OutlierDetection { max_ejection_percent: percent, ..rules() });
        for number in 1..=4 {
            world.fails(number);
        }
        let out = (1..=4).filter(|number| world.is_out("a", *number)).count();
        assert_eq!(out, expected, "{percent} %");
    }
}

#[test]
fn with_too_few_left_ejection_does_not_count() {
    let rules = OutlierDetection { min_health_percent: 50, ..rules() };
    let mut world = World::new(rules.clone());
    let panics = |world: &World| world.outliers.panics(&rules, 4, &"a".into(), world.at());
    for number in 1..=3 {
        assert!(!panics(&world), "{number}");
        world.fails(number);
    }
    assert!(panics(&world), "one of four is left");
}

#[test]
fn the_table_is_bounded() {
    let mut world = World::new(OutlierDetection { consecutive_5xx: Some(100), ..rules() });
    for pod in 0..super::MOST * 2 {
        world.saw(&pod.to_string(), 1, LOST, false);
    }
    assert!(world.outliers.entries.len() <= super::MOST);
}

/// One step of a walk.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A pod uses an endpoint, which does this.
    Use(u8, u8, Seen),
    /// A late report of what was asked before.
    Late(u8, u8, Seen),
    /// Time goes by.
    Wait(u16),
    /// Whoever tries an endpoint goes away without a report.
    Abandon(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let seen = prop_oneof![
        1 => Just(Seen::Answer(200)),
        4 => Just(Seen::Answer(503)),
        2 => Just(Seen::Answer(500)),
        2 => Just(LOST),
        1 => Just(Seen::Connected),
        1 => Just(Seen::Served),
    ];
    let (pod, number) = (0..2u8, 1..5u8);
    prop_oneof![
        8 => (pod.clone(), number.clone(), seen.clone()).prop_map(|(pod, number, seen)| Step::Use(pod, number, seen)),
        2 => (pod.clone(), number.clone(), seen).prop_map(|(pod, number, seen)| Step::Late(pod, number, seen)),
        2 => (1..20_000u16).prop_map(Step::Wait),
        1 => (pod, number).prop_map(|(pod, number)| Step::Abandon(pod, number)),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_share_holds_and_one_tries(
        steps in prop::collection::vec(step(), 1..300), percent in 0..101u32, split in any::<bool>(), gateway in 0..4u32,
    ) {
        let local = split.then_some(2);
        let rules = OutlierDetection {
            max_ejection_percent: percent, split_local: split, consecutive_local: local,
            consecutive_gateway: (gateway > 0).then_some(gateway), ..rules()
        };
        let most = (4 * percent as usize / 100).max(1);
        let mut world = World::new(rules);
        let pods = ["a", "b"];
        let mut failed = std::collections::BTreeSet::new();
        for step in steps {
            match step {
                Step::Wait(ms) => world.now += Duration::from_millis(ms.into()),
                Step::Use(pod, number, seen) => {
                    let pod = pods[usize::from(pod)];
                    let out = world.is_out(pod, number);
                    if let Some(probe) = world.enter(pod, number) {
                        prop_assert!(!out, "used although it is out");
                        prop_assert!(!probe || world.enter(pod, number).is_none(), "tried by two");
                        world.saw(pod, number, seen, probe);
                        if probe && seen == Seen::Connected {
                            world.outliers.leave(endpoint(number), &pod.into());
                        }
                    }
                    if matches!(seen, Seen::Answer(500..) | Seen::Lost { .. }) { failed.insert(number); }
                }
                Step::Late(pod, number, seen) => {
                    world.saw(pods[usize::from(pod)], number, seen, false);
                    if matches!(seen, Seen::Answer(500..) | Seen::Lost { .. }) { failed.insert(number); }
                }
                Step::Abandon(pod, number) => {
                    let pod = pods[usize::from(pod)];
                    if world.enter(pod, number) == Some(true) {
                        world.outliers.leave(endpoint(number), &pod.into());
                    }
                }
            }
            for (index, pod) in pods.iter().enumerate() {
                let open = (1..=4).filter(|number| matches!(world.standing(pod, *number), Standing::Open(_))).count();
                // What one pod met may be ejected for it before the same happens to everybody.
                prop_assert!(open <= most * 2, "{open} of 4 for {index} at {percent} %");
                for number in 1..=4 {
                    prop_assert!(!world.is_out(pod, number) || failed.contains(&number), "it never failed");
                }
            }
            let everybody = (1..=4).filter(|number| {
                matches!(world.standing("nobody", *number), Standing::Open(_))
            });
            prop_assert!(everybody.count() <= most, "everybody's share at {percent} %");
        }
        // Nothing is left for ever: later each may be tried.
        world.now += Duration::from_secs(100_000);
        for number in 1..=4 {
            prop_assert!(!world.is_out("a", number) && !world.is_out("b", number));
        }
    }
}
